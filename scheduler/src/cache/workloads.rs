//! What selects pods: Services and the controllers, by namespace. Spreading's default constraints are derived from them.

use std::collections::{BTreeMap, HashMap};

use apimachinery::labels::Selector;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

/// The kinds of controllers whose selectors count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ControllerKind {
    ReplicationController,
    ReplicaSet,
    StatefulSet,
}

impl ControllerKind {
    /// The kind named by an owner reference.
    pub fn of(api_version: &str, kind: &str) -> Option<ControllerKind> {
        match (api_version, kind) {
            ("v1", "ReplicationController") => Some(ControllerKind::ReplicationController),
            ("apps/v1", "ReplicaSet") => Some(ControllerKind::ReplicaSet),
            ("apps/v1", "StatefulSet") => Some(ControllerKind::StatefulSet),
            _ => None,
        }
    }
}

/// The selectors.
#[derive(Debug, Default)]
pub struct Workloads {
    services: HashMap<String, BTreeMap<String, BTreeMap<String, String>>>,
    controllers: HashMap<(ControllerKind, String, String), LabelSelector>,
}

impl Workloads {
    /// Takes over a Service's selector; `None` when it is gone or has none.
    pub fn set_service(&mut self, namespace: &str, name: &str, selector: Option<BTreeMap<String, String>>) {
        match selector.filter(|selector| !selector.is_empty()) {
            Some(selector) => {
                let services = self.services.entry(namespace.to_owned()).or_default();
                services.insert(name.to_owned(), selector);
            }
            None => {
                if let Some(services) = self.services.get_mut(namespace) {
                    services.remove(name);
                    if services.is_empty() {
                        self.services.remove(namespace);
                    }
                }
            }
        }
    }

    /// Takes over a controller's selector; `None` when it is gone.
    pub fn set_controller(
        &mut self,
        kind: ControllerKind,
        namespace: &str,
        name: &str,
        selector: Option<LabelSelector>,
    ) {
        let key = (kind, namespace.to_owned(), name.to_owned());
        match selector {
            Some(selector) => self.controllers.insert(key, selector),
            None => self.controllers.remove(&key),
        };
    }

    /// What makes pods alike: the selectors of the Services that select the pod and of its controller, together.
    /// As `helper.DefaultSelector`; `None` if nothing selects the pod.
    pub fn default_selector(
        &self,
        namespace: &str,
        labels: &BTreeMap<String, String>,
        controller: Option<(ControllerKind, &str)>,
    ) -> Option<Selector> {
        let mut combined = LabelSelector::default();
        let mut together = BTreeMap::new();
        for selector in self.services.get(namespace).into_iter().flat_map(BTreeMap::values) {
            if selector.iter().all(|(key, value)| labels.get(key) == Some(value)) {
                together.extend(selector.clone());
            }
        }
        if let Some((kind, name)) = controller {
            let key = (kind, namespace.to_owned(), name.to_owned());
            if let Some(selector) = self.controllers.get(&key) {
                together.extend(selector.match_labels.clone().unwrap_or_default());
                combined.match_expressions = selector.match_expressions.clone();
            }
        }
        combined.match_labels = Some(together).filter(|labels| !labels.is_empty());
        if combined.match_labels.is_none() && combined.match_expressions.as_ref().is_none_or(Vec::is_empty) {
            return None;
        }
        Selector::from_label_selector(&combined).ok()
    }
}
