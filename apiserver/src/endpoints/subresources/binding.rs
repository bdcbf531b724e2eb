//! `pods/binding`: gives a pod to a node, once.

use super::{OnObject, success};
use crate::endpoints::{Answer, Call, Endpoint, metadata};
use crate::registry::core::pod::BULK;
use crate::registry::object::{child, list, map, set, text};
use apimachinery::status::{FieldError, StatusError};
use futures::future::BoxFuture;
use serde_json::{Value, json};

pub(super) struct Binding;

impl Endpoint for Binding {
    fn call<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Answer, StatusError>> {
        Box::pin(async move {
            if call.info.verb != "create" {
                return Err(StatusError::method_not_allowed());
            }
            let body = &call.body;
            super::agree(body, &call.info.name)?;
            let name = if call.info.name.is_empty() { metadata::text(body, "name") } else { &call.info.name };
            validate(body, name)?;
            let pods = OnObject::new(&call, "", "v1", "pods", name)?;
            let (store, namespace) = (&call.context.store, call.info.namespace.as_str());
            if call.dry_run {
                let mut pod = pods.resource.value(&*store.get(&pods.resource, namespace, name).await?);
                bind(&mut pod, body, name)?;
            } else {
                let change = |pod: &mut Value| bind(pod, body, name).map(|()| true);
                store.guaranteed_update_but(&pods.resource, namespace, name, &BULK, change).await?;
            }
            Ok(Answer::created(success(201)))
        })
    }
}

/// As `ValidatePodBinding`.
fn validate(body: &Value, name: &str) -> Result<(), StatusError> {
    let mut errors = Vec::new();
    let kind = text(body, "/target/kind");
    if !matches!(kind, "" | "Node") {
        errors.push(FieldError::not_supported("target.kind", kind, &["Node", "<empty>"]));
    }
    if text(body, "/target/name").is_empty() {
        errors.push(FieldError::required("target.name", ""));
    }
    if errors.is_empty() { Ok(()) } else { Err(StatusError::invalid("", "Binding", name, &errors)) }
}

/// As `setPodNodeAndMetadata`.
fn bind(pod: &mut Value, body: &Value, name: &str) -> Result<(), StatusError> {
    let refuse = |why: String| Err(StatusError::conflict("", "pods/binding", name, &why));
    let (uid, version) = (metadata::text(body, "uid"), metadata::text(body, "resourceVersion"));
    for (wanted, field, what) in [(uid, "uid", "UID"), (version, "resourceVersion", "ResourceVersion")] {
        let is = metadata::text(pod, field);
        if !wanted.is_empty() && wanted != is {
            return refuse(format!(
                "Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {is}"
            ));
        }
    }
    if metadata::is_being_deleted(pod) {
        return refuse(format!("pod {name} is being deleted, cannot be assigned to a host"));
    }
    let node = text(pod, "/spec/nodeName");
    if !node.is_empty() {
        return refuse(format!("pod {name} is already assigned to node {node:?}"));
    }
    if !list(pod, "/spec/schedulingGates").is_empty() {
        return refuse(format!("pod {name} has non-empty .spec.schedulingGates"));
    }
    set(child(pod, "spec"), "nodeName", text(body, "/target/name"));
    for field in ["annotations", "labels"] {
        for (key, value) in map(body, &format!("/metadata/{field}")).into_iter().flatten() {
            set(child(child(pod, "metadata"), field), key, value.clone());
        }
    }
    let status = child(pod, "status");
    let mut conditions = list(status, "/conditions").to_vec();
    conditions.retain(|c| c["type"] != "PodScheduled");
    conditions.push(json!({"type": "PodScheduled", "status": "True",
        "lastProbeTime": null, "lastTransitionTime": apimachinery::time::rfc3339(jiff::Timestamp::now())}));
    set(status, "conditions", conditions);
    // As ClearingNominatedNodeNameAfterBinding.
    if let Some(status) = status.as_object_mut() {
        status.remove("nominatedNodeName");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_bound_once() {
        let binding =
            json!({"metadata": {"name": "p", "annotations": {"a": "b"}}, "target": {"kind": "Node", "name": "n1"}});
        let mut pod = json!({"metadata": {"name": "p", "uid": "u"}, "spec": {}, "status": {"phase": "Pending"}});
        bind(&mut pod, &binding, "p").unwrap();
        assert_eq!((&pod["spec"]["nodeName"], &pod["metadata"]["annotations"]["a"]), (&json!("n1"), &json!("b")));
        assert_eq!(pod["status"]["conditions"][0]["status"], "True");
        let error = bind(&mut pod, &binding, "p").unwrap_err();
        assert_eq!(
            (error.code(), error.message()),
            (409, r#"Operation cannot be fulfilled on pods/binding "p": pod p is already assigned to node "n1""#)
        );
        let mut gated = json!({"metadata": {"name": "p"}, "spec": {"schedulingGates": [{"name": "g"}]}});
        assert_eq!(bind(&mut gated, &binding, "p").unwrap_err().code(), 409);
        let mut other = json!({"metadata": {"name": "p", "uid": "u2"}, "spec": {}});
        let stale = json!({"metadata": {"uid": "u"}, "target": {"name": "n"}});
        assert_eq!(bind(&mut other, &stale, "p").unwrap_err().code(), 409);
        assert_eq!(validate(&json!({"target": {"kind": "Pod", "name": "x"}}), "p").unwrap_err().code(), 422);
    }
}
