//! What the watches have shown, kept as the model wants it: of each Service its ports, made anew only when it or one of its
//! slices has changed.
use crate::{
    model::{self, ServicePort},
    objects::{Service, Slice},
};
use apimachinery::meta::NamespacedName;
use component_base::informer::Informer;
use k8s_openapi::jiff::Timestamp;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

/// The ports of one family, by their Services.
pub type Ports = BTreeMap<NamespacedName, Arc<[ServicePort]>>;

/// Which Services have changed; filled by the watches, emptied by the proxier.
#[derive(Debug, Default)]
pub struct Changes {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    dirty: BTreeSet<NamespacedName>,
    /// The slices of each Service.
    slices: BTreeMap<NamespacedName, Vec<String>>,
    /// Since when the oldest change waits.
    since: Option<Instant>,
    /// When the pods or the Service changed of which slices tell; bounded.
    triggers: Vec<Timestamp>,
    services: u64,
    endpoints: u64,
}

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
    pub fn service(&self, key: &NamespacedName) {
        let mut state = self.state.lock();
        state.services += 1;
        state.mark(key.clone());
    }

    /// A slice came, changed or went.
    pub fn slice(&self, key: &NamespacedName, old: Option<&Slice>, new: Option<&Slice>) {
        let owner =
            |slice: &Slice| (!slice.service.is_empty()).then(|| NamespacedName::new(&key.namespace, &*slice.service));
        let mut state = self.state.lock();
        state.endpoints += 1;
        if let Some(service) = old.and_then(owner) {
            if let Some(names) = state.slices.get_mut(&service) {
                names.retain(|name| *name != key.name);
                if names.is_empty() {
                    state.slices.remove(&service);
                }
            }
            state.mark(service);
        }
        if let Some(time) = new.and_then(|slice| slice.trigger).filter(|_| state.triggers.len() < MAX_TRIGGERS) {
            state.triggers.push(time);
        }
        if let Some(service) = new.and_then(owner) {
            // Most have one.
            let names = state.slices.entry(service.clone()).or_insert_with(|| Vec::with_capacity(1));
            names.push(key.name.clone());
            state.mark(service);
        }
    }

    /// After this node's zone has changed: whoever has endpoints.
    pub fn touch_all(&self) {
        let mut state = self.state.lock();
        let all: Vec<_> = state.slices.keys().cloned().collect();
        all.into_iter().for_each(|service| state.mark(service));
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
        slices: &Informer<Slice>,
        zone: &str,
        ipv6: bool,
    ) -> Vec<ServicePort> {
        let Some(service) = services.get(&key.namespace, &key.name) else { return Vec::new() };
        let names = self.state.lock().slices.get(key).cloned().unwrap_or_default();
        let found: Vec<_> = names.iter().filter_map(|name| slices.get(&key.namespace, name)).collect();
        let found: Vec<&Slice> = found.iter().map(AsRef::as_ref).collect();
        model::build(key, &service, &found, zone, ipv6)
    }
}

impl State {
    fn mark(&mut self, service: NamespacedName) {
        self.dirty.insert(service);
        self.since.get_or_insert_with(Instant::now);
    }
}
