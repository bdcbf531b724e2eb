//! Metrics of the work queues, with Kubernetes' names: one series a controller.
use component_base::metrics::register;
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram};
use std::sync::LazyLock;

type Name = [(&'static str, String); 1];

/// From 10 ns to 1000 s, as upstream's queues.
fn durations() -> Histogram {
    Histogram::new((0..12).map(|i| 1e-8 * 10f64.powi(i)))
}

struct Families {
    adds: Family<Name, Counter>,
    depth: Family<Name, Gauge>,
    retries: Family<Name, Counter>,
    waited: Family<Name, Histogram, fn() -> Histogram>,
    worked: Family<Name, Histogram, fn() -> Histogram>,
}

static FAMILIES: LazyLock<Families> = LazyLock::new(|| {
    let histograms = || Family::new_with_constructor(durations as fn() -> Histogram);
    Families {
        adds: register("workqueue_adds", "Total number of adds handled by workqueue", Family::default()),
        depth: register("workqueue_depth", "Current depth of workqueue", Family::default()),
        retries: register("workqueue_retries", "Total number of retries handled by workqueue", Family::default()),
        waited: register(
            "workqueue_queue_duration_seconds",
            "How long in seconds an item stays in workqueue before being requested",
            histograms(),
        ),
        worked: register(
            "workqueue_work_duration_seconds",
            "How long in seconds processing an item from workqueue takes",
            histograms(),
        ),
    }
});

/// The series of one queue.
pub(super) struct QueueMetrics {
    pub(super) adds: Counter,
    pub(super) depth: Gauge,
    pub(super) retries: Counter,
    pub(super) waited: Histogram,
    pub(super) worked: Histogram,
}

impl QueueMetrics {
    pub(super) fn of(name: &str) -> Self {
        let labels = [("name", name.to_owned())];
        let all = &*FAMILIES;
        Self {
            adds: all.adds.get_or_create(&labels).clone(),
            depth: all.depth.get_or_create(&labels).clone(),
            retries: all.retries.get_or_create(&labels).clone(),
            waited: all.waited.get_or_create(&labels).clone(),
            worked: all.worked.get_or_create(&labels).clone(),
        }
    }
}
