//! Cluster IPs and node ports: two apiservers over one etcd give none twice and lose none.

use crate::common::{Server, eventually, has_etcd};
use futures::StreamExt as _;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::time::{Duration, Instant};

const RANGE: &str = "--service-cluster-ip-range=10.99.0.0/24";
const SERVICES: &str = "/api/v1/namespaces/services/services";
/// How long what is freed may take to be free.
const FREED_WITHIN: Duration = Duration::from_secs(30);

fn node_port(name: &str, number: u16) -> Value {
    let mut port = json!({"port": 80});
    if number != 0 {
        port["nodePort"] = json!(number);
    }
    json!({"metadata": {"name": name}, "spec": {"type": "NodePort", "ports": [port]}})
}

async fn addresses(server: &Server) -> HashSet<String> {
    let list = server.get("/apis/networking.k8s.io/v1/ipaddresses").await.unwrap();
    list["items"].as_array().unwrap().iter().map(|a| a["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_given_twice_and_nothing_is_lost() {
    const COUNT: usize = 120;
    if !has_etcd() {
        return;
    }
    let first = Server::start_with(&[RANGE]).await;
    let second = first.sibling().await;
    first.namespace("services").await;
    let made: Vec<Value> = futures::stream::iter(0..COUNT)
        .map(|at| {
            let server = if at % 2 == 0 { &first } else { &second };
            async move { server.post(SERVICES, &node_port(&format!("s{at}"), 0)).await.unwrap() }
        })
        .buffer_unordered(8)
        .collect()
        .await;
    let ips: HashSet<&str> = made.iter().map(|s| s["spec"]["clusterIP"].as_str().unwrap()).collect();
    let ports: HashSet<i64> = made.iter().map(|s| s["spec"]["ports"][0]["nodePort"].as_i64().unwrap()).collect();
    assert_eq!((ips.len(), ports.len()), (COUNT, COUNT));
    assert!(ips.iter().all(|ip| addresses_of_range(ip)) && ports.iter().all(|p| (30_000..=32_767).contains(p)));

    // The same port asked of both at once is given by one. (Ports this low are left to those who ask.)
    for at in 0..5_u16 {
        let (number, names) = (30_010 + at, [format!("a{at}"), format!("b{at}")]);
        let (bodies, mut codes) = ([node_port(&names[0], number), node_port(&names[1], number)], Vec::new());
        let (a, b) = tokio::join!(first.post(SERVICES, &bodies[0]), second.post(SERVICES, &bodies[1]));
        for result in [a, b] {
            codes.push(result.map_or_else(|(code, _)| code, |_| 201));
        }
        codes.sort_unstable();
        assert_eq!(codes, [201, 422], "port {number}");
    }

    // A creation that fails gives back what it had taken; a deletion too.
    let before = addresses(&first).await.len();
    assert_eq!(first.post(SERVICES, &node_port("s0", 30_060)).await.unwrap_err().0, 409);
    let deadline = Instant::now() + FREED_WITHIN;
    while addresses(&first).await.len() != before {
        assert!(Instant::now() < deadline, "a failed creation keeps its address");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    first
        .post(SERVICES, &node_port("again", 30_060))
        .await
        .unwrap_or_else(|e| panic!("the port is not free again: {e:?}"));
    first.delete(SERVICES, &Value::Null).await.unwrap();
    let deadline = Instant::now() + FREED_WITHIN;
    while addresses(&first).await.len() > 1 {
        assert!(Instant::now() < deadline, "addresses without Services: {:?}", addresses(&first).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn addresses_of_range(ip: &str) -> bool {
    ip.strip_prefix("10.99.0.").and_then(|last| last.parse::<u8>().ok()).is_some_and(|last| last > 1 && last < 255)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_changes_its_type() {
    if !has_etcd() {
        return;
    }
    let server = Server::start_with(&[RANGE]).await;
    server.namespace("services").await;
    let path = format!("{SERVICES}/web");
    let service = json!({"metadata": {"name": "web"}, "spec": {"clusterIP": "10.99.0.5", "ports": [{"port": 80}]}});
    let made = server.post(SERVICES, &service).await.unwrap();
    assert_eq!((&made["spec"]["clusterIPs"], &made["spec"]["ipFamilies"]), (&json!(["10.99.0.5"]), &json!(["IPv4"])));
    for (refused, why) in [
        (json!({"spec": {"clusterIP": "10.99.0.6"}}), "may not change once set"),
        (
            json!({"spec": {"clusterIP": "10.99.0.5", "clusterIPs": ["10.99.0.7"]}}),
            "first value must match `clusterIP`",
        ),
        (json!({"spec": {"ports": [{"port": 80, "nodePort": 30_000}]}}), "may not be used when `type` is 'ClusterIP'"),
        (json!({"spec": {"type": "NodePort", "ports": [{"port": 80, "nodePort": 80}]}}), "30000-32767"),
    ] {
        let (code, message) = server.merge(&path, &refused).await.unwrap_err();
        assert!(code == 422 && message.contains(why), "{message}");
    }
    let external = json!({"spec": {"type": "ExternalName", "externalName": "example.com"}});
    let external = server.merge(&path, &external).await.unwrap();
    assert!(external["spec"].get("clusterIP").is_none() && external["spec"].get("ipFamilies").is_none(), "{external}");
    let back = json!({"spec": {"type": "NodePort", "externalName": null}});
    let back = server.merge(&path, &back).await.unwrap();
    assert!(back["spec"]["clusterIP"].is_string() && back["spec"]["ports"][0]["nodePort"].is_i64(), "{back}");
    let plain = server.merge(&path, &json!({"spec": {"type": "ClusterIP"}})).await.unwrap();
    assert_eq!(plain["spec"]["clusterIP"], back["spec"]["clusterIP"]);
    assert!(plain["spec"]["ports"][0].get("nodePort").is_none(), "{plain}");
    let dry = node_port("dry", 30_070);
    server.post(&format!("{SERVICES}?dryRun=All"), &dry).await.unwrap();
    server.post(SERVICES, &dry).await.unwrap_or_else(|e| panic!("a dry run takes nothing: {e:?}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_families_and_more_ranges() {
    if !has_etcd() {
        return;
    }
    let server = Server::start_with(&["--service-cluster-ip-range=10.99.0.0/24,fd99::/112"]).await;
    server.namespace("services").await;
    let path = format!("{SERVICES}/web");
    let one = json!({"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}});
    let made = server.post(SERVICES, &one).await.unwrap();
    assert_eq!(
        (&made["spec"]["ipFamilyPolicy"], &made["spec"]["ipFamilies"]),
        (&json!("SingleStack"), &json!(["IPv4"]))
    );
    let ips = |service: &Value| service["spec"]["clusterIPs"].as_array().unwrap().len();
    let two = server.merge(&path, &json!({"spec": {"ipFamilyPolicy": "RequireDualStack"}})).await.unwrap();
    assert_eq!((ips(&two), &two["spec"]["clusterIPs"][0]), (2, &made["spec"]["clusterIP"]), "{two}");
    assert!(two["spec"]["clusterIPs"][1].as_str().unwrap().starts_with("fd99::"), "{two}");
    let refused = server.merge(&path, &json!({"spec": {"clusterIPs": [made["spec"]["clusterIP"]]}})).await.unwrap_err();
    assert!(refused.0 == 422 && refused.1.contains("SingleStack"), "{refused:?}");
    let back = server.merge(&path, &json!({"spec": {"ipFamilyPolicy": "SingleStack"}})).await.unwrap();
    assert_eq!(back["spec"]["clusterIPs"], made["spec"]["clusterIPs"]);
    // The range named `kubernetes` is the command line's; addresses come from any other that is made, too.
    let cidrs = "/apis/networking.k8s.io/v1/servicecidrs";
    let deadline = Instant::now() + FREED_WITHIN;
    let default = loop {
        match server.get(&format!("{cidrs}/kubernetes")).await {
            Ok(found) => break found,
            Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(default["spec"]["cidrs"], json!(["10.99.0.0/24", "fd99::/112"]));
    assert_eq!(default["status"]["conditions"][0]["type"], "Ready");
    let at = |ip: &str| json!({"metadata": {"generateName": "s"}, "spec": {"clusterIP": ip, "ports": [{"port": 80}]}});
    let refused = server.post(SERVICES, &at("10.98.0.9")).await.unwrap_err();
    assert!(refused.1.contains("the provided network does not match the current range"), "{refused:?}");
    server.post(cidrs, &json!({"metadata": {"name": "more"}, "spec": {"cidrs": ["10.98.0.0/28"]}})).await.unwrap();
    // A range counts from when the allocator has seen it, which is not yet when its creation is answered.
    let deadline = Instant::now() + FREED_WITHIN;
    let made = loop {
        match server.post(SERVICES, &at("10.98.0.9")).await {
            Ok(made) => break made,
            Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(made["spec"]["clusterIP"], "10.98.0.9");
    let refused = server.post(SERVICES, &at("10.98.0.9")).await.unwrap_err();
    assert!(refused.1.contains("failed to allocate IP 10.98.0.9: provided IP is already allocated"), "{refused:?}");
    let refused = server.post(SERVICES, &at("10.98.0.15")).await.unwrap_err();
    assert!(refused.1.contains("is not in the valid range. The range of valid IPs is 10.98.0.0/28"), "{refused:?}");
    // Ports of one number share a node port.
    let dns = json!({"metadata": {"name": "dns"}, "spec": {"type": "NodePort", "ports": [
        {"name": "udp", "port": 53, "protocol": "UDP"}, {"name": "tcp", "port": 53}]}});
    let made = server.post(SERVICES, &dns).await.unwrap();
    assert_eq!(made["spec"]["ports"][0]["nodePort"], made["spec"]["ports"][1]["nodePort"]);
    let headless = json!({"metadata": {"name": "h"}, "spec": {"clusterIP": "None", "ports": [{"port": 80}]}});
    let made = server.post(SERVICES, &headless).await.unwrap();
    assert_eq!((&made["spec"]["ipFamilyPolicy"], ips(&made)), (&json!("RequireDualStack"), 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kubernetes_service_has_the_servers_that_are_there() {
    if !has_etcd() {
        return;
    }
    let server = Server::start_with(&["--advertise-address=192.0.2.1"]).await;
    let mut leaves = server.sibling_with(&["--advertise-address=192.0.2.2"]).await;
    let dies = server.sibling_with(&["--advertise-address=192.0.2.3"]).await;
    let has = async |wanted: &'static [&'static str]| {
        eventually("the servers", async || {
            let endpoints = server.get("/api/v1/namespaces/default/endpoints/kubernetes").await;
            let slice = server.get("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes").await;
            let (endpoints, slice) =
                (endpoints.map_err(|error| format!("{error:?}"))?, slice.map_err(|error| format!("{error:?}"))?);
            let texts = |list: &Value, pointer: &str| -> Vec<String> {
                let each = list.as_array().into_iter().flatten();
                each.filter_map(|item| Some(item.pointer(pointer)?.as_str()?.to_owned())).collect()
            };
            let told =
                [texts(&endpoints["subsets"][0]["addresses"], "/ip"), texts(&slice["endpoints"], "/addresses/0")];
            if told.iter().all(|told| told == wanted) { Ok(()) } else { Err(format!("{told:?}")) }
        })
        .await;
    };
    has(&["192.0.2.1", "192.0.2.2", "192.0.2.3"]).await;
    // It says that it goes, before it goes.
    leaves.signal("TERM");
    assert!(leaves.wait_for_end().success());
    let endpoints = server.get("/api/v1/namespaces/default/endpoints/kubernetes").await.unwrap();
    assert!(!endpoints.to_string().contains("192.0.2.2"), "{endpoints}");
    has(&["192.0.2.1", "192.0.2.3"]).await;
    // A lease that is kept no more ends.
    drop(dies);
    has(&["192.0.2.1"]).await;
}
