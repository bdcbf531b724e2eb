//! Nodes, with their pods and what these request.

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use super::{Description, annotation_lines, date, map_lines};
use crate::objects::{items, name, namespace, text};
use crate::output::age;
use crate::output::jsonpath::plain;

pub(super) fn describe(node: &Value, pods: &[Value], lease: Option<&Value>, out: &mut Description) {
    let labels = node.pointer("/metadata/labels").and_then(Value::as_object);
    let roles: Vec<&str> =
        labels.into_iter().flatten().filter_map(|(key, _)| key.strip_prefix("node-role.kubernetes.io/")).collect();
    let taints: Vec<String> = items(node, "/spec/taints")
        .iter()
        .map(|taint| match text(taint, "/value") {
            "" => format!("{}:{}", text(taint, "/key"), text(taint, "/effect")),
            value => format!("{}={value}:{}", text(taint, "/key"), text(taint, "/effect")),
        })
        .collect();
    let or_none = |list: Vec<String>, glue: &str| if list.is_empty() { "<none>".to_owned() } else { list.join(glue) };
    out.pairs(
        0,
        &[
            ("Name", name(node).to_owned()),
            ("Roles", or_none(roles.iter().map(|role| (*role).to_owned()).collect(), ",")),
            ("Labels", map_lines(node.pointer("/metadata/labels"), 0)),
            ("Annotations", annotation_lines(node)),
            ("CreationTimestamp", date(text(node, "/metadata/creationTimestamp"))),
            ("Taints", or_none(taints, "\n\t")),
            ("Unschedulable", (node["spec"]["unschedulable"] == true).to_string()),
        ],
    );
    match lease {
        Some(lease) => {
            out.line("Lease:");
            out.pairs(
                2,
                &[
                    ("HolderIdentity", text(lease, "/spec/holderIdentity").to_owned()),
                    ("AcquireTime", "<unset>".to_owned()),
                    ("RenewTime", date(text(lease, "/spec/renewTime"))),
                ],
            );
        }
        None => out.line(format!("Lease:\tFailed to get lease: leases.coordination.k8s.io {:?} not found", name(node))),
    }
    let conditions = items(node, "/status/conditions");
    if !conditions.is_empty() {
        out.line("Conditions:");
        let rows = conditions
            .iter()
            .map(|condition| {
                [
                    text(condition, "/type").to_owned(),
                    text(condition, "/status").to_owned(),
                    date(text(condition, "/lastHeartbeatTime")),
                    date(text(condition, "/lastTransitionTime")),
                    text(condition, "/reason").to_owned(),
                    text(condition, "/message").to_owned(),
                ]
                .map(|cell| cell + " ")
                .to_vec()
            })
            .collect();
        out.table(
            2,
            &["Type", "Status", "LastHeartbeatTime", "LastTransitionTime", "Reason", "Message"],
            &["----", "------", "-----------------", "------------------", "------", "-------"],
            rows,
        );
    }
    out.line("Addresses:");
    for address in items(node, "/status/addresses") {
        out.line(format!("  {}:\t{}", text(address, "/type"), text(address, "/address")));
    }
    for (title, path) in [("Capacity", "/status/capacity"), ("Allocatable", "/status/allocatable")] {
        if let Some(amounts) = node.pointer(path).and_then(Value::as_object) {
            out.line(format!("{title}:"));
            for (resource, amount) in amounts {
                out.line(format!("  {resource}:\t{}", plain(amount)));
            }
        }
    }
    out.line("System Info:");
    for (title, field) in [
        ("Machine ID", "machineID"),
        ("System UUID", "systemUUID"),
        ("Boot ID", "bootID"),
        ("Kernel Version", "kernelVersion"),
        ("OS Image", "osImage"),
        ("Operating System", "operatingSystem"),
        ("Architecture", "architecture"),
        ("Container Runtime Version", "containerRuntimeVersion"),
        ("Kubelet Version", "kubeletVersion"),
    ] {
        out.line(format!("  {title}:\t{}", text(node, &format!("/status/nodeInfo/{field}"))));
    }
    for (title, path) in
        [("PodCIDR", "/spec/podCIDR"), ("PodCIDRs", "/spec/podCIDRs/0"), ("ProviderID", "/spec/providerID")]
    {
        if !text(node, path).is_empty() {
            out.line(format!("{title}:\t{}", text(node, path)));
        }
    }
    resources(node, pods, out);
}

/// What the node's pods request and may use at most.
fn resources(node: &Value, pods: &[Value], out: &mut Description) {
    let allocatable = |resource: &str| {
        let amount =
            node.pointer("/status/allocatable").and_then(|amounts| amounts.get(resource)).and_then(Value::as_str);
        amount.and_then(|amount| Quantity::parse(amount).ok())
    };
    let share = |amount: &Quantity, resource: &str| {
        let whole = allocatable(resource).map_or(0, |whole| whole.milli_value());
        let percent = if whole == 0 { 0 } else { amount.milli_value() * 100 / whole };
        format!("{amount} ({percent}%)")
    };
    let resources = ["cpu", "memory", "ephemeral-storage"];
    let zero = || resources.map(|_| Quantity::from_value(0));
    let (mut requested, mut limited) = (zero(), zero());
    let mut rows = Vec::new();
    for pod in pods {
        let parsed: Option<Pod> = serde_json::from_value(pod.clone()).ok();
        let spec = parsed.and_then(|pod| pod.spec).unwrap_or_default();
        let (requests, limits) = (apimachinery::pod::requests(&spec), apimachinery::pod::limits(&spec));
        let amount = |map: &apimachinery::pod::Resources, resource: &str| {
            map.get(resource).cloned().unwrap_or_else(|| Quantity::from_value(0))
        };
        let mut row = vec![namespace(pod).to_owned(), name(pod).to_owned(), String::new()];
        for (place, resource) in resources.iter().enumerate() {
            requested[place] += amount(&requests, resource);
            limited[place] += amount(&limits, resource);
            if place < 2 {
                row.push(share(&amount(&requests, resource), resource));
                row.push(share(&amount(&limits, resource), resource));
            }
        }
        row.push(age(text(pod, "/metadata/creationTimestamp")));
        rows.push(row);
    }
    out.line(format!("Non-terminated Pods:\t({} in total)", pods.len()));
    out.table(
        2,
        &["Namespace", "Name", "", "CPU Requests", "CPU Limits", "Memory Requests", "Memory Limits", "Age"],
        &["---------", "----", "", "------------", "----------", "---------------", "-------------", "---"],
        rows,
    );
    out.line("Allocated resources:");
    out.line("  (Total limits may be over 100 percent, i.e., overcommitted.)");
    let rows = resources
        .iter()
        .enumerate()
        .map(|(place, resource)| {
            vec![(*resource).to_owned(), share(&requested[place], resource), share(&limited[place], resource)]
        })
        .collect();
    out.table(2, &["Resource", "Requests", "Limits"], &["--------", "--------", "------"], rows);
}
