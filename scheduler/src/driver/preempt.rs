//! Preemption carried out: the victims are marked and deleted, and less important pods give up the node.

use std::collections::HashMap;
use std::sync::Arc;

use component_base::events::Type;
use futures::future::join_all;
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::Driver;
use crate::cache::{PendingPod, PodFacts};
use crate::framework::{Candidate, FitError, Nomination};
use crate::plugins::default_preemption::cost;

/// Victims that are read for an extender at once.
const FETCHES_MAX: usize = 16;

impl Driver {
    /// Has extenders judge the nodes that could be made free, and takes the cheapest of those that they leave.
    pub(super) async fn consult(&self, pod: &PendingPod, error: &mut FitError) {
        let Some(whole) = self.shared.extenders.preempt(pod) else { return };
        let candidates = std::mem::take(&mut error.candidates);
        let objects = if whole { self.objects(&candidates).await } else { HashMap::new() };
        let left = match self.shared.handle.pod(&pod.facts.key).await {
            Ok(object) => self.shared.extenders.candidates(pod, &object, candidates, &objects).await,
            Err(error) => Err(error.to_string()),
        };
        let mut core = self.shared.core.lock();
        let snapshot = &mut core.snapshot;
        let chosen = left.and_then(|left| {
            let known = |one: &Candidate| one.victims.iter().all(|uid| snapshot.node_of(uid) == Some(&one.node));
            let cost = |one: &Candidate| {
                let victims: Vec<&PodFacts> = one.victims.iter().filter_map(|uid| snapshot.facts_of(uid)).collect();
                cost(&victims, one.violations)
            };
            let best = left.into_iter().filter(known).min_by_key(cost);
            best.ok_or_else(|| "no candidate node for preemption".to_owned())
        });
        match chosen {
            Ok(Candidate { node, victims, .. }) => {
                snapshot.nominate(&pod.facts, Some(&node));
                error.nomination = Nomination::To { node, victims };
            }
            Err(cause) => {
                snapshot.withdraw_nomination(&pod.facts.uid);
                error.nomination = Nomination::Clear;
                error.message.push_str(&format!(" preemption: {cause}"));
            }
        }
    }

    /// The victims as the server has them.
    async fn objects(&self, candidates: &[Candidate]) -> HashMap<Arc<str>, Value> {
        let keys: Vec<_> = {
            let core = self.shared.core.lock();
            let victims = candidates.iter().flat_map(|one| &one.victims);
            victims.filter_map(|uid| Some((uid.clone(), core.snapshot.facts_of(uid)?.key.clone()))).collect()
        };
        let handle = &self.shared.handle;
        let fetched = stream::iter(keys).map(|(uid, key)| async move { Some((uid, handle.pod(&key).await.ok()?)) });
        fetched.buffer_unordered(FETCHES_MAX).filter_map(std::future::ready).collect().await
    }

    /// Makes a node free of `victims` for the pod; whether all of them are going. As `prepareCandidateAsync`.
    pub(super) async fn preempt(&self, pod: &PendingPod, node: &str, victims: &[Arc<str>]) -> bool {
        let (victims, lower) = {
            let mut core = self.shared.core.lock();
            let found: Vec<PodFacts> = victims.iter().filter_map(|uid| core.snapshot.facts_of(uid).cloned()).collect();
            // Pods that were promised the node must look again.
            let lower = core.snapshot.nominated_below(node, pod.facts.priority);
            for other in &lower {
                core.snapshot.withdraw_nomination(&other.uid);
                core.queue.try_again(&other.uid, std::time::Instant::now());
            }
            (found, lower)
        };
        let cleared = lower.iter().map(|other| self.patch_status(other, json!({"nominatedNodeName": null})));
        join_all(cleared).await;
        info!(pod = %pod.facts.key, %node, victims = victims.len(), "making room");
        join_all(victims.iter().map(|victim| self.evict(pod, node, victim))).await.into_iter().all(|gone| gone)
    }

    async fn evict(&self, pod: &PendingPod, node: &str, victim: &PodFacts) -> bool {
        if victim.terminating {
            return true;
        }
        let message = format!("{}: preempting to accommodate a higher priority pod", pod.scheduler_name());
        let condition = json!({"conditions": [{"type": "DisruptionTarget", "status": "True",
            "reason": "PreemptionByScheduler", "message": message, "lastTransitionTime": apimachinery::time::now(),
            "observedGeneration": victim.generation}]});
        if !self.patch_status(victim, condition).await {
            return true;
        }
        match self.shared.handle.delete_pod(victim).await {
            Ok(()) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => return true,
            Err(error) => {
                warn!(pod = %victim.key, %error, "cannot delete the victim");
                return false;
            }
        }
        let message = format!("Preempted by pod {} on node {node}", pod.facts.uid);
        let handle = &self.shared.handle;
        handle.event_about(victim, pod.scheduler_name(), Type::Normal, "Preempted", "Preempting", message);
        true
    }
}
