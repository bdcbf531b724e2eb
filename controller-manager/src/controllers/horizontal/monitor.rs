//! Metrics of autoscalers, with Kubernetes' names.
use component_base::metrics::{Labels, register};
use prometheus_client::metrics::{
    counter::Counter,
    family::Family,
    histogram::{Histogram, exponential_buckets},
};
use std::{cmp::Ordering, sync::LazyLock, time::Duration};

struct Families<const N: usize> {
    count: Family<Labels<N>, Counter>,
    took: Family<Labels<N>, Histogram, fn() -> Histogram>,
}

impl<const N: usize> Families<N> {
    fn new(count: &str, took: &str, what: &str) -> Self {
        let durations: fn() -> Histogram = || Histogram::new(exponential_buckets(0.001, 2.0, 15));
        let name = |name: &str| format!("horizontal_pod_autoscaler_controller_{name}");
        Self {
            count: register(&name(count), &format!("Number of {what}"), Family::default()),
            took: register(
                &name(took),
                &format!("The time(seconds) that the HPA controller takes for {what}"),
                Family::new_with_constructor(durations),
            ),
        }
    }

    fn note(&self, labels: &Labels<N>, took: Duration) {
        self.count.get_or_create(labels).inc();
        self.took.get_or_create(labels).observe(took.as_secs_f64());
    }
}

static STEPS: LazyLock<Families<2>> =
    LazyLock::new(|| Families::new("reconciliations", "reconciliation_duration_seconds", "reconciliations of HPA"));
static METRICS: LazyLock<Families<3>> =
    LazyLock::new(|| Families::new("metric_computation", "metric_computation_duration_seconds", "metric computations"));

fn labels(change: Ordering, failed: bool) -> Labels<2> {
    let action = match change {
        Ordering::Greater => "scale_up",
        Ordering::Less => "scale_down",
        Ordering::Equal => "none",
    };
    [("action", action.to_owned()), ("error", if failed { "internal" } else { "none" }.to_owned())]
}

/// A step that changed the size in this way has ended.
pub fn stepped(change: Ordering, failed: bool, took: Duration) {
    STEPS.note(&labels(change, failed), took);
}

/// A metric of that type asked for such a change, or failed.
pub fn computed(kind: &str, change: Ordering, failed: bool, took: Duration) {
    let [action, error] = labels(change, failed);
    METRICS.note(&[action, error, ("metric_type", kind.to_owned())], took);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_metrics_are_counted_by_what_came_of_them() {
        stepped(Ordering::Less, false, Duration::from_millis(3));
        computed("Resource", Ordering::Greater, false, Duration::ZERO);
        computed("Pods", Ordering::Equal, true, Duration::ZERO);
        let text = component_base::metrics::encode();
        for line in [
            r#"reconciliations_total{action="scale_down",error="none"} 1"#,
            r#"reconciliation_duration_seconds_bucket{le="0.004",action="scale_down",error="none"} 1"#,
            r#"metric_computation_total{action="scale_up",error="none",metric_type="Resource"} 1"#,
            r#"metric_computation_total{action="none",error="internal",metric_type="Pods"} 1"#,
        ] {
            assert!(text.contains(&format!("horizontal_pod_autoscaler_controller_{line}\n")), "{line}\n{text}");
        }
    }
}
