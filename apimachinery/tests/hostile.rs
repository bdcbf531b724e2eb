//! Hostile input: nothing that comes over the wire makes a decoder panic, or use more than its size warrants.

use apimachinery::decode::{FieldValidation, decode_json, decode_value};
use apimachinery::facts::{self, TypeFacts};
use apimachinery::fields::FieldSelector;
use apimachinery::labels::Selector;
use apimachinery::{patch, quota, yaml};
use proptest::prelude::*;
use serde_json::{Value, json};

const KINDS: [(&str, &str, &str); 4] = [
    ("", "v1", "Pod"),
    ("apps", "v1", "Deployment"),
    ("", "v1", "Secret"),
    ("autoscaling", "v2", "HorizontalPodAutoscaler"),
];

const NAMES: [&str; 37] = [
    "",
    "metadata",
    "spec",
    "status",
    "name",
    "labels",
    "annotations",
    "containers",
    "initContainers",
    "env",
    "ports",
    "containerPort",
    "protocol",
    "template",
    "replicas",
    "finalizers",
    "ownerReferences",
    "uid",
    "data",
    "resources",
    "requests",
    "limits",
    "cpu",
    "$patch",
    "$retainKeys",
    "$setElementOrder/containers",
    "$setElementOrder/env",
    "$deleteFromPrimitiveList/finalizers",
    "kind",
    "apiVersion",
    "op",
    "path",
    "value",
    "from",
    "volumes",
    "mountPath",
    "creationTimestamp",
];

fn schema(at: usize) -> &'static TypeFacts {
    let (group, version, kind) = KINDS[at % KINDS.len()];
    facts::schema_of(group, version, kind).unwrap()
}

/// Names that mean something to objects and patches, and others.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![prop::sample::select(NAMES.to_vec()).prop_map(ToOwned::to_owned), "[a-zA-Z$/~]{0,8}"]
}

/// Values of any shape.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9:/.%~-]{0,12}".prop_map(Value::from),
        ".{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 48, 5, |inner| {
        let members = prop::collection::vec((name(), inner.clone()), 0..5);
        prop_oneof![
            prop::collection::vec(inner, 0..5).prop_map(Value::from),
            members.prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// One operation of a JSON patch, more or less.
fn operation() -> impl Strategy<Value = Value> {
    let part = || prop_oneof![name(), "[0-9]{1,20}", Just("-".to_owned())];
    let path = || {
        let parts = prop::collection::vec(part(), 0..4);
        parts.prop_map(|parts| parts.iter().map(|part| format!("/{part}")).collect::<String>())
    };
    let op = prop::sample::select(vec!["add", "remove", "replace", "move", "copy", "test", "grow"]);
    (op, path(), path(), value())
        .prop_map(|(op, path, from, value)| json!({"op": op, "path": path, "from": from, "value": value}))
}

/// A text with bytes cut out, doubled or changed.
fn damaged(mut text: Vec<u8>, at: usize, how: u8, byte: u8) -> Vec<u8> {
    if text.is_empty() {
        return text;
    }
    let at = at % text.len();
    match how % 4 {
        0 => text.truncate(at),
        1 => text[at] = byte,
        2 => text.insert(at, byte),
        _ => drop(text.remove(at)),
    }
    text
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn any_document_is_decoded_or_refused(document in value(), kind in 0..KINDS.len(), strict in any::<bool>()) {
        let mode = if strict { FieldValidation::Strict } else { FieldValidation::Warn };
        if let Ok(decoded) = decode_json(document.to_string().as_bytes(), schema(kind), mode) {
            // What was decoded once stays as it is.
            let again = decode_value(decoded.value.clone(), schema(kind), mode).unwrap();
            prop_assert_eq!(&again.value, &decoded.value);
        }
        let _ = decode_value(document, schema(kind), mode);
    }

    #[test]
    fn any_damage_to_a_text_is_survived(
        document in value(), at in any::<usize>(), how in any::<u8>(), byte in any::<u8>(), kind in 0..KINDS.len(),
    ) {
        let text = damaged(document.to_string().into_bytes(), at, how, byte);
        let _ = decode_json(&text, schema(kind), FieldValidation::Warn);
        if let Ok(text) = std::str::from_utf8(&text) {
            let _ = yaml::documents(text);
        }
    }

    #[test]
    fn any_yaml_is_read_or_refused(text in "[a-z0-9 :&*<|>{}\\[\\]!%@,'\"?#\n-]{0,80}") {
        let _ = yaml::documents(&text);
    }

    #[test]
    fn any_patch_is_applied_or_refused(
        document in value(), change in value(), operations in prop::collection::vec(operation(), 0..6), kind in 0..KINDS.len(),
    ) {
        let _ = patch::json(&mut document.clone(), &Value::from(operations));
        let _ = patch::json(&mut document.clone(), &change);
        let _ = patch::strategic(&mut document.clone(), &change, Some(schema(kind)));
        let _ = patch::strategic(&mut document.clone(), &change, None);
        let mut merged = document;
        patch::merge(&mut merged, &change);
    }

    #[test]
    fn any_selector_is_read_or_refused(text in "[a-z0-9!=,()<> ./_-]{0,60}", noise in ".{0,40}") {
        for text in [text, noise] {
            if let Ok(selector) = Selector::parse(&text) {
                selector.matches_with(|_| Some("x"));
            }
            if let Ok(selector) = FieldSelector::parse(&text) {
                selector.matches(|_| Some("x"));
            }
        }
    }

    #[test]
    fn anything_can_be_measured(object in value()) {
        let quota = quota::Quota::of(&object);
        let claims = [("", "persistentvolumeclaims"), ("resource.k8s.io", "resourceclaims")];
        for (group, resource) in [("", "pods"), ("", "services")].into_iter().chain(claims) {
            let measured = quota::measure(group, resource, &object, jiff::Timestamp::now());
            let _ = quota.charge((group, resource), &measured, None, false);
        }
    }
}

#[test]
fn a_patch_cannot_double_an_object_for_ever() {
    let mut object = json!({"a": {"b": "x".repeat(1000)}});
    let doubling: Vec<Value> =
        (0..64).map(|n| json!({"op": "copy", "from": "/a", "path": format!("/a/c{n}")})).collect();
    let error = patch::json(&mut object, &Value::from(doubling)).unwrap_err();
    assert!(error.to_string().contains("exceeding the limit"), "{error}");
    assert!(object.to_string().len() < 8 << 20);
}

#[test]
fn yaml_cannot_double_itself_for_ever() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for n in 1..20 {
        let before = format!("*a{}", n - 1);
        text.push_str(&format!("a{n}: &a{n} [{}]\n", vec![before; 9].join(", ")));
    }
    assert!(yaml::documents(&text).is_err());
}

#[test]
fn depth_is_no_danger() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!("{}1{}", open.repeat(200_000), close.repeat(200_000));
        let _ = decode_json(deep.as_bytes(), schema(0), FieldValidation::Warn);
        assert!(yaml::documents(&deep).is_err());
    }
    assert!(yaml::documents(&"- ".repeat(200_000)).is_err());
}
