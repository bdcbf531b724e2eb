//! Lists and watches against a real etcd: what a client sees is what was written, in order, once, whatever happens to etcd.

use crate::common::{JSON, MERGE, Server, has_etcd};
use crate::watch::{PATIENCE, Watch};
use crate::{PATH, names, start, version};
use futures::{AsyncBufReadExt as _, TryStreamExt as _};
use http::Request;
use serde_json::{Value, json};
use std::time::Duration;

async fn create(server: &Server, name: &str, label: &str) -> Value {
    let object = json!({"metadata": {"name": name, "labels": {"l": label}}});
    server.call("POST", PATH, &object, JSON).await.unwrap()
}

async fn relabel(server: &Server, name: &str, label: &str) -> Value {
    let patch = json!({"metadata": {"labels": {"l": label}}});
    server.call("PATCH", &format!("{PATH}/{name}"), &patch, MERGE).await.unwrap()
}

async fn delete(server: &Server, name: &str) {
    server.call("DELETE", &format!("{PATH}/{name}"), &Value::Null, JSON).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streaming_list_ends_with_its_bookmark_and_goes_on_as_a_watch() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    create(&server, "a", "x").await;
    create(&server, "b", "y").await;
    let query = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&labelSelector=l%3Dx";
    let mut watch = Watch::open(&server, PATH, query).await;
    assert_eq!(watch.told().await, "ADDED a");
    let (kind, bookmark) = watch.next().await.unwrap();
    assert_eq!(
        (kind.as_str(), &bookmark["metadata"]["annotations"]["k8s.io/initial-events-end"]),
        ("BOOKMARK", &json!("true"))
    );
    relabel(&server, "b", "x").await;
    relabel(&server, "a", "z").await;
    server.call("PATCH", &format!("{PATH}/b"), &json!({"data": {"k": "v"}}), MERGE).await.unwrap();
    delete(&server, "b").await;
    for expected in ["ADDED b", "DELETED a", "MODIFIED b", "DELETED b"] {
        assert_eq!(watch.told().await, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_begins_behind_its_version_and_a_paged_list_stays_at_its_own() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let first = create(&server, "a", "x").await;
    for name in ["b", "c", "d"] {
        create(&server, name, "x").await;
    }
    let mut watch = Watch::open(&server, PATH, &format!("resourceVersion={}", version(&first))).await;
    for expected in ["ADDED b", "ADDED c", "ADDED d"] {
        assert_eq!(watch.told().await, expected);
    }
    let page = server.get(&format!("{PATH}?limit=2&labelSelector=l")).await.unwrap();
    assert_eq!(names(&page), ["a", "b"]);
    delete(&server, "c").await;
    create(&server, "e", "x").await;
    let token = page["metadata"]["continue"].as_str().unwrap();
    let rest = server.get(&format!("{PATH}?continue={token}&labelSelector=l")).await.unwrap();
    assert_eq!((names(&rest), version(&rest)), (vec!["c", "d"], version(&page)));
    let now = server.get(&format!("{PATH}?labelSelector=l")).await.unwrap();
    assert_eq!(names(&now), ["a", "b", "d", "e"]);
    let exact = format!("{PATH}?resourceVersion={}&resourceVersionMatch=Exact&labelSelector=l", version(&page));
    assert_eq!(names(&server.get(&exact).await.unwrap()), ["a", "b", "c", "d"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_live_through_the_death_of_etcd_and_miss_nothing() {
    if !has_etcd() {
        return;
    }
    let mut server = start(&[]).await;
    let first = create(&server, "a", "x").await;
    let mut watch = Watch::open(&server, PATH, &format!("resourceVersion={}", version(&first))).await;
    server.kill_etcd();
    assert_eq!(names(&server.get(&format!("{PATH}?resourceVersion=0&labelSelector=l")).await.unwrap()), ["a"]);
    server.start_etcd();
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let object = json!({"metadata": {"name": "b"}});
        match server.call("POST", PATH, &object, JSON).await {
            Ok(_) | Err((409, _)) => break,
            Err(error) => assert!(std::time::Instant::now() < deadline, "{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    create(&server, "c", "x").await;
    for expected in ["ADDED b", "ADDED c"] {
        assert_eq!(watch.told().await, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_version_is_gone_and_says_so() {
    if !has_etcd() {
        return;
    }
    let mut server = start(&[]).await;
    create(&server, "a", "x").await;
    server.restart().await;
    assert_eq!(names(&server.get(&format!("{PATH}?labelSelector=l")).await.unwrap()), ["a"]);
    // The server knows nothing of the time before it started.
    let mut watch = Watch::open(&server, PATH, "resourceVersion=1").await;
    let (kind, status) = watch.next().await.unwrap();
    assert_eq!((kind.as_str(), &status["code"], &status["reason"]), ("ERROR", &json!(410), &json!("Expired")));
    assert!(watch.next().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_writes_are_seen_once_and_in_order() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let list = server.get(PATH).await.unwrap();
    let mut watch = Watch::open(&server, PATH, &format!("resourceVersion={}", version(&list))).await;
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let client = server.client.clone();
            tokio::spawn(async move {
                let api: kube::Api<k8s_openapi::api::core::v1::ConfigMap> = kube::Api::namespaced(client, "w");
                for index in 0..125 {
                    let name = format!("{writer}-{index}");
                    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}});
                    let object = serde_json::from_value(object).unwrap();
                    api.create(&kube::api::PostParams::default(), &object).await.unwrap();
                }
            })
        })
        .collect();
    let (mut seen, mut last) = (std::collections::BTreeSet::new(), 0);
    while seen.len() < 1000 {
        let (kind, object) = watch.next().await.unwrap();
        let revision: i64 = version(&object).parse().unwrap();
        assert!(kind == "ADDED" && revision > last, "{kind} {revision} after {last}");
        assert!(seen.insert(object["metadata"]["name"].as_str().unwrap().to_owned()));
        last = revision;
    }
    for writer in writers {
        writer.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_watches_on_one_connection_all_hear() {
    const WATCHES: usize = 500;
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let client = component_base::client::connect(server.config(), "watches").unwrap();
    let seen = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    for _ in 0..WATCHES {
        let request =
            Request::get(format!("{PATH}?watch=true&resourceVersion=0&labelSelector=l")).body(Vec::new()).unwrap();
        let stream: std::pin::Pin<Box<dyn futures::AsyncBufRead + Send>> =
            Box::pin(client.request_stream(request).await.unwrap());
        let (mut lines, seen) = (stream.lines(), seen.clone());
        tokio::spawn(async move {
            while let Ok(Some(_)) = lines.try_next().await {
                seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        });
    }
    let data = "y".repeat(1000);
    for round in 1..=5 {
        let object = json!({"metadata": {"name": format!("fan-{round}"), "labels": {"l": "x"}}, "data": {"y": data}});
        server.call("POST", PATH, &object, JSON).await.unwrap();
        let deadline = std::time::Instant::now() + PATIENCE;
        while seen.load(std::sync::atomic::Ordering::Relaxed) < round * WATCHES {
            let count = seen.load(std::sync::atomic::Ordering::Relaxed);
            assert!(std::time::Instant::now() < deadline, "round {round}: {count} of {}", round * WATCHES);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
