//! What pods and volumes ask of nodes: node selectors, and tolerations of taints. One reading for the scheduler, the
//! DaemonSet controller and the kubelet's admission, so that they cannot disagree.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, PodSpec, Taint, Toleration};
use k8s_openapi::api::resource::v1::{DeviceTaint, DeviceToleration};

use crate::labels::{Operator, Requirement};

/// A parsed NodeSelectorTerm: all requirements hold together. One that does not parse, or is empty, matches nothing.
#[derive(Debug, Default)]
pub struct NodeTerm {
    labels: Vec<Requirement>,
    names: Vec<Requirement>,
    void: bool,
}

impl NodeTerm {
    pub fn parse(term: &NodeSelectorTerm) -> NodeTerm {
        let labels: Option<Vec<_>> = term.match_expressions.iter().flatten().map(on_label).collect();
        let names: Option<Vec<_>> = term.match_fields.iter().flatten().map(on_field).collect();
        match (labels, names) {
            (Some(labels), Some(names)) => NodeTerm { void: labels.is_empty() && names.is_empty(), labels, names },
            _ => NodeTerm { void: true, ..NodeTerm::default() },
        }
    }

    pub fn matches(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        !self.void
            && self.labels.iter().all(|required| required.matches(labels.get(&required.key).map(String::as_str)))
            && self.names.iter().all(|required| required.key == "metadata.name" && required.matches(Some(name)))
    }

    /// Whether it is empty or does not parse.
    pub fn is_void(&self) -> bool {
        self.void
    }

    /// The only nodes that the term can match, if it lists them by name.
    pub fn listed_names(&self) -> Option<&[String]> {
        let list = |required: &&Requirement| required.key == "metadata.name" && required.operator == Operator::In;
        self.names.iter().find(list).map(|required| required.values.as_slice())
    }
}

fn operator(required: &NodeSelectorRequirement) -> Option<Operator> {
    Some(match required.operator.as_str() {
        "In" => Operator::In,
        "NotIn" => Operator::NotIn,
        "Exists" => Operator::Exists,
        "DoesNotExist" => Operator::DoesNotExist,
        "Gt" => Operator::Gt,
        "Lt" => Operator::Lt,
        _ => return None,
    })
}

fn on_label(required: &NodeSelectorRequirement) -> Option<Requirement> {
    Requirement::new(&required.key, operator(required)?, required.values.clone().unwrap_or_default()).ok()
}

/// A field's values are names, which may be longer than a label's.
fn on_field(required: &NodeSelectorRequirement) -> Option<Requirement> {
    let operator = operator(required).filter(|operator| matches!(operator, Operator::In | Operator::NotIn))?;
    let mut values = required.values.clone().unwrap_or_default();
    values.sort_unstable();
    Some(Requirement { key: required.key.clone(), operator, values })
}

/// A NodeSelector: alternatives.
#[derive(Debug, Default)]
pub struct NodeTerms(Vec<NodeTerm>);

impl NodeTerms {
    pub fn of(selector: &NodeSelector) -> NodeTerms {
        NodeTerms(selector.node_selector_terms.iter().map(NodeTerm::parse).collect())
    }

    pub fn matches(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().any(|term| term.matches(name, labels))
    }

    /// The only nodes that can match, if every alternative lists them by name.
    pub fn listed_names(&self) -> Option<Vec<&String>> {
        let lists: Option<Vec<&[String]>> = self.0.iter().map(NodeTerm::listed_names).collect();
        lists.filter(|lists| !lists.is_empty()).map(|lists| lists.into_iter().flatten().collect())
    }
}

/// What a pod requires of its node: `nodeSelector`, and the required terms of its node affinity.
/// As `nodeaffinity.RequiredNodeAffinity`.
#[derive(Debug, Default)]
pub struct RequiredNodeAffinity {
    selector: BTreeMap<String, String>,
    /// `None` if there is no required affinity.
    pub terms: Option<NodeTerms>,
}

impl RequiredNodeAffinity {
    pub fn of(spec: &PodSpec) -> RequiredNodeAffinity {
        let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
        let required = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
        RequiredNodeAffinity {
            selector: spec.node_selector.clone().unwrap_or_default(),
            terms: required.map(NodeTerms::of),
        }
    }

    /// Whether nothing is required.
    pub fn is_empty(&self) -> bool {
        self.selector.is_empty() && self.terms.is_none()
    }

    pub fn matches(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        self.selector.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.terms.as_ref().is_none_or(|terms| terms.matches(name, labels))
    }
}

/// Whether the toleration covers the taint. As `Toleration.ToleratesTaint`.
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let covers = |wanted: &Option<String>, actual: &str| {
        wanted.as_deref().filter(|wanted| !wanted.is_empty()).is_none_or(|wanted| wanted == actual)
    };
    if !covers(&toleration.effect, &taint.effect) || !covers(&toleration.key, &taint.key) {
        return false;
    }
    let taint_value = taint.value.as_deref().unwrap_or_default();
    let value = toleration.value.as_deref().unwrap_or_default();
    match toleration.operator.as_deref().unwrap_or_default() {
        "" | "Equal" => value == taint_value,
        "Exists" => true,
        "Lt" | "Gt" => match (taint_value.parse::<i64>(), value.parse::<i64>()) {
            (Ok(taint_value), Ok(value)) if toleration.operator.as_deref() == Some("Lt") => taint_value < value,
            (Ok(taint_value), Ok(value)) => taint_value > value,
            _ => false,
        },
        _ => false,
    }
}

/// A device's taint, as one of a node: they work alike.
pub fn device_taint(taint: &DeviceTaint) -> Taint {
    Taint {
        key: taint.key.clone(),
        value: taint.value.clone(),
        effect: taint.effect.clone(),
        time_added: taint.time_added.clone(),
    }
}

/// What tolerates a device's taint, as what tolerates a node's.
pub fn device_toleration(toleration: &DeviceToleration) -> Toleration {
    Toleration {
        key: toleration.key.clone(),
        operator: toleration.operator.clone(),
        value: toleration.value.clone(),
        effect: toleration.effect.clone(),
        toleration_seconds: toleration.toleration_seconds,
    }
}

/// Whether one of the tolerations covers the taint. As `TolerationsTolerateTaint`.
pub fn tolerated(tolerations: &[Toleration], taint: &Taint) -> bool {
    tolerations.iter().any(|toleration| tolerates(toleration, taint))
}
