//! Several controller-managers: one works, and another takes over when it goes or is killed; nothing is lost or done twice.

use crate::common::{Server, eventually, has_controllers};
use serde_json::json;
use std::time::{Duration, Instant};

pub const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/kube-controller-manager";
const APPS: &str = "/apis/apps/v1/namespaces/t";
pub const ELECT: [&str; 4] = [
    "--secure-port=0",
    "--leader-elect-lease-duration=6s",
    "--leader-elect-renew-deadline=4s",
    "--leader-elect-retry-period=1s",
];

pub async fn holder(server: &Server, other_than: &str) -> String {
    eventually("there is a leader", async || {
        let lease = server.get(LEASE).await.map_err(|error| format!("{error:?}"))?;
        let holder = lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned();
        if holder.is_empty() || holder == other_than { Err(lease["spec"].to_string()) } else { Ok(holder) }
    })
    .await
}

async fn pods(server: &Server, count: usize) {
    eventually(&format!("{count} pods"), async || {
        let there = server.names("/api/v1/namespaces/t/pods").await.len();
        if there == count { Ok(()) } else { Err(format!("{there} {}", server.controllers_log())) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_takes_over_in_the_middle_of_a_roll_out() {
    if !has_controllers() {
        return;
    }
    let mut server = Server::start_for_controllers().await;
    let first = server.add_controllers(&ELECT);
    let leader = holder(&server, "").await;
    let second = server.add_controllers(&ELECT);
    server.namespace("t").await;
    eventually("the default ServiceAccount", async || {
        server.get("/api/v1/namespaces/t/serviceaccounts/default").await.map_err(|error| format!("{error:?}"))
    })
    .await;
    let template = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "x:1"}]}});
    let spec = json!({"replicas": 40, "selector": {"matchLabels": {"a": "b"}}, "template": template});
    let deployment = json!({"metadata": {"name": "d"}, "spec": spec});
    server.post(&format!("{APPS}/deployments"), &deployment).await.unwrap();
    // Killed as soon as it has begun: the other must wait until the lease runs out, and then make no more than there are.
    eventually("the first pods", async || match server.names("/api/v1/namespaces/t/pods").await.len() {
        0 => Err("none".to_owned()),
        _ => Ok(()),
    })
    .await;
    server.end_controllers(first, false);
    let next = holder(&server, &leader).await;
    pods(&server, 40).await;
    eventually("it is told who leads", async || {
        let events = "/api/v1/namespaces/kube-system/events?fieldSelector=reason%3DLeaderElection";
        let list = server.get(events).await.map_err(|error| format!("{error:?}"))?;
        let told = list.to_string();
        if told.contains(&format!("{next} became leader")) { Ok(()) } else { Err(told) }
    })
    .await;
    let deleted = server.get("/api/v1/namespaces/t/events?fieldSelector=reason%3DSuccessfulDelete").await.unwrap();
    assert_eq!(deleted["items"].as_array().map(Vec::len), Some(0), "none was too many");

    // One that is asked to end lets go of the lease: the third need not wait.
    server.add_controllers(&ELECT);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let start = Instant::now();
    server.end_controllers(second, true);
    holder(&server, &next).await;
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    server.merge(&format!("{APPS}/deployments/d"), &json!({"spec": {"replicas": 3}})).await.unwrap();
    eventually("three pods are wanted", async || {
        let list = server.get("/api/v1/namespaces/t/pods").await.map_err(|error| format!("{error:?}"))?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let staying = items.iter().filter(|p| p["metadata"].get("deletionTimestamp").is_none()).count();
        if staying == 3 { Ok(()) } else { Err(format!("{staying} {}", server.controllers_log())) }
    })
    .await;
}
