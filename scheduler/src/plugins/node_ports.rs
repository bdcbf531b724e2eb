//! NodePorts: two pods of a node cannot hold the same host port.

use std::borrow::Cow;

use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::framework::{EventSet, Plugin, Points, PreFilter, State, Verdict};

pub struct NodePorts;

impl Plugin for NodePorts {
    fn name(&self) -> &'static str {
        "NodePorts"
    }

    fn points(&self) -> Points {
        Points::PRE_FILTER.and(Points::FILTER)
    }

    fn events(&self) -> EventSet {
        EventSet::NODE_ADD.and(EventSet::POD_REMOVED)
    }

    fn pre_filter(&self, pod: &PendingPod, _snapshot: &Snapshot) -> PreFilter {
        if pod.facts.host_ports.is_empty() { PreFilter::Skip } else { PreFilter::Proceed(Box::new(())) }
    }

    fn filter(&self, _state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        let held = &snapshot.nodes.host_ports[node.index()];
        let conflict = pod.facts.host_ports.iter().any(|port| held.iter().any(|held| held.conflicts(port)));
        if conflict { Verdict::unschedulable(1) } else { Verdict::Accept }
    }

    fn reason(&self, _state: &State, _number: u32) -> Cow<'static, str> {
        Cow::Borrowed("node(s) didn't have free ports for the requested pod ports")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{accepts, cluster, node, placed, pod};

    #[test]
    fn a_held_port_refuses_the_node() {
        let mut snapshot = cluster([node("n1").build(), node("n2").build()]);
        placed(&mut snapshot, pod("holder").host_port(8080).on("n1").build());
        assert_eq!(accepts(&NodePorts, &pod("p").host_port(8080).build(), &snapshot), [false, true]);
        assert_eq!(accepts(&NodePorts, &pod("p").host_port(8081).build(), &snapshot), [true, true]);
        assert_eq!(accepts(&NodePorts, &pod("p").build(), &snapshot), [true, true]);
    }
}
