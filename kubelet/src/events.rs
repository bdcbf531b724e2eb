//! Events about pods and their containers.

use component_base::events::{Recorder, Type, reference};
use k8s_openapi::api::core::v1::Pod;

use crate::runtime::pods::{ContainerKind, find_container};
use crate::static_pods;

/// Writes the kubelet's events.
pub struct Events {
    recorder: Recorder,
}

impl Events {
    pub fn new(recorder: Recorder) -> Self {
        Self { recorder }
    }

    /// Nowhere to write to.
    pub fn discard() -> Self {
        Self { recorder: Recorder::discard() }
    }

    /// An event about a pod, or about one of its containers.
    pub fn pod(&self, pod: &Pod, container: Option<&str>, kind: Type, reason: &str, message: impl Into<String>) {
        let mut object = reference(pod);
        object.api_version = Some("v1".to_owned());
        object.kind = Some("Pod".to_owned());
        // The mirror of a static pod has the static pod's UID as far as events go.
        if static_pods::is_static(pod) {
            object.uid = pod.metadata.annotations.as_ref().and_then(|a| a.get(static_pods::CONFIG_HASH)).cloned();
        }
        object.field_path = container.map(|name| field_path(pod, name));
        self.recorder.event(&object, kind, reason, "", message);
    }

    pub fn node(&self, name: &str, kind: Type, reason: &str, message: impl Into<String>) {
        let object = k8s_openapi::api::core::v1::ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(name.to_owned()),
            uid: Some(name.to_owned()),
            ..Default::default()
        };
        self.recorder.event(&object, kind, reason, "", message);
    }
}

/// Where in the pod a container stands: `spec.containers{name}`.
fn field_path(pod: &Pod, name: &str) -> String {
    let kind = find_container(pod, name).map_or(ContainerKind::App, |(kind, _)| kind);
    let list = match kind {
        ContainerKind::Init => "initContainers",
        ContainerKind::App => "containers",
        ContainerKind::Ephemeral => "ephemeralContainers",
    };
    format!("spec.{list}{{{name}}}")
}
