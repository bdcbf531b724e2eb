//! Services, names and network policies on two hosts, from what Kubernetes' conformance programme asks of a cluster's network.
use futures::{StreamExt as _, stream};
use integration_tests::{Cluster, Setup, can_run_hosts, eventually, requests};
use k8s_openapi::api::{
    core::v1::{EndpointSubset, Endpoints, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams},
};
use serde_json::json;
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

/// Longer than anything takes, also where others use the machine.
const PATIENCE: Duration = Duration::from_secs(180);
const CTL: &str = "/usr/local/lib/pilothouse/ctl";

#[tokio::test]
async fn the_network_of_a_cluster() {
    if !can_run_hosts("the_network_of_a_cluster") {
        return;
    }
    let cluster = Cluster::start("network", Setup::Hosts(2)).await;
    dns_runs_on_both_nodes(&cluster).await;
    apply(
        &cluster,
        r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: web}}}
      containers:
      - name: web
        image: httpd-app:1.0
        ports: [{name: http, containerPort: 80}]
        readinessProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 1, failureThreshold: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec: {hostname: harbour, subdomain: boats, containers: [{name: c, image: "busybox:stable", command: [sleep, "3600"]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, selector: {app: web}, ports: [{name: http, port: 80}, {name: also, port: 8080, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: boats}
spec: {clusterIP: None, selector: {app: client}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: alias}
spec: {type: ExternalName, externalName: web.default.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: nobody}
spec: {selector: {app: nobody}, ports: [{name: http, port: 80, protocol: TCP}, {name: names, port: 80, protocol: UDP}]}
"#,
    );
    cluster.ready_pods("app=web", 2, PATIENCE).await;
    cluster.ready_pods("app=client", 1, PATIENCE).await;
    pods_are_reached_at_their_own_addresses(&cluster).await;
    services_are_reached(&cluster).await;
    endpoints_follow_soon(&cluster).await;
    endpoints_are_those_of_the_ports(&cluster).await;
    datagrams_go_between_pods_and_from_nodes(&cluster).await;
    slices_made_by_hand_are_served(&cluster).await;
    the_api_server_passes_requests_on(&cluster).await;
    names_are_resolved(&cluster).await;
    pods_may_have_a_resolver_of_their_own(&cluster).await;
    services_change_their_type(&cluster).await;
    host_ports_do_not_conflict(&cluster).await;
    policies_hold(&cluster).await;
}

#[track_caller]
fn apply(cluster: &Cluster, yaml: &str) {
    cluster.hosts[0].exec(&format!("{CTL} apply -f - <<'END'\n{yaml}\nEND\n")).success();
}

/// The cluster's DNS is an ordinary Deployment, a pod of it on each node, behind its Service.
async fn dns_runs_on_both_nodes(cluster: &Cluster) {
    let pods = Api::<Pod>::namespaced(cluster.client(), "kube-system");
    let of_dns = ListParams::default().labels("k8s-app=kube-dns");
    eventually("a DNS server on each node", PATIENCE, || async {
        let mut list = pods.list(&of_dns).await.map_err(|e| e.to_string())?.items;
        list.retain(|pod| apimachinery::pod::is_ready(pod) && pod.metadata.deletion_timestamp.is_none());
        let nodes: BTreeSet<_> = list.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.clone()).collect();
        // Both may have started before there was a second node; who comes anew prefers the other.
        if let ([_, second], 1) = (list.as_slice(), nodes.len()) {
            let name = second.metadata.name.as_deref().unwrap_or_default();
            pods.delete(name, &DeleteParams::default()).await.map_err(|e| e.to_string())?;
        }
        if (list.len(), nodes.len()) == (2, 2) { Ok(()) } else { Err(format!("{} on {nodes:?}", list.len())) }
    })
    .await;
    // The API server's own Service has endpoints of both kinds.
    let endpoints =
        Api::<Endpoints>::namespaced(cluster.client(), "default").get("kubernetes").await.expect("Endpoints");
    assert!(endpoints.subsets.is_some_and(|subsets| !subsets.is_empty()));
    let slices = Api::<EndpointSlice>::namespaced(cluster.client(), "default");
    let of = ListParams::default().labels("kubernetes.io/service-name=kubernetes");
    assert!(!slices.list(&of).await.expect("slices").items.is_empty());
}

async fn service(cluster: &Cluster, name: &str) -> Service {
    Api::<Service>::namespaced(cluster.client(), "default").get(name).await.expect("a Service")
}

async fn cluster_ip(cluster: &Cluster, name: &str) -> IpAddr {
    let spec = service(cluster, name).await.spec.unwrap_or_default();
    spec.cluster_ip.as_deref().and_then(|ip| ip.parse().ok()).expect("a cluster IP")
}

/// Who answers, of so many requests from a host.
fn who(cluster: &Cluster, host: usize, address: SocketAddr, times: usize) -> BTreeSet<String> {
    let asked = cluster.hosts[host]
        .in_network(move || (0..times).filter_map(|_| requests::get(address).ok()).collect::<Vec<String>>());
    let pages = asked.join().expect("the requests' thread");
    pages
        .iter()
        .filter_map(|page| page.split_whitespace().find(|word| word.contains("web-")).map(str::to_owned))
        .collect()
}

/// By a pod and by either node.
async fn pods_are_reached_at_their_own_addresses(cluster: &Cluster) {
    for pod in cluster.ready_pods("app=web", 2, PATIENCE).await {
        let ip: IpAddr = pod.status.and_then(|status| status.pod_ip?.parse().ok()).expect("a pod IP");
        let name = pod.metadata.name.unwrap_or_default();
        assert!(reaches(cluster, ip, 80), "{name} in a pod");
        for host in [0, 1] {
            assert_eq!(who(cluster, host, SocketAddr::new(ip, 80), 2), [name.clone()].into(), "{name} on node {host}");
        }
    }
}

/// A hundred Services, some at a time: how long until each has endpoints.
async fn endpoints_follow_soon(cluster: &Cluster) {
    let services = Api::<Service>::namespaced(cluster.client(), "default");
    let endpoints = Api::<Endpoints>::namespaced(cluster.client(), "default");
    let one = |number: usize| {
        let (services, endpoints, name) = (services.clone(), endpoints.clone(), format!("latency-{number}"));
        async move {
            let service = json!({"metadata": {"name": name, "labels": {"app": "latency"}},
                "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}});
            let service = serde_json::from_value(service).expect("a Service");
            let begun = Instant::now();
            services.create(&PostParams::default(), &service).await.expect("created");
            loop {
                let found = endpoints.get_opt(&name).await.expect("an answer").and_then(|found| found.subsets);
                if found.is_some_and(|subsets| !subsets.is_empty()) {
                    return begun.elapsed();
                }
                assert!(begun.elapsed() < PATIENCE, "{name} gets no endpoints");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    };
    let mut times: Vec<Duration> = stream::iter(0..100).map(one).buffer_unordered(15).collect().await;
    times.sort();
    println!("endpoints of 100 Services: p50 {:?}, p90 {:?}, p99 {:?}", times[49], times[89], times[98]);
    // The programme's thresholds.
    assert!(times[49] < Duration::from_secs(20) && times[98] < Duration::from_secs(50), "{times:?}");
    let ours = ListParams::default().labels("app=latency");
    services.delete_collection(&DeleteParams::default(), &ours).await.expect("deleted");
}

/// Two ports of a Service, each served by another pod: both come and go with their pods, and packets follow.
async fn endpoints_are_those_of_the_ports(cluster: &Cluster) {
    apply(
        cluster,
        "apiVersion: v1\nkind: Service\nmetadata: {name: two}\nspec:\n  selector: {app: two}\n  ports:\n  \
         - {name: one, port: 81, targetPort: one}\n  - {name: other, port: 82, targetPort: other}\n",
    );
    let ip = cluster_ip(cluster, "two").await;
    let settle = |expected: &'static [&'static str]| async move {
        eventually(&format!("endpoints at {expected:?}"), PATIENCE, || async {
            let found = Api::<Endpoints>::namespaced(cluster.client(), "default").get_opt("two").await;
            let subsets = found.map_err(|error| error.to_string())?.ok_or("no Endpoints")?.subsets.unwrap_or_default();
            let of = |subset: &EndpointSubset| {
                let names =
                    subset.ports.iter().flatten().filter_map(|port| port.name.clone()).collect::<Vec<_>>().join(" ");
                format!("{} {names}", subset.addresses.as_ref().map_or(0, Vec::len))
            };
            let mut told: Vec<String> = subsets.iter().map(of).collect();
            told.sort();
            if told == expected { Ok(()) } else { Err(format!("{told:?}")) }
        })
        .await;
        for (port, name) in [(81, "one"), (82, "other")] {
            let wanted = expected.iter().any(|subset| subset.ends_with(name));
            eventually(&format!("port {port} is served: {wanted}"), PATIENCE, || async {
                let served = cluster.hosts[0].in_network(move || requests::get(SocketAddr::new(ip, port)).is_ok());
                if served.join().expect("the request's thread") == wanted { Ok(()) } else { Err("not yet".to_owned()) }
            })
            .await;
        }
    };
    let start = |name: &str| {
        apply(
            cluster,
            &format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: two-{name}, labels: {{app: two}}}}\nspec:\n  containers:\n  \
                 - {{name: c, image: \"httpd-app:1.0\", ports: [{{name: {name}, containerPort: 80}}], env: [{{name: DRAIN_SECONDS, value: \"0\"}}]}}\n"
            ),
        );
    };
    settle(&[]).await;
    start("one");
    settle(&["1 one"]).await;
    start("other");
    settle(&["1 one", "1 other"]).await;
    cluster.ctl("delete pod two-one --grace-period=1").success();
    settle(&["1 other"]).await;
    cluster.ctl("delete pod two-other --grace-period=1").success();
    settle(&[]).await;
    cluster.ctl("delete service two").success();
}

/// Both pods at every address; a client that is bound to one stays there, and is let go.
async fn services_are_reached(cluster: &Cluster) {
    let ip = cluster_ip(cluster, "web").await;
    let ports = service(cluster, "web").await.spec.and_then(|spec| spec.ports).unwrap_or_default();
    let node_port = ports[0].node_port.expect("a node port") as u16;
    let mut addresses = vec![SocketAddr::new(ip, 80), SocketAddr::new(ip, 8080)];
    addresses.extend(cluster.hosts.iter().map(|host| SocketAddr::new(host.address().into(), node_port)));
    for host in [0, 1] {
        for address in &addresses {
            eventually(&format!("both pods answer at {address}"), PATIENCE, || async {
                let pods = who(cluster, host, *address, 30);
                if pods.len() == 2 { Ok(()) } else { Err(format!("{pods:?}")) }
            })
            .await;
        }
    }
    // A pod reaches it at the same addresses, the nodes' too.
    for address in &addresses {
        assert!(reaches(cluster, address.ip(), address.port()), "{address} in a pod");
    }
    let affinity = |kind: &str| format!("patch service web -p '{{\"spec\":{{\"sessionAffinity\":\"{kind}\"}}}}'");
    for (kind, pods) in [("ClientIP", 1), ("None", 2)] {
        cluster.ctl(&affinity(kind)).success();
        for address in [addresses[0], addresses[2]] {
            eventually(&format!("affinity {kind} at {address}"), PATIENCE, || async {
                let found = who(cluster, 1, address, 30);
                if found.len() == pods { Ok(()) } else { Err(format!("{found:?}")) }
            })
            .await;
        }
    }
    // Nobody behind it: refused at once, not left to wait.
    let nobody = SocketAddr::new(cluster_ip(cluster, "nobody").await, 80);
    eventually("it is refused", PATIENCE, || async {
        let answer = cluster.hosts[0].in_network(move || requests::get(nobody)).join().expect("the request's thread");
        if answer.clone().is_err_and(|error| error.contains("refused")) { Ok(()) } else { Err(format!("{answer:?}")) }
    })
    .await;
}

/// Each DNS server is asked over UDP at its own address, in a pod and from either node.
async fn datagrams_go_between_pods_and_from_nodes(cluster: &Cluster) {
    let pods = Api::<Pod>::namespaced(cluster.client(), "kube-system");
    let servers = pods.list(&ListParams::default().labels("k8s-app=kube-dns")).await.expect("pods").items;
    // One that had to leave its node may be there still.
    let stays = servers.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
    let addresses: Vec<IpAddr> = stays.filter_map(|pod| pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()).collect();
    assert_eq!(addresses.len(), 2);
    for address in addresses {
        resolves(cluster, &format!("kubernetes.default.svc.cluster.local {address}"), "10.96.0.1").await;
        for host in &cluster.hosts {
            // An empty question of an id, which is refused with it. (A datagram may be lost.)
            let ask = move || {
                let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
                socket.set_read_timeout(Some(Duration::from_secs(5)))?;
                socket.send_to(&[7, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0], (address, 53))?;
                let mut answer = [0; 512];
                socket.recv(&mut answer).map(|_| [answer[0], answer[1]])
            };
            eventually(&format!("{address} answers datagrams"), PATIENCE, || async {
                let asked = host.in_network(ask).join().expect("the question's thread");
                if asked.as_ref().is_ok_and(|id| *id == [7, 7]) { Ok(()) } else { Err(format!("{asked:?}")) }
            })
            .await;
        }
    }
}

/// A Service without a selector whose slices name other addresses, and for the same port of it other numbers.
async fn slices_made_by_hand_are_served(cluster: &Cluster) {
    let mut yaml =
        "apiVersion: v1\nkind: Service\nmetadata: {name: manual}\nspec: {ports: [{name: http, port: 80}]}\n".to_owned();
    for (at, pod) in cluster.ready_pods("app=web", 2, PATIENCE).await.iter().enumerate() {
        let ip = pod.status.as_ref().and_then(|status| status.pod_ip.clone()).expect("a pod IP");
        yaml += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
             metadata: {{name: manual-{at}, labels: {{kubernetes.io/service-name: manual}}}}\n\
             ports: [{{name: http, port: 80, protocol: TCP}}]\nendpoints: [{{addresses: [{ip}]}}]\n"
        );
    }
    apply(cluster, &yaml);
    let address = SocketAddr::new(cluster_ip(cluster, "manual").await, 80);
    eventually("both slices' endpoints answer", PATIENCE, || async {
        let pods = who(cluster, 0, address, 30);
        if pods.len() == 2 { Ok(()) } else { Err(format!("{pods:?}")) }
    })
    .await;
    cluster.ctl("delete service manual").success();
}

/// To a Service by the name and the number of its port, and to a pod; by every method, with a path or without.
async fn the_api_server_passes_requests_on(cluster: &Cluster) {
    let pods = cluster.ready_pods("app=web", 2, PATIENCE).await;
    let pod = pods[0].metadata.name.clone().unwrap_or_default();
    for to in [
        "services/web:http",
        "services/http:web:80",
        "services/web:8080",
        &format!("pods/{pod}:80"),
        &format!("pods/http:{pod}:80"),
    ] {
        eventually(&format!("{to} by way of the API server"), PATIENCE, || async {
            let found = cluster.ctl(&format!("get --raw /api/v1/namespaces/default/{to}/proxy/"));
            if found.stdout.contains("httpd-app 1.0") { Ok(()) } else { Err(format!("{found:?}")) }
        })
        .await;
    }
    for method in ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"] {
        for to in [format!("pods/{pod}/proxy/"), "services/web:http/proxy/".to_owned()] {
            for path in ["", "some/path/with/it"] {
                let uri = format!("/api/v1/namespaces/default/{to}{path}");
                let request = http::Request::builder().method(method).uri(&uri).body(kube::client::Body::empty());
                let answer = cluster.client().send(request.expect("a request")).await.expect("an answer");
                // What the page's server says to it.
                let expected = match (method, path) {
                    ("GET" | "HEAD", "") => 200,
                    ("GET" | "HEAD", _) => 404,
                    _ => 405,
                };
                assert_eq!(answer.status().as_u16(), expected, "{method} {uri}");
                let kind = answer.headers().get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
                assert!(kind.is_some_and(|kind| kind.starts_with("text/plain")), "{method} {uri}: {kind:?}");
            }
        }
    }
}

async fn resolves(cluster: &Cluster, question: &str, expected: &str) {
    eventually(&format!("{question} is {expected}"), PATIENCE, || async {
        let found = cluster.ctl(&format!("exec client -- nslookup {question}"));
        if found.stdout.contains(expected) { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
}

/// Services, pods by hostname and subdomain, aliases, addresses, and what is not there.
async fn names_are_resolved(cluster: &Cluster) {
    let hosts = cluster.ctl("exec client -- cat /etc/hosts").success();
    assert!(hosts.contains("harbour.boats.default.svc.cluster.local"), "{hosts}");
    let ip = cluster_ip(cluster, "web").await.to_string();
    let reversed = ip.split('.').rev().collect::<Vec<_>>().join(".");
    let pod_ip = client_ip(cluster).await;
    for (question, expected) in [
        ("web.default.svc.cluster.local", ip.as_str()),
        ("kubernetes.default.svc.cluster.local", "10.96.0.1"),
        ("boats.default.svc.cluster.local", &pod_ip),
        ("harbour.boats.default.svc.cluster.local", &pod_ip),
        ("alias.default.svc.cluster.local", &ip),
        (&format!("-type=ptr {reversed}.in-addr.arpa"), "web.default.svc.cluster.local"),
        ("-type=srv _http._tcp.web.default.svc.cluster.local", "web.default.svc.cluster.local"),
        (&format!("{}.default.pod.cluster.local", pod_ip.replace('.', "-")), &pod_ip),
        ("none.default.svc.cluster.local", "NXDOMAIN"),
        // By the search path. (busybox tries it with names without a dot alone.)
        ("web", &ip),
        ("boats", &pod_ip),
        ("-type=srv _http._tcp.boats.default.svc.cluster.local", "harbour.boats.default.svc.cluster.local"),
    ] {
        resolves(cluster, question, expected).await;
    }
}

async fn pods_may_have_a_resolver_of_their_own(cluster: &Cluster) {
    apply(
        cluster,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: own, labels: {app: own}}\nspec:\n  dnsPolicy: None\n  \
         dnsConfig: {nameservers: [192.0.2.53], searches: [search.example], options: [{name: ndots, value: \"2\"}]}\n  \
         containers: [{name: c, image: \"busybox:stable\", command: [sleep, \"3600\"]}]\n",
    );
    cluster.ready_pods("app=own", 1, PATIENCE).await;
    let own = cluster.ctl("exec own -- cat /etc/resolv.conf").success();
    let mut lines: Vec<&str> = own.lines().collect();
    lines.sort();
    assert_eq!(lines, ["nameserver 192.0.2.53", "options ndots:2", "search search.example"]);
    cluster.ctl("delete pod own --grace-period=1").success();
}

/// From one name to another, to an address and back, with packets that follow.
async fn services_change_their_type(cluster: &Cluster) {
    let patch = |spec: &str| cluster.ctl(&format!("patch service alias -p '{{\"spec\":{spec}}}'")).success();
    patch(r#"{"externalName":"boats.default.svc.cluster.local"}"#);
    resolves(cluster, "alias.default.svc.cluster.local", "boats.default.svc.cluster.local").await;
    for kind in ["ClusterIP", "NodePort"] {
        patch(&format!(
            r#"{{"type":"{kind}","externalName":null,"selector":{{"app":"web"}},"ports":[{{"port":80}}]}}"#
        ));
        let ip = cluster_ip(cluster, "alias").await;
        resolves(cluster, "alias.default.svc.cluster.local", &ip.to_string()).await;
        let ports = service(cluster, "alias").await.spec.and_then(|spec| spec.ports).unwrap_or_default();
        let mut addresses = vec![SocketAddr::new(ip, 80)];
        let node_port = ports[0].node_port.map(|port| port as u16);
        assert_eq!(node_port.is_some(), kind == "NodePort");
        addresses.extend(node_port.map(|port| SocketAddr::new(cluster.hosts[0].address().into(), port)));
        for address in addresses {
            eventually(&format!("{address} answers"), PATIENCE, || async {
                if who(cluster, 1, address, 5).is_empty() { Err("nobody") } else { Ok(()) }.map_err(str::to_owned)
            })
            .await;
        }
        patch(
            r#"{"type":"ExternalName","externalName":"web.default.svc.cluster.local","clusterIP":null,"clusterIPs":null,"ports":null,"selector":null}"#,
        );
        resolves(cluster, "alias.default.svc.cluster.local", "canonical name").await;
        eventually("its address is free", PATIENCE, || async {
            let pods = who(cluster, 1, SocketAddr::new(ip, 80), 2);
            if pods.is_empty() { Ok(()) } else { Err(format!("{pods:?}")) }
        })
        .await;
    }
}

/// One number on one host, for two protocols and two addresses.
async fn host_ports_do_not_conflict(cluster: &Cluster) {
    let (name, address) = (cluster.hosts[1].name(), cluster.hosts[1].address());
    for (pod, at, protocol) in [
        ("port-1", "127.0.0.1".to_owned(), "TCP"),
        ("port-2", address.to_string(), "TCP"),
        ("port-3", address.to_string(), "UDP"),
    ] {
        apply(
            cluster,
            &format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: {pod}, labels: {{app: host-port}}}}\nspec:\n  nodeName: {name}\n  \
                 containers:\n  - {{name: c, image: \"httpd-app:1.0\", ports: [{{containerPort: 80, hostPort: 54323, hostIP: {at}, protocol: {protocol}}}]}}\n"
            ),
        );
    }
    cluster.ready_pods("app=host-port", 3, PATIENCE).await;
    for (host, at) in [(1, IpAddr::from([127, 0, 0, 1])), (1, address.into()), (0, address.into())] {
        let to = SocketAddr::new(at, 54_323);
        eventually(&format!("{to} answers"), PATIENCE, || async {
            cluster.hosts[host].in_network(move || requests::get(to)).join().expect("the request's thread").map(drop)
        })
        .await;
    }
    cluster.ctl("delete pod -l app=host-port --grace-period=1").success();
}

/// A policy closes the pods to all but one client, while the kubelet's probes go on, and is taken back.
async fn policies_hold(cluster: &Cluster) {
    let ip = cluster_ip(cluster, "web").await;
    let from_host = |host: usize| {
        let asked = cluster.hosts[host].in_network(move || requests::get(SocketAddr::new(ip, 80)));
        asked.join().expect("the request's thread").is_ok()
    };
    let policy = |rule: &str| {
        apply(
            cluster,
            &format!(
                "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: web}}\nspec: {{podSelector: {{matchLabels: \
                 {{app: web}}}}, policyTypes: [Ingress], ingress: [{rule}]}}\n"
            ),
        );
    };
    let client = client_ip(cluster).await;
    let settles = |what: &'static str, wanted: bool| async move {
        eventually(what, PATIENCE, || async {
            // More than once: it must hold on both nodes.
            let open = (0..6).filter(|_| reaches(cluster, ip, 80)).count();
            if open == if wanted { 6 } else { 0 } { Ok(()) } else { Err(format!("{open} of 6")) }
        })
        .await;
    };
    settles("open without a policy", true).await;
    policy("");
    settles("closed by default", false).await;
    policy("{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: http}]}");
    settles("open for the client", true).await;
    policy(&format!("{{from: [{{ipBlock: {{cidr: 0.0.0.0/0, except: [{client}/32]}}}}]}}"));
    settles("closed for the client's address", false).await;
    // Probes went on all the time.
    cluster.ready_pods("app=web", 2, PATIENCE).await;
    assert!(from_host(0) || from_host(1), "a node reaches its own pods");
    cluster.ctl("delete networkpolicy web").success();
    settles("open again", true).await;
}

/// Whether the client's pod gets an answer at once. (Debian's static busybox has a `wget` that does not run.)
fn reaches(cluster: &Cluster, ip: IpAddr, port: u16) -> bool {
    let ask = format!(r#"printf "GET / HTTP/1.0\r\n\r\n" | nc -w 2 {ip} {port}"#);
    cluster.ctl(&format!("exec client -- sh -c '{ask}'")).stdout.contains("httpd-app 1.0")
}

async fn client_ip(cluster: &Cluster) -> String {
    let pods = cluster.ready_pods("app=client", 1, PATIENCE).await;
    pods[0].status.as_ref().and_then(|status| status.pod_ip.clone()).expect("a pod IP")
}
