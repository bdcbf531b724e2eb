//! What the server counts of itself, under kube-apiserver's names.
//!
//! Labels are borrowed from the facts: what is asked of a resource that does not exist is counted without its name, so that no
//! client can make up series.

use super::body::Body;
use super::request_info::RequestInfo;
use crate::admission::Operation;
use crate::endpoints::health::platform;
use crate::storage::Store;
use apimachinery::facts;
use component_base::metrics::register;
use http::Response;
use http::header::{HeaderMap, USER_AGENT};
use http_body::Body as _;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use std::hash::{Hash, Hasher};
use std::sync::atomic::AtomicI64;
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

/// What a request is about, as far as series tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, EncodeLabelSet)]
struct Target {
    component: &'static str,
    group: &'static str,
    resource: &'static str,
    scope: &'static str,
    subresource: &'static str,
    verb: &'static str,
    version: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    code: u16,
    dry_run: &'static str,
    system_client: &'static str,
    #[prometheus(flatten)]
    target: Target,
}

#[derive(Clone, Debug, PartialEq, Eq, EncodeLabelSet)]
struct DurationLabels {
    dry_run: &'static str,
    #[prometheus(flatten)]
    target: Target,
}

// Every request is found among these: what tells most of them apart is enough.

impl Hash for Target {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let texts = [self.resource, self.verb, self.subresource];
        let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        state.write_u64(texts.iter().flat_map(|text| text.as_bytes()).fold(0, mix));
    }
}

impl Hash for RequestLabels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.target.hash(state);
    }
}

impl Hash for DurationLabels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.target.hash(state);
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    request_kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResourceLabels {
    resource: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StorageLabels {
    storage_cluster_id: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeprecatedLabels {
    group: &'static str,
    removed_release: &'static str,
    resource: &'static str,
    subresource: &'static str,
    version: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabels {
    operation: &'static str,
    rejected: &'static str,
    r#type: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ControllerLabels {
    name: &'static str,
    #[prometheus(flatten)]
    step: StepLabels,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    build_date: &'static str,
    compiler: &'static str,
    git_commit: &'static str,
    git_tree_state: &'static str,
    git_version: &'static str,
    go_version: &'static str,
    major: &'static str,
    minor: &'static str,
    platform: String,
}

const LATENCIES: [f64; 23] = [
    0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0,
    45.0, 60.0,
];
const SIZES: [f64; 7] = [1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9];
const ADMISSIONS: [f64; 6] = [0.005, 0.025, 0.1, 0.5, 1.0, 2.5];
const COMPONENT: &str = "apiserver";
/// Resources of the core group that are served and should not be used any more, and what their users are told.
const DEPRECATED: [(&str, &str); 2] = [
    ("componentstatuses", "v1 ComponentStatus is deprecated in v1.19+"),
    ("endpoints", "v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice"),
];

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;
/// An -1 tells that something could not be counted.
type Size = Gauge<i64, AtomicI64>;

fn histograms<L: Clone + Hash + Eq>(buckets: fn() -> Histogram) -> Histograms<L> {
    Family::new_with_constructor(buckets)
}

static REQUESTS: LazyLock<Family<RequestLabels, Counter>> = LazyLock::new(|| {
    register(
        "apiserver_request",
        "Counter of apiserver requests broken out for each verb, dry run value, group, version, resource, scope, component, and HTTP response code.",
        Family::default(),
    )
});
static DURATIONS: LazyLock<Histograms<DurationLabels>> = LazyLock::new(|| {
    register(
        "apiserver_request_duration_seconds",
        "Response latency distribution in seconds for each verb, dry run value, group, version, resource, subresource, scope and component.",
        histograms(|| Histogram::new(LATENCIES)),
    )
});
static RESPONSE_SIZES: LazyLock<Histograms<Target>> = LazyLock::new(|| {
    register(
        "apiserver_response_sizes",
        "Response size distribution in bytes for each group, version, verb, resource, subresource, scope and component.",
        histograms(|| Histogram::new(SIZES)),
    )
});
static IN_FLIGHT: LazyLock<Family<KindLabels, Gauge>> = LazyLock::new(|| {
    register(
        "apiserver_current_inflight_requests",
        "Maximal number of currently used inflight request limit of this apiserver per request kind in last second.",
        Family::default(),
    )
});
static LONG_RUNNING: LazyLock<Family<Target, Gauge>> = LazyLock::new(|| {
    register(
        "apiserver_longrunning_requests",
        "Gauge of all active long-running apiserver requests broken out by verb, group, version, resource, scope and component. Not all requests are tracked this way.",
        Family::default(),
    )
});
static DEPRECATED_USE: LazyLock<Family<DeprecatedLabels, Gauge>> = LazyLock::new(|| {
    register(
        "apiserver_requested_deprecated_apis",
        "Gauge of deprecated APIs that have been requested, broken out by API group, version, resource, subresource, and removed_release.",
        Family::default(),
    )
});
static OBJECTS: LazyLock<Family<ResourceLabels, Gauge>> = LazyLock::new(|| {
    register(
        "apiserver_storage_objects",
        "Number of stored objects at the time of last check split by kind. In case of a fetching error, the value will be -1.",
        Family::default(),
    )
});
static STORAGE_SIZE: LazyLock<Family<StorageLabels, Size>> = LazyLock::new(|| {
    register(
        "apiserver_storage_size_bytes",
        "Size of the storage database file physically allocated in bytes.",
        Family::default(),
    )
});
static ADMISSION_CONTROLLERS: LazyLock<Histograms<ControllerLabels>> = LazyLock::new(|| {
    register(
        "apiserver_admission_controller_admission_duration_seconds",
        "Admission controller latency histogram in seconds, identified by name and broken out for each operation and API resource and type (validate or admit).",
        histograms(|| Histogram::new(ADMISSIONS)),
    )
});
static ADMISSION_STEPS: LazyLock<Histograms<StepLabels>> = LazyLock::new(|| {
    register(
        "apiserver_admission_step_admission_duration_seconds",
        "Admission sub-step latency histogram in seconds, broken out for each operation and API resource and step type (validate or admit).",
        histograms(|| Histogram::new(ADMISSIONS)),
    )
});
static BUILD: LazyLock<Family<BuildLabels, Gauge>> = LazyLock::new(|| {
    register("kubernetes_build_info", "A metric with a constant '1' value labeled by what was built", Family::default())
});

/// All metrics, as text.
pub fn text(store: &Store) -> String {
    for (resource, count) in store.counts() {
        OBJECTS.get_or_create(&ResourceLabels { resource }).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
    let build = BuildLabels {
        build_date: "",
        compiler: "rustc",
        git_commit: crate::endpoints::health::GIT_COMMIT,
        git_tree_state: "clean",
        git_version: crate::KUBERNETES_VERSION,
        go_version: "none",
        major: "1",
        minor: "36",
        platform: platform(),
    };
    BUILD.get_or_create(&build).set(1);
    component_base::metrics::encode()
}

/// How big etcd's database is.
pub fn storage_size(bytes: i64) {
    STORAGE_SIZE.get_or_create(&StorageLabels { storage_cluster_id: "etcd-0" }).set(bytes);
}

/// The components of the control plane are told apart from other clients.
pub fn system_client(headers: &HeaderMap) -> &'static str {
    let agent = headers.get(USER_AGENT).map_or(&[][..], |agent| agent.as_bytes());
    let product = agent.split(|byte| matches!(byte, b'/' | b' ')).next().unwrap_or(agent);
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler"]
        .into_iter()
        .find(|name| name.as_bytes() == product)
        .unwrap_or("")
}

/// Counts a request that has been answered.
pub fn answered(
    info: &RequestInfo,
    dry_run: bool,
    system_client: &'static str,
    response: &Response<Body>,
    duration: Duration,
) {
    let target = target(info);
    let dry_run = if dry_run { "All" } else { "" };
    let code = response.status().as_u16();
    REQUESTS.get_or_create(&RequestLabels { code, dry_run, system_client, target }).inc();
    if info.is_long_running() {
        return;
    }
    DURATIONS.get_or_create(&DurationLabels { dry_run, target }).observe(duration.as_secs_f64());
    if matches!(target.verb, "GET" | "LIST") {
        let size = response.body().size_hint().lower();
        RESPONSE_SIZES.get_or_create(&target).observe(size as f64);
    }
    if deprecation(info).is_some() {
        let Target { group, resource, subresource, version, .. } = target;
        let labels = DeprecatedLabels { group, removed_release: "", resource, subresource, version };
        DEPRECATED_USE.get_or_create(&labels).set(1);
    }
}

/// What users of a deprecated resource are told.
pub fn deprecation(info: &RequestInfo) -> Option<&'static str> {
    let found = DEPRECATED.iter().find(|(resource, _)| *resource == info.resource && info.group.is_empty());
    found.map(|(_, warning)| *warning)
}

/// How long a plugin of admission, or all of them, take. What is told apart is found once: to look it up costs more than most
/// plugins do.
pub struct AdmissionTimes {
    /// None for a step: all plugins together.
    plugin: Option<&'static str>,
    known: [OnceLock<Histogram>; AdmissionTimes::KINDS],
}

impl AdmissionTimes {
    const OPERATIONS: usize = 4;
    const KINDS: usize = Self::OPERATIONS * 4;

    pub fn of_plugin(name: &'static str) -> Self {
        Self { plugin: Some(name), known: Default::default() }
    }

    pub fn of_steps() -> Self {
        Self { plugin: None, known: Default::default() }
    }

    /// One is done.
    pub fn observe(&self, operation: Operation, mutating: bool, rejected: bool, duration: Duration) {
        let kind = operation as usize * 4 + usize::from(mutating) * 2 + usize::from(rejected);
        let find = || {
            let r#type = if mutating { "admit" } else { "validate" };
            let rejected = if rejected { "true" } else { "false" };
            let step = StepLabels { operation: operation.name(), rejected, r#type };
            match self.plugin {
                Some(name) => ADMISSION_CONTROLLERS.get_or_create(&ControllerLabels { name, step }).clone(),
                None => ADMISSION_STEPS.get_or_create(&step).clone(),
            }
        };
        self.known[kind].get_or_init(find).observe(duration.as_secs_f64());
    }
}

/// One more request, until the guard is dropped.
pub struct Counted(Gauge);

pub fn in_flight(mutating: bool) -> Counted {
    static KINDS: LazyLock<[Gauge; 2]> = LazyLock::new(|| {
        ["readOnly", "mutating"].map(|request_kind| IN_FLIGHT.get_or_create_owned(&KindLabels { request_kind }))
    });
    count(KINDS[usize::from(mutating)].clone())
}

pub fn long_running(info: &RequestInfo) -> Counted {
    count(LONG_RUNNING.get_or_create(&target(info)).clone())
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

fn target(info: &RequestInfo) -> Target {
    let known = info.is_resource.then(|| facts::resource(&info.group, &info.version, &info.resource)).flatten();
    let (verb, scope) = (verb(info), scope(info));
    match known {
        Some(kind) => {
            let subresource = kind.subresource(&info.subresource).map_or("", |sub| sub.name);
            let (group, resource, version) = (kind.group, kind.resource, kind.version);
            Target { component: COMPONENT, group, resource, scope, subresource, verb, version }
        }
        None => Target { component: COMPONENT, group: "", resource: "", scope, subresource: "", verb, version: "" },
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

#[cfg(test)]
mod tests {
    use super::*;
    use http::Method;
    use std::collections::{BTreeMap, BTreeSet};

    /// Every metric in the text: its type and the labels of its samples (but for `le`).
    fn read(text: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
        let mut metrics: BTreeMap<String, (String, BTreeSet<String>)> = BTreeMap::new();
        for line in text.lines() {
            if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                metrics.entry(name.to_owned()).or_default().0 = kind.to_owned();
            } else if let Some((sample, rest)) = line.split_once('{') {
                let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| sample.strip_suffix(end));
                let name = [Some(sample), base].into_iter().flatten().find(|name| metrics.contains_key(*name));
                let labels =
                    rest.split("\",").filter_map(|pair| pair.split_once("=\"")).map(|(name, _)| name.to_owned());
                if let Some(metric) = name.and_then(|name| metrics.get_mut(name)) {
                    metric.1.extend(labels.filter(|name| name != "le"));
                }
            }
        }
        metrics
    }

    #[test]
    fn stable_metrics_have_their_names_types_and_labels() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/kubernetes-1.36/stable-metrics-list.yaml");
        let Ok(text) = std::fs::read_to_string(file) else {
            assert!(std::env::var_os("CI").is_none(), "{file} is missing");
            println!("skipped: {file} is missing");
            return;
        };
        let get = RequestInfo::parse(&Method::GET, "/api/v1/componentstatuses/x", "");
        answered(&get, false, "", &Response::new(Body::from("ok")), Duration::from_millis(1));
        drop((in_flight(true), long_running(&get)));
        AdmissionTimes::of_steps().observe(Operation::Create, true, false, Duration::ZERO);
        AdmissionTimes::of_plugin("Priority").observe(Operation::Create, true, false, Duration::ZERO);
        component_base::metrics::checked("ping", "livez", true);
        storage_size(1);
        OBJECTS.get_or_create(&ResourceLabels { resource: "pods".into() }).set(1);
        let ours = read(&(component_base::metrics::encode() + &component_base::metrics::encode_slis()));

        let mut compared = 0;
        for metric in &apimachinery::yaml::documents(&text).unwrap()[0].as_array().unwrap().clone() {
            let of = |field: &str| metric[field].as_str().unwrap_or("");
            let parts = [of("namespace"), of("subsystem"), of("name")];
            let name = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("_");
            let belongs = name.starts_with("apiserver_") || name.starts_with("kubernetes_health");
            // Webhooks are not called yet.
            if of("stabilityLevel") != "STABLE" || !belongs || name.contains("webhook") {
                continue;
            }
            let (kind, labels) = ours.get(&name).unwrap_or_else(|| panic!("{name} is missing"));
            let theirs: BTreeSet<String> = metric["labels"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|l| l.as_str().map(str::to_owned))
                .collect();
            assert_eq!(labels, &theirs, "{name}");
            let expected = match of("type") {
                "Custom" => "gauge".to_owned(),
                kind => kind.to_lowercase(),
            };
            assert_eq!(kind, &expected, "{name}");
            compared += 1;
        }
        assert!(compared >= 12, "{compared}");
    }

    #[test]
    fn what_does_not_exist_has_no_series_of_its_own() {
        let info = RequestInfo::parse(&Method::GET, "/api/v1/namespaces/a/madeup/x/y", "");
        assert_eq!((target(&info).resource, target(&info).subresource, target(&info).scope), ("", "", "resource"));
        let info = RequestInfo::parse(&Method::PUT, "/apis/apps/v1/namespaces/a/deployments/x/scale", "");
        assert_eq!((target(&info).group, target(&info).subresource), ("apps", "scale"));
    }
}
