//! Every stored kind goes through its life against a real etcd: made, read, listed, shown, patched, its status patched,
//! refused when stale, deleted, and deleted by collection.

use crate::common::{JSON, MERGE, Server, base64, has_etcd};
use apimachinery::facts::{self, KindFacts};
use serde_json::{Value, json};
use std::collections::BTreeSet;

const NAMESPACE: &str = "sweep";
const NAME: &str = "sweep-object";

pub fn collection_path(kind: &KindFacts) -> String {
    let root = if kind.group.is_empty() { "/api/v1".into() } else { format!("/apis/{}/{}", kind.group, kind.version) };
    let namespace = if kind.namespaced { format!("/namespaces/{NAMESPACE}") } else { String::new() };
    format!("{root}{namespace}/{}", kind.resource)
}

pub fn version_of(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"].as_str().and_then(|v| v.parse().ok()).unwrap_or(0)
}

/// One kind's life. Panics say where it failed.
async fn live(server: &Server, kind: &KindFacts, object: &Value) {
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
    if kind.kind != "EndpointSlice" {
        let (now, was) = (&patched["metadata"]["generation"], &made["metadata"]["generation"]);
        assert_eq!(now, was, "{what}: labels are no new generation");
    }
    assert_eq!(patched.get("spec"), made.get("spec"), "{what}: a label changes nothing else");
    let unknown = server.call("PATCH", &strict, &json!({"bogus": 1}), MERGE).await;
    assert_eq!(unknown.unwrap_err().0, 422, "{what}: unknown field");

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

/// An object of every stored kind.
pub fn one_of_each() -> Vec<(&'static KindFacts, Value)> {
    let mut objects = apimachinery::yaml::documents(include_str!("objects.yaml")).unwrap();
    objects.push(signing_request());
    let kind_of = |mut object: Value| {
        let text = |field: &str| object[field].as_str().unwrap();
        let gvk = apimachinery::meta::Gvk::from_api_version(text("apiVersion"), text("kind"));
        let kind = facts::kind(&gvk.group, &gvk.version, &gvk.kind).unwrap_or_else(|| panic!("{gvk}"));
        if object["metadata"]["name"].is_null() {
            object["metadata"]["name"] = json!(NAME);
        }
        (kind, object)
    };
    objects.into_iter().map(kind_of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_stored_kind_lives_its_life() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    let namespace = json!({"metadata": {"name": NAMESPACE}});
    server.call("POST", "/api/v1/namespaces", &namespace, "application/json").await.unwrap();
    let mut left: BTreeSet<(&str, &str, &str)> =
        facts::kinds().iter().filter(|k| k.is_stored()).map(|k| (k.group, k.version, k.kind)).collect();
    for (kind, object) in one_of_each() {
        left.remove(&(kind.group, kind.version, kind.kind));
        live(&server, kind, &object).await;
    }
    assert!(left.is_empty(), "kinds without an object: {left:?}");
}
