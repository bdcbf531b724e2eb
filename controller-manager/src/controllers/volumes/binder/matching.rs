//! Which volume a claim gets. Pure.
use crate::controllers::volumes::{capacity, class_of_claim, class_of_volume, phase_of_volume, requested};
use apimachinery::labels::Selector;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use std::sync::Arc;

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

/// The volume that is kept for the claim; else the smallest that fits, of those with the fewest access modes that it did
/// not ask for. With `delay` only what is kept for it: the scheduler chooses. As `findBestMatchForClaim`.
pub fn best_match(
    claim: &PersistentVolumeClaim,
    volumes: &[Arc<PersistentVolume>],
    delay: bool,
) -> Option<Arc<PersistentVolume>> {
    let wanted = requested(claim);
    let labels = claim.spec.as_ref().and_then(|s| s.selector.as_ref());
    let selector = match labels {
        Some(selector) => Some(Selector::from_label_selector(selector).ok()?),
        None => None,
    };
    let could_be = |v: &&Arc<PersistentVolume>| {
        v.metadata.deletion_timestamp.is_none()
            && capacity(v) >= wanted
            && modes_agree(v, claim)
            && attributes_agree(v, claim)
            && offers_access(v, claim)
    };
    let mut fitting: Vec<_> = volumes.iter().filter(could_be).collect();
    if let Some(kept) = fitting.iter().find(|v| is_bound_to(v, claim)) {
        return Some((*kept).clone());
    }
    if delay {
        return None;
    }
    fitting.retain(|v| {
        v.spec.as_ref().is_some_and(|s| s.claim_ref.is_none())
            && phase_of_volume(v) == "Available"
            && selector.as_ref().is_none_or(|s| s.matches_opt(v.metadata.labels.as_ref()))
            && class_of_volume(v) == class_of_claim(claim)
    });
    let cost = |v: &Arc<PersistentVolume>| (access_modes(v).len(), capacity(v));
    fitting
        .into_iter()
        .min_by(|a, b| {
            let ((modes_a, size_a), (modes_b, size_b)) = (cost(a), cost(b));
            modes_a.cmp(&modes_b).then(size_a.partial_cmp(&size_b).unwrap_or(std::cmp::Ordering::Equal))
        })
        .cloned()
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
            let found = best_match(&claim(more), &all, delay);
            assert_eq!(found.and_then(|v| v.metadata.name.clone()).as_deref(), expected, "{why}");
        }
        let mut all = all.to_vec();
        all.extend([other, kept]);
        for delay in [false, true] {
            let found = best_match(&claim(json!({})), &all, delay).unwrap();
            assert_eq!(found.metadata.name.as_deref(), Some("kept"), "what is kept for it comes first");
        }
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
