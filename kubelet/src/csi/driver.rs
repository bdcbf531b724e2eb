//! The calls to one CSI driver, each with a deadline.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use proto::csi as pb;
use proto::csi::node_client::NodeClient;
use proto::csi::node_service_capability::{Type, rpc};
use proto::csi::volume_capability::access_mode::Mode;
use proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use tokio::sync::OnceCell;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use super::Wanted;
use super::place::Place;
use crate::usage::{DiskUsage, Measured};

pub(super) use rpc::Type as Capability;

/// As Kubernetes' `csiTimeout`.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A registered driver.
#[derive(Debug)]
pub(super) struct Driver {
    name: String,
    channel: Channel,
    capabilities: OnceCell<Vec<Capability>>,
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(TIMEOUT);
    request
}

// === impl Driver ===

impl Driver {
    pub(super) fn new(name: &str, channel: Channel) -> Driver {
        Driver { name: name.to_owned(), channel, capabilities: OnceCell::new() }
    }

    fn client(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    fn answer<T>(&self, call: &str, answer: Result<Response<T>, Status>) -> Result<T, String> {
        let answer = answer.map(Response::into_inner);
        answer.map_err(|status| format!("{}: {call} failed: {}", self.name, shown_status(&status)))
    }

    pub(super) async fn info(&self) -> Result<pb::NodeGetInfoResponse, String> {
        self.answer("NodeGetInfo", self.client().node_get_info(request(pb::NodeGetInfoRequest {})).await)
    }

    pub(super) async fn can(&self, what: Capability) -> Result<bool, String> {
        let ask = async || {
            let message = pb::NodeGetCapabilitiesRequest {};
            let found =
                self.answer("NodeGetCapabilities", self.client().node_get_capabilities(request(message)).await)?;
            let rpc = |c: pb::NodeServiceCapability| c.r#type.map(|Type::Rpc(rpc)| rpc.r#type());
            Ok::<_, String>(found.capabilities.into_iter().filter_map(rpc).collect())
        };
        Ok(self.capabilities.get_or_try_init(ask).await?.contains(&what))
    }

    /// How the volume is to be used. As `asCSIAccessModeV1`.
    pub(super) async fn capability(&self, wanted: &Wanted, group: Option<u32>) -> Result<pb::VolumeCapability, String> {
        let fine = self.can(Capability::SingleNodeMultiWriter).await?;
        let mode = match wanted.access_modes.first().map_or("ReadWriteOnce", String::as_str) {
            "ReadOnlyMany" => Mode::MultiNodeReaderOnly,
            "ReadWriteMany" => Mode::MultiNodeMultiWriter,
            "ReadWriteOncePod" if fine => Mode::SingleNodeSingleWriter,
            "ReadWriteOnce" if fine => Mode::SingleNodeMultiWriter,
            _ => Mode::SingleNodeWriter,
        };
        let access_type = if wanted.block {
            AccessType::Block(BlockVolume {})
        } else {
            AccessType::Mount(MountVolume {
                fs_type: wanted.fs_type.clone(),
                mount_flags: wanted.mount_options.clone(),
                volume_mount_group: group.map(|gid| gid.to_string()).unwrap_or_default(),
            })
        };
        let access_mode = Some(AccessMode { mode: mode as i32 });
        Ok(pb::VolumeCapability { access_mode, access_type: Some(access_type) })
    }

    pub(super) async fn stage(
        &self,
        wanted: &Wanted,
        place: &Place,
        publish_context: BTreeMap<String, String>,
        capability: pb::VolumeCapability,
        secrets: BTreeMap<String, String>,
    ) -> Result<(), String> {
        std::fs::create_dir_all(&place.staging).map_err(|e| format!("{}: {e}", shown(&place.staging)))?;
        let message = pb::NodeStageVolumeRequest {
            volume_id: wanted.handle.clone(),
            publish_context,
            staging_target_path: shown(&place.staging),
            volume_capability: Some(capability),
            secrets,
            volume_context: wanted.attributes.clone(),
        };
        told(self.client().node_stage_volume(request(message)).await)
    }

    pub(super) async fn publish(
        &self,
        wanted: &Wanted,
        place: &Place,
        staged: bool,
        publish_context: BTreeMap<String, String>,
        capability: pb::VolumeCapability,
        secrets: BTreeMap<String, String>,
        volume_context: BTreeMap<String, String>,
    ) -> Result<(), String> {
        let message = pb::NodePublishVolumeRequest {
            volume_id: wanted.handle.clone(),
            publish_context,
            staging_target_path: if staged { shown(&place.staging) } else { String::new() },
            target_path: shown(&place.published),
            volume_capability: Some(capability),
            readonly: wanted.read_only,
            secrets,
            volume_context,
        };
        told(self.client().node_publish_volume(request(message)).await)
    }

    pub(super) async fn unpublish(&self, handle: &str, path: &Path) -> Result<(), String> {
        let message = pb::NodeUnpublishVolumeRequest { volume_id: handle.to_owned(), target_path: shown(path) };
        gone_is_fine(self.client().node_unpublish_volume(request(message)).await, |answer| {
            self.answer("NodeUnpublishVolume", answer)
        })
    }

    pub(super) async fn unstage(&self, handle: &str, path: &Path) -> Result<(), String> {
        let message = pb::NodeUnstageVolumeRequest { volume_id: handle.to_owned(), staging_target_path: shown(path) };
        gone_is_fine(self.client().node_unstage_volume(request(message)).await, |answer| {
            self.answer("NodeUnstageVolume", answer)
        })
    }

    pub(super) async fn expand(
        &self,
        wanted: &Wanted,
        place: &Place,
        staged: bool,
        bytes: i64,
        capability: pb::VolumeCapability,
        secrets: BTreeMap<String, String>,
    ) -> Result<(), String> {
        let message = pb::NodeExpandVolumeRequest {
            volume_id: wanted.handle.clone(),
            volume_path: shown(&place.published),
            capacity_range: Some(pb::CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
            staging_target_path: if staged { shown(&place.staging) } else { String::new() },
            volume_capability: Some(capability),
            secrets,
        };
        self.answer("NodeExpandVolume", self.client().node_expand_volume(request(message)).await).map(drop)
    }

    pub(super) async fn stats(&self, handle: &str, path: &Path, condition: bool) -> Result<Measured, String> {
        let message = pb::NodeGetVolumeStatsRequest {
            volume_id: handle.to_owned(),
            volume_path: shown(path),
            ..Default::default()
        };
        let answer = self.client().node_get_volume_stats(request(message)).await;
        let answer = self.answer("NodeGetVolumeStats", answer)?;
        let of = |unit: pb::volume_usage::Unit, part: fn(&pb::VolumeUsage) -> i64| {
            let counted = answer.usage.iter().find(|u| u.unit() == unit).map_or(0, part);
            u64::try_from(counted).unwrap_or(0)
        };
        let both = |part| DiskUsage {
            bytes: of(pb::volume_usage::Unit::Bytes, part),
            inodes: of(pb::volume_usage::Unit::Inodes, part),
        };
        Ok(Measured {
            free: both(|u| u.available),
            all: both(|u| u.total),
            used: both(|u| u.used),
            abnormal: answer.volume_condition.filter(|_| condition).map(|found| found.abnormal),
        })
    }
}

/// A refusal in the driver's own words: the event around it says what was asked.
fn told<T>(answer: Result<Response<T>, Status>) -> Result<(), String> {
    answer.map(drop).map_err(|status| shown_status(&status))
}

/// As gRPC's clients in Go show it.
fn shown_status(status: &Status) -> String {
    format!("rpc error: code = {:?} desc = {}", status.code(), status.message())
}

/// A volume that the driver does not know is one that it does not hold.
fn gone_is_fine<T>(
    answer: Result<Response<T>, Status>,
    read: impl FnOnce(Result<Response<T>, Status>) -> Result<T, String>,
) -> Result<(), String> {
    match answer {
        Err(status) if status.code() == Code::NotFound => Ok(()),
        other => read(other).map(drop),
    }
}
