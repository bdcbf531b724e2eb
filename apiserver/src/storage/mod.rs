//! The store: etcd behind, one watch cache a resource in front.
//!
//! `etcd.rs` speaks to etcd, `feed.rs` fills the caches from one watch over everything, `cache.rs` is a resource's state and
//! its watchers, `object.rs` an object's bytes, `keys.rs` where it lies. Writes go to etcd as compare-and-swap and come back
//! through the feed; nobody else changes a cache.

pub mod cache;
mod claims;
pub mod etcd;
mod feed;
pub mod keys;
pub mod object;

use crate::registry::Resource;
use apimachinery::status::StatusError;
use cache::{Cache, Objects, Snapshot};
use etcd::{Etcd, EtcdError, Stored, Swap};
pub use object::{Identity, StoredObject};
use parking_lot::Mutex;
use serde_json::Value;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a read waits for the caches to reach a revision.
const FRESH_WAIT: Duration = Duration::from_secs(3);
/// The newest revision comes through the watch by itself within this, unless something outside the prefix was written.
const FRESH_GRACE: Duration = Duration::from_millis(100);
/// Attempts of [`Store::guaranteed_update`].
const UPDATE_ATTEMPTS: usize = 20;
/// Objects that were written and have not come back through the feed.
const PENDING_MAX: usize = 4096;
/// Keys read from etcd at a time.
const PAGE: i64 = 1000;

/// The result of a conditional write.
#[derive(Debug)]
pub enum Put {
    Written(Arc<StoredObject>),
    /// Something else stands there; None: nothing does.
    Conflict(Option<Arc<StoredObject>>),
}

/// Gives an object's selectable fields, from its stored form.
type FieldsOf = Box<dyn Fn(&Value) -> Vec<(&'static str, String)> + Send + Sync>;

/// A resource's place in the store.
struct Room {
    cache: Cache,
    fields_of: FieldsOf,
}

/// An object on its way to etcd: when it comes back with a revision it need not be parsed again.
struct Pending {
    identity: Identity,
    bytes: Vec<u8>,
    built: Mutex<Option<Arc<StoredObject>>>,
}

/// See the module.
pub struct Store {
    etcd: Etcd,
    root: String,
    rooms: HashMap<String, Room>,
    prefix_of: HashMap<(String, String), String>,
    pending: Mutex<HashMap<String, Arc<Pending>>>,
    /// Every event up to here is in the caches. 0 before the first list.
    progress: watch::Sender<i64>,
    marking: tokio::sync::Mutex<()>,
    restart_feed: tokio::sync::Notify,
}

// === impl Store ===

impl Store {
    /// Rooms for all stored resources. Caches are empty until [`Store::run`] has filled them.
    pub fn new<'r>(etcd: Etcd, root: &str, resources: impl Iterator<Item = &'r Arc<Resource>>) -> Self {
        let mut rooms: HashMap<String, Room> = HashMap::new();
        let mut prefix_of = HashMap::new();
        for resource in resources.filter(|r| r.facts.is_stored()) {
            let key = (resource.gvr.group.clone(), resource.gvr.resource.clone());
            prefix_of.insert(key, resource.storage_prefix.clone());
            // The stored version knows best how to read what is stored.
            if resource.api_version == resource.stored_api_version || !rooms.contains_key(&resource.storage_prefix) {
                let strategy = resource.strategy.clone();
                let fields_of: FieldsOf = Box::new(move |value| strategy.selectable_fields(value));
                rooms.insert(resource.storage_prefix.clone(), Room { cache: Cache::default(), fields_of });
            }
        }
        Self {
            etcd,
            root: root.trim_end_matches('/').to_owned(),
            rooms,
            prefix_of,
            pending: Mutex::default(),
            progress: watch::Sender::new(0),
            marking: tokio::sync::Mutex::default(),
            restart_feed: tokio::sync::Notify::new(),
        }
    }

    /// Keeps the caches filled until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = feed::run(self) => {}
        }
    }

    /// Waits until the caches are filled for the first time.
    pub async fn loaded(&self) {
        // The sender lives as long as we do.
        let _ = self.progress.subscribe().wait_for(|revision| *revision > 0).await;
    }

    /// The cache of a resource.
    pub fn cache(&self, resource: &Resource) -> Result<&Cache, StatusError> {
        self.room(resource).map(|room| &room.cache)
    }

    /// The cache of a resource by its group and plural name, in whatever version.
    pub fn cache_of(&self, group: &str, resource: &str) -> Option<&Cache> {
        let prefix = self.prefix_of.get(&(group.to_owned(), resource.to_owned()))?;
        self.rooms.get(prefix).map(|room| &room.cache)
    }

    fn room(&self, resource: &Resource) -> Result<&Room, StatusError> {
        self.rooms.get(&resource.storage_prefix).ok_or_else(StatusError::no_such_resource)
    }

    fn full_key(&self, resource: &Resource, namespace: &str, name: &str) -> String {
        keys::full_key(&self.root, &resource.storage_prefix, &keys::object_key(namespace, name))
    }

    /// Every event up to this revision is in the caches.
    pub fn progress(&self) -> i64 {
        *self.progress.borrow()
    }

    /// Waits until the caches hold everything up to `revision`; None asks etcd for the newest. Gives what is reached.
    pub async fn wait_for(&self, revision: Option<i64>) -> Result<i64, StatusError> {
        let (target, known_to_exist) = match revision {
            Some(revision) if revision <= self.progress() => return Ok(self.progress()),
            Some(revision) => (revision, false),
            None => (self.etcd.revision().await?, true),
        };
        if self.reached(target, FRESH_GRACE).await {
            return Ok(self.progress());
        }
        // Either the watch is slow, or the revision was made outside our prefix and will never come through it. A mark of our
        // own tells: it comes behind everything else. (A progress request would do, but before 3.4.25 etcd may answer it
        // ahead of events.)
        if known_to_exist {
            let _one_at_a_time = self.marking.lock().await;
            if self.progress() < target {
                self.etcd.put_always(&format!("{}/pilothouse/progress", self.root), b"{}").await?;
            }
        }
        if self.reached(target, FRESH_WAIT).await {
            return Ok(self.progress());
        }
        if known_to_exist {
            self.restart_feed.notify_one();
            return Err(StatusError::service_unavailable("the watch cache does not keep up").retry_after(1));
        }
        let current = self.progress();
        let message = format!("Too large resource version: {target}, current: {current}");
        Err(StatusError::timeout(message).retry_after(1).with_cause(
            "ResourceVersionTooLarge",
            "Too large resource version",
            None,
        ))
    }

    async fn reached(&self, revision: i64, within: Duration) -> bool {
        let mut progress = self.progress.subscribe();
        matches!(tokio::time::timeout(within, progress.wait_for(|r| *r >= revision)).await, Ok(Ok(_)))
    }

    /// The newest version of an object.
    pub async fn get(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
    ) -> Result<Arc<StoredObject>, StatusError> {
        self.wait_for(None).await?;
        self.get_cached(resource, namespace, name)
    }

    /// The object as the cache has it.
    pub fn get_cached(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
    ) -> Result<Arc<StoredObject>, StatusError> {
        self.cache(resource)?
            .get(namespace, name)
            .ok_or_else(|| StatusError::not_found(&resource.gvr.group, &resource.gvr.resource, name))
    }

    /// The state of a resource as of a revision that may lie in the past.
    pub async fn snapshot_at(&self, resource: &Resource, revision: i64) -> Result<Snapshot, StatusError> {
        self.wait_for(Some(revision)).await?;
        let room = self.room(resource)?;
        match room.cache.snapshot_at(revision) {
            Ok(snapshot) => Ok(snapshot),
            Err(_) => {
                let (objects, _) = self.read_prefix(room, &resource.storage_prefix, revision).await?;
                Ok(Snapshot { objects, revision })
            }
        }
    }

    /// Creates an object, given in its served version. `Conflict` if it exists.
    pub async fn create(&self, resource: &Resource, object: &Value) -> Result<Put, StatusError> {
        self.put(resource, object, 0).await
    }

    /// Writes an object, given in its served version, if what stands there has this revision (0: nothing stands there).
    pub async fn put(&self, resource: &Resource, object: &Value, expected: i64) -> Result<Put, StatusError> {
        let room = self.room(resource)?;
        let stored_form = resource.to_stored(object);
        let bytes = object::encode(&stored_form);
        let identity = Identity::of(&stored_form, (room.fields_of)(&stored_form));
        let key = self.full_key(resource, &identity.namespace, &identity.name);
        let lease = match resource.strategy.time_to_live(&stored_form) {
            Some(seconds) => self.etcd.lease(seconds).await?,
            None => 0,
        };
        let pending = Arc::new(Pending { identity, bytes, built: Mutex::default() });
        {
            let mut all = self.pending.lock();
            if all.len() < PENDING_MAX {
                all.insert(key.clone(), pending.clone());
            }
        }
        let outcome = self.etcd.put(&key, &pending.bytes, expected, lease).await;
        if !matches!(outcome, Ok(Swap::Done { .. })) {
            self.forget_pending(&key, &pending);
        }
        match outcome? {
            Swap::Done { revision } => Ok(Put::Written(pending.build(revision, expected == 0))),
            Swap::Differs(current) => Ok(Put::Conflict(current.map(|stored| self.parse(room, &key, stored)))),
        }
    }

    /// Deletes an object that has this revision. Gives the revision of the deletion, or what stands there instead.
    pub async fn delete(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        expected: i64,
    ) -> Result<Result<i64, Option<Arc<StoredObject>>>, StatusError> {
        let room = self.room(resource)?;
        let key = self.full_key(resource, namespace, name);
        match self.etcd.delete(&key, expected).await? {
            Swap::Done { revision } => Ok(Ok(revision)),
            Swap::Differs(current) => Ok(Err(current.map(|stored| self.parse(room, &key, stored)))),
        }
    }

    /// The object straight from etcd, past the cache.
    pub async fn get_uncached(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Arc<StoredObject>>, StatusError> {
        let room = self.room(resource)?;
        let key = self.full_key(resource, namespace, name);
        Ok(self.etcd.get(&key).await?.map(|stored| self.parse(room, &key, stored)))
    }

    /// Reads, changes and writes an object until nobody came between. `change` sees the served version; it answers whether
    /// it changed anything. Goes past admission and strategy: for what the server itself keeps.
    pub async fn guaranteed_update(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        mut change: impl FnMut(&mut Value) -> Result<bool, StatusError>,
    ) -> Result<Arc<StoredObject>, StatusError> {
        let gvr = &resource.gvr;
        let mut current = match self.get_cached(resource, namespace, name) {
            Ok(object) => object,
            Err(_) => self.get(resource, namespace, name).await?,
        };
        for _ in 0..UPDATE_ATTEMPTS {
            let mut value = resource.value(&current);
            if !change(&mut value)? {
                return Ok(current);
            }
            match self.put(resource, &value, current.revision).await? {
                Put::Written(object) => return Ok(object),
                Put::Conflict(Some(other)) => current = other,
                Put::Conflict(None) => return Err(StatusError::not_found(&gvr.group, &gvr.resource, name)),
            }
        }
        Err(StatusError::stale(&gvr.group, &gvr.resource, name))
    }

    /// Says for `ttl_seconds` and a little more that `name` is there, below a prefix that is no resource's; gives all that
    /// are. As kube-apiserver's master leases.
    pub async fn announce(
        &self,
        prefix: &str,
        name: &str,
        value: &Value,
        ttl_seconds: i64,
    ) -> Result<Vec<String>, StatusError> {
        let start = format!("{}/{prefix}/", self.root);
        let key = format!("{start}{name}");
        let lease = self.etcd.lease(ttl_seconds).await?;
        let current = self.etcd.get(&key).await?.map_or(0, |stored| stored.mod_revision);
        // Who else writes our name says the same.
        self.etcd.put(&key, value.to_string().as_bytes(), current, lease).await?;
        let (all, _, _) = self.etcd.page(start.as_bytes(), &keys::range_end(&start), 0, PAGE).await?;
        Ok(all.iter().filter_map(|stored| stored.key.strip_prefix(&start)).map(ToOwned::to_owned).collect())
    }

    /// Forgets revisions older than the time between two calls, together with other apiservers. As kube-apiserver's compactor.
    pub async fn run_compactor(self: Arc<Self>, every: Duration, shutdown: CancellationToken) {
        let mut remembered = (0_i64, 0_i64);
        loop {
            tokio::select! {
                () = tokio::time::sleep(every) => {}
                () = shutdown.cancelled() => return,
            }
            remembered = match self.compact(remembered).await {
                Ok(next) => next,
                Err(error) => {
                    tracing::warn!(%error, "cannot compact etcd's history");
                    remembered
                }
            };
        }
    }

    /// `compact_rev_key` has a version that counts compactions: who raises it compacts, who cannot has been forestalled.
    async fn compact(&self, (key_revision, target): (i64, i64)) -> Result<(i64, i64), EtcdError> {
        let now = self.etcd.revision().await?;
        match self.etcd.put("compact_rev_key", target.to_string().as_bytes(), key_revision, 0).await? {
            Swap::Done { revision } => {
                if target > 0 {
                    self.etcd.compact(target).await?;
                    tracing::debug!(revision = target, "compacted etcd's history");
                }
                Ok((revision, now))
            }
            Swap::Differs(current) => Ok((current.map_or(0, |stored| stored.mod_revision), now)),
        }
    }

    /// How many objects of each resource there are.
    pub fn counts(&self) -> impl Iterator<Item = (String, usize)> {
        self.prefix_of.iter().filter_map(|((group, resource), prefix)| {
            let room = self.rooms.get(prefix)?;
            let count = room.cache.snapshot().objects.len();
            Some((apimachinery::meta::group_resource(group, resource), count))
        })
    }

    fn forget_pending(&self, key: &str, pending: &Arc<Pending>) {
        let mut all = self.pending.lock();
        if all.get(key).is_some_and(|p| Arc::ptr_eq(p, pending)) {
            all.remove(key);
        }
    }

    /// From etcd's bytes; what was just written by us is known already.
    fn parse(&self, room: &Room, full_key: &str, stored: Stored) -> Arc<StoredObject> {
        let created = stored.create_revision == stored.mod_revision;
        let pending = {
            let mut all = self.pending.lock();
            let same = all.get(full_key).is_some_and(|p| p.bytes == stored.value);
            if same { all.remove(full_key) } else { None }
        };
        if let Some(pending) = pending {
            return pending.build(stored.mod_revision, created);
        }
        let (value, bytes) = object::read(full_key, stored.value);
        let identity = Identity::of(&value, (room.fields_of)(&value));
        Arc::new(StoredObject::new(identity, &bytes, stored.mod_revision, created))
    }

    /// All objects below a prefix as of a revision (0: now), and that revision.
    async fn read_prefix(&self, room: &Room, prefix: &str, revision: i64) -> Result<(Objects, i64), EtcdError> {
        let start = format!("{}/{prefix}/", self.root);
        let end = keys::range_end(&start);
        let mut objects = Objects::new();
        let (mut from, mut revision) = (start.clone().into_bytes(), revision);
        loop {
            let (page, at, more) = self.etcd.page(&from, &end, revision, PAGE).await?;
            revision = at;
            if let Some(last) = page.last() {
                from = [last.key.as_bytes(), b"\0"].concat();
            }
            for stored in page {
                let full = stored.key.clone();
                if let Some(key) = full.strip_prefix(&start) {
                    objects.insert(key.into(), self.parse(room, &full, stored));
                }
            }
            if !more {
                return Ok((objects, revision));
            }
        }
    }
}

// === impl Pending ===

impl Pending {
    /// The object with its revision; the same one for all who ask.
    fn build(&self, revision: i64, created: bool) -> Arc<StoredObject> {
        let mut built = self.built.lock();
        match &*built {
            Some(object) if object.revision == revision => object.clone(),
            _ => {
                let object = Arc::new(StoredObject::new(self.identity.clone(), &self.bytes, revision, created));
                *built = Some(object.clone());
                object
            }
        }
    }
}
