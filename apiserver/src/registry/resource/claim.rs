//! ResourceClaims and their templates, and DeviceClasses.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{default, items_mut, list, set};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::Value;

pub const CLAIM: Rules = Rules {
    default: |object| {
        if let Some(devices) = object.pointer_mut("/spec/devices") {
            device_defaults(devices);
        }
    },
    validate: |root, errors| devices(&root.at("spec"), errors),
    validate_update: |new, old, errors| errors.immutable(&new.at("spec"), &old.at("spec")),
    row: Some(|object, clock: &Clock| vec![print::name(object), Value::from(state(object)), clock.age(object)]),
    ..Rules::DEFAULT
};

pub const TEMPLATE: Rules = Rules {
    default: |object| {
        if let Some(devices) = object.pointer_mut("/spec/spec/devices") {
            device_defaults(devices);
        }
    },
    validate: |root, errors| {
        let spec = root.at("spec");
        devices(&spec.at("spec"), errors);
    },
    validate_update: |new, old, errors| errors.immutable(&new.at("spec"), &old.at("spec")),
    row: None,
    ..Rules::DEFAULT
};

pub const DEVICE_CLASS: Rules = Rules { generation: true, ..Rules::DEFAULT };

fn device_defaults(devices: &mut Value) {
    for request in items_mut(devices, "requests") {
        if let Some(exactly) = request.get_mut("exactly") {
            count_defaults(exactly);
        }
        items_mut(request, "firstAvailable").for_each(count_defaults);
    }
}

fn count_defaults(request: &mut Value) {
    default(request, "allocationMode", "ExactCount");
    if request["allocationMode"] == "ExactCount" && request.get("count").is_none() {
        set(request, "count", 1);
    }
    for toleration in items_mut(request, "tolerations") {
        default(toleration, "operator", "Equal");
    }
}

fn devices(spec: &Field<'_, '_>, errors: &mut Errors) {
    let devices = spec.at("devices");
    for request in devices.at("requests").items() {
        let name = request.at("name");
        if errors.need(&name) {
            errors.all(&name, apimachinery::names::is_dns1123_label(name.str()));
        }
        let exactly = request.at("exactly");
        match (exactly.is_set(), request.at("firstAvailable").is_empty()) {
            (false, true) => errors.required(&request, "exactly one of `exactly` or `firstAvailable` is required"),
            (true, false) => {
                errors.invalid(
                    &request,
                    "exactly one of `exactly` or `firstAvailable` is required, but multiple fields are set",
                );
            }
            (true, true) => {
                errors.need(&exactly.at("deviceClassName"));
            }
            (false, false) => {}
        }
    }
}

fn state(object: &Value) -> String {
    let deleted = object.pointer("/metadata/deletionTimestamp").is_some();
    let mut states = Vec::new();
    if deleted {
        states.push("deleted");
    }
    if object.pointer("/status/allocation").is_none() {
        if !deleted {
            states.push("pending");
        }
    } else {
        states.push("allocated");
        if !list(object, "/status/reservedFor").is_empty() {
            states.push("reserved");
        }
    }
    states.join(",")
}
