//! The mode nftables: the rule set of a model. Pure; golden files show what it gives.
//!
//! A packet to a Service's address meets `services`, whose verdict maps send it on by address, protocol and port, in one
//! look-up however many Services there are. For most ports that is to the chain of all ports with as many endpoints, which
//! picks a number; the map of that number knows the endpoint, by address, protocol and port again. So such a port is a few
//! elements of maps, which cost the same to change however many others there are. (A chain or a set for each would not: the
//! kernel and `nft` go through all of those.) A port with session affinity, policies of its own or very many endpoints has
//! chains of its own, one for each endpoint.
//!
//! What comes from outside is marked on its way and masqueraded when it leaves, so that answers come back this way; so is what
//! a pod sends to itself. Ports without endpoints are refused in the filter hooks, and whom a load balancer is closed to is
//! dropped before.
//!
//! Each port's part of the table is its own (but for `hairpins`, see there), so the parts of ports that changed, before and
//! after, give the transaction.
use crate::{
    model::{Endpoint, PortId, ServicePort},
    settings::{LocalTraffic, Settings},
};
use component_base::{
    cidr::Cidr,
    nftables::{Ruleset, Set},
};
use std::{collections::BTreeMap, fmt::Display, net::IpAddr};

/// The name of our table in either family.
pub const TABLE: &str = "kube-proxy";
/// A chain that is there whenever the table is ours.
pub const LANDMARK: &str = "services";
/// Ports with at most so many endpoints share the chains of the frame.
const SLOTS: usize = 16;
/// Endpoints, twice over: what such a one sends to itself by way of a Service. Several ports may have one endpoint, so it
/// stays until all is made anew; nothing else matches it.
pub const HAIRPINS: &str = "hairpins";
/// The longest chain name that nftables takes is 127 bytes.
const NAME_MAX: usize = 120;
const HASH_LENGTH: usize = 13;

/// Names the table to `nft`: `ip kube-proxy`.
pub fn table(ipv6: bool) -> String {
    format!("{} {TABLE}", if ipv6 { "ip6" } else { "ip" })
}

/// The whole table for these ports, all of the family of the settings.
pub fn render<'a>(ports: impl IntoIterator<Item = &'a ServicePort>, settings: &Settings) -> Ruleset {
    let mut rules = parts(ports, settings);
    let renderer = Renderer::of(settings);
    renderer.frame(&mut rules);
    renderer.shared(&mut rules);
    rules
}

/// What leads from the ports `old` to the ports `new`.
pub fn update<'a>(
    old: impl IntoIterator<Item = &'a ServicePort>,
    new: impl IntoIterator<Item = &'a ServicePort>,
    settings: &Settings,
) -> String {
    let mut before = parts(old, settings);
    before.sets.entry(HAIRPINS.to_owned()).or_default().elements.clear();
    parts(new, settings).update_from(&before, &table(settings.ipv6))
}

/// What the ports bring into the table, in sets and chains that the frame names.
pub fn parts<'a>(ports: impl IntoIterator<Item = &'a ServicePort>, settings: &Settings) -> Ruleset {
    let renderer = Renderer::of(settings);
    let mut rules = Ruleset::default();
    let mut maps = Maps::default();
    for port in ports {
        renderer.port(&mut rules, &mut maps, port);
    }
    let address = renderer.address;
    let by_address = format!("type {address} . inet_proto . inet_service : verdict;");
    let by_port = "type inet_proto . inet_service : verdict;".to_owned();
    let endpoint = |key: &str| format!("type {key}inet_proto . inet_service : {address} . inet_service;");
    for (slot, (elements, of_node)) in maps.slots.into_iter().zip(maps.node_slots).enumerate() {
        let declaration = endpoint(&format!("{address} . "));
        rules.sets.insert(format!("endpoints-{slot}"), Set { map: true, declaration, elements });
        rules
            .sets
            .insert(format!("node-endpoints-{slot}"), Set { map: true, declaration: endpoint(""), elements: of_node });
    }
    for (name, map, declaration, elements) in [
        ("service-ips", true, by_address.clone(), maps.service_ips),
        ("no-endpoint-services", true, by_address.clone(), maps.dead_ips),
        ("firewall-ips", true, by_address, maps.firewalls),
        ("service-nodeports", true, by_port.clone(), maps.node_ports),
        ("no-endpoint-nodeports", true, by_port, maps.dead_node_ports),
        ("cluster-ips", false, format!("type {address};"), maps.cluster_ips),
        (HAIRPINS, false, format!("type {address} . {address};"), maps.hairpins),
    ] {
        rules.sets.insert(name.to_owned(), Set { map, declaration, elements });
    }
    rules
}

/// Key to verdict or, in slots, to endpoint; the last two are sets.
#[derive(Default)]
struct Maps {
    slots: [BTreeMap<String, String>; SLOTS],
    node_slots: [BTreeMap<String, String>; SLOTS],
    service_ips: BTreeMap<String, String>,
    dead_ips: BTreeMap<String, String>,
    firewalls: BTreeMap<String, String>,
    node_ports: BTreeMap<String, String>,
    dead_node_ports: BTreeMap<String, String>,
    cluster_ips: BTreeMap<String, String>,
    hairpins: BTreeMap<String, String>,
}

struct Renderer<'a> {
    settings: &'a Settings,
    /// `ip` or `ip6`, as expressions name the header.
    ip: &'static str,
    /// The type of addresses.
    address: &'static str,
}

impl<'a> Renderer<'a> {
    fn of(settings: &'a Settings) -> Self {
        let (ip, address) = if settings.ipv6 { ("ip6", "ipv6_addr") } else { ("ip", "ipv4_addr") };
        Self { settings, ip, address }
    }

    /// The chains that are the same whatever Services there are.
    fn frame(&self, rules: &mut Ruleset) {
        let (ip, mark) = (self.ip, self.settings.mark);
        let node_addresses = match self.settings.node_port_addresses.as_slice() {
            [] => {
                format!("fib daddr type local {ip} daddr != {}", if self.settings.ipv6 { "::1" } else { "127.0.0.0/8" })
            }
            ranges => format!("fib daddr type local {ip} daddr {}", set_of(ranges)),
        };
        let by_address = format!("{ip} daddr . meta l4proto . th dport vmap");
        let by_port = format!("{node_addresses} meta l4proto . th dport vmap");
        let refuse = vec![
            format!("ct state new {by_address} @no-endpoint-services"),
            format!("ct state new {by_port} @no-endpoint-nodeports"),
        ];
        // A cluster IP is not routed anywhere: what no rule has rewritten by now asked for a port that is not served.
        let stray = format!("ct state new {ip} daddr @cluster-ips reject");
        // And what is in their ranges is nobody's unless a Service has it.
        let unknown = (!self.settings.service_ranges.is_empty())
            .then(|| format!("ct state new {ip} daddr {} drop", set_of(&self.settings.service_ranges)));
        let with_stray = || refuse.iter().cloned().chain([stray.clone()]).chain(unknown.clone()).collect();
        let firewall = || vec![format!("ct state new {by_address} @firewall-ips")];
        rules.base_chain("filter-prerouting", "type filter hook prerouting priority -110;", firewall());
        rules.base_chain("filter-output-before", "type filter hook output priority -110;", firewall());
        rules.base_chain("filter-input", "type filter hook input priority -110;", refuse.clone());
        rules.base_chain("filter-forward", "type filter hook forward priority -110;", with_stray());
        rules.base_chain("filter-output", "type filter hook output priority -90;", with_stray());
        rules.chain("reject-chain", vec!["reject".into()]);
        for (name, hook) in [("nat-prerouting", "prerouting"), ("nat-output", "output")] {
            rules.base_chain(name, &format!("type nat hook {hook} priority -100;"), vec![format!("jump {LANDMARK}")]);
        }
        let masquerading = vec!["jump masquerading".into()];
        rules.base_chain("nat-postrouting", "type nat hook postrouting priority 100;", masquerading);
        rules.chain(LANDMARK, vec![format!("{by_address} @service-ips"), format!("{by_port} @service-nodeports")]);
        rules.chain("mark-for-masquerade", vec![format!("meta mark set meta mark | {mark:#x}")]);
        rules.chain(
            "masquerading",
            vec![
                format!("ct status dnat {ip} saddr . {ip} daddr @{HAIRPINS} masquerade fully-random"),
                format!("meta mark & {mark:#x} == 0 return"),
                format!("meta mark set meta mark ^ {mark:#x}"),
                "masquerade fully-random".into(),
            ],
        );
    }

    /// The chains of ports that share theirs: one for each number of endpoints, one for each slot.
    fn shared(&self, rules: &mut Ruleset) {
        let ip = self.ip;
        let rewrite = format!("meta l4proto {{ tcp, udp, sctp }} dnat {ip} to");
        for count in 1..=SLOTS {
            let slot = count - 1;
            let choose = |kind: &str| {
                let verdicts: Vec<String> = (0..count).map(|slot| format!("{slot} : goto {kind}-{slot}")).collect();
                format!("numgen random mod {count} vmap {{ {} }}", verdicts.join(", "))
            };
            let mark = || "jump mark-for-masquerade".to_owned();
            let from = if self.settings.masquerade_all { Some(String::new()) } else { self.foreign() };
            let own = from.map(|from| format!("{from}{}", mark())).into_iter().chain([choose("slot")]);
            rules.chain(format!("balance-{count}"), own.collect());
            rules.chain(format!("outside-{count}"), vec![mark(), choose("slot")]);
            rules.chain(format!("node-port-{count}"), vec![mark(), choose("node-slot")]);
            let by_address = format!("{ip} daddr . meta l4proto . th dport map @endpoints-{slot}");
            rules.chain(format!("slot-{slot}"), vec![format!("{rewrite} {by_address}")]);
            let by_port = format!("meta l4proto . th dport map @node-endpoints-{slot}");
            rules.chain(format!("node-slot-{slot}"), vec![format!("{rewrite} {by_port}")]);
        }
    }

    /// A port like most: elements of maps are all that it needs.
    fn shared_port(&self, maps: &mut Maps, port: &ServicePort, dead: &str) {
        let (protocol, endpoints) = (port.id.protocol.as_str(), port.internal());
        let count = endpoints.len();
        let addresses = [(port.cluster_ip, "balance")].into_iter().chain(port.outer_ips().map(|ip| (ip, "outside")));
        for (address, chain) in addresses {
            let key = format!("{address} . {protocol} . {}", port.port);
            for (endpoint, slot) in endpoints.iter().zip(&mut maps.slots) {
                slot.insert(key.clone(), format!("{} . {}", endpoint.ip, endpoint.port));
            }
            match count {
                0 => maps.dead_ips.insert(key, dead.to_owned()),
                _ => maps.service_ips.insert(key, format!("goto {chain}-{count}")),
            };
        }
        if port.node_port != 0 {
            let key = format!("{protocol} . {}", port.node_port);
            for (endpoint, slot) in endpoints.iter().zip(&mut maps.node_slots) {
                slot.insert(key.clone(), format!("{} . {}", endpoint.ip, endpoint.port));
            }
            match count {
                0 => maps.dead_node_ports.insert(key, dead.to_owned()),
                _ => maps.node_ports.insert(key, format!("goto node-port-{count}")),
            };
        }
        maps.hairpins.extend(endpoints.iter().map(|e| (format!("{0} . {0}", e.ip), String::new())));
    }

    /// Whom a load balancer is closed to.
    fn firewall(&self, rules: &mut Ruleset, maps: &mut Maps, port: &ServicePort) {
        if port.source_ranges.is_empty() || port.load_balancer_ips.is_empty() {
            return;
        }
        let chain = chain_name("firewall", &port.id);
        let itself = port.load_balancer_ips.iter().filter(|_| self.settings.admits_itself(&port.source_ranges));
        let hosts = itself.map(|ip| Cidr::host(*ip));
        let allowed: Vec<Cidr> = port.source_ranges.iter().copied().chain(hosts).collect();
        rules.chain(&chain, vec![format!("{} saddr != {} drop", self.ip, set_of(&allowed))]);
        let at = |ip: &IpAddr| format!("{ip} . {} . {}", port.id.protocol.as_str(), port.port);
        maps.firewalls.extend(port.load_balancer_ips.iter().map(|ip| (at(ip), format!("goto {chain}"))));
    }

    fn port(&self, rules: &mut Ruleset, maps: &mut Maps, port: &ServicePort) {
        let ip = self.ip;
        let protocol = port.id.protocol.as_str();
        let at = |address: &IpAddr| format!("{address} . {protocol} . {}", port.port);
        let goto = |chain: &str| format!("goto {chain}");
        // Nothing answers: told to the client if nothing could, else only this node is the wrong one.
        let dead = if port.has_endpoints { "drop".to_owned() } else { goto("reject-chain") };
        maps.cluster_ips.insert(port.cluster_ip.to_string(), String::new());
        self.firewall(rules, maps, port);
        if is_plain(port) {
            return self.shared_port(maps, port, &dead);
        }
        for endpoint in port.endpoints() {
            self.endpoint(rules, port, endpoint);
        }

        let [service, within, external] = ["service", "within", "external"].map(|kind| chain_name(kind, &port.id));
        if port.internal().is_empty() {
            maps.dead_ips.insert(at(&port.cluster_ip), dead.clone());
        } else {
            let to_cluster_ip = format!("{ip} daddr {} {protocol} dport {}", port.cluster_ip, port.port);
            let masquerade = if self.settings.masquerade_all { Some(String::new()) } else { self.foreign() };
            let mut own: Vec<String> =
                masquerade.map(|from| format!("{to_cluster_ip} {from}jump mark-for-masquerade")).into_iter().collect();
            own.extend(self.choice(port, port.internal()));
            rules.chain(&service, own);
            maps.service_ips.insert(at(&port.cluster_ip), goto(&service));
        }
        if !port.is_external() {
            return;
        }

        // From within the cluster a Service is reached at its outer addresses whatever the policies say.
        let from_within = match (port.cluster_endpoints.is_empty(), port.internal_local) {
            (true, _) => None,
            (false, false) => Some(service),
            (false, true) => {
                rules.chain(&within, self.choice(port, &port.cluster_endpoints));
                Some(within)
            }
        };
        let mut own = Vec::new();
        match from_within {
            Some(target) if port.external_local => {
                own.extend(self.native().map(|from| format!("{from}goto {target}")));
                own.push("fib saddr type local jump mark-for-masquerade".to_owned());
                own.push(format!("fib saddr type local goto {target}"));
            }
            Some(target) => own.extend(["jump mark-for-masquerade".to_owned(), format!("goto {target}")]),
            None => {}
        }
        if port.external_local && !port.local_endpoints.is_empty() {
            own.extend(self.choice(port, &port.local_endpoints));
        }
        let reachable = !own.is_empty();
        if reachable {
            rules.chain(&external, own);
        }
        let mut all: Vec<String> = port.outer_ips().map(|address| at(&address)).collect();
        all.dedup();
        for key in all {
            if reachable {
                maps.service_ips.insert(key.clone(), goto(&external));
            }
            if port.external().is_empty() {
                maps.dead_ips.insert(key, dead.clone());
            }
        }
        if port.node_port != 0 {
            let key = format!("{protocol} . {}", port.node_port);
            if reachable {
                maps.node_ports.insert(key.clone(), goto(&external));
            }
            if port.external().is_empty() {
                maps.dead_node_ports.insert(key, dead);
            }
        }
    }

    /// Matches traffic that is not of pods, with a space behind it; none where that cannot be told.
    fn foreign(&self) -> Option<String> {
        match &self.settings.local {
            LocalTraffic::Unknown => None,
            LocalTraffic::Sources(ranges) => Some(format!("{} saddr != {} ", self.ip, set_of(ranges))),
            LocalTraffic::Interface(name) => Some(format!("iifname != {name:?} ")),
        }
    }

    fn native(&self) -> Option<String> {
        match &self.settings.local {
            LocalTraffic::Unknown => None,
            LocalTraffic::Sources(ranges) => Some(format!("{} saddr {} ", self.ip, set_of(ranges))),
            LocalTraffic::Interface(name) => Some(format!("iifname {name:?} ")),
        }
    }

    /// Sends a packet to the endpoint that its client had, or to a random one.
    fn choice(&self, port: &ServicePort, endpoints: &[Endpoint]) -> Vec<String> {
        let chains: Vec<String> = endpoints.iter().map(|e| endpoint_chain(&port.id, e)).collect();
        let mut rules = Vec::new();
        if port.affinity_seconds.is_some() {
            let sets = endpoints.iter().map(|endpoint| affinity_set(&port.id, endpoint));
            rules.extend(sets.zip(&chains).map(|(set, chain)| format!("{} saddr @{set} goto {chain}", self.ip)));
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
            let declaration = format!("type {}; flags dynamic, timeout; timeout {seconds}s;", self.address);
            rules.sets.insert(set, Set { map: false, declaration, elements: BTreeMap::new() });
        }
        own.push(format!("meta l4proto {} dnat to {}", port.id.protocol.as_str(), endpoint.socket()));
        rules.chain(endpoint_chain(&port.id, &endpoint), own);
    }
}

/// All traffic goes to the same few endpoints, each time to any of them.
fn is_plain(port: &ServicePort) -> bool {
    let has_policy = port.is_external() && (port.external_local || port.internal_local);
    port.affinity_seconds.is_none() && !has_policy && port.internal().len() <= SLOTS
}

fn set_of(ranges: &[Cidr]) -> String {
    let texts: Vec<String> = ranges.iter().map(Cidr::to_string).collect();
    format!("{{ {} }}", texts.join(", "))
}

fn endpoint_chain(id: &PortId, endpoint: &Endpoint) -> String {
    chain_name("endpoint", &format!("{id}__{}/{}", endpoint.ip.to_string().replace(':', "."), endpoint.port))
}

fn affinity_set(id: &PortId, endpoint: &Endpoint) -> String {
    // Sets have shorter names than chains in older kernels.
    let chain = endpoint_chain(id, endpoint);
    format!("affinity-{}", &chain["endpoint-".len().."endpoint-".len() + HASH_LENGTH])
}

/// `service-HASH-ns/name/tcp/port`: the hash makes it unique, the rest is for people and may be cut.
fn chain_name(kind: &str, id: &impl Display) -> String {
    let id = id.to_string();
    let hash = component_base::nftables::hash(&id);
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
    use crate::{
        model::tests::{gallery, port},
        settings::tests::settings,
    };

    #[test]
    fn an_empty_model_gives_the_frame() {
        insta::assert_snapshot!(render(&[], &settings()).create(&table(false)));
    }

    #[test]
    fn all_that_the_model_can_say() {
        insta::assert_snapshot!(parts(&gallery(), &settings()).update_from(&Ruleset::default(), &table(false)));
    }

    #[test]
    fn an_endpoint_more_touches_its_service_only() {
        let (mut before, mut after) = (port("web", &["10.244.0.2"]), port("web", &["10.244.0.2", "10.244.1.2"]));
        let shared = update([&before], [&after], &settings());
        (before.affinity_seconds, after.affinity_seconds) = (Some(60), Some(60));
        insta::assert_snapshot!(format!("{shared}\n{}", update([&before], [&after], &settings())));
    }

    #[test]
    fn a_port_that_grows_beyond_the_slots_gets_chains_of_its_own() {
        let ips: Vec<String> = (0..=SLOTS).map(|last| format!("10.244.0.{last}")).collect();
        let ips: Vec<&str> = ips.iter().map(String::as_str).collect();
        let (few, many) = (port("web", &ips[1..]), port("web", &ips));
        assert_eq!((is_plain(&few), is_plain(&many)), (true, false));
        let grown = update([&few], [&many], &settings());
        assert!(grown.contains("delete element ip kube-proxy endpoints-15 { 10.96.0.5 . tcp . 80"), "{grown}");
        assert!(grown.contains(&format!("numgen random mod {} vmap", SLOTS + 1)), "{grown}");
    }

    #[test]
    fn the_parts_of_two_models_differ_as_the_wholes_do() {
        let all = gallery();
        for (old, new) in [(&all[..3], &all[1..]), (&all[..], &all[..1]), (&[][..], &all[..])] {
            let whole = render(new, &settings()).update_from(&render(old, &settings()), "t");
            assert_eq!(parts(new, &settings()).update_from(&parts(old, &settings()), "t"), whole);
        }
    }

    #[test]
    fn long_names_are_cut_and_stay_unique() {
        let long = "x".repeat(200);
        let (a, b) = (chain_name("service", &format!("{long}a")), chain_name("service", &format!("{long}b")));
        assert!(a.len() <= NAME_MAX && a != b);
    }
}
