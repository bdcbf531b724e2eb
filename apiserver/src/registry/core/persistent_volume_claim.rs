//! PersistentVolumeClaims.

use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{child, copy_field, default, list, semantically_equal, text};
use crate::registry::print::{self, Clock, UNSET};
use crate::registry::rules::Rules;
use apimachinery::names::is_dns1123_subdomain;
use apimachinery::quantity::Quantity;
use serde_json::{Value, json};

pub const ACCESS_MODES: [&str; 4] = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];

pub const RULES: Rules = Rules {
    initial_status: Some(|_| json!({"phase": "Pending"})),
    default: |object| {
        default(child(object, "status"), "phase", "Pending");
        default(child(object, "spec"), "volumeMode", "Filesystem");
    },
    validate: |root, errors| spec(&root.at("spec"), errors),
    validate_update,
    row: Some(row),
    ..Rules::DEFAULT
};

/// As `ValidatePersistentVolumeClaimSpec`.
pub fn spec(spec: &Field<'_, '_>, errors: &mut Errors) {
    access_modes(&spec.at("accessModes"), errors);
    let selector = spec.at("selector");
    if selector.is_set() {
        metadata::label_selector(&selector, errors);
    }
    let resources = spec.at("resources");
    let requests = resources.at("requests");
    let storage = requests.key("storage");
    if !storage.is_set() {
        errors.required(&storage, "");
    } else if Quantity::parse(storage.str()).is_ok_and(|q| q <= Quantity::ZERO) {
        errors.invalid(&storage, "must be greater than zero");
    }
    storage_class(&spec.at("storageClassName"), errors);
    errors.one_of(&spec.at("volumeMode"), &["Block", "Filesystem"]);
    for source in ["dataSource", "dataSourceRef"] {
        let source = spec.at(source);
        if source.is_set() {
            errors.need(&source.at("name"));
            errors.need(&source.at("kind"));
        }
    }
}

pub fn access_modes(modes: &Field<'_, '_>, errors: &mut Errors) {
    if modes.is_empty() {
        errors.required(modes, "at least 1 access mode is required");
    }
    for mode in modes.items() {
        errors.one_of(&mode, &ACCESS_MODES);
    }
    if modes.len() > 1 && modes.items().any(|mode| mode.str() == "ReadWriteOncePod") {
        errors.forbidden(modes, "may not use ReadWriteOncePod with other access modes");
    }
}

pub fn storage_class(class: &Field<'_, '_>, errors: &mut Errors) {
    if !class.is_blank() {
        errors.all(class, is_dns1123_subdomain(class.str()));
    }
}

/// As `ValidatePersistentVolumeClaimUpdate`.
fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    let mut expected = was.value.clone();
    if was.at("volumeName").is_blank() {
        copy_field(&mut expected, now.value, "volumeName");
        // Claims made before a default class was chosen may be given one.
        if !was.at("storageClassName").is_set() {
            copy_field(&mut expected, now.value, "storageClassName");
        }
    }
    copy_field(&mut expected, now.value, "volumeAttributesClassName");
    let bound = text(old.value, "/status/phase") == "Bound";
    let resources = now.at("resources");
    if bound {
        copy_field(child(&mut expected, "resources"), resources.value, "requests");
    }
    if !semantically_equal(&expected, now.value) {
        errors.forbidden(
            &now,
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims",
        );
    }
    let amount = |claim: &Value, pointer: &str| Quantity::parse(text(claim, pointer)).unwrap_or_default();
    let wanted = amount(new.value, "/spec/resources/requests/storage");
    let before = amount(old.value, "/spec/resources/requests/storage");
    if wanted < before && wanted <= amount(old.value, "/status/capacity/storage") {
        let requests = resources.at("requests");
        errors.forbidden(&requests.key("storage"), "field can not be less than status.capacity");
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let phase = match object.pointer("/metadata/deletionTimestamp") {
        Some(_) => "Terminating",
        None => text(object, "/status/phase"),
    };
    let volume = text(object, "/spec/volumeName");
    let (modes, capacity) = if volume.is_empty() {
        (String::new(), "")
    } else {
        (print::access_modes(list(object, "/status/accessModes")), text(object, "/status/capacity/storage"))
    };
    vec![
        print::name(object),
        Value::from(phase),
        Value::from(volume),
        Value::from(capacity),
        Value::from(modes),
        Value::from(text(object, "/spec/storageClassName")),
        print::or(text(object, "/spec/volumeAttributesClassName"), UNSET),
        clock.age(object),
        print::or(text(object, "/spec/volumeMode"), UNSET),
    ]
}

pub fn template(template: &Field<'_, '_>, errors: &mut Errors) { spec(&template.at("spec"), errors); }
