//! The watches: every change of a pod, a node or what selects pods goes into the picture, and to the pods that it may help.

use std::collections::BTreeMap;
use std::sync::Arc;

use component_base::informer::{Change, Informer};
use k8s_openapi::api::apps::v1::{ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{
    Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, ReplicationController, Service,
};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::resource::v1::{DeviceClass, ResourceClaim, ResourceSlice};
use k8s_openapi::api::storage::v1::{CSIDriver, CSINode, CSIStorageCapacity, StorageClass, VolumeAttachment};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::Resource as _;
use kube::api::{Api, WatchParams};

use super::slim::{NamespaceLabels, Part, Seen, SeenPod};
use super::{Driver, now_us};
use crate::cache::{ControllerKind, PendingPod, PodFacts, Requests, Snapshot};
use crate::framework::EventSet;

/// Ended pods take nothing of a node: the server leaves them out.
const LIVE_PODS: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// The running watches; they end when this is dropped.
pub struct Watches {
    pods: Informer<SeenPod>,
    nodes: Informer<Seen<Node, Node>>,
    namespaces: Informer<Seen<Namespace, NamespaceLabels>>,
    services: Informer<Seen<Service, BTreeMap<String, String>>>,
    replication_controllers: Informer<Seen<ReplicationController, BTreeMap<String, String>>>,
    replica_sets: Informer<Seen<ReplicaSet, LabelSelector>>,
    stateful_sets: Informer<Seen<StatefulSet, LabelSelector>>,
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

fn watch<K>(client: &kube::Client, config: WatchParams) -> Informer<K>
where
    K: kube::Resource<DynamicType = ()> + serde::de::DeserializeOwned + Send + Sync + 'static,
{
    Informer::start(Api::all(client.clone()), config)
}

impl Others {
    fn start(client: &kube::Client) -> Others {
        let all = WatchParams::default;
        Others {
            budgets: watch(client, all()),
            claims: watch(client, all()),
            volumes: watch(client, all()),
            classes: watch(client, all()),
            drivers: watch(client, all()),
            csi_nodes: watch(client, all()),
            capacities: watch(client, all()),
            attachments: watch(client, all()),
            resource_claims: watch(client, all()),
            resource_slices: watch(client, all()),
            device_classes: watch(client, all()),
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
        feed_whole(driver, &self.budgets, EventSet::NONE, |snapshot, key, object| match object {
            Some(budget) => snapshot.budgets.set(budget),
            None => {
                key.split_once('/').into_iter().for_each(|(namespace, name)| snapshot.budgets.remove(namespace, name))
            }
        });
        feed_whole(driver, &self.claims, EventSet::CLAIM, |snapshot, key, object| match object {
            Some(claim) => drop(snapshot.volumes.claims.insert(key.into(), claim.clone())),
            None => drop(snapshot.volumes.claims.remove(key)),
        });
        feed_whole(driver, &self.volumes, EventSet::VOLUME, |snapshot, key, object| match object {
            Some(volume) => drop(snapshot.volumes.volumes.insert(key.into(), volume.clone())),
            None => drop(snapshot.volumes.volumes.remove(key)),
        });
        feed_whole(driver, &self.classes, EventSet::STORAGE_CLASS, |snapshot, key, object| match object {
            Some(class) => drop(snapshot.volumes.classes.insert(key.into(), class.clone())),
            None => drop(snapshot.volumes.classes.remove(key)),
        });
        feed_whole(driver, &self.drivers, EventSet::CSI, |snapshot, key, object| match object {
            Some(driver) => drop(snapshot.volumes.drivers.insert(key.into(), driver.clone())),
            None => drop(snapshot.volumes.drivers.remove(key)),
        });
        feed_whole(driver, &self.csi_nodes, EventSet::CSI, |snapshot, key, object| match object {
            Some(node) => drop(snapshot.volumes.csi_nodes.insert(key.into(), node.clone())),
            None => drop(snapshot.volumes.csi_nodes.remove(key)),
        });
        feed_whole(driver, &self.capacities, EventSet::CSI, |snapshot, key, object| match object {
            Some(capacity) => drop(snapshot.volumes.capacities.insert(key.into(), capacity.clone())),
            None => drop(snapshot.volumes.capacities.remove(key)),
        });
        feed_whole(driver, &self.attachments, EventSet::CSI, |snapshot, key, object| {
            let attachments = &mut snapshot.volumes.attachments;
            let spec = object.map(|attachment| &attachment.spec);
            match spec.and_then(|spec| Some((&spec.node_name, spec.source.persistent_volume_name.as_deref()?))) {
                Some((node, volume)) => drop(attachments.insert(key.into(), (node.as_str().into(), volume.into()))),
                None => drop(attachments.remove(key)),
            }
        });
        feed_whole(driver, &self.resource_claims, EventSet::RESOURCE_CLAIM, |snapshot, key, object| match object {
            Some(claim) => drop(snapshot.claims.claims.insert(key.into(), claim.clone())),
            None => drop(snapshot.claims.claims.remove(key)),
        });
        feed_whole(driver, &self.resource_slices, EventSet::RESOURCE_SLICE, |snapshot, key, object| match object {
            Some(slice) => drop(snapshot.claims.slices.insert(key.into(), slice.clone())),
            None => drop(snapshot.claims.slices.remove(key)),
        });
        feed_whole(driver, &self.device_classes, EventSet::DEVICE_CLASS, |snapshot, key, object| {
            snapshot.claims.set_class(key, object.cloned());
        });
    }
}

/// Puts each change of a kind into the picture, by name or `namespace/name`; `None` says that the object is gone.
fn feed_whole<K>(
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

/// Puts what is taken from the objects of a kind into the picture, by namespace and name; `None` says that there is none any
/// more.
fn feed<K, T>(
    driver: &Driver,
    informer: &Informer<Seen<K, T>>,
    put: impl Fn(&mut Snapshot, &str, &str, Option<T>) -> EventSet + Send + Sync + 'static,
) where
    K: kube::Resource<DynamicType = ()> + std::fmt::Debug + 'static,
    T: Part + std::fmt::Debug + Send + 'static,
{
    let to = driver.clone();
    informer.on_change(move |change: Change<'_, Seen<K, T>>| {
        let Some(meta) = change.latest().map(|object| object.meta()) else { return };
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        let name = meta.name.as_deref().unwrap_or_default();
        let part = change.new.and_then(|object| object.take());
        to.update(|snapshot, _, _| put(snapshot, namespace, name, part));
    });
}

impl Watches {
    /// Starts them.
    pub fn start(driver: &Driver) -> Watches {
        let client = &driver.shared.handle.client;
        let all = WatchParams::default;
        let watches = Watches {
            pods: watch(client, all().fields(LIVE_PODS)),
            nodes: watch(client, all()),
            namespaces: watch(client, all()),
            services: watch(client, all()),
            replication_controllers: watch(client, all()),
            others: Others::start(client),
            replica_sets: watch(client, all()),
            stateful_sets: watch(client, all()),
        };
        if !driver.shared.extenders.is_empty() {
            // They are sent whole nodes.
            _ = driver.shared.node_objects.set(watch(client, all()));
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
        feed(driver, &self.namespaces, |snapshot, _, name, labels: Option<NamespaceLabels>| {
            match labels {
                Some(NamespaceLabels(labels)) => drop(snapshot.namespaces.insert(name.to_owned(), labels)),
                None => drop(snapshot.namespaces.remove(name)),
            }
            EventSet::NONE
        });
        // Selectors only move scores: no refused pod waits for them.
        feed(driver, &self.services, |snapshot, namespace, name, selector| {
            snapshot.workloads.set_service(namespace, name, selector);
            EventSet::NONE
        });
        feed(driver, &self.replication_controllers, |snapshot, namespace, name, selector| {
            let selector =
                selector.map(|labels| LabelSelector { match_labels: Some(labels), ..LabelSelector::default() });
            snapshot.workloads.set_controller(ControllerKind::ReplicationController, namespace, name, selector);
            EventSet::NONE
        });
        feed(driver, &self.replica_sets, |snapshot, namespace, name, selector| {
            snapshot.workloads.set_controller(ControllerKind::ReplicaSet, namespace, name, selector);
            EventSet::NONE
        });
        feed(driver, &self.stateful_sets, |snapshot, namespace, name, selector| {
            snapshot.workloads.set_controller(ControllerKind::StatefulSet, namespace, name, selector);
            EventSet::NONE
        });
    }
}

impl Driver {
    fn node_changed(&self, change: Change<'_, Seen<Node, Node>>) {
        let Some(name) = change.latest().and_then(|node| node.meta().name.as_deref()) else { return };
        let node = change.new.and_then(|node| node.take());
        self.update_at(|snapshot, _, _| {
            let kinds = match (change.new, node) {
                (Some(_), Some(node)) => snapshot.set_node(&node),
                (Some(_), None) => EventSet::NONE,
                (None, _) => snapshot.remove_node(name),
            };
            (kinds, snapshot.nodes.find(name), None)
        });
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
