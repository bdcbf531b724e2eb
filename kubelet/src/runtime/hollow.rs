//! A container runtime that runs nothing: for hollow nodes, of which one process has hundreds. Sandboxes and containers are
//! entries in a map; it is spoken to over CRI as any other, through memory instead of a socket.
//!
//! A container runs until it is stopped, but for `true`, `false` and `sleep N`, which end by themselves.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use prost::Message;
use proto::cri as pb;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

/// The endpoint that stands for this runtime.
pub const ENDPOINT: &str = "hollow://";
/// What is under way between the two ends of the connection.
const BUFFER_BYTES: usize = 64 << 10;
/// The bytes before a gRPC message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;
/// Of all hollow nodes of the process: no two pods have one address.
static NEXT_ADDRESS: AtomicU32 = AtomicU32::new(0x0a40_0001);

#[derive(Debug, Clone)]
struct Sandbox {
    config: pb::PodSandboxConfig,
    created_at: i64,
    ready: bool,
    address: String,
}

#[derive(Debug, Clone)]
struct Container {
    sandbox: String,
    config: pb::ContainerConfig,
    created_at: i64,
    started_at: i64,
    finished_at: i64,
    exit_code: i32,
}

#[derive(Debug, Default)]
struct Hollow {
    next: AtomicU64,
    sandboxes: Mutex<BTreeMap<String, Sandbox>>,
    containers: Mutex<BTreeMap<String, Container>>,
}

/// A connection to a runtime of its own, which ends with it.
pub fn channel() -> Channel {
    let runtime = Arc::new(Hollow::default());
    let connector = tower::service_fn(move |_: Uri| {
        let runtime = runtime.clone();
        async move {
            let (ours, theirs) = tokio::io::duplex(BUFFER_BYTES);
            tokio::spawn(async move {
                let answer = service_fn(move |request| serve(runtime.clone(), request));
                let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                if let Err(error) = connection.serve_connection(TokioIo::new(theirs), answer).await {
                    tracing::debug!(%error, "hollow runtime: connection ended");
                }
            });
            Ok::<_, std::io::Error>(TokioIo::new(ours))
        }
    });
    Endpoint::from_static("http://hollow").connect_with_connector_lazy(connector)
}

/// One unary gRPC call.
async fn serve(
    runtime: Arc<Hollow>,
    request: http::Request<hyper::body::Incoming>,
) -> Result<http::Response<impl http_body::Body<Data = Bytes, Error = Infallible>>, Infallible> {
    let call = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
    let answer = match request.into_body().collect().await {
        Ok(body) => {
            let mut message = body.to_bytes();
            _ = message.split_to(PREFIX_BYTES.min(message.len()));
            runtime.answer(&call, message)
        }
        Err(error) => Err(Status::internal(error.to_string())),
    };
    let mut body = BytesMut::new();
    let mut status = http::HeaderMap::new();
    let failed = answer.is_err();
    match answer {
        Ok(message) => {
            body.put_u8(0);
            body.put_u32(message.len() as u32);
            body.put_slice(&message);
            status.insert("grpc-status", http::HeaderValue::from(Code::Ok as i32));
        }
        Err(error) => {
            status.insert("grpc-status", http::HeaderValue::from(error.code() as i32));
            if let Ok(words) = http::HeaderValue::from_str(error.message()) {
                status.insert("grpc-message", words);
            }
        }
    }
    // A failure is told at once, in the head.
    let (head, trailers) = if failed { (status, None) } else { (http::HeaderMap::new(), Some(Ok(status))) };
    let mut response = http::Response::new(Full::new(body.freeze()).with_trailers(std::future::ready(trailers)));
    *response.headers_mut() = head;
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/grpc"));
    Ok(response)
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i64)
}

fn read<T: Message + Default>(body: Bytes) -> Result<T, Status> {
    T::decode(body).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn written(message: impl Message) -> Result<Vec<u8>, Status> {
    Ok(message.encode_to_vec())
}

fn matches(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// How long the container runs, and how it ends, if it ends by itself.
fn end_of(config: &pb::ContainerConfig) -> Option<(Duration, i32)> {
    let words: Vec<&str> = config.command.iter().chain(&config.args).map(String::as_str).collect();
    match words.as_slice() {
        ["true"] => Some((Duration::ZERO, 0)),
        ["false"] => Some((Duration::ZERO, 1)),
        ["sleep", seconds] => Some((Duration::from_secs(seconds.parse().ok()?), 0)),
        _ => None,
    }
}

impl Container {
    /// Ends it if its time has come.
    fn settle(&mut self) {
        if let Some((runs, code)) = end_of(&self.config).filter(|_| self.started_at > 0 && self.finished_at == 0) {
            let end = self.started_at + runs.as_nanos() as i64;
            if end <= now() {
                (self.finished_at, self.exit_code) = (end, code);
            }
        }
    }

    fn state(&self) -> pb::ContainerState {
        match (self.started_at, self.finished_at) {
            (0, 0) => pb::ContainerState::ContainerCreated,
            (_, 0) => pb::ContainerState::ContainerRunning,
            _ => pb::ContainerState::ContainerExited,
        }
    }

    fn image_ref(&self) -> String {
        self.config.image.as_ref().map(|image| digest(&image.image)).unwrap_or_default()
    }
}

/// Stands for the image's content.
fn digest(image: &str) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    image.bytes().for_each(|byte| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("sha256:{}", format!("{hash:016x}").repeat(4))
}

fn image(name: &str) -> pb::Image {
    pb::Image { id: digest(name), repo_tags: vec![name.to_owned()], size: 1 << 20, ..Default::default() }
}

impl Hollow {
    fn id(&self, prefix: &str) -> String {
        format!("{prefix}{:060x}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Does what a call of CRI asks for.
    fn answer(&self, call: &str, body: Bytes) -> Result<Vec<u8>, Status> {
        match call {
            "Version" => written(pb::VersionResponse {
                version: "0.1.0".to_owned(),
                runtime_name: "hollow".to_owned(),
                runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
                runtime_api_version: "v1".to_owned(),
            }),
            "Status" => {
                let good =
                    |name: &str| pb::RuntimeCondition { r#type: name.to_owned(), status: true, ..Default::default() };
                let conditions = vec![good("RuntimeReady"), good("NetworkReady")];
                written(pb::StatusResponse { status: Some(pb::RuntimeStatus { conditions }), ..Default::default() })
            }
            "UpdateRuntimeConfig" => written(pb::UpdateRuntimeConfigResponse::default()),
            "RunPodSandbox" => {
                let request: pb::RunPodSandboxRequest = read(body)?;
                let address = std::net::Ipv4Addr::from(NEXT_ADDRESS.fetch_add(1, Ordering::Relaxed)).to_string();
                let config = request.config.unwrap_or_default();
                let pod_sandbox_id = self.id("5a");
                let sandbox = Sandbox { config, created_at: now(), ready: true, address };
                self.sandboxes.lock().insert(pod_sandbox_id.clone(), sandbox);
                written(pb::RunPodSandboxResponse { pod_sandbox_id })
            }
            "StopPodSandbox" => {
                let request: pb::StopPodSandboxRequest = read(body)?;
                if let Some(sandbox) = self.sandboxes.lock().get_mut(&request.pod_sandbox_id) {
                    sandbox.ready = false;
                }
                for container in self.containers.lock().values_mut() {
                    if container.sandbox == request.pod_sandbox_id && container.finished_at == 0 {
                        (container.finished_at, container.exit_code) = (now(), 137);
                    }
                }
                written(pb::StopPodSandboxResponse::default())
            }
            "RemovePodSandbox" => {
                let request: pb::RemovePodSandboxRequest = read(body)?;
                self.sandboxes.lock().remove(&request.pod_sandbox_id);
                self.containers.lock().retain(|_, container| container.sandbox != request.pod_sandbox_id);
                written(pb::RemovePodSandboxResponse::default())
            }
            "PodSandboxStatus" => {
                let request: pb::PodSandboxStatusRequest = read(body)?;
                let sandboxes = self.sandboxes.lock();
                let sandbox =
                    sandboxes.get(&request.pod_sandbox_id).ok_or_else(|| Status::not_found("no such sandbox"))?;
                let security = sandbox.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
                let options = security.and_then(|security| security.namespace_options.clone());
                let status = pb::PodSandboxStatus {
                    id: request.pod_sandbox_id,
                    metadata: sandbox.config.metadata.clone(),
                    state: sandbox_state(sandbox),
                    created_at: sandbox.created_at,
                    network: Some(pb::PodSandboxNetworkStatus { ip: sandbox.address.clone(), ..Default::default() }),
                    linux: Some(pb::LinuxPodSandboxStatus { namespaces: Some(pb::Namespace { options }) }),
                    labels: sandbox.config.labels.clone(),
                    annotations: sandbox.config.annotations.clone(),
                    ..Default::default()
                };
                written(pb::PodSandboxStatusResponse { status: Some(status), ..Default::default() })
            }
            "ListPodSandbox" => {
                let request: pb::ListPodSandboxRequest = read(body)?;
                let filter = request.filter.unwrap_or_default();
                let sandboxes = self.sandboxes.lock();
                let wanted = sandboxes.iter().filter(|(id, sandbox)| {
                    (filter.id.is_empty() || filter.id == **id)
                        && matches(&filter.label_selector, &sandbox.config.labels)
                });
                let item = |(id, sandbox): (&String, &Sandbox)| pb::PodSandbox {
                    id: id.clone(),
                    metadata: sandbox.config.metadata.clone(),
                    state: sandbox_state(sandbox),
                    created_at: sandbox.created_at,
                    labels: sandbox.config.labels.clone(),
                    annotations: sandbox.config.annotations.clone(),
                    ..Default::default()
                };
                written(pb::ListPodSandboxResponse { items: wanted.map(item).collect() })
            }
            "CreateContainer" => {
                let request: pb::CreateContainerRequest = read(body)?;
                let container_id = self.id("c0");
                let container = Container {
                    sandbox: request.pod_sandbox_id,
                    config: request.config.unwrap_or_default(),
                    created_at: now(),
                    started_at: 0,
                    finished_at: 0,
                    exit_code: 0,
                };
                self.containers.lock().insert(container_id.clone(), container);
                written(pb::CreateContainerResponse { container_id })
            }
            "StartContainer" => {
                let request: pb::StartContainerRequest = read(body)?;
                self.change(&request.container_id, |container| container.started_at = now())?;
                written(pb::StartContainerResponse::default())
            }
            "StopContainer" => {
                let request: pb::StopContainerRequest = read(body)?;
                self.change(&request.container_id, |container| {
                    if container.finished_at == 0 {
                        (container.finished_at, container.exit_code) = (now(), 143);
                    }
                })?;
                written(pb::StopContainerResponse::default())
            }
            "RemoveContainer" => {
                let request: pb::RemoveContainerRequest = read(body)?;
                self.containers.lock().remove(&request.container_id);
                written(pb::RemoveContainerResponse::default())
            }
            "ListContainers" => {
                let request: pb::ListContainersRequest = read(body)?;
                let filter = request.filter.unwrap_or_default();
                let mut containers = self.containers.lock();
                let wanted = containers.iter_mut().filter(|(_, container)| {
                    (filter.pod_sandbox_id.is_empty() || filter.pod_sandbox_id == container.sandbox)
                        && matches(&filter.label_selector, &container.config.labels)
                });
                let item = |(id, container): (&String, &mut Container)| {
                    container.settle();
                    pb::Container {
                        id: id.clone(),
                        pod_sandbox_id: container.sandbox.clone(),
                        metadata: container.config.metadata.clone(),
                        image: container.config.image.clone(),
                        image_ref: container.image_ref(),
                        state: container.state().into(),
                        created_at: container.created_at,
                        labels: container.config.labels.clone(),
                        annotations: container.config.annotations.clone(),
                        image_id: container.image_ref(),
                    }
                };
                written(pb::ListContainersResponse { containers: wanted.map(item).collect() })
            }
            "ContainerStatus" => {
                let request: pb::ContainerStatusRequest = read(body)?;
                let status = self.change(&request.container_id, |container| pb::ContainerStatus {
                    id: request.container_id.clone(),
                    metadata: container.config.metadata.clone(),
                    state: container.state().into(),
                    created_at: container.created_at,
                    started_at: container.started_at,
                    finished_at: container.finished_at,
                    exit_code: container.exit_code,
                    image: container.config.image.clone(),
                    image_ref: container.image_ref(),
                    image_id: container.image_ref(),
                    reason: match (container.finished_at, container.exit_code) {
                        (0, _) => String::new(),
                        (_, 0) => "Completed".to_owned(),
                        _ => "Error".to_owned(),
                    },
                    labels: container.config.labels.clone(),
                    annotations: container.config.annotations.clone(),
                    mounts: container.config.mounts.clone(),
                    ..Default::default()
                })?;
                written(pb::ContainerStatusResponse { status: Some(status), ..Default::default() })
            }
            "UpdateContainerResources" => written(pb::UpdateContainerResourcesResponse::default()),
            "ReopenContainerLog" => written(pb::ReopenContainerLogResponse::default()),
            "ExecSync" => written(pb::ExecSyncResponse::default()),
            "ListContainerStats" => written(pb::ListContainerStatsResponse::default()),
            "ListPodSandboxStats" => written(pb::ListPodSandboxStatsResponse::default()),
            "ListImages" => written(pb::ListImagesResponse::default()),
            "ImageStatus" => {
                let request: pb::ImageStatusRequest = read(body)?;
                let image = request.image.map(|spec| image(&spec.image));
                written(pb::ImageStatusResponse { image, ..Default::default() })
            }
            "PullImage" => {
                let request: pb::PullImageRequest = read(body)?;
                let image_ref = request.image.map(|spec| digest(&spec.image)).unwrap_or_default();
                written(pb::PullImageResponse { image_ref })
            }
            "RemoveImage" => written(pb::RemoveImageResponse::default()),
            "ImageFsInfo" => written(pb::ImageFsInfoResponse::default()),
            other => Err(Status::unimplemented(format!("{other} is not there in a hollow runtime"))),
        }
    }

    fn change<T>(&self, id: &str, change: impl FnOnce(&mut Container) -> T) -> Result<T, Status> {
        let mut containers = self.containers.lock();
        let container = containers.get_mut(id).ok_or_else(|| Status::not_found("no such container"))?;
        container.settle();
        Ok(change(container))
    }
}

fn sandbox_state(sandbox: &Sandbox) -> i32 {
    let state = if sandbox.ready { pb::PodSandboxState::SandboxReady } else { pb::PodSandboxState::SandboxNotready };
    state.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::cri::Cri;

    #[tokio::test]
    async fn containers_run_until_they_end_or_are_stopped() {
        let cri = Cri::new(ENDPOINT, None).expect("a client");
        assert_eq!(cri.version().await.expect("version").runtime_name, "hollow");
        let metadata = pb::PodSandboxMetadata { name: "p".into(), uid: "u".into(), ..Default::default() };
        let options = Some(pb::NamespaceOption { network: pb::NamespaceMode::Node.into(), ..Default::default() });
        let security = pb::LinuxSandboxSecurityContext { namespace_options: options.clone(), ..Default::default() };
        let linux = pb::LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() };
        let config = pb::PodSandboxConfig { metadata: Some(metadata), linux: Some(linux), ..Default::default() };
        let sandbox = cri.run_pod_sandbox(config.clone(), "").await.expect("a sandbox");
        let linux =
            cri.pod_sandbox_status(&sandbox, false).await.expect("a status").status.and_then(|status| status.linux);
        assert_eq!(linux.and_then(|linux| linux.namespaces).and_then(|namespaces| namespaces.options), options);
        for (command, code) in [(vec!["false"], Some(1)), (vec!["true"], Some(0)), (vec!["serve"], None)] {
            let words = command.iter().map(ToString::to_string).collect();
            let container = pb::ContainerConfig { command: words, ..Default::default() };
            let id = cri.create_container(&sandbox, container, config.clone()).await.expect("a container");
            cri.start_container(&id).await.expect("started");
            let status = cri.container_status(&id).await.expect("a status");
            let ended = status.state() == pb::ContainerState::ContainerExited;
            assert_eq!(ended.then_some(status.exit_code), code, "{command:?}");
        }
        cri.stop_pod_sandbox(&sandbox).await.expect("stopped");
        let left = cri.list_containers_with(BTreeMap::new()).await.expect("a list");
        assert!(left.iter().all(|one| one.state() == pb::ContainerState::ContainerExited));
        cri.remove_pod_sandbox(&sandbox).await.expect("removed");
        assert!(cri.pod_sandbox_status(&sandbox, false).await.expect_err("gone").is_not_found());
        assert!(cri.container_events().await.expect_err("no events").is_unimplemented());
    }
}
