//! Pods from manifests on disk, and their mirrors in the API.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Annotations that say where a pod comes from and what it mirrors.
pub const CONFIG_SOURCE: &str = "kubernetes.io/config.source";
pub const CONFIG_HASH: &str = "kubernetes.io/config.hash";
pub const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";
pub const CONFIG_SEEN: &str = "kubernetes.io/config.seen";

/// Whether a pod comes from a manifest on this node.
pub fn is_static(pod: &Pod) -> bool {
    let source = pod.metadata.annotations.as_ref().and_then(|a| a.get(CONFIG_SOURCE));
    source.is_some_and(|s| s != "api")
}

/// Whether an API pod mirrors a static pod.
pub fn is_mirror(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(CONFIG_MIRROR))
}

/// Watches a manifest directory or file: the receiver always holds the whole set (defaulted, named `<name>-<node>`, UID =
/// hash, bound to this node). A file that cannot be read keeps its last good pod.
pub fn watch(
    _path: PathBuf,
    _node_name: &str,
    _period: Duration,
    _shutdown: CancellationToken,
) -> watch::Receiver<Arc<Vec<Pod>>> {
    watch::channel(Arc::new(Vec::new())).1
}

/// Keeps the mirror of a static pod in the API in step.
pub struct Mirrors {
    _client: kube::Client,
}

impl Mirrors {
    pub fn new(client: kube::Client, _node_name: &str) -> Self {
        Self { _client: client }
    }

    /// Creates the mirror of `static_pod`, replacing one of another hash. `existing` is the API's pod of that name, if any.
    pub async fn ensure(&self, _static_pod: &Pod, _existing: Option<&Pod>) -> Result<(), kube::Error> {
        Ok(())
    }

    /// Deletes (grace 0) a mirror whose static pod is gone.
    pub async fn delete(&self, _mirror: &Pod) -> Result<(), kube::Error> {
        Ok(())
    }
}
