//! Any object, field by field; ConfigMaps and Secrets with their data.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::{Description, annotation_lines, map_lines};
use crate::objects::{api_version, items, kind, name, namespace, text};
use crate::output::jsonpath::plain;

fn head(object: &Value, out: &mut Description) {
    out.pairs(
        0,
        &[
            ("Name", name(object).to_owned()),
            ("Namespace", namespace(object).to_owned()),
            ("Labels", map_lines(object.pointer("/metadata/labels"), 0)),
            ("Annotations", annotation_lines(object)),
        ],
    );
}

pub(super) fn describe(object: &Value, out: &mut Description) {
    head(object, out);
    out.pairs(0, &[("API Version", api_version(object).to_owned()), ("Kind", kind(object).to_owned())]);
    let mut rest = object.clone();
    if let Some(fields) = rest.as_object_mut() {
        for field in ["apiVersion", "kind"] {
            fields.remove(field);
        }
        if let Some(metadata) = fields.get_mut("metadata").and_then(Value::as_object_mut) {
            for field in ["name", "namespace", "labels", "annotations", "managedFields"] {
                metadata.remove(field);
            }
        }
    }
    fields(&rest, 0, out);
}

/// `creationTimestamp` as `Creation Timestamp`.
fn title(field: &str) -> String {
    let mut words = String::new();
    let mut before_is_lower = false;
    for (at, character) in field.chars().enumerate() {
        if at == 0 {
            words.extend(character.to_uppercase());
        } else {
            if character.is_uppercase() && before_is_lower {
                words.push(' ');
            }
            words.push(character);
        }
        before_is_lower = character.is_lowercase() || character.is_ascii_digit();
    }
    words
}

fn fields(value: &Value, indent: usize, out: &mut Description) {
    let Some(map) = value.as_object() else { return };
    let pad = " ".repeat(indent);
    for (field, value) in map {
        let title = title(field);
        match value {
            Value::Object(inner) if inner.is_empty() => out.line(format!("{pad}{title}:")),
            Value::Object(_) => {
                out.line(format!("{pad}{title}:"));
                fields(value, indent + 2, out);
            }
            Value::Array(items) => {
                out.line(format!("{pad}{title}:"));
                for item in items {
                    if item.is_object() {
                        fields(item, indent + 2, out);
                    } else {
                        out.line(format!("{pad}  {}", plain(item)));
                    }
                }
            }
            other => out.line(format!("{pad}{title}:\t{}", plain(other))),
        }
    }
}

pub(super) fn service_account(object: &Value, out: &mut Description) {
    head(object, out);
    let names = |path: &str| {
        let names: Vec<&str> = items(object, path).iter().map(|item| text(item, "/name")).collect();
        if names.is_empty() { "<none>".to_owned() } else { names.join("\n\t") }
    };
    out.pairs(
        0,
        &[
            ("Image pull secrets", names("/imagePullSecrets")),
            ("Mountable secrets", names("/secrets")),
            ("Tokens", "<none>".to_owned()),
        ],
    );
}

pub(super) fn config_map(object: &Value, out: &mut Description) {
    head(object, out);
    out.line("\nData\n====");
    for (key, value) in object.get("data").and_then(Value::as_object).into_iter().flatten() {
        out.line(format!("{key}:\n----\n{}\n", plain(value)));
    }
    out.line("\nBinaryData\n====");
    for (key, value) in object.get("binaryData").and_then(Value::as_object).into_iter().flatten() {
        out.line(format!("{key}: {} bytes", decoded_length(value)));
    }
    out.line("");
}

/// Lengths only: a secret is not for showing.
pub(super) fn secret(object: &Value, out: &mut Description) {
    head(object, out);
    out.line(format!("\nType:\t{}\n\nData\n====", text(object, "/type")));
    for (key, value) in object.get("data").and_then(Value::as_object).into_iter().flatten() {
        out.line(format!("{key}:\t{} bytes", decoded_length(value)));
    }
}

fn decoded_length(value: &Value) -> usize {
    value.as_str().and_then(|text| STANDARD.decode(text).ok()).map_or(0, |bytes| bytes.len())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn any_object_is_laid_out() {
        let mut out = Description::default();
        describe(
            &json!({"apiVersion": "x/v1", "kind": "Widget", "metadata": {"name": "w", "uid": "u"}, "spec": {"maxSize": 3, "list": ["a"]}}),
            &mut out,
        );
        assert!(out.text.contains("Name:\tw"), "{}", out.text);
        assert!(out.text.contains("Spec:\n  List:\n    a\n  Max Size:\t3\n"), "{}", out.text);
    }

    #[test]
    fn secrets_show_only_lengths() {
        let mut out = Description::default();
        secret(&json!({"metadata": {"name": "s"}, "type": "Opaque", "data": {"key": "c2VjcmV0"}}), &mut out);
        assert!(out.text.contains("key:\t6 bytes") && !out.text.contains("secret"), "{}", out.text);
    }
}
