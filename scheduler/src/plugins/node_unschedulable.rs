//! NodeUnschedulable: a cordoned node takes only pods that tolerate `node.kubernetes.io/unschedulable`.

use std::borrow::Cow;

use k8s_openapi::api::core::v1::Taint;

use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::framework::{EventSet, Plugin, Points, State, Verdict};
use apimachinery::node::tolerated;

pub struct NodeUnschedulable;

impl Plugin for NodeUnschedulable {
    fn name(&self) -> &'static str {
        "NodeUnschedulable"
    }

    fn points(&self) -> Points {
        Points::FILTER
    }

    fn events(&self) -> EventSet {
        EventSet::NODE_ADD.and(EventSet::NODE_TAINT).and(EventSet::OWN_TOLERATIONS)
    }

    fn filter(&self, _state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        if !snapshot.nodes.unschedulable[node.index()] {
            return Verdict::Accept;
        }
        let taint = Taint {
            key: "node.kubernetes.io/unschedulable".to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        };
        let tolerations = pod.spec().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
        Verdict::resolvable_never(tolerated(tolerations, &taint))
    }

    fn reason(&self, _state: &State, _number: u32) -> Cow<'static, str> {
        Cow::Borrowed("node(s) were unschedulable")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{accepts, cluster, node, pod};

    #[test]
    fn a_cordoned_node_takes_only_what_tolerates_it() {
        let snapshot = cluster([node("n1").build(), node("n2").unschedulable().build()]);
        assert_eq!(accepts(&NodeUnschedulable, &pod("p").build(), &snapshot), [true, false]);
        let tolerant = pod("p").toleration("node.kubernetes.io/unschedulable", "Exists", "", "NoSchedule").build();
        assert_eq!(accepts(&NodeUnschedulable, &tolerant, &snapshot), [true, true]);
    }
}
