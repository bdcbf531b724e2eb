//! ReplicaSets.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, int};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use crate::registry::workload;
use serde_json::Value;

pub const RULES: Rules = Rules {
    generation: true,
    default: |object| {
        workload::default_template(object);
        workload::default_replicas(child(object, "spec"));
    },
    validate,
    validate_update: workload::selector_is_immutable,
    validate_status: replica_status,
    selectable_names: &["status.replicas"],
    selectable: |object| vec![("status.replicas", int(object, "/status/replicas").unwrap_or(0).to_string())],
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    errors.not_negative(&spec.at("replicas"));
    errors.not_negative(&spec.at("minReadySeconds"));
    workload::selector(&spec, "ReplicaSet", errors);
    workload::always_template(&spec.at("template"), "ReplicaSet", errors);
}

/// As `ValidateReplicaSetStatus`, which holds for ReplicationControllers too.
pub fn replica_status(new: &Field<'_, '_>, _old: &Field<'_, '_>, errors: &mut Errors) {
    const PARTS: [&str; 3] = ["fullyLabeledReplicas", "readyReplicas", "availableReplicas"];
    workload::counts(new, &["replicas", "observedGeneration"], errors);
    workload::counts(new, &PARTS, errors);
    let status = new.at("status");
    let all = status.at("replicas").int().unwrap_or(0);
    for part in PARTS {
        let part = status.at(part);
        if part.int().is_some_and(|n| n > all) {
            errors.invalid(&part, "cannot be greater than status.replicas");
        }
    }
}

/// As `printReplicaSet` and `printReplicationController`.
pub fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let count = |pointer| Value::from(int(object, pointer).unwrap_or(0));
    let [containers, images, selector] = workload::wide_cells(object);
    vec![
        print::name(object),
        count("/spec/replicas"),
        count("/status/replicas"),
        count("/status/readyReplicas"),
        clock.age(object),
        containers,
        images,
        selector,
    ]
}
