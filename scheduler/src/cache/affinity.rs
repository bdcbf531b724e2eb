//! A pod's wishes about its neighbours: `podAffinity` and `podAntiAffinity`, parsed.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};

use apimachinery::labels::{Operator, Requirement, Selector};
use k8s_openapi::api::core::v1::{Pod, PodAffinityTerm, WeightedPodAffinityTerm};

use super::Namespaces;

/// Pods that a term selects, and how near is near.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AffinityTerm {
    pub topology_key: String,
    selector: Selector,
    namespaces: BTreeSet<String>,
    namespace_selector: Selector,
}

/// All terms of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct PodAffinity {
    pub required: Vec<AffinityTerm>,
    pub required_anti: Vec<AffinityTerm>,
    /// With weights, negative for anti-affinity.
    pub preferred: Vec<(i64, AffinityTerm)>,
}

impl Hash for AffinityTerm {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.topology_key, &self.namespaces).hash(state);
        for requirement in self.selector.requirements() {
            (&requirement.key, &requirement.values).hash(state);
        }
    }
}

impl PodAffinity {
    /// `None` if the pod has no such wishes.
    pub fn of(pod: &Pod) -> Option<PodAffinity> {
        let affinity = pod.spec.as_ref()?.affinity.as_ref()?;
        let (near, far) = (affinity.pod_affinity.as_ref(), affinity.pod_anti_affinity.as_ref());
        let parse = |terms: &Option<Vec<PodAffinityTerm>>| -> Vec<AffinityTerm> {
            terms.iter().flatten().map(|term| AffinityTerm::parse(term, pod)).collect()
        };
        let weighted = |terms: &Option<Vec<WeightedPodAffinityTerm>>, sign: i64| -> Vec<(i64, AffinityTerm)> {
            let terms = terms.iter().flatten();
            terms
                .map(|term| (sign * i64::from(term.weight), AffinityTerm::parse(&term.pod_affinity_term, pod)))
                .collect()
        };
        let mut parsed = PodAffinity::default();
        if let Some(near) = near {
            parsed.required = parse(&near.required_during_scheduling_ignored_during_execution);
            parsed.preferred = weighted(&near.preferred_during_scheduling_ignored_during_execution, 1);
        }
        if let Some(far) = far {
            parsed.required_anti = parse(&far.required_during_scheduling_ignored_during_execution);
            parsed.preferred.extend(weighted(&far.preferred_during_scheduling_ignored_during_execution, -1));
        }
        (parsed != PodAffinity::default()).then_some(parsed)
    }

    /// All terms, required and preferred.
    pub fn terms(&self) -> impl Iterator<Item = &AffinityTerm> {
        self.required.iter().chain(&self.required_anti).chain(self.preferred.iter().map(|(_, term)| term))
    }
}

impl AffinityTerm {
    /// As `newAffinityTerm`: without namespaces the pod's own is meant.
    fn parse(term: &PodAffinityTerm, pod: &Pod) -> AffinityTerm {
        let empty = BTreeMap::new();
        let labels = pod.metadata.labels.as_ref().unwrap_or(&empty);
        let parsed = term.label_selector.as_ref().and_then(|selector| Selector::from_label_selector(selector).ok());
        let mut selector = parsed.unwrap_or_else(Selector::nothing);
        let pin = |keys: &Option<Vec<String>>, operator: Operator| -> Vec<Requirement> {
            let keys = keys.iter().flatten();
            keys.filter_map(|key| Requirement::new(key, operator, vec![labels.get(key)?.clone()]).ok()).collect()
        };
        let mut pinned = pin(&term.match_label_keys, Operator::In);
        pinned.extend(pin(&term.mismatch_label_keys, Operator::NotIn));
        if !pinned.is_empty() && term.label_selector.is_some() {
            selector = Selector::from_requirements(selector.requirements().iter().cloned().chain(pinned).collect());
        }
        let mut namespaces: BTreeSet<String> = term.namespaces.iter().flatten().cloned().collect();
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.extend(pod.metadata.namespace.clone());
        }
        let namespace_selector = term.namespace_selector.as_ref();
        AffinityTerm {
            topology_key: term.topology_key.clone(),
            selector,
            namespaces,
            namespace_selector: namespace_selector
                .and_then(|selector| Selector::from_label_selector(selector).ok())
                .unwrap_or_else(Selector::nothing),
        }
    }

    /// Whether pods of a namespace come into question.
    pub fn covers(&self, namespace: &str, namespaces: &Namespaces) -> bool {
        self.namespaces.contains(namespace)
            || namespaces.get(namespace).is_some_and(|labels| self.namespace_selector.matches(labels))
    }

    /// Whether pods with these labels, of a namespace that is covered, are meant.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.selector.matches(labels)
    }
}
