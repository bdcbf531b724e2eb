//! Annotations that say something of a pod: mirror pods, costs of deletion, and the profiles of before there were fields for
//! them. As `ValidatePodSpecificAnnotations` and `ValidatePodSpecificAnnotationUpdates`.

use super::pod_defaults::CONTAINER_FIELDS;
use super::pod_scheduling::tolerations;
use super::pod_security::each_container;
use super::volume_sources::relative_path;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, items_mut, map, set, text};
use serde_json::{Value, json};

pub const MIRROR: &str = "kubernetes.io/config.mirror";
const TOLERATIONS: &str = "scheduler.alpha.kubernetes.io/tolerations";
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
pub const SECCOMP_POD: &str = "seccomp.security.alpha.kubernetes.io/pod";
pub const SECCOMP_CONTAINER: &str = "container.seccomp.security.alpha.kubernetes.io/";
pub const APPARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";

pub fn validate(annotations: &Field<'_, '_>, spec: &Field<'_, '_>, errors: &mut Errors) {
    for (key, value) in annotations.entries() {
        let text = value.str();
        if let Some(container) = key.strip_prefix(APPARMOR) {
            let mut found = false;
            each_container(spec, |c| found |= c.at("name").str() == container);
            if !found {
                errors.invalid_as(&value, container, "container not found");
            }
            if !matches!(text, "" | "runtime/default" | "unconfined") && !text.starts_with("localhost/") {
                errors.invalid(&value, format!("invalid AppArmor profile name: {text:?}"));
            }
        } else if key == SECCOMP_POD || key.starts_with(SECCOMP_CONTAINER) {
            // Its place is written with a dot, not as a key.
            seccomp(&annotations.at(key).with(value.value), errors);
        } else if key == MIRROR && spec.at("nodeName").is_blank() {
            errors.invalid(&value, "must set spec.nodeName if mirror pod annotation is set");
        } else if key == DELETION_COST && !is_cost(text) {
            errors.invalid(&value, "must be a 32bit integer");
        } else if key == TOLERATIONS && !text.is_empty() {
            match serde_json::from_str::<Value>(text) {
                Ok(list) => tolerations(&Field::root(&list), errors),
                Err(error) => errors.invalid_as(annotations, TOLERATIONS, error.to_string()),
            }
        }
    }
}

/// As `GetDeletionCostFromPodAnnotations`.
fn is_cost(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let canonical = text == "0" || digits.starts_with(|c: char| ('1'..='9').contains(&c)) || text.starts_with('-');
    canonical && text.parse::<i32>().is_ok()
}

fn seccomp(value: &Field<'_, '_>, errors: &mut Errors) {
    match value.str() {
        "runtime/default" | "docker/default" | "unconfined" => {}
        text => match text.strip_prefix("localhost/") {
            Some(path) => relative_path(&value.with(&Value::from(path)), errors),
            None => errors.invalid(value, "must be a valid seccomp profile"),
        },
    }
}

/// The profile that an annotation of old stands for; None for one that is wrong. As `ApparmorFieldForAnnotation`.
pub fn apparmor_field(annotation: &str) -> Option<Value> {
    const PROFILE_MAX: usize = 4095;
    match (annotation, annotation.strip_prefix("localhost/")) {
        ("runtime/default", _) => Some(json!({"type": "RuntimeDefault"})),
        ("unconfined", _) => Some(json!({"type": "Unconfined"})),
        (_, Some(profile)) if profile.trim() == profile && !profile.is_empty() && profile.len() <= PROFILE_MAX => {
            Some(json!({"type": "Localhost", "localhostProfile": profile}))
        }
        _ => None,
    }
}

/// Gives containers the profiles that annotations name and no field. As `applyAppArmorVersionSkew`.
pub fn apply_apparmor(pod: &mut Value) {
    let Some(annotations) = map(pod, "/metadata/annotations") else { return };
    let named: Vec<(String, Value)> = annotations
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(APPARMOR)?.to_owned(), apparmor_field(value.as_str()?)?)))
        .collect();
    if named.is_empty() || text(pod, "/spec/os/name") == "windows" {
        return;
    }
    let of_pod = pod.pointer("/spec/securityContext/appArmorProfile").cloned();
    let spec = child(pod, "spec");
    for field in CONTAINER_FIELDS {
        for container in items_mut(spec, field) {
            let profile = named.iter().find(|(name, _)| name == text(container, "/name")).map(|(_, profile)| profile);
            let own = container.pointer("/securityContext/appArmorProfile").is_some_and(|own| !own.is_null());
            if let Some(profile) = profile.filter(|profile| !own && Some(*profile) != of_pod.as_ref()) {
                set(child(container, "securityContext"), "appArmorProfile", profile.clone());
            }
        }
    }
}

/// What an update may not do to them.
pub fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let named = |key: &str| {
        if key.starts_with(APPARMOR) {
            Some("AppArmor annotations")
        } else {
            (key == MIRROR).then_some("mirror pod annotation")
        }
    };
    for (key, value) in old.entries() {
        if new.value.get(key) != Some(value.value)
            && let Some(what) = named(key)
        {
            errors.forbidden(&new.key(key), format!("may not remove or update {what}"));
        }
    }
    for (key, value) in new.entries().filter(|(key, _)| old.value.get(*key).is_none()) {
        if let Some(what) = named(key) {
            errors.forbidden(&value, format!("may not add {what}"));
        }
    }
}

/// Annotation and field may not say two things of the same profile.
pub fn agree_with_fields(annotations: &Field<'_, '_>, spec: &Field<'_, '_>, errors: &mut Errors) {
    if annotations.is_empty() {
        return;
    }
    let context = spec.at("securityContext");
    agree(annotations.value.get(SECCOMP_POD), &context.at("seccompProfile"), "seccomp", errors);
    let windows = spec.at("os").at("name").str() == "windows";
    each_container(spec, |container| {
        let (name, own) = (container.at("name").str(), container.at("securityContext"));
        let annotation = annotations.value.get(format!("{SECCOMP_CONTAINER}{name}"));
        agree(annotation, &own.at("seccompProfile"), "seccomp", errors);
        if !windows {
            let (of_pod, profile) = (context.at("appArmorProfile"), own.at("appArmorProfile"));
            let profile = if profile.is_set() { profile } else { profile.with(of_pod.value) };
            agree(annotations.value.get(format!("{APPARMOR}{name}")), &profile, "apparmor", errors);
        }
    });
}

fn agree(annotation: Option<&Value>, profile: &Field<'_, '_>, what: &str, errors: &mut Errors) {
    let Some(text) = annotation.and_then(Value::as_str).filter(|_| profile.is_set()) else { return };
    let (kind, local) = (profile.at("type"), profile.at("localhostProfile"));
    let same_kind = match kind.str() {
        "Unconfined" => text == "unconfined",
        "RuntimeDefault" => text == "runtime/default" || (what == "seccomp" && text == "docker/default"),
        "Localhost" => text.starts_with("localhost/"),
        _ => true,
    };
    if !same_kind {
        errors.forbidden(&kind, format!("{what} type in annotation and field must match"));
    } else if kind.str() == "Localhost" && text.strip_prefix("localhost/") != Some(local.str()) {
        errors.forbidden(&local, format!("{what} profile in annotation and field must match"));
    }
}
