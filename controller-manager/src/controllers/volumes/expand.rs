//! Claims that ask for more than they have: what the cluster's own provisioner made grows here, all else is another
//! process' to enlarge, and the claim is told so.
use super::{HOST_PATH, PROVISIONED_BY, annotation, granted, phase_of_claim, requested, volume_name};
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, api_in, gone_is_fine, run};
use apimachinery::meta::NamespacedName;
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use std::sync::Arc;
use tracing::info;

const NAME: &str = "volume_expand";
const ELSEWHERE: &str = "waiting for an external controller to expand this PVC";

struct Controller {
    client: Client,
    recorder: Recorder,
    claims: Informer<PersistentVolumeClaim>,
    volumes: Informer<PersistentVolume>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("expand-controller").await else { return };
    let controller = Arc::new(Controller {
        recorder: context.recorder(&client, "volume_expand"),
        client,
        claims: context.informers.get(),
        volumes: context.informers.get(),
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    controller.claims.on_change(move |change| {
        let Some(claim) = change.new else { return };
        // Only when it asks for more than before: one that waits is not told at every change.
        if change.old.is_none_or(|old| requested(old) != requested(claim) || phase_of_claim(old) != "Bound") {
            to.add(NamespacedName::of(claim.as_ref()));
        }
    });
    controller.claims.synced().await;
    controller.volumes.synced().await;
    run(NAME, queue, controller, 10, context.shutdown.clone()).await;
}

#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Enough,
    Elsewhere,
    Grow,
}

fn plan(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Plan {
    if phase_of_claim(claim) != "Bound" || granted(claim) >= requested(claim) {
        return Plan::Enough;
    }
    let ours = annotation(&volume.metadata, PROVISIONED_BY) == Some(HOST_PATH);
    if ours { Plan::Grow } else { Plan::Elsewhere }
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(claim) = self.claims.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        let Some(volume) = volume_name(&claim).and_then(|v| self.volumes.get("", v)) else { return Ok(Next::Settled) };
        let tell =
            |kind, reason, message: &str| self.recorder.event(&reference(claim.as_ref()), kind, reason, "", message);
        match plan(&claim, &volume) {
            Plan::Enough => {}
            Plan::Elsewhere => tell(Type::Normal, "ExternalExpanding", ELSEWHERE),
            Plan::Grow => {
                // A directory is as large as its disk: there is nothing to do but to say so, the volume first.
                let size = json!({"storage": requested(&claim).to_api()});
                let name = volume.metadata.name.as_deref().unwrap_or_default();
                let patch = Patch::Merge(json!({"metadata": {"uid": volume.metadata.uid}, "spec": {"capacity": size}}));
                let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
                gone_is_fine(volumes.patch_metadata(name, &PatchParams::default(), &patch).await)?;
                let status = json!({"capacity": size, "allocatedResources": null, "allocatedResourceStatuses": null});
                let patch = Patch::Merge(json!({"metadata": {"uid": claim.metadata.uid}, "status": status}));
                let claims = api_in::<PersistentVolumeClaim>(&self.client, &key.namespace);
                gone_is_fine(claims.patch_status(&key.name, &PatchParams::default(), &patch).await)?;
                tell(Type::Normal, "VolumeResizeSuccessful", "Resize volume succeeded");
                info!(claim = %key, volume = name, "enlarged");
            }
        }
        Ok(Next::Settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_grow_by_who_made_their_volumes() {
        let claim = |phase: &str, asked: &str| -> PersistentVolumeClaim {
            serde_json::from_value(json!({"metadata": {}, "spec": {"resources": {"requests": {"storage": asked}}},
                "status": {"phase": phase, "capacity": {"storage": "1Gi"}}}))
            .unwrap()
        };
        let volume = |by: &str| -> PersistentVolume {
            serde_json::from_value(json!({"metadata": {"annotations": {PROVISIONED_BY: by}}})).unwrap()
        };
        for (phase, asked, by, expected) in [
            ("Bound", "1Gi", HOST_PATH, Plan::Enough),
            ("Bound", "2Gi", HOST_PATH, Plan::Grow),
            ("Bound", "2Gi", "example.com/p", Plan::Elsewhere),
            ("Pending", "2Gi", HOST_PATH, Plan::Enough),
        ] {
            assert_eq!(plan(&claim(phase, asked), &volume(by)), expected, "{phase} {asked} {by}");
        }
    }
}
