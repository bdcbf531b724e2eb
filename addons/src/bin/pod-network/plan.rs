//! What the pod network of a node shall be: pure, from the nodes of the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use component_base::cidr::Cidr;
use component_base::nftables::{Ruleset, hash};
use k8s_openapi::api::core::v1::Node;
use serde_json::json;

/// The name of the network, of its nftables table, and of its directory of addresses in use.
pub(crate) const NETWORK: &str = "pilothouse";

/// Where packets for a range go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// To the node that has the range, on a link with this one.
    Via(IpAddr),
    /// To it through the tunnel: there the range's first address stands for the node.
    Tunnel,
    /// Nowhere: of this node's own range, what no pod has.
    Unreachable,
}

pub(crate) type Routes = BTreeMap<Cidr, Next>;

/// The node's own ranges; empty until the controller has given it some.
pub(crate) fn pod_cidrs(node: &Node) -> Vec<Cidr> {
    let Some(spec) = node.spec.as_ref() else { return Vec::new() };
    let mut cidrs: Vec<Cidr> = spec.pod_cidrs.iter().flatten().filter_map(|cidr| cidr.parse().ok()).collect();
    if cidrs.is_empty() {
        cidrs.extend(spec.pod_cidr.as_ref().and_then(|cidr| cidr.parse::<Cidr>().ok()));
    }
    cidrs
}

pub(crate) fn internal_ips(node: &Node) -> impl Iterator<Item = IpAddr> {
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref());
    addresses
        .into_iter()
        .flatten()
        .filter(|address| address.type_ == "InternalIP")
        .filter_map(|address| address.address.parse().ok())
}

/// What of other nodes is to be reached, and how.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Network {
    pub routes: Routes,
    /// Ranges behind the tunnel, with the nodes that have them.
    pub tunnels: BTreeMap<Cidr, IpAddr>,
}

/// The network of node `own`, whose links have the ranges `on_link`: each other node's ranges by way of its address of the
/// same family where they share a link, else through the tunnel, which goes between addresses of the family that this node's
/// first has, where it has pods of the range's family itself. A node that is not ready keeps its routes; one that has no address or range yet has none.
pub(crate) fn network<'n>(nodes: impl IntoIterator<Item = &'n Node>, own: &str, on_link: &[Cidr]) -> Network {
    let mut network = Network::default();
    let (this, others): (Vec<&Node>, Vec<&Node>) =
        nodes.into_iter().partition(|node| node.metadata.name.as_deref() == Some(own));
    let own_cidrs: Vec<Cidr> = this.iter().copied().flat_map(pod_cidrs).collect();
    let outer_ipv6 = this.iter().find_map(|node| internal_ips(node).next()).is_some_and(|address| address.is_ipv6());
    for node in others {
        let is_near = |address: &IpAddr| on_link.iter().any(|link| link.contains(*address));
        for cidr in pod_cidrs(node) {
            let near = internal_ips(node).find(|address| address.is_ipv6() == cidr.is_ipv6() && is_near(address));
            if let Some(address) = near {
                network.routes.insert(cidr, Next::Via(address));
            } else if own_cidrs.iter().any(|own| own.is_ipv6() == cidr.is_ipv6())
                && let Some(address) = internal_ips(node).find(|address| address.is_ipv6() == outer_ipv6)
            {
                network.routes.insert(cidr, Next::Tunnel);
                network.tunnels.insert(cidr, address);
            }
        }
    }
    // Never hand our own pods to somebody else, whatever another node claims.
    for cidr in own_cidrs {
        network.tunnels.remove(&cidr);
        network.routes.insert(cidr, Next::Unreachable);
    }
    network
}

/// The tunnel's link.
pub(crate) const TUNNEL: &str = "pilothouse0";
const TUNNEL_ID: u32 = 4096;
/// Linux' own port of VXLAN.
const TUNNEL_PORT: u16 = 8472;

/// How large packets may be on the way between nodes and their pods.
///
/// Packets through the tunnel carry more than those on the link. Over IPv4 the kernel cuts what has become too large for the
/// link, and the other node puts it together: nothing is lost, and neighbours are spoken to at full size. But a router must not
/// let larger IPv6 packets pass than it has told, nor is an IPv6 tunnel cut: there pods have what fits the tunnel, as with flannel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mtu {
    /// Of the pods' links.
    pub pods: u32,
    /// Of the tunnel's link.
    pub tunnel: u32,
    /// What goes through the tunnel in one piece: connections' segments are made so small.
    pub whole: u32,
}

// === impl Mtu ===

impl Mtu {
    /// What VXLAN puts around a packet, by the outer family.
    const OVERHEAD: [u32; 2] = [50, 70];

    /// Of a node at `node` whose link takes `link`, and whose pods have addresses of `cidrs`.
    pub fn of(link: u32, node: IpAddr, cidrs: &[Cidr], has_tunnels: bool) -> Self {
        let whole = link.saturating_sub(Self::OVERHEAD[usize::from(node.is_ipv6())]);
        let is_cut = node.is_ipv4() && !cidrs.iter().any(Cidr::is_ipv6);
        Self {
            pods: if has_tunnels && !is_cut { whole } else { link },
            tunnel: if node.is_ipv4() { link } else { whole },
            whole,
        }
    }
}

/// The hardware address that a node has in the tunnel: made from its own, so that nobody need be told.
fn hardware_address(node: IpAddr) -> String {
    let bytes = hash(&node.to_string()).to_be_bytes();
    // Locally administered, not a group's.
    let octets = [0x02, bytes[1], bytes[2], bytes[3], bytes[4], bytes[5]];
    octets.map(|octet| format!("{octet:02x}")).join(":")
}

/// For `ip -batch`, to make the tunnel's link; what is there already does no harm.
pub(crate) fn tunnel_link(node: IpAddr, cidrs: &[Cidr], mtu: u32) -> String {
    let mut batch = format!(
        "link add {TUNNEL} type vxlan id {TUNNEL_ID} local {node} dstport {TUNNEL_PORT} nolearning\n\
         link set {TUNNEL} address {} mtu {mtu} up\n",
        hardware_address(node)
    );
    for cidr in cidrs {
        batch += &format!("addr replace {} dev {TUNNEL}\n", Cidr::host(cidr.address));
    }
    batch
}

/// For `ip -batch` and `bridge -batch`: where the tunnel leads.
pub(crate) fn tunnel_neighbors(tunnels: &BTreeMap<Cidr, IpAddr>) -> (String, String) {
    let (mut neighbors, mut forwarding) = (String::new(), String::new());
    for (cidr, node) in tunnels {
        let mac = hardware_address(*node);
        neighbors += &format!("neigh replace {} lladdr {mac} dev {TUNNEL} nud permanent\n", cidr.address);
        forwarding += &format!("fdb replace {mac} dev {TUNNEL} dst {node} self permanent\n");
    }
    (neighbors, forwarding)
}

/// For `ip -batch` and `bridge -batch`: takes away the entries, as `ip neigh` and `bridge fdb` list them, of nodes that the
/// tunnel leads to no more.
pub(crate) fn departed(neighbors: &str, forwarding: &str, tunnels: &BTreeMap<Cidr, IpAddr>) -> (String, String) {
    let (mut neighbors_gone, mut forwarding_gone) = (String::new(), String::new());
    let near: BTreeSet<IpAddr> = tunnels.keys().map(|cidr| cidr.address).collect();
    for address in neighbors.lines().filter_map(|line| line.split_whitespace().next()?.parse::<IpAddr>().ok()) {
        if !near.contains(&address) {
            neighbors_gone += &format!("neigh del {address} dev {TUNNEL}\n");
        }
    }
    for line in forwarding.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [mac, "dst", node, ..] = words.as_slice() else { continue };
        let known = tunnels.values().any(|wanted| node.parse() == Ok(*wanted) && *mac == hardware_address(*wanted));
        if !known {
            forwarding_gone += &format!("fdb del {mac} dev {TUNNEL} dst {node} self\n");
        }
    }
    (neighbors_gone, forwarding_gone)
}

/// This node's own addresses, as `ip -o addr` shows them: link, address, and the range of the link.
pub(crate) fn parse_addresses(listed: &str) -> Vec<(String, IpAddr, Cidr)> {
    let line = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let (link, _, with_prefix) = (words.next()?, words.next()?, words.next()?);
        let address = with_prefix.split('/').next()?.parse().ok()?;
        Some((link.to_owned(), address, with_prefix.parse().ok()?))
    };
    listed.lines().filter_map(line).collect()
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

/// The table of the rules below.
pub(crate) const TABLE: &str = "inet pilothouse-pod-network";

/// Lets pods of this node speak to the world under the node's address; within the cluster's ranges (those of the nodes, where
/// none are given) pods keep their own. And through the tunnel connections are made of segments that fit `whole`.
pub(crate) fn rules(own: &[Cidr], cluster: &[Cidr], nodes: &Routes, whole: Option<u32>) -> Ruleset {
    let mut masquerading = Vec::new();
    for cidr in own {
        let (family, multicast) = if cidr.address.is_ipv4() { ("ip", "224.0.0.0/4") } else { ("ip6", "ff00::/8") };
        let of_family = |range: &&Cidr| range.address.is_ipv4() == cidr.address.is_ipv4();
        let mut inside: Vec<String> = cluster.iter().filter(of_family).map(Cidr::to_string).collect();
        if inside.is_empty() {
            inside.extend(nodes.keys().filter(of_family).map(Cidr::to_string));
        }
        inside.push(multicast.to_owned());
        masquerading.push(format!("{family} saddr {cidr} {family} daddr != {{ {} }} masquerade", inside.join(", ")));
    }
    let mut rules = Ruleset::default();
    rules.base_chain("postrouting", "type nat hook postrouting priority srcnat; policy accept;", masquerading);
    // By family, what the headers of a segment take. A size that is asked for is never made larger.
    let clamp = |(family, headers): (&str, u32)| {
        let size = whole?.checked_sub(headers)?;
        Some(format!("meta nfproto {family} oifname {TUNNEL:?} tcp flags syn tcp option maxseg size set {size}"))
    };
    let clamps = [("ipv4", 40), ("ipv6", 60)].into_iter().filter_map(clamp).collect();
    rules.base_chain("segments", "type filter hook postrouting priority mangle; policy accept;", clamps);
    rules
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

    fn routes<'n>(nodes: impl IntoIterator<Item = &'n Node>, own: &str) -> Routes {
        let everything = ["0.0.0.0/0", "::/0"].map(|range| range.parse().expect("a range"));
        network(nodes, own, &everything).routes
    }

    #[test]
    fn nodes_on_other_links_are_reached_through_the_tunnel() {
        let nodes = [
            node("n1", &["10.244.0.0/24", "fd00:0::/64"], &["192.0.2.1", "fd01::1"]),
            node("n2", &["10.244.1.0/24", "fd00:1::/64"], &["192.0.2.2", "fd01::2"]),
            node("n3", &["10.244.2.0/24", "fd00:2::/64"], &["198.51.100.3", "fd02::3"]),
            node("n4", &["10.244.3.0/24", "fd00:3::/64"], &["192.0.2.4"]),
        ];
        let addresses = parse_addresses(
            "1: lo    inet 127.0.0.1/8 scope host lo\n2: eth0    inet 192.0.2.1/24 brd 192.0.2.255 scope global eth0\n\
             2: eth0    inet6 fd01::1/64 scope global\n",
        );
        let on_link: Vec<Cidr> = addresses.iter().map(|(_, _, range)| *range).collect();
        let network = network(&nodes, "n1", &on_link);
        assert_eq!(
            shown(&network.routes),
            [
                "10.244.0.0/24 Unreachable",
                "10.244.1.0/24 Via(192.0.2.2)",
                "10.244.2.0/24 Tunnel",
                "10.244.3.0/24 Via(192.0.2.4)",
                "fd00::/64 Unreachable",
                "fd00:1::/64 Via(fd01::2)",
                "fd00:2::/64 Tunnel",
                "fd00:3::/64 Tunnel"
            ]
        );
        insta::assert_snapshot!(format!(
            "{}{}{}",
            tunnel_link([192, 0, 2, 1].into(), &pod_cidrs(&nodes[0]), 1500),
            tunnel_neighbors(&network.tunnels).0,
            tunnel_neighbors(&network.tunnels).1
        ));
        // Of what is listed, the entries of these nodes stay.
        let mac = hardware_address([198, 51, 100, 3].into());
        let neighbors = format!("10.244.2.0 lladdr {mac} PERMANENT \n10.244.9.0 lladdr 02:00:00:00:00:09 PERMANENT \n");
        let forwarding =
            format!("{mac} dst 198.51.100.3 self permanent\n02:00:00:00:00:09 dst 198.51.100.9 self permanent\n");
        assert_eq!(
            departed(&neighbors, &forwarding, &network.tunnels),
            (
                "neigh del 10.244.9.0 dev pilothouse0\n".to_owned(),
                "fdb del 02:00:00:00:00:09 dev pilothouse0 dst 198.51.100.9 self\n".to_owned()
            )
        );
    }

    fn shown(routes: &Routes) -> Vec<String> {
        routes.iter().map(|(cidr, next)| format!("{cidr} {next:?}")).collect()
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
        let nodes = Routes::from(
            ["10.9.0.0/24", "fd00:1::/64", "fd00:2::/64"]
                .map(|range| (range.parse().expect("a range"), Next::Unreachable)),
        );
        insta::assert_snapshot!(rules(&own, &cluster, &nodes, Some(1450)).create(TABLE), @r#"
        add table inet pilothouse-pod-network
        delete table inet pilothouse-pod-network
        add table inet pilothouse-pod-network
        add chain inet pilothouse-pod-network postrouting { type nat hook postrouting priority srcnat; policy accept; }
        add chain inet pilothouse-pod-network segments { type filter hook postrouting priority mangle; policy accept; }
        add rule inet pilothouse-pod-network postrouting ip saddr 10.244.1.0/24 ip daddr != { 10.244.0.0/16, 224.0.0.0/4 } masquerade
        add rule inet pilothouse-pod-network postrouting ip6 saddr fd00:1::/64 ip6 daddr != { fd00:1::/64, fd00:2::/64, ff00::/8 } masquerade
        add rule inet pilothouse-pod-network segments meta nfproto ipv4 oifname "pilothouse0" tcp flags syn tcp option maxseg size set 1410
        add rule inet pilothouse-pod-network segments meta nfproto ipv6 oifname "pilothouse0" tcp flags syn tcp option maxseg size set 1390
        "#);
    }

    #[test]
    fn pods_have_the_mtu_of_the_link_where_nothing_is_lost_by_it() {
        let (four, both) = (["10.244.1.0/24"], ["10.244.1.0/24", "fd00:1::/64"]);
        for (node, cidrs, has_tunnels, (pods, tunnel, whole)) in [
            ("192.0.2.1", &four[..], false, (1500, 1500, 1450)),
            ("192.0.2.1", &four, true, (1500, 1500, 1450)),
            ("192.0.2.1", &both, false, (1500, 1500, 1450)),
            ("192.0.2.1", &both, true, (1450, 1500, 1450)),
            ("fd01::1", &both, false, (1500, 1430, 1430)),
            ("fd01::1", &both, true, (1430, 1430, 1430)),
            ("fd01::1", &four, true, (1430, 1430, 1430)),
        ] {
            let cidrs: Vec<Cidr> = cidrs.iter().map(|cidr| cidr.parse().expect("a range")).collect();
            let mtu = Mtu::of(1500, node.parse().expect("an address"), &cidrs, has_tunnels);
            assert_eq!(mtu, Mtu { pods, tunnel, whole }, "{node} {cidrs:?} {has_tunnels}");
        }
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
