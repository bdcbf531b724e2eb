//! A claim for each volume that a pod wants made for itself; it is the pod's, and goes with it.
use super::claim_of;
use crate::{
    controllers::claim::controller_reference,
    runtime::{Context, Next, Reconcile, SyncError, WorkQueue, api_in, cause, is_code, run},
};
use apimachinery::{
    meta::NamespacedName,
    pod::{controller_of, is_terminal},
};
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Volume};
use kube::{Client, api::PostParams};
use std::sync::Arc;

const NAME: &str = "ephemeral_volume";

struct Controller {
    client: Client,
    recorder: Recorder,
    pods: Informer<Pod>,
    claims: Informer<PersistentVolumeClaim>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("ephemeral-volume-controller").await else { return };
    let controller = Arc::new(Controller {
        recorder: context.recorder(&client, "ephemeral_volume"),
        client,
        pods: context.informers.get(),
        claims: context.informers.get(),
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    controller.pods.on_change(move |change| {
        if let Some(pod) = change.new.filter(|p| change.old.is_none() && volumes_of(p).next().is_some()) {
            to.add(NamespacedName::of(pod.as_ref()));
        }
    });
    let to = queue.clone();
    controller.claims.on_change(move |change| {
        // One that was deleted is made again while its pod is there.
        if let (Some(claim), None) = (change.old, change.new)
            && let Some(owner) = controller_of(&claim.metadata).filter(|o| o.kind == "Pod")
        {
            to.add(NamespacedName::new(claim.metadata.namespace.clone().unwrap_or_default(), owner.name.clone()));
        }
    });
    controller.pods.synced().await;
    controller.claims.synced().await;
    run(NAME, queue, controller, context.settings.concurrent_ephemeralvolume_syncs, context.shutdown.clone()).await;
}

fn volumes_of(pod: &Pod) -> impl Iterator<Item = &Volume> {
    pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()).filter(|v| v.ephemeral.is_some())
}

/// The claim of a pod's volume.
fn claim(pod: &Pod, volume: &Volume) -> Option<PersistentVolumeClaim> {
    let template = volume.ephemeral.as_ref()?.volume_claim_template.clone()?;
    let (name, _) = claim_of(pod.metadata.name.as_deref()?, volume)?;
    let given = template.metadata.unwrap_or_default();
    let mut claim = PersistentVolumeClaim { spec: Some(template.spec), ..PersistentVolumeClaim::default() };
    claim.metadata.name = Some(name);
    claim.metadata.labels = given.labels;
    claim.metadata.annotations = given.annotations;
    claim.metadata.owner_references = Some(vec![controller_reference(pod)]);
    Some(claim)
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(pod) = self.pods.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        if pod.metadata.deletion_timestamp.is_some() || is_terminal(&pod) {
            return Ok(Next::Settled);
        }
        let wanted = volumes_of(&pod).filter_map(|volume| Some((volume.name.as_str(), claim(&pod, volume)?)));
        for (volume, wanted) in wanted {
            let name = wanted.metadata.name.clone().unwrap_or_default();
            let tell = |why: &str| {
                let message = format!("ephemeral volume {volume}: {why}");
                self.recorder.event(&reference(pod.as_ref()), Type::Warning, "FailedBinding", "", message);
            };
            if let Some(existing) = self.claims.get(&key.namespace, &name) {
                if controller_of(&existing.metadata).is_none_or(|o| Some(&o.uid) != pod.metadata.uid.as_ref()) {
                    let place = &key.namespace;
                    let why = format!("PVC {place}/{name} was not created for pod {key} (pod is not owner)");
                    tell(&why);
                    return Err(SyncError::Invalid(why));
                }
                continue;
            }
            let api = api_in::<PersistentVolumeClaim>(&self.client, &key.namespace);
            match api.create(&PostParams::default(), &wanted).await {
                Ok(_) => {}
                // The cache lags, or another's has the name: the next look tells.
                Err(error) if is_code(&error, 409) => {
                    return Err(SyncError::Waiting(format!("claim {name} to show")));
                }
                Err(error) => {
                    tell(&format!("create PVC {name}: {}", cause(&error)));
                    return Err(error.into());
                }
            }
        }
        Ok(Next::Settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_claim_is_made_from_the_template_and_is_the_pods() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"},
            "spec": {"containers": [], "volumes": [{"name": "other", "persistentVolumeClaim": {"claimName": "c"}},
                {"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"metadata": {"labels": {"a": "b"}},
                    "spec": {"accessModes": ["ReadWriteOnce"]}}}}]}}))
        .unwrap();
        let made: Vec<_> = volumes_of(&pod).filter_map(|v| claim(&pod, v)).collect();
        assert_eq!(made.len(), 1);
        let meta = &made[0].metadata;
        assert_eq!((meta.name.as_deref(), meta.labels.as_ref().unwrap()["a"].as_str()), (Some("p-scratch"), "b"));
        assert_eq!(controller_of(meta).unwrap().uid, "u");
        assert_eq!(made[0].spec.as_ref().unwrap().access_modes.as_ref().unwrap().len(), 1);
    }
}
