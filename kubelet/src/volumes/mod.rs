//! A pod's volumes: prepared under the pod's directory, refreshed while it runs, taken away after it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod};
use proto::cri as pb;

/// Where a prepared volume is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountSource {
    pub path: PathBuf,
    /// The volume itself forbids writing (configMap, secret, projected, …).
    pub read_only: bool,
}

/// Why volumes cannot be prepared (event reason FailedMount).
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("volume {volume:?}: {reason}")]
    Setup { volume: String, reason: String },
    /// A subPath or mount that the container may not have: CreateContainerConfigError.
    #[error("{0}")]
    Mount(String),
}

/// The volumes of all pods on this node. Without a client (standalone) API-backed volumes are errors.
pub struct Volumes {
    _client: Option<kube::Client>,
}

impl Volumes {
    pub fn new(client: Option<kube::Client>, _node_name: &str) -> Self {
        Self { _client: client }
    }

    /// Prepares all volumes of the pod below `pod_dir` (`<root>/pods/<uid>`). Idempotent: called at each start and
    /// again while the pod runs (about each minute), when configMaps, secrets, tokens and downward items are refreshed.
    pub async fn mount_pod(&self, _pod: &Pod, _pod_dir: &Path) -> Result<BTreeMap<String, MountSource>, VolumeError> {
        Ok(BTreeMap::new())
    }

    /// The CRI mounts of one container's volumeMounts (subPath, subPathExpr, readOnly, propagation). `envs` is what
    /// `env::make` gave, for subPathExpr.
    pub async fn container_mounts(
        &self,
        _pod: &Pod,
        _container: &Container,
        _envs: &[(String, String)],
        _sources: &BTreeMap<String, MountSource>,
        _pod_dir: &Path,
    ) -> Result<Vec<pb::Mount>, VolumeError> {
        Ok(Vec::new())
    }

    /// Unmounts and removes all volumes below `pod_dir`. Idempotent; called once no container runs any more, and for
    /// directories of pods that are long gone.
    pub async fn unmount_pod(&self, _uid: &str, _pod_dir: &Path) -> Result<(), VolumeError> {
        Ok(())
    }
}
