//! `/stats/summary` and `/metrics/resource`: what containers, pods and the node use, as the runtime and the kernel count it.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;

use apimachinery::status::StatusError;
use component_base::serving::{self, Response};
use http::StatusCode;
use jiff::Timestamp;
use parking_lot::Mutex;
use proto::cri as pb;
use serde_json::{Value, json};

use super::Parts;
use crate::runtime::labels;

/// Samples of containers that are remembered for rates.
const MAX_SAMPLES: usize = 4096;
/// CPU ticks a second in /proc/stat.
const TICKS: u64 = 100;

/// Earlier samples of CPU time, for rates: (nanoseconds of time, of CPU).
#[derive(Default)]
pub(super) struct Samples {
    last: Mutex<HashMap<String, (i64, u64, u64)>>,
}

struct Usage {
    namespace: String,
    pod: String,
    uid: String,
    container: String,
    /// Nanoseconds since 1970; 0: not known.
    started_at: i64,
    time: i64,
    cpu_total: u64,
    cpu_rate: u64,
    working_set: u64,
    memory: u64,
    rss: u64,
    rootfs_used: u64,
}

fn value(v: Option<&pb::UInt64Value>) -> u64 {
    v.map_or(0, |v| v.value)
}

impl Samples {
    async fn usages(&self, parts: &Parts) -> Result<Vec<Usage>, StatusError> {
        let listed = parts.runtime.cri.list_containers_with(BTreeMap::new()).await.unwrap_or_default();
        let started: HashMap<String, i64> = listed.into_iter().map(|c| (c.id, c.created_at)).collect();
        let stats = parts.runtime.cri.list_container_stats().await.map_err(|e| StatusError::internal(e.to_string()))?;
        Ok(stats
            .into_iter()
            .filter_map(|s| {
                let attributes = s.attributes?;
                let label = |name: &str| attributes.labels.get(name).cloned().unwrap_or_default();
                let cpu = s.cpu.unwrap_or_default();
                let memory = s.memory.unwrap_or_default();
                let total = value(cpu.usage_core_nano_seconds.as_ref());
                let rate = match &cpu.usage_nano_cores {
                    Some(rate) => rate.value,
                    None => self.rate(&attributes.id, cpu.timestamp, total),
                };
                Some(Usage {
                    namespace: label(labels::POD_NAMESPACE),
                    pod: label(labels::POD_NAME),
                    uid: label(labels::POD_UID),
                    container: label(labels::CONTAINER_NAME),
                    started_at: started.get(&attributes.id).copied().unwrap_or(0),
                    time: cpu.timestamp,
                    cpu_total: total,
                    cpu_rate: rate,
                    working_set: value(memory.working_set_bytes.as_ref()),
                    memory: value(memory.usage_bytes.as_ref()),
                    rss: value(memory.rss_bytes.as_ref()),
                    rootfs_used: s.writable_layer.map_or(0, |w| value(w.used_bytes.as_ref())),
                })
            })
            .collect())
    }

    /// CPU used per second since the last sample, in nanoseconds.
    fn rate(&self, id: &str, time: i64, total: u64) -> u64 {
        let mut last = self.last.lock();
        if last.len() > MAX_SAMPLES {
            last.clear();
        }
        let (before, cpu_before, rate) = last.get(id).copied().unwrap_or((0, 0, 0));
        let elapsed = u64::try_from(time.saturating_sub(before)).unwrap_or(0);
        // The same sample again, or the first.
        if before == 0 || elapsed < 100_000_000 {
            if before == 0 {
                last.insert(id.to_owned(), (time, total, 0));
            }
            return rate;
        }
        let used = u128::from(total.saturating_sub(cpu_before));
        let rate = u64::try_from(used * 1_000_000_000 / u128::from(elapsed)).unwrap_or(0);
        last.insert(id.to_owned(), (time, total, rate));
        rate
    }

    pub(super) async fn summary(&self, parts: &Parts) -> Result<Response, StatusError> {
        let usages = self.usages(parts).await?;
        let node = NodeUsage::read();
        let now = Timestamp::now();
        let node_rate = self.rate("", i64::try_from(now.as_nanosecond()).unwrap_or(0), node.cpu_nanos);
        let stamp =
            |nanos: i64| apimachinery::time::rfc3339(Timestamp::from_nanosecond(i128::from(nanos)).unwrap_or(now));
        let mut pods: BTreeMap<String, Vec<&Usage>> = BTreeMap::new();
        for usage in &usages {
            pods.entry(usage.uid.clone()).or_default().push(usage);
        }
        let pods: Vec<Value> = pods
            .values()
            .map(|list| {
                let first = list[0];
                let sum = |f: fn(&Usage) -> u64| list.iter().map(|u| f(u)).sum::<u64>();
                let cpu = |time: i64, rate: u64, total: u64| json!({"time": stamp(time), "usageNanoCores": rate, "usageCoreNanoSeconds": total});
                let containers: Vec<Value> = list
                    .iter()
                    .map(|u| {
                        json!({
                            "name": u.container,
                            "startTime": stamp(u.started_at),
                            "cpu": cpu(u.time, u.cpu_rate, u.cpu_total),
                            "memory": {"time": stamp(u.time), "usageBytes": u.memory, "workingSetBytes": u.working_set, "rssBytes": u.rss},
                            "rootfs": {"time": stamp(u.time), "usedBytes": u.rootfs_used},
                        })
                    })
                    .collect();
                json!({
                    "podRef": {"name": first.pod, "namespace": first.namespace, "uid": first.uid},
                    "startTime": stamp(first.started_at),
                    "containers": containers,
                    "cpu": cpu(first.time, sum(|u| u.cpu_rate), sum(|u| u.cpu_total)),
                    "memory": {"time": stamp(first.time), "usageBytes": sum(|u| u.memory), "workingSetBytes": sum(|u| u.working_set), "rssBytes": sum(|u| u.rss)},
                })
            })
            .collect();
        let time = apimachinery::time::rfc3339(now);
        let body = json!({
            "node": {
                "nodeName": parts.node_name,
                "startTime": time,
                "cpu": {"time": time, "usageNanoCores": node_rate, "usageCoreNanoSeconds": node.cpu_nanos},
                "memory": {"time": time, "availableBytes": node.available, "usageBytes": node.total - node.available, "workingSetBytes": node.total - node.available},
            },
            "pods": pods,
        });
        Ok(serving::respond(StatusCode::OK, "application/json", body.to_string()))
    }

    pub(super) async fn resource_metrics(&self, parts: &Parts) -> Result<Response, StatusError> {
        let usages = self.usages(parts).await;
        let failed = i32::from(usages.is_err());
        let usages = usages.unwrap_or_default();
        let node = NodeUsage::read();
        let mut out = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: Vec<(String, String)>| {
            let _ = writeln!(out, "# HELP {name} [STABLE] {help}\n# TYPE {name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(out, "{name}{labels} {value}");
            }
        };
        let seconds = |nanos: u64| format!("{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000);
        let of_container =
            |u: &Usage| format!("{{container={:?},namespace={:?},pod={:?}}}", u.container, u.namespace, u.pod);
        let each = |f: &dyn Fn(&Usage) -> String| usages.iter().map(|u| (of_container(u), f(u))).collect::<Vec<_>>();
        family(
            "container_cpu_usage_seconds_total",
            "counter",
            "Cumulative cpu time consumed by the container in core-seconds",
            each(&|u| seconds(u.cpu_total)),
        );
        family(
            "container_memory_working_set_bytes",
            "gauge",
            "Current working set of the container in bytes",
            each(&|u| u.working_set.to_string()),
        );
        family(
            "container_start_time_seconds",
            "gauge",
            "Start time of the container since unix epoch in seconds",
            each(&|u| seconds(u64::try_from(u.started_at).unwrap_or(0))),
        );
        let mut pods: BTreeMap<(String, String), (u64, u64)> = BTreeMap::new();
        for u in &usages {
            let sums = pods.entry((u.namespace.clone(), u.pod.clone())).or_default();
            sums.0 += u.cpu_total;
            sums.1 += u.working_set;
        }
        let of_pod = |(namespace, pod): &(String, String)| format!("{{namespace={namespace:?},pod={pod:?}}}");
        family(
            "pod_cpu_usage_seconds_total",
            "counter",
            "Cumulative cpu time consumed by the pod in core-seconds",
            pods.iter().map(|(k, v)| (of_pod(k), seconds(v.0))).collect(),
        );
        family(
            "pod_memory_working_set_bytes",
            "gauge",
            "Current working set of the pod in bytes",
            pods.iter().map(|(k, v)| (of_pod(k), v.1.to_string())).collect(),
        );
        family(
            "node_cpu_usage_seconds_total",
            "counter",
            "Cumulative cpu time consumed by the node in core-seconds",
            vec![(String::new(), seconds(node.cpu_nanos))],
        );
        family(
            "node_memory_working_set_bytes",
            "gauge",
            "Current working set of the node in bytes",
            vec![(String::new(), (node.total - node.available).to_string())],
        );
        family(
            "resource_scrape_error",
            "gauge",
            "1 if there was an error while getting container metrics, 0 otherwise",
            vec![(String::new(), failed.to_string())],
        );
        Ok(serving::text(StatusCode::OK, out))
    }
}

struct NodeUsage {
    cpu_nanos: u64,
    total: u64,
    available: u64,
}

impl NodeUsage {
    fn read() -> Self {
        let (total, available) = memory(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
        Self { cpu_nanos: cpu(&fs::read_to_string("/proc/stat").unwrap_or_default()), total, available }
    }
}

fn memory(meminfo: &str) -> (u64, u64) {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(name));
        line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    let total = field("MemTotal:");
    (total, field("MemAvailable:").min(total))
}

/// CPU time of all processors since boot, less idle and waiting.
fn cpu(stat: &str) -> u64 {
    let line = stat.lines().find_map(|l| l.strip_prefix("cpu ")).unwrap_or_default();
    let fields: Vec<u64> = line.split_whitespace().filter_map(|f| f.parse().ok()).collect();
    let busy: u64 = fields.iter().take(8).enumerate().filter(|(i, _)| *i != 3 && *i != 4).map(|(_, v)| v).sum();
    busy * (1_000_000_000 / TICKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_counts_are_read() {
        assert_eq!(cpu("cpu  100 0 50 9999 7 0 0 0 0 0\ncpu0 1\n"), 1_500_000_000);
        assert_eq!(memory("MemTotal: 100 kB\nMemAvailable: 40 kB\n"), (102_400, 40_960));
    }

    #[test]
    fn rates_come_from_two_samples() {
        let samples = Samples::default();
        assert_eq!(samples.rate("a", 1_000_000_000, 500), 0);
        assert_eq!(samples.rate("a", 3_000_000_000, 2_000_000_500), 1_000_000_000);
        assert_eq!(samples.rate("a", 3_000_000_000, 2_000_000_500), 1_000_000_000);
    }
}
