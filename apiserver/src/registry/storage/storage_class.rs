//! StorageClasses and VolumeAttributesClasses.

use crate::registry::checks::{Is, check, fixed, forbid_updates};
use crate::registry::core::pod_warnings::old_label;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{default, flag, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::names::is_qualified_name;
use apimachinery::status::FieldError;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

const DEFAULT_ANNOTATIONS: [&str; 2] =
    ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
const PARAMETERS_MAX: usize = 512;
const PARAMETERS_MAX_BYTES: usize = 256 * 1024;

pub const RULES: Rules = Rules {
    default: |object| {
        default(object, "reclaimPolicy", "Delete");
        default(object, "volumeBindingMode", "Immediate");
    },
    validate,
    validate_update: |new, old, errors| {
        forbid_updates(new, old, &["parameters", "provisioner", "reclaimPolicy"], errors);
        fixed(new, old, &["volumeBindingMode"], errors);
    },
    warnings: |new, _| {
        let mut warnings = Vec::new();
        for term in Field::root(new).at("allowedTopologies").items() {
            for expression in term.at("matchLabelExpressions").items() {
                let key = expression.at("key");
                warnings.extend(old_label(key.str()).map(|what| format!("{}: {what}", key.path())));
            }
        }
        warnings
    },
    row: Some(row),
    ..Rules::DEFAULT
};

pub const VOLUME_ATTRIBUTES_CLASS: Rules = Rules {
    validate: |root, errors| {
        provisioner(&root.at("driverName"), errors);
        let parameters = root.at("parameters");
        self::parameters(&parameters, errors);
        if parameters.is_empty() {
            errors.required(&parameters, "must contain at least one key/value pair");
        }
    },
    validate_update: |new, old, errors| forbid_updates(new, old, &["driverName", "parameters"], errors),
    row: Some(|object, clock: &Clock| {
        let name = marked(object, &["volumeattributesclass.alpha.kubernetes.io/is-default-class"]);
        vec![name, Value::from(text(object, "/driverName")), clock.age(object)]
    }),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    check(
        root,
        &[
            ("provisioner", Is::By(provisioner)),
            ("parameters", Is::By(parameters)),
            ("reclaimPolicy", Is::OneOf(&["Delete", "Retain"])),
            ("volumeBindingMode", Is::RequiredOneOf(&["Immediate", "WaitForFirstConsumer"])),
        ],
        errors,
    );
    let mut seen: Vec<BTreeMap<String, BTreeSet<String>>> = Vec::new();
    for term in root.at("allowedTopologies").items() {
        let expressions = term.at("matchLabelExpressions");
        let labels = topology(&expressions, errors);
        if seen.contains(&labels) {
            errors.duplicate(&expressions.with(&Value::from("")));
        }
        seen.push(labels);
    }
}

/// A qualified name in any case.
fn provisioner(field: &Field<'_, '_>, errors: &mut Errors) {
    if errors.need(field) {
        errors.all(field, is_qualified_name(&field.str().to_lowercase()));
    }
}

fn parameters(parameters: &Field<'_, '_>, errors: &mut Errors) {
    let size: usize = parameters.entries().map(|(key, value)| key.len() + value.str().len()).sum();
    if parameters.len() > PARAMETERS_MAX {
        errors.too_long(parameters, PARAMETERS_MAX);
        return;
    }
    if parameters.entries().any(|(key, _)| key.is_empty()) {
        errors.0.push(FieldError::invalid(parameters.path(), "", "field can not be empty."));
    }
    if size > PARAMETERS_MAX_BYTES {
        errors.too_long(parameters, PARAMETERS_MAX_BYTES);
    }
}

/// As `ValidateTopologySelectorTerm`: what each label may be.
fn topology(expressions: &Field<'_, '_>, errors: &mut Errors) -> BTreeMap<String, BTreeSet<String>> {
    let mut labels = BTreeMap::new();
    for expression in expressions.items() {
        let (key, values) = (expression.at("key"), expression.at("values"));
        if values.is_empty() {
            errors.required(&values, "");
        }
        Is::Unique.check(&values, errors);
        errors.all(&key, is_qualified_name(key.str()));
        let allowed = values.items().map(|value| value.str().to_owned()).collect();
        if labels.insert(key.str().to_owned(), allowed).is_some() {
            errors.duplicate(&key);
        }
    }
    labels
}

/// The name, with a mark if it is the default.
fn marked(object: &Value, marks: &[&str]) -> Value {
    let annotations = object.pointer("/metadata/annotations");
    let default = marks.iter().any(|mark| annotations.and_then(|a| a.get(*mark)).is_some_and(|v| v == "true"));
    let name = text(object, "/metadata/name");
    Value::from(if default { format!("{name} (default)") } else { name.to_owned() })
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let expands = if flag(object, "/allowVolumeExpansion") { "true" } else { "false" };
    vec![
        marked(object, &DEFAULT_ANNOTATIONS),
        Value::from(text(object, "/provisioner")),
        print::or(text(object, "/reclaimPolicy"), "Delete"),
        print::or(text(object, "/volumeBindingMode"), "Immediate"),
        Value::from(expands),
        clock.age(object),
    ]
}
