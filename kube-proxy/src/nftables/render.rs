//! The rule set of a model. Pure; golden files show what it gives.
//!
//! A packet to a Service's address meets `services`, whose verdict maps send it, by address, protocol and port, to the
//! chain of that port in one look-up however many Services there are. That chain picks an endpoint's chain at random (or
//! the one that the client had before), which rewrites the destination. What comes from outside is marked on its way and
//! masqueraded when it leaves, so that answers come back this way. Ports without endpoints are refused in the filter hooks.
use super::ruleset::{Ruleset, Set};
use crate::model::{Endpoint, PortId, ServicePort};
use std::{collections::BTreeMap, fmt::Display, net::IpAddr};

/// The name of our table in either family.
pub const TABLE: &str = "kube-proxy";
/// The longest chain name that nftables takes is 127 bytes.
const NAME_MAX: usize = 120;

/// What the rules depend on besides Services.
#[derive(Clone, Debug)]
pub struct Settings {
    pub ipv6: bool,
    /// The pods' ranges, if known: whoever else speaks to a cluster IP is masqueraded.
    pub cluster_cidrs: Vec<String>,
    pub masquerade_all: bool,
    /// The mark of packets to masquerade.
    pub mark: u32,
    /// Ranges of node addresses that take NodePorts; empty for all but loopback.
    pub node_port_addresses: Vec<String>,
}

/// Names the table to `nft`: `ip kube-proxy`.
pub fn table(ipv6: bool) -> String {
    format!("{} {TABLE}", if ipv6 { "ip6" } else { "ip" })
}

/// The table for these ports, all of the family of the settings.
pub fn render(ports: &[ServicePort], settings: &Settings) -> Ruleset {
    let mut rules = Ruleset::default();
    let renderer = Renderer { settings, ip: if settings.ipv6 { "ip6" } else { "ip" } };
    let mut maps = Maps::default();
    for port in ports {
        renderer.port(&mut rules, &mut maps, port);
    }
    renderer.frame(&mut rules);
    let address = if settings.ipv6 { "ipv6_addr" } else { "ipv4_addr" };
    let by_address = format!("type {address} . inet_proto . inet_service : verdict;");
    let by_port = "type inet_proto . inet_service : verdict;".to_owned();
    for (name, declaration, elements) in [
        ("service-ips", &by_address, maps.service_ips),
        ("no-endpoint-services", &by_address, maps.dead_ips),
        ("service-nodeports", &by_port, maps.node_ports),
        ("no-endpoint-nodeports", &by_port, maps.dead_node_ports),
    ] {
        rules.sets.insert(name.to_owned(), Set { map: true, declaration: declaration.clone(), elements });
    }
    let cluster_ips = ports.iter().map(|p| (p.cluster_ip.to_string(), String::new())).collect();
    let declaration = format!("type {address};");
    rules.sets.insert("cluster-ips".to_owned(), Set { map: false, declaration, elements: cluster_ips });
    rules
}

#[derive(Default)]
struct Maps {
    service_ips: BTreeMap<String, String>,
    dead_ips: BTreeMap<String, String>,
    node_ports: BTreeMap<String, String>,
    dead_node_ports: BTreeMap<String, String>,
}

struct Renderer<'a> {
    settings: &'a Settings,
    /// `ip` or `ip6`, as expressions name the header.
    ip: &'static str,
}

impl Renderer<'_> {
    /// The chains that are the same whatever Services there are.
    fn frame(&self, rules: &mut Ruleset) {
        let ip = self.ip;
        let mark = self.settings.mark;
        let loopback = if self.settings.ipv6 { "::1" } else { "127.0.0.0/8" };
        let node_addresses = match self.settings.node_port_addresses.as_slice() {
            [] => format!("fib daddr type local {ip} daddr != {loopback}"),
            ranges => format!("fib daddr type local {ip} daddr {{ {} }}", ranges.join(", ")),
        };
        let refuse = |verdicts: &str| {
            vec![
                format!("ct state new {ip} daddr . meta l4proto . th dport vmap @no-endpoint-services"),
                format!("ct state new {node_addresses} meta l4proto . th dport vmap @no-endpoint-nodeports"),
            ]
            .into_iter()
            .chain((!verdicts.is_empty()).then(|| verdicts.to_owned()))
            .collect::<Vec<_>>()
        };
        rules.base_chain("filter-input", "type filter hook input priority -110;", refuse(""));
        // A cluster IP is not routed anywhere: what no rule has rewritten by now asked for a port that is not served.
        let stray = format!("ct state new {ip} daddr @cluster-ips reject");
        rules.base_chain("filter-forward", "type filter hook forward priority -110;", refuse(&stray));
        rules.base_chain("filter-output", "type filter hook output priority -90;", refuse(&stray));
        rules.base_chain("nat-prerouting", "type nat hook prerouting priority -100;", vec!["jump services".into()]);
        rules.base_chain("nat-output", "type nat hook output priority -100;", vec!["jump services".into()]);
        rules.base_chain(
            "nat-postrouting",
            "type nat hook postrouting priority 100;",
            vec!["jump masquerading".into()],
        );
        rules.chain(
            "services",
            vec![
                format!("{ip} daddr . meta l4proto . th dport vmap @service-ips"),
                format!("{node_addresses} meta l4proto . th dport vmap @service-nodeports"),
            ],
        );
        rules.chain("mark-for-masquerade", vec![format!("meta mark set meta mark | {mark:#x}")]);
        rules.chain(
            "masquerading",
            vec![
                format!("meta mark & {mark:#x} == 0 return"),
                format!("meta mark set meta mark ^ {mark:#x}"),
                "masquerade fully-random".to_owned(),
            ],
        );
        rules.chain("reject-chain", vec!["reject".to_owned()]);
    }

    fn port(&self, rules: &mut Ruleset, maps: &mut Maps, port: &ServicePort) {
        let ip = self.ip;
        let protocol = port.id.protocol.as_str();
        let at = |address: &IpAddr| format!("{address} . {protocol} . {}", port.port);
        let at_node = format!("{protocol} . {}", port.node_port);
        for endpoint in port.endpoints() {
            self.endpoint(rules, port, endpoint);
        }

        let service = chain_name("service", &port.id);
        if port.cluster_endpoints.is_empty() {
            maps.dead_ips.insert(at(&port.cluster_ip), "goto reject-chain".to_owned());
        } else {
            let mut own = Vec::new();
            let to_cluster_ip = format!("{ip} daddr {} {protocol} dport {}", port.cluster_ip, port.port);
            if self.settings.masquerade_all {
                own.push(format!("{to_cluster_ip} jump mark-for-masquerade"));
            } else if !self.settings.cluster_cidrs.is_empty() {
                let ranges = self.settings.cluster_cidrs.join(", ");
                own.push(format!("{to_cluster_ip} {ip} saddr != {{ {ranges} }} jump mark-for-masquerade"));
            }
            own.extend(self.choice(port, &port.cluster_endpoints));
            rules.chain(&service, own);
            maps.service_ips.insert(at(&port.cluster_ip), format!("goto {service}"));
        }

        if port.node_port == 0 && port.external_ips.is_empty() {
            return;
        }
        let Some(target) = self.external(rules, port, &service) else {
            for address in &port.external_ips {
                maps.dead_ips.insert(at(address), "goto reject-chain".to_owned());
            }
            if port.node_port != 0 {
                maps.dead_node_ports.insert(at_node, "goto reject-chain".to_owned());
            }
            return;
        };
        for address in &port.external_ips {
            maps.service_ips.insert(at(address), format!("goto {target}"));
        }
        if port.node_port != 0 {
            maps.node_ports.insert(at_node, format!("goto {target}"));
        }
    }

    /// The chain for traffic from outside; none if nothing answers it.
    fn external(&self, rules: &mut Ruleset, port: &ServicePort, service: &str) -> Option<String> {
        let ip = self.ip;
        let name = chain_name("external", &port.id);
        let alive = !port.cluster_endpoints.is_empty();
        match &port.external_local_endpoints {
            None if !alive => return None,
            None => rules.chain(&name, vec!["jump mark-for-masquerade".to_owned(), format!("goto {service}")]),
            Some(local) => {
                if port.is_dead() {
                    return None;
                }
                let mut own = Vec::new();
                // Pods and this node itself are within the cluster: for them the policy does not hold.
                if alive {
                    if !self.settings.cluster_cidrs.is_empty() {
                        own.push(format!("{ip} saddr {{ {} }} goto {service}", self.settings.cluster_cidrs.join(", ")));
                    }
                    own.push("fib saddr type local jump mark-for-masquerade".to_owned());
                    own.push(format!("fib saddr type local goto {service}"));
                }
                if !local.is_empty() {
                    own.extend(self.choice(port, local));
                }
                rules.chain(&name, own);
            }
        }
        Some(name)
    }

    /// Sends a packet to the endpoint that its client had, or to a random one.
    fn choice(&self, port: &ServicePort, endpoints: &[Endpoint]) -> Vec<String> {
        let chains: Vec<String> = endpoints.iter().map(|e| endpoint_chain(&port.id, e)).collect();
        let mut rules = Vec::new();
        if port.affinity_seconds.is_some() {
            let ip = self.ip;
            rules.extend(
                endpoints
                    .iter()
                    .zip(&chains)
                    .map(|(endpoint, chain)| format!("{ip} saddr @{} goto {chain}", affinity_set(&port.id, endpoint))),
            );
        }
        let verdicts: Vec<String> = chains.iter().enumerate().map(|(i, chain)| format!("{i} : goto {chain}")).collect();
        rules.push(format!("numgen random mod {} vmap {{ {} }}", chains.len(), verdicts.join(", ")));
        rules
    }

    fn endpoint(&self, rules: &mut Ruleset, port: &ServicePort, endpoint: Endpoint) {
        let ip = self.ip;
        let mut own = vec![format!("{ip} saddr {} jump mark-for-masquerade", endpoint.ip)];
        if let Some(seconds) = port.affinity_seconds {
            let set = affinity_set(&port.id, &endpoint);
            own.push(format!("update @{set} {{ {ip} saddr }}"));
            let address = if self.settings.ipv6 { "ipv6_addr" } else { "ipv4_addr" };
            let declaration = format!("type {address}; flags dynamic, timeout; timeout {seconds}s;");
            rules.sets.insert(set, Set { map: false, declaration, elements: BTreeMap::new() });
        }
        own.push(format!("meta l4proto {} dnat to {}", port.id.protocol.as_str(), socket(&endpoint)));
        rules.chain(endpoint_chain(&port.id, &endpoint), own);
    }
}

fn socket(endpoint: &Endpoint) -> String {
    std::net::SocketAddr::new(endpoint.ip, endpoint.port).to_string()
}

fn endpoint_chain(id: &PortId, endpoint: &Endpoint) -> String {
    chain_name("endpoint", &format!("{id}__{}/{}", endpoint.ip.to_string().replace(':', "."), endpoint.port))
}

fn affinity_set(id: &PortId, endpoint: &Endpoint) -> String {
    // Sets have shorter names than chains in older kernels.
    let chain = endpoint_chain(id, endpoint);
    format!("affinity-{}", &chain["endpoint-".len().."endpoint-".len() + HASH_LENGTH])
}

const HASH_LENGTH: usize = 13;

/// `service-HASH-ns/name/tcp/port`: the hash makes it unique, the rest is for people and may be cut.
fn chain_name(kind: &str, id: &impl Display) -> String {
    let id = id.to_string();
    let hash = id.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let hash: String = (0..HASH_LENGTH)
        .map(|i| char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[(hash >> (i * 5)) as usize & 31]))
        .collect();
    let mut name = format!("{kind}-{hash}-{id}");
    name.truncate(NAME_MAX);
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Protocol, ServicePort};

    fn settings() -> Settings {
        Settings {
            ipv6: false,
            cluster_cidrs: vec!["10.244.0.0/16".into()],
            masquerade_all: false,
            mark: 0x4000,
            node_port_addresses: Vec::new(),
        }
    }

    fn port(name: &str, endpoints: &[(&str, bool)]) -> ServicePort {
        let cluster_endpoints = endpoints
            .iter()
            .map(|(ip, local)| Endpoint { ip: ip.parse().unwrap(), port: 8080, local: *local })
            .collect();
        ServicePort {
            id: PortId { namespace: "ns".into(), name: name.into(), protocol: Protocol::Tcp, port_name: "http".into() },
            cluster_ip: "10.96.0.5".parse().unwrap(),
            port: 80,
            node_port: 0,
            external_ips: Vec::new(),
            affinity_seconds: None,
            cluster_endpoints,
            external_local_endpoints: None,
        }
    }

    #[test]
    fn an_empty_model_gives_the_frame() {
        insta::assert_snapshot!(render(&[], &settings()).create(&table(false)));
    }

    #[test]
    fn a_service_with_endpoints() {
        insta::assert_snapshot!(
            render(&[port("web", &[("10.244.0.2", true), ("10.244.1.2", false)])], &settings()).create(&table(false))
        );
    }

    #[test]
    fn a_node_port_with_affinity() {
        let mut web = port("web", &[("10.244.0.2", true)]);
        web.node_port = 30080;
        web.affinity_seconds = Some(10800);
        insta::assert_snapshot!(render(&[web], &settings()).create(&table(false)));
    }

    #[test]
    fn a_local_policy_and_no_endpoints() {
        let mut local = port("local", &[("10.244.0.2", true), ("10.244.1.2", false)]);
        local.node_port = 30081;
        local.external_local_endpoints = Some(vec![local.cluster_endpoints[0]]);
        let mut dead = port("dead", &[]);
        dead.cluster_ip = "10.96.0.9".parse().unwrap();
        dead.node_port = 30082;
        insta::assert_snapshot!(render(&[dead, local], &settings()).create(&table(false)));
    }

    #[test]
    fn long_names_are_cut_and_stay_unique() {
        let long = "x".repeat(200);
        let (a, b) = (chain_name("service", &format!("{long}a")), chain_name("service", &format!("{long}b")));
        assert!(a.len() <= NAME_MAX && a != b);
    }
}
