//! DaemonSets: one pod on each node that fits.
mod fit;
mod history;
mod plan;

use super::{
    claim::{claim, controller_reference},
    pod_control::PodControl,
};
use crate::runtime::{
    Context, Expectations, Index, Next, Reconcile, SyncError, WorkQueue, api_in, by_controller, gone_is_fine, is_code,
    orphans_of, run,
};
use apimachinery::{labels::Selector, meta::NamespacedName, pod::controller_of};
use component_base::{
    events::{Type, reference},
    informer::{Change, Informer},
};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use history::Step;
use k8s_openapi::{
    api::{
        apps::v1::{ControllerRevision, DaemonSet},
        core::v1::{Node, Pod},
    },
    jiff::Timestamp,
};
use kube::api::{DeleteParams, PostParams};
use parking_lot::Mutex;
use plan::{HASH_LABEL, Plan};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;

const NAME: &str = "daemonset";
/// Pods that one step makes or deletes.
const BURST: usize = 250;
const PARALLEL: usize = 16;
/// A node whose daemon fails rests before it gets another: this long at first, then twice as long each time.
const REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(900);

/// A node of a set whose pods failed.
struct Failures {
    count: u32,
    last: Instant,
}

struct Controller {
    sets: Informer<DaemonSet>,
    nodes: Informer<Node>,
    pods: Arc<Index<Pod>>,
    revisions: Arc<Index<ControllerRevision>>,
    expectations: Expectations,
    control: PodControl,
    /// By the set's UID and the node. Forgotten after twice the longest rest.
    failures: Mutex<HashMap<(String, String), Failures>>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("daemon-set-controller").await else { return };
    let (sets, nodes) = (context.informers.get::<DaemonSet>(), context.informers.get::<Node>());
    let (pods, revisions) = (context.informers.get::<Pod>(), context.informers.get::<ControllerRevision>());
    let controller = Arc::new(Controller {
        sets: sets.clone(),
        nodes: nodes.clone(),
        pods: context.pods_by_controller(),
        revisions: Index::new(&revisions, by_controller),
        expectations: Expectations::default(),
        control: PodControl { recorder: context.recorder(&client, "daemonset-controller"), client },
        failures: Mutex::default(),
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    sets.on_change(move |change| {
        change.latest().into_iter().for_each(|s| to.add(NamespacedName::of(s.as_ref())));
    });
    let (to, all) = (queue.clone(), sets.clone());
    nodes.on_change(move |change| {
        let shape =
            |n: &Arc<Node>| (n.metadata.labels.clone(), n.spec.as_ref().map(|s| (s.taints.clone(), s.unschedulable)));
        if change.old.map(shape) != change.new.map(shape) {
            all.list().iter().for_each(|s| to.add(NamespacedName::of(s.as_ref())));
        }
    });
    let (to, seen_by) = (queue.clone(), controller.clone());
    pods.on_change(move |change| seen_by.pod_changed(change, &to));
    let to = queue.clone();
    revisions.on_change(move |change| {
        if let Some(revision) = change.latest()
            && let Some(owner) = controller_of(&revision.metadata).filter(|o| o.kind == "DaemonSet")
        {
            to.add(NamespacedName::new(revision.metadata.namespace.clone().unwrap_or_default(), &owner.name));
        }
    });
    sets.synced().await;
    nodes.synced().await;
    pods.synced().await;
    revisions.synced().await;
    run(NAME, queue, controller, context.settings.concurrent_daemonset_syncs, context.shutdown.clone()).await;
}

impl Controller {
    fn pod_changed(&self, change: Change<'_, Pod>, queue: &WorkQueue<NamespacedName>) {
        let Some(pod) = change.latest() else { return };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let going = change.new.is_none_or(|p| p.metadata.deletion_timestamp.is_some());
        for one in change.old.into_iter().chain(change.new) {
            let Some(owner) = controller_of(&one.metadata).filter(|o| o.kind == "DaemonSet") else { continue };
            let key = NamespacedName::new(namespace, &owner.name);
            if change.old.is_none() {
                self.expectations.creation_observed(&key);
            }
            if going {
                self.expectations.deletion_observed(&key, pod.metadata.uid.as_deref().unwrap_or_default());
            }
            queue.add(key);
        }
        if change.old.is_none() && controller_of(&pod.metadata).is_none() {
            for set in self.sets.list_in(namespace) {
                if selector_of(&set).is_ok_and(|s| !s.is_empty() && s.matches_opt(pod.metadata.labels.as_ref())) {
                    queue.add(NamespacedName::of(set.as_ref()));
                }
            }
        }
    }

    async fn claim_pods(
        &self,
        key: &NamespacedName,
        set: &DaemonSet,
        selector: &Selector,
    ) -> Result<Vec<Arc<Pod>>, SyncError> {
        let uid = set.metadata.uid.as_deref();
        let mut candidates = self.pods.get(uid.unwrap_or_default());
        candidates.extend(self.pods.get(&orphans_of(&key.namespace)));
        let claimed = claim(&set.metadata, selector, candidates);
        for pod in &claimed.release {
            self.control.release(pod, uid).await?;
        }
        let mut owned = claimed.owned;
        if !claimed.adopt.is_empty() {
            let live = api_in::<DaemonSet>(&self.control.client, &key.namespace).get(&key.name).await?;
            if live.metadata.uid.as_deref() == uid && live.metadata.deletion_timestamp.is_none() {
                for pod in claimed.adopt {
                    self.control.adopt(&pod, &controller_reference(set)).await?;
                    owned.push(pod);
                }
            }
        }
        Ok(owned)
    }

    /// The hash of the template's revision, once it is the newest in the cache.
    async fn current_hash(&self, key: &NamespacedName, set: &DaemonSet) -> Result<String, SyncError> {
        let api = api_in::<ControllerRevision>(&self.control.client, &key.namespace);
        let owned = self.revisions.get(set.metadata.uid.as_deref().unwrap_or_default());
        match history::step(set, &owned) {
            Step::Current(hash) => Ok(hash),
            Step::Renumber(revision) => {
                let name = revision.metadata.name.clone().unwrap_or_default();
                api.replace(&name, &PostParams::default(), &revision).await?;
                Ok(history::hash_of(&revision))
            }
            Step::Create(revision) => match api.create(&PostParams::default(), &revision).await {
                Ok(created) => Ok(history::hash_of(&created)),
                Err(error) if is_code(&error, 409) => {
                    let name = revision.metadata.name.clone().unwrap_or_default();
                    if api.get(&name).await?.data == revision.data {
                        return Ok(history::hash_of(&revision));
                    }
                    // Another template has the name: the next hash differs.
                    let mut updated = set.clone();
                    let status = updated.status.get_or_insert_default();
                    status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
                    let sets = api_in::<DaemonSet>(&self.control.client, &key.namespace);
                    sets.replace_status(&key.name, &PostParams::default(), &updated).await?;
                    Err(SyncError::Waiting("a revision name that is free".to_owned()))
                }
                Err(error) => Err(error.into()),
            },
        }
    }

    fn resting(&self, uid: &str) -> HashSet<String> {
        let mut failures = self.failures.lock();
        failures.retain(|_, f| f.last.elapsed() < LONGEST_REST * 2);
        let rests = |f: &Failures| {
            f.last.elapsed() < REST.saturating_mul(2u32.saturating_pow(f.count.min(20))).min(LONGEST_REST)
        };
        failures.iter().filter(|((set, _), f)| set == uid && rests(f)).map(|((_, node), _)| node.clone()).collect()
    }

    /// Carries the plan out as far as one step goes.
    async fn act(&self, key: &NamespacedName, set: &DaemonSet, hash: &str, plan: &Plan) -> Result<(), SyncError> {
        let about = reference(set);
        let uid = set.metadata.uid.clone().unwrap_or_default();
        for (node, pod) in &plan.failed {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            let message =
                format!("Found failed daemon pod {}/{name} on node {node}, will try to kill it", key.namespace);
            self.control.recorder.event(&about, Type::Warning, "FailedDaemonPod", "", message);
            let mut failures = self.failures.lock();
            let entry =
                failures.entry((uid.clone(), node.clone())).or_insert(Failures { count: 0, last: Instant::now() });
            entry.count += 1;
            entry.last = Instant::now();
        }
        let delete: Vec<&Arc<Pod>> = plan.delete.iter().chain(plan.failed.iter().map(|(_, p)| p)).take(BURST).collect();
        let create = &plan.create[..plan.create.len().min(BURST)];
        let Some(spec) = &set.spec else { return Ok(()) };
        let id = |p: &Pod| p.metadata.uid.clone().unwrap_or_default();
        self.expectations.expect(key, create.len(), delete.iter().map(|p| id(p)));
        let generation = set.metadata.generation.unwrap_or_default().to_string();
        let labels = [(HASH_LABEL, hash.to_owned()), ("pod-template-generation", generation)];
        let (controller, about) = (&controller_reference(set), &about);
        let creations = create.iter().map(|node| -> BoxFuture<'_, Result<(), kube::Error>> {
            let template = fit::template_for(&spec.template, node, &labels);
            async move {
                let outcome = self.control.create(&key.namespace, &template, about, controller).await;
                outcome.map(|_| ()).inspect_err(|_| self.expectations.creation_observed(key))
            }
            .boxed()
        });
        let deletions = delete.into_iter().map(|pod| -> BoxFuture<'_, Result<(), kube::Error>> {
            async move {
                let outcome = self.control.delete(pod, about).await;
                outcome.inspect_err(|_| self.expectations.deletion_observed(key, &id(pod)))
            }
            .boxed()
        });
        let all: Vec<BoxFuture<'_, _>> = creations.chain(deletions).collect();
        let outcomes: Vec<_> = stream::iter(all).buffer_unordered(PARALLEL).collect().await;
        outcomes.into_iter().collect::<Result<Vec<()>, _>>()?;
        Ok(())
    }

    async fn clean_up(&self, key: &NamespacedName, set: &DaemonSet, owned: &[Arc<Pod>]) -> Result<(), SyncError> {
        let revisions = self.revisions.get(set.metadata.uid.as_deref().unwrap_or_default());
        let in_use: Vec<String> =
            owned.iter().filter_map(|p| p.metadata.labels.as_ref()?.get(HASH_LABEL).cloned()).collect();
        let api = api_in::<ControllerRevision>(&self.control.client, &key.namespace);
        for name in history::surplus(set, &revisions, &in_use) {
            gone_is_fine(api.delete(&name, &DeleteParams::default()).await)?;
        }
        Ok(())
    }
}

fn selector_of(set: &DaemonSet) -> Result<Selector, SyncError> {
    Selector::from_label_selector_opt(set.spec.as_ref().map(|s| &s.selector))
        .map_err(|e| SyncError::Invalid(format!("selector: {e}")))
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(set) = self.sets.get(&key.namespace, &key.name) else {
            self.expectations.forget(key);
            return Ok(Next::Settled);
        };
        if set.metadata.deletion_timestamp.is_some() {
            return Ok(Next::Settled);
        }
        let selector = selector_of(&set)?;
        if selector.is_empty() {
            let message = "This daemon set is selecting all pods. A non-empty selector is required.";
            self.control.recorder.event(&reference(set.as_ref()), Type::Warning, "SelectingAll", "", message);
            return Ok(Next::Settled);
        }
        let hash = self.current_hash(key, &set).await?;
        let owned = self.claim_pods(key, &set, &selector).await?;
        let resting = self.resting(set.metadata.uid.as_deref().unwrap_or_default());
        let nodes = self.nodes.list();
        let plan = plan::plan(&set, &hash, &nodes, &owned, &resting, Timestamp::now());
        let mut outcome = Ok(());
        if self.expectations.satisfied(key) {
            outcome = self.act(key, &set, &hash, &plan).await;
            self.clean_up(key, &set, &owned).await?;
        }
        if set.status.as_ref() != Some(&plan.status) {
            let mut updated = set.as_ref().clone();
            updated.status = Some(plan.status);
            let api = api_in::<DaemonSet>(&self.control.client, &key.namespace);
            api.replace_status(&key.name, &PostParams::default(), &updated).await?;
        }
        outcome?;
        let rest = (!resting.is_empty()).then_some(REST * 5);
        Ok(Next::after(match (plan.check_again, rest) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }))
    }
}
