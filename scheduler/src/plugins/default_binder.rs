//! DefaultBinder: writes the decision to the pod's `binding` subresource.

use component_base::client::send;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Binding, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource as _;
use kube::api::PostParams;

use crate::cache::PendingPod;
use crate::framework::{Bind, Handle, Plugin, Points};

pub struct DefaultBinder;

/// What is posted to bind `pod` to `node`. The UID keeps the binding from a later pod of the same name.
pub fn binding(pod: &PendingPod, node: &str) -> Binding {
    Binding {
        metadata: ObjectMeta {
            name: Some(pod.facts.key.name.clone()),
            namespace: Some(pod.facts.key.namespace.clone()),
            uid: Some(pod.facts.uid.to_string()),
            ..ObjectMeta::default()
        },
        target: ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(node.to_owned()),
            ..ObjectReference::default()
        },
    }
}

impl Plugin for DefaultBinder {
    fn name(&self) -> &'static str {
        "DefaultBinder"
    }

    fn points(&self) -> Points {
        Points::BIND
    }

    fn bind<'a>(&'a self, handle: &'a Handle, pod: &'a PendingPod, node: &'a str) -> BoxFuture<'a, Bind> {
        Box::pin(async move {
            let key = &pod.facts.key;
            let pods = kube::core::Request::new(Pod::url_path(&(), Some(&key.namespace)));
            let body = match serde_json::to_vec(&binding(pod, node)) {
                Ok(body) => body,
                Err(error) => return Bind::Failed(error.to_string()),
            };
            let request = pods.create_subresource("binding", &key.name, &PostParams::default(), body);
            match send(&handle.client, request).await {
                Ok(_) => Bind::Bound,
                Err(error) => Bind::Failed(error.to_string()),
            }
        })
    }
}
