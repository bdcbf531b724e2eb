//! PodDisruptionBudgets.

use crate::registry::checks::{self, Is};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::int;
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use crate::registry::workload;
use serde_json::Value;

const COUNTS: [&str; 4] = ["disruptionsAllowed", "currentHealthy", "desiredHealthy", "expectedPods"];

pub const RULES: Rules = Rules {
    generation: true,
    unconditional_update: false,
    validate,
    validate_status: |new, _, errors| {
        workload::counts(new, &COUNTS, errors);
        checks::check(new, &[("status.conditions", Is::Conditions)], errors);
    },
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let (least, most) = (spec.at("minAvailable"), spec.at("maxUnavailable"));
    if least.is_set() && most.is_set() {
        errors.invalid(&spec, "minAvailable and maxUnavailable cannot be both set");
    }
    for field in [&least, &most] {
        workload::int_or_percent(field, errors);
        workload::at_most_all(field, errors);
    }
    metadata::label_selector(&spec.at("selector"), errors);
    errors.one_of(&spec.at("unhealthyPodEvictionPolicy"), &["AlwaysAllow", "IfHealthyBudget"]);
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let amount = |pointer: &str| match object.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(number @ Value::Number(_)) => number.to_string(),
        _ => "N/A".to_owned(),
    };
    vec![
        print::name(object),
        Value::from(amount("/spec/minAvailable")),
        Value::from(amount("/spec/maxUnavailable")),
        Value::from(int(object, "/status/disruptionsAllowed").unwrap_or(0)),
        clock.age(object),
    ]
}
