//! The driver: waits for changes, builds the model, renders it, applies the difference to the kernel.
//!
//! What is in the kernel stays when this process ends or the API server is away: the rules do the work, not we.
use crate::{
    config::Config,
    conntrack, model,
    nftables::{apply, render, ruleset::Ruleset},
};
use component_base::{backoff::Backoff, informer::Informer, metrics};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{Api, Client, runtime::watcher};
use model::ServicePort;
use parking_lot::RwLock;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};
use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

const RETRY_BASE: Duration = Duration::from_millis(500);
const RETRY_CAP: Duration = Duration::from_secs(30);

/// How the rules stand, for `/healthz`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Health {
    /// When the rules last were as they should be.
    pub last_updated: Option<SystemTime>,
    /// When a change came that is not applied yet.
    pub queued: Option<Instant>,
}

/// Keeps the kernel's rules for both families.
pub struct Proxier {
    config: Config,
    services: Informer<Service>,
    slices: Informer<EndpointSlice>,
    changed: Arc<Notify>,
    health: Arc<RwLock<Health>>,
    families: [Family; 2],
    metrics: Metrics,
}

/// One address family; `applied` is what the kernel holds, none when that is not known.
struct Family {
    settings: render::Settings,
    applied: Option<Ruleset>,
    ports: Vec<ServicePort>,
}

struct Metrics {
    sync_duration: Histogram,
    last_timestamp: Gauge,
    failures: Counter,
}

impl Proxier {
    /// Starts to watch; [`Proxier::run`] does the work.
    pub fn new(config: Config, client: Client) -> Self {
        let selection = watcher::Config::default().labels(&format!("!{}", model::PROXY_NAME_LABEL));
        let headless = watcher::Config::default().labels("!service.kubernetes.io/headless");
        let services = Informer::start(Api::<Service>::all(client.clone()), selection);
        let slices = Informer::start(Api::<EndpointSlice>::all(client), headless);
        let changed = Arc::new(Notify::new());
        let health = Arc::new(RwLock::new(Health::default()));
        let announce = {
            let (changed, health) = (changed.clone(), health.clone());
            move || {
                health.write().queued.get_or_insert_with(Instant::now);
                changed.notify_one();
            }
        };
        let also = announce.clone();
        services.on_change(move |_| announce());
        slices.on_change(move |_| also());
        let family = |ipv6| Family {
            settings: render::Settings {
                ipv6,
                cluster_cidrs: of_family(&config.cluster_cidrs, ipv6),
                masquerade_all: config.masquerade_all,
                mark: config.mark,
                node_port_addresses: of_family(&config.node_port_addresses, ipv6),
            },
            applied: None,
            ports: Vec::new(),
        };
        let families = [family(false), family(true)];
        Self { config, services, slices, changed, health, families, metrics: Metrics::new() }
    }

    pub fn health(&self) -> Arc<RwLock<Health>> {
        self.health.clone()
    }

    /// Until `shutdown`. The rules stay.
    pub async fn run(mut self, shutdown: CancellationToken) -> anyhow::Result<()> {
        // Rules made from half of the Services would cut off the other half.
        tokio::select! {
            () = async { tokio::join!(self.services.synced(), self.slices.synced()); } => {}
            () = shutdown.cancelled() => return Ok(()),
        }
        let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
        loop {
            let wait = match self.sync().await {
                Ok(()) => {
                    backoff.reset();
                    self.config.sync_period
                }
                Err(cause) => {
                    self.metrics.failures.inc();
                    error!(error = %cause, retry_ms = backoff.current().as_millis() as u64, "rules not applied");
                    backoff.next_wait()
                }
            };
            tokio::select! {
                () = self.changed.notified() => tokio::time::sleep(self.config.min_sync_period).await,
                () = tokio::time::sleep(wait) => self.check().await,
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    async fn sync(&mut self) -> Result<(), apply::NftError> {
        let started = Instant::now();
        // What changes from here on is announced anew.
        let queued = std::mem::take(&mut self.health.write().queued);
        let (services, slices) = (self.services.list(), self.slices.list());
        for family in &mut self.families {
            let outcome = family.sync(&services, &slices, &self.config.node).await;
            if outcome.is_err() {
                self.health.write().queued = queued.or(Some(started));
                return outcome;
            }
        }
        self.health.write().last_updated = Some(SystemTime::now());
        self.metrics.sync_duration.observe(started.elapsed().as_secs_f64());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.metrics.last_timestamp.set(now.as_secs() as i64);
        Ok(())
    }

    /// Someone may have flushed all tables: then everything is made anew.
    async fn check(&mut self) {
        for family in &mut self.families {
            if family.applied.is_some() && !apply::exists(&render::table(family.settings.ipv6)).await {
                error!(ipv6 = family.settings.ipv6, "the table is gone; making it anew");
                family.applied = None;
            }
        }
    }
}

impl Family {
    async fn sync(
        &mut self,
        services: &[Arc<Service>],
        slices: &[Arc<EndpointSlice>],
        node: &str,
    ) -> Result<(), apply::NftError> {
        let ports = model::build(
            services.iter().map(AsRef::as_ref),
            slices.iter().map(AsRef::as_ref),
            node,
            self.settings.ipv6,
        );
        let wanted = render::render(&ports, &self.settings);
        let table = render::table(self.settings.ipv6);
        let transaction = match &self.applied {
            Some(applied) => wanted.update_from(applied, &table),
            None => wanted.create(&table),
        };
        if !transaction.is_empty() {
            if let Err(error) = apply::apply(&transaction).await {
                self.applied = None;
                return Err(error);
            }
            info!(ipv6 = self.settings.ipv6, ports = ports.len(), lines = transaction.lines().count(), "rules applied");
        }
        let stale = conntrack::stale(&self.ports, &ports);
        // What the kernel remembered before we started cannot be known to be stale.
        if self.applied.is_some() && !stale.is_empty() {
            debug!(flows = stale.len(), "forgetting stale flows");
            conntrack::forget(&stale).await;
        }
        self.ports = ports;
        self.applied = Some(wanted);
        Ok(())
    }
}

impl Metrics {
    fn new() -> Self {
        let buckets = prometheus_client::metrics::histogram::exponential_buckets(0.001, 2.0, 15);
        Self {
            sync_duration: metrics::register(
                "kubeproxy_sync_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds",
                Histogram::new(buckets),
            ),
            last_timestamp: metrics::register(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "The last time proxy rules were successfully synced",
                Gauge::default(),
            ),
            failures: metrics::register(
                "kubeproxy_sync_proxy_rules_nftables_sync_failures",
                "Cumulative proxy nftables sync failures",
                Counter::default(),
            ),
        }
    }
}

fn of_family(ranges: &[String], ipv6: bool) -> Vec<String> {
    ranges.iter().filter(|r| r.contains(':') == ipv6).cloned().collect()
}
