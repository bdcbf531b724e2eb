//! The next step of a pod, decided from plain data: `plan(pod, observed, health, backoff, now) -> Actions`.
//! As `computePodActions` of Kubernetes' kuberuntime, with back-off decided here too. No I/O; the pod's worker carries the
//! actions out and asks again.

mod backoff;
mod init;
mod restart;
#[cfg(test)]
mod tests;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use crate::runtime::labels::container_hash;
use crate::runtime::observed::{ObservedContainer, ObservedPod, State};
use crate::runtime::pods::{ContainerKind, ephemeral_as_container, host_network, init_containers};

pub use backoff::RestartBackoff;
pub use restart::{begin_anew, may_begin_anew, restarts_after, restarts_on_failure};

/// What probes and hooks say of a container's current attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Health {
    /// The startup probe gave up.
    pub startup_failed: bool,
    pub liveness_failed: bool,
    /// The startup probe (if any) succeeded and the postStart hook (if any) is through.
    pub started: bool,
}

/// What is to be done to a container that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kill {
    pub id: String,
    pub name: String,
    pub reason: KillReason,
    /// For the Killing event.
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KillReason {
    Changed,
    LivenessProbe,
    StartupProbe,
    /// The runtime lost sight of it.
    Unknown,
    /// Another one ended so that all begin anew.
    BeginAnew,
}

/// A container that is to be started.
#[derive(Debug, Clone, PartialEq)]
pub struct Start {
    pub kind: ContainerKind,
    pub container: Container,
    pub restart_count: u32,
}

/// A container held back by CrashLoopBackOff until `until` (nanoseconds since 1970).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldBack {
    pub name: String,
    pub delay: std::time::Duration,
    pub until: i64,
}

/// What to do with the pod's sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SandboxAction {
    /// Containers go into this one.
    Keep(String),
    /// Everything old is stopped, then one is made.
    Create { attempt: u32 },
    /// Nothing more will run: stop everything.
    Stop,
}

/// The next step.
#[derive(Debug, Clone, PartialEq)]
pub struct Actions {
    pub sandbox: SandboxAction,
    pub kill: Vec<Kill>,
    /// In order; a container that cannot be started does not keep the later ones back.
    pub start: Vec<Start>,
    pub held_back: Vec<HeldBack>,
    /// Ended containers to remove, in this order: the pod begins anew without them.
    pub remove: Vec<String>,
}

impl Actions {
    fn of(sandbox: SandboxAction) -> Actions {
        Actions { sandbox, kill: Vec::new(), start: Vec::new(), held_back: Vec::new(), remove: Vec::new() }
    }

    /// Whether nothing is to be done now.
    pub fn is_idle(&self) -> bool {
        let nothing = self.kill.is_empty() && self.start.is_empty() && self.remove.is_empty();
        matches!(self.sandbox, SandboxAction::Keep(_)) && nothing
    }

    /// When a held-back container may start again.
    pub fn wake_at(&self) -> Option<i64> {
        self.held_back.iter().map(|h| h.until).min()
    }
}

/// Everything that a step is decided from.
pub struct Input<'a> {
    pub pod: &'a Pod,
    pub observed: &'a ObservedPod,
    /// Of a running container, by its ID.
    pub health: &'a dyn Fn(&ObservedContainer) -> Health,
    pub backoff: &'a RestartBackoff,
    /// Nanoseconds since 1970.
    pub now: i64,
}

/// Decides the next step of a pod that is wanted (not being deleted).
pub fn plan(input: &Input<'_>) -> Actions {
    let empty = PodSpec::default();
    let spec = input.pod.spec.as_ref().unwrap_or(&empty);
    match sandbox_to_use(input.pod, input.observed) {
        Ok(id) => plan_in_sandbox(input, spec, id),
        Err(attempt) => plan_new_sandbox(input, spec, attempt),
    }
}

/// The sandbox that serves, or the attempt of one to make. As `PodSandboxChanged`.
fn sandbox_to_use(pod: &Pod, observed: &ObservedPod) -> Result<String, u32> {
    let Some(latest) = observed.latest_sandbox() else { return Err(0) };
    let ready = observed.sandboxes.iter().filter(|s| s.ready).count();
    let on_host = host_network(pod);
    let usable = ready == 1 && latest.ready && latest.host_network == on_host && (on_host || !latest.ips.is_empty());
    if usable { Ok(latest.id.clone()) } else { Err(latest.attempt + 1) }
}

fn plan_new_sandbox(input: &Input<'_>, spec: &PodSpec, attempt: u32) -> Actions {
    let stop = Actions::of(SandboxAction::Stop);
    let observed = input.observed;
    // A pod that ran and does not restart is over with its sandbox.
    if attempt > 0 && !observed.containers.is_empty() && !restart::any_restarts(spec) {
        return stop;
    }
    let mut actions = Actions { sandbox: SandboxAction::Create { attempt }, ..stop.clone() };
    let anew = !begin_anew(spec, observed).is_empty();
    let wanted: Vec<&Container> = spec
        .containers
        .iter()
        .filter(|c| {
            anew || observed
                .latest(&c.name)
                .is_none_or(|s| s.state != State::Exited || restarts_after(spec, c, s.exit_code))
        })
        .collect();
    if wanted.is_empty() && init::finished_before(spec, observed) {
        return stop;
    }
    // The first step in a new sandbox: the first init container, or all containers.
    match init_containers(spec).first() {
        Some(first) => propose(&mut actions, input, ContainerKind::Init, first),
        None => {
            for container in wanted {
                propose(&mut actions, input, ContainerKind::App, container);
            }
        }
    }
    actions
}

fn plan_in_sandbox(input: &Input<'_>, spec: &PodSpec, sandbox: String) -> Actions {
    let observed = input.observed;
    let mut actions = Actions::of(SandboxAction::Keep(sandbox.clone()));
    let causes = begin_anew(spec, observed);
    if !causes.is_empty() {
        plan_beginning_anew(input, &causes, &mut actions);
        return actions;
    }
    for ephemeral in spec.ephemeral_containers.iter().flatten() {
        if observed.latest(&ephemeral.name).is_none() {
            let container = ephemeral_as_container(ephemeral);
            actions.start.push(Start { kind: ContainerKind::Ephemeral, container, restart_count: 0 });
        }
    }
    match init::plan(input, spec, &sandbox, &mut actions) {
        init::Initialized::Yes => {}
        init::Initialized::NotYet => return actions,
        init::Initialized::Failed => {
            actions.sandbox = SandboxAction::Stop;
            actions.start.clear();
            return actions;
        }
    }
    let mut kept = 0;
    let mut wanted = 0;
    for container in &spec.containers {
        match plan_container(input, spec, container, &sandbox, &mut actions) {
            Outcome::Kept => kept += 1,
            Outcome::Wanted => wanted += 1,
            Outcome::Over => {}
        }
    }
    if kept == 0 && wanted == 0 {
        // Only sidecars are left, if anything: they end with the pod.
        actions.sandbox = SandboxAction::Stop;
        actions.start.clear();
        actions.held_back.clear();
    }
    actions
}

/// All that runs is killed; then, when the back-off of what caused it is over, all is removed: those causes last, so that it
/// goes on if it is interrupted.
fn plan_beginning_anew(input: &Input<'_>, causes: &[(&Container, &ObservedContainer)], actions: &mut Actions) {
    let all = &input.observed.containers;
    for alive in all.iter().filter(|c| matches!(c.state, State::Running | State::Unknown)) {
        let (id, name) = (alive.id.clone(), alive.name.clone());
        let message = format!("Container {name} is restarted with all containers of its pod");
        actions.kill.push(Kill { id, name, reason: KillReason::BeginAnew, message });
    }
    for (container, ended) in causes {
        let held = input.backoff.held_until(&container.name, container_hash(container), ended.ended_at(input.now));
        if let Some((delay, until)) = held.filter(|(_, until)| input.now < *until) {
            actions.held_back.push(HeldBack { name: container.name.clone(), delay, until });
        }
    }
    if actions.kill.is_empty() && actions.held_back.is_empty() {
        let is_cause = |c: &&ObservedContainer| causes.iter().any(|(_, cause)| cause.id == c.id);
        let (last, first): (Vec<_>, Vec<_>) = all.iter().partition(is_cause);
        actions.remove = first.into_iter().chain(last).map(|c| c.id.clone()).collect();
    }
}

/// What became of a container in this step.
enum Outcome {
    Kept,
    /// To be started, now or after its back-off.
    Wanted,
    /// It has run and does not run again.
    Over,
}

fn plan_container(
    input: &Input<'_>,
    spec: &PodSpec,
    container: &Container,
    sandbox: &str,
    actions: &mut Actions,
) -> Outcome {
    let Some(status) = input.observed.latest(&container.name) else {
        propose(actions, input, ContainerKind::App, container);
        return Outcome::Wanted;
    };
    let lost = status.state == State::Running && status.sandbox_id != sandbox;
    match status.state {
        State::Running if !lost => {
            let Some((reason, message)) = reason_to_kill(input, container, status) else { return Outcome::Kept };
            let restarts = reason == KillReason::Changed || restarts_on_failure(spec, container);
            let message = if restarts { format!("{message}, will be restarted") } else { message };
            actions.kill.push(Kill { id: status.id.clone(), name: container.name.clone(), reason, message });
            if restarts {
                propose(actions, input, ContainerKind::App, container);
            }
            // While it ends it still counts as there.
            Outcome::Kept
        }
        State::Exited if !restarts_after(spec, container, status.exit_code) => Outcome::Over,
        State::Unknown | State::Running => {
            let message = format!("Container {} is in an unknown state, try killing it before restart", container.name);
            let reason = KillReason::Unknown;
            actions.kill.push(Kill { id: status.id.clone(), name: container.name.clone(), reason, message });
            propose(actions, input, ContainerKind::App, container);
            Outcome::Wanted
        }
        State::Created | State::Exited => {
            propose(actions, input, ContainerKind::App, container);
            Outcome::Wanted
        }
    }
}

/// Why a running container must go.
fn reason_to_kill(
    input: &Input<'_>,
    container: &Container,
    status: &ObservedContainer,
) -> Option<(KillReason, String)> {
    let name = &container.name;
    let health = (input.health)(status);
    if status.annotated.hash != 0 && status.annotated.hash != container_hash(container) {
        Some((KillReason::Changed, format!("Container {name} definition changed")))
    } else if health.liveness_failed {
        Some((KillReason::LivenessProbe, format!("Container {name} failed liveness probe")))
    } else if health.startup_failed {
        Some((KillReason::StartupProbe, format!("Container {name} failed startup probe")))
    } else {
        None
    }
}

/// Starts a container, unless its back-off holds it.
fn propose(actions: &mut Actions, input: &Input<'_>, kind: ContainerKind, container: &Container) {
    let last = input.observed.latest(&container.name);
    let restart_count = last.map_or(0, |s| s.annotated.restart_count + 1);
    // Its back-off counts from the end of its last attempt that ended; one that is about to be killed is not that.
    let ended = input.observed.containers.iter().find(|c| c.name == container.name && c.state == State::Exited);
    if let Some(ended) = ended
        && let Some((delay, until)) =
            input.backoff.held_until(&container.name, container_hash(container), ended.ended_at(input.now))
        && input.now < until
    {
        actions.held_back.push(HeldBack { name: container.name.clone(), delay, until });
        return;
    }
    actions.start.push(Start { kind, container: container.clone(), restart_count });
}
