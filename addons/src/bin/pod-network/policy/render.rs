//! The rules of compiled policies, as a table of nftables: pure; a golden file shows it.
//!
//! What is compared is what connection tracking remembers of a packet's connection: who began it, who answers (behind a
//! Service's address), at which port. So both directions of every packet are judged alike, at any time: what a policy no
//! longer allows ends, and answers need no rule of their own. Only forwarded packets are judged: what the node itself says
//! to its pods (the kubelet's probes, pods on its network), and they to it, always passes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use component_base::cidr::Cidr;
use component_base::nftables::{Ruleset, Set};

use super::compile::{Compiled, Direction, Matcher, PeerMatch, PortMatch};

pub(crate) const TABLE: &str = "inet pilothouse-network-policy";
/// The chain by which the table is known.
pub(crate) const LANDMARK: &str = "forward";

/// The table of both families; empty, so that no packet is looked at, where no policy holds.
pub(crate) fn render(families: &[(bool, Compiled)]) -> Ruleset {
    let mut rules = Ruleset::default();
    let mut forward = vec!["ct state invalid drop".to_owned(), "ct state related accept".to_owned()];
    for (ipv6, compiled) in families {
        family(&mut rules, &mut forward, compiled, *ipv6);
    }
    let idle = families.iter().all(|(_, compiled)| compiled.subjects.is_empty() && compiled.awaited.is_empty());
    // Behind the rewriting of addresses, beside others' filters.
    let rules_of_forward = if idle { Vec::new() } else { forward };
    rules.base_chain(LANDMARK, "type filter hook forward priority 0; policy accept;", rules_of_forward);
    rules
}

fn family(rules: &mut Ruleset, forward: &mut Vec<String>, compiled: &Compiled, ipv6: bool) {
    let (ip, kind, six) = if ipv6 { ("ip6", "ipv6_addr", "-6") } else { ("ip", "ipv4_addr", "") };
    let begins = format!("ct original {ip} saddr");
    let answers = format!("ct reply {ip} saddr");
    let mut put = |name: &str, map: bool, declaration: String, elements: BTreeMap<String, String>| {
        rules.sets.insert(format!("{name}{six}"), Set { map, declaration, elements });
    };
    // A pod reaches itself, by way of a Service, whatever the policies say.
    let own: BTreeSet<&IpAddr> = compiled.subjects.keys().map(|(_, ip)| ip).collect();
    put(
        "itself",
        false,
        format!("type {kind} . {kind};"),
        own.iter().map(|ip| (format!("{ip} . {ip}"), String::new())).collect(),
    );
    forward.push(format!("{begins} . {answers} @itself{six} accept"));
    if !compiled.awaited.is_empty() {
        let known = compiled.known.iter().map(|ip| (ip.to_string(), String::new()));
        put("known", false, format!("type {kind};"), known.collect());
    }
    for (direction, name, end) in [(Direction::Egress, "egress", &begins), (Direction::Ingress, "ingress", &answers)] {
        let subjects = compiled.subjects.iter().filter(|((of, _), _)| *of == direction);
        let elements = subjects.map(|((_, ip), profile)| (ip.to_string(), format!("jump {profile}{six}"))).collect();
        put(name, true, format!("type {kind} : verdict;"), elements);
        if compiled.awaited.contains(&direction) {
            let unknown = |range: &Cidr| format!("{end} {range} {end} != @known{six} drop");
            forward.extend(compiled.ranges.iter().map(unknown));
        }
        forward.push(format!("{end} vmap @{name}{six}"));
    }
    for (name, members) in compiled.peers.iter().chain(&compiled.named) {
        put(name, false, format!("type {kind};"), members.iter().map(|ip| (ip.to_string(), String::new())).collect());
    }
    for (name, (direction, matchers)) in &compiled.profiles {
        let peer = if *direction == Direction::Ingress { &begins } else { &answers };
        let mut own: Vec<String> = matchers.iter().map(|matcher| rule(matcher, peer, &answers, six)).collect();
        own.push("drop".to_owned());
        rules.chain(format!("{name}{six}"), own);
    }
}

fn rule(matcher: &Matcher, peer: &str, answers: &str, six: &str) -> String {
    let peer = match &matcher.peer {
        PeerMatch::Any => String::new(),
        PeerMatch::Set(name) => format!("{peer} @{name}{six} "),
        PeerMatch::Blocks(spans) => format!("{peer} {{ {} }} ", shown(spans)),
    };
    let port = match &matcher.port {
        PortMatch::Any => String::new(),
        PortMatch::Numbers(protocol, spans) if spans.as_slice() == [(0, u16::MAX)] => {
            format!("meta l4proto {protocol} ")
        }
        PortMatch::Numbers(protocol, spans) => {
            format!("meta l4proto {protocol} ct reply proto-src {{ {} }} ", shown(spans))
        }
        PortMatch::Named(protocol, port, name) => {
            format!("meta l4proto {protocol} ct reply proto-src {port} {answers} @{name}{six} ")
        }
    };
    format!("{peer}{port}return")
}

fn shown<T: PartialEq + std::fmt::Display>(spans: &[(T, T)]) -> String {
    let one = |(first, last): &(T, T)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    spans.iter().map(one).collect::<Vec<_>>().join(", ")
}
