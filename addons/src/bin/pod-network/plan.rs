//! What the pod network of a node shall be: pure, from the nodes of the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use k8s_openapi::api::core::v1::Node;
use serde_json::json;

/// The name of the network, of its nftables table, and of its directory of addresses in use.
pub(crate) const NETWORK: &str = "pilothouse";

/// A range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Cidr {
    pub address: IpAddr,
    pub prefix: u8,
}

/// Where packets for a range go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// To the node that has the range.
    Via(IpAddr),
    /// Nowhere: of this node's own range, what no pod has.
    Unreachable,
}

pub(crate) type Routes = BTreeMap<Cidr, Next>;

// === impl Cidr ===

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Cidr, String> {
        let bad = || format!("{text:?} is not a CIDR");
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        if prefix > most {
            return Err(bad());
        }
        // Bits behind the prefix count for nothing.
        let address = match address {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V4((u32::from(v4) & mask).into())
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V6((u128::from(v6) & mask).into())
            }
        };
        Ok(Cidr { address, prefix })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// The node's own ranges; empty until the controller has given it some.
pub(crate) fn pod_cidrs(node: &Node) -> Vec<Cidr> {
    let Some(spec) = node.spec.as_ref() else { return Vec::new() };
    let mut cidrs: Vec<Cidr> = spec.pod_cidrs.iter().flatten().filter_map(|cidr| cidr.parse().ok()).collect();
    if cidrs.is_empty() {
        cidrs.extend(spec.pod_cidr.as_ref().and_then(|cidr| cidr.parse::<Cidr>().ok()));
    }
    cidrs
}

fn internal_ips(node: &Node) -> impl Iterator<Item = IpAddr> {
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref());
    addresses
        .into_iter()
        .flatten()
        .filter(|address| address.type_ == "InternalIP")
        .filter_map(|address| address.address.parse().ok())
}

/// The routes of node `own`: each other node's ranges by way of its address of the same family. A node that is not ready
/// keeps its routes; one that has no address or range yet has none.
pub(crate) fn routes<'n>(nodes: impl IntoIterator<Item = &'n Node>, own: &str) -> Routes {
    let mut routes = Routes::new();
    let mut own_cidrs = Vec::new();
    for node in nodes {
        let cidrs = pod_cidrs(node);
        if node.metadata.name.as_deref() == Some(own) {
            own_cidrs = cidrs;
            continue;
        }
        for cidr in cidrs {
            if let Some(address) = internal_ips(node).find(|address| address.is_ipv4() == cidr.address.is_ipv4()) {
                routes.insert(cidr, Next::Via(address));
            }
        }
    }
    // Never hand our own pods to somebody else, whatever another node claims.
    for cidr in own_cidrs {
        routes.insert(cidr, Next::Unreachable);
    }
    routes
}

/// What to do to come from `current` to `wanted`: routes to set (new or changed), and ranges whose route goes.
pub(crate) fn difference(current: &Routes, wanted: &Routes) -> (Routes, BTreeSet<Cidr>) {
    let set = wanted.iter().filter(|(cidr, next)| current.get(cidr) != Some(next)).map(|(cidr, next)| (*cidr, *next));
    let gone = current.keys().filter(|cidr| !wanted.contains_key(cidr)).copied();
    (set.collect(), gone.collect())
}

/// The CNI configuration. `ptp` gives each pod a link of its own to the host, on which every packet is routed: so packets
/// between pods of one node pass the Service rules too, which those over a bridge do not.
pub(crate) fn cni_config(cidrs: &[Cidr], mtu: Option<u32>) -> String {
    let ranges: Vec<_> = cidrs.iter().map(|cidr| json!([{"subnet": cidr.to_string()}])).collect();
    let mut routes = Vec::new();
    if cidrs.iter().any(|cidr| cidr.address.is_ipv4()) {
        routes.push(json!({"dst": "0.0.0.0/0"}));
    }
    if cidrs.iter().any(|cidr| cidr.address.is_ipv6()) {
        routes.push(json!({"dst": "::/0"}));
    }
    let mut ptp = json!({
        "type": "ptp",
        "ipMasq": false,
        "ipam": {"type": "host-local", "dataDir": "/var/lib/cni/networks", "ranges": ranges, "routes": routes},
    });
    if let Some(mtu) = mtu {
        ptp["mtu"] = json!(mtu);
    }
    let config = json!({
        "cniVersion": "1.0.0",
        "name": NETWORK,
        "plugins": [ptp, {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}],
    });
    format!("{config:#}\n")
}

/// The nftables script that lets pods of this node speak to the world under the node's address. Within the cluster's ranges
/// pods keep their own. The whole table is replaced in one transaction.
pub(crate) fn masquerade_script(own: &[Cidr], cluster: &[Cidr]) -> String {
    let mut rules = String::new();
    for cidr in own {
        let (family, multicast) = if cidr.address.is_ipv4() { ("ip", "224.0.0.0/4") } else { ("ip6", "ff00::/8") };
        let mut inside: Vec<String> = cluster
            .iter()
            .filter(|inside| inside.address.is_ipv4() == cidr.address.is_ipv4())
            .map(Cidr::to_string)
            .collect();
        if inside.is_empty() {
            inside.push(cidr.to_string());
        }
        inside.push(multicast.to_owned());
        rules
            .push_str(&format!("\t\t{family} saddr {cidr} {family} daddr != {{ {} }} masquerade\n", inside.join(", ")));
    }
    format!(
        "add table inet {NETWORK}-pod-network\nflush table inet {NETWORK}-pod-network\ntable inet {NETWORK}-pod-network {{\n\
         \tchain postrouting {{\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n{rules}\t}}\n}}\n"
    )
}

/// The nftables script that takes the table away, whether it is there or not.
pub(crate) fn cleanup_script() -> String {
    format!("add table inet {NETWORK}-pod-network\ndelete table inet {NETWORK}-pod-network\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, cidrs: &[&str], addresses: &[&str]) -> Node {
        let addresses: Vec<_> =
            addresses.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
        serde_json::from_value(json!({"metadata": {"name": name},
            "spec": {"podCIDR": cidrs.first(), "podCIDRs": cidrs}, "status": {"addresses": addresses}}))
        .expect("a node")
    }

    fn shown(routes: &Routes) -> Vec<String> {
        routes.iter().map(|(cidr, next)| format!("{cidr} {next:?}")).collect()
    }

    #[test]
    fn ranges_are_normalised() {
        for (text, want) in [
            ("10.244.1.7/24", Some("10.244.1.0/24")),
            ("0.0.0.0/0", Some("0.0.0.0/0")),
            ("10.0.0.1/32", Some("10.0.0.1/32")),
            ("fd00:1::5/64", Some("fd00:1::/64")),
            ("10.0.0.0/33", None),
            ("10.0.0.0", None),
            ("x/8", None),
        ] {
            assert_eq!(text.parse::<Cidr>().ok().map(|cidr| cidr.to_string()).as_deref(), want, "{text}");
        }
    }

    #[test]
    fn every_other_node_is_reached_by_its_address() {
        let nodes = [
            node("n1", &["10.244.0.0/24"], &["192.0.2.1"]),
            node("n2", &["10.244.1.0/24", "fd00:1::/64"], &["192.0.2.2", "fd01::2"]),
            node("n3", &["10.244.2.0/24", "fd00:2::/64"], &["192.0.2.3"]),
            node("n4", &[], &["192.0.2.4"]),
            node("n5", &["10.244.0.0/24"], &["192.0.2.5"]),
        ];
        assert_eq!(
            shown(&routes(&nodes, "n1")),
            [
                "10.244.0.0/24 Unreachable",
                "10.244.1.0/24 Via(192.0.2.2)",
                "10.244.2.0/24 Via(192.0.2.3)",
                "fd00:1::/64 Via(fd01::2)"
            ]
        );
    }

    #[test]
    fn only_differences_are_applied() {
        let before =
            routes(&[node("n2", &["10.1.0.0/24"], &["1.1.1.1"]), node("n3", &["10.2.0.0/24"], &["1.1.1.2"])], "n1");
        let after =
            routes(&[node("n2", &["10.1.0.0/24"], &["1.1.1.9"]), node("n4", &["10.3.0.0/24"], &["1.1.1.3"])], "n1");
        let (set, gone) = difference(&before, &after);
        assert_eq!(shown(&set), ["10.1.0.0/24 Via(1.1.1.9)", "10.3.0.0/24 Via(1.1.1.3)"]);
        assert_eq!(gone.iter().map(Cidr::to_string).collect::<Vec<_>>(), ["10.2.0.0/24"]);
        assert_eq!(difference(&after, &after), (Routes::new(), BTreeSet::new()));
    }

    #[test]
    fn the_rule_set() {
        let own = ["10.244.1.0/24".parse().expect("a range"), "fd00:1::/64".parse().expect("a range")];
        let cluster = ["10.244.0.0/16".parse().expect("a range")];
        insta::assert_snapshot!(masquerade_script(&own, &cluster), @r"
        add table inet pilothouse-pod-network
        flush table inet pilothouse-pod-network
        table inet pilothouse-pod-network {
        	chain postrouting {
        		type nat hook postrouting priority srcnat; policy accept;
        		ip saddr 10.244.1.0/24 ip daddr != { 10.244.0.0/16, 224.0.0.0/4 } masquerade
        		ip6 saddr fd00:1::/64 ip6 daddr != { fd00:1::/64, ff00::/8 } masquerade
        	}
        }
        ");
    }

    #[test]
    fn the_cni_configuration() {
        let own = ["10.244.1.0/24".parse().expect("a range")];
        let config: serde_json::Value = serde_json::from_str(&cni_config(&own, Some(1400))).expect("JSON");
        assert_eq!(config["plugins"][0]["ipam"]["ranges"], json!([[{"subnet": "10.244.1.0/24"}]]));
        assert_eq!(config["plugins"][0]["ipam"]["routes"], json!([{"dst": "0.0.0.0/0"}]));
        assert_eq!((&config["plugins"][0]["mtu"], &config["plugins"][1]["type"]), (&json!(1400), &json!("portmap")));
    }
}
