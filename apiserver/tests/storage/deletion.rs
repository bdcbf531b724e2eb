//! DELETE of one object and of collections: what is answered, what is left, what watchers see.

use crate::common::{Server, has_etcd};
use crate::watch::Watch;
use crate::{PATH, names, start, version};
use serde_json::{Value, json};

async fn create(server: &Server, name: &str, meta: Value) -> Value {
    let mut object = json!({"metadata": meta});
    object["metadata"]["name"] = name.into();
    server.post(PATH, &object).await.unwrap()
}

fn uid(object: &Value) -> &str {
    object["metadata"]["uid"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_answers_with_a_status_or_with_what_is_left() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let gone = create(&server, "plain", json!({})).await;
    let status = server.delete(&format!("{PATH}/plain"), &Value::Null).await.unwrap();
    assert_eq!((&status["kind"], &status["status"]), (&json!("Status"), &json!("Success")));
    assert_eq!(status["details"], json!({"name": "plain", "kind": "configmaps", "uid": uid(&gone)}));

    create(&server, "held", json!({"finalizers": ["x.io/y"]})).await;
    let mut watch = Watch::open(&server, PATH, "resourceVersion=0&fieldSelector=metadata.name%3Dheld").await;
    assert_eq!(watch.told().await, "ADDED held");
    let held = server.delete(&format!("{PATH}/held"), &Value::Null).await.unwrap();
    assert_eq!((&held["kind"], &held["metadata"]["deletionGracePeriodSeconds"]), (&json!("ConfigMap"), &json!(0)));
    assert_eq!(watch.told().await, "MODIFIED held");
    // Asked again nothing happens.
    let again = server.delete(&format!("{PATH}/held"), &Value::Null).await.unwrap();
    assert_eq!(version(&again), version(&held));
    server.merge(&format!("{PATH}/held"), &json!({"metadata": {"finalizers": null}})).await.unwrap();
    assert_eq!(watch.told().await, "DELETED held");
    assert_eq!(server.get(&format!("{PATH}/held")).await.unwrap_err().0, 404);

    let service = json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}});
    server.post("/api/v1/namespaces/w/services", &service).await.unwrap();
    let deleted = server.delete("/api/v1/namespaces/w/services/s", &Value::Null).await.unwrap();
    assert_eq!((&deleted["kind"], &deleted["metadata"]["name"]), (&json!("Service"), &json!("s")));
}

#[tokio::test(flavor = "multi_thread")]
async fn preconditions_policies_and_dry_runs_are_heeded() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let object = create(&server, "a", json!({})).await;
    let path = format!("{PATH}/a");
    for (options, code, text) in [
        (json!({"preconditions": {"uid": "other"}}), 409, "the UID in the precondition (other) does not match"),
        (json!({"preconditions": {"resourceVersion": "1"}}), 409, "the ResourceVersion in the precondition (1)"),
        (json!({"propagationPolicy": "Sideways"}), 422, "\"Foreground\", \"Background\", \"Orphan\", \"nil\""),
        (json!({"propagationPolicy": "Orphan", "orphanDependents": true}), 422, "cannot be both set"),
        (json!({"dryRun": ["Some"]}), 422, "dryRun"),
    ] {
        let (got, message) = server.delete(&path, &options).await.unwrap_err();
        assert!(got == code && message.contains(text), "{options}: {got} {message}");
    }
    server.delete(&path, &json!({"dryRun": ["All"]})).await.unwrap();
    assert_eq!(version(&server.get(&path).await.unwrap()), version(&object));
    let would = server.delete(&path, &json!({"dryRun": ["All"], "propagationPolicy": "Foreground"})).await.unwrap();
    assert_eq!(would["metadata"]["finalizers"], json!(["foregroundDeletion"]));

    let marked = server.delete(&path, &json!({"propagationPolicy": "Foreground"})).await.unwrap();
    assert_eq!(marked["metadata"]["finalizers"], json!(["foregroundDeletion"]));
    let orphaned = server.delete(&path, &json!({"propagationPolicy": "Orphan"})).await.unwrap();
    assert_eq!(orphaned["metadata"]["finalizers"], json!(["orphan"]));
    // In the background nothing is waited for.
    server.delete(&path, &json!({"propagationPolicy": "Background"})).await.unwrap();
    assert_eq!(server.get(&path).await.unwrap_err().0, 404);

    let here = create(&server, "b", json!({})).await;
    let exactly = json!({"preconditions": {"uid": uid(&here), "resourceVersion": version(&here)}});
    server.delete(&format!("{PATH}/b"), &exactly).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bound_pod_gets_its_grace_and_only_less_of_it_later() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let pods = "/api/v1/namespaces/w/pods";
    let container = json!([{"name": "c", "image": "x"}]);
    let free = json!({"metadata": {"name": "free"}, "spec": {"containers": container}});
    server.post(pods, &free).await.unwrap();
    // It runs nowhere: it goes at once.
    assert_eq!(server.delete(&format!("{pods}/free"), &Value::Null).await.unwrap()["kind"], "Pod");
    assert_eq!(server.get(&format!("{pods}/free")).await.unwrap_err().0, 404);

    let bound = json!({"metadata": {"name": "bound"}, "spec": {"containers": container, "nodeName": "n1"}});
    server.post(pods, &bound).await.unwrap();
    let path = format!("{pods}/bound");
    let grace = |pod: &Value| pod["metadata"]["deletionGracePeriodSeconds"].as_i64();
    let first = server.delete(&path, &Value::Null).await.unwrap();
    assert_eq!((grace(&first), &first["metadata"]["generation"]), (Some(30), &json!(2)));
    let longer = server.delete(&path, &json!({"gracePeriodSeconds": 60})).await.unwrap();
    assert_eq!((grace(&longer), version(&longer)), (Some(30), version(&first)));
    let shorter = server.delete(&path, &json!({"gracePeriodSeconds": 5})).await.unwrap();
    assert_eq!((grace(&shorter), &shorter["metadata"]["generation"]), (Some(5), &json!(2)));
    let quick = server.delete(&path, &json!({"gracePeriodSeconds": -3})).await.unwrap();
    assert_eq!(grace(&quick), Some(1));
    // Being done does not end it either: its agent does.
    server.merge(&format!("{path}/status"), &json!({"status": {"phase": "Succeeded"}})).await.unwrap();
    assert_eq!(grace(&server.delete(&path, &Value::Null).await.unwrap()), Some(1));
    server.delete(&path, &json!({"gracePeriodSeconds": 0})).await.unwrap();
    assert_eq!(server.get(&path).await.unwrap_err().0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_is_deleted_as_it_is_selected() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    for index in 0..12 {
        create(&server, &format!("a{index:02}"), json!({"labels": {"l": if index % 2 == 0 { "x" } else { "y" }}}))
            .await;
    }
    create(&server, "held", json!({"labels": {"l": "x"}, "finalizers": ["x.io/y"]})).await;
    let listed = server.delete(&format!("{PATH}?labelSelector=l%3Dx"), &Value::Null).await.unwrap();
    assert_eq!((&listed["kind"], names(&listed).len()), (&json!("ConfigMapList"), 7));
    let left = server.get(PATH).await.unwrap();
    assert_eq!(names(&left), ["a01", "a03", "a05", "a07", "a09", "a11", "held"]);
    let page = server.delete(&format!("{PATH}?limit=2"), &Value::Null).await.unwrap();
    assert_eq!((names(&page), page["metadata"]["continue"].is_string()), (vec!["a01", "a03"], true));
    server.delete(&format!("{PATH}?dryRun=All"), &Value::Null).await.unwrap();
    server.delete(&format!("{PATH}?fieldSelector=metadata.name%3Da05"), &Value::Null).await.unwrap();
    assert_eq!(names(&server.get(PATH).await.unwrap()), ["a07", "a09", "a11", "held"]);
    server.delete(PATH, &Value::Null).await.unwrap();
    assert_eq!(names(&server.get(PATH).await.unwrap()), ["held"]);
}
