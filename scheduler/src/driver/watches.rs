//! The watches: every change of a pod, a node or what selects pods goes into the picture, and to the pods that it may help.

use std::sync::Arc;

use component_base::informer::{Change, Informer};
use k8s_openapi::api::apps::v1::{ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{
    Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, ReplicationController, Service,
};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::resource::v1::{DeviceClass, ResourceClaim, ResourceSlice};
use k8s_openapi::api::storage::v1::{CSIDriver, CSINode, CSIStorageCapacity, StorageClass, VolumeAttachment};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::runtime::watcher;

use super::slim::{self, SeenPod};
use super::{Driver, now_us};
use crate::cache::{ControllerKind, PendingPod, PodFacts, Requests, Snapshot};
use crate::framework::EventSet;

/// Ended pods take nothing of a node: the server leaves them out.
const LIVE_PODS: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// The running watches; they end when this is dropped.
pub struct Watches {
    pods: Informer<SeenPod>,
    nodes: Informer<Node>,
    namespaces: Informer<Namespace>,
    services: Informer<Service>,
    replication_controllers: Informer<ReplicationController>,
    replica_sets: Informer<ReplicaSet>,
    stateful_sets: Informer<StatefulSet>,
    others: Others,
}

/// The watches whose objects go into the picture as they are.
struct Others {
    budgets: Informer<PodDisruptionBudget>,
    claims: Informer<PersistentVolumeClaim>,
    volumes: Informer<PersistentVolume>,
    classes: Informer<StorageClass>,
    drivers: Informer<CSIDriver>,
    csi_nodes: Informer<CSINode>,
    capacities: Informer<CSIStorageCapacity>,
    attachments: Informer<VolumeAttachment>,
    resource_claims: Informer<ResourceClaim>,
    resource_slices: Informer<ResourceSlice>,
    device_classes: Informer<DeviceClass>,
}

impl Others {
    fn start(client: &kube::Client) -> Others {
        fn watch<K>(client: &kube::Client) -> Informer<K>
        where
            K: kube::Resource<DynamicType = ()>
                + Clone
                + serde::de::DeserializeOwned
                + std::fmt::Debug
                + Send
                + Sync
                + 'static,
        {
            Informer::start_lean(client.clone(), watcher::Config::default(), |_| {})
        }
        Others {
            budgets: watch(client),
            claims: watch(client),
            volumes: watch(client),
            classes: watch(client),
            drivers: watch(client),
            csi_nodes: watch(client),
            capacities: watch(client),
            attachments: watch(client),
            resource_claims: watch(client),
            resource_slices: watch(client),
            device_classes: watch(client),
        }
    }

    async fn synced(&self) {
        self.budgets.synced().await;
        self.claims.synced().await;
        self.volumes.synced().await;
        self.classes.synced().await;
        self.drivers.synced().await;
        self.csi_nodes.synced().await;
        self.capacities.synced().await;
        self.attachments.synced().await;
        self.resource_claims.synced().await;
        self.resource_slices.synced().await;
        self.device_classes.synced().await;
    }

    fn connect(&self, driver: &Driver) {
        feed(driver, &self.budgets, EventSet::NONE, |snapshot, key, object| match object {
            Some(budget) => snapshot.budgets.set(budget),
            None => {
                key.split_once('/').into_iter().for_each(|(namespace, name)| snapshot.budgets.remove(namespace, name))
            }
        });
        feed(driver, &self.claims, EventSet::CLAIM, |snapshot, key, object| match object {
            Some(claim) => drop(snapshot.volumes.claims.insert(key.into(), claim.clone())),
            None => drop(snapshot.volumes.claims.remove(key)),
        });
        feed(driver, &self.volumes, EventSet::VOLUME, |snapshot, key, object| match object {
            Some(volume) => drop(snapshot.volumes.volumes.insert(key.into(), volume.clone())),
            None => drop(snapshot.volumes.volumes.remove(key)),
        });
        feed(driver, &self.classes, EventSet::STORAGE_CLASS, |snapshot, key, object| match object {
            Some(class) => drop(snapshot.volumes.classes.insert(key.into(), class.clone())),
            None => drop(snapshot.volumes.classes.remove(key)),
        });
        feed(driver, &self.drivers, EventSet::CSI, |snapshot, key, object| match object {
            Some(driver) => drop(snapshot.volumes.drivers.insert(key.into(), driver.clone())),
            None => drop(snapshot.volumes.drivers.remove(key)),
        });
        feed(driver, &self.csi_nodes, EventSet::CSI, |snapshot, key, object| match object {
            Some(node) => drop(snapshot.volumes.csi_nodes.insert(key.into(), node.clone())),
            None => drop(snapshot.volumes.csi_nodes.remove(key)),
        });
        feed(driver, &self.capacities, EventSet::CSI, |snapshot, key, object| match object {
            Some(capacity) => drop(snapshot.volumes.capacities.insert(key.into(), capacity.clone())),
            None => drop(snapshot.volumes.capacities.remove(key)),
        });
        feed(driver, &self.attachments, EventSet::CSI, |snapshot, key, object| {
            let attachments = &mut snapshot.volumes.attachments;
            let spec = object.map(|attachment| &attachment.spec);
            match spec.and_then(|spec| Some((&spec.node_name, spec.source.persistent_volume_name.as_deref()?))) {
                Some((node, volume)) => drop(attachments.insert(key.into(), (node.as_str().into(), volume.into()))),
                None => drop(attachments.remove(key)),
            }
        });
        feed(driver, &self.resource_claims, EventSet::RESOURCE_CLAIM, |snapshot, key, object| match object {
            Some(claim) => drop(snapshot.claims.claims.insert(key.into(), claim.clone())),
            None => drop(snapshot.claims.claims.remove(key)),
        });
        feed(driver, &self.resource_slices, EventSet::RESOURCE_SLICE, |snapshot, key, object| match object {
            Some(slice) => drop(snapshot.claims.slices.insert(key.into(), slice.clone())),
            None => drop(snapshot.claims.slices.remove(key)),
        });
        feed(driver, &self.device_classes, EventSet::DEVICE_CLASS, |snapshot, key, object| match object {
            Some(class) => drop(snapshot.claims.classes.insert(key.into(), class.clone())),
            None => drop(snapshot.claims.classes.remove(key)),
        });
    }
}

/// Puts each change of a kind into the picture, by name or `namespace/name`; `None` says that the object is gone.
fn feed<K>(
    driver: &Driver,
    informer: &Informer<K>,
    happened: EventSet,
    put: impl Fn(&mut Snapshot, &str, Option<&Arc<K>>) + Send + Sync + 'static,
) where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
{
    let to = driver.clone();
    informer.on_change(move |change: Change<'_, K>| {
        let Some(meta) = change.latest().map(|object| object.meta()) else { return };
        let name = meta.name.as_deref().unwrap_or_default();
        let key = meta.namespace.as_ref().map_or_else(|| name.to_owned(), |namespace| format!("{namespace}/{name}"));
        to.update(|snapshot, _, _| {
            put(snapshot, &key, change.new);
            happened
        });
    });
}

impl Watches {
    /// Starts them.
    pub fn start(driver: &Driver) -> Watches {
        let client = &driver.shared.handle.client;
        let all = watcher::Config::default;
        // Extenders are sent whole objects.
        let (slim_pod, slim_node): (fn(&mut SeenPod), fn(&mut Node)) = match driver.shared.extenders.is_empty() {
            true => (slim::seen, slim::node),
            false => (|_| {}, |_| {}),
        };
        let watches = Watches {
            pods: Informer::start_lean(client.clone(), all().fields(LIVE_PODS), slim_pod),
            nodes: Informer::start_lean(client.clone(), all(), slim_node),
            namespaces: Informer::start_lean(client.clone(), all(), slim::namespace),
            services: Informer::start_lean(client.clone(), all(), slim::service),
            replication_controllers: Informer::start_lean(client.clone(), all(), slim::replication_controller),
            others: Others::start(client),
            replica_sets: Informer::start_lean(client.clone(), all(), slim::replica_set),
            stateful_sets: Informer::start_lean(client.clone(), all(), slim::stateful_set),
        };
        if !driver.shared.extenders.is_empty() {
            _ = driver.shared.node_objects.set(watches.nodes.clone());
        }
        watches.connect(driver);
        watches.others.connect(driver);
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
        self.others.synced().await;
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
        let Some(name) = change.latest().and_then(|node| node.metadata.name.as_deref()) else { return };
        self.update_at(|snapshot, _, _| {
            let kinds = match change.new {
                Some(node) => snapshot.set_node(node),
                None => snapshot.remove_node(name),
            };
            (kinds, snapshot.nodes.find(name), None)
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

    fn pod_changed(&self, change: Change<'_, SeenPod>) {
        if let (Some(old), Some(new)) = (change.old, change.new)
            && old.meta.uid != new.meta.uid
        {
            // A pod was deleted and another of its name created while the watch was away.
            self.pod_gone(old);
        }
        let Some(seen) = change.new.filter(|seen| !seen.ended) else {
            return change.latest().into_iter().for_each(|seen| self.pod_gone(seen));
        };
        let facts = seen.facts.lock().take();
        match (&seen.node, facts, &seen.pod) {
            (Some(node), Some(facts), _) => self.pod_placed(facts, node),
            (_, _, Some(pod)) => self.pod_waits(pod, change.old.and_then(|old| old.pod.as_ref())),
            _ => {}
        }
    }

    fn pod_placed(&self, facts: PodFacts, node: &str) {
        self.update_at(|snapshot, queue, _| {
            _ = queue.remove(&facts.uid);
            let happened = match snapshot.facts_of(&facts.uid) {
                None => EventSet::POD_PLACED,
                Some(old) => {
                    let mut happened = EventSet::NONE;
                    if old.labels != facts.labels {
                        happened |= EventSet::POD_LABEL;
                    }
                    if asks_for_less(&old.requests, &facts.requests) {
                        happened |= EventSet::POD_REMOVED;
                    }
                    if facts.terminating && !old.terminating {
                        happened |= EventSet::POD_TERMINATING;
                    }
                    happened
                }
            };
            let told = (!happened.is_empty()).then(|| facts.clone());
            snapshot.set_pod(facts, node);
            (happened, snapshot.nodes.find(node), told)
        });
    }

    fn pod_waits(&self, pod: &Arc<Pod>, old: Option<&Arc<Pod>>) {
        let pending = PendingPod::new(pod.clone());
        if self.shared.profiles.of(&pending).is_none() {
            return;
        }
        let nominated = |pod: &Arc<Pod>| pod.status.as_ref().and_then(|status| status.nominated_node_name.clone());
        let (before, now_nominated) = (old.and_then(nominated), nominated(pod));
        self.update(|snapshot, queue, now| {
            let uid = pending.facts.uid.clone();
            if pending.facts.terminating {
                _ = queue.remove(&uid);
                let withdrawn = snapshot.withdraw_nomination(&uid);
                return if withdrawn { EventSet::POD_REMOVED } else { EventSet::NONE };
            }
            if snapshot.is_placed(&uid) {
                return EventSet::NONE;
            }
            // What was decided here is not undone by a status that is older than the decision.
            if before != now_nominated {
                snapshot.nominate(&pending.facts, now_nominated.as_deref());
            }
            if queue.set(Arc::new(pending), now, now_us()) {
                self.shared.metrics.came("active", "PodAdd");
            }
            EventSet::NONE
        });
    }

    fn pod_gone(&self, pod: &SeenPod) {
        let uid = pod.meta.uid.as_deref().unwrap_or_default();
        self.update_at(|snapshot, queue, _| {
            _ = queue.remove(uid);
            snapshot.volumes.forget(uid);
            let nominated = snapshot.withdraw_nomination(uid);
            let (node, facts) = (snapshot.node_of(uid).cloned(), snapshot.facts_of(uid).cloned());
            let removed = snapshot.remove_pod(uid);
            let kinds = if removed || nominated { EventSet::POD_REMOVED } else { EventSet::NONE };
            (kinds, node.and_then(|node| snapshot.nodes.find(&node)), facts)
        });
    }
}

fn asks_for_less(old: &Requests, new: &Requests) -> bool {
    new.cpu_milli < old.cpu_milli || new.memory < old.memory || new.ephemeral_storage < old.ephemeral_storage
}
