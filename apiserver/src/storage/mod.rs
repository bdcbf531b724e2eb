//! The store: etcd behind, one watch cache a resource in front.
//!
//! `etcd.rs` speaks to etcd, `feed.rs` fills the caches from one watch over everything, `cache.rs` is a resource's state and
//! its watchers, `index.rs` finds objects by label, `object.rs` is an object's
//! bytes, `keys.rs` where it lies. Writes go to etcd as compare-and-swap and come back
//! through the feed; nobody else changes a cache.

pub mod cache;
mod claims;
pub mod etcd;
mod feed;
mod index;
pub mod keys;
pub mod object;

use crate::registry::Resource;
use apimachinery::status::StatusError;
use cache::{Cache, Snapshot};
use etcd::{Etcd, EtcdError, Stored, Swap};
pub use object::{Identity, StoredObject};
use parking_lot::Mutex;
use serde_json::Value;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a read waits for the caches to reach a revision.
const FRESH_WAIT: Duration = Duration::from_secs(3);
/// The newest revision comes through the watch by itself within this, unless something outside the prefix was written.
const FRESH_GRACE: Duration = Duration::from_millis(100);
/// The same where asking costs next to nothing, and how often it is asked.
const PROGRESS_GRACE: Duration = Duration::from_millis(10);
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// Where the apiservers over one etcd agree who compacts it, and up to where.
const COMPACT_KEY: &str = "compact_rev_key";
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
    bytes: Vec<u8>,
    object: Mutex<Building>,
}

enum Building {
    Waits(Identity),
    Is(Arc<StoredObject>),
}

/// See the module.
pub struct Store {
    etcd: Etcd,
    root: String,
    rooms: HashMap<String, Room>,
    /// By the plural name, with its group.
    prefix_of: HashMap<String, Vec<(String, String)>>,
    pending: Mutex<HashMap<String, Arc<Pending>>>,
    /// Every event up to here is in the caches. 0 before the first list.
    progress: watch::Sender<i64>,
    marking: tokio::sync::Mutex<()>,
    restart_feed: tokio::sync::Notify,
    ask_progress: tokio::sync::Notify,
    /// History before this is gone, for lists of the past at least.
    compacted: AtomicI64,
}

/// A page of a list of the past.
pub struct Page {
    pub objects: Vec<Arc<StoredObject>>,
    /// The key of the last object, if there are more behind it.
    pub last_key: Option<String>,
    /// How many lie behind the last one, selected or not.
    pub behind: i64,
}

/// An object that is waited for in `pending`, as long as its writer waits.
struct Awaited<'s> {
    store: &'s Store,
    key: String,
    pending: Arc<Pending>,
    written: bool,
}

// === impl Store ===

impl Store {
    /// Rooms for all stored resources. Caches are empty until [`Store::run`] has filled them.
    pub fn new<'r>(etcd: Etcd, root: &str, resources: impl Iterator<Item = &'r Arc<Resource>>) -> Self {
        let mut rooms: HashMap<String, Room> = HashMap::new();
        let mut prefix_of: HashMap<String, Vec<(String, String)>> = HashMap::new();
        for resource in resources.filter(|r| r.facts.is_stored()) {
            let named = prefix_of.entry(resource.gvr.resource.clone()).or_default();
            if !named.iter().any(|(group, _)| *group == resource.gvr.group) {
                named.push((resource.gvr.group.clone(), resource.storage_prefix.clone()));
            }
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
            ask_progress: tokio::sync::Notify::new(),
            compacted: AtomicI64::new(0),
        }
    }

    /// Keeps the caches filled until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = feed::run(self) => {}
        }
    }

    /// Ends all watches, and those that come later at once.
    pub fn close_watches(&self) {
        for room in self.rooms.values() {
            room.cache.close();
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
        let (_, prefix) = self.prefix_of.get(resource)?.iter().find(|(of, _)| of == group)?;
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
        let target = match revision {
            Some(revision) if revision <= self.progress() => return Ok(self.progress()),
            Some(revision) => revision,
            None => self.etcd.revision().await?,
        };
        if target <= self.progress() {
            return Ok(self.progress());
        }
        let asks = self.etcd.progress_is_true();
        if self.reached(target, if asks { PROGRESS_GRACE } else { FRESH_GRACE }).await {
            return Ok(self.progress());
        }
        let known_to_exist = revision.is_none() || self.etcd.revision().await? >= target;
        // Either the watch is slow, or the revision was made outside our prefix and will never come through it. Etcd tells
        // when it is asked; where its word is not good (it may run ahead of events) a mark of our own tells: it comes behind
        // everything else.
        let deadline = tokio::time::Instant::now() + FRESH_WAIT;
        if known_to_exist && !asks {
            let _one_at_a_time = self.marking.lock().await;
            if self.progress() < target {
                self.etcd.put_always(&format!("{}/pilothouse/progress", self.root), b"{}").await?;
            }
        }
        while tokio::time::Instant::now() < deadline {
            if asks && known_to_exist {
                self.ask_progress.notify_one();
            }
            if self.reached(target, if asks { PROGRESS_INTERVAL } else { FRESH_WAIT }).await {
                return Ok(self.progress());
            }
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

    /// The state of a resource as of a revision that may lie in the past; None if only etcd can know it still
    /// ([`Store::page_at`]). 410 if history has been compacted since.
    pub async fn snapshot_at(&self, resource: &Resource, revision: i64) -> Result<Option<Snapshot>, StatusError> {
        self.wait_for(Some(revision)).await?;
        if revision < self.compacted.load(Ordering::Relaxed) {
            return Err(EtcdError::Compacted.into());
        }
        Ok(self.room(resource)?.cache.snapshot_at(revision).ok())
    }

    /// Up to `limit` (0: all) objects of the past that `select` selects, from etcd: those of a namespace (all, if empty),
    /// from the key `start` on.
    pub async fn page_at(
        &self,
        resource: &Resource,
        revision: i64,
        namespace: &str,
        start: &str,
        limit: usize,
        select: impl Fn(&StoredObject) -> bool,
    ) -> Result<Page, StatusError> {
        let room = self.room(resource)?;
        let root = keys::full_key(&self.root, &resource.storage_prefix, "");
        let (first, end) = match namespace {
            "" => (root.clone(), keys::range_end(&root)),
            namespace => (format!("{root}{namespace}/"), keys::range_end(&format!("{root}{namespace}/"))),
        };
        let mut from = if start.is_empty() { first.into_bytes() } else { format!("{root}{start}").into_bytes() };
        let mut page = Page { objects: Vec::new(), last_key: None, behind: 0 };
        let mut last_key = String::new();
        loop {
            let (all, _, count) = self.etcd.page(&from, &end, revision, PAGE).await?;
            let more = count > all.len() as i64;
            if let Some(last) = all.last() {
                from = [last.key.as_bytes(), b"\0"].concat();
            }
            for (index, stored) in all.iter().enumerate() {
                let Some(key) = stored.key.strip_prefix(&root) else { continue };
                let object = self.read_stored(room, stored);
                if !select(&object) {
                    continue;
                }
                if limit > 0 && page.objects.len() == limit {
                    page.behind = count - index as i64;
                    page.last_key = Some(last_key);
                    return Ok(page);
                }
                page.objects.push(object);
                key.clone_into(&mut last_key);
            }
            if !more {
                return Ok(page);
            }
        }
    }

    /// Creates an object, given in its served version. `Conflict` if it exists.
    pub async fn create(&self, resource: &Resource, object: &Value) -> Result<Put, StatusError> {
        self.put(resource, object, 0).await
    }

    /// Writes an object, given in its served version, if what stands there has this revision (0: nothing stands there).
    pub async fn put(&self, resource: &Resource, object: &Value, expected: i64) -> Result<Put, StatusError> {
        let stored_form = resource.to_stored(object);
        let bytes = object::encode(&stored_form);
        self.put_encoded(resource, &stored_form, bytes, expected).await
    }

    /// The same of an object as it is stored, with its encoding.
    async fn put_encoded(
        &self,
        resource: &Resource,
        stored_form: &Value,
        bytes: Vec<u8>,
        expected: i64,
    ) -> Result<Put, StatusError> {
        let room = self.room(resource)?;
        let identity = Identity::of(stored_form, (room.fields_of)(stored_form));
        let key = self.full_key(resource, &identity.namespace, &identity.name);
        let lease = match resource.strategy.time_to_live(stored_form) {
            Some(seconds) => self.etcd.lease(seconds).await?,
            None => 0,
        };
        let mut awaited = self.await_event(key, Pending { bytes, object: Mutex::new(Building::Waits(identity)) });
        let pending = awaited.pending.clone();
        match self.etcd.put(&awaited.key, &pending.bytes, expected, lease).await? {
            Swap::Done { revision } => {
                awaited.written = true;
                Ok(Put::Written(pending.build(revision, expected == 0)))
            }
            Swap::Differs(current) => Ok(Put::Conflict(current.map(|stored| self.read_stored(room, &stored)))),
        }
    }

    fn await_event(&self, key: String, pending: Pending) -> Awaited<'_> {
        let pending = Arc::new(pending);
        let mut all = self.pending.lock();
        if all.len() < PENDING_MAX {
            all.insert(key.clone(), pending.clone());
        }
        Awaited { store: self, key, pending, written: false }
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
            Swap::Differs(current) => Ok(Err(current.map(|stored| self.read_stored(room, &stored)))),
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
        Ok(self.etcd.get(&key).await?.map(|stored| self.read_stored(room, &stored)))
    }

    /// Reads, changes and writes an object until nobody came between. `change` sees the served version without its managedFields;
    /// it answers whether it changed anything. Goes past admission and strategy: for what the server itself keeps.
    pub async fn guaranteed_update(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        change: impl FnMut(&mut Value) -> Result<bool, StatusError>,
    ) -> Result<Arc<StoredObject>, StatusError> {
        self.guaranteed_update_but(resource, namespace, name, &[], change).await
    }

    /// The same where `change` has nothing to do with some members, nor has how objects are selected: these are not read, and
    /// stay the texts that they are. For kinds that are stored as they are served.
    pub async fn guaranteed_update_but(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        unread: &[object::Path],
        mut change: impl FnMut(&mut Value) -> Result<bool, StatusError>,
    ) -> Result<Arc<StoredObject>, StatusError> {
        let gvr = &resource.gvr;
        let paths = [&[object::MANAGED_FIELDS], unread].concat();
        let mut current = match self.get_cached(resource, namespace, name) {
            Ok(object) => object,
            Err(_) => self.get(resource, namespace, name).await?,
        };
        for _ in 0..UPDATE_ATTEMPTS {
            let json = current.json();
            let (mut value, mut apart) = object::split_off(&json, &paths);
            if resource.strategy.converts() {
                resource.strategy.from_stored(&mut value);
            }
            if !change(&mut value)? {
                return Ok(current);
            }
            if let Some(at) = apart.iter().position(|(path, _)| *path == object::MANAGED_FIELDS) {
                value["metadata"]["managedFields"] = apart.remove(at).1.into_owned().into();
            }
            let stored_form = resource.to_stored(&value);
            let bytes = object::encode_with(&stored_form, &apart);
            match self.put_encoded(resource, &stored_form, bytes, current.revision).await? {
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
        self.announced(&start).await
    }

    /// Takes back what [`Store::announce`] says; gives the others that are.
    pub async fn withdraw(&self, prefix: &str, name: &str) -> Result<Vec<String>, StatusError> {
        let start = format!("{}/{prefix}/", self.root);
        let key = format!("{start}{name}");
        if let Some(stored) = self.etcd.get(&key).await? {
            self.etcd.delete(&key, stored.mod_revision).await?;
        }
        self.announced(&start).await
    }

    async fn announced(&self, start: &str) -> Result<Vec<String>, StatusError> {
        let (all, _, _) = self.etcd.page(start.as_bytes(), &keys::range_end(start), 0, PAGE).await?;
        Ok(all.iter().filter_map(|stored| stored.key.strip_prefix(start)).map(ToOwned::to_owned).collect())
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

    /// Who changes [`COMPACT_KEY`] compacts; who cannot has been forestalled, and learns of it.
    async fn compact(&self, (key_revision, target): (i64, i64)) -> Result<(i64, i64), EtcdError> {
        let now = self.etcd.revision().await?;
        match self.etcd.put(COMPACT_KEY, target.to_string().as_bytes(), key_revision, 0).await? {
            Swap::Done { revision } => {
                if target > 0 {
                    self.etcd.compact(target).await?;
                    self.compacted.fetch_max(target, Ordering::Relaxed);
                    tracing::debug!(revision = target, "compacted etcd's history");
                }
                Ok((revision, now))
            }
            Swap::Differs(current) => {
                let up_to = current.as_ref().and_then(|stored| std::str::from_utf8(&stored.value).ok()?.parse().ok());
                self.compacted.fetch_max(up_to.unwrap_or(0), Ordering::Relaxed);
                Ok((current.map_or(0, |stored| stored.mod_revision), now))
            }
        }
    }

    /// How many objects of each resource there are.
    pub fn counts(&self) -> impl Iterator<Item = (String, usize)> {
        let all =
            self.prefix_of.iter().flat_map(|(resource, groups)| groups.iter().map(move |group| (resource, group)));
        all.filter_map(|(resource, (group, prefix))| {
            let room = self.rooms.get(prefix)?;
            let count = room.cache.len();
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
    fn parse(&self, room: &Room, full_key: &str, value: &[u8], revision: i64, created: bool) -> Arc<StoredObject> {
        let pending = {
            let mut all = self.pending.lock();
            let same = all.get(full_key).is_some_and(|p| p.bytes == value);
            if same { all.remove(full_key) } else { None }
        };
        if let Some(pending) = pending {
            return pending.build(revision, created);
        }
        let (value, bytes) = object::read(full_key, value);
        let identity = Identity::of(&value, (room.fields_of)(&value));
        Arc::new(StoredObject::new(identity, &bytes, revision, created))
    }

    fn read_stored(&self, room: &Room, stored: &Stored) -> Arc<StoredObject> {
        let created = stored.create_revision == stored.mod_revision;
        self.parse(room, &stored.key, &stored.value, stored.mod_revision, created)
    }
}

// === impl Awaited ===

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        if !self.written {
            self.store.forget_pending(&self.key, &self.pending);
        }
    }
}

// === impl Pending ===

impl Pending {
    /// The object with its revision; the same one for all who ask.
    fn build(&self, revision: i64, created: bool) -> Arc<StoredObject> {
        let mut object = self.object.lock();
        let identity = match &mut *object {
            Building::Waits(identity) => std::mem::take(identity),
            Building::Is(object) if object.revision == revision => return object.clone(),
            Building::Is(object) => object.identity.clone(),
        };
        let built = Arc::new(StoredObject::new(identity, &self.bytes, revision, created));
        *object = Building::Is(built.clone());
        built
    }
}
