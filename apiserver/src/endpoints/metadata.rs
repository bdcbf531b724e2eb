//! What the server itself writes into `metadata`, for all kinds. As `rest.FillObjectMetaSystemFields`, `BeforeCreate` and
//! `BeforeUpdate`.

use crate::registry::Resource;
use crate::registry::strategy::Part;
use apimachinery::names;
use apimachinery::status::StatusError;
use serde_json::{Map, Value};

/// The text in a field of metadata; empty if there is none.
pub fn text<'v>(object: &'v Value, field: &str) -> &'v str {
    object.get("metadata").and_then(|m| m.get(field)).and_then(Value::as_str).unwrap_or("")
}

pub fn number(object: &Value, field: &str) -> Option<i64> {
    object.get("metadata").and_then(|m| m.get(field)).and_then(Value::as_i64)
}

/// `metadata`, made if there is none.
pub fn of(object: &mut Value) -> &mut Map<String, Value> {
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    let Value::Object(map) = object else { unreachable!("made an object above") };
    let meta = map.entry("metadata").or_insert_with(|| Value::Object(Map::new()));
    if !meta.is_object() {
        *meta = Value::Object(Map::new());
    }
    let Value::Object(meta) = meta else { unreachable!("made an object above") };
    meta
}

/// The finalizers.
pub fn finalizers(object: &Value) -> Vec<&str> {
    object
        .get("metadata")
        .and_then(|m| m.get("finalizers"))
        .and_then(Value::as_array)
        .map(|list| list.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default()
}

pub fn is_being_deleted(object: &Value) -> bool {
    !text(object, "deletionTimestamp").is_empty()
}

/// The namespace of the request becomes the object's; another one is refused.
pub fn ensure_namespace(object: &mut Value, namespace: &str) -> Result<(), StatusError> {
    let own = text(object, "namespace");
    if own == namespace {
        return Ok(());
    }
    if own.is_empty() {
        of(object).insert("namespace".to_owned(), namespace.into());
        return Ok(());
    }
    if namespace.is_empty() {
        of(object).remove("namespace");
        return Ok(());
    }
    Err(StatusError::bad_request(
        "the namespace of the provided object does not match the namespace sent on the request",
    ))
}

/// Owners that are named twice are named once; the author is told. As `dedupOwnerReferencesAndAddWarning`.
pub fn dedup_owners(object: &mut Value) -> Option<String> {
    let owners = object.get_mut("metadata")?.get_mut("ownerReferences")?.as_array_mut()?;
    let mut twice = Vec::new();
    for at in (1..owners.len()).rev() {
        if owners[..at].contains(&owners[at]) {
            let uid = owners.remove(at).get("uid").and_then(Value::as_str).unwrap_or("").to_owned();
            if !twice.contains(&uid) {
                twice.insert(0, uid);
            }
        }
    }
    (!twice.is_empty()).then(|| {
        format!(
            ".metadata.ownerReferences contains duplicate entries; API server dedups owner references in 1.20+, and may reject such requests as early as 1.24; please fix your requests; duplicate UID(s) observed: {}",
            twice.join(", ")
        )
    })
}

/// The object must have the name that the request has.
pub fn check_name(object: &Value, name: &str) -> Result<(), StatusError> {
    let own = text(object, "name");
    if own == name {
        return Ok(());
    }
    if own.is_empty() {
        return Err(StatusError::bad_request(format!(
            "the name of the object ({name} based on URL) was undeterminable: name must be provided"
        )));
    }
    Err(StatusError::bad_request(format!("the name of the object ({own}) does not match the name on the URL ({name})")))
}

/// What a creator has no say in goes; uid and time are set. The name must be there by now.
pub fn fill_system_fields(object: &mut Value, tracks_generation: bool) {
    let meta = of(object);
    for field in [
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "selfLink",
        "managedFields",
        "resourceVersion",
        "generation",
    ] {
        meta.remove(field);
    }
    if tracks_generation {
        meta.insert("generation".to_owned(), 1.into());
    }
    meta.insert("uid".to_owned(), new_uid().into());
    let now = apimachinery::time::rfc3339(apimachinery::time::now().0);
    meta.insert("creationTimestamp".to_owned(), now.into());
}

/// A random UUID. Its bytes come from the process's own generator: the kernel's would be a system call each.
pub fn new_uid() -> String {
    uuid::Builder::from_random_bytes(rand::random()).into_uuid().to_string()
}

/// Makes a name from `generateName`, if there is need.
pub fn generate_name(object: &mut Value) -> bool {
    let prefix = text(object, "generateName").to_owned();
    if prefix.is_empty() {
        return false;
    }
    of(object).insert("name".to_owned(), names::generate_name(&prefix).into());
    true
}

/// What of metadata goes into the store with a status, or is checked against what is there.
const STATUS_WRITES: [&str; 6] = ["labels", "annotations", "finalizers", "ownerReferences", "resourceVersion", "uid"];

/// Carries over from `old` what an update cannot change, by the part it addresses. `new` is the object as sent.
pub fn prepare_update(resource: &Resource, part: Part, new: &mut Value, old: &Value) {
    let empty = Map::new();
    let old_meta = old.get("metadata").and_then(Value::as_object).unwrap_or(&empty);
    if let (Some(map), Some(old)) = (new.as_object_mut(), old.as_object()) {
        if part == Part::Status {
            keep_all_but(map, old, &["status", "metadata"]);
            keep_all_but(of(new), old_meta, &STATUS_WRITES);
        } else if resource.has_status && part == Part::Main {
            carry(map, old, "status");
        }
    }
    let meta = of(new);
    for field in ["creationTimestamp", "generation", "selfLink", "managedFields"] {
        carry(meta, old_meta, field);
    }
    // What is there stays; what an update brings of it where there was none is refused.
    if old_meta.contains_key("deletionTimestamp") {
        carry(meta, old_meta, "deletionTimestamp");
    }
    for field in ["uid", "deletionGracePeriodSeconds"] {
        if crate::registry::object::is_blank(meta.get(field)) {
            carry(meta, old_meta, field);
        }
    }
}

/// Makes `new` what `old` is, but for some fields. What is equal is not copied, and most is.
fn keep_all_but(new: &mut Map<String, Value>, old: &Map<String, Value>, fields: &[&str]) {
    new.retain(|field, _| fields.contains(&field.as_str()) || old.contains_key(field));
    for field in old.keys().filter(|field| !fields.contains(&field.as_str())) {
        carry(new, old, field);
    }
}

fn carry(to: &mut Map<String, Value>, from: &Map<String, Value>, field: &str) {
    match from.get(field) {
        Some(value) if to.get(field) == Some(value) => {}
        Some(value) => _ = to.insert(field.to_owned(), value.clone()),
        None => _ = to.remove(field),
    }
}

/// Counts a change of anything but metadata and status.
pub fn bump_generation(new: &mut Value, old: &Value) {
    let generation = number(old, "generation").unwrap_or(0) + 1;
    of(new).insert("generation".to_owned(), generation.into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_namespace_is_taken_from_the_request_or_must_agree() {
        for (own, requested, expected) in
            [("", "a", Ok("a")), ("a", "a", Ok("a")), ("b", "a", Err(400)), ("b", "", Ok("")), ("", "", Ok(""))]
        {
            let mut object = json!({"metadata": {"namespace": own}});
            let result = ensure_namespace(&mut object, requested);
            assert_eq!(
                result.map(|()| text(&object, "namespace")).map_err(|e| e.code()),
                expected,
                "{own} {requested}"
            );
        }
    }

    #[test]
    fn an_owner_is_named_once() {
        let owner = |uid: &str| json!({"kind": "X", "uid": uid});
        let mut object = json!({"metadata": {"ownerReferences": [owner("a"), owner("b"), owner("a"), owner("a")]}});
        assert!(dedup_owners(&mut object).unwrap().ends_with("observed: a"));
        assert_eq!(object["metadata"]["ownerReferences"], json!([owner("a"), owner("b")]));
        assert_eq!(dedup_owners(&mut object), None);
    }

    #[test]
    fn a_generation_counts_changes_of_spec_alone() {
        use crate::registry::object::{Content, compare_content};
        for (new, expected) in [
            (json!({"metadata": {"labels": {"a": "b"}}, "spec": {"x": 1}, "status": {"y": 2}}), None),
            (json!({"spec": {"x": 2}}), Some(4)),
            (json!({}), Some(4)),
            (json!({"spec": {"x": 1}, "data": {"a": "b"}}), Some(4)),
            (json!({"spec": {"x": 1}, "data": {}}), None),
        ] {
            let (mut new, old) = (new, json!({"metadata": {"generation": 3}, "spec": {"x": 1}}));
            if compare_content(&new, &old) == Content::Differs {
                bump_generation(&mut new, &old);
            }
            assert_eq!(number(&new, "generation"), expected, "{new}");
        }
    }
}
