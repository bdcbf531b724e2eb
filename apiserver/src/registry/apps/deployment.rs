//! Deployments.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, copy_field, count_change, default, int, semantically_equal, set};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use crate::registry::workload::{self, at_most_all, int_or_percent, is_zero};
use serde_json::{Value, json};

const COUNTS: [&str; 3] = ["observedGeneration", "replicas", "unavailableReplicas"];
const PARTS: [&str; 3] = ["updatedReplicas", "readyReplicas", "availableReplicas"];

pub const RULES: Rules = Rules {
    generation: true,
    default: defaults,
    validate,
    validate_update: workload::selector_is_immutable,
    validate_status: |new, old, errors| {
        workload::replica_status(new, old, &COUNTS, &PARTS, "readyReplicas", errors);
    },
    // A changed annotation is a new generation as well: `kubectl rollout` records causes in them.
    prepare_update: |new, old| {
        let annotations = |object: &Value| object.pointer("/metadata/annotations").cloned().unwrap_or_default();
        let changed = !semantically_equal(&annotations(new), &annotations(old));
        count_change(new, old, changed);
    },
    // Labels are not its controller's.
    prepare_status: |new, old| copy_field(child(new, "metadata"), &old["metadata"], "labels"),
    warnings: workload::name_warnings,
    row: Some(row),
    ..Rules::DEFAULT
};

fn defaults(object: &mut Value) {
    workload::default_template(object);
    let spec = child(object, "spec");
    workload::default_replicas(spec);
    for (field, value) in [("revisionHistoryLimit", 10), ("progressDeadlineSeconds", 600)] {
        if spec.get(field).is_none_or(Value::is_null) {
            set(spec, field, value);
        }
    }
    let strategy = child(spec, "strategy");
    default(strategy, "type", "RollingUpdate");
    if strategy["type"] == "RollingUpdate" {
        let rolling = child(strategy, "rollingUpdate");
        default(rolling, "maxUnavailable", json!("25%"));
        default(rolling, "maxSurge", json!("25%"));
    }
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    errors.not_negative(&spec.at("replicas"));
    workload::selector(&spec, "deployment", errors);
    workload::always_template(&spec.at("template"), "ReplicaSet", errors);
    strategy(&spec.at("strategy"), errors);
    for count in ["minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"] {
        errors.not_negative(&spec.at(count));
    }
    let (deadline, ready) = (spec.at("progressDeadlineSeconds"), spec.at("minReadySeconds").int().unwrap_or(0));
    if deadline.int().is_some_and(|seconds| seconds <= ready) {
        errors.invalid(&deadline, "must be greater than minReadySeconds");
    }
}

fn strategy(strategy: &Field<'_, '_>, errors: &mut Errors) {
    let (kind, rolling) = (strategy.at("type"), strategy.at("rollingUpdate"));
    match kind.str() {
        "Recreate" if rolling.is_set() => {
            errors.forbidden(&rolling, "may not be specified when strategy `type` is 'Recreate'");
        }
        "Recreate" => {}
        "RollingUpdate" => {
            let (unavailable, surge) = (rolling.at("maxUnavailable"), rolling.at("maxSurge"));
            int_or_percent(&unavailable, errors);
            int_or_percent(&surge, errors);
            if is_zero(&unavailable) && is_zero(&surge) {
                errors.invalid(&unavailable, "may not be 0 when `maxSurge` is 0");
            }
            at_most_all(&unavailable, errors);
        }
        _ => errors.not_supported(strategy, &["Recreate", "RollingUpdate"]),
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let count = |pointer| int(object, pointer).unwrap_or(0);
    let [containers, images, selector] = workload::wide_cells(object);
    vec![
        print::name(object),
        Value::from(format!("{}/{}", count("/status/readyReplicas"), count("/spec/replicas"))),
        Value::from(count("/status/updatedReplicas")),
        Value::from(count("/status/availableReplicas")),
        clock.age(object),
        containers,
        images,
        selector,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment() -> Value {
        let mut object = json!({"metadata": {"name": "web"}, "spec": {"selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "a", "image": "x"}]}}}});
        defaults(&mut object);
        object
    }

    fn errors_of(object: &Value) -> Vec<String> {
        let mut errors = Errors::default();
        validate(&Field::root(object), &mut errors);
        errors.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn defaults_make_a_rolling_update_of_one() {
        let object = deployment();
        assert_eq!(object["spec"]["replicas"], 1);
        let strategy = json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}});
        assert_eq!(object["spec"]["strategy"], strategy);
        assert_eq!(object["spec"]["template"]["spec"]["restartPolicy"], "Always");
        assert!(errors_of(&object).is_empty(), "{:?}", errors_of(&object));
    }

    #[test]
    fn mistakes_are_named() {
        let cases: [(fn(&mut Value), &str); 5] = [
            (
                |s| s["template"]["metadata"]["labels"] = json!({"app": "x"}),
                "spec.template.metadata.labels: Invalid value: {\"app\":\"x\"}: `selector` does not match template `labels`",
            ),
            (|s| s["replicas"] = json!(-1), "spec.replicas: Invalid value: -1: must be greater than or equal to 0"),
            (
                |s| s["template"]["spec"]["restartPolicy"] = json!("Never"),
                "spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\"",
            ),
            (
                |s| s["strategy"]["rollingUpdate"] = json!({"maxSurge": 0, "maxUnavailable": 0}),
                "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: 0: may not be 0 when `maxSurge` is 0",
            ),
            (
                |s| s["template"]["spec"]["containers"][0]["image"] = json!(""),
                "spec.template.spec.containers[0].image: Required value",
            ),
        ];
        for (spoil, message) in cases {
            let mut object = deployment();
            spoil(&mut object["spec"]);
            assert_eq!(errors_of(&object), [message]);
        }
    }
}
