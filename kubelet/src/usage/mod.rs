//! What pods, their containers and volumes use: counted by the kernel (cgroups, file systems, network interfaces) and, for what
//! containers wrote, by the runtime. Shared by eviction and by the server's statistics.

pub mod cgroup;
pub mod claims;
pub mod disk;
pub mod network;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use proto::cri as pb;

use crate::runtime::cri::CriError;
use crate::runtime::pods::uid_of;
use crate::runtime::{Runtime, labels, logs};
pub use cgroup::Usage;
pub use disk::DiskUsage;

/// What one container uses.
#[derive(Debug, Clone, Default)]
pub struct ContainerUsage {
    pub id: String,
    pub name: String,
    /// When it was made, and when it was counted: nanoseconds since 1970.
    pub created_at: i64,
    pub time: i64,
    pub usage: Usage,
    /// The runtime's own rate, where it has one: nanoseconds of CPU a second.
    pub cpu_rate: Option<u64>,
    pub root: DiskUsage,
    pub logs: DiskUsage,
}

/// What one pod uses.
#[derive(Debug, Clone, Default)]
pub struct PodUsage {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub started_at: i64,
    pub time: i64,
    pub usage: Usage,
    pub containers: Vec<ContainerUsage>,
    /// emptyDirs on disk, by name.
    pub empty_dirs: BTreeMap<String, DiskUsage>,
    /// The process ID of the sandbox: the one through which its network is seen.
    pub sandbox_pid: Option<u32>,
}

impl PodUsage {
    /// Local storage of the pod: what its containers wrote and logged, and its emptyDirs.
    pub fn ephemeral_storage(&self) -> DiskUsage {
        self.written().plus(self.logs_and_empty_dirs())
    }

    /// What its containers wrote into their own file systems.
    pub fn written(&self) -> DiskUsage {
        self.containers.iter().map(|c| c.root).fold(DiskUsage::default(), DiskUsage::plus)
    }

    /// The part of its local storage that is never where images are.
    pub fn logs_and_empty_dirs(&self) -> DiskUsage {
        let logs = self.containers.iter().map(|c| c.logs);
        logs.chain(self.empty_dirs.values().copied()).fold(DiskUsage::default(), DiskUsage::plus)
    }
}

fn value(v: Option<&pb::UInt64Value>) -> u64 {
    v.map_or(0, |v| v.value)
}

/// Looks at what the pods use now. Disks are walked only where `with_disk` says so.
pub async fn pods(
    runtime: &Arc<Runtime>,
    pods: &[Arc<Pod>],
    with_disk: impl Fn(&Pod) -> bool,
) -> Result<Vec<PodUsage>, CriError> {
    let running = runtime.cri.list_containers_with(BTreeMap::new()).await?;
    let created: HashMap<String, (i64, String)> =
        running.into_iter().map(|c| (c.id, (c.created_at, c.pod_sandbox_id))).collect();
    let mut by_pod: HashMap<String, Vec<(ContainerUsage, String)>> = HashMap::new();
    for stats in runtime.cri.list_container_stats().await? {
        let Some((uid, usage)) = container(stats) else { continue };
        let Some((created_at, sandbox)) = created.get(&usage.id) else { continue };
        by_pod.entry(uid).or_default().push((ContainerUsage { created_at: *created_at, ..usage }, sandbox.clone()));
    }
    let mut found = Vec::with_capacity(pods.len());
    for pod in pods {
        let containers = by_pod.remove(uid_of(pod)).unwrap_or_default();
        let disk = with_disk(pod);
        let (runtime, pod) = (runtime.clone(), pod.clone());
        // Reading the kernel's files is not waiting for it, but walking a disk is.
        let looked = tokio::task::spawn_blocking(move || one(&runtime, &pod, containers, disk)).await;
        found.extend(looked.ok());
    }
    Ok(found)
}

/// A container's usage as the runtime tells it, with the UID of its pod.
fn container(stats: pb::ContainerStats) -> Option<(String, ContainerUsage)> {
    let attributes = stats.attributes?;
    let label = |name: &str| attributes.labels.get(name).cloned().unwrap_or_default();
    let (cpu, memory) = (stats.cpu.unwrap_or_default(), stats.memory.unwrap_or_default());
    let swap = stats.swap.unwrap_or_default();
    let usage = Usage {
        cpu_nanos: value(cpu.usage_core_nano_seconds.as_ref()),
        memory: value(memory.usage_bytes.as_ref()),
        working_set: value(memory.working_set_bytes.as_ref()),
        rss: value(memory.rss_bytes.as_ref()),
        page_faults: value(memory.page_faults.as_ref()),
        major_page_faults: value(memory.major_page_faults.as_ref()),
        swap: value(swap.swap_usage_bytes.as_ref()),
        ..Default::default()
    };
    let layer = stats.writable_layer.unwrap_or_default();
    let root = DiskUsage { bytes: value(layer.used_bytes.as_ref()), inodes: value(layer.inodes_used.as_ref()) };
    let out = ContainerUsage {
        name: label(labels::CONTAINER_NAME),
        time: cpu.timestamp,
        usage,
        cpu_rate: cpu.usage_nano_cores.map(|rate| rate.value),
        root,
        id: attributes.id.clone(),
        ..Default::default()
    };
    Some((label(labels::POD_UID), out))
}

fn one(runtime: &Runtime, pod: &Pod, containers: Vec<(ContainerUsage, String)>, with_disk: bool) -> PodUsage {
    let cgroups = &runtime.cgroups;
    let sandbox = containers.first().map(|(_, sandbox)| sandbox.clone());
    let logs_dir = logs::pod_dir(&runtime.node.pod_logs_dir, pod);
    let containers: Vec<ContainerUsage> = containers
        .into_iter()
        .map(|(mut c, _)| {
            if let Some(usage) = cgroups.container_usage(pod, &c.id) {
                // The kernel's count is newer, and has what CRI leaves out.
                let memory_was_told = usage.memory == 0;
                c.usage = if memory_was_told { Usage { pids: usage.pids, ..c.usage } } else { usage };
                c.time = now_nanos();
            }
            if with_disk {
                c.logs = disk::walk(&logs_dir.join(&c.name));
            }
            c
        })
        .collect();
    let mut out = PodUsage {
        namespace: pod.metadata.namespace.clone().unwrap_or_else(|| "default".to_owned()),
        name: pod.metadata.name.clone().unwrap_or_default(),
        uid: uid_of(pod).to_owned(),
        started_at: containers.iter().map(|c| c.created_at).min().unwrap_or(0),
        time: now_nanos(),
        usage: cgroups.pod_usage(pod).unwrap_or_default(),
        sandbox_pid: sandbox.and_then(|id| cgroups.first_process(pod, &id)),
        containers,
        ..Default::default()
    };
    if out.usage.cpu_nanos == 0 && out.usage.memory == 0 {
        // There is no cgroup of the pod's own.
        out.usage = out.containers.iter().fold(Usage::default(), |sum, c| sum.plus(&c.usage));
    }
    if with_disk {
        let dir = runtime.node.pod_dir(uid_of(pod)).join("volumes/kubernetes.io~empty-dir");
        let on_disk = |v: &&k8s_openapi::api::core::v1::Volume| {
            v.empty_dir.as_ref().is_some_and(|e| e.medium.as_deref().unwrap_or_default().is_empty())
        };
        let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()).filter(on_disk);
        out.empty_dirs = volumes.map(|v| (v.name.clone(), disk::walk(&dir.join(&v.name)))).collect();
    }
    out
}

pub(crate) fn now_nanos() -> i64 {
    i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

/// How full a volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    pub free: DiskUsage,
    pub all: DiskUsage,
    pub used: DiskUsage,
    /// Whether something is wrong with it. None: nobody says.
    pub abnormal: Option<bool>,
}

impl Measured {
    /// As its file system has it.
    pub fn at(path: &Path) -> Option<Self> {
        let (free, all) = file_system(path)?;
        let used =
            DiskUsage { bytes: all.bytes.saturating_sub(free.bytes), inodes: all.inodes.saturating_sub(free.inodes) };
        Some(Self { free, all, used, abnormal: None })
    }
}

/// What is free of a file system, and how much there is: bytes and inodes. Blocks that are reserved (for root, by a quota) are
/// nobody's to fill.
pub fn file_system(path: &Path) -> Option<(DiskUsage, DiskUsage)> {
    let stat = nix::sys::statvfs::statvfs(path).ok()?;
    let usable = stat.blocks().saturating_sub(stat.blocks_free()) + stat.blocks_available();
    let free = DiskUsage {
        bytes: stat.blocks_available().saturating_mul(stat.fragment_size()),
        inodes: stat.files_available(),
    };
    Some((free, DiskUsage { bytes: usable.saturating_mul(stat.fragment_size()), inodes: stat.files() }))
}
