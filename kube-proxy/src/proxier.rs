//! The driver: waits for changes, makes what changed of the model anew, and has the mode apply the difference to the kernel.
//!
//! What is in the kernel stays when this process ends or the API server is away: the rules do the work, not we. (The mode
//! userspace, which forwards by itself, is the exception.)
use crate::{
    backend::Backend,
    config::{Config, DetectLocalMode},
    conntrack,
    health_check::HealthChecks,
    metrics::Metrics,
    model::{self, NodeFacts, Protocol, ServicePort},
    settings::{LocalTraffic, Settings},
    world::{self, Batch, Changes, Ports},
};
use component_base::{backoff::Backoff, cidr::Cidr, command::CommandError, informer::Informer};
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use kube::{Api, Client, runtime::watcher};
use parking_lot::RwLock;
use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

const RETRY_BASE: Duration = Duration::from_millis(500);
const RETRY_CAP: Duration = Duration::from_secs(30);
/// A Service and its endpoints change one after the other: so long they are waited for, to be applied together.
const SETTLE: Duration = Duration::from_millis(2);
/// There only in a kernel that has IPv6.
const IPV6: &str = "/proc/net/if_inet6";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// As `ToBeDeletedTaint`: the cluster's autoscaler is about to remove the node.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// How the rules stand, for `/healthz`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Health {
    /// When the rules last were as they should be.
    pub last_updated: Option<SystemTime>,
    /// Whether load balancers should send this node anything.
    pub node_eligible: bool,
}

/// Keeps the kernel's rules for both families.
pub struct Proxier {
    config: Config,
    services: Informer<Service>,
    slices: Informer<EndpointSlice>,
    nodes: Informer<Node>,
    changes: Arc<Changes>,
    changed: Arc<Notify>,
    health: Arc<RwLock<Health>>,
    node: NodeFacts,
    /// The second is left out where the kernel has no IPv6.
    families: Vec<Family>,
    health_checks: HealthChecks,
    metrics: Metrics,
}

/// One address family.
struct Family {
    settings: Settings,
    backend: Backend,
    /// What the kernel shall hold.
    wanted: Ports,
    /// Whether it does.
    is_known: bool,
}

impl Proxier {
    /// Starts to watch; [`Proxier::run`] does the work.
    pub fn new(config: Config, client: Client) -> Self {
        let selection = watcher::Config::default().labels(&format!("!{}", model::PROXY_NAME_LABEL));
        let headless = watcher::Config::default().labels("!service.kubernetes.io/headless");
        let own = watcher::Config::default().fields(&format!("metadata.name={}", config.node));
        let services =
            Informer::start_with_transform(Api::<Service>::all(client.clone()), selection, world::slim_service);
        let slices =
            Informer::start_with_transform(Api::<EndpointSlice>::all(client.clone()), headless, world::slim_slice);
        let nodes = Informer::start_with_transform(Api::<Node>::all(client), own, slim_node);
        let (changes, changed) = (Arc::new(Changes::default()), Arc::new(Notify::new()));
        let (log, wake) = (changes.clone(), changed.clone());
        services.on_change(move |change| {
            if let Some(service) = change.latest() {
                log.service(service);
                wake.notify_one();
            }
        });
        let (log, wake) = (changes.clone(), changed.clone());
        slices.on_change(move |change| {
            log.slice(change.old.map(AsRef::as_ref), change.new.map(AsRef::as_ref));
            wake.notify_one();
        });
        let (health, wake) =
            (Arc::new(RwLock::new(Health { node_eligible: true, last_updated: None })), changed.clone());
        let eligible = health.clone();
        nodes.on_change(move |change| {
            eligible.write().node_eligible = change.new.is_some_and(|node| is_eligible(node));
            wake.notify_one();
        });
        let family = |ipv6| Family {
            settings: Settings {
                ipv6,
                local: LocalTraffic::Unknown,
                masquerade_all: config.masquerade_all,
                mark: config.mark,
                node_port_addresses: of_family(&config.node_port_addresses, ipv6),
                localhost_node_ports: config.localhost_node_ports,
            },
            backend: Backend::new(&config.mode),
            wanted: Ports::new(),
            is_known: false,
        };
        let mut families = vec![family(false)];
        families.extend(Path::new(IPV6).exists().then(|| family(true)));
        let node = NodeFacts { name: config.node.clone(), zone: String::new() };
        let metrics = Metrics::new(config.mode.mode, changes.clone());
        let health_checks = HealthChecks::default();
        Self { config, services, slices, nodes, changes, changed, health, node, families, health_checks, metrics }
    }

    pub fn health(&self) -> Arc<RwLock<Health>> {
        self.health.clone()
    }

    pub fn changes(&self) -> Arc<Changes> {
        self.changes.clone()
    }

    /// Until `shutdown`. The rules stay.
    pub async fn run(mut self, shutdown: CancellationToken) -> anyhow::Result<()> {
        // Rules made from half of the Services would cut off the other half.
        tokio::select! {
            () = async { tokio::join!(self.services.synced(), self.slices.synced(), self.nodes.synced()); } => {}
            () = shutdown.cancelled() => return Ok(()),
        }
        let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
        loop {
            let started = Instant::now();
            let wait = match self.sync().await {
                Ok(()) => {
                    backoff.reset();
                    self.config.sync_period
                }
                Err(cause) => {
                    error!(error = %cause, retry_ms = backoff.current().as_millis() as u64, "rules not applied");
                    backoff.next_wait()
                }
            };
            let healthy = backoff.failures() == 0;
            self.health_checks.proxy_healthy.store(healthy, Ordering::Relaxed);
            tokio::select! {
                // After a failure what comes waits with what failed.
                () = self.changed.notified(), if healthy => {
                    let rest = self.config.min_sync_period.saturating_sub(started.elapsed());
                    tokio::time::sleep(rest.max(SETTLE)).await;
                }
                () = tokio::time::sleep(wait) => self.check().await,
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    async fn sync(&mut self) -> Result<(), CommandError> {
        self.read_node();
        // What changes from here on is announced anew.
        let batch = self.changes.take();
        let started = Instant::now();
        let outcome = self.apply(&batch).await;
        if outcome.is_err() {
            self.changes.put_back(batch);
            return outcome;
        }
        for key in &batch.dirty {
            let service = self.services.get(&key.namespace, &key.name);
            let port = service.and_then(|service| model::health_check_port(&service));
            self.health_checks.set(key, port, self.families.iter().map(|family| &family.wanted));
        }
        self.health_checks.listen().await;
        self.metrics.synced(started.elapsed(), &batch, self.families.iter().map(|family| family.settings.ipv6));
        self.health.write().last_updated = Some(SystemTime::now());
        Ok(())
    }

    /// What changed is made anew in the model, then in the kernel. A family that fails does not keep the other waiting.
    async fn apply(&mut self, batch: &Batch) -> Result<(), CommandError> {
        let mut outcome = Ok(());
        for family in &mut self.families {
            let ipv6 = family.settings.ipv6;
            let (mut old, mut new) = (Vec::new(), Vec::new());
            for key in &batch.dirty {
                let former: Vec<Arc<ServicePort>> =
                    world::of_service(&family.wanted, key).map(|(_, port)| port.clone()).collect();
                let mut ports = self.changes.build(key, &self.services, &self.slices, &self.node, ipv6);
                ports.sort_by(|a, b| a.id.cmp(&b.id));
                ports.dedup_by(|a, b| a.id == b.id);
                if former.iter().map(AsRef::as_ref).eq(ports.iter()) {
                    continue;
                }
                former.iter().for_each(|port| drop(family.wanted.remove(&port.id)));
                let ports: Vec<_> = ports.into_iter().map(Arc::new).collect();
                family.wanted.extend(ports.iter().map(|port| (port.id.clone(), port.clone())));
                old.extend(former);
                new.extend(ports);
            }
            self.metrics.changed(ipv6, old.iter().map(AsRef::as_ref), new.iter().map(AsRef::as_ref));
            outcome = outcome.and(family.apply(&old, &new, &self.metrics).await);
        }
        outcome
    }

    /// What this node says about itself: its zone, its addresses, its pods' range.
    fn read_node(&mut self) {
        let node = self.nodes.get("", &self.config.node);
        let labels = node.as_ref().and_then(|node| node.metadata.labels.as_ref());
        let zone = labels.and_then(|labels| labels.get(ZONE_LABEL)).cloned().unwrap_or_default();
        if zone != self.node.zone {
            info!(zone, "this node's zone");
            self.node.zone = zone;
            self.changes.touch_all(&self.services);
        }
        let node = node.as_deref();
        for family in &mut self.families {
            let ipv6 = family.settings.ipv6;
            let mut settings = family.settings.clone();
            if self.config.primary {
                settings.node_port_addresses = addresses(node, ipv6).into_iter().map(Cidr::host).collect();
            }
            settings.local = match &self.config.detect_local {
                DetectLocalMode::Interface(name) => LocalTraffic::Interface(name.clone()),
                DetectLocalMode::ClusterCidr => local_sources(of_family(&self.config.cluster_cidrs, ipv6)),
                DetectLocalMode::NodeCidr => local_sources(of_family(&pod_cidrs(node), ipv6)),
            };
            if settings != family.settings {
                family.settings = settings;
                family.is_known = false;
            }
        }
    }

    /// Someone may have flushed all rules: then everything is made anew.
    async fn check(&mut self) {
        for family in &mut self.families {
            if family.is_known && !family.backend.is_intact(family.settings.ipv6).await {
                debug!(ipv6 = family.settings.ipv6, "making all rules anew");
                family.is_known = false;
            }
        }
    }
}

impl Family {
    /// Takes the kernel to `wanted`, which came about by `old` becoming `new`.
    async fn apply(
        &mut self,
        old: &[Arc<ServicePort>],
        new: &[Arc<ServicePort>],
        metrics: &Metrics,
    ) -> Result<(), CommandError> {
        if self.is_known && old.is_empty() && new.is_empty() {
            return Ok(());
        }
        let (ipv6, started) = (self.settings.ipv6, Instant::now());
        if self.is_known {
            if let Err(cause) = self.backend.update(old, new, &self.wanted, &self.settings).await {
                // Somebody changed our rules, or two Services claim one address: all anew, at once.
                warn!(ipv6, error = %cause, "the difference does not apply; making all rules anew");
                metrics.failed(ipv6, false);
                self.is_known = false;
            }
            metrics.applied(ipv6, false, started.elapsed());
        }
        let whole = !self.is_known;
        if whole {
            if let Err(cause) = self.backend.replace(&self.wanted, &self.settings).await {
                metrics.failed(ipv6, true);
                return Err(cause);
            }
            metrics.applied(ipv6, true, started.elapsed());
        }
        self.is_known = true;
        if let Backend::Iptables([written, total]) = &self.backend {
            metrics.iptables(ipv6, written, total);
        }
        info!(
            ipv6,
            ports = self.wanted.len(),
            changed = old.len().max(new.len()),
            ms = started.elapsed().as_millis() as u64,
            "rules applied"
        );
        // What this process forwards by itself is not rewritten by the kernel.
        if !matches!(self.backend, Backend::Userspace(_)) {
            let is_udp = |port: &&ServicePort| port.id.protocol == Protocol::Udp;
            let all = self.wanted.values().map(AsRef::as_ref).filter(|_| whole);
            let udp: Vec<&ServicePort> = all.chain(new.iter().map(AsRef::as_ref)).filter(is_udp).collect();
            forget_flows(&udp, ipv6, metrics).await;
        }
        Ok(())
    }
}

/// Flows to these ports that go where they should not are forgotten.
async fn forget_flows(udp: &[&ServicePort], ipv6: bool, metrics: &Metrics) {
    if udp.is_empty() {
        return;
    }
    let started = Instant::now();
    match conntrack::reconcile(udp, ipv6).await {
        Ok(flows) => {
            metrics.forgotten(ipv6, flows, started.elapsed());
            if flows > 0 {
                debug!(ipv6, flows, "stale flows forgotten");
            }
        }
        Err(error) => warn!(ipv6, %error, "stale UDP flows run out by themselves"),
    }
}

fn local_sources(ranges: Vec<Cidr>) -> LocalTraffic {
    if ranges.is_empty() { LocalTraffic::Unknown } else { LocalTraffic::Sources(ranges) }
}

fn of_family(ranges: &[Cidr], ipv6: bool) -> Vec<Cidr> {
    ranges.iter().filter(|range| range.is_ipv6() == ipv6).copied().collect()
}

fn addresses(node: Option<&Node>, ipv6: bool) -> BTreeSet<IpAddr> {
    let status = node.and_then(|node| node.status.as_ref());
    let all = status.into_iter().flat_map(|status| status.addresses.iter().flatten());
    let inner = all.filter(|address| address.type_ == "InternalIP").filter_map(|address| address.address.parse().ok());
    inner.filter(|address: &IpAddr| address.is_ipv6() == ipv6).collect()
}

fn pod_cidrs(node: Option<&Node>) -> Vec<Cidr> {
    let spec = node.and_then(|node| node.spec.as_ref());
    spec.into_iter().flat_map(|s| s.pod_cidrs.iter().flatten()).filter_map(|range| range.parse().ok()).collect()
}

fn is_eligible(node: &Node) -> bool {
    let mut taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    node.metadata.deletion_timestamp.is_none() && !taints.any(|taint| taint.key == TO_BE_DELETED)
}

/// Of a node only what is read here.
fn slim_node(node: &mut Node) {
    node.metadata.annotations = None;
    if let Some(status) = node.status.as_mut() {
        let addresses = status.addresses.take();
        *status = Default::default();
        status.addresses = addresses;
    }
}
