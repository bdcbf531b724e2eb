//! DaemonSets: one pod on each node that fits.
mod fit;
mod plan;

use super::{
    claim::controller_reference,
    history::{Historic, History, hash_of},
    pod_control::{PodControl, PodOwner, new_pod, pod_changed, pod_from_template},
};
use crate::runtime::{Context, Expectations, Index, Next, Reconcile, SyncError, WorkQueue, put_status, run};
use apimachinery::{
    labels::Selector,
    meta::NamespacedName,
    pod::{controller_of, phase},
};
use component_base::{
    events::{Type, reference},
    informer::Informer,
};
use k8s_openapi::{
    api::{
        apps::v1::{ControllerRevision, DaemonSet},
        core::v1::{Node, Pod, PodTemplateSpec},
    },
    jiff::Timestamp,
};
use kube::ResourceExt as _;
use parking_lot::Mutex;
use plan::{GENERATION_LABEL, HASH_LABEL, Plan};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;

const NAME: &str = "daemonset";
/// Pods that one step makes or deletes.
const BURST: usize = 250;
/// A node whose daemon fails rests before it gets another: this long at first, then twice as long each time.
const REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(900);

/// How often the pods of a node failed.
struct Failures {
    count: u32,
    last: Instant,
}

impl Failures {
    /// How long the node still rests. As `flowcontrol.Backoff`.
    fn rests(&self, now: Instant) -> Option<Duration> {
        let rest = REST.saturating_mul(2u32.saturating_pow(self.count.saturating_sub(1).min(20))).min(LONGEST_REST);
        rest.checked_sub(now.saturating_duration_since(self.last)).filter(|left| !left.is_zero())
    }
}

struct Controller {
    sets: Informer<DaemonSet>,
    nodes: Informer<Node>,
    pods: Arc<Index<Pod>>,
    history: History,
    expectations: Arc<Expectations>,
    control: PodControl,
    /// By the set's UID, what generation of it was observed, and the node: another template is tried at once. Forgotten after
    /// twice the longest rest. As `failedPodsBackoffKey`.
    failures: Mutex<HashMap<(String, i64, String), Failures>>,
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
        history: History { client: client.clone(), revisions: context.revisions_by_controller() },
        expectations: Arc::default(),
        control: PodControl::new(client.clone(), context.recorder(&client, "daemonset-controller")),
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
    let (to, all, expectations) = (queue.clone(), sets.clone(), controller.expectations.clone());
    pods.on_change(move |change| pod_changed(change, &all, &expectations, &to));
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
    /// The nodes that rest, and when the first of them no longer does.
    fn resting(&self, set: &DaemonSet) -> (HashSet<String>, Option<Duration>) {
        let (uid, generation) = observed(set);
        let (now, mut failures) = (Instant::now(), self.failures.lock());
        failures.retain(|_, f| f.last.elapsed() < LONGEST_REST * 2);
        let own = failures.iter().filter(|((of, at, _), _)| *of == uid && *at == generation);
        let resting: Vec<_> = own.filter_map(|((_, _, node), f)| Some((node.clone(), f.rests(now)?))).collect();
        let first = resting.iter().map(|(_, left)| *left).min();
        (resting.into_iter().map(|(node, _)| node).collect(), first)
    }

    /// Carries the plan out as far as one step goes.
    async fn act(&self, key: &NamespacedName, set: &DaemonSet, hash: &str, plan: &Plan) -> Result<(), SyncError> {
        let about = reference(set);
        let (uid, generation) = observed(set);
        for (node, pod) in &plan.ended {
            let place = format!("{}/{} on node {node}", key.namespace, pod.name_any());
            if phase(pod) == "Succeeded" {
                let message = format!("Found succeeded daemon pod {place}, will try to delete it");
                self.control.recorder.event(&about, Type::Normal, "SucceededDaemonPod", "", message);
                continue;
            }
            let message = format!("Found failed daemon pod {place}, will try to kill it");
            self.control.recorder.event(&about, Type::Warning, "FailedDaemonPod", "", message);
            let mut failures = self.failures.lock();
            let entry = failures
                .entry((uid.clone(), generation, node.clone()))
                .or_insert(Failures { count: 0, last: Instant::now() });
            entry.count += 1;
            entry.last = Instant::now();
        }
        let ended = plan.ended.iter().map(|(_, pod)| pod);
        let delete: Vec<Arc<Pod>> = plan.delete.iter().chain(ended).take(BURST).cloned().collect();
        let Some(spec) = &set.spec else { return Ok(()) };
        let generation = plan::template_generation(set).map(|generation| (GENERATION_LABEL, generation.to_owned()));
        let labels: Vec<_> = [(HASH_LABEL, hash.to_owned())].into_iter().chain(generation).collect();
        let controller = controller_reference(set);
        let create = plan.create.iter().take(BURST).map(|node| {
            new_pod(&pod_from_template(
                &fit::template_for(&spec.template, node, &labels),
                &controller.name,
                &controller,
            ))
        });
        let create = create.collect::<Result<Vec<_>, _>>()?;
        self.control.write(&self.expectations, key, &about, &create, &delete).await.map_err(|(_, error)| error)
    }
}

fn observed(set: &DaemonSet) -> (String, i64) {
    let generation = set.status.as_ref().and_then(|s| s.observed_generation).unwrap_or_default();
    (set.metadata.uid.clone().unwrap_or_default(), generation)
}

impl PodOwner for DaemonSet {
    fn selector(&self) -> Result<Selector, SyncError> {
        Selector::from_label_selector_opt(self.spec.as_ref().map(|s| &s.selector))
            .map_err(|e| SyncError::Invalid(format!("selector: {e}")))
    }
}

impl Historic for DaemonSet {
    const HASH_LABEL: &'static str = HASH_LABEL;
    const LIVE_COUNT: bool = true;

    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref().map(|s| &s.template)
    }

    fn history_limit(&self) -> Option<i32> {
        self.spec.as_ref()?.revision_history_limit
    }

    fn collision_count(&mut self) -> &mut Option<i32> {
        &mut self.status.get_or_insert_default().collision_count
    }
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
        let selector = set.selector()?;
        if selector.is_empty() {
            let message = "This daemon set is selecting all pods. A non-empty selector is required.";
            self.control.recorder.event(&reference(set.as_ref()), Type::Warning, "SelectingAll", "", message);
            return Ok(Next::Settled);
        }
        let revisions = self.history.sync(set.as_ref(), &selector).await?;
        let hash = hash_of::<DaemonSet>(&revisions.update);
        let owned = self.control.claim_pods(&self.pods, set.as_ref(), &selector).await?;
        let (resting, rest) = self.resting(&set);
        let nodes = self.nodes.list();
        let plan = plan::plan(&set, &hash, &nodes, &owned, &resting, Timestamp::now());
        let mut outcome = Ok(());
        if self.expectations.satisfied(key) {
            outcome = self.act(key, &set, &hash, &plan).await;
            let label = |p: &Arc<Pod>| p.metadata.labels.as_ref()?.get(HASH_LABEL).cloned();
            let in_use: Vec<String> = owned.iter().filter_map(label).collect();
            self.history.clean_up(set.as_ref(), &revisions, |r| in_use.contains(&hash_of::<DaemonSet>(r))).await?;
        }
        if set.status.as_ref() != Some(&plan.status) {
            let mut updated = set.as_ref().clone();
            updated.status = Some(plan.status);
            put_status(&self.control.client, &updated).await?;
        }
        outcome?;
        Ok(Next::after([plan.check_again, rest].into_iter().flatten().min()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_rests_longer_each_time() {
        let last = Instant::now();
        for (count, after, left) in
            [(1, 0, Some(1)), (1, 1, None), (2, 1, Some(1)), (4, 0, Some(8)), (30, 0, Some(900))]
        {
            let rests = Failures { count, last }.rests(last + Duration::from_secs(after));
            assert_eq!(rests, left.map(Duration::from_secs), "{count} {after}");
        }
    }
}
