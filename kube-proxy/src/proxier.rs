//! The driver: waits for changes, makes what changed of the model anew, and has the mode apply the difference to the kernel.
//!
//! What is in the kernel stays when this process ends or the API server is away: the rules do the work, not we. (The mode
//! userspace, which forwards by itself, is the exception.)
use crate::{
    api::{self, Node, ServiceCIDR},
    backend::Backend,
    config::{Config, DetectLocalMode, Mode},
    conntrack,
    health_check::HealthChecks,
    metrics::Metrics,
    model::{self, Protocol, ServicePort},
    objects::{Service, Slice},
    settings::{LocalTraffic, Settings},
    world::{Batch, Changes, Ports},
};
use component_base::{
    backoff::{Backoff, Pace},
    cidr::Cidr,
    command::CommandError,
    informer::Informer,
};
use kube::{Api, Client, api::WatchParams};
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
    /// Whether there are rules for IPv6, too.
    pub ipv6: bool,
}

/// Keeps the kernel's rules for both families.
pub struct Proxier {
    config: Config,
    services: Informer<Service>,
    slices: Informer<Slice>,
    nodes: Informer<Node>,
    /// Watched in the mode nftables, which alone reads them.
    ranges: Option<Informer<ServiceCIDR>>,
    changes: Arc<Changes>,
    changed: Arc<Notify>,
    health: Arc<RwLock<Health>>,
    /// This node's, of its label `topology.kubernetes.io/zone`; empty if it has none.
    zone: String,
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
    /// To look whether it does still takes long where there is much.
    looks: Pace,
}

impl Proxier {
    /// Starts to watch; [`Proxier::run`] does the work.
    pub fn new(config: Config, client: Client) -> Self {
        let selection = WatchParams::default().labels(&format!("!{}", model::PROXY_NAME_LABEL));
        let headless = WatchParams::default().labels("!service.kubernetes.io/headless");
        let own = WatchParams::default().fields(&format!("metadata.name={}", config.node));
        let services = Informer::start_kept(Api::all(client.clone()), selection, <Service as From<api::Service>>::from);
        let node = config.node.clone();
        let slices = Informer::start_kept(Api::all(client.clone()), headless, move |slice| Slice::new(slice, &node));
        let nodes =
            Informer::start_slim(Api::all(client.clone()), own, |node: &mut Node| node.metadata.annotations = None);
        let ranges = (config.mode.mode == Mode::Nftables)
            .then(|| Informer::<ServiceCIDR>::start_slim(Api::all(client), WatchParams::default(), |_| {}));
        let (changes, changed) = (Arc::new(Changes::default()), Arc::new(Notify::new()));
        let (log, wake) = (changes.clone(), changed.clone());
        services.on_change(move |change| {
            log.service(change.key);
            wake.notify_one();
        });
        let (log, wake) = (changes.clone(), changed.clone());
        slices.on_change(move |change| {
            log.slice(change.key, change.old.map(AsRef::as_ref), change.new.map(AsRef::as_ref));
            wake.notify_one();
        });
        if let Some(ranges) = &ranges {
            let wake = changed.clone();
            ranges.on_change(move |_| wake.notify_one());
        }
        let (health, wake) = (
            Arc::new(RwLock::new(Health { node_eligible: true, last_updated: None, ipv6: Path::new(IPV6).exists() })),
            changed.clone(),
        );
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
                drop_invalid: config.drop_invalid,
                node_address: None,
                service_ranges: Vec::new(),
            },
            backend: Backend::new(&config.mode),
            wanted: Ports::new(),
            is_known: false,
            looks: Pace::default(),
        };
        let mut families = vec![family(false)];
        families.extend(Path::new(IPV6).exists().then(|| family(true)));
        let metrics = Metrics::new(config.mode.mode, changes.clone());
        let health_checks = HealthChecks::default();
        let zone = String::new();
        Self {
            config,
            services,
            slices,
            nodes,
            ranges,
            changes,
            changed,
            health,
            zone,
            families,
            health_checks,
            metrics,
        }
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
        let mut checked = Instant::now();
        loop {
            let started = Instant::now();
            let wait = match self.sync().await {
                Ok(()) => {
                    backoff.reset();
                    // Whatever changes meanwhile.
                    self.config.sync_period.saturating_sub(checked.elapsed())
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
                () = tokio::time::sleep(wait) => {
                    self.check().await;
                    checked = Instant::now();
                }
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
            let port = service.and_then(|service| service.health_check_port);
            self.health_checks.set(key, port, self.families.iter().map(|family| &family.wanted));
        }
        let ranges: Vec<Cidr> = self.families.iter().flat_map(|f| f.settings.node_port_addresses.clone()).collect();
        self.health_checks.listen(&ranges).await;
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
                let mut ports = self.changes.build(key, &self.services, &self.slices, &self.zone, ipv6);
                ports.sort_by(|a, b| a.id.cmp(&b.id));
                ports.dedup_by(|a, b| a.id == b.id);
                if family.wanted.get(key).map_or(&[][..], AsRef::as_ref) == ports {
                    continue;
                }
                old.extend(family.wanted.remove(key));
                if !ports.is_empty() {
                    let ports: Arc<[ServicePort]> = ports.into();
                    family.wanted.insert(key.clone(), ports.clone());
                    new.push(ports);
                }
            }
            let [gone, come] = [&old, &new].map(|services| services.iter().flat_map(|ports| ports.iter()));
            self.metrics.changed(ipv6, gone, come);
            outcome = outcome.and(family.apply(&old, &new, &self.metrics).await);
        }
        outcome
    }

    /// What this node says about itself: its zone, its addresses, its pods' range.
    fn read_node(&mut self) {
        let node = self.nodes.get("", &self.config.node);
        let labels = node.as_ref().and_then(|node| node.metadata.labels.as_ref());
        let zone = labels.and_then(|labels| labels.get(ZONE_LABEL)).cloned().unwrap_or_default();
        if zone != self.zone {
            info!(zone, "this node's zone");
            self.zone = zone;
            self.changes.touch_all();
        }
        let node = node.as_deref();
        // A server that has none of them serves none; then nothing is known of what is nobody's.
        let ranges = self.ranges.iter().flat_map(Informer::list);
        let ranges = ranges.flat_map(|range| range.spec.cidrs.clone().unwrap_or_default());
        let ranges: Vec<Cidr> = ranges.filter_map(|range| range.parse().ok()).collect();
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
            settings.node_address = addresses(node, ipv6).first().copied();
            settings.service_ranges = of_family(&ranges, ipv6);
            settings.service_ranges.sort();
            if settings != family.settings {
                family.settings = settings;
                family.is_known = false;
            }
        }
    }

    /// Someone may have changed our rules: then everything is made anew.
    async fn check(&mut self) {
        for family in self.families.iter_mut().filter(|family| family.is_known) {
            let Family { settings, backend, wanted, looks, .. } = family;
            if looks.run(backend.is_intact(wanted, settings)).await == Some(false) {
                debug!(ipv6 = settings.ipv6, "making all rules anew");
                family.is_known = false;
            }
            if let Backend::Iptables(_, dropped) = family.backend {
                self.metrics.dropped(family.settings.ipv6, dropped);
            }
        }
    }
}

impl Family {
    /// Takes the kernel to `wanted`, which came about by `old` becoming `new`.
    async fn apply(
        &mut self,
        old: &[Arc<[ServicePort]>],
        new: &[Arc<[ServicePort]>],
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
        if let Backend::Iptables([written, total], _) = &self.backend {
            metrics.iptables(ipv6, written, total);
        }
        info!(
            ipv6,
            ports = self.wanted.values().map(|ports| ports.len()).sum::<usize>(),
            changed = old.len().max(new.len()),
            ms = started.elapsed().as_millis() as u64,
            "rules applied"
        );
        // What this process forwards by itself is not rewritten by the kernel.
        if !matches!(self.backend, Backend::Userspace(_)) {
            let all: Vec<&ServicePort> =
                self.wanted.values().filter(|_| whole).chain(new).flat_map(|ports| ports.iter()).collect();
            for protocol in [Protocol::Udp, Protocol::Sctp] {
                let ports = all.iter().copied().filter(|port| port.id.protocol == protocol).collect();
                forget_flows(ports, protocol, ipv6, metrics).await;
            }
        }
        Ok(())
    }
}

/// Flows to these ports that go where they should not are forgotten.
async fn forget_flows(ports: Vec<&ServicePort>, protocol: Protocol, ipv6: bool, metrics: &Metrics) {
    if ports.is_empty() {
        return;
    }
    let started = Instant::now();
    match conntrack::reconcile(&ports, protocol, ipv6).await {
        Ok(flows) => {
            metrics.forgotten(ipv6, flows, started.elapsed());
            if flows > 0 {
                debug!(ipv6, flows, "stale flows forgotten");
            }
        }
        Err(error) => warn!(ipv6, ?protocol, %error, "stale flows run out by themselves"),
    }
}

fn local_sources(ranges: Vec<Cidr>) -> LocalTraffic {
    if ranges.is_empty() { LocalTraffic::Unknown } else { LocalTraffic::Sources(ranges) }
}

fn of_family(ranges: &[Cidr], ipv6: bool) -> Vec<Cidr> {
    ranges.iter().filter(|range| range.is_ipv6() == ipv6).copied().collect()
}

fn addresses(node: Option<&Node>, ipv6: bool) -> BTreeSet<IpAddr> {
    let all = node.into_iter().flat_map(|node| node.status.addresses.iter().flatten());
    let inner = all.filter(|address| address.r#type == "InternalIP").filter_map(|address| address.address.parse().ok());
    inner.filter(|address: &IpAddr| address.is_ipv6() == ipv6).collect()
}

fn pod_cidrs(node: Option<&Node>) -> Vec<Cidr> {
    let all = node.into_iter().flat_map(|node| node.spec.pod_cidrs.iter().flatten());
    all.filter_map(|range| range.parse().ok()).collect()
}

fn is_eligible(node: &Node) -> bool {
    let mut taints = node.spec.taints.iter().flatten();
    node.metadata.deletion_timestamp.is_none() && !taints.any(|taint| taint.key == TO_BE_DELETED)
}
