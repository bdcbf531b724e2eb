//! Labels and annotations by which the kubelet finds its own sandboxes and containers again, and the hash that tells
//! whether a container's definition changed. Names and values are Kubernetes', so that a node can be taken over.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use proto::cri as pb;

use super::pods::uid_of;

pub const POD_NAME: &str = "io.kubernetes.pod.name";
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub const POD_UID: &str = "io.kubernetes.pod.uid";
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";

const HASH: &str = "io.kubernetes.container.hash";
const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
const TERMINATION_MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
const TERMINATION_MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
const POD_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
const POD_DELETION_GRACE: &str = "io.kubernetes.pod.deletionGracePeriod";
const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
const PORTS: &str = "io.kubernetes.container.ports";

/// Labels of a sandbox: the pod's own and the three that identify it.
pub fn sandbox_labels(pod: &Pod) -> BTreeMap<String, String> {
    let mut labels = pod.metadata.labels.clone().unwrap_or_default();
    labels.extend(identity(pod));
    labels
}

/// Labels of a container.
pub fn container_labels(pod: &Pod, container: &Container) -> BTreeMap<String, String> {
    let mut labels: BTreeMap<_, _> = identity(pod).collect();
    labels.insert(CONTAINER_NAME.to_owned(), container.name.clone());
    labels
}

fn identity(pod: &Pod) -> impl Iterator<Item = (String, String)> {
    [
        (POD_NAME, pod.metadata.name.clone().unwrap_or_default()),
        (POD_NAMESPACE, pod.metadata.namespace.clone().unwrap_or_default()),
        (POD_UID, uid_of(pod).to_owned()),
    ]
    .into_iter()
    .map(|(k, v)| (k.to_owned(), v))
}

/// Annotations of a container: what is needed to report on it and to stop it when the pod's spec is gone.
pub fn container_annotations(pod: &Pod, container: &Container, restart_count: u32) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::new();
    let mut put = |key: &str, value: String| {
        annotations.insert(key.to_owned(), value);
    };
    put(HASH, format!("{:x}", container_hash(container)));
    put(RESTART_COUNT, restart_count.to_string());
    put(
        TERMINATION_MESSAGE_PATH,
        container.termination_message_path.clone().unwrap_or_else(|| DEFAULT_TERMINATION_PATH.to_owned()),
    );
    put(TERMINATION_MESSAGE_POLICY, container.termination_message_policy.clone().unwrap_or_else(|| "File".to_owned()));
    if let Some(grace) = pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds) {
        put(POD_GRACE, grace.to_string());
    }
    if let Some(grace) = pod.metadata.deletion_grace_period_seconds {
        put(POD_DELETION_GRACE, grace.to_string());
    }
    if let Some(hook) = container.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref())
        && let Ok(text) = serde_json::to_string(hook)
    {
        put(PRE_STOP, text);
    }
    if let Some(ports) = container.ports.as_ref().filter(|p| !p.is_empty())
        && let Ok(text) = serde_json::to_string(ports)
    {
        put(PORTS, text);
    }
    annotations
}

/// Where a container leaves its last words unless it says otherwise.
pub const DEFAULT_TERMINATION_PATH: &str = "/dev/termination-log";

/// What a container's annotations say (tolerant of a container made by something else).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Annotated {
    pub hash: u64,
    pub restart_count: u32,
    pub termination_path: String,
    pub fallback_to_logs: bool,
    pub pod_grace_seconds: Option<i64>,
}

/// Reads back what `container_annotations` wrote.
pub fn annotated(annotations: &BTreeMap<String, String>, metadata: Option<&pb::ContainerMetadata>) -> Annotated {
    let number = |key: &str| annotations.get(key).and_then(|v| v.parse().ok());
    Annotated {
        hash: annotations.get(HASH).and_then(|h| u64::from_str_radix(h, 16).ok()).unwrap_or(0),
        restart_count: annotations
            .get(RESTART_COUNT)
            .and_then(|v| v.parse().ok())
            .unwrap_or_else(|| metadata.map_or(0, |m| m.attempt)),
        termination_path: annotations.get(TERMINATION_MESSAGE_PATH).cloned().unwrap_or_default(),
        fallback_to_logs: annotations.get(TERMINATION_MESSAGE_POLICY).is_some_and(|p| p == "FallbackToLogsOnError"),
        pod_grace_seconds: number(POD_GRACE),
    }
}

/// The hash by which a change of a container's definition is seen: of its name and image. As `HashContainer`.
pub fn container_hash(container: &Container) -> u64 {
    let picked = serde_json::json!({"image": container.image.as_deref().unwrap_or(""), "name": container.name});
    let text = picked.to_string();
    // The bytes are hashed in the form in which Kubernetes' dump of a byte slice prints them.
    let numbers: Vec<String> = text.bytes().map(|b| b.to_string()).collect();
    u64::from(fnv32a(format!("([]uint8)[{}]", numbers.join(" ")).as_bytes()))
}

fn fnv32a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_read_back_as_written() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"},
            "spec": {"terminationGracePeriodSeconds": 7, "containers": [{"name": "c", "image": "i"}]}
        }))
        .unwrap();
        let container = Container {
            name: "c".into(),
            image: Some("i".into()),
            termination_message_policy: Some("FallbackToLogsOnError".into()),
            ..Default::default()
        };
        let read = annotated(&container_annotations(&pod, &container, 3), None);
        assert_eq!(
            read,
            Annotated {
                hash: container_hash(&container),
                restart_count: 3,
                termination_path: DEFAULT_TERMINATION_PATH.into(),
                fallback_to_logs: true,
                pod_grace_seconds: Some(7),
            }
        );
    }

    #[test]
    fn only_name_and_image_change_the_hash() {
        let base = Container { name: "c".into(), image: Some("i".into()), ..Default::default() };
        let env = Container { command: Some(vec!["x".into()]), ..base.clone() };
        let image = Container { image: Some("j".into()), ..base.clone() };
        assert_eq!(container_hash(&base), container_hash(&env));
        assert_ne!(container_hash(&base), container_hash(&image));
    }
}
