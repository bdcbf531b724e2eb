//! NodeAffinity: a pod's `nodeSelector` and `nodeAffinity`, and the affinity that the configuration adds to every pod.

use std::borrow::Cow;
use std::collections::BTreeMap;

use apimachinery::labels::{Operator, Requirement};
use k8s_openapi::api::core::v1::{
    NodeAffinity as ApiNodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, PodSpec,
};
use serde::Deserialize;
use serde_json::Value;

use super::arguments;
use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::framework::{EventSet, Plugin, Points, PreFilter, PreScore, State, Verdict, normalize_by_maximum, state_of};

#[derive(Default)]
pub struct NodeAffinity {
    added: Option<ApiNodeAffinity>,
}

/// `NodeAffinityArgs`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Arguments {
    added_affinity: Option<ApiNodeAffinity>,
}

/// A parsed NodeSelectorTerm: all requirements hold together. One that does not parse, or is empty, matches nothing.
#[derive(Debug, Default)]
struct Term {
    labels: Vec<Requirement>,
    names: Vec<Requirement>,
    void: bool,
}

impl Term {
    fn parse(term: &NodeSelectorTerm) -> Term {
        let labels: Option<Vec<_>> = term.match_expressions.iter().flatten().map(on_label).collect();
        let names: Option<Vec<_>> = term.match_fields.iter().flatten().map(on_field).collect();
        match (labels, names) {
            (Some(labels), Some(names)) => Term { void: labels.is_empty() && names.is_empty(), labels, names },
            _ => Term { void: true, ..Term::default() },
        }
    }

    fn matches(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        !self.void
            && self.labels.iter().all(|required| required.matches(labels.get(&required.key).map(String::as_str)))
            && self.names.iter().all(|required| required.key == "metadata.name" && required.matches(Some(name)))
    }

    /// The only nodes that the term can match, if it lists them by name.
    fn listed_names(&self) -> Option<&[String]> {
        let list = |required: &&Requirement| required.key == "metadata.name" && required.operator == Operator::In;
        self.names.iter().find(list).map(|required| required.values.as_slice())
    }
}

fn operator(required: &NodeSelectorRequirement) -> Option<Operator> {
    Some(match required.operator.as_str() {
        "In" => Operator::In,
        "NotIn" => Operator::NotIn,
        "Exists" => Operator::Exists,
        "DoesNotExist" => Operator::DoesNotExist,
        "Gt" => Operator::Gt,
        "Lt" => Operator::Lt,
        _ => return None,
    })
}

fn on_label(required: &NodeSelectorRequirement) -> Option<Requirement> {
    Requirement::new(&required.key, operator(required)?, required.values.clone().unwrap_or_default()).ok()
}

/// A field's values are names, which may be longer than a label's.
fn on_field(required: &NodeSelectorRequirement) -> Option<Requirement> {
    let operator = operator(required).filter(|operator| matches!(operator, Operator::In | Operator::NotIn))?;
    let mut values = required.values.clone().unwrap_or_default();
    values.sort_unstable();
    Some(Requirement { key: required.key.clone(), operator, values })
}

/// A NodeSelector: alternatives.
#[derive(Debug, Default)]
pub struct NodeTerms(Vec<Term>);

impl NodeTerms {
    pub fn of(selector: &NodeSelector) -> NodeTerms {
        NodeTerms(selector.node_selector_terms.iter().map(Term::parse).collect())
    }

    pub fn matches(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().any(|term| term.matches(name, labels))
    }
}

/// What a pod requires of its node. As `nodeaffinity.RequiredNodeAffinity`.
#[derive(Debug, Default)]
pub struct RequiredNodeAffinity {
    selector: BTreeMap<String, String>,
    /// Alternatives; `None` if there is no required affinity.
    terms: Option<Vec<Term>>,
    added: Option<Vec<Term>>,
}

impl RequiredNodeAffinity {
    pub fn of(spec: &PodSpec) -> RequiredNodeAffinity {
        let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
        RequiredNodeAffinity {
            selector: spec.node_selector.clone().unwrap_or_default(),
            terms: affinity.and_then(required_terms),
            added: None,
        }
    }

    /// Whether nothing is required.
    pub fn is_empty(&self) -> bool {
        self.selector.is_empty() && self.terms.is_none() && self.added.is_none()
    }

    /// Whether the pod's own requirements hold on a node.
    pub fn matches(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        self.selector.iter().all(|(key, value)| labels.get(key) == Some(value)) && any(&self.terms, name, labels)
    }
}

fn any(terms: &Option<Vec<Term>>, name: &str, labels: &BTreeMap<String, String>) -> bool {
    terms.as_ref().is_none_or(|terms| terms.iter().any(|term| term.matches(name, labels)))
}

fn required_terms(affinity: &ApiNodeAffinity) -> Option<Vec<Term>> {
    let required = affinity.required_during_scheduling_ignored_during_execution.as_ref()?;
    Some(required.node_selector_terms.iter().map(Term::parse).collect())
}

fn preferred_terms(affinity: Option<&ApiNodeAffinity>) -> Vec<(i64, Term)> {
    let preferred =
        affinity.and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_deref());
    let preferred = preferred.unwrap_or_default().iter().filter(|preferred| preferred.weight != 0);
    preferred
        .map(|preferred| (i64::from(preferred.weight), &preferred.preference))
        // An empty preference matches all nodes, and so says nothing.
        .filter(|(_, term)| term.match_expressions.is_some() || term.match_fields.is_some())
        .map(|(weight, term)| (weight, Term::parse(term)))
        .collect()
}

impl NodeAffinity {
    /// With the arguments of a profile.
    pub fn new(value: Option<&Value>) -> Result<NodeAffinity, String> {
        let Arguments { added_affinity } = arguments(value)?;
        Ok(NodeAffinity { added: added_affinity })
    }

    fn required(&self, pod: &PendingPod) -> RequiredNodeAffinity {
        let mut required = pod.spec().map(RequiredNodeAffinity::of).unwrap_or_default();
        required.added = self.added.as_ref().and_then(required_terms);
        required
    }
}

const POD_REASON: u64 = 1;
const ADDED_REASON: u64 = 1 << 1;

impl Plugin for NodeAffinity {
    fn name(&self) -> &'static str {
        "NodeAffinity"
    }

    fn points(&self) -> Points {
        Points::PRE_FILTER.and(Points::FILTER).and(Points::PRE_SCORE).and(Points::SCORE)
    }

    fn events(&self) -> EventSet {
        EventSet::NODE_ADD.and(EventSet::NODE_LABEL)
    }

    fn pre_filter(&self, pod: &PendingPod, snapshot: &Snapshot) -> PreFilter {
        let required = self.required(pod);
        if required.is_empty() {
            return PreFilter::Skip;
        }
        // If every alternative lists names, only those nodes need a look.
        let lists: Option<Vec<&[String]>> =
            required.terms.as_ref().and_then(|terms| terms.iter().map(Term::listed_names).collect());
        let Some(lists) = lists.filter(|lists| !lists.is_empty()) else {
            return PreFilter::Proceed(Box::new(required));
        };
        let mut nodes: Vec<NodeId> = lists.into_iter().flatten().filter_map(|name| snapshot.nodes.find(name)).collect();
        nodes.sort_unstable();
        nodes.dedup();
        PreFilter::Only(Box::new(required), nodes)
    }

    fn filter(&self, state: &State, _pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        let required: &RequiredNodeAffinity = state_of(state);
        let (name, labels) = (&snapshot.nodes.name[node.index()], &snapshot.nodes.labels[node.index()]);
        if !any(&required.added, name, labels) {
            return Verdict::unresolvable(ADDED_REASON);
        }
        if !required.matches(name, labels) {
            return Verdict::unresolvable(POD_REASON);
        }
        Verdict::Accept
    }

    fn reason(&self, _state: &State, number: u32) -> Cow<'static, str> {
        Cow::Borrowed(if 1 << number == ADDED_REASON {
            "node(s) didn't match scheduler-enforced node affinity"
        } else {
            "node(s) didn't match Pod's node affinity/selector"
        })
    }

    fn pre_score(&self, pod: &PendingPod, _snapshot: &Snapshot, _feasible: &[NodeId]) -> PreScore {
        let affinity = pod.spec().and_then(|spec| spec.affinity.as_ref()?.node_affinity.as_ref());
        let mut preferred = preferred_terms(affinity);
        preferred.extend(preferred_terms(self.added.as_ref()));
        if preferred.is_empty() { PreScore::Skip } else { PreScore::Proceed(Box::new(preferred)) }
    }

    /// The weights of the preferred terms that the node matches.
    fn score(&self, state: &State, _pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> i64 {
        let preferred: &Vec<(i64, Term)> = state_of(state);
        let (name, labels) = (&snapshot.nodes.name[node.index()], &snapshot.nodes.labels[node.index()]);
        preferred.iter().filter(|(_, term)| term.matches(name, labels)).map(|(weight, _)| weight).sum()
    }

    fn normalize(&self, _state: &State, scores: &mut [i64]) {
        normalize_by_maximum(scores, false);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{accepts, cluster, node, pod, scores};

    fn snapshot() -> Snapshot {
        cluster([
            node("n1").label("disk", "ssd").label("cores", "8").build(),
            node("n2").label("disk", "hdd").label("cores", "16").build(),
            node("n3").build(),
        ])
    }

    #[test]
    fn node_selectors_and_required_terms_choose_nodes() {
        let terms = |terms: Value| json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}});
        let expression = |key: &str, operator: &str, values: &[&str]| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
        let cases = [
            (json!({}), [true, true, true]),
            (json!({"nodeSelector": {"disk": "ssd"}}), [true, false, false]),
            (terms(json!([expression("disk", "In", &["ssd", "hdd"])])), [true, true, false]),
            (terms(json!([expression("disk", "NotIn", &["ssd"])])), [false, true, true]),
            (terms(json!([expression("disk", "Exists", &[])])), [true, true, false]),
            (terms(json!([expression("disk", "DoesNotExist", &[])])), [false, false, true]),
            (terms(json!([expression("cores", "Gt", &["8"])])), [false, true, false]),
            (terms(json!([expression("cores", "Lt", &["10"])])), [true, false, false]),
            (
                terms(json!([expression("disk", "In", &["ssd"]), expression("cores", "In", &["16"])])),
                [true, true, false],
            ),
            (terms(json!([{}])), [false, false, false]),
            (
                terms(json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n3"]}]}])),
                [false, false, true],
            ),
        ];
        for (spec, expected) in cases {
            let pod = pod("p").spec(spec.clone()).build();
            assert_eq!(accepts(&NodeAffinity::default(), &pod, &snapshot()), expected, "{spec}");
        }
    }

    #[test]
    fn preferred_terms_add_their_weights() {
        let prefer = |weight: i32, value: &str| json!({"weight": weight, "preference": {"matchExpressions": [{"key": "disk", "operator": "In", "values": [value]}]}});
        let spec = json!({"affinity": {"nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [prefer(10, "ssd"), prefer(5, "hdd")]
        }}});
        assert_eq!(scores(&NodeAffinity::default(), &pod("p").spec(spec).build(), &snapshot()), [100, 50, 0]);
    }

    #[test]
    fn the_configuration_adds_affinity_to_every_pod() {
        let arguments = json!({"addedAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "disk", "operator": "Exists"}]}]
        }}});
        let plugin = NodeAffinity::new(Some(&arguments)).expect("arguments");
        assert_eq!(accepts(&plugin, &pod("p").build(), &snapshot()), [true, true, false]);
    }
}
