//! A container's spec as the configuration that the runtime takes. Pure.

use k8s_openapi::api::core::v1::{Container, Pod};
use proto::cri as pb;

use super::NodeSettings;
use super::user_ids::IdRange;
use super::{labels, resources, security};
use crate::allocation::Given;
use crate::images::ImageRef;

/// What has been prepared for a container before its configuration is made.
pub struct Prepared<'a> {
    pub image: &'a ImageRef,
    pub envs: &'a [(String, String)],
    /// Volumes, the termination log, `/etc/hosts`.
    pub mounts: Vec<pb::Mount>,
    /// Its own processors and devices, block volumes among them.
    pub given: Given,
    pub restart_count: u32,
    /// The pod's own users.
    pub ids: Option<IdRange>,
    /// The container whose processes an ephemeral one looks at.
    pub target_id: Option<&'a str>,
}

/// The configuration of one attempt of `container`.
pub fn config(
    pod: &Pod,
    container: &Container,
    prepared: Prepared<'_>,
    node: &NodeSettings,
) -> Result<pb::ContainerConfig, security::SecurityError> {
    let security_context =
        security::container(pod, container, prepared.image, prepared.target_id, prepared.ids, &node.policy)?;
    let (command, args) = crate::env::command_line(container, prepared.envs);
    let mut linux_resources = resources::container(pod, container, &node.kernel);
    if linux_resources.oom_score_adj < node.lowest_oom_score_adj {
        linux_resources.oom_score_adj = node.lowest_oom_score_adj;
    }
    linux_resources.cpuset_cpus = prepared.given.cpuset_cpus;
    linux_resources.cpuset_mems = prepared.given.cpuset_mems;
    let mut annotations = prepared.given.annotations;
    annotations.extend(labels::container_annotations(pod, container, prepared.restart_count));
    Ok(pb::ContainerConfig {
        metadata: Some(pb::ContainerMetadata { name: container.name.clone(), attempt: prepared.restart_count }),
        image: Some(pb::ImageSpec {
            image: prepared.image.id.clone(),
            user_specified_image: container.image.clone().unwrap_or_default(),
            ..Default::default()
        }),
        command,
        args,
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: prepared
            .envs
            .iter()
            .map(|(key, value)| pb::KeyValue { key: key.clone(), value: value.clone() })
            .collect(),
        mounts: prepared.mounts,
        devices: prepared.given.devices,
        cdi_devices: prepared.given.cdi_devices,
        labels: labels::container_labels(pod, container),
        annotations,
        log_path: format!("{}/{}.log", container.name, prepared.restart_count),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        linux: Some(pb::LinuxContainerConfig {
            resources: Some(linux_resources),
            security_context: Some(security_context),
        }),
        stop_signal: security::stop_signal(container),
    })
}
