//! Attaches volumes to the nodes whose pods have them, and detaches them when the kubelet has let go, by
//! VolumeAttachments that a driver's attacher carries out.
mod metrics;
mod plan;

use super::{claims_of, volume_name};
use crate::{
    controllers::service_backends::node_name,
    runtime::{Context, Index, Next, Reconcile, SyncError, WorkQueue, gone_is_fine, is_code, run},
};
use apimachinery::pod::is_terminal;
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
};
use k8s_openapi::{
    api::{
        core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod},
        storage::v1::{CSIDriver, VolumeAttachment},
    },
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use parking_lot::Mutex;
use plan::{Attachment, NodeState, Patience, Wanted};
use serde_json::json;
use std::{collections::HashMap, sync::Arc, time::Duration};
use tokio::time::Instant;
use tracing::info;

const NAME: &str = "attach_detach";
const WORKERS: usize = 10;
const RESERVED: Duration = Duration::from_secs(30);
/// As `maxWaitForUnmountDuration`.
const MAX_WAIT_FOR_UNMOUNT: Duration = Duration::from_secs(360);

struct Controller {
    client: Client,
    recorder: Recorder,
    nodes: Informer<Node>,
    pods: Informer<Pod>,
    on_node: Arc<Index<Pod>>,
    claims: Informer<PersistentVolumeClaim>,
    volumes: Informer<PersistentVolume>,
    drivers: Informer<CSIDriver>,
    attachments: Arc<Index<VolumeAttachment>>,
    of_volume: Arc<Index<VolumeAttachment>>,
    /// Since when an attachment has not been wanted. Bounded by the attachments there are.
    unwanted: Mutex<HashMap<String, Instant>>,
    attaching: Arc<Reservations>,
    patience: Patience,
}

/// Volumes that are being attached and that the cache does not show so yet, with the node that gets them: two nodes must
/// not get one volume because the cache lags. An entry that is forgotten expires.
#[derive(Default)]
struct Reservations(Mutex<HashMap<String, (String, Instant)>>);

impl Reservations {
    fn take(&self, volume: &str, node: &str) -> bool {
        let mut all = self.0.lock();
        if all.get(volume).is_some_and(|(owner, since)| owner != node && since.elapsed() < RESERVED) {
            return false;
        }
        all.insert(volume.to_owned(), (node.to_owned(), Instant::now()));
        true
    }

    fn release(&self, volume: &str) {
        self.0.lock().remove(volume);
    }
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("attachdetach-controller").await else { return };
    let attachments = context.informers.get::<VolumeAttachment>();
    let controller = Arc::new(Controller {
        recorder: context.recorder(&client, "attachdetach-controller"),
        client,
        nodes: context.informers.get(),
        pods: context.informers.get(),
        on_node: context.pods_by_node(),
        claims: context.informers.get(),
        volumes: context.informers.get(),
        drivers: context.informers.get(),
        attachments: Index::new(&attachments, |a| Some(a.spec.node_name.clone())),
        of_volume: Index::new(&attachments, |a| a.spec.source.persistent_volume_name.clone()),
        unwanted: Mutex::default(),
        attaching: Arc::default(),
        patience: Patience { limit: MAX_WAIT_FOR_UNMOUNT, forces: !context.settings.disable_force_detach_on_timeout },
    });
    metrics::watch(&controller);
    let queue = Arc::new(WorkQueue::new(NAME));
    wake(&controller, &queue, &attachments);
    controller.nodes.synced().await;
    controller.pods.synced().await;
    controller.claims.synced().await;
    controller.volumes.synced().await;
    controller.drivers.synced().await;
    attachments.synced().await;
    run(NAME, queue, controller, WORKERS, context.shutdown.clone()).await;
}

fn wake(controller: &Controller, queue: &Arc<WorkQueue<String>>, attachments: &Informer<VolumeAttachment>) {
    let to = queue.clone();
    controller.nodes.on_change(move |change| {
        let state = |n: &Arc<Node>| NodeState::of(n);
        if let Some(node) = change.latest()
            && change.old.map(state) != change.new.map(state)
        {
            to.add(node.name_any());
        }
    });
    let to = queue.clone();
    controller.pods.on_change(move |change| {
        let place = |p: &Arc<Pod>| node_name(p).filter(|_| !is_terminal(p));
        if let Some(pod) = change.latest().filter(|p| claims_of(p).next().is_some())
            && change.old.and_then(place) != change.new.and_then(place)
        {
            node_name(pod).into_iter().for_each(|node| to.add(node));
        }
    });
    let (to, pods) = (queue.clone(), controller.pods.clone());
    controller.claims.on_change(move |change| {
        if let Some(claim) = change.new.filter(|c| change.old.and_then(|c| volume_name(c)) != volume_name(c)) {
            nodes_of_claim(&pods, claim.metadata.namespace.as_deref(), claim.metadata.name.as_deref(), &to);
        }
    });
    let (to, pods) = (queue.clone(), controller.pods.clone());
    controller.volumes.on_change(move |change| {
        let owner = |v: &PersistentVolume| v.spec.as_ref().and_then(|s| s.claim_ref.clone());
        if let Some(owner) = change.new.filter(|_| change.old.is_none()).and_then(|v| owner(v)) {
            nodes_of_claim(&pods, owner.namespace.as_deref(), owner.name.as_deref(), &to);
        }
    });
    let (to, pods, volumes) = (queue.clone(), controller.pods.clone(), controller.volumes.clone());
    let attaching = controller.attaching.clone();
    attachments.on_change(move |change| {
        let Some(attachment) = change.latest() else { return };
        attachment.spec.source.persistent_volume_name.iter().for_each(|v| attaching.release(v));
        to.add(attachment.spec.node_name.clone());
        if change.new.is_none() {
            // Another node may wait for it.
            let volume = attachment.spec.source.persistent_volume_name.as_deref().and_then(|v| volumes.get("", v));
            if let Some(owner) = volume.and_then(|v| v.spec.as_ref()?.claim_ref.clone()) {
                nodes_of_claim(&pods, owner.namespace.as_deref(), owner.name.as_deref(), &to);
            }
        }
    });
    let (to, nodes) = (queue.clone(), controller.nodes.clone());
    controller.drivers.on_change(move |_| nodes.list().iter().for_each(|n| to.add(n.name_any())));
}

fn nodes_of_claim(pods: &Informer<Pod>, namespace: Option<&str>, claim: Option<&str>, queue: &WorkQueue<String>) {
    let uses = |p: &&Arc<Pod>| claims_of(p).any(|(name, _)| Some(name.as_str()) == claim);
    let pods = pods.list_in(namespace.unwrap_or_default());
    pods.iter().filter(uses).filter_map(|p| node_name(p)).for_each(|node| queue.add(node));
}

/// More than one node may have it. As `isMultiAttachForbidden`, the other way.
fn is_shared(volume: &PersistentVolume) -> bool {
    let modes = volume.spec.as_ref().and_then(|s| s.access_modes.as_deref()).unwrap_or_default();
    modes.is_empty() || modes.iter().any(|m| m == "ReadWriteMany" || m == "ReadOnlyMany")
}

impl Controller {
    /// A driver that nobody knows needs attaching.
    fn needs_attaching(&self, driver: &str) -> bool {
        self.drivers.get("", driver).is_none_or(|d| d.spec.attach_required != Some(false))
    }

    /// The volume behind a pod's claim, once the two are tied.
    fn volume(&self, namespace: &str, claim: &str) -> Option<Arc<PersistentVolume>> {
        let claim = self.claims.get(namespace, claim)?;
        let volume = self.volumes.get("", volume_name(&claim)?)?;
        let owner = volume.spec.as_ref()?.claim_ref.as_ref()?;
        (owner.uid == claim.metadata.uid).then_some(volume)
    }

    fn wanted(&self, node: &str, pods: &[Arc<Pod>]) -> Vec<Wanted> {
        let mut wanted: Vec<Wanted> = Vec::new();
        for (at, pod) in pods.iter().enumerate().filter(|(_, p)| !is_terminal(p)) {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            for (claim, _) in claims_of(pod) {
                let Some(volume) = self.volume(namespace, &claim) else { continue };
                let Some(csi) = volume.spec.as_ref().and_then(|s| s.csi.as_ref()) else { continue };
                if !self.needs_attaching(&csi.driver) {
                    continue;
                }
                let name = volume.name_any();
                if let Some(known) = wanted.iter_mut().find(|w| w.volume == name) {
                    known.pods.push(at);
                    continue;
                }
                let elsewhere: Vec<String> =
                    self.of_volume.get(&name).iter().map(|a| a.spec.node_name.clone()).filter(|n| n != node).collect();
                let uses = |p: &Arc<Pod>| {
                    node_name(p).is_some_and(|n| elsewhere.contains(&n)) && claims_of(p).any(|(name, _)| name == claim)
                };
                let users = if elsewhere.is_empty() { Vec::new() } else { self.pods.list_in(namespace) };
                wanted.push(Wanted {
                    volume: name,
                    driver: csi.driver.clone(),
                    handle: csi.volume_handle.clone(),
                    exclusive: !is_shared(&volume),
                    used_by: users.into_iter().filter(uses).map(|p| p.name_any()).collect(),
                    elsewhere: !elsewhere.is_empty(),
                    pods: vec![at],
                });
            }
        }
        wanted
    }

    /// The driver and handle of an attachment of this controller's; None for one that others made.
    fn identity(&self, attachment: &VolumeAttachment) -> Option<Option<(String, String)>> {
        let name = attachment.metadata.name.as_deref()?;
        let volume = self.volumes.get("", attachment.spec.source.persistent_volume_name.as_deref()?);
        let Some(volume) = volume else {
            let hash =
                name.strip_prefix("csi-").is_some_and(|h| h.len() == 64 && h.bytes().all(|b| b.is_ascii_hexdigit()));
            return hash.then_some(None);
        };
        let csi = volume.spec.as_ref()?.csi.as_ref()?;
        let ours = name == plan::attachment_name(&csi.driver, &csi.volume_handle, &attachment.spec.node_name);
        ours.then(|| Some((csi.driver.clone(), csi.volume_handle.clone())))
    }
}

impl Reconcile for Controller {
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Next, SyncError> {
        let node = self.nodes.get("", name).map(|n| NodeState::of(&n));
        let pods = self.on_node.get(name);
        let wanted = self.wanted(name, &pods);
        let existing = self.attachments.get(name);
        let now = Instant::now();
        let attachments: Vec<Attachment<'_>> = {
            let mut unwanted = self.unwanted.lock();
            let wants =
                |identity: &(String, String)| wanted.iter().any(|w| w.driver == identity.0 && w.handle == identity.1);
            let mut known = |object: &VolumeAttachment, identity: &Option<(String, String)>| {
                let name = object.name_any();
                if identity.as_ref().is_some_and(wants) {
                    unwanted.remove(&name);
                    return Duration::ZERO;
                }
                unwanted.entry(name).or_insert(now).elapsed()
            };
            existing
                .iter()
                .filter_map(|object| {
                    let identity = self.identity(object)?;
                    let unwanted_for = known(object, &identity);
                    let unique_name = identity.map(|(driver, handle)| plan::unique_name(&driver, &handle));
                    Some(Attachment { object, unique_name, unwanted_for })
                })
                .collect()
        };
        let plan = plan::plan(name, node.as_ref(), &wanted, &attachments, self.patience, Timestamp::now());
        for reason in &plan.forced {
            metrics::forced(reason);
        }
        for (pod, well, reason, message) in plan.told {
            let kind = if well { Type::Normal } else { Type::Warning };
            self.recorder.event(&reference(pods[pod].as_ref()), kind, reason, "", message);
        }
        if let Some(attached) = &plan.report {
            let nodes: Api<Node> = Api::all(self.client.clone());
            let patch = Patch::Merge(json!({"status": {"volumesAttached": attached}}));
            gone_is_fine(nodes.patch_status(name, &PatchParams::default(), &patch).await)?;
        }
        let api: Api<VolumeAttachment> = Api::all(self.client.clone());
        for name in &plan.detach {
            gone_is_fine(api.delete(name, &DeleteParams::default()).await)?;
            self.unwanted.lock().remove(name);
            info!(attachment = name, "detaching");
        }
        for attachment in &plan.attach {
            let volume = attachment.spec.source.persistent_volume_name.clone().unwrap_or_default();
            let exclusive = wanted.iter().any(|w| w.volume == volume && w.exclusive);
            if exclusive && !self.attaching.take(&volume, name) {
                return Err(SyncError::Waiting(format!("volume {volume} to be attached to another node")));
            }
            match api.create(&PostParams::default(), attachment).await {
                // The cache lags.
                Err(error) if is_code(&error, 409) => {}
                Err(error) => {
                    self.attaching.release(&volume);
                    return Err(error.into());
                }
                Ok(_) => info!(node = name, volume, "attaching"),
            }
        }
        Ok(Next::after(plan.again))
    }
}
