//! What persistent volumes, claims and pods say of each other, and which volume a claim gets. One reading for the
//! binder, the scheduler and the kubelet.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod, Volume};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::labels::Selector;
use crate::quantity::Quantity;

pub const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
pub const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";
pub const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
const CLASS: &str = "volume.beta.kubernetes.io/storage-class";

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

/// The name of the claim behind a pod's volume, and whether the claim is made for the pod (its name is then
/// `POD-VOLUME`).
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

/// Whether the volume is the claim's, or is kept for it. As `IsVolumeBoundToClaim`.
pub fn is_bound_to(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let Some(reference) = volume.spec.as_ref().and_then(|s| s.claim_ref.as_ref()) else { return false };
    let uid = reference.uid.as_deref().unwrap_or_default();
    reference.name == claim.metadata.name
        && reference.namespace == claim.metadata.namespace
        && (uid.is_empty() || Some(uid) == claim.metadata.uid.as_deref())
}

/// Block or file system.
pub fn modes_agree(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let mode = |mode: Option<&String>| mode.cloned().unwrap_or_else(|| "Filesystem".to_owned());
    mode(volume.spec.as_ref().and_then(|s| s.volume_mode.as_ref()))
        == mode(claim.spec.as_ref().and_then(|s| s.volume_mode.as_ref()))
}

fn attributes_agree(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let of_volume = volume.spec.as_ref().and_then(|s| s.volume_attributes_class_name.as_deref());
    let of_claim = claim.spec.as_ref().and_then(|s| s.volume_attributes_class_name.as_deref());
    of_volume.unwrap_or_default() == of_claim.unwrap_or_default()
}

fn access_modes(volume: &PersistentVolume) -> &[String] {
    volume.spec.as_ref().and_then(|s| s.access_modes.as_deref()).unwrap_or_default()
}

fn offers_access(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let offered = access_modes(volume);
    claim.spec.iter().flat_map(|s| s.access_modes.iter().flatten()).all(|wanted| offered.contains(wanted))
}

/// Why a volume that a claim names cannot be its own. As `checkVolumeSatisfyClaim`.
pub fn satisfies(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Result<(), &'static str> {
    if capacity(volume) < requested(claim) {
        return Err("requested PV is too small");
    }
    if class_of_volume(volume) != class_of_claim(claim) {
        return Err("storageClassName does not match");
    }
    if !modes_agree(volume, claim) {
        return Err("incompatible volumeMode");
    }
    if !offers_access(volume, claim) {
        return Err("incompatible accessMode");
    }
    if !attributes_agree(volume, claim) {
        return Err("volumeAttributesClassName does not match");
    }
    Ok(())
}

/// How `best_match` chooses among the volumes that fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Only what is kept for the claim already: another chooses.
    Kept,
    /// The smallest of those with the fewest access modes, as the binder does.
    FewestModes,
    /// The smallest, as the scheduler does.
    Smallest,
}

/// The volume that is kept for the claim; else one that fits, is free and `suits` besides. As `FindMatchingVolume`.
pub fn best_match<'a>(
    claim: &PersistentVolumeClaim,
    volumes: impl IntoIterator<Item = &'a Arc<PersistentVolume>>,
    choice: Choice,
    suits: impl Fn(&PersistentVolume) -> bool,
) -> Option<&'a Arc<PersistentVolume>> {
    let wanted = requested(claim);
    let selector = match claim.spec.as_ref().and_then(|s| s.selector.as_ref()) {
        Some(selector) => Some(Selector::from_label_selector(selector).ok()?),
        None => None,
    };
    let mut best: Option<((usize, Quantity), &Arc<PersistentVolume>)> = None;
    for volume in volumes {
        let could_be = volume.metadata.deletion_timestamp.is_none()
            && capacity(volume) >= wanted
            && modes_agree(volume, claim)
            && attributes_agree(volume, claim)
            && offers_access(volume, claim)
            && suits(volume);
        if !could_be {
            continue;
        }
        if is_bound_to(volume, claim) {
            return Some(volume);
        }
        let free = choice != Choice::Kept
            && volume.spec.as_ref().is_some_and(|s| s.claim_ref.is_none())
            && phase_of_volume(volume) == "Available"
            && selector.as_ref().is_none_or(|s| s.matches_opt(volume.metadata.labels.as_ref()))
            && class_of_volume(volume) == class_of_claim(claim);
        if !free {
            continue;
        }
        let modes = if choice == Choice::FewestModes { access_modes(volume).len() } else { 0 };
        let cost = (modes, capacity(volume));
        if best.as_ref().is_none_or(|(least, _)| cost < *least) {
            best = Some((cost, volume));
        }
    }
    best.map(|(_, volume)| volume)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn merged(mut base: Value, more: Value) -> Value {
        json_merge(&mut base, &more);
        base
    }

    fn json_merge(base: &mut Value, more: &Value) {
        match (base, more) {
            (Value::Object(base), Value::Object(more)) => {
                more.iter().for_each(|(k, v)| json_merge(base.entry(k.clone()).or_insert(Value::Null), v));
            }
            (base, more) => *base = more.clone(),
        }
    }

    fn volume(name: &str, size: &str, more: Value) -> Arc<PersistentVolume> {
        let base = json!({"metadata": {"name": name}, "status": {"phase": "Available"},
            "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], "storageClassName": ""}});
        Arc::new(serde_json::from_value(merged(base, more)).unwrap())
    }

    fn claim(more: Value) -> PersistentVolumeClaim {
        let base = json!({"metadata": {"name": "c", "namespace": "ns", "uid": "u"}, "spec": {"storageClassName": "",
            "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "5Gi"}}}});
        serde_json::from_value(merged(base, more)).unwrap()
    }

    #[test]
    fn the_smallest_that_fits_is_taken() {
        let all = [
            volume("small", "1Gi", json!({})),
            volume("right", "6Gi", json!({})),
            volume("large", "10Gi", json!({})),
            volume("exact-many", "5Gi", json!({"spec": {"accessModes": ["ReadWriteOnce", "ReadWriteMany"]}})),
            volume("gold", "5Gi", json!({"spec": {"storageClassName": "gold"}})),
            volume("block", "5Gi", json!({"spec": {"volumeMode": "Block"}})),
            volume("used", "5Gi", json!({"spec": {"claimRef": {"name": "d", "namespace": "ns"}}})),
            volume("released", "5Gi", json!({"status": {"phase": "Released"}})),
            volume("going", "5Gi", json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})),
            volume("tagged", "7Gi", json!({"metadata": {"labels": {"disk": "ssd"}}})),
        ];
        let kept = volume(
            "kept",
            "20Gi",
            json!({"status": {"phase": "Bound"},
            "spec": {"claimRef": {"name": "c", "namespace": "ns"}, "storageClassName": "other"}}),
        );
        let other = volume(
            "kept-for-a-namesake",
            "20Gi",
            json!({"spec": {"claimRef": {"name": "c", "namespace": "ns", "uid": "another"}}}),
        );
        for (why, more, delay, expected) in [
            ("plain", json!({}), false, Some("right")),
            ("many readers", json!({"spec": {"accessModes": ["ReadWriteMany"]}}), false, Some("exact-many")),
            ("class", json!({"spec": {"storageClassName": "gold"}}), false, Some("gold")),
            (
                "class by annotation",
                json!({"metadata": {"annotations": {"volume.beta.kubernetes.io/storage-class": "gold"}}}),
                false,
                Some("gold"),
            ),
            ("block", json!({"spec": {"volumeMode": "Block"}}), false, Some("block")),
            ("labels", json!({"spec": {"selector": {"matchLabels": {"disk": "ssd"}}}}), false, Some("tagged")),
            ("too much", json!({"spec": {"resources": {"requests": {"storage": "1Ti"}}}}), false, None),
            ("attributes", json!({"spec": {"volumeAttributesClassName": "fast"}}), false, None),
            ("the scheduler chooses", json!({}), true, None),
        ] {
            let choice = if delay { Choice::Kept } else { Choice::FewestModes };
            let found = best_match(&claim(more), &all, choice, |_| true);
            assert_eq!(found.and_then(|v| v.metadata.name.clone()).as_deref(), expected, "{why}");
        }
        let mut all = all.to_vec();
        all.extend([other, kept]);
        for choice in [Choice::Kept, Choice::FewestModes, Choice::Smallest] {
            let found = best_match(&claim(json!({})), &all, choice, |_| true).unwrap();
            assert_eq!(found.metadata.name.as_deref(), Some("kept"), "what is kept for it comes first");
        }
    }

    #[test]
    fn the_scheduler_takes_the_smallest_that_suits() {
        let many = json!({"spec": {"accessModes": ["ReadWriteOnce", "ReadWriteMany"]}});
        let all = [volume("few", "6Gi", json!({})), volume("many", "5Gi", many)];
        let name = |suits: &dyn Fn(&PersistentVolume) -> bool| {
            best_match(&claim(json!({})), &all, Choice::Smallest, suits).and_then(|v| v.metadata.name.as_deref())
        };
        assert_eq!(name(&|_| true), Some("many"));
        assert_eq!(name(&|v| v.metadata.name.as_deref() != Some("many")), Some("few"));
        assert_eq!(name(&|_| false), None);
    }

    #[test]
    fn a_volume_that_is_named_must_fit() {
        for (more, expected) in [
            (json!({}), Ok(())),
            (json!({"spec": {"capacity": {"storage": "1Gi"}}}), Err("requested PV is too small")),
            (json!({"spec": {"storageClassName": "x"}}), Err("storageClassName does not match")),
            (json!({"spec": {"volumeMode": "Block"}}), Err("incompatible volumeMode")),
            (json!({"spec": {"accessModes": ["ReadOnlyMany"]}}), Err("incompatible accessMode")),
            (json!({"spec": {"volumeAttributesClassName": "x"}}), Err("volumeAttributesClassName does not match")),
        ] {
            assert_eq!(satisfies(&volume("v", "5Gi", more.clone()), &claim(json!({}))), expected, "{more}");
        }
    }
}
