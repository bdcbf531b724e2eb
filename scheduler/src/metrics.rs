//! The scheduler's metrics, under Kubernetes' names.

use std::time::Duration;

use component_base::metrics::register;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

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
}

impl Default for Metrics {
    fn default() -> Self {
        let buckets = || Histogram::new(exponential_buckets(0.001, 2.0, 15));
        let durations = Family::<Attempt, Histogram>::new_with_constructor(buckets);
        Metrics {
            attempts: register(
                "scheduler_schedule_attempts",
                "Number of attempts to schedule pods, by the result.",
                Family::default(),
            ),
            durations: register(
                "scheduler_scheduling_attempt_duration_seconds",
                "Scheduling attempt latency in seconds (scheduling algorithm + binding).",
                durations,
            ),
            algorithm: register(
                "scheduler_scheduling_algorithm_duration_seconds",
                "Scheduling algorithm latency in seconds.",
                Histogram::new(exponential_buckets(0.000_05, 2.0, 18)),
            ),
            pending: register(
                "scheduler_pending_pods",
                "Number of pending pods, by the queue type.",
                Family::default(),
            ),
        }
    }
}

impl Metrics {
    /// Counts an attempt.
    pub fn attempt(&self, profile: &str, outcome: Outcome, duration: Duration) {
        let labels = Attempt { profile: profile.to_owned(), result: outcome.label() };
        self.attempts.get_or_create(&labels).inc();
        self.durations.get_or_create(&labels).observe(duration.as_secs_f64());
    }

    /// Records how long a decision took.
    pub fn decided_in(&self, duration: Duration) {
        self.algorithm.observe(duration.as_secs_f64());
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
