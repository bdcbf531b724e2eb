//! The cgroups of QoS classes and pods: `kubepods`, `kubepods/burstable`, `kubepods/besteffort` and a `pod<uid>` in one of
//! them, made by the kubelet (cgroupfs driver) in every hierarchy; the runtime puts the containers below. With the systemd
//! driver the runtime makes the slices by itself and only names are computed here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, Ordering};

use k8s_openapi::api::core::v1::Pod;
use proto::cri as pb;
use tracing::{debug, warn};

use super::pods::uid_of;
use super::resources;
use crate::systemd;
use crate::usage::Usage;

/// Deepest nesting below a pod that is cleaned up.
const MAX_DEPTH: usize = 16;

/// Where cgroups are mounted on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hierarchies {
    /// One unified tree.
    V2(PathBuf),
    /// A tree a controller (or several), and perhaps a unified one without controllers.
    V1(Vec<PathBuf>),
}

/// Makes, limits and removes the cgroups of pods.
#[derive(Debug)]
pub struct Cgroups {
    hierarchies: Hierarchies,
    /// Below the mount points: `cgroupRoot` without slashes at the ends ("" for the root).
    root: String,
    systemd: bool,
    per_qos: bool,
    pids_limit: i64,
    /// The weight that the burstable class has.
    weight: AtomicI64,
}

/// A pod's class as a directory; guaranteed pods are directly below `kubepods`.
fn class_dir(pod: &Pod) -> Option<&'static str> {
    match pod.spec.as_ref().map_or("BestEffort", apimachinery::pod::qos_class) {
        "Guaranteed" => None,
        "Burstable" => Some("burstable"),
        _ => Some("besteffort"),
    }
}

impl Hierarchies {
    /// Reads the mounts of this process.
    pub fn detect() -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string("/proc/self/mounts")?))
    }

    fn parse(mounts: &str) -> Self {
        let mut v1 = Vec::new();
        let mut v2 = Vec::new();
        for line in mounts.lines() {
            let mut words = line.split_whitespace();
            let (Some(_), Some(target), Some(kind)) = (words.next(), words.next(), words.next()) else { continue };
            match kind {
                "cgroup" => v1.push(PathBuf::from(target)),
                "cgroup2" => v2.push(PathBuf::from(target)),
                _ => {}
            }
        }
        if v1.is_empty() {
            Hierarchies::V2(v2.into_iter().next().unwrap_or_else(|| PathBuf::from("/sys/fs/cgroup")))
        } else {
            v1.extend(v2);
            v1.dedup();
            Hierarchies::V1(v1)
        }
    }

    fn mounts(&self) -> &[PathBuf] {
        match self {
            Hierarchies::V2(mount) => std::slice::from_ref(mount),
            Hierarchies::V1(mounts) => mounts,
        }
    }
}

impl Cgroups {
    pub fn new(hierarchies: Hierarchies, root: &str, systemd: bool, per_qos: bool, pids_limit: i64) -> Self {
        let root = root.trim_matches('/').to_owned();
        Self { hierarchies, root, systemd, per_qos, pids_limit, weight: AtomicI64::new(0) }
    }

    /// Whether what is asked of it is asked of systemd, and waited for.
    pub fn asks_systemd(&self) -> bool {
        self.systemd && self.per_qos
    }

    pub fn is_v2(&self) -> bool {
        matches!(self.hierarchies, Hierarchies::V2(_))
    }

    /// The path of a pod's cgroup below the mount points.
    fn pod_path(&self, pod: &Pod) -> String {
        let uid = uid_of(pod);
        let mut parts: Vec<String> = Vec::new();
        if !self.root.is_empty() {
            parts.push(self.root.clone());
        }
        let class = class_dir(pod);
        if self.systemd {
            parts.push("kubepods.slice".to_owned());
            let mut name = "kubepods".to_owned();
            if let Some(class) = class {
                name = format!("kubepods-{class}");
                parts.push(format!("{name}.slice"));
            }
            parts.push(format!("{name}-pod{}.slice", uid.replace('-', "_")));
        } else {
            parts.push("kubepods".to_owned());
            parts.extend(class.map(str::to_owned));
            parts.push(format!("pod{uid}"));
        }
        parts.join("/")
    }

    /// What to give the runtime as the sandbox's cgroup parent. As `GetPodCgroupParent`.
    pub fn parent_for_runtime(&self, pod: &Pod) -> String {
        if !self.per_qos {
            return if self.root.is_empty() { String::new() } else { format!("/{}", self.root) };
        }
        let path = self.pod_path(pod);
        if self.systemd { path.rsplit('/').next().unwrap_or_default().to_owned() } else { format!("/{path}") }
    }

    /// Makes `kubepods` and its classes, limited to these processors and this memory (0: unlimited).
    pub fn ensure_node(&self, milli_cpu: i64, memory: i64) -> io::Result<()> {
        if !self.per_qos {
            return Ok(());
        }
        let limits = pb::LinuxContainerResources {
            cpu_shares: resources::shares(milli_cpu),
            memory_limit_in_bytes: memory,
            ..Default::default()
        };
        if self.systemd {
            let least = pb::LinuxContainerResources { cpu_shares: 2, ..Default::default() };
            self.slice("kubepods.slice", &limits, -1);
            self.slice("kubepods-besteffort.slice", &least, -1);
            return Ok(());
        }
        let base = self.below_root("kubepods");
        for path in [base.clone(), format!("{base}/burstable"), format!("{base}/besteffort")] {
            self.make(&path)?;
        }
        self.apply(&base, &limits);
        let least = pb::LinuxContainerResources { cpu_shares: 2, ..Default::default() };
        self.apply(&format!("{base}/besteffort"), &least);
        Ok(())
    }

    /// Holds a cgroup that is there, of the system's or of Kubernetes' own daemons, to what is reserved for it. As
    /// `enforceExistingCgroup`.
    pub fn hold_reserved(&self, name: &str, milli_cpu: i64, memory: i64) -> io::Result<()> {
        let path = name.trim_matches('/');
        if !self.hierarchies.mounts().iter().any(|mount| mount.join(path).is_dir()) {
            let text = format!("failed to enforce limits on {name:?}: cgroup {name} does not exist");
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        let limits = pb::LinuxContainerResources {
            cpu_shares: if milli_cpu > 0 { resources::shares(milli_cpu) } else { 0 },
            memory_limit_in_bytes: memory,
            ..Default::default()
        };
        self.apply(path, &limits);
        Ok(())
    }

    /// Gives the burstable class the weight of all its pods' requests.
    pub fn set_burstable_requests(&self, milli_cpu: i64) {
        let cpu_shares = resources::shares(milli_cpu);
        if self.per_qos && self.weight.swap(cpu_shares, Ordering::Relaxed) != cpu_shares {
            let limits = pb::LinuxContainerResources { cpu_shares, ..Default::default() };
            if self.systemd {
                return self.slice("kubepods-burstable.slice", &limits, -1);
            }
            self.apply(&format!("{}/burstable", self.below_root("kubepods")), &limits);
        }
    }

    /// Makes a pod's cgroup and sets its limits.
    pub fn ensure_pod(&self, pod: &Pod, limits: &pb::LinuxContainerResources) -> io::Result<()> {
        if !self.per_qos {
            return Ok(());
        }
        if self.systemd {
            self.slice(&self.parent_for_runtime(pod), limits, self.pids_limit);
            return Ok(());
        }
        let path = self.pod_path(pod);
        self.make(&path)?;
        self.apply(&path, limits);
        if self.pids_limit > 0 {
            self.write(&path, "pids.max", &self.pids_limit.to_string());
        }
        Ok(())
    }

    /// Removes a pod's cgroup, wherever its class put it (the spec may be gone), deepest first.
    pub fn remove_pod(&self, uid: &str) {
        if !self.per_qos || uid.is_empty() {
            return;
        }
        if self.systemd {
            let of_class = |class| format!("kubepods{class}-pod{}.slice", uid.replace('-', "_"));
            for name in ["", "-burstable", "-besteffort"].map(of_class) {
                // Only what there is: each question costs a process.
                let paths = self.slice_paths(&name);
                if self.hierarchies.mounts().iter().any(|mount| mount.join(&paths).exists()) {
                    systemd::stop_slice(&name);
                }
            }
            return;
        }
        let base = self.below_root("kubepods");
        for class in ["", "burstable/", "besteffort/"] {
            for mount in self.hierarchies.mounts() {
                remove_tree(&mount.join(format!("{base}/{class}pod{uid}")), MAX_DEPTH);
            }
        }
    }

    /// UIDs of pods that have a cgroup.
    pub fn pod_uids(&self) -> Vec<String> {
        let Some(mount) = self.hierarchies.mounts().first() else { return Vec::new() };
        let (base, classes) = if self.systemd {
            ("kubepods.slice", ["kubepods-burstable.slice", "kubepods-besteffort.slice"])
        } else {
            ("kubepods", ["burstable", "besteffort"])
        };
        let base = mount.join(self.below_root(base));
        let mut uids = Vec::new();
        for dir in [base.clone(), base.join(classes[0]), base.join(classes[1])] {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let uid = name.to_str().and_then(|name| match name.strip_suffix(".slice") {
                    Some(slice) => slice.split_once("-pod").map(|(_, uid)| uid.replace('_', "-")),
                    None => name.strip_prefix("pod").map(str::to_owned),
                });
                uids.extend(uid);
            }
        }
        uids
    }

    /// Has systemd make a slice, or set its limits. Where it cannot be asked, the runtime makes slices without limits.
    fn slice(&self, name: &str, limits: &pb::LinuxContainerResources, pids: i64) {
        if let Err(error) = systemd::ensure_slice(name, limits, pids, self.is_v2()) {
            warn!(slice = name, %error, "slice not made");
        }
    }

    /// Where a slice of pods is below a mount point.
    fn slice_paths(&self, name: &str) -> String {
        let class = ["kubepods-burstable", "kubepods-besteffort"].into_iter().find(|class| name.starts_with(class));
        let base = self.below_root("kubepods.slice");
        class.map_or_else(|| format!("{base}/{name}"), |class| format!("{base}/{class}.slice/{name}"))
    }

    fn directories(&self, path: &str) -> Vec<PathBuf> {
        self.hierarchies.mounts().iter().map(|mount| mount.join(path)).collect()
    }

    /// The names that a container's cgroup may have below its pod's.
    fn container_paths(&self, pod: &Pod, id: &str) -> impl Iterator<Item = String> {
        let parent = self.pod_path(pod);
        [id.to_owned(), format!("cri-containerd-{id}.scope"), format!("crio-{id}.scope"), format!("crio-{id}")]
            .into_iter()
            .map(move |name| format!("{parent}/{name}"))
    }

    pub fn pod_usage(&self, pod: &Pod) -> Option<Usage> {
        Usage::read(&self.directories(&self.pod_path(pod)), self.is_v2())
    }

    pub fn container_usage(&self, pod: &Pod, id: &str) -> Option<Usage> {
        self.container_paths(pod, id).find_map(|path| Usage::read(&self.directories(&path), self.is_v2()))
    }

    /// What all pods use together.
    pub fn all_pods_usage(&self) -> Option<Usage> {
        let name = if self.systemd { "kubepods.slice" } else { "kubepods" };
        Usage::read(&self.directories(&self.below_root(name)), self.is_v2())
    }

    /// A process of a container (or sandbox).
    pub fn first_process(&self, pod: &Pod, id: &str) -> Option<u32> {
        let of = |path: String| {
            let files = self.directories(&path).into_iter().map(|d| d.join("cgroup.procs"));
            files.filter_map(|f| fs::read_to_string(f).ok()).find_map(|text| text.lines().next()?.parse().ok())
        };
        self.container_paths(pod, id).find_map(of)
    }

    fn below_root(&self, name: &str) -> String {
        if self.root.is_empty() { name.to_owned() } else { format!("{}/{name}", self.root) }
    }

    /// Makes a cgroup in every hierarchy, ancestors first.
    fn make(&self, path: &str) -> io::Result<()> {
        for mount in self.hierarchies.mounts() {
            let mut dir = mount.clone();
            for part in path.split('/').filter(|p| !p.is_empty()) {
                if let Hierarchies::V2(_) = self.hierarchies {
                    enable_controllers(&dir);
                }
                dir.push(part);
                match fs::create_dir(&dir) {
                    Ok(()) => inherit_cpuset(&dir),
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(e) => {
                        return Err(io::Error::new(e.kind(), format!("cgroup {}: {e}", dir.display())));
                    }
                }
            }
        }
        Ok(())
    }

    fn apply(&self, path: &str, limits: &pb::LinuxContainerResources) {
        let period = if limits.cpu_period > 0 { limits.cpu_period } else { 100_000 };
        if self.is_v2() {
            if limits.cpu_shares > 0 {
                self.write(path, "cpu.weight", &resources::weight(limits.cpu_shares).to_string());
            }
            let max = if limits.cpu_quota > 0 { limits.cpu_quota.to_string() } else { "max".to_owned() };
            self.write(path, "cpu.max", &format!("{max} {period}"));
            let memory = if limits.memory_limit_in_bytes > 0 {
                limits.memory_limit_in_bytes.to_string()
            } else {
                "max".to_owned()
            };
            self.write(path, "memory.max", &memory);
            for (file, value) in &limits.unified {
                self.write(path, file, value);
            }
        } else {
            if limits.cpu_shares > 0 {
                self.write(path, "cpu.shares", &limits.cpu_shares.to_string());
            }
            self.write(path, "cpu.cfs_period_us", &period.to_string());
            self.write(path, "cpu.cfs_quota_us", &if limits.cpu_quota > 0 { limits.cpu_quota } else { -1 }.to_string());
            let memory = if limits.memory_limit_in_bytes > 0 { limits.memory_limit_in_bytes } else { -1 };
            self.write(path, "memory.limit_in_bytes", &memory.to_string());
        }
        for page in &limits.hugepage_limits {
            let file = if self.is_v2() { "max" } else { "limit_in_bytes" };
            self.write(path, &format!("hugetlb.{}.{file}", page.page_size), &page.limit.to_string());
        }
    }

    /// Writes a control file wherever the hierarchy has it. A limit that cannot be set is a warning, not a failed pod.
    fn write(&self, path: &str, file: &str, value: &str) {
        for mount in self.hierarchies.mounts() {
            let target = mount.join(path).join(file);
            if target.exists()
                && let Err(error) = fs::write(&target, value)
            {
                warn!(file = %target.display(), value, %error, "cannot set a cgroup limit");
            }
        }
    }
}

/// A new cpuset is empty and can hold no process: it gets its parent's CPUs and memory nodes.
fn inherit_cpuset(dir: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = dir.join(file);
        let Some(parent) = dir.parent().map(|p| p.join(file)) else { continue };
        if own.exists()
            && fs::read_to_string(&own).is_ok_and(|text| text.trim().is_empty())
            && let Ok(value) = fs::read_to_string(parent)
            && let Err(error) = fs::write(&own, value.trim())
        {
            debug!(file = %own.display(), %error, "cpuset not inherited");
        }
    }
}

/// Makes a v2 cgroup pass all its controllers on to its children.
fn enable_controllers(dir: &Path) {
    let Ok(available) = fs::read_to_string(dir.join("cgroup.controllers")) else { return };
    for controller in available.split_whitespace() {
        if let Err(error) = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}")) {
            debug!(dir = %dir.display(), controller, %error, "controller not passed on");
        }
    }
}

fn remove_tree(dir: &Path, depth: usize) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    if depth > 0 {
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                remove_tree(&entry.path(), depth - 1);
            }
        }
    }
    if let Err(error) = fs::remove_dir(dir) {
        debug!(cgroup = %dir.display(), %error, "cgroup not removed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(uid: &str, resources: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "uid": uid},
            "spec": {"containers": [{"name": "c", "resources": resources}]}
        }))
        .unwrap()
    }

    #[test]
    fn mounts_tell_the_version() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(
            Hierarchies::parse(hybrid),
            Hierarchies::V1(vec!["/sys/fs/cgroup/cpu".into(), "/sys/fs/cgroup/unified".into()])
        );
        assert_eq!(
            Hierarchies::parse("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"),
            Hierarchies::V2("/sys/fs/cgroup".into())
        );
    }

    #[test]
    fn parents_follow_driver_and_class() {
        let make =
            |root: &str, systemd| Cgroups::new(Hierarchies::V2("/sys/fs/cgroup".into()), root, systemd, true, -1);
        let best = pod("a-b", json!({}));
        let burst = pod("a-b", json!({"requests": {"cpu": "1"}}));
        let sure =
            pod("a-b", json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1", "memory": "1Gi"}}));
        for (root, systemd, pod, want) in [
            ("", false, &best, "/kubepods/besteffort/poda-b"),
            ("/n1/", false, &burst, "/n1/kubepods/burstable/poda-b"),
            ("", false, &sure, "/kubepods/poda-b"),
            ("", true, &burst, "kubepods-burstable-poda_b.slice"),
            ("", true, &sure, "kubepods-poda_b.slice"),
        ] {
            assert_eq!(make(root, systemd).parent_for_runtime(pod), want);
        }
    }

    #[test]
    fn pods_get_limits_and_lose_their_cgroup() {
        let root = tempfile::tempdir().unwrap();
        let cgroups = Cgroups::new(Hierarchies::V2(root.path().to_path_buf()), "n1", false, true, 99);
        cgroups.ensure_node(2000, 1 << 30).unwrap();
        assert!(cgroups.hold_reserved("/system", 100, 1 << 30).unwrap_err().to_string().contains("does not exist"));
        fs::create_dir(root.path().join("system")).unwrap();
        fs::write(root.path().join("system/memory.max"), "max").unwrap();
        cgroups.hold_reserved("/system", 100, 1 << 30).unwrap();
        assert_eq!(fs::read_to_string(root.path().join("system/memory.max")).unwrap(), "1073741824");
        let pod = pod("u", json!({"requests": {"cpu": "1"}}));
        let dir = root.path().join("n1/kubepods/burstable/podu");
        cgroups.ensure_pod(&pod, &pb::LinuxContainerResources::default()).unwrap();
        assert!(dir.is_dir());
        assert_eq!(cgroups.pod_uids(), ["u"]);
        cgroups.remove_pod("u");
        assert!(!dir.exists());
    }

    #[test]
    fn limits_are_written_as_each_version_has_them() {
        let limits = pb::LinuxContainerResources {
            cpu_shares: 1024,
            cpu_quota: 50_000,
            memory_limit_in_bytes: 1 << 20,
            hugepage_limits: vec![pb::HugepageLimit { page_size: "2MB".into(), limit: 0 }],
            unified: [("memory.low".to_owned(), "7".to_owned())].into(),
            ..Default::default()
        };
        let written = |v2: bool, files: &[&str]| -> Vec<String> {
            let root = tempfile::tempdir().unwrap();
            let mount = root.path().to_path_buf();
            let hierarchies = if v2 { Hierarchies::V2(mount) } else { Hierarchies::V1(vec![mount]) };
            for file in files {
                fs::write(root.path().join(file), "").unwrap();
            }
            Cgroups::new(hierarchies, "", false, true, -1).apply("", &limits);
            files.iter().map(|file| fs::read_to_string(root.path().join(file)).unwrap()).collect()
        };
        assert_eq!(
            written(true, &["cpu.weight", "cpu.max", "memory.max", "memory.low", "hugetlb.2MB.max"]),
            ["39", "50000 100000", "1048576", "7", "0"]
        );
        assert_eq!(
            written(false, &["cpu.shares", "cpu.cfs_quota_us", "memory.limit_in_bytes", "hugetlb.2MB.limit_in_bytes"]),
            ["1024", "50000", "1048576", "0"]
        );
    }

    #[test]
    fn slices_are_found_again() {
        let root = tempfile::tempdir().unwrap();
        let cgroups = Cgroups::new(Hierarchies::V2(root.path().to_path_buf()), "", true, true, -1);
        for name in ["kubepods-poda_b.slice", "kubepods-burstable-podc_d.slice"] {
            fs::create_dir_all(root.path().join(cgroups.slice_paths(name))).unwrap();
        }
        assert_eq!(cgroups.pod_uids(), ["a-b", "c-d"]);
    }
}
