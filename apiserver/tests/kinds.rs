//! Every stored kind goes through its life against a real etcd: made, read, listed, shown, patched, its status patched,
//! refused when stale, deleted, and deleted by collection.

use apimachinery::facts::{self, KindFacts};
use base64::Engine as _;
use http::Request;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const NAMESPACE: &str = "sweep";
const NAME: &str = "sweep-object";
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

struct Server {
    client: kube::Client,
    _apiserver: Process,
    _etcd: Process,
    _directory: tempfile::TempDir,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn has_etcd() -> bool {
    let found = Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        assert!(std::env::var_os("CI").is_none(), "etcd is not installed");
        println!("skipped: etcd is not installed");
    }
    found
}

fn spawn(program: &Path, args: &[String], log: &Path) -> Process {
    let log = std::fs::File::create(log).unwrap();
    let mut command = Command::new(program);
    command.args(args).stdout(log.try_clone().unwrap()).stderr(log);
    Process(command.spawn().unwrap_or_else(|e| panic!("{}: {e}", program.display())))
}

impl Server {
    async fn start() -> Server {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let (client_port, peer_port, port) = (free_port(), free_port(), free_port());
        let (etcd_url, peer_url) = (format!("http://127.0.0.1:{client_port}"), format!("http://127.0.0.1:{peer_port}"));
        let args = [
            format!("--data-dir={}", path("etcd").display()),
            format!("--listen-client-urls={etcd_url}"),
            format!("--advertise-client-urls={etcd_url}"),
            format!("--listen-peer-urls={peer_url}"),
            format!("--initial-advertise-peer-urls={peer_url}"),
            format!("--initial-cluster=default={peer_url}"),
        ];
        let etcd = spawn(Path::new("etcd"), &args, &path("etcd.log"));
        let args = [
            format!("--etcd-servers={etcd_url}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={port}"),
            format!("--cert-dir={}", path("certs").display()),
            format!("--client-ca-file={}", path("ca.crt").display()),
            "--authorization-mode=RBAC".to_owned(),
            "--disable-admission-plugins=ServiceAccount".to_owned(),
        ];
        let admin = admin(&path("ca.crt"));
        let apiserver = spawn(Path::new(env!("CARGO_BIN_EXE_apiserver")), &args, &path("apiserver.log"));
        _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let mut config = kube::Config::new(format!("https://127.0.0.1:{port}").parse().unwrap());
        config.accept_invalid_certs = true;
        config.auth_info.client_certificate_data = Some(base64(&admin.0));
        config.auth_info.client_key_data = Some(base64(&admin.1).into());
        let client = kube::Client::try_from(config).unwrap();
        let deadline = Instant::now() + START_TIMEOUT;
        while let Err(error) = client.request_text(Request::get("/readyz").body(Vec::new()).unwrap()).await {
            let log = || std::fs::read_to_string(path("apiserver.log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "the apiserver is not ready: {error:?} {}", log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Server { client, _apiserver: apiserver, _etcd: etcd, _directory: directory }
    }

    /// The body, or the code of the failure and its message.
    async fn call(&self, method: &str, path: &str, body: &Value, kind: &str) -> Result<Value, (u16, String)> {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let request = Request::builder().method(method).uri(path).header("content-type", kind).body(body).unwrap();
        self.client.request::<Value>(request).await.map_err(|error| match error {
            kube::Error::Api(status) => (status.code, status.message.clone()),
            other => (0, other.to_string()),
        })
    }

    async fn get(&self, path: &str) -> Result<Value, (u16, String)> {
        self.call("GET", path, &Value::Null, "application/json").await
    }

    async fn table(&self, path: &str) -> Value {
        let accept = "application/json;as=Table;v=v1;g=meta.k8s.io";
        let request = Request::get(path).header("accept", accept).body(Vec::new()).unwrap();
        self.client.request::<Value>(request).await.unwrap()
    }
}

fn base64(text: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// The certificate and key of a member of `system:masters`, signed by a CA that is written to a file.
fn admin(authority: &Path) -> (String, String) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key).unwrap();
    std::fs::write(authority, ca.pem()).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:masters");
    params.distinguished_name.push(rcgen::DnType::CommonName, "admin");
    params.extended_key_usages.push(rcgen::ExtendedKeyUsagePurpose::ClientAuth);
    let issuer = rcgen::Issuer::from_ca_cert_pem(&ca.pem(), ca_key).unwrap();
    (params.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem())
}

fn collection_path(kind: &KindFacts) -> String {
    let root = if kind.group.is_empty() { "/api/v1".into() } else { format!("/apis/{}/{}", kind.group, kind.version) };
    let namespace = if kind.namespaced { format!("/namespaces/{NAMESPACE}") } else { String::new() };
    format!("{root}{namespace}/{}", kind.resource)
}

fn version_of(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"].as_str().and_then(|v| v.parse().ok()).unwrap_or(0)
}

/// One kind's life. Panics say where it failed.
async fn live(server: &Server, kind: &KindFacts, object: &Value) {
    const JSON: &str = "application/json";
    const MERGE: &str = "application/merge-patch+json";
    let what = format!("{} {}", kind.api_version(), kind.kind);
    let collection = collection_path(kind);
    let name = object["metadata"]["name"].as_str().unwrap();
    let path = format!("{collection}/{name}");

    let made = server.call("POST", &collection, object, JSON).await.unwrap_or_else(|e| panic!("{what}: create: {e:?}"));
    assert_eq!((&made["kind"], &made["apiVersion"]), (&json!(kind.kind), &json!(kind.api_version())), "{what}");
    assert!(made["metadata"]["uid"].is_string() && version_of(&made) > 0, "{what}: {made}");
    assert_eq!(server.call("POST", &collection, object, JSON).await.unwrap_err().0, 409, "{what}: create again");
    assert_eq!(server.get(&path).await.unwrap(), made, "{what}: read");

    let strict = format!("{path}?fieldValidation=Strict");
    let patch = json!({"metadata": {"labels": {"swept": "yes"}}});
    let patched = server.call("PATCH", &strict, &patch, MERGE).await.unwrap_or_else(|e| panic!("{what}: patch: {e:?}"));
    assert!(version_of(&patched) > version_of(&made), "{what}");
    assert_eq!(
        patched["metadata"]["generation"], made["metadata"]["generation"],
        "{what}: labels are no new generation"
    );
    assert_eq!(patched.get("spec"), made.get("spec"), "{what}: a label changes nothing else");
    let unknown = server.call("PATCH", &strict, &json!({"bogus": 1}), MERGE).await;
    assert_eq!(unknown.unwrap_err().0, 400, "{what}: unknown field");

    let mut same = patched.clone();
    same["metadata"]["annotations"] = json!({"a": "b"});
    let put = server.call("PUT", &path, &same, JSON).await.unwrap_or_else(|e| panic!("{what}: update: {e:?}"));
    assert_eq!(put["metadata"]["annotations"]["a"], "b", "{what}");
    assert_eq!(server.call("PUT", &path, &same, JSON).await.unwrap_err().0, 409, "{what}: a stale update");

    if kind.subresource("status").is_some() {
        let status = format!("{path}/status");
        let read = server.get(&status).await.unwrap_or_else(|e| panic!("{what}: read status: {e:?}"));
        assert_eq!(read["metadata"]["uid"], made["metadata"]["uid"], "{what}");
        let annotated = server.call("PATCH", &status, &json!({"metadata": {"annotations": {"c": "d"}}}), MERGE).await;
        annotated.unwrap_or_else(|e| panic!("{what}: patch status: {e:?}"));
    }

    let listed = server.get(&format!("{collection}?labelSelector=swept%3Dyes")).await.unwrap();
    assert_eq!(listed["items"].as_array().unwrap().len(), 1, "{what}: list: {listed}");
    let by_name = server.get(&format!("{collection}?fieldSelector=metadata.name%3D{name}")).await.unwrap();
    assert_eq!(by_name["items"].as_array().unwrap().len(), 1, "{what}: list by name");
    let table = server.table(&format!("{collection}?labelSelector=swept%3Dyes")).await;
    let (columns, rows) = (table["columnDefinitions"].as_array().unwrap(), table["rows"].as_array().unwrap());
    assert_eq!(rows.len(), 1, "{what}: {table}");
    assert_eq!(rows[0]["cells"].as_array().unwrap().len(), columns.len(), "{what}: {table}");

    server
        .call("DELETE", &format!("{path}?dryRun=All"), &Value::Null, JSON)
        .await
        .unwrap_or_else(|e| panic!("{what}: {e:?}"));
    server.get(&path).await.unwrap_or_else(|e| panic!("{what}: a dry run deletes nothing: {e:?}"));
    server.call("DELETE", &path, &Value::Null, JSON).await.unwrap_or_else(|e| panic!("{what}: delete: {e:?}"));
    if let Ok(held) = server.get(&path).await {
        assert!(held["metadata"]["deletionTimestamp"].is_string(), "{what}: {held}");
        return;
    }
    if kind.has_verb("deletecollection") {
        let mut again = object.clone();
        again["metadata"]["labels"] = json!({"swept": "yes"});
        server.call("POST", &collection, &again, JSON).await.unwrap_or_else(|e| panic!("{what}: create anew: {e:?}"));
        let some = format!("{collection}?labelSelector=swept%3Dyes");
        server.call("DELETE", &some, &Value::Null, JSON).await.unwrap_or_else(|e| panic!("{what}: collection: {e:?}"));
        match server.get(&path).await {
            Ok(held) => assert!(held["metadata"]["deletionTimestamp"].is_string(), "{what}: {held}"),
            Err((code, _)) => assert_eq!(code, 404, "{what}"),
        }
    }
}

fn signing_request() -> Value {
    let key = rcgen::KeyPair::generate().unwrap();
    let request = rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let request = base64(&request);
    json!({"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
        "spec": {"request": request, "signerName": "a.b/c", "usages": ["client auth"]}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_stored_kind_lives_its_life() {
    if !has_etcd() {
        return;
    }
    let mut objects = apimachinery::yaml::documents(include_str!("objects.yaml")).unwrap();
    objects.push(signing_request());
    let server = Server::start().await;
    let namespace = json!({"metadata": {"name": NAMESPACE}});
    server.call("POST", "/api/v1/namespaces", &namespace, "application/json").await.unwrap();
    let mut left: BTreeSet<(&str, &str, &str)> =
        facts::kinds().iter().filter(|k| k.is_stored()).map(|k| (k.group, k.version, k.kind)).collect();
    for mut object in objects {
        let gvk = apimachinery::meta::Gvk::from_api_version(
            object["apiVersion"].as_str().unwrap(),
            object["kind"].as_str().unwrap(),
        );
        let kind = facts::kind(&gvk.group, &gvk.version, &gvk.kind).unwrap_or_else(|| panic!("{gvk}"));
        left.remove(&(kind.group, kind.version, kind.kind));
        if object["metadata"]["name"].is_null() {
            object["metadata"]["name"] = json!(NAME);
        }
        live(&server, kind, &object).await;
    }
    assert!(left.is_empty(), "kinds without an object: {left:?}");
}
