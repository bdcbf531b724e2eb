//! The command line of the kubelet. What a flag shares with a field of `KubeletConfiguration` is an `Option`: given, it
//! wins over the file (`config::load` merges).

use std::path::PathBuf;

use clap::Parser;

/// Flags as kubeadm, systemd units and people write them for Kubernetes' kubelet.
#[derive(Debug, Clone, Default, Parser)]
#[command(name = "kubelet", about = "The Kubernetes node agent")]
pub struct Flags {
    /// File with a KubeletConfiguration (kubelet.config.k8s.io/v1beta1).
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Directory of drop-in KubeletConfiguration files (*.conf), merged over --config in the order of their names.
    #[arg(long)]
    pub config_dir: Option<PathBuf>,
    /// kubeconfig of the node's identity. Without it the kubelet is standalone: static pods only.
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// kubeconfig used once to ask for a client certificate when --kubeconfig does not exist yet.
    #[arg(long)]
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// Where certificates live that the kubelet asks for or makes.
    #[arg(long, default_value = "/var/lib/kubelet/pki")]
    pub cert_dir: PathBuf,
    /// Directory of the kubelet's files (volumes, pod directories).
    #[arg(long, default_value = "/var/lib/kubelet")]
    pub root_dir: PathBuf,
    /// Name of the node instead of the host name.
    #[arg(long)]
    pub hostname_override: Option<String>,
    /// Addresses of the node (one, or one of each family).
    #[arg(long, value_delimiter = ',')]
    pub node_ip: Vec<String>,
    /// Labels (key=value) to register the node with.
    #[arg(long, value_delimiter = ',')]
    pub node_labels: Vec<String>,
    /// Taints (key=value:effect) to register the node with.
    #[arg(long, value_delimiter = ',')]
    pub register_with_taints: Vec<String>,
    /// Whether to register the node with the API server.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub register_node: Option<bool>,
    /// Name of the cloud provider; "external" leaves addresses and the provider ID to its controller.
    #[arg(long, default_value = "")]
    pub cloud_provider: String,
    /// Identifier of the machine at its provider.
    #[arg(long)]
    pub provider_id: Option<String>,
    /// Where the container runtime listens.
    #[arg(long)]
    pub container_runtime_endpoint: Option<String>,
    /// Where the runtime's image service listens, if elsewhere.
    #[arg(long)]
    pub image_service_endpoint: Option<String>,
    /// Directory or file of static pod manifests.
    #[arg(long)]
    pub pod_manifest_path: Option<String>,
    /// Address to serve on.
    #[arg(long)]
    pub address: Option<String>,
    /// Port to serve on (HTTPS).
    #[arg(long)]
    pub port: Option<i32>,
    /// Port of /healthz on localhost.
    #[arg(long)]
    pub healthz_port: Option<i32>,
    /// Address of /healthz.
    #[arg(long)]
    pub healthz_bind_address: Option<String>,
    /// IP addresses of cluster DNS servers.
    #[arg(long, value_delimiter = ',')]
    pub cluster_dns: Vec<String>,
    /// Domain of the cluster.
    #[arg(long)]
    pub cluster_domain: Option<String>,
    /// resolv.conf that pods inherit from.
    #[arg(long)]
    pub resolv_conf: Option<String>,
    /// cgroupfs or systemd.
    #[arg(long)]
    pub cgroup_driver: Option<String>,
    /// cgroup below which pods are kept.
    #[arg(long)]
    pub cgroup_root: Option<String>,
    /// Whether to keep a cgroup per QoS class and pod.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub cgroups_per_qos: Option<bool>,
    /// Most pods that may run here.
    #[arg(long)]
    pub max_pods: Option<i32>,
    /// CIDR of pods in standalone mode.
    #[arg(long)]
    pub pod_cidr: Option<String>,
    /// Whether to refuse to start while swap is on.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub fail_swap_on: Option<bool>,
    /// Resources kept for the system (cpu=100m,memory=100Mi).
    #[arg(long, value_delimiter = ',')]
    pub system_reserved: Vec<String>,
    /// Resources kept for Kubernetes' own daemons.
    #[arg(long, value_delimiter = ',')]
    pub kube_reserved: Vec<String>,
    /// Thresholds at which pods are evicted (memory.available<100Mi).
    #[arg(long, value_delimiter = ',')]
    pub eviction_hard: Vec<String>,
    /// Thresholds (memory.available<1Gi) that may be crossed for a while.
    #[arg(long, value_delimiter = ',')]
    pub eviction_soft: Vec<String>,
    /// For how long (memory.available=1m30s).
    #[arg(long, value_delimiter = ',')]
    pub eviction_soft_grace_period: Vec<String>,
    /// What is to be freed beyond a threshold (imagefs.available=2Gi).
    #[arg(long, value_delimiter = ',')]
    pub eviction_minimum_reclaim: Vec<String>,
    /// Seconds that a pod evicted for a soft threshold may take to end.
    #[arg(long)]
    pub eviction_max_pod_grace_period: Option<i32>,
    /// none, or static: whole processors for guaranteed containers that ask for them.
    #[arg(long)]
    pub cpu_manager_policy: Option<String>,
    /// None or Static.
    #[arg(long)]
    pub memory_manager_policy: Option<String>,
    /// none, best-effort, restricted or single-numa-node.
    #[arg(long)]
    pub topology_manager_policy: Option<String>,
    /// Processors (0-1,4) that are never given to containers alone.
    #[arg(long)]
    pub reserved_cpus: Option<String>,
    /// File with a CredentialProviderConfig: programs that know how to log in to registries.
    #[arg(long)]
    pub image_credential_provider_config: Option<PathBuf>,
    /// Where those programs are.
    #[arg(long)]
    pub image_credential_provider_bin_dir: Option<PathBuf>,
    /// Whether to ask the API for a serving certificate.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub rotate_server_certificates: Option<bool>,
    /// Whether to renew the client certificate when it nears its end.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub rotate_certificates: Option<bool>,
    /// Serving certificate.
    #[arg(long)]
    pub tls_cert_file: Option<PathBuf>,
    /// Key of the serving certificate.
    #[arg(long)]
    pub tls_private_key_file: Option<PathBuf>,
    /// CA whose client certificates are accepted.
    #[arg(long)]
    pub client_ca_file: Option<PathBuf>,
    /// Whether anonymous requests reach authorization.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub anonymous_auth: Option<bool>,
    /// Whether bearer tokens are checked with TokenReview.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub authentication_token_webhook: Option<bool>,
    /// AlwaysAllow or Webhook.
    #[arg(long)]
    pub authorization_mode: Option<String>,
    /// Feature gates (Name=true).
    #[arg(long, value_delimiter = ',')]
    pub feature_gates: Vec<String>,
    /// Run so many kubelets that run nothing, named after this one with a number: nodes for tests of scale.
    #[arg(long, value_name = "NODES")]
    pub hollow: Option<usize>,
    /// Log verbosity.
    #[arg(short = 'v', long = "v", default_value_t = 0)]
    pub verbosity: u8,
}
