//! PodSecurity: a namespace says by labels how strict it is; pods beyond that are refused (`enforce`) or warned about (`warn`),
//! as are the templates of workloads.
mod checks;

use std::sync::Arc;

use apimachinery::status::StatusError;
use checks::Level;
use futures::future::BoxFuture;
use serde_json::Value;

use super::{AdmissionRequest, Plugin};
use crate::authorization::lister::{Lister, NAMESPACES};

const LABEL: &str = "pod-security.kubernetes.io/";

pub struct PodSecurity {
    lister: Arc<dyn Lister>,
}

/// A level and the version of the standards that a namespace names; all versions are judged as the newest.
struct Policy {
    level: Level,
    named: String,
}

// === impl PodSecurity ===

impl PodSecurity {
    pub fn new(lister: Arc<dyn Lister>) -> Self {
        Self { lister }
    }

    fn policy(&self, namespace: &str, mode: &str) -> Option<Policy> {
        let namespace = self.lister.get(NAMESPACES, "", namespace)?;
        let name = namespace.identity.label(&format!("{LABEL}{mode}"))?;
        let version = namespace.identity.label(&format!("{LABEL}{mode}-version")).unwrap_or("latest");
        let level = match name {
            "privileged" => return None,
            "baseline" => Level::Baseline,
            // As Kubernetes: who misspells wants to be safe.
            _ => Level::Restricted,
        };
        Some(Policy { level, named: format!("{name}:{version}") })
    }

    fn check(&self, request: &mut AdmissionRequest<'_>) -> Result<(), StatusError> {
        let is_pod = request.attributes.group.is_empty() && request.attributes.resource == "pods";
        if is_pod && request.updates() && !is_significant(request.new_object(), request.old()) {
            return Ok(());
        }
        let found = |policy: &Policy, request: &AdmissionRequest<'_>| {
            let (metadata, spec) = template(request)?;
            let violations = checks::violations(policy.level, metadata, spec);
            (!violations.is_empty()).then(|| checks::describe(&violations))
        };
        if is_pod
            && let Some(policy) = self.policy(request.namespace(), "enforce")
            && let Some(what) = found(&policy, request)
        {
            return Err(request.forbidden(format!("violates PodSecurity {:?}: {what}", policy.named)));
        }
        if let Some(policy) = self.policy(request.namespace(), "warn")
            && let Some(what) = found(&policy, request)
        {
            request.warnings.push(format!("would violate PodSecurity {:?}: {what}", policy.named));
        }
        Ok(())
    }
}

impl Plugin for PodSecurity {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        let a = request.attributes;
        request.writes()
            && match a.subresource.as_str() {
                "" => template_pointer(&a.group, &a.resource).is_some(),
                "ephemeralcontainers" => a.resource == "pods",
                _ => false,
            }
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        let outcome = self.check(request);
        Box::pin(std::future::ready(outcome))
    }
}

/// Where the metadata and spec of a pod lie in an object.
fn template_pointer(group: &str, resource: &str) -> Option<&'static str> {
    match (group, resource) {
        ("", "pods") => Some(""),
        ("", "podtemplates") => Some("/template"),
        ("", "replicationcontrollers")
        | ("apps", "deployments" | "daemonsets" | "replicasets" | "statefulsets")
        | ("batch", "jobs") => Some("/spec/template"),
        ("batch", "cronjobs") => Some("/spec/jobTemplate/spec/template"),
        _ => None,
    }
}

fn template<'r>(request: &'r AdmissionRequest<'_>) -> Option<(&'r Value, &'r Value)> {
    let pointer = template_pointer(&request.attributes.group, &request.attributes.resource)?;
    let template = request.new_object().pointer(pointer)?;
    Some((&template["metadata"], &template["spec"]))
}

/// Only what can make a pod less safe is looked at again: not labels, finalizers and tolerations.
fn is_significant(new: &Value, old: &Value) -> bool {
    let relevant = |pod: &Value| {
        let mut spec = pod["spec"].clone();
        if let Some(spec) = spec.as_object_mut() {
            for field in ["activeDeadlineSeconds", "tolerations", "schedulingGates", "nodeSelector"] {
                spec.remove(field);
            }
        }
        (spec, pod.pointer("/metadata/annotations").cloned())
    };
    relevant(new) != relevant(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Operation;
    use crate::admission::testing::{attributes, request};
    use crate::authorization::lister::fake::Objects;
    use serde_json::json;

    fn plugin() -> PodSecurity {
        let namespace = |name: &str, labels: Value| (NAMESPACES, json!({"metadata": {"name": name, "labels": labels}}));
        PodSecurity::new(Objects::of([
            namespace("strict", json!({"pod-security.kubernetes.io/enforce": "baseline"})),
            namespace(
                "warned",
                json!({"pod-security.kubernetes.io/warn": "baseline", "pod-security.kubernetes.io/warn-version": "v1.30"}),
            ),
            namespace("free", json!({})),
        ]))
    }

    fn write(what: &str, namespace: &str, mut object: Value) -> (Result<(), String>, Vec<String>) {
        let attributes = attributes(what, namespace, "ann", &[]);
        let mut request = request(&attributes, Operation::Create, Some(&mut object), None);
        let plugin = plugin();
        assert!(plugin.handles(&request));
        let outcome = plugin.check(&mut request).map_err(|error| error.message().to_owned());
        (outcome, std::mem::take(&mut request.warnings))
    }

    #[test]
    fn a_namespace_says_what_is_refused_and_what_is_warned_about() {
        let pod = || json!({"metadata": {"name": "p"}, "spec": {"hostPID": true, "containers": []}});
        let deployment = || json!({"metadata": {"name": "d"}, "spec": {"template": pod()}});
        let refusal =
            r#"pods "p" is forbidden: violates PodSecurity "baseline:latest": host namespaces (hostPID=true)"#;
        let warning = r#"would violate PodSecurity "baseline:v1.30": host namespaces (hostPID=true)"#;
        assert_eq!(write("/pods", "strict", pod()), (Err(refusal.to_owned()), vec![]));
        assert_eq!(write("/pods", "warned", pod()), (Ok(()), vec![warning.to_owned()]));
        assert_eq!(write("/pods", "free", pod()), (Ok(()), vec![]));
        assert_eq!(write("apps/deployments", "strict", deployment()), (Ok(()), vec![]));
        assert_eq!(write("apps/deployments", "warned", deployment()), (Ok(()), vec![warning.to_owned()]));
    }
}
