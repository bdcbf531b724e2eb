//! The provisioner that comes with the cluster: a claim's volume is a directory of the node that the scheduler chose for
//! its first consumer. A helper's pod makes it there, and removes it when the claim is gone.
use super::{
    Binder, HELPER_PERIOD, Key,
    helper::{self, Place, Progress, Work},
    plan::{FINALIZER, Told},
};
use crate::{
    controllers::volumes::{BOUND_BY_CONTROLLER, HOST_PATH, PROVISIONED_BY, SELECTED_NODE, annotation, requested},
    runtime::{Next, SyncError, is_code},
};
use apimachinery::meta::NamespacedName;
use component_base::events::{Type, reference};
use k8s_openapi::api::{
    core::v1::{HostPathVolumeSource, Node, PersistentVolume, PersistentVolumeClaim, Volume},
    storage::v1::StorageClass,
};
use kube::{Api, ResourceExt as _, api::PostParams};
use serde_json::json;
use std::{path::Path, sync::Arc};

/// Where a class that says nothing else has its directories.
const DEFAULT_ROOT: &str = "/var/lib/pilothouse/volumes";
/// The class' parameter that says otherwise.
const ROOT_PARAMETER: &str = "path";
const HOSTNAME: &str = "kubernetes.io/hostname";
const NAME_PREFIX: &str = "pvc-";

fn hostname(node: &Node) -> Option<&str> {
    node.metadata.labels.as_ref()?.get(HOSTNAME).map(String::as_str)
}

fn mount(path: &str) -> Volume {
    let source = HostPathVolumeSource { path: path.to_owned(), type_: Some("DirectoryOrCreate".to_owned()) };
    Volume { host_path: Some(source), ..Volume::default() }
}

/// Where a volume's data are; None if their node is gone.
pub fn place(volume: &PersistentVolume, work: Work, nodes: &[Arc<Node>]) -> Option<Place> {
    let spec = volume.spec.as_ref()?;
    if work == Work::Scrub {
        let mount = Volume { host_path: spec.host_path.clone(), nfs: spec.nfs.clone(), ..Volume::default() };
        return Some(Place { node: None, mount, path: String::new() });
    }
    let terms = spec.node_affinity.iter().flat_map(|a| a.required.iter()).flat_map(|r| &r.node_selector_terms);
    let mut hosts = terms
        .flat_map(|t| t.match_expressions.iter().flatten())
        .filter(|e| e.key == HOSTNAME)
        .flat_map(|e| e.values.iter().flatten());
    let host = hosts.next()?;
    let node = nodes.iter().find(|n| hostname(n) == Some(host))?.name_any();
    let path = Path::new(&spec.local.as_ref()?.path);
    let (parent, name) = (path.parent()?.to_str()?, path.file_name()?.to_str()?);
    Some(Place { node: Some(node), mount: mount(parent), path: name.to_owned() })
}

/// Why a claim cannot have a directory of a node.
fn unsuitable(claim: &PersistentVolumeClaim) -> Option<&'static str> {
    let spec = claim.spec.as_ref()?;
    let shared = |m: &String| m == "ReadWriteMany" || m == "ReadOnlyMany";
    match () {
        () if spec.volume_mode.as_deref() == Some("Block") => Some("it has no block devices"),
        () if spec.selector.is_some() => Some("claim.spec.selector is not supported"),
        () if spec.access_modes.iter().flatten().any(shared) => {
            Some("only the access modes ReadWriteOnce and ReadWriteOncePod are supported")
        }
        () => None,
    }
}

/// The volume of a claim on a node.
fn volume(claim: &PersistentVolumeClaim, class: &StorageClass, name: &str, host: &str) -> PersistentVolume {
    let spec = claim.spec.clone().unwrap_or_default();
    let root = class.parameters.as_ref().and_then(|p| p.get(ROOT_PARAMETER)).map_or(DEFAULT_ROOT, String::as_str);
    // The fields are right by construction; what is not is refused by the server.
    serde_json::from_value(json!({
        "metadata": {"name": name, "finalizers": [FINALIZER],
            "annotations": {PROVISIONED_BY: HOST_PATH, BOUND_BY_CONTROLLER: "yes"}},
        "spec": {
            "capacity": {"storage": requested(claim).to_api()},
            "accessModes": spec.access_modes,
            "claimRef": reference(claim),
            "persistentVolumeReclaimPolicy": class.reclaim_policy.as_deref().unwrap_or("Delete"),
            "storageClassName": class.metadata.name,
            "volumeAttributesClassName": spec.volume_attributes_class_name,
            "mountOptions": class.mount_options,
            "local": {"path": format!("{}/{name}", root.trim_end_matches('/'))},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": HOSTNAME, "operator": "In", "values": [host]}]}]}},
        },
    }))
    .unwrap_or_default()
}

impl Binder {
    pub(super) async fn provision_on_host(
        &self,
        claim: &PersistentVolumeClaim,
        class: &StorageClass,
    ) -> Result<Next, SyncError> {
        let class_name = class.name_any();
        let failed = |why: &str| {
            let message = format!("Failed to provision volume with StorageClass {class_name:?}: {why}");
            self.tell_claim(claim, &Told { kind: Type::Warning, reason: "ProvisioningFailed", message });
        };
        if let Some(why) = unsuitable(claim) {
            failed(why);
            return Ok(Next::After(self.period));
        }
        let Some(node) = annotation(&claim.metadata, SELECTED_NODE) else {
            failed("its directories are on nodes: its volumeBindingMode must be WaitForFirstConsumer");
            return Ok(Next::After(self.period));
        };
        let Some(host) = self.nodes.get("", node).and_then(|n| hostname(&n).map(str::to_owned)) else {
            // The scheduler is to choose anew. As `rescheduleProvisioning`.
            let mut unplaced = claim.clone();
            unplaced.metadata.annotations.get_or_insert_default().remove(SELECTED_NODE);
            self.save_claim(&unplaced).await?;
            return Ok(Next::Settled);
        };
        let name = format!("{NAME_PREFIX}{}", claim.metadata.uid.as_deref().unwrap_or_default());
        let volume = volume(claim, class, &name, &host);
        let Some(place) = place(&volume, Work::Make, &self.nodes.list()) else {
            return Err(SyncError::Invalid(format!("class {class_name}: its parameter {ROOT_PARAMETER} is no path")));
        };
        match self.helper.work(Work::Make, &name, &place).await? {
            Progress::Working => return Ok(Next::After(HELPER_PERIOD)),
            Progress::Failed(why) => {
                failed(&why);
                return Err(SyncError::Invalid(why));
            }
            Progress::Done => {}
        }
        let api: Api<PersistentVolume> = Api::all(self.client.clone());
        match api.create(&PostParams::default(), &volume).await {
            Ok(volume) => {
                self.volumes.put(volume);
                let message = format!("Successfully provisioned volume {name} using {HOST_PATH}");
                self.tell_claim(claim, &Told { kind: Type::Normal, reason: "ProvisioningSucceeded", message });
            }
            Err(error) if is_code(&error, 409) => {}
            Err(error) => return Err(error.into()),
        }
        self.helper.dismiss(Work::Make, &name).await?;
        self.queue.add(Key::Claim(NamespacedName::of(claim)));
        Ok(Next::Settled)
    }

    /// A helper told of a volume that is not there (yet): its claim goes on, or there is nothing left to do for it.
    pub(super) async fn absent_volume(&self, name: &str) -> Result<Next, SyncError> {
        let uid = name.strip_prefix(NAME_PREFIX);
        let claim = uid.and_then(|uid| self.claims.list().into_iter().find(|c| c.metadata.uid.as_deref() == Some(uid)));
        match claim {
            Some(claim) => self.queue.add(Key::Claim(NamespacedName::of(claim.as_ref()))),
            None => {
                for work in Work::ALL {
                    if self.pods.get(helper::NAMESPACE, &work.pod(name)).is_some() {
                        self.helper.dismiss(work, name).await?;
                    }
                }
            }
        }
        Ok(Next::Settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_leads_back_to_its_directory() {
        let claim: PersistentVolumeClaim =
            serde_json::from_value(json!({"metadata": {"name": "c", "namespace": "ns", "uid": "u"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}))
            .unwrap();
        let class: StorageClass =
            serde_json::from_value(json!({"metadata": {"name": "host-path"}, "provisioner": HOST_PATH})).unwrap();
        let made = volume(&claim, &class, "pvc-u", "host-1");
        let spec = made.spec.as_ref().unwrap();
        assert_eq!(spec.local.as_ref().unwrap().path, "/var/lib/pilothouse/volumes/pvc-u");
        assert_eq!(
            (spec.capacity.as_ref().unwrap()["storage"].0.as_str(), spec.persistent_volume_reclaim_policy.as_deref()),
            ("1Gi", Some("Delete"))
        );
        let node: Node =
            serde_json::from_value(json!({"metadata": {"name": "n1", "labels": {HOSTNAME: "host-1"}}})).unwrap();
        let found = place(&made, Work::Remove, &[Arc::new(node)]).unwrap();
        assert_eq!((found.node.as_deref(), found.path.as_str()), (Some("n1"), "pvc-u"));
        assert_eq!(found.mount.host_path.unwrap().path, "/var/lib/pilothouse/volumes");
        assert_eq!(place(&made, Work::Remove, &[]), None, "its node is gone");
    }

    #[test]
    fn a_directory_is_not_for_everybody() {
        for (spec, suits) in [
            (json!({"accessModes": ["ReadWriteOnce"]}), true),
            (json!({"accessModes": ["ReadWriteMany"]}), false),
            (json!({"volumeMode": "Block"}), false),
            (json!({"selector": {}}), false),
        ] {
            let claim = serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap();
            assert_eq!(unsuitable(&claim).is_none(), suits, "{spec}");
        }
    }
}
