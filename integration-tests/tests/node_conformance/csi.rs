//! Volumes that others make: a CSI driver of the test's own, and the kernel's huge pages.
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;

use integration_tests::Host;
use k8s_openapi::api::core::v1::Event;
use k8s_openapi::api::storage::v1::{CSIDriver, CSINode};
use kube::api::ListParams;
use proto::csi::node_server::{Node as NodeService, NodeServer};
use proto::csi::node_service_capability::{Rpc, Type, rpc};
use proto::csi::{self as pb};
use proto::pluginregistration::registration_server::{Registration, RegistrationServer};
use proto::pluginregistration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic::{Request, Response, Status};

use super::*;

const NAME: &str = "noting.csi.example";
type Answer<T> = Result<Response<T>, Status>;

/// A driver that makes plain directories, with a file that says what it was told, and takes notes.
#[derive(Clone)]
struct Driver {
    /// The host's `/var/lib/kubelet` as seen from here.
    kubelet: PathBuf,
    notes: Arc<Mutex<Vec<String>>>,
}

impl Driver {
    fn note(&self, call: &str, volume: &str) {
        self.notes.lock().expect("nobody panics with it").push(format!("{call} {volume}"));
    }

    fn here(&self, path: &str) -> PathBuf {
        self.kubelet.join(path.trim_start_matches("/var/lib/kubelet/"))
    }
}

fn internal(error: std::io::Error) -> Status {
    Status::internal(error.to_string())
}

/// A driver's sockets: its own, and the one that makes it known. Both go with it.
pub(super) struct Serving<'a> {
    host: &'a Host,
    directory: String,
    registration: String,
    servers: [tokio::task::JoinHandle<Result<(), tonic::transport::Error>>; 2],
}

impl<'a> Serving<'a> {
    /// Serves `driver` on a host under its name.
    pub(super) fn start(host: &'a Host, kind: &str, name: &str, version: &str, driver: Router) -> Self {
        let directory = format!("/var/lib/kubelet/plugins/{name}");
        let registration = format!("/var/lib/kubelet/plugins_registry/{name}.sock");
        host.exec(&format!("mkdir -p {directory} /var/lib/kubelet/plugins_registry")).success();
        let endpoint = format!("{directory}/driver.sock");
        let listen = |path: &str| {
            let path = host.file("/var/lib/kubelet").join(path.trim_start_matches("/var/lib/kubelet/"));
            let _ = std::fs::remove_file(&path);
            UnixListenerStream::new(tokio::net::UnixListener::bind(path).expect("a socket"))
        };
        let registrar = Registrar(PluginInfo {
            r#type: kind.into(),
            name: name.into(),
            endpoint: endpoint.clone(),
            supported_versions: vec![version.into()],
        });
        let registrar = Server::builder().add_service(RegistrationServer::new(registrar));
        let own = tokio::spawn(driver.serve_with_incoming(listen(&endpoint)));
        let servers = [own, tokio::spawn(registrar.serve_with_incoming(listen(&registration)))];
        Self { host, directory, registration, servers }
    }

    pub(super) fn end(self) {
        self.servers.iter().for_each(tokio::task::JoinHandle::abort);
        self.host.exec(&format!("rm -r {} {}", self.registration, self.directory)).success();
    }
}

/// Makes a plugin known.
struct Registrar(PluginInfo);

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Answer<PluginInfo> {
        Ok(Response::new(self.0.clone()))
    }
    async fn notify_registration_status(&self, _: Request<RegistrationStatus>) -> Answer<RegistrationStatusResponse> {
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

#[tonic::async_trait]
impl NodeService for Driver {
    async fn node_stage_volume(
        &self,
        request: Request<pb::NodeStageVolumeRequest>,
    ) -> Answer<pb::NodeStageVolumeResponse> {
        self.note("stage", &request.get_ref().volume_id);
        Ok(Response::new(Default::default()))
    }
    async fn node_unstage_volume(
        &self,
        request: Request<pb::NodeUnstageVolumeRequest>,
    ) -> Answer<pb::NodeUnstageVolumeResponse> {
        self.note("unstage", &request.get_ref().volume_id);
        Ok(Response::new(Default::default()))
    }
    async fn node_publish_volume(
        &self,
        request: Request<pb::NodePublishVolumeRequest>,
    ) -> Answer<pb::NodePublishVolumeResponse> {
        let request = request.into_inner();
        let target = self.here(&request.target_path);
        std::fs::create_dir_all(&target).map_err(internal)?;
        let told = |key: &str| request.volume_context.get(key).cloned().unwrap_or_default();
        let text = format!(
            "{} {} {}",
            told("colour"),
            told("csi.storage.k8s.io/pod.name"),
            told("csi.storage.k8s.io/ephemeral")
        );
        std::fs::write(target.join("told"), text).map_err(internal)?;
        let inline = request.staging_target_path.is_empty();
        self.note("publish", if inline { "inline" } else { &request.volume_id });
        Ok(Response::new(Default::default()))
    }
    async fn node_unpublish_volume(
        &self,
        request: Request<pb::NodeUnpublishVolumeRequest>,
    ) -> Answer<pb::NodeUnpublishVolumeResponse> {
        let request = request.into_inner();
        match std::fs::remove_dir_all(self.here(&request.target_path)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(internal(error)),
            _ => {}
        }
        self.note("unpublish", if request.volume_id == "kept" { "kept" } else { "inline" });
        Ok(Response::new(Default::default()))
    }
    async fn node_get_volume_stats(
        &self,
        _: Request<pb::NodeGetVolumeStatsRequest>,
    ) -> Answer<pb::NodeGetVolumeStatsResponse> {
        let unit = pb::volume_usage::Unit::Bytes as i32;
        let usage = vec![pb::VolumeUsage { available: 4_096, total: 12_288, used: 8_192, unit }];
        Ok(Response::new(pb::NodeGetVolumeStatsResponse { usage, ..Default::default() }))
    }
    async fn node_expand_volume(
        &self,
        request: Request<pb::NodeExpandVolumeRequest>,
    ) -> Answer<pb::NodeExpandVolumeResponse> {
        self.note("expand", &request.get_ref().volume_id);
        Ok(Response::new(Default::default()))
    }
    async fn node_get_capabilities(
        &self,
        _: Request<pb::NodeGetCapabilitiesRequest>,
    ) -> Answer<pb::NodeGetCapabilitiesResponse> {
        let can = |what: rpc::Type| pb::NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: what as i32 })) };
        let all = [rpc::Type::StageUnstageVolume, rpc::Type::ExpandVolume, rpc::Type::GetVolumeStats];
        Ok(Response::new(pb::NodeGetCapabilitiesResponse { capabilities: all.map(can).to_vec() }))
    }
    async fn node_get_info(&self, _: Request<pb::NodeGetInfoRequest>) -> Answer<pb::NodeGetInfoResponse> {
        Ok(Response::new(pb::NodeGetInfoResponse { node_id: "here".into(), ..Default::default() }))
    }
}

impl Node {
    /// A driver that comes to the node makes volumes for pods: one of a pod's own, from its spec, and one behind a claim.
    pub(super) async fn drivers_make_volumes_for_pods(&self, cluster: &Cluster) {
        let host = &cluster.hosts[0];
        let driver = Driver { kubelet: host.file("/var/lib/kubelet"), notes: Arc::default() };
        let notes = driver.notes.clone();
        let node = Server::builder().add_service(NodeServer::new(driver));
        let serving = Serving::start(host, "CSIPlugin", NAME, "1.0.0", node);
        let description: CSIDriver = serde_json::from_value(json!({"metadata": {"name": NAME}, "spec":
            {"attachRequired": false, "podInfoOnMount": true, "volumeLifecycleModes": ["Persistent", "Ephemeral"]}}))
        .expect("a driver");
        let drivers = Api::<CSIDriver>::all(self.client.clone());
        drivers.create(&PostParams::default(), &description).await.expect("made");
        let mut container = sh("c", "cat /a/told; echo; cat /b/told; echo; sleep 600");
        let mounts = json!([{"name": "a", "mountPath": "/a"}, {"name": "b", "mountPath": "/b"}]);
        merge(&mut container, json!({"volumeMounts": mounts}));
        let inline = json!({"driver": NAME, "volumeAttributes": {"colour": "blue"}});
        let of_pod = json!({"containers": [container], "nodeName": self.pods_host().await.0, "volumes": [
            {"name": "a", "csi": inline}, {"name": "b", "persistentVolumeClaim": {"claimName": "driven"}}]});
        self.run("driven", of_pod).await;
        // Not before its claim is there.
        self.told("driven", "FailedMount", "Unable to attach or mount volumes: unmounted volumes=[").await;
        self.told(
            "driven",
            "FailedMount",
            ": error processing PVC default/driven: failed to fetch PVC from API server: ",
        )
        .await;
        let volume: PersistentVolume = serde_json::from_value(json!({"metadata": {"name": "driven"}, "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "",
            "claimRef": {"namespace": "default", "name": "driven"}, "persistentVolumeReclaimPolicy": "Retain",
            "csi": {"driver": NAME, "volumeHandle": "kept", "volumeAttributes": {"colour": "red"}}}}))
        .expect("a volume");
        let volumes = Api::<PersistentVolume>::all(self.client.clone());
        let volume = volumes.create(&PostParams::default(), &volume).await.expect("made");
        self.create::<PersistentVolumeClaim>(json!({"metadata": {"name": "driven"}, "spec": {"volumeName": "driven",
            "accessModes": ["ReadWriteOnce"], "storageClassName": "", "resources": {"requests": {"storage": "1Gi"}}}}))
            .await;
        self.bind("driven", &volume).await;
        self.ready("driven").await;
        // A volume that is larger than its claim knows: its driver is asked to let what is on it grow, at the next look.
        let larger = json!({"spec": {"capacity": {"storage": "2Gi"}}});
        volumes.patch("driven", &PatchParams::default(), &Patch::Merge(larger)).await.expect("larger");
        let look = json!({"metadata": {"annotations": {"look": "again"}}});
        self.pods.patch("driven", &PatchParams::default(), &Patch::Merge(look)).await.expect("changed");
        let grown = "MountVolume.NodeExpandVolume succeeded for volume \"driven\" ";
        self.told("driven", "FileSystemResizeSuccessful", grown).await;
        let claims = Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), "default");
        eventually("the claim knows", MINUTES, || async {
            let claim = claims.get("driven").await.map_err(|e| e.to_string())?;
            let capacity = claim.status.and_then(|status| status.capacity).unwrap_or_default();
            if capacity.get("storage").is_some_and(|q| q.0 == "2Gi") { Ok(()) } else { Err(format!("{capacity:?}")) }
        })
        .await;
        eventually("the pod sees what the driver was told", MINUTES, || async {
            let log = self.log("driven").await;
            if log == "blue driven true\nred driven false\n" { Ok(()) } else { Err(log) }
        })
        .await;
        let known = Api::<CSINode>::all(self.client.clone()).get(&self.pods_host().await.0).await.expect("a CSINode");
        assert!(known.spec.drivers.iter().any(|d| d.name == NAME && d.node_id == "here"), "{known:?}");
        // A kubelet that is new finds the driver and the volumes again.
        cluster.kill(0, "kubelet");
        self.remove(&["driven"]).await;
        let taken = || notes.lock().expect("nobody panics with it").clone();
        eventually("all is taken back", MINUTES, || async {
            let taken = taken();
            let has = |note: &str| taken.iter().any(|n| n == note);
            let left = host.exec("ls -d /var/lib/kubelet/pods/*/volumes/kubernetes.io~csi/* 2>/dev/null").stdout;
            let all = ["unpublish inline", "unpublish kept", "unstage kept"].into_iter().all(has);
            if all && left.is_empty() { Ok(()) } else { Err(format!("{taken:?} {left}")) }
        })
        .await;
        let order: Vec<String> = taken();
        let at = |note: &str| order.iter().position(|n| n == note);
        assert!(at("stage kept") < at("publish kept") && at("unpublish kept") < at("unstage kept"), "{order:?}");
        serving.end();
        drivers.delete(NAME, &DeleteParams::default()).await.expect("deleted");
    }

    /// An event about objects of this name has these words.
    async fn told(&self, name: &str, reason: &str, words: &str) {
        let events = Api::<Event>::namespaced(self.client.clone(), "default");
        let of = ListParams::default().fields(&format!("involvedObject.name={name},reason={reason}"));
        eventually(&format!("{reason} of {name}"), MINUTES, || async {
            let found = events.list(&of).await.map_err(|e| e.to_string())?.items;
            let told: Vec<String> = found.into_iter().filter_map(|event| event.message).collect();
            if told.iter().any(|message| message.contains(words)) { Ok(()) } else { Err(format!("{told:?}")) }
        })
        .await;
    }

    /// A volume of huge pages, where the machine can spare some.
    pub(super) async fn huge_pages_are_a_volume(&self, cluster: &Cluster) {
        let host = &cluster.hosts[0];
        let setting = "/proc/sys/vm/nr_hugepages";
        let before = std::fs::read_to_string(setting).unwrap_or_default();
        let wanted = before.trim().parse::<u32>().unwrap_or(0) + 8;
        host.exec(&format!("echo {wanted} >{setting}"));
        if std::fs::read_to_string(setting).unwrap_or_default().trim() != wanted.to_string() {
            println!("left out: huge pages cannot be set aside here");
            return;
        }
        // What a machine has is read when the kubelet starts.
        cluster.kill(0, "kubelet");
        let nodes = Api::<k8s_openapi::api::core::v1::Node>::all(self.client.clone());
        eventually("the node has huge pages", MINUTES, || async {
            let list = nodes.list(&kube::api::ListParams::default()).await.map_err(|e| e.to_string())?;
            let amounts = list.items.first().and_then(|n| n.status.as_ref()?.allocatable.clone()).unwrap_or_default();
            let found = amounts.get("hugepages-2Mi").is_some_and(|q| q.0 != "0");
            if found { Ok(()) } else { Err(format!("{amounts:?}")) }
        })
        .await;
        let script =
            "grep ' /v ' /proc/mounts | cut -d' ' -f3; grep -o 'pagesize=2M' /proc/mounts | head -1; stat -c %a /v";
        let resources = json!({"resources": {"limits": {"hugepages-2Mi": "4Mi", "memory": "64Mi", "cpu": "10m"}},
            "volumeMounts": [{"name": "v", "mountPath": "/v"}]});
        let volume = |medium: &str| json!({"volumes": [{"name": "v", "emptyDir": {"medium": medium}}]});
        let told = ["hugetlbfs", "pagesize=2M", "777"];
        self.all(
            "huge",
            vec![
                case("emptyDir of huge pages", script, resources.clone(), volume("HugePages"), &told),
                case("emptyDir of huge pages of a size", script, resources, volume("HugePages-2Mi"), &told),
            ],
        )
        .await;
        host.exec(&format!("echo {} >{setting}", before.trim())).success();
        cluster.kill(0, "kubelet");
    }
}
