//! StatefulSets.

use crate::registry::checks::{Is, check};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{child, copy_field, default, int, items_mut, list, semantically_equal, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use crate::registry::workload;
use serde_json::{Value, json};

const COUNTS: [&str; 2] = ["replicas", "observedGeneration"];
const PARTS: [&str; 4] = ["readyReplicas", "currentReplicas", "updatedReplicas", "availableReplicas"];
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
    name: metadata::label,
    validate_status: |new, old, errors| {
        workload::replica_status(new, old, &COUNTS, &PARTS, "status.readyReplicas", errors);
    },
    warnings: |new, old| {
        let negative = int(new, "/spec/revisionHistoryLimit").is_some_and(|n| n < 0);
        let warning =
            "spec.revisionHistoryLimit: a negative value retains all historical revisions; a value >= 0 is recommended";
        let warning = negative.then(|| warning.to_owned());
        warning.into_iter().chain(workload::spec_template_warnings(new, old)).collect()
    },
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
        for (field, value) in [("partition", 0), ("maxUnavailable", 1)] {
            if rolling.get(field).is_none_or(Value::is_null) {
                set(rolling, field, value);
            }
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
    let rolling = strategy.at("rollingUpdate");
    match strategy.at("type").str() {
        "" => errors.required(&strategy, ""),
        "OnDelete" if rolling.is_set() => {
            errors.invalid(&rolling, "only allowed for updateStrategy 'RollingUpdate'");
        }
        "OnDelete" => {}
        "RollingUpdate" => {
            errors.not_negative(&rolling.at("partition"));
            let unavailable = rolling.at("maxUnavailable");
            if unavailable.is_set() {
                workload::int_or_percent(&unavailable, errors);
                if workload::is_zero(&unavailable) {
                    errors.invalid(&unavailable, "cannot be 0");
                }
                workload::at_most_all(&unavailable, errors);
            }
        }
        _ => errors.invalid(&strategy, "must be 'RollingUpdate' or 'OnDelete'"),
    }
    check(
        &spec,
        &[
            ("persistentVolumeClaimRetentionPolicy?.whenDeleted", Is::OneOf(&["Retain", "Delete"])),
            ("persistentVolumeClaimRetentionPolicy?.whenScaled", Is::OneOf(&["Retain", "Delete"])),
            ("replicas", Is::NotNegative),
            ("minReadySeconds", Is::NotNegative),
            ("ordinals.start", Is::NotNegative),
            ("serviceName", Is::Named(metadata::label)),
        ],
        errors,
    );
    workload::selector(&spec, "statefulset", errors);
    let template = spec.at("template");
    let whole = with_claims(template.value, list(spec.value, "/volumeClaimTemplates"));
    workload::always_template(&template.with(&whole), "StatefulSet", errors);
}

/// The template with the volumes that the set will give each pod from its claims: mounts may name them.
fn with_claims(template: &Value, claims: &[Value]) -> Value {
    let mut template = template.clone();
    if claims.is_empty() {
        return template;
    }
    let names: Vec<&str> = claims.iter().map(|claim| text(claim, "/metadata/name")).collect();
    let mut volumes = list(&template, "/spec/volumes").to_vec();
    volumes.retain(|volume| !names.contains(&text(volume, "/name")));
    volumes.extend(names.iter().map(|name| json!({"name": name, "persistentVolumeClaim": {"claimName": name}})));
    set(child(&mut template, "spec"), "volumes", volumes);
    template
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
