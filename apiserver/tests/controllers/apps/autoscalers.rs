//! HorizontalPodAutoscalers where nobody serves metrics: bounds hold, and conditions say what is missing.

use super::*;
use crate::start;

const AUTOSCALERS: &str = "/apis/autoscaling/v2/namespaces/t/horizontalpodautoscalers";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn autoscalers_keep_bounds_and_say_what_they_lack() {
    let Some(server) = start().await else { return };
    let says = async |name: &str, kind: &str, status: &str, reason: &str| {
        let what = format!("{name}: {kind} {status} {reason}");
        until(&server, &what, &format!("{AUTOSCALERS}/{name}"), |a| {
            let conditions = a["status"]["conditions"].as_array();
            let is = |c: &Value| c["type"] == kind && c["status"] == status && c["reason"] == reason;
            conditions.into_iter().flatten().any(is)
        })
        .await
    };
    // From how many, to how many.
    for (app, from, to) in [("few", 1, 2), ("many", 6, 4), ("between", 3, 3)] {
        let deployment = workload(app, "x:1", json!({"replicas": from}));
        server.post(&format!("{APPS}/deployments"), &deployment).await.unwrap();
        pods(&server, app, from).await;
        let target = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": app});
        let spec = json!({"minReplicas": 2, "maxReplicas": 4, "scaleTargetRef": target});
        server.post(AUTOSCALERS, &json!({"metadata": {"name": app}, "spec": spec})).await.unwrap();
        pods(&server, app, to).await;
        if from == to {
            says(app, "AbleToScale", "True", "SucceededGetScale").await;
            says(app, "ScalingActive", "False", "FailedGetResourceMetric").await;
            event(&server, app, "FailedComputeMetricsReplicas").await;
        } else {
            let scaled = says(app, "AbleToScale", "True", "SucceededRescale").await;
            assert_eq!(scaled["status"]["desiredReplicas"], to, "{scaled}");
            event(&server, app, "SuccessfulRescale").await;
        }
    }
    let spec =
        json!({"maxReplicas": 4, "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "gone"}});
    server.post(AUTOSCALERS, &json!({"metadata": {"name": "lost"}, "spec": spec})).await.unwrap();
    says("lost", "AbleToScale", "False", "FailedGetScale").await;
    event(&server, "lost", "FailedGetScale").await;
}
