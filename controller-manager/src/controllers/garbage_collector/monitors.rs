//! The watches that feed the graph: one for each kind that can be listed, watched and deleted.
use super::graph::{Graph, Task};
use crate::runtime::{ServerResource, WorkQueue, discover};
use component_base::backoff::Backoff;
use futures::StreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kube::{
    Api, Client, Resource,
    core::{ApiResource, DynamicResourceScope},
    runtime::watcher::{self, Event},
};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Deserializer};
use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::watch, task::JoinHandle};
use tracing::{debug, info, warn};

/// How often new kinds are looked for.
const DISCOVERY_PERIOD: Duration = Duration::from_secs(30);
const RETRY_BASE: Duration = Duration::from_millis(200);
const RETRY_CAP: Duration = Duration::from_secs(10);
/// Events come and go, and nothing owns or is owned by them.
const IGNORED: [(&str, &str); 2] = [("", "events"), ("events.k8s.io", "events")];

/// What is watched, by kind.
pub struct Monitors {
    client: Client,
    graph: Arc<Mutex<Graph>>,
    queue: Arc<WorkQueue<Task>>,
    running: Mutex<HashMap<ApiResource, Monitor>>,
    /// All resources of the server by `apiVersion` and kind: what owner references name.
    mapping: RwLock<HashMap<(String, String), Arc<ServerResource>>>,
}

struct Monitor {
    task: JoinHandle<()>,
    synced: watch::Receiver<bool>,
}

/// What the graph reads of an object's metadata: the rest is not even decoded. It is asked for whole all the same, for the
/// server has every object's text at hand, and would have to make another of the metadata alone.
#[derive(Clone, Debug)]
struct Seen(ObjectMeta);

impl<'de> Deserialize<'de> for Seen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
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
        let Object { metadata } = Object::deserialize(deserializer)?;
        Ok(Self(ObjectMeta {
            uid: metadata.uid,
            namespace: metadata.namespace,
            name: metadata.name,
            resource_version: metadata.resource_version,
            owner_references: metadata.owner_references,
            finalizers: metadata.finalizers,
            deletion_timestamp: metadata.deletion_timestamp,
            ..ObjectMeta::default()
        }))
    }
}

impl Resource for Seen {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.0
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.0
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Monitors {
    pub fn new(client: Client, graph: Arc<Mutex<Graph>>, queue: Arc<WorkQueue<Task>>) -> Self {
        Self { client, graph, queue, running: Mutex::default(), mapping: RwLock::default() }
    }

    /// Follows what the server has; does not end.
    pub async fn run(&self, discovered: &watch::Sender<bool>) {
        let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
        loop {
            match self.resync().await {
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
    async fn resync(&self) -> Result<(), kube::Error> {
        let found = discover(&self.client).await?;
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
        let (tell, synced) = watch::channel(false);
        info!(resource = resource.group_resource(), "monitoring");
        let api: Api<Seen> = Api::all_with(self.client.clone(), &resource.api);
        let task = tokio::spawn(feed(api, resource, self.graph.clone(), self.queue.clone(), tell));
        Monitor { task, synced }
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

async fn feed(
    api: Api<Seen>,
    resource: Arc<ServerResource>,
    graph: Arc<Mutex<Graph>>,
    queue: Arc<WorkQueue<Task>>,
    synced: watch::Sender<bool>,
) {
    let stream = watcher::watcher(api, watcher::Config::default().streaming_lists());
    futures::pin_mut!(stream);
    let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
    let mut seen: HashSet<String> = HashSet::new();
    while let Some(event) = stream.next().await {
        let tasks = match event {
            Ok(Event::Init) => {
                seen.clear();
                Vec::new()
            }
            Ok(Event::InitApply(object)) => {
                seen.extend(object.0.uid.clone());
                graph.lock().observe(&resource, &object.0)
            }
            Ok(Event::InitDone) => {
                backoff.reset();
                let mut graph = graph.lock();
                let gone = graph.unseen(&resource, &seen);
                seen = HashSet::new();
                synced.send_replace(true);
                gone.iter().flat_map(|uid| graph.forget(uid)).collect()
            }
            Ok(Event::Apply(object)) => graph.lock().observe(&resource, &object.0),
            Ok(Event::Delete(object)) => graph.lock().forget(object.0.uid.as_deref().unwrap_or_default()),
            Err(error) => {
                debug!(resource = resource.group_resource(), %error, "watch failed");
                tokio::time::sleep(backoff.next_wait()).await;
                Vec::new()
            }
        };
        tasks.into_iter().for_each(|task| queue.add(task));
    }
}
