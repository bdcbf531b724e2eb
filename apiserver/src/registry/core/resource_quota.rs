//! ResourceQuotas.

use super::resources;
use crate::registry::field::{Errors, Field};
use crate::registry::object::map;
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::Value;
use std::collections::BTreeSet;

const SCOPES: [&str; 7] = [
    "BestEffort",
    "CrossNamespacePodAffinity",
    "NotBestEffort",
    "NotTerminating",
    "PriorityClass",
    "Terminating",
    "VolumeAttributesClass",
];

const FOR_EXISTS: [&str; 5] =
    ["BestEffort", "CrossNamespacePodAffinity", "NotBestEffort", "NotTerminating", "Terminating"];

pub const RULES: Rules = Rules {
    validate,
    validate_update: |new, old, errors| {
        let (now, was) = (new.at("spec"), old.at("spec"));
        let set = |scopes: &Field<'_, '_>| scopes.items().map(|s| s.str().to_owned()).collect::<BTreeSet<_>>();
        let scopes = now.at("scopes");
        if set(&scopes) != set(&was.at("scopes")) {
            errors.invalid(&scopes, "field is immutable");
        }
    },
    validate_status: |new, _, errors| {
        let status = new.at("status");
        for field in ["hard", "used"] {
            resources::amounts(&status.at(field), resources::quota_name, errors);
        }
    },
    row: Some(row),
    ..Rules::DEFAULT
};

/// As `ValidateResourceQuotaSpec`.
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let hard = spec.at("hard");
    resources::amounts(&hard, resources::quota_name, errors);
    let names: Vec<&str> =
        spec.value.get("hard").and_then(Value::as_object).into_iter().flatten().map(|(n, _)| &**n).collect();
    let scopes = spec.at("scopes");
    for scope in scopes.items() {
        if !SCOPES.contains(&scope.str()) {
            errors.invalid(&scopes, "unsupported scope");
        }
        for _ in names.iter().filter(|name| !applies(scope.str(), name)) {
            errors.invalid(&scopes, "unsupported scope applied to resource");
        }
    }
    let named: Vec<&str> =
        spec.value.get("scopes").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    conflicting(&named, &scopes, &scopes, errors);
    selector(&spec, &names, errors);
}

/// As `validateScopedResourceSelectorRequirement`.
fn selector(spec: &Field<'_, '_>, names: &[&str], errors: &mut Errors) {
    let selector = spec.at("scopeSelector");
    let expressions = selector.at("matchExpressions");
    let mut named = Vec::new();
    for requirement in expressions.items() {
        let (scope, operator, values) =
            (requirement.at("scopeName"), requirement.at("operator"), requirement.at("values"));
        let (scope_at, operator_at, values_at) =
            (expressions.at("scopeName"), expressions.at("operator"), expressions.at("values"));
        if !SCOPES.contains(&scope.str()) {
            errors.invalid_as(&scope_at, scope.str(), "unsupported scope");
        }
        for _ in names.iter().filter(|name| !applies(scope.str(), name)) {
            errors.invalid_as(&expressions, selector.value.clone(), "unsupported scope applied to resource");
        }
        if FOR_EXISTS.contains(&scope.str()) && operator.str() != "Exists" {
            errors.invalid_as(
                &operator_at,
                operator.str(),
                "must be 'Exists' when scope is any of ResourceQuotaScopeTerminating, ResourceQuotaScopeNotTerminating, ResourceQuotaScopeBestEffort, ResourceQuotaScopeNotBestEffort or ResourceQuotaScopeCrossNamespacePodAffinity",
            );
        }
        match operator.str() {
            "In" | "NotIn" if values.is_empty() => errors.required(
                &values_at,
                "must be at least one value when `operator` is 'In' or 'NotIn' for scope selector",
            ),
            "Exists" | "DoesNotExist" if !values.is_empty() => errors.invalid_as(
                &values_at,
                values.value.clone(),
                "must be no value when `operator` is 'Exist' or 'DoesNotExist' for scope selector",
            ),
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            _ => errors.invalid_as(&operator_at, operator.str(), "not a valid selector operator"),
        }
        named.push(scope.str().to_owned());
    }
    let named: Vec<&str> = named.iter().map(String::as_str).collect();
    conflicting(&named, &expressions, &spec.at("scopes"), errors);
}

fn conflicting(named: &[&str], place: &Field<'_, '_>, scopes: &Field<'_, '_>, errors: &mut Errors) {
    for pair in [["BestEffort", "NotBestEffort"], ["Terminating", "NotTerminating"]] {
        if pair.iter().all(|scope| named.contains(scope)) {
            errors.invalid_as(place, scopes.value.clone(), "conflicting scopes");
        }
    }
}

/// May a scope narrow what is counted of this resource? As `IsResourceQuotaScopeValidForResource`.
fn applies(scope: &str, name: &str) -> bool {
    const COMPUTE: [&str; 6] = ["cpu", "memory", "limits.cpu", "limits.memory", "requests.cpu", "requests.memory"];
    if !resources::is_standard_quota(name) {
        return true;
    }
    match scope {
        "BestEffort" => name == "pods",
        "Terminating" | "NotTerminating" | "NotBestEffort" | "PriorityClass" | "CrossNamespacePodAffinity" => {
            name == "pods" || COMPUTE.contains(&name)
        }
        "VolumeAttributesClass" => matches!(name, "persistentvolumeclaims" | "requests.storage"),
        _ => true,
    }
}

/// As `printResourceQuota`.
fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let (mut requests, mut limits) = (Vec::new(), Vec::new());
    for name in map(object, "/spec/hard").into_iter().flatten().map(|(name, _)| name) {
        let amount = |of: &str| object.pointer(of).and_then(|m| m.get(name)).and_then(Value::as_str).unwrap_or("0");
        let text = format!("{name}: {}/{}", amount("/status/used"), amount("/status/hard"));
        if name.starts_with("limits") { limits.push(text) } else { requests.push(text) }
    }
    vec![print::name(object), Value::from(requests.join(", ")), Value::from(limits.join(", ")), clock.age(object)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn scopes_go_with_what_they_narrow() {
        let found = |spec: Value| {
            let object = json!({ "spec": spec });
            let mut errors = Errors::default();
            validate(&Field::root(&object), &mut errors);
            errors.0.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let fine = json!({"hard": {"pods": "1", "requests.nvidia.com/gpu": "1", "count/jobs.batch": "2"}, "scopes": ["BestEffort"]});
        assert_eq!(found(fine), Vec::<String>::new());
        for (spec, error) in [
            (
                json!({"hard": {"bogus": "1"}}),
                "spec.hard[bogus]: Invalid value: \"bogus\": must be a standard resource for quota",
            ),
            (json!({"hard": {"pods": "500m"}}), "spec.hard[pods]: Invalid value: \"500m\": must be an integer"),
            (
                json!({"hard": {"pods": "-1"}}),
                "spec.hard[pods]: Invalid value: \"-1\": must be greater than or equal to 0",
            ),
            (json!({"scopes": ["X"]}), "spec.scopes: Invalid value: [\"X\"]: unsupported scope"),
            (
                json!({"hard": {"cpu": "1"}, "scopes": ["BestEffort"]}),
                "spec.scopes: Invalid value: [\"BestEffort\"]: unsupported scope applied to resource",
            ),
            (
                json!({"scopes": ["Terminating", "NotTerminating"]}),
                "spec.scopes: Invalid value: [\"Terminating\",\"NotTerminating\"]: conflicting scopes",
            ),
            (
                json!({"scopeSelector": {"matchExpressions": [{"scopeName": "PriorityClass", "operator": "In"}]}}),
                "spec.scopeSelector.matchExpressions.values: Required value: must be at least one value when `operator` is 'In' or 'NotIn' for scope selector",
            ),
            (
                json!({"scopeSelector": {"matchExpressions": [{"scopeName": "PriorityClass", "operator": "x"}]}}),
                "spec.scopeSelector.matchExpressions.operator: Invalid value: \"x\": not a valid selector operator",
            ),
        ] {
            let errors = found(spec);
            assert!(errors.iter().any(|e| e == error), "{error}: {errors:?}");
        }
    }
}
