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
    warnings: workload::name_warnings,
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    errors.not_negative(&spec.at("replicas"));
    errors.not_negative(&spec.at("minReadySeconds"));
    // Kubernetes says deployment here.
    workload::selector(&spec, "deployment", errors);
    workload::always_template(&spec.at("template"), "ReplicaSet", errors);
}

/// As `ValidateReplicaSetStatus`, which holds for ReplicationControllers too.
pub fn replica_status(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    const PARTS: [&str; 3] = ["fullyLabeledReplicas", "readyReplicas", "availableReplicas"];
    workload::replica_status(new, old, &["replicas", "observedGeneration"], &PARTS, "readyReplicas", errors);
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
