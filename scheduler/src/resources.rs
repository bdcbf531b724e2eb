//! `/metrics/resources`: what pods ask of nodes and may use of them, as scheduler and kubelet reckon it. As
//! `podResourceCollector`.
//!
//! Decisions keep no limits of pods: all pods are read page by page when somebody asks, and nothing is held for who does not.

use std::fmt::Write as _;

use apimachinery::pod::{Resources, is_terminal, limits, requests};
use apimachinery::quantity::Quantity;
use component_base::client::send;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ListMeta;
use kube::api::ListParams;
use kube::{Client, Resource as _};
use serde::Deserialize;

use crate::cache::DEFAULT_SCHEDULER_NAME;
use crate::driver::slim;

/// Pods read at once.
const PAGE: u32 = 500;
const HEADS: [(&str, &str); 2] = [
    (
        "kube_pod_resource_request",
        "Resources requested by workloads on the cluster, broken down by pod. This shows the resource usage the scheduler \
         and kubelet expect per pod for resources along with the unit for the resource if any.",
    ),
    (
        "kube_pod_resource_limit",
        "Resources limit for workloads on the cluster, broken down by pod. This shows the resource usage the scheduler \
         and kubelet expect per pod for resources along with the unit for the resource if any.",
    ),
];

#[derive(Deserialize)]
struct Page {
    metadata: ListMeta,
    items: Vec<Read>,
}

#[derive(Deserialize)]
#[serde(transparent)]
struct Read(#[serde(deserialize_with = "slim::pod")] Pod);

/// The metrics of all pods as they are now.
pub async fn text(client: &Client) -> Result<String, kube::Error> {
    let mut samples = [String::new(), String::new()];
    let mut parameters = ListParams::default().limit(PAGE);
    loop {
        let request = kube::core::Request::new(Pod::url_path(&(), None)).list(&parameters);
        let page: Page = serde_json::from_slice(&send(client, request).await?).map_err(kube::Error::SerdeError)?;
        page.items.iter().for_each(|Read(pod)| sample(pod, &mut samples));
        parameters.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
        if parameters.continue_token.is_none() {
            break;
        }
    }
    let described = HEADS.iter().zip(samples);
    Ok(described.map(|((name, help), lines)| format!("# HELP {name} {help}\n# TYPE {name} gauge\n{lines}")).collect())
}

/// Adds a pod's requests and limits, unless it has ended.
fn sample(pod: &Pod, to: &mut [String; 2]) {
    let Some(spec) = &pod.spec else { return };
    let (meta, node) = (&pod.metadata, spec.node_name.as_deref().unwrap_or_default());
    if !node.is_empty() && is_terminal(pod) {
        return;
    }
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let scheduler = spec.scheduler_name.as_deref().unwrap_or(DEFAULT_SCHEDULER_NAME);
    let priority = spec.priority.map(|priority| priority.to_string()).unwrap_or_default();
    let pod = format!("namespace={:?},pod={:?},node={node:?}", text(&meta.namespace), text(&meta.name));
    let pod = format!("{pod},scheduler={scheduler:?},priority={priority:?}");
    for ((name, _), (amounts, to)) in HEADS.iter().zip([requests(spec), limited(spec)].into_iter().zip(to)) {
        for (resource, amount) in amounts.iter().filter(|(_, amount)| !amount.is_zero()) {
            let value = amount.milli_value() as f64 / 1e3;
            // Writing to a string does not fail.
            _ = writeln!(to, "{name}{{{pod},resource={resource:?},unit={:?}}} {value}", unit(resource));
        }
    }
}

/// The overhead comes on top of what is limited, and limits nothing by itself.
fn limited(spec: &k8s_openapi::api::core::v1::PodSpec) -> Resources {
    let mut all = limits(spec);
    let overhead = spec.overhead.as_ref();
    all.retain(|name, amount| overhead.and_then(|all| all.get(name)).is_none_or(|own| Quantity::from(own) != *amount));
    all
}

fn unit(resource: &str) -> &'static str {
    match resource {
        "cpu" => "cores",
        "memory" | "storage" | "ephemeral-storage" => "bytes",
        _ if resource.starts_with("hugepages-") => "bytes",
        _ if resource.starts_with("attachable-volumes-") => "integer",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pods_are_told_by_what_they_ask_for_and_may_use() {
        let pod = json!({"metadata": {"namespace": "ns", "name": "p"}, "spec": {"nodeName": "n1", "schedulerName": "s",
            "priority": 7, "overhead": {"memory": "1Mi", "cpu": "100m"},
            "initContainers": [{"name": "i", "resources": {"requests": {"hugepages-2Mi": "2Mi", "cpu": "0"}}}],
            "containers": [{"name": "c", "resources": {"requests": {"cpu": "500m", "example.com/gpu": "2"},
                "limits": {"memory": "2Mi"}}}]}});
        let waits = json!({"metadata": {"namespace": "ns", "name": "q"},
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"ephemeral-storage": "1k"}}}]}});
        let mut ended = pod.clone();
        ended["status"] = json!({"phase": "Succeeded"});
        let mut told = [String::new(), String::new()];
        for pod in [pod, waits, ended] {
            let Read(pod) = serde_json::from_value(pod).expect("a pod");
            sample(&pod, &mut told);
        }
        let of = r#"namespace="ns",pod="p",node="n1",scheduler="s",priority="7""#;
        let expected = [
            format!(
                r#"kube_pod_resource_request{{{of},resource="cpu",unit="cores"}} 0.6
kube_pod_resource_request{{{of},resource="example.com/gpu",unit=""}} 2
kube_pod_resource_request{{{of},resource="hugepages-2Mi",unit="bytes"}} 2097152
kube_pod_resource_request{{{of},resource="memory",unit="bytes"}} 1048576
kube_pod_resource_request{{namespace="ns",pod="q",node="",scheduler="default-scheduler",priority="",resource="ephemeral-storage",unit="bytes"}} 1000
"#
            ),
            format!("kube_pod_resource_limit{{{of},resource=\"memory\",unit=\"bytes\"}} 3145728\n"),
        ];
        assert_eq!(told, expected);
    }
}
