//! Events for people: `kubectl describe` shows them. Recording never waits and never fails; when the API server is slow,
//! events are dropped, not the work.
//!
//! The same event again only raises its count. As client-go's `EventCorrelator`.
use crate::client::send;
use apimachinery::time::now;
use futures::{StreamExt as _, stream::FuturesUnordered};
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    jiff::Timestamp,
};
use kube::{
    Client, Resource as _,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher as _},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;
use tracing::debug;

/// Events waiting to be written.
const QUEUE_LENGTH: usize = 1000;
/// Events written at once: those that come together go out together.
const UNDER_WAY: usize = 16;
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

struct Known {
    name: String,
    count: i32,
    last: Instant,
}

/// The messages of late about one object for one reason.
struct Similar {
    messages: HashSet<u64>,
    last: Instant,
}

struct Bucket {
    tokens: u32,
    refilled: Instant,
}

/// What stands for a thing of which nothing but equality matters.
fn digest(thing: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    thing.hash(&mut hasher);
    hasher.finish()
}

async fn write(client: Client, source: EventSource, mut records: mpsc::Receiver<Record>) {
    let mut known: HashMap<u64, Known> = HashMap::new();
    let mut buckets: HashMap<u64, Bucket> = HashMap::new();
    let mut similar: HashMap<u64, Similar> = HashMap::new();
    let mut under_way = FuturesUnordered::new();
    let failed = |known: &mut HashMap<u64, Known>, key: Option<u64>| key.map(|key| known.remove(&key));
    loop {
        let mut record = tokio::select! {
            Some(key) = under_way.next() => {
                failed(&mut known, key);
                continue;
            }
            record = records.recv(), if under_way.len() < UNDER_WAY => match record {
                Some(record) => record,
                None => break,
            },
        };
        let object = &record.object;
        let about = digest((&object.kind, &object.namespace, &object.name, &object.uid));
        if !admit(&mut buckets, about) {
            continue;
        }
        let group = digest((about, &object.field_path, record.kind, &record.reason));
        let key = if are_many(&mut similar, group, digest(&record.message)) {
            record.message = format!("(combined from similar events): {}", record.message);
            group
        } else {
            digest((group, &record.message))
        };
        if known.len() >= REMEMBERED {
            known.retain(|_, k| k.last.elapsed() < FORGET_AFTER / 2);
            if known.len() >= REMEMBERED {
                known.clear();
            }
        }
        let namespace = record.object.namespace.as_deref().filter(|n| !n.is_empty()).unwrap_or("default").to_owned();
        let again = known.get_mut(&key).filter(|k| k.last.elapsed() < FORGET_AFTER).map(|seen| {
            seen.count += 1;
            seen.last = Instant::now();
            let patch = json!({"count": seen.count, "lastTimestamp": now(), "message": record.message});
            (seen.name.clone(), patch)
        });
        if again.is_some() {
            // The event must be there before it is counted.
            while let Some(key) = under_way.next().await {
                failed(&mut known, key);
            }
        }
        let made = again.is_none().then(|| new_event(&source, &record, &namespace));
        if let Some(made) = &made {
            let name = made.metadata.name.clone().unwrap_or_default();
            known.insert(key, Known { name, count: 1, last: Instant::now() });
        }
        let client = &client;
        under_way.push(async move {
            let outcome = match (again, &made) {
                (Some((name, patch)), _) => count(client, &namespace, &name, &patch).await,
                (None, Some(event)) => create(client, &namespace, event).await,
                (None, None) => return None,
            };
            let error = outcome.err()?;
            debug!(reason = record.reason, %error, "event not written");
            Some(key)
        });
    }
    while under_way.next().await.is_some() {}
}

async fn count(client: &Client, namespace: &str, name: &str, patch: &Value) -> Result<(), kube::Error> {
    let all = kube::core::Request::new(Event::url_path(&(), Some(namespace)));
    send(client, all.patch(name, &PatchParams::default(), &Patch::Merge(patch))).await.map(drop)
}

/// Nobody reads the answer.
async fn create(client: &Client, namespace: &str, event: &Event) -> Result<(), kube::Error> {
    let body = serde_json::to_vec(event).map_err(kube::Error::SerdeError)?;
    let all = kube::core::Request::new(Event::url_path(&(), Some(namespace)));
    send(client, all.create(&PostParams::default(), body)).await.map(drop)
}

/// Whether there are so many messages for one reason that they become one event.
fn are_many(all: &mut HashMap<u64, Similar>, group: u64, message: u64) -> bool {
    if all.len() >= REMEMBERED {
        all.retain(|_, one| one.last.elapsed() < FORGET_AFTER / 2);
        if all.len() >= REMEMBERED {
            all.clear();
        }
    }
    let fresh = || Similar { messages: HashSet::new(), last: Instant::now() };
    let one = all.entry(group).or_insert_with(fresh);
    if one.last.elapsed() >= FORGET_AFTER {
        *one = fresh();
    }
    one.last = Instant::now();
    if one.messages.len() < SIMILAR - 1 {
        one.messages.insert(message);
    }
    !one.messages.contains(&message)
}

/// A token for the object, if it has one left.
fn admit(buckets: &mut HashMap<u64, Bucket>, about: u64) -> bool {
    if buckets.len() >= REMEMBERED {
        buckets.clear();
    }
    let bucket = buckets.entry(about).or_insert(Bucket { tokens: BURST, refilled: Instant::now() });
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
        let mut all = HashMap::new();
        let many: Vec<bool> = (0..12).map(|message| are_many(&mut all, 0, message)).collect();
        assert_eq!(many, [[false; 9].as_slice(), &[true; 3]].concat());
        assert!(!are_many(&mut all, 0, 3), "one that was told before is counted as such");
        assert!(!are_many(&mut all, 1, 3));
    }

    #[test]
    fn an_object_that_floods_is_held_back_and_others_are_not() {
        let mut buckets = HashMap::new();
        let admitted = (0..100).filter(|_| admit(&mut buckets, 0)).count();
        assert_eq!(admitted, BURST as usize);
        assert!(admit(&mut buckets, 1));
    }
}
