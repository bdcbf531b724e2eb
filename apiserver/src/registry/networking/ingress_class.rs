//! IngressClasses.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{default, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use serde_json::Value;

pub const RULES: Rules = Rules {
    generation: true,
    default: |object| {
        if let Some(parameters) = object.pointer_mut("/spec/parameters") {
            default(parameters, "scope", "Cluster");
        }
    },
    validate,
    validate_update: |new, old, errors| {
        let (now, was) = (new.at("spec"), old.at("spec"));
        errors.immutable(&now.at("controller"), &was.at("controller"));
    },
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let controller = spec.at("controller");
    if errors.need(&controller) && !controller.str().contains('/') {
        errors.invalid(&controller, "must be a domain-prefixed path (such as \"acme.io/foo\")");
    }
    let parameters = spec.at("parameters");
    if parameters.is_set() {
        errors.need(&parameters.at("kind"));
        errors.need(&parameters.at("name"));
        errors.need_one_of(&parameters.at("scope"), &["Cluster", "Namespace"]);
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let parameters = object.pointer("/spec/parameters").map_or(NONE.to_owned(), |p| {
        let group = text(p, "/apiGroup");
        let kind = text(p, "/kind");
        let kind = if group.is_empty() { kind.to_owned() } else { format!("{kind}.{group}") };
        format!("{kind}/{}", text(p, "/name"))
    });
    vec![print::name(object), Value::from(text(object, "/spec/controller")), Value::from(parameters), clock.age(object)]
}
