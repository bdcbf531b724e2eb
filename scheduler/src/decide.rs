//! The decision: a pod and a snapshot in, a node or the reasons against all of them out. Pure.
//!
//! As `schedulePod`: PreFilter, Filter until enough nodes are found, PreScore, Score, NormalizeScore, and a choice by lot among
//! the best. The buffers in [`Scratch`] are kept between decisions, so that nothing is allocated per node.

use rand::{Rng, RngExt};

use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::framework::{Diagnosis, FitError, MAX_NODE_SCORE, Plugin, PreFilter, PreScore, Profile, State, Verdict};

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
    scores: Vec<i64>,
    /// The slot after the last one looked at, so that all nodes have their turn in a large cluster.
    next_start: usize,
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

/// Finds the node for a pod.
pub fn decide(
    profile: &Profile,
    snapshot: &Snapshot,
    pod: &PendingPod,
    scratch: &mut Scratch,
    rng: &mut impl Rng,
) -> Result<Decision, FitError> {
    let mut states: Vec<Option<State>> = Vec::new();
    states.resize_with(profile.plugins.len(), || None);
    let mut diagnosis = Diagnosis { nodes: snapshot.nodes.len(), ..Diagnosis::default() };
    if snapshot.nodes.is_empty() {
        return Err(diagnosis.into_error(profile, &states));
    }
    let evaluated = match find_feasible(profile, snapshot, pod, scratch, &mut states, &mut diagnosis) {
        Ok(evaluated) => evaluated,
        Err(NoneFits) => {
            for place in &profile.post_filter {
                diagnosis.post_filter = profile.plugin(*place).post_filter(pod, snapshot, &diagnosis);
            }
            return Err(diagnosis.into_error(profile, &states));
        }
    };
    let node = match scratch.feasible.as_slice() {
        [only] => *only,
        _ => {
            score(profile, snapshot, pod, scratch);
            choose(&scratch.feasible, &scratch.totals, rng)
        }
    };
    Ok(Decision { node, evaluated, feasible: scratch.feasible.len() })
}

/// All nodes that fit, however many there are; for explanations and tests.
pub fn feasible_nodes(profile: &Profile, snapshot: &Snapshot, pod: &PendingPod) -> Vec<NodeId> {
    let mut states: Vec<Option<State>> = Vec::new();
    states.resize_with(profile.plugins.len(), || None);
    let (mut scratch, mut diagnosis) = (Scratch::default(), Diagnosis::default());
    match find_feasible(profile, snapshot, pod, &mut scratch, &mut states, &mut diagnosis) {
        Ok(_) => scratch.feasible,
        Err(NoneFits) => Vec::new(),
    }
}

struct NoneFits;

/// Fills `scratch.feasible`; returns how many nodes were looked at.
fn find_feasible(
    profile: &Profile,
    snapshot: &Snapshot,
    pod: &PendingPod,
    scratch: &mut Scratch,
    states: &mut [Option<State>],
    diagnosis: &mut Diagnosis,
) -> Result<usize, NoneFits> {
    let mut skipped = 0_u128;
    let mut only: Option<Vec<NodeId>> = None;
    for place in &profile.pre_filter {
        match profile.plugin(*place).pre_filter(pod, snapshot) {
            PreFilter::Skip => skipped |= 1 << place,
            PreFilter::Proceed(state) => states[usize::from(*place)] = Some(state),
            PreFilter::Only(state, nodes) => {
                states[usize::from(*place)] = Some(state);
                match &mut only {
                    None => only = Some(nodes),
                    Some(only) => only.retain(|node| nodes.contains(node)),
                }
                if only.as_ref().is_some_and(Vec::is_empty) {
                    let name = profile.plugin(*place).name();
                    diagnosis.pre_filter =
                        Some((*place, format!("node(s) didn't satisfy plugin(s) [{name}] simultaneously")));
                    return Err(NoneFits);
                }
            }
            PreFilter::Refuse(words) => {
                diagnosis.pre_filter = Some((*place, words));
                return Err(NoneFits);
            }
        }
    }
    let none: State = Box::new(());
    let filters: Vec<(u8, &dyn Plugin, &State)> = profile
        .filter
        .iter()
        .filter(|place| skipped & (1 << **place) == 0)
        .map(|place| (*place, profile.plugin(*place), states[usize::from(*place)].as_ref().unwrap_or(&none)))
        .collect();

    scratch.feasible.clear();
    let mut evaluated = 0;
    let mut look_at = |node: NodeId, feasible: &mut Vec<NodeId>, diagnosis: &mut Diagnosis| {
        evaluated += 1;
        for (place, plugin, state) in &filters {
            if let Verdict::Refuse(refusal) = plugin.filter(state, pod, snapshot, node) {
                diagnosis.refused.push((node, *place, refusal));
                return;
            }
        }
        feasible.push(node);
    };
    if let Some(only) = &only {
        for node in only {
            look_at(*node, &mut scratch.feasible, diagnosis);
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
                look_at(NodeId(index as u32), &mut scratch.feasible, diagnosis);
                if scratch.feasible.len() >= enough {
                    break;
                }
            }
        }
        scratch.next_start = (start + looked_at) % slots.max(1);
    }
    if scratch.feasible.is_empty() { Err(NoneFits) } else { Ok(evaluated) }
}

/// Fills `scratch.totals`, one a feasible node.
fn score(profile: &Profile, snapshot: &Snapshot, pod: &PendingPod, scratch: &mut Scratch) {
    let feasible = &scratch.feasible;
    scratch.totals.clear();
    scratch.totals.resize(feasible.len(), 0);
    for (place, weight) in &profile.score {
        let plugin = profile.plugin(*place);
        let state: State = if profile.pre_score.contains(place) {
            match plugin.pre_score(pod, snapshot, feasible) {
                PreScore::Skip => continue,
                PreScore::Proceed(state) => state,
            }
        } else {
            Box::new(())
        };
        scratch.scores.clear();
        scratch.scores.extend(feasible.iter().map(|node| plugin.score(&state, pod, snapshot, *node)));
        plugin.normalize(&state, &mut scratch.scores);
        for (total, score) in scratch.totals.iter_mut().zip(&scratch.scores) {
            debug_assert!((0..=MAX_NODE_SCORE).contains(score), "{}: score {score}", plugin.name());
            *total += score * weight;
        }
    }
}

/// One of the nodes with the highest total, by lot. As `selectHost`.
fn choose(feasible: &[NodeId], totals: &[i64], rng: &mut impl Rng) -> NodeId {
    let mut best = (feasible[0], totals[0]);
    let mut alike = 1;
    for (node, total) in feasible.iter().zip(totals).skip(1) {
        if *total > best.1 {
            (best, alike) = ((*node, *total), 1);
        } else if *total == best.1 {
            alike += 1;
            if rng.random_range(0..alike) == 0 {
                best = (*node, *total);
            }
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cluster, node, pending, placed, pod, seeded};

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
        assert_eq!(error.message, "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint(s).");
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
            "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match Pod's node affinity/selector."
        );
        assert!(decide_now(&mut snapshot, named("n9").build()).is_err());
    }

    #[test]
    fn replicas_of_a_service_go_to_different_hosts() {
        let mut snapshot =
            cluster(["a", "b", "c"].map(|name| node(name).label("kubernetes.io/hostname", name).build()));
        snapshot.workloads.set_service("default", "web", Some(&[("app".to_owned(), "web".to_owned())].into()));
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
