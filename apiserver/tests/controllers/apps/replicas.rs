//! ReplicaSets and ReplicationControllers: adoption, release, quota, scale.

use super::*;
use crate::start;

fn made(kind: &str, name: &str, replicas: i32) -> Value {
    let mut made = workload(name, "x:1", json!({"replicas": replicas}));
    if kind == "replicationcontrollers" {
        made["spec"]["selector"] = json!({"app": name});
    }
    made
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sets_take_what_they_select_and_let_go_of_the_rest() {
    let Some(server) = start().await else { return };
    let _kubelet = all_run(&server);
    let quota = json!({"metadata": {"name": "q"}, "spec": {"hard": {"pods": "6"}}});
    server.post(&format!("{V1}/resourcequotas"), &quota).await.unwrap();
    for (group, kind, app) in [(APPS, "replicasets", "rs"), (V1, "replicationcontrollers", "rc")] {
        let all = format!("{group}/{kind}");
        let path = format!("{all}/{app}");
        let counted = |q: &Value| ["0", "1"].iter().any(|used| q["status"]["used"]["pods"] == *used);
        until(&server, "the quota counts", &format!("{V1}/resourcequotas/q"), counted).await;
        let mut orphan = template(app, "x:0");
        orphan["metadata"]["name"] = json!(format!("orphan-{app}"));
        let pod = format!("{V1}/pods/orphan-{app}");
        server.post(&format!("{V1}/pods"), &orphan).await.unwrap();
        server.post(&all, &made(kind, app, 1)).await.unwrap();
        until(&server, "adopted", &pod, |p| p["metadata"]["ownerReferences"][0]["controller"] == true).await;
        a_while().await;
        assert_eq!(pods(&server, app, 1).await.len(), 1, "it needs no other");
        server.merge(&pod, &json!({"metadata": {"labels": {"app": "free"}}})).await.unwrap();
        until(&server, "released", &pod, |p| p["metadata"].get("ownerReferences").is_none()).await;
        pods(&server, app, 1).await;

        // Scaled through its own resource and through scale.
        server.merge(&path, &json!({"spec": {"replicas": 2}})).await.unwrap();
        let ready = |n: i64| move |o: &Value| o["status"]["readyReplicas"] == n && o["status"]["replicas"] == n;
        until(&server, "2 ready", &path, ready(2)).await;
        let scale = format!("{path}/scale");
        assert_eq!(server.get(&scale).await.unwrap()["status"]["replicas"], 2);
        // More than the quota has room for: the condition says so.
        server.merge(&scale, &json!({"spec": {"replicas": 9}})).await.unwrap();
        let failed = until(&server, "the quota is full", &path, |o| has(o, "ReplicaFailure", "FailedCreate")).await;
        assert!(failed["status"]["conditions"][0]["message"].as_str().unwrap().contains("exceeded quota"), "{failed}");
        event(&server, app, "FailedCreate").await;
        server.merge(&scale, &json!({"spec": {"replicas": 1}})).await.unwrap();
        until(&server, "cured", &path, |o| !has(o, "ReplicaFailure", "") && o["status"]["replicas"] == 1).await;

        server
            .delete(&format!("{all}?labelSelector=app={app}"), &json!({"propagationPolicy": "Background"}))
            .await
            .unwrap();
        pods(&server, app, 0).await;
    }
}
