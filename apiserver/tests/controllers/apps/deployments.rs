//! Deployments: recreate, rolling update, rollover, history, proportional scaling.

use super::*;
use crate::start;

const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/t/deployments";

/// The kubelet's pods are ready, unless their image is bad.
fn good_ones_run(server: &Server) -> Kubelet {
    kubelet(server, |pod| (pod["status"]["phase"] == "Pending" && image_of(pod) != "bad:1").then(running))
}

async fn complete(server: &Server, name: &str) -> Value {
    let path = format!("{DEPLOYMENTS}/{name}");
    until(server, &format!("{name} is complete"), &path, |d| {
        let status = &d["status"];
        let all = [&status["replicas"], &status["updatedReplicas"], &status["availableReplicas"]];
        status["observedGeneration"] == d["metadata"]["generation"] && all.iter().all(|n| **n == d["spec"]["replicas"])
    })
    .await
}

fn sets_of(app: &str) -> String {
    format!("{APPS}/replicasets?labelSelector=app={app}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deployments_replace_their_pods() {
    let Some(server) = start().await else { return };
    let _kubelet = good_ones_run(&server);
    // Recreate: never an old and a new one at once.
    let spec = json!({"replicas": 2, "strategy": {"type": "Recreate"}});
    server.post(DEPLOYMENTS, &workload("recreate", "x:1", spec)).await.unwrap();
    complete(&server, "recreate").await;
    server.merge(&format!("{DEPLOYMENTS}/recreate"), &image("x:2")).await.unwrap();
    until(&server, "new pods", &pods_of("recreate"), |list| {
        let images: Vec<_> = items(list).into_iter().map(image_of).collect();
        assert!(!(images.contains(&"x:1") && images.contains(&"x:2")), "{images:?}");
        images == ["x:2", "x:2"]
    })
    .await;

    // Rolling: a set that is there already is adopted, and its pods replaced.
    let orphans = workload("rolling", "x:0", json!({"replicas": 1}));
    server.post(&format!("{APPS}/replicasets"), &orphans).await.unwrap();
    pods(&server, "rolling", 1).await;
    server.post(DEPLOYMENTS, &workload("rolling", "x:1", json!({"replicas": 1}))).await.unwrap();
    complete(&server, "rolling").await;
    let left = pods(&server, "rolling", 1).await;
    assert_eq!(image_of(&left[0]), "x:1");
    let sets = server.get(&sets_of("rolling")).await.unwrap();
    assert!(items(&sets).iter().all(|s| s["metadata"]["ownerReferences"][0]["kind"] == "Deployment"), "{sets}");

    // Rollover: a change before the last one is done.
    server.post(DEPLOYMENTS, &workload("rollover", "x:1", json!({"replicas": 3, "minReadySeconds": 1}))).await.unwrap();
    complete(&server, "rollover").await;
    for next in ["bad:1", "x:3", "x:4"] {
        server.merge(&format!("{DEPLOYMENTS}/rollover"), &image(next)).await.unwrap();
        let what = format!("a set of {next}");
        let of =
            |list: &Value| items(list).iter().any(|s| s["spec"]["template"]["spec"]["containers"][0]["image"] == next);
        until(&server, &what, &sets_of("rollover"), of).await;
    }
    complete(&server, "rollover").await;
    assert!(pods(&server, "rollover", 3).await.iter().all(|p| image_of(p) == "x:4"));

    // History: old sets go, all but so many.
    server
        .post(DEPLOYMENTS, &workload("history", "x:1", json!({"replicas": 1, "revisionHistoryLimit": 0})))
        .await
        .unwrap();
    complete(&server, "history").await;
    server.merge(&format!("{DEPLOYMENTS}/history"), &image("x:2")).await.unwrap();
    complete(&server, "history").await;
    let set = until(&server, "one set", &sets_of("history"), |list| items(list).len() == 1).await;
    assert_eq!(set["items"][0]["metadata"]["annotations"]["deployment.kubernetes.io/revision"], "2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deployments_scale_in_proportion_and_live() {
    let Some(server) = start().await else { return };
    let _kubelet = good_ones_run(&server);
    let strategy = json!({"rollingUpdate": {"maxSurge": 3, "maxUnavailable": 2}});
    server.post(DEPLOYMENTS, &workload("d", "x:1", json!({"replicas": 10, "strategy": strategy}))).await.unwrap();
    complete(&server, "d").await;
    let path = format!("{DEPLOYMENTS}/d");
    server.merge(&path, &image("bad:1")).await.unwrap();
    let sizes = async |old: i64, new: i64| {
        until(&server, &format!("sizes {old} and {new}"), &sets_of("d"), |list| {
            let size = |image: &str| {
                let is = |s: &&&Value| s["spec"]["template"]["spec"]["containers"][0]["image"] == image;
                items(list).iter().find(is).and_then(|s| s["spec"]["replicas"].as_i64())
            };
            (size("x:1"), size("bad:1")) == (Some(old), Some(new))
        })
        .await
    };
    sizes(8, 5).await;
    server.merge(&path, &json!({"spec": {"replicas": 30}})).await.unwrap();
    sizes(20, 13).await;

    // Patched, scaled, its status read and written, deleted.
    server.merge(&path, &json!({"metadata": {"labels": {"patched": "yes"}}, "spec": {"replicas": 2}})).await.unwrap();
    server.merge(&path, &image("x:2")).await.unwrap();
    let done = complete(&server, "d").await;
    assert!(has(&done, "Available", "MinimumReplicasAvailable"), "{done}");
    assert!(has(&done, "Progressing", "NewReplicaSetAvailable"), "{done}");
    event(&server, "d", "ScalingReplicaSet").await;
    server.delete(&format!("{DEPLOYMENTS}?labelSelector=patched=yes"), &json!({})).await.unwrap();
    pods(&server, "d", 0).await;

    // A rollout that makes no progress says so, and goes on when it can.
    server
        .post(DEPLOYMENTS, &workload("stuck", "bad:1", json!({"replicas": 1, "progressDeadlineSeconds": 1})))
        .await
        .unwrap();
    let stuck = format!("{DEPLOYMENTS}/stuck");
    let timed_out = |d: &Value| {
        let conditions = d["status"]["conditions"].as_array();
        conditions.into_iter().flatten().any(|c| c["reason"] == "ProgressDeadlineExceeded" && c["status"] == "False")
    };
    until(&server, "the deadline passes", &stuck, timed_out).await;
    server.merge(&stuck, &image("x:1")).await.unwrap();
    complete(&server, "stuck").await;

    // Paused it changes nothing but its size.
    server.merge(&stuck, &json!({"spec": {"paused": true}})).await.unwrap();
    server.merge(&stuck, &image("x:2")).await.unwrap();
    server.merge(&stuck, &json!({"spec": {"replicas": 2}})).await.unwrap();
    let list = pods(&server, "stuck", 2).await;
    assert!(list.iter().all(|p| image_of(p) == "x:1"));
    server.merge(&stuck, &json!({"spec": {"paused": false}})).await.unwrap();
    complete(&server, "stuck").await;
    assert!(pods(&server, "stuck", 2).await.iter().all(|p| image_of(p) == "x:2"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_set_that_cannot_be_made_is_told_and_made_when_it_can() {
    let Some(server) = start().await else { return };
    let _kubelet = all_run(&server);
    let quotas = format!("{V1}/resourcequotas");
    let none = json!({"metadata": {"name": "none"}, "spec": {"hard": {"count/replicasets.apps": "0"}}});
    server.post(&quotas, &none).await.unwrap();
    let counted = |q: &Value| q["status"]["hard"]["count/replicasets.apps"] == "0";
    until(&server, "the quota counts", &format!("{quotas}/none"), counted).await;
    server.post(DEPLOYMENTS, &workload("d", "x:1", json!({"replicas": 1}))).await.unwrap();
    let path = format!("{DEPLOYMENTS}/d");
    let says = |d: &Value| {
        let conditions = d["status"]["conditions"].as_array();
        conditions.into_iter().flatten().any(|c| c["reason"] == "ReplicaSetCreateError" && c["status"] == "False")
    };
    until(&server, "it says why", &path, says).await;
    event(&server, "d", "ReplicaSetCreateError").await;
    for _ in 0..5 {
        a_while().await;
        let seen = server.get(&path).await.unwrap();
        assert!(says(&seen), "{seen}");
    }
    server.delete(&format!("{quotas}/none"), &json!({})).await.unwrap();
    complete(&server, "d").await;
}
