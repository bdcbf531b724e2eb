//! Says of each ValidatingAdmissionPolicy that it was looked at. What does not compile the server has refused; the types
//! of expressions, of which upstream warns here, are not checked.
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, gone_is_fine, run};
use component_base::informer::Informer;
use k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicy;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
};
use serde_json::json;
use std::sync::Arc;

const NAME: &str = "validatingadmissionpolicy_status";

struct Controller {
    client: Client,
    policies: Informer<ValidatingAdmissionPolicy>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("validatingadmissionpolicy-status-controller").await else { return };
    let policies = context.informers.get::<ValidatingAdmissionPolicy>();
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    policies.on_change(move |change| change.new.into_iter().for_each(|policy| to.add(policy.name_any())));
    policies.synced().await;
    let workers = context.settings.concurrent_validating_admission_policy_status_syncs;
    run(NAME, queue, Arc::new(Controller { client, policies }), workers, context.shutdown.clone()).await;
}

impl Reconcile for Controller {
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Next, SyncError> {
        let Some(policy) = self.policies.get("", name) else { return Ok(Next::Settled) };
        let generation = policy.metadata.generation;
        if policy.status.as_ref().and_then(|s| s.observed_generation) == generation {
            return Ok(Next::Settled);
        }
        let status = json!({"observedGeneration": generation, "typeChecking": {}});
        let patch = Patch::Merge(json!({"metadata": {"uid": policy.metadata.uid}, "status": status}));
        let api: Api<ValidatingAdmissionPolicy> = Api::all(self.client.clone());
        gone_is_fine(api.patch_status(name, &PatchParams::default(), &patch).await)?;
        Ok(Next::Settled)
    }
}
