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
#[path = "plan_tests.rs"]
mod tests;
