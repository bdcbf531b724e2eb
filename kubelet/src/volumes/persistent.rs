//! Volumes behind claims: which PersistentVolume a pod's claim is bound to, and what each kind of it asks of the host. Kinds that
//! Kubernetes knows only through CSI drivers go to `csi`.

use std::path::Path;

use apimachinery::quantity::Quantity;
use component_base::events::reference;
use k8s_openapi::api::core::v1::{
    ObjectReference, PersistentVolume, PersistentVolumeClaim, Pod, SecretReference, Volume,
};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::host;
use super::local::{self, GroupOwnership};
use super::mounts;
use crate::csi;
use crate::objects::explain;
use crate::runtime::selinux;

/// A claim and the volume that it is bound to.
pub(super) struct Claimed {
    pub claim: PersistentVolumeClaim,
    pub volume: PersistentVolume,
    pub read_only: bool,
    pub name_in_pod: String,
}

/// The claim that a pod's volume is, and whether it may only be read. A generic ephemeral volume has a claim of its own.
pub(super) fn claim_of(pod: &Pod, volume: &Volume) -> Option<(String, bool)> {
    let (name, _) = apimachinery::volume::claim_of(pod.metadata.name.as_deref().unwrap_or_default(), volume)?;
    Some((name, volume.persistent_volume_claim.as_ref().is_some_and(|source| source.read_only == Some(true))))
}

/// Finds the volume of a claim that a pod may use now. As `getPVCExtractPV` and `getPVSpec`.
pub(super) async fn resolve(
    client: &kube::Client,
    pod: &Pod,
    volume: &Volume,
    name: &str,
    read_only: bool,
) -> Result<Claimed, String> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let failed = |why: String| format!("error processing PVC {namespace}/{name}: {why}");
    let claims = Api::<PersistentVolumeClaim>::namespaced(client.clone(), namespace);
    let claim = claims.get(name).await;
    let claim = claim.map_err(|e| failed(format!("failed to fetch PVC from API server: {}", explain(&e))))?;
    let volume_name = usable(pod, volume, &claim).map_err(failed)?;
    let volumes = Api::<PersistentVolume>::all(client.clone());
    let found = volumes.get(&volume_name).await;
    let found =
        found.map_err(|e| failed(format!("failed to fetch PV {volume_name} from API server: {}", explain(&e))))?;
    stands_for(&found, &claim).map_err(failed)?;
    Ok(Claimed { claim, volume: found, read_only, name_in_pod: volume.name.clone() })
}

/// Whether the volume says, too, that it is the claim's.
fn stands_for(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Result<(), String> {
    let name = volume.metadata.name.as_deref().unwrap_or_default();
    let Some(bound) = volume.spec.as_ref().and_then(|s| s.claim_ref.as_ref()) else {
        return Err(format!(
            "found PV object {name} but it has a nil pv.Spec.ClaimRef indicating it is not yet bound to the claim"
        ));
    };
    let (own, of) = (claim.metadata.uid.as_deref().unwrap_or_default(), bound.uid.as_deref().unwrap_or_default());
    if own != of {
        return Err(format!(
            "found PV object {name} but its pv.Spec.ClaimRef.UID {of} does not point to claim.UID {own}"
        ));
    }
    Ok(())
}

/// The name of the volume that the claim is bound to, if the pod may have it.
fn usable(pod: &Pod, volume: &Volume, claim: &PersistentVolumeClaim) -> Result<String, String> {
    let controller = apimachinery::pod::controller_of(&claim.metadata).map(|owner| owner.uid.as_str());
    if volume.ephemeral.is_some() && controller != pod.metadata.uid.as_deref() {
        return Err("PVC was not created for this pod (pod is not owner)".to_owned());
    }
    if claim.metadata.deletion_timestamp.is_some() {
        return Err("PVC is being deleted".to_owned());
    }
    if claim.status.as_ref().and_then(|s| s.phase.as_deref()) != Some("Bound") {
        return Err("PVC is not bound".to_owned());
    }
    let name = claim.spec.as_ref().and_then(|s| s.volume_name.clone()).filter(|name| !name.is_empty());
    name.ok_or_else(|| "PVC has empty pvc.Spec.VolumeName".to_owned())
}

// === impl Claimed ===

impl Claimed {
    pub(super) fn is_block(&self) -> bool {
        self.volume.spec.as_ref().and_then(|s| s.volume_mode.as_deref()) == Some("Block")
    }

    pub(super) fn name(&self) -> &str {
        self.volume.metadata.name.as_deref().unwrap_or_default()
    }

    /// What events about the claim are about.
    pub(super) fn reference(&self) -> ObjectReference {
        let mut object = reference(&self.claim);
        object.api_version = Some("v1".to_owned());
        object.kind = Some("PersistentVolumeClaim".to_owned());
        object
    }

    /// As a driver is asked for it; None: it is of another kind.
    pub(super) fn as_csi(&self, pod: &Pod) -> Option<csi::Wanted> {
        let spec = self.volume.spec.as_ref()?;
        let source = spec.csi.as_ref()?;
        let secret = |reference: &Option<SecretReference>| {
            let reference = reference.as_ref()?;
            Some((reference.namespace.clone().unwrap_or_default(), reference.name.clone().unwrap_or_default()))
        };
        Some(csi::Wanted {
            name: self.name().to_owned(),
            driver: source.driver.clone(),
            handle: source.volume_handle.clone(),
            fs_type: source.fs_type.clone().unwrap_or_default(),
            read_only: self.read_only || source.read_only == Some(true),
            block: self.is_block(),
            attributes: source.volume_attributes.clone().unwrap_or_default(),
            access_modes: spec.access_modes.clone().unwrap_or_default(),
            mount_options: spec.mount_options.clone().unwrap_or_default(),
            stage_secret: secret(&source.node_stage_secret_ref),
            publish_secret: secret(&source.node_publish_secret_ref),
            expand_secret: secret(&source.node_expand_secret_ref),
            expand_to: self.expand_to(),
            fs_group: super::payload::fs_group(pod),
            // As `VolumeSupportsSELinuxMount`: others may use it with another context.
            selinux_context: match spec.access_modes.as_deref() {
                Some([one]) if one == "ReadWriteOncePod" => selinux::volume_context(pod, &self.name_in_pod),
                _ => None,
            },
            ..Default::default()
        })
    }

    /// How large the volume is where the claim does not say so yet: its file system is to grow.
    fn expand_to(&self) -> Option<i64> {
        let bytes = |map: Option<&std::collections::BTreeMap<String, _>>| {
            map.and_then(|m| m.get("storage")).map(|q| Quantity::from(q).value())
        };
        let has = bytes(self.volume.spec.as_ref().and_then(|s| s.capacity.as_ref()))?;
        let told = bytes(self.claim.status.as_ref().and_then(|s| s.capacity.as_ref()))?;
        (has > told).then_some(has)
    }

    /// Tells the claim that it has grown.
    pub(super) async fn report_expanded(&self, client: &kube::Client) -> Result<(), String> {
        let capacity = self.volume.spec.as_ref().and_then(|s| s.capacity.as_ref()).and_then(|c| c.get("storage"));
        let conditions: Vec<_> = self.claim.status.iter().flat_map(|s| s.conditions.iter().flatten()).collect();
        let kept: Vec<_> = conditions
            .into_iter()
            .filter(|c| !matches!(c.type_.as_str(), "FileSystemResizePending" | "Resizing"))
            .collect();
        let patch = json!({"status": {"capacity": {"storage": capacity}, "conditions": kept,
            "allocatedResourceStatuses": {"storage": null}}});
        let namespace = self.claim.metadata.namespace.as_deref().unwrap_or_default();
        let claims = Api::<PersistentVolumeClaim>::namespaced(client.clone(), namespace);
        let name = self.claim.metadata.name.as_deref().unwrap_or_default();
        claims
            .patch_status(name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .map(drop)
            .map_err(|e| explain(&e))
    }
}

/// A directory, or a device with a file system, of this node at `target`.
pub(super) async fn mount_local(
    path: &Path,
    fs_type: Option<&str>,
    options: &[String],
    target: &Path,
    group: Option<GroupOwnership>,
) -> Result<(), String> {
    use std::os::unix::fs::FileTypeExt;
    let (source, at) = (path.to_owned(), target.to_owned());
    let is_device = super::blocking(move || {
        std::fs::create_dir_all(&at)?;
        let found = std::fs::metadata(&source)
            .map_err(|e| std::io::Error::new(e.kind(), format!("path {:?}: {e}", source.display())))?;
        Ok(if mounts::is_mount_point(&at)? { None } else { Some(found.file_type().is_block_device()) })
    })
    .await?;
    match is_device {
        // It is there already.
        None => return Ok(()),
        Some(true) => host::format_and_mount(path, fs_type.unwrap_or("ext4"), options, target).await?,
        Some(false) => {
            let (source, at) = (path.to_owned(), target.to_owned());
            super::blocking(move || mounts::bind(&source, &at)).await?;
        }
    }
    let at = target.to_owned();
    super::blocking(move || group.map_or(Ok(()), |group| local::give_to_group(&at, group))).await
}

/// A directory of a file server at `target`.
pub(super) async fn mount_nfs(server: &str, path: &str, options: &[String], target: &Path) -> Result<(), String> {
    let at = target.to_owned();
    let present = super::blocking(move || {
        std::fs::create_dir_all(&at)?;
        mounts::is_mount_point(&at)
    })
    .await?;
    let server = if server.contains(':') { format!("[{server}]") } else { server.to_owned() };
    if present { Ok(()) } else { host::mount(&format!("{server}:{path}"), "nfs", options, target).await }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn claim(value: serde_json::Value) -> PersistentVolumeClaim {
        serde_json::from_value(value).expect("a claim")
    }

    #[test]
    fn only_bound_claims_of_the_pod_are_usable() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u"}})).expect("a pod");
        let plain: Volume = serde_json::from_value(json!({"name": "v", "persistentVolumeClaim": {"claimName": "c"}}))
            .expect("a volume");
        let own: Volume = serde_json::from_value(json!({"name": "v", "ephemeral": {}})).expect("a volume");
        assert_eq!(claim_of(&pod, &plain), Some(("c".into(), false)));
        assert_eq!(claim_of(&pod, &own), Some(("p-v".into(), false)));
        let bound = json!({"spec": {"volumeName": "pv"}, "status": {"phase": "Bound"}});
        let mut owned = bound.clone();
        owned["metadata"] = json!({"ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u", "controller": true}]});
        let mut going = bound.clone();
        going["metadata"] = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
        for (volume, value, want) in [
            (&plain, bound.clone(), Ok("pv")),
            (&plain, json!({"spec": {"volumeName": "pv"}, "status": {"phase": "Pending"}}), Err("PVC is not bound")),
            (&plain, json!({"spec": {}, "status": {"phase": "Bound"}}), Err("PVC has empty pvc.Spec.VolumeName")),
            (&plain, going, Err("PVC is being deleted")),
            (&own, bound, Err("PVC was not created for this pod (pod is not owner)")),
            (&own, owned, Ok("pv")),
        ] {
            let got = usable(&pod, volume, &claim(value));
            assert_eq!(got.as_deref().map_err(String::as_str), want);
        }
    }

    #[test]
    fn a_volume_says_whose_it_is() {
        let claim = claim(json!({"metadata": {"name": "c", "uid": "1"}}));
        for (spec, want) in [
            (json!({"claimRef": {"name": "c", "uid": "1"}}), Ok(())),
            (
                json!({"claimRef": {"name": "c", "uid": "2"}}),
                Err("found PV object pv but its pv.Spec.ClaimRef.UID 2 does not point to claim.UID 1"),
            ),
            (
                json!({}),
                Err("found PV object pv but it has a nil pv.Spec.ClaimRef indicating it is not yet bound to the claim"),
            ),
        ] {
            let volume = serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": spec})).expect("a volume");
            assert_eq!(stands_for(&volume, &claim), want.map_err(str::to_owned));
        }
    }

    #[test]
    fn a_volume_that_outgrew_its_claim_is_to_be_expanded() {
        let volume = |size: &str| {
            serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": {"capacity": {"storage": size},
                "volumeMode": "Block", "csi": {"driver": "d", "volumeHandle": "h"}}}))
            .expect("a volume")
        };
        let claim = claim(json!({"status": {"capacity": {"storage": "1Gi"}}}));
        let pod = Pod::default();
        let wanted = |size| {
            Claimed { claim: claim.clone(), volume: volume(size), read_only: true, name_in_pod: "v".into() }
                .as_csi(&pod)
                .expect("a CSI volume")
        };
        assert_eq!(wanted("1Gi").expand_to, None);
        let larger = wanted("2Gi");
        assert_eq!((larger.expand_to, larger.block, larger.read_only), (Some(2 << 30), true, true));
    }
}
