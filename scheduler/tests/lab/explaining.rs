//! `/debug/explain`, what-if manifests, profiles and extenders.

use std::collections::BTreeSet;
use std::sync::Arc;

use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::Lab;
use super::common::free_port;

#[tokio::test(flavor = "multi_thread")]
async fn a_decision_can_be_explained_and_supposed() {
    let Some(mut lab) = Lab::without_scheduler("explain", false).await else { return };
    let port = free_port();
    let flags = [
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
        "--authorization-always-allow-paths=/debug/explain,/metrics,/metrics/resources",
    ];
    lab.scheduler(&[&flags[..], &[&format!("--secure-port={port}")]].concat());
    lab.node("n1", "1").await;
    lab.node("n2", "4").await;
    lab.pod("big", json!({"cpu": "8"})).await;
    lab.refused("big").await;
    let mut config = lab.server.config();
    config.cluster_url = format!("https://127.0.0.1:{port}").parse().unwrap();
    let client = kube::Client::try_from(config).unwrap();
    let get = http::Request::get("/debug/explain?pod=t/big").body(Vec::new()).unwrap();
    let told: Value = client.request(get).await.unwrap();
    let numbers = &told["nodes"][1]["numbers"]["cpuMilli"];
    assert_eq!(
        (&told["nodes"][1]["refusedBy"], &numbers["requested"]),
        (&json!("NodeResourcesFit"), &json!(8000)),
        "{told}"
    );
    let manifest = "kind: Pod\nspec: {containers: [{name: c, resources: {requests: {cpu: 2}}}]}\n";
    let post = http::Request::post("/debug/explain").body(manifest.as_bytes().to_vec()).unwrap();
    let told: Value = client.request(post).await.unwrap();
    assert_eq!((&told["node"], &told["nodes"][0]["reasons"]), (&json!("n2"), &json!(["Insufficient cpu"])), "{told}");
    assert!(told["nodes"][1]["scores"]["NodeResourcesFit"]["score"].is_number(), "{told}");
    let text =
        async |path: &str| client.request_text(http::Request::get(path).body(Vec::new()).unwrap()).await.unwrap();
    let told = text("/metrics/resources").await;
    let asked =
        r#"{namespace="t",pod="big",node="",scheduler="default-scheduler",priority="0",resource="cpu",unit="cores"} 8"#;
    assert!(told.contains(asked), "{told}");
    let told = text("/metrics").await;
    for (point, status) in [("PreFilter", "Success"), ("Filter", "Success"), ("PostFilter", "Unschedulable")] {
        let count = format!(
            "scheduler_framework_extension_point_duration_seconds_count{{extension_point=\"{point}\",status=\"{status}\""
        );
        assert!(told.contains(&count), "{count}\n{told}");
    }
}

/// An extender that refuses one node, prefers another, and binds.
async fn extender(server: Arc<super::Server>, port: u16, asked: Arc<Mutex<BTreeSet<String>>>) {
    use component_base::serving::{Listening, Request, respond, serve};
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let listening = Listening { tls: None, max_connections: 16 };
    let answer = move |request: Request| {
        let (server, asked) = (server.clone(), asked.clone());
        async move {
            let verb = request.uri().path().to_owned();
            asked.lock().insert(verb.clone());
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let body: Value = serde_json::from_slice(&body).unwrap();
            let answer = match verb.as_str() {
                "/x/filter" => {
                    let mut nodes = body["Nodes"].clone();
                    nodes["items"].as_array_mut().unwrap().retain(|node| node["metadata"]["name"] != "n3");
                    json!({"Nodes": nodes, "NodeNames": null, "FailedNodes": {"n3": "not this one"}, "FailedAndUnresolvableNodes": null, "Error": ""})
                }
                // All candidates at once: the one that the scheduler would not have taken is left.
                "/x/preempt" => {
                    let victims = &body["NodeNameToVictims"];
                    assert_eq!(victims.as_object().map(serde_json::Map::len), Some(2), "{body}");
                    let uid = &victims["n2"]["Pods"][0]["metadata"]["uid"];
                    json!({"NodeNameToMetaVictims": {"n2": {"Pods": [{"UID": uid}], "NumPDBViolations": 0}}})
                }
                "/x/prioritize" => json!([{"Host": "n1", "Score": 0}, {"Host": "n2", "Score": 10}]),
                _ => {
                    let binding = json!({"metadata": {"name": body["PodName"], "uid": body["PodUID"]},
                        "target": {"kind": "Node", "name": body["Node"]}});
                    let name = body["PodName"].as_str().unwrap();
                    server.post(&format!("{}/{name}/binding", super::PODS), &binding).await.unwrap();
                    json!({})
                }
            };
            respond(http::StatusCode::OK, "application/json", answer.to_string())
        }
    };
    serve(listener, listening, CancellationToken::new(), answer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn profiles_and_extenders_are_as_configured() {
    let Some(mut lab) = Lab::without_scheduler("extenders", false).await else { return };
    let (port, asked) = (free_port(), Arc::new(Mutex::new(BTreeSet::new())));
    let extender = tokio::spawn(extender(lab.server.clone(), port, asked.clone()));
    let config = json!({"apiVersion": "kubescheduler.config.k8s.io/v1", "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": false},
        "profiles": [
            {"schedulerName": "default-scheduler"},
            {"schedulerName": "packer", "pluginConfig": [{"name": "NodeResourcesFit",
                "args": {"scoringStrategy": {"type": "MostAllocated", "resources": [{"name": "cpu", "weight": 1}]}}}],
             "plugins": {"score": {"disabled": [{"name": "*"}], "enabled": [{"name": "NodeResourcesFit", "weight": 5}]}}},
        ],
        "extenders": [{"urlPrefix": format!("http://127.0.0.1:{port}/x"), "filterVerb": "filter", "prioritizeVerb": "prioritize",
            "bindVerb": "bind", "weight": 100, "managedResources": [{"name": "example.com/x", "ignoredByScheduler": true}]}]});
    let path = lab.file("config");
    std::fs::write(&path, config.to_string()).unwrap();
    lab.scheduler(&[&format!("--config={}", path.display()), "--secure-port=0"]);
    for name in ["n1", "n2", "n3"] {
        lab.node(name, "4").await;
    }
    let extended = json!({"containers": [{"name": "c", "image": "i", "resources": {
        "requests": {"example.com/x": 1}, "limits": {"example.com/x": 1}}}]});
    lab.pod("extended", extended).await;
    assert_eq!(lab.bound("extended").await, "n2");
    let verbs: Vec<String> = asked.lock().iter().cloned().collect();
    assert_eq!(verbs, ["/x/bind", "/x/filter", "/x/prioritize"]);
    // The packer fills one node.
    lab.pod("first", json!({"cpu": "1", "schedulerName": "packer"})).await;
    let place = lab.bound("first").await;
    for name in ["second", "third"] {
        lab.pod(name, json!({"cpu": "1", "schedulerName": "packer"})).await;
        assert_eq!(lab.bound(name).await, place);
    }
    // Nobody's pod stays.
    lab.pod("orphan", json!({"schedulerName": "nobody"})).await;
    lab.pod("last", json!({})).await;
    lab.bound("last").await;
    assert!(lab.get("orphan").await["spec"]["nodeName"].is_null());
    extender.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extender_is_asked_before_pods_make_room() {
    let Some(mut lab) = Lab::without_scheduler("preempting extender", false).await else { return };
    let (port, asked) = (free_port(), Arc::new(Mutex::new(BTreeSet::new())));
    let extender = tokio::spawn(extender(lab.server.clone(), port, asked.clone()));
    let config = json!({"apiVersion": "kubescheduler.config.k8s.io/v1", "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": false},
        "extenders": [{"urlPrefix": format!("http://127.0.0.1:{port}/x"), "preemptVerb": "preempt",
            "managedResources": [{"name": "example.com/x", "ignoredByScheduler": true}]}]});
    let path = lab.file("config");
    std::fs::write(&path, config.to_string()).unwrap();
    lab.scheduler(&[&format!("--config={}", path.display()), "--secure-port=0"]);
    for (name, value) in [("low", 1), ("medium", 100), ("high", 1000)] {
        lab.priority(name, value).await;
    }
    for (name, node) in [("low", "n1"), ("medium", "n2")] {
        lab.node(node, "1").await;
        lab.pod(name, json!({"cpu": "1", "priorityClassName": name})).await;
        assert_eq!(lab.bound(name).await, node);
    }
    let resources = json!({"requests": {"cpu": "1", "example.com/x": 1}, "limits": {"example.com/x": 1}});
    let containers = json!([{"name": "c", "image": "i", "resources": resources}]);
    lab.pod("high", json!({"priorityClassName": "high", "containers": containers})).await;
    assert_eq!(lab.bound("high").await, "n2");
    lab.gone("medium").await;
    assert_eq!(asked.lock().iter().cloned().collect::<Vec<_>>(), ["/x/preempt"]);
    extender.abort();
}
