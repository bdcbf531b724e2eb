//! What is shown at `/metrics`, under Kubernetes' names.
use crate::{
    config::Mode,
    world::{Batch, Changes, Ports},
};
use component_base::metrics::{register, registry};
use k8s_openapi::jiff::Timestamp;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets, linear_buckets},
    },
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Policy {
    traffic_policy: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Code {
    pub code: u16,
}

pub struct Metrics {
    sync: Histogram,
    pub full: Histogram,
    pub partial: Histogram,
    programming: Histogram,
    last_timestamp: Gauge,
    last_queued: Gauge,
    no_local: Family<Policy, Gauge>,
    pub failures: Counter,
    pub partial_failures: Counter,
    pub flows_forgotten: Counter,
}

/// Answers of `/healthz` and `/livez`, by code.
pub fn health_counter(endpoint: &str) -> Family<Code, Counter> {
    let help = format!("Cumulative proxy {endpoint} HTTP status");
    register(&format!("kubeproxy_proxy_{endpoint}"), &help, Family::default())
}

impl Metrics {
    pub fn new(mode: Mode, changes: Arc<Changes>) -> Self {
        let latency = || Histogram::new(exponential_buckets(0.001, 2.0, 15));
        // As Kubernetes: a quarter of a second, then each second to a minute, then minutes.
        let steps = [0.25, 0.5].into_iter().chain(linear_buckets(1.0, 1.0, 59)).chain(linear_buckets(60.0, 5.0, 12));
        registry().register_collector(Box::new(Counts(changes)));
        let failures = match mode {
            Mode::Iptables => "kubeproxy_sync_proxy_rules_iptables_restore_failures",
            _ => "kubeproxy_sync_proxy_rules_nftables_sync_failures",
        };
        let partial_failures = match mode {
            Mode::Iptables => "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures",
            _ => "kubeproxy_sync_proxy_rules_nftables_partial_sync_failures",
        };
        let rules = "kubeproxy_sync_proxy_rules";
        Self {
            sync: register(&format!("{rules}_duration_seconds"), "SyncProxyRules latency in seconds", latency()),
            full: register(
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds for full resyncs",
                latency(),
            ),
            partial: register(
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds for partial resyncs",
                latency(),
            ),
            programming: register(
                "kubeproxy_network_programming_duration_seconds",
                "In Cluster Network Programming Latency in seconds",
                Histogram::new(steps),
            ),
            last_timestamp: register(
                &format!("{rules}_last_timestamp_seconds"),
                "The last time proxy rules were successfully synced",
                Gauge::default(),
            ),
            last_queued: register(
                &format!("{rules}_last_queued_timestamp_seconds"),
                "The last time a sync of proxy rules was queued",
                Gauge::default(),
            ),
            no_local: register(
                &format!("{rules}_no_local_endpoints"),
                "Number of services with a Local traffic policy and no endpoints",
                Family::default(),
            ),
            failures: register(failures, "Cumulative failures to apply the proxy rules", Counter::default()),
            partial_failures: register(
                partial_failures,
                "Cumulative failures to apply differences of the proxy rules, after which all were made anew",
                Counter::default(),
            ),
            flows_forgotten: register(
                "kubeproxy_conntrack_reconciler_deleted_entries",
                "Cumulative conntrack flows deleted by conntrack reconciler",
                Counter::default(),
            ),
        }
    }

    /// After the rules were applied.
    pub fn synced(&self, took: Duration, batch: &Batch, families: &[&Ports]) {
        self.sync.observe(took.as_secs_f64());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.last_timestamp.set(now.as_secs() as i64);
        let waited = batch.since.map(|since| since.elapsed()).unwrap_or_default();
        self.last_queued.set(now.saturating_sub(waited).as_secs() as i64);
        let stamp = Timestamp::now();
        for trigger in &batch.triggers {
            self.programming.observe(stamp.duration_since(*trigger).as_secs_f64().max(0.0));
        }
        let ports = || families.iter().flat_map(|ports| ports.values()).filter(|port| port.has_endpoints);
        let internal = ports().filter(|port| port.internal_local && port.local_endpoints.is_empty()).count();
        let external =
            ports().filter(|port| port.external_local && port.is_external() && port.local_endpoints.is_empty()).count();
        for (traffic_policy, count) in [("internal", internal), ("external", external)] {
            self.no_local.get_or_create(&Policy { traffic_policy }).set(count as i64);
        }
    }
}

/// Reads the counts of changes when they are asked for.
#[derive(Debug)]
struct Counts(Arc<Changes>);

impl Collector for Counts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (services, endpoints, pending) = self.0.counts();
        for (name, value) in [("service", services), ("endpoint", endpoints)] {
            let total = ConstCounter::new(value);
            let help = format!("Cumulative proxy rules {name} changes");
            let full = format!("kubeproxy_sync_proxy_rules_{name}_changes");
            total.encode(encoder.encode_descriptor(&full, &help, None, total.metric_type())?)?;
            let waiting = ConstGauge::new(pending as i64);
            let help = format!("Pending proxy rules {name} changes");
            let full = format!("kubeproxy_sync_proxy_rules_{name}_changes_pending");
            waiting.encode(encoder.encode_descriptor(&full, &help, None, waiting.metric_type())?)?;
        }
        Ok(())
    }
}
