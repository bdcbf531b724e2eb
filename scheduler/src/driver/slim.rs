//! What the watches read of each object: no more than decisions do. The rest is not even decoded: most of a pod's text, and
//! all templates of pods, are of no interest here.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::Arc;

use component_base::lean::{list, optional, optional_list, whole};
use component_base::part;
use k8s_openapi::api::core::v1::{
    AWSElasticBlockStoreVolumeSource, Affinity, Container, ContainerImage, ContainerPort, ContainerRestartRule,
    ContainerStatus, EphemeralVolumeSource, GCEPersistentDiskVolumeSource, ISCSIVolumeSource, Node, NodeSpec,
    NodeStatus, PersistentVolumeClaimVolumeSource, Pod, PodCondition, PodResourceClaim, PodResourceClaimStatus,
    PodSchedulingGate, PodSpec, PodStatus, RBDVolumeSource, ResourceRequirements, Taint, Toleration,
    TopologySpreadConstraint, Volume,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference, Time};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

use crate::cache::PodFacts;

type Map<T> = BTreeMap<String, T>;

part! { pub(super) MetaPart of ObjectMeta {
    name: Option<String>, namespace: Option<String>, uid: Option<String>, resource_version: Option<String>,
    generation: Option<i64>, labels: Option<Map<String>>, deletion_timestamp: Option<Time>,
    owner_references: Option<Vec<OwnerReference>>,
} }

part! { PodPart of Pod {
    #[serde(deserialize_with = "whole::<MetaPart, _, _>")] metadata: ObjectMeta,
    #[serde(deserialize_with = "optional::<SpecPart, _, _>")] spec: Option<PodSpec>,
    #[serde(deserialize_with = "optional::<StatusPart, _, _>")] status: Option<PodStatus>,
} }

part! { SpecPart of PodSpec {
    affinity: Option<Affinity>,
    #[serde(deserialize_with = "list::<ContainerPart, _, _>")] containers: Vec<Container>,
    host_network: Option<bool>, host_users: Option<bool>,
    #[serde(deserialize_with = "optional_list::<ContainerPart, _, _>")] init_containers: Option<Vec<Container>>,
    node_name: Option<String>, node_selector: Option<Map<String>>, overhead: Option<Map<Quantity>>,
    preemption_policy: Option<String>, priority: Option<i32>, resource_claims: Option<Vec<PodResourceClaim>>,
    resources: Option<ResourceRequirements>, scheduler_name: Option<String>,
    scheduling_gates: Option<Vec<PodSchedulingGate>>, tolerations: Option<Vec<Toleration>>,
    topology_spread_constraints: Option<Vec<TopologySpreadConstraint>>,
    #[serde(deserialize_with = "optional_list::<VolumePart, _, _>")] volumes: Option<Vec<Volume>>,
} }

part! { ContainerPart of Container {
    name: String, image: Option<String>, ports: Option<Vec<ContainerPort>>, resources: Option<ResourceRequirements>,
    restart_policy: Option<String>, restart_policy_rules: Option<Vec<ContainerRestartRule>>,
} }

part! { VolumePart of Volume {
    name: String, aws_elastic_block_store: Option<AWSElasticBlockStoreVolumeSource>,
    ephemeral: Option<EphemeralVolumeSource>, gce_persistent_disk: Option<GCEPersistentDiskVolumeSource>,
    iscsi: Option<ISCSIVolumeSource>, persistent_volume_claim: Option<PersistentVolumeClaimVolumeSource>,
    rbd: Option<RBDVolumeSource>,
} }

part! { StatusPart of PodStatus {
    conditions: Option<Vec<PodCondition>>,
    #[serde(deserialize_with = "optional_list::<ContainerStatusPart, _, _>")]
    container_statuses: Option<Vec<ContainerStatus>>,
    #[serde(deserialize_with = "optional_list::<ContainerStatusPart, _, _>")]
    init_container_statuses: Option<Vec<ContainerStatus>>,
    nominated_node_name: Option<String>, phase: Option<String>,
    resource_claim_statuses: Option<Vec<PodResourceClaimStatus>>, start_time: Option<Time>,
} }

part! { ContainerStatusPart of ContainerStatus {
    name: String, allocated_resources: Option<Map<Quantity>>, resources: Option<ResourceRequirements>,
} }

part! { pub(super) NodePart of Node {
    #[serde(deserialize_with = "whole::<MetaPart, _, _>")] metadata: ObjectMeta,
    #[serde(deserialize_with = "optional::<NodeSpecPart, _, _>")] spec: Option<NodeSpec>,
    #[serde(deserialize_with = "optional::<NodeStatusPart, _, _>")] status: Option<NodeStatus>,
} }

part! { NodeSpecPart of NodeSpec { taints: Option<Vec<Taint>>, unschedulable: Option<bool>, } }

part! { NodeStatusPart of NodeStatus {
    allocatable: Option<Map<Quantity>>, declared_features: Option<Vec<String>>, images: Option<Vec<ContainerImage>>,
} }

/// What decisions read of a pod.
pub fn pod<'de, D: Deserializer<'de>>(from: D) -> Result<Pod, D::Error> {
    whole::<PodPart, _, _>(from)
}

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
        let pod = pod(deserializer)?;
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).filter(|name| !name.is_empty());
        let meta = identity(&pod.metadata);
        let (node, ended) = (node.map(Arc::from), apimachinery::pod::is_terminal(&pod));
        let facts = node.as_ref().filter(|_| !ended).map(|_| PodFacts::of(&pod));
        let kept = (node.is_none() && !ended).then(|| Arc::new(pod));
        Ok(SeenPod { meta, pod: kept, node, facts: Arc::new(Mutex::new(facts)), ended })
    }
}

fn identity(meta: &ObjectMeta) -> ObjectMeta {
    ObjectMeta {
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        ..ObjectMeta::default()
    }
}

/// An object of the kind `K`, of which `T` is for the picture.
#[derive(Debug)]
pub(super) struct Seen<K, T> {
    meta: ObjectMeta,
    part: Arc<Mutex<Option<T>>>,
    kind: PhantomData<fn() -> K>,
}

/// What is taken from an object, and what is decoded for that.
pub(super) trait Part: Sized {
    type Read: DeserializeOwned;

    fn of(read: Self::Read) -> (ObjectMeta, Option<Self>);
}

impl<K, T> Seen<K, T> {
    /// The part, the first time.
    pub(super) fn take(&self) -> Option<T> {
        self.part.lock().take()
    }
}

impl<K, T> Clone for Seen<K, T> {
    fn clone(&self) -> Self {
        Seen { meta: self.meta.clone(), part: self.part.clone(), kind: PhantomData }
    }
}

impl<'de, K, T: Part> Deserialize<'de> for Seen<K, T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (meta, part) = T::of(T::Read::deserialize(deserializer)?);
        Ok(Seen { meta: identity(&meta), part: Arc::new(Mutex::new(part)), kind: PhantomData })
    }
}

/// What selects pods: the selector alone.
#[derive(Deserialize)]
#[serde(bound = "S: Deserialize<'de>")]
pub(super) struct Selecting<S> {
    metadata: MetaPart,
    spec: Option<SelectorOf<S>>,
}

#[derive(Deserialize)]
#[serde(bound = "S: Deserialize<'de>")]
struct SelectorOf<S> {
    selector: Option<S>,
}

impl Part for LabelSelector {
    type Read = Selecting<LabelSelector>;

    fn of(read: Self::Read) -> (ObjectMeta, Option<Self>) {
        (read.metadata.into(), read.spec.and_then(|spec| spec.selector))
    }
}

impl Part for Map<String> {
    type Read = Selecting<Map<String>>;

    fn of(read: Self::Read) -> (ObjectMeta, Option<Self>) {
        (read.metadata.into(), read.spec.and_then(|spec| spec.selector))
    }
}

/// A namespace's labels.
#[derive(Debug)]
pub(super) struct NamespaceLabels(pub Map<String>);

#[derive(Deserialize)]
pub(super) struct Labelled {
    metadata: MetaPart,
}

impl Part for NamespaceLabels {
    type Read = Labelled;

    fn of(mut read: Labelled) -> (ObjectMeta, Option<Self>) {
        let labels = read.metadata.labels.take().unwrap_or_default();
        (read.metadata.into(), Some(NamespaceLabels(labels)))
    }
}

impl Part for Node {
    type Read = NodePart;

    fn of(read: NodePart) -> (ObjectMeta, Option<Self>) {
        let node = Node::from(read);
        (identity(&node.metadata), Some(node))
    }
}

/// The kind that a type stands for.
macro_rules! stands_for {
    ([$($generics:tt)*] $type:ty, $kind:ty) => {
        impl<$($generics)*> kube::Resource for $type {
            type DynamicType = ();
            type Scope = <$kind as kube::Resource>::Scope;

            fn kind(_: &()) -> Cow<'_, str> {
                <$kind as kube::Resource>::kind(&())
            }

            fn group(_: &()) -> Cow<'_, str> {
                <$kind as kube::Resource>::group(&())
            }

            fn version(_: &()) -> Cow<'_, str> {
                <$kind as kube::Resource>::version(&())
            }

            fn plural(_: &()) -> Cow<'_, str> {
                <$kind as kube::Resource>::plural(&())
            }

            fn meta(&self) -> &ObjectMeta {
                &self.meta
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.meta
            }
        }
    };
}

stands_for!([] SeenPod, Pod);
stands_for!([K: kube::Resource<DynamicType = ()>, T] Seen<K, T>, K);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_decisions_read_is_decoded_and_nothing_else() {
        let resources = json!({"requests": {"cpu": "1", "example.com/x": "2"}});
        let kept = json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "resourceVersion": "1", "generation": 2,
                "labels": {"a": "b"}, "deletionTimestamp": "2026-01-01T00:00:00Z",
                "ownerReferences": [{"apiVersion": "v1", "kind": "K", "name": "o", "uid": "u", "controller": true}]},
            "spec": {"containers": [{"name": "c", "image": "i", "resources": resources, "restartPolicy": "Never",
                    "ports": [{"containerPort": 1, "hostPort": 2, "protocol": "TCP"}],
                    "restartPolicyRules": [{"action": "RestartAllContainers"}]}],
                "initContainers": [{"name": "s", "restartPolicy": "Always"}], "nodeName": "node", "priority": 5,
                "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "x"}}, {"name": "w"}],
                "tolerations": [{"operator": "Exists"}], "hostNetwork": true, "hostUsers": false,
                "overhead": {"cpu": "1m"}, "schedulerName": "s", "schedulingGates": [{"name": "g"}],
                "nodeSelector": {"a": "b"}, "preemptionPolicy": "Never", "resources": resources,
                "resourceClaims": [{"name": "r", "resourceClaimName": "x"}],
                "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
                "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "k", "whenUnsatisfiable": "DoNotSchedule"}]},
            "status": {"phase": "Pending", "nominatedNodeName": "x", "startTime": "2026-01-01T00:00:00Z",
                "conditions": [{"type": "PodScheduled", "status": "False"}],
                "resourceClaimStatuses": [{"name": "r", "resourceClaimName": "x"}]},
        });
        let mut all = kept.clone();
        all["metadata"]["managedFields"] = json!([{"manager": "m", "fieldsV1": {"f:spec": {}}}]);
        all["metadata"]["annotations"] = json!({"k": "v"});
        all["spec"]["containers"][0]["env"] = json!([{"name": "E", "value": "v"}]);
        all["spec"]["volumes"][1]["emptyDir"] = json!({});
        all["spec"]["securityContext"] = json!({"runAsUser": 1});
        all["status"]["podIP"] = json!("10.0.0.1");
        let expected: Pod = serde_json::from_value(kept.clone()).expect("a pod");
        let decoded = |value: &serde_json::Value| pod(&mut serde_json::Deserializer::from_str(&value.to_string()));
        assert_eq!(decoded(&all).expect("a pod"), expected);
        let mut running = kept;
        running["spec"]["resources"] = json!(null);
        running["status"]["containerStatuses"] = json!([{"name": "c", "image": "i", "imageID": "i", "ready": true,
            "restartCount": 0, "allocatedResources": {"cpu": "3"}, "resources": {"requests": {"cpu": "3"}}}]);
        let seen: SeenPod = serde_json::from_str(&running.to_string()).expect("a pod");
        let facts = seen.facts.lock().take().expect("facts");
        assert_eq!((seen.node.as_deref(), facts.requests.cpu_milli, seen.ended), (Some("node"), 3001, false));
    }

    #[test]
    fn selectors_are_taken_once() {
        let set = json!({"metadata": {"name": "s"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"spec": 7}}});
        type Set = Seen<k8s_openapi::api::apps::v1::ReplicaSet, LabelSelector>;
        let seen: Set = serde_json::from_str(&set.to_string()).expect("a set");
        assert!(seen.take().is_some_and(|selector| selector.match_labels.is_some()));
        assert!(seen.take().is_none());
    }
}
