//! Objects as the command line sees them: JSON values named by words (`arguments`), read from files (`manifest`) and
//! merged as `apply` does (`three_way`).

mod arguments;
mod manifest;
mod three_way;

use serde_json::Value;

pub(crate) use arguments::{Target, one_object, targets};
pub(crate) use manifest::{FileFlags, Manifest};
pub(crate) use three_way::{difference, three_way_merge};

/// The annotation in which `apply` keeps what it was given last.
pub(crate) const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// The text at a JSON pointer, or nothing.
pub(crate) fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The number at a JSON pointer, or 0.
pub(crate) fn number(object: &Value, pointer: &str) -> i64 {
    object.pointer(pointer).and_then(Value::as_i64).unwrap_or_default()
}

/// The items at a JSON pointer, or none.
pub(crate) fn items<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

pub(crate) fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

pub(crate) fn namespace(object: &Value) -> &str {
    text(object, "/metadata/namespace")
}

pub(crate) fn kind(object: &Value) -> &str {
    text(object, "/kind")
}

pub(crate) fn api_version(object: &Value) -> &str {
    text(object, "/apiVersion")
}

/// `a=b,c=d`, of a selector's labels.
pub(crate) fn selector_text(labels: Option<&Value>) -> String {
    let labels = labels.and_then(Value::as_object);
    let pairs = labels.into_iter().flatten();
    pairs.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default())).collect::<Vec<_>>().join(",")
}

/// The selector of a workload or a Service, as text for a query.
pub(crate) fn selector_of(object: &Value) -> Option<String> {
    let selector = object.pointer("/spec/selector")?;
    if selector.get("matchLabels").is_none() && selector.get("matchExpressions").is_none() {
        return Some(selector_text(Some(selector))).filter(|text| !text.is_empty());
    }
    let mut parts = vec![selector_text(selector.get("matchLabels"))];
    for expression in items(selector, "/matchExpressions") {
        let (key, operator) = (text(expression, "/key"), text(expression, "/operator"));
        let values: Vec<&str> = items(expression, "/values").iter().filter_map(Value::as_str).collect();
        parts.push(match operator {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "Exists" => key.to_owned(),
            _ => format!("!{key}"),
        });
    }
    parts.retain(|part| !part.is_empty());
    Some(parts.join(",")).filter(|text| !text.is_empty())
}

/// Removes what people do not want to read.
pub(crate) fn strip_managed_fields(object: &mut Value) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    for item in object.get_mut("items").and_then(Value::as_array_mut).into_iter().flatten() {
        strip_managed_fields(item);
    }
}

/// Puts a value at a path of keys, making the objects on the way.
pub(crate) fn set(object: &mut Value, path: &[&str], value: Value) {
    let mut place = object;
    for key in path {
        if !place.is_object() {
            *place = Value::Object(serde_json::Map::new());
        }
        place = &mut place[*key];
    }
    *place = value;
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_become_queries() {
        for (selector, expected) in [
            (json!({"app": "web", "tier": "db"}), Some("app=web,tier=db")),
            (json!({"matchLabels": {"app": "web"}}), Some("app=web")),
            (
                json!({"matchExpressions": [{"key": "a", "operator": "In", "values": ["x", "y"]}, {"key": "b", "operator": "Exists"}]}),
                Some("a in (x,y),b"),
            ),
            (json!({}), None),
        ] {
            let object = json!({"spec": {"selector": selector}});
            assert_eq!(selector_of(&object).as_deref(), expected);
        }
    }

    #[test]
    fn a_value_is_put_at_a_path() {
        let mut object = json!({"a": {"b": 1}, "n": null});
        set(&mut object, &["a", "c"], json!(2));
        set(&mut object, &["n", "x"], json!(3));
        assert_eq!(object, json!({"a": {"b": 1, "c": 2}, "n": {"x": 3}}));
    }
}
