//! Volumes: what binds claims to them, makes, attaches, enlarges and protects them. Here is what these controllers share:
//! the annotations' names, and what claims, volumes and pods say of each other.
pub mod attach_detach;
pub mod binder;
pub mod ephemeral;
pub mod expand;
pub mod protection;

use apimachinery::quantity::Quantity;
use k8s_openapi::{
    api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod, Volume},
    apimachinery::pkg::{api::resource::Quantity as ApiQuantity, apis::meta::v1::ObjectMeta},
};
use std::collections::BTreeMap;

pub const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
pub const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";
pub const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
const CLASS: &str = "volume.beta.kubernetes.io/storage-class";
/// The provisioner that comes with the cluster.
pub const HOST_PATH: &str = "pilothouse.dev/host-path";

pub fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(key).map(String::as_str)
}

/// The class that a claim asks for; empty for none. The old annotation comes first.
pub fn class_of_claim(claim: &PersistentVolumeClaim) -> &str {
    let named = claim.spec.as_ref().and_then(|s| s.storage_class_name.as_deref());
    annotation(&claim.metadata, CLASS).or(named).unwrap_or_default()
}

/// Whether a claim says anything of classes; one that does not gets the default when there is one.
pub fn names_class(claim: &PersistentVolumeClaim) -> bool {
    annotation(&claim.metadata, CLASS).is_some() || claim.spec.as_ref().is_some_and(|s| s.storage_class_name.is_some())
}

pub fn class_of_volume(volume: &PersistentVolume) -> &str {
    let named = volume.spec.as_ref().and_then(|s| s.storage_class_name.as_deref());
    annotation(&volume.metadata, CLASS).or(named).unwrap_or_default()
}

pub fn phase_of_claim(claim: &PersistentVolumeClaim) -> &str {
    claim.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default()
}

pub fn phase_of_volume(volume: &PersistentVolume) -> &str {
    volume.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default()
}

/// The volume that a claim names, if it names one.
pub fn volume_name(claim: &PersistentVolumeClaim) -> Option<&str> {
    claim.spec.as_ref()?.volume_name.as_deref().filter(|n| !n.is_empty())
}

fn storage(of: Option<&BTreeMap<String, ApiQuantity>>) -> Quantity {
    of.and_then(|all| all.get("storage")).map_or_else(|| Quantity::from_value(0), Quantity::from)
}

pub fn requested(claim: &PersistentVolumeClaim) -> Quantity {
    storage(claim.spec.as_ref().and_then(|s| s.resources.as_ref()).and_then(|r| r.requests.as_ref()))
}

pub fn capacity(volume: &PersistentVolume) -> Quantity {
    storage(volume.spec.as_ref().and_then(|s| s.capacity.as_ref()))
}

/// What a claim's status says that it has.
pub fn granted(claim: &PersistentVolumeClaim) -> Quantity {
    storage(claim.status.as_ref().and_then(|s| s.capacity.as_ref()))
}

/// The name of the claim behind a pod's volume, and whether the claim is made for the pod.
pub fn claim_of(pod: &str, volume: &Volume) -> Option<(String, bool)> {
    if let Some(source) = &volume.persistent_volume_claim {
        return Some((source.claim_name.clone(), false));
    }
    volume.ephemeral.as_ref().map(|_| (format!("{pod}-{}", volume.name), true))
}

/// The names of the claims that a pod uses.
pub fn claims_of(pod: &Pod) -> impl Iterator<Item = (String, bool)> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    volumes.filter_map(move |v| claim_of(name, v))
}
