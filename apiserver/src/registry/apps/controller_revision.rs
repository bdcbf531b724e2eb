//! ControllerRevisions: what a DaemonSet or a StatefulSet once was.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{int, list, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::Value;

pub const RULES: Rules = Rules {
    validate,
    validate_update: |new, old, errors| errors.immutable(&new.at("data"), &old.at("data")),
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    if !root.at("data").is_set() {
        errors.required(&root.at("data"), "data is mandatory");
    }
    errors.not_negative(&root.at("revision"));
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let owner = list(object, "/metadata/ownerReferences").iter().find(|o| o["controller"] == true);
    let controller = owner.map_or(String::new(), |owner| {
        let kind = text(owner, "/kind").to_lowercase();
        let group = text(owner, "/apiVersion").split_once('/').map_or("", |(group, _)| group);
        let kind = if group.is_empty() { kind } else { format!("{kind}.{group}") };
        format!("{kind}/{}", text(owner, "/name"))
    });
    vec![
        print::name(object),
        print::or_none(&controller),
        Value::from(int(object, "/revision").unwrap_or(0)),
        clock.age(object),
    ]
}
