//! How much of a disk a directory holds.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Entries that are counted at most: a directory beyond that is told as what was seen.
const MAX_ENTRIES: usize = 2_000_000;
const BLOCK_BYTES: u64 = 512;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskUsage {
    pub bytes: u64,
    pub inodes: u64,
}

impl DiskUsage {
    pub fn plus(self, other: DiskUsage) -> DiskUsage {
        DiskUsage { bytes: self.bytes + other.bytes, inodes: self.inodes + other.inodes }
    }
}

/// Counts what is below `directory`, on its own file system; a file with several names once.
pub fn walk(directory: &Path) -> DiskUsage {
    let Ok(top) = fs::symlink_metadata(directory) else { return DiskUsage::default() };
    let mut total = DiskUsage { bytes: top.blocks() * BLOCK_BYTES, inodes: 1 };
    let mut linked = HashSet::new();
    let mut pending = vec![directory.to_path_buf()];
    let mut entries = 0;
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            entries += 1;
            let Ok(meta) = entry.metadata() else { continue };
            if meta.dev() != top.dev() || meta.nlink() > 1 && !meta.is_dir() && !linked.insert(meta.ino()) {
                continue;
            }
            total = total.plus(DiskUsage { bytes: meta.blocks() * BLOCK_BYTES, inodes: 1 });
            if meta.is_dir() {
                pending.push(entry.path());
            }
        }
        if entries > MAX_ENTRIES {
            break;
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_with_two_names_count_once() {
        let dir = tempfile::tempdir().unwrap();
        let sub = dir.path().join("sub");
        fs::create_dir(&sub).unwrap();
        fs::write(sub.join("a"), vec![1; 100_000]).unwrap();
        fs::hard_link(sub.join("a"), dir.path().join("b")).unwrap();
        let found = walk(dir.path());
        assert_eq!(found.inodes, 3);
        assert!((100_000..200_000).contains(&found.bytes), "{found:?}");
        assert_eq!(walk(&dir.path().join("none")), DiskUsage::default());
    }
}
