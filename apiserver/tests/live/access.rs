//! Who may do what, asked of a live server: certificates, tokens, impersonation, RBAC, nodes, escalation, what the server
//! sets up by itself, and requests that go on to a kubelet.

use crate::common::{JSON, Server, has_etcd};
use futures::SinkExt as _;
use http::Request;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, AttachParams};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{Request as Handshake, Response as HandshakeAnswer};

const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// A server with ServiceAccount keys and the node authorizer.
async fn start() -> Option<(Server, tempfile::TempDir)> {
    if !has_etcd() {
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("sa.key");
    std::fs::write(&key, rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let key = key.display();
    let flags = [
        "--authorization-mode=Node".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--enable-bootstrap-token-auth".to_owned(),
        format!("--service-account-issuer={ISSUER}"),
        format!("--service-account-key-file={key}"),
        format!("--service-account-signing-key-file={key}"),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
    ];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Some((Server::start_with(&flags).await, directory))
}

fn refusal(error: kube::Error) -> (u16, String) {
    match error {
        kube::Error::Api(status) => (status.code, status.message.clone()),
        other => (0, other.to_string()),
    }
}

async fn as_node(server: &Server, method: &str, path: &str, body: &Value) -> Result<Value, (u16, String)> {
    server.call_as(("system:node:n1", &["system:nodes"]), method, path, body).await
}

/// A client with a bearer token, or none.
fn bearer(server: &Server, token: Option<&str>) -> kube::Client {
    let mut config = kube::Config::new(server.url.parse().unwrap());
    config.accept_invalid_certs = true;
    config.default_retry = false;
    config.auth_info.token = token.map(|token| token.to_owned().into());
    kube::Client::try_from(config).unwrap()
}

async fn who_am_i(client: &kube::Client) -> Result<Value, (u16, String)> {
    let review = json!({"kind": "SelfSubjectReview", "apiVersion": "authentication.k8s.io/v1"});
    let request = Request::post("/apis/authentication.k8s.io/v1/selfsubjectreviews").header("content-type", JSON);
    let review = client.request::<Value>(request.body(review.to_string().into_bytes()).unwrap()).await;
    review.map(|review| review["status"]["userInfo"].clone()).map_err(refusal)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_sets_up_what_a_cluster_begins_with() {
    let Some((mut server, _keys)) = start().await else { return };
    for path in [
        "/api/v1/namespaces/kube-node-lease",
        "/api/v1/namespaces/default/services/kubernetes",
        "/apis/scheduling.k8s.io/v1/priorityclasses/system-node-critical",
        "/apis/rbac.authorization.k8s.io/v1/clusterroles/cluster-admin",
        "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/roles/extension-apiserver-authentication-reader",
    ] {
        server.get(path).await.unwrap();
    }
    let services = server.get("/api/v1/services").await.unwrap();
    let kubernetes =
        services["items"].as_array().unwrap().iter().find(|s| s["metadata"]["name"] == "kubernetes").unwrap();
    assert_eq!(
        (&kubernetes["metadata"]["namespace"], &kubernetes["spec"]["ports"][0]["port"]),
        (&json!("default"), &json!(443))
    );
    let tracking = "/api/v1/namespaces/kube-system/configmaps/kube-apiserver-legacy-service-account-token-tracking";
    let since = server.get(tracking).await.unwrap()["data"]["since"].as_str().unwrap().to_owned();
    assert!(since.len() == 10 && since.starts_with("20"), "{since}");
    let config = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";
    let config = server.get(config).await.unwrap();
    assert!(config["data"]["client-ca-file"].as_str().unwrap().contains("BEGIN CERTIFICATE"));

    // A default role that is protected stays as it is, others get back what they lack.
    let roles = "/apis/rbac.authorization.k8s.io/v1/clusterroles";
    let annotation =
        json!({"metadata": {"annotations": {"rbac.authorization.kubernetes.io/autoupdate": "false"}}, "rules": null});
    server.merge(&format!("{roles}/system:discovery"), &annotation).await.unwrap();
    server.merge(&format!("{roles}/system:basic-user"), &json!({"rules": null})).await.unwrap();
    server.restart().await;
    let rules = async |role: &str| server.get(&format!("{roles}/{role}")).await.unwrap()["rules"].clone();
    assert!(rules("system:discovery").await.as_array().is_none_or(Vec::is_empty));
    assert!(!rules("system:basic-user").await.as_array().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_are_believed_or_refused() {
    let Some((server, _keys)) = start().await else { return };
    let anonymous = bearer(&server, None);
    let error = anonymous.request::<Value>(Request::get("/api/v1/pods").body(Vec::new()).unwrap()).await.unwrap_err();
    let message = r#"pods is forbidden: User "system:anonymous" cannot list resource "pods" in API group "" at the cluster scope"#;
    assert_eq!(refusal(error), (403, message.to_owned()));
    assert_eq!(who_am_i(&bearer(&server, Some("nonsense"))).await.unwrap_err(), (401, "Unauthorized".to_owned()));

    let entries =
        json!({"token-id": "abcdef", "token-secret": "0123456789abcdef", "usage-bootstrap-authentication": "true"});
    let secret = json!({"metadata": {"name": "bootstrap-token-abcdef"}, "type": "bootstrap.kubernetes.io/token", "stringData": entries});
    server.post("/api/v1/namespaces/kube-system/secrets", &secret).await.unwrap();
    // The cache follows within a moment.
    server.get("/api/v1/namespaces/kube-system/secrets/bootstrap-token-abcdef").await.unwrap();
    let user = who_am_i(&bearer(&server, Some("abcdef.0123456789abcdef"))).await.unwrap();
    assert_eq!(user["username"], "system:bootstrap:abcdef");
    assert_eq!(who_am_i(&bearer(&server, Some("abcdef.0123456789abcdee"))).await.unwrap_err().0, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_lives_as_long_as_its_pod() {
    let Some((server, _keys)) = start().await else { return };
    server.namespace("a").await;
    let account = json!({"metadata": {"name": "robot"}});
    server.post("/api/v1/namespaces/a/serviceaccounts", &account).await.unwrap();
    let pod = json!({"metadata": {"name": "p"}, "spec": {"serviceAccountName": "robot", "containers": [{"name": "c", "image": "x"}]}});
    let pod = server.post("/api/v1/namespaces/a/pods", &pod).await.unwrap();
    let request = |seconds: i64, uid: &Value| json!({"spec": {"expirationSeconds": seconds, "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": uid}}});
    let tokens = "/api/v1/namespaces/a/serviceaccounts/robot/token";
    let (code, message) = server.post(tokens, &request(60, &pod["metadata"]["uid"])).await.unwrap_err();
    assert!(code == 422 && message.contains("may not specify a duration less than 10 minutes"), "{message}");
    assert_eq!(server.post(tokens, &request(600, &json!("other"))).await.unwrap_err().0, 409);
    let made = server.post(tokens, &request(600, &pod["metadata"]["uid"])).await.unwrap();
    let token = made["status"]["token"].as_str().unwrap().to_owned();
    let client = bearer(&server, Some(&token));
    let user = who_am_i(&client).await.unwrap();
    assert_eq!(user["username"], "system:serviceaccount:a:robot");
    assert_eq!(user["extra"]["authentication.kubernetes.io/pod-name"], json!(["p"]));

    let review = json!({"spec": {"token": token}});
    let review = server.post("/apis/authentication.k8s.io/v1/tokenreviews", &review).await.unwrap();
    assert_eq!((&review["status"]["authenticated"], &review["status"]["audiences"]), (&json!(true), &json!([ISSUER])));

    server.delete("/api/v1/namespaces/a/pods/p", &json!({"gracePeriodSeconds": 0})).await.unwrap();
    assert_eq!(server.get("/api/v1/namespaces/a/pods/p").await.unwrap_err().0, 404);
    assert_eq!(who_am_i(&client).await.unwrap_err().0, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_keeps_to_its_own() {
    let Some((server, _keys)) = start().await else { return };
    server.namespace("a").await;
    let node = |name: &str| json!({"metadata": {"name": name}});
    let made = as_node(&server, "POST", "/api/v1/nodes", &node("n1")).await.unwrap();
    assert_eq!(made["spec"]["taints"][0]["key"], "node.kubernetes.io/not-ready");
    let (code, message) = as_node(&server, "POST", "/api/v1/nodes", &node("n2")).await.unwrap_err();
    assert_eq!(
        (code, message.as_str()),
        (403, r#"nodes "n2" is forbidden: node "n1" is not allowed to modify node "n2""#)
    );
    for name in ["mine", "other"] {
        let secret = json!({"metadata": {"name": name}, "stringData": {"k": "v"}});
        server.post("/api/v1/namespaces/a/secrets", &secret).await.unwrap();
    }
    let (code, message) = as_node(&server, "GET", "/api/v1/namespaces/a/secrets/mine", &Value::Null).await.unwrap_err();
    assert!(code == 403 && message.ends_with("no relationship found between node 'n1' and this object"), "{message}");
    let pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n1", "containers": [
        {"name": "c", "image": "x", "envFrom": [{"secretRef": {"name": "mine"}}]}]}});
    server.post("/api/v1/namespaces/a/pods", &pod).await.unwrap();
    server.get("/api/v1/namespaces/a/pods/p").await.unwrap();
    as_node(&server, "GET", "/api/v1/namespaces/a/secrets/mine", &Value::Null).await.unwrap();
    assert_eq!(as_node(&server, "GET", "/api/v1/namespaces/a/secrets/other", &Value::Null).await.unwrap_err().0, 403);
    assert_eq!(as_node(&server, "GET", "/api/v1/pods", &Value::Null).await.unwrap_err().0, 403);
    let own = "/api/v1/pods?fieldSelector=spec.nodeName%3Dn1";
    assert_eq!(as_node(&server, "GET", own, &Value::Null).await.unwrap()["items"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_grants_what_they_do_not_hold() {
    let Some((server, _keys)) = start().await else { return };
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let role = |name: &str, group: &str, resource: &str, verbs: &[&str]| json!({"metadata": {"name": name}, "rules": [{"apiGroups": [group], "resources": [resource], "verbs": verbs}]});
    let binding = |role: &str| {
        json!({"metadata": {"name": role}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "zed"}]})
    };
    server
        .post(
            &format!("{rbac}/clusterroles"),
            &role("makers", "rbac.authorization.k8s.io", "clusterroles", &["create"]),
        )
        .await
        .unwrap();
    server.post(&format!("{rbac}/clusterrolebindings"), &binding("makers")).await.unwrap();
    server.post(&format!("{rbac}/clusterroles"), &role("readers", "", "pods", &["get"])).await.unwrap();
    server.post(&format!("{rbac}/clusterrolebindings"), &binding("readers")).await.unwrap();
    server.get(&format!("{rbac}/clusterrolebindings/readers")).await.unwrap();
    let make = async |verbs: &[&str]| {
        let role = role("made", "", "pods", verbs);
        server.call_as(("zed", &[]), "POST", &format!("{rbac}/clusterroles"), &role).await
    };
    let (code, message) = make(&["get", "delete"]).await.unwrap_err();
    assert_eq!(code, 403);
    assert!(
        message.ends_with("is attempting to grant RBAC permissions not currently held:\n{APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"delete\"]}"),
        "{message}"
    );
    make(&["get"]).await.unwrap();
    let (code, message) =
        server.call_as(("zed", &[]), "GET", "/api/v1/namespaces/default/secrets", &Value::Null).await.unwrap_err();
    let expected =
        r#"secrets is forbidden: User "zed" cannot list resource "secrets" in API group "" in the namespace "default""#;
    assert_eq!((code, message.as_str()), (403, expected));
}

/// A kubelet that accepts one connection after another.
async fn kubelet<F, Fut>(serve: F) -> u16
where
    F: Fn(TlsStream<TcpStream>) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let made = rcgen::generate_simple_self_signed(["somebody".to_owned()]).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder().with_no_client_auth();
    let config = config.with_single_cert(vec![made.cert.der().clone()], key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(stream) = acceptor.accept(stream).await {
                tokio::spawn(serve(stream));
            }
        }
    });
    port
}

/// A node at a kubelet's port, and a pod on it.
async fn node_and_pod(server: &Server, name: &str, port: u16) {
    server.post("/api/v1/nodes", &json!({"metadata": {"name": name}})).await.unwrap();
    let status = json!({"status": {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}});
    server.merge(&format!("/api/v1/nodes/{name}/status"), &status).await.unwrap();
    let pod =
        json!({"metadata": {"name": name}, "spec": {"nodeName": name, "containers": [{"name": "c", "image": "x"}]}});
    server.post("/api/v1/namespaces/default/pods", &pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_come_from_the_kubelet() {
    let Some((server, _keys)) = start().await else { return };
    let port = kubelet(async |mut stream: TlsStream<TcpStream>| {
        let mut head = vec![0; 4096];
        let read = stream.read(&mut head).await.unwrap();
        let head = String::from_utf8_lossy(&head[..read]).into_owned();
        let target = head.split_whitespace().nth(1).unwrap_or_default().to_owned();
        let answer = if target.contains("previous=true") {
            ("400 Bad Request", "no such container")
        } else {
            ("200 OK", target.as_str())
        };
        let answer = format!("HTTP/1.1 {}\r\nContent-Length: {}\r\n\r\n{}", answer.0, answer.1.len(), answer.1);
        stream.write_all(answer.as_bytes()).await.unwrap();
        _ = stream.shutdown().await;
    })
    .await;
    node_and_pod(&server, "n1", port).await;
    let text = async |path: &str| {
        server.client.request_text(Request::get(path).body(Vec::new()).unwrap()).await.map_err(refusal)
    };
    let log = "/api/v1/namespaces/default/pods/n1/log";
    assert_eq!(text(&format!("{log}?tailLines=3")).await.unwrap(), "/containerLogs/default/n1/c?tailLines=3");
    assert_eq!(text(&format!("{log}?previous=true")).await.unwrap_err(), (400, "no such container".to_owned()));
    let (code, message) = text(&format!("{log}?container=x")).await.unwrap_err();
    assert_eq!((code, message.as_str()), (400, "container x is not valid for pod n1"));
    assert_eq!(text(&format!("{log}?tailLines=-1")).await.unwrap_err().0, 422);
    assert_eq!(text("/api/v1/nodes/n1/proxy/metrics/cadvisor?a=b").await.unwrap(), "/metrics/cadvisor?a=b");
    let exec = text("/api/v1/namespaces/default/pods/n1/exec?command=ls").await.unwrap_err();
    assert_eq!(exec, (400, "Upgrade request required".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminal_is_passed_through_to_the_kubelet() {
    let Some((server, _keys)) = start().await else { return };
    let port = kubelet(async |stream: TlsStream<TcpStream>| {
        #[expect(clippy::result_large_err, reason = "the callback's type is the library's")]
        let negotiate = |request: &Handshake, mut answer: HandshakeAnswer| {
            assert_eq!(
                request.uri().path_and_query().unwrap(),
                "/exec/default/n1/c?output=1&error=1&command=echo&command=hi"
            );
            assert!(request.headers().get("authorization").is_none());
            let asked = request.headers()["sec-websocket-protocol"]
                .to_str()
                .unwrap()
                .split(',')
                .next()
                .unwrap()
                .trim()
                .to_owned();
            answer.headers_mut().insert("sec-websocket-protocol", asked.parse().unwrap());
            Ok(answer)
        };
        let mut socket = tokio_tungstenite::accept_hdr_async(stream, negotiate).await.unwrap();
        socket.send(Message::Binary(b"\x01hi\n".to_vec().into())).await.unwrap();
        socket.send(Message::Binary(b"\x03{\"status\":\"Success\"}".to_vec().into())).await.unwrap();
        _ = socket.close(None).await;
    })
    .await;
    node_and_pod(&server, "n1", port).await;
    let pods: Api<Pod> = Api::namespaced(server.client.clone(), "default");
    let parameters = AttachParams::default().stdin(false).container("c");
    let mut running = pods.exec("n1", ["echo", "hi"], &parameters).await.unwrap();
    let mut output = String::new();
    running.stdout().unwrap().read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "hi\n");
    let status = running.take_status().unwrap().await.unwrap();
    assert_eq!(status.status.as_deref(), Some("Success"));
}

/// A kubelet that knows SPDY only: it says on stdout what it got on stdin, once that has ended.
async fn answer_in_spdy(mut stream: TlsStream<TcpStream>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    if !head.contains("upgrade: spdy/3.1") {
        stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        return;
    }
    assert!(head.starts_with("post /exec/default/n1/c?input=1&output=1&command=cat http/1.1"), "{head}");
    assert!(head.contains("x-stream-protocol-version: v4.channel.k8s.io"), "{head}");
    let upgraded = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n";
    stream.write_all(upgraded).await.unwrap();
    // The streams in the order in which they are opened: error, stdin, stdout.
    let (error, stdin, stdout) = (1_u32, 3_u32, 5_u32);
    let mut given = Vec::new();
    loop {
        let id = stream.read_u32().await.unwrap();
        let rest = stream.read_u32().await.unwrap();
        let (flags, length) = (rest >> 24, rest & 0xff_ffff);
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data).await.unwrap();
        if id == stdin {
            given.extend(data);
            if flags & 1 == 1 {
                break;
            }
        }
    }
    for (id, data) in [(stdout, given), (error, br#"{"status":"Success"}"#.to_vec())] {
        stream.write_u32(id).await.unwrap();
        stream.write_u32(1 << 24 | data.len() as u32).await.unwrap();
        stream.write_all(&data).await.unwrap();
    }
    // The other side closes.
    let _ = stream.read(&mut [0; 1024]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kubelet_without_websockets_is_spoken_to_in_spdy() {
    let Some((server, _keys)) = start().await else { return };
    let port = kubelet(answer_in_spdy).await;
    node_and_pod(&server, "n1", port).await;
    let pods: Api<Pod> = Api::namespaced(server.client.clone(), "default");
    let parameters = AttachParams::default().stdin(true).stderr(false).container("c");
    let mut running = pods.exec("n1", ["cat"], &parameters).await.unwrap();
    let (mut stdin, mut stdout) = (running.stdin().unwrap(), running.stdout().unwrap());
    stdin.write_all(b"hi\n").await.unwrap();
    stdin.shutdown().await.unwrap();
    let mut output = String::new();
    stdout.read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "hi\n");
    let status = running.take_status().unwrap().await.unwrap();
    assert_eq!(status.status.as_deref(), Some("Success"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_through_a_proxy_leads_back_below_it() {
    let Some((server, _keys)) = start().await else { return };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = vec![0; 4096];
            let read = stream.read(&mut head).await.unwrap();
            let head = String::from_utf8_lossy(&head[..read]).into_owned();
            let target = head.split_whitespace().nth(1).unwrap_or_default().to_owned();
            let method = head.split_whitespace().next().unwrap_or_default().to_owned();
            let answer = match target.as_str() {
                "/moved" => "HTTP/1.1 302 Found\r\nLocation: /elsewhere/\r\nContent-Length: 0\r\n\r\n".to_owned(),
                "/page" => {
                    let page = "<a href=\"/rewriteme\">test</a>";
                    format!(
                        "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {}\r\n\r\n{page}",
                        page.len()
                    )
                }
                _ => {
                    let said = format!("{method} {target} {}", head.contains("x-forwarded-uri: /api/v1/"));
                    format!(
                        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{said}",
                        said.len()
                    )
                }
            };
            stream.write_all(answer.as_bytes()).await.unwrap();
            _ = stream.shutdown().await;
        }
    });
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "x", "ports": [{"containerPort": port}]}]}});
    server.post("/api/v1/namespaces/default/pods", &pod).await.unwrap();
    let status = json!({"status": {"phase": "Running", "podIP": "127.0.0.1"}});
    server.merge("/api/v1/namespaces/default/pods/p/status", &status).await.unwrap();
    let proxied = "/api/v1/namespaces/default/pods/p/proxy";
    let send = async |method: &str, path: String| {
        let request = Request::builder().method(method).uri(path).body(kube::client::Body::empty()).unwrap();
        let answer = server.client.send(request).await.unwrap();
        let location = answer.headers().get("location").map(|l| l.to_str().unwrap().to_owned());
        let (code, body) = (answer.status().as_u16(), answer.into_body().collect_bytes().await.unwrap());
        (code, location, String::from_utf8(body.to_vec()).unwrap())
    };
    let page = send("GET", format!("{proxied}/page")).await;
    assert_eq!(page, (200, None, format!("<a href=\"{proxied}/rewriteme\">test</a>")));
    assert_eq!(send("GET", format!("{proxied}/moved")).await.1, Some(format!("{proxied}/elsewhere/")));
    assert_eq!(send("GET", format!("{proxied}?a=b")).await.1, Some(format!("{proxied}/?a=b")));
    for method in ["DELETE", "GET", "OPTIONS", "PATCH", "POST", "PUT"] {
        assert_eq!(send(method, format!("{proxied}/x?y=z")).await.2, format!("{method} /x?y=z true"), "{method}");
    }
    assert_eq!(send("POST", proxied.to_owned()).await.2, "POST / true");
}
