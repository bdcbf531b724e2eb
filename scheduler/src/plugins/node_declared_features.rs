//! NodeDeclaredFeatures: what a pod asks for that not every kubelet knows, its node must declare that it can do.

use std::borrow::Cow;

use k8s_openapi::api::core::v1::PodSpec;

use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::framework::{EventSet, Plugin, Points, PreFilter, State, Verdict, state_of};

pub struct NodeDeclaredFeatures;

/// The features of v1.36 that a pod's spec can ask for, and how. As `InferForScheduling` of each.
const FEATURES: [(&str, fn(&PodSpec) -> bool); 2] = [
    ("RestartAllContainersOnContainerExits", |spec| {
        let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        let mut rules = containers.flat_map(|container| container.restart_policy_rules.iter().flatten());
        rules.any(|rule| rule.action == "RestartAllContainers")
    }),
    ("UserNamespacesHostNetworkSupport", |spec| spec.host_network == Some(true) && spec.host_users == Some(false)),
];

impl Plugin for NodeDeclaredFeatures {
    fn name(&self) -> &'static str {
        "NodeDeclaredFeatures"
    }

    fn points(&self) -> Points {
        Points::PRE_FILTER.and(Points::FILTER)
    }

    fn events(&self) -> EventSet {
        EventSet::NODE_ADD.and(EventSet::NODE_FEATURES)
    }

    fn pre_filter(&self, pod: &PendingPod, _snapshot: &Snapshot) -> PreFilter {
        let asked = FEATURES.iter().filter(|(_, asks)| pod.spec().is_some_and(asks)).map(|(name, _)| *name);
        let asked: Vec<&'static str> = asked.collect();
        if asked.is_empty() { PreFilter::Skip } else { PreFilter::Proceed(Box::new(asked)) }
    }

    fn filter(&self, state: &State, _pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        let asked: &Vec<&'static str> = state_of(state);
        let declared = &snapshot.nodes.features[node.index()];
        let missing = |(at, name): (usize, &&str)| if declared.iter().any(|one| one == name) { 0 } else { 1 << at };
        match asked.iter().enumerate().map(missing).sum() {
            0 => Verdict::Accept,
            reasons => Verdict::unresolvable(reasons),
        }
    }

    fn reason(&self, state: &State, number: u32) -> Cow<'static, str> {
        let asked: &Vec<&'static str> = state_of(state);
        let missing = asked.get(number as usize).copied().unwrap_or_default();
        format!("node declared features check failed - unsatisfied requirements: {missing}").into()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{accepts, cluster, explain, node, pod};

    #[test]
    fn what_a_pod_asks_for_its_node_must_be_able_to_do() {
        let mut snapshot = cluster([node("old").build(), node("new").build()]);
        snapshot.nodes.features[1] = vec!["RestartAllContainersOnContainerExits".to_owned()].into();
        let exits = json!({"operator": "In", "values": [1]});
        for (spec, expected) in [
            (json!({}), [true, true]),
            (json!({"hostNetwork": true}), [true, true]),
            (json!({"hostNetwork": true, "hostUsers": false}), [false, false]),
            (
                json!({"containers": [{"name": "c", "restartPolicyRules": [
                    {"action": "RestartAllContainers", "exitCodes": exits}]}]}),
                [false, true],
            ),
        ] {
            let pod = pod("p").spec(spec).build();
            assert_eq!(accepts(&NodeDeclaredFeatures, &pod, &snapshot), expected, "{pod:?}");
            if !expected[1] {
                let told = explain(&NodeDeclaredFeatures, &pod, &snapshot, "new");
                let words =
                    "node declared features check failed - unsatisfied requirements: UserNamespacesHostNetworkSupport";
                assert_eq!(told, [words]);
            }
        }
    }
}
