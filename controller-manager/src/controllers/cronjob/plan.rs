//! What a CronJob needs: which Jobs of it still run, whether another is due, and which are history. Pure.
use crate::controllers::job::finished_as;
use apimachinery::cron::Schedule;
use component_base::events::Type;
use k8s_openapi::{
    api::{
        batch::v1::{CronJob, CronJobSpec, CronJobStatus, Job},
        core::v1::ObjectReference,
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::{SignedDuration, Timestamp, tz::TimeZone},
};
use std::{sync::Arc, time::Duration};

/// A look at the clock comes so much after a time that is due, lest it come before.
const SLACK: SignedDuration = SignedDuration::from_millis(100);
/// More missed times than these are told.
const MANY_MISSED: i64 = 100;

#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    pub status: CronJobStatus,
    pub events: Vec<(Type, &'static str, String)>,
    /// Jobs that give way to the new one.
    pub replace: Vec<ObjectReference>,
    /// The time for which a Job is to be made.
    pub start: Option<Timestamp>,
    /// Jobs beyond the history limits.
    pub delete: Vec<Arc<Job>>,
    pub check_again: Option<Duration>,
}

/// As `syncCronJob`. `jobs` are those that it controls; `is_gone` says which of the active ones are not there any more;
/// `local` is the zone of a schedule that names none.
pub fn plan(
    cron_job: &CronJob,
    jobs: &[Arc<Job>],
    is_gone: impl Fn(&ObjectReference) -> bool,
    local: &TimeZone,
    now: Timestamp,
) -> Plan {
    let spec = &cron_job.spec;
    let mut plan = Plan { status: cron_job.status.clone().unwrap_or_default(), ..Plan::default() };
    plan.follow(jobs, is_gone);
    plan.delete = history(spec, jobs);
    if cron_job.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let zone = match &spec.time_zone {
        None => local.clone(),
        Some(name) => match TimeZone::get(name) {
            Ok(zone) => zone,
            Err(error) => {
                let message = format!("invalid timeZone: {name:?}: {error}");
                plan.events.push((Type::Warning, "UnknownTimeZone", message));
                return plan;
            }
        },
    };
    if spec.suspend.unwrap_or(false) {
        return plan;
    }
    match Schedule::parse(&spec.schedule) {
        Ok(schedule) => plan.consider(cron_job, spec, |after| schedule.next(after, &zone), now),
        Err(error) => {
            let message = format!("unparseable schedule: {:?} : {error}", spec.schedule);
            plan.events.push((Type::Warning, "UnparseableSchedule", message));
        }
    }
    plan
}

impl Plan {
    fn tell(&mut self, reason: &'static str, message: String) {
        self.events.push((Type::Normal, reason, message));
    }

    /// Brings the list of active Jobs up to date.
    fn follow(&mut self, jobs: &[Arc<Job>], is_gone: impl Fn(&ObjectReference) -> bool) {
        let mut active = self.status.active.take().unwrap_or_default();
        for job in jobs {
            let name = job.metadata.name.as_deref().unwrap_or_default();
            let listed = active.iter().position(|r| r.uid == job.metadata.uid);
            let ended = finished_as(job);
            match (listed, ended) {
                (None, None) => {
                    let message = format!("Saw a job that the controller did not create or forgot: {name}");
                    self.events.push((Type::Warning, "UnexpectedJob", message));
                }
                (Some(at), Some(condition)) => {
                    active.remove(at);
                    self.tell("SawCompletedJob", format!("Saw completed job: {name}, condition: {condition}"));
                }
                _ => {}
            }
            let completed =
                job.status.as_ref().and_then(|s| s.completion_time.clone()).filter(|_| ended == Some("Complete"));
            if completed > self.status.last_successful_time {
                self.status.last_successful_time = completed;
            }
        }
        active.retain(|reference| {
            let there = jobs.iter().any(|j| j.metadata.uid == reference.uid) || !is_gone(reference);
            if !there {
                let name = reference.name.as_deref().unwrap_or_default();
                self.tell("MissingJob", format!("Active job went missing: {name}"));
            }
            there
        });
        self.status.active = (!active.is_empty()).then_some(active);
    }

    /// Whether a Job is due now.
    fn consider(
        &mut self,
        cron_job: &CronJob,
        spec: &CronJobSpec,
        next: impl Fn(Timestamp) -> Option<Timestamp>,
        now: Timestamp,
    ) {
        let deadline = spec.starting_deadline_seconds.map(SignedDuration::from_secs);
        let created = cron_job.metadata.creation_timestamp.as_ref().map_or(now, |t| t.0);
        let last = self.status.last_schedule_time.as_ref().map(|t| t.0);
        let since = last.unwrap_or(created);
        let late = deadline.and_then(|d| now.checked_sub(d).ok());
        let due = most_recent(late.map_or(since, |late| since.max(late)), &next, now);
        let from = match most_recent(since, &next, now) {
            Missed::None => since,
            Missed::Some { last, .. } => last,
            Missed::Unclear => now,
        };
        let then = next(from).and_then(|t| t.checked_add(SLACK).ok());
        self.check_again = then.map(|t| Duration::try_from(t.duration_since(now)).unwrap_or_default());
        let Missed::Some { last: due, many } = due else { return };
        if many {
            let message =
                "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew";
            self.events.push((Type::Warning, "TooManyMissedTimes", message.to_owned()));
        }
        if deadline.is_some_and(|d| due.checked_add(d).is_ok_and(|end| end < now)) {
            let time = due.strftime("%a, %d %b %Y %H:%M:%S +0000");
            let message = format!("Missed scheduled time to start a job: {time}");
            self.events.push((Type::Warning, "MissSchedule", message));
            return;
        }
        let active = self.status.active.clone().unwrap_or_default();
        let name = job_name(cron_job, due);
        if last == Some(due) || active.iter().any(|r| r.name.as_ref() == Some(&name)) {
            return;
        }
        match spec.concurrency_policy.as_deref() {
            Some("Forbid") if !active.is_empty() => {
                let message = "Not starting job because prior execution is running and concurrency policy is Forbid";
                self.tell("JobAlreadyActive", message.to_owned());
                return;
            }
            Some("Replace") => self.replace = self.status.active.take().unwrap_or_default(),
            _ => {}
        }
        self.start = Some(due);
        self.status.last_schedule_time = Some(Time(due));
    }
}

/// Every minute has one.
pub fn job_name(cron_job: &CronJob, scheduled: Timestamp) -> String {
    format!("{}-{}", cron_job.metadata.name.as_deref().unwrap_or_default(), scheduled.as_second() / 60)
}

/// Times that came since a Job was last made.
#[derive(Debug, PartialEq)]
enum Missed {
    None,
    Some { last: Timestamp, many: bool },
    Unclear,
}

/// The last of the times since, without counting them all. As `mostRecentScheduleTime`.
fn most_recent(since: Timestamp, next: &impl Fn(Timestamp) -> Option<Timestamp>, now: Timestamp) -> Missed {
    let Some(first) = next(since).filter(|t| *t <= now) else { return Missed::None };
    let Some(second) = next(first).filter(|t| *t <= now) else { return Missed::Some { last: first, many: false } };
    let step = second.duration_since(first).as_secs().max(1);
    let missed = now.duration_since(first).as_secs() / step + 1;
    // One step earlier, for a schedule that is not regular.
    let from = first.checked_add(SignedDuration::from_secs((missed - 2).max(-1) * step));
    let mut last = None;
    let mut at = from.ok().and_then(next);
    while let Some(time) = at.filter(|t| *t <= now) {
        last = Some(time);
        at = next(time);
    }
    last.map_or(Missed::Unclear, |last| Missed::Some { last, many: missed > MANY_MISSED })
}

/// Finished Jobs beyond the limits, the oldest first. As `cleanupFinishedJobs`.
fn history(spec: &CronJobSpec, jobs: &[Arc<Job>]) -> Vec<Arc<Job>> {
    let started =
        |j: &Arc<Job>| j.status.as_ref().and_then(|s| s.start_time.clone()).or(j.metadata.creation_timestamp.clone());
    let limits = [("Complete", spec.successful_jobs_history_limit), ("Failed", spec.failed_jobs_history_limit)];
    let surplus = limits.into_iter().filter_map(|(kind, limit)| Some((kind, usize::try_from(limit?).ok()?)));
    let surplus = surplus.flat_map(|(kind, limit)| {
        let mut ended: Vec<_> = jobs.iter().filter(|j| finished_as(j) == Some(kind)).cloned().collect();
        ended.sort_by_key(|j| (started(j), j.metadata.name.clone()));
        ended.truncate(ended.len().saturating_sub(limit));
        ended
    });
    surplus.filter(|j| j.metadata.deletion_timestamp.is_none()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn cron_job(spec: Value, last: Option<&str>, active: &[&str]) -> CronJob {
        let references: Vec<_> = active.iter().map(|n| json!({"name": n, "uid": n})).collect();
        let mut value = json!({"metadata": {"name": "c", "creationTimestamp": "2026-01-01T10:00:30Z"},
            "spec": {"schedule": "0 * * * *", "jobTemplate": {}}, "status": {"lastScheduleTime": last, "active": references}});
        spec.as_object().into_iter().flatten().for_each(|(k, v)| value["spec"][k] = v.clone());
        serde_json::from_value(value).unwrap()
    }

    fn job(name: &str, condition: &str, started: &str) -> Arc<Job> {
        let ended = (condition == "Complete").then_some(started);
        let conditions = json!([{"type": condition, "status": "True"}]);
        let value = json!({"metadata": {"name": name, "uid": name},
            "status": {"startTime": started, "completionTime": ended, "conditions": conditions}});
        Arc::new(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn jobs_start_when_they_are_due() {
        let hour = |h: u32| format!("2026-01-01T{h}:00:00Z");
        let many = "TooManyMissedTimes";
        for (name, spec, last, now, start, events) in [
            ("not due", json!({}), None, "2026-01-01T10:30:00Z", None, vec![]),
            ("due", json!({}), None, "2026-01-01T11:00:00Z", Some(hour(11)), vec![]),
            ("done", json!({}), Some(hour(11)), "2026-01-01T11:10:00Z", None, vec![]),
            ("the last of several", json!({}), Some(hour(11)), "2026-01-01T14:10:00Z", Some(hour(14)), vec![]),
            (
                "many missed",
                json!({"schedule": "* * * * *"}),
                Some(hour(11)),
                "2026-01-01T13:00:10Z",
                Some(hour(13)),
                vec![many],
            ),
            (
                "many before the deadline",
                json!({"schedule": "* * * * *", "startingDeadlineSeconds": 90}),
                Some(hour(11)),
                "2026-01-01T13:00:10Z",
                Some(hour(13)),
                vec![],
            ),
            ("too late", json!({"startingDeadlineSeconds": 60}), None, "2026-01-01T11:10:00Z", None, vec![]),
            ("suspended", json!({"suspend": true}), None, "2026-01-01T11:10:00Z", None, vec![]),
            (
                "unknown zone",
                json!({"timeZone": "Moon/Crater"}),
                None,
                "2026-01-01T11:10:00Z",
                None,
                vec!["UnknownTimeZone"],
            ),
            (
                "zone",
                json!({"schedule": "0 20 * * *", "timeZone": "Asia/Tokyo"}),
                None,
                "2026-01-01T11:10:00Z",
                Some(hour(11)),
                vec![],
            ),
        ] {
            let made = cron_job(spec, last.as_deref(), &[]);
            let plan = plan(&made, &[], |_| false, &TimeZone::UTC, now.parse().unwrap());
            assert_eq!(plan.start.map(|t| t.to_string()), start, "{name}");
            assert_eq!(plan.events.iter().map(|(_, reason, _)| *reason).collect::<Vec<_>>(), events, "{name}");
        }
        let made = cron_job(json!({}), None, &[]);
        let plan = plan(&made, &[], |_| false, &TimeZone::UTC, "2026-01-01T10:59:00Z".parse().unwrap());
        assert_eq!(plan.check_again, Some(Duration::from_millis(60_100)));
        assert_eq!(job_name(&made, "2026-01-01T11:00:00Z".parse().unwrap()), "c-29454420");
    }

    #[test]
    fn a_schedule_without_a_zone_is_in_the_zone_of_this_process() {
        let made = cron_job(json!({"schedule": "0 20 * * *"}), None, &[]);
        let start = |zone: &TimeZone| plan(&made, &[], |_| false, zone, "2026-01-01T11:10:00Z".parse().unwrap()).start;
        assert_eq!(
            start(&TimeZone::get("Asia/Tokyo").unwrap()).map(|t| t.to_string()),
            Some("2026-01-01T11:00:00Z".to_owned())
        );
        assert_eq!(start(&TimeZone::UTC), None);
    }

    #[test]
    fn a_running_job_meets_the_policy() {
        for (policy, starts, replaced) in [("Allow", true, 0), ("Forbid", false, 0), ("Replace", true, 1)] {
            let made = cron_job(json!({"concurrencyPolicy": policy}), None, &["a"]);
            let running = job("a", "Suspended", "2026-01-01T10:59:00Z");
            let plan = plan(&made, &[running], |_| false, &TimeZone::UTC, "2026-01-01T11:00:05Z".parse().unwrap());
            assert_eq!((plan.start.is_some(), plan.replace.len()), (starts, replaced), "{policy}");
        }
    }

    #[test]
    fn what_ended_is_noted_and_then_forgotten() {
        let made =
            cron_job(json!({"successfulJobsHistoryLimit": 1, "failedJobsHistoryLimit": 0}), None, &["b", "x", "y"]);
        let jobs = [
            job("a", "Complete", "2026-01-01T10:01:00Z"),
            job("b", "Complete", "2026-01-01T10:02:00Z"),
            job("f", "Failed", "2026-01-01T10:03:00Z"),
            job("stray", "Suspended", "2026-01-01T10:03:00Z"),
        ];
        let gone = |r: &ObjectReference| r.name.as_deref() == Some("x");
        let plan = plan(&made, &jobs, gone, &TimeZone::UTC, "2026-01-01T10:10:00Z".parse().unwrap());
        let reasons: Vec<_> = plan.events.iter().map(|(_, reason, _)| *reason).collect();
        assert_eq!(reasons, ["SawCompletedJob", "UnexpectedJob", "MissingJob"]);
        let active: Vec<_> = plan.status.active.iter().flatten().filter_map(|r| r.name.clone()).collect();
        assert_eq!(active, ["y"]);
        assert_eq!(plan.status.last_successful_time.map(|t| t.0.to_string()).as_deref(), Some("2026-01-01T10:02:00Z"));
        let deleted: Vec<_> = plan.delete.iter().filter_map(|j| j.metadata.name.clone()).collect();
        assert_eq!(deleted, ["a", "f"]);
    }
}
