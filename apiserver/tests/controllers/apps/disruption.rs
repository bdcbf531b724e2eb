//! PodDisruptionBudgets: their status, and evictions by it.

use super::*;
use crate::start;

const BUDGETS: &str = "/apis/policy/v1/namespaces/t/poddisruptionbudgets";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn budgets_grant_evictions() {
    let Some(server) = start().await else { return };
    let _kubelet = all_run(&server);
    let path = format!("{BUDGETS}/b");
    let spec = json!({"minAvailable": 3, "selector": {"matchLabels": {"app": "web"}}});
    server.post(BUDGETS, &json!({"metadata": {"name": "b", "labels": {"app": "web"}}, "spec": spec})).await.unwrap();
    server.post(&format!("{APPS}/replicasets"), &workload("web", "x:1", json!({"replicas": 3}))).await.unwrap();
    let says = async |healthy: i64, desired: i64, allowed: i64| {
        until(&server, &format!("{healthy} healthy of {desired}, {allowed} may go"), &path, |budget| {
            let status = &budget["status"];
            status["currentHealthy"] == healthy
                && status["desiredHealthy"] == desired
                && status["disruptionsAllowed"] == allowed
                && status["observedGeneration"] == budget["metadata"]["generation"]
        })
        .await
    };
    says(3, 3, 0).await;
    let victim = name(&pods(&server, "web", 3).await[0]).to_owned();
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": victim}});
    let evict = async || server.post(&format!("{V1}/pods/{victim}/eviction"), &eviction).await;
    assert_eq!(evict().await.unwrap_err().0, 429, "the budget has no room");

    // Patched to allow it.
    let patch = json!({"spec": {"minAvailable": null, "maxUnavailable": "34%"}});
    server.merge(&path, &patch).await.unwrap();
    let budget = says(3, 1, 2).await;
    assert!(has(&budget, "DisruptionAllowed", "SufficientPods"), "{budget}");
    evict().await.unwrap();
    server.gone(&format!("{V1}/pods/{victim}")).await;
    let budget = says(3, 1, 2).await;
    assert!(budget["status"].get("disruptedPods").is_none(), "{budget}");

    // Pods that nobody scales have no percentage.
    // An owner that is there: the collector would take the pod else.
    let owner = server.get("/api/v1/namespaces/t").await.unwrap()["metadata"]["uid"].clone();
    server
        .post(&format!("{V1}/pods"), &{
            let mut pod = template("alone", "x:1");
            pod["metadata"]["name"] = json!("alone");
            pod["metadata"]["ownerReferences"] =
                json!([{"apiVersion": "v1", "kind": "Namespace", "name": "t", "uid": owner, "controller": true}]);
            pod
        })
        .await
        .unwrap();
    let spec = json!({"maxUnavailable": 1, "selector": {"matchLabels": {"app": "alone"}}});
    server.post(BUDGETS, &json!({"metadata": {"name": "alone"}, "spec": spec})).await.unwrap();
    event(&server, "alone", "CalculateExpectedPodCountFailed").await;

    // Its status can be written, and all of them deleted.
    let status = json!({"status": {"disruptedPods": {"p": "2026-01-01T00:00:00Z"}}});
    let patched = server.merge(&format!("{path}/status"), &status).await.unwrap();
    assert_eq!(patched["status"]["disruptedPods"]["p"], "2026-01-01T00:00:00Z");
    until(&server, "what is not there is forgotten", &path, |b| b["status"].get("disruptedPods").is_none()).await;
    assert_eq!(server.names("/apis/policy/v1/poddisruptionbudgets").await.len(), 2);
    server.delete(BUDGETS, &json!({})).await.unwrap();
    assert!(server.names(BUDGETS).await.is_empty());
}
