//! The paths of OpenAPI v3: what can be asked of each kind, in what words and with which parameters.

use super::schemas::Dialect;
use super::{AllDocs, Put};
use apimachinery::facts::{KindFacts, SubresourceFacts};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

pub const OBJECT_TYPES: [&str; 3] = ["application/json", "application/vnd.kubernetes.protobuf", "application/yaml"];
const STREAM_TYPES: [&str; 2] = ["application/json;stream=watch", "application/vnd.kubernetes.protobuf;stream=watch"];
const PATCH_TYPES: [&str; 4] = [
    "application/apply-patch+yaml",
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
];
const LIST: [&str; 12] = [
    "allowWatchBookmarks",
    "continue",
    "fieldSelector",
    "labelSelector",
    "limit",
    "pretty",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "shardSelector",
    "timeoutSeconds",
    "watch",
];
const DELETE_COLLECTION: [&str; 15] = [
    "continue",
    "dryRun",
    "fieldSelector",
    "gracePeriodSeconds",
    "ignoreStoreReadErrorWithClusterBreakingPotential",
    "labelSelector",
    "limit",
    "orphanDependents",
    "pretty",
    "propagationPolicy",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "shardSelector",
    "timeoutSeconds",
];
const DELETE: [&str; 6] = [
    "dryRun",
    "gracePeriodSeconds",
    "ignoreStoreReadErrorWithClusterBreakingPotential",
    "orphanDependents",
    "pretty",
    "propagationPolicy",
];
const WRITE: [&str; 4] = ["dryRun", "fieldManager", "fieldValidation", "pretty"];
const PATCH: [&str; 5] = ["dryRun", "fieldManager of patch", "fieldValidation", "force", "pretty"];
const GET: [&str; 1] = ["pretty"];

/// The paths of a group and version, given away as they are made, and the types that they name.
pub struct Paths<'d> {
    root: String,
    /// `AppsV1`, within operation ids.
    camel: String,
    tag: String,
    docs: &'d AllDocs<'d>,
    put: Put<'d>,
    pub types: BTreeSet<&'static str>,
}

/// What an operation is, before it is written down.
struct Operation {
    /// The HTTP method.
    method: &'static str,
    action: &'static str,
    id: String,
    description: String,
    parameters: Vec<Value>,
    body: Option<Value>,
    responses: Vec<(&'static str, Value)>,
    /// Group, version and kind that it speaks.
    speaks: (&'static str, &'static str, &'static str),
}

/// What a kind is called in `x-kubernetes-group-version-kind`, and its type.
struct Spoken {
    gvk: (&'static str, &'static str, &'static str),
    schema: &'static str,
}

/// `rbac.authorization.k8s.io` → `rbacAuthorization`.
fn group_words(group: &str) -> String {
    let mut words = group.trim_end_matches(".k8s.io").split('.');
    let first = words.next().filter(|word| !word.is_empty()).unwrap_or("core").to_owned();
    words.fold(first, |all, word| all + &capital(word))
}

fn capital(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map(|first| first.to_ascii_uppercase().to_string() + chars.as_str()).unwrap_or_default()
}

/// ` a Deployment`, ` an Event`, ` Endpoints`.
fn with_article(noun: &str) -> String {
    if noun.ends_with('s') && !noun.ends_with("ss") {
        return format!(" {noun}");
    }
    let vowel = noun.starts_with(['a', 'e', 'i', 'o', 'u', 'A', 'E', 'I', 'O', 'U']);
    format!(" {} {noun}", if vowel { "an" } else { "a" })
}

fn content(types: &[&str], schema: &Value) -> Value {
    types.iter().map(|kind| ((*kind).to_owned(), json!({"schema": schema}))).collect::<Map<_, _>>().into()
}

/// A document that one GET answers: discovery, version, keys.
pub fn single(path: &str, id: &str, description: &str, tag: &str, types: &[&str], schema: &Value) -> (String, Value) {
    let ok = json!({"description": "OK", "content": content(types, schema)});
    let operation = json!({
        "description": description,
        "operationId": id,
        "responses": {"200": ok, "401": {"description": "Unauthorized"}},
        "tags": [tag],
    });
    (path.to_owned(), json!({"get": operation}))
}

/// The document of a group.
pub fn group(group: &str) -> (String, Value) {
    let words = group_words(group);
    let id = format!("get{}APIGroup", capital(&words));
    let schema = Dialect::V3.reference("meta.v1.APIGroup");
    single(&format!("/apis/{group}/"), &id, "get information of a group", &words, &OBJECT_TYPES, &schema)
}

// === impl Paths ===

impl<'d> Paths<'d> {
    pub fn new(root: &str, group: &str, version: &str, docs: &'d AllDocs<'d>, put: Put<'d>) -> Self {
        let words = group_words(group);
        let mut paths = Self {
            root: root.to_owned(),
            camel: capital(&words) + &capital(version),
            tag: format!("{words}_{version}"),
            docs,
            put,
            types: BTreeSet::new(),
        };
        let schema = paths.reference("meta.v1.APIResourceList");
        let id = format!("get{}APIResources", paths.camel);
        let (path, item) =
            single(&format!("{root}/"), &id, "get available resources", &paths.tag, &OBJECT_TYPES, &schema);
        (paths.put)(&path, item);
        paths
    }

    /// Everything that can be asked of a kind.
    pub fn add(&mut self, kind: &'static KindFacts) {
        let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
        let collection = format!("{}{scope}/{}", self.root, kind.resource);
        let item = format!("{collection}/{{name}}");
        let spoken = Spoken { gvk: (kind.group, kind.version, kind.kind), schema: kind.schema };
        let on = |verb: &str| kind.verbs.contains(&verb);

        let mut operations = Vec::new();
        if on("list") {
            operations.push(self.list(kind, self.name(kind, "list", "", "")));
        }
        if on("create") {
            let description = format!("create{}", with_article(kind.kind));
            operations.push(self.create(&spoken, self.name(kind, "create", "", ""), description));
        }
        if on("deletecollection") {
            operations.push(self.delete_collection(kind));
        }
        self.write(&collection, kind.kind, operations);
        if kind.namespaced && on("list") {
            let id = format!("list{}{}ForAllNamespaces", self.camel, kind.kind);
            let operations = vec![self.list(kind, id)];
            self.write(&format!("{}/{}", self.root, kind.resource), kind.kind, operations);
        }

        let mut operations = self.object_operations(kind, &spoken, "", &kind.verbs);
        if on("delete") {
            operations.push(self.delete(kind));
        }
        self.write(&item, kind.kind, operations);
        for sub in &kind.subresources {
            self.subresource(kind, sub, &item);
        }
        if on("watch") {
            self.watches(kind, &collection, &item);
        }
    }

    /// `createAppsV1NamespacedDeployment`.
    fn name(&self, kind: &KindFacts, verb: &str, before: &str, behind: &str) -> String {
        let scope = if kind.namespaced { "Namespaced" } else { "" };
        format!("{verb}{}{before}{scope}{}{behind}", self.camel, kind.kind)
    }

    fn reference(&mut self, name: &'static str) -> Value {
        self.types.insert(name);
        Dialect::V3.reference(name)
    }

    fn parameters(&self, names: &[&str]) -> Vec<Value> {
        let docs = self.docs.get("parameters");
        names.iter().filter_map(|name| docs?.field(name).map(parameter)).collect()
    }

    fn answer(&mut self, code: &'static str, schema: &Value) -> (&'static str, Value) {
        let description = match code {
            "200" => "OK",
            "201" => "Created",
            _ => "Accepted",
        };
        (code, json!({"description": description, "content": content(&OBJECT_TYPES, schema)}))
    }

    fn list(&mut self, kind: &'static KindFacts, id: String) -> Operation {
        let list = apimachinery::facts::schema_of(kind.group, kind.version, &format!("{}List", kind.kind));
        let schema = list.map_or(Value::Null, |facts| self.reference(facts.name));
        let or_watch = if kind.verbs.contains(&"watch") { " or watch" } else { "" };
        Operation {
            method: "get",
            action: "list",
            id,
            description: format!("list{or_watch} objects of kind {}", kind.kind),
            parameters: self.parameters(&LIST),
            body: None,
            responses: vec![("200", streamed(&schema))],
            speaks: (kind.group, kind.version, kind.kind),
        }
    }

    fn create(&mut self, spoken: &Spoken, id: String, description: String) -> Operation {
        let schema = self.reference(spoken.schema);
        let codes = ["200", "201", "202"];
        Operation {
            method: "post",
            action: "post",
            id,
            description,
            parameters: self.parameters(&WRITE),
            body: Some(json!({"content": {"*/*": {"schema": schema}}, "required": true})),
            responses: codes.iter().map(|code| self.answer(code, &schema)).collect(),
            speaks: spoken.gvk,
        }
    }

    fn delete_collection(&mut self, kind: &'static KindFacts) -> Operation {
        let schema = self.reference("meta.v1.Status");
        Operation {
            method: "delete",
            action: "deletecollection",
            id: self.name(kind, "delete", "Collection", ""),
            description: format!("delete collection of {}", kind.kind),
            parameters: self.parameters(&DELETE_COLLECTION),
            body: Some(self.delete_options()),
            responses: vec![self.answer("200", &schema)],
            speaks: (kind.group, kind.version, kind.kind),
        }
    }

    fn delete(&mut self, kind: &'static KindFacts) -> Operation {
        let answers = if crate::endpoints::delete::returns_object(kind) { kind.schema } else { "meta.v1.Status" };
        let schema = self.reference(answers);
        Operation {
            method: "delete",
            action: "delete",
            id: self.name(kind, "delete", "", ""),
            description: format!("delete{}", with_article(kind.kind)),
            parameters: self.parameters(&DELETE),
            body: Some(self.delete_options()),
            responses: ["200", "202"].iter().map(|code| self.answer(code, &schema)).collect(),
            speaks: (kind.group, kind.version, kind.kind),
        }
    }

    fn delete_options(&mut self) -> Value {
        json!({"content": {"*/*": {"schema": self.reference("meta.v1.DeleteOptions")}}})
    }

    /// get, put and patch of an object or of a part of it.
    fn object_operations(
        &mut self,
        kind: &'static KindFacts,
        spoken: &Spoken,
        sub: &str,
        verbs: &[&'static str],
    ) -> Vec<Operation> {
        let of = if sub.is_empty() { String::new() } else { format!("{sub} of ") };
        let mut operations = Vec::new();
        let schema = Dialect::V3.reference(spoken.schema);
        for verb in verbs {
            let (method, word, parameters, codes): (_, _, &[&str], &[&'static str]) = match *verb {
                "get" => ("get", "read", &GET, &["200"]),
                "update" => ("put", "replace", &WRITE, &["200", "201"]),
                "patch" => ("patch", "partially update", &PATCH, &["200", "201"]),
                _ => continue,
            };
            self.types.insert(spoken.schema);
            let body = match method {
                "put" => Some(json!({"content": {"*/*": {"schema": schema}}, "required": true})),
                "patch" => {
                    let patch = self.reference("meta.v1.Patch");
                    Some(json!({"content": content(&PATCH_TYPES, &patch), "required": true}))
                }
                _ => None,
            };
            operations.push(Operation {
                method,
                action: method,
                id: self.name(kind, if method == "patch" { "patch" } else { word }, "", &capital(sub)),
                description: format!("{word} {of}the specified {}", kind.kind),
                parameters: self.parameters(parameters),
                body,
                responses: codes.iter().map(|code| self.answer(code, &schema)).collect(),
                speaks: spoken.gvk,
            });
        }
        operations
    }

    fn subresource(&mut self, kind: &'static KindFacts, sub: &'static SubresourceFacts, item: &str) {
        let path = format!("{item}/{}", sub.name);
        if sub.kind.ends_with("Options") {
            return self.connect(kind, sub, &path);
        }
        if sub.name == "log" {
            return self.log(kind, &path);
        }
        let schema = apimachinery::facts::schema_of(sub.group, sub.version, sub.kind).map_or("", |facts| facts.name);
        let spoken = Spoken { gvk: (sub.group, sub.version, sub.kind), schema };
        let mut operations = self.object_operations(kind, &spoken, sub.name, &sub.verbs);
        if sub.verbs.contains(&"create") {
            let description = format!("create {} of{}", sub.name, with_article(kind.kind));
            let id = self.name(kind, "create", "", &capital(sub.name));
            operations.push(self.create(&spoken, id, description));
        }
        self.write(&path, sub.kind, operations);
    }

    fn log(&mut self, kind: &'static KindFacts, path: &str) {
        let types: Vec<&str> = OBJECT_TYPES.into_iter().chain(["text/plain"]).collect();
        let ok = json!({"description": "OK", "content": content(&types, &json!({"type": "string"}))});
        let operation = Operation {
            method: "get",
            action: "get",
            id: self.name(kind, "read", "", "Log"),
            description: format!("read log of the specified {}", kind.kind),
            parameters: self.options("PodLogOptions"),
            body: None,
            responses: vec![("200", ok)],
            speaks: (kind.group, kind.version, kind.kind),
        };
        self.write(path, kind.kind, vec![operation]);
    }

    fn options(&self, kind: &str) -> Vec<Value> {
        self.docs.get(kind).into_iter().flat_map(|docs| &docs.fields).map(parameter).collect()
    }

    /// Streams and proxied requests.
    fn connect(&mut self, kind: &'static KindFacts, sub: &'static SubresourceFacts, path: &str) {
        let methods: &[&'static str] = match sub.name {
            "proxy" => &["delete", "get", "head", "options", "patch", "post", "put"],
            _ => &["get", "post"],
        };
        let ends: &[(&str, &str)] =
            if sub.name == "proxy" { &[("", ""), ("/{path}", "WithPath")] } else { &[("", "")] };
        for (end, suffix) in ends {
            let mut operations = Vec::new();
            for method in methods {
                let mut parameters = self.options(sub.kind);
                if !end.is_empty() {
                    parameters.push(path_parameter("path", "path to the resource"));
                }
                let scope = if kind.namespaced { "Namespaced" } else { "" };
                let (camel, verb, name) = (&self.camel, capital(method), capital(sub.name));
                let any = json!({"*/*": {"schema": {"type": "string"}}});
                operations.push(Operation {
                    method,
                    action: "connect",
                    id: format!("connect{camel}{verb}{scope}{}{name}{suffix}", kind.kind),
                    description: format!("connect {} requests to {} of {}", method.to_uppercase(), sub.name, kind.kind),
                    parameters,
                    body: None,
                    responses: vec![("200", json!({"description": "OK", "content": any}))],
                    speaks: (sub.group, sub.version, sub.kind),
                });
            }
            self.write(&format!("{path}{end}"), sub.kind, operations);
        }
    }

    /// The paths below `/watch/`.
    fn watches(&mut self, kind: &'static KindFacts, collection: &str, item: &str) {
        const LIST_NOTE: &str = "deprecated: use the 'watch' parameter with a list operation instead";
        let schema = self.reference("meta.v1.WatchEvent");
        let watch = |path: &str| path.replacen(&self.root, &format!("{}/watch", self.root), 1);
        let many = format!("watch individual changes to a list of {}. {LIST_NOTE}.", kind.kind);
        let one = format!(
            "watch changes to an object of kind {}. {LIST_NOTE}, filtered to a single item with the 'fieldSelector' parameter.",
            kind.kind
        );
        let mut all = vec![
            (watch(collection), "watchlist", self.name(kind, "watch", "", "List"), many.clone()),
            (watch(item), "watch", self.name(kind, "watch", "", ""), one),
        ];
        if kind.namespaced {
            let id = format!("watch{}{}ListForAllNamespaces", self.camel, kind.kind);
            all.push((format!("{}/watch/{}", self.root, kind.resource), "watchlist", id, many));
        }
        for (path, action, id, description) in all {
            let operation = Operation {
                method: "get",
                action,
                id,
                description,
                parameters: self.parameters(&LIST),
                body: None,
                responses: vec![("200", streamed(&schema))],
                speaks: (kind.group, kind.version, kind.kind),
            };
            self.write(&path, kind.kind, vec![operation]);
        }
    }

    /// Writes operations down. Parameters that all of them share stand once, beside them.
    fn write(&mut self, path: &str, name_of: &str, operations: Vec<Operation>) {
        let Some(first) = operations.first() else { return };
        let mut shared: Vec<Value> = first
            .parameters
            .iter()
            .filter(|parameter| operations.iter().all(|operation| operation.parameters.contains(parameter)))
            .cloned()
            .collect();
        let mut item = Map::new();
        for mut operation in operations {
            operation.parameters.retain(|parameter| !shared.contains(parameter));
            item.insert(operation.method.to_owned(), operation.finished(&self.tag));
        }
        if path.contains("{name}") {
            shared.push(path_parameter("name", &format!("name of the {name_of}")));
        }
        if path.contains("{namespace}") {
            shared.push(path_parameter("namespace", "object name and auth scope, such as for teams and projects"));
        }
        shared
            .sort_by(|a, b| a["name"].as_str().cmp(&b["name"].as_str()).then(a["in"].as_str().cmp(&b["in"].as_str())));
        if !shared.is_empty() {
            item.insert("parameters".to_owned(), shared.into());
        }
        (self.put)(path, item.into());
    }
}

// === impl Operation ===

impl Operation {
    fn finished(self, tag: &str) -> Value {
        let (group, version, kind) = self.speaks;
        let mut responses: Map<String, Value> =
            self.responses.into_iter().map(|(code, response)| (code.to_owned(), response)).collect();
        responses.insert("401".to_owned(), json!({"description": "Unauthorized"}));
        let mut operation = json!({
            "description": self.description,
            "operationId": self.id,
            "responses": responses,
            "tags": [tag],
            "x-kubernetes-action": self.action,
            "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
        });
        if !self.parameters.is_empty() {
            operation["parameters"] = self.parameters.into();
        }
        if let Some(body) = self.body {
            operation["requestBody"] = body;
        }
        operation
    }
}

fn streamed(schema: &Value) -> Value {
    let types: Vec<&str> = OBJECT_TYPES.into_iter().chain(STREAM_TYPES).collect();
    json!({"description": "OK", "content": content(&types, schema)})
}

fn parameter(docs: &apimachinery::facts::FieldDocs<'_>) -> Value {
    let name = docs.name.split(' ').next().unwrap_or(docs.name);
    let schema = json!({"type": docs.marks, "uniqueItems": true});
    json!({"name": name, "in": "query", "description": docs.description(), "schema": schema})
}

fn path_parameter(name: &str, description: &str) -> Value {
    let schema = json!({"type": "string", "uniqueItems": true});
    json!({"name": name, "in": "path", "description": description, "required": true, "schema": schema})
}
