//! What is shown at `/metrics`, under Kubernetes' names.
use crate::{
    config::Mode,
    iptables,
    model::ServicePort,
    world::{Batch, Changes},
};
use component_base::metrics::{register, registry};
use k8s_openapi::jiff::Timestamp;
use parking_lot::Mutex;
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
struct Ip {
    ip_family: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Policy {
    ip_family: &'static str,
    traffic_policy: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Table {
    ip_family: &'static str,
    table: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Code {
    pub code: u16,
}

type Durations = Family<Ip, Histogram, fn() -> Histogram>;

pub struct Metrics {
    sync: Durations,
    full: Durations,
    partial: Durations,
    programming: Durations,
    last_timestamp: Family<Ip, Gauge>,
    last_queued: Family<Ip, Gauge>,
    no_local: Family<Policy, Gauge>,
    failures: Family<Ip, Counter>,
    partial_failures: Family<Ip, Counter>,
    flows: Durations,
    flows_forgotten: Family<Ip, Counter>,
    iptables_last: Family<Table, Gauge>,
    iptables_total: Family<Table, Gauge>,
    invalid: Counter,
    /// What the rules had counted when they were looked at last, by family.
    invalid_seen: Mutex<[u64; 2]>,
}

/// Answers of `/healthz` and `/livez`, by code.
pub fn health_counter(endpoint: &str) -> Family<Code, Counter> {
    let help = format!("Cumulative proxy {endpoint} HTTP status");
    register(&format!("kubeproxy_proxy_{endpoint}"), &help, Family::default())
}

fn label(ipv6: bool) -> Ip {
    Ip { ip_family: if ipv6 { "IPv6" } else { "IPv4" } }
}

fn latency() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// A quarter of a second, then each second to a minute, then each five to two minutes, each half minute to five.
fn programming_latency() -> Histogram {
    let minutes = linear_buckets(60.0, 5.0, 12).chain(linear_buckets(120.0, 30.0, 7));
    Histogram::new([0.25, 0.5].into_iter().chain(linear_buckets(1.0, 1.0, 59)).chain(minutes))
}

impl Metrics {
    pub fn new(mode: Mode, changes: Arc<Changes>) -> Self {
        registry().register_collector(Box::new(Counts(changes)));
        let histogram = |name: &str, help: &str, make: fn() -> Histogram| {
            register(&format!("kubeproxy_{name}_duration_seconds"), help, Durations::new_with_constructor(make))
        };
        let rules = "kubeproxy_sync_proxy_rules";
        let [failures, partial_failures] = match mode {
            Mode::Iptables => ["iptables_restore", "iptables_partial_restore"],
            _ => ["nftables_sync", "nftables_partial_sync"],
        };
        let failures_of = |what: &str| {
            let help = format!("Cumulative proxy {} failures", what.replace('_', " "));
            register(&format!("{rules}_{what}_failures"), &help, Family::default())
        };
        let latency_help = "SyncProxyRules latency in seconds";
        let metrics = Self {
            sync: histogram("sync_proxy_rules", latency_help, latency),
            full: histogram("sync_full_proxy_rules", &format!("{latency_help} for full resyncs"), latency),
            partial: histogram("sync_partial_proxy_rules", &format!("{latency_help} for partial resyncs"), latency),
            programming: histogram(
                "network_programming",
                "In Cluster Network Programming Latency in seconds",
                programming_latency,
            ),
            last_timestamp: register(
                &format!("{rules}_last_timestamp_seconds"),
                "The last time proxy rules were successfully synced",
                Family::default(),
            ),
            last_queued: register(
                &format!("{rules}_last_queued_timestamp_seconds"),
                "The last time a sync of proxy rules was queued",
                Family::default(),
            ),
            no_local: register(
                &format!("{rules}_no_local_endpoints_total"),
                "Number of services with a Local traffic policy and no endpoints",
                Family::default(),
            ),
            failures: failures_of(failures),
            partial_failures: failures_of(partial_failures),
            flows: histogram("conntrack_reconciler_sync", "ReconcileConntrackFlowsLatency latency in seconds", latency),
            flows_forgotten: register(
                "kubeproxy_conntrack_reconciler_deleted_entries",
                "Cumulative conntrack flows deleted by conntrack reconciler",
                Family::default(),
            ),
            iptables_last: Family::default(),
            iptables_total: Family::default(),
            invalid: Counter::default(),
            invalid_seen: Mutex::default(),
        };
        if mode == Mode::Iptables {
            let (last, total) = (metrics.iptables_last.clone(), metrics.iptables_total.clone());
            register(
                &format!("{rules}_iptables_last"),
                "Number of iptables rules written by kube-proxy in last sync",
                last,
            );
            register(&format!("{rules}_iptables_total"), "Total number of iptables rules owned by kube-proxy", total);
            register(
                "kubeproxy_iptables_ct_state_invalid_dropped_packets",
                "packets dropped by iptables to work around conntrack problems",
                metrics.invalid.clone(),
            );
        }
        metrics
    }

    /// One family's rules were applied, whole or the difference.
    pub fn applied(&self, ipv6: bool, whole: bool, took: Duration) {
        let durations = if whole { &self.full } else { &self.partial };
        durations.get_or_create(&label(ipv6)).observe(took.as_secs_f64());
    }

    pub fn failed(&self, ipv6: bool, whole: bool) {
        let failures = if whole { &self.failures } else { &self.partial_failures };
        failures.get_or_create(&label(ipv6)).inc();
    }

    pub fn forgotten(&self, ipv6: bool, flows: usize, took: Duration) {
        self.flows.get_or_create(&label(ipv6)).observe(took.as_secs_f64());
        self.flows_forgotten.get_or_create(&label(ipv6)).inc_by(flows as u64);
    }

    /// How many rules of iptables were written, and how many there are.
    pub fn iptables(&self, ipv6: bool, written: &iptables::Counts, total: &iptables::Counts) {
        let ip_family = label(ipv6).ip_family;
        for (gauges, counts) in [(&self.iptables_last, written), (&self.iptables_total, total)] {
            for (table, count) in counts {
                gauges.get_or_create(&Table { ip_family, table }).set(*count);
            }
        }
    }

    /// The rule against invalid packets has dropped so many, since it was written.
    pub fn dropped(&self, ipv6: bool, packets: u64) {
        let seen = &mut self.invalid_seen.lock()[usize::from(ipv6)];
        self.invalid.inc_by(if packets >= *seen { packets - *seen } else { packets });
        *seen = packets;
    }

    /// Ports that went and came: those with a policy Local that have no endpoint here are counted.
    pub fn changed<'a>(
        &self,
        ipv6: bool,
        old: impl Iterator<Item = &'a ServicePort>,
        new: impl Iterator<Item = &'a ServicePort>,
    ) {
        let mut counts = [0; 2];
        for (port, sign) in old.map(|port| (port, -1)).chain(new.map(|port| (port, 1))) {
            let lonely = port.has_endpoints && port.local_endpoints.is_empty();
            counts[0] += i64::from(lonely && port.internal_local) * sign;
            counts[1] += i64::from(lonely && port.external_local && port.is_external()) * sign;
        }
        let ip_family = label(ipv6).ip_family;
        for (traffic_policy, count) in ["internal", "external"].into_iter().zip(counts) {
            self.no_local.get_or_create(&Policy { ip_family, traffic_policy }).inc_by(count);
        }
    }

    /// After the rules of these families were applied.
    pub fn synced(&self, took: Duration, batch: &Batch, families: impl Iterator<Item = bool>) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let waited = batch.since.map(|since| since.elapsed()).unwrap_or_default();
        let stamp = Timestamp::now();
        for family in families.map(label) {
            self.sync.get_or_create(&family).observe(took.as_secs_f64());
            self.last_timestamp.get_or_create(&family).set(now.as_secs() as i64);
            self.last_queued.get_or_create(&family).set(now.saturating_sub(waited).as_secs() as i64);
            let programming = self.programming.get_or_create(&family);
            for trigger in &batch.triggers {
                programming.observe(stamp.duration_since(*trigger).as_secs_f64().max(0.0));
            }
        }
    }
}

/// Reads the counts of changes when they are asked for.
#[derive(Debug)]
struct Counts(Arc<Changes>);

impl Collector for Counts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (services, endpoints, pending) = self.0.counts();
        for (name, kind, value) in [("service", "Service", services), ("endpoint", "Endpoint", endpoints)] {
            let total = ConstCounter::new(value);
            let help = format!("Cumulative proxy rules {kind} changes");
            let full = format!("kubeproxy_sync_proxy_rules_{name}_changes");
            total.encode(encoder.encode_descriptor(&full, &help, None, total.metric_type())?)?;
            let waiting = ConstGauge::new(pending as i64);
            let help = format!("Pending proxy rules {kind} changes");
            let full = format!("kubeproxy_sync_proxy_rules_{name}_changes_pending");
            waiting.encode(encoder.encode_descriptor(&full, &help, None, waiting.metric_type())?)?;
        }
        Ok(())
    }
}
