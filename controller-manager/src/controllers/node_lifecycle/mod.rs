//! The nodes' health: a node that falls silent becomes unknown, its pods not ready, and in its turn it is tainted so
//! that what runs there is evicted (by [`super::taint_eviction`]).
mod health;

use crate::runtime::{Context, Index, SyncError, api_in, gone_is_fine, is_code};
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
    metrics::{Labels, register},
};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
pub use health::OUT_OF_SERVICE;
use health::{Assessment, GracePeriods, Readiness, Record, ZoneState};
use k8s_openapi::{
    api::{
        coordination::v1::Lease,
        core::v1::{Node, Pod, Taint},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
};
use parking_lot::Mutex;
use prometheus_client::metrics::{counter::Counter, family::Family};
use serde_json::json;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, LazyLock},
    time::Duration,
};
use tokio::time::Instant;
use tracing::{info, warn};

const LEASES: &str = "kube-node-lease";
static EVICTIONS: LazyLock<Family<Labels<1>, Counter>> = LazyLock::new(|| {
    let help = "Number of Node evictions that happened since current instance of NodeController started.";
    register("node_collector_evictions", help, Family::default())
});
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Nodes or pods that are written at the same time.
const PARALLEL: usize = 30;

struct Controller {
    client: Client,
    recorder: Recorder,
    nodes: Informer<Node>,
    leases: Informer<Lease>,
    pods: Arc<Index<Pod>>,
    grace: GracePeriods,
    context: Arc<Context>,
    /// Since when a zone may evict from the next node.
    turns: Mutex<HashMap<String, Turn>>,
}

/// A zone's evictions, so many nodes a second.
struct Turn {
    tokens: f64,
    at: Instant,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("node-controller").await else { return };
    let settings = &context.settings;
    let grace =
        GracePeriods { monitor: settings.node_monitor_grace_period, startup: settings.node_startup_grace_period };
    let pods = context.informers.get::<Pod>();
    let controller = Controller {
        recorder: context.recorder(&client, "node-controller"),
        client,
        nodes: context.informers.get(),
        leases: context.informers.get(),
        pods: context.pods_by_node(),
        grace,
        context: context.clone(),
        turns: Mutex::default(),
    };
    controller.nodes.synced().await;
    controller.leases.synced().await;
    pods.synced().await;
    let mut records: HashMap<String, Record> = HashMap::new();
    let mut ticks = tokio::time::interval(settings.node_monitor_period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Conditions and cordons taint at once, not at the next tick.
    let changed = Arc::new(tokio::sync::Notify::new());
    let wake = changed.clone();
    controller.nodes.on_change(move |change| {
        let shape = |n: &Arc<Node>| {
            let conditions = n.status.iter().flat_map(|s| s.conditions.iter().flatten());
            let statuses: Vec<_> = conditions.map(|c| (c.type_.clone(), c.status.clone())).collect();
            (statuses, n.spec.as_ref().and_then(|s| s.unschedulable))
        };
        if change.old.map(shape) != change.new.map(shape) {
            wake.notify_one();
        }
    });
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = changed.notified() => {}
            () = context.shutdown.cancelled() => return,
        }
        tokio::select! {
            () = controller.look(&mut records) => {}
            () = context.shutdown.cancelled() => return,
        }
    }
}

impl Controller {
    /// Whether the API server answers. While it does not, nodes cannot tell that they live.
    async fn server_answers(&self) -> bool {
        matches!(tokio::time::timeout(PROBE_TIMEOUT, self.context.client.apiserver_version()).await, Ok(Ok(_)))
    }

    /// The lease as the server has it now: our own watch may have been cut off.
    async fn live_lease(&self, node: &str) -> Option<Lease> {
        let only = ListParams::default().fields(&format!("metadata.name={node}"));
        let api = api_in::<Lease>(&self.context.client, LEASES);
        tokio::time::timeout(PROBE_TIMEOUT, api.list(&only)).await.ok()?.ok()?.items.pop()
    }

    /// One look at all nodes. As `monitorNodeHealth`.
    async fn look(&self, records: &mut HashMap<String, Record>) {
        if !self.server_answers().await {
            // Their time starts anew when it is back.
            records.values_mut().for_each(|r| r.seen = Instant::now());
            return;
        }
        let nodes = self.nodes.list();
        records.retain(|name, record| {
            let there = self.nodes.get("", name).is_some();
            if !there {
                let gone = ObjectMeta { name: Some(name.clone()), uid: record.uid.clone(), ..ObjectMeta::default() };
                let message = format!("Node {name} event: Removing Node {name} from Controller");
                self.event(&Node { metadata: gone, ..Node::default() }, "RemovingNode", message);
            }
            there
        });
        let (clock, now) = (Instant::now(), Timestamp::now());
        let mut assessed: Vec<(Arc<Node>, Assessment)> = Vec::with_capacity(nodes.len());
        for node in nodes {
            let name = node.name_any();
            let lease = self.leases.get(LEASES, &name);
            let former = records.get(&name);
            if former.is_none() {
                let message = format!("Node {name} event: Registered Node {name} in Controller");
                self.event(&node, "RegisteredNode", message);
            }
            let mut assessment = health::assess(&node, lease.as_deref(), former, &self.grace, clock, now);
            if assessment.conditions.is_some()
                && let Some(live) = self.live_lease(&name).await
            {
                assessment = health::assess(&node, Some(&live), former, &self.grace, clock, now);
            }
            records.insert(name, assessment.record.clone());
            assessed.push((node, assessment));
        }
        let states = self.zone_states(&assessed);
        let told = Mutex::new(Vec::new());
        let all_failed = !states.is_empty() && states.values().all(|(state, _)| *state == ZoneState::Full);
        let work: Vec<BoxFuture<'_, ()>> = assessed
            .iter()
            .map(|(node, assessment)| {
                let zone = health::zone_of(node);
                let state = states.get(&zone).copied().unwrap_or((ZoneState::Normal, 0));
                let told = &told;
                let one = async move {
                    if let Err(error) = self.handle(node, assessment, &zone, state, all_failed, now, told).await {
                        let ordinary = matches!(&error, SyncError::Api(e) if is_code(e, 404) || is_code(e, 409));
                        if !ordinary {
                            warn!(node = node.name_any(), %error, "node's health not recorded; will retry");
                        }
                    }
                };
                one.boxed()
            })
            .collect();
        stream::iter(work).buffer_unordered(PARALLEL).collect::<Vec<()>>().await;
        for name in told.into_inner() {
            if let Some(record) = records.get_mut(&name) {
                record.told_pods = true;
            }
        }
    }

    /// State and number of nodes by zone.
    fn zone_states(&self, assessed: &[(Arc<Node>, Assessment)]) -> BTreeMap<String, (ZoneState, usize)> {
        let mut counts: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for (node, assessment) in assessed {
            let (ready, not_ready) = counts.entry(health::zone_of(node)).or_default();
            if assessment.readiness == Readiness::Ready { *ready += 1 } else { *not_ready += 1 }
        }
        let threshold = self.context.settings.unhealthy_zone_threshold;
        let state = |(ready, not_ready)| (health::zone_state(ready, not_ready, threshold), ready + not_ready);
        counts.into_iter().map(|(zone, counts)| (zone, state(counts))).collect()
    }

    async fn handle(
        &self,
        node: &Node,
        assessment: &Assessment,
        zone: &str,
        (state, size): (ZoneState, usize),
        all_failed: bool,
        now: Timestamp,
        told: &Mutex<Vec<String>>,
    ) -> Result<(), SyncError> {
        let name = node.name_any();
        let api: Api<Node> = Api::all(self.client.clone());
        let mut version = node.metadata.resource_version.clone();
        if let Some(conditions) = &assessment.conditions {
            info!(node = name, "node fell silent: its conditions are unknown");
            let patch = Patch::Strategic(json!({"status": {"conditions": conditions}}));
            let patched = api.patch_status(&name, &PatchParams::default(), &patch).await?;
            version = patched.metadata.resource_version;
        }
        if assessment.fell {
            self.event(node, "NodeNotReady", format!("Node {name} status is now: NodeNotReady"));
        }
        if assessment.tells_pods {
            self.mark_pods_not_ready(&name).await?;
            told.lock().push(name.clone());
        }
        let taints = if all_failed {
            // When all have failed, the fault is likelier here than there: nobody is evicted.
            let kept = health::wanted_taints(node, assessment.readiness, false, now);
            let mut shown = node.clone();
            if let (Some(spec), Some(kept)) = (&mut shown.spec, &kept) {
                spec.taints = Some(kept.clone());
            }
            health::without_eviction(&shown).or(kept)
        } else {
            let due = assessment.readiness != Readiness::Ready && health::lacks_eviction(node);
            let evict = due && self.take_turn(zone, state, size);
            health::wanted_taints(node, assessment.readiness, evict, now)
        };
        if let Some(taints) = taints {
            self.write_taints(version.as_deref(), &name, &taints).await?;
        }
        Ok(())
    }

    /// The version makes it fail if someone else tainted the node meanwhile: the list is replaced as a whole.
    async fn write_taints(&self, version: Option<&str>, name: &str, taints: &[Taint]) -> Result<(), SyncError> {
        info!(node = name, taints = ?taints.iter().map(|t| format!("{}:{}", t.key, t.effect)).collect::<Vec<_>>(), "tainting");
        let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": taints}});
        let api: Api<Node> = Api::all(self.client.clone());
        gone_is_fine(api.patch_metadata(name, &PatchParams::default(), &Patch::Merge(patch)).await)?;
        Ok(())
    }

    /// Whether this zone's turn to evict from one more node has come.
    fn take_turn(&self, zone: &str, state: ZoneState, size: usize) -> bool {
        let settings = &self.context.settings;
        let rate = match state {
            ZoneState::Partial if size > settings.large_cluster_size_threshold => settings.secondary_node_eviction_rate,
            ZoneState::Partial => 0.0,
            ZoneState::Normal | ZoneState::Full => settings.node_eviction_rate,
        };
        let now = Instant::now();
        let mut turns = self.turns.lock();
        let turn = turns.entry(zone.to_owned()).or_insert(Turn { tokens: 1.0, at: now });
        turn.tokens = (turn.tokens + now.duration_since(turn.at).as_secs_f64() * rate).min(1.0);
        turn.at = now;
        let may = rate > 0.0 && turn.tokens >= 1.0;
        if may {
            turn.tokens -= 1.0;
            EVICTIONS.get_or_create(&[("zone", zone.to_owned())]).inc();
        }
        may
    }

    /// As `MarkPodsNotReady`: Services must not send to pods of a node that is not ready.
    async fn mark_pods_not_ready(&self, node: &str) -> Result<(), SyncError> {
        let ready = self.pods.get(node).into_iter().filter(|p| apimachinery::pod::is_ready(p));
        let mark = |pod: Arc<Pod>| async move {
            let namespace = pod.namespace().unwrap_or_default();
            let name = pod.name_any();
            let condition =
                json!({"type": "Ready", "status": "False", "lastTransitionTime": apimachinery::time::now()});
            let patch =
                Patch::Strategic(json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [condition]}}));
            let outcome =
                api_in::<Pod>(&self.client, &namespace).patch_status(&name, &PatchParams::default(), &patch).await;
            let about = reference(pod.as_ref());
            self.recorder.event(&about, Type::Warning, "NodeNotReady", "", "Node is not ready");
            match outcome {
                Err(error) if is_code(&error, 409) => Ok(None),
                outcome => gone_is_fine(outcome),
            }
        };
        let outcomes: Vec<_> = stream::iter(ready.map(mark)).buffer_unordered(PARALLEL).collect().await;
        outcomes.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(())
    }

    fn event(&self, node: &Node, reason: &str, message: String) {
        self.recorder.event(&reference(node), Type::Normal, reason, "", message);
    }
}
