//! ReplicaSets and ReplicationControllers: as many pods of a template as asked for.
//!
//! Both kinds run over the same code; [`ReplicaOwner`] is what differs.
pub mod plan;

use super::{
    claim::{claim, controller_reference},
    pod_control::PodControl,
};
use crate::runtime::{
    Context, Expectations, Index, Next, Reconcile, SyncError, Watched, WorkQueue, api_in, cause, orphans_of, run,
};
use apimachinery::{labels::Selector, meta::NamespacedName, pod::controller_of};
use component_base::{
    events::reference,
    informer::{Change, Informer},
};
use futures::{StreamExt as _, stream};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus},
        core::v1::{
            Pod, PodTemplateSpec, ReplicationController, ReplicationControllerCondition, ReplicationControllerStatus,
        },
    },
    jiff::Timestamp,
};
use kube::api::PostParams;
use plan::{Observed, Scaling};
use serde::Serialize;
use std::sync::Arc;

/// Deletions of one step that are under way at the same time.
const PARALLEL_DELETIONS: usize = 16;
/// Creations of one batch that are under way at the same time.
const PARALLEL_CREATIONS: usize = 16;

/// What a kind says of the pods that it wants.
pub trait ReplicaOwner: Watched + kube::Resource<Scope = NamespaceResourceScope> + Serialize {
    const CONTROLLER: &'static str;
    const COMPONENT: &'static str;

    fn replicas(&self) -> i32;
    fn min_ready_seconds(&self) -> i32;
    fn template(&self) -> Option<&PodTemplateSpec>;
    fn selector(&self) -> Result<Selector, SyncError>;
    fn status(&self) -> ReplicaSetStatus;
    fn set_status(&mut self, status: ReplicaSetStatus);
}

impl ReplicaOwner for ReplicaSet {
    const CONTROLLER: &'static str = "replicaset";
    const COMPONENT: &'static str = "replicaset-controller";

    fn replicas(&self) -> i32 {
        self.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
    }

    fn min_ready_seconds(&self) -> i32 {
        self.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0)
    }

    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref()?.template.as_ref()
    }

    fn selector(&self) -> Result<Selector, SyncError> {
        Selector::from_label_selector_opt(self.spec.as_ref().map(|s| &s.selector))
            .map_err(|e| SyncError::Invalid(format!("selector: {e}")))
    }

    fn status(&self) -> ReplicaSetStatus {
        self.status.clone().unwrap_or_default()
    }

    fn set_status(&mut self, status: ReplicaSetStatus) {
        self.status = Some(status);
    }
}

impl ReplicaOwner for ReplicationController {
    const CONTROLLER: &'static str = "replicationmanager";
    const COMPONENT: &'static str = "replication-controller";

    fn replicas(&self) -> i32 {
        self.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
    }

    fn min_ready_seconds(&self) -> i32 {
        self.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0)
    }

    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref()?.template.as_ref()
    }

    fn selector(&self) -> Result<Selector, SyncError> {
        let labels = self.spec.as_ref().and_then(|s| s.selector.as_ref());
        Ok(labels.filter(|l| !l.is_empty()).map_or_else(Selector::nothing, Selector::from_map))
    }

    fn status(&self) -> ReplicaSetStatus {
        let status = self.status.clone().unwrap_or_default();
        let conditions = status.conditions.map(|conditions| {
            let convert = |c: ReplicationControllerCondition| ReplicaSetCondition {
                type_: c.type_,
                status: c.status,
                reason: c.reason,
                message: c.message,
                last_transition_time: c.last_transition_time,
            };
            conditions.into_iter().map(convert).collect()
        });
        ReplicaSetStatus {
            replicas: status.replicas,
            fully_labeled_replicas: status.fully_labeled_replicas,
            ready_replicas: status.ready_replicas,
            available_replicas: status.available_replicas,
            terminating_replicas: None,
            observed_generation: status.observed_generation,
            conditions,
        }
    }

    fn set_status(&mut self, status: ReplicaSetStatus) {
        let conditions = status.conditions.map(|conditions| {
            let convert = |c: ReplicaSetCondition| ReplicationControllerCondition {
                type_: c.type_,
                status: c.status,
                reason: c.reason,
                message: c.message,
                last_transition_time: c.last_transition_time,
            };
            conditions.into_iter().map(convert).collect()
        });
        self.status = Some(ReplicationControllerStatus {
            replicas: status.replicas,
            fully_labeled_replicas: status.fully_labeled_replicas,
            ready_replicas: status.ready_replicas,
            available_replicas: status.available_replicas,
            observed_generation: status.observed_generation,
            conditions,
        });
    }
}

struct Controller<K> {
    owners: Informer<K>,
    pods: Arc<Index<Pod>>,
    /// For ReplicaSets: their siblings, whose pods tell how crowded nodes are.
    siblings: Arc<Index<ReplicaSet>>,
    expectations: Arc<Expectations>,
    control: PodControl,
}

/// Runs ReplicaSets' or ReplicationControllers' controller until shutdown.
pub async fn start<K: ReplicaOwner>(context: Arc<Context>, account: &'static str, workers: usize) {
    let Some(client) = context.client_for(account).await else { return };
    let (owners, pods) = (context.informers.get::<K>(), context.informers.get::<Pod>());
    let controller = Arc::new(Controller {
        owners: owners.clone(),
        pods: context.pods_by_controller(),
        siblings: context.sets_by_controller(),
        expectations: Arc::default(),
        control: PodControl { recorder: context.recorder(&client, K::COMPONENT), client },
    });
    let queue = Arc::new(WorkQueue::new(K::CONTROLLER));
    let (to, expectations) = (queue.clone(), controller.expectations.clone());
    owners.on_change(move |change| {
        if let Some(owner) = change.latest() {
            let key = NamespacedName::of(owner.as_ref());
            if change.new.is_none() {
                expectations.forget(&key);
            }
            to.add(key);
        }
    });
    let (to, seen_by) = (queue.clone(), controller.clone());
    pods.on_change(move |change| seen_by.pod_changed(change, &to));
    owners.synced().await;
    pods.synced().await;
    run(K::CONTROLLER, queue, controller, workers, context.shutdown.clone()).await;
}

impl<K: ReplicaOwner> Controller<K> {
    /// Wakes the owners that a pod's change concerns, and takes what was seen off their expectations.
    fn pod_changed(&self, change: Change<'_, Pod>, queue: &WorkQueue<NamespacedName>) {
        let Some(pod) = change.latest() else { return };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let owner_key = |pod: &Pod| {
            let owner = controller_of(&pod.metadata)?;
            let ours = owner.kind == K::kind(&()) && owner.api_version == K::api_version(&());
            ours.then(|| NamespacedName::new(namespace, &owner.name))
        };
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let going = change.new.is_none_or(|p| p.metadata.deletion_timestamp.is_some());
        let (before, after) = (change.old.and_then(|p| owner_key(p)), change.new.and_then(|p| owner_key(p)));
        if let Some(key) = &after {
            if change.old.is_none() {
                self.expectations.creation_observed(key);
            }
            if going {
                self.expectations.deletion_observed(key, uid);
            }
            queue.add(key.clone());
            // A pod becomes available by time alone; its owner's step asks to be called then.
        }
        if let Some(key) = before.filter(|key| Some(key) != after.as_ref()) {
            if change.new.is_none() {
                self.expectations.deletion_observed(&key, uid);
            }
            queue.add(key);
        }
        // An orphan may be adopted by whoever selects it.
        let orphan = change.new.is_some_and(|p| controller_of(&p.metadata).is_none());
        let relabelled = change.old.map(|p| &p.metadata.labels) != change.new.map(|p| &p.metadata.labels)
            || change.old.is_some_and(|p| controller_of(&p.metadata).is_some());
        if orphan && relabelled && !going {
            for owner in self.owners.list_in(namespace) {
                if owner.selector().is_ok_and(|s| !s.is_empty() && s.matches_opt(pod.metadata.labels.as_ref())) {
                    queue.add(NamespacedName::of(owner.as_ref()));
                }
            }
        }
    }

    /// Reads the owner from the server: only one that really lives may adopt.
    async fn may_adopt(&self, key: &NamespacedName, owner: &K) -> Result<bool, SyncError> {
        let live = api_in::<K>(&self.control.client, &key.namespace).get(&key.name).await?;
        Ok(live.meta().uid == owner.meta().uid && live.meta().deletion_timestamp.is_none())
    }

    async fn claim_pods(
        &self,
        key: &NamespacedName,
        owner: &K,
        selector: &Selector,
    ) -> Result<Vec<Arc<Pod>>, SyncError> {
        let uid = owner.meta().uid.as_deref();
        let mut candidates = self.pods.get(uid.unwrap_or_default());
        candidates.extend(self.pods.get(&orphans_of(&key.namespace)));
        let claimed = claim(owner.meta(), selector, candidates);
        for pod in &claimed.release {
            self.control.release(pod, uid).await?;
        }
        let mut owned = claimed.owned;
        // A finished orphan is of no use to anybody.
        let adopt: Vec<_> = claimed.adopt.into_iter().filter(|p| apimachinery::pod::is_active(p)).collect();
        if !adopt.is_empty() && self.may_adopt(key, owner).await? {
            for pod in adopt {
                self.control.adopt(&pod, &controller_reference(owner)).await?;
                owned.push(pod);
            }
        }
        Ok(owned)
    }

    /// The pods of the sets that have the same controller as this one, itself included.
    fn related_pods(&self, owner: &K, owned: &[Arc<Pod>]) -> Vec<Arc<Pod>> {
        let Some(controller) = controller_of(owner.meta()) else { return owned.to_vec() };
        let siblings = self.siblings.get(&controller.uid);
        siblings.iter().flat_map(|s| self.pods.get(s.metadata.uid.as_deref().unwrap_or_default())).collect()
    }

    /// Carries the scaling out; gives what went wrong.
    async fn scale(&self, key: &NamespacedName, owner: &K, scaling: Scaling) -> Result<(), (&'static str, SyncError)> {
        let about = reference(owner);
        match scaling {
            Scaling::Enough => Ok(()),
            Scaling::Create(count) => {
                let Some(template) = owner.template() else { return Ok(()) };
                let controller = controller_reference(owner);
                self.expectations.expect_creations(key, count);
                let mut left = count;
                for batch in plan::slow_start(count) {
                    let create = || self.control.create(&key.namespace, template, &about, &controller);
                    let mut outcomes = stream::iter((0..batch).map(|_| create())).buffer_unordered(PARALLEL_CREATIONS);
                    let (mut failure, mut failed) = (None, 0);
                    while let Some(outcome) = outcomes.next().await {
                        if let Err(error) = outcome {
                            failed += 1;
                            failure = Some(error);
                        }
                    }
                    left -= batch - failed;
                    if let Some(error) = failure {
                        // What was not made will not be seen.
                        (0..left).for_each(|_| self.expectations.creation_observed(key));
                        return Err(("FailedCreate", error.into()));
                    }
                }
                Ok(())
            }
            Scaling::Delete(pods) => {
                let uid = |pod: &Pod| pod.metadata.uid.clone().unwrap_or_default();
                self.expectations.expect_deletions(key, pods.iter().map(|p| uid(p)));
                let delete = |pod: Arc<Pod>| {
                    let about = &about;
                    async move { (self.control.delete(&pod, about).await, pod) }
                };
                let mut outcomes = stream::iter(pods.into_iter().map(delete)).buffer_unordered(PARALLEL_DELETIONS);
                let mut failure = None;
                while let Some((outcome, pod)) = outcomes.next().await {
                    if let Err(error) = outcome {
                        self.expectations.deletion_observed(key, &uid(&pod));
                        failure = Some(error);
                    }
                }
                failure.map_or(Ok(()), |error| Err(("FailedDelete", error.into())))
            }
        }
    }
}

impl<K: ReplicaOwner> Reconcile for Controller<K> {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(owner) = self.owners.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        let selector = owner.selector()?;
        let ready_to_act = self.expectations.satisfied(key);
        let owned = self.claim_pods(key, &owner, &selector).await?;

        let mut outcome = Ok(());
        if ready_to_act && owner.meta().deletion_timestamp.is_none() {
            let related = self.related_pods(&owner, &owned);
            let scaling = plan::scaling(owner.replicas(), &owned, &related, Timestamp::now());
            outcome = self.scale(key, &owner, scaling).await;
        }
        let failure = outcome.as_ref().err().map(|(reason, error)| {
            let message = match error {
                SyncError::Api(error) => cause(error),
                other => other.to_string(),
            };
            (*reason, message)
        });
        let observed = Observed {
            generation: owner.meta().generation,
            template_labels: owner.template().and_then(|t| t.metadata.as_ref()?.labels.as_ref()),
            min_ready_seconds: owner.min_ready_seconds(),
            owned: &owned,
            failure,
        };
        let former = owner.status();
        let (mut status, wait) = plan::status(&observed, &former, Timestamp::now());
        if K::CONTROLLER != ReplicaSet::CONTROLLER {
            status.terminating_replicas = None;
        }
        if !plan::same_status(&status, &former) {
            let mut updated = owner.as_ref().clone();
            updated.set_status(status);
            let api = api_in::<K>(&self.control.client, &key.namespace);
            api.replace_status(&key.name, &PostParams::default(), &updated).await?;
        }
        outcome.map_err(|(_, error)| error)?;
        Ok(Next::after(wait))
    }
}
