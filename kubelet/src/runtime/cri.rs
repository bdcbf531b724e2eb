//! A CRI client: gRPC over the runtime's socket, each call with a deadline and an error that names the call and its object.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use proto::cri as pb;
use proto::cri::image_service_client::ImageServiceClient;
use proto::cri::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Response, Status};

use crate::metrics::metrics;

/// Deadline of calls that do not run images, sandboxes or commands, unless another is configured.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// RunPodSandbox may wait for the network.
const SANDBOX_TIMEOUT: Duration = Duration::from_secs(240);
/// A pull is bounded by the caller's patience, not by a small deadline.
const PULL_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// What a runtime may send in one message (as Kubernetes' client: 16 MiB).
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Why a CRI call failed.
#[derive(Debug, thiserror::Error)]
pub enum CriError {
    /// The endpoint cannot be used at all (bad URL).
    #[error("container runtime endpoint {endpoint:?}: {reason}")]
    Endpoint { endpoint: String, reason: String },
    /// The runtime refused or failed the call, or could not be reached.
    #[error("{call} {object}: {}: {}", .status.code(), .status.message())]
    Call { call: &'static str, object: String, status: Status },
    /// The runtime answered without what the call promises.
    #[error("{call} {object}: the runtime's answer lacks {lacks}")]
    Incomplete { call: &'static str, object: String, lacks: &'static str },
}

impl CriError {
    /// Whether the object is not (or no longer) there.
    pub fn is_not_found(&self) -> bool {
        match self {
            CriError::Call { status, .. } => status.code() == Code::NotFound,
            _ => false,
        }
    }

    /// Whether the runtime does not know this call.
    pub fn is_unimplemented(&self) -> bool {
        matches!(self, CriError::Call { status, .. } if status.code() == Code::Unimplemented)
    }

    /// The runtime's own message, for container statuses and events.
    pub fn message(&self) -> String {
        match self {
            CriError::Call { status, .. } => {
                format!("rpc error: code = {:?} desc = {}", status.code(), status.message())
            }
            other => other.to_string(),
        }
    }
}

/// A connection to the runtime; cheap to clone, reconnects by itself.
#[derive(Debug, Clone)]
pub struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    channel: Channel,
    timeout: Duration,
}

impl Cri {
    /// Prepares a client for `endpoint` (`unix:///run/containerd/containerd.sock`, or a bare path). Connects when first used.
    pub fn new(endpoint: &str, image_endpoint: Option<&str>) -> Result<Self, CriError> {
        let runtime = channel(endpoint)?;
        let images = match image_endpoint {
            Some(other) if !other.is_empty() && other != endpoint => channel(other)?,
            _ => runtime.clone(),
        };
        Ok(Self {
            channel: runtime.clone(),
            timeout: CALL_TIMEOUT,
            runtime: RuntimeServiceClient::new(runtime)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
            images: ImageServiceClient::new(images)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        })
    }

    /// With another deadline of calls that do not run images, sandboxes or commands.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The connection itself, for what a runtime offers besides CRI.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub async fn version(&self) -> Result<pb::VersionResponse, CriError> {
        let mut c = self.runtime.clone();
        call("Version", "", c.version(request(pb::VersionRequest { version: "0.1.0".into() }, self.timeout))).await
    }

    pub async fn status(&self, verbose: bool) -> Result<pb::StatusResponse, CriError> {
        let mut c = self.runtime.clone();
        call("Status", "", c.status(request(pb::StatusRequest { verbose }, self.timeout))).await
    }

    /// Passes the node's pod CIDR on to the runtime.
    pub async fn update_runtime_config(&self, pod_cidr: &str) -> Result<(), CriError> {
        let mut c = self.runtime.clone();
        let config = pb::RuntimeConfig { network_config: Some(pb::NetworkConfig { pod_cidr: pod_cidr.to_owned() }) };
        let message = pb::UpdateRuntimeConfigRequest { runtime_config: Some(config) };
        call("UpdateRuntimeConfig", pod_cidr, c.update_runtime_config(request(message, self.timeout))).await?;
        Ok(())
    }

    /// What the runtime asks the kubelet to use; containerd before 1.7 does not know the call.
    pub async fn runtime_config(&self) -> Result<pb::RuntimeConfigResponse, CriError> {
        let mut c = self.runtime.clone();
        call("RuntimeConfig", "", c.runtime_config(request(pb::RuntimeConfigRequest {}, self.timeout))).await
    }

    pub async fn run_pod_sandbox(&self, config: pb::PodSandboxConfig, handler: &str) -> Result<String, CriError> {
        let mut c = self.runtime.clone();
        let object = config.metadata.as_ref().map(|m| format!("{}/{}", m.namespace, m.name)).unwrap_or_default();
        let message = pb::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.to_owned() };
        Ok(call("RunPodSandbox", &object, c.run_pod_sandbox(request(message, SANDBOX_TIMEOUT))).await?.pod_sandbox_id)
    }

    pub async fn stop_pod_sandbox(&self, id: &str) -> Result<(), CriError> {
        let mut c = self.runtime.clone();
        let message = pb::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        gone_is_fine(call("StopPodSandbox", id, c.stop_pod_sandbox(request(message, self.timeout))).await)
    }

    pub async fn remove_pod_sandbox(&self, id: &str) -> Result<(), CriError> {
        let mut c = self.runtime.clone();
        let message = pb::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        gone_is_fine(call("RemovePodSandbox", id, c.remove_pod_sandbox(request(message, self.timeout))).await)
    }

    pub async fn pod_sandbox_status(&self, id: &str, verbose: bool) -> Result<pb::PodSandboxStatusResponse, CriError> {
        let mut c = self.runtime.clone();
        let message = pb::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose };
        call("PodSandboxStatus", id, c.pod_sandbox_status(request(message, self.timeout))).await
    }

    /// Sandboxes with these labels (none: all).
    pub async fn list_pod_sandboxes_with(
        &self,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<pb::PodSandbox>, CriError> {
        let mut c = self.runtime.clone();
        let filter = pb::PodSandboxFilter { label_selector: labels, ..Default::default() };
        let message = pb::ListPodSandboxRequest { filter: Some(filter) };
        Ok(call("ListPodSandbox", "", c.list_pod_sandbox(request(message, self.timeout))).await?.items)
    }

    pub async fn create_container(
        &self,
        sandbox: &str,
        config: pb::ContainerConfig,
        sandbox_config: pb::PodSandboxConfig,
    ) -> Result<String, CriError> {
        let mut c = self.runtime.clone();
        let object = config.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
        let message = pb::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        Ok(call("CreateContainer", &object, c.create_container(request(message, self.timeout))).await?.container_id)
    }

    pub async fn start_container(&self, id: &str) -> Result<(), CriError> {
        let mut c = self.runtime.clone();
        let message = pb::StartContainerRequest { container_id: id.to_owned() };
        call("StartContainer", id, c.start_container(request(message, self.timeout))).await?;
        Ok(())
    }

    /// Sends the stop signal, and kills after `grace_seconds`.
    pub async fn stop_container(&self, id: &str, grace_seconds: i64) -> Result<(), CriError> {
        let mut c = self.runtime.clone();
        let timeout = self.timeout + Duration::from_secs(grace_seconds.max(0).unsigned_abs());
        let message = pb::StopContainerRequest { container_id: id.to_owned(), timeout: grace_seconds.max(0) };
        gone_is_fine(call("StopContainer", id, c.stop_container(request(message, timeout))).await)
    }

    pub async fn remove_container(&self, id: &str) -> Result<(), CriError> {
        let mut c = self.runtime.clone();
        let message = pb::RemoveContainerRequest { container_id: id.to_owned() };
        gone_is_fine(call("RemoveContainer", id, c.remove_container(request(message, self.timeout))).await)
    }

    /// Containers with these labels (none: all).
    pub async fn list_containers_with(&self, labels: BTreeMap<String, String>) -> Result<Vec<pb::Container>, CriError> {
        let mut c = self.runtime.clone();
        let filter = pb::ContainerFilter { label_selector: labels, ..Default::default() };
        let message = pb::ListContainersRequest { filter: Some(filter) };
        Ok(call("ListContainers", "", c.list_containers(request(message, self.timeout))).await?.containers)
    }

    pub async fn container_status(&self, id: &str) -> Result<pb::ContainerStatus, CriError> {
        let mut c = self.runtime.clone();
        let message = pb::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let answer = call("ContainerStatus", id, c.container_status(request(message, self.timeout))).await?;
        answer.status.ok_or_else(|| CriError::Incomplete {
            call: "ContainerStatus",
            object: id.to_owned(),
            lacks: "status",
        })
    }

    pub async fn update_container_resources(
        &self,
        id: &str,
        resources: pb::LinuxContainerResources,
    ) -> Result<(), CriError> {
        let mut c = self.runtime.clone();
        let message = pb::UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources),
            annotations: Default::default(),
        };
        call("UpdateContainerResources", id, c.update_container_resources(request(message, self.timeout))).await?;
        Ok(())
    }

    /// Has the runtime write a checkpoint of a container to `archive`.
    pub async fn checkpoint_container(&self, id: &str, archive: &Path, seconds: i64) -> Result<(), CriError> {
        let mut c = self.runtime.clone();
        let location = archive.display().to_string();
        let message = pb::CheckpointContainerRequest { container_id: id.to_owned(), location, timeout: seconds };
        call("CheckpointContainer", id, c.checkpoint_container(request(message, self.timeout))).await?;
        Ok(())
    }

    /// Has the runtime open a container's log anew, after a rotation.
    pub async fn reopen_container_log(&self, id: &str) -> Result<(), CriError> {
        let mut c = self.runtime.clone();
        let message = pb::ReopenContainerLogRequest { container_id: id.to_owned() };
        call("ReopenContainerLog", id, c.reopen_container_log(request(message, self.timeout))).await?;
        Ok(())
    }

    /// Runs a command to its end; the runtime kills it after `timeout`.
    pub async fn exec_sync(
        &self,
        id: &str,
        cmd: Vec<String>,
        timeout: Duration,
    ) -> Result<pb::ExecSyncResponse, CriError> {
        let mut c = self.runtime.clone();
        let seconds = i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX);
        let message = pb::ExecSyncRequest { container_id: id.to_owned(), cmd, timeout: seconds };
        let deadline = if seconds == 0 { PULL_TIMEOUT } else { timeout + Duration::from_secs(5) };
        call("ExecSync", id, c.exec_sync(request(message, deadline))).await
    }

    /// URL of the runtime's streaming server for this command.
    pub async fn exec(&self, message: pb::ExecRequest) -> Result<String, CriError> {
        let mut c = self.runtime.clone();
        let id = message.container_id.clone();
        Ok(call("Exec", &id, c.exec(request(message, self.timeout))).await?.url)
    }

    /// URL of the runtime's streaming server for a container's own streams.
    pub async fn attach(&self, message: pb::AttachRequest) -> Result<String, CriError> {
        let mut c = self.runtime.clone();
        let id = message.container_id.clone();
        Ok(call("Attach", &id, c.attach(request(message, self.timeout))).await?.url)
    }

    /// URL of the runtime's streaming server for ports of a sandbox.
    pub async fn port_forward(&self, sandbox: &str, ports: Vec<i32>) -> Result<String, CriError> {
        let mut c = self.runtime.clone();
        let message = pb::PortForwardRequest { pod_sandbox_id: sandbox.to_owned(), port: ports };
        Ok(call("PortForward", sandbox, c.port_forward(request(message, self.timeout))).await?.url)
    }

    pub async fn list_container_stats(&self) -> Result<Vec<pb::ContainerStats>, CriError> {
        let mut c = self.runtime.clone();
        let message = pb::ListContainerStatsRequest { filter: None };
        Ok(call("ListContainerStats", "", c.list_container_stats(request(message, self.timeout))).await?.stats)
    }

    pub async fn list_pod_sandbox_stats(&self) -> Result<Vec<pb::PodSandboxStats>, CriError> {
        let mut c = self.runtime.clone();
        let message = pb::ListPodSandboxStatsRequest { filter: None };
        Ok(call("ListPodSandboxStats", "", c.list_pod_sandbox_stats(request(message, self.timeout))).await?.stats)
    }

    /// A stream of container events, where the runtime has it (containerd from 1.7).
    pub async fn container_events(&self) -> Result<tonic::Streaming<pb::ContainerEventResponse>, CriError> {
        let mut c = self.runtime.clone();
        call("GetContainerEvents", "", c.get_container_events(Request::new(pb::GetEventsRequest {}))).await
    }

    pub async fn list_images(&self) -> Result<Vec<pb::Image>, CriError> {
        let mut c = self.images.clone();
        Ok(call("ListImages", "", c.list_images(request(pb::ListImagesRequest { filter: None }, self.timeout)))
            .await?
            .images)
    }

    /// The image, if it is present.
    pub async fn image_status(&self, image: &str) -> Result<Option<pb::Image>, CriError> {
        let mut c = self.images.clone();
        let message = pb::ImageStatusRequest {
            image: Some(pb::ImageSpec { image: image.to_owned(), ..Default::default() }),
            verbose: false,
        };
        Ok(call("ImageStatus", image, c.image_status(request(message, self.timeout))).await?.image)
    }

    /// Pulls; the answer is the runtime's reference to the image.
    pub async fn pull_image(
        &self,
        image: &str,
        auth: Option<pb::AuthConfig>,
        sandbox_config: Option<pb::PodSandboxConfig>,
    ) -> Result<String, CriError> {
        let mut c = self.images.clone();
        let spec =
            pb::ImageSpec { image: image.to_owned(), user_specified_image: image.to_owned(), ..Default::default() };
        let message = pb::PullImageRequest { image: Some(spec), auth, sandbox_config };
        Ok(call("PullImage", image, c.pull_image(request(message, PULL_TIMEOUT))).await?.image_ref)
    }

    pub async fn remove_image(&self, image: &str) -> Result<(), CriError> {
        let mut c = self.images.clone();
        let message =
            pb::RemoveImageRequest { image: Some(pb::ImageSpec { image: image.to_owned(), ..Default::default() }) };
        gone_is_fine(call("RemoveImage", image, c.remove_image(request(message, self.timeout))).await)
    }

    pub async fn image_fs_info(&self) -> Result<pb::ImageFsInfoResponse, CriError> {
        let mut c = self.images.clone();
        call("ImageFsInfo", "", c.image_fs_info(request(pb::ImageFsInfoRequest {}, self.timeout))).await
    }
}

/// The socket path of an endpoint as written in flags and configuration.
fn socket_path(endpoint: &str) -> Result<PathBuf, CriError> {
    let path = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
    if path.starts_with('/') {
        Ok(PathBuf::from(path))
    } else {
        Err(CriError::Endpoint {
            endpoint: endpoint.to_owned(),
            reason: "only unix sockets are supported; write unix:///run/containerd/containerd.sock".to_owned(),
        })
    }
}

fn channel(endpoint: &str) -> Result<Channel, CriError> {
    if endpoint == super::hollow::ENDPOINT {
        return Ok(super::hollow::channel());
    }
    socket_path(endpoint).map(unix_channel)
}

/// gRPC over the socket at `path`; connects when it is first used, and again when the connection is lost.
pub(crate) fn unix_channel(path: PathBuf) -> Channel {
    // The URI only names the authority of the requests; the connector goes to the socket.
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost")
        .connect_timeout(Duration::from_secs(5))
        .connect_with_connector_lazy(connector)
}

fn request<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

async fn call<T>(
    name: &'static str,
    object: &str,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CriError> {
    let begun = Instant::now();
    let answer = answer.await;
    metrics().called(name, begun.elapsed(), answer.is_err());
    match answer {
        Ok(response) => Ok(response.into_inner()),
        Err(status) => Err(CriError::Call { call: name, object: object.to_owned(), status }),
    }
}

fn gone_is_fine<T>(result: Result<T, CriError>) -> Result<(), CriError> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_unix_sockets() {
        for (given, path) in [
            ("unix:///run/containerd/containerd.sock", Some("/run/containerd/containerd.sock")),
            ("/run/crio/crio.sock", Some("/run/crio/crio.sock")),
            ("tcp://127.0.0.1:99", None),
            ("containerd.sock", None),
        ] {
            assert_eq!(socket_path(given).ok(), path.map(PathBuf::from), "{given}");
        }
    }
}
