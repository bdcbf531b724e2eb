//! PodDisruptionBudgets: which pods preemption should rather leave alone.

use std::collections::{BTreeMap, BTreeSet};

use apimachinery::labels::Selector;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;

use super::PodFacts;

/// What preemption reads of a budget.
#[derive(Debug)]
struct Budget {
    selector: Selector,
    allowed: i32,
    /// Pods whose disruption is counted already.
    disrupted: BTreeSet<String>,
}

/// The budgets, by namespace and name.
#[derive(Debug, Default)]
pub struct Budgets(BTreeMap<String, BTreeMap<String, Budget>>);

impl Budgets {
    /// Takes over a budget.
    pub fn set(&mut self, object: &PodDisruptionBudget) {
        let selector = object.spec.as_ref().and_then(|spec| spec.selector.as_ref());
        let status = object.status.as_ref();
        let budget = Budget {
            selector: selector
                .and_then(|selector| Selector::from_label_selector(selector).ok())
                .unwrap_or_else(Selector::nothing),
            allowed: status.and_then(|status| status.disruptions_allowed).unwrap_or(0),
            disrupted: status
                .and_then(|status| status.disrupted_pods.as_ref())
                .into_iter()
                .flatten()
                .map(|(name, _)| name.clone())
                .collect(),
        };
        let namespace = object.metadata.namespace.clone().unwrap_or_default();
        self.0.entry(namespace).or_default().insert(object.metadata.name.clone().unwrap_or_default(), budget);
    }

    /// Forgets a budget.
    pub fn remove(&mut self, namespace: &str, name: &str) {
        if let Some(budgets) = self.0.get_mut(namespace) {
            budgets.remove(name);
        }
    }

    /// Those of `pods` whose loss would break a budget, and the others; both in their order. As `filterPodsWithPDBViolation`.
    pub fn split(&self, pods: Vec<PodFacts>) -> (Vec<PodFacts>, Vec<PodFacts>) {
        let mut left: BTreeMap<(&str, &str), i32> = BTreeMap::new();
        pods.into_iter().partition(|pod| {
            let mut violates = false;
            let budgets = self.0.get_key_value(&pod.key.namespace).filter(|_| !pod.labels.is_empty());
            for (namespace, (name, budget)) in
                budgets.into_iter().flat_map(|(namespace, budgets)| budgets.iter().map(move |one| (namespace, one)))
            {
                let meant = !budget.selector.is_empty() && budget.selector.matches(&pod.labels);
                if meant && !budget.disrupted.contains(&pod.key.name) {
                    let left = left.entry((namespace, name)).or_insert(budget.allowed);
                    *left -= 1;
                    violates |= *left < 0;
                }
            }
            violates
        })
    }
}
