//! NetworkPolicy on this node: pods, namespaces and policies are watched, [`compile`] says what they come to, [`render`]
//! makes rules of it, and the difference is applied in one transaction.
//!
//! Fail-static: the rules stay when this process ends or the API server is away.

mod compile;
#[cfg(test)]
mod naive;
mod render;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use component_base::backoff::Pace;
use component_base::command::CommandError;
use component_base::informer::Informer;
use component_base::nftables::{self, Guard, Ruleset};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::WatchParams;
use kube::{Api, Client};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::plan;
use compile::Compiled;

/// How often the rules are looked for, changes or none.
const RESYNC: Duration = Duration::from_secs(30);
/// Pause after a change, so that many that come at once cost one round.
const SETTLE: Duration = Duration::from_millis(10);
const RETRY: Duration = Duration::from_secs(2);

/// Keeps the policies of this node's pods in force until `shutdown`. The rules stay. `nodes` tell this node's ranges.
pub(crate) async fn run(client: Client, own: String, nodes: Informer<Node>, shutdown: CancellationToken) {
    let policies =
        Informer::start_slim(Api::all(client.clone()), WatchParams::default(), |policy: &mut NetworkPolicy| {
            policy.metadata.annotations = None;
            policy.metadata.labels = None;
        });
    let changed = Arc::new(Notify::new());
    let (notify, node) = (changed.clone(), own.clone());
    nodes.on_change(move |change| {
        let ranges = |node: Option<&Arc<Node>>| node.map(|node| plan::pod_cidrs(node));
        let is_own = change.latest().is_some_and(|latest| latest.metadata.name.as_ref() == Some(&node));
        if is_own && ranges(change.old) != ranges(change.new) {
            notify.notify_one();
        }
    });
    let notify = changed.clone();
    policies.on_change(move |_| notify.notify_one());
    tokio::select! {
        () = shutdown.cancelled() => return,
        () = async { tokio::join!(nodes.synced(), policies.synced()); } => {}
    }
    let mut peers: Option<Peers> = None;
    let (mut applied, mut guard): (Option<Ruleset>, Guard) = (None, Guard::default());
    let (mut looks, mut looked) = (Pace::default(), Instant::now());
    loop {
        let started = Instant::now();
        if policies.is_empty() {
            peers = None;
        } else if peers.is_none() {
            let watched = Peers::watch(&client, &own, &changed);
            tokio::select! {
                () = shutdown.cancelled() => return,
                // From half of the pods a policy's peers would be cut off.
                () = async { tokio::join!(watched.pods.synced(), watched.namespaces.synced()); } => {}
            }
            peers = Some(watched);
        }
        let wanted = {
            let policies: Vec<_> = policies.list().iter().map(|policy| compile::Policy::read(policy)).collect();
            let (pods, namespaces) = peers.as_ref().map(|peers| peers.read(&own)).unwrap_or_default();
            let ranges = nodes.get("", &own).map(|node| plan::pod_cidrs(&node)).unwrap_or_default();
            let families =
                [false, true].map(|ipv6| (ipv6, Compiled::new(&policies, &pods, &namespaces, &ranges, ipv6)));
            render::render(&families)
        };
        let pause = match apply(&mut applied, &mut guard, wanted).await {
            Ok(lines) => {
                if lines > 0 {
                    let ms = started.elapsed().as_millis() as u64;
                    tracing::info!(policies = policies.len(), lines, ms, "network policies applied");
                }
                // Whatever changes meanwhile.
                RESYNC.saturating_sub(looked.elapsed())
            }
            Err(error) => {
                tracing::error!(%error, retry_s = RETRY.as_secs(), "network policies not applied");
                applied = None;
                RETRY
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            // A policy, a pod or a namespace has changed.
            () = changed.notified() => tokio::time::sleep(SETTLE).await,
            // Time to look whether the rules are there, or to try again.
            () = tokio::time::sleep(pause) => {
                looked = Instant::now();
                if let Some(rules) = &applied
                    && looks.run(guard.is_intact(render::TABLE, || rules)).await == Some(false)
                {
                    tracing::error!("somebody has changed the table of network policies; making it anew");
                    applied = None;
                }
            }
        }
    }
}

/// Of whom policies speak: all pods and namespaces of the cluster, watched while there are policies.
struct Peers {
    pods: Informer<Pod>,
    namespaces: Informer<Namespace>,
}

impl Peers {
    fn watch(client: &Client, own: &str, changed: &Arc<Notify>) -> Peers {
        let config = WatchParams::default;
        let pods = Informer::start_slim(Api::all(client.clone()), config(), slim);
        let namespaces = Informer::start_slim(Api::all(client.clone()), config(), |namespace: &mut Namespace| {
            namespace.metadata.annotations = None;
        });
        let (notify, node) = (changed.clone(), own.to_owned());
        pods.on_change(move |change| {
            let essence = |pod: Option<&Arc<Pod>>| pod.and_then(|pod| compile::Pod::read(pod, &node));
            if essence(change.old) != essence(change.new) {
                notify.notify_one();
            }
        });
        let notify = changed.clone();
        namespaces.on_change(move |change| {
            let labels = |namespace: Option<&Arc<Namespace>>| namespace.map(|n| n.metadata.labels.clone());
            if labels(change.old) != labels(change.new) {
                notify.notify_one();
            }
        });
        Peers { pods, namespaces }
    }

    fn read(&self, own: &str) -> (Vec<compile::Pod>, BTreeMap<String, compile::Labels>) {
        let labels = |namespace: &Arc<Namespace>| {
            let meta = &namespace.metadata;
            (meta.name.clone().unwrap_or_default(), meta.labels.clone().unwrap_or_default())
        };
        let pods = self.pods.list().iter().filter_map(|pod| compile::Pod::read(pod, own)).collect();
        (pods, self.namespaces.list().iter().map(labels).collect())
    }
}

/// Takes the kernel from what was applied to what is wanted; gives the number of commands.
async fn apply(applied: &mut Option<Ruleset>, guard: &mut Guard, wanted: Ruleset) -> Result<usize, CommandError> {
    let lines = match applied {
        Some(before) => {
            let difference = wanted.update_from(before, render::TABLE);
            if !difference.is_empty() {
                guard.apply(&difference).await?;
            }
            difference.lines().count()
        }
        None => {
            let all = wanted.create(render::TABLE);
            guard.replace(&all).await?;
            all.lines().count()
        }
    };
    *applied = Some(wanted);
    Ok(lines)
}

/// Takes the rules away.
pub(crate) async fn clean_up() -> Result<(), CommandError> {
    nftables::remove(render::TABLE).await
}

/// Of a pod only what policies read.
fn slim(pod: &mut Pod) {
    pod.metadata.annotations = None;
    pod.metadata.owner_references = None;
    if let Some(spec) = pod.spec.take() {
        let keep = |container: k8s_openapi::api::core::v1::Container| k8s_openapi::api::core::v1::Container {
            ports: container.ports,
            restart_policy: container.restart_policy,
            ..Default::default()
        };
        pod.spec = Some(k8s_openapi::api::core::v1::PodSpec {
            host_network: spec.host_network,
            node_name: spec.node_name,
            containers: spec.containers.into_iter().map(keep).collect(),
            init_containers: spec.init_containers.map(|all| all.into_iter().map(keep).collect()),
            ..Default::default()
        });
    }
    if let Some(status) = pod.status.take() {
        pod.status = Some(k8s_openapi::api::core::v1::PodStatus {
            phase: status.phase,
            pod_ip: status.pod_ip,
            pod_ips: status.pod_ips,
            ..Default::default()
        });
    }
}
