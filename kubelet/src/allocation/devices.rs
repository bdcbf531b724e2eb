//! Device plugins: they register on a socket of the kubelet's, list their devices as long as they live, and say what a container
//! needs to use some of them.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::deviceplugin as pb;
use proto::deviceplugin::device_plugin_client::DevicePluginClient;
use proto::deviceplugin::registration_server::{Registration, RegistrationServer};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use crate::metrics::managers;
use crate::runtime::cri::unix_channel;

const VERSION: &str = "v1beta1";
pub(super) const SOCKET: &str = "kubelet.sock";
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a plugin may be away before its resource is no longer the node's. As `endpointStopGracePeriod`.
const GONE_AFTER: Duration = Duration::from_secs(300);

/// One device as its plugin lists it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Device {
    pub healthy: bool,
    pub nodes: BTreeSet<u32>,
}

struct Plugin {
    channel: Channel,
    options: pb::DevicePluginOptions,
    devices: BTreeMap<String, Device>,
    stopped: Option<Instant>,
    /// Which registration it is: an older one's end does not matter.
    generation: u64,
}

/// The plugins by the resource that each offers.
pub(super) struct Devices {
    directory: PathBuf,
    plugins: Mutex<BTreeMap<String, Plugin>>,
    changed: watch::Sender<()>,
}

// === impl Devices ===

impl Devices {
    pub(super) fn new(directory: PathBuf, changed: watch::Sender<()>) -> Arc<Devices> {
        Arc::new(Devices { directory, plugins: Mutex::default(), changed })
    }

    /// Takes registrations until shutdown. Plugins watch for the socket to be made anew: that is how they know to register again.
    pub(super) async fn serve(self: Arc<Self>, shutdown: CancellationToken) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.directory)?;
        for entry in std::fs::read_dir(&self.directory)?.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_socket()) {
                std::fs::remove_file(entry.path())?;
            }
        }
        let listener = tokio::net::UnixListener::bind(self.directory.join(SOCKET))?;
        let server = tonic::transport::Server::builder().add_service(RegistrationServer::new(Taker(self)));
        let serving =
            server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown.cancelled_owned());
        serving.await.map_err(std::io::Error::other)
    }

    fn register(self: &Arc<Self>, request: pb::RegisterRequest) -> Result<(), String> {
        if request.version != VERSION {
            return Err(format!(
                "requested API version {:?} is not supported by kubelet. Supported version is {VERSION:?}",
                request.version
            ));
        }
        let name = request.resource_name.clone();
        if !is_extended(&name) {
            return Err(format!("the ResourceName {name:?} is invalid"));
        }
        if request.endpoint.contains('/') {
            return Err(format!("endpoint {:?} is not a name beside {SOCKET}", request.endpoint));
        }
        let channel = unix_channel(self.directory.join(&request.endpoint));
        let generation = {
            let mut plugins = self.plugins.lock();
            let before = plugins.remove(&name);
            let generation = before.as_ref().map_or(1, |p| p.generation + 1);
            let plugin = Plugin {
                channel: channel.clone(),
                options: request.options.unwrap_or_default(),
                devices: before.map(|p| p.devices).unwrap_or_default(),
                stopped: None,
                generation,
            };
            plugins.insert(name.clone(), plugin);
            generation
        };
        info!(resource = name, "device plugin registered");
        managers().plugins.get_or_create(&[("resource_name", name.clone())]).inc();
        tokio::spawn(self.clone().follow(name, channel, generation));
        Ok(())
    }

    /// Reads a plugin's list for as long as it sends it.
    async fn follow(self: Arc<Self>, name: String, channel: Channel, generation: u64) {
        match DevicePluginClient::new(channel).list_and_watch(pb::Empty {}).await {
            Ok(answer) => {
                let mut stream = answer.into_inner();
                while let Ok(Some(list)) = stream.message().await {
                    let device = |d: pb::Device| {
                        let nodes = d.topology.map(|t| t.nodes).unwrap_or_default();
                        let nodes = nodes.iter().filter_map(|n| u32::try_from(n.id).ok()).collect();
                        (d.id, Device { healthy: d.health == "Healthy", nodes })
                    };
                    if !self.set(&name, generation, |plugin| {
                        plugin.devices = list.devices.into_iter().map(device).collect()
                    }) {
                        return;
                    }
                }
            }
            Err(status) => warn!(resource = name, error = status.message(), "device plugin does not list its devices"),
        }
        let stop = |plugin: &mut Plugin| {
            plugin.stopped = Some(Instant::now());
            plugin.devices.values_mut().for_each(|d| d.healthy = false);
        };
        if self.set(&name, generation, stop) {
            warn!(resource = name, "device plugin is gone; its devices are not given to anyone");
        }
    }

    fn set(&self, name: &str, generation: u64, change: impl FnOnce(&mut Plugin)) -> bool {
        let mut plugins = self.plugins.lock();
        let Some(plugin) = plugins.get_mut(name).filter(|p| p.generation == generation) else { return false };
        change(plugin);
        drop(plugins);
        self.changed.send_replace(());
        true
    }

    pub(super) fn knows(&self, resource: &str) -> bool {
        self.plugins.lock().contains_key(resource)
    }

    /// A device's health as pods' statuses have it.
    pub(super) fn health(&self, resource: &str, id: &str) -> &'static str {
        let plugins = self.plugins.lock();
        match plugins.get(resource) {
            None => "Unknown",
            Some(plugin) if plugin.stopped.is_some() => "Unknown",
            Some(plugin) => match plugin.devices.get(id) {
                Some(device) if !device.healthy => "Unhealthy",
                _ => "Healthy",
            },
        }
    }

    pub(super) fn list(&self, resource: &str) -> BTreeMap<String, Device> {
        self.plugins.lock().get(resource).map(|p| p.devices.clone()).unwrap_or_default()
    }

    pub(super) fn resources(&self) -> Vec<String> {
        self.plugins.lock().keys().cloned().collect()
    }

    /// What the node has, and has to give, of each resource.
    pub(super) fn capacity(&self) -> BTreeMap<String, (i64, i64)> {
        let mut plugins = self.plugins.lock();
        plugins.retain(|_, p| p.stopped.is_none_or(|at| at.elapsed() < GONE_AFTER));
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        plugins
            .iter()
            .map(|(name, p)| {
                (name.clone(), (count(p.devices.len()), count(p.devices.values().filter(|d| d.healthy).count())))
            })
            .collect()
    }

    fn plugin(&self, resource: &str) -> Result<(DevicePluginClient<Channel>, pb::DevicePluginOptions), String> {
        let plugins = self.plugins.lock();
        let plugin = plugins.get(resource).ok_or_else(|| format!("unknown device plugin {resource}"))?;
        Ok((DevicePluginClient::new(plugin.channel.clone()), plugin.options))
    }

    /// Which of these the plugin would give, where it has an opinion.
    pub(super) async fn preferred(
        &self,
        resource: &str,
        available: &BTreeSet<String>,
        must: &BTreeSet<String>,
        count: usize,
    ) -> Option<BTreeSet<String>> {
        let (mut client, options) = self.plugin(resource).ok()?;
        if !options.get_preferred_allocation_available {
            return None;
        }
        let container = pb::ContainerPreferredAllocationRequest {
            available_device_i_ds: available.iter().cloned().collect(),
            must_include_device_i_ds: must.iter().cloned().collect(),
            allocation_size: i32::try_from(count).ok()?,
        };
        let message = pb::PreferredAllocationRequest { container_requests: vec![container] };
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.get_preferred_allocation(message)).await.ok()?.ok()?;
        let ids = answer.into_inner().container_responses.into_iter().next()?.device_i_ds;
        Some(ids.into_iter().filter(|id| available.contains(id)).take(count).collect())
    }

    /// Tells the plugin which devices a container gets; what it needs to use them.
    pub(super) async fn allocate(
        &self,
        resource: &str,
        ids: &BTreeSet<String>,
    ) -> Result<pb::ContainerAllocateResponse, String> {
        let (mut client, _) = self.plugin(resource)?;
        let container = pb::ContainerAllocateRequest { devices_ids: ids.iter().cloned().collect() };
        let message = pb::AllocateRequest { container_requests: vec![container] };
        let begun = Instant::now();
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.allocate(message)).await;
        let label = [("resource_name", resource.to_owned())];
        managers().device_seconds.get_or_create(&label).observe(begun.elapsed().as_secs_f64());
        let answer = answer.map_err(|_| format!("device plugin {resource} did not answer in time"))?;
        let answers =
            answer.map_err(|status| format!("rpc error: code = {:?} desc = {}", status.code(), status.message()))?;
        answers.into_inner().container_responses.into_iter().next().ok_or_else(|| format!("no response for {resource}"))
    }

    /// Lets the plugin prepare devices before each start of a container, where it wants to.
    pub(super) async fn before_start(&self, resource: &str, ids: &BTreeSet<String>) -> Result<(), String> {
        let Ok((mut client, options)) = self.plugin(resource) else { return Ok(()) };
        if !options.pre_start_required {
            return Ok(());
        }
        let message = pb::PreStartContainerRequest { devices_ids: ids.iter().cloned().collect() };
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.pre_start_container(message)).await;
        let answer = answer.map_err(|_| format!("device plugin {resource} did not answer in time"))?;
        answer
            .map(drop)
            .map_err(|status| format!("device plugin PreStartContainer rpc failed with err: {}", status.message()))
    }
}

struct Taker(Arc<Devices>);

#[tonic::async_trait]
impl Registration for Taker {
    async fn register(&self, request: Request<pb::RegisterRequest>) -> Result<Response<pb::Empty>, Status> {
        self.0.register(request.into_inner()).map(|()| Response::new(pb::Empty {})).map_err(Status::invalid_argument)
    }
}

/// A name that is a vendor's: `example.com/gpu`.
fn is_extended(name: &str) -> bool {
    let named = name.split_once('/');
    named.is_some_and(|(domain, rest)| {
        !domain.is_empty() && !rest.is_empty() && !rest.contains('/') && !domain.ends_with("kubernetes.io")
    }) && Path::new(name).is_relative()
}
