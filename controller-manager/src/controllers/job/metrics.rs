//! Metrics of Jobs, with Kubernetes' names.
use super::plan::Plan;
use component_base::metrics::{Labels, register};
use k8s_openapi::api::batch::v1::{Job, JobStatus};
use prometheus_client::metrics::{
    counter::Counter,
    family::Family,
    histogram::{Histogram, exponential_buckets},
};
use std::{sync::LazyLock, time::Duration};

struct Families {
    syncs: Family<Labels<3>, Counter>,
    durations: Family<Labels<3>, Histogram, fn() -> Histogram>,
    finished: Family<Labels<3>, Counter>,
    pods: Family<Labels<2>, Counter>,
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
        let text = component_base::metrics::encode();
        for line in [
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
