//! RuntimeClass: a pod of a class carries its overhead and goes only where the class can run.
use std::sync::Arc;

use apimachinery::quantity::Quantity;
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use serde_json::{Value, json};

use super::{AdmissionRequest, Plugin, entry, list, list_in, object_in, text};
use crate::authorization::lister::{Lister, RUNTIME_CLASSES};

pub struct RuntimeClass {
    lister: Arc<dyn Lister>,
}

// === impl RuntimeClass ===

impl RuntimeClass {
    pub fn new(lister: Arc<dyn Lister>) -> Self {
        Self { lister }
    }

    async fn class(&self, name: &str) -> Result<Option<Value>, StatusError> {
        if let Some(class) = self.lister.get(RUNTIME_CLASSES, "", name) {
            return Ok(Some(class.value()));
        }
        self.lister.refresh().await?;
        Ok(self.lister.get(RUNTIME_CLASSES, "", name).map(|class| class.value()))
    }

    async fn admit(&self, request: &mut AdmissionRequest<'_>) -> Result<(), StatusError> {
        let name = text(request.new_object(), "/spec/runtimeClassName").to_owned();
        if name.is_empty() {
            if has_members(&request.new_object()["spec"]["overhead"]) {
                return Err(request
                    .forbidden("pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead"));
            }
            return Ok(());
        }
        let Some(class) = self.class(&name).await? else {
            return Err(request.forbidden(format!("pod rejected: RuntimeClass {name:?} not found")));
        };
        let outcome = request.object.as_deref_mut().map_or(Ok(()), |pod| apply(&class, pod));
        outcome.map_err(|why| request.forbidden(why))
    }
}

impl Plugin for RuntimeClass {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.creates() && request.is("", "pods", "")
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(self.admit(request))
    }
}

/// As `setOverhead` and `setScheduling`.
fn apply(class: &Value, pod: &mut Value) -> Result<(), String> {
    let overhead = class.pointer("/overhead/podFixed").cloned().unwrap_or_default();
    let given = pod["spec"]["overhead"].clone();
    if has_members(&overhead) {
        if has_members(&given) && !same_quantities(&overhead, &given) {
            return Err("pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead".to_owned());
        }
        entry(pod, "spec")["overhead"] = overhead;
    } else if has_members(&given) {
        return Err("pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead".to_owned());
    }
    let selector = class.pointer("/scheduling/nodeSelector").and_then(Value::as_object);
    if let Some(selector) = selector.filter(|selector| !selector.is_empty()) {
        let of_pod = object_in(entry(pod, "spec"), "nodeSelector");
        for (key, value) in selector {
            if let Some(other) = of_pod.get(key).filter(|other| *other != value) {
                let show = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                return Err(format!(
                    "conflict: runtimeClass.scheduling.nodeSelector[{key}] = {}; pod.spec.nodeSelector[{key}] = {}",
                    show(value),
                    show(other)
                ));
            }
            of_pod.insert(key.clone(), value.clone());
        }
    }
    for toleration in list(class, "/scheduling/tolerations") {
        let tolerations = list_in(entry(pod, "spec"), "tolerations");
        if !tolerations.contains(toleration) {
            tolerations.push(json!(toleration));
        }
    }
    Ok(())
}

fn has_members(value: &Value) -> bool {
    value.as_object().is_some_and(|map| !map.is_empty())
}

fn same_quantities(a: &Value, b: &Value) -> bool {
    let (Some(a), Some(b)) = (a.as_object(), b.as_object()) else { return false };
    let parse = |value: &Value| value.as_str().and_then(|text| Quantity::parse(text).ok());
    a.len() == b.len() && a.iter().all(|(key, value)| b.get(key).is_some_and(|other| parse(other) == parse(value)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::create;
    use crate::authorization::lister::fake::Objects;

    #[tokio::test]
    async fn a_pod_takes_overhead_and_scheduling_from_its_class() {
        let class = json!({"metadata": {"name": "vm"}, "handler": "vm", "overhead": {"podFixed": {"cpu": "100m"}},
            "scheduling": {"nodeSelector": {"vm": "yes"}, "tolerations": [{"key": "vm", "operator": "Exists"}]}});
        let plugin = RuntimeClass::new(Objects::of([(RUNTIME_CLASSES, class)]));
        let mut pod =
            json!({"spec": {"runtimeClassName": "vm", "overhead": {"cpu": "0.1"}, "nodeSelector": {"a": "b"}}});
        create(&plugin, "/pods", "a", &mut pod).await.unwrap();
        assert_eq!(pod["spec"]["overhead"], json!({"cpu": "100m"}));
        assert_eq!(pod["spec"]["nodeSelector"], json!({"a": "b", "vm": "yes"}));
        assert_eq!(list(&pod, "/spec/tolerations").len(), 1);
        for (spec, why) in [
            (json!({"runtimeClassName": "x"}), "pod rejected: RuntimeClass \"x\" not found"),
            (
                json!({"overhead": {"cpu": "1"}}),
                "pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead",
            ),
            (
                json!({"runtimeClassName": "vm", "overhead": {"cpu": "1"}}),
                "pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead",
            ),
            (
                json!({"runtimeClassName": "vm", "nodeSelector": {"vm": "no"}}),
                "conflict: runtimeClass.scheduling.nodeSelector[vm] = yes; pod.spec.nodeSelector[vm] = no",
            ),
        ] {
            let mut pod = json!({"metadata": {"name": "p"}, "spec": spec});
            let error = create(&plugin, "/pods", "a", &mut pod).await.unwrap_err();
            assert_eq!(error.message(), format!("pods \"p\" is forbidden: {why}"));
        }
    }
}
