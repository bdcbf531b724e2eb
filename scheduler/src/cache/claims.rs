//! ResourceClaims, the devices that drivers offer, and the allocations that have been decided on but not yet seen on a watch.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::resource::v1::{AllocationResult, DeviceClass, ResourceClaim, ResourceSlice};

/// Marks the claim that the scheduler has made for the extended resources of a pod.
pub const EXTENDED_CLAIM: &str = "resource.kubernetes.io/extended-resource-claim";
/// The extended resource that every class stands for: this, and its name.
const CLASS_PREFIX: &str = "deviceclass.resource.kubernetes.io/";

/// A device: its driver, pool and name.
pub type DeviceId = (String, String, String);

/// What allocations hold: whole devices, and parts of those that many may share.
#[derive(Clone, Debug, Default)]
pub struct Held {
    pub devices: HashSet<DeviceId>,
    pub shares: HashMap<DeviceId, Shares>,
}

/// How many have a part of a device, and what they have of its capacity.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    pub users: usize,
    pub amounts: BTreeMap<String, Quantity>,
}

/// The picture of claims and devices. Claims are keyed by `namespace/name`.
#[derive(Debug, Default)]
pub struct Claims {
    pub claims: HashMap<Arc<str>, Arc<ResourceClaim>>,
    pub slices: BTreeMap<String, Arc<ResourceSlice>>,
    classes: HashMap<String, Arc<DeviceClass>>,
    /// The classes that name an extended resource, by that name.
    by_resource: HashMap<String, String>,
    /// Allocations on their way to the apiserver, by claim, and for which pod (UID).
    in_flight: HashMap<Arc<str>, (Arc<str>, AllocationResult)>,
}

impl Claims {
    /// Takes over a class; `None` when it is gone.
    pub fn set_class(&mut self, name: &str, class: Option<Arc<DeviceClass>>) {
        match class {
            Some(class) => drop(self.classes.insert(name.to_owned(), class)),
            None => drop(self.classes.remove(name)),
        }
        // Of several for one resource the youngest counts, then the first by name.
        let named = |(name, class): (&String, &Arc<DeviceClass>)| {
            let since = class.metadata.creation_timestamp.as_ref().map(|since| since.0);
            Some((class.spec.extended_resource_name.clone()?, (Reverse(since), name.clone())))
        };
        let mut named: Vec<_> = self.classes.iter().filter_map(named).collect();
        named.sort_by(|(_, one), (_, other)| other.cmp(one));
        self.by_resource = named.into_iter().map(|(resource, (_, name))| (resource, name)).collect();
    }

    pub fn class(&self, name: &str) -> Option<&Arc<DeviceClass>> {
        self.classes.get(name)
    }

    /// The class whose devices stand for an extended resource.
    pub fn class_for(&self, resource: &str) -> Option<&str> {
        match resource.strip_prefix(CLASS_PREFIX).and_then(|name| self.classes.get_key_value(name)) {
            Some((name, _)) => Some(name),
            None => self.by_resource.get(resource).map(String::as_str),
        }
    }

    /// The claim that was made for a pod's extended resources. As `findExtendedResourceClaim`.
    pub fn extended_claim_of(&self, pod: &str) -> Option<&Arc<str>> {
        let is_it = |claim: &ResourceClaim| {
            is_extended(claim)
                && apimachinery::pod::controller_of(&claim.metadata).is_some_and(|owner| owner.uid == pod)
        };
        self.claims.iter().find(|(_, claim)| is_it(claim)).map(|(key, _)| key)
    }

    /// The allocation of a claim, written or decided on.
    pub fn allocation_of(&self, key: &str) -> Option<&AllocationResult> {
        let written = self.claims.get(key).and_then(|claim| claim.status.as_ref()?.allocation.as_ref());
        written.or_else(|| self.in_flight.get(key).map(|(_, allocation)| allocation))
    }

    /// What is taken. Devices that are accessed by administrators stay free.
    pub fn taken(&self) -> Held {
        let written = self.claims.values().filter_map(|claim| claim.status.as_ref()?.allocation.as_ref());
        let all = written.chain(self.in_flight.values().map(|(_, allocation)| allocation));
        let results = all.filter_map(|allocation| allocation.devices.as_ref()?.results.as_ref()).flatten();
        let mut held = Held::default();
        for result in results.filter(|result| result.admin_access != Some(true)) {
            let device = (result.driver.clone(), result.pool.clone(), result.device.clone());
            if result.share_id.is_none() && result.consumed_capacity.is_none() {
                held.devices.insert(device);
                continue;
            }
            let shares = held.shares.entry(device).or_default();
            shares.users += 1;
            for (name, amount) in result.consumed_capacity.iter().flatten() {
                *shares.amounts.entry(name.clone()).or_default() += Quantity::from(amount);
            }
        }
        held
    }

    /// Holds an allocation for a pod until it is written.
    pub fn assume(&mut self, key: Arc<str>, pod: Arc<str>, allocation: AllocationResult) {
        self.in_flight.insert(key, (pod, allocation));
    }

    /// Drops what is held for a pod.
    pub fn forget(&mut self, pod: &str) {
        self.in_flight.retain(|_, (holder, _)| **holder != *pod);
    }
}

/// Whether the claim is one that the scheduler has made.
pub fn is_extended(claim: &ResourceClaim) -> bool {
    let annotations = claim.metadata.annotations.as_ref();
    annotations.and_then(|annotations| annotations.get(EXTENDED_CLAIM)).is_some_and(|value| value == "true")
}

/// The claims of a pod, as `namespace/name`, and whether each was made for it; a claim that is yet to be made from its template
/// is an error.
pub fn claim_keys(pod: &Pod) -> Result<Vec<(Arc<str>, bool)>, String> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let made = pod.status.as_ref().and_then(|status| status.resource_claim_statuses.as_deref()).unwrap_or_default();
    let mut keys = Vec::new();
    for wanted in pod.spec.iter().flat_map(|spec| spec.resource_claims.iter().flatten()) {
        let name = match &wanted.resource_claim_name {
            Some(name) => Some(name),
            None => match made.iter().find(|status| status.name == wanted.name) {
                // No claim is needed.
                Some(status) => status.resource_claim_name.as_ref(),
                None => {
                    let name = pod.metadata.name.as_deref().unwrap_or_default();
                    return Err(format!("pod \"{namespace}/{name}\": ResourceClaim not created yet"));
                }
            },
        };
        let own = wanted.resource_claim_name.is_none();
        keys.extend(name.map(|name| (Arc::from(format!("{namespace}/{name}")), own)));
    }
    Ok(keys)
}
