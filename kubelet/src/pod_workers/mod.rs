//! One task per pod. It learns what is wanted (the API, manifests, eviction) and what is (the runtime), asks `plan` for the
//! next step, carries it out, reports, and waits for whatever comes first: a change of either, a probe's word, a timer.
//!
//! A pod's life here: it syncs until it is to end (deleted, evicted, over, rejected), then it is stopped within its grace,
//! then taken down. Only when the API (or the manifest) no longer has it, its last traces go.

pub mod admission;
mod hooks;
mod kill;
mod preemption;
mod resize;
mod start;
mod worker;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use component_base::informer::Informer;
use k8s_openapi::api::core::v1::{Node, Pod};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::allocation::Allocator;
use crate::dra::Dra;
use crate::env;
use crate::events::Events;
use crate::eviction::Shortage;
use crate::images::Puller;
use crate::metrics::managers;
use crate::probes;
use crate::runtime::pods::{full_name, uid_of};
use crate::runtime::{Runtime, RuntimeWatch};
use crate::shutdown::Shutdown;
use crate::status::{Ended, StatusManager};
use crate::volumes::Volumes;

/// What the workers share.
pub struct Means {
    pub runtime: Arc<Runtime>,
    pub watch: Arc<RuntimeWatch>,
    pub volumes: Arc<Volumes>,
    /// None: standalone.
    pub client: Option<kube::Client>,
    pub env: Arc<env::Sources>,
    pub puller: Arc<Puller>,
    pub statuses: Arc<StatusManager>,
    pub events: Arc<Events>,
    pub probes: Arc<probes::Means>,
    pub host_ips: Vec<String>,
    pub runtime_name: String,
    pub max_restart_delay: Duration,
    pub sync_frequency: Duration,
    /// This node in the API. None: standalone.
    pub node: Option<Informer<Node>>,
    pub node_name: String,
    /// What the node has to give, for admission.
    pub allocatable: admission::Allocatable,
    /// What the node runs short of.
    pub shortage: Shortage,
    pub going_down: Shutdown,
    pub allocator: Arc<Allocator>,
    pub dra: Arc<Dra>,
}

/// What a worker is to bring about.
#[derive(Debug, Clone)]
pub(crate) struct Desired {
    pub pod: Arc<Pod>,
    /// To be ended for this reason, whatever the API says.
    pub ended: Option<Ended>,
    /// Seconds to end in, shorter than the pod's own.
    pub grace: Option<i64>,
    /// The source no longer has it.
    pub removed: bool,
}

struct Handle {
    desired: watch::Sender<Desired>,
    wake: Arc<Notify>,
}

/// The workers by pod UID.
pub struct PodWorkers {
    means: Arc<Means>,
    workers: Mutex<HashMap<String, Handle>>,
    shutdown: CancellationToken,
}

impl PodWorkers {
    pub fn new(means: Arc<Means>, shutdown: CancellationToken) -> Arc<Self> {
        Arc::new(Self { means, workers: Mutex::default(), shutdown })
    }

    pub fn means(&self) -> &Arc<Means> {
        &self.means
    }

    /// A pod as its source has it now. The echo of a status that was written here is no news to its worker.
    pub fn update(self: &Arc<Self>, pod: Arc<Pod>) {
        let uid = uid_of(&pod).to_owned();
        let mut workers = self.workers.lock();
        if let Some(handle) = workers.get(&uid) {
            handle.desired.send_if_modified(|desired| {
                let before = std::mem::replace(&mut desired.pod, pod);
                !asks_the_same(&before, &desired.pod) || !self.means.statuses.has_told(&desired.pod)
            });
            return;
        }
        let containers = pod.spec.as_ref().map_or(0, |spec| spec.containers.len());
        managers().containers_per_pod.observe(containers as f64);
        let desired = Desired { pod, ended: None, grace: None, removed: false };
        self.spawn(&mut workers, uid, desired);
    }

    /// The source no longer has a pod.
    pub fn remove(&self, uid: &str) {
        if let Some(handle) = self.workers.lock().get(uid) {
            handle.desired.send_modify(|desired| desired.removed = true);
        }
    }

    /// Ends a pod for a reason of the node's (eviction).
    pub fn end(&self, uid: &str, ended: Ended, grace: Option<i64>) {
        if let Some(handle) = self.workers.lock().get(uid) {
            handle.desired.send_modify(|desired| {
                desired.ended = Some(ended);
                desired.grace = grace;
            });
        }
    }

    /// Something happened to a pod in the runtime.
    pub fn wake(&self, uid: &str) {
        if let Some(handle) = self.workers.lock().get(uid) {
            handle.wake.notify_one();
        }
    }

    /// Whether a worker cares for this UID.
    pub fn knows(&self, uid: &str) -> bool {
        self.workers.lock().contains_key(uid)
    }

    /// The pods that are wanted or still ending.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.workers.lock().values().map(|h| h.desired.borrow().pod.clone()).collect()
    }

    /// The pods that hold what they asked for: not those that are over, nor those whose object is gone. As
    /// `filterOutInactivePods`.
    pub(crate) fn active_pods(&self) -> Vec<Arc<Pod>> {
        let wanted = |handle: &Handle| {
            let desired = handle.desired.borrow();
            (!desired.removed).then(|| desired.pod.clone())
        };
        let pods: Vec<Arc<Pod>> = self.workers.lock().values().filter_map(wanted).collect();
        pods.into_iter().filter(|pod| !self.means.statuses.is_over(pod)).collect()
    }

    /// The active pods that a pod must find room beside: those that have begun here, and those that come before it.
    pub(crate) fn pods_before(&self, pod: &Pod) -> Vec<Arc<Pod>> {
        let place = |pod: &Pod| (pod.metadata.creation_timestamp.as_ref().map(|t| t.0), pod.metadata.uid.clone());
        let own = place(pod);
        let mut pods = self.active_pods();
        pods.retain(|other| self.means.statuses.get(other).start_time.is_some() || place(other) < own);
        pods
    }

    /// Whether a pod that was told to end has stopped, and given its volumes back, before `patience` is over.
    pub(crate) async fn stops_within(&self, uid: &str, patience: Duration) -> bool {
        const POLL: Duration = Duration::from_millis(500);
        let begun = Instant::now();
        let volumes = self.means.runtime.node.pod_dir(uid).join("volumes");
        while begun.elapsed() < patience {
            let stopped = self.means.runtime.observe(uid).await.is_ok_and(|observed| observed.is_stopped());
            if stopped && !volumes.exists() {
                return true;
            }
            tokio::time::sleep(POLL).await;
        }
        false
    }

    /// Whether another pod of this name is still being taken down.
    pub(crate) fn has_ending_namesake(&self, pod: &Pod) -> bool {
        self.workers.lock().values().any(|handle| {
            let other = handle.desired.borrow();
            other.removed
                && uid_of(&other.pod) != uid_of(pod)
                && other.pod.metadata.name == pod.metadata.name
                && other.pod.metadata.namespace == pod.metadata.namespace
        })
    }

    /// Takes down what the runtime still has of a pod that no source knows (it was removed while the kubelet was away).
    pub fn take_down_orphan(self: &Arc<Self>, uid: &str) {
        let mut workers = self.workers.lock();
        if workers.contains_key(uid) {
            return;
        }
        warn!(uid, "pod without a source found in the runtime; taking it down");
        managers().orphans.inc();
        let mut pod = Pod::default();
        pod.metadata.uid = Some(uid.to_owned());
        let desired = Desired { pod: Arc::new(pod), ended: None, grace: None, removed: true };
        self.spawn(&mut workers, uid.to_owned(), desired);
    }

    fn spawn(self: &Arc<Self>, workers: &mut HashMap<String, Handle>, uid: String, desired: Desired) {
        info!(pod = %full_name(&desired.pod), uid, "pod worker starts");
        let (sender, receiver) = watch::channel(desired);
        let wake = Arc::new(Notify::new());
        let worker = worker::Worker::new(self.clone(), uid.clone(), receiver, wake.clone());
        let pool = self.clone();
        let name = uid.clone();
        workers.insert(uid, Handle { desired: sender, wake });
        tokio::spawn(async move {
            tokio::select! {
                () = worker.run() => {}
                () = pool.shutdown.cancelled() => return,
            }
            pool.workers.lock().remove(&name);
            pool.means.statuses.forget(&name);
            pool.means.puller.forget_pod(&name);
            pool.means.allocator.forget(&name);
            probes::forget_pod(&name);
            pool.means.runtime.user_ids.forget(&name);
        });
    }
}

/// Whether two states of a pod ask for the same.
fn asks_the_same(a: &Pod, b: &Pod) -> bool {
    let meta = |pod: &Pod| {
        let meta = &pod.metadata;
        (meta.generation, meta.deletion_timestamp.clone(), meta.deletion_grace_period_seconds)
    };
    let (of_a, of_b) = (&a.metadata, &b.metadata);
    meta(a) == meta(b) && of_a.labels == of_b.labels && of_a.annotations == of_b.annotations && a.spec == b.spec
}
