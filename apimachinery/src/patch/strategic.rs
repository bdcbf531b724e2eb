//! Strategic merge patch: a merge patch that knows which lists are keyed. Directives in the patch (`$patch`, `$retainKeys`,
//! `$deleteFromPrimitiveList/x`, `$setElementOrder/x`) steer it. As `strategicpatch.StrategicMergePatch`.
use super::PatchError;
use crate::facts::{FieldFacts, TypeFacts};
use serde_json::{Map, Value};

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM_LIST: &str = "$deleteFromPrimitiveList/";
const SET_ORDER: &str = "$setElementOrder/";

/// Applies `patch` to `target`, whose type is `schema`; what has no schema merges as in a merge patch. On an error
/// `target` may have changed in part.
pub fn strategic(target: &mut Value, patch: &Value, schema: Option<&'static TypeFacts>) -> Result<(), PatchError> {
    let patch = patch.as_object().ok_or_else(|| malformed("a strategic merge patch is an object"))?;
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    match target {
        Value::Object(map) => merge_object(map, patch, schema),
        _ => Ok(()),
    }
}

fn merge_object(
    target: &mut Map<String, Value>,
    patch: &Map<String, Value>,
    schema: Option<&'static TypeFacts>,
) -> Result<(), PatchError> {
    match patch.get(PATCH).map(|d| d.as_str().unwrap_or_default()) {
        None | Some("merge") => {}
        Some("replace") => {
            *target = without_directives(patch);
            return Ok(());
        }
        Some("delete") => {
            target.clear();
            return Ok(());
        }
        Some(other) => return Err(unknown(other, patch)),
    }
    if let Some(keep) = patch.get(RETAIN_KEYS) {
        let keep = keep.as_array().ok_or_else(|| malformed("invalid patch format of retainKeys"))?;
        let mut set = patch.iter().filter(|(key, value)| !key.starts_with('$') && !value.is_null());
        if !set.all(|(key, _)| keep.iter().any(|k| k == key)) {
            return Err(PatchError::Unprocessable("patch content doesn't match retainKeys list".into()));
        }
        target.retain(|key, _| keep.iter().any(|k| k == key));
    }
    for (key, value) in patch {
        if let Some(field) = key.strip_prefix(DELETE_FROM_LIST) {
            let gone = value.as_array().ok_or_else(|| malformed("invalid patch format of primitive list"))?;
            if let Some(Value::Array(list)) = target.get_mut(field) {
                list.retain(|item| !gone.contains(item));
            }
        }
    }
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        let field = schema.and_then(|s| s.field(key));
        let order = patch.get(&format!("{SET_ORDER}{key}"));
        merge_field(target, key, value, field, order)?;
    }
    for (key, order) in patch {
        // An order for a list that the patch does not change otherwise.
        if let Some(name) = key.strip_prefix(SET_ORDER).filter(|name| !patch.contains_key(*name))
            && let Some(Value::Array(list)) = target.get_mut(name)
        {
            let merge_key = schema.and_then(|s| s.field(name)).and_then(|f| f.merge_key);
            let server_order = list.clone();
            set_order(list, &server_order, order, merge_key)?;
        }
    }
    Ok(())
}

fn merge_field(
    target: &mut Map<String, Value>,
    key: &str,
    patch: &Value,
    field: Option<&'static FieldFacts>,
    order: Option<&Value>,
) -> Result<(), PatchError> {
    let child = field.and_then(|f| f.kind.object());
    let replace = field.is_some_and(|f| f.strategy.replace);
    match patch {
        Value::Null => {
            target.remove(key);
        }
        Value::Object(patch) if !replace => {
            let slot = target.entry(key).or_insert_with(|| Value::Object(Map::new()));
            if !slot.is_object() {
                *slot = Value::Object(Map::new());
            }
            if let Value::Object(slot) = slot {
                merge_object(slot, patch, child)?;
            }
        }
        Value::Array(items) if field.is_some_and(|f| f.strategy.merge) => {
            let slot = target.entry(key).or_insert_with(|| Value::Array(Vec::new()));
            if !slot.is_array() {
                *slot = Value::Array(Vec::new());
            }
            if let Value::Array(list) = slot {
                let server_order = list.clone();
                let merge_key = field.and_then(|f| f.merge_key);
                match merge_key {
                    Some(merge_key) => merge_keyed(list, items, merge_key, child, key)?,
                    None => {
                        list.extend(items.iter().filter(|i| !server_order.contains(i)).cloned().collect::<Vec<_>>())
                    }
                }
                if let Some(order) = order {
                    check_order(items, order, merge_key)?;
                    set_order(list, &server_order, order, merge_key)?;
                }
            }
        }
        other => {
            target.insert(key.to_owned(), stripped(other));
        }
    }
    Ok(())
}

fn merge_keyed(
    list: &mut Vec<Value>,
    patch: &[Value],
    merge_key: &str,
    item_type: Option<&'static TypeFacts>,
    field: &str,
) -> Result<(), PatchError> {
    let directive = |item: &Value| item.get(PATCH).and_then(Value::as_str).map(ToOwned::to_owned);
    if patch.iter().any(|item| directive(item).as_deref() == Some("replace")) {
        *list = patch.iter().filter(|item| directive(item).as_deref() != Some("replace")).map(stripped).collect();
        return Ok(());
    }
    for item in patch {
        let object = item
            .as_object()
            .ok_or_else(|| malformed(format!("items of {field} must be objects with the merge key {merge_key:?}")))?;
        let id = object
            .get(merge_key)
            .ok_or_else(|| failed(format!("map: {item} does not contain declared merge key: {merge_key}")))?;
        match directive(item).as_deref() {
            Some("delete") => list.retain(|have| have.get(merge_key) != Some(id)),
            Some("merge") => return Err(failed("merging lists cannot yet be specified in the patch")),
            None => match list.iter_mut().find(|have| have.get(merge_key) == Some(id)) {
                Some(Value::Object(have)) => merge_object(have, object, item_type)?,
                _ => {
                    let mut new = Map::new();
                    merge_object(&mut new, object, item_type)?;
                    list.push(Value::Object(new));
                }
            },
            Some(other) => return Err(unknown(other, object)),
        }
    }
    Ok(())
}

/// What the patch adds or changes must stand in the order that it asks for. As `validatePatchWithSetOrderList`.
fn check_order(items: &[Value], order: &Value, merge_key: Option<&str>) -> Result<(), PatchError> {
    let id = |item: &Value| merge_key.map_or_else(|| Some(item.clone()), |key| item.get(key).cloned());
    let Some(order_items) = order.as_array() else { return Ok(()) };
    let mut places = order_items.iter();
    let there = |item: &Value| item.get(PATCH).is_none();
    if items.iter().filter(|item| there(item)).all(|item| places.any(|place| id(place) == id(item))) {
        return Ok(());
    }
    Err(failed(format!(
        "The order in patch list:\n{}\n doesn't match {SET_ORDER} list:\n{order}\n",
        Value::from(items)
    )))
}

/// Brings `list` into the order that the patch asks for. Items that it does not name stay where they stood among those
/// that the server had (`server_order`). As `normalizeSliceOrder`.
fn set_order(
    list: &mut Vec<Value>,
    server_order: &[Value],
    order: &Value,
    merge_key: Option<&str>,
) -> Result<(), PatchError> {
    let order = order.as_array().ok_or_else(|| malformed("invalid patch format of setElementOrder list"))?;
    let id = |item: &Value| merge_key.map_or_else(|| Some(item.clone()), |key| item.get(key).cloned());
    let place = |item: &Value, among: &[Value]| among.iter().position(|other| id(other) == id(item));
    let (mut named, unnamed): (Vec<Value>, Vec<Value>) =
        std::mem::take(list).into_iter().partition(|item| place(item, order).is_some());
    named.sort_by_key(|item| place(item, order));
    let (mut named, mut unnamed) = (named.into_iter().peekable(), unnamed.into_iter().peekable());
    loop {
        let unnamed_first = match (named.peek(), unnamed.peek()) {
            (None, None) => return Ok(()),
            (None, Some(_)) => true,
            (Some(_), None) => false,
            (Some(n), Some(u)) => match (place(n, server_order), place(u, server_order)) {
                (Some(n), Some(u)) => u < n,
                _ => false,
            },
        };
        list.extend(if unnamed_first { unnamed.next() } else { named.next() });
    }
}

/// A value that comes into the object whole: directives and nulls are not part of it.
fn stripped(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(without_directives(map)),
        Value::Array(list) => Value::Array(list.iter().map(stripped).collect()),
        other => other.clone(),
    }
}

fn without_directives(map: &Map<String, Value>) -> Map<String, Value> {
    let directive = |key: &str| {
        key == PATCH || key == RETAIN_KEYS || key.starts_with(DELETE_FROM_LIST) || key.starts_with(SET_ORDER)
    };
    map.iter().filter(|(k, v)| !directive(k) && !v.is_null()).map(|(k, v)| (k.clone(), stripped(v))).collect()
}

fn failed(message: impl Into<String>) -> PatchError {
    PatchError::Failed(message.into())
}

fn unknown(directive: &str, patch: &Map<String, Value>) -> PatchError {
    failed(format!("unknown patch type: {directive} in map: {}", Value::Object(patch.clone())))
}

fn malformed(message: impl Into<String>) -> PatchError {
    PatchError::Malformed(message.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts;
    use serde_json::json;

    fn patched(kind: &str, target: Value, patch: Value) -> Result<Value, PatchError> {
        let group = if kind == "Deployment" { "apps" } else { "" };
        let schema = facts::kind(group, "v1", kind).and_then(|k| facts::schema(k.schema));
        assert!(schema.is_some());
        let mut target = target;
        strategic(&mut target, &patch, schema).map(|()| target)
    }

    #[test]
    fn lists_merge_by_their_key() {
        let pod = json!({"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "2"}], "nodeName": "n"}});
        for (what, patch, expected) in [
            (
                "merge and append",
                json!({"spec": {"containers": [{"name": "b", "image": "3"}, {"name": "c", "image": "4", "x": null}]}}),
                json!([{"name": "a", "image": "1"}, {"name": "b", "image": "3"}, {"name": "c", "image": "4"}]),
            ),
            (
                "delete",
                json!({"spec": {"containers": [{"name": "a", "$patch": "delete"}]}}),
                json!([{"name": "b", "image": "2"}]),
            ),
            (
                "replace",
                json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "z"}]}}),
                json!([{"name": "z"}]),
            ),
            (
                "order",
                json!({"spec": {"$setElementOrder/containers": [{"name": "c"}, {"name": "b"}], "containers": [{"name": "c", "image": "5"}]}}),
                json!([{"name": "c", "image": "5"}, {"name": "a", "image": "1"}, {"name": "b", "image": "2"}]),
            ),
        ] {
            assert_eq!(patched("Pod", pod.clone(), patch).unwrap()["spec"]["containers"], expected, "{what}");
        }
    }

    #[test]
    fn primitive_lists_merge_as_sets() {
        let object = json!({"metadata": {"finalizers": ["a", "b"]}});
        let patch = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["b", "c"]}});
        assert_eq!(patched("Pod", object, patch).unwrap(), json!({"metadata": {"finalizers": ["b", "c"]}}));
    }

    #[test]
    fn lists_without_a_strategy_are_replaced_and_nulls_delete() {
        let object = json!({"spec": {"containers": [{"name": "a", "command": ["x", "y"], "image": "i"}]}});
        let patch = json!({"spec": {"containers": [{"name": "a", "command": ["z"], "image": null}]}});
        assert_eq!(
            patched("Pod", object, patch).unwrap(),
            json!({"spec": {"containers": [{"name": "a", "command": ["z"]}]}})
        );
    }

    #[test]
    fn retain_keys_and_replace_leave_nothing_else() {
        let object = json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}});
        let patch = json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}});
        assert_eq!(
            patched("Deployment", object.clone(), patch).unwrap(),
            json!({"spec": {"strategy": {"type": "Recreate"}}})
        );
        let patch = json!({"spec": {"strategy": {"$patch": "replace", "type": "Recreate"}}});
        assert_eq!(patched("Deployment", object, patch).unwrap(), json!({"spec": {"strategy": {"type": "Recreate"}}}));
    }

    #[test]
    fn a_map_is_emptied_by_its_deletion() {
        let object = json!({"spec": {"securityContext": {"runAsUser": 1}, "nodeName": "n"}});
        let patch = json!({"spec": {"securityContext": {"$patch": "delete"}}});
        assert_eq!(patched("Pod", object, patch).unwrap(), json!({"spec": {"securityContext": {}, "nodeName": "n"}}));
    }

    #[test]
    fn what_is_malformed_is_refused() {
        let malformed = |error: &PatchError| matches!(error, PatchError::Malformed(_));
        let failed = |error: &PatchError| matches!(error, PatchError::Failed(_));
        let unprocessable = |error: &PatchError| matches!(error, PatchError::Unprocessable(_));
        let cases: Vec<(Value, &dyn Fn(&PatchError) -> bool)> = vec![
            (json!([]), &malformed),
            (json!({"spec": {"containers": ["x"]}}), &malformed),
            (json!({"spec": {"$retainKeys": "x"}}), &malformed),
            (json!({"metadata": {"$deleteFromPrimitiveList/finalizers": 1}}), &malformed),
            (json!({"spec": {"$setElementOrder/containers": 1, "containers": [{"name": "a"}]}}), &malformed),
            (json!({"$patch": "grow"}), &failed),
            (json!({"spec": {"containers": [{"image": "x"}]}}), &failed),
            (json!({"spec": {"containers": [{"name": "x", "$patch": "merge"}]}}), &failed),
            (json!({"spec": {"$setElementOrder/containers": [{"name": "b"}], "containers": [{"name": "a"}]}}), &failed),
            (json!({"spec": {"$retainKeys": ["nodeName"], "hostname": "x"}}), &unprocessable),
        ];
        for (patch, expected) in cases {
            let error = patched("Pod", json!({"spec": {}}), patch.clone()).unwrap_err();
            assert!(expected(&error), "{patch}: {error:?}");
        }
    }
}
