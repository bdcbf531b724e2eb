//! `scale`: the number of replicas of whatever has replicas, as autoscaling/v1 Scale.

use super::OnObject;
use crate::endpoints::apply::{Applying, Configuration};
use crate::endpoints::ownership::Ownership;
use crate::endpoints::update::{self, Produce, Produced};
use crate::endpoints::{Answer, Call, Endpoint, Payload, metadata};
use crate::registry::Resource;
use crate::registry::object::{child, int, map, set, text};
use crate::registry::print;
use apimachinery::status::{FieldError, StatusError};
use futures::future::BoxFuture;
use serde_json::{Value, json};

pub(super) struct Scale;

impl Endpoint for Scale {
    fn call<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Answer, StatusError>> {
        Box::pin(async move {
            let info = call.info;
            let target = OnObject::new(&call, &info.group, &info.version, &info.resource, &info.name)?;
            let request = target.request();
            let current = match info.verb {
                "get" => {
                    let object = call.context.store.get(&target.resource, request.namespace(), &info.name).await?;
                    return Ok(Answer::ok(scale_of(&target.resource.value(&object))));
                }
                "update" | "apply" => update::newest(&request).await?.ok_or_else(|| request.not_found())?,
                _ => return Err(StatusError::method_not_allowed()),
            };
            let mut replicas = Replicas::parse(&call.body, &info.name)?;
            let config = replicas.configuration(&target.resource, &call.body);
            let mut applying = Applying::new(&request, &config);
            let produce: &mut dyn Produce = if info.verb == "apply" { &mut applying } else { &mut replicas };
            let outcome = update::replace(&request, current, produce).await?;
            let object = match outcome.payload {
                Payload::Stored(resource, object) => resource.value(&object),
                Payload::Object(_, object) => object,
                Payload::Response(_) => Value::Null,
            };
            Ok(Answer { code: outcome.code, object: scale_of(&object), warnings: outcome.warnings })
        })
    }
}

/// The wanted number of replicas, and the version of the object that it is meant for, if any.
struct Replicas {
    replicas: i64,
    resource_version: String,
    uid: String,
}

// === impl Replicas ===

impl Replicas {
    /// As `ValidateScale`.
    fn parse(body: &Value, name: &str) -> Result<Self, StatusError> {
        super::agree(body, name)?;
        let replicas = int(body, "/spec/replicas").unwrap_or(0);
        if replicas < 0 {
            let error = FieldError::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
            return Err(StatusError::invalid("autoscaling", "Scale", name, &[error]));
        }
        Ok(Self {
            replicas,
            resource_version: metadata::text(body, "resourceVersion").to_owned(),
            uid: metadata::text(body, "uid").to_owned(),
        })
    }

    /// What is applied to the object itself by applying a Scale.
    fn configuration(&self, resource: &Resource, body: &Value) -> Configuration {
        let mut object = json!({"apiVersion": resource.api_version, "kind": resource.kind, "metadata": {}});
        for field in ["name", "namespace", "uid", "resourceVersion"] {
            let value = metadata::text(body, field);
            if !value.is_empty() {
                set(child(&mut object, "metadata"), field, value);
            }
        }
        if int(body, "/spec/replicas").is_some() {
            set(child(&mut object, "spec"), "replicas", self.replicas);
        }
        Configuration { object, warnings: Vec::new() }
    }
}

impl Produce for Replicas {
    fn produce(&mut self, old: &Value, _managed: &str) -> Result<Produced, StatusError> {
        let mut object = old.clone();
        set(child(&mut object, "spec"), "replicas", self.replicas);
        let meta = metadata::of(&mut object);
        meta.insert("resourceVersion".to_owned(), self.resource_version.as_str().into());
        if !self.uid.is_empty() {
            meta.insert("uid".to_owned(), self.uid.as_str().into());
        }
        Ok(Produced { object, warnings: Vec::new(), ownership: Ownership::OfWriter })
    }

    fn options(&self) -> Value {
        json!({"kind": "UpdateOptions", "apiVersion": "meta.k8s.io/v1"})
    }
}

/// What `scale` says of an object. As `scaleFromDeployment` and its like.
fn scale_of(object: &Value) -> Value {
    let mut meta = json!({});
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        let value = metadata::text(object, field);
        if !value.is_empty() {
            set(&mut meta, field, value);
        }
    }
    let selector = match object.get("kind").and_then(Value::as_str) {
        Some("ReplicationController") => print::labels(map(object, "/spec/selector")),
        _ => text(&json!([print::selector(object.pointer("/spec/selector"))]), "/0").to_owned(),
    };
    let mut status = json!({"replicas": int(object, "/status/replicas").unwrap_or(0)});
    if selector != print::NONE {
        set(&mut status, "selector", selector);
    }
    let mut spec = json!({});
    let replicas = int(object, "/spec/replicas").unwrap_or(0);
    if replicas != 0 {
        set(&mut spec, "replicas", replicas);
    }
    json!({"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": meta, "spec": spec, "status": status})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_read_off_its_object_and_written_into_it() {
        let object = json!({"kind": "Deployment", "metadata": {"name": "web", "namespace": "n", "resourceVersion": "7"},
            "spec": {"replicas": 2, "selector": {"matchLabels": {"a": "b"}}}, "status": {"replicas": 1}});
        let scale = scale_of(&object);
        assert_eq!(scale["spec"], json!({"replicas": 2}));
        assert_eq!(scale["status"], json!({"replicas": 1, "selector": "a=b"}));
        let wanted = json!({"metadata": {"name": "web"}, "spec": {"replicas": 5}});
        let produced = Replicas::parse(&wanted, "web").unwrap().produce(&object, "").unwrap();
        assert_eq!(
            (&produced.object["spec"]["replicas"], &produced.object["metadata"]["resourceVersion"]),
            (&json!(5), &json!(""))
        );
        assert_eq!(Replicas::parse(&json!({"spec": {"replicas": -1}}), "web").map(|_| ()).unwrap_err().code(), 422);
        assert_eq!(Replicas::parse(&wanted, "other").map(|_| ()).unwrap_err().code(), 400);
    }
}
