//! Placed pods by namespace and label set.
//!
//! All pods of a ReplicaSet carry the same labels, so a selector is matched once per group instead of once per pod, and the
//! group knows how many of its pods each node holds. Pods that are being deleted are not counted.

use std::collections::HashMap;
use std::sync::Arc;

use super::nodes::NodeId;
use super::pod_facts::Labels;

/// The pods of one label set: how many on which node.
pub type PodsPerNode = HashMap<NodeId, u32>;

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

    /// Counts a pod in; the labels returned are the group's, to be kept in place of the pod's own.
    pub(super) fn add(&mut self, namespace: &str, labels: &Labels, node: NodeId) -> Labels {
        if !self.by_namespace.contains_key(namespace) {
            self.by_namespace.insert(namespace.into(), HashMap::new());
        }
        let Some(groups) = self.by_namespace.get_mut(namespace) else { return labels.clone() };
        let shared = groups.get_key_value(labels).map_or_else(|| labels.clone(), |(shared, _)| shared.clone());
        *groups.entry(shared.clone()).or_default().entry(node).or_default() += 1;
        shared
    }

    /// Counts a pod out.
    pub(super) fn remove(&mut self, namespace: &str, labels: &Labels, node: NodeId) {
        let Some(groups) = self.by_namespace.get_mut(namespace) else { return };
        if let Some(per_node) = groups.get_mut(labels) {
            if let Some(count) = per_node.get_mut(&node) {
                *count -= 1;
                if *count == 0 {
                    per_node.remove(&node);
                }
            }
            if per_node.is_empty() {
                groups.remove(labels);
            }
        }
        if groups.is_empty() {
            self.by_namespace.remove(namespace);
        }
    }
}
