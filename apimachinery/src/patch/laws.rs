//! Laws of patches, over documents that chance makes.

use super::*;
use crate::facts;
use proptest::prelude::*;
use serde_json::{Map, json};

/// Any JSON, small; keys are few, so that documents meet.
fn document() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0..3).prop_map(Value::from),
        "[a-b]".prop_map(Value::from)
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a-c]", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            Value::Object(map.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k, without_nulls(v))).collect())
        }
        other => other,
    }
}

/// A merge patch from one document to another.
fn difference(from: &Value, to: &Value) -> Value {
    match (from, to) {
        (Value::Object(from), Value::Object(to)) => {
            let mut patch = Map::new();
            for (key, value) in to {
                match from.get(key) {
                    Some(was) if was == value => {}
                    Some(was) => _ = patch.insert(key.clone(), difference(was, value)),
                    None => _ = patch.insert(key.clone(), value.clone()),
                }
            }
            patch.extend(from.keys().filter(|key| !to.contains_key(*key)).map(|key| (key.clone(), Value::Null)));
            Value::Object(patch)
        }
        _ => to.clone(),
    }
}

fn containers() -> impl Strategy<Value = Value> {
    prop::collection::btree_map("[a-d]", prop::option::of("[x-z]"), 0..4).prop_map(|map| {
        let one = |(name, image): (String, Option<String>)| match image {
            Some(image) => json!({"name": name, "image": image}),
            None => json!({"name": name}),
        };
        map.into_iter().map(one).collect::<Vec<_>>().into()
    })
}

fn pod(containers: &Value, finalizers: &std::collections::BTreeSet<String>) -> Value {
    json!({"metadata": {"finalizers": finalizers}, "spec": {"containers": containers}})
}

fn merged(target: &Value, patch: &Value) -> Value {
    let mut target = target.clone();
    strategic(&mut target, patch, facts::schema("core.v1.Pod")).unwrap();
    target
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_merge_patch_twice_is_a_merge_patch_once(target in document(), patch in document()) {
        let mut once = target;
        merge(&mut once, &patch);
        let mut twice = once.clone();
        merge(&mut twice, &patch);
        prop_assert_eq!(once, twice);
    }

    #[test]
    fn a_merge_patch_leads_from_any_document_to_any_other(a in document(), b in document()) {
        let (a, b) = (without_nulls(a), without_nulls(b));
        let mut target = a.clone();
        merge(&mut target, &difference(&a, &b));
        prop_assert_eq!(target, b);
    }

    #[test]
    fn a_json_patch_that_tests_the_whole_changes_nothing(target in document(), other in document()) {
        let mut tested = target.clone();
        let result = json(&mut tested, &json!([{"op": "test", "path": "", "value": other}]));
        prop_assert_eq!(result.is_ok(), target == other);
        prop_assert_eq!(&tested, &target);
        let replaced = json(&mut tested, &json!([{"op": "replace", "path": "", "value": other}]));
        prop_assert!(replaced.is_ok());
        prop_assert_eq!(tested, other);
    }

    #[test]
    fn no_patch_panics(target in document(), patch in document(), path in "(/[a-c0-2-]){0,3}", from in "(/[a-c0-2-]){0,3}") {
        for op in ["add", "remove", "replace", "move", "copy", "test"] {
            let operation = json!([{"op": op, "path": path, "from": from, "value": patch}]);
            _ = json(&mut target.clone(), &operation);
        }
        _ = strategic(&mut target.clone(), &patch, None);
        _ = strategic(&mut target.clone(), &patch, facts::schema("core.v1.Pod"));
    }

    #[test]
    fn a_strategic_patch_twice_is_one_once(a in containers(), b in containers(),
        f in prop::collection::btree_set("[a-d]", 0..3), g in prop::collection::btree_set("[a-d]", 0..3)) {
        let patch = pod(&b, &g);
        let once = merged(&pod(&a, &f), &patch);
        prop_assert_eq!(merged(&once, &patch), once.clone());
        // Everybody who was there is there, and says what the patch says.
        let list = once["spec"]["containers"].as_array().unwrap();
        let names: Vec<&Value> = list.iter().map(|c| &c["name"]).collect();
        for item in a.as_array().unwrap().iter().chain(b.as_array().unwrap()) {
            prop_assert_eq!(names.iter().filter(|name| **name == &item["name"]).count(), 1);
        }
        for item in b.as_array().unwrap() {
            let have = list.iter().find(|c| c["name"] == item["name"]).unwrap();
            prop_assert!(item.get("image").is_none_or(|image| *image == have["image"]));
        }
        let all: std::collections::BTreeSet<String> = f.union(&g).cloned().collect();
        prop_assert_eq!(once["metadata"]["finalizers"].as_array().unwrap().len(), all.len());
    }

    #[test]
    fn deletions_and_order_are_obeyed(a in containers(), order in Just(["a", "b", "c", "d"]).prop_shuffle(), gone in "[a-d]") {
        let patch = json!({"spec": {"containers": [{"name": gone, "$patch": "delete"}],
            "$setElementOrder/containers": order.iter().filter(|n| **n != gone).map(|n| json!({"name": n})).collect::<Vec<_>>()}});
        let after = merged(&pod(&a, &Default::default()), &patch);
        let names: Vec<&str> = after["spec"]["containers"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
        let there = |name: &str| a.as_array().unwrap().iter().any(|c| c["name"] == name);
        let expected: Vec<&str> = order.iter().copied().filter(|n| *n != gone && there(n)).collect();
        prop_assert_eq!(names, expected);
        let kept = merged(&pod(&a, &Default::default()), &json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "z"}]}}));
        prop_assert_eq!(&kept["spec"]["containers"], &json!([{"name": "z"}]));
    }
}
