//! Parts of the node that containers have for themselves: whole processors, memory of a node, devices; and keeping them together
//! on the machine's nodes (NUMA). As the CPU, memory, device and topology managers in one: they decide together when a pod is
//! admitted, what they gave is kept in one file, and goes back when the pod has ended.

mod devices;
mod held;
mod pinned;
mod server;
#[cfg(test)]
mod tests;
pub mod topology;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceHealth, ResourceStatus};
use parking_lot::Mutex;
use prost::Message as _;
use proto::cri;
use proto::deviceplugin as pb;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::config::KubeletConfiguration;
use crate::dra::Dra;
use crate::metrics::managers;
use crate::runtime::pods::uid_of;
use crate::status::Ended;
use devices::Devices;
use held::{All, Held, HeldDevices, Left};
use topology::{CpuOptions, Hint, Mask, Options, Policy, Topology};

/// How the node gives away what containers have for themselves.
#[derive(Debug, Clone, Default)]
pub struct Policies {
    /// `cpuManagerPolicy: static`, with the processors that are never given.
    pub static_cpus: Option<BTreeSet<u32>>,
    pub cpus: CpuOptions,
    /// `memoryManagerPolicy: Static`, with the bytes kept back by node and kind.
    pub static_memory: Option<BTreeMap<u32, BTreeMap<String, u64>>>,
    pub topology: Policy,
    pub options: Options,
    /// `topologyManagerScope: pod`.
    pub by_pod: bool,
}

impl Policies {
    /// As configured, for a machine.
    pub fn of(config: &KubeletConfiguration, topology: &Topology) -> Policies {
        let amount = |text: &String| Quantity::parse(text).map_or(0, |q| u64::try_from(q.value()).unwrap_or(0));
        let kept = topology::parse_set(&config.reserved_system_cpus).unwrap_or_default();
        let reserved = || {
            let milli = [&config.system_reserved, &config.kube_reserved].into_iter().filter_map(|r| r.get("cpu"));
            let milli: i64 = milli.filter_map(|t| Quantity::parse(t).ok()).map(|q| q.milli_value()).sum();
            let count = usize::try_from(milli.max(1).unsigned_abs().div_ceil(1000)).unwrap_or(1);
            topology.take_cpus(&topology.all_cpus(), count, None, false).unwrap_or_default()
        };
        let is_static = config.cpu_manager_policy == "static";
        let by_node = config
            .reserved_memory
            .iter()
            .map(|(node, kinds)| (*node, kinds.iter().map(|(kind, text)| (kind.clone(), amount(text))).collect()));
        Policies {
            static_cpus: is_static.then(|| if kept.is_empty() { reserved() } else { kept }),
            cpus: CpuOptions::of(&config.cpu_manager_policy_options).unwrap_or_default(),
            static_memory: (config.memory_manager_policy == "Static").then(|| by_node.collect()),
            topology: Policy::parse(&config.topology_manager_policy).unwrap_or_default(),
            options: Options::of(&config.topology_manager_policy_options).unwrap_or_default(),
            by_pod: config.topology_manager_scope == "pod",
        }
    }

    /// Whether they can be kept on this machine.
    pub fn check(&self, topology: &Topology) -> anyhow::Result<()> {
        let (nodes, most) = (topology.nodes().len(), self.options.most_nodes);
        anyhow::ensure!(
            self.topology == Policy::None || nodes <= most,
            "unsupported on machines with more than {most} NUMA Nodes (this one has {nodes}): set the Topology Manager Policy \
             option max-allowable-numa-nodes, or topologyManagerPolicy: none"
        );
        Ok(())
    }
}

/// What a container is made with, of its own parts of the node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Given {
    pub cpuset_cpus: String,
    pub cpuset_mems: String,
    pub envs: Vec<(String, String)>,
    pub mounts: Vec<cri::Mount>,
    pub devices: Vec<cri::Device>,
    pub annotations: BTreeMap<String, String>,
    pub cdi_devices: Vec<cri::CdiDevice>,
}

/// Gives parts of the node to containers, and takes them back.
pub struct Allocator {
    topology: Topology,
    policies: Policies,
    devices: Arc<Devices>,
    held: Mutex<All>,
    file: PathBuf,
    root_dir: PathBuf,
    /// One pod at a time is admitted.
    admitting: tokio::sync::Mutex<()>,
    /// Devices came or went, or something else that the node's status tells of: each who follows sees it, however long it looks away.
    pub changed: watch::Sender<()>,
}

/// A refusal whose cause has no name of its own. As `unexpectedAdmissionError`.
fn unexpected(why: impl std::fmt::Display) -> Ended {
    Ended::new("UnexpectedAdmissionError", format!("Allocate failed due to {why}, which is unexpected"))
}

// === impl Allocator ===

impl Allocator {
    pub fn new(topology: Topology, policies: Policies, root_dir: PathBuf) -> Arc<Allocator> {
        let file = root_dir.join("allocations.json");
        let changed = watch::Sender::new(());
        let saved = std::fs::read(&file).ok().and_then(|text| match serde_json::from_slice(&text) {
            Ok(held) => Some(held),
            Err(error) => {
                warn!(file = %file.display(), %error, "what containers hold cannot be read; nothing is held");
                None
            }
        });
        let allocator = Arc::new(Allocator {
            devices: Devices::new(root_dir.join("device-plugins"), changed.clone()),
            topology,
            policies,
            held: Mutex::new(saved.unwrap_or_default()),
            file,
            root_dir,
            admitting: tokio::sync::Mutex::default(),
            changed,
        });
        allocator.count(&allocator.held.lock());
        allocator
    }

    /// Serves plugins and those who ask what pods hold, until shutdown.
    pub async fn serve(
        self: Arc<Self>,
        pods: impl Fn() -> Vec<Arc<Pod>> + Send + Sync + 'static,
        dra: Arc<Dra>,
        shutdown: CancellationToken,
    ) {
        let plugins = self.devices.clone().serve(shutdown.clone());
        let readers = server::serve((self.clone(), dra), pods, self.root_dir.join("pod-resources"), shutdown);
        let (plugins, readers) = tokio::join!(plugins, readers);
        for (what, result) in [("device plugins", plugins), ("pod resources", readers)] {
            if let Err(error) = result {
                warn!(what, %error, "not served");
            }
        }
    }

    /// Devices of the node: capacity and allocatable by resource.
    pub fn capacity(&self) -> BTreeMap<String, (Quantity, Quantity)> {
        let amounts = self.devices.capacity().into_iter();
        amounts.map(|(name, (all, good))| (name, (Quantity::from_value(all), Quantity::from_value(good)))).collect()
    }

    fn save(&self, held: &All) {
        self.count(held);
        let written = serde_json::to_vec(held).map_err(std::io::Error::other).and_then(|text| {
            let partial = self.file.with_extension("tmp");
            std::fs::write(&partial, text)?;
            std::fs::rename(partial, &self.file)
        });
        if let Err(error) = written {
            warn!(file = %self.file.display(), %error, "what containers hold is not saved");
        }
    }

    /// Whether a plugin gives this resource, or has given it: one that has not come back yet is waited for by nobody, but what is
    /// its is not taken for nothing. As `isDevicePluginResource`.
    fn is_of_plugin(&self, resource: &str) -> bool {
        self.devices.knows(resource) || !held::taken_devices(&self.held.lock(), resource).is_empty()
    }

    /// Whether anything of this pod is for this to give: most pods are none of its business.
    fn concerns(&self, pod: &Pod) -> bool {
        let policies = &self.policies;
        held::containers(pod).iter().any(|(c, _)| {
            !held::devices(pod, c, |name| self.is_of_plugin(name)).is_empty()
                || policies.static_cpus.is_some() && held::exclusive_cpus(pod, c) > 0
                || policies.static_memory.is_some() && !held::exclusive_memory(pod, c).is_empty()
        })
    }

    /// Gives a pod what it asks for, or says why not. What it holds already stays.
    pub async fn admit(&self, pod: &Pod) -> Result<(), Ended> {
        if !self.concerns(pod) || self.held.lock().contains_key(uid_of(pod)) {
            return Ok(());
        }
        let begun = Instant::now();
        managers().topology_requests.inc();
        let admitted = self.admit_in_turn(pod).await;
        if admitted.is_err() {
            managers().topology_errors.inc();
        }
        managers().topology_ms.observe(begun.elapsed().as_secs_f64() * 1000.0);
        admitted
    }

    async fn admit_in_turn(&self, pod: &Pod) -> Result<(), Ended> {
        let _one = self.admitting.lock().await;
        let mut own: BTreeMap<String, Held> = BTreeMap::new();
        let mut left = Left::default();
        let for_pod = if self.policies.by_pod { Some(self.near_pod(pod)?) } else { None };
        for (container, passes_on) in held::containers(pod) {
            let near = match for_pod {
                Some(near) => near,
                None => self.near(&self.wishes(pod, container), &left)?,
            };
            let held = self.allocate(pod, container, &own, &left, near).await?;
            if passes_on {
                left.add(&held)
            } else {
                left.remove(&held)
            }
            own.insert(container.name.clone(), held);
        }
        let mut all = self.held.lock();
        all.insert(uid_of(pod).to_owned(), own);
        self.save(&all);
        Ok(())
    }

    /// How much a container wants of each resource: `cpu`, kinds of memory, devices.
    fn wishes(&self, pod: &Pod, container: &Container) -> BTreeMap<String, u64> {
        let mut wishes = BTreeMap::new();
        let mut wish = |name: &str, count: u64| {
            if count > 0 {
                wishes.insert(name.to_owned(), count);
            }
        };
        if self.policies.static_cpus.is_some() {
            wish("cpu", held::exclusive_cpus(pod, container) as u64);
        }
        if self.policies.static_memory.is_some() {
            held::exclusive_memory(pod, container).iter().for_each(|(kind, bytes)| wish(kind, *bytes));
        }
        for (name, count) in held::devices(pod, container, |name| self.is_of_plugin(name)) {
            // Devices that are on no node can be used from any.
            if self.devices.list(&name).values().any(|d| !d.nodes.is_empty()) {
                wish(&name, count as u64);
            }
        }
        wishes
    }

    fn near_pod(&self, pod: &Pod) -> Result<Option<Mask>, Ended> {
        let mut most: BTreeMap<String, u64> = BTreeMap::new();
        let mut sum: BTreeMap<String, u64> = BTreeMap::new();
        for (container, passes_on) in held::containers(pod) {
            for (name, count) in self.wishes(pod, container) {
                let total = if passes_on { &mut most } else { &mut sum }.entry(name).or_default();
                *total = if passes_on { (*total).max(count) } else { *total + count };
            }
        }
        for (name, count) in most {
            let total = sum.entry(name).or_default();
            *total = (*total).max(count);
        }
        self.near(&sum, &Left::default())
    }

    /// On which nodes these wishes can be met together, as the policy has it.
    fn near(&self, wishes: &BTreeMap<String, u64>, left: &Left) -> Result<Option<Mask>, Ended> {
        let nodes = self.topology.nodes();
        let held = self.held.lock();
        let Options { closest, most_nodes: most } = self.policies.options;
        let hints: Vec<Vec<Hint>> = wishes
            .iter()
            .map(|(name, wanted)| match name.as_str() {
                "cpu" => {
                    let free = self.free_cpus(&held, left);
                    let on = |set: &BTreeSet<u32>, node| {
                        self.topology.cpus.iter().filter(|c| c.node == node && set.contains(&c.id)).count() as u64
                    };
                    let all = self.topology.all_cpus();
                    topology::hints(&nodes, most, *wanted, |n| on(&all, n), |n| on(&free, n))
                }
                kind if kind == "memory" || kind.starts_with("hugepages-") => {
                    let free = |node| self.free_memory(&held, left, node, kind);
                    topology::hints(&nodes, most, *wanted, |n| self.usable_memory(n, kind), free)
                }
                resource => {
                    let list = self.devices.list(resource);
                    let free = self.free_devices(&held, left, resource);
                    let on = |node: u32, free_only: bool| {
                        let here =
                            list.iter().filter(|(id, d)| d.nodes.contains(&node) && (!free_only || free.contains(*id)));
                        here.count() as u64
                    };
                    topology::hints(&nodes, most, *wanted, |n| on(n, false), |n| on(n, true))
                }
            })
            .collect();
        let (hint, admitted) = topology::merge(self.policies.topology, &nodes, &hints, |mask| {
            if closest { self.topology.distance(mask) } else { 0 }
        });
        if admitted {
            return Ok(hint.mask);
        }
        Err(Ended::new("TopologyAffinityError", "Resources cannot be allocated with Topology locality"))
    }

    fn free_cpus(&self, held: &All, left: &Left) -> BTreeSet<u32> {
        let kept = self.policies.static_cpus.clone().unwrap_or_default();
        let taken = held::taken_cpus(held);
        let mut free = self.topology.all_cpus();
        free.retain(|cpu| !kept.contains(cpu) && (!taken.contains(cpu) || left.cpus.contains(cpu)));
        free
    }

    fn usable_memory(&self, node: u32, kind: &str) -> u64 {
        let of = |map: Option<&BTreeMap<u32, BTreeMap<String, u64>>>| {
            map.and_then(|m| m.get(&node)?.get(kind).copied()).unwrap_or(0)
        };
        of(Some(&self.topology.memory)).saturating_sub(of(self.policies.static_memory.as_ref()))
    }

    fn free_memory(&self, held: &All, left: &Left, node: u32, kind: &str) -> u64 {
        let reusable = left.memory.get(&node).and_then(|m| m.get(kind)).copied().unwrap_or(0);
        (self.usable_memory(node, kind) + reusable).saturating_sub(held::taken_memory(held, node, kind))
    }

    fn free_devices(&self, held: &All, left: &Left, resource: &str) -> BTreeSet<String> {
        let taken = held::taken_devices(held, resource);
        let reusable = left.devices.get(resource);
        let free = |id: &String| !taken.contains(id.as_str()) || reusable.is_some_and(|ids| ids.contains(id));
        self.devices.list(resource).into_iter().filter(|(id, d)| d.healthy && free(id)).map(|(id, _)| id).collect()
    }

    async fn allocate(
        &self,
        pod: &Pod,
        container: &Container,
        own: &BTreeMap<String, Held>,
        left: &Left,
        near: Option<Mask>,
    ) -> Result<Held, Ended> {
        // With what this pod's containers were given a moment ago.
        let held: All = {
            let mut all = self.held.lock().clone();
            all.insert(uid_of(pod).to_owned(), own.clone());
            all
        };
        let cpus = self.allocate_cpus(pod, container, &held, left, near).inspect_err(|_| {
            managers().cpu_errors.inc();
        })?;
        let memory = self.allocate_memory(pod, container, &held, left, near).inspect_err(|_| {
            managers().memory_errors.inc();
        })?;
        let mut out = Held { cpus, memory, ..Default::default() };
        for (resource, count) in held::devices(pod, container, |name| self.is_of_plugin(name)) {
            let ids = self.pick_devices(&resource, count, &held, left, near).await.map_err(unexpected)?;
            let answer = self.devices.allocate(&resource, &ids).await.map_err(unexpected)?;
            out.devices.insert(resource, HeldDevices { ids, answer: answer.encode_to_vec() });
        }
        Ok(out)
    }

    /// Devices that the pod has already, those near, those that the plugin prefers, any.
    async fn pick_devices(
        &self,
        resource: &str,
        count: usize,
        held: &All,
        left: &Left,
        near: Option<Mask>,
    ) -> Result<BTreeSet<String>, String> {
        if !self.devices.list(resource).values().any(|device| device.healthy) {
            return Err(format!("no healthy devices present; cannot allocate unhealthy devices {resource}"));
        }
        let free = self.free_devices(held, left, resource);
        if free.len() < count {
            return Err(format!(
                "requested number of devices unavailable for {resource}. Requested: {count}, Available: {}",
                free.len()
            ));
        }
        let must: BTreeSet<String> = left
            .devices
            .get(resource)
            .into_iter()
            .flatten()
            .filter(|id| free.contains(*id))
            .take(count)
            .cloned()
            .collect();
        let list = self.devices.list(resource);
        let is_near = |id: &String| {
            let nodes = list.get(id).map(|d| &d.nodes);
            near.is_none_or(|mask| nodes.is_some_and(|nodes| nodes.iter().any(|n| topology::has(mask, *n))))
        };
        let close: BTreeSet<String> = free.iter().filter(|id| is_near(id) || must.contains(*id)).cloned().collect();
        let from = if close.len() >= count { &close } else { &free };
        let mut chosen = must.clone();
        if let Some(preferred) = self.devices.preferred(resource, from, &must, count).await {
            chosen.extend(preferred);
        }
        chosen.extend(close.into_iter().filter(|id| !must.contains(id)));
        let mut picked: Vec<String> = must.into_iter().collect();
        let mut rest = chosen.into_iter().chain(free).filter(|id| !picked.contains(id)).collect::<Vec<_>>();
        rest.dedup();
        rest.truncate(count - picked.len());
        picked.extend(rest);
        Ok(picked.into_iter().collect())
    }

    /// What a container is started with. Its plugins are asked to prepare first.
    pub async fn before_start(&self, pod: &Pod, container: &str) -> Result<Given, String> {
        let held = self.held.lock().get(uid_of(pod)).and_then(|own| own.get(container)).cloned().unwrap_or_default();
        for (resource, devices) in &held.devices {
            self.devices.before_start(resource, &devices.ids).await?;
        }
        Ok(self.given(&held))
    }

    fn given(&self, held: &Held) -> Given {
        let nodes: BTreeSet<u32> = held.memory.keys().copied().collect();
        let mut given =
            Given { cpuset_cpus: self.cpuset(held), cpuset_mems: topology::show_set(&nodes), ..Default::default() };
        for devices in held.devices.values() {
            let Ok(answer) = pb::ContainerAllocateResponse::decode(devices.answer.as_slice()) else { continue };
            given.envs.extend(answer.envs);
            given.annotations.extend(answer.annotations);
            given.mounts.extend(answer.mounts.into_iter().map(|m| cri::Mount {
                container_path: m.container_path,
                host_path: m.host_path,
                readonly: m.read_only,
                ..Default::default()
            }));
            given.devices.extend(answer.devices.into_iter().map(|d| cri::Device {
                container_path: d.container_path,
                host_path: d.host_path,
                permissions: d.permissions,
            }));
            given.cdi_devices.extend(answer.cdi_devices.into_iter().map(|d| cri::CdiDevice { name: d.name }));
        }
        given
    }

    /// The processors that a container may use: its own, or those that are nobody's. Empty: all, as the runtime has it.
    fn cpuset(&self, held: &Held) -> String {
        if self.policies.static_cpus.is_none() {
            return String::new();
        }
        if !held.cpus.is_empty() {
            return topology::show_set(&held.cpus);
        }
        let taken = held::taken_cpus(&self.held.lock());
        let mut shared = self.topology.all_cpus();
        let kept = self.policies.static_cpus.as_ref().filter(|_| self.policies.cpus.strict);
        shared.retain(|cpu| !taken.contains(cpu) && kept.is_none_or(|kept| !kept.contains(cpu)));
        topology::show_set(&shared)
    }

    /// The processors that a running container of a pod may use now. None: this node does not say.
    pub fn cpuset_of(&self, uid: &str, container: &str) -> Option<String> {
        self.policies.static_cpus.as_ref()?;
        let held = self.held.lock().get(uid).and_then(|own| own.get(container)).cloned().unwrap_or_default();
        Some(self.cpuset(&held))
    }

    /// The health of the devices that a container holds. As `UpdateAllocatedResourcesStatus`.
    pub fn health_of(&self, uid: &str, container: &str) -> Vec<ResourceStatus> {
        let all = self.held.lock();
        let Some(held) = all.get(uid).and_then(|own| own.get(container)) else { return Vec::new() };
        let health = |resource: &String, id: &String| ResourceHealth {
            health: Some(self.devices.health(resource, id).to_owned()),
            message: None,
            resource_id: id.clone(),
        };
        let status = |(resource, devices): (&String, &HeldDevices)| ResourceStatus {
            name: resource.clone(),
            resources: Some(devices.ids.iter().map(|id| health(resource, id)).collect()),
        };
        held.devices.iter().map(status).collect()
    }

    /// The UIDs of pods that hold devices.
    pub fn device_holders(&self) -> Vec<String> {
        let has = |own: &BTreeMap<String, Held>| own.values().any(|held| !held.devices.is_empty());
        self.held.lock().iter().filter(|(_, own)| has(own)).map(|(uid, _)| uid.clone()).collect()
    }

    /// Takes back what a pod held.
    pub fn forget(&self, uid: &str) {
        let mut all = self.held.lock();
        if all.remove(uid).is_some() {
            self.save(&all);
        }
    }

    /// Takes back what pods hold that are no more.
    pub fn keep_only(&self, is_known: impl Fn(&str) -> bool) {
        let mut all = self.held.lock();
        let before = all.len();
        all.retain(|uid, _| is_known(uid));
        if all.len() != before {
            self.save(&all);
        }
    }
}
