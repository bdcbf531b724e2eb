//! Requests by those who mean no good: whatever they send, the answer is a refusal, nothing is stored, and the server lives.

use crate::common::{JSON, MERGE, Server, has_etcd};
use base64::Engine as _;
use bytes::Bytes;
use futures::SinkExt as _;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

const MAPS: &str = "/api/v1/namespaces/t/configmaps";

/// So many samples, the same ones at every run.
fn samples<T: std::fmt::Debug>(strategy: impl Strategy<Value = T>, count: usize) -> Vec<T> {
    let mut runner = TestRunner::deterministic();
    (0..count).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect()
}

/// The code of the answer to a raw body.
async fn send(server: &Server, method: &str, path: &str, kind: &str, body: Vec<u8>) -> u16 {
    let request = http::Request::builder().method(method).uri(path).header("content-type", kind);
    let Ok(request) = request.body(kube::client::Body::from(body)) else { return 400 };
    let response = server.client.send(request).await.unwrap();
    let code = response.status().as_u16();
    if code != 500 {
        return code;
    }
    // What does not fit its type is a server error without a reason to Kubernetes, when it is applied or merged by keys.
    let status: Value = serde_json::from_slice(&response.into_body().collect_bytes().await.unwrap()).unwrap();
    if status["reason"].is_null() { 400 } else { code }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malice_is_refused_and_leaves_nothing() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    server.namespace("t").await;
    let encode = |bytes: &[u8]| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes);
    let token = |value: Value| encode(value.to_string().as_bytes());
    let mut tokens = vec![
        token(json!({"v": "meta.k8s.io/v1", "rv": i64::MAX, "start": "t/x"})),
        token(json!({"v": "meta.k8s.io/v1", "rv": 1, "start": "../secrets/t/x"})),
        token(json!({"v": "meta.k8s.io/v1", "rv": "1", "start": 5})),
        token(json!({"v": "meta.k8s.io/v2", "rv": 1, "start": "t/x"})),
        token(json!([])),
        "%00".to_owned(),
        "=".repeat(4096),
    ];
    tokens.extend(samples(prop::collection::vec(any::<u8>(), 0..64), 40).iter().map(|bytes| encode(bytes)));
    for token in tokens {
        let code = send(&server, "GET", &format!("{MAPS}?limit=1&continue={token}"), JSON, Vec::new()).await;
        assert!(matches!(code, 200 | 400 | 410 | 504), "{code}: continue={token}");
    }
    for text in samples("[a-z0-9!=,() <>./_-]{0,40}", 60) {
        let text: String = url::form_urlencoded::byte_serialize(text.as_bytes()).collect();
        for parameter in
            ["labelSelector", "fieldSelector", "resourceVersion", "resourceVersionMatch", "limit", "timeoutSeconds"]
        {
            let code = send(&server, "GET", &format!("{MAPS}?{parameter}={text}"), JSON, Vec::new()).await;
            assert!(code < 500 || code == 504, "{code}: {parameter}={text}");
        }
    }
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept"}, "data": {"a": "b"}});
    server.post(MAPS, &map).await.unwrap();
    let text = map.to_string().into_bytes();
    let damage = samples((0..text.len(), any::<u8>(), 0..3_u8), 80);
    let bodies = damage.into_iter().map(|(at, byte, how)| {
        let mut body = text.clone();
        match how {
            0 => body.truncate(at),
            1 => body[at] = byte,
            _ => body.insert(at, byte),
        }
        body
    });
    let noise = samples(prop::collection::vec(any::<u8>(), 0..200), 40);
    let enveloped = noise.iter().map(|bytes| [b"k8s\0", bytes.as_slice()].concat());
    let deep = ["[".repeat(100_000), "{\"a\":".repeat(100_000), "- ".repeat(100_000), "a: &a [*a, *a]".to_owned()];
    let bodies: Vec<Vec<u8>> =
        bodies.chain(noise.iter().cloned()).chain(enveloped).chain(deep.into_iter().map(String::into_bytes)).collect();
    let path = format!("{MAPS}/kept");
    for body in bodies {
        for (method, path, kind) in [
            ("POST", MAPS, JSON),
            ("POST", MAPS, "application/yaml"),
            ("POST", MAPS, "application/vnd.kubernetes.protobuf"),
            ("PATCH", &path, MERGE),
            ("PATCH", &path, "application/json-patch+json"),
            ("PATCH", &path, "application/strategic-merge-patch+json"),
            ("PATCH", &format!("{path}?fieldManager=x"), "application/apply-patch+yaml"),
            ("DELETE", &format!("{MAPS}/gone"), JSON),
        ] {
            let code = send(&server, method, path, kind, body.clone()).await;
            let shown = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
            // Upstream, what an applied configuration has beyond its schema is an internal error.
            let applied = kind == "application/apply-patch+yaml" && code == 500;
            assert!(code < 500 || applied, "{code}: {method} {kind} {shown:?}");
        }
    }
    // What was damaged into something valid aside, nothing is there that nobody meant.
    let names = server.names(MAPS).await;
    assert!(names.iter().all(|name| name.len() < 64), "{names:?}");
    server.post(MAPS, &json!({"metadata": {"name": "after"}})).await.unwrap();
}

/// Some clients take a stream that ends before all has been sent for an error, whatever was answered.
#[tokio::test]
async fn who_is_refused_may_finish_sending() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(component_base::tls::AnyCertificate::new())
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let socket = tokio::net::TcpStream::connect(server.url.trim_start_matches("https://")).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(tls));
    let stream = connector.connect("localhost".try_into().unwrap(), socket).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let (mut pieces, body) = futures::channel::mpsc::channel::<Result<Frame<Bytes>, Infallible>>(0);
    let request = http::Request::post(format!("{}{MAPS}", server.url)).body(StreamBody::new(body)).unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 403);
    response.into_body().collect().await.unwrap();
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        pieces.send(Ok(Frame::data(Bytes::from_static(b"{")))).await.expect("the server goes on reading");
    }
}
