//! VolumeAttachments.

use crate::registry::checks::{Is, check, driver_name, fixed};
use crate::registry::field::{Errors, Field};
use crate::registry::object::{flag, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::names::is_dns1123_subdomain;
use serde_json::{Value, json};

const METADATA_MAX_BYTES: usize = 256 * 1024;
const MESSAGE_MAX_BYTES: usize = 1024;

pub const RULES: Rules = Rules {
    initial_status: Some(|_| json!({"attached": false})),
    status_keeps_metadata: true,
    unconditional_update: false,
    validate,
    validate_update: |new, old, errors| fixed(new, old, &["spec"], errors),
    validate_status: |new, _, errors| status(&new.at("status"), errors),
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let source = spec.at("source");
    let (inline, name) = (source.at("inlineVolumeSpec"), source.at("persistentVolumeName"));
    let one = "must specify exactly one of inlineVolumeSpec and persistentVolumeName";
    check(
        &spec,
        &[
            ("attacher", Is::By(driver_name)),
            ("nodeName", Is::By(|node, errors| errors.all(node, is_dns1123_subdomain(node.str())))),
        ],
        errors,
    );
    match (inline.is_set(), name.is_set()) {
        (false, false) => errors.required(&source, one),
        (true, true) => errors.forbidden(&source, one),
        (false, true) if name.is_blank() => errors.required(&name, "must specify non empty persistentVolumeName"),
        (false, true) => errors.all(&name, is_dns1123_subdomain(name.str())),
        (true, false) => {}
    }
}

/// As `validateVolumeAttachmentStatus`.
fn status(status: &Field<'_, '_>, errors: &mut Errors) {
    let metadata = status.at("attachmentMetadata");
    let size: usize = metadata.entries().map(|(key, value)| key.len() + value.str().len()).sum();
    if size > METADATA_MAX_BYTES {
        errors.too_long(&metadata, METADATA_MAX_BYTES);
    }
    for name in ["attachError", "detachError"] {
        let error = status.at(name);
        if error.at("message").str().len() > MESSAGE_MAX_BYTES {
            errors.too_long(&error.at("message"), METADATA_MAX_BYTES);
        }
        errors.in_range(&error.at("errorCode"), 0, i64::from(i32::MAX));
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
