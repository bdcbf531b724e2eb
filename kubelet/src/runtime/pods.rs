//! Small readers of a pod's spec that many parts of the kubelet share.

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec};

/// The pod's UID; for a mirror pod, that of the static pod it shows.
pub fn uid_of(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// `namespace/name`, for logs.
pub fn full_name(pod: &Pod) -> String {
    format!(
        "{}/{}",
        pod.metadata.namespace.as_deref().unwrap_or("default"),
        pod.metadata.name.as_deref().unwrap_or_default()
    )
}

pub fn host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|s| s.host_network).unwrap_or(false)
}

/// An init container that keeps running beside the others.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

pub fn init_containers(spec: &PodSpec) -> &[Container] {
    spec.init_containers.as_deref().unwrap_or_default()
}

/// An ephemeral container seen as an ordinary one.
pub fn ephemeral_as_container(ephemeral: &EphemeralContainer) -> Container {
    let mut value = serde_json::to_value(ephemeral).unwrap_or_default();
    if let Some(map) = value.as_object_mut() {
        map.remove("targetContainerName");
    }
    serde_json::from_value(value).unwrap_or_else(|_| Container { name: ephemeral.name.clone(), ..Default::default() })
}

/// Where in a pod a container is declared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ContainerKind {
    Init,
    App,
    Ephemeral,
}

/// A container of the pod by its name, of whatever kind.
pub fn find_container(pod: &Pod, name: &str) -> Option<(ContainerKind, Container)> {
    let spec = pod.spec.as_ref()?;
    if let Some(c) = spec.containers.iter().find(|c| c.name == name) {
        return Some((ContainerKind::App, c.clone()));
    }
    if let Some(c) = init_containers(spec).iter().find(|c| c.name == name) {
        return Some((ContainerKind::Init, c.clone()));
    }
    let ephemeral = spec.ephemeral_containers.as_deref().unwrap_or_default();
    ephemeral.iter().find(|c| c.name == name).map(|c| (ContainerKind::Ephemeral, ephemeral_as_container(c)))
}

/// Seconds a pod may take to end: of its deletion, else of its spec, else 30.
pub fn grace_seconds(pod: &Pod) -> i64 {
    pod.metadata
        .deletion_grace_period_seconds
        .or_else(|| pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds))
        .unwrap_or(30)
        .max(0)
}
