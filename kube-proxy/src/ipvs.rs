//! The mode ipvs: virtual servers of the kernel's load balancer, given to `ipvsadm --restore`; the Services' addresses on a
//! link of our own, so that their packets are taken in; and a small table of nftables that marks what must be masqueraded,
//! refuses what nobody answers, and keeps out whom a load balancer is closed to. Pure; golden files show what it gives.
use crate::{
    model::{Endpoint, Protocol, ServicePort},
    nftables::{HAIRPINS, table},
    settings::{LocalTraffic, Settings},
};
use component_base::{
    cidr::Cidr,
    nftables::{Ruleset, Set},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

/// The link that has the Services' addresses.
pub const LINK: &str = "kube-ipvs0";
/// Those of `ip_vs`, and of its modules by name.
pub const SCHEDULERS: [&str; 14] =
    ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "fo", "ovf", "mh", "twos"];

/// What only this mode reads of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IpvsSettings {
    pub scheduler: String,
    /// Virtual servers in these ranges are somebody else's.
    pub exclude: Vec<Cidr>,
    /// Seconds of idle TCP, of TCP behind a FIN, of UDP; 0 leaves what is.
    pub timeouts: [u64; 3],
}

/// Virtual servers and the addresses on the link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Servers {
    /// `-t 10.96.0.1:80` → how it is balanced, and its real servers.
    virtual_servers: BTreeMap<String, (String, BTreeSet<SocketAddr>)>,
    pub addresses: BTreeSet<IpAddr>,
}

/// The virtual servers of the ports; NodePorts are at `node_addresses`.
pub fn servers<'a>(
    ports: impl IntoIterator<Item = &'a ServicePort>,
    scheduler: &str,
    node_addresses: &[IpAddr],
) -> Servers {
    let mut made = Servers::default();
    for port in ports {
        let persistence = port.affinity_seconds.map_or(String::new(), |seconds| format!(" -p {seconds}"));
        let mut serve = |address: IpAddr, number: u16, endpoints: &[Endpoint]| {
            if endpoints.is_empty() {
                return;
            }
            let kind = match port.id.protocol {
                Protocol::Tcp => "-t",
                Protocol::Udp => "-u",
                Protocol::Sctp => "--sctp-service",
            };
            let server = format!("{kind} {}", SocketAddr::new(address, number));
            let real = endpoints.iter().map(Endpoint::socket).collect();
            made.virtual_servers.insert(server, (format!("-s {scheduler}{persistence}"), real));
        };
        serve(port.cluster_ip, port.port, port.internal());
        for address in port.outer_ips() {
            serve(address, port.port, port.external());
        }
        if port.node_port != 0 {
            node_addresses.iter().for_each(|address| serve(*address, port.node_port, port.external()));
        }
        // Also where nobody answers: then the refusal comes from here.
        made.addresses.extend(std::iter::once(port.cluster_ip).chain(port.outer_ips()));
    }
    made
}

/// Virtual servers, each with a real one of it that gets no new connections and keeps those that it has, until they end. As
/// `GracefulTerminationManager`. Datagrams know no end: their servers go at once.
pub type Leaving = BTreeSet<(String, SocketAddr)>;

impl Servers {
    /// One family's of what `ipvsadm --save -n` prints, and those that leave. Addresses of the link are not in it.
    pub fn parse(saved: &str, ipv6: bool, exclude: &[Cidr]) -> (Self, Leaving) {
        let (mut found, mut leaving) = (Self::default(), Leaving::new());
        for line in saved.lines() {
            let mut words = line.splitn(4, ' ');
            let (Some(verb), Some(kind), Some(at), rest) = (words.next(), words.next(), words.next(), words.next())
            else {
                continue;
            };
            let Ok(address) = at.parse::<SocketAddr>() else { continue };
            if address.is_ipv6() != ipv6 || exclude.iter().any(|range| range.contains(address.ip())) {
                continue;
            }
            let (server, rest) = (format!("{kind} {at}"), rest.unwrap_or(""));
            let entry = found.virtual_servers.entry(server.clone()).or_default();
            let real = rest.split(' ').nth(1).and_then(|real| real.parse::<SocketAddr>().ok());
            match verb {
                "-A" => entry.0 = rest.to_owned(),
                "-a" if rest.ends_with(" -w 0") => leaving.extend(real.map(|real| (server, real))),
                "-a" => entry.1.extend(real),
                _ => {}
            }
        }
        (found, leaving)
    }

    /// For `ipvsadm --restore`: what leads from `old`, where others leave, to this.
    pub fn update_from(&self, old: &Self, leaving: &mut Leaving) -> String {
        let mut out = String::new();
        // Writing to a string does not fail; hence the ignored results below.
        for server in old.virtual_servers.keys().filter(|server| !self.virtual_servers.contains_key(*server)) {
            leaving.retain(|(of, _)| of != server);
            let _ = writeln!(out, "-D {server}");
        }
        let none = (String::new(), BTreeSet::new());
        for (server, (balancing, real)) in &self.virtual_servers {
            let former = old.virtual_servers.get(server);
            if former.is_none_or(|(before, _)| before != balancing) {
                let _ = writeln!(out, "-{} {server} {balancing}", if former.is_none() { "A" } else { "E" });
            }
            let (_, before) = former.unwrap_or(&none);
            for real in before.difference(real) {
                let _ = if server.starts_with("-u ") {
                    writeln!(out, "-d {server} -r {real}")
                } else {
                    leaving.insert((server.clone(), *real));
                    writeln!(out, "-e {server} -r {real} -m -w 0")
                };
            }
            for real in real.difference(before) {
                let verb = if leaving.remove(&(server.clone(), *real)) { "-e" } else { "-a" };
                let _ = writeln!(out, "{verb} {server} -r {real} -m -w 1");
            }
        }
        out
    }
}

/// For `ipvsadm --restore`: takes away, of those that leave, the ones that have no connection in what `ipvsadm -L -n` prints.
pub fn sweep(listed: &str, leaving: &mut Leaving) -> String {
    let (mut out, mut server) = (String::new(), String::new());
    for line in listed.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["TCP", at, ..] => server = format!("-t {at}"),
            ["SCTP", at, ..] => server = format!("--sctp-service {at}"),
            ["->", real, _, _, "0", "0"] => {
                let Ok(real) = real.parse::<SocketAddr>() else { continue };
                if leaving.remove(&(server.clone(), real)) {
                    let _ = writeln!(out, "-d {server} -r {real}");
                }
            }
            ["->", ..] => {}
            _ => server.clear(),
        }
    }
    out
}

/// What leads from the companion of the ports `old` to that of the ports `new`, beside whatever others there are. As in the
/// mode nftables, what an endpoint sends to itself stays in its set.
pub fn update_companion<'a>(
    old: impl IntoIterator<Item = &'a ServicePort>,
    new: impl IntoIterator<Item = &'a ServicePort>,
    settings: &Settings,
) -> String {
    let mut before = companion(old, settings);
    before.sets.entry(HAIRPINS.to_owned()).or_default().elements.clear();
    companion(new, settings).update_from(&before, &table(settings.ipv6))
}

/// The table that goes with them: `nftables::TABLE`, of which only one mode's is there.
pub fn companion<'a>(ports: impl IntoIterator<Item = &'a ServicePort>, settings: &Settings) -> Ruleset {
    let (ip, address) = if settings.ipv6 { ("ip6", "ipv6_addr") } else { ("ip", "ipv4_addr") };
    let [mut inner, mut outer, mut node, mut dead, mut firewalls, mut hairpins] = [(); 6].map(|()| BTreeMap::new());
    let mut rules = Ruleset::default();
    for port in ports {
        let protocol = port.id.protocol.as_str();
        let at = |address: IpAddr| format!("{address} . {protocol} . {}", port.port);
        let verdict = if port.has_endpoints { "drop" } else { "goto reject-chain" };
        inner.insert(at(port.cluster_ip), String::new());
        if port.internal().is_empty() {
            dead.insert(at(port.cluster_ip), verdict.to_owned());
        }
        for address in port.outer_ips() {
            if port.external().is_empty() {
                dead.insert(at(address), verdict.to_owned());
            } else if !port.external_local {
                outer.insert(at(address), String::new());
            }
        }
        if port.node_port != 0 && !port.external_local {
            node.insert(format!("{protocol} . {}", port.node_port), String::new());
        }
        hairpins.extend(port.endpoints().iter().map(|e| (format!("{0} . {0}", e.ip), String::new())));
        if !port.source_ranges.is_empty() && !port.load_balancer_ips.is_empty() {
            let allowed: Vec<String> = port.source_ranges.iter().map(ToString::to_string).collect();
            let chain = format!("firewall-{}-{}-{}", port.id.namespace, port.id.name, port.port);
            rules.chain(&chain, vec![format!("{ip} saddr != {{ {} }} drop", allowed.join(", "))]);
            firewalls.extend(port.load_balancer_ips.iter().map(|a| (at(*a), format!("goto {chain}"))));
        }
    }
    for (name, map, key, elements) in [
        ("cluster-ips", false, format!("{address} . inet_proto . inet_service"), inner),
        ("outer-ips", false, format!("{address} . inet_proto . inet_service"), outer),
        ("node-ports", false, "inet_proto . inet_service".to_owned(), node),
        ("no-endpoint-services", true, format!("{address} . inet_proto . inet_service"), dead),
        ("firewall-ips", true, format!("{address} . inet_proto . inet_service"), firewalls),
        (HAIRPINS, false, format!("{address} . {address}"), hairpins),
    ] {
        let verdict = if map { " : verdict" } else { "" };
        rules.sets.insert(name.to_owned(), Set { map, declaration: format!("type {key}{verdict};"), elements });
    }
    let mark = settings.mark;
    let key = format!("{ip} daddr . meta l4proto . th dport");
    let foreign = match (&settings.local, settings.masquerade_all) {
        (_, true) => Some(String::new()),
        (LocalTraffic::Unknown, _) => None,
        (LocalTraffic::Sources(ranges), _) => {
            let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
            Some(format!("{ip} saddr != {{ {} }} ", ranges.join(", ")))
        }
        (LocalTraffic::Interface(name), _) => Some(format!("iifname != {name:?} ")),
    };
    let mut services: Vec<String> =
        foreign.map(|from| format!("{key} @cluster-ips {from}jump mark-for-masquerade")).into_iter().collect();
    services.push(format!("{key} @outer-ips jump mark-for-masquerade"));
    services.push("fib daddr type local meta l4proto . th dport @node-ports jump mark-for-masquerade".into());
    rules.chain("services", services);
    rules.chain("mark-for-masquerade", vec![format!("meta mark set meta mark | {mark:#x}")]);
    rules.chain("reject-chain", vec!["reject".into()]);
    let before = || vec![format!("ct state new {key} vmap @firewall-ips"), "jump services".to_owned()];
    rules.base_chain("filter-prerouting", "type filter hook prerouting priority -110;", before());
    rules.base_chain("filter-output", "type filter hook output priority -110;", before());
    let refuse = vec![format!("ct state new {key} vmap @no-endpoint-services")];
    // Ahead of the balancer, which takes packets in at this hook.
    rules.base_chain("filter-input", "type filter hook input priority -110;", refuse);
    let leaving = vec![
        format!("oifname != lo {ip} saddr . {ip} daddr @hairpins masquerade"),
        format!("meta mark & {mark:#x} == 0 return"),
        format!("meta mark set meta mark ^ {mark:#x}"),
        "masquerade fully-random".into(),
    ];
    rules.base_chain("nat-postrouting", "type nat hook postrouting priority 100;", leaving);
    rules
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::tests::{gallery, port},
        settings::tests::settings,
    };

    #[test]
    fn all_that_the_model_can_say() {
        let node = ["192.0.2.1".parse().unwrap()];
        let made = servers(&gallery(), "rr", &node);
        let addresses: Vec<String> = made.addresses.iter().map(ToString::to_string).collect();
        let orders = made.update_from(&Servers::default(), &mut Leaving::new());
        insta::assert_snapshot!(format!("{orders}\n{}", addresses.join("\n")));
        insta::assert_snapshot!(companion(&gallery(), &settings()).create(&table(false)));
    }

    #[test]
    fn a_change_of_a_port_touches_its_own_elements_only() {
        let (alive, mut dead) = (port("web", &["10.244.0.2"]), port("web", &[]));
        dead.has_endpoints = false;
        let dies = update_companion([&alive], [&dead], &settings());
        assert_eq!(
            dies,
            "add element ip kube-proxy no-endpoint-services { 10.96.0.5 . tcp . 80 : goto reject-chain }\n"
        );
        let lives = update_companion([&alive], [&alive], &settings());
        assert_eq!(lives, "add element ip kube-proxy hairpins { 10.244.0.2 . 10.244.0.2 }\n");
    }

    #[test]
    fn what_the_kernel_has_is_read_back() {
        let made = servers(&gallery(), "rr", &[]);
        let nobody = || (Servers::default(), Leaving::new());
        // `ipvsadm --save` prints what `--restore` reads.
        let saved = made.update_from(&Servers::default(), &mut Leaving::new());
        let (found, mut leaving) = Servers::parse(&saved, false, &[]);
        assert_eq!((made.update_from(&found, &mut leaving), leaving), (String::new(), Leaving::new()));
        assert_eq!(Servers::parse(&saved, true, &[]), nobody());
        let foreign = Servers::parse(&saved, false, &["0.0.0.0/0".parse().unwrap()]);
        assert_eq!(foreign, nobody(), "what is somebody else's is not touched");
    }

    #[test]
    fn only_differences_are_given_and_servers_leave_when_their_connections_have_ended() {
        let mut after = port("web", &["10.244.0.2", "10.244.1.2"]);
        let before = servers([&after], "rr", &[]);
        after.cluster_endpoints.remove(0);
        let (fewer, mut leaving) = (servers([&after], "rr", &[]), Leaving::new());
        assert_eq!(fewer.update_from(&before, &mut leaving), "-e -t 10.96.0.5:80 -r 10.244.0.2:8080 -m -w 0\n");
        let listed = |active: u8| {
            format!(
                "Prot LocalAddress:Port Scheduler Flags\n  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn\n\
                 TCP  10.96.0.5:80 rr\n  -> 10.244.0.2:8080              Masq    0      {active}          0         \n\
                 UDP  10.96.0.5:80 rr\n  -> 10.244.0.2:8080              Masq    0      0          0\n"
            )
        };
        assert_eq!(sweep(&listed(1), &mut leaving), "");
        let mut again = leaving.clone();
        assert_eq!(sweep(&listed(0), &mut leaving), "-d -t 10.96.0.5:80 -r 10.244.0.2:8080\n");
        assert_eq!(before.update_from(&fewer, &mut again), "-e -t 10.96.0.5:80 -r 10.244.0.2:8080 -m -w 1\n");
        assert_eq!((leaving, again), (Leaving::new(), Leaving::new()));
        after.affinity_seconds = Some(60);
        let orders = servers([&after], "lc", &[]).update_from(&fewer, &mut Leaving::new());
        assert_eq!(orders, "-E -t 10.96.0.5:80 -s lc -p 60\n");
        assert_eq!(Servers::default().update_from(&before, &mut Leaving::new()), "-D -t 10.96.0.5:80\n");
    }
}
