//! Init containers: one after the other, each to its end; restartable ones (sidecars) are started in their turn, and kept
//! running from then on. As `computeInitContainerActions`, read forwards.

use k8s_openapi::api::core::v1::{Container, PodSpec};

use super::{Actions, Input, Kill, KillReason, propose, restart};
use crate::runtime::observed::{ObservedContainer, ObservedPod, State};
use crate::runtime::pods::{ContainerKind, init_containers, is_sidecar};

/// Whether the app containers may run.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Initialized {
    Yes,
    NotYet,
    /// An init container failed for good: the pod is over.
    Failed,
}

/// Whether initialization was through at some time before, in whatever sandbox.
pub(super) fn finished_before(spec: &PodSpec, observed: &ObservedPod) -> bool {
    spec.containers.iter().any(|c| observed.latest(&c.name).is_some())
        || init_containers(spec)
            .iter()
            .all(|c| observed.latest(&c.name).is_some_and(|s| s.state == State::Exited && s.exit_code == 0))
}

pub(super) fn plan(input: &Input<'_>, spec: &PodSpec, sandbox: &str, actions: &mut Actions) -> Initialized {
    let init = init_containers(spec);
    let seen = |c: &Container| input.observed.latest_in(sandbox, &c.name);
    let apps_begun = spec.containers.iter().any(|c| seen(c).is_some());
    for (index, container) in init.iter().enumerate() {
        // What has been begun after this one shows that this one was once done.
        let passed = apps_begun || init[index + 1..].iter().any(|c| seen(c).is_some());
        let step = if is_sidecar(container) {
            sidecar(input, container, seen(container), passed, actions)
        } else if passed {
            Step::Next
        } else {
            once(input, spec, container, seen(container), actions)
        };
        match step {
            Step::Next => {}
            Step::Wait => return Initialized::NotYet,
            Step::Fail => return Initialized::Failed,
        }
    }
    Initialized::Yes
}

enum Step {
    Next,
    Wait,
    Fail,
}

/// An init container that runs to its end.
fn once(
    input: &Input<'_>,
    spec: &PodSpec,
    container: &Container,
    status: Option<&ObservedContainer>,
    actions: &mut Actions,
) -> Step {
    match status.map(|s| (s.state, s.exit_code)) {
        Some((State::Running, _)) => Step::Wait,
        Some((State::Exited, 0)) => Step::Next,
        Some((State::Exited, code)) if !restarts(spec, container, code) => Step::Fail,
        Some((State::Unknown, _)) => {
            kill(actions, status, KillReason::Unknown, "is in an unknown state, try killing it before restart");
            propose(actions, input, ContainerKind::Init, container);
            Step::Wait
        }
        _ => {
            propose(actions, input, ContainerKind::Init, container);
            Step::Wait
        }
    }
}

/// For an init container, Always means until it succeeds.
fn restarts(spec: &PodSpec, container: &Container, exit_code: i32) -> bool {
    restart::restarts_after(spec, container, exit_code)
}

/// An init container that keeps running.
fn sidecar(
    input: &Input<'_>,
    container: &Container,
    status: Option<&ObservedContainer>,
    passed: bool,
    actions: &mut Actions,
) -> Step {
    let go_on = if passed { Step::Next } else { Step::Wait };
    let Some(status) = status else {
        propose(actions, input, ContainerKind::Init, container);
        return go_on;
    };
    match status.state {
        State::Running => {
            if let Some((reason, message)) = super::reason_to_kill(input, container, status) {
                let message = format!("{message}, will be restarted");
                actions.kill.push(Kill { id: status.id.clone(), name: container.name.clone(), reason, message });
                propose(actions, input, ContainerKind::Init, container);
                return go_on;
            }
            if (input.health)(status).started { Step::Next } else { go_on }
        }
        State::Unknown => {
            kill(actions, Some(status), KillReason::Unknown, "is in an unknown state, try killing it before restart");
            propose(actions, input, ContainerKind::Init, container);
            go_on
        }
        State::Created | State::Exited => {
            propose(actions, input, ContainerKind::Init, container);
            go_on
        }
    }
}

fn kill(actions: &mut Actions, status: Option<&ObservedContainer>, reason: KillReason, why: &str) {
    if let Some(status) = status {
        let message = format!("Init container {} {why}", status.name);
        actions.kill.push(Kill { id: status.id.clone(), name: status.name.clone(), reason, message });
    }
}
