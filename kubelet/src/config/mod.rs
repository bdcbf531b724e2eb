//! `KubeletConfiguration` (kubelet.config.k8s.io/v1beta1): defaults, the file, drop-ins, and the flags over them.

mod fields;
pub mod flags;
mod shown;
mod validation;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use apimachinery::quantity::Quantity;
use component_base::auth::Remembered;
use k8s_openapi::api::core::v1::Taint;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::images::pulled::Verification;
use crate::options::Flags;
use crate::runtime::user_ids;
use fields::Fields;

/// Why there is no usable configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("kubelet config file {}: {reason}", .path.display())]
    File { path: PathBuf, reason: String },
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
    /// All that is wrong with what the fields say.
    #[error("failed to validate kubelet configuration, error: {}", together(.0))]
    Faults(Vec<String>),
}

/// The kubelet's settings after file, drop-ins and flags: what the rest of the kubelet reads.
///
/// Serialized it has Kubernetes' names (`shown` adds what is not of this form).
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KubeletConfiguration {
    /// As the files have it.
    #[serde(skip)]
    pub stated: Map<String, Value>,
    pub static_pod_path: Option<PathBuf>,
    pub sync_frequency: Duration,
    pub file_check_frequency: Duration,
    /// Where more static pods come from, with these headers.
    #[serde(rename = "staticPodURL")]
    pub static_pod_url: Option<String>,
    #[serde(rename = "staticPodURLHeader")]
    pub static_pod_url_header: BTreeMap<String, Vec<String>>,
    pub http_check_frequency: Duration,
    pub enable_server: bool,
    pub address: String,
    pub port: u16,
    /// Without authentication; 0: none.
    #[serde(skip_serializing_if = "is_zero")]
    pub read_only_port: u16,
    pub healthz_port: u16,
    pub healthz_bind_address: String,
    pub tls_cert_file: Option<PathBuf>,
    pub tls_private_key_file: Option<PathBuf>,
    /// As `VersionTLS12`. Empty: that.
    pub tls_min_version: String,
    /// Empty: all.
    pub tls_cipher_suites: Vec<String>,
    #[serde(rename = "serverTLSBootstrap")]
    pub server_tls_bootstrap: bool,
    pub rotate_certificates: bool,
    #[serde(skip)]
    pub client_ca_file: Option<PathBuf>,
    #[serde(skip)]
    pub anonymous_auth: bool,
    #[serde(skip)]
    pub webhook_authentication: bool,
    /// How long its answers are believed, and those of the authorization: the three `cache…TTL`.
    #[serde(skip)]
    pub remembered: Remembered,
    /// false: AlwaysAllow.
    #[serde(skip)]
    pub webhook_authorization: bool,
    #[serde(rename = "clusterDNS")]
    pub cluster_dns: Vec<String>,
    pub cluster_domain: String,
    /// Empty: none; the default is /etc/resolv.conf.
    pub resolv_conf: String,
    pub streaming_connection_idle_timeout: Duration,
    pub node_status_update_frequency: Duration,
    pub node_status_report_frequency: Duration,
    pub node_lease_duration_seconds: i32,
    pub cgroup_root: String,
    #[serde(rename = "cgroupsPerQOS")]
    pub cgroups_per_qos: bool,
    /// "cgroupfs" or "systemd".
    pub cgroup_driver: String,
    pub max_pods: i32,
    /// 0: as many as `max_pods`, however few processors there are.
    #[serde(skip_serializing_if = "is_zero")]
    pub pods_per_core: u16,
    #[serde(rename = "podCIDR")]
    pub pod_cidr: String,
    pub pod_pids_limit: i64,
    #[serde(rename = "cpuCFSQuota")]
    pub cpu_cfs_quota: bool,
    #[serde(rename = "cpuCFSQuotaPeriod")]
    pub cpu_cfs_quota_period: Duration,
    pub fail_swap_on: bool,
    /// Not to run where cgroups are of version 1.
    pub fail_cgroup_v1: bool,
    pub oom_score_adj: i32,
    pub max_open_files: u64,
    /// Settings of the kernel that are other than Kubernetes counts on are an error; else they are changed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub protect_kernel_defaults: bool,
    /// 0: any number.
    #[serde(rename = "eventRecordQPS")]
    pub event_record_qps: i32,
    pub event_burst: i32,
    /// `userNamespaces.idsPerPod`
    #[serde(skip)]
    pub ids_per_pod: u32,
    /// `pods`, `system-reserved`, `kube-reserved`: which cgroups are held to what the node has for them.
    pub enforce_node_allocatable: Vec<String>,
    pub system_reserved_cgroup: String,
    pub kube_reserved_cgroup: String,
    /// Below 0: all.
    pub node_status_max_images: i32,
    pub runtime_request_timeout: Duration,
    pub volume_stats_agg_period: Duration,
    #[serde(skip)]
    pub container_log_max_size_bytes: i64,
    pub container_log_max_files: i32,
    pub container_log_monitor_interval: Duration,
    pub pod_logs_dir: PathBuf,
    pub system_reserved: BTreeMap<String, String>,
    pub kube_reserved: BTreeMap<String, String>,
    pub eviction_hard: BTreeMap<String, String>,
    pub eviction_soft: BTreeMap<String, String>,
    pub eviction_soft_grace_period: BTreeMap<String, String>,
    pub eviction_minimum_reclaim: BTreeMap<String, String>,
    pub eviction_max_pod_grace_period: i32,
    pub eviction_pressure_transition_period: Duration,
    pub allowed_unsafe_sysctls: Vec<String>,
    #[serde(rename = "registryPullQPS")]
    pub registry_pull_qps: i32,
    pub registry_burst: i32,
    pub serialize_image_pulls: bool,
    pub max_parallel_image_pulls: Option<i32>,
    #[serde(rename = "imageGCHighThresholdPercent")]
    pub image_gc_high_threshold_percent: i32,
    #[serde(rename = "imageGCLowThresholdPercent")]
    pub image_gc_low_threshold_percent: i32,
    #[serde(rename = "imageMinimumGCAge")]
    pub image_minimum_gc_age: Duration,
    /// Zero: unused images stay, whatever their age.
    #[serde(rename = "imageMaximumGCAge")]
    pub image_maximum_gc_age: Duration,
    #[serde(skip)]
    pub image_pull_verification: Verification,
    pub register_node: bool,
    pub register_with_taints: Vec<Taint>,
    pub seccomp_default: bool,
    pub enable_debugging_handlers: bool,
    /// The host's log files are served.
    pub enable_system_log_handler: bool,
    pub shutdown_grace_period: Duration,
    pub shutdown_grace_period_critical_pods: Duration,
    /// Priorities and seconds, in place of the two above.
    #[serde(skip)]
    pub shutdown_grace_period_by_pod_priority: Vec<(i32, u64)>,
    /// What a cgroup of version 2 may use before it is slowed down: this share of what lies between request and limit. Only with
    /// the feature gate MemoryQoS.
    pub memory_throttling_factor: f64,
    /// `None`, or `TieredReservation`: requests are kept from being taken back.
    pub memory_reservation_policy: String,
    /// `NoSwap` or `LimitedSwap`.
    #[serde(skip)]
    pub swap_behavior: String,
    pub container_runtime_endpoint: String,
    pub image_service_endpoint: String,
    #[serde(rename = "providerID")]
    pub provider_id: String,
    #[serde(skip)]
    pub max_container_restart_period: Duration,
    pub feature_gates: BTreeMap<String, bool>,
    /// `static`: whole processors for containers that ask for them.
    pub cpu_manager_policy: String,
    pub cpu_manager_policy_options: BTreeMap<String, String>,
    pub cpu_manager_reconcile_period: Duration,
    pub memory_manager_policy: String,
    pub topology_manager_policy: String,
    pub topology_manager_scope: String,
    pub topology_manager_policy_options: BTreeMap<String, String>,
    /// As `0-1,4`.
    #[serde(rename = "reservedSystemCPUs")]
    pub reserved_system_cpus: String,
    /// Memory kept back: by node (NUMA), amounts by kind.
    #[serde(skip)]
    pub reserved_memory: BTreeMap<u32, BTreeMap<String, String>>,
}

impl Default for KubeletConfiguration {
    fn default() -> Self {
        Self {
            stated: Map::new(),
            static_pod_path: None,
            sync_frequency: Duration::from_secs(60),
            file_check_frequency: Duration::from_secs(20),
            static_pod_url: None,
            static_pod_url_header: BTreeMap::new(),
            http_check_frequency: Duration::from_secs(20),
            enable_server: true,
            address: "0.0.0.0".into(),
            port: 10250,
            read_only_port: 0,
            healthz_port: 10248,
            healthz_bind_address: "127.0.0.1".into(),
            tls_cert_file: None,
            tls_private_key_file: None,
            tls_min_version: String::new(),
            tls_cipher_suites: Vec::new(),
            server_tls_bootstrap: false,
            rotate_certificates: false,
            client_ca_file: None,
            anonymous_auth: false,
            webhook_authentication: true,
            remembered: Remembered {
                tokens: Duration::from_secs(120),
                allowed: Duration::from_secs(300),
                refused: Duration::from_secs(30),
            },
            webhook_authorization: true,
            cluster_dns: Vec::new(),
            cluster_domain: String::new(),
            resolv_conf: "/etc/resolv.conf".into(),
            streaming_connection_idle_timeout: Duration::from_secs(4 * 3600),
            node_status_update_frequency: Duration::from_secs(10),
            node_status_report_frequency: Duration::from_secs(300),
            node_lease_duration_seconds: 40,
            cgroup_root: String::new(),
            cgroups_per_qos: true,
            cgroup_driver: "cgroupfs".into(),
            max_pods: 110,
            pods_per_core: 0,
            pod_cidr: String::new(),
            pod_pids_limit: -1,
            cpu_cfs_quota: true,
            cpu_cfs_quota_period: Duration::from_millis(100),
            fail_swap_on: true,
            fail_cgroup_v1: true,
            oom_score_adj: -999,
            max_open_files: 1_000_000,
            protect_kernel_defaults: false,
            event_record_qps: 50,
            event_burst: 100,
            ids_per_pod: user_ids::LENGTH,
            enforce_node_allocatable: vec!["pods".into()],
            system_reserved_cgroup: String::new(),
            kube_reserved_cgroup: String::new(),
            node_status_max_images: 50,
            runtime_request_timeout: Duration::from_secs(120),
            volume_stats_agg_period: Duration::from_secs(60),
            container_log_max_size_bytes: 10 << 20,
            container_log_max_files: 5,
            container_log_monitor_interval: Duration::from_secs(10),
            pod_logs_dir: PathBuf::from("/var/log/pods"),
            system_reserved: BTreeMap::new(),
            kube_reserved: BTreeMap::new(),
            eviction_hard: [
                ("memory.available", "100Mi"),
                ("nodefs.available", "10%"),
                ("nodefs.inodesFree", "5%"),
                ("imagefs.available", "15%"),
                ("imagefs.inodesFree", "5%"),
            ]
            .into_iter()
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect(),
            eviction_soft: BTreeMap::new(),
            eviction_soft_grace_period: BTreeMap::new(),
            eviction_minimum_reclaim: BTreeMap::new(),
            eviction_max_pod_grace_period: 0,
            eviction_pressure_transition_period: Duration::from_secs(300),
            allowed_unsafe_sysctls: Vec::new(),
            registry_pull_qps: 5,
            registry_burst: 10,
            serialize_image_pulls: false,
            max_parallel_image_pulls: None,
            image_gc_high_threshold_percent: 85,
            image_gc_low_threshold_percent: 80,
            image_minimum_gc_age: Duration::from_secs(120),
            image_maximum_gc_age: Duration::ZERO,
            image_pull_verification: Verification::default(),
            register_node: true,
            register_with_taints: Vec::new(),
            seccomp_default: false,
            enable_debugging_handlers: true,
            enable_system_log_handler: true,
            shutdown_grace_period: Duration::ZERO,
            shutdown_grace_period_critical_pods: Duration::ZERO,
            shutdown_grace_period_by_pod_priority: Vec::new(),
            memory_throttling_factor: 0.9,
            memory_reservation_policy: "None".into(),
            swap_behavior: "NoSwap".into(),
            container_runtime_endpoint: "unix:///run/containerd/containerd.sock".into(),
            image_service_endpoint: String::new(),
            provider_id: String::new(),
            max_container_restart_period: Duration::from_secs(300),
            feature_gates: BTreeMap::new(),
            cpu_manager_policy: "none".into(),
            cpu_manager_policy_options: BTreeMap::new(),
            cpu_manager_reconcile_period: Duration::from_secs(10),
            memory_manager_policy: "None".into(),
            topology_manager_policy: "none".into(),
            topology_manager_scope: "container".into(),
            topology_manager_policy_options: BTreeMap::new(),
            reserved_system_cpus: String::new(),
            reserved_memory: BTreeMap::new(),
        }
    }
}

/// The configuration of `--config` and `--config-dir`, with the flags over it.
pub fn load(flags: &Flags) -> Result<KubeletConfiguration, ConfigError> {
    let mut merged = Map::new();
    if let Some(path) = &flags.config {
        merged = read_file(path)?;
    }
    if let Some(directory) = &flags.config_dir {
        for path in drop_ins(directory)? {
            fields::merge(&mut merged, read_file(&path)?);
        }
    }
    flags.fields.lay(&mut merged);
    let fields = Fields { config: &merged };
    let mut faults = validation::faulty_numbers(&fields);
    // Numbers that are wrong may be why it cannot be read.
    let config = from_fields(&fields)
        .map_err(|error| if faults.is_empty() { error } else { ConfigError::Faults(faults.clone()) })?;
    faults.extend(validation::faults(&config));
    if !faults.is_empty() {
        return Err(ConfigError::Faults(faults));
    }
    for field in shown::stated_in_vain(&merged) {
        tracing::warn!(field, "accepted, but nothing here goes by it");
    }
    Ok(config)
}

/// How much is to be logged, of `-v` and the files. What is wrong with the files is told when they are loaded.
pub fn verbosity(flags: &Flags) -> u8 {
    let file = flags.config.as_deref().and_then(|path| read_file(path).ok()).unwrap_or_default();
    let stated = Fields { config: &file }.int("logging.verbosity").ok().flatten();
    flags.verbosity.max(stated.and_then(|level| u8::try_from(level).ok()).unwrap_or(0))
}

/// The `*.conf` files of a drop-in directory, in the order of their names.
fn drop_ins(directory: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |error: std::io::Error| ConfigError::File { path: directory.to_owned(), reason: error.to_string() };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "conf") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn read_file(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let failed = |reason: String| ConfigError::File { path: path.to_owned(), reason };
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    parse(&text).map_err(failed)
}

/// One document of the right kind, with known fields only.
fn parse(text: &str) -> Result<Map<String, Value>, String> {
    let mut documents = apimachinery::yaml::documents(text).map_err(|error| error.to_string())?;
    let Some(Value::Object(config)) = documents.pop() else {
        return Err("not a YAML or JSON object".to_owned());
    };
    if !documents.is_empty() {
        return Err("more than one document".to_owned());
    }
    let stated = |name: &str| config.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (version, kind) = (stated("apiVersion"), stated("kind"));
    if (version.as_str(), kind.as_str()) != ("kubelet.config.k8s.io/v1beta1", "KubeletConfiguration") {
        return Err(format!(
            "apiVersion {version:?}, kind {kind:?}: not kubelet.config.k8s.io/v1beta1, KubeletConfiguration"
        ));
    }
    let unknown = fields::unknown(&config);
    if unknown.is_empty() {
        return Ok(config);
    }
    let unknown: Vec<String> = unknown.iter().map(|field| format!("unknown field \"{field}\"")).collect();
    Err(format!("strict decoding error: {}", unknown.join(", ")))
}

/// The settings, with Kubernetes' default for what is absent.
fn from_fields(fields: &Fields<'_>) -> Result<KubeletConfiguration, ConfigError> {
    let default = KubeletConfiguration::default();
    let path = |name: &str| Ok::<_, ConfigError>(fields.string(name)?.map(PathBuf::from));
    let port = |name: &str, default: u16| match fields.int(name)? {
        None => Ok(default),
        Some(number) => u16::try_from(number).map_err(|_| invalid(name, format!("{number} is out of range"))),
    };
    let mode = fields.string("authorization.mode")?.unwrap_or_else(|| "Webhook".to_owned());
    let log_size = match fields.string("containerLogMaxSize")? {
        None => default.container_log_max_size_bytes,
        Some(size) => {
            Quantity::parse(&size).map_err(|error| invalid("containerLogMaxSize", error.to_string()))?.value()
        }
    };
    let eviction_hard = match fields.string_map("evictionHard")? {
        None => default.eviction_hard,
        // What is stated replaces the defaults altogether, unless they are to be merged in.
        Some(stated) if fields.boolean("mergeDefaultEvictionSettings")? == Some(true) => {
            default.eviction_hard.into_iter().chain(stated).collect()
        }
        Some(stated) => stated,
    };
    Ok(KubeletConfiguration {
        stated: fields.config.clone(),
        static_pod_path: path("staticPodPath")?,
        sync_frequency: fields.duration("syncFrequency")?.unwrap_or(default.sync_frequency),
        file_check_frequency: fields.duration("fileCheckFrequency")?.unwrap_or(default.file_check_frequency),
        static_pod_url: fields.string("staticPodURL")?,
        static_pod_url_header: fields.object("staticPodURLHeader", "map[string][]string")?.unwrap_or_default(),
        http_check_frequency: fields.duration("httpCheckFrequency")?.unwrap_or(default.http_check_frequency),
        enable_server: fields.boolean("enableServer")?.unwrap_or(default.enable_server),
        read_only_port: port("readOnlyPort", default.read_only_port)?,
        pods_per_core: port("podsPerCore", default.pods_per_core)?,
        fail_cgroup_v1: fields.boolean("failCgroupV1")?.unwrap_or(default.fail_cgroup_v1),
        oom_score_adj: fields.int("oomScoreAdj")?.unwrap_or(default.oom_score_adj),
        max_open_files: match fields.long("maxOpenFiles")? {
            None | Some(0) => default.max_open_files,
            Some(number) => u64::try_from(number)
                .map_err(|_| invalid("maxOpenFiles", format!("{number} must not be a negative number")))?,
        },
        protect_kernel_defaults: fields.boolean("protectKernelDefaults")?.unwrap_or(default.protect_kernel_defaults),
        event_record_qps: fields.int("eventRecordQPS")?.unwrap_or(default.event_record_qps),
        event_burst: match fields.int("eventBurst")? {
            None | Some(0) => default.event_burst,
            Some(number) => number,
        },
        ids_per_pod: match fields.long("userNamespaces.idsPerPod")? {
            None => default.ids_per_pod,
            Some(number) => u32::try_from(number)
                .ok()
                .filter(|number| *number > 0 && number.is_multiple_of(user_ids::LENGTH))
                .ok_or_else(|| {
                    invalid("userNamespaces.idsPerPod", format!("{number} must be a multiple of {}", user_ids::LENGTH))
                })?,
        },
        tls_min_version: fields.string("tlsMinVersion")?.unwrap_or_default(),
        tls_cipher_suites: fields.strings("tlsCipherSuites")?.unwrap_or_default(),
        enforce_node_allocatable: fields.strings("enforceNodeAllocatable")?.unwrap_or(default.enforce_node_allocatable),
        system_reserved_cgroup: fields.string("systemReservedCgroup")?.unwrap_or_default(),
        kube_reserved_cgroup: fields.string("kubeReservedCgroup")?.unwrap_or_default(),
        node_status_max_images: fields.int("nodeStatusMaxImages")?.unwrap_or(default.node_status_max_images),
        runtime_request_timeout: fields.duration("runtimeRequestTimeout")?.unwrap_or(default.runtime_request_timeout),
        volume_stats_agg_period: fields.duration("volumeStatsAggPeriod")?.unwrap_or(default.volume_stats_agg_period),
        address: fields.string("address")?.unwrap_or(default.address),
        port: match port("port", default.port)? {
            0 => default.port,
            port => port,
        },
        healthz_port: port("healthzPort", default.healthz_port)?,
        healthz_bind_address: fields.string("healthzBindAddress")?.unwrap_or(default.healthz_bind_address),
        tls_cert_file: path("tlsCertFile")?,
        tls_private_key_file: path("tlsPrivateKeyFile")?,
        server_tls_bootstrap: fields.boolean("serverTLSBootstrap")?.unwrap_or(default.server_tls_bootstrap),
        rotate_certificates: fields.boolean("rotateCertificates")?.unwrap_or(default.rotate_certificates),
        client_ca_file: path("authentication.x509.clientCAFile")?,
        anonymous_auth: fields.boolean("authentication.anonymous.enabled")?.unwrap_or(default.anonymous_auth),
        webhook_authentication: fields
            .boolean("authentication.webhook.enabled")?
            .unwrap_or(default.webhook_authentication),
        remembered: Remembered {
            tokens: fields.duration("authentication.webhook.cacheTTL")?.unwrap_or(default.remembered.tokens),
            allowed: fields.duration("authorization.webhook.cacheAuthorizedTTL")?.unwrap_or(default.remembered.allowed),
            refused: fields
                .duration("authorization.webhook.cacheUnauthorizedTTL")?
                .unwrap_or(default.remembered.refused),
        },
        webhook_authorization: is_webhook(&mode)?,
        cluster_dns: fields.strings("clusterDNS")?.unwrap_or_default(),
        cluster_domain: fields.string("clusterDomain")?.unwrap_or_default(),
        // Stated as empty it means "none"; absent, the host's.
        resolv_conf: match fields.config.get("resolvConf").and_then(Value::as_str) {
            Some("") => String::new(),
            _ => fields.string("resolvConf")?.unwrap_or(default.resolv_conf),
        },
        streaming_connection_idle_timeout: fields
            .duration("streamingConnectionIdleTimeout")?
            .unwrap_or(default.streaming_connection_idle_timeout),
        node_status_update_frequency: fields
            .duration("nodeStatusUpdateFrequency")?
            .unwrap_or(default.node_status_update_frequency),
        // Where only the update frequency is stated, the report follows it. As `SetDefaults_KubeletConfiguration`.
        node_status_report_frequency: match fields.duration("nodeStatusReportFrequency")? {
            Some(stated) => stated,
            None => fields.duration("nodeStatusUpdateFrequency")?.unwrap_or(default.node_status_report_frequency),
        },
        node_lease_duration_seconds: positive(
            fields.int("nodeLeaseDurationSeconds")?,
            default.node_lease_duration_seconds,
        ),
        cgroup_root: fields.string("cgroupRoot")?.unwrap_or_default(),
        cgroups_per_qos: fields.boolean("cgroupsPerQOS")?.unwrap_or(default.cgroups_per_qos),
        cgroup_driver: fields.string("cgroupDriver")?.unwrap_or(default.cgroup_driver),
        max_pods: positive(fields.int("maxPods")?, default.max_pods),
        pod_cidr: fields.string("podCIDR")?.unwrap_or_default(),
        pod_pids_limit: fields.long("podPidsLimit")?.filter(|limit| *limit > 0).unwrap_or(default.pod_pids_limit),
        cpu_cfs_quota: fields.boolean("cpuCFSQuota")?.unwrap_or(default.cpu_cfs_quota),
        cpu_cfs_quota_period: fields.duration("cpuCFSQuotaPeriod")?.unwrap_or(default.cpu_cfs_quota_period),
        fail_swap_on: fields.boolean("failSwapOn")?.unwrap_or(default.fail_swap_on),
        container_log_max_size_bytes: log_size,
        container_log_max_files: positive(fields.int("containerLogMaxFiles")?, default.container_log_max_files),
        container_log_monitor_interval: fields
            .duration("containerLogMonitorInterval")?
            .unwrap_or(default.container_log_monitor_interval),
        pod_logs_dir: path("podLogsDir")?.unwrap_or(default.pod_logs_dir),
        system_reserved: fields.string_map("systemReserved")?.unwrap_or_default(),
        kube_reserved: fields.string_map("kubeReserved")?.unwrap_or_default(),
        eviction_hard,
        eviction_soft: fields.string_map("evictionSoft")?.unwrap_or_default(),
        eviction_soft_grace_period: fields.string_map("evictionSoftGracePeriod")?.unwrap_or_default(),
        eviction_minimum_reclaim: fields.string_map("evictionMinimumReclaim")?.unwrap_or_default(),
        eviction_max_pod_grace_period: fields.int("evictionMaxPodGracePeriod")?.unwrap_or_default(),
        eviction_pressure_transition_period: fields
            .duration("evictionPressureTransitionPeriod")?
            .unwrap_or(default.eviction_pressure_transition_period),
        allowed_unsafe_sysctls: fields.strings("allowedUnsafeSysctls")?.unwrap_or_default(),
        registry_pull_qps: fields.int("registryPullQPS")?.unwrap_or(default.registry_pull_qps),
        registry_burst: positive(fields.int("registryBurst")?, default.registry_burst),
        // Several at a time, unless otherwise stated: a slow registry holds up nothing of others.
        serialize_image_pulls: match fields.boolean("serializeImagePulls")? {
            Some(stated) => stated,
            None => fields.int("maxParallelImagePulls")?.is_some_and(|pulls| pulls < 2),
        },
        max_parallel_image_pulls: fields.int("maxParallelImagePulls")?,
        image_gc_high_threshold_percent: fields
            .int("imageGCHighThresholdPercent")?
            .unwrap_or(default.image_gc_high_threshold_percent),
        image_gc_low_threshold_percent: fields
            .int("imageGCLowThresholdPercent")?
            .unwrap_or(default.image_gc_low_threshold_percent),
        image_minimum_gc_age: fields.duration("imageMinimumGCAge")?.unwrap_or(default.image_minimum_gc_age),
        image_maximum_gc_age: fields.duration("imageMaximumGCAge")?.unwrap_or_default(),
        image_pull_verification: verification(fields)?,
        register_node: fields.boolean("registerNode")?.unwrap_or(default.register_node),
        register_with_taints: fields.object("registerWithTaints", "[]v1.Taint")?.unwrap_or_default(),
        seccomp_default: fields.boolean("seccompDefault")?.unwrap_or(default.seccomp_default),
        enable_system_log_handler: fields
            .boolean("enableSystemLogHandler")?
            .unwrap_or(default.enable_system_log_handler),
        enable_debugging_handlers: fields
            .boolean("enableDebuggingHandlers")?
            .unwrap_or(default.enable_debugging_handlers),
        shutdown_grace_period: fields.duration("shutdownGracePeriod")?.unwrap_or(default.shutdown_grace_period),
        shutdown_grace_period_critical_pods: fields.duration("shutdownGracePeriodCriticalPods")?.unwrap_or_default(),
        shutdown_grace_period_by_pod_priority: fields
            .object::<Vec<ShutdownGroup>>("shutdownGracePeriodByPodPriority", "[]ShutdownGracePeriodByPodPriority")?
            .unwrap_or_default()
            .into_iter()
            .map(|group| (group.priority, group.shutdown_grace_period_seconds))
            .collect(),
        memory_throttling_factor: fields
            .object("memoryThrottlingFactor", "float64")?
            .unwrap_or(default.memory_throttling_factor),
        memory_reservation_policy: fields
            .string("memoryReservationPolicy")?
            .unwrap_or(default.memory_reservation_policy),
        swap_behavior: fields.string("memorySwap.swapBehavior")?.unwrap_or(default.swap_behavior),
        container_runtime_endpoint: fields
            .string("containerRuntimeEndpoint")?
            .unwrap_or(default.container_runtime_endpoint),
        image_service_endpoint: fields.string("imageServiceEndpoint")?.unwrap_or_default(),
        provider_id: fields.string("providerID")?.unwrap_or_default(),
        max_container_restart_period: fields
            .duration("crashLoopBackOff.maxContainerRestartPeriod")?
            .unwrap_or(default.max_container_restart_period),
        feature_gates: fields.bool_map("featureGates")?.unwrap_or_default(),
        cpu_manager_policy: fields.string("cpuManagerPolicy")?.unwrap_or(default.cpu_manager_policy),
        cpu_manager_policy_options: fields.string_map("cpuManagerPolicyOptions")?.unwrap_or_default(),
        cpu_manager_reconcile_period: fields
            .duration("cpuManagerReconcilePeriod")?
            .unwrap_or(default.cpu_manager_reconcile_period),
        memory_manager_policy: fields.string("memoryManagerPolicy")?.unwrap_or(default.memory_manager_policy),
        topology_manager_policy: fields.string("topologyManagerPolicy")?.unwrap_or(default.topology_manager_policy),
        topology_manager_scope: fields.string("topologyManagerScope")?.unwrap_or(default.topology_manager_scope),
        topology_manager_policy_options: fields.string_map("topologyManagerPolicyOptions")?.unwrap_or_default(),
        reserved_system_cpus: fields.string("reservedSystemCPUs")?.unwrap_or_default(),
        reserved_memory: fields
            .object::<Vec<MemoryReservation>>("reservedMemory", "[]MemoryReservation")?
            .unwrap_or_default()
            .into_iter()
            .map(|r| (r.numa_node, r.limits))
            .collect(),
    })
}

/// `shutdownGracePeriodByPodPriority`: how long pods from a priority on may take.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct ShutdownGroup {
    priority: i32,
    shutdown_grace_period_seconds: u64,
}

/// `reservedMemory`: what of a node's memory is kept back.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct MemoryReservation {
    numa_node: u32,
    limits: BTreeMap<String, String>,
}

fn verification(fields: &Fields<'_>) -> Result<Verification, ConfigError> {
    const POLICY: &str = "imagePullCredentialsVerificationPolicy";
    let policy = fields.string(POLICY)?.unwrap_or_default();
    let allowed = fields.strings("preloadedImagesVerificationAllowlist")?.unwrap_or_default();
    Ok(Verification::parse(&policy, allowed).unwrap_or_default())
}

/// As several errors are told as one.
fn together(faults: &[String]) -> String {
    match faults {
        [one] => one.clone(),
        many => format!("[{}]", many.join(", ")),
    }
}

fn is_webhook(mode: &str) -> Result<bool, ConfigError> {
    match mode {
        "Webhook" => Ok(true),
        "AlwaysAllow" => Ok(false),
        other => Err(invalid("authorization.mode", format!("{other:?} is neither Webhook nor AlwaysAllow"))),
    }
}

fn is_zero(number: &u16) -> bool {
    *number == 0
}

impl KubeletConfiguration {
    /// Whether `enforceNodeAllocatable` names this.
    pub fn enforces(&self, level: &str) -> bool {
        self.enforce_node_allocatable.iter().any(|named| named == level)
    }
}

fn positive(number: Option<i32>, default: i32) -> i32 {
    number.filter(|number| *number > 0).unwrap_or(default)
}

fn invalid(field: &str, reason: String) -> ConfigError {
    ConfigError::Invalid { field: field.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";
    const KUBEADM: &str = "authentication:
  anonymous: {enabled: false}
  webhook: {cacheTTL: 0s, enabled: true}
  x509: {clientCAFile: /etc/kubernetes/pki/ca.crt}
authorization:
  mode: Webhook
  webhook: {cacheAuthorizedTTL: 0s, cacheUnauthorizedTTL: 0s}
cgroupDriver: systemd
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
containerRuntimeEndpoint: \"\"
cpuManagerReconcilePeriod: 0s
crashLoopBackOff: {}
evictionPressureTransitionPeriod: 0s
fileCheckFrequency: 0s
healthzBindAddress: 127.0.0.1
healthzPort: 10248
httpCheckFrequency: 0s
imageMaximumGCAge: 0s
imageMinimumGCAge: 0s
logging:
  flushFrequency: 0
  options: {json: {infoBufferSize: \"0\"}, text: {infoBufferSize: \"0\"}}
  verbosity: 0
memorySwap: {}
nodeStatusReportFrequency: 0s
nodeStatusUpdateFrequency: 0s
resolvConf: /run/systemd/resolve/resolv.conf
rotateCertificates: true
runtimeRequestTimeout: 0s
shutdownGracePeriod: 0s
shutdownGracePeriodCriticalPods: 0s
staticPodPath: /etc/kubernetes/manifests
streamingConnectionIdleTimeout: 0s
syncFrequency: 0s
volumeStatsAggPeriod: 0s
";

    fn load_text(text: &str, flags: Flags) -> Result<KubeletConfiguration, ConfigError> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("config.yaml");
        std::fs::write(&path, text).expect("a file");
        load(&Flags { config: Some(path), ..flags })
    }

    #[test]
    fn what_kubeadm_writes_is_understood() {
        let config = load_text(&format!("{HEAD}{KUBEADM}"), Flags::default()).expect("a configuration");
        let want = KubeletConfiguration {
            stated: config.stated.clone(),
            cgroup_driver: "systemd".into(),
            client_ca_file: Some("/etc/kubernetes/pki/ca.crt".into()),
            cluster_dns: vec!["10.96.0.10".into()],
            cluster_domain: "cluster.local".into(),
            resolv_conf: "/run/systemd/resolve/resolv.conf".into(),
            rotate_certificates: true,
            static_pod_path: Some("/etc/kubernetes/manifests".into()),
            ..Default::default()
        };
        assert_eq!(config, want);
    }

    #[test]
    fn unknown_fields_and_wrong_types_are_named() {
        let cases = [
            (
                "maxPodz: 5\nauthentication: {x509: {ca: x}}",
                "unknown field \"authentication.x509.ca\", unknown field \"maxPodz\"",
            ),
            (
                "maxPods: many",
                "cannot unmarshal string into Go struct field KubeletConfiguration.maxPods of type int32",
            ),
            ("syncFrequency: soon", "syncFrequency"),
            ("port: 70000", "port (--port) 70000 must be between 1 and 65535, inclusive"),
            ("cgroupDriver: runc", "neither cgroupfs nor systemd"),
            ("authorization: {mode: Maybe}", "authorization.mode"),
            ("imageGCHighThresholdPercent: 70\nimageGCLowThresholdPercent: 80", "must be less than"),
            ("clusterDNS: [dns]", "is not an IP address"),
            ("systemReserved: {cpu: lots}", "is not a quantity"),
            ("evictionHard: {memory.available: much}", "is neither a quantity nor a percentage"),
            (
                "topologyManagerPolicy: somehow",
                "(--topology-manager-policy) \"somehow\" must be one of: [\"none\" \"best-effort\"",
            ),
            ("topologyManagerScope: machine", "\"machine\" must be one of: \"container\", or \"pod\""),
            ("topologyManagerPolicyOptions: {be-quick: \"true\"}", "unknown Topology Manager Policy option"),
            ("cpuManagerPolicyOptions: {align-by-socket: \"true\"}", "not enabled"),
            ("cpuManagerPolicyOptions: {full-pcpus-only: maybe}", "bad value for option"),
            ("tlsMinVersion: VersionTLS99", "unknown tls version"),
            ("tlsCipherSuites: [TLS_NULL]", "Cipher suite TLS_NULL not supported or doesn't exist"),
            ("eventRecordQPS: -1", "eventRecordQPS (--event-qps) -1 must not be a negative number"),
            ("maxOpenFiles: -1", "must not be a negative number"),
            ("userNamespaces: {idsPerPod: 1000}", "must be a multiple of 65536"),
            ("oomScoreAdj: -1001", "oomScoreAdj (--oom-score-adj) -1001 must be between -1000 and 1000, inclusive"),
            ("nodeLeaseDurationSeconds: -1", "nodeLeaseDurationSeconds must be greater than 0"),
            ("maxPods: -2", "maxPods (--max-pods) -2 must not be a negative number"),
            ("iptablesMasqueradeBit: 40", "must be between 0 and 31, inclusive"),
            ("containerLogMaxFiles: 1", "containerLogMaxFiles must be greater than 1"),
            ("containerLogMonitorInterval: 1s", "must be a positive time duration greater than or equal to 3s"),
            ("podLogsDir: logs", "pod logs path \"logs\" must be absolute path"),
            ("podLogsDir: /var/../logs", "pod logs path \"/var/../logs\" must be normalized"),
            ("hairpinMode: mirror", "Valid options are \"none\", \"hairpin-veth\" or \"promiscuous-bridge\""),
            ("shutdownGracePeriod: 500ms", "shutdownGracePeriod 500ms must be either zero or otherwise >= 1 sec"),
            (
                "shutdownGracePeriodCriticalPods: 10s",
                "shutdownGracePeriodCriticalPods 10s must be <= shutdownGracePeriod 0s",
            ),
            ("memorySwap: {swapBehavior: Lots}", "must be one of: \"\", \"LimitedSwap\" or \"NoSwap\""),
            (
                "crashLoopBackOff: {maxContainerRestartPeriod: 10m}",
                "(got: 600 seconds) must be set between 1s and 300s",
            ),
            ("cpuCFSQuotaPeriod: 2s", "(--cpu-cfs-quota-period) 2s must be between 1ms and 1sec, inclusive"),
            (
                "enforceNodeAllocatable: [pods, none]",
                "may not contain additional enforcements when \"none\" is specified",
            ),
            ("cgroupsPerQOS: false", "must be set to true when \"pods\" contained in enforceNodeAllocatable"),
            ("registerWithTaints: [{key: a, effect: Never}]", "invalid taint: a=:Never"),
            ("imageMaximumGCAge: 1m", "imageMaximumGCAge 1m0s must be greater than imageMinimumGCAge 2m0s"),
            (
                "maxPods: -1\nhairpinMode: mirror\ncgroupDriver: runc",
                "[invalid configuration: maxPods (--max-pods) -1 must not be a negative number, ",
            ),
            ("podsPerCore: -1", "must not be a negative number"),
            (
                "enforceNodeAllocatable: [pods, kube-reserved]",
                "kubeReservedCgroup (--kube-reserved-cgroup) must be specified when",
            ),
            ("enforceNodeAllocatable: [kube-reserved, kube-reserved-compressible]", "cannot be specified together"),
            (
                "evictionSoft: {memory.available: 1Gi}",
                "grace period must be specified for the soft eviction threshold memory.available",
            ),
        ];
        for (text, want) in cases {
            let error = load_text(&format!("{HEAD}{text}\n"), Flags::default()).expect_err(text).to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
        let other = load_text("apiVersion: v1\nkind: Pod\n", Flags::default()).expect_err("another kind");
        assert!(other.to_string().contains("apiVersion \"v1\", kind \"Pod\""), "{other}");
    }

    #[test]
    fn a_node_without_cgroups_of_pods_enforces_nothing() {
        let text = format!("{HEAD}cgroupsPerQOS: false\nenforceNodeAllocatable: [none]\nhealthzPort: 0\n");
        load_text(&text, Flags::default()).expect("a configuration, as that of hollow nodes");
    }

    #[test]
    fn flags_win_over_drop_ins_over_the_file() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("20.conf"), format!("{HEAD}maxPods: 30\nkubeReserved: {{memory: 1Gi}}\n"))
            .expect("a file");
        std::fs::write(dir.path().join("10.conf"), format!("{HEAD}maxPods: 20\nclusterDomain: b\n")).expect("a file");
        std::fs::write(dir.path().join("note.txt"), "ignored").expect("a file");
        let mut flags = Flags { config_dir: Some(dir.path().to_owned()), ..Flags::default() };
        flags.fields.set("clusterDomain", "c".into());
        let text = format!("{HEAD}maxPods: 10\nkubeReserved: {{cpu: 100m}}\nclusterDomain: a\n");
        let config = load_text(&text, flags).expect("a configuration");
        assert_eq!((config.max_pods, config.cluster_domain.as_str()), (30, "c"));
        assert_eq!(config.kube_reserved.keys().collect::<Vec<_>>(), ["cpu", "memory"]);
    }
}
