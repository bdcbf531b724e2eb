//! autoscaling/v1 as a view of v2: the cpu metric has fields of its own, everything else stands in annotations, in the words
//! of v1. As `Convert_autoscaling_HorizontalPodAutoscaler_To_v1_HorizontalPodAutoscaler` and back.

use crate::registry::object::{child, list, remove, set, text};
use serde_json::{Map, Value, json};

const METRICS_ANNOTATION: &str = "autoscaling.alpha.kubernetes.io/metrics";
const CURRENT_METRICS_ANNOTATION: &str = "autoscaling.alpha.kubernetes.io/current-metrics";
const CONDITIONS_ANNOTATION: &str = "autoscaling.alpha.kubernetes.io/conditions";
const BEHAVIOR_ANNOTATION: &str = "autoscaling.alpha.kubernetes.io/behavior";

/// Fields of a metric in v1, and where v2 has them.
type Words = &'static [(&'static str, &'static str)];

static SPEC: [(&str, Words); 5] = [
    (
        "object",
        &[
            ("target", "/describedObject"),
            ("metricName", "/metric/name"),
            ("selector", "/metric/selector"),
            ("targetValue", "/target/value"),
            ("averageValue", "/target/averageValue"),
        ],
    ),
    (
        "pods",
        &[
            ("metricName", "/metric/name"),
            ("selector", "/metric/selector"),
            ("targetAverageValue", "/target/averageValue"),
        ],
    ),
    (
        "resource",
        &[
            ("name", "/name"),
            ("targetAverageUtilization", "/target/averageUtilization"),
            ("targetAverageValue", "/target/averageValue"),
        ],
    ),
    (
        "containerResource",
        &[
            ("name", "/name"),
            ("container", "/container"),
            ("targetAverageUtilization", "/target/averageUtilization"),
            ("targetAverageValue", "/target/averageValue"),
        ],
    ),
    (
        "external",
        &[
            ("metricName", "/metric/name"),
            ("metricSelector", "/metric/selector"),
            ("targetValue", "/target/value"),
            ("targetAverageValue", "/target/averageValue"),
        ],
    ),
];
static STATUS: [(&str, Words); 5] = [
    (
        "object",
        &[
            ("target", "/describedObject"),
            ("metricName", "/metric/name"),
            ("selector", "/metric/selector"),
            ("currentValue", "/current/value"),
            ("averageValue", "/current/averageValue"),
        ],
    ),
    (
        "pods",
        &[
            ("metricName", "/metric/name"),
            ("selector", "/metric/selector"),
            ("currentAverageValue", "/current/averageValue"),
        ],
    ),
    (
        "resource",
        &[
            ("name", "/name"),
            ("currentAverageUtilization", "/current/averageUtilization"),
            ("currentAverageValue", "/current/averageValue"),
        ],
    ),
    (
        "containerResource",
        &[
            ("name", "/name"),
            ("container", "/container"),
            ("currentAverageUtilization", "/current/averageUtilization"),
            ("currentAverageValue", "/current/averageValue"),
        ],
    ),
    (
        "external",
        &[
            ("metricName", "/metric/name"),
            ("metricSelector", "/metric/selector"),
            ("currentValue", "/current/value"),
            ("currentAverageValue", "/current/averageValue"),
        ],
    ),
];

/// A metric in the words of v1.
fn metric_to_v1(metric: &Value, words: &[(&str, Words)]) -> Value {
    let mut result = json!({"type": metric["type"]});
    for (source, fields) in words {
        let Some(from) = metric.get(*source) else { continue };
        let said = fields.iter().filter_map(|(name, at)| Some(((*name).to_owned(), from.pointer(at)?.clone())));
        set(&mut result, source, Map::from_iter(said));
    }
    result
}

/// And back: the kind of target is told by what it says.
fn metric_from_v1(metric: &Value, words: &[(&str, Words)]) -> Value {
    let mut result = json!({"type": metric["type"]});
    for (source, fields) in words {
        let Some(from) = metric.get(*source) else { continue };
        let to = child(&mut result, source);
        for (name, at) in *fields {
            if let (Some(value), Some((parent, field))) = (from.get(*name), at.rsplit_once('/')) {
                let parent = parent.strip_prefix('/').unwrap_or("");
                set(if parent.is_empty() { &mut *to } else { child(to, parent) }, field, value.clone());
            }
        }
        if let Some(target) = to.get_mut("target") {
            let kinds = [("averageUtilization", "Utilization"), ("averageValue", "AverageValue"), ("value", "Value")];
            if let Some((_, kind)) = kinds.iter().find(|(field, _)| target.get(*field).is_some()) {
                set(target, "type", *kind);
            }
        }
    }
    result
}

/// Kubernetes writes a behavior with the names of Go's fields, and reads it whatever their case.
fn recase(value: &Value, case: fn(char) -> char) -> Value {
    match value {
        Value::Object(map) => Value::from_iter(map.iter().map(|(key, value)| {
            let mut letters = key.chars();
            let first = letters.next().map(case);
            (first.into_iter().chain(letters).collect::<String>(), recase(value, case))
        })),
        Value::Array(list) => Value::from_iter(list.iter().map(|item| recase(item, case))),
        other => other.clone(),
    }
}

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
    for (key, metrics, words) in [(METRICS_ANNOTATION, rest, SPEC), (CURRENT_METRICS_ANNOTATION, current_rest, STATUS)]
    {
        if !metrics.is_empty() {
            annotate(object, key, &Value::from_iter(metrics.iter().map(|m| metric_to_v1(m, &words))));
        }
    }
    let behavior = behavior.map(|behavior| recase(&behavior, |c| c.to_ascii_uppercase()));
    for (key, value) in [(BEHAVIOR_ANNOTATION, behavior), (CONDITIONS_ANNOTATION, conditions)] {
        if let Some(value) = value {
            annotate(object, key, &value);
        }
    }
}

/// To v2.
pub fn from_v1(object: &mut Value) {
    let list_of = |value: Option<Value>, words: &'static [(&str, Words)]| -> Vec<Value> {
        list(&value.unwrap_or_default(), "").iter().map(|metric| metric_from_v1(metric, words)).collect()
    };
    let mut metrics = list_of(unannotate(object, METRICS_ANNOTATION), &SPEC);
    let mut current = list_of(unannotate(object, CURRENT_METRICS_ANNOTATION), &STATUS);
    let behavior = unannotate(object, BEHAVIOR_ANNOTATION).map(|b| recase(&b, |c| c.to_ascii_lowercase()));
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
            {"type": "Pods", "pods": {"metric": {"name": "x"}, "target": {"type": "AverageValue", "averageValue": "5"}}},
            {"type": "Object", "object": {"describedObject": {"kind": "Service", "name": "s"}, "metric": {"name": "y"},
                "target": {"type": "Value", "value": "7"}}}]},
            "status": {"currentReplicas": 1, "conditions": [{"type": "AbleToScale"}]}});
        let mut object = v2.clone();
        to_v1(&mut object);
        assert_eq!(object["spec"]["targetCPUUtilizationPercentage"], 70);
        let annotations = &object["metadata"]["annotations"];
        let metrics = r#"[{"type":"Pods","pods":{"metricName":"x","targetAverageValue":"5"}},{"type":"Object","object":{"target":{"kind":"Service","name":"s"},"metricName":"y","targetValue":"7"}}]"#;
        let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(parsed(annotations[METRICS_ANNOTATION].as_str().unwrap()), parsed(metrics));
        assert_eq!(annotations[BEHAVIOR_ANNOTATION], r#"{"ScaleUp":{}}"#);
        from_v1(&mut object);
        assert_eq!(object, v2);
    }
}
