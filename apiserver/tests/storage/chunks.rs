//! Lists in chunks, of the past, and at versions that are asked for: `Servers with support for API chunking`.

use crate::common::{JSON, Server, has_etcd};
use crate::{PATH, names, start, version};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const TEMPLATES: &str = "/api/v1/namespaces/w/podtemplates";

async fn fill(server: &Server, count: usize) {
    for index in 0..count {
        let container = json!({"name": "test", "image": "test2"});
        let object = json!({
            "metadata": {"name": format!("template-{index:04}")},
            "template": {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [container]}},
        });
        server.post(TEMPLATES, &object).await.unwrap();
    }
}

fn remaining(list: &Value) -> i64 {
    list["metadata"]["remainingItemCount"].as_i64().unwrap_or(0)
}

fn token(list: &Value) -> &str {
    list["metadata"]["continue"].as_str().unwrap_or("")
}

#[tokio::test(flavor = "multi_thread")]
async fn should_return_chunks_of_results_for_list_calls() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    fill(&server, 40).await;
    let first = server.get(&format!("{TEMPLATES}?limit=17")).await.unwrap();
    assert_eq!((names(&first).len(), remaining(&first)), (17, 23));
    // What comes later does not show up.
    fill_one(&server, "zzz").await;
    let mut seen: Vec<String> = names(&first).into_iter().map(ToOwned::to_owned).collect();
    let mut next = token(&first).to_owned();
    while !next.is_empty() {
        let page = server.get(&format!("{TEMPLATES}?limit=17&continue={next}")).await.unwrap();
        assert_eq!(version(&page), version(&first));
        seen.extend(names(&page).into_iter().map(ToOwned::to_owned));
        assert_eq!(remaining(&page) as usize, 40 - seen.len());
        next = token(&page).to_owned();
    }
    let expected: Vec<String> = (0..40).map(|index| format!("template-{index:04}")).collect();
    assert_eq!(seen, expected);
    assert_eq!(names(&server.get(TEMPLATES).await.unwrap()).len(), 41);
    // With a selector nobody knows how many are left.
    let selected = server.get(&format!("{TEMPLATES}?limit=17&labelSelector=!none")).await.unwrap();
    assert!(!token(&selected).is_empty() && selected["metadata"].get("remainingItemCount").is_none());
}

async fn fill_one(server: &Server, name: &str) {
    let container = json!({"name": "test", "image": "test2"});
    let object = json!({
        "metadata": {"name": name},
        "template": {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [container]}},
    });
    server.post(TEMPLATES, &object).await.unwrap();
}

/// Asks again and again until the version of a list is gone.
async fn until_expired(server: &Server, path: &str) -> Value {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let request = http::Request::get(path).body(Vec::new()).unwrap();
        match server.client.request::<Value>(request).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 410 => return serde_json::to_value(&*status).unwrap(),
            Err(error) => panic!("{error}"),
        }
        assert!(Instant::now() < deadline, "it does not expire");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn should_support_continue_listing_from_the_last_key_if_the_original_version_has_been_compacted_away() {
    if !has_etcd() {
        return;
    }
    let server = start(&["--etcd-compaction-interval=1s"]).await;
    fill(&server, 40).await;
    let first = server.get(&format!("{TEMPLATES}?limit=17")).await.unwrap();
    assert_eq!((names(&first).len(), remaining(&first)), (17, 23));
    fill_one(&server, "template-zzz").await;
    let path = format!("{TEMPLATES}?limit=17&continue={}", token(&first));
    let expired = until_expired(&server, &path).await;
    assert_eq!(expired["reason"], "Expired");
    let inconsistent = token(&expired).to_owned();
    assert!(!inconsistent.is_empty(), "{expired}");

    let second = server.get(&format!("{TEMPLATES}?limit=17&continue={inconsistent}")).await.unwrap();
    assert_eq!((names(&second).len(), remaining(&second)), (17, 7));
    assert_eq!(names(&second)[0], "template-0017");
    assert_ne!(version(&second), version(&first));
    let last = server.get(&format!("{TEMPLATES}?limit=17&continue={}", token(&second))).await.unwrap();
    assert_eq!((names(&last).len(), token(&last), version(&last)), (7, "", version(&second)));
    assert_eq!(names(&last)[6], "template-zzz");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_past_that_the_cache_has_forgotten_is_read_from_etcd() {
    if !has_etcd() {
        return;
    }
    let mut server = start(&[]).await;
    for (name, label) in [("a", "x"), ("b", "y"), ("c", "x"), ("d", "x")] {
        create(&server, name, label).await;
    }
    let then = server.get(&format!("{PATH}?labelSelector=l%3Dx")).await.unwrap();
    let first = server.get(&format!("{PATH}?limit=2&labelSelector=l")).await.unwrap();
    server.delete(&format!("{PATH}/c"), &Value::Null).await.unwrap();
    // It begins with what is, and remembers nothing of what was.
    server.restart().await;
    let exact = format!("{PATH}?resourceVersion={}&resourceVersionMatch=Exact", version(&then));
    let past = server.get(&format!("{exact}&labelSelector=l%3Dx")).await.unwrap();
    assert_eq!((names(&past), version(&past)), (vec!["a", "c", "d"], version(&then)));
    let page = server.get(&format!("{exact}&labelSelector=l&limit=3")).await.unwrap();
    assert_eq!(names(&page), ["a", "b", "c"]);
    let rest = server.get(&format!("{PATH}?labelSelector=l&continue={}", token(&page))).await.unwrap();
    assert_eq!((names(&rest), version(&rest)), (vec!["d"], version(&then)));
    let rest = server.get(&format!("{PATH}?labelSelector=l&continue={}", token(&first))).await.unwrap();
    assert_eq!(names(&rest), ["c", "d"]);
    let all = server.get(&format!("{exact}&limit=1")).await.unwrap();
    // The namespace's own `kube-root-ca.crt` is made by a controller, which does not run here.
    assert_eq!((names(&all), remaining(&all)), (vec!["a"], 3));
}

async fn create(server: &Server, name: &str, label: &str) -> Value {
    let object = json!({"metadata": {"name": name, "labels": {"l": label}}});
    server.call("POST", PATH, &object, JSON).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_mean_what_they_are_documented_to_mean() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let a = create(&server, "a", "x").await;
    let b = create(&server, "b", "x").await;
    let (at_a, at_b) = (version(&a), version(&b));
    for (query, expected) in [
        (String::new(), Ok(2)),
        ("resourceVersion=0".to_owned(), Ok(2)),
        ("resourceVersion=0&limit=1".to_owned(), Ok(2)),
        ("limit=1".to_owned(), Ok(1)),
        (format!("resourceVersion={at_a}"), Ok(2)),
        (format!("resourceVersion={at_a}&limit=5"), Ok(1)),
        (format!("resourceVersion={at_a}&resourceVersionMatch=NotOlderThan&limit=5"), Ok(2)),
        (format!("resourceVersion={at_a}&resourceVersionMatch=Exact"), Ok(1)),
        (format!("resourceVersion={at_b}&resourceVersionMatch=Exact"), Ok(2)),
        ("resourceVersion=0&resourceVersionMatch=NotOlderThan".to_owned(), Ok(2)),
        ("resourceVersion=0&resourceVersionMatch=Exact".to_owned(), Err(422)),
        ("resourceVersionMatch=Exact".to_owned(), Err(422)),
        ("resourceVersion=5&resourceVersionMatch=Near".to_owned(), Err(422)),
        ("sendInitialEvents=true".to_owned(), Err(422)),
        ("resourceVersion=x".to_owned(), Err(400)),
        ("limit=x".to_owned(), Err(400)),
        ("continue=x".to_owned(), Err(400)),
        ("fieldSelector=spec.x%3D1".to_owned(), Err(400)),
        ("labelSelector=a+b".to_owned(), Err(400)),
        ("resourceVersion=99999999".to_owned(), Err(504)),
        ("resourceVersion=99999999&resourceVersionMatch=Exact".to_owned(), Err(504)),
    ] {
        let got = server.get(&format!("{PATH}?{query}")).await;
        assert_eq!(got.as_ref().map(|list| names(list).len()).map_err(|(code, _)| *code), expected, "{query}: {got:?}");
    }
    for (query, expected) in [
        ("".to_owned(), Ok("b")),
        ("resourceVersion=0".to_owned(), Ok("b")),
        (format!("resourceVersion={at_a}"), Ok("b")),
        ("resourceVersion=99999999".to_owned(), Err(504)),
        ("resourceVersion=-1".to_owned(), Err(400)),
    ] {
        let got = server.get(&format!("{PATH}/b?{query}")).await;
        let name = got.as_ref().map(|object| object["metadata"]["name"].as_str().unwrap()).map_err(|(code, _)| *code);
        assert_eq!(name, expected, "{query}");
    }
    let request = http::Request::get(format!("{PATH}?resourceVersion=99999999")).body(Vec::new()).unwrap();
    let Err(kube::Error::Api(status)) = server.client.request::<Value>(request).await else { panic!() };
    let status = serde_json::to_value(&*status).unwrap();
    assert_eq!(
        (&status["reason"], &status["details"]["causes"][0]["reason"]),
        (&json!("Timeout"), &json!("ResourceVersionTooLarge"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_at_one_server_sees_what_was_written_at_another() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    let sibling = server.sibling().await;
    let (mut writer, mut reader) = (&server, &sibling);
    for round in 0..50 {
        let name = format!("n{round:02}");
        create(writer, &name, "x").await;
        assert_eq!(reader.get(&format!("{PATH}/{name}")).await.unwrap()["metadata"]["name"], name.as_str());
        assert_eq!(names(&reader.get(PATH).await.unwrap()).len(), round + 1);
        std::mem::swap(&mut writer, &mut reader);
    }
}
