//! EndpointSlices: the pods behind each Service that has a selector.
mod hints;
pub mod mirroring;
mod monitor;
mod plan;

use super::service_backends as backends;
use crate::runtime::{
    Context, Expectations, Next, Reconcile, SyncError, Watched, WorkQueue, api_in, cause, gone_is_fine, is_code,
    is_terminating, run,
};
use apimachinery::meta::NamespacedName;
use component_base::{
    events::{Recorder, Type, reference},
    informer::{Change, Informer},
};
use hints::Distribution;
use k8s_openapi::api::{
    core::v1::{Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Client, ResourceExt as _,
    api::{DeleteParams, PostParams},
};
use monitor::Monitor;
use plan::Topology;
use std::{collections::BTreeSet, sync::Arc, time::Duration};

const NAME: &str = "endpoint_slice";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// How long the cache may take to show what was created before it is looked at all the same.
const CACHE_LAG: Duration = Duration::from_secs(5);

struct Controller {
    client: Client,
    recorder: Recorder,
    services: Informer<Service>,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
    slices: Informer<EndpointSlice>,
    expectations: Arc<Expectations>,
    max_per_slice: usize,
    triggers: backends::Triggers,
    monitor: Monitor,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("endpointslice-controller").await else { return };
    let controller = Arc::new(Controller {
        recorder: context.recorder(&client, "endpoint-slice-controller"),
        client,
        services: context.informers.get(),
        pods: context.informers.get(),
        nodes: context.informers.get(),
        slices: context.informers.get(),
        expectations: Arc::default(),
        max_per_slice: context.settings.max_endpoints_per_slice,
        triggers: backends::Triggers::default(),
        monitor: Monitor::default(),
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let gathered_for = context.settings.endpointslice_updates_batch_period;
    wake_by_services_and_pods(&controller.services, &controller.pods, &queue, gathered_for);
    let (to, expectations) = (queue.clone(), controller.expectations.clone());
    controller.slices.on_change(move |change| {
        let Some(key) = change.latest().and_then(|s| service_of(s)) else { return };
        if change.old.is_none() {
            expectations.creation_observed(&key);
        }
        // Our own writes come back too; a step that finds nothing to do is cheap.
        to.add(key);
    });
    let (to, services, on_node) = (queue.clone(), controller.services.clone(), context.pods_by_node());
    controller.nodes.on_change(move |change: Change<'_, Node>| {
        let Some(node) = change.latest() else { return };
        let zone = |n: Option<&Arc<Node>>| n.map(|n| zone_of(n));
        if zone(change.old) != zone(change.new) {
            on_node.get(&node.name_any()).iter().for_each(|pod| wake_services_of(&services, pod, &to, Duration::ZERO));
        }
        let part = |n: Option<&Arc<Node>>| n.map(|n| hints::part(n));
        if part(change.old) != part(change.new) {
            let auto = |s: &&Arc<Service>| hints::distribution(s) == Distribution::Auto;
            services.list().iter().filter(auto).for_each(|s| to.add(NamespacedName::of(s.as_ref())));
        }
    });
    controller.services.synced().await;
    controller.pods.synced().await;
    controller.nodes.synced().await;
    controller.slices.synced().await;
    let workers = context.settings.concurrent_service_endpoint_syncs;
    run(NAME, queue, controller, workers, context.shutdown.clone()).await;
}

/// Puts the Services into the queue that changed, or, after a time, whose pods did.
pub fn wake_by_services_and_pods(
    services: &Informer<Service>,
    pods: &Informer<Pod>,
    queue: &Arc<WorkQueue<NamespacedName>>,
    gathered_for: Duration,
) {
    let to = queue.clone();
    services.on_change(move |change| {
        if let Some(service) = change.latest() {
            to.add(NamespacedName::of(service.as_ref()));
        }
    });
    let (to, services) = (queue.clone(), services.clone());
    pods.on_change(move |change| {
        if let (Some(old), Some(new)) = (change.old, change.new)
            && !backends::matters(old, new)
        {
            return;
        }
        let relabelled = change.old.map(|p| &p.metadata.labels) != change.new.map(|p| &p.metadata.labels);
        change
            .old
            .filter(|_| relabelled)
            .into_iter()
            .for_each(|pod| wake_services_of(&services, pod, &to, gathered_for));
        change.new.into_iter().for_each(|pod| wake_services_of(&services, pod, &to, gathered_for));
    });
}

fn wake_services_of(services: &Informer<Service>, pod: &Pod, queue: &WorkQueue<NamespacedName>, after: Duration) {
    for service in services.list_in(pod.metadata.namespace.as_deref().unwrap_or_default()) {
        if backends::selector(&service).is_some_and(|s| s.matches_opt(pod.metadata.labels.as_ref())) {
            queue.add_after(NamespacedName::of(service.as_ref()), after);
        }
    }
}

fn zone_of(node: &Node) -> Option<String> {
    node.metadata.labels.as_ref()?.get(ZONE_LABEL).cloned()
}

/// The Service of a slice that this controller made.
fn service_of(slice: &EndpointSlice) -> Option<NamespacedName> {
    let labels = slice.metadata.labels.as_ref()?;
    let ours = labels.get(plan::MANAGED_BY_LABEL).map(String::as_str) == Some(plan::MANAGED_BY);
    let service = labels.get(plan::SERVICE_LABEL).filter(|_| ours)?;
    Some(NamespacedName::new(slice.metadata.namespace.clone()?, service))
}

/// The pods that a Service selects.
pub fn selected<K: Watched>(
    objects: &Informer<K>,
    namespace: &str,
    selector: &apimachinery::labels::Selector,
) -> Vec<Arc<K>> {
    let mut all = objects.list_in(namespace);
    all.retain(|o| selector.matches_opt(o.meta().labels.as_ref()));
    all
}

impl Controller {
    async fn write(&self, key: &NamespacedName, changes: plan::Changes) -> Result<(), kube::Error> {
        let api = api_in::<EndpointSlice>(&self.client, &key.namespace);
        if !changes.create.is_empty() {
            self.expectations.expect_creations(key, changes.create.len());
        }
        for (done, slice) in changes.create.iter().enumerate() {
            if let Err(error) = api.create(&PostParams::default(), slice).await {
                (done..changes.create.len()).for_each(|_| self.expectations.creation_observed(key));
                return Err(error);
            }
        }
        for slice in &changes.update {
            let name = slice.metadata.name.as_deref().unwrap_or_default();
            api.replace(name, &PostParams::default(), slice).await?;
        }
        for name in &changes.delete {
            gone_is_fine(api.delete(name, &DeleteParams::default()).await)?;
        }
        Ok(())
    }
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        // Slices of a Service that is gone go with it: the garbage collector sees to them.
        let Some(service) = self.services.get(&key.namespace, &key.name) else {
            self.expectations.forget(key);
            self.triggers.forget(key);
            self.monitor.forget(key);
            return Ok(Next::Settled);
        };
        let Some(selector) = backends::selector(&service) else { return Ok(Next::Settled) };
        if service.metadata.deletion_timestamp.is_some() {
            return Ok(Next::Settled);
        }
        if !self.expectations.satisfied(key) {
            // The creation's own event brings us back.
            return Ok(Next::After(CACHE_LAG));
        }
        let pods = selected(&self.pods, &key.namespace, &selector);
        let names: BTreeSet<String> = pods.iter().filter_map(|p| backends::node_name(p)).collect();
        let zones = names.into_iter().filter_map(|name| self.nodes.get("", &name).map(|node| (name, zone_of(&node))));
        let auto = hints::distribution(&service) == Distribution::Auto;
        let shares = if auto { hints::shares(&self.nodes.list()) } else { None };
        let topology = Topology { zones: zones.collect(), shares };
        let mut existing = self.slices.list_in(&key.namespace);
        existing.retain(|s| service_of(s).as_ref() == Some(key));
        let mut changes = plan::plan(&service, &pods, &topology, &existing, self.max_per_slice);
        let trigger = self.triggers.look(key, &service, &pods);
        let written = changes.create.iter_mut().chain(&mut changes.update);
        written.for_each(|slice| backends::annotate_trigger(&mut slice.metadata, trigger));
        for (well, message) in &changes.told {
            let (kind, reason) = match well {
                true => (Type::Normal, "TopologyAwareHintsEnabled"),
                false => (Type::Warning, "TopologyAwareHintsDisabled"),
            };
            self.recorder.event(&reference(service.as_ref()), kind, reason, "", message.clone());
        }
        let counted = monitor::count(&service, &existing, &changes, self.max_per_slice);
        if let Err(error) = self.write(key, changes).await {
            if !is_code(&error, 409) && !is_code(&error, 404) && !is_terminating(&error) {
                let message = format!(
                    "Error updating Endpoint Slices for Service {}/{}: {}",
                    key.namespace,
                    key.name,
                    cause(&error)
                );
                let about = reference(service.as_ref());
                self.recorder.event(&about, Type::Warning, "FailedToUpdateEndpointSlices", "", message);
            }
            return Err(error.into());
        }
        self.monitor.note(key, counted);
        Ok(Next::Settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tokio::time::{Instant, timeout};

    #[tokio::test(start_paused = true)]
    async fn changes_of_pods_are_gathered_for_the_batch_period() {
        let service: Service = serde_json::from_value(
            json!({"metadata": {"namespace": "ns", "name": "web"}, "spec": {"selector": {"app": "web"}}}),
        )
        .unwrap();
        let pod = |app: &str| -> Pod {
            serde_json::from_value(json!({"metadata": {"namespace": "ns", "name": app, "labels": {"app": app}}}))
                .unwrap()
        };
        let (services, web) = (Informer::fixed([service]), NamespacedName::new("ns", "web"));
        for period_ms in [0, 500] {
            let (queue, start) = (WorkQueue::new("batch-period"), Instant::now());
            for wait_ms in [0, 300] {
                tokio::time::advance(Duration::from_millis(wait_ms)).await;
                for app in ["web", "other"] {
                    wake_services_of(&services, &pod(app), &queue, Duration::from_millis(period_ms));
                }
            }
            assert_eq!(queue.next().await, web);
            // The first change begins the period, and what comes within it does not prolong it.
            assert_eq!(start.elapsed().as_millis(), u128::from(period_ms.max(300)));
            queue.done(&web, Duration::ZERO);
            assert!(timeout(Duration::from_secs(10), queue.next()).await.is_err(), "all in one go");
        }
    }
}
