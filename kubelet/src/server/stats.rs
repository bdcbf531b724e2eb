//! `/stats/summary`, `/metrics/resource` and `/metrics/cadvisor`: what containers, pods and the node use, as the kernel and the
//! runtime count it.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use apimachinery::status::StatusError;
use component_base::serving::{self, Response};
use http::StatusCode;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::Parts;
use crate::csi;
use crate::runtime::pods::uid_of;
use crate::usage::network::{self, Interface};
use crate::usage::{self, ContainerUsage, DiskUsage, PodUsage, Usage};
use crate::volumes::Volumes;

/// Samples of containers that are remembered for rates.
const MAX_SAMPLES: usize = 4096;
/// CPU ticks a second in /proc/stat.
const TICKS: u64 = 100;

/// Earlier samples of CPU time, for rates: (nanoseconds of time, of CPU).
#[derive(Default)]
pub(super) struct Samples {
    last: Mutex<HashMap<String, (i64, u64, u64)>>,
    /// What each pod had on disk, and when it was walked.
    disks: Mutex<HashMap<String, (Instant, PodUsage)>>,
}

impl Samples {
    /// What the pods use. Disks are walked once in `volumeStatsAggPeriod`.
    async fn usages(&self, parts: &Parts, with_disk: bool) -> Result<Vec<PodUsage>, StatusError> {
        let pods = parts.workers.pods();
        let trust = parts.config.volume_stats_agg_period;
        let fresh = |pod: &Pod| self.disks.lock().get(uid_of(pod)).is_some_and(|(at, _)| at.elapsed() < trust);
        let found = usage::pods(&parts.runtime, &pods, |pod| with_disk && !fresh(pod)).await;
        let mut found = found.map_err(|e| StatusError::internal(e.to_string()))?;
        let mut disks = self.disks.lock();
        disks.retain(|uid, _| pods.iter().any(|pod| uid_of(pod) == uid));
        for usage in &mut found {
            let walked = !usage.empty_dirs.is_empty() || usage.containers.iter().any(|c| c.logs.inodes > 0);
            if walked {
                disks.insert(usage.uid.clone(), (Instant::now(), usage.clone()));
            } else if let Some((_, known)) = disks.get(&usage.uid) {
                usage.empty_dirs.clone_from(&known.empty_dirs);
                for container in &mut usage.containers {
                    let same = known.containers.iter().find(|c| c.id == container.id);
                    container.logs = same.map(|c| c.logs).unwrap_or_default();
                }
            }
        }
        Ok(found)
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

    pub(super) async fn summary(&self, parts: &Parts, only_cpu_and_memory: bool) -> Result<Response, StatusError> {
        let usages = self.usages(parts, !only_cpu_and_memory).await?;
        let pods = parts.workers.pods();
        let root = parts.runtime.node.root_dir.clone();
        let node_disk = Disk::of(&root);
        let image_disk = image_dir(parts).await.and_then(|path| Disk::of(&path));
        let mut shown: Vec<Value> = Vec::with_capacity(usages.len());
        for usage in &usages {
            let pod = pods.iter().find(|pod| uid_of(pod) == usage.uid);
            let volumes = (root.as_path(), parts.workers.means().volumes.as_ref());
            shown.push(self.pod(usage, pod, node_disk.as_ref(), volumes, only_cpu_and_memory));
        }
        let (node, now) = (NodeUsage::read(), usage::now_nanos());
        let own = component_base::metrics::process_usage().unwrap_or_default();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let own = Usage {
            cpu_nanos: (own.0 * 1e9) as u64,
            memory: own.1,
            working_set: own.1,
            rss: own.1,
            ..Default::default()
        };
        let all_pods = parts.runtime.cgroups.all_pods_usage().unwrap_or_default();
        let system = |name: &str, usage: &Usage| json!({"name": name, "startTime": stamp(boot_time()), "cpu": self.cpu(&format!("/{name}"), now, usage, None), "memory": memory(now, usage, None)});
        let whole = Usage {
            cpu_nanos: node.cpu_nanos,
            memory: node.total - node.available,
            working_set: node.total - node.available,
            ..Default::default()
        };
        let mut body = json!({
            "node": {
                "nodeName": parts.node_name,
                "startTime": stamp(boot_time()),
                "systemContainers": [system("kubelet", &own), system("pods", &all_pods)],
                "cpu": self.cpu("", now, &whole, None),
                "memory": memory(now, &whole, Some(node.available)),
            },
            "pods": shown,
        });
        if !only_cpu_and_memory {
            let pids = crate::node::machine::free().pids.unwrap_or_default();
            let interfaces = network::interfaces(std::process::id());
            let runtime = json!({"imageFs": image_disk.as_ref().map(|d| d.show(now, None)), "containerFs": image_disk.as_ref().map(|d| d.show(now, None))});
            for (name, value) in [
                ("network", network_of(now, &interfaces)),
                ("fs", node_disk.map(|d| d.show(now, None)).unwrap_or_default()),
                ("runtime", runtime),
                ("rlimit", json!({"time": stamp(now), "maxpid": pids.1, "curproc": pids.1.saturating_sub(pids.0)})),
            ] {
                body["node"][name] = value;
            }
        }
        Ok(serving::respond(StatusCode::OK, "application/json", body.to_string()))
    }

    fn cpu(&self, id: &str, time: i64, usage: &Usage, rate: Option<u64>) -> Value {
        let rate = rate.unwrap_or_else(|| self.rate(id, time, usage.cpu_nanos));
        json!({"time": stamp(time), "usageNanoCores": rate, "usageCoreNanoSeconds": usage.cpu_nanos})
    }

    fn pod(
        &self,
        usage: &PodUsage,
        pod: Option<&Arc<Pod>>,
        disk: Option<&Disk>,
        (root, mounted): (&Path, &Volumes),
        brief: bool,
    ) -> Value {
        let show = |time, used| disk.map(|d| d.show(time, Some(used)));
        let containers: Vec<Value> = usage
            .containers
            .iter()
            .map(|c: &ContainerUsage| {
                let mut value = json!({"name": c.name, "startTime": stamp(c.created_at),
                    "cpu": self.cpu(&c.id, c.time, &c.usage, c.cpu_rate), "memory": memory(c.time, &c.usage, None)});
                if !brief {
                    value["rootfs"] = json!(show(c.time, c.root));
                    value["logs"] = json!(show(c.time, c.logs));
                    value["swap"] = json!({"time": stamp(c.time), "swapUsageBytes": c.usage.swap});
                }
                value
            })
            .collect();
        let mut value = json!({
            "podRef": {"name": usage.name, "namespace": usage.namespace, "uid": usage.uid},
            "startTime": stamp(usage.started_at),
            "containers": containers,
            "cpu": self.cpu(&usage.uid, usage.time, &usage.usage, None),
            "memory": memory(usage.time, &usage.usage, None),
        });
        if brief {
            return value;
        }
        if let Some(pid) = usage.sandbox_pid {
            value["network"] = network_of(usage.time, &network::interfaces(pid));
        }
        value["ephemeral-storage"] = json!(show(usage.time, usage.ephemeral_storage()));
        value["process_stats"] = json!({"process_count": usage.usage.pids});
        value["swap"] = json!({"time": stamp(usage.time), "swapUsageBytes": usage.usage.swap});
        let spec = pod.and_then(|pod| pod.spec.as_ref());
        let volumes = spec.into_iter().flat_map(|s| s.volumes.iter().flatten());
        let volumes: Vec<Value> = volumes
            .filter_map(|volume| {
                let claim = apimachinery::volume::claim_of(&usage.name, volume);
                let mut abnormal = None;
                let mut shown = match (usage.empty_dirs.get(&volume.name), &claim) {
                    (Some(used), _) => show(usage.time, *used)?,
                    (None, Some(_)) => {
                        let found = mounted.measured(&usage.uid, &volume.name)?;
                        abnormal = found.abnormal;
                        Disk { free: found.free, all: found.all }.show(usage.time, Some(found.used))
                    }
                    (None, None) => Disk::of(&volume_path(root, &usage.uid, &volume.name)?)?.show(usage.time, None),
                };
                shown["name"] = json!(volume.name);
                if let Some(abnormal) = abnormal {
                    shown["volumeHealthStats"] = json!({"abnormal": abnormal});
                }
                if let Some((claim, _)) = claim {
                    shown["pvcRef"] = json!({"name": claim, "namespace": usage.namespace});
                }
                Some(shown)
            })
            .collect();
        value["volume"] = json!(volumes);
        value
    }

    pub(super) async fn resource_metrics(&self, parts: &Parts) -> Response {
        let usages = self.usages(parts, false).await;
        let failed = u64::from(usages.is_err());
        let usages = usages.unwrap_or_default();
        let node = NodeUsage::read();
        let mut out = Exposition::new(RESOURCE);
        let containers = || usages.iter().flat_map(|pod| pod.containers.iter().map(move |c| (pod, c)));
        let of_container = |(p, c): (&PodUsage, &ContainerUsage)| {
            format!("{{container={:?},namespace={:?},pod={:?}}}", c.name, p.namespace, p.name)
        };
        let of_pod = |p: &PodUsage| format!("{{namespace={:?},pod={:?}}}", p.namespace, p.name);
        let each =
            |f: &dyn Fn(&ContainerUsage) -> String| containers().map(|both| (of_container(both), f(both.1))).collect();
        let pods = |f: &dyn Fn(&PodUsage) -> String| usages.iter().map(|p| (of_pod(p), f(p))).collect();
        let alone = |value: String| vec![(String::new(), value)];
        out.add("container_cpu_usage_seconds_total", each(&|c| seconds(c.usage.cpu_nanos)));
        out.add("container_memory_working_set_bytes", each(&|c| c.usage.working_set.to_string()));
        out.add("container_start_time_seconds", each(&|c| seconds(u64::try_from(c.created_at).unwrap_or(0))));
        out.add("container_swap_usage_bytes", each(&|c| c.usage.swap.to_string()));
        out.add("pod_cpu_usage_seconds_total", pods(&|p| seconds(p.usage.cpu_nanos)));
        out.add("pod_memory_working_set_bytes", pods(&|p| p.usage.working_set.to_string()));
        out.add("pod_swap_usage_bytes", pods(&|p| p.usage.swap.to_string()));
        out.add("node_cpu_usage_seconds_total", alone(seconds(node.cpu_nanos)));
        out.add("node_memory_working_set_bytes", alone((node.total - node.available).to_string()));
        out.add("resource_scrape_error", alone(failed.to_string()));
        serving::text(StatusCode::OK, out.text)
    }

    /// The metrics that cAdvisor has of containers and pods, by its names.
    pub(super) async fn cadvisor_metrics(&self, parts: &Parts) -> Result<Response, StatusError> {
        let usages = self.usages(parts, false).await?;
        let now = usage::now_nanos();
        let labels = |pod: &PodUsage, container: Option<&ContainerUsage>| {
            let (name, id) = container.map_or(("", ""), |c| (c.name.as_str(), c.id.as_str()));
            let path = if id.is_empty() {
                format!("/kubepods/pod{}", pod.uid)
            } else {
                format!("/kubepods/pod{}/{id}", pod.uid)
            };
            format!(
                "container={name:?},id={path:?},image=\"\",name={id:?},namespace={:?},pod={:?}",
                pod.namespace, pod.name
            )
        };
        type Read = fn(&Usage) -> String;
        let table: [(&str, &str, Read); 14] = [
            ("container_cpu_usage_seconds_total", ",cpu=\"total\"", |u| seconds(u.cpu_nanos)),
            ("container_cpu_cfs_periods_total", "", |u| u.cpu_periods.to_string()),
            ("container_cpu_cfs_throttled_periods_total", "", |u| u.cpu_throttled_periods.to_string()),
            ("container_cpu_cfs_throttled_seconds_total", "", |u| seconds(u.cpu_throttled_nanos)),
            ("container_memory_usage_bytes", "", |u| u.memory.to_string()),
            ("container_memory_working_set_bytes", "", |u| u.working_set.to_string()),
            ("container_memory_rss", "", |u| u.rss.to_string()),
            ("container_memory_cache", "", |u| u.cache.to_string()),
            ("container_memory_mapped_file", "", |u| u.mapped.to_string()),
            ("container_memory_swap", "", |u| u.swap.to_string()),
            ("container_memory_failures_total", FAULTS, |u| u.page_faults.to_string()),
            ("container_memory_major_failures_total", "", |u| u.major_page_faults.to_string()),
            ("container_processes", "", |u| u.pids.to_string()),
            ("container_threads", "", |u| u.pids.to_string()),
        ];
        let mut out = Exposition::new(CADVISOR);
        for (name, more, read) in table {
            let samples = usages.iter().flat_map(|pod| {
                let own = (format!("{{{}{more}}}", labels(pod, None)), read(&pod.usage));
                let each =
                    pod.containers.iter().map(|c| (format!("{{{}{more}}}", labels(pod, Some(c))), read(&c.usage)));
                std::iter::once(own).chain(each).collect::<Vec<_>>()
            });
            out.add(name, samples.collect());
        }
        let of_containers = |f: &dyn Fn(&ContainerUsage) -> String| {
            let all = usages.iter().flat_map(|pod| pod.containers.iter().map(move |c| (pod, c)));
            all.map(|(pod, c)| (format!("{{{}}}", labels(pod, Some(c))), f(c))).collect::<Vec<_>>()
        };
        let start = of_containers(&|c| seconds(u64::try_from(c.created_at).unwrap_or(0)));
        out.add("container_start_time_seconds", start);
        out.add("container_last_seen", of_containers(&|_| seconds(u64::try_from(now).unwrap_or(0))));
        out.add("container_fs_usage_bytes", of_containers(&|c| c.root.bytes.to_string()));
        out.add("container_fs_inodes_total", of_containers(&|c| c.root.inodes.to_string()));
        let interfaces: Vec<(&PodUsage, Interface)> = usages
            .iter()
            .flat_map(|pod| {
                pod.sandbox_pid.map(network::interfaces).unwrap_or_default().into_iter().map(move |i| (pod, i))
            })
            .collect();
        type Count = fn(&Interface) -> u64;
        let counts: [(&str, Count); 4] = [
            ("container_network_receive_bytes_total", |i| i.received_bytes),
            ("container_network_receive_errors_total", |i| i.received_errors),
            ("container_network_transmit_bytes_total", |i| i.sent_bytes),
            ("container_network_transmit_errors_total", |i| i.sent_errors),
        ];
        for (name, read) in counts {
            let sample = |(pod, i): &(&PodUsage, Interface)| {
                (format!("{{{},interface={:?}}}", labels(pod, None), i.name), read(i).to_string())
            };
            out.add(name, interfaces.iter().map(sample).collect());
        }
        let node = NodeUsage::read();
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let alone = |value: String| vec![(String::new(), value)];
        out.add("machine_cpu_cores", alone(cpus.to_string()));
        out.add("machine_memory_bytes", alone(node.total.to_string()));
        Ok(serving::text(StatusCode::OK, out.text))
    }
}

/// Labels of the faults that are counted.
const FAULTS: &str = ",failure_type=\"pgfault\",scope=\"container\"";

/// Families of metrics, a line each: name, type, help.
const RESOURCE: &str = "\
container_cpu_usage_seconds_total counter [STABLE] Cumulative cpu time consumed by the container in core-seconds
container_memory_working_set_bytes gauge [STABLE] Current working set of the container in bytes
container_start_time_seconds gauge [STABLE] Start time of the container since unix epoch in seconds
container_swap_usage_bytes gauge [STABLE] Current amount of the container swap usage in bytes. Reported only on non-windows systems
pod_cpu_usage_seconds_total counter [STABLE] Cumulative cpu time consumed by the pod in core-seconds
pod_memory_working_set_bytes gauge [STABLE] Current working set of the pod in bytes
pod_swap_usage_bytes gauge [STABLE] Current amount of the pod swap usage in bytes. Reported only on non-windows systems
node_cpu_usage_seconds_total counter [STABLE] Cumulative cpu time consumed by the node in core-seconds
node_memory_working_set_bytes gauge [STABLE] Current working set of the node in bytes
resource_scrape_error gauge [STABLE] 1 if there was an error while getting container metrics, 0 otherwise";

const CADVISOR: &str = "\
container_cpu_usage_seconds_total counter Cumulative cpu time consumed in seconds.
container_cpu_cfs_periods_total counter Number of elapsed enforcement period intervals.
container_cpu_cfs_throttled_periods_total counter Number of throttled period intervals.
container_cpu_cfs_throttled_seconds_total counter Total time duration the container has been throttled.
container_memory_usage_bytes gauge Current memory usage in bytes, including all memory regardless of when it was accessed
container_memory_working_set_bytes gauge Current working set in bytes.
container_memory_rss gauge Size of RSS in bytes.
container_memory_cache gauge Number of bytes of page cache memory.
container_memory_mapped_file gauge Size of memory mapped files in bytes.
container_memory_swap gauge Container swap usage in bytes.
container_memory_failures_total counter Cumulative count of memory allocation failures.
container_memory_major_failures_total counter Cumulative count of major page faults.
container_processes gauge Number of processes running inside the container.
container_threads gauge Number of threads running inside the container
container_start_time_seconds gauge Start time of the container since unix epoch in seconds.
container_last_seen gauge Last time a container was seen by the exporter
container_fs_usage_bytes gauge Number of bytes that are consumed by the container on this filesystem.
container_fs_inodes_total gauge Number of Inodes
container_network_receive_bytes_total counter Cumulative count of bytes received
container_network_receive_errors_total counter Cumulative count of errors encountered while receiving
container_network_transmit_bytes_total counter Cumulative count of bytes transmitted
container_network_transmit_errors_total counter Cumulative count of errors encountered while transmitting
machine_cpu_cores gauge Number of logical CPU cores.
machine_memory_bytes gauge Amount of memory installed on the machine.";

pub(super) const PROBES: &str =
    "prober_probe_total counter Cumulative number of a liveness, readiness or startup probe for a container by result.";

/// Metrics as text.
pub(super) struct Exposition {
    families: &'static str,
    pub text: String,
}

impl Exposition {
    /// Of these families.
    pub(super) fn new(families: &'static str) -> Self {
        Self { families, text: String::new() }
    }

    /// Adds the samples of a family: labels and value.
    pub(super) fn add(&mut self, name: &str, samples: Vec<(String, String)>) {
        let family = self.families.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let (kind, help) = family.and_then(|family| family.split_once(' ')).unwrap_or(("untyped", ""));
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(self.text, "{name}{labels} {value}");
        }
    }
}

fn seconds(nanos: u64) -> String {
    format!("{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000)
}

fn stamp(nanos: i64) -> String {
    let time = Timestamp::from_nanosecond(i128::from(nanos)).unwrap_or_default();
    apimachinery::time::rfc3339(time)
}

fn memory(time: i64, usage: &Usage, available: Option<u64>) -> Value {
    let mut value = json!({"time": stamp(time), "usageBytes": usage.memory, "workingSetBytes": usage.working_set,
        "rssBytes": usage.rss, "pageFaults": usage.page_faults, "majorPageFaults": usage.major_page_faults});
    if let Some(available) = available {
        value["availableBytes"] = json!(available);
    }
    value
}

fn network_of(time: i64, interfaces: &[Interface]) -> Value {
    let show = |i: &Interface| json!({"name": i.name, "rxBytes": i.received_bytes, "rxErrors": i.received_errors, "txBytes": i.sent_bytes, "txErrors": i.sent_errors});
    let mut value =
        interfaces.iter().find(|i| i.name == "eth0").or(interfaces.first()).map(show).unwrap_or_else(|| json!({}));
    value["time"] = json!(stamp(time));
    value["interfaces"] = interfaces.iter().map(show).collect();
    value
}

/// A file system, as statistics show one.
struct Disk {
    free: DiskUsage,
    all: DiskUsage,
}

impl Disk {
    fn of(path: &Path) -> Option<Disk> {
        usage::file_system(path).map(|(free, all)| Disk { free, all })
    }

    /// `used`: by something on it; None: by all.
    fn show(&self, time: i64, used: Option<DiskUsage>) -> Value {
        let all_used = DiskUsage {
            bytes: self.all.bytes.saturating_sub(self.free.bytes),
            inodes: self.all.inodes.saturating_sub(self.free.inodes),
        };
        let used = used.unwrap_or(all_used);
        json!({"time": stamp(time), "availableBytes": self.free.bytes, "capacityBytes": self.all.bytes, "usedBytes": used.bytes,
            "inodesFree": self.free.inodes, "inodes": self.all.inodes, "inodesUsed": used.inodes})
    }
}

/// A mounted volume of a pod, of whatever plugin.
fn volume_path(root: &Path, uid: &str, name: &str) -> Option<PathBuf> {
    let plugins = fs::read_dir(root.join("pods").join(uid).join("volumes")).ok()?.flatten();
    let path = plugins.map(|plugin| plugin.path().join(name)).find(|path| path.is_dir())?;
    // A driver's volume is in a directory beside its record.
    let mount = path.join("mount");
    Some(if path.join(csi::RECORD).is_file() { mount } else { path })
}

async fn image_dir(parts: &Parts) -> Option<PathBuf> {
    let info = parts.runtime.cri.image_fs_info().await.ok()?;
    info.image_filesystems.first()?.fs_id.as_ref().map(|id| PathBuf::from(&id.mountpoint))
}

/// When the machine started: nanoseconds since 1970.
fn boot_time() -> i64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().find_map(|l| l.strip_prefix("btime "));
    line.and_then(|l| l.trim().parse::<i64>().ok()).unwrap_or(0).saturating_mul(1_000_000_000)
}

struct NodeUsage {
    cpu_nanos: u64,
    total: u64,
    available: u64,
}

impl NodeUsage {
    fn read() -> Self {
        let (total, available) = meminfo(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
        Self { cpu_nanos: cpu(&fs::read_to_string("/proc/stat").unwrap_or_default()), total, available }
    }
}

fn meminfo(meminfo: &str) -> (u64, u64) {
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
        assert_eq!(meminfo("MemTotal: 100 kB\nMemAvailable: 40 kB\n"), (102_400, 40_960));
    }

    #[test]
    fn rates_come_from_two_samples() {
        let samples = Samples::default();
        assert_eq!(samples.rate("a", 1_000_000_000, 500), 0);
        assert_eq!(samples.rate("a", 3_000_000_000, 2_000_000_500), 1_000_000_000);
        assert_eq!(samples.rate("a", 3_000_000_000, 2_000_000_500), 1_000_000_000);
    }
}
