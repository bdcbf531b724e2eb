//! What is kept of Services and EndpointSlices: parsed when they come, and small, since there may be ten thousand.
use crate::{
    api::{self, SERVICE_NAME_LABEL, TRIGGER_TIME},
    model::Protocol,
};
use component_base::cidr::Cidr;
use k8s_openapi::jiff::Timestamp;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// As `DefaultClientIPServiceAffinitySeconds`.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

/// A Service with an address.
#[derive(Debug, Default)]
pub struct Service {
    /// None of an alias or a headless one.
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    /// Those of load balancers that send packets on unchanged (`ipMode: VIP`).
    pub load_balancer_ips: Vec<IpAddr>,
    /// Who may speak to the load balancer's addresses.
    pub source_ranges: Vec<Cidr>,
    /// Seconds that a client stays with its endpoint; none without session affinity.
    pub affinity_seconds: Option<u32>,
    pub internal_local: bool,
    pub external_local: bool,
    /// The port at which a node tells load balancers whether it has endpoints of it. As `HealthCheckNodePort`.
    pub health_check_port: Option<u16>,
    pub ports: Vec<Port>,
}

/// Of a Service, or of a slice, where it has no node port.
#[derive(Debug)]
pub struct Port {
    /// Empty for the only one.
    pub name: Box<str>,
    pub protocol: Protocol,
    pub port: u16,
    /// 0 if it has none.
    pub node_port: u16,
}

/// A slice of the endpoints of a Service.
#[derive(Debug, Default)]
pub struct Slice {
    /// The Service's name; empty if it has none.
    pub service: Box<str>,
    /// When that changed of which it tells.
    pub trigger: Option<Timestamp>,
    pub ports: Vec<Port>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Debug)]
pub struct Endpoint {
    pub ip: IpAddr,
    /// Whether it is on this node.
    pub local: bool,
    pub ready: bool,
    pub serving_while_terminating: bool,
    /// What its hints say: whether it is for this node, and for which zones; none if it has none.
    pub for_node: Option<bool>,
    pub for_zones: Option<Box<[String]>>,
}

impl From<api::Service> for Service {
    fn from(service: api::Service) -> Self {
        let spec = service.spec;
        let is_type = |name: &str| spec.r#type.as_deref() == Some(name);
        let [internal_local, external_local] = [&spec.internal_traffic_policy, &spec.external_traffic_policy]
            .map(|policy| policy.as_deref() == Some("Local"));
        let ingress =
            service.status.load_balancer.and_then(|status| status.ingress).filter(|_| is_type("LoadBalancer"));
        let unchanged = ingress.iter().flatten().filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"));
        let ranges = spec.load_balancer_source_ranges.iter().flatten();
        let cluster_ips =
            spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip).filter(|_| !is_type("ExternalName"));
        let affine = spec.session_affinity.as_deref() == Some("ClientIP");
        let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        let seconds = config.and_then(|config| config.timeout_seconds).and_then(|seconds| u32::try_from(seconds).ok());
        let checked = is_type("LoadBalancer") && external_local;
        Self {
            cluster_ips: distinct(cluster_ips),
            external_ips: distinct(spec.external_ips.iter().flatten()),
            load_balancer_ips: distinct(unchanged.filter_map(|ingress| ingress.ip.as_ref())),
            source_ranges: ranges.filter_map(|range| range.parse().ok()).collect(),
            affinity_seconds: affine.then(|| seconds.unwrap_or(DEFAULT_AFFINITY_SECONDS)),
            internal_local,
            external_local,
            health_check_port: spec.health_check_node_port.filter(|_| checked).map(number).filter(|port| *port != 0),
            ports: exact(spec.ports.iter().flatten().filter_map(|port| {
                let node_port = port.node_port.map_or(0, number);
                Port::new(port.name.as_ref(), port.protocol.as_ref(), number(port.port), node_port)
            })),
        }
    }
}

impl Slice {
    /// As the node of that name keeps it.
    pub fn new(slice: api::EndpointSlice, node: &str) -> Self {
        let of = |entries: &Option<BTreeMap<String, String>>, key: &str| entries.as_ref()?.get(key).cloned();
        let meta = &slice.metadata;
        Self {
            service: of(&meta.labels, SERVICE_NAME_LABEL).unwrap_or_default().into(),
            trigger: of(&meta.annotations, TRIGGER_TIME).and_then(|time| time.parse().ok()),
            ports: exact(
                slice
                    .ports
                    .into_iter()
                    .flatten()
                    .filter_map(|port| Port::new(port.name.as_ref(), port.protocol.as_ref(), number(port.port?), 0)),
            ),
            endpoints: exact(
                slice.endpoints.into_iter().flatten().filter_map(|endpoint| Endpoint::new(endpoint, node)),
            ),
        }
    }
}

impl Port {
    fn new(name: Option<&String>, protocol: Option<&String>, port: u16, node_port: u16) -> Option<Self> {
        let protocol = Protocol::parse(protocol.map_or("TCP", String::as_str))?;
        Some(Self { name: name.map_or("", String::as_str).into(), protocol, port, node_port })
    }
}

impl Endpoint {
    fn new(endpoint: api::Endpoint, node: &str) -> Option<Self> {
        let conditions = endpoint.conditions.unwrap_or_default();
        let ready = conditions.ready.unwrap_or(true);
        let (serving, terminating) = (conditions.serving.unwrap_or(true), conditions.terminating.unwrap_or(false));
        let hints = endpoint.hints.map(|hints| *hints).unwrap_or_default();
        let names = |all: Option<Vec<api::Named>>| -> Option<Box<[String]>> {
            all.filter(|all| !all.is_empty()).map(|all| all.into_iter().map(|one| one.name).collect())
        };
        Some(Self {
            ip: endpoint.address?,
            local: endpoint.node_name.as_deref() == Some(node),
            ready,
            serving_while_terminating: serving && terminating,
            for_node: names(hints.for_nodes).map(|nodes| nodes.iter().any(|name| name == node)),
            for_zones: names(hints.for_zones),
        })
    }
}

fn number(port: i32) -> u16 {
    u16::try_from(port).unwrap_or(0)
}

fn distinct<'a>(all: impl Iterator<Item = &'a String>) -> Vec<IpAddr> {
    all.filter_map(|ip| ip.parse().ok()).collect::<BTreeSet<IpAddr>>().into_iter().collect()
}

/// Without room to grow.
fn exact<T>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut all: Vec<T> = all.collect();
    all.shrink_to_fit();
    all
}
