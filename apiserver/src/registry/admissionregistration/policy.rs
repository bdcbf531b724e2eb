//! Validating- and MutatingAdmissionPolicies and their bindings. Their expressions are compiled where they are run.

use super::webhook::rule;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, items_mut, set};
use crate::registry::rules::Rules;
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
    ..Rules::DEFAULT
};

pub const BINDING: Rules = Rules {
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
