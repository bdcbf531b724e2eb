//! The volume binder: ties claims to volumes, has volumes made for claims, and reclaims those whose claim is gone.
//!
//! One worker, since two claims must not be given one volume; it decides over what it wrote last ([`Fresh`]), so it need
//! not wait for its cache. The tie is made in four writes (the volume's claim, its phase, the claim's volume, its phase);
//! whoever is killed in between finds a volume kept for the claim, and goes on.
mod helper;
mod host_path;
mod plan;

use super::{HOST_PATH, claims_of, phase_of_claim, phase_of_volume, volume_name};
use crate::{
    controllers::service_backends::node_name,
    runtime::{Context, Fresh, Next, Reconcile, SyncError, WorkQueue, api_in, gone_is_fine, run},
};
use apimachinery::meta::NamespacedName;
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
};
use helper::{Helper, Progress, Work};
use k8s_openapi::api::{
    core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod},
    storage::v1::StorageClass,
};
use kube::{
    Api, Client,
    api::{DeleteParams, PostParams},
};
use plan::{ClaimPlan, FINALIZER, Reclaim, Told, VolumePlan, World};
use std::{fmt, sync::Arc, time::Duration};
use tracing::info;

const NAME: &str = "volumes";
/// How soon a helper's pod is looked at though no event told of it.
const HELPER_PERIOD: Duration = Duration::from_secs(10);

/// What the binder looks at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Claim(NamespacedName),
    Volume(String),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Claim(claim) => write!(f, "claim {claim}"),
            Self::Volume(volume) => write!(f, "volume {volume}"),
        }
    }
}

struct Binder {
    client: Client,
    recorder: Recorder,
    queue: Arc<WorkQueue<Key>>,
    volumes: Fresh<PersistentVolume>,
    claims: Fresh<PersistentVolumeClaim>,
    classes: Informer<StorageClass>,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
    helper: Helper,
    provisions: bool,
    period: Duration,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("persistent-volume-binder").await else { return };
    let queue = Arc::new(WorkQueue::new(NAME));
    let binder = Arc::new(Binder {
        recorder: context.recorder(&client, "persistentvolume-controller"),
        queue: queue.clone(),
        volumes: Fresh::new(context.informers.get()),
        claims: Fresh::new(context.informers.get()),
        classes: context.informers.get(),
        pods: context.informers.get(),
        nodes: context.informers.get(),
        helper: Helper::new(client.clone(), &context.settings.volume_helper_image),
        provisions: context.settings.enable_dynamic_provisioning,
        period: context.settings.pvclaimbinder_sync_period,
        client,
    });
    wake(&binder);
    binder.volumes.informer().synced().await;
    binder.claims.informer().synced().await;
    binder.classes.synced().await;
    binder.pods.synced().await;
    binder.nodes.synced().await;
    run(NAME, queue, binder, 1, context.shutdown.clone()).await;
}

fn wake(binder: &Binder) {
    let (to, volumes) = (binder.queue.clone(), binder.volumes.informer().clone());
    binder.claims.informer().on_change(move |change| {
        let Some(claim) = change.latest() else { return };
        let key = NamespacedName::of(claim.as_ref());
        if change.old.and_then(|c| volume_name(c)) != change.new.and_then(|c| volume_name(c)) {
            volume_name(claim).into_iter().for_each(|v| to.add(Key::Volume(v.to_owned())));
        }
        if change.new.is_none() {
            let kept = volumes.list().into_iter().filter(|v| owner_of(v).as_ref() == Some(&key));
            kept.for_each(|v| to.add(Key::Volume(v.metadata.name.clone().unwrap_or_default())));
        } else {
            to.add(Key::Claim(key));
        }
    });
    let (to, claims) = (binder.queue.clone(), binder.claims.informer().clone());
    binder.volumes.informer().on_change(move |change| {
        let Some(volume) = change.latest() else { return };
        to.add(Key::Volume(volume.metadata.name.clone().unwrap_or_default()));
        if change.old.and_then(|v| owner_of(v)) != change.new.and_then(|v| owner_of(v)) {
            [change.old, change.new]
                .into_iter()
                .flatten()
                .filter_map(|v| owner_of(v))
                .for_each(|c| to.add(Key::Claim(c)));
        }
        let free = |v: &Arc<PersistentVolume>| {
            (phase_of_volume(v) == "Available").then(|| (v.spec.clone(), v.metadata.labels.clone()))
        };
        if change.new.and_then(free).is_some_and(|new| change.old.and_then(free) != Some(new)) {
            wake_waiting(&claims, &to);
        }
    });
    let (to, claims) = (binder.queue.clone(), binder.claims.informer().clone());
    binder.classes.on_change(move |change| {
        if change.new.is_some() {
            wake_waiting(&claims, &to);
        }
    });
    let to = binder.queue.clone();
    binder.pods.on_change(move |change| {
        if let Some(volume) = change.latest().and_then(|p| helper::volume_of(p)) {
            to.add(Key::Volume(volume));
        }
    });
}

fn wake_waiting(claims: &Informer<PersistentVolumeClaim>, queue: &WorkQueue<Key>) {
    let all = claims.list();
    all.iter().filter(|c| volume_name(c).is_none()).for_each(|c| queue.add(Key::Claim(NamespacedName::of(c.as_ref()))));
}

/// The claim that a volume is tied to or kept for.
fn owner_of(volume: &PersistentVolume) -> Option<NamespacedName> {
    let owner = volume.spec.as_ref()?.claim_ref.as_ref()?;
    Some(NamespacedName::new(owner.namespace.clone()?, owner.name.clone()?))
}

impl Binder {
    fn tell_claim(&self, claim: &PersistentVolumeClaim, told: &Told) {
        self.recorder.event(&reference(claim), told.kind, told.reason, "", told.message.clone());
    }

    fn tell_volume(&self, volume: &PersistentVolume, told: &Told) {
        self.recorder.event(&reference(volume), told.kind, told.reason, "", told.message.clone());
    }

    async fn save_volume(&self, volume: &PersistentVolume) -> Result<Arc<PersistentVolume>, kube::Error> {
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        let api: Api<PersistentVolume> = Api::all(self.client.clone());
        Ok(self.volumes.put(api.replace(name, &PostParams::default(), volume).await?))
    }

    /// Gives the volume as it is then.
    async fn volume_becomes(
        &self,
        volume: Arc<PersistentVolume>,
        phase: &str,
        message: &str,
    ) -> Result<Arc<PersistentVolume>, kube::Error> {
        let Some(updated) = plan::volume_in_phase(&volume, phase, message) else { return Ok(volume) };
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        let api: Api<PersistentVolume> = Api::all(self.client.clone());
        Ok(self.volumes.put(api.replace_status(name, &PostParams::default(), &updated).await?))
    }

    async fn save_claim(&self, claim: &PersistentVolumeClaim) -> Result<Arc<PersistentVolumeClaim>, kube::Error> {
        let (namespace, name) = (claim.metadata.namespace.as_deref(), claim.metadata.name.as_deref());
        let api = api_in::<PersistentVolumeClaim>(&self.client, namespace.unwrap_or_default());
        Ok(self.claims.put(api.replace(name.unwrap_or_default(), &PostParams::default(), claim).await?))
    }

    /// Whether its status changed.
    async fn claim_becomes(
        &self,
        claim: &PersistentVolumeClaim,
        phase: &str,
        volume: Option<&PersistentVolume>,
    ) -> Result<bool, kube::Error> {
        let Some(updated) = plan::claim_in_phase(claim, phase, volume) else { return Ok(false) };
        let (namespace, name) = (claim.metadata.namespace.as_deref(), claim.metadata.name.as_deref());
        let api = api_in::<PersistentVolumeClaim>(&self.client, namespace.unwrap_or_default());
        self.claims.put(api.replace_status(name.unwrap_or_default(), &PostParams::default(), &updated).await?);
        Ok(true)
    }

    async fn bind(
        &self,
        mut volume: Arc<PersistentVolume>,
        mut claim: Arc<PersistentVolumeClaim>,
    ) -> Result<(), kube::Error> {
        if let Some(tied) = plan::bound_volume(&volume, &claim) {
            volume = self.save_volume(&tied).await?;
        }
        volume = self.volume_becomes(volume, "Bound", "").await?;
        if let Some(bound) = plan::bound_claim(&claim, &volume) {
            claim = self.save_claim(&bound).await?;
        }
        if self.claim_becomes(&claim, "Bound", Some(&volume)).await? {
            info!(claim = %NamespacedName::of(claim.as_ref()), volume = volume.metadata.name, "bound");
        }
        Ok(())
    }

    async fn sync_claim(&self, claim: Arc<PersistentVolumeClaim>) -> Result<Next, SyncError> {
        let volumes = match volume_name(&claim) {
            Some(name) => self.volumes.get("", name).into_iter().collect(),
            None => self.volumes.list(),
        };
        let classes = self.classes.list();
        let unscheduled_pods = || self.unscheduled_pods(&claim);
        let world = World { volumes: &volumes, classes: &classes, unscheduled_pods: &unscheduled_pods };
        match plan::plan_claim(&claim, &world) {
            ClaimPlan::Bind(volume) => self.bind(volume, claim.clone()).await?,
            ClaimPlan::Pending(told) => {
                told.iter().for_each(|told| self.tell_claim(&claim, told));
                self.claim_becomes(&claim, "Pending", None).await?;
                return Ok(Next::after(told.map(|_| self.period)));
            }
            ClaimPlan::Lost(told) => {
                let lost = phase_of_claim(&claim) == "Lost";
                self.claim_becomes(&claim, "Lost", None).await?;
                if !lost {
                    self.tell_claim(&claim, &told);
                }
            }
            ClaimPlan::Classify(class) => {
                let mut classified = claim.as_ref().clone();
                classified.spec.get_or_insert_default().storage_class_name = Some(class);
                self.save_claim(&classified).await?;
            }
            ClaimPlan::Provision if !self.provisions || claim.metadata.deletion_timestamp.is_some() => {}
            ClaimPlan::Provision => return self.provision(claim.clone(), world.class(&claim).cloned()).await,
        }
        Ok(Next::Settled)
    }

    fn unscheduled_pods(&self, claim: &PersistentVolumeClaim) -> Vec<String> {
        let uses = |p: &Arc<Pod>| claims_of(p).any(|(name, _)| Some(&name) == claim.metadata.name.as_ref());
        let pods = self.pods.list_in(claim.metadata.namespace.as_deref().unwrap_or_default());
        let waiting = pods.into_iter().filter(|p| node_name(p).is_none() && uses(p));
        waiting.filter_map(|p| p.metadata.name.clone()).collect()
    }

    /// As `provisionClaim`.
    async fn provision(
        &self,
        claim: Arc<PersistentVolumeClaim>,
        class: Option<Arc<StorageClass>>,
    ) -> Result<Next, SyncError> {
        let failed = |message: String| {
            self.tell_claim(&claim, &Told { kind: Type::Warning, reason: "ProvisioningFailed", message });
            Ok(Next::After(self.period))
        };
        let Some(class) = class else {
            return failed(format!("storageclass.storage.k8s.io {:?} not found", super::class_of_claim(&claim)));
        };
        let provisioner = class.provisioner.as_str();
        if provisioner == HOST_PATH {
            return self.provision_on_host(&claim, &class).await;
        }
        if provisioner.starts_with("kubernetes.io/") {
            return failed(format!("no volume plugin matched name: {provisioner}"));
        }
        let claim = match plan::for_provisioner(&claim, provisioner) {
            Some(asked) => self.save_claim(&asked).await?,
            None => claim.clone(),
        };
        let message = format!(
            "Waiting for a volume to be created either by the external provisioner '{provisioner}' or manually by the \
             system administrator. If volume creation is delayed, please verify that the provisioner is running and \
             correctly registered."
        );
        self.tell_claim(&claim, &Told { kind: Type::Normal, reason: "ExternalProvisioning", message });
        Ok(Next::After(self.period))
    }

    /// The claim of a volume, whatever its UID. What the cache lacks may be there: a volume is not given up on a rumour.
    async fn claim_of(&self, volume: &PersistentVolume) -> Result<Option<Arc<PersistentVolumeClaim>>, kube::Error> {
        let Some(owner) = owner_of(volume) else { return Ok(None) };
        let uid = volume.spec.as_ref().and_then(|s| s.claim_ref.as_ref()).and_then(|r| r.uid.clone());
        let cached = self.claims.get(&owner.namespace, &owner.name);
        let given_up = matches!(phase_of_volume(volume), "Released" | "Failed");
        if uid.is_none() || given_up || cached.as_ref().is_some_and(|c| c.metadata.uid == uid) {
            return Ok(cached);
        }
        let live = api_in::<PersistentVolumeClaim>(&self.client, &owner.namespace).get_opt(&owner.name).await?;
        Ok(live.map(Arc::new))
    }

    async fn sync_volume(&self, volume: Arc<PersistentVolume>) -> Result<Next, SyncError> {
        let claim = self.claim_of(&volume).await?;
        match plan::plan_volume(&volume, claim.as_deref()) {
            VolumePlan::Become(phase) => {
                self.volume_becomes(volume, phase, "").await?;
            }
            VolumePlan::Ask(claim) => self.queue.add(Key::Claim(claim)),
            VolumePlan::Unbind => self.unbind(&volume).await?,
            VolumePlan::Refuse(told) => self.tell_volume(&volume, &told),
            VolumePlan::Guard(on) => {
                let mut guarded = volume.as_ref().clone();
                let finalizers = guarded.metadata.finalizers.get_or_insert_default();
                finalizers.retain(|f| f != FINALIZER);
                if on {
                    finalizers.push(FINALIZER.to_owned());
                }
                self.save_volume(&guarded).await?;
            }
            VolumePlan::Reclaim => return self.reclaim(volume).await,
        }
        Ok(Next::Settled)
    }

    async fn unbind(&self, volume: &PersistentVolume) -> Result<(), kube::Error> {
        let free = self.save_volume(&plan::unbound_volume(volume)).await?;
        self.volume_becomes(free, "Available", "").await?;
        Ok(())
    }

    async fn reclaim(&self, mut volume: Arc<PersistentVolume>) -> Result<Next, SyncError> {
        if !matches!(phase_of_volume(&volume), "Released" | "Failed") {
            volume = self.volume_becomes(volume, "Released", "").await?;
        }
        let name = volume.metadata.name.clone().unwrap_or_default();
        let (work, reason) = match plan::reclaim(&volume) {
            Reclaim::Keep | Reclaim::Elsewhere => return Ok(Next::Settled),
            Reclaim::Fail(told) => return self.fail(volume, told).await,
            Reclaim::Delete => (Work::Remove, "VolumeFailedDelete"),
            Reclaim::Scrub => (Work::Scrub, "VolumeFailedRecycle"),
        };
        let progress = match host_path::place(&volume, work, &self.nodes.list()) {
            Some(place) => self.helper.work(work, &name, &place).await?,
            None => {
                info!(volume = name, "its node is gone, and its data with it");
                Progress::Done
            }
        };
        match progress {
            Progress::Working => return Ok(Next::After(HELPER_PERIOD)),
            Progress::Failed(message) => {
                let kind = Type::Warning;
                self.fail(volume, Told { kind, reason, message: message.clone() }).await?;
                return Err(SyncError::Invalid(message));
            }
            Progress::Done if work == Work::Scrub => {
                let message = "Volume recycled".to_owned();
                self.tell_volume(&volume, &Told { kind: Type::Normal, reason: "VolumeRecycled", message });
                self.unbind(&volume).await?;
            }
            Progress::Done => self.delete_volume(&volume).await?,
        }
        self.helper.dismiss(work, &name).await?;
        Ok(Next::Settled)
    }

    async fn fail(&self, volume: Arc<PersistentVolume>, told: Told) -> Result<Next, SyncError> {
        let before = phase_of_volume(&volume) == "Failed";
        let volume = self.volume_becomes(volume, "Failed", &told.message).await?;
        if !before {
            self.tell_volume(&volume, &told);
        }
        Ok(Next::Settled)
    }

    /// The object goes once its data have gone.
    async fn delete_volume(&self, volume: &PersistentVolume) -> Result<(), kube::Error> {
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        let api: Api<PersistentVolume> = Api::all(self.client.clone());
        let Some(going) = gone_is_fine(api.delete(name, &DeleteParams::default()).await)? else { return Ok(()) };
        if let Some(mut going) = going.left() {
            going.metadata.finalizers.get_or_insert_default().retain(|f| f != FINALIZER);
            gone_is_fine(api.replace(name, &PostParams::default(), &going).await)?;
        }
        self.volumes.forget("", name);
        info!(volume = name, "deleted");
        Ok(())
    }
}

impl Reconcile for Binder {
    type Key = Key;

    async fn reconcile(&self, key: &Key) -> Result<Next, SyncError> {
        match key {
            Key::Claim(key) => match self.claims.get(&key.namespace, &key.name) {
                Some(claim) => self.sync_claim(claim).await,
                None => Ok(Next::Settled),
            },
            Key::Volume(name) => match self.volumes.get("", name) {
                Some(volume) => self.sync_volume(volume).await,
                None => self.absent_volume(name).await,
            },
        }
    }
}
