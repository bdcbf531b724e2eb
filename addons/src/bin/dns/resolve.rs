//! What a question means, by Kubernetes' DNS specification 1.1.0: pure, over the [`World`].

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use clap::ValueEnum;
use hickory_proto::rr::rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use crate::hosts::Hosts;
use crate::world::{Endpoint, Port, ServiceKind, World, dashed};

/// The version of the specification that is followed, as the record `dns-version` tells it.
const DNS_SCHEMA_VERSION: &str = "1.1.0";
/// How long an absence may be remembered, in seconds.
const NEGATIVE_TTL: u32 = 5;

/// What is answered to names of pods (`10-0-0-5.ns.pod`). As CoreDNS' `pods`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pods {
    Disabled,
    /// The address that the name spells, whoever has it.
    #[default]
    Insecure,
    /// Only where a pod of the namespace has it.
    Verified,
}

/// What of the cluster is answered, beside the specification.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    pub pods: Pods,
    /// A Service without ready endpoints is not there.
    pub ignore_empty_service: bool,
    /// Names of the zone that are not there are asked upstream.
    pub fallthrough: bool,
}

/// The zone that is answered for.
#[derive(Debug, Clone)]
pub(crate) struct Zone {
    pub name: Name,
    /// The seconds for which an answer may be remembered.
    pub ttl: u32,
    /// The addresses of the DNS server, for `ns.dns.<zone>`, where it has no Service.
    pub server_addresses: Vec<IpAddr>,
    pub options: Options,
}

/// What the world says to a question.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    Answer {
        answers: Vec<Record>,
        additionals: Vec<Record>,
    },
    /// The name exists, with other types only.
    NoData,
    NoSuchName,
    /// An ExternalName: the record, and where to go on.
    Alias {
        cname: Record,
        target: Name,
    },
    /// Not of this zone: upstream may know.
    NotOurs,
}

/// What is at a name.
enum Place {
    Missing,
    /// Only there because there are names below it.
    Between,
    Apex,
    Version,
    Host(Vec<IpAddr>),
    /// Asked for where ports are.
    Targets(Vec<Target>),
    Alias(String),
}

/// Where SRV records point to.
struct Target {
    host: Name,
    ports: BTreeSet<u16>,
    addresses: BTreeSet<IpAddr>,
}

// === impl Zone ===

impl Zone {
    pub(crate) fn new(domain: &str, ttl: u32, server_addresses: Vec<IpAddr>, options: Options) -> Result<Zone, String> {
        let mut name = Name::from_str(domain).map_err(|error| format!("{domain:?} is not a domain: {error}"))?;
        name.set_fqdn(true);
        if name.is_root() {
            return Err("the cluster's domain must not be empty".into());
        }
        Ok(Zone { name: name.to_lowercase(), ttl, server_addresses, options })
    }

    /// Answer `name`, `kind`.
    pub(crate) fn resolve(&self, world: &World, name: &Name, kind: RecordType) -> Outcome {
        if !self.name.zone_of(name) {
            return self.reverse(world, name, kind);
        }
        // The labels below the zone, the nearest to it first.
        let depth = usize::from(name.num_labels() - self.name.num_labels());
        let mut labels: Vec<Cow<'_, str>> = name.iter().take(depth).map(lowercase).collect();
        labels.reverse();
        let labels: Vec<&str> = labels.iter().map(AsRef::as_ref).collect();
        match self.locate(world, &labels, kind) {
            Place::Missing if self.options.fallthrough => Outcome::NotOurs,
            Place::Missing => Outcome::NoSuchName,
            Place::Between => Outcome::NoData,
            Place::Apex => self.apex(world, name, kind),
            Place::Version => match kind {
                RecordType::TXT => {
                    self.answer([self.record(name, RData::TXT(TXT::new(vec![DNS_SCHEMA_VERSION.into()])))], [])
                }
                _ => Outcome::NoData,
            },
            Place::Host(addresses) => self.answer(self.addresses(name, &addresses, kind), []),
            Place::Targets(targets) if kind == RecordType::SRV => self.srv(name, targets),
            Place::Targets(_) => Outcome::NoData,
            Place::Alias(target) => match Name::from_str(&target) {
                Ok(mut target) => {
                    target.set_fqdn(true);
                    let cname = self.record(name, RData::CNAME(CNAME(target.clone())));
                    if kind == RecordType::CNAME { self.answer([cname], []) } else { Outcome::Alias { cname, target } }
                }
                Err(_) => Outcome::NoData,
            },
        }
    }

    /// The authority of the zone: what goes with a negative answer.
    pub(crate) fn soa(&self) -> Record {
        let below = |labels: &str| Name::from_str(labels).and_then(|name| name.append_domain(&self.name));
        let server = below("ns.dns").unwrap_or_else(|_| self.name.clone());
        let mailbox = below("hostmaster").unwrap_or_else(|_| self.name.clone());
        // Nobody transfers the zone, so the serial says no more than the day.
        let serial = u32::try_from(jiff::Timestamp::now().as_second() / 86_400).unwrap_or(1);
        let soa = SOA::new(server, mailbox, serial, 7200, 1800, 86_400, NEGATIVE_TTL);
        Record::from_rdata(self.name.clone(), NEGATIVE_TTL, RData::SOA(soa))
    }

    /// Where the cluster finds its DNS server: at its Service's address.
    fn server_addresses(&self, world: &World) -> Vec<IpAddr> {
        match world.service("kube-system", "kube-dns").map(|service| &service.kind) {
            Some(ServiceKind::ClusterIp(addresses)) if !addresses.is_empty() => addresses.clone(),
            _ => self.server_addresses.clone(),
        }
    }

    fn locate(&self, world: &World, labels: &[&str], kind: RecordType) -> Place {
        match labels {
            [] => Place::Apex,
            ["dns-version"] => Place::Version,
            ["dns"] | ["svc"] | ["pod"] => Place::Between,
            ["dns", "ns"] => Place::Host(self.server_addresses(world)),
            ["svc" | "pod", namespace] if world.has_namespace(namespace) => Place::Between,
            ["pod", namespace, address] if world.has_namespace(namespace) => {
                let is_there = |address: &IpAddr| match self.options.pods {
                    Pods::Disabled => false,
                    Pods::Insecure => true,
                    Pods::Verified => world.has_pod(namespace, *address),
                };
                undashed(address).filter(is_there).map_or(Place::Missing, |address| Place::Host(vec![address]))
            }
            ["svc", namespace, service] => self.service(world, namespace, service, kind),
            ["svc", namespace, service, protocol] if protocol.starts_with('_') => {
                let wanted = |port: &Port| port.protocol == protocol[1..] && !port.name.is_empty();
                if self.targets(world, namespace, service, wanted).is_empty() { Place::Missing } else { Place::Between }
            }
            ["svc", namespace, service, protocol, port] if protocol.starts_with('_') && port.starts_with('_') => {
                let wanted = |candidate: &Port| {
                    candidate.protocol == protocol[1..] && candidate.name == port[1..] && !candidate.name.is_empty()
                };
                let targets = self.targets(world, namespace, service, wanted);
                if targets.is_empty() { Place::Missing } else { Place::Targets(targets) }
            }
            ["svc", namespace, service, endpoint] => {
                let addresses = endpoints(world, namespace, service)
                    .filter(|(_, candidate)| candidate.name == *endpoint)
                    .map(|(_, endpoint)| endpoint.address);
                let addresses = distinct(addresses);
                let alias =
                    world.service(namespace, service).is_none_or(|s| matches!(s.kind, ServiceKind::ExternalName(_)));
                if alias || addresses.is_empty() { Place::Missing } else { Place::Host(addresses) }
            }
            _ => Place::Missing,
        }
    }

    /// At the name of a Service itself.
    fn service(&self, world: &World, namespace: &str, name: &str, kind: RecordType) -> Place {
        let Some(service) = world.service(namespace, name) else { return Place::Missing };
        let is_empty = || endpoints(world, namespace, name).next().is_none();
        match &service.kind {
            // An address is no name that another could stand for.
            ServiceKind::ExternalName(target) if target.parse::<IpAddr>().is_ok() => Place::Missing,
            ServiceKind::ExternalName(target) => Place::Alias(target.clone()),
            ServiceKind::ClusterIp(_) if self.options.ignore_empty_service && is_empty() => Place::Missing,
            // By the specification: without ready endpoints the name is not there.
            ServiceKind::Headless if is_empty() => Place::Missing,
            _ if kind == RecordType::SRV => Place::Targets(self.targets(world, namespace, name, |_| true)),
            ServiceKind::ClusterIp(addresses) => Place::Host(addresses.clone()),
            ServiceKind::Headless => {
                Place::Host(distinct(endpoints(world, namespace, name).map(|(_, endpoint)| endpoint.address)))
            }
        }
    }

    /// Where the wanted ports of a Service are: at its own name, or at the names of its endpoints.
    fn targets(&self, world: &World, namespace: &str, name: &str, wanted: impl Fn(&Port) -> bool) -> Vec<Target> {
        let Some(service) = world.service(namespace, name) else { return Vec::new() };
        let numbers = |ports: &[Port]| ports.iter().filter(|port| wanted(port)).map(|port| port.port).collect();
        let own = format!("{name}.{namespace}.svc");
        let mut hosts: BTreeMap<String, (BTreeSet<u16>, BTreeSet<IpAddr>)> = BTreeMap::new();
        match &service.kind {
            ServiceKind::ExternalName(_) => {}
            ServiceKind::ClusterIp(addresses) => {
                hosts.insert(own, (numbers(&service.ports), addresses.iter().copied().collect()));
            }
            ServiceKind::Headless => {
                for (ports, endpoint) in endpoints(world, namespace, name) {
                    let host = hosts.entry(format!("{}.{own}", endpoint.name)).or_default();
                    host.0.append(&mut numbers(ports));
                    host.1.insert(endpoint.address);
                }
            }
        }
        let named =
            hosts.into_iter().filter(|(_, (ports, _))| !ports.is_empty()).filter_map(|(host, (ports, addresses))| {
                let host = Name::from_str(&host).and_then(|host| host.append_domain(&self.name)).ok()?;
                Some(Target { host, ports, addresses })
            });
        named.collect()
    }

    /// Names of addresses. What the cluster does not know is left to upstream.
    fn reverse(&self, world: &World, name: &Name, kind: RecordType) -> Outcome {
        let Some(address) = reverse_address(name) else { return Outcome::NotOurs };
        let mut names = Vec::new();
        if let Some(service) = world.service_at(address) {
            names.push(format!("{}.{}.svc", service.name, service.namespace));
        } else {
            for (service, endpoint) in world.endpoints_at(address) {
                match world.service(&service.namespace, &service.name).map(|service| &service.kind) {
                    Some(ServiceKind::Headless) => {}
                    // Behind an address of the Service it is known where it has a name of its own.
                    Some(ServiceKind::ClusterIp(_)) if endpoint != dashed(address) => {}
                    _ => continue,
                }
                names.push(format!("{endpoint}.{}.{}.svc", service.name, service.namespace));
            }
        }
        if names.is_empty() {
            return Outcome::NotOurs;
        }
        if kind != RecordType::PTR && kind != RecordType::ANY {
            return Outcome::NoData;
        }
        let records = names.iter().filter_map(|labels| {
            let target = Name::from_str(labels).ok()?.append_domain(&self.name).ok()?;
            Some(self.record(name, RData::PTR(PTR(target))))
        });
        self.answer(records.collect::<Vec<_>>(), [])
    }

    fn apex(&self, world: &World, name: &Name, kind: RecordType) -> Outcome {
        let server = Name::from_str("ns.dns").and_then(|server| server.append_domain(&self.name));
        match (kind, server) {
            (RecordType::SOA, _) => self.answer([self.soa()], []),
            (RecordType::NS, Ok(server)) => {
                let glue = self.server_addresses(world);
                let glue = glue.into_iter().map(|address| self.record(&server, address_data(address)));
                let glue: Vec<Record> = glue.collect();
                self.answer([self.record(name, RData::NS(NS(server)))], glue)
            }
            _ => Outcome::NoData,
        }
    }

    fn srv(&self, name: &Name, targets: Vec<Target>) -> Outcome {
        // Equal shares, as far as whole numbers go.
        let count = targets.iter().map(|target| target.ports.len()).sum::<usize>();
        let weight = u16::try_from(100 / count.max(1)).unwrap_or(1).max(1);
        let (mut answers, mut additionals) = (Vec::new(), Vec::new());
        for Target { host, ports, addresses } in targets {
            additionals.extend(addresses.into_iter().map(|address| self.record(&host, address_data(address))));
            let srv = ports.into_iter().map(|port| SRV::new(0, weight, port, host.clone()));
            answers.extend(srv.map(|srv| self.record(name, RData::SRV(srv))));
        }
        self.answer(answers, additionals)
    }

    /// Of a hosts file: what it says of a name, or of an address. None where it says nothing.
    pub(crate) fn hosts(&self, hosts: &Hosts, name: &Name, kind: RecordType) -> Option<Outcome> {
        if let Some(addresses) = hosts.addresses(name) {
            return Some(self.answer(self.addresses(name, addresses, kind), []));
        }
        let names = hosts.names(reverse_address(name).filter(|_| kind == RecordType::PTR)?)?;
        let records: Vec<Record> = names.iter().map(|host| self.record(name, RData::PTR(PTR(host.clone())))).collect();
        Some(self.answer(records, []))
    }

    fn addresses(&self, name: &Name, addresses: &[IpAddr], kind: RecordType) -> Vec<Record> {
        let fits = |address: &&IpAddr| match kind {
            RecordType::A => address.is_ipv4(),
            RecordType::AAAA => address.is_ipv6(),
            RecordType::ANY => true,
            _ => false,
        };
        addresses.iter().filter(fits).map(|address| self.record(name, address_data(*address))).collect()
    }

    fn record(&self, name: &Name, data: RData) -> Record {
        Record::from_rdata(name.clone(), self.ttl, data)
    }

    fn answer(&self, answers: impl Into<Vec<Record>>, additionals: impl Into<Vec<Record>>) -> Outcome {
        let answers = answers.into();
        if answers.is_empty() { Outcome::NoData } else { Outcome::Answer { answers, additionals: additionals.into() } }
    }
}

fn endpoints<'w>(world: &'w World, namespace: &str, service: &str) -> impl Iterator<Item = (&'w [Port], &'w Endpoint)> {
    world
        .slices(namespace, service)
        .flat_map(|slice| slice.endpoints.iter().map(move |endpoint| (slice.ports.as_slice(), endpoint)))
}

/// Each once, in order.
fn distinct(addresses: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = addresses.collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// A label as names are kept here.
fn lowercase(label: &[u8]) -> Cow<'_, str> {
    match str::from_utf8(label) {
        Ok(label) if !label.bytes().any(|byte| byte.is_ascii_uppercase()) => label.into(),
        _ => String::from_utf8_lossy(label).to_lowercase().into(),
    }
}

fn address_data(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    }
}

/// The address that a pod's label stands for: `10-0-0-5`, `fd00--5`. Only its own spelling counts.
fn undashed(label: &str) -> Option<IpAddr> {
    let address = match label.replace('-', ".").parse::<Ipv4Addr>() {
        Ok(address) => IpAddr::V4(address),
        Err(_) => IpAddr::V6(label.replace('-', ":").parse::<Ipv6Addr>().ok()?),
    };
    (dashed(address) == label || address.is_ipv6()).then_some(address)
}

/// The address of a whole reverse name (`5.0.0.10.in-addr.arpa.`).
fn reverse_address(name: &Name) -> Option<IpAddr> {
    let net = name.parse_arpa_name().ok()?;
    let whole = if net.addr().is_ipv4() { 32 } else { 128 };
    (net.prefix_len() == whole).then(|| net.addr())
}

#[cfg(test)]
mod tests {
    use apimachinery::meta::NamespacedName;
    use serde_json::json;

    use super::*;
    use crate::world::tests::slice;

    fn world() -> World {
        let mut world = World::default();
        let services = [
            (
                "web",
                json!({"clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20", "fd00::20"], "ports": [
                {"name": "http", "port": 80, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}]}),
            ),
            ("db", json!({"clusterIP": "None", "ports": [{"name": "http", "port": 80}]})),
            ("empty", json!({"clusterIP": "None"})),
            ("ext", json!({"type": "ExternalName", "externalName": "example.com"})),
            ("address", json!({"type": "ExternalName", "externalName": "192.0.2.7"})),
            ("inner", json!({"type": "ExternalName", "externalName": "web.ns.svc.cluster.local"})),
        ];
        for (name, spec) in services {
            let service = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).expect("a service");
            world.set_service(NamespacedName::new("ns", name), Some(&service));
        }
        world.set_namespace("ns", true);
        let endpoints = json!([{"addresses": ["10.1.0.1"], "hostname": "db-0"}, {"addresses": ["10.1.0.2"]}]);
        world.set_slice(&NamespacedName::new("ns", "db-1"), None, Some(&slice("db-1", "db", endpoints)));
        world
    }

    /// An answer in short: data of answers, `+` those of additionals.
    fn ask(name: &str, kind: RecordType) -> String {
        ask_with(Options::default(), &world(), name, kind)
    }

    fn ask_with(options: Options, world: &World, name: &str, kind: RecordType) -> String {
        let server = vec!["10.96.0.10".parse().expect("an address")];
        let zone = Zone::new("cluster.local", 30, server, options).expect("a zone");
        let name = Name::from_str(name).expect("a name");
        let list =
            |records: &[Record]| records.iter().map(|record| record.data.to_string()).collect::<Vec<_>>().join(" | ");
        match zone.resolve(world, &name, kind) {
            Outcome::Answer { answers, additionals } if additionals.is_empty() => list(&answers),
            Outcome::Answer { answers, additionals } => format!("{} + {}", list(&answers), list(&additionals)),
            Outcome::NoData => "no data".into(),
            Outcome::NoSuchName => "no such name".into(),
            Outcome::Alias { target, .. } => format!("alias {target}"),
            Outcome::NotOurs => "not ours".into(),
        }
    }

    #[test]
    fn names_mean_what_the_specification_says() {
        use RecordType::{A, AAAA, ANY, CNAME, MX, NS, PTR, SOA, SRV, TXT};
        let cases = [
            ("web.ns.svc.cluster.local.", A, "10.96.0.20"),
            ("WEB.ns.SVC.Cluster.Local.", A, "10.96.0.20"),
            ("web.ns.svc.cluster.local.", AAAA, "fd00::20"),
            ("web.ns.svc.cluster.local.", ANY, "10.96.0.20 | fd00::20"),
            ("web.ns.svc.cluster.local.", MX, "no data"),
            (
                "web.ns.svc.cluster.local.",
                SRV,
                "0 50 53 web.ns.svc.cluster.local. | 0 50 80 web.ns.svc.cluster.local. + 10.96.0.20 | fd00::20",
            ),
            ("_http._tcp.web.ns.svc.cluster.local.", SRV, "0 100 80 web.ns.svc.cluster.local. + 10.96.0.20 | fd00::20"),
            ("_http._udp.web.ns.svc.cluster.local.", SRV, "no such name"),
            ("_none._tcp.web.ns.svc.cluster.local.", SRV, "no such name"),
            ("_tcp.web.ns.svc.cluster.local.", SRV, "no data"),
            ("_sctp.web.ns.svc.cluster.local.", SRV, "no such name"),
            ("none.ns.svc.cluster.local.", A, "no such name"),
            ("web.other.svc.cluster.local.", A, "no such name"),
            ("ns.svc.cluster.local.", A, "no data"),
            ("other.svc.cluster.local.", A, "no such name"),
            ("svc.cluster.local.", A, "no data"),
            ("web.ns.svc.example.com.", A, "not ours"),
            ("db.ns.svc.cluster.local.", A, "10.1.0.1 | 10.1.0.2"),
            ("db.ns.svc.cluster.local.", AAAA, "no data"),
            ("db-0.db.ns.svc.cluster.local.", A, "10.1.0.1"),
            ("10-1-0-2.db.ns.svc.cluster.local.", A, "10.1.0.2"),
            ("db-9.db.ns.svc.cluster.local.", A, "no such name"),
            (
                "_http._tcp.db.ns.svc.cluster.local.",
                SRV,
                "0 50 8080 10-1-0-2.db.ns.svc.cluster.local. | 0 50 8080 db-0.db.ns.svc.cluster.local. + 10.1.0.2 | 10.1.0.1",
            ),
            ("empty.ns.svc.cluster.local.", A, "no such name"),
            ("_http._tcp.empty.ns.svc.cluster.local.", SRV, "no such name"),
            ("ext.ns.svc.cluster.local.", A, "alias example.com."),
            ("address.ns.svc.cluster.local.", A, "no such name"),
            ("ext.ns.svc.cluster.local.", CNAME, "example.com."),
            ("inner.ns.svc.cluster.local.", A, "alias web.ns.svc.cluster.local."),
            ("10-1-2-3.ns.pod.cluster.local.", A, "10.1.2.3"),
            ("10-1-2-3.other.pod.cluster.local.", A, "no such name"),
            ("nonsense.ns.pod.cluster.local.", A, "no such name"),
            ("fd00--5.ns.pod.cluster.local.", AAAA, "fd00::5"),
            ("20.0.96.10.in-addr.arpa.", PTR, "web.ns.svc.cluster.local."),
            ("1.0.1.10.in-addr.arpa.", PTR, "db-0.db.ns.svc.cluster.local."),
            ("2.0.1.10.in-addr.arpa.", PTR, "10-1-0-2.db.ns.svc.cluster.local."),
            (
                "0.2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.",
                PTR,
                "web.ns.svc.cluster.local.",
            ),
            ("20.0.96.10.in-addr.arpa.", A, "no data"),
            ("9.9.9.9.in-addr.arpa.", PTR, "not ours"),
            ("1.10.in-addr.arpa.", PTR, "not ours"),
            ("cluster.local.", A, "no data"),
            ("cluster.local.", NS, "ns.dns.cluster.local. + 10.96.0.10"),
            ("ns.dns.cluster.local.", A, "10.96.0.10"),
            ("dns-version.cluster.local.", TXT, "1.1.0"),
            ("local.", A, "not ours"),
        ];
        for (name, kind, want) in cases {
            assert_eq!(ask(name, kind), want, "{name} {kind}");
        }
        assert!(ask("cluster.local.", SOA).starts_with("ns.dns.cluster.local. hostmaster.cluster.local."));
    }

    #[test]
    fn options_change_what_is_answered() {
        let mut world = world();
        world.set_pod("ns", &[], &["10.1.2.3".parse().expect("an address")]);
        let options = |pods| Options { pods, ..Options::default() };
        let strict = Options { ignore_empty_service: true, fallthrough: true, ..Options::default() };
        for (options, name, want) in [
            (options(Pods::Verified), "10-1-2-3.ns.pod.cluster.local.", "10.1.2.3"),
            (options(Pods::Verified), "10-1-2-4.ns.pod.cluster.local.", "no such name"),
            (options(Pods::Disabled), "10-1-2-3.ns.pod.cluster.local.", "no such name"),
            (strict.clone(), "web.ns.svc.cluster.local.", "not ours"),
            (strict.clone(), "db.ns.svc.cluster.local.", "10.1.0.1 | 10.1.0.2"),
            (strict, "none.ns.svc.cluster.local.", "not ours"),
        ] {
            assert_eq!(ask_with(options, &world, name, RecordType::A), want, "{name}");
        }
        world.set_pod("ns", &["10.1.2.3".parse().expect("an address")], &[]);
        let gone = ask_with(options(Pods::Verified), &world, "10-1-2-3.ns.pod.cluster.local.", RecordType::A);
        assert_eq!(gone, "no such name");
    }

    #[test]
    fn endpoints_may_be_named_by_their_pods() {
        let mut world = World::new(true);
        let service = serde_json::from_value(json!({"spec": {"clusterIP": "None"}})).expect("a service");
        world.set_service(NamespacedName::new("ns", "db"), Some(&service));
        let endpoints = json!([{"addresses": ["10.1.0.1"], "targetRef": {"kind": "Pod", "name": "db-x7"}}]);
        world.set_slice(&NamespacedName::new("ns", "s"), None, Some(&slice("s", "db", endpoints)));
        let asked = ask_with(Options::default(), &world, "db-x7.db.ns.svc.cluster.local.", RecordType::A);
        assert_eq!(asked, "10.1.0.1");
    }
}
