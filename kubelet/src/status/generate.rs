//! A pod's status from its spec, what is observed of it, and what probes say. Pure. As `generateAPIPodStatus`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodSpec, PodStatus, ResourceRequirements,
    ResourceStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::containers::{self, ProbeView, Source, Waiting};
use crate::plan::{begin_anew, may_begin_anew, restarts_on_failure};
use crate::runtime::observed::{ObservedContainer, ObservedPod};
use crate::runtime::pods::{ContainerKind, ephemeral_as_container, host_network, init_containers, is_sidecar};

/// A pod that is over for a reason of its own (evicted, rejected, past its deadline).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Why, as `status.reason`.
    pub reason: String,
    pub message: String,
    /// Ended by the node's doing, not by its own: what the condition DisruptionTarget says.
    pub disrupted: Option<String>,
    /// It never began: there is nothing to say of its containers.
    pub rejected: bool,
}

impl Ended {
    pub fn new(reason: &str, message: impl Into<String>) -> Ended {
        Ended { reason: reason.to_owned(), message: message.into(), disrupted: None, rejected: false }
    }

    /// As it is, by the node's doing.
    pub fn by_the_node(self) -> Ended {
        Ended { disrupted: Some(self.message.clone()), ..self }
    }

    /// A refusal as the pod's status tells it. As `rejectPod`.
    pub fn as_rejection(self) -> Ended {
        Ended { message: format!("Pod was rejected: {}", self.message), rejected: true, ..self }
    }

    /// Ended for want of a resource.
    pub fn evicted(message: impl Into<String>) -> Ended {
        Ended::new("Evicted", message).by_the_node()
    }
}

/// A resize that is not through, as a condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resize {
    /// PodResizePending or PodResizeInProgress.
    pub kind: &'static str,
    pub reason: Option<&'static str>,
    pub message: String,
}

/// Everything a status is made from.
pub struct Input<'a> {
    pub pod: &'a Pod,
    /// What was last reported.
    pub old: &'a PodStatus,
    pub observed: &'a ObservedPod,
    pub waiting: &'a BTreeMap<String, Waiting>,
    pub probes: &'a dyn Fn(&ObservedContainer) -> ProbeView,
    pub host_ips: &'a [String],
    pub runtime_name: &'a str,
    pub ended: Option<&'a Ended>,
    /// What a running container has, if that is known to differ from its spec.
    pub resources: &'a dyn Fn(&ObservedContainer) -> Option<ResourceRequirements>,
    pub resize: Option<&'a Resize>,
    /// The health of the devices that a container has.
    pub devices: &'a dyn Fn(&Container) -> Vec<ResourceStatus>,
    /// All containers have been stopped for good: the phase must be a final one.
    pub terminated: bool,
    pub now: Timestamp,
}

/// Conditions of ours that are there only while there is something to say.
pub(super) const RESIZE_CONDITIONS: [&str; 2] = ["PodResizePending", "PodResizeInProgress"];
/// Conditions that nobody else writes. As `PodConditionsByKubelet`, as far as rejected pods have them.
const OWN_CONDITIONS: [&str; 5] = [PODS_NETWORK, INITIALIZED, READY, CONTAINERS_READY, "PodScheduled"];
const PODS_NETWORK: &str = "PodReadyToStartContainers";
const CONTAINERS_READY: &str = "ContainersReady";
const READY: &str = "Ready";
const INITIALIZED: &str = "Initialized";

/// The status to report.
pub fn generate(input: &Input<'_>) -> PodStatus {
    let empty = PodSpec::default();
    let spec = input.pod.spec.as_ref().unwrap_or(&empty);
    let old = input.old;
    let statuses = |old: &Option<Vec<ContainerStatus>>, kind, list: &[Container]| -> Option<Vec<ContainerStatus>> {
        let source = Source {
            spec,
            observed: input.observed,
            old: old.as_deref().unwrap_or_default(),
            waiting: input.waiting,
            probes: input.probes,
            resources: input.resources,
            devices: input.devices,
            runtime_name: input.runtime_name,
            deleted: input.pod.metadata.deletion_timestamp.is_some() || input.terminated,
        };
        Some(list.iter().map(|c| containers::status(&source, kind, c)).collect()).filter(|l: &Vec<_>| !l.is_empty())
    };
    // What others write is taken from the API's object, not from what was last reported.
    let none = PodStatus::default();
    let theirs = input.pod.status.as_ref().unwrap_or(&none);
    // A final phase never changes again, whoever set it.
    let done = [theirs, old].into_iter().find(|s| is_final(s));
    if let Some(rejected) = input.ended.filter(|e| e.rejected && done.is_none()) {
        return rejection(input, spec, rejected);
    }
    if let Some(done) = done.filter(|s| s.container_statuses.is_none() && input.observed.is_gone()) {
        // It was rejected before.
        return PodStatus { observed_generation: input.pod.metadata.generation, ..done.clone() };
    }
    let ephemeral: Vec<Container> = spec.ephemeral_containers.iter().flatten().map(ephemeral_as_container).collect();
    let init_statuses = statuses(&old.init_container_statuses, ContainerKind::Init, init_containers(spec));
    let app_statuses = statuses(&old.container_statuses, ContainerKind::App, &spec.containers);
    let ephemeral_statuses = statuses(&old.ephemeral_container_statuses, ContainerKind::Ephemeral, &ephemeral);

    let phase = match (done, input.ended) {
        (Some(done), _) => done.phase.as_deref().unwrap_or("Failed"),
        (None, Some(_)) => "Failed",
        (None, None) => phase(
            spec,
            init_statuses.as_deref().unwrap_or_default(),
            app_statuses.as_deref().unwrap_or_default(),
            input.terminated,
        ),
    };
    let mut status = PodStatus {
        phase: Some(phase.to_owned()),
        reason: done.map_or_else(|| input.ended.map(|e| e.reason.clone()), |done| done.reason.clone()),
        message: done.map_or_else(|| input.ended.map(|e| e.message.clone()), |done| done.message.clone()),
        start_time: old.start_time.clone().or_else(|| Some(Time(to_second(input.now)))),
        qos_class: old.qos_class.clone().or_else(|| Some(apimachinery::pod::qos_class(spec).to_owned())),
        nominated_node_name: theirs.nominated_node_name.clone(),
        resource_claim_statuses: theirs.resource_claim_statuses.clone(),
        extended_resource_claim_status: theirs.extended_resource_claim_status.clone(),
        observed_generation: input.pod.metadata.generation,
        init_container_statuses: init_statuses,
        container_statuses: app_statuses,
        ephemeral_container_statuses: ephemeral_statuses,
        ..Default::default()
    };
    addresses(&mut status, input);
    status.conditions = Some(conditions(input, spec, &status));
    if input.terminated {
        containers::settle(&mut status);
    }
    status
}

/// A pod that was not let in: its phase and why.
fn rejection(input: &Input<'_>, spec: &PodSpec, rejected: &Ended) -> PodStatus {
    let owned = |kind: &str| OWN_CONDITIONS.contains(&kind);
    let theirs = input.pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
    let others: Vec<PodCondition> = theirs.filter(|c| !owned(&c.type_)).cloned().collect();
    PodStatus {
        phase: Some("Failed".to_owned()),
        reason: Some(rejected.reason.clone()),
        message: Some(rejected.message.clone()),
        conditions: Some(others).filter(|c| !c.is_empty()),
        start_time: input.old.start_time.clone().or_else(|| Some(Time(to_second(input.now)))),
        qos_class: Some(apimachinery::pod::qos_class(spec).to_owned()),
        observed_generation: input.pod.metadata.generation,
        ..Default::default()
    }
}

fn to_second(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

fn addresses(status: &mut PodStatus, input: &Input<'_>) {
    let hosts = input.host_ips;
    status.host_ip = hosts.first().cloned();
    status.host_ips =
        Some(hosts.iter().map(|ip| HostIP { ip: ip.clone() }).collect()).filter(|l: &Vec<_>| !l.is_empty());
    let sandbox = input.observed.latest_sandbox();
    let ips: Vec<String> = if host_network(input.pod) {
        // Known from the first moment, and as long as the node stands.
        hosts.to_vec()
    } else {
        match sandbox {
            Some(sandbox) if sandbox.ready => sandbox.ips.clone(),
            // Kept while the pod ends, so that it can be traced; gone when its sandbox is remade.
            _ if input.terminated || input.pod.metadata.deletion_timestamp.is_some() || is_final(status) => {
                input.old.pod_ips.iter().flatten().map(|p| p.ip.clone()).collect()
            }
            _ => Vec::new(),
        }
    };
    status.pod_ip = ips.first().cloned();
    status.pod_ips = Some(ips.into_iter().map(|ip| PodIP { ip }).collect()).filter(|l: &Vec<_>| !l.is_empty());
}

fn is_final(status: &PodStatus) -> bool {
    matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
}

/// How a pod's containers stand, as one word. As `getPhase`.
fn phase(spec: &PodSpec, init: &[ContainerStatus], apps: &[ContainerStatus], terminated: bool) -> &'static str {
    let ran = |s: &ContainerStatus| s.last_state.as_ref().is_some_and(|l| l.terminated.is_some());
    let mut pending_init = 0;
    for (container, status) in init_containers(spec).iter().zip(init) {
        let state = status.state.clone().unwrap_or_default();
        if is_sidecar(container) {
            if state.running.is_some() && status.started != Some(true) || state.waiting.is_some() && !ran(status) {
                pending_init += 1;
            }
            continue;
        }
        match state.terminated {
            Some(t) if t.exit_code == 0 => {}
            Some(_) => {
                if !restarts_on_failure(spec, container) || terminated {
                    return "Failed";
                }
                pending_init += 1;
            }
            None => pending_init += 1,
        }
    }
    let (mut running, mut waiting, mut stopped, mut succeeded) = (0, 0, 0, 0);
    let mut restarting = false;
    for (container, status) in spec.containers.iter().zip(apps) {
        let state = status.state.clone().unwrap_or_default();
        if state.running.is_some() {
            running += 1;
        } else if let Some(t) = state.terminated {
            stopped += 1;
            succeeded += usize::from(t.exit_code == 0);
            restarting |= crate::plan::restarts_after(spec, container, t.exit_code);
        } else if ran(status) {
            stopped += 1;
            restarting = true;
        } else {
            waiting += 1;
        }
    }
    if terminated {
        // Stopped for good: what the containers' ends say.
        return if waiting == 0 && running == 0 && stopped == succeeded && stopped > 0 && pending_init == 0 {
            "Succeeded"
        } else {
            "Failed"
        };
    }
    let sidecars_run = init_containers(spec)
        .iter()
        .zip(init)
        .any(|(c, s)| is_sidecar(c) && s.state.as_ref().is_some_and(|s| s.running.is_some()));
    if waiting > 0 || (pending_init > 0 && stopped == 0 && running == 0) {
        "Pending"
    } else if running > 0 || restarting || (stopped > 0 && sidecars_run) {
        "Running"
    } else if stopped > 0 {
        if stopped == succeeded { "Succeeded" } else { "Failed" }
    } else {
        "Pending"
    }
}

/// A condition before its times are filled in.
struct Condition {
    kind: &'static str,
    truth: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Condition {
    fn new(kind: &'static str, truth: bool) -> Self {
        Self { kind, truth, reason: None, message: None }
    }

    fn because(kind: &'static str, truth: bool, reason: &'static str) -> Self {
        Self { reason: Some(reason), ..Self::new(kind, truth) }
    }
}

fn conditions(input: &Input<'_>, spec: &PodSpec, status: &PodStatus) -> Vec<PodCondition> {
    let old = input.old.conditions.as_deref().unwrap_or_default();
    let theirs = input.pod.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    let phase = status.phase.as_deref().unwrap_or_default();
    let networked = input.observed.latest_sandbox().is_some_and(|s| s.ready && (s.host_network || !s.ips.is_empty()));
    let containers_ready = containers_ready(spec, status, phase);
    let own = [
        Condition::new(PODS_NETWORK, networked),
        initialized(spec, status, phase),
        pod_ready(spec, theirs, &containers_ready),
        containers_ready,
        Condition::new("PodScheduled", true),
    ];
    let anew = may_begin_anew(spec).then(|| beginning_anew(input, spec, phase));
    let resize = input.resize.map(|r| Condition {
        kind: r.kind,
        truth: true,
        reason: r.reason,
        message: Some(r.message.clone()).filter(|m| !m.is_empty()),
    });
    let disrupted = input.ended.and_then(|ended| ended.disrupted.as_ref()).map(|message| Condition {
        message: Some(message.clone()),
        ..Condition::because("DisruptionTarget", true, "TerminationByKubelet")
    });
    let mut out: Vec<PodCondition> = Vec::with_capacity(own.len());
    for condition in own.into_iter().chain(anew).chain(resize).chain(disrupted) {
        let before = old.iter().find(|c| c.type_ == condition.kind);
        let truth = if condition.truth { "True" } else { "False" };
        let since = before.filter(|b| b.status == truth).and_then(|b| b.last_transition_time.clone());
        out.push(PodCondition {
            type_: condition.kind.to_owned(),
            status: truth.to_owned(),
            reason: condition.reason.map(str::to_owned),
            message: condition.message,
            last_transition_time: Some(since.unwrap_or_else(|| Time(to_second(input.now)))),
            last_probe_time: None,
            observed_generation: input.pod.metadata.generation,
        });
    }
    // Conditions of others (readiness gates, DisruptionTarget) stay as they are.
    let ours = |kind: &str| RESIZE_CONDITIONS.contains(&kind) || out.iter().any(|o| o.type_ == kind);
    let others: Vec<PodCondition> = theirs.iter().filter(|c| !ours(&c.type_)).cloned().collect();
    out.extend(others);
    out
}

fn initialized(spec: &PodSpec, status: &PodStatus, phase: &str) -> Condition {
    if phase == "Succeeded" {
        return Condition::because(INITIALIZED, true, "PodCompleted");
    }
    let statuses = status.init_container_statuses.as_deref().unwrap_or_default();
    // Once a container of the app has run, initialization is history.
    let begun = status.container_statuses.iter().flatten().any(|s| s.container_id.is_some());
    let incomplete: Vec<&str> = init_containers(spec)
        .iter()
        .zip(statuses)
        .filter(|(c, s)| if is_sidecar(c) { s.started != Some(true) && !begun } else { !s.ready && !begun })
        .map(|(c, _)| c.name.as_str())
        .collect();
    if incomplete.is_empty() {
        return Condition::new(INITIALIZED, true);
    }
    let message = format!("containers with incomplete status: [{}]", incomplete.join(" "));
    Condition { message: Some(message), ..Condition::because(INITIALIZED, false, "ContainersNotInitialized") }
}

fn containers_ready(spec: &PodSpec, status: &PodStatus, phase: &str) -> Condition {
    match phase {
        "Succeeded" => return Condition::because(CONTAINERS_READY, false, "PodCompleted"),
        "Failed" => return Condition::because(CONTAINERS_READY, false, "PodFailed"),
        _ => {}
    }
    let init = status.init_container_statuses.as_deref().unwrap_or_default();
    let sidecars = init_containers(spec).iter().zip(init).filter(|(c, _)| is_sidecar(c)).map(|(_, s)| s);
    let unready: Vec<&str> = sidecars
        .chain(status.container_statuses.iter().flatten())
        .filter(|s| !s.ready)
        .map(|s| s.name.as_str())
        .collect();
    if unready.is_empty() {
        return Condition::new(CONTAINERS_READY, true);
    }
    let message = format!("containers with unready status: [{}]", unready.join(" "));
    Condition { message: Some(message), ..Condition::because(CONTAINERS_READY, false, "ContainersNotReady") }
}

/// As `GenerateAllContainersRestartingCondition`.
fn beginning_anew(input: &Input<'_>, spec: &PodSpec, phase: &str) -> Condition {
    const KIND: &str = "AllContainersRestarting";
    match phase {
        "Succeeded" => Condition::because(KIND, false, "PodCompleted"),
        "Failed" => Condition::because(KIND, false, "PodFailed"),
        _ if begin_anew(spec, input.observed).is_empty() => Condition::new(KIND, false),
        _ => Condition {
            message: Some("container exited with restart policy rule".to_owned()),
            ..Condition::because(KIND, true, "RestartAllContainersStarted")
        },
    }
}

/// Ready: its containers are, and so are its readiness gates.
fn pod_ready(spec: &PodSpec, old: &[PodCondition], containers: &Condition) -> Condition {
    if !containers.truth {
        return Condition { kind: READY, truth: false, reason: containers.reason, message: containers.message.clone() };
    }
    let mut unmet = Vec::new();
    for gate in spec.readiness_gates.iter().flatten() {
        match old.iter().find(|c| c.type_ == gate.condition_type) {
            Some(c) if c.status == "True" => {}
            Some(c) => unmet.push(format!(
                "the status of pod readiness gate \"{}\" is not \"True\", but {}",
                gate.condition_type, c.status
            )),
            None => unmet.push(format!(
                "corresponding condition of pod readiness gate \"{}\" does not exist.",
                gate.condition_type
            )),
        }
    }
    if unmet.is_empty() {
        return Condition::new(READY, true);
    }
    Condition { message: Some(unmet.join(", ")), ..Condition::because(READY, false, "ReadinessGatesNotReady") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::observed::{Sandbox, State};
    use serde_json::json;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(
            json!({"metadata": {"name": "p", "namespace": "n", "uid": "u", "generation": 3}, "spec": spec}),
        )
        .unwrap()
    }

    fn seen(name: &str, state: State, exit_code: i32) -> ObservedContainer {
        ObservedContainer {
            id: format!("id-{name}"),
            name: name.into(),
            sandbox_id: "s".into(),
            state,
            exit_code,
            started_at: 1_000_000_000,
            finished_at: if state == State::Exited { 2_000_000_000 } else { 0 },
            ..Default::default()
        }
    }

    fn world(containers: Vec<ObservedContainer>) -> ObservedPod {
        let sandbox = Sandbox { id: "s".into(), ready: true, ips: vec!["10.0.0.9".into()], ..Default::default() };
        ObservedPod { uid: "u".into(), sandboxes: vec![sandbox], containers, ..Default::default() }
    }

    struct Case<'a> {
        waiting: BTreeMap<String, Waiting>,
        old: PodStatus,
        ready: bool,
        terminated: bool,
        ended: Option<&'a Ended>,
    }

    impl Default for Case<'_> {
        fn default() -> Self {
            Self { waiting: BTreeMap::new(), old: PodStatus::default(), ready: true, terminated: false, ended: None }
        }
    }

    fn make(spec: serde_json::Value, observed: &ObservedPod, case: Case<'_>) -> PodStatus {
        generate(&Input {
            pod: &pod(spec),
            old: &case.old,
            observed,
            waiting: &case.waiting,
            probes: &|_| ProbeView { started: true, ready: case.ready },
            host_ips: &["192.168.0.1".to_owned()],
            runtime_name: "containerd",
            resources: &|_| None,
            devices: &|_| Vec::new(),
            resize: None,
            ended: case.ended,
            terminated: case.terminated,
            now: Timestamp::from_second(100).unwrap(),
        })
    }

    fn condition<'a>(status: &'a PodStatus, kind: &str) -> &'a PodCondition {
        status.conditions.as_ref().unwrap().iter().find(|c| c.type_ == kind).unwrap()
    }

    #[test]
    fn phases() {
        use State::{Exited, Running};
        let two = |policy: &str| json!({"restartPolicy": policy, "containers": [{"name": "a"}, {"name": "b"}]});
        let init = |policy: &str| json!({"restartPolicy": policy, "initContainers": [{"name": "i"}], "containers": [{"name": "a"}]});
        let cases = vec![
            ("nothing yet", two("Always"), vec![], false, "Pending"),
            ("one up", two("Always"), vec![seen("a", Running, 0)], false, "Pending"),
            ("both up", two("Always"), vec![seen("a", Running, 0), seen("b", Running, 0)], false, "Running"),
            ("one over, one up", two("Never"), vec![seen("a", Exited, 1), seen("b", Running, 0)], false, "Running"),
            ("crashing", two("Always"), vec![seen("a", Exited, 1), seen("b", Exited, 0)], false, "Running"),
            ("failed, Never", two("Never"), vec![seen("a", Exited, 1), seen("b", Exited, 0)], false, "Failed"),
            ("well, Never", two("Never"), vec![seen("a", Exited, 0), seen("b", Exited, 0)], false, "Succeeded"),
            ("well, OnFailure", two("OnFailure"), vec![seen("a", Exited, 0), seen("b", Exited, 0)], false, "Succeeded"),
            ("failed, OnFailure", two("OnFailure"), vec![seen("a", Exited, 1), seen("b", Exited, 0)], false, "Running"),
            ("initializing", init("Always"), vec![seen("i", Running, 0)], false, "Pending"),
            ("init failed, Never", init("Never"), vec![seen("i", Exited, 1)], false, "Failed"),
            ("init failed, Always", init("Always"), vec![seen("i", Exited, 1)], false, "Pending"),
            ("killed for good", two("Always"), vec![seen("a", Exited, 137), seen("b", Exited, 0)], true, "Failed"),
            ("ended well for good", two("Always"), vec![seen("a", Exited, 0), seen("b", Exited, 0)], true, "Succeeded"),
            ("never started, over", two("Always"), vec![], true, "Failed"),
        ];
        for (name, spec, containers, terminated, want) in cases {
            let got = make(spec, &world(containers), Case { terminated, ..Default::default() });
            assert_eq!(got.phase.as_deref(), Some(want), "{name}");
        }
    }

    #[test]
    fn a_running_pod_is_ready_with_its_addresses() {
        let got =
            make(json!({"containers": [{"name": "a"}]}), &world(vec![seen("a", State::Running, 0)]), Case::default());
        for kind in ["PodScheduled", "PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready"] {
            assert_eq!(condition(&got, kind).status, "True", "{kind}");
        }
        assert_eq!((got.pod_ip.as_deref(), got.host_ip.as_deref()), (Some("10.0.0.9"), Some("192.168.0.1")));
        assert_eq!(got.observed_generation, Some(3));
        let container = &got.container_statuses.unwrap()[0];
        assert!(container.ready && container.started == Some(true));
        assert_eq!(container.container_id.as_deref(), Some("containerd://id-a"));
    }

    #[test]
    fn an_unready_container_is_named() {
        let case = Case { ready: false, ..Default::default() };
        let got = make(json!({"containers": [{"name": "a"}]}), &world(vec![seen("a", State::Running, 0)]), case);
        let ready = condition(&got, "Ready");
        assert_eq!((ready.status.as_str(), ready.reason.as_deref()), ("False", Some("ContainersNotReady")));
        assert_eq!(ready.message.as_deref(), Some("containers with unready status: [a]"));
    }

    #[test]
    fn a_crash_loop_waits_and_remembers_the_crash() {
        let waiting = [("a".to_owned(), Waiting { reason: "CrashLoopBackOff".into(), message: "back-off 10s".into() })];
        let case = Case { waiting: waiting.into(), ..Default::default() };
        let got = make(json!({"containers": [{"name": "a"}]}), &world(vec![seen("a", State::Exited, 7)]), case);
        assert_eq!(got.phase.as_deref(), Some("Running"));
        let status = &got.container_statuses.unwrap()[0];
        assert_eq!(
            status.state.as_ref().unwrap().waiting.as_ref().unwrap().reason.as_deref(),
            Some("CrashLoopBackOff")
        );
        assert_eq!(status.last_state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code, 7);
    }

    #[test]
    fn transition_times_stay_while_nothing_changes() {
        let spec = json!({"containers": [{"name": "a"}]});
        let first = make(spec.clone(), &world(vec![seen("a", State::Running, 0)]), Case::default());
        let mut aged = first.clone();
        for condition in aged.conditions.as_mut().unwrap() {
            condition.last_transition_time = Some(Time(Timestamp::from_second(5).unwrap()));
        }
        let case = Case { old: aged, ready: false, ..Default::default() };
        let second = make(spec, &world(vec![seen("a", State::Running, 0)]), case);
        let at = |s: &PodStatus, kind| condition(s, kind).last_transition_time.clone().unwrap().0.as_second();
        assert_eq!((at(&second, "Initialized"), at(&second, "Ready")), (5, 100));
    }

    #[test]
    fn conditions_of_others_are_kept_and_gates_wait_for_them() {
        let gated = |status: serde_json::Value| {
            let mut pod = pod(json!({"readinessGates": [{"conditionType": "x/y"}], "containers": [{"name": "a"}]}));
            pod.status = serde_json::from_value(json!({"conditions": status})).unwrap();
            generate(&Input {
                pod: &pod,
                old: &PodStatus::default(),
                observed: &world(vec![seen("a", State::Running, 0)]),
                waiting: &BTreeMap::new(),
                probes: &|_| ProbeView { started: true, ready: true },
                host_ips: &[],
                runtime_name: "containerd",
                resources: &|_| None,
                devices: &|_| Vec::new(),
                resize: None,
                ended: None,
                terminated: false,
                now: Timestamp::from_second(100).unwrap(),
            })
        };
        let without = gated(json!([]));
        assert_eq!(condition(&without, "Ready").reason.as_deref(), Some("ReadinessGatesNotReady"));
        assert_eq!(condition(&without, "ContainersReady").status, "True");
        let with = gated(json!([{"type": "x/y", "status": "True"}, {"type": "PodResizePending", "status": "True"}]));
        assert_eq!(condition(&with, "Ready").status, "True");
        assert_eq!(condition(&with, "x/y").status, "True");
        assert!(with.conditions.unwrap().iter().all(|c| c.type_ != "PodResizePending"));
    }

    #[test]
    fn of_a_rejected_pod_there_is_only_the_reason() {
        let spec = json!({"containers": [{"name": "a"}]});
        let ended = Ended::new("OutOfcpu", "Node didn't have enough resource: cpu").as_rejection();
        let got =
            make(spec.clone(), &world(vec![]), Case { ended: Some(&ended), terminated: true, ..Default::default() });
        assert_eq!((got.phase.as_deref(), got.reason.as_deref()), (Some("Failed"), Some("OutOfcpu")));
        assert_eq!(got.message.as_deref(), Some("Pod was rejected: Node didn't have enough resource: cpu"));
        assert_eq!((&got.container_statuses, &got.conditions), (&None, &None));
        assert!(got.start_time.is_some());
        // A kubelet that was started anew finds it so.
        let again =
            make(spec, &ObservedPod::default(), Case { old: got.clone(), terminated: true, ..Default::default() });
        assert_eq!(again, got);
    }

    #[test]
    fn containers_that_never_ran_have_ended_with_their_pod() {
        let ended = Ended::evicted("The node was low on resource: memory.");
        let case = || Case { ended: Some(&ended), terminated: true, ..Default::default() };
        let code = |statuses: &Option<Vec<ContainerStatus>>| -> Vec<Option<i32>> {
            let state = |s: &ContainerStatus| s.state.clone().unwrap().terminated.map(|t| t.exit_code);
            statuses.iter().flatten().map(state).collect()
        };
        let plain = make(
            json!({"containers": [{"name": "a"}, {"name": "b"}]}),
            &world(vec![seen("a", State::Exited, 3)]),
            case(),
        );
        assert_eq!(code(&plain.container_statuses), [Some(3), Some(137)]);
        let reason = plain.container_statuses.unwrap()[1].state.clone().unwrap().terminated.unwrap().reason;
        assert_eq!(reason.as_deref(), Some("ContainerStatusUnknown"));
        // Not those whose turn had not come.
        let spec = json!({"initContainers": [{"name": "i"}, {"name": "j"}], "containers": [{"name": "a"}]});
        let early = make(spec, &world(vec![]), case());
        assert_eq!(
            (code(&early.init_container_statuses), code(&early.container_statuses)),
            (vec![Some(137), None], vec![None])
        );
    }

    #[test]
    fn a_final_phase_and_its_reason_stay() {
        let ended = Ended::evicted("The node was low on resource: memory.");
        let spec = json!({"containers": [{"name": "a"}]});
        let got = make(spec.clone(), &world(vec![]), Case { ended: Some(&ended), ..Default::default() });
        assert_eq!((got.phase.as_deref(), got.reason.as_deref()), (Some("Failed"), Some("Evicted")));
        assert_eq!(condition(&got, "DisruptionTarget").reason.as_deref(), Some("TerminationByKubelet"));
        let again = make(spec, &world(vec![seen("a", State::Running, 0)]), Case { old: got, ..Default::default() });
        assert_eq!((again.phase.as_deref(), again.reason.as_deref()), (Some("Failed"), Some("Evicted")));
    }
}
