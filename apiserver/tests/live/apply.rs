//! Server-side apply and field ownership against a real server: over every stored kind, over status and scale, and by kubectl.

use crate::common::{JSON, MERGE, Server, has_etcd, has_kubectl};
use crate::kinds::{collection_path, one_of_each, version_of};
use apimachinery::facts::KindFacts;
use serde_json::{Value, json};

const APPLY: &str = "application/apply-patch+yaml";
const STRATEGIC: &str = "application/strategic-merge-patch+json";
const JSON_PATCH: &str = "application/json-patch+json";
const NAMESPACE: &str = "sweep";

async fn apply(server: &Server, path: &str, query: &str, config: &Value) -> Result<Value, (u16, String)> {
    server.call("PATCH", &format!("{path}?{query}"), config, APPLY).await
}

/// The fields of a manager's entry.
fn entry<'v>(object: &'v Value, manager: &str, operation: &str) -> Option<&'v Value> {
    let entries = object["metadata"]["managedFields"].as_array()?;
    entries.iter().find(|e| e["manager"] == manager && e["operation"] == operation)
}

fn fields(object: &Value, manager: &str, operation: &str) -> Value {
    entry(object, manager, operation).map_or(Value::Null, |entry| entry["fieldsV1"].clone())
}

/// Applied, applied again, patched in three ways; every writer has an entry.
async fn one_kind(server: &Server, kind: &KindFacts, object: &Value) {
    let what = format!("{} {}", kind.api_version(), kind.kind);
    let mut config = object.clone();
    (config["apiVersion"], config["kind"]) = (json!(kind.api_version()), json!(kind.kind));
    config["metadata"]["labels"] = json!({"applied": "yes"});
    let path = format!("{}/{}", collection_path(kind), config["metadata"]["name"].as_str().unwrap());
    let again = apply(server, &path, "fieldManager=one&dryRun=All", &config).await;
    again.unwrap_or_else(|e| panic!("{what}: apply, dry: {e:?}"));
    assert_eq!(server.get(&path).await.unwrap_err().0, 404, "{what}");

    let made =
        apply(server, &path, "fieldManager=one", &config).await.unwrap_or_else(|e| panic!("{what}: apply: {e:?}"));
    let mine = entry(&made, "one", "Apply").unwrap_or_else(|| panic!("{what}: {made}")).clone();
    assert_eq!((&mine["apiVersion"], &mine["fieldsType"]), (&config["apiVersion"], &json!("FieldsV1")), "{what}");
    let again = apply(server, &path, "fieldManager=one", &config).await.unwrap();
    assert_eq!(again, made, "{what}: to apply again changes nothing");

    let label = json!({"metadata": {"labels": {"merged": "yes"}}});
    let merged = server.call("PATCH", &format!("{path}?fieldManager=two"), &label, MERGE).await;
    let merged = merged.unwrap_or_else(|e| panic!("{what}: merge: {e:?}"));
    assert!(fields(&merged, "two", "Update")["f:metadata"]["f:labels"]["f:merged"].is_object(), "{what}: {merged}");
    let annotation = json!({"metadata": {"annotations": {"strategic": "yes"}}});
    let strategic = server.call("PATCH", &format!("{path}?fieldManager=three"), &annotation, STRATEGIC).await;
    let strategic = strategic.unwrap_or_else(|e| panic!("{what}: strategic: {e:?}"));
    assert!(version_of(&strategic) > version_of(&merged), "{what}");
    let operations = json!([{"op": "test", "path": "/metadata/labels/merged", "value": "yes"},
        {"op": "remove", "path": "/metadata/labels/merged"}, {"op": "add", "path": "/metadata/annotations/json", "value": "yes"}]);
    let patched = server.call("PATCH", &format!("{path}?fieldManager=four"), &operations, JSON_PATCH).await;
    let patched = patched.unwrap_or_else(|e| panic!("{what}: JSON patch: {e:?}"));
    let two = fields(&patched, "two", "Update");
    assert!(two["f:metadata"]["f:labels"]["f:merged"].is_null(), "{what}: {two}");
    assert_eq!(fields(&patched, "four", "Update"), json!({"f:metadata": {"f:annotations": {"f:json": {}}}}), "{what}");

    // Nobody else's is taken away by applying, and what is no longer applied goes.
    config["metadata"]["annotations"] = json!({"mine": "1"});
    apply(server, &path, "fieldManager=one", &config).await.unwrap_or_else(|e| panic!("{what}: apply more: {e:?}"));
    config["metadata"].as_object_mut().unwrap().remove("annotations");
    let less =
        apply(server, &path, "fieldManager=one", &config).await.unwrap_or_else(|e| panic!("{what}: less: {e:?}"));
    let annotations = less["metadata"]["annotations"].as_object().unwrap();
    let has = |name: &str| annotations.contains_key(name);
    assert!(has("strategic") && has("json") && !has("mine"), "{what}: {annotations:?}");
    assert_eq!(fields(&less, "one", "Apply"), mine["fieldsV1"], "{what}");

    // Reading and writing back leaves all as it is.
    let put = server.call("PUT", &path, &less, JSON).await.unwrap_or_else(|e| panic!("{what}: put: {e:?}"));
    assert_eq!(put, less, "{what}");
    server.call("DELETE", &path, &json!({"gracePeriodSeconds": 0}), JSON).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_stored_kind_is_applied_and_patched() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    server.namespace(NAMESPACE).await;
    for (kind, object) in one_of_each() {
        one_kind(&server, kind, &object).await;
    }
}

fn deployment(replicas: Option<i64>) -> Value {
    let mut object = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "labels": {"app": "web"}},
        "spec": {"selector": {"matchLabels": {"app": "web"}}, "template": {"metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "web", "image": "nginx:1", "ports": [{"containerPort": 80}]}]}}}});
    if let Some(replicas) = replicas {
        object["spec"]["replicas"] = json!(replicas);
    }
    object
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fields_have_owners() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    server.namespace(NAMESPACE).await;
    let deployments = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments");
    let path = format!("{deployments}/web");

    // A creator owns what is there once defaults are set.
    let made =
        server.call("POST", &format!("{deployments}?fieldManager=creator"), &deployment(None), JSON).await.unwrap();
    assert_eq!(
        fields(&made, "creator", "Update"),
        json!({"f:metadata": {"f:labels": {".": {}, "f:app": {}}}, "f:spec": {"f:progressDeadlineSeconds": {}, "f:replicas": {},
            "f:revisionHistoryLimit": {}, "f:selector": {}, "f:strategy": {"f:rollingUpdate": {".": {}, "f:maxSurge": {},
            "f:maxUnavailable": {}}, "f:type": {}}, "f:template": {"f:metadata": {"f:labels": {".": {}, "f:app": {}}},
            "f:spec": {"f:containers": {"k:{\"name\":\"web\"}": {".": {}, "f:image": {}, "f:imagePullPolicy": {}, "f:name": {},
            "f:ports": {".": {}, "k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}, "f:protocol": {}}},
            "f:resources": {}, "f:terminationMessagePath": {}, "f:terminationMessagePolicy": {}}}, "f:dnsPolicy": {},
            "f:restartPolicy": {}, "f:schedulerName": {}, "f:securityContext": {}, "f:terminationGracePeriodSeconds": {}}}}})
    );

    // The status has owners of its own, and who writes it owns nothing else.
    let status = json!({"metadata": {"labels": {"x": "y"}}, "spec": {"replicas": 9}, "status": {"replicas": 1, "observedGeneration": 1}});
    let patched = server.call("PATCH", &format!("{path}/status?fieldManager=creator"), &status, MERGE).await.unwrap();
    let entries = patched["metadata"]["managedFields"].as_array().unwrap();
    let of_status = entries.iter().find(|e| e["subresource"] == "status").unwrap();
    assert_eq!(of_status["fieldsV1"], json!({"f:status": {"f:observedGeneration": {}, "f:replicas": {}}}));
    assert_eq!(patched["spec"]["replicas"], 1);

    let config = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "labels": {"x": "y"}},
        "spec": {"replicas": 9}, "status": {"readyReplicas": 1}});
    let applied = apply(&server, &format!("{path}/status"), "fieldManager=of-status", &config).await.unwrap();
    assert_eq!(fields(&applied, "of-status", "Apply"), json!({"f:status": {"f:readyReplicas": {}}}));
    assert_eq!((&applied["spec"]["replicas"], &applied["status"]["readyReplicas"]), (&json!(1), &json!(1)));

    // A conflict names field and manager; force takes the field.
    let error = apply(&server, &path, "fieldManager=me", &deployment(Some(3))).await.unwrap_err();
    assert_eq!(
        error,
        (409, r#"Apply failed with 1 conflict: conflict with "creator" using apps/v1: .spec.replicas"#.to_owned())
    );
    let forced = apply(&server, &path, "fieldManager=me&force=true", &deployment(Some(3))).await.unwrap();
    assert!(fields(&forced, "creator", "Update")["f:spec"]["f:replicas"].is_null());
    assert!(fields(&forced, "me", "Apply")["f:spec"]["f:replicas"].is_object());

    // Another who scales takes the replicas, under `scale`.
    let scale = json!({"spec": {"replicas": 5}});
    server.call("PATCH", &format!("{path}/scale?fieldManager=scaler"), &scale, MERGE).await.unwrap();
    let scaled = server.get(&path).await.unwrap();
    let by_scaler = entry(&scaled, "scaler", "Update").unwrap();
    assert_eq!(
        (&by_scaler["fieldsV1"], &by_scaler["subresource"]),
        (&json!({"f:spec": {"f:replicas": {}}}), &json!("scale"))
    );
    let error = apply(&server, &path, "fieldManager=me", &deployment(Some(3))).await.unwrap_err();
    assert!(
        error.1.contains(r#"conflict with "scaler" with subresource "scale" using apps/v1: .spec.replicas"#),
        "{error:?}"
    );
    let config = json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": {"name": "web", "namespace": NAMESPACE}, "spec": {"replicas": 6}});
    let scale_path = format!("{path}/scale");
    assert_eq!(apply(&server, &scale_path, "fieldManager=hpa", &config).await.unwrap_err().0, 409);
    let scaled = apply(&server, &scale_path, "fieldManager=hpa&force=true", &config).await.unwrap();
    assert_eq!((&scaled["kind"], &scaled["spec"]["replicas"]), (&json!("Scale"), &json!(6)));
    let now = server.get(&path).await.unwrap();
    assert_eq!(entry(&now, "hpa", "Apply").unwrap()["subresource"], "scale");
    assert!(entry(&now, "scaler", "Update").is_none());

    // Not applied any more, but another's: it stays. A manager who applies nothing is none.
    let without = apply(&server, &path, "fieldManager=me", &deployment(None)).await.unwrap();
    assert_eq!(without["spec"]["replicas"], 6);
    let nothing = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}});
    let left = apply(&server, &path, "fieldManager=me", &nothing).await.unwrap();
    assert!(entry(&left, "me", "Apply").is_none(), "{left}");
    assert_eq!(left["spec"]["template"]["spec"]["containers"][0]["image"], "nginx:1", "its creator holds it");

    // managedFields can be emptied, and are left alone by who does not know them.
    let mut unaware = left.clone();
    unaware["metadata"].as_object_mut().unwrap().remove("managedFields");
    unaware["metadata"]["labels"]["more"] = json!("1");
    let put = server.call("PUT", &format!("{path}?fieldManager=put"), &unaware, JSON).await.unwrap();
    assert!(entry(&put, "creator", "Update").is_some() && entry(&put, "put", "Update").is_some(), "{put}");
    let reset = json!([{"op": "replace", "path": "/metadata/managedFields", "value": [{}]}]);
    let reset = server.call("PATCH", &path, &reset, JSON_PATCH).await.unwrap();
    assert!(reset["metadata"]["managedFields"].is_null(), "{reset}");
    let error = apply(&server, &path, "fieldManager=me", &deployment(Some(1))).await.unwrap_err();
    assert!(error.1.contains(r#"conflict with "before-first-apply" using apps/v1: .spec.replicas"#), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_applied_is_refused() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    server.namespace(NAMESPACE).await;
    let path = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/web");
    let with = |change: &[(&str, Value)]| {
        let mut object = deployment(None);
        change.iter().for_each(|(at, value)| *object.pointer_mut(at).unwrap() = value.clone());
        object
    };
    for (query, config, code, said) in [
        ("", deployment(None), 422, "fieldManager: Required value: is required for apply patch"),
        ("fieldManager=a%0A", deployment(None), 422, "invalid character"),
        ("fieldManager=m&dryRun=x", deployment(None), 422, "dryRun: Unsupported value"),
        ("fieldManager=m", with(&[("/kind", json!("Pod"))]), 400, "invalid object type: apps/v1, Kind=Pod"),
        (
            "fieldManager=m",
            with(&[("/metadata/name", json!("other"))]),
            400,
            "the name of the object (other) does not match",
        ),
        (
            "fieldManager=m",
            with(&[("/metadata", json!({"name": "web", "managedFields": []}))]),
            400,
            "metadata.managedFields must be nil",
        ),
        (
            "fieldManager=m",
            with(&[("/metadata", json!({"name": "web", "uid": "u"}))]),
            409,
            "uid mismatch: the provided object specified uid u, and no existing object was found",
        ),
        ("fieldManager=m", with(&[("/spec/selector", json!(1))]), 500, "failed to create typed patch object"),
        ("fieldManager=m", with(&[("/spec/selector", Value::Null)]), 422, "spec.selector: Required value"),
    ] {
        let error = apply(&server, &path, query, &config).await.unwrap_err();
        assert!(error.0 == code && error.1.contains(said), "{query} {config}: {error:?}");
    }
    assert_eq!(
        server.call("PATCH", &path, &deployment(None), "application/apply-patch+cbor").await.unwrap_err().0,
        415
    );
    assert_eq!(
        apply(&server, &format!("{path}/status"), "fieldManager=m", &deployment(None)).await.unwrap_err().0,
        404
    );
    let merge = server.call("PATCH", &format!("{path}?force=true"), &json!({}), MERGE).await.unwrap_err();
    assert_eq!(merge.0, 422, "force is for apply");

    // A version that is given must be the newest.
    let made = apply(&server, &path, "fieldManager=m", &deployment(Some(1))).await.unwrap();
    let mut stale = deployment(Some(2));
    stale["metadata"]["resourceVersion"] = json!("1");
    assert_eq!(apply(&server, &path, "fieldManager=m", &stale).await.unwrap_err().0, 409);
    stale["metadata"]["resourceVersion"] = made["metadata"]["resourceVersion"].clone();
    apply(&server, &path, "fieldManager=m", &stale).await.unwrap();
    let mut other = deployment(Some(2));
    other["metadata"]["uid"] = json!("someone-else");
    let error = server.call("PUT", &path, &other, JSON).await.unwrap_err();
    assert!(error.0 == 409 && error.1.contains("UID in precondition: someone-else"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_applies() {
    if !has_etcd() || !has_kubectl() {
        return;
    }
    let server = Server::start().await;
    let manifest = |replicas: i64, image: &str| {
        let mut object = deployment(Some(replicas));
        object["spec"]["template"]["spec"]["containers"][0]["image"] = json!(image);
        apimachinery::yaml::to_string(&object).unwrap()
    };
    let run = |args: &[&str], manifest: &str| {
        let (ok, said) = server.kubectl(args, manifest);
        assert!(ok, "{args:?}: {said}");
        said
    };
    let said = run(&["apply", "--server-side"], &manifest(1, "nginx:1"));
    assert!(said.contains("deployment.apps/web serverside-applied"), "{said}");
    run(&["apply", "--server-side"], &manifest(2, "nginx:1"));
    run(&["scale", "deployment/web", "--replicas=4"], "");
    let (ok, said) = server.kubectl(&["apply", "--server-side"], &manifest(2, "nginx:1"));
    assert!(!ok && said.contains("Apply failed with 1 conflict: conflict with \"kubectl\" with subresource \"scale\" using apps/v1: .spec.replicas"), "{said}");
    run(&["apply", "--server-side", "--force-conflicts"], &manifest(3, "nginx:2"));
    let said = run(
        &[
            "get",
            "deployment",
            "web",
            "--show-managed-fields",
            "-o",
            "jsonpath={.metadata.managedFields[*].manager}/{.spec.replicas}",
        ],
        "",
    );
    assert_eq!(said, "kubectl/3");
    let said = run(
        &["apply", "--server-side", "--dry-run=server", "-o", "jsonpath={.spec.replicas}"],
        &manifest(7, "nginx:2"),
    );
    assert_eq!(said, "7");

    // From client-side apply to server-side apply, without a conflict.
    let config = |value: &str, more: &str| {
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: c}}\ndata: {{k: {value}{more}}}\n")
    };
    run(&["apply"], &config("a", ", l: m"));
    run(&["apply"], &config("b", ", l: m"));
    run(&["apply", "--server-side"], &config("c", ""));
    let said = run(&["get", "configmap", "c", "-o", "jsonpath={.data}"], "");
    assert_eq!(said, r#"{"k":"c"}"#);
    let (ok, said) = server.kubectl(
        &["apply", "--server-side", "--validate=false"],
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\nbogus: 1\n",
    );
    assert!(!ok && said.contains(".bogus: field not declared in schema"), "{said}");
    let (ok, said) = server.kubectl(&["create"], "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: d}\nbogus: 1\n");
    assert!(!ok && said.contains("strict decoding error: unknown field \"bogus\""), "{said}");
    run(&["label", "configmap", "c", "a=b"], "");
    run(&["patch", "configmap", "c", "--type=json", "-p", r#"[{"op":"add","path":"/data/x","value":"y"}]"#], "");
    run(&["delete", "deployment/web", "configmap/c", "--wait=false"], "");
}
