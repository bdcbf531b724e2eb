//! The node in the API: registered once, its status kept up to date, its lease renewed. When the API is away nothing here
//! touches what runs; it goes on trying.

pub mod kernel;
pub mod machine;
mod object;

use std::sync::Arc;
use std::time::Duration;

use component_base::backoff::Backoff;
use component_base::events::Type;
use component_base::informer::Informer;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Node, NodeStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Api;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::allocation::Allocator;
use crate::config::KubeletConfiguration;
use crate::events::Events;
use crate::eviction::Shortage;
use crate::runtime::{Runtime, RuntimeWatch};
use crate::shutdown::Shutdown;
use crate::volumes::Volumes;

pub use object::{Facts, labels};

const LEASE_NAMESPACE: &str = "kube-node-lease";
/// While the node is not ready its condition is looked at this often, so that it becomes ready at once.
const UNREADY_PERIOD: Duration = Duration::from_millis(500);

/// Keeps the node's object, status and lease.
pub struct NodeKeeper {
    pub client: kube::Client,
    pub facts: Facts,
    pub config: Arc<KubeletConfiguration>,
    pub runtime: Arc<Runtime>,
    pub watch: Arc<RuntimeWatch>,
    pub events: Arc<Events>,
    /// The node as the API has it.
    pub node: Informer<Node>,
    pub volumes: Arc<Volumes>,
    pub shortage: Shortage,
    pub going_down: Shutdown,
    pub allocator: Arc<Allocator>,
    pub pod_cidr: Mutex<String>,
}

impl NodeKeeper {
    /// Registers, then keeps status and lease until shutdown.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        if self.config.register_node {
            let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(7));
            while let Err(error) = self.register().await {
                warn!(node = %self.facts.name, %error, "node not registered yet");
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(backoff.next_wait()) => {}
                }
            }
            self.events.node(&self.facts.name, Type::Normal, "Starting", "Starting kubelet.");
            if self.config.enforce_node_allocatable.iter().any(|level| level == "pods") {
                let enforced = "Updated Node Allocatable limit across pods";
                self.events.node(&self.facts.name, Type::Normal, "NodeAllocatableEnforced", enforced);
            }
        }
        tokio::join!(self.keep_status(&shutdown), self.keep_lease(&shutdown));
    }

    fn nodes(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    /// Creates the node; one that is there gets the labels that are the kubelet's to set.
    async fn register(&self) -> Result<(), kube::Error> {
        let mut node = object::new_node(&self.facts, &self.config);
        node.status = Some(self.status(None).await);
        match self.nodes().create(&PostParams::default(), &node).await {
            Ok(_) => {
                info!(node = %self.facts.name, "node registered");
                if let Some(status) = &node.status {
                    self.tell(None, status);
                }
                Ok(())
            }
            Err(kube::Error::Api(error)) if error.code == 409 => {
                let existing = self.nodes().get(&self.facts.name).await?;
                if let Some(patch) = object::label_patch(&existing, &node) {
                    self.nodes().patch(&self.facts.name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
                }
                info!(node = %self.facts.name, "node was registered before");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn status(&self, old: Option<&Node>) -> NodeStatus {
        let runtime = self.runtime.cri.status(false).await;
        let images = self.runtime.cri.list_images().await.unwrap_or_default();
        let mut not_ready = object::not_ready(&runtime, self.watch.unhealthy());
        if self.going_down.is_near() {
            not_ready = Some("node is shutting down".to_owned());
        }
        let pressure = self.shortage.now();
        let mut status =
            object::status(&self.facts, &self.config, old, images, not_ready, pressure, apimachinery::time::now());
        status.volumes_in_use = Some(self.volumes.in_use());
        for (name, (all, good)) in self.allocator.capacity() {
            status.capacity.get_or_insert_default().insert(name.clone(), all.to_api());
            status.allocatable.get_or_insert_default().insert(name, good.to_api());
        }
        status
    }

    /// Writes the status when it changed, and once in a while to show that it is current.
    async fn keep_status(&self, shutdown: &CancellationToken) {
        let mut changes = self.allocator.changed.subscribe();
        let mut reported_at: Option<Instant> = None;
        let mut unschedulable = false;
        loop {
            // The informer's copy may be a moment old; a write against it changes nothing that is not meant.
            let old = self.node.get("", &self.facts.name);
            let status = self.status(old.as_deref()).await;
            let ready = object::is_ready(&status);
            if let Some(old) = &old {
                self.pass_on_pod_cidr(old).await;
                let closed = old.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or(false);
                if std::mem::replace(&mut unschedulable, closed) != closed {
                    self.tell_status(if closed { "NodeNotSchedulable" } else { "NodeSchedulable" });
                }
                let changed = object::differs(old.status.as_ref(), &status);
                let due = reported_at.is_none_or(|at| at.elapsed() >= self.config.node_status_report_frequency);
                if changed || due {
                    let patch = object::status_patch(&status);
                    match self
                        .nodes()
                        .patch_status(&self.facts.name, &PatchParams::default(), &Patch::Strategic(&patch))
                        .await
                    {
                        Ok(_) => {
                            debug!(node = %self.facts.name, ready, changed, "node status written");
                            if changed {
                                self.tell(old.status.as_ref(), &status);
                            }
                            reported_at = Some(Instant::now());
                        }
                        Err(kube::Error::Api(error)) if error.code == 404 && self.config.register_node => {
                            warn!(node = %self.facts.name, "the node was deleted; registering it again");
                            if let Err(error) = self.register().await {
                                warn!(node = %self.facts.name, %error, "node not registered");
                            }
                        }
                        Err(error) => warn!(node = %self.facts.name, %error, "node status not written"),
                    }
                }
            } else if self.node.is_synced()
                && self.config.register_node
                && let Err(error) = self.register().await
            {
                warn!(node = %self.facts.name, %error, "node not registered");
            }
            let period = if ready && old.is_some() { self.config.node_status_update_frequency } else { UNREADY_PERIOD };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(period) => {}
                _ = changes.changed() => {}
            }
        }
    }

    /// Tells what changed from one status to the next.
    fn tell(&self, old: Option<&NodeStatus>, new: &NodeStatus) {
        for reason in object::news(old, new) {
            info!(node = %self.facts.name, reason, "node status");
            self.tell_status(reason);
        }
        if object::rebooted(old, new) {
            let boot = new.node_info.as_ref().map_or("", |info| info.boot_id.as_str());
            let message = format!("Node {} has been rebooted, boot id: {boot}", self.facts.name);
            self.events.node(&self.facts.name, Type::Warning, "Rebooted", message);
        }
    }

    fn tell_status(&self, reason: &str) {
        let message = format!("Node {} status is now: {reason}", self.facts.name);
        self.events.node(&self.facts.name, Type::Normal, reason, message);
    }

    async fn pass_on_pod_cidr(&self, node: &Node) {
        let cidr = node.spec.as_ref().and_then(|s| s.pod_cidrs.as_ref()).map(|c| c.join(",")).unwrap_or_default();
        if cidr.is_empty() || *self.pod_cidr.lock() == cidr {
            return;
        }
        match self.runtime.cri.update_runtime_config(&cidr).await {
            Ok(()) => {
                info!(cidr, "pod CIDR passed on to the container runtime");
                *self.pod_cidr.lock() = cidr;
            }
            Err(error) => warn!(%error, cidr, "pod CIDR not passed on to the container runtime"),
        }
    }

    /// Renews the lease four times in its duration.
    async fn keep_lease(&self, shutdown: &CancellationToken) {
        let seconds = self.config.node_lease_duration_seconds.max(4);
        let period = Duration::from_secs(u64::try_from(seconds).unwrap_or(40)) / 4;
        let mut held: Option<Lease> = None;
        loop {
            let pause = match self.renew(held.take(), seconds).await {
                Ok(lease) => {
                    held = Some(lease);
                    period
                }
                Err(error) => {
                    warn!(node = %self.facts.name, %error, "lease not renewed");
                    Duration::from_secs(1).min(period)
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn renew(&self, held: Option<Lease>, seconds: i32) -> Result<Lease, kube::Error> {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), LEASE_NAMESPACE);
        let name = &self.facts.name;
        let current = match held {
            Some(lease) => Some(lease),
            None => api.get_opt(name).await?,
        };
        let fresh = current.is_none();
        let mut lease = current.unwrap_or_else(|| Lease {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(LEASE_NAMESPACE.to_owned()),
                ..Default::default()
            },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        spec.holder_identity = Some(name.clone());
        spec.lease_duration_seconds = Some(seconds);
        spec.renew_time = Some(apimachinery::time::now_micro());
        if lease.metadata.owner_references.as_ref().is_none_or(Vec::is_empty)
            && let Some(uid) = self.node.get("", name).and_then(|n| n.metadata.uid.clone())
        {
            lease.metadata.owner_references = Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Node".to_owned(),
                name: name.clone(),
                uid,
                ..Default::default()
            }]);
        }
        let parameters = PostParams::default();
        if fresh { api.create(&parameters, &lease).await } else { api.replace(name, &parameters, &lease).await }
    }
}
