//! ResourceQuotas.

use crate::registry::field::{Errors, Field};
use crate::registry::object::map;
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::names::is_qualified_name;
use apimachinery::quantity::Quantity;
use apimachinery::status::FieldError;
use serde_json::Value;

const SCOPES: [&str; 7] = [
    "BestEffort",
    "CrossNamespacePodAffinity",
    "NotBestEffort",
    "NotTerminating",
    "PriorityClass",
    "Terminating",
    "VolumeAttributesClass",
];

pub const RULES: Rules = Rules {
    validate,
    validate_update: |new, old, errors| {
        let (now, was) = (new.at("spec"), old.at("spec"));
        errors.immutable(&now.at("scopes"), &was.at("scopes"));
    },
    validate_status: |new, _, errors| {
        let status = new.at("status");
        amounts(&status.at("hard"), errors);
        amounts(&status.at("used"), errors);
    },
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    amounts(&spec.at("hard"), errors);
    for scope in spec.at("scopes").items() {
        errors.one_of(&scope, &SCOPES);
    }
    let selector = spec.at("scopeSelector");
    for requirement in selector.at("matchExpressions").items() {
        errors.one_of(&requirement.at("scopeName"), &SCOPES);
        errors.one_of(&requirement.at("operator"), &["In", "NotIn", "Exists", "DoesNotExist"]);
    }
}

fn amounts(list: &Field<'_, '_>, errors: &mut Errors) {
    for (name, amount) in list.entries() {
        errors.0.extend(is_qualified_name(name).into_iter().map(|m| FieldError::invalid(amount.path(), name, m)));
        if Quantity::parse(amount.str()).is_ok_and(|q| q < Quantity::ZERO) {
            errors.invalid(&amount, "must be greater than or equal to 0");
        }
    }
}

/// As `printResourceQuota`.
fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let (mut requests, mut limits) = (Vec::new(), Vec::new());
    for name in map(object, "/spec/hard").into_iter().flatten().map(|(name, _)| name) {
        let amount = |of: &str| object.pointer(of).and_then(|m| m.get(name)).and_then(Value::as_str).unwrap_or("0");
        let text = format!("{name}: {}/{}", amount("/status/used"), amount("/status/hard"));
        if name.starts_with("limits") { limits.push(text) } else { requests.push(text) }
    }
    vec![print::name(object), Value::from(requests.join(", ")), Value::from(limits.join(", ")), clock.age(object)]
}
