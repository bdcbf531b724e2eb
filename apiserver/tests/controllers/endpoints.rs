//! What stands behind Services: Endpoints and EndpointSlices of pods, and slices that mirror what a person wrote.

use crate::common::{Server, eventually};
use crate::start;
use serde_json::{Value, json};

const V1: &str = "/api/v1/namespaces/t";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/t/endpointslices";

async fn slices(server: &Server, service: &str) -> Vec<Value> {
    let list = server.get(&format!("{SLICES}?labelSelector=kubernetes.io%2Fservice-name%3D{service}")).await.unwrap();
    list["items"].as_array().cloned().unwrap_or_default()
}

/// All endpoints of a Service's slices: address, ready, serving, terminating.
async fn endpoints(server: &Server, service: &str) -> Vec<String> {
    let mut all: Vec<String> = slices(server, service)
        .await
        .iter()
        .flat_map(|slice| slice["endpoints"].as_array().cloned().unwrap_or_default())
        .map(|e| {
            let c = &e["conditions"];
            format!("{} {} {} {}", e["addresses"][0].as_str().unwrap(), c["ready"], c["serving"], c["terminating"])
        })
        .collect();
    all.sort();
    all
}

async fn become_of(server: &Server, service: &str, wanted: &[&str]) {
    eventually(&format!("{service} has {wanted:?}"), async || {
        let got = endpoints(server, service).await;
        if got == wanted { Ok(()) } else { Err(format!("{got:?}")) }
    })
    .await;
}

/// A pod that runs on `node` and has an address of each family.
async fn pod(server: &Server, name: &str, node: &str, number: u8) {
    let ports = json!([{"name": "web", "containerPort": 8080}]);
    let spec = json!({"nodeName": node, "containers": [{"name": "c", "image": "x", "ports": ports}]});
    let pod = json!({"metadata": {"name": name, "labels": {"app": "web"}}, "spec": spec});
    server.post(&format!("{V1}/pods"), &pod).await.unwrap();
    let status = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
        "podIP": format!("10.0.0.{number}"), "podIPs": [{"ip": format!("10.0.0.{number}")}, {"ip": format!("fd00::{number}")}]});
    server.merge(&format!("{V1}/pods/{name}/status"), &json!({"status": status})).await.unwrap();
}

async fn node(server: &Server, name: &str, zone: &str) {
    let labels = json!({"topology.kubernetes.io/zone": zone});
    server.post("/api/v1/nodes", &json!({"metadata": {"name": name, "labels": labels}})).await.unwrap();
    let status = json!({"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {"cpu": "2"}});
    server.merge(&format!("/api/v1/nodes/{name}/status"), &json!({"status": status})).await.unwrap();
}

fn service(name: &str, more: Value) -> Value {
    let mut spec = json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "web"}]});
    more.as_object().into_iter().flatten().for_each(|(k, v)| spec[k] = v.clone());
    json!({"metadata": {"name": name}, "spec": spec})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_stand_behind_a_service_while_both_are_there() {
    let Some(server) = start().await else { return };
    node(&server, "n1", "a").await;
    // Nobody is there yet: both say so.
    server.post(&format!("{V1}/services"), &service("web", json!({}))).await.unwrap();
    eventually("an empty slice and empty Endpoints", async || {
        let found = slices(&server, "web").await;
        let object = server.get(&format!("{V1}/endpoints/web")).await.map_err(|error| format!("{error:?}"))?;
        let empty = found.len() == 1 && found[0]["endpoints"].as_array().is_none_or(Vec::is_empty);
        if empty && object.get("subsets").is_none() { Ok(()) } else { Err(format!("{found:?} {object}")) }
    })
    .await;
    pod(&server, "p", "n1", 1).await;
    pod(&server, "q", "n1", 2).await;
    become_of(&server, "web", &["10.0.0.1 true true false", "10.0.0.2 true true false"]).await;
    let slice = &slices(&server, "web").await[0];
    assert_eq!(slice["ports"], json!([{"name": "http", "port": 8080, "protocol": "TCP"}]));
    assert_eq!((&slice["endpoints"][0]["nodeName"], &slice["endpoints"][0]["zone"]), (&json!("n1"), &json!("a")));
    assert_eq!(slice["endpoints"][0]["targetRef"]["kind"], "Pod");
    let subset = eventually("Endpoints of both", async || {
        let object = server.get(&format!("{V1}/endpoints/web")).await.map_err(|error| format!("{error:?}"))?;
        let subset = object["subsets"][0].clone();
        if subset["addresses"].as_array().is_some_and(|a| a.len() == 2) { Ok(subset) } else { Err(subset.to_string()) }
    })
    .await;
    assert_eq!(subset["ports"], slice["ports"]);
    // One that goes serves on, but is not ready; one whose node is unknown is left out.
    let path = format!("{V1}/pods/q");
    server.merge(&path, &json!({"metadata": {"finalizers": ["example.com/hold"]}})).await.unwrap();
    server.delete(&path, &Value::Null).await.unwrap();
    pod(&server, "lost", "gone", 3).await;
    become_of(&server, "web", &["10.0.0.1 true true false", "10.0.0.2 false true true"]).await;
    server.merge(&path, &json!({"metadata": {"finalizers": null}})).await.unwrap();
    server.delete(&path, &json!({"gracePeriodSeconds": 0})).await.ok();
    node(&server, "gone", "b").await;
    become_of(&server, "web", &["10.0.0.1 true true false", "10.0.0.3 true true false"]).await;
    // Clients are kept near when the Service says so.
    let near = json!({"spec": {"trafficDistribution": "PreferSameZone"}});
    server.merge(&format!("{V1}/services/web"), &near).await.unwrap();
    eventually("hints", async || {
        let found = slices(&server, "web").await;
        let hints: Vec<_> = found[0]["endpoints"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| e["hints"]["forZones"][0]["name"].clone())
            .collect();
        if hints == ["a", "b"] { Ok(()) } else { Err(format!("{hints:?}")) }
    })
    .await;
    server.delete(&format!("{V1}/services/web"), &Value::Null).await.unwrap();
    server.gone(&format!("{V1}/endpoints/web")).await;
    become_of(&server, "web", &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_of_a_person_are_mirrored() {
    let Some(server) = start().await else { return };
    let plain = json!({"metadata": {"name": "db"}, "spec": {"ports": [{"name": "p", "port": 5432}]}});
    server.post(&format!("{V1}/services"), &plain).await.unwrap();
    let ports = json!([{"name": "p", "port": 5432}]);
    let written =
        |ip: &str| json!({"metadata": {"name": "db"}, "subsets": [{"addresses": [{"ip": ip}], "ports": ports}]});
    server.post(&format!("{V1}/endpoints"), &written("10.1.2.3")).await.unwrap();
    become_of(&server, "db", &["10.1.2.3 true null null"]).await;
    let slice = &slices(&server, "db").await[0];
    let labels = &slice["metadata"]["labels"];
    assert_eq!(labels["endpointslice.kubernetes.io/managed-by"], "endpointslicemirroring-controller.k8s.io");
    assert_eq!(slice["metadata"]["ownerReferences"][0]["kind"], "Endpoints");
    server.put(&format!("{V1}/endpoints/db"), &written("10.2.3.4")).await.unwrap();
    become_of(&server, "db", &["10.2.3.4 true null null"]).await;
    assert_eq!(slices(&server, "db").await[0]["metadata"]["uid"], slice["metadata"]["uid"], "the same slice");
    server.delete(&format!("{V1}/endpoints/db"), &Value::Null).await.unwrap();
    become_of(&server, "db", &[]).await;
    eventually("no slice", async || match slices(&server, "db").await.len() {
        0 => Ok(()),
        left => Err(format!("{left}")),
    })
    .await;
}
