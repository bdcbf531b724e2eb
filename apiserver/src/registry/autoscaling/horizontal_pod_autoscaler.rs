//! HorizontalPodAutoscalers: stored as autoscaling/v2; autoscaling/v1 shows the cpu metric by fields of its own and the
//! rest in annotations, as Kubernetes converts them.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, int, list, remove, set, text};
use crate::registry::print::{self, Clock, UNKNOWN, UNSET};
use crate::registry::rules::Rules;
use serde_json::{Value, json};

const METRICS_ANNOTATION: &str = "autoscaling.alpha.kubernetes.io/metrics";
const CURRENT_METRICS_ANNOTATION: &str = "autoscaling.alpha.kubernetes.io/current-metrics";
const CONDITIONS_ANNOTATION: &str = "autoscaling.alpha.kubernetes.io/conditions";
const BEHAVIOR_ANNOTATION: &str = "autoscaling.alpha.kubernetes.io/behavior";

pub const RULES: Rules = Rules { default: defaults, validate, row: Some(row), ..Rules::DEFAULT };

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

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let (low, high) = (spec.at("minReplicas"), spec.at("maxReplicas"));
    if low.int().is_some_and(|n| n < 1) {
        errors.invalid(&low, "must be greater than or equal to 1");
    }
    if high.int().unwrap_or(0) < 1 {
        let shown = high.int().unwrap_or(0);
        errors.0.push(apimachinery::status::FieldError::invalid(high.path(), shown, "must be greater than 0"));
    }
    if high.int().unwrap_or(0) < low.int().unwrap_or(0) {
        errors.invalid(&high, "must be greater than or equal to `minReplicas`");
    }
    let target = spec.at("scaleTargetRef");
    errors.need(&target.at("kind"));
    errors.need(&target.at("name"));
    for metric in spec.at("metrics").items() {
        let kind = metric.at("type");
        errors.need_one_of(&kind, &["ContainerResource", "External", "Object", "Pods", "Resource"]);
        let field = match kind.str() {
            "ContainerResource" => "containerResource",
            "External" => "external",
            "Object" => "object",
            "Pods" => "pods",
            _ => "resource",
        };
        if !metric.at(field).is_set() {
            errors.required(&metric.at(field), "must populate information for the given metric source");
        }
    }
    let behavior = spec.at("behavior");
    for direction in ["scaleUp", "scaleDown"] {
        let rules = behavior.at(direction);
        errors.in_range(&rules.at("stabilizationWindowSeconds"), 0, 3600);
        errors.one_of(&rules.at("selectPolicy"), &["Disabled", "Max", "Min"]);
        for policy in rules.at("policies").items() {
            errors.one_of(&policy.at("type"), &["Percent", "Pods"]);
            errors.positive(&policy.at("value"));
            errors.in_range(&policy.at("periodSeconds"), 1, 1800);
        }
    }
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

// === autoscaling/v1 ===

fn is_cpu_utilization(metric: &Value) -> bool {
    metric["type"] == "Resource"
        && text(metric, "/resource/name") == "cpu"
        && metric.pointer("/resource/target/averageUtilization").is_some()
}

/// Takes a list apart: the cpu utilization that v1 has a field for, and the rest.
fn split_cpu(metrics: &[Value]) -> (Option<Value>, Vec<Value>) {
    let cpu = metrics.iter().position(is_cpu_utilization);
    let rest = metrics.iter().enumerate().filter(|(at, _)| Some(*at) != cpu).map(|(_, m)| m.clone()).collect();
    (cpu.map(|at| metrics[at].clone()), rest)
}

fn annotate(object: &mut Value, key: &str, value: &Value) {
    set(child(child(object, "metadata"), "annotations"), key, value.to_string());
}

fn unannotate(object: &mut Value, key: &str) -> Option<Value> {
    let annotations = object.pointer_mut("/metadata/annotations")?;
    let text = remove(annotations, key)?;
    let empty = annotations.as_object().is_some_and(serde_json::Map::is_empty);
    if empty {
        remove(child(object, "metadata"), "annotations");
    }
    serde_json::from_str(text.as_str()?).ok()
}

/// From v2, in which it is stored.
pub fn to_v1(object: &mut Value) {
    let (cpu, rest) = split_cpu(list(object, "/spec/metrics"));
    let (current_cpu, current_rest) = {
        let current = list(object, "/status/currentMetrics");
        let cpu = current.iter().position(|m| m["type"] == "Resource" && text(m, "/resource/name") == "cpu");
        let rest: Vec<Value> =
            current.iter().enumerate().filter(|(at, _)| Some(*at) != cpu).map(|(_, m)| m.clone()).collect();
        (cpu.map(|at| current[at].clone()), rest)
    };
    let spec = child(object, "spec");
    remove(spec, "metrics");
    let behavior = remove(spec, "behavior");
    if let Some(percent) = cpu.and_then(|m| m.pointer("/resource/target/averageUtilization").cloned()) {
        set(spec, "targetCPUUtilizationPercentage", percent);
    }
    let mut conditions = None;
    if object.get("status").is_some() {
        let status = child(object, "status");
        remove(status, "currentMetrics");
        conditions = remove(status, "conditions");
        if let Some(percent) = current_cpu.and_then(|m| m.pointer("/resource/current/averageUtilization").cloned()) {
            set(status, "currentCPUUtilizationPercentage", percent);
        }
    }
    if !rest.is_empty() {
        annotate(object, METRICS_ANNOTATION, &Value::from(rest));
    }
    if !current_rest.is_empty() {
        annotate(object, CURRENT_METRICS_ANNOTATION, &Value::from(current_rest));
    }
    for (key, value) in [(BEHAVIOR_ANNOTATION, behavior), (CONDITIONS_ANNOTATION, conditions)] {
        if let Some(value) = value {
            annotate(object, key, &value);
        }
    }
}

/// To v2.
pub fn from_v1(object: &mut Value) {
    let list_of = |value: Option<Value>| value.and_then(|v| v.as_array().cloned()).unwrap_or_default();
    let mut metrics = list_of(unannotate(object, METRICS_ANNOTATION));
    let mut current = list_of(unannotate(object, CURRENT_METRICS_ANNOTATION));
    let behavior = unannotate(object, BEHAVIOR_ANNOTATION);
    let conditions = unannotate(object, CONDITIONS_ANNOTATION);
    let spec = child(object, "spec");
    if let Some(percent) = remove(spec, "targetCPUUtilizationPercentage") {
        metrics.insert(
            0,
            json!({"type": "Resource", "resource": {"name": "cpu",
            "target": {"type": "Utilization", "averageUtilization": percent}}}),
        );
    }
    if !metrics.is_empty() {
        set(spec, "metrics", metrics);
    }
    if let Some(behavior) = behavior {
        set(spec, "behavior", behavior);
    }
    if object.get("status").is_some() {
        let status = child(object, "status");
        if let Some(percent) = remove(status, "currentCPUUtilizationPercentage") {
            current.insert(
                0,
                json!({"type": "Resource", "resource": {"name": "cpu", "current": {"averageUtilization": percent}}}),
            );
        }
        if !current.is_empty() {
            set(status, "currentMetrics", current);
        }
        if let Some(conditions) = conditions {
            set(status, "conditions", conditions);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v1_says_the_same_as_v2() {
        let v2 = json!({"metadata": {"name": "h"}, "spec": {"maxReplicas": 3, "behavior": {"scaleUp": {}}, "metrics": [
            {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}},
            {"type": "Pods", "pods": {"metric": {"name": "x"}}}]},
            "status": {"currentReplicas": 1, "conditions": [{"type": "AbleToScale"}]}});
        let mut object = v2.clone();
        to_v1(&mut object);
        assert_eq!(object["spec"]["targetCPUUtilizationPercentage"], 70);
        assert!(object["metadata"]["annotations"][METRICS_ANNOTATION].is_string());
        from_v1(&mut object);
        assert_eq!(object, v2);
    }
}
