//! What the watches have shown, kept as the model wants it: of each Service its ports, made anew only when it or one of its
//! slices has changed.
use crate::model::{self, NodeFacts, PortId, SERVICE_NAME_LABEL, ServicePort};
use apimachinery::meta::NamespacedName;
use component_base::informer::Informer;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use k8s_openapi::jiff::Timestamp;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

/// The ports of one family by name.
pub type Ports = BTreeMap<PortId, Arc<ServicePort>>;

/// Which Services have changed; filled by the watches, emptied by the proxier.
#[derive(Debug, Default)]
pub struct Changes {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    dirty: BTreeSet<NamespacedName>,
    /// The slices of each Service.
    slices: BTreeMap<NamespacedName, BTreeSet<String>>,
    /// Since when the oldest change waits.
    since: Option<Instant>,
    /// When the pods or the Service changed of which slices tell; bounded.
    triggers: Vec<Timestamp>,
    services: u64,
    endpoints: u64,
}

/// The annotation of a slice that says when what it tells of has changed.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const MAX_TRIGGERS: usize = 10_000;

/// What has changed since it was taken last.
#[derive(Default)]
pub struct Batch {
    pub dirty: BTreeSet<NamespacedName>,
    pub since: Option<Instant>,
    pub triggers: Vec<Timestamp>,
}

// === impl Changes ===

impl Changes {
    pub fn service(&self, service: &Service) {
        let mut state = self.state.lock();
        state.services += 1;
        state.mark(NamespacedName::of(service));
    }

    /// A slice came, changed or went.
    pub fn slice(&self, old: Option<&EndpointSlice>, new: Option<&EndpointSlice>) {
        let mut state = self.state.lock();
        state.endpoints += 1;
        if let Some((service, name)) = old.and_then(owner) {
            if let Some(names) = state.slices.get_mut(&service) {
                names.remove(&name);
                if names.is_empty() {
                    state.slices.remove(&service);
                }
            }
            state.mark(service);
        }
        let trigger = |slice: &EndpointSlice| slice.metadata.annotations.as_ref()?.get(TRIGGER_TIME)?.parse().ok();
        if let Some(time) = new.and_then(trigger).filter(|_| state.triggers.len() < MAX_TRIGGERS) {
            state.triggers.push(time);
        }
        if let Some((service, name)) = new.and_then(owner) {
            state.slices.entry(service.clone()).or_default().insert(name);
            state.mark(service);
        }
    }

    /// After this node's zone has changed, or the rules are no more what they were.
    pub fn touch_all(&self, services: &Informer<Service>) {
        let keys = services.list();
        let mut state = self.state.lock();
        keys.iter().for_each(|service| state.mark(NamespacedName::of(service.as_ref())));
    }

    pub fn take(&self) -> Batch {
        let mut state = self.state.lock();
        Batch {
            dirty: std::mem::take(&mut state.dirty),
            since: state.since.take(),
            triggers: std::mem::take(&mut state.triggers),
        }
    }

    /// What could not be applied waits on.
    pub fn put_back(&self, batch: Batch) {
        let mut state = self.state.lock();
        state.dirty.extend(batch.dirty);
        state.triggers.extend(batch.triggers);
        state.since = batch.since.or(state.since).or_else(|| Some(Instant::now()));
    }

    pub fn waiting_since(&self) -> Option<Instant> {
        self.state.lock().since
    }

    /// Changes of Services and of endpoints so far, and of how many Services any wait.
    pub fn counts(&self) -> (u64, u64, usize) {
        let state = self.state.lock();
        (state.services, state.endpoints, state.dirty.len())
    }

    /// The ports of a Service in one family, as they are now.
    pub fn build(
        &self,
        key: &NamespacedName,
        services: &Informer<Service>,
        slices: &Informer<EndpointSlice>,
        node: &NodeFacts,
        ipv6: bool,
    ) -> Vec<ServicePort> {
        let Some(service) = services.get(&key.namespace, &key.name) else { return Vec::new() };
        let names = self.state.lock().slices.get(key).cloned().unwrap_or_default();
        let found: Vec<_> = names.iter().filter_map(|name| slices.get(&key.namespace, name)).collect();
        let found: Vec<&EndpointSlice> = found.iter().map(AsRef::as_ref).collect();
        model::build(&service, &found, node, ipv6)
    }
}

impl State {
    fn mark(&mut self, service: NamespacedName) {
        self.dirty.insert(service);
        self.since.get_or_insert_with(Instant::now);
    }
}

/// The Service of a slice, and the slice's name.
fn owner(slice: &EndpointSlice) -> Option<(NamespacedName, String)> {
    let service = slice.metadata.labels.as_ref()?.get(SERVICE_NAME_LABEL)?;
    let namespace = slice.metadata.namespace.clone().unwrap_or_default();
    Some((NamespacedName::new(namespace, service.clone()), slice.metadata.name.clone()?))
}

/// The ports of one Service among all.
pub fn of_service<'a>(
    ports: &'a Ports,
    key: &'a NamespacedName,
) -> impl Iterator<Item = (&'a PortId, &'a Arc<ServicePort>)> {
    let from = PortId {
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        protocol: model::Protocol::Tcp,
        port_name: String::new(),
    };
    ports.range(from..).take_while(|(id, _)| id.namespace == key.namespace && id.name == key.name)
}

/// Only what the model reads of an object is kept.
pub fn slim_service(service: &mut Service) {
    let meta = &mut service.metadata;
    meta.annotations = None;
    meta.owner_references = None;
    meta.finalizers = None;
    meta.uid = None;
    meta.creation_timestamp = None;
    meta.labels = None;
    if let Some(spec) = service.spec.as_mut() {
        spec.selector = None;
    }
    if let Some(status) = service.status.as_mut() {
        status.conditions = None;
    }
}

pub fn slim_slice(slice: &mut EndpointSlice) {
    let meta = &mut slice.metadata;
    if let Some(annotations) = meta.annotations.as_mut() {
        annotations.retain(|name, _| name == TRIGGER_TIME);
    }
    meta.owner_references = None;
    meta.generate_name = None;
    meta.uid = None;
    meta.creation_timestamp = None;
    if let Some(labels) = meta.labels.as_mut() {
        labels.retain(|name, _| name == SERVICE_NAME_LABEL);
    }
    for endpoint in slice.endpoints.iter_mut().flatten() {
        endpoint.target_ref = None;
        endpoint.hostname = None;
        endpoint.zone = None;
        endpoint.deprecated_topology = None;
    }
}
