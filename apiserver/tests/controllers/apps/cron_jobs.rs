//! CronJobs: policies of concurrency, suspension, history. Times are made due by what the status says of the last one.

use super::*;
use crate::start;

const CRON_JOBS: &str = "/apis/batch/v1/namespaces/t/cronjobs";

/// Two times, each long enough ago, and each in a minute of its own.
const SCHEDULES: [&str; 2] = ["0 0 1 1 *", "0 0 1 * *"];

async fn make(server: &Server, name: &str, policy: &str, suspend: bool) -> String {
    let mut template = template(name, "x:1");
    template["spec"]["restartPolicy"] = json!("Never");
    let spec = json!({"schedule": "0 0 31 2 *", "concurrencyPolicy": policy, "suspend": suspend,
        "jobTemplate": {"metadata": {"labels": {"app": name}}, "spec": {"template": template}}});
    server.post(CRON_JOBS, &json!({"metadata": {"name": name}, "spec": spec})).await.unwrap();
    format!("{CRON_JOBS}/{name}")
}

/// Makes a time due that another of the schedules did not make due.
async fn due(server: &Server, path: &str, at: usize) {
    let status = json!({"status": {"lastScheduleTime": "2020-01-01T00:00:00Z"}});
    server.merge(&format!("{path}/status"), &status).await.unwrap();
    // The first of the year might be the first of the month.
    let schedule = if jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).month() == 1 && at == 1 {
        "0 12 31 12 *"
    } else {
        SCHEDULES[at]
    };
    server.merge(path, &json!({"spec": {"schedule": schedule}})).await.unwrap();
}

async fn jobs(server: &Server, app: &str, count: usize) -> Vec<String> {
    let path = format!("{BATCH}/jobs?labelSelector=app={app}");
    let what = format!("{count} jobs of {app}");
    let list = until(server, &what, &path, |list| items(list).len() == count).await;
    items(&list).into_iter().map(|job| name(job).to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cron_jobs_start_jobs_as_their_policy_says() {
    let Some(server) = start().await else { return };
    let _kubelet = kubelet(&server, |pod| {
        let ends = pod["metadata"]["labels"]["app"] == "quick";
        Some(if ends { ended("Succeeded", 0) } else { running() })
    });
    let suspended = make(&server, "suspended", "Allow", true).await;
    due(&server, &suspended, 0).await;
    for (policy, count) in [("Allow", 2), ("Forbid", 1), ("Replace", 1)] {
        let app = policy.to_lowercase();
        let path = make(&server, &app, policy, false).await;
        due(&server, &path, 0).await;
        let first = jobs(&server, &app, 1).await;
        until(&server, "one is active", &path, |c| c["status"]["active"].as_array().is_some_and(|a| a.len() == 1))
            .await;
        due(&server, &path, 1).await;
        if policy == "Forbid" {
            event(&server, &app, "JobAlreadyActive").await;
        }
        until(&server, "the second time", &path, |cron_job| {
            let active =
                cron_job["status"]["active"].as_array().map(|a| a.iter().map(|r| &r["name"]).collect::<Vec<_>>());
            let active = active.unwrap_or_default();
            active.len() == count && (policy != "Replace" || active[0] != first[0].as_str())
        })
        .await;
        let second = jobs(&server, &app, count).await;
        assert_eq!(second.contains(&first[0]), policy != "Replace", "{second:?}");
    }
    event(&server, "allow", "SuccessfulCreate").await;
    jobs(&server, "suspended", 0).await;

    // What ended is noted.
    let quick = make(&server, "quick", "Forbid", false).await;
    due(&server, &quick, 0).await;
    let ended = until(&server, "it ended", &quick, |c| !c["status"]["lastSuccessfulTime"].is_null()).await;
    assert!(ended["status"].get("active").is_none(), "{ended}");
    event(&server, "quick", "SawCompletedJob").await;
    // Jobs of the past go.
    server.merge(&quick, &json!({"spec": {"successfulJobsHistoryLimit": 0}})).await.unwrap();
    jobs(&server, "quick", 0).await;
}
