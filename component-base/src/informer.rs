//! Informers: one watch of a kind, the objects it has seen, and whoever wants to hear of changes.
//!
//! The store is complete once [`Informer::synced`] returns; from then on it is at most one watch event behind the
//! server. Handlers run in the informer's task, in order, after the store has changed; they must be quick (put a key in a
//! queue) and must not call [`Informer::on_change`].
use crate::{
    lean,
    watch::{self as api_watch, Sink, Version},
};
use apimachinery::meta::NamespacedName;
use kube::{Api, Client, Resource, api::WatchParams};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU64,
    sync::Arc,
};
use tokio::sync::watch;

/// A shared, read-only view of the objects of one kind. Clones share one watch, which ends with the last of them.
pub struct Informer<K> {
    shared: Arc<Shared<K>>,
    _task: Option<Arc<AbortOnDrop>>,
}

/// What happened to one object: `old` absent means created, `new` absent means deleted.
#[derive(Debug)]
pub struct Change<'a, K> {
    pub key: &'a NamespacedName,
    pub old: Option<&'a Arc<K>>,
    pub new: Option<&'a Arc<K>>,
}

type Handler<K> = Box<dyn Fn(Change<'_, K>) + Send + Sync>;

/// An object, or what is kept of it, with its version if that is a number: a list that shows it again is no change.
struct Kept<K> {
    version: Option<NonZeroU64>,
    object: Arc<K>,
}

struct Shared<K> {
    objects: RwLock<BTreeMap<NamespacedName, Kept<K>>>,
    /// Held while an event is applied and told, so that a handler that is added sees each object exactly once.
    handlers: Mutex<Vec<Handler<K>>>,
    synced: watch::Sender<bool>,
}

/// Through what, and at which path of the API.
type Watching = (Client, String);

fn watching<K: Resource>(api: Api<K>) -> Watching {
    let path = api.resource_url().to_owned();
    (api.into_client(), path)
}

/// What an object's text comes to: its name, its version, and what is kept of it.
type Read<V> = serde_json::Result<(NamespacedName, Option<String>, V)>;

/// Where a watch brings what is kept of objects.
struct Keeper<V> {
    shared: Arc<Shared<V>>,
    read: Box<dyn Fn(&[u8]) -> Read<V> + Send + Sync>,
    /// The keys seen in the list under way: what is not among them at its end is gone.
    listing: Mutex<BTreeSet<NamespacedName>>,
}

/// What is read of an object that was deleted.
#[derive(Deserialize)]
struct Gone {
    metadata: GoneMeta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct GoneMeta {
    #[serde(default)]
    namespace: String,
    name: String,
    resource_version: Option<String>,
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

impl<K: Resource + DeserializeOwned + Send + Sync + 'static> Informer<K> {
    /// Watches what `api` reaches. Must be called within a tokio runtime.
    pub fn start(api: Api<K>, selection: WatchParams) -> Self {
        Self::start_kept(api, selection, |object| object)
    }

    /// As [`Informer::start`]; `slim` takes away what nobody reads before an object is kept (`managedFields` always go).
    pub fn start_slim(api: Api<K>, selection: WatchParams, slim: fn(&mut K)) -> Self {
        Self::start_kept(api, selection, move |mut object| {
            slim(&mut object);
            object
        })
    }

    /// As [`Informer::start`]; `decode` makes of an object's text what is kept of it.
    pub fn start_decoded(api: Api<K>, selection: WatchParams, decode: fn(&[u8]) -> serde_json::Result<K>) -> Self {
        let read = move |text: &[u8]| {
            let object = decode(text)?;
            Ok((NamespacedName::of(&object), object.meta().resource_version.clone(), object))
        };
        Self::start_read(watching(api), selection, Box::new(read))
    }

    /// Has these objects, and never others.
    pub fn fixed(objects: impl IntoIterator<Item = K>) -> Self {
        let shared = Arc::new(Shared::new());
        for object in objects {
            shared.put(NamespacedName::of(&object), Kept { version: None, object: Arc::new(object) });
        }
        shared.synced.send_replace(true);
        Self { shared, _task: None }
    }
}

impl<V: Send + Sync + 'static> Informer<V> {
    /// As [`Informer::start`], for whom objects are too large: of each what `keep` makes of it is there.
    pub fn start_kept<K>(api: Api<K>, selection: WatchParams, keep: impl Fn(K) -> V + Send + Sync + 'static) -> Self
    where
        K: Resource + DeserializeOwned + 'static,
    {
        let read = move |text: &[u8]| {
            let object: K = lean::decode(text)?;
            Ok((NamespacedName::of(&object), object.meta().resource_version.clone(), keep(object)))
        };
        Self::start_read(watching(api), selection, Box::new(read))
    }

    fn start_read(api: Watching, selection: WatchParams, read: Box<dyn Fn(&[u8]) -> Read<V> + Send + Sync>) -> Self {
        let shared = Arc::new(Shared::new());
        let keeper = Keeper { shared: shared.clone(), read, listing: Mutex::default() };
        let task = tokio::spawn(api_watch::follow(api.0, api.1, selection, Arc::new(keeper)));
        Self { shared, _task: Some(Arc::new(AbortOnDrop(task))) }
    }

    /// `namespace` is empty for cluster-scoped objects.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<V>> {
        self.shared.objects.read().get(&NamespacedName::new(namespace, name)).map(|kept| kept.object.clone())
    }

    /// All objects, ordered by namespace and name.
    pub fn list(&self) -> Vec<Arc<V>> {
        self.shared.objects.read().values().map(|kept| kept.object.clone()).collect()
    }

    pub fn list_in(&self, namespace: &str) -> Vec<Arc<V>> {
        let objects = self.shared.objects.read();
        let from = NamespacedName::new(namespace, "");
        let within = objects.range(from..).take_while(|(key, _)| key.namespace == namespace);
        within.map(|(_, kept)| kept.object.clone()).collect()
    }

    pub fn len(&self) -> usize {
        self.shared.objects.read().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tells `handler` of every change from now on, the objects that are there already as creations first.
    pub fn on_change(&self, handler: impl Fn(Change<'_, V>) + Send + Sync + 'static) {
        let mut handlers = self.shared.handlers.lock();
        for (key, kept) in self.shared.objects.read().iter() {
            handler(Change { key, old: None, new: Some(&kept.object) });
        }
        handlers.push(Box::new(handler));
    }

    /// Returns when the store holds all that was there at the first list.
    pub async fn synced(&self) {
        // The sender lives in `shared`, so this cannot fail.
        let _ = self.sync_state().wait_for(|synced| *synced).await;
    }

    /// Becomes true as [`Informer::synced`] returns.
    pub fn sync_state(&self) -> watch::Receiver<bool> {
        self.shared.synced.subscribe()
    }

    pub fn is_synced(&self) -> bool {
        *self.shared.synced.borrow()
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
        if let Some(Kept { object: old, .. }) = &old {
            handlers.iter().for_each(|handler| handler(Change { key, old: Some(old), new: None }));
        }
    }

    fn put(&self, key: NamespacedName, kept: Kept<K>) {
        let (version, new) = (kept.version, kept.object.clone());
        let handlers = self.handlers.lock();
        let old = self.objects.write().insert(key.clone(), kept);
        if old.as_ref().is_some_and(|old| old.version.is_some() && old.version == version) {
            return;
        }
        let old = old.as_ref().map(|old| &old.object);
        handlers.iter().for_each(|handler| handler(Change { key: &key, old, new: Some(&new) }));
    }
}

// === impl Keeper ===

impl<V: Send + Sync> Sink for Keeper<V> {
    fn begin(&self) {
        self.listing.lock().clear();
    }

    fn set(&self, object: &[u8], listed: bool) -> Version {
        let (key, version, object) = (self.read)(object)?;
        if listed {
            self.listing.lock().insert(key.clone());
        }
        let number = version.as_ref().and_then(|version| version.parse().ok());
        self.shared.put(key, Kept { version: number, object: Arc::new(object) });
        Ok(version)
    }

    fn delete(&self, object: &[u8]) -> Version {
        let Gone { metadata: meta } = serde_json::from_slice(object)?;
        self.shared.remove(&NamespacedName::new(meta.namespace, meta.name));
        Ok(meta.resource_version)
    }

    fn listed(&self) {
        let listed = std::mem::take(&mut *self.listing.lock());
        let gone: Vec<_> = self.shared.objects.read().keys().filter(|key| !listed.contains(*key)).cloned().collect();
        gone.iter().for_each(|key| self.shared.remove(key));
        self.shared.synced.send_replace(true);
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
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;

    fn object(name: &str, version: u32) -> Vec<u8> {
        let metadata = json!({"namespace": "ns", "name": name, "resourceVersion": version.to_string(),
            "managedFields": [{"manager": "m"}]});
        json!({"metadata": metadata}).to_string().into_bytes()
    }

    #[test]
    fn a_relist_removes_what_is_gone_and_does_not_repeat_what_is_unchanged() {
        let informer = Informer::<ConfigMap>::fixed([]);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        informer.on_change(move |change| {
            let text = |o: Option<&Arc<ConfigMap>>| o.map(|o| o.metadata.resource_version.clone().unwrap());
            assert!(change.latest().unwrap().metadata.managed_fields.is_none());
            log.lock().push((text(change.old), text(change.new)));
        });
        let read = Box::new(|text: &[u8]| {
            let object: ConfigMap = lean::decode(text)?;
            Ok((NamespacedName::of(&object), object.metadata.resource_version.clone(), object))
        });
        let sink = Keeper { shared: informer.shared.clone(), read, listing: Mutex::default() };
        for list in [[("a", 1), ("b", 2)], [("a", 1), ("c", 9)]] {
            sink.begin();
            for (name, version) in list {
                assert_eq!(sink.set(&object(name, version), true).unwrap(), Some(version.to_string()));
            }
            sink.listed();
        }
        sink.set(&object("a", 10), false).unwrap();
        assert_eq!(informer.list_in("ns").len(), 2);
        assert_eq!(sink.delete(&object("c", 11)).unwrap(), Some("11".to_owned()));
        let s = |v: &str| Some(v.to_owned());
        let expected =
            [(None, s("1")), (None, s("2")), (None, s("9")), (s("2"), None), (s("1"), s("10")), (s("9"), None)];
        assert_eq!(*seen.lock(), expected);
        assert_eq!(informer.list_in("ns").len(), 1);
        assert!(informer.get("ns", "a").is_some() && informer.list_in("n").is_empty());
        assert!(sink.set(b"{", false).is_err());
    }
}
