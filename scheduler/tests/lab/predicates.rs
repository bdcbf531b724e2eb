//! Where a pod may be: resources, node selectors, host ports, gates, limits' defaults.

use serde_json::json;

use super::{Lab, common::eventually, condition};

/// Scheduler, resource limits.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_asks_for_more_than_is_left_has_no_node() {
    let Some(lab) = Lab::start("resource limits").await else { return };
    lab.node("n1", "2").await;
    lab.node("n2", "1").await;
    lab.pod("filler", json!({"cpu": "1500m"})).await;
    assert_eq!(lab.bound("filler").await, "n1");
    lab.pod("more", json!({"cpu": "1200m"})).await;
    assert_eq!(
        lab.refused("more").await,
        "0/2 nodes are available: 2 Insufficient cpu. no new claims to deallocate, preemption: 0/2 nodes are \
         available: 1 No preemption victims found for incoming pod, 1 Preemption is not helpful for scheduling."
    );
    let events = "/api/v1/namespaces/t/events?fieldSelector=involvedObject.name%3Dmore,reason%3DFailedScheduling";
    eventually("the event", async || {
        let list = lab.server.get(events).await.map_err(|error| format!("{error:?}"))?;
        let words = list["items"][0]["message"].as_str().unwrap_or_default();
        words.starts_with("0/2 nodes are available: 2 Insufficient cpu.").then_some(()).ok_or_else(|| list.to_string())
    })
    .await;
    // It comes as soon as there is room.
    lab.server.delete("/api/v1/namespaces/t/pods/filler", &json!({})).await.unwrap();
    assert_eq!(lab.bound("more").await, "n1");
    // An overhead counts as well.
    let runtime = json!({"metadata": {"name": "heavy"}, "handler": "heavy", "overhead": {"podFixed": {"cpu": "900m"}}});
    lab.server.post("/apis/node.k8s.io/v1/runtimeclasses", &runtime).await.unwrap();
    lab.pod("heavy", json!({"cpu": "200m", "runtimeClassName": "heavy"})).await;
    lab.refused("heavy").await;
}

/// Scheduler, node selector matching and not matching.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_selector_is_respected() {
    let Some(lab) = Lab::start("node selector").await else { return };
    lab.node("n1", "2").await;
    lab.node("n2", "2").await;
    lab.pod("choosy", json!({"nodeSelector": {"colour": "blue"}})).await;
    let told = lab.refused("choosy").await;
    assert!(
        told.starts_with("0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."),
        "{told}"
    );
    lab.server.merge("/api/v1/nodes/n2", &json!({"metadata": {"labels": {"colour": "blue"}}})).await.unwrap();
    assert_eq!(lab.bound("choosy").await, "n2");
}

/// Scheduling, HostPort and Protocol match, HostIPs different but one is the default.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_port_on_all_addresses_conflicts_with_one_on_any() {
    let Some(lab) = Lab::start("host ports").await else { return };
    lab.node("n1", "2").await;
    let on = |ip: &str, protocol: &str| {
        let port = json!({"containerPort": 80, "hostPort": 54322, "hostIP": ip, "protocol": protocol});
        json!({"containers": [{"name": "c", "image": "i", "ports": [port]}]})
    };
    lab.pod("all", on("0.0.0.0", "TCP")).await;
    lab.bound("all").await;
    lab.pod("one", on("127.0.0.1", "TCP")).await;
    let told = lab.refused("one").await;
    assert!(told.contains("1 node(s) didn't have free ports for the requested pod ports."), "{told}");
    lab.pod("udp", on("127.0.0.1", "UDP")).await;
    lab.bound("udp").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gated_pod_waits_for_its_gates_and_then_says_so_no_more() {
    let Some(lab) = Lab::start("gates").await else { return };
    let gates = json!([{"name": "example.com/a"}]);
    lab.pod("gated", json!({"schedulingGates": gates, "cpu": "1"})).await;
    lab.node("n1", "500m").await;
    assert_eq!(condition(&lab.get("gated").await, "PodScheduled")["reason"], "SchedulingGated");
    let patch = json!({"spec": {"schedulingGates": []}});
    lab.server.merge("/api/v1/namespaces/t/pods/gated", &patch).await.unwrap();
    lab.refused("gated").await;
    lab.node("n2", "1").await;
    assert_eq!(lab.bound("gated").await, "n2");
    let pod = lab.get("gated").await;
    assert_eq!(condition(&pod, "PodScheduled")["status"], "True", "{pod}");
    assert!(condition(&pod, "PodScheduled")["reason"].is_null(), "{pod}");
}
