//! Whether a pod that was bound to this node can run here. Pure. As the kubelet's `canAdmitPod`: the scheduler checks the
//! same, but static pods do not come from it and two schedulers may race.

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::node::RequiredNodeAffinity;
use apimachinery::pod::SAFE_SYSCTLS;
use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::{Node, Pod, PodSpec};

use crate::runtime::dns;
use crate::runtime::pods::host_network;
use crate::static_pods;
use crate::status::Ended;

/// What the node gives to pods.
#[derive(Debug, Clone, Default)]
pub struct Allocatable {
    pub resources: BTreeMap<String, Quantity>,
    /// Sysctls beyond the safe ones that pods may set: names, or prefixes that end in `*`.
    pub unsafe_sysctls: Vec<String>,
    /// The runtime keeps `supplementalGroupsPolicy: Strict`.
    pub strict_groups: bool,
    /// The kernel has AppArmor on.
    pub apparmor: bool,
}

/// Resources that the node itself measures; others are for their plugins to check.
const CHECKED: [(&str, &str); 3] =
    [("cpu", "OutOfcpu"), ("memory", "OutOfmemory"), ("ephemeral-storage", "OutOfephemeral-storage")];

/// Rejects `pod` if it does not fit beside `others` (pods that run or will run here). `api_node`, where it is known,
/// has the labels that are to match.
pub fn admit(pod: &Pod, others: &[Arc<Pod>], node: &Allocatable, api_node: Option<&Node>) -> Result<(), Ended> {
    let Some(spec) = pod.spec.as_ref() else { return Ok(()) };
    let requested = apimachinery::pod::requests(spec);
    let others: Vec<&Pod> =
        others.iter().map(Arc::as_ref).filter(|p| p.metadata.uid != pod.metadata.uid && occupies(p)).collect();

    if let Some(limit) = node.resources.get("pods")
        && i64::try_from(others.len()).unwrap_or(i64::MAX) + 1 > limit.value()
    {
        return Err(out_of("OutOfpods", "pods", 1, others.len() as i64, limit.value()));
    }
    // A critical static pod comes before all others.
    let critical = static_pods::is_static(pod) && spec.priority.is_some_and(|p| p >= 2_000_000_000);
    for (name, reason) in CHECKED {
        let (Some(want), Some(limit)) = (requested.get(name), node.resources.get(name)) else { continue };
        if critical || want.is_zero() {
            continue;
        }
        let unit = |q: &Quantity| if name == "cpu" { q.milli_value() } else { q.value() };
        let used: i64 = others
            .iter()
            .filter_map(|p| p.spec.as_ref())
            .filter_map(|s| apimachinery::pod::requests(s).get(name).map(unit))
            .sum();
        if used + unit(want) > unit(limit) {
            return Err(out_of(reason, name, unit(want), used, unit(limit)));
        }
    }
    if let Some(refused) = unsupported(pod, spec, node) {
        return Err(refused);
    }
    let selected = api_node.is_none_or(|node| {
        let (name, labels) = (node.metadata.name.as_deref(), node.metadata.labels.clone());
        RequiredNodeAffinity::of(spec).matches(name.unwrap_or_default(), &labels.unwrap_or_default())
    });
    if !selected && !static_pods::is_static(pod) {
        return Err(Ended::new(
            "NodeAffinity",
            "Pod was rejected: Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector",
        ));
    }
    if let Some(name) = forbidden_sysctl(pod, node) {
        let message = format!("Pod was rejected: forbidden sysctl: {name:?} not allowlisted");
        return Err(Ended::new("SysctlForbidden", message));
    }
    let taken: Vec<(i32, String, String)> = others.iter().flat_map(|p| host_ports(p)).collect();
    if host_ports(pod).iter().any(|port| taken.iter().any(|other| conflicts(port, other))) {
        return Err(Ended::new(
            "NodePorts",
            "Pod was rejected: Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports",
        ));
    }
    Ok(())
}

/// What no node like this one can do.
fn unsupported(pod: &Pod, spec: &PodSpec, node: &Allocatable) -> Option<Ended> {
    let os = spec.os.as_ref().map_or("linux", |os| os.name.as_str());
    if os != "linux" {
        return Some(Ended::new("PodOSNotSupported", "Pod was rejected: Pod's OS doesn't match node's OS"));
    }
    let context = spec.security_context.as_ref();
    if !node.strict_groups && context.and_then(|c| c.supplemental_groups_policy.as_deref()) == Some("Strict") {
        return Some(Ended::new(
            "SupplementalGroupsPolicyNotSupported",
            "Pod was rejected: SupplementalGroupsPolicy=Strict is not supported in this node",
        ));
    }
    (!node.apparmor && asks_for_apparmor(pod, spec)).then(|| {
        let message = "Pod was rejected: Cannot enforce AppArmor: AppArmor is not enabled on the host";
        Ended::new("AppArmor", message)
    })
}

/// Whether any profile but `Unconfined` is named. As `apparmor.isRequired`.
fn asks_for_apparmor(pod: &Pod, spec: &PodSpec) -> bool {
    const ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";
    let of_pod = spec.security_context.as_ref().and_then(|c| c.app_armor_profile.as_ref());
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let contexts = containers.map(|c| c.security_context.as_ref());
    let contexts = contexts.chain(spec.ephemeral_containers.iter().flatten().map(|c| c.security_context.as_ref()));
    let mut profiles = contexts.flatten().filter_map(|c| c.app_armor_profile.as_ref()).chain(of_pod);
    let mut annotated = pod.metadata.annotations.iter().flatten().filter(|(key, _)| key.starts_with(ANNOTATION));
    profiles.any(|p| p.type_ != "Unconfined") || annotated.any(|(_, value)| value != "unconfined")
}

/// As the kubelet's sysctl allow list.
fn forbidden_sysctl(pod: &Pod, node: &Allocatable) -> Option<String> {
    let allowed = |name: &str| {
        SAFE_SYSCTLS.contains(&name)
            || node.unsafe_sysctls.iter().any(|pattern| match pattern.strip_suffix('*') {
                Some(prefix) => name.starts_with(prefix),
                None => name == pattern,
            })
    };
    dns::sysctls(pod).into_keys().find(|name| !allowed(name))
}

fn out_of(reason: &str, resource: &str, requested: i64, used: i64, capacity: i64) -> Ended {
    let message = format!(
        "Pod was rejected: Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}"
    );
    Ended::new(reason, message)
}

/// Whether a pod still holds what it asked for.
fn occupies(pod: &Pod) -> bool {
    pod.spec.is_some() && !apimachinery::pod::is_terminal(pod)
}

fn host_ports(pod: &Pod) -> Vec<(i32, String, String)> {
    let on_host = host_network(pod);
    let Some(spec) = pod.spec.as_ref() else { return Vec::new() };
    spec.containers
        .iter()
        .flat_map(|c| c.ports.iter().flatten())
        .filter_map(|p| {
            let port = p.host_port.or(on_host.then_some(p.container_port)).filter(|p| *p > 0)?;
            Some((port, p.protocol.clone().unwrap_or_else(|| "TCP".to_owned()), p.host_ip.clone().unwrap_or_default()))
        })
        .collect()
}

fn conflicts(a: &(i32, String, String), b: &(i32, String, String)) -> bool {
    let any = |ip: &str| ip.is_empty() || ip == "0.0.0.0" || ip == "::";
    a.0 == b.0 && a.1 == b.1 && (a.2 == b.2 || any(&a.2) || any(&b.2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, spec: serde_json::Value) -> Arc<Pod> {
        Arc::new(serde_json::from_value(json!({"metadata": {"name": name, "uid": name}, "spec": spec})).unwrap())
    }

    #[test]
    fn pods_that_do_not_fit_are_rejected() {
        let node = Allocatable {
            resources: [("cpu".to_owned(), Quantity::from_milli(1000)), ("pods".to_owned(), Quantity::from_value(2))]
                .into(),
            unsafe_sysctls: vec!["net.core.*".to_owned()],
            ..Default::default()
        };
        let big = pod(
            "big",
            json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "800m"}}, "ports": [{"containerPort": 80, "hostPort": 8080}]}]}),
        );
        let api_node: Node =
            serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"zone": "a"}}})).unwrap();
        let check = |spec: serde_json::Value, others: &[Arc<Pod>]| {
            admit(&pod("new", spec), others, &node, Some(&api_node)).err().map(|e| e.reason)
        };
        let sysctl =
            |name: &str| json!({"securityContext": {"sysctls": [{"name": name, "value": "1"}]}, "containers": []});
        assert_eq!(check(sysctl("net.ipv4.tcp_syncookies"), &[]), None);
        assert_eq!(check(sysctl("net/core/somaxconn"), &[]), None);
        assert_eq!(check(sysctl("kernel.msgmax"), &[]).as_deref(), Some("SysctlForbidden"));
        assert_eq!(check(json!({"nodeSelector": {"zone": "a"}, "containers": []}), &[]), None);
        for (spec, reason) in [
            (json!({"os": {"name": "windows"}, "containers": []}), "PodOSNotSupported"),
            (
                json!({"securityContext": {"supplementalGroupsPolicy": "Strict"}, "containers": []}),
                "SupplementalGroupsPolicyNotSupported",
            ),
            (
                json!({"containers": [{"name": "c", "securityContext": {"appArmorProfile": {"type": "Localhost"}}}]}),
                "AppArmor",
            ),
            (json!({"securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}}, "containers": []}), "AppArmor"),
        ] {
            assert_eq!(check(spec, &[]).as_deref(), Some(reason));
        }
        let one = [big.clone()];
        assert_eq!(check(json!({"containers": [{"name": "c"}]}), &one), None);
        assert_eq!(
            check(json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "300m"}}}]}), &one).as_deref(),
            Some("OutOfcpu")
        );
        assert_eq!(
            check(json!({"nodeSelector": {"zone": "b"}, "containers": []}), &one).as_deref(),
            Some("NodeAffinity")
        );
        assert_eq!(
            check(json!({"containers": [{"name": "c", "ports": [{"containerPort": 1, "hostPort": 8080}]}]}), &one)
                .as_deref(),
            Some("NodePorts")
        );
        let two = [big, pod("other", json!({"containers": []}))];
        assert_eq!(check(json!({"containers": []}), &two).as_deref(), Some("OutOfpods"));
    }
}
