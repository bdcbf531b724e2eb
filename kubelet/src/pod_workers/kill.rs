//! Stopping: a container with its preStop hook and grace, a pod in the order of its containers, and what it leaves behind.

use std::time::{Duration, Instant};

use component_base::events::Type;
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use tracing::{debug, info, warn};

use super::{Means, hooks};
use crate::probes::pod_ip;
use crate::runtime::cri::CriError;
use crate::runtime::observed::{ObservedContainer, ObservedPod, State};
use crate::runtime::pods::{find_container, full_name, init_containers, is_sidecar};

/// What a container always gets after its preStop hook, even if that used up its grace.
const MINIMUM_GRACE_SECONDS: i64 = 2;

/// Stops one container: preStop, the stop signal, and the kill when `grace` seconds are over.
pub(super) async fn container(
    means: &Means,
    pod: &Pod,
    observed: &ObservedPod,
    running: &ObservedContainer,
    grace: i64,
    message: Option<&str>,
) -> Result<(), CriError> {
    let name = &running.name;
    let text = message.map_or_else(|| format!("Stopping container {name}"), str::to_owned);
    means.events.pod(pod, Some(name), Type::Normal, "Killing", text);
    info!(pod = %full_name(pod), container = %name, id = %running.id, grace, "stopping container");
    let begun = Instant::now();
    let declared = find_container(pod, name).map(|(_, c)| c);
    let hook = declared.as_ref().and_then(|c| c.lifecycle.as_ref()).and_then(|l| l.pre_stop.clone());
    if let (Some(hook), Some(container), true) = (hook, declared.as_ref(), grace > 0 && running.state == State::Running)
    {
        let ip = pod_ip(pod, observed, &means.probes.host_ip);
        let limit = Duration::from_secs(grace.unsigned_abs());
        let run = Box::pin(hooks::run(&means.runtime.cri, &hook, container, &running.id, &ip));
        match tokio::time::timeout(limit, run).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                warn!(pod = %full_name(pod), container = %name, %error, "preStop hook failed");
                means.events.pod(pod, Some(name), Type::Warning, "FailedPreStopHook", "PreStopHook failed");
            }
            Err(_) => {
                warn!(pod = %full_name(pod), container = %name, grace, "preStop hook did not end within the grace period");
            }
        }
    }
    let spent = i64::try_from(begun.elapsed().as_secs()).unwrap_or(i64::MAX);
    let left = if grace == 0 { 0 } else { (grace - spent).max(MINIMUM_GRACE_SECONDS) };
    means.runtime.cri.stop_container(&running.id, left).await
}

/// Stops all of a pod: its containers together, then its sidecars from last to first, then its sandboxes.
pub(super) async fn pod(means: &Means, pod: &Pod, observed: &ObservedPod, grace: i64) -> Result<(), CriError> {
    let begun = Instant::now();
    let spec = pod.spec.clone().unwrap_or_default();
    let sidecars: Vec<String> =
        init_containers(&spec).iter().filter(|c| is_sidecar(c)).map(|c| c.name.clone()).collect();
    let alive = |c: &&ObservedContainer| matches!(c.state, State::Running | State::Unknown);
    let (late, first): (Vec<_>, Vec<_>) =
        observed.containers.iter().filter(alive).partition(|c| sidecars.contains(&c.name));

    let stops = first.into_iter().map(|c| Box::pin(container(means, pod, observed, c, grace, None)));
    let mut result: Result<(), CriError> = join_all(stops).await.into_iter().collect();
    for name in sidecars.iter().rev() {
        let spent = i64::try_from(begun.elapsed().as_secs()).unwrap_or(i64::MAX);
        // The grace is the pod's: what the others used up is gone for the sidecars.
        let left = if grace == 0 { 0 } else { (grace - spent).max(MINIMUM_GRACE_SECONDS) };
        let stops = late.iter().filter(|c| &c.name == name);
        let stops = stops.map(|c| Box::pin(container(means, pod, observed, c, left, None)));
        result = result.and(join_all(stops).await.into_iter().collect());
    }
    for sandbox in &observed.sandboxes {
        result = result.and(means.runtime.cri.stop_pod_sandbox(&sandbox.id).await);
    }
    result
}

/// Removes ended containers that nobody asks for any more: all but the newest two attempts of each.
pub(super) async fn remove_old_attempts(means: &Means, observed: &ObservedPod) {
    let mut seen: std::collections::HashMap<&str, usize> = std::collections::HashMap::new();
    for container in &observed.containers {
        let count = seen.entry(container.name.as_str()).or_default();
        *count += 1;
        // The newest is the state, the one before is lastState and `logs --previous`.
        if *count > 2 && container.state != State::Running {
            remove_container(means, container).await;
        }
    }
    let newest = observed.latest_sandbox().map(|s| s.id.as_str());
    for sandbox in observed.sandboxes.iter().filter(|s| !s.ready && Some(s.id.as_str()) != newest) {
        if observed.containers.iter().all(|c| c.sandbox_id != sandbox.id)
            && let Err(error) = means.runtime.cri.remove_pod_sandbox(&sandbox.id).await
        {
            debug!(sandbox = %sandbox.id, %error, "old sandbox not removed");
        }
    }
}

async fn remove_container(means: &Means, container: &ObservedContainer) {
    match means.runtime.cri.remove_container(&container.id).await {
        Ok(()) => {
            means.runtime.forget(&container.id);
            let removed = std::fs::remove_file(&container.log_path);
            if let Err(error) =
                removed.as_ref().err().filter(|e| e.kind() != std::io::ErrorKind::NotFound).map_or(Ok(()), Err)
            {
                debug!(log = %container.log_path, %error, "log not removed");
            }
        }
        Err(error) => debug!(container = %container.id, %error, "old container not removed"),
    }
}

/// Removes everything that the runtime has of a stopped pod.
pub(super) async fn remove_all(means: &Means, observed: &ObservedPod) -> Result<(), CriError> {
    let mut result = Ok(());
    for container in &observed.containers {
        result = result.and(means.runtime.cri.remove_container(&container.id).await);
        means.runtime.forget(&container.id);
    }
    for sandbox in &observed.sandboxes {
        result = result.and(means.runtime.cri.stop_pod_sandbox(&sandbox.id).await);
        result = result.and(means.runtime.cri.remove_pod_sandbox(&sandbox.id).await);
    }
    result
}

/// A pod's grace when its spec is gone: what its containers' annotations remember.
pub(super) fn remembered_grace(observed: &ObservedPod) -> i64 {
    observed.containers.iter().find_map(|c| c.annotated.pod_grace_seconds).unwrap_or(30)
}
