//! `ctl bootstrap remove-pods`: has the container runtime stop and remove every pod sandbox, which also takes down the
//! pods' networks. As `kubeadm reset` does.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use proto::cri;
use proto::cri::runtime_service_client::RuntimeServiceClient;
use tonic::transport::{Channel, Endpoint, Uri};

/// The time that stopping or removing one sandbox may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Removes all pods; returns how many there were.
pub(crate) async fn remove_all(endpoint: &str) -> Result<usize> {
    let mut runtime = RuntimeServiceClient::new(connect(endpoint).await?);
    let sandboxes = runtime
        .list_pod_sandbox(cri::ListPodSandboxRequest::default())
        .await
        .context("cannot list the pods of the container runtime")?
        .into_inner()
        .items;
    for sandbox in &sandboxes {
        let name = sandbox
            .metadata
            .as_ref()
            .map(|metadata| format!("{}/{}", metadata.namespace, metadata.name))
            .unwrap_or_default();
        let pod_sandbox_id = sandbox.id.clone();
        // A sandbox whose network cannot be taken down is removed all the same where the runtime allows it.
        if let Err(error) =
            runtime.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() }).await
        {
            eprintln!("cannot stop pod {name}: {}", error.message());
        }
        runtime
            .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id })
            .await
            .with_context(|| format!("cannot remove pod {name}"))?;
    }
    Ok(sandboxes.len())
}

async fn connect(endpoint: &str) -> Result<Channel> {
    let path = PathBuf::from(endpoint.trim_start_matches("unix://"));
    let shown = path.display().to_string();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The URI only names the authority of the requests; the connector goes to the socket.
    Endpoint::from_static("http://localhost")
        .timeout(CALL_TIMEOUT)
        .connect_with_connector(connector)
        .await
        .with_context(|| format!("cannot connect to the container runtime at {shown}"))
}
