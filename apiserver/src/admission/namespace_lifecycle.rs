//! NamespaceLifecycle: nothing is written into a namespace that is not there, nothing new into one that is going, and the
//! namespaces of the system stay.
use std::sync::Arc;

use apimachinery::status::StatusError;
use futures::future::BoxFuture;

use super::{AdmissionRequest, Operation, Plugin, text};
use crate::authorization::lister::{Lister, NAMESPACES};
use crate::storage::StoredObject;

const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

pub struct NamespaceLifecycle {
    lister: Arc<dyn Lister>,
}

// === impl NamespaceLifecycle ===

impl NamespaceLifecycle {
    pub fn new(lister: Arc<dyn Lister>) -> Self {
        Self { lister }
    }

    async fn namespace(&self, name: &str) -> Result<Option<Arc<StoredObject>>, StatusError> {
        if let Some(namespace) = self.lister.get(NAMESPACES, "", name) {
            return Ok(Some(namespace));
        }
        // It may have been created a moment ago.
        self.lister.refresh().await?;
        Ok(self.lister.get(NAMESPACES, "", name))
    }

    async fn check(&self, request: &AdmissionRequest<'_>) -> Result<(), StatusError> {
        if request.is("", "namespaces", "") && request.operation == Operation::Delete {
            if IMMORTAL.contains(&request.attributes.name.as_str()) {
                return Err(StatusError::forbidden(
                    "",
                    "namespaces",
                    &request.attributes.name,
                    "this namespace may not be deleted",
                ));
            }
            return Ok(());
        }
        let name = request.namespace();
        let Some(namespace) = self.namespace(name).await? else {
            return Err(StatusError::not_found("", "namespaces", name));
        };
        if request.creates() && is_terminating(&namespace) {
            let why = format!("unable to create new content in namespace {name} because it is being terminated");
            return Err(request.forbidden(why).with_cause(
                "NamespaceTerminating",
                &format!("namespace {name} is being terminated"),
                Some("metadata.namespace"),
            ));
        }
        Ok(())
    }
}

impl Plugin for NamespaceLifecycle {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        match (request.attributes.resource.as_str(), request.operation) {
            ("namespaces", Operation::Delete) => true,
            // What is in a namespace may always be deleted; reviews store nothing.
            ("namespaces" | "localsubjectaccessreviews", _) | (_, Operation::Delete | Operation::Connect) => false,
            _ => !request.attributes.namespace.is_empty(),
        }
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(async { self.check(request).await })
    }
}

fn is_terminating(namespace: &StoredObject) -> bool {
    namespace.mentions("\"Terminating\"") && text(&namespace.value(), "/status/phase") == "Terminating"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::{attributes, create, request};
    use crate::authorization::lister::fake::Objects;
    use serde_json::json;

    fn plugin() -> NamespaceLifecycle {
        let named = |name: &str, phase: &str| json!({"metadata": {"name": name}, "status": {"phase": phase}});
        NamespaceLifecycle::new(Objects::of([
            (NAMESPACES, named("a", "Active")),
            (NAMESPACES, named("going", "Terminating")),
        ]))
    }

    #[tokio::test]
    async fn a_namespace_must_be_there_and_stay() {
        let mut pod = json!({"metadata": {"name": "p"}});
        assert!(create(&plugin(), "/pods", "a", &mut pod).await.is_ok());
        let error = create(&plugin(), "/pods", "b", &mut pod).await.unwrap_err();
        assert_eq!((error.code(), error.message()), (404, r#"namespaces "b" not found"#));
        let error = create(&plugin(), "/pods", "going", &mut pod).await.unwrap_err();
        assert_eq!(
            (error.code(), error.message()),
            (
                403,
                r#"pods "p" is forbidden: unable to create new content in namespace going because it is being terminated"#
            )
        );
        let causes = error.0.details.unwrap().causes.unwrap();
        assert_eq!(causes[0].reason.as_deref(), Some("NamespaceTerminating"));
        let attributes = attributes("/pods/status", "going", "ann", &[]);
        let mut update = request(&attributes, Operation::Update, Some(&mut pod), None);
        assert!(plugin().mutate(&mut update).await.is_ok());
    }

    #[tokio::test]
    async fn the_namespaces_of_the_system_are_not_deleted() {
        for (name, allowed) in [("default", false), ("kube-system", false), ("kube-public", false), ("mine", true)] {
            let mut attributes = attributes("/namespaces", name, "ann", &[]);
            attributes.name = name.into();
            let mut delete = request(&attributes, Operation::Delete, None, None);
            assert_eq!(plugin().mutate(&mut delete).await.is_ok(), allowed, "{name}");
        }
    }
}
