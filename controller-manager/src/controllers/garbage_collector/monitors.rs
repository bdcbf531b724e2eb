//! What feeds the graph: each kind that can be listed, watched and deleted. What other controllers watch is followed where
//! they do; of the rest the metadata is watched.
use super::graph::{Graph, Task};
use crate::runtime::{Context, Described, Discovery, ServerResource, WorkQueue};
use component_base::{
    backoff::Backoff,
    watch::{Sink, Version, follow},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kube::{
    Resource as _,
    api::WatchParams,
    core::{ApiResource, DynamicObject, PartialObjectMetaExt as _},
};
use parking_lot::{Mutex, RwLock};
use serde::Deserialize;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::watch, task::JoinHandle};
use tracing::{info, warn};

/// How often new kinds are looked for.
const DISCOVERY_PERIOD: Duration = Duration::from_secs(30);
const RETRY_BASE: Duration = Duration::from_millis(200);
const RETRY_CAP: Duration = Duration::from_secs(10);
/// Events come and go, and nothing owns or is owned by them.
const IGNORED: [(&str, &str); 2] = [("", "events"), ("events.k8s.io", "events")];

/// What is watched, by kind.
pub struct Monitors {
    context: Arc<Context>,
    graph: Arc<Mutex<Graph>>,
    queue: Arc<WorkQueue<Task>>,
    running: Mutex<HashMap<ApiResource, Monitor>>,
    /// All resources of the server by `apiVersion` and kind: what owner references name.
    mapping: RwLock<HashMap<(String, String), Arc<ServerResource>>>,
}

struct Monitor {
    /// Of a kind that nobody else watches.
    task: Option<JoinHandle<()>>,
    synced: watch::Receiver<bool>,
}

/// What the graph reads of an object: the rest is not even decoded. It is asked for whole all the same, for the server has
/// every object's text at hand, and would have to make another of the metadata alone.
#[derive(Deserialize)]
struct Object {
    metadata: Meta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    uid: Option<String>,
    namespace: Option<String>,
    name: Option<String>,
    resource_version: Option<String>,
    owner_references: Option<Vec<OwnerReference>>,
    finalizers: Option<Vec<String>>,
    deletion_timestamp: Option<Time>,
}

impl Meta {
    /// As an object that the graph keeps.
    fn described(self) -> Arc<dyn Described> {
        let metadata = ObjectMeta {
            uid: self.uid,
            namespace: self.namespace,
            name: self.name,
            resource_version: self.resource_version,
            owner_references: self.owner_references,
            finalizers: self.finalizers,
            deletion_timestamp: self.deletion_timestamp,
            ..ObjectMeta::default()
        };
        Arc::new(metadata.into_response_partial::<DynamicObject>())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.task.iter().for_each(JoinHandle::abort);
    }
}

impl Monitors {
    pub fn new(context: Arc<Context>, graph: Arc<Mutex<Graph>>, queue: Arc<WorkQueue<Task>>) -> Self {
        Self { context, graph, queue, running: Mutex::default(), mapping: RwLock::default() }
    }

    /// Follows what the server has; does not end.
    pub async fn run(&self, discovered: &watch::Sender<bool>) {
        let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
        let mut discovery = Discovery::default();
        loop {
            match self.resync(&mut discovery).await {
                Ok(()) => {
                    backoff.reset();
                    discovered.send_replace(true);
                    tokio::time::sleep(DISCOVERY_PERIOD).await;
                }
                Err(error) => {
                    warn!(%error, "cannot find out what kinds there are; will retry");
                    tokio::time::sleep(backoff.next_wait()).await;
                }
            }
        }
    }

    /// Starts watches of kinds that are new, ends those of kinds that are gone.
    async fn resync(&self, discovery: &mut Discovery) -> Result<(), kube::Error> {
        let Some(found) = discovery.ask(&self.context.client).await? else { return Ok(()) };
        let failed: HashSet<&str> = found.failures.iter().map(|(gv, _)| gv.as_str()).collect();
        let resources: Vec<Arc<ServerResource>> = found.resources.iter().cloned().map(Arc::new).collect();
        let mapping = resources.iter().map(|r| ((r.api.api_version.clone(), r.api.kind.clone()), r.clone()));
        self.mapping.write().extend(mapping);
        let wanted: HashMap<&ApiResource, &Arc<ServerResource>> = resources
            .iter()
            .filter(|r| ["list", "watch", "delete"].iter().all(|v| r.can(v)))
            .filter(|r| !IGNORED.contains(&(r.api.group.as_str(), r.api.plural.as_str())))
            .map(|r| (&r.api, r))
            .collect();
        let mut running = self.running.lock();
        // A group that cannot be asked now is not gone.
        running.retain(|api, _| wanted.contains_key(api) || failed.contains(api.api_version.as_str()));
        for (api, resource) in wanted {
            if !running.contains_key(api) {
                running.insert(api.clone(), self.start(resource.clone()));
            }
        }
        Ok(())
    }

    fn start(&self, resource: Arc<ServerResource>) -> Monitor {
        info!(resource = resource.group_resource(), "monitoring");
        let (graph, queue, of) = (self.graph.clone(), self.queue.clone(), resource.clone());
        let follower = move |old: Option<&ObjectMeta>, new: Option<Arc<dyn Described>>| {
            let mut graph = graph.lock();
            // A namesake may be what is seen next.
            let uid = new.as_ref().and_then(|new| new.metadata().uid.as_deref());
            let gone = old.and_then(|old| old.uid.as_deref()).filter(|old| uid != Some(old));
            let mut tasks = gone.map(|uid| graph.forget(uid)).unwrap_or_default();
            tasks.extend(new.into_iter().flat_map(|object| graph.observe(&of, object)));
            tasks.into_iter().for_each(|task| queue.add(task));
        };
        match self.context.informers.follow(&resource.api, Box::new(follower)) {
            Some(synced) => Monitor { task: None, synced },
            None => {
                let (tell, synced) = watch::channel(false);
                let path = DynamicObject::url_path(&resource.api, None);
                let (graph, queue) = (self.graph.clone(), self.queue.clone());
                let feed = Feed { resource, graph, queue, seen: Mutex::default(), synced: tell };
                let client = self.context.client.clone();
                let task = tokio::spawn(follow(client, path, WatchParams::default(), Arc::new(feed)));
                Monitor { task: Some(task), synced }
            }
        }
    }

    /// Returns when every watch has had its first list.
    pub async fn synced(&self) {
        let all: Vec<_> = self.running.lock().values().map(|m| m.synced.clone()).collect();
        for mut synced in all {
            // An error means that the kind went away: nothing to wait for.
            let _ = synced.wait_for(|s| *s).await;
        }
    }

    /// What an owner reference names.
    pub fn resource(&self, api_version: &str, kind: &str) -> Option<Arc<ServerResource>> {
        let mapping = self.mapping.read();
        if let Some(found) = mapping.get(&(api_version.to_owned(), kind.to_owned())) {
            return Some(found.clone());
        }
        // In another version of the same group.
        let (group, _) = apimachinery::meta::split_api_version(api_version);
        mapping.values().find(|r| r.api.group == group && r.api.kind == kind).cloned()
    }
}

/// Tells the graph of the objects of one kind.
struct Feed {
    resource: Arc<ServerResource>,
    graph: Arc<Mutex<Graph>>,
    queue: Arc<WorkQueue<Task>>,
    /// What the list under way has brought.
    seen: Mutex<HashSet<String>>,
    synced: watch::Sender<bool>,
}

impl Feed {
    fn add(&self, tasks: Vec<Task>) {
        tasks.into_iter().for_each(|task| self.queue.add(task));
    }
}

impl Sink for Feed {
    fn begin(&self) {
        self.seen.lock().clear();
    }

    fn set(&self, object: &[u8], listed: bool) -> Version {
        let Object { metadata } = serde_json::from_slice(object)?;
        if listed {
            self.seen.lock().extend(metadata.uid.clone());
        }
        let version = metadata.resource_version.clone();
        let tasks = self.graph.lock().observe(&self.resource, metadata.described());
        self.add(tasks);
        Ok(version)
    }

    fn delete(&self, object: &[u8]) -> Version {
        let Object { metadata } = serde_json::from_slice(object)?;
        let tasks = self.graph.lock().forget(metadata.uid.as_deref().unwrap_or_default());
        self.add(tasks);
        Ok(metadata.resource_version)
    }

    fn listed(&self) {
        let seen = std::mem::take(&mut *self.seen.lock());
        let tasks = {
            let mut graph = self.graph.lock();
            let gone = graph.unseen(&self.resource, &seen);
            gone.iter().flat_map(|uid| graph.forget(uid)).collect()
        };
        self.add(tasks);
        self.synced.send_replace(true);
    }
}
