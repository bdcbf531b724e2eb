//! Evicts pods from nodes with `NoExecute` taints that they do not tolerate, at once or when their time is up.
use crate::runtime::{Context, Index, Next, Reconcile, SyncError, WorkQueue, api_in, gone_is_fine, is_code, run};
use apimachinery::{meta::NamespacedName, node::tolerates, pod::is_terminal, time::steady};
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
};
use k8s_openapi::{
    api::core::v1::{Node, Pod, Taint, Toleration},
    jiff::Timestamp,
};
use kube::{
    Client, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use parking_lot::Mutex;
use serde_json::json;
use std::{collections::HashMap, sync::Arc, time::Duration};
use tracing::info;

const NAME: &str = "taint_eviction";
const WORKERS: usize = 8;

struct Controller {
    evictor: Evictor,
    nodes: Informer<Node>,
    pods: Informer<Pod>,
    waiting: Waiting,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("node-controller").await else { return };
    let (nodes, pods) = (context.informers.get::<Node>(), context.informers.get::<Pod>());
    let on_node: Arc<Index<Pod>> = context.pods_by_node();
    let controller = Arc::new(Controller {
        evictor: Evictor {
            recorder: context.recorder(&client, "taint-eviction-controller"),
            client,
            event: "TaintManagerEviction",
            reason: "DeletionByTaintManager",
            message: "Taint manager: deleting due to NoExecute taint",
            words: |pod| [format!("Marking for deletion Pod {pod}"), format!("Cancelling deletion of Pod {pod}")],
        },
        nodes: nodes.clone(),
        pods: pods.clone(),
        waiting: Waiting::default(),
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let (to, seen) = (queue.clone(), controller.clone());
    pods.on_change(move |change| {
        fn placed(pod: &Arc<Pod>) -> Option<(&Option<String>, &Option<Vec<Toleration>>)> {
            pod.spec.as_ref().map(|s| (&s.node_name, &s.tolerations))
        }
        if let Some(pod) = change.latest() {
            if change.new.is_none() {
                seen.waiting.forget(&NamespacedName::of(pod.as_ref()));
            } else if change.old.map(placed) != change.new.map(placed) && seen.is_on_tainted_node(pod) {
                to.add(NamespacedName::of(pod.as_ref()));
            }
        }
    });
    let to = queue.clone();
    nodes.on_change(move |change| {
        let evicting = |n: &Arc<Node>| no_execute(n);
        let (old, new) = (change.old.map(evicting).unwrap_or_default(), change.new.map(evicting).unwrap_or_default());
        if let Some(node) = change.latest()
            && old != new
        {
            on_node.get(&node.name_any()).iter().for_each(|p| to.add(NamespacedName::of(p.as_ref())));
        }
    });
    nodes.synced().await;
    pods.synced().await;
    run(NAME, queue, controller, WORKERS, context.shutdown.clone()).await;
}

impl Controller {
    /// A pod on a node without such taints, or on one that is not known yet, hears of it when the node gets one.
    fn is_on_tainted_node(&self, pod: &Pod) -> bool {
        let node = pod.spec.as_ref().and_then(|spec| self.nodes.get("", spec.node_name.as_deref()?));
        node.is_some_and(|node| !no_execute(&node).is_empty())
    }
}

fn no_execute(node: &Node) -> Vec<Taint> {
    let taints = node.spec.iter().flat_map(|s| s.taints.iter().flatten());
    taints.filter(|t| t.effect == "NoExecute").cloned().collect()
}

/// What is to become of a pod on a node with these taints.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    Stays,
    GoesAt(Timestamp),
    Goes,
}

impl Verdict {
    /// Of two, the one that comes first.
    pub(super) fn worse(self, other: Verdict) -> Verdict {
        match (self, other) {
            (Verdict::Goes, _) | (_, Verdict::Goes) => Verdict::Goes,
            (Verdict::GoesAt(a), Verdict::GoesAt(b)) => Verdict::GoesAt(a.min(b)),
            (at @ Verdict::GoesAt(_), _) | (_, at @ Verdict::GoesAt(_)) => at,
            _ => Verdict::Stays,
        }
    }
}

/// For how many seconds the tolerations of one taint bear it; None: for ever.
pub(super) type Bears = fn(&[&Toleration]) -> Option<i64>;

/// Of a node's taint the first toleration counts. As `GetMatchingTolerations`.
fn first(tolerations: &[&Toleration]) -> Option<i64> {
    tolerations.first().and_then(|t| t.toleration_seconds)
}

/// As `processPodOnNode`, with the time counted from when the taint was added, so that a restart does not prolong it, or
/// from when it was first `seen` if that was earlier by our clock, which does not jump.
pub(super) fn judge(
    tolerations: &[Toleration],
    taints: &[Taint],
    bears: Bears,
    seen: Timestamp,
    now: Timestamp,
) -> Verdict {
    let mut verdict = Verdict::Stays;
    let mut earliest: Option<Timestamp> = None;
    for taint in taints {
        let used: Vec<&Toleration> = tolerations.iter().filter(|t| tolerates(t, taint)).collect();
        if used.is_empty() {
            return Verdict::Goes;
        }
        let Some(seconds) = bears(&used) else { continue };
        let since = taint.time_added.as_ref().map_or(seen, |t| t.0).min(seen);
        let until = since + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        earliest = Some(earliest.map_or(until, |e| e.min(until)));
    }
    if let Some(until) = earliest {
        verdict = if until <= now { Verdict::Goes } else { Verdict::GoesAt(until) };
    }
    verdict
}

/// Who evicts, in events and conditions.
pub(super) struct Evictor {
    pub client: Client,
    pub recorder: Recorder,
    pub event: &'static str,
    pub reason: &'static str,
    pub message: &'static str,
    /// What it says of a pod that is to go, and of one that need not after all.
    pub words: fn(&NamespacedName) -> [String; 2],
}

impl Evictor {
    pub(super) async fn evict(&self, key: &NamespacedName, pod: &Pod) -> Result<(), kube::Error> {
        let [marking, _] = (self.words)(key);
        self.recorder.event(&reference(pod), Type::Normal, self.event, "", marking);
        let node = pod.spec.as_ref().and_then(|s| s.node_name.clone());
        info!(pod = %key, node, reason = self.reason, "evicting: taint not tolerated");
        let api = api_in::<Pod>(&self.client, &key.namespace);
        let condition = json!({"type": "DisruptionTarget", "status": "True", "reason": self.reason,
            "message": self.message, "lastTransitionTime": apimachinery::time::now(),
            "observedGeneration": pod.metadata.generation});
        let patch =
            Patch::Strategic(json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [condition]}}));
        gone_is_fine(api.patch_status(&key.name, &PatchParams::default(), &patch).await)?;
        let only_this = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
        match gone_is_fine(api.delete(&key.name, &parameters).await) {
            Err(error) if is_code(&error, 409) => Ok(()),
            outcome => outcome.map(|_| ()),
        }
    }

    pub(super) fn cancel(&self, key: &NamespacedName, pod: &Pod) {
        let [_, cancelling] = (self.words)(key);
        self.recorder.event(&reference(pod), Type::Normal, self.event, "", cancelling);
    }
}

/// Since when pods have borne taints, for those that do for a time. Bounded by the pods there are.
#[derive(Default)]
pub(super) struct Waiting(Mutex<HashMap<NamespacedName, Timestamp>>);

impl Waiting {
    pub(super) fn forget(&self, key: &NamespacedName) -> bool {
        self.0.lock().remove(key).is_some()
    }

    /// Carries out what `judge` says of a pod, by this process's clock: given when its taints were first seen, and now.
    pub(super) async fn carry_out(
        &self,
        evictor: &Evictor,
        key: &NamespacedName,
        pod: &Pod,
        judge: impl FnOnce(Timestamp, Timestamp) -> Verdict,
    ) -> Result<Next, SyncError> {
        let now = steady();
        let seen = self.0.lock().get(key).copied().unwrap_or(now);
        match judge(seen, now) {
            Verdict::Stays => {
                if self.forget(key) {
                    evictor.cancel(key, pod);
                }
                Ok(Next::Settled)
            }
            Verdict::GoesAt(at) => {
                self.0.lock().insert(key.clone(), seen);
                let wait = Duration::try_from(at.duration_since(now)).unwrap_or_default();
                Ok(Next::After(wait.max(Duration::from_millis(100))))
            }
            Verdict::Goes => {
                evictor.evict(key, pod).await?;
                self.forget(key);
                Ok(Next::Settled)
            }
        }
    }
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(pod) = self.pods.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        if pod.metadata.deletion_timestamp.is_some() || is_terminal(&pod) {
            return Ok(Next::Settled);
        }
        let Some(spec) = &pod.spec else { return Ok(Next::Settled) };
        let node = spec.node_name.as_deref().and_then(|n| self.nodes.get("", n));
        let taints = node.map(|n| no_execute(&n)).unwrap_or_default();
        let tolerations = spec.tolerations.as_deref().unwrap_or_default();
        self.waiting
            .carry_out(&self.evictor, key, &pod, |seen, now| judge(tolerations, &taints, first, seen, now))
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn pods_go_as_their_tolerations_say() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let taint = json!({"key": "node.kubernetes.io/unreachable", "effect": "NoExecute",
            "timeAdded": "2026-01-01T00:00:00Z"});
        let other = json!({"key": "maintenance", "value": "now", "effect": "NoExecute"});
        let seen: Timestamp = "2026-01-01T00:00:50Z".parse().unwrap();
        let in_seconds = |s: u64| Verdict::GoesAt(now + Duration::from_secs(s));
        let forever = json!({"operator": "Exists"});
        let timed = |s: i64| {
            json!({"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute",
            "tolerationSeconds": s})
        };
        let parse = |v: &[Value]| -> (Vec<Toleration>, ()) {
            (v.iter().map(|t| serde_json::from_value(t.clone()).unwrap()).collect(), ())
        };
        for (tolerations, taints, expected) in [
            (vec![], vec![], Verdict::Stays),
            (vec![], vec![&taint], Verdict::Goes),
            (vec![forever.clone()], vec![&taint, &other], Verdict::Stays),
            (vec![timed(300)], vec![&taint], in_seconds(240)),
            (vec![timed(30)], vec![&taint], Verdict::Goes),
            (vec![timed(0)], vec![&taint], Verdict::Goes),
            (vec![timed(120), timed(300)], vec![&taint], in_seconds(60)),
            (vec![timed(300), timed(120)], vec![&taint], in_seconds(240)),
            (vec![forever.clone(), timed(30)], vec![&taint], Verdict::Stays),
            (vec![timed(300)], vec![&taint, &other], Verdict::Goes),
            (
                vec![json!({"key": "maintenance", "operator": "Exists", "tolerationSeconds": 30})],
                vec![&other],
                in_seconds(20),
            ),
            (
                vec![json!({"key": "maintenance", "operator": "Exists", "tolerationSeconds": 9})],
                vec![&other],
                Verdict::Goes,
            ),
            (vec![json!({"key": "maintenance", "value": "now"})], vec![&other], Verdict::Stays),
            (vec![json!({"key": "maintenance", "value": "later"})], vec![&other], Verdict::Goes),
        ] {
            let taints: Vec<Taint> = taints.into_iter().map(|t| serde_json::from_value(t.clone()).unwrap()).collect();
            assert_eq!(
                judge(&parse(&tolerations).0, &taints, first, seen, now),
                expected,
                "{tolerations:?} {taints:?}"
            );
        }
    }
}
