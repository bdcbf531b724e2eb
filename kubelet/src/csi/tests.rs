//! The life of volumes with a driver that only takes notes.

use std::collections::BTreeSet;
use std::fs;

use proto::csi as pb;
use proto::csi::node_server::{Node, NodeServer};
use proto::csi::node_service_capability::{Rpc, Type};
use proto::csi::volume_capability::{AccessType, access_mode::Mode};
use proto::pluginregistration::registration_server::{Registration, RegistrationServer};
use proto::pluginregistration::{InfoRequest, RegistrationStatus, RegistrationStatusResponse};
use serde_json::json;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::*;
use crate::usage::DiskUsage;

#[derive(Clone, Default)]
struct FakeDriver {
    notes: Arc<Mutex<Vec<String>>>,
    publishes: Arc<Mutex<Vec<pb::NodePublishVolumeRequest>>>,
    told: Arc<Mutex<Option<RegistrationStatus>>>,
    endpoint: String,
}

impl FakeDriver {
    fn note(&self, call: &str, id: &str) {
        self.notes.lock().push(format!("{call} {id}"));
    }

    fn taken(&self) -> Vec<String> {
        std::mem::take(&mut *self.notes.lock())
    }
}

#[tonic::async_trait]
impl Registration for FakeDriver {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".into(),
            name: "fake.csi".into(),
            endpoint: self.endpoint.clone(),
            supported_versions: vec!["1.0.0".into()],
        }))
    }
    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        *self.told.lock() = Some(request.into_inner());
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

#[tonic::async_trait]
impl Node for FakeDriver {
    async fn node_stage_volume(
        &self,
        request: Request<pb::NodeStageVolumeRequest>,
    ) -> Result<Response<pb::NodeStageVolumeResponse>, Status> {
        self.note("stage", &request.get_ref().volume_id);
        Ok(Response::new(pb::NodeStageVolumeResponse {}))
    }
    async fn node_unstage_volume(
        &self,
        request: Request<pb::NodeUnstageVolumeRequest>,
    ) -> Result<Response<pb::NodeUnstageVolumeResponse>, Status> {
        self.note("unstage", &request.get_ref().volume_id);
        Ok(Response::new(pb::NodeUnstageVolumeResponse {}))
    }
    async fn node_publish_volume(
        &self,
        request: Request<pb::NodePublishVolumeRequest>,
    ) -> Result<Response<pb::NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        self.note("publish", &request.volume_id);
        let block = matches!(
            request.volume_capability.as_ref().and_then(|c| c.access_type.as_ref()),
            Some(AccessType::Block(_))
        );
        let made =
            if block { fs::write(&request.target_path, "a device") } else { fs::create_dir_all(&request.target_path) };
        made.map_err(|e| Status::internal(e.to_string()))?;
        self.publishes.lock().push(request);
        Ok(Response::new(pb::NodePublishVolumeResponse {}))
    }
    async fn node_unpublish_volume(
        &self,
        request: Request<pb::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<pb::NodeUnpublishVolumeResponse>, Status> {
        self.note("unpublish", &request.get_ref().volume_id);
        Ok(Response::new(pb::NodeUnpublishVolumeResponse {}))
    }
    async fn node_get_volume_stats(
        &self,
        _: Request<pb::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<pb::NodeGetVolumeStatsResponse>, Status> {
        let usage =
            |unit: pb::volume_usage::Unit| pb::VolumeUsage { available: 1, total: 3, used: 2, unit: unit as i32 };
        let usage = vec![usage(pb::volume_usage::Unit::Bytes), usage(pb::volume_usage::Unit::Inodes)];
        let condition = pb::VolumeCondition { abnormal: true, message: "worn out".into() };
        Ok(Response::new(pb::NodeGetVolumeStatsResponse { usage, volume_condition: Some(condition) }))
    }
    async fn node_expand_volume(
        &self,
        request: Request<pb::NodeExpandVolumeRequest>,
    ) -> Result<Response<pb::NodeExpandVolumeResponse>, Status> {
        self.note("expand", &request.get_ref().volume_id);
        Ok(Response::new(pb::NodeExpandVolumeResponse { capacity_bytes: 0 }))
    }
    async fn node_get_capabilities(
        &self,
        _: Request<pb::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<pb::NodeGetCapabilitiesResponse>, Status> {
        let can = |what: Capability| pb::NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: what as i32 })) };
        let all = [
            Capability::StageUnstageVolume,
            Capability::ExpandVolume,
            Capability::GetVolumeStats,
            Capability::VolumeCondition,
        ];
        let capabilities = all.map(can).to_vec();
        Ok(Response::new(pb::NodeGetCapabilitiesResponse { capabilities }))
    }
    async fn node_get_info(
        &self,
        _: Request<pb::NodeGetInfoRequest>,
    ) -> Result<Response<pb::NodeGetInfoResponse>, Status> {
        Ok(Response::new(pb::NodeGetInfoResponse { node_id: "here".into(), ..Default::default() }))
    }
}

struct Lab {
    root: tempfile::TempDir,
    driver: FakeDriver,
    csi: Arc<Csi>,
    shutdown: CancellationToken,
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Lab {
    /// A driver that has been found by its socket.
    async fn start() -> Lab {
        let root = tempfile::tempdir().expect("a directory");
        let registry = root.path().join("plugins_registry");
        fs::create_dir_all(&registry).expect("a directory");
        let endpoint = root.path().join("csi.sock");
        let driver = FakeDriver { endpoint: endpoint.display().to_string(), ..Default::default() };
        let listen = |path: &Path| UnixListenerStream::new(tokio::net::UnixListener::bind(path).expect("a socket"));
        let node = tonic::transport::Server::builder().add_service(NodeServer::new(driver.clone()));
        tokio::spawn(node.serve_with_incoming(listen(&endpoint)));
        let registration = tonic::transport::Server::builder().add_service(RegistrationServer::new(driver.clone()));
        tokio::spawn(registration.serve_with_incoming(listen(&registry.join("fake.sock"))));
        let csi = Csi::new(None, "n1", root.path());
        let shutdown = CancellationToken::new();
        tokio::spawn(crate::plugins::follow(registry, vec![csi.clone()], shutdown.clone()));
        let lab = Lab { root, driver, csi, shutdown };
        lab.until(|lab| lab.csi.driver("fake.csi").is_ok() && lab.driver.told.lock().is_some()).await;
        lab
    }

    async fn until(&self, done: impl Fn(&Lab) -> bool) {
        for _ in 0..600 {
            if done(self) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!("it did not come");
    }

    fn pod_dir(&self, uid: &str) -> PathBuf {
        self.root.path().join("pods").join(uid)
    }

    async fn mount(&self, uid: &str, wanted: &Wanted) -> Mounted {
        let pod =
            serde_json::from_value(json!({"metadata": {"name": uid, "namespace": "ns", "uid": uid}})).expect("a pod");
        self.csi.mount(&pod, wanted, &self.pod_dir(uid)).await.expect("mounted")
    }
}

fn wanted() -> Wanted {
    Wanted {
        name: "pv1".into(),
        driver: "fake.csi".into(),
        handle: "vol".into(),
        fs_type: "ext4".into(),
        access_modes: vec!["ReadWriteOnce".into()],
        fs_group: Some(7),
        ..Default::default()
    }
}

fn files(root: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).expect("a directory").flatten() {
            if entry.file_type().expect("a type").is_dir() {
                pending.push(entry.path());
            }
            found.insert(entry.path().strip_prefix(root).expect("below").display().to_string());
        }
    }
    found
}

#[tokio::test]
async fn a_volume_is_staged_once_and_taken_back_when_its_last_pod_is_gone() {
    let lab = Lab::start().await;
    assert!(lab.driver.told.lock().as_ref().is_some_and(|told| told.plugin_registered));
    let one = lab.mount("u1", &wanted()).await;
    assert_eq!(one.path, lab.pod_dir("u1").join("volumes/kubernetes.io~csi/pv1/mount"));
    assert!(one.give_to_group && one.path.is_dir());
    assert_eq!(lab.driver.taken(), ["stage vol", "publish vol"]);
    let mode = lab.driver.publishes.lock()[0].volume_capability.clone().and_then(|c| c.access_mode).map(|m| m.mode());
    assert_eq!(mode, Some(Mode::SingleNodeWriter));
    assert!(!lab.mount("u1", &wanted()).await.give_to_group, "once is enough");
    assert_eq!(lab.driver.taken(), Vec::<String>::new());
    lab.csi.not_done(&one);
    assert!(lab.mount("u1", &wanted()).await.give_to_group, "it was not enough");
    assert_eq!(lab.driver.taken(), ["stage vol", "publish vol"]);

    // The file system follows the volume.
    assert!(lab.mount("u1", &Wanted { expand_to: Some(1 << 30), ..wanted() }).await.grown == Grown::Here);
    assert_eq!(lab.driver.taken(), ["expand vol"]);
    lab.mount("u2", &wanted()).await;
    lab.driver.taken();

    // Another kubelet knows of volumes only what is on disk.
    let restarted = Csi::new(None, "n1", lab.root.path());
    let driver = lab.csi.driver("fake.csi").expect("the driver");
    restarted.drivers.lock().insert("fake.csi".into(), driver);
    restarted.unmount_pod("u1", &lab.pod_dir("u1")).await.expect("taken back");
    assert_eq!(lab.driver.taken(), ["unpublish vol"]);
    restarted.unmount_pod("u1", &lab.pod_dir("u1")).await.expect("twice is fine");
    restarted.unmount_pod("u2", &lab.pod_dir("u2")).await.expect("taken back");
    assert_eq!(lab.driver.taken(), ["unpublish vol", "unstage vol"]);
    let left = files(lab.root.path());
    assert!(!left.iter().any(|path| path.contains("pv1") || path.contains("globalmount")), "{left:?}");
}

#[tokio::test]
async fn block_volumes_are_devices_and_leave_nothing() {
    let lab = Lab::start().await;
    let block = Wanted { block: true, ..wanted() };
    let mounted = lab.mount("u1", &block).await;
    assert_eq!(fs::read_to_string(&mounted.path).expect("the device"), "a device");
    assert!(!mounted.give_to_group);
    assert!(lab.pod_dir("u1").join("volumeDevices/kubernetes.io~csi/pv1").exists());
    lab.csi.unmount_pod("u1", &lab.pod_dir("u1")).await.expect("taken back");
    assert_eq!(lab.driver.taken(), ["stage vol", "publish vol", "unpublish vol", "unstage vol"]);
    let left = files(lab.root.path());
    assert!(!left.iter().any(|path| path.contains("pv1")), "{left:?}");
}

#[tokio::test]
async fn what_a_driver_does_not_offer_is_said_and_a_driver_may_go() {
    let lab = Lab::start().await;
    let pod = Pod::default();
    let inline = Wanted { inline: true, ..wanted() };
    let error = lab.csi.mount(&pod, &inline, &lab.pod_dir("u1")).await.expect_err("not described as ephemeral");
    let told = error.reason.starts_with("volume mode \"Ephemeral\" not supported by driver fake.csi");
    assert!(error.step == "MountVolume.SetUp" && told, "{error:?}");
    let pod_dir = lab.pod_dir("u1");
    assert_eq!(lab.csi.measure("u1", &pod_dir, true).await, [], "no volume is there");
    let volume = lab.mount("u1", &wanted()).await;
    let of = |count| DiskUsage { bytes: count, inodes: count };
    let full = Measured { free: of(1), all: of(3), used: of(2), abnormal: Some(true) };
    assert_eq!(lab.csi.measure("u1", &pod_dir, true).await, [(volume.path.clone(), full)]);
    assert_eq!(lab.csi.measure("u1", &pod_dir, false).await, [(volume.path, Measured { abnormal: None, ..full })]);
    fs::remove_file(lab.root.path().join("plugins_registry/fake.sock")).expect("removed");
    lab.until(|lab| lab.csi.driver("fake.csi").is_err()).await;
    let error = lab.csi.mount(&pod, &wanted(), &lab.pod_dir("u1")).await.expect_err("no driver");
    let why = "driver name fake.csi not found in the list of registered CSI drivers";
    let why = format!("kubernetes.io/csi: attacher.MountDevice failed to create newCsiDriverClient: {why}");
    assert_eq!((error.step, error.reason), ("MountVolume.MountDevice", why));
    let block = Wanted { block: true, ..wanted() };
    let error = lab.csi.mount(&pod, &block, &lab.pod_dir("u1")).await.expect_err("no driver");
    assert_eq!(error.step, "MapVolume.SetUpDevice");
}

#[test]
fn groups_are_given_by_the_driver_s_policy() {
    let described = |policy: &str| CSIDriverSpec { fs_group_policy: Some(policy.into()), ..Default::default() };
    let many = Wanted { access_modes: vec!["ReadWriteMany".into()], ..wanted() };
    let plain = Wanted { fs_type: String::new(), ..wanted() };
    let read = Wanted { read_only: true, ..wanted() };
    for (policy, wanted, want) in [
        ("None", &wanted(), false),
        ("File", &many, true),
        ("File", &read, false),
        ("ReadWriteOnceWithFSType", &read, false),
        ("ReadWriteOnceWithFSType", &wanted(), true),
        ("ReadWriteOnceWithFSType", &many, false),
        ("ReadWriteOnceWithFSType", &plain, false),
    ] {
        assert_eq!(takes_group(wanted, &described(policy)), want, "{policy}");
    }
}
