//! On which nodes a DaemonSet's pods run, and what a pod for one node looks like. Pure.
use std::collections::BTreeMap;

use apimachinery::node::{RequiredNodeAffinity, tolerated};
use k8s_openapi::api::core::v1::{
    Affinity, Node, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec,
    PodTemplateSpec, Taint, Toleration,
};

const HOSTNAME_FIELD: &str = "metadata.name";
/// Taints that no daemon minds: key and effect.
const TOLERATED: [(&str, &str); 6] = [
    ("node.kubernetes.io/not-ready", "NoExecute"),
    ("node.kubernetes.io/unreachable", "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    ("node.kubernetes.io/unschedulable", "NoSchedule"),
];
const NETWORK_UNAVAILABLE: (&str, &str) = ("node.kubernetes.io/network-unavailable", "NoSchedule");

/// Whether a node is to have a daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// It gets one.
    Runs,
    /// It gets none, but keeps what it has.
    Keeps,
    /// It must not have one.
    No,
}

/// As `NodeShouldRunDaemonPod`.
pub fn fit(template: &PodTemplateSpec, node: &Node) -> Fit {
    let Some(spec) = &template.spec else { return Fit::No };
    let name = node.metadata.name.as_deref().unwrap_or_default();
    if spec.node_name.as_deref().is_some_and(|n| !n.is_empty() && n != name) {
        return Fit::No;
    }
    let none = BTreeMap::new();
    if !RequiredNodeAffinity::of(spec).matches(name, node.metadata.labels.as_ref().unwrap_or(&none)) {
        return Fit::No;
    }
    let tolerations = tolerations(spec);
    let taints = node.spec.as_ref().and_then(|s| s.taints.as_deref()).unwrap_or_default();
    let untolerated = |t: &&Taint| !tolerated(&tolerations, t);
    let repels = |effect: &str| taints.iter().filter(|t| t.effect == effect).any(|t| untolerated(&t));
    if repels("NoExecute") {
        Fit::No
    } else if repels("NoSchedule") {
        Fit::Keeps
    } else {
        Fit::Runs
    }
}

/// The template's tolerations and those of every daemon. As `AddOrUpdateDaemonPodTolerations`.
fn tolerations(spec: &PodSpec) -> Vec<Toleration> {
    let mut all = spec.tolerations.clone().unwrap_or_default();
    let network = spec.host_network.unwrap_or(false).then_some(NETWORK_UNAVAILABLE);
    for (key, effect) in TOLERATED.into_iter().chain(network) {
        let new = Toleration {
            key: Some(key.to_owned()),
            operator: Some("Exists".to_owned()),
            effect: Some(effect.to_owned()),
            ..Toleration::default()
        };
        if !all.contains(&new) {
            all.push(new);
        }
    }
    all
}

/// The template for a pod of one node: the scheduler may put it nowhere else.
/// As `ReplaceDaemonSetPodNodeNameNodeAffinity`.
pub fn template_for(template: &PodTemplateSpec, node: &str, labels: &[(&str, String)]) -> PodTemplateSpec {
    let mut template = template.clone();
    let meta = template.metadata.get_or_insert_default();
    let own = meta.labels.get_or_insert_default();
    own.extend(labels.iter().map(|(k, v)| ((*k).to_owned(), v.clone())));
    let spec = template.spec.get_or_insert_default();
    spec.tolerations = Some(tolerations(spec));
    let field = NodeSelectorRequirement {
        key: HOSTNAME_FIELD.to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![node.to_owned()]),
    };
    let term = NodeSelectorTerm { match_fields: Some(vec![field]), match_expressions: None };
    let affinity: &mut Affinity = spec.affinity.get_or_insert_default();
    let nodes: &mut NodeAffinity = affinity.node_affinity.get_or_insert_default();
    nodes.required_during_scheduling_ignored_during_execution = Some(NodeSelector { node_selector_terms: vec![term] });
    template
}

/// The node that a daemon is on or is meant for. As `GetTargetNodeName`.
pub fn node_of(pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    if let Some(name) = spec.node_name.clone().filter(|n| !n.is_empty()) {
        return Some(name);
    }
    let required =
        spec.affinity.as_ref()?.node_affinity.as_ref()?.required_during_scheduling_ignored_during_execution.as_ref()?;
    let fields = required.node_selector_terms.iter().flat_map(|t| t.match_fields.iter().flatten());
    fields.filter(|f| f.key == HOSTNAME_FIELD && f.operator == "In").find_map(|f| f.values.as_ref()?.first().cloned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn node(labels: Value, taints: Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n1", "labels": labels}, "spec": {"taints": taints}}))
            .unwrap()
    }

    fn template(spec: Value) -> PodTemplateSpec {
        let mut spec = spec;
        spec["containers"] = json!([]);
        serde_json::from_value(json!({"spec": spec})).unwrap()
    }

    #[test]
    fn nodes_fit_by_labels_and_taints() {
        let plain = node(json!({"disk": "ssd"}), json!([]));
        let tainted = |key: &str, effect: &str| node(json!({}), json!([{"key": key, "effect": effect}]));
        let affinity = |operator: &str, values: Value| {
            json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": "disk", "operator": operator, "values": values}]}]}}}})
        };
        for (name, spec, node, expected) in [
            ("plain", json!({}), &plain, Fit::Runs),
            ("selected", json!({"nodeSelector": {"disk": "ssd"}}), &plain, Fit::Runs),
            ("not selected", json!({"nodeSelector": {"disk": "hdd"}}), &plain, Fit::No),
            ("affine", affinity("In", json!(["ssd"])), &plain, Fit::Runs),
            ("not affine", affinity("NotIn", json!(["ssd"])), &plain, Fit::No),
            ("another node", json!({"nodeName": "n2"}), &plain, Fit::No),
            ("cordoned", json!({}), &tainted("node.kubernetes.io/unschedulable", "NoSchedule"), Fit::Runs),
            ("silent", json!({}), &tainted("node.kubernetes.io/unreachable", "NoExecute"), Fit::Runs),
            ("tainted", json!({}), &tainted("mine", "NoSchedule"), Fit::Keeps),
            ("tainted to evict", json!({}), &tainted("mine", "NoExecute"), Fit::No),
            ("tolerated", json!({"tolerations": [{"operator": "Exists"}]}), &tainted("mine", "NoExecute"), Fit::Runs),
        ] {
            assert_eq!(fit(&template(spec), node), expected, "{name}");
        }
    }

    #[test]
    fn a_pod_is_meant_for_its_node() {
        let made = template_for(&template(json!({})), "n7", &[("controller-revision-hash", "abc".into())]);
        let pod = Pod { spec: made.spec.clone(), ..Pod::default() };
        assert_eq!(node_of(&pod).as_deref(), Some("n7"));
        assert_eq!(made.metadata.unwrap().labels.unwrap()["controller-revision-hash"], "abc");
        let twice = template_for(&PodTemplateSpec { spec: made.spec, ..Default::default() }, "n8", &[]);
        assert_eq!(twice.spec.unwrap().tolerations.unwrap().len(), TOLERATED.len());
    }
}
