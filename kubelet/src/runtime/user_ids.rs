//! User namespaces: each pod that wants one (`hostUsers: false`) has a range of the node's user and group IDs of its own, written
//! into its directory (`userns`, as Kubernetes does), and given back with it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use k8s_openapi::api::core::v1::Pod;
use parking_lot::Mutex;
use proto::cri as pb;
use serde_json::{Value, json};

const FILE: &str = "userns";
/// How long a range is where `userNamespaces.idsPerPod` does not say; it is a multiple of this.
pub const LENGTH: u32 = 65_536;

/// The ranges that pods have.
#[derive(Debug)]
pub struct UserIds {
    /// IDs of a range that is new.
    length: u32,
    taken: Mutex<BTreeMap<String, IdRange>>,
}

/// A pod's range of the node's IDs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    first: u32,
    length: u32,
}

/// Whether a pod has IDs of its own.
pub fn wanted(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|s| s.host_users) == Some(false)
}

// === impl UserIds ===

impl UserIds {
    /// With the ranges of the pods that are on disk.
    pub fn read(pods: &Path, length: u32) -> UserIds {
        let entries = fs::read_dir(pods).into_iter().flatten().flatten();
        let range = |entry: fs::DirEntry| {
            let uid = entry.file_name().into_string().ok()?;
            let saved: Value = serde_json::from_slice(&fs::read(entry.path().join(FILE)).ok()?).ok()?;
            let number = |field: &str| u32::try_from(saved["uidMappings"][0][field].as_u64()?).ok();
            Some((uid, IdRange { first: number("hostId")?, length: number("length")? }))
        };
        UserIds { length, taken: Mutex::new(entries.filter_map(range).collect()) }
    }

    /// The pod's range; it gets one when it has none.
    pub fn of(&self, uid: &str, pod_dir: &Path) -> io::Result<IdRange> {
        let mut taken = self.taken.lock();
        if let Some(range) = taken.get(uid) {
            return Ok(*range);
        }
        let length = self.length;
        // The node's own IDs come before; the last IDs are nobody's.
        let mut ranges = (1..u32::MAX / length).map(|n| IdRange { first: n * length, length });
        let free = ranges.find(|range| !taken.values().any(|taken| taken.overlaps(range)));
        let range = free.ok_or_else(|| io::Error::other("no range of user IDs is free"))?;
        let mapping = json!([{"hostId": range.first, "containerId": 0, "length": length}]);
        fs::create_dir_all(pod_dir)?;
        fs::write(pod_dir.join(FILE), json!({"uidMappings": mapping, "gidMappings": mapping}).to_string())?;
        taken.insert(uid.to_owned(), range);
        Ok(range)
    }

    pub fn forget(&self, uid: &str) {
        self.taken.lock().remove(uid);
    }
}

// === impl IdRange ===

impl IdRange {
    fn overlaps(&self, other: &IdRange) -> bool {
        let end = |range: &IdRange| u64::from(range.first) + u64::from(range.length);
        u64::from(self.first) < end(other) && u64::from(other.first) < end(self)
    }

    pub fn mappings(self) -> Vec<pb::IdMapping> {
        vec![pb::IdMapping { host_id: self.first, container_id: 0, length: self.length }]
    }

    pub fn namespace(self) -> pb::UserNamespace {
        pb::UserNamespace { mode: pb::NamespaceMode::Pod as i32, uids: self.mappings(), gids: self.mappings() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_apart_and_outlive_the_kubelet() {
        let pods = tempfile::tempdir().unwrap();
        let ids = UserIds::read(pods.path(), LENGTH);
        let of = |ids: &UserIds, uid: &str| ids.of(uid, &pods.path().join(uid)).unwrap().mappings()[0].host_id;
        assert_eq!((of(&ids, "a"), of(&ids, "b"), of(&ids, "a")), (LENGTH, 2 * LENGTH, LENGTH));
        let restarted = UserIds::read(pods.path(), LENGTH);
        assert_eq!((of(&restarted, "c"), of(&restarted, "b")), (3 * LENGTH, 2 * LENGTH));
        restarted.forget("a");
        assert_eq!(of(&restarted, "d"), LENGTH);
        // Longer ones begin where none of the others is.
        let longer = UserIds::read(pods.path(), 2 * LENGTH);
        assert_eq!((of(&longer, "e"), of(&longer, "b")), (4 * LENGTH, 2 * LENGTH));
        assert_eq!(longer.of("e", pods.path()).unwrap().mappings()[0].length, 2 * LENGTH);
    }
}
