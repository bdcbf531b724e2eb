//! Priority: the number behind a pod's `priorityClassName`; and no second default class.
use std::sync::Arc;

use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use serde_json::{Value, json};

use super::{AdmissionRequest, Plugin, entry, text};
use crate::authorization::lister::{Lister, PRIORITY_CLASSES};

const GROUP: &str = "scheduling.k8s.io";
const PREEMPT_LOWER: &str = "PreemptLowerPriority";

pub struct Priority {
    lister: Arc<dyn Lister>,
}

// === impl Priority ===

impl Priority {
    pub fn new(lister: Arc<dyn Lister>) -> Self {
        Self { lister }
    }

    async fn class(&self, name: &str) -> Result<Option<Value>, StatusError> {
        if let Some(class) = self.lister.get(PRIORITY_CLASSES, "", name) {
            return Ok(Some(class.value()));
        }
        self.lister.refresh().await?;
        Ok(self.lister.get(PRIORITY_CLASSES, "", name).map(|class| class.value()))
    }

    /// The class that is the default; the lowest where there are several.
    fn default_class(&self) -> Option<Value> {
        let classes = self.lister.list(PRIORITY_CLASSES, None);
        let maybe = classes.iter().filter(|class| class.mentions("\"globalDefault\":true"));
        let defaults = maybe.map(|class| class.value()).filter(|class| class["globalDefault"] == true);
        defaults.min_by_key(|class| class["value"].as_i64())
    }

    async fn admit(&self, request: &mut AdmissionRequest<'_>) -> Result<(), StatusError> {
        let name = text(request.new_object(), "/spec/priorityClassName").to_owned();
        let class = match name.as_str() {
            "" => self.default_class(),
            name => match self.class(name).await? {
                Some(class) => Some(class),
                None => return Err(request.forbidden(format!("no PriorityClass with name {name} was found"))),
            },
        };
        let value = class.as_ref().and_then(|class| class["value"].as_i64()).unwrap_or(0);
        let policy = class.as_ref().map(|class| text(class, "/preemptionPolicy")).filter(|policy| !policy.is_empty());
        let policy = policy.unwrap_or(PREEMPT_LOWER).to_owned();
        let spec = &request.new_object()["spec"];
        if let Some(given) = spec["priority"].as_i64().filter(|given| *given != value) {
            return Err(request.forbidden(format!(
                "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller computed {value} from the given PriorityClass name"
            )));
        }
        if let Some(given) = spec["preemptionPolicy"].as_str().filter(|given| *given != policy) {
            return Err(request.forbidden(format!(
                "the string value of PreemptionPolicy ({given}) must not be provided in pod spec; priority admission controller computed {policy} from the given PriorityClass name"
            )));
        }
        if let Some(pod) = request.object.as_deref_mut() {
            let spec = entry(pod, "spec");
            if let (true, Some(class)) = (name.is_empty(), class) {
                spec["priorityClassName"] = class["metadata"]["name"].clone();
            }
            spec["priority"] = json!(value);
            spec["preemptionPolicy"] = json!(policy);
        }
        Ok(())
    }
}

impl Plugin for Priority {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.writes() && (request.is("", "pods", "") || request.is(GROUP, "priorityclasses", ""))
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(async {
            if !request.is("", "pods", "") {
                return Ok(());
            }
            if request.creates() {
                return self.admit(request).await;
            }
            // A client that knows nothing of the number does not take it away.
            let old_object = request.old_object;
            let old = &old_object.unwrap_or(&Value::Null)["spec"];
            if let Some(pod) = request.object.as_deref_mut() {
                let spec = entry(pod, "spec");
                for field in ["priority", "preemptionPolicy"] {
                    if spec[field].is_null() && !old[field].is_null() {
                        spec[field] = old[field].clone();
                    }
                }
            }
            Ok(())
        })
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        let check = || {
            if !request.is(GROUP, "priorityclasses", "") || request.new_object()["globalDefault"] != true {
                return Ok(());
            }
            match self.default_class() {
                Some(other) if text(&other, "/metadata/name") != request.name() => {
                    let name = text(&other, "/metadata/name");
                    Err(request.forbidden(format!(
                        "PriorityClass {name} is already marked as default. Only one default can exist"
                    )))
                }
                _ => Ok(()),
            }
        };
        Box::pin(std::future::ready(check()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::create;
    use crate::authorization::lister::fake::Objects;

    fn class(name: &str, value: i64, default: bool) -> Value {
        json!({"metadata": {"name": name}, "value": value, "globalDefault": default, "preemptionPolicy": "Never"})
    }

    #[tokio::test]
    async fn the_class_gives_the_number() {
        let plugin = Priority::new(Objects::of([(PRIORITY_CLASSES, class("high", 1000, false))]));
        for (spec, expected) in [
            (json!({}), Ok((0, "PreemptLowerPriority"))),
            (json!({"priorityClassName": "high"}), Ok((1000, "Never"))),
            (json!({"priorityClassName": "high", "priority": 1000}), Ok((1000, "Never"))),
            (json!({"priorityClassName": "gone"}), Err("no PriorityClass with name gone was found")),
            (
                json!({"priority": 7}),
                Err(
                    "the integer value of priority (7) must not be provided in pod spec; priority admission controller computed 0 from the given PriorityClass name",
                ),
            ),
        ] {
            let mut pod = json!({"metadata": {"name": "p"}, "spec": spec});
            let outcome = create(&plugin, "/pods", "a", &mut pod).await;
            match expected {
                Ok((value, policy)) => {
                    outcome.unwrap();
                    assert_eq!(
                        (&pod["spec"]["priority"], &pod["spec"]["preemptionPolicy"]),
                        (&json!(value), &json!(policy))
                    );
                }
                Err(why) => assert_eq!(outcome.unwrap_err().message(), format!("pods \"p\" is forbidden: {why}")),
            }
        }
    }

    #[tokio::test]
    async fn there_is_one_default_class() {
        let plugin = Priority::new(Objects::of([(PRIORITY_CLASSES, class("usual", 10, true))]));
        let mut pod = json!({"spec": {}});
        create(&plugin, "/pods", "a", &mut pod).await.unwrap();
        assert_eq!((&pod["spec"]["priorityClassName"], &pod["spec"]["priority"]), (&json!("usual"), &json!(10)));
        for (mut class, allowed) in
            [(class("other", 5, true), false), (class("usual", 5, true), true), (class("other", 5, false), true)]
        {
            let outcome = create(&plugin, "scheduling.k8s.io/priorityclasses", "", &mut class).await;
            assert_eq!(outcome.is_ok(), allowed);
        }
    }
}
