//! What a Job needs: pods to make and delete, which ended pods to count, and whether it is done. Pure.
//!
//! A pod is counted exactly once, whatever crashes: while it has our finalizer it is there; its UID goes into
//! `uncountedTerminatedPods`, then the finalizer goes, and only when that is seen does the UID become a number.
use super::indexes;
use crate::controllers::replicaset::plan::{BURST_REPLICAS, Scaling, scaling};
use apimachinery::pod::{condition, is_active, is_ready, phase};
use k8s_openapi::{
    api::{
        batch::v1::{Job, JobCondition, JobStatus, UncountedTerminatedPods},
        core::v1::Pod,
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

pub const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
pub const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// After a failure a new pod is made this much later, then twice as much, and so on.
const BACKOFF: Duration = Duration::from_secs(10);
const LONGEST_BACKOFF: Duration = Duration::from_secs(600);
/// Pods that one status holds as uncounted.
const MAX_UNCOUNTED: usize = 500;

/// A pod to make: its index if the Job has indexes.
pub type Wanted = Option<i32>;

/// What to do. The status is written first; then finalizers go, then pods.
#[derive(Debug, Default)]
pub struct Plan {
    pub status: JobStatus,
    /// Pods that are counted now or need not be: they lose the finalizer.
    pub release: Vec<Arc<Pod>>,
    pub create: Vec<Wanted>,
    pub delete: Vec<Arc<Pod>>,
    /// Reason and message, a warning if true.
    pub events: Vec<(bool, &'static str, String)>,
    pub check_again: Option<Duration>,
}

/// How a Job ended or is about to.
#[derive(Clone, Debug, PartialEq)]
enum Outcome {
    Complete,
    Failed { reason: &'static str, message: &'static str },
}

pub fn has_condition(status: &JobStatus, kind: &str) -> bool {
    status.conditions.iter().flatten().any(|c| c.type_ == kind && c.status == "True")
}

pub fn is_finished(job: &Job) -> bool {
    job.status.as_ref().is_some_and(|s| has_condition(s, "Complete") || has_condition(s, "Failed"))
}

fn has_finalizer(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
}

/// A pod that is being deleted counts as failed at once, so that another takes its place.
fn has_failed(pod: &Pod) -> bool {
    phase(pod) == "Failed" || (pod.metadata.deletion_timestamp.is_some() && phase(pod) != "Succeeded")
}

fn has_succeeded(pod: &Pod) -> bool {
    phase(pod) == "Succeeded"
}

fn uid(pod: &Pod) -> String {
    pod.metadata.uid.clone().unwrap_or_default()
}

pub fn index_of(pod: &Pod) -> Option<i32> {
    let labels = pod.metadata.labels.as_ref();
    labels.and_then(|l| l.get(INDEX)).and_then(|i| i.parse().ok())
}

fn count(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

/// As `syncJob`. `pods` are those that the Job controls.
pub fn plan(job: &Job, pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let Some(spec) = &job.spec else { return Plan::default() };
    let former = job.status.clone().unwrap_or_default();
    if is_finished(job) {
        let left = pods.iter().filter(|p| has_finalizer(p)).cloned().collect();
        let delete = pods.iter().filter(|p| is_active(p)).cloned().collect();
        return Plan { status: former, release: left, delete, ..Plan::default() };
    }
    let mut plan = Plan { status: former.clone(), ..Plan::default() };
    let completions = spec.completions;
    let indexed = spec.completion_mode.as_deref() == Some("Indexed");
    let limit = completions.unwrap_or(0);
    let mut done = indexes::parse(former.completed_indexes.as_deref().unwrap_or_default(), limit);
    let (succeeded, failed) = tally(pods, indexed.then_some((&mut done, limit)), &mut plan);

    let suspended = spec.suspend.unwrap_or(false);
    if plan.status.start_time.is_none() && !suspended {
        plan.status.start_time = Some(Time(now));
    }
    let active: Vec<Arc<Pod>> = pods.iter().filter(|p| is_active(p)).cloned().collect();
    let ending =
        pods.iter().filter(|p| p.metadata.deletion_timestamp.is_some() && !apimachinery::pod::is_terminal(p)).count();

    let outcome = verdict(job, &plan.status, succeeded, failed, done.len(), &active, now);
    let mut create = Vec::new();
    if outcome.is_some() || suspended {
        plan.delete = active.clone();
    } else {
        let parallelism = spec.parallelism.unwrap_or(1).max(0);
        let wanted = match completions {
            // A work queue: once a pod succeeded no more are made.
            None if succeeded > 0 => count(active.len()).min(parallelism),
            None => parallelism,
            Some(all) if indexed => (all - count(done.len())).max(0).min(parallelism),
            Some(all) => (all - succeeded).max(0).min(parallelism),
        };
        let (wait, rests) = rest(failed, pods, now);
        match scaling(wanted, &active, &active, now) {
            Scaling::Delete(surplus) => plan.delete = surplus,
            Scaling::Create(_) if rests => plan.check_again = wait,
            Scaling::Create(number) => create = missing(number, indexed.then_some((&done, limit)), &active),
            Scaling::Enough => {}
        }
    }
    // What we delete ourselves is no failure: it is let go of before it is deleted.
    let deleted: HashSet<String> = plan.delete.iter().map(|p| uid(p)).collect();
    plan.release.extend(plan.delete.iter().filter(|p| has_finalizer(p)).cloned());
    let left: Vec<_> = active.iter().filter(|p| !deleted.contains(&uid(p))).collect();
    plan.status.active = (!left.is_empty()).then(|| count(left.len()));
    plan.status.ready = Some(count(left.iter().filter(|p| is_ready(p)).count()));
    plan.status.terminating = Some(count(ending + deleted.len()));
    if indexed {
        plan.status.completed_indexes = (!done.is_empty()).then(|| indexes::format(&done));
    }
    suspend_condition(&mut plan, suspended, &former, now);
    if let Some(outcome) = outcome {
        conclude(&mut plan, outcome, ending + active.len() == 0, now);
    }
    if let (Some(deadline), Some(start)) = (spec.active_deadline_seconds, &plan.status.start_time)
        && !suspended
    {
        let left = deadline - now.duration_since(start.0).as_secs();
        let left = Duration::from_secs(u64::try_from(left).unwrap_or(0) + 1);
        plan.check_again = Some(plan.check_again.map_or(left, |w| w.min(left)));
    }
    plan.create = create;
    plan
}

/// Counts ended pods, as far as that goes in one step; gives the totals that decisions count with.
fn tally(pods: &[Arc<Pod>], mut indexed: Option<(&mut BTreeSet<i32>, i32)>, plan: &mut Plan) -> (i32, i32) {
    let uncounted = plan.status.uncounted_terminated_pods.take().unwrap_or_default();
    let held: HashSet<String> = pods.iter().filter(|p| has_finalizer(p)).map(|p| uid(p)).collect();
    let (mut succeeded, mut failed) = (plan.status.succeeded.unwrap_or(0), plan.status.failed.unwrap_or(0));
    let settle = |uids: Option<Vec<String>>, counter: &mut i32| -> Vec<String> {
        let (still, gone): (Vec<_>, Vec<_>) = uids.unwrap_or_default().into_iter().partition(|u| held.contains(u));
        *counter += count(gone.len());
        still
    };
    let mut succeeded_uids = settle(uncounted.succeeded, &mut succeeded);
    let mut failed_uids = settle(uncounted.failed, &mut failed);
    plan.status.failed = (failed > 0).then_some(failed);
    for pod in pods.iter().filter(|p| has_finalizer(p)) {
        let known = succeeded_uids.contains(&uid(pod)) || failed_uids.contains(&uid(pod));
        if !known && succeeded_uids.len() + failed_uids.len() >= MAX_UNCOUNTED {
            break;
        }
        if has_succeeded(pod) {
            if let Some((done, limit)) = &mut indexed {
                // An index is done once, however many pods did it.
                if let Some(index) = index_of(pod).filter(|i| i < limit) {
                    done.insert(index);
                }
                plan.release.push(pod.clone());
                continue;
            }
            if !known {
                succeeded_uids.push(uid(pod));
            }
            plan.release.push(pod.clone());
        } else if has_failed(pod) {
            if !known {
                failed_uids.push(uid(pod));
            }
            plan.release.push(pod.clone());
        }
    }
    let total = match &indexed {
        Some((done, _)) => {
            plan.status.succeeded = (!done.is_empty()).then(|| count(done.len()));
            count(done.len())
        }
        None => {
            plan.status.succeeded = (succeeded > 0).then_some(succeeded);
            succeeded + count(succeeded_uids.len())
        }
    };
    let failed_total = failed + count(failed_uids.len());
    let some = |uids: Vec<String>| (!uids.is_empty()).then_some(uids);
    plan.status.uncounted_terminated_pods =
        Some(UncountedTerminatedPods { succeeded: some(succeeded_uids), failed: some(failed_uids) });
    (total, failed_total)
}

fn verdict(
    job: &Job,
    status: &JobStatus,
    succeeded: i32,
    failed: i32,
    done: usize,
    active: &[Arc<Pod>],
    now: Timestamp,
) -> Option<Outcome> {
    let spec = job.spec.as_ref()?;
    const BACKOFF_LIMIT: Outcome =
        Outcome::Failed { reason: "BackoffLimitExceeded", message: "Job has reached the specified backoff limit" };
    const DEADLINE: Outcome =
        Outcome::Failed { reason: "DeadlineExceeded", message: "Job was active longer than specified deadline" };
    // What was decided stays so.
    if let Some(target) = status.conditions.iter().flatten().find(|c| c.type_ == "FailureTarget" && c.status == "True")
    {
        return Some(if target.reason.as_deref() == Some("DeadlineExceeded") { DEADLINE } else { BACKOFF_LIMIT });
    }
    if has_condition(status, "SuccessCriteriaMet") {
        return Some(Outcome::Complete);
    }
    let limit = spec.backoff_limit.unwrap_or(6);
    let restarts: i32 = active
        .iter()
        .flat_map(|p| p.status.iter().flat_map(|s| s.container_statuses.iter().flatten()))
        .map(|s| s.restart_count)
        .sum();
    let in_place = spec.template.spec.as_ref().and_then(|s| s.restart_policy.as_deref()) == Some("OnFailure");
    if failed > limit || (in_place && restarts > 0 && restarts >= limit) {
        return Some(BACKOFF_LIMIT);
    }
    let suspended = spec.suspend.unwrap_or(false);
    if let (Some(deadline), Some(start)) = (spec.active_deadline_seconds, &status.start_time)
        && !suspended
        && now.duration_since(start.0).as_secs() >= deadline
    {
        return Some(DEADLINE);
    }
    let complete = match spec.completions {
        None => succeeded > 0 && active.is_empty(),
        Some(all) if spec.completion_mode.as_deref() == Some("Indexed") => count(done) >= all,
        Some(all) => succeeded >= all,
    };
    complete.then_some(Outcome::Complete)
}

/// Whether it is too early for another pod after a failure, and how long it is still.
fn rest(failed: i32, pods: &[Arc<Pod>], now: Timestamp) -> (Option<Duration>, bool) {
    let ended = |p: &Pod| {
        let at = condition(p, "Ready").and_then(|c| c.last_transition_time.as_ref());
        at.or(p.metadata.creation_timestamp.as_ref()).map(|t| t.0)
    };
    let last = pods.iter().filter(|p| phase(p) == "Failed").filter_map(|p| ended(p)).max();
    let (Some(last), Ok(failures @ 1..)) = (last, u32::try_from(failed)) else { return (None, false) };
    let pause = BACKOFF.saturating_mul(2u32.saturating_pow((failures - 1).min(20))).min(LONGEST_BACKOFF);
    let passed = Duration::try_from(now.duration_since(last)).unwrap_or_default();
    match pause.checked_sub(passed) {
        Some(left) if !left.is_zero() => (Some(left), true),
        _ => (None, false),
    }
}

/// The pods to make: the lowest indexes that are neither done nor at work.
fn missing(number: usize, indexed: Option<(&BTreeSet<i32>, i32)>, active: &[Arc<Pod>]) -> Vec<Wanted> {
    let number = number.min(BURST_REPLICAS);
    let Some((done, limit)) = indexed else { return vec![None; number] };
    let busy: HashSet<i32> = active.iter().filter_map(|p| index_of(p)).collect();
    (0..limit).filter(|i| !done.contains(i) && !busy.contains(i)).take(number).map(Some).collect()
}

fn set_condition(status: &mut JobStatus, kind: &str, value: &str, reason: &str, message: &str, now: Timestamp) {
    let conditions = status.conditions.get_or_insert_default();
    if conditions.iter().any(|c| c.type_ == kind && c.status == value) {
        return;
    }
    conditions.retain(|c| c.type_ != kind);
    conditions.push(JobCondition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_probe_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    });
}

fn suspend_condition(plan: &mut Plan, suspended: bool, former: &JobStatus, now: Timestamp) {
    let was = has_condition(former, "Suspended");
    if suspended && !was {
        set_condition(&mut plan.status, "Suspended", "True", "JobSuspended", "Job suspended", now);
        plan.events.push((false, "Suspended", "Job suspended".to_owned()));
        plan.status.start_time = None;
    } else if !suspended && was {
        set_condition(&mut plan.status, "Suspended", "False", "JobResumed", "Job resumed", now);
        plan.events.push((false, "Resumed", "Job resumed".to_owned()));
        plan.status.start_time = Some(Time(now));
    }
}

/// First what it comes to; then, when no pod is left and all are counted, that it has ended.
fn conclude(plan: &mut Plan, outcome: Outcome, no_pod_left: bool, now: Timestamp) {
    let (interim, kind, reason, message) = match outcome {
        Outcome::Complete => {
            ("SuccessCriteriaMet", "Complete", "CompletionsReached", "Reached expected number of succeeded pods")
        }
        Outcome::Failed { reason, message } => ("FailureTarget", "Failed", reason, message),
    };
    set_condition(&mut plan.status, interim, "True", reason, message, now);
    let uncounted = plan.status.uncounted_terminated_pods.as_ref();
    let counted = uncounted.is_none_or(|u| u.succeeded.is_none() && u.failed.is_none());
    if !no_pod_left || !counted {
        return;
    }
    set_condition(&mut plan.status, kind, "True", reason, message, now);
    if kind == "Complete" {
        plan.status.completion_time = Some(Time(now));
        plan.events.push((false, "Completed", "Job completed".to_owned()));
    } else {
        plan.events.push((true, reason, message.to_owned()));
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
