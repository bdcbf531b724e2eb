//! IPAddresses: one for each cluster IP in use; its name is the address.

use crate::registry::checks::{Is, check, fixed};
use crate::registry::metadata::path_segment;
use crate::registry::object::text;
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::names::is_dns1123_subdomain;
use serde_json::Value;
use std::net::IpAddr;

pub const RULES: Rules = Rules {
    name: |name| match name.parse::<IpAddr>() {
        Ok(ip) if ip.to_string() == name => Vec::new(),
        Ok(ip) => vec![format!("must be in canonical form ({:?})", ip.to_string())],
        Err(_) => vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".to_owned()],
    },
    validate: |root, errors| {
        check(
            root,
            &[
                ("spec.parentRef", Is::Required("")),
                ("spec.parentRef?.group", Is::Named(is_dns1123_subdomain)),
                ("spec.parentRef?.resource", Is::RequiredName(path_segment)),
                ("spec.parentRef?.name", Is::RequiredName(path_segment)),
                ("spec.parentRef?.namespace", Is::Named(path_segment)),
            ],
            errors,
        );
    },
    validate_update: |new, old, errors| fixed(new, old, &["spec.parentRef"], errors),
    selectable_names: &["spec.parentRef.name"],
    selectable: |object| vec![("spec.parentRef.name", text(object, "/spec/parentRef/name").to_owned())],
    row: Some(row),
    ..Rules::DEFAULT
};

fn row(object: &Value, _clock: &Clock) -> Vec<Value> {
    let part = |field: &str| text(object, &format!("/spec/parentRef/{field}")).to_owned();
    let (group, resource, namespace, name) = (part("group"), part("resource"), part("namespace"), part("name"));
    let resource = if group.is_empty() { resource } else { format!("{resource}.{group}") };
    let name = if namespace.is_empty() { name } else { format!("{namespace}/{name}") };
    vec![print::name(object), Value::from(format!("{resource}/{name}"))]
}
