//! What autoscalers say of their metrics, in Kubernetes' words. Pure.
use k8s_openapi::api::autoscaling::v2::MetricSpec;

/// Why there is no number of replicas: the condition's reason and message, and what the event says of all together.
#[derive(Debug)]
pub struct Failure {
    pub reason: &'static str,
    pub said: String,
    pub told: String,
}

/// What comes before the cause where all metrics' failures are told together. As `computeReplicasForMetric`.
pub fn prefix(metric: &MetricSpec) -> String {
    if let Some(source) = &metric.resource {
        return format!("failed to get {} resource metric value: ", source.name);
    }
    if let Some(source) = &metric.container_resource {
        return format!("failed to get {} container metric value: ", source.container);
    }
    if let Some(source) = &metric.external {
        let name = &source.metric.name;
        let whose = match source.target.average_value.is_some() {
            true => format!("{name} external metric"),
            false => format!("external metric {name}"),
        };
        return format!("failed to get {name} external metric value: failed to get {whose}: ");
    }
    if let Some(source) = &metric.object {
        let own = source.target.average_value.as_ref().map(|_| &source.metric.name);
        let own = own.map(|name| format!("failed to get {name} object metric: ")).unwrap_or_default();
        return format!("failed to get object metric value: {own}");
    }
    if metric.pods.is_some() { "failed to get pods metric value: ".to_owned() } else { String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn failures_name_their_metric() {
        let target = |average: bool| {
            if average {
                json!({"type": "AverageValue", "averageValue": "1"})
            } else {
                json!({"type": "Value", "value": "1"})
            }
        };
        let object = json!({"kind": "Ingress", "name": "main"});
        for (metric, expected) in [
            (
                json!({"type": "Resource", "resource": {"name": "cpu", "target": target(true)}}),
                "failed to get cpu resource metric value: ",
            ),
            (
                json!({"type": "ContainerResource", "containerResource": {"name": "cpu", "container": "app", "target": target(true)}}),
                "failed to get app container metric value: ",
            ),
            (
                json!({"type": "Pods", "pods": {"metric": {"name": "rps"}, "target": target(true)}}),
                "failed to get pods metric value: ",
            ),
            (
                json!({"type": "Object", "object": {"describedObject": object, "metric": {"name": "rps"}, "target": target(false)}}),
                "failed to get object metric value: ",
            ),
            (
                json!({"type": "Object", "object": {"describedObject": object, "metric": {"name": "rps"}, "target": target(true)}}),
                "failed to get object metric value: failed to get rps object metric: ",
            ),
            (
                json!({"type": "External", "external": {"metric": {"name": "q"}, "target": target(false)}}),
                "failed to get q external metric value: failed to get external metric q: ",
            ),
            (
                json!({"type": "External", "external": {"metric": {"name": "q"}, "target": target(true)}}),
                "failed to get q external metric value: failed to get q external metric: ",
            ),
        ] {
            let spec: MetricSpec = serde_json::from_value(metric).unwrap();
            assert_eq!(prefix(&spec), expected);
        }
    }
}
