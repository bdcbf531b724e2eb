//! What decisions read of a pod: a few hundred bytes instead of the whole object.
//!
//! [`PodFacts`] is taken once, when a pod is first seen; the filters, the scores and the cache read nothing else of the
//! pods that already have a node. A pod that waits for one keeps its object beside the facts ([`PendingPod`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::meta::NamespacedName;
use apimachinery::quantity::Quantity;
use apimachinery::volume::claim_of;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Volume};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::affinity::PodAffinity;

/// Labels, shared by all pods of the same template.
pub type Labels = Arc<BTreeMap<String, String>>;

/// What a container without a CPU request is taken to use when nodes are scored, as `DefaultMilliCPURequest`.
pub const DEFAULT_CPU_MILLI: i64 = 100;
/// What a container without a memory request is taken to use when nodes are scored, as `DefaultMemoryRequest`.
pub const DEFAULT_MEMORY_BYTES: i64 = 200 * 1024 * 1024;

/// The name under which pods that name no scheduler are known.
pub const DEFAULT_SCHEDULER_NAME: &str = "default-scheduler";

/// What a pod asks of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    pub cpu_milli: i64,
    pub memory: i64,
    pub ephemeral_storage: i64,
    /// CPU and memory with a default for each container that requests none: for scores only.
    pub nonzero_cpu_milli: i64,
    pub nonzero_memory: i64,
    /// Extended resources, huge pages and attachable volumes, by name; sorted.
    pub extended: Box<[(Arc<str>, i64)]>,
}

/// A port that a container takes on its host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    pub ip: Box<str>,
    pub protocol: Box<str>,
    pub port: i32,
}

impl HostPort {
    /// Whether both cannot be held on one node: the wildcard address conflicts with every other. As `HostPortInfo.CheckConflict`.
    pub fn conflicts(&self, other: &HostPort) -> bool {
        const ANY: &str = "0.0.0.0";
        self.port == other.port
            && self.protocol == other.protocol
            && (&*self.ip == ANY || &*other.ip == ANY || self.ip == other.ip)
    }
}

/// A disk of a kind that Kubernetes mounts without a driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    pub id: Box<str>,
    pub read_only: bool,
}

impl Disk {
    /// Whether both cannot be on one node.
    pub fn conflicts(&self, other: &Disk) -> bool {
        self.id == other.id && !(self.read_only && other.read_only)
    }
}

/// What decisions read of any pod, with or without a node.
#[derive(Clone, Debug, PartialEq)]
pub struct PodFacts {
    pub uid: Arc<str>,
    pub key: NamespacedName,
    pub labels: Labels,
    pub requests: Requests,
    pub host_ports: Box<[HostPort]>,
    pub priority: i32,
    pub terminating: bool,
    /// `metadata.generation`: conditions say which one they are about.
    pub generation: i64,
    /// When it was started, in µs since the epoch; the end of time if it was not.
    pub started_us: i64,
    /// Whether it is being deleted to make room for another pod.
    pub preempted: bool,
    /// The PersistentVolumeClaims that it mounts, as `namespace/name`.
    pub claims: Box<[Arc<str>]>,
    /// The in-tree disks that it mounts by themselves.
    pub disks: Box<[Disk]>,
    /// Which pods it wants near or far; few pods say.
    pub affinity: Option<Arc<PodAffinity>>,
}

impl PodFacts {
    /// Reads the facts off `pod`.
    pub fn of(pod: &Pod) -> PodFacts {
        let meta = &pod.metadata;
        let (spec, status) = (pod.spec.as_ref(), pod.status.as_ref());
        PodFacts {
            uid: meta.uid.as_deref().unwrap_or_default().into(),
            key: NamespacedName {
                namespace: meta.namespace.clone().unwrap_or_default(),
                name: meta.name.clone().unwrap_or_default(),
            },
            labels: Arc::new(meta.labels.clone().unwrap_or_default()),
            requests: spec.map(|spec| requests_of(pod, spec)).unwrap_or_default(),
            host_ports: spec.map(host_ports_of).unwrap_or_default(),
            priority: spec.and_then(|spec| spec.priority).unwrap_or(0),
            terminating: meta.deletion_timestamp.is_some(),
            generation: meta.generation.unwrap_or(0),
            started_us: status
                .and_then(|status| status.start_time.as_ref())
                .map_or(i64::MAX, |at| at.0.as_microsecond()),
            preempted: meta.deletion_timestamp.is_some()
                && apimachinery::pod::condition(pod, "DisruptionTarget").is_some_and(|condition| {
                    condition.status == "True" && condition.reason.as_deref() == Some("PreemptionByScheduler")
                }),
            claims: spec.map(|spec| claims_of(meta, spec)).unwrap_or_default(),
            disks: spec.map(disks_of).unwrap_or_default(),
            affinity: PodAffinity::of(pod).map(Arc::new),
        }
    }
}

/// A pod that waits for a node.
#[derive(Clone, Debug)]
pub struct PendingPod {
    pub pod: Arc<Pod>,
    pub facts: PodFacts,
}

impl PendingPod {
    pub fn new(pod: Arc<Pod>) -> PendingPod {
        PendingPod { facts: PodFacts::of(&pod), pod }
    }

    pub fn spec(&self) -> Option<&PodSpec> {
        self.pod.spec.as_ref()
    }

    /// The profile that is to place the pod.
    pub fn scheduler_name(&self) -> &str {
        self.spec()
            .and_then(|spec| spec.scheduler_name.as_deref())
            .filter(|name| !name.is_empty())
            .unwrap_or(DEFAULT_SCHEDULER_NAME)
    }
}

/// As `PodRequests`, in the integers that the columns hold: of a pod that is being resized the more of what it has and wants.
fn requests_of(pod: &Pod, spec: &PodSpec) -> Requests {
    let total = apimachinery::pod::requests_in_force(pod);
    let mut requests = Requests::default();
    let mut extended = Vec::new();
    for (name, quantity) in &total {
        match name.as_str() {
            "cpu" => requests.cpu_milli = quantity.milli_value(),
            "memory" => requests.memory = quantity.value(),
            "ephemeral-storage" => requests.ephemeral_storage = quantity.value(),
            _ => extended.push((Arc::from(name.as_str()), quantity.value())),
        }
    }
    requests.extended = extended.into();
    let (cpu, memory) = nonzero_requests(spec, &total);
    (requests.nonzero_cpu_milli, requests.nonzero_memory) = (cpu.max(requests.cpu_milli), memory.max(requests.memory));
    requests
}

/// CPU and memory with the defaults in place of what containers leave out. As `NonMissingContainerRequests`.
fn nonzero_requests(spec: &PodSpec, total: &BTreeMap<String, Quantity>) -> (i64, i64) {
    let requests_both = |container: &Container| {
        let requests = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
        requests.is_some_and(|requests| requests.contains_key("cpu") && requests.contains_key("memory"))
    };
    let pod_level = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref());
    let complete = spec.containers.iter().chain(spec.init_containers.iter().flatten()).all(requests_both);
    let amounts = |total: &BTreeMap<String, Quantity>| {
        (total.get("cpu").map_or(0, Quantity::milli_value), total.get("memory").map_or(0, Quantity::value))
    };
    if complete || pod_level.is_some_and(|level| level.contains_key("cpu") && level.contains_key("memory")) {
        return amounts(total);
    }
    let filled = |container: &Container| {
        let mut resources = container.resources.clone().unwrap_or_default();
        let requests = resources.requests.get_or_insert_default();
        requests.entry("cpu".into()).or_insert_with(|| ApiQuantity(format!("{DEFAULT_CPU_MILLI}m")));
        requests.entry("memory".into()).or_insert_with(|| ApiQuantity(DEFAULT_MEMORY_BYTES.to_string()));
        Container {
            name: container.name.clone(),
            resources: Some(resources),
            restart_policy: container.restart_policy.clone(),
            ..Container::default()
        }
    };
    amounts(&apimachinery::pod::requests(&PodSpec {
        containers: spec.containers.iter().map(filled).collect(),
        init_containers: spec.init_containers.as_ref().map(|init| init.iter().map(filled).collect()),
        overhead: spec.overhead.clone(),
        resources: spec.resources.clone(),
        ..PodSpec::default()
    }))
}

fn claims_of(meta: &ObjectMeta, spec: &PodSpec) -> Box<[Arc<str>]> {
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    let own = meta.name.as_deref().unwrap_or_default();
    let names = spec.volumes.iter().flatten().filter_map(|volume| claim_of(own, volume));
    names.map(|(name, _)| Arc::from(format!("{namespace}/{name}"))).collect()
}

/// As `isVolumeConflict`.
fn disks_of(spec: &PodSpec) -> Box<[Disk]> {
    let disk = |volume: &Volume| {
        let (id, read_only) = if let Some(disk) = &volume.gce_persistent_disk {
            (format!("gce/{}", disk.pd_name), disk.read_only)
        } else if let Some(disk) = &volume.aws_elastic_block_store {
            (format!("aws/{}", disk.volume_id), Some(false))
        } else if let Some(disk) = &volume.iscsi {
            (format!("iscsi/{}", disk.iqn), disk.read_only)
        } else if let Some(disk) = &volume.rbd {
            (format!("rbd/{}/{}", disk.pool.as_deref().unwrap_or("rbd"), disk.image), disk.read_only)
        } else {
            return None;
        };
        Some(Disk { id: id.into(), read_only: read_only.unwrap_or(false) })
    };
    spec.volumes.iter().flatten().filter_map(disk).collect()
}

/// The host ports of the containers that run together: the containers and the sidecars. As `GetHostPorts`.
fn host_ports_of(spec: &PodSpec) -> Box<[HostPort]> {
    let sidecars =
        spec.init_containers.iter().flatten().filter(|init| init.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            Some(HostPort {
                port: port.host_port.filter(|port| *port > 0)?,
                ip: port.host_ip.as_deref().filter(|ip| !ip.is_empty()).unwrap_or("0.0.0.0").into(),
                protocol: port.protocol.as_deref().filter(|name| !name.is_empty()).unwrap_or("TCP").into(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod;

    #[test]
    fn requests_are_summed_and_defaulted_for_scores() {
        let facts = PodFacts::of(&pod("p").requests(&[("cpu", "1500m"), ("example.com/gpu", "2")]).build());
        assert_eq!(facts.requests.cpu_milli, 1500);
        assert_eq!(facts.requests.memory, 0);
        assert_eq!(facts.requests.nonzero_cpu_milli, 1500);
        assert_eq!(facts.requests.nonzero_memory, DEFAULT_MEMORY_BYTES);
        assert_eq!(&*facts.requests.extended, &[("example.com/gpu".into(), 2)]);
    }

    #[test]
    fn a_pod_that_is_resized_holds_the_more_of_what_it_has_and_wants() {
        for (spec, has, infeasible, expected) in
            [("1", "1", false, 1000), ("1", "2", false, 2000), ("2", "1", false, 2000), ("2", "1", true, 1000)]
        {
            let mut pod = pod("p").requests(&[("cpu", spec)]).build();
            let name = &pod.spec.as_ref().expect("a spec").containers[0].name;
            let mut status = serde_json::json!({"containerStatuses": [{"name": name, "image": "i", "imageID": "i",
                "ready": true, "restartCount": 0, "allocatedResources": {"cpu": has}, "resources": {"requests": {"cpu": has}}}]});
            if infeasible {
                let pending =
                    serde_json::json!([{"type": "PodResizePending", "status": "True", "reason": "Infeasible"}]);
                status["conditions"] = pending;
            }
            pod.status = serde_json::from_value(status).ok();
            assert_eq!(PodFacts::of(&pod).requests.cpu_milli, expected, "{spec} {has} {infeasible}");
        }
    }

    #[test]
    fn host_ports_conflict_by_protocol_port_and_address() {
        let port = |ip: &str, protocol: &str, port| HostPort { ip: ip.into(), protocol: protocol.into(), port };
        let cases = [
            (port("0.0.0.0", "TCP", 80), port("127.0.0.1", "TCP", 80), true),
            (port("127.0.0.1", "TCP", 80), port("127.0.0.1", "TCP", 80), true),
            (port("127.0.0.1", "TCP", 80), port("127.0.0.2", "TCP", 80), false),
            (port("0.0.0.0", "TCP", 80), port("0.0.0.0", "UDP", 80), false),
            (port("0.0.0.0", "TCP", 80), port("0.0.0.0", "TCP", 81), false),
        ];
        for (one, other, expected) in cases {
            assert_eq!(one.conflicts(&other), expected, "{one:?} {other:?}");
            assert_eq!(other.conflicts(&one), expected, "{other:?} {one:?}");
        }
    }
}
