//! PriorityClasses.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{default, flag, int, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::Value;

/// The highest priority that users may give; above are the system's own.
const USER_MAX: i64 = 1_000_000_000;
const SYSTEM_CLASSES: [(&str, i64); 2] =
    [("system-cluster-critical", 2_000_000_000), ("system-node-critical", 2_000_001_000)];

pub const RULES: Rules = Rules {
    generation: true,
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
        if !SYSTEM_CLASSES.contains(&(name.str(), priority)) {
            errors.forbidden(
                &name,
                format!(
                    "priority class names with 'system-' prefix are reserved for system use only. error: {} is not a known system priority class",
                    name.str()
                ),
            );
        }
    } else if priority > USER_MAX {
        errors.forbidden(&value, format!("maximum allowed value of a user defined priority is {USER_MAX}"));
    }
    errors.one_of(&root.at("preemptionPolicy"), &["Never", "PreemptLowerPriority"]);
}
