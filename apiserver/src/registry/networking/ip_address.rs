//! IPAddresses: one for each cluster IP in use; its name is the address.

use crate::registry::field::{Errors, Field};
use crate::registry::object::text;
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::Value;
use std::net::IpAddr;

pub const RULES: Rules = Rules {
    generation: true,
    name: |name| match name.parse::<IpAddr>() {
        Ok(ip) if ip.to_string() == name => Vec::new(),
        _ => vec!["must be a valid IP address in canonical form".to_owned()],
    },
    validate,
    validate_update: |new, old, errors| {
        let (now, was) = (new.at("spec"), old.at("spec"));
        errors.immutable(&now.at("parentRef"), &was.at("parentRef"));
    },
    selectable_names: &["spec.parentRef.name"],
    selectable: |object| vec![("spec.parentRef.name", text(object, "/spec/parentRef/name").to_owned())],
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let parent = spec.at("parentRef");
    if !parent.is_set() {
        errors.required(&parent, "");
        return;
    }
    errors.need(&parent.at("resource"));
    errors.need(&parent.at("name"));
}

fn row(object: &Value, _clock: &Clock) -> Vec<Value> {
    let part = |field: &str| text(object, &format!("/spec/parentRef/{field}")).to_owned();
    let (group, resource, namespace, name) = (part("group"), part("resource"), part("namespace"), part("name"));
    let resource = if group.is_empty() { resource } else { format!("{resource}.{group}") };
    let name = if namespace.is_empty() { name } else { format!("{namespace}/{name}") };
    vec![print::name(object), Value::from(format!("{resource}/{name}"))]
}
