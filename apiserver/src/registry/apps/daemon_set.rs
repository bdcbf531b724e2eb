//! DaemonSets.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, int, map, semantically_equal, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use crate::registry::workload::{self, at_most_all, int_or_percent, is_zero};
use serde_json::{Value, json};

const COUNTS: [&str; 9] = [
    "collisionCount",
    "currentNumberScheduled",
    "numberMisscheduled",
    "desiredNumberScheduled",
    "numberReady",
    "observedGeneration",
    "updatedNumberScheduled",
    "numberAvailable",
    "numberUnavailable",
];

pub const RULES: Rules = Rules {
    generation: true,
    default: defaults,
    validate,
    validate_update: workload::selector_is_immutable,
    prepare_create: |object| template_generation(object, None),
    prepare_update: |new, old| template_generation(new, Some(old)),
    validate_status: |new, old, errors| {
        workload::counts(new, &COUNTS, errors);
        workload::collisions(new, old, errors);
    },
    warnings: workload::spec_template_warnings,
    row: Some(row),
    ..Rules::DEFAULT
};

fn defaults(object: &mut Value) {
    workload::default_template(object);
    let spec = child(object, "spec");
    if spec.get("revisionHistoryLimit").is_none_or(Value::is_null) {
        set(spec, "revisionHistoryLimit", 10);
    }
    let strategy = child(spec, "updateStrategy");
    default(strategy, "type", "RollingUpdate");
    if strategy["type"] == "RollingUpdate" {
        let rolling = child(strategy, "rollingUpdate");
        default(rolling, "maxUnavailable", json!(1));
        default(rolling, "maxSurge", json!(0));
    }
}

/// Counts the templates there have been, in an annotation: what was a field of the spec once.
fn template_generation(object: &mut Value, old: Option<&Value>) {
    const ANNOTATION: &str = "deprecated.daemonset.template.generation";
    let count = |object: &Value| {
        let text = object.pointer("/metadata/annotations").map_or("", |a| text(a, &format!("/{ANNOTATION}")));
        text.parse::<i64>().unwrap_or(0)
    };
    let template = |object: &Value| object.pointer("/spec/template").cloned().unwrap_or_default();
    let generation = match old {
        None => count(object).max(1),
        Some(old) if semantically_equal(&template(object), &template(old)) => count(old).max(1),
        Some(old) => count(old).max(1) + 1,
    };
    set(child(child(object, "metadata"), "annotations"), ANNOTATION, generation.to_string());
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    workload::selector(&spec, "daemonset", errors);
    workload::always_template(&spec.at("template"), "DaemonSet", errors);
    errors.not_negative(&spec.at("minReadySeconds"));
    errors.not_negative(&spec.at("revisionHistoryLimit"));
    let strategy = spec.at("updateStrategy");
    let (kind, rolling) = (strategy.at("type"), strategy.at("rollingUpdate"));
    match kind.str() {
        "OnDelete" => {}
        "RollingUpdate" if !rolling.is_set() => errors.required(&rolling, ""),
        "RollingUpdate" => {
            let (unavailable, surge) = (rolling.at("maxUnavailable"), rolling.at("maxSurge"));
            for field in [&unavailable, &surge] {
                int_or_percent(field, errors);
                at_most_all(field, errors);
            }
            match (is_zero(&unavailable), is_zero(&surge)) {
                (true, true) => errors.required(&unavailable, "cannot be 0 when maxSurge is 0"),
                (false, false) => errors.invalid(&surge, "may not be set when maxUnavailable is non-zero"),
                _ => {}
            }
        }
        _ => errors.not_supported(&strategy, &["RollingUpdate", "OnDelete"]),
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let count = |pointer| Value::from(int(object, pointer).unwrap_or(0));
    let [containers, images, selector] = workload::wide_cells(object);
    vec![
        print::name(object),
        count("/status/desiredNumberScheduled"),
        count("/status/currentNumberScheduled"),
        count("/status/numberReady"),
        count("/status/updatedNumberScheduled"),
        count("/status/numberAvailable"),
        Value::from(print::labels(map(object, "/spec/template/spec/nodeSelector"))),
        clock.age(object),
        containers,
        images,
        selector,
    ]
}
