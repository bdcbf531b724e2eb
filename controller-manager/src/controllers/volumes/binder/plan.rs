//! What is to become of a claim, and of a volume, and how two are tied together. Pure. As `syncClaim` and `syncVolume` of
//! the volume binder.
use crate::controllers::volumes::{
    BIND_COMPLETED, BOUND_BY_CONTROLLER, HOST_PATH, PROVISIONED_BY, SELECTED_NODE, annotation, class_of_claim,
    names_class, phase_of_claim, phase_of_volume, volume_name,
};
use apimachinery::meta::NamespacedName;
use apimachinery::volume::{Choice, best_match, is_bound_to, modes_agree, satisfies};
use component_base::events::{Type, reference};
use k8s_openapi::api::{
    core::v1::{PersistentVolume, PersistentVolumeClaim},
    storage::v1::StorageClass,
};
use std::{collections::BTreeMap, sync::Arc};

const DEFAULT_CLASS: [&str; 2] =
    ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
/// Keeps a volume that this process deletes until its data are gone.
pub const FINALIZER: &str = "kubernetes.io/pv-controller";
const PROVISIONER: [&str; 2] =
    ["volume.beta.kubernetes.io/storage-provisioner", "volume.kubernetes.io/storage-provisioner"];

/// For a person to read on the claim or the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    pub kind: Type,
    pub reason: &'static str,
    pub message: String,
}

fn told(kind: Type, reason: &'static str, message: impl Into<String>) -> Option<Told> {
    Some(Told { kind, reason, message: message.into() })
}

#[derive(Debug, PartialEq)]
pub enum ClaimPlan {
    /// To this volume; also to finish or repair what was begun.
    Bind(Arc<PersistentVolume>),
    /// It waits.
    Pending(Option<Told>),
    /// What it was bound to is not there or another's.
    Lost(Told),
    /// The default class, which came after the claim did.
    Classify(String),
    /// A volume is to be made for it.
    Provision,
}

/// What a claim's fate depends on.
pub struct World<'a> {
    pub volumes: &'a [Arc<PersistentVolume>],
    pub classes: &'a [Arc<StorageClass>],
    /// Pods that use the claim and have no node yet.
    pub unscheduled_pods: &'a (dyn Fn() -> Vec<String> + Sync),
}

impl World<'_> {
    pub fn class(&self, claim: &PersistentVolumeClaim) -> Option<&Arc<StorageClass>> {
        let name = class_of_claim(claim);
        self.classes.iter().find(|c| c.metadata.name.as_deref() == Some(name))
    }
}

/// The class of claims that name none: of several the youngest. As `GetDefaultClass`.
pub fn default_class(classes: &[Arc<StorageClass>]) -> Option<&str> {
    let is_default = |c: &&Arc<StorageClass>| DEFAULT_CLASS.iter().any(|a| annotation(&c.metadata, a) == Some("true"));
    let order =
        |c: &&Arc<StorageClass>| (c.metadata.creation_timestamp.clone(), std::cmp::Reverse(c.metadata.name.clone()));
    classes.iter().filter(is_default).max_by_key(order)?.metadata.name.as_deref()
}

pub fn plan_claim(claim: &PersistentVolumeClaim, world: &World<'_>) -> ClaimPlan {
    if annotation(&claim.metadata, BIND_COMPLETED).is_some() {
        return plan_bound_claim(claim, world);
    }
    let Some(name) = volume_name(claim) else { return plan_free_claim(claim, world) };
    let Some(volume) = find(world.volumes, name) else { return ClaimPlan::Pending(None) };
    let claimed = volume.spec.as_ref().is_some_and(|s| s.claim_ref.is_some());
    if is_bound_to(volume, claim) {
        return ClaimPlan::Bind(volume.clone());
    }
    if claimed {
        let message = format!("volume {name:?} already bound to a different claim.");
        return ClaimPlan::Pending(told(Type::Warning, "FailedBinding", message));
    }
    match satisfies(volume, claim) {
        Ok(()) => ClaimPlan::Bind(volume.clone()),
        Err(why) => {
            let message = format!("Cannot bind to requested volume {name:?}: {why}");
            ClaimPlan::Pending(told(Type::Warning, "VolumeMismatch", message))
        }
    }
}

fn find<'a>(volumes: &'a [Arc<PersistentVolume>], name: &str) -> Option<&'a Arc<PersistentVolume>> {
    volumes.iter().find(|v| v.metadata.name.as_deref() == Some(name))
}

fn plan_free_claim(claim: &PersistentVolumeClaim, world: &World<'_>) -> ClaimPlan {
    let class = world.class(claim);
    let waits = class.is_some_and(|c| c.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"))
        && annotation(&claim.metadata, SELECTED_NODE).is_none();
    let choice = if waits { Choice::Kept } else { Choice::FewestModes };
    if let Some(volume) = best_match(claim, world.volumes, choice, |_| true) {
        return ClaimPlan::Bind(volume.clone());
    }
    if !names_class(claim)
        && let Some(default) = default_class(world.classes)
    {
        return ClaimPlan::Classify(default.to_owned());
    }
    if waits {
        let pods = (world.unscheduled_pods)();
        return ClaimPlan::Pending(if pods.is_empty() {
            let message = "waiting for first consumer to be created before binding";
            told(Type::Normal, "WaitForFirstConsumer", message)
        } else {
            let plural = if pods.len() == 1 { "" } else { "s" };
            let message = format!("waiting for pod{plural} {} to be scheduled", pods.join(","));
            told(Type::Normal, "WaitForPodScheduled", message)
        });
    }
    if !class_of_claim(claim).is_empty() {
        return ClaimPlan::Provision;
    }
    let message = "no persistent volumes available for this claim and no storage class is set";
    ClaimPlan::Pending(told(Type::Normal, "FailedBinding", message))
}

fn plan_bound_claim(claim: &PersistentVolumeClaim, world: &World<'_>) -> ClaimPlan {
    let lost =
        |reason, message: &str| ClaimPlan::Lost(Told { kind: Type::Warning, reason, message: message.to_owned() });
    let Some(name) = volume_name(claim) else {
        return lost("ClaimLost", "Bound claim has lost reference to PersistentVolume. Data on the volume is lost!");
    };
    let Some(volume) = find(world.volumes, name) else {
        return lost("ClaimLost", "Bound claim has lost its PersistentVolume. Data on the volume is lost!");
    };
    match volume.spec.as_ref().and_then(|s| s.claim_ref.as_ref()) {
        Some(owner) if owner.uid != claim.metadata.uid => {
            lost("ClaimMisbound", "Two claims are bound to the same volume, this one is bound incorrectly")
        }
        _ => ClaimPlan::Bind(volume.clone()),
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum VolumePlan {
    /// Only its phase may be wrong.
    Become(&'static str),
    /// Its claim is looked at: it has not taken the volume yet, or will repair what is broken.
    Ask(NamespacedName),
    /// It was taken for a claim that got another: it is free again.
    Unbind,
    /// Its claim is gone.
    Reclaim,
    /// The claim that it is kept for cannot use it.
    Refuse(Told),
    /// Its deletion is ours now, or no longer: our finalizer comes or goes.
    Guard(bool),
}

/// `claim` is the one of the volume's name for it, whatever its UID; only when the server has it, too.
pub fn plan_volume(volume: &PersistentVolume, claim: Option<&PersistentVolumeClaim>) -> VolumePlan {
    let spec = volume.spec.as_ref();
    let Some(owner) = spec.and_then(|s| s.claim_ref.as_ref()) else { return VolumePlan::Become("Available") };
    let deletes = spec.and_then(|s| s.persistent_volume_reclaim_policy.as_deref()) == Some("Delete");
    let provisioner = annotation(&volume.metadata, PROVISIONED_BY);
    let guarded = volume.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER);
    if provisioner == Some(HOST_PATH) && guarded != deletes && (guarded || volume.metadata.deletion_timestamp.is_none())
    {
        return VolumePlan::Guard(deletes);
    }
    if owner.uid.as_deref().unwrap_or_default().is_empty() {
        return VolumePlan::Become("Available");
    }
    let Some(claim) = claim.filter(|c| c.metadata.uid == owner.uid) else { return VolumePlan::Reclaim };
    match volume_name(claim) {
        None if !modes_agree(volume, claim) => {
            let message = format!(
                "Cannot bind PersistentVolume to requested PersistentVolumeClaim {:?} due to incompatible volumeMode.",
                claim.metadata.name.as_deref().unwrap_or_default()
            );
            VolumePlan::Refuse(Told { kind: Type::Warning, reason: "VolumeMismatch", message })
        }
        None => VolumePlan::Ask(NamespacedName::of(claim)),
        Some(name) if Some(name) == volume.metadata.name.as_deref() => VolumePlan::Become("Bound"),
        // What was made for the claim in vain is deleted; what was there before is free again.
        Some(_) if provisioner.is_some() && deletes => VolumePlan::Reclaim,
        Some(_) => VolumePlan::Unbind,
    }
}

/// What a volume's policy asks for once its claim is gone.
#[derive(Debug, PartialEq, Eq)]
pub enum Reclaim {
    Keep,
    /// Its provisioner is another process, which deletes it.
    Elsewhere,
    Delete,
    Scrub,
    Fail(Told),
}

/// As `reclaimVolume`.
pub fn reclaim(volume: &PersistentVolume) -> Reclaim {
    let name = volume.metadata.name.as_deref().unwrap_or_default();
    let Some(spec) = &volume.spec else { return Reclaim::Keep };
    let fail = |reason, message| Reclaim::Fail(Told { kind: Type::Warning, reason, message });
    match spec.persistent_volume_reclaim_policy.as_deref() {
        Some("Delete") => match annotation(&volume.metadata, PROVISIONED_BY) {
            Some(HOST_PATH) if spec.local.is_some() => Reclaim::Delete,
            Some(provisioner) if !provisioner.is_empty() && !provisioner.starts_with("kubernetes.io/") => {
                Reclaim::Elsewhere
            }
            _ => fail(
                "VolumeFailedDelete",
                format!("error getting deleter volume plugin for volume {name:?}: no deletable volume plugin matched"),
            ),
        },
        Some("Recycle") if spec.host_path.is_some() || spec.nfs.is_some() => Reclaim::Scrub,
        Some("Recycle") => fail("VolumeFailedRecycle", "No recycler plugin found for the volume!".to_owned()),
        _ => Reclaim::Keep,
    }
}

// === what is written ===

fn annotate(annotations: &mut Option<BTreeMap<String, String>>, key: &str, value: &str) {
    annotations.get_or_insert_default().insert(key.to_owned(), value.to_owned());
}

/// The volume as the claim's; None if it is. As `GetBindVolumeToClaim`.
pub fn bound_volume(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Option<PersistentVolume> {
    let mut bound = volume.clone();
    if !is_bound_to(volume, claim) {
        annotate(&mut bound.metadata.annotations, BOUND_BY_CONTROLLER, "yes");
    }
    let spec = bound.spec.get_or_insert_default();
    let uid = spec.claim_ref.as_ref().and_then(|r| r.uid.as_ref());
    if !is_bound_to(volume, claim) || uid != claim.metadata.uid.as_ref() {
        spec.claim_ref = Some(reference(claim));
    }
    (bound != *volume).then_some(bound)
}

/// The claim as the volume's; None if it is. As `bindClaimToVolume`.
pub fn bound_claim(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Option<PersistentVolumeClaim> {
    let mut bound = claim.clone();
    if volume_name(claim) != volume.metadata.name.as_deref() {
        bound.spec.get_or_insert_default().volume_name.clone_from(&volume.metadata.name);
        annotate(&mut bound.metadata.annotations, BOUND_BY_CONTROLLER, "yes");
    }
    if annotation(&claim.metadata, BIND_COMPLETED).is_none() {
        annotate(&mut bound.metadata.annotations, BIND_COMPLETED, "yes");
    }
    (bound != *claim).then_some(bound)
}

/// The claim with its phase, and what it has of the volume; None if its status says so. As `updateClaimStatus`.
pub fn claim_in_phase(
    claim: &PersistentVolumeClaim,
    phase: &str,
    volume: Option<&PersistentVolume>,
) -> Option<PersistentVolumeClaim> {
    let mut status = claim.status.clone().unwrap_or_default();
    match volume.and_then(|v| v.spec.as_ref()) {
        None => {
            status.access_modes = None;
            status.capacity = None;
            status.current_volume_attributes_class_name = None;
        }
        Some(spec) => {
            status.access_modes.clone_from(&spec.access_modes);
            // Later the claim may be smaller than the volume for a while: it grows by other hands.
            if phase_of_claim(claim) != phase {
                let storage = spec.capacity.iter().flatten().filter(|(k, _)| *k == "storage");
                status.capacity = Some(storage.map(|(k, v)| (k.clone(), v.clone())).collect());
                status.current_volume_attributes_class_name.clone_from(&spec.volume_attributes_class_name);
            }
        }
    }
    status.phase = Some(phase.to_owned());
    (claim.status.as_ref() != Some(&status)).then(|| PersistentVolumeClaim { status: Some(status), ..claim.clone() })
}

/// The volume without its claim: one that was tied by its author stays kept for the claim's name. As `unbindVolume`.
pub fn unbound_volume(volume: &PersistentVolume) -> PersistentVolume {
    let mut free = volume.clone();
    let by_us = annotation(&volume.metadata, BOUND_BY_CONTROLLER).is_some();
    if let Some(annotations) = &mut free.metadata.annotations {
        annotations.remove(BOUND_BY_CONTROLLER);
    }
    if let Some(spec) = &mut free.spec {
        if by_us {
            spec.claim_ref = None;
        } else if let Some(reference) = &mut spec.claim_ref {
            reference.uid = None;
            reference.resource_version = None;
        }
    }
    free
}

/// The volume with its phase; None if it has it, whatever the message.
pub fn volume_in_phase(volume: &PersistentVolume, phase: &str, message: &str) -> Option<PersistentVolume> {
    let message = (!message.is_empty()).then(|| message.to_owned());
    if phase_of_volume(volume) == phase {
        return None;
    }
    let mut updated = volume.clone();
    let status = updated.status.get_or_insert_default();
    status.phase = Some(phase.to_owned());
    status.message = message;
    Some(updated)
}

/// The claim as external provisioners expect it; None if it is so. As `setClaimProvisioner`.
pub fn for_provisioner(claim: &PersistentVolumeClaim, provisioner: &str) -> Option<PersistentVolumeClaim> {
    let mut asked = claim.clone();
    PROVISIONER.iter().for_each(|key| annotate(&mut asked.metadata.annotations, key, provisioner));
    (asked != *claim).then_some(asked)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
