//! The watches: every change of a pod, a node or what selects pods goes into the picture, and to the pods that it may help.

use std::sync::Arc;

use component_base::informer::{Change, Informer};
use k8s_openapi::api::apps::v1::{ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ReplicationController, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::api::Api;
use kube::runtime::watcher;

use super::{Driver, now_us, slim};
use crate::cache::{ControllerKind, PendingPod, PodFacts, Requests, Snapshot};
use crate::framework::EventSet;

/// Ended pods take nothing of a node: the server leaves them out.
const LIVE_PODS: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// The running watches; they end when this is dropped.
pub struct Watches {
    pods: Informer<Pod>,
    nodes: Informer<Node>,
    namespaces: Informer<Namespace>,
    services: Informer<Service>,
    replication_controllers: Informer<ReplicationController>,
    replica_sets: Informer<ReplicaSet>,
    stateful_sets: Informer<StatefulSet>,
}

impl Watches {
    /// Starts them.
    pub fn start(driver: &Driver) -> Watches {
        let client = &driver.shared.handle.client;
        let all = watcher::Config::default;
        let watches = Watches {
            pods: Informer::start_with_transform(Api::all(client.clone()), all().fields(LIVE_PODS), slim::pod),
            nodes: Informer::start_with_transform(Api::all(client.clone()), all(), slim::node),
            namespaces: Informer::start_with_transform(Api::all(client.clone()), all(), slim::namespace),
            services: Informer::start_with_transform(Api::all(client.clone()), all(), slim::service),
            replication_controllers: Informer::start_with_transform(
                Api::all(client.clone()),
                all(),
                slim::replication_controller,
            ),
            replica_sets: Informer::start_with_transform(Api::all(client.clone()), all(), slim::replica_set),
            stateful_sets: Informer::start_with_transform(Api::all(client.clone()), all(), slim::stateful_set),
        };
        watches.connect(driver);
        watches
    }

    /// Waits until all that exists has been seen.
    pub async fn synced(&self) {
        self.nodes.synced().await;
        self.namespaces.synced().await;
        self.services.synced().await;
        self.replication_controllers.synced().await;
        self.replica_sets.synced().await;
        self.stateful_sets.synced().await;
        self.pods.synced().await;
    }

    fn connect(&self, driver: &Driver) {
        let to = driver.clone();
        self.nodes.on_change(move |change| to.node_changed(change));
        let to = driver.clone();
        self.pods.on_change(move |change| to.pod_changed(change));
        let to = driver.clone();
        self.namespaces.on_change(move |change: Change<'_, Namespace>| {
            let Some(name) = change.latest().and_then(|namespace| namespace.metadata.name.clone()) else { return };
            let labels = change.new.map(|namespace| namespace.metadata.labels.clone().unwrap_or_default());
            to.update(|snapshot, _, _| {
                match labels {
                    Some(labels) => drop(snapshot.namespaces.insert(name, labels)),
                    None => drop(snapshot.namespaces.remove(&name)),
                }
                EventSet::NONE
            });
        });
        let to = driver.clone();
        self.services.on_change(move |change: Change<'_, Service>| {
            let Some(latest) = change.latest() else { return };
            let selector = change.new.and_then(|service| service.spec.as_ref()?.selector.clone());
            to.selector_changed(&latest.metadata, |snapshot, namespace, name| {
                snapshot.workloads.set_service(namespace, name, selector.as_ref());
            });
        });
        let to = driver.clone();
        self.replication_controllers.on_change(move |change: Change<'_, ReplicationController>| {
            let selector = change.new.map(|controller| LabelSelector {
                match_labels: controller.spec.as_ref().and_then(|spec| spec.selector.clone()),
                ..LabelSelector::default()
            });
            to.controller_changed(
                ControllerKind::ReplicationController,
                change.latest().map(|c| &c.metadata),
                selector,
            );
        });
        let to = driver.clone();
        self.replica_sets.on_change(move |change: Change<'_, ReplicaSet>| {
            let selector = change.new.and_then(|set| Some(set.spec.as_ref()?.selector.clone()));
            to.controller_changed(ControllerKind::ReplicaSet, change.latest().map(|set| &set.metadata), selector);
        });
        let to = driver.clone();
        self.stateful_sets.on_change(move |change: Change<'_, StatefulSet>| {
            let selector = change.new.and_then(|set| Some(set.spec.as_ref()?.selector.clone()));
            to.controller_changed(ControllerKind::StatefulSet, change.latest().map(|set| &set.metadata), selector);
        });
    }
}

impl Driver {
    fn node_changed(&self, change: Change<'_, Node>) {
        self.update(|snapshot, _, _| match (change.new, change.old) {
            (Some(node), _) => snapshot.set_node(node),
            (None, Some(node)) => snapshot.remove_node(node.metadata.name.as_deref().unwrap_or_default()),
            (None, None) => EventSet::NONE,
        });
    }

    fn controller_changed(&self, kind: ControllerKind, meta: Option<&ObjectMeta>, selector: Option<LabelSelector>) {
        let Some(meta) = meta else { return };
        self.selector_changed(meta, |snapshot, namespace, name| {
            snapshot.workloads.set_controller(kind, namespace, name, selector);
        });
    }

    /// Selectors only move scores: no refused pod waits for them.
    fn selector_changed(&self, meta: &ObjectMeta, put: impl FnOnce(&mut Snapshot, &str, &str)) {
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        let name = meta.name.as_deref().unwrap_or_default();
        put(&mut self.shared.core.lock().snapshot, namespace, name);
    }

    fn pod_changed(&self, change: Change<'_, Pod>) {
        if let (Some(old), Some(new)) = (change.old, change.new)
            && old.metadata.uid != new.metadata.uid
        {
            // A pod was deleted and another of its name created while the watch was away.
            self.pod_gone(old);
        }
        match change.new {
            Some(pod) if is_live(pod) => match node_of(pod) {
                Some(node) => self.pod_placed(pod, node),
                None => self.pod_waits(pod),
            },
            Some(pod) => self.pod_gone(pod),
            None => {
                if let Some(pod) = change.old {
                    self.pod_gone(pod);
                }
            }
        }
    }

    fn pod_placed(&self, pod: &Arc<Pod>, node: &str) {
        let facts = PodFacts::of(pod);
        self.update(|snapshot, queue, _| {
            queue.remove(&facts.uid);
            let happened = match snapshot.facts_of(&facts.uid) {
                None => EventSet::POD_PLACED,
                Some(old) => {
                    let mut happened = EventSet::NONE;
                    if old.labels != facts.labels {
                        happened |= EventSet::POD_LABEL;
                    }
                    if asks_for_less(&old.requests, &facts.requests) || (facts.terminating && !old.terminating) {
                        happened |= EventSet::POD_REMOVED;
                    }
                    happened
                }
            };
            snapshot.set_pod(facts, node);
            happened
        });
    }

    fn pod_waits(&self, pod: &Arc<Pod>) {
        let pending = PendingPod::new(pod.clone());
        if self.shared.profiles.of(&pending).is_none() {
            return;
        }
        self.update(|snapshot, queue, now| {
            let uid = pending.facts.uid.clone();
            if pending.facts.terminating {
                queue.remove(&uid);
            } else if !snapshot.is_placed(&uid) {
                queue.set(Arc::new(pending), now, now_us());
            }
            EventSet::NONE
        });
    }

    fn pod_gone(&self, pod: &Pod) {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        self.update(|snapshot, queue, _| {
            queue.remove(uid);
            if snapshot.remove_pod(uid) { EventSet::POD_REMOVED } else { EventSet::NONE }
        });
    }
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

fn is_live(pod: &Pod) -> bool {
    !apimachinery::pod::is_terminal(pod)
}

fn asks_for_less(old: &Requests, new: &Requests) -> bool {
    new.cpu_milli < old.cpu_milli || new.memory < old.memory || new.ephemeral_storage < old.ephemeral_storage
}
