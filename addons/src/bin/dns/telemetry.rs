//! Counters under CoreDNS' names.

use component_base::metrics::register;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use crate::answer::Transport;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    proto: &'static str,
    r#type: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResponseLabels {
    rcode: String,
}

/// What has been asked and answered.
#[derive(Clone, Default)]
pub(crate) struct Telemetry {
    requests: Family<RequestLabels, Counter>,
    responses: Family<ResponseLabels, Counter>,
    forwards: Counter,
    cache_hits: Counter,
    dropped: Counter,
}

// === impl Telemetry ===

impl Telemetry {
    /// Shown at `/metrics`.
    pub(crate) fn registered() -> Telemetry {
        let new = Telemetry::default();
        Telemetry {
            requests: register("coredns_dns_requests", "DNS requests by protocol and type", new.requests),
            responses: register("coredns_dns_responses", "DNS responses by response code", new.responses),
            forwards: register("coredns_forward_requests", "Requests asked upstream", new.forwards),
            cache_hits: register("coredns_cache_hits", "Upstream answers given from memory", new.cache_hits),
            dropped: register("coredns_dropped_requests", "Requests dropped at the limit of open ones", new.dropped),
        }
    }

    pub(crate) fn request(&self, transport: Transport, kind: RecordType) {
        let proto = match transport {
            Transport::Udp => "udp",
            Transport::Tcp => "tcp",
        };
        // Unknown types share a label: a client cannot make up series.
        let kind = match kind {
            RecordType::Unknown(_) => "other".to_owned(),
            known => known.to_string(),
        };
        self.requests.get_or_create(&RequestLabels { proto, r#type: kind }).inc();
    }

    pub(crate) fn response(&self, code: ResponseCode) {
        let rcode = match code {
            ResponseCode::NoError => "NOERROR".to_owned(),
            ResponseCode::NXDomain => "NXDOMAIN".to_owned(),
            ResponseCode::ServFail => "SERVFAIL".to_owned(),
            ResponseCode::FormErr => "FORMERR".to_owned(),
            ResponseCode::NotImp => "NOTIMP".to_owned(),
            ResponseCode::Refused => "REFUSED".to_owned(),
            _ => "other".to_owned(),
        };
        self.responses.get_or_create(&ResponseLabels { rcode }).inc();
    }

    pub(crate) fn forwarded(&self, cached: bool) {
        if cached { &self.cache_hits } else { &self.forwards }.inc();
    }

    pub(crate) fn dropped(&self) {
        self.dropped.inc();
    }
}
