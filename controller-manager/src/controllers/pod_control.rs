//! Making and deleting the pods of an owner, with Kubernetes' events. As `RealPodControl`.
use crate::{
    controllers::claim::{self, claim, controller_reference},
    runtime::{
        Expectations, Index, SyncError, Watched, WorkQueue, api_in, cause, gone_is_fine, is_code, is_terminating,
        orphans_of,
    },
};
use apimachinery::{labels::Selector, meta::NamespacedName, names, pod::controller_of};
use bytes::Bytes;
use component_base::{
    client::send,
    events::{Recorder, Type},
    informer::{Change, Informer},
    lean,
};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{ObjectReference, Pod, PodTemplateSpec},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{
    Client, Resource,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
};
use parking_lot::Mutex;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

/// How long changes of pods that are there are gathered: each alone would be a status to write.
const GATHER: Duration = Duration::from_millis(50);
/// The same for pods of which more are awaited.
const GATHER_AWAITED: Duration = Duration::from_millis(500);
/// How long a status may be behind while pods are on their way: of a set by which a rolling update goes on, and of what only
/// people read.
pub const TOLD_SOON: Duration = Duration::from_millis(500);
pub const TOLD_LATER: Duration = Duration::from_secs(1);
/// Writes of one step that are under way at the same time.
const PARALLEL: usize = 16;
/// Namespaces that are remembered.
const PROVEN_MAX: usize = 10_000;

/// What owns pods by a selector.
pub trait PodOwner: Watched + Resource<Scope = NamespaceResourceScope> {
    /// A finalizer of ours, which goes with a pod's owner.
    const FINALIZER: Option<&'static str> = None;

    fn selector(&self) -> Result<Selector, SyncError>;

    /// Whether an orphan that is selected is of any use.
    fn can_use(&self, _orphan: &Pod) -> bool {
        true
    }

    /// Whether an owner does anything else for a pod of its own because it changed in this way.
    fn concerns(_old: &Pod, _new: &Pod) -> bool {
        true
    }
}

/// Wakes the owners of one kind that a pod's change concerns, and takes what was seen off their expectations.
pub fn pod_changed<K: PodOwner>(
    change: Change<'_, Pod>,
    owners: &Informer<K>,
    expectations: &Expectations,
    queue: &WorkQueue<NamespacedName>,
) {
    let Some(pod) = change.latest() else { return };
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let owner_key = |pod: &Pod| {
        let owner = controller_of(&pod.metadata)?;
        let ours = owner.kind == K::kind(&()) && owner.api_version == K::api_version(&());
        ours.then(|| NamespacedName::new(namespace, &owner.name))
    };
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let going = change.new.is_none_or(|p| p.metadata.deletion_timestamp.is_some());
    let (before, after) = (change.old.and_then(|p| owner_key(p)), change.new.and_then(|p| owner_key(p)));
    if let Some(key) = &after {
        if change.old.is_none() {
            expectations.creation_observed(key);
        }
        if going {
            expectations.deletion_observed(key, uid);
        }
        let began_to_go = going && change.old.is_some_and(|p| p.metadata.deletion_timestamp.is_none());
        // The last of those that were awaited is urgent, and what nobody awaited.
        if change.old.is_none() || began_to_go {
            let satisfied = expectations.satisfied(key);
            queue.add_after(key.clone(), if satisfied { Duration::ZERO } else { GATHER_AWAITED });
        } else if change.old.zip(change.new).is_none_or(|(old, new)| K::concerns(old, new)) {
            queue.add_after(key.clone(), GATHER);
        }
        // A pod becomes available by time alone; its owner's step asks to be called then.
    }
    if let Some(key) = before.filter(|key| Some(key) != after.as_ref()) {
        if change.new.is_none() {
            expectations.deletion_observed(&key, uid);
        }
        queue.add(key);
    }
    // An orphan may be adopted by whoever selects it.
    let orphan = change.new.is_some_and(|p| controller_of(&p.metadata).is_none());
    let relabelled = || {
        change.old.map(|p| &p.metadata.labels) != change.new.map(|p| &p.metadata.labels)
            || change.old.is_some_and(|p| controller_of(&p.metadata).is_some())
    };
    if orphan && !going && relabelled() {
        for owner in owners.list_in(namespace) {
            if owner.selector().is_ok_and(|s| !s.is_empty() && s.matches_opt(pod.metadata.labels.as_ref())) {
                queue.add(NamespacedName::of(owner.as_ref()));
            }
        }
    }
}

/// How many to try at once, one batch after the other, so that a pod that cannot be made fails `first` times and not a hundred
/// times: 1, 2, 4, … As `slowStartBatch`.
pub fn slow_start(count: usize, first: usize) -> Vec<usize> {
    let (mut batches, mut left, mut size) = (Vec::new(), count, first);
    while left > 0 {
        let batch = size.min(left);
        batches.push(batch);
        left -= batch;
        size *= 2;
    }
    batches
}

/// Namespaces in which the last pods that were to be made were made: there the next ones need not come one by one.
#[derive(Clone, Default)]
struct Proven(Arc<Mutex<HashSet<String>>>);

impl Proven {
    fn first_batch(&self, namespace: &str) -> usize {
        if self.0.lock().contains(namespace) { PARALLEL } else { 1 }
    }

    fn note(&self, namespace: &str, made: bool) {
        let mut all = self.0.lock();
        if !made {
            all.remove(namespace);
        } else if !all.contains(namespace) {
            if all.len() >= PROVEN_MAX {
                all.clear();
            }
            all.insert(namespace.to_owned());
        }
    }
}

/// Whose written status is behind, and since when: what can wait waits for more, but not for long. Each write is a request, and
/// one more of whoever follows it.
#[derive(Default)]
pub struct Behind(Mutex<HashMap<NamespacedName, Instant>>);

impl Behind {
    /// How long the status of `key`, which can wait `within` a time, may still do so; None if it is to be written now, or says
    /// nothing new.
    pub fn wait(&self, key: &NamespacedName, within: Option<Duration>) -> Option<Duration> {
        let mut all = self.0.lock();
        if let Some(within) = within {
            let since = all.entry(key.clone()).or_insert_with(Instant::now);
            let left = within.saturating_sub(since.elapsed());
            if !left.is_zero() {
                return Some(left);
            }
        }
        all.remove(key);
        None
    }
}

/// Carries out one batch of writes after the other until one fails; gives that failure and how many were not tried.
pub async fn in_batches(
    mut writes: Vec<BoxFuture<'_, Result<(), kube::Error>>>,
    batches: impl IntoIterator<Item = usize>,
) -> Result<(), (usize, kube::Error)> {
    for batch in batches {
        let rest = writes.split_off(batch.min(writes.len()));
        let outcomes: Vec<_> = stream::iter(writes).buffer_unordered(PARALLEL).collect().await;
        writes = rest;
        if let Some(error) = outcomes.into_iter().find_map(Result::err) {
            return Err((writes.len(), error));
        }
    }
    Ok(())
}

/// A pod to be made, as it is sent.
pub type NewPod = Bytes;

/// A pod as it is sent.
pub fn new_pod(pod: &Pod) -> Result<NewPod, SyncError> {
    Ok(serde_json::to_vec(pod).map_err(kube::Error::SerdeError)?.into())
}

/// Writes pods on behalf of owners.
#[derive(Clone)]
pub struct PodControl {
    pub client: Client,
    pub recorder: Recorder,
    proven: Proven,
}

impl PodControl {
    pub fn new(client: Client, recorder: Recorder) -> Self {
        Self { client, recorder, proven: Proven::default() }
    }

    /// Makes one pod for `owner`, of its text.
    async fn create(&self, namespace: &str, pod: &[u8], owner: &ObjectReference) -> Result<(), kube::Error> {
        let pods = kube::core::Request::new(Pod::url_path(&(), Some(namespace)));
        match send(&self.client, pods.create(&PostParams::default(), pod.to_vec())).await {
            Ok(made) => {
                let name = lean::name_of(&made).unwrap_or_default();
                self.recorder.event(owner, Type::Normal, "SuccessfulCreate", "", format!("Created pod: {name}"));
                Ok(())
            }
            Err(error) => {
                // A namespace that is being deleted says so by itself.
                if !is_terminating(&error) {
                    let message = format!("Error creating: {}", cause(&error));
                    self.recorder.event(owner, Type::Warning, "FailedCreate", "", message);
                }
                Err(error)
            }
        }
    }

    /// Deletes and makes pods of `owner`, expecting to see that; gives the reason of a failure and the failure.
    pub async fn write(
        &self,
        expectations: &Expectations,
        key: &NamespacedName,
        owner: &ObjectReference,
        create: &[NewPod],
        delete: &[Arc<Pod>],
    ) -> Result<(), (&'static str, SyncError)> {
        if create.is_empty() && delete.is_empty() {
            return Ok(());
        }
        let uid = |pod: &Pod| pod.metadata.uid.clone().unwrap_or_default();
        expectations.expect(key, create.len(), delete.iter().map(|p| uid(p)));
        let deletions = delete.iter().map(|pod| {
            let deletion = async move {
                let outcome = self.delete(pod, owner).await;
                outcome.inspect_err(|_| expectations.deletion_observed(key, &uid(pod)))
            };
            deletion.boxed()
        });
        let deleted = in_batches(deletions.collect(), [delete.len()]).await;
        let creations = create.iter().map(|pod| {
            let creation = async move {
                let outcome = self.create(&key.namespace, pod, owner).await;
                outcome.inspect_err(|_| expectations.creation_observed(key))
            };
            creation.boxed()
        });
        let batches = slow_start(create.len(), self.proven.first_batch(&key.namespace));
        let created = in_batches(creations.collect(), batches).await;
        if !create.is_empty() {
            self.proven.note(&key.namespace, created.is_ok());
        }
        if let Err((untried, error)) = created {
            // What was not made will not be seen.
            (0..untried).for_each(|_| expectations.creation_observed(key));
            return Err(("FailedCreate", error.into()));
        }
        deleted.map_err(|(_, error)| ("FailedDelete", error.into()))
    }

    /// Deletes one pod; it is no error if it is gone.
    pub async fn delete(&self, pod: &Pod, owner: &ObjectReference) -> Result<(), kube::Error> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let only_this = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
        let pods = kube::core::Request::new(Pod::url_path(&(), Some(namespace)));
        match gone_is_fine(send(&self.client, pods.delete(name, &parameters)).await) {
            Ok(Some(_)) => {
                self.recorder.event(owner, Type::Normal, "SuccessfulDelete", "", format!("Deleted pod: {name}"));
                Ok(())
            }
            Ok(None) => Ok(()),
            // A namesake has its place: the pod that was meant is gone.
            Err(error) if is_code(&error, 409) => Ok(()),
            Err(error) => {
                let message = format!("Error deleting: {}", cause(&error));
                self.recorder.event(owner, Type::Warning, "FailedDelete", "", message);
                Err(error)
            }
        }
    }

    /// The pods that `owner` controls, once it has let go of those that it no longer selects and taken those that
    /// nobody has. As `ClaimPods`.
    pub async fn claim_pods<K: PodOwner>(
        &self,
        pods: &Index<Pod>,
        owner: &K,
        selector: &Selector,
    ) -> Result<Vec<Arc<Pod>>, SyncError> {
        let key = NamespacedName::of(owner);
        let uid = owner.meta().uid.as_deref();
        let mut candidates = pods.get(uid.unwrap_or_default());
        candidates.extend(pods.get(&orphans_of(&key.namespace)));
        let claimed = claim(owner.meta(), selector, candidates);
        for pod in &claimed.release {
            let mut patch = claim::release(uid, pod.metadata.uid.as_deref());
            if let Some(finalizer) = K::FINALIZER {
                patch["metadata"]["$deleteFromPrimitiveList/finalizers"] = serde_json::json!([finalizer]);
            }
            gone_is_fine(self.patch(&pod.metadata, patch).await)?;
        }
        let mut owned = claimed.owned;
        let adopt: Vec<_> = claimed.adopt.into_iter().filter(|p| owner.can_use(p)).collect();
        if !adopt.is_empty() {
            // Only an owner that really lives may adopt.
            let live = api_in::<K>(&self.client, &key.namespace).get(&key.name).await?;
            if live.meta().uid.as_deref() == uid && live.meta().deletion_timestamp.is_none() {
                for pod in adopt {
                    let patch = claim::adoption(&controller_reference(owner), pod.metadata.uid.as_deref());
                    self.patch(&pod.metadata, patch).await?;
                    owned.push(pod);
                }
            }
        }
        Ok(owned)
    }

    pub async fn patch(&self, meta: &ObjectMeta, patch: serde_json::Value) -> Result<(), kube::Error> {
        let api = api_in::<Pod>(&self.client, meta.namespace.as_deref().unwrap_or_default());
        let name = meta.name.as_deref().unwrap_or_default();
        api.patch_metadata(name, &PatchParams::default(), &Patch::Strategic(patch)).await.map(|_| ())
    }
}

/// As `GetPodFromTemplate`: named after its owner.
pub fn pod_from_template(template: &PodTemplateSpec, owner_name: &str, controller: &OwnerReference) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    let prefix = format!("{owner_name}-");
    // A pod's name is a subdomain, but a prefix may end with a dash.
    let valid = names::is_dns1123_subdomain(prefix.trim_end_matches('-')).is_empty();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(if valid { prefix } else { owner_name.to_owned() }),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![controller.clone()]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_double() {
        assert_eq!(slow_start(0, 1), Vec::<usize>::new());
        assert_eq!(slow_start(10, 1), [1, 2, 4, 3]);
        assert_eq!(slow_start(50, 16), [16, 32, 2]);
    }

    #[test]
    fn what_was_made_last_says_how_many_come_first() {
        let proven = Proven::default();
        assert_eq!(proven.first_batch("a"), 1);
        proven.note("a", true);
        assert_eq!((proven.first_batch("a"), proven.first_batch("b")), (PARALLEL, 1));
        proven.note("a", false);
        assert_eq!(proven.first_batch("a"), 1);
    }

    #[test]
    fn a_status_waits_a_while_and_no_longer() {
        let (behind, key) = (Behind::default(), NamespacedName::new("ns", "web"));
        assert_eq!(behind.wait(&key, None), None);
        assert!(behind.wait(&key, Some(TOLD_SOON)).is_some_and(|left| left <= TOLD_SOON));
        behind.0.lock().insert(key.clone(), Instant::now() - TOLD_SOON);
        assert!(behind.wait(&key, Some(TOLD_LATER)).is_some(), "others have more time");
        assert_eq!(behind.wait(&key, Some(TOLD_SOON)), None);
        assert!(behind.wait(&key, Some(TOLD_SOON)).is_some(), "the next one waits anew");
    }
}
