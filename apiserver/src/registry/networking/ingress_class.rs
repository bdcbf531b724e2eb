//! IngressClasses.

use super::ingress::REFERENCE;
use crate::registry::checks::{Is, check, domain_prefixed_path, fixed};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata::label;
use crate::registry::object::{default, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use serde_json::Value;

const CONTROLLER_MAX: usize = 250;

pub const RULES: Rules = Rules {
    generation: true,
    default: |object| {
        if let Some(parameters) = object.pointer_mut("/spec/parameters") {
            default(parameters, "scope", "Cluster");
        }
    },
    validate,
    validate_update: |new, old, errors| fixed(new, old, &["spec.controller"], errors),
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    check(&spec, &[("controller", Is::Bytes(CONTROLLER_MAX)), ("controller", Is::By(domain_prefixed_path))], errors);
    let parameters = spec.at("parameters");
    if !parameters.is_set() {
        return;
    }
    check(&parameters, &REFERENCE, errors);
    let (scope, namespace) = (parameters.at("scope"), parameters.at("namespace"));
    match scope.str() {
        _ if !scope.is_set() => errors.required(&scope, ""),
        "Namespace" if !namespace.is_set() => errors.required(&namespace, "`parameters.scope` is set to 'Namespace'"),
        "Namespace" => errors.all(&namespace, label(namespace.str())),
        "Cluster" if namespace.is_set() => errors.forbidden(&namespace, "`parameters.scope` is set to 'Cluster'"),
        "Cluster" => {}
        _ => errors.not_supported(&scope, &["Cluster", "Namespace"]),
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
