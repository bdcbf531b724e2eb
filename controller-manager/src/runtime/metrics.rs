//! Metrics of the work queues, with Kubernetes' names: one series a controller.
use component_base::metrics::{Labels, register, registry};
use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::Counter, family::Family, gauge::ConstGauge, gauge::Gauge, histogram::Histogram},
};
use std::{
    collections::BTreeMap,
    sync::{LazyLock, Weak},
    time::Duration,
};

type Name = Labels<1>;

/// From 10 ns to 10 s, as upstream's queues.
fn durations() -> Histogram {
    Histogram::new((0..10).map(|i| 1e-8 * 10f64.powi(i)))
}

struct Families {
    adds: Family<Name, Counter>,
    depth: Family<Name, Gauge>,
    retries: Family<Name, Counter>,
    waited: Family<Name, Histogram, fn() -> Histogram>,
    worked: Family<Name, Histogram, fn() -> Histogram>,
}

/// What a queue's workers have in hand: for how long in all, and the longest of it.
pub(super) trait Busy: Send + Sync {
    fn busy(&self) -> (Duration, Duration);
}

/// The queues of the process, asked when metrics are read.
static QUEUES: Mutex<Vec<(String, Weak<dyn Busy>)>> = Mutex::new(Vec::new());

pub(super) fn watch(name: &str, queue: Weak<dyn Busy>) {
    QUEUES.lock().push((name.to_owned(), queue));
}

#[derive(Debug)]
struct InHand;

impl Collector for InHand {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut queues = QUEUES.lock();
        queues.retain(|(_, queue)| queue.strong_count() > 0);
        let mut busy: BTreeMap<String, (Duration, Duration)> = BTreeMap::new();
        for (name, queue) in queues.iter() {
            // Queues of one name are one series, as upstream's of certificates are.
            let Some((sum, most)) = queue.upgrade().map(|queue| queue.busy()) else { continue };
            let of_name = busy.entry(name.clone()).or_default();
            *of_name = (of_name.0 + sum, of_name.1.max(most));
        }
        drop(queues);
        let unfinished = "How many seconds of work has done that is in progress and hasn't been observed by work_duration. \
                          Large values indicate stuck threads. One can deduce the number of stuck threads by observing \
                          the rate at which this increases";
        let longest = "How many seconds has the longest running processor for workqueue been running";
        let (all, one) = ("workqueue_unfinished_work_seconds", "workqueue_longest_running_processor_seconds");
        for (metric, help, of_all) in [(all, unfinished, true), (one, longest, false)] {
            let mut metric = encoder.encode_descriptor(metric, help, None, MetricType::Gauge)?;
            for (name, (sum, most)) in &busy {
                let value = if of_all { sum } else { most };
                ConstGauge::new(value.as_secs_f64()).encode(metric.encode_family(&[("name", name.as_str())])?)?;
            }
        }
        Ok(())
    }
}

static FAMILIES: LazyLock<Families> = LazyLock::new(|| {
    registry().register_collector(Box::new(InHand));
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
