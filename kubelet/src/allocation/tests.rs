//! Pods on a machine of two nodes, with a plugin that gives devices on both.

use std::time::Duration;

use proto::deviceplugin::device_plugin_server::{DevicePlugin, DevicePluginServer};
use proto::deviceplugin::registration_client::RegistrationClient;
use proto::podresources::pod_resources_lister_client::PodResourcesListerClient;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status};

use super::*;
use crate::runtime::cri::unix_channel;

#[derive(Clone, Default)]
struct FakePlugin {
    calls: Arc<Mutex<Vec<String>>>,
    list: Arc<Mutex<Option<mpsc::Sender<Result<pb::ListAndWatchResponse, Status>>>>>,
}

fn list(health: &str) -> pb::ListAndWatchResponse {
    let device = |(id, node)| pb::Device {
        id: format!("d{id}"),
        health: if id == 0 { health } else { "Healthy" }.to_owned(),
        topology: Some(pb::TopologyInfo { nodes: vec![pb::NumaNode { id: node }] }),
    };
    pb::ListAndWatchResponse { devices: [(0, 0), (1, 0), (2, 1), (3, 1)].into_iter().map(device).collect() }
}

#[tonic::async_trait]
impl DevicePlugin for FakePlugin {
    type ListAndWatchStream = ReceiverStream<Result<pb::ListAndWatchResponse, Status>>;

    async fn get_device_plugin_options(
        &self,
        _: Request<pb::Empty>,
    ) -> Result<Response<pb::DevicePluginOptions>, Status> {
        Ok(Response::new(pb::DevicePluginOptions::default()))
    }
    async fn list_and_watch(&self, _: Request<pb::Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let (sender, receiver) = mpsc::channel(4);
        sender.try_send(Ok(list("Healthy"))).map_err(|e| Status::internal(e.to_string()))?;
        *self.list.lock() = Some(sender);
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
    async fn get_preferred_allocation(
        &self,
        _: Request<pb::PreferredAllocationRequest>,
    ) -> Result<Response<pb::PreferredAllocationResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn allocate(&self, request: Request<pb::AllocateRequest>) -> Result<Response<pb::AllocateResponse>, Status> {
        let ids = request.into_inner().container_requests[0].devices_ids.join("+");
        self.calls.lock().push(format!("allocate {ids}"));
        let device =
            pb::DeviceSpec { host_path: "/dev/null".into(), container_path: "/dev/x".into(), permissions: "rw".into() };
        let response = pb::ContainerAllocateResponse {
            envs: [("IDS".to_owned(), ids)].into(),
            devices: vec![device],
            ..Default::default()
        };
        Ok(Response::new(pb::AllocateResponse { container_responses: vec![response] }))
    }
    async fn pre_start_container(
        &self,
        _: Request<pb::PreStartContainerRequest>,
    ) -> Result<Response<pb::PreStartContainerResponse>, Status> {
        self.calls.lock().push("before start".into());
        Ok(Response::new(pb::PreStartContainerResponse {}))
    }
}

/// Eight processors: nodes 0 and 1 have two cores of two threads each.
fn machine() -> Topology {
    let mut cpus: Vec<topology::Cpu> =
        (0..8).map(|id| topology::Cpu { id, socket: id / 2 % 2, core: id % 2, node: id / 2 % 2, cache: 0 }).collect();
    cpus.sort();
    let node = || BTreeMap::from([("memory".to_owned(), 1u64 << 30)]);
    Topology { cpus, memory: BTreeMap::from([(0, node()), (1, node())]), ..Default::default() }
}

fn policies(topology: Policy) -> Policies {
    Policies {
        static_cpus: Some(BTreeSet::from([0])),
        static_memory: Some(BTreeMap::new()),
        topology,
        ..Default::default()
    }
}

fn pod(uid: &str, cpu: &str, memory: &str, devices: u32) -> Pod {
    let mut limits = json!({"cpu": cpu, "memory": memory});
    if devices > 0 {
        limits["example.com/thing"] = json!(devices.to_string());
    }
    serde_json::from_value(json!({"metadata": {"name": uid, "namespace": "ns", "uid": uid},
        "spec": {"containers": [{"name": "c", "resources": {"limits": limits, "requests": limits}}]}}))
    .unwrap()
}

async fn until(what: &str, done: impl Fn() -> bool) {
    for _ in 0..600 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never: {what}");
}

#[tokio::test]
async fn devices_are_registered_given_and_taken_back() {
    let root = tempfile::tempdir().unwrap();
    let shutdown = CancellationToken::new();
    let _end = shutdown.clone().drop_guard();
    let allocator = Allocator::new(machine(), Policies::default(), root.path().to_owned());
    let wanted = Arc::new(pod("u1", "1", "1Mi", 2));
    let pods = vec![wanted.clone()];
    let dra = Dra::new(None, "n1", root.path());
    tokio::spawn(allocator.clone().serve(move || pods.clone(), dra, shutdown));
    let socket = root.path().join("device-plugins/kubelet.sock");
    until("the socket", || socket.exists()).await;

    let plugin = FakePlugin::default();
    let listener = tokio::net::UnixListener::bind(root.path().join("device-plugins/fake.sock")).unwrap();
    let server = tonic::transport::Server::builder().add_service(DevicePluginServer::new(plugin.clone()));
    tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
    let register = |version: &str, name: &str| pb::RegisterRequest {
        version: version.into(),
        endpoint: "fake.sock".into(),
        resource_name: name.into(),
        options: Some(pb::DevicePluginOptions { pre_start_required: true, ..Default::default() }),
    };
    let mut registration = RegistrationClient::new(unix_channel(socket));
    for (version, name) in [("v9", "example.com/thing"), ("v1beta1", "thing"), ("v1beta1", "kubernetes.io/thing")] {
        assert!(registration.register(register(version, name)).await.is_err(), "{version} {name}");
    }
    registration.register(register("v1beta1", "example.com/thing")).await.unwrap();
    let has = |all: i64, good: i64| {
        let capacity = allocator.capacity();
        capacity.get("example.com/thing").is_some_and(|(a, g)| (a.value(), g.value()) == (all, good))
    };
    until("four devices", || has(4, 4)).await;

    allocator.admit(&wanted).await.unwrap();
    // What stands for a claim's devices is not the plugin's to give.
    let mut claimed = pod("claimed", "1", "1Mi", 2);
    let mapping = json!({"containerName": "c", "resourceName": "example.com/thing", "requestName": "r"});
    claimed.status = serde_json::from_value(
        json!({"extendedResourceClaimStatus": {"resourceClaimName": "made", "requestMappings": [mapping]}}),
    )
    .unwrap();
    allocator.admit(&claimed).await.unwrap();
    assert_eq!(plugin.calls.lock().clone(), ["allocate d0+d1"]);
    let given = allocator.before_start(&wanted, "c").await.unwrap();
    assert_eq!((given.envs[0].1.as_str(), given.devices[0].container_path.as_str()), ("d0+d1", "/dev/x"));
    assert!(given.cpuset_cpus.is_empty());
    assert_eq!(plugin.calls.lock().last().map(String::as_str), Some("before start"));

    let mut lister = PodResourcesListerClient::new(unix_channel(root.path().join("pod-resources/kubelet.sock")));
    let listed = lister.list(proto::podresources::ListPodResourcesRequest {}).await.unwrap().into_inner();
    assert_eq!(listed.pod_resources[0].containers[0].devices.len(), 2);
    let all = lister.get_allocatable_resources(proto::podresources::AllocatableResourcesRequest {}).await.unwrap();
    assert_eq!(all.into_inner().devices.len(), 4);

    // A device that fails is given to nobody; what is held survives a restart.
    let sender = plugin.list.lock().clone().unwrap();
    sender.send(Ok(list("Unhealthy"))).await.unwrap();
    until("one is unhealthy", || has(4, 3)).await;
    let health = serde_json::to_value(allocator.health_of("u1", "c")).unwrap();
    let of = |id: &str, health: &str| json!({"resourceID": id, "health": health});
    assert_eq!(
        health[0],
        json!({"name": "example.com/thing", "resources": [of("d0", "Unhealthy"), of("d1", "Healthy")]})
    );
    assert_eq!((allocator.device_holders(), allocator.health_of("u2", "c")), (vec!["u1".to_owned()], vec![]));
    let refused = allocator.admit(&pod("u2", "1", "1Mi", 3)).await.unwrap_err();
    assert_eq!(refused.reason, "UnexpectedAdmissionError");
    assert!(refused.message.contains("Requested: 3, Available: 2"), "{}", refused.message);
    let restarted = Allocator::new(machine(), Policies::default(), root.path().to_owned());
    assert_eq!(restarted.before_start(&wanted, "c").await.unwrap().envs, given.envs);
    // Whose plugin has not come back yet: no pod starts without what it asks for.
    let refused = restarted.admit(&pod("u2", "1", "1Mi", 1)).await.unwrap_err();
    assert_eq!(
        refused.message,
        "Allocate failed due to no healthy devices present; cannot allocate unhealthy devices example.com/thing, which is unexpected"
    );
    allocator.forget("u1");
    allocator.admit(&pod("u2", "1", "1Mi", 3)).await.unwrap();
}

#[tokio::test]
async fn processors_and_memory_are_kept_together_and_shared_pools_shrink() {
    let root = tempfile::tempdir().unwrap();
    let allocator = Allocator::new(machine(), policies(Policy::SingleNumaNode), root.path().to_owned());
    assert_eq!(allocator.cpuset_of("none", "c").as_deref(), Some("0-7"));
    let first = pod("u1", "2", "900Mi", 0);
    allocator.admit(&first).await.unwrap();
    let given = allocator.before_start(&first, "c").await.unwrap();
    assert_eq!((given.cpuset_cpus.as_str(), given.cpuset_mems.as_str()), ("1,5", "0"), "a whole core of a node");
    assert_eq!(allocator.cpuset_of("none", "c").as_deref(), Some("0,2-4,6-7"));
    let second = pod("u2", "2", "900Mi", 0);
    allocator.admit(&second).await.unwrap();
    assert_eq!(allocator.before_start(&second, "c").await.unwrap().cpuset_mems, "1");
    // No node has that much memory left, though both together have.
    let third = allocator.admit(&pod("u3", "1", "200Mi", 0)).await.unwrap_err();
    assert_eq!(third.reason, "TopologyAffinityError");
    allocator.keep_only(|uid| uid == "u2");
    allocator.admit(&pod("u3", "1", "200Mi", 0)).await.unwrap();
    // What is no whole processor is shared.
    allocator.admit(&pod("u4", "500m", "1Mi", 0)).await.unwrap();
    assert!(allocator.cpuset_of("u4", "c").is_some_and(|set| set.contains('0')));
}

#[tokio::test]
async fn whole_cores_are_given_or_nothing_is() {
    let root = tempfile::tempdir().unwrap();
    let cpus = CpuOptions { whole_cores: true, ..Default::default() };
    let policies = Policies { cpus, static_memory: None, ..policies(Policy::None) };
    let allocator = Allocator::new(machine(), policies, root.path().to_owned());
    for (cpu, why) in [
        ("1", "requested 1 cpus not multiple cpus per core = 2"),
        ("8", "not enough free physical CPUs: available physical CPUs = 6, requested CPUs = 8, CPUs per core = 2"),
    ] {
        let refused = allocator.admit(&pod("u1", cpu, "1Mi", 0)).await.unwrap_err();
        assert_eq!(
            (refused.reason.as_str(), refused.message),
            ("SMTAlignmentError", format!("SMT Alignment Error: {why}"))
        );
    }
    // All but the core of the processor that is kept back.
    let all = pod("u1", "6", "1Mi", 0);
    allocator.admit(&all).await.unwrap();
    assert_eq!(allocator.cpuset_of("u1", "c").as_deref(), Some("1-3,5-7"));
}

#[test]
fn too_many_nodes_are_refused() {
    let machine =
        |nodes: u32| Topology { memory: (0..nodes).map(|n| (n, BTreeMap::new())).collect(), ..Default::default() };
    for (policy, nodes, most_nodes, good) in [
        (Policy::None, 9, 8, true),
        (Policy::BestEffort, 8, 8, true),
        (Policy::BestEffort, 9, 8, false),
        (Policy::BestEffort, 9, 12, true),
    ] {
        let policies = Policies { options: Options { most_nodes, ..Default::default() }, ..policies(policy) };
        assert_eq!(policies.check(&machine(nodes)).is_ok(), good, "{policy:?} {nodes} {most_nodes}");
    }
}
