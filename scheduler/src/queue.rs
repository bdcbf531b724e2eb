//! The pods that wait for a node: ready to be tried (active), waiting out a back-off, refused until something changes
//! (unschedulable), or not to be tried at all (gated). Time comes in as an argument.
//!
//! A pod that was refused goes to the unschedulable pods and comes back when an event happens that can help it, or after
//! [`UNSCHEDULABLE_FLUSH`] at the latest. Events that happen while a pod is being decided on are kept for it, so that none is
//! missed between the snapshot and the refusal.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cache::PendingPod;
use crate::framework::{EventSet, QueueKey};

/// How long a refused pod waits for an event before it is tried again all the same, unless it is configured.
/// As `podMaxInUnschedulablePodsDuration`.
pub const UNSCHEDULABLE_FLUSH: Duration = Duration::from_secs(5 * 60);

/// The times of the queue.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    pub initial_backoff: Duration,
    pub max_backoff: Duration,
    pub unschedulable_flush: Duration,
}

/// Why a pod was refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Refused {
    /// The changes that may help.
    pub helped_by: EventSet,
    /// The plugins that refused, as places in the pod's profile: they judge a change more closely.
    pub places: Vec<u8>,
}

type Uid = Arc<str>;

/// What the queue asks of the profiles.
pub trait Policy {
    /// The pod's place among the active ones. As QueueSort.
    fn key(&self, pod: &PendingPod, queued_us: i64) -> QueueKey;
    /// Whether the pod may be tried at all. As PreEnqueue.
    fn admits(&self, pod: &PendingPod) -> bool;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Active(QueueKey, u64),
    Backoff(Instant, u64),
    /// Since when.
    Unschedulable(Instant, u64),
    Gated,
    /// Taken out to be decided on, or being bound.
    InFlight,
}

#[derive(Debug)]
struct Entry {
    pod: Arc<PendingPod>,
    place: Place,
    /// How often a node was looked for.
    attempts: u32,
    /// How often it was refused, and how often in a row an attempt ended with an error: the back-off counts the latter while
    /// there are any. As `UnschedulableCount` and `ConsecutiveErrorsCount`.
    refusals: u32,
    errors: u32,
    waiting_since_us: i64,
    /// When it came, by the clock that does not jump.
    came: Instant,
    /// When the last attempt ended: the back-off counts from here.
    last_attempt: Instant,
    refused: Refused,
    /// It was not tried, and waits as if it were gated.
    held: bool,
}

impl Entry {
    /// The last attempt ended with an error, not with a refusal.
    fn failed(&self) -> bool {
        self.errors > 0
    }

    /// Since when it waits for this attempt: one that was tried before comes behind those that came meanwhile.
    fn queued_us(&self) -> i64 {
        let later = self.last_attempt.saturating_duration_since(self.came).as_micros();
        self.waiting_since_us.saturating_add(i64::try_from(later).unwrap_or(i64::MAX))
    }
}

/// How many pods are where, for the metric `scheduler_pending_pods`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Depths {
    pub active: usize,
    pub backoff: usize,
    pub unschedulable: usize,
    pub gated: usize,
}

/// The queue.
pub struct Queue<P> {
    policy: P,
    timing: Timing,
    entries: HashMap<Uid, Entry>,
    active: BTreeMap<(QueueKey, u64), Uid>,
    backoff: BTreeMap<(Instant, u64), Uid>,
    unschedulable: BTreeMap<(Instant, u64), Uid>,
    /// What happened while a pod was decided on.
    in_flight: HashMap<Uid, EventSet>,
    sequence: u64,
}

impl<P: Policy> Queue<P> {
    pub fn new(policy: P, timing: Timing) -> Queue<P> {
        Queue {
            policy,
            timing,
            entries: HashMap::new(),
            active: BTreeMap::new(),
            backoff: BTreeMap::new(),
            unschedulable: BTreeMap::new(),
            in_flight: HashMap::new(),
            sequence: 0,
        }
    }

    /// Takes in a pod, or a new version of one that is here already; whether it is new.
    pub fn set(&mut self, pod: Arc<PendingPod>, now: Instant, now_us: i64) -> bool {
        let uid = pod.facts.uid.clone();
        let Some(entry) = self.entries.get_mut(&uid) else {
            let entry = Entry {
                pod,
                place: Place::Gated,
                attempts: 0,
                refusals: 0,
                errors: 0,
                waiting_since_us: now_us,
                came: now,
                last_attempt: now,
                refused: Refused::default(),
                held: false,
            };
            self.entries.insert(uid.clone(), entry);
            self.activate(&uid);
            return true;
        };
        let changed = own_changes(&entry.pod, &pod);
        entry.pod = pod;
        match entry.place {
            Place::InFlight => {
                if let Some(events) = self.in_flight.get_mut(&uid) {
                    *events |= changed;
                }
            }
            Place::Gated => self.activate(&uid),
            Place::Unschedulable(..) if entry.refused.helped_by.intersects(changed) => self.requeue(&uid, now),
            Place::Unschedulable(..) | Place::Backoff(..) => {}
            // The priority may have changed, or a gate come.
            Place::Active(..) => self.activate(&uid),
        }
        false
    }

    /// Forgets a pod: it is gone, has a node, or has ended. Since when it was here, in µs since the epoch.
    pub fn remove(&mut self, uid: &str) -> Option<i64> {
        self.lift(uid);
        self.entries.remove(uid).map(|entry| entry.waiting_since_us)
    }

    /// The next pod to decide on, and how often it was tried before. When none is active, one that something may have
    /// helped need not wait out its back-off.
    pub fn pop(&mut self, now: Instant) -> Option<(Arc<PendingPod>, u32)> {
        self.flush(now);
        while self.active.is_empty() {
            let uid = self.first_of_backoff()?;
            self.activate(&uid);
        }
        let (_, uid) = self.active.pop_first()?;
        let entry = self.entries.get_mut(&uid)?;
        entry.place = Place::InFlight;
        entry.held = false;
        entry.attempts += 1;
        self.in_flight.insert(uid, EventSet::NONE);
        Some((entry.pod.clone(), entry.attempts))
    }

    /// The pod that was popped has no node: it waits for one of `helped_by`. After an error (`None`) it is tried again
    /// after its back-off.
    pub fn refused(&mut self, uid: &str, refused: Option<Refused>, now: Instant) {
        let (Some(entry), Some(events)) = (self.entries.get_mut(uid), self.in_flight.remove(uid)) else { return };
        entry.last_attempt = now;
        if refused.is_none() {
            entry.errors = entry.errors.saturating_add(1);
        } else {
            (entry.errors, entry.refusals) = (0, entry.refusals.saturating_add(1));
        }
        let again = refused.as_ref().is_none_or(|refused| refused.helped_by.intersects(events));
        entry.refused = refused.unwrap_or(Refused { helped_by: EventSet::ALL, places: Vec::new() });
        self.sequence += 1;
        entry.place = Place::Unschedulable(now, self.sequence);
        self.unschedulable.insert((now, self.sequence), entry.pod.facts.uid.clone());
        if again {
            let uid = entry.pod.facts.uid.clone();
            self.requeue(&uid, now);
        }
    }

    /// The pod that was popped is not tried yet: it waits for one of `helped_by`, and this was no attempt.
    pub fn held(&mut self, uid: &str, refused: Refused, now: Instant) {
        let (Some(entry), Some(events)) = (self.entries.get_mut(uid), self.in_flight.remove(uid)) else { return };
        entry.attempts = entry.attempts.saturating_sub(1);
        let again = refused.helped_by.intersects(events);
        (entry.refused, entry.held) = (refused, true);
        self.sequence += 1;
        entry.place = Place::Unschedulable(now, self.sequence);
        let uid = entry.pod.facts.uid.clone();
        self.unschedulable.insert((now, self.sequence), uid.clone());
        if again {
            self.requeue(&uid, now);
        }
    }

    /// Something happened: the pods that it may help are tried again; `helps` looks closely, once per pod in question.
    /// As `MoveAllToActiveOrBackoffQueue`.
    pub fn happened(&mut self, event: EventSet, now: Instant, helps: impl Fn(&PendingPod, &[u8]) -> bool) {
        if event.is_empty() {
            return;
        }
        self.in_flight.values_mut().for_each(|events| *events |= event);
        let may_help = |uid: &&Uid| {
            let Some(entry) = self.entries.get(*uid) else { return false };
            entry.refused.helped_by.intersects(event) && helps(&entry.pod, &entry.refused.places)
        };
        let helped: Vec<Uid> = self.unschedulable.values().filter(may_help).cloned().collect();
        for uid in helped {
            self.requeue(&uid, now);
        }
    }

    /// Brings back whose time has come; returns when the next one's will have.
    pub fn flush(&mut self, now: Instant) -> Option<Instant> {
        while let Some(first) = self.backoff.first_entry() {
            if first.key().0 > now {
                break;
            }
            let uid = first.remove();
            self.activate(&uid);
        }
        while let Some(((since, _), uid)) = self.unschedulable.first_key_value() {
            if *since + self.timing.unschedulable_flush > now {
                break;
            }
            let uid = uid.clone();
            self.requeue(&uid, now);
        }
        let backoff = self.backoff.first_key_value().map(|((at, _), _)| *at);
        let late = self.unschedulable.first_key_value().map(|((since, _), _)| *since + self.timing.unschedulable_flush);
        backoff.into_iter().chain(late).min()
    }

    /// Whether there is a pod to be tried now, or at the end of its back-off.
    pub fn has_next(&self) -> bool {
        !self.active.is_empty() || !self.backoff.is_empty()
    }

    /// Tries a pod again whatever it waits for. As `Activate`.
    pub fn try_again(&mut self, uid: &str, now: Instant) {
        if matches!(self.entries.get(uid).map(|entry| entry.place), Some(Place::Unschedulable(..))) {
            self.requeue(uid, now);
        }
    }

    /// The waiting pods.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<PendingPod>> {
        self.entries.values().map(|entry| &entry.pod)
    }

    /// The pods that are held back, with the places of the plugins that refused them; none of those that are gated.
    pub fn held_back(&self) -> impl Iterator<Item = (&PendingPod, &[u8])> {
        let waits = |entry: &&Entry| match entry.place {
            Place::Gated => true,
            Place::InFlight => false,
            _ => !entry.refused.places.is_empty(),
        };
        self.entries.values().filter(waits).map(|entry| match entry.place {
            Place::Gated => (&*entry.pod, &[][..]),
            _ => (&*entry.pod, &entry.refused.places[..]),
        })
    }

    pub fn depths(&self) -> Depths {
        let (active, backoff) = (self.active.len(), self.backoff.len());
        let tried = |uid: &&Uid| self.entries.get(*uid).is_none_or(|entry| !entry.held);
        let unschedulable = self.unschedulable.values().filter(tried).count();
        let gated = self.entries.len() - active - backoff - unschedulable - self.in_flight.len();
        Depths { active, backoff, unschedulable, gated }
    }

    /// As `calculateBackoffDuration`: doubled with each failure, up to the maximum.
    fn backoff_of(&self, entry: &Entry) -> Duration {
        let failures = if entry.failed() { entry.errors } else { entry.refusals };
        let doublings = failures.saturating_sub(1).min(20);
        self.timing.initial_backoff.saturating_mul(1 << doublings).min(self.timing.max_backoff)
    }

    /// Of the pods whose back-off ends first, within a second, the most urgent. Errors wait. As `popBackoff`.
    fn first_of_backoff(&self) -> Option<Uid> {
        let entry = |uid: &Uid| self.entries.get(uid).filter(|entry| !entry.failed());
        let mut waiting = self.backoff.iter().filter(|(_, uid)| entry(uid).is_some()).peekable();
        let until = waiting.peek()?.0.0 + Duration::from_secs(1);
        let soon = waiting.take_while(|((at, _), _)| *at < until);
        let key = |uid: &Uid| entry(uid).map(|entry| self.policy.key(&entry.pod, entry.queued_us()));
        soon.map(|(_, uid)| uid).min_by_key(|uid| key(uid)).cloned()
    }

    /// To the active pods, or to the gated ones if a PreEnqueue plugin holds the pod back.
    fn activate(&mut self, uid: &str) {
        self.lift(uid);
        self.sequence += 1;
        let Some(entry) = self.entries.get_mut(uid) else { return };
        if !self.policy.admits(&entry.pod) {
            entry.place = Place::Gated;
            return;
        }
        let key = self.policy.key(&entry.pod, entry.queued_us());
        entry.place = Place::Active(key, self.sequence);
        self.active.insert((key, self.sequence), entry.pod.facts.uid.clone());
    }

    /// To the active pods, or first through the rest of its back-off.
    fn requeue(&mut self, uid: &str, now: Instant) {
        let Some(entry) = self.entries.get(uid) else { return };
        let ready = entry.last_attempt + self.backoff_of(entry);
        if entry.refusals == 0 && entry.errors == 0 || ready <= now {
            self.activate(uid);
            return;
        }
        self.lift(uid);
        self.sequence += 1;
        let Some(entry) = self.entries.get_mut(uid) else { return };
        entry.place = Place::Backoff(ready, self.sequence);
        self.backoff.insert((ready, self.sequence), entry.pod.facts.uid.clone());
    }

    /// Takes a pod out of the ordered maps.
    fn lift(&mut self, uid: &str) {
        match self.entries.get(uid).map(|entry| entry.place) {
            Some(Place::Active(key, sequence)) => drop(self.active.remove(&(key, sequence))),
            Some(Place::Backoff(at, sequence)) => drop(self.backoff.remove(&(at, sequence))),
            Some(Place::Unschedulable(since, sequence)) => drop(self.unschedulable.remove(&(since, sequence))),
            Some(Place::InFlight) => drop(self.in_flight.remove(uid)),
            _ => {}
        }
    }
}

/// In what a new version of a waiting pod differs, as far as it may fit where the old one did not: of all else that changes while
/// a pod waits nothing is asked. As `PodSchedulingPropertiesChange`.
fn own_changes(old: &PendingPod, new: &PendingPod) -> EventSet {
    let tolerations = |pod: &PendingPod| pod.spec().and_then(|spec| spec.tolerations.clone());
    let claims = |pod: &PendingPod| pod.pod.status.as_ref().and_then(|status| status.resource_claim_statuses.clone());
    let (had, has) = (&old.facts.requests, &new.facts.requests);
    let lacks =
        |(name, amount): &(Arc<str>, i64)| !has.extended.iter().any(|(other, now)| other == name && now >= amount);
    let less = has.cpu_milli < had.cpu_milli
        || has.memory < had.memory
        || has.ephemeral_storage < had.ephemeral_storage
        || had.extended.iter().any(lacks);
    [
        (old.pod.metadata.labels != new.pod.metadata.labels, EventSet::OWN_LABELS),
        (tolerations(old) != tolerations(new), EventSet::OWN_TOLERATIONS),
        (less, EventSet::OWN_REQUESTS),
        (claims(old) != claims(new), EventSet::OWN_CLAIMS),
    ]
    .into_iter()
    .filter(|(differs, _)| *differs)
    .fold(EventSet::NONE, |all, (_, change)| all | change)
}

#[cfg(test)]
mod tests;
