//! The process's metrics: one registry, and its text for `/metrics`.
//!
//! Names follow `prometheus-client`: a counter is registered without its `_total` suffix.
use parking_lot::{Mutex, MutexGuard};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
    },
    registry::{Metric, Registry},
};
use std::sync::LazyLock;

/// What [`encode`] yields.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Linux reports CPU times in these; the kernel fixes it for user space.
const TICKS_PER_SECOND: f64 = 100.0;
const PAGE_BYTES: u64 = 4096;

static REGISTRY: LazyLock<Mutex<Registry>> = LazyLock::new(|| {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Process));
    Mutex::new(registry)
});

/// The results of health checks, apart from the other metrics: they are read far more often (KEP-3466).
static SLIS: LazyLock<(Registry, Family<Labels<2>, Gauge>, Family<Labels<3>, Counter>)> = LazyLock::new(|| {
    let (mut registry, one, all) = (Registry::default(), Family::default(), Family::default());
    registry.register("kubernetes_healthcheck", "This metric records the result of a single healthcheck", one.clone());
    registry.register("kubernetes_healthchecks", "This metric records the results of all healthcheck", all.clone());
    (registry, one, all)
});

/// What tells the series of a metric apart.
pub type Labels<const N: usize> = [(&'static str, String); N];

/// The registry of the process.
pub fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock()
}

/// The registry ends every help text with a full stop; what is marked so is shown as it was given.
const AS_GIVEN: &str = "\u{1}";

/// Marks a counter whose samples have no suffix: Kubernetes has some that are older than that rule.
const BARE: &str = "\u{2}";

/// The help text of a counter that is shown without `_total`: `register("kubelet_evictions", &bare("…"), Counter::default())`.
pub fn bare(help: &str) -> String {
    format!("{help}{BARE}")
}

/// Registers a metric and gives it back: `let ADDS = register("workqueue_adds", "…", Family::default())`.
pub fn register<M: Metric + Clone>(name: &str, help: &str, metric: M) -> M {
    registry().register(name, format!("{help}{AS_GIVEN}"), metric.clone());
    metric
}

/// Everything registered, in Prometheus' text format, as Kubernetes serves it.
pub fn encode() -> String {
    text(&registry())
}

/// A health check was asked by way of an endpoint (`healthz`, `livez`, `readyz`): for `/metrics/slis`.
pub fn checked(name: &str, endpoint: &str, passed: bool) {
    let (_, one, all) = &*SLIS;
    let labels = [("name", name.to_owned()), ("type", endpoint.to_owned())];
    one.get_or_create(&labels).set(i64::from(passed));
    let [name, endpoint] = labels;
    let status = if passed { "success" } else { "error" };
    all.get_or_create(&[name, ("status", status.to_owned()), endpoint]).inc();
}

/// What `/metrics/slis` serves.
pub fn encode_slis() -> String {
    text(&SLIS.0)
}

fn text(registry: &Registry) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, registry);
    classic(&text)
}

/// OpenMetrics text in the older format that every reader knows: there a counter is described by the name of its samples.
fn classic(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut help: Option<(&str, &str)> = None;
    // The counter that the next samples are of, where they are to lose their suffix.
    let mut bare: Option<&str> = None;
    for line in text.lines() {
        let described = |what: &str| line.strip_prefix(what).and_then(|rest| rest.split_once(' '));
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        } else if let Some(found) = described("# HELP ") {
            help = Some(found);
        } else if let Some((name, kind)) = described("# TYPE ") {
            let help = help
                .take()
                .filter(|(helped, _)| *helped == name)
                .map(|(_, help)| help.strip_suffix('.').and_then(|help| help.strip_suffix(AS_GIVEN)).unwrap_or(help));
            let stripped = help.and_then(|help| help.strip_suffix(BARE));
            bare = stripped.map(|_| name);
            let suffix = if kind == "counter" && bare.is_none() { "_total" } else { "" };
            if let Some(help) = stripped.or(help) {
                out.extend(["# HELP ", name, suffix, " ", help, "\n"]);
            }
            let kind = if kind == "unknown" { "untyped" } else { kind };
            out.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if let Some((name, rest)) =
            bare.and_then(|name| Some((name, line.strip_prefix(name)?.strip_prefix("_total")?)))
        {
            out.extend([name, rest, "\n"]);
        } else {
            out.extend([line, "\n"]);
        }
    }
    out
}

/// CPU time in seconds (user and system) and resident memory in bytes of this process.
pub fn process_usage() -> Option<(f64, u64)> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // Fields are counted behind the command name, which may hold anything but ends with the last parenthesis.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |i: usize| fields.get(i)?.parse::<u64>().ok();
    let cpu = (number(11)? + number(12)?) as f64 / TICKS_PER_SECOND;
    Some((cpu, number(21)? * PAGE_BYTES))
}

#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some((cpu, memory)) = process_usage() else { return Ok(()) };
        let cpu = ConstCounter::new(cpu);
        let help = "Total user and system CPU time spent in seconds";
        cpu.encode(encoder.encode_descriptor("process_cpu_seconds", help, None, cpu.metric_type())?)?;
        let memory = ConstGauge::new(memory as f64);
        let help = "Resident memory size in bytes";
        memory.encode(encoder.encode_descriptor("process_resident_memory_bytes", help, None, memory.metric_type())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_registered_is_in_the_text() {
        let counter: Counter = register("test_things", "Things counted", Counter::default());
        counter.inc();
        let text = encode();
        assert!(text.contains("# TYPE test_things_total counter\ntest_things_total 1\n"), "{text}");
        assert!(text.contains("# HELP test_things_total Things counted\n"), "{text}");
        assert!(!text.contains("# EOF"), "{text}");
        assert!(text.contains("process_resident_memory_bytes "), "{text}");
    }
}
