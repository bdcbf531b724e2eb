//! Gives each node a part of the cluster's pod addresses (`spec.podCIDR`).
//!
//! What is taken is read from the nodes: nothing else remembers it, so a restart loses nothing. Parts are only given
//! once all nodes are known.
pub(super) mod cidr;

use crate::{
    options::Settings,
    runtime::{Context, Next, Reconcile, SyncError, WorkQueue, gone_is_fine, run},
};
use cidr::{Cidr, CidrError, CidrSet};
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
    metrics::{Labels, register},
};
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
};
use parking_lot::Mutex;
use prometheus_client::metrics::{family::Family, gauge::Gauge};
use serde_json::json;
use std::{collections::HashMap, sync::Arc};
use tracing::{error, info};

const NAME: &str = "cidrallocator_node";
const DEFAULT_MASK: (u8, u8) = (24, 64);

struct Controller {
    client: Client,
    recorder: Recorder,
    nodes: Informer<Node>,
    allocations: Mutex<Allocations>,
}

struct Allocations {
    sets: Vec<CidrSet>,
    /// What was given and the cache may not show yet, by the node's UID.
    given: HashMap<String, Vec<Cidr>>,
}

/// Runs until shutdown, if there is a `--cluster-cidr` and `--allocate-node-cidrs`.
pub async fn start(context: Arc<Context>) {
    if !context.settings.allocate_node_cidrs || context.settings.cluster_cidr.is_empty() {
        return;
    }
    let sets = match sets(&context.settings) {
        Ok(sets) => sets,
        Err(cause) => {
            error!(%cause, "nodes get no podCIDR");
            return;
        }
    };
    let Some(client) = context.client_for("node-controller").await else { return };
    let nodes = context.informers.get::<Node>();
    let controller = Arc::new(Controller {
        recorder: context.recorder(&client, "cidrAllocator"),
        client,
        nodes: nodes.clone(),
        allocations: Mutex::new(Allocations { sets, given: HashMap::new() }),
    });
    nodes.synced().await;
    let queue = Arc::new(WorkQueue::new(NAME));
    let (to, owner) = (queue.clone(), controller.clone());
    // The nodes that are there come first, as creations: all that is taken is marked before a worker runs.
    nodes.on_change(move |change| {
        let mut allocations = owner.allocations.lock();
        match (change.old, change.new) {
            (_, Some(node)) => {
                let own = cidrs_of(node);
                if own.is_empty() {
                    to.add(node.name_any());
                } else {
                    allocations.occupy(&own);
                }
            }
            (Some(node), None) => allocations.release(node),
            (None, None) => {}
        }
    });
    let running: Family<Labels<2>, Gauge> = register(
        "running_managed_controllers",
        "Indicates where instances of a controller are currently running",
        Family::default(),
    );
    running.get_or_create(&[("manager", "kube-controller-manager".to_owned()), ("name", "nodeipam".to_owned())]).set(1);
    run(NAME, queue, controller, 4, context.shutdown.clone()).await;
}

fn sets(settings: &Settings) -> Result<Vec<CidrSet>, CidrError> {
    let mut sets = Vec::new();
    for cluster in &settings.cluster_cidr {
        let cluster = Cidr::parse(cluster)?;
        let given = if cluster.is_v6() { settings.node_cidr_mask_size_ipv6 } else { settings.node_cidr_mask_size_ipv4 };
        let default = if cluster.is_v6() { DEFAULT_MASK.1 } else { DEFAULT_MASK.0 };
        let part = given.or(settings.node_cidr_mask_size).unwrap_or(default.max(cluster.prefix()));
        let mut set = CidrSet::new(cluster, part)?;
        for services in &settings.service_cluster_ip_range {
            set.occupy(&Cidr::parse(services)?);
        }
        sets.push(set);
    }
    Ok(sets)
}

fn cidrs_of(node: &Node) -> Vec<Cidr> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let listed = spec.pod_cidrs.iter().flatten().chain(spec.pod_cidr.iter());
    let mut all: Vec<Cidr> = listed.filter_map(|c| Cidr::parse(c).ok()).collect();
    all.dedup();
    all
}

impl Allocations {
    fn occupy(&mut self, cidrs: &[Cidr]) {
        self.sets.iter_mut().for_each(|set| cidrs.iter().for_each(|c| set.occupy(c)));
    }

    fn release(&mut self, node: &Node) {
        let mut cidrs = cidrs_of(node);
        cidrs.extend(self.given.remove(node.metadata.uid.as_deref().unwrap_or_default()).into_iter().flatten());
        self.sets.iter_mut().for_each(|set| cidrs.iter().for_each(|c| set.release(c)));
    }

    /// The same node gets the same parts however often it asks.
    fn allocate(&mut self, uid: &str) -> Result<Vec<Cidr>, CidrError> {
        if let Some(given) = self.given.get(uid) {
            return Ok(given.clone());
        }
        let mut cidrs = Vec::new();
        for at in 0..self.sets.len() {
            match self.sets[at].allocate() {
                Ok(cidr) => cidrs.push(cidr),
                Err(error) => {
                    for (set, cidr) in self.sets.iter_mut().zip(&cidrs) {
                        set.release(cidr);
                    }
                    return Err(error);
                }
            }
        }
        self.given.insert(uid.to_owned(), cidrs.clone());
        Ok(cidrs)
    }
}

impl Reconcile for Controller {
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Next, SyncError> {
        let Some(node) = self.nodes.get("", name) else { return Ok(Next::Settled) };
        if !cidrs_of(&node).is_empty() || node.metadata.deletion_timestamp.is_some() {
            return Ok(Next::Settled);
        }
        let uid = node.metadata.uid.clone().unwrap_or_default();
        let tell = |status: &str| {
            let message = format!("Node {name} status is now: {status}");
            self.recorder.event(&reference(node.as_ref()), Type::Warning, status, "", message);
        };
        let allocated = self.allocations.lock().allocate(&uid);
        let cidrs = match allocated {
            Ok(cidrs) => cidrs,
            Err(error) => {
                tell("CIDRNotAvailable");
                return Err(SyncError::Invalid(error.to_string()));
            }
        };
        let texts: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
        let patch = Patch::Strategic(json!({"metadata": {"uid": uid},
            "spec": {"podCIDR": texts.first(), "podCIDRs": texts}}));
        let api: Api<Node> = Api::all(self.client.clone());
        let outcome = gone_is_fine(api.patch_metadata(name, &PatchParams::default(), &patch).await);
        outcome.inspect_err(|_| tell("CIDRAssignmentFailed"))?;
        info!(node = %name, pod_cidrs = ?texts, "node has its pod addresses");
        Ok(Next::Settled)
    }
}
