//! DynamicResources: a pod goes where the devices are that its ResourceClaims ask for.
//!
//! Filter looks for devices on each node; Reserve holds those of the chosen node; PreBind writes the allocation, and the pod
//! among those for whom the claim is reserved, into the claim's status.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use k8s_openapi::api::resource::v1::{AllocationResult, ResourceClaim};
use kube::Api;
use kube::api::{Patch, PatchParams};
use rand::Rng;
use serde::Deserialize;
use serde_json::{Value, json};

use super::arguments;
use crate::cache::{Held, NodeId, PendingPod, Snapshot, claim_keys};
use crate::framework::{
    Cycle, Diagnosis, EventSet, Handle, Plugin, Points, PostFilter, PreFilter, State, Verdict, state_of,
};
use apimachinery::node::NodeTerms;
use apimachinery::time::parse_duration;

mod allocator;
mod selectors;

use allocator::allocate;
use selectors::Selectors;

const FINALIZER: &str = "resource.kubernetes.io/delete-protection";
/// How many pods a claim can be reserved for.
const CONSUMERS_MAX: usize = 256;
/// How often PreBind looks whether devices are ready.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub struct DynamicResources {
    selectors: Selectors,
    /// How long a device may take to become ready for its pod.
    binding_timeout: Duration,
}

/// `DynamicResourcesArgs`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Arguments {
    filter_timeout: Option<String>,
    binding_timeout: Option<String>,
}

/// The pod's claims.
#[derive(Debug, Default)]
struct PodClaims {
    /// Their allocations say where the pod can be.
    allocated: Vec<(Arc<str>, Option<NodeTerms>)>,
    wanted: Vec<(Arc<str>, Arc<ResourceClaim>)>,
    /// Devices that were allocated will not become ready.
    broken: bool,
    taken: Held,
}

const DEVICES_REASON: u64 = 1;
const NODE_REASON: u64 = 1 << 1;

fn reserved_for(claim: &ResourceClaim, uid: &str) -> bool {
    let consumers = claim.status.as_ref().and_then(|status| status.reserved_for.as_deref()).unwrap_or_default();
    consumers.iter().any(|consumer| consumer.uid == uid)
}

impl DynamicResources {
    /// With the arguments of a profile.
    pub fn new(value: Option<&Value>) -> Result<DynamicResources, String> {
        let Arguments { filter_timeout, binding_timeout } = arguments(value)?;
        let duration = |text: Option<String>, default: Duration| match text {
            Some(text) => parse_duration(&text).map_err(|error| error.to_string()),
            None => Ok(default),
        };
        // The search is bounded by its steps instead.
        duration(filter_timeout, Duration::ZERO)?;
        let binding_timeout = duration(binding_timeout, Duration::from_secs(600))?;
        if binding_timeout < Duration::from_secs(1) {
            return Err("bindingTimeout: must be at least 1 second".to_owned());
        }
        Ok(DynamicResources { selectors: Selectors::default(), binding_timeout })
    }

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
                claims.broken |= match are_ready(claim) {
                    Ok(ready) => !ready && self.is_late(claim),
                    Err(_) => true,
                };
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

    /// Whether the claim's devices have had their time to become ready.
    fn is_late(&self, claim: &ResourceClaim) -> bool {
        let allocation = claim.status.as_ref().and_then(|status| status.allocation.as_ref());
        let since = allocation.and_then(|allocation| allocation.allocation_timestamp.as_ref());
        since.is_some_and(|since| apimachinery::time::since(since.0) > self.binding_timeout)
    }

    fn devices(&self, claims: &PodClaims, snapshot: &Snapshot, node: NodeId) -> Option<Vec<AllocationResult>> {
        let (name, labels) = (&snapshot.nodes.name[node.index()], &snapshot.nodes.labels[node.index()]);
        allocate(&snapshot.claims, &claims.wanted, &claims.taken, &self.selectors, name, labels)
    }
}

/// Whether the allocated devices that must be made ready are; the error says which will not be. As
/// `isClaimReadyForBinding`.
fn are_ready(claim: &ResourceClaim) -> Result<bool, String> {
    let Some(status) = &claim.status else { return Ok(true) };
    let devices = status.allocation.as_ref().and_then(|allocation| allocation.devices.as_ref());
    let mut ready = true;
    for result in devices.into_iter().flat_map(|devices| devices.results.iter().flatten()) {
        let Some(wanted) = result.binding_conditions.as_ref().filter(|wanted| !wanted.is_empty()) else { continue };
        let told = status.devices.iter().flatten().find(|told| {
            (&told.driver, &told.pool, &told.device) == (&result.driver, &result.pool, &result.device)
                && told.share_id == result.share_id
        });
        let holds = |kind: &String| {
            let conditions = told.iter().flat_map(|told| told.conditions.iter().flatten());
            conditions.into_iter().any(|condition| condition.type_ == *kind && condition.status == "True")
        };
        if let Some(failed) = result.binding_failure_conditions.iter().flatten().find(|kind| holds(kind)) {
            return Err(format!("device {}/{}/{}: {failed}", result.driver, result.pool, result.device));
        }
        ready &= wanted.iter().all(holds);
    }
    Ok(ready)
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
        let results = allocation.devices.iter().flat_map(|devices| devices.results.iter().flatten());
        if results.into_iter().any(|result| result.binding_conditions.is_some()) {
            status["allocation"]["allocationTimestamp"] = json!(apimachinery::time::now());
        }
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
        if claims.broken || !terms.all(|terms| terms.matches(name, labels)) {
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
            let mut allocations = self.devices(&claims, snapshot, node).ok_or("the devices are no longer available")?;
            let results = allocations.iter_mut().filter_map(|allocation| allocation.devices.as_mut()?.results.as_mut());
            for result in results.flatten().filter(|result| result.consumed_capacity.is_some()) {
                result.share_id = Some(uuid::Uuid::new_v4().to_string());
            }
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

    fn must_pre_bind(&self, reserved: &State) -> bool {
        !state_of::<Reserved>(reserved).is_empty()
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
            let deadline = Instant::now() + self.binding_timeout;
            for (key, _) in reserved {
                let claim = || handle.look(|snapshot| snapshot.claims.claims.get(key).cloned()).flatten();
                while !claim().map_or_else(|| Err(format!("claim {key} is gone")), |claim| are_ready(&claim))? {
                    if Instant::now() >= deadline {
                        return Err("device binding timeout".to_owned());
                    }
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
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
        "status": {"allocation": null, "reservedFor": null, "devices": null}});
    claims.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
}

#[cfg(test)]
mod tests;
