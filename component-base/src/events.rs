//! Events for people: `kubectl describe` shows them. Recording never waits and never fails; when the API server is slow,
//! events are dropped, not the work.
//!
//! The same event again only raises its count. As client-go's `EventCorrelator`.
use apimachinery::time::now;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    jiff::Timestamp,
};
use kube::{
    Api, Client, Resource as _,
    api::{Patch, PatchParams, PostParams},
};
use serde::de::IgnoredAny;
use serde_json::json;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;
use tracing::debug;

/// Events waiting to be written.
const QUEUE_LENGTH: usize = 1000;
/// Events remembered for counting.
const REMEMBERED: usize = 4096;
/// After this an event that comes again is a new one.
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// From so many messages for one reason on, what comes is one event that is counted. As `EventAggregator`.
const SIMILAR: usize = 10;
/// Per object: so many events at once, then one each refill.
const BURST: u32 = 25;
const REFILL: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    Normal,
    Warning,
}

/// Writes events on behalf of one component. Clones share one queue.
#[derive(Clone, Debug)]
pub struct Recorder {
    queue: mpsc::Sender<Record>,
}

#[derive(Debug)]
struct Record {
    object: ObjectReference,
    kind: Type,
    reason: String,
    action: String,
    message: String,
}

impl Recorder {
    /// `host` is the node's name for components of a node, else empty. Must be called within a tokio runtime.
    pub fn new(client: Client, component: &str, host: &str) -> Self {
        let (queue, records) = mpsc::channel(QUEUE_LENGTH);
        let given = |s: &str| (!s.is_empty()).then(|| s.to_owned());
        let source = EventSource { component: given(component), host: given(host) };
        tokio::spawn(write(client, source, records));
        Self { queue }
    }

    /// A recorder whose events go nowhere, for tests of what records.
    pub fn discard() -> Self {
        Self { queue: mpsc::channel(1).0 }
    }

    /// `reason` is one CamelCase word; `action` what was done (may be empty); `message` is for a person.
    pub fn event(&self, object: &ObjectReference, kind: Type, reason: &str, action: &str, message: impl Into<String>) {
        let record = Record {
            object: object.clone(),
            kind,
            reason: reason.to_owned(),
            action: action.to_owned(),
            message: message.into(),
        };
        if let Err(error) = self.queue.try_send(record) {
            debug!(reason, %error, "event dropped");
        }
    }
}

/// What an event is about.
pub fn reference<K: kube::Resource<DynamicType = ()>>(object: &K) -> ObjectReference {
    let meta = object.meta();
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        field_path: None,
    }
}

// === the writer ===

type Key = (String, Type, String, String);

struct Known {
    name: String,
    count: i32,
    last: Instant,
}

/// The messages of late about one object for one reason.
struct Similar {
    messages: HashSet<String>,
    last: Instant,
}

struct Bucket {
    tokens: u32,
    refilled: Instant,
}

async fn write(client: Client, source: EventSource, mut records: mpsc::Receiver<Record>) {
    let mut known: HashMap<Key, Known> = HashMap::new();
    let mut buckets: BTreeMap<String, Bucket> = BTreeMap::new();
    let mut similar: HashMap<Key, Similar> = HashMap::new();
    while let Some(mut record) = records.recv().await {
        let object = &record.object;
        let about = format!("{:?}/{:?}/{:?}/{:?}", object.kind, object.namespace, object.name, object.uid);
        if !admit(&mut buckets, &about) {
            continue;
        }
        let mut key = (format!("{about}{:?}", object.field_path), record.kind, record.reason.clone(), String::new());
        if are_many(&mut similar, &key, &record.message) {
            record.message = format!("(combined from similar events): {}", record.message);
        } else {
            key.3.clone_from(&record.message);
        }
        let object = &record.object;
        if known.len() >= REMEMBERED {
            known.retain(|_, k| k.last.elapsed() < FORGET_AFTER / 2);
            if known.len() >= REMEMBERED {
                known.clear();
            }
        }
        let namespace = object.namespace.as_deref().filter(|n| !n.is_empty()).unwrap_or("default").to_owned();
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        let outcome = match known.get_mut(&key).filter(|k| k.last.elapsed() < FORGET_AFTER) {
            Some(seen) => {
                seen.count += 1;
                seen.last = Instant::now();
                let patch = json!({"count": seen.count, "lastTimestamp": now(), "message": record.message});
                api.patch(&seen.name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
            }
            None => {
                let event = new_event(&source, &record, &namespace);
                let name = event.metadata.name.clone().unwrap_or_default();
                known.insert(key.clone(), Known { name, count: 1, last: Instant::now() });
                create(&client, &namespace, &event).await
            }
        };
        if let Err(error) = outcome {
            debug!(reason = record.reason, %error, "event not written");
            known.remove(&key);
        }
    }
}

/// Nobody reads the answer.
async fn create(client: &Client, namespace: &str, event: &Event) -> Result<(), kube::Error> {
    let body = serde_json::to_vec(event).map_err(kube::Error::SerdeError)?;
    let all = kube::core::Request::new(Event::url_path(&(), Some(namespace)));
    let request = all.create(&PostParams::default(), body).map_err(kube::Error::BuildRequest)?;
    client.request::<IgnoredAny>(request).await.map(drop)
}

/// Whether there are so many messages for one reason that they become one event.
fn are_many(all: &mut HashMap<Key, Similar>, group: &Key, message: &str) -> bool {
    if all.len() >= REMEMBERED {
        all.retain(|_, one| one.last.elapsed() < FORGET_AFTER / 2);
        if all.len() >= REMEMBERED {
            all.clear();
        }
    }
    let fresh = || Similar { messages: HashSet::new(), last: Instant::now() };
    let one = all.entry(group.clone()).or_insert_with(fresh);
    if one.last.elapsed() >= FORGET_AFTER {
        *one = fresh();
    }
    one.last = Instant::now();
    if one.messages.len() < SIMILAR - 1 {
        one.messages.insert(message.to_owned());
    }
    !one.messages.contains(message)
}

/// A token for the object, if it has one left.
fn admit(buckets: &mut BTreeMap<String, Bucket>, about: &str) -> bool {
    if buckets.len() >= REMEMBERED {
        buckets.clear();
    }
    let bucket = buckets.entry(about.to_owned()).or_insert(Bucket { tokens: BURST, refilled: Instant::now() });
    while bucket.tokens < BURST && bucket.refilled.elapsed() >= REFILL {
        bucket.tokens += 1;
        bucket.refilled += REFILL;
    }
    if bucket.tokens == BURST {
        bucket.refilled = Instant::now();
    }
    bucket.tokens.checked_sub(1).map(|left| bucket.tokens = left).is_some()
}

fn new_event(source: &EventSource, record: &Record, namespace: &str) -> Event {
    let about = record.object.name.as_deref().unwrap_or_default();
    let mut event = Event {
        involved_object: record.object.clone(),
        type_: Some(format!("{:?}", record.kind)),
        reason: Some(record.reason.clone()),
        action: (!record.action.is_empty()).then(|| record.action.clone()),
        message: Some(record.message.chars().take(1024).collect()),
        source: Some(source.clone()),
        reporting_component: source.component.clone(),
        reporting_instance: source.host.clone(),
        first_timestamp: Some(now()),
        last_timestamp: Some(now()),
        count: Some(1),
        ..Event::default()
    };
    event.metadata.namespace = Some(namespace.to_owned());
    event.metadata.name = Some(format!("{about}.{:x}", Timestamp::now().as_nanosecond()));
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_messages_for_one_reason_become_one() {
        let (mut all, group) = (HashMap::new(), ("a".to_owned(), Type::Normal, "Created".to_owned(), String::new()));
        let many: Vec<bool> = (0..12).map(|pod| are_many(&mut all, &group, &format!("pod {pod}"))).collect();
        assert_eq!(many, [[false; 9].as_slice(), &[true; 3]].concat());
        assert!(!are_many(&mut all, &group, "pod 3"), "one that was told before is counted as such");
        let other = ("a".to_owned(), Type::Normal, "Deleted".to_owned(), String::new());
        assert!(!are_many(&mut all, &other, "pod 3"));
    }

    #[test]
    fn an_object_that_floods_is_held_back_and_others_are_not() {
        let mut buckets = BTreeMap::new();
        let admitted = (0..100).filter(|_| admit(&mut buckets, "a")).count();
        assert_eq!(admitted, BURST as usize);
        assert!(admit(&mut buckets, "b"));
    }
}
