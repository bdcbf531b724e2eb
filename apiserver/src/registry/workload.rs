//! What kinds that make pods from a template share: the template's defaults and checks, the selector that must match
//! it, and the cells of their rows.

use super::core::{pod_annotations, pod_defaults, pod_validation, pod_warnings};
use super::field::{Errors, Field};
use super::object::child;
use super::{metadata, print};
use apimachinery::labels::Selector;
use apimachinery::status::FieldError;
use serde_json::Value;
use std::collections::BTreeMap;

/// Where the metadata and spec of a pod lie in an object.
pub fn template_pointer(group: &str, resource: &str) -> Option<&'static str> {
    match (group, resource) {
        ("", "pods") => Some(""),
        ("", "podtemplates") => Some("/template"),
        ("", "replicationcontrollers")
        | ("apps", "deployments" | "daemonsets" | "replicasets" | "statefulsets")
        | ("batch", "jobs") => Some("/spec/template"),
        ("batch", "cronjobs") => Some("/spec/jobTemplate/spec/template"),
        _ => None,
    }
}

/// No container may be privileged: what holds without `--allow-privileged`. `template` as of [`template_pointer`].
pub fn unprivileged(object: &Field<'_, '_>, template: &str, errors: &mut Errors) {
    for containers in ["initContainers", "containers", "ephemeralContainers"] {
        let path = format!("{template}/spec/{containers}[]/securityContext/privileged").replace('/', ".");
        super::checks::each(object, &path[1..], &mut |privileged| {
            if privileged.bool() {
                errors.forbidden(privileged, "disallowed by cluster policy");
            }
        });
    }
}

/// Defaults of `spec.template`.
pub fn default_template(object: &mut Value) {
    pod_defaults::template(child(child(object, "spec"), "template"));
}

/// `replicas` is 1 where nothing is said.
pub fn default_replicas(spec: &mut Value) {
    if spec.get("replicas").is_none_or(Value::is_null) {
        super::object::set(spec, "replicas", 1);
    }
}

/// Copies the template's labels to an object without any, as some kinds do.
pub fn labels_from_template(object: &mut Value) {
    let none = object.pointer("/metadata/labels").and_then(Value::as_object).is_none_or(serde_json::Map::is_empty);
    if let Some(labels) = object.pointer("/spec/template/metadata/labels").cloned().filter(|_| none) {
        super::object::set(child(object, "metadata"), "labels", labels);
    }
}

/// A pod template: `{metadata, spec}`. As `ValidatePodTemplateSpec`.
pub fn template(template: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, spec) = (template.at("metadata"), template.at("spec"));
    // Kubernetes leaves `metadata` out of their places.
    let annotations = template.at("annotations").with(meta.at("annotations").value);
    metadata::labels(&template.at("labels").with(meta.at("labels").value), errors);
    metadata::annotations(&annotations, errors);
    pod_annotations::validate(&annotations, &spec, errors);
    pod_validation::spec(&spec, errors);
    pod_annotations::agree_with_fields(&annotations, &spec, errors);
    if !spec.at("ephemeralContainers").is_empty() {
        errors.forbidden(&spec.at("ephemeralContainers"), "ephemeral containers not allowed in pod template");
    }
}

/// What is surely not meant in a template that is new or was changed: `pointer` says where it stands, `shown` how Kubernetes
/// calls the place. As `GetWarningsForPodTemplate`.
pub fn template_warnings(new: &Value, old: Option<&Value>, pointer: &str, shown: &str) -> Vec<String> {
    let Some(template) = new.pointer(pointer) else { return Vec::new() };
    if old.is_some_and(|old| old.pointer(pointer) == Some(template)) {
        return Vec::new();
    }
    let root = Field::root(&Value::Null);
    pod_warnings::of_template(&root.at(shown).with(template))
}

/// Counts of pods: none below zero, none above all of them.
pub fn replica_status(
    new: &Field<'_, '_>,
    old: &Field<'_, '_>,
    counts: &[&str],
    parts: &[&str],
    ready: &str,
    errors: &mut Errors,
) {
    let status = new.at("status");
    for field in counts.iter().chain(parts).chain(&["collisionCount"]) {
        errors.not_negative(&status.at(field));
    }
    let count = |name: &str| status.at(name).int().unwrap_or(0);
    for part in parts {
        if count(part) > count("replicas") {
            errors.invalid(&status.at(part), "cannot be greater than status.replicas");
        }
    }
    if count("availableReplicas") > count("readyReplicas") {
        errors.invalid(&status.at("availableReplicas"), format!("cannot be greater than {ready}"));
    }
    collisions(new, old, errors);
}

/// Collisions of names are counted for good.
pub fn collisions(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let before = old.value.pointer("/status/collisionCount").and_then(Value::as_i64);
    let status = new.at("status");
    let now = status.at("collisionCount");
    if before.is_some_and(|before| now.int().unwrap_or(0) < before) {
        errors.0.push(FieldError::invalid(now.path(), now.int().unwrap_or(0), "cannot be decremented"));
    }
}

/// A template whose pods run for ever. As `ValidatePodTemplateSpecForReplicaSet`, `…ForDaemonSet` and so on.
pub fn always_template(template: &Field<'_, '_>, kind: &str, errors: &mut Errors) {
    if !template.is_set() {
        errors.required(template, "");
        return;
    }
    self::template(template, errors);
    let spec = template.at("spec");
    let policy = spec.at("restartPolicy");
    if policy.str() != "Always" {
        errors.not_supported(&policy, &["Always"]);
    }
    let deadline = spec.at("activeDeadlineSeconds");
    if deadline.is_set() {
        errors.forbidden(&deadline, format!("activeDeadlineSeconds in {kind} is not Supported"));
    }
}

/// The selector must say something, and select the template's own pods. `name` as in "empty selector is invalid for".
pub fn selector(spec: &Field<'_, '_>, name: &str, errors: &mut Errors) {
    let selector = spec.at("selector");
    if !selector.is_set() {
        errors.required(&selector, "");
        return;
    }
    metadata::label_selector(&selector, errors);
    if metadata::selector_is_empty(selector.value) {
        errors.invalid(&selector, format!("empty selector is invalid for {name}"));
        return;
    }
    selects_template(&selector, &spec.at("template"), errors);
}

/// The selector must match the labels of the template.
pub fn selects_template(selector: &Field<'_, '_>, template: &Field<'_, '_>, errors: &mut Errors) {
    if !matches(selector.value, template.value.pointer("/metadata/labels")) {
        let meta = template.at("metadata");
        let labels = meta.at("labels");
        let value = if labels.is_set() { labels.value.clone() } else { serde_json::json!({}) };
        errors.0.push(FieldError::invalid(labels.path(), value, "`selector` does not match template `labels`"));
    }
}

/// Does a label selector (as JSON) match labels?
pub fn matches(selector: &Value, labels: Option<&Value>) -> bool {
    let labels: BTreeMap<String, String> =
        labels.and_then(|l| serde_json::from_value(l.clone()).ok()).unwrap_or_default();
    serde_json::from_value(selector.clone())
        .ok()
        .and_then(|s| Selector::from_label_selector(&s).ok())
        .is_some_and(|selector| selector.matches(&labels))
}

/// Once made, a selector stays.
pub fn selector_is_immutable(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    errors.immutable(&now.at("selector"), &was.at("selector"));
}

/// A number or a percentage. As `ValidatePositiveIntOrPercent`.
pub fn int_or_percent(field: &Field<'_, '_>, errors: &mut Errors) {
    match field.value {
        Value::String(text) => {
            let digits = text.strip_suffix('%').unwrap_or("");
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                errors.invalid(
                    field,
                    "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')",
                );
            }
        }
        Value::Number(_) => errors.not_negative(field),
        _ => {}
    }
}

/// More than all is more than there is. As `IsNotMoreThan100Percent`.
pub fn at_most_all(field: &Field<'_, '_>, errors: &mut Errors) {
    let percent = field.value.as_str().and_then(|t| t.strip_suffix('%')).and_then(|t| t.parse::<i64>().ok());
    if percent.is_some_and(|p| p > 100) {
        errors.invalid(field, "must not be greater than 100%");
    }
}

/// True for `0` and `0%`.
pub fn is_zero(field: &Field<'_, '_>) -> bool {
    match field.value {
        Value::Number(n) => n.as_i64() == Some(0),
        Value::String(text) => text == "0%",
        _ => false,
    }
}

/// Containers, images and the selector: the wide cells of a workload's row.
pub fn wide_cells(object: &Value) -> [Value; 3] {
    let [names, images] = print::containers(object.pointer("/spec/template/spec"));
    [names, images, print::selector(object.pointer("/spec/selector"))]
}

/// Warns of names that do not do as names of hosts, when they are given, and of what is surely not meant in the template.
pub fn name_warnings(new: &Value, old: Option<&Value>) -> Vec<String> {
    let name = super::object::text(new, "/metadata/name");
    let name = if old.is_none() { super::checks::host_name_warning(name) } else { None };
    name.into_iter().chain(spec_template_warnings(new, old)).collect()
}

/// Of the template in `spec`.
pub fn spec_template_warnings(new: &Value, old: Option<&Value>) -> Vec<String> {
    template_warnings(new, old, "/spec/template", "spec.template")
}

/// Counts of a status, which may not be below zero.
pub fn counts(new: &Field<'_, '_>, fields: &[&str], errors: &mut Errors) {
    let status = new.at("status");
    for field in fields {
        errors.not_negative(&status.at(field));
    }
}
