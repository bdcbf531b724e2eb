//! `KubeProxyConfiguration` v1alpha1 as kubeadm writes it, and the flags.
use crate::ipvs::SCHEDULERS;
use clap::Parser;
use component_base::{
    cidr::Cidr,
    cli::{CommonFlags, Ignored},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
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
    /// nftables, iptables, ipvs or userspace.
    #[arg(long)]
    pub proxy_mode: Option<String>,
    /// The pods' ranges, comma-separated.
    #[arg(long)]
    pub cluster_cidr: Option<String>,
    /// How pods' traffic is known: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix.
    #[arg(long, default_value = "")]
    pub detect_local_mode: String,
    #[arg(long, default_value = "")]
    pub pod_bridge_interface: String,
    #[arg(long, default_value = "")]
    pub pod_interface_name_prefix: String,
    #[arg(long)]
    pub healthz_bind_address: Option<String>,
    #[arg(long)]
    pub metrics_bind_address: Option<String>,
    /// Fail where an address cannot be listened on.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = clap::ArgAction::Set)]
    pub bind_address_hard_fail: bool,
    /// Ranges of node addresses that take NodePorts, or "primary".
    #[arg(long, value_delimiter = ',')]
    pub nodeport_addresses: Vec<String>,
    /// The scheduler of the mode ipvs: rr, wrr, lc, sh, …
    #[arg(long, default_value = "")]
    pub ipvs_scheduler: String,
    /// Masquerade all traffic to cluster IPs.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = clap::ArgAction::Set)]
    pub masquerade_all: bool,
    #[arg(long)]
    pub iptables_masquerade_bit: Option<u32>,
    #[arg(long, default_value = "")]
    pub iptables_min_sync_period: String,
    #[arg(long, default_value = "")]
    pub iptables_sync_period: String,
    /// Write the configuration in effect to this file and exit.
    #[arg(long)]
    pub write_config_to: Option<PathBuf>,
    /// Do what needs a privileged process, and exit.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = clap::ArgAction::Set)]
    pub init_only: bool,
    /// Remove all rules of kube-proxy and exit.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = clap::ArgAction::Set)]
    pub cleanup: bool,
}

/// Flags of Kubernetes' kube-proxy that mean nothing here.
pub const IGNORED: &[Ignored] = &[
    Ignored::Value("bind-address"),
    Ignored::Value("config-sync-period"),
    Ignored::Value("conntrack-max-per-core"),
    Ignored::Value("conntrack-min"),
    Ignored::Value("conntrack-tcp-timeout-close-wait"),
    Ignored::Value("conntrack-tcp-timeout-established"),
    Ignored::Bool("conntrack-tcp-be-liberal"),
    Ignored::Value("conntrack-udp-timeout"),
    Ignored::Value("conntrack-udp-timeout-stream"),
    Ignored::Value("feature-gates"),
    Ignored::Bool("iptables-localhost-nodeports"),
    Ignored::Value("ipvs-exclude-cidrs"),
    Ignored::Value("ipvs-min-sync-period"),
    Ignored::Bool("ipvs-strict-arp"),
    Ignored::Value("ipvs-sync-period"),
    Ignored::Value("ipvs-tcp-timeout"),
    Ignored::Value("ipvs-tcpfin-timeout"),
    Ignored::Value("ipvs-udp-timeout"),
    Ignored::Value("kube-api-burst"),
    Ignored::Value("kube-api-content-type"),
    Ignored::Value("kube-api-qps"),
    Ignored::Value("logging-format"),
    Ignored::Value("log-flush-frequency"),
    Ignored::Value("oom-score-adj"),
    Ignored::Bool("profiling"),
    Ignored::Value("show-hidden-metrics-for-version"),
    Ignored::Value("vmodule"),
];

/// The file. A misspelt field is an error; those that mean nothing here are kept as they are.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct KubeProxyConfiguration {
    pub api_version: String,
    pub kind: String,
    pub bind_address: String,
    pub bind_address_hard_fail: bool,
    pub client_connection: ClientConnection,
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: String,
    config_sync_period: Value,
    pub conntrack: Conntrack,
    pub detect_local: DetectLocal,
    pub detect_local_mode: String,
    enable_profiling: Value,
    feature_gates: Value,
    pub healthz_bind_address: String,
    pub hostname_override: String,
    pub iptables: RuleSettings,
    pub ipvs: IpvsSettings,
    logging: Value,
    pub metrics_bind_address: String,
    pub mode: String,
    pub nftables: RuleSettings,
    pub node_port_addresses: Option<Vec<String>>,
    oom_score_adj: Value,
    port_range: Value,
    show_hidden_metrics_for_version: Value,
    winkernel: Value,
    windows_run_as_service: Value,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ClientConnection {
    accept_content_types: Value,
    burst: Value,
    content_type: Value,
    qps: Value,
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
    pub localhost_node_ports: Option<bool>,
    pub masquerade_all: bool,
    pub masquerade_bit: Option<u32>,
    pub min_sync_period: Option<String>,
    pub sync_period: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct IpvsSettings {
    #[serde(rename = "excludeCIDRs")]
    exclude_cidrs: Value,
    pub min_sync_period: Option<String>,
    pub scheduler: String,
    #[serde(rename = "strictARP")]
    strict_arp: Value,
    pub sync_period: Option<String>,
    tcp_fin_timeout: Value,
    tcp_timeout: Value,
    udp_timeout: Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Nftables,
    Iptables,
    Ipvs,
    Userspace,
}

impl Mode {
    const ALL: [(&str, Self); 4] = [
        ("nftables", Self::Nftables),
        ("iptables", Self::Iptables),
        ("ipvs", Self::Ipvs),
        ("userspace", Self::Userspace),
    ];

    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(_, mode)| *mode == self).map_or("", |(name, _)| name)
    }
}

/// The mode and what only it reads.
#[derive(Clone, Debug)]
pub struct ModeSettings {
    pub mode: Mode,
    pub scheduler: String,
}

/// How pods' traffic is known. As `LocalMode`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocalMode {
    ClusterCidr,
    NodeCidr,
    Interface(String),
}

/// What kube-proxy runs with.
#[derive(Clone, Debug)]
pub struct Config {
    pub kubeconfig: Option<PathBuf>,
    pub node: String,
    pub mode: ModeSettings,
    pub detect_local: DetectLocalMode,
    pub cluster_cidrs: Vec<Cidr>,
    pub masquerade_all: bool,
    pub mark: u32,
    /// At least this long is between two changes of the rules.
    pub min_sync_period: Duration,
    /// How often the rules are checked to be there at all.
    pub sync_period: Duration,
    /// Empty with `primary` false: all but loopback.
    pub node_port_addresses: Vec<Cidr>,
    /// NodePorts are at the node's own addresses only.
    pub primary: bool,
    pub localhost_node_ports: bool,
    pub hard_fail: bool,
    pub healthz: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
    /// Kernel settings of connection tracking, by their paths below `/proc/sys`.
    pub sysctls: Vec<(&'static str, u64)>,
    /// The file as it is in effect, for `--write-config-to` and `/configz`.
    pub file: KubeProxyConfiguration,
}

/// Kubernetes' is 1 s; a difference costs little here, and clients notice.
const MIN_SYNC_PERIOD: Duration = Duration::from_millis(50);
const SYNC_PERIOD: Duration = Duration::from_secs(30);
const MASQUERADE_BIT: u32 = 14;
const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";

impl Config {
    /// From the flags and the file that they name.
    pub fn load(flags: &Flags) -> anyhow::Result<Self> {
        let file = match &flags.config {
            Some(path) => read(path)?,
            None => KubeProxyConfiguration::default(),
        };
        Self::merge(flags, file)
    }

    fn merge(flags: &Flags, mut file: KubeProxyConfiguration) -> anyhow::Result<Self> {
        let (by_name, or_flag) =
            (|text: &str| text.to_owned(), |flag: &Option<String>| flag.clone().unwrap_or_default());
        // The file wins where it says something.
        for (field, flag) in [
            (&mut file.api_version, by_name(API_VERSION)),
            (&mut file.kind, by_name(KIND)),
            (&mut file.mode, or_flag(&flags.proxy_mode)),
            (&mut file.cluster_cidr, or_flag(&flags.cluster_cidr)),
            (&mut file.detect_local_mode, flags.detect_local_mode.clone()),
            (&mut file.detect_local.bridge_interface, flags.pod_bridge_interface.clone()),
            (&mut file.detect_local.interface_name_prefix, flags.pod_interface_name_prefix.clone()),
            (&mut file.healthz_bind_address, or_flag(&flags.healthz_bind_address)),
            (&mut file.metrics_bind_address, or_flag(&flags.metrics_bind_address)),
            (&mut file.ipvs.scheduler, flags.ipvs_scheduler.clone()),
        ] {
            if field.is_empty() {
                *field = flag;
            }
        }
        if !flags.hostname_override.is_empty() {
            file.hostname_override.clone_from(&flags.hostname_override);
        }
        let named = if file.mode.is_empty() { "nftables" } else { &file.mode };
        let Some((_, mode)) = Mode::ALL.into_iter().find(|(name, _)| *name == named) else {
            let all = Mode::ALL.map(|(name, _)| format!("{name:?}")).join(", ");
            anyhow::bail!("mode: Unsupported value: {named:?}: supported values: {all}");
        };
        let mut rules = if mode == Mode::Iptables { file.iptables.clone() } else { file.nftables.clone() };
        if mode == Mode::Iptables {
            let text = |flag: &String| Some(flag.clone()).filter(|text| !text.is_empty());
            rules.masquerade_bit = rules.masquerade_bit.or(flags.iptables_masquerade_bit);
            rules.min_sync_period = rules.min_sync_period.or_else(|| text(&flags.iptables_min_sync_period));
            rules.sync_period = rules.sync_period.or_else(|| text(&flags.iptables_sync_period));
        }
        if mode == Mode::Ipvs {
            rules.min_sync_period.clone_from(&file.ipvs.min_sync_period);
            rules.sync_period.clone_from(&file.ipvs.sync_period);
        }
        let scheduler = if file.ipvs.scheduler.is_empty() { "rr".to_owned() } else { file.ipvs.scheduler.clone() };
        anyhow::ensure!(
            SCHEDULERS.contains(&scheduler.as_str()),
            "ipvs.scheduler: Unsupported value: {scheduler:?}: supported values: {}",
            SCHEDULERS.join(", ")
        );
        let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let node = if file.hostname_override.is_empty() { host() } else { file.hostname_override.clone() };
        let period = |text: &Option<String>, default: Duration| match text.as_deref() {
            None | Some("" | "0s") => Ok(default),
            Some(text) => apimachinery::time::parse_duration(text),
        };
        let bit = rules.masquerade_bit.unwrap_or(MASQUERADE_BIT);
        anyhow::ensure!(bit < 32, "{named}.masqueradeBit: Invalid value: {bit}: must be within the range [0, 31]");
        let ranges = |field: &str, texts: &mut dyn Iterator<Item = &str>| -> anyhow::Result<Vec<Cidr>> {
            let texts = texts.map(str::trim).filter(|text| !text.is_empty());
            texts.map(|text| text.parse().map_err(|e| anyhow::anyhow!("{field}: Invalid value: {e}"))).collect()
        };
        let cluster_cidrs = ranges("clusterCIDR", &mut file.cluster_cidr.split(','))?;
        let addresses = file.node_port_addresses.clone().unwrap_or_else(|| flags.nodeport_addresses.clone());
        // As Kubernetes: in the mode nftables a node's own addresses are the default.
        let primary = addresses == ["primary"] || addresses.is_empty() && mode == Mode::Nftables;
        let node_port_addresses =
            if primary { Vec::new() } else { ranges("nodePortAddresses", &mut addresses.iter().map(String::as_str))? };
        let interface = |name: &String, field: &str, suffix: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
            anyhow::ensure!(
                !name.is_empty() && name.chars().all(plain),
                "detectLocal.{field}: Invalid value: {name:?}"
            );
            Ok(DetectLocalMode::Interface(format!("{name}{suffix}")))
        };
        let detect_local = match file.detect_local_mode.as_str() {
            "" | "ClusterCIDR" => DetectLocalMode::ClusterCidr,
            "NodeCIDR" => DetectLocalMode::NodeCidr,
            "BridgeInterface" => interface(&file.detect_local.bridge_interface, "bridgeInterface", "")?,
            "InterfaceNamePrefix" => interface(&file.detect_local.interface_name_prefix, "interfaceNamePrefix", "*")?,
            other => anyhow::bail!("detectLocalMode: Unsupported value: {other:?}"),
        };
        let kubeconfig = Some(PathBuf::from(&file.client_connection.kubeconfig)).filter(|p| !p.as_os_str().is_empty());
        let bound = |field: &str, text: &str, host: &str, port: u16| address(field, text, host, port);
        Ok(Self {
            kubeconfig: kubeconfig.or_else(|| flags.kubeconfig.clone()),
            node: node.trim().to_lowercase(),
            mode: ModeSettings { mode, scheduler },
            detect_local,
            cluster_cidrs,
            masquerade_all: rules.masquerade_all || flags.masquerade_all,
            mark: 1 << bit,
            min_sync_period: period(&rules.min_sync_period, MIN_SYNC_PERIOD)?,
            sync_period: period(&rules.sync_period, SYNC_PERIOD)?,
            node_port_addresses,
            primary,
            localhost_node_ports: mode == Mode::Iptables && rules.localhost_node_ports.unwrap_or(true),
            hard_fail: file.bind_address_hard_fail || flags.bind_address_hard_fail,
            healthz: bound("healthzBindAddress", &file.healthz_bind_address, "0.0.0.0", 10256)?,
            metrics: bound("metricsBindAddress", &file.metrics_bind_address, "127.0.0.1", 10249)?,
            sysctls: sysctls(&file.conntrack, mode)?,
            file,
        })
    }
}

/// As `conntracker`: what is not named has Kubernetes' default; 0 leaves the kernel's.
fn sysctls(conntrack: &Conntrack, mode: Mode) -> anyhow::Result<Vec<(&'static str, u64)>> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    let max = match conntrack.max_per_core.unwrap_or(32_768) {
        0 => 0,
        per_core => (per_core * cores).max(conntrack.min.unwrap_or(131_072)),
    };
    let seconds = |text: &Option<String>, default: u64| match text.as_deref() {
        None | Some("") => Ok(default),
        Some(text) => apimachinery::time::parse_duration(text).map(|duration| duration.as_secs()),
    };
    let all = [
        ("net/netfilter/nf_conntrack_max", max),
        ("net/netfilter/nf_conntrack_tcp_timeout_established", seconds(&conntrack.tcp_established_timeout, 86_400)?),
        ("net/netfilter/nf_conntrack_tcp_timeout_close_wait", seconds(&conntrack.tcp_close_wait_timeout, 3_600)?),
        ("net/netfilter/nf_conntrack_tcp_be_liberal", u64::from(conntrack.tcp_be_liberal)),
        ("net/netfilter/nf_conntrack_udp_timeout", seconds(&conntrack.udp_timeout, 0)?),
        ("net/netfilter/nf_conntrack_udp_timeout_stream", seconds(&conntrack.udp_stream_timeout, 0)?),
        ("net/ipv4/vs/conntrack", u64::from(mode == Mode::Ipvs)),
    ];
    Ok(all.into_iter().filter(|(_, value)| *value != 0).collect())
}

fn read(path: &Path) -> anyhow::Result<KubeProxyConfiguration> {
    use anyhow::Context as _;
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
            ("n1", 0x4000, ["10.244.0.0/16".parse().unwrap()].as_slice())
        );
        assert_eq!(config.healthz, Some("0.0.0.0:10256".parse().unwrap()));
        assert_eq!(config.metrics, Some("127.0.0.1:10249".parse().unwrap()));
    }

    #[test]
    fn each_mode_reads_its_own_section() {
        let sections = "iptables: {masqueradeBit: 3, minSyncPeriod: 3s}\nnftables: {masqueradeBit: 5}\nipvs: {scheduler: lc, minSyncPeriod: 7s}\n";
        for (mode, mark, min_seconds, primary) in
            [("iptables", 8, 3, false), ("nftables", 32, 0, true), ("ipvs", 32, 7, false), ("userspace", 32, 0, false)]
        {
            let config = load(&format!("mode: {mode}\n{sections}")).unwrap();
            let found = (config.mode.mode.as_str(), config.mark, config.min_sync_period.as_secs(), config.primary);
            assert_eq!(found, (mode, mark, min_seconds, primary));
            assert_eq!(config.mode.scheduler, "lc");
        }
        assert!(load("nodePortAddresses: [primary]\nmode: iptables").unwrap().primary);
        let sysctls =
            load("conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 1h, tcpCloseWaitTimeout: 0s}").unwrap().sysctls;
        assert_eq!(sysctls, [("net/netfilter/nf_conntrack_tcp_timeout_established", 3600)]);
    }

    #[test]
    fn misspelt_and_impossible_settings_are_named() {
        for (yaml, named) in [
            ("clusterCidr: x", "clusterCidr"),
            ("mode: magic", "mode"),
            ("healthzBindAddress: x:1", "healthzBindAddress"),
            ("nftables: {masqueradeBit: 40}", "masqueradeBit"),
            ("ipvs: {scheduler: best}", "ipvs.scheduler"),
            ("nodePortAddresses: [10.0.0.0]", "nodePortAddresses"),
            ("detectLocalMode: BridgeInterface", "bridgeInterface"),
        ] {
            let error = format!("{:#}", load(yaml).unwrap_err());
            assert!(error.contains(named), "{error}");
        }
    }
}
