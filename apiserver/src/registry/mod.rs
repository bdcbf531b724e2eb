//! The table of what is served: each resource with its facts, its strategy and its place in the store.

pub mod admissionregistration;
pub mod allocation;
pub mod apiextensions;
pub mod apiregistration;
pub mod apps;
pub mod autoscaling;
pub mod batch;
pub mod builtin;
mod cel;
pub mod certificates;
pub mod checks;
pub mod coordination;
pub mod core;
pub mod discovery;
pub mod field;
pub mod flowcontrol;
pub mod metadata;
#[cfg(test)]
mod mutation_tests;
pub mod networking;
pub mod node;
pub mod object;
pub mod policy;
pub mod print;
pub mod rbac;
#[cfg(test)]
mod refusal_tests;
pub mod reset_fields;
pub mod resource;
pub mod rules;
pub mod scheduling;
pub mod storage;
pub mod strategy;
pub mod table;
pub mod workload;

use crate::endpoints::Endpoint;
use crate::options::Options;
use crate::storage::StoredObject;
use crate::storage::object::{Path, split};
use allocation::Allocator;
use apimachinery::facts::{self, KindFacts, TypeFacts};
use apimachinery::meta::Gvr;
use builtin::{Builtin, Settings};
use bytes::Bytes;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use strategy::{Plain, Strategy};

/// One served resource in one version.
pub struct Resource {
    pub gvr: Gvr,
    pub kind: String,
    /// `v1`, `apps/v1`.
    pub api_version: String,
    pub namespaced: bool,
    pub facts: &'static KindFacts,
    pub schema: Option<&'static TypeFacts>,
    pub strategy: Arc<dyn Strategy>,
    /// Below `/registry/`: `pods`, `services/specs`. Resources that are versions of each other share it.
    pub storage_prefix: String,
    /// `apiVersion` and `kind` of what is stored.
    pub stored_api_version: String,
    pub has_status: bool,
}

/// All that is served.
pub struct Registry {
    /// By their plural names: few share one.
    resources: HashMap<String, Vec<Arc<Resource>>>,
    /// With their subresources, by the resources' plural names.
    endpoints: HashMap<String, Vec<(Gvr, &'static str, Arc<dyn Endpoint>)>>,
}

// === impl Resource ===

impl Resource {
    /// A built-in resource.
    pub fn of(facts: &'static KindFacts, strategy: Arc<dyn Strategy>) -> Self {
        Self {
            gvr: Gvr::new(facts.group, facts.version, facts.resource),
            kind: facts.kind.to_owned(),
            api_version: facts.api_version(),
            namespaced: facts.namespaced,
            facts,
            schema: facts::schema_of(facts.group, facts.version, facts.kind),
            stored_api_version: stored_api_version(facts),
            strategy,
            storage_prefix: facts.storage_prefix.to_owned(),
            has_status: facts.subresource("status").is_some(),
        }
    }

    /// The object in the served version.
    pub fn value(&self, object: &StoredObject) -> Value {
        let mut value = object.value();
        if self.strategy.converts() {
            self.strategy.from_stored(&mut value);
        }
        value
    }

    /// The object in the served version, and the text of its managedFields apart (empty if it has none).
    pub fn split(&self, object: &StoredObject) -> (Value, String) {
        self.split_but(object, &[])
    }

    /// The same without some members.
    pub fn split_but(&self, object: &StoredObject, unread: &[Path]) -> (Value, String) {
        let (mut value, managed) = split(&object.json(), unread);
        if self.strategy.converts() {
            self.strategy.from_stored(&mut value);
        }
        (value, managed)
    }

    /// The object's JSON in the served version: the shared bytes, where nothing has to be converted.
    pub fn json(&self, object: &StoredObject) -> Bytes {
        if self.strategy.converts() { self.value(object).to_string().into() } else { object.json() }
    }

    /// An object of the served version as it is stored.
    pub fn to_stored<'v>(&self, object: &'v Value) -> Cow<'v, Value> {
        if !self.strategy.converts() {
            return Cow::Borrowed(object);
        }
        let mut object = object.clone();
        self.strategy.to_stored(&mut object);
        Cow::Owned(object)
    }
}

// === impl Registry ===

impl Registry {
    /// The built-in kinds with the strategies that `strategy_of` knows, and the endpoints of virtual resources.
    pub fn new(
        strategy_of: impl Fn(&'static KindFacts) -> Option<Arc<dyn Strategy>>,
        endpoints: Vec<(Gvr, &'static str, Arc<dyn Endpoint>)>,
    ) -> Self {
        let mut registry = Self { resources: HashMap::new(), endpoints: HashMap::new() };
        for facts in facts::kinds() {
            let resource = Resource::of(facts, strategy_of(facts).unwrap_or_else(|| Arc::new(Plain)));
            registry.resources.entry(facts.resource.to_owned()).or_default().push(Arc::new(resource));
        }
        for (gvr, subresource, endpoint) in endpoints {
            let named = registry.endpoints.entry(gvr.resource.clone()).or_default();
            named.push((gvr, subresource, endpoint));
        }
        registry
    }

    pub fn get(&self, group: &str, version: &str, resource: &str) -> Option<&Arc<Resource>> {
        self.resources.get(resource)?.iter().find(|r| r.gvr.group == group && r.gvr.version == version)
    }

    pub fn endpoint(
        &self,
        group: &str,
        version: &str,
        resource: &str,
        subresource: &str,
    ) -> Option<&Arc<dyn Endpoint>> {
        let mut named = self.endpoints.get(resource)?.iter();
        let found = named.find(|(gvr, sub, _)| *sub == subresource && gvr.group == group && gvr.version == version);
        found.map(|(_, _, endpoint)| endpoint)
    }

    /// The versions of what a resource stores, itself among them.
    pub fn versions_of<'r>(&'r self, resource: &'r Resource) -> impl Iterator<Item = &'r Arc<Resource>> {
        let named = self.resources.get(&resource.gvr.resource).into_iter().flatten();
        named.filter(|other| other.storage_prefix == resource.storage_prefix)
    }

    pub fn resources(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources.values().flatten()
    }
}

/// The version in which kube-apiserver stores a kind that is served in several.
fn stored_api_version(facts: &KindFacts) -> String {
    match (facts.group, facts.resource) {
        ("autoscaling", "horizontalpodautoscalers") => "autoscaling/v2".to_owned(),
        ("events.k8s.io", "events") => "v1".to_owned(),
        _ => facts.api_version(),
    }
}

/// What strategies heed of the command line, and the allocator that they share.
pub fn settings(options: &Options) -> anyhow::Result<Arc<Settings>> {
    let services = Allocator::new(&options.service_cluster_ip_range, &options.service_node_port_range);
    let event_ttl_seconds = i64::try_from(options.event_ttl.as_secs()).unwrap_or(i64::MAX);
    let services = services.map_err(anyhow::Error::msg)?;
    Ok(Arc::new(Settings { event_ttl_seconds, allow_privileged: options.allow_privileged, services }))
}

/// The strategy of each kind.
pub fn strategies(settings: Arc<Settings>) -> impl Fn(&'static KindFacts) -> Option<Arc<dyn Strategy>> {
    move |facts| Some(Arc::new(Builtin::new(facts, settings.clone())))
}

/// The virtual resources and subresources of the registry: (resource, subresource, endpoint).
pub fn endpoints() -> Vec<(Gvr, &'static str, Arc<dyn Endpoint>)> {
    crate::endpoints::subresources::endpoints()
}
