//! Eviction: when the node runs short of memory, disk, inodes or process IDs, it says so, frees what is nobody's (images that are
//! not used), and ends pods, one at a time, until enough is free. `thresholds` and `rank` decide; this looks and acts.

mod rank;
mod thresholds;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use component_base::events::Type;
use component_base::metrics;
use k8s_openapi::api::core::v1::Pod;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::config::KubeletConfiguration;
use crate::images::collector;
use crate::pod_workers::PodWorkers;
use crate::runtime::Runtime;
use crate::runtime::pods::{full_name, uid_of};
use crate::status::Ended;
use crate::usage::{self, PodUsage};
pub use rank::is_critical;
pub use thresholds::{Amount, Pressure};
use thresholds::{Observation, Observations, Signal, Threshold, Watcher};

/// As Kubernetes' `evictionMonitoringPeriod`.
const PERIOD: Duration = Duration::from_secs(10);
/// How long an evicted pod is waited for before the node is looked at again.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the node runs short of, as it was last seen. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Shortage(Arc<Mutex<Pressure>>);

impl Shortage {
    pub fn now(&self) -> Pressure {
        *self.0.lock()
    }

    /// Whether a pod may begin on a node that is short. As the eviction manager's `Admit`.
    pub fn admit(&self, pod: &Pod) -> Result<(), Ended> {
        let short = self.now();
        if short == Pressure::default() || is_critical(pod) {
            return Ok(());
        }
        if short.memory && !short.disk && !short.pids {
            let best_effort = pod.spec.as_ref().map_or("BestEffort", apimachinery::pod::qos_class) == "BestEffort";
            let tolerated = pod.spec.iter().flat_map(|s| s.tolerations.iter().flatten()).any(|t| {
                let key = t.key.as_deref().unwrap_or_default();
                let effect = t.effect.as_deref().unwrap_or_default();
                (key == "node.kubernetes.io/memory-pressure"
                    || key.is_empty() && t.operator.as_deref() == Some("Exists"))
                    && matches!(effect, "" | "NoSchedule")
            });
            if !best_effort || tolerated {
                return Ok(());
            }
        }
        let names = [(short.memory, "MemoryPressure"), (short.disk, "DiskPressure"), (short.pids, "PIDPressure")];
        let names: Vec<&str> = names.into_iter().filter(|(is, _)| *is).map(|(_, name)| name).collect();
        Err(Ended::new("Evicted", format!("The node had condition: [{}]. ", names.join(" "))))
    }
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct BySignal {
    eviction_signal: String,
}

/// Looks at the node and its pods.
pub struct Evictor {
    pub workers: Arc<PodWorkers>,
    pub runtime: Arc<Runtime>,
    pub config: Arc<KubeletConfiguration>,
    pub shortage: Shortage,
    pub node_name: String,
}

impl Evictor {
    /// Keeps watch until shutdown.
    pub async fn run(self, shutdown: CancellationToken) {
        let thresholds = thresholds::of_configuration(&self.config);
        let mut watcher = Watcher::new(thresholds, self.config.eviction_pressure_transition_period);
        let evictions: Family<BySignal, Counter> = metrics::register(
            "kubelet_evictions",
            &metrics::bare("Cumulative number of pod evictions by eviction signal"),
            Family::default(),
        );
        let mut image_dir = None;
        loop {
            if image_dir.is_none() {
                image_dir = self.image_dir().await;
            }
            let observed = self.observe(image_dir.as_ref());
            let step = watcher.step(&observed, Instant::now());
            let before = std::mem::replace(&mut *self.shortage.0.lock(), step.pressure);
            if before != step.pressure {
                info!(memory = step.pressure.memory, disk = step.pressure.disk, pids = step.pressure.pids, "pressure");
            }
            for signal in self.keep_storage_limits().await {
                evictions.get_or_create(&BySignal { eviction_signal: signal.to_owned() }).inc();
            }
            if let Some(threshold) = step.act
                && self.answer(&threshold, &observed, image_dir.as_ref()).await
            {
                let label = BySignal { eviction_signal: threshold.signal.name().to_owned() };
                evictions.get_or_create(&label).inc();
                continue;
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
        }
    }

    /// Where the runtime keeps images.
    async fn image_dir(&self) -> Option<PathBuf> {
        let info = self.runtime.cri.image_fs_info().await.ok()?;
        info.image_filesystems.first()?.fs_id.as_ref().map(|id| PathBuf::from(&id.mountpoint))
    }

    fn observe(&self, image_dir: Option<&PathBuf>) -> Observations {
        let mut observed = Observations::new();
        let mut note = |signal, available: u64, capacity: u64| {
            let amount = |n| i64::try_from(n).unwrap_or(i64::MAX);
            observed.insert(signal, Observation { available: amount(available), capacity: amount(capacity) });
        };
        let machine = crate::node::machine::free();
        if let Some((available, capacity)) = machine.memory {
            note(Signal::Memory, available, capacity);
        }
        if let Some((available, capacity)) = machine.pids {
            note(Signal::Pids, available, capacity);
        }
        for (path, bytes, inodes) in [
            (Some(&self.runtime.node.root_dir), Signal::NodeFs, Signal::NodeFsInodes),
            (image_dir, Signal::ImageFs, Signal::ImageFsInodes),
        ] {
            if let Some((free, all)) = path.and_then(|path| usage::file_system(path)) {
                note(bytes, free.bytes, all.bytes);
                note(inodes, free.inodes, all.inodes);
            }
        }
        observed
    }

    /// Frees something for a threshold. True: a pod was ended, look again at once.
    async fn answer(&self, threshold: &Threshold, observed: &Observations, image_dir: Option<&PathBuf>) -> bool {
        warn!(node = %self.node_name, resource = threshold.signal.resource(), "the node is low on a resource");
        let message = format!("Attempting to reclaim {}", threshold.signal.resource());
        self.workers.means().events.node(&self.node_name, Type::Warning, "EvictionThresholdMet", message);
        if !matches!(threshold.signal, Signal::Memory | Signal::Pids) {
            match collector::free_unused(&self.runtime.cri).await {
                Ok(removed) if removed > 0 => info!(removed, "unused images removed for want of disk space"),
                Ok(_) => {}
                Err(error) => warn!(%error, "unused images not removed"),
            }
            if !Watcher::is_met(threshold, &self.observe(image_dir)) {
                return false;
            }
        }
        let pods = self.workers.active_pods();
        let with_disk = !matches!(threshold.signal, Signal::Memory | Signal::Pids);
        let Ok(usages) = usage::pods(&self.runtime, &pods, |_| with_disk).await else { return false };
        let ranked = rank::rank(together(pods, usages), threshold.signal, self.has_own_image_fs(image_dir));
        let Some((pod, usage)) = ranked.first() else { return false };
        let ended = rank::ended(threshold, observed.get(&threshold.signal), pod, usage);
        let grace = rank::grace(threshold, self.config.eviction_max_pod_grace_period, pod);
        self.evict(pod, ended, grace).await;
        true
    }

    /// Whether images are on another file system than the kubelet's own files.
    fn has_own_image_fs(&self, image_dir: Option<&PathBuf>) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        let device = |path: &PathBuf| std::fs::metadata(path).ok().map(|found| found.dev());
        let devices = device(&self.runtime.node.root_dir).zip(image_dir.and_then(device));
        devices.is_some_and(|(own, images)| own != images)
    }

    /// Ends pods that wrote more than they may: the signals that they count as.
    async fn keep_storage_limits(&self) -> Vec<&'static str> {
        let mut pods = self.workers.pods();
        pods.retain(|pod| apimachinery::pod::is_active(pod) && !is_critical(pod) && rank::limits_storage(pod));
        if pods.is_empty() {
            return Vec::new();
        }
        let Ok(usages) = usage::pods(&self.runtime, &pods, |_| true).await else { return Vec::new() };
        let mut ended = Vec::new();
        for (pod, usage) in together(pods, usages) {
            if let Some((signal, why)) = rank::over_its_storage(&pod, &usage) {
                self.evict(&pod, why, 0).await;
                ended.push(signal);
            }
        }
        ended
    }

    async fn evict(&self, pod: &Arc<Pod>, ended: Ended, grace: i64) {
        warn!(pod = %full_name(pod), reason = %ended.message, "pod is evicted");
        self.workers.means().events.pod(pod, None, Type::Warning, "Evicted", ended.message.clone());
        let uid = uid_of(pod).to_owned();
        // A grace of nothing still lets the runtime say goodbye.
        self.workers.end(&uid, ended, Some(grace.max(1)));
        // What it had is free only when its volumes are gone: else the next pod would be ended for what this one held.
        if self.workers.stops_within(&uid, PATIENCE).await {
            debug!(uid, "evicted pod has ended");
        }
    }
}

fn together(pods: Vec<Arc<Pod>>, usages: Vec<PodUsage>) -> Vec<(Arc<Pod>, PodUsage)> {
    let mut usages: std::collections::HashMap<String, PodUsage> =
        usages.into_iter().map(|u| (u.uid.clone(), u)).collect();
    pods.into_iter().filter_map(|pod| usages.remove(uid_of(&pod)).map(|usage| (pod, usage))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_node_that_is_short_takes_only_some_pods() {
        let pod = |spec: serde_json::Value| -> Pod {
            serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
        };
        let plain = pod(json!({"containers": [{"name": "c"}]}));
        let asking = pod(json!({"containers": [{"name": "c", "resources": {"requests": {"memory": "1Mi"}}}]}));
        let tolerant = pod(json!({"containers": [{"name": "c"}],
            "tolerations": [{"key": "node.kubernetes.io/memory-pressure", "operator": "Exists", "effect": "NoSchedule"}]}));
        let critical = pod(json!({"priority": 2_000_000_000, "containers": [{"name": "c"}]}));
        let memory = Pressure { memory: true, ..Default::default() };
        let disk = Pressure { disk: true, ..Default::default() };
        for (short, pod, fine) in [
            (Pressure::default(), &plain, true),
            (memory, &plain, false),
            (memory, &asking, true),
            (memory, &tolerant, true),
            (disk, &asking, false),
            (disk, &critical, true),
        ] {
            let shortage = Shortage(Arc::new(Mutex::new(short)));
            assert_eq!(shortage.admit(pod).is_ok(), fine, "{short:?}");
        }
        let rejected = Shortage(Arc::new(Mutex::new(disk))).admit(&plain).unwrap_err();
        assert_eq!(rejected.message, "The node had condition: [DiskPressure]. ");
    }
}
