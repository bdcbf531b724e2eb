//! PriorityClasses.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, flag, int, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::Value;

/// The highest priority that users may give; above are the system's own.
const USER_MAX: i64 = 1_000_000_000;
const SYSTEM_CLASSES: [(&str, i64); 2] =
    [("system-cluster-critical", 2_000_000_000), ("system-node-critical", 2_000_001_000)];

pub const RULES: Rules = Rules {
    // The first generation stays: what matters of a class does not change.
    prepare_create: |object| set(child(object, "metadata"), "generation", 1),
    default: |object| {
        default(object, "preemptionPolicy", "PreemptLowerPriority");
        if object.get("value").is_none() {
            set(object, "value", 0);
        }
    },
    validate,
    validate_update: |new, old, errors| {
        if new.at("value").int() != old.at("value").int() {
            errors.forbidden(&new.at("value"), "may not be changed in an update.");
        }
        errors.immutable(&new.at("preemptionPolicy"), &old.at("preemptionPolicy"));
    },
    row: Some(|object, clock: &Clock| {
        vec![
            print::name(object),
            Value::from(int(object, "/value").unwrap_or(0)),
            Value::from(flag(object, "/globalDefault")),
            clock.age(object),
            Value::from(text(object, "/preemptionPolicy")),
        ]
    }),
    ..Rules::DEFAULT
};

/// As `ValidatePriorityClass`.
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, value) = (root.at("metadata"), root.at("value"));
    let name = meta.at("name");
    let priority = value.int().unwrap_or(0);
    if name.str().starts_with("system-") {
        if let Some(why) = not_of_the_system(name.str(), priority, root.at("globalDefault").bool()) {
            let reserved = "priority class names with 'system-' prefix are reserved for system use only. error: ";
            errors.forbidden(&name, format!("{reserved}{why}"));
        }
    } else if priority > USER_MAX {
        errors.forbidden(&value, format!("maximum allowed value of a user defined priority is {USER_MAX}"));
    }
    errors.one_of(&root.at("preemptionPolicy"), &["PreemptLowerPriority", "Never"]);
}

/// As `IsKnownSystemPriorityClass`.
fn not_of_the_system(name: &str, priority: i64, global_default: bool) -> Option<String> {
    match SYSTEM_CLASSES.iter().find(|(known, _)| *known == name) {
        None => Some(format!("{name} is not a known system priority class")),
        Some((_, value)) if *value != priority => Some(format!("value of {name} PriorityClass must be {value}")),
        Some(_) if global_default => Some(format!("globalDefault of {name} PriorityClass must be false")),
        Some(_) => None,
    }
}
