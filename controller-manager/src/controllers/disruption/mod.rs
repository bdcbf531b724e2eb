//! PodDisruptionBudgets: their status, by which evictions are granted; and pods that were to be disrupted and were not.
mod plan;

use super::scale::Scales;
use crate::runtime::{
    Context, Next, Reconcile, SyncError, WorkQueue, api_in, cause, gone_is_fine, is_code, put_status, run,
};
use apimachinery::{
    labels::{self, Selector},
    meta::NamespacedName,
    pod::controller_of,
};
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
};
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, ReplicaSet, StatefulSet},
        core::v1::{Pod, ReplicationController},
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
    jiff::Timestamp,
};
use kube::{
    Client, ResourceExt as _,
    api::{Patch, PatchParams},
};
use plan::{Expected, needs_scale};
use serde_json::json;
use std::{collections::HashMap, sync::Arc};

const NAME: &str = "disruption";
const STALE: &str = "stale_pod_disruption";
/// A thousand budgets are not written again and again because one server is slow.
const WORKERS: usize = 4;

struct Controller {
    client: Client,
    recorder: Recorder,
    scales: Scales,
    budgets: Informer<PodDisruptionBudget>,
    pods: Informer<Pod>,
    deployments: Informer<Deployment>,
    sets: Informer<ReplicaSet>,
    controllers: Informer<ReplicationController>,
    stateful_sets: Informer<StatefulSet>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("disruption-controller").await else { return };
    let (budgets, pods) = (context.informers.get::<PodDisruptionBudget>(), context.informers.get::<Pod>());
    let controller = Arc::new(Controller {
        recorder: context.recorder(&client, "controllermanager"),
        scales: Scales::new(client.clone()),
        client: client.clone(),
        budgets: budgets.clone(),
        pods: pods.clone(),
        deployments: context.informers.get(),
        sets: context.informers.get(),
        controllers: context.informers.get(),
        stateful_sets: context.informers.get(),
    });
    let (queue, stale_queue) = (Arc::new(WorkQueue::new(NAME)), Arc::new(WorkQueue::new(STALE)));
    let to = queue.clone();
    budgets.on_change(move |change| {
        change.new.into_iter().for_each(|b| to.add(NamespacedName::of(b.as_ref())));
    });
    let (to, to_stale, all) = (queue.clone(), stale_queue.clone(), budgets.clone());
    pods.on_change(move |change| {
        if let Some(pod) = change.new.filter(|p| plan::stale_disruption(p, Timestamp::now()).is_some()) {
            to_stale.add(NamespacedName::of(pod.as_ref()));
        }
        let Some(pod) = change.latest() else { return };
        if !all.is_empty() {
            let selected = |b: &PodDisruptionBudget| {
                let selector = selector_of(b);
                let either = change.old.into_iter().chain(change.new);
                either.into_iter().any(|p| selector.matches_opt(p.metadata.labels.as_ref()))
            };
            for budget in all.list_in(pod.metadata.namespace.as_deref().unwrap_or_default()) {
                if selected(&budget) {
                    to.add(NamespacedName::of(budget.as_ref()));
                }
            }
        }
    });
    budgets.synced().await;
    pods.synced().await;
    controller.deployments.synced().await;
    controller.sets.synced().await;
    controller.controllers.synced().await;
    controller.stateful_sets.synced().await;
    let cleaner = Arc::new(Cleaner { client, pods });
    futures::join!(
        run(NAME, queue, controller, WORKERS, context.shutdown.clone()),
        run(STALE, stale_queue, cleaner, 1, context.shutdown.clone())
    );
}

/// Without a selector: nothing; an empty one selects all.
fn selector_of(budget: &PodDisruptionBudget) -> Selector {
    let selector = budget.spec.as_ref().and_then(|s| s.selector.as_ref());
    selector.and_then(|s| Selector::from_label_selector(s).ok()).unwrap_or_else(Selector::nothing)
}

fn is(meta: &ObjectMeta, owner: &OwnerReference) -> bool {
    meta.uid.as_ref() == Some(&owner.uid)
}

impl Controller {
    /// The UID of what scales a pod's owner, and its replicas. As the `finders`.
    async fn scale_of(&self, namespace: &str, owner: &OwnerReference) -> Result<Option<(String, i32)>, SyncError> {
        let found = match (owner.api_version.as_str(), owner.kind.as_str()) {
            ("apps/v1", "ReplicaSet") => {
                let Some(set) = self.sets.get(namespace, &owner.name).filter(|s| is(&s.metadata, owner)) else {
                    return Ok(None);
                };
                match controller_of(&set.metadata) {
                    Some(by) if by.kind == "Deployment" => {
                        let deployment = self.deployments.get(namespace, &by.name).filter(|d| is(&d.metadata, by));
                        deployment.map(|d| (by.uid.clone(), d.spec.as_ref().and_then(|s| s.replicas)))
                    }
                    _ => Some((owner.uid.clone(), set.spec.as_ref().and_then(|s| s.replicas))),
                }
            }
            ("v1", "ReplicationController") => {
                let found = self.controllers.get(namespace, &owner.name).filter(|c| is(&c.metadata, owner));
                found.map(|c| (owner.uid.clone(), c.spec.as_ref().and_then(|s| s.replicas)))
            }
            ("apps/v1", "StatefulSet") => {
                let found = self.stateful_sets.get(namespace, &owner.name).filter(|s| is(&s.metadata, owner));
                found.map(|s| (owner.uid.clone(), s.spec.as_ref().and_then(|s| s.replicas)))
            }
            (api_version, kind) => {
                if let Some(resource) = self.scales.unscalable(api_version, kind).await? {
                    return Err(SyncError::Invalid(format!("{resource} does not implement the scale subresource")));
                }
                let scale = gone_is_fine(self.scales.get(namespace, api_version, kind, &owner.name).await)?.flatten();
                let scale = scale.filter(|s| is(&s.metadata, owner));
                scale.map(|s| (owner.uid.clone(), s.spec.and_then(|s| s.replicas).or(Some(0))))
            }
        };
        Ok(found.map(|(uid, replicas)| (uid, replicas.unwrap_or(1))))
    }

    /// The sum of the owners' replicas. As `getExpectedScale`.
    async fn expected_scale(&self, budget: &PodDisruptionBudget, pods: &[Arc<Pod>]) -> Result<i32, String> {
        let namespace = budget.metadata.namespace.as_deref().unwrap_or_default();
        let (mut scales, mut unmanaged) = (HashMap::new(), false);
        for pod in pods {
            let Some(owner) = controller_of(&pod.metadata) else {
                unmanaged = true;
                continue;
            };
            if scales.contains_key(&owner.uid) {
                continue;
            }
            match self.scale_of(namespace, owner).await {
                Ok(Some(scale)) => drop(scales.insert(owner.uid.clone(), scale)),
                Ok(None) => return Err(format!("found no controllers for pod {:?}", pod.name_any())),
                Err(error) => return Err(error.to_string()),
            }
        }
        if unmanaged {
            let selector = labels::go_text(budget.spec.as_ref().and_then(|s| s.selector.as_ref()));
            let message = format!(
                "Pods selected by this PodDisruptionBudget (selector: {selector}) were found to be unmanaged. As a result, the \
                status of the PDB cannot be calculated correctly, which may result in undefined behavior. To account for these \
                pods please set \".spec.minAvailable\" field of the PDB to an integer value."
            );
            self.recorder.event(&reference(budget), Type::Warning, "UnmanagedPods", "", message);
        }
        // Several sets of one Deployment are scaled as one.
        let by_owner: HashMap<String, i32> = scales.into_values().collect();
        Ok(by_owner.into_values().sum())
    }

    async fn write(&self, budget: &PodDisruptionBudget, status: PodDisruptionBudgetStatus) -> Result<(), SyncError> {
        if budget.status.as_ref() == Some(&status) {
            return Ok(());
        }
        let mut updated = budget.clone();
        updated.status = Some(status);
        put_status(&self.client, &updated).await?;
        Ok(())
    }
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(budget) = self.budgets.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        let selector = selector_of(&budget);
        let mut pods = self.pods.list_in(&key.namespace);
        pods.retain(|p| selector.matches_opt(p.metadata.labels.as_ref()));
        let (about, now) = (reference(budget.as_ref()), Timestamp::now());
        if pods.is_empty() {
            self.recorder.event(&about, Type::Normal, "NoPods", "", "No matching pods found");
        }
        let expected = match budget.spec.as_ref().is_some_and(needs_scale) {
            false => Expected::Pods,
            true => match self.expected_scale(&budget, &pods).await {
                Ok(scale) => Expected::Scale(scale),
                Err(why) => {
                    let message = format!("Failed to calculate the number of expected pods: {why}");
                    self.recorder.event(&about, Type::Warning, "CalculateExpectedPodCountFailed", "", message);
                    self.write(&budget, plan::fail_safe(&budget, &why, now)).await?;
                    return Err(SyncError::Waiting(why));
                }
            },
        };
        let (status, stayed, wait) = plan::status(&budget, &pods, expected, now);
        for pod in pods.iter().filter(|p| stayed.contains(&p.name_any())) {
            let message = format!("Pod was expected by PDB {}/{} to be deleted but it wasn't", key.namespace, key.name);
            self.recorder.event(&reference(pod.as_ref()), Type::Warning, "NotDeleted", "", message);
        }
        self.write(&budget, status).await?;
        Ok(Next::after(wait))
    }
}

// === pods that were to be disrupted and were not ===

struct Cleaner {
    client: Client,
    pods: Informer<Pod>,
}

impl Reconcile for Cleaner {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(pod) = self.pods.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        match plan::stale_disruption(&pod, Timestamp::now()) {
            None => return Ok(Next::Settled),
            Some(Err(wait)) => return Ok(Next::After(wait)),
            Some(Ok(())) => {}
        }
        let condition = json!({"type": "DisruptionTarget", "status": "False", "lastTransitionTime": Timestamp::now(),
            "reason": null, "message": null, "observedGeneration": pod.metadata.generation});
        let patch = json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [condition]}});
        let api = api_in::<Pod>(&self.client, &key.namespace);
        let written = api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(patch)).await;
        match gone_is_fine(written) {
            Err(error) if is_code(&error, 409) => Err(SyncError::Waiting(cause(&error))),
            outcome => outcome.map(|_| Next::Settled).map_err(Into::into),
        }
    }
}
