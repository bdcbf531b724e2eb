//! The Endpoints object of a Service: what older clients read instead of EndpointSlices. Pure.
use crate::controllers::service_backends as backends;
use apimachinery::pod::is_ready;
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Pod, Service};
use std::{collections::BTreeMap, sync::Arc};

const MANAGED_BY: (&str, &str) = ("endpoints.kubernetes.io/managed-by", "endpoint-controller");
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
/// Addresses in one object; the rest is left out and an annotation says so.
const MAX_ADDRESSES: usize = 1000;

/// Name, protocol, port, application protocol.
type Port = (String, String, i32, Option<String>);

/// What the object must become; None if it is right. As `syncService` of the endpoints controller.
pub fn plan(service: &Service, pods: &[Arc<Pod>], existing: Option<&Endpoints>) -> Option<Endpoints> {
    let (subsets, truncated) = truncate(subsets(service, pods));
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.remove(backends::HEADLESS_LABEL);
    if service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref()).is_none_or(|ip| ip.is_empty() || ip == "None") {
        labels.insert(backends::HEADLESS_LABEL.to_owned(), String::new());
    }
    labels.insert(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned());

    let mut wanted = existing.cloned().unwrap_or_default();
    wanted.metadata.name.clone_from(&service.metadata.name);
    wanted.metadata.namespace.clone_from(&service.metadata.namespace);
    wanted.metadata.labels = Some(labels);
    let annotations = wanted.metadata.annotations.get_or_insert_default();
    if truncated {
        annotations.insert(OVER_CAPACITY.to_owned(), "truncated".to_owned());
    } else {
        annotations.remove(OVER_CAPACITY);
    }
    if annotations.is_empty() {
        wanted.metadata.annotations = None;
    }
    wanted.subsets = (!subsets.is_empty()).then_some(subsets);
    (existing != Some(&wanted)).then_some(wanted)
}

/// Addresses grouped by their ports, in an order of their own.
fn subsets(service: &Service, pods: &[Arc<Pod>]) -> Vec<EndpointSubset> {
    let families = backends::families(service);
    let publish = backends::publishes_not_ready(service);
    let mut groups: BTreeMap<Vec<Port>, (Vec<EndpointAddress>, Vec<EndpointAddress>)> = BTreeMap::new();
    for pod in pods.iter().filter(|p| backends::may_serve(p, publish)) {
        let addresses = backends::addresses(pod);
        let Some(ip) = addresses.iter().find(|a| families.first().is_some_and(|f| backends::is_of_family(a, f))) else {
            continue;
        };
        let address = EndpointAddress {
            ip: ip.to_string(),
            hostname: backends::hostname(pod, service),
            node_name: backends::node_name(pod),
            target_ref: Some(backends::reference_to(pod)),
        };
        let ports: Vec<Port> = service
            .spec
            .iter()
            .flat_map(|s| s.ports.iter().flatten())
            .filter_map(|port| {
                let number = backends::target_port(pod, port)?;
                let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
                Some((port.name.clone().unwrap_or_default(), protocol, number, port.app_protocol.clone()))
            })
            .collect();
        if ports.is_empty() && !backends::is_headless(service) {
            continue;
        }
        let (ready, not_ready) = groups.entry(ports).or_default();
        if publish || is_ready(pod) { ready.push(address) } else { not_ready.push(address) }
    }
    let some = |mut addresses: Vec<EndpointAddress>| {
        addresses.sort_by(|a, b| a.ip.cmp(&b.ip));
        (!addresses.is_empty()).then_some(addresses)
    };
    let port = |(name, protocol, port, app_protocol): Port| EndpointPort {
        name: (!name.is_empty()).then_some(name),
        protocol: Some(protocol),
        port,
        app_protocol,
    };
    groups
        .into_iter()
        .map(|(ports, (ready, not_ready))| EndpointSubset {
            addresses: some(ready),
            not_ready_addresses: some(not_ready),
            ports: (!ports.is_empty()).then(|| ports.into_iter().map(port).collect()),
        })
        .collect()
}

fn truncate(mut subsets: Vec<EndpointSubset>) -> (Vec<EndpointSubset>, bool) {
    let mut room = MAX_ADDRESSES;
    let mut truncated = false;
    let mut cut = |addresses: &mut Option<Vec<EndpointAddress>>| {
        if let Some(list) = addresses {
            truncated |= list.len() > room;
            list.truncate(room);
            room -= list.len();
            if list.is_empty() {
                *addresses = None;
            }
        }
    };
    subsets.iter_mut().for_each(|s| cut(&mut s.addresses));
    subsets.iter_mut().for_each(|s| cut(&mut s.not_ready_addresses));
    subsets.retain(|s| s.addresses.is_some() || s.not_ready_addresses.is_some());
    (subsets, truncated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn service(publish: bool) -> Service {
        serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "ns"},
            "spec": {"clusterIP": "10.96.0.5", "selector": {"app": "web"}, "publishNotReadyAddresses": publish,
                "ports": [{"port": 80, "targetPort": 8080}]}}))
        .unwrap()
    }

    fn pod(number: usize, ready: bool, meta: Value) -> Arc<Pod> {
        let mut value = json!({"metadata": {"name": format!("p{number}"), "uid": number.to_string()},
            "spec": {"containers": []},
            "status": {"phase": "Running", "podIP": format!("10.0.{}.{}", number / 250, number % 250),
                "conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"}}]}});
        meta.as_object().into_iter().flatten().for_each(|(k, v)| value["metadata"][k] = v.clone());
        Arc::new(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn ready_and_not_ready_are_apart() {
        let going = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
        let pods = [pod(1, true, json!({})), pod(2, false, json!({})), pod(3, true, going)];
        let got = plan(&service(false), &pods, None).unwrap();
        let subset = &got.subsets.as_ref().unwrap()[0];
        let ips = |a: &Option<Vec<EndpointAddress>>| a.iter().flatten().map(|a| a.ip.clone()).collect::<Vec<_>>();
        assert_eq!(ips(&subset.addresses), ["10.0.0.1"]);
        assert_eq!(ips(&subset.not_ready_addresses), ["10.0.0.2"]);
        assert_eq!(subset.ports.as_ref().unwrap()[0].port, 8080);
        assert_eq!(got.metadata.labels.as_ref().unwrap()[MANAGED_BY.0], MANAGED_BY.1);
        assert_eq!(plan(&service(false), &pods, Some(&got)), None, "it is right");
        let all = plan(&service(true), &pods, Some(&got)).unwrap();
        assert_eq!(ips(&all.subsets.unwrap()[0].addresses).len(), 3, "publishNotReadyAddresses");
    }

    #[test]
    fn too_many_addresses_are_cut_with_a_note() {
        let pods: Vec<_> = (1..=1100).map(|n| pod(n, true, json!({}))).collect();
        let got = plan(&service(false), &pods, None).unwrap();
        assert_eq!(got.subsets.as_ref().unwrap()[0].addresses.as_ref().unwrap().len(), MAX_ADDRESSES);
        assert_eq!(got.metadata.annotations.unwrap()[OVER_CAPACITY], "truncated");
        assert_eq!(plan(&service(false), &[], None).unwrap().subsets, None);
    }
}
