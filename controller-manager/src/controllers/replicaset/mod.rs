//! ReplicaSets and ReplicationControllers: as many pods of a template as asked for.
//!
//! Both kinds run over the same code; [`ReplicaOwner`] is what differs.
pub mod plan;

use super::{
    claim::controller_reference,
    pod_control::{Behind, PodControl, PodOwner, TOLD_LATER, TOLD_SOON, new_pod, pod_changed, pod_from_template},
};
use crate::runtime::{Context, Expectations, Index, Next, Reconcile, SyncError, WorkQueue, cause, put_status, run};
use apimachinery::{
    labels::Selector,
    meta::NamespacedName,
    pod::{controller_of, is_active},
};
use component_base::{events::reference, informer::Informer};
use k8s_openapi::{
    api::{
        apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetSpec, ReplicaSetStatus},
        core::v1::{
            Pod, PodTemplateSpec, ReplicationController, ReplicationControllerCondition, ReplicationControllerSpec,
            ReplicationControllerStatus,
        },
    },
    jiff::Timestamp,
};
use plan::{Observed, Scaling};
use serde::Serialize;
use std::sync::Arc;

/// What a kind says of the pods that it wants.
pub trait ReplicaOwner: PodOwner + Serialize {
    const CONTROLLER: &'static str;
    const COMPONENT: &'static str;

    fn replicas(&self) -> i32;
    fn min_ready_seconds(&self) -> i32;
    fn template(&self) -> Option<&PodTemplateSpec>;
    fn status(&self) -> ReplicaSetStatus;
    fn set_status(&mut self, status: ReplicaSetStatus);
}

/// What both kinds have under the same names.
macro_rules! replica_owner {
    ($kind:ident, $controller:literal, $component:literal, $selector:expr, $read:expr, $write:expr) => {
        impl PodOwner for $kind {
            fn selector(&self) -> Result<Selector, SyncError> {
                $selector(self.spec.as_ref())
            }

            // A finished orphan is of no use to anybody.
            fn can_use(&self, orphan: &Pod) -> bool {
                is_active(orphan)
            }

            fn concerns(old: &Pod, new: &Pod) -> bool {
                plan::counts(old) != plan::counts(new)
            }
        }

        impl ReplicaOwner for $kind {
            const CONTROLLER: &'static str = $controller;
            const COMPONENT: &'static str = $component;

            fn replicas(&self) -> i32 {
                self.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
            }

            fn min_ready_seconds(&self) -> i32 {
                self.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0)
            }

            fn template(&self) -> Option<&PodTemplateSpec> {
                self.spec.as_ref()?.template.as_ref()
            }

            fn status(&self) -> ReplicaSetStatus {
                $read(self.status.clone().unwrap_or_default())
            }

            fn set_status(&mut self, status: ReplicaSetStatus) {
                self.status = Some($write(status));
            }
        }
    };
}

/// The same fields in another type.
macro_rules! converted {
    ($from:expr, $to:ident, $condition:ident $(, $more:ident: $value:expr)?) => {{
        $to {
            replicas: $from.replicas,
            fully_labeled_replicas: $from.fully_labeled_replicas,
            ready_replicas: $from.ready_replicas,
            available_replicas: $from.available_replicas,
            observed_generation: $from.observed_generation,
            conditions: $from.conditions.map(|all| {
                let condition = all.into_iter().map(|c| $condition {
                    type_: c.type_,
                    status: c.status,
                    reason: c.reason,
                    message: c.message,
                    last_transition_time: c.last_transition_time,
                });
                condition.collect()
            }),
            $($more: $value,)?
        }
    }};
}

replica_owner!(
    ReplicaSet,
    "replicaset",
    "replicaset-controller",
    |spec: Option<&ReplicaSetSpec>| {
        Selector::from_label_selector_opt(spec.map(|s| &s.selector))
            .map_err(|e| SyncError::Invalid(format!("selector: {e}")))
    },
    |status: ReplicaSetStatus| status,
    |status: ReplicaSetStatus| status
);

replica_owner!(
    ReplicationController,
    "replicationmanager",
    "replication-controller",
    |spec: Option<&ReplicationControllerSpec>| {
        let labels = spec.and_then(|s| s.selector.as_ref()).filter(|labels| !labels.is_empty());
        Ok(labels.map_or_else(Selector::nothing, Selector::from_map))
    },
    |status: ReplicationControllerStatus| {
        converted!(status, ReplicaSetStatus, ReplicaSetCondition, terminating_replicas: None)
    },
    |status: ReplicaSetStatus| converted!(status, ReplicationControllerStatus, ReplicationControllerCondition)
);

struct Controller<K> {
    owners: Informer<K>,
    pods: Arc<Index<Pod>>,
    /// For ReplicaSets: their siblings, whose pods tell how crowded nodes are.
    siblings: Arc<Index<ReplicaSet>>,
    expectations: Arc<Expectations>,
    behind: Behind,
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
        behind: Behind::default(),
        control: PodControl::new(client.clone(), context.recorder(&client, K::COMPONENT)),
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
    let (to, all, expectations) = (queue.clone(), owners.clone(), controller.expectations.clone());
    pods.on_change(move |change| pod_changed(change, &all, &expectations, &to));
    owners.synced().await;
    pods.synced().await;
    run(K::CONTROLLER, queue, controller, workers, context.shutdown.clone()).await;
}

impl<K: ReplicaOwner> Controller<K> {
    /// The pods of the sets that have the same controller as this one, itself included.
    fn related_pods(&self, owner: &K, owned: &[Arc<Pod>]) -> Vec<Arc<Pod>> {
        let Some(controller) = controller_of(owner.meta()) else { return owned.to_vec() };
        let siblings = self.siblings.get(&controller.uid);
        siblings.iter().flat_map(|s| self.pods.get(s.metadata.uid.as_deref().unwrap_or_default())).collect()
    }

    /// Whether no sibling has pods, which come or go as this set's do.
    fn is_alone(&self, owner: &K) -> bool {
        let Some(controller) = controller_of(owner.meta()) else { return true };
        let has_pods = |s: &ReplicaSet| {
            s.spec.as_ref().is_some_and(|s| s.replicas != Some(0)) || s.status.as_ref().is_some_and(|s| s.replicas > 0)
        };
        let siblings = self.siblings.get(&controller.uid);
        siblings.iter().all(|s| s.metadata.uid.as_ref() == owner.meta().uid.as_ref() || !has_pods(s))
    }

    /// Carries the scaling out; gives what went wrong.
    async fn scale(&self, key: &NamespacedName, owner: &K, scaling: Scaling) -> Result<(), (&'static str, SyncError)> {
        let (create, delete) = match (scaling, owner.template()) {
            (Scaling::Create(count), Some(template)) => {
                let controller = controller_reference(owner);
                // All are alike until the server has named them.
                let pod = new_pod(&pod_from_template(template, &controller.name, &controller));
                (vec![pod.map_err(|error| ("FailedCreate", error))?; count], Vec::new())
            }
            (Scaling::Delete(pods), _) => (Vec::new(), pods),
            _ => return Ok(()),
        };
        self.control.write(&self.expectations, key, &reference(owner), &create, &delete).await
    }
}

impl<K: ReplicaOwner> Reconcile for Controller<K> {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(owner) = self.owners.get(&key.namespace, &key.name) else {
            self.behind.wait(key, None);
            return Ok(Next::Settled);
        };
        let selector = owner.selector()?;
        let ready_to_act = self.expectations.satisfied(key);
        let owned = self.control.claim_pods(&self.pods, owner.as_ref(), &selector).await?;

        let mut outcome = Ok(());
        if ready_to_act && owner.meta().deletion_timestamp.is_none() {
            let related = || self.related_pods(&owner, &owned);
            let scaling = plan::scaling(owner.replicas(), &owned, related, Timestamp::now());
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
        let same = plan::same_status(&status, &former);
        let can_wait = !same && plan::can_wait(&status, &former, owner.replicas());
        let within = || if self.is_alone(owner.as_ref()) { TOLD_LATER } else { TOLD_SOON };
        let behind = self.behind.wait(key, can_wait.then(within));
        if behind.is_none() && !same {
            let mut updated = owner.as_ref().clone();
            updated.set_status(status);
            put_status(&self.control.client, &updated).await?;
        }
        outcome.map_err(|(_, error)| error)?;
        Ok(Next::after([wait, behind].into_iter().flatten().min()))
    }
}
