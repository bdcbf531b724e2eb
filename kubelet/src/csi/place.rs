//! Where a volume of a driver is on this node, and the file beside it that says whose it is.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Wanted;

/// The file beside a volume that says whose it is.
pub(crate) const RECORD: &str = "vol_data.json";
const PLUGIN: &str = "kubernetes.io~csi";

/// `vol_data.json`, as Kubernetes writes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct VolumeData {
    #[serde(rename = "attachmentID")]
    pub attachment_id: String,
    pub driver_name: String,
    pub node_name: String,
    #[serde(rename = "specVolID")]
    pub spec_vol_id: String,
    pub volume_handle: String,
    pub volume_lifecycle_mode: String,
}

/// The paths of one volume for one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub staging: PathBuf,
    /// What the pod gets: a directory, or for a block volume a file that is its device.
    pub published: PathBuf,
    pub record: PathBuf,
    /// A block volume's name among the pod's own files.
    pub device_link: Option<PathBuf>,
}

/// The name of the object that tells whether a volume is attached. As `getAttachmentName`.
pub fn attachment_name(handle: &str, driver: &str, node: &str) -> String {
    format!("csi-{}", hex(&format!("{handle}{driver}{node}")))
}

/// The handle of a volume that is made for one pod alone. As `makeVolumeHandle`.
pub(crate) fn inline_handle(pod_uid: &str, volume: &str) -> String {
    format!("csi-{}", hex(&format!("{pod_uid}{volume}")))
}

fn hex(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn plugin_dir(root: &Path) -> PathBuf {
    root.join("plugins/kubernetes.io/csi")
}

// === impl Place ===

impl Place {
    pub(super) fn of(wanted: &Wanted, root: &Path, pod_dir: &Path, uid: &str) -> Place {
        let data = VolumeData {
            driver_name: wanted.driver.clone(),
            spec_vol_id: wanted.name.clone(),
            volume_handle: wanted.handle.clone(),
            ..Default::default()
        };
        Self::of_data(&data, wanted.block, root, pod_dir, uid)
    }

    fn of_data(data: &VolumeData, block: bool, root: &Path, pod_dir: &Path, uid: &str) -> Place {
        let name = &data.spec_vol_id;
        if block {
            let devices = plugin_dir(root).join("volumeDevices");
            return Place {
                staging: devices.join("staging").join(name),
                published: devices.join("publish").join(name).join(uid),
                record: devices.join(name).join("data").join(RECORD),
                device_link: Some(pod_dir.join("volumeDevices").join(PLUGIN).join(name)),
            };
        }
        let own = pod_dir.join("volumes").join(PLUGIN).join(name);
        Place {
            staging: plugin_dir(root).join(&data.driver_name).join(hex(&data.volume_handle)).join("globalmount"),
            published: own.join("mount"),
            record: own.join(RECORD),
            device_link: None,
        }
    }

    /// Writes who the volume belongs to, before anything is done for it; makes the directories above its paths.
    pub(super) fn record(&self, wanted: &Wanted, node: &str) -> io::Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o750);
        for path in [&self.published, &self.record].into_iter().chain(&self.device_link) {
            if let Some(parent) = path.parent() {
                builder.create(parent)?;
            }
        }
        let data = VolumeData {
            attachment_id: attachment_name(&wanted.handle, &wanted.driver, node),
            driver_name: wanted.driver.clone(),
            node_name: node.to_owned(),
            spec_vol_id: wanted.name.clone(),
            volume_handle: wanted.handle.clone(),
            volume_lifecycle_mode: if wanted.inline { "Ephemeral" } else { "Persistent" }.to_owned(),
        };
        let text = serde_json::to_vec(&data).map_err(io::Error::other)?;
        fs::write(&self.record, &text)?;
        if !wanted.inline && !wanted.block {
            // Beside the staged volume as well, where Kubernetes looks when the pods are gone.
            builder.create(&self.staging)?;
            fs::write(self.staging.with_file_name(RECORD), text)?;
        }
        Ok(())
    }

    pub(super) fn link_device(&self) -> io::Result<()> {
        let Some(link) = &self.device_link else { return Ok(()) };
        gone_is_fine(fs::remove_file(link))?;
        symlink(&self.published, link)
    }

    /// Removes what is left of an unpublished volume: its record goes last, so that a crash in between is taken up again.
    pub(super) fn forget(&self, uid: &str) -> io::Result<()> {
        match &self.device_link {
            Some(link) => {
                gone_is_fine(fs::remove_file(&self.published))?;
                gone_is_fine(fs::remove_file(link))?;
                debug_assert!(self.published.ends_with(uid));
                Ok(())
            }
            None => {
                // A driver may leave the directory, or remove it.
                gone_is_fine(fs::remove_dir(&self.published))?;
                gone_is_fine(fs::remove_file(&self.record))?;
                self.record.parent().map_or(Ok(()), |own| gone_is_fine(fs::remove_dir(own)))
            }
        }
    }

    pub(super) fn forget_staging(&self) -> io::Result<()> {
        gone_is_fine(fs::remove_dir(&self.staging))?;
        if self.device_link.is_some() {
            gone_is_fine(fs::remove_file(&self.record))?;
            for dir in self.record.ancestors().skip(1).take(2) {
                gone_is_fine(fs::remove_dir(dir))?;
            }
            return self.published.parent().map_or(Ok(()), |dir| gone_is_fine(fs::remove_dir(dir)));
        }
        gone_is_fine(fs::remove_file(self.staging.with_file_name(RECORD)))?;
        self.staging.parent().map_or(Ok(()), |dir| gone_is_fine(fs::remove_dir(dir)))
    }

    /// Whether another pod of this node has the volume, too.
    pub(super) fn used_by_others(&self, root: &Path, data: &VolumeData, uid: &str) -> bool {
        if self.device_link.is_some() {
            return self.published.parent().is_some_and(|dir| names(dir).iter().any(|name| name != uid));
        }
        names(&root.join("pods")).iter().filter(|other| *other != uid).any(|other| {
            let volumes = root.join("pods").join(other).join("volumes").join(PLUGIN);
            names(&volumes)
                .iter()
                .filter_map(|name| read(&volumes.join(name).join(RECORD)))
                .any(|found| found.driver_name == data.driver_name && found.volume_handle == data.volume_handle)
        })
    }
}

/// The volumes that a pod has, or had when a kubelet ended.
pub(super) fn of_pod(root: &Path, pod_dir: &Path, uid: &str) -> Vec<(Place, VolumeData)> {
    let mounted = pod_dir.join("volumes").join(PLUGIN);
    let files = names(&mounted).into_iter().map(|name| (mounted.join(name).join(RECORD), false));
    let devices = plugin_dir(root).join("volumeDevices");
    let linked = names(&pod_dir.join("volumeDevices").join(PLUGIN)).into_iter();
    let blocks = linked.map(|name| (devices.join(name).join("data").join(RECORD), true));
    files
        .chain(blocks)
        .filter_map(|(record, block)| {
            let data = read(&record)?;
            Some((Place::of_data(&data, block, root, pod_dir, uid), data))
        })
        .collect()
}

fn read(record: &Path) -> Option<VolumeData> {
    serde_json::from_slice(&fs::read(record).ok()?).ok()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
