//! The thin part: watches feed the picture and the queue, decisions become bindings, events and conditions.
//!
//! One lock guards picture and queue together, so a decision sees both at one moment; it is held for the decision and never
//! across an await. Binding goes on in tasks, at most [`BINDINGS_MAX`] at a time, while the next pods are decided on.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use component_base::events::{Recorder, Type};
use component_base::informer::Informer;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::json;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::cache::{NodeId, PendingPod, PodFacts, Snapshot};
use crate::decide::{Approval, Decision, Scratch, decide_among, sampled_nodes};
use crate::explain;
use crate::extender::{ExtenderError, Extenders};
use crate::framework::{
    Bind, Diagnosis, Event, EventSet, FitError, Handle, Nomination, Profile, QueueKey, State, truncated,
};
use crate::metrics::{EvaluationCounters, Metrics, Outcome};
use crate::plugins::dynamic_resources::deallocate;
use crate::queue::{Policy, Queue, Refused, Timing};

mod preempt;
pub mod slim;
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

impl Profiles {
    /// The plugins that hold a pod back, each with the profile: those at `places`, or else one that gates it.
    fn refusing<'a>(&'a self, pod: &'a PendingPod, places: &'a [u8]) -> impl Iterator<Item = (&'static str, &'a str)> {
        let profile = self.of(pod);
        let gates = |place: &&u8| profile.is_some_and(|p| p.plugin(**place).pre_enqueue(pod).is_err());
        let gate = profile.filter(|_| places.is_empty()).and_then(|profile| profile.pre_enqueue.iter().find(gates));
        profile.into_iter().flat_map(move |profile| {
            places.iter().chain(gate).map(|place| (profile.plugin(*place).name(), profile.scheduler_name.as_str()))
        })
    }
}

impl Policy for Profiles {
    fn key(&self, pod: &PendingPod, queued_us: i64) -> QueueKey {
        self.of(pod).map_or((0, queued_us), |profile| profile.plugin(profile.queue_sort).queue_key(pod, queued_us))
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
    core: Arc<Mutex<Core>>,
    /// Rung when a pod may have become active.
    wake: Notify,
    profiles: Profiles,
    handle: Handle,
    metrics: Metrics,
    /// By the names of the profiles.
    counters: HashMap<String, EvaluationCounters>,
    extenders: Extenders,
    /// For extenders that want to see whole nodes.
    node_objects: OnceLock<Informer<Node>>,
}

/// What a decision leads to.
enum Next {
    Bind { profile: Arc<Profile>, node: String, reserved: Vec<(u8, State)> },
    TellUnschedulable { profile: Arc<Profile>, error: FitError },
    Nothing,
}

impl Driver {
    /// Must be called within a tokio runtime.
    pub fn new(client: kube::Client, profiles: Profiles, timing: Timing, extenders: Extenders) -> Driver {
        let recorders = profiles.0.keys().map(|name| (name.clone(), Recorder::new(client.clone(), name, ""))).collect();
        let core = Core {
            snapshot: Snapshot::default(),
            queue: Queue::new(profiles.clone(), timing),
            scratch: Scratch::default(),
            rng: StdRng::seed_from_u64(rand::random()),
        };
        let core = Arc::new(Mutex::new(core));
        let lent = core.clone();
        let picture = Arc::new(move |look: &mut dyn FnMut(&mut Snapshot)| look(&mut lent.lock().snapshot));
        let metrics = Metrics::default();
        let counters = profiles.0.iter().map(|(name, one)| (name.clone(), metrics.counters_of(one))).collect();
        Driver {
            shared: Arc::new(Shared {
                core,
                wake: Notify::new(),
                profiles,
                handle: Handle { client, recorders: Arc::new(recorders), picture },
                metrics,
                counters,
                extenders,
                node_objects: OnceLock::new(),
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
                self.attempt(pod, attempts, slot).await;
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

    pub fn client(&self) -> &kube::Client {
        &self.shared.handle.client
    }

    /// How many nodes and pods the picture holds.
    pub fn size(&self) -> (usize, usize) {
        let core = self.shared.core.lock();
        (core.snapshot.nodes.len(), core.snapshot.placed_count())
    }

    fn keep_house(&self) {
        let (expired, depths) = {
            let mut core = self.shared.core.lock();
            let held_back = core.queue.held_back().flat_map(|(pod, places)| self.shared.profiles.refusing(pod, places));
            self.shared.metrics.held_back(held_back);
            (core.snapshot.expire(Instant::now()), core.queue.depths())
        };
        self.shared.metrics.depths(depths);
        for uid in expired {
            warn!(%uid, "no watch has confirmed the pod that was bound: no longer counted");
        }
    }

    /// One pod's way from the queue to a task that binds it or tells why not.
    async fn attempt(&self, pod: Arc<PendingPod>, attempts: u32, slot: OwnedSemaphorePermit) {
        let started = Instant::now();
        let approval = match self.shared.extenders.judge(&pod) {
            false => None,
            true => match self.approval(&pod).await {
                Ok(approval) => Some(approval),
                Err(error) => {
                    warn!(pod = %pod.facts.key, %error, "not decided");
                    self.tell(&pod, "SchedulerError", &error.to_string(), &Nomination::Keep).await;
                    return self.shared.core.lock().queue.refused(&pod.facts.uid, None, Instant::now());
                }
            },
        };
        let next = self.decide(&pod, started, approval);
        let driver = self.clone();
        match next {
            Next::Nothing => {}
            Next::Bind { profile, node, reserved } => {
                debug!(pod = %pod.facts.key, %node, attempts, "decided");
                let work = self.shared.metrics.binding();
                tokio::spawn(async move {
                    driver.bind(&profile, &pod, &node, &reserved, started, attempts).await;
                    drop((slot, work));
                });
            }
            Next::TellUnschedulable { profile, error } => {
                debug!(pod = %pod.facts.key, attempts, plugins = ?error.plugins, reason = %error, "no node fits");
                self.shared.metrics.attempt(&profile.scheduler_name, Outcome::Unschedulable, started.elapsed());
                self.shared.metrics.came("unschedulable", "ScheduleAttemptFailure");
                self.shared.metrics.preemption_tried();
                tokio::spawn(async move {
                    driver.make_known(&pod, error).await;
                    drop(slot);
                });
            }
        }
    }

    fn decide(&self, pod: &Arc<PendingPod>, started: Instant, approval: Option<Approval>) -> Next {
        let mut core = self.shared.core.lock();
        let core = &mut *core;
        let uid = &pod.facts.uid;
        let profile = self.shared.profiles.of(pod).cloned();
        let Some(profile) = profile.filter(|_| !core.snapshot.is_placed(uid)) else {
            _ = core.queue.remove(uid);
            return Next::Nothing;
        };
        core.snapshot.prepare_for(pod);
        let holds = |place: &&u8| profile.plugin(**place).holds_back(pod, &core.snapshot).is_some();
        if let Some(place) = profile.pre_enqueue.iter().find(holds) {
            let held = Refused { helped_by: profile.plugin(*place).events(), places: vec![*place] };
            core.queue.held(uid, held, started);
            return Next::Nothing;
        }
        let decision =
            decide_among(&profile, &mut core.snapshot, pod, &mut core.scratch, &mut core.rng, approval.as_ref());
        self.shared.metrics.decided_in(started.elapsed());
        if let Some(counters) = self.shared.counters.get(&profile.scheduler_name) {
            counters.add(&core.scratch.evaluations);
        }
        let timings = &mut core.scratch.timings;
        let placed = decision.and_then(|Decision { node, .. }| {
            profile.reserve(pod, &mut core.snapshot, node, timings).map(|reserved| (node, reserved)).map_err(
                |rejected| {
                    let nodes = core.snapshot.nodes.len();
                    let diagnosis = Diagnosis { nodes, rejected: Some(rejected), ..Diagnosis::default() };
                    diagnosis.into_error(&profile, &[])
                },
            )
        });
        for (point, status, took) in timings.drain() {
            self.shared.metrics.ran(&profile.scheduler_name, point, status, took);
        }
        match placed {
            Ok((node, reserved)) => {
                let name = core.snapshot.nodes.name[node.index()].to_string();
                core.snapshot.assume(pod.facts.clone(), node);
                let event = Event { kinds: EventSet::POD_PLACED, node: Some(node), pod: Some(&pod.facts) };
                self.happened(&core.snapshot, &mut core.queue, &event, started);
                Next::Bind { profile, node: name, reserved }
            }
            Err(error) => {
                match &error.nomination {
                    Nomination::Keep => {}
                    Nomination::Clear => drop(core.snapshot.withdraw_nomination(uid)),
                    Nomination::To { node, .. } => core.snapshot.nominate(&pod.facts, Some(node)),
                }
                // In flight until that has been told, and done what is to be done about it.
                Next::TellUnschedulable { profile, error }
            }
        }
    }

    /// What extenders, who see whole pods, say of the nodes that the plugins leave.
    async fn approval(&self, pod: &PendingPod) -> Result<Approval, ExtenderError> {
        let names = {
            let mut core = self.shared.core.lock();
            let core = &mut *core;
            let Some(profile) = self.shared.profiles.of(pod) else { return Ok(Approval::default()) };
            core.snapshot.prepare_for(pod);
            sampled_nodes(profile, &mut core.snapshot, pod, &mut core.scratch)
        };
        let objects = self.shared.node_objects.get();
        let nodes = names.iter().map(|name| (name.to_string(), objects.and_then(|nodes| nodes.get("", name))));
        let nodes = nodes.collect();
        let whole = self.shared.handle.pod(&pod.facts.key).await.map_err(ExtenderError::Pod)?;
        self.shared.extenders.approve(pod, &whole, nodes).await
    }

    /// What would become of a pod, and why: `None` for a pod that is not there or is another scheduler's.
    pub fn explain(&self, pod: &PendingPod) -> Option<serde_json::Value> {
        let profile = self.shared.profiles.of(pod)?;
        Some(explain::explain(profile, &mut self.shared.core.lock().snapshot, pod))
    }

    /// A waiting pod by namespace and name.
    pub fn waiting(&self, namespace: &str, name: &str) -> Option<Arc<PendingPod>> {
        let core = self.shared.core.lock();
        core.queue.iter().find(|pod| pod.facts.key.namespace == namespace && pod.facts.key.name == name).cloned()
    }

    /// Tries again the pods that an event may help.
    fn happened(&self, snapshot: &Snapshot, queue: &mut Queue<Profiles>, event: &Event<'_>, now: Instant) {
        let profiles = &self.shared.profiles;
        queue.happened(event.kinds, now, |pod, places| {
            let Some(profile) = profiles.of(pod) else { return false };
            places.is_empty()
                || places
                    .iter()
                    .map(|place| profile.plugin(*place))
                    .any(|plugin| plugin.events().intersects(event.kinds) && plugin.hint(pod, snapshot, event))
        });
    }

    async fn bind(
        &self,
        profile: &Profile,
        pod: &PendingPod,
        node: &str,
        reserved: &[(u8, State)],
        started: Instant,
        attempts: u32,
    ) {
        let (key, uid) = (&pod.facts.key, &pod.facts.uid);
        let held =
            |place: &u8| reserved.iter().find(|(holder, _)| holder == place).map(|(place, state)| (*place, state));
        let steps = profile.pre_bind.iter().filter_map(held);
        let steps: Vec<_> = steps.filter(|(place, state)| profile.plugin(*place).must_pre_bind(state)).collect();
        match self.carry_out(profile, pod, node, &steps).await {
            Ok(()) => {
                {
                    let mut core = self.shared.core.lock();
                    core.snapshot.finish_binding(uid, Instant::now() + ASSUMPTION_EXPIRY);
                    if let Some(since_us) = core.queue.remove(uid) {
                        let waited = Duration::from_micros((now_us() - since_us).max(0).unsigned_abs());
                        self.shared.metrics.bound(attempts, waited);
                    }
                }
                let began = Instant::now();
                for place in &profile.post_bind {
                    profile.plugin(*place).post_bind(pod, node);
                }
                self.shared.metrics.ran(&profile.scheduler_name, "PostBind", "Success", began.elapsed());
                debug!(pod = %key, %node, "bound");
                self.shared.metrics.attempt(&profile.scheduler_name, Outcome::Scheduled, started.elapsed());
                let handle = &self.shared.handle;
                handle.event(
                    pod,
                    Type::Normal,
                    "Scheduled",
                    "Binding",
                    format!("Successfully assigned {key} to {node}"),
                );
            }
            Err(cause) => {
                warn!(pod = %key, %node, %cause, "binding failed: taken back");
                let still_wanted = {
                    let mut core = self.shared.core.lock();
                    let core = &mut *core;
                    let began = Instant::now();
                    profile.unreserve(pod, &mut core.snapshot);
                    self.shared.metrics.ran(&profile.scheduler_name, "Unreserve", "Success", began.elapsed());
                    let forgotten = core.snapshot.forget(uid);
                    let now = Instant::now();
                    if forgotten {
                        let event = Event {
                            kinds: EventSet::POD_REMOVED,
                            node: core.snapshot.nodes.find(node),
                            pod: Some(&pod.facts),
                        };
                        self.happened(&core.snapshot, &mut core.queue, &event, now);
                    } else {
                        _ = core.queue.remove(uid);
                    }
                    forgotten
                };
                self.shared.metrics.attempt(&profile.scheduler_name, Outcome::Error, started.elapsed());
                if still_wanted {
                    if !steps.is_empty() {
                        self.patch_status(&pod.facts, json!({"nominatedNodeName": null})).await;
                    }
                    self.tell(pod, "SchedulerError", &format!("binding rejected: {cause}"), &Nomination::Keep).await;
                    self.shared.core.lock().queue.refused(uid, None, Instant::now());
                }
                self.shared.wake.notify_one();
            }
        }
    }

    /// PreBind and Bind. Where PreBind takes its time, others are told which node is expected.
    async fn carry_out(
        &self,
        profile: &Profile,
        pod: &PendingPod,
        node: &str,
        steps: &[(u8, &State)],
    ) -> Result<(), String> {
        let nominated = pod.pod.status.as_ref().and_then(|status| status.nominated_node_name.as_deref());
        if !steps.is_empty() && nominated != Some(node) {
            self.patch_status(&pod.facts, json!({"nominatedNodeName": node})).await;
        }
        let ran = |point, outcome: &Result<(), String>, began: Instant| {
            let status = if outcome.is_ok() { "Success" } else { "Error" };
            self.shared.metrics.ran(&profile.scheduler_name, point, status, began.elapsed());
        };
        let began = Instant::now();
        let mut prepared = Ok(());
        for (place, reserved) in steps {
            prepared = profile.plugin(*place).pre_bind(&self.shared.handle, reserved, pod, node).await;
            if prepared.is_err() {
                break;
            }
        }
        ran("PreBind", &prepared, began);
        prepared?;
        let began = Instant::now();
        let outcome = match self.shared.extenders.bind(pod, node).await {
            Some(outcome) => outcome,
            None => self.bind_by_plugin(profile, pod, node).await,
        };
        ran("Bind", &outcome, began);
        outcome
    }

    async fn bind_by_plugin(&self, profile: &Profile, pod: &PendingPod, node: &str) -> Result<(), String> {
        for place in &profile.bind {
            match profile.plugin(*place).bind(&self.shared.handle, pod, node).await {
                Bind::Skip => {}
                Bind::Bound => return Ok(()),
                Bind::Failed(cause) => return Err(cause),
            }
        }
        Err("no bind plugin took the pod".to_owned())
    }

    /// Says why a pod has no node, and does what is to be done about it. Only then it can be tried again: what is said of one
    /// attempt must not come behind the binding of the next.
    async fn make_known(&self, pod: &PendingPod, mut error: FitError) {
        if matches!(error.nomination, Nomination::To { .. }) {
            self.consult(pod, &mut error).await;
        }
        self.tell(pod, "Unschedulable", &error.message, &error.nomination).await;
        if let Some(claim) = &error.deallocate {
            info!(pod = %pod.facts.key, %claim, "taking the claim's allocation away");
            if let Err(error) = deallocate(&self.shared.handle, claim).await {
                warn!(pod = %pod.facts.key, %claim, %error, "cannot take the claim's allocation away");
            }
        }
        let mut done = Some(refused(&error));
        if let Nomination::To { node, victims } = &error.nomination {
            self.shared.metrics.preempted(victims.len());
            let began = Instant::now();
            let all = self.preempt(pod, node, victims).await;
            self.shared.metrics.evicted(all, began.elapsed());
            if !all {
                done = None;
            }
        }
        let mut core = self.shared.core.lock();
        if done.is_none() {
            core.snapshot.withdraw_nomination(&pod.facts.uid);
        }
        core.queue.refused(&pod.facts.uid, done, Instant::now());
        drop(core);
        self.shared.wake.notify_one();
    }

    /// Says with an event and the pod's condition why it has no node, and which node is meant for it.
    async fn tell(&self, pod: &PendingPod, reason: &str, message: &str, nomination: &Nomination) {
        self.shared.handle.event(pod, Type::Warning, "FailedScheduling", "Scheduling", truncated(message));
        let known = apimachinery::pod::condition(&pod.pod, "PodScheduled");
        let same = |condition: &k8s_openapi::api::core::v1::PodCondition| {
            condition.status == "False"
                && condition.reason.as_deref() == Some(reason)
                && condition.message.as_deref() == Some(message)
        };
        let nominated = pod.pod.status.as_ref().and_then(|status| status.nominated_node_name.as_deref());
        let node = match nomination {
            Nomination::Keep => None,
            Nomination::Clear => nominated.map(|_| json!(null)),
            Nomination::To { node, .. } => Some(json!(&**node)).filter(|_| nominated != Some(node)),
        };
        if known.is_some_and(same) && node.is_none() {
            return;
        }
        let since = known
            .filter(|condition| condition.status == "False")
            .and_then(|condition| serde_json::to_value(&condition.last_transition_time).ok())
            .filter(|time| !time.is_null())
            .unwrap_or_else(|| json!(apimachinery::time::now()));
        let mut status = json!({"conditions": [{
            "type": "PodScheduled",
            "status": "False",
            "reason": reason,
            "message": message,
            "lastTransitionTime": since,
            "observedGeneration": pod.pod.metadata.generation,
        }]});
        if let Some(node) = node {
            status["nominatedNodeName"] = node;
        }
        self.patch_status(&pod.facts, status).await;
    }

    /// Changes a pod's status; whether the pod is still there.
    async fn patch_status(&self, pod: &PodFacts, status: serde_json::Value) -> bool {
        match self.shared.handle.patch_pod_status(pod, &status).await {
            Ok(()) => true,
            // Deleted meanwhile: nobody is left to tell.
            Err(kube::Error::Api(status)) if status.code == 404 => false,
            Err(error) => {
                warn!(pod = %pod.key, %error, "cannot write the pod's status");
                true
            }
        }
    }

    /// Lets `change` work on the picture, and tries again the pods that what it returns may help.
    fn update(&self, change: impl FnOnce(&mut Snapshot, &mut Queue<Profiles>, Instant) -> EventSet) {
        self.update_at(|snapshot, queue, now| (change(snapshot, queue, now), None, None));
    }

    /// As [`Driver::update`], with the node and the pod that it is about.
    fn update_at(
        &self,
        change: impl FnOnce(&mut Snapshot, &mut Queue<Profiles>, Instant) -> (EventSet, Option<NodeId>, Option<PodFacts>),
    ) {
        let now = Instant::now();
        {
            let mut core = self.shared.core.lock();
            let core = &mut *core;
            let (kinds, node, pod) = change(&mut core.snapshot, &mut core.queue, now);
            if !kinds.is_empty() {
                let event = Event { kinds, node, pod: pod.as_ref() };
                self.happened(&core.snapshot, &mut core.queue, &event, now);
            }
            if !core.queue.has_next() {
                return;
            }
        }
        self.shared.wake.notify_one();
    }
}

fn refused(error: &FitError) -> Refused {
    Refused { helped_by: error.helped_by, places: error.places.clone() }
}

fn now_us() -> i64 {
    Timestamp::now().as_microsecond()
}
