//! The schemas of OpenAPI, made of the facts and their descriptions.

use super::{AllDocs, Put};
use apimachinery::facts::{self, FieldFacts, ListType, Type, TypeDocs, TypeFacts};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Which version of OpenAPI is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    V2,
    V3,
}

/// Makes schemas.
pub struct Schemas<'d> {
    dialect: Dialect,
    docs: &'d AllDocs<'d>,
    /// The groups and versions in which shared kinds (DeleteOptions, WatchEvent) are spoken.
    shared_in: Vec<(&'static str, &'static str)>,
}

/// Types that are no structs: name, and their form in the two dialects.
const SPECIAL: [(&str, &str, &str); 12] = [
    ("api.resource.Quantity", r#"{"type":"string"}"#, r#"{"oneOf":[{"type":"string"},{"type":"number"}]}"#),
    (
        "util.intstr.IntOrString",
        r#"{"type":"string","format":"int-or-string"}"#,
        r#"{"format":"int-or-string","oneOf":[{"type":"integer"},{"type":"string"}]}"#,
    ),
    ("meta.v1.Time", r#"{"type":"string","format":"date-time"}"#, r#"{"type":"string","format":"date-time"}"#),
    ("meta.v1.MicroTime", r#"{"type":"string","format":"date-time"}"#, r#"{"type":"string","format":"date-time"}"#),
    ("meta.v1.FieldsV1", r#"{"type":"object"}"#, r#"{"type":"object"}"#),
    ("meta.v1.Patch", r#"{"type":"object"}"#, r#"{"type":"object"}"#),
    ("runtime.RawExtension", r#"{"type":"object"}"#, r#"{"type":"object"}"#),
    ("apiextensions.v1.JSON", "{}", "{}"),
    ("apiextensions.v1.JSONSchemaPropsOrArray", "{}", "{}"),
    ("apiextensions.v1.JSONSchemaPropsOrBool", "{}", "{}"),
    ("apiextensions.v1.JSONSchemaPropsOrStringArray", "{}", "{}"),
    ("meta.v1.Verbs", "{}", "{}"),
];

/// `core.v1.Pod` → `io.k8s.api.core.v1.Pod`.
pub fn full_name(name: &str) -> String {
    match name.split('.').next().unwrap_or("") {
        "meta" => format!("io.k8s.apimachinery.pkg.apis.{name}"),
        "apiextensions" => format!("io.k8s.apiextensions-apiserver.pkg.apis.{name}"),
        "apiregistration" => format!("io.k8s.kube-aggregator.pkg.apis.{name}"),
        "api" | "util" | "runtime" | "version" => format!("io.k8s.apimachinery.pkg.{name}"),
        _ => format!("io.k8s.api.{name}"),
    }
}

// === impl Dialect ===

impl Dialect {
    pub fn reference(self, name: &str) -> Value {
        let prefix = if self == Self::V2 { "#/definitions/" } else { "#/components/schemas/" };
        json!({"$ref": format!("{prefix}{}", full_name(name))})
    }
}

// === impl Schemas ===

impl<'d> Schemas<'d> {
    pub fn new(dialect: Dialect, docs: &'d AllDocs<'d>, shared_in: Vec<(&'static str, &'static str)>) -> Self {
        Self { dialect, docs, shared_in }
    }

    /// The schemas of types and of all that they refer to go to `put`.
    pub fn each(&self, roots: BTreeSet<&'static str>, put: Put<'_>) {
        let mut pending: Vec<&'static str> = roots.into_iter().collect();
        let mut seen = BTreeSet::new();
        while let Some(name) = pending.pop() {
            if !seen.insert(name) {
                continue;
            }
            let schema = match facts::schema(name) {
                Some(facts) => {
                    pending.extend(facts.fields.iter().filter_map(|field| referred(&field.kind)));
                    self.object(facts)
                }
                None => self.special(name),
            };
            put(&full_name(name), schema);
        }
    }

    fn special(&self, name: &str) -> Value {
        let form = SPECIAL.iter().find(|(special, ..)| *special == name);
        let form = form.map_or("{}", |(_, v2, v3)| if self.dialect == Dialect::V2 { v2 } else { v3 });
        let mut schema: Value = serde_json::from_str(form).unwrap_or_default();
        if let Some(docs) = self.docs.get(name) {
            schema["description"] = docs.description().into();
        }
        schema
    }

    fn object(&self, facts: &'static TypeFacts) -> Value {
        let docs = self.docs.get(facts.name);
        let properties: Map<String, Value> =
            facts.fields.iter().map(|field| (field.name.to_owned(), self.property(field, docs))).collect();
        let required: Vec<&str> = facts.fields.iter().filter(|f| f.required).map(|f| f.name).collect();
        let mut schema = json!({"type": "object"});
        if let Some(docs) = docs {
            let description = docs.description();
            if !description.is_empty() {
                schema["description"] = description.into();
            }
            if let Ok(unions) = serde_json::from_str::<Value>(docs.unions) {
                schema["x-kubernetes-unions"] = unions;
            }
        }
        if !properties.is_empty() {
            schema["properties"] = properties.into();
        }
        if !required.is_empty() {
            schema["required"] = required.into();
        }
        if facts.atomic {
            schema["x-kubernetes-map-type"] = "atomic".into();
        }
        let kind = |group: &str, version: &str, kind: &str| json!({"group": group, "version": version, "kind": kind});
        if matches!(facts.name, "meta.v1.DeleteOptions" | "meta.v1.WatchEvent") {
            let kinds = self.shared_in.iter().map(|(group, version)| kind(group, version, facts.struct_name()));
            schema["x-kubernetes-group-version-kind"] = kinds.collect();
        } else if let Some((group, version, name)) = facts.gvk {
            schema["x-kubernetes-group-version-kind"] = json!([kind(group, version, name)]);
        }
        schema
    }

    fn property(&self, field: &FieldFacts, docs: Option<&TypeDocs<'_>>) -> Value {
        let mut property = self.of(&field.kind);
        let docs = docs.and_then(|docs| docs.field(field.name));
        let marked = |mark: char| docs.is_some_and(|docs| docs.marks.contains(mark));
        let default = match field.default {
            Some(text) => serde_json::from_str::<Value>(text).ok(),
            None => marked('z').then(|| zero(&field.kind)),
        };
        let default = default.filter(|_| self.dialect == Dialect::V3);
        let description = docs.map(|docs| docs.description()).filter(|text| !text.is_empty());
        // In v3 nothing may stand beside a reference.
        if self.dialect == Dialect::V3 && property.get("$ref").is_some() && (default.is_some() || description.is_some())
        {
            property = json!({"allOf": [property]});
        }
        if let Some(default) = default {
            property["default"] = default;
        }
        if let Some(description) = description {
            property["description"] = description.into();
        }
        if marked('l') {
            property["x-kubernetes-list-type"] = match field.list_type {
                ListType::Atomic => "atomic",
                ListType::Set => "set",
                ListType::Map => "map",
            }
            .into();
        }
        if !field.list_keys.is_empty() {
            property["x-kubernetes-list-map-keys"] = json!(field.list_keys);
        }
        if field.atomic || marked('g') {
            property["x-kubernetes-map-type"] = if field.atomic { "atomic" } else { "granular" }.into();
        }
        if let Some(key) = field.merge_key {
            property["x-kubernetes-patch-merge-key"] = key.into();
        }
        let strategies = [
            (field.strategy.merge, "merge"),
            (field.strategy.retain_keys, "retainKeys"),
            (field.strategy.replace, "replace"),
        ];
        let strategies: Vec<&str> = strategies.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
        if !strategies.is_empty() {
            property["x-kubernetes-patch-strategy"] = strategies.join(",").into();
        }
        property
    }

    fn of(&self, kind: &Type) -> Value {
        if let Some(name) = direct(kind) {
            return self.dialect.reference(name);
        }
        match kind {
            Type::Bool => json!({"type": "boolean"}),
            Type::Int32 => json!({"type": "integer", "format": "int32"}),
            Type::Int64 => json!({"type": "integer", "format": "int64"}),
            Type::Double => json!({"type": "number", "format": "double"}),
            Type::Bytes => json!({"type": "string", "format": "byte"}),
            Type::List(item) => json!({"type": "array", "items": self.of(item)}),
            Type::Map(item) => json!({"type": "object", "additionalProperties": self.of(item)}),
            _ => json!({"type": "string"}),
        }
    }
}

/// The type that stands for a value, if it has a name.
fn direct(kind: &Type) -> Option<&'static str> {
    Some(match kind {
        Type::Object(id) => id.facts().name,
        Type::Quantity => "api.resource.Quantity",
        Type::IntOrString => "util.intstr.IntOrString",
        Type::Time => "meta.v1.Time",
        Type::MicroTime => "meta.v1.MicroTime",
        Type::Fields => "meta.v1.FieldsV1",
        Type::Raw => "runtime.RawExtension",
        Type::Json => "apiextensions.v1.JSON",
        Type::SchemaOrList => "apiextensions.v1.JSONSchemaPropsOrArray",
        Type::SchemaOrBool => "apiextensions.v1.JSONSchemaPropsOrBool",
        Type::SchemaOrStrings => "apiextensions.v1.JSONSchemaPropsOrStringArray",
        _ => return None,
    })
}

/// The type that a value refers to, in itself or its items.
fn referred(kind: &Type) -> Option<&'static str> {
    match kind {
        Type::List(item) | Type::Map(item) => referred(item),
        kind => direct(kind),
    }
}

fn zero(kind: &Type) -> Value {
    match kind {
        Type::Bool => false.into(),
        Type::Int32 | Type::Int64 | Type::Double => 0.into(),
        Type::String | Type::Bytes => "".into(),
        _ => json!({}),
    }
}
