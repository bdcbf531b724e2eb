//! Starting: a pod's sandbox, and one container in it, with everything prepared before.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use component_base::events::Type;
use k8s_openapi::api::core::v1::{Container, HostIP, Pod, PodIP};
use k8s_openapi::api::node::v1::RuntimeClass;
use proto::cri as pb;
use tracing::{debug, info, warn};

use super::{Means, hooks, kill};
use crate::env;
use crate::images::{PullError, PullReason};
use crate::metrics::{managers, metrics};
use crate::plan::Start;
use crate::runtime::cri::CriError;
use crate::runtime::labels::DEFAULT_TERMINATION_PATH;
use crate::runtime::observed::{ObservedContainer, ObservedPod, State};
use crate::runtime::pods::{ContainerKind, full_name, host_network, uid_of};
use crate::runtime::user_ids::{self, IdRange};
use crate::runtime::{container, dns, logs, sandbox, selinux};
use crate::status::containers::Waiting;
use crate::volumes::{MountSource, Volumes};

const HOSTS_PATH: &str = "/etc/hosts";

/// Makes the pod's sandbox and gives its configuration, which containers are created with.
pub(super) async fn sandbox(means: &Means, pod: &Pod, attempt: u32) -> Result<String, String> {
    let handler = runtime_handler(means, pod).await?;
    if user_ids::wanted(pod) && !means.runtime.node.features(&handler).user_namespaces {
        // Without its own user namespace the pod would have rights that it asked not to have.
        return Err(format!("hostUsers: false: the runtime handler {handler:?} does not support user namespaces"));
    }
    let name = dns::hostname_and_domain(pod, &means.runtime.node.dns.cluster_domain);
    dns::check_fqdn(pod, &name)?;
    for (reason, message) in dns::omissions(pod, &means.runtime.node.dns) {
        means.events.pod(pod, None, Type::Warning, reason, message);
    }
    let config = sandbox_config(means, pod, attempt)?;
    if let Err(error) = std::fs::create_dir_all(&config.log_directory) {
        warn!(directory = %config.log_directory, %error, "log directory not made");
    }
    let begun = Instant::now();
    let made = means.runtime.cri.run_pod_sandbox(config, &handler).await;
    managers().sandbox(&handler, user_ids::wanted(pod), begun.elapsed(), made.is_err());
    metrics().started("pod_sandbox", made.as_ref().err().map(|_| "CreatePodSandboxError"));
    let id = made.map_err(|e| e.message())?;
    if attempt == 0 {
        metrics().started_pods.inc();
    }
    info!(pod = %full_name(pod), sandbox = %id, attempt, "sandbox runs");
    Ok(id)
}

/// The runtime's own name of the pod's RuntimeClass.
async fn runtime_handler(means: &Means, pod: &Pod) -> Result<String, String> {
    let class = pod.spec.as_ref().and_then(|s| s.runtime_class_name.as_deref()).filter(|c| !c.is_empty());
    let Some(class) = class else { return Ok(String::new()) };
    let Some(client) = means.client.clone() else {
        return Err(format!("RuntimeClass {class:?}: there is no API to ask for it (standalone)"));
    };
    let found = kube::Api::<RuntimeClass>::all(client).get_opt(class).await.map_err(|e| e.to_string())?;
    found.map(|c| c.handler).ok_or_else(|| format!("failed to get sandbox runtime: RuntimeClass {class:?} not found"))
}

fn sandbox_config(means: &Means, pod: &Pod, attempt: u32) -> Result<pb::PodSandboxConfig, String> {
    let parent = means.runtime.cgroups.parent_for_runtime(pod);
    Ok(sandbox::config(pod, attempt, parent, ids(means, pod)?, &means.runtime.node))
}

/// The pod's own users, where it wants some.
fn ids(means: &Means, pod: &Pod) -> Result<Option<IdRange>, String> {
    let runtime = &means.runtime;
    let own = || runtime.user_ids.of(uid_of(pod), &runtime.node.pod_dir(uid_of(pod))).map_err(|e| e.to_string());
    user_ids::wanted(pod).then(own).transpose()
}

/// What a container is started with.
pub(super) struct Prepared<'a> {
    pub pod: &'a Arc<Pod>,
    pub observed: &'a ObservedPod,
    pub sandbox_id: &'a str,
    pub sources: &'a BTreeMap<String, MountSource>,
}

fn waiting(reason: &str, message: impl Into<String>) -> Waiting {
    Waiting { reason: reason.to_owned(), message: message.into() }
}

/// Starts one container. `Err` is what its status shows until it can be started.
pub(super) async fn container(means: &Means, prepared: &Prepared<'_>, start: &Start) -> Result<String, Waiting> {
    let started = make_and_start(means, prepared, start).await;
    let kind = match start.kind {
        ContainerKind::Init => "init_container",
        ContainerKind::App => "container",
        ContainerKind::Ephemeral => "ephemeral_container",
    };
    metrics().started(kind, started.as_ref().err().map(|waiting| waiting.reason.as_str()));
    started
}

async fn make_and_start(means: &Means, prepared: &Prepared<'_>, start: &Start) -> Result<String, Waiting> {
    let pod = prepared.pod;
    let declared = &start.container;
    let name = declared.name.as_str();
    let events = &means.events;

    let image = declared.image.as_deref().unwrap_or_default();
    let image = Box::pin(means.puller.ensure(pod, image, declared.image_pull_policy.as_deref()))
        .await
        .map_err(|e| waiting(pull_reason(&e), e.message))?;

    let failed = |reason: &'static str| {
        move |message: String| {
            warn!(pod = %full_name(pod), container = name, reason, message, "container not started");
            events.pod(pod, Some(name), Type::Warning, "Failed", format!("Error: {message}"));
            waiting(reason, message)
        }
    };
    let config_error = failed("CreateContainerConfigError");
    let known = with_addresses(means, pod, prepared.observed);
    let mut envs = Box::pin(env::make(&known, declared, &means.env, prepared.sources))
        .await
        .map_err(|e| config_error(e.to_string()))?;
    let mut given = means.allocator.before_start(pod, name).await.map_err(failed("PreStartContainer"))?;
    envs.append(&mut given.envs);
    given.cdi_devices.extend(means.dra.devices_of(pod, declared).into_iter().map(|name| pb::CdiDevice { name }));
    let pod_dir = means.runtime.node.pod_dir(uid_of(pod));
    let mut mounts = means
        .volumes
        .container_mounts(&known, declared, &envs, prepared.sources, &pod_dir)
        .await
        .map_err(|e| failed("CreateContainerConfigError")(e.to_string()))?;
    let ids = ids(means, pod).map_err(failed("CreateContainerConfigError"))?;
    if let Some(ids) = ids {
        // What is in volumes belongs to the same users inside as outside.
        for mount in mounts.iter_mut().filter(|m| !m.host_path.is_empty()) {
            (mount.uid_mappings, mount.gid_mappings) = (ids.mappings(), ids.mappings());
        }
    }
    mounts.append(&mut given.mounts);
    let block = Volumes::container_devices(declared, prepared.sources)
        .map_err(|e| failed("CreateContainerConfigError")(e.to_string()))?;
    given.devices.extend(block);
    mounts.extend(
        hosts_mount(means, &known, declared, &pod_dir)
            .map_err(|e| failed("CreateContainerConfigError")(e.to_string()))?,
    );
    mounts.extend(
        termination_mount(declared, &pod_dir).map_err(|e| failed("CreateContainerConfigError")(e.to_string()))?,
    );

    let node = &means.runtime.node;
    // Of a container that the runtime has nothing of, the logs tell how often it began.
    let restart_count = match prepared.observed.latest(name) {
        Some(_) => start.restart_count,
        None => logs::next_attempt(&node.pod_logs_dir, pod, name),
    };
    let target = target_id(prepared, start);
    let prepared_container = container::Prepared {
        image: &image,
        envs: &envs,
        mounts,
        given,
        ids,
        restart_count,
        target_id: target.as_deref(),
    };
    let config = container::config(pod, declared, prepared_container, &means.runtime.node)
        .map_err(|e| failed("CreateContainerConfigError")(e.to_string()))?;
    let log = logs::container_log(&node.pod_logs_dir, pod, name, restart_count);
    if let Some(dir) = log.parent() {
        std::fs::create_dir_all(dir).map_err(|e| failed("CreateContainerError")(e.to_string()))?;
    }
    let attempt = prepared.observed.latest_sandbox().map_or(0, |s| s.attempt);
    let sandbox_config = sandbox_config(means, pod, attempt).map_err(failed("CreateContainerConfigError"))?;
    let cri = &means.runtime.cri;
    let id = cri.create_container(prepared.sandbox_id, config, sandbox_config).await.map_err(|e| {
        means.puller.look_anew();
        failed("CreateContainerError")(short(&e))
    })?;
    events.pod(pod, Some(name), Type::Normal, "Created", "Container created");
    cri.start_container(&id).await.map_err(|e| failed("RunContainerError")(short(&e)))?;
    events.pod(pod, Some(name), Type::Normal, "Started", "Container started");
    info!(pod = %full_name(pod), container = name, id = %id, restarts = restart_count, "container started");
    if let Err(error) = logs::link(&node.container_logs_dir, pod, name, &id, &log) {
        debug!(%error, "no link to the container's log");
    }
    if let Some(hook) = declared.lifecycle.as_ref().and_then(|l| l.post_start.as_ref()) {
        Box::pin(post_start(means, prepared, declared, &id, hook)).await?;
    }
    Ok(id)
}

fn short(error: &CriError) -> String {
    match error {
        CriError::Call { status, .. } => status.message().to_owned(),
        other => other.to_string(),
    }
}

fn pull_reason(error: &PullError) -> &'static str {
    match error.reason {
        PullReason::ErrImagePull => "ErrImagePull",
        PullReason::ImagePullBackOff => "ImagePullBackOff",
        PullReason::ErrImageNeverPull => "ErrImageNeverPull",
        PullReason::InvalidImageName => "InvalidImageName",
        PullReason::ImageInspectError => "ImageInspectError",
        PullReason::RegistryUnavailable => "RegistryUnavailable",
    }
}

/// A postStart hook blocks what comes after; if it fails, the container is stopped.
async fn post_start(
    means: &Means,
    prepared: &Prepared<'_>,
    declared: &Container,
    id: &str,
    hook: &k8s_openapi::api::core::v1::LifecycleHandler,
) -> Result<(), Waiting> {
    let ip = crate::probes::pod_ip(prepared.pod, prepared.observed, &means.probes.host_ip);
    let Err(error) = hooks::run(&means.runtime.cri, hook, declared, id, &ip).await else { return Ok(()) };
    warn!(pod = %full_name(prepared.pod), container = %declared.name, %error, "postStart hook failed");
    means.events.pod(prepared.pod, Some(&declared.name), Type::Warning, "FailedPostStartHook", "PostStartHook failed");
    let running = ObservedContainer {
        id: id.to_owned(),
        name: declared.name.clone(),
        state: State::Running,
        ..Default::default()
    };
    let grace = crate::runtime::pods::grace_seconds(prepared.pod);
    let stopped =
        kill::container(means, prepared.pod, prepared.observed, &running, grace, Some("FailedPostStartHook")).await;
    if let Err(error) = stopped {
        warn!(container = %id, %error, "container not stopped after its postStart hook failed");
    }
    Err(waiting("PostStartHookError", error))
}

/// The pod with its addresses filled in, for what is made from them.
pub(super) fn with_addresses(means: &Means, pod: &Pod, observed: &ObservedPod) -> Pod {
    let mut pod = pod.clone();
    let ips: Vec<String> = if host_network(&pod) {
        means.host_ips.clone()
    } else {
        observed.latest_sandbox().map(|s| s.ips.clone()).unwrap_or_default()
    };
    let status = pod.status.get_or_insert_default();
    status.host_ip = means.host_ips.first().cloned();
    status.host_ips = Some(means.host_ips.iter().map(|ip| HostIP { ip: ip.clone() }).collect());
    status.pod_ip = ips.first().cloned();
    status.pod_ips = Some(ips.into_iter().map(|ip| PodIP { ip }).collect());
    pod
}

fn plain_mount(host: &Path, container: &str) -> pb::Mount {
    pb::Mount {
        container_path: container.to_owned(),
        host_path: host.display().to_string(),
        selinux_relabel: selinux::is_enabled(),
        ..Default::default()
    }
}

/// The pod's `/etc/hosts`, unless the container brings its own.
fn hosts_mount(means: &Means, pod: &Pod, declared: &Container, pod_dir: &Path) -> std::io::Result<Option<pb::Mount>> {
    if declared.volume_mounts.iter().flatten().any(|m| m.mount_path == HOSTS_PATH) {
        return Ok(None);
    }
    let spec = pod.spec.clone().unwrap_or_default();
    let aliases = spec.host_aliases.unwrap_or_default();
    let text = if host_network(pod) {
        dns::host_network_hosts_file(&std::fs::read_to_string(HOSTS_PATH).unwrap_or_default(), &aliases)
    } else {
        let (hostname, domain) = dns::hostname_and_domain(pod, &means.runtime.node.dns.cluster_domain);
        let ips = pod.status.iter().flat_map(|s| s.pod_ips.iter().flatten()).map(|p| p.ip.clone());
        dns::hosts_file(&ips.collect::<Vec<_>>(), &hostname, &domain, &aliases)
    };
    std::fs::create_dir_all(pod_dir)?;
    let path = pod_dir.join("etc-hosts");
    std::fs::write(&path, text)?;
    let mut mount = plain_mount(&path, HOSTS_PATH);
    mount.readonly = declared.security_context.as_ref().and_then(|s| s.read_only_root_filesystem).unwrap_or(false);
    Ok(Some(mount))
}

fn termination_mount(declared: &Container, pod_dir: &Path) -> std::io::Result<Option<pb::Mount>> {
    let path = declared.termination_message_path.as_deref().unwrap_or(DEFAULT_TERMINATION_PATH);
    if path.is_empty() {
        return Ok(None);
    }
    let file = logs::new_termination_file(pod_dir, &declared.name)?;
    Ok(Some(plain_mount(&file, path)))
}

/// The container whose processes an ephemeral one looks at.
fn target_id(prepared: &Prepared<'_>, start: &Start) -> Option<String> {
    if start.kind != ContainerKind::Ephemeral {
        return None;
    }
    let spec = prepared.pod.spec.as_ref()?;
    let declared = spec.ephemeral_containers.iter().flatten().find(|e| e.name == start.container.name)?;
    let target = declared.target_container_name.as_deref().filter(|t| !t.is_empty())?;
    prepared.observed.latest(target).map(|c| c.id.clone())
}
