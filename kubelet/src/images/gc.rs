//! Which images to remove when their disk fills up: those that no container uses, oldest use first, until enough is free.
//! As the kubelet's image garbage collection (`imageGCHighThresholdPercent`, `imageGCLowThresholdPercent`, `imageMinimumGCAge`).

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// One image as the runtime lists it.
#[derive(Debug, Clone)]
pub struct ImageRecord {
    pub id: String,
    pub size_bytes: u64,
    /// The runtime says that it must stay (the sandbox image).
    pub pinned: bool,
}

/// When to begin and where to stop.
#[derive(Debug, Clone, Copy)]
pub struct GcPolicy {
    pub high_threshold_percent: u64,
    pub low_threshold_percent: u64,
    pub minimum_age: Duration,
    /// Unused images older than this go in any case; zero: never.
    pub maximum_age: Duration,
}

/// How full the images' file system is.
#[derive(Debug, Clone, Copy)]
pub struct DiskUse {
    pub capacity_bytes: u64,
    pub available_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Usage {
    first_seen: Instant,
    last_used: Instant,
}

/// When each image was first seen and last used, since the kubelet started.
#[derive(Debug, Default)]
pub struct ImageUsage {
    by_id: HashMap<String, Usage>,
}

// === impl ImageUsage ===

impl ImageUsage {
    /// Take note of the images that there are and of those in use now.
    pub fn observe(&mut self, images: &[ImageRecord], in_use: &HashSet<String>, now: Instant) {
        for image in images {
            // As upstream: one that was never seen in use since the start counts as used before any other.
            let usage = self.by_id.entry(image.id.clone()).or_insert(Usage { first_seen: now, last_used: now });
            if in_use.contains(&image.id) {
                usage.last_used = now;
            }
        }
        let present: HashSet<&str> = images.iter().map(|image| image.id.as_str()).collect();
        self.by_id.retain(|id, _| present.contains(id.as_str()));
    }

    /// The images to remove now, in order, and why, as `image_garbage_collected_total` has it. Call [`ImageUsage::observe`] first.
    pub fn plan(
        &self,
        images: &[ImageRecord],
        in_use: &HashSet<String>,
        disk: DiskUse,
        policy: &GcPolicy,
        now: Instant,
    ) -> Vec<(String, &'static str)> {
        let mut candidates: Vec<(&ImageRecord, Usage)> = images
            .iter()
            .filter(|image| !image.pinned && !in_use.contains(&image.id))
            .filter_map(|image| self.by_id.get(&image.id).map(|usage| (image, *usage)))
            .filter(|(_, usage)| now.saturating_duration_since(usage.first_seen) >= policy.minimum_age)
            .collect();
        candidates.sort_by_key(|(_, usage)| (usage.last_used, usage.first_seen));
        let mut to_free = bytes_to_free(disk, policy);
        let mut removed = Vec::new();
        for (image, usage) in candidates {
            let too_old =
                !policy.maximum_age.is_zero() && now.saturating_duration_since(usage.last_used) > policy.maximum_age;
            if to_free > 0 || too_old {
                to_free = to_free.saturating_sub(image.size_bytes);
                removed.push((image.id.clone(), if too_old { "age" } else { "space" }));
            }
        }
        removed
    }
}

/// What is told where removing images gave back `freed` bytes, and more had to go. As `FreeDiskSpaceFailed`.
pub fn shortfall(disk: DiskUse, policy: &GcPolicy, freed: u64) -> Option<String> {
    if freed >= bytes_to_free(disk, policy) {
        return None;
    }
    let percent = 100 - disk.available_bytes.min(disk.capacity_bytes) * 100 / disk.capacity_bytes.max(1);
    Some(format!(
        "Insufficient free disk space on the node's image filesystem ({percent}% of {} used). Failed to free sufficient space by \
         deleting unused images (freed {freed} bytes). Investigate disk usage, as it could be used by active images, logs, \
         volumes, or other data.",
        shown_size(disk.capacity_bytes)
    ))
}

/// `26.4 GiB`
fn shown_size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.iter().find(|(shift, _)| bytes >> shift > 0) {
        Some((shift, unit)) => format!("{:.1} {unit}", bytes as f64 / f64::from(1u32 << shift)),
        None => format!("{bytes} B"),
    }
}

/// How much has to go: nothing below the high threshold, else down to the low one.
fn bytes_to_free(disk: DiskUse, policy: &GcPolicy) -> u64 {
    if disk.capacity_bytes == 0 || policy.high_threshold_percent >= 100 {
        return 0;
    }
    // As `GarbageCollect`, which rounds so.
    let available = disk.available_bytes.min(disk.capacity_bytes);
    let part = |of: u64, times: u64, by: u64| (u128::from(of) * u128::from(times) / u128::from(by)) as u64;
    if 100 - part(available, 100, disk.capacity_bytes) < policy.high_threshold_percent {
        return 0;
    }
    part(disk.capacity_bytes, 100 - policy.low_threshold_percent.min(100), 100).saturating_sub(available)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: GcPolicy = GcPolicy {
        high_threshold_percent: 85,
        low_threshold_percent: 80,
        minimum_age: Duration::from_secs(120),
        maximum_age: Duration::ZERO,
    };

    fn image(id: &str, size_bytes: u64, pinned: bool) -> ImageRecord {
        ImageRecord { id: id.into(), size_bytes, pinned }
    }

    fn plan(available_bytes: u64, policy: &GcPolicy) -> Vec<(String, &'static str)> {
        let begun = Instant::now();
        let mut usage = ImageUsage::default();
        let images = [
            image("old", 30, false),
            image("used", 500, false),
            image("pinned", 500, true),
            image("recent", 30, false),
        ];
        let in_use = HashSet::from(["used".to_owned()]);
        usage.observe(&images, &in_use, begun);
        let recent = HashSet::from(["used".to_owned(), "recent".to_owned()]);
        usage.observe(&images, &recent, begun + Duration::from_secs(60));
        let now = begun + Duration::from_secs(300);
        usage.plan(&images, &in_use, DiskUse { capacity_bytes: 1000, available_bytes }, policy, now)
    }

    #[test]
    fn unused_images_go_oldest_first_until_enough_is_free() {
        let [old, recent] = ["old", "recent"].map(|id| (id.to_owned(), "space"));
        let both = [old.clone(), recent];
        assert!(plan(200, &POLICY).is_empty());
        // A part of a percent that is not free counts as used.
        assert!(plan(160, &POLICY).is_empty());
        assert_eq!(plan(159, &POLICY), both);
        assert_eq!(plan(150, &POLICY), both);
        assert_eq!(plan(10, &POLICY), both);
        assert_eq!(plan(150, &GcPolicy { low_threshold_percent: 83, ..POLICY }), [old]);
    }

    #[test]
    fn what_cannot_be_freed_is_told() {
        let disk = DiskUse { capacity_bytes: 100 << 30, available_bytes: 10 << 30 };
        assert_eq!(shortfall(disk, &POLICY, 10 << 30), None);
        let told = shortfall(disk, &POLICY, 1 << 30).unwrap();
        assert!(told.starts_with(
            "Insufficient free disk space on the node's image filesystem (90% of 100.0 GiB used). Failed"
        ));
        assert!(told.contains("(freed 1073741824 bytes). Investigate disk usage"), "{told}");
        assert_eq!(shortfall(DiskUse { available_bytes: 50 << 30, ..disk }, &POLICY, 0), None);
    }

    #[test]
    fn young_images_stay_and_stale_ones_go() {
        assert!(plan(10, &GcPolicy { minimum_age: Duration::from_secs(3600), ..POLICY }).is_empty());
        assert_eq!(
            plan(900, &GcPolicy { maximum_age: Duration::from_secs(270), ..POLICY }),
            [("old".to_owned(), "age")]
        );
    }
}
