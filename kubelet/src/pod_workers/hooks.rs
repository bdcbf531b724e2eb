//! Lifecycle hooks: postStart and preStop by exec, HTTP, or sleep.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, LifecycleHandler};

use crate::probes::check::{self, Checked, Outcome};
use crate::runtime::cri::Cri;

/// The longest that an HTTP hook may take to answer.
const HTTP_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest that a postStart command may run: it blocks the container's start.
const EXEC_TIMEOUT: Duration = Duration::from_secs(3600);

/// Runs a hook to its end. `Err` says why it failed.
pub(super) async fn run(
    cri: &Cri,
    hook: &LifecycleHandler,
    container: &Container,
    container_id: &str,
    pod_ip: &str,
) -> Result<(), String> {
    let failure = |checked: Checked| match checked {
        Ok(Outcome::Success | Outcome::Warning(_)) => None,
        Ok(Outcome::Failure(output)) | Err(output) => Some(output),
    };
    if let Some(action) = &hook.exec {
        let command = action.command.clone().unwrap_or_default();
        let failed = failure(check::exec(cri, container_id, action, EXEC_TIMEOUT).await);
        return failed.map_or(Ok(()), |output| {
            Err(format!("Exec lifecycle hook ({command:?}) for Container {:?} failed - {output}", container.name))
        });
    }
    if let Some(action) = &hook.http_get {
        let failed = failure(check::http(&with_port(action), container, pod_ip, HTTP_TIMEOUT).await);
        return failed
            .map_or(Ok(()), |e| Err(format!("HTTP lifecycle hook for Container {:?} failed - {e}", container.name)));
    }
    if let Some(sleep) = &hook.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
    }
    Ok(())
}

/// Hooks without a port go to the scheme's own.
fn with_port(action: &HTTPGetAction) -> HTTPGetAction {
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
    let mut action = action.clone();
    let absent = match &action.port {
        IntOrString::Int(number) => *number == 0,
        IntOrString::String(name) => name.is_empty(),
    };
    if absent {
        let tls = action.scheme.as_deref() == Some("HTTPS");
        action.port = IntOrString::Int(if tls { 443 } else { 80 });
    }
    action
}
