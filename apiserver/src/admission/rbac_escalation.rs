//! Roles and bindings may not grant what their writer does not hold.
use std::sync::Arc;

use apimachinery::status::StatusError;
use futures::future::BoxFuture;

use super::{AdmissionRequest, Plugin};
use crate::authorization::Authorizer;
use crate::authorization::rbac::escalation;

pub struct RbacEscalation(pub Arc<Authorizer>);

impl Plugin for RbacEscalation {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.attributes.group == "rbac.authorization.k8s.io" && request.writes() && self.0.uses_rbac()
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(async {
            escalation::check(&self.0, self.0.rbac(), request.attributes, request.new_object(), request.old_object)
                .await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing;
    use crate::authorization::lister::fake::Objects;
    use crate::authorization::lister::{CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES};
    use serde_json::{Value, json};

    fn plugin() -> RbacEscalation {
        let role = |name: &str, group: &str, resource: &str, verbs: &[&str]| json!({"metadata": {"name": name}, "rules": [{"apiGroups": [group], "resources": [resource], "verbs": verbs}]});
        let binding = |role: &str, user: &str| {
            json!({"metadata": {"name": role}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
                "subjects": [{"kind": "User", "name": user}]})
        };
        let objects = Objects::of([
            (CLUSTER_ROLES, role("reader", "", "pods", &["get", "list"])),
            (CLUSTER_ROLES, role("escalator", "rbac.authorization.k8s.io", "clusterroles", &["escalate", "bind"])),
            (CLUSTER_ROLES, role("strong", "*", "*", &["*"])),
            (CLUSTER_ROLE_BINDINGS, binding("reader", "ann")),
            (CLUSTER_ROLE_BINDINGS, binding("escalator", "eve")),
        ]);
        RbacEscalation(Arc::new(Authorizer::with(&["RBAC".to_owned()], objects).unwrap()))
    }

    async fn write(user: &str, groups: &[&str], resource: &str, new: Value, old: Option<Value>) -> Result<(), String> {
        let what = format!("rbac.authorization.k8s.io/{resource}");
        testing::write(&plugin(), (user, groups), &what, new, old).await
    }

    #[tokio::test]
    async fn a_role_grants_no_more_than_its_writer_holds() {
        let role = |verbs: &[&str]| json!({"rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": verbs}]});
        assert_eq!(write("ann", &[], "clusterroles", role(&["get"]), None).await, Ok(()));
        assert_eq!(
            write("ann", &["g"], "clusterroles", role(&["get", "delete"]), None).await,
            Err("clusterroles.rbac.authorization.k8s.io \"x\" is forbidden: user \"ann\" (groups=[\"g\"]) is attempting to grant RBAC permissions not currently held:\n{APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"delete\"]}".to_owned())
        );
        assert_eq!(write("ann", &[], "clusterroles", role(&["*"]), Some(role(&["*"]))).await, Ok(()));
        assert!(write("ann", &[], "clusterroles", role(&["*"]), Some(role(&["get"]))).await.is_err());
        assert_eq!(write("eve", &[], "clusterroles", role(&["*"]), None).await, Ok(()));
        assert_eq!(write("root", &["system:masters"], "clusterroles", role(&["*"]), None).await, Ok(()));
        let aggregated = json!({"aggregationRule": {"clusterRoleSelectors": []}});
        assert!(write("ann", &[], "clusterroles", aggregated, None).await.is_err());
    }

    #[tokio::test]
    async fn a_binding_binds_no_more_than_its_writer_holds() {
        let binding = |role: &str| json!({"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role}, "subjects": []});
        assert_eq!(write("ann", &[], "clusterrolebindings", binding("reader"), None).await, Ok(()));
        assert!(write("ann", &[], "clusterrolebindings", binding("strong"), None).await.is_err());
        assert_eq!(write("eve", &[], "clusterrolebindings", binding("strong"), None).await, Ok(()));
        assert!(
            write("ann", &[], "clusterrolebindings", binding("gone"), None).await.unwrap_err().contains("not found")
        );
    }
}
