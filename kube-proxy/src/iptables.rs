//! The mode iptables: chains as Kubernetes names and cuts them, given to `iptables-restore` in one transaction. Pure; golden
//! files show what it gives.
//!
//! `KUBE-SERVICES` leads to a chain of each port (`KUBE-SVC-…`, for traffic from outside by way of `KUBE-EXT-…`), that to
//! one of an endpoint (`KUBE-SEP-…`). Chains of a port are its own and written whole; rules in chains that all share are
//! added and taken away one by one, so that only what changed is sent.
use crate::{
    model::{Endpoint, PortId, ServicePort},
    settings::{LocalTraffic, Settings},
};
use sha2::{Digest as _, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::IpAddr,
};

/// Chains of ports begin so; those that nobody names any more are removed at a full resync.
const OWNED: [&str; 5] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-FW-"];
const SHARED: [(&str, &[&str]); 2] = [
    (
        "filter",
        &[
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-FIREWALL",
            "KUBE-PROXY-FIREWALL",
            "KUBE-FORWARD",
            "KUBE-NODEPORTS",
            "KUBE-SERVICES",
        ],
    ),
    ("nat", &["KUBE-MARK-MASQ", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-SERVICES"]),
];
/// From where our chains are entered: table, built-in chain, rule.
pub const ENTRANCES: [(&str, &str, &str); 14] = [
    ("filter", "INPUT", "-m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES"),
    ("filter", "FORWARD", "-m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES"),
    ("filter", "FORWARD", "-m conntrack --ctstate NEW -j KUBE-SERVICES"),
    ("filter", "OUTPUT", "-m conntrack --ctstate NEW -j KUBE-SERVICES"),
    ("filter", "INPUT", "-j KUBE-NODEPORTS"),
    ("filter", "INPUT", "-m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL"),
    ("filter", "OUTPUT", "-m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL"),
    ("filter", "FORWARD", "-m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL"),
    ("filter", "FORWARD", "-j KUBE-FORWARD"),
    ("filter", "INPUT", "-j KUBE-FIREWALL"),
    ("filter", "OUTPUT", "-j KUBE-FIREWALL"),
    ("nat", "OUTPUT", "-j KUBE-SERVICES"),
    ("nat", "PREROUTING", "-j KUBE-SERVICES"),
    ("nat", "POSTROUTING", "-j KUBE-POSTROUTING"),
];

/// The rules of some ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    tables: BTreeMap<&'static str, Table>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Table {
    /// Chains of ports, whole.
    owned: BTreeMap<String, Vec<String>>,
    /// Single rules in shared chains: chain and rule.
    single: BTreeSet<(&'static str, String)>,
}

/// What the ports bring.
pub fn parts<'a>(ports: impl IntoIterator<Item = &'a ServicePort>, settings: &Settings) -> Rules {
    let mut rules = Rules::default();
    for port in ports {
        render(&mut rules, port, settings);
    }
    rules
}

/// Numbers of rules by table.
pub type Counts = BTreeMap<&'static str, i64>;

impl Rules {
    /// How many rules the ports have.
    pub fn count(&self) -> Counts {
        let rules = |table: &Table| table.owned.values().map(Vec::len).sum::<usize>() + table.single.len();
        SHARED.map(|(name, _)| (name, self.tables.get(name).map_or(0, rules) as i64)).into()
    }

    /// For `iptables-restore --noflush`: from nothing. `present` are the chains that the kernel has now, as (table, chain).
    pub fn create(&self, settings: &Settings, present: &BTreeSet<(String, String)>) -> String {
        let mut out = String::new();
        let none = Table::default();
        // Writing to a string does not fail; hence the ignored results below.
        for (name, shared) in SHARED {
            let table = self.tables.get(name).unwrap_or(&none);
            let _ = writeln!(out, "*{name}");
            let stale = |(at, chain): &&(String, String)| {
                at == name && OWNED.iter().any(|prefix| chain.starts_with(prefix)) && !table.owned.contains_key(chain)
            };
            let stale: Vec<&String> = present.iter().filter(stale).map(|(_, chain)| chain).collect();
            let owned = table.owned.keys().map(String::as_str);
            for chain in shared.iter().copied().chain(owned).chain(stale.iter().map(|chain| chain.as_str())) {
                let _ = writeln!(out, ":{chain} - [0:0]");
            }
            for (chain, rule) in table.single.iter().map(|(c, r)| (*c, r.clone())).chain(frame(name, settings)) {
                let _ = writeln!(out, "-A {chain} {rule}");
            }
            append_owned(&mut out, table.owned.iter());
            for chain in stale {
                let _ = writeln!(out, "-X {chain}");
            }
            out.push_str("COMMIT\n");
        }
        out
    }

    /// For `iptables-restore --noflush`: what leads from `old` to this; empty if they are equal.
    pub fn update_from(&self, old: &Self) -> String {
        let mut out = String::new();
        let none = Table::default();
        for (name, _) in SHARED {
            let (new, old) = (self.tables.get(name).unwrap_or(&none), old.tables.get(name).unwrap_or(&none));
            if new == old {
                continue;
            }
            let _ = writeln!(out, "*{name}");
            let gone: Vec<&String> = old.owned.keys().filter(|chain| !new.owned.contains_key(*chain)).collect();
            let changed = || new.owned.iter().filter(|(chain, rules)| old.owned.get(*chain) != Some(*rules));
            for chain in changed().map(|(chain, _)| chain).chain(gone.iter().copied()) {
                let _ = writeln!(out, ":{chain} - [0:0]");
            }
            for (chain, rule) in old.single.difference(&new.single) {
                let _ = writeln!(out, "-D {chain} {rule}");
            }
            // Before the last rule of `KUBE-SERVICES`; among themselves their order is indifferent.
            for (chain, rule) in new.single.difference(&old.single) {
                let _ = writeln!(out, "-I {chain} {rule}");
            }
            append_owned(&mut out, changed());
            for chain in gone {
                let _ = writeln!(out, "-X {chain}");
            }
            out.push_str("COMMIT\n");
        }
        out
    }
}

fn append_owned<'a>(out: &mut String, chains: impl Iterator<Item = (&'a String, &'a Vec<String>)>) {
    for (chain, rules) in chains {
        for rule in rules {
            let _ = writeln!(out, "-A {chain} {rule}");
        }
    }
}

/// How many rules are written by what is given to `iptables-restore`.
pub fn written(orders: &str) -> Counts {
    let mut counts: Counts = SHARED.map(|(name, _)| (name, 0)).into();
    let mut table = "";
    for line in orders.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if line.starts_with("-A ") || line.starts_with("-I ") {
            counts.entry(if table == "nat" { "nat" } else { "filter" }).and_modify(|count| *count += 1);
        }
    }
    counts
}

const DROP_INVALID: &str = "-m conntrack --ctstate INVALID -j DROP";

/// How many packets the rule against invalid ones has dropped, by what `iptables-save -c` prints.
pub fn dropped(saved: &str) -> u64 {
    let rule = format!("-A KUBE-FORWARD {DROP_INVALID}");
    let line = saved.lines().find(|line| line.ends_with(&rule));
    line.and_then(|line| line.strip_prefix('[')?.split_once(':')?.0.parse().ok()).unwrap_or(0)
}

/// Whether what `iptables-save -c` prints has the rules of our chains, of which ports have `total`, and the entrances to them.
pub fn holds(saved: &str, total: &Counts, settings: &Settings) -> bool {
    let (mut found, mut entrances, mut table) = (Counts::new(), 0, "");
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        }
        // In front are the counts of packets and bytes.
        let line = line.split_once("] ").map_or(line, |(_, rule)| rule);
        let Some((_, shared)) = SHARED.iter().find(|(name, _)| *name == table) else { continue };
        let Some((chain, _)) = line.strip_prefix("-A ").and_then(|rule| rule.split_once(' ')) else { continue };
        if shared.contains(&chain) || OWNED.iter().any(|prefix| chain.starts_with(prefix)) {
            *found.entry(if table == "nat" { "nat" } else { "filter" }).or_default() += 1;
        } else if shared.iter().any(|ours| line.ends_with(&format!("-j {ours}"))) {
            entrances += 1;
        }
    }
    let wanted = |table| total.get(table).copied().unwrap_or(0) + frame(table, settings).len() as i64;
    entrances >= ENTRANCES.len() && SHARED.iter().all(|(table, _)| found.get(table) == Some(&wanted(table)))
}

/// Takes all of it away again; `present` as for [`Rules::create`].
pub fn remove(present: &BTreeSet<(String, String)>) -> String {
    let mut out = String::new();
    for (name, shared) in SHARED {
        let ours = |(at, chain): &&(String, String)| {
            at == name && (shared.contains(&chain.as_str()) || OWNED.iter().any(|prefix| chain.starts_with(prefix)))
        };
        let ours: Vec<&String> = present.iter().filter(ours).map(|(_, chain)| chain).collect();
        let _ = writeln!(out, "*{name}");
        for chain in &ours {
            let _ = writeln!(out, ":{chain} - [0:0]");
        }
        for chain in &ours {
            let _ = writeln!(out, "-X {chain}");
        }
        out.push_str("COMMIT\n");
    }
    out
}

/// The chains in what `iptables-save` prints.
pub fn chains_of(saved: &str) -> BTreeSet<(String, String)> {
    let mut table = String::new();
    let mut found = BTreeSet::new();
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name.to_owned();
        } else if let Some(chain) = line.strip_prefix(':').and_then(|rest| rest.split(' ').next()) {
            found.insert((table.clone(), chain.to_owned()));
        }
    }
    found
}

/// The rules of shared chains that are there whatever Services there are, behind those of Services.
fn frame(table: &str, settings: &Settings) -> Vec<(&'static str, String)> {
    let mark = settings.mark;
    if table == "filter" {
        let mut rules = vec![
            ("KUBE-FORWARD", format!("-m mark --mark {mark:#x}/{mark:#x} -j ACCEPT")),
            ("KUBE-FORWARD", "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT".into()),
        ];
        if settings.drop_invalid {
            rules.insert(0, ("KUBE-FORWARD", DROP_INVALID.into()));
        }
        if settings.localhost_node_ports && !settings.ipv6 {
            // What the kernel is told to route for them is open to this host alone.
            let why = "-m comment --comment \"block incoming localnet connections\"";
            let fresh = "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP";
            rules.push(("KUBE-FIREWALL", format!("! -s 127.0.0.0/8 -d 127.0.0.0/8 {why} {fresh}")));
        }
        return rules;
    }
    let mut rules = vec![
        ("KUBE-MARK-MASQ", format!("-j MARK --or-mark {mark:#x}")),
        ("KUBE-POSTROUTING", format!("-m mark ! --mark {mark:#x}/{mark:#x} -j RETURN")),
        ("KUBE-POSTROUTING", format!("-j MARK --xor-mark {mark:#x}")),
        ("KUBE-POSTROUTING", "-j MASQUERADE --random-fully".into()),
    ];
    rules.extend(node_addresses(settings).into_iter().map(|at| {
        let comment = "kubernetes service nodeports; NOTE: this must be the last rule in this chain";
        ("KUBE-SERVICES", format!("-m comment --comment \"{comment}\" {at}-j KUBE-NODEPORTS"))
    }));
    rules
}

/// Matches, each with a space behind it, of packets to addresses that have NodePorts.
fn node_addresses(settings: &Settings) -> Vec<String> {
    let local = "-m addrtype --dst-type LOCAL ";
    match settings.node_port_addresses.as_slice() {
        [] if settings.localhost_node_ports => vec![local.to_owned()],
        [] => vec![format!("! -d {} {local}", if settings.ipv6 { "::1/128" } else { "127.0.0.0/8" })],
        ranges => ranges.iter().map(|range| format!("-d {range} {local}")).collect(),
    }
}

fn render(rules: &mut Rules, port: &ServicePort, settings: &Settings) {
    let protocol = port.id.protocol.as_str();
    let name = comment_name(&port.id);
    let hash = hash(&format!("{name}{protocol}"));
    let [cluster, local, external, firewall] = ["SVC", "SVL", "EXT", "FW"].map(|kind| format!("KUBE-{kind}-{hash}"));
    let to = |address: &IpAddr| format!("-d {}/{} ", address, if address.is_ipv4() { 32 } else { 128 });
    let rule = |why: &str, at: &str, port: u16, target: &str| {
        format!("-m comment --comment \"{name} {why}\" {at}-p {protocol} -m {protocol} --dport {port} -j {target}")
    };
    let dead = |policy_local: bool| match (port.has_endpoints, policy_local) {
        (false, _) => ("has no endpoints", "REJECT"),
        (true, _) => ("has no local endpoints", "DROP"),
    };
    let (native, foreign) = match &settings.local {
        LocalTraffic::Unknown => (None, None),
        LocalTraffic::Sources(ranges) => {
            let first = ranges.first();
            (first.map(|r| format!("-s {r} ")), first.map(|r| format!("! -s {r} ")))
        }
        LocalTraffic::Interface(name) => {
            let name = name.replace('*', "+");
            (Some(format!("-i {name} ")), Some(format!("! -i {name} ")))
        }
    };
    let table = |rules: &mut Rules, table: &'static str, chain: &'static str, rule: String| {
        rules.tables.entry(table).or_default().single.insert((chain, rule));
    };

    let internal = if port.internal_local { &local } else { &cluster };
    let to_cluster_ip = to(&port.cluster_ip);
    let mut choose = |chain: &str, endpoints: &[Endpoint]| {
        if endpoints.is_empty() {
            return;
        }
        let mut own = Vec::new();
        if chain == internal.as_str() {
            let from = if settings.masquerade_all { Some(String::new()) } else { foreign.clone() };
            own.extend(
                from.map(|from| rule("cluster IP", &format!("{from}{to_cluster_ip}"), port.port, "KUBE-MARK-MASQ")),
            );
        }
        let nat = &mut rules.tables.entry("nat").or_default().owned;
        own.extend(choice(port, &name, endpoints));
        nat.insert(chain.to_owned(), own);
        for endpoint in endpoints {
            nat.insert(endpoint_chain(&name, protocol, endpoint), endpoint_rules(port, &name, endpoint));
        }
    };
    let within = !port.internal_local || port.is_external();
    if within {
        choose(&cluster, &port.cluster_endpoints);
    }
    if port.internal_local || port.external_local && port.is_external() {
        choose(&local, &port.local_endpoints);
    }

    if port.health_check_port != 0 {
        // Whatever else the host lets in.
        let why = format!("-m comment --comment \"{name} health check node port\"");
        let accept = format!("{why} -p tcp -m tcp --dport {} -j ACCEPT", port.health_check_port);
        table(rules, "filter", "KUBE-NODEPORTS", accept);
    }
    if port.internal().is_empty() {
        let (why, verdict) = dead(port.internal_local);
        table(rules, "filter", "KUBE-SERVICES", rule(why, &to_cluster_ip, port.port, verdict));
    } else {
        table(rules, "nat", "KUBE-SERVICES", rule("cluster IP", &to_cluster_ip, port.port, internal));
    }
    if !port.is_external() {
        return;
    }

    let mut own = Vec::new();
    let because = |why: &str| format!("-m comment --comment \"{why} {name} external destinations\" ");
    let alive = !port.cluster_endpoints.is_empty();
    if port.external_local {
        if alive {
            own.extend(native.map(|from| format!("{}{from}-j {cluster}", because("pod traffic for"))));
            let from_node = "-m addrtype --src-type LOCAL ";
            own.push(format!("{}{from_node}-j KUBE-MARK-MASQ", because("masquerade LOCAL traffic for")));
            own.push(format!("{}{from_node}-j {cluster}", because("route LOCAL traffic for")));
        }
        own.extend((!port.local_endpoints.is_empty()).then(|| format!("-j {local}")));
    } else if alive {
        own.extend([format!("{}-j KUBE-MARK-MASQ", because("masquerade traffic for")), format!("-j {cluster}")]);
    }
    let reachable = !own.is_empty();
    let guarded = !port.source_ranges.is_empty() && !port.load_balancer_ips.is_empty();
    if reachable {
        let nat = rules.tables.entry("nat").or_default();
        if guarded {
            let itself = port.load_balancer_ips.iter().filter(|_| settings.admits_itself(&port.source_ranges));
            let hosts = itself.map(|ip| component_base::cidr::Cidr::host(*ip));
            let allowed = port.source_ranges.iter().copied().chain(hosts);
            let fw = allowed.map(|r| format!("-m comment --comment \"{name} loadbalancer IP\" -s {r} -j {external}"));
            nat.owned.insert(firewall.clone(), fw.collect());
        }
        nat.owned.insert(external.clone(), own);
    }
    let (why, verdict) = dead(port.external_local);
    for (address, kind, target, guarded) in
        port.external_ips.iter().map(|ip| (ip, "external IP", &external, false)).chain(
            port.load_balancer_ips
                .iter()
                .map(|ip| (ip, "loadbalancer IP", if guarded { &firewall } else { &external }, guarded)),
        )
    {
        let at = to(address);
        if reachable {
            table(rules, "nat", "KUBE-SERVICES", rule(kind, &at, port.port, target));
            if guarded {
                let why = format!("traffic not accepted by {firewall}");
                table(rules, "filter", "KUBE-PROXY-FIREWALL", rule(&why, &at, port.port, "DROP"));
            }
        }
        if port.external().is_empty() {
            table(rules, "filter", "KUBE-EXTERNAL-SERVICES", rule(why, &at, port.port, verdict));
        }
    }
    if port.node_port != 0 {
        if reachable {
            table(rules, "nat", "KUBE-NODEPORTS", rule("nodePort", "", port.node_port, &external));
        }
        if port.external().is_empty() {
            let at = "-m addrtype --dst-type LOCAL ";
            table(rules, "filter", "KUBE-EXTERNAL-SERVICES", rule(why, at, port.node_port, verdict));
        }
    }
}

/// To the endpoint that the client had, else with equal chances: the first of n takes an nth, the next an (n-1)th of the rest.
fn choice(port: &ServicePort, name: &str, endpoints: &[Endpoint]) -> Vec<String> {
    let chain = |endpoint: &Endpoint| endpoint_chain(name, port.id.protocol.as_str(), endpoint);
    let comment = |endpoint: &Endpoint| format!("-m comment --comment \"{name} -> {}\" ", endpoint.socket());
    let mut rules = Vec::new();
    if let Some(seconds) = port.affinity_seconds {
        rules.extend(endpoints.iter().map(|e| {
            let chain = chain(e);
            format!("{}-m recent --name {chain} --rcheck --seconds {seconds} --reap -j {chain}", comment(e))
        }));
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        let left = endpoints.len() - index;
        let chance = match left {
            1 => String::new(),
            _ => format!("-m statistic --mode random --probability {:.10} ", 1.0 / left as f64),
        };
        rules.push(format!("{}{chance}-j {}", comment(endpoint), chain(endpoint)));
    }
    rules
}

fn endpoint_rules(port: &ServicePort, name: &str, endpoint: &Endpoint) -> Vec<String> {
    let protocol = port.id.protocol.as_str();
    let bits = if endpoint.ip.is_ipv4() { 32 } else { 128 };
    let remember = match port.affinity_seconds {
        Some(_) => format!("-m recent --name {} --set ", endpoint_chain(name, protocol, endpoint)),
        None => String::new(),
    };
    vec![
        format!("-m comment --comment \"{name}\" -s {}/{bits} -j KUBE-MARK-MASQ", endpoint.ip),
        format!(
            "-m comment --comment \"{name}\" {remember}-p {protocol} -m {protocol} -j DNAT --to-destination {}",
            endpoint.socket()
        ),
    ]
}

/// `ns/name:port`, as Kubernetes names a port in comments and hashes. As `ServicePortName.String`.
fn comment_name(id: &PortId) -> String {
    let colon = if id.port_name.is_empty() { "" } else { ":" };
    format!("{}/{}{colon}{}", id.namespace, id.name, id.port_name)
}

fn endpoint_chain(name: &str, protocol: &str, endpoint: &Endpoint) -> String {
    format!("KUBE-SEP-{}", hash(&format!("{name}{protocol}{}", endpoint.socket())))
}

/// As `portProtoHash`: 16 characters of base 32 of SHA-256.
fn hash(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    let bits = digest.iter().take(10).fold(0u128, |all, byte| all << 8 | u128::from(*byte));
    (0..16).map(|i| char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[(bits >> (75 - 5 * i)) as usize & 31])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::tests::{gallery, port},
        settings::tests::settings,
    };

    #[test]
    fn an_empty_model_gives_the_frame_and_removes_what_is_stale() {
        let present = chains_of("*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SVC-OLD - [0:0]\nCOMMIT\n");
        insta::assert_snapshot!(parts(&[], &settings()).create(&settings(), &present));
    }

    #[test]
    fn all_that_the_model_can_say() {
        insta::assert_snapshot!(parts(&gallery(), &settings()).update_from(&Rules::default()));
    }

    #[test]
    fn a_balancer_s_address_speaks_to_itself_where_the_node_may_speak_to_it() {
        let gallery = gallery();
        let itself = |node: Option<[u8; 4]>| {
            let settings = Settings { node_address: node.map(Into::into), ..settings() };
            let orders = parts(&gallery, &settings).create(&settings, &BTreeSet::new());
            orders.contains("loadbalancer IP\" -s 203.0.113.7/32 -j KUBE-EXT-")
        };
        assert!(itself(Some([192, 0, 2, 1])) && !itself(Some([10, 0, 0, 1])) && !itself(None));
    }

    #[test]
    fn an_endpoint_more_touches_its_service_only() {
        let (before, after) = (port("web", &["10.244.0.2"]), port("web", &["10.244.0.2", "10.244.1.2"]));
        insta::assert_snapshot!(parts([&after], &settings()).update_from(&parts([&before], &settings())));
    }

    #[test]
    fn what_is_missing_shows_in_what_is_saved() {
        let (total, orders) = (parts(&gallery(), &settings()).count(), parts(&gallery(), &settings()));
        let entrance = |(table, chain, rule): &(&str, &str, &str)| format!("*{table}\n[7:9] -A {chain} {rule}\n");
        let orders = orders.create(&settings(), &BTreeSet::new()).replace("\n-A ", "\n[3:180] -A ");
        let saved = ENTRANCES.iter().map(entrance).collect::<String>() + &orders;
        assert!(holds(&saved, &total, &settings()));
        assert_eq!(dropped(&saved), 3);
        for gone in ["-A KUBE-MARK-MASQ -j", "-A INPUT -j KUBE-FIREWALL", "-A KUBE-SVC-"] {
            assert!(saved.contains(gone) && !holds(&saved.replacen(gone, "#", 1), &total, &settings()), "{gone}");
        }
    }

    #[test]
    fn chains_are_named_as_kubernetes_names_them() {
        // What every cluster has: the Service default/kubernetes.
        let id = PortId {
            namespace: "default".into(),
            name: "kubernetes".into(),
            protocol: crate::model::Protocol::Tcp,
            port_name: "https".into(),
        };
        assert_eq!(hash(&format!("{}tcp", comment_name(&id))), "NPX46M4PTMTKRN6Y");
    }
}
