//! Validating- and MutatingAdmissionPolicies and their bindings. Their expressions are compiled where they are run.

use super::webhook::rule;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, items_mut, list, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::facts::Column;
use serde_json::{Value, json};

pub const POLICY: Rules = Rules {
    generation: true,
    default: |object| {
        let spec = child(object, "spec");
        default(spec, "failurePolicy", "Fail");
        if let Some(constraints) = spec.get_mut("matchConstraints") {
            match_defaults(constraints);
        }
    },
    validate,
    columns: Some(&POLICY_COLUMNS),
    row: Some(|object, clock: &Clock| {
        let kind =
            object.pointer("/spec/paramKind").map(|p| format!("{}/{}", text(p, "/apiVersion"), text(p, "/kind")));
        vec![
            print::name(object),
            Value::from(list(object, "/spec/validations").len()),
            Value::from(kind.unwrap_or_else(|| print::UNSET.to_owned())),
            clock.age(object),
        ]
    }),
    ..Rules::DEFAULT
};

/// As [`POLICY`], of mutations.
pub const MUTATING_POLICY: Rules = Rules {
    columns: Some(&MUTATING_COLUMNS),
    row: Some(|object, clock: &Clock| {
        let kind =
            object.pointer("/spec/paramKind").map(|p| format!("{}/{}", text(p, "/apiVersion"), text(p, "/kind")));
        vec![
            print::name(object),
            Value::from(list(object, "/spec/mutations").len()),
            Value::from(kind.unwrap_or_else(|| print::UNSET.to_owned())),
            clock.age(object),
        ]
    }),
    ..POLICY
};

const fn column(name: &'static str, kind: &'static str) -> Column {
    Column { name, kind, format: "", priority: 0 }
}

const NAME: Column = Column { name: "Name", kind: "string", format: "name", priority: 0 };
const POLICY_COLUMNS: [Column; 4] =
    [NAME, column("Validations", "integer"), column("ParamKind", "string"), column("Age", "string")];
const MUTATING_COLUMNS: [Column; 4] =
    [NAME, column("Mutations", "integer"), column("ParamKind", "string"), column("Age", "string")];
const BINDING_COLUMNS: [Column; 4] =
    [NAME, column("PolicyName", "string"), column("ParamRef", "string"), column("Age", "string")];

pub const BINDING: Rules = Rules {
    columns: Some(&BINDING_COLUMNS),
    row: Some(|object, clock: &Clock| {
        let reference = object.pointer("/spec/paramRef").map(|p| match (text(p, "/namespace"), text(p, "/name")) {
            ("", name) => name.to_owned(),
            (namespace, name) => format!("{namespace}/{name}"),
        });
        vec![
            print::name(object),
            Value::from(text(object, "/spec/policyName")),
            Value::from(reference.unwrap_or_else(|| print::UNSET.to_owned())),
            clock.age(object),
        ]
    }),
    generation: true,
    default: |object| {
        if let Some(resources) = object.pointer_mut("/spec/matchResources") {
            match_defaults(resources);
        }
    },
    validate: |root, errors| {
        let spec = root.at("spec");
        errors.need(&spec.at("policyName"));
        for action in spec.at("validationActions").items() {
            errors.one_of(&action, &["Audit", "Deny", "Warn"]);
        }
    },
    ..Rules::DEFAULT
};

fn match_defaults(resources: &mut Value) {
    default(resources, "matchPolicy", "Equivalent");
    for selector in ["namespaceSelector", "objectSelector"] {
        if resources.get(selector).is_none() {
            set(resources, selector, json!({}));
        }
    }
    for rules in ["resourceRules", "excludeResourceRules"] {
        for rule in items_mut(resources, rules) {
            default(rule, "scope", "*");
        }
    }
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    errors.one_of(&spec.at("failurePolicy"), &["Fail", "Ignore"]);
    let constraints = spec.at("matchConstraints");
    if !constraints.is_set() {
        errors.required(&constraints, "");
    } else if constraints.at("resourceRules").is_empty() {
        errors.required(&constraints.at("resourceRules"), "");
    }
    for item in constraints.at("resourceRules").items() {
        rule(&item, errors);
    }
    for validation in spec.at("validations").items() {
        let expression = validation.at("expression");
        if expression.str().trim().is_empty() {
            errors.required(&expression, "expression is not specified");
        }
    }
}
