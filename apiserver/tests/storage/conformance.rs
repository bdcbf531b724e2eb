//! `[sig-api-machinery] Watchers` and `server version` of the conformance programme, each under its name.

use crate::common::{MERGE, Server, has_etcd};
use crate::watch::Watch;
use crate::{PATH, start, version};
use serde_json::{Value, json};

const KEY: &str = "watch-this-configmap";

async fn create(server: &Server, name: &str, label: &str) -> Value {
    server.post(PATH, &json!({"metadata": {"name": name, "labels": {KEY: label}}})).await.unwrap()
}

async fn mutate(server: &Server, name: &str, count: usize) -> Value {
    let patch = json!({"data": {"mutation": count.to_string()}});
    server.call("PATCH", &format!("{PATH}/{name}"), &patch, MERGE).await.unwrap()
}

async fn relabel(server: &Server, name: &str, label: &str) -> Value {
    server.merge(&format!("{PATH}/{name}"), &json!({"metadata": {"labels": {KEY: label}}})).await.unwrap()
}

async fn delete(server: &Server, name: &str) {
    server.delete(&format!("{PATH}/{name}"), &Value::Null).await.unwrap();
}

async fn watch(server: &Server, labels: &str, from: &str) -> Watch {
    let values = labels.replace(',', "%2C");
    let query = format!("labelSelector={KEY}+in+%28{values}%29&resourceVersion={from}");
    Watch::open(server, PATH, &query).await
}

#[tokio::test(flavor = "multi_thread")]
async fn should_observe_add_update_and_delete_watch_notifications_on_configmaps() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let mut a = watch(&server, "a", "0").await;
    let mut b = watch(&server, "b", "0").await;
    let mut both = watch(&server, "a,b", "0").await;
    create(&server, "one", "a").await;
    mutate(&server, "one", 1).await;
    mutate(&server, "one", 2).await;
    delete(&server, "one").await;
    create(&server, "two", "b").await;
    delete(&server, "two").await;
    let of_one = ["ADDED one", "MODIFIED one", "MODIFIED one", "DELETED one"];
    let of_two = ["ADDED two", "DELETED two"];
    for expected in of_one {
        assert_eq!((a.told().await.as_str(), both.told().await.as_str()), (expected, expected));
    }
    for expected in of_two {
        assert_eq!((b.told().await.as_str(), both.told().await.as_str()), (expected, expected));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn should_be_able_to_start_watching_from_a_specific_resource_version() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    create(&server, "c", "a").await;
    let first = mutate(&server, "c", 1).await;
    mutate(&server, "c", 2).await;
    delete(&server, "c").await;
    let mut watch = watch(&server, "a", version(&first)).await;
    let (kind, object) = watch.next().await.unwrap();
    assert_eq!((kind.as_str(), &object["data"]["mutation"]), ("MODIFIED", &json!("2")));
    let (kind, object) = watch.next().await.unwrap();
    assert_eq!((kind.as_str(), &object["data"]["mutation"]), ("DELETED", &json!("2")));
}

#[tokio::test(flavor = "multi_thread")]
async fn should_be_able_to_restart_watching_from_the_last_resource_version_observed_by_the_previous_watch() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let mut before = watch(&server, "a", "0").await;
    create(&server, "c", "a").await;
    mutate(&server, "c", 1).await;
    assert_eq!(before.told().await, "ADDED c");
    let (_, last) = before.next().await.unwrap();
    drop(before);
    mutate(&server, "c", 2).await;
    let mut after = watch(&server, "a", version(&last)).await;
    delete(&server, "c").await;
    let (kind, object) = after.next().await.unwrap();
    assert_eq!((kind.as_str(), &object["data"]["mutation"]), ("MODIFIED", &json!("2")));
    assert_eq!(after.told().await, "DELETED c");
}

#[tokio::test(flavor = "multi_thread")]
async fn should_observe_an_object_deletion_if_it_stops_meeting_the_requirements_of_the_selector() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let mut watch = watch(&server, "a", "0").await;
    create(&server, "c", "a").await;
    mutate(&server, "c", 1).await;
    let changed = relabel(&server, "c", "wrong").await;
    mutate(&server, "c", 2).await;
    relabel(&server, "c", "a").await;
    mutate(&server, "c", 3).await;
    delete(&server, "c").await;
    assert_eq!(watch.told().await, "ADDED c");
    assert_eq!(watch.told().await, "MODIFIED c");
    // As it was when it was last selected, at the version of what made the difference.
    let (kind, gone) = watch.next().await.unwrap();
    assert_eq!((kind.as_str(), &gone["metadata"]["labels"][KEY]), ("DELETED", &json!("a")));
    assert_eq!(version(&gone), version(&changed));
    let (kind, back) = watch.next().await.unwrap();
    assert_eq!((kind.as_str(), &back["data"]["mutation"]), ("ADDED", &json!("2")));
    let (kind, changed) = watch.next().await.unwrap();
    assert_eq!((kind.as_str(), &changed["data"]["mutation"]), ("MODIFIED", &json!("3")));
    assert_eq!(watch.told().await, "DELETED c");
}

#[tokio::test(flavor = "multi_thread")]
async fn should_receive_events_on_concurrent_watches_in_same_order() {
    const EVENTS: usize = 60;
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let begin = server.get(PATH).await.unwrap();
    let mut first = Watch::open(&server, PATH, &format!("resourceVersion={}", version(&begin))).await;
    let client = server.client.clone();
    let writing = tokio::spawn(async move {
        for index in 0..EVENTS {
            let name = format!("n{}", index % 5);
            let (method, path, body) = match index / 5 % 3 {
                0 => ("POST", PATH.to_owned(), json!({"metadata": {"name": name}})),
                1 => (
                    "PUT",
                    format!("{PATH}/{name}"),
                    json!({"metadata": {"name": name}, "data": {"i": index.to_string()}}),
                ),
                _ => ("DELETE", format!("{PATH}/{name}"), json!({})),
            };
            let request = http::Request::builder().method(method).uri(path).header("content-type", "application/json");
            client.request::<Value>(request.body(body.to_string().into_bytes()).unwrap()).await.unwrap();
        }
    });
    let mut others = Vec::new();
    let mut revisions = Vec::new();
    for _ in 0..EVENTS {
        let (_, object) = first.next().await.unwrap();
        revisions.push(version(&object).to_owned());
        others.push(Watch::open(&server, PATH, &format!("resourceVersion={}", version(&object))).await);
    }
    writing.await.unwrap();
    for (index, mut other) in others.into_iter().enumerate() {
        for expected in &revisions[index + 1..] {
            assert_eq!(version(&other.next().await.unwrap().1), expected);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn should_find_the_server_version() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let found = server.get("/version").await.unwrap();
    for field in ["major", "minor"] {
        let text = found[field].as_str().unwrap();
        assert!(!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()), "{found}");
    }
}
