//! The scheduler's metrics, under Kubernetes' names.

use std::sync::Arc;
use std::time::Duration;

use component_base::metrics::register;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use crate::framework::{COUNTED_POINTS, Evaluations, Plugin, Profile};
use crate::queue::Depths;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Attempt {
    profile: String,
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Pending {
    queue: &'static str,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Scheduled,
    Unschedulable,
    Error,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Outcome::Scheduled => "scheduled",
            Outcome::Unschedulable => "unschedulable",
            Outcome::Error => "error",
        }
    }
}

/// The metrics; made once a process.
pub struct Metrics {
    attempts: Family<Attempt, Counter>,
    durations: Family<Attempt, Histogram>,
    algorithm: Histogram,
    pending: Family<Pending, Gauge>,
    preemptions: Counter,
    victims: Histogram,
    /// Preemptions carried out, beside the decisions.
    evictions: Family<Ended, Counter>,
    evicting: Family<Ended, Histogram>,
    tries: Histogram,
    waits: Family<Tries, Histogram>,
    incoming: Family<Incoming, Counter>,
    points: Family<Point, Histogram>,
    unschedulable: Family<Held, Gauge>,
    evaluations: Family<Evaluation, Counter>,
    running: Family<Running, Gauge>,
}

/// The counters of one profile: by the place of a plugin, at the [`COUNTED_POINTS`].
pub struct EvaluationCounters(Vec<[Counter; 4]>);

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Evaluation {
    plugin: &'static str,
    extension_point: &'static str,
    profile: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Ended {
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Running {
    operation: &'static str,
}

/// Work that goes on; it has ended when this is dropped.
pub struct Work(Gauge);

impl Drop for Work {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Held {
    plugin: &'static str,
    profile: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Point {
    extension_point: &'static str,
    status: &'static str,
    profile: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Tries {
    attempts: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Incoming {
    queue: &'static str,
    event: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let buckets = || Histogram::new(exponential_buckets(0.001, 2.0, 15));
        let durations = Family::<Attempt, Histogram>::new_with_constructor(buckets);
        Metrics {
            attempts: register(
                "scheduler_schedule_attempts",
                "Number of attempts to schedule pods, by the result. 'unschedulable' means a pod could not be scheduled, while \
                 'error' means an internal scheduler problem.",
                Family::default(),
            ),
            durations: register(
                "scheduler_scheduling_attempt_duration_seconds",
                "Scheduling attempt latency in seconds (scheduling algorithm + binding)",
                durations,
            ),
            algorithm: register(
                "scheduler_scheduling_algorithm_duration_seconds",
                "Scheduling algorithm latency in seconds",
                Histogram::new(exponential_buckets(0.000_05, 2.0, 18)),
            ),
            pending: register(
                "scheduler_pending_pods",
                "Number of pending pods, by the queue type. 'active' means number of pods in activeQ; 'backoff' means number of \
                 pods in backoffQ; 'unschedulable' means number of pods in unschedulablePods that the scheduler attempted to \
                 schedule and failed; 'gated' is the number of unschedulable pods that the scheduler never attempted to \
                 schedule because they are gated.",
                Family::default(),
            ),
            preemptions: register(
                "scheduler_preemption_attempts",
                "Total preemption attempts in the cluster till now",
                Counter::default(),
            ),
            victims: register(
                "scheduler_preemption_victims",
                "Number of selected preemption victims",
                Histogram::new(exponential_buckets(1.0, 2.0, 7)),
            ),
            evictions: register(
                "scheduler_preemption_goroutines_execution",
                "Number of preemption goroutines executed.",
                Family::default(),
            ),
            evicting: register(
                "scheduler_preemption_goroutines_duration_seconds",
                "Duration in seconds for running goroutines for the preemption.",
                Family::<Ended, Histogram>::new_with_constructor(|| Histogram::new(exponential_buckets(0.01, 2.0, 20))),
            ),
            tries: register(
                "scheduler_pod_scheduling_attempts",
                "Number of attempts to successfully schedule a pod.",
                Histogram::new(exponential_buckets(1.0, 2.0, 5)),
            ),
            waits: register(
                "scheduler_pod_scheduling_sli_duration_seconds",
                "E2e latency for a pod being scheduled, from the time the pod enters the scheduling queue and might involve \
                 multiple scheduling attempts.",
                Family::<Tries, Histogram>::new_with_constructor(|| Histogram::new(exponential_buckets(0.01, 2.0, 20))),
            ),
            incoming: register(
                "scheduler_queue_incoming_pods",
                "Number of pods added to scheduling queues by event and queue type.",
                Family::default(),
            ),
            unschedulable: register(
                "scheduler_unschedulable_pods",
                "The number of unschedulable pods broken down by plugin name. A pod will increment the gauge for all plugins \
                 that caused it to not schedule and so this metric have meaning only when broken down by plugin.",
                Family::default(),
            ),
            evaluations: register(
                "scheduler_plugin_evaluation",
                "Number of attempts to schedule pods by each plugin and the extension point (available only in PreFilter, \
                 Filter, PreScore, and Score).",
                Family::default(),
            ),
            running: register(
                "scheduler_goroutines",
                "Number of running goroutines split by the work they do such as binding.",
                Family::default(),
            ),
            points: register(
                "scheduler_framework_extension_point_duration_seconds",
                "Latency for running all plugins of a specific extension point.",
                Family::<Point, Histogram>::new_with_constructor(|| {
                    Histogram::new(exponential_buckets(0.0001, 2.0, 12))
                }),
            ),
        }
    }
}

impl EvaluationCounters {
    /// Adds what an attempt came to.
    pub fn add(&self, evaluations: &Evaluations) {
        for (counters, counts) in self.0.iter().zip(evaluations.counts()) {
            for (counter, times) in counters.iter().zip(counts).filter(|(_, times)| **times > 0) {
                counter.inc_by(*times);
            }
        }
    }
}

impl Metrics {
    /// The counters for the plugins of a profile.
    pub fn counters_of(&self, profile: &Profile) -> EvaluationCounters {
        let of = |plugin: &'static str, extension_point: &'static str| {
            let profile = profile.scheduler_name.clone();
            self.evaluations.get_or_create_owned(&Evaluation { plugin, extension_point, profile })
        };
        let of_plugin = |plugin: &Arc<dyn Plugin>| COUNTED_POINTS.map(|point| of(plugin.name(), point));
        EvaluationCounters(profile.plugins.iter().map(of_plugin).collect())
    }

    /// A pod is being bound. As the operation `binding` of `goroutines`: what else is counted there is done by one thread here.
    pub fn binding(&self) -> Work {
        let gauge = self.running.get_or_create_owned(&Running { operation: "binding" });
        gauge.inc();
        Work(gauge)
    }

    /// Counts an attempt.
    pub fn attempt(&self, profile: &str, outcome: Outcome, duration: Duration) {
        let labels = Attempt { profile: profile.to_owned(), result: outcome.label() };
        self.attempts.get_or_create(&labels).inc();
        self.durations.get_or_create(&labels).observe(duration.as_secs_f64());
    }

    /// All plugins of a point have run.
    pub fn ran(&self, profile: &str, extension_point: &'static str, status: &'static str, took: Duration) {
        let labels = Point { extension_point, status, profile: profile.to_owned() };
        self.points.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// A pod has come into a queue.
    pub fn came(&self, queue: &'static str, event: &'static str) {
        self.incoming.get_or_create(&Incoming { queue, event }).inc();
    }

    /// A pod is bound after so many attempts and so long a wait.
    pub fn bound(&self, attempts: u32, waited: Duration) {
        self.tries.observe(f64::from(attempts));
        let attempts = attempts.min(16).to_string();
        self.waits.get_or_create(&Tries { attempts }).observe(waited.as_secs_f64());
    }

    /// No node fits: preemption is tried.
    pub fn preemption_tried(&self) {
        self.preemptions.inc();
    }

    /// So many pods go for another.
    pub fn preempted(&self, victims: usize) {
        self.victims.observe(victims as f64);
    }

    /// They were told to go, or not all of them could be.
    pub fn evicted(&self, all: bool, took: Duration) {
        let labels = Ended { result: if all { "success" } else { "error" } };
        self.evictions.get_or_create(&labels).inc();
        self.evicting.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Records how long a decision took.
    pub fn decided_in(&self, duration: Duration) {
        self.algorithm.observe(duration.as_secs_f64());
    }

    /// Shows which plugins hold pods back, by profile.
    pub fn held_back<'a>(&self, by: impl Iterator<Item = (&'static str, &'a str)>) {
        self.unschedulable.clear();
        for (plugin, profile) in by {
            self.unschedulable.get_or_create(&Held { plugin, profile: profile.to_owned() }).inc();
        }
    }

    /// Shows how many pods wait where.
    pub fn depths(&self, depths: Depths) {
        for (queue, depth) in [
            ("active", depths.active),
            ("backoff", depths.backoff),
            ("unschedulable", depths.unschedulable),
            ("gated", depths.gated),
        ] {
            self.pending.get_or_create(&Pending { queue }).set(depth as i64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evaluations_and_bindings_are_shown_as_kubernetes_does() {
        let (metrics, profile) = (Metrics::default(), Profile::default_profile().expect("default profile"));
        let mut evaluations = Evaluations::default();
        evaluations.begin(profile.plugins.len());
        evaluations.add(profile.filter[0], 1, 3);
        metrics.counters_of(&profile).add(&evaluations);
        let work = metrics.binding();
        metrics.evicted(true, Duration::from_millis(1));
        let text = component_base::metrics::encode();
        for line in [
            "scheduler_plugin_evaluation_total{plugin=\"NodeUnschedulable\",extension_point=\"Filter\",\
             profile=\"default-scheduler\"} 3\n",
            "scheduler_goroutines{operation=\"binding\"} 1\n",
            "scheduler_preemption_goroutines_execution_total{result=\"success\"} 1\n",
            "scheduler_preemption_goroutines_duration_seconds_count{result=\"success\"} 1\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        drop(work);
        assert!(component_base::metrics::encode().contains("scheduler_goroutines{operation=\"binding\"} 0\n"));
    }
}
