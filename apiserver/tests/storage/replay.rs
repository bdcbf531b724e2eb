//! A list and the watch that follows it give the state, whatever comes between: writers at several servers, watches that end,
//! compaction, the death of etcd, a server that starts anew.

use crate::common::has_etcd;
use crate::watch::Watch;
use crate::{PATH, start, version};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const WRITERS: usize = 3;
const NAMES: usize = 12;
const FOR: Duration = Duration::from_secs(12);
const LABELS: [&str; 2] = ["x", "y"];

/// Name and version of what is there.
type State = BTreeMap<String, String>;

/// Creates, changes, relabels and deletes at random until the time is over.
async fn write(client: kube::Client, seed: usize, until: Instant) {
    let mut turn = seed * 7919;
    while Instant::now() < until {
        turn = turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let draw = turn >> 33;
        let path = format!("{PATH}/n{}", draw % NAMES);
        let label = LABELS[(draw / 64) % 2];
        let object = json!({"metadata": {"name": format!("n{}", draw % NAMES), "labels": {"l": label}},
            "data": {"draw": draw.to_string()}});
        let (method, path, kind) = match (draw / 1024) % 4 {
            0 => ("POST", PATH.to_owned(), "application/json"),
            1 => ("DELETE", path, "application/json"),
            _ => ("PATCH", path, "application/merge-patch+json"),
        };
        let body = if method == "DELETE" { Vec::new() } else { object.to_string().into_bytes() };
        let request = http::Request::builder().method(method).uri(path).header("content-type", kind).body(body);
        // Conflicts, what is not there, what is there already, and an etcd that is away: all the same to it.
        _ = tokio::time::timeout(Duration::from_secs(15), client.request::<Value>(request.unwrap())).await;
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

/// What an informer does, until it is told to stop and has seen `last`. Gives what it holds then.
async fn follow(client: kube::Client, selector: String, stop: Arc<AtomicBool>, streaming: bool) -> State {
    let mut state = State::new();
    let mut revision = String::new();
    while !stop.load(Ordering::Relaxed) {
        let mut query = format!("labelSelector={selector}&timeoutSeconds=2&allowWatchBookmarks=true");
        let mut initial = None;
        if revision.is_empty() && streaming {
            query += "&sendInitialEvents=true&resourceVersionMatch=NotOlderThan";
            initial = Some(State::new());
        } else if revision.is_empty() {
            let request = http::Request::get(format!("{PATH}?labelSelector={selector}")).body(Vec::new()).unwrap();
            let Ok(list) = client.request::<Value>(request).await else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            state = list["items"].as_array().unwrap().iter().map(entry).collect();
            version(&list).clone_into(&mut revision);
        }
        if !revision.is_empty() {
            query += &format!("&resourceVersion={revision}");
        }
        let Ok(mut watch) = Watch::try_open(&client, PATH, &query).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        while let Some((kind, object)) = watch.next().await {
            if kind == "ERROR" {
                assert_eq!(object["code"], 410, "{object}");
                revision.clear();
                break;
            }
            let at: i64 = version(&object).parse().unwrap();
            if let Some(initial) = &mut initial
                && kind == "ADDED"
            {
                initial.extend([entry(&object)]);
                continue;
            }
            if let Some(initial) = initial.take() {
                assert_eq!(object["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
                state = initial;
            } else {
                assert!(at >= revision.parse().unwrap(), "{kind} at {at} after {revision}");
            }
            let (name, new) = entry(&object);
            match kind.as_str() {
                "ADDED" => assert!(state.insert(name, new).is_none(), "added twice: {object}"),
                "MODIFIED" => assert!(state.insert(name, new).is_some(), "modified before it was added: {object}"),
                "DELETED" => assert!(state.remove(&name).is_some(), "deleted before it was added: {object}"),
                _ => {}
            }
            revision = at.to_string();
        }
    }
    state
}

fn entry(object: &Value) -> (String, String) {
    (object["metadata"]["name"].as_str().unwrap_or("").to_owned(), version(object).to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_and_its_watch_give_the_state_whatever_happens() {
    if !has_etcd() {
        return;
    }
    let mut server = start(&["--etcd-compaction-interval=1s"]).await;
    let mut sibling = server.sibling().await;
    let until = Instant::now() + FOR;
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|seed| {
            let client = if seed % 2 == 0 { &server.client } else { &sibling.client };
            tokio::spawn(write(client.clone(), seed + 1, until))
        })
        .collect();
    let mut followers = Vec::new();
    for selector in ["", "l%3Dx", "l%21%3Dx"] {
        for (client, streaming) in [(&server.client, false), (&sibling.client, true)] {
            let follower = follow(client.clone(), selector.to_owned(), stop.clone(), streaming);
            followers.push((selector, tokio::spawn(follower)));
        }
    }
    tokio::time::sleep(FOR / 4).await;
    server.kill_etcd();
    tokio::time::sleep(Duration::from_millis(500)).await;
    server.start_etcd();
    tokio::time::sleep(FOR / 4).await;
    sibling.restart().await;
    for writer in writers {
        writer.await.unwrap();
    }
    // Everything is written; every watch has a session of its own to hear of it.
    tokio::time::sleep(Duration::from_secs(5)).await;
    stop.store(true, Ordering::Relaxed);
    for (selector, follower) in followers {
        let state = tokio::time::timeout(Duration::from_secs(60), follower).await.unwrap().unwrap();
        let list = server.get(&format!("{PATH}?labelSelector={selector}")).await.unwrap();
        let expected: State = list["items"].as_array().unwrap().iter().map(entry).collect();
        assert_eq!(state, expected, "{selector}");
    }
}
