//! `KubeProxyConfiguration` v1alpha1 as kubeadm writes it, and the flags.
use clap::Parser;
use component_base::cli::{CommonFlags, Ignored};
use serde::Deserialize;
use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

/// Flags of kube-proxy; the file of `--config` wins over them, but for `--hostname-override`.
#[derive(Parser, Clone, Debug)]
#[command(name = "kube-proxy", version, about = "Carries Services to their endpoints on this node")]
pub struct Flags {
    #[command(flatten)]
    pub common: CommonFlags,
    /// A KubeProxyConfiguration file.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// The node's name, if it is not the host's.
    #[arg(long, default_value = "")]
    pub hostname_override: String,
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// nftables.
    #[arg(long)]
    pub proxy_mode: Option<String>,
    /// The pods' ranges, comma-separated.
    #[arg(long)]
    pub cluster_cidr: Option<String>,
    #[arg(long)]
    pub healthz_bind_address: Option<String>,
    #[arg(long)]
    pub metrics_bind_address: Option<String>,
    #[arg(long, value_delimiter = ',')]
    pub nodeport_addresses: Vec<String>,
    /// Remove all rules of kube-proxy and exit.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = clap::ArgAction::Set)]
    pub cleanup: bool,
}

/// Flags of Kubernetes' kube-proxy that mean nothing here.
pub const IGNORED: &[Ignored] = &[
    Ignored::Value("bind-address"),
    Ignored::Bool("bind-address-hard-fail"),
    Ignored::Value("config-sync-period"),
    Ignored::Value("conntrack-max-per-core"),
    Ignored::Value("conntrack-min"),
    Ignored::Value("conntrack-tcp-timeout-close-wait"),
    Ignored::Value("conntrack-tcp-timeout-established"),
    Ignored::Bool("conntrack-tcp-be-liberal"),
    Ignored::Value("conntrack-udp-timeout"),
    Ignored::Value("conntrack-udp-timeout-stream"),
    Ignored::Value("detect-local-mode"),
    Ignored::Value("feature-gates"),
    Ignored::Bool("init-only"),
    Ignored::Bool("iptables-localhost-nodeports"),
    Ignored::Value("iptables-masquerade-bit"),
    Ignored::Value("iptables-min-sync-period"),
    Ignored::Value("iptables-sync-period"),
    Ignored::Value("ipvs-exclude-cidrs"),
    Ignored::Value("ipvs-min-sync-period"),
    Ignored::Value("ipvs-scheduler"),
    Ignored::Bool("ipvs-strict-arp"),
    Ignored::Value("ipvs-sync-period"),
    Ignored::Value("kube-api-burst"),
    Ignored::Value("kube-api-content-type"),
    Ignored::Value("kube-api-qps"),
    Ignored::Value("logging-format"),
    Ignored::Bool("masquerade-all"),
    Ignored::Value("oom-score-adj"),
    Ignored::Value("pod-bridge-interface"),
    Ignored::Value("pod-interface-name-prefix"),
    Ignored::Bool("profiling"),
    Ignored::Value("show-hidden-metrics-for-version"),
    Ignored::Value("vmodule"),
    Ignored::Value("write-config-to"),
];

/// What the file holds that is acted upon; all its other fields are known by name, so that a misspelt one is an error.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[allow(dead_code, reason = "fields that are accepted and have no effect")]
pub struct KubeProxyConfiguration {
    pub api_version: String,
    pub kind: String,
    pub bind_address: String,
    bind_address_hard_fail: serde_json::Value,
    pub client_connection: ClientConnection,
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: String,
    config_sync_period: serde_json::Value,
    conntrack: serde_json::Value,
    detect_local: serde_json::Value,
    detect_local_mode: String,
    enable_profiling: serde_json::Value,
    feature_gates: serde_json::Value,
    pub healthz_bind_address: String,
    pub hostname_override: String,
    iptables: serde_json::Value,
    ipvs: serde_json::Value,
    logging: serde_json::Value,
    pub metrics_bind_address: String,
    pub mode: String,
    pub nftables: NftablesConfiguration,
    pub node_port_addresses: Option<Vec<String>>,
    oom_score_adj: serde_json::Value,
    port_range: serde_json::Value,
    show_hidden_metrics_for_version: serde_json::Value,
    winkernel: serde_json::Value,
    windows_run_as_service: serde_json::Value,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[allow(dead_code, reason = "fields that are accepted and have no effect")]
pub struct ClientConnection {
    accept_content_types: serde_json::Value,
    burst: serde_json::Value,
    content_type: serde_json::Value,
    qps: serde_json::Value,
    pub kubeconfig: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NftablesConfiguration {
    pub masquerade_all: bool,
    pub masquerade_bit: Option<u32>,
    pub min_sync_period: Option<String>,
    pub sync_period: Option<String>,
}

/// What kube-proxy runs with.
#[derive(Clone, Debug)]
pub struct Config {
    pub kubeconfig: Option<PathBuf>,
    pub node: String,
    pub cluster_cidrs: Vec<String>,
    pub masquerade_all: bool,
    pub mark: u32,
    /// Changes within this time are applied together.
    pub min_sync_period: Duration,
    /// How often the rules are checked to be there at all.
    pub sync_period: Duration,
    pub node_port_addresses: Vec<String>,
    pub healthz: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
}

/// Kubernetes' is 1 s; a difference costs little here, and clients notice.
const MIN_SYNC_PERIOD: Duration = Duration::from_millis(50);
const SYNC_PERIOD: Duration = Duration::from_secs(30);
const MASQUERADE_BIT: u32 = 14;

impl Config {
    /// From the flags and the file that they name.
    pub fn load(flags: &Flags) -> anyhow::Result<Self> {
        let file = match &flags.config {
            Some(path) => read(path)?,
            None => KubeProxyConfiguration::default(),
        };
        Self::merge(flags, file)
    }

    fn merge(flags: &Flags, file: KubeProxyConfiguration) -> anyhow::Result<Self> {
        let pick = |from_file: &str, flag: &Option<String>| {
            Some(from_file.to_owned()).filter(|s| !s.is_empty()).or_else(|| flag.clone()).unwrap_or_default()
        };
        let mode = pick(&file.mode, &flags.proxy_mode);
        match mode.as_str() {
            "" | "nftables" => {}
            "iptables" | "ipvs" => tracing::warn!(mode, "this mode is not built in; nftables does its work"),
            other => anyhow::bail!("mode: Unsupported value: {other:?}: supported values: \"nftables\""),
        }
        let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let named = [&flags.hostname_override, &file.hostname_override];
        let node = named.into_iter().find(|n| !n.is_empty()).cloned().unwrap_or_else(host);
        let period = |text: &Option<String>, default: Duration| match text.as_deref() {
            None | Some("" | "0s") => Ok(default),
            Some(text) => apimachinery::time::parse_duration(text),
        };
        let bit = file.nftables.masquerade_bit.unwrap_or(MASQUERADE_BIT);
        anyhow::ensure!(bit < 32, "nftables.masqueradeBit: Invalid value: {bit}: must be within the range [0, 31]");
        let cidrs = pick(&file.cluster_cidr, &flags.cluster_cidr);
        let kubeconfig = Some(PathBuf::from(&file.client_connection.kubeconfig)).filter(|p| !p.as_os_str().is_empty());
        Ok(Self {
            kubeconfig: kubeconfig.or_else(|| flags.kubeconfig.clone()),
            node: node.trim().to_lowercase(),
            cluster_cidrs: cidrs.split(',').map(str::trim).filter(|c| !c.is_empty()).map(ToOwned::to_owned).collect(),
            masquerade_all: file.nftables.masquerade_all,
            mark: 1 << bit,
            min_sync_period: period(&file.nftables.min_sync_period, MIN_SYNC_PERIOD)?,
            sync_period: period(&file.nftables.sync_period, SYNC_PERIOD)?,
            node_port_addresses: file.node_port_addresses.unwrap_or_else(|| flags.nodeport_addresses.clone()),
            healthz: address(
                "healthzBindAddress",
                &pick(&file.healthz_bind_address, &flags.healthz_bind_address),
                "0.0.0.0",
                10256,
            )?,
            metrics: address(
                "metricsBindAddress",
                &pick(&file.metrics_bind_address, &flags.metrics_bind_address),
                "127.0.0.1",
                10249,
            )?,
        })
    }
}

fn read(path: &Path) -> anyhow::Result<KubeProxyConfiguration> {
    use anyhow::Context as _;
    let text = std::fs::read_to_string(path).with_context(|| format!("configuration file {}", path.display()))?;
    let file: KubeProxyConfiguration =
        apimachinery::yaml::from_str(&text).with_context(|| format!("configuration file {}", path.display()))?;
    anyhow::ensure!(
        file.api_version == "kubeproxy.config.k8s.io/v1alpha1" && file.kind == "KubeProxyConfiguration",
        "configuration file {}: holds {}, {}; expected kubeproxy.config.k8s.io/v1alpha1, KubeProxyConfiguration",
        path.display(),
        file.api_version,
        file.kind,
    );
    Ok(file)
}

/// `1.2.3.4:5`, `1.2.3.4` with the default port, or nothing for the default.
fn address(field: &str, text: &str, host: &str, port: u16) -> anyhow::Result<Option<SocketAddr>> {
    let text = if text.is_empty() { host } else { text };
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(Some(SocketAddr::new(ip, port)));
    }
    let address = text.parse().map_err(|e| anyhow::anyhow!("{field}: Invalid value: {text:?}: {e}"))?;
    Ok(Some(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(yaml: &str) -> anyhow::Result<Config> {
        let flags = Flags::try_parse_from(["kube-proxy", "--hostname-override=n1"])?;
        Config::merge(&flags, apimachinery::yaml::from_str(yaml)?)
    }

    #[test]
    fn a_file_of_kubeadm_is_read() {
        let config = load(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nbindAddress: 0.0.0.0\nbindAddressHardFail: false\n\
             clientConnection:\n  acceptContentTypes: \"\"\n  burst: 0\n  contentType: \"\"\n  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf\n  qps: 0\n\
             clusterCIDR: 10.244.0.0/16\nconfigSyncPeriod: 0s\nconntrack:\n  maxPerCore: null\ndetectLocal:\n  bridgeInterface: \"\"\ndetectLocalMode: \"\"\n\
             enableProfiling: false\nhealthzBindAddress: \"\"\nhostnameOverride: \"\"\niptables:\n  masqueradeAll: false\nipvs: {}\nlogging: {}\n\
             metricsBindAddress: \"\"\nmode: \"\"\nnftables:\n  masqueradeAll: false\n  masqueradeBit: null\n  minSyncPeriod: 0s\n  syncPeriod: 0s\n\
             nodePortAddresses: null\noomScoreAdj: null\nportRange: \"\"\nshowHiddenMetricsForVersion: \"\"\nwinkernel: {}\n",
        )
        .unwrap();
        assert_eq!(
            (config.node.as_str(), config.mark, config.cluster_cidrs.as_slice()),
            ("n1", 0x4000, ["10.244.0.0/16".to_owned()].as_slice())
        );
        assert_eq!(config.healthz, Some("0.0.0.0:10256".parse().unwrap()));
        assert_eq!(config.metrics, Some("127.0.0.1:10249".parse().unwrap()));
    }

    #[test]
    fn misspelt_and_impossible_settings_are_named() {
        for (yaml, named) in [
            ("clusterCidr: x", "clusterCidr"),
            ("mode: magic", "mode"),
            ("healthzBindAddress: x:1", "healthzBindAddress"),
            ("nftables: {masqueradeBit: 40}", "masqueradeBit"),
        ] {
            let error = format!("{:#}", load(yaml).unwrap_err());
            assert!(error.contains(named), "{error}");
        }
    }
}
