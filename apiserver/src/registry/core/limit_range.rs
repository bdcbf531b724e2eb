//! LimitRanges.

use super::resources;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, items_mut, set};
use crate::registry::rules::Rules;
use apimachinery::names::is_qualified_name;
use apimachinery::quantity::Quantity;
use serde_json::Value;

pub const RULES: Rules = Rules {
    default: defaults,
    // It need not have a name given.
    prepare_create: |object| default(child(object, "metadata"), "name", uuid::Uuid::new_v4().to_string()),
    create_on_update: true,
    validate,
    ..Rules::DEFAULT
};

/// As `SetDefaults_LimitRangeItem`: a default is no more than the maximum, a default request what is the limit.
fn defaults(object: &mut Value) {
    for item in items_mut(child(object, "spec"), "limits").filter(|item| item["type"] == "Container") {
        for (to, from) in [("default", "max"), ("defaultRequest", "default"), ("defaultRequest", "min")] {
            let source = item.get(from).and_then(Value::as_object).cloned().unwrap_or_default();
            for (name, amount) in source {
                if child(item, to).get(&name).is_none() {
                    set(child(item, to), &name, amount);
                }
            }
        }
    }
}

/// Amounts of which the first may not be greater than the second; where the error stands, and how it calls the two.
const ORDER: [(&str, &str, &str, &str, &str); 6] = [
    ("min", "max", "min", "min value", "max value"),
    ("min", "defaultRequest", "defaultRequest", "min value", "default request value"),
    ("defaultRequest", "max", "defaultRequest", "default request value", "max value"),
    ("defaultRequest", "default", "defaultRequest", "default request value", "default limit value"),
    ("min", "default", "default", "min value", "default value"),
    ("default", "max", "default", "default value", "max value"),
];

/// As `ValidateLimitRange`.
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let limits = spec.at("limits");
    for (at, item) in limits.items().enumerate() {
        let kind = item.at("type");
        let messages = is_qualified_name(kind.str());
        if messages.is_empty()
            && !kind.str().contains('/')
            && !matches!(kind.str(), "Pod" | "Container" | "PersistentVolumeClaim")
        {
            errors.invalid(&kind, "must be a standard limit type or fully qualified");
        }
        errors.all(&kind, messages);
        if limits.items().take(at).any(|other| other.at("type").str() == kind.str()) {
            errors.duplicate(&kind);
        }
        limit(&item, kind.str(), errors);
    }
}

fn limit(item: &Field<'_, '_>, kind: &str, errors: &mut Errors) {
    let check = if matches!(kind, "Pod" | "Container") { resources::container_name } else { resources::name };
    let mut names: Vec<&str> = Vec::new();
    for field in ["max", "min", "default", "defaultRequest", "maxLimitRequestRatio"] {
        let list = item.at(field);
        if kind == "Pod" && field.starts_with("default") {
            if !list.is_empty() {
                errors.forbidden(&list, "may not be specified when `type` is 'Pod'");
            }
            continue;
        }
        for (name, amount) in list.entries() {
            check(&amount, name, errors);
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    if kind == "PersistentVolumeClaim" && !["min", "max"].iter().any(|field| item.at(field).key("storage").is_set()) {
        let why = "either minimum or maximum storage value is required, but neither was provided";
        errors.required(&item.at("limits"), why);
    }
    for name in names {
        amounts(item, name, errors);
    }
}

fn amounts(item: &Field<'_, '_>, name: &str, errors: &mut Errors) {
    let text = |field: &str| item.value.get(field)?.get(name)?.as_str();
    let amount = |field: &str| Quantity::parse(text(field)?).ok();
    for (low, high, place, low_name, high_name) in ORDER {
        if let (Some(least), Some(most)) = (amount(low), amount(high))
            && least > most
        {
            let list = item.at(place);
            // The values that Kubernetes shows here are not those of the field.
            let shown = if place == "default" && high == "max" {
                text(high)
            } else if place == "default" {
                text(low)
            } else {
                text(place)
            };
            let why = format!("{low_name} {least} is greater than {high_name} {most}");
            errors.invalid_as(&list.key(name), shown.unwrap_or(""), why);
        }
    }
    let ratios = item.at("maxLimitRequestRatio");
    if let Some(ratio) = amount("maxLimitRequestRatio") {
        let place = ratios.key(name);
        if ratio < Quantity::from_value(1) {
            errors.invalid(&place, format!("ratio {ratio} is less than 1"));
        }
        if let (Some(min), Some(max)) = (amount("min"), amount("max")) {
            let (ratio_milli, most) =
                (ratio.milli_value() as f64 / 1000.0, max.milli_value() as f64 / min.milli_value() as f64);
            if ratio_milli > most {
                errors.invalid(&place, format!("ratio {ratio} is greater than max/min = {most:.6}"));
            }
        }
    }
    if let (Some(limit), Some(request)) = (amount("default"), amount("defaultRequest"))
        && !resources::overcommittable(name)
        && limit != request
    {
        let list = item.at("defaultRequest");
        let why = format!("default value {limit} must equal to defaultRequest value {request} in {name}");
        errors.invalid(&list.key(name), why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn limits_are_ordered_and_of_known_kinds() {
        let found = |limits: Value| {
            let object = json!({"spec": {"limits": limits}});
            let mut errors = Errors::default();
            validate(&Field::root(&object), &mut errors);
            errors.0.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            found(json!([{"type": "Container", "min": {"cpu": "1"}, "max": {"cpu": "2"}}])),
            Vec::<String>::new()
        );
        for (limits, error) in [
            (
                json!([{"type": "Node"}]),
                "spec.limits[0].type: Invalid value: \"Node\": must be a standard limit type or fully qualified",
            ),
            (json!([{"type": "Pod"}, {"type": "Pod"}]), "spec.limits[1].type: Duplicate value: \"Pod\""),
            (
                json!([{"type": "Pod", "default": {"cpu": "1"}}]),
                "spec.limits[0].default: Forbidden: may not be specified when `type` is 'Pod'",
            ),
            (
                json!([{"type": "PersistentVolumeClaim"}]),
                "spec.limits[0].limits: Required value: either minimum or maximum storage value is required, but neither was provided",
            ),
            (
                json!([{"type": "Pod", "min": {"cpu": "2"}, "max": {"cpu": "1"}}]),
                "spec.limits[0].min[cpu]: Invalid value: \"2\": min value 2 is greater than max value 1",
            ),
            (
                json!([{"type": "Container", "defaultRequest": {"cpu": "2"}, "default": {"cpu": "1"}}]),
                "spec.limits[0].defaultRequest[cpu]: Invalid value: \"2\": default request value 2 is greater than default limit value 1",
            ),
            (
                json!([{"type": "Container", "default": {"cpu": "2"}, "max": {"cpu": "1"}}]),
                "spec.limits[0].default[cpu]: Invalid value: \"1\": default value 2 is greater than max value 1",
            ),
            (
                json!([{"type": "Container", "maxLimitRequestRatio": {"cpu": "500m"}}]),
                "spec.limits[0].maxLimitRequestRatio[cpu]: Invalid value: \"500m\": ratio 500m is less than 1",
            ),
            (
                json!([{"type": "Container", "min": {"cpu": "1"}, "max": {"cpu": "2"}, "maxLimitRequestRatio": {"cpu": "3"}}]),
                "spec.limits[0].maxLimitRequestRatio[cpu]: Invalid value: \"3\": ratio 3 is greater than max/min = 2.000000",
            ),
            (
                json!([{"type": "Container", "max": {"storage": "1"}}]),
                "spec.limits[0].max[storage]: Invalid value: \"storage\": must be a standard resource for containers",
            ),
        ] {
            let errors = found(limits);
            assert!(errors.iter().any(|e| e == error), "{error}: {errors:?}");
        }
    }
}
