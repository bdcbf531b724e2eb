//! Small readings and writings of objects as JSON values: what strategies of all kinds share.

use apimachinery::facts::{self, TypeFacts};
use serde_json::{Map, Value, json};

/// What stands at a JSON pointer. ([`Value::pointer`] makes two texts of each of its steps, whether they have escapes or not.)
pub fn at<'v>(object: &'v Value, pointer: &str) -> Option<&'v Value> {
    if pointer.contains('~') {
        return object.pointer(pointer);
    }
    steps(pointer).try_fold(object, |value, step| match value {
        Value::Object(map) => map.get(step),
        Value::Array(list) => list.get(step.parse::<usize>().ok()?),
        _ => None,
    })
}

/// The same without escapes, to be changed.
pub fn at_mut<'v>(object: &'v mut Value, pointer: &str) -> Option<&'v mut Value> {
    steps(pointer).try_fold(object, |value, step| match value {
        Value::Object(map) => map.get_mut(step),
        Value::Array(list) => list.get_mut(step.parse::<usize>().ok()?),
        _ => None,
    })
}

/// The names in a pointer. They are short: to look for the slashes byte by byte is quickest.
fn steps(pointer: &str) -> impl Iterator<Item = &str> {
    let mut rest = pointer.strip_prefix('/');
    std::iter::from_fn(move || {
        let text = rest?;
        let end = text.bytes().position(|byte| byte == b'/');
        rest = end.map(|end| &text[end + 1..]);
        Some(&text[..end.unwrap_or(text.len())])
    })
}

/// The text at a JSON pointer; empty if there is none.
pub fn text<'v>(object: &'v Value, pointer: &str) -> &'v str {
    at(object, pointer).and_then(Value::as_str).unwrap_or("")
}

pub fn int(object: &Value, pointer: &str) -> Option<i64> {
    at(object, pointer).and_then(Value::as_i64)
}

pub fn flag(object: &Value, pointer: &str) -> bool {
    at(object, pointer).and_then(Value::as_bool).unwrap_or(false)
}

/// The list at a JSON pointer; empty if there is none.
pub fn list<'v>(object: &'v Value, pointer: &str) -> &'v [Value] {
    at(object, pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

pub fn map<'v>(object: &'v Value, pointer: &str) -> Option<&'v Map<String, Value>> {
    at(object, pointer).and_then(Value::as_object)
}

/// True where nothing stands, or an empty string.
pub fn is_blank(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => text.is_empty(),
        _ => false,
    }
}

/// Sets a field that is absent or blank.
pub fn default(object: &mut Value, field: &str, value: impl Into<Value>) {
    if let Some(map) = object.as_object_mut()
        && is_blank(map.get(field))
    {
        map.insert(field.to_owned(), value.into());
    }
}

pub fn set(object: &mut Value, field: &str, value: impl Into<Value>) {
    if let Some(map) = object.as_object_mut() {
        map.insert(field.to_owned(), value.into());
    }
}

pub fn remove(object: &mut Value, field: &str) -> Option<Value> {
    object.as_object_mut().and_then(|map| map.remove(field))
}

/// The object in a field, made if there is none. What is no object is left alone and a stranger is handed out.
pub fn child<'v>(object: &'v mut Value, field: &str) -> &'v mut Value {
    if object.is_null() {
        *object = json!({});
    }
    match object {
        Value::Object(map) => {
            let slot = map.entry(field).or_insert(Value::Null);
            if slot.is_null() {
                *slot = json!({});
            }
            slot
        }
        other => other,
    }
}

/// The items of a list field, to be changed.
pub fn items_mut<'v>(object: &'v mut Value, field: &str) -> impl Iterator<Item = &'v mut Value> {
    object.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten()
}

/// Takes a field from another object: set if it is there, removed if it is not.
pub fn copy_field(to: &mut Value, from: &Value, field: &str) {
    match from.get(field) {
        Some(value) if to.get(field) == Some(value) => {}
        Some(value) => set(to, field, value.clone()),
        None => _ = remove(to, field),
    }
}

/// Equal but for absent, null and empty: as `apiequality.Semantic.DeepEqual` holds nil and empty lists and maps alike.
pub fn semantically_equal(a: &Value, b: &Value) -> bool {
    a == b || alike(a, b)
}

fn alike(a: &Value, b: &Value) -> bool {
    fn is_nothing(v: &Value) -> bool {
        match v {
            Value::Null => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        }
    }
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            x.iter().all(|(k, v)| y.get(k).map_or_else(|| is_nothing(v), |w| alike(v, w)))
                && y.iter().all(|(k, w)| x.contains_key(k) || is_nothing(w))
        }
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(v, w)| alike(v, w)),
        _ => a == b || (is_nothing(a) && is_nothing(b)),
    }
}

/// What differs, one line a place, for people: `containers[0].command: ["a"] -> ["b"]`. No longer than they read.
pub fn differences(old: &Value, new: &Value) -> String {
    const MAX: usize = 20;
    fn visit(path: &str, old: &Value, new: &Value, lines: &mut Vec<String>) {
        if lines.len() >= MAX || semantically_equal(old, new) {
            return;
        }
        match (old, new) {
            (Value::Object(a), Value::Object(b)) => {
                for key in a.keys().chain(b.keys().filter(|key| !a.contains_key(*key))) {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    let of = |map: &Map<String, Value>| map.get(key).cloned().unwrap_or_default();
                    visit(&path, &of(a), &of(b), lines);
                }
            }
            (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
                for (at, (a, b)) in a.iter().zip(b).enumerate() {
                    visit(&format!("{path}[{at}]"), a, b, lines);
                }
            }
            _ => lines.push(format!("  {path}: {old} -> {new}\n")),
        }
    }
    let mut lines = Vec::new();
    visit("", old, new, &mut lines);
    lines.concat()
}

/// How two versions of an object compare in what is neither metadata nor status: what bumps a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Content {
    Same,
    /// Only absent, null and empty differ.
    Alike,
    Differs,
}

pub fn compare_content(new: &Value, old: &Value) -> Content {
    let empty = Map::new();
    let (new, old) = (new.as_object().unwrap_or(&empty), old.as_object().unwrap_or(&empty));
    let compare = |key: &String| match (new.get(key), old.get(key)) {
        (a, b) if a == b => Content::Same,
        (a, b) if alike(a.unwrap_or(&Value::Null), b.unwrap_or(&Value::Null)) => Content::Alike,
        _ => Content::Differs,
    };
    let keys = new.keys().chain(old.keys().filter(|key| !new.contains_key(*key)));
    let content = keys.filter(|key| !matches!(key.as_str(), "metadata" | "status" | "kind" | "apiVersion"));
    content.map(compare).max().unwrap_or(Content::Same)
}

/// Counts a change that is not one of the spec, for kinds whose generation counts that too.
pub fn count_change(new: &mut Value, old: &Value, changed: bool) {
    if changed {
        let generation = int(old, "/metadata/generation").unwrap_or(0) + 1;
        set(child(new, "metadata"), "generation", generation);
    }
}

/// Removes a field that a switched-off feature would read, unless the object had it before.
pub fn drop_disabled(new: &mut Value, old: Option<&Value>, parent: &str, fields: &[&str]) {
    for field in fields {
        let had = old.and_then(|old| old.pointer(parent)).is_some_and(|parent| parent.get(*field).is_some());
        if let Some(parent) = new.pointer_mut(parent).filter(|_| !had) {
            remove(parent, field);
        }
    }
}

/// Sets what the schema itself has defaults for: `protocol: TCP` of a port.
pub fn schema_defaults(value: &mut Value, facts: &'static TypeFacts) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(|item| schema_defaults(item, facts)),
        Value::Object(object) => {
            for field in facts.defaulted() {
                if let Some(text) = field.default
                    && is_blank(object.get(field.name))
                    && let Ok(default) = serde_json::from_str(text)
                {
                    object.insert(field.name.to_owned(), default);
                }
                if let (Some(inner), Some(value)) = (field.kind.object(), object.get_mut(field.name)) {
                    match (&field.kind, value) {
                        (facts::Type::Map(_), Value::Object(map)) => {
                            map.values_mut().for_each(|item| schema_defaults(item, inner));
                        }
                        (_, value) => schema_defaults(value, inner),
                    }
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_equals_empty() {
        let cases = [
            (json!({"a": 1, "b": []}), json!({"a": 1}), true),
            (json!({"a": {"b": {}}}), json!({}), false),
            (json!({"a": {}}), json!({}), true),
            (json!([1, {"x": null}]), json!([1, {}]), true),
            (json!({"a": 1}), json!({"a": 2}), false),
            (json!({"a": ""}), json!({}), false),
        ];
        for (a, b, equal) in cases {
            assert_eq!((semantically_equal(&a, &b), semantically_equal(&b, &a)), (equal, equal), "{a} {b}");
        }
    }

    #[test]
    fn only_metadata_and_status_are_beside_the_generation() {
        let old = json!({"metadata": {"a": 1}, "spec": {"x": 1}, "status": {"y": 1}});
        assert_eq!(compare_content(&json!({"metadata": {}, "spec": {"x": 1}}), &old), Content::Same);
        assert_eq!(compare_content(&json!({"spec": {"x": 1, "y": []}}), &old), Content::Alike);
        assert_eq!(compare_content(&json!({"metadata": {"a": 1}, "spec": {"x": 2}}), &old), Content::Differs);
        assert_eq!(compare_content(&json!({"metadata": {"a": 1}}), &old), Content::Differs);
    }

    #[test]
    fn the_schema_s_defaults_are_found_in_depth() {
        let mut pod = json!({"spec": {"containers": [{"ports": [{"containerPort": 80}]}]}});
        schema_defaults(&mut pod, facts::schema("core.v1.Pod").unwrap());
        assert_eq!(pod.pointer("/spec/containers/0/ports/0/protocol"), Some(&json!("TCP")));
    }
}
