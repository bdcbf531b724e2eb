//! Nodes.

use super::amount;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, flag, list, map, set, text};
use crate::registry::print::{self, Clock, NONE, UNKNOWN};
use crate::registry::rules::Rules;
use apimachinery::names::{is_label_value, is_qualified_name};
use serde_json::Value;
use std::collections::{BTreeSet, HashSet};

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
            (false, None) => set(child(object, "spec"), "podCIDRs", vec![one]),
            (true, Some(first)) => set(child(object, "spec"), "podCIDR", first.clone()),
            _ => {}
        }
    },
    validate,
    validate_update,
    selectable_names: &["spec.unschedulable"],
    selectable: |object| vec![("spec.unschedulable", flag(object, "/spec/unschedulable").to_string())],
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let mut seen = HashSet::new();
    for taint in spec.at("taints").items() {
        let (key, value, effect) = (taint.at("key"), taint.at("value"), taint.at("effect"));
        errors.all(&key, is_qualified_name(key.str()));
        errors.all(&value, is_label_value(value.str()));
        errors.need_one_of(&effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
        if !seen.insert((taint.value["key"].as_str(), taint.value["effect"].as_str())) {
            errors.duplicate(&taint);
        }
    }
    let cidrs = spec.at("podCIDRs");
    for cidr in cidrs.items() {
        if !is_cidr(cidr.str()) {
            errors.invalid(&cidr, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)");
        }
    }
    if cidrs.len() > 2 {
        errors.invalid(&cidrs, "may specify no more than one CIDR for each IP family");
    }
    let status = root.at("status");
    for field in ["capacity", "allocatable"] {
        for (name, quantity) in status.at(field).entries() {
            if !matches!(name, "pods") && !name.starts_with("attachable-volumes-") {
                amount(name, &quantity, errors);
            }
        }
    }
}

/// `10.244.1.0/24`
pub fn is_cidr(text: &str) -> bool {
    let Some((address, bits)) = text.split_once('/') else { return false };
    match (address.parse::<std::net::IpAddr>(), bits.parse::<u8>()) {
        (Ok(std::net::IpAddr::V4(_)), Ok(bits)) => bits <= 32,
        (Ok(std::net::IpAddr::V6(_)), Ok(bits)) => bits <= 128,
        _ => false,
    }
}

/// What was once given stays. As `ValidateNodeUpdate`.
fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    let (cidrs, before) = (now.at("podCIDRs"), was.at("podCIDRs"));
    if !before.is_empty() && cidrs.value != before.value {
        errors.forbidden(&cidrs, "node updates may not change podCIDR except from \"\" to valid");
    }
    let (provider, before) = (now.at("providerID"), was.at("providerID"));
    if !before.is_blank() && provider.value != before.value {
        errors.forbidden(&provider, "node updates may not change providerID except from \"\" to valid");
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
