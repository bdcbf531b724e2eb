//! What of a pod may change: a handful of fields by an update, ephemeral containers and resources through subresources of their
//! own. As `ValidatePodUpdate`, `ValidatePodEphemeralContainersUpdate` and `ValidatePodResize`.

use super::pod_annotations::{self, MIRROR};
use super::pod_scheduling::{node_affinity_additions, node_selector_additions};
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, copy_field, differences, items_mut, list, remove, semantically_equal, set, text};
use apimachinery::pod::qos_class_of;
use apimachinery::status::FieldError;
use serde_json::Value;

const UPDATABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";
const CONTAINERS: [&str; 2] = ["containers", "initContainers"];

/// A pod's spec is what it was made with, but for a handful of fields.
pub fn validate(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    annotations(new, old, errors);
    let (now, was) = (new.at("spec"), old.at("spec"));
    for field in CONTAINERS {
        let (list, before) = (now.at(field), was.at(field));
        if list.len() != before.len() {
            errors.forbidden(&list, "pod updates may not add or remove containers");
            return;
        }
    }
    if !deadline(&now, &was, errors) {
        return;
    }
    tolerations(&now.at("tolerations"), &was.at("tolerations"), errors);
    gates(&now.at("schedulingGates"), &was.at("schedulingGates"), errors);
    if semantically_equal(now.value, was.value) {
        return;
    }
    // Put back what may differ: the rest must be as it was.
    let mut rest = now.value.clone();
    for field in CONTAINERS {
        for (container, before) in items_mut(&mut rest, field).zip(list(was.value, &format!("/{field}"))) {
            copy_field(container, before, "image");
        }
    }
    for field in ["activeDeadlineSeconds", "schedulingGates", "tolerations"] {
        copy_field(&mut rest, was.value, field);
    }
    let grace = |spec: &Field<'_, '_>| spec.at("terminationGracePeriodSeconds").int();
    if grace(&was).is_some_and(|seconds| seconds < 0) && grace(&now) == Some(1) {
        copy_field(&mut rest, was.value, "terminationGracePeriodSeconds");
    }
    if !was.at("schedulingGates").is_empty() {
        narrowing(&now, &was, &mut rest, errors);
    }
    if !semantically_equal(&rest, was.value) {
        let diff = differences(was.value, &rest);
        errors.forbidden(&now, format!("pod updates may not change fields other than {UPDATABLE}\n{diff}"));
    }
}

fn annotations(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, old_meta) = (new.at("metadata"), old.at("metadata"));
    pod_annotations::validate_update(&meta.at("annotations"), &old_meta.at("annotations"), errors);
}

/// True if the rest may be looked at.
fn deadline(now: &Field<'_, '_>, was: &Field<'_, '_>, errors: &mut Errors) -> bool {
    let (field, before) = (now.at("activeDeadlineSeconds"), was.at("activeDeadlineSeconds"));
    match (field.int(), before.int()) {
        (Some(new), _) if !(0..=i64::from(i32::MAX)).contains(&new) => {
            errors.in_range(&field, 0, i64::from(i32::MAX));
            return false;
        }
        (Some(new), Some(old)) if new > old => {
            errors.invalid(&field, "must be less than or equal to previous value");
            return false;
        }
        (None, Some(_)) => {
            let why = "must not update from a positive integer to nil value";
            errors.0.push(FieldError::invalid(field.path(), Value::Null, why));
        }
        _ => {}
    }
    true
}

/// As `validateOnlyAddedTolerations`: only for how long something is tolerated may be said anew.
fn tolerations(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let same =
        |a: &Value, b: &Value| ["key", "operator", "value", "effect"].iter().all(|field| a.get(field) == b.get(field));
    if old.items().any(|t| !new.items().any(|n| same(n.value, t.value))) {
        errors.forbidden(new, "existing toleration can not be modified except its tolerationSeconds");
    }
}

/// As `validateOnlyDeletedSchedulingGates`.
fn gates(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    for gate in new.items() {
        let name = gate.at("name");
        if !old.items().any(|g| g.at("name").str() == name.str()) {
            let why = format!("only deletion is allowed, but found new scheduling gate '{}'", name.str());
            errors.forbidden(&name, why);
        }
    }
}

/// A pod that waits at a gate may be told to run in fewer places.
fn narrowing(now: &Field<'_, '_>, was: &Field<'_, '_>, rest: &mut Value, errors: &mut Errors) {
    let (selector, before) = (now.at("nodeSelector"), was.at("nodeSelector"));
    if !semantically_equal(selector.value, before.value) {
        node_selector_additions(&selector, &before, errors);
        copy_field(rest, was.value, "nodeSelector");
    }
    let (affinity, before) = (now.at("affinity"), was.at("affinity"));
    let (node, node_before) = (affinity.at("nodeAffinity"), before.at("nodeAffinity"));
    if semantically_equal(node.value, node_before.value) {
        return;
    }
    node_affinity_additions(&node, &node_before, errors);
    let affinity = child(rest, "affinity");
    if node_before.is_set() {
        set(affinity, "nodeAffinity", node_before.value.clone());
    } else {
        remove(affinity, "nodeAffinity");
    }
}

// === ephemeral containers ===

/// Ephemeral containers come and stay.
pub fn validate_ephemeral(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    if is_mirror(old) {
        errors.0 = vec![FieldError::forbidden("", "static pods do not support ephemeral containers")];
        return;
    }
    annotations(new, old, errors);
    let (now, was) = (new.at("spec"), old.at("spec"));
    let (list, before) = (now.at("ephemeralContainers"), was.at("ephemeralContainers"));
    for container in before.items() {
        let name = text(container.value, "/name");
        match list.items().find(|c| text(c.value, "/name") == name) {
            None => errors.forbidden(&list, format!("existing ephemeral containers {name:?} may not be removed\n")),
            Some(kept) if !semantically_equal(kept.value, container.value) => {
                let diff = differences(container.value, kept.value);
                errors.forbidden(&list, format!("existing ephemeral containers {name:?} may not be changed\n{diff}"));
            }
            Some(_) => {}
        }
    }
}

fn is_mirror(pod: &Field<'_, '_>) -> bool {
    let meta = pod.at("metadata");
    meta.at("annotations").key(MIRROR).is_set()
}

// === resizing ===

fn names<'v>(pod: &'v Value, field: &str) -> Vec<&'v str> {
    list(pod, &format!("/spec/{field}")).iter().map(|container| text(container, "/name")).collect()
}

/// A resize changes the resources of containers, or of the pod, and nothing else. As `podResizeStrategy.PrepareForUpdate`.
pub fn prepare_resize(new: &mut Value, old: &Value) {
    if CONTAINERS.iter().any(|field| names(new, field) != names(old, field)) {
        // Validation says what is wrong with that.
        return;
    }
    let mut result = old.clone();
    for field in CONTAINERS {
        let wanted = list(new, &format!("/spec/{field}"));
        for (container, wanted) in items_mut(child(&mut result, "spec"), field).zip(wanted) {
            for part in ["resources", "resizePolicy"] {
                copy_field(container, wanted, part);
            }
        }
    }
    copy_field(child(&mut result, "spec"), new.get("spec").unwrap_or(&Value::Null), "resources");
    copy_field(child(&mut result, "metadata"), new.get("metadata").unwrap_or(&Value::Null), "resourceVersion");
    *new = result;
}

pub fn validate_resize(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    if is_mirror(old) {
        errors.0 = vec![FieldError::forbidden("", "static pods cannot be resized")];
        return;
    }
    if was.at("os").at("name").str() == "windows" {
        errors.0 = vec![FieldError::forbidden("", "windows pods cannot be resized")];
        return;
    }
    for field in CONTAINERS {
        let (names, before) = (names(new.value, field), names(old.value, field));
        if names.len() != before.len() {
            errors.forbidden(&now, format!("{field} may not be added or removed on resize"));
            return;
        }
        if names != before {
            errors.forbidden(&now, format!("{field} may not be renamed or reordered on resize"));
            return;
        }
    }
    if qos_class_of(now.value) != qos_class_of(was.value) {
        let class = text(new.value, "/status/qosClass");
        errors.invalid_as(&now, class, "Pod QOS Class may not change as a result of resizing");
    }
    if !node_can_resize(old.value) {
        errors.forbidden(&now, "Pod running on node without support for resize");
    }
    nothing_removed(&now.at("resources"), &was.at("resources"), errors);
    for field in CONTAINERS {
        let (containers, before) = (now.at(field), was.at(field));
        for (container, before) in containers.items().zip(before.items()) {
            let sidecar = field == "containers" || before.at("restartPolicy").str() == "Always";
            let (wanted, had) = (container.at("resources"), before.at("resources"));
            if !sidecar {
                if !semantically_equal(container.value, before.value) {
                    errors.forbidden(&now, "resources for non-sidecar init containers are immutable");
                }
                continue;
            }
            nothing_removed(&wanted, &had, errors);
            if !semantically_equal(&beside_cpu_and_memory(wanted.value), &beside_cpu_and_memory(had.value)) {
                let of = if field == "containers" { "" } else { " for sidecar containers" };
                errors.forbidden(&now, format!("only cpu and memory resources{of} are mutable"));
            }
        }
    }
}

/// What is requested or limited may be changed, not taken away.
fn nothing_removed(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    for kind in ["requests", "limits"] {
        let (wanted, had) = (new.at(kind), old.at(kind));
        if had.entries().any(|(name, _)| wanted.value.get(name).is_none()) {
            errors.forbidden(&wanted, format!("resource {kind} cannot be removed"));
        }
    }
}

fn beside_cpu_and_memory(resources: &Value) -> Value {
    let mut rest = resources.clone();
    for kind in ["limits", "requests"] {
        for name in ["cpu", "memory"] {
            if let Some(amounts) = rest.get_mut(kind) {
                remove(amounts, name);
            }
        }
    }
    rest
}

/// Nodes that can resize say what their containers have. As `isPodResizeRequestSupported`.
fn node_can_resize(pod: &Value) -> bool {
    let running = |status: &&Value| status.pointer("/state/running").is_some();
    list(pod, "/status/containerStatuses").iter().find(running).is_none_or(|s| s.get("resources").is_some())
}
