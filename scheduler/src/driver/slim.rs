//! What the watches keep of each object: no more than decisions read.

use std::borrow::Cow;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{
    Container, Namespace, Node, NodeStatus, Pod, PodStatus, ReplicationController, Service,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use parking_lot::Mutex;
use serde::{Deserialize, Deserializer};

use crate::cache::PodFacts;

/// A pod as a watch shows it. Of one that has a node nothing is kept but its name, once the picture has its facts.
#[derive(Clone, Debug)]
pub(super) struct SeenPod {
    pub meta: ObjectMeta,
    /// Until it has a node.
    pub pod: Option<Arc<Pod>>,
    pub node: Option<Arc<str>>,
    /// For the picture, which takes them.
    pub facts: Arc<Mutex<Option<PodFacts>>>,
    pub ended: bool,
}

impl<'de> Deserialize<'de> for SeenPod {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let pod = Pod::deserialize(deserializer)?;
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).filter(|name| !name.is_empty());
        let meta = ObjectMeta {
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: pod.metadata.uid.clone(),
            resource_version: pod.metadata.resource_version.clone(),
            ..ObjectMeta::default()
        };
        let (node, ended) = (node.map(Arc::from), apimachinery::pod::is_terminal(&pod));
        let facts = node.as_ref().filter(|_| !ended).map(|_| PodFacts::of(&pod));
        let kept = (node.is_none() && !ended).then(|| Arc::new(pod));
        Ok(SeenPod { meta, pod: kept, node, facts: Arc::new(Mutex::new(facts)), ended })
    }
}

impl kube::Resource for SeenPod {
    type DynamicType = ();
    type Scope = kube::core::NamespaceResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        Pod::kind(&())
    }

    fn group(_: &()) -> Cow<'_, str> {
        Pod::group(&())
    }

    fn version(_: &()) -> Cow<'_, str> {
        Pod::version(&())
    }

    fn plural(_: &()) -> Cow<'_, str> {
        Pod::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

/// As [`pod`], of one that waits.
pub(super) fn seen(seen: &mut SeenPod) {
    if let Some(waiting) = &mut seen.pod {
        pod(Arc::make_mut(waiting));
    }
}

fn container(container: &Container) -> Container {
    Container {
        name: container.name.clone(),
        image: container.image.clone(),
        resources: container.resources.clone(),
        ports: container.ports.clone(),
        restart_policy: container.restart_policy.clone(),
        restart_policy_rules: container.restart_policy_rules.clone(),
        ..Container::default()
    }
}

/// Keeps requests, ports, images and what says where a pod may be.
fn pod(pod: &mut Pod) {
    pod.metadata.annotations = None;
    pod.metadata.managed_fields = None;
    pod.metadata.finalizers = None;
    if let Some(spec) = &mut pod.spec {
        spec.containers = spec.containers.iter().map(container).collect();
        spec.init_containers = spec.init_containers.as_ref().map(|init| init.iter().map(container).collect());
        spec.ephemeral_containers = None;
        spec.security_context = None;
        spec.dns_config = None;
        spec.host_aliases = None;
        spec.image_pull_secrets = None;
        spec.readiness_gates = None;
        // What claims and in-tree disks a pod mounts matters, and nothing else that it mounts.
        spec.volumes = spec.volumes.take().map(|mut volumes| {
            volumes.retain(|volume| {
                volume.persistent_volume_claim.is_some()
                    || volume.ephemeral.is_some()
                    || volume.gce_persistent_disk.is_some()
                    || volume.aws_elastic_block_store.is_some()
                    || volume.iscsi.is_some()
                    || volume.rbd.is_some()
            });
            volumes
        });
    }
    if let Some(status) = &mut pod.status {
        let conditions = status.conditions.take().map(|mut conditions| {
            conditions.retain(|condition| matches!(condition.type_.as_str(), "PodScheduled" | "DisruptionTarget"));
            conditions
        });
        *status = PodStatus {
            phase: status.phase.take(),
            nominated_node_name: status.nominated_node_name.take(),
            resource_claim_statuses: status.resource_claim_statuses.take(),
            start_time: status.start_time.take(),
            conditions,
            ..PodStatus::default()
        };
    }
}

/// Keeps labels, taints, allocatable resources, features and images.
pub(super) fn node(node: &mut Node) {
    node.metadata.annotations = None;
    if let Some(status) = &mut node.status {
        *status = NodeStatus {
            allocatable: status.allocatable.take(),
            declared_features: status.declared_features.take(),
            images: status.images.take(),
            ..NodeStatus::default()
        };
    }
}

/// Keeps the labels.
pub(super) fn namespace(namespace: &mut Namespace) {
    namespace.metadata.annotations = None;
    namespace.spec = None;
    namespace.status = None;
}

/// Keeps the selector.
pub(super) fn service(service: &mut Service) {
    service.metadata.annotations = None;
    service.status = None;
    if let Some(spec) = &mut service.spec {
        let selector = spec.selector.take();
        *spec = k8s_openapi::api::core::v1::ServiceSpec { selector, ..Default::default() };
    }
}

/// Keeps the selector.
pub(super) fn replication_controller(controller: &mut ReplicationController) {
    controller.metadata.annotations = None;
    controller.status = None;
    if let Some(spec) = &mut controller.spec {
        spec.template = None;
    }
}

/// Keeps the selector.
pub(super) fn replica_set(set: &mut ReplicaSet) {
    set.metadata.annotations = None;
    set.status = None;
    if let Some(spec) = &mut set.spec {
        spec.template = None;
    }
}

/// Keeps the selector.
pub(super) fn stateful_set(set: &mut StatefulSet) {
    set.metadata.annotations = None;
    set.status = None;
    if let Some(spec) = &mut set.spec {
        spec.template = Default::default();
        spec.volume_claim_templates = None;
    }
}
