//! The OpenAPI v3 documents, made from the facts: enough of paths for clients to find a kind's resource and which parameters
//! it takes, and the schemas that `kubectl explain` and client-side checks read. One document a group and version.

use crate::server::body::Body;
use crate::server::respond;
use apimachinery::facts::{self, FieldFacts, KindFacts, ListType, Type, TypeFacts};
use bytes::Bytes;
use http::Response;
use http::header::{ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{LazyLock, OnceLock};

/// Documents by what follows `/openapi/v3/`: `api/v1`, `apis/apps/v1`. Each is made when first asked for.
static DOCUMENTS: LazyLock<BTreeMap<String, Lazy>> = LazyLock::new(documents);
static V2: OnceLock<Document> = OnceLock::new();

struct Lazy {
    group: &'static str,
    version: &'static str,
    made: OnceLock<Document>,
}

struct Document {
    bytes: Bytes,
    etag: String,
}

/// The document at a path below `/openapi`; None if there is none.
pub fn document(path: &str, headers: &HeaderMap) -> Option<Response<Body>> {
    let path = path.trim_end_matches('/');
    if path == "/openapi/v3" {
        return Some(respond::plain(200, "application/json", Body::from(index().to_string())));
    }
    let document = if path == "/openapi/v2" {
        V2.get_or_init(|| Document::of(&v2()))
    } else {
        let lazy = DOCUMENTS.get(path.strip_prefix("/openapi/v3/")?)?;
        lazy.made.get_or_init(|| Document::of(&v3(lazy.group, lazy.version)))
    };
    let etag = HeaderValue::from_str(&document.etag).ok();
    let mut response = if etag.is_some() && headers.get(IF_NONE_MATCH) == etag.as_ref() {
        respond::plain(304, "application/json", Body::Empty)
    } else {
        respond::plain(200, "application/json", Body::Full(document.bytes.clone()))
    };
    if let Some(etag) = etag {
        response.headers_mut().insert(ETAG, etag);
    }
    Some(response)
}

impl Document {
    fn of(document: &Value) -> Self {
        let bytes = Bytes::from(document.to_string());
        let hash: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02X}")).collect();
        Self { bytes, etag: format!("\"{hash}\"") }
    }
}

fn documents() -> BTreeMap<String, Lazy> {
    let mut documents = BTreeMap::new();
    for group in facts::groups() {
        for version in &group.versions {
            let path = root_path(group.name, version).trim_start_matches('/').to_owned();
            documents.insert(path, Lazy { group: group.name, version, made: OnceLock::new() });
        }
    }
    documents
}

/// The hash in an address must change with the document; the version of the server does that for all of them.
fn index() -> Value {
    let paths: Map<String, Value> = DOCUMENTS
        .keys()
        .map(|path| {
            let url = format!("/openapi/v3/{path}?hash={}", crate::KUBERNETES_VERSION);
            (path.clone(), json!({"serverRelativeURL": url}))
        })
        .collect();
    json!({ "paths": paths })
}

fn root_path(group: &str, version: &str) -> String {
    if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") }
}

fn info() -> Value {
    json!({"title": "Kubernetes", "version": crate::KUBERNETES_VERSION})
}

// === paths ===

fn v3(group: &str, version: &str) -> Value {
    let (mut paths, mut schemas) = (Map::new(), Schemas { prefix: "#/components/schemas/", ..Schemas::default() });
    for kind in facts::kinds().iter().filter(|kind| kind.group == group && kind.version == version) {
        if let Some(schema) = facts::schema_of(kind.group, kind.version, kind.kind) {
            schemas.add(schema);
            add_paths(kind, &schema_name(schema.name), &mut paths);
        }
    }
    if let Some(options) = facts::schema("meta.v1.DeleteOptions") {
        schemas.add(options);
    }
    json!({"openapi": "3.0.0", "info": info(), "paths": paths, "components": {"schemas": schemas.finished}})
}

/// The schemas of all kinds, without paths: what old clients read of v2.
fn v2() -> Value {
    let mut schemas = Schemas { prefix: "#/definitions/", ..Schemas::default() };
    for kind in facts::kinds() {
        if let Some(schema) = facts::schema_of(kind.group, kind.version, kind.kind) {
            schemas.add(schema);
        }
    }
    json!({"swagger": "2.0", "info": info(), "paths": {}, "definitions": schemas.finished})
}

fn add_paths(kind: &KindFacts, schema: &str, paths: &mut Map<String, Value>) {
    let root = root_path(kind.group, kind.version);
    let collection = if kind.namespaced {
        format!("{root}/namespaces/{{namespace}}/{}", kind.resource)
    } else {
        format!("{root}/{}", kind.resource)
    };
    let gvk = json!({"group": kind.group, "version": kind.version, "kind": kind.kind});
    let content = json!({"application/json": {"schema": {"$ref": format!("#/components/schemas/{schema}")}}});
    let operation = |action: &str, takes_body: bool, parameters: &[&str]| {
        let parameters: Vec<Value> = parameters.iter().map(|name| query_parameter(name)).collect();
        let mut operation = json!({
            "responses": {"200": {"description": "OK", "content": content}},
            "parameters": parameters,
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": gvk,
        });
        if takes_body {
            operation["requestBody"] = json!({"content": content});
        }
        operation
    };
    const WRITE: [&str; 3] = ["dryRun", "fieldManager", "fieldValidation"];
    let list =
        ["allowWatchBookmarks", "continue", "fieldSelector", "labelSelector", "limit", "resourceVersion", "watch"];
    let mut on_collection = json!({});
    let mut on_object = json!({});
    for verb in &kind.verbs {
        match *verb {
            "list" => on_collection["get"] = operation("list", false, &list),
            "create" => on_collection["post"] = operation("post", true, &WRITE),
            "deletecollection" => {
                on_collection["delete"] =
                    operation("deletecollection", false, &["dryRun", "fieldSelector", "labelSelector"]);
            }
            "get" => on_object["get"] = operation("get", false, &[]),
            "update" => on_object["put"] = operation("put", true, &WRITE),
            "patch" => {
                let mut patch = operation("patch", false, &["dryRun", "fieldManager", "fieldValidation", "force"]);
                let body = json!({"schema": {"type": "object"}});
                let types = [
                    "application/json-patch+json",
                    "application/merge-patch+json",
                    "application/strategic-merge-patch+json",
                ];
                patch["requestBody"] =
                    json!({"content": types.iter().map(|t| ((*t).to_owned(), body.clone())).collect::<Map<_, _>>()});
                on_object["patch"] = patch;
            }
            "delete" => {
                on_object["delete"] =
                    operation("delete", false, &["dryRun", "gracePeriodSeconds", "propagationPolicy"]);
            }
            _ => {}
        }
    }
    let path_parameter =
        |name: &str| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}});
    let mut outer = Vec::new();
    if kind.namespaced {
        outer.push(path_parameter("namespace"));
    }
    let mut inner = outer.clone();
    inner.push(path_parameter("name"));
    if !outer.is_empty() {
        on_collection["parameters"] = outer.into();
    }
    let has_object_verbs = on_object.as_object().is_some_and(|map| !map.is_empty());
    if has_object_verbs {
        on_object["parameters"] = inner.into();
        paths.insert(format!("{collection}/{{name}}"), on_object);
    }
    paths.insert(collection, on_collection);
}

fn query_parameter(name: &str) -> Value {
    let kind = match name {
        "limit" | "gracePeriodSeconds" => "integer",
        "watch" | "allowWatchBookmarks" | "force" => "boolean",
        _ => "string",
    };
    json!({"name": name, "in": "query", "schema": {"type": kind, "uniqueItems": true}})
}

// === schemas ===

#[derive(Default)]
struct Schemas {
    prefix: &'static str,
    finished: Map<String, Value>,
    seen: BTreeSet<&'static str>,
}

/// `core.v1.Pod` → `io.k8s.api.core.v1.Pod`.
fn schema_name(name: &str) -> String {
    match name.split('.').next().unwrap_or("") {
        "meta" => format!("io.k8s.apimachinery.pkg.apis.{name}"),
        "apiextensions" => format!("io.k8s.apiextensions-apiserver.pkg.apis.{name}"),
        "apiregistration" => format!("io.k8s.kube-aggregator.pkg.apis.{name}"),
        _ => format!("io.k8s.api.{name}"),
    }
}

// === impl Schemas ===

impl Schemas {
    /// Adds a type and all that it refers to.
    fn add(&mut self, root: &'static TypeFacts) {
        let mut pending = vec![root];
        while let Some(facts) = pending.pop() {
            if !self.seen.insert(facts.name) {
                continue;
            }
            let mut properties = Map::new();
            for field in &facts.fields {
                properties.insert(field.name.to_owned(), self.property(field));
                pending.extend(field.kind.object());
                if matches!(field.kind, Type::SchemaOrBool | Type::SchemaOrList | Type::SchemaOrStrings) {
                    pending.extend(facts::schema("apiextensions.v1.JSONSchemaProps"));
                }
            }
            let required: Vec<&str> = facts.fields.iter().filter(|f| f.required).map(|f| f.name).collect();
            let mut schema = json!({"type": "object"});
            if !properties.is_empty() {
                schema["properties"] = properties.into();
            }
            if !required.is_empty() {
                schema["required"] = required.into();
            }
            if let Some((group, version, kind)) = facts.gvk {
                schema["x-kubernetes-group-version-kind"] = json!([{"group": group, "version": version, "kind": kind}]);
            }
            self.finished.insert(schema_name(facts.name), schema);
        }
    }

    fn property(&self, field: &FieldFacts) -> Value {
        let mut property = self.of(&field.kind);
        if let Type::List(_) = field.kind {
            property["x-kubernetes-list-type"] = match field.list_type {
                ListType::Atomic => "atomic".into(),
                ListType::Set => "set".into(),
                ListType::Map => "map".into(),
            };
            if !field.list_keys.is_empty() {
                property["x-kubernetes-list-map-keys"] = json!(field.list_keys);
            }
        }
        if let Some(key) = field.merge_key {
            property["x-kubernetes-patch-merge-key"] = key.into();
        }
        let strategies = [
            (field.strategy.merge, "merge"),
            (field.strategy.replace, "replace"),
            (field.strategy.retain_keys, "retainKeys"),
        ];
        let strategies: Vec<&str> = strategies.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
        if !strategies.is_empty() {
            property["x-kubernetes-patch-strategy"] = strategies.join(",").into();
        }
        if let Some(default) = field.default.and_then(|text| serde_json::from_str::<Value>(text).ok())
            && property.get("$ref").is_none()
        {
            property["default"] = default;
        }
        property
    }

    fn of(&self, kind: &Type) -> Value {
        match kind {
            Type::String => json!({"type": "string"}),
            Type::Bool => json!({"type": "boolean"}),
            Type::Int32 => json!({"type": "integer", "format": "int32"}),
            Type::Int64 => json!({"type": "integer", "format": "int64"}),
            Type::Double => json!({"type": "number", "format": "double"}),
            Type::Bytes => json!({"type": "string", "format": "byte"}),
            Type::Time | Type::MicroTime => json!({"type": "string", "format": "date-time"}),
            Type::Quantity => json!({"type": "string"}),
            Type::IntOrString => json!({"type": "string", "format": "int-or-string"}),
            Type::Raw | Type::Fields => json!({"type": "object"}),
            Type::Json | Type::SchemaOrBool | Type::SchemaOrList | Type::SchemaOrStrings => json!({}),
            Type::Object(id) => json!({"$ref": format!("{}{}", self.prefix, schema_name(id.facts().name))}),
            Type::List(item) => json!({"type": "array", "items": self.of(item)}),
            Type::Map(item) => json!({"type": "object", "additionalProperties": self.of(item)}),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_says_that_it_takes_field_validation() {
        let document = v3("apps", "v1");
        let patch = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
        assert_eq!(patch["x-kubernetes-group-version-kind"]["kind"], "Deployment");
        let names: Vec<&str> =
            patch["parameters"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
        assert!(names.contains(&"fieldValidation"));
    }

    #[test]
    fn every_reference_leads_somewhere() {
        for (path, lazy) in &*DOCUMENTS {
            let document = v3(lazy.group, lazy.version);
            let text = document.to_string();
            for part in text.split("\"$ref\":\"#/components/schemas/").skip(1) {
                let name = part.split('"').next().unwrap();
                assert!(document["components"]["schemas"].get(name).is_some(), "{path}: {name}");
            }
        }
    }

    #[test]
    fn the_index_names_every_group_and_version() {
        let index = index();
        for path in ["api/v1", "apis/apps/v1", "apis/rbac.authorization.k8s.io/v1"] {
            assert!(index["paths"][path]["serverRelativeURL"].as_str().unwrap().starts_with("/openapi/v3/"), "{path}");
        }
    }
}
