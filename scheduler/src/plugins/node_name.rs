//! NodeName: a pod that names its node fits no other.

use std::borrow::Cow;

use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::framework::{EventSet, Plugin, Points, PreFilter, State, Verdict, state_of};

pub struct NodeName;

impl Plugin for NodeName {
    fn name(&self) -> &'static str {
        "NodeName"
    }

    fn points(&self) -> Points {
        Points::PRE_FILTER.and(Points::FILTER)
    }

    fn events(&self) -> EventSet {
        EventSet::NODE_ADD
    }

    fn pre_filter(&self, pod: &PendingPod, _snapshot: &Snapshot) -> PreFilter {
        match pod.spec().and_then(|spec| spec.node_name.clone()).filter(|name| !name.is_empty()) {
            Some(name) => PreFilter::Proceed(Box::new(name)),
            None => PreFilter::Skip,
        }
    }

    fn filter(&self, state: &State, _pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        Verdict::resolvable_never(*state_of::<String>(state) == *snapshot.nodes.name[node.index()])
    }

    fn reason(&self, _state: &State, _number: u32) -> Cow<'static, str> {
        Cow::Borrowed("node(s) didn't match the requested node name")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{accepts, cluster, node, pod};

    #[test]
    fn only_the_named_node_fits() {
        let snapshot = cluster([node("n1").build(), node("n2").build()]);
        for (name, expected) in [("", [true, true]), ("n1", [true, false]), ("n3", [false, false])] {
            assert_eq!(accepts(&NodeName, &pod("p").on(name).build(), &snapshot), expected, "{name}");
        }
    }
}
