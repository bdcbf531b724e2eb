//! NodeResourcesBalancedAllocation: prefers the node whose resources the pod brings into balance.

use serde::Deserialize;
use serde_json::Value;

use super::dynamic_resources::{Offered, Selectors};
use super::node_resources_fit::{Resource, default_resources, requested_and_allocatable};
use super::{BadArguments, arguments};
use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::config::Faults;
use crate::framework::{MAX_NODE_SCORE, Plugin, Points, PreScore, State, state_of};
use apimachinery::status::FieldError;

/// Resources beyond this number are left out of the balance.
const RESOURCES_MAX: usize = 8;

pub struct NodeResourcesBalancedAllocation {
    resources: Vec<Resource>,
    selectors: Selectors,
}

/// `NodeResourcesBalancedAllocationArgs`.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Arguments {
    resources: Vec<Resource>,
}

impl NodeResourcesBalancedAllocation {
    /// With the arguments of a profile.
    pub fn new(value: Option<&Value>) -> Result<Self, BadArguments> {
        let Arguments { mut resources } = arguments(value)?;
        let mut faults = Faults::default();
        for (at, Resource { name, weight }) in resources.iter().enumerate() {
            if resources[..at].iter().any(|other| other.name == *name) {
                faults.add(FieldError::duplicate(format!("resources[{at}].name"), name.as_str()));
            }
            if *weight != 1 {
                faults.invalid(format!("resources[{at}].weight"), *weight, "must be 1");
            }
        }
        faults.check()?;
        if resources.is_empty() {
            resources = default_resources();
        }
        resources.truncate(RESOURCES_MAX);
        Ok(NodeResourcesBalancedAllocation { resources, selectors: Selectors::default() })
    }
}

fn amount_of(pod: &PendingPod, resource: &str) -> i64 {
    let requests = &pod.facts.requests;
    match resource {
        "cpu" => requests.cpu_milli,
        "memory" => requests.memory,
        "ephemeral-storage" => requests.ephemeral_storage,
        _ => requests.extended.iter().find(|(name, _)| &**name == resource).map_or(0, |(_, amount)| *amount),
    }
}

/// One minus the standard deviation of the used fractions, in points. As `balancedResourceScore`.
fn balance(fractions: &[f64]) -> i64 {
    let deviation = match fractions {
        [] | [_] => 0.0,
        [one, other] => ((one - other) / 2.0).abs(),
        more => {
            let count = more.len() as f64;
            let mean = more.iter().sum::<f64>() / count;
            (more.iter().map(|fraction| (fraction - mean).powi(2)).sum::<f64>() / count).sqrt()
        }
    };
    ((1.0 - deviation) * MAX_NODE_SCORE as f64) as i64
}

impl Plugin for NodeResourcesBalancedAllocation {
    fn name(&self) -> &'static str {
        "NodeResourcesBalancedAllocation"
    }

    fn points(&self) -> Points {
        Points::PRE_SCORE.and(Points::SCORE)
    }

    /// A pod that requests nothing changes no balance.
    fn pre_score(&self, pod: &PendingPod, snapshot: &Snapshot, _feasible: &[NodeId]) -> PreScore {
        if self.resources.iter().all(|resource| amount_of(pod, &resource.name) == 0) {
            return PreScore::Skip;
        }
        let resources = self.resources.iter().map(|resource| resource.name.as_str());
        PreScore::Proceed(Box::new(Offered::to(pod, snapshot, resources, &self.selectors)))
    }

    /// By how much the pod betters the balance: half of the maximum if not at all.
    fn score(&self, state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> i64 {
        let offered: &Offered = state_of(state);
        let (mut with, mut without) = ([0.0; RESOURCES_MAX], [0.0; RESOURCES_MAX]);
        let mut count = 0;
        for resource in &self.resources {
            let amounts = requested_and_allocatable(pod, snapshot, node, &resource.name, true, offered);
            let Some((requested, allocatable)) = amounts else { continue };
            let fraction = |amount: i64| (amount as f64 / allocatable as f64).min(1.0);
            with[count] = fraction(requested);
            without[count] = fraction(requested - amount_of(pod, &resource.name));
            count += 1;
        }
        let half = MAX_NODE_SCORE / 2;
        half + (half + balance(&with[..count]) - balance(&without[..count])) / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cluster, node, placed, pod, scores};

    #[test]
    fn fractions_in_step_are_balanced() {
        let cases: [(&[f64], i64); 5] =
            [(&[], 100), (&[0.7], 100), (&[0.5, 0.5], 100), (&[1.0, 0.0], 50), (&[0.0, 0.5, 1.0], 59)];
        for (fractions, expected) in cases {
            assert_eq!(balance(fractions), expected, "{fractions:?}");
        }
    }

    #[test]
    fn the_node_that_the_pod_evens_out_is_preferred() {
        let plugin = NodeResourcesBalancedAllocation::new(None).expect("default");
        let mut snapshot = cluster([
            node("n1").allocatable("10", "10000", 10).build(),
            node("n2").allocatable("10", "10000", 10).build(),
        ]);
        placed(&mut snapshot, pod("much-cpu").requests(&[("cpu", "5"), ("memory", "1")]).on("n1").build());
        placed(&mut snapshot, pod("much-memory").requests(&[("cpu", "1m"), ("memory", "5000")]).on("n2").build());
        let scores = scores(&plugin, &pod("p").requests(&[("cpu", "1m"), ("memory", "5000")]).build(), &snapshot);
        assert_eq!(scores, [87, 62]);
    }
}
