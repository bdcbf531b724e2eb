//! Notices what happens in the runtime: a relist each second, and events between relists where the runtime sends them: CRI's
//! (containerd from 1.7, CRI-O), else containerd's own, which only cause an early relist. As Kubernetes' PLEG, generic and
//! evented in one.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use containerd_client::events::TaskExit;
use containerd_client::services::v1::SubscribeRequest;
use containerd_client::services::v1::events_client::EventsClient;
use parking_lot::RwLock;
use prost::Message as _;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::Runtime;
use super::cri::CriError;
use super::labels;
use crate::metrics::metrics;

const RELIST: Duration = Duration::from_secs(1);
/// While events come, a relist only makes sure that none was lost.
const RELIST_WITH_EVENTS: Duration = Duration::from_secs(10);
/// The runtime counts as unhealthy when no relist has worked for this long.
const UNHEALTHY_AFTER: Duration = Duration::from_secs(180);
/// When what a former kubelet asked of the runtime is through.
const SETTLED_AFTER: Duration = Duration::from_secs(60);
/// When, after containerd's word of an exit, its CRI part is looked at: it takes a while to show it.
const EXIT_SHOWS: [Duration; 4] =
    [Duration::from_millis(10), Duration::from_millis(40), Duration::from_millis(100), Duration::from_millis(300)];
/// The exits of containers that Kubernetes made.
const EXITS: &str = r#"topic=="/tasks/exit",namespace=="k8s.io""#;
/// Pause before events are asked for again.
const EVENTS_RETRY: Duration = Duration::from_secs(5);

/// Added to a sandbox's state, to tell it from a container's.
const SANDBOX: i32 = 16;

/// States of a pod's sandboxes and containers by ID: enough to see that something changed.
pub type PodStates = BTreeMap<String, i32>;

/// The latest relist.
#[derive(Debug)]
pub struct RuntimeWatch {
    begun: Instant,
    pods: RwLock<HashMap<String, PodStates>>,
    last: RwLock<Option<Instant>>,
    /// A relist is due now.
    hurry: Notify,
    /// The runtime tells what happens.
    told: AtomicBool,
}

impl RuntimeWatch {
    /// Starts watching; UIDs of pods in which something changed are sent to `changed`.
    pub fn start(runtime: Arc<Runtime>, changed: mpsc::Sender<String>, shutdown: CancellationToken) -> Arc<Self> {
        let watch = Arc::new(Self {
            begun: Instant::now(),
            pods: RwLock::default(),
            last: RwLock::default(),
            hurry: Notify::new(),
            told: AtomicBool::new(false),
        });
        tokio::spawn(watch.clone().relist_forever(runtime.clone(), changed.clone(), shutdown.clone()));
        let seen = watch.clone();
        tokio::spawn(async move {
            // A runtime without CRI's events may be a containerd, which has events of its own.
            seen.events_forever(&runtime, &changed, &shutdown).await;
            seen.exits_forever(&runtime, &changed, &shutdown).await;
        });
        watch
    }

    /// UIDs of all pods of which the runtime has anything. None: not relisted yet.
    pub fn pod_uids(&self) -> Option<Vec<String>> {
        self.last.read().map(|_| self.pods.read().keys().cloned().collect())
    }

    /// Whether the runtime surely has nothing yet of a pod whose worker has only begun: nor has a kubelet that was here before
    /// left it anything to do.
    pub fn has_nothing_of(&self, uid: &str) -> bool {
        self.begun.elapsed() > SETTLED_AFTER && self.last.read().is_some() && !self.pods.read().contains_key(uid)
    }

    /// How many pods have a sandbox that is ready, and the states of all containers.
    pub fn counts(&self) -> (usize, Vec<i32>) {
        let pods = self.pods.read();
        let ready = pods.values().filter(|states| states.values().any(|state| *state == SANDBOX)).count();
        (ready, pods.values().flat_map(|states| states.values().copied()).filter(|state| *state < SANDBOX).collect())
    }

    /// Why the runtime cannot be trusted at the moment, if so.
    pub fn unhealthy(&self) -> Option<String> {
        match *self.last.read() {
            None => Some("PLEG is not healthy: pleg has yet to be successful".to_owned()),
            Some(at) if at.elapsed() > UNHEALTHY_AFTER => Some(format!(
                "PLEG is not healthy: pleg was last seen active {:?} ago; threshold is 3m0s",
                at.elapsed()
            )),
            Some(_) => None,
        }
    }

    async fn relist_forever(
        self: Arc<Self>,
        runtime: Arc<Runtime>,
        changed: mpsc::Sender<String>,
        shutdown: CancellationToken,
    ) {
        let mut failing = false;
        loop {
            let begun = Instant::now();
            match list(&runtime).await {
                Ok(now) => {
                    self.count(begun);
                    if std::mem::take(&mut failing) {
                        info!("the container runtime answers again");
                    }
                    let uids = difference(&self.pods.read(), &now);
                    *self.pods.write() = now;
                    *self.last.write() = Some(Instant::now());
                    for uid in uids {
                        if changed.send(uid).await.is_err() {
                            return;
                        }
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        warn!(%error, "cannot list what the container runtime runs");
                    }
                }
            }
            let pause = if self.told.load(Ordering::Relaxed) && !failing { RELIST_WITH_EVENTS } else { RELIST };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
                () = self.hurry.notified() => {}
            }
        }
    }

    fn count(&self, begun: Instant) {
        metrics().relist_seconds.observe(begun.elapsed().as_secs_f64());
        if let Some(before) = *self.last.read() {
            metrics().relist_interval.observe(before.elapsed().as_secs_f64());
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        metrics().relist_seen.set(now.as_secs_f64());
    }

    /// Reads containerd's own events; another runtime does not know them, and is left to the relist.
    async fn exits_forever(&self, runtime: &Runtime, changed: &mpsc::Sender<String>, shutdown: &CancellationToken) {
        loop {
            let request = SubscribeRequest { filters: vec![EXITS.to_owned()] };
            match EventsClient::new(runtime.cri.channel()).subscribe(request).await {
                Ok(answer) => {
                    debug!("reading containerd's events");
                    let mut stream = answer.into_inner();
                    self.set_told(true);
                    // When to look, and at which pod; an unknown one is found by a relist.
                    let mut looks: VecDeque<(tokio::time::Instant, Option<String>)> = VecDeque::new();
                    loop {
                        let look = looks.front().map(|(at, _)| *at);
                        let next = tokio::select! {
                            () = shutdown.cancelled() => return,
                            () = tokio::time::sleep_until(look.unwrap_or_else(tokio::time::Instant::now)), if look.is_some() => {
                                match looks.pop_front().and_then(|(_, uid)| uid) {
                                    Some(uid) => if changed.send(uid).await.is_err() { return },
                                    None => self.hurry.notify_one(),
                                }
                                continue;
                            }
                            next = stream.message() => next,
                        };
                        let Ok(Some(envelope)) = next else { break };
                        let exit = envelope.event.and_then(|any| TaskExit::decode(any.value.as_slice()).ok());
                        // Commands run in containers (probes) end too: those have an ID of their own.
                        if let Some(exit) = exit.filter(|e| e.id.is_empty() || e.id == e.container_id) {
                            let now = tokio::time::Instant::now();
                            let uid = self.pod_of(&exit.container_id);
                            // What is to be looked at already will be; many exits at once are looked at together.
                            looks.retain(|(_, pending)| *pending != uid);
                            looks.extend(EXIT_SHOWS.iter().map(|after| (now + *after, uid.clone())));
                            looks.make_contiguous().sort_by_key(|(at, _)| *at);
                        }
                    }
                    self.set_told(false);
                }
                Err(status) if status.code() == tonic::Code::Unimplemented => return,
                Err(error) => debug!(%error, "no events from containerd"),
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(EVENTS_RETRY) => {}
            }
        }
    }

    fn set_told(&self, told: bool) {
        self.told.store(told, Ordering::Relaxed);
        self.hurry.notify_one();
    }

    /// The pod of a container or sandbox, by the last relist.
    fn pod_of(&self, id: &str) -> Option<String> {
        self.pods.read().iter().find(|(_, states)| states.contains_key(id)).map(|(uid, _)| uid.clone())
    }

    /// Reads the runtime's event stream; returns when it has none (containerd before 1.7).
    async fn events_forever(&self, runtime: &Runtime, changed: &mpsc::Sender<String>, shutdown: &CancellationToken) {
        loop {
            match runtime.cri.container_events().await {
                Ok(mut stream) => {
                    debug!("reading the container runtime's events");
                    loop {
                        let next = tokio::select! {
                            () = shutdown.cancelled() => return,
                            next = stream.message() => next,
                        };
                        match next {
                            Ok(Some(event)) => {
                                self.told.store(true, Ordering::Relaxed);
                                let uid = event.pod_sandbox_status.and_then(|s| s.metadata).map(|m| m.uid);
                                if let Some(uid) = uid.filter(|u| !u.is_empty())
                                    && changed.send(uid).await.is_err()
                                {
                                    return;
                                }
                            }
                            Ok(None) => break,
                            Err(status) if status.code() == tonic::Code::Unimplemented => return,
                            Err(_) => break,
                        }
                    }
                    self.set_told(false);
                }
                Err(error) if error.is_unimplemented() => return,
                Err(error) => debug!(%error, "no events from the container runtime"),
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(EVENTS_RETRY) => {}
            }
        }
    }
}

async fn list(runtime: &Runtime) -> Result<HashMap<String, PodStates>, CriError> {
    let none = BTreeMap::new;
    let (sandboxes, containers) =
        tokio::try_join!(runtime.cri.list_pod_sandboxes_with(none()), runtime.cri.list_containers_with(none()))?;
    let mut pods: HashMap<String, PodStates> = HashMap::new();
    let sandboxes = sandboxes.into_iter().map(|s| (s.labels, s.id, SANDBOX + s.state));
    let containers = containers.into_iter().map(|c| (c.labels, c.id, c.state));
    for (mut labels, id, state) in sandboxes.chain(containers) {
        if let Some(uid) = labels.remove(labels::POD_UID) {
            pods.entry(uid).or_default().insert(id, state);
        }
    }
    Ok(pods)
}

/// Pods of which the two relists say different things.
fn difference(before: &HashMap<String, PodStates>, now: &HashMap<String, PodStates>) -> Vec<String> {
    let changed = now.iter().filter(|(uid, states)| before.get(*uid) != Some(states)).map(|(uid, _)| uid);
    let gone = before.keys().filter(|uid| !now.contains_key(*uid));
    changed.chain(gone).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_new_and_gone_pods_differ() {
        let states = |state| -> PodStates { [("c".to_owned(), state)].into() };
        let before: HashMap<_, _> =
            [("same".to_owned(), states(1)), ("changed".to_owned(), states(1)), ("gone".to_owned(), states(1))].into();
        let now: HashMap<_, _> =
            [("same".to_owned(), states(1)), ("changed".to_owned(), states(2)), ("new".to_owned(), states(1))].into();
        let mut uids = difference(&before, &now);
        uids.sort();
        assert_eq!(uids, ["changed", "gone", "new"]);
    }
}
