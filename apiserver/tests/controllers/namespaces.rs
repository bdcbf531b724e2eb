//! Namespaces: finalizers, status, and how they go: pods first, then all else.

use crate::common::eventually;
use crate::start;
use serde_json::{Value, json};

const NAMESPACES: &str = "/api/v1/namespaces";

fn pod(name: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "x"}]}})
}

/// The status of a condition of a namespace.
fn condition<'v>(namespace: &'v Value, kind: &str) -> &'v str {
    let conditions = namespace["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    conditions.iter().find(|c| c["type"] == kind).and_then(|c| c["status"].as_str()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_lives_as_it_is_told() {
    let Some(server) = start().await else { return };
    let path = format!("{NAMESPACES}/t");
    let patched = server.merge(&path, &json!({"metadata": {"labels": {"l": "x"}}})).await.unwrap();
    assert_eq!(patched["metadata"]["labels"]["l"], "x");
    assert_eq!(patched["metadata"]["labels"]["kubernetes.io/metadata.name"], "t");
    let mut updated = server.get(&path).await.unwrap();
    updated["metadata"]["labels"]["m"] = json!("y");
    assert_eq!(server.put(&path, &updated).await.unwrap()["metadata"]["labels"]["m"], "y");

    // The finalizers of the spec are changed by `finalize` alone.
    let mut namespace = server.get(&path).await.unwrap();
    assert_eq!(namespace["spec"]["finalizers"], json!(["kubernetes"]));
    for finalizers in [json!(["kubernetes", "example.com/fake"]), json!(["kubernetes"])] {
        namespace["spec"]["finalizers"] = finalizers.clone();
        assert_ne!(server.put(&path, &namespace).await.map(|n| n["spec"]["finalizers"].clone()), Ok(json!([])));
        namespace = server.get(&path).await.unwrap();
        namespace["spec"]["finalizers"] = finalizers.clone();
        namespace = server.put(&format!("{path}/finalize"), &namespace).await.unwrap();
        assert_eq!(server.get(&path).await.unwrap()["spec"]["finalizers"], finalizers);
    }

    let status = server.get(&format!("{path}/status")).await.unwrap();
    assert_eq!(status["status"]["phase"], "Active");
    let said = json!({"type": "StatusPatch", "status": "True", "reason": "E2E", "message": "Patched"});
    let patched = server.merge(&format!("{path}/status"), &json!({"status": {"conditions": [said]}})).await.unwrap();
    assert_eq!(condition(&patched, "StatusPatch"), "True");
    let mut updated = server.get(&format!("{path}/status")).await.unwrap();
    updated["status"]["conditions"] = json!([said, {"type": "StatusUpdate", "status": "True"}]);
    let updated = server.put(&format!("{path}/status"), &updated).await.unwrap();
    assert_eq!((condition(&updated, "StatusUpdate"), updated["status"]["phase"].as_str()), ("True", Some("Active")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_a_namespace_goes_with_it() {
    let Some(server) = start().await else { return };
    let service = json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}});
    for _ in 0..2 {
        for name in ["p", "q"] {
            server.post(&format!("{NAMESPACES}/t/pods"), &pod(name)).await.unwrap();
        }
        server.post(&format!("{NAMESPACES}/t/services"), &service).await.unwrap();
        server.delete(&format!("{NAMESPACES}/t"), &Value::Null).await.unwrap();
        let (code, message) = server
            .post(&format!("{NAMESPACES}/t/configmaps"), &json!({"metadata": {"name": "late"}}))
            .await
            .unwrap_err();
        assert!(code == 404 || code == 403 && message.contains("because it is being terminated"), "{code} {message}");
        server.gone(&format!("{NAMESPACES}/t")).await;
        // One of the same name begins empty.
        server.namespace("t").await;
        for kind in ["pods", "services"] {
            assert_eq!(server.names(&format!("{NAMESPACES}/t/{kind}")).await, Vec::<String>::new());
        }
        eventually("the default ServiceAccount", async || {
            server.get(&format!("{NAMESPACES}/t/serviceaccounts/default")).await.map_err(|error| format!("{error:?}"))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_go_before_what_they_use() {
    let Some(server) = start().await else { return };
    let mut held = pod("held");
    held["metadata"]["finalizers"] = json!(["example.com/hold"]);
    server.post(&format!("{NAMESPACES}/t/pods"), &held).await.unwrap();
    server.post(&format!("{NAMESPACES}/t/configmaps"), &json!({"metadata": {"name": "used"}})).await.unwrap();
    server.delete(&format!("{NAMESPACES}/t"), &Value::Null).await.unwrap();
    eventually("the pod is asked to go, and what remains is told", async || {
        let namespace = server.get(&format!("{NAMESPACES}/t")).await.map_err(|e| format!("{e:?}"))?;
        let pod = server.get(&format!("{NAMESPACES}/t/pods/held")).await.map_err(|e| format!("{e:?}"))?;
        let told = ["NamespaceContentRemaining", "NamespaceFinalizersRemaining"]
            .iter()
            .all(|c| condition(&namespace, c) == "True");
        if told && pod["metadata"]["deletionTimestamp"].is_string() {
            Ok(())
        } else {
            Err(namespace["status"].to_string())
        }
    })
    .await;
    // Another pass or two change nothing.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    let used = server.get(&format!("{NAMESPACES}/t/configmaps/used")).await.unwrap();
    assert!(used["metadata"].get("deletionTimestamp").is_none());
    let namespace = server.get(&format!("{NAMESPACES}/t")).await.unwrap();
    let message = namespace["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["type"] == "NamespaceDeletionContentFailure")
        .unwrap();
    assert_eq!(message["status"], "False", "{message}");
    server.merge(&format!("{NAMESPACES}/t/pods/held"), &json!({"metadata": {"finalizers": null}})).await.unwrap();
    server.gone(&format!("{NAMESPACES}/t")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_go_at_once() {
    const COUNT: usize = 1000;
    let Some(server) = start().await else { return };
    use futures::StreamExt as _;
    let names: Vec<String> = (0..COUNT).map(|n| format!("many-{n}")).collect();
    let make = async |name: &String| {
        let labels = json!({"many": "x"});
        server.post(NAMESPACES, &json!({"metadata": {"name": name, "labels": labels}})).await.unwrap();
        let map = json!({"metadata": {"name": "m"}});
        server.post(&format!("{NAMESPACES}/{name}/configmaps"), &map).await.unwrap();
    };
    futures::stream::iter(&names).for_each_concurrent(20, make).await;
    let start = std::time::Instant::now();
    let end = async |name: &String| drop(server.delete(&format!("{NAMESPACES}/{name}"), &Value::Null).await.unwrap());
    futures::stream::iter(&names).for_each_concurrent(20, end).await;
    let mut left = COUNT;
    while left > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        left = server.names(&format!("{NAMESPACES}?labelSelector=many%3Dx")).await.len();
        assert!(start.elapsed().as_secs() < 600, "{left} are left {}", server.controllers_log());
    }
    println!("{COUNT} namespaces went in {:?}", start.elapsed());
    let maps = server.get("/api/v1/configmaps?fieldSelector=metadata.name%3Dm").await.unwrap();
    assert_eq!(maps["items"].as_array().map(Vec::len), Some(0));
}
