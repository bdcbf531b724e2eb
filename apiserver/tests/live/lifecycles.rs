//! The API operations of every kind, as the conformance programme describes them kind by kind
//! ("… API operations", "… lifecycle", "… status sub-resource"): made with nearly every field set and nothing of it lost,
//! read, listed here and everywhere, watched, changed by update and by three patches, its status written on its own, deleted,
//! and deleted by collection. And Kubernetes' own full objects, which are no valid ones, are understood and refused by name.

use crate::common::{JSON, MERGE, Server, base64, has_etcd};
use apimachinery::facts::{self, KindFacts};
use apimachinery::meta::Gvk;
use futures::{AsyncBufReadExt as _, TryStreamExt as _};
use http::Request;
use serde_json::{Value, json};
use std::time::Duration;

const NAMESPACE: &str = "full";
const NAME: &str = "full-object";
const APPLY: &str = "application/apply-patch+yaml";
const JSON_PATCH: &str = "application/json-patch+json";
const STRATEGIC: &str = "application/strategic-merge-patch+json";
const PATIENCE: Duration = Duration::from_secs(30);

struct Life<'a> {
    server: &'a Server,
    kind: &'static KindFacts,
    what: String,
    collection: String,
}

fn kind_of(object: &Value) -> &'static KindFacts {
    let gvk = Gvk::from_api_version(object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
    facts::kind(&gvk.group, &gvk.version, &gvk.kind).unwrap_or_else(|| panic!("{gvk}"))
}

/// Jobs leave their dependents behind otherwise, and wait for the collector to see to it.
fn background() -> Value {
    json!({"propagationPolicy": "Background"})
}

/// Is all that `part` says said by `whole`, with the same values?
fn holds(whole: &Value, part: &Value) -> Result<(), String> {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => part.iter().try_for_each(|(key, value)| {
            let found = whole.get(key).unwrap_or(&Value::Null);
            let is_nothing = value == "" || value.as_array().is_some_and(Vec::is_empty);
            if is_nothing && found.is_null() { Ok(()) } else { holds(found, value).map_err(|e| format!("{key}.{e}")) }
        }),
        (Value::Array(whole), Value::Array(part)) if whole.len() == part.len() => {
            whole.iter().zip(part).try_for_each(|(whole, part)| holds(whole, part))
        }
        (whole, part) if whole == part => Ok(()),
        _ => Err(format!(" is {whole}, not {part}")),
    }
}

impl Life<'_> {
    fn generation(object: &Value) -> i64 {
        object["metadata"]["generation"].as_i64().unwrap_or(0)
    }

    async fn ask(&self, method: &str, path: &str, body: &Value, content_type: &str) -> Value {
        let answer = self.server.call(method, path, body, content_type).await;
        answer.unwrap_or_else(|error| panic!("{}: {method} {path}: {error:?}", self.what))
    }

    async fn names(&self, path: &str) -> Vec<String> {
        let list = self.ask("GET", path, &Value::Null, JSON).await;
        assert_eq!(list["kind"], json!(format!("{}List", self.kind.kind)), "{}", self.what);
        let items = list["items"].as_array().unwrap();
        items.iter().map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    }

    /// The resource and its subresources are where clients look for them.
    async fn discovered(&self) {
        let kind = self.kind;
        if kind.group.is_empty() {
            return;
        }
        let groups = self.ask("GET", "/apis", &Value::Null, JSON).await;
        let group = groups["groups"].as_array().unwrap().iter().find(|g| g["name"] == kind.group);
        let versions = group.unwrap_or_else(|| panic!("{}: no group", self.what))["versions"].as_array().unwrap();
        assert!(versions.iter().any(|v| v["groupVersion"] == kind.api_version()), "{}", self.what);
        let path = format!("/apis/{}/{}", kind.group, kind.version);
        let resources = self.ask("GET", &path, &Value::Null, JSON).await;
        let has = |name: &str| resources["resources"].as_array().unwrap().iter().any(|r| r["name"] == name);
        assert!(has(kind.resource), "{}", self.what);
        assert_eq!(has(&format!("{}/status", kind.resource)), kind.subresource("status").is_some(), "{}", self.what);
    }

    async fn live(&self, object: &Value, case: &Value) {
        let (change, status) = (case.get("change"), case.get("status"));
        self.discovered().await;
        let what = &self.what;
        let name = object["metadata"]["name"].as_str().unwrap();
        let path = format!("{}/{name}", self.collection);
        let mut with_status = object.clone();
        if let Some(status) = status {
            with_status["status"] = status.clone();
        }
        let made = self.ask("POST", &self.collection, &with_status, JSON).await;
        assert!(status.is_none_or(|status| made["status"] != *status), "{what}: a status is not made");
        holds(&made, object).unwrap_or_else(|lost| panic!("{what}: {lost}"));
        let read = self.ask("GET", &path, &Value::Null, JSON).await;
        assert_eq!(read, made, "{what}");
        assert!(self.names(&self.collection).await.contains(&name.to_owned()), "{what}");
        if self.kind.namespaced {
            let everywhere = self.collection.replacen(&format!("namespaces/{NAMESPACE}/"), "", 1);
            assert!(self.names(&everywhere).await.contains(&name.to_owned()), "{what}");
        }
        let version = made["metadata"]["resourceVersion"].as_str().unwrap();
        let watch =
            format!("{}?watch=true&resourceVersion={version}&fieldSelector=metadata.name%3D{name}", self.collection);
        let request = Request::get(watch.replace(':', "%3A")).body(Vec::new()).unwrap();
        let mut events = self.server.client.request_stream(request).await.unwrap().lines();

        let labelled = json!({"metadata": {"labels": {"merge": "yes"}}});
        let labelled = self.ask("PATCH", &path, &labelled, MERGE).await;
        assert_eq!(labelled["metadata"]["labels"]["merge"], "yes", "{what}");
        let counts = i64::from(self.kind.kind == "EndpointSlice"); // Its labels say whose it is.
        assert_eq!(
            Self::generation(&labelled),
            Self::generation(&made) + counts,
            "{what}: a label is no new generation"
        );
        let annotation = json!({"metadata": {"annotations": {"strategic": "yes"}}});
        let annotated = self.ask("PATCH", &path, &annotation, STRATEGIC).await;
        assert_eq!(annotated["metadata"]["annotations"]["strategic"], "yes", "{what}");
        let operations = json!([
            {"op": "test", "path": "/metadata/labels/merge", "value": "yes"},
            {"op": "replace", "path": "/metadata/labels/merge", "value": "no"}]);
        let mut current = self.ask("PATCH", &path, &operations, JSON_PATCH).await;
        assert_eq!(current["metadata"]["labels"]["merge"], "no", "{what}");
        let mut applied = object.clone();
        applied["metadata"]["labels"]["applied"] = json!("yes");
        let before = current;
        let apply = format!("{path}?fieldManager=lifecycles&force=true");
        current = self.ask("PATCH", &apply, &applied, APPLY).await;
        assert_eq!(current["metadata"]["labels"]["applied"], "yes", "{what}");
        assert_eq!(current["metadata"]["labels"]["merge"], "no", "{what}");
        assert_eq!(current["spec"], before["spec"], "{what}: what is there already is applied");
        assert_eq!(Self::generation(&current), Self::generation(&before) + counts, "{what}");
        if let Some(change) = change {
            let before = Self::generation(&current);
            current = self.ask("PATCH", &path, change, MERGE).await;
            let counts = before > 0 && self.kind.kind != "PriorityClass" || self.kind.kind == "CSIDriver";
            assert_eq!(Self::generation(&current), before + i64::from(counts), "{what}: a change is a new generation");
        }
        let mut wanted = current.clone();
        wanted["metadata"]["labels"]["put"] = json!("yes");
        wanted["status"] = json!({"bogus": true});
        if self.kind.subresource("status").is_none() {
            wanted.as_object_mut().unwrap().remove("status");
        }
        let before = current.clone();
        current = self.ask("PUT", &path, &wanted, JSON).await;
        assert_eq!(current["metadata"]["labels"]["put"], "yes", "{what}");
        assert_eq!(current.get("status"), before.get("status"), "{what}: the status is written elsewhere");
        if let Some(status) = status {
            self.status(&path, &current, status).await;
        }

        self.ask("DELETE", &path, &background(), JSON).await;
        assert_eq!(self.server.get(&path).await.unwrap_err().0, 404, "{what}");
        let mut told = Vec::new();
        while told.last().is_none_or(|last| last != "DELETED") {
            let line = tokio::time::timeout(PATIENCE, events.try_next()).await.unwrap().unwrap();
            let event: Value =
                serde_json::from_str(&line.unwrap_or_else(|| panic!("{what}: the watch ended"))).unwrap();
            assert_eq!(event["object"]["metadata"]["name"], name, "{what}: {event}");
            told.push(event["type"].as_str().unwrap().to_owned());
        }
        let changes = told.len() - 1;
        assert!(changes >= 4 && told[..changes].iter().all(|kind| kind == "MODIFIED"), "{what}: {told:?}");
        if case["alone"] != true && self.kind.has_verb("deletecollection") {
            let names: Vec<String> = match case["names"].as_array() {
                Some(names) => names.iter().map(|name| name.as_str().unwrap().to_owned()).collect(),
                None => (1..=3).map(|number| format!("{name}-{number}")).collect(),
            };
            self.collection_goes(object, &names).await;
        }
    }

    /// Status is read, replaced and patched on its own, and nothing else with it.
    async fn status(&self, path: &str, current: &Value, status: &Value) {
        let (what, path) = (&self.what, format!("{path}/status"));
        let patched = self.ask("PATCH", &path, &json!({"status": status}), MERGE).await;
        holds(&patched["status"], status).unwrap_or_else(|lost| panic!("{what}: status.{lost}"));
        assert_eq!(self.ask("GET", &path, &Value::Null, JSON).await, patched, "{what}");
        let mut put = patched.clone();
        put["spec"] = json!({});
        put["metadata"]["annotations"]["by-status"] = json!("yes");
        let replaced = self.ask("PUT", &path, &put, JSON).await;
        assert_eq!(replaced["spec"], current["spec"], "{what}: the spec is written elsewhere");
        assert_eq!(replaced["status"], patched["status"], "{what}");
        assert_eq!(Self::generation(&replaced), Self::generation(current), "{what}: a status is no new generation");
    }

    /// Of three objects the two with a label go.
    async fn collection_goes(&self, object: &Value, names: &[String]) {
        let what = &self.what;
        for (at, name) in names.iter().enumerate() {
            let mut one = object.clone();
            one["metadata"]["name"] = json!(name);
            if at > 0 {
                one["metadata"]["labels"] = json!({"goes": "yes"});
            }
            self.ask("POST", &self.collection, &one, JSON).await;
        }
        let some = format!("{}?labelSelector=goes%3Dyes", self.collection);
        assert_eq!(self.names(&some).await, names[1..], "{what}");
        self.ask("DELETE", &some, &background(), JSON).await;
        assert_eq!(self.names(&some).await, Vec::<String>::new(), "{what}");
        self.ask("DELETE", &format!("{}/{}", self.collection, names[0]), &background(), JSON).await;
    }
}

fn collection_of(kind: &KindFacts) -> String {
    let root = if kind.group.is_empty() { "/api/v1".into() } else { format!("/apis/{}", kind.api_version()) };
    let namespace = if kind.namespaced { format!("/namespaces/{NAMESPACE}") } else { String::new() };
    format!("{root}{namespace}/{}", kind.resource)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_serves_the_operations_of_its_conformance_entry() {
    if !has_etcd() {
        return;
    }
    let server = Server::start_with(&["--disable-admission-plugins=ServiceAccount,StorageObjectInUseProtection"]).await;
    server.namespace(NAMESPACE).await;
    for case in apimachinery::yaml::documents(include_str!("full.yaml")).unwrap() {
        let mut object = case["object"].clone();
        if object["metadata"]["name"].is_null() {
            object["metadata"]["name"] = json!(NAME);
        }
        let kind = kind_of(&object);
        let what = format!("{} {}", kind.api_version(), kind.kind);
        let life = Life { server: &server, kind, what, collection: collection_of(kind) };
        life.live(&object, &case).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_s_generations_and_labels_are_kept_as_kubernetes_keeps_them() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    server.namespace(NAMESPACE).await;
    let template = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "a", "image": "b"}]}});
    let spec = json!({"selector": {"matchLabels": {"a": "b"}}, "template": template});
    let apps = format!("/apis/apps/v1/namespaces/{NAMESPACE}");
    let generation = |object: &Value| object["metadata"]["generation"].as_i64();

    let web = json!({"metadata": {"name": "web"}, "spec": spec, "status": {"replicas": 5}});
    let made = server.post(&format!("{apps}/deployments"), &web).await.unwrap();
    assert_eq!((generation(&made), made["status"].get("replicas")), (Some(1), None), "a status is not made");
    let path = format!("{apps}/deployments/web");
    let annotated = server.merge(&path, &json!({"metadata": {"annotations": {"a": "b"}}})).await.unwrap();
    assert_eq!(generation(&annotated), Some(2), "an annotation is a new generation of a deployment");

    let made = server.post(&format!("{apps}/daemonsets"), &web).await.unwrap();
    let templates =
        |object: &Value| object["metadata"]["annotations"]["deprecated.daemonset.template.generation"].clone();
    assert_eq!(templates(&made), "1");
    let path = format!("{apps}/daemonsets/web");
    let same = server.merge(&path, &json!({"spec": {"minReadySeconds": 1}})).await.unwrap();
    assert_eq!((templates(&same), generation(&same)), (json!("1"), Some(2)));
    let other = json!({"spec": {"template": {"metadata": {"annotations": {"a": "b"}}}}});
    let other = server.merge(&path, &other).await.unwrap();
    assert_eq!((templates(&other), generation(&other)), (json!("2"), Some(3)));

    let jobs = format!("/apis/batch/v1/namespaces/{NAMESPACE}/jobs");
    let pod = json!({"spec": {"restartPolicy": "Never", "containers": [{"name": "a", "image": "b"}]}});
    let job = server.post(&jobs, &json!({"metadata": {"name": "j"}, "spec": {"template": pod}})).await.unwrap();
    let uid = &job["metadata"]["uid"];
    assert_eq!(&job["spec"]["selector"]["matchLabels"]["batch.kubernetes.io/controller-uid"], uid);
    let labels = &job["spec"]["template"]["metadata"]["labels"];
    assert_eq!((&labels["controller-uid"], &labels["batch.kubernetes.io/job-name"]), (uid, &json!("j")));
    let done = json!({"status": {"succeeded": 1, "startTime": "2024-01-01T00:00:00Z", "completionTime": "2024-01-01T00:01:00Z",
        "conditions": [{"type": "Complete", "status": "True"}, {"type": "SuccessCriteriaMet", "status": "True"}]}});
    server.merge(&format!("{jobs}/j/status"), &done).await.unwrap();
    let found = server.get(&format!("{jobs}?fieldSelector=status.successful%3D1")).await.unwrap();
    assert_eq!(found["items"].as_array().unwrap().len(), 1);
    let undone = json!({"status": {"conditions": []}});
    let (code, message) = server.merge(&format!("{jobs}/j/status"), &undone).await.unwrap_err();
    assert!(code == 422 && message.contains("cannot disable the terminal Complete=True condition"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_settled_is_not_changed() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    server.namespace(NAMESPACE).await;
    let core = format!("/api/v1/namespaces/{NAMESPACE}");
    for (kind, value) in [("configmaps", "b"), ("secrets", "Yg==")] {
        let collection = format!("{core}/{kind}");
        let nameless = json!({"metadata": {"name": "n"}, "data": {"": value}});
        assert_eq!(server.post(&collection, &nameless).await.unwrap_err().0, 422, "{kind}");
        server.post(&collection, &json!({"metadata": {"name": "n"}, "data": {"a": value}})).await.unwrap();
        let path = format!("{collection}/n");
        let why = "field is immutable when `immutable` is set";
        for (change, refused) in [
            (json!({"data": {"c": value}}), false),
            (json!({"immutable": true}), false),
            (json!({"data": {"d": value}}), true),
            (json!({"immutable": false}), true),
            (json!({"immutable": null}), true),
            (json!({"metadata": {"labels": {"l": "x"}}}), false),
        ] {
            match server.merge(&path, &change).await {
                Ok(_) => assert!(!refused, "{kind}: {change}"),
                Err((code, message)) => assert!(refused && code == 422 && message.contains(why), "{message}"),
            }
        }
        server.delete(&path, &Value::Null).await.unwrap();
    }
    let classes = "/apis/scheduling.k8s.io/v1/priorityclasses";
    for (name, value) in [("p1", 1), ("p2", 2)] {
        server.post(classes, &json!({"metadata": {"name": name}, "value": value})).await.unwrap();
        let path = format!("{classes}/{name}");
        let described = server.merge(&path, &json!({"description": "d"})).await.unwrap();
        assert_eq!(described["description"], "d");
        for change in [json!({"value": value + 1}), json!({"preemptionPolicy": "Never"})] {
            assert_eq!(server.merge(&path, &change).await.unwrap_err().0, 422);
            let mut put = described.clone();
            put.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            assert_eq!(server.put(&path, &put).await.unwrap_err().0, 422);
        }
    }
    let listed = server.names(classes).await;
    assert!(["p1", "p2"].iter().all(|name| listed.contains(&(*name).to_owned())), "{listed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signing_request_is_approved_and_signed_each_by_its_own_way() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    let requests = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::default();
    let pem = base64(&params.serialize_request(&key).unwrap().pem().unwrap());
    let object = json!({"metadata": {"name": "r"}, "spec": {"request": pem, "signerName": "example.com/signer",
        "usages": ["client auth"], "expirationSeconds": 3600, "username": "somebody else"}});
    let made = server.post(requests, &object).await.unwrap();
    assert_ne!(made["spec"]["username"], "somebody else", "who asks is told by the server");
    let path = format!("{requests}/r");
    let elsewhere = json!({"spec": {"signerName": "example.com/other"}, "metadata": {"labels": {"a": "b"}}});
    let patched = server.merge(&path, &elsewhere).await.unwrap();
    assert_eq!(
        (&patched["spec"], &patched["metadata"]["labels"]["a"]),
        (&made["spec"], &json!("b")),
        "what was asked stays"
    );
    let found = server.get(&format!("{requests}?fieldSelector=spec.signerName%3Dexample.com%2Fsigner")).await.unwrap();
    assert_eq!(found["items"].as_array().unwrap().len(), 1);

    let approved =
        json!({"status": {"conditions": [{"type": "Approved", "status": "True", "reason": "R", "message": "m"}]}});
    let (code, message) = server.merge(&format!("{path}/status"), &approved).await.unwrap_err();
    assert!(code == 422 && message.contains("updates may not add a condition of type \"Approved\""), "{message}");
    let mut with_certificate = approved.clone();
    with_certificate["status"]["certificate"] = json!("eA==");
    let approved = server.merge(&format!("{path}/approval"), &with_certificate).await.unwrap();
    let status = &approved["status"];
    assert!(status["conditions"][0]["lastUpdateTime"].is_string() && status.get("certificate").is_none(), "{approved}");
    assert_eq!(server.get(&format!("{path}/approval")).await.unwrap(), approved);
    let mut denied = approved.clone();
    denied["status"]["conditions"].as_array_mut().unwrap().push(json!({"type": "Denied", "status": "True"}));
    let (code, message) = server.call("PUT", &format!("{path}/approval"), &denied, JSON).await.unwrap_err();
    assert!(code == 422 && message.contains("mutually exclusive"), "{message}");

    let certificate = base64(&params.self_signed(&key).unwrap().pem());
    let mut signed = approved.clone();
    signed["status"]["certificate"] = json!(certificate);
    let signed = server.call("PUT", &format!("{path}/status"), &signed, JSON).await.unwrap();
    assert_eq!(signed["status"]["certificate"], json!(certificate));
    let again = json!({"status": {"certificate": base64("x")}});
    let (code, message) = server.merge(&format!("{path}/status"), &again).await.unwrap_err();
    assert!(code == 422 && message.contains("updates may not modify existing certificate content"), "{message}");
    let row = server.table(&path).await["rows"][0]["cells"].clone();
    assert_eq!((&row[2], &row[4], &row[5]), (&json!("example.com/signer"), &json!("60m"), &json!("Approved,Issued")));
    server.delete(&format!("{requests}?labelSelector=a%3Db"), &Value::Null).await.unwrap();
    assert_eq!(server.get(&path).await.unwrap_err().0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubernetes_own_full_objects_are_understood_and_refused_by_field() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/kubernetes-1.36/objects");
    let Ok(files) = std::fs::read_dir(&directory) else {
        println!("skipped: {} is not there", directory.display());
        return;
    };
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    server.namespace(NAMESPACE).await;
    let mut seen = 0;
    for file in files.map(|file| file.unwrap().path()).filter(|file| file.extension().is_some_and(|e| e == "json")) {
        let mut object: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let (Some(api_version), Some(kind)) = (object["apiVersion"].as_str(), object["kind"].as_str()) else {
            continue;
        };
        let gvk = Gvk::from_api_version(api_version, kind);
        let Some(kind) = facts::kind(&gvk.group, &gvk.version, &gvk.kind).filter(|k| k.is_stored()) else { continue };
        let meta = object["metadata"].as_object_mut().unwrap();
        meta.remove("resourceVersion");
        meta.insert("namespace".to_owned(), json!(if kind.namespaced { NAMESPACE } else { "" }));
        let path = format!("{}?dryRun=All&fieldValidation=Strict", collection_of(kind));
        match server.post(&path, &object).await {
            Ok(_) => {}
            Err((422, message)) => assert!(message.contains("is invalid: "), "{}: {message}", kind.kind),
            Err((403, message)) => assert!(message.contains("is forbidden: "), "{}: {message}", kind.kind),
            Err(error) => panic!("{}: {error:?}", file.display()),
        }
        seen += 1;
    }
    assert!(seen > 40, "{seen}");
}
