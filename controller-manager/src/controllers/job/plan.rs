//! What a Job needs: pods to make and delete, which ended pods to count, and whether it is done. Pure.
//!
//! A pod is counted exactly once, whatever crashes: while it has our finalizer it is there; its UID goes into
//! `uncountedTerminatedPods`, then the finalizer goes, and only when that is seen does the UID become a number.
use super::{
    indexes,
    policy::{self, Verdict, has_failed, holds_place, is_ending, verdict},
};
use crate::controllers::replicaset::plan::{BURST_REPLICAS, Scaling, scaling};
use apimachinery::pod::{condition, is_active, is_ready, phase};
use k8s_openapi::{
    api::{
        batch::v1::{Job, JobCondition, JobSpec, JobStatus, UncountedTerminatedPods},
        core::v1::Pod,
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

pub const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
pub const INDEX: &str = "batch.kubernetes.io/job-completion-index";
pub const FAILURES: &str = "batch.kubernetes.io/job-index-failure-count";
pub const IGNORED_FAILURES: &str = "batch.kubernetes.io/job-index-ignored-failure-count";
/// After a failure a new pod is made this much later, then twice as much, and so on.
const BACKOFF: Duration = Duration::from_secs(10);
const LONGEST_BACKOFF: Duration = Duration::from_secs(600);
/// Pods that one status holds as uncounted.
const MAX_UNCOUNTED: usize = 500;

/// A pod to make: its index if the Job has indexes, and what failed there before if each index has a limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub index: Option<i32>,
    pub failures: Option<Failures>,
}

/// Failures of an index: those that count, and those that a policy ignores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Failures {
    pub counted: i32,
    pub ignored: i32,
}

/// What to do. The status is written first; then finalizers go, then pods.
#[derive(Debug, Default)]
pub struct Plan {
    pub status: JobStatus,
    /// Pods that are counted now or need not be: they lose the finalizer.
    pub release: Vec<Arc<Pod>>,
    pub create: Vec<Wanted>,
    pub delete: Vec<Arc<Pod>>,
    /// Reason and message, a warning if true.
    pub events: Vec<(bool, String, String)>,
    pub check_again: Option<Duration>,
}

/// How a Job ended or is about to.
#[derive(Clone, Debug, PartialEq)]
struct Outcome {
    complete: bool,
    reason: String,
    message: String,
}

/// The pods of a Job, sorted out, and what of an Indexed Job's indexes is done.
struct World<'a> {
    spec: &'a JobSpec,
    pods: &'a [Arc<Pod>],
    active: Vec<Arc<Pod>>,
    /// Whether the Job is Indexed, and how many indexes it has.
    indexes: Option<i32>,
    done: BTreeSet<i32>,
    /// Indexes that failed for good, where each has a limit.
    failed: BTreeSet<i32>,
    /// Of an index that waits for another pod: the last that failed. It keeps its finalizer until the next is there, so
    /// that its count is not lost.
    last_failed: BTreeMap<i32, Arc<Pod>>,
    now: Timestamp,
}

pub fn has_condition(status: &JobStatus, kind: &str) -> bool {
    target(status, kind).is_some()
}

fn target<'a>(status: &'a JobStatus, kind: &str) -> Option<&'a JobCondition> {
    status.conditions.iter().flatten().find(|c| c.type_ == kind && c.status == "True")
}

/// The condition that says that a Job is over: `Complete` or `Failed`.
pub fn finished_as(job: &Job) -> Option<&'static str> {
    let status = job.status.as_ref()?;
    ["Complete", "Failed"].into_iter().find(|kind| has_condition(status, kind))
}

pub fn has_finalizer(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
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

/// What had failed at the pod's index when it was made.
fn failures_before(pod: &Pod) -> Failures {
    let annotation = |key| pod.metadata.annotations.as_ref().and_then(|a| a.get(key)?.parse().ok()).unwrap_or(0);
    Failures { counted: annotation(FAILURES), ignored: annotation(IGNORED_FAILURES) }
}

/// What has failed there when this pod failed too. As `getNewIndexFailureCounts`.
fn failures_after(spec: &JobSpec, pod: &Pod) -> Failures {
    let Failures { counted, ignored } = failures_before(pod);
    match verdict(spec, pod) {
        Verdict::Ignored => Failures { counted, ignored: ignored + 1 },
        _ => Failures { counted: counted + 1, ignored },
    }
}

fn count(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

fn earlier(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    a.into_iter().chain(b).min()
}

/// As `syncJob`. `pods` are those that the Job controls.
pub fn plan(job: &Job, pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let Some(spec) = &job.spec else { return Plan::default() };
    let former = job.status.clone().unwrap_or_default();
    if finished_as(job).is_some() {
        let left = pods.iter().filter(|p| has_finalizer(p)).cloned().collect();
        let delete = pods.iter().filter(|p| is_active(p)).cloned().collect();
        return Plan { status: former, release: left, delete, ..Plan::default() };
    }
    let mut plan = Plan { status: former.clone(), ..Plan::default() };
    let world = World::new(spec, &former, pods, now);
    let suspended = spec.suspend.unwrap_or(false);
    if plan.status.start_time.is_none() && !suspended {
        plan.status.start_time = Some(Time(now));
    }
    let (succeeded, failed) = world.totals(&former);
    let outcome = world.outcome(job, &plan.status, succeeded, failed);
    world.tally(outcome.as_ref(), &mut plan);

    let active = &world.active;
    let ending = pods.iter().filter(|p| is_ending(p)).count();
    if outcome.is_some() || suspended {
        plan.delete.clone_from(active);
    } else {
        world.scale(succeeded, &mut plan);
    }
    // What we take away ourselves is no failure of the pod: it is let go of before it is deleted.
    let deleted: HashSet<String> = plan.delete.iter().map(|p| uid(p)).collect();
    let released: HashSet<String> = plan.release.iter().map(|p| uid(p)).collect();
    let held = plan.delete.iter().filter(|p| has_finalizer(p) && !released.contains(&uid(p)));
    plan.release.extend(held.cloned().collect::<Vec<_>>());
    let left: Vec<_> = active.iter().filter(|p| !deleted.contains(&uid(p))).collect();
    plan.status.active = (!left.is_empty()).then(|| count(left.len()));
    plan.status.ready = Some(count(left.iter().filter(|p| is_ready(p)).count()));
    plan.status.terminating = Some(count(ending + deleted.len()));
    suspend_condition(&mut plan, suspended, &former, now);
    let no_pod_left = ending + active.len() == 0;
    if let Some(outcome) = outcome {
        conclude(&mut plan, &outcome, no_pod_left, spec.completions, now);
    }
    if let (Some(deadline), Some(start)) = (spec.active_deadline_seconds, &plan.status.start_time)
        && !suspended
    {
        let left = deadline - now.duration_since(start.0).as_secs();
        let left = Duration::from_secs(u64::try_from(left).unwrap_or(0) + 1);
        plan.check_again = earlier(plan.check_again, Some(left));
    }
    plan
}

impl<'a> World<'a> {
    fn new(spec: &'a JobSpec, former: &JobStatus, pods: &'a [Arc<Pod>], now: Timestamp) -> Self {
        let indexed = spec.completion_mode.as_deref() == Some("Indexed");
        let indexes = indexed.then(|| spec.completions.unwrap_or(0));
        let limit = indexes.unwrap_or(0);
        let mut done = indexes::parse(former.completed_indexes.as_deref().unwrap_or_default(), limit);
        let held = || pods.iter().filter(|p| has_finalizer(p));
        let index = |p: &Arc<Pod>| index_of(p).filter(|i| *i < limit);
        done.extend(held().filter(|p| has_succeeded(p)).filter_map(index));
        let active = pods.iter().filter(|p| is_active(p)).cloned().collect();
        let mut failed = indexes::parse(former.failed_indexes.as_deref().unwrap_or_default(), limit);
        let mut last_failed: BTreeMap<i32, Arc<Pod>> = BTreeMap::new();
        if let Some(most) = spec.backoff_limit_per_index {
            for pod in held().filter(|p| has_failed(spec, p)) {
                let Some(index) = index(pod) else { continue };
                let fails = failures_after(spec, pod).counted > most || verdict(spec, pod) == Verdict::FailsIndex;
                if fails && !done.contains(&index) {
                    failed.insert(index);
                }
                let last = last_failed.entry(index).or_insert_with(|| pod.clone());
                if failures_before(pod) > failures_before(last) {
                    *last = pod.clone();
                }
            }
            // Of others the next pod is there already, or none will come.
            let next = |last: &Pod| {
                let same = pods.iter().filter(|p| index_of(p) == index_of(last));
                same.map(|p| failures_before(p)).any(|f| f > failures_before(last))
            };
            last_failed.retain(|i, pod| !done.contains(i) && !failed.contains(i) && !next(pod));
        }
        Self { spec, pods, active, indexes, done, failed, last_failed, now }
    }

    fn held(&self) -> impl Iterator<Item = &'a Arc<Pod>> {
        self.pods.iter().filter(|p| has_finalizer(p))
    }

    fn counts(&self, pod: &Pod) -> bool {
        // A pod that belongs to no index is nothing.
        let known = self.indexes.is_none_or(|limit| index_of(pod).is_some_and(|i| i < limit));
        known && verdict(self.spec, pod) != Verdict::Ignored
    }

    /// How many succeeded and failed, those included that are not counted yet.
    fn totals(&self, former: &JobStatus) -> (i32, i32) {
        let uncounted = former.uncounted_terminated_pods.clone().unwrap_or_default();
        let (known_good, known_bad) = (uncounted.succeeded.unwrap_or_default(), uncounted.failed.unwrap_or_default());
        let new = |known: &[String], is: &dyn Fn(&Pod) -> bool| {
            count(self.held().filter(|p| is(p) && !known.contains(&uid(p))).count() + known.len())
        };
        let spec = self.spec;
        let failed = former.failed.unwrap_or(0) + new(&known_bad, &|p| has_failed(spec, p) && self.counts(p));
        match self.indexes {
            Some(_) => (count(self.done.len()), failed),
            None => (former.succeeded.unwrap_or(0) + new(&known_good, &has_succeeded), failed),
        }
    }

    /// Counts ended pods, as far as that goes in one step. As `trackJobStatusAndRemoveFinalizers`.
    fn tally(&self, outcome: Option<&Outcome>, plan: &mut Plan) {
        let uncounted = plan.status.uncounted_terminated_pods.take().unwrap_or_default();
        let held: HashSet<String> = self.held().map(|p| uid(p)).collect();
        let (mut succeeded, mut failed) = (plan.status.succeeded.unwrap_or(0), plan.status.failed.unwrap_or(0));
        let settle = |uids: Option<Vec<String>>, counter: &mut i32| -> Vec<String> {
            let (still, gone): (Vec<_>, Vec<_>) = uids.unwrap_or_default().into_iter().partition(|u| held.contains(u));
            *counter += count(gone.len());
            still
        };
        let mut succeeded_uids = settle(uncounted.succeeded, &mut succeeded);
        let mut failed_uids = settle(uncounted.failed, &mut failed);
        let delayed: HashSet<String> = self.last_failed.values().map(|p| uid(p)).collect();
        for pod in self.held() {
            if succeeded_uids.len() + failed_uids.len() >= MAX_UNCOUNTED {
                break;
            }
            // When the Job has failed so has whatever still runs.
            let fails = || has_failed(self.spec, pod) || outcome.is_some_and(|o| !o.complete);
            if has_succeeded(pod) {
                if self.indexes.is_none() && !succeeded_uids.contains(&uid(pod)) {
                    succeeded_uids.push(uid(pod));
                }
            } else if !fails() || (outcome.is_none() && delayed.contains(&uid(pod))) {
                continue;
            } else if !failed_uids.contains(&uid(pod)) && self.counts(pod) {
                failed_uids.push(uid(pod));
            }
            plan.release.push(pod.clone());
        }
        if self.indexes.is_some() {
            succeeded = count(self.done.len());
            plan.status.completed_indexes = (succeeded > 0).then(|| indexes::format(&self.done));
        }
        if self.spec.backoff_limit_per_index.is_some() {
            plan.status.failed_indexes = Some(indexes::format(&self.failed));
        }
        plan.status.succeeded = (succeeded > 0).then_some(succeeded);
        plan.status.failed = (failed > 0).then_some(failed);
        let some = |uids: Vec<String>| (!uids.is_empty()).then_some(uids);
        plan.status.uncounted_terminated_pods =
            Some(UncountedTerminatedPods { succeeded: some(succeeded_uids), failed: some(failed_uids) });
    }

    /// Whether the Job has come to an end, and to which.
    fn outcome(&self, job: &Job, status: &JobStatus, succeeded: i32, failed: i32) -> Option<Outcome> {
        let spec = self.spec;
        let end = |complete, reason: &str, message: &str| {
            Some(Outcome { complete, reason: reason.to_owned(), message: message.to_owned() })
        };
        // What was decided stays so.
        for (kind, complete) in [("FailureTarget", false), ("SuccessCriteriaMet", true)] {
            if let Some(target) = target(status, kind) {
                let text = |t: &Option<String>| t.clone().unwrap_or_default();
                return end(complete, &text(&target.reason), &text(&target.message));
            }
        }
        if spec.pod_failure_policy.is_some() {
            let failed = self.pods.iter().filter(|p| has_failed(spec, p));
            for verdict in failed.map(|p| verdict(spec, p)) {
                if let Verdict::FailsJob(message) = verdict {
                    return end(false, "PodFailurePolicy", &message);
                }
            }
        }
        let limit = spec.backoff_limit.unwrap_or(6);
        let running = self.active.iter().filter(|p| ["Running", "Pending"].contains(&phase(p)));
        let containers = running
            .flat_map(|p| p.status.iter())
            .flat_map(|s| s.container_statuses.iter().flatten().chain(s.init_container_statuses.iter().flatten()));
        let restarts: i32 = containers.map(|s| s.restart_count).sum();
        let in_place = spec.template.spec.as_ref().and_then(|s| s.restart_policy.as_deref()) == Some("OnFailure");
        if failed > limit || (in_place && restarts > 0 && restarts >= limit) {
            return end(false, "BackoffLimitExceeded", "Job has reached the specified backoff limit");
        }
        if let (Some(deadline), Some(start)) = (spec.active_deadline_seconds, &status.start_time)
            && !spec.suspend.unwrap_or(false)
            && self.now.duration_since(start.0).as_secs() >= deadline
        {
            return end(false, "DeadlineExceeded", "Job was active longer than specified deadline");
        }
        if spec.max_failed_indexes.is_some_and(|most| count(self.failed.len()) > most) {
            let message = "Job has exceeded the specified maximal number of failed indexes";
            return end(false, "MaxFailedIndexesExceeded", message);
        }
        let ended = count(self.failed.len() + self.done.len());
        if !self.failed.is_empty() && self.indexes.is_some_and(|all| ended >= all) {
            return end(false, "FailedIndexes", "Job has failed indexes");
        }
        if self.indexes.is_some()
            && let Some(message) = policy::success(job, &self.done)
        {
            return end(true, "SuccessPolicy", &message);
        }
        let complete = match spec.completions {
            None => succeeded > 0 && self.active.is_empty(),
            Some(all) => succeeded >= all,
        };
        complete.then(|| end(true, "CompletionsReached", "Reached expected number of succeeded pods")).flatten()
    }

    /// Pods to make and to take away. As `manageJob`.
    fn scale(&self, succeeded: i32, plan: &mut Plan) {
        let spec = self.spec;
        let parallelism = spec.parallelism.unwrap_or(1).max(0);
        let wanted = match spec.completions {
            // A work queue: once a pod succeeded no more are made.
            None if succeeded > 0 => count(self.active.len()).min(parallelism),
            None => parallelism,
            Some(all) => (all - succeeded - count(self.failed.len())).max(0).min(parallelism),
        };
        // Pods that are nobody's, or the second of their index, go first.
        let mut seen = BTreeSet::new();
        let surplus = |p: &&Arc<Pod>| match self.indexes {
            None => false,
            Some(all) => !index_of(p).is_some_and(|i| i < all && !self.done.contains(&i) && seen.insert(i)),
        };
        let (mut surplus, useful): (Vec<_>, Vec<_>) = self.active.iter().partition(surplus);
        let useful: Vec<Arc<Pod>> = useful.into_iter().cloned().collect();
        plan.delete.extend(surplus.drain(..).cloned());
        match scaling(wanted, &useful, || useful.clone(), self.now) {
            Scaling::Delete(more) => plan.delete.extend(more),
            Scaling::Create(number) => {
                let ending = self.pods.iter().filter(|p| holds_place(spec, p)).count();
                self.create(number.saturating_sub(ending), plan);
            }
            Scaling::Enough => {}
        }
    }

    fn create(&self, number: usize, plan: &mut Plan) {
        let number = number.min(BURST_REPLICAS);
        if self.spec.backoff_limit_per_index.is_some() {
            for index in self.pending().collect::<Vec<_>>() {
                if plan.create.len() == number {
                    break;
                }
                let last = self.last_failed.get(&index);
                let failures = last.map(|p| failures_after(self.spec, p)).unwrap_or_default();
                // Each index backs off by its own failures.
                let tries = failures.counted + failures.ignored;
                match last.and_then(|p| rest(tries, ended_at(p), self.now)) {
                    Some(wait) => plan.check_again = earlier(plan.check_again, Some(wait)),
                    None => plan.create.push(Wanted { index: Some(index), failures: Some(failures) }),
                }
            }
            return;
        }
        if let Some(wait) = self.rest() {
            plan.check_again = earlier(plan.check_again, Some(wait));
            return;
        }
        plan.create = match self.indexes {
            Some(_) => self.pending().take(number).map(|i| Wanted { index: Some(i), failures: None }).collect(),
            None => vec![Wanted::default(); number],
        };
    }

    /// The indexes that are neither done nor at work, the lowest first.
    fn pending(&self) -> impl Iterator<Item = i32> {
        let held = self.pods.iter().filter(|p| holds_place(self.spec, p));
        let busy: HashSet<i32> = self.active.iter().chain(held).filter_map(|p| index_of(p)).collect();
        let all = 0..self.indexes.unwrap_or(0);
        all.filter(move |i| !self.done.contains(i) && !self.failed.contains(i) && !busy.contains(i))
    }

    /// How long it is too early for another pod, by the failures since the last success.
    fn rest(&self) -> Option<Duration> {
        let ended = |p: &&Arc<Pod>| has_succeeded(p) || has_failed(self.spec, p);
        let mut all: Vec<_> = self.pods.iter().filter(ended).collect();
        all.sort_by_key(|p| std::cmp::Reverse(ended_at(p)));
        let failures = all.iter().take_while(|p| !has_succeeded(p)).filter(|p| phase(p) == "Failed");
        let last = failures.clone().find_map(|p| ended_at(p));
        rest(count(failures.count()), last, self.now)
    }
}

/// When a pod ended: its last container, or when it was not ready any more. As `getFinishedTime`.
fn ended_at(pod: &Pod) -> Option<Timestamp> {
    let statuses = pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten());
    let ends = statuses.filter_map(|s| s.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref()).map(|t| t.0);
    let at = condition(pod, "Ready").and_then(|c| c.last_transition_time.as_ref());
    let deleted = pod.metadata.deletion_timestamp.as_ref();
    ends.max().or_else(|| at.or(deleted).or(pod.metadata.creation_timestamp.as_ref()).map(|t| t.0))
}

/// What is left of the pause after so many failures.
fn rest(failures: i32, last: Option<Timestamp>, now: Timestamp) -> Option<Duration> {
    let (Some(last), Ok(failures @ 1..)) = (last, u32::try_from(failures)) else { return None };
    let pause = BACKOFF.saturating_mul(2u32.saturating_pow((failures - 1).min(20))).min(LONGEST_BACKOFF);
    let passed = Duration::try_from(now.duration_since(last)).unwrap_or_default();
    pause.checked_sub(passed).filter(|left| !left.is_zero())
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
        plan.events.push((false, "Suspended".to_owned(), "Job suspended".to_owned()));
        plan.status.start_time = None;
    } else if !suspended && was {
        set_condition(&mut plan.status, "Suspended", "False", "JobResumed", "Job resumed", now);
        plan.events.push((false, "Resumed".to_owned(), "Job resumed".to_owned()));
        plan.status.start_time = Some(Time(now));
    }
}

/// First what it comes to; then, when no pod is left and all are counted, that it has ended.
fn conclude(plan: &mut Plan, outcome: &Outcome, no_pod_left: bool, wanted: Option<i32>, now: Timestamp) {
    let Outcome { complete, reason, message } = outcome;
    let (interim, kind) = if *complete { ("SuccessCriteriaMet", "Complete") } else { ("FailureTarget", "Failed") };
    set_condition(&mut plan.status, interim, "True", reason, message, now);
    let uncounted = plan.status.uncounted_terminated_pods.as_ref();
    let counted = uncounted.is_none_or(|u| u.succeeded.is_none() && u.failed.is_none());
    if !no_pod_left || !counted {
        return;
    }
    set_condition(&mut plan.status, kind, "True", reason, message, now);
    if *complete {
        plan.status.completion_time = Some(Time(now));
        if wanted.is_some_and(|wanted| plan.status.succeeded.unwrap_or(0) > wanted) {
            let message = "Too many succeeded pods running after completion count reached";
            plan.events.push((true, "TooManySucceededPods".to_owned(), message.to_owned()));
        }
        plan.events.push((false, "Completed".to_owned(), "Job completed".to_owned()));
    } else {
        plan.events.push((true, reason.clone(), message.clone()));
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
