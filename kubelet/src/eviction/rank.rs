//! Which pod goes first when the node runs short, and what it is told. Pure. As `rankMemoryPressure` and its like: those that use
//! more than they asked for, then by priority, then by how much they use beyond what they asked for.

use std::cmp::Reverse;
use std::fmt::Write as _;
use std::sync::Arc;

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::thresholds::{Observation, Signal, Threshold};
use crate::runtime::pods::grace_seconds;
use crate::static_pods;
use crate::status::Ended;
use crate::usage::{ContainerUsage, PodUsage};

/// Priority from which a pod is critical to the cluster.
const SYSTEM_CRITICAL: i32 = 2_000_000_000;

/// A critical pod is never evicted for want of resources. As `IsCriticalPod`.
pub fn is_critical(pod: &Pod) -> bool {
    static_pods::is_static(pod) || pod.spec.as_ref().and_then(|s| s.priority).is_some_and(|p| p >= SYSTEM_CRITICAL)
}

fn requested(pod: &Pod, resource: &str) -> i64 {
    pod.spec.as_ref().and_then(|s| apimachinery::pod::requests(s).get(resource).map(Quantity::value)).unwrap_or(0)
}

/// What counts of a pod's usage. Where images have a file system of their own, what containers write is on that.
fn used(usage: &PodUsage, signal: Signal, own_image_fs: bool) -> u64 {
    let disk = match signal {
        Signal::Memory => return usage.usage.working_set,
        Signal::Pids => return usage.usage.pids,
        _ if !own_image_fs => usage.ephemeral_storage(),
        Signal::NodeFs | Signal::NodeFsInodes => usage.logs_and_empty_dirs(),
        Signal::ImageFs | Signal::ImageFsInodes => usage.written(),
    };
    if matches!(signal, Signal::NodeFs | Signal::ImageFs) { disk.bytes } else { disk.inodes }
}

/// The pods that may be evicted, the first to go first.
pub fn rank(mut pods: Vec<(Arc<Pod>, PodUsage)>, signal: Signal, own_image_fs: bool) -> Vec<(Arc<Pod>, PodUsage)> {
    pods.retain(|(pod, _)| !is_critical(pod) && apimachinery::pod::is_active(pod));
    pods.sort_by_cached_key(|(pod, usage)| {
        let used = i64::try_from(used(usage, signal, own_image_fs)).unwrap_or(i64::MAX);
        // Nobody can ask for inodes or process IDs.
        let asked = match signal {
            Signal::Memory => requested(pod, "memory"),
            Signal::NodeFs | Signal::ImageFs => requested(pod, "ephemeral-storage"),
            _ => 0,
        };
        let judged = signal.resource() == "memory" || signal.resource() == "ephemeral-storage";
        let priority = pod.spec.as_ref().and_then(|s| s.priority).unwrap_or(0);
        (Reverse(judged && used > asked), priority, Reverse(used.saturating_sub(asked)))
    });
    pods
}

fn shown(signal: Signal, amount: i64) -> String {
    match signal {
        Signal::Memory | Signal::NodeFs | Signal::ImageFs => Quantity::from_bytes(amount).to_string(),
        _ => Quantity::from_value(amount).to_string(),
    }
}

/// Seconds that the pod gets to end: none for a hard threshold; for a soft one its own, up to `most` where that is not below 0.
pub fn grace(threshold: &Threshold, most: i32, pod: &Pod) -> i64 {
    let own = grace_seconds(pod);
    match threshold.grace {
        None => 0,
        Some(_) if most < 0 => own,
        Some(_) => own.min(i64::from(most)),
    }
}

/// What the pod's status says. As `evictionMessage`.
pub fn ended(threshold: &Threshold, observed: Option<&Observation>, pod: &Pod, usage: &PodUsage) -> Ended {
    let signal = threshold.signal;
    let mut message = format!("The node was low on resource: {}. ", signal.resource());
    if let Some(observed) = observed {
        let _ = write!(
            message,
            "Threshold quantity: {}, available: {}. ",
            shown(signal, threshold.at.of(observed.capacity)),
            shown(signal, observed.available)
        );
    }
    let resource = signal.resource();
    for container in pod.spec.iter().flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten())) {
        let Some(found) = usage.containers.iter().find(|c| c.name == container.name) else { continue };
        let used = match resource {
            "memory" => found.usage.working_set,
            "ephemeral-storage" => found.root.bytes + found.logs.bytes,
            _ => continue,
        };
        let request = amount(container, resource, false).unwrap_or(0);
        let used = i64::try_from(used).unwrap_or(i64::MAX);
        if used > request {
            let _ = write!(
                message,
                "Container {} was using {}, request is {}, has larger consumption of {resource}. ",
                container.name,
                shown(signal, used),
                shown(signal, request)
            );
        }
    }
    Ended::evicted(message)
}

fn amount(container: &Container, resource: &str, limit: bool) -> Option<i64> {
    let resources = container.resources.as_ref()?;
    let map = if limit { resources.limits.as_ref() } else { resources.requests.as_ref() };
    map.and_then(|m| m.get(resource)).map(|q| Quantity::from(q).value())
}

/// Whether a pod has set limits to its local storage: only then is it walked each time.
pub fn limits_storage(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| {
        spec.volumes.iter().flatten().any(|v| v.empty_dir.as_ref().is_some_and(|e| e.size_limit.is_some()))
            || spec.containers.iter().any(|c| amount(c, "ephemeral-storage", true).is_some())
    })
}

/// Why a pod that wrote more than it may must go, and the signal that this counts as. As `localStorageEviction`.
pub fn over_its_storage(pod: &Pod, usage: &PodUsage) -> Option<(&'static str, Ended)> {
    let spec = pod.spec.as_ref()?;
    let bytes = |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX);
    for volume in spec.volumes.iter().flatten() {
        let Some(limit) = volume.empty_dir.as_ref().and_then(|e| e.size_limit.as_ref()) else { continue };
        let limit_bytes = Quantity::from(limit).value();
        let used = usage.empty_dirs.get(&volume.name).map_or(0, |u| bytes(u.bytes));
        if limit_bytes > 0 && used > limit_bytes {
            let message = format!("Usage of EmptyDir volume {:?} exceeds the limit {:?}. ", volume.name, limit.0);
            return Some(("emptydirfs.limit", Ended::evicted(message)));
        }
    }
    let limit_of_all = apimachinery::pod::limits(spec).get("ephemeral-storage").map(Quantity::value);
    let all_limited = spec.containers.iter().all(|c| amount(c, "ephemeral-storage", true).is_some());
    if let Some(limit) = limit_of_all.filter(|limit| all_limited && bytes(usage.ephemeral_storage().bytes) > *limit) {
        let limit = Quantity::from_bytes(limit);
        let message = format!("Pod ephemeral local storage usage exceeds the total limit of containers {limit}. ");
        return Some(("ephemeralpodfs.limit", Ended::evicted(message)));
    }
    let over = |found: &&ContainerUsage| {
        let declared = spec.containers.iter().find(|c| c.name == found.name)?;
        let limit = amount(declared, "ephemeral-storage", true)?;
        (bytes(found.root.bytes + found.logs.bytes) > limit).then_some(limit)
    };
    usage.containers.iter().find_map(|found| over(&found).map(|limit| (found, limit))).map(|(found, limit)| {
        let limit = Quantity::from_bytes(limit).to_string();
        let message = format!("Container {} exceeded its local ephemeral storage limit {limit:?}. ", found.name);
        ("ephemeralcontainerfs.limit", Ended::evicted(message))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::thresholds::Amount;
    use crate::usage::{DiskUsage, Usage};
    use serde_json::json;

    fn pod(name: &str, priority: i32, request: &str, used: u64) -> (Arc<Pod>, PodUsage) {
        let pod = serde_json::from_value(json!({"metadata": {"name": name, "uid": name},
            "spec": {"priority": priority, "containers": [{"name": "c", "resources": {"requests": {"memory": request}}}]}}))
        .unwrap();
        let usage = Usage { working_set: used << 20, pids: used, ..Default::default() };
        let container = ContainerUsage { name: "c".into(), usage, ..Default::default() };
        (Arc::new(pod), PodUsage { usage, containers: vec![container], ..Default::default() })
    }

    fn names(ranked: &[(Arc<Pod>, PodUsage)]) -> Vec<&str> {
        ranked.iter().map(|(pod, _)| pod.metadata.name.as_deref().unwrap()).collect()
    }

    #[test]
    fn those_beyond_their_requests_go_first_then_the_least_important() {
        let pods = || {
            vec![
                pod("within", 0, "100Mi", 90),
                pod("over-important", 100, "10Mi", 90),
                pod("over-a-little", 0, "10Mi", 20),
                pod("over-a-lot", 0, "10Mi", 80),
                pod("critical", SYSTEM_CRITICAL, "0", 500),
            ]
        };
        assert_eq!(
            names(&rank(pods(), Signal::Memory, false)),
            ["over-a-lot", "over-a-little", "over-important", "within"]
        );
        // By their number of processes only, within a priority.
        assert_eq!(
            names(&rank(pods(), Signal::Pids, false)),
            ["within", "over-a-lot", "over-a-little", "over-important"]
        );
    }

    #[test]
    fn where_images_have_a_disk_of_their_own_each_disk_is_judged_by_what_is_on_it() {
        let disk = |mb: u64| DiskUsage { bytes: mb << 20, inodes: mb };
        let with = |name: &str, root: u64, logs: u64, dir: u64| {
            let (pod, usage) = pod(name, 0, "0", 0);
            let container = ContainerUsage { root: disk(root), logs: disk(logs), ..Default::default() };
            let empty_dirs = [("v".to_owned(), disk(dir))].into();
            (pod, PodUsage { containers: vec![container], empty_dirs, ..usage })
        };
        let pods = || vec![with("writer", 50, 0, 0), with("logger", 0, 20, 10), with("mixed", 25, 15, 5)];
        assert_eq!(names(&rank(pods(), Signal::NodeFs, false)), ["writer", "mixed", "logger"]);
        assert_eq!(names(&rank(pods(), Signal::NodeFs, true)), ["logger", "mixed", "writer"]);
        assert_eq!(names(&rank(pods(), Signal::ImageFsInodes, true)), ["writer", "mixed", "logger"]);
    }

    #[test]
    fn the_message_names_who_used_what() {
        let (pod, usage) = pod("p", 0, "10Mi", 20);
        let threshold = Threshold {
            signal: Signal::Memory,
            at: Amount::Quantity(100 << 20),
            grace: None,
            minimum_reclaim: Amount::Quantity(0),
        };
        let observed = Observation { available: 50 << 20, capacity: 1 << 30 };
        let ended = ended(&threshold, Some(&observed), &pod, &usage);
        assert_eq!(ended.reason, "Evicted");
        assert_eq!(
            ended.message,
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. Container c was using 20Mi, request is 10Mi, has larger consumption of memory. "
        );
    }

    #[test]
    fn soft_thresholds_leave_a_pod_some_time() {
        let (pod, _) = pod("p", 0, "10Mi", 20);
        let of = |grace: Option<u64>, most| {
            let threshold = Threshold {
                signal: Signal::Memory,
                at: Amount::Quantity(1),
                grace: grace.map(std::time::Duration::from_secs),
                minimum_reclaim: Amount::Quantity(0),
            };
            super::grace(&threshold, most, &pod)
        };
        assert_eq!((of(None, 60), of(Some(5), 60), of(Some(5), 10), of(Some(5), -1)), (0, 30, 10, 30));
    }

    #[test]
    fn storage_limits_are_kept() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {
            "containers": [{"name": "a", "resources": {"limits": {"ephemeral-storage": "1Mi"}}},
                           {"name": "b", "resources": {"limits": {"ephemeral-storage": "4Mi"}}}],
            "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Mi"}}]}}))
        .unwrap();
        assert!(limits_storage(&pod) && !limits_storage(&Pod::default()));
        let disk = |mb: u64| DiskUsage { bytes: mb << 20, inodes: 1 };
        let usage = |a: u64, b: u64, v: u64| PodUsage {
            containers: vec![
                ContainerUsage { name: "a".into(), root: disk(a), ..Default::default() },
                ContainerUsage { name: "b".into(), logs: disk(b), ..Default::default() },
            ],
            empty_dirs: [("v".to_owned(), disk(v))].into(),
            ..Default::default()
        };
        for (usage, want) in [
            (usage(1, 3, 1), None),
            (usage(0, 0, 2), Some("Usage of EmptyDir volume \"v\" exceeds the limit \"1Mi\". ")),
            (usage(2, 0, 0), Some("Container a exceeded its local ephemeral storage limit \"1Mi\". ")),
            (usage(1, 4, 1), Some("Pod ephemeral local storage usage exceeds the total limit of containers 5Mi. ")),
        ] {
            assert_eq!(over_its_storage(&pod, &usage).map(|(_, e)| e.message).as_deref(), want);
        }
    }
}
