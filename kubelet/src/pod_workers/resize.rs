//! In-place resize: resources of running containers follow the pod's spec, as far as the node has room. What a container
//! really has is remembered per attempt, and reported as such.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use apimachinery::quantity::Quantity;
use component_base::events::Type;
use k8s_openapi::api::core::v1::{Container, Pod, PodStatus, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use tracing::{info, warn};

use super::{Means, PodWorkers, admission, kill};
use crate::runtime::observed::{ObservedContainer, ObservedPod, State};
use crate::runtime::pods::{find_container, full_name, grace_seconds};
use crate::runtime::resources;
use crate::status::Resize;

/// Resources that can change while a container runs.
const RESIZABLE: [&str; 2] = ["cpu", "memory"];

/// What this pod's running containers have.
#[derive(Debug, Default)]
pub(super) struct Resizes {
    applied: HashMap<String, ResourceRequirements>,
    /// Why the pod does not have yet what its spec says.
    pub state: Option<Resize>,
}

/// A container whose resources are to change.
#[derive(Debug, PartialEq)]
struct Change {
    id: String,
    container: Container,
    restart: bool,
}

impl Resizes {
    /// What a container was started with.
    pub(super) fn started(&mut self, id: &str, container: &Container) {
        self.applied.insert(id.to_owned(), container.resources.clone().unwrap_or_default());
    }

    /// Learns what containers have that were started before this worker came: as was reported of them.
    pub(super) fn adopt(&mut self, pod: &Pod, observed: &ObservedPod, old: &PodStatus) {
        self.applied.retain(|id, _| observed.containers.iter().any(|c| &c.id == id));
        for running in observed.running() {
            if self.applied.contains_key(&running.id) {
                continue;
            }
            let mut reported = old.container_statuses.iter().chain(&old.init_container_statuses).flatten();
            let reported = reported
                .find(|s| s.container_id.as_deref().is_some_and(|id| id.ends_with(&format!("://{}", running.id))));
            let declared = find_container(pod, &running.name).and_then(|(_, c)| c.resources);
            let resources = reported.and_then(|s| s.resources.clone()).or(declared).unwrap_or_default();
            self.applied.insert(running.id.clone(), resources);
        }
    }

    pub(super) fn of(&self, container: &ObservedContainer) -> Option<&ResourceRequirements> {
        self.applied.get(&container.id)
    }

    fn changes(&self, pod: &Pod, observed: &ObservedPod) -> Vec<Change> {
        let Some(spec) = pod.spec.as_ref() else { return Vec::new() };
        let mut changes = Vec::new();
        for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
            let Some(seen) = observed.latest(&container.name).filter(|c| c.state == State::Running) else { continue };
            let Some(has) = self.applied.get(&seen.id) else { continue };
            let wants = container.resources.clone().unwrap_or_default();
            let differing: Vec<&str> = RESIZABLE.into_iter().filter(|name| differs(has, &wants, name)).collect();
            if differing.is_empty() {
                continue;
            }
            let restart = container
                .resize_policy
                .iter()
                .flatten()
                .any(|p| p.restart_policy == "RestartContainer" && differing.contains(&p.resource_name.as_str()));
            changes.push(Change { id: seen.id.clone(), container: container.clone(), restart });
        }
        changes
    }

    /// Brings running containers to what the spec says. True: something was changed, look again.
    pub(super) async fn apply(
        &mut self,
        pool: &PodWorkers,
        means: &Means,
        pod: &Arc<Pod>,
        observed: &ObservedPod,
    ) -> bool {
        let changes = self.changes(pod, observed);
        if changes.is_empty() {
            self.state = None;
            return false;
        }
        if let Some((reason, message)) = no_room(pod, &pool.active_pods(), &means.allocatable) {
            self.pends(means, pod, reason, message);
            return false;
        }
        let started = resize_message("Pod resize started", pod, None);
        means.events.pod(pod, None, Type::Normal, "ResizeStarted", started);
        let limits = resources::pod(pod, &means.runtime.node.kernel);
        // The pod's own limits grow before its containers' and shrink after them.
        let mut result = Ok(());
        if changes.iter().any(|c| self.grows(c)) {
            result = means.runtime.cgroups.ensure_pod(pod, &limits).map_err(|e| e.to_string());
        }
        for change in &changes {
            if result.is_err() {
                break;
            }
            result = self.change(means, pod, observed, change).await;
        }
        let result = result.and_then(|()| means.runtime.cgroups.ensure_pod(pod, &limits).map_err(|e| e.to_string()));
        match result {
            Ok(()) => {
                info!(pod = %full_name(pod), containers = changes.len(), "resized");
                let completed = resize_message("Pod resize completed", pod, None);
                means.events.pod(pod, None, Type::Normal, "ResizeCompleted", completed);
                self.state = None;
                true
            }
            Err(message) => {
                warn!(pod = %full_name(pod), message, "not resized");
                let failed = resize_message("Pod resize error", pod, Some(&message));
                means.events.pod(pod, None, Type::Warning, "ResizeError", failed);
                self.state = Some(Resize { kind: "PodResizeInProgress", reason: Some("Error"), message });
                false
            }
        }
    }

    /// Notes, and tells once, that a resize cannot be begun.
    fn pends(&mut self, means: &Means, pod: &Pod, reason: &'static str, message: String) {
        let state = Resize { kind: "PodResizePending", reason: Some(reason), message };
        if self.state.as_ref() != Some(&state) {
            let text = resize_message(&format!("Pod resize {reason}"), pod, Some(&state.message));
            means.events.pod(pod, None, Type::Warning, &format!("Resize{reason}"), text);
        }
        self.state = Some(state);
    }

    /// Whether a change raises (or lifts) a limit.
    fn grows(&self, change: &Change) -> bool {
        let limit = |resources: Option<&ResourceRequirements>, name: &str| {
            let limits = resources.and_then(|r| r.limits.as_ref());
            limits.and_then(|l| l.get(name)).map_or(i64::MAX, |q| Quantity::from(q).milli_value())
        };
        let (has, wants) = (self.applied.get(&change.id), change.container.resources.as_ref());
        RESIZABLE.into_iter().any(|name| limit(wants, name) > limit(has, name))
    }

    async fn change(
        &mut self,
        means: &Means,
        pod: &Pod,
        observed: &ObservedPod,
        change: &Change,
    ) -> Result<(), String> {
        let container = &change.container;
        if change.restart {
            let Some(running) = observed.containers.iter().find(|c| c.id == change.id) else { return Ok(()) };
            let message = format!("Container {} resize requires restart", container.name);
            kill::container(means, pod, observed, running, grace_seconds(pod), Some(&message))
                .await
                .map_err(|e| e.message())?;
        } else {
            let node = &means.runtime.node;
            let wanted = resources::container(pod, container, &node.kernel);
            let used = means.runtime.cgroups.container_usage(pod, &change.id).map_or(0, |u| u.working_set);
            let limit = u64::try_from(wanted.memory_limit_in_bytes).unwrap_or(0);
            if limit > 0 && used > limit {
                // The kernel would end it.
                return Err(format!(
                    "cannot decrease memory limits: attempting to set container {:?} memory limit ({limit}) below current usage ({used})",
                    container.name
                ));
            }
            means.runtime.cri.update_container_resources(&change.id, wanted).await.map_err(|e| e.message())?;
        }
        self.started(&change.id, container);
        Ok(())
    }
}

/// Why a resize waits for room, or cannot be had at all. As `canResizePod`.
fn no_room(pod: &Pod, others: &[Arc<Pod>], node: &admission::Allocatable) -> Option<(&'static str, String)> {
    let requested = pod.spec.as_ref().map(apimachinery::pod::requests).unwrap_or_default();
    for name in ["memory", "cpu"] {
        let amounts = requested.get(name).zip(node.resources.get(name));
        let Some((wanted, all)) = amounts.map(|(a, b)| (admission::in_units(name, a), admission::in_units(name, b)))
        else {
            continue;
        };
        if wanted > all {
            let message = format!("Node didn't have enough capacity: {name}, requested: {wanted}, capacity: {all}");
            return Some(("Infeasible", message));
        }
    }
    let lacking = admission::lacking(pod, others, node);
    (!lacking.is_empty()).then(|| ("Deferred", admission::refusal(&lacking, Ok(())).message))
}

/// What an event about a resize says. As `podResizeMessage`.
fn resize_message(what: &str, pod: &Pod, error: Option<&str>) -> String {
    #[derive(serde::Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Summary<'a> {
        #[serde(skip_serializing_if = "Vec::is_empty")]
        init_containers: Vec<Allocation<'a>>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        containers: Vec<Allocation<'a>>,
        generation: i64,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<&'a str>,
    }
    #[derive(serde::Serialize)]
    struct Allocation<'a> {
        name: &'a str,
        resources: ResourceRequirements,
    }
    fn all(list: &[Container]) -> Vec<Allocation<'_>> {
        let resources = |c: &Container| c.resources.clone().unwrap_or_default();
        list.iter().map(|c| Allocation { name: &c.name, resources: resources(c) }).collect()
    }
    let spec = pod.spec.as_ref();
    let summary = Summary {
        init_containers: all(spec.and_then(|s| s.init_containers.as_deref()).unwrap_or_default()),
        containers: all(spec.map(|s| s.containers.as_slice()).unwrap_or_default()),
        generation: pod.metadata.generation.unwrap_or(0),
        error,
    };
    serde_json::to_string(&summary).map_or_else(|_| what.to_owned(), |summary| format!("{what}: {summary}"))
}

fn differs(has: &ResourceRequirements, wants: &ResourceRequirements, name: &str) -> bool {
    let amount = |map: &Option<BTreeMap<String, ApiQuantity>>| {
        map.as_ref().and_then(|m| m.get(name)).map(|q| Quantity::from(q).milli_value())
    };
    amount(&has.requests) != amount(&wants.requests) || amount(&has.limits) != amount(&wants.limits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(cpu: &str, policy: &str) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u"}, "spec": {"containers": [{
            "name": "c", "resources": {"requests": {"cpu": cpu}},
            "resizePolicy": [{"resourceName": "cpu", "restartPolicy": policy}]}]}}))
        .unwrap()
    }

    fn running() -> ObservedPod {
        let container =
            ObservedContainer { id: "1".into(), name: "c".into(), state: State::Running, ..Default::default() };
        ObservedPod { containers: vec![container], ..Default::default() }
    }

    #[test]
    fn only_real_differences_are_changes() {
        let mut resizes = Resizes::default();
        resizes.adopt(&pod("1", "NotRequired"), &running(), &PodStatus::default());
        assert_eq!(resizes.changes(&pod("1000m", "NotRequired"), &running()), []);
        let changes = resizes.changes(&pod("500m", "NotRequired"), &running());
        assert_eq!((changes.len(), changes[0].restart), (1, false));
        assert!(resizes.changes(&pod("500m", "RestartContainer"), &running())[0].restart);
    }

    #[test]
    fn what_was_reported_is_what_an_adopted_container_has() {
        let old: PodStatus = serde_json::from_value(json!({"containerStatuses": [{"name": "c", "image": "", "imageID": "",
            "ready": true, "restartCount": 0, "containerID": "containerd://1", "resources": {"requests": {"cpu": "250m"}}}]}))
        .unwrap();
        let mut resizes = Resizes::default();
        resizes.adopt(&pod("1", "NotRequired"), &running(), &old);
        assert_eq!(resizes.changes(&pod("1", "NotRequired"), &running()).len(), 1);
    }

    #[test]
    fn a_resize_without_room_waits_or_is_infeasible() {
        let node = admission::Allocatable {
            resources: [("cpu".to_owned(), Quantity::from_milli(1000))].into(),
            ..Default::default()
        };
        let mut other = pod("600m", "NotRequired");
        other.metadata.uid = Some("v".to_owned());
        let others = [Arc::new(other)];
        let of = |cpu: &str| no_room(&pod(cpu, "NotRequired"), &others, &node);
        assert_eq!(of("400m"), None);
        let deferred = "Node didn't have enough resource: cpu, requested: 500, used: 600, capacity: 1000".to_owned();
        assert_eq!(of("500m"), Some(("Deferred", deferred)));
        let infeasible = "Node didn't have enough capacity: cpu, requested: 2000, capacity: 1000".to_owned();
        assert_eq!(of("2"), Some(("Infeasible", infeasible)));
        assert_eq!(
            resize_message("Pod resize Deferred", &pod("1", "NotRequired"), Some("why")),
            r#"Pod resize Deferred: {"containers":[{"name":"c","resources":{"requests":{"cpu":"1"}}}],"generation":0,"error":"why"}"#
        );
    }
}
