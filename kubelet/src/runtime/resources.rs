//! CPU, memory and OOM settings of containers and pods as the kernel takes them. Pure arithmetic of Kubernetes' rules.

use std::collections::BTreeMap;
use std::time::Duration;

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use proto::cri as pb;

use super::pods::{init_containers, is_sidecar};

const MIN_SHARES: i64 = 2;
const MAX_SHARES: i64 = 262_144;
const SHARES_PER_CPU: i64 = 1024;
const MIN_QUOTA_US: i64 = 1000;

/// OOM scores of pods by class; critical pods die last.
const GUARANTEED_OOM_SCORE: i64 = -997;
const BEST_EFFORT_OOM_SCORE: i64 = 1000;
/// Priority from which a pod counts as critical for the node (system-node-critical).
const NODE_CRITICAL_PRIORITY: i32 = 2_000_001_000;

/// How CFS quota is applied on this node.
#[derive(Debug, Clone, Copy)]
pub struct CpuQuota {
    pub enforce: bool,
    pub period: Duration,
}

/// What the kernel and the configuration of this node have to do with resources.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub cpu: CpuQuota,
    pub memory_capacity: i64,
    pub cgroup_v2: bool,
    /// Page sizes of the machine, as resources name them (`2Mi`).
    pub huge_pages: Vec<String>,
    /// What burstable pods share of the machine's swap: bytes. None: pods do not swap.
    pub swap_capacity: Option<i64>,
    pub memory_qos: Option<MemoryQos>,
}

/// Protection and throttling of memory (cgroup v2). As the feature MemoryQoS.
#[derive(Debug, Clone, Copy)]
pub struct MemoryQos {
    pub throttling_factor: f64,
    /// Requests are protected, those of guaranteed pods wholly.
    pub reserve: bool,
}

const PAGE_BYTES: i64 = 4096;

/// CPU shares for a request. As `MilliCPUToShares`.
pub fn shares(milli_cpu: i64) -> i64 {
    if milli_cpu == 0 {
        return MIN_SHARES;
    }
    (milli_cpu.saturating_mul(SHARES_PER_CPU) / 1000).clamp(MIN_SHARES, MAX_SHARES)
}

/// CFS quota in microseconds for a limit; 0: none. As `MilliCPUToQuota`.
pub fn quota(milli_cpu: i64, period: Duration) -> i64 {
    if milli_cpu == 0 {
        return 0;
    }
    let period_us = i64::try_from(period.as_micros()).unwrap_or(100_000);
    (milli_cpu.saturating_mul(period_us) / 1000).max(MIN_QUOTA_US)
}

/// cgroup v2 weight for v1 shares (2..262144 → 1..10000).
pub fn weight(shares: i64) -> i64 {
    let shares = shares.clamp(MIN_SHARES, MAX_SHARES);
    1 + ((shares - 2) * 9999) / 262_142
}

fn amount(map: Option<&BTreeMap<String, ApiQuantity>>, name: &str) -> Option<Quantity> {
    map.and_then(|m| m.get(name)).map(Quantity::from)
}

/// A container's request (falling back to its limit) and limit of one resource.
fn request_and_limit(container: &Container, name: &str) -> (Option<Quantity>, Option<Quantity>) {
    let resources = container.resources.as_ref();
    let limit = amount(resources.and_then(|r| r.limits.as_ref()), name);
    let request = amount(resources.and_then(|r| r.requests.as_ref()), name).or(limit);
    (request, limit)
}

/// The OOM score of a container: best effort first, guaranteed last, burstable by how much of the node it asked for.
/// As `GetContainerOOMScoreAdjust`.
pub fn oom_score_adj(pod: &Pod, container: &Container, memory_capacity: i64) -> i64 {
    if pod.spec.as_ref().and_then(|s| s.priority).is_some_and(|p| p >= NODE_CRITICAL_PRIORITY) {
        return GUARANTEED_OOM_SCORE;
    }
    let class = pod.spec.as_ref().map_or("BestEffort", apimachinery::pod::qos_class);
    match class {
        "Guaranteed" => GUARANTEED_OOM_SCORE,
        "BestEffort" => BEST_EFFORT_OOM_SCORE,
        _ => {
            let request = request_and_limit(container, "memory").0.map_or(0, |q| q.value());
            if memory_capacity <= 0 {
                return BEST_EFFORT_OOM_SCORE - 1;
            }
            let share = i64::try_from(i128::from(request) * 1000 / i128::from(memory_capacity)).unwrap_or(1000);
            // Above guaranteed pods, below best-effort ones.
            (1000 - share).clamp(1000 + GUARANTEED_OOM_SCORE, BEST_EFFORT_OOM_SCORE - 1)
        }
    }
}

/// The Linux resources of one container.
pub fn container(pod: &Pod, container: &Container, kernel: &Kernel) -> pb::LinuxContainerResources {
    let Kernel { cpu, memory_capacity, cgroup_v2, .. } = *kernel;
    let (cpu_request, cpu_limit) = request_and_limit(container, "cpu");
    let (memory_request, memory_limit) = request_and_limit(container, "memory");
    let memory_request = memory_request.map_or(0, |q| q.value());
    let memory_limit = memory_limit.map_or(0, |q| q.value());
    let mut out = pb::LinuxContainerResources {
        cpu_shares: shares(cpu_request.map_or(0, |q| q.milli_value())),
        memory_limit_in_bytes: memory_limit,
        oom_score_adj: oom_score_adj(pod, container, memory_capacity),
        ..Default::default()
    };
    if cpu.enforce {
        out.cpu_period = i64::try_from(cpu.period.as_micros()).unwrap_or(100_000);
        out.cpu_quota = match cpu_limit {
            Some(limit) => quota(limit.milli_value(), cpu.period),
            None => -1,
        };
        if out.cpu_quota == 0 {
            out.cpu_quota = -1;
        }
    }
    if cgroup_v2 {
        out.unified.insert("memory.oom.group".to_owned(), "1".to_owned());
    }
    let swap = swap_limit(pod, memory_request, memory_limit, kernel);
    // Memory and swap together.
    if memory_limit > 0 {
        out.memory_swap_limit_in_bytes = memory_limit + swap;
    }
    if cgroup_v2 {
        out.unified.insert("memory.swap.max".to_owned(), swap.to_string());
        if let Some(qos) = kernel.memory_qos {
            protect(&mut out, qos, class_of(pod), memory_request, memory_limit, memory_capacity);
        }
    }
    out.hugepage_limits = huge_pages(kernel, |name| request_and_limit(container, name).1.map_or(0, |q| q.value()));
    out
}

fn class_of(pod: &Pod) -> &'static str {
    pod.spec.as_ref().map_or("BestEffort", apimachinery::pod::qos_class)
}

/// A burstable container's part of the swap, by its request. As `LimitedSwap`.
fn swap_limit(pod: &Pod, request: i64, limit: i64, kernel: &Kernel) -> i64 {
    let Some(capacity) = kernel.swap_capacity.filter(|_| kernel.cgroup_v2 && kernel.memory_capacity > 0) else {
        return 0;
    };
    let critical = pod.spec.as_ref().and_then(|s| s.priority).is_some_and(|p| p >= NODE_CRITICAL_PRIORITY);
    if critical || class_of(pod) != "Burstable" || request == 0 || request == limit {
        return 0;
    }
    i64::try_from(i128::from(request) * i128::from(capacity) / i128::from(kernel.memory_capacity)).unwrap_or(0)
}

/// What of a request is not taken back, and from where on a cgroup is slowed down.
fn protect(
    out: &mut pb::LinuxContainerResources,
    qos: MemoryQos,
    class: &str,
    request: i64,
    limit: i64,
    memory_capacity: i64,
) {
    if qos.reserve && request > 0 {
        let file = if class == "Guaranteed" { "memory.min" } else { "memory.low" };
        out.unified.insert(file.to_owned(), request.to_string());
    }
    let most = if limit > 0 { limit } else { memory_capacity };
    if class != "Guaranteed" && most > request {
        #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
        let high = request + ((most - request) as f64 * qos.throttling_factor) as i64;
        out.unified.insert("memory.high".to_owned(), (high / PAGE_BYTES * PAGE_BYTES).to_string());
    }
}

/// A limit for each page size of the machine: what is not asked for cannot be had.
fn huge_pages(kernel: &Kernel, limit: impl Fn(&str) -> i64) -> Vec<pb::HugepageLimit> {
    let sizes = kernel.huge_pages.iter();
    sizes
        .map(|size| pb::HugepageLimit {
            // The kernel's name of `2Mi` is `2MB`.
            page_size: format!("{}B", size.trim_end_matches('i')),
            limit: u64::try_from(limit(&format!("hugepages-{size}"))).unwrap_or(0),
        })
        .collect()
}

/// What the pod's cgroup gets: shares of all requests; a quota and a memory limit only if every container has one.
/// As `ResourceConfigForPod`.
pub fn pod(pod: &Pod, kernel: &Kernel) -> pb::LinuxContainerResources {
    let cpu = kernel.cpu;
    let Some(spec) = pod.spec.as_ref() else { return pb::LinuxContainerResources::default() };
    let requests = apimachinery::pod::requests(spec);
    let cpu_request = requests.get("cpu").map_or(0, |q| q.milli_value());
    let cpu_limit = limit_sum(spec, "cpu", |q| q.milli_value());
    let memory_limit = limit_sum(spec, "memory", |q| q.value());
    let mut out = pb::LinuxContainerResources { cpu_shares: shares(cpu_request), ..Default::default() };
    if cpu.enforce
        && let Some(limit) = cpu_limit
    {
        out.cpu_period = i64::try_from(cpu.period.as_micros()).unwrap_or(100_000);
        out.cpu_quota = quota(limit, cpu.period);
    }
    if let Some(limit) = memory_limit {
        out.memory_limit_in_bytes = limit;
    }
    if let Some(qos) = kernel.memory_qos.filter(|qos| qos.reserve && kernel.cgroup_v2) {
        let request = requests.get("memory").map_or(0, Quantity::value);
        protect(&mut out, MemoryQos { throttling_factor: 1.0, ..qos }, class_of(pod), request, 0, request);
    }
    out.hugepage_limits =
        huge_pages(kernel, |name| apimachinery::pod::limits(spec).get(name).map_or(0, Quantity::value));
    out
}

/// The pod's limit of one resource: of the pod itself if it says so, else the greatest need over its life; None if some
/// container is unlimited.
fn limit_sum(spec: &PodSpec, name: &str, value: impl Fn(&Quantity) -> i64) -> Option<i64> {
    if let Some(own) = amount(spec.resources.as_ref().and_then(|r| r.limits.as_ref()), name) {
        return Some(value(&own));
    }
    let of = |c: &Container| request_and_limit(c, name).1.map(|q| value(&q)).filter(|v| *v > 0);
    let mut running: i64 = 0;
    for container in &spec.containers {
        running = running.saturating_add(of(container)?);
    }
    let mut sidecars: i64 = 0;
    let mut peak: i64 = 0;
    for container in init_containers(spec) {
        let limit = of(container)?;
        if is_sidecar(container) {
            sidecars = sidecars.saturating_add(limit);
            peak = peak.max(sidecars);
        } else {
            peak = peak.max(sidecars.saturating_add(limit));
        }
    }
    let overhead = amount(spec.overhead.as_ref(), name).map_or(0, |q| value(&q));
    Some(running.saturating_add(sidecars).max(peak).saturating_add(overhead))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn kernel() -> Kernel {
        Kernel {
            cpu: CpuQuota { enforce: true, period: Duration::from_millis(100) },
            memory_capacity: 4 << 30,
            cgroup_v2: false,
            huge_pages: Vec::new(),
            swap_capacity: None,
            memory_qos: None,
        }
    }

    fn pod_of(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    #[test]
    fn shares_and_quota_follow_the_kernel_bounds() {
        for (milli, want) in [(0, 2), (1, 2), (100, 102), (1000, 1024), (1_000_000, 262_144)] {
            assert_eq!(shares(milli), want, "{milli}m");
        }
        for (milli, want) in [(0, 0), (1, 1000), (10, 1000), (200, 20_000), (1500, 150_000)] {
            assert_eq!(quota(milli, Duration::from_millis(100)), want, "{milli}m");
        }
        assert_eq!((weight(2), weight(1024), weight(262_144)), (1, 39, 10_000));
    }

    #[test]
    fn oom_scores_order_the_classes() {
        let cases = [
            (json!({"containers": [{"name": "c"}]}), 1000),
            (
                json!({"containers": [{"name": "c", "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1", "memory": "1Gi"}}}]}),
                -997,
            ),
            (json!({"containers": [{"name": "c", "resources": {"requests": {"memory": "1Gi"}}}]}), 750),
            (json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]}), 999),
            (json!({"priority": 2_000_001_000, "containers": [{"name": "c"}]}), -997),
        ];
        for (spec, want) in cases {
            let pod = pod_of(spec.clone());
            let container = pod.spec.as_ref().unwrap().containers[0].clone();
            assert_eq!(oom_score_adj(&pod, &container, 4 << 30), want, "{spec}");
        }
    }

    #[test]
    fn a_pod_is_limited_only_if_all_its_containers_are() {
        let limited = json!({"limits": {"cpu": "500m", "memory": "64Mi"}});
        let both =
            pod_of(json!({"containers": [{"name": "a", "resources": limited}, {"name": "b", "resources": limited}]}));
        let resources = pod(&both, &kernel());
        assert_eq!((resources.cpu_quota, resources.memory_limit_in_bytes), (100_000, 128 << 20));
        let one = pod_of(json!({"containers": [{"name": "a", "resources": limited}, {"name": "b"}]}));
        let resources = pod(&one, &kernel());
        assert_eq!((resources.cpu_quota, resources.memory_limit_in_bytes), (0, 0));
    }

    #[test]
    fn a_container_without_a_limit_has_no_quota() {
        let pod = pod_of(json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "100m"}}}]}));
        let c = pod.spec.as_ref().unwrap().containers[0].clone();
        let resources = container(&pod, &c, &kernel());
        assert_eq!((resources.cpu_shares, resources.cpu_quota, resources.memory_limit_in_bytes), (102, -1, 0));
    }

    #[test]
    fn the_second_version_protects_slows_down_and_swaps() {
        let kernel = Kernel {
            cgroup_v2: true,
            huge_pages: vec!["2Mi".into(), "1Gi".into()],
            swap_capacity: Some(1 << 30),
            memory_qos: Some(MemoryQos { throttling_factor: 0.5, reserve: true }),
            ..kernel()
        };
        let of = |resources: serde_json::Value| {
            let pod = pod_of(json!({"containers": [{"name": "c", "resources": resources}]}));
            let c = pod.spec.as_ref().unwrap().containers[0].clone();
            let made = container(&pod, &c, &kernel);
            let file = |name: &str| made.unified.get(name).cloned().unwrap_or_default();
            let pages: Vec<_> = made.hugepage_limits.iter().map(|l| (l.page_size.clone(), l.limit)).collect();
            (["memory.min", "memory.low", "memory.high", "memory.swap.max"].map(file), pages)
        };
        let mib = |n: i64| (n << 20).to_string();
        let (files, pages) =
            of(json!({"requests": {"memory": "1Gi"}, "limits": {"memory": "2Gi", "hugepages-2Mi": "4Mi"}}));
        assert_eq!(files, [String::new(), mib(1024), mib(1536), mib(256)]);
        assert_eq!(pages, [("2MB".to_owned(), 4 << 20), ("1GB".to_owned(), 0)]);
        let sure = json!({"cpu": "1", "memory": "1Gi"});
        let (files, _) = of(json!({"requests": sure, "limits": sure}));
        assert_eq!(files, [mib(1024), String::new(), String::new(), "0".to_owned()]);
        assert_eq!(of(json!({})).0, [String::new(), String::new(), mib(2048), "0".to_owned()]);
    }
}
