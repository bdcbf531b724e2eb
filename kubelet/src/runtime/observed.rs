//! What the runtime says about a pod: its sandboxes and all attempts of its containers, newest first. Plain data, the
//! input of `plan` and of the status.

use std::time::Duration;

use proto::cri as pb;

use super::labels::{self, Annotated};

/// One pod as the runtime has it. As `kubecontainer.PodStatus`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ObservedPod {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    /// Newest first.
    pub sandboxes: Vec<Sandbox>,
    /// Newest first, of all sandboxes.
    pub containers: Vec<ObservedContainer>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sandbox {
    pub id: String,
    pub attempt: u32,
    pub ready: bool,
    pub created_at: i64,
    pub host_network: bool,
    pub ips: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    Created,
    Running,
    Exited,
    #[default]
    Unknown,
}

/// One attempt of a container. Times are nanoseconds since 1970, 0 when they have not come.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ObservedContainer {
    pub id: String,
    pub name: String,
    pub sandbox_id: String,
    pub state: State,
    pub created_at: i64,
    pub started_at: i64,
    pub finished_at: i64,
    /// For how long it has been known to have ended, by a clock that does not jump.
    pub ended_for: Duration,
    pub exit_code: i32,
    pub reason: String,
    pub message: String,
    pub image: String,
    pub image_ref: String,
    pub log_path: String,
    pub annotated: Annotated,
    pub user: Option<pb::LinuxContainerUser>,
    pub resources: Option<pb::LinuxContainerResources>,
    /// The signal that stops it, where the runtime says.
    pub stop_signal: Option<&'static str>,
    /// The host file that the container's termination message goes to.
    pub termination_file: Option<String>,
}

impl ObservedPod {
    /// Newest first: by their count, since a clock that was set back makes the newer one the older.
    pub fn sort(&mut self) {
        self.sandboxes.sort_by_key(|s| std::cmp::Reverse((s.attempt, s.created_at)));
        self.containers.sort_by_key(|c| std::cmp::Reverse((c.annotated.restart_count, c.created_at)));
    }

    pub fn latest_sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.first()
    }

    /// The newest attempt of a container.
    pub fn latest(&self, name: &str) -> Option<&ObservedContainer> {
        self.containers.iter().find(|c| c.name == name)
    }

    /// The newest attempt within one sandbox.
    pub fn latest_in(&self, sandbox: &str, name: &str) -> Option<&ObservedContainer> {
        self.containers.iter().find(|c| c.name == name && c.sandbox_id == sandbox)
    }

    pub fn running(&self) -> impl Iterator<Item = &ObservedContainer> {
        self.containers.iter().filter(|c| c.state == State::Running)
    }

    pub fn is_gone(&self) -> bool {
        self.sandboxes.is_empty() && self.containers.is_empty()
    }

    /// Whether nothing of the pod runs any more.
    pub fn is_stopped(&self) -> bool {
        self.containers.iter().all(|c| matches!(c.state, State::Exited | State::Created))
            && self.sandboxes.iter().all(|s| !s.ready)
    }
}

impl ObservedContainer {
    /// When it ended, as back-off counts: a clock that was set back since does not prolong it.
    pub fn ended_at(&self, now: i64) -> i64 {
        let ended_for = i64::try_from(self.ended_for.as_nanos()).unwrap_or(i64::MAX);
        self.finished_at.min(now.saturating_sub(ended_for))
    }
}

impl From<pb::ContainerState> for State {
    fn from(state: pb::ContainerState) -> Self {
        match state {
            pb::ContainerState::ContainerCreated => State::Created,
            pb::ContainerState::ContainerRunning => State::Running,
            pb::ContainerState::ContainerExited => State::Exited,
            pb::ContainerState::ContainerUnknown => State::Unknown,
        }
    }
}

/// Whether a start was cut short because its caller went away (the kubelet was killed), as containerd tells it: nothing of the
/// container has run, so it has not ended either, and may be started whatever its pod's restart policy is.
fn start_was_abandoned(status: &pb::ContainerStatus) -> bool {
    status.state() == pb::ContainerState::ContainerExited
        && status.started_at == 0
        && status.reason == "StartError"
        && status.message.contains("context canceled")
}

/// A sandbox from its status.
pub fn sandbox(status: pb::PodSandboxStatus) -> Sandbox {
    let options = status.linux.and_then(|l| l.namespaces).and_then(|n| n.options);
    let host_network = options.is_some_and(|o| o.network() == pb::NamespaceMode::Node);
    let mut ips = Vec::new();
    if let (Some(network), false) = (&status.network, host_network) {
        let all = std::iter::once(&network.ip).chain(network.additional_ips.iter().map(|p| &p.ip));
        ips.extend(all.filter(|ip| !ip.is_empty()).cloned());
    }
    Sandbox {
        ready: status.state == pb::PodSandboxState::SandboxReady as i32,
        attempt: status.metadata.map_or(0, |m| m.attempt),
        created_at: status.created_at,
        id: status.id,
        host_network,
        ips,
    }
}

/// A container from its status; `sandbox_id` comes from the list, the status does not have it.
pub fn container(status: pb::ContainerStatus, sandbox_id: &str) -> ObservedContainer {
    let annotated = labels::annotated(&status.annotations, status.metadata.as_ref());
    let termination_file = status
        .mounts
        .iter()
        .find(|m| !annotated.termination_path.is_empty() && m.container_path == annotated.termination_path)
        .map(|m| m.host_path.clone());
    let stop_signal = Some(status.stop_signal()).filter(|s| *s != pb::Signal::RuntimeDefault).map(|s| s.as_str_name());
    ObservedContainer {
        name: status
            .labels
            .get(labels::CONTAINER_NAME)
            .cloned()
            .or_else(|| status.metadata.as_ref().map(|m| m.name.clone()))
            .unwrap_or_default(),
        state: if start_was_abandoned(&status) { State::Created } else { status.state().into() },
        sandbox_id: sandbox_id.to_owned(),
        created_at: status.created_at,
        started_at: status.started_at,
        finished_at: status.finished_at,
        ended_for: Duration::ZERO,
        exit_code: status.exit_code,
        reason: status.reason,
        message: status.message,
        image: status
            .image
            .map(|i| if i.user_specified_image.is_empty() { i.image } else { i.user_specified_image })
            .unwrap_or_default(),
        image_ref: status.image_ref,
        log_path: status.log_path,
        user: status.user.and_then(|u| u.linux),
        resources: status.resources.and_then(|r| r.linux),
        id: status.id,
        stop_signal,
        annotated,
        termination_file,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_jump_change_no_order_and_prolong_no_back_off() {
        let attempt = |restart_count, created_at, finished_at, ended_for| ObservedContainer {
            id: format!("c{restart_count}"),
            name: "c".into(),
            created_at,
            finished_at,
            ended_for: Duration::from_nanos(ended_for),
            annotated: Annotated { restart_count, ..Default::default() },
            ..Default::default()
        };
        let mut pod = ObservedPod {
            containers: vec![attempt(0, 5000, 6000, 10), attempt(1, 70, 0, 0)],
            sandboxes: [(0, 4000), (1, 60)]
                .map(|(attempt, created_at)| Sandbox { attempt, created_at, ..Default::default() })
                .to_vec(),
            ..Default::default()
        };
        pod.sort();
        assert_eq!((pod.latest("c").unwrap().id.as_str(), pod.latest_sandbox().unwrap().attempt), ("c1", 1));
        assert_eq!((pod.containers[1].ended_at(100), pod.containers[1].ended_at(7000)), (90, 6000));
    }

    #[test]
    fn a_start_that_nobody_waited_for_is_no_end() {
        let ended = pb::ContainerStatus {
            state: pb::ContainerState::ContainerExited as i32,
            exit_code: 128,
            reason: "StartError".into(),
            message: "failed to start containerd task: context canceled: unknown".into(),
            ..Default::default()
        };
        let failed = pb::ContainerStatus { message: "exec: no such file".into(), ..ended.clone() };
        let ran = pb::ContainerStatus { started_at: 1, ..ended.clone() };
        let states = [ended, failed, ran].map(|status| container(status, "s").state);
        assert_eq!(states, [State::Created, State::Exited, State::Exited]);
    }
}
