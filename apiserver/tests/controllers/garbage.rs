//! What becomes of dependents: in the background, in the foreground, as orphans, in circles, with other owners.

use crate::common::{Server, eventually};
use crate::start;
use serde_json::{Value, json};
use std::time::Duration;

const V1: &str = "/api/v1/namespaces/t";
const APPS: &str = "/apis/apps/v1/namespaces/t";

fn template() -> Value {
    let spec = json!({"terminationGracePeriodSeconds": 0, "containers": [{"name": "c", "image": "x"}]});
    json!({"metadata": {"labels": {"a": "b"}}, "spec": spec})
}

/// A controller of so many pods, all made.
async fn controller(server: &Server, name: &str, replicas: usize) -> Value {
    let spec = json!({"replicas": replicas, "selector": {"a": "b"}, "template": template()});
    let made =
        server.post(&format!("{V1}/replicationcontrollers"), &json!({"metadata": {"name": name}, "spec": spec})).await;
    has(server, "pods", replicas).await;
    made.unwrap()
}

/// Waits until there are so many; gives them.
async fn has(server: &Server, kind: &str, count: usize) -> Vec<Value> {
    let path = if kind == "pods" { format!("{V1}/pods") } else { format!("{APPS}/{kind}") };
    eventually(&format!("{count} {kind}"), async || {
        let list = server.get(&path).await.map_err(|error| format!("{error:?}"))?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        if items.len() == count { Ok(items) } else { Err(format!("{}", items.len())) }
    })
    .await
}

async fn delete(server: &Server, path: &str, policy: &str) {
    server.delete(path, &json!({"propagationPolicy": policy})).await.unwrap();
}

fn owner(kind: &str, of: &Value, blocks: bool) -> Value {
    json!({"apiVersion": "v1", "kind": kind, "name": of["metadata"]["name"], "uid": of["metadata"]["uid"], "blockOwnerDeletion": blocks})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_a_controller_go_before_or_behind_it_or_stay() {
    let Some(server) = start().await else { return };
    let path = format!("{V1}/replicationcontrollers/rc");
    controller(&server, "rc", 2).await;
    delete(&server, &path, "Background").await;
    assert_eq!(server.get(&path).await.unwrap_err().0, 404, "it goes at once");
    has(&server, "pods", 0).await;

    // In the foreground the owner waits for its pods.
    controller(&server, "rc", 3).await;
    let pods = has(&server, "pods", 3).await;
    let held = pods[0]["metadata"]["name"].as_str().unwrap();
    let hold = |finalizers: Value| json!({"metadata": {"finalizers": finalizers}});
    server.merge(&format!("{V1}/pods/{held}"), &hold(json!(["example.com/hold"]))).await.unwrap();
    delete(&server, &path, "Foreground").await;
    eventually("the other pods go", async || {
        let left = server.names(&format!("{V1}/pods")).await;
        if left == [held] { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    let waiting = server.get(&path).await.unwrap();
    assert_eq!(waiting["metadata"]["finalizers"], json!(["foregroundDeletion"]));
    server.merge(&format!("{V1}/pods/{held}"), &hold(Value::Null)).await.unwrap();
    server.gone(&path).await;
    has(&server, "pods", 0).await;

    // Orphans lose their owner and stay.
    controller(&server, "rc", 5).await;
    delete(&server, &path, "Orphan").await;
    server.gone(&path).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    for pod in has(&server, "pods", 5).await {
        let meta = &pod["metadata"];
        assert!(meta.get("deletionTimestamp").is_none() && meta.get("ownerReferences").is_none(), "{meta}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sets_of_a_deployment_go_with_it_or_stay() {
    let Some(server) = start().await else { return };
    let spec = json!({"replicas": 2, "selector": {"matchLabels": {"a": "b"}}, "template": template()});
    let path = format!("{APPS}/deployments/d");
    for (policy, sets, pods) in [("Background", 0, 0), ("Orphan", 1, 2)] {
        server.post(&format!("{APPS}/deployments"), &json!({"metadata": {"name": "d"}, "spec": spec})).await.unwrap();
        has(&server, "replicasets", 1).await;
        has(&server, "pods", 2).await;
        delete(&server, &path, policy).await;
        server.gone(&path).await;
        if policy == "Orphan" {
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        let left = has(&server, "replicasets", sets).await;
        assert!(left.iter().all(|set| set["metadata"].get("ownerReferences").is_none()));
        has(&server, "pods", pods).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn circles_and_other_owners_do_not_confuse_it() {
    let Some(server) = start().await else { return };
    let mut pods = Vec::new();
    for name in ["pod1", "pod2", "pod3"] {
        let pod = json!({"metadata": {"name": name}, "spec": template()["spec"]});
        pods.push(server.post(&format!("{V1}/pods"), &pod).await.unwrap());
    }
    for (of, by) in [(0, 2), (1, 0), (2, 1)] {
        let references = json!({"metadata": {"ownerReferences": [owner("Pod", &pods[by], true)]}});
        let name = pods[of]["metadata"]["name"].as_str().unwrap();
        server.merge(&format!("{V1}/pods/{name}"), &references).await.unwrap();
    }
    delete(&server, &format!("{V1}/pods/pod1"), "Foreground").await;
    has(&server, "pods", 0).await;

    // Pods that another owner keeps stay when the one that waits for them goes.
    controller(&server, "going", 6).await;
    let spec = json!({"replicas": 0, "selector": {"x": "y"}, "template": {"metadata": {"labels": {"x": "y"}}, "spec": template()["spec"]}});
    let stays = json!({"metadata": {"name": "staying"}, "spec": spec});
    let stays = server.post(&format!("{V1}/replicationcontrollers"), &stays).await.unwrap();
    let mut kept = Vec::new();
    for pod in has(&server, "pods", 6).await.iter().take(3) {
        let name = pod["metadata"]["name"].as_str().unwrap().to_owned();
        let mut owners = pod["metadata"]["ownerReferences"].as_array().unwrap().clone();
        owners.push(owner("ReplicationController", &stays, false));
        server.merge(&format!("{V1}/pods/{name}"), &json!({"metadata": {"ownerReferences": owners}})).await.unwrap();
        kept.push(name);
    }
    delete(&server, &format!("{V1}/replicationcontrollers/going"), "Foreground").await;
    server.gone(&format!("{V1}/replicationcontrollers/going")).await;
    let left = has(&server, "pods", 3).await;
    for pod in &left {
        let meta = &pod["metadata"];
        assert!(kept.iter().any(|name| meta["name"] == *name) && meta.get("deletionTimestamp").is_none(), "{meta}");
        assert_eq!(meta["ownerReferences"].as_array().unwrap().len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_owned_across_namespaces() {
    let Some(server) = start().await else { return };
    server.namespace("far").await;
    let far = server.post("/api/v1/namespaces/far/configmaps", &json!({"metadata": {"name": "o"}})).await.unwrap();
    let owned = |name: &str, of: &Value, kind: &str| {
        let mut reference = owner(kind, of, false);
        reference["apiVersion"] = of["apiVersion"].clone();
        json!({"metadata": {"name": name, "ownerReferences": [reference]}})
    };
    server.post(&format!("{V1}/configmaps"), &owned("refused", &far, "ConfigMap")).await.unwrap();
    server.gone(&format!("{V1}/configmaps/refused")).await;
    eventually("the event", async || {
        let path = format!("{V1}/events?fieldSelector=reason%3DOwnerRefInvalidNamespace");
        let list = server.get(&path).await.map_err(|error| format!("{error:?}"))?;
        let message = list["items"][0]["message"].as_str().unwrap_or_default().to_owned();
        if message.ends_with("does not exist in namespace \"t\"") { Ok(()) } else { Err(list.to_string()) }
    })
    .await;
    assert!(server.get("/api/v1/namespaces/far/configmaps/o").await.is_ok());
}
