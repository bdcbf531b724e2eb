//! What the kubelet's managers count: admission, processors and devices, images, shutdowns, those who ask what pods hold.

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use component_base::metrics::{bare, register};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use super::{Histograms, short};

/// One label and its value.
pub type Label = [(&'static str, String); 1];

/// What is asked of the pod resources API, and how often that was refused.
pub struct Asked {
    pub requests: Family<Label, Counter>,
    pub errors: Family<Label, Counter>,
}

/// All of them.
pub struct Managers {
    pub rejections: Family<Label, Counter>,
    pub containers_per_pod: Histogram,
    pub sandbox_seconds: Histograms<Label>,
    pub sandbox_errors: Family<Label, Counter>,
    pub pod_errors: Counter,
    pub user_namespaces: Counter,
    pub user_namespace_errors: Counter,
    pub orphans: Counter,
    pub orphans_cleaned: Gauge,
    pub orphans_failed: Gauge,
    pub ephemeral_containers: Gauge,
    pub status_seconds: Histogram,
    pub cpu_requests: Counter,
    pub cpu_errors: Counter,
    pub cpu_shared_millicores: Gauge,
    pub cpu_exclusive: Gauge,
    pub cpu_by_node: Family<Label, Gauge>,
    pub memory_requests: Counter,
    pub memory_errors: Counter,
    pub topology_requests: Counter,
    pub topology_errors: Counter,
    pub topology_ms: Histogram,
    pub plugins: Family<Label, Counter>,
    pub device_seconds: Histograms<Label>,
    pub holders: Family<Label, Counter>,
    pub holders_list: Asked,
    pub holders_get: Asked,
    pub holders_allocatable: Asked,
    pub shutdown_start: Gauge<f64, std::sync::atomic::AtomicU64>,
    pub shutdown_end: Gauge<f64, std::sync::atomic::AtomicU64>,
    pub images_collected: Family<Label, Counter>,
    pub pull_seconds: Histograms<Label>,
}

fn asked(call: &str, endpoint: &str) -> Asked {
    let of = |what: &str, tail: &str| {
        let help = format!(
            "Number of requests to the PodResource {endpoint} endpoint{tail}. Broken down by server api version."
        );
        register(&format!("kubelet_pod_resources_endpoint_{what}_{call}"), &bare(&help), Family::default())
    };
    Asked { requests: of("requests", ""), errors: of("errors", " which returned error") }
}

fn of_pulls() -> Histogram {
    let minutes = [60.0, 180.0, 300.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0];
    Histogram::new([1.0, 5.0, 10.0, 20.0, 30.0].into_iter().chain(minutes))
}

fn counter(name: &str, help: &str) -> Counter {
    register(name, help, Counter::default())
}

static MANAGERS: LazyLock<Managers> = LazyLock::new(|| Managers {
    rejections: register(
        "kubelet_admission_rejections",
        "Cumulative number pod admission rejections by the Kubelet.",
        Family::default(),
    ),
    containers_per_pod: register(
        "kubelet_containers_per_pod_count",
        "The number of containers per pod.",
        Histogram::new(exponential_buckets(1.0, 2.0, 5)),
    ),
    sandbox_seconds: register(
        "kubelet_run_podsandbox_duration_seconds",
        "Duration in seconds of the run_podsandbox operations. Broken down by RuntimeClass.Handler.",
        Family::new_with_constructor(short as fn() -> Histogram),
    ),
    sandbox_errors: register(
        "kubelet_run_podsandbox_errors",
        "Cumulative number of the run_podsandbox operation errors by RuntimeClass.Handler.",
        Family::default(),
    ),
    pod_errors: counter("kubelet_started_pods_errors", "Cumulative number of errors when starting pods"),
    user_namespaces: counter(
        "kubelet_started_user_namespaced_pods",
        "Cumulative number of pods with user namespaces started. This metric will only be collected on Linux.",
    ),
    user_namespace_errors: counter(
        "kubelet_started_user_namespaced_pods_errors",
        "Cumulative number of errors when starting pods with user namespaces. This metric will only be collected on Linux.",
    ),
    orphans: counter(
        "kubelet_orphaned_runtime_pods",
        "Number of pods that have been detected in the container runtime without being already known to the pod worker. This typically indicates the kubelet was restarted while a pod was force deleted in the API or in the local configuration, which is unusual.",
    ),
    orphans_cleaned: register(
        "kubelet_orphan_pod_cleaned_volumes",
        "The total number of orphaned Pods whose volumes were cleaned in the last periodic sweep.",
        Gauge::default(),
    ),
    orphans_failed: register(
        "kubelet_orphan_pod_cleaned_volumes_errors",
        "The number of orphaned Pods whose volumes failed to be cleaned in the last periodic sweep.",
        Gauge::default(),
    ),
    ephemeral_containers: register(
        "kubelet_managed_ephemeral_containers",
        "Current number of ephemeral containers in pods managed by this kubelet.",
        Gauge::default(),
    ),
    status_seconds: register(
        "kubelet_pod_status_sync_duration_seconds",
        "Duration in seconds to sync a pod status update. Measures time from detection of a change to pod status until the API is successfully updated for that pod, even if multiple intevening changes to pod status occur.",
        Histogram::new([0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0]),
    ),
    cpu_requests: counter(
        "kubelet_cpu_manager_pinning_requests",
        "The number of cpu core allocations which required pinning.",
    ),
    cpu_errors: counter(
        "kubelet_cpu_manager_pinning_errors",
        "The number of cpu core allocations which required pinning failed.",
    ),
    cpu_shared_millicores: register(
        "kubelet_cpu_manager_shared_pool_size_millicores",
        "The size of the shared CPU pool for non-guaranteed QoS pods, in millicores.",
        Gauge::default(),
    ),
    cpu_exclusive: register(
        "kubelet_cpu_manager_exclusive_cpu_allocation_count",
        "The total number of CPUs exclusively allocated to containers running on this node",
        Gauge::default(),
    ),
    cpu_by_node: register(
        "kubelet_cpu_manager_allocation_per_numa",
        "Number of CPUs allocated per NUMA node",
        Family::default(),
    ),
    memory_requests: counter(
        "kubelet_memory_manager_pinning_requests",
        "The number of memory pages allocations which required pinning.",
    ),
    memory_errors: counter(
        "kubelet_memory_manager_pinning_errors",
        "The number of memory pages allocations which required pinning that failed.",
    ),
    topology_requests: counter(
        "kubelet_topology_manager_admission_requests",
        "The number of admission requests where resources have to be aligned.",
    ),
    topology_errors: counter(
        "kubelet_topology_manager_admission_errors",
        "The number of admission request failures where resources could not be aligned.",
    ),
    topology_ms: register(
        "kubelet_topology_manager_admission_duration_ms",
        "Duration in milliseconds to serve a pod admission request.",
        Histogram::new(exponential_buckets(0.05, 2.0, 15)),
    ),
    plugins: register(
        "kubelet_device_plugin_registration",
        "Cumulative number of device plugin registrations. Broken down by resource name.",
        Family::default(),
    ),
    device_seconds: register(
        "kubelet_device_plugin_alloc_duration_seconds",
        "Duration in seconds to serve a device plugin Allocation request. Broken down by resource name.",
        Family::new_with_constructor(short as fn() -> Histogram),
    ),
    holders: register(
        "kubelet_pod_resources_endpoint_requests",
        "Cumulative number of requests to the PodResource endpoint. Broken down by server api version.",
        Family::default(),
    ),
    holders_list: asked("list", "List"),
    holders_get: asked("get", "Get"),
    holders_allocatable: asked("get_allocatable", "GetAllocatableResources"),
    shutdown_start: register(
        "kubelet_graceful_shutdown_start_time_seconds",
        "Last graceful shutdown start time since unix epoch in seconds",
        Gauge::default(),
    ),
    shutdown_end: register(
        "kubelet_graceful_shutdown_end_time_seconds",
        "Last graceful shutdown end time since unix epoch in seconds",
        Gauge::default(),
    ),
    images_collected: register(
        "kubelet_image_garbage_collected",
        "Total number of images garbage collected by the kubelet, whether through disk usage or image age.",
        Family::default(),
    ),
    pull_seconds: register(
        "kubelet_image_pull_duration_seconds",
        "Duration in seconds to pull an image.",
        Family::new_with_constructor(of_pulls as fn() -> Histogram),
    ),
});

/// What is counted.
pub fn managers() -> &'static Managers {
    &MANAGERS
}

impl Managers {
    /// A sandbox that was asked for, of a runtime handler, for a pod with a user namespace of its own or not.
    pub fn sandbox(&self, handler: &str, own_users: bool, took: Duration, failed: bool) {
        let label = [("runtime_handler", handler.to_owned())];
        self.sandbox_seconds.get_or_create(&label).observe(took.as_secs_f64());
        if own_users {
            self.user_namespaces.inc();
        }
        if failed {
            self.sandbox_errors.get_or_create(&label).inc();
            self.pod_errors.inc();
            if own_users {
                self.user_namespace_errors.inc();
            }
        }
    }

    /// A pod that was not taken.
    pub fn rejected(&self, reason: &str) {
        self.rejections.get_or_create(&[("reason", reason.to_owned())]).inc();
    }

    /// Somebody asked what pods hold.
    pub fn asked<T, E>(&self, asked: &Asked, outcome: &Result<T, E>) {
        let label = [("server_api_version", "v1".to_owned())];
        self.holders.get_or_create(&label).inc();
        asked.requests.get_or_create(&label).inc();
        if outcome.is_err() {
            asked.errors.get_or_create(&label).inc();
        }
    }

    /// An image of so many bytes that was fetched.
    pub fn pulled(&self, bytes: u64, took: Duration) {
        self.pull_seconds
            .get_or_create(&[("image_size_in_bytes", size_class(bytes).to_owned())])
            .observe(took.as_secs_f64());
    }
}

/// As `GetImageSizeBucket`.
fn size_class(bytes: u64) -> &'static str {
    const MB: u64 = 1 << 20;
    const GB: u64 = 1 << 30;
    let classes = [
        (0, "N/A"),
        (10 * MB, "0-10MB"),
        (100 * MB, "10MB-100MB"),
        (500 * MB, "100MB-500MB"),
        (GB, "500MB-1GB"),
        (5 * GB, "1GB-5GB"),
        (10 * GB, "5GB-10GB"),
        (20 * GB, "10GB-20GB"),
        (30 * GB, "20GB-30GB"),
        (40 * GB, "30GB-40GB"),
        (60 * GB, "40GB-60GB"),
        (100 * GB, "60GB-100GB"),
    ];
    classes.into_iter().find(|(most, _)| bytes <= *most).map_or("GT100GB", |(_, name)| name)
}

/// Seconds since 1970.
pub fn now_seconds() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_managers_count_has_kubernetes_names() {
        let counted = managers();
        counted.rejected("OutOfcpu");
        counted.sandbox("runc", true, Duration::from_millis(80), true);
        counted.asked(&counted.holders_get, &Err::<(), _>(()));
        counted.pulled(11 << 20, Duration::from_secs(2));
        counted.images_collected.get_or_create(&[("reason", "space".to_owned())]).inc();
        let text = component_base::metrics::encode();
        for line in [
            "kubelet_admission_rejections_total{reason=\"OutOfcpu\"} 1",
            "kubelet_run_podsandbox_duration_seconds_count{runtime_handler=\"runc\"} 1",
            "kubelet_run_podsandbox_errors_total{runtime_handler=\"runc\"} 1",
            "kubelet_started_pods_errors_total 1",
            "kubelet_started_user_namespaced_pods_errors_total 1",
            "kubelet_pod_resources_endpoint_requests_total{server_api_version=\"v1\"} 1",
            "# TYPE kubelet_pod_resources_endpoint_errors_get counter",
            "kubelet_pod_resources_endpoint_errors_get{server_api_version=\"v1\"} 1",
            "kubelet_image_pull_duration_seconds_count{image_size_in_bytes=\"10MB-100MB\"} 1",
            "kubelet_image_garbage_collected_total{reason=\"space\"} 1",
            "kubelet_cpu_manager_pinning_requests_total 0",
            "kubelet_graceful_shutdown_start_time_seconds 0",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
