//! DefaultPreemption: makes room for a pod by removing pods of lower priority from a node.
//!
//! For each node that could be made to fit, all lower pods are supposed gone; if the pod fits then, they are put back one by
//! one, the most important first, as long as it still fits. What does not come back are the node's victims. Of the nodes the
//! one is taken that costs least: disruption budgets first, then the priority, number and age of the victims.

use std::cmp::Reverse;

use rand::{Rng, RngExt};
use serde::Deserialize;
use serde_json::Value;

use super::{BadArguments, arguments};
use crate::cache::{NodeId, PendingPod, PodFacts, Snapshot};
use crate::config::Faults;
use crate::framework::{Candidate, Cycle, Diagnosis, EventSet, Nomination, Plugin, Points, PostFilter, Refusal};

const NOT_HELPFUL: &str = "Preemption is not helpful for scheduling";
const NO_VICTIMS: &str = "No preemption victims found for incoming pod";

pub struct DefaultPreemption {
    min_candidate_nodes_percentage: usize,
    min_candidate_nodes_absolute: usize,
}

/// `DefaultPreemptionArgs`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Arguments {
    min_candidate_nodes_percentage: i64,
    min_candidate_nodes_absolute: i64,
}

impl Default for Arguments {
    fn default() -> Self {
        Arguments { min_candidate_nodes_percentage: 10, min_candidate_nodes_absolute: 100 }
    }
}

impl DefaultPreemption {
    /// With the arguments of a profile.
    pub fn new(value: Option<&Value>) -> Result<DefaultPreemption, BadArguments> {
        let Arguments { min_candidate_nodes_percentage: percentage, min_candidate_nodes_absolute: absolute } =
            arguments(value)?;
        const FIELDS: [&str; 2] = ["minCandidateNodesPercentage", "minCandidateNodesAbsolute"];
        let mut faults = Faults::default();
        if !(0..=100).contains(&percentage) {
            faults.invalid(FIELDS[0], percentage, "not in valid range [0, 100]");
        }
        if absolute < 0 {
            faults.invalid(FIELDS[1], absolute, "not in valid range [0, inf)");
        }
        if percentage == 0 && absolute == 0 {
            for (field, other) in [(FIELDS[0], FIELDS[1]), (FIELDS[1], FIELDS[0])] {
                faults.invalid(field, 0, &format!("cannot be zero at the same time as {other}"));
            }
        }
        faults.check()?;
        Ok(DefaultPreemption {
            min_candidate_nodes_percentage: percentage as usize,
            min_candidate_nodes_absolute: absolute as usize,
        })
    }

    /// How many candidates are enough. As `calculateNumCandidates`.
    fn enough(&self, nodes: usize) -> usize {
        (nodes * self.min_candidate_nodes_percentage / 100).max(self.min_candidate_nodes_absolute).min(nodes)
    }
}

/// A node that can be made to fit.
#[derive(Debug)]
struct Found {
    node: NodeId,
    /// The most important first.
    victims: Vec<PodFacts>,
    violations: usize,
}

/// Why a node cannot.
enum Hopeless {
    NoVictims,
    Refused(u8, Refusal),
}

/// As `MoreImportantPod`: by priority, then by how long it runs.
fn importance(pod: &PodFacts) -> (Reverse<i32>, i64) {
    (Reverse(pod.priority), pod.started_us)
}

/// Why the pod may not preempt now. As `PodEligibleToPreemptOthers`.
fn ineligible(pod: &PendingPod, snapshot: &Snapshot, diagnosis: &Diagnosis) -> Option<&'static str> {
    if pod.spec().and_then(|spec| spec.preemption_policy.as_deref()) == Some("Never") {
        return Some("not eligible due to preemptionPolicy=Never.");
    }
    let node = snapshot.nodes.find(snapshot.nominated_node(&pod.facts.uid)?)?;
    let hopeless = diagnosis.refused.iter().any(|(refused, _, refusal)| *refused == node && !refusal.resolvable);
    let waits = snapshot.pods_on(node).any(|other| other.preempted && other.priority < pod.facts.priority);
    (!hopeless && waits).then_some("not eligible due to a terminating pod on the nominated node.")
}

/// The victims on a node. As `SelectVictimsOnNode`.
fn select_victims(cycle: &mut Cycle<'_>, snapshot: &mut Snapshot, node: NodeId) -> Result<Found, Hopeless> {
    let priority = cycle.pod.facts.priority;
    let mut lower: Vec<PodFacts> = snapshot.pods_on(node).filter(|other| other.priority < priority).cloned().collect();
    if lower.is_empty() {
        return Err(Hopeless::NoVictims);
    }
    lower.iter().for_each(|other| cycle.suppose(snapshot, other, node, -1));
    if let Err((place, refusal)) = cycle.filter(snapshot, node) {
        lower.iter().for_each(|other| cycle.suppose(snapshot, other, node, 1));
        return Err(Hopeless::Refused(place, refusal));
    }
    lower.sort_by_key(importance);
    let (violating, others) = snapshot.budgets.split(lower);
    let (mut victims, mut violations) = (Vec::new(), 0);
    let protected = violating.len();
    for (index, other) in violating.into_iter().chain(others).enumerate() {
        cycle.suppose(snapshot, &other, node, 1);
        if cycle.filter(snapshot, node).is_err() {
            cycle.suppose(snapshot, &other, node, -1);
            violations += usize::from(index < protected);
            victims.push(other);
        }
    }
    victims.iter().for_each(|victim| cycle.suppose(snapshot, victim, node, 1));
    victims.sort_by_key(importance);
    if victims.is_empty() { Err(Hopeless::NoVictims) } else { Ok(Found { node, victims, violations }) }
}

/// What a node with these victims costs; the least is taken. As `pickOneNodeForPreemption`.
pub fn cost(victims: &[&PodFacts], violations: usize) -> (usize, i32, i64, usize, Reverse<i64>) {
    let highest = victims.iter().map(|victim| victim.priority).max().unwrap_or(i32::MIN);
    let sum = victims.iter().map(|victim| i64::from(victim.priority) + i64::from(i32::MAX) + 1).sum();
    let oldest = victims.iter().filter(|victim| victim.priority == highest);
    let started = oldest.map(|victim| victim.started_us).min().unwrap_or(i64::MAX);
    (violations, highest, sum, victims.len(), Reverse(started))
}

impl Plugin for DefaultPreemption {
    fn name(&self) -> &'static str {
        "DefaultPreemption"
    }

    fn points(&self) -> Points {
        Points::POST_FILTER
    }

    fn events(&self) -> EventSet {
        EventSet::NONE
    }

    fn post_filter(
        &self,
        cycle: &mut Cycle<'_>,
        snapshot: &mut Snapshot,
        diagnosis: &Diagnosis,
        rng: &mut dyn Rng,
    ) -> PostFilter {
        let says = |words: &str, nomination| PostFilter {
            words: Some(format!("preemption: {words}")),
            nomination,
            ..PostFilter::default()
        };
        if let Some(words) = ineligible(cycle.pod, snapshot, diagnosis) {
            return says(words, Nomination::Keep);
        }
        let mut hopeful: Vec<NodeId> =
            diagnosis.refused.iter().filter(|(_, _, refusal)| refusal.resolvable).map(|(node, ..)| *node).collect();
        if !hopeful.is_empty() {
            let offset = rng.random_range(0..hopeful.len());
            hopeful.rotate_left(offset);
        }
        let enough = self.enough(hopeful.len());
        let mut candidates: Vec<Found> = Vec::new();
        let mut failed = Diagnosis { nodes: diagnosis.nodes, ..Diagnosis::default() };
        let (mut without, mut harmless) = (0, false);
        for node in &hopeful {
            match select_victims(cycle, snapshot, *node) {
                Ok(candidate) => {
                    harmless |= candidate.violations == 0;
                    candidates.push(candidate);
                    if harmless && candidates.len() >= enough {
                        break;
                    }
                }
                Err(Hopeless::NoVictims) => without += 1,
                Err(Hopeless::Refused(place, refusal)) => failed.refused.push((*node, place, refusal)),
            }
        }
        let cost = |found: &&Found| cost(&found.victims.iter().collect::<Vec<_>>(), found.violations);
        let Some(best) = candidates.iter().min_by_key(cost) else {
            let unhelpful = diagnosis.nodes - without - failed.refused.len();
            failed.others = vec![(without, NO_VICTIMS.to_owned()), (unhelpful, NOT_HELPFUL.to_owned())];
            return says(&failed.message(cycle.profile, &cycle.states), Nomination::Clear);
        };
        let candidate = |found: &Found| Candidate {
            node: snapshot.nodes.name[found.node.index()].clone(),
            victims: found.victims.iter().map(|victim| victim.uid.clone()).collect(),
            violations: found.violations,
        };
        let Candidate { node, victims, .. } = candidate(best);
        PostFilter {
            nomination: Nomination::To { node, victims },
            candidates: candidates.iter().map(candidate).collect(),
            ..PostFilter::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    use super::*;
    use crate::decide::{Scratch, decide};
    use crate::framework::{FitError, Profile};
    use crate::testing::{PodBuilder, cluster, node, pending, placed, pod, seeded};

    fn refused(snapshot: &mut Snapshot, pod: Pod) -> FitError {
        let profile = Profile::default_profile().expect("default profile");
        let pod = pending(pod);
        snapshot.prepare_for(&pod);
        decide(&profile, snapshot, &pod, &mut Scratch::default(), &mut seeded(1)).expect_err("no node")
    }

    fn cpu(name: &str, amount: &str, priority: i32) -> PodBuilder {
        pod(name).requests(&[("cpu", amount)]).priority(priority)
    }

    fn chosen(error: &FitError) -> Option<(String, Vec<String>)> {
        match &error.nomination {
            Nomination::To { node, victims } => {
                Some((node.to_string(), victims.iter().map(|uid| uid.trim_start_matches("uid-").to_owned()).collect()))
            }
            _ => None,
        }
    }

    fn expected(node: &str, victims: &[&str]) -> Option<(String, Vec<String>)> {
        Some((node.to_owned(), victims.iter().map(|name| (*name).to_owned()).collect()))
    }

    #[test]
    fn as_few_and_as_unimportant_pods_as_possible_are_taken() {
        let mut snapshot = cluster([node("a").build(), node("b").build()]);
        for (name, amount, priority, on) in
            [("a1", "2", 1, "a"), ("a2", "1", 2, "a"), ("a3", "1", 3, "a"), ("b1", "4", 5, "b")]
        {
            placed(&mut snapshot, cpu(name, amount, priority).on(on).build());
        }
        let before = snapshot.nodes.requested.cpu_milli.clone();
        let taken = |snapshot: &mut Snapshot, amount: &str| chosen(&refused(snapshot, cpu("p", amount, 10).build()));
        assert_eq!(taken(&mut snapshot, "2"), expected("a", &["a1"]));
        assert_eq!(taken(&mut snapshot, "3"), expected("a", &["a2", "a1"]));
        assert_eq!(taken(&mut snapshot, "4"), expected("a", &["a3", "a2", "a1"]));
        assert_eq!(snapshot.nodes.requested.cpu_milli, before, "all suppositions are taken back");
    }

    #[test]
    fn the_words_say_why_it_does_not_help() {
        let mut snapshot = cluster([
            node("a").build(),
            node("b").build(),
            node("c").taint("t", "", "NoSchedule").build(),
            node("d").allocatable("1", "1Gi", 10).build(),
        ]);
        placed(&mut snapshot, cpu("a1", "4", 100).on("a").build());
        placed(&mut snapshot, cpu("b1", "2", 100).on("b").build());
        placed(&mut snapshot, cpu("b2", "1", 0).on("b").build());
        let error = refused(&mut snapshot, cpu("p", "3", 10).build());
        assert_eq!(error.nomination, Nomination::Clear);
        assert_eq!(
            error.message,
            "0/4 nodes are available: 1 node(s) had untolerated taint(s), 3 Insufficient cpu. no new claims to \
             deallocate, preemption: 0/4 nodes are available: 1 Insufficient cpu, 1 No preemption victims found for \
             incoming pod, 2 Preemption is not helpful for scheduling."
        );
        let never = cpu("p", "3", 200).spec(json!({"preemptionPolicy": "Never"})).build();
        let message = refused(&mut snapshot, never).message;
        assert!(message.ends_with("preemption: not eligible due to preemptionPolicy=Never."), "{message}");
    }

    #[test]
    fn budgets_are_spared_if_there_is_another_way() {
        let mut snapshot = cluster([node("a").build(), node("b").build()]);
        placed(&mut snapshot, cpu("a1", "4", 1).label("app", "db").on("a").build());
        placed(&mut snapshot, cpu("b1", "4", 5).on("b").build());
        let budget = json!({"metadata": {"name": "db", "namespace": "default"},
            "spec": {"selector": {"matchLabels": {"app": "db"}}},
            "status": {"disruptionsAllowed": 0, "currentHealthy": 1, "desiredHealthy": 1, "expectedPods": 1}});
        snapshot.budgets.set(&serde_json::from_value(budget).expect("a budget"));
        assert_eq!(chosen(&refused(&mut snapshot, cpu("p", "4", 10).build())), expected("b", &["b1"]));
        // Without one, the budget does not hold it up.
        snapshot.remove_pod("uid-b1");
        placed(&mut snapshot, cpu("b2", "4", 50).on("b").build());
        assert_eq!(chosen(&refused(&mut snapshot, cpu("p", "4", 10).build())), expected("a", &["a1"]));
    }

    #[test]
    fn the_youngest_victims_are_taken_of_like_ones() {
        let mut snapshot = cluster([node("a").build(), node("b").build()]);
        for (name, started) in [("a", "2026-01-01T00:00:00Z"), ("b", "2026-01-02T00:00:00Z")] {
            let mut victim = cpu(&format!("{name}1"), "4", 1).on(name).build();
            victim.status.get_or_insert_default().start_time = serde_json::from_value(json!(started)).expect("a time");
            placed(&mut snapshot, victim);
        }
        assert_eq!(chosen(&refused(&mut snapshot, cpu("p", "4", 10).build())), expected("b", &["b1"]));
    }

    #[test]
    fn anti_affinity_is_overcome_by_removing_its_cause() {
        let mut snapshot = cluster([node("a").label("kubernetes.io/hostname", "a").build()]);
        placed(&mut snapshot, pod("shunned").label("app", "x").priority(1).on("a").build());
        let lonely = pod("p").priority(5).spec(json!({"affinity": {"podAntiAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"labelSelector": {"matchLabels": {"app": "x"}}, "topologyKey": "kubernetes.io/hostname"}]}}}));
        assert_eq!(chosen(&refused(&mut snapshot, lonely.build())), expected("a", &["shunned"]));
    }

    #[test]
    fn a_pod_waits_for_its_victims_to_end() {
        let mut snapshot = cluster([node("a").build()]);
        let mut victim = cpu("v", "4", 1).on("a").terminating().build();
        victim.status.get_or_insert_default().conditions = serde_json::from_value(json!([
            {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]))
        .expect("conditions");
        placed(&mut snapshot, victim);
        let preemptor = pending(cpu("p", "4", 10).build());
        snapshot.nominate(&preemptor.facts, Some("a"));
        let message = refused(&mut snapshot, cpu("p", "4", 10).build()).message;
        assert!(message.ends_with("not eligible due to a terminating pod on the nominated node."), "{message}");
    }

    #[test]
    fn a_nominated_pod_keeps_its_place() {
        let mut snapshot = cluster([node("a").build()]);
        let first = pending(cpu("first", "3", 10).build());
        snapshot.nominate(&first.facts, Some("a"));
        let profile = Profile::default_profile().expect("default profile");
        let mut fits = |name: &str, priority: i32| {
            let pod = pending(cpu(name, "2", priority).build());
            decide(&profile, &mut snapshot, &pod, &mut Scratch::default(), &mut seeded(1)).is_ok()
        };
        assert!(!fits("lower", 5));
        assert!(!fits("alike", 10));
        assert!(fits("higher", 11));
    }
}
