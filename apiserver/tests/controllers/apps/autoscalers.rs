//! HorizontalPodAutoscalers where nobody serves metrics: bounds hold, and conditions say what is missing. And where somebody
//! does: replicas follow what pods use.

use super::*;
use crate::{common, ready, start};
use bytes::Bytes;
use component_base::serving::{BoxError, Listening, serve};
use http::{Response, header::AUTHORIZATION};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

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
            let said = says(app, "ScalingActive", "False", "FailedGetResourceMetric").await.to_string();
            let why =
                "failed to get cpu utilization: unable to get metrics for resource cpu: unable to fetch metrics from";
            assert!(said.contains(&format!("the HPA was unable to compute the replica count: {why}")), "{said}");
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

/// Answers what the metrics API is asked, where every pod uses so many thousandths of a processor, and hands on the rest.
async fn answer(
    client: kube::Client,
    milli: u64,
    mut request: Request<Incoming>,
) -> Result<Response<UnsyncBoxBody<Bytes, BoxError>>, BoxError> {
    let target = request.uri().to_string();
    if let Some(of) = target.strip_prefix("/apis/metrics.k8s.io/v1beta1") {
        let pods: Value = client.request(Request::get(format!("/api/v1{of}")).body(Vec::new())?).await?;
        let usage = json!({"cpu": format!("{milli}m")});
        let used = |pod: &&Value| {
            json!({"metadata": pod["metadata"], "timestamp": now(), "window": "15s",
                "containers": [{"name": "c", "usage": usage}]})
        };
        let list = json!({"items": items(&pods).iter().map(used).collect::<Vec<Value>>()}).to_string();
        return Ok(Response::new(Full::from(list).map_err(|never| match never {}).boxed_unsync()));
    }
    // Whoever asks is the administrator from here on.
    request.headers_mut().remove(AUTHORIZATION);
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes().to_vec();
    let answer = client.send(Request::from_parts(head, body.into())).await?;
    Ok(answer.map(|body| body.map_err(BoxError::from).boxed_unsync()))
}

/// The API server with a metrics API in front of it; gives its address.
async fn with_metrics(server: &Server, milli: Arc<AtomicU64>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let client = server.client.clone();
    let listening = Listening { tls: None, max_connections: 1000 };
    tokio::spawn(serve(listener, listening, CancellationToken::new(), move |request| {
        let answer = answer(client.clone(), milli.load(Ordering::Relaxed), request);
        async move {
            answer.await.unwrap_or_else(|error| {
                let mut failed = Response::new(Full::from(error.to_string()).map_err(|n| match n {}).boxed_unsync());
                *failed.status_mut() = http::StatusCode::BAD_GATEWAY;
                failed
            })
        }
    }));
    format!("http://{address}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_follow_what_pods_use() {
    if !common::has_controllers() {
        return;
    }
    let mut server = Server::start_for_controllers().await;
    let used = Arc::new(AtomicU64::new(200));
    let master = format!("--master={}", with_metrics(&server, used.clone()).await);
    let soon = "--horizontal-pod-autoscaler-downscale-stabilization=1s";
    let often = "--horizontal-pod-autoscaler-sync-period=500ms";
    server.add_controllers(&["--leader-elect=false", "--secure-port=0", &master, soon, often]);
    ready(&server).await;
    let _kubelet = kubelet(&server, |pod| {
        let mut status = running();
        // One that has just started would not count.
        status["startTime"] = json!("2020-01-01T00:00:00Z");
        (pod["status"]["phase"] == "Pending").then_some(status)
    });
    let mut deployment = workload("busy", "x:1", json!({"replicas": 2}));
    deployment["spec"]["template"]["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "100m"}});
    server.post(&format!("{APPS}/deployments"), &deployment).await.unwrap();
    pods(&server, "busy", 2).await;
    let target = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "busy"});
    let metric = json!({"type": "Resource", "resource": {"name": "cpu",
        "target": {"type": "Utilization", "averageUtilization": 100}}});
    let spec = json!({"minReplicas": 1, "maxReplicas": 6, "scaleTargetRef": target, "metrics": [metric]});
    server.post(AUTOSCALERS, &json!({"metadata": {"name": "busy"}, "spec": spec})).await.unwrap();
    // Each pod uses twice what it should; what it should; a quarter of it.
    pods(&server, "busy", 4).await;
    used.store(100, Ordering::Relaxed);
    let says = |percent: u64, replicas: u64| {
        move |a: &Value| {
            let seen = &a["status"]["currentMetrics"][0]["resource"]["current"]["averageUtilization"];
            let active = |c: &Value| c["type"] == "ScalingActive" && c["reason"] == "ValidMetricFound";
            let conditions = a["status"]["conditions"].as_array();
            *seen == percent
                && a["status"]["desiredReplicas"] == replicas
                && conditions.into_iter().flatten().any(active)
        }
    };
    let busy = format!("{AUTOSCALERS}/busy");
    until(&server, "all is as it should be", &busy, says(100, 4)).await;
    used.store(25, Ordering::Relaxed);
    pods(&server, "busy", 1).await;
    until(&server, "one is left", &busy, |a| a["status"]["desiredReplicas"] == 1).await;
    event(&server, "busy", "SuccessfulRescale").await;
}
