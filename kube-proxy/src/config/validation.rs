//! What is wrong with a `KubeProxyConfiguration`: all of it, under the names that Kubernetes gives the fields. Pure. As `Validate`
//! of the kind.
use super::{Mode, file::KubeProxyConfiguration};
use crate::ipvs::SCHEDULERS;
use apimachinery::status::FieldError;
use component_base::cidr::Cidr;
use serde::Serialize;
use serde_json::json;
use std::net::IpAddr;

/// Collects what is wrong below `KubeProxyConfiguration`.
#[derive(Default)]
struct Faults(Vec<FieldError>);

impl Faults {
    fn add(&mut self, fault: FieldError) {
        self.0.push(FieldError { field: format!("KubeProxyConfiguration.{}", fault.field), ..fault });
    }

    fn invalid(&mut self, field: &str, value: impl Serialize, why: &str) {
        self.add(FieldError::invalid(field, json!(value), why));
    }

    fn unless(&mut self, fine: bool, field: &str, value: impl Serialize, why: &str) {
        if !fine {
            self.invalid(field, value, why);
        }
    }

    /// A duration that may be absent, but not below zero.
    fn duration(&mut self, field: &str, text: Option<&String>) {
        let Some(text) = text.filter(|text| !text.is_empty()) else { return };
        if text.starts_with('-') {
            self.invalid(field, text, "must be greater than or equal to 0");
        } else if let Err(error) = apimachinery::time::parse_duration(text) {
            self.invalid(field, text, &error.to_string());
        }
    }

    fn host_port(&mut self, field: &str, text: &str) {
        let Some((host, port)) = text.rsplit_once(':') else { return self.invalid(field, text, "must be IP:port") };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        self.unless(host.parse::<IpAddr>().is_ok(), field, host, "must be a valid IP");
        self.unless(port.parse::<u16>().is_ok_and(|port| port > 0), field, port, "must be a valid port");
    }
}

/// All that is wrong, in words; of the configuration with its defaults.
pub fn faults(file: &KubeProxyConfiguration) -> Vec<FieldError> {
    const BIT: &str = "must be within the range [0, 31]";
    let mut faults = Faults::default();
    let bit_is_fine = |bit: Option<u32>| bit.is_none_or(|bit| bit < 32);
    let bit = file.iptables.masquerade_bit;
    faults.unless(bit_is_fine(bit), "KubeProxyIPTablesConfiguration.MasqueradeBit", bit.unwrap_or(0), BIT);
    match file.mode.as_str() {
        "ipvs" => ipvs(&mut faults, file),
        "nftables" => {
            let bit = file.nftables.masquerade_bit;
            faults.unless(bit_is_fine(bit), "KubeProxyNFTablesConfiguration.MasqueradeBit", bit.unwrap_or(0), BIT);
        }
        _ => {}
    }
    let conntrack = &file.conntrack;
    for (field, text) in [
        ("TCPEstablishedTimeout", &conntrack.tcp_established_timeout),
        ("TCPCloseWaitTimeout", &conntrack.tcp_close_wait_timeout),
        ("UDPTimeout", &conntrack.udp_timeout),
        ("UDPStreamTimeout", &conntrack.udp_stream_timeout),
    ] {
        let field = format!("KubeProxyLinuxConfiguration.KubeProxyConntrackConfiguration.{field}");
        faults.duration(&field, text.as_ref());
    }
    if let Some(score) = file.oom_score_adj.filter(|score| !(-1000..=1000).contains(score)) {
        faults.invalid("KubeProxyLinuxConfiguration.OOMScoreAdj", score, "must be within the range [-1000, 1000]");
    }
    let mut modes = Mode::ALL.map(|(name, _)| name);
    modes.sort_unstable();
    let known = format!("must be {} or blank (blank means nftables)", modes.join(", "));
    faults.unless(modes.contains(&file.mode.as_str()), "Mode.ProxyMode", &file.mode, &known);
    let burst = file.client_connection.burst;
    faults.unless(burst >= 0, "ClientConnection.Burst", burst, "must be greater than or equal to 0");
    periods(&mut faults, file);
    let address = &file.bind_address;
    let textual = "not a valid textual representation of an IP address";
    faults.unless(address.parse::<IpAddr>().is_ok(), "BindAddress", address, textual);
    for (field, text) in
        [("HealthzBindAddress", &file.healthz_bind_address), ("MetricsBindAddress", &file.metrics_bind_address)]
    {
        // Empty: a flag has taken it away.
        if !text.is_empty() {
            faults.host_port(field, text);
        }
    }
    node_port_addresses(&mut faults, file.node_port_addresses.as_deref().unwrap_or_default());
    detect_local(&mut faults, file);
    faults.0
}

fn ipvs(faults: &mut Faults, file: &KubeProxyConfiguration) {
    let ipvs = &file.ipvs;
    for (field, text) in
        [("TCPTimeout", &ipvs.tcp_timeout), ("TCPFinTimeout", &ipvs.tcp_fin_timeout), ("UDPTimeout", &ipvs.udp_timeout)]
    {
        faults.duration(&format!("KubeProxyIPVSConfiguration.{field}"), text.as_ref());
    }
    let known = format!("must be one of {}", SCHEDULERS.join(", "));
    let is_known = SCHEDULERS.contains(&ipvs.scheduler.as_str());
    faults.unless(is_known, "KubeProxyIPVSConfiguration.Scheduler", &ipvs.scheduler, &known);
    for (index, range) in ipvs.exclude_cidrs.iter().flatten().enumerate() {
        let field = format!("KubeProxyIPVSConfiguration.ExcludeCidrs[{index}]");
        faults.unless(range.parse::<Cidr>().is_ok(), &field, range, "must be a valid CIDR");
    }
}

/// Of the mode in use; it has a section of its own in the file.
fn periods(faults: &mut Faults, file: &KubeProxyConfiguration) {
    let (min, sync) = match file.mode.as_str() {
        "ipvs" => (&file.ipvs.min_sync_period, &file.ipvs.sync_period),
        "iptables" => (&file.iptables.min_sync_period, &file.iptables.sync_period),
        _ => (&file.nftables.min_sync_period, &file.nftables.sync_period),
    };
    for (field, text) in [("ConfigSyncPeriod", &file.config_sync_period), ("SyncPeriod", sync), ("MinSyncPeriod", min)]
    {
        faults.duration(field, text.as_ref());
    }
    let parsed = |text: &Option<String>| text.as_ref().and_then(|text| apimachinery::time::parse_duration(text).ok());
    if parsed(min).zip(parsed(sync)).is_some_and(|(min, sync)| min > sync) {
        let why = "must be greater than or equal to KubeProxyConfiguration.MinSyncPeriod";
        faults.invalid("SyncPeriod", min.as_deref().unwrap_or_default(), why);
    }
}

fn node_port_addresses(faults: &mut Faults, addresses: &[String]) {
    for (index, address) in addresses.iter().enumerate() {
        let field = format!("NodePortAddresses[{index}]");
        if address == "primary" {
            faults.unless(addresses.len() == 1, &field, address, "can't use both 'primary' and CIDRs");
            break;
        }
        faults.unless(address.parse::<Cidr>().is_ok(), &field, address, "must be a valid CIDR");
    }
}

fn detect_local(faults: &mut Faults, file: &KubeProxyConfiguration) {
    let interface = |faults: &mut Faults, field: &str, name: &String| {
        let field = format!("DetectLocalConfiguration.{field}");
        // It becomes part of a rule.
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
        faults.unless(!name.is_empty(), &field, name, "must not be empty");
        faults.unless(name.chars().all(plain), &field, name, "must be the name of an interface");
    };
    match file.detect_local_mode.as_str() {
        "BridgeInterface" => interface(faults, "InterfaceName", &file.detect_local.bridge_interface),
        "InterfaceNamePrefix" => interface(faults, "InterfacePrefix", &file.detect_local.interface_name_prefix),
        "ClusterCIDR" | "NodeCIDR" => {}
        other => faults.add(FieldError::not_supported(
            "DetectLocalMode",
            other,
            &["BridgeInterface", "ClusterCIDR", "InterfaceNamePrefix", "NodeCIDR"],
        )),
    }
    const FIELD: &str = "DetectLocalConfiguration.ClusterCIDRs";
    let ranges: Vec<&str> = file.cluster_cidr.split(',').map(str::trim).filter(|text| !text.is_empty()).collect();
    let mut parsed = Vec::new();
    for (index, text) in ranges.iter().enumerate() {
        match text.parse::<Cidr>() {
            Ok(range) => parsed.push(range.is_ipv6()),
            Err(_) => {
                let why = "must be a valid CIDR block (e.g. 10.100.0.0/16 or fde4:8dba:82e1::/48)";
                faults.invalid(&format!("{FIELD}[{index}]"), text, why);
            }
        }
    }
    let one_of_each = matches!(parsed.as_slice(), [] | [_] | [true, false] | [false, true]);
    let why = "must be a either a single CIDR or dual-stack pair of CIDRs (e.g. [10.100.0.0/16, fde4:8dba:82e1::/48]";
    faults.unless(one_of_each, FIELD, ranges, why);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(yaml: &str) -> Vec<String> {
        let mut file: KubeProxyConfiguration = apimachinery::yaml::from_str(yaml).unwrap();
        file.set_defaults([10256, 10249]);
        faults(&file).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_fault_has_kubernetes_words() {
        assert_eq!(of("{}"), Vec::<String>::new());
        for (yaml, want) in [
            (
                "bindAddress: here",
                r#"BindAddress: Invalid value: "here": not a valid textual representation of an IP address"#,
            ),
            ("healthzBindAddress: here", r#"HealthzBindAddress: Invalid value: "here": must be IP:port"#),
            ("healthzBindAddress: 'x:1'", r#"HealthzBindAddress: Invalid value: "x": must be a valid IP"#),
            ("metricsBindAddress: 127.0.0.1:0", r#"MetricsBindAddress: Invalid value: "0": must be a valid port"#),
            (
                "mode: iptables\niptables: {masqueradeBit: 32}",
                "KubeProxyIPTablesConfiguration.MasqueradeBit: Invalid value: 32: must be within the range [0, 31]",
            ),
            (
                "nftables: {masqueradeBit: 40}",
                "KubeProxyNFTablesConfiguration.MasqueradeBit: Invalid value: 40: must be within the range [0, 31]",
            ),
            (
                "oomScoreAdj: 2000",
                "KubeProxyLinuxConfiguration.OOMScoreAdj: Invalid value: 2000: must be within the range [-1000, 1000]",
            ),
            (
                "conntrack: {udpTimeout: -1s}",
                r#"KubeProxyLinuxConfiguration.KubeProxyConntrackConfiguration.UDPTimeout: Invalid value: "-1s": must be greater than or equal to 0"#,
            ),
            (
                "clientConnection: {burst: -5}",
                "ClientConnection.Burst: Invalid value: -5: must be greater than or equal to 0",
            ),
            (
                "nodePortAddresses: [10.0.0.0]",
                r#"NodePortAddresses[0]: Invalid value: "10.0.0.0": must be a valid CIDR"#,
            ),
            (
                "nodePortAddresses: [primary, 10.0.0.0/8]",
                r#"NodePortAddresses[0]: Invalid value: "primary": can't use both 'primary' and CIDRs"#,
            ),
            (
                "nftables: {syncPeriod: 1s, minSyncPeriod: 2s}",
                r#"SyncPeriod: Invalid value: "2s": must be greater than or equal to KubeProxyConfiguration.MinSyncPeriod"#,
            ),
            (
                "detectLocalMode: BridgeInterface",
                r#"DetectLocalConfiguration.InterfaceName: Invalid value: "": must not be empty"#,
            ),
            (
                "mode: ipvs\nipvs: {excludeCIDRs: [10.0.0.0/8, x]}",
                r#"KubeProxyIPVSConfiguration.ExcludeCidrs[1]: Invalid value: "x": must be a valid CIDR"#,
            ),
            (
                "clusterCIDR: 10.0.0.0/8,10.1.0.0/16",
                r#"DetectLocalConfiguration.ClusterCIDRs: Invalid value: ["10.0.0.0/8","10.1.0.0/16"]: must be a either a single CIDR or dual-stack pair of CIDRs (e.g. [10.100.0.0/16, fde4:8dba:82e1::/48]"#,
            ),
        ] {
            assert_eq!(of(yaml), [format!("KubeProxyConfiguration.{want}")], "{yaml}");
        }
    }

    #[test]
    fn all_faults_are_told_at_once() {
        assert_eq!(of("mode: magic\nbindAddress: here\ndetectLocalMode: guess\nclusterCIDR: x").len(), 4);
    }
}
