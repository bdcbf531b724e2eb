//! The shared informers: one watch of a kind in the process, started by the first controller that asks for it.
//!
//! An object is slimmed before it is kept: [`Watched::slim`] says what no controller reads. What is written back whole
//! (Deployments, ReplicaSets, Services' slices) must not be slimmed.
use component_base::informer::Informer;
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
            ConfigMap, Container, ContainerState, ContainerStateTerminated, ContainerStatus, Endpoints, Namespace,
            Node, PersistentVolume, PersistentVolumeClaim, Pod, ReplicationController, ResourceQuota, Secret, Service,
            ServiceAccount, Volume,
        },
        discovery::v1::EndpointSlice,
        networking::v1::{IPAddress, IPAddressSpec, ServiceCIDR},
        policy::v1::PodDisruptionBudget,
        rbac::v1::ClusterRole,
        resource::v1::{Device, ResourceClaim, ResourceClaimTemplate, ResourceSlice},
        storage::v1::{CSIDriver, StorageClass, VolumeAttachment, VolumeAttributesClass},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{Api, Client, Resource, api::PostParams, runtime::watcher};
use parking_lot::Mutex;
use serde::{
    Serialize,
    de::{DeserializeOwned, IgnoredAny},
};
use std::{
    any::{Any, TypeId},
    collections::HashMap,
    fmt::Debug,
};

/// A kind that informers watch.
pub trait Watched: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static {
    /// Takes away what no controller reads.
    fn slim(&mut self) {}

    /// Which objects are watched: all, unless a controller needs only a few.
    fn selection() -> watcher::Config {
        watcher::Config::default()
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
        let informer = Informer::start_lean(self.client.clone(), K::selection(), K::slim);
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
    let request = all.replace_subresource("status", name, &PostParams::default(), body);
    client.request::<IgnoredAny>(request.map_err(kube::Error::BuildRequest)?).await.map(|_| ())
}

// === what is kept of each kind ===

impl Watched for Pod {
    /// Keeps identity, owners, placement, ports, tolerations and the parts of the status that say how the pod fares.
    fn slim(&mut self) {
        const ANNOTATIONS_READ: [&str; 3] = [
            "controller.kubernetes.io/pod-deletion-cost",
            "batch.kubernetes.io/job-index-failure-count",
            "batch.kubernetes.io/job-index-ignored-failure-count",
        ];
        keep_annotations(&mut self.metadata, &ANNOTATIONS_READ);
        if let Some(spec) = &mut self.spec {
            // A daemon that is not placed yet is known by the node that it may be placed on.
            let unplaced = spec.node_name.as_deref().unwrap_or("").is_empty();
            let mut owners = self.metadata.owner_references.iter().flatten();
            let daemon = unplaced && owners.any(|o| o.kind == "DaemonSet");
            let mut kept = k8s_openapi::api::core::v1::PodSpec {
                affinity: spec.affinity.take().filter(|_| daemon),
                node_name: spec.node_name.take(),
                hostname: spec.hostname.take(),
                subdomain: spec.subdomain.take(),
                tolerations: spec.tolerations.take(),
                termination_grace_period_seconds: spec.termination_grace_period_seconds,
                resource_claims: spec.resource_claims.take(),
                ..Default::default()
            };
            let claims = |v: &Volume| v.persistent_volume_claim.is_some() || v.ephemeral.is_some();
            kept.volumes = spec.volumes.take().map(|mut volumes| {
                volumes.retain(claims);
                volumes
            });
            kept.volumes.take_if(|volumes| volumes.is_empty());
            // Of containers nothing but their ports is read.
            let has_ports = |c: &&mut Container| c.ports.as_ref().is_some_and(|ports| !ports.is_empty());
            kept.containers = spec.containers.iter_mut().filter(has_ports).map(ports_of).collect();
            let sidecars = spec.init_containers.iter_mut().flatten().filter(|c| c.restart_policy.is_some());
            let sidecars: Vec<_> = sidecars.filter(has_ports).map(ports_of).collect();
            kept.init_containers = (!sidecars.is_empty()).then_some(sidecars);
            *spec = kept;
        }
        if let Some(status) = &mut self.status {
            for condition in status.conditions.iter_mut().flatten() {
                condition.message = None;
                condition.last_probe_time = None;
            }
            // How containers ended is what failure policies and back-off read.
            let slim = |status: &mut ContainerStatus| {
                let ended = status.state.take().and_then(|s| s.terminated);
                let ended = ended.map(|t| ContainerStateTerminated {
                    exit_code: t.exit_code,
                    finished_at: t.finished_at,
                    ..Default::default()
                });
                *status = ContainerStatus {
                    name: std::mem::take(&mut status.name),
                    restart_count: status.restart_count,
                    state: ended.map(|t| ContainerState { terminated: Some(t), ..Default::default() }),
                    ..Default::default()
                };
            };
            status.container_statuses.iter_mut().flatten().for_each(slim);
            let of_job = self.metadata.owner_references.iter().flatten().any(|o| o.kind == "Job");
            if let Some(statuses) = status.container_statuses.as_mut().filter(|_| !of_job) {
                statuses.retain(|s| s.restart_count > 0 || s.state.is_some());
                statuses.shrink_to_fit();
            }
            status.container_statuses.take_if(|statuses| statuses.is_empty());
            status.init_container_statuses = status.init_container_statuses.take().filter(|_| of_job);
            status.init_container_statuses.iter_mut().flatten().for_each(slim);
            status.ephemeral_container_statuses = None;
            status.message = None;
            status.resources = None;
            status.allocated_resources = None;
        }
    }
}

fn keep_annotations(meta: &mut ObjectMeta, read: &[&str]) {
    if let Some(annotations) = &mut meta.annotations {
        annotations.retain(|key, _| read.contains(&key.as_str()));
    }
    meta.annotations.take_if(|annotations| annotations.is_empty());
}

fn ports_of(container: &mut Container) -> Container {
    Container {
        name: std::mem::take(&mut container.name),
        ports: container.ports.take(),
        restart_policy: container.restart_policy.take(),
        ..Container::default()
    }
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
    fn selection() -> watcher::Config {
        watcher::Config::default().fields("metadata.name=kube-root-ca.crt")
    }
}

impl Watched for Secret {
    fn selection() -> watcher::Config {
        watcher::Config::default().fields("type=bootstrap.kubernetes.io/token")
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

impl Watched for Deployment {}
impl Watched for DaemonSet {}
impl Watched for Job {}
impl Watched for CronJob {}
impl Watched for HorizontalPodAutoscaler {}
impl Watched for PodDisruptionBudget {}
impl Watched for StatefulSet {}
impl Watched for PersistentVolumeClaim {}
impl Watched for ControllerRevision {}
impl Watched for ReplicaSet {}
impl Watched for ReplicationController {}
impl Watched for ResourceQuota {}
impl Watched for Service {}
impl Watched for Endpoints {}
impl Watched for EndpointSlice {}
impl Watched for Namespace {}
impl Watched for Lease {}
impl Watched for CertificateSigningRequest {}
impl Watched for ClusterRole {}
impl Watched for ValidatingAdmissionPolicy {}
impl Watched for PersistentVolume {}
impl Watched for StorageClass {}
impl Watched for CSIDriver {}
impl Watched for VolumeAttachment {}
impl Watched for VolumeAttributesClass {}
impl Watched for ResourceClaim {}
impl Watched for ResourceClaimTemplate {}
impl Watched for ServiceCIDR {}

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
        let mut pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "annotations": {
                "controller.kubernetes.io/pod-deletion-cost": "5", "kubectl.kubernetes.io/last-applied": "x"}},
            "spec": {"nodeName": "n1", "subdomain": "s",
                "initContainers": [{"name": "once"}, {"name": "side", "restartPolicy": "Always", "image": "i",
                    "ports": [{"containerPort": 81}]}],
                "containers": [{"name": "dull", "image": "i"}, {"name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 80}]}]},
            "status": {"podIP": "10.0.0.1", "phase": "Running",
                "containerStatuses": [
                    {"name": "dull", "restartCount": 0, "image": "i", "imageID": "", "ready": true}, {"name": "c", "restartCount": 3, "image": "i", "imageID": "", "ready": true}]}
        }))
        .unwrap();
        pod.slim();
        let slim = serde_json::to_value(&pod).unwrap();
        let spec = &slim["spec"];
        assert_eq!(slim["metadata"]["annotations"].as_object().unwrap().len(), 1);
        assert_eq!((spec["nodeName"].as_str(), spec["subdomain"].as_str()), (Some("n1"), Some("s")));
        assert_eq!(spec["containers"].as_array().map(Vec::len), Some(1));
        assert_eq!(spec["containers"][0]["ports"][0]["containerPort"], 80);
        assert_eq!(spec["initContainers"].as_array().unwrap().len(), 1);
        assert_eq!(slim["status"]["containerStatuses"][0]["restartCount"], 3);
        assert!(!slim.to_string().contains("\"image\":\"i\""), "{slim}");
    }
}
