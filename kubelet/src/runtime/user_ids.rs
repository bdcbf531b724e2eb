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
/// As `userNamespaces.idsPerPod`.
const LENGTH: u32 = 65_536;
/// The node's own IDs come before.
const FIRST: u32 = LENGTH;
const MOST_RANGES: u32 = 32_000;

/// The ranges that pods have: their first ID by pod.
#[derive(Debug, Default)]
pub struct UserIds {
    taken: Mutex<BTreeMap<String, u32>>,
}

/// A pod's range, which begins with this ID of the node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange(u32);

/// Whether a pod has IDs of its own.
pub fn wanted(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|s| s.host_users) == Some(false)
}

// === impl UserIds ===

impl UserIds {
    /// With the ranges of the pods that are on disk.
    pub fn read(pods: &Path) -> UserIds {
        let entries = fs::read_dir(pods).into_iter().flatten().flatten();
        let range = |entry: fs::DirEntry| {
            let uid = entry.file_name().into_string().ok()?;
            let saved: Value = serde_json::from_slice(&fs::read(entry.path().join(FILE)).ok()?).ok()?;
            Some((uid, u32::try_from(saved["uidMappings"][0]["hostId"].as_u64()?).ok()?))
        };
        UserIds { taken: Mutex::new(entries.filter_map(range).collect()) }
    }

    /// The pod's range; it gets one when it has none.
    pub fn of(&self, uid: &str, pod_dir: &Path) -> io::Result<IdRange> {
        let mut taken = self.taken.lock();
        if let Some(first) = taken.get(uid) {
            return Ok(IdRange(*first));
        }
        let free = (0..MOST_RANGES).map(|n| FIRST + n * LENGTH).find(|first| !taken.values().any(|t| t == first));
        let first = free.ok_or_else(|| io::Error::other("no range of user IDs is free"))?;
        let mapping = json!([{"hostId": first, "containerId": 0, "length": LENGTH}]);
        fs::create_dir_all(pod_dir)?;
        fs::write(pod_dir.join(FILE), json!({"uidMappings": mapping, "gidMappings": mapping}).to_string())?;
        taken.insert(uid.to_owned(), first);
        Ok(IdRange(first))
    }

    pub fn forget(&self, uid: &str) {
        self.taken.lock().remove(uid);
    }
}

// === impl IdRange ===

impl IdRange {
    pub fn mappings(self) -> Vec<pb::IdMapping> {
        vec![pb::IdMapping { host_id: self.0, container_id: 0, length: LENGTH }]
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
        let ids = UserIds::read(pods.path());
        let of = |ids: &UserIds, uid: &str| ids.of(uid, &pods.path().join(uid)).unwrap().mappings()[0].host_id;
        assert_eq!((of(&ids, "a"), of(&ids, "b"), of(&ids, "a")), (LENGTH, 2 * LENGTH, LENGTH));
        let restarted = UserIds::read(pods.path());
        assert_eq!((of(&restarted, "c"), of(&restarted, "b")), (3 * LENGTH, 2 * LENGTH));
        restarted.forget("a");
        assert_eq!(of(&restarted, "d"), LENGTH);
    }
}
