//! A wall clock that jumps an hour ahead and back under the controllers: leases, nodes, tolerations and work go on as if
//! nothing had been.

use crate::common::{Server, clock::Clock, eventually, has_controllers};
use crate::{leaders, nodes};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const HOUR: i64 = 3600;
const PODS: &str = "/api/v1/namespaces/t/pods";
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/t/deployments";

/// The UIDs of the pods that are not ending.
async fn staying(server: &Server, app: &str) -> Vec<String> {
    let list = server.get(&format!("{PODS}?labelSelector=app={app}")).await.unwrap_or_default();
    let items = list["items"].as_array().cloned().unwrap_or_default();
    let staying = items.iter().filter(|pod| pod["metadata"].get("deletionTimestamp").is_none());
    staying.filter_map(|pod| pod["metadata"]["uid"].as_str().map(ToOwned::to_owned)).collect()
}

async fn scaled(server: &Server, replicas: usize) {
    server.merge(&format!("{DEPLOYMENTS}/d"), &json!({"spec": {"replicas": replicas}})).await.unwrap();
    eventually(&format!("{replicas} pods"), async || match staying(server, "d").await.len() {
        now if now == replicas => Ok(()),
        now => Err(format!("{now} {}", server.controllers_log())),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_jumps_ends_no_lease_no_node_and_no_pod() {
    let Some(clock) = Clock::new().filter(|_| has_controllers()) else { return };
    let mut server = Server::start_for_controllers().await;
    let quick = ["--node-monitor-period=1s", "--node-monitor-grace-period=20s", "--node-eviction-rate=10"];
    server.add_controllers_in(&clock.environment(), &[&leaders::ELECT[..], &quick].concat());
    let leader = leaders::holder(&server, "").await;
    server.namespace("t").await;
    eventually("the default ServiceAccount", async || {
        server.get("/api/v1/namespaces/t/serviceaccounts/default").await.map_err(|error| format!("{error:?}"))
    })
    .await;
    let _alive = nodes::renew(&server, &["n1", "n2"]);
    for name in ["n1", "n2"] {
        nodes::node(&server, name).await;
    }
    // One bears the taint of its node for a while that no jump makes shorter.
    let now = k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let taint = json!([{"key": "odd", "effect": "NoExecute", "timeAdded": now}]);
    server.merge(&format!("{}/n2", nodes::NODES), &json!({"spec": {"taints": taint}})).await.unwrap();
    let bears = json!([{"key": "odd", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 600}]);
    nodes::pod(&server, "bears-it", "n2", bears).await;
    let template = json!({"metadata": {"labels": {"app": "d"}}, "spec": {"containers": [{"name": "c", "image": "x"}]}});
    let spec = json!({"replicas": 3, "selector": {"matchLabels": {"app": "d"}}, "template": template});
    server.post(DEPLOYMENTS, &json!({"metadata": {"name": "d"}, "spec": spec})).await.unwrap();
    scaled(&server, 3).await;

    for (offset, replicas) in [(HOUR, 5), (-HOUR, 4), (0, 6)] {
        let before = staying(&server, "d").await;
        clock.jump(offset);
        // Long enough for leases and silent nodes to run out, were they to.
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(8) {
            for node in ["n1", "n2"] {
                let node = server.get(&format!("{}/{node}", nodes::NODES)).await.unwrap();
                let taints = nodes::taints(&node);
                assert!(taints.iter().all(|taint| taint == "odd:NoExecute"), "{offset}: {taints:?}");
            }
            let pod = server.get(&format!("{PODS}/bears-it")).await.unwrap();
            assert!(pod["metadata"].get("deletionTimestamp").is_none(), "{offset}: {pod}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(staying(&server, "d").await, before, "{offset}: none went and none came");
        let lease: Value = server.get(leaders::LEASE).await.unwrap();
        assert_eq!(lease["spec"]["holderIdentity"], leader, "{offset}");
        assert!(lease["spec"]["leaseTransitions"].as_i64().unwrap_or(0) == 0, "{lease}");
        scaled(&server, replicas).await;
    }
}
