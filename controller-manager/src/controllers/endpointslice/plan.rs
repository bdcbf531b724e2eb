//! Which EndpointSlices a Service should have, with as few writes as will do. Pure.
use super::hints::{self, Distribution, Shares};
use crate::controllers::{claim::controller_reference, service_backends as backends};
use apimachinery::pod::is_ready;
use k8s_openapi::api::{
    core::v1::{Pod, Service},
    discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

pub const SERVICE_LABEL: &str = "kubernetes.io/service-name";
pub const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
pub const MANAGED_BY: &str = "endpointslice-controller.k8s.io";
/// The writes to make, and what to tell of hints: whether it is well, and a message.
#[derive(Debug, Default, PartialEq)]
pub struct Changes {
    pub create: Vec<EndpointSlice>,
    pub update: Vec<EndpointSlice>,
    pub delete: Vec<String>,
    pub told: Vec<(bool, String)>,
}

/// Where things are: the zones of the nodes that pods are on (a node that is gone is absent), and the zones' shares of the
/// cluster, if the Service's hints depend on them.
#[derive(Debug, Default)]
pub struct Topology {
    pub zones: HashMap<String, Option<String>>,
    pub shares: Option<Shares>,
}

/// Endpoints that can share a slice: of one family, with the same ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Group {
    pub family: String,
    /// Name, protocol, port, application protocol; sorted.
    pub ports: Vec<(String, String, i32, Option<String>)>,
}

/// As the reconciler of the endpointslice controller. `existing` are the slices that this controller made for the Service.
pub fn plan(
    service: &Service,
    pods: &[Arc<Pod>],
    topology: &Topology,
    existing: &[Arc<EndpointSlice>],
    max_per_slice: usize,
) -> Changes {
    let mut wanted = endpoints(service, pods, &topology.zones);
    let mut by_group: BTreeMap<Group, Vec<&EndpointSlice>> = BTreeMap::new();
    let mut changes = Changes::default();
    let families = backends::families(service);
    hint(service, topology, existing, &mut wanted, &mut changes);
    for slice in existing.iter().filter(|s| s.metadata.deletion_timestamp.is_none()) {
        let owned =
            slice.metadata.owner_references.iter().flatten().any(|o| Some(&o.uid) == service.metadata.uid.as_ref());
        if owned && families.contains(&slice.address_type) {
            by_group.entry(group_of(slice)).or_default().push(slice);
        } else {
            changes.delete.extend(slice.metadata.name.clone());
        }
    }
    // A family without endpoints keeps one empty slice, so that others see that there are none.
    for family in &families {
        if !wanted.keys().any(|g| g.family == *family) {
            wanted.insert(Group { family: family.clone(), ports: Vec::new() }, Vec::new());
        }
    }
    for (group, slices) in &by_group {
        if !wanted.contains_key(group) {
            changes.delete.extend(slices.iter().filter_map(|s| s.metadata.name.clone()));
        }
    }
    for (group, endpoints) in wanted {
        let slices = by_group.remove(&group).unwrap_or_default();
        fit(service, &group, endpoints, &slices, max_per_slice.max(1), &mut changes);
    }
    reuse(service, existing, &mut changes);
    changes
}

/// A slice that would be deleted becomes one that would be made: a write less, and no moment without. As `finalize`.
fn reuse(service: &Service, existing: &[Arc<EndpointSlice>], changes: &mut Changes) {
    for name in std::mem::take(&mut changes.delete) {
        let ours = |s: &&Arc<EndpointSlice>| {
            s.metadata.name.as_ref() == Some(&name)
                && s.metadata.deletion_timestamp.is_none()
                && s.metadata.owner_references.iter().flatten().any(|o| Some(&o.uid) == service.metadata.uid.as_ref())
        };
        let old = existing.iter().find(ours);
        let same_type =
            |old: &&Arc<EndpointSlice>| changes.create.iter().rposition(|new| new.address_type == old.address_type);
        match old.and_then(|old| Some((old, same_type(&old)?))) {
            Some((old, at)) => {
                let new = changes.create.remove(at);
                let mut updated = old.as_ref().clone();
                (updated.ports, updated.endpoints) = (new.ports, new.endpoints);
                updated.metadata.labels = new.metadata.labels;
                changes.update.push(updated);
            }
            None => changes.delete.push(name),
        }
    }
}

/// Says for which zones and nodes each endpoint is; what the slices say now is kept where it will do.
fn hint(
    service: &Service,
    topology: &Topology,
    existing: &[Arc<EndpointSlice>],
    wanted: &mut BTreeMap<Group, Vec<Endpoint>>,
    changes: &mut Changes,
) {
    let distribution = hints::distribution(service);
    if distribution != Distribution::Auto {
        wanted.values_mut().flatten().for_each(|e| hints::by_distribution(e, distribution));
        return;
    }
    let before: HashMap<String, &Endpoint> =
        existing.iter().flat_map(|s| s.endpoints.iter().flatten()).map(|e| (identity(e), e)).collect();
    let had_hints = before.values().any(|e| e.hints.is_some());
    for family in backends::families(service) {
        let of_family = wanted.iter_mut().filter(|(group, _)| group.family == family);
        let mut all: Vec<&mut Endpoint> = of_family.flat_map(|(_, endpoints)| endpoints).collect();
        all.iter_mut().for_each(|e| e.hints = before.get(&identity(e)).and_then(|old| old.hints.clone()));
        match hints::allocate(topology.shares.as_ref(), &mut all) {
            Ok(()) if had_hints => {}
            Ok(()) => {
                changes.told.push((true, format!("Topology Aware Hints has been enabled, addressType: {family}")));
            }
            Err(why) => {
                all.into_iter().for_each(|e| e.hints = None);
                changes.told.push((false, format!("{why}, addressType: {family}")));
            }
        }
    }
}

/// Distributes the endpoints of one group over its slices: those that are right stay where they are, new ones fill the
/// slices that change anyway, then new slices are made. As `reconcileByPortMapping`.
fn fit(
    service: &Service,
    group: &Group,
    endpoints: Vec<Endpoint>,
    slices: &[&EndpointSlice],
    max: usize,
    changes: &mut Changes,
) {
    let mut wanted: HashMap<String, Endpoint> = endpoints.into_iter().map(|e| (identity(&e), e)).collect();
    // Each slice with its endpoints afterwards, and whether that is a change.
    let mut kept: Vec<(&EndpointSlice, Vec<Endpoint>, bool)> = Vec::new();
    for slice in slices {
        let mut changed = false;
        let mut stay = Vec::new();
        for endpoint in slice.endpoints.iter().flatten() {
            match wanted.remove(&identity(endpoint)) {
                Some(new) => {
                    changed |= new != normal(endpoint);
                    stay.push(new);
                }
                None => changed = true,
            }
        }
        kept.push((slice, stay, changed || !labels_fit(service, slice)));
    }
    let mut left: Vec<Endpoint> = wanted.into_values().collect();
    left.sort_by(|a, b| b.addresses.cmp(&a.addresses));
    // Fill the fullest slices that change anyway; if that is not enough, one that has room for all that is left.
    kept.sort_by_key(|(_, stay, _)| std::cmp::Reverse(stay.len()));
    for (_, stay, _) in kept.iter_mut().filter(|(_, _, changed)| *changed) {
        while stay.len() < max
            && let Some(endpoint) = left.pop()
        {
            stay.push(endpoint);
        }
    }
    // Slices that are full from the first leave a rest that may fit beside others.
    let mut full = Vec::new();
    while left.len() >= max {
        let rest = left.split_off(max);
        full.push(std::mem::replace(&mut left, rest));
    }
    if !left.is_empty()
        && let Some((_, stay, changed)) = kept.iter_mut().find(|(_, stay, _)| stay.len() + left.len() <= max)
    {
        *changed = true;
        stay.append(&mut left);
    }
    let mut any_stays = false;
    let empty_is_wanted =
        group.ports.is_empty() && full.is_empty() && left.is_empty() && kept.iter().all(|(_, stay, _)| stay.is_empty());
    for (slice, stay, changed) in kept {
        let placeholder = empty_is_wanted && !any_stays;
        if stay.is_empty() && !placeholder {
            changes.delete.extend(slice.metadata.name.clone());
            continue;
        }
        any_stays = true;
        if changed {
            let mut updated = slice.clone();
            set_content(&mut updated, service, stay);
            changes.update.push(updated);
        }
    }
    for endpoints in full.into_iter().chain(Some(left).filter(|left| !left.is_empty())) {
        changes.create.push(new_slice(service, group, endpoints));
        any_stays = true;
    }
    if !any_stays && empty_is_wanted {
        changes.create.push(new_slice(service, group, Vec::new()));
    }
}

/// What tells endpoints apart: the address and the pod.
pub fn identity(endpoint: &Endpoint) -> String {
    let uid = endpoint.target_ref.as_ref().and_then(|r| r.uid.as_deref()).unwrap_or_default();
    format!("{}/{uid}", endpoint.addresses.first().map(String::as_str).unwrap_or_default())
}

/// As we write it: what the server may have added or a stale writer left does not count as a difference.
fn normal(endpoint: &Endpoint) -> Endpoint {
    Endpoint { deprecated_topology: None, ..endpoint.clone() }
}

fn endpoints(
    service: &Service,
    pods: &[Arc<Pod>],
    zones: &HashMap<String, Option<String>>,
) -> BTreeMap<Group, Vec<Endpoint>> {
    let mut groups: BTreeMap<Group, Vec<Endpoint>> = BTreeMap::new();
    // Nobody reaches a pod whose node is gone.
    let placed = |p: &Arc<Pod>| {
        backends::publishes_not_ready(service) || backends::node_name(p).is_none_or(|n| zones.contains_key(&n))
    };
    for pod in pods.iter().filter(|p| backends::may_serve(p, true) && placed(p)) {
        let ports = ports(service, pod);
        for family in backends::families(service) {
            let addresses = backends::addresses(pod);
            let Some(address) = addresses.iter().find(|a| backends::is_of_family(a, &family)) else { continue };
            let group = Group { family, ports: ports.clone() };
            groups.entry(group).or_default().push(endpoint(service, pod, address.to_string(), zones));
        }
    }
    groups
}

fn endpoint(service: &Service, pod: &Pod, address: String, zones: &HashMap<String, Option<String>>) -> Endpoint {
    let serving = is_ready(pod);
    let terminating = pod.metadata.deletion_timestamp.is_some();
    let ready = backends::publishes_not_ready(service) || (serving && !terminating);
    let node_name = backends::node_name(pod);
    Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: backends::hostname(pod, service),
        zone: node_name.as_ref().and_then(|n| zones.get(n).cloned().flatten()),
        node_name,
        target_ref: Some(backends::reference_to(pod)),
        ..Endpoint::default()
    }
}

/// The Service's ports as the pod has them; ports that it lacks are left out. As `getEndpointPorts`.
fn ports(service: &Service, pod: &Pod) -> Vec<(String, String, i32, Option<String>)> {
    let all = service.spec.iter().flat_map(|s| s.ports.iter().flatten());
    let mut ports: Vec<_> = all
        .filter_map(|port| {
            let number = backends::target_port(pod, port)?;
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            Some((port.name.clone().unwrap_or_default(), protocol, number, port.app_protocol.clone()))
        })
        .collect();
    ports.sort();
    ports
}

/// What a slice's endpoints have in common.
pub fn group_of(slice: &EndpointSlice) -> Group {
    let mut ports: Vec<_> = slice
        .ports
        .iter()
        .flatten()
        .map(|p| {
            let protocol = p.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            (p.name.clone().unwrap_or_default(), protocol, p.port.unwrap_or_default(), p.app_protocol.clone())
        })
        .collect();
    ports.sort();
    Group { family: slice.address_type.clone(), ports }
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.remove(backends::HEADLESS_LABEL);
    if backends::is_headless(service) {
        labels.insert(backends::HEADLESS_LABEL.to_owned(), String::new());
    }
    labels.insert(SERVICE_LABEL.to_owned(), service.metadata.name.clone().unwrap_or_default());
    labels.insert(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned());
    labels
}

fn labels_fit(service: &Service, slice: &EndpointSlice) -> bool {
    slice.metadata.labels.as_ref() == Some(&labels(service))
}

fn set_content(slice: &mut EndpointSlice, service: &Service, mut endpoints: Vec<Endpoint>) {
    endpoints.sort_by(|a, b| a.addresses.cmp(&b.addresses));
    slice.endpoints = Some(endpoints);
    slice.metadata.labels = Some(labels(service));
}

fn new_slice(service: &Service, group: &Group, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let name = service.metadata.name.as_deref().unwrap_or_default();
    let mut slice = EndpointSlice { address_type: group.family.clone(), ..EndpointSlice::default() };
    slice.metadata.generate_name = Some(format!("{name}-"));
    slice.metadata.namespace.clone_from(&service.metadata.namespace);
    slice.metadata.owner_references = Some(vec![controller_reference(service)]);
    let port = |(name, protocol, port, app_protocol): &(String, String, i32, Option<String>)| EndpointPort {
        name: Some(name.clone()),
        protocol: Some(protocol.clone()),
        port: Some(*port),
        app_protocol: app_protocol.clone(),
    };
    slice.ports = Some(group.ports.iter().map(port).collect());
    set_content(&mut slice, service, endpoints);
    slice
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn service(spec: Value) -> Service {
        let mut value = json!({"metadata": {"name": "web", "namespace": "ns", "uid": "s", "labels": {"team": "a"}},
            "spec": {"clusterIP": "10.96.0.5", "selector": {"app": "web"}, "ipFamilies": ["IPv4"],
                "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]}});
        for (k, v) in spec.as_object().into_iter().flatten() {
            value["spec"][k] = v.clone();
        }
        serde_json::from_value(value).unwrap()
    }

    fn pod(number: usize, ready: bool, more: Value) -> Arc<Pod> {
        let mut value = json!({"metadata": {"name": format!("p{number}"), "namespace": "ns", "uid": format!("u{number}"),
                "labels": {"app": "web"}},
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"phase": "Running", "podIP": format!("10.0.{}.{}", number / 250, number % 250),
                "podIPs": [{"ip": format!("10.0.{}.{}", number / 250, number % 250)}, {"ip": format!("fd00::{number:x}")}],
                "conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"}}]}});
        for (k, v) in more.as_object().into_iter().flatten() {
            for (k2, v2) in v.as_object().into_iter().flatten() {
                value[k][k2] = v2.clone();
            }
        }
        Arc::new(serde_json::from_value(value).unwrap())
    }

    /// Applies changes as the server would.
    fn apply(existing: &[Arc<EndpointSlice>], changes: Changes) -> Vec<Arc<EndpointSlice>> {
        let mut after: Vec<_> = existing
            .iter()
            .filter(|s| !changes.delete.contains(s.metadata.name.as_ref().unwrap()))
            .map(|s| changes.update.iter().find(|u| u.metadata.name == s.metadata.name).unwrap_or(s).clone())
            .collect();
        for mut slice in changes.create {
            slice.metadata.name = Some(format!("web-{}", apimachinery::names::random_suffix(8)));
            after.push(slice);
        }
        after.into_iter().map(Arc::new).collect()
    }

    fn topology() -> Topology {
        Topology { zones: HashMap::from([("n1".to_owned(), Some("z1".to_owned()))]), shares: None }
    }

    fn go(service: &Service, pods: &[Arc<Pod>], existing: &[Arc<EndpointSlice>]) -> Vec<Arc<EndpointSlice>> {
        let after = apply(existing, plan(service, pods, &topology(), existing, 100));
        assert_eq!(plan(service, pods, &topology(), &after, 100), Changes::default(), "one step settles it");
        after
    }

    #[test]
    fn an_endpoint_says_where_and_how_it_is() {
        let terminating = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
        for (ready, more, publish, expected) in [
            (true, json!({}), false, (true, true, false)),
            (false, json!({}), false, (false, false, false)),
            (false, json!({}), true, (true, false, false)),
            (true, terminating.clone(), false, (false, true, true)),
            (false, terminating, false, (false, false, true)),
        ] {
            let service = service(json!({"publishNotReadyAddresses": publish}));
            let slices = go(&service, &[pod(1, ready, more)], &[]);
            let endpoint = &slices[0].endpoints.as_ref().unwrap()[0];
            let c = endpoint.conditions.as_ref().unwrap();
            assert_eq!((c.ready.unwrap(), c.serving.unwrap(), c.terminating.unwrap()), expected);
            assert_eq!(endpoint.zone.as_deref(), Some("z1"));
            assert_eq!(endpoint.node_name.as_deref(), Some("n1"));
            assert_eq!(endpoint.target_ref.as_ref().unwrap().uid.as_deref(), Some("u1"));
        }
    }

    #[test]
    fn slices_carry_labels_owner_and_ports() {
        let slices = go(&service(json!({"clusterIP": "None"})), &[pod(1, true, json!({}))], &[]);
        let labels = slices[0].metadata.labels.as_ref().unwrap();
        assert_eq!(labels[SERVICE_LABEL], "web");
        assert_eq!(labels[MANAGED_BY_LABEL], MANAGED_BY);
        assert!(labels.contains_key("team") && labels.contains_key(backends::HEADLESS_LABEL));
        assert_eq!(slices[0].metadata.owner_references.as_ref().unwrap()[0].kind, "Service");
        let port = &slices[0].ports.as_ref().unwrap()[0];
        assert_eq!((port.name.as_deref(), port.port), (Some("http"), Some(8080)));
    }

    #[test]
    fn headless_pods_have_their_hostnames() {
        let named = pod(1, true, json!({"spec": {"hostname": "web-0", "subdomain": "web"}}));
        let other = pod(2, true, json!({"spec": {"hostname": "web-1", "subdomain": "other"}}));
        let slices = go(&service(json!({"clusterIP": "None"})), &[named, other], &[]);
        let hostnames: Vec<_> = slices[0].endpoints.iter().flatten().map(|e| e.hostname.as_deref()).collect();
        assert_eq!(hostnames, [Some("web-0"), None]);
    }

    #[test]
    fn both_families_have_slices_of_their_own() {
        let slices = go(&service(json!({"ipFamilies": ["IPv4", "IPv6"]})), &[pod(1, true, json!({}))], &[]);
        let mut families: Vec<_> = slices.iter().map(|s| s.address_type.as_str()).collect();
        families.sort_unstable();
        assert_eq!(families, ["IPv4", "IPv6"]);
        let back = go(&service(json!({})), &[pod(1, true, json!({}))], &slices);
        assert_eq!(back.len(), 1, "a family that the service lost loses its slices");
    }

    #[test]
    fn a_service_without_pods_has_one_empty_slice() {
        let empty = go(&service(json!({})), &[], &[]);
        assert_eq!((empty.len(), empty[0].endpoints.as_ref().map(Vec::len)), (1, Some(0)));
        let full = go(&service(json!({})), &[pod(1, true, json!({}))], &empty);
        assert_eq!((full.len(), full[0].endpoints.as_ref().map(Vec::len)), (1, Some(1)));
        let gone = json!({"status": {"phase": "Succeeded"}});
        assert_eq!(go(&service(json!({})), &[pod(1, true, gone)], &full)[0].endpoints.as_ref().map(Vec::len), Some(0));
    }

    #[test]
    fn slices_hold_at_most_a_hundred_and_change_little() {
        let pods: Vec<_> = (1..=250).map(|n| pod(n, true, json!({}))).collect();
        let service = service(json!({}));
        let slices = go(&service, &pods, &[]);
        let sizes = |slices: &[Arc<EndpointSlice>]| {
            let mut sizes: Vec<_> = slices.iter().map(|s| s.endpoints.as_ref().map_or(0, Vec::len)).collect();
            sizes.sort_unstable();
            sizes
        };
        assert_eq!(sizes(&slices), [50, 100, 100]);
        // One pod less and two more: as few slices as possible are written.
        let mut later: Vec<_> = pods[1..].to_vec();
        later.extend([pod(300, true, json!({})), pod(301, true, json!({}))]);
        let changes = plan(&service, &later, &topology(), &slices, 100);
        assert!(changes.create.is_empty() && changes.delete.is_empty());
        assert!(changes.update.len() <= 2, "{}", changes.update.len());
        let after = apply(&slices, changes);
        assert_eq!(sizes(&after).iter().sum::<usize>(), 251);
    }

    #[test]
    fn what_new_slices_leave_over_goes_beside_others() {
        let service = service(json!({}));
        let pods: Vec<_> = (1..=190).map(|n| pod(n, true, json!({}))).collect();
        let slices = go(&service, &pods[..40], &[]);
        let changes = plan(&service, &pods, &topology(), &slices, 100);
        assert_eq!((changes.create.len(), changes.update.len()), (1, 1));
        assert_eq!(changes.update[0].endpoints.as_ref().map(Vec::len), Some(90));
    }

    #[test]
    fn another_port_changes_the_slice_and_makes_no_new_one() {
        let slices = go(&service(json!({})), &[pod(1, true, json!({}))], &[]);
        let port = json!([{"name": "http", "port": 80, "targetPort": 9090, "protocol": "TCP"}]);
        let later = service(json!({"ports": port}));
        let changes = plan(&later, &[pod(1, true, json!({}))], &topology(), &slices, 100);
        assert_eq!((changes.create.len(), changes.delete.len(), changes.update.len()), (0, 0, 1));
        let after = apply(&slices, changes);
        assert_eq!(after[0].metadata.name, slices[0].metadata.name);
        assert_eq!(after[0].ports.as_ref().unwrap()[0].port, Some(9090));
        let mut foreign = slices[0].as_ref().clone();
        foreign.metadata.owner_references.as_mut().unwrap()[0].uid = "another".to_owned();
        let changes = plan(&later, &[pod(1, true, json!({}))], &topology(), &[Arc::new(foreign)], 100);
        assert_eq!((changes.create.len(), changes.delete.len()), (1, 1), "of a Service that had the name before");
    }

    #[test]
    fn a_pod_whose_node_is_gone_is_left_out() {
        let lost = pod(1, true, json!({"spec": {"nodeName": "gone"}}));
        let count = |publish: bool| {
            let service = service(json!({"publishNotReadyAddresses": publish}));
            go(&service, std::slice::from_ref(&lost), &[])[0].endpoints.as_ref().map(Vec::len)
        };
        assert_eq!((count(false), count(true)), (Some(0), Some(1)));
    }

    #[test]
    fn hints_come_and_go_with_the_field() {
        let pods = [pod(1, true, json!({}))];
        let near = go(&service(json!({"trafficDistribution": "PreferSameZone"})), &pods, &[]);
        let hints = |slices: &[Arc<EndpointSlice>]| slices[0].endpoints.as_ref().unwrap()[0].hints.clone();
        assert_eq!(hints(&near).unwrap().for_zones.unwrap()[0].name, "z1");
        assert_eq!(hints(&go(&service(json!({})), &pods, &near)), None);
    }

    #[test]
    fn pods_with_other_ports_have_other_slices() {
        let named = service(json!({"ports": [{"name": "http", "port": 80, "targetPort": "web"}]}));
        let with = |n, port| {
            pod(
                n,
                true,
                json!({"spec": {"containers": [{"name": "c", "ports": [{"name": "web", "containerPort": port}]}]}}),
            )
        };
        let slices = go(&named, &[with(1, 8080), with(2, 9090), with(3, 8080)], &[]);
        assert_eq!(slices.len(), 2);
    }
}
