//! The node's certificates: TLS bootstrap and rotation of the client's, serving certificate of the kubelet.

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

use crate::config::KubeletConfiguration;
use crate::options::Flags;

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("{0}")]
    Failed(String),
}

/// The client configuration of the node's identity: `--kubeconfig`, or, where that file is not there yet, one made by
/// asking with `--bootstrap-kubeconfig` (and written to `--kubeconfig`). None: standalone. Starts the renewal task.
pub async fn client(
    _flags: &Flags,
    _config: &KubeletConfiguration,
    _node_name: &str,
    _shutdown: CancellationToken,
) -> Result<Option<kube::Config>, CertificateError> {
    Ok(None)
}

/// Files of the serving certificate: as configured, from the API (`serverTLSBootstrap`), or self-signed in `--cert-dir`.
pub async fn serving(
    _flags: &Flags,
    _config: &KubeletConfiguration,
    _client: Option<&kube::Client>,
    _node_name: &str,
    _addresses: &[String],
    _shutdown: CancellationToken,
) -> Result<(PathBuf, PathBuf), CertificateError> {
    Err(CertificateError::Failed("no serving certificate".to_owned()))
}
