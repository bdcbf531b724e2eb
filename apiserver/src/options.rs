//! The command line: kube-apiserver's flags as kubeadm writes them.

use apimachinery::time::parse_duration;
use clap::Parser;
use component_base::cli::{CommonFlags, Ignored};
use component_base::feature_gates::FeatureGates;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What the server was told.
#[derive(Clone, Debug, Parser)]
#[command(name = "apiserver", about = "The Kubernetes API server", version = crate::KUBERNETES_VERSION)]
pub struct Options {
    #[command(flatten)]
    pub common: CommonFlags,

    /// The address that other members of the cluster reach this server at; the bind address, or that of the default route.
    #[arg(long)]
    pub advertise_address: Option<IpAddr>,
    #[arg(long, default_value = "0.0.0.0")]
    pub bind_address: IpAddr,
    #[arg(long, default_value_t = 6443)]
    pub secure_port: u16,
    /// The serving certificate and key; a self-signed pair in --cert-dir without.
    #[arg(long)]
    pub tls_cert_file: Option<PathBuf>,
    #[arg(long)]
    pub tls_private_key_file: Option<PathBuf>,
    #[arg(long, default_value = "/var/run/kubernetes")]
    pub cert_dir: PathBuf,
    /// CAs whose client certificates are believed.
    #[arg(long)]
    pub client_ca_file: Option<PathBuf>,

    #[arg(long, value_delimiter = ',', required = true)]
    pub etcd_servers: Vec<String>,
    #[arg(long)]
    pub etcd_cafile: Option<PathBuf>,
    #[arg(long)]
    pub etcd_certfile: Option<PathBuf>,
    #[arg(long)]
    pub etcd_keyfile: Option<PathBuf>,
    #[arg(long, default_value = "/registry")]
    pub etcd_prefix: String,
    /// How often old revisions are compacted away; 0 for never.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub etcd_compaction_interval: Duration,
    #[arg(long, default_value = "1h", value_parser = duration)]
    pub event_ttl: Duration,

    /// Features that are off, or on, unless named: `Name=true,…`.
    #[arg(long, default_value = "", value_parser = FeatureGates::parse)]
    pub feature_gates: FeatureGates,
    /// Versions of the API that are off unless named: `group/version[/resource][=true|false]`, `api/all`, `api/beta`.
    #[arg(long, value_delimiter = ',')]
    pub runtime_config: Vec<String>,

    #[arg(long, value_delimiter = ',', default_value = "AlwaysAllow")]
    pub authorization_mode: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    pub enable_admission_plugins: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    pub disable_admission_plugins: Vec<String>,
    /// How long pods stay on a node that is not ready, or cannot be reached, unless they say otherwise.
    #[arg(long, default_value_t = 300)]
    pub default_not_ready_toleration_seconds: i64,
    #[arg(long, default_value_t = 300)]
    pub default_unreachable_toleration_seconds: i64,
    /// The configurations of admission plugins.
    #[arg(long)]
    pub admission_control_config_file: Option<PathBuf>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = clap::ArgAction::Set)]
    pub enable_bootstrap_token_auth: bool,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true, action = clap::ArgAction::Set)]
    pub anonymous_auth: bool,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = clap::ArgAction::Set)]
    pub allow_privileged: bool,

    #[arg(long)]
    pub kubelet_client_certificate: Option<PathBuf>,
    #[arg(long)]
    pub kubelet_client_key: Option<PathBuf>,
    #[arg(long)]
    pub kubelet_certificate_authority: Option<PathBuf>,
    #[arg(long, value_delimiter = ',', default_value = "Hostname,InternalDNS,InternalIP,ExternalDNS,ExternalIP")]
    pub kubelet_preferred_address_types: Vec<String>,

    #[arg(long)]
    pub proxy_client_cert_file: Option<PathBuf>,
    #[arg(long)]
    pub proxy_client_key_file: Option<PathBuf>,
    #[arg(long, value_delimiter = ',')]
    pub requestheader_allowed_names: Vec<String>,
    #[arg(long)]
    pub requestheader_client_ca_file: Option<PathBuf>,
    #[arg(long, value_delimiter = ',')]
    pub requestheader_extra_headers_prefix: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    pub requestheader_group_headers: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    pub requestheader_username_headers: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    pub requestheader_uid_headers: Vec<String>,
    /// Static tokens, one a line: token, user name, uid, and the groups in quotes.
    #[arg(long)]
    pub token_auth_file: Option<PathBuf>,

    /// The first issues tokens, all are accepted.
    #[arg(long, value_delimiter = ',')]
    pub service_account_issuer: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    pub service_account_key_file: Vec<PathBuf>,
    #[arg(long)]
    pub service_account_signing_key_file: Option<PathBuf>,
    #[arg(long, value_delimiter = ',')]
    pub api_audiences: Vec<String>,
    #[arg(long, default_value = "0s", value_parser = duration)]
    pub service_account_max_token_expiration: Duration,
    /// Pods' tokens live for a year where the kubelet asks for an hour, for clients that read them but once.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true, action = clap::ArgAction::Set)]
    pub service_account_extend_token_expiration: bool,
    /// Where the keys of tokens are published; at this server without.
    #[arg(long)]
    pub service_account_jwks_uri: Option<String>,

    #[arg(long, value_delimiter = ',', default_value = "10.0.0.0/24")]
    pub service_cluster_ip_range: Vec<String>,
    #[arg(long, default_value = "30000-32767")]
    pub service_node_port_range: String,

    #[arg(long, default_value_t = 400)]
    pub max_requests_inflight: usize,
    #[arg(long, default_value_t = 200)]
    pub max_mutating_requests_inflight: usize,
    #[arg(long, default_value = "1m", value_parser = duration)]
    pub request_timeout: Duration,
    /// Watches end after a random time of this to twice this, in seconds.
    #[arg(long, default_value_t = 1800)]
    pub min_request_timeout: u64,
    /// How long requests are served on after `/readyz` has begun to fail.
    #[arg(long, default_value = "0s", value_parser = duration)]
    pub shutdown_delay_duration: Duration,
    /// 0 for the default.
    #[arg(long, default_value_t = 0)]
    pub http2_max_streams_per_connection: u32,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true, action = clap::ArgAction::Set)]
    pub profiling: bool,
}

/// Flags of kube-apiserver that are accepted and have no meaning here.
pub const IGNORED: &[Ignored] = &[
    Ignored::Value("audit-log-path"),
    Ignored::Value("audit-log-maxage"),
    Ignored::Value("audit-log-maxbackup"),
    Ignored::Value("audit-log-maxsize"),
    Ignored::Value("audit-policy-file"),
    Ignored::Value("cloud-provider"),
    Ignored::Value("cloud-config"),
    Ignored::Value("cors-allowed-origins"),
    Ignored::Value("default-watch-cache-size"),
    Ignored::Value("delete-collection-workers"),
    Ignored::Bool("enable-aggregator-routing"),
    Ignored::Bool("enable-garbage-collector"),
    Ignored::Bool("enable-priority-and-fairness"),
    Ignored::Value("encryption-provider-config"),
    Ignored::Value("endpoint-reconciler-type"),
    Ignored::Value("etcd-count-metric-poll-period"),
    Ignored::Value("etcd-db-metric-poll-interval"),
    Ignored::Value("etcd-healthcheck-timeout"),
    Ignored::Value("etcd-readycheck-timeout"),
    Ignored::Value("external-hostname"),
    Ignored::Value("goaway-chance"),
    Ignored::Value("kubelet-timeout"),
    Ignored::Value("lease-reuse-duration-seconds"),
    Ignored::Value("livez-grace-period"),
    Ignored::Value("logging-format"),
    Ignored::Value("log-dir"),
    Ignored::Bool("logtostderr"),
    Ignored::Bool("service-account-lookup"),
    Ignored::Value("storage-backend"),
    Ignored::Value("storage-media-type"),
    Ignored::Value("tls-cipher-suites"),
    Ignored::Value("tls-min-version"),
    Ignored::Value("vmodule"),
    Ignored::Bool("watch-cache"),
    Ignored::Value("watch-cache-sizes"),
];

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.to_string())
}

// === impl Options ===

impl Options {
    /// The address that other members of the cluster reach this server at.
    pub fn public_address(&self) -> IpAddr {
        self.advertise_address
            .or_else(|| (!self.bind_address.is_unspecified()).then_some(self.bind_address))
            .or_else(default_route_address)
            .unwrap_or(IpAddr::from([127, 0, 0, 1]))
    }
}

/// The address that the kernel would use towards the world. Nothing is sent.
fn default_route_address() -> Option<IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}
