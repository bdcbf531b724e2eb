//! The scheduling framework: what a plugin is, and at which points of a pod's way to a node it may speak.
//!
//! The points and their meaning are Kubernetes': PreEnqueue, QueueSort, PreFilter, Filter, PostFilter, PreScore, Score and
//! NormalizeScore, Reserve, Permit, PreBind, Bind, PostBind. Up to Permit a plugin is a pure function of the pod and the
//! snapshot; only the binding points, which run in a task of their own, do I/O.
//!
//! A filter answers without allocating: a refusal is a few bits, one a reason, which the plugin turns into words only when
//! the pod cannot be placed at all.

use std::any::Any;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use apimachinery::meta::NamespacedName;
use component_base::client::send;
use component_base::events::{Recorder, Type};
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::Error::BuildRequest;
use kube::Resource as _;
use kube::api::{DeleteParams, GetParams, Patch, PatchParams, Preconditions};
use rand::Rng;
use serde_json::{Value, json};

use crate::cache::{NodeId, PendingPod, PodFacts, Snapshot};

mod cycle;
mod diagnosis;
mod events;
mod profile;

pub use cycle::Cycle;
pub use diagnosis::{Diagnosis, FitError, truncated};
pub use events::{Event, EventSet};
pub use profile::{Profile, ProfileError};

/// The highest normalised score.
pub const MAX_NODE_SCORE: i64 = 100;

/// The points at which a plugin may speak, as a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Points(u16);

impl Points {
    pub const PRE_ENQUEUE: Points = Points(1);
    pub const QUEUE_SORT: Points = Points(1 << 1);
    pub const PRE_FILTER: Points = Points(1 << 2);
    pub const FILTER: Points = Points(1 << 3);
    pub const POST_FILTER: Points = Points(1 << 4);
    pub const PRE_SCORE: Points = Points(1 << 5);
    pub const SCORE: Points = Points(1 << 6);
    pub const RESERVE: Points = Points(1 << 7);
    pub const PERMIT: Points = Points(1 << 8);
    pub const PRE_BIND: Points = Points(1 << 9);
    pub const BIND: Points = Points(1 << 10);
    pub const POST_BIND: Points = Points(1 << 11);

    /// Both sets together.
    pub const fn and(self, other: Points) -> Points {
        Points(self.0 | other.0)
    }

    pub const fn contains(self, point: Points) -> bool {
        self.0 & point.0 == point.0
    }
}

/// How the points of one attempt went and how long they took, for the metrics: a point, a status, a time.
#[derive(Debug, Default)]
pub struct Timings(Vec<(&'static str, &'static str, Duration)>);

impl Timings {
    /// Notes a point that began at that time; gives the time now, at which the next one may begin.
    pub fn note(&mut self, point: &'static str, status: &'static str, began: Instant) -> Instant {
        let now = Instant::now();
        self.0.push((point, status, now.duration_since(began)));
        now
    }

    pub fn drain(&mut self) -> impl Iterator<Item = (&'static str, &'static str, Duration)> {
        self.0.drain(..)
    }
}

/// The points at which it is counted how often plugins are asked.
pub const COUNTED_POINTS: [&str; 4] = ["PreFilter", "Filter", "PreScore", "Score"];

/// How often the plugins of a profile were asked in one attempt, for the metrics: by place, at the [`COUNTED_POINTS`].
#[derive(Debug, Default)]
pub struct Evaluations(Vec<[u64; 4]>);

impl Evaluations {
    /// Begins anew, for so many plugins.
    pub fn begin(&mut self, plugins: usize) {
        self.0.clear();
        self.0.resize(plugins, [0; 4]);
    }

    /// A plugin was asked so many times at one of the [`COUNTED_POINTS`].
    pub fn add(&mut self, place: u8, point: usize, times: u64) {
        self.0[usize::from(place)][point] += times;
    }

    pub fn counts(&self) -> &[[u64; 4]] {
        &self.0
    }
}

/// What a plugin works out once per pod for its later points.
pub type State = Box<dyn Any + Send + Sync>;

/// A plugin's own state.
///
/// # Panics
/// If it is of another plugin: the framework hands each plugin what that plugin made.
pub fn state_of<T: 'static>(state: &State) -> &T {
    state.downcast_ref().expect("a plugin's state is of the type that the plugin made")
}

/// A filter's answer for one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    Refuse(Refusal),
}

/// Why a node was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// One bit a reason; [`Plugin::reason`] gives the words.
    pub reasons: u64,
    /// Whether removing pods from the node could help (Unschedulable) or not (UnschedulableAndUnresolvable).
    pub resolvable: bool,
}

impl Verdict {
    /// Refuses a node that could be made to fit.
    pub const fn unschedulable(reasons: u64) -> Verdict {
        Verdict::Refuse(Refusal { reasons, resolvable: true })
    }

    /// Refuses a node that preemption cannot make fit.
    pub const fn unresolvable(reasons: u64) -> Verdict {
        Verdict::Refuse(Refusal { reasons, resolvable: false })
    }

    /// `Accept` if `fits`, else the first reason, not to be helped by preemption.
    pub const fn resolvable_never(fits: bool) -> Verdict {
        if fits { Verdict::Accept } else { Verdict::unresolvable(1) }
    }

    pub const fn is_accept(self) -> bool {
        matches!(self, Verdict::Accept)
    }
}

/// What PreFilter says.
pub enum PreFilter {
    /// The plugin's filter has nothing to say about this pod.
    Skip,
    /// Filter with this state.
    Proceed(State),
    /// Filter with this state, and only these nodes come into question.
    Only(State, Vec<NodeId>),
    /// No node can do.
    Refuse(String),
}

/// What PreScore says.
pub enum PreScore {
    /// The plugin's score has nothing to say about this pod.
    Skip,
    Proceed(State),
}

/// What Permit says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Permit {
    Allow,
    Reject(String),
}

/// What Bind says.
#[derive(Debug)]
pub enum Bind {
    /// Not this plugin's pod: the next one is asked.
    Skip,
    Bound,
    Failed(String),
}

/// The place of a pod in the queue: the lowest comes first.
pub type QueueKey = (i64, i64);

/// What plugins reach the outside world with while binding.
#[derive(Clone)]
pub struct Handle {
    pub client: kube::Client,
    /// One for each profile: an event names its scheduler.
    pub recorders: Arc<HashMap<String, Recorder>>,
    /// Lets one look at the picture as it is now, and change what one has reserved there.
    pub picture: Arc<dyn Fn(&mut dyn FnMut(&mut Snapshot)) + Send + Sync>,
}

impl Handle {
    /// The pod as the server has it.
    pub async fn pod(&self, key: &NamespacedName) -> Result<Value, kube::Error> {
        self.client.request(pods(key).get(&key.name, &GetParams::default()).map_err(BuildRequest)?).await
    }

    /// Changes a pod's status; nobody reads the answer.
    pub async fn patch_pod_status(&self, pod: &PodFacts, status: &Value) -> Result<(), kube::Error> {
        let patch = Patch::Strategic(json!({"metadata": {"uid": &*pod.uid}, "status": status}));
        let request = pods(&pod.key).patch_subresource("status", &pod.key.name, &PatchParams::default(), &patch);
        send(&self.client, request).await.map(drop)
    }

    /// Deletes that very pod.
    pub async fn delete_pod(&self, pod: &PodFacts) -> Result<(), kube::Error> {
        let preconditions = Some(Preconditions { uid: Some(pod.uid.to_string()), resource_version: None });
        let params = DeleteParams { preconditions, ..DeleteParams::default() };
        let request = pods(&pod.key).delete(&pod.key.name, &params);
        send(&self.client, request).await.map(drop)
    }

    /// Tells of a pod that is being placed.
    pub fn event(&self, pod: &PendingPod, kind: Type, reason: &str, action: &str, message: String) {
        self.event_about(&pod.facts, pod.scheduler_name(), kind, reason, action, message);
    }

    /// Tells of any pod, on behalf of the profile of that name.
    pub fn event_about(
        &self,
        pod: &PodFacts,
        scheduler_name: &str,
        kind: Type,
        reason: &str,
        action: &str,
        message: String,
    ) {
        let Some(recorder) = self.recorders.get(scheduler_name) else { return };
        let about = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(pod.key.namespace.clone()),
            name: Some(pod.key.name.clone()),
            uid: Some(pod.uid.to_string()),
            ..ObjectReference::default()
        };
        recorder.event(&about, kind, reason, action, message);
    }

    /// What `look` sees in the picture.
    pub fn look<T>(&self, look: impl FnOnce(&mut Snapshot) -> T) -> Option<T> {
        let (mut look, mut seen) = (Some(look), None);
        (self.picture)(&mut |snapshot| seen = look.take().map(|look| look(snapshot)));
        seen
    }
}

fn pods(key: &NamespacedName) -> kube::core::Request {
    kube::core::Request::new(Pod::url_path(&(), Some(&key.namespace)))
}

/// What PostFilter did for a pod that fits nowhere.
#[derive(Debug, Default)]
pub struct PostFilter {
    /// For the message.
    pub words: Option<String>,
    pub nomination: Nomination,
    /// All nodes that could be made free, for extenders to judge.
    pub candidates: Vec<Candidate>,
    /// Claims to give free, by `namespace/name`.
    pub deallocate: Option<Arc<str>>,
}

/// A node that can be made free for a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub node: Arc<str>,
    /// The pods that would have to go, by UID.
    pub victims: Vec<Arc<str>>,
    /// How many of them a disruption budget protects.
    pub violations: usize,
}

/// What becomes of `status.nominatedNodeName`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Nomination {
    #[default]
    Keep,
    Clear,
    /// To the node, once the victims are gone.
    To {
        node: Arc<str>,
        victims: Vec<Arc<str>>,
    },
}

/// A scheduling plugin. It implements the points that [`Plugin::points`] names; the others are never called.
pub trait Plugin: Send + Sync {
    /// The name in configurations and messages.
    fn name(&self) -> &'static str;

    /// Where the plugin speaks.
    fn points(&self) -> Points;

    /// The changes that may make a pod fit which this plugin refused. As `EventsToRegister`.
    fn events(&self) -> EventSet {
        EventSet::ALL
    }

    /// Whether a filter's verdict depends on nothing but the pod, the node and the pods there.
    fn is_local(&self) -> bool {
        true
    }

    /// Whether a pod that the plugin refused may fit now. As `QueueingHintFn`: what is local is judged again.
    fn hint(&self, pod: &PendingPod, snapshot: &Snapshot, event: &Event<'_>) -> bool {
        let Some(node) = event.node.filter(|_| self.is_local() && self.points().contains(Points::FILTER)) else {
            return true;
        };
        if !snapshot.nodes.present[node.index()] {
            return false;
        }
        let pre_filter = match self.points().contains(Points::PRE_FILTER) {
            true => self.pre_filter(pod, snapshot),
            false => PreFilter::Proceed(Box::new(())),
        };
        match pre_filter {
            PreFilter::Skip => true,
            PreFilter::Proceed(state) => self.filter(&state, pod, snapshot, node).is_accept(),
            PreFilter::Only(state, nodes) => {
                nodes.contains(&node) && self.filter(&state, pod, snapshot, node).is_accept()
            }
            PreFilter::Refuse(_) => false,
        }
    }

    /// Whether the pod may enter the active queue; the error says why not.
    fn pre_enqueue(&self, _pod: &PendingPod) -> Result<(), String> {
        Ok(())
    }

    /// Why the pod may not be tried yet, where that shows in the picture alone: it waits for one of the plugin's events as if it
    /// were gated, and nobody is told. As PreEnqueue of plugins that look at other objects.
    fn holds_back(&self, _pod: &PendingPod, _snapshot: &Snapshot) -> Option<String> {
        None
    }

    /// The order of the active queue; `queued_us` is since when the pod waits for this attempt.
    fn queue_key(&self, _pod: &PendingPod, queued_us: i64) -> QueueKey {
        (0, queued_us)
    }

    fn pre_filter(&self, _pod: &PendingPod, _snapshot: &Snapshot) -> PreFilter {
        PreFilter::Proceed(Box::new(()))
    }

    fn filter(&self, _state: &State, _pod: &PendingPod, _snapshot: &Snapshot, _node: NodeId) -> Verdict {
        Verdict::Accept
    }

    /// The words for the reason with this number.
    fn reason(&self, _state: &State, _number: u32) -> Cow<'static, str> {
        Cow::Borrowed(self.name())
    }

    /// The numbers behind a filter's verdict on a node, for explanations.
    fn numbers(&self, _state: &State, _pod: &PendingPod, _snapshot: &Snapshot, _node: NodeId) -> Value {
        Value::Null
    }

    /// Supposes that `other` is on the node (`sign` 1) or no longer is (-1); the snapshot's columns say so already.
    /// As PreFilterExtensions.
    fn account(
        &self,
        _state: &mut State,
        _pod: &PendingPod,
        _snapshot: &Snapshot,
        _other: &PodFacts,
        _node: NodeId,
        _sign: i64,
    ) {
    }

    /// Called when no node fits; says what it would do about it. The snapshot is as before when it returns.
    fn post_filter(
        &self,
        _cycle: &mut Cycle<'_>,
        _snapshot: &mut Snapshot,
        _diagnosis: &Diagnosis,
        _rng: &mut dyn Rng,
    ) -> PostFilter {
        PostFilter::default()
    }

    fn pre_score(&self, _pod: &PendingPod, _snapshot: &Snapshot, _feasible: &[NodeId]) -> PreScore {
        PreScore::Proceed(Box::new(()))
    }

    fn score(&self, _state: &State, _pod: &PendingPod, _snapshot: &Snapshot, _node: NodeId) -> i64 {
        0
    }

    /// Brings the raw scores of all feasible nodes into 0 to [`MAX_NODE_SCORE`]. As `NormalizeScore`.
    fn normalize(&self, _state: &State, _scores: &mut [i64]) {}

    /// Takes what the plugin must hold for the pod, and hands it to PreBind; an error undoes the decision.
    fn reserve(&self, _pod: &PendingPod, _snapshot: &mut Snapshot, _node: NodeId) -> Result<State, String> {
        Ok(Box::new(()))
    }

    /// Takes a reservation back; called for all Reserve plugins, in reverse, whether or not they reserved.
    fn unreserve(&self, _pod: &PendingPod, _snapshot: &mut Snapshot) {}

    fn permit(&self, _pod: &PendingPod, _node: &str) -> Permit {
        Permit::Allow
    }

    /// Whether PreBind has anything to do about what was reserved. As `PreBindPreFlight`.
    fn must_pre_bind(&self, _reserved: &State) -> bool {
        true
    }

    fn pre_bind<'a>(
        &'a self,
        _handle: &'a Handle,
        _reserved: &'a State,
        _pod: &'a PendingPod,
        _node: &'a str,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }

    fn bind<'a>(&'a self, _handle: &'a Handle, _pod: &'a PendingPod, _node: &'a str) -> BoxFuture<'a, Bind> {
        Box::pin(async { Bind::Skip })
    }

    fn post_bind(&self, _pod: &PendingPod, _node: &str) {}
}

/// Scales scores so that the highest becomes [`MAX_NODE_SCORE`], turned round if `reverse`. As `DefaultNormalizeScore`.
pub fn normalize_by_maximum(scores: &mut [i64], reverse: bool) {
    let highest = scores.iter().copied().max().unwrap_or(0);
    for score in scores {
        if highest == 0 {
            *score = if reverse { MAX_NODE_SCORE } else { *score };
            continue;
        }
        let scaled = MAX_NODE_SCORE * *score / highest;
        *score = if reverse { MAX_NODE_SCORE - scaled } else { scaled };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalisation_scales_to_the_maximum() {
        let cases: [(&[i64], bool, &[i64]); 5] = [
            (&[1, 2, 3, 4], false, &[25, 50, 75, 100]),
            (&[1, 2, 3, 4], true, &[75, 50, 25, 0]),
            (&[1000, 10, 20, 30], false, &[100, 1, 2, 3]),
            (&[0, 0], true, &[100, 100]),
            (&[0, 0], false, &[0, 0]),
        ];
        for (raw, reverse, expected) in cases {
            let mut scores = raw.to_vec();
            normalize_by_maximum(&mut scores, reverse);
            assert_eq!(scores, expected, "{raw:?} reverse={reverse}");
        }
    }
}
