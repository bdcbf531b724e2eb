//! Whether a container that ended runs again: the pod's restart policy, a container's own, and its rules by exit code.

use k8s_openapi::api::core::v1::{Container, PodSpec};

use crate::runtime::observed::{ObservedContainer, ObservedPod, State};
use crate::runtime::pods::{init_containers, is_sidecar};

/// A rule's action: the pod begins anew in its sandbox, init containers and all.
const RESTART_ALL: &str = "RestartAllContainers";

/// What the first of a container's rules that fits an exit says.
fn action(container: &Container, exit_code: i32) -> Option<&str> {
    let fits = |rule: &&k8s_openapi::api::core::v1::ContainerRestartRule| {
        rule.exit_codes.as_ref().is_some_and(|codes| {
            let listed = codes.values.iter().flatten().any(|v| *v == exit_code);
            matches!((codes.operator.as_str(), listed), ("In", true) | ("NotIn", false))
        })
    };
    container.restart_policy_rules.iter().flatten().find(fits).map(|rule| rule.action.as_str())
}

/// Whether `container` runs again after ending with `exit_code`. As `ShouldContainerBeRestarted`.
pub fn restarts_after(spec: &PodSpec, container: &Container, exit_code: i32) -> bool {
    if matches!(action(container, exit_code), Some("Restart" | RESTART_ALL)) {
        return true;
    }
    match policy(spec, container) {
        "Never" => false,
        "OnFailure" => exit_code != 0,
        _ => true,
    }
}

/// Whether a failed container runs again.
pub fn restarts_on_failure(spec: &PodSpec, container: &Container) -> bool {
    policy(spec, container) != "Never" || container.restart_policy_rules.as_ref().is_some_and(|r| !r.is_empty())
}

fn all_containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    init_containers(spec).iter().chain(&spec.containers)
}

/// Whether an exit can make the whole pod begin anew.
pub fn may_begin_anew(spec: &PodSpec) -> bool {
    all_containers(spec).flat_map(|c| c.restart_policy_rules.iter().flatten()).any(|rule| rule.action == RESTART_ALL)
}

/// The containers that ended so that all of the pod is to begin anew. As `ShouldAllContainersRestart`.
pub fn begin_anew<'a>(spec: &'a PodSpec, observed: &'a ObservedPod) -> Vec<(&'a Container, &'a ObservedContainer)> {
    let ended = |c: &'a Container| {
        let latest = observed.latest(&c.name).filter(|seen| seen.state == State::Exited)?;
        (action(c, latest.exit_code) == Some(RESTART_ALL)).then_some((c, latest))
    };
    all_containers(spec).filter_map(ended).collect()
}

/// Whether anything of the pod can run again after failing.
pub(super) fn any_restarts(spec: &PodSpec) -> bool {
    spec.restart_policy.as_deref() != Some("Never") || spec.containers.iter().any(|c| restarts_on_failure(spec, c))
}

/// A container's own policy, else the pod's. An init container of policy Always is a sidecar.
fn policy<'a>(spec: &'a PodSpec, container: &'a Container) -> &'a str {
    if is_sidecar(container) {
        return "Always";
    }
    container.restart_policy.as_deref().or(spec.restart_policy.as_deref()).unwrap_or("Always")
}
