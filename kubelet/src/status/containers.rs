//! Container statuses: the newest attempt as `state`, the one before as `lastState`, and reasons for those that wait.
//! As `convertToAPIContainerStatuses`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    ContainerUser, LinuxContainerUser, PodSpec, PodStatus, ResourceRequirements, ResourceStatus, VolumeMountStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::plan::restarts_after;
use crate::runtime::observed::{ObservedContainer, ObservedPod, State};
use crate::runtime::pods::{ContainerKind, is_sidecar};

/// Why a container waits, beyond what the runtime shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub reason: String,
    pub message: String,
}

/// What probes say of a running container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProbeView {
    pub started: bool,
    pub ready: bool,
}

/// Everything a container's status is made from.
pub(super) struct Source<'a> {
    pub spec: &'a PodSpec,
    pub observed: &'a ObservedPod,
    pub old: &'a [ContainerStatus],
    pub waiting: &'a BTreeMap<String, Waiting>,
    pub probes: &'a dyn Fn(&ObservedContainer) -> ProbeView,
    pub resources: &'a dyn Fn(&ObservedContainer) -> Option<ResourceRequirements>,
    pub devices: &'a dyn Fn(&Container) -> Vec<ResourceStatus>,
    pub runtime_name: &'a str,
    /// The pod is being deleted: what cannot be found any more has ended.
    pub deleted: bool,
}

/// A time of the runtime; its zero means that it has not come.
pub(super) fn time(nanos: i64) -> Option<Time> {
    if nanos <= 0 {
        return None;
    }
    // Times are reported to the second, as Kubernetes writes them.
    Timestamp::from_second(nanos / 1_000_000_000).ok().map(Time)
}

pub(super) fn status(source: &Source<'_>, kind: ContainerKind, container: &Container) -> ContainerStatus {
    let mut status = of_attempts(source, kind, container);
    if kind == ContainerKind::App {
        let devices = Some((source.devices)(container)).filter(|devices| !devices.is_empty());
        // What an ended container had is no longer known.
        let before = || source.old.iter().find(|s| s.name == container.name)?.allocated_resources_status.clone();
        status.allocated_resources_status = devices.or_else(before);
    }
    status
}

fn of_attempts(source: &Source<'_>, kind: ContainerKind, container: &Container) -> ContainerStatus {
    let mut attempts = source.observed.containers.iter().filter(|c| c.name == container.name);
    let old = source.old.iter().find(|s| s.name == container.name);
    let Some(latest) = attempts.next() else { return without_attempt(source, kind, container, old) };
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: if latest.image.is_empty() { container.image.clone().unwrap_or_default() } else { latest.image.clone() },
        image_id: latest.image_ref.clone(),
        container_id: Some(format!("{}://{}", source.runtime_name, latest.id)),
        stop_signal: latest.stop_signal.map(str::to_owned),
        restart_count: i32::try_from(latest.annotated.restart_count).unwrap_or(i32::MAX),
        state: Some(state(source, latest, old)),
        last_state: Some(attempts.next().map(|previous| state(source, previous, None)).unwrap_or_default()),
        ..Default::default()
    };
    // A container that has ended and is held back, or cannot be started again, waits.
    if let Some(waiting) = source.waiting.get(&container.name)
        && latest.state != State::Running
        && (latest.state != State::Exited || restarts_after(source.spec, container, latest.exit_code))
    {
        if latest.state == State::Exited {
            status.last_state = status.state.take();
        }
        status.state = Some(waiting_state(waiting));
    }
    let view = if latest.state == State::Running { (source.probes)(latest) } else { ProbeView::default() };
    let once = kind == ContainerKind::Init && !is_sidecar(container);
    status.started = Some(view.started && !once);
    status.ready = match kind {
        ContainerKind::Init if once => latest.state == State::Exited && latest.exit_code == 0,
        ContainerKind::Ephemeral => false,
        _ => view.ready,
    };
    if kind == ContainerKind::Ephemeral {
        status.started = None;
    } else {
        add_resources(&mut status, container, latest, (source.resources)(latest));
    }
    status
}

fn waiting_state(waiting: &Waiting) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(waiting.reason.clone()),
            message: Some(waiting.message.clone()).filter(|m| !m.is_empty()),
        }),
        ..Default::default()
    }
}

/// A container that ended without anybody having seen how.
fn lost(message: &str) -> ContainerStateTerminated {
    ContainerStateTerminated {
        exit_code: 137,
        reason: Some("ContainerStatusUnknown".to_owned()),
        message: Some(message.to_owned()),
        ..Default::default()
    }
}

const LOST_AT_THE_END: &str = "The container could not be located when the pod was terminated";

/// What is left open is closed: all of the pod has ended. As `TerminatePod`.
pub(super) fn settle(status: &mut PodStatus) {
    let waits = |s: &ContainerStatus| s.state.as_ref().is_some_and(|state| state.waiting.is_some());
    let ran = |s: &ContainerStatus| s.last_state.as_ref().is_some_and(|last| last.terminated.is_some());
    let succeeded = |state: &Option<ContainerState>| {
        state.as_ref().and_then(|s| s.terminated.as_ref()).is_some_and(|t| t.exit_code == 0)
    };
    let init = status.init_container_statuses.as_deref().unwrap_or_default();
    let initialized = init.is_empty()
        || status.container_statuses.iter().flatten().any(|s| ran(s) || !waits(s))
        || init.last().is_some_and(|s| succeeded(&s.state) || succeeded(&s.last_state));
    // All but the last of those whose turn had not come, and at least one.
    let begun = init.iter().rposition(|s| !waits(s) || ran(s)).unwrap_or(0) + 1;
    let apps = status.container_statuses.iter_mut().flatten().filter(|_| initialized);
    for open in status.init_container_statuses.iter_mut().flatten().take(begun).chain(apps) {
        let state = open.state.get_or_insert_default();
        if state.terminated.is_none() {
            *state = ContainerState { terminated: Some(lost(LOST_AT_THE_END)), ..Default::default() };
        }
    }
}

/// A container of which the runtime has nothing: not yet created, or no longer there.
fn without_attempt(
    source: &Source<'_>,
    kind: ContainerKind,
    container: &Container,
    old: Option<&ContainerStatus>,
) -> ContainerStatus {
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        started: (kind != ContainerKind::Ephemeral).then_some(false),
        state: Some(ContainerState::default()),
        last_state: Some(ContainerState::default()),
        ..Default::default()
    };
    if let Some(old) = old {
        status.restart_count = old.restart_count;
        let old_state = old.state.clone().unwrap_or_default();
        if old_state.terminated.is_some() {
            // It ran to its end, and the runtime has forgotten it: what was reported stays true.
            return ContainerStatus { ready: old.ready && kind == ContainerKind::Init, ..old.clone() };
        }
        if old_state.running.is_some() {
            let ended = |message| Some(ContainerState { terminated: Some(lost(message)), ..Default::default() });
            if source.deleted {
                status.state = ended(
                    "The container could not be located when the pod was deleted.  The container used to be Running",
                );
                return status;
            }
            status.last_state = ended(LOST_AT_THE_END);
        } else {
            status.last_state = old.last_state.clone().or(status.last_state);
        }
    }
    let default = Waiting {
        reason: match kind {
            ContainerKind::Init => "PodInitializing",
            _ if source.spec.init_containers.as_ref().is_some_and(|i| !i.is_empty()) => "PodInitializing",
            _ => "ContainerCreating",
        }
        .to_owned(),
        message: String::new(),
    };
    status.state = Some(waiting_state(source.waiting.get(&container.name).unwrap_or(&default)));
    if kind != ContainerKind::Ephemeral {
        status.volume_mounts = volume_mounts(container);
    }
    status
}

fn state(source: &Source<'_>, attempt: &ObservedContainer, old: Option<&ContainerStatus>) -> ContainerState {
    let mut out = ContainerState::default();
    match attempt.state {
        State::Running => out.running = Some(ContainerStateRunning { started_at: time(attempt.started_at) }),
        State::Created => out.waiting = Some(ContainerStateWaiting::default()),
        State::Exited => out.terminated = Some(terminated(source, attempt)),
        State::Unknown => {
            let ran = old.and_then(|o| o.state.as_ref()).is_some_and(|s| s.running.is_some());
            if ran {
                out.terminated = Some(lost(LOST_AT_THE_END));
            } else {
                out.waiting = Some(ContainerStateWaiting::default());
            }
        }
    }
    out
}

fn terminated(source: &Source<'_>, attempt: &ObservedContainer) -> ContainerStateTerminated {
    let default = if attempt.exit_code == 0 { "Completed" } else { "Error" };
    ContainerStateTerminated {
        exit_code: attempt.exit_code,
        reason: Some(if attempt.reason.is_empty() { default.to_owned() } else { attempt.reason.clone() }),
        message: Some(attempt.message.clone()).filter(|m| !m.is_empty()),
        started_at: time(attempt.started_at),
        finished_at: time(attempt.finished_at),
        container_id: Some(format!("{}://{}", source.runtime_name, attempt.id)),
        signal: None,
    }
}

fn add_resources(
    status: &mut ContainerStatus,
    container: &Container,
    latest: &ObservedContainer,
    applied: Option<ResourceRequirements>,
) {
    status.volume_mounts = volume_mounts(container);
    let resources = applied.or_else(|| container.resources.clone()).unwrap_or_default();
    status.allocated_resources = resources.requests.clone().filter(|r| !r.is_empty());
    status.resources = Some(ResourceRequirements { claims: None, ..resources });
    status.user = latest.user.as_ref().map(|user| ContainerUser {
        linux: Some(LinuxContainerUser {
            uid: user.uid,
            gid: user.gid,
            supplemental_groups: Some(user.supplemental_groups.clone()).filter(|g| !g.is_empty()),
        }),
    });
}

fn volume_mounts(container: &Container) -> Option<Vec<VolumeMountStatus>> {
    let mounts: Vec<_> = container
        .volume_mounts
        .iter()
        .flatten()
        .map(|m| VolumeMountStatus {
            name: m.name.clone(),
            mount_path: m.mount_path.clone(),
            read_only: m.read_only.filter(|r| *r),
            recursive_read_only: m.read_only.filter(|r| *r).map(|_| {
                match m.recursive_read_only.as_deref() {
                    Some("Enabled") => "Enabled",
                    _ => "Disabled",
                }
                .to_owned()
            }),
            ..Default::default()
        })
        .collect();
    Some(mounts).filter(|m| !m.is_empty())
}
