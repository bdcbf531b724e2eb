//! What is refused, in whose words, and what is kept.

use super::*;
use crate::facts::{kinds, offered, schema_of};
use serde_json::json;

fn deployment() -> &'static TypeFacts {
    schema("apps.v1.Deployment").unwrap()
}

fn pod() -> &'static TypeFacts {
    schema("core.v1.Pod").unwrap()
}

fn error(facts: &'static TypeFacts, text: &str) -> String {
    decode_json(text.as_bytes(), facts, FieldValidation::Strict).unwrap_err().to_string()
}

#[test]
fn wrong_types_are_refused_in_go_s_words() {
    let cases = [
        (
            r#"{"spec":{"replicas":"three"}}"#,
            "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (
            r#"{"spec":{"replicas":1.5}}"#,
            "json: cannot unmarshal number 1.5 into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
        (
            r#"{"spec":{"template":{"spec":{"containers":[{"image":1}]}}}}"#,
            "json: cannot unmarshal number into Go struct field Container.spec.template.spec.containers.image of type string",
        ),
        (
            r#"{"spec":{"template":{"spec":{"containers":{}}}}}"#,
            "json: cannot unmarshal object into Go struct field PodSpec.spec.template.spec.containers of type []v1.Container",
        ),
        (
            r#"{"spec":[]}"#,
            "json: cannot unmarshal array into Go struct field Deployment.spec of type v1.DeploymentSpec",
        ),
        (
            r#"{"metadata":{"labels":{"a":true}}}"#,
            "json: cannot unmarshal bool into Go struct field ObjectMeta.metadata.labels.a of type string",
        ),
        (r#"[]"#, "json: cannot unmarshal array into Go value of type v1.Deployment"),
        (
            r#"{"spec":{"replicas":3000000000}}"#,
            "json: cannot unmarshal number 3000000000 into Go struct field DeploymentSpec.spec.replicas of type int32",
        ),
    ];
    for (text, message) in cases {
        assert_eq!(error(deployment(), text), message, "{text}");
    }
}

#[test]
fn unknown_and_duplicate_fields_are_errors_warnings_or_nothing() {
    let text =
        r#"{"spec":{"foo":{"x":[1]},"replicas":1,"replicas":2,"template":{"spec":{"containers":[{"nam":"a"}]}}}}"#;
    let found = vec![
        r#"unknown field "spec.foo""#.to_owned(),
        r#"duplicate field "spec.replicas""#.to_owned(),
        r#"unknown field "spec.template.spec.containers[0].nam""#.to_owned(),
    ];
    assert_eq!(error(deployment(), text), format!("strict decoding error: {}", found.join(", ")));
    let warned = decode_json(text.as_bytes(), deployment(), FieldValidation::Warn).unwrap();
    assert_eq!(warned.warnings, found);
    assert_eq!(warned.value, json!({"spec": {"replicas": 2, "template": {"spec": {"containers": [{}]}}}}));
    let ignored = decode_json(text.as_bytes(), deployment(), FieldValidation::Ignore).unwrap();
    assert!(ignored.warnings.is_empty());
}

#[test]
fn nulls_and_empty_lists_go_and_values_become_canonical() {
    let text = r#"{"metadata":{"creationTimestamp":null,"labels":{"a":null},"annotations":{},"deletionTimestamp":"2024-01-02T03:04:05.123+01:00"},
        "spec":{"tolerations":[],"volumes":[{"name":"v","emptyDir":{}}],"containers":[{"name":"a","command":["x",null],
        "resources":{"limits":{"cpu":"1000m","memory":1024}}}]}}"#;
    let decoded = decode_json(text.as_bytes(), pod(), FieldValidation::Strict).unwrap();
    let expected = json!({
        "metadata": {"labels": {"a": ""}, "deletionTimestamp": "2024-01-02T02:04:05Z"},
        "spec": {"volumes": [{"name": "v", "emptyDir": {}}], "containers": [{"name": "a", "command": ["x", ""],
            "resources": {"limits": {"cpu": "1", "memory": "1024"}}}]},
    });
    assert_eq!(decoded.value, expected);
}

#[test]
fn values_with_a_grammar_are_checked() {
    let secret = schema("core.v1.Secret").unwrap();
    assert_eq!(error(secret, r#"{"data":{"a":"!"}}"#), "illegal base64 data at input byte 0");
    assert!(error(pod(), r#"{"metadata":{"creationTimestamp":"soon"}}"#).starts_with("parsing time \"soon\""));
    assert!(error(pod(), r#"{"spec":{"overhead":{"cpu":"lots"}}}"#).starts_with("quantities must match"));
    assert!(matches!(decode_json(b"{", pod(), FieldValidation::Warn), Err(DecodeError::Syntax(_))));
    let deep = "[".repeat(5000);
    assert!(decode_json(deep.as_bytes(), pod(), FieldValidation::Warn).is_err());
}

#[test]
fn a_message_names_kind_and_version() {
    let error = DecodeError::Strict(vec!["unknown field \"spec.foo\"".into()]);
    assert_eq!(
        error.message("v1", "Deployment"),
        "Deployment in version \"v1\" cannot be handled as a Deployment: strict decoding error: unknown field \"spec.foo\""
    );
}

#[test]
fn every_full_object_decodes_without_a_stranger() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/kubernetes-1.36/objects");
    if !root.is_dir() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing", root.display());
        println!("skipped: {} is missing", root.display());
        return;
    }
    let mut seen = 0;
    for kind in kinds().iter().chain(offered()) {
        let group = if kind.group.is_empty() { "core" } else { kind.group };
        let path = root.join(format!("{group}.{}.{}.json", kind.version, kind.kind));
        let (Ok(text), Some(facts)) = (std::fs::read(&path), schema_of(kind.group, kind.version, kind.kind)) else {
            println!("no object of {group}/{} {}", kind.version, kind.kind);
            continue;
        };
        seen += 1;
        let decoded =
            decode_json(&text, facts, FieldValidation::Strict).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let again = decode_value(decoded.value.clone(), facts, FieldValidation::Strict).unwrap();
        assert_eq!(decoded.value, again.value, "decoding is idempotent: {}", kind.kind);
    }
    assert!(seen > 60, "{seen}");
}

#[test]
fn what_is_sent_keeps_managed_fields_as_text() {
    let pod = crate::facts::schema("core.v1.Pod").unwrap();
    let text = br#"{"metadata":{"name":"a","managedFields":[{"manager":"m","fieldsV1":{"f:a":{}}}]},"spec":{"containers":[{"name":"c","name":"d","x":1}]}}"#;
    let sent = decode_sent(text, pod, FieldValidation::Warn).unwrap();
    assert_eq!(sent.value["metadata"]["managedFields"], r#"[{"manager":"m","fieldsV1":{"f:a":{}}}]"#);
    assert_eq!(
        sent.warnings,
        [r#"duplicate field "spec.containers[0].name""#, r#"unknown field "spec.containers[0].x""#]
    );
    let yaml =
        decode_yaml("metadata: {name: a}\nspec:\n  nodeName: a\n  nodeName: b\n  x: 1\n", pod, FieldValidation::Strict);
    assert_eq!(
        yaml.unwrap_err().to_string(),
        "strict decoding error: yaml: unmarshal errors:\n  line 4: key \"nodeName\" already set in map, unknown field \"spec.x\""
    );
    let (value, told) = parse_noting_duplicates(br#"{"a":{"b":1,"b":2},"c":[{"d":1,"d":2}]}"#).unwrap();
    assert_eq!(
        (value["a"]["b"].as_i64(), told),
        (Some(2), vec![r#"duplicate field "a.b""#.into(), r#"duplicate field "c[0].d""#.into()])
    );
}

#[test]
fn what_a_patch_changed_is_decoded_as_if_all_were() {
    let text = r#"{"metadata":{"labels":{"a":"b"},"finalizers":["x/y"]},"spec":{"replicas":1,"strategy":{"type":"Recreate"},
        "template":{"spec":{"containers":[{"name":"a","resources":{"limits":{"cpu":"1"}}}]}}}}"#;
    let object = decode_json(text.as_bytes(), deployment(), FieldValidation::Strict).unwrap().value;
    for patch in [
        json!({}),
        json!({"bogus": 1, "spec": {"bogus": 2}}),
        json!({"metadata": {"labels": {"a": null}}}),
        json!({"metadata": {"labels": null, "$deleteFromPrimitiveList/finalizers": ["x/y"]}}),
        json!({"spec": {"replicas": "x"}}),
        json!({"spec": {"replicas": null, "strategy": {"type": null}}}),
        json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}),
        json!({"spec": {"template": {"spec": {"containers": [{"name": "a", "resources": {"limits": {"cpu": "1000m"}}}]}}}}),
        json!({"spec": {"template": {"spec": {"containers": [], "$setElementOrder/containers": []}, "metadata": {"creationTimestamp": null}}}}),
        json!({"spec": []}),
    ] {
        let mut patched = object.clone();
        if crate::patch::strategic(&mut patched, &patch, Some(deployment())).is_err() {
            continue;
        }
        let whole = decode_value(patched.clone(), deployment(), FieldValidation::Warn);
        let part = decode_patched(patched, patch.as_object().unwrap(), deployment(), FieldValidation::Warn);
        assert_eq!(part, whole, "{patch}");
    }
}
