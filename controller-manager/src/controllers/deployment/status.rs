//! A Deployment's status and conditions: counts, availability, progress and its deadline. Pure.
use super::sets::{available, desired, max_unavailable, name};
use k8s_openapi::{
    api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use std::time::Duration;

const AVAILABLE: &str = "Available";
const PROGRESSING: &str = "Progressing";
const REPLICA_FAILURE: &str = "ReplicaFailure";
const NEW_SET_AVAILABLE: &str = "NewReplicaSetAvailable";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";
const NO_SET: &str = "ReplicaSetCreateError";
const PAUSED: &str = "DeploymentPaused";
/// The API writes it for "no deadline".
const NO_DEADLINE: i32 = i32::MAX;

pub fn condition<'a>(status: &'a DeploymentStatus, kind: &str) -> Option<&'a DeploymentCondition> {
    status.conditions.iter().flatten().find(|c| c.type_ == kind)
}

pub fn has_deadline(deployment: &Deployment) -> bool {
    deadline(deployment).is_some()
}

fn deadline(deployment: &Deployment) -> Option<i32> {
    deployment.spec.as_ref().and_then(|s| s.progress_deadline_seconds).filter(|d| *d != NO_DEADLINE)
}

/// Whether there is a Progressing condition at all.
pub fn knows_progress(status: &DeploymentStatus) -> bool {
    condition(status, PROGRESSING).is_some()
}

/// A condition with a new status gets a new time; one that says the same is left alone. As `SetDeploymentCondition`.
fn set(status: &mut DeploymentStatus, kind: &str, value: &str, reason: &str, message: String, now: Timestamp) {
    let current = condition(status, kind);
    if current.is_some_and(|c| c.status == value && c.reason.as_deref() == Some(reason)) {
        return;
    }
    let kept = current.filter(|c| c.status == value).and_then(|c| c.last_transition_time.clone());
    let new = DeploymentCondition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(kept.unwrap_or(Time(now))),
    };
    remove(status, kind);
    status.conditions.get_or_insert_default().push(new);
}

fn remove(status: &mut DeploymentStatus, kind: &str) {
    if let Some(conditions) = &mut status.conditions {
        conditions.retain(|c| c.type_ != kind);
    }
}

/// Says that the Deployment got a new set, or found one that fits.
pub fn set_new_set(status: &mut DeploymentStatus, set_name: &str, created: bool, now: Timestamp) {
    let (reason, message) = if created {
        ("NewReplicaSetCreated", format!("Created new replica set \"{set_name}\""))
    } else {
        ("FoundNewReplicaSet", format!("Found new replica set \"{set_name}\""))
    };
    set(status, PROGRESSING, "True", reason, message, now);
}

/// Says why no set could be made.
pub fn set_creation_failure(status: &mut DeploymentStatus, message: String, now: Timestamp) {
    set(status, PROGRESSING, "False", NO_SET, message, now);
}

/// Whether [`set_creation_failure`] was the last word.
pub fn has_no_set(status: &DeploymentStatus) -> bool {
    condition(status, PROGRESSING).is_some_and(|c| c.reason.as_deref() == Some(NO_SET))
}

/// Follows `spec.paused`, so that time spent in a pause does not count against the deadline.
/// As `checkPausedConditions`.
pub fn set_paused(deployment: &Deployment, status: &mut DeploymentStatus, now: Timestamp) {
    if !has_deadline(deployment) {
        return;
    }
    let reason = condition(status, PROGRESSING).and_then(|c| c.reason.clone());
    if reason.as_deref() == Some(TIMED_OUT) {
        return;
    }
    let paused = deployment.spec.as_ref().and_then(|s| s.paused).unwrap_or(false);
    match (paused, reason.as_deref() == Some(PAUSED)) {
        (true, false) => set(status, PROGRESSING, "Unknown", PAUSED, "Deployment is paused".into(), now),
        (false, true) => set(status, PROGRESSING, "Unknown", "DeploymentResumed", "Deployment is resumed".into(), now),
        _ => {}
    }
}

/// Counts and availability; other conditions are `base`'s. As `calculateStatus`.
pub fn calculate(
    deployment: &Deployment,
    base: &DeploymentStatus,
    sets: &[&ReplicaSet],
    new: Option<&ReplicaSet>,
    now: Timestamp,
) -> DeploymentStatus {
    let of = |set: &ReplicaSet| set.status.clone().unwrap_or_default();
    let sum = |field: fn(&k8s_openapi::api::apps::v1::ReplicaSetStatus) -> i32| -> i32 {
        sets.iter().map(|s| field(&of(s))).sum()
    };
    let available: i32 = sets.iter().map(|s| available(s)).sum();
    let asked: i32 = sets.iter().map(|s| super::sets::size(s)).sum();
    let mut status = DeploymentStatus {
        observed_generation: deployment.metadata.generation,
        replicas: Some(sum(|s| s.replicas)),
        updated_replicas: Some(new.map_or(0, |s| of(s).replicas)),
        ready_replicas: Some(sum(|s| s.ready_replicas.unwrap_or(0))),
        available_replicas: Some(available),
        unavailable_replicas: Some((asked - available).max(0)),
        terminating_replicas: Some(sum(|s| s.terminating_replicas.unwrap_or(0))),
        collision_count: base.collision_count,
        conditions: base.conditions.clone(),
    };
    if available >= desired(deployment) - max_unavailable(deployment) {
        let message = "Deployment has minimum availability.".to_owned();
        set(&mut status, AVAILABLE, "True", "MinimumReplicasAvailable", message, now);
    } else {
        let message = "Deployment does not have minimum availability.".to_owned();
        set(&mut status, AVAILABLE, "False", "MinimumReplicasUnavailable", message, now);
    }
    status
}

/// All pods are of the new template, available, and no old one is left. As `DeploymentComplete`.
pub fn is_complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let all = Some(desired(deployment));
    status.updated_replicas.or(Some(0)) == all
        && status.replicas.or(Some(0)) == all
        && status.available_replicas.or(Some(0)) == all
        && status.observed_generation >= deployment.metadata.generation
}

/// As `DeploymentProgressing`.
fn has_progressed(before: &DeploymentStatus, after: &DeploymentStatus) -> bool {
    let n = |v: Option<i32>| v.unwrap_or(0);
    let old_pods = |s: &DeploymentStatus| n(s.replicas) - n(s.updated_replicas);
    n(after.updated_replicas) > n(before.updated_replicas)
        || old_pods(after) < old_pods(before)
        || n(after.ready_replicas) > n(before.ready_replicas)
        || n(after.available_replicas) > n(before.available_replicas)
}

/// As `DeploymentTimedOut`.
fn has_timed_out(deployment: &Deployment, status: &DeploymentStatus, now: Timestamp) -> bool {
    let Some(deadline) = deadline(deployment) else { return false };
    let Some(current) = condition(status, PROGRESSING) else { return false };
    match current.reason.as_deref() {
        Some(NEW_SET_AVAILABLE) => false,
        Some(TIMED_OUT) => true,
        _ => {
            let since = current.last_update_time.as_ref().map_or(now, |t| t.0);
            now.duration_since(since).as_secs() > i64::from(deadline)
        }
    }
}

/// The whole status of a rollout: counts, progress, failures. As `syncRolloutStatus`.
pub fn rollout(
    deployment: &Deployment,
    base: &DeploymentStatus,
    sets: &[&ReplicaSet],
    new: Option<&ReplicaSet>,
    now: Timestamp,
) -> DeploymentStatus {
    let mut status = calculate(deployment, base, sets, new, now);
    if !has_deadline(deployment) {
        remove(&mut status, PROGRESSING);
    }
    let current = condition(base, PROGRESSING);
    let was_complete = status.replicas == status.updated_replicas
        && current.is_some_and(|c| c.reason.as_deref() == Some(NEW_SET_AVAILABLE));
    if has_deadline(deployment) && !was_complete {
        let who = match new {
            Some(set) => format!("ReplicaSet \"{}\"", name(set)),
            None => format!("Deployment \"{}\"", deployment.metadata.name.as_deref().unwrap_or_default()),
        };
        let before = deployment.status.clone().unwrap_or_default();
        if is_complete(deployment, &status) {
            let message = format!("{who} has successfully progressed.");
            set(&mut status, PROGRESSING, "True", NEW_SET_AVAILABLE, message, now);
        } else if has_progressed(&before, &status) {
            let message = format!("{who} is progressing.");
            // Each bit of progress starts the deadline anew.
            let kept = current.filter(|c| c.status == "True").and_then(|c| c.last_transition_time.clone());
            remove(&mut status, PROGRESSING);
            set(&mut status, PROGRESSING, "True", "ReplicaSetUpdated", message, now);
            if let (Some(time), Some(condition)) =
                (kept, status.conditions.iter_mut().flatten().find(|c| c.type_ == PROGRESSING))
            {
                condition.last_transition_time = Some(time);
            }
        } else if has_timed_out(deployment, base, now) {
            let message = format!("{who} has timed out progressing.");
            set(&mut status, PROGRESSING, "False", TIMED_OUT, message, now);
        }
    }
    // What keeps a set from making pods is told of its Deployment.
    let failure_of = |set: &ReplicaSet| {
        let mut conditions = set.status.iter().flat_map(|s| s.conditions.iter().flatten());
        conditions.find(|c| c.type_ == REPLICA_FAILURE).cloned()
    };
    match new.and_then(failure_of).or_else(|| sets.iter().find_map(|s| failure_of(s))) {
        Some(failure) => {
            let (reason, message) = (failure.reason.unwrap_or_default(), failure.message.unwrap_or_default());
            // Since when is the set's to say. As `ReplicaSetToDeploymentCondition`.
            let since = failure.last_transition_time.map_or(now, |time| time.0);
            set(&mut status, REPLICA_FAILURE, &failure.status, &reason, message, since);
        }
        None => remove(&mut status, REPLICA_FAILURE),
    }
    status
}

/// When a rollout that makes no progress is to be looked at again. As `requeueStuckDeployment`.
pub fn check_again(deployment: &Deployment, status: &DeploymentStatus, now: Timestamp) -> Option<Duration> {
    let deadline = deadline(deployment)?;
    let current = condition(status, PROGRESSING)?;
    if is_complete(deployment, status) || matches!(current.reason.as_deref(), Some(TIMED_OUT | PAUSED)) {
        return None;
    }
    let since = current.last_update_time.as_ref()?.0;
    let left = i64::from(deadline) - now.duration_since(since).as_secs();
    Some(Duration::from_secs(u64::try_from(left).unwrap_or(0) + 1))
}

/// Whether nothing but progress is told, and there is more to come: what is complete, fails or is lost is told at once.
pub fn can_wait(deployment: &Deployment, now: &DeploymentStatus, former: &DeploymentStatus) -> bool {
    const ON_THE_WAY: [&str; 3] = ["NewReplicaSetCreated", "FoundNewReplicaSet", "ReplicaSetUpdated"];
    let said = |s: &DeploymentStatus| {
        let conditions = s.conditions.iter().flatten().filter(|c| c.type_ != AVAILABLE).map(|c| {
            let reason = c.reason.clone().filter(|reason| !ON_THE_WAY.contains(&reason.as_str()));
            (c.type_.clone(), c.status.clone(), reason)
        });
        (s.observed_generation, s.collision_count, conditions.collect::<Vec<_>>())
    };
    let is_available = |s: &DeploymentStatus| condition(s, AVAILABLE).is_some_and(|c| c.status == "True");
    let lost = is_available(former) && !is_available(now);
    said(now) == said(former) && !lost && (!is_complete(deployment, now) || is_complete(deployment, former))
}

/// Whether two statuses say the same (numbers that are absent are zero).
pub fn same(a: &DeploymentStatus, b: &DeploymentStatus) -> bool {
    let numbers = |s: &DeploymentStatus| {
        let n = |v: Option<i32>| v.unwrap_or(0);
        let counts = [
            n(s.replicas),
            n(s.updated_replicas),
            n(s.ready_replicas),
            n(s.available_replicas),
            n(s.unavailable_replicas),
            n(s.terminating_replicas),
            n(s.collision_count),
        ];
        (counts, s.observed_generation)
    };
    numbers(a) == numbers(b)
        && a.conditions.as_deref().unwrap_or_default() == b.conditions.as_deref().unwrap_or_default()
}
