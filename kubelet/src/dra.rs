//! Dynamic resources: the drivers of this node prepare the devices that a pod's claims were given before any of its containers is
//! made, and take them back when the last pod with the claim has ended. What is prepared is kept in a file. What a driver
//! offers here (its ResourceSlices) is withdrawn when it has been gone for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use component_base::backoff::Backoff;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceClaim as ResourceClaimName, ResourceStatus};
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceSlice};
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use parking_lot::Mutex;
use proto::dra as pb;
use proto::dra::dra_plugin_client::DraPluginClient;
use proto::pluginregistration::PluginInfo;
use serde::{Deserialize, Serialize};
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;
use tower::ServiceExt as _;
use tower::util::MapRequest;
use tracing::{debug, info, warn};

use crate::dra_health::Healths;
use crate::objects::explain;
use crate::plugins::Registry;
use crate::runtime::pods::uid_of;

/// The services of drivers that are spoken here, the newest first: as drivers name them, and what makes a call of the newest one
/// theirs. Their messages are the same.
const SERVICES: [(&str, Adapt); 2] = [("v1.DRAPlugin", std::convert::identity), ("v1beta1.DRAPlugin", as_v1beta1)];
type Call = http::Request<tonic::body::Body>;
type Adapt = fn(Call) -> Call;
const CALL_TIMEOUT: Duration = Duration::from_secs(45);
/// How long a driver may be away before what it offers on this node is withdrawn.
const WIPING_DELAY: Duration = Duration::from_secs(30);

/// A claim that drivers have prepared.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Prepared {
    pub namespace: String,
    pub name: String,
    /// The pods that use it, by UID.
    pub pods: BTreeSet<String>,
    /// By driver.
    pub devices: BTreeMap<String, Vec<Device>>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Device {
    pub requests: Vec<String>,
    pub pool: String,
    pub name: String,
    pub cdi_ids: Vec<String>,
}

/// How a driver is spoken to.
type Driver = MapRequest<Channel, Adapt>;

fn as_v1beta1(mut call: Call) -> Call {
    let path = call.uri().path().replace(".dra.v1.", ".dra.v1beta1.");
    let mut parts = call.uri().clone().into_parts();
    parts.path_and_query = path.parse().ok();
    if let Ok(uri) = http::Uri::from_parts(parts) {
        *call.uri_mut() = uri;
    }
    call
}

/// The drivers of this node, and what they have prepared.
pub struct Dra {
    client: Option<kube::Client>,
    node_name: String,
    drivers: Mutex<BTreeMap<String, Driver>>,
    /// ResourceSlices that are to be withdrawn: of all drivers (""), until the first withdrawal is through, and of those gone.
    wiping: Mutex<BTreeMap<String, AbortOnDropHandle<()>>>,
    /// What drivers say of their devices, and who listens to each.
    healths: Arc<Healths>,
    listening: Mutex<BTreeMap<String, AbortOnDropHandle<()>>>,
    /// By the claim's UID.
    prepared: Mutex<BTreeMap<String, Prepared>>,
    file: PathBuf,
    /// Claims are shared between pods: one pod at a time.
    busy: tokio::sync::Mutex<()>,
}

// === impl Dra ===

impl Dra {
    pub fn new(client: Option<kube::Client>, node_name: &str, root_dir: &Path) -> Arc<Dra> {
        let file = root_dir.join("claims.json");
        let saved = std::fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let dra = Dra {
            client,
            node_name: node_name.to_owned(),
            drivers: Mutex::default(),
            wiping: Mutex::default(),
            healths: Arc::default(),
            listening: Mutex::default(),
            prepared: Mutex::new(saved.unwrap_or_default()),
            file,
            busy: tokio::sync::Mutex::default(),
        };
        // No driver has come yet, and some may never: pods must not be sent here for their devices.
        dra.wipe("", Duration::ZERO);
        Arc::new(dra)
    }

    /// Withdraws what a driver (or all) offers on this node, after a while.
    fn wipe(&self, driver: &str, after: Duration) {
        let Some(client) = self.client.clone() else { return };
        let mut selector = format!("spec.nodeName={}", self.node_name);
        if !driver.is_empty() {
            selector.push_str(&format!(",spec.driver={driver}"));
        }
        let wiping = async move {
            tokio::time::sleep(after).await;
            let slices = Api::<ResourceSlice>::all(client);
            let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(300));
            let (how, which) = (DeleteParams::default(), ListParams::default().fields(&selector));
            while let Err(error) = slices.delete_collection(&how, &which).await {
                if matches!(&error, kube::Error::Api(status) if status.code == 404) {
                    return;
                }
                debug!(selector, error = explain(&error), "ResourceSlices not withdrawn yet");
                tokio::time::sleep(backoff.next_wait()).await;
            }
            debug!(selector, "ResourceSlices withdrawn");
        };
        self.wiping.lock().insert(driver.to_owned(), AbortOnDropHandle::new(tokio::spawn(wiping)));
    }

    fn save(&self) {
        let text = serde_json::to_vec(&*self.prepared.lock()).map_err(std::io::Error::other);
        let partial = self.file.with_extension("tmp");
        let written =
            text.and_then(|text| std::fs::write(&partial, text)).and_then(|()| std::fs::rename(&partial, &self.file));
        if let Err(error) = written {
            warn!(file = %self.file.display(), %error, "prepared claims are not saved");
        }
    }

    /// Has all claims of a pod prepared. Idempotent.
    pub async fn prepare(&self, pod: &Pod) -> Result<(), String> {
        if claims_of(pod).next().is_none() {
            return Ok(());
        }
        let _one = self.busy.lock().await;
        let mut claims = Vec::new();
        for (reference, name) in claims_of(pod) {
            let Some(name) = name else { continue };
            let client = self.client.clone().ok_or("claims need an API server; the kubelet is standalone")?;
            let api = Api::<ResourceClaim>::namespaced(client, pod.metadata.namespace.as_deref().unwrap_or_default());
            let claim = api.get(&name).await.map_err(|e| format!("fetch ResourceClaim {name}: {}", explain(&e)))?;
            claims.push((reference, claim));
        }
        let wanted = claims.iter().map(|(_, claim)| claim).collect::<Vec<_>>();
        self.prepare_claims(uid_of(pod), &wanted).await
    }

    async fn prepare_claims(&self, pod_uid: &str, claims: &[&ResourceClaim]) -> Result<(), String> {
        let mut by_driver: BTreeMap<String, Vec<pb::Claim>> = BTreeMap::new();
        for claim in claims {
            let (uid, entry, drivers) = usable(claim, pod_uid)?;
            let mut prepared = self.prepared.lock();
            let known = prepared.entry(uid.clone()).or_insert_with(|| entry.clone());
            known.pods.insert(pod_uid.to_owned());
            for driver in drivers.into_iter().filter(|driver| !known.devices.contains_key(driver)) {
                let claim =
                    pb::Claim { namespace: known.namespace.clone(), uid: uid.clone(), name: known.name.clone() };
                by_driver.entry(driver).or_default().push(claim);
            }
        }
        // Noted before anything is done, so that it is taken back whatever happens.
        self.save();
        for (driver, claims) in by_driver {
            let mut client = self.client_of(&driver)?;
            let message = pb::NodePrepareResourcesRequest { claims: claims.clone() };
            let answer = tokio::time::timeout(CALL_TIMEOUT, client.node_prepare_resources(message)).await;
            let answer = answer.map_err(|_| format!("DRA driver {driver} did not answer in time"))?;
            let mut answers =
                answer.map_err(|s| format!("NodePrepareResources of {driver}: {}", s.message()))?.into_inner().claims;
            for claim in claims {
                let answer = answers
                    .remove(&claim.uid)
                    .ok_or_else(|| format!("NodePrepareResources of {driver} skipped claim {}", claim.name))?;
                if !answer.error.is_empty() {
                    return Err(format!(
                        "NodePrepareResources of {driver} failed for claim {}: {}",
                        claim.name, answer.error
                    ));
                }
                let device = |d: pb::Device| Device {
                    requests: d.request_names,
                    pool: d.pool_name,
                    name: d.device_name,
                    cdi_ids: d.cdi_device_ids,
                };
                if let Some(prepared) = self.prepared.lock().get_mut(&claim.uid) {
                    let devices = answer.devices.into_iter().map(device).collect();
                    prepared.devices.insert(driver.clone(), devices);
                }
                info!(claim = %claim.name, namespace = %claim.namespace, driver, "claim prepared");
            }
        }
        self.save();
        Ok(())
    }

    fn client_of(&self, driver: &str) -> Result<DraPluginClient<Driver>, String> {
        let found = self.drivers.lock().get(driver).cloned();
        found.map(DraPluginClient::new).ok_or_else(|| format!("DRA driver {driver} is not registered"))
    }

    /// Takes back what was prepared for a pod, but for what other pods use.
    pub async fn unprepare(&self, pod_uid: &str) -> Result<(), String> {
        if !self.prepared.lock().values().any(|p| p.pods.contains(pod_uid)) {
            return Ok(());
        }
        let _one = self.busy.lock().await;
        let (mine, shared): (Vec<_>, Vec<_>) = {
            let prepared = self.prepared.lock();
            let own =
                prepared.iter().filter(|(_, p)| p.pods.contains(pod_uid)).map(|(uid, p)| (uid.clone(), p.clone()));
            own.partition(|(_, p)| p.pods.len() == 1)
        };
        for (uid, _) in shared {
            if let Some(claim) = self.prepared.lock().get_mut(&uid) {
                claim.pods.remove(pod_uid);
            }
        }
        for (uid, claim) in mine {
            for driver in claim.devices.keys() {
                let mut client = self.client_of(driver)?;
                let wanted =
                    pb::Claim { namespace: claim.namespace.clone(), uid: uid.clone(), name: claim.name.clone() };
                let message = pb::NodeUnprepareResourcesRequest { claims: vec![wanted] };
                let answer = tokio::time::timeout(CALL_TIMEOUT, client.node_unprepare_resources(message)).await;
                let answer = answer.map_err(|_| format!("DRA driver {driver} did not answer in time"))?;
                let answer = answer.map_err(|s| format!("NodeUnprepareResources of {driver}: {}", s.message()))?;
                if let Some(failed) = answer.into_inner().claims.remove(&uid).filter(|a| !a.error.is_empty()) {
                    return Err(format!(
                        "NodeUnprepareResources of {driver} failed for claim {}: {}",
                        claim.name, failed.error
                    ));
                }
            }
            self.prepared.lock().remove(&uid);
        }
        self.save();
        Ok(())
    }

    /// The CDI devices of a container, by the claims that it names.
    pub fn devices_of(&self, pod: &Pod, container: &Container) -> Vec<String> {
        self.claims_of_container(pod, container).into_iter().flat_map(|(_, _, d)| d.cdi_ids).collect()
    }

    /// What a container has of claims: each claim, driver and device.
    pub(crate) fn claims_of_container(&self, pod: &Pod, container: &Container) -> Vec<(Prepared, String, Device)> {
        let names: BTreeMap<String, Option<String>> = claims_of(pod).collect();
        asked_by(pod, container)
            .flat_map(|(claim, request)| self.devices_of_claim(pod, &names, claim, request))
            .collect()
    }

    /// What one of a pod's claims, or one request of it, has brought.
    fn devices_of_claim(
        &self,
        pod: &Pod,
        names: &BTreeMap<String, Option<String>>,
        claim: &str,
        request: Option<&str>,
    ) -> Vec<(Prepared, String, Device)> {
        let Some(Some(name)) = names.get(claim) else { return Vec::new() };
        let prepared = self.prepared.lock();
        let Some(own) = prepared.values().find(|p| p.pods.contains(uid_of(pod)) && &p.name == name) else {
            return Vec::new();
        };
        // A request may have alternatives: `request/alternative`.
        let named = |r: &String| request.is_some_and(|wanted| r.split('/').next() == Some(wanted));
        let asked = |d: &&Device| request.is_none() || d.requests.is_empty() || d.requests.iter().any(named);
        let of_driver = |(driver, devices): (&String, &Vec<Device>)| -> Vec<(Prepared, String, Device)> {
            devices.iter().filter(asked).map(|d| (own.clone(), driver.clone(), d.clone())).collect()
        };
        own.devices.iter().flat_map(of_driver).collect()
    }

    /// The health of the devices that a container has of claims. As `UpdateAllocatedResourcesStatus`.
    pub fn health_of(&self, pod: &Pod, container: &Container) -> Vec<ResourceStatus> {
        let now = Instant::now();
        let names: BTreeMap<String, Option<String>> = claims_of(pod).collect();
        let health = |(_, driver, device): (Prepared, String, Device)| {
            let id = device.cdi_ids.first().cloned();
            let id = id.unwrap_or_else(|| format!("{driver}/{}/{}", device.pool, device.name));
            self.healths.of(&driver, &device.pool, &device.name, id, now)
        };
        let listed = container.resources.iter().flat_map(|r| r.claims.iter().flatten());
        let status = |claim: &ResourceClaimName| {
            let request = claim.request.as_deref().filter(|r| !r.is_empty());
            let devices = self.devices_of_claim(pod, &names, &claim.name, request);
            let of_request = request.map(|request| format!("/{request}")).unwrap_or_default();
            (!devices.is_empty()).then(|| ResourceStatus {
                name: format!("claim:{}{of_request}", claim.name),
                resources: Some(devices.into_iter().map(health).collect()),
            })
        };
        listed.filter_map(status).collect()
    }

    /// Waits until drivers have news of their devices' health.
    pub async fn health_changed(&self) {
        self.healths.changed.notified().await;
    }

    /// The UIDs of pods that have devices of claims.
    pub fn pods(&self) -> BTreeSet<String> {
        self.prepared.lock().values().flat_map(|p| p.pods.iter().cloned()).collect()
    }
}

impl Registry for Dra {
    fn plugin_type(&self) -> &'static str {
        "DRAPlugin"
    }

    fn register<'a>(&'a self, info: &'a PluginInfo, channel: Channel) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let offers = |name: &str| info.supported_versions.iter().any(|version| version == name);
            let Some((_, adapt)) = SERVICES.iter().find(|(name, _)| offers(name)) else {
                let known = SERVICES.map(|(name, _)| name);
                return Err(format!(
                    "none of the services of this driver is known ({known:?}): {:?}",
                    info.supported_versions
                ));
            };
            let listening = self.healths.clone().follow(info.name.clone(), channel.clone());
            self.listening.lock().insert(info.name.clone(), AbortOnDropHandle::new(tokio::spawn(listening)));
            self.drivers.lock().insert(info.name.clone(), channel.map_request(*adapt));
            self.wiping.lock().remove(&info.name);
            Ok(())
        })
    }

    fn deregister<'a>(&'a self, name: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            self.drivers.lock().remove(name);
            self.listening.lock().remove(name);
            self.healths.forget(name);
            self.wipe(name, WIPING_DELAY);
        })
    }
}

/// A pod's own name of the claim that was made for its extended resources: no claim that it lists has it (KEP-5004).
const FOR_EXTENDED_RESOURCES: &str = "";

/// The claims of a pod: its own name of each, and the name of the object. None: none was needed.
fn claims_of(pod: &Pod) -> impl Iterator<Item = (String, Option<String>)> + '_ {
    let made = pod.status.iter().flat_map(|s| s.resource_claim_statuses.iter().flatten());
    let made: BTreeMap<&str, Option<&String>> =
        made.map(|s| (s.name.as_str(), s.resource_claim_name.as_ref())).collect();
    let extended = pod.status.iter().filter_map(|s| s.extended_resource_claim_status.as_ref());
    let extended = extended.map(|e| (FOR_EXTENDED_RESOURCES.to_owned(), Some(e.resource_claim_name.clone())));
    let claims = pod.spec.iter().flat_map(|s| s.resource_claims.iter().flatten());
    let listed = claims.map(move |claim| {
        let name = claim.resource_claim_name.as_ref().or_else(|| made.get(claim.name.as_str()).copied().flatten());
        (claim.name.clone(), name.cloned())
    });
    listed.chain(extended)
}

/// What a container asks of the pod's claims: the pod's name of each, and the request in it (all, if there is none).
fn asked_by<'p>(pod: &'p Pod, container: &'p Container) -> impl Iterator<Item = (&'p str, Option<&'p str>)> {
    let listed = container.resources.iter().flat_map(|r| r.claims.iter().flatten());
    let listed = listed.map(|c| (c.name.as_str(), c.request.as_deref().filter(|r| !r.is_empty())));
    let mapped = pod.status.iter().filter_map(|s| s.extended_resource_claim_status.as_ref());
    let mapped = mapped.flat_map(|e| &e.request_mappings).filter(|m| m.container_name == container.name);
    listed.chain(mapped.map(|m| (FOR_EXTENDED_RESOURCES, Some(m.request_name.as_str()))))
}

/// A claim that the pod may use now: its UID, its entry, and the drivers that have devices for it.
fn usable(claim: &ResourceClaim, pod_uid: &str) -> Result<(String, Prepared, BTreeSet<String>), String> {
    let name = claim.metadata.name.clone().unwrap_or_default();
    let status = claim.status.as_ref();
    if !status.iter().flat_map(|s| s.reserved_for.iter().flatten()).any(|r| r.uid == pod_uid) {
        return Err(format!("pod is not allowed to use ResourceClaim {name}: it is not reserved for it"));
    }
    let allocation =
        status.and_then(|s| s.allocation.as_ref()).ok_or_else(|| format!("ResourceClaim {name} is not allocated"))?;
    let results = allocation.devices.iter().flat_map(|d| d.results.iter().flatten());
    let entry =
        Prepared { namespace: claim.metadata.namespace.clone().unwrap_or_default(), name, ..Default::default() };
    Ok((claim.metadata.uid.clone().unwrap_or_default(), entry, results.map(|r| r.driver.clone()).collect()))
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use proto::dra::dra_plugin_server::{DraPlugin, DraPluginServer};
    use proto::dra_health as health;
    use proto::dra_health::dra_resource_health_server::{DraResourceHealth, DraResourceHealthServer};
    use serde_json::json;
    use tokio_stream::wrappers::UnixListenerStream;
    use tonic::{Request, Response, Status};

    use super::*;
    use crate::runtime::cri::unix_channel;

    #[derive(Clone, Default)]
    struct FakeDriver(Arc<Mutex<Vec<String>>>);

    #[tonic::async_trait]
    impl DraPlugin for FakeDriver {
        async fn node_prepare_resources(
            &self,
            request: Request<pb::NodePrepareResourcesRequest>,
        ) -> Result<Response<pb::NodePrepareResourcesResponse>, Status> {
            let mut claims = BTreeMap::new();
            for claim in request.into_inner().claims {
                self.0.lock().push(format!("prepare {}", claim.name));
                let device = |request: &str| pb::Device {
                    request_names: vec![request.to_owned()],
                    cdi_device_ids: vec![format!("vendor/x={}-{request}", claim.name)],
                    ..Default::default()
                };
                let error = if claim.name == "bad" { "broken" } else { "" }.to_owned();
                let devices = vec![device("one"), device("two")];
                claims.insert(claim.uid, pb::NodePrepareResourceResponse { devices, error });
            }
            Ok(Response::new(pb::NodePrepareResourcesResponse { claims }))
        }
        async fn node_unprepare_resources(
            &self,
            request: Request<pb::NodeUnprepareResourcesRequest>,
        ) -> Result<Response<pb::NodeUnprepareResourcesResponse>, Status> {
            self.0.lock().extend(request.into_inner().claims.iter().map(|c| format!("unprepare {}", c.name)));
            Ok(Response::new(pb::NodeUnprepareResourcesResponse::default()))
        }
    }

    #[tonic::async_trait]
    impl DraResourceHealth for FakeDriver {
        type NodeWatchResourcesStream =
            futures::stream::BoxStream<'static, Result<health::NodeWatchResourcesResponse, Status>>;
        async fn node_watch_resources(
            &self,
            _: Request<health::NodeWatchResourcesRequest>,
        ) -> Result<Response<Self::NodeWatchResourcesStream>, Status> {
            let device = health::DeviceHealth {
                device: Some(health::DeviceIdentifier::default()),
                health: health::HealthStatus::Unhealthy.into(),
                message: "too hot".into(),
                health_check_timeout_seconds: 600,
                ..Default::default()
            };
            let said = health::NodeWatchResourcesResponse { devices: vec![device] };
            Ok(Response::new(futures::stream::once(async { Ok(said) }).chain(futures::stream::pending()).boxed()))
        }
    }

    fn claim(name: &str, pods: &[&str]) -> ResourceClaim {
        let reserved: Vec<_> = pods.iter().map(|uid| json!({"resource": "pods", "name": uid, "uid": uid})).collect();
        serde_json::from_value(
            json!({"metadata": {"name": name, "namespace": "ns", "uid": format!("{name}-uid")}, "spec": {},
            "status": {"reservedFor": reserved, "allocation": {"devices": {"results": [
                {"request": "one", "driver": "fake", "pool": "p", "device": "d"}]}}}}),
        )
        .unwrap()
    }

    #[tokio::test]
    async fn claims_are_prepared_shared_and_taken_back() {
        let root = tempfile::tempdir().unwrap();
        let socket = root.path().join("dra.sock");
        let driver = FakeDriver::default();
        let listener = UnixListenerStream::new(tokio::net::UnixListener::bind(&socket).unwrap());
        let server = tonic::transport::Server::builder()
            .add_service(DraPluginServer::new(driver.clone()))
            .add_service(DraResourceHealthServer::new(driver.clone()));
        tokio::spawn(server.serve_with_incoming(listener));
        let dra = Dra::new(None, "n1", root.path());
        let shared = claim("shared", &["u1", "u2"]);
        let early = dra.prepare_claims("u1", &[&shared]).await.unwrap_err();
        assert_eq!(early, "DRA driver fake is not registered");
        let mut plugin =
            PluginInfo { name: "fake".into(), supported_versions: vec!["v0".into()], ..Default::default() };
        assert!(dra.register(&plugin, unix_channel(socket.clone())).await.is_err());
        plugin.supported_versions = vec!["v1.DRAPlugin".into()];
        dra.register(&plugin, unix_channel(socket.clone())).await.unwrap();

        dra.prepare_claims("u1", &[&shared]).await.unwrap();
        dra.prepare_claims("u2", &[&shared]).await.unwrap();
        assert!(dra.prepare_claims("u3", &[&shared]).await.unwrap_err().contains("not reserved"));
        assert_eq!(std::mem::take(&mut *driver.0.lock()), ["prepare shared"]);
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u1"}, "spec": {
            "resourceClaims": [{"name": "mine", "resourceClaimTemplateName": "t"}],
            "containers": [{"name": "all", "resources": {"claims": [{"name": "mine"}]}},
                {"name": "part", "resources": {"claims": [{"name": "mine", "request": "two"}]}}, {"name": "none"}]},
            "status": {"resourceClaimStatuses": [{"name": "mine", "resourceClaimName": "shared"}]}}))
            .unwrap();
        let container = |index: usize| &pod.spec.as_ref().unwrap().containers[index];
        let healthy = || dra.health_of(&pod, container(1))[0].resources.clone().unwrap()[0].health.clone().unwrap();
        while healthy() == "Unknown" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let told = serde_json::to_value(dra.health_of(&pod, container(1))).unwrap();
        let unhealthy = json!({"resourceID": "vendor/x=shared-two", "health": "Unhealthy", "message": "too hot"});
        assert_eq!(told, json!([{"name": "claim:mine/two", "resources": [unhealthy]}]));
        assert_eq!(dra.health_of(&pod, container(0))[0].name, "claim:mine");
        assert!(dra.health_of(&pod, container(2)).is_empty());
        // As a kubelet that was started anew knows it.
        let restarted = Dra::new(None, "n1", root.path());
        let of = |index: usize| restarted.devices_of(&pod, &pod.spec.as_ref().unwrap().containers[index]);
        assert_eq!(of(0), ["vendor/x=shared-one", "vendor/x=shared-two"]);
        assert_eq!((of(1), of(2)), (vec!["vendor/x=shared-two".to_owned()], vec![]));
        // What the scheduler made of an extended resource is a claim that the pod does not list.
        let mut by_resource = pod.clone();
        by_resource.spec.as_mut().unwrap().resource_claims = None;
        by_resource.status =
            serde_json::from_value(json!({"extendedResourceClaimStatus": {"resourceClaimName": "shared",
            "requestMappings": [{"containerName": "none", "resourceName": "example.com/gpu", "requestName": "two"}]}}))
            .unwrap();
        let of =
            |index: usize| restarted.devices_of(&by_resource, &by_resource.spec.as_ref().unwrap().containers[index]);
        assert_eq!((of(0), of(2)), (vec![], vec!["vendor/x=shared-two".to_owned()]));

        restarted.register(&plugin, unix_channel(socket)).await.unwrap();
        restarted.unprepare("u1").await.unwrap();
        assert!(driver.0.lock().is_empty());
        restarted.unprepare("u2").await.unwrap();
        restarted.unprepare("u2").await.unwrap();
        assert_eq!(std::mem::take(&mut *driver.0.lock()), ["unprepare shared"]);
        let failed = restarted.prepare_claims("u1", &[&claim("bad", &["u1"])]).await.unwrap_err();
        assert_eq!(failed, "NodePrepareResources of fake failed for claim bad: broken");
    }

    #[test]
    fn older_drivers_are_called_by_their_name() {
        let call = http::Request::builder().uri("http://localhost/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/Call");
        let call = as_v1beta1(call.body(tonic::body::Body::empty()).unwrap());
        assert_eq!(call.uri(), "http://localhost/k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin/Call");
    }
}
