//! Namespaces: they carry a finalizer of their own in `spec`, which the namespace controller takes away through
//! `finalize` once they are empty.

use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{child, copy_field, default, list, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::names::is_qualified_name;
use serde_json::{Value, json};

/// Every namespace can be selected by its name.
const NAME_LABEL: &str = "kubernetes.io/metadata.name";
const FINALIZER: &str = "kubernetes";

pub const RULES: Rules = Rules {
    name: metadata::label,
    initial_status: Some(|_| json!({"phase": "Active"})),
    default: |object| {
        default(child(object, "status"), "phase", "Active");
        label(object);
    },
    prepare_create: |object| {
        label(object);
        let spec = child(object, "spec");
        let present = list(spec, "/finalizers").iter().any(|f| f == FINALIZER);
        if !present {
            let mut finalizers = list(spec, "/finalizers").to_vec();
            finalizers.push(Value::from(FINALIZER));
            set(spec, "finalizers", finalizers);
        }
    },
    // The finalizers of spec are `finalize`'s.
    prepare_update: |new, old| copy_field(child(new, "spec"), &old["spec"], "finalizers"),
    validate: |root, errors| {
        let spec = root.at("spec");
        let finalizers = spec.at("finalizers");
        finalizers.items().for_each(|finalizer| finalizer_name(&finalizers.with(finalizer.value), errors));
    },
    validate_status,
    selectable_names: &["status.phase"],
    selectable: |object| vec![("status.phase", text(object, "/status/phase").to_owned())],
    row: Some(|object, clock: &Clock| {
        vec![print::name(object), Value::from(text(object, "/status/phase")), clock.age(object)]
    }),
    ..Rules::DEFAULT
};

fn label(object: &mut Value) {
    let name = text(object, "/metadata/name").to_owned();
    if !name.is_empty() {
        set(child(child(object, "metadata"), "labels"), NAME_LABEL, name);
    }
}

fn validate_status(new: &Field<'_, '_>, _old: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, status) = (new.at("metadata"), new.at("status"));
    // Kubernetes writes it in capitals.
    let phase = status.at("Phase").with(status.at("phase").value);
    let deleted = meta.at("deletionTimestamp").is_set();
    if deleted && phase.str() != "Terminating" {
        errors.invalid(&phase, "may only be 'Terminating' if `deletionTimestamp` is not empty");
    } else if !deleted && phase.str() != "Active" {
        errors.invalid(&phase, "may only be 'Active' if `deletionTimestamp` is empty");
    }
}

/// As `ValidateNamespaceFinalizeUpdate`.
pub fn validate_finalize(new: &Field<'_, '_>, errors: &mut Errors) {
    let spec = new.at("spec");
    spec.at("finalizers").items().for_each(|finalizer| finalizer_name(&finalizer, errors));
}

fn finalizer_name(field: &Field<'_, '_>, errors: &mut Errors) {
    errors.all(field, is_qualified_name(field.str()));
    if !field.str().contains('/') && !matches!(field.str(), FINALIZER | "orphan" | "foregroundDeletion") {
        errors.invalid(field, "name is neither a standard finalizer name nor is it fully qualified");
    }
}

/// What else a deletion changes.
pub fn terminate(object: &mut Value) {
    set(child(object, "status"), "phase", "Terminating");
}

/// True once nothing of its own holds it back.
pub fn is_finalized(object: &Value) -> bool {
    list(object, "/spec/finalizers").is_empty()
}
