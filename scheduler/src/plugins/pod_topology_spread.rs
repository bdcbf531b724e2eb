//! PodTopologySpread: spreads like pods over topology domains (hosts, zones, whatever nodes are labelled with).
//!
//! `DoNotSchedule` constraints refuse nodes, `ScheduleAnyway` ones lower scores. A pod without constraints gets the
//! system's: softly over hosts and zones, for the pods that its Services and its controller select; that is what puts the
//! replicas of a Deployment on different hosts.

use std::borrow::Cow;
use std::collections::BTreeMap;

use apimachinery::labels::{Operator, Requirement, Selector};
use k8s_openapi::api::core::v1::TopologySpreadConstraint;
use serde::Deserialize;
use serde_json::{Value, json};

use super::taint_toleration::tolerates_node;
use super::{BadArguments, arguments};
use crate::cache::{Column, ControllerKind, HOSTNAME_KEY, NO_DOMAIN, NodeId, PendingPod, PodFacts, Snapshot, ZONE_KEY};
use crate::config::Faults;
use crate::framework::{
    Event, EventSet, MAX_NODE_SCORE, Plugin, Points, PreFilter, PreScore, State, Verdict, state_of,
};
use apimachinery::node::RequiredNodeAffinity;
use apimachinery::status::FieldError;

#[derive(Default)]
pub struct PodTopologySpread {
    defaults: Defaults,
}

/// The constraints of pods that have none.
#[derive(Default)]
enum Defaults {
    #[default]
    System,
    List(Vec<TopologySpreadConstraint>),
}

/// `PodTopologySpreadArgs`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Arguments {
    default_constraints: Vec<TopologySpreadConstraint>,
    defaulting_type: String,
}

impl PodTopologySpread {
    /// With the arguments of a profile.
    pub fn new(value: Option<&Value>) -> Result<PodTopologySpread, BadArguments> {
        let Arguments { defaulting_type, default_constraints: list } = arguments(value)?;
        let mut faults = Faults::default();
        match defaulting_type.as_str() {
            "" | "System" if !list.is_empty() => {
                faults.invalid("defaultingType", "System", "when .defaultConstraints are not empty");
            }
            "" | "System" | "List" => {}
            other => faults.add(FieldError::not_supported("defaultingType", other, &["System", "List"])),
        }
        list.iter().enumerate().for_each(|(at, one)| check_default(&mut faults, one, &list[..at]));
        faults.check()?;
        let defaults = if defaulting_type == "List" { Defaults::List(list) } else { Defaults::System };
        Ok(PodTopologySpread { defaults })
    }

    /// The constraints that hold for the pod with the given action, and whether they are the system's.
    fn constraints(&self, pod: &PendingPod, snapshot: &Snapshot, action: &str) -> (Vec<Constraint>, bool) {
        let own = pod.spec().and_then(|spec| spec.topology_spread_constraints.as_deref()).unwrap_or_default();
        if !own.is_empty() {
            let wanted = own.iter().filter(|constraint| constraint.when_unsatisfiable == action);
            return (wanted.map(|constraint| Constraint::own(constraint, &pod.facts.labels)).collect(), false);
        }
        let system = matches!(self.defaults, Defaults::System);
        let skeletons: Vec<Constraint> = match &self.defaults {
            Defaults::System if action == "ScheduleAnyway" => {
                vec![Constraint::soft(HOSTNAME_KEY, 3), Constraint::soft(ZONE_KEY, 5)]
            }
            Defaults::System => Vec::new(),
            Defaults::List(list) => list
                .iter()
                .filter(|constraint| constraint.when_unsatisfiable == action)
                .map(|constraint| Constraint::own(constraint, &pod.facts.labels))
                .collect(),
        };
        if skeletons.is_empty() {
            return (skeletons, system);
        }
        let owner = apimachinery::pod::controller_of(&pod.pod.metadata);
        let controller =
            owner.and_then(|owner| Some((ControllerKind::of(&owner.api_version, &owner.kind)?, owner.name.as_str())));
        let selector = snapshot.workloads.default_selector(&pod.facts.key.namespace, &pod.facts.labels, controller);
        let Some(selector) = selector else { return (Vec::new(), system) };
        let with_selector = |constraint| Constraint { selector: selector.clone(), ..constraint };
        (skeletons.into_iter().map(with_selector).collect(), system)
    }
}

/// Checks a default constraint after others. As `ValidatePodTopologySpreadArgs`.
fn check_default(faults: &mut Faults, constraint: &TopologySpreadConstraint, former: &[TopologySpreadConstraint]) {
    const ACTIONS: [&str; 2] = ["DoNotSchedule", "ScheduleAnyway"];
    let (key, action) = (&constraint.topology_key, constraint.when_unsatisfiable.as_str());
    let at = format!("defaultConstraints[{}]", former.len());
    let required = |field: &str| FieldError::required(format!("{at}.{field}"), "can not be empty");
    if constraint.max_skew <= 0 {
        faults.invalid(format!("{at}.maxSkew"), constraint.max_skew, "not in valid range (0, inf)");
    }
    match key.is_empty() {
        true => faults.add(required("topologyKey")),
        false => faults.label_name(&format!("{at}.topologyKey"), key),
    }
    if action.is_empty() {
        faults.add(required("whenUnsatisfiable"));
    } else if !ACTIONS.contains(&action) {
        faults.add(FieldError::not_supported(format!("{at}.whenUnsatisfiable"), action, &ACTIONS));
    }
    if constraint.label_selector.is_some() {
        let why = "constraint must not define a selector, as they deduced for each pod";
        faults.add(FieldError::forbidden(format!("{at}.labelSelector"), why));
    }
    let same = |other: &TopologySpreadConstraint| other.topology_key == *key && other.when_unsatisfiable == action;
    if former.iter().any(same) {
        faults.add(FieldError::duplicate(at.as_str(), format!("{{{key}, {action}}}")));
    }
}

/// A constraint, parsed.
#[derive(Debug, Clone)]
struct Constraint {
    key: String,
    max_skew: i64,
    min_domains: i64,
    selector: Selector,
    honors_affinity: bool,
    honors_taints: bool,
}

impl Constraint {
    fn own(constraint: &TopologySpreadConstraint, labels: &BTreeMap<String, String>) -> Constraint {
        let selector = constraint.label_selector.as_ref();
        let mut selector = selector
            .and_then(|selector| Selector::from_label_selector(selector).ok())
            .unwrap_or_else(Selector::nothing);
        // The pod's own values for matchLabelKeys must match as well.
        let pinned = constraint
            .match_label_keys
            .iter()
            .flatten()
            .filter_map(|key| Requirement::new(key, Operator::In, vec![labels.get(key)?.clone()]).ok());
        let pinned: Vec<_> = pinned.collect();
        if !pinned.is_empty() {
            let all = selector.requirements().iter().cloned().chain(pinned).collect();
            selector = Selector::from_requirements(all);
        }
        Constraint {
            key: constraint.topology_key.clone(),
            max_skew: i64::from(constraint.max_skew),
            min_domains: constraint.min_domains.map_or(1, i64::from),
            selector,
            honors_affinity: constraint.node_affinity_policy.as_deref() != Some("Ignore"),
            honors_taints: constraint.node_taints_policy.as_deref() == Some("Honor"),
        }
    }

    fn soft(key: &str, max_skew: i64) -> Constraint {
        Constraint {
            key: key.to_owned(),
            max_skew,
            min_domains: 1,
            selector: Selector::nothing(),
            honors_affinity: true,
            honors_taints: false,
        }
    }
}

/// Which nodes count for a pod's constraints: those with all topology labels, and that the pod could use at all.
struct Inclusion<'a> {
    pod: &'a PendingPod,
    snapshot: &'a Snapshot,
    affinity: RequiredNodeAffinity,
    columns: Vec<&'a Column>,
}

impl<'a> Inclusion<'a> {
    /// `None` if a key has no column: the caller did not prepare the snapshot for the pod.
    fn new(pod: &'a PendingPod, snapshot: &'a Snapshot, constraints: &[Constraint]) -> Option<Inclusion<'a>> {
        let columns: Option<Vec<_>> =
            constraints.iter().map(|constraint| snapshot.nodes.topology.column(&constraint.key)).collect();
        let affinity = pod.spec().map(RequiredNodeAffinity::of).unwrap_or_default();
        Some(Inclusion { pod, snapshot, affinity, columns: columns? })
    }

    fn has_all_labels(&self, node: NodeId) -> bool {
        self.columns.iter().all(|column| column.domain(node) != NO_DOMAIN)
    }

    /// As `matchNodeInclusionPolicies`.
    fn by_policy(&self, constraint: &Constraint, node: NodeId) -> bool {
        let nodes = &self.snapshot.nodes;
        let index = node.index();
        if constraint.honors_affinity
            && !self.affinity.is_empty()
            && !self.affinity.matches(&nodes.name[index], &nodes.labels[index])
        {
            return false;
        }
        let tolerations = self.pod.spec().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
        !constraint.honors_taints || tolerates_node(tolerations, &nodes.taints[index])
    }

    /// How many pods the constraint selects in each domain, over the nodes for which `included` holds.
    fn count(&self, place: usize, constraint: &Constraint, included: impl Fn(NodeId) -> bool) -> Vec<i64> {
        let column = self.columns[place];
        let mut counts = vec![0; column.bound()];
        if constraint.selector.is_empty() {
            return counts;
        }
        for (labels, per_node) in self.snapshot.groups.of_namespace(&self.pod.facts.key.namespace) {
            if !constraint.selector.matches(labels) {
                continue;
            }
            for (node, count) in per_node {
                let domain = column.domain(*node);
                if domain != NO_DOMAIN && included(*node) {
                    counts[domain as usize] += i64::from(count.live());
                }
            }
        }
        counts
    }
}

/// One hard constraint, counted.
#[derive(Debug)]
struct HardCount {
    constraint: Constraint,
    /// The domain of every node, and which nodes are counted.
    domains: Box<[u32]>,
    included: Vec<bool>,
    counts: Vec<i64>,
    /// Which domains have a node that is counted.
    exists: Vec<bool>,
    /// The fewest pods in any domain; 0 if there are fewer domains than required.
    fewest: i64,
    itself: i64,
}

impl HardCount {
    fn fewest_now(&self) -> i64 {
        let domains = self.exists.iter().filter(|exists| **exists).count() as i64;
        if domains < self.constraint.min_domains {
            return 0;
        }
        let existing = self.counts.iter().zip(&self.exists).filter(|(_, exists)| **exists).map(|(count, _)| *count);
        // Without any domain, every node that has the label is as good as another.
        existing.min().unwrap_or(i64::MAX)
    }

    /// How much the domain of a node would stick out with the pod in it; `None` without a domain.
    fn skew(&self, node: NodeId) -> Option<i64> {
        let domain = self.domains[node.index()];
        (domain != NO_DOMAIN).then(|| (self.counts[domain as usize] + self.itself).saturating_sub(self.fewest))
    }
}

/// One soft constraint, counted.
#[derive(Debug)]
struct SoftCount {
    domains: Box<[u32]>,
    counts: Vec<i64>,
    weight: f64,
    max_skew: i64,
}

#[derive(Debug)]
struct Soft {
    constraints: Vec<SoftCount>,
    /// The feasible nodes in the order of scoring that lack a topology label and so get nothing.
    ignored: Vec<bool>,
    feasible: Vec<NodeId>,
}

const SKEW_REASON: u64 = 1;
const LABEL_REASON: u64 = 1 << 1;

impl Plugin for PodTopologySpread {
    fn name(&self) -> &'static str {
        "PodTopologySpread"
    }

    fn points(&self) -> Points {
        Points::PRE_FILTER.and(Points::FILTER).and(Points::PRE_SCORE).and(Points::SCORE)
    }

    fn events(&self) -> EventSet {
        EventSet::NODE_ADD
            .and(EventSet::NODE_DELETE)
            .and(EventSet::NODE_LABEL)
            .and(EventSet::NODE_TAINT)
            .and(EventSet::POD_PLACED)
            .and(EventSet::POD_REMOVED)
            .and(EventSet::POD_LABEL)
            .and(EventSet::OWN_LABELS)
            .and(EventSet::OWN_TOLERATIONS)
            .and(EventSet::POD_TERMINATING)
    }

    fn is_local(&self) -> bool {
        false
    }

    /// A pod matters if a constraint counts it.
    fn hint(&self, pod: &PendingPod, snapshot: &Snapshot, event: &Event<'_>) -> bool {
        let Some(other) = event.pod.filter(|_| !event.kinds.intersects(EventSet::POD_LABEL)) else { return true };
        other.key.namespace == pod.facts.key.namespace && {
            let (constraints, _) = self.constraints(pod, snapshot, "DoNotSchedule");
            constraints.iter().any(|constraint| constraint.selector.matches(&other.labels))
        }
    }

    fn account(
        &self,
        state: &mut State,
        pod: &PendingPod,
        _snapshot: &Snapshot,
        other: &PodFacts,
        node: NodeId,
        sign: i64,
    ) {
        let Some(constraints) = state.downcast_mut::<Vec<HardCount>>() else { return };
        if other.key.namespace != pod.facts.key.namespace || other.terminating {
            return;
        }
        for count in constraints.iter_mut().filter(|count| count.constraint.selector.matches(&other.labels)) {
            let domain = count.domains[node.index()];
            if domain != NO_DOMAIN && count.included[node.index()] {
                count.counts[domain as usize] += sign;
                count.fewest = count.fewest_now();
            }
        }
    }

    fn pre_filter(&self, pod: &PendingPod, snapshot: &Snapshot) -> PreFilter {
        let (constraints, _) = self.constraints(pod, snapshot, "DoNotSchedule");
        if constraints.is_empty() {
            return PreFilter::Skip;
        }
        let Some(inclusion) = Inclusion::new(pod, snapshot, &constraints) else { return PreFilter::Skip };
        let counted = constraints.iter().enumerate().map(|(place, constraint)| {
            let column = inclusion.columns[place];
            let counts_here = |node| {
                snapshot.nodes.present[NodeId::index(node)]
                    && inclusion.has_all_labels(node)
                    && inclusion.by_policy(constraint, node)
            };
            let included: Vec<bool> =
                (0..snapshot.nodes.slots()).map(|index| counts_here(NodeId(index as u32))).collect();
            let mut exists = vec![false; column.bound()];
            for (domain, _) in column.domains().iter().zip(&included).filter(|(_, included)| **included) {
                exists[*domain as usize] = true;
            }
            let mut count = HardCount {
                counts: inclusion.count(place, constraint, |node| included[node.index()]),
                domains: column.domains().into(),
                itself: i64::from(constraint.selector.matches(&pod.facts.labels)),
                fewest: 0,
                constraint: constraint.clone(),
                included,
                exists,
            };
            count.fewest = count.fewest_now();
            count
        });
        PreFilter::Proceed(Box::new(counted.collect::<Vec<_>>()))
    }

    fn filter(&self, state: &State, _pod: &PendingPod, _snapshot: &Snapshot, node: NodeId) -> Verdict {
        let constraints: &Vec<HardCount> = state_of(state);
        for count in constraints {
            match count.skew(node) {
                None => return Verdict::unresolvable(LABEL_REASON),
                Some(skew) if skew > count.constraint.max_skew => return Verdict::unschedulable(SKEW_REASON),
                Some(_) => {}
            }
        }
        Verdict::Accept
    }

    fn numbers(&self, state: &State, _pod: &PendingPod, _snapshot: &Snapshot, node: NodeId) -> Value {
        let constraints = state.downcast_ref::<Vec<HardCount>>().into_iter().flatten();
        let numbers = constraints.map(|count| {
            json!({"topologyKey": count.constraint.key, "skew": count.skew(node), "maxSkew": count.constraint.max_skew})
        });
        numbers.collect()
    }

    fn reason(&self, _state: &State, number: u32) -> Cow<'static, str> {
        Cow::Borrowed(if 1 << number == LABEL_REASON {
            "node(s) didn't match pod topology spread constraints (missing required label)"
        } else {
            "node(s) didn't match pod topology spread constraints"
        })
    }

    fn pre_score(&self, pod: &PendingPod, snapshot: &Snapshot, feasible: &[NodeId]) -> PreScore {
        let (constraints, system) = self.constraints(pod, snapshot, "ScheduleAnyway");
        if constraints.is_empty() {
            return PreScore::Skip;
        }
        let Some(inclusion) = Inclusion::new(pod, snapshot, &constraints) else { return PreScore::Skip };
        let ignored: Vec<bool> = feasible.iter().map(|node| !system && !inclusion.has_all_labels(*node)).collect();
        let counted = constraints.iter().enumerate().map(|(place, constraint)| {
            let column = inclusion.columns[place];
            let included = |node| {
                snapshot.nodes.present[NodeId::index(node)]
                    && (system || inclusion.has_all_labels(node))
                    && inclusion.by_policy(constraint, node)
            };
            let mut seen = vec![false; column.bound()];
            for (node, ignored) in feasible.iter().zip(&ignored) {
                let domain = column.domain(*node);
                if !ignored && domain != NO_DOMAIN {
                    seen[domain as usize] = true;
                }
            }
            let domains = if constraint.key == HOSTNAME_KEY {
                ignored.iter().filter(|ignored| !**ignored).count()
            } else {
                seen.iter().filter(|seen| **seen).count()
            };
            SoftCount {
                domains: column.domains().into(),
                counts: inclusion.count(place, constraint, included),
                weight: (domains as f64 + 2.0).ln(),
                max_skew: constraint.max_skew,
            }
        });
        let constraints = counted.collect();
        PreScore::Proceed(Box::new(Soft { constraints, ignored, feasible: feasible.to_vec() }))
    }

    /// The more like pods in the node's domains, the higher; [`Plugin::normalize`] turns it round.
    fn score(&self, state: &State, _pod: &PendingPod, _snapshot: &Snapshot, node: NodeId) -> i64 {
        let soft: &Soft = state_of(state);
        let mut score = 0.0;
        for constraint in &soft.constraints {
            let domain = constraint.domains[node.index()];
            if domain != NO_DOMAIN {
                score +=
                    constraint.counts[domain as usize] as f64 * constraint.weight + (constraint.max_skew - 1) as f64;
            }
        }
        score.round() as i64
    }

    fn normalize(&self, state: &State, scores: &mut [i64]) {
        let soft: &Soft = state_of(state);
        debug_assert_eq!(soft.feasible.len(), scores.len());
        let counted = || scores.iter().zip(&soft.ignored).filter(|(_, ignored)| !**ignored).map(|(score, _)| *score);
        let lowest = counted().min().unwrap_or(0);
        let highest = counted().max().unwrap_or(0);
        for (score, ignored) in scores.iter_mut().zip(&soft.ignored) {
            *score = match (*ignored, highest) {
                (true, _) => 0,
                (false, 0) => MAX_NODE_SCORE,
                (false, _) => MAX_NODE_SCORE * (highest + lowest - *score) / highest,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{PodBuilder, accepts, cluster, explain, node, placed, pod, scores};

    /// Nodes a and b in zone z1, c in z2, d without a zone.
    fn zones() -> Snapshot {
        cluster([
            node("a").label(HOSTNAME_KEY, "a").label(ZONE_KEY, "z1").build(),
            node("b").label(HOSTNAME_KEY, "b").label(ZONE_KEY, "z1").build(),
            node("c").label(HOSTNAME_KEY, "c").label(ZONE_KEY, "z2").build(),
            node("d").label(HOSTNAME_KEY, "d").build(),
        ])
    }

    fn web(name: &str) -> PodBuilder {
        pod(name).label("app", "web")
    }

    fn constrained(key: &str, action: &str, extra: Value) -> PodBuilder {
        let mut constraint = json!({
            "maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": action,
            "labelSelector": {"matchLabels": {"app": "web"}}
        });
        constraint.as_object_mut().expect("object").extend(extra.as_object().expect("object").clone());
        web("p").spec(json!({"topologySpreadConstraints": [constraint]}))
    }

    #[test]
    fn hard_constraints_refuse_the_fuller_domains() {
        let mut snapshot = zones();
        placed(&mut snapshot, web("1").on("a").build());
        let plugin = PodTopologySpread::default();
        let cases = [
            (constrained(ZONE_KEY, "DoNotSchedule", json!({})), [false, false, true, false]),
            (constrained(ZONE_KEY, "DoNotSchedule", json!({"maxSkew": 2})), [true, true, true, false]),
            (constrained(HOSTNAME_KEY, "DoNotSchedule", json!({})), [false, true, true, true]),
            (constrained(ZONE_KEY, "ScheduleAnyway", json!({})), [true; 4]),
            // With too few domains the fewest count as none.
            (constrained(ZONE_KEY, "DoNotSchedule", json!({"minDomains": 3})), [false, false, true, false]),
            (constrained(ZONE_KEY, "DoNotSchedule", json!({"labelSelector": {}})), [true, true, true, false]),
        ];
        for (pod, expected) in cases {
            let pod = pod.build();
            assert_eq!(accepts(&plugin, &pod, &snapshot), expected, "{:?}", pod.spec);
        }
        let pod = constrained(ZONE_KEY, "DoNotSchedule", json!({})).build();
        let words = "node(s) didn't match pod topology spread constraints";
        assert_eq!(explain(&plugin, &pod, &snapshot, "a"), [words]);
        assert_eq!(explain(&plugin, &pod, &snapshot, "d"), [format!("{words} (missing required label)")]);
    }

    #[test]
    fn other_namespaces_and_terminating_pods_do_not_count() {
        let mut snapshot = zones();
        placed(&mut snapshot, web("1").namespace("other").on("a").build());
        placed(&mut snapshot, web("2").terminating().on("a").build());
        let pod = constrained(HOSTNAME_KEY, "DoNotSchedule", json!({})).build();
        assert_eq!(accepts(&PodTopologySpread::default(), &pod, &snapshot), [true; 4]);
    }

    #[test]
    fn match_label_keys_pin_the_selector_to_the_pods_own_values() {
        let mut snapshot = zones();
        placed(&mut snapshot, web("1").label("hash", "old").on("a").build());
        let pod = constrained(HOSTNAME_KEY, "DoNotSchedule", json!({"matchLabelKeys": ["hash"]}));
        assert_eq!(accepts(&PodTopologySpread::default(), &pod.label("hash", "new").build(), &snapshot), [true; 4]);
    }

    #[test]
    fn nodes_that_the_pod_cannot_use_do_not_count_as_domains() {
        let mut snapshot = zones();
        placed(&mut snapshot, web("1").on("a").build());
        placed(&mut snapshot, web("2").on("b").build());
        let mut pod = constrained(HOSTNAME_KEY, "DoNotSchedule", json!({})).build();
        pod.spec.as_mut().expect("spec").node_selector = Some([(ZONE_KEY.to_owned(), "z1".to_owned())].into());
        assert_eq!(accepts(&PodTopologySpread::default(), &pod, &snapshot)[..2], [true, true]);
    }

    #[test]
    fn replicas_prefer_hosts_without_their_like() {
        let mut snapshot = zones();
        snapshot.workloads.set_service("default", "web", Some([("app".to_owned(), "web".to_owned())].into()));
        placed(&mut snapshot, web("1").on("a").build());
        let scores_now = |snapshot: &Snapshot| scores(&PodTopologySpread::default(), &web("p").build(), snapshot);
        let one = scores_now(&snapshot);
        assert!(one[0] < one[1] && one[1] < one[2], "{one:?}: own host, own zone, other zone");
        assert_eq!(
            scores(&PodTopologySpread::default(), &pod("other").build(), &snapshot),
            [0; 4],
            "nothing selects it"
        );
    }

    #[test]
    fn own_soft_constraints_ignore_nodes_without_the_label() {
        let mut snapshot = zones();
        placed(&mut snapshot, web("1").on("a").build());
        let pod = constrained(ZONE_KEY, "ScheduleAnyway", json!({})).build();
        assert_eq!(scores(&PodTopologySpread::default(), &pod, &snapshot), [0, 0, 100, 0]);
    }
}
