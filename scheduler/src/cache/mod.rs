//! The scheduler's picture of the cluster: nodes in columns, what placed pods take of them, and the pods that it has placed
//! itself but that the apiserver has not shown it yet.
//!
//! A pod is *assumed* from the decision until a watch confirms it; it is *forgotten* when binding fails, and *expires* if no
//! confirmation comes long after binding has succeeded. The picture is at the same time the snapshot that plugins
//! read: a decision holds it unchanged from the first filter to the assumption.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::api::core::v1::Node;

mod affinity;
mod budgets;
mod claims;
mod label_groups;
mod nodes;
mod pod_facts;
mod topology;
pub mod volumes;
mod workloads;

pub use affinity::{AffinityTerm, PodAffinity};
pub use budgets::Budgets;
pub use claims::{Claims, DeviceId, EXTENDED_CLAIM, Held, Shares, claim_keys, is_extended};
pub use label_groups::{Count, LabelGroups, PodsPerNode};
pub use nodes::{Amounts, ImageId, NodeId, Nodes};
pub use pod_facts::{
    DEFAULT_CPU_MILLI, DEFAULT_MEMORY_BYTES, DEFAULT_SCHEDULER_NAME, HostPort, Labels, PendingPod, PodFacts, Requests,
};
pub use topology::{Column, HOSTNAME_KEY, NO_DOMAIN, Topology, ZONE_KEY};
pub use volumes::Volumes;
pub use workloads::{ControllerKind, Workloads};

use crate::framework::EventSet;

/// Why the cache believes that a pod is on its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Decided, being bound.
    Assumed,
    /// Bound by us; not yet seen on a watch.
    Bound { expires: Instant },
    /// Seen on a watch.
    Confirmed,
}

#[derive(Debug)]
struct PlacedPod {
    facts: PodFacts,
    node: NodeId,
    standing: Standing,
}

/// The picture.
#[derive(Debug, Default)]
pub struct Snapshot {
    pub nodes: Nodes,
    pub groups: LabelGroups,
    pub workloads: Workloads,
    pub namespaces: Namespaces,
    pub budgets: Budgets,
    pub volumes: Volumes,
    pub claims: Claims,
    placed: HashMap<Arc<str>, PlacedPod>,
    /// What placed pods wish of others, and how many of those who wish it are on which node.
    with_affinity: HashMap<Arc<PodAffinity>, HashMap<NodeId, u32>>,
    /// How many placed pods mount a claim, by `namespace/name`.
    claim_users: HashMap<Arc<str>, u32>,
    /// The waiting pods that a node has been, or is being, made free for.
    nominated: HashMap<Arc<str>, (Arc<str>, PodFacts)>,
}

/// The labels of namespaces, for terms that select these.
pub type Namespaces = HashMap<String, std::collections::BTreeMap<String, String>>;

impl Snapshot {
    /// Takes over a Node object.
    pub fn set_node(&mut self, node: &Node) -> EventSet {
        self.nodes.set(node)
    }

    /// Forgets a Node object.
    pub fn remove_node(&mut self, name: &str) -> EventSet {
        self.nodes.remove(name)
    }

    /// Takes over a pod that has a node, as a watch shows it: confirms an assumption, or corrects it.
    pub fn set_pod(&mut self, facts: PodFacts, node_name: &str) {
        if let Some(pod) = self.placed.get_mut(&facts.uid)
            && pod.facts == facts
            && *self.nodes.name[pod.node.index()] == *node_name
        {
            pod.standing = Standing::Confirmed;
            return;
        }
        self.unplace(&facts.uid.clone());
        self.place(facts, node_name, Standing::Confirmed);
    }

    /// Forgets a pod, whatever its standing.
    pub fn remove_pod(&mut self, uid: &str) -> bool {
        self.unplace(uid)
    }

    /// Places a pod on the strength of a decision.
    pub fn assume(&mut self, facts: PodFacts, node: NodeId) {
        let name = self.nodes.name[node.index()].clone();
        self.unplace(&facts.uid.clone());
        self.place(facts, &name, Standing::Assumed);
    }

    /// Binding has succeeded: unless a watch confirms the pod until `expires`, it is dropped.
    pub fn finish_binding(&mut self, uid: &str, expires: Instant) {
        if let Some(pod) = self.placed.get_mut(uid)
            && pod.standing == Standing::Assumed
        {
            pod.standing = Standing::Bound { expires };
        }
    }

    /// Binding has failed: takes the assumption back. A pod that a watch has confirmed meanwhile stays.
    pub fn forget(&mut self, uid: &str) -> bool {
        self.placed.get(uid).is_some_and(|pod| pod.standing != Standing::Confirmed) && self.unplace(uid)
    }

    /// Drops the assumptions that nothing has confirmed in time, and names them.
    pub fn expire(&mut self, now: Instant) -> Vec<Arc<str>> {
        let late = |pod: &PlacedPod| matches!(pod.standing, Standing::Bound { expires } if expires <= now);
        let expired: Vec<_> = self.placed.iter().filter(|(_, pod)| late(pod)).map(|(uid, _)| uid.clone()).collect();
        for uid in &expired {
            self.unplace(uid);
        }
        expired
    }

    /// Whether the pod has a node, confirmed or assumed.
    pub fn is_placed(&self, uid: &str) -> bool {
        self.placed.contains_key(uid)
    }

    /// The node on which a pod is, confirmed or assumed.
    pub fn node_of(&self, uid: &str) -> Option<&Arc<str>> {
        self.placed.get(uid).map(|pod| &self.nodes.name[pod.node.index()])
    }

    /// What is known of a placed pod.
    pub fn facts_of(&self, uid: &str) -> Option<&PodFacts> {
        self.placed.get(uid).map(|pod| &pod.facts)
    }

    /// The wishes of placed pods, each once, and how many of those who wish it are on which node.
    pub fn with_affinity(&self) -> impl Iterator<Item = (&PodAffinity, &HashMap<NodeId, u32>)> {
        self.with_affinity.iter().map(|(affinity, per_node)| (&**affinity, per_node))
    }

    /// The pods on a node.
    pub fn pods_on(&self, node: NodeId) -> impl Iterator<Item = &PodFacts> {
        self.nodes.pods[node.index()].iter().filter_map(|uid| self.placed.get(uid)).map(|pod| &pod.facts)
    }

    /// How many placed pods mount a claim (`namespace/name`).
    pub fn users_of(&self, claim: &str) -> u32 {
        self.claim_users.get(claim).copied().unwrap_or(0)
    }

    /// Keeps room for a waiting pod on a node; `None` keeps none.
    pub fn nominate(&mut self, pod: &PodFacts, node: Option<&str>) {
        match node {
            Some(node) => drop(self.nominated.insert(pod.uid.clone(), (node.into(), pod.clone()))),
            None => drop(self.nominated.remove(&pod.uid)),
        }
    }

    /// Forgets that a node was meant for the pod.
    pub fn withdraw_nomination(&mut self, uid: &str) -> bool {
        self.nominated.remove(uid).is_some()
    }

    /// The node that is meant for a waiting pod.
    pub fn nominated_node(&self, uid: &str) -> Option<&Arc<str>> {
        self.nominated.get(uid).map(|(node, _)| node)
    }

    /// The pods other than this one for which nodes are kept, as far as they are at least as important.
    pub fn nominated_above(&self, pod: &PodFacts) -> HashMap<NodeId, Vec<PodFacts>> {
        let mut by_node: HashMap<NodeId, Vec<PodFacts>> = HashMap::new();
        for (node, other) in self.nominated.values() {
            if other.priority >= pod.priority
                && other.uid != pod.uid
                && let Some(node) = self.nodes.find(node)
            {
                by_node.entry(node).or_default().push(other.clone());
            }
        }
        by_node
    }

    /// The pods below a priority that a node is kept for.
    pub fn nominated_below(&self, node: &str, priority: i32) -> Vec<PodFacts> {
        let lower = self.nominated.values().filter(|(on, other)| &**on == node && other.priority < priority);
        lower.map(|(_, other)| other.clone()).collect()
    }

    /// How many pods are placed.
    pub fn placed_count(&self) -> usize {
        self.placed.len()
    }

    /// Makes the columns that a decision on `pod` will read.
    pub fn prepare_for(&mut self, pod: &PendingPod) {
        let constraints = pod.spec().and_then(|spec| spec.topology_spread_constraints.as_deref());
        for constraint in constraints.unwrap_or_default() {
            self.ensure_topology(&constraint.topology_key);
        }
        for term in pod.facts.affinity.iter().flat_map(|affinity| affinity.terms()) {
            self.ensure_topology(&term.topology_key);
        }
    }

    /// Makes the column of a topology key.
    pub fn ensure_topology(&mut self, key: &str) {
        self.nodes.topology.ensure(key, &self.nodes.labels);
    }

    fn place(&mut self, mut facts: PodFacts, node_name: &str, standing: Standing) {
        let node = self.nodes.slot(node_name);
        self.nodes.account(node, &facts, 1);
        facts.labels = self.groups.add(&facts, node);
        self.nominated.remove(&facts.uid);
        self.nodes.pods[node.index()].push(facts.uid.clone());
        for claim in &facts.claims {
            *self.claim_users.entry(claim.clone()).or_default() += 1;
        }
        if let Some(affinity) = facts.affinity.clone() {
            for term in affinity.terms() {
                self.ensure_topology(&term.topology_key);
            }
            let shared = self.with_affinity.get_key_value(&affinity).map_or(affinity, |(shared, _)| shared.clone());
            *self.with_affinity.entry(shared.clone()).or_default().entry(node).or_default() += 1;
            facts.affinity = Some(shared);
        }
        self.placed.insert(facts.uid.clone(), PlacedPod { facts, node, standing });
    }

    fn unplace(&mut self, uid: &str) -> bool {
        let Some(pod) = self.placed.remove(uid) else { return false };
        self.nodes.account(pod.node, &pod.facts, -1);
        self.groups.remove(&pod.facts, pod.node);
        self.nodes.pods[pod.node.index()].retain(|other| **other != *uid);
        for claim in &pod.facts.claims {
            if let Some(users) = self.claim_users.get_mut(claim) {
                *users -= 1;
                if *users == 0 {
                    self.claim_users.remove(claim);
                }
            }
        }
        if let Some(affinity) = &pod.facts.affinity
            && let Some(per_node) = self.with_affinity.get_mut(affinity)
        {
            if let Some(count) = per_node.get_mut(&pod.node) {
                *count -= 1;
                if *count == 0 {
                    per_node.remove(&pod.node);
                }
            }
            if per_node.is_empty() {
                self.with_affinity.remove(affinity);
            }
        }
        self.nodes.release_if_unused(pod.node);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::{node, pod};

    fn snapshot() -> Snapshot {
        let mut snapshot = Snapshot::default();
        snapshot.set_node(&node("n1").allocatable("4", "8Gi", 10).build());
        snapshot
    }

    fn facts() -> PodFacts {
        PodFacts::of(&pod("p").requests(&[("cpu", "1"), ("memory", "1Gi")]).host_port(80).build())
    }

    fn used(snapshot: &Snapshot) -> (i64, i64, usize) {
        let nodes = &snapshot.nodes;
        (nodes.requested.cpu_milli[0], nodes.requested.pods[0], nodes.host_ports[0].len())
    }

    #[test]
    fn an_assumption_counts_until_it_is_forgotten() {
        let mut snapshot = snapshot();
        snapshot.assume(facts(), NodeId(0));
        assert_eq!(used(&snapshot), (1000, 1, 1));
        assert!(snapshot.forget(&facts().uid));
        assert_eq!(used(&snapshot), (0, 0, 0));
        assert!(snapshot.groups.of_namespace("default").next().is_none());
    }

    #[test]
    fn a_confirmed_pod_is_neither_forgotten_nor_expired() {
        let mut snapshot = snapshot();
        let now = Instant::now();
        snapshot.assume(facts(), NodeId(0));
        snapshot.finish_binding(&facts().uid, now);
        snapshot.set_pod(facts(), "n1");
        assert!(snapshot.expire(now + Duration::from_secs(1)).is_empty());
        assert!(!snapshot.forget(&facts().uid));
        assert_eq!(used(&snapshot), (1000, 1, 1));
    }

    #[test]
    fn an_unconfirmed_binding_expires() {
        let mut snapshot = snapshot();
        let now = Instant::now();
        snapshot.assume(facts(), NodeId(0));
        assert!(snapshot.expire(now + Duration::from_secs(60)).is_empty(), "still being bound");
        snapshot.finish_binding(&facts().uid, now + Duration::from_secs(30));
        assert!(snapshot.expire(now).is_empty());
        assert_eq!(snapshot.expire(now + Duration::from_secs(30)), [facts().uid]);
        assert_eq!(used(&snapshot), (0, 0, 0));
    }

    #[test]
    fn a_watch_that_shows_another_node_corrects_the_assumption() {
        let mut snapshot = snapshot();
        snapshot.assume(facts(), NodeId(0));
        snapshot.set_pod(facts(), "n2");
        assert_eq!(used(&snapshot), (0, 0, 0));
        assert_eq!(snapshot.node_of(&facts().uid).map(|name| &**name), Some("n2"));
        assert!(snapshot.nodes.find("n2").is_none(), "a node without an object is no candidate");
        snapshot.set_node(&node("n2").allocatable("4", "8Gi", 10).build());
        let n2 = snapshot.nodes.find("n2").expect("n2");
        assert_eq!(snapshot.nodes.requested.cpu_milli[n2.index()], 1000);
    }

    #[test]
    fn slots_are_used_again_once_the_node_and_its_pods_are_gone() {
        let mut snapshot = snapshot();
        snapshot.set_pod(facts(), "n1");
        snapshot.remove_node("n1");
        assert_eq!(snapshot.nodes.len(), 0);
        snapshot.set_node(&node("n2").build());
        assert_eq!(snapshot.nodes.slots(), 2, "n1 still holds a pod");
        snapshot.remove_pod(&facts().uid);
        snapshot.set_node(&node("n3").build());
        assert_eq!(snapshot.nodes.slots(), 2);
        assert_eq!(snapshot.nodes.find("n3"), Some(NodeId(0)));
    }

    #[test]
    fn topology_columns_follow_labels() {
        let mut snapshot = snapshot();
        snapshot.set_node(&node("n1").label("rack", "a").build());
        snapshot.set_node(&node("n2").label("rack", "b").build());
        snapshot.ensure_topology("rack");
        let domains = |snapshot: &Snapshot| {
            let column = snapshot.nodes.topology.column("rack").expect("rack");
            [0, 1].map(|index| column.domain(NodeId(index)))
        };
        let [a, b] = domains(&snapshot);
        assert!(a != b && a != NO_DOMAIN && b != NO_DOMAIN);
        snapshot.set_node(&node("n2").label("rack", "a").build());
        let [a, b] = domains(&snapshot);
        assert_eq!(a, b);
        snapshot.set_node(&node("n2").build());
        assert_eq!(domains(&snapshot)[1], NO_DOMAIN);
    }
}
