//! OpenAPI v2: the paths of all v3 documents in its words, and the definitions of all types.

use super::schemas::{Dialect, Schemas};
use super::{bearer_token, documents, group_version, info, single};
use apimachinery::facts::{self, Docs};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

pub fn document() -> Value {
    let docs = Docs::inflate();
    let docs = docs.types();
    let (mut paths, mut types) = (Map::new(), BTreeSet::new());
    let mut add = |found: Map<String, Value>, named: BTreeSet<&'static str>| {
        paths.extend(found.into_iter().map(|(path, item)| (path, path_item(item))));
        types.extend(named);
    };
    let mut shared_in = Vec::new();
    for group in facts::groups() {
        for version in &group.versions {
            let found = group_version(group.name, version, &docs);
            add(found.finished, found.types);
            shared_in.push((group.name, *version));
        }
    }
    for (found, named) in documents().iter().filter_map(|path| single(path)) {
        add(found, named);
    }
    let mut schemas = Schemas::new(Dialect::V2, &docs, shared_in);
    schemas.add(types);
    json!({
        "swagger": "2.0",
        "info": info(),
        "paths": paths,
        "definitions": schemas.finish(),
        "securityDefinitions": bearer_token(),
        "security": [{"BearerToken": []}],
    })
}

fn path_item(item: Value) -> Value {
    let Value::Object(item) = item else { return item };
    let converted = item.into_iter().map(|(key, value)| match (key.as_str(), value) {
        ("parameters", Value::Array(list)) => (key, list.into_iter().map(parameter).collect()),
        (_, Value::Object(map)) => (key, operation(map)),
        (_, value) => (key, value),
    });
    Value::Object(converted.collect())
}

fn operation(mut operation: Map<String, Value>) -> Value {
    let mut parameters: Vec<Value> = Vec::new();
    let mut consumes = operation.contains_key("x-kubernetes-action").then(|| json!(["*/*"]));
    if let Some(body) = operation.remove("requestBody") {
        let content = body["content"].as_object();
        consumes = Some(content.into_iter().flat_map(Map::keys).map(String::as_str).collect());
        let mut parameter = json!({"in": "body", "name": "body", "schema": schema(content)});
        if body["required"] == true {
            parameter["required"] = true.into();
        }
        parameters.push(parameter);
    }
    if let Some(Value::Array(list)) = operation.remove("parameters") {
        parameters.extend(list.into_iter().map(parameter));
    }
    if !parameters.is_empty() {
        operation.insert("parameters".to_owned(), parameters.into());
    }
    let mut produces = Vec::new();
    if let Some(Value::Object(responses)) = operation.get_mut("responses") {
        for response in responses.values_mut() {
            let Some(content) = response.as_object_mut().and_then(|response| response.remove("content")) else {
                continue;
            };
            produces = content.as_object().into_iter().flat_map(Map::keys).cloned().collect();
            response["schema"] = schema(content.as_object());
        }
    }
    // Discovery says the same of what it reads; the keys of tokens nothing.
    let of_keys = matches!(operation["tags"][0].as_str(), Some("openid" | "WellKnown"));
    let consumes = consumes.or_else(|| (!of_keys).then(|| produces.iter().map(String::as_str).collect()));
    if let Some(consumes) = consumes {
        operation.insert("consumes".to_owned(), consumes);
    }
    operation.insert("produces".to_owned(), produces.into());
    operation.insert("schemes".to_owned(), json!(["https"]));
    Value::Object(operation)
}

/// A parameter's schema is part of it.
fn parameter(mut parameter: Value) -> Value {
    if let Some(map) = parameter.as_object_mut()
        && let Some(Value::Object(schema)) = map.remove("schema")
    {
        map.extend(schema);
    }
    parameter
}

/// All media types of a body have the same schema: a reference, or a text.
fn schema(content: Option<&Map<String, Value>>) -> Value {
    let schema = content.and_then(|content| content.values().next()).map(|body| body["schema"].clone());
    let mut schema = schema.unwrap_or_default();
    let reference = schema["$ref"].as_str().and_then(|text| text.rsplit('/').next()).map(str::to_owned);
    if let Some(name) = reference {
        schema = json!({"$ref": format!("#/definitions/{name}")});
    }
    schema
}
