//! `KubeProxyConfiguration` v1alpha1, with Kubernetes' defaults.
use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{collections::BTreeMap, net::IpAddr, path::Path};

pub const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
pub const KIND: &str = "KubeProxyConfiguration";
pub const HEALTHZ_PORT: u16 = 10256;
pub const METRICS_PORT: u16 = 10249;

/// The file. A misspelt field is an error.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct KubeProxyConfiguration {
    pub api_version: String,
    pub kind: String,
    /// Its family is that of the addresses below where they are not given.
    pub bind_address: String,
    pub bind_address_hard_fail: bool,
    pub client_connection: ClientConnection,
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: String,
    /// Informers here see every change and lose none: nothing is done again after this time.
    pub config_sync_period: Option<String>,
    pub conntrack: Conntrack,
    pub detect_local: DetectLocal,
    pub detect_local_mode: String,
    pub enable_profiling: bool,
    pub feature_gates: Option<BTreeMap<String, bool>>,
    pub healthz_bind_address: String,
    pub hostname_override: String,
    pub iptables: RuleSettings,
    pub ipvs: IpvsConfiguration,
    pub logging: Value,
    pub metrics_bind_address: String,
    pub mode: String,
    pub nftables: RuleSettings,
    pub node_port_addresses: Option<Vec<String>>,
    pub oom_score_adj: Option<i32>,
    pub port_range: String,
    pub show_hidden_metrics_for_version: String,
    pub winkernel: Value,
    pub windows_run_as_service: bool,
}

/// But for the kubeconfig, nothing to act upon: three watches are all that is asked of the API server.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ClientConnection {
    pub accept_content_types: String,
    pub burst: i32,
    pub content_type: String,
    pub qps: f64,
    pub kubeconfig: String,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Conntrack {
    pub max_per_core: Option<u64>,
    pub min: Option<u64>,
    pub tcp_be_liberal: bool,
    pub tcp_close_wait_timeout: Option<String>,
    pub tcp_established_timeout: Option<String>,
    pub udp_stream_timeout: Option<String>,
    pub udp_timeout: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DetectLocal {
    pub bridge_interface: String,
    pub interface_name_prefix: String,
}

/// Of the modes iptables and nftables.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RuleSettings {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub localhost_node_ports: Option<bool>,
    pub masquerade_all: bool,
    pub masquerade_bit: Option<u32>,
    pub min_sync_period: Option<String>,
    pub sync_period: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct IpvsConfiguration {
    #[serde(rename = "excludeCIDRs")]
    pub exclude_cidrs: Option<Vec<String>>,
    pub min_sync_period: Option<String>,
    pub scheduler: String,
    #[serde(rename = "strictARP")]
    pub strict_arp: bool,
    pub sync_period: Option<String>,
    pub tcp_fin_timeout: Option<String>,
    pub tcp_timeout: Option<String>,
    pub udp_timeout: Option<String>,
}

pub fn read(path: &Path) -> anyhow::Result<KubeProxyConfiguration> {
    let text = std::fs::read_to_string(path).with_context(|| format!("configuration file {}", path.display()))?;
    let file: KubeProxyConfiguration =
        apimachinery::yaml::from_str(&text).with_context(|| format!("configuration file {}", path.display()))?;
    anyhow::ensure!(
        file.api_version == API_VERSION && file.kind == KIND,
        "configuration file {}: holds {}, {}; expected {API_VERSION}, {KIND}",
        path.display(),
        file.api_version,
        file.kind,
    );
    Ok(file)
}

impl KubeProxyConfiguration {
    /// As `SetDefaults_KubeProxyConfiguration`, but that rules may change 20 times a second, not once: a difference costs little
    /// here, and clients notice.
    pub fn set_defaults(&mut self, [healthz, metrics]: [u16; 2]) {
        let ipv6 = self.bind_address.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6());
        let (all, loopback) = if ipv6 { ("::", "::1") } else { ("0.0.0.0", "127.0.0.1") };
        for (field, default) in [
            (&mut self.api_version, API_VERSION),
            (&mut self.kind, KIND),
            (&mut self.mode, "nftables"),
            (&mut self.bind_address, all),
            (&mut self.healthz_bind_address, all),
            (&mut self.metrics_bind_address, loopback),
            (&mut self.ipvs.scheduler, "rr"),
            (&mut self.detect_local_mode, "ClusterCIDR"),
        ] {
            if field.is_empty() {
                default.clone_into(field);
            }
        }
        for (address, port) in [(&mut self.healthz_bind_address, healthz), (&mut self.metrics_bind_address, metrics)] {
            if let Ok(ip) = address.parse::<IpAddr>() {
                *address = std::net::SocketAddr::new(ip, port).to_string();
            }
        }
        let (rules, min, sync) = ([&mut self.iptables, &mut self.nftables], "50ms", "30s");
        let mut periods = vec![
            (&mut self.ipvs.min_sync_period, min),
            (&mut self.ipvs.sync_period, sync),
            (&mut self.config_sync_period, "15m"),
        ];
        for settings in rules {
            settings.masquerade_bit.get_or_insert(14);
            periods.extend([(&mut settings.min_sync_period, min), (&mut settings.sync_period, sync)]);
        }
        for (field, default) in periods {
            if matches!(field.as_deref(), None | Some("" | "0s")) {
                *field = Some(default.to_owned());
            }
        }
        self.iptables.localhost_node_ports.get_or_insert(true);
        let conntrack = &mut self.conntrack;
        conntrack.max_per_core.get_or_insert(32_768);
        conntrack.min.get_or_insert(131_072);
        conntrack.tcp_established_timeout.get_or_insert_with(|| "24h".to_owned());
        conntrack.tcp_close_wait_timeout.get_or_insert_with(|| "1h".to_owned());
        self.oom_score_adj.get_or_insert(-999);
    }

    /// Settings that have no effect here, in words.
    pub fn without_effect(&self) -> Vec<&'static str> {
        let is_set = |value: &Value| value.as_object().is_some_and(|fields| !fields.is_empty());
        let json =
            self.logging.get("format").and_then(Value::as_str).is_some_and(|format| !matches!(format, "" | "text"));
        [
            (self.enable_profiling, "enableProfiling: there is no /debug/pprof"),
            (self.feature_gates.iter().any(|gates| !gates.is_empty()), "featureGates: there are none"),
            (!self.port_range.is_empty(), "portRange: deprecated, has no effect"),
            (!self.show_hidden_metrics_for_version.is_empty(), "showHiddenMetricsForVersion: none are hidden"),
            (json, "logging.format: logs are text"),
            (is_set(&self.winkernel) || self.windows_run_as_service, "winkernel, windowsRunAsService: this is Linux"),
        ]
        .into_iter()
        .filter_map(|(set, words)| set.then_some(words))
        .collect()
    }
}
