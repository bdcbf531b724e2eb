//! StatefulSets.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, copy_field, default, int, items_mut, semantically_equal, set};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use crate::registry::workload;
use serde_json::{Value, json};

const COUNTS: [&str; 6] =
    ["replicas", "readyReplicas", "currentReplicas", "updatedReplicas", "availableReplicas", "observedGeneration"];
/// What of a spec may change.
const OPEN: [&str; 7] = [
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
];

pub const RULES: Rules = Rules {
    generation: true,
    default: defaults,
    validate,
    validate_update,
    validate_status: |new, _, errors| workload::counts(new, &COUNTS, errors),
    row: Some(row),
    ..Rules::DEFAULT
};

fn defaults(object: &mut Value) {
    workload::default_template(object);
    let spec = child(object, "spec");
    workload::default_replicas(spec);
    default(spec, "podManagementPolicy", "OrderedReady");
    if spec.get("revisionHistoryLimit").is_none_or(Value::is_null) {
        set(spec, "revisionHistoryLimit", 10);
    }
    let strategy = child(spec, "updateStrategy");
    default(strategy, "type", "RollingUpdate");
    if strategy["type"] == "RollingUpdate" {
        let rolling = child(strategy, "rollingUpdate");
        if rolling.get("partition").is_none_or(Value::is_null) {
            set(rolling, "partition", 0);
        }
    }
    let retention = child(spec, "persistentVolumeClaimRetentionPolicy");
    default(retention, "whenDeleted", "Retain");
    default(retention, "whenScaled", "Retain");
    for claim in items_mut(spec, "volumeClaimTemplates") {
        default(claim, "apiVersion", "v1");
        default(claim, "kind", "PersistentVolumeClaim");
        default(child(claim, "spec"), "volumeMode", "Filesystem");
        default(child(claim, "status"), "phase", "Pending");
    }
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let policy = spec.at("podManagementPolicy");
    match policy.str() {
        "" => errors.required(&policy, ""),
        "OrderedReady" | "Parallel" => {}
        _ => errors.invalid(&policy, "must be 'OrderedReady' or 'Parallel'"),
    }
    let strategy = spec.at("updateStrategy");
    let (kind, rolling) = (strategy.at("type"), strategy.at("rollingUpdate"));
    match kind.str() {
        "" => errors.required(&kind, ""),
        "OnDelete" if rolling.is_set() => {
            errors.invalid(&rolling, "only allowed for updateStrategy 'RollingUpdate'");
        }
        "OnDelete" => {}
        "RollingUpdate" => {
            errors.not_negative(&rolling.at("partition"));
            workload::int_or_percent(&rolling.at("maxUnavailable"), errors);
        }
        _ => errors.invalid(&kind, "must be 'RollingUpdate' or 'OnDelete'"),
    }
    let retention = spec.at("persistentVolumeClaimRetentionPolicy");
    for field in ["whenDeleted", "whenScaled"] {
        errors.one_of(&retention.at(field), &["Retain", "Delete"]);
    }
    for count in ["replicas", "minReadySeconds", "revisionHistoryLimit"] {
        errors.not_negative(&spec.at(count));
    }
    errors.not_negative(&spec.at("ordinals").at("start"));
    workload::selector(&spec, "statefulset", errors);
    workload::always_template(&spec.at("template"), "StatefulSet", errors);
}

/// As `ValidateStatefulSetUpdate`.
fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    let mut expected = was.value.clone();
    for open in OPEN {
        copy_field(&mut expected, now.value, open);
    }
    if !semantically_equal(&expected, now.value) {
        errors.forbidden(
            &now,
            "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden",
        );
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let count = |pointer| int(object, pointer).unwrap_or(0);
    let [containers, images, _] = workload::wide_cells(object);
    vec![
        print::name(object),
        json!(format!("{}/{}", count("/status/readyReplicas"), count("/spec/replicas"))),
        clock.age(object),
        containers,
        images,
    ]
}
