//! Endpoints: the older form of EndpointSlices, for clients that read it still.
mod plan;

use super::{
    endpointslice::{selected, wake_by_services_and_pods},
    service_backends as backends,
};
use crate::runtime::{
    Context, Next, Reconcile, SyncError, WorkQueue, api_in, cause, gone_is_fine, is_code, is_terminating, run,
};
use apimachinery::meta::NamespacedName;
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
};
use k8s_openapi::api::core::v1::{Endpoints, Pod, Service};
use kube::{
    Client,
    api::{DeleteParams, PostParams},
};
use std::sync::Arc;

const NAME: &str = "endpoint";

struct Controller {
    client: Client,
    recorder: Recorder,
    services: Informer<Service>,
    pods: Informer<Pod>,
    endpoints: Informer<Endpoints>,
    triggers: backends::Triggers,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("endpoint-controller").await else { return };
    let controller = Arc::new(Controller {
        recorder: context.recorder(&client, "endpoint-controller"),
        client,
        services: context.informers.get(),
        pods: context.informers.get(),
        endpoints: context.informers.get(),
        triggers: backends::Triggers::default(),
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let gathered_for = context.settings.endpoint_updates_batch_period;
    wake_by_services_and_pods(&controller.services, &controller.pods, &queue, gathered_for);
    let to = queue.clone();
    controller.endpoints.on_change(move |change| {
        // Also those whose Service went while nobody watched.
        change.latest().into_iter().for_each(|e| to.add(NamespacedName::of(e.as_ref())));
    });
    controller.services.synced().await;
    controller.pods.synced().await;
    controller.endpoints.synced().await;
    let workers = context.settings.concurrent_endpoint_syncs;
    run(NAME, queue, controller, workers, context.shutdown.clone()).await;
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let api = api_in::<Endpoints>(&self.client, &key.namespace);
        let existing = self.endpoints.get(&key.namespace, &key.name);
        let Some(service) = self.services.get(&key.namespace, &key.name) else {
            self.triggers.forget(key);
            // Endpoints outlive no Service, except those that elect leaders.
            let elects = |e: &Endpoints| {
                let annotations = e.metadata.annotations.as_ref();
                annotations.is_some_and(|a| a.contains_key("control-plane.alpha.kubernetes.io/leader"))
            };
            let managed = |e: &Endpoints| {
                e.metadata.labels.as_ref().is_some_and(|l| l.contains_key("endpoints.kubernetes.io/managed-by"))
            };
            if existing.is_some_and(|e| managed(&e) && !elects(&e)) {
                gone_is_fine(api.delete(&key.name, &DeleteParams::default()).await)?;
            }
            return Ok(Next::Settled);
        };
        let Some(selector) = backends::selector(&service) else { return Ok(Next::Settled) };
        if service.metadata.deletion_timestamp.is_some() {
            return Ok(Next::Settled);
        }
        let pods = selected(&self.pods, &key.namespace, &selector);
        let trigger = self.triggers.look(key, &service, &pods);
        let Some(mut wanted) = plan::plan(&service, &pods, existing.as_deref()) else { return Ok(Next::Settled) };
        backends::annotate_trigger(&mut wanted.metadata, trigger);
        let outcome = match &existing {
            Some(_) => api.replace(&key.name, &PostParams::default(), &wanted).await,
            None => api.create(&PostParams::default(), &wanted).await,
        };
        if let Err(error) = outcome {
            if !is_code(&error, 409) && !is_code(&error, 404) && !is_terminating(&error) {
                let (reason, failed) = match existing {
                    Some(_) => ("FailedToUpdateEndpoint", "Failed to update endpoint"),
                    None => ("FailedToCreateEndpoint", "Failed to create endpoint for service"),
                };
                let message = format!("{failed} {key}: {}", cause(&error));
                self.recorder.event(&reference(&wanted), Type::Warning, reason, "", message);
            }
            return Err(error.into());
        }
        Ok(Next::Settled)
    }
}
