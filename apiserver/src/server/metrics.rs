//! What the server counts of itself, under kube-apiserver's names.

use super::request_info::RequestInfo;
use crate::storage::Store;
use component_base::metrics::register;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use std::sync::LazyLock;
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    code: u16,
    component: &'static str,
    dry_run: &'static str,
    group: String,
    resource: String,
    scope: &'static str,
    subresource: String,
    verb: &'static str,
    version: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DurationLabels {
    component: &'static str,
    dry_run: &'static str,
    group: String,
    resource: String,
    scope: &'static str,
    subresource: String,
    verb: &'static str,
    version: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    request_kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LongLabels {
    component: &'static str,
    group: String,
    resource: String,
    scope: &'static str,
    subresource: String,
    verb: &'static str,
    version: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResourceLabels {
    resource: String,
}

const BUCKETS: [f64; 23] = [
    0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0,
    45.0, 60.0,
];

type Histograms = Family<DurationLabels, Histogram, fn() -> Histogram>;

static REQUESTS: LazyLock<Family<RequestLabels, Counter>> = LazyLock::new(|| {
    register(
        "apiserver_request",
        "Counter of apiserver requests broken out for each verb, dry run value, group, version, resource, scope, component, and HTTP response code",
        Family::default(),
    )
});
static DURATIONS: LazyLock<Histograms> = LazyLock::new(|| {
    let histogram: fn() -> Histogram = || Histogram::new(BUCKETS);
    register(
        "apiserver_request_duration_seconds",
        "Response latency distribution in seconds for each verb, group, version, resource, subresource, scope and component",
        Family::new_with_constructor(histogram),
    )
});
static IN_FLIGHT: LazyLock<Family<KindLabels, Gauge>> = LazyLock::new(|| {
    register("apiserver_current_inflight_requests", "Currently executing requests per request kind", Family::default())
});
static LONG_RUNNING: LazyLock<Family<LongLabels, Gauge>> = LazyLock::new(|| {
    register("apiserver_longrunning_requests", "Gauge of all active long-running apiserver requests", Family::default())
});

static OBJECTS: LazyLock<Family<ResourceLabels, Gauge>> = LazyLock::new(|| {
    register(
        "apiserver_storage_objects",
        "Number of stored objects at the time of last check split by kind",
        Family::default(),
    )
});

/// All metrics, as text.
pub fn text(store: &Store) -> String {
    for (resource, count) in store.counts() {
        OBJECTS.get_or_create(&ResourceLabels { resource }).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
    component_base::metrics::encode()
}

/// Counts a request that has been answered.
pub fn answered(info: &RequestInfo, dry_run: bool, code: u16, duration: Duration) {
    let verb = verb(info);
    let scope = scope(info);
    let labels = RequestLabels {
        code,
        component: "apiserver",
        dry_run: if dry_run { "All" } else { "" },
        group: info.group.clone(),
        resource: info.resource.clone(),
        scope,
        subresource: info.subresource.clone(),
        verb,
        version: info.version.clone(),
    };
    REQUESTS.get_or_create(&labels).inc();
    if info.is_long_running() {
        return;
    }
    let labels = DurationLabels {
        component: "apiserver",
        dry_run: labels.dry_run,
        group: labels.group,
        resource: labels.resource,
        scope,
        subresource: labels.subresource,
        verb,
        version: labels.version,
    };
    DURATIONS.get_or_create(&labels).observe(duration.as_secs_f64());
}

/// One more request, until the guard is dropped.
pub struct Counted(Gauge);

pub fn in_flight(mutating: bool) -> Counted {
    let request_kind = if mutating { "mutating" } else { "readOnly" };
    count(IN_FLIGHT.get_or_create(&KindLabels { request_kind }).clone())
}

pub fn long_running(info: &RequestInfo) -> Counted {
    let labels = LongLabels {
        component: "apiserver",
        group: info.group.clone(),
        resource: info.resource.clone(),
        scope: scope(info),
        subresource: info.subresource.clone(),
        verb: verb(info),
        version: info.version.clone(),
    };
    count(LONG_RUNNING.get_or_create(&labels).clone())
}

fn count(gauge: Gauge) -> Counted {
    gauge.inc();
    Counted(gauge)
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn verb(info: &RequestInfo) -> &'static str {
    match info.verb {
        "get" => "GET",
        "list" => "LIST",
        "watch" => "WATCH",
        "create" | "post" => "POST",
        "update" | "put" => "PUT",
        "patch" => "PATCH",
        "delete" => "DELETE",
        "deletecollection" => "DELETECOLLECTION",
        "proxy" => "CONNECT",
        _ => "other",
    }
}

fn scope(info: &RequestInfo) -> &'static str {
    match info {
        _ if !info.is_resource => "",
        _ if !info.name.is_empty() => "resource",
        _ if !info.namespace.is_empty() => "namespace",
        _ => "cluster",
    }
}
