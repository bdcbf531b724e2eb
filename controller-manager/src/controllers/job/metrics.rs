//! Metrics of Jobs, with Kubernetes' names.
use super::{
    plan::{Plan, has_finalizer},
    policy::{action_of, has_failed},
};
use apimachinery::pod::is_terminal;
use component_base::metrics::{Labels, register};
use k8s_openapi::api::{
    batch::v1::{Job, JobSpec, JobStatus},
    core::v1::Pod,
};
use prometheus_client::metrics::{
    counter::Counter,
    family::Family,
    histogram::{Histogram, exponential_buckets},
};
use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

const HANDLED: &str = "`The number of failed Pods handled by failure policy with\\n\t\t\trespect to the failure policy action \
                       applied based on the matched\\n\t\t\trule. Possible values of the action label correspond to \
                       the\\n\t\t\tpossible values for the failure policy rule action, which are:\\n\t\t\t\"FailJob\", \"Ignore\" \
                       and \"Count\".`";
const TRACKED: &str = "`The number of terminated pods (phase=Failed|Succeeded)\\nthat have the finalizer \
                       batch.kubernetes.io/job-tracking\\nThe event label can be \"add\" or \"delete\".`";

struct Families {
    syncs: Family<Labels<3>, Counter>,
    durations: Family<Labels<3>, Histogram, fn() -> Histogram>,
    finished: Family<Labels<3>, Counter>,
    pods: Family<Labels<2>, Counter>,
    handled: Family<Labels<1>, Counter>,
    tracked: Family<Labels<1>, Counter>,
}

static FAMILIES: LazyLock<Families> = LazyLock::new(|| {
    let durations: fn() -> Histogram = || Histogram::new(exponential_buckets(0.004, 2.0, 15));
    Families {
        syncs: register("job_controller_job_syncs", "The number of job syncs", Family::default()),
        durations: register(
            "job_controller_job_sync_duration_seconds",
            "The time it took to sync a job",
            Family::new_with_constructor(durations),
        ),
        finished: register("job_controller_jobs_finished", "The number of finished jobs", Family::default()),
        pods: register(
            "job_controller_job_pods_finished",
            "The number of finished Pods that are fully tracked",
            Family::default(),
        ),
        handled: register("job_controller_pod_failures_handled_by_failure_policy", HANDLED, Family::default()),
        tracked: register("job_controller_terminated_pods_tracking_finalizer", TRACKED, Family::default()),
    }
});

fn mode(job: &Job) -> String {
    job.spec.as_ref().and_then(|s| s.completion_mode.clone()).unwrap_or_else(|| "NonIndexed".to_owned())
}

/// Counts a step.
pub fn synced(job: &Job, plan: &Plan, succeeded: bool, took: Duration) {
    let action = match (plan.create.is_empty(), plan.delete.is_empty()) {
        (false, _) => "pods_created",
        (true, false) => "pods_deleted",
        (true, true) => "reconciling",
    };
    let result = if succeeded { "success" } else { "error" };
    let labels = [("completion_mode", mode(job)), ("result", result.to_owned()), ("action", action.to_owned())];
    FAMILIES.syncs.get_or_create(&labels).inc();
    FAMILIES.durations.get_or_create(&labels).observe(took.as_secs_f64());
}

/// Counts what a status that was written says for the first time: pods that ended, and the Job's own end.
pub fn told(job: &Job, status: &JobStatus) {
    let before = job.status.clone().unwrap_or_default();
    let ends = [("succeeded", before.succeeded, status.succeeded), ("failed", before.failed, status.failed)];
    for (result, before, now) in ends {
        let more = u64::try_from(now.unwrap_or(0) - before.unwrap_or(0)).unwrap_or(0);
        if more > 0 {
            let labels = [("completion_mode", mode(job)), ("result", result.to_owned())];
            FAMILIES.pods.get_or_create(&labels).inc_by(more);
        }
    }
    let end = |status: &JobStatus| {
        let mut conditions = status.conditions.iter().flatten().filter(|c| c.status == "True");
        conditions.find(|c| matches!(c.type_.as_str(), "Complete" | "Failed")).cloned()
    };
    if let Some(end) = end(status).filter(|_| end(&before).is_none()) {
        let result = if end.type_ == "Complete" { "succeeded" } else { "failed" };
        let reason = end.reason.unwrap_or_default();
        let labels = [("completion_mode", mode(job)), ("result", result.to_owned()), ("reason", reason)];
        FAMILIES.finished.get_or_create(&labels).inc();
    }
}

/// Pods that were counted, or ignored, have lost the finalizer: what the policy made of those that failed.
pub fn released(spec: &JobSpec, pods: &[Arc<Pod>]) {
    for action in pods.iter().filter(|p| has_failed(spec, p)).filter_map(|p| action_of(spec, p)) {
        FAMILIES.handled.get_or_create(&[("action", action.to_owned())]).inc();
    }
}

/// A pod came, changed or went. As `recordFinishedPodWithTrackingFinalizer`.
pub fn seen(old: Option<&Pod>, new: Option<&Pod>) {
    let tracked = |pod: Option<&Pod>| pod.is_some_and(|p| is_terminal(p) && has_finalizer(p));
    let event = match (tracked(old), tracked(new)) {
        (false, true) => "add",
        (true, false) => "delete",
        _ => return,
    };
    FAMILIES.tracked.get_or_create(&[("event", event.to_owned())]).inc();
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn jobs_and_their_pods_are_counted_once() {
        let job = |status: serde_json::Value| -> Job {
            serde_json::from_value(json!({"spec": {"completionMode": "Indexed", "template": {}}, "status": status}))
                .unwrap()
        };
        let ended = json!({"succeeded": 2, "failed": 1,
            "conditions": [{"type": "Complete", "status": "True", "reason": "CompletionsReached"}]});
        let status = |job: &Job| job.status.clone().unwrap();
        let (before, after) = (job(json!({"succeeded": 1})), job(ended));
        told(&before, &status(&after));
        told(&after, &status(&after));
        let idle = Plan {
            status: JobStatus::default(),
            release: Vec::new(),
            create: Vec::new(),
            delete: Vec::new(),
            events: Vec::new(),
            check_again: None,
        };
        synced(&after, &idle, true, Duration::from_millis(5));
        let pod = |finalizers: serde_json::Value| -> Pod {
            let status = json!({"phase": "Failed", "conditions": [{"type": "DisruptionTarget", "status": "True"}]});
            serde_json::from_value(json!({"metadata": {"name": "p", "finalizers": finalizers}, "status": status}))
                .unwrap()
        };
        let (held, free) = (pod(json!(["batch.kubernetes.io/job-tracking"])), pod(json!([])));
        seen(None, Some(&held));
        seen(Some(&held), Some(&held));
        seen(Some(&held), Some(&free));
        seen(Some(&free), None);
        let rule = json!({"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]});
        let spec = json!({"template": {}, "podFailurePolicy": {"rules": [rule]}});
        released(&serde_json::from_value(spec).unwrap(), &[Arc::new(free)]);
        let text = component_base::metrics::encode();
        for line in [
            r#"terminated_pods_tracking_finalizer_total{event="add"} 1"#,
            r#"terminated_pods_tracking_finalizer_total{event="delete"} 1"#,
            r#"pod_failures_handled_by_failure_policy_total{action="Ignore"} 1"#,
            r#"job_pods_finished_total{completion_mode="Indexed",result="succeeded"} 1"#,
            r#"job_pods_finished_total{completion_mode="Indexed",result="failed"} 1"#,
            r#"jobs_finished_total{completion_mode="Indexed",result="succeeded",reason="CompletionsReached"} 1"#,
            r#"job_syncs_total{completion_mode="Indexed",result="success",action="reconciling"} 1"#,
            r#"job_sync_duration_seconds_bucket{le="0.008",completion_mode="Indexed",result="success",action="reconciling"} 1"#,
        ] {
            assert!(text.contains(&format!("job_controller_{line}\n")), "{line}\n{text}");
        }
    }
}
