//! What a Deployment's next step is: rolling update, recreate, scaling, cleaning up. Pure.
//!
//! One step changes sizes in one direction only, as upstream's: first the new set grows, then, in a step of its own that
//! the change triggers, the old ones shrink. The status that goes with the step is part of the plan.
use super::{
    sets::{
        self, DESIRED_REPLICAS, MAX_REPLICAS, REVISION, annotate, annotate_new, annotate_sizes, available, by_creation,
        by_size_newer, by_size_older, desired, is_rolling, max_surge, max_unavailable, name, number, revision, size,
        total_size,
    },
    status,
};
use apimachinery::pod::is_terminal;
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentStatus, ReplicaSet},
        core::v1::Pod,
    },
    jiff::Timestamp,
};
use std::{sync::Arc, time::Duration};

/// What to do, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// The Deployment's revision annotation.
    AnnotateRevision(String),
    /// The set is new; an event tells of its size if that is not zero.
    Create(Box<ReplicaSet>),
    /// The set's size stays, its annotations or spec change.
    Update(Box<ReplicaSet>),
    /// The set's size changes from `from` to what it says.
    Scale { set: Box<ReplicaSet>, from: i32 },
    /// The set is history.
    Delete(String),
    /// The Deployment itself changes: it is rolled back, or cannot be.
    RollBack { deployment: Box<Deployment>, event: Option<Told> },
}

/// An event: of what type, with which reason and words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    pub is_warning: bool,
    pub reason: &'static str,
    pub message: String,
}

/// The step, the status to write after it, and when to look again.
#[derive(Debug)]
pub struct Plan {
    pub actions: Vec<Action>,
    pub status: DeploymentStatus,
    pub check_again: Option<Duration>,
}

/// The sets that the Deployment owns, sorted out; the planning's working state.
struct Rollout<'a> {
    deployment: &'a Deployment,
    new: Option<Arc<ReplicaSet>>,
    old: Vec<Arc<ReplicaSet>>,
    pods: &'a [Arc<Pod>],
    base: DeploymentStatus,
    actions: Vec<Action>,
    now: Timestamp,
}

/// Plans one step. `owned` are the sets that the Deployment controls, `pods` the pods of all of them.
/// As `syncDeployment`.
pub fn plan(deployment: &Deployment, owned: &[Arc<ReplicaSet>], pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let mut all: Vec<Arc<ReplicaSet>> = owned.to_vec();
    all.sort_by(|a, b| by_creation(a, b));
    let template = deployment.spec.as_ref().map(|s| &s.template);
    let fits = |s: &Arc<ReplicaSet>| {
        let own = s.spec.as_ref().and_then(|s| s.template.as_ref());
        own.zip(template).is_some_and(|(own, template)| sets::same_template(own, template))
    };
    let new = all.iter().position(fits).map(|at| all.remove(at));
    let base = deployment.status.clone().unwrap_or_default();
    let mut rollout = Rollout { deployment, new, old: all, pods, base, actions: Vec::new(), now };
    if deployment.metadata.deletion_timestamp.is_some() {
        let status = rollout.counts();
        return Plan { actions: Vec::new(), status, check_again: None };
    }
    status::set_paused(deployment, &mut rollout.base, now);
    if deployment.spec.as_ref().and_then(|s| s.paused).unwrap_or(false) {
        rollout.sync_revision(false);
        rollout.scale();
        if sets::rollback_to(deployment).is_none() {
            rollout.clean_up();
        }
        let status = rollout.counts();
        return Plan { actions: rollout.actions, status, check_again: None };
    }
    // Nothing else is done before the annotation is gone; a template that has no set yet gets it first.
    if let (Some(revision), Some(_)) = (sets::rollback_to(deployment), &rollout.new) {
        let actions = vec![rollout.roll_back(revision)];
        return Plan { actions, status: deployment.status.clone().unwrap_or_default(), check_again: None };
    }
    if rollout.is_scaling_event() {
        rollout.sync_revision(false);
        rollout.scale();
        let status = rollout.counts();
        return Plan { actions: rollout.actions, status, check_again: None };
    }
    if is_rolling(deployment) {
        rollout.rolling_update()
    } else {
        rollout.recreate()
    }
    let status = status::rollout(deployment, &rollout.base, &rollout.all(), rollout.new.as_deref(), now);
    let check_again = status::check_again(deployment, &status, now);
    Plan { actions: rollout.actions, status, check_again }
}

impl Rollout<'_> {
    fn all(&self) -> Vec<&ReplicaSet> {
        self.old.iter().chain(&self.new).map(Arc::as_ref).collect()
    }

    fn counts(&self) -> DeploymentStatus {
        status::calculate(self.deployment, &self.base, &self.all(), self.new.as_deref(), self.now)
    }

    /// A set whose Deployment had another size when it was last scaled. As `isScalingEvent`.
    fn is_scaling_event(&self) -> bool {
        let active = self.old.iter().chain(&self.new).filter(|s| size(s) > 0);
        active.filter_map(|s| number(&s.metadata, DESIRED_REPLICAS)).any(|d| d != desired(self.deployment))
    }

    /// Brings the new set and the revision up to date; makes the new set if there is none and `create`. True if it made
    /// one: then the step ends, for what comes next depends on what the server makes of it. As `getNewReplicaSet`.
    fn sync_revision(&mut self, create: bool) -> bool {
        let revision_now = self.old.iter().map(|s| revision(&s.metadata)).max().unwrap_or(0) + 1;
        if let Some(set) = &mut self.new {
            let mut meta = set.metadata.clone();
            let mut changed = annotate_new(&mut meta, self.deployment, revision_now, true);
            let min_ready = self.deployment.spec.as_ref().and_then(|s| s.min_ready_seconds);
            let has = set.spec.as_ref().and_then(|s| s.min_ready_seconds);
            changed |= has.unwrap_or(0) != min_ready.unwrap_or(0);
            if changed {
                let set = Arc::make_mut(set);
                set.metadata = meta;
                if let Some(spec) = &mut set.spec {
                    spec.min_ready_seconds = min_ready;
                }
                self.actions.push(Action::Update(Box::new(set.clone())));
            }
            let set_revision = sets::annotation(&set.metadata, REVISION).unwrap_or_default().to_owned();
            if sets::annotation(&self.deployment.metadata, REVISION) != Some(&set_revision) {
                self.actions.push(Action::AnnotateRevision(set_revision));
            }
            if status::has_deadline(self.deployment) && !status::knows_progress(&self.base) {
                status::set_new_set(&mut self.base, name(set), false, self.now);
            }
            return changed;
        }
        if !create {
            return false;
        }
        let mut set = sets::make_new(self.deployment, self.base.collision_count);
        let replicas = sets::new_set_size(self.deployment, total_size(&self.old), 0);
        if let Some(spec) = &mut set.spec {
            spec.replicas = Some(replicas);
        }
        annotate_new(&mut set.metadata, self.deployment, revision_now, false);
        if status::has_deadline(self.deployment) {
            status::set_new_set(&mut self.base, name(&set), true, self.now);
        }
        self.actions.push(Action::AnnotateRevision(revision_now.to_string()));
        self.actions.insert(self.actions.len() - 1, Action::Create(Box::new(set)));
        true
    }

    /// As `rolloutRolling`.
    fn rolling_update(&mut self) {
        if self.sync_revision(true) || self.grow_new() || self.shrink_old() {
            return;
        }
        self.clean_up_if_complete();
    }

    /// As `rolloutRecreate`.
    fn recreate(&mut self) {
        if self.sync_revision(false) {
            return;
        }
        let mut scaled = false;
        for at in 0..self.old.len() {
            scaled |= size(&self.old[at]) > 0 && self.scale_old(at, 0);
        }
        if scaled || self.old_pods_run() {
            return;
        }
        if self.sync_revision_and_create() || self.grow_new() {
            return;
        }
        self.clean_up_if_complete();
    }

    /// As `rollback`.
    fn roll_back(&self, revision: i64) -> Action {
        let name = self.deployment.metadata.name.as_deref().unwrap_or_default();
        let warn = |reason, message: &str| Some(Told { is_warning: true, reason, message: message.to_owned() });
        let revision = if revision == 0 { sets::last_revision(self.all()) } else { revision };
        let found = self.all().into_iter().find(|set| sets::revision(&set.metadata) == revision);
        let (mut updated, event) = match found {
            _ if revision == 0 => {
                (self.deployment.clone(), warn("DeploymentRollbackRevisionNotFound", "Unable to find last revision."))
            }
            None => {
                let message = "Unable to find the revision to rollback to.";
                (self.deployment.clone(), warn("DeploymentRollbackRevisionNotFound", message))
            }
            Some(set) if self.new.as_deref().is_some_and(|new| sets::name(new) == sets::name(set)) => {
                let message =
                    format!("The rollback revision contains the same template as current deployment {name:?}");
                (self.deployment.clone(), warn("DeploymentRollbackTemplateUnchanged", &message))
            }
            Some(set) => {
                let message = format!("Rolled back deployment {name:?} to revision {revision}");
                let event = Told { is_warning: false, reason: "DeploymentRollback", message };
                (sets::restored(self.deployment, set), Some(event))
            }
        };
        if let Some(annotations) = &mut updated.metadata.annotations {
            annotations.remove(sets::ROLLBACK_TO);
        }
        Action::RollBack { deployment: Box::new(updated), event }
    }

    fn sync_revision_and_create(&mut self) -> bool {
        self.new.is_none() && self.sync_revision(true)
    }

    /// Pods of old sets that may still run, those that are ending included. As `oldPodsRunning`.
    fn old_pods_run(&self) -> bool {
        let new = self.new.as_ref().and_then(|s| s.metadata.uid.as_deref());
        let controller = |p: &Pod| apimachinery::pod::controller_of(&p.metadata).map(|o| o.uid.clone());
        self.old.iter().any(|s| s.status.as_ref().is_some_and(|s| s.replicas > 0))
            || self.pods.iter().any(|p| !is_terminal(p) && controller(p).as_deref() != new)
    }

    fn clean_up_if_complete(&mut self) {
        if status::is_complete(self.deployment, &self.base) {
            self.clean_up();
        }
    }

    /// Scales the new set if it is time to. As `reconcileNewReplicaSet`.
    fn grow_new(&mut self) -> bool {
        let Some(set) = &self.new else { return false };
        let (now, wanted) = (size(set), desired(self.deployment));
        let to = match now.cmp(&wanted) {
            std::cmp::Ordering::Equal => return false,
            std::cmp::Ordering::Greater => wanted,
            std::cmp::Ordering::Less => sets::new_set_size(self.deployment, total_size(&self.old) + now, now),
        };
        self.scale_new(to)
    }

    /// Takes old pods away as long as enough stay available. As `reconcileOldReplicaSets`.
    fn shrink_old(&mut self) -> bool {
        if total_size(&self.old) == 0 {
            return false;
        }
        let least = desired(self.deployment) - max_unavailable(self.deployment);
        let new_unavailable = self.new.as_ref().map_or(0, |s| size(s) - available(s));
        let total = total_size(self.old.iter().chain(&self.new));
        let most = total - least - new_unavailable;
        if most <= 0 {
            return false;
        }
        // Old pods that do not work are of no use: they go first. As `cleanupUnhealthyReplicas`.
        let mut taken = 0;
        for at in 0..self.old.len() {
            let (size, available) = (size(&self.old[at]), available(&self.old[at]));
            if taken >= most {
                break;
            }
            if size > available {
                let take = (most - taken).min(size - available);
                taken += i32::from(self.scale_old(at, size - take)) * take;
            }
        }
        // As `scaleDownOldReplicaSetsForRollingUpdate`.
        let available: i32 = self.all().into_iter().map(available).sum();
        let mut spare = available - least;
        let mut scaled = taken > 0;
        for at in 0..self.old.len() {
            let size = size(&self.old[at]);
            if spare <= 0 || size == 0 {
                continue;
            }
            let take = size.min(spare);
            spare -= take;
            scaled |= self.scale_old(at, size - take);
        }
        scaled
    }

    /// Follows a change of `spec.replicas`: of the only active set, or of all in proportion. As `scale`.
    fn scale(&mut self) {
        let wanted = desired(self.deployment);
        let active: Vec<usize> = (0..self.old.len()).filter(|at| size(&self.old[*at]) > 0).collect();
        let new_active = self.new.as_ref().is_some_and(|s| size(s) > 0);
        match (active.len() + usize::from(new_active), &active[..]) {
            // None is active: the new one, else the latest.
            (0, _) => {
                if self.new.is_some() {
                    self.scale_new(wanted);
                } else if !self.old.is_empty() {
                    self.scale_old(self.old.len() - 1, wanted);
                }
                return;
            }
            (1, [only]) => {
                self.scale_old(*only, wanted);
                return;
            }
            (1, _) => {
                self.scale_new(wanted);
                return;
            }
            _ => {}
        }
        // The new one does all the work already: the old ones go.
        let saturated = self.new.as_ref().is_some_and(|s| {
            number(&s.metadata, DESIRED_REPLICAS) == Some(wanted) && size(s) == wanted && available(s) == wanted
        });
        if saturated {
            for at in active {
                self.scale_old(at, 0);
            }
            return;
        }
        if is_rolling(self.deployment) {
            self.scale_in_proportion();
        }
    }

    fn scale_in_proportion(&mut self) {
        let wanted = desired(self.deployment);
        let all = self.old.iter().chain(&self.new);
        let mut active: Vec<Arc<ReplicaSet>> = all.filter(|s| size(s) > 0).cloned().collect();
        let allowed = if wanted > 0 { wanted + max_surge(self.deployment) } else { 0 };
        let to_add = allowed - total_size(&active);
        let order = if to_add > 0 { by_size_newer } else { by_size_older };
        active.sort_by(|a, b| order(a, b));
        let mut added = 0;
        let mut targets: Vec<(String, i32)> = Vec::new();
        for set in &active {
            let share = self.proportion(set, to_add, added);
            added += share;
            targets.push((name(set).to_owned(), size(set) + share));
        }
        // What rounding left goes to the largest.
        if let Some((_, first)) = targets.first_mut() {
            *first = (*first + to_add - added).max(0);
        }
        for (set, to) in targets {
            match self.old.iter().position(|s| name(s) == set) {
                Some(at) => self.scale_old(at, to),
                None => self.scale_new(to),
            };
        }
    }

    /// As `GetReplicaSetProportion`.
    fn proportion(&self, set: &ReplicaSet, to_add: i32, added: i32) -> i32 {
        if size(set) == 0 || to_add == 0 || to_add == added {
            return 0;
        }
        let wanted = desired(self.deployment);
        let fraction = if wanted == 0 {
            -size(set)
        } else {
            let now = f64::from(wanted + max_surge(self.deployment));
            let before = number(&set.metadata, MAX_REPLICAS)
                .filter(|n| *n > 0)
                .or(self.base.replicas.filter(|n| *n > 0))
                .unwrap_or(wanted);
            (f64::from(size(set)) * now / f64::from(before)).round() as i32 - size(set)
        };
        let left = to_add - added;
        if to_add > 0 { fraction.min(left) } else { fraction.max(left) }
    }

    fn scale_new(&mut self, to: i32) -> bool {
        let Some(set) = &mut self.new else { return false };
        match resize(set, self.deployment, to) {
            Some(action) => {
                self.actions.push(action);
                true
            }
            None => false,
        }
    }

    fn scale_old(&mut self, at: usize, to: i32) -> bool {
        let deployment = self.deployment;
        match self.old.get_mut(at).and_then(|set| resize(set, deployment, to)) {
            Some(action) => {
                self.actions.push(action);
                true
            }
            None => false,
        }
    }

    /// Deletes the oldest sets beyond `revisionHistoryLimit`. As `cleanupDeployment`.
    fn clean_up(&mut self) {
        let Some(limit) = self.deployment.spec.as_ref().and_then(|s| s.revision_history_limit) else { return };
        let Ok(limit) = usize::try_from(limit) else { return };
        let mut cleanable: Vec<&Arc<ReplicaSet>> =
            self.old.iter().filter(|s| s.metadata.deletion_timestamp.is_none()).collect();
        let surplus = cleanable.len().saturating_sub(limit);
        cleanable.sort_by_key(|s| revision(&s.metadata));
        for set in cleanable.into_iter().take(surplus) {
            let status = set.status.clone().unwrap_or_default();
            let unseen = set.metadata.generation > status.observed_generation;
            if status.replicas == 0 && size(set) == 0 && !unseen {
                self.actions.push(Action::Delete(name(set).to_owned()));
            }
        }
    }
}

/// The set in another size, with the sizes it remembers; None if all is as it should be. As `scaleReplicaSet`.
fn resize(set: &mut Arc<ReplicaSet>, deployment: &Deployment, to: i32) -> Option<Action> {
    let (from, mut meta) = (size(set), set.metadata.clone());
    let annotated = annotate_sizes(&mut meta, deployment);
    if from == to && !annotated {
        return None;
    }
    let set = Arc::make_mut(set);
    set.metadata = meta;
    if let Some(spec) = &mut set.spec {
        spec.replicas = Some(to);
    }
    let set = Box::new(set.clone());
    Some(if from == to { Action::Update(set) } else { Action::Scale { set, from } })
}

/// The Deployment with its revision; None if it has it.
pub fn with_revision(deployment: &Deployment, revision: &str) -> Option<Deployment> {
    let mut updated = deployment.clone();
    annotate(&mut updated.metadata, REVISION, revision).then_some(updated)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
