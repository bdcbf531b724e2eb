//! The garbage collector: what lost its owners goes; foreground and orphaning deletions are carried out.
mod graph;
mod monitors;

use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, is_code, run};
use apimachinery::meta::split_api_version;
use component_base::events::{Recorder, Type};
use graph::{FOREGROUND, Graph, Identity, Node, ORPHAN, Task};
use k8s_openapi::{api::core::v1::ObjectReference, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, Preconditions, PropagationPolicy},
    core::{ApiResource, DynamicObject},
};
use monitors::Monitors;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::watch;
use tracing::{debug, info};

const NAME: &str = "garbage_collector_attempt_to_delete";

struct Controller {
    client: Client,
    recorder: Recorder,
    graph: Arc<Mutex<Graph>>,
    queue: Arc<WorkQueue<Task>>,
    monitors: Arc<Monitors>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    if !context.settings.enable_garbage_collector {
        return;
    }
    let Some(client) = context.client_for("generic-garbage-collector").await else { return };
    let graph = Arc::new(Mutex::new(Graph::default()));
    let queue = Arc::new(WorkQueue::new(NAME));
    let monitors = Arc::new(Monitors::new(context.clone(), graph.clone(), queue.clone()));
    let (tell, mut discovered) = watch::channel(false);
    let runner = monitors.clone();
    let monitoring = async move { runner.run(&tell).await };
    let working = async {
        // Before all kinds were listed, an owner may seem absent that is not.
        if discovered.wait_for(|d| *d).await.is_err() {
            return;
        }
        monitors.synced().await;
        info!(objects = graph.lock().len(), "the graph of owners is complete: collecting garbage");
        let controller = Arc::new(Controller {
            recorder: context.recorder(&client, "garbage-collector-controller"),
            client,
            graph: graph.clone(),
            queue: queue.clone(),
            monitors: monitors.clone(),
        });
        run(NAME, queue.clone(), controller, context.settings.concurrent_gc_syncs, context.shutdown.clone()).await;
    };
    tokio::select! {
        () = monitoring => {}
        () = working => {}
    }
}

/// What to do with an object, given its owners. As `attemptToDeleteItem`.
#[derive(Debug, PartialEq)]
enum Verdict {
    Stays,
    /// It keeps other owners: these references go.
    DropOwners(Vec<OwnerReference>),
    /// Its owner waits for it, and it has dependents that may block it in turn.
    DeleteForeground,
    Delete(PropagationPolicy),
}

fn judge(node: &Node, owners: &graph::Owners, dependents: &[Node]) -> Verdict {
    if owners.dangling.is_empty() && owners.waiting.is_empty() {
        return Verdict::Stays;
    }
    if !owners.solid.is_empty() {
        return Verdict::DropOwners(owners.dangling.iter().chain(&owners.waiting).cloned().collect());
    }
    if !owners.waiting.is_empty() && !dependents.is_empty() {
        return Verdict::DeleteForeground;
    }
    let has = |f: &str| node.finalizers().iter().any(|x| x == f);
    Verdict::Delete(match () {
        () if has(ORPHAN) => PropagationPolicy::Orphan,
        () if has(FOREGROUND) => PropagationPolicy::Foreground,
        () => PropagationPolicy::Background,
    })
}

fn without_owners(node: &Node, gone: impl Fn(&OwnerReference) -> bool) -> Value {
    let kept: Vec<_> = node.owners().iter().filter(|o| !gone(o)).collect();
    let kept = if kept.is_empty() { Value::Null } else { json!(kept) };
    json!({"metadata": {"resourceVersion": node.resource_version(), "uid": &*node.uid, "ownerReferences": kept}})
}

/// An answer to "is it there?".
enum Live {
    Absent,
    There {
        waits_for_dependents: bool,
    },
    /// A cluster-scoped object cannot have a namespaced owner: nobody knows whom it means.
    Unanswerable,
}

impl Controller {
    fn api(&self, node: &Node) -> Option<(Api<DynamicObject>, String)> {
        let Identity::Observed { resource, object } = &node.identity else { return None };
        let api = self.api_of(&resource.api, resource.namespaced, node.namespace());
        Some((api, object.metadata().name.clone()?))
    }

    fn api_of(&self, resource: &ApiResource, namespaced: bool, namespace: &str) -> Api<DynamicObject> {
        if namespaced {
            Api::namespaced_with(self.client.clone(), namespace, resource)
        } else {
            Api::all_with(self.client.clone(), resource)
        }
    }

    /// Asks the server for an object that a reference names.
    async fn look_up(&self, meant: &OwnerReference, namespace: &str) -> Result<Live, SyncError> {
        let OwnerReference { api_version, kind, name, uid, .. } = meant;
        let Some(resource) = self.monitors.resource(api_version, kind) else {
            // A kind that may come yet: as upstream, what it owns stays until then.
            return Err(SyncError::Waiting(format!("a kind {kind} in {api_version}")));
        };
        if resource.namespaced && namespace.is_empty() {
            return Ok(Live::Unanswerable);
        }
        let mut api = resource.api.clone();
        api.api_version.clone_from(api_version);
        let (group, version) = split_api_version(api_version);
        (api.group, api.version) = (group.to_owned(), version.to_owned());
        let api = self.api_of(&api, resource.namespaced, namespace);
        let Some(live) = api.get_metadata_opt(name).await? else { return Ok(Live::Absent) };
        if live.metadata.uid.as_ref() != Some(uid) {
            return Ok(Live::Absent);
        }
        let waits = live.metadata.finalizers.iter().flatten().any(|f| f == FOREGROUND);
        Ok(Live::There { waits_for_dependents: waits && live.metadata.deletion_timestamp.is_some() })
    }

    fn add_all(&self, tasks: Vec<Task>) {
        tasks.into_iter().for_each(|task| self.queue.add(task));
    }

    async fn attempt_to_delete(&self, uid: &str) -> Result<(), SyncError> {
        let Some(node) = self.graph.lock().get(uid).cloned() else { return Ok(()) };
        if let Identity::Virtual(meant) = &node.identity {
            if matches!(self.look_up(&meant.reference, &meant.namespace).await?, Live::Absent) {
                let tasks = self.graph.lock().forget(uid);
                self.add_all(tasks);
            }
            return Ok(());
        }
        if node.deleting && !node.waits_for_dependents {
            return Ok(());
        }
        if node.waits_for_dependents {
            return self.wait_for_dependents(&node).await;
        }
        let mut owners = self.graph.lock().owners(&node);
        if !owners.unresolvable.is_empty() {
            owners.unresolvable.iter().for_each(|owner| self.tell_foreign(&node, owner));
            return Ok(());
        }
        for owner in std::mem::take(&mut owners.unknown) {
            match self.look_up(&owner, node.namespace()).await? {
                Live::Absent => {
                    self.graph.lock().note_absent(&owner.uid);
                    owners.dangling.push(owner);
                }
                Live::There { waits_for_dependents: true } => owners.waiting.push(owner),
                Live::There { waits_for_dependents: false } => owners.solid.push(owner),
                Live::Unanswerable => return Ok(()),
            }
        }
        owners.foreign.iter().for_each(|owner| self.tell_foreign(&node, owner));
        let dependents = self.graph.lock().dependents(uid);
        match judge(&node, &owners, &dependents) {
            Verdict::Stays => Ok(()),
            Verdict::DropOwners(gone) => {
                let patch = without_owners(&node, |o| gone.iter().any(|g| g.uid == o.uid));
                self.patch(&node, patch).await
            }
            Verdict::DeleteForeground => {
                // Dependents that wait in turn must not block this one for ever: a circle would never go.
                for dependent in dependents.iter().filter(|d| d.waits_for_dependents) {
                    self.unblock(dependent, uid).await?;
                }
                self.delete(&node, PropagationPolicy::Foreground).await
            }
            Verdict::Delete(policy) => self.delete(&node, policy).await,
        }
    }

    /// As `reportInvalidNamespaceOwnerRef`.
    fn tell_foreign(&self, node: &Node, owner: &OwnerReference) {
        let Identity::Observed { resource, object } = &node.identity else { return };
        let namespace = node.namespace();
        let about = ObjectReference {
            api_version: Some(resource.api.api_version.clone()),
            kind: Some(resource.api.kind.clone()),
            name: object.metadata().name.clone(),
            namespace: Some(namespace.to_owned()),
            uid: Some(node.uid.to_string()),
            ..ObjectReference::default()
        };
        let message = format!(
            "ownerRef [{}/{}, namespace: {namespace}, name: {}, uid: {}] does not exist in namespace {namespace:?}",
            owner.api_version, owner.kind, owner.name, owner.uid
        );
        self.recorder.event(&about, Type::Warning, "OwnerRefInvalidNamespace", "", message);
    }

    /// As `processDeletingDependentsItem`.
    async fn wait_for_dependents(&self, node: &Node) -> Result<(), SyncError> {
        let blocking = self.graph.lock().blocking_dependents(&node.uid);
        if blocking.is_empty() {
            return self.remove_finalizer(node, FOREGROUND).await;
        }
        let next = blocking.into_iter().filter(|d| !d.waits_for_dependents);
        self.add_all(next.map(|d| Task::Delete(d.uid)).collect());
        Ok(())
    }

    async fn unblock(&self, dependent: &Node, owner: &str) -> Result<(), SyncError> {
        let mut owners = dependent.owners().to_vec();
        owners.iter_mut().filter(|o| o.uid == owner).for_each(|o| o.block_owner_deletion = Some(false));
        let patch = json!({"metadata": {"resourceVersion": dependent.resource_version(), "uid": &*dependent.uid,
            "ownerReferences": owners}});
        self.patch(dependent, patch).await
    }

    /// As `attemptToOrphanWorker`: the dependents lose their owner, then it may go.
    async fn attempt_to_orphan(&self, uid: &str) -> Result<(), SyncError> {
        let Some(node) = self.graph.lock().get(uid).cloned() else { return Ok(()) };
        let dependents = self.graph.lock().dependents(uid);
        for dependent in &dependents {
            self.patch(dependent, without_owners(dependent, |o| o.uid == uid)).await?;
        }
        self.remove_finalizer(&node, ORPHAN).await
    }

    async fn remove_finalizer(&self, node: &Node, finalizer: &str) -> Result<(), SyncError> {
        if !node.finalizers().iter().any(|f| f == finalizer) {
            return Ok(());
        }
        let kept: Vec<_> = node.finalizers().iter().filter(|f| *f != finalizer).collect();
        let kept = if kept.is_empty() { Value::Null } else { json!(kept) };
        let patch =
            json!({"metadata": {"resourceVersion": node.resource_version(), "uid": &*node.uid, "finalizers": kept}});
        self.patch(node, patch).await
    }

    async fn patch(&self, node: &Node, patch: Value) -> Result<(), SyncError> {
        let Some((api, name)) = self.api(node) else { return Ok(()) };
        match api.patch_metadata(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => Ok(()),
            Err(error) if is_code(&error, 404) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Only as it was when we judged it: if it changed, it is judged anew.
    async fn delete(&self, node: &Node, policy: PropagationPolicy) -> Result<(), SyncError> {
        let Some((api, name)) = self.api(node) else { return Ok(()) };
        debug!(name, uid = %node.uid, ?policy, "deleting: its owners are gone");
        let preconditions =
            Preconditions { uid: Some(node.uid.to_string()), resource_version: node.resource_version().cloned() };
        let parameters = DeleteParams {
            propagation_policy: Some(policy),
            preconditions: Some(preconditions),
            ..DeleteParams::default()
        };
        match api.delete(&name, &parameters).await {
            Ok(_) => Ok(()),
            Err(error) if is_code(&error, 404) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Reconcile for Controller {
    type Key = Task;

    async fn reconcile(&self, task: &Task) -> Result<Next, SyncError> {
        match task {
            Task::Delete(uid) => self.attempt_to_delete(uid).await?,
            Task::Orphan(uid) => self.attempt_to_orphan(uid).await?,
        }
        Ok(Next::Settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::ServerResource;
    use kube::core::GroupVersionKind;

    fn owner(uid: &str) -> OwnerReference {
        OwnerReference { uid: uid.to_owned(), ..OwnerReference::default() }
    }

    fn node(finalizers: &[&str]) -> Node {
        let api = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Pod"));
        let resource = Arc::new(ServerResource { api, namespaced: true, verbs: Vec::new() });
        let mut graph = Graph::default();
        let pod: k8s_openapi::api::core::v1::Pod = serde_json::from_value(json!({"metadata": {"uid": "p",
            "finalizers": finalizers, "ownerReferences": [{"apiVersion": "v1", "kind": "O", "name": "a", "uid": "a"}]}}))
        .unwrap();
        graph.observe(&resource, Arc::new(pod));
        graph.get("p").unwrap().clone()
    }

    #[test]
    fn an_object_goes_with_its_last_owner() {
        let owners = |solid: &[&str], dangling: &[&str], waiting: &[&str]| {
            let all = |uids: &[&str]| uids.iter().map(|u| owner(u)).collect::<Vec<_>>();
            graph::Owners {
                solid: all(solid),
                dangling: all(dangling),
                waiting: all(waiting),
                ..graph::Owners::default()
            }
        };
        let plain = node(&[]);
        let some = [node(&[])];
        for (name, node, owners, dependents, expected) in [
            ("has its owner", &plain, owners(&["a"], &[], &[]), &[][..], Verdict::Stays),
            ("lost it", &plain, owners(&[], &["a"], &[]), &[], Verdict::Delete(PropagationPolicy::Background)),
            ("lost one of two", &plain, owners(&["a"], &["b"], &[]), &[], Verdict::DropOwners(vec![owner("b")])),
            ("is waited for", &plain, owners(&[], &[], &["a"]), &[], Verdict::Delete(PropagationPolicy::Background)),
            ("is waited for and has dependents", &plain, owners(&[], &[], &["a"]), &some, Verdict::DeleteForeground),
            ("orphans", &node(&[ORPHAN]), owners(&[], &["a"], &[]), &[], Verdict::Delete(PropagationPolicy::Orphan)),
        ] {
            assert_eq!(judge(node, &owners, dependents), expected, "{name}");
        }
    }

    #[test]
    fn references_are_dropped_one_by_one() {
        let patch = without_owners(&node(&[]), |o| o.uid == "other");
        assert_eq!(patch["metadata"]["ownerReferences"].as_array().unwrap().len(), 1);
        assert_eq!(without_owners(&node(&[]), |o| o.uid == "a")["metadata"]["ownerReferences"], Value::Null);
    }
}
