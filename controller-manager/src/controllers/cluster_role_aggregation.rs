//! Cluster roles with an aggregation rule hold the rules of all cluster roles that the rule selects.
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, run};
use apimachinery::labels::Selector;
use component_base::informer::Informer;
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use kube::{Api, Client, ResourceExt as _, api::PostParams};
use std::sync::Arc;

const NAME: &str = "ClusterRoleAggregator";

struct Controller {
    client: Client,
    roles: Informer<ClusterRole>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("clusterrole-aggregation-controller").await else { return };
    let roles = context.informers.get::<ClusterRole>();
    let queue = Arc::new(WorkQueue::new(NAME));
    let (to, all) = (queue.clone(), roles.clone());
    // Any role may be selected by any other, and there are few: each change looks at all that aggregate.
    roles.on_change(move |_| {
        all.list().iter().filter(|r| r.aggregation_rule.is_some()).for_each(|r| to.add(r.name_any()));
    });
    roles.synced().await;
    run(NAME, queue, Arc::new(Controller { client, roles }), 5, context.shutdown.clone()).await;
}

/// The rules that `role` should have: those of the selected roles by name, each once.
fn plan(role: &ClusterRole, all: &[Arc<ClusterRole>]) -> Result<Vec<PolicyRule>, SyncError> {
    let mut rules: Vec<PolicyRule> = Vec::new();
    let selectors = role.aggregation_rule.iter().flat_map(|r| r.cluster_role_selectors.iter().flatten());
    for selector in selectors {
        let selector = Selector::from_label_selector(selector)
            .map_err(|e| SyncError::Invalid(format!("aggregationRule of {}: {e}", role.name_any())))?;
        let selected = all
            .iter()
            .filter(|r| r.metadata.name != role.metadata.name && selector.matches_opt(r.metadata.labels.as_ref()));
        for rule in selected.flat_map(|r| r.rules.iter().flatten()) {
            if !rules.contains(rule) {
                rules.push(rule.clone());
            }
        }
    }
    Ok(rules)
}

impl Reconcile for Controller {
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Next, SyncError> {
        let Some(role) = self.roles.get("", name).filter(|r| r.aggregation_rule.is_some()) else {
            return Ok(Next::Settled);
        };
        let rules = plan(&role, &self.roles.list())?;
        if role.rules.as_deref().unwrap_or_default() == rules {
            return Ok(Next::Settled);
        }
        let mut updated = role.as_ref().clone();
        updated.rules = Some(rules);
        Api::<ClusterRole>::all(self.client.clone()).replace(name, &PostParams::default(), &updated).await?;
        Ok(Next::Settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn role(name: &str, label: &str, resource: &str) -> Arc<ClusterRole> {
        let value = json!({"metadata": {"name": name, "labels": {label: "true"}},
            "rules": [{"verbs": ["get"], "apiGroups": [""], "resources": [resource]}]});
        Arc::new(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn the_rules_of_the_selected_roles_each_once() {
        let admin: ClusterRole = serde_json::from_value(json!({"metadata": {"name": "admin", "labels": {"a": "true"}},
            "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"a": "true"}}, {"matchLabels": {"b": "true"}}]}}))
        .unwrap();
        let all = [
            Arc::new(admin.clone()),
            role("x", "a", "pods"),
            role("y", "b", "pods"),
            role("z", "b", "nodes"),
            role("w", "c", "secrets"),
        ];
        let resources: Vec<_> =
            plan(&admin, &all).unwrap().into_iter().flat_map(|r| r.resources.unwrap_or_default()).collect();
        assert_eq!(resources, ["pods", "nodes"]);
    }
}
