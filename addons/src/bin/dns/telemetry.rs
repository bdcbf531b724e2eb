//! Counters under CoreDNS' names.

use std::net::SocketAddr;
use std::time::Duration;

use component_base::metrics::register;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use crate::answer::Transport;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    proto: &'static str,
    r#type: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResponseLabels {
    rcode: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct To {
    to: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ToAndCode {
    to: String,
    rcode: &'static str,
}

/// What has been asked and answered.
#[derive(Clone)]
pub(crate) struct Telemetry {
    requests: Family<RequestLabels, Counter>,
    responses: Family<ResponseLabels, Counter>,
    durations: Histogram,
    forwards: Family<ToAndCode, Counter>,
    checks_failed: Family<To, Counter>,
    health_broken: Counter,
    cache_hits: Counter,
    cache_misses: Counter,
    cache_entries: Gauge,
    refused: Counter,
}

impl Default for Telemetry {
    fn default() -> Telemetry {
        Telemetry {
            requests: Family::default(),
            responses: Family::default(),
            durations: Histogram::new(exponential_buckets(0.000_25, 2.0, 16)),
            forwards: Family::default(),
            checks_failed: Family::default(),
            health_broken: Counter::default(),
            cache_hits: Counter::default(),
            cache_misses: Counter::default(),
            cache_entries: Gauge::default(),
            refused: Counter::default(),
        }
    }
}

// === impl Telemetry ===

impl Telemetry {
    /// Shown at `/metrics`.
    pub(crate) fn registered() -> Telemetry {
        let new = Telemetry::default();
        Telemetry {
            requests: register("coredns_dns_requests", "DNS requests by protocol and type", new.requests),
            responses: register("coredns_dns_responses", "DNS responses by response code", new.responses),
            durations: register("coredns_dns_request_duration_seconds", "Time that requests took", new.durations),
            forwards: register("coredns_forward_requests", "Requests asked upstream and answered", new.forwards),
            checks_failed: register(
                "coredns_proxy_healthcheck_failures",
                "Checks of an upstream that it did not answer",
                new.checks_failed,
            ),
            health_broken: register(
                "coredns_forward_healthcheck_broken",
                "Requests for which no upstream was well, so that all were asked",
                new.health_broken,
            ),
            cache_hits: register("coredns_cache_hits", "Upstream answers given from memory", new.cache_hits),
            cache_misses: register("coredns_cache_misses", "Questions that memory had no answer to", new.cache_misses),
            cache_entries: register("coredns_cache_entries", "Upstream answers in memory", new.cache_entries),
            refused: register(
                "coredns_forward_max_concurrent_rejects",
                "Requests refused at the limit of those on their way upstream",
                new.refused,
            ),
        }
    }

    pub(crate) fn request(&self, transport: Transport, kind: RecordType) {
        let proto = match transport {
            Transport::Udp => "udp",
            Transport::Tcp => "tcp",
        };
        // Unknown types share a label: a client cannot make up series.
        let kind = match kind {
            RecordType::Unknown(_) => "other",
            known => known.into(),
        };
        self.requests.get_or_create(&RequestLabels { proto, r#type: kind }).inc();
    }

    pub(crate) fn response(&self, code: ResponseCode) {
        self.responses.get_or_create(&ResponseLabels { rcode: word(code) }).inc();
    }

    pub(crate) fn forwarded(&self, to: SocketAddr, code: ResponseCode) {
        self.forwards.get_or_create(&ToAndCode { to: to.to_string(), rcode: word(code) }).inc();
    }

    pub(crate) fn took(&self, time: Duration) {
        self.durations.observe(time.as_secs_f64());
    }

    pub(crate) fn cache(&self, hit: bool, entries: usize) {
        if hit { &self.cache_hits } else { &self.cache_misses }.inc();
        self.cache_entries.set(entries as i64);
    }

    pub(crate) fn check_failed(&self, upstream: SocketAddr) {
        self.checks_failed.get_or_create(&To { to: upstream.to_string() }).inc();
    }

    pub(crate) fn health_is_broken(&self) {
        self.health_broken.inc();
    }

    pub(crate) fn refused(&self) {
        self.refused.inc();
    }
}

fn word(code: ResponseCode) -> &'static str {
    match code {
        ResponseCode::NoError => "NOERROR",
        ResponseCode::NXDomain => "NXDOMAIN",
        ResponseCode::ServFail => "SERVFAIL",
        ResponseCode::FormErr => "FORMERR",
        ResponseCode::NotImp => "NOTIMP",
        ResponseCode::Refused => "REFUSED",
        _ => "other",
    }
}
