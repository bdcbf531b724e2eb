//! InterPodAffinity: pods that want to be near others, or far from them, and those whom others do not want near.
//!
//! Pods are counted by domain once per decision: whom the pod's terms select, and whom the terms of placed pods reach.
//! A node is then judged by its domains alone.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;

use super::{BadArguments, arguments};
use crate::cache::{AffinityTerm, NO_DOMAIN, NodeId, PendingPod, PodFacts, Snapshot};
use crate::config::Faults;
use crate::framework::{
    Event, EventSet, MAX_NODE_SCORE, Plugin, Points, PreFilter, PreScore, State, Verdict, state_of,
};

pub struct InterPodAffinity {
    /// How much a placed pod's required affinity for this one counts.
    hard_pod_affinity_weight: i64,
    ignore_preferred_terms_of_existing_pods: bool,
}

/// `InterPodAffinityArgs`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Arguments {
    hard_pod_affinity_weight: i64,
    ignore_preferred_terms_of_existing_pods: bool,
}

impl Default for Arguments {
    fn default() -> Self {
        Arguments { hard_pod_affinity_weight: 1, ignore_preferred_terms_of_existing_pods: false }
    }
}

impl InterPodAffinity {
    /// With the arguments of a profile.
    pub fn new(value: Option<&Value>) -> Result<InterPodAffinity, BadArguments> {
        let arguments: Arguments = arguments(value)?;
        if !(0..=100).contains(&arguments.hard_pod_affinity_weight) {
            let weight = arguments.hard_pod_affinity_weight;
            let mut faults = Faults::default();
            faults.invalid("hardPodAffinityWeight", weight, "not in valid range [0, 100]");
            return Err(faults.into());
        }
        Ok(InterPodAffinity {
            hard_pod_affinity_weight: arguments.hard_pod_affinity_weight,
            ignore_preferred_terms_of_existing_pods: arguments.ignore_preferred_terms_of_existing_pods,
        })
    }
}

/// Numbers by topology key and domain.
#[derive(Debug, Default)]
struct ByDomain(Vec<Numbers>);

/// One key's: the domain of every node, and the number of every domain.
#[derive(Debug)]
struct Numbers {
    key: String,
    domains: Box<[u32]>,
    of_domain: Vec<i64>,
}

impl Numbers {
    fn at(&self, node: NodeId) -> i64 {
        let domain = self.domains[node.index()];
        if domain == NO_DOMAIN { 0 } else { self.of_domain[domain as usize] }
    }
}

impl ByDomain {
    fn add(&mut self, snapshot: &Snapshot, key: &str, node: NodeId, amount: i64) {
        let place = self.0.iter().position(|numbers| numbers.key == key).or_else(|| {
            let column = snapshot.nodes.topology.column(key)?;
            let (domains, of_domain) = (column.domains().into(), vec![0; column.bound()]);
            self.0.push(Numbers { key: key.to_owned(), domains, of_domain });
            Some(self.0.len() - 1)
        });
        let Some(numbers) = place.map(|place| &mut self.0[place]) else { return };
        let domain = numbers.domains[node.index()];
        if domain != NO_DOMAIN {
            numbers.of_domain[domain as usize] += amount;
        }
    }

    fn at(&self, key: &str, node: NodeId) -> i64 {
        self.0.iter().find(|numbers| numbers.key == key).map_or(0, |numbers| numbers.at(node))
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|numbers| numbers.of_domain.iter().all(|number| *number == 0))
    }
}

fn domain(snapshot: &Snapshot, key: &str, node: NodeId) -> u32 {
    snapshot.nodes.topology.column(key).map_or(NO_DOMAIN, |column| column.domain(node))
}

fn selects(term: &AffinityTerm, pod: &PendingPod, snapshot: &Snapshot) -> bool {
    term.covers(&pod.facts.key.namespace, &snapshot.namespaces) && term.selects(&pod.facts.labels)
}

/// What Filter reads.
#[derive(Debug, Default)]
struct Counts {
    /// Placed pods that do not want this one in their domain.
    shunned: ByDomain,
    /// Pods that all of the pod's affinity terms select.
    wanted: ByDomain,
    /// Pods that one of its anti-affinity terms selects.
    unwanted: ByDomain,
    /// Whether the pod is of the kind that it wants: the first of them may go anywhere.
    wants_its_like: bool,
}

const AFFINITY_REASON: u64 = 1;
const ANTI_AFFINITY_REASON: u64 = 1 << 1;
const EXISTING_REASON: u64 = 1 << 2;

impl Plugin for InterPodAffinity {
    fn name(&self) -> &'static str {
        "InterPodAffinity"
    }

    fn points(&self) -> Points {
        Points::PRE_FILTER.and(Points::FILTER).and(Points::PRE_SCORE).and(Points::SCORE)
    }

    fn events(&self) -> EventSet {
        EventSet::NODE_ADD
            .and(EventSet::NODE_LABEL)
            .and(EventSet::POD_PLACED)
            .and(EventSet::POD_REMOVED)
            .and(EventSet::POD_LABEL)
            .and(EventSet::OWN_LABELS)
    }

    fn is_local(&self) -> bool {
        false
    }

    /// A pod helps by coming if it is wanted, and by going if it was unwanted or did not want this one.
    fn hint(&self, pod: &PendingPod, snapshot: &Snapshot, event: &Event<'_>) -> bool {
        let Some(other) = event.pod.filter(|_| !event.kinds.intersects(EventSet::POD_LABEL)) else { return true };
        let meets = |term: &AffinityTerm, pod: &PodFacts| {
            term.covers(&pod.key.namespace, &snapshot.namespaces) && term.selects(&pod.labels)
        };
        let own = pod
            .facts
            .affinity
            .as_deref()
            .is_some_and(|own| own.required.iter().chain(&own.required_anti).any(|term| meets(term, other)));
        own || other
            .affinity
            .as_deref()
            .is_some_and(|theirs| theirs.required_anti.iter().any(|term| meets(term, &pod.facts)))
    }

    fn account(
        &self,
        state: &mut State,
        pod: &PendingPod,
        snapshot: &Snapshot,
        other: &PodFacts,
        node: NodeId,
        sign: i64,
    ) {
        let Some(counts) = state.downcast_mut::<Counts>() else { return };
        let meets = |term: &AffinityTerm, pod: &PodFacts| {
            term.covers(&pod.key.namespace, &snapshot.namespaces) && term.selects(&pod.labels)
        };
        for term in other.affinity.iter().flat_map(|theirs| &theirs.required_anti) {
            if meets(term, &pod.facts) {
                counts.shunned.add(snapshot, &term.topology_key, node, sign);
            }
        }
        let Some(own) = pod.facts.affinity.as_deref() else { return };
        if !own.required.is_empty() && own.required.iter().all(|term| meets(term, other)) {
            for term in &own.required {
                counts.wanted.add(snapshot, &term.topology_key, node, sign);
            }
        }
        for term in own.required_anti.iter().filter(|term| meets(term, other)) {
            counts.unwanted.add(snapshot, &term.topology_key, node, sign);
        }
    }

    fn pre_filter(&self, pod: &PendingPod, snapshot: &Snapshot) -> PreFilter {
        let mut counts = Counts::default();
        for (affinity, per_node) in snapshot.with_affinity() {
            for term in affinity.required_anti.iter().filter(|term| selects(term, pod, snapshot)) {
                for (node, count) in per_node {
                    counts.shunned.add(snapshot, &term.topology_key, *node, i64::from(*count));
                }
            }
        }
        let own = pod.facts.affinity.as_deref();
        let own = own.filter(|own| !own.required.is_empty() || !own.required_anti.is_empty());
        let Some(own) = own else {
            return if counts.shunned.is_empty() { PreFilter::Skip } else { PreFilter::Proceed(Box::new(counts)) };
        };
        counts.wants_its_like = own.required.iter().all(|term| selects(term, pod, snapshot));
        for (namespace, groups) in snapshot.groups.namespaces() {
            let covered = |term: &&AffinityTerm| term.covers(namespace, &snapshot.namespaces);
            let all_covered = !own.required.is_empty() && own.required.iter().all(|term| covered(&term));
            let anti: Vec<&AffinityTerm> = own.required_anti.iter().filter(covered).collect();
            if !all_covered && anti.is_empty() {
                continue;
            }
            for (labels, per_node) in groups {
                let wanted = all_covered && own.required.iter().all(|term| term.selects(labels));
                for (node, count) in per_node {
                    let count = i64::from(count.all);
                    for term in own.required.iter().filter(|_| wanted) {
                        counts.wanted.add(snapshot, &term.topology_key, *node, count);
                    }
                    for term in anti.iter().filter(|term| term.selects(labels)) {
                        counts.unwanted.add(snapshot, &term.topology_key, *node, count);
                    }
                }
            }
        }
        PreFilter::Proceed(Box::new(counts))
    }

    fn filter(&self, state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        let counts: &Counts = state_of(state);
        if let Some(own) = pod.facts.affinity.as_deref() {
            let has_domains = own.required.iter().all(|term| domain(snapshot, &term.topology_key, node) != NO_DOMAIN);
            let in_company = own.required.iter().all(|term| counts.wanted.at(&term.topology_key, node) > 0);
            if !has_domains || !(in_company || (counts.wants_its_like && counts.wanted.is_empty())) {
                return Verdict::unresolvable(AFFINITY_REASON);
            }
            if own.required_anti.iter().any(|term| counts.unwanted.at(&term.topology_key, node) > 0) {
                return Verdict::unschedulable(ANTI_AFFINITY_REASON);
            }
        }
        let shunned = counts.shunned.0.iter().any(|numbers| numbers.at(node) > 0);
        if shunned { Verdict::unschedulable(EXISTING_REASON) } else { Verdict::Accept }
    }

    fn reason(&self, _state: &State, number: u32) -> Cow<'static, str> {
        Cow::Borrowed(match 1 << number {
            AFFINITY_REASON => "node(s) didn't match pod affinity rules",
            ANTI_AFFINITY_REASON => "node(s) didn't match pod anti-affinity rules",
            _ => "node(s) didn't satisfy existing pods anti-affinity rules",
        })
    }

    /// The weight of every domain.
    fn pre_score(&self, pod: &PendingPod, snapshot: &Snapshot, _feasible: &[NodeId]) -> PreScore {
        let mut weights = ByDomain::default();
        let own: &[(i64, AffinityTerm)] = pod.facts.affinity.as_deref().map_or(&[], |affinity| &affinity.preferred);
        if !own.is_empty() {
            for (namespace, groups) in snapshot.groups.namespaces() {
                for (weight, term) in own.iter().filter(|(_, term)| term.covers(namespace, &snapshot.namespaces)) {
                    for (_, per_node) in groups.iter().filter(|(labels, _)| term.selects(labels)) {
                        for (node, count) in per_node {
                            weights.add(snapshot, &term.topology_key, *node, weight * i64::from(count.all));
                        }
                    }
                }
            }
        }
        if !self.ignore_preferred_terms_of_existing_pods || !own.is_empty() {
            for (affinity, per_node) in snapshot.with_affinity() {
                let required = affinity.required.iter().map(|term| (self.hard_pod_affinity_weight, term));
                let preferred = affinity.preferred.iter().map(|(weight, term)| (*weight, term));
                for (weight, term) in required.chain(preferred).filter(|(_, term)| selects(term, pod, snapshot)) {
                    for (node, count) in per_node {
                        weights.add(snapshot, &term.topology_key, *node, weight * i64::from(*count));
                    }
                }
            }
        }
        if weights.0.is_empty() { PreScore::Skip } else { PreScore::Proceed(Box::new(weights)) }
    }

    fn score(&self, state: &State, _pod: &PendingPod, _snapshot: &Snapshot, node: NodeId) -> i64 {
        let weights: &ByDomain = state_of(state);
        weights.0.iter().map(|numbers| numbers.at(node)).sum()
    }

    fn normalize(&self, _state: &State, scores: &mut [i64]) {
        let lowest = scores.iter().copied().min().unwrap_or(0);
        let highest = scores.iter().copied().max().unwrap_or(0);
        for score in scores {
            *score = match highest - lowest {
                0 => 0,
                range => MAX_NODE_SCORE * (*score - lowest) / range,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cache::{HOSTNAME_KEY, ZONE_KEY};
    use crate::testing::{PodBuilder, accepts, cluster, explain, node, pending, placed, pod, scores};

    fn plugin() -> InterPodAffinity {
        InterPodAffinity::new(None).expect("arguments")
    }

    /// Nodes a and b in zone z1, c in z2, d without a zone.
    fn zones() -> Snapshot {
        cluster([
            node("a").label(HOSTNAME_KEY, "a").label(ZONE_KEY, "z1").build(),
            node("b").label(HOSTNAME_KEY, "b").label(ZONE_KEY, "z1").build(),
            node("c").label(HOSTNAME_KEY, "c").label(ZONE_KEY, "z2").build(),
            node("d").label(HOSTNAME_KEY, "d").build(),
        ])
    }

    fn term(app: &str, key: &str) -> Value {
        json!({"labelSelector": {"matchLabels": {"app": app}}, "topologyKey": key})
    }

    fn required(name: &str, field: &str, term: Value) -> PodBuilder {
        pod(name).spec(json!({"affinity": {field: {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}}))
    }

    fn accepted(pod: PodBuilder, snapshot: &mut Snapshot) -> Vec<bool> {
        let pod = pod.build();
        snapshot.prepare_for(&pending(pod.clone()));
        accepts(&plugin(), &pod, snapshot)
    }

    #[test]
    fn affinity_wants_company_in_the_domain() {
        let mut snapshot = zones();
        placed(&mut snapshot, pod("db").label("app", "db").on("a").build());
        let near = |key: &str| required("p", "podAffinity", term("db", key));
        assert_eq!(accepted(near(ZONE_KEY), &mut snapshot), [true, true, false, false]);
        assert_eq!(accepted(near(HOSTNAME_KEY), &mut snapshot), [true, false, false, false]);
        let elsewhere = near(ZONE_KEY).namespace("other");
        assert_eq!(accepted(elsewhere, &mut snapshot), [false; 4]);
        let pod = near(ZONE_KEY).build();
        assert_eq!(explain(&plugin(), &pod, &snapshot, "c"), ["node(s) didn't match pod affinity rules"]);
    }

    #[test]
    fn the_first_of_its_like_may_go_anywhere() {
        let mut snapshot = zones();
        let first = required("p", "podAffinity", term("web", ZONE_KEY));
        assert_eq!(accepted(first.clone().label("app", "web"), &mut snapshot), [true, true, true, false]);
        assert_eq!(accepted(first, &mut snapshot), [false; 4]);
    }

    #[test]
    fn anti_affinity_holds_both_ways() {
        let mut snapshot = zones();
        placed(
            &mut snapshot,
            required("loner", "podAntiAffinity", term("web", ZONE_KEY)).label("app", "db").on("a").build(),
        );
        // The placed pod does not want web in its zone.
        assert_eq!(accepted(pod("p").label("app", "web"), &mut snapshot), [false, false, true, true]);
        let web = pod("p").label("app", "web").build();
        assert_eq!(
            explain(&plugin(), &web, &snapshot, "b"),
            ["node(s) didn't satisfy existing pods anti-affinity rules"]
        );
        // And this one does not want db on its host.
        let shy = required("p", "podAntiAffinity", term("db", HOSTNAME_KEY));
        assert_eq!(accepted(shy, &mut snapshot), [false, true, true, true]);
        snapshot.remove_pod("uid-loner");
        assert_eq!(accepted(pod("p").label("app", "web"), &mut snapshot), [true; 4]);
    }

    #[test]
    fn terms_select_namespaces_by_name_or_label() {
        let mut snapshot = zones();
        snapshot.namespaces.insert("data".to_owned(), [("tier".to_owned(), "db".to_owned())].into());
        placed(&mut snapshot, pod("db").label("app", "db").namespace("data").on("c").build());
        let with = |more: Value| {
            let mut term = term("db", ZONE_KEY);
            term.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
            required("p", "podAffinity", term)
        };
        let c_only = [false, false, true, false];
        assert_eq!(accepted(with(json!({"namespaces": ["data"]})), &mut snapshot), c_only);
        let by_label = json!({"namespaceSelector": {"matchLabels": {"tier": "db"}}});
        assert_eq!(accepted(with(by_label), &mut snapshot), c_only);
        assert_eq!(accepted(with(json!({"namespaceSelector": {}})), &mut snapshot), c_only);
        assert_eq!(accepted(with(json!({"namespaces": ["other"]})), &mut snapshot), [false; 4]);
    }

    #[test]
    fn preferences_move_scores() {
        let mut snapshot = zones();
        placed(&mut snapshot, pod("db").label("app", "db").on("a").build());
        let prefer = |field: &str| {
            let preferred = json!([{"weight": 10, "podAffinityTerm": term("db", ZONE_KEY)}]);
            pod("p")
                .spec(json!({"affinity": {field: {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}}))
                .build()
        };
        assert_eq!(scores(&plugin(), &prefer("podAffinity"), &snapshot), [100, 100, 0, 0]);
        assert_eq!(scores(&plugin(), &prefer("podAntiAffinity"), &snapshot), [0, 0, 100, 100]);
        assert_eq!(scores(&plugin(), &pod("q").build(), &snapshot), [0; 4]);
    }
}
