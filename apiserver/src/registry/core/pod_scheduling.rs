//! What a pod's spec says of where it may run: affinity, tolerations, spreading. As `validateAffinity` and its kin.

use crate::registry::field::{Errors, Field};
use crate::registry::metadata::{self, LabelValues};
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain, is_label_value, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::{Value, json};

pub const TAINT_EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];

/// As `ValidateTolerations`.
pub fn tolerations(tolerations: &Field<'_, '_>, errors: &mut Errors) {
    for toleration in tolerations.items() {
        let (key, operator, value) = (toleration.at("key"), toleration.at("operator"), toleration.at("value"));
        let effect = toleration.at("effect");
        errors.named(&key, is_qualified_name);
        if key.is_blank() && operator.str() != "Exists" {
            errors.invalid(
                &operator,
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            );
        }
        if toleration.at("tolerationSeconds").is_set() && effect.str() != "NoExecute" {
            errors.invalid(&effect, "effect must be 'NoExecute' when `tolerationSeconds` is set");
        }
        match operator.str() {
            "" | "Equal" => {
                let messages = is_label_value(value.str());
                if !messages.is_empty() {
                    errors.invalid_as(&operator, value.str(), messages.join(";"));
                }
            }
            "Exists" if !value.is_blank() => {
                errors.invalid_as(&operator, value.str(), "value must be empty when `operator` is 'Exists'");
            }
            "Exists" => {}
            _ => errors.not_supported(&operator, &["Equal", "Exists"]),
        }
        if !effect.is_blank() {
            errors.one_of(&effect, &TAINT_EFFECTS);
        }
    }
}

/// As `validateAffinity`.
pub fn affinity(affinity: &Field<'_, '_>, errors: &mut Errors) {
    if !affinity.is_set() {
        return;
    }
    let node = affinity.at("nodeAffinity");
    let required = node.at("requiredDuringSchedulingIgnoredDuringExecution");
    if required.is_set() {
        node_selector(&required, errors);
    }
    for preferred in node.at("preferredDuringSchedulingIgnoredDuringExecution").items() {
        weight(&preferred, errors);
        node_selector_term(&preferred.at("preference"), LabelValues::Any, errors);
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        let pods = affinity.at(kind);
        for term in pods.at("requiredDuringSchedulingIgnoredDuringExecution").items() {
            pod_affinity_term(&term, errors);
        }
        for preferred in pods.at("preferredDuringSchedulingIgnoredDuringExecution").items() {
            weight(&preferred, errors);
            pod_affinity_term(&preferred.at("podAffinityTerm"), errors);
        }
    }
}

fn weight(preferred: &Field<'_, '_>, errors: &mut Errors) {
    let weight = preferred.at("weight");
    let number = weight.int().unwrap_or(0);
    if !(1..=100).contains(&number) {
        errors.invalid_as(&weight, number, "must be in the range 1-100");
    }
}

/// As `ValidateNodeSelector`.
pub fn node_selector(selector: &Field<'_, '_>, errors: &mut Errors) {
    let terms = selector.at("nodeSelectorTerms");
    if terms.is_empty() {
        errors.required(&terms, "must have at least one node selector term");
    }
    for term in terms.items() {
        node_selector_term(&term, LabelValues::Checked, errors);
    }
}

/// As `ValidateNodeSelectorTerm`.
pub fn node_selector_term(term: &Field<'_, '_>, label_values: LabelValues, errors: &mut Errors) {
    for requirement in term.at("matchExpressions").items() {
        metadata::requirement(&requirement, &["Gt", "Lt"], label_values, errors);
    }
    for requirement in term.at("matchFields").items() {
        let (key, operator, values) = (requirement.at("key"), requirement.at("operator"), requirement.at("values"));
        if !matches!(operator.str(), "In" | "NotIn") {
            errors.invalid(&operator, "not a valid selector operator");
        } else if values.len() != 1 {
            errors
                .required(&values, "must be only one value when `operator` is 'In' or 'NotIn' for node field selector");
        }
        if key.str() != "metadata.name" {
            errors.invalid(&key, "not a valid field selector key");
            continue;
        }
        for value in values.items() {
            errors.all(&value, is_dns1123_subdomain(value.str()));
        }
    }
}

fn pod_affinity_term(term: &Field<'_, '_>, errors: &mut Errors) {
    let selector = term.at("labelSelector");
    metadata::label_selector(&selector, errors);
    metadata::label_selector(&term.at("namespaceSelector"), errors);
    for namespace in term.at("namespaces").items() {
        // It is named so, whatever the field is called.
        let shown = term.at("namespace");
        for message in is_dns1123_label(namespace.str()) {
            errors.invalid_as(&shown, namespace.str(), message);
        }
    }
    let (matched, mismatched) = (term.at("matchLabelKeys"), term.at("mismatchLabelKeys"));
    label_keys(&matched, &selector, errors);
    label_keys(&mismatched, &selector, errors);
    for (at, key) in twice_selected(&matched, &selector) {
        errors.0.push(FieldError::invalid(
            format!("{}[{at}]", term.path()),
            key,
            "exists in both matchLabelKeys and labelSelector",
        ));
    }
    for key in matched.items() {
        if mismatched.items().any(|other| other.str() == key.str()) {
            errors.invalid(&key, "exists in both matchLabelKeys and mismatchLabelKeys");
        }
    }
    let key = term.at("topologyKey");
    if key.is_blank() {
        errors.required(&key, "can not be empty");
    }
    errors.all(&key, is_qualified_name(key.str()));
}

/// As `validateLabelKeys`.
fn label_keys(keys: &Field<'_, '_>, selector: &Field<'_, '_>, errors: &mut Errors) {
    if keys.is_empty() {
        return;
    }
    if !selector.is_set() {
        errors.forbidden(keys, "must not be specified when labelSelector is not set");
        return;
    }
    for key in keys.items() {
        errors.all(&key, is_qualified_name(key.str()));
    }
}

/// Keys that the selector names besides the requirement that was written out for them, and where in `keys` they stand.
fn twice_selected<'v>(keys: &Field<'_, 'v>, selector: &Field<'_, '_>) -> Vec<(usize, &'v str)> {
    if keys.is_empty() {
        return Vec::new();
    }
    let expressions = selector.value.get("matchExpressions").and_then(Value::as_array);
    let mut seen: Vec<&str> =
        selector.value.get("matchLabels").and_then(Value::as_object).into_iter().flatten().map(|(k, _)| &**k).collect();
    let mut found = Vec::new();
    for expression in expressions.into_iter().flatten() {
        let key = expression.get("key").and_then(Value::as_str).unwrap_or("");
        if seen.contains(&key) {
            found.extend(keys.items().enumerate().filter(|(_, k)| k.str() == key).map(|(at, k)| (at, k.str())));
        }
        seen.push(key);
    }
    found
}

/// As `validateTopologySpreadConstraints`.
pub fn topology_spread(constraints: &Field<'_, '_>, errors: &mut Errors) {
    for (at, constraint) in constraints.items().enumerate() {
        let (key, when) = (constraint.at("topologyKey"), constraint.at("whenUnsatisfiable"));
        errors.above_zero(&constraint.at("maxSkew"));
        if key.is_blank() {
            errors.required(&key, "can not be empty");
        }
        if !matches!(when.str(), "DoNotSchedule" | "ScheduleAnyway") {
            errors.not_supported(&when, &["DoNotSchedule", "ScheduleAnyway"]);
        }
        let same = |c: &Field<'_, '_>| {
            c.value.get("topologyKey") == constraint.value.get("topologyKey")
                && c.value.get("whenUnsatisfiable") == constraint.value.get("whenUnsatisfiable")
        };
        if constraints.items().skip(at + 1).any(|c| same(&c)) {
            let pair = constraint.at("{topologyKey, whenUnsatisfiable}");
            errors.0.push(FieldError::duplicate(pair.path(), format!("{{{}, {}}}", key.str(), when.str())));
        }
        let domains = constraint.at("minDomains");
        if domains.is_set() {
            errors.above_zero(&domains);
            if when.str() != "DoNotSchedule" {
                errors.invalid(
                    &domains,
                    format!("can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {}", when.str()),
                );
            }
        }
        for policy in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            errors.one_of(&constraint.at(policy), &["Honor", "Ignore"]);
        }
        let (selector, keys) = (constraint.at("labelSelector"), constraint.at("matchLabelKeys"));
        label_keys(&keys, &selector, errors);
        for (at, key) in twice_selected(&keys, &selector) {
            errors.0.push(FieldError::invalid(
                format!("{}[{at}]", keys.path()),
                key,
                "exists in both matchLabelKeys and labelSelector",
            ));
        }
        metadata::label_selector(&selector, errors);
    }
}

// === changes of gated pods ===

/// Only additions. As `validateNodeSelectorMutation`.
pub fn node_selector_additions(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    if old.entries().any(|(key, value)| new.value.get(key) != Some(value.value)) {
        let shown = if new.is_set() { new.value.clone() } else { json!({}) };
        errors.invalid_as(new, shown, "only additions to spec.nodeSelector are allowed (no mutations or deletions)");
    }
}

/// As `validateNodeAffinityMutation`: a pod that waits at a gate may be narrowed further.
pub fn node_affinity_additions(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
    let (required, before) = (new.at(REQUIRED), old.at(REQUIRED));
    let (terms, old_terms) = (required.at("nodeSelectorTerms"), before.at("nodeSelectorTerms"));
    if old_terms.is_empty() {
        return;
    }
    if terms.len() != old_terms.len() {
        let shown = if terms.is_set() { terms.value.clone() } else { Value::Null };
        let why = "no additions/deletions to non-empty NodeSelectorTerms list are allowed";
        errors.0.push(FieldError::invalid(terms.path(), shown, why));
        return;
    }
    for (term, old_term) in terms.items().zip(old_terms.items()) {
        if !only_adds(term.value, old_term.value) {
            errors.invalid(&term, "only additions are allowed (no mutations or deletions)");
        }
    }
}

fn only_adds(new: &Value, old: &Value) -> bool {
    let list = |term: &Value, field: &str| term.get(field).and_then(Value::as_array).cloned().unwrap_or_default();
    let fields = ["matchExpressions", "matchFields"];
    if fields.iter().all(|field| list(old, field).is_empty()) {
        return fields.iter().all(|field| list(new, field).is_empty());
    }
    fields.iter().all(|field| list(new, field).starts_with(&list(old, field)))
}
