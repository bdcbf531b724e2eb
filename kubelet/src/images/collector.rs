//! Carries out image garbage collection: looks every few minutes how full the images' file system is, and removes what
//! [`super::gc`] chooses.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_client::services::v1::ListImagesRequest;
use containerd_client::services::v1::images_client::ImagesClient;
use proto::cri as pb;
use tokio_util::sync::CancellationToken;

use super::gc::{self, DiskUse, GcPolicy, ImageRecord, ImageUsage};
use super::pulled::PulledRecords;
use crate::config::KubeletConfiguration;
use crate::metrics::managers;
use crate::runtime::cri::{Cri, CriError};

/// As the kubelet's `ImageGCPeriod`.
const PERIOD: Duration = Duration::from_secs(5 * 60);

/// Collect until shutdown. What the node's events are to say is told with its reason.
pub async fn run(
    cri: Cri,
    config: Arc<KubeletConfiguration>,
    records: Arc<PulledRecords>,
    tell: impl Fn(&str, String) + Send,
    shutdown: CancellationToken,
) {
    let percent = |percent: i32| u64::try_from(percent).unwrap_or(100);
    let policy = GcPolicy {
        high_threshold_percent: percent(config.image_gc_high_threshold_percent),
        low_threshold_percent: percent(config.image_gc_low_threshold_percent),
        minimum_age: config.image_minimum_gc_age,
        maximum_age: config.image_maximum_gc_age,
    };
    let mut usage = ImageUsage::default();
    let mut failed_before = false;
    loop {
        let outcome = collect(&cri, &policy, &mut usage, &records, &tell).await;
        let failed = outcome.is_err();
        match outcome {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "images removed to free disk space"),
            Err(error) => {
                tracing::warn!(error, "image garbage collection failed");
                if failed_before {
                    tell("ImageGCFailed", error);
                }
            }
        }
        failed_before = failed;
        if tokio::time::timeout(PERIOD, shutdown.cancelled()).await.is_ok() {
            return;
        }
    }
}

/// Removes every image that nothing uses; gives their number.
pub async fn free_unused(cri: &Cri) -> Result<usize, CriError> {
    let (images, in_use) = look(cri).await?;
    let mut removed = 0;
    for image in images.iter().filter(|image| !image.pinned && !in_use.contains(&image.id)) {
        cri.remove_image(&image.id).await?;
        removed += 1;
    }
    Ok(removed)
}

/// The images, and which of them are used.
async fn look(cri: &Cri) -> Result<(Vec<pb::Image>, HashSet<String>), CriError> {
    let mut images = cri.list_images().await?;
    if !images.iter().any(|image| image.pinned) {
        let pinned = pinned_names(cri).await;
        for image in &mut images {
            image.pinned = image.repo_tags.iter().chain(&image.repo_digests).any(|name| pinned.contains(name));
        }
    }
    let containers = cri.list_containers_with(BTreeMap::new()).await?;
    let sandbox_image = sandbox_image(&cri.status(true).await?);
    let in_use = images_in_use(&images, &containers, sandbox_image.as_deref());
    Ok((images, in_use))
}

/// The images that are pinned in containerd's own store: before 1.7 its CRI part does not tell. None where it is another runtime.
async fn pinned_names(cri: &Cri) -> HashSet<String> {
    let filters = vec![r#"labels."io.cri-containerd.pinned"==pinned"#.to_owned()];
    let mut request = tonic::Request::new(ListImagesRequest { filters });
    request.metadata_mut().insert("containerd-namespace", tonic::metadata::MetadataValue::from_static("k8s.io"));
    match ImagesClient::new(cri.channel()).list(request).await {
        Ok(answer) => answer.into_inner().images.into_iter().map(|image| image.name).collect(),
        Err(_) => HashSet::new(),
    }
}

/// One round; gives the number of images removed. One that cannot be removed does not keep the others.
async fn collect(
    cri: &Cri,
    policy: &GcPolicy,
    usage: &mut ImageUsage,
    pulled: &PulledRecords,
    tell: &impl Fn(&str, String),
) -> Result<usize, String> {
    let (images, in_use) = look(cri).await.map_err(|error| error.message())?;
    let records: Vec<ImageRecord> = images
        .iter()
        .map(|image| ImageRecord { id: image.id.clone(), size_bytes: image.size, pinned: image.pinned })
        .collect();
    pulled.prune(&images.iter().map(|image| image.id.clone()).collect());
    let now = Instant::now();
    usage.observe(&records, &in_use, now);
    let Some(disk) = disk_use(&cri.image_fs_info().await.map_err(|error| error.message())?) else { return Ok(0) };
    let chosen = usage.plan(&records, &in_use, disk, policy, now);
    let (mut freed, mut errors) = (0, Vec::new());
    for (id, reason) in &chosen {
        tracing::info!(image = id, reason, "removing an unused image");
        match cri.remove_image(id).await {
            Ok(()) => {
                freed += records.iter().find(|image| image.id == *id).map_or(0, |image| image.size_bytes);
                managers().images_collected.get_or_create(&[("reason", (*reason).to_owned())]).inc();
            }
            Err(error) => errors.push(error.message()),
        }
    }
    if !errors.is_empty() {
        return Err(format!("freed {freed} bytes space with errors in image deletion: {}", errors.join(", ")));
    }
    if let Some(message) = gc::shortfall(disk, policy, freed) {
        tell("FreeDiskSpaceFailed", message.clone());
        return Err(message);
    }
    Ok(chosen.len())
}

/// The ids of images that a container, running or not, was made of, and of the sandboxes' image.
fn images_in_use(images: &[pb::Image], containers: &[pb::Container], sandbox_image: Option<&str>) -> HashSet<String> {
    let mut names: HashSet<&str> = sandbox_image.into_iter().collect();
    for container in containers {
        names.extend([container.image_ref.as_str(), container.image_id.as_str()]);
        names.extend(container.image.as_ref().map(|image| image.image.as_str()));
    }
    let is_used = |image: &&pb::Image| {
        let mut own = image.repo_tags.iter().chain(&image.repo_digests);
        names.contains(image.id.as_str()) || own.any(|name| names.contains(name.as_str()))
    };
    images.iter().filter(is_used).map(|image| image.id.clone()).collect()
}

/// The sandbox image, as the runtime tells it in its verbose status (those that pin it say so in the list, too).
fn sandbox_image(status: &pb::StatusResponse) -> Option<String> {
    let config: serde_json::Value = serde_json::from_str(status.info.get("config")?).ok()?;
    config.get("sandboxImage")?.as_str().map(str::to_owned)
}

fn disk_use(info: &pb::ImageFsInfoResponse) -> Option<DiskUse> {
    let mountpoint = &info.image_filesystems.first()?.fs_id.as_ref()?.mountpoint;
    let (free, all) = crate::usage::file_system(std::path::Path::new(mountpoint))?;
    Some(DiskUse { capacity_bytes: all.bytes, available_bytes: free.bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_used_under_any_of_their_names() {
        let image =
            |id: &str, tag: &str| pb::Image { id: id.into(), repo_tags: vec![tag.into()], ..Default::default() };
        let images = [
            image("sha256:a", "a:1"),
            image("sha256:b", "b:1"),
            image("sha256:c", "c:1"),
            image("sha256:p", "pause:1"),
        ];
        let containers = [
            pb::Container { image_ref: "sha256:a".into(), ..Default::default() },
            pb::Container {
                image: Some(pb::ImageSpec { image: "b:1".into(), ..Default::default() }),
                ..Default::default()
            },
        ];
        let used = images_in_use(&images, &containers, Some("pause:1"));
        assert_eq!(used, HashSet::from(["sha256:a".to_owned(), "sha256:b".to_owned(), "sha256:p".to_owned()]));
    }

    #[test]
    fn the_sandbox_image_is_read_from_the_status() {
        let mut status = pb::StatusResponse::default();
        assert_eq!(sandbox_image(&status), None);
        status.info.insert("config".into(), r#"{"sandboxImage": "pause:1"}"#.into());
        assert_eq!(sandbox_image(&status).as_deref(), Some("pause:1"));
    }
}
