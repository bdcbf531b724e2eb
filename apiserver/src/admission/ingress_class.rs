//! DefaultIngressClass: an Ingress that names no class gets the default one.
use std::sync::Arc;

use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use serde_json::json;

use super::storage::newest_default;
use super::{AdmissionRequest, Plugin, object_in, text};
use crate::authorization::lister::{INGRESS_CLASSES, Lister};

const MARK: &str = "ingressclass.kubernetes.io/is-default-class";
const CLASS_ANNOTATION: &str = "kubernetes.io/ingress.class";

pub struct DefaultIngressClass {
    lister: Arc<dyn Lister>,
}

// === impl DefaultIngressClass ===

impl DefaultIngressClass {
    pub fn new(lister: Arc<dyn Lister>) -> Self {
        Self { lister }
    }
}

impl Plugin for DefaultIngressClass {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.creates() && request.is("networking.k8s.io", "ingresses", "")
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        if let Some(ingress) = request.object.as_deref_mut() {
            let named = ingress.pointer("/spec/ingressClassName").is_some_and(|name| !name.is_null())
                || ingress.pointer("/metadata/annotations").is_some_and(|a| a.get(CLASS_ANNOTATION).is_some());
            if !named && let Some(class) = newest_default(self.lister.as_ref(), INGRESS_CLASSES, &[MARK]) {
                object_in(ingress, "spec").insert("ingressClassName".into(), json!(text(&class, "/metadata/name")));
            }
        }
        Box::pin(std::future::ready(Ok(())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::create;
    use crate::authorization::lister::fake::Objects;

    #[tokio::test]
    async fn an_ingress_without_a_class_gets_the_default() {
        let class = json!({"metadata": {"name": "web", "annotations": {MARK: "true"}}});
        let plugin = DefaultIngressClass::new(Objects::of([(INGRESS_CLASSES, class)]));
        for (mut ingress, expected) in [
            (json!({"metadata": {}, "spec": {}}), json!("web")),
            (json!({"metadata": {}, "spec": {"ingressClassName": "x"}}), json!("x")),
            (json!({"metadata": {"annotations": {CLASS_ANNOTATION: "y"}}, "spec": {}}), json!(null)),
        ] {
            create(&plugin, "networking.k8s.io/ingresses", "a", &mut ingress).await.unwrap();
            assert_eq!(ingress["spec"]["ingressClassName"], expected);
        }
    }
}
