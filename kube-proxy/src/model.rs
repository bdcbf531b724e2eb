//! Services and EndpointSlices → what a packet may be sent to, and where it may go: the one model that every mode renders.
use component_base::cidr::Cidr;
use k8s_openapi::api::{
    core::v1::{Service, ServiceSpec},
    discovery::v1::{Endpoint as ApiEndpoint, EndpointSlice},
};
use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
};

/// The label by which a slice names its Service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Services with it are another proxy's.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// As `DefaultClientIPServiceAffinitySeconds`.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

/// A port of a Service, in one address family, with the endpoints that stand behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    pub id: PortId,
    pub cluster_ip: IpAddr,
    pub port: u16,
    /// 0 if it has none.
    pub node_port: u16,
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

/// What the model reads of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    pub name: String,
    /// Of its label `topology.kubernetes.io/zone`; empty if it has none.
    pub zone: String,
}

/// The ports of one Service in one family; `slices` are all of its slices.
pub fn build(service: &Service, slices: &[&EndpointSlice], node: &NodeFacts, ipv6: bool) -> Vec<ServicePort> {
    let family = if ipv6 { "IPv6" } else { "IPv4" };
    let Some(spec) = service.spec.as_ref().filter(|spec| is_ours(service, spec)) else { return Vec::new() };
    let Some(cluster_ip) = cluster_ip(spec, ipv6) else { return Vec::new() };
    let slices: Vec<_> = slices.iter().copied().filter(|slice| slice.address_type == family).collect();
    let meta = &service.metadata;
    let of_family =
        |ips: BTreeSet<IpAddr>| -> Vec<IpAddr> { ips.into_iter().filter(|ip| ip.is_ipv6() == ipv6).collect() };
    let external_ips = of_family(spec.external_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).collect());
    let load_balancer_ips = of_family(load_balancer_ips(service, spec).collect());
    let mut ports = Vec::new();
    for port in spec.ports.iter().flatten() {
        let Some(protocol) = Protocol::parse(port.protocol.as_deref().unwrap_or("TCP")) else { continue };
        let port_name = port.name.clone().unwrap_or_default();
        let candidates = candidates(&slices, &port_name, protocol, node);
        let mut made = ServicePort {
            id: PortId {
                namespace: meta.namespace.clone().unwrap_or_default(),
                name: meta.name.clone().unwrap_or_default(),
                protocol,
                port_name,
            },
            cluster_ip,
            port: number(port.port),
            node_port: port.node_port.map_or(0, number),
            external_ips: external_ips.clone(),
            load_balancer_ips: load_balancer_ips.clone(),
            source_ranges: source_ranges(spec, ipv6),
            affinity_seconds: affinity(spec),
            internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
            cluster_endpoints: Vec::new(),
            local_endpoints: Vec::new(),
            has_endpoints: false,
        };
        made.choose_endpoints(&candidates);
        ports.push(made);
    }
    ports
}

/// Not headless, not an alias, not another proxy's.
fn is_ours(service: &Service, spec: &ServiceSpec) -> bool {
    let delegated = service.metadata.labels.as_ref().is_some_and(|l| l.contains_key(PROXY_NAME_LABEL));
    spec.type_.as_deref() != Some("ExternalName") && !delegated
}

fn cluster_ip(spec: &ServiceSpec, ipv6: bool) -> Option<IpAddr> {
    let all = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
    all.filter_map(|ip| ip.parse::<IpAddr>().ok()).find(|ip| ip.is_ipv6() == ipv6)
}

fn load_balancer_ips<'a>(service: &'a Service, spec: &ServiceSpec) -> impl Iterator<Item = IpAddr> + use<'a> {
    let balanced = spec.type_.as_deref() == Some("LoadBalancer");
    let status = service.status.as_ref().filter(|_| balanced).and_then(|s| s.load_balancer.as_ref());
    let ingress = status.into_iter().flat_map(|b| b.ingress.iter().flatten());
    ingress.filter(|i| i.ip_mode.as_deref() != Some("Proxy")).filter_map(|i| i.ip.as_ref()?.parse().ok())
}

/// Only of a load balancer; a range of everything is no restriction.
fn source_ranges(spec: &ServiceSpec, ipv6: bool) -> Vec<Cidr> {
    let all = spec.load_balancer_source_ranges.iter().flatten();
    let ranges: Vec<Cidr> = all.filter_map(|range| range.parse().ok()).filter(|r: &Cidr| r.is_ipv6() == ipv6).collect();
    if ranges.iter().any(Cidr::is_everything) { Vec::new() } else { ranges }
}

fn affinity(spec: &ServiceSpec) -> Option<u32> {
    (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
        let seconds = config.and_then(|c| c.timeout_seconds).and_then(|s| u32::try_from(s).ok());
        seconds.unwrap_or(DEFAULT_AFFINITY_SECONDS)
    })
}

/// The port at which a node tells load balancers whether it has endpoints of the Service. As `HealthCheckNodePort`.
pub fn health_check_port(service: &Service) -> Option<u16> {
    let spec = service.spec.as_ref()?;
    let wanted =
        spec.type_.as_deref() == Some("LoadBalancer") && spec.external_traffic_policy.as_deref() == Some("Local");
    spec.health_check_node_port.filter(|_| wanted).map(number).filter(|port| *port != 0)
}

struct Candidate {
    endpoint: Endpoint,
    ready: bool,
    serving_while_terminating: bool,
    /// What its hints say: for this node, for this zone; none if it has none.
    for_node: Option<bool>,
    for_zone: Option<bool>,
}

fn candidates(slices: &[&EndpointSlice], port_name: &str, protocol: Protocol, node: &NodeFacts) -> Vec<Candidate> {
    let mut found = Vec::new();
    for slice in slices {
        let port = slice.ports.iter().flatten().find(|p| {
            p.name.as_deref().unwrap_or("") == port_name
                && Protocol::parse(p.protocol.as_deref().unwrap_or("TCP")) == Some(protocol)
        });
        let Some(port) = port.and_then(|p| p.port).map(number) else { continue };
        for endpoint in slice.endpoints.iter().flatten() {
            found.extend(candidate(endpoint, port, node));
        }
    }
    found
}

fn candidate(endpoint: &ApiEndpoint, port: u16, node: &NodeFacts) -> Option<Candidate> {
    // The other addresses of an endpoint have no meaning, by the API.
    let ip = endpoint.addresses.first()?.parse().ok()?;
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let serving = conditions.serving.unwrap_or(ready);
    let terminating = conditions.terminating.unwrap_or(false);
    let hints = endpoint.hints.as_ref();
    let nodes = hints.and_then(|h| h.for_nodes.as_ref()).filter(|nodes| !nodes.is_empty());
    let zones = hints.and_then(|h| h.for_zones.as_ref()).filter(|zones| !zones.is_empty());
    Some(Candidate {
        endpoint: Endpoint { ip, port, local: endpoint.node_name.as_deref() == Some(&node.name) },
        ready,
        serving_while_terminating: serving && terminating,
        for_node: nodes.map(|nodes| nodes.iter().any(|n| n.name == node.name)),
        for_zone: zones.map(|zones| zones.iter().any(|z| z.name == node.zone)),
    })
}

fn number(port: i32) -> u16 {
    u16::try_from(port).unwrap_or(0)
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
            self.local_endpoints =
                or_else(pick(&|c| local(c) && c.ready), &|| pick(&|c| local(c) && c.serving_while_terminating));
        }
        self.has_endpoints = candidates.iter().any(|c| c.ready || c.serving_while_terminating);
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
    use serde_json::{Value, json};

    fn service(spec: Value) -> Service {
        serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "ns"}, "spec": spec})).unwrap()
    }

    fn slice(endpoints: Value) -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": {"name": "web-1", "namespace": "ns", "labels": {SERVICE_NAME_LABEL: "web"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
        }))
        .unwrap()
    }

    fn node(name: &str) -> NodeFacts {
        NodeFacts { name: name.into(), zone: format!("zone-of-{name}") }
    }

    fn build_one(spec: Value, endpoints: Value, on: &str) -> ServicePort {
        build(&service(spec), &[&slice(endpoints)], &node(on), false).remove(0)
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
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            affinity_seconds: None,
            internal_local: false,
            external_local: false,
            local_endpoints: endpoints.first().copied().into_iter().collect(),
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
        let list = json!([{"addresses": ["10.1.0.1"], "nodeName": "n1", "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["10.1.0.2"], "nodeName": "n2"}]);
        let spec = json!({"clusterIP": "10.96.0.5", "type": "NodePort", "externalTrafficPolicy": "Local",
            "ports": [{"port": 80, "nodePort": 30080}]});
        let port = build_one(spec, list, "n1");
        assert_eq!(shown(port.external()), ["10.1.0.1:8080 local"]);
        assert_eq!(shown(port.internal()), ["10.1.0.2:8080"]);
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
        let port = build(&balanced, &[], &node("n1"), false).remove(0);
        assert_eq!(port.load_balancer_ips, ["203.0.113.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(port.external_ips, ["198.51.100.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(port.source_ranges, ["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(health_check_port(&balanced), Some(32000));
    }

    #[test]
    fn headless_aliases_and_other_families_are_left_out() {
        for spec in [
            json!({"clusterIP": "None", "ports": [{"port": 80}]}),
            json!({"type": "ExternalName", "externalName": "x.y"}),
            json!({"clusterIP": "fd00::1", "ports": [{"port": 80}]}),
        ] {
            assert_eq!(build(&service(spec), &[], &node("n1"), false), []);
        }
    }
}
