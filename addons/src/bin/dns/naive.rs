//! What the DNS specification says of a cluster, said plainly: every record that there is, straight from the API's objects;
//! and that what is answered from memory, after any changes, is the same.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::str::FromStr;

use apimachinery::meta::NamespacedName;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::resolve::{Options, Outcome, Zone};
use crate::world::World;

const ZONE: &str = "cluster.local.";
/// Of endpoints; the last is a Service's as well.
const ADDRESSES: [&str; 6] = ["10.1.0.1", "10.1.0.2", "10.1.0.3", "fd00::1:1", "fd00::1:2", "10.96.0.20"];
const NAMESPACES: [&str; 2] = ["a", "b"];

/// Objects by namespace and name.
#[derive(Default)]
struct Cluster {
    services: BTreeMap<(String, String), Service>,
    slices: BTreeMap<(String, String), EndpointSlice>,
}

/// Names, and what stands at them: `A 10.0.0.1`, `SRV 80 a.b.`.
#[derive(Default)]
struct Records(BTreeMap<String, BTreeSet<String>>);

impl Records {
    fn add(&mut self, name: &str, data: impl Into<String>) {
        self.0.entry(name.to_owned()).or_default().insert(data.into());
    }

    fn address(&mut self, name: &str, ip: IpAddr) {
        self.add(name, format!("{} {ip}", if ip.is_ipv4() { "A" } else { "AAAA" }));
    }

    fn of(&self, name: &str, kind: &str) -> Vec<&str> {
        let all = self.0.get(name).into_iter().flatten();
        all.filter_map(|data| data.strip_prefix(kind)?.strip_prefix(' ')).collect()
    }
}

fn reversed(ip: IpAddr) -> String {
    let mut name = Name::from(ip);
    name.set_fqdn(true);
    name.to_string()
}

impl Cluster {
    /// As the specification has it, one section after the other; and, as CoreDNS does, records of all ports at a Service's own
    /// name, and names for the endpoints of Services that have a cluster IP.
    fn records(&self) -> Records {
        let mut all = Records::default();
        all.add(&format!("dns-version.{ZONE}"), "TXT 1.1.0");
        let mut of_endpoints = Vec::new();
        for ((namespace, name), service) in &self.services {
            let at = format!("{name}.{namespace}.svc.{ZONE}");
            let spec = service.spec.clone().expect("a spec");
            if spec.type_.as_deref() == Some("ExternalName") {
                all.add(&at, format!("CNAME {}.", spec.external_name.expect("a name")));
                continue;
            }
            let headless = spec.cluster_ip.as_deref() == Some("None");
            let srv = |all: &mut Records, port: (Option<&str>, Option<&str>), number: i32, host: &str| {
                let data = format!("SRV {number} {host}");
                all.add(&at, data.clone());
                if let Some(name) = port.0.filter(|name| !name.is_empty()) {
                    let protocol = port.1.unwrap_or("TCP").to_lowercase();
                    all.add(&format!("_{name}._{protocol}.{at}"), data);
                }
            };
            if !headless {
                for ip in spec.cluster_ips.iter().flatten().map(|ip| ip.parse::<IpAddr>().expect("an address")) {
                    all.address(&at, ip);
                    all.add(&reversed(ip), format!("PTR {at}"));
                }
                for port in spec.ports.iter().flatten() {
                    srv(&mut all, (port.name.as_deref(), port.protocol.as_deref()), port.port, &at);
                }
            }
            for ((_, _), slice) in self.slices.iter().filter(|((ns, _), slice)| {
                let labels = slice.metadata.labels.as_ref().expect("labels");
                ns == namespace && labels.get("kubernetes.io/service-name") == Some(name)
            }) {
                for endpoint in slice.endpoints.iter().flatten() {
                    if endpoint.conditions.as_ref().and_then(|c| c.ready) == Some(false) {
                        continue;
                    }
                    let ip: IpAddr = endpoint.addresses[0].parse().expect("an address");
                    let dashed = ip.to_string().replace(['.', ':'], "-");
                    let host = format!("{}.{at}", endpoint.hostname.clone().unwrap_or(dashed));
                    all.address(&host, ip);
                    if headless || endpoint.hostname.is_some() {
                        of_endpoints.push((reversed(ip), format!("PTR {host}")));
                    }
                    if headless {
                        all.address(&at, ip);
                        for port in slice.ports.iter().flatten() {
                            let number = port.port.expect("a port");
                            srv(&mut all, (port.name.as_deref(), port.protocol.as_deref()), number, &host);
                        }
                    }
                }
            }
        }
        // The address of a Service is no endpoint's.
        of_endpoints.retain(|(at, _)| !all.0.contains_key(at));
        of_endpoints.into_iter().for_each(|(at, data)| all.add(&at, data));
        all
    }

    /// Whether there is something at or below a name of the zone.
    fn exists(all: &Records, name: &str) -> bool {
        let below = format!(".{name}");
        let of_namespaces = |part: &str| {
            name == format!("{part}.{ZONE}") || NAMESPACES.iter().any(|ns| name == format!("{ns}.{part}.{ZONE}"))
        };
        of_namespaces("svc") || of_namespaces("pod") || all.0.keys().any(|at| at == name || at.ends_with(&below))
    }

    fn answer(all: &Records, name: &str, kind: &str) -> String {
        let data = all.of(name, kind);
        let alias = all.of(name, "CNAME");
        if !data.is_empty() {
            let mut lines: Vec<String> = data.iter().map(|data| (*data).to_owned()).collect();
            if kind == "SRV" {
                let hosts: BTreeSet<&str> = data.iter().filter_map(|data| data.split(' ').nth(1)).collect();
                let glue = hosts.iter().flat_map(|host| [all.of(host, "A"), all.of(host, "AAAA")].concat());
                lines.extend(glue.map(|ip| format!("+ {ip}")));
            }
            lines.sort();
            lines.join(", ")
        } else if let [target] = alias.as_slice() {
            format!("alias {target}")
        } else if name.ends_with(".arpa.") {
            if all.0.contains_key(name) { "no data" } else { "not ours" }.to_owned()
        } else {
            if Self::exists(all, name) { "no data" } else { "no such name" }.to_owned()
        }
    }
}

/// An answer from memory in the same words: weights aside, and every record once.
fn shown(outcome: Outcome) -> String {
    let data = |record: &Record| match &record.data {
        RData::SRV(srv) => format!("{} {}", srv.port, srv.target),
        other => other.to_string(),
    };
    match outcome {
        Outcome::Answer { answers, additionals } => {
            let mut lines: Vec<String> = answers.iter().map(data).collect();
            let glue: BTreeSet<_> = additionals.iter().map(|record| (record.name.to_string(), data(record))).collect();
            assert_eq!(glue.len(), additionals.len(), "every additional record once");
            lines.extend(glue.into_iter().map(|(_, ip)| format!("+ {ip}")));
            lines.sort();
            lines.join(", ")
        }
        Outcome::NoData => "no data".into(),
        Outcome::NoSuchName => "no such name".into(),
        Outcome::Alias { target, .. } => format!("alias {target}"),
        Outcome::NotOurs => "not ours".into(),
    }
}

/// What is written to the cluster: a kind, a namespace, a name, and the object, none to delete it.
type Write = (&'static str, &'static str, &'static str, Option<Value>);

fn any_of<const N: usize>(all: [&'static str; N]) -> impl Strategy<Value = &'static str> {
    (0..N).prop_map(move |at| all[at])
}

/// The last number of the addresses of a Service.
fn own_number(namespace: &str, service: &str) -> u8 {
    20 + 3 * (namespace.as_bytes()[0] - b'a') + service.as_bytes()[0] - b's'
}

/// Some of the ports that Services and slices have.
fn ports() -> impl Strategy<Value = Value> {
    let all = [("http", "TCP", 80), ("", "TCP", 81), ("dns", "UDP", 53), ("http", "UDP", 80), ("s", "SCTP", 9)];
    let port =
        |(name, protocol, number): (&str, &str, u16)| json!({"name": name, "protocol": protocol, "port": number});
    prop::sample::subsequence(all.to_vec(), 0..=3).prop_map(move |some| some.into_iter().map(port).collect())
}

fn service_write() -> impl Strategy<Value = Write> {
    (any_of(NAMESPACES), any_of(["s", "t", "u"]), 0..7, ports()).prop_map(|(namespace, name, kind, ports)| {
        // Each has addresses of its own.
        let last = own_number(namespace, name);
        let (v4, v6) = (format!("10.96.0.{last}"), format!("fd00:96::{last:x}"));
        let of = |ips: &[&str]| json!({"clusterIP": ips[0], "clusterIPs": ips, "ports": ports});
        let spec = match kind {
            0 => return ("services", namespace, name, None),
            1 => json!({"type": "ExternalName", "externalName": "Far.example.com"}),
            2 => of(&[&v4, &v6]),
            3 => of(&[&v4]),
            4 => of(&[&v6]),
            _ => of(&["None"]),
        };
        ("services", namespace, name, Some(json!({"metadata": {"namespace": namespace, "name": name}, "spec": spec})))
    })
}

fn slice_write() -> impl Strategy<Value = Write> {
    let endpoint = (0..ADDRESSES.len(), 0..4, 0..4usize).prop_map(|(address, ready, hostname)| {
        let mut endpoint = json!({"addresses": [ADDRESSES[address]], "conditions": {}});
        match ready {
            0 => endpoint["conditions"]["ready"] = json!(false),
            1 => endpoint["conditions"]["ready"] = json!(true),
            2 => drop(endpoint.as_object_mut().and_then(|e| e.remove("conditions"))),
            _ => {}
        }
        if hostname < 2 {
            endpoint["hostname"] = json!(["h", "i"][hostname]);
        }
        endpoint
    });
    let (namespace, name, service) = (any_of(NAMESPACES), any_of(["x", "y", "z"]), any_of(["s", "t", "u"]));
    let write = (namespace, name, service, ports(), prop::collection::vec(endpoint, 0..4), 0..6);
    write.prop_map(|(namespace, name, service, ports, endpoints, deleted)| {
        let labels = json!({"kubernetes.io/service-name": service});
        let slice = json!({"metadata": {"namespace": namespace, "name": name, "labels": labels}, "addressType": "IPv4",
            "ports": ports, "endpoints": endpoints});
        ("slices", namespace, name, (deleted > 0).then_some(slice))
    })
}

fn writes() -> impl Strategy<Value = Vec<Write>> {
    prop::collection::vec(prop_oneof![2 => service_write(), 3 => slice_write()], 1..24)
}

/// Both see the same writes.
fn write(cluster: &mut Cluster, world: &mut World, (kind, namespace, name, object): Write) {
    let key = (namespace.to_owned(), name.to_owned());
    let whole = NamespacedName::new(namespace, name);
    match kind {
        "services" => {
            let object: Option<Service> = object.map(|o| serde_json::from_value(o).expect("a Service"));
            world.set_service(whole, object.as_ref());
            match object {
                Some(object) => drop(cluster.services.insert(key, object)),
                None => drop(cluster.services.remove(&key)),
            }
        }
        _ => {
            let object: Option<EndpointSlice> = object.map(|o| serde_json::from_value(o).expect("a slice"));
            world.set_slice(&whole, cluster.slices.get(&key), object.as_ref());
            match object {
                Some(object) => drop(cluster.slices.insert(key, object)),
                None => drop(cluster.slices.remove(&key)),
            }
        }
    }
}

/// Every name that could be one.
fn questions() -> Vec<String> {
    let below = [
        "",
        "h.",
        "i.",
        "j.",
        "10-1-0-1.",
        "10-1-0-3.",
        "fd00--1-1.",
        "_tcp.",
        "_udp.",
        "_sctp.",
        "_http._tcp.",
        "_HTTP._udp.",
        "_dns._udp.",
        "_s._sctp.",
        "_._tcp.",
        "_none._tcp.",
        "x._http._tcp.",
        "x.h.",
    ];
    let mut all: Vec<String> = ["svc", "pod", "a.svc", "b.pod", "c.svc", "dns-version", "none", "x.dns-version"]
        .map(|name| format!("{name}.{ZONE}"))
        .into();
    for namespace in ["a", "B", "c"] {
        for service in ["s", "t", "U", "v"] {
            all.extend(below.iter().map(|below| format!("{below}{service}.{namespace}.svc.{ZONE}")));
        }
    }
    for last in 20..26 {
        for ip in [format!("10.96.0.{last}"), format!("fd00:96::{last:x}")] {
            all.push(reversed(ip.parse().expect("an address")));
        }
    }
    all.extend(ADDRESSES.map(|ip| reversed(ip.parse().expect("an address"))));
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn answers_are_those_of_the_specification(writes in writes()) {
        let (mut cluster, mut world) = (Cluster::default(), World::default());
        NAMESPACES.into_iter().for_each(|name| world.set_namespace(name, true));
        writes.into_iter().for_each(|one| write(&mut cluster, &mut world, one));
        let zone = Zone::new("cluster.local", 30, Vec::new(), Options::default()).expect("a zone");
        let all = cluster.records();
        for question in questions() {
            let name = Name::from_str(&question).expect("a name");
            for kind in ["A", "AAAA", "SRV", "CNAME", "PTR", "TXT", "MX"] {
                let wanted = Cluster::answer(&all, &question.to_lowercase(), kind);
                let found = shown(zone.resolve(&world, &name, RecordType::from_str(kind).expect("a type")));
                prop_assert_eq!(found.to_lowercase(), wanted.to_lowercase(), "{} {}", question, kind);
            }
        }
    }
}
