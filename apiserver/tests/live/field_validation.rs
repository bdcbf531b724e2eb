//! `fieldValidation` on every way of writing: unknown and duplicate fields of typed objects and of their metadata. After the
//! conformance descriptions "Server side field validation, typed object" and "typed unknown metadata".

use crate::common::{Server, has_etcd};
use http::Request;
use serde_json::{Value, json};

const NAMESPACE: &str = "fields";
const UNKNOWN: &str = r#"unknown field \"spec.unknown\""#;
const DUPLICATE: &str = r#"duplicate field \"spec.replicas\""#;

/// Code, body and warnings.
async fn send(server: &Server, method: &str, path: &str, kind: &str, body: &str) -> (u16, String, Vec<String>) {
    let request = Request::builder().method(method).uri(path).header("content-type", kind);
    let request = request.body(kube::client::Body::from(body.as_bytes().to_vec())).unwrap();
    let response = server.client.send(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let warnings = parts.headers.get_all("warning").iter().map(|w| w.to_str().unwrap().to_owned()).collect();
    let body = body.collect_bytes().await.unwrap();
    (parts.status.as_u16(), String::from_utf8_lossy(&body).into_owned(), warnings)
}

/// A Deployment's text, with more members in its spec and its metadata.
fn deployment(name: &str, spec: &str, metadata: &str) -> String {
    format!(
        r#"{{"apiVersion":"apps/v1","kind":"Deployment","metadata":{{"name":"{name}"{metadata}}},"spec":{{"replicas":1{spec},"selector":{{"matchLabels":{{"a":"b"}}}},"template":{{"metadata":{{"labels":{{"a":"b"}}}},"spec":{{"containers":[{{"name":"a","image":"b"}}]}}}}}}}}"#
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_and_duplicate_fields_are_found_on_every_write() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    server.namespace(NAMESPACE).await;
    let collection = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments");
    let (code, said, _) = send(&server, "POST", &collection, "application/json", &deployment("web", "", "")).await;
    assert_eq!(code, 201, "{said}");
    let path = format!("{collection}/web");
    let yaml = |name: &str| {
        let object: Value = serde_json::from_str(&deployment(name, "", "")).unwrap();
        let text = apimachinery::yaml::to_string(&object).unwrap();
        text.replacen("spec:\n", "spec:\n  unknown: 1\n  replicas: 1\n", 1)
    };
    let twice = r#","unknown":1,"replicas":2"#;
    let (json, yaml_type) = ("application/json", "application/yaml");
    let patch = format!(r#"{{"spec":{{"replicas":2{twice}}}}}"#);
    let operations = r#"[{"op":"add","path":"/spec/unknown","value":1,"op":"add","more":1}]"#.to_owned();
    let both = vec![UNKNOWN, DUPLICATE];
    let of_yaml = vec![UNKNOWN, r#"key \"replicas\" already set in map"#];
    for (method, path, kind, body, refused, told) in [
        ("POST", &collection, json, deployment("NAME", twice, ""), 400, both.clone()),
        ("POST", &collection, yaml_type, yaml("NAME"), 400, of_yaml.clone()),
        ("PUT", &path, json, deployment("web", twice, ""), 400, both.clone()),
        ("PUT", &path, yaml_type, yaml("web"), 400, of_yaml),
        ("PATCH", &path, "application/merge-patch+json", patch.clone(), 422, both.clone()),
        ("PATCH", &path, "application/strategic-merge-patch+json", patch, 422, both.clone()),
        (
            "PATCH",
            &path,
            "application/json-patch+json",
            operations,
            422,
            vec![UNKNOWN, r#"json patch duplicate field \"[0].op\""#, r#"json patch unknown field \"[0].more\""#],
        ),
        (
            "PATCH",
            &path,
            "application/apply-patch+yaml",
            deployment("web", r#","replicas":1"#, ""),
            400,
            vec![r#"key \"replicas\" already set in map"#],
        ),
    ] {
        let what = format!("{method} {kind}");
        let force = if kind.contains("apply") { "&force=true" } else { "" };
        let at = |mode: &str| format!("{path}?fieldManager=m{force}&fieldValidation={mode}");
        let body = |name: &str| body.replace("NAME", &format!("{name}-{}", kind.replace('/', "-")));
        let (code, said, _) = send(&server, method, &at("Strict"), kind, &body("strict")).await;
        assert_eq!(code, refused, "{what}: {said}");
        for text in &told {
            // The value that is shown holds quotes of its own.
            let plain = said.replace(r#"\\\""#, r#"\""#);
            assert!(said.contains(text) || plain.contains(text), "{what}: {text}: {said}");
        }
        for mode in ["Warn", ""] {
            let name = if mode.is_empty() { "none" } else { "warn" };
            let (code, said, warnings) = send(&server, method, &at(mode), kind, &body(name)).await;
            assert!(matches!(code, 200 | 201), "{what}: {said}");
            let all = warnings.join("\n");
            for text in &told {
                assert!(
                    warnings.iter().all(|w| w.starts_with("299 - \"")) && all.contains(text),
                    "{what}: {text}: {all}"
                );
            }
        }
        let (code, said, warnings) = send(&server, method, &at("Ignore"), kind, &body("ignore")).await;
        assert!(matches!(code, 200 | 201) && warnings.is_empty(), "{what}: {said} {warnings:?}");
        let (code, said, _) = send(&server, method, &at("Perhaps"), kind, &body("perhaps")).await;
        assert_eq!(code, 422, "{what}: {said}");
        assert!(said.contains("fieldValidation: Unsupported value"), "{said}");
    }
    // What is unknown is an error to apply in any case.
    let (code, said, _) = send(
        &server,
        "PATCH",
        &format!("{path}?fieldManager=m&fieldValidation=Ignore"),
        "application/apply-patch+yaml",
        &deployment("web", twice, ""),
    )
    .await;
    assert!(code == 500 && said.contains(".spec.unknown: field not declared in schema"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_fields_of_metadata_are_found() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    server.namespace(NAMESPACE).await;
    let collection = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments");
    let strict = format!("{collection}?fieldValidation=Strict");
    let body = deployment("web", "", r#","unknownMeta":"a""#);
    let (code, said, _) = send(&server, "POST", &strict, "application/json", &body).await;
    assert!(code == 400 && said.contains(r#"strict decoding error: unknown field \"metadata.unknownMeta\""#), "{said}");
    let embedded = body
        .replace(r#","unknownMeta":"a""#, "")
        .replace(r#"{"labels":{"a":"b"}}"#, r#"{"labels":{"a":"b"},"unknownMeta":1}"#);
    let (code, said, _) = send(&server, "POST", &strict, "application/json", &embedded).await;
    assert!(code == 400 && said.contains(r#"unknown field \"spec.template.metadata.unknownMeta\""#), "{said}");
    let (code, said, warnings) = send(&server, "POST", &collection, "application/json", &body).await;
    assert!(code == 201 && warnings == [r#"299 - "unknown field \"metadata.unknownMeta\"""#], "{said} {warnings:?}");
    let made: Value = serde_json::from_str(&said).unwrap();
    assert!(made["metadata"]["unknownMeta"].is_null());
    assert_eq!(made["spec"]["replicas"], json!(1));
}
