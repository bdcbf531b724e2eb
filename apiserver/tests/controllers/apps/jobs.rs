//! Jobs: indexes, policies of failure and success, adoption, ends of all kinds.

use super::*;
use crate::start;
use std::{collections::HashSet, sync::Mutex};

const JOBS: &str = "/apis/batch/v1/namespaces/t/jobs";

/// A Job whose pods fare as `fate` says, by the kubelet below.
fn job(name: &str, fate: &str, spec: Value) -> Value {
    let mut template = template(name, "x:1");
    template["metadata"]["annotations"] = json!({"fate": fate});
    template["spec"]["restartPolicy"] = json!("Never");
    let mut made = json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": {"template": template}});
    spec.as_object().into_iter().flatten().for_each(|(k, v)| made["spec"][k] = v.clone());
    made
}

fn indexed(name: &str, fate: &str, completions: i32, spec: Value) -> Value {
    let mut made = job(name, fate, spec);
    made["spec"]["completionMode"] = json!("Indexed");
    made["spec"]["completions"] = json!(completions);
    made["spec"]["parallelism"] = json!(completions);
    made
}

/// Fates: `run`, `succeed`, `fail`, `odd fail`, `only 0`, `evicted once`, `restarted`.
fn fated(server: &Server) -> Kubelet {
    let seen = Mutex::new(HashSet::new());
    kubelet(server, move |pod| {
        let labels = &pod["metadata"]["labels"];
        let index = labels["batch.kubernetes.io/job-completion-index"].as_str().unwrap_or("0").parse::<i32>().unwrap();
        let fresh = pod["status"]["phase"] == "Pending";
        let or_run = |ends: Option<Value>| ends.or_else(|| fresh.then(running));
        match pod["metadata"]["annotations"]["fate"].as_str().unwrap_or_default() {
            "succeed" => Some(ended("Succeeded", 0)),
            "fail" => Some(ended("Failed", 42)),
            "odd fail" if index % 2 == 1 => Some(ended("Failed", 42)),
            "odd fail" => Some(ended("Succeeded", 0)),
            "only 0" => or_run((index == 0).then(|| ended("Succeeded", 0))),
            "evicted once" if seen.lock().unwrap().insert(index) => {
                let mut status = ended("Failed", 137);
                status["conditions"] =
                    json!([{"type": "DisruptionTarget", "status": "True", "lastTransitionTime": now()}]);
                Some(status)
            }
            "evicted once" => Some(ended("Succeeded", 0)),
            "restarted" if fresh => {
                let mut status = running();
                let restarted = json!({"name": "c", "image": "x", "imageID": "x", "ready": true, "restartCount": 1,
                    "state": {"running": {}}});
                status["containerStatuses"] = json!([restarted]);
                Some(status)
            }
            "restarted" => Some(ended("Succeeded", 0)),
            _ => or_run(None),
        }
    })
}

async fn post(server: &Server, job: Value) -> String {
    let made = server.post(JOBS, &job).await.unwrap();
    format!("{JOBS}/{}", name(&made))
}

/// Waits until it ended so, for that reason; gives its status.
async fn ends(server: &Server, path: &str, kind: &str, reason: &str) -> Value {
    let job = until(server, &format!("{path} {kind} {reason}"), path, |job| has(job, kind, reason)).await;
    let interim = if kind == "Complete" { "SuccessCriteriaMet" } else { "FailureTarget" };
    assert!(has(&job, interim, reason), "{job}");
    let status = job["status"].clone();
    assert!(status.get("active").is_none() && status["uncountedTerminatedPods"] == json!({}), "{status}");
    status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_end_as_their_policies_say() {
    let Some(server) = start().await else { return };
    let _kubelet = fated(&server);
    let on_code =
        |action: &str, code: i32| json!({"action": action, "onExitCodes": {"operator": "In", "values": [code]}});
    let policy = |rule: Value| json!({"rules": [rule]});
    let disrupted = json!({"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]});
    let success = |rule: Value| json!({"successPolicy": {"rules": [rule]}});

    let plain = post(&server, job("plain", "succeed", json!({"completions": 4, "parallelism": 2}))).await;
    let restarts = post(&server, {
        let mut made = job("restarts", "restarted", json!({"completions": 3, "parallelism": 2}));
        made["spec"]["template"]["spec"]["restartPolicy"] = json!("OnFailure");
        made
    })
    .await;
    let index = post(&server, indexed("index", "succeed", 4, json!({}))).await;
    let code = json!({"backoffLimit": 5, "podFailurePolicy": policy(on_code("FailJob", 42))});
    let code = post(&server, job("code", "fail", code)).await;
    let ignored = json!({"backoffLimit": 0, "podFailurePolicy": policy(disrupted)});
    let ignored = post(&server, indexed("ignored", "evicted once", 3, ignored)).await;
    let per_index = post(&server, indexed("per-index", "odd fail", 4, json!({"backoffLimitPerIndex": 1}))).await;
    let fail_index = json!({"backoffLimitPerIndex": 1, "podFailurePolicy": policy(on_code("FailIndex", 42))});
    let fail_index = post(&server, indexed("fail-index", "odd fail", 4, fail_index)).await;
    let most = json!({"backoffLimitPerIndex": 0, "maxFailedIndexes": 1});
    let most = post(&server, indexed("most", "fail", 4, most)).await;
    let all = post(&server, indexed("all", "succeed", 3, success(json!({"succeededIndexes": "0-2"})))).await;
    let some = post(&server, indexed("some", "only 0", 3, success(json!({"succeededCount": 1})))).await;
    let these = post(&server, indexed("these", "only 0", 3, success(json!({"succeededIndexes": "0"})))).await;
    let late = post(&server, job("late", "run", json!({"activeDeadlineSeconds": 1}))).await;
    let backoff = post(&server, job("backoff", "fail", json!({"backoffLimit": 1}))).await;

    assert_eq!(ends(&server, &plain, "Complete", "CompletionsReached").await["succeeded"], 4);
    assert_eq!(ends(&server, &restarts, "Complete", "CompletionsReached").await["succeeded"], 3);
    assert_eq!(ends(&server, &index, "Complete", "CompletionsReached").await["completedIndexes"], "0-3");
    for pod in pods(&server, "index", 4).await {
        let index = pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"].clone();
        assert_eq!(pod["spec"]["hostname"], format!("index-{}", index.as_str().unwrap()));
        assert_eq!(pod["spec"]["containers"][0]["env"][0]["name"], "JOB_COMPLETION_INDEX");
        let finalizers = &pod["metadata"]["finalizers"];
        assert!(finalizers.is_null(), "{finalizers}");
    }
    assert_eq!(ends(&server, &code, "Failed", "PodFailurePolicy").await["failed"], 1);
    let status = ends(&server, &ignored, "Complete", "CompletionsReached").await;
    assert!(status["succeeded"] == 3 && status.get("failed").is_none(), "{status}");
    let status = ends(&server, &per_index, "Failed", "FailedIndexes").await;
    assert_eq!((&status["failedIndexes"], &status["completedIndexes"]), (&json!("1,3"), &json!("0,2")));
    assert_eq!(status["failed"], 4, "each was tried twice");
    let status = ends(&server, &fail_index, "Failed", "FailedIndexes").await;
    assert_eq!((&status["failedIndexes"], &status["failed"]), (&json!("1,3"), &json!(2)));
    ends(&server, &most, "Failed", "MaxFailedIndexesExceeded").await;
    assert_eq!(ends(&server, &all, "Complete", "SuccessPolicy").await["completedIndexes"], "0-2");
    assert_eq!(ends(&server, &some, "Complete", "SuccessPolicy").await["completedIndexes"], "0");
    assert_eq!(ends(&server, &these, "Complete", "SuccessPolicy").await["completedIndexes"], "0");
    ends(&server, &late, "Failed", "DeadlineExceeded").await;
    ends(&server, &backoff, "Failed", "BackoffLimitExceeded").await;
    event(&server, "plain", "Completed").await;
    event(&server, "backoff", "BackoffLimitExceeded").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_adopt_release_suspend_and_go() {
    let Some(server) = start().await else { return };
    let _kubelet = fated(&server);
    let parallel = json!({"parallelism": 2, "completions": 2, "backoffLimit": 6});
    let path = post(&server, job("parallel", "run", parallel)).await;
    let uid = server.get(&path).await.unwrap()["metadata"]["uid"].clone();
    let all = pods(&server, "parallel", 2).await;
    let orphan = format!("{V1}/pods/{}", name(&all[0]));
    server.merge(&orphan, &json!({"metadata": {"ownerReferences": null}})).await.unwrap();
    until(&server, "adopted again", &orphan, |p| p["metadata"]["ownerReferences"][0]["uid"] == uid).await;
    let labels = json!({"metadata": {"labels": {"batch.kubernetes.io/controller-uid": null, "controller-uid": null, "app": "free"}}});
    server.merge(&orphan, &labels).await.unwrap();
    let free = until(&server, "released", &orphan, |p| p["metadata"].get("ownerReferences").is_none()).await;
    assert!(free["metadata"].get("finalizers").is_none(), "{free}");
    pods(&server, "parallel", 2).await;

    // Suspended it has no pods; resumed it has them again.
    server.merge(&path, &json!({"spec": {"suspend": true}})).await.unwrap();
    pods(&server, "parallel", 0).await;
    let stopped = until(&server, "suspended", &path, |job| has(job, "Suspended", "JobSuspended")).await;
    assert!(stopped["status"].get("startTime").is_none(), "{stopped}");
    event(&server, "parallel", "Suspended").await;
    server.merge(&path, &json!({"spec": {"suspend": false}})).await.unwrap();
    pods(&server, "parallel", 2).await;
    event(&server, "parallel", "Resumed").await;

    // Pods go with it, whatever finalizer they have.
    server.delete(&path, &json!({"propagationPolicy": "Background"})).await.unwrap();
    pods(&server, "parallel", 0).await;

    // Nobody's business but its manager's; and gone when its time is over.
    let managed = post(&server, job("managed", "succeed", json!({"managedBy": "example.com/other"}))).await;
    let brief = post(&server, job("brief", "succeed", json!({"ttlSecondsAfterFinished": 0}))).await;
    server.gone(&brief).await;
    assert!(server.get(&managed).await.unwrap()["status"].get("startTime").is_none());

    // The life of one that is suspended from the start.
    let path = post(&server, job("life", "run", json!({"suspend": true}))).await;
    server.merge(&path, &json!({"metadata": {"labels": {"patched": "yes"}}})).await.unwrap();
    let mut seen = until(&server, "it is seen", &path, |job| has(job, "Suspended", "")).await;
    seen["metadata"]["annotations"] = json!({"updated": "true"});
    server.put(&path, &seen).await.unwrap();
    let everywhere = server.names("/apis/batch/v1/jobs?labelSelector=patched=yes").await;
    assert_eq!(everywhere, ["life"]);
    server.delete(&format!("{JOBS}?labelSelector=patched=yes"), &json!({})).await.unwrap();
    server.gone(&path).await;
}
