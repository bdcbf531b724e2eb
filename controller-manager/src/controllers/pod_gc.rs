//! Removes pods that nobody else will: of nodes that are gone or out of service, those that ended long ago, and those
//! that were deleted before they had a node.
use crate::{
    controllers::node_lifecycle::OUT_OF_SERVICE,
    runtime::{Context, api_in, gone_is_fine, is_code},
};
use apimachinery::pod::is_terminal;
use component_base::{
    informer::Informer,
    metrics::{Labels, register},
};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use prometheus_client::metrics::{counter::Counter, family::Family};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, LazyLock},
    time::Duration,
};
use tokio::time::Instant;
use tracing::{info, warn};

const PERIOD: Duration = Duration::from_secs(20);
/// A node that is absent must be so for this long: caches may disagree for a moment.
const QUARANTINE: Duration = Duration::from_secs(40);

/// Why a pod is removed; it names the metric's and the condition's reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    Orphaned,
    OutOfService,
    TerminatingUnscheduled,
    Terminated,
}

impl Reason {
    fn label(self) -> &'static str {
        match self {
            Self::Orphaned => "orphaned",
            Self::OutOfService => "out-of-service",
            Self::TerminatingUnscheduled => "unscheduled",
            Self::Terminated => "terminated",
        }
    }
}

struct Families {
    deleted: Family<Labels<2>, Counter>,
    failed: Family<Labels<2>, Counter>,
}

static FAMILIES: LazyLock<Families> = LazyLock::new(|| Families {
    deleted: register(
        "pod_gc_collector_force_delete_pods",
        "Number of pods that are being forcefully deleted since the Pod GC Controller started.",
        Family::default(),
    ),
    failed: register(
        "pod_gc_collector_force_delete_pod_errors",
        "Number of errors encountered when forcefully deleting the pods since the Pod GC Controller started.",
        Family::default(),
    ),
});

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("pod-garbage-collector").await else { return };
    let (pods, nodes): (Informer<Pod>, Informer<Node>) = (context.informers.get(), context.informers.get());
    pods.synced().await;
    nodes.synced().await;
    let threshold = context.settings.terminated_pod_gc_threshold;
    let mut absent_since: BTreeMap<String, Instant> = BTreeMap::new();
    let mut ticks = tokio::time::interval(PERIOD);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = context.shutdown.cancelled() => return,
        }
        let all = pods.list();
        let known: BTreeMap<String, Arc<Node>> = nodes.list().into_iter().map(|n| (n.name_any(), n)).collect();
        let gone = quarantine(&client, &absent_nodes(&all, &known), &mut absent_since).await;
        for (reason, at) in plan(&all, &known, &gone, threshold) {
            let pod = &all[at];
            let labels = [("namespace", pod.namespace().unwrap_or_default()), ("reason", reason.label().to_owned())];
            FAMILIES.deleted.get_or_create(&labels).inc();
            if let Err(error) = remove(&client, pod, reason).await {
                FAMILIES.failed.get_or_create(&labels).inc();
                warn!(pod = %apimachinery::meta::NamespacedName::of(pod.as_ref()), %error, "pod not removed; will retry");
            }
        }
    }
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref().and_then(|s| s.node_name.as_deref()).filter(|n| !n.is_empty())
}

fn absent_nodes(pods: &[Arc<Pod>], known: &BTreeMap<String, Arc<Node>>) -> BTreeSet<String> {
    pods.iter().filter_map(|p| node_of(p)).filter(|n| !known.contains_key(*n)).map(str::to_owned).collect()
}

/// Those of the absent nodes that have been so for long enough and that the server does not know either.
async fn quarantine(
    client: &Client,
    absent: &BTreeSet<String>,
    since: &mut BTreeMap<String, Instant>,
) -> BTreeSet<String> {
    since.retain(|node, _| absent.contains(node));
    let mut gone = BTreeSet::new();
    for node in absent {
        let first = *since.entry(node.clone()).or_insert_with(Instant::now);
        if first.elapsed() < QUARANTINE {
            continue;
        }
        match Api::<Node>::all(client.clone()).get_metadata_opt(node).await {
            Ok(None) => {
                gone.insert(node.clone());
            }
            Ok(Some(_)) => {}
            Err(error) => warn!(node, %error, "cannot tell whether the node is gone"),
        }
    }
    gone
}

/// Which pods go, by their place in `pods`. As the steps of `podgc`.
fn plan(
    pods: &[Arc<Pod>],
    known: &BTreeMap<String, Arc<Node>>,
    gone: &BTreeSet<String>,
    threshold: usize,
) -> Vec<(Reason, usize)> {
    let mut remove: Vec<(Reason, usize)> = Vec::new();
    let mut ended: Vec<usize> = Vec::new();
    for (at, pod) in pods.iter().enumerate() {
        let deleted = pod.metadata.deletion_timestamp.is_some();
        match node_of(pod) {
            Some(node) if gone.contains(node) => remove.push((Reason::Orphaned, at)),
            Some(node) if deleted && known.get(node).is_some_and(|n| is_out_of_service(n)) => {
                remove.push((Reason::OutOfService, at));
            }
            None if deleted => remove.push((Reason::TerminatingUnscheduled, at)),
            _ if is_terminal(pod) => ended.push(at),
            _ => {}
        }
    }
    if threshold > 0 && ended.len() > threshold {
        // Evicted ones first. As `byEvictionAndCreationTimestamp`.
        let evicted = |pod: &Pod| pod.status.as_ref().is_some_and(|s| s.reason.as_deref() == Some("Evicted"));
        let order = |pod: &Pod| (!evicted(pod), pod.metadata.creation_timestamp.clone(), pod.metadata.name.clone());
        ended.sort_by_key(|at| order(&pods[*at]));
        let surplus = ended.len() - threshold;
        remove.extend(ended.into_iter().take(surplus).map(|at| (Reason::Terminated, at)));
    }
    remove
}

/// Not ready, and the operator has said that it will not be for some time.
fn is_out_of_service(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|s| s.conditions.iter().flatten());
    let ready = conditions.filter(|c| c.type_ == "Ready").any(|c| c.status == "True");
    !ready && node.spec.iter().flat_map(|s| s.taints.iter().flatten()).any(|t| t.key == OUT_OF_SERVICE)
}

/// Marks a pod failed if nobody else will, then deletes it at once.
async fn remove(client: &Client, pod: &Pod, reason: Reason) -> Result<(), kube::Error> {
    let namespace = pod.namespace().unwrap_or_default();
    let name = pod.name_any();
    info!(pod = format!("{namespace}/{name}"), ?reason, "removing pod");
    let api = api_in::<Pod>(client, &namespace);
    if !is_terminal(pod) {
        let mut status = json!({"phase": "Failed"});
        if reason == Reason::Orphaned {
            status["conditions"] = json!([{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC",
                "message": "PodGC: node no longer exists", "lastTransitionTime": apimachinery::time::now(),
                "observedGeneration": pod.metadata.generation}]);
        }
        let patch = Patch::Strategic(json!({"metadata": {"uid": pod.metadata.uid}, "status": status}));
        gone_is_fine(api.patch_status(&name, &PatchParams::default(), &patch).await)?;
    }
    let only_this = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
    let parameters = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() }.grace_period(0);
    match gone_is_fine(api.delete(&name, &parameters).await) {
        Err(error) if is_code(&error, 409) => Ok(()),
        outcome => outcome.map(|_| ()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn pod(name: &str, node: &str, phase: &str, deleted: bool) -> Arc<Pod> {
        let deleted = deleted.then_some("2026-01-01T00:00:00Z");
        let value = json!({"metadata": {"name": name, "creationTimestamp": format!("2026-01-01T00:00:0{}Z", name.len()),
            "deletionTimestamp": deleted}, "spec": {"nodeName": node, "containers": []}, "status": {"phase": phase}});
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn node(name: &str, taints: Value) -> (String, Arc<Node>) {
        let value = json!({"metadata": {"name": name}, "spec": {"taints": taints}});
        (name.to_owned(), Arc::new(serde_json::from_value(value).unwrap()))
    }

    #[test]
    fn what_nobody_else_removes() {
        let known = BTreeMap::from([
            node("n1", json!([])),
            node("down", json!([{"key": OUT_OF_SERVICE, "effect": "NoExecute"}])),
        ]);
        let pods = [
            pod("a", "n1", "Running", true),
            pod("b", "gone", "Running", false),
            pod("c", "missing", "Running", false),
            pod("d", "down", "Running", true),
            pod("e", "down", "Running", false),
            pod("f", "", "Pending", true),
            pod("g", "", "Pending", false),
        ];
        let gone = BTreeSet::from(["gone".to_owned()]);
        let absent: Vec<_> = absent_nodes(&pods, &known).into_iter().collect();
        assert_eq!(absent, ["gone", "missing"]);
        assert_eq!(
            plan(&pods, &known, &gone, 10),
            [(Reason::Orphaned, 1), (Reason::OutOfService, 3), (Reason::TerminatingUnscheduled, 5)]
        );
    }

    #[test]
    fn the_oldest_that_ended_go_beyond_the_threshold() {
        let known = BTreeMap::from([node("n1", json!([]))]);
        let pods = [
            pod("ccc", "n1", "Succeeded", false),
            pod("a", "n1", "Failed", false),
            pod("bb", "n1", "Succeeded", false),
            pod("dddd", "n1", "Running", false),
        ];
        assert_eq!(plan(&pods, &known, &BTreeSet::new(), 2), [(Reason::Terminated, 1)]);
        assert_eq!(plan(&pods, &known, &BTreeSet::new(), 0), []);
        let mut evicted = pods.clone();
        Arc::make_mut(&mut evicted[0]).status.get_or_insert_default().reason = Some("Evicted".to_owned());
        assert_eq!(plan(&evicted, &known, &BTreeSet::new(), 2), [(Reason::Terminated, 0)]);
    }
}
