//! Indexes over an informer's store, kept up by its events: pods by owner and by node, sets by owner.
//!
//! An index must be made before the handlers of whoever reads it, so that it has seen an event before they act on it.
use apimachinery::pod::controller_of;
use component_base::informer::Informer;
use k8s_openapi::api::core::v1::Pod;
use kube::Resource;
use parking_lot::RwLock;
use std::{collections::HashMap, sync::Arc};

/// Objects by a text that each has one of, or none; of one text in the order of [`name`].
pub struct Index<K> {
    entries: RwLock<HashMap<String, Vec<Arc<K>>>>,
}

fn name<K: Resource>(object: &K) -> (Option<&str>, Option<&str>) {
    (object.meta().namespace.as_deref(), object.meta().name.as_deref())
}

impl<K: Resource + Send + Sync + 'static> Index<K> {
    /// Follows `informer`; `value` says where an object belongs.
    pub fn new(informer: &Informer<K>, value: fn(&K) -> Option<String>) -> Arc<Self> {
        let index = Arc::new(Self { entries: RwLock::default() });
        let follower = index.clone();
        informer.on_change(move |change| {
            let (old, new) = (change.old.and_then(|o| value(o)), change.new.and_then(|o| value(o)));
            let Some(object) = change.latest() else { return };
            let place =
                |group: &Vec<Arc<K>>| group.binary_search_by(|one| name(one.as_ref()).cmp(&name(object.as_ref())));
            let mut entries = follower.entries.write();
            if let Some(old) = old
                && Some(&old) != new.as_ref()
                && let Some(group) = entries.get_mut(&old)
            {
                if let Ok(at) = place(group) {
                    group.remove(at);
                }
                if group.is_empty() {
                    entries.remove(&old);
                }
            }
            if let (Some(new), Some(object)) = (new, change.new) {
                let group = entries.entry(new).or_default();
                match place(group) {
                    Ok(at) => group[at] = object.clone(),
                    Err(at) => group.insert(at, object.clone()),
                }
            }
        });
        index
    }

    /// What belongs to `value`, by namespace and name.
    pub fn get(&self, value: &str) -> Vec<Arc<K>> {
        self.entries.read().get(value).cloned().unwrap_or_default()
    }
}

/// Index value: the UID of the controlling owner, or `orphans/<namespace>`.
pub fn by_controller<K: Resource>(object: &K) -> Option<String> {
    Some(match controller_of(object.meta()) {
        Some(owner) => owner.uid.clone(),
        None => orphans_of(object.meta().namespace.as_deref().unwrap_or("")),
    })
}

/// Where [`by_controller`] puts what nobody controls.
pub fn orphans_of(namespace: &str) -> String {
    format!("orphans/{namespace}")
}

/// Index value: the node that a pod is bound to.
pub fn by_node(pod: &Pod) -> Option<String> {
    pod.spec.as_ref()?.node_name.clone().filter(|n| !n.is_empty())
}
