//! Placed pods by namespace and label set.
//!
//! All pods of a ReplicaSet carry the same labels, so a selector is matched once per group instead of once per pod, and the
//! group knows how many of its pods each node holds, and how many of these are being deleted.

use std::collections::HashMap;
use std::sync::Arc;

use super::nodes::NodeId;
use super::pod_facts::{Labels, PodFacts};

/// The pods of one label set: how many on which node.
pub type PodsPerNode = HashMap<NodeId, Count>;

/// Pods of a group on one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub all: u32,
    pub terminating: u32,
}

impl Count {
    /// Those that are to stay.
    pub fn live(self) -> u32 {
        self.all - self.terminating
    }
}

/// The index.
#[derive(Debug, Default)]
pub struct LabelGroups {
    by_namespace: HashMap<Arc<str>, HashMap<Labels, PodsPerNode>>,
}

impl LabelGroups {
    /// The groups of a namespace.
    pub fn of_namespace(&self, namespace: &str) -> impl Iterator<Item = (&Labels, &PodsPerNode)> {
        self.by_namespace.get(namespace).into_iter().flatten()
    }

    /// The namespaces in which there are pods, with their groups.
    pub fn namespaces(&self) -> impl Iterator<Item = (&str, &HashMap<Labels, PodsPerNode>)> {
        self.by_namespace.iter().map(|(namespace, groups)| (&**namespace, groups))
    }

    /// Counts a pod in; the labels returned are the group's, to be kept in place of the pod's own.
    pub(super) fn add(&mut self, pod: &PodFacts, node: NodeId) -> Labels {
        let namespace = pod.key.namespace.as_str();
        if !self.by_namespace.contains_key(namespace) {
            self.by_namespace.insert(namespace.into(), HashMap::new());
        }
        let Some(groups) = self.by_namespace.get_mut(namespace) else { return pod.labels.clone() };
        let shared = groups.get_key_value(&pod.labels).map_or_else(|| pod.labels.clone(), |(shared, _)| shared.clone());
        let count = groups.entry(shared.clone()).or_default().entry(node).or_default();
        count.all += 1;
        count.terminating += u32::from(pod.terminating);
        shared
    }

    /// Counts a pod out.
    pub(super) fn remove(&mut self, pod: &PodFacts, node: NodeId) {
        let namespace = pod.key.namespace.as_str();
        let Some(groups) = self.by_namespace.get_mut(namespace) else { return };
        if let Some(per_node) = groups.get_mut(&pod.labels) {
            if let Some(count) = per_node.get_mut(&node) {
                count.all -= 1;
                count.terminating -= u32::from(pod.terminating);
                if count.all == 0 {
                    per_node.remove(&node);
                }
            }
            if per_node.is_empty() {
                groups.remove(&pod.labels);
            }
        }
        if groups.is_empty() {
            self.by_namespace.remove(namespace);
        }
    }
}
