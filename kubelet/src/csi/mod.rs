//! CSI drivers on this node: their registration, and volumes of theirs for pods: staged once a node, published for each pod,
//! expanded, and taken back. Paths and the `vol_data.json` beside each volume are Kubernetes', so that what one kubelet
//! mounted another can take down; nothing about mounts is kept in memory but what saves repeated calls.

mod driver;
mod node_info;
mod place;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Pod, Secret};
use k8s_openapi::api::storage::v1::{CSIDriver, CSIDriverSpec, VolumeAttachment};
use kube::Api;
use parking_lot::Mutex;
use proto::pluginregistration::PluginInfo;
use tonic::transport::Channel;
use tracing::{debug, info, warn};

use crate::objects::explain;
use crate::plugins::Registry;
use crate::usage::Measured;
use driver::{Capability, Driver};
use place::Place;
pub(crate) use place::RECORD;
pub use place::attachment_name;
pub(crate) use place::inline_handle;

/// A volume of a driver that a pod asks for.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// The PersistentVolume's name; an inline volume's own.
    pub name: String,
    pub driver: String,
    pub handle: String,
    pub fs_type: String,
    pub read_only: bool,
    pub block: bool,
    /// Made for this pod alone, from its spec.
    pub inline: bool,
    pub attributes: BTreeMap<String, String>,
    pub access_modes: Vec<String>,
    pub mount_options: Vec<String>,
    /// Namespace and name.
    pub stage_secret: Option<(String, String)>,
    pub publish_secret: Option<(String, String)>,
    pub expand_secret: Option<(String, String)>,
    /// Bytes that the file system is to grow to.
    pub expand_to: Option<i64>,
    /// The pod's fsGroup.
    pub fs_group: Option<u32>,
    /// With which context it is mounted, if its driver can (`seLinuxMount`).
    pub selinux_context: Option<String>,
    /// Of the pod's account, as the driver asked for them: JSON by audience.
    pub tokens: Option<String>,
}

/// A volume that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    pub path: PathBuf,
    /// Whether the kubelet is to hand it to the pod's group.
    pub give_to_group: bool,
    pub grown: Grown,
    /// Mounted with the pod's SELinux context: nobody need label its files.
    pub is_labelled: bool,
}

/// Whether a volume has grown just now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Grown {
    #[default]
    No,
    /// Its driver has nothing to do on the node for that.
    Elsewhere,
    /// Here, and what is on it.
    Here,
}

/// What could not be done for a volume, as events name it (`MountVolume.SetUp`), and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    pub step: &'static str,
    /// The volume's name in the cluster, where it has one.
    pub volume: Option<String>,
    pub reason: String,
}

impl Failed {
    /// The step of finding out which volume is meant: nothing was tried yet.
    pub const FINDING: &str = "";
}

impl From<String> for Failed {
    fn from(reason: String) -> Self {
        Self { step: "MountVolume.SetUp", volume: None, reason }
    }
}

impl From<&str> for Failed {
    fn from(reason: &str) -> Self {
        reason.to_owned().into()
    }
}

/// The drivers of this node.
pub struct Csi {
    client: Option<kube::Client>,
    node_name: String,
    root_dir: PathBuf,
    drivers: Mutex<BTreeMap<String, Arc<Driver>>>,
    /// One operation at a time on a volume.
    busy: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Paths published by this process.
    published: Mutex<BTreeSet<PathBuf>>,
    /// Written one at a time.
    node_info: tokio::sync::Mutex<()>,
}

// === impl Csi ===

impl Csi {
    pub fn new(client: Option<kube::Client>, node_name: &str, root_dir: &Path) -> Arc<Csi> {
        Arc::new(Csi {
            client,
            node_name: node_name.to_owned(),
            root_dir: root_dir.to_owned(),
            drivers: Mutex::default(),
            busy: Mutex::default(),
            published: Mutex::default(),
            node_info: tokio::sync::Mutex::default(),
        })
    }

    fn driver(&self, name: &str) -> Result<Arc<Driver>, String> {
        let found = self.drivers.lock().get(name).cloned();
        found.ok_or_else(|| format!("driver name {name} not found in the list of registered CSI drivers"))
    }

    /// What the cluster says of a driver. One that is not described is taken at its defaults.
    pub async fn described(&self, driver: &str) -> Result<CSIDriverSpec, String> {
        let Some(client) = self.client.clone() else { return Ok(CSIDriverSpec::default()) };
        let found = Api::<CSIDriver>::all(client).get_opt(driver).await.map_err(|e| explain(&e))?;
        Ok(found.map(|d| d.spec).unwrap_or_default())
    }

    async fn lock(&self, driver: &str, handle: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut busy = self.busy.lock();
            // Those nobody waits for are forgotten.
            busy.retain(|_, lock| Arc::strong_count(lock) > 1);
            busy.entry(format!("{driver}^{handle}")).or_default().clone()
        };
        lock.lock_owned().await
    }

    async fn secret(&self, reference: Option<&(String, String)>) -> Result<BTreeMap<String, String>, String> {
        let (Some((namespace, name)), Some(client)) = (reference, self.client.clone()) else {
            return Ok(BTreeMap::new());
        };
        let secret: Secret = Api::namespaced(client, namespace)
            .get(name)
            .await
            .map_err(|e| format!("secret {namespace}/{name}: {}", explain(&e)))?;
        let text =
            |(key, value): (String, k8s_openapi::ByteString)| (key, String::from_utf8_lossy(&value.0).into_owned());
        Ok(secret.data.unwrap_or_default().into_iter().map(text).collect())
    }

    /// What the attacher says of the volume on this node; an error until it is attached.
    async fn attached(&self, wanted: &Wanted) -> Result<BTreeMap<String, String>, String> {
        let name = attachment_name(&wanted.handle, &wanted.driver, &self.node_name);
        let Some(client) = self.client.clone() else { return Ok(BTreeMap::new()) };
        let found = Api::<VolumeAttachment>::all(client).get_opt(&name).await.map_err(|e| explain(&e))?;
        let status =
            found.and_then(|a| a.status).ok_or_else(|| format!("volume attachment is not there yet: {name}"))?;
        if status.attached {
            return Ok(status.attachment_metadata.unwrap_or_default());
        }
        let why = status.attach_error.and_then(|e| e.message).unwrap_or_default();
        Err(format!("volume {} is not attached to this node yet {why}", wanted.handle).trim_end().to_owned())
    }

    /// Makes the volume present for a pod. Idempotent.
    pub async fn mount(&self, pod: &Pod, wanted: &Wanted, pod_dir: &Path) -> Result<Mounted, Failed> {
        let (mut step, _) = steps(wanted);
        let mounted = self.mount_in_steps(pod, wanted, pod_dir, &mut step).await;
        mounted.map_err(|reason| Failed { step, volume: None, reason })
    }

    /// As [`Csi::mount`]; `step` is what is being done.
    async fn mount_in_steps(
        &self,
        pod: &Pod,
        wanted: &Wanted,
        pod_dir: &Path,
        step: &mut &'static str,
    ) -> Result<Mounted, String> {
        let _busy = self.lock(&wanted.driver, &wanted.handle).await;
        let no_driver = match *step {
            "MountVolume.MountDevice" => "attacher.MountDevice failed to create newCsiDriverClient",
            "MapVolume.SetUpDevice" => "blockMapper.SetUpDevice failed to get CSI client",
            _ => "mounter.SetUpAt failed to get CSI client",
        };
        let driver = self.driver(&wanted.driver).map_err(|why| format!("kubernetes.io/csi: {no_driver}: {why}"))?;
        let described = self.described(&wanted.driver).await?;
        let mode = if wanted.inline { "Ephemeral" } else { "Persistent" };
        let modes = described.volume_lifecycle_modes.clone().unwrap_or_else(|| vec!["Persistent".to_owned()]);
        if !modes.iter().any(|m| m == mode) {
            return Err(format!(
                "volume mode {mode:?} not supported by driver {} (only supports {modes:?})",
                wanted.driver
            ));
        }
        let context = wanted.selinux_context.as_ref().filter(|_| described.se_linux_mount == Some(true));
        let (is_labelled, mut labelled) = (context.is_some(), wanted.clone());
        labelled.mount_options.extend(context.map(|context| format!("context={context:?}")));
        let wanted = &labelled;
        let place = Place::of(wanted, &self.root_dir, pod_dir, pod.metadata.uid.as_deref().unwrap_or_default());
        let stages = !wanted.inline && driver.can(Capability::StageUnstageVolume).await?;
        // A driver that sees to groups is told of the pod's whatever its policy is, which is about the kubelet's part.
        let group = wanted.fs_group.filter(|_| !wanted.block);
        let by_driver = group.is_some() && driver.can(Capability::VolumeMountGroup).await?;
        let give_to_group = group.is_some() && !by_driver && takes_group(wanted, &described);
        let result = Mounted { path: place.published.clone(), give_to_group, grown: Grown::No, is_labelled };
        let present = self.published.lock().contains(&place.published);
        let expanded = |grown| Mounted { grown, give_to_group: false, ..result.clone() };
        if present && described.requires_republish != Some(true) {
            let grown = self.expand(&driver, wanted, &place, stages).await?;
            return Ok(expanded(grown));
        }
        let context = match described.attach_required {
            Some(false) => BTreeMap::new(),
            _ if wanted.inline => BTreeMap::new(),
            _ => self.attached(wanted).await?,
        };
        place.record(wanted, &self.node_name).map_err(|e| format!("{}: {e}", place.record.display()))?;
        let capability = driver.capability(wanted, group.filter(|_| by_driver)).await?;
        if stages && !present {
            let secrets = self.secret(wanted.stage_secret.as_ref()).await?;
            driver.stage(wanted, &place, context.clone(), capability.clone(), secrets).await?;
        }
        *step = steps(wanted).1;
        let mut attributes = wanted.attributes.clone();
        if described.pod_info_on_mount == Some(true) {
            attributes.extend(pod_info(pod, wanted.inline));
        }
        if let Some(tokens) = wanted.tokens.clone() {
            attributes.insert("csi.storage.k8s.io/serviceAccount.tokens".to_owned(), tokens);
        }
        let secrets = self.secret(wanted.publish_secret.as_ref()).await?;
        driver.publish(wanted, &place, stages, context, capability, secrets, attributes).await?;
        if wanted.block {
            place.link_device().map_err(|e| e.to_string())?;
        }
        self.published.lock().insert(place.published.clone());
        if present {
            return Ok(expanded(Grown::No));
        }
        info!(pod = %crate::runtime::pods::full_name(pod), volume = %wanted.name, driver = %wanted.driver, "CSI volume published");
        let grown = self.expand(&driver, wanted, &place, stages).await?;
        Ok(Mounted { grown, ..result })
    }

    /// A published volume is not as the pod needs it yet: it is published, and handed to the group, once more.
    pub fn not_done(&self, mounted: &Mounted) {
        self.published.lock().remove(&mounted.path);
    }

    async fn expand(&self, driver: &Driver, wanted: &Wanted, place: &Place, stages: bool) -> Result<Grown, String> {
        let Some(bytes) = wanted.expand_to else { return Ok(Grown::No) };
        if !driver.can(Capability::ExpandVolume).await? {
            // The controller has done all there is to do.
            return Ok(Grown::Elsewhere);
        }
        let secrets = self.secret(wanted.expand_secret.as_ref()).await?;
        let capability = driver.capability(wanted, None).await?;
        driver.expand(wanted, place, stages, bytes, capability, secrets).await?;
        info!(volume = %wanted.name, bytes, "CSI volume expanded");
        Ok(Grown::Here)
    }

    /// Takes back all volumes of a pod, by what is on disk.
    pub async fn unmount_pod(&self, uid: &str, pod_dir: &Path) -> Result<(), String> {
        let mut failed = None;
        for (place, data) in place::of_pod(&self.root_dir, pod_dir, uid) {
            if let Err(error) = self.unmount(&place, &data, uid).await {
                debug!(uid, volume = %data.spec_vol_id, error, "CSI volume not taken back yet");
                failed.get_or_insert(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn unmount(&self, place: &Place, data: &place::VolumeData, uid: &str) -> Result<(), String> {
        let _busy = self.lock(&data.driver_name, &data.volume_handle).await;
        let driver = self.driver(&data.driver_name)?;
        driver.unpublish(&data.volume_handle, &place.published).await?;
        self.published.lock().remove(&place.published);
        place.forget(uid).map_err(|e| format!("{}: {e}", place.published.display()))?;
        let staged = data.volume_lifecycle_mode != "Ephemeral" && driver.can(Capability::StageUnstageVolume).await?;
        if staged && place.staging.exists() && !place.used_by_others(&self.root_dir, data, uid) {
            driver.unstage(&data.volume_handle, &place.staging).await?;
            place.forget_staging().map_err(|e| format!("{}: {e}", place.staging.display()))?;
        }
        Ok(())
    }

    /// How full a pod's volumes are, by where they are, as those of their drivers say that can; and, where `conditions` are
    /// wanted, whether something is wrong with them.
    pub async fn measure(&self, uid: &str, pod_dir: &Path, conditions: bool) -> Vec<(PathBuf, Measured)> {
        let mut measured = Vec::new();
        for (place, data) in place::of_pod(&self.root_dir, pod_dir, uid) {
            let Ok(driver) = self.driver(&data.driver_name) else { continue };
            if !driver.can(Capability::GetVolumeStats).await.unwrap_or(false) {
                continue;
            }
            let condition = conditions && driver.can(Capability::VolumeCondition).await.unwrap_or(false);
            match driver.stats(&data.volume_handle, &place.published, condition).await {
                Ok(found) => measured.push((place.published, found)),
                Err(error) => debug!(uid, volume = %data.spec_vol_id, error, "CSI volume not measured"),
            }
        }
        measured
    }
}

impl Registry for Csi {
    fn plugin_type(&self) -> &'static str {
        "CSIPlugin"
    }

    fn register<'a>(&'a self, info: &'a PluginInfo, channel: Channel) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            if !info.supported_versions.iter().any(|v| v.trim_start_matches('v').starts_with("1.")) {
                return Err(format!(
                    "none of the CSI versions reported by this driver are supported: {:?}",
                    info.supported_versions
                ));
            }
            let driver = Arc::new(Driver::new(&info.name, channel));
            let node = driver.info().await?;
            self.drivers.lock().insert(info.name.clone(), driver);
            if let Some(client) = self.client.clone() {
                let _one = self.node_info.lock().await;
                node_info::add(&client, &self.node_name, &info.name, node).await.map_err(|e| explain(&e))?;
            }
            Ok(())
        })
    }

    fn deregister<'a>(&'a self, name: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            self.drivers.lock().remove(name);
            if let Some(client) = self.client.clone() {
                let _one = self.node_info.lock().await;
                if let Err(error) = node_info::remove(&client, &self.node_name, name).await {
                    warn!(driver = name, %error, "driver not taken out of CSINode");
                }
            }
        })
    }
}

/// What is done for all pods of the node, and then for one.
fn steps(wanted: &Wanted) -> (&'static str, &'static str) {
    match (wanted.block, wanted.inline) {
        (true, _) => ("MapVolume.SetUpDevice", "MapVolume.MapPodDevice"),
        (false, true) => ("MountVolume.SetUp", "MountVolume.SetUp"),
        (false, false) => ("MountVolume.MountDevice", "MountVolume.SetUp"),
    }
}

/// Whether the volume is one that a group can be given. As `supportsFSGroup`.
fn takes_group(wanted: &Wanted, described: &CSIDriverSpec) -> bool {
    if wanted.read_only {
        return false;
    }
    match described.fs_group_policy.as_deref().unwrap_or("ReadWriteOnceWithFSType") {
        "None" => false,
        "File" => true,
        _ => {
            let once = |mode: &String| mode == "ReadWriteOnce" || mode == "ReadWriteOncePod";
            !wanted.fs_type.is_empty() && (wanted.inline || wanted.access_modes.iter().any(once))
        }
    }
}

fn pod_info(pod: &Pod, inline: bool) -> [(String, String); 5] {
    let account = pod.spec.as_ref().and_then(|s| s.service_account_name.clone()).unwrap_or_default();
    [
        ("pod.name", pod.metadata.name.clone().unwrap_or_default()),
        ("pod.namespace", pod.metadata.namespace.clone().unwrap_or_default()),
        ("pod.uid", pod.metadata.uid.clone().unwrap_or_default()),
        ("serviceAccount.name", account),
        ("ephemeral", inline.to_string()),
    ]
    .map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value))
}
