//! What a client may read and send: Kubernetes protobuf, YAML, tables, metadata alone, compressed lists, several versions of
//! one object.

use crate::common::{JSON, Server, has_etcd};
use apimachinery::decode::{FieldValidation, decode_value};
use apimachinery::facts;
use apimachinery::meta::split_api_version;
use apimachinery::protobuf;
use serde_json::{Value, json};
use std::io::Read as _;

const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io";
const METADATA: &str = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";
const METADATA_LIST: &str = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";

fn encode(object: &Value) -> Vec<u8> {
    let (api_version, kind) = (object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
    let (group, version) = split_api_version(api_version);
    let schema = facts::schema_of(group, version, kind).unwrap();
    protobuf::enclose(api_version, kind, &protobuf::encode(object, schema))
}

fn decode(bytes: &[u8]) -> Value {
    let envelope = protobuf::envelope(bytes).unwrap();
    let (group, version) = split_api_version(envelope.api_version);
    let schema = facts::schema_of(group, version, envelope.kind).unwrap_or_else(|| panic!("{envelope:?}"));
    let value = protobuf::decode(&envelope, schema).unwrap();
    decode_value(value, schema, FieldValidation::Ignore).unwrap().value
}

/// Sends an object as protobuf and reads the answer so.
async fn call(server: &Server, method: &str, path: &str, object: &Value) -> (u16, Value) {
    let body = if object.is_null() { Vec::new() } else { encode(object) };
    let headers = [("content-type", PROTOBUF), ("accept", PROTOBUF)];
    let (code, headers, body) = server.raw(method, path, &headers, body).await;
    assert_eq!(headers["content-type"], PROTOBUF, "{method} {path}: {}", String::from_utf8_lossy(&body));
    (code, decode(&body))
}

async fn ask(server: &Server, path: &str, accept: &str) -> (u16, Value) {
    let (code, _, body) = server.raw("GET", path, &[("accept", accept)], Vec::new()).await;
    (code, serde_json::from_slice(&body).unwrap_or_default())
}

fn config_map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"a": "b"}}, "data": {"k": "v"},
        "binaryData": {"b": "AAE="}})
}

/// The events of a watch that ends by itself.
fn events(mut stream: &[u8]) -> Vec<(String, Value)> {
    let schema = facts::schema("meta.v1.WatchEvent").unwrap();
    let mut events = Vec::new();
    while let Some((length, rest)) = stream.split_first_chunk::<4>() {
        let (frame, rest) = rest.split_at(u32::from_be_bytes(*length) as usize);
        let event = protobuf::Envelope { api_version: "", kind: "", raw: frame };
        let event = protobuf::decode(&event, schema).unwrap();
        events.push((event["type"].as_str().unwrap().to_owned(), event["object"].clone()));
        stream = rest;
    }
    events
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protobuf_goes_in_and_out() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    let path = "/api/v1/namespaces/default/configmaps";
    let (code, made) = call(&server, "POST", path, &config_map("a")).await;
    assert_eq!((code, &made["data"], &made["binaryData"]), (201, &json!({"k": "v"}), &json!({"b": "AAE="})));
    let named = format!("{path}/a");
    assert_eq!(call(&server, "GET", &named, &Value::Null).await, (200, made.clone()));
    assert_eq!(server.get(&named).await.unwrap(), made, "the same in JSON");
    let mut changed = made.clone();
    changed["data"]["k"] = "w".into();
    let (code, changed) = call(&server, "PUT", &named, &changed).await;
    assert_eq!((code, &changed["data"]["k"]), (200, &json!("w")));
    call(&server, "POST", path, &config_map("b")).await;

    let (_, list) = call(&server, "GET", &format!("{path}?labelSelector=a%3Db"), &Value::Null).await;
    assert_eq!((&list["kind"], list["items"].as_array().unwrap().len()), (&json!("ConfigMapList"), 2));
    assert_eq!(list["items"][0]["data"], changed["data"]);
    let (_, page) = call(&server, "GET", &format!("{path}?labelSelector=a&limit=1"), &Value::Null).await;
    assert!(page["metadata"]["continue"].is_string(), "{page}");

    let (code, status) = call(&server, "GET", &format!("{path}/none"), &Value::Null).await;
    assert_eq!((code, &status["kind"], &status["reason"]), (404, &json!("Status"), &json!("NotFound")));
    let (code, status) = call(&server, "PUT", &named, &made).await;
    assert_eq!((code, &status["reason"]), (409, &json!("Conflict")));

    let options = json!({"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": "other"}});
    assert_eq!(call(&server, "DELETE", &named, &options).await.0, 409);
    let options = json!({"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0});
    assert_eq!(call(&server, "DELETE", &named, &options).await.0, 200);

    let version = list["metadata"]["resourceVersion"].as_str().unwrap();
    let watch = format!("{path}?watch=1&timeoutSeconds=1&resourceVersion={version}&allowWatchBookmarks=true");
    let (code, headers, body) =
        server.raw("GET", &watch, &[("accept", "application/vnd.kubernetes.protobuf;stream=watch")], vec![]).await;
    assert_eq!(
        (code, headers["content-type"].to_str().unwrap()),
        (200, "application/vnd.kubernetes.protobuf;stream=watch")
    );
    let seen = events(&body);
    assert_eq!((seen[0].0.as_str(), &seen[0].1["metadata"]["name"]), ("DELETED", &json!("a")), "{seen:?}");
    let initial = format!("{path}?watch=1&timeoutSeconds=1&labelSelector=a");
    let (_, _, body) = server.raw("GET", &initial, &[("accept", PROTOBUF)], vec![]).await;
    assert_eq!((events(&body)[0].0.as_str(), &events(&body)[0].1["data"]["k"]), ("ADDED", &json!("v")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reviews_and_subresources_speak_protobuf() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "metadata": {},
        "spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}}});
    let (code, answer) = call(&server, "POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &review).await;
    assert_eq!((code, &answer["status"]["allowed"]), (201, &json!(true)));
    let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": {"replicas": 0,
        "selector": {"matchLabels": {"a": "b"}}, "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": "10%"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i",
            "resources": {"limits": {"cpu": "100m"}}, "ports": [{"containerPort": 80}]}]}}}});
    let path = "/apis/apps/v1/namespaces/default/deployments";
    let (code, made) = call(&server, "POST", path, &deployment).await;
    assert_eq!((code, &made["spec"]["replicas"]), (201, &json!(0)), "zero is not nothing: {made}");
    assert_eq!(made["spec"]["strategy"]["rollingUpdate"], json!({"maxUnavailable": 0, "maxSurge": "10%"}));
    let (_, scale) = call(&server, "GET", &format!("{path}/d/scale"), &Value::Null).await;
    assert_eq!(scale["kind"], "Scale");
    let wanted = json!({"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": {"name": "d", "namespace": "default"}, "spec": {"replicas": 3}});
    assert_eq!(call(&server, "PUT", &format!("{path}/d/scale"), &wanted).await.1["spec"]["replicas"], 3);

    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let pods = "/api/v1/namespaces/default/pods";
    call(&server, "POST", pods, &pod).await;
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n"}});
    assert_eq!(call(&server, "POST", &format!("{pods}/p/binding"), &binding).await.0, 201);
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "p", "namespace": "default"},
        "deleteOptions": {"gracePeriodSeconds": 0}});
    assert_eq!(call(&server, "POST", &format!("{pods}/p/eviction"), &eviction).await.0, 201);
    let accept = format!("{PROTOBUF};as=PartialObjectMetadataList;g=meta.k8s.io;v=v1");
    let (code, headers, body) = server.raw("GET", path, &[("accept", &accept)], vec![]).await;
    assert_eq!((code, headers["content-type"].to_str().unwrap()), (200, PROTOBUF));
    let list = decode(&body);
    assert_eq!(
        (&list["kind"], &list["items"][0]["metadata"]["name"]),
        (&json!("PartialObjectMetadataList"), &json!("d"))
    );
    assert!(list["items"][0].get("spec").is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_is_listed_in_every_form() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    for kind in facts::kinds().iter().filter(|kind| kind.has_verb("list")) {
        let root =
            if kind.group.is_empty() { "/api/v1".to_owned() } else { format!("/apis/{}/{}", kind.group, kind.version) };
        let path = format!("{root}/{}", kind.resource);
        let (code, list) = call(&server, "GET", &path, &Value::Null).await;
        assert_eq!((code, list["kind"].as_str().unwrap()), (200, format!("{}List", kind.kind).as_str()), "{path}");
        assert_eq!(list["apiVersion"], kind.api_version(), "{path}");
        let json = server.get(&path).await.unwrap();
        let (ours, theirs) = (list["items"].as_array().map_or(0, Vec::len), json["items"].as_array().unwrap().len());
        assert_eq!(ours, theirs, "{path}: as many in protobuf as in JSON");

        let (code, table) = ask(&server, &path, TABLE).await;
        assert_eq!((code, &table["kind"]), (200, &json!("Table")), "{path}");
        let columns = table["columnDefinitions"].as_array().unwrap();
        if let Some(known) = facts::columns(kind.group, kind.kind) {
            let names: Vec<&str> = columns.iter().map(|c| c["name"].as_str().unwrap()).collect();
            assert_eq!(names, known.iter().map(|c| c.name).collect::<Vec<_>>(), "{path}");
        }
        for row in table["rows"].as_array().unwrap() {
            assert_eq!(row["cells"].as_array().unwrap().len(), columns.len(), "{path}: {row}");
            assert_eq!(row["object"]["kind"], "PartialObjectMetadata", "{path}");
        }
        let (code, list) = ask(&server, &path, METADATA_LIST).await;
        assert_eq!((code, &list["kind"]), (200, &json!("PartialObjectMetadataList")), "{path}");
        let (code, _, yaml) = server.raw("GET", &path, &[("accept", "application/yaml")], vec![]).await;
        let documents = apimachinery::yaml::documents(std::str::from_utf8(&yaml).unwrap()).unwrap();
        assert_eq!(
            (code, documents[0]["kind"].as_str().unwrap()),
            (200, format!("{}List", kind.kind).as_str()),
            "{path}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_and_metadata_have_what_was_asked_for() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    let path = "/api/v1/namespaces/default/configmaps";
    let yaml = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {k: v}\n";
    let (code, headers, body) = server
        .raw("POST", path, &[("content-type", "application/yaml"), ("accept", "application/yaml")], yaml.into())
        .await;
    assert_eq!((code, headers["content-type"].to_str().unwrap()), (201, "application/yaml"));
    assert!(String::from_utf8(body).unwrap().contains("k: v"));
    let (code, _, body) = server.raw("POST", path, &[("content-type", "text/html")], yaml.into()).await;
    let status: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((code, &status["reason"]), (415, &json!("UnsupportedMediaType")), "{status}");

    let named = format!("{path}/a");
    for (include, kind) in
        [("None", Value::Null), ("Metadata", json!("PartialObjectMetadata")), ("Object", json!("ConfigMap"))]
    {
        let (_, table) = ask(&server, &format!("{named}?includeObject={include}"), TABLE).await;
        assert_eq!(table["rows"][0]["object"]["kind"], kind, "{include}: {table}");
        assert_eq!((&table["rows"][0]["cells"][0], &table["rows"][0]["cells"][1]), (&json!("a"), &json!(1)));
    }
    let beta = "application/json;as=Table;v=v1beta1;g=meta.k8s.io";
    assert_eq!(ask(&server, &named, beta).await.1["apiVersion"], "meta.k8s.io/v1beta1");
    let (_, metadata) = ask(&server, &named, METADATA).await;
    assert_eq!((&metadata["kind"], &metadata["metadata"]["name"]), (&json!("PartialObjectMetadata"), &json!("a")));
    assert!(metadata.get("data").is_none());
    for (path, accept, code) in [
        (path, METADATA, 406),
        (&named, METADATA_LIST, 406),
        (&named, "text/html", 406),
        (&named, "application/json;as=Table;v=v9;g=meta.k8s.io", 406),
        (&format!("{path}/none"), TABLE, 404),
    ] {
        let (got, status) = ask(&server, path, accept).await;
        assert_eq!((got, &status["kind"]), (code, &json!("Status")), "{path} {accept}: {status}");
    }
    assert_eq!(ask(&server, &format!("{path}?watch=1"), "application/yaml").await.0, 406, "YAML has no stream");
    for (accept, kind) in [(TABLE, "Table"), (METADATA, "PartialObjectMetadata")] {
        let watch = format!("{path}?watch=1&timeoutSeconds=1&fieldSelector=metadata.name%3Da");
        let (_, _, body) = server.raw("GET", &watch, &[("accept", accept)], vec![]).await;
        let event: Value = serde_json::from_slice(body.split(|b| *b == b'\n').next().unwrap()).unwrap();
        assert_eq!((&event["type"], &event["object"]["kind"]), (&json!("ADDED"), &json!(kind)));
    }
}

/// Conformance: "should return a 406 for a backend which does not implement metadata", and the tables of the same suite.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_table_is_not_acceptable() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": {"nonResourceAttributes": {"path": "/", "verb": "get"}}});
    let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    let headers = [("accept", TABLE), ("content-type", JSON)];
    let (code, _, body) = server.raw("POST", path, &headers, review.to_string().into()).await;
    assert_eq!(code, 406, "{}", String::from_utf8_lossy(&body));

    let template = |n: usize| json!({"metadata": {"name": format!("t{n:02}")}, "template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}});
    for n in 0..20 {
        server.post("/api/v1/namespaces/default/podtemplates", &template(n)).await.unwrap();
    }
    let first = server.table("/api/v1/namespaces/default/podtemplates?limit=10").await;
    assert_eq!(first["rows"].as_array().unwrap().len(), 10);
    let token = first["metadata"]["continue"].as_str().unwrap();
    let rest = server.table(&format!("/api/v1/namespaces/default/podtemplates?limit=10&continue={token}")).await;
    assert_eq!((rest["rows"].as_array().unwrap().len(), &rest["metadata"]["continue"]), (10, &Value::Null));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn big_answers_are_compressed_for_who_asks() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    let path = "/api/v1/namespaces/default/configmaps";
    let mut version = String::new();
    for n in 0..3 {
        let mut object = config_map(&format!("big-{n}"));
        object["data"]["k"] = "x".repeat(60_000).into();
        let created = server.post(path, &object).await.unwrap();
        version = created["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    }
    for accept in [JSON, PROTOBUF, "application/yaml"] {
        // One state of the list: the server writes objects of its own meanwhile.
        let selected = format!("{path}?labelSelector=a&resourceVersion={version}&resourceVersionMatch=Exact");
        let headers = [("accept", accept), ("accept-encoding", "gzip")];
        let (_, headers, packed) = server.raw("GET", &selected, &headers, vec![]).await;
        assert_eq!(headers["content-encoding"], "gzip", "{accept}");
        let mut unpacked = Vec::new();
        flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut unpacked).unwrap();
        let (_, plain_headers, plain) = server.raw("GET", &selected, &[("accept", accept)], vec![]).await;
        assert!(plain_headers.get("content-encoding").is_none());
        assert_eq!(unpacked, plain, "{accept}");
        assert!(packed.len() < plain.len() / 10, "{accept}");
    }
    let (_, headers, _) = server.raw("GET", &format!("{path}/big-0"), &[("accept-encoding", "gzip")], vec![]).await;
    assert!(headers.get("content-encoding").is_none(), "what is small is not");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_object_is_served_in_several_versions() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    let of = |version: &str| format!("/apis/autoscaling/{version}/namespaces/default/horizontalpodautoscalers");
    let metrics = json!([
        {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 60}}},
        {"type": "Pods", "pods": {"metric": {"name": "m"}, "target": {"type": "AverageValue", "averageValue": "5"}}},
    ]);
    let target = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "d"});
    let spec = json!({"scaleTargetRef": target, "minReplicas": 2, "maxReplicas": 5, "metrics": metrics});
    server.post(&of("v2"), &json!({"metadata": {"name": "h"}, "spec": spec})).await.unwrap();
    let v1 = server.get(&format!("{}/h", of("v1"))).await.unwrap();
    assert_eq!(
        (&v1["apiVersion"], &v1["spec"]["targetCPUUtilizationPercentage"]),
        (&json!("autoscaling/v1"), &json!(60))
    );
    let annotation = v1["metadata"]["annotations"]["autoscaling.alpha.kubernetes.io/metrics"].as_str().unwrap();
    assert_eq!(serde_json::from_str::<Value>(annotation).unwrap()[0]["type"], "Pods");
    // Written back in v1, nothing of v2 is lost.
    let mut changed = v1.clone();
    changed["spec"]["maxReplicas"] = 9.into();
    server.call("PUT", &format!("{}/h", of("v1")), &changed, JSON).await.unwrap();
    let v2 = server.get(&format!("{}/h", of("v2"))).await.unwrap();
    assert_eq!((&v2["spec"]["maxReplicas"], &v2["spec"]["metrics"]), (&json!(9), &metrics), "{v2}");
    let (_, pb) = call(&server, "GET", &format!("{}/h", of("v1")), &Value::Null).await;
    assert_eq!(pb["spec"]["targetCPUUtilizationPercentage"], 60);
    let (_, pb) = call(&server, "GET", &of("v1"), &Value::Null).await;
    assert_eq!((&pb["apiVersion"], &pb["items"][0]["spec"]["maxReplicas"]), (&json!("autoscaling/v1"), &json!(9)));

    let event = json!({"metadata": {"name": "e"}, "eventTime": "2024-01-01T00:00:00.000000Z", "reportingController": "a.b/c",
        "reportingInstance": "i", "action": "a", "reason": "r", "type": "Normal", "note": "n",
        "regarding": {"kind": "Pod", "name": "p", "namespace": "default"}});
    server.post("/apis/events.k8s.io/v1/namespaces/default/events", &event).await.unwrap();
    let core = server.get("/api/v1/namespaces/default/events/e").await.unwrap();
    assert_eq!(
        (&core["message"], &core["involvedObject"]["name"], &core["reportingComponent"]),
        (&json!("n"), &json!("p"), &json!("a.b/c"))
    );
    let (_, pb) = call(&server, "GET", "/apis/events.k8s.io/v1/namespaces/default/events/e", &Value::Null).await;
    assert_eq!((&pb["note"], &pb["eventTime"]), (&json!("n"), &json!("2024-01-01T00:00:00.000000Z")));
}
