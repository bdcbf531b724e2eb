//! Connection tracking remembers where the packets of a flow of UDP or SCTP went. A flow that is remembered wrongly (its
//! endpoint is gone, or its Service had none when it began) must be forgotten, or its packets go nowhere for as long as they
//! come. (TCP notices by itself.)
//!
//! The kernel's flows are compared with the model whenever such a port has changed, and once at the start. As
//! `CleanStaleEntries`.
use crate::model::{Endpoint, Protocol, ServicePort};
use component_base::command::{self, CommandError};
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

/// One flow as the kernel remembers it: who asked whom, and who answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub answers: SocketAddr,
}

/// The flows to Services that go where they should not; all of one protocol, as the ports.
pub fn stale<'a>(flows: &[Flow], ports: impl IntoIterator<Item = &'a ServicePort>) -> Vec<Flow> {
    // Who may answer: at an address, and at a node port of whatever address.
    let mut at_address: HashMap<SocketAddr, HashSet<SocketAddr>> = HashMap::new();
    let mut at_node: HashMap<u16, HashSet<SocketAddr>> = HashMap::new();
    for port in ports {
        // Policies and topology choose for new flows; those that there are may stay where somebody serves them.
        let endpoints = port.endpoints();
        let endpoints: HashSet<SocketAddr> = endpoints.iter().chain(&port.others).map(Endpoint::socket).collect();
        if endpoints.is_empty() {
            // Nothing answers anyway; flows that begin now are refused.
            continue;
        }
        for address in std::iter::once(port.cluster_ip).chain(port.outer_ips()) {
            at_address.entry(SocketAddr::new(address, port.port)).or_default().extend(&endpoints);
        }
        if port.node_port != 0 {
            at_node.entry(port.node_port).or_default().extend(&endpoints);
        }
    }
    let is_stale = |flow: &&Flow| {
        let good = at_address.get(&flow.destination).or_else(|| {
            // Of a node port only what was rewritten: the number may be another address's own.
            let rewritten = flow.answers.ip() != flow.destination.ip();
            at_node.get(&flow.destination.port()).filter(|_| rewritten)
        });
        good.is_some_and(|good| !good.contains(&flow.answers))
    };
    flows.iter().filter(is_stale).cloned().collect()
}

/// What `conntrack -L` prints: `udp 17 29 src=A dst=B sport=1 dport=2 [UNREPLIED] src=C dst=D sport=3 dport=4 …`.
fn parse(listed: &str) -> Vec<Flow> {
    let flow = |line: &str| {
        let mut words = line.split_whitespace().filter_map(|word| word.split_once('='));
        let mut half = || {
            let mut next = |name| words.find(|(key, _)| *key == name).map(|(_, value)| value);
            let (source, destination): (IpAddr, IpAddr) = (next("src")?.parse().ok()?, next("dst")?.parse().ok()?);
            let ports: (u16, u16) = (next("sport")?.parse().ok()?, next("dport")?.parse().ok()?);
            Some((SocketAddr::new(source, ports.0), SocketAddr::new(destination, ports.1)))
        };
        let ((source, destination), (answers, _)) = (half()?, half()?);
        Some(Flow { source, destination, answers })
    };
    listed.lines().filter_map(flow).collect()
}

/// Forgets the kernel's flows that are stale by these ports, which are of one protocol; gives their number. For each order the
/// kernel is searched whole, so flows to one address that went to one endpoint are one order, however many they are.
pub async fn reconcile(ports: &[&ServicePort], protocol: Protocol, ipv6: bool) -> Result<usize, CommandError> {
    let (family, protocol) = (if ipv6 { "ipv6" } else { "ipv4" }, protocol.as_str());
    let listed = command::run("conntrack", &["-L", "-p", protocol, "-f", family], "").await?;
    let stale = stale(&parse(&listed), ports.iter().copied());
    let orders: BTreeSet<String> = stale.iter().map(|flow| flow.order(protocol)).collect();
    if !orders.is_empty() {
        command::run("conntrack", &["--load-file", "-"], &orders.into_iter().collect::<String>()).await?;
    }
    Ok(stale.len())
}

impl Flow {
    /// The line by which `conntrack` forgets it, and all that go the same wrong way.
    fn order(&self, protocol: &str) -> String {
        let (to, by) = (self.destination, self.answers);
        format!(
            "-D -p {protocol} --orig-dst {} --orig-port-dst {} --reply-src {} --reply-port-src {}\n",
            to.ip(),
            to.port(),
            by.ip(),
            by.port()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::port;

    fn udp(endpoints: &[&str]) -> ServicePort {
        let mut udp = port("dns", endpoints);
        (udp.id.protocol, udp.node_port) = (Protocol::Udp, 30_053);
        udp.others = vec![Endpoint { ip: [10, 244, 1, 3].into(), port: 8080, local: false }];
        udp
    }

    #[test]
    fn flows_are_read_from_what_conntrack_prints() {
        let text = "udp      17 29 src=10.7.0.1 dst=10.9.9.9 sport=60275 dport=53 [UNREPLIED] src=127.0.0.1 dst=10.7.0.1 sport=9999 dport=60275 mark=0 use=1\n\
            tcp      6 1 SYN_SENT garbage\n";
        let [s, d, a] = ["10.7.0.1:60275", "10.9.9.9:53", "127.0.0.1:9999"].map(|at| at.parse().unwrap());
        assert_eq!(parse(text), [Flow { source: s, destination: d, answers: a }]);
    }

    #[test]
    fn flows_that_go_elsewhere_than_to_an_endpoint_are_stale() {
        let flow = |destination: &str, answers: &str| Flow {
            source: "192.0.2.9:4000".parse().unwrap(),
            destination: destination.parse().unwrap(),
            answers: answers.parse().unwrap(),
        };
        let web = udp(&["10.244.0.2", "10.244.1.2"]);
        for (flow, is_stale) in [
            (flow("10.96.0.5:80", "10.244.0.2:8080"), false),
            (flow("10.96.0.5:80", "10.244.9.9:8080"), true),
            // It serves, but not for new flows.
            (flow("10.96.0.5:80", "10.244.1.3:8080"), false),
            // It began when there was no rule.
            (flow("10.96.0.5:80", "10.96.0.5:80"), true),
            (flow("10.96.0.5:81", "10.244.9.9:8080"), false),
            (flow("192.0.2.1:30053", "10.244.9.9:8080"), true),
            (flow("192.0.2.1:30053", "192.0.2.1:30053"), false),
            (flow("192.0.2.1:30053", "10.244.1.2:8080"), false),
        ] {
            assert_eq!(!stale(std::slice::from_ref(&flow), [&web]).is_empty(), is_stale, "{flow:?}");
            assert!(stale(&[flow], [&port("dns", &[])]).is_empty());
        }
    }
}
