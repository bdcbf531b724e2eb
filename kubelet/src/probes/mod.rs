//! Probes of one pod's containers: a task per probe of a running container, results by container ID. A result that
//! changes wakes the pod's worker.

pub mod check;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use component_base::events::Type;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ObjectReference, Pod, PodStatus, Probe};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info};

use crate::events::Events;
use crate::plan::Health;
use crate::runtime::cri::Cri;
use crate::runtime::observed::{ObservedContainer, ObservedPod, State};
use crate::runtime::pods::{init_containers, is_sidecar};
use crate::status::containers::ProbeView;
use check::Outcome;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Startup,
    Liveness,
    Readiness,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Startup => "Startup",
            Kind::Liveness => "Liveness",
            Kind::Readiness => "Readiness",
        }
    }

    fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            Kind::Startup => container.startup_probe.as_ref(),
            Kind::Liveness => container.liveness_probe.as_ref(),
            Kind::Readiness => container.readiness_probe.as_ref(),
        }
    }
}

type Results = Arc<Mutex<HashMap<(String, Kind), bool>>>;

/// How often probes came out how: by type, result, and whose they are.
static COUNTS: Mutex<BTreeMap<ProbeLabels, u64>> = Mutex::new(BTreeMap::new());
/// Probes that are counted at most.
const MAX_COUNTS: usize = 8192;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct ProbeLabels {
    pod_uid: String,
    container: String,
    kind: &'static str,
    result: &'static str,
    namespace: String,
    pod: String,
}

/// The samples of `prober_probe_total`.
pub fn counts() -> Vec<(String, String)> {
    let line = |(l, count): (&ProbeLabels, &u64)| {
        let labels = format!(
            "{{container={:?},namespace={:?},pod={:?},pod_uid={:?},probe_type={:?},result={:?}}}",
            l.container, l.namespace, l.pod, l.pod_uid, l.kind, l.result
        );
        (labels, count.to_string())
    };
    COUNTS.lock().iter().map(line).collect()
}

/// Forgets the counts of a pod that is gone.
pub fn forget_pod(uid: &str) {
    COUNTS.lock().retain(|labels, _| labels.pod_uid != uid);
}

/// What a probe needs besides its pod.
pub struct Means {
    pub cri: Cri,
    pub events: Arc<Events>,
    /// Where pods in the host's network are reached.
    pub host_ip: String,
}

/// The probes of one pod.
pub struct PodProbes {
    means: Arc<Means>,
    results: Results,
    tasks: HashMap<(String, Kind), AbortOnDropHandle<()>>,
    /// Of containers that have a probe of the kind; a container without one is started and ready by running.
    probed: HashSet<(String, Kind)>,
    wake: Arc<Notify>,
}

impl PodProbes {
    pub fn new(means: Arc<Means>, wake: Arc<Notify>) -> Self {
        Self { means, results: Results::default(), tasks: HashMap::new(), probed: HashSet::new(), wake }
    }

    /// Starts probes of containers that have begun to run, ends those of containers that are gone. What was reported of a
    /// container before the kubelet came (`old`) is the starting point: a kubelet restart makes no pod unready.
    pub fn reconcile(&mut self, pod: &Arc<Pod>, observed: &ObservedPod, old: &PodStatus) {
        let Some(spec) = pod.spec.as_ref() else { return };
        let mut alive: HashSet<(String, Kind)> = HashSet::new();
        let sidecars = init_containers(spec).iter().filter(|c| is_sidecar(c));
        for container in spec.containers.iter().chain(sidecars) {
            let Some(seen) = observed.latest(&container.name).filter(|c| c.state == State::Running) else { continue };
            for kind in [Kind::Startup, Kind::Liveness, Kind::Readiness] {
                let Some(probe) = kind.of(container) else { continue };
                let key = (seen.id.clone(), kind);
                alive.insert(key.clone());
                if self.probed.insert(key.clone()) {
                    self.seed(&key, seen, old);
                }
                let waits = kind != Kind::Startup && !self.startup_done(seen);
                let done = kind == Kind::Startup && self.startup_done(seen);
                let gave_up = kind != Kind::Readiness && self.result(&seen.id, kind) == Some(false);
                if !self.tasks.contains_key(&key) && !waits && !done && !gave_up {
                    let task = ProbeTask {
                        means: self.means.clone(),
                        object: Events::object(pod, Some(&container.name)),
                        pod_ip: pod_ip(pod, observed, &self.means.host_ip),
                        container: Container {
                            name: container.name.clone(),
                            ports: container.ports.clone(),
                            ..Default::default()
                        },
                        probe: probe.clone(),
                        id: seen.id.clone(),
                        started_at: seen.started_at,
                        kind,
                        results: self.results.clone(),
                        wake: self.wake.clone(),
                    };
                    self.tasks.insert(key, AbortOnDropHandle::new(tokio::spawn(task.run())));
                }
            }
        }
        self.tasks.retain(|key, _| alive.contains(key));
        self.probed.retain(|key| alive.contains(key));
        self.results.lock().retain(|key, _| alive.contains(key));
    }

    /// Ends all probes: the pod is being stopped. Readiness keeps its last word.
    pub fn stop_killing_probes(&mut self) {
        self.tasks.retain(|(_, kind), _| *kind == Kind::Readiness);
    }

    fn seed(&self, key: &(String, Kind), seen: &ObservedContainer, old: &PodStatus) {
        let before = old
            .container_statuses
            .iter()
            .chain(&old.init_container_statuses)
            .flatten()
            .find(|s| s.container_id.as_deref().is_some_and(|id| id.ends_with(&format!("://{}", seen.id))));
        let Some(before) = before else { return };
        let result = match key.1 {
            Kind::Startup => before.started.filter(|s| *s),
            Kind::Readiness => Some(before.ready),
            Kind::Liveness => None,
        };
        if let Some(result) = result {
            self.results.lock().insert(key.clone(), result);
        }
    }

    fn result(&self, id: &str, kind: Kind) -> Option<bool> {
        self.results.lock().get(&(id.to_owned(), kind)).copied()
    }

    fn startup_done(&self, seen: &ObservedContainer) -> bool {
        !self.probed.contains(&(seen.id.clone(), Kind::Startup)) || self.result(&seen.id, Kind::Startup) == Some(true)
    }

    /// For the plan.
    pub fn health(&self, seen: &ObservedContainer) -> Health {
        Health {
            startup_failed: self.result(&seen.id, Kind::Startup) == Some(false),
            liveness_failed: self.result(&seen.id, Kind::Liveness) == Some(false),
            started: self.startup_done(seen),
        }
    }

    /// For the status.
    pub fn view(&self, seen: &ObservedContainer) -> ProbeView {
        let started = self.startup_done(seen);
        let has_readiness = self.probed.contains(&(seen.id.clone(), Kind::Readiness));
        let ready = !has_readiness || self.result(&seen.id, Kind::Readiness) == Some(true);
        ProbeView { started, ready: started && ready }
    }
}

/// Where a pod's containers are reached.
pub fn pod_ip(pod: &Pod, observed: &ObservedPod, host_ip: &str) -> String {
    if crate::runtime::pods::host_network(pod) {
        return host_ip.to_owned();
    }
    observed.latest_sandbox().and_then(|s| s.ips.first().cloned()).unwrap_or_default()
}

/// A probe under way. It lives as long as its container: of that, and of the pod, it keeps what it needs.
struct ProbeTask {
    means: Arc<Means>,
    /// The container, for events.
    object: ObjectReference,
    pod_ip: String,
    /// Its name and ports.
    container: Container,
    probe: Probe,
    id: String,
    started_at: i64,
    kind: Kind,
    results: Results,
    wake: Arc<Notify>,
}

fn seconds(value: Option<i32>, default: u32) -> Duration {
    Duration::from_secs(u64::from(value.and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default)))
}

impl ProbeTask {
    async fn run(self) {
        let period = seconds(self.probe.period_seconds, 10);
        let needed = |threshold: Option<i32>, default| u32::try_from(threshold.unwrap_or(default)).unwrap_or(1).max(1);
        let successes_needed = needed(self.probe.success_threshold, 1);
        let failures_needed = needed(self.probe.failure_threshold, 3);
        tokio::time::sleep(self.first_wait()).await;
        let (mut successes, mut failures) = (0, 0);
        loop {
            // What a check needs is there while it runs, not between checks.
            let checked = Box::pin(self.check()).await;
            match checked {
                // Nothing was found out: it counts for nothing.
                Err(error) => {
                    let kind = self.kind.name();
                    self.tell("Unhealthy", format!("{kind} probe errored and resulted in unknown state: {error}"));
                }
                Ok(Outcome::Failure(output)) => {
                    (successes, failures) = (0, failures + 1);
                    self.count(false);
                    self.tell("Unhealthy", format!("{} probe failed: {output}", self.kind.name()));
                    if failures == failures_needed {
                        self.set(false);
                        if self.kind != Kind::Readiness {
                            // The container will be killed: its successor is probed anew.
                            return;
                        }
                    }
                }
                Ok(fine) => {
                    (successes, failures) = (successes + 1, 0);
                    self.count(true);
                    if let Outcome::Warning(output) = fine {
                        self.tell("ProbeWarning", format!("{} probe warning: {output}", self.kind.name()));
                    }
                    if successes == successes_needed && self.set(true) && self.kind == Kind::Startup {
                        return;
                    }
                }
            }
            tokio::time::sleep(period).await;
        }
    }

    fn tell(&self, reason: &str, message: String) {
        debug!(pod = self.object.name, container = %self.container.name, message, "probe");
        self.means.events.about(&self.object, Type::Warning, reason, message);
    }

    fn count(&self, fine: bool) {
        let pod = &self.object;
        let labels = ProbeLabels {
            pod_uid: pod.uid.clone().unwrap_or_default(),
            container: self.container.name.clone(),
            kind: self.kind.name(),
            result: if fine { "successful" } else { "failed" },
            namespace: pod.namespace.clone().unwrap_or_default(),
            pod: pod.name.clone().unwrap_or_default(),
        };
        let mut counts = COUNTS.lock();
        if counts.len() < MAX_COUNTS || counts.contains_key(&labels) {
            *counts.entry(labels).or_default() += 1;
        }
    }

    /// What is left of the initial delay.
    fn first_wait(&self) -> Duration {
        let delay =
            Duration::from_secs(self.probe.initial_delay_seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or(0));
        let now = i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX);
        let ran = Duration::from_nanos(u64::try_from(now.saturating_sub(self.started_at)).unwrap_or(0));
        delay.saturating_sub(ran)
    }

    /// Notes a result; true (it is now so).
    fn set(&self, healthy: bool) -> bool {
        let before = self.results.lock().insert((self.id.clone(), self.kind), healthy);
        if before != Some(healthy) {
            info!(pod = self.object.name, container = %self.container.name, probe = self.kind.name(), healthy, "probe");
            self.wake.notify_one();
        }
        true
    }

    /// Checks, a few times if that goes wrong. As `runProbeWithRetries`.
    async fn check(&self) -> check::Checked {
        const ATTEMPTS: usize = 3;
        let mut checked = self.check_once().await;
        for _ in 1..ATTEMPTS {
            if checked.is_ok() {
                break;
            }
            checked = self.check_once().await;
        }
        checked
    }

    async fn check_once(&self) -> check::Checked {
        let timeout = seconds(self.probe.timeout_seconds, 1);
        let probe = &self.probe;
        if let Some(action) = &probe.exec {
            check::exec(&self.means.cri, &self.id, action, timeout).await
        } else if let Some(action) = &probe.http_get {
            check::http(action, &self.container, &self.pod_ip, timeout).await
        } else if let Some(action) = &probe.tcp_socket {
            check::tcp(action, &self.container, &self.pod_ip, timeout).await
        } else if let Some(action) = &probe.grpc {
            check::grpc(action, &self.pod_ip, timeout).await
        } else {
            Err(format!("missing probe handler for container {}", self.container.name))
        }
    }
}
