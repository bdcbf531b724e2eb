//! Whether a container that ended runs again: the pod's restart policy, a container's own, and its rules by exit code.

use k8s_openapi::api::core::v1::{Container, PodSpec};

use crate::runtime::pods::is_sidecar;

/// Whether `container` runs again after ending with `exit_code`. As `ShouldContainerBeRestarted`.
pub fn restarts_after(spec: &PodSpec, container: &Container, exit_code: i32) -> bool {
    for rule in container.restart_policy_rules.iter().flatten() {
        let Some(codes) = &rule.exit_codes else { continue };
        let listed = codes.values.iter().flatten().any(|v| *v == exit_code);
        let matches = match codes.operator.as_str() {
            "In" => listed,
            "NotIn" => !listed,
            _ => false,
        };
        if matches && rule.action == "Restart" {
            return true;
        }
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
