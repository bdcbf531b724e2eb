//! CSIDrivers, CSINodes and CSIStorageCapacities.

use crate::registry::checks::{Is, Table, check, driver_name, fixed, not_negative_quantity};
use crate::registry::core::pod_warnings;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{
    child, count_change, default, drop_disabled, flag, list, remove, semantically_equal, set, text,
};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::names::{is_dns1123_subdomain, is_qualified_name};
use serde_json::{Value, json};
use std::collections::HashSet;

const NODE_ID_MAX: usize = 256;
const TOKEN_MIN_SECONDS: i64 = 600;
const TOKEN_MAX_SECONDS: i64 = 1 << 32;
const UPDATE_PERIOD_MIN_SECONDS: i64 = 10;
/// What of a driver may change, and counts as a new generation.
const OPEN: [&str; 8] = [
    "tokenRequests",
    "requiresRepublish",
    "seLinuxMount",
    "podInfoOnMount",
    "storageCapacity",
    "fsGroupPolicy",
    "nodeAllocatableUpdatePeriodSeconds",
    "serviceAccountTokenInSecrets",
];
/// A feature that is off reads these.
const DISABLED: [&str; 1] = ["preventPodSchedulingIfMissing"];

pub const DRIVER: Rules = Rules {
    unconditional_update: false,
    default: |object| {
        let spec = child(object, "spec");
        for (field, value) in [
            ("attachRequired", json!(true)),
            ("podInfoOnMount", json!(false)),
            ("storageCapacity", json!(false)),
            ("fsGroupPolicy", json!("ReadWriteOnceWithFSType")),
            ("requiresRepublish", json!(false)),
            ("seLinuxMount", json!(false)),
        ] {
            if spec.get(field).is_none() {
                set(spec, field, value);
            }
        }
        if list(spec, "/volumeLifecycleModes").is_empty() {
            set(spec, "volumeLifecycleModes", json!(["Persistent"]));
        }
    },
    prepare_create: |object| drop_disabled(object, None, "/spec", &DISABLED),
    prepare_update: |new, old| {
        drop_disabled(new, Some(old), "/spec", &DISABLED);
        let of = |object: &Value, field: &str| object["spec"].get(field).cloned().unwrap_or_default();
        let changed = OPEN.iter().any(|field| !semantically_equal(&of(new, field), &of(old, field)));
        count_change(new, old, changed);
    },
    validate: validate_driver,
    validate_update: |new, old, errors| {
        let (now, was) = (new.at("spec"), old.at("spec"));
        // Kubernetes names a field that there is not.
        errors.immutable(&now.at("attachedRequired").with(now.at("attachRequired").value), &was.at("attachRequired"));
        fixed(new, old, &["spec.volumeLifecycleModes"], errors);
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

/// As `validateCSIDriverSpec`.
fn validate_driver(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    errors.one_of(&spec.at("fsGroupPolicy"), &["File", "None", "ReadWriteOnceWithFSType"]);
    let mut audiences = HashSet::new();
    for request in spec.at("tokenRequests").items() {
        let (audience, seconds) = (request.at("audience"), request.at("expirationSeconds"));
        if !audiences.insert(audience.str().to_owned()) {
            errors.duplicate(&audience);
            continue;
        }
        match seconds.int() {
            Some(..TOKEN_MIN_SECONDS) => errors.invalid(&seconds, "may not specify a duration less than 10 minutes"),
            Some(n) if n > TOKEN_MAX_SECONDS => {
                errors.invalid(&seconds, "may not specify a duration larger than 2^32 seconds");
            }
            _ => {}
        }
    }
    let modes = spec.at("volumeLifecycleModes");
    for mode in modes.items().filter(|mode| !matches!(mode.str(), "Persistent" | "Ephemeral")) {
        errors.not_supported(&modes.with(mode.value), &["Persistent", "Ephemeral"]);
    }
    let period = spec.at("nodeAllocatableUpdatePeriodSeconds");
    if period.int().is_some_and(|n| n < UPDATE_PERIOD_MIN_SECONDS) {
        errors.invalid(&period, "must be greater than or equal to 10 seconds");
    }
    if spec.at("serviceAccountTokenInSecrets").is_set() && spec.at("tokenRequests").is_empty() {
        errors.invalid(
            &spec.at("serviceAccountTokenInSecrets"),
            "serviceAccountTokenInSecrets cannot be set without tokenRequests",
        );
    }
}

pub const NODE: Rules = Rules {
    unconditional_update: false,
    validate: |root, errors| {
        let spec = root.at("spec");
        let drivers = spec.at("drivers");
        drivers.items().for_each(|driver| node_driver(&driver, errors));
        Is::UniqueBy("name").check(&drivers, errors);
    },
    // What a driver said of its node stays; how many volumes it takes may change.
    validate_update: |new, old, errors| {
        let (now, was) = (new.at("spec"), old.at("spec"));
        let but_count = |driver: &Value| {
            let mut driver = driver.clone();
            remove(&mut driver, "allocatable");
            driver
        };
        for driver in now.at("drivers").items() {
            let before = was.at("drivers");
            let before = before.items().find(|old| old.at("name").str() == driver.at("name").str());
            if let Some(before) = before
                && !semantically_equal(&but_count(driver.value), &but_count(before.value))
            {
                errors.invalid(&now.at("drivers").with(driver.value), "field is immutable");
            }
        }
    },
    row: Some(|object, clock: &Clock| {
        vec![print::name(object), Value::from(list(object, "/spec/drivers").len()), clock.age(object)]
    }),
    ..Rules::DEFAULT
};

/// As `validateCSINodeDriver`.
fn node_driver(driver: &Field<'_, '_>, errors: &mut Errors) {
    const TABLE: Table = &[
        ("name", Is::By(driver_name)),
        ("nodeID", Is::Required("")),
        ("allocatable.count", Is::NotNegative),
        ("topologyKeys", Is::Unique),
        ("topologyKeys[]", Is::RequiredName(is_qualified_name)),
    ];
    check(driver, TABLE, errors);
    let id = driver.at("nodeID");
    if id.str().len() > NODE_ID_MAX {
        errors.invalid(&id, format!("must be {NODE_ID_MAX} characters or less"));
    }
}

pub const STORAGE_CAPACITY: Rules = Rules {
    unconditional_update: false,
    default: |object| default(object, "storageClassName", ""),
    validate: |root, errors| {
        let class = root.at("storageClassName");
        errors.all(&class, is_dns1123_subdomain(class.str()));
        check(root, &[("nodeTopology", Is::LabelSelector), ("capacity", Is::By(not_negative_quantity))], errors);
    },
    validate_update: |new, old, errors| fixed(new, old, &["nodeTopology", "storageClassName"], errors),
    warnings: |new, _| {
        let (root, mut warnings) = (Field::root(new), Vec::new());
        let topology = root.at("nodeTopology");
        pod_warnings::node_term(&topology, &mut warnings);
        for (label, _) in topology.at("matchLabels").entries() {
            warnings
                .extend(pod_warnings::old_label(label).map(|what| format!("nodeTopology.matchLabels.{label}: {what}")));
        }
        warnings
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
