//! OpenAPI v2: the paths of all v3 documents in its words, and the definitions of all types.

use super::schemas::{Dialect, Schemas};
use super::{AllDocs, Pen, Put, bearer_token, documents, gnostic, info, paths_of, single};
use apimachinery::facts::{self, Docs};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Writes the document as JSON.
pub fn json(pen: &mut Pen) {
    let docs = Docs::inflate();
    let docs = docs.types();
    pen.bytes(b"{\"swagger\":\"2.0\",\"security\":[{\"BearerToken\":[]}],\"info\":");
    pen.value(&info());
    pen.bytes(b",\"securityDefinitions\":");
    pen.value(&bearer_token());
    pen.bytes(b",\"paths\":");
    let types = pen.object(|put| paths(&docs, put));
    pen.bytes(b",\"definitions\":");
    pen.object(|put| definitions(&docs, types, put));
    pen.bytes(b"}");
}

/// Writes the document as protobuf.
pub fn protobuf(pen: &mut Pen) {
    let docs = Docs::inflate();
    let docs = docs.types();
    pen.bytes(&gnostic::head("2.0", &info(), &bearer_token()));
    let types = paths(&docs, &mut |path, item| pen.bytes(&gnostic::path(path, &item)));
    definitions(&docs, types, &mut |name, schema| pen.bytes(&gnostic::definition(name, &schema)));
}

/// All paths; gives the types that they name.
fn paths(docs: &AllDocs<'_>, put: Put<'_>) -> BTreeSet<&'static str> {
    let put: Put<'_> = &mut |path, item| put(path, path_item(item));
    let mut types = BTreeSet::new();
    for (group, version) in versions() {
        types.extend(paths_of(group, version, docs, put));
    }
    types.extend(documents().iter().filter_map(|path| single(path, put)).flatten());
    types
}

fn definitions(docs: &AllDocs<'_>, types: BTreeSet<&'static str>, put: Put<'_>) {
    Schemas::new(Dialect::V2, docs, versions().collect()).each(types, put);
}

/// All groups and versions.
fn versions() -> impl Iterator<Item = (&'static str, &'static str)> {
    facts::groups().iter().flat_map(|group| group.versions.iter().map(|version| (group.name, *version)))
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
