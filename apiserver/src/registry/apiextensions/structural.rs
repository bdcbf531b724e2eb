//! Structural schemas: every value has a type of its own, outside of what only constrains values. As `ValidateStructural`.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{flag, text};
use apimachinery::status::FieldError;
use serde_json::{Value, json};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Root,
    Item,
    Field,
}

/// What is wrong with a schema, in the order of the messages.
pub fn validate(schema: &Field<'_, '_>) -> Vec<FieldError> {
    let mut errors = Errors::default();
    invariants(schema, Level::Root, &mut errors);
    completeness(schema, &mut errors);
    errors.0.sort_by_cached_key(ToString::to_string);
    errors.0
}

pub fn int_or_string(schema: &Value) -> bool {
    flag(schema, "/x-kubernetes-int-or-string")
}

pub fn preserves_unknown(schema: &Value) -> bool {
    flag(schema, "/x-kubernetes-preserve-unknown-fields")
}

pub fn is_embedded(schema: &Value) -> bool {
    flag(schema, "/x-kubernetes-embedded-resource")
}

fn invariants(schema: &Field<'_, '_>, level: Level, errors: &mut Errors) {
    if !schema.is_set() {
        return;
    }
    let (kind, items, properties) = (schema.at("type"), schema.at("items"), schema.at("properties"));
    if kind.str() == "array" && !items.is_set() {
        errors.required(&items, "must be specified");
    }
    invariants(&items, Level::Item, errors);
    properties.entries().for_each(|(_, property)| invariants(&property, Level::Field, errors));
    let additional = schema.at("additionalProperties");
    if additional.is_set() {
        if level == Level::Root {
            errors.forbidden(&additional, "must not be used at the root");
        }
        if additional.value.is_object() {
            invariants(&additional, Level::Field, errors);
        }
    }
    let embedded = is_embedded(schema.value);
    if int_or_string(schema.value) {
        for extension in ["x-kubernetes-preserve-unknown-fields", "x-kubernetes-embedded-resource"] {
            if schema.at(extension).bool() {
                errors.invalid(&schema.at(extension), "must be false if x-kubernetes-int-or-string is true");
            }
        }
    }
    value_validation(schema, errors);
    if embedded && kind.str() != "object" {
        let why = "must be object if x-kubernetes-embedded-resource is true";
        if kind.is_blank() { errors.required(&kind, why) } else { errors.invalid(&kind, why) }
    } else if kind.is_blank() && !int_or_string(schema.value) && !preserves_unknown(schema.value) {
        let why = match level {
            Level::Root => "must not be empty at the root",
            Level::Item => "must not be empty for specified array items",
            Level::Field => "must not be empty for specified object fields",
        };
        errors.required(&kind, why);
    }
    if embedded && additional.is_set() {
        errors.forbidden(&additional, "must not be used if x-kubernetes-embedded-resource is set");
    }
    if level == Level::Root && !kind.is_blank() && kind.str() != "object" {
        errors.invalid(&kind, "must be object at the root");
    }
    meta(&properties, level == Level::Root, level == Level::Root || embedded, errors);
    if embedded && !preserves_unknown(schema.value) && properties.is_empty() {
        errors.required(
            &properties,
            "must not be empty if x-kubernetes-embedded-resource is true without x-kubernetes-preserve-unknown-fields",
        );
    }
}

/// `kind` and `apiVersion` are texts, and of `metadata` only the name may be constrained.
fn meta(properties: &Field<'_, '_>, root: bool, check: bool, errors: &mut Errors) {
    for (name, kind, why) in [
        ("kind", "string", "must be string"),
        ("apiVersion", "string", "must be string"),
        ("metadata", "object", "must be object"),
    ] {
        let property = properties.key(name);
        if check && property.is_set() && property.at("type").str() != kind {
            errors.invalid(&property.at("type"), why);
        }
    }
    let metadata = properties.key("metadata");
    if !root || !metadata.is_set() {
        return;
    }
    let only_names = |properties: &Value| {
        properties
            .as_object()
            .is_some_and(|map| map.keys().all(|name| matches!(name.as_str(), "name" | "generateName")))
    };
    let bare = metadata.value.as_object().into_iter().flatten().all(|(field, value)| match field.as_str() {
        "type" | "default" => true,
        "properties" => only_names(value),
        _ => value == &Value::Bool(false),
    });
    if !bare {
        errors.forbidden(
            &metadata,
            "must not specify anything other than name and generateName, but metadata is implicitly specified",
        );
    }
}

/// What only constrains values: nothing in it may say what the values are.
fn value_validation(schema: &Field<'_, '_>, errors: &mut Errors) {
    let either = json!([{"type": "integer"}, {"type": "string"}]);
    let is_int_or_string = |of: Option<&Value>| int_or_string(schema.value) && of == Some(&either);
    if !is_int_or_string(schema.value.get("anyOf")) {
        schema.at("anyOf").items().for_each(|item| nested(&item, false, errors));
    }
    for (at, item) in schema.at("allOf").items().enumerate() {
        nested(&item, at == 0 && is_int_or_string(item.value.get("anyOf")), errors);
    }
    schema.at("oneOf").items().for_each(|item| nested(&item, false, errors));
    nested(&schema.at("not"), false, errors);
    let pattern = schema.at("pattern");
    if let Err(error) = regex::Regex::new(pattern.str()) {
        let why = error.to_string().replace('\n', " ");
        errors.invalid(&pattern, format!("must be a valid regular expression, but isn't: {why}"));
    }
}

fn nested(schema: &Field<'_, '_>, skip_any_of: bool, errors: &mut Errors) {
    const FORBIDDEN: [(&str, &str); 12] = [
        ("type", "must be empty to be structural"),
        ("additionalProperties", "must be undefined to be structural"),
        ("default", "must be undefined to be structural"),
        ("title", "must be empty to be structural"),
        ("description", "must be empty to be structural"),
        ("nullable", "must be false to be structural"),
        ("x-kubernetes-preserve-unknown-fields", "must be false to be structural"),
        ("x-kubernetes-embedded-resource", "must be false to be structural"),
        ("x-kubernetes-int-or-string", "must be false to be structural"),
        ("x-kubernetes-list-map-keys", "must be empty to be structural"),
        ("x-kubernetes-list-type", "must be undefined to be structural"),
        ("x-kubernetes-map-type", "must be undefined to be structural"),
    ];
    if !schema.is_set() {
        return;
    }
    if skip_any_of {
        let mut rest = schema.value.clone();
        crate::registry::object::remove(&mut rest, "anyOf");
        value_validation(&schema.with(&rest), errors);
    } else {
        value_validation(schema, errors);
    }
    nested(&schema.at("items"), false, errors);
    schema.at("properties").entries().for_each(|(_, property)| nested(&property, false, errors));
    for (field, why) in FORBIDDEN {
        let said = match schema.at(field).value {
            Value::Null | Value::Bool(false) => field == "additionalProperties" && schema.at(field).is_set(),
            Value::String(text) => !text.is_empty(),
            Value::Array(list) => !list.is_empty(),
            _ => true,
        };
        if said {
            errors.forbidden(&schema.at(field), why);
        }
    }
    if !schema.at("x-kubernetes-validations").is_empty() {
        errors.forbidden(&schema.at("x-kubernetes-validations"), "must be empty to be structural");
    }
    let properties = schema.at("properties");
    if properties.key("metadata").is_set() {
        errors.forbidden(&properties.key("metadata"), "must not be specified in a nested context");
    }
}

/// What is constrained must be there: as a property or as items, outside.
fn completeness(schema: &Field<'_, '_>, errors: &mut Errors) {
    for group in ["allOf", "anyOf", "oneOf"] {
        schema.at(group).items().for_each(|item| complete(&item, schema, errors));
    }
    complete(&schema.at("not"), schema, errors);
    if schema.at("items").is_set() {
        completeness(&schema.at("items"), errors);
    }
    schema.at("properties").entries().for_each(|(_, property)| completeness(&property, errors));
    if schema.at("additionalProperties").value.is_object() {
        completeness(&schema.at("additionalProperties"), errors);
    }
}

fn complete(constraint: &Field<'_, '_>, schema: &Field<'_, '_>, errors: &mut Errors) {
    if !constraint.is_set() {
        return;
    }
    let because = |errors: &mut Errors, missing: &Field<'_, '_>, at: &Field<'_, '_>| {
        errors.required(missing, &format!("because it is defined in {}", at.path()));
    };
    for group in ["allOf", "anyOf", "oneOf"] {
        constraint.at(group).items().for_each(|item| complete(&item, schema, errors));
    }
    complete(&constraint.at("not"), schema, errors);
    let items = constraint.at("items");
    if items.is_set() {
        let own = schema.at("items");
        if own.is_set() { complete(&items, &own, errors) } else { because(errors, &own, &items) }
    }
    let (wanted, own) = (constraint.at("properties"), schema.at("properties"));
    for (name, property) in wanted.entries() {
        let known = own.key(name);
        if known.is_set() { complete(&property, &known, errors) } else { because(errors, &known, &property) }
    }
}

/// The schema at a path such as `.spec.replicas`, through properties only.
pub fn at_path<'v>(schema: &'v Value, path: &str) -> Option<&'v Value> {
    let names = path.strip_prefix('.')?;
    names.split('.').try_fold(schema, |schema, name| schema.get("properties")?.get(name).filter(|_| !name.is_empty()))
}

/// May a field selector name such a field?
pub fn is_selectable(schema: &Value) -> bool {
    matches!(text(schema, "/type"), "string" | "boolean" | "integer")
}
