//! DaemonSets: a pod on each node that fits; updates, rolling back, and the revisions they leave.

use super::*;
use crate::start;

const SETS: &str = "/apis/apps/v1/namespaces/t/daemonsets";

async fn node(server: &Server, name: &str) {
    server.post("/api/v1/nodes", &json!({"metadata": {"name": name}})).await.unwrap();
    let ready = json!({"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now(),
        "lastTransitionTime": now()});
    let status = json!({"status": {"conditions": [ready]}});
    server.merge(&format!("/api/v1/nodes/{name}/status"), &status).await.unwrap();
    let taints = |n: &Value| n["spec"]["taints"].as_array().is_none_or(Vec::is_empty);
    until(server, "the node is not tainted", &format!("/api/v1/nodes/{name}"), taints).await;
}

fn target(pod: &Value) -> &str {
    let terms = "/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms";
    pod.pointer(&format!("{terms}/0/matchFields/0/values/0")).and_then(Value::as_str).unwrap_or_default()
}

async fn available(server: &Server, name: &str, count: i64) -> Value {
    let what = format!("{count} available");
    let path = format!("{SETS}/{name}");
    until(server, &what, &path, |set| {
        let status = &set["status"];
        status["observedGeneration"] == set["metadata"]["generation"]
            && status["numberAvailable"] == count
            && status["updatedNumberScheduled"] == count
            && status["currentNumberScheduled"] == count
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemons_run_on_every_node_that_fits() {
    let Some(server) = start().await else { return };
    let _kubelet =
        kubelet(&server, |pod| (pod["status"]["phase"] == "Pending" && image_of(pod) != "bad:1").then(running));
    node(&server, "n1").await;
    node(&server, "n2").await;
    server.post(SETS, &workload("simple", "x:1", json!({}))).await.unwrap();
    available(&server, "simple", 2).await;
    let all = pods(&server, "simple", 2).await;
    let mut on: Vec<_> = all.iter().map(target).collect();
    on.sort_unstable();
    assert_eq!(on, ["n1", "n2"]);
    // A pod that is deleted, or failed, is replaced.
    for (at, fail) in [(0, false), (1, true)] {
        let path = format!("{V1}/pods/{}", name(&all[at]));
        if fail {
            set_status(&server, name(&all[at]), json!({"phase": "Failed"})).await;
        } else {
            server.delete(&path, &json!({})).await.unwrap();
        }
        server.gone(&path).await;
        available(&server, "simple", 2).await;
    }
    event(&server, "simple", "FailedDaemonPod").await;

    // Only where the label says so.
    server
        .post(SETS, &{
            let mut set = workload("picky", "x:1", json!({}));
            set["spec"]["template"]["spec"]["nodeSelector"] = json!({"color": "blue"});
            set
        })
        .await
        .unwrap();
    let color = |color: &str| json!({"metadata": {"labels": {"color": color}}});
    pods(&server, "picky", 0).await;
    server.merge("/api/v1/nodes/n1", &color("blue")).await.unwrap();
    assert_eq!(target(&pods(&server, "picky", 1).await[0]), "n1");
    server.merge("/api/v1/nodes/n1", &color("green")).await.unwrap();
    pods(&server, "picky", 0).await;

    // An update goes round; one that is broken is taken back without touching what runs.
    let path = format!("{SETS}/simple");
    server.merge(&path, &image("x:2")).await.unwrap();
    available(&server, "simple", 2).await;
    let before = pods(&server, "simple", 2).await;
    assert!(before.iter().all(|p| image_of(p) == "x:2"));
    server.merge(&path, &image("bad:1")).await.unwrap();
    let broken = |list: &Value| items(list).iter().any(|p| image_of(p) == "bad:1");
    let seen = until(&server, "a broken one", &pods_of("simple"), broken).await;
    let kept: Vec<_> = items(&seen).into_iter().filter(|p| image_of(p) == "x:2").map(|p| name(p).to_owned()).collect();
    server.merge(&path, &image("x:2")).await.unwrap();
    available(&server, "simple", 2).await;
    let after = pods(&server, "simple", 2).await;
    assert!(kept.len() == 1 && after.iter().any(|p| name(p) == kept[0]), "{kept:?} was not touched");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revisions_of_daemons_live() {
    let Some(server) = start().await else { return };
    let _kubelet = all_run(&server);
    node(&server, "n1").await;
    server.post(SETS, &workload("d", "x:1", json!({}))).await.unwrap();
    available(&server, "d", 1).await;
    let all = format!("{APPS}/controllerrevisions");
    let selected = format!("{all}?labelSelector=app=d");
    let list = until(&server, "one revision", &selected, |list| items(list).len() == 1).await;
    let first = format!("{all}/{}", name(&list["items"][0]));
    let patched = server.merge(&first, &json!({"metadata": {"labels": {"patched": "yes"}}})).await.unwrap();
    assert_eq!(patched["metadata"]["labels"]["patched"], "yes");

    assert_eq!(patched["revision"], 1);
    let mut second = json!({"metadata": {"name": "by-hand", "labels": {"app": "d"}}, "revision": 2});
    second["metadata"]["ownerReferences"] = patched["metadata"]["ownerReferences"].clone();
    second["data"] = patched["data"].clone();
    server.post(&all, &second).await.unwrap();
    until(&server, "two revisions", &selected, |list| items(list).len() == 2).await;
    server.delete(&first, &json!({})).await.unwrap();
    until(&server, "one again", &selected, |list| items(list).len() == 1).await;
    // The controller may write it too: it is the template's now.
    eventually("it is updated", async || {
        let mut there = server.get(&format!("{all}/by-hand")).await.map_err(|e| format!("{e:?}"))?;
        there["metadata"]["labels"]["updated"] = json!("yes");
        server.put(&format!("{all}/by-hand"), &there).await.map_err(|e| format!("{e:?}"))
    })
    .await;
    assert_eq!(server.names(&format!("{all}?labelSelector=updated=yes")).await, ["by-hand"]);

    let update = json!({"spec": {"template": {"spec": {"terminationGracePeriodSeconds": 1}}}});
    server.merge(&format!("{SETS}/d"), &update).await.unwrap();
    available(&server, "d", 1).await;
    until(&server, "two again", &selected, |list| items(list).len() == 2).await;
    server.delete(&format!("{all}?labelSelector=updated=yes"), &json!({})).await.unwrap();
    let list = until(&server, "the last one", &selected, |list| items(list).len() == 1).await;
    assert_eq!(list["items"][0]["revision"], 3, "{list}");
    server.delete(&format!("{SETS}?labelSelector=app=d"), &json!({})).await.unwrap();
    server.gone(&format!("{SETS}/d")).await;
}
