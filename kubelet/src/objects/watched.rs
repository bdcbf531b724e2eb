//! Single objects of one kind, each behind a watch of its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use apimachinery::meta::NamespacedName;
use component_base::lean;
use component_base::watch::{Sink, Version, follow};
use k8s_openapi::NamespaceResourceScope;
use kube::Resource;
use kube::api::WatchParams;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::ObjectError;

/// Watches of one kind at a time; well below what one HTTP/2 connection carries.
const MAX_WATCHES: usize = 64;
/// Objects of one kind that are remembered.
const MAX_REMEMBERED: usize = 1024;
/// A watch that nobody asked for this long ends. Running pods ask about each minute.
const IDLE: Duration = Duration::from_secs(600);
/// How long an immutable object, which has no watch, is believed to be still the one of its name.
const IMMUTABLE_TRUST: Duration = Duration::from_secs(60);
/// How long a caller waits for the first answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a caller waits after the API has refused: the node authorizer may lag behind a pod that was just bound.
const PATIENCE_REFUSED: Duration = Duration::from_secs(2);

#[derive(Debug)]
enum State<K> {
    Pending,
    Refused(String),
    Known(Option<Arc<K>>),
}

/// What was known of an object before its present watch: nothing, that it did not exist, or how it was.
type LastKnown<K> = Option<Option<Arc<K>>>;

struct Entry<K> {
    state: watch::Receiver<State<K>>,
    stale: LastKnown<K>,
    task: Option<AbortHandle>,
    begun: Instant,
    last_used: Instant,
}

/// The objects of one kind.
pub(super) struct Watched<K> {
    client: kube::Client,
    kind: &'static str,
    is_immutable: fn(&K) -> bool,
    entries: Mutex<HashMap<NamespacedName, Entry<K>>>,
}

// === impl Watched ===

impl<K> Watched<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    pub(super) fn new(client: kube::Client, kind: &'static str, is_immutable: fn(&K) -> bool) -> Watched<K> {
        Watched { client, kind, is_immutable, entries: Mutex::default() }
    }

    /// The object as last seen; `None` if it does not exist. Waits for a first answer, within bounds.
    pub(super) async fn get(&self, namespace: &str, name: &str) -> Result<Option<Arc<K>>, ObjectError> {
        let key = NamespacedName::new(namespace, name);
        let (mut state, stale) = self.entry(&key);
        if let Ok(Some(object)) = tokio::time::timeout(PATIENCE, first_answer(&mut state)).await {
            return Ok(object);
        }
        if let Some(object) = stale {
            tracing::debug!(kind = self.kind, object = %key, "the API does not answer; the last known object is used");
            return Ok(object);
        }
        let cause = match &*state.borrow() {
            State::Refused(cause) => cause.clone(),
            _ => "timed out waiting for the condition".to_owned(),
        };
        Err(ObjectError::Unreachable { kind: self.kind, namespace: namespace.into(), name: name.into(), cause })
    }

    /// The entry of `key`, with a live watch (or an immutable object's last state).
    fn entry(&self, key: &NamespacedName) -> (watch::Receiver<State<K>>, LastKnown<K>) {
        let now = Instant::now();
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get_mut(key) {
            entry.last_used = now;
            let settled = matches!(&*entry.state.borrow(), State::Known(Some(object)) if (self.is_immutable)(object));
            let trusted = settled && now.saturating_duration_since(entry.begun) < IMMUTABLE_TRUST;
            if trusted || entry.is_watching() {
                return (entry.state.clone(), entry.stale.clone());
            }
        }
        let stale = entries.remove(key).and_then(Entry::last_known);
        make_room(&mut entries, now);
        let (sender, state) = watch::channel(State::Pending);
        let only = WatchParams::default().fields(&format!("metadata.name={}", key.name));
        let path = K::url_path(&(), Some(&key.namespace));
        let followed = Followed { sender, listed: Mutex::default(), is_immutable: self.is_immutable };
        let task = tokio::spawn(follow(self.client.clone(), path, only, Arc::new(followed))).abort_handle();
        let entry = Entry { state: state.clone(), stale: stale.clone(), task: Some(task), begun: now, last_used: now };
        entries.insert(key.clone(), entry);
        (state, stale)
    }
}

impl<K> Drop for Watched<K> {
    fn drop(&mut self) {
        for entry in self.entries.lock().values_mut() {
            entry.stop();
        }
    }
}

/// The object once the watch has listed it; `None` if the API keeps refusing.
async fn first_answer<K>(state: &mut watch::Receiver<State<K>>) -> LastKnown<K> {
    let known = |state: &State<K>| match state {
        State::Known(object) => Some(object.clone()),
        State::Pending | State::Refused(_) => None,
    };
    let answer = known(&*state.wait_for(|state| !matches!(state, State::Pending)).await.ok()?);
    if answer.is_some() {
        return answer;
    }
    let later = state.wait_for(|state| matches!(state, State::Known(_)));
    known(&*tokio::time::timeout(PATIENCE_REFUSED, later).await.ok()?.ok()?)
}

// === impl Entry ===

impl<K> Entry<K> {
    fn last_known(self) -> LastKnown<K> {
        match &*self.state.borrow() {
            State::Known(object) => Some(object.clone()),
            State::Pending | State::Refused(_) => self.stale.clone(),
        }
    }

    fn is_watching(&self) -> bool {
        self.task.as_ref().is_some_and(|task| !task.is_finished())
    }

    fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

/// End idle watches; end the least recently used ones, and forget the least recently used objects, over the limits.
fn make_room<K>(entries: &mut HashMap<NamespacedName, Entry<K>>, now: Instant) {
    let mut by_use: Vec<(NamespacedName, Instant, bool)> =
        entries.iter().map(|(key, entry)| (key.clone(), entry.last_used, entry.is_watching())).collect();
    by_use.sort_by_key(|(_, last_used, _)| *last_used);
    let watching = by_use.iter().filter(|(_, _, watching)| *watching).count();
    let mut excess_watches = (watching + 1).saturating_sub(MAX_WATCHES);
    let mut excess = (by_use.len() + 1).saturating_sub(MAX_REMEMBERED);
    for (key, last_used, watching) in by_use {
        let idle = now.saturating_duration_since(last_used) > IDLE;
        if watching && (idle || excess_watches > 0) {
            excess_watches = excess_watches.saturating_sub(1);
            if let Some(entry) = entries.get_mut(&key) {
                entry.stop();
            }
        }
        if excess > 0 {
            excess -= 1;
            if let Some(mut entry) = entries.remove(&key) {
                entry.stop();
            }
        }
    }
}

/// Keeps `sender` at the object's present state, until that is final or nobody asks.
struct Followed<K> {
    sender: watch::Sender<State<K>>,
    /// What there was when the watch began.
    listed: Mutex<Option<Arc<K>>>,
    is_immutable: fn(&K) -> bool,
}

impl<K: Resource + DeserializeOwned + Send + Sync> Sink for Followed<K> {
    fn begin(&self) {
        self.listed.lock().take();
    }

    fn set(&self, object: &[u8], listed: bool) -> Version {
        let object: Arc<K> = Arc::new(lean::decode(object)?);
        let version = object.meta().resource_version.clone();
        if listed {
            *self.listed.lock() = Some(object);
        } else {
            self.sender.send_replace(State::Known(Some(object)));
        }
        Ok(version)
    }

    fn delete(&self, object: &[u8]) -> Version {
        self.sender.send_replace(State::Known(None));
        Ok(lean::decode::<K>(object)?.meta().resource_version.clone())
    }

    fn listed(&self) {
        self.sender.send_replace(State::Known(self.listed.lock().take()));
    }

    fn failed(&self, error: &kube::Error) {
        self.sender.send_if_modified(|state| match state {
            State::Known(_) => false,
            State::Pending | State::Refused(_) => {
                *state = State::Refused(super::explain(error));
                true
            }
        });
    }

    fn is_done(&self) -> bool {
        let is_final = |state: &State<K>| matches!(state, State::Known(Some(object)) if (self.is_immutable)(object));
        self.sender.is_closed() || is_final(&self.sender.borrow())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(age: Duration, now: Instant) -> Entry<()> {
        let (_, state) = watch::channel(State::Known(None));
        Entry { state, stale: None, task: None, begun: now - age, last_used: now - age }
    }

    #[test]
    fn the_least_recently_used_are_forgotten_first() {
        let now = Instant::now() + Duration::from_secs(10_000);
        let mut entries: HashMap<_, _> = (0..MAX_REMEMBERED as u64 + 5)
            .map(|age| (NamespacedName::new("ns", age.to_string()), entry(Duration::from_secs(age), now)))
            .collect();
        make_room(&mut entries, now);
        assert_eq!(entries.len(), MAX_REMEMBERED - 1);
        assert!(entries.contains_key(&NamespacedName::new("ns", "0")));
        assert!(!entries.contains_key(&NamespacedName::new("ns", (MAX_REMEMBERED + 4).to_string())));
    }
}
