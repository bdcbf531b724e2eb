//! Services and EndpointSlices → what a packet may be sent to, and where it may go: the one model that every mode renders.
use crate::objects::{self, Service, Slice};
use apimachinery::meta::NamespacedName;
use component_base::cidr::Cidr;
use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
};

/// Services with it are another proxy's.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";

/// A port of a Service, in one address family, with the endpoints that stand behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    pub id: PortId,
    pub cluster_ip: IpAddr,
    pub port: u16,
    /// 0 if it has none.
    pub node_port: u16,
    /// Where load balancers ask for the Service's health; 0 if they do not.
    pub health_check_port: u16,
    pub external_ips: Vec<IpAddr>,
    /// Those of load balancers that send packets on unchanged (`ipMode: VIP`).
    pub load_balancer_ips: Vec<IpAddr>,
    /// Who may speak to the load balancer's addresses; empty for everybody.
    pub source_ranges: Vec<Cidr>,
    /// Seconds that a client stays with its endpoint; none without session affinity.
    pub affinity_seconds: Option<u32>,
    pub internal_local: bool,
    pub external_local: bool,
    /// For traffic under the policy `Cluster`, in order, without duplicates.
    pub cluster_endpoints: Vec<Endpoint>,
    /// For traffic under the policy `Local`.
    pub local_endpoints: Vec<Endpoint>,
    /// Whether those are ready. If not they serve only until they end, and load balancers are to look elsewhere.
    pub local_ready: bool,
    /// Those that serve but that new flows are not sent to, by policy, topology or since they end; flows that are there may
    /// stay. None of TCP, whose connections see to themselves.
    pub others: Vec<Endpoint>,
    /// Whether any endpoint of the cluster could answer: without one traffic is refused, not dropped.
    pub has_endpoints: bool,
}

/// Names a [`ServicePort`]. Displayed as `ns/name/tcp/port-name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId {
    pub namespace: String,
    pub name: String,
    pub protocol: Protocol,
    /// Empty for the only port of a Service.
    pub port_name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    pub ip: IpAddr,
    pub port: u16,
    pub local: bool,
}

/// The ports of one Service in one family; `slices` are all of its slices, and `zone` is this node's.
pub fn build(key: &NamespacedName, service: &Service, slices: &[&Slice], zone: &str, ipv6: bool) -> Vec<ServicePort> {
    let Some(cluster_ip) = service.cluster_ips.iter().copied().find(|ip| ip.is_ipv6() == ipv6) else {
        return Vec::new();
    };
    let of_family = |ips: &[IpAddr]| -> Vec<IpAddr> { ips.iter().copied().filter(|ip| ip.is_ipv6() == ipv6).collect() };
    let mut ports = Vec::with_capacity(service.ports.len());
    for port in &service.ports {
        let candidates = candidates(slices, port, zone, ipv6);
        let mut made = ServicePort {
            id: PortId {
                namespace: key.namespace.clone(),
                name: key.name.clone(),
                protocol: port.protocol,
                port_name: port.name.to_string(),
            },
            cluster_ip,
            port: port.port,
            node_port: port.node_port,
            health_check_port: service.health_check_port.unwrap_or(0),
            external_ips: of_family(&service.external_ips),
            load_balancer_ips: of_family(&service.load_balancer_ips),
            source_ranges: source_ranges(&service.source_ranges, ipv6),
            affinity_seconds: service.affinity_seconds,
            internal_local: service.internal_local,
            external_local: service.external_local,
            cluster_endpoints: Vec::new(),
            local_endpoints: Vec::new(),
            local_ready: false,
            others: Vec::new(),
            has_endpoints: false,
        };
        made.choose_endpoints(&candidates);
        ports.push(made);
    }
    ports
}

/// Only of a load balancer; a range of everything is no restriction.
fn source_ranges(all: &[Cidr], ipv6: bool) -> Vec<Cidr> {
    let ranges: Vec<Cidr> = all.iter().copied().filter(|range| range.is_ipv6() == ipv6).collect();
    if ranges.iter().any(Cidr::is_everything) { Vec::new() } else { ranges }
}

struct Candidate {
    endpoint: Endpoint,
    ready: bool,
    serving_while_terminating: bool,
    /// What its hints say: for this node, for this zone; none if it has none.
    for_node: Option<bool>,
    for_zone: Option<bool>,
}

fn candidates(slices: &[&Slice], of: &objects::Port, zone: &str, ipv6: bool) -> Vec<Candidate> {
    let mut found = Vec::new();
    for slice in slices {
        let Some(port) = slice.ports.iter().find(|port| port.name == of.name && port.protocol == of.protocol) else {
            continue;
        };
        let of_family = slice.endpoints.iter().filter(|endpoint| endpoint.ip.is_ipv6() == ipv6);
        found.extend(of_family.map(|endpoint| Candidate {
            endpoint: Endpoint { ip: endpoint.ip, port: port.port, local: endpoint.local },
            ready: endpoint.ready,
            serving_while_terminating: endpoint.serving_while_terminating,
            for_node: endpoint.for_node,
            for_zone: endpoint.for_zones.as_ref().map(|zones| zones.iter().any(|name| name == zone)),
        }));
    }
    found
}

/// The first of the preferences that all ready endpoints have hints for, and that leaves one: this node's endpoints, this
/// zone's. As `topologyModeFromHints`.
fn topology(candidates: &[Candidate]) -> fn(&Candidate) -> bool {
    let modes: [fn(&Candidate) -> Option<bool>; 2] = [|c| c.for_node, |c| c.for_zone];
    let ready = || candidates.iter().filter(|c| c.ready);
    let holds = |hint: fn(&Candidate) -> Option<bool>| {
        ready().all(|c| hint(c).is_some()) && ready().any(|c| hint(c) == Some(true))
    };
    match modes.map(holds) {
        [true, _] => |c| c.for_node == Some(true),
        [_, true] => |c| c.for_zone == Some(true),
        _ => |_| true,
    }
}

// === impl ServicePort ===

impl ServicePort {
    /// As `CategorizeEndpoints`: the ready ones, by topology; if there are none, those that still serve while they terminate.
    fn choose_endpoints(&mut self, candidates: &[Candidate]) {
        let pick = |wanted: &dyn Fn(&Candidate) -> bool| -> Vec<Endpoint> {
            let chosen: BTreeSet<Endpoint> = candidates.iter().filter(|c| wanted(c)).map(|c| c.endpoint).collect();
            chosen.into_iter().collect()
        };
        let or_else =
            |first: Vec<Endpoint>, second: &dyn Fn() -> Vec<Endpoint>| if first.is_empty() { second() } else { first };
        // External traffic uses all endpoints even under the policy Local, when it comes from within.
        if !self.internal_local || self.is_external() {
            let near = topology(candidates);
            self.cluster_endpoints = or_else(pick(&|c| c.ready && near(c)), &|| pick(&|c| c.serving_while_terminating));
        }
        if self.internal_local || self.external_local && self.is_external() {
            let local = |c: &Candidate| c.endpoint.local;
            self.local_ready = candidates.iter().any(|c| local(c) && c.ready);
            self.local_endpoints =
                or_else(pick(&|c| local(c) && c.ready), &|| pick(&|c| local(c) && c.serving_while_terminating));
        }
        let serving = || candidates.iter().filter(|c| c.ready || c.serving_while_terminating);
        self.has_endpoints = serving().next().is_some();
        if self.id.protocol != Protocol::Tcp {
            let chosen = self.endpoints();
            self.others = serving().map(|c| c.endpoint).filter(|endpoint| !chosen.contains(endpoint)).collect();
        }
    }

    /// Whether it is to be reached from outside the cluster.
    pub fn is_external(&self) -> bool {
        self.node_port != 0 || !self.external_ips.is_empty() || !self.load_balancer_ips.is_empty()
    }

    /// Where traffic to the cluster IP goes.
    pub fn internal(&self) -> &[Endpoint] {
        if self.internal_local { &self.local_endpoints } else { &self.cluster_endpoints }
    }

    /// Where traffic from outside goes.
    pub fn external(&self) -> &[Endpoint] {
        if self.external_local { &self.local_endpoints } else { &self.cluster_endpoints }
    }

    /// External addresses of either kind.
    pub fn outer_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.external_ips.iter().chain(&self.load_balancer_ips).copied()
    }

    /// Every endpoint of either kind, once.
    pub fn endpoints(&self) -> BTreeSet<Endpoint> {
        self.cluster_endpoints.iter().chain(&self.local_endpoints).copied().collect()
    }
}

// === impl Endpoint ===

impl Endpoint {
    pub fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.namespace, self.name, self.protocol.as_str(), self.port_name)
    }
}

// === impl Protocol ===

impl Protocol {
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            "SCTP" => Some(Self::Sctp),
            _ => None,
        }
    }

    /// As nftables, iptables and conntrack name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::api;
    use serde_json::{Value, json};

    fn service(spec: Value) -> api::Service {
        serde_json::from_value(json!({"spec": spec})).unwrap()
    }

    fn slice(endpoints: Value, node: &str) -> Slice {
        let slice = json!({"ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints});
        Slice::new(serde_json::from_value(slice).unwrap(), node)
    }

    fn built(service: api::Service, slices: &[&Slice], on: &str) -> Vec<ServicePort> {
        build(&NamespacedName::new("ns", "web"), &service.into(), slices, &format!("zone-of-{on}"), false)
    }

    fn build_one(spec: Value, endpoints: Value, on: &str) -> ServicePort {
        built(service(spec), &[&slice(endpoints, on)], on).remove(0)
    }

    fn shown(of: &[Endpoint]) -> Vec<String> {
        of.iter().map(|e| format!("{}{}", e.socket(), if e.local { " local" } else { "" })).collect()
    }

    /// For the tests of the renderers: a port with these endpoints, of which the first is local.
    pub fn port(name: &str, endpoints: &[&str]) -> ServicePort {
        let endpoints: Vec<Endpoint> = endpoints
            .iter()
            .enumerate()
            .map(|(i, ip)| Endpoint { ip: ip.parse().unwrap(), port: 8080, local: i == 0 })
            .collect();
        ServicePort {
            id: PortId { namespace: "ns".into(), name: name.into(), protocol: Protocol::Tcp, port_name: "http".into() },
            cluster_ip: "10.96.0.5".parse().unwrap(),
            port: 80,
            node_port: 0,
            health_check_port: 0,
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            affinity_seconds: None,
            internal_local: false,
            external_local: false,
            local_endpoints: endpoints.first().copied().into_iter().collect(),
            local_ready: !endpoints.is_empty(),
            others: Vec::new(),
            has_endpoints: !endpoints.is_empty(),
            cluster_endpoints: endpoints,
        }
    }

    /// The ports of which each mode has a golden file: all that the model can say.
    pub fn gallery() -> Vec<ServicePort> {
        let at = |mut port: ServicePort, last: u8| {
            port.cluster_ip = [10, 96, 0, last].into();
            port
        };
        let plain = at(port("a-plain", &["10.244.0.2", "10.244.1.2"]), 1);
        let mut sticky = at(port("b-sticky", &["10.244.0.3", "10.244.1.3"]), 2);
        (sticky.affinity_seconds, sticky.node_port) = (Some(10_800), 30_080);
        let mut local = at(port("c-local", &["10.244.0.4", "10.244.1.4"]), 3);
        (local.external_local, local.node_port) = (true, 30_081);
        local.health_check_port = 32_000;
        let mut balanced = at(port("d-balanced", &["10.244.0.5"]), 4);
        balanced.load_balancer_ips = vec!["203.0.113.7".parse().unwrap()];
        balanced.external_ips = vec!["198.51.100.7".parse().unwrap()];
        balanced.source_ranges = vec!["192.0.2.0/24".parse().unwrap(), "198.18.0.0/15".parse().unwrap()];
        let mut dead = at(port("e-dead", &[]), 5);
        dead.node_port = 30_082;
        let mut elsewhere = at(port("f-elsewhere", &["10.244.0.6"]), 6);
        (elsewhere.internal_local, elsewhere.external_local, elsewhere.node_port) = (true, true, 30_083);
        elsewhere.local_endpoints.clear();
        let mut sctp = at(port("g-sctp", &["10.244.0.7"]), 7);
        sctp.id.protocol = Protocol::Sctp;
        let mut udp = at(port("h-udp", &["10.244.0.8"]), 8);
        udp.id.protocol = Protocol::Udp;
        vec![plain, sticky, local, balanced, dead, elsewhere, sctp, udp]
    }

    #[test]
    fn only_ready_endpoints_count_unless_none_is() {
        let ready = json!({"addresses": ["10.1.0.1"], "nodeName": "n1", "conditions": {"ready": true}});
        let draining =
            json!({"addresses": ["10.1.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}});
        let broken = json!({"addresses": ["10.1.0.3"], "conditions": {"ready": false}});
        for (list, expected) in [
            (json!([ready, draining, broken]), vec!["10.1.0.1:8080 local"]),
            (json!([draining, broken]), vec!["10.1.0.2:8080"]),
            (json!([broken]), vec![]),
        ] {
            let port = build_one(json!({"clusterIP": "10.96.0.5", "ports": [{"port": 80}]}), list, "n1");
            assert_eq!(
                (shown(&port.cluster_endpoints), port.has_endpoints),
                (expected.iter().map(|e| (*e).to_owned()).collect(), !expected.is_empty())
            );
        }
    }

    #[test]
    fn local_policies_keep_to_this_node() {
        let list =
            json!([{"addresses": ["10.1.0.1"], "nodeName": "n1"}, {"addresses": ["10.1.0.2"], "nodeName": "n2"}]);
        let spec = json!({"clusterIP": "10.96.0.5", "type": "NodePort", "externalTrafficPolicy": "Local",
            "ports": [{"port": 80, "nodePort": 30080}]});
        let port = build_one(spec, list.clone(), "n2");
        assert_eq!((port.internal().len(), port.node_port), (2, 30080));
        assert_eq!(shown(port.external()), ["10.1.0.2:8080 local"]);
        let spec = json!({"clusterIP": "10.96.0.5", "internalTrafficPolicy": "Local", "ports": [{"port": 80}]});
        assert_eq!(shown(build_one(spec.clone(), list.clone(), "n1").internal()), ["10.1.0.1:8080 local"]);
        let elsewhere = build_one(spec, list, "n3");
        assert!(elsewhere.internal().is_empty() && elsewhere.has_endpoints);
    }

    #[test]
    fn a_local_policy_falls_back_to_what_terminates_here() {
        // Whether it serves need not be said.
        let list = json!([{"addresses": ["10.1.0.1"], "nodeName": "n1", "conditions": {"ready": false, "terminating": true}},
            {"addresses": ["10.1.0.2"], "nodeName": "n2"}]);
        let spec = json!({"clusterIP": "10.96.0.5", "type": "NodePort", "externalTrafficPolicy": "Local",
            "ports": [{"port": 80, "nodePort": 30080}]});
        let port = build_one(spec, list, "n1");
        assert_eq!(shown(port.external()), ["10.1.0.1:8080 local"]);
        assert_eq!(shown(port.internal()), ["10.1.0.2:8080"]);
        assert!(!port.local_ready);
    }

    #[test]
    fn hints_hold_when_every_ready_endpoint_has_them_and_one_is_near() {
        let endpoint = |ip: &str, hints: Value| json!({"addresses": [ip], "hints": hints});
        let zone = |name: &str| json!({"forZones": [{"name": name}]});
        let both = |zone: &str, node: &str| json!({"forZones": [{"name": zone}], "forNodes": [{"name": node}]});
        let (a, b) = ("10.1.0.1", "10.1.0.2");
        for (list, expected) in [
            (vec![endpoint(a, zone("zone-of-n1")), endpoint(b, zone("other"))], vec!["10.1.0.1:8080"]),
            (vec![endpoint(a, zone("zone-of-n1")), endpoint(b, json!({}))], vec!["10.1.0.1:8080", "10.1.0.2:8080"]),
            (vec![endpoint(a, zone("x")), endpoint(b, zone("y"))], vec!["10.1.0.1:8080", "10.1.0.2:8080"]),
            (vec![endpoint(a, both("zone-of-n1", "n2")), endpoint(b, both("zone-of-n1", "n1"))], vec!["10.1.0.2:8080"]),
            (vec![endpoint(a, both("zone-of-n1", "n2")), endpoint(b, both("y", "n3"))], vec!["10.1.0.1:8080"]),
        ] {
            let spec = json!({"clusterIP": "10.96.0.5", "ports": [{"port": 80}]});
            assert_eq!(shown(&build_one(spec, json!(list), "n1").cluster_endpoints), expected, "{list:?}");
        }
    }

    #[test]
    fn what_balancers_pass_on_is_ours_and_what_they_proxy_is_not() {
        let mut balanced =
            service(json!({"clusterIP": "10.96.0.5", "type": "LoadBalancer", "externalTrafficPolicy": "Local",
            "externalIPs": ["198.51.100.1", "fd00::1"], "healthCheckNodePort": 32000,
            "loadBalancerSourceRanges": ["10.0.0.0/8", "nonsense", "fd00::/8"], "ports": [{"port": 80}]}));
        balanced.status = serde_json::from_value(json!({"loadBalancer": {"ingress": [
            {"ip": "203.0.113.1", "ipMode": "VIP"}, {"ip": "203.0.113.2", "ipMode": "Proxy"}, {"hostname": "x"}]}}))
        .unwrap();
        assert_eq!(Service::from(balanced.clone()).health_check_port, Some(32000));
        let port = built(balanced, &[], "n1").remove(0);
        assert_eq!(port.load_balancer_ips, ["203.0.113.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(port.external_ips, ["198.51.100.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(port.source_ranges, ["10.0.0.0/8".parse().unwrap()]);
    }

    #[test]
    fn headless_aliases_and_other_families_are_left_out() {
        for spec in [
            json!({"clusterIP": "None", "ports": [{"port": 80}]}),
            json!({"type": "ExternalName", "externalName": "x.y"}),
            json!({"clusterIP": "fd00::1", "ports": [{"port": 80}]}),
        ] {
            assert_eq!(built(service(spec), &[], "n1"), []);
        }
    }
}
