//! What kube-proxy runs with: the flags, and the file that they name, checked.
mod file;
mod validation;

use crate::ipvs::IpvsSettings;
use clap::Parser;
use component_base::{
    cidr::Cidr,
    cli::{CommonFlags, Ignored},
};
use file::{Conntrack, HEALTHZ_PORT, KubeProxyConfiguration, METRICS_PORT};
use std::{net::SocketAddr, path::PathBuf, time::Duration};

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
    /// Of the API server, in place of the kubeconfig's.
    #[arg(long)]
    pub master: Option<String>,
    /// Empty: not served.
    #[arg(long)]
    pub healthz_bind_address: Option<String>,
    /// Empty: not served.
    #[arg(long)]
    pub metrics_bind_address: Option<String>,
    /// Deprecated; 0: not served.
    #[arg(long)]
    pub healthz_port: Option<u16>,
    /// Deprecated; 0: not served.
    #[arg(long)]
    pub metrics_port: Option<u16>,
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
    /// NodePorts answer on loopback too, in the mode iptables.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub iptables_localhost_nodeports: Option<bool>,
    #[arg(long)]
    pub iptables_min_sync_period: Option<String>,
    #[arg(long)]
    pub iptables_sync_period: Option<String>,
    #[arg(long)]
    pub ipvs_min_sync_period: Option<String>,
    #[arg(long)]
    pub ipvs_sync_period: Option<String>,
    /// Ranges in which virtual servers are left alone.
    #[arg(long, value_delimiter = ',')]
    pub ipvs_exclude_cidrs: Vec<String>,
    /// Answer ARP on the link that has the address only, as load balancers of layer 2 want it.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = clap::ArgAction::Set)]
    pub ipvs_strict_arp: bool,
    #[arg(long)]
    pub ipvs_tcp_timeout: Option<String>,
    #[arg(long)]
    pub ipvs_tcpfin_timeout: Option<String>,
    #[arg(long)]
    pub ipvs_udp_timeout: Option<String>,
    #[arg(long)]
    pub conntrack_max_per_core: Option<u64>,
    #[arg(long)]
    pub conntrack_min: Option<u64>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = clap::ArgAction::Set)]
    pub conntrack_tcp_be_liberal: bool,
    #[arg(long)]
    pub conntrack_tcp_timeout_close_wait: Option<String>,
    #[arg(long)]
    pub conntrack_tcp_timeout_established: Option<String>,
    #[arg(long)]
    pub conntrack_udp_timeout: Option<String>,
    #[arg(long)]
    pub conntrack_udp_timeout_stream: Option<String>,
    /// The family of the addresses that are served where they are not given.
    #[arg(long, default_value = "")]
    pub bind_address: String,
    /// How readily the kernel ends this process when memory is short.
    #[arg(long, allow_negative_numbers = true)]
    pub oom_score_adj: Option<i32>,
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
    Ignored::Value("boot-id-file"),
    Ignored::Value("config-sync-period"),
    Ignored::Value("feature-gates"),
    Ignored::Value("kube-api-burst"),
    Ignored::Value("kube-api-content-type"),
    Ignored::Value("kube-api-qps"),
    Ignored::Value("logging-format"),
    Ignored::Value("log-flush-frequency"),
    Ignored::Value("log-json-info-buffer-size"),
    Ignored::Bool("log-json-split-stream"),
    Ignored::Value("log-text-info-buffer-size"),
    Ignored::Bool("log-text-split-stream"),
    Ignored::Value("machine-id-file"),
    Ignored::Bool("profiling"),
    Ignored::Value("show-hidden-metrics-for-version"),
    Ignored::Value("vmodule"),
];

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
    pub ipvs: IpvsSettings,
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
    pub master: Option<String>,
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
    pub drop_invalid: bool,
    pub hard_fail: bool,
    pub healthz: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
    /// Kernel settings of connection tracking, by their paths below `/proc/sys`.
    pub sysctls: Vec<(&'static str, u64)>,
    pub oom_score_adj: i32,
    /// The file as it is in effect, for `--write-config-to` and `/configz`.
    pub file: KubeProxyConfiguration,
}

impl Config {
    /// From the flags and the file that they name.
    pub fn load(flags: &Flags) -> anyhow::Result<Self> {
        let file = match &flags.config {
            Some(path) => file::read(path)?,
            None => KubeProxyConfiguration::default(),
        };
        let mut config = Self::checked(merged(flags, file))?;
        config.master.clone_from(&flags.master);
        Ok(config)
    }

    fn checked(file: KubeProxyConfiguration) -> anyhow::Result<Self> {
        let faults = validation::faults(&file);
        anyhow::ensure!(faults.is_empty(), "{}", apimachinery::status::aggregate(&faults));
        let mode = Mode::ALL.into_iter().find(|(name, _)| *name == file.mode).map_or(Mode::Nftables, |(_, mode)| mode);
        // The mode ipvs reads the section of iptables for what its own does not have.
        let rules = if matches!(mode, Mode::Iptables | Mode::Ipvs) { &file.iptables } else { &file.nftables };
        let (min_sync_period, sync_period) = match mode {
            Mode::Ipvs => (&file.ipvs.min_sync_period, &file.ipvs.sync_period),
            _ => (&rules.min_sync_period, &rules.sync_period),
        };
        let (min_sync_period, sync_period) =
            (duration("minSyncPeriod", min_sync_period)?, duration("syncPeriod", sync_period)?);
        let scheduler = file.ipvs.scheduler.clone();
        let oom_score_adj = file.oom_score_adj.unwrap_or(0);
        let bit = rules.masquerade_bit.unwrap_or(0);
        let seconds = |field: &str, text| duration(field, text).map(|duration| duration.as_secs());
        let ipvs = IpvsSettings {
            scheduler,
            exclude: ranges("ipvs.excludeCIDRs", file.ipvs.exclude_cidrs.iter().flatten().map(String::as_str))?,
            timeouts: [
                seconds("ipvs.tcpTimeout", &file.ipvs.tcp_timeout)?,
                seconds("ipvs.tcpFinTimeout", &file.ipvs.tcp_fin_timeout)?,
                seconds("ipvs.udpTimeout", &file.ipvs.udp_timeout)?,
            ],
        };
        let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let node = if file.hostname_override.is_empty() { host() } else { file.hostname_override.clone() };
        let addresses = file.node_port_addresses.clone().unwrap_or_default();
        // As Kubernetes: in the mode nftables a node's own addresses are the default.
        let primary = addresses == ["primary"] || addresses.is_empty() && mode == Mode::Nftables;
        let node_port_addresses =
            if primary { Vec::new() } else { ranges("nodePortAddresses", addresses.iter().map(String::as_str))? };
        // Where there are addresses of their own for NodePorts, loopback must be among them.
        let on_loopback = |range: &Cidr| range.address.is_loopback();
        let localhost_node_ports = mode == Mode::Iptables
            && rules.localhost_node_ports == Some(true)
            && !primary
            && (node_port_addresses.is_empty() || node_port_addresses.iter().any(on_loopback));
        let kubeconfig = Some(PathBuf::from(&file.client_connection.kubeconfig)).filter(|p| !p.as_os_str().is_empty());
        let cluster_cidrs = ranges("clusterCIDR", file.cluster_cidr.split(','))?;
        Ok(Self {
            master: None,
            kubeconfig,
            node: node.trim().to_lowercase(),
            mode: ModeSettings { mode, ipvs },
            detect_local: detect_local(&file),
            cluster_cidrs,
            masquerade_all: rules.masquerade_all,
            mark: 1 << bit,
            min_sync_period,
            sync_period,
            node_port_addresses,
            primary,
            localhost_node_ports,
            drop_invalid: !file.conntrack.tcp_be_liberal,
            hard_fail: file.bind_address_hard_fail,
            healthz: address("healthzBindAddress", &file.healthz_bind_address)?,
            metrics: address("metricsBindAddress", &file.metrics_bind_address)?,
            sysctls: sysctls(&file.conntrack, mode, file.ipvs.strict_arp, localhost_node_ports)?,
            oom_score_adj,
            file,
        })
    }
}

/// The file, with the flags where it says nothing, and defaults where neither does.
fn merged(flags: &Flags, mut file: KubeProxyConfiguration) -> KubeProxyConfiguration {
    let text = |flag: &Option<String>| flag.clone().unwrap_or_default();
    let path = |flag: &Option<PathBuf>| flag.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
    for (field, flag) in [
        (&mut file.mode, text(&flags.proxy_mode)),
        (&mut file.bind_address, flags.bind_address.clone()),
        (&mut file.cluster_cidr, text(&flags.cluster_cidr)),
        (&mut file.detect_local_mode, flags.detect_local_mode.clone()),
        (&mut file.detect_local.bridge_interface, flags.pod_bridge_interface.clone()),
        (&mut file.detect_local.interface_name_prefix, flags.pod_interface_name_prefix.clone()),
        (&mut file.healthz_bind_address, text(&flags.healthz_bind_address)),
        (&mut file.metrics_bind_address, text(&flags.metrics_bind_address)),
        (&mut file.ipvs.scheduler, flags.ipvs_scheduler.clone()),
        (&mut file.client_connection.kubeconfig, path(&flags.kubeconfig)),
    ] {
        if field.is_empty() {
            *field = flag;
        }
    }
    let (iptables, ipvs, conntrack) = (&mut file.iptables, &mut file.ipvs, &mut file.conntrack);
    for (field, flag) in [
        (&mut iptables.min_sync_period, &flags.iptables_min_sync_period),
        (&mut iptables.sync_period, &flags.iptables_sync_period),
        (&mut ipvs.min_sync_period, &flags.ipvs_min_sync_period),
        (&mut ipvs.sync_period, &flags.ipvs_sync_period),
        (&mut ipvs.tcp_timeout, &flags.ipvs_tcp_timeout),
        (&mut ipvs.tcp_fin_timeout, &flags.ipvs_tcpfin_timeout),
        (&mut ipvs.udp_timeout, &flags.ipvs_udp_timeout),
        (&mut conntrack.tcp_close_wait_timeout, &flags.conntrack_tcp_timeout_close_wait),
        (&mut conntrack.tcp_established_timeout, &flags.conntrack_tcp_timeout_established),
        (&mut conntrack.udp_timeout, &flags.conntrack_udp_timeout),
        (&mut conntrack.udp_stream_timeout, &flags.conntrack_udp_timeout_stream),
    ] {
        *field = field.take().or_else(|| flag.clone());
    }
    conntrack.max_per_core = conntrack.max_per_core.or(flags.conntrack_max_per_core);
    conntrack.min = conntrack.min.or(flags.conntrack_min);
    conntrack.tcp_be_liberal |= flags.conntrack_tcp_be_liberal;
    ipvs.strict_arp |= flags.ipvs_strict_arp;
    iptables.masquerade_bit = iptables.masquerade_bit.or(flags.iptables_masquerade_bit);
    iptables.localhost_node_ports = iptables.localhost_node_ports.or(flags.iptables_localhost_nodeports);
    iptables.masquerade_all |= flags.masquerade_all;
    file.nftables.masquerade_all |= flags.masquerade_all;
    file.bind_address_hard_fail |= flags.bind_address_hard_fail;
    file.oom_score_adj = file.oom_score_adj.or(flags.oom_score_adj);
    for (field, flag) in [
        (&mut file.node_port_addresses, &flags.nodeport_addresses),
        (&mut ipvs.exclude_cidrs, &flags.ipvs_exclude_cidrs),
    ] {
        *field = field.take().or_else(|| (!flag.is_empty()).then(|| flag.clone()));
    }
    if !flags.hostname_override.is_empty() {
        file.hostname_override.clone_from(&flags.hostname_override);
    }
    // Only a flag takes an endpoint away: an empty field of the file is its default.
    let is_off =
        |field: &str, flag: &Option<String>, port| field.is_empty() && (flag.as_deref() == Some("") || port == Some(0));
    let off = [
        is_off(&file.healthz_bind_address, &flags.healthz_bind_address, flags.healthz_port),
        is_off(&file.metrics_bind_address, &flags.metrics_bind_address, flags.metrics_port),
    ];
    let ports = [flags.healthz_port.unwrap_or(HEALTHZ_PORT), flags.metrics_port.unwrap_or(METRICS_PORT)];
    file.set_defaults(ports);
    for (address, _) in
        [&mut file.healthz_bind_address, &mut file.metrics_bind_address].into_iter().zip(off).filter(|(_, off)| *off)
    {
        address.clear();
    }
    file
}

fn detect_local(file: &KubeProxyConfiguration) -> DetectLocalMode {
    match file.detect_local_mode.as_str() {
        "NodeCIDR" => DetectLocalMode::NodeCidr,
        "BridgeInterface" => DetectLocalMode::Interface(file.detect_local.bridge_interface.clone()),
        "InterfaceNamePrefix" => DetectLocalMode::Interface(format!("{}*", file.detect_local.interface_name_prefix)),
        _ => DetectLocalMode::ClusterCidr,
    }
}

fn ranges<'a>(field: &str, texts: impl Iterator<Item = &'a str>) -> anyhow::Result<Vec<Cidr>> {
    let texts = texts.map(str::trim).filter(|text| !text.is_empty());
    texts.map(|text| text.parse().map_err(|e| anyhow::anyhow!("{field}: Invalid value: {e}"))).collect()
}

/// Nothing is zero.
fn duration(field: &str, text: &Option<String>) -> anyhow::Result<Duration> {
    let text = text.as_deref().filter(|text| !text.is_empty()).unwrap_or("0s");
    apimachinery::time::parse_duration(text).map_err(|e| anyhow::anyhow!("{field}: Invalid value: {text:?}: {e}"))
}

/// None where it is not to be served.
fn address(field: &str, text: &str) -> anyhow::Result<Option<SocketAddr>> {
    let parsed = (!text.is_empty()).then(|| text.parse()).transpose();
    parsed.map_err(|e| anyhow::anyhow!("{field}: Invalid value: {text:?}: {e}"))
}

/// As `conntracker` and the set-up of the mode ipvs; 0 leaves the kernel's.
fn sysctls(
    conntrack: &Conntrack,
    mode: Mode,
    strict_arp: bool,
    route_localnet: bool,
) -> anyhow::Result<Vec<(&'static str, u64)>> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    let max = match conntrack.max_per_core.unwrap_or(0) {
        0 => 0,
        per_core => (per_core * cores).max(conntrack.min.unwrap_or(0)),
    };
    let seconds = |field: &str, text| duration(field, text).map(|duration| duration.as_secs());
    let (ipvs, arp) = (u64::from(mode == Mode::Ipvs), u64::from(mode == Mode::Ipvs && strict_arp));
    let all = [
        ("net/netfilter/nf_conntrack_max", max),
        (
            "net/netfilter/nf_conntrack_tcp_timeout_established",
            seconds("conntrack.tcpEstablishedTimeout", &conntrack.tcp_established_timeout)?,
        ),
        (
            "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
            seconds("conntrack.tcpCloseWaitTimeout", &conntrack.tcp_close_wait_timeout)?,
        ),
        ("net/netfilter/nf_conntrack_tcp_be_liberal", u64::from(conntrack.tcp_be_liberal)),
        ("net/netfilter/nf_conntrack_udp_timeout", seconds("conntrack.udpTimeout", &conntrack.udp_timeout)?),
        (
            "net/netfilter/nf_conntrack_udp_timeout_stream",
            seconds("conntrack.udpStreamTimeout", &conntrack.udp_stream_timeout)?,
        ),
        ("net/ipv4/vs/conntrack", ipvs),
        // Connections to servers that are gone end, and clients bound to them are let go.
        ("net/ipv4/vs/expire_nodest_conn", ipvs),
        ("net/ipv4/vs/expire_quiescent_template", ipvs),
        ("net/ipv4/ip_forward", ipvs),
        ("net/ipv4/conf/all/route_localnet", u64::from(route_localnet)),
        ("net/ipv4/conf/all/arp_ignore", arp),
        ("net/ipv4/conf/all/arp_announce", arp * 2),
    ];
    Ok(all.into_iter().filter(|(_, value)| *value != 0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(yaml: &str) -> anyhow::Result<Config> {
        let flags = Flags::try_parse_from(["kube-proxy", "--hostname-override=n1"])?;
        Config::checked(merged(&flags, apimachinery::yaml::from_str(yaml)?))
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
            [("iptables", 8, 3, false), ("nftables", 32, 0, true), ("ipvs", 8, 7, false), ("userspace", 32, 0, false)]
        {
            let config = load(&format!("mode: {mode}\n{sections}")).unwrap();
            let found = (config.mode.mode.as_str(), config.mark, config.min_sync_period.as_secs(), config.primary);
            assert_eq!(found, (mode, mark, min_seconds, primary));
            assert_eq!(config.mode.ipvs.scheduler, "lc");
        }
        assert!(load("nodePortAddresses: [primary]\nmode: iptables").unwrap().primary);
        let sysctls =
            load("conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 1h, tcpCloseWaitTimeout: 0s}").unwrap().sysctls;
        assert_eq!(sysctls, [("net/netfilter/nf_conntrack_tcp_timeout_established", 3600)]);
    }

    #[test]
    fn flags_fill_in_what_the_file_leaves_open_and_the_rest_is_as_in_kubernetes() {
        let flags = Flags::try_parse_from([
            "kube-proxy",
            "--proxy-mode=ipvs",
            "--conntrack-min=7",
            "--ipvs-udp-timeout=9s",
            "--ipvs-strict-arp",
            "--ipvs-exclude-cidrs=192.0.2.0/24",
            "--bind-address=::",
            "--oom-score-adj=-5",
            "--iptables-localhost-nodeports=false",
        ])
        .unwrap();
        let file = apimachinery::yaml::from_str("conntrack: {maxPerCore: 1, min: 5}\nenableProfiling: true").unwrap();
        let config = Config::checked(merged(&flags, file)).unwrap();
        assert_eq!((config.mode.ipvs.timeouts, config.oom_score_adj), ([0, 0, 9], -5));
        assert_eq!(config.file.conntrack.min, Some(5));
        assert_eq!(config.mode.ipvs.exclude, ["192.0.2.0/24".parse().unwrap()]);
        assert!(config.sysctls.contains(&("net/ipv4/conf/all/arp_announce", 2)));
        assert_eq!(config.healthz, Some("[::]:10256".parse().unwrap()));
        assert_eq!(config.file.without_effect(), ["enableProfiling: there is no /debug/pprof"]);
        let shown = serde_json::to_value(&config.file).unwrap();
        for (pointer, expected) in [
            ("/iptables/localhostNodePorts", "false"),
            ("/conntrack/tcpEstablishedTimeout", "\"24h\""),
            ("/ipvs/syncPeriod", "\"30s\""),
            ("/configSyncPeriod", "\"15m\""),
            ("/nftables/masqueradeBit", "14"),
            ("/metricsBindAddress", "\"[::1]:10249\""),
        ] {
            assert_eq!(shown.pointer(pointer).map(ToString::to_string).as_deref(), Some(expected), "{pointer}");
        }
    }

    #[test]
    fn flags_take_endpoints_away() {
        for (flag, expected) in [
            ("--healthz-bind-address=", (None, Some(10249))),
            ("--healthz-port=0", (None, Some(10249))),
            ("--metrics-bind-address=", (Some(10256), None)),
            ("--metrics-port=9", (Some(10256), Some(9))),
            ("--healthz-bind-address=127.0.0.1", (Some(10256), Some(10249))),
        ] {
            let flags = Flags::try_parse_from(["kube-proxy", flag]).unwrap();
            let config = Config::checked(merged(&flags, KubeProxyConfiguration::default())).unwrap();
            assert_eq!((config.healthz.map(|at| at.port()), config.metrics.map(|at| at.port())), expected, "{flag}");
        }
    }

    #[test]
    fn misspelt_and_impossible_settings_are_named() {
        for (yaml, named) in [
            ("clusterCidr: x", "clusterCidr"),
            ("mode: magic", "must be iptables, ipvs, nftables, userspace"),
            ("conntrack: {udpTimeout: soon}", "UDPTimeout"),
            ("bindAddress: here\noomScoreAdj: 2000", "[KubeProxyConfiguration."),
            ("mode: ipvs\nipvs: {scheduler: best}", "KubeProxyIPVSConfiguration.Scheduler"),
        ] {
            let error = format!("{:#}", load(yaml).unwrap_err());
            assert!(error.contains(named), "{error}");
        }
    }
}
