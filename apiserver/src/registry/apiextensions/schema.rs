//! Schemas of custom resources: what of OpenAPI may stand in one, how lists and maps are merged, and the rules in them.
//! As `ValidateCustomResourceDefinitionOpenAPISchema`.

use super::structural;
use crate::registry::cel;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{list, text};
use apimachinery::cel::{Env, Type};
use serde_json::Value;
use std::collections::HashSet;

const TYPES: [&str; 6] = ["array", "boolean", "integer", "number", "object", "string"];
const REASONS: [&str; 4] = ["FieldValueDuplicate", "FieldValueForbidden", "FieldValueInvalid", "FieldValueRequired"];
/// What of a schema's root is not lost when its status is validated alone: our name, and the one that messages show.
const AT_ROOT: [(&str, &str); 22] = [
    ("description", "Description"),
    ("type", "Type"),
    ("format", "Format"),
    ("title", "Title"),
    ("maximum", "Maximum"),
    ("exclusiveMaximum", "ExclusiveMaximum"),
    ("minimum", "Minimum"),
    ("exclusiveMinimum", "ExclusiveMinimum"),
    ("maxLength", "MaxLength"),
    ("minLength", "MinLength"),
    ("pattern", "Pattern"),
    ("maxItems", "MaxItems"),
    ("minItems", "MinItems"),
    ("uniqueItems", "UniqueItems"),
    ("multipleOf", "MultipleOf"),
    ("required", "Required"),
    ("items", "Items"),
    ("properties", "Properties"),
    ("externalDocs", "ExternalDocs"),
    ("example", "Example"),
    ("x-kubernetes-preserve-unknown-fields", "XPreserveUnknownFields"),
    ("x-kubernetes-validations", "XValidations"),
];

/// Where in an object a schema applies.
#[derive(Clone, Copy, Default)]
struct Place<'a> {
    root: bool,
    inside_meta: bool,
    /// Why there may be no defaults.
    no_defaults: Option<&'a str>,
}

/// A version's `schema`, or the one of all versions. `known` are the expressions that the old object held.
pub fn validate(schema: &Field<'_, '_>, has_status: bool, known: &HashSet<String>, errors: &mut Errors) {
    let root = schema.at("openAPIV3Schema");
    if !root.is_set() {
        return;
    }
    if has_status {
        root_for_status(&root, errors);
    }
    if root.at("nullable").bool() {
        errors.forbidden(&root.at("nullable"), "nullable cannot be true at the root");
    }
    let structural = structural::validate(&root);
    let is_structural = structural.is_empty();
    errors.0.extend(structural);
    let mut walk = Walk { known, parse: is_structural, errors };
    walk.schema(&root, Place { root: true, ..Place::default() });
}

fn root_for_status(root: &Field<'_, '_>, errors: &mut Errors) {
    if !matches!(root.at("type").str(), "" | "object") {
        let why =
            "only \"object\" is allowed as the type at the root of the schema if the status subresource is enabled";
        errors.invalid(&root.at("type"), why);
    }
    let empty = |value: &Value| matches!(value, Value::Null | Value::Bool(false)) || *value == "";
    let mut fields = root.value.as_object().into_iter().flatten().filter(|(_, value)| !empty(value));
    if fields.any(|(name, _)| !AT_ROOT.iter().any(|(allowed, _)| allowed == name)) {
        let allowed = AT_ROOT.map(|(_, shown)| shown).join(" ");
        let why = "fields are allowed at the root of the schema if the status subresource is enabled";
        errors.invalid(root, format!("only [{allowed}] {why}"));
    }
}

/// The walk through a schema.
struct Walk<'a> {
    known: &'a HashSet<String>,
    /// Are expressions parsed? Not in schemas that are wrong themselves.
    parse: bool,
    errors: &'a mut Errors,
}

impl Walk<'_> {
    fn schema(&mut self, schema: &Field<'_, '_>, place: Place<'_>) {
        if !schema.is_set() {
            return;
        }
        self.vocabulary(schema, place);
        let (additional, properties) = (schema.at("additionalProperties"), schema.at("properties"));
        if additional.is_set() && !properties.is_empty() && additional.value != &Value::Bool(true) {
            self.errors.forbidden(&additional, "additionalProperties and properties are mutual exclusive");
        }
        let inner = Place { root: false, ..place };
        if additional.value.is_object() {
            let why = "inside additionalProperties applying to object metadata";
            let no_defaults = if place.inside_meta { Some(why) } else { place.no_defaults };
            self.schema(&additional, Place { no_defaults, ..inner });
        }
        let embedded = structural::is_embedded(schema.value);
        for (name, property) in properties.entries() {
            let meta = (place.root || embedded) && matches!(name, "metadata" | "kind" | "apiVersion");
            let top = format!("in top-level {name}");
            let no_defaults = if meta && place.root { Some(top.as_str()) } else { place.no_defaults };
            self.schema(&property, Place { inside_meta: meta || place.inside_meta, no_defaults, root: false });
        }
        self.schema(&schema.at("not"), inner);
        for group in ["allOf", "oneOf", "anyOf"] {
            schema.at(group).items().for_each(|item| self.schema(&item, inner));
        }
        let items = schema.at("items");
        if items.value.is_object() {
            self.schema(&items, inner);
        }
        self.merging(schema);
        schema.at("x-kubernetes-validations").items().for_each(|rule| self.rule(&rule, schema.value));
    }

    /// What of OpenAPI there is, and is not. As `specStandardValidatorV3`.
    fn vocabulary(&mut self, schema: &Field<'_, '_>, place: Place<'_>) {
        const MISSING: [&str; 6] =
            ["id", "additionalItems", "patternProperties", "definitions", "dependencies", "$ref"];
        let (kind, errors) = (schema.at("type"), &mut *self.errors);
        if !kind.is_blank() && !TYPES.contains(&kind.str()) {
            errors.not_supported(&kind, &TYPES);
        }
        if let Some(why) = place.no_defaults
            && schema.value.get("default").is_some()
        {
            errors.forbidden(&schema.at("default"), format!("must not be set {why}"));
        }
        for name in MISSING {
            let field = schema.at(name);
            if field.is_set() && !(field.value.is_object() && field.is_empty()) && field.value != "" {
                errors.forbidden(&field, format!("{name} is not supported"));
            }
        }
        if kind.str() == "null" {
            errors.forbidden(&kind, "type cannot be set to null, use nullable as an alternative");
        }
        if schema.at("items").value.is_array() {
            errors.forbidden(&schema.at("items"), "items must be a schema object and not an array");
        }
        if place.inside_meta && structural::is_embedded(schema.value) {
            let field = schema.at("x-kubernetes-embedded-resource");
            errors.forbidden(&field, "must not be used inside of resource meta");
        }
        if schema.at("uniqueItems").bool() {
            let why = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic";
            errors.forbidden(&schema.at("uniqueItems"), why);
        }
        if schema.at("x-kubernetes-preserve-unknown-fields").value == &Value::Bool(false) {
            errors.invalid(&schema.at("x-kubernetes-preserve-unknown-fields"), "must be true or undefined");
        }
    }

    /// How lists and maps are merged.
    fn merging(&mut self, schema: &Field<'_, '_>) {
        let (kind, map_type) = (schema.at("type"), schema.at("x-kubernetes-map-type"));
        let (list_type, keys) = (schema.at("x-kubernetes-list-type"), schema.at("x-kubernetes-list-map-keys"));
        let (items, errors) = (schema.at("items"), &mut *self.errors);
        for (set, needed, name) in [
            (map_type.is_set(), "object", "x-kubernetes-map-type"),
            (list_type.is_set(), "array", "x-kubernetes-list-type"),
        ] {
            let why = format!("must be {needed} if {name} is specified");
            if set && kind.is_blank() {
                errors.required(&kind, &why);
            } else if set && kind.str() != needed {
                errors.invalid(&kind, why);
            }
        }
        errors.one_of(&map_type, &["atomic", "granular"]);
        errors.one_of(&list_type, &["atomic", "set", "map"]);
        if list_type.str() == "set" {
            let why = "must be atomic as item of a list with x-kubernetes-list-type=set";
            let inner_list = items.at("x-kubernetes-list-type");
            let inner_map = items.at("x-kubernetes-map-type");
            match items.at("type").str() {
                "array" if inner_list.is_set() && inner_list.str() != "atomic" => errors.invalid(&inner_list, why),
                "object" if inner_map.str() != "atomic" => errors.invalid(&inner_map, why),
                _ => {}
            }
        }
        if !keys.is_empty() && list_type.str() != "map" {
            let why = "must be map if x-kubernetes-list-map-keys is non-empty";
            if list_type.is_set() { errors.invalid(&list_type, why) } else { errors.required(&list_type, why) }
        }
        if matches!(list_type.str(), "set" | "map") && items.at("nullable").bool() {
            let why = format!("cannot be nullable when x-kubernetes-list-type is {}", list_type.str());
            errors.forbidden(&items.at("nullable"), why);
        }
        if list_type.str() == "map" {
            self.keyed_list(&keys, &items);
        }
    }

    fn keyed_list(&mut self, keys: &Field<'_, '_>, items: &Field<'_, '_>) {
        let errors = &mut *self.errors;
        if keys.is_empty() {
            errors.required(keys, "must not be empty if x-kubernetes-list-type is map");
        }
        if !items.is_set() {
            errors.required(items, "must have a schema if x-kubernetes-list-type is map");
            return;
        }
        if items.at("type").str() != "object" {
            errors.invalid(&items.at("type"), "must be object if parent array's x-kubernetes-list-type is map");
            return;
        }
        let mut seen = HashSet::new();
        let properties = items.at("properties");
        let required: HashSet<&str> = list(items.value, "/required").iter().filter_map(Value::as_str).collect();
        for key in keys.items() {
            let property = properties.key(key.str());
            if !seen.insert(key.str().to_owned()) {
                errors.invalid(keys, "must not contain duplicate entries");
            }
            if !property.is_set() {
                errors.invalid(keys, "entries must all be names of item properties");
                continue;
            }
            if matches!(property.at("type").str(), "array" | "object") {
                let why = "must be a scalar type if parent array's x-kubernetes-list-type is map";
                errors.invalid(&property.at("type"), why);
            }
            if !required.contains(key.str()) && property.value.get("default").is_none() {
                let why = "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property";
                errors.required(&property.at("default"), why);
            }
            if property.at("nullable").bool() {
                let why = "this property is in x-kubernetes-list-map-keys, so it cannot be nullable";
                errors.forbidden(&property.at("nullable"), why);
            }
        }
    }

    /// One of `x-kubernetes-validations`.
    fn rule(&mut self, rule: &Field<'_, '_>, schema: &Value) {
        let (expression, message) = (rule.at("rule"), rule.at("message"));
        let (message_expression, path) = (rule.at("messageExpression"), rule.at("fieldPath"));
        let lines = |field: &Field<'_, '_>| field.str().trim().contains(['\n', '\r']);
        let hollow = |field: &Field<'_, '_>| !field.is_blank() && field.str().trim().is_empty();
        let errors = &mut *self.errors;
        if expression.str().trim().is_empty() {
            errors.required(&expression, "rule is not specified");
        } else if hollow(&message) {
            errors.invalid(&message, "message must be non-empty if specified");
        } else if lines(&message) {
            errors.invalid(&message, "message must not contain line breaks");
        } else if lines(&expression) && message.is_blank() {
            errors.required(&message, "message must be specified if rule contains line breaks");
        }
        if hollow(&message_expression) {
            errors.required(&message_expression, "messageExpression must be non-empty if specified");
        }
        errors.one_of(&rule.at("reason"), &REASONS);
        if hollow(&path) {
            errors.invalid(&path, "fieldPath must be non-empty if specified");
        } else if path.str().contains(['\n', '\r']) {
            errors.invalid(&path, "fieldPath must not contain line breaks");
        } else if !path.is_blank() && !leads_somewhere(schema, path.str()) {
            errors.invalid(&path, "fieldPath must be a valid path");
        }
        if !self.parse {
            return;
        }
        for (field, wanted, why) in [
            (&expression, Type::Bool, "cel expression must evaluate to a bool"),
            (&message_expression, Type::String, "messageExpression must evaluate to a string"),
        ] {
            if field.str().trim().is_empty() || self.known.contains(field.str()) {
                continue;
            }
            let kind = cel::expression(field, &of_rules(), &[], errors);
            if !matches!(kind, Type::Dyn | Type::Error) && !kind.is(&wanted) {
                errors.invalid(field, why);
            }
        }
    }
}

/// What a rule may speak of.
fn of_rules() -> Env {
    Env::default().and("self", Type::Dyn).and("oldSelf", Type::Dyn)
}

/// `.spec.a`, and `['b']` for names that are no words.
fn leads_somewhere(schema: &Value, path: &str) -> bool {
    let mut at = schema;
    let mut rest = path;
    while !rest.is_empty() {
        let name = if let Some(after) = rest.strip_prefix("['") {
            let Some((name, after)) = after.split_once("']") else { return false };
            rest = after;
            name
        } else if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[']).unwrap_or(after.len());
            rest = &after[end..];
            &after[..end]
        } else {
            return false;
        };
        let next = at.get("properties").and_then(|p| p.get(name));
        let Some(next) = next.or_else(|| at.get("additionalProperties").filter(|s| s.is_object())) else {
            return false;
        };
        at = next;
    }
    true
}

/// All expressions that a definition holds.
pub fn expressions(schema: &Value, found: &mut HashSet<String>) {
    match schema {
        Value::Object(map) => {
            for rule in list(schema, "/x-kubernetes-validations") {
                found.insert(text(rule, "/rule").to_owned());
                found.insert(text(rule, "/messageExpression").to_owned());
            }
            map.values().for_each(|value| expressions(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}
