//! What is too much, too big or too slow is refused in time, and what must live on does.

use crate::common::{JSON, Server, eventually, has_etcd, signal};
use crate::watch::Watch;
use crate::{PATH, start};
use http::Request;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_big_is_refused_and_nothing_is_stored() {
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    for (bytes, code) in [(4 << 20, 413), (2 << 20, 413)] {
        // The second is too big for etcd alone.
        let object = json!({"metadata": {"name": "big"}, "data": {"a": "x".repeat(bytes)}});
        let (got, message) = server.post(PATH, &object).await.unwrap_err();
        assert!(got == code || (bytes == 2 << 20 && got == 422), "{bytes}: {got} {message}");
    }
    let deep = format!("{{\"metadata\":{{\"name\":\"deep\"}},\"data\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
    let request = Request::post(PATH).header("content-type", JSON).body(deep.into_bytes()).unwrap();
    let Err(kube::Error::Api(status)) = server.client.request::<Value>(request).await else { panic!("stored") };
    assert_eq!(status.code, 400);
    let long = Request::get(PATH).header("x-long", "x".repeat(200_000)).body(Vec::new()).unwrap();
    assert!(server.client.request::<Value>(long).await.is_err());
    assert_eq!(server.get(PATH).await.unwrap()["items"], json!([]));
    let (code, _) = server.get(&format!("{PATH}?timeout=x")).await.unwrap_err();
    assert_eq!(code, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_hangs_costs_time_but_not_the_server() {
    if !has_etcd() {
        return;
    }
    let server = start(&["--max-requests-inflight=4", "--max-mutating-requests-inflight=2"]).await;
    server.post(PATH, &json!({"metadata": {"name": "a"}})).await.unwrap();
    // A user whom no limit exempts.
    let user = user(&server).await;
    let etcd = server.etcd_pid().unwrap();
    signal(etcd, "STOP");
    let begun = Instant::now();
    // What asks no etcd is answered; who has left makes room.
    let gone = server.client.request::<Value>(Request::get(PATH).body(Vec::new()).unwrap());
    assert!(tokio::time::timeout(Duration::from_millis(300), gone).await.is_err());
    server.get(&format!("{PATH}?resourceVersion=0")).await.unwrap();
    let calls = (0..30).map(|index| {
        let (user, method) = (user.clone(), if index % 2 == 0 { "GET" } else { "POST" });
        tokio::spawn(async move {
            let object = json!({"metadata": {"name": format!("c{index}")}}).to_string().into_bytes();
            let body = if method == "GET" { Vec::new() } else { object };
            let request = Request::builder().method(method).uri(PATH).header("content-type", JSON).body(body).unwrap();
            match user.request::<Value>(request).await {
                Ok(_) => 200,
                Err(kube::Error::Api(status)) => status.code,
                Err(error) => panic!("{error}"),
            }
        })
    });
    let calls: Vec<_> = calls.collect();
    let mut codes = Vec::new();
    for call in calls {
        codes.push(call.await.unwrap());
    }
    assert!(begun.elapsed() < Duration::from_secs(50), "{:?}", begun.elapsed());
    assert!(codes.iter().all(|code| matches!(code, 429 | 503 | 504)), "{codes:?}");
    assert!(codes.contains(&429) && codes.iter().any(|code| *code != 429), "{codes:?}");
    assert_eq!(
        server.client.request_text(Request::get("/livez?exclude=etcd").body(Vec::new()).unwrap()).await.unwrap(),
        "ok"
    );
    let ready = server.client.request_text(Request::get("/readyz").body(Vec::new()).unwrap()).await;
    assert!(ready.is_err(), "{ready:?}");
    signal(etcd, "CONT");
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Err(error) = server.post(PATH, &json!({"metadata": {"generateName": "after-"}})).await {
        assert!(Instant::now() < deadline, "{error:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    while server.client.request_text(Request::get("/readyz").body(Vec::new()).unwrap()).await.is_err() {
        assert!(Instant::now() < deadline, "it does not become ready again");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// A client that may do everything and is no member of `system:masters`.
async fn user(server: &Server) -> kube::Client {
    let binding = json!({
        "metadata": {"name": "user"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "User", "name": "jane", "apiGroup": "rbac.authorization.k8s.io"}],
    });
    server.post("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding).await.unwrap();
    let mut config = server.config();
    config.auth_info.impersonate = Some("jane".to_owned());
    let user = kube::Client::try_from(config).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Err(error) = user.request::<Value>(Request::get(PATH).body(Vec::new()).unwrap()).await {
        assert!(Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    user
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_told_to_stop_answers_and_ends_its_watches() {
    if !has_etcd() {
        return;
    }
    let mut server = start(&["--shutdown-delay-duration=2s"]).await;
    let mut watch = Watch::open(&server, PATH, "resourceVersion=0").await;
    server.signal("TERM");
    tokio::time::sleep(Duration::from_millis(500)).await;
    // It says that it goes, and serves on.
    let ready = server.client.request_text(Request::get("/readyz").body(Vec::new()).unwrap()).await;
    assert!(ready.is_err(), "{ready:?}");
    server.post(PATH, &json!({"metadata": {"name": "late"}})).await.unwrap();
    assert_eq!(watch.told().await, "ADDED late");
    assert_eq!(watch.told().await, "the end");
    assert!(server.wait_for_end().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_left_costs_nothing_more() {
    const CLIENTS: usize = 20;
    if !has_etcd() {
        return;
    }
    let server = start(&[]).await;
    server.post(PATH, &json!({"metadata": {"name": "a"}})).await.unwrap();
    let multiplexed = component_base::client::connect(server.config(), "leaver").unwrap();
    let (watches, running) = ("apiserver_longrunning_requests", "apiserver_current_inflight_requests");
    // By a connection of one's own, and by one stream of many.
    for client in [&server.client, &multiplexed] {
        let before = server.metric(watches).await;
        let mut open = Vec::new();
        for _ in 0..CLIENTS {
            open.push(Watch::try_open(client, PATH, "resourceVersion=0").await.unwrap());
        }
        assert!(server.metric(watches).await >= before + CLIENTS as f64);
        drop(open);
        eventually("no watch is left", async || match server.metric(watches).await {
            left if left <= before => Ok(()),
            left => Err(left.to_string()),
        })
        .await;

        let etcd = server.etcd_pid().unwrap();
        signal(etcd, "STOP");
        let calls = (0..CLIENTS).map(|at| {
            let (client, method) = (client.clone(), if at % 2 == 0 { "GET" } else { "POST" });
            tokio::spawn(async move {
                let body = if method == "GET" { Vec::new() } else { br#"{"metadata":{"generateName":"x"}}"#.to_vec() };
                let request =
                    Request::builder().method(method).uri(PATH).header("content-type", JSON).body(body).unwrap();
                client.request::<Value>(request).await
            })
        });
        let calls: Vec<_> = calls.collect();
        eventually("requests wait for etcd", async || match server.metric(running).await {
            most if most > 2.0 => Ok(()),
            few => Err(few.to_string()),
        })
        .await;
        // They leave.
        calls.iter().for_each(tokio::task::JoinHandle::abort);
        eventually("no request is left", async || match server.metric(running).await {
            // The one that asks, and what the server itself asks of itself.
            few if few <= 2.0 => Ok(()),
            many => Err(many.to_string()),
        })
        .await;
        signal(etcd, "CONT");
        eventually("the server serves", async || server.get(PATH).await.map_err(|error| format!("{error:?}"))).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_has_so_many_watches_and_no_more() {
    if !has_etcd() {
        return;
    }
    let server = start(&["--http2-max-streams-per-connection=5"]).await;
    let client = component_base::client::connect(server.config(), "greedy").unwrap();
    let mut open = Vec::new();
    for _ in 0..5 {
        open.push(Watch::try_open(&client, PATH, "resourceVersion=0").await.unwrap());
    }
    let one_more = Watch::try_open(&client, PATH, "resourceVersion=0");
    assert!(tokio::time::timeout(Duration::from_secs(1), one_more).await.is_err());
    // Others are served, and so is this one when it has room.
    server.get(PATH).await.unwrap();
    open.pop();
    Watch::try_open(&client, PATH, "resourceVersion=0").await.unwrap();
}
