//! What all workloads share: a status that can be read, updated and patched; lists and deletions of collections.

use super::*;
use crate::start;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statuses_are_read_and_written_and_collections_deleted() {
    let Some(server) = start().await else { return };
    let _kubelet = all_run(&server);
    let rc = |mut made: Value| {
        made["spec"]["selector"] = json!({"app": "w"});
        made
    };
    let plain = || workload("w", "x:1", json!({}));
    let none = || workload("w", "x:1", json!({"replicas": 0}));
    let job = json!({"metadata": {"name": "w", "labels": {"app": "w"}}, "spec": {"suspend": true, "template": {
        "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x:1"}]}}}});
    let cron = json!({"metadata": {"name": "w", "labels": {"app": "w"}}, "spec": {"schedule": "0 0 31 2 *",
        "jobTemplate": {"spec": job["spec"]}}});
    let mut stateful = none();
    stateful["spec"]["serviceName"] = json!("svc");
    for (all, made) in [
        (format!("{APPS}/deployments"), none()),
        (format!("{APPS}/replicasets"), none()),
        (format!("{V1}/replicationcontrollers"), rc(none())),
        (format!("{APPS}/statefulsets"), stateful),
        (format!("{APPS}/daemonsets"), plain()),
        (format!("{BATCH}/jobs"), job.clone()),
        (format!("{BATCH}/cronjobs"), cron),
    ] {
        let since = server.get(&all).await.unwrap()["metadata"]["resourceVersion"].clone();
        server.post(&all, &made).await.unwrap();
        let path = format!("{all}/w");
        let status = format!("{path}/status");
        // CronJobs have no conditions.
        if all.ends_with("cronjobs") {
            let patch = json!({"status": {"lastScheduleTime": "2026-01-01T00:00:00Z"}});
            server.merge(&status, &patch).await.unwrap();
            assert_eq!(server.get(&status).await.unwrap()["status"], patch["status"]);
            eventually("the status is updated", async || {
                let mut object = server.get(&status).await.map_err(|e| format!("{e:?}"))?;
                object["status"]["lastSuccessfulTime"] = json!("2026-01-01T00:00:01Z");
                server.put(&status, &object).await.map_err(|e| format!("{e:?}"))
            })
            .await;
            let seen = server.get(&path).await.unwrap();
            assert_eq!(seen["status"]["lastSuccessfulTime"], "2026-01-01T00:00:01Z");
        } else {
            // The controller writes too, so that an update may have to be tried again.
            let condition = |reason: &str| json!({"type": "StatusUpdate", "status": "True", "reason": reason});
            eventually("the status is updated", async || {
                let mut object = server.get(&status).await.map_err(|e| format!("{e:?}"))?;
                object["status"]["conditions"] = json!([condition("E2E")]);
                server.put(&status, &object).await.map_err(|e| format!("{e:?}"))
            })
            .await;
            until(&server, "the update is seen", &status, |o| has(o, "StatusUpdate", "E2E")).await;
            let patch = json!({"status": {"conditions": [condition("Patched")]}});
            server.merge(&status, &patch).await.unwrap();
            until(&server, "the patch is seen", &path, |o| has(o, "StatusUpdate", "Patched")).await;
        }
        let scaled = !["daemonsets", "jobs"].iter().any(|kind| all.ends_with(kind));
        if scaled && !all.ends_with("cronjobs") {
            eventually("it is scaled", async || {
                let mut scale = server.get(&format!("{path}/scale")).await.map_err(|e| format!("{e:?}"))?;
                assert_eq!((&scale["kind"], &scale["spec"]), (&json!("Scale"), &json!({})), "{all}");
                scale["spec"]["replicas"] = json!(2);
                server.put(&format!("{path}/scale"), &scale).await.map_err(|e| format!("{e:?}"))
            })
            .await;
            assert_eq!(server.get(&path).await.unwrap()["spec"]["replicas"], 2);
            let patched = server.merge(&format!("{path}/scale"), &json!({"spec": {"replicas": 1}})).await.unwrap();
            assert_eq!(patched["spec"]["replicas"], 1);
            let runs = |o: &Value| o["status"]["readyReplicas"] == 1 && o["status"]["replicas"] == 1;
            until(&server, "its pod runs", &path, runs).await;
            assert_eq!(server.get(&format!("{path}/scale")).await.unwrap()["status"]["replicas"], 1);
        }
        server.merge(&path, &json!({"metadata": {"labels": {"patched": "yes"}}})).await.unwrap();
        assert_eq!(server.names(&format!("{all}?labelSelector=patched=yes")).await, ["w"]);
        eventually("it is updated", async || {
            let mut object = server.get(&path).await.map_err(|e| format!("{e:?}"))?;
            object["metadata"]["annotations"]["updated"] = json!("yes");
            server.put(&path, &object).await.map_err(|e| format!("{e:?}"))
        })
        .await;
        assert_eq!(server.get(&path).await.unwrap()["metadata"]["annotations"]["updated"], "yes");
        server.delete(&format!("{all}?labelSelector=patched=yes"), &json!({})).await.unwrap();
        server.gone(&path).await;
        // Whoever watched has seen it all.
        let since = since.as_str().unwrap();
        let watch = format!("{all}?watch=1&timeoutSeconds=1&fieldSelector=metadata.name=w&resourceVersion={since}");
        let (_, _, body) = server.raw("GET", &watch, &[], Vec::new()).await;
        let events: Vec<Value> =
            String::from_utf8_lossy(&body).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let kinds: Vec<_> = events.iter().filter_map(|event| event["type"].as_str()).collect();
        assert_eq!((kinds.first(), kinds.last()), (Some(&"ADDED"), Some(&"DELETED")), "{all}: {kinds:?}");
        assert!(kinds[1..kinds.len() - 1].iter().all(|kind| *kind == "MODIFIED") && kinds.len() > 3, "{kinds:?}");
    }
}
