//! TaintToleration: a node's taints keep pods away that do not tolerate them: `NoSchedule` and `NoExecute` for good,
//! `PreferNoSchedule` by score.

use std::borrow::Cow;

use apimachinery::node::tolerated;
use k8s_openapi::api::core::v1::{Taint, Toleration};

use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::framework::{EventSet, Plugin, Points, State, Verdict, normalize_by_maximum};

pub struct TaintToleration;

/// Whether the taint keeps pods from being placed on the node.
pub fn repels(taint: &Taint) -> bool {
    taint.effect == "NoSchedule" || taint.effect == "NoExecute"
}

/// Whether the pod tolerates all taints of the node that would keep it away.
pub fn tolerates_node(tolerations: &[Toleration], taints: &[Taint]) -> bool {
    taints.iter().filter(|taint| repels(taint)).all(|taint| tolerated(tolerations, taint))
}

fn tolerations(pod: &PendingPod) -> &[Toleration] {
    pod.spec().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default()
}

impl Plugin for TaintToleration {
    fn name(&self) -> &'static str {
        "TaintToleration"
    }

    fn points(&self) -> Points {
        Points::FILTER.and(Points::PRE_SCORE).and(Points::SCORE)
    }

    fn events(&self) -> EventSet {
        EventSet::NODE_ADD.and(EventSet::NODE_TAINT).and(EventSet::OWN_TOLERATIONS)
    }

    fn filter(&self, _state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        Verdict::resolvable_never(tolerates_node(tolerations(pod), &snapshot.nodes.taints[node.index()]))
    }

    fn reason(&self, _state: &State, _number: u32) -> Cow<'static, str> {
        Cow::Borrowed("node(s) had untolerated taint(s)")
    }

    /// How many `PreferNoSchedule` taints the pod does not tolerate.
    fn score(&self, _state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> i64 {
        let taints = snapshot.nodes.taints[node.index()].iter();
        taints.filter(|taint| taint.effect == "PreferNoSchedule" && !tolerated(tolerations(pod), taint)).count() as i64
    }

    fn normalize(&self, _state: &State, scores: &mut [i64]) {
        normalize_by_maximum(scores, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{accepts, cluster, node, pod, scores};

    #[test]
    fn tolerations_cover_taints_by_key_value_and_effect() {
        // (key, operator, value, effect) of the toleration; whether it covers k=v:NoSchedule.
        let cases = [
            (("k", "Equal", "v", "NoSchedule"), true),
            (("k", "", "v", ""), true),
            (("k", "Equal", "w", "NoSchedule"), false),
            (("k", "Exists", "", "NoExecute"), false),
            (("k", "Exists", "", "NoSchedule"), true),
            (("", "Exists", "", ""), true),
            (("other", "Exists", "", ""), false),
            (("k", "Nonsense", "v", ""), false),
        ];
        let snapshot = cluster([node("n").taint("k", "v", "NoSchedule").build()]);
        for ((key, operator, value, effect), expected) in cases {
            let pod = pod("p").toleration(key, operator, value, effect).build();
            assert_eq!(accepts(&TaintToleration, &pod, &snapshot), [expected], "{key} {operator} {value} {effect}");
        }
        assert_eq!(accepts(&TaintToleration, &pod("p").build(), &snapshot), [false]);
    }

    #[test]
    fn preference_taints_lower_the_score_only() {
        let snapshot = cluster([
            node("n1").taint("a", "", "PreferNoSchedule").taint("b", "", "PreferNoSchedule").build(),
            node("n2").taint("a", "", "PreferNoSchedule").build(),
            node("n3").build(),
        ]);
        let pod = pod("p").build();
        assert_eq!(accepts(&TaintToleration, &pod, &snapshot), [true; 3]);
        assert_eq!(scores(&TaintToleration, &pod, &snapshot), [0, 50, 100]);
    }
}
