//! Whatever an object holds, as long as it decodes: no rule panics on it, and defaults settle at once. Objects of every kind
//! are spoiled at random places and taken through all that their kind's strategy does.

use super::builtin::{Builtin, Settings};
use super::print::Clock;
use super::strategy::{Part, Strategy as _};
use apimachinery::decode::{FieldValidation, decode_value};
use apimachinery::facts::{self, KindFacts};
use apimachinery::meta::Gvk;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;

const PARTS: [Part; 6] =
    [Part::Main, Part::Status, Part::Finalize, Part::Approval, Part::EphemeralContainers, Part::Resize];

/// One small object of every kind, and those of Kubernetes with every field set, where they are.
static OBJECTS: LazyLock<Vec<(&'static KindFacts, Value)>> = LazyLock::new(|| {
    let mut all = Vec::new();
    let full = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/kubernetes-1.36/objects");
    for object in apimachinery::yaml::documents(include_str!("../../tests/live/objects.yaml")).unwrap() {
        let gvk = Gvk::from_api_version(object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
        let kind = facts::kind(&gvk.group, &gvk.version, &gvk.kind).unwrap();
        let group = if kind.group.is_empty() { "core" } else { kind.group };
        if let Ok(text) = std::fs::read(full.join(format!("{group}.{}.{}.json", kind.version, kind.kind))) {
            all.push((kind, serde_json::from_slice(&text).unwrap()));
        }
        all.push((kind, object));
    }
    all
});

/// Replaces the `at`-th value of an object, counted in depth.
fn spoil(value: &mut Value, at: &mut usize, with: &Value) -> bool {
    if *at == 0 {
        *value = with.clone();
        return true;
    }
    *at -= 1;
    match value {
        Value::Array(list) => list.iter_mut().any(|item| spoil(item, at, with)),
        Value::Object(map) => map.values_mut().any(|item| spoil(item, at, with)),
        _ => false,
    }
}

fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(size).sum(),
        Value::Object(map) => map.values().map(size).sum(),
        _ => 0,
    }
}

fn stranger() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!("")),
        Just(json!({})),
        Just(json!([])),
        Just(json!([""])),
        Just(json!([{}])),
        Just(json!({"": ""})),
        Just(json!(true)),
        Just(json!(-1)),
        Just(json!(i64::MAX)),
        Just(json!("é/ü%")),
        "[a-z0-9./:%-]{0,12}".prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
    ]
}

fn exercise(kind: &'static KindFacts, object: Value) {
    let Some(schema) = facts::schema_of(kind.group, kind.version, kind.kind) else { return };
    let Ok(decoded) = decode_value(object, schema, FieldValidation::Ignore) else { return };
    let strategy = Builtin::new(kind, Settings::usual());
    let mut object = decoded.value;
    let again = decode_value(object.clone(), schema, FieldValidation::Strict).map(|d| d.value);
    assert_eq!(again.as_ref(), Ok(&object), "decoding settles at once");
    strategy.defaults(&mut object);
    let once = object.clone();
    strategy.defaults(&mut object);
    assert_eq!(object, once, "{}: defaults settle at once", kind.kind);
    strategy.prepare_for_create(&mut object);
    strategy.validate(&object);
    for part in PARTS {
        let mut new = once.clone();
        strategy.prepare_for_update(part, &mut new, &object);
        strategy.validate_update(part, &new, &object);
    }
    strategy.selectable_fields(&object);
    let cells = strategy.row(&object);
    if let Some(columns) = strategy.columns() {
        assert!(cells.is_empty() || cells.len() == columns.len(), "{}", kind.kind);
    }
    strategy.deletion(&object, Some(-1));
    let clock = Clock::now();
    clock.age(&object);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_rule_panics_on_a_spoiled_object(which in any::<prop::sample::Index>(), places in prop::collection::vec((any::<prop::sample::Index>(), stranger()), 0..4)) {
        let (kind, object) = which.get(&OBJECTS);
        let mut object = object.clone();
        for (place, with) in places {
            let mut at = place.index(size(&object));
            spoil(&mut object, &mut at, &with);
        }
        exercise(kind, object);
    }
}
