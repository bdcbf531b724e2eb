//! What is wrong with a configuration: all of it at once, in Kubernetes' words. Pure. As `ValidateKubeletConfiguration`, and what
//! Kubernetes tells later or elsewhere.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::time::Duration;

use apimachinery::quantity::Quantity;
use apimachinery::time::format_duration;

use super::KubeletConfiguration;
use super::fields::Fields;
use crate::allocation::topology::{self, CpuOptions, Options, Policy};
use crate::eviction::Amount;
use crate::images::pulled::Verification;
use crate::server::tls;

/// Which numbers a field may have, and how that is said. A field that is not stated, or 0 where that means so, is its default.
struct Numbers {
    /// As it is told: with its flag.
    field: &'static str,
    least: i64,
    most: i64,
    zero_is_default: bool,
    must: &'static str,
}

const fn numbers(field: &'static str, (least, most): (i64, i64), zero_is_default: bool, must: &'static str) -> Numbers {
    Numbers { field, least, most, zero_is_default, must }
}

const PORTS: (i64, i64) = (1, 65535);
const PERCENT: (i64, i64) = (0, 100);
const NOT_NEGATIVE: (i64, i64) = (0, i64::MAX);
const MUST_BE_A_PORT: &str = "must be between 1 and 65535, inclusive";
const MUST_NOT_BE_NEGATIVE: &str = "must not be a negative number";
const NUMBERS: [Numbers; 20] = [
    numbers("eventBurst (--event-burst)", NOT_NEGATIVE, true, MUST_NOT_BE_NEGATIVE),
    numbers("eventRecordQPS (--event-qps)", NOT_NEGATIVE, true, MUST_NOT_BE_NEGATIVE),
    numbers("healthzPort (--healthz-port)", PORTS, true, MUST_BE_A_PORT),
    numbers(
        "imageGCHighThresholdPercent (--image-gc-high-threshold)",
        PERCENT,
        false,
        "must be between 0 and 100, inclusive",
    ),
    numbers(
        "imageGCLowThresholdPercent (--image-gc-low-threshold)",
        PERCENT,
        false,
        "must be between 0 and 100, inclusive",
    ),
    numbers("iptablesDropBit (--iptables-drop-bit)", (0, 31), false, "must be between 0 and 31, inclusive"),
    numbers("iptablesMasqueradeBit (--iptables-masquerade-bit)", (0, 31), false, "must be between 0 and 31, inclusive"),
    numbers("kubeAPIBurst (--kube-api-burst)", NOT_NEGATIVE, true, MUST_NOT_BE_NEGATIVE),
    numbers("kubeAPIQPS (--kube-api-qps)", NOT_NEGATIVE, true, MUST_NOT_BE_NEGATIVE),
    numbers("nodeStatusMaxImages (--node-status-max-images)", (-1, i64::MAX), false, "must be -1 or greater"),
    numbers("maxOpenFiles (--max-open-files)", NOT_NEGATIVE, true, MUST_NOT_BE_NEGATIVE),
    numbers("maxPods (--max-pods)", NOT_NEGATIVE, true, MUST_NOT_BE_NEGATIVE),
    numbers("oomScoreAdj (--oom-score-adj)", (-1000, 1000), false, "must be between -1000 and 1000, inclusive"),
    numbers("podsPerCore (--pods-per-core)", NOT_NEGATIVE, true, MUST_NOT_BE_NEGATIVE),
    numbers("port (--port)", PORTS, true, MUST_BE_A_PORT),
    numbers("readOnlyPort (--read-only-port)", (0, 65535), true, "must be between 0 and 65535, inclusive"),
    numbers("registryBurst (--registry-burst)", NOT_NEGATIVE, true, MUST_NOT_BE_NEGATIVE),
    numbers("registryPullQPS (--registry-qps)", NOT_NEGATIVE, true, MUST_NOT_BE_NEGATIVE),
    numbers("maxParallelImagePulls", (1, i64::MAX), false, "must be a positive number"),
    numbers("userNamespaces.idsPerPod", (1, i64::MAX), false, "must be a positive number"),
];

/// What is wrong with numbers as they are stated, before they are read as what they are for.
pub(super) fn faulty_numbers(stated: &Fields<'_>) -> Vec<String> {
    let mut faults = Faults::default();
    let number = |field: &str| {
        let path = field.split(' ').next().unwrap_or(field);
        stated.long(path).ok().flatten()
    };
    for Numbers { field, least, most, zero_is_default, must } in &NUMBERS {
        let Some(number) = number(field).filter(|number| *number != 0 || !zero_is_default) else { continue };
        faults.unless((*least..=*most).contains(&number), || format!("{field} {number} {must}"));
    }
    let (seconds, files) = (number("nodeLeaseDurationSeconds"), number("containerLogMaxFiles"));
    faults.unless(seconds.is_none_or(|n| n >= 0), || "nodeLeaseDurationSeconds must be greater than 0");
    faults.unless(
        number("containerLogMaxWorkers").is_none_or(|n| n >= 1),
        || "containerLogMaxWorkers must be greater than or equal to 1",
    );
    faults.unless(files.is_none_or(|n| n > 1), || "containerLogMaxFiles must be greater than 1");
    faults.0
}

#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn unless<T: Display>(&mut self, fine: bool, fault: impl FnOnce() -> T) {
        if !fine {
            self.0.push(format!("invalid configuration: {}", fault()));
        }
    }

    fn note<T>(&mut self, field: &str, outcome: Result<T, String>) {
        if let Err(reason) = outcome {
            self.0.push(format!("invalid configuration: {field}: {reason}"));
        }
    }
}

/// All that is wrong, of the configuration as it was read.
pub(super) fn faults(config: &KubeletConfiguration) -> Vec<String> {
    let mut faults = Faults::default();
    let stated = Fields { config: &config.stated };
    cgroups(&mut faults, config, &stated);
    images(&mut faults, config, &stated);
    allocation(&mut faults, config);
    shutdown(&mut faults, config);
    eviction(&mut faults, config);
    logs(&mut faults, config);
    memory(&mut faults, config);
    let text = |path: &str| stated.string(path).ok().flatten();
    if let Some(mode) = text("hairpinMode") {
        faults.unless(matches!(mode.as_str(), "none" | "hairpin-veth" | "promiscuous-bridge"), || {
            format!("option {mode:?} specified for hairpinMode (--hairpin-mode). Valid options are \"none\", \"hairpin-veth\" or \"promiscuous-bridge\"")
        });
    }
    let flag = |path: &str| stated.boolean(path).ok().flatten() == Some(true);
    faults.unless(
        !flag("runOnce"),
        || "runOnce (--runOnce) true, Runonce mode has been deprecated and should not be set",
    );
    faults.unless(
        !flag("enableSystemLogQuery") || config.enable_system_log_handler,
        || "enableSystemLogHandler is required for enableSystemLogQuery",
    );
    for taint in &config.register_with_taints {
        let known = matches!(taint.effect.as_str(), "NoSchedule" | "PreferNoSchedule" | "NoExecute");
        if taint.key.is_empty() || !known {
            faults.0.push(format!(
                "invalid taint: {}={}:{}",
                taint.key,
                taint.value.as_deref().unwrap_or_default(),
                taint.effect
            ));
        }
        faults.unless(taint.time_added.is_none(), || "taint.TimeAdded is not nil");
    }
    faults.note("tlsMinVersion", tls::versions(&config.tls_min_version));
    faults.note("tlsCipherSuites", tls::suites(&config.tls_cipher_suites));
    faults.unless(
        config.tls_cert_file.is_some() == config.tls_private_key_file.is_some(),
        || "tlsCertFile and tlsPrivateKeyFile must be given together",
    );
    for address in &config.cluster_dns {
        faults.unless(address.parse::<std::net::IpAddr>().is_ok(), || {
            format!("clusterDNS: {address:?} is not an IP address")
        });
    }
    let restart = config.max_container_restart_period;
    faults.unless((Duration::from_secs(1)..=Duration::from_secs(300)).contains(&restart), || {
        let seconds = restart.as_secs_f64();
        format!("CrashLoopBackOff.MaxContainerRestartPeriod (got: {seconds} seconds) must be set between 1s and 300s")
    });
    faults.0
}

fn cgroups(faults: &mut Faults, config: &KubeletConfiguration, stated: &Fields<'_>) {
    let driver = &config.cgroup_driver;
    faults.unless(matches!(driver.as_str(), "cgroupfs" | "systemd"), || {
        format!("cgroupDriver: {driver:?} is neither cgroupfs nor systemd")
    });
    let of_system = stated.string("systemCgroups").ok().flatten();
    faults.unless(
        of_system.is_none() || !config.cgroup_root.is_empty(),
        || "systemCgroups (--system-cgroups) was specified and cgroupRoot (--cgroup-root) was not specified",
    );
    let period = config.cpu_cfs_quota_period;
    faults.unless((Duration::from_millis(1)..=Duration::from_secs(1)).contains(&period), || {
        let period = format_duration(period);
        format!("cpuCFSQuotaPeriod (--cpu-cfs-quota-period) {period} must be between 1ms and 1sec, inclusive")
    });
    const FIELD: &str = "enforceNodeAllocatable (--enforce-node-allocatable)";
    for kind in ["system-reserved", "kube-reserved"] {
        let compressible = format!("{kind}-compressible");
        faults.unless(!config.enforces(kind) || !config.enforces(&compressible), || {
            format!("both {kind:?} and {compressible:?} cannot be specified together in {FIELD}")
        });
    }
    let mut seen = BTreeSet::new();
    for level in &config.enforce_node_allocatable {
        if !seen.insert(level) {
            faults.unless(false, || format!("duplicated enforcements {level:?} in {FIELD}"));
            continue;
        }
        let reserved = |cgroup: &str, field: &str, kind: &str| {
            let of = format!("when {kind:?} or \"{kind}-compressible\" included in {FIELD}");
            cgroup.is_empty().then(|| format!("{field} (--{kind}-cgroup) must be specified {of}"))
        };
        let fault = match level.as_str() {
            "pods" => None,
            "system-reserved" | "system-reserved-compressible" => {
                reserved(&config.system_reserved_cgroup, "systemReservedCgroup", "system-reserved")
            }
            "kube-reserved" | "kube-reserved-compressible" => {
                reserved(&config.kube_reserved_cgroup, "kubeReservedCgroup", "kube-reserved")
            }
            "none" => {
                faults.unless(config.enforce_node_allocatable.len() == 1, || {
                    format!("{FIELD} may not contain additional enforcements when \"none\" is specified")
                });
                continue;
            }
            _ => {
                let known = r#""pods", "system-reserved", "system-reserved-compressible", "kube-reserved", "kube-reserved-compressible" or "none""#;
                faults.unless(false, || format!("option {level:?} specified for {FIELD}. Valid options are {known}"));
                continue;
            }
        };
        faults.unless(fault.is_none(), || fault.unwrap_or_default());
        faults.unless(config.cgroups_per_qos, || {
            format!("cgroupsPerQOS (--cgroups-per-qos) must be set to true when {level:?} contained in {FIELD}")
        });
    }
    for (field, map) in [("systemReserved", &config.system_reserved), ("kubeReserved", &config.kube_reserved)] {
        for (resource, amount) in map {
            faults.unless(Quantity::parse(amount).is_ok(), || {
                format!("{field}: {resource}: {amount:?} is not a quantity")
            });
        }
    }
}

fn images(faults: &mut Faults, config: &KubeletConfiguration, stated: &Fields<'_>) {
    let (high, low) = (config.image_gc_high_threshold_percent, config.image_gc_low_threshold_percent);
    faults.unless(low < high, || {
        format!("imageGCLowThresholdPercent (--image-gc-low-threshold) {low} must be less than imageGCHighThresholdPercent (--image-gc-high-threshold) {high}")
    });
    let (most, least) = (config.image_maximum_gc_age, config.image_minimum_gc_age);
    faults.unless(most.is_zero() || most > least, || {
        let (most, least) = (format_duration(most), format_duration(least));
        format!("imageMaximumGCAge {most} must be greater than imageMinimumGCAge {least}")
    });
    let serial = config.serialize_image_pulls && config.max_parallel_image_pulls.is_some_and(|pulls| pulls > 1);
    faults.unless(!serial, || {
        "maxParallelImagePulls cannot be larger than 1 unless SerializeImagePulls (--serialize-image-pulls) is set to false"
    });
    const POLICY: &str = "imagePullCredentialsVerificationPolicy";
    let policy = stated.string(POLICY).ok().flatten().unwrap_or_default();
    faults.unless(Verification::parse(&policy, Vec::new()).is_some(), || {
        format!("option {policy:?} specified for {POLICY}. Valid options are \"NeverVerify\", \"NeverVerifyPreloadedImages\", \"NeverVerifyAllowlistedImages\" or \"AlwaysVerify\"")
    });
    let allowed = stated.strings("preloadedImagesVerificationAllowlist").ok().flatten().unwrap_or_default();
    faults.unless(allowed.is_empty() || policy == "NeverVerifyAllowlistedImages", || {
        format!(
            "can't set `preloadedImagesVerificationAllowlist` if `{POLICY}` is not \"NeverVerifyAllowlistedImages\""
        )
    });
}

fn allocation(faults: &mut Faults, config: &KubeletConfiguration) {
    let known = matches!(config.cpu_manager_policy.as_str(), "none" | "static");
    faults.unless(known, || format!("cpuManagerPolicy: unknown policy: {:?}", config.cpu_manager_policy));
    let known = matches!(config.memory_manager_policy.as_str(), "None" | "Static");
    faults.unless(known, || format!("memoryManagerPolicy: unknown policy: {:?}", config.memory_manager_policy));
    let policy = &config.topology_manager_policy;
    faults.unless(Policy::parse(policy).is_some(), || {
        let known = r#"["none" "best-effort" "restricted" "single-numa-node"]"#;
        format!("topologyManagerPolicy (--topology-manager-policy) {policy:?} must be one of: {known}")
    });
    let scope = &config.topology_manager_scope;
    faults.unless(matches!(scope.as_str(), "container" | "pod"), || {
        format!("topologyManagerScope (--topology-manager-scope) {scope:?} must be one of: \"container\", or \"pod\"")
    });
    faults.note("topologyManagerPolicyOptions", Options::of(&config.topology_manager_policy_options));
    faults.note("cpuManagerPolicyOptions", CpuOptions::of(&config.cpu_manager_policy_options));
    let cpus = &config.reserved_system_cpus;
    let with_cgroups = !config.system_reserved_cgroup.is_empty() || !config.kube_reserved_cgroup.is_empty();
    faults.unless(cpus.is_empty() || !with_cgroups, || {
        "can't use reservedSystemCPUs (--reserved-cpus) with systemReservedCgroup (--system-reserved-cgroup) or kubeReservedCgroup (--kube-reserved-cgroup)"
    });
    faults.unless(topology::parse_set(cpus).is_some(), || {
        format!("unable to parse reservedSystemCPUs (--reserved-cpus) {cpus}, error: not a CPU set")
    });
    for (node, limits) in &config.reserved_memory {
        for (resource, amount) in limits {
            faults.unless(resource == "memory" || resource.starts_with("hugepages-"), || {
                format!("the limit type {resource:?} for NUMA node {node} is not supported, only [memory hugepages-<HugePageSize>] is accepted")
            });
            faults.unless(Quantity::parse(amount).is_ok_and(|amount| !amount.is_zero()), || {
                format!("reserved memory may not be zero for NUMA node {node} and resource {resource:?}")
            });
        }
    }
}

fn shutdown(faults: &mut Faults, config: &KubeletConfiguration) {
    let (all, critical) = (config.shutdown_grace_period, config.shutdown_grace_period_critical_pods);
    let shown = format_duration;
    faults.unless(critical <= all, || {
        format!("shutdownGracePeriodCriticalPods {} must be <= shutdownGracePeriod {}", shown(critical), shown(all))
    });
    for (field, period) in [("shutdownGracePeriod", all), ("shutdownGracePeriodCriticalPods", critical)] {
        faults.unless(period.is_zero() || period >= Duration::from_secs(1), || {
            format!("{field} {} must be either zero or otherwise >= 1 sec", shown(period))
        });
    }
    let one_way = config.shutdown_grace_period_by_pod_priority.is_empty() || all.is_zero() && critical.is_zero();
    faults.unless(
        one_way,
        || "Cannot specify both shutdownGracePeriodByPodPriority and shutdownGracePeriod at the same time",
    );
}

fn eviction(faults: &mut Faults, config: &KubeletConfiguration) {
    for (field, map) in [
        ("evictionHard", &config.eviction_hard),
        ("evictionSoft", &config.eviction_soft),
        ("evictionMinimumReclaim", &config.eviction_minimum_reclaim),
    ] {
        for (signal, amount) in map {
            faults.unless(Amount::parse(amount).is_some(), || {
                format!("{field}: {signal}: {amount:?} is neither a quantity nor a percentage")
            });
        }
    }
    for (signal, grace) in &config.eviction_soft_grace_period {
        let parsed = apimachinery::time::parse_duration(grace).map_err(|e| format!("{signal}: {e}"));
        faults.note("evictionSoftGracePeriod", parsed);
    }
    for signal in config.eviction_soft.keys() {
        faults.unless(config.eviction_soft_grace_period.contains_key(signal), || {
            format!("grace period must be specified for the soft eviction threshold {signal}")
        });
    }
}

fn logs(faults: &mut Faults, config: &KubeletConfiguration) {
    faults.unless(
        config.container_log_monitor_interval >= Duration::from_secs(3),
        || "containerLogMonitorInterval must be a positive time duration greater than or equal to 3s",
    );
    let dir = config.pod_logs_dir.display().to_string();
    faults.unless(config.pod_logs_dir.is_absolute(), || format!("pod logs path {dir:?} must be absolute path"));
    let clean: std::path::PathBuf = config.pod_logs_dir.components().collect();
    let has_parent = config.pod_logs_dir.components().any(|part| part == std::path::Component::ParentDir);
    faults.unless(clean.as_os_str() == config.pod_logs_dir.as_os_str() && !has_parent, || {
        format!("pod logs path {dir:?} must be normalized")
    });
    faults.unless(dir.is_ascii(), || format!("pod logs path {dir:?} mut contains ASCII characters only"));
}

fn memory(faults: &mut Faults, config: &KubeletConfiguration) {
    let factor = config.memory_throttling_factor;
    faults.unless(factor > 0.0 && factor <= 1.0, || {
        format!("memoryThrottlingFactor {factor} must be greater than 0 and less than or equal to 1.0")
    });
    let policy = &config.memory_reservation_policy;
    faults.unless(matches!(policy.as_str(), "None" | "TieredReservation"), || {
        format!("option {policy:?} specified for memoryReservationPolicy. Valid options are \"None\" or \"TieredReservation\"")
    });
    let swap = &config.swap_behavior;
    faults.unless(matches!(swap.as_str(), "NoSwap" | "LimitedSwap"), || {
        format!("memorySwap.swapBehavior {swap:?} must be one of: \"\", \"LimitedSwap\" or \"NoSwap\"")
    });
}
