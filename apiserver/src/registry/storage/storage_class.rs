//! StorageClasses and VolumeAttributesClasses.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{default, flag, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::Value;

pub const RULES: Rules = Rules {
    default: |object| {
        default(object, "reclaimPolicy", "Delete");
        default(object, "volumeBindingMode", "Immediate");
    },
    validate,
    validate_update: |new, old, errors| {
        for (field, why) in [
            ("parameters", "updates to parameters are forbidden."),
            ("provisioner", "updates to provisioner are forbidden."),
            ("reclaimPolicy", "updates to reclaimPolicy are forbidden."),
        ] {
            let (now, was) = (new.at(field), old.at(field));
            if now.value != was.value {
                errors.forbidden(&now, why);
            }
        }
        errors.immutable(&new.at("volumeBindingMode"), &old.at("volumeBindingMode"));
    },
    row: Some(row),
    ..Rules::DEFAULT
};

pub const VOLUME_ATTRIBUTES_CLASS: Rules = Rules {
    validate: |root, errors| {
        errors.need(&root.at("driverName"));
    },
    validate_update: |new, old, errors| {
        for field in ["driverName", "parameters"] {
            if new.at(field).value != old.at(field).value {
                errors.forbidden(&new.at(field), format!("updates to {field} are forbidden."));
            }
        }
    },
    row: Some(|object, clock: &Clock| {
        let name = marked(object, "storageclass.kubernetes.io/is-default-class");
        vec![name, Value::from(text(object, "/driverName")), clock.age(object)]
    }),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    errors.need(&root.at("provisioner"));
    errors.need_one_of(&root.at("reclaimPolicy"), &["Delete", "Retain"]);
    errors.need_one_of(&root.at("volumeBindingMode"), &["Immediate", "WaitForFirstConsumer"]);
}

/// The name, with a mark if it is the default.
fn marked(object: &Value, annotation: &str) -> Value {
    let annotations = object.pointer("/metadata/annotations");
    let default = annotations.and_then(|a| a.get(annotation)).is_some_and(|v| v == "true");
    let name = text(object, "/metadata/name");
    Value::from(if default { format!("{name} (default)") } else { name.to_owned() })
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let expands = if flag(object, "/allowVolumeExpansion") { "true" } else { "false" };
    vec![
        marked(object, "storageclass.kubernetes.io/is-default-class"),
        Value::from(text(object, "/provisioner")),
        print::or(text(object, "/reclaimPolicy"), "Delete"),
        print::or(text(object, "/volumeBindingMode"), "Immediate"),
        Value::from(expands),
        clock.age(object),
    ]
}
