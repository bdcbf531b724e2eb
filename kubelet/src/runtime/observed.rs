//! What the runtime says about a pod: its sandboxes and all attempts of its containers, newest first. Plain data, the
//! input of `plan` and of the status.

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
        state: status.state().into(),
        sandbox_id: sandbox_id.to_owned(),
        created_at: status.created_at,
        started_at: status.started_at,
        finished_at: status.finished_at,
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
