//! Workloads, as the conformance programme describes them, without nodes: a test plays the kubelet.

mod autoscalers;
mod cron_jobs;
mod daemon_sets;
mod deployments;
mod disruption;
mod interfaces;
mod jobs;
mod replicas;
mod stateful_sets;

use crate::common::{MERGE, Server, eventually};
use http::Request;
use serde_json::{Value, json};
use std::time::Duration;

pub const V1: &str = "/api/v1/namespaces/t";
pub const APPS: &str = "/apis/apps/v1/namespaces/t";
pub const BATCH: &str = "/apis/batch/v1/namespaces/t";

/// Says what becomes of pods, until it is dropped.
pub struct Kubelet(tokio::task::JoinHandle<()>);

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Plays the kubelet for the pods of `t`: gives a pod that has not ended the status that `decide` says, if it says one.
pub fn kubelet(server: &Server, decide: impl Fn(&Value) -> Option<Value> + Send + Sync + 'static) -> Kubelet {
    let client = server.client.clone();
    Kubelet(tokio::spawn(async move {
        let pods = format!("{V1}/pods");
        loop {
            let list = client.request::<Value>(Request::get(&pods).body(Vec::new()).unwrap()).await.unwrap_or_default();
            for pod in list["items"].as_array().into_iter().flatten() {
                let going = pod["metadata"].get("deletionTimestamp").is_some();
                if going || ["Succeeded", "Failed"].contains(&pod["status"]["phase"].as_str().unwrap_or_default()) {
                    continue;
                }
                let Some(status) = decide(pod) else { continue };
                let path = format!("{pods}/{}/status", pod["metadata"]["name"].as_str().unwrap_or_default());
                let body = json!({"metadata": {"uid": pod["metadata"]["uid"]}, "status": status}).to_string();
                let request = Request::patch(path).header("content-type", MERGE).body(body.into_bytes()).unwrap();
                _ = client.request::<Value>(request).await;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }))
}

/// A kubelet where every pod runs and is ready.
pub fn all_run(server: &Server) -> Kubelet {
    kubelet(server, |pod| (pod["status"]["phase"] == "Pending").then(running))
}

pub fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn state(phase: &str, ready: &str) -> Value {
    json!({"phase": phase, "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": now()}]})
}

pub fn running() -> Value {
    state("Running", "True")
}

pub fn not_ready() -> Value {
    state("Running", "False")
}

/// The container ended long ago, so that no back-off is waited for.
pub fn ended(phase: &str, code: i32) -> Value {
    let container = json!({"name": "c", "image": "x", "imageID": "x", "ready": false, "restartCount": 0,
        "state": {"terminated": {"exitCode": code, "finishedAt": "2020-01-01T00:00:00Z"}}});
    json!({"phase": phase, "containerStatuses": [container]})
}

pub fn template(app: &str, image: &str) -> Value {
    let spec = json!({"terminationGracePeriodSeconds": 0, "containers": [{"name": "c", "image": image}]});
    json!({"metadata": {"labels": {"app": app}}, "spec": spec})
}

/// A workload of that name whose pods have the label `app`.
pub fn workload(name: &str, image: &str, spec: Value) -> Value {
    let mut made = json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": {
        "selector": {"matchLabels": {"app": name}}, "template": template(name, image)}});
    spec.as_object().into_iter().flatten().for_each(|(k, v)| made["spec"][k] = v.clone());
    made
}

/// The patch that gives a workload another image.
pub fn image(image: &str) -> Value {
    json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": image}]}}}})
}

/// Waits until an object, or a list, is as it should be.
pub async fn until(server: &Server, what: &str, path: &str, check: impl Fn(&Value) -> bool) -> Value {
    eventually(what, async || {
        let seen = server.get(path).await.map_err(|error| format!("{error:?}"))?;
        if check(&seen) {
            return Ok(seen);
        }
        let short = seen.get("status").filter(|_| seen.get("items").is_none()).cloned();
        let items = seen["items"].as_array().into_iter().flatten();
        let list: Vec<_> = items.map(|i| (i["metadata"]["name"].clone(), i["status"]["phase"].clone())).collect();
        Err(format!("{} {list:?}", short.unwrap_or_default()))
    })
    .await
}

pub fn items(list: &Value) -> Vec<&Value> {
    list["items"].as_array().into_iter().flatten().collect()
}

pub fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

pub fn image_of(pod: &Value) -> &str {
    pod["spec"]["containers"][0]["image"].as_str().unwrap_or_default()
}

pub fn pods_of(app: &str) -> String {
    format!("{V1}/pods?labelSelector=app={app}")
}

/// Waits until so many pods have the label; gives them.
pub async fn pods(server: &Server, app: &str, count: usize) -> Vec<Value> {
    let what = format!("{count} pods of {app}");
    let list = until(server, &what, &pods_of(app), |list| items(list).len() == count).await;
    items(&list).into_iter().cloned().collect()
}

/// Whether a condition is true, for that reason if one is named.
pub fn has(object: &Value, kind: &str, reason: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions
        .into_iter()
        .flatten()
        .any(|c| c["type"] == kind && c["status"] == "True" && (reason.is_empty() || c["reason"] == reason))
}

/// Waits for an event about an object.
pub async fn event(server: &Server, about: &str, reason: &str) {
    let path = format!("{V1}/events?fieldSelector=involvedObject.name={about},reason={reason}");
    until(server, &format!("{reason} of {about}"), &path, |list| !items(list).is_empty()).await;
}

/// Sets a pod's status by hand.
pub async fn set_status(server: &Server, pod: &str, status: Value) {
    server.merge(&format!("{V1}/pods/{pod}/status"), &json!({"status": status})).await.unwrap();
}

/// Long enough for a controller to do what it should not.
pub async fn a_while() {
    tokio::time::sleep(Duration::from_millis(400)).await;
}
