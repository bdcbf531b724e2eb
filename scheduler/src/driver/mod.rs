//! The thin part: watches feed the picture and the queue, decisions become bindings, events and conditions.
//!
//! One lock guards picture and queue together, so a decision sees both at one moment; it is held for the decision and never
//! across an await. Binding goes on in tasks, at most [`BINDINGS_MAX`] at a time, while the next pods are decided on.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use component_base::events::{Recorder, Type};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::api::{Api, Patch, PatchParams};
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::json;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::cache::{PendingPod, Snapshot};
use crate::decide::{Decision, Scratch, decide};
use crate::framework::{Bind, Diagnosis, EventSet, FitError, Handle, Profile, QueueKey};
use crate::metrics::{Metrics, Outcome};
use crate::queue::{Policy, Queue};

mod slim;
mod watches;

pub use watches::Watches;

/// How many pods are bound, or told that they have no node, at once.
const BINDINGS_MAX: usize = 64;
/// How long a bound pod is counted without a watch confirming it.
const ASSUMPTION_EXPIRY: Duration = Duration::from_secs(15 * 60);
/// How often unconfirmed assumptions and the depth of the queue are looked at.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(10);

/// The profiles by scheduler name; they order the queue and keep gated pods out of it.
#[derive(Clone)]
pub struct Profiles(Arc<HashMap<String, Arc<Profile>>>);

impl Profiles {
    pub fn new(profiles: impl IntoIterator<Item = Profile>) -> Profiles {
        let named = profiles.into_iter().map(|profile| (profile.scheduler_name.clone(), Arc::new(profile)));
        Profiles(Arc::new(named.collect()))
    }

    /// The profile that is to place the pod; `None` if that is another scheduler's affair.
    pub fn of(&self, pod: &PendingPod) -> Option<&Arc<Profile>> {
        self.0.get(pod.scheduler_name())
    }
}

impl Policy for Profiles {
    fn key(&self, pod: &PendingPod, waiting_since_us: i64) -> QueueKey {
        self.of(pod).map_or((0, waiting_since_us), |profile| {
            profile.plugin(profile.queue_sort).queue_key(pod, waiting_since_us)
        })
    }

    fn admits(&self, pod: &PendingPod) -> bool {
        self.of(pod).is_none_or(|profile| {
            profile.pre_enqueue.iter().all(|place| profile.plugin(*place).pre_enqueue(pod).is_ok())
        })
    }
}

/// What the lock guards.
struct Core {
    snapshot: Snapshot,
    queue: Queue<Profiles>,
    scratch: Scratch,
    rng: StdRng,
}

/// The scheduler at work. Clones are handles to the same one.
#[derive(Clone)]
pub struct Driver {
    shared: Arc<Shared>,
}

struct Shared {
    core: Mutex<Core>,
    /// Rung when a pod may have become active.
    wake: Notify,
    profiles: Profiles,
    handle: Handle,
    /// One for each profile: an event names its scheduler.
    recorders: HashMap<String, Recorder>,
    metrics: Metrics,
}

/// What a decision leads to.
enum Next {
    Bind { profile: Arc<Profile>, node: String },
    TellUnschedulable { profile: Arc<Profile>, error: FitError },
    Nothing,
}

impl Driver {
    /// Must be called within a tokio runtime.
    pub fn new(client: kube::Client, profiles: Profiles, backoff: (Duration, Duration)) -> Driver {
        let recorders = profiles.0.keys().map(|name| (name.clone(), Recorder::new(client.clone(), name, ""))).collect();
        let core = Core {
            snapshot: Snapshot::default(),
            queue: Queue::new(profiles.clone(), backoff.0, backoff.1),
            scratch: Scratch::default(),
            rng: StdRng::seed_from_u64(rand::random()),
        };
        Driver {
            shared: Arc::new(Shared {
                core: Mutex::new(core),
                wake: Notify::new(),
                profiles,
                handle: Handle { client },
                recorders,
                metrics: Metrics::default(),
            }),
        }
    }

    /// Places pods until `shutdown`. Watches must have been started, and synced.
    pub async fn run(&self, shutdown: CancellationToken) {
        let slots = Arc::new(Semaphore::new(BINDINGS_MAX));
        let mut housekeeping = tokio::time::interval(HOUSEKEEPING_INTERVAL);
        loop {
            let slot = tokio::select! {
                _ = shutdown.cancelled() => return,
                slot = slots.clone().acquire_owned() => slot,
            };
            // The semaphore is never closed.
            let Ok(slot) = slot else { return };
            let now = Instant::now();
            let (popped, next) = {
                let mut core = self.shared.core.lock();
                let popped = core.queue.pop(now);
                let next = if popped.is_none() { core.queue.flush(now) } else { None };
                (popped, next)
            };
            if let Some((pod, attempts)) = popped {
                self.attempt(pod, attempts, slot);
                // Watch events must not wait for a long row of decisions.
                tokio::task::yield_now().await;
                continue;
            }
            drop(slot);
            let sleep = next.map_or(HOUSEKEEPING_INTERVAL, |next| next.saturating_duration_since(now));
            tokio::select! {
                _ = shutdown.cancelled() => return,
                // A pod came, or something happened that may help one.
                () = self.shared.wake.notified() => {}
                // A back-off ends.
                () = tokio::time::sleep(sleep) => {}
                _ = housekeeping.tick() => self.keep_house(),
            }
        }
    }

    /// How many nodes and pods the picture holds.
    pub fn size(&self) -> (usize, usize) {
        let core = self.shared.core.lock();
        (core.snapshot.nodes.len(), core.snapshot.placed_count())
    }

    fn keep_house(&self) {
        let (expired, depths) = {
            let mut core = self.shared.core.lock();
            (core.snapshot.expire(Instant::now()), core.queue.depths())
        };
        self.shared.metrics.depths(depths);
        for uid in expired {
            warn!(%uid, "no watch has confirmed the pod that was bound: no longer counted");
        }
    }

    /// One pod's way from the queue to a task that binds it or tells why not.
    fn attempt(&self, pod: Arc<PendingPod>, attempts: u32, slot: OwnedSemaphorePermit) {
        let started = Instant::now();
        let next = self.decide(&pod, started);
        let driver = self.clone();
        match next {
            Next::Nothing => {}
            Next::Bind { profile, node } => {
                debug!(pod = %pod.facts.key, %node, attempts, "decided");
                tokio::spawn(async move {
                    driver.bind(&profile, &pod, &node, started).await;
                    drop(slot);
                });
            }
            Next::TellUnschedulable { profile, error } => {
                debug!(pod = %pod.facts.key, attempts, plugins = ?error.plugins, reason = %error, "no node fits");
                self.shared.metrics.attempt(&profile.scheduler_name, Outcome::Unschedulable, started.elapsed());
                tokio::spawn(async move {
                    driver.tell(&pod, "Unschedulable", &error.message).await;
                    drop(slot);
                });
            }
        }
    }

    fn decide(&self, pod: &Arc<PendingPod>, started: Instant) -> Next {
        let mut core = self.shared.core.lock();
        let core = &mut *core;
        let uid = &pod.facts.uid;
        let profile = self.shared.profiles.of(pod).cloned();
        let Some(profile) = profile.filter(|_| !core.snapshot.is_placed(uid)) else {
            core.queue.remove(uid);
            return Next::Nothing;
        };
        core.snapshot.prepare_for(pod);
        let decision = decide(&profile, &core.snapshot, pod, &mut core.scratch, &mut core.rng);
        self.shared.metrics.decided_in(started.elapsed());
        let placed = decision.and_then(|Decision { node, .. }| {
            let name = core.snapshot.nodes.name[node.index()].to_string();
            match profile.reserve(pod, &name) {
                Ok(()) => Ok((node, name)),
                Err(rejected) => {
                    let diagnosis = Diagnosis {
                        nodes: core.snapshot.nodes.len(),
                        rejected: Some(rejected),
                        ..Diagnosis::default()
                    };
                    Err(diagnosis.into_error(&profile, &[]))
                }
            }
        });
        match placed {
            Ok((node, name)) => {
                core.snapshot.assume(pod.facts.clone(), node);
                core.queue.happened(EventSet::POD_PLACED, started);
                Next::Bind { profile, node: name }
            }
            Err(error) => {
                core.queue.refused(uid, Some(error.helped_by), Instant::now());
                Next::TellUnschedulable { profile, error }
            }
        }
    }

    async fn bind(&self, profile: &Profile, pod: &PendingPod, node: &str, started: Instant) {
        let (key, uid) = (&pod.facts.key, &pod.facts.uid);
        match self.carry_out(profile, pod, node).await {
            Ok(()) => {
                {
                    let mut core = self.shared.core.lock();
                    core.snapshot.finish_binding(uid, Instant::now() + ASSUMPTION_EXPIRY);
                    core.queue.remove(uid);
                }
                for place in &profile.post_bind {
                    profile.plugin(*place).post_bind(pod, node);
                }
                info!(pod = %key, %node, "bound");
                self.shared.metrics.attempt(&profile.scheduler_name, Outcome::Scheduled, started.elapsed());
                self.event(pod, Type::Normal, "Scheduled", "Binding", format!("Successfully assigned {key} to {node}"));
            }
            Err(cause) => {
                warn!(pod = %key, %node, %cause, "binding failed: taken back");
                profile.unreserve(pod, node);
                let still_wanted = {
                    let mut core = self.shared.core.lock();
                    let forgotten = core.snapshot.forget(uid);
                    let now = Instant::now();
                    if forgotten {
                        core.queue.happened(EventSet::POD_REMOVED, now);
                        core.queue.refused(uid, None, now);
                    } else {
                        core.queue.remove(uid);
                    }
                    forgotten
                };
                self.shared.wake.notify_one();
                self.shared.metrics.attempt(&profile.scheduler_name, Outcome::Error, started.elapsed());
                if still_wanted {
                    self.tell(pod, "SchedulerError", &format!("binding rejected: {cause}")).await;
                }
            }
        }
    }

    /// PreBind and Bind.
    async fn carry_out(&self, profile: &Profile, pod: &PendingPod, node: &str) -> Result<(), String> {
        for place in &profile.pre_bind {
            profile.plugin(*place).pre_bind(&self.shared.handle, pod, node).await?;
        }
        for place in &profile.bind {
            match profile.plugin(*place).bind(&self.shared.handle, pod, node).await {
                Bind::Skip => {}
                Bind::Bound => return Ok(()),
                Bind::Failed(cause) => return Err(cause),
            }
        }
        Err("no bind plugin took the pod".to_owned())
    }

    /// Says with an event and the pod's condition why it has no node.
    async fn tell(&self, pod: &PendingPod, reason: &str, message: &str) {
        self.event(pod, Type::Warning, "FailedScheduling", "Scheduling", message.to_owned());
        let known = apimachinery::pod::condition(&pod.pod, "PodScheduled");
        let same = |condition: &k8s_openapi::api::core::v1::PodCondition| {
            condition.status == "False"
                && condition.reason.as_deref() == Some(reason)
                && condition.message.as_deref() == Some(message)
        };
        if known.is_some_and(same) {
            return;
        }
        let since = known
            .filter(|condition| condition.status == "False")
            .and_then(|condition| serde_json::to_value(&condition.last_transition_time).ok())
            .filter(|time| !time.is_null())
            .unwrap_or_else(|| json!(apimachinery::time::now()));
        let patch = json!({
            "metadata": {"uid": &*pod.facts.uid},
            "status": {"conditions": [{
                "type": "PodScheduled",
                "status": "False",
                "reason": reason,
                "message": message,
                "lastTransitionTime": since,
                "observedGeneration": pod.pod.metadata.generation,
            }]}
        });
        let pods: Api<Pod> = Api::namespaced(self.shared.handle.client.clone(), &pod.facts.key.namespace);
        let params = PatchParams::default();
        match pods.patch_status(&pod.facts.key.name, &params, &Patch::Strategic(patch)).await {
            Ok(_) => {}
            // Deleted meanwhile: nobody is left to tell.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => warn!(pod = %pod.facts.key, %error, "cannot write the condition PodScheduled"),
        }
    }

    fn event(&self, pod: &PendingPod, kind: Type, reason: &str, action: &str, message: String) {
        let Some(recorder) = self.shared.recorders.get(pod.scheduler_name()) else { return };
        recorder.event(&reference(pod), kind, reason, action, message);
    }

    /// Lets `change` work on the picture, and tries again the pods that what it returns may help.
    fn update(&self, change: impl FnOnce(&mut Snapshot, &mut Queue<Profiles>, Instant) -> EventSet) {
        let now = Instant::now();
        {
            let mut core = self.shared.core.lock();
            let core = &mut *core;
            let happened = change(&mut core.snapshot, &mut core.queue, now);
            core.queue.happened(happened, now);
        }
        self.shared.wake.notify_one();
    }
}

fn now_us() -> i64 {
    Timestamp::now().as_microsecond()
}

fn reference(pod: &PendingPod) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(pod.facts.key.namespace.clone()),
        name: Some(pod.facts.key.name.clone()),
        uid: Some(pod.facts.uid.to_string()),
        resource_version: pod.pod.metadata.resource_version.clone(),
        ..ObjectReference::default()
    }
}
