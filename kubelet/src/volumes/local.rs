//! Volumes that the node itself provides: emptyDir (disk or memory) and hostPath; and handing a volume to the pod's group.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown};
use std::path::Path;

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, HostPathVolumeSource, Pod};

use super::mounts;

/// Where the pod's `fsGroup` goes, and how far.
#[derive(Debug, Clone, Copy)]
pub(super) struct GroupOwnership {
    pub gid: u32,
    /// `fsGroupChangePolicy: OnRootMismatch`: a volume whose top is right is left alone.
    pub only_on_root_mismatch: bool,
}

// === impl GroupOwnership ===

impl GroupOwnership {
    /// As the pod's security context says.
    pub(super) fn of(pod: &Pod) -> Option<GroupOwnership> {
        let gid = super::payload::fs_group(pod)?;
        let context = pod.spec.as_ref()?.security_context.as_ref()?;
        let only_on_root_mismatch = context.fs_group_change_policy.as_deref() == Some("OnRootMismatch");
        Some(GroupOwnership { gid, only_on_root_mismatch })
    }
}

/// Prepare an emptyDir at `volume`. `ready` is a marker file (`plugins/kubernetes.io~empty-dir/<name>/ready`): what has it is
/// never set up again, whatever the pod has made of it.
pub(super) fn empty_dir(volume: &Path, source: &EmptyDirVolumeSource, ready: &Path, pod: &Pod) -> io::Result<()> {
    let medium = source.medium.as_deref().unwrap_or_default();
    let mounted = !medium.is_empty() && mounts::has_own_file_system(volume)?;
    if ready.exists() && volume.is_dir() && (mounted || medium.is_empty()) {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o750).create(volume)?;
    match medium {
        "" => {}
        _ if mounted => {}
        "Memory" => mounts::mount_tmpfs(volume, memory_size(source, pod))?,
        other => mounts::mount_huge_pages(volume, &huge_page_size(other, pod)?)?,
    }
    fs::set_permissions(volume, fs::Permissions::from_mode(0o777))?;
    if let Some(group) = GroupOwnership::of(pod) {
        give_to_group(volume, group)?;
    }
    if let Some(parent) = ready.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::File::create(ready).map(drop)
}

/// The page size of a `HugePages` or `HugePages-<size>` volume, as resources name it (`2Mi`): where the medium does not say, the
/// one size that the pod's containers use. As `getPageSizeMountOption`.
fn huge_page_size(medium: &str, pod: &Pod) -> io::Result<String> {
    let failed = |why: &str| io::Error::other(format!("medium {medium:?} {why}"));
    let containers = pod.spec.iter().flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()));
    let used: std::collections::BTreeSet<&str> = containers
        .filter_map(|c| c.resources.as_ref())
        .flat_map(|r| r.requests.iter().chain(&r.limits).flatten())
        .filter_map(|(name, _)| name.strip_prefix("hugepages-"))
        .collect();
    match medium.strip_prefix("HugePages") {
        Some("") if used.len() == 1 => Ok(used.into_iter().next().unwrap_or_default().to_owned()),
        Some("") => Err(failed("can only be used if container uses exactly one page size")),
        Some(size) => match size.strip_prefix('-').filter(|size| used.contains(size)) {
            Some(size) => Ok(size.to_owned()),
            None => Err(failed("is not a page size that a container asks for")),
        },
        None => Err(failed("of emptyDir is unknown")),
    }
}

/// The size of a memory-backed emptyDir: its limit, or the pod's memory limit where that is smaller or alone.
fn memory_size(source: &EmptyDirVolumeSource, pod: &Pod) -> Option<i64> {
    let own = source.size_limit.as_ref().map(|size| Quantity::from(size).value()).filter(|size| *size > 0);
    let spec = pod.spec.as_ref();
    // Only a pod all of whose containers are limited has a limit.
    let of_pod = spec
        .filter(|spec| {
            spec.containers.iter().all(|container| {
                let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
                limits.is_some_and(|limits| limits.contains_key("memory"))
            })
        })
        .and_then(|spec| apimachinery::pod::limits(spec).get("memory").map(Quantity::value))
        .filter(|size| *size > 0);
    match (own, of_pod) {
        (Some(own), Some(of_pod)) => Some(own.min(of_pod)),
        (own, of_pod) => own.or(of_pod),
    }
}

/// Check that the path is what the volume's type asks for; make it where the type says so. As `checkType` of hostPath.
pub(super) fn host_path(source: &HostPathVolumeSource) -> io::Result<()> {
    let path = Path::new(&source.path);
    let shown = path.display();
    let failed = |what: String| io::Error::other(format!("hostPath type check failed: {what}"));
    let kind = source.type_.as_deref().unwrap_or_default();
    if kind.is_empty() {
        return Ok(());
    }
    let found = match fs::metadata(path) {
        Ok(meta) => Some(meta.file_type()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(format!("{shown}: {error}"))),
    };
    let is = |wanted: fn(&fs::FileType) -> bool| found.as_ref().is_some_and(wanted);
    let (fits, what) = match kind {
        "DirectoryOrCreate" => {
            if found.is_none() {
                return fs::DirBuilder::new().recursive(true).mode(0o755).create(path);
            }
            (is(|kind| kind.is_dir()), "a directory")
        }
        "Directory" => (is(|kind| kind.is_dir()), "a directory"),
        "FileOrCreate" => {
            if found.is_none() {
                return fs::OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .mode(0o644)
                    .open(path)
                    .map(drop);
            }
            (is(|kind| kind.is_file()), "a file")
        }
        "File" => (is(|kind| kind.is_file()), "a file"),
        "Socket" => (is(|kind| kind.is_socket()), "a socket file"),
        "CharDevice" => (is(|kind| kind.is_char_device()), "a character device"),
        "BlockDevice" => (is(|kind| kind.is_block_device()), "a block device"),
        other => return Err(failed(format!("{other} is an invalid volume type"))),
    };
    if fits { Ok(()) } else { Err(failed(format!("{shown} is not {what}"))) }
}

/// Make everything in `volume` readable and writable by the group, directories passing it on. As `SetVolumeOwnership`.
pub(super) fn give_to_group(volume: &Path, group: GroupOwnership) -> io::Result<()> {
    const DIRECTORY: u32 = 0o2770;
    const FILE: u32 = 0o660;
    let top = fs::symlink_metadata(volume)?;
    if group.only_on_root_mismatch && top.gid() == group.gid && top.mode() & DIRECTORY == DIRECTORY {
        return Ok(());
    }
    let mut pending = vec![volume.to_path_buf()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let path = entry.path();
            let meta = entry.metadata()?;
            if meta.is_symlink() {
                lchown(&path, None, Some(group.gid))?;
            } else if meta.is_dir() {
                pending.push(path);
            } else {
                chown(&path, None, Some(group.gid))?;
                fs::set_permissions(&path, fs::Permissions::from_mode(meta.mode() & 0o7777 | FILE))?;
            }
        }
        let mode = fs::symlink_metadata(&directory)?.mode() & 0o7777;
        chown(&directory, None, Some(group.gid))?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(mode | DIRECTORY))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(value: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": value})).expect("a pod")
    }

    #[test]
    fn host_path_types_are_checked() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        fs::write(at("file"), "").expect("a file");
        fs::create_dir(at("dir")).expect("a directory");
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("a socket");
        let cases = [
            ("none", "", Ok(())),
            ("dir", "Directory", Ok(())),
            ("file", "Directory", Err("is not a directory")),
            ("none", "Directory", Err("is not a directory")),
            ("new/dir", "DirectoryOrCreate", Ok(())),
            ("file", "DirectoryOrCreate", Err("is not a directory")),
            ("file", "File", Ok(())),
            ("dir", "File", Err("is not a file")),
            ("new-file", "FileOrCreate", Ok(())),
            ("no/parent", "FileOrCreate", Err("No such file")),
            ("socket", "Socket", Ok(())),
            ("file", "Socket", Err("is not a socket file")),
            ("file", "CharDevice", Err("is not a character device")),
            ("file", "BlockDevice", Err("is not a block device")),
        ];
        for (name, kind, want) in cases {
            let source = HostPathVolumeSource { path: at(name), type_: Some(kind.into()) };
            match (host_path(&source), want) {
                (Ok(()), Ok(())) => {}
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{name} {kind}: {error}"),
                (got, want) => panic!("{name} {kind}: {got:?}, not {want:?}"),
            }
        }
        let null = HostPathVolumeSource { path: "/dev/null".into(), type_: Some("CharDevice".into()) };
        host_path(&null).expect("a device");
        assert!(Path::new(&at("new/dir")).is_dir() && Path::new(&at("new-file")).is_file());
    }

    #[test]
    fn an_empty_dir_is_set_up_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let (volume, ready) = (dir.path().join("v"), dir.path().join("plugins/v/ready"));
        let source = EmptyDirVolumeSource::default();
        empty_dir(&volume, &source, &ready, &pod(json!({"containers": []}))).expect("set up");
        assert_eq!(fs::metadata(&volume).expect("meta").mode() & 0o7777, 0o777);
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o700)).expect("the pod's own choice");
        fs::write(volume.join("data"), "x").expect("a file");
        empty_dir(&volume, &source, &ready, &pod(json!({"containers": []}))).expect("again");
        assert_eq!(fs::metadata(&volume).expect("meta").mode() & 0o7777, 0o700);
        assert!(volume.join("data").exists());
    }

    #[test]
    fn a_memory_volume_has_its_size_and_group() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let (volume, ready) = (dir.path().join("v"), dir.path().join("ready"));
        let source: EmptyDirVolumeSource =
            serde_json::from_value(json!({"medium": "Memory", "sizeLimit": "1Mi"})).expect("a source");
        let pod = pod(json!({"containers": [], "securityContext": {"fsGroup": 77}}));
        empty_dir(&volume, &source, &ready, &pod).expect("mounted");
        let meta = fs::metadata(&volume).expect("meta");
        assert_eq!((meta.gid(), meta.mode() & 0o7777), (77, 0o2777));
        assert!(fs::write(volume.join("big"), vec![0u8; 2 << 20]).is_err());
        empty_dir(&volume, &source, &ready, &pod).expect("again");
        assert_eq!(mounts::mount_points().expect("the table").iter().filter(|path| path.ends_with("v")).count(), 1);
        mounts::unmount_below(dir.path()).expect("unmounted");
    }

    #[test]
    fn memory_is_the_smaller_of_the_limits() {
        let source = |size: Option<&str>| EmptyDirVolumeSource {
            size_limit: size.map(|size| k8s_openapi::apimachinery::pkg::api::resource::Quantity(size.into())),
            ..Default::default()
        };
        let limited = pod(json!({"containers": [{"name": "c", "resources": {"limits": {"memory": "2Mi"}}}]}));
        let free = pod(json!({"containers": [{"name": "c"}]}));
        assert_eq!(memory_size(&source(Some("1Mi")), &limited), Some(1 << 20));
        assert_eq!(memory_size(&source(Some("4Mi")), &limited), Some(2 << 20));
        assert_eq!(memory_size(&source(None), &limited), Some(2 << 20));
        assert_eq!(memory_size(&source(None), &free), None);
    }
}
