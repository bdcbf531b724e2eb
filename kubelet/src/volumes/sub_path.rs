//! `subPath` of a volume mount. What lies in a volume is the pod's to change, symlinks included, also while we look. So the path
//! is opened by the kernel beneath the volume (`openat2` with `RESOLVE_BENEATH`), and what was opened is bind-mounted from
//! its descriptor: no name is resolved a second time. The mounts are at `volume-subpaths/<volume>/<container>/<index>`.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat, mkdirat};

use super::mounts;

/// Make `sub_path` of `volume` appear at `target`; a directory that is missing is made. Idempotent: what `target` shows
/// already stays, what has been replaced in the volume since is mounted anew.
pub(super) fn prepare(volume: &Path, sub_path: &str, target: &Path, read_only: bool) -> io::Result<()> {
    let relative = checked(sub_path)?;
    let opened = match open_beneath(volume, &relative) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !read_only => make_directories(volume, &relative)?,
        other => other?,
    };
    let meta = fstat(&opened)?;
    let is_directory = SFlag::from_bits_truncate(meta.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFDIR;
    if mounts::is_mount_point(target)? {
        let shown = fs::metadata(target)?;
        if (shown.dev(), shown.ino()) == (meta.st_dev, meta.st_ino) {
            return Ok(());
        }
        mounts::unmount(target)?;
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    if is_directory {
        match fs::symlink_metadata(target) {
            Ok(found) if !found.is_dir() => fs::remove_file(target)?,
            _ => {}
        }
        fs::create_dir_all(target)?;
    } else {
        match fs::symlink_metadata(target) {
            Ok(found) if found.is_dir() => fs::remove_dir(target)?,
            _ => {}
        }
        fs::OpenOptions::new().write(true).create(true).truncate(false).open(target)?;
    }
    mounts::bind(&PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd())), target)
}

/// A relative path without `..`.
fn checked(sub_path: &str) -> io::Result<PathBuf> {
    let path = Path::new(sub_path);
    let inside = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !inside {
        return Err(io::Error::other(format!("subPath {sub_path:?} must be a relative path without \"..\"")));
    }
    let normal: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    Ok(if normal.as_os_str().is_empty() { PathBuf::from(".") } else { normal })
}

fn open_volume(volume: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open(volume, flags, Mode::empty())?)
}

fn beneath(directory: impl AsFd, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(directory, path, how).map_err(|error| match error {
        Errno::EXDEV | Errno::ELOOP => io::Error::other(format!("subPath {} leads out of the volume", path.display())),
        other => other.into(),
    })
}

fn open_beneath(volume: &Path, relative: &Path) -> io::Result<OwnedFd> {
    beneath(open_volume(volume)?, relative, OFlag::O_PATH)
}

/// A file's first `limit` bytes; None if there is none.
pub(super) fn read(volume: &Path, relative: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
    use std::io::Read as _;
    let opened = match beneath(open_volume(volume)?, &checked(relative)?, OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => fs::File::from(other?),
    };
    if !opened.metadata()?.is_file() {
        return Err(io::Error::other(format!("{relative:?} is not a file")));
    }
    let mut data = Vec::new();
    opened.take(limit).read_to_end(&mut data)?;
    Ok(Some(data))
}

/// Make the missing directories of `relative`, one at a time below a descriptor, with the mode of the volume.
fn make_directories(volume: &Path, relative: &Path) -> io::Result<OwnedFd> {
    let root = open_volume(volume)?;
    let mode = Mode::from_bits_truncate(fstat(&root)?.st_mode & 0o7777);
    let mut reached = PathBuf::new();
    for part in relative.components() {
        let parent = if reached.as_os_str().is_empty() {
            beneath(&root, Path::new("."), OFlag::O_PATH | OFlag::O_DIRECTORY)?
        } else {
            beneath(&root, &reached, OFlag::O_PATH | OFlag::O_DIRECTORY)?
        };
        match mkdirat(&parent, part.as_os_str(), Mode::from_bits_truncate(mode.bits() & 0o777)) {
            Ok(()) => {
                let made = beneath(
                    &parent,
                    Path::new(part.as_os_str()),
                    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW,
                )?;
                // Regardless of the umask.
                fchmod(&made, mode)?;
            }
            Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        reached.push(part);
    }
    beneath(&root, relative, OFlag::O_PATH)
}

/// Unmount and remove every subPath of the pod. Only what was made by [`prepare`] is removed: never a directory's contents.
pub(super) fn remove_all(subpaths: &Path) -> io::Result<()> {
    mounts::unmount_below(subpaths)?;
    let volumes = match fs::read_dir(subpaths) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for volume in volumes {
        let volume = volume?.path();
        for container in fs::read_dir(&volume)? {
            let container = container?.path();
            for mounted in fs::read_dir(&container)? {
                let mounted = mounted?;
                if mounted.file_type()?.is_dir() {
                    fs::remove_dir(mounted.path())?;
                } else {
                    fs::remove_file(mounted.path())?;
                }
            }
            fs::remove_dir(&container)?;
        }
        fs::remove_dir(&volume)?;
    }
    fs::remove_dir(subpaths)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn paths_that_leave_the_volume_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let volume = dir.path().join("volume");
        fs::create_dir(&volume).expect("a directory");
        fs::create_dir(dir.path().join("outside")).expect("a directory");
        symlink("../outside", volume.join("relative")).expect("a link");
        symlink("/etc", volume.join("absolute")).expect("a link");
        symlink("loop", volume.join("loop")).expect("a link");
        for bad in ["..", "a/../..", "/etc", "relative", "absolute", "absolute/passwd", "loop", "relative/new"] {
            let target = dir.path().join("target");
            assert!(prepare(&volume, bad, &target, false).is_err(), "{bad}");
            assert!(!target.exists(), "{bad}");
        }
        assert!(fs::read_dir(dir.path().join("outside")).expect("a directory").next().is_none());
    }

    #[test]
    fn sub_paths_are_mounted_and_removed_but_never_their_contents() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let volume = dir.path().join("volume");
        fs::create_dir_all(volume.join("data")).expect("a directory");
        fs::write(volume.join("data/file"), "one").expect("a file");
        symlink("data", volume.join("link")).expect("a link");
        let subpaths = dir.path().join("volume-subpaths");
        let target = |index: &str| subpaths.join("v/c").join(index);

        prepare(&volume, "link/file", &target("0"), false).expect("a file through an inner link");
        assert_eq!(fs::read_to_string(target("0")).expect("read"), "one");
        prepare(&volume, "new/deep", &target("1"), false).expect("made");
        fs::write(target("1").join("x"), "y").expect("written through the mount");
        assert!(volume.join("new/deep/x").exists());
        assert!(prepare(&volume, "absent", &target("2"), true).is_err(), "a read-only mount makes nothing");

        // Again: the same mount stays; a replaced file is mounted anew.
        prepare(&volume, "data/file", &target("0"), false).expect("again");
        fs::write(volume.join("data/other"), "two").expect("a file");
        fs::rename(volume.join("data/other"), volume.join("data/file")).expect("replaced");
        prepare(&volume, "data/file", &target("0"), false).expect("anew");
        assert_eq!(fs::read_to_string(target("0")).expect("read"), "two");

        remove_all(&subpaths).expect("removed");
        assert!(!subpaths.exists() && volume.join("new/deep/x").exists() && volume.join("data/file").exists());
        remove_all(&subpaths).expect("twice is fine");
    }

    proptest::proptest! {
        /// Whatever links a pod makes in its volume, and whatever path is asked for: nothing outside is opened.
        #[test]
        fn no_path_leads_out(links in proptest::collection::vec(("[ab/.]{1,6}", "[ab/.]{1,12}"), 0..4), path in "[ab/.]{1,8}") {
            let dir = tempfile::tempdir().expect("a directory");
            let volume = dir.path().join("volume");
            fs::create_dir_all(volume.join("a/b")).expect("a directory");
            for (name, target) in links {
                let name = name.replace(['/', '.'], "");
                if !name.is_empty() {
                    let _taken = symlink(target, volume.join(name));
                }
            }
            if let Ok(opened) = checked(&path).and_then(|relative| open_beneath(&volume, &relative)) {
                let found = fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd())).expect("a path");
                proptest::prop_assert!(found.starts_with(volume.canonicalize().expect("a path")), "{:?}", found);
            }
        }
    }
}
