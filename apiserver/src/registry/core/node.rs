//! Nodes.

use super::pod_scheduling::TAINT_EFFECTS;
use super::resources;
use crate::registry::checks::legacy_cidr;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, flag, list, map, remove, set, text};
use crate::registry::print::{self, Clock, NONE, UNKNOWN};
use crate::registry::rules::Rules;
use apimachinery::names::{is_label_value, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::Value;
use std::collections::BTreeSet;

pub const RULES: Rules = Rules {
    // A kubelet registers its node with the status that it knows.
    initial_status: None,
    default: |object| {
        if object.pointer("/status/allocatable").is_none()
            && let Some(capacity) = object.pointer("/status/capacity").cloned()
        {
            set(child(object, "status"), "allocatable", capacity);
        }
        // One and the same thing, told twice.
        let (one, many) = (text(object, "/spec/podCIDR").to_owned(), list(object, "/spec/podCIDRs").to_vec());
        match (one.is_empty(), many.first()) {
            (false, first) if first.is_none_or(|first| *first != *one) => {
                set(child(object, "spec"), "podCIDRs", vec![one])
            }
            (true, Some(first)) => set(child(object, "spec"), "podCIDR", first.clone()),
            _ => {}
        }
    },
    prepare_create: |object| {
        remove(child(object, "spec"), "configSource");
    },
    prepare_update: |new, old| keep_disabled(new, old, "spec", "configSource"),
    prepare_status: |new, old| keep_disabled(new, old, "status", "config"),
    validate,
    validate_update,
    validate_status: |new, old, errors| {
        status(&new.at("status"), errors);
        validate_update(new, old, errors);
    },
    warnings: |new, _| {
        let used = |pointer| new.pointer(pointer).is_some_and(|value| !value.is_null() && value != "");
        [
            ("/spec/configSource", "spec.configSource: the feature is deprecated in v1.22 and removed in v1.24+"),
            ("/spec/externalID", "spec.externalID: this field is deprecated, and is unused by Kubernetes"),
        ]
        .into_iter()
        .filter(|(pointer, _)| used(pointer))
        .map(|(_, warning)| warning.to_owned())
        .collect()
    },
    selectable_names: &["spec.unschedulable"],
    selectable: |object| vec![("spec.unschedulable", flag(object, "/spec/unschedulable").to_string())],
    row: Some(row),
    ..Rules::DEFAULT
};

/// A field that means nothing any more stays with who has it.
fn keep_disabled(new: &mut Value, old: &Value, parent: &str, field: &str) {
    if old.get(parent).is_none_or(|parent| parent.get(field).is_none()) {
        remove(child(new, parent), field);
    }
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    // Kubernetes says that they are metadata.
    taints(&meta.at("taints").with(spec.at("taints").value), errors);
    status(&root.at("status"), errors);
    let cidrs = spec.at("podCIDRs");
    cidrs.items().for_each(|cidr| legacy_cidr(&cidr, errors));
    if cidrs.len() > 1 {
        let of_v6 = cidrs.items().filter(|cidr| cidr.str().contains(':')).count();
        if cidrs.len() > 2 || of_v6 != 1 {
            errors.invalid(&cidrs, "may specify no more than one CIDR for each IP family");
        }
        for (at, cidr) in cidrs.items().enumerate() {
            if cidrs.items().take(at).any(|other| other.str() == cidr.str()) {
                errors.duplicate(&cidr);
            }
        }
    }
}

/// As `validateNodeTaints`.
fn taints(taints: &Field<'_, '_>, errors: &mut Errors) {
    for (at, taint) in taints.items().enumerate() {
        let (key, value, effect) = (taint.at("key"), taint.at("value"), taint.at("effect"));
        errors.all(&key, is_qualified_name(key.str()));
        let messages = is_label_value(value.str());
        if !messages.is_empty() {
            errors.invalid(&value, messages.join(";"));
        }
        errors.need_one_of(&effect, &TAINT_EFFECTS);
        let same = |t: &Field<'_, '_>| t.at("key").str() == key.str() && t.at("effect").str() == effect.str();
        if taints.items().take(at).any(|t| same(&t)) {
            let mut error = FieldError::duplicate(taint.path(), taint.value.clone());
            error.detail = "taints must be unique by key and effect pair".to_owned();
            errors.0.push(error);
        }
    }
}

/// As `ValidateNodeResources`.
fn status(status: &Field<'_, '_>, errors: &mut Errors) {
    for field in ["capacity", "allocatable"] {
        let list = status.at(field);
        for (name, quantity) in list.entries() {
            resources::amount(name, &list.at(name).with(quantity.value), errors);
        }
    }
}

/// What was once given stays. As `ValidateNodeUpdate`.
fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was, status) = (new.at("spec"), old.at("spec"), new.at("status"));
    let addresses = status.at("addresses");
    for (at, address) in addresses.items().enumerate() {
        if addresses.items().take(at).any(|other| other.value == address.value) {
            errors.duplicate(&address);
        }
    }
    let (cidrs, before) = (now.at("podCIDRs"), was.at("podCIDRs"));
    if !before.is_empty() && cidrs.value != before.value {
        errors.forbidden(&cidrs, "node updates may not change podCIDR except from \"\" to valid");
    }
    let (provider, before) = (now.at("providerID"), was.at("providerID"));
    if !before.is_blank() && provider.value != before.value {
        errors.forbidden(&provider, "node updates may not change providerID except from \"\" to valid");
    }
    if now.at("externalID").str() != was.at("externalID").str() {
        errors.forbidden(&now.at("externalID"), "may not be updated");
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let ready = list(object, "/status/conditions").iter().find(|c| c["type"] == "Ready");
    let mut status = match ready {
        None => "Unknown".to_owned(),
        Some(condition) if condition["status"] == "True" => "Ready".to_owned(),
        Some(_) => "NotReady".to_owned(),
    };
    if flag(object, "/spec/unschedulable") {
        status.push_str(",SchedulingDisabled");
    }
    let address = |kind: &str| {
        let found = list(object, "/status/addresses").iter().find(|a| a["type"] == kind);
        print::or_none(found.map_or("", |a| text(a, "/address")))
    };
    let info = |field: &str| text(object, &format!("/status/nodeInfo/{field}")).to_owned();
    vec![
        print::name(object),
        Value::from(status),
        Value::from(roles(object)),
        clock.age(object),
        Value::from(info("kubeletVersion")),
        address("InternalIP"),
        address("ExternalIP"),
        print::or(&info("osImage"), UNKNOWN),
        print::or(&info("kernelVersion"), UNKNOWN),
        print::or(&info("containerRuntimeVersion"), UNKNOWN),
    ]
}

/// As `findNodeRoles`.
fn roles(object: &Value) -> String {
    let mut roles = BTreeSet::new();
    for (key, value) in map(object, "/metadata/labels").into_iter().flatten() {
        if let Some(role) = key.strip_prefix("node-role.kubernetes.io/").filter(|role| !role.is_empty()) {
            roles.insert(role);
        } else if key == "kubernetes.io/role" {
            roles.extend(value.as_str().filter(|role| !role.is_empty()));
        }
    }
    if roles.is_empty() { NONE.to_owned() } else { roles.into_iter().collect::<Vec<_>>().join(",") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_node_s_row() {
        let node = json!({"metadata": {"name": "n", "labels": {"node-role.kubernetes.io/control-plane": "", "kubernetes.io/role": "a"}},
            "spec": {"unschedulable": true}, "status": {"conditions": [{"type": "Ready", "status": "False"}],
            "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}], "nodeInfo": {"kubeletVersion": "v1.36.0"}}});
        let cells = row(&node, &Clock::now());
        let cells: Vec<&str> = cells.iter().filter_map(Value::as_str).collect();
        assert_eq!(cells[..3], ["n", "NotReady,SchedulingDisabled", "a,control-plane"]);
        assert_eq!(cells[4..], ["v1.36.0", "10.0.0.1", "<none>", "<unknown>", "<unknown>", "<unknown>"]);
    }
}
