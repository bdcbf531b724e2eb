//! The decision: a pod and a snapshot in, a node or the reasons against all of them out. Pure.
//!
//! As `schedulePod`: PreFilter, Filter until enough nodes are found, PreScore, Score, NormalizeScore, and a choice by lot among
//! the best. The buffers in [`Scratch`] are kept between decisions, so that nothing is allocated per node.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use rand::{Rng, RngExt};

use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::framework::{
    Cycle, Diagnosis, Evaluations, FitError, MAX_NODE_SCORE, Nomination, PreScore, Profile, State, Timings,
};

/// Below this number all nodes are looked at. As `minFeasibleNodesToFind`.
const FEASIBLE_NODES_MIN: usize = 100;
/// The lowest share of nodes that the adaptive rule comes down to, in percent.
const PERCENTAGE_MIN: usize = 5;

/// Where a pod goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    pub node: NodeId,
    /// How many nodes were looked at, and how many of them fit.
    pub evaluated: usize,
    pub feasible: usize,
}

/// What one decision leaves to the next: buffers, and where to begin looking.
#[derive(Default)]
pub struct Scratch {
    feasible: Vec<NodeId>,
    totals: Vec<i64>,
    /// The slot after the last one looked at, so that all nodes have their turn in a large cluster.
    next_start: usize,
    /// Of the last decision.
    pub timings: Timings,
    /// Of the last decision, too.
    pub evaluations: Evaluations,
}

/// How many fitting nodes are enough. As `numFeasibleNodesToFind`.
pub fn enough_nodes(percentage: Option<u32>, nodes: usize) -> usize {
    if nodes < FEASIBLE_NODES_MIN {
        return nodes;
    }
    let percentage = match percentage {
        Some(percentage) if percentage > 0 => percentage as usize,
        _ => (50_usize.saturating_sub(nodes / 125)).max(PERCENTAGE_MIN),
    };
    if percentage >= 100 { nodes } else { (nodes * percentage / 100).max(FEASIBLE_NODES_MIN) }
}

/// What extenders said of the nodes that fit, by name.
#[derive(Debug, Default)]
pub struct Approval {
    pub nodes: HashSet<String>,
    /// Added to the plugins' totals.
    pub scores: HashMap<String, i64>,
    /// Why other nodes were refused, with their numbers.
    pub refused: Vec<(usize, String)>,
}

/// Finds the node for a pod. The snapshot is lent for suppositions, and is as before afterwards.
pub fn decide(
    profile: &Profile,
    snapshot: &mut Snapshot,
    pod: &PendingPod,
    scratch: &mut Scratch,
    rng: &mut impl Rng,
) -> Result<Decision, FitError> {
    decide_among(profile, snapshot, pod, scratch, rng, None)
}

/// As [`decide`], among the nodes that extenders approve of.
pub fn decide_among(
    profile: &Profile,
    snapshot: &mut Snapshot,
    pod: &PendingPod,
    scratch: &mut Scratch,
    rng: &mut impl Rng,
    approval: Option<&Approval>,
) -> Result<Decision, FitError> {
    let mut diagnosis = Diagnosis { nodes: snapshot.nodes.len(), ..Diagnosis::default() };
    drop(scratch.timings.drain());
    scratch.evaluations.begin(profile.plugins.len());
    if snapshot.nodes.is_empty() {
        return Err(diagnosis.into_error(profile, &[]));
    }
    let began = Instant::now();
    let (mut cycle, goes_on) = Cycle::start(profile, snapshot, pod, &mut diagnosis);
    let status = if goes_on { "Success" } else { "UnschedulableAndUnresolvable" };
    let began = scratch.timings.note("PreFilter", status, began);
    let evaluated = if goes_on { find_feasible(&mut cycle, snapshot, scratch, &mut diagnosis) } else { 0 };
    if goes_on {
        // Of all nodes together.
        scratch.timings.note("Filter", "Success", began);
    }
    if let Some(approval) = approval {
        scratch.feasible.retain(|node| approval.nodes.contains(&*snapshot.nodes.name[node.index()]));
        diagnosis.others = approval.refused.clone();
    }
    if !goes_on || scratch.feasible.is_empty() {
        let began = Instant::now();
        post_filter(&mut cycle, snapshot, &mut diagnosis, rng);
        let helps = diagnosis.deallocate.is_some() || matches!(diagnosis.nomination, Nomination::To { .. });
        scratch.timings.note("PostFilter", if helps { "Success" } else { "Unschedulable" }, began);
        cycle.count(&mut scratch.evaluations);
        return Err(diagnosis.into_error(profile, &cycle.states));
    }
    cycle.count(&mut scratch.evaluations);
    let node = match scratch.feasible.as_slice() {
        [only] => *only,
        _ => {
            score(profile, snapshot, pod, scratch);
            for (node, total) in scratch.feasible.iter().zip(&mut scratch.totals).filter(|_| approval.is_some()) {
                let said = approval.and_then(|approval| approval.scores.get(&*snapshot.nodes.name[node.index()]));
                *total += said.copied().unwrap_or(0);
            }
            choose(&scratch.feasible, &scratch.totals, rng)
        }
    };
    Ok(Decision { node, evaluated, feasible: scratch.feasible.len() })
}

/// Asks the PostFilter plugins, until one has a node to nominate. As `RunPostFilterPlugins`.
fn post_filter(cycle: &mut Cycle<'_>, snapshot: &mut Snapshot, diagnosis: &mut Diagnosis, rng: &mut impl Rng) {
    for place in &cycle.profile.post_filter {
        let answer = cycle.profile.plugin(*place).post_filter(cycle, snapshot, diagnosis, rng);
        diagnosis.post_filter.extend(answer.words);
        if answer.nomination != Nomination::Keep {
            diagnosis.nomination = answer.nomination;
        }
        diagnosis.candidates.extend(answer.candidates);
        diagnosis.deallocate = answer.deallocate;
        if diagnosis.deallocate.is_some() || matches!(diagnosis.nomination, Nomination::To { .. }) {
            diagnosis.post_filter.clear();
            return;
        }
    }
}

/// The nodes that would be scored, for extenders to judge.
pub fn sampled_nodes(
    profile: &Profile,
    snapshot: &mut Snapshot,
    pod: &PendingPod,
    scratch: &mut Scratch,
) -> Vec<Arc<str>> {
    let mut diagnosis = Diagnosis::default();
    let (mut cycle, goes_on) = Cycle::start(profile, snapshot, pod, &mut diagnosis);
    if !goes_on {
        return Vec::new();
    }
    // The decision that follows looks at the same nodes.
    let start = scratch.next_start;
    find_feasible(&mut cycle, snapshot, scratch, &mut diagnosis);
    scratch.next_start = start;
    scratch.feasible.iter().map(|node| snapshot.nodes.name[node.index()].clone()).collect()
}

/// All nodes that fit, however many there are; for explanations and tests.
pub fn feasible_nodes(profile: &Profile, snapshot: &mut Snapshot, pod: &PendingPod) -> Vec<NodeId> {
    let mut diagnosis = Diagnosis::default();
    let (mut cycle, goes_on) = Cycle::start(profile, snapshot, pod, &mut diagnosis);
    let nodes: Vec<NodeId> = snapshot.nodes.iter().filter(|_| goes_on).collect();
    let wanted = |node: &NodeId, only: &Option<Vec<NodeId>>| only.as_ref().is_none_or(|only| only.contains(node));
    nodes.into_iter().filter(|node| wanted(node, &cycle.only) && cycle.filter(snapshot, *node).is_ok()).collect()
}

/// Fills `scratch.feasible`; returns how many nodes were looked at.
fn find_feasible(
    cycle: &mut Cycle<'_>,
    snapshot: &mut Snapshot,
    scratch: &mut Scratch,
    diagnosis: &mut Diagnosis,
) -> usize {
    scratch.feasible.clear();
    let only = cycle.only.take();
    // The node that was made free for the pod, if it is. As `evaluateNominatedNode`.
    let nominated = snapshot.nominated_node(&cycle.pod.facts.uid).and_then(|name| snapshot.nodes.find(name));
    if let Some(node) = nominated.filter(|node| only.as_ref().is_none_or(|only| only.contains(node)))
        && cycle.filter(snapshot, node).is_ok()
    {
        scratch.feasible.push(node);
        return 1;
    }
    let (mut evaluated, profile) = (0, cycle.profile);
    let mut look_at = |node: NodeId, snapshot: &mut Snapshot, feasible: &mut Vec<NodeId>| {
        evaluated += 1;
        match cycle.filter(snapshot, node) {
            Ok(()) => feasible.push(node),
            Err((place, refusal)) => diagnosis.refused.push((node, place, refusal)),
        }
    };
    if let Some(only) = &only {
        for node in only {
            look_at(*node, snapshot, &mut scratch.feasible);
        }
        // The other nodes were refused by whoever narrowed the choice; Kubernetes counts them so too.
        let narrowing = profile.pre_filter.iter().find(|place| profile.plugin(**place).name() == "NodeAffinity");
        if let Some(place) = narrowing.filter(|_| scratch.feasible.is_empty()) {
            let refusal = crate::framework::Refusal { reasons: 1, resolvable: false };
            let others = snapshot.nodes.iter().filter(|node| !only.contains(node));
            diagnosis.refused.extend(others.map(|node| (node, *place, refusal)));
        }
    } else {
        let slots = snapshot.nodes.slots();
        let enough = enough_nodes(profile.percentage_of_nodes_to_score, snapshot.nodes.len());
        let start = scratch.next_start % slots.max(1);
        let mut looked_at = 0;
        for index in (start..slots).chain(0..start) {
            looked_at += 1;
            if snapshot.nodes.present[index] {
                look_at(NodeId(index as u32), snapshot, &mut scratch.feasible);
                if scratch.feasible.len() >= enough {
                    break;
                }
            }
        }
        scratch.next_start = (start + looked_at) % slots.max(1);
    }
    evaluated
}

/// Fills `scratch.totals`, one a feasible node.
fn score(profile: &Profile, snapshot: &Snapshot, pod: &PendingPod, scratch: &mut Scratch) {
    let Scratch { feasible, totals, timings, evaluations, .. } = scratch;
    totals.clear();
    totals.resize(feasible.len(), 0);
    let began = Instant::now();
    let states = pre_score(profile, snapshot, pod, feasible);
    let began = timings.note("PreScore", "Success", began);
    for (place, ..) in &states {
        if profile.pre_score.contains(place) {
            evaluations.add(*place, 2, 1);
        }
        evaluations.add(*place, 3, feasible.len() as u64);
    }
    scores_with(&states, profile, snapshot, pod, feasible, &mut |_, weight, scores| {
        for (total, score) in totals.iter_mut().zip(scores) {
            *total += score * weight;
        }
    });
    timings.note("Score", "Success", began);
}

/// The plugins that have a score to give, with their weights and what they worked out for that.
fn pre_score(profile: &Profile, snapshot: &Snapshot, pod: &PendingPod, nodes: &[NodeId]) -> Vec<(u8, i64, State)> {
    let with_state = |(place, weight): &(u8, i64)| {
        let prepared = match profile.pre_score.contains(place) {
            true => profile.plugin(*place).pre_score(pod, snapshot, nodes),
            false => PreScore::Proceed(Box::new(())),
        };
        match prepared {
            PreScore::Skip => None,
            PreScore::Proceed(state) => Some((*place, *weight, state)),
        }
    };
    profile.score.iter().filter_map(with_state).collect()
}

/// Tells each plugin's weight and normalised scores of the nodes.
pub fn plugin_scores(
    profile: &Profile,
    snapshot: &Snapshot,
    pod: &PendingPod,
    nodes: &[NodeId],
    told: &mut dyn FnMut(u8, i64, &[i64]),
) {
    scores_with(&pre_score(profile, snapshot, pod, nodes), profile, snapshot, pod, nodes, told);
}

fn scores_with(
    states: &[(u8, i64, State)],
    profile: &Profile,
    snapshot: &Snapshot,
    pod: &PendingPod,
    nodes: &[NodeId],
    told: &mut dyn FnMut(u8, i64, &[i64]),
) {
    let mut scores = Vec::with_capacity(nodes.len());
    for (place, weight, state) in states {
        let plugin = profile.plugin(*place);
        scores.clear();
        scores.extend(nodes.iter().map(|node| plugin.score(state, pod, snapshot, *node)));
        plugin.normalize(state, &mut scores);
        debug_assert!(scores.iter().all(|score| (0..=MAX_NODE_SCORE).contains(score)), "{}: {scores:?}", plugin.name());
        told(*place, *weight, &scores);
    }
}

/// One of the nodes with the highest total, by lot. As `selectHost`.
fn choose(feasible: &[NodeId], totals: &[i64], rng: &mut impl Rng) -> NodeId {
    let highest = totals.iter().copied().max().unwrap_or_default();
    let mut best = feasible.iter().zip(totals).filter(|(_, total)| **total == highest).map(|(node, _)| *node);
    let lot = rng.random_range(0..best.clone().count().max(1));
    best.nth(lot).unwrap_or(feasible[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cluster, node, pending, placed, pod, seeded};

    #[test]
    fn it_is_counted_how_often_plugins_are_asked() {
        let profile = Profile::default_profile().expect("default profile");
        let mut snapshot = cluster([node("a").build(), node("b").build(), node("c").unschedulable().build()]);
        let (pod, mut scratch) = (pending(pod("p").requests(&[("cpu", "1")]).build()), Scratch::default());
        snapshot.prepare_for(&pod);
        decide(&profile, &mut snapshot, &pod, &mut scratch, &mut seeded(1)).expect("a node");
        let of = |name: &str| {
            let place = profile.plugins.iter().position(|plugin| plugin.name() == name).expect("a plugin");
            scratch.evaluations.counts()[place]
        };
        // All nodes come to the first filter; the one that it refuses comes no further.
        assert_eq!(of("NodeUnschedulable"), [0, 3, 0, 0]);
        assert_eq!(of("NodeResourcesFit"), [1, 2, 1, 2]);
        // It has nothing to say of this pod.
        assert_eq!(of("PodTopologySpread")[1], 0);
        assert_eq!(of("DefaultBinder"), [0; 4]);
    }

    fn decide_now(snapshot: &mut Snapshot, pod: k8s_openapi::api::core::v1::Pod) -> Result<String, FitError> {
        let profile = Profile::default_profile().expect("default profile");
        let pod = pending(pod);
        snapshot.prepare_for(&pod);
        let decision = decide(&profile, snapshot, &pod, &mut Scratch::default(), &mut seeded(1))?;
        Ok(snapshot.nodes.name[decision.node.index()].to_string())
    }

    #[test]
    fn the_message_counts_the_reasons_against_all_nodes() {
        let mut snapshot = cluster([
            node("n1").taint("node-role.kubernetes.io/control-plane", "", "NoSchedule").build(),
            node("n2").allocatable("1", "4Gi", 110).build(),
        ]);
        let error = decide_now(&mut snapshot, pod("p").requests(&[("cpu", "2")]).build()).expect_err("no node");
        assert_eq!(
            error.message,
            "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint(s). no new claims to \
             deallocate, preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling."
        );
        assert_eq!(error.plugins, ["TaintToleration", "NodeResourcesFit"]);
    }

    #[test]
    fn an_empty_cluster_says_so() {
        let error = decide_now(&mut Snapshot::default(), pod("p").build()).expect_err("no node");
        assert_eq!(error.message, "no nodes available to schedule pods");
    }

    #[test]
    fn a_pod_that_names_absent_nodes_only_is_told_so() {
        let mut snapshot = cluster([node("n1").build(), node("n2").build()]);
        let named = |name: &str| {
            pod("p").spec(serde_json::json!({"affinity": {"nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                    {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [name]}]}]}}}}))
        };
        assert_eq!(decide_now(&mut snapshot, named("n2").build()).expect("n2"), "n2");
        let full = named("n2").requests(&[("cpu", "1000")]).build();
        assert_eq!(
            decide_now(&mut snapshot, full).expect_err("full").message,
            "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match Pod's node affinity/selector. no new \
             claims to deallocate, preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling."
        );
        assert!(decide_now(&mut snapshot, named("n9").build()).is_err());
    }

    #[test]
    fn replicas_of_a_service_go_to_different_hosts() {
        let mut snapshot =
            cluster(["a", "b", "c"].map(|name| node(name).label("kubernetes.io/hostname", name).build()));
        snapshot.workloads.set_service("default", "web", Some([("app".to_owned(), "web".to_owned())].into()));
        let mut used = Vec::new();
        for number in 0..6 {
            let name = format!("web-{number}");
            let web = pod(&name).label("app", "web");
            let chosen = decide_now(&mut snapshot, pod(&name).label("app", "web").build()).expect("node");
            placed(&mut snapshot, web.on(&chosen).build());
            used.push(chosen);
        }
        used[..3].sort();
        used[3..].sort();
        assert_eq!(used, ["a", "b", "c", "a", "b", "c"]);
    }

    #[test]
    fn large_clusters_are_sampled() {
        for (percentage, nodes, expected) in [
            (None, 10, 10),
            (None, 100, 100),
            (None, 1000, 420),
            (None, 6000, 300),
            (Some(40), 1000, 400),
            (Some(100), 1000, 1000),
            (Some(1), 1000, 100),
        ] {
            assert_eq!(enough_nodes(percentage, nodes), expected, "{percentage:?} of {nodes}");
        }
    }

    #[test]
    fn ties_are_broken_by_lot() {
        let feasible = [0, 1, 2].map(NodeId);
        let mut rng = seeded(7);
        let mut counts = [0; 3];
        for _ in 0..3000 {
            counts[choose(&feasible, &[5, 5, 4], &mut rng).index()] += 1;
        }
        assert_eq!(counts[2], 0);
        assert!((1200..1800).contains(&counts[0]), "{counts:?}");
    }
}
