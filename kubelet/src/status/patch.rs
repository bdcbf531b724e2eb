//! The patch that turns a reported status into the new one: a strategic merge patch of what differs, bound to the pod's UID.

use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Map, Value, json};

use super::generate::RESIZE_CONDITIONS;

/// Fields whose lists the API merges by key: a list from which something went must be replaced as a whole.
const MERGED_LISTS: [&str; 2] = ["podIPs", "hostIPs"];

/// The patch, or None if the API already has `new`.
pub(super) fn patch(uid: &str, old: &PodStatus, new: &PodStatus) -> Option<Value> {
    let (Ok(Value::Object(old)), Ok(Value::Object(new))) = (serde_json::to_value(old), serde_json::to_value(new))
    else {
        return None;
    };
    let mut status = Map::new();
    for (key, value) in &new {
        if old.get(key) == Some(value) {
            continue;
        }
        let patched = match (key.as_str(), value, old.get(key)) {
            ("conditions", Value::Array(items), Some(Value::Array(before))) => {
                // Merged by type: only those that changed are sent, so that others' conditions are not touched.
                let changed = items.iter().filter(|item| !before.contains(item));
                let mut all: Vec<Value> = changed.map(|item| without_leftovers(item, before)).collect();
                let has = |list: &[Value], kind: &str| list.iter().any(|c| c.get("type") == Some(&json!(kind)));
                for kind in RESIZE_CONDITIONS.iter().filter(|k| has(before, k) && !has(items, k)) {
                    all.push(json!({"$patch": "delete", "type": kind}));
                }
                Value::Array(all)
            }
            (key, Value::Array(items), Some(Value::Array(_))) if MERGED_LISTS.contains(&key) => {
                let mut all = vec![json!({"$patch": "replace"})];
                all.extend(items.iter().cloned());
                Value::Array(all)
            }
            _ => value.clone(),
        };
        if patched != Value::Array(Vec::new()) {
            status.insert(key.clone(), patched);
        }
    }
    for key in old.keys().filter(|key| !new.contains_key(*key)) {
        status.insert(key.clone(), Value::Null);
    }
    if status.is_empty() {
        return None;
    }
    Some(json!({"metadata": {"uid": uid}, "status": status}))
}

/// A condition as it is to be, with what its former self had and it has not set to null: merging keeps what is not named.
fn without_leftovers(item: &Value, before: &[Value]) -> Value {
    let mut item = item.clone();
    let former = before.iter().find(|b| b.get("type") == item.get("type")).and_then(Value::as_object);
    if let (Some(former), Some(fields)) = (former, item.as_object_mut()) {
        for key in former.keys() {
            fields.entry(key.clone()).or_insert(Value::Null);
        }
    }
    item
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(value: Value) -> PodStatus {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn only_what_differs_is_sent() {
        let old = status(
            json!({"phase": "Pending", "message": "m", "podIPs": [{"ip": "1.1.1.1"}], "hostIP": "9.9.9.9",
            "conditions": [{"type": "Ready", "status": "False", "reason": "R"}, {"type": "PodScheduled", "status": "True"}]}),
        );
        let new = status(json!({"phase": "Running", "podIPs": [{"ip": "2.2.2.2"}], "hostIP": "9.9.9.9",
            "conditions": [{"type": "Ready", "status": "True"}, {"type": "PodScheduled", "status": "True"}]}));
        assert_eq!(
            patch("u", &old, &new).unwrap(),
            json!({"metadata": {"uid": "u"}, "status": {
                "phase": "Running", "message": null, "podIPs": [{"$patch": "replace"}, {"ip": "2.2.2.2"}],
                "conditions": [{"type": "Ready", "status": "True", "reason": null}]
            }})
        );
        assert_eq!(patch("u", &new, &new), None);
    }
}
