//! OpenAPI v2 as protobuf: the messages of `openapi.v2.Document`, as clients in Go read them.

use apimachinery::protobuf::wire::{put_bytes, put_message, put_number};
use serde_json::{Map, Value};

/// Numbers of `NamedX`: a map's entry.
const NAME: u32 = 1;
const VALUE: u32 = 2;

/// The document but for paths and definitions, which follow: what is sent of a message in pieces is one message.
pub fn head(swagger: &str, info: &Value, security: &Value) -> Vec<u8> {
    const API_KEY: u32 = 2;
    let mut out = Vec::new();
    put_bytes(&mut out, 1, swagger.as_bytes());
    put_message(&mut out, 2, |out| texts(out, info, &[("title", 1), ("version", 2)]));
    for name in members(security).map(|(name, _)| name) {
        put_message(&mut out, 12, |out| put_message(out, 1, |out| put_bytes(out, NAME, name.as_bytes())));
    }
    put_message(&mut out, 13, |out| {
        named(out, 1, security, |out, definition| {
            let fields = [("type", 1), ("name", 2), ("in", 3), ("description", 4)];
            put_message(out, API_KEY, |out| texts(out, definition, &fields));
        });
    });
    out
}

/// One path.
pub fn path(name: &str, item: &Value) -> Vec<u8> {
    piece(8, 2, name, |out| path_item(out, item))
}

/// One definition.
pub fn definition(name: &str, found: &Value) -> Vec<u8> {
    piece(9, 1, name, |out| schema(out, found))
}

/// An entry of a map that is a field of the document.
fn piece(field: u32, entries: u32, name: &str, write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    put_message(&mut out, field, |out| {
        put_message(out, entries, |out| {
            put_bytes(out, NAME, name.as_bytes());
            put_message(out, VALUE, write);
        });
    });
    out
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn members(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

fn text(out: &mut Vec<u8>, field: u32, value: &Value) {
    if let Some(text) = value.as_str() {
        put_bytes(out, field, text.as_bytes());
    }
}

fn texts(out: &mut Vec<u8>, object: &Value, fields: &[(&str, u32)]) {
    for (name, field) in fields {
        text(out, *field, &object[*name]);
    }
}

fn flag(out: &mut Vec<u8>, field: u32, value: &Value) {
    if value == true {
        put_number(out, field, 1);
    }
}

fn named(out: &mut Vec<u8>, field: u32, map: &Value, write: impl Fn(&mut Vec<u8>, &Value)) {
    for (name, value) in members(map) {
        put_message(out, field, |out| {
            put_bytes(out, NAME, name.as_bytes());
            put_message(out, VALUE, |out| write(out, value));
        });
    }
}

/// Values of any kind are YAML, of which JSON is a part.
fn any(out: &mut Vec<u8>, value: &Value) {
    const YAML: u32 = 2;
    put_bytes(out, YAML, value.to_string().as_bytes());
}

fn extensions(out: &mut Vec<u8>, field: u32, object: &Value) {
    for (name, value) in members(object).filter(|(name, _)| name.starts_with("x-")) {
        put_message(out, field, |out| {
            put_bytes(out, NAME, name.as_bytes());
            put_message(out, VALUE, |out| any(out, value));
        });
    }
}

fn path_item(out: &mut Vec<u8>, item: &Value) {
    let methods = [("get", 2), ("put", 3), ("post", 4), ("delete", 5), ("options", 6), ("head", 7), ("patch", 8)];
    for (method, field) in methods {
        if let Some(found) = item.get(method) {
            put_message(out, field, |out| operation(out, found));
        }
    }
    items(&item["parameters"]).for_each(|found| put_message(out, 9, |out| parameter(out, found)));
}

fn operation(out: &mut Vec<u8>, operation: &Value) {
    items(&operation["tags"]).for_each(|tag| text(out, 1, tag));
    texts(out, operation, &[("description", 3), ("operationId", 5)]);
    items(&operation["produces"]).for_each(|kind| text(out, 6, kind));
    items(&operation["consumes"]).for_each(|kind| text(out, 7, kind));
    items(&operation["parameters"]).for_each(|found| put_message(out, 8, |out| parameter(out, found)));
    put_message(out, 9, |out| {
        named(out, 1, &operation["responses"], |out, response| {
            put_message(out, 1, |out| {
                text(out, 1, &response["description"]);
                if let Some(found) = response.get("schema") {
                    put_message(out, 2, |out| put_message(out, 1, |out| schema(out, found)));
                }
            });
        });
    });
    items(&operation["schemes"]).for_each(|scheme| text(out, 10, scheme));
    extensions(out, 13, operation);
}

/// `ParametersItem{parameter: Parameter{body or other}}`.
fn parameter(out: &mut Vec<u8>, parameter: &Value) {
    put_message(out, 1, |out| match parameter["in"].as_str() {
        Some("body") => put_message(out, 1, |out| {
            texts(out, parameter, &[("name", 2), ("in", 3)]);
            flag(out, 4, &parameter["required"]);
            put_message(out, 5, |out| schema(out, &parameter["schema"]));
        }),
        place => {
            let (field, kind, unique) = if place == Some("path") { (4, 5, 19) } else { (3, 6, 20) };
            put_message(out, 2, |out| {
                put_message(out, field, |out| {
                    flag(out, 1, &parameter["required"]);
                    texts(out, parameter, &[("in", 2), ("description", 3), ("name", 4), ("type", kind)]);
                    flag(out, unique, &parameter["uniqueItems"]);
                });
            });
        }
    });
}

fn schema(out: &mut Vec<u8>, found: &Value) {
    texts(out, found, &[("$ref", 1), ("format", 2), ("description", 4)]);
    if let Some(default) = found.get("default") {
        put_message(out, 5, |out| any(out, default));
    }
    items(&found["required"]).for_each(|name| text(out, 19, name));
    if let Some(more) = found.get("additionalProperties") {
        put_message(out, 21, |out| put_message(out, 1, |out| schema(out, more)));
    }
    if found["type"].is_string() {
        put_message(out, 22, |out| text(out, 1, &found["type"]));
    }
    if let Some(item) = found.get("items") {
        put_message(out, 23, |out| put_message(out, 1, |out| schema(out, item)));
    }
    if found["properties"].is_object() {
        put_message(out, 25, |out| named(out, 1, &found["properties"], schema));
    }
    extensions(out, 31, found);
}
