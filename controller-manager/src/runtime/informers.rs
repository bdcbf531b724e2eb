//! The shared informers: one watch of a kind in the process, started by the first controller that asks for it.
//!
//! An object is slimmed before it is kept: [`Watched::slim`] says what no controller reads. What is written back whole
//! (Deployments, ReplicaSets, Services' slices) must not be slimmed.
use component_base::{
    client::send,
    informer::Informer,
    lean::{self, list, optional, optional_list, whole},
    part,
};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        admissionregistration::v1::ValidatingAdmissionPolicy,
        apps::v1::{ControllerRevision, DaemonSet, Deployment, ReplicaSet, StatefulSet},
        autoscaling::v2::HorizontalPodAutoscaler,
        batch::v1::{CronJob, Job},
        certificates::v1::CertificateSigningRequest,
        coordination::v1::Lease,
        core::v1::{
            Affinity, ConfigMap, Container, ContainerPort, ContainerState, ContainerStateTerminated, ContainerStatus,
            Endpoints, EphemeralVolumeSource, Namespace, Node, PersistentVolume, PersistentVolumeClaim,
            PersistentVolumeClaimVolumeSource, Pod, PodCondition, PodExtendedResourceClaimStatus, PodIP,
            PodResourceClaim, PodResourceClaimStatus, PodSpec, PodStatus, ReplicationController, ResourceQuota, Secret,
            Service, ServiceAccount, Toleration, Volume,
        },
        discovery::v1::EndpointSlice,
        networking::v1::{IPAddress, IPAddressSpec, ServiceCIDR},
        policy::v1::PodDisruptionBudget,
        rbac::v1::ClusterRole,
        resource::v1::{Device, ResourceClaim, ResourceClaimTemplate, ResourceSlice},
        storage::v1::{CSIDriver, StorageClass, VolumeAttachment, VolumeAttributesClass},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time},
};
use kube::{
    Api, Client, Resource,
    api::{PostParams, WatchParams},
    core::ApiResource,
};
use parking_lot::Mutex;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    any::{Any, TypeId},
    collections::{BTreeMap, HashMap},
    fmt::Debug,
    sync::Arc,
};
use tokio::sync::watch;

/// A kind that informers watch.
pub trait Watched: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static {
    /// Takes away what no controller reads.
    fn slim(&mut self) {}

    /// An object of its text, without what no controller reads.
    fn decode(text: &[u8]) -> serde_json::Result<Self> {
        let mut object: Self = lean::decode(text)?;
        object.slim();
        Ok(object)
    }

    /// Which objects are watched: all, unless a controller needs only a few.
    fn selection() -> WatchParams {
        WatchParams::default()
    }
}

/// Gives informers. Clones of an informer share its watch.
pub struct Informers {
    client: Client,
    started: Mutex<HashMap<TypeId, Box<dyn Any + Send + Sync>>>,
}

impl Informers {
    pub fn new(client: Client) -> Self {
        Self { client, started: Mutex::default() }
    }

    /// The informer of a kind; the first call starts it.
    pub fn get<K: Watched>(&self) -> Informer<K> {
        let mut started = self.started.lock();
        if let Some(informer) = started.get(&TypeId::of::<K>()).and_then(|any| any.downcast_ref::<Informer<K>>()) {
            return informer.clone();
        }
        // What is a little old is good enough: the watch catches up, and it costs the server no read of etcd.
        let informer = Informer::start_decoded(Api::all(self.client.clone()), K::selection(), K::decode);
        started.insert(TypeId::of::<K>(), Box::new(informer.clone()));
        informer
    }
}

/// An API for a namespace, or for the cluster where `namespace` is empty.
pub fn api_in<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(
    client: &Client,
    namespace: &str,
) -> Api<K> {
    Api::namespaced(client.clone(), namespace)
}

/// Writes an object's status. The answer is not read: the watch brings it.
pub async fn put_status<K>(client: &Client, object: &K) -> Result<(), kube::Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Serialize,
{
    let meta = object.meta();
    let all = kube::core::Request::new(K::url_path(&(), meta.namespace.as_deref()));
    let body = serde_json::to_vec(object).map_err(kube::Error::SerdeError)?;
    let name = meta.name.as_deref().unwrap_or_default();
    send(client, all.replace_subresource("status", name, &PostParams::default(), body)).await.map(drop)
}

/// An object of whatever kind, by its metadata.
pub trait Described: Debug + Send + Sync {
    fn metadata(&self) -> &ObjectMeta;
}

impl<K: Resource + Debug + Send + Sync> Described for K {
    fn metadata(&self) -> &ObjectMeta {
        self.meta()
    }
}

/// What happened to an object, as [`component_base::informer::Change`] says it.
type Follower = Box<dyn Fn(Option<&ObjectMeta>, Option<Arc<dyn Described>>) + Send + Sync>;

/// Of these kinds controllers watch all objects: those that are kept as they are, and the others.
macro_rules! watched_whole {
    ($($plain:ident),*; $($slimmed:ident),*) => {
        $(impl Watched for $plain {})*

        impl Informers {
            /// Tells `follower` of all objects of a kind, if that is watched for other controllers anyway: then gives what
            /// tells when it has heard of all that were there.
            pub fn follow(&self, kind: &ApiResource, follower: Follower) -> Option<watch::Receiver<bool>> {
                $(if is::<$plain>(kind) {
                    return Some(follow(&self.get::<$plain>(), follower));
                })*
                $(if is::<$slimmed>(kind) {
                    return Some(follow(&self.get::<$slimmed>(), follower));
                })*
                None
            }
        }
    };
}

fn is<K: Watched>(kind: &ApiResource) -> bool {
    K::group(&()) == kind.group && K::plural(&()) == kind.plural
}

fn follow<K: Watched>(informer: &Informer<K>, follower: Follower) -> watch::Receiver<bool> {
    informer.on_change(move |change| {
        follower(change.old.map(|o| o.meta()), change.new.map(|o| o.clone() as Arc<dyn Described>));
    });
    informer.sync_state()
}

watched_whole!(
    Deployment, DaemonSet, Job, CronJob, HorizontalPodAutoscaler, PodDisruptionBudget, StatefulSet,
    PersistentVolumeClaim, ControllerRevision, ReplicaSet, ReplicationController, ResourceQuota, Service,
    Endpoints, EndpointSlice, Namespace, Lease, CertificateSigningRequest, ClusterRole,
    ValidatingAdmissionPolicy, PersistentVolume, StorageClass, CSIDriver, VolumeAttachment,
    VolumeAttributesClass, ResourceClaim, ResourceClaimTemplate, ServiceCIDR;
    Pod, Node, ServiceAccount, IPAddress, ResourceSlice
);

// === what is kept of each kind ===

part! { PodMeta of ObjectMeta {
    name: Option<String>, namespace: Option<String>, uid: Option<String>, resource_version: Option<String>,
    generation: Option<i64>, labels: Option<BTreeMap<String, String>>, annotations: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>, finalizers: Option<Vec<String>>, creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>, deletion_grace_period_seconds: Option<i64>,
} }

part! { PodPart of Pod {
    #[serde(deserialize_with = "whole::<PodMeta, _, _>")] metadata: ObjectMeta,
    #[serde(deserialize_with = "optional::<SpecPart, _, _>")] spec: Option<PodSpec>,
    #[serde(deserialize_with = "optional::<StatusPart, _, _>")] status: Option<PodStatus>,
} }

part! { SpecPart of PodSpec {
    affinity: Option<Affinity>, node_name: Option<String>, hostname: Option<String>, subdomain: Option<String>,
    tolerations: Option<Vec<Toleration>>, termination_grace_period_seconds: Option<i64>,
    resource_claims: Option<Vec<PodResourceClaim>>,
    #[serde(deserialize_with = "optional_list::<VolumePart, _, _>")] volumes: Option<Vec<Volume>>,
    #[serde(deserialize_with = "list::<ContainerPart, _, _>")] containers: Vec<Container>,
    #[serde(deserialize_with = "optional_list::<ContainerPart, _, _>")] init_containers: Option<Vec<Container>>,
} }

part! { VolumePart of Volume {
    name: String, persistent_volume_claim: Option<PersistentVolumeClaimVolumeSource>,
    ephemeral: Option<EphemeralVolumeSource>,
} }

part! { ContainerPart of Container {
    name: String, ports: Option<Vec<ContainerPort>>, restart_policy: Option<String>,
} }

part! { StatusPart of PodStatus {
    phase: Option<String>, reason: Option<String>,
    #[serde(rename = "podIP")] pod_ip: Option<String>,
    #[serde(rename = "podIPs")] pod_ips: Option<Vec<PodIP>>,
    #[serde(deserialize_with = "optional_list::<ConditionPart, _, _>")] conditions: Option<Vec<PodCondition>>,
    #[serde(deserialize_with = "optional_list::<ContainerStatusPart, _, _>")]
    container_statuses: Option<Vec<ContainerStatus>>,
    #[serde(deserialize_with = "optional_list::<ContainerStatusPart, _, _>")]
    init_container_statuses: Option<Vec<ContainerStatus>>,
    resource_claim_statuses: Option<Vec<PodResourceClaimStatus>>,
    extended_resource_claim_status: Option<PodExtendedResourceClaimStatus>,
} }

part! { ConditionPart of PodCondition {
    type_: String, status: String, reason: Option<String>, last_transition_time: Option<Time>,
} }

part! { ContainerStatusPart of ContainerStatus {
    name: String, restart_count: i32,
    #[serde(deserialize_with = "optional::<StatePart, _, _>")] state: Option<ContainerState>,
} }

part! { StatePart of ContainerState {
    #[serde(deserialize_with = "optional::<EndPart, _, _>")] terminated: Option<ContainerStateTerminated>,
} }

part! { EndPart of ContainerStateTerminated { exit_code: i32, finished_at: Option<Time>, } }

impl Watched for Pod {
    /// Decodes identity, owners, placement, ports, tolerations and the parts of the status that say how the pod fares.
    fn decode(text: &[u8]) -> serde_json::Result<Self> {
        let mut pod = Pod::from(lean::decode::<PodPart>(text)?);
        pod.slim();
        Ok(pod)
    }

    fn slim(&mut self) {
        const ANNOTATIONS_READ: [&str; 3] = [
            "controller.kubernetes.io/pod-deletion-cost",
            "batch.kubernetes.io/job-index-failure-count",
            "batch.kubernetes.io/job-index-ignored-failure-count",
        ];
        keep_annotations(&mut self.metadata, &ANNOTATIONS_READ);
        let mut sidecars: Vec<String> = Vec::new();
        if let Some(spec) = &mut self.spec {
            // A daemon that is not placed yet is known by the node that it may be placed on.
            let unplaced = spec.node_name.as_deref().unwrap_or("").is_empty();
            let mut owners = self.metadata.owner_references.iter().flatten();
            let daemon = unplaced && owners.any(|o| o.kind == "DaemonSet");
            spec.affinity.take_if(|_| !daemon);
            let claims = |v: &Volume| v.persistent_volume_claim.is_some() || v.ephemeral.is_some();
            retain(&mut spec.volumes, claims);
            // Of containers nothing but their ports is read.
            let has_ports = |c: &Container| c.ports.as_ref().is_some_and(|ports| !ports.is_empty());
            spec.containers.retain(has_ports);
            spec.containers.shrink_to_fit();
            let beside =
                spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
            sidecars = beside.map(|c| c.name.clone()).collect();
            retain(&mut spec.init_containers, |c| c.restart_policy.is_some() && has_ports(c));
        }
        if let Some(status) = &mut self.status {
            let of_job = self.metadata.owner_references.iter().flatten().any(|o| o.kind == "Job");
            // A Job's policy may ask for any.
            let read = |c: &PodCondition| of_job || matches!(c.type_.as_str(), "Ready" | "DisruptionTarget");
            retain(&mut status.conditions, read);
            // How containers ended is what failure policies and back-off read.
            let all = status.container_statuses.iter_mut().chain(&mut status.init_container_statuses).flatten();
            all.for_each(|status| drop(status.state.take_if(|state| state.terminated.is_none())));
            retain(&mut status.container_statuses, |s| of_job || s.restart_count > 0 || s.state.is_some());
            let sidecar = |s: &ContainerStatus| s.restart_count > 0 && sidecars.contains(&s.name);
            retain(&mut status.init_container_statuses, |s| of_job || sidecar(s));
        }
    }
}

/// Leaves those of a list, and no list that is empty.
fn retain<T>(list: &mut Option<Vec<T>>, wanted: impl FnMut(&T) -> bool) {
    if let Some(items) = list {
        items.retain(wanted);
        items.shrink_to_fit();
    }
    list.take_if(|items| items.is_empty());
}

fn keep_annotations(meta: &mut ObjectMeta, read: &[&str]) {
    if let Some(annotations) = &mut meta.annotations {
        annotations.retain(|key, _| read.contains(&key.as_str()));
    }
    meta.annotations.take_if(|annotations| annotations.is_empty());
}

impl Watched for Node {
    fn slim(&mut self) {
        keep_annotations(
            &mut self.metadata,
            &["node.alpha.kubernetes.io/ttl", "volumes.kubernetes.io/controller-managed-attach-detach"],
        );
        if let Some(status) = &mut self.status {
            status.images = None;
            status.node_info = None;
            status.capacity = None;
            if let Some(allocatable) = &mut status.allocatable {
                allocatable.retain(|name, _| name == "cpu");
            }
        }
    }
}

impl Watched for ConfigMap {
    fn selection() -> WatchParams {
        WatchParams::default().fields("metadata.name=kube-root-ca.crt")
    }
}

impl Watched for Secret {
    fn selection() -> WatchParams {
        WatchParams::default().fields("type=bootstrap.kubernetes.io/token")
    }
}

impl Watched for ServiceAccount {
    fn slim(&mut self) {
        self.metadata.annotations = None;
        self.secrets = None;
        self.image_pull_secrets = None;
    }
}

impl Watched for IPAddress {
    fn slim(&mut self) {
        self.spec = IPAddressSpec::default();
    }
}

impl Watched for ResourceSlice {
    /// Keeps which devices have taints that evict.
    fn slim(&mut self) {
        for device in self.spec.devices.iter_mut().flatten() {
            let mut taints = device.taints.take().unwrap_or_default();
            taints.retain(|t| t.effect == "NoExecute");
            let name = std::mem::take(&mut device.name);
            *device = Device { name, taints: Some(taints).filter(|t| !t.is_empty()), ..Device::default() };
        }
        if let Some(devices) = &mut self.spec.devices {
            devices.retain(|d| d.taints.is_some());
        }
        self.spec.shared_counters = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_slim_pod_keeps_what_decisions_read() {
        let pod = json!({
            "metadata": {"name": "p", "annotations": {
                "controller.kubernetes.io/pod-deletion-cost": "5", "kubectl.kubernetes.io/last-applied": "x"}},
            "spec": {"nodeName": "n1", "subdomain": "s",
                "initContainers": [{"name": "once"}, {"name": "side", "restartPolicy": "Always", "image": "i",
                    "ports": [{"containerPort": 81}]}],
                "containers": [{"name": "dull", "image": "i"}, {"name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 80}]}]},
            "status": {"podIP": "10.0.0.1", "phase": "Running",
                "initContainerStatuses": [
                    {"name": "once", "restartCount": 7, "image": "i", "imageID": "", "ready": true}, {"name": "side", "restartCount": 2, "image": "i", "imageID": "", "ready": true}],
                "containerStatuses": [
                    {"name": "dull", "restartCount": 0, "image": "i", "imageID": "", "ready": true}, {"name": "c", "restartCount": 3, "image": "i", "imageID": "", "ready": true}]}
        });
        let pod = Pod::decode(pod.to_string().as_bytes()).unwrap();
        let slim = serde_json::to_value(&pod).unwrap();
        let spec = &slim["spec"];
        assert_eq!(slim["metadata"]["annotations"].as_object().unwrap().len(), 1);
        assert_eq!((spec["nodeName"].as_str(), spec["subdomain"].as_str()), (Some("n1"), Some("s")));
        assert_eq!(spec["containers"].as_array().map(Vec::len), Some(1));
        assert_eq!(spec["containers"][0]["ports"][0]["containerPort"], 80);
        assert_eq!(spec["initContainers"].as_array().unwrap().len(), 1);
        assert_eq!(slim["status"]["containerStatuses"][0]["restartCount"], 3);
        let beside = slim["status"]["initContainerStatuses"].as_array().unwrap();
        assert_eq!((beside.len(), beside[0]["restartCount"].as_i64()), (1, Some(2)), "of sidecars alone");
        assert!(!slim.to_string().contains("\"image\":\"i\""), "{slim}");
    }
}
