//! The kubelet's HTTPS server.

use std::path::PathBuf;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::config::KubeletConfiguration;
use crate::pod_workers::PodWorkers;
use crate::runtime::{Runtime, RuntimeWatch};

/// What the server shows and does things with.
pub struct Parts {
    pub config: Arc<KubeletConfiguration>,
    pub workers: Arc<PodWorkers>,
    pub runtime: Arc<Runtime>,
    pub watch: Arc<RuntimeWatch>,
    pub client: Option<kube::Client>,
    pub node_name: String,
}

/// Serves until shutdown.
pub async fn serve(_parts: Parts, _serving: (PathBuf, PathBuf), shutdown: CancellationToken) -> anyhow::Result<()> {
    shutdown.cancelled().await;
    Ok(())
}
