//! Which pods are bound to which node: an index over the cache's snapshot, brought up to date when it is asked. Snapshots share
//! what did not change, so that costs as much as has changed since.
use std::collections::HashMap;
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use parking_lot::Mutex;

use crate::storage::StoredObject;
use crate::storage::cache::Objects;

/// See the module.
#[derive(Default)]
pub struct PodsByNode {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What the index was made from.
    seen: Objects,
    nodes: HashMap<Box<str>, HashMap<Arc<str>, Arc<StoredObject>>>,
}

// === impl PodsByNode ===

impl PodsByNode {
    /// The pods bound to a node among `pods`, which are all there are.
    pub fn on(&self, node: &str, pods: Objects) -> Vec<Arc<StoredObject>> {
        let mut state = self.state.lock();
        let State { seen, nodes } = &mut *state;
        for change in seen.diff(&pods) {
            match change {
                DiffItem::Add(key, pod) => insert(nodes, key, pod),
                DiffItem::Update { old: (key, old), new: (_, new) } => {
                    remove(nodes, key, old);
                    insert(nodes, key, new);
                }
                DiffItem::Remove(key, pod) => remove(nodes, key, pod),
            }
        }
        *seen = pods;
        nodes.get(node).map(|pods| pods.values().cloned().collect()).unwrap_or_default()
    }
}

type Nodes = HashMap<Box<str>, HashMap<Arc<str>, Arc<StoredObject>>>;

fn node_of(pod: &StoredObject) -> Option<&str> {
    pod.identity.field("spec.nodeName").filter(|node| !node.is_empty())
}

fn insert(nodes: &mut Nodes, key: &Arc<str>, pod: &Arc<StoredObject>) {
    if let Some(node) = node_of(pod) {
        nodes.entry(node.into()).or_default().insert(key.clone(), pod.clone());
    }
}

fn remove(nodes: &mut Nodes, key: &Arc<str>, pod: &Arc<StoredObject>) {
    if let Some(node) = node_of(pod)
        && let Some(pods) = nodes.get_mut(node)
    {
        pods.remove(key);
        if pods.is_empty() {
            nodes.remove(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authorization::lister::fake::Objects as Fake;
    use crate::authorization::lister::{Lister as _, PODS};
    use proptest::prelude::*;
    use serde_json::json;

    proptest! {
        /// Whatever pods come, move and go between questions, the index says what a search of all would.
        #[test]
        fn the_index_agrees_with_a_search(steps in prop::collection::vec((0..6_u8, 0..4_u8, any::<bool>()), 1..60)) {
            let fake = Fake::default();
            let index = PodsByNode::default();
            for (pod, node, ask) in steps {
                let name = format!("p{pod}");
                match node {
                    3 => fake.remove(PODS, "a", &name),
                    0 => fake.put(PODS, json!({"metadata": {"name": name, "namespace": "a"}})),
                    node => fake.put(PODS, json!({"metadata": {"name": name, "namespace": "a"}, "spec": {"nodeName": format!("n{node}")}})),
                }
                if ask {
                    for node in ["n1", "n2"] {
                        let mut found: Vec<i64> = index.on(node, fake.objects(PODS)).iter().map(|p| p.revision).collect();
                        let mut expected: Vec<i64> = fake
                            .list(PODS, None)
                            .iter()
                            .filter(|p| p.identity.field("spec.nodeName") == Some(node))
                            .map(|p| p.revision)
                            .collect();
                        found.sort_unstable();
                        expected.sort_unstable();
                        prop_assert_eq!(found, expected);
                    }
                }
            }
        }
    }
}
