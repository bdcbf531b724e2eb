//! DynamicResources: a pod goes where the devices are that its ResourceClaims ask for.
//!
//! Filter looks for devices on each node; Reserve holds those of the chosen node; PreBind writes the allocation, and the pod
//! among those for whom the claim is reserved, into the claim's status.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use futures::future::BoxFuture;
use k8s_openapi::api::resource::v1::{AllocationResult, ResourceClaim};
use kube::Api;
use kube::api::{Patch, PatchParams};
use rand::Rng;
use serde_json::{Value, json};

use crate::cache::{DeviceId, NodeId, PendingPod, Snapshot, claim_keys};
use crate::framework::{
    Cycle, Diagnosis, EventSet, Handle, Plugin, Points, PostFilter, PreFilter, State, Verdict, state_of,
};
use apimachinery::node::NodeTerms;

mod allocator;
mod selectors;

use allocator::allocate;
use selectors::Selectors;

const FINALIZER: &str = "resource.kubernetes.io/delete-protection";
/// How many pods a claim can be reserved for.
const CONSUMERS_MAX: usize = 256;

#[derive(Debug, Default)]
pub struct DynamicResources {
    selectors: Selectors,
}

/// The pod's claims.
#[derive(Debug, Default)]
struct PodClaims {
    /// Their allocations say where the pod can be.
    allocated: Vec<(Arc<str>, Option<NodeTerms>)>,
    wanted: Vec<(Arc<str>, Arc<ResourceClaim>)>,
    taken: HashSet<DeviceId>,
}

const DEVICES_REASON: u64 = 1;
const NODE_REASON: u64 = 1 << 1;

fn reserved_for(claim: &ResourceClaim, uid: &str) -> bool {
    let consumers = claim.status.as_ref().and_then(|status| status.reserved_for.as_deref()).unwrap_or_default();
    consumers.iter().any(|consumer| consumer.uid == uid)
}

impl DynamicResources {
    /// The pod's claims, or why it cannot be placed yet.
    fn claims_of(&self, pod: &PendingPod, snapshot: &Snapshot) -> Result<PodClaims, String> {
        let mut claims = PodClaims::default();
        for key in claim_keys(&pod.pod)? {
            let name = key.split_once('/').map_or(&*key, |(_, name)| name);
            let Some(claim) = snapshot.claims.claims.get(&key) else {
                return Err(format!("resourceclaim {name:?} not found"));
            };
            if claim.metadata.deletion_timestamp.is_some() {
                return Err(format!("resourceclaim {name:?} is being deleted"));
            }
            if let Some(allocation) = snapshot.claims.allocation_of(&key) {
                let consumers =
                    claim.status.as_ref().and_then(|status| status.reserved_for.as_ref()).map_or(0, Vec::len);
                if consumers >= CONSUMERS_MAX && !reserved_for(claim, &pod.facts.uid) {
                    return Err("resourceclaim in use".to_owned());
                }
                claims.allocated.push((key, allocation.node_selector.as_ref().map(NodeTerms::of)));
                continue;
            }
            for request in claim.spec.devices.iter().flat_map(|devices| devices.requests.iter().flatten()) {
                let exactly = request.exactly.iter().map(|one| (&one.device_class_name, &one.selectors));
                let first =
                    request.first_available.iter().flatten().map(|one| (&one.device_class_name, &one.selectors));
                for (class, selectors) in exactly.chain(first) {
                    let Some(class) = snapshot.claims.classes.get(class) else {
                        return Err(format!("request {}: device class {class} does not exist", request.name));
                    };
                    for selectors in [selectors, &class.spec.selectors] {
                        self.selectors.check(selectors.as_deref().unwrap_or_default())?;
                    }
                }
            }
            claims.wanted.push((key, claim.clone()));
        }
        if !claims.wanted.is_empty() {
            claims.taken = snapshot.claims.taken();
        }
        Ok(claims)
    }

    fn devices(&self, claims: &PodClaims, snapshot: &Snapshot, node: NodeId) -> Option<Vec<AllocationResult>> {
        let (name, labels) = (&snapshot.nodes.name[node.index()], &snapshot.nodes.labels[node.index()]);
        allocate(&snapshot.claims, &claims.wanted, &claims.taken, &self.selectors, name, labels)
    }
}

/// What PreBind writes: each claim, with its new allocation if it had none.
type Reserved = Vec<(Arc<str>, Option<AllocationResult>)>;

async fn write(
    handle: &Handle,
    pod: &PendingPod,
    key: &str,
    allocation: Option<&AllocationResult>,
) -> Result<(), String> {
    let claim = handle.look(|snapshot| snapshot.claims.claims.get(key).cloned()).flatten();
    let claim = claim.ok_or_else(|| format!("claim {key} is gone"))?;
    if allocation.is_none() && reserved_for(&claim, &pod.facts.uid) {
        return Ok(());
    }
    let (namespace, name) = key.split_once('/').unwrap_or_default();
    let claims: Api<ResourceClaim> = Api::namespaced(handle.client.clone(), namespace);
    let (params, failed) = (PatchParams::default(), |error: kube::Error| format!("claim {key}: {error}"));
    let mut version = claim.metadata.resource_version.clone();
    let mut finalizers = claim.metadata.finalizers.clone().unwrap_or_default();
    if allocation.is_some() && !finalizers.iter().any(|finalizer| finalizer == FINALIZER) {
        finalizers.push(FINALIZER.to_owned());
        let patch = json!({"metadata": {"resourceVersion": version, "finalizers": finalizers}});
        version = claims.patch(name, &params, &Patch::Merge(patch)).await.map_err(failed)?.metadata.resource_version;
    }
    let mut consumers = claim.status.as_ref().and_then(|status| status.reserved_for.clone()).unwrap_or_default();
    if !reserved_for(&claim, &pod.facts.uid) {
        consumers.push(k8s_openapi::api::resource::v1::ResourceClaimConsumerReference {
            api_group: None,
            resource: "pods".to_owned(),
            name: pod.facts.key.name.clone(),
            uid: pod.facts.uid.to_string(),
        });
    }
    let mut status = json!({"reservedFor": consumers});
    if let Some(allocation) = allocation {
        status["allocation"] = json!(allocation);
    }
    let patch = json!({"metadata": {"resourceVersion": version}, "status": status});
    let written = claims.patch_status(name, &params, &Patch::Merge(patch)).await.map_err(failed)?;
    // So that the next decision sees it, whenever the watch does.
    handle.look(|snapshot| drop(snapshot.claims.claims.insert(key.into(), Arc::new(written))));
    Ok(())
}

impl Plugin for DynamicResources {
    fn name(&self) -> &'static str {
        "DynamicResources"
    }

    fn points(&self) -> Points {
        Points::PRE_FILTER.and(Points::FILTER).and(Points::POST_FILTER).and(Points::RESERVE).and(Points::PRE_BIND)
    }

    fn events(&self) -> EventSet {
        EventSet::RESOURCE_CLAIM
            .and(EventSet::RESOURCE_SLICE)
            .and(EventSet::DEVICE_CLASS)
            .and(EventSet::NODE_ADD)
            .and(EventSet::NODE_LABEL)
            .and(EventSet::POD_REMOVED)
    }

    fn is_local(&self) -> bool {
        false
    }

    fn pre_filter(&self, pod: &PendingPod, snapshot: &Snapshot) -> PreFilter {
        if pod.spec().is_none_or(|spec| spec.resource_claims.as_ref().is_none_or(Vec::is_empty)) {
            return PreFilter::Skip;
        }
        match self.claims_of(pod, snapshot) {
            Ok(claims) => PreFilter::Proceed(Box::new(claims)),
            Err(words) => PreFilter::Refuse(words),
        }
    }

    fn filter(&self, state: &State, _pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        let claims: &PodClaims = state_of(state);
        let (name, labels) = (&snapshot.nodes.name[node.index()], &snapshot.nodes.labels[node.index()]);
        let mut terms = claims.allocated.iter().filter_map(|(_, terms)| terms.as_ref());
        if !terms.all(|terms| terms.matches(name, labels)) {
            return Verdict::unresolvable(NODE_REASON);
        }
        let fits = claims.wanted.is_empty() || self.devices(claims, snapshot, node).is_some();
        if fits { Verdict::Accept } else { Verdict::unresolvable(DEVICES_REASON) }
    }

    fn reason(&self, _state: &State, number: u32) -> Cow<'static, str> {
        Cow::Borrowed(if 1 << number == NODE_REASON {
            "resourceclaim not available on the node"
        } else {
            "cannot allocate all claims"
        })
    }

    /// Gives a claim free that is allocated where the pod cannot be, if nobody else uses it.
    fn post_filter(
        &self,
        cycle: &mut Cycle<'_>,
        snapshot: &mut Snapshot,
        _diagnosis: &Diagnosis,
        _rng: &mut dyn Rng,
    ) -> PostFilter {
        let place = cycle.profile.plugins.iter().position(|plugin| plugin.name() == self.name());
        let state =
            place.and_then(|place| cycle.states[place].as_ref()).and_then(|state| state.downcast_ref::<PodClaims>());
        let idle = |key: &&Arc<str>| {
            let status = snapshot.claims.claims.get(*key).and_then(|claim| claim.status.as_ref());
            status.is_some_and(|status| {
                let consumers = status.reserved_for.as_deref().unwrap_or_default();
                status.allocation.is_some() && consumers.iter().all(|consumer| *consumer.uid == *cycle.pod.facts.uid)
            })
        };
        let idle = state.and_then(|claims| claims.allocated.iter().map(|(key, _)| key).find(idle)).cloned();
        PostFilter {
            words: Some("no new claims to deallocate".to_owned()).filter(|_| idle.is_none()),
            deallocate: idle,
            ..PostFilter::default()
        }
    }

    fn reserve(&self, pod: &PendingPod, snapshot: &mut Snapshot, node: NodeId) -> Result<State, String> {
        let claims = self.claims_of(pod, snapshot)?;
        let mut reserved: Reserved = claims.allocated.iter().map(|(key, _)| (key.clone(), None)).collect();
        if !claims.wanted.is_empty() {
            let allocations = self.devices(&claims, snapshot, node).ok_or("the devices are no longer available")?;
            for ((key, _), allocation) in claims.wanted.iter().zip(allocations) {
                snapshot.claims.assume(key.clone(), pod.facts.uid.clone(), allocation.clone());
                reserved.push((key.clone(), Some(allocation)));
            }
        }
        Ok(Box::new(reserved))
    }

    fn unreserve(&self, pod: &PendingPod, snapshot: &mut Snapshot) {
        snapshot.claims.forget(&pod.facts.uid);
    }

    fn pre_bind<'a>(
        &'a self,
        handle: &'a Handle,
        reserved: &'a State,
        pod: &'a PendingPod,
        _node: &'a str,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let reserved: &Reserved = state_of(reserved);
            for (key, allocation) in reserved {
                write(handle, pod, key, allocation.as_ref()).await?;
            }
            handle.look(|snapshot| snapshot.claims.forget(&pod.facts.uid));
            Ok(())
        })
    }

    fn numbers(&self, state: &State, _pod: &PendingPod, _snapshot: &Snapshot, _node: NodeId) -> Value {
        match state.downcast_ref::<PodClaims>() {
            Some(claims) => json!({"allocated": claims.allocated.len(), "wanted": claims.wanted.len()}),
            None => Value::Null,
        }
    }
}

/// Takes a claim's allocation away, so that it is allocated anew.
pub async fn deallocate(handle: &Handle, key: &str) -> Result<(), kube::Error> {
    let Some(claim) = handle.look(|snapshot| snapshot.claims.claims.get(key).cloned()).flatten() else { return Ok(()) };
    let (namespace, name) = key.split_once('/').unwrap_or_default();
    let claims: Api<ResourceClaim> = Api::namespaced(handle.client.clone(), namespace);
    let patch = json!({"metadata": {"resourceVersion": claim.metadata.resource_version},
        "status": {"allocation": null, "reservedFor": null}});
    claims.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
}

#[cfg(test)]
mod tests;
