//! HorizontalPodAutoscalers, as autoscaling/v2 has them and as they are stored.

use crate::registry::checks::{self, Is, check};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata::{label, path_segment};
use crate::registry::object::{child, default, int, list, set, text};
use crate::registry::print::{self, Clock, UNKNOWN, UNSET};
use crate::registry::rules::Rules;
use crate::registry::workload;
use apimachinery::quantity::Quantity;
use apimachinery::status::FieldError;
use serde_json::{Value, json};

const WINDOW_MAX_SECONDS: i64 = 3600;
const PERIOD_MAX_SECONDS: i64 = 1800;

pub const RULES: Rules = Rules {
    default: defaults,
    validate_create: |root, errors| validate(root, None, errors),
    validate_update: |new, old, errors| validate(new, Some(old), errors),
    validate_status: |new, _, errors| workload::counts(new, &["currentReplicas", "desiredReplicas"], errors),
    row: Some(row),
    ..Rules::DEFAULT
};

/// As `SetDefaults_HorizontalPodAutoscaler` of v2.
fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    if spec.get("minReplicas").is_none() {
        set(spec, "minReplicas", 1);
    }
    if list(spec, "/metrics").is_empty() {
        let cpu = json!([{"type": "Resource", "resource": {"name": "cpu",
            "target": {"type": "Utilization", "averageUtilization": 80}}}]);
        set(spec, "metrics", cpu);
    }
    if spec.get("behavior").is_some() {
        let behavior = child(spec, "behavior");
        let up = json!([{"type": "Pods", "value": 4, "periodSeconds": 15}, {"type": "Percent", "value": 100, "periodSeconds": 15}]);
        let down = json!([{"type": "Percent", "value": 100, "periodSeconds": 15}]);
        for (direction, policies) in [("scaleUp", up), ("scaleDown", down)] {
            let rules = child(behavior, direction);
            default(rules, "selectPolicy", "Max");
            if list(rules, "/policies").is_empty() {
                set(rules, "policies", policies);
            }
            if direction == "scaleUp" && rules.get("stabilizationWindowSeconds").is_none() {
                set(rules, "stabilizationWindowSeconds", 0);
            }
        }
    }
}

fn validate(root: &Field<'_, '_>, old: Option<&Field<'_, '_>>, errors: &mut Errors) {
    let spec = root.at("spec");
    let (low, high) = (spec.at("minReplicas"), spec.at("maxReplicas"));
    // Scaling to nothing is not on offer, but what has it keeps it.
    let bound = if old.is_some_and(|old| int(old.value, "/spec/minReplicas") == Some(0)) { 0 } else { 1 };
    if low.int().is_some_and(|n| n < bound) {
        errors.invalid(&low, format!("must be greater than or equal to {bound}"));
    }
    let most = high.int().unwrap_or(0);
    let wrong = [
        (most < 1, "must be greater than 0"),
        (most < low.int().unwrap_or(0), "must be greater than or equal to `minReplicas`"),
    ];
    for (_, why) in wrong.iter().filter(|(wrong, _)| *wrong) {
        errors.0.push(FieldError::invalid(high.path(), most, *why));
    }
    check(
        &spec,
        &[
            ("scaleTargetRef.kind", Is::RequiredName(path_segment)),
            ("scaleTargetRef.name", Is::RequiredName(path_segment)),
        ],
        errors,
    );
    let metrics = spec.at("metrics");
    metrics.items().for_each(|item| metric(&item, errors));
    let scales_by_others = metrics.items().any(|m| matches!(m.at("type").str(), "Object" | "External"));
    if low.int() == Some(0) && !scales_by_others {
        errors.forbidden(
            &metrics,
            "must specify at least one Object or External metric to support scaling to zero replicas",
        );
    }
    let behavior = spec.at("behavior");
    scaling_rules(&behavior.at("scaleUp"), errors);
    scaling_rules(&behavior.at("scaleDown"), errors);
}

/// Kinds of metrics: as `type` names them, and their field.
const SOURCES: [(&str, &str); 5] = [
    ("Object", "object"),
    ("External", "external"),
    ("Pods", "pods"),
    ("Resource", "resource"),
    ("ContainerResource", "containerResource"),
];

/// As `validateMetricSpec`.
fn metric(metric: &Field<'_, '_>, errors: &mut Errors) {
    let kind = metric.at("type");
    if kind.is_blank() {
        errors.required(&kind, "must specify a metric source type");
    }
    let expected = SOURCES.iter().find(|(name, _)| *name == kind.str()).map(|(_, field)| *field);
    if expected.is_none() {
        errors.not_supported(&kind, &["ContainerResource", "External", "Object", "Pods", "Resource"]);
    }
    let present: Vec<&str> =
        SOURCES.iter().map(|(_, field)| *field).filter(|field| metric.at(field).is_set()).collect();
    if let Some(first) = present.first() {
        source(first, &metric.at(first), errors);
    }
    if let Some(expected) = expected.filter(|expected| !present.contains(expected)) {
        errors.required(&metric.at(expected), "must populate information for the given metric source");
    }
    if present.len() != 1 {
        for other in present.iter().filter(|field| Some(**field) != expected) {
            errors.forbidden(&metric.at(other), "must populate the given metric source only");
        }
    }
}

fn source(kind: &str, source: &Field<'_, '_>, errors: &mut Errors) {
    let (identifier, target) = (source.at("metric"), source.at("target"));
    let (name, metric_name) = (source.at("name"), identifier.at("name"));
    match kind {
        "resource" | "containerResource" if name.is_blank() => errors.required(&name, "must specify a resource name"),
        "resource" | "containerResource" => {}
        _ if metric_name.is_blank() => errors.required(&metric_name, "must specify a metric name"),
        _ => errors.all(&metric_name, path_segment(metric_name.str())),
    }
    if kind == "object" {
        let of = source.at("describedObject");
        for part in ["kind", "name"] {
            Is::RequiredName(path_segment).check(&of.at(part), errors);
        }
    }
    if kind == "containerResource" {
        let container = source.at("container");
        if container.is_blank() {
            errors.required(&container, "must specify a container");
        }
        Is::Named(label).check(&container, errors);
    }
    metric_target(&target, errors);
    let (value, average, utilization) =
        (target.at("value"), target.at("averageValue"), target.at("averageUtilization"));
    let (has_value, has_average) = (value.is_set(), average.is_set());
    match kind {
        "object" if !has_value && !has_average => {
            errors.required(&average, "must set either a target value or averageValue")
        }
        "external" if !has_value && !has_average => {
            errors.required(&average, "must set either a target value for metric or a per-pod target");
        }
        "external" if has_value && has_average => {
            errors.forbidden(&value, "may not set both a target value for metric and a per-pod target");
        }
        "pods" if !has_average => errors.required(&average, "must specify a positive target averageValue"),
        "resource" | "containerResource" => match (utilization.is_set(), has_average) {
            (false, false) => {
                errors.required(&utilization, "must set either a target raw value or a target utilization");
            }
            (true, true) => {
                errors.forbidden(&average, "may not set both a target raw value and a target utilization");
            }
            _ => {}
        },
        _ => {}
    }
}

fn metric_target(target: &Field<'_, '_>, errors: &mut Errors) {
    let (kind, utilization) = (target.at("type"), target.at("averageUtilization"));
    if kind.is_blank() {
        errors.required(&kind, "must specify a metric target type");
    }
    if !matches!(kind.str(), "Utilization" | "Value" | "AverageValue") {
        errors.invalid(&kind, "must be either Utilization, Value, or AverageValue");
    }
    for name in ["value", "averageValue"] {
        let field = target.at(name);
        if Quantity::parse(field.str()).is_ok_and(|quantity| quantity <= Quantity::ZERO) {
            errors.invalid(&field, "must be positive");
        }
    }
    if utilization.int().is_some_and(|n| n < 1) {
        errors.invalid(&utilization, "must be greater than 0");
    }
}

/// As `validateScalingRules`.
fn scaling_rules(rules: &Field<'_, '_>, errors: &mut Errors) {
    if !rules.is_set() {
        return;
    }
    let seconds = |field: &Field<'_, '_>, low: i64, why: &str, most: i64, errors: &mut Errors| match field.int() {
        Some(n) if n < low => errors.invalid(field, why),
        Some(n) if n > most => errors.invalid(field, format!("must be less than or equal to {most}")),
        _ => {}
    };
    let window = rules.at("stabilizationWindowSeconds");
    seconds(&window, 0, "must be greater than or equal to zero", WINDOW_MAX_SECONDS, errors);
    errors.one_of(&rules.at("selectPolicy"), &["Disabled", "Max", "Min"]);
    let (policies, tolerance) = (rules.at("policies"), rules.at("tolerance"));
    if policies.is_empty() {
        errors.required(&policies, "must specify at least one Policy");
    }
    for policy in policies.items() {
        let (kind, value) = (policy.at("type"), policy.at("value"));
        if !matches!(kind.str(), "Pods" | "Percent") {
            errors.not_supported(&kind, &["Percent", "Pods"]);
        }
        if value.int().unwrap_or(0) <= 0 {
            errors.invalid(&value, "must be greater than zero");
        }
        seconds(&policy.at("periodSeconds"), 1, "must be greater than zero", PERIOD_MAX_SECONDS, errors);
    }
    checks::not_negative_quantity(&tolerance, errors);
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let reference =
        format!("{}/{}", text(object, "/spec/scaleTargetRef/kind"), text(object, "/spec/scaleTargetRef/name"));
    let low = int(object, "/spec/minReplicas").map_or(UNSET.to_owned(), |n| n.to_string());
    vec![
        print::name(object),
        Value::from(reference),
        Value::from(targets(object)),
        Value::from(low),
        Value::from(int(object, "/spec/maxReplicas").unwrap_or(0)),
        Value::from(int(object, "/status/currentReplicas").unwrap_or(0)),
        clock.age(object),
    ]
}

/// As `formatHPAMetrics`: what is, of what should be.
fn targets(object: &Value) -> String {
    const SHOWN_MAX: usize = 2;
    let current = list(object, "/status/currentMetrics");
    let metrics = list(object, "/spec/metrics");
    if metrics.is_empty() {
        return print::NONE.to_owned();
    }
    let one = |(at, metric): (usize, &Value)| {
        let (field, name) = match text(metric, "/type") {
            "Resource" => ("resource", text(metric, "/resource/name").to_owned()),
            "ContainerResource" => ("containerResource", text(metric, "/containerResource/name").to_owned()),
            "Pods" => ("pods", String::new()),
            "Object" => ("object", String::new()),
            _ => ("external", String::new()),
        };
        let target = metric.pointer(&format!("/{field}/target")).cloned().unwrap_or_default();
        let now = current.get(at).and_then(|c| c.pointer(&format!("/{field}/current"))).cloned().unwrap_or_default();
        let prefix = if name.is_empty() { name } else { format!("{name}: ") };
        if let Some(wanted) = int(&target, "/averageUtilization") {
            let now = int(&now, "/averageUtilization").map_or(UNKNOWN.to_owned(), |n| format!("{n}%"));
            return format!("{prefix}{now}/{wanted}%");
        }
        let average = text(&target, "/averageValue");
        let (key, wanted, suffix) = if average.is_empty() {
            ("/value", text(&target, "/value"), "")
        } else {
            ("/averageValue", average, " (avg)")
        };
        let suffix = if matches!(field, "external" | "object") { suffix } else { "" };
        let now = text(&now, key);
        format!("{prefix}{}/{wanted}{suffix}", if now.is_empty() { UNKNOWN } else { now })
    };
    let mut texts: Vec<String> = metrics.iter().enumerate().map(one).collect();
    let more = texts.len().saturating_sub(SHOWN_MAX);
    texts.truncate(SHOWN_MAX);
    let text = texts.join(", ");
    if more > 0 { format!("{text} + {more} more...") } else { text }
}
