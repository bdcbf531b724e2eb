//! VolumeAttachments.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{flag, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::{Value, json};

pub const RULES: Rules = Rules {
    initial_status: Some(|_| json!({"attached": false})),
    status_keeps_metadata: true,
    validate,
    validate_update: |new, old, errors| errors.immutable(&new.at("spec"), &old.at("spec")),
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    errors.need(&spec.at("attacher"));
    errors.need(&spec.at("nodeName"));
    let source = spec.at("source");
    match (source.at("inlineVolumeSpec").is_set(), source.at("persistentVolumeName").is_blank()) {
        (false, true) => {
            errors.required(&source, "must specify exactly one of inlineVolumeSpec and persistentVolumeName")
        }
        (true, false) => {
            errors.invalid(&source, "must specify exactly one of inlineVolumeSpec and persistentVolumeName")
        }
        _ => {}
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    vec![
        print::name(object),
        Value::from(text(object, "/spec/attacher")),
        Value::from(text(object, "/spec/source/persistentVolumeName")),
        Value::from(text(object, "/spec/nodeName")),
        Value::from(flag(object, "/status/attached")),
        clock.age(object),
    ]
}
