//! The merge behind `apply`: what was applied last, what is to be applied, and what the server has.
//!
//! A field that was applied and is no longer wanted goes; one that is wanted is set; all others (defaults, what controllers
//! write) stay. Lists are matched by the merge keys of the API's types, as strategic merge does; for kinds without a
//! known type they are replaced as one. The result is sent as the difference to what the server has, bound to its version.

use apimachinery::facts::{PatchStrategy, TypeFacts};
use serde_json::{Map, Value};

/// How a field merges.
#[derive(Clone, Copy, Default)]
struct Rule {
    strategy: PatchStrategy,
    merge_key: Option<&'static str>,
    facts: Option<&'static TypeFacts>,
}

impl Rule {
    fn of(facts: Option<&'static TypeFacts>, field: &str) -> Rule {
        let Some(field) = facts.and_then(|facts| facts.field(field)) else { return Rule::default() };
        Rule { strategy: field.strategy, merge_key: field.merge_key, facts: field.kind.object() }
    }
}

/// What the object is to be, from what was applied last (`original`), what is to be applied (`modified`) and what the server
/// has (`current`).
pub(crate) fn three_way_merge(
    original: &Value,
    modified: &Value,
    current: &Value,
    facts: Option<&'static TypeFacts>,
) -> Value {
    merge(original, modified, current, Rule { facts, ..Rule::default() })
}

fn merge(original: &Value, modified: &Value, current: &Value, rule: Rule) -> Value {
    match (modified, current) {
        (Value::Object(modified), Value::Object(current)) if !rule.strategy.replace => {
            Value::Object(merge_objects(original.as_object(), modified, current, rule))
        }
        (Value::Array(modified), Value::Array(current)) if rule.strategy.merge => {
            let original = original.as_array().map_or(&[][..], Vec::as_slice);
            Value::Array(match rule.merge_key {
                Some(key) => merge_lists(original, modified, current, key, rule.facts),
                None => merge_sets(original, modified, current),
            })
        }
        _ => without_nulls(modified),
    }
}

fn merge_objects(
    original: Option<&Map<String, Value>>,
    modified: &Map<String, Value>,
    current: &Map<String, Value>,
    rule: Rule,
) -> Map<String, Value> {
    let mut merged = current.clone();
    for field in original.into_iter().flatten().map(|(field, _)| field) {
        if !modified.contains_key(field) {
            merged.remove(field);
        }
    }
    for (field, wanted) in modified {
        if wanted.is_null() {
            merged.remove(field);
            continue;
        }
        let former = original.and_then(|original| original.get(field)).unwrap_or(&Value::Null);
        let present = current.get(field).unwrap_or(&Value::Null);
        merged.insert(field.clone(), merge(former, wanted, present, Rule::of(rule.facts, field)));
    }
    // `retainKeys`: once something in such an object changes, only what is wanted stays (a Deployment's strategy).
    if rule.strategy.retain_keys && merged != *current {
        merged.retain(|field, _| modified.contains_key(field));
    }
    merged
}

/// A list of objects that a key tells apart. The order is the server's, with wanted items among themselves in the wanted order
/// and new ones at the end.
fn merge_lists(
    original: &[Value],
    modified: &[Value],
    current: &[Value],
    key: &'static str,
    facts: Option<&'static TypeFacts>,
) -> Vec<Value> {
    fn find<'a>(list: &'a [Value], key: &str, id: &Value) -> Option<&'a Value> {
        list.iter().find(|item| item.get(key).unwrap_or(&Value::Null) == id)
    }
    let id = |item: &Value| item.get(key).cloned().unwrap_or(Value::Null);
    let rule = Rule { facts, ..Rule::default() };
    let merged_item = |wanted: &Value| {
        let id = id(wanted);
        let former = find(original, key, &id).unwrap_or(&Value::Null);
        match find(current, key, &id) {
            Some(present) => merge(former, wanted, present, rule),
            None => without_nulls(wanted),
        }
    };
    let mut in_place = modified.iter().filter(|wanted| find(current, key, &id(wanted)).is_some());
    let mut merged = Vec::new();
    for present in current {
        let id = id(present);
        if find(modified, key, &id).is_some() {
            merged.extend(in_place.next().map(merged_item));
        } else if find(original, key, &id).is_none() {
            merged.push(present.clone());
        }
    }
    merged.extend(modified.iter().filter(|wanted| find(current, key, &id(wanted)).is_none()).map(merged_item));
    merged
}

/// A list of plain values that is a set, such as finalizers.
fn merge_sets(original: &[Value], modified: &[Value], current: &[Value]) -> Vec<Value> {
    let gone = |item: &Value| original.contains(item) && !modified.contains(item);
    let mut merged: Vec<Value> = current.iter().filter(|item| !gone(item)).cloned().collect();
    for item in modified {
        if !merged.contains(item) {
            merged.push(item.clone());
        }
    }
    merged
}

/// A null in a manifest says "not this field".
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(fields) => Value::Object(
            fields
                .iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(field, value)| (field.clone(), without_nulls(value)))
                .collect(),
        ),
        Value::Array(items) => Value::Array(items.iter().map(without_nulls).collect()),
        other => other.clone(),
    }
}

/// The merge patch that makes `to` of `from`; `None` if they are the same.
pub(crate) fn difference(from: &Value, to: &Value) -> Option<Value> {
    match (from, to) {
        _ if from == to => None,
        (Value::Object(from), Value::Object(to)) => {
            let mut patch = Map::new();
            for field in from.keys().filter(|field| !to.contains_key(*field)) {
                patch.insert(field.clone(), Value::Null);
            }
            for (field, wanted) in to {
                match from.get(field) {
                    Some(present) => {
                        if let Some(part) = difference(present, wanted) {
                            patch.insert(field.clone(), part);
                        }
                    }
                    None => drop(patch.insert(field.clone(), wanted.clone())),
                }
            }
            Some(Value::Object(patch))
        }
        _ => Some(to.clone()),
    }
}

#[cfg(test)]
mod tests {
    use apimachinery::facts::schema_of;
    use serde_json::json;

    use super::*;

    fn deployment(original: Value, modified: Value, current: Value) -> Value {
        three_way_merge(&original, &modified, &current, schema_of("apps", "v1", "Deployment"))
    }

    #[test]
    fn what_is_wanted_is_set_and_what_is_no_longer_wanted_goes() {
        let cases = [
            // original, modified, current, expected
            (json!({"a": 1}), json!({"a": 2}), json!({"a": 1, "server": 9}), json!({"a": 2, "server": 9})),
            (json!({"a": 1, "b": 1}), json!({"a": 1}), json!({"a": 1, "b": 1}), json!({"a": 1})),
            (json!({}), json!({"a": 1}), json!({"b": 2}), json!({"a": 1, "b": 2})),
            (
                json!({"a": {"x": 1, "y": 1}}),
                json!({"a": {"x": 1}}),
                json!({"a": {"x": 1, "y": 1, "z": 1}}),
                json!({"a": {"x": 1, "z": 1}}),
            ),
            (json!({}), json!({"a": null}), json!({"a": 1}), json!({})),
            (json!({"l": [1, 2]}), json!({"l": [3]}), json!({"l": [1, 2]}), json!({"l": [3]})),
        ];
        for (original, modified, current, expected) in cases {
            assert_eq!(three_way_merge(&original, &modified, &current, None), expected, "{modified}");
        }
    }

    fn containers(list: Value) -> Value {
        json!({"spec": {"template": {"spec": {"containers": list}}}})
    }

    #[test]
    fn containers_are_matched_by_name() {
        let original = containers(json!([{"name": "a", "image": "a:1"}, {"name": "b", "image": "b:1"}]));
        let modified = containers(json!([{"name": "a", "image": "a:2"}, {"name": "c", "image": "c:1"}]));
        let current = containers(json!([
            {"name": "a", "image": "a:1", "imagePullPolicy": "IfNotPresent"},
            {"name": "b", "image": "b:1"},
            {"name": "injected", "image": "i:1"},
        ]));
        assert_eq!(
            deployment(original, modified, current),
            containers(json!([
                {"name": "a", "image": "a:2", "imagePullPolicy": "IfNotPresent"},
                {"name": "injected", "image": "i:1"},
                {"name": "c", "image": "c:1"},
            ]))
        );
    }

    #[test]
    fn applying_the_same_again_changes_nothing() {
        let manifest = containers(json!([{"name": "a", "image": "a:1", "ports": [{"containerPort": 80}]}]));
        let current = containers(json!([
            {"name": "injected", "image": "i:1"},
            {"name": "a", "image": "a:1", "imagePullPolicy": "Always", "ports": [{"containerPort": 80, "protocol": "TCP"}]},
        ]));
        assert_eq!(difference(&current, &deployment(manifest.clone(), manifest, current.clone())), None);
    }

    #[test]
    fn a_changed_order_of_wanted_items_is_followed() {
        let list = |names: &[&str]| containers(names.iter().map(|name| json!({"name": name})).collect());
        let merged = deployment(list(&["a", "b"]), list(&["b", "a"]), list(&["a", "x", "b"]));
        assert_eq!(merged, list(&["b", "x", "a"]));
    }

    #[test]
    fn changing_the_strategy_drops_the_parameters_of_the_former() {
        let strategy = |value: Value| json!({"spec": {"strategy": value}});
        let current = strategy(json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%"}}));
        let same = strategy(json!({"type": "RollingUpdate"}));
        assert_eq!(deployment(same.clone(), same.clone(), current.clone()), current);
        let recreate = strategy(json!({"type": "Recreate"}));
        assert_eq!(deployment(same, recreate.clone(), current), recreate);
    }

    #[test]
    fn sets_keep_what_others_added() {
        let meta = |finalizers: &[&str]| json!({"metadata": {"finalizers": finalizers}});
        assert_eq!(deployment(meta(&["a", "b"]), meta(&["a", "c"]), meta(&["x", "a", "b"])), meta(&["x", "a", "c"]));
    }

    #[test]
    fn differences_are_merge_patches() {
        for (from, to, expected) in [
            (json!({"a": 1}), json!({"a": 1}), None),
            (
                json!({"a": 1, "b": {"c": 1, "d": 2}}),
                json!({"b": {"c": 1}}),
                Some(json!({"a": null, "b": {"d": null}})),
            ),
            (json!({"l": [1]}), json!({"l": [1, 2]}), Some(json!({"l": [1, 2]}))),
            (json!({}), json!({"n": {"x": 1}}), Some(json!({"n": {"x": 1}}))),
        ] {
            assert_eq!(difference(&from, &to), expected);
        }
    }
}
