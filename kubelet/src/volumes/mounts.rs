//! The mount table, and the few mounts that volumes need. The kernel's table is the state: what is mounted is read from it,
//! never remembered.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Attempts at an unmount that finds its mount in use, and the pause between them.
const BUSY_ATTEMPTS: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// Every mount point, in the order in which they were mounted.
pub(super) fn mount_points() -> io::Result<Vec<PathBuf>> {
    fs::read("/proc/self/mountinfo").map(|table| parse_mountinfo(&table))
}

/// The mount points (fifth field) of a `mountinfo` table.
fn parse_mountinfo(table: &[u8]) -> Vec<PathBuf> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|field| PathBuf::from(OsString::from_vec(unescape(field))))
        .collect()
}

/// The kernel writes blank, tab, newline and backslash as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let octal = field
            .get(at + 1..at + 4)
            .filter(|digits| field[at] == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        match octal {
            Some(digits) => {
                plain.push(digits.iter().fold(0u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')));
                at += 4;
            }
            None => {
                plain.push(field[at]);
                at += 1;
            }
        }
    }
    plain
}

/// Whether files at `path` can have SELinux labels of their own. As `GetSELinuxSupport`.
pub(super) fn takes_labels(path: &Path) -> bool {
    fs::read("/proc/self/mountinfo").is_ok_and(|table| has_option(&table, path, b"seclabel"))
}

/// Whether the mount that holds `path`, the last one of those nearest to it, has an option.
fn has_option(table: &[u8], path: &Path, option: &[u8]) -> bool {
    let mounts = table.split(|byte| *byte == b'\n').zip(parse_mountinfo(table));
    let holding = mounts.filter(|(_, at)| path.starts_with(at)).max_by_key(|(_, at)| at.components().count());
    holding.is_some_and(|(line, _)| line.split(|byte| matches!(byte, b' ' | b',')).any(|word| word == option))
}

/// Whether something is mounted exactly at `path`.
pub(super) fn is_mount_point(path: &Path) -> io::Result<bool> {
    let path = match path.canonicalize() {
        Ok(path) => path,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    Ok(mount_points()?.contains(&path))
}

/// Whether a file system of its own is mounted at `path`: one look at it, where the whole table takes long on a node of many pods.
pub(super) fn has_own_file_system(path: &Path) -> io::Result<bool> {
    let device = |path: &Path| match fs::metadata(path) {
        Ok(meta) => Ok(Some(meta.dev())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    let parent = path.parent().map_or(Ok(None), device)?;
    Ok(device(path)?.is_some_and(|own| parent.is_some_and(|parent| own != parent)))
}

/// Mount a tmpfs at `path` (which exists), of at most `size_bytes`, that is never swapped out where the kernel can promise it.
pub(super) fn mount_tmpfs(path: &Path, size_bytes: Option<i64>) -> io::Result<()> {
    let size = size_bytes.map(|size| format!("size={size}")).unwrap_or_default();
    let attempt = |options: &str| {
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(options).filter(|options| !options.is_empty()))
    };
    let without_swap = if size.is_empty() { "noswap".to_owned() } else { format!("{size},noswap") };
    match attempt(&without_swap) {
        // Kernels before 6.4 do not know `noswap`.
        Err(Errno::EINVAL) => attempt(&size).map_err(io::Error::from),
        other => other.map_err(io::Error::from),
    }
}

/// Mount huge pages of a size (`2Mi`) at `path`.
pub(super) fn mount_huge_pages(path: &Path, size: &str) -> io::Result<()> {
    // The kernel writes sizes without the i, and counts them in powers of two all the same.
    let options = format!("pagesize={}", size.trim_end_matches('i'));
    mount(Some("nodev"), path, Some("hugetlbfs"), MsFlags::empty(), Some(options.as_str())).map_err(io::Error::from)
}

/// Make what `source` shows appear at `target` too.
pub(super) fn bind(source: &Path, target: &Path) -> io::Result<()> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(io::Error::from)
}

/// Unmount `path`. That nothing is mounted there is no error.
pub(super) fn unmount(path: &Path) -> io::Result<()> {
    for _ in 0..BUSY_ATTEMPTS {
        match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(Errno::EBUSY) => std::thread::sleep(BUSY_PAUSE),
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EBUSY.into())
}

/// Unmount everything below `directory`, the latest mount first; when this returns, the table shows nothing there any more.
pub(super) fn unmount_below(directory: &Path) -> io::Result<()> {
    let directory = match directory.canonicalize() {
        Ok(path) => path,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let below = |mounts: Vec<PathBuf>| {
        mounts.into_iter().filter(|path| path.starts_with(&directory) && *path != directory).collect::<Vec<_>>()
    };
    let mounted = below(mount_points()?);
    if mounted.is_empty() {
        return Ok(());
    }
    for path in mounted.iter().rev() {
        unmount(path)
            .map_err(|error| io::Error::new(error.kind(), format!("unmounting {}: {error}", path.display())))?;
    }
    match below(mount_points()?).first() {
        None => Ok(()),
        Some(path) => Err(io::Error::other(format!("{} is still mounted", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_from_the_table() {
        let table = b"22 1 0:20 / / rw - ext4 /dev/a rw\n30 22 0:25 / /a\\040b\\134c rw,shared:1 - tmpfs tmpfs rw\n\n";
        assert_eq!(parse_mountinfo(table), [PathBuf::from("/"), PathBuf::from("/a b\\c")]);
    }

    #[test]
    fn labels_are_taken_where_the_nearest_mount_says_so() {
        let table = b"22 1 0:20 / / rw,seclabel - ext4 /dev/a rw,seclabel\n30 22 0:25 / /a rw - nfs4 h:/ rw\n\
            31 30 0:26 / /a/b rw - tmpfs tmpfs rw,seclabel,size=4k\n";
        let takes = |path: &str| has_option(table, Path::new(path), b"seclabel");
        assert_eq!(["/etc/x", "/a", "/a/c", "/a/b", "/ab"].map(takes), [true, false, false, true, true]);
    }

    #[test]
    fn a_tmpfs_comes_and_goes() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let volume = dir.path().join("v w");
        fs::create_dir(&volume).expect("a directory");
        mount_tmpfs(&volume, Some(1 << 20)).expect("mounted");
        assert!(is_mount_point(&volume).expect("the table") && has_own_file_system(&volume).expect("a look"));
        assert!(fs::write(volume.join("big"), vec![0u8; 2 << 20]).is_err(), "the size is kept");
        unmount_below(dir.path()).expect("unmounted");
        assert!(!is_mount_point(&volume).expect("the table") && !has_own_file_system(&volume).expect("a look"));
        unmount(&volume).expect("twice is fine");
    }
}
