//! Informers: one watch of a kind, the objects it has seen, and whoever wants to hear of changes.
//!
//! The store is complete once [`Informer::synced`] returns; from then on it is at most one watch event behind the
//! server. Handlers run in the informer's task, in order, after the store has changed; they must be quick (put a key in a
//! queue) and must not call [`Informer::on_change`].
use crate::{backoff::Backoff, lean::Lean};
use apimachinery::meta::NamespacedName;
use futures::{Stream, StreamExt as _};
use kube::{
    Api, Client, Resource,
    runtime::watcher::{self, Event},
};
use parking_lot::{Mutex, RwLock};
use serde::de::DeserializeOwned;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    sync::Arc,
    time::Duration,
};
use tokio::sync::watch;
use tracing::{debug, warn};

const RETRY_BASE: Duration = Duration::from_millis(200);
const RETRY_CAP: Duration = Duration::from_secs(5);

/// A shared, read-only view of the objects of one kind. Clones share one watch, which ends with the last of them.
pub struct Informer<K> {
    shared: Arc<Shared<K>>,
    _task: Arc<AbortOnDrop>,
}

/// What happened to one object: `old` absent means created, `new` absent means deleted.
#[derive(Debug)]
pub struct Change<'a, K> {
    pub old: Option<&'a Arc<K>>,
    pub new: Option<&'a Arc<K>>,
}

type Handler<K> = Box<dyn Fn(Change<'_, K>) + Send + Sync>;

struct Shared<K> {
    objects: RwLock<BTreeMap<NamespacedName, Arc<K>>>,
    /// Held while an event is applied and told, so that a handler that is added sees each object exactly once.
    handlers: Mutex<Vec<Handler<K>>>,
    synced: watch::Sender<bool>,
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

// === impl Change ===

impl<'a, K> Change<'a, K> {
    /// The newest state known: what it is now, or was last.
    pub fn latest(&self) -> Option<&'a Arc<K>> {
        self.new.or(self.old)
    }
}

// === impl Informer ===

impl<K> Clone for Informer<K> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), _task: self._task.clone() }
    }
}

impl<K> Informer<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    /// Starts to watch. Must be called within a tokio runtime.
    pub fn start(api: Api<K>, config: watcher::Config) -> Self {
        Self::start_with_transform(api, config, |_| {})
    }

    /// As [`Informer::start`]; `slim` takes away what nobody reads before an object is kept (`managedFields` always go).
    pub fn start_with_transform(api: Api<K>, config: watcher::Config, slim: fn(&mut K)) -> Self {
        Self::from_stream(watcher::watcher(api, config), slim)
    }
}

impl<K> Informer<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Default,
{
    /// Watches the objects of all namespaces, each decoded for itself and without what nobody reads: what is there
    /// already comes one by one as well, not as a list.
    pub fn start_lean(client: Client, config: watcher::Config, slim: fn(&mut K)) -> Self {
        let stream = watcher::watcher(Api::<Lean<K>>::all(client), config.streaming_lists());
        Self::from_stream(stream.map(|event| event.map(whole)), slim)
    }
}

/// The event of the object itself.
fn whole<K>(event: Event<Lean<K>>) -> Event<K> {
    match event {
        Event::Apply(Lean(object)) => Event::Apply(object),
        Event::Delete(Lean(object)) => Event::Delete(object),
        Event::Init => Event::Init,
        Event::InitApply(Lean(object)) => Event::InitApply(object),
        Event::InitDone => Event::InitDone,
    }
}

impl<K: Resource + Send + Sync + 'static> Informer<K> {
    /// From any stream of watcher events, for instance `kube::runtime::metadata_watcher`'s.
    pub fn from_stream(
        stream: impl Stream<Item = Result<Event<K>, watcher::Error>> + Send + 'static,
        slim: fn(&mut K),
    ) -> Self {
        let shared = Arc::new(Shared::new());
        let task = tokio::spawn(drive(shared.clone(), stream, slim));
        Self { shared, _task: Arc::new(AbortOnDrop(task)) }
    }

    /// `namespace` is empty for cluster-scoped objects.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.shared.objects.read().get(&NamespacedName::new(namespace, name)).cloned()
    }

    /// All objects, ordered by namespace and name.
    pub fn list(&self) -> Vec<Arc<K>> {
        self.shared.objects.read().values().cloned().collect()
    }

    pub fn list_in(&self, namespace: &str) -> Vec<Arc<K>> {
        let objects = self.shared.objects.read();
        let from = NamespacedName::new(namespace, "");
        objects.range(from..).take_while(|(key, _)| key.namespace == namespace).map(|(_, o)| o.clone()).collect()
    }

    pub fn len(&self) -> usize {
        self.shared.objects.read().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tells `handler` of every change from now on, the objects that are there already as creations first.
    pub fn on_change(&self, handler: impl Fn(Change<'_, K>) + Send + Sync + 'static) {
        let mut handlers = self.shared.handlers.lock();
        for object in self.list() {
            handler(Change { old: None, new: Some(&object) });
        }
        handlers.push(Box::new(handler));
    }

    /// Returns when the store holds all that was there at the first list.
    pub async fn synced(&self) {
        // The sender lives in `shared`, so this cannot fail.
        let _ = self.shared.synced.subscribe().wait_for(|synced| *synced).await;
    }

    pub fn is_synced(&self) -> bool {
        *self.shared.synced.borrow()
    }
}

async fn drive<K: Resource>(
    shared: Arc<Shared<K>>,
    stream: impl Stream<Item = Result<Event<K>, watcher::Error>>,
    slim: fn(&mut K),
) {
    futures::pin_mut!(stream);
    let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
    // The keys seen in the list under way: what is not among them at its end is gone.
    let mut listing: BTreeSet<NamespacedName> = BTreeSet::new();
    while let Some(event) = stream.next().await {
        let event = match event {
            Ok(event) => {
                backoff.reset();
                event
            }
            Err(error) => {
                let wait = backoff.next_wait();
                let retry_ms = wait.as_millis() as u64;
                if backoff.failures() > 3 {
                    warn!(kind = std::any::type_name::<K>(), %error, retry_ms, "watch failed");
                } else {
                    debug!(kind = std::any::type_name::<K>(), %error, retry_ms, "watch failed");
                }
                tokio::time::sleep(wait).await;
                continue;
            }
        };
        match event {
            Event::Init => listing.clear(),
            Event::InitApply(object) => {
                listing.insert(NamespacedName::of(&object));
                shared.put(object, slim);
            }
            Event::InitDone => {
                let gone: Vec<_> =
                    shared.objects.read().keys().filter(|key| !listing.contains(*key)).cloned().collect();
                gone.iter().for_each(|key| shared.remove(key));
                listing = BTreeSet::new();
                shared.synced.send_replace(true);
            }
            Event::Apply(object) => shared.put(object, slim),
            Event::Delete(object) => shared.remove(&NamespacedName::of(&object)),
        }
    }
}

// === impl Shared ===

impl<K> Shared<K> {
    fn new() -> Self {
        Self { objects: RwLock::default(), handlers: Mutex::default(), synced: watch::Sender::new(false) }
    }

    fn remove(&self, key: &NamespacedName) {
        let handlers = self.handlers.lock();
        let old = self.objects.write().remove(key);
        if let Some(old) = &old {
            handlers.iter().for_each(|handler| handler(Change { old: Some(old), new: None }));
        }
    }
}

impl<K: Resource> Shared<K> {
    fn put(&self, mut object: K, slim: fn(&mut K)) {
        object.meta_mut().managed_fields = None;
        slim(&mut object);
        let new = Arc::new(object);
        let handlers = self.handlers.lock();
        let old = self.objects.write().insert(NamespacedName::of(new.as_ref()), new.clone());
        let version = |o: &Arc<K>| o.meta().resource_version.clone();
        if old.as_ref().is_some_and(|old| version(old).is_some() && version(old) == version(&new)) {
            return;
        }
        handlers.iter().for_each(|handler| handler(Change { old: old.as_ref(), new: Some(&new) }));
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;
    use k8s_openapi::api::core::v1::ConfigMap;

    fn object(name: &str, version: u32) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.namespace = Some("ns".into());
        object.metadata.name = Some(name.into());
        object.metadata.resource_version = Some(version.to_string());
        object
    }

    #[tokio::test]
    async fn a_relist_removes_what_is_gone_and_does_not_repeat_what_is_unchanged() {
        let (events, stream) = futures::channel::mpsc::unbounded();
        let informer = Informer::from_stream(stream.chain(stream::pending()), |_| {});
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        informer.on_change(move |change| {
            let text = |o: Option<&Arc<ConfigMap>>| o.map(|o| o.metadata.resource_version.clone().unwrap());
            log.lock().push((text(change.old), text(change.new)));
        });
        let first = [Event::Init, Event::InitApply(object("a", 1)), Event::InitApply(object("b", 2)), Event::InitDone];
        let second = [Event::Init, Event::InitApply(object("a", 1)), Event::InitApply(object("c", 9)), Event::InitDone];
        let rest = [Event::Apply(object("a", 10)), Event::Delete(object("c", 9))];
        for event in first.into_iter().chain(second).chain(rest) {
            events.unbounded_send(Ok(event)).unwrap();
        }
        informer.synced().await;
        for _ in 0..100 {
            if seen.lock().len() == 6 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let s = |v: &str| Some(v.to_owned());
        let expected =
            [(None, s("1")), (None, s("2")), (None, s("9")), (s("2"), None), (s("1"), s("10")), (s("9"), None)];
        assert_eq!(*seen.lock(), expected);
        assert_eq!(informer.list_in("ns").len(), 1);
        assert!(informer.get("ns", "a").is_some() && informer.list_in("n").is_empty());
    }
}
