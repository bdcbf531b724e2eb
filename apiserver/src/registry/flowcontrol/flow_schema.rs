//! FlowSchemas.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, int, list, set, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use serde_json::Value;

const PRECEDENCE_MAX: i64 = 10_000;

pub const RULES: Rules = Rules {
    generation: true,
    status_keeps_metadata: true,
    unconditional_update: false,
    default: |object| {
        let spec = child(object, "spec");
        if int(spec, "/matchingPrecedence").unwrap_or(0) == 0 {
            set(spec, "matchingPrecedence", 1000);
        }
    },
    validate,
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let precedence = spec.at("matchingPrecedence");
    if precedence.int().is_some_and(|n| n <= 0) {
        errors.invalid(&precedence, "must be a positive value");
    }
    if precedence.int().is_some_and(|n| n > PRECEDENCE_MAX) {
        errors.invalid(&precedence, format!("must not be greater than {PRECEDENCE_MAX}"));
    }
    let distinguisher = spec.at("distinguisherMethod");
    errors.one_of(&distinguisher.at("type"), &["ByNamespace", "ByUser"]);
    errors.need(&spec.at("priorityLevelConfiguration").at("name"));
    for rule in spec.at("rules").items() {
        let subjects = rule.at("subjects");
        if subjects.is_empty() {
            errors.required(&subjects, "subjects must contain at least one value");
        }
        for subject in subjects.items() {
            errors.need_one_of(&subject.at("kind"), &["Group", "ServiceAccount", "User"]);
        }
        if rule.at("resourceRules").is_empty() && rule.at("nonResourceRules").is_empty() {
            errors.required(&rule, "at least one of resourceRules and nonResourceRules has to be non-empty");
        }
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let dangling = list(object, "/status/conditions").iter().find(|c| c["type"] == "Dangling");
    let method = text(object, "/spec/distinguisherMethod/type");
    vec![
        print::name(object),
        print::or(text(object, "/spec/priorityLevelConfiguration/name"), NONE),
        Value::from(int(object, "/spec/matchingPrecedence").unwrap_or(0)),
        print::or(method, NONE),
        clock.age(object),
        Value::from(dangling.map_or("?", |c| text(c, "/status"))),
    ]
}
