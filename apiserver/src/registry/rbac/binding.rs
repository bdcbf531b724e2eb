//! RoleBindings and ClusterRoleBindings.

use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{default, items_mut, list, semantically_equal, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::Value;

const GROUP: &str = "rbac.authorization.k8s.io";

pub const ROLE_BINDING: Rules = Rules {
    name: metadata::path_segment,
    default: defaults,
    validate: |root, errors| validate(root, true, errors),
    validate_update: |new, old, errors| {
        let (now, was) = (new.at("roleRef"), old.at("roleRef"));
        if !semantically_equal(now.value, was.value) {
            errors.invalid(&now, "cannot change roleRef");
        }
    },
    row: Some(row),
    create_on_update: true,
    ..Rules::DEFAULT
};

pub const CLUSTER_ROLE_BINDING: Rules =
    Rules { validate: |root, errors| validate(root, false, errors), ..ROLE_BINDING };

fn defaults(object: &mut Value) {
    if let Some(role) = object.get_mut("roleRef") {
        default(role, "apiGroup", GROUP);
    }
    for subject in items_mut(object, "subjects") {
        if matches!(text(subject, "/kind"), "User" | "Group") {
            default(subject, "apiGroup", GROUP);
        }
    }
}

fn validate(root: &Field<'_, '_>, namespaced: bool, errors: &mut Errors) {
    let role = root.at("roleRef");
    let (group, kind, name) = (role.at("apiGroup"), role.at("kind"), role.at("name"));
    if group.str() != GROUP {
        errors.not_supported(&group, &[GROUP]);
    }
    match (kind.str(), namespaced) {
        ("ClusterRole", _) | ("Role", true) => {}
        (_, true) => errors.not_supported(&kind, &["Role", "ClusterRole"]),
        (_, false) => errors.not_supported(&kind, &["ClusterRole"]),
    }
    if errors.need(&name) {
        errors.all(&name, metadata::path_segment(name.str()));
    }
    for subject in root.at("subjects").items() {
        let (kind, group, name) = (subject.at("kind"), subject.at("apiGroup"), subject.at("name"));
        errors.need(&name);
        match kind.str() {
            "ServiceAccount" => {
                if !name.is_blank() {
                    errors.all(&name, metadata::subdomain(name.str()));
                }
                if !group.is_blank() {
                    errors.not_supported(&group, &[""]);
                }
                if !namespaced && subject.at("namespace").is_blank() {
                    errors.required(&subject.at("namespace"), "");
                }
            }
            "User" | "Group" => {
                if group.str() != GROUP {
                    errors.not_supported(&group, &[GROUP]);
                }
            }
            _ => errors.not_supported(&kind, &["ServiceAccount", "User", "Group"]),
        }
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let named = |kind: &str| {
        let subjects = list(object, "/subjects").iter().filter(|s| s["kind"] == kind);
        let names = subjects.map(|s| match (kind, text(s, "/namespace")) {
            ("ServiceAccount", namespace) => format!("{namespace}/{}", text(s, "/name")),
            _ => text(s, "/name").to_owned(),
        });
        Value::from(names.collect::<Vec<_>>().join(", "))
    };
    let role = format!("{}/{}", text(object, "/roleRef/kind"), text(object, "/roleRef/name"));
    vec![
        print::name(object),
        Value::from(role),
        clock.age(object),
        named("User"),
        named("Group"),
        named("ServiceAccount"),
    ]
}
