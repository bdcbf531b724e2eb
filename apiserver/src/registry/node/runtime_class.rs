//! RuntimeClasses.

use crate::registry::core::amount;
use crate::registry::core::pod_warnings::old_label;
use crate::registry::field::Field;
use crate::registry::object::text;
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::names::is_dns1123_label;
use serde_json::Value;

pub const RULES: Rules = Rules {
    unconditional_update: false,
    validate: |root, errors| {
        let handler = root.at("handler");
        errors.all(&handler, is_dns1123_label(handler.str()));
        let overhead = root.at("overhead");
        // Checked as the limits of a container are, and so named.
        let limits = overhead.at("limits");
        for (name, fixed) in limits.with(overhead.at("podFixed").value).entries() {
            amount(name, &fixed, errors);
        }
        let scheduling = root.at("scheduling");
        crate::registry::metadata::labels(&scheduling.at("nodeSelector"), errors);
        let tolerations = scheduling.at("tolerations");
        crate::registry::core::pod_validation::tolerations(&tolerations, errors);
        let mut seen: Vec<&Value> = Vec::new();
        for toleration in tolerations.items() {
            if seen.contains(&toleration.value) {
                errors.duplicate(&toleration);
            }
            seen.push(toleration.value);
        }
    },
    validate_update: |new, old, errors| errors.immutable(&new.at("handler"), &old.at("handler")),
    warnings: |new, _| {
        let root = Field::root(new);
        let scheduling = root.at("scheduling");
        let selector = scheduling.at("nodeSelector");
        let old = selector.entries().filter_map(|(label, _)| old_label(label));
        old.map(|what| format!("scheduling.nodeSelector: {what}")).collect()
    },
    row: Some(|object, clock: &Clock| {
        vec![print::name(object), Value::from(text(object, "/handler")), clock.age(object)]
    }),
    ..Rules::DEFAULT
};
