//! What a StatefulSet needs next: pods in their order, claims that are theirs, updates from the last pod down. Pure.
use super::identity::{self, REVISION_LABEL};
use crate::controllers::replicaset::plan::availability;
use apimachinery::pod::{is_ready, is_terminal, phase};
use k8s_openapi::{
    api::{
        apps::v1::{StatefulSet, StatefulSetSpec, StatefulSetStatus},
        core::v1::{PersistentVolumeClaim, Pod, PodTemplateSpec},
    },
    apimachinery::pkg::{apis::meta::v1::OwnerReference, util::intstr::IntOrString},
    jiff::Timestamp,
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// A template under the name of its revision.
#[derive(Clone, Debug)]
pub struct Revision {
    pub name: String,
    pub template: PodTemplateSpec,
}

/// What is planned from.
pub struct Observed<'a> {
    pub set: &'a StatefulSet,
    pub pods: &'a [Arc<Pod>],
    /// What the pods below the partition, and those not updated yet, are made from.
    pub current: &'a Revision,
    pub update: &'a Revision,
    pub claims: &'a dyn Fn(&str) -> Option<Arc<PersistentVolumeClaim>>,
    pub now: Timestamp,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// The claim's owners change.
    OwnClaim(Arc<PersistentVolumeClaim>, Vec<OwnerReference>),
    /// Claims that a pod lacks.
    MakeClaims(Vec<PersistentVolumeClaim>, Arc<Pod>),
    /// A pod, and its claims that are missing.
    Create(Box<Pod>, Vec<PersistentVolumeClaim>),
    Label(Arc<Pod>, BTreeMap<String, String>),
    Delete(Arc<Pod>),
    /// A pod that is made anew once it is gone.
    Recreate(Arc<Pod>),
}

/// What to do, in this order.
#[derive(Debug, Default)]
pub struct Plan {
    pub actions: Vec<Action>,
    pub status: StatefulSetStatus,
    pub check_again: Option<Duration>,
}

/// Whether the rest of the step may follow.
type GoOn = bool;

struct Step<'a> {
    observed: &'a Observed<'a>,
    spec: &'a StatefulSetSpec,
    /// One at a time: `OrderedReady`.
    monotonic: bool,
    actions: Vec<Action>,
}

/// As `updateStatefulSet`.
pub fn plan(observed: &Observed<'_>) -> Plan {
    let set = observed.set;
    let Some(spec) = &set.spec else { return Plan::default() };
    let start = spec.ordinals.as_ref().and_then(|o| o.start).unwrap_or(0);
    let replicas = spec.replicas.unwrap_or(1).max(0);
    let mut slots: Vec<Option<Arc<Pod>>> = vec![None; usize::try_from(replicas).unwrap_or(0)];
    let mut condemned: Vec<(i32, Arc<Pod>)> = Vec::new();
    for pod in observed.pods {
        let Some(ordinal) = identity::ordinal(set, pod) else { continue };
        match usize::try_from(ordinal - start).ok().and_then(|at| slots.get_mut(at)) {
            Some(slot) => *slot = Some(pod.clone()),
            None => condemned.push((ordinal, pod.clone())),
        }
    }
    condemned.sort_by_key(|(ordinal, _)| -ordinal);
    let (status, check_again) = status(observed, spec, replicas);
    let monotonic = spec.pod_management_policy.as_deref() != Some("Parallel");
    let mut step = Step { observed, spec, monotonic, actions: Vec::new() };
    if set.metadata.deletion_timestamp.is_none() && step.keep(start, &slots) && step.shrink(&slots, &condemned) {
        step.roll(&slots);
    }
    Plan { actions: step.actions, status, check_again }
}

fn revision(pod: &Pod) -> &str {
    pod.metadata.labels.as_ref().and_then(|l| l.get(REVISION_LABEL)).map_or("", String::as_str)
}

fn is_going(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

fn is_running_and_ready(pod: &Pod) -> bool {
    phase(pod) == "Running" && is_ready(pod)
}

impl Step<'_> {
    fn is_available(&self, pod: &Pod) -> bool {
        let min_ready = self.spec.min_ready_seconds.unwrap_or(0);
        !is_going(pod) && is_running_and_ready(pod) && availability(pod, min_ready, self.observed.now).is_ok()
    }

    /// A pod of a revision that is neither wanted any more nor wanted yet, and does not work: nothing is lost with it, and
    /// nobody could repair it, so an update that was broken does not stand in the way of the next.
    fn is_given_up(&self, pod: &Pod) -> bool {
        let Observed { current, update, .. } = self.observed;
        let wanted = [current.name.as_str(), update.name.as_str()].contains(&revision(pod));
        !wanted && self.rolls().is_some() && !is_going(pod) && !self.is_available(pod)
    }

    /// The partition and how many pods may be unavailable; None when pods are updated by hand.
    fn rolls(&self) -> Option<(usize, usize)> {
        let strategy = self.spec.update_strategy.as_ref();
        if strategy.and_then(|s| s.type_.as_deref()) == Some("OnDelete") {
            return None;
        }
        let rolling = strategy.and_then(|s| s.rolling_update.as_ref());
        let replicas = usize::try_from(self.spec.replicas.unwrap_or(1)).unwrap_or(0);
        let unavailable = match rolling.and_then(|r| r.max_unavailable.as_ref()) {
            None => 1,
            Some(IntOrString::Int(n)) => usize::try_from(*n).unwrap_or(0),
            Some(IntOrString::String(text)) => {
                let percent = text.strip_suffix('%').and_then(|p| p.parse::<usize>().ok()).unwrap_or(0);
                replicas * percent / 100
            }
        };
        let partition = rolling.and_then(|r| r.partition).and_then(|p| usize::try_from(p).ok()).unwrap_or(0);
        Some((partition, unavailable.max(1)))
    }

    fn missing_claims(&self, ordinal: i32) -> Vec<PersistentVolumeClaim> {
        let there = |c: &PersistentVolumeClaim| (self.observed.claims)(c.metadata.name.as_deref().unwrap_or_default());
        let claims = identity::claims(self.observed.set, ordinal);
        claims.into_iter().filter(|c| there(c).is_none()).collect()
    }

    fn own_claims(&mut self, ordinal: i32, condemned: Option<&Pod>) {
        for wanted in identity::claims(self.observed.set, ordinal) {
            let Some(there) = (self.observed.claims)(wanted.metadata.name.as_deref().unwrap_or_default()) else {
                continue;
            };
            if let Some(owners) = identity::owners(self.observed.set, &there, condemned) {
                self.actions.push(Action::OwnClaim(there, owners));
            }
        }
    }

    /// Every ordinal has its pod, from the first up. As `processReplica`.
    fn keep(&mut self, start: i32, slots: &[Option<Arc<Pod>>]) -> GoOn {
        for (ordinal, slot) in (start..).zip(slots) {
            if !self.keep_one(ordinal, ordinal - start, slot.as_ref()) && self.monotonic {
                return false;
            }
        }
        true
    }

    fn keep_one(&mut self, ordinal: i32, index: i32, slot: Option<&Arc<Pod>>) -> GoOn {
        let set = self.observed.set;
        let Some(pod) = slot else {
            let name = identity::pod_name(set, ordinal);
            let claims = identity::claims(set, ordinal);
            let mut there = claims.iter().filter_map(|c| (self.observed.claims)(c.metadata.name.as_deref()?));
            if !there.any(|c| identity::is_stale(&c, &name)) {
                let pod = self.new_pod(ordinal, index);
                self.actions.push(Action::Create(Box::new(pod), self.missing_claims(ordinal)));
            }
            return false;
        };
        if is_terminal(pod) || self.is_given_up(pod) {
            if !is_going(pod) {
                self.actions.push(Action::Recreate(pod.clone()));
            }
            return false;
        }
        if phase(pod) == "Pending" {
            let missing = self.missing_claims(ordinal);
            if !missing.is_empty() {
                self.actions.push(Action::MakeClaims(missing, pod.clone()));
            }
        }
        if self.monotonic && !self.is_available(pod) {
            return false;
        }
        self.own_claims(ordinal, None);
        let lost = identity::lost_labels(set, pod, ordinal);
        if !lost.is_empty() {
            self.actions.push(Action::Label(pod.clone(), lost));
        }
        true
    }

    /// As `newVersionedStatefulSetPod`.
    fn new_pod(&self, ordinal: i32, index: i32) -> Pod {
        let Observed { set, current, update, .. } = self.observed;
        let below = self.rolls().is_some_and(|(partition, _)| usize::try_from(index).is_ok_and(|i| i < partition));
        let revision = if below { current } else { update };
        identity::pod(set, &revision.template, &revision.name, ordinal)
    }

    /// Pods beyond the last ordinal go, the highest first. As `processCondemned`.
    fn shrink(&mut self, slots: &[Option<Arc<Pod>>], condemned: &[(i32, Arc<Pod>)]) -> GoOn {
        for (ordinal, pod) in condemned {
            self.own_claims(*ordinal, Some(pod));
        }
        // Of the pods that do not work the first in order may always go.
        let mut all = slots.iter().flatten().chain(condemned.iter().rev().map(|(_, p)| p));
        let first_unhealthy = all.find(|p| !self.is_available(p)).cloned();
        for (_, pod) in condemned {
            if is_going(pod) {
                if self.monotonic {
                    return false;
                }
                continue;
            }
            let is_first = first_unhealthy.as_ref().is_some_and(|p| p.metadata.uid == pod.metadata.uid);
            if self.monotonic && !self.is_available(pod) && !is_first {
                return false;
            }
            self.actions.push(Action::Delete(pod.clone()));
            if self.monotonic {
                return false;
            }
        }
        true
    }

    /// Pods of another revision go, the highest first, as far as enough stay available.
    /// As `updateStatefulSetAfterInvariantEstablished`.
    fn roll(&mut self, slots: &[Option<Arc<Pod>>]) {
        let Some((partition, most)) = self.rolls() else { return };
        let unavailable = slots.iter().filter(|p| p.as_ref().is_none_or(|p| !self.is_available(p))).count();
        let mut room = most.saturating_sub(unavailable);
        let old = slots.iter().skip(partition).rev().flatten();
        for pod in old.filter(|p| revision(p) != self.observed.update.name && !is_going(p) && !is_terminal(p)) {
            if room == 0 {
                return;
            }
            let action = Action::Delete(pod.clone());
            if !self.actions.contains(&action) {
                room -= 1;
                self.actions.push(action);
            }
        }
    }
}

/// As `computeReplicaStatus` and `completeRollingUpdate`; and when a pod will have been ready for long enough.
fn status(observed: &Observed<'_>, spec: &StatefulSetSpec, replicas: i32) -> (StatefulSetStatus, Option<Duration>) {
    let Observed { set, current, update, .. } = observed;
    let members = || observed.pods.iter().filter(|p| identity::ordinal(set, p).is_some());
    let count = |test: &dyn Fn(&Pod) -> bool| i32::try_from(members().filter(|p| test(p)).count()).unwrap_or(i32::MAX);
    let min_ready = spec.min_ready_seconds.unwrap_or(0);
    let mut status = StatefulSetStatus {
        observed_generation: set.metadata.generation,
        replicas: count(&|_| true),
        ready_replicas: Some(count(&is_running_and_ready)),
        available_replicas: Some(count(&|p| {
            is_running_and_ready(p) && availability(p, min_ready, observed.now).is_ok()
        })),
        current_replicas: Some(count(&|p| !is_going(p) && revision(p) == current.name)),
        updated_replicas: Some(count(&|p| !is_going(p) && revision(p) == update.name)),
        current_revision: Some(current.name.clone()),
        update_revision: Some(update.name.clone()),
        collision_count: set.status.as_ref().and_then(|s| s.collision_count).or(Some(0)),
        conditions: set.status.as_ref().and_then(|s| s.conditions.clone()),
    };
    let rolling = spec.update_strategy.as_ref().and_then(|s| s.type_.as_deref()) != Some("OnDelete");
    let all = [status.updated_replicas, status.ready_replicas, Some(status.replicas)];
    if rolling && all == [Some(replicas); 3] {
        status.current_replicas = status.updated_replicas;
        status.current_revision.clone_from(&status.update_revision);
    }
    let waits = members().filter_map(|p| availability(p, min_ready, observed.now).err().flatten());
    (status, waits.min())
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
