//! The task of one pod.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use component_base::backoff::Backoff;
use component_base::events::Type;
use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, PodSpec, PodStatus};
use tokio::sync::{Notify, watch};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use super::admission::Lack;
use super::resize::Resizes;
use super::{Desired, Means, PodWorkers, admission, kill, preemption, start};
use crate::eviction::is_critical;
use crate::metrics::{managers, metrics};
use crate::plan::{self, Actions, KillReason, RestartBackoff, SandboxAction};
use crate::probes::PodProbes;
use crate::runtime::cri::CriError;
use crate::runtime::labels::container_hash;
use crate::runtime::logs;
use crate::runtime::observed::{ObservedPod, State};
use crate::runtime::pods::{find_container, full_name, grace_seconds, host_network, uid_of};
use crate::runtime::resources;
use crate::static_pods;
use crate::status::containers::Waiting;
use crate::status::{self, Ended};
use crate::volumes::MountSource;

const PREDECESSOR_POLL: Duration = Duration::from_millis(100);
/// Steps taken in one go before the worker looks up again.
const MAX_STEPS: usize = 32;
/// How often a resize that had no room, or failed, is tried again.
const RESIZE_RETRY: Duration = Duration::from_secs(10);
const RETRY_BASE: Duration = Duration::from_secs(1);
const RETRY_CAP: Duration = Duration::from_secs(16);
/// How long a pod that gives way is waited for at least. As `killPodNow`.
const MIN_PATIENCE: Duration = Duration::from_secs(10);
/// From one sandbox to the next, whatever the runtime says of the first.
const SANDBOX_PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Worker {
    pool: Arc<PodWorkers>,
    means: Arc<Means>,
    uid: String,
    desired: watch::Receiver<Desired>,
    wake: Arc<Notify>,
    probes: PodProbes,
    backoff: RestartBackoff,
    retry: Backoff,
    /// What there is, where a step that was just taken knows: nobody need be asked.
    seen: Option<ObservedPod>,
    /// When the last sandbox was made.
    sandbox_made: Option<Instant>,
    resizes: Resizes,
    waiting: BTreeMap<String, Waiting>,
    /// Containers (by name and hash) that could not be started, and when that is tried again.
    start_again: BTreeMap<(String, u64), Instant>,
    /// Over for a reason of the node's.
    ended: Option<Ended>,
    /// When it was first seen, until it runs.
    awaited_since: Option<Instant>,
    /// When it was first looked at, and how long it had been active then.
    active: Option<(Instant, Duration)>,
    /// Nothing of it will run any more (its containers came to their ends, or it is ended).
    over: bool,
    /// All of it is stopped, for good.
    terminated: bool,
    /// What it had on this node is taken down.
    down: bool,
    admitted: bool,
    sources: Option<BTreeMap<String, MountSource>>,
    mounted_at: Option<Instant>,
    /// Labels and annotations that the volumes may show.
    mounted_as: Option<[Option<BTreeMap<String, String>>; 2]>,
    /// When volumes that were not ready are tried again.
    mount_again: Option<Instant>,
}

/// How a sync came out.
enum Synced {
    /// Look again after this at the latest.
    Wait(Duration),
    /// The pod is over.
    Over,
}

fn now_nanos() -> i64 {
    i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

/// Whether the pod is to end.
fn must_end(desired: &Desired) -> bool {
    desired.removed || desired.ended.is_some() || desired.pod.metadata.deletion_timestamp.is_some()
}

impl Worker {
    pub(super) fn new(
        pool: Arc<PodWorkers>,
        uid: String,
        desired: watch::Receiver<Desired>,
        wake: Arc<Notify>,
    ) -> Self {
        let means = pool.means.clone();
        Self {
            probes: PodProbes::new(means.probes.clone(), wake.clone()),
            backoff: RestartBackoff::new(means.max_restart_delay),
            retry: Backoff::new(RETRY_BASE, RETRY_CAP),
            seen: means.watch.has_nothing_of(&uid).then(|| ObservedPod { uid: uid.clone(), ..Default::default() }),
            sandbox_made: None,
            resizes: Resizes::default(),
            waiting: BTreeMap::new(),
            start_again: BTreeMap::new(),
            ended: None,
            awaited_since: Some(Instant::now()),
            active: None,
            over: false,
            terminated: false,
            down: false,
            admitted: false,
            sources: None,
            mounted_at: None,
            mounted_as: None,
            mount_again: None,
            pool,
            means,
            uid,
            desired,
            wake,
        }
    }

    /// Runs until the pod is gone from its source and from this node. What its steps need is there while they are taken: most
    /// of the time a worker waits.
    pub(super) async fn run(mut self) {
        self.wait_for_predecessor().await;
        loop {
            let desired = self.desired.borrow_and_update().clone();
            if self.ended.is_none() {
                self.ended.clone_from(&desired.ended);
            }
            self.over |= apimachinery::pod::is_terminal(&desired.pod);
            let mut listens = true;
            let begun = Instant::now();
            let wait = if desired.removed {
                match Box::pin(self.take_down(&desired)).await {
                    Ok(()) => {
                        metrics().worked("terminated", begun.elapsed());
                        info!(pod = %full_name(&desired.pod), uid = %self.uid, "pod is gone");
                        return;
                    }
                    Err(error) => {
                        warn!(pod = %full_name(&desired.pod), uid = %self.uid, %error, "pod not taken down yet");
                        self.retry.next_wait()
                    }
                }
            } else if self.over || must_end(&desired) {
                let ended = Box::pin(self.terminate(&desired)).await;
                metrics().worked("terminating", begun.elapsed());
                // What the runtime still has to say of it changes nothing.
                listens = ended.is_some();
                ended.unwrap_or(self.means.sync_frequency)
            } else {
                let mut changes = self.desired.clone();
                let synced = tokio::select! {
                    // What is being done for a pod that is to end is dropped: pulls, hooks, waits.
                    () = becomes_ending(&mut changes) => continue,
                    synced = Box::pin(self.sync(&desired.pod)) => synced,
                };
                metrics().worked("sync", begun.elapsed());
                match synced {
                    Synced::Wait(wait) => wait,
                    Synced::Over => {
                        self.over = true;
                        continue;
                    }
                }
            };
            tokio::select! {
                changed = self.desired.changed() => if changed.is_err() { return },
                () = self.wake.notified(), if listens => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// A changed manifest is another pod of the same name: it waits until the former one has ended.
    async fn wait_for_predecessor(&self) {
        let pod = self.desired.borrow().pod.clone();
        if !static_pods::is_static(&pod) {
            return;
        }
        while self.pool.has_ending_namesake(&pod) && !self.desired.borrow().removed {
            tokio::time::sleep(PREDECESSOR_POLL).await;
        }
    }

    async fn observe(&self) -> Result<ObservedPod, CriError> {
        self.means.runtime.observe(&self.uid).await
    }

    fn report(&self, pod: &Arc<Pod>, observed: &ObservedPod) -> PodStatus {
        let old = self.means.statuses.get(pod);
        let status = status::generate(&status::Input {
            pod,
            old: &old,
            observed,
            waiting: &self.waiting,
            probes: &|container| self.probes.view(container),
            host_ips: &self.means.host_ips,
            runtime_name: &self.means.runtime_name,
            // Told only when nothing runs any more: a final phase is a promise.
            ended: self.ended.as_ref().filter(|ended| self.terminated || ended.rejected),
            resources: &|container| self.resizes.of(container).cloned(),
            resize: self.resizes.state.as_ref(),
            devices: &|container| {
                let mut devices = self.means.allocator.health_of(&self.uid, &container.name);
                devices.extend(self.means.dra.health_of(pod, container));
                devices
            },
            terminated: self.terminated,
            now: Timestamp::now(),
        });
        self.means.statuses.set(pod, status.clone());
        status
    }

    /// Steps until there is nothing to do now. What a step needs is apart (in a box) and there while it is taken: many pods may
    /// be here at once, most of them waiting for their turn.
    async fn sync(&mut self, pod: &Arc<Pod>) -> Synced {
        // From the sandbox until all is started that can be.
        let mut turn = None;
        for _ in 0..MAX_STEPS {
            let observed = match self.seen.take() {
                Some(seen) => Ok(seen),
                None => self.observe().await,
            };
            let observed = match observed {
                Ok(observed) => observed,
                Err(error) => {
                    debug!(pod = %full_name(pod), %error, "cannot look at the pod");
                    return Synced::Wait(self.retry.next_wait());
                }
            };
            let old = self.means.statuses.get(pod);
            self.probes.reconcile(pod, &observed, &old);
            self.resizes.adopt(pod, &observed, &old);
            self.waiting.retain(|name, _| observed.latest(name).is_none_or(|c| c.state != State::Running));
            if !self.admitted {
                if let Err(rejected) = Box::pin(self.admit(pod, &observed)).await {
                    warn!(pod = %full_name(pod), reason = %rejected.reason, "pod rejected");
                    managers().rejected(&rejected.reason);
                    let message = rejected.message.clone();
                    self.means.events.pod(pod, None, Type::Warning, &rejected.reason, message);
                    self.ended = Some(rejected.as_rejection());
                    return Synced::Over;
                }
                self.admitted = true;
            }
            let actions = plan::plan(&plan::Input {
                pod,
                observed: &observed,
                health: &|container| self.probes.health(container),
                backoff: &self.backoff,
                now: now_nanos(),
            });
            self.note_held_back(pod, &actions);
            let status = self.report(pod, &observed);
            if status.phase.as_deref() == Some("Running")
                && let Some(since) = self.awaited_since.take().filter(|_| self.sandbox_made.is_some())
            {
                metrics().pod_runs(since.elapsed());
            }
            if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) || actions.sandbox == SandboxAction::Stop
            {
                return Synced::Over;
            }
            let deadline = active_deadline(pod, &status, &mut self.active);
            if deadline == Some(Duration::ZERO) {
                let message = "Pod was active on the node longer than the specified deadline".to_owned();
                self.means.events.pod(pod, None, Type::Normal, "DeadlineExceeded", message.clone());
                self.ended = Some(Ended::new("DeadlineExceeded", message));
                return Synced::Over;
            }
            if actions.is_idle() {
                let pool = self.pool.clone();
                let means = self.means.clone();
                if Box::pin(self.resizes.apply(&pool, &means, pod, &observed)).await {
                    continue;
                }
                self.report(pod, &observed);
                return Box::pin(self.idle(pod, &observed, &actions, deadline)).await;
            }
            if let Err(wait) = Box::pin(self.carry_out(pod, &observed, actions, &mut turn)).await {
                // What went wrong is told before the next attempt.
                if let Ok(observed) = self.observe().await {
                    self.report(pod, &observed);
                }
                return Synced::Wait(wait);
            }
        }
        Synced::Wait(RETRY_BASE)
    }

    async fn admit(&self, pod: &Arc<Pod>, observed: &ObservedPod) -> Result<(), Ended> {
        // What already runs was admitted before.
        if !observed.is_gone() {
            return Ok(());
        }
        self.fits(pod).await?;
        self.means.allocator.admit(pod).await
    }

    async fn fits(&self, pod: &Arc<Pod>) -> Result<(), Ended> {
        self.means.going_down.admit()?;
        self.means.shortage.admit(pod)?;
        let node = self.means.node.as_ref().and_then(|nodes| nodes.get("", &self.means.node_name));
        let (others, allocatable) = (self.pool.pods_before(pod), &self.means.allocatable);
        let mut suited = admission::suits(pod, &others, allocatable, node.as_deref());
        if let (Err(refused), Some(client)) = (&suited, &self.means.client)
            && refused.reason == "NodeAffinity"
            // The label that brought the pod here may be newer than our copy of the node.
            && let Ok(node) = kube::Api::<Node>::all(client.clone()).get(&self.means.node_name).await
        {
            suited = admission::suits(pod, &others, allocatable, Some(&node));
        }
        match admission::lacking(pod, &others, allocatable) {
            lacking if lacking.is_empty() => suited,
            lacking if is_critical(pod) => {
                suited?;
                Box::pin(self.make_room(pod, &others, &lacking)).await
            }
            lacking => Err(admission::refusal(&lacking, suited)),
        }
    }

    /// Ends pods so that a critical one has what it lacks.
    async fn make_room(&self, pod: &Arc<Pod>, others: &[Arc<Pod>], lacking: &[Lack]) -> Result<(), Ended> {
        let victims = preemption::victims(pod, others, lacking).map_err(|why| {
            let message = "Unexpected error while attempting to recover from admission failure: preemption: error finding a set of pods to preempt";
            Ended::new("UnexpectedAdmissionError", format!("{message}: {why}"))
        })?;
        for victim in &victims {
            warn!(pod = %full_name(victim), critical = %full_name(pod), "pod is preempted");
            self.means.events.pod(victim, None, Type::Warning, preemption::REASON, preemption::MESSAGE);
            let ended = Ended {
                disrupted: Some(preemption::CONDITION_MESSAGE.to_owned()),
                ..Ended::new(preemption::REASON, preemption::MESSAGE)
            };
            self.pool.end(uid_of(victim), ended, None);
            metrics().preempted(lacking.first().map_or("", |lack| lack.resource.as_str()));
        }
        let stops = victims.iter().map(|victim| {
            let seconds = u64::try_from(grace_seconds(victim)).unwrap_or(0);
            self.pool.stops_within(uid_of(victim), MIN_PATIENCE.max(Duration::from_secs(seconds + seconds / 2)))
        });
        join_all(stops).await;
        Ok(())
    }

    /// Everything is as it should be: refresh what ages, and say when to look again.
    async fn idle(
        &mut self,
        pod: &Arc<Pod>,
        observed: &ObservedPod,
        actions: &Actions,
        deadline: Option<Duration>,
    ) -> Synced {
        let mut wait = self.means.sync_frequency;
        let told =
            |[labels, annotations]: &[_; 2]| *labels == pod.metadata.labels && *annotations == pod.metadata.annotations;
        let stale = self.mounted_at.is_none_or(|at| at.elapsed() >= self.means.sync_frequency);
        if stale || !self.mounted_as.as_ref().is_some_and(told) {
            if let Err(pause) = Box::pin(self.mount(pod, observed)).await {
                wait = wait.min(pause);
            }
            Box::pin(kill::remove_old_attempts(&self.means, observed)).await;
        }
        if self.waiting.is_empty() {
            self.retry.reset();
        }
        if self.resizes.state.is_some() {
            wait = wait.min(RESIZE_RETRY);
        }
        if let Some(until) = actions.wake_at() {
            let left = u64::try_from(until.saturating_sub(now_nanos())).unwrap_or(0);
            wait = wait.min(Duration::from_nanos(left));
        }
        Synced::Wait(deadline.map_or(wait, |d| wait.min(d)))
    }

    fn note_held_back(&mut self, pod: &Pod, actions: &Actions) {
        for held in &actions.held_back {
            let delay = apimachinery::time::format_duration(held.delay);
            let message = format!(
                "back-off {delay} restarting failed container={} pod={}_{}({})",
                held.name,
                pod.metadata.name.as_deref().unwrap_or_default(),
                pod.metadata.namespace.as_deref().unwrap_or_default(),
                self.uid
            );
            let waiting = Waiting { reason: "CrashLoopBackOff".to_owned(), message };
            if self.waiting.get(&held.name) != Some(&waiting) {
                let text = format!("Back-off restarting failed container {} in pod {}", held.name, full_name(pod));
                self.means.events.pod(pod, Some(&held.name), Type::Warning, "BackOff", text);
                self.waiting.insert(held.name.clone(), waiting);
            }
        }
    }

    /// Does what was decided. `Err`: wait so long, then decide anew.
    async fn carry_out(
        &mut self,
        pod: &Arc<Pod>,
        observed: &ObservedPod,
        actions: Actions,
        turn: &mut Option<AbortOnDropHandle<()>>,
    ) -> Result<(), Duration> {
        let sandbox = match actions.sandbox {
            SandboxAction::Keep(id) => id,
            SandboxAction::Stop => return Ok(()),
            SandboxAction::Create { attempt } => {
                return Box::pin(self.new_sandbox(pod, observed, attempt, turn)).await;
            }
        };
        let means = self.means.clone();
        let kills = actions.kill.iter().map(|kill| {
            let running = observed.containers.iter().find(|c| c.id == kill.id);
            let (pod, means) = (pod.clone(), means.clone());
            async move {
                let Some(running) = running else { return Ok(()) };
                let grace = grace_of_kill(&pod, &kill.name, kill.reason);
                Box::pin(kill::container(&means, &pod, observed, running, grace, Some(&kill.message))).await
            }
        });
        for result in join_all(kills).await {
            if let Err(error) = result {
                warn!(pod = %full_name(pod), %error, "container not stopped");
                return Err(self.retry.next_wait());
            }
        }
        if !actions.remove.is_empty() {
            return self.begin_anew(pod, observed, &actions.remove).await;
        }
        if self.sources.is_none() {
            Box::pin(self.prepare(pod)).await?;
            Box::pin(self.mount(pod, observed)).await?;
        }
        // Kills may have changed what there is.
        let seen =
            if actions.kill.is_empty() { observed.clone() } else { self.observe().await.map_err(|_| RETRY_BASE)? };
        let mut pause: Option<Duration> = None;
        let mut started = Vec::new();
        let sources = self.sources.clone().unwrap_or_default();
        for wanted in &actions.start {
            let name = &wanted.container.name;
            let key = (name.clone(), container_hash(&wanted.container));
            // What failed a moment ago is not tried again with every change of something else.
            let left = self.start_again.get(&key).map(|at| at.saturating_duration_since(Instant::now()));
            if let Some(left) = left.filter(|left| !left.is_zero()) {
                pause = Some(pause.map_or(left, |p| p.min(left)));
                continue;
            }
            if let Some(ended) = seen.containers.iter().find(|c| &c.name == name && c.state == State::Exited) {
                let now = now_nanos();
                self.backoff.restarted(name, container_hash(&wanted.container), ended.ended_at(now), now);
            }
            let prepared = start::Prepared { pod, observed: &seen, sandbox_id: &sandbox, sources: &sources };
            match Box::pin(start::container(&self.means, &prepared, wanted)).await {
                Ok(id) => {
                    self.resizes.started(&id, &wanted.container);
                    self.waiting.remove(name);
                    self.start_again.retain(|(n, _), _| n != name);
                    started.push(id);
                }
                Err(waiting) => {
                    debug!(pod = %full_name(pod), container = %name, reason = %waiting.reason, message = %waiting.message, "container waits");
                    self.waiting.insert(name.clone(), waiting);
                    let wait = self.retry.next_wait();
                    self.start_again.retain(|(n, _), _| n != name);
                    self.start_again.insert(key, Instant::now() + wait);
                    pause = Some(pause.map_or(wait, |p| p.min(wait)));
                }
            }
        }
        if let Some(pause) = pause {
            return Err(pause);
        }
        self.seen = self.with_started(seen, &started).await;
        Ok(())
    }

    /// What there is, with containers that were started a moment ago. None: it must be looked at.
    async fn with_started(&self, mut seen: ObservedPod, started: &[String]) -> Option<ObservedPod> {
        let sandbox = seen.latest_sandbox()?.id.clone();
        for id in started {
            let container = self.means.runtime.container(id, &sandbox).await.ok()??;
            seen.containers.retain(|c| c.id != container.id);
            seen.containers.push(container);
        }
        seen.sort();
        Some(seen)
    }

    /// Removes all containers, ended as they are, so that the pod begins anew in its sandbox. Their logs stay.
    async fn begin_anew(&mut self, pod: &Arc<Pod>, observed: &ObservedPod, remove: &[String]) -> Result<(), Duration> {
        info!(pod = %full_name(pod), "a container ended so that all begin anew");
        for (cause, ended) in plan::begin_anew(pod.spec.as_ref().unwrap_or(&PodSpec::default()), observed) {
            let now = now_nanos();
            self.backoff.restarted(&cause.name, container_hash(cause), ended.ended_at(now), now);
        }
        for id in remove {
            if let Err(error) = self.means.runtime.cri.remove_container(id).await {
                warn!(pod = %full_name(pod), container = %id, %error, "container not removed");
                return Err(self.retry.next_wait());
            }
            self.means.runtime.forget(id);
        }
        self.waiting.clear();
        Ok(())
    }

    async fn new_sandbox(
        &mut self,
        pod: &Arc<Pod>,
        observed: &ObservedPod,
        attempt: u32,
        turn: &mut Option<AbortOnDropHandle<()>>,
    ) -> Result<(), Duration> {
        let since = self.sandbox_made.map_or(SANDBOX_PAUSE, |made| made.elapsed());
        if since < SANDBOX_PAUSE {
            return Err(SANDBOX_PAUSE - since);
        }
        if !observed.is_gone() {
            if attempt > 0 {
                let message = "Pod sandbox changed, it will be killed and re-created.";
                self.means.events.pod(pod, None, Type::Normal, "SandboxChanged", message);
            }
            if let Err(error) = Box::pin(kill::pod(&self.means, pod, observed, grace_seconds(pod))).await {
                warn!(pod = %full_name(pod), %error, "old sandbox not stopped");
                return Err(self.retry.next_wait());
            }
        }
        Box::pin(self.prepare(pod)).await?;
        // Volumes and the sandbox do not need each other: both at once.
        let means = self.means.clone();
        let mounting = async {
            let _turn = means.runtime.turn_to_prepare().await;
            Box::pin(self.mount(pod, observed)).await
        };
        let making = async {
            *turn = Some(means.runtime.turn().await);
            Box::pin(start::sandbox(&means, pod, attempt)).await
        };
        let (mounted, made) = tokio::join!(mounting, making);
        mounted?;
        let made = match made {
            Ok(id) => id,
            Err(error) => {
                warn!(pod = %full_name(pod), %error, "sandbox not made");
                let wait = self.retry.next_wait();
                // A network that is still to come is waited for, with no growing pauses.
                if let Some(why) = network_is_missing(&means).await.filter(|_| !host_network(pod)) {
                    let message = format!("network is not ready: container runtime network not ready: {why}");
                    self.means.events.pod(pod, None, Type::Warning, "NetworkNotReady", message);
                    return Err(RETRY_BASE);
                }
                let message = format!("Failed to create pod sandbox: {}", error);
                self.means.events.pod(pod, None, Type::Warning, "FailedCreatePodSandBox", message);
                return Err(wait);
            }
        };
        self.sandbox_made = Some(Instant::now());
        if observed.is_gone() {
            let sandbox = means.runtime.sandbox(&made).await.ok().flatten();
            self.seen = sandbox.map(|sandbox| ObservedPod { sandboxes: vec![sandbox], ..observed.clone() });
        }
        Ok(())
    }

    /// What must be there before anything of the pod runs.
    async fn prepare(&mut self, pod: &Arc<Pod>) -> Result<(), Duration> {
        let runtime = &self.means.runtime;
        let limits = resources::pod(pod, &runtime.node.kernel);
        let of_pod = pod.clone();
        let made = runtime.with_cgroups(move |cgroups| cgroups.ensure_pod(&of_pod, &limits)).await.unwrap_or(Ok(()));
        let made = made
            .map_err(|e| ("FailedCreatePodContainer", format!("unable to ensure pod container exists: {e}")))
            .and_then(|()| {
                std::fs::create_dir_all(logs::pod_dir(&runtime.node.pod_logs_dir, pod))
                    .and_then(|()| std::fs::create_dir_all(runtime.node.pod_dir(&self.uid)))
                    .map_err(|e| ("FailedToMakePodDataDirectories", format!("error making pod data directories: {e}")))
            });
        if let Err((reason, message)) = made {
            warn!(pod = %full_name(pod), message, "pod not prepared");
            self.means.events.pod(pod, None, Type::Warning, reason, message);
            return Err(self.retry.next_wait());
        }
        if let Err(error) = Box::pin(self.means.dra.prepare(pod)).await {
            warn!(pod = %full_name(pod), error, "dynamic resources not prepared");
            let message = format!("Failed to prepare dynamic resources: {error}");
            self.means.events.pod(pod, None, Type::Warning, "FailedPrepareDynamicResources", message);
            return Err(self.retry.next_wait());
        }
        Ok(())
    }

    /// Prepares or refreshes the pod's volumes.
    async fn mount(&mut self, pod: &Arc<Pod>, observed: &ObservedPod) -> Result<(), Duration> {
        let left = self.mount_again.map(|at| at.saturating_duration_since(Instant::now()));
        if let Some(left) = left.filter(|left| !left.is_zero()) {
            return Err(left);
        }
        let known = start::with_addresses(&self.means, pod, observed);
        let dir = self.means.runtime.node.pod_dir(&self.uid);
        match Box::pin(self.means.volumes.mount_pod(&known, &dir)).await {
            Ok(sources) => {
                self.sources = Some(sources);
                self.mounted_at = Some(Instant::now());
                self.mounted_as = Some([pod.metadata.labels.clone(), pod.metadata.annotations.clone()]);
                self.mount_again = None;
                Ok(())
            }
            Err(error) => {
                warn!(pod = %full_name(pod), %error, "volumes not ready");
                self.means.events.pod(pod, None, Type::Warning, error.reason(), error.to_string());
                let wait = self.retry.next_wait();
                self.mount_again = Some(Instant::now() + wait);
                Err(wait)
            }
        }
    }

    /// Stops everything within the pod's grace, then takes down all but what people may still ask for (logs). When to look again;
    /// None: there is nothing more to do until something else is wanted.
    async fn terminate(&mut self, desired: &Desired) -> Option<Duration> {
        let pod = &desired.pod;
        if !self.terminated {
            match Box::pin(self.stop(desired)).await {
                Ok(true) => {}
                Ok(false) => return Some(Duration::ZERO),
                Err(error) => {
                    warn!(pod = %full_name(pod), %error, "pod not stopped yet");
                    let message = format!("error killing pod: {}", error.message());
                    self.means.events.pod(pod, None, Type::Warning, "FailedKillPod", message);
                    return Some(self.retry.next_wait());
                }
            }
        }
        let dir = self.means.runtime.node.pod_dir(&self.uid);
        if let Err(error) = Box::pin(self.means.volumes.unmount_pod(&self.uid, &dir)).await {
            warn!(pod = %full_name(pod), %error, "volumes not unmounted yet");
            return Some(self.retry.next_wait());
        }
        if let Err(error) = Box::pin(self.means.dra.unprepare(&self.uid)).await {
            warn!(pod = %full_name(pod), error, "dynamic resources not taken back yet");
            return Some(self.retry.next_wait());
        }
        self.sources = None;
        self.means.allocator.forget(&self.uid);
        self.remove_cgroup().await;
        self.down = true;
        let observed = match self.observe().await {
            Ok(observed) => observed,
            Err(error) => {
                debug!(%error, "cannot look at the ended pod");
                return Some(self.retry.next_wait());
            }
        };
        self.report(pod, &observed);
        if pod.metadata.deletion_timestamp.is_some() {
            self.means.statuses.finished(pod);
        }
        (!observed.is_stopped()).then_some(self.means.sync_frequency)
    }

    /// False: what is wanted changed meanwhile, begin again.
    async fn stop(&mut self, desired: &Desired) -> Result<bool, CriError> {
        let pod = &desired.pod;
        self.probes.stop_killing_probes();
        self.waiting.clear();
        let observed = self.observe().await?;
        self.report(pod, &observed);
        let grace = desired.grace.unwrap_or_else(|| grace_seconds(pod));
        if !observed.is_stopped() {
            let mut changes = self.desired.clone();
            let shorter = async move {
                while changes.changed().await.is_ok() {
                    let now = changes.borrow().clone();
                    if now.removed || now.grace.unwrap_or_else(|| grace_seconds(&now.pod)) < grace {
                        return;
                    }
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                // The grace was cut short: what is stopping is told again, with less time.
                () = shorter => return Ok(false),
                stopped = Box::pin(kill::pod(&self.means, pod, &observed, grace)) => stopped?,
            }
        }
        self.terminated = true;
        Ok(true)
    }

    async fn remove_cgroup(&self) {
        let uid = self.uid.clone();
        self.means.runtime.with_cgroups(move |cgroups| cgroups.remove_pod(&uid)).await;
    }

    /// Removes the last traces of a pod that its source no longer has.
    async fn take_down(&mut self, desired: &Desired) -> Result<(), CriError> {
        let pod = &desired.pod;
        let mut observed = self.observe().await?;
        if !observed.is_stopped() {
            let grace = if pod.spec.is_some() { grace_seconds(pod) } else { kill::remembered_grace(&observed) };
            kill::pod(&self.means, pod, &observed, grace).await?;
            self.down = false;
            observed = self.observe().await?;
        }
        kill::remove_all(&self.means, &observed).await?;
        let runtime = &self.means.runtime;
        let dir = runtime.node.pod_dir(&self.uid);
        let unmounted = if self.down { Ok(()) } else { self.means.volumes.unmount_pod(&self.uid, &dir).await };
        if let Err(error) = unmounted {
            warn!(uid = %self.uid, %error, "volumes of a removed pod not unmounted; left to housekeeping");
        } else if let Err(error) = std::fs::remove_dir_all(&dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            debug!(dir = %dir.display(), %error, "pod directory not removed");
        }
        if !self.down {
            if let Err(error) = self.means.dra.unprepare(&self.uid).await {
                warn!(uid = %self.uid, error, "dynamic resources of a removed pod not taken back");
            }
            self.remove_cgroup().await;
        }
        let named = if pod.metadata.name.is_some() { Pod::clone(pod) } else { from_observed(&self.uid, &observed) };
        let logs_dir = logs::pod_dir(&runtime.node.pod_logs_dir, &named);
        if let Err(error) = std::fs::remove_dir_all(&logs_dir) {
            debug!(dir = %logs_dir.display(), %error, "log directory not removed");
        }
        logs::remove_dead_links(&runtime.node.container_logs_dir);
        Ok(())
    }
}

/// What the runtime says of its network, where that is not set up.
async fn network_is_missing(means: &Means) -> Option<String> {
    let answer = means.runtime.cri.status(false).await.ok()?;
    let mut conditions = answer.status.iter().flat_map(|s| &s.conditions);
    let missing = conditions.find(|c| c.r#type == "NetworkReady" && !c.status)?;
    Some(format!("{}=false reason:{} message:{}", missing.r#type, missing.reason, missing.message))
}

/// A pod's names as its sandbox remembers them.
fn from_observed(uid: &str, observed: &ObservedPod) -> Pod {
    let mut pod = Pod::default();
    pod.metadata.uid = Some(uid.to_owned());
    pod.metadata.name = Some(observed.name.clone());
    pod.metadata.namespace = Some(observed.namespace.clone());
    pod
}

async fn becomes_ending(changes: &mut watch::Receiver<Desired>) {
    loop {
        if must_end(&changes.borrow_and_update()) {
            return;
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// What is left of `activeDeadlineSeconds`. From when the pod is first looked at it is counted by a clock that does not jump.
fn active_deadline(pod: &Pod, status: &PodStatus, active: &mut Option<(Instant, Duration)>) -> Option<Duration> {
    let allowed = u64::try_from(pod.spec.as_ref()?.active_deadline_seconds?).unwrap_or(0);
    let since = status.start_time.as_ref()?.0;
    let ran = || Duration::try_from(Timestamp::now().duration_since(since)).unwrap_or_default();
    let (seen, before) = active.get_or_insert_with(|| (Instant::now(), ran()));
    Some(Duration::from_secs(allowed).saturating_sub(*before + seen.elapsed()))
}

/// A probe may set a grace of its own for the kill it causes.
fn grace_of_kill(pod: &Pod, name: &str, reason: KillReason) -> i64 {
    if reason == KillReason::BeginAnew {
        // At once, without hooks.
        return 0;
    }
    let own = find_container(pod, name).and_then(|(_, container)| match reason {
        KillReason::LivenessProbe => container.liveness_probe.and_then(|p| p.termination_grace_period_seconds),
        KillReason::StartupProbe => container.startup_probe.and_then(|p| p.termination_grace_period_seconds),
        KillReason::Changed | KillReason::Unknown | KillReason::BeginAnew => None,
    });
    own.unwrap_or_else(|| grace_seconds(pod))
}
