//! CSIDrivers, CSINodes and CSIStorageCapacities.

use crate::registry::field::Errors;
use crate::registry::object::{child, default, flag, list, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::{Value, json};

pub const DRIVER: Rules = Rules {
    generation: true,
    default: |object| {
        let spec = child(object, "spec");
        for (field, value) in [
            ("attachRequired", json!(true)),
            ("podInfoOnMount", json!(false)),
            ("storageCapacity", json!(false)),
            ("fsGroupPolicy", json!("ReadWriteOnceWithFSType")),
            ("volumeLifecycleModes", json!(["Persistent"])),
            ("requiresRepublish", json!(false)),
            ("seLinuxMount", json!(false)),
        ] {
            if spec.get(field).is_none() {
                set(spec, field, value);
            }
        }
    },
    validate: |root, errors: &mut Errors| {
        let spec = root.at("spec");
        for mode in spec.at("volumeLifecycleModes").items() {
            errors.one_of(&mode, &["Ephemeral", "Persistent"]);
        }
        errors.one_of(&spec.at("fsGroupPolicy"), &["ReadWriteOnceWithFSType", "File", "None"]);
    },
    validate_update: |new, old, errors| {
        let (now, was) = (new.at("spec"), old.at("spec"));
        errors.immutable(&now.at("attachRequired"), &was.at("attachRequired"));
        errors.immutable(&now.at("volumeLifecycleModes"), &was.at("volumeLifecycleModes"));
    },
    row: Some(|object, _: &Clock| {
        vec![
            print::name(object),
            Value::from(flag(object, "/spec/attachRequired")),
            Value::from(flag(object, "/spec/podInfoOnMount")),
            Value::from(flag(object, "/spec/storageCapacity")),
        ]
    }),
    ..Rules::DEFAULT
};

pub const NODE: Rules = Rules {
    validate: |root, errors| {
        let spec = root.at("spec");
        for driver in spec.at("drivers").items() {
            errors.need(&driver.at("name"));
            errors.need(&driver.at("nodeID"));
        }
    },
    row: Some(|object, clock: &Clock| {
        vec![print::name(object), Value::from(list(object, "/spec/drivers").len()), clock.age(object)]
    }),
    ..Rules::DEFAULT
};

pub const STORAGE_CAPACITY: Rules = Rules {
    default: |object| default(object, "storageClassName", ""),
    validate: |root, errors| {
        errors.need(&root.at("storageClassName"));
    },
    validate_update: |new, old, errors| {
        for field in ["nodeTopology", "storageClassName"] {
            errors.immutable(&new.at(field), &old.at(field));
        }
    },
    row: Some(|object, _: &Clock| {
        vec![
            print::name(object),
            Value::from(text(object, "/storageClassName")),
            Value::from(text(object, "/capacity")),
        ]
    }),
    ..Rules::DEFAULT
};
