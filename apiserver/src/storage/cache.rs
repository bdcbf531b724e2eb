//! The watch cache of one resource: an ordered map of its objects, the latest events, and who wants to hear of new ones.
//!
//! One writer (the feed) applies events in etcd's order. A reader takes a snapshot (the map is persistent: that is a matter of
//! a moment) and waits for nobody after that. The ring of events serves watches that begin in the past, and lists of the past
//! by taking events back. Nothing here does I/O.
//!
//! Invariants: the ring holds every event after `ring_start`; the map is the state after the last event; a subscriber's
//! queue holds, in order, every event after the one it began at that its [`Scope`] does not rule out, or is closed.

use super::index::LabelIndex;
use super::object::StoredObject;
use apimachinery::labels::Selector;
use bytes::Bytes;
use imbl::OrdMap;
use parking_lot::{Mutex, RwLock};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, OnceLock};
use tokio::sync::mpsc;

/// Events kept for watches that begin in the past, and how much memory they may hold that nothing else would.
const RING_EVENTS_MAX: usize = 10_000;
const RING_BYTES_MAX: usize = 16 << 20;
/// This many are kept however big they are.
const RING_EVENTS_MIN: usize = 100;
/// Events that may wait for one watcher before it is dropped.
const WATCHER_QUEUE: usize = 4096;
/// The field by which watchers are told apart: kubelets watch the pods of their node.
const INDEXED_FIELD: &str = "spec.nodeName";

pub type Objects = OrdMap<Arc<str>, Arc<StoredObject>>;

/// A change of one object.
#[derive(Debug)]
pub struct Event {
    pub revision: i64,
    pub key: Arc<str>,
    /// None when it was deleted.
    pub object: Option<Arc<StoredObject>>,
    pub previous: Option<Arc<StoredObject>>,
    deleted: OnceLock<Bytes>,
    deleted_protobuf: OnceLock<Option<Bytes>>,
}

/// The state of a resource after an event.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub objects: Objects,
    /// Of the last event, or of the list that the state began with.
    pub revision: i64,
}

/// What a watcher can want at most: events outside are not brought to it. It filters the rest itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Empty for all.
    pub namespace: String,
    pub name: Option<String>,
    /// The value of `spec.nodeName`.
    pub node_name: Option<String>,
}

/// A watcher's place in the cache: what to begin with, then the queue. Dropping it unsubscribes.
#[derive(Debug)]
pub struct Subscription {
    /// Events after the revision asked for, that happened before now.
    pub backlog: VecDeque<Arc<Event>>,
    pub queue: mpsc::Receiver<Arc<Event>>,
}

/// The revision asked for lies before what is kept.
#[derive(Debug, PartialEq, Eq)]
pub struct TooOld {
    pub oldest: i64,
}

/// See the module.
#[derive(Default)]
pub struct Cache {
    /// Changed under `feed`'s lock only, and never locked for long.
    state: RwLock<State>,
    feed: Mutex<Feed>,
}

#[derive(Default)]
struct State {
    current: Snapshot,
    labels: LabelIndex,
}

#[derive(Default)]
struct Feed {
    ring: VecDeque<Arc<Event>>,
    ring_start: i64,
    ring_bytes: usize,
    subscribers: Subscribers,
}

#[derive(Default)]
struct Subscribers {
    all: Vec<mpsc::Sender<Arc<Event>>>,
    by_namespace: HashMap<String, Vec<mpsc::Sender<Arc<Event>>>>,
    by_key: HashMap<String, Vec<mpsc::Sender<Arc<Event>>>>,
    by_node: HashMap<String, Vec<mpsc::Sender<Arc<Event>>>>,
    /// Nobody is served any more.
    closed: bool,
}

// === impl Event ===

impl Event {
    fn node(object: Option<&Arc<StoredObject>>) -> Option<&str> {
        object.and_then(|o| o.identity.field(INDEXED_FIELD))
    }

    /// The memory that only this event holds: the object as it was.
    fn size(&self) -> usize {
        self.previous.as_ref().map_or(0, |o| o.size())
    }

    /// The frame for those to whom it is gone: as it was last, at the revision of this event.
    pub fn deleted_frame(&self) -> Bytes {
        let frame = || self.previous.as_ref().map_or_else(Bytes::new, |old| old.deleted_frame(self.revision));
        self.deleted.get_or_init(frame).clone()
    }

    /// The same for those who read protobuf; None if the object is of no known kind.
    pub fn deleted_protobuf_frame(&self) -> Option<Bytes> {
        let frame = || self.previous.as_ref().and_then(|old| old.deleted_protobuf_frame(self.revision));
        self.deleted_protobuf.get_or_init(frame).clone()
    }

    pub fn namespace(&self) -> &str {
        self.object.as_ref().or(self.previous.as_ref()).map_or("", |o| &o.identity.namespace)
    }
}

// === impl Cache ===

impl Cache {
    /// Begins anew from a full list: what came before is unknown, so every watcher is sent away.
    pub fn reset(&self, objects: Objects, revision: i64) {
        let mut feed = self.feed.lock();
        let subscribers = Subscribers { closed: feed.subscribers.closed, ..Subscribers::default() };
        *feed = Feed { ring_start: revision, subscribers, ..Feed::default() };
        let mut labels = LabelIndex::default();
        for (key, object) in &objects {
            labels.replace(key, None, Some(&object.identity));
        }
        *self.state.write() = State { current: Snapshot { objects, revision }, labels };
    }

    /// Applies events in order. An event that is no news (its revision lies before what is known) is passed over.
    pub fn apply(&self, changes: impl IntoIterator<Item = (Arc<str>, i64, Option<Arc<StoredObject>>)>) {
        let mut feed = self.feed.lock();
        for (key, revision, object) in changes {
            let event = self.state.write().apply(key, revision, object, feed.ring_start);
            if let Some(event) = event {
                feed.remember(event);
            }
        }
    }

    /// Sends every watcher away, and those that come later.
    pub fn close(&self) {
        self.feed.lock().subscribers = Subscribers { closed: true, ..Subscribers::default() };
    }

    pub fn snapshot(&self) -> Snapshot {
        self.state.read().current.clone()
    }

    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<StoredObject>> {
        self.state.read().current.objects.get(super::keys::object_key(namespace, name).as_str()).cloned()
    }

    pub fn len(&self) -> usize {
        self.state.read().current.objects.len()
    }

    /// All objects, or those of a namespace.
    pub fn list(&self, namespace: &str) -> Vec<Arc<StoredObject>> {
        let snapshot = self.snapshot();
        in_namespace(&snapshot.objects, namespace).map(|(_, object)| object.clone()).collect()
    }

    /// The state, and the keys that a list by labels can be confined to, if those are few.
    pub fn snapshot_for(&self, labels: &Selector) -> (Snapshot, Option<Vec<Arc<str>>>) {
        let state = self.state.read();
        let keys = (!labels.is_empty()).then(|| state.labels.candidates(labels, state.current.objects.len()));
        (state.current.clone(), keys.flatten())
    }

    /// Changes whenever an object does: what is computed from the objects can be kept with it.
    pub fn revision(&self) -> i64 {
        self.state.read().current.revision
    }

    /// The state as of a revision, as far back as the events reach.
    pub fn snapshot_at(&self, revision: i64) -> Result<Snapshot, TooOld> {
        let feed = self.feed.lock();
        if revision < feed.ring_start {
            return Err(TooOld { oldest: feed.ring_start });
        }
        let mut objects = self.snapshot().objects;
        let events: Vec<Arc<Event>> = feed.ring.iter().rev().take_while(|e| e.revision > revision).cloned().collect();
        drop(feed);
        for event in events {
            match &event.previous {
                Some(previous) => objects.insert(event.key.clone(), previous.clone()),
                None => objects.remove(&event.key),
            };
        }
        Ok(Snapshot { objects, revision })
    }

    /// Events after `revision`, and all that come.
    pub fn subscribe(&self, revision: i64, scope: &Scope) -> Result<Subscription, TooOld> {
        let mut feed = self.feed.lock();
        if revision < feed.ring_start {
            return Err(TooOld { oldest: feed.ring_start });
        }
        let first = feed.ring.partition_point(|event| event.revision <= revision);
        let backlog = feed.ring.range(first..).filter(|event| scope.admits(event)).cloned().collect();
        let queue = feed.subscribers.add(scope);
        Ok(Subscription { backlog, queue })
    }

    /// The state now, and all events that come after it.
    pub fn snapshot_and_subscribe(&self, scope: &Scope) -> (Snapshot, Subscription) {
        let mut feed = self.feed.lock();
        let queue = feed.subscribers.add(scope);
        (self.snapshot(), Subscription { backlog: VecDeque::new(), queue })
    }
}

/// The objects of a namespace (all, if empty) in order of their keys.
pub fn in_namespace<'o>(
    objects: &'o Objects,
    namespace: &str,
) -> impl Iterator<Item = (&'o Arc<str>, &'o Arc<StoredObject>)> {
    from_key(objects, namespace, "")
}

/// The same from a key on (from the first, if empty).
pub fn from_key<'o>(
    objects: &'o Objects,
    namespace: &str,
    start: &str,
) -> impl Iterator<Item = (&'o Arc<str>, &'o Arc<StoredObject>)> {
    let (first, end): (Arc<str>, Option<Arc<str>>) = match namespace {
        "" => ("".into(), None),
        // '0' is the character behind '/'.
        namespace => ([namespace, "/"].concat().into(), Some([namespace, "0"].concat().into())),
    };
    let first = if *start > *first { start.into() } else { first };
    objects.range(first..).take_while(move |(key, _)| end.as_ref().is_none_or(|end| *key < end))
}

// === impl State, Feed ===

impl State {
    /// The event that a change is; None if it is no news.
    fn apply(
        &mut self,
        key: Arc<str>,
        revision: i64,
        object: Option<Arc<StoredObject>>,
        begun_at: i64,
    ) -> Option<Event> {
        let known = self.current.objects.get_key_value(&key).map(|(key, object)| (key.clone(), object.clone()));
        // The key is kept once, however often its object changes.
        let (key, previous) = match known {
            Some((known, previous)) => (known, Some(previous)),
            None => (key, None),
        };
        let known_at = previous.as_ref().map_or(begun_at, |p| p.revision);
        if revision <= known_at || (object.is_none() && previous.is_none()) {
            return None;
        }
        self.labels.replace(&key, previous.as_ref().map(|o| &o.identity), object.as_ref().map(|o| &o.identity));
        match &object {
            Some(object) => self.current.objects.insert(key.clone(), object.clone()),
            None => self.current.objects.remove(&key),
        };
        self.current.revision = self.current.revision.max(revision);
        Some(Event { revision, key, object, previous, deleted: OnceLock::new(), deleted_protobuf: OnceLock::new() })
    }
}

impl Feed {
    /// Tells who wants to know, and keeps it for who asks later.
    fn remember(&mut self, event: Event) {
        let event = Arc::new(event);
        self.subscribers.send(&event);
        self.ring_bytes += event.size();
        self.ring.push_back(event);
        while self.ring.len() > RING_EVENTS_MIN
            && (self.ring.len() > RING_EVENTS_MAX || self.ring_bytes > RING_BYTES_MAX)
        {
            let Some(oldest) = self.ring.pop_front() else { break };
            self.ring_start = oldest.revision;
            self.ring_bytes -= oldest.size();
        }
    }
}

// === impl Scope ===

impl Scope {
    fn admits(&self, event: &Event) -> bool {
        if !self.namespace.is_empty() && event.namespace() != self.namespace {
            return false;
        }
        if let Some(name) = &self.name {
            return event.key.rsplit('/').next() == Some(name);
        }
        match &self.node_name {
            Some(node) => {
                Event::node(event.object.as_ref()) == Some(node) || Event::node(event.previous.as_ref()) == Some(node)
            }
            None => true,
        }
    }
}

// === impl Subscribers ===

impl Subscribers {
    fn add(&mut self, scope: &Scope) -> mpsc::Receiver<Arc<Event>> {
        let (sender, receiver) = mpsc::channel(WATCHER_QUEUE);
        if self.closed {
            return receiver;
        }
        let list = match scope {
            Scope { namespace, name: Some(name), .. } => {
                self.by_key.entry(super::keys::object_key(namespace, name)).or_default()
            }
            Scope { node_name: Some(node), .. } => self.by_node.entry(node.clone()).or_default(),
            Scope { namespace, .. } if !namespace.is_empty() => self.by_namespace.entry(namespace.clone()).or_default(),
            _ => &mut self.all,
        };
        list.push(sender);
        receiver
    }

    fn send(&mut self, event: &Arc<Event>) {
        deliver(&mut self.all, event);
        deliver_keyed(&mut self.by_key, &event.key, event);
        // A watch of one name in all namespaces is kept under the bare name.
        if let Some((_, name)) = event.key.split_once('/') {
            deliver_keyed(&mut self.by_key, name, event);
        }
        deliver_keyed(&mut self.by_namespace, event.namespace(), event);
        if !self.by_node.is_empty() {
            let (new, old) = (Event::node(event.object.as_ref()), Event::node(event.previous.as_ref()));
            for node in [new, old.filter(|_| old != new)].into_iter().flatten() {
                deliver_keyed(&mut self.by_node, node, event);
            }
        }
    }
}

/// Puts an event into each queue; who is gone, or does not keep up, is taken out (its queue then ends).
fn deliver(list: &mut Vec<mpsc::Sender<Arc<Event>>>, event: &Arc<Event>) {
    list.retain(|sender| sender.try_send(event.clone()).is_ok());
}

fn deliver_keyed(map: &mut HashMap<String, Vec<mpsc::Sender<Arc<Event>>>>, key: &str, event: &Arc<Event>) {
    if let Some(list) = map.get_mut(key) {
        deliver(list, event);
        if list.is_empty() {
            map.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::object::{Identity, encode};
    use proptest::prelude::*;
    use serde_json::json;

    fn object(key: &str, node: &str, revision: i64) -> Arc<StoredObject> {
        let (namespace, name) = key.split_once('/').unwrap_or(("", key));
        let value = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": name, "namespace": namespace}});
        let identity = Identity::of(&value, vec![("spec.nodeName", node.to_owned())]);
        Arc::new(StoredObject::new(identity, &encode(&value), revision, false))
    }

    fn put(cache: &Cache, key: &str, node: &str, revision: i64) {
        cache.apply([(key.into(), revision, Some(object(key, node, revision)))]);
    }

    fn drain(subscription: &mut Subscription) -> Vec<i64> {
        let mut revisions: Vec<i64> = subscription.backlog.drain(..).map(|e| e.revision).collect();
        while let Ok(event) = subscription.queue.try_recv() {
            revisions.push(event.revision);
        }
        revisions
    }

    #[test]
    fn a_watch_gets_what_its_scope_admits_from_backlog_and_queue_alike() {
        for (scope, expected) in [
            (Scope::default(), vec![2, 3, 4, 5, 6]),
            (Scope { namespace: "a".into(), ..Scope::default() }, vec![2, 4, 5, 6]),
            (Scope { namespace: "a".into(), name: Some("x".into()), ..Scope::default() }, vec![2, 4, 6]),
            (Scope { name: Some("x".into()), ..Scope::default() }, vec![2, 3, 4, 6]),
            (Scope { node_name: Some("n1".into()), ..Scope::default() }, vec![4, 5, 6]),
        ] {
            for subscribe_after in 1..=6 {
                let cache = Cache::default();
                cache.reset(Objects::new(), 1);
                let steps: [&dyn Fn(&Cache); 5] = [
                    &|c| put(c, "a/x", "", 2),
                    &|c| put(c, "b/x", "", 3),
                    &|c| put(c, "a/x", "n1", 4),
                    &|c| put(c, "a/y", "n1", 5),
                    &|c| c.apply([("a/x".into(), 6, None)]),
                ];
                let mut subscription = None;
                for (index, step) in steps.iter().enumerate() {
                    if index + 1 == subscribe_after {
                        subscription = cache.subscribe(1, &scope).ok();
                    }
                    step(&cache);
                }
                let mut subscription = subscription.unwrap_or_else(|| cache.subscribe(1, &scope).unwrap());
                assert_eq!(drain(&mut subscription), expected, "{scope:?} after {subscribe_after}");
            }
        }
    }

    #[test]
    fn a_watcher_that_does_not_keep_up_is_dropped_and_the_rest_go_on() {
        let cache = Cache::default();
        cache.reset(Objects::new(), 0);
        let mut slow = cache.subscribe(0, &Scope::default()).unwrap();
        for revision in 1..=(WATCHER_QUEUE as i64 + 1) {
            put(&cache, "a/x", "", revision);
        }
        let mut quick = cache.subscribe(WATCHER_QUEUE as i64 + 1, &Scope::default()).unwrap();
        put(&cache, "a/x", "", WATCHER_QUEUE as i64 + 2);
        assert_eq!(drain(&mut slow).len(), WATCHER_QUEUE);
        assert!(slow.queue.is_closed());
        assert_eq!(drain(&mut quick), [WATCHER_QUEUE as i64 + 2]);
    }

    #[test]
    fn what_is_no_longer_kept_is_too_old() {
        let cache = Cache::default();
        cache.reset(Objects::new(), 10);
        assert_eq!(cache.subscribe(9, &Scope::default()).unwrap_err(), TooOld { oldest: 10 });
        for revision in 11..=(11 + RING_EVENTS_MAX as i64) {
            put(&cache, "a/x", "", revision);
        }
        assert_eq!(cache.subscribe(10, &Scope::default()).unwrap_err(), TooOld { oldest: 11 });
        assert!(cache.subscribe(11, &Scope::default()).is_ok());
    }

    #[test]
    fn a_reset_sends_watchers_away() {
        let cache = Cache::default();
        cache.reset(Objects::new(), 1);
        let mut subscription = cache.subscribe(1, &Scope::default()).unwrap();
        cache.reset(Objects::new(), 5);
        assert!(subscription.queue.try_recv().is_err() && subscription.queue.is_closed());
    }

    #[test]
    fn a_namespace_is_a_range_of_keys() {
        let cache = Cache::default();
        for (revision, key) in ["a-b/x", "a/x", "a/y", "a0/x", "b/x"].iter().enumerate() {
            put(&cache, key, "", revision as i64 + 1);
        }
        let keys =
            |ns: &str| in_namespace(&cache.snapshot().objects, ns).map(|(k, _)| k.to_string()).collect::<Vec<_>>();
        assert_eq!(keys("a"), ["a/x", "a/y"]);
        assert_eq!(keys("").len(), 5);
    }

    proptest! {
        #[test]
        fn the_past_is_the_present_with_events_taken_back(
            changes in prop::collection::vec((0..4usize, any::<bool>()), 1..40), at in 0..40usize,
        ) {
            let cache = Cache::default();
            cache.reset(Objects::new(), 0);
            let mut states = vec![Vec::new()];
            for (index, (key, present)) in changes.iter().enumerate() {
                let key = format!("ns/{key}");
                let revision = index as i64 + 1;
                let new = present.then(|| object(&key, "", revision));
                cache.apply([(key.as_str().into(), revision, new)]);
                let snapshot = cache.snapshot();
                states.push(snapshot.objects.iter().map(|(k, o)| (k.clone(), o.revision)).collect());
            }
            let at = at.min(states.len() - 1);
            let past = cache.snapshot_at(at as i64).unwrap();
            let got: Vec<_> = past.objects.iter().map(|(k, o)| (k.clone(), o.revision)).collect();
            prop_assert_eq!(&got, &states[at]);
        }
    }
}
