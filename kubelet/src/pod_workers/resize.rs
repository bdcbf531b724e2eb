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
        if let Err(rejected) = admission::admit(pod, &pool.active_pods(), &means.allocatable, None) {
            let alone = admission::admit(pod, &[], &means.allocatable, None);
            let reason = if alone.is_err() { "Infeasible" } else { "Deferred" };
            let message = rejected.message.trim_start_matches("Pod was rejected: ").to_owned();
            self.state = Some(Resize { kind: "PodResizePending", reason: Some(reason), message });
            return false;
        }
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
                means.events.pod(pod, None, Type::Normal, "ResizeCompleted", "Pod resize completed");
                self.state = None;
                true
            }
            Err(message) => {
                warn!(pod = %full_name(pod), message, "not resized");
                self.state = Some(Resize { kind: "PodResizeInProgress", reason: Some("Error"), message });
                false
            }
        }
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
}
