//! What the rules of every mode depend on besides Services.
use component_base::cidr::Cidr;
use std::net::IpAddr;

/// For one address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub ipv6: bool,
    pub local: LocalTraffic,
    pub masquerade_all: bool,
    /// The mark of packets to masquerade.
    pub mark: u32,
    /// Ranges of node addresses that take NodePorts; empty for all but loopback.
    pub node_port_addresses: Vec<Cidr>,
    /// Whether NodePorts answer on loopback too, where the mode can.
    pub localhost_node_ports: bool,
    /// Whether what connection tracking cannot place is dropped on its way, in the mode iptables.
    pub drop_invalid: bool,
    /// The ranges of Services: what goes to an address there that no Service has goes nowhere, in the mode nftables.
    pub service_ranges: Vec<Cidr>,
    /// This node's own address.
    pub node_address: Option<IpAddr>,
}

/// How traffic of this node's pods is known from other traffic. As `LocalTrafficDetector`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LocalTraffic {
    /// It is not: nothing is masqueraded that need not be.
    #[default]
    Unknown,
    Sources(Vec<Cidr>),
    /// A link, or, ending with `*`, all whose names begin so.
    Interface(String),
}

impl Settings {
    /// Whether who may speak to a load balancer includes this node. What it sends to such an address that it has itself comes
    /// from there. As `allowFromNode`.
    pub fn admits_itself(&self, ranges: &[Cidr]) -> bool {
        self.node_address.is_some_and(|address| ranges.iter().any(|range| range.contains(address)))
    }

    /// The addresses of either family that NodePorts have on this node, out of those that it has.
    pub fn takes_node_ports(&self, address: IpAddr) -> bool {
        if self.node_port_addresses.is_empty() {
            return !address.is_loopback() || self.localhost_node_ports;
        }
        self.node_port_addresses.iter().any(|range| range.contains(address))
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// For the golden files.
    pub fn settings() -> Settings {
        Settings {
            ipv6: false,
            local: LocalTraffic::Sources(vec!["10.244.0.0/16".parse().unwrap()]),
            masquerade_all: false,
            mark: 0x4000,
            node_port_addresses: Vec::new(),
            localhost_node_ports: false,
            drop_invalid: true,
            service_ranges: vec!["10.96.0.0/12".parse().unwrap()],
            node_address: Some([192, 0, 2, 1].into()),
        }
    }

    #[test]
    fn node_ports_are_at_the_named_addresses_or_at_all_but_loopback() {
        let mut settings = settings();
        assert!(settings.takes_node_ports([10, 0, 0, 1].into()) && !settings.takes_node_ports([127, 0, 0, 1].into()));
        settings.node_port_addresses = vec!["192.0.2.0/24".parse().unwrap()];
        assert!(settings.takes_node_ports([192, 0, 2, 9].into()) && !settings.takes_node_ports([10, 0, 0, 1].into()));
    }
}
