//! What is off by default, switched on: ClusterTrustBundles and PodCertificateRequests.

use crate::common::{Server, base64, eventually, has_etcd};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

const API: &str = "/apis/certificates.k8s.io/v1beta1";
const BUNDLES: &str = "/apis/certificates.k8s.io/v1beta1/clustertrustbundles";
const REQUESTS: &str = "/apis/certificates.k8s.io/v1beta1/namespaces/ns/podcertificaterequests";
const NODE: (&str, &[&str]) = ("system:node:n1", &["system:nodes", "system:authenticated"]);
const USER: (&str, &[&str]) = ("ann", &["system:authenticated"]);
const GATES: &str =
    "--feature-gates=ClusterTrustBundle=true,ClusterTrustBundleProjection=true,PodCertificateRequest=true";

fn shared(path: &str) -> Option<Value> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/kubernetes-1.36");
    Some(serde_json::from_slice(&std::fs::read(root.join(path)).ok()?).unwrap())
}

/// Puts what has no order into one, and takes out CBOR, which is not served.
fn normal(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|name, _| !(name.starts_with("application/") && name.contains("cbor")));
            members.values_mut().for_each(normal);
            for name in ["parameters", "required"] {
                if let Some(Value::Array(items)) = members.get_mut(name) {
                    items.sort_by_key(Value::to_string);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(normal),
        _ => {}
    }
}

async fn start() -> Server {
    let flags = [
        "--runtime-config=certificates.k8s.io/v1beta1=true",
        GATES,
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
    ];
    Server::start_with(&flags).await
}

fn authority(name: &str) -> String {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
}

/// Lets a user do all in the group but `attest` and `sign`.
async fn may_write(server: &Server) {
    let rules = json!([{"apiGroups": ["certificates.k8s.io"], "verbs": ["*"],
        "resources": ["clustertrustbundles", "podcertificaterequests", "podcertificaterequests/status"]}]);
    let role = json!({"metadata": {"name": "writer"}, "rules": rules});
    server.post("/apis/rbac.authorization.k8s.io/v1/clusterroles", &role).await.unwrap();
    let binding = json!({"metadata": {"name": "writer"}, "subjects": [{"kind": "User", "name": USER.0}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "writer"}});
    server.post("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_is_switched_on_is_served_and_told_of() {
    if !has_etcd() {
        return;
    }
    let server = start().await;
    let group = server.get("/apis/certificates.k8s.io").await.unwrap();
    let versions: Vec<&str> =
        group["versions"].as_array().unwrap().iter().map(|v| v["version"].as_str().unwrap()).collect();
    assert_eq!((versions, &group["preferredVersion"]["version"]), (vec!["v1", "v1beta1"], &json!("v1")));
    let listed = server.get(API).await.unwrap();
    if let Some(theirs) = shared("discovery/apis__certificates.k8s.io__v1beta1.json") {
        assert_eq!(listed["resources"], theirs["resources"]);
    }
    let mut openapi = server.get(&format!("/openapi/v3{API}")).await.unwrap();
    normal(&mut openapi);
    let keys = |value: &Value| -> BTreeSet<String> { value.as_object().unwrap().keys().cloned().collect() };
    if let Some(mut theirs) = shared("openapi/v3/apis__certificates.k8s.io__v1beta1_openapi.json") {
        normal(&mut theirs);
        assert_eq!(keys(&openapi["paths"]), keys(&theirs["paths"]));
        for (path, item) in openapi["paths"].as_object().unwrap() {
            assert!(item == &theirs["paths"][path], "{path}");
        }
        for (name, schema) in openapi["components"]["schemas"].as_object().unwrap() {
            assert!(schema == &theirs["components"]["schemas"][name], "{name}");
        }
    }
    let swagger = server.get("/openapi/v2").await.unwrap();
    assert!(swagger["paths"].get(format!("{API}/clustertrustbundles")).is_some());

    let off = server.sibling_with(&["--feature-gates=ClusterTrustBundle=true"]).await;
    assert_eq!(off.get(BUNDLES).await.unwrap()["items"], json!([]));
    assert_eq!(off.get(REQUESTS).await.unwrap_err().0, 404, "its gate is off");
    let off = server.sibling_with(&["--runtime-config=api/all=true", "--feature-gates="]).await;
    assert_eq!(off.get(API).await.unwrap_err().0, 404, "both gates are off");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trust_bundles_are_written_by_who_may_attest_and_found_by_their_signer() {
    if !has_etcd() {
        return;
    }
    let server = start().await;
    may_write(&server).await;
    let bundle = |name: &str, signer: &str| {
        json!({"metadata": {"name": name, "labels": {"a": "b"}},
            "spec": {"signerName": signer, "trustBundle": authority(name)}})
    };
    let plain = json!({"metadata": {"name": "plain"}, "spec": {"trustBundle": authority("plain")}});
    eventually("the role has been seen", async || {
        server.call_as(USER, "POST", BUNDLES, &plain).await.map_err(|refusal| format!("{refusal:?}"))
    })
    .await;
    let of_signer = bundle("example.com:foo:v1", "example.com/foo");
    let (code, message) = server.call_as(USER, "POST", BUNDLES, &of_signer).await.unwrap_err();
    assert!(code == 403 && message.contains("user not permitted to attest with signerName"), "{message}");
    let made = server.post(BUNDLES, &of_signer).await.unwrap();
    let (code, message) = server.post(BUNDLES, &bundle("example.com:bar:v1", "example.com/foo")).await.unwrap_err();
    assert!(code == 422 && message.contains("must be named with prefix example.com:foo:"), "{message}");

    let selected = format!("{BUNDLES}?fieldSelector=spec.signerName%3Dexample.com/foo");
    assert_eq!(server.names(&selected).await, ["example.com:foo:v1"]);
    let table = server.table(BUNDLES).await;
    let cells: Vec<&Value> = table["rows"].as_array().unwrap().iter().map(|row| &row["cells"]).collect();
    assert_eq!(cells, [&json!(["example.com:foo:v1", "example.com/foo"]), &json!(["plain", "<none>"])]);

    let path = format!("{BUNDLES}/example.com:foo:v1");
    let changed = server.merge(&path, &json!({"spec": {"trustBundle": authority("new")}})).await.unwrap();
    assert_ne!(changed["spec"]["trustBundle"], made["spec"]["trustBundle"]);
    let (code, message) = server.merge(&path, &json!({"spec": {"signerName": "example.com/bar"}})).await.unwrap_err();
    assert!(code == 422 && message.contains("spec.signerName"), "{message}");
    let (code, message) = server.merge(&path, &json!({"spec": {"trustBundle": "none"}})).await.unwrap_err();
    assert!(code == 422 && message.contains("at least one trust anchor must be provided"), "{message}");

    // Pods may name them, and all their accounts may read them.
    server.namespace("ns").await;
    let sources = json!([{"clusterTrustBundle": {"name": "plain", "path": "ca.pem"}},
        {"podCertificate": {"signerName": "example.com/foo", "keyType": "ED25519", "credentialBundlePath": "cert.pem"}}]);
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "x"}],
        "volumes": [{"name": "v", "projected": {"sources": sources}}]}});
    let pod = server.post("/api/v1/namespaces/ns/pods", &pod).await.unwrap();
    assert_eq!(pod["spec"]["volumes"][0]["projected"]["sources"], sources);
    let account = ("system:serviceaccount:ns:default", &["system:serviceaccounts"][..]);
    assert!(server.call_as(account, "GET", BUNDLES, &Value::Null).await.is_ok());
    assert!(server.call_as(NODE, "GET", BUNDLES, &Value::Null).await.is_ok());
    assert_eq!(server.call_as(NODE, "POST", BUNDLES, &plain).await.unwrap_err().0, 403);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nodes_request_for_its_pod_is_answered_once_by_who_may_sign() {
    if !has_etcd() {
        return;
    }
    let server = start().await;
    may_write(&server).await;
    server.namespace("ns").await;
    let node = server.post("/api/v1/nodes", &json!({"metadata": {"name": "n1"}})).await.unwrap();
    let accounts = "/api/v1/namespaces/ns/serviceaccounts";
    let account = server.post(accounts, &json!({"metadata": {"name": "sa"}})).await.unwrap();
    let pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n1", "serviceAccountName": "sa",
        "containers": [{"name": "c", "image": "x"}]}});
    let pod = server.post("/api/v1/namespaces/ns/pods", &pod).await.unwrap();

    let key = rcgen::KeyPair::generate().unwrap();
    let stub = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
    let uid = |object: &Value| object["metadata"]["uid"].clone();
    let request = json!({"metadata": {"generateName": "req-"}, "spec": {"signerName": "example.com/foo",
        "podName": "p", "podUID": uid(&pod), "serviceAccountName": "sa", "serviceAccountUID": uid(&account),
        "nodeName": "n1", "nodeUID": uid(&node), "stubPKCS10Request": STANDARD.encode(stub.der())}});
    let with = |field: &str, value: &str| {
        let mut request = request.clone();
        request["spec"][field] = value.into();
        request
    };
    let made = eventually("the pod has been seen", async || {
        server.call_as(NODE, "POST", REQUESTS, &request).await.map_err(|refusal| format!("{refusal:?}"))
    })
    .await;
    assert_eq!(made["spec"]["maxExpirationSeconds"], 86_400);
    for (asked, why) in [
        (with("nodeName", "n2"), "which is not the requesting node"),
        (with("podUID", "other"), "which differs from running pod"),
        (with("serviceAccountName", "default"), "that differs from running pod"),
        (with("serviceAccountUID", "other"), "which differs from the running service account"),
        (with("nodeUID", "other"), "inconsistent with the running node"),
    ] {
        let (code, message) = server.call_as(NODE, "POST", REQUESTS, &asked).await.unwrap_err();
        assert!(code == 403 && message.contains(why), "{message}");
    }
    let (code, message) = server.post(REQUESTS, &with("stubPKCS10Request", &base64("none"))).await.unwrap_err();
    assert!(code == 422 && message.contains("must be a valid PKCS#10 CSR"), "{message}");

    let name = made["metadata"]["name"].as_str().unwrap();
    let path = format!("{REQUESTS}/{name}");
    assert!(server.call_as(NODE, "GET", &path, &Value::Null).await.is_ok());
    let own = format!("{API}/podcertificaterequests?fieldSelector=spec.nodeName%3Dn1");
    assert_eq!(server.call_as(NODE, "GET", &own, &Value::Null).await.unwrap()["items"].as_array().unwrap().len(), 1);
    for (method, path) in [("GET", format!("{API}/podcertificaterequests")), ("DELETE", path.clone())] {
        assert_eq!(server.call_as(NODE, method, &path, &Value::Null).await.unwrap_err().0, 403, "{method} {path}");
    }
    let by_pod = format!("{REQUESTS}?fieldSelector=spec.podName%3Dp,spec.signerName%3Dexample.com/foo");
    assert_eq!(server.names(&by_pod).await, [name]);
    assert_eq!(server.merge(&path, &json!({"spec": {"podName": "q"}})).await.unwrap_err().0, 422);

    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let text = |seconds: u64| apimachinery::time::rfc3339(jiff::Timestamp::try_from(at(seconds)).unwrap());
    let mut params = rcgen::CertificateParams::default();
    params.not_before = at(now).into();
    params.not_after = at(now + 3600).into();
    let condition = json!({"type": "Issued", "status": "True", "reason": "Good", "message": "",
        "lastTransitionTime": text(now)});
    let mut issued = made.clone();
    issued["status"] = json!({"conditions": [condition], "certificateChain": params.self_signed(&key).unwrap().pem(),
        "notBefore": text(now), "notAfter": text(now + 3600), "beginRefreshAt": text(now + 1800)});
    let status = format!("{path}/status");
    let (code, message) = server.call_as(USER, "PUT", &status, &issued).await.unwrap_err();
    let why = "spec.signerName: Forbidden: User \"ann\" is not permitted to \"sign\" for signer \"example.com/foo\"";
    assert!(code == 422 && message.contains(why), "{message}");
    assert_eq!(server.call_as(NODE, "PUT", &status, &issued).await.unwrap_err().0, 403);
    let other = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
    let mut wrong = issued.clone();
    wrong["status"]["certificateChain"] = other.into();
    let (code, message) = server.put(&status, &wrong).await.unwrap_err();
    assert!(code == 422 && message.contains("was not issued to the requested public key"), "{message}");
    let written = server.put(&status, &issued).await.unwrap();
    assert_eq!(written["status"], issued["status"]);
    let table = server.table(REQUESTS).await;
    assert_eq!(table["rows"][0]["cells"], json!([name, "p", "sa", "n1", "example.com/foo", "Issued", "<none>"]));
    let (code, message) = server.merge(&status, &json!({"status": {"certificateChain": "x"}})).await.unwrap_err();
    assert!(code == 422 && message.contains("immutable after PodCertificateRequest is issued"), "{message}");
}
