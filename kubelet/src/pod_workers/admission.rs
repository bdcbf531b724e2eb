//! Whether a pod that was bound to this node can run here. Pure. As the kubelet's `canAdmitPod`: the scheduler checks the
//! same, but static pods do not come from it and two schedulers may race.

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::node::{RequiredNodeAffinity, tolerated};
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
const CHECKED: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];
const HUGE_PAGES: &str = "hugepages-";

/// A resource of which the node has less left than a pod asks for. As `InsufficientResourceError`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lack {
    pub resource: String,
    pub requested: i64,
    pub used: i64,
    pub capacity: i64,
}

// === impl Lack ===

impl Lack {
    /// What would have to be freed.
    pub fn amount(&self) -> i64 {
        self.requested - (self.capacity - self.used)
    }

    fn refusal(&self) -> Ended {
        let Lack { resource, requested, used, capacity } = self;
        let message = format!(
            "Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}"
        );
        Ended::new(&format!("OutOf{resource}"), message)
    }
}

/// What is told of a pod that lacks something, and perhaps does not suit the node either (`suited`).
pub fn refusal(lacking: &[Lack], suited: Result<(), Ended>) -> Ended {
    match (lacking.first(), suited) {
        // What no room would help is said first.
        (Some(lack), Err(refused)) if is_about_the_node(&refused) => lack.refusal(),
        (Some(lack), Ok(())) => lack.refusal(),
        (_, Err(refused)) => refused,
        (None, Ok(())) => {
            Ended::new("UnknownReason", "GeneralPredicates failed due to unknown reason, which is unexpected.")
        }
    }
}

/// Refusals that stand in one row with those for want of a resource, and come after them.
fn is_about_the_node(refused: &Ended) -> bool {
    matches!(refused.reason.as_str(), "NodeAffinity" | "NodePorts" | "TaintToleration")
}

/// An amount as it is compared: of a processor, thousandths.
pub(super) fn in_units(resource: &str, amount: &Quantity) -> i64 {
    if resource == "cpu" { amount.milli_value() } else { amount.value() }
}

/// What the node has too little of for `pod` beside `others`.
pub fn lacking(pod: &Pod, others: &[Arc<Pod>], node: &Allocatable) -> Vec<Lack> {
    let Some(spec) = pod.spec.as_ref() else { return Vec::new() };
    let others = beside(pod, others);
    let mut found = Vec::new();
    if let Some(limit) = node.resources.get("pods")
        && i64::try_from(others.len()).unwrap_or(i64::MAX) + 1 > limit.value()
    {
        let used = i64::try_from(others.len()).unwrap_or(i64::MAX);
        found.push(Lack { resource: "pods".to_owned(), requested: 1, used, capacity: limit.value() });
    }
    let requested = apimachinery::pod::requests(spec);
    let huge = requested.keys().map(String::as_str).filter(|name| name.starts_with(HUGE_PAGES));
    for name in CHECKED.into_iter().chain(huge) {
        let (Some(want), Some(limit)) = (requested.get(name), node.resources.get(name)) else { continue };
        if want.is_zero() {
            continue;
        }
        let used = others
            .iter()
            .filter_map(|p| p.spec.as_ref())
            .filter_map(|s| apimachinery::pod::requests(s).get(name).map(|amount| in_units(name, amount)))
            .sum();
        let (requested, capacity) = (in_units(name, want), in_units(name, limit));
        if used + requested > capacity {
            found.push(Lack { resource: name.to_owned(), requested, used, capacity });
        }
    }
    found
}

/// The other pods that still hold what they asked for.
fn beside<'p>(pod: &Pod, others: &'p [Arc<Pod>]) -> Vec<&'p Pod> {
    others.iter().map(Arc::as_ref).filter(|p| p.metadata.uid != pod.metadata.uid && occupies(p)).collect()
}

/// Whether the pod and the node go together, however much room there is. `api_node`, where it is known, has the labels that are
/// to match and the taints.
pub fn suits(pod: &Pod, others: &[Arc<Pod>], node: &Allocatable, api_node: Option<&Node>) -> Result<(), Ended> {
    let Some(spec) = pod.spec.as_ref() else { return Ok(()) };
    if let Some(name) = forbidden_sysctl(pod, node) {
        return Err(Ended::new("SysctlForbidden", format!("forbidden sysctl: {name:?} not allowlisted")));
    }
    if let Some(refused) = unsupported(pod, spec, node) {
        return Err(refused);
    }
    let selected = api_node.is_none_or(|node| {
        let (name, labels) = (node.metadata.name.as_deref(), node.metadata.labels.clone());
        RequiredNodeAffinity::of(spec).matches(name.unwrap_or_default(), &labels.unwrap_or_default())
    });
    if !selected && !static_pods::is_static(pod) {
        return Err(predicate("NodeAffinity", "node(s) didn't match Pod's node affinity/selector"));
    }
    let taken: Vec<(i32, String, String)> = beside(pod, others).into_iter().flat_map(host_ports).collect();
    if host_ports(pod).iter().any(|port| taken.iter().any(|other| conflicts(port, other))) {
        return Err(predicate("NodePorts", "node(s) didn't have free ports for the requested pod ports"));
    }
    let taints = api_node.and_then(|node| node.spec.as_ref()).and_then(|s| s.taints.as_deref()).unwrap_or_default();
    let tolerations = spec.tolerations.as_deref().unwrap_or_default();
    let driven_away = taints.iter().any(|taint| taint.effect == "NoExecute" && !tolerated(tolerations, taint));
    if driven_away && !static_pods::is_static(pod) {
        return Err(predicate("TaintToleration", "node(s) had taints that the pod didn't tolerate"));
    }
    Ok(())
}

/// As `PredicateFailureError`.
fn predicate(name: &str, why: &str) -> Ended {
    Ended::new(name, format!("Predicate {name} failed: {why}"))
}

const OS: &str = "linux";

/// What no node like this one can do.
fn unsupported(pod: &Pod, spec: &PodSpec, node: &Allocatable) -> Option<Ended> {
    let labelled = pod.metadata.labels.as_ref().and_then(|labels| labels.get("kubernetes.io/os"));
    if labelled.is_some_and(|os| os != OS) {
        let message = "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label";
        return Some(Ended::new("PodOSSelectorNodeLabelDoesNotMatch", message));
    }
    if spec.os.as_ref().is_some_and(|os| os.name != OS) {
        return Some(Ended::new("PodOSNotSupported", "Failed to admit pod as the OS field doesn't match node OS"));
    }
    let context = spec.security_context.as_ref();
    if !node.strict_groups && context.and_then(|c| c.supplemental_groups_policy.as_deref()) == Some("Strict") {
        return Some(Ended::new(
            "SupplementalGroupsPolicyNotSupported",
            "SupplementalGroupsPolicy=Strict is not supported in this node",
        ));
    }
    (!node.apparmor && asks_for_apparmor(pod, spec)).then(|| {
        let message = "Cannot enforce AppArmor: AppArmor is not enabled on the host";
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

    fn admit(pod: &Pod, others: &[Arc<Pod>], node: &Allocatable, api_node: Option<&Node>) -> Result<(), Ended> {
        let suited = suits(pod, others, node, api_node);
        match lacking(pod, others, node) {
            none if none.is_empty() => suited,
            lacking => Err(refusal(&lacking, suited)),
        }
    }

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
            serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"zone": "a"}}, "spec": {
            "taints": [{"key": "shy", "effect": "NoSchedule"}]}}))
            .unwrap();
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
        let tainted: Node = serde_json::from_value(
            json!({"metadata": {"name": "n"}, "spec": {"taints": [{"key": "gone", "effect": "NoExecute"}]}}),
        )
        .unwrap();
        let on_tainted = |tolerations: serde_json::Value| {
            admit(&pod("new", json!({"tolerations": tolerations, "containers": []})), &[], &node, Some(&tainted)).err()
        };
        assert_eq!(
            on_tainted(json!([])).map(|e| e.message).as_deref(),
            Some("Predicate TaintToleration failed: node(s) had taints that the pod didn't tolerate")
        );
        assert_eq!(on_tainted(json!([{"key": "gone", "operator": "Exists"}])), None);
        let two = [big, pod("other", json!({"containers": []}))];
        assert_eq!(check(json!({"containers": []}), &two).as_deref(), Some("OutOfpods"));
    }
}
