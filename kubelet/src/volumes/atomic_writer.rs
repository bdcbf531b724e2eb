//! Writes a set of files so that a reader sees the old set or the new one, never a mixture. As Kubernetes' `AtomicWriter`.
//!
//! The files live in a directory named by the time; `..data` is a symlink to it, replaced by rename; each top-level name is a
//! symlink through `..data`. Nothing is touched when nothing changed. A crash at any point leaves a consistent volume, and the
//! next write takes away what the crash left over.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use super::payload::Payload;

const DATA: &str = "..data";
const DATA_TMP: &str = "..data_tmp";

/// Make `volume` hold exactly `payload`, with `fs_group` as its group. Returns whether anything was written.
pub(super) fn write(volume: &Path, payload: &Payload, fs_group: Option<u32>) -> io::Result<bool> {
    let data = volume.join(DATA);
    let current = match fs::read_link(&data) {
        Ok(target) => Some(volume.join(target)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    if let Some(current) = &current
        && is_current(current, payload, fs_group)
    {
        // A crash may have come between the swap and the links.
        link_names(volume, payload)?;
        remove_old(volume, payload, current)?;
        return Ok(false);
    }
    let stamped = volume.join(format!("..{}", timestamp()));
    fs::DirBuilder::new().mode(0o755).create(&stamped)?;
    set_directory(&stamped, fs_group)?;
    for (path, file) in payload {
        let target = stamped.join(path);
        if let Some(parent) = Path::new(path).parent() {
            make_parents(&stamped, parent, fs_group)?;
        }
        let mode = effective_mode(file.mode, fs_group);
        let mut created = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&target)?;
        created.write_all(&file.data)?;
        if file.uid.is_some() || fs_group.is_some() {
            chown(&target, file.uid, fs_group)?;
        }
        // After the owner, and regardless of the umask.
        created.set_permissions(fs::Permissions::from_mode(mode))?;
    }
    let temporary = volume.join(DATA_TMP);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let name = stamped.file_name().map(PathBuf::from).unwrap_or_default();
    symlink(&name, &temporary)?;
    fs::rename(&temporary, &data)?;
    link_names(volume, payload)?;
    remove_old(volume, payload, &stamped)?;
    Ok(true)
}

/// The mode of a file that a group may read. As `SetVolumeOwnership` of a read-only volume.
fn effective_mode(mode: u32, fs_group: Option<u32>) -> u32 {
    if fs_group.is_some() { mode | 0o440 } else { mode }
}

fn set_directory(path: &Path, fs_group: Option<u32>) -> io::Result<()> {
    let mut mode = 0o755;
    if let Some(group) = fs_group {
        chown(path, None, Some(group))?;
        mode |= 0o2550;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

fn make_parents(root: &Path, relative: &Path, fs_group: Option<u32>) -> io::Result<()> {
    let mut path = root.to_path_buf();
    for part in relative.components() {
        path.push(part);
        match fs::create_dir(&path) {
            Ok(()) => set_directory(&path, fs_group)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether the directory holds exactly the payload: paths, contents, modes, owners.
fn is_current(directory: &Path, payload: &Payload, fs_group: Option<u32>) -> bool {
    let mut present = BTreeSet::new();
    if list_files(directory, Path::new(""), &mut present).is_err() {
        return false;
    }
    let wanted: BTreeSet<PathBuf> = payload.keys().map(|path| normalized(path)).collect();
    present == wanted
        && payload.iter().all(|(path, file)| {
            let path = directory.join(path);
            let Ok(meta) = fs::symlink_metadata(&path) else { return false };
            meta.mode() & 0o7777 == effective_mode(file.mode, fs_group)
                && fs_group.is_none_or(|group| meta.gid() == group)
                && file.uid.is_none_or(|uid| meta.uid() == uid)
                && meta.len() == file.data.len() as u64
                && fs::read(&path).is_ok_and(|data| data == file.data)
        })
}

fn normalized(path: &str) -> PathBuf {
    Path::new(path).components().filter(|part| !matches!(part, std::path::Component::CurDir)).collect()
}

fn list_files(root: &Path, relative: &Path, found: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(relative))? {
        let entry = entry?;
        let path = relative.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            list_files(root, &path, found)?;
        } else {
            found.insert(path);
        }
    }
    Ok(())
}

/// The names that a user sees: the first component of each path.
fn top_names(payload: &Payload) -> BTreeSet<PathBuf> {
    payload
        .keys()
        .filter_map(|path| normalized(path).components().next().map(|part| PathBuf::from(part.as_os_str())))
        .collect()
}

fn link_names(volume: &Path, payload: &Payload) -> io::Result<()> {
    for name in top_names(payload) {
        let link = volume.join(&name);
        let target = Path::new(DATA).join(&name);
        match fs::read_link(&link) {
            Ok(existing) if existing == target => continue,
            Ok(_) => fs::remove_file(&link)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        symlink(target, link)?;
    }
    Ok(())
}

/// Take away links to names that are gone, and every stamped directory but the present one.
fn remove_old(volume: &Path, payload: &Payload, current: &Path) -> io::Result<()> {
    let wanted = top_names(payload);
    for entry in fs::read_dir(volume)? {
        let entry = entry?;
        let name = PathBuf::from(entry.file_name());
        let path = entry.path();
        let text = entry.file_name().to_string_lossy().into_owned();
        if text == DATA {
            continue;
        }
        let kind = entry.file_type()?;
        if text.starts_with("..") {
            if kind.is_dir() && path != current {
                fs::remove_dir_all(&path)?;
            }
        } else if kind.is_symlink() && !wanted.contains(&name) && fs::read_link(&path)?.starts_with(DATA) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// `2026_11_21_04_00_00.123456789`: unique, and readable as the time of the write.
fn timestamp() -> String {
    jiff::Timestamp::now().strftime("%Y_%m_%d_%H_%M_%S.%9f").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::payload::FileProjection;

    fn payload(files: &[(&str, &str, u32)]) -> Payload {
        let file = |data: &str, mode| FileProjection { data: data.as_bytes().to_vec(), mode, uid: None };
        files.iter().map(|(path, data, mode)| ((*path).to_owned(), file(data, *mode))).collect()
    }

    fn names(directory: &Path) -> BTreeSet<String> {
        fs::read_dir(directory)
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .filter(|name| !name.starts_with("..2"))
            .collect()
    }

    #[test]
    fn files_are_swapped_as_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        assert!(write(root, &payload(&[("a", "1", 0o644), ("d/b", "2", 0o400)]), None).expect("written"));
        assert_eq!(fs::read_to_string(root.join("d/b")).expect("a file"), "2");
        assert_eq!(fs::metadata(root.join("d/b")).expect("meta").mode() & 0o777, 0o400);
        let first = fs::read_link(root.join("..data")).expect("a link");

        assert!(!write(root, &payload(&[("a", "1", 0o644), ("d/b", "2", 0o400)]), None).expect("unchanged"));
        assert_eq!(fs::read_link(root.join("..data")).expect("a link"), first);

        assert!(write(root, &payload(&[("a", "new", 0o644), ("e", "3", 0o644)]), None).expect("written"));
        assert_eq!(fs::read_to_string(root.join("a")).expect("a file"), "new");
        assert_eq!(names(root), BTreeSet::from(["..data".into(), "a".into(), "e".into()]));
        assert!(!root.join(first).exists());

        assert!(write(root, &payload(&[("a", "new", 0o600), ("e", "3", 0o644)]), None).expect("a mode is a change"));
    }

    #[test]
    fn leftovers_of_a_crash_go() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path();
        write(root, &payload(&[("a", "1", 0o644)]), None).expect("written");
        fs::create_dir_all(root.join("..2001_01_01_00_00_00.000000000/x")).expect("a leftover");
        symlink("..2001", root.join(DATA_TMP)).expect("a leftover");
        fs::remove_file(root.join("a")).expect("a lost link");
        assert!(!write(root, &payload(&[("a", "1", 0o644)]), None).expect("unchanged"));
        assert_eq!(fs::read_to_string(root.join("a")).expect("a file"), "1");
        write(root, &payload(&[("a", "2", 0o644)]), None).expect("written over the leftover link");
        assert_eq!(fs::read_dir(root).expect("a directory").count(), 3);
    }

    #[test]
    fn an_empty_payload_is_a_volume_too() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(write(dir.path(), &Payload::new(), None).expect("written"));
        assert_eq!(names(dir.path()), BTreeSet::from(["..data".into()]));
    }

    #[test]
    fn the_group_owns_and_reads() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        assert!(write(dir.path(), &payload(&[("d/a", "1", 0o600)]), Some(4321)).expect("written"));
        let meta = fs::metadata(dir.path().join("d/a")).expect("meta");
        assert_eq!((meta.gid(), meta.mode() & 0o7777), (4321, 0o640));
        let meta = fs::metadata(dir.path().join("d")).expect("meta");
        assert_eq!((meta.gid(), meta.mode() & 0o7777), (4321, 0o2755));
        assert!(!write(dir.path(), &payload(&[("d/a", "1", 0o600)]), Some(4321)).expect("unchanged"));
    }
}
