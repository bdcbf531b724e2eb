//! What the cluster's names stand for: Services, their endpoints, namespaces. Kept up to date by informers, read by each query.
//!
//! Of every object only what an answer needs is kept. Endpoints are indexed by Service and by address, so a query costs a few
//! look-ups whatever the size of the cluster.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use apimachinery::meta::NamespacedName;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// A named port; `protocol` is in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Port {
    pub name: String,
    pub protocol: String,
    pub port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ServiceKind {
    ClusterIp(Vec<IpAddr>),
    Headless,
    ExternalName(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServiceRecord {
    pub kind: ServiceKind,
    pub ports: Vec<Port>,
}

/// One address behind a Service that may be given out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// The pod's hostname where it has one, else its address with dashes.
    pub name: String,
    pub address: IpAddr,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Slice {
    pub ports: Vec<Port>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Debug, Default)]
pub(crate) struct World {
    services: HashMap<NamespacedName, ServiceRecord>,
    slices: HashMap<NamespacedName, BTreeMap<String, Slice>>,
    namespaces: HashSet<String>,
    service_ips: HashMap<IpAddr, NamespacedName>,
    /// The Services and slices in which an address is.
    endpoint_ips: HashMap<IpAddr, BTreeSet<(NamespacedName, String)>>,
    /// Pods' addresses with their namespaces, where pods' names are verified.
    pods: HashSet<(IpAddr, String)>,
    /// Whether endpoints without a hostname are named as their pods are, not by their addresses.
    endpoint_pod_names: bool,
}

// === impl World ===

impl World {
    pub(crate) fn new(endpoint_pod_names: bool) -> World {
        World { endpoint_pod_names, ..World::default() }
    }

    pub(crate) fn service(&self, namespace: &str, name: &str) -> Option<&ServiceRecord> {
        self.services.get(&NamespacedName::new(namespace, name))
    }

    pub(crate) fn slices(&self, namespace: &str, name: &str) -> impl Iterator<Item = &Slice> {
        self.slices.get(&NamespacedName::new(namespace, name)).into_iter().flat_map(BTreeMap::values)
    }

    pub(crate) fn has_pod(&self, namespace: &str, address: IpAddr) -> bool {
        self.pods.contains(&(address, namespace.to_owned()))
    }

    /// A pod that had the addresses `old` has the addresses `new`.
    pub(crate) fn set_pod(&mut self, namespace: &str, old: &[IpAddr], new: &[IpAddr]) {
        let member = |address: &IpAddr| (*address, namespace.to_owned());
        for address in old {
            self.pods.remove(&member(address));
        }
        self.pods.extend(new.iter().map(member));
    }

    pub(crate) fn has_namespace(&self, name: &str) -> bool {
        self.namespaces.contains(name)
    }

    /// The Service whose cluster IP this is.
    pub(crate) fn service_at(&self, address: IpAddr) -> Option<&NamespacedName> {
        self.service_ips.get(&address)
    }

    /// The endpoints with this address, as (Service, endpoint's name).
    pub(crate) fn endpoints_at(&self, address: IpAddr) -> Vec<(&NamespacedName, &str)> {
        let mut found = Vec::new();
        for (service, slice) in self.endpoint_ips.get(&address).into_iter().flatten() {
            let endpoints = self.slices.get(service).and_then(|slices| slices.get(slice)).map(|slice| &slice.endpoints);
            for endpoint in endpoints.into_iter().flatten().filter(|endpoint| endpoint.address == address) {
                found.push((service, endpoint.name.as_str()));
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    pub(crate) fn set_namespace(&mut self, name: &str, present: bool) {
        if present {
            self.namespaces.insert(name.to_owned());
        } else {
            self.namespaces.remove(name);
        }
    }

    pub(crate) fn set_service(&mut self, key: NamespacedName, service: Option<&Service>) {
        if let Some(ServiceRecord { kind: ServiceKind::ClusterIp(ips), .. }) = self.services.remove(&key) {
            for ip in ips {
                if self.service_ips.get(&ip) == Some(&key) {
                    self.service_ips.remove(&ip);
                }
            }
        }
        let Some(record) = service.and_then(service_record) else { return };
        if let ServiceKind::ClusterIp(ips) = &record.kind {
            self.service_ips.extend(ips.iter().map(|ip| (*ip, key.clone())));
        }
        self.services.insert(key, record);
    }

    /// `key` is the slice's own; the Service is found in its label.
    pub(crate) fn set_slice(&mut self, key: &NamespacedName, old: Option<&EndpointSlice>, new: Option<&EndpointSlice>) {
        if let Some(service) = old.and_then(service_of) {
            self.remove_slice(&service, &key.name);
        }
        let Some((service, slice)) =
            new.and_then(|new| Some((service_of(new)?, slice_record(new, self.endpoint_pod_names))))
        else {
            return;
        };
        // A replay after a lost watch has no old object.
        self.remove_slice(&service, &key.name);
        for endpoint in &slice.endpoints {
            self.endpoint_ips.entry(endpoint.address).or_default().insert((service.clone(), key.name.clone()));
        }
        self.slices.entry(service).or_default().insert(key.name.clone(), slice);
    }

    fn remove_slice(&mut self, service: &NamespacedName, name: &str) {
        let Some(slices) = self.slices.get_mut(service) else { return };
        let removed = slices.remove(name).unwrap_or_default();
        if slices.is_empty() {
            self.slices.remove(service);
        }
        let member = (service.clone(), name.to_owned());
        for endpoint in removed.endpoints {
            if let Some(members) = self.endpoint_ips.get_mut(&endpoint.address) {
                members.remove(&member);
                if members.is_empty() {
                    self.endpoint_ips.remove(&endpoint.address);
                }
            }
        }
    }
}

fn service_of(slice: &EndpointSlice) -> Option<NamespacedName> {
    let name = slice.metadata.labels.as_ref()?.get(SERVICE_NAME_LABEL).filter(|name| !name.is_empty())?;
    Some(NamespacedName::new(slice.metadata.namespace.clone().unwrap_or_default(), name.clone()))
}

fn service_record(service: &Service) -> Option<ServiceRecord> {
    let spec = service.spec.as_ref()?;
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        Some(Port {
            name: port.name.clone().unwrap_or_default().to_lowercase(),
            protocol: port.protocol.as_deref().unwrap_or("TCP").to_lowercase(),
            port: u16::try_from(port.port).ok()?,
        })
    });
    let kind = if spec.type_.as_deref() == Some("ExternalName") {
        ServiceKind::ExternalName(spec.external_name.clone().filter(|name| !name.is_empty())?)
    } else if spec.cluster_ip.as_deref() == Some("None") {
        ServiceKind::Headless
    } else {
        let mut ips: Vec<IpAddr> = spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).collect();
        if ips.is_empty() {
            ips.extend(spec.cluster_ip.as_ref().and_then(|ip| ip.parse::<IpAddr>().ok()));
        }
        ServiceKind::ClusterIp(ips)
    };
    Some(ServiceRecord { kind, ports: ports.collect() })
}

/// The endpoints that are ready; the slices of a Service that publishes not-ready addresses say so of all.
fn slice_record(slice: &EndpointSlice, pod_names: bool) -> Slice {
    let ports = slice.ports.iter().flatten().filter_map(|port| {
        Some(Port {
            name: port.name.clone().unwrap_or_default().to_lowercase(),
            protocol: port.protocol.as_deref().unwrap_or("TCP").to_lowercase(),
            port: u16::try_from(port.port?).ok()?,
        })
    });
    let mut endpoints = Vec::new();
    for endpoint in slice.endpoints.iter().flatten() {
        if endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(false) {
            continue;
        }
        for address in endpoint.addresses.iter().filter_map(|address| address.parse::<IpAddr>().ok()) {
            let pod = endpoint.target_ref.as_ref().filter(|target| pod_names && target.kind.as_deref() == Some("Pod"));
            let hostname = endpoint.hostname.as_deref().filter(|name| !name.is_empty());
            let name = hostname.or_else(|| pod?.name.as_deref()).map(str::to_lowercase);
            endpoints.push(Endpoint { name: name.unwrap_or_else(|| dashed(address)), address });
        }
    }
    Slice { ports: ports.collect(), endpoints }
}

/// An address as a label: `10-0-0-5`.
pub(crate) fn dashed(address: IpAddr) -> String {
    address.to_string().replace(['.', ':'], "-")
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    pub(crate) fn slice(name: &str, service: &str, endpoints: serde_json::Value) -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": {"namespace": "ns", "name": name, "labels": {SERVICE_NAME_LABEL: service}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
            "endpoints": endpoints,
        }))
        .expect("a slice")
    }

    fn key(name: &str) -> NamespacedName {
        NamespacedName::new("ns", name)
    }

    #[test]
    fn slices_come_change_and_go() {
        let mut world = World::default();
        let address: IpAddr = "10.1.0.1".parse().expect("an address");
        let first = slice(
            "s-1",
            "web",
            json!([{"addresses": ["10.1.0.1"]}, {"addresses": ["10.1.0.2"], "conditions": {"ready": false}}]),
        );
        world.set_slice(&key("s-1"), None, Some(&first));
        let other = slice("s-2", "web", json!([{"addresses": ["10.1.0.1"], "hostname": "web-0"}]));
        world.set_slice(&key("s-2"), None, Some(&other));
        assert_eq!(world.slices("ns", "web").map(|slice| slice.endpoints.len()).sum::<usize>(), 2);
        let names: Vec<&str> = world.endpoints_at(address).into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["10-1-0-1", "web-0"]);

        // Replayed without an old object, and moved to another Service.
        world.set_slice(&key("s-1"), None, Some(&first));
        let moved = slice("s-1", "api", json!([{"addresses": ["10.1.0.9"]}]));
        world.set_slice(&key("s-1"), Some(&first), Some(&moved));
        assert_eq!(world.endpoints_at(address).len(), 1);
        assert_eq!(world.slices("ns", "api").count(), 1);

        world.set_slice(&key("s-1"), Some(&moved), None);
        world.set_slice(&key("s-2"), Some(&other), None);
        assert!(world.slices.is_empty() && world.endpoint_ips.is_empty());
    }

    #[test]
    fn a_cluster_ip_that_moves_is_found_at_its_new_service() {
        let mut world = World::default();
        let service = |ip: &str| -> Service {
            serde_json::from_value(json!({"spec": {"clusterIP": ip, "ports": [{"port": 80}]}})).expect("a service")
        };
        let address: IpAddr = "10.96.0.7".parse().expect("an address");
        world.set_service(key("a"), Some(&service("10.96.0.7")));
        world.set_service(key("b"), Some(&service("10.96.0.7")));
        world.set_service(key("a"), None);
        assert_eq!(world.service_at(address), Some(&key("b")));
        world.set_service(key("b"), Some(&service("None")));
        assert_eq!(world.service_at(address), None);
    }
}
