//! Services and EndpointSlices → what a packet may be sent to, and where it may go: the one model that every mode renders.
use k8s_openapi::api::{
    core::v1::{Service, ServiceSpec},
    discovery::v1::{Endpoint as ApiEndpoint, EndpointSlice},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

/// The label by which a slice names its Service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
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
    /// External addresses and those of load balancers that send packets on unchanged.
    pub external_ips: Vec<IpAddr>,
    /// Seconds that a client stays with its endpoint; none without session affinity.
    pub affinity_seconds: Option<u32>,
    /// For traffic from within the cluster, in order, without duplicates.
    pub cluster_endpoints: Vec<Endpoint>,
    /// For traffic from outside when its policy is `Local`; `None` when the policy is `Cluster`.
    pub external_local_endpoints: Option<Vec<Endpoint>>,
}

/// Names a [`ServicePort`]. Displayed as `ns/name/tcp/port-name`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortId {
    pub namespace: String,
    pub name: String,
    pub protocol: Protocol,
    /// Empty for the only port of a Service.
    pub port_name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    pub ip: IpAddr,
    pub port: u16,
    pub local: bool,
}

/// All ports of all Services of one family, ordered by id. `node` is the name of this node: its endpoints are local.
pub fn build<'a>(
    services: impl IntoIterator<Item = &'a Service>,
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    node: &str,
    ipv6: bool,
) -> Vec<ServicePort> {
    let family = if ipv6 { "IPv6" } else { "IPv4" };
    let mut by_service: BTreeMap<(&str, &str), Vec<&EndpointSlice>> = BTreeMap::new();
    for slice in slices {
        let labels = slice.metadata.labels.as_ref();
        if slice.address_type != family {
            continue;
        }
        if let Some(service) = labels.and_then(|l| l.get(SERVICE_NAME_LABEL)) {
            by_service.entry((slice.metadata.namespace.as_deref().unwrap_or(""), service)).or_default().push(slice);
        }
    }
    let mut ports = Vec::new();
    for service in services {
        let (namespace, name) =
            (service.metadata.namespace.as_deref().unwrap_or(""), service.metadata.name.as_deref().unwrap_or(""));
        let Some(spec) = service.spec.as_ref().filter(|spec| is_ours(service, spec)) else { continue };
        let Some(cluster_ip) = cluster_ip(spec, ipv6) else { continue };
        let slices = by_service.get(&(namespace, name)).map(Vec::as_slice).unwrap_or_default();
        for port in spec.ports.iter().flatten() {
            let Some(protocol) = Protocol::parse(port.protocol.as_deref().unwrap_or("TCP")) else { continue };
            let port_name = port.name.clone().unwrap_or_default();
            let candidates = candidates(slices, &port_name, protocol, node);
            let internal_local = spec.internal_traffic_policy.as_deref() == Some("Local");
            let external_local = spec.external_traffic_policy.as_deref() == Some("Local");
            ports.push(ServicePort {
                id: PortId { namespace: namespace.into(), name: name.into(), protocol, port_name },
                cluster_ip,
                port: number(port.port),
                node_port: port.node_port.map_or(0, number),
                external_ips: external_ips(service, spec, ipv6),
                affinity_seconds: affinity(spec),
                cluster_endpoints: usable(&candidates, internal_local),
                external_local_endpoints: external_local.then(|| usable(&candidates, true)),
            });
        }
    }
    ports.sort_by(|a, b| a.id.cmp(&b.id));
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

fn external_ips(service: &Service, spec: &ServiceSpec, ipv6: bool) -> Vec<IpAddr> {
    let balancer = service.status.as_ref().and_then(|s| s.load_balancer.as_ref());
    let ingress = balancer.iter().flat_map(|b| b.ingress.iter().flatten());
    let ingress = ingress.filter(|i| i.ip_mode.as_deref() != Some("Proxy")).filter_map(|i| i.ip.as_ref());
    let all: BTreeSet<IpAddr> =
        spec.external_ips.iter().flatten().chain(ingress).filter_map(|ip| ip.parse().ok()).collect();
    all.into_iter().filter(|ip| ip.is_ipv6() == ipv6).collect()
}

fn affinity(spec: &ServiceSpec) -> Option<u32> {
    (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
        config.and_then(|c| c.timeout_seconds).and_then(|s| u32::try_from(s).ok()).unwrap_or(10_800)
    })
}

struct Candidate {
    endpoint: Endpoint,
    ready: bool,
    serving_while_terminating: bool,
}

fn candidates(slices: &[&EndpointSlice], port_name: &str, protocol: Protocol, node: &str) -> Vec<Candidate> {
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

fn candidate(endpoint: &ApiEndpoint, port: u16, node: &str) -> Option<Candidate> {
    // The other addresses of an endpoint have no meaning, by the API.
    let ip = endpoint.addresses.first()?.parse().ok()?;
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let serving = conditions.serving.unwrap_or(ready);
    let terminating = conditions.terminating.unwrap_or(false);
    Some(Candidate {
        endpoint: Endpoint { ip, port, local: endpoint.node_name.as_deref() == Some(node) },
        ready,
        serving_while_terminating: serving && terminating,
    })
}

/// The ready ones; if there are none, those that still serve while they terminate (KEP-1669).
fn usable(candidates: &[Candidate], local_only: bool) -> Vec<Endpoint> {
    let pick = |wanted: fn(&Candidate) -> bool| -> BTreeSet<Endpoint> {
        candidates.iter().filter(|c| wanted(c) && (c.endpoint.local || !local_only)).map(|c| c.endpoint).collect()
    };
    let mut chosen = pick(|c| c.ready);
    if chosen.is_empty() {
        chosen = pick(|c| c.serving_while_terminating);
    }
    chosen.into_iter().collect()
}

fn number(port: i32) -> u16 {
    u16::try_from(port).unwrap_or(0)
}

// === impl ServicePort ===

impl ServicePort {
    /// True when nothing answers, wherever the traffic comes from.
    pub fn is_dead(&self) -> bool {
        self.cluster_endpoints.is_empty() && self.external_local_endpoints.as_ref().is_none_or(Vec::is_empty)
    }

    /// Every endpoint of either kind, once.
    pub fn endpoints(&self) -> BTreeSet<Endpoint> {
        self.cluster_endpoints.iter().chain(self.external_local_endpoints.iter().flatten()).copied().collect()
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

    /// As nftables and conntrack name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(spec: serde_json::Value) -> Service {
        serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "ns"}, "spec": spec})).unwrap()
    }

    fn slice(endpoints: serde_json::Value) -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": {"name": "web-1", "namespace": "ns", "labels": {SERVICE_NAME_LABEL: "web"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
        }))
        .unwrap()
    }

    fn endpoints(of: &[Endpoint]) -> Vec<String> {
        of.iter().map(|e| format!("{}:{}{}", e.ip, e.port, if e.local { " local" } else { "" })).collect()
    }

    #[test]
    fn only_ready_endpoints_count_unless_none_is() {
        let web = service(json!({"clusterIP": "10.96.0.5", "ports": [{"port": 80}]}));
        let ready = json!({"addresses": ["10.1.0.1"], "nodeName": "n1", "conditions": {"ready": true}});
        let draining =
            json!({"addresses": ["10.1.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}});
        let broken = json!({"addresses": ["10.1.0.3"], "conditions": {"ready": false}});
        for (list, expected) in [
            (json!([ready, draining, broken]), vec!["10.1.0.1:8080 local"]),
            (json!([draining, broken]), vec!["10.1.0.2:8080"]),
            (json!([broken]), vec![]),
        ] {
            let ports = build([&web], [&slice(list)], "n1", false);
            assert_eq!(endpoints(&ports[0].cluster_endpoints), expected);
        }
    }

    #[test]
    fn local_policies_keep_to_this_node() {
        let web = service(json!({"clusterIP": "10.96.0.5", "type": "NodePort", "externalTrafficPolicy": "Local",
            "ports": [{"port": 80, "nodePort": 30080}]}));
        let list = slice(
            json!([{"addresses": ["10.1.0.1"], "nodeName": "n1"}, {"addresses": ["10.1.0.2"], "nodeName": "n2"}]),
        );
        let ports = build([&web], [&list], "n2", false);
        assert_eq!(ports[0].cluster_endpoints.len(), 2);
        assert_eq!(endpoints(ports[0].external_local_endpoints.as_ref().unwrap()), ["10.1.0.2:8080 local"]);
        assert_eq!(ports[0].node_port, 30080);
    }

    #[test]
    fn headless_aliases_and_other_families_are_left_out() {
        for spec in [
            json!({"clusterIP": "None", "ports": [{"port": 80}]}),
            json!({"type": "ExternalName", "externalName": "x.y"}),
            json!({"clusterIP": "fd00::1", "ports": [{"port": 80}]}),
        ] {
            assert_eq!(build([&service(spec)], [], "n1", false), []);
        }
    }
}
