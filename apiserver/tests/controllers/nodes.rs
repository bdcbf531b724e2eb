//! Nodes that fall silent, are tainted, go for good: what becomes of them and of their pods. The test plays the kubelets.

use crate::common::{Server, eventually, has_controllers};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

pub const NODES: &str = "/api/v1/nodes";
const PODS: &str = "/api/v1/namespaces/t/pods";

async fn start(flags: &[&str]) -> Option<Server> {
    if !has_controllers() {
        return None;
    }
    let mut server = Server::start_for_controllers().await;
    let all = [&["--leader-elect=false", "--secure-port=0", "--node-monitor-period=1s"], flags].concat();
    server.add_controllers(&all);
    server.namespace("t").await;
    eventually("the default ServiceAccount", async || {
        server.get("/api/v1/namespaces/t/serviceaccounts/default").await.map_err(|error| format!("{error:?}"))
    })
    .await;
    Some(server)
}

pub async fn node(server: &Server, name: &str) {
    let node = json!({"metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": "z"}}});
    server.post(NODES, &node).await.unwrap();
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]}});
    server.merge(&format!("{NODES}/{name}/status"), &ready).await.unwrap();
}

/// Renews the nodes' leases until it is dropped.
pub fn renew(server: &Server, names: &[&str]) -> tokio::task::JoinHandle<()> {
    let client = server.client.clone();
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    tokio::spawn(async move {
        use k8s_openapi::api::coordination::v1::Lease;
        let leases: kube::Api<Lease> = kube::Api::namespaced(client, "kube-node-lease");
        loop {
            for name in &names {
                let now = k8s_openapi::jiff::Timestamp::now().to_string();
                let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name},
                    "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": now}});
                let patch = kube::api::Patch::Apply(lease);
                _ = leases.patch(name, &kube::api::PatchParams::apply("kubelet").force(), &patch).await;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    })
}

pub async fn pod(server: &Server, name: &str, node: &str, tolerations: Value) {
    let spec = json!({"nodeName": node, "terminationGracePeriodSeconds": 0, "tolerations": tolerations,
        "containers": [{"name": "c", "image": "x"}]});
    server.post(PODS, &json!({"metadata": {"name": name}, "spec": spec})).await.unwrap();
    let status = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    server.merge(&format!("{PODS}/{name}/status"), &status).await.unwrap();
}

pub fn taints(node: &Value) -> Vec<String> {
    let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
    taints.iter().map(|t| format!("{}:{}", t["key"].as_str().unwrap(), t["effect"].as_str().unwrap())).collect()
}

async fn goes(server: &Server, name: &str) {
    eventually(&format!("{name} goes"), async || match server.get(&format!("{PODS}/{name}")).await {
        Err((404, _)) => Ok(()),
        Ok(pod) if pod["metadata"].get("deletionTimestamp").is_some() => Ok(()),
        other => Err(format!("{other:?} {}", server.controllers_log())),
    })
    .await;
}

async fn stays(server: &Server, name: &str) {
    let pod = server.get(&format!("{PODS}/{name}")).await.unwrap();
    assert!(pod["metadata"].get("deletionTimestamp").is_none(), "{pod}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_falls_silent_loses_its_pods() {
    let Some(server) = start(&["--node-monitor-grace-period=5s", "--node-eviction-rate=10"]).await else { return };
    let alive = renew(&server, &["n1"]);
    let silent = renew(&server, &["n2"]);
    node(&server, "n1").await;
    node(&server, "n2").await;
    let brief = json!([{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 2}]);
    let forever = json!([{"operator": "Exists"}]);
    pod(&server, "stays", "n1", brief.clone()).await;
    pod(&server, "goes", "n2", brief).await;
    pod(&server, "bears-it", "n2", forever).await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert_eq!(taints(&server.get(&format!("{NODES}/n2")).await.unwrap()), Vec::<String>::new(), "it is heard of");
    silent.abort();
    let down = eventually("n2 is unreachable", async || {
        let node = server.get(&format!("{NODES}/n2")).await.map_err(|error| format!("{error:?}"))?;
        if taints(&node).len() == 2 { Ok(node) } else { Err(format!("{:?}", taints(&node))) }
    })
    .await;
    let unreachable = "node.kubernetes.io/unreachable";
    let mut got = taints(&down);
    got.sort();
    assert_eq!(got, [format!("{unreachable}:NoExecute"), format!("{unreachable}:NoSchedule")]);
    let ready =
        &down["status"]["conditions"].as_array().unwrap().iter().find(|c| c["type"] == "Ready").unwrap().clone();
    assert_eq!((&ready["status"], &ready["reason"]), (&json!("Unknown"), &json!("NodeStatusUnknown")));
    goes(&server, "goes").await;
    stays(&server, "stays").await;
    stays(&server, "bears-it").await;
    let kept = server.get(&format!("{PODS}/bears-it")).await.unwrap();
    assert_eq!(kept["status"]["conditions"][0]["status"], "False", "nobody sends to it");
    // It comes back.
    let back = renew(&server, &["n2"]);
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    server.merge(&format!("{NODES}/n2/status"), &ready).await.unwrap();
    eventually("n2 is well", async || {
        let node = server.get(&format!("{NODES}/n2")).await.map_err(|error| format!("{error:?}"))?;
        if taints(&node).is_empty() { Ok(()) } else { Err(format!("{:?}", taints(&node))) }
    })
    .await;
    stays(&server, "bears-it").await;
    // When all fall silent at once, the fault is rather here: nobody is evicted.
    let impatient = json!([{"key": unreachable, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0}]);
    pod(&server, "spared", "n1", impatient).await;
    // The empty one first: alone, the other one would lose its pod.
    back.abort();
    tokio::time::sleep(Duration::from_secs(2)).await;
    alive.abort();
    eventually("both are unreachable", async || {
        let nodes = server.get(NODES).await.map_err(|error| format!("{error:?}"))?;
        let all: Vec<String> = nodes["items"].as_array().unwrap().iter().flat_map(taints).collect();
        if all == [format!("{unreachable}:NoSchedule"), format!("{unreachable}:NoSchedule")] {
            Ok(())
        } else {
            Err(format!("{all:?}"))
        }
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    stays(&server, "spared").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tolerations_say_how_long_a_pod_bears_a_taint() {
    let Some(server) = start(&[]).await else { return };
    let leases = renew(&server, &["n1"]);
    node(&server, "n1").await;
    let bears = |seconds: u32| json!([{"key": "e2e", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}]);
    let tainted = json!({"spec": {"taints": [{"key": "e2e", "value": "x", "effect": "NoExecute"}]}});
    pod(&server, "short", "n1", bears(5)).await;
    pod(&server, "long", "n1", bears(15)).await;
    pod(&server, "not", "n1", json!([])).await;
    let start = Instant::now();
    server.merge(&format!("{NODES}/n1"), &tainted).await.unwrap();
    goes(&server, "not").await;
    goes(&server, "short").await;
    let took = start.elapsed();
    assert!(took >= Duration::from_secs(4), "{took:?}");
    // The taint goes first: the eviction is called off.
    stays(&server, "long").await;
    server.merge(&format!("{NODES}/n1"), &json!({"spec": {"taints": null}})).await.unwrap();
    tokio::time::sleep(Duration::from_secs(17).saturating_sub(start.elapsed())).await;
    stays(&server, "long").await;
    let path = "/api/v1/namespaces/t/events?fieldSelector=reason%3DTaintManagerEviction";
    let events = server.get(path).await.unwrap();
    let messages: Vec<_> = events["items"].as_array().unwrap().iter().map(|e| e["message"].as_str().unwrap()).collect();
    assert!(messages.contains(&"Cancelling deletion of Pod t/long"), "{messages:?}");
    // Kubelets are told how long they may keep what they read.
    let node = server.get(&format!("{NODES}/n1")).await.unwrap();
    assert_eq!(node["metadata"]["annotations"]["node.alpha.kubernetes.io/ttl"], "0");
    leases.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_have_parts_of_both_families() {
    let flags = [
        "--allocate-node-cidrs=true",
        "--cluster-cidr=10.244.0.0/16,fd00:10:244::/56",
        "--service-cluster-ip-range=10.96.0.0/12",
    ];
    let Some(server) = start(&flags).await else { return };
    for name in ["n1", "n2", "n3"] {
        server.post(NODES, &json!({"metadata": {"name": name}})).await.unwrap();
    }
    let mut all = eventually("all have parts", async || {
        let nodes = server.get(NODES).await.map_err(|error| format!("{error:?}"))?;
        let parts: Vec<Value> =
            nodes["items"].as_array().unwrap().iter().map(|n| n["spec"]["podCIDRs"].clone()).collect();
        if parts.iter().all(|p| p.as_array().is_some_and(|p| p.len() == 2)) {
            Ok(parts)
        } else {
            Err(format!("{parts:?}"))
        }
    })
    .await;
    all.sort_by_key(Value::to_string);
    assert_eq!(all.first(), Some(&json!(["10.244.0.0/24", "fd00:10:244::/64"])));
    all.dedup();
    assert_eq!(all.len(), 3);
}
