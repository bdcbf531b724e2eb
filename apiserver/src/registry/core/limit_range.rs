//! LimitRanges.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, items_mut, set};
use crate::registry::rules::Rules;
use apimachinery::quantity::Quantity;
use serde_json::Value;

pub const RULES: Rules = Rules { default: defaults, validate, ..Rules::DEFAULT };

/// As `SetDefaults_LimitRangeItem`: a default is no more than the maximum, a default request what is the limit.
fn defaults(object: &mut Value) {
    for item in items_mut(child(object, "spec"), "limits").filter(|item| item["type"] == "Container") {
        for (to, from) in [("default", "max"), ("defaultRequest", "default"), ("defaultRequest", "min")] {
            let source = item.get(from).and_then(Value::as_object).cloned().unwrap_or_default();
            for (name, amount) in source {
                if child(item, to).get(&name).is_none() {
                    set(child(item, to), &name, amount);
                }
            }
        }
    }
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let limits = spec.at("limits");
    let mut kinds = std::collections::HashSet::new();
    for item in limits.items() {
        let kind = item.at("type");
        if !errors.need(&kind) {
            continue;
        }
        if !kinds.insert(item.value["type"].as_str()) {
            errors.duplicate(&kind);
        }
        let amount = |field: &str, name: &str| {
            item.value.get(field)?.get(name)?.as_str().and_then(|text| Quantity::parse(text).ok())
        };
        if kind.str() == "Pod" {
            for field in ["default", "defaultRequest"] {
                if !item.at(field).is_empty() {
                    errors.forbidden(&item.at(field), "may not be specified when `type` is 'Pod'");
                }
            }
        }
        let ordered = [
            ("min", "defaultRequest"),
            ("min", "default"),
            ("min", "max"),
            ("defaultRequest", "default"),
            ("defaultRequest", "max"),
            ("default", "max"),
        ];
        for (low, high) in ordered {
            let (low_field, high_field) = (item.at(low), item.at(high));
            for (name, value) in low_field.entries() {
                if let (Some(least), Some(most)) = (amount(low, name), amount(high, name))
                    && least > most
                {
                    let shown = high_field.value[name].as_str().unwrap_or("").to_owned();
                    errors.invalid(&value, format!("{low} value {} is greater than {high} value {shown}", value.str()));
                }
            }
        }
    }
}
