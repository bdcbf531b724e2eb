//! What the kubelet counts of its own doings, by Kubernetes' names.

mod managers;

pub use managers::{managers, now_seconds};

use std::fmt::{self, Write as _};
use std::sync::LazyLock;
use std::time::Duration;

use component_base::metrics::{bare, register};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

/// What is done. A call of CRI has its own name, and is told as Kubernetes does: `RunPodSandbox` is `run_podsandbox`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Call(pub &'static str);

impl EncodeLabelValue for Call {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        let mut name = String::new();
        for letter in self.0.chars() {
            if letter.is_uppercase() && !name.is_empty() && !name.ends_with("pod") {
                name.push('_');
            }
            name.extend(letter.to_lowercase());
        }
        encoder.write_str(&name)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Operation {
    pub operation_type: Call,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Started {
    pub container_type: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct NotStarted {
    pub container_type: &'static str,
    pub code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Asked {
    pub long_running: bool,
    pub method: String,
    pub path: String,
    pub server_type: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Source {
    pub r#static: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct InState {
    pub container_state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Preempted {
    pub preemption_signal: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Name {
    node: String,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// All of them.
pub struct Metrics {
    pub calls: Family<Operation, Counter>,
    pub failed_calls: Family<Operation, Counter>,
    pub call_seconds: Histograms<Operation>,
    pub relist_seconds: Histogram,
    pub relist_interval: Histogram,
    pub relist_seen: Gauge<f64, std::sync::atomic::AtomicU64>,
    pub pod_start_seconds: Histogram,
    pub pod_start_sli_seconds: Histogram,
    pub worker_seconds: Histograms<Operation>,
    pub started_pods: Counter,
    pub started_containers: Family<Started, Counter>,
    pub failed_starts: Family<NotStarted, Counter>,
    pub requests: Family<Asked, Counter>,
    pub running_pods: Gauge,
    pub desired_pods: Family<Source, Gauge>,
    pub active_pods: Family<Source, Gauge>,
    pub mirror_pods: Gauge,
    pub containers: Family<InState, Gauge>,
    pub image_volumes: Counter,
    pub image_volumes_mounted: Counter,
    pub image_volumes_failed: Counter,
    pub preemptions: Family<Preempted, Counter>,
}

/// As Prometheus' own.
fn short() -> Histogram {
    Histogram::new([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0])
}

fn of_calls() -> Histogram {
    Histogram::new((0..14).map(|power| 0.005 * 2.5f64.powi(power)))
}

fn of_starts() -> Histogram {
    let minutes = [60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0];
    let seconds = [0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0, 30.0, 45.0];
    Histogram::new(seconds.into_iter().chain(minutes))
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| Metrics {
    calls: register(
        "kubelet_runtime_operations",
        "Cumulative number of runtime operations by operation type",
        Family::default(),
    ),
    failed_calls: register(
        "kubelet_runtime_operations_errors",
        "Cumulative number of runtime operation errors by operation type",
        Family::default(),
    ),
    call_seconds: register(
        "kubelet_runtime_operations_duration_seconds",
        "Duration in seconds of runtime operations. Broken down by operation type",
        Family::new_with_constructor(of_calls as fn() -> Histogram),
    ),
    relist_seconds: register(
        "kubelet_pleg_relist_duration_seconds",
        "Duration in seconds for relisting pods in PLEG",
        short(),
    ),
    relist_interval: register(
        "kubelet_pleg_relist_interval_seconds",
        "Interval in seconds between relisting in PLEG",
        short(),
    ),
    relist_seen: register(
        "kubelet_pleg_last_seen_seconds",
        "Timestamp in seconds when PLEG was last seen active",
        Gauge::default(),
    ),
    pod_start_seconds: register(
        "kubelet_pod_start_duration_seconds",
        "Duration in seconds from kubelet seeing a pod for the first time to the pod starting to run",
        of_starts(),
    ),
    pod_start_sli_seconds: register(
        "kubelet_pod_start_sli_duration_seconds",
        "Duration in seconds to start a pod, excluding time to pull images and run init containers, measured from pod creation timestamp to when all its containers are reported as started and observed via watch",
        of_starts(),
    ),
    worker_seconds: register(
        "kubelet_pod_worker_duration_seconds",
        "Duration in seconds to sync a single pod. Broken down by operation type: create, update, or sync",
        Family::new_with_constructor(short as fn() -> Histogram),
    ),
    started_pods: register("kubelet_started_pods", "Cumulative number of pods started", Counter::default()),
    started_containers: register(
        "kubelet_started_containers",
        "Cumulative number of containers started",
        Family::default(),
    ),
    failed_starts: register(
        "kubelet_started_containers_errors",
        "Cumulative number of errors when starting containers",
        Family::default(),
    ),
    requests: register(
        "kubelet_http_requests",
        "Number of the http requests received since the server started",
        Family::default(),
    ),
    running_pods: register("kubelet_running_pods", "Number of pods that have a running pod sandbox", Gauge::default()),
    desired_pods: register(
        "kubelet_desired_pods",
        "The number of pods the kubelet is being instructed to run. static is true if the pod is not from the apiserver.",
        Family::default(),
    ),
    active_pods: register(
        "kubelet_active_pods",
        "The number of pods the kubelet considers active and which are being considered when admitting new pods. static is true if the pod is not from the apiserver.",
        Family::default(),
    ),
    mirror_pods: register(
        "kubelet_mirror_pods",
        "The number of mirror pods the kubelet will try to create (one per admitted static pod)",
        Gauge::default(),
    ),
    containers: register("kubelet_running_containers", "Number of containers currently running", Family::default()),
    image_volumes: register("kubelet_image_volume_requested", "Number of requested image volumes.", Counter::default()),
    image_volumes_mounted: register(
        "kubelet_image_volume_mounted_succeed",
        "Number of successful image volume mounts.",
        Counter::default(),
    ),
    image_volumes_failed: register(
        "kubelet_image_volume_mounted_errors",
        "Number of failed image volume mounts.",
        Counter::default(),
    ),
    preemptions: register(
        "kubelet_preemptions",
        &bare("Cumulative number of pod preemptions by preemption resource"),
        Family::default(),
    ),
});

/// What is counted.
pub fn metrics() -> &'static Metrics {
    &METRICS
}

impl Metrics {
    /// A call of the runtime that took so long.
    pub fn called(&self, name: &'static str, took: Duration, failed: bool) {
        let operation = Operation { operation_type: Call(name) };
        self.calls.get_or_create(&operation).inc();
        self.call_seconds.get_or_create(&operation).observe(took.as_secs_f64());
        if failed {
            self.failed_calls.get_or_create(&operation).inc();
        }
    }

    /// A step of a pod's worker.
    pub fn worked(&self, step: &'static str, took: Duration) {
        self.worker_seconds.get_or_create(&Operation { operation_type: Call(step) }).observe(took.as_secs_f64());
    }

    /// A pod that runs, so long after it was first seen.
    pub fn pod_runs(&self, after: Duration) {
        self.pod_start_seconds.observe(after.as_secs_f64());
        self.pod_start_sli_seconds.observe(after.as_secs_f64());
    }

    /// A pod that gave way to a critical one, which lacked a resource.
    pub fn preempted(&self, resource: &str) {
        self.preemptions.get_or_create(&Preempted { preemption_signal: resource.to_owned() }).inc();
    }

    /// A container (or sandbox) that was to be started, and what its status waits for if it was not.
    pub fn started(&self, container_type: &'static str, failed: Option<&str>) {
        self.started_containers.get_or_create(&Started { container_type }).inc();
        if let Some(code) = failed {
            self.failed_starts.get_or_create(&NotStarted { container_type, code: code.to_owned() }).inc();
        }
    }
}

/// Tells which node this is, and which version runs on it.
pub fn tell_node(node: &str) {
    let of_node: Family<Name, Gauge> =
        register("kubelet_node_name", "The node's name. The count is always 1.", Family::default());
    of_node.get_or_create(&Name { node: node.to_owned() }).set(1);
    let build: Family<Vec<(&str, &str)>, Gauge> = register(
        "kubernetes_build_info",
        "A metric with a constant '1' value labeled by what was built",
        Family::default(),
    );
    let labels = vec![
        ("major", "1"),
        ("minor", "36"),
        ("git_version", "v1.36.0"),
        ("git_commit", ""),
        ("git_tree_state", "clean"),
        ("build_date", ""),
        ("go_version", ""),
        ("compiler", "rustc"),
        ("platform", "linux/amd64"),
    ];
    build.get_or_create(&labels).set(1);
    let cgroups: Gauge = register("kubelet_cgroup_version", "cgroup version on the hosts.", Gauge::default());
    cgroups.set(if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { 2 } else { 1 });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_has_kubernetes_names() {
        tell_node("n1");
        metrics().called("RunPodSandbox", Duration::from_millis(70), true);
        metrics().called("ListContainerStats", Duration::from_millis(1), false);
        metrics().started("init_container", Some("ErrImagePull"));
        let text = component_base::metrics::encode();
        for line in [
            "kubelet_node_name{node=\"n1\"} 1",
            "kubelet_runtime_operations_total{operation_type=\"run_podsandbox\"} 1",
            "kubelet_runtime_operations_errors_total{operation_type=\"run_podsandbox\"} 1",
            "kubelet_runtime_operations_duration_seconds_count{operation_type=\"list_container_stats\"} 1",
            "kubelet_started_containers_errors_total{container_type=\"init_container\",code=\"ErrImagePull\"} 1",
            "kubelet_image_volume_requested_total 0",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
