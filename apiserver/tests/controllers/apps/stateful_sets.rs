//! StatefulSets: order, halts, updates, rolling back, claims.

use super::*;
use crate::start;

const SETS: &str = "/apis/apps/v1/namespaces/t/statefulsets";

async fn names(server: &Server, app: &str, count: usize) -> Vec<String> {
    pods(server, app, count).await.iter().map(|p| name(p).to_owned()).collect()
}

/// Its pods' images, by ordinal, once the set says that so many are ready.
async fn images(server: &Server, app: &str, expected: &[&str]) {
    until(server, &format!("images {expected:?}"), &pods_of(app), |list| {
        let all: Vec<_> = items(list).into_iter().map(image_of).collect();
        all == expected && items(list).iter().all(|p| has(p, "Ready", ""))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stateful_pods_come_in_order_and_wait_for_the_sick() {
    let Some(server) = start().await else { return };
    let path = format!("{SETS}/s");
    let claim = json!({"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Mi"}}}});
    let retention = json!({"whenScaled": "Delete", "whenDeleted": "Retain"});
    let set = workload(
        "s",
        "x:1",
        json!({"replicas": 3, "serviceName": "svc", "volumeClaimTemplates": [claim],
        "persistentVolumeClaimRetentionPolicy": retention}),
    );
    server.post(SETS, &set).await.unwrap();
    for ordinal in 0..3 {
        assert_eq!(names(&server, "s", ordinal + 1).await.last(), Some(&format!("s-{ordinal}")));
        a_while().await;
        assert_eq!(names(&server, "s", ordinal + 1).await.len(), ordinal + 1, "it waits for the last one");
        set_status(&server, &format!("s-{ordinal}"), running()).await;
    }
    let status = until(&server, "3 ready", &path, |set| set["status"]["readyReplicas"] == 3).await["status"].clone();
    assert_eq!((status["replicas"].as_i64(), &status["currentRevision"]), (Some(3), &status["updateRevision"]));
    let pod = server.get(&format!("{V1}/pods/s-1")).await.unwrap();
    let labels = &pod["metadata"]["labels"];
    assert_eq!(labels["statefulset.kubernetes.io/pod-name"], "s-1");
    assert_eq!((&labels["apps.kubernetes.io/pod-index"], &pod["spec"]["hostname"]), (&json!("1"), &json!("s-1")));
    assert_eq!(pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"], "data-s-1");
    event(&server, "s", "SuccessfulCreate").await;

    // Sick pods halt growing and shrinking.
    for ordinal in 0..3 {
        set_status(&server, &format!("s-{ordinal}"), not_ready()).await;
    }
    let scale = async |replicas: i32| {
        let patch = json!({"spec": {"replicas": replicas}});
        server.merge(&format!("{path}/scale"), &patch).await.unwrap();
    };
    for replicas in [4, 0] {
        scale(replicas).await;
        a_while().await;
        assert_eq!(names(&server, "s", 3).await.len(), 3, "to {replicas}");
    }
    for ordinal in 0..3 {
        set_status(&server, &format!("s-{ordinal}"), running()).await;
    }
    // The highest goes first, and each only when the one above it is gone.
    until(&server, "all are gone, in order", &pods_of("s"), |list| {
        let left: Vec<_> = items(list).into_iter().map(name).collect();
        assert!(left.iter().enumerate().all(|(at, name)| *name == format!("s-{at}")), "{left:?}");
        let going = |p: &&Value| p["metadata"].get("deletionTimestamp").is_some();
        assert!(items(list).into_iter().filter(going).count() <= 1, "{list}");
        left.is_empty()
    })
    .await;
    // Their claims went with them, as far as nothing but protection holds them.
    let claims = format!("{V1}/persistentvolumeclaims");
    until(&server, "claims go", &claims, |list| {
        items(list).iter().all(|c| c["metadata"].get("deletionTimestamp").is_some())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stateful_pods_are_updated_from_the_last_and_rolled_back() {
    let Some(server) = start().await else { return };
    let _kubelet = kubelet(&server, |pod| {
        let status = if image_of(pod) == "bad:1" { not_ready() } else { running() };
        (pod["status"]["phase"] == "Pending").then_some(status)
    });
    let path = format!("{SETS}/s");
    let update = |strategy: Value| json!({"spec": {"updateStrategy": {"rollingUpdate": strategy}}});
    server.post(SETS, &workload("s", "x:1", json!({"replicas": 3, "serviceName": "svc"}))).await.unwrap();
    images(&server, "s", &["x:1"; 3]).await;
    let first = until(&server, "3 ready", &path, |set| set["status"]["readyReplicas"] == 3).await;
    let first = first["status"]["currentRevision"].clone();

    // A canary, then in phases; a pod that is deleted meanwhile comes back as the partition has it.
    server.merge(&path, &update(json!({"partition": 2}))).await.unwrap();
    server.merge(&path, &image("x:2")).await.unwrap();
    images(&server, "s", &["x:1", "x:1", "x:2"]).await;
    server.delete(&format!("{V1}/pods/s-0"), &json!({})).await.unwrap();
    server.delete(&format!("{V1}/pods/s-2"), &json!({})).await.unwrap();
    images(&server, "s", &["x:1", "x:1", "x:2"]).await;
    let status = server.get(&path).await.unwrap()["status"].clone();
    assert!(status["currentRevision"] == first && status["updateRevision"] != first, "{status}");
    server.merge(&path, &update(json!({"partition": 0}))).await.unwrap();
    images(&server, "s", &["x:2"; 3]).await;
    let moved = |set: &Value| set["status"]["currentRevision"] == set["status"]["updateRevision"];
    until(&server, "the update is complete", &path, moved).await;

    // The first template again is the first revision again.
    server.merge(&path, &image("x:1")).await.unwrap();
    images(&server, "s", &["x:1"; 3]).await;
    let set = until(&server, "the way back is complete", &path, moved).await;
    assert_eq!(set["status"]["currentRevision"], first);
    assert_eq!(server.names(&format!("{APPS}/controllerrevisions")).await.len(), 2);

    // A broken update stops at its first pod and can be taken back.
    server.merge(&path, &image("bad:1")).await.unwrap();
    let last = format!("{V1}/pods/s-2");
    until(&server, "the broken one", &last, |pod| image_of(pod) == "bad:1" && pod["status"]["phase"] == "Running")
        .await;
    a_while().await;
    let all = pods(&server, "s", 3).await;
    assert_eq!(all.iter().map(image_of).collect::<Vec<_>>(), ["x:1", "x:1", "bad:1"]);
    server.merge(&path, &image("x:1")).await.unwrap();
    images(&server, "s", &["x:1"; 3]).await;

    // What was evicted comes back.
    let uid = pods(&server, "s", 3).await[0]["metadata"]["uid"].clone();
    set_status(&server, "s-0", json!({"phase": "Failed", "reason": "Evicted"})).await;
    let back = format!("{V1}/pods/s-0");
    until(&server, "s-0 anew", &back, |p| p["metadata"]["uid"] != uid && has(p, "Ready", "")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stateful_pods_in_parallel_do_not_wait() {
    let Some(server) = start().await else { return };
    let spec =
        json!({"replicas": 3, "serviceName": "svc", "podManagementPolicy": "Parallel", "ordinals": {"start": 7}});
    server.post(SETS, &workload("s", "x:1", spec)).await.unwrap();
    assert_eq!(names(&server, "s", 3).await, ["s-7", "s-8", "s-9"]);
    set_status(&server, "s-8", not_ready()).await;
    for replicas in [5, 1, 0] {
        server.merge(&format!("{SETS}/s"), &json!({"spec": {"replicas": replicas}})).await.unwrap();
        pods(&server, "s", replicas).await;
    }
    server.delete(SETS, &json!({})).await.unwrap();
    server.gone(&format!("{SETS}/s")).await;
}
