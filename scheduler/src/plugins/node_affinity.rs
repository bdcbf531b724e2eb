//! NodeAffinity: a pod's `nodeSelector` and `nodeAffinity`, and the affinity that the configuration adds to every pod.

use std::borrow::Cow;

use apimachinery::node::{NodeTerm, NodeTerms, RequiredNodeAffinity};
use k8s_openapi::api::core::v1::{NodeAffinity as ApiNodeAffinity, NodeSelectorTerm};
use serde::Deserialize;
use serde_json::Value;

use super::{BadArguments, arguments};
use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::config::Faults;
use crate::framework::{EventSet, Plugin, Points, PreFilter, PreScore, State, Verdict, normalize_by_maximum, state_of};

#[derive(Default)]
pub struct NodeAffinity {
    added: Option<ApiNodeAffinity>,
}

/// `NodeAffinityArgs`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Arguments {
    added_affinity: Option<ApiNodeAffinity>,
}

/// What the pod requires, and what the configuration adds.
#[derive(Default)]
struct Required {
    own: RequiredNodeAffinity,
    added: Option<NodeTerms>,
}

fn preferred_terms(affinity: Option<&ApiNodeAffinity>) -> Vec<(i64, NodeTerm)> {
    let preferred =
        affinity.and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_deref());
    let preferred = preferred.unwrap_or_default().iter().filter(|preferred| preferred.weight != 0);
    preferred
        .map(|preferred| (i64::from(preferred.weight), &preferred.preference))
        // An empty preference matches all nodes, and so says nothing.
        .filter(|(_, term)| term.match_expressions.is_some() || term.match_fields.is_some())
        .map(|(weight, term)| (weight, NodeTerm::parse(term)))
        .collect()
}

impl NodeAffinity {
    /// With the arguments of a profile.
    pub fn new(value: Option<&Value>) -> Result<NodeAffinity, BadArguments> {
        let Arguments { added_affinity } = arguments(value)?;
        // An empty term matches nothing, or says nothing, and is allowed.
        let mut faults = Faults::default();
        let mut check = |field: String, term: &NodeSelectorTerm| {
            let empty = term.match_expressions.is_none() && term.match_fields.is_none();
            if NodeTerm::parse(term).is_void() && !empty {
                faults.invalid(field, serde_json::json!(term), "a requirement that does not hold");
            }
        };
        let required =
            added_affinity.iter().filter_map(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
        for (at, term) in required.flat_map(|selector| selector.node_selector_terms.iter().enumerate()) {
            let field = "addedAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms";
            check(format!("{field}[{at}]"), term);
        }
        let preferred =
            added_affinity.iter().filter_map(|a| a.preferred_during_scheduling_ignored_during_execution.as_ref());
        for (at, term) in preferred.flat_map(|terms| terms.iter().enumerate()) {
            let field = "addedAffinity.preferredDuringSchedulingIgnoredDuringExecution";
            check(format!("{field}[{at}].preference"), &term.preference);
        }
        faults.check()?;
        Ok(NodeAffinity { added: added_affinity })
    }

    fn required(&self, pod: &PendingPod) -> Required {
        let added = self.added.as_ref().and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
        Required { own: pod.spec().map(RequiredNodeAffinity::of).unwrap_or_default(), added: added.map(NodeTerms::of) }
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
        if required.own.is_empty() && required.added.is_none() {
            return PreFilter::Skip;
        }
        // If every alternative lists names, only those nodes need a look.
        let Some(names) = required.own.terms.as_ref().and_then(NodeTerms::listed_names) else {
            return PreFilter::Proceed(Box::new(required));
        };
        let mut nodes: Vec<NodeId> = names.into_iter().filter_map(|name| snapshot.nodes.find(name)).collect();
        nodes.sort_unstable();
        nodes.dedup();
        PreFilter::Only(Box::new(required), nodes)
    }

    fn filter(&self, state: &State, _pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        let required: &Required = state_of(state);
        let (name, labels) = (&snapshot.nodes.name[node.index()], &snapshot.nodes.labels[node.index()]);
        if required.added.as_ref().is_some_and(|terms| !terms.matches(name, labels)) {
            return Verdict::unresolvable(ADDED_REASON);
        }
        if !required.own.matches(name, labels) {
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
        let preferred: &Vec<(i64, NodeTerm)> = state_of(state);
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
