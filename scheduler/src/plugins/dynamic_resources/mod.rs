//! DynamicResources: a pod goes where the devices are that its ResourceClaims ask for.
//!
//! Filter looks for devices on each node; Reserve holds those of the chosen node; PreBind writes the allocation, and the pod
//! among those for whom the claim is reserved, into the claim's status.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use component_base::events::Type;
use futures::future::BoxFuture;
use k8s_openapi::api::resource::v1::{AllocationResult, DeviceSelector, ResourceClaim};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use rand::Rng;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{BadArguments, arguments};
use crate::cache::{Held, NodeId, PendingPod, Snapshot, claim_keys, is_extended};
use crate::config::Faults;
use crate::framework::{
    Cycle, Diagnosis, EventSet, Handle, Plugin, Points, PostFilter, PreFilter, PreScore, State, Verdict,
    normalize_by_maximum, state_of,
};
use apimachinery::node::NodeTerms;
use apimachinery::time::parse_duration;

mod allocator;
mod extended;
mod offered;
mod selectors;

use allocator::{Refused, allocate};
use extended::{Extended, Special};
pub use offered::Offered;
pub use selectors::Selectors;

const FINALIZER: &str = "resource.kubernetes.io/delete-protection";
/// How many pods a claim can be reserved for.
const CONSUMERS_MAX: usize = 256;
/// The longest that one decision looks through devices, on all nodes together: leases must be renewed meanwhile.
const SEARCH_MAX: Duration = Duration::from_secs(5);
/// How many alternatives a request can have.
const ALTERNATIVES_MAX: i64 = 8;
/// How often PreBind looks whether devices are ready.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub struct DynamicResources {
    selectors: Selectors,
    /// How long one node's devices may be looked through.
    filter_timeout: Duration,
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
    /// What is asked for by the names of resources.
    extended: Option<Extended>,
    /// Devices that were allocated will not become ready.
    broken: bool,
    /// When the search for devices ends, on whatever node it is: nothing else is decided meanwhile.
    deadline: Option<Instant>,
    taken: Held,
}

const DEVICES_REASON: u64 = 1;
const NODE_REASON: u64 = 1 << 1;
const TIMEOUT_REASON: u64 = 1 << 2;
const STALE_REASON: u64 = 1 << 3;
const REASONS: [&str; 4] = [
    "cannot allocate all claims",
    "resourceclaim not available on the node",
    "timed out trying to allocate devices",
    "cannot schedule extended resource claim",
];

fn reserved_for(claim: &ResourceClaim, uid: &str) -> bool {
    let consumers = claim.status.as_ref().and_then(|status| status.reserved_for.as_deref()).unwrap_or_default();
    consumers.iter().any(|consumer| consumer.uid == uid)
}

/// The pod's claims, if all are there and its own. As `foreachPodResourceClaim`.
fn found<'a>(pod: &PendingPod, snapshot: &'a Snapshot) -> Result<Vec<(Arc<str>, &'a Arc<ResourceClaim>)>, String> {
    let mut found = Vec::new();
    for (key, own) in claim_keys(&pod.pod)? {
        let name = key.split_once('/').map_or(&*key, |(_, name)| name);
        let Some(claim) = snapshot.claims.claims.get(&key) else {
            return Err(format!("resourceclaim {name:?} not found"));
        };
        if claim.metadata.deletion_timestamp.is_some() {
            return Err(format!("resourceclaim {name:?} is being deleted"));
        }
        let owner = apimachinery::pod::controller_of(&claim.metadata);
        if own && owner.is_none_or(|owner| owner.uid != *pod.facts.uid) {
            let pod = &pod.facts.key;
            return Err(format!("ResourceClaim {key} was not created for pod {pod} (pod is not owner)"));
        }
        found.push((key, claim));
    }
    Ok(found)
}

impl DynamicResources {
    /// With the arguments of a profile.
    pub fn new(value: Option<&Value>) -> Result<DynamicResources, BadArguments> {
        let Arguments { filter_timeout, binding_timeout } = arguments(value)?;
        let mut faults = Faults::default();
        let mut duration = |field: &str, text: Option<&String>, default: Duration, least: Duration, why: &str| {
            let Some(text) = text else { return Ok::<_, BadArguments>(default) };
            let given = match text.strip_prefix('-') {
                Some(rest) => parse_duration(rest).map(|_| None),
                None => parse_duration(text).map(Some),
            };
            let given = given.map_err(|error| BadArguments::Malformed(format!("{field}: {error}")))?;
            let given = given.filter(|given| *given >= least);
            if given.is_none() {
                faults.invalid(field, text.as_str(), why);
            }
            Ok(given.unwrap_or(default))
        };
        // Zero says that it may take as long as it takes.
        let why = "must be zero or positive";
        let filter_timeout = duration("filterTimeout", filter_timeout.as_ref(), SEARCH_MAX, Duration::ZERO, why)?;
        let filter_timeout = if filter_timeout.is_zero() { SEARCH_MAX } else { filter_timeout };
        let (default, least, why) = (Duration::from_secs(600), Duration::from_secs(1), "must be at least 1 second");
        let binding_timeout = duration("bindingTimeout", binding_timeout.as_ref(), default, least, why)?;
        faults.check()?;
        Ok(DynamicResources { selectors: Selectors::default(), filter_timeout, binding_timeout })
    }

    /// The pod's claims, or why it cannot be placed yet.
    fn claims_of(&self, pod: &PendingPod, snapshot: &Snapshot) -> Result<PodClaims, String> {
        let mut claims = PodClaims::default();
        for (key, claim) in found(pod, snapshot)? {
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
                    self.check(snapshot, &request.name, class, selectors.as_deref().unwrap_or_default())?;
                }
            }
            claims.wanted.push((key, claim.clone()));
        }
        claims.extended = Extended::of(pod, &snapshot.claims);
        for class in claims.extended.iter().flat_map(Extended::classes) {
            self.check(snapshot, class, class, &[])?;
        }
        if !claims.wanted.is_empty() || claims.extended.is_some() {
            claims.taken = snapshot.claims.taken();
            claims.deadline = Some(Instant::now() + SEARCH_MAX);
        }
        Ok(claims)
    }

    /// Whether a request's class is there, and its selectors can be used.
    fn check(
        &self,
        snapshot: &Snapshot,
        request: &str,
        class: &str,
        selectors: &[DeviceSelector],
    ) -> Result<(), String> {
        let Some(class) = snapshot.claims.class(class) else {
            return Err(format!("request {request}: device class {class} does not exist"));
        };
        self.selectors.check(selectors)?;
        self.selectors.check(class.spec.selectors.as_deref().unwrap_or_default())
    }

    /// Whether the claim's devices have had their time to become ready.
    fn is_late(&self, claim: &ResourceClaim) -> bool {
        let allocation = claim.status.as_ref().and_then(|status| status.allocation.as_ref());
        let since = allocation.and_then(|allocation| allocation.allocation_timestamp.as_ref());
        since.is_some_and(|since| apimachinery::time::since(since.0) > self.binding_timeout)
    }

    /// The devices of a node for the claims that have none, the pod's special claim last, if it needs one there.
    fn devices(
        &self,
        claims: &PodClaims,
        pod: &PendingPod,
        snapshot: &Snapshot,
        node: NodeId,
    ) -> Result<(Vec<AllocationResult>, Option<Special>), Refused> {
        let (name, labels) = (&snapshot.nodes.name[node.index()], &snapshot.nodes.labels[node.index()]);
        let special = claims.extended.as_ref().and_then(|extended| extended.claim_on(pod, snapshot, node));
        let mut wanted = Cow::Borrowed(&claims.wanted);
        if let Some(special) = &special {
            wanted.to_mut().push((special.key.clone(), special.claim.clone()));
        }
        if wanted.is_empty() {
            return Ok((Vec::new(), None));
        }
        let taken = &claims.taken;
        let deadline = claims.deadline.map(|all| all.min(Instant::now() + self.filter_timeout));
        let found = allocate(&snapshot.claims, &wanted, taken, &self.selectors, name, labels, deadline)?;
        Ok((found, special))
    }
}

fn has_binding_conditions(claim: &ResourceClaim) -> bool {
    let devices = claim.status.as_ref().and_then(|status| status.allocation.as_ref()?.devices.as_ref());
    let mut results = devices.into_iter().flat_map(|devices| devices.results.iter().flatten());
    results.any(|result| result.binding_conditions.as_ref().is_some_and(|conditions| !conditions.is_empty()))
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

/// The alternatives that the requests of a claim have, as allocations name them, and what each is worth.
fn alternatives(claim: &ResourceClaim) -> impl Iterator<Item = (String, i64)> {
    let requests = claim.spec.devices.iter().flat_map(|devices| devices.requests.iter().flatten());
    requests.flat_map(|request| {
        let all = request.first_available.iter().flatten().zip((0..=ALTERNATIVES_MAX).rev());
        all.map(|(one, worth)| (format!("{}/{}", request.name, one.name), worth))
    })
}

/// What PreBind writes.
#[derive(Debug, Default)]
struct Reserved {
    /// Each claim, with its new allocation if it had none.
    claims: Vec<(Arc<str>, Option<AllocationResult>)>,
    /// The claim that is made first, and its allocation.
    special: Option<(Special, AllocationResult)>,
}

fn claims_in(handle: &Handle, namespace: &str) -> Api<ResourceClaim> {
    Api::namespaced(handle.client.clone(), namespace)
}

/// Makes the claim for a pod's extended resources, and has the pod's status name it; gives its key. As
/// `createExtendedResourceClaimInAPI` and `patchPodExtendedResourceClaimStatus`.
async fn make(
    handle: &Handle,
    pod: &PendingPod,
    special: &Special,
    allocation: &AllocationResult,
) -> Result<Arc<str>, String> {
    let (namespace, name) = (&pod.facts.key.namespace, &pod.facts.key.name);
    let failed = |error: kube::Error| format!("create claim for extended resources {namespace}/{name}: {error}");
    let made = claims_in(handle, namespace).create(&PostParams::default(), &special.claim).await.map_err(failed)?;
    let claim = made.metadata.name.clone().unwrap_or_default();
    let key: Arc<str> = format!("{namespace}/{claim}").into();
    handle.look(|snapshot| drop(snapshot.claims.claims.insert(key.clone(), Arc::new(made))));
    write(handle, pod, &key, Some(allocation)).await?;
    let status = json!({"resourceClaimName": claim, "requestMappings": special.mappings});
    let failed = |error: kube::Error| format!("update pod {namespace}/{name} ExtendedResourceClaimStatus: {error}");
    handle.patch_pod_status(&pod.facts, &json!({"extendedResourceClaimStatus": status})).await.map_err(failed)?;
    Ok(key)
}

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
    let claims = claims_in(handle, namespace);
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
        status["allocation"]["allocationTimestamp"] = json!(apimachinery::time::now());
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
        let scores = Points::PRE_SCORE.and(Points::SCORE);
        let binds = Points::RESERVE.and(Points::PRE_BIND);
        Points::PRE_ENQUEUE.and(Points::PRE_FILTER).and(Points::FILTER).and(Points::POST_FILTER).and(scores).and(binds)
    }

    fn holds_back(&self, pod: &PendingPod, snapshot: &Snapshot) -> Option<String> {
        found(pod, snapshot).err()
    }

    fn events(&self) -> EventSet {
        EventSet::RESOURCE_CLAIM
            .and(EventSet::RESOURCE_SLICE)
            .and(EventSet::DEVICE_CLASS)
            .and(EventSet::NODE_ADD)
            .and(EventSet::NODE_LABEL)
            .and(EventSet::POD_REMOVED)
            .and(EventSet::OWN_CLAIMS)
    }

    fn is_local(&self) -> bool {
        false
    }

    fn pre_filter(&self, pod: &PendingPod, snapshot: &Snapshot) -> PreFilter {
        let claims_none = pod.spec().is_none_or(|spec| spec.resource_claims.as_ref().is_none_or(Vec::is_empty));
        if claims_none && pod.facts.requests.extended.iter().all(|(name, _)| snapshot.claims.class_for(name).is_none())
        {
            return PreFilter::Skip;
        }
        match self.claims_of(pod, snapshot) {
            Ok(claims) => PreFilter::Proceed(Box::new(claims)),
            Err(words) => PreFilter::Refuse(words),
        }
    }

    fn filter(&self, state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        let claims: &PodClaims = state_of(state);
        let (name, labels) = (&snapshot.nodes.name[node.index()], &snapshot.nodes.labels[node.index()]);
        let mut terms = claims.allocated.iter().filter_map(|(_, terms)| terms.as_ref());
        if claims.broken || !terms.all(|terms| terms.matches(name, labels)) {
            return Verdict::unresolvable(NODE_REASON);
        }
        if claims.extended.as_ref().is_some_and(|extended| extended.stale.is_some()) {
            return Verdict::unresolvable(STALE_REASON);
        }
        match self.devices(claims, pod, snapshot, node) {
            Ok(_) => Verdict::Accept,
            Err(Refused::NotEnough) => Verdict::unresolvable(DEVICES_REASON),
            Err(Refused::TimedOut) => Verdict::unresolvable(TIMEOUT_REASON),
        }
    }

    fn reason(&self, _state: &State, number: u32) -> Cow<'static, str> {
        Cow::Borrowed(REASONS.get(number as usize).unwrap_or(&self.name()))
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
        let stale = state.and_then(|claims| claims.extended.as_ref()?.stale.as_ref());
        let idle = || state.and_then(|claims| claims.allocated.iter().map(|(key, _)| key).find(idle));
        let idle = stale.or_else(idle).cloned();
        PostFilter {
            words: Some("no new claims to deallocate".to_owned()).filter(|_| idle.is_none()),
            deallocate: idle,
            ..PostFilter::default()
        }
    }

    /// There is something to prefer where requests have alternatives.
    fn pre_score(&self, pod: &PendingPod, snapshot: &Snapshot, _feasible: &[NodeId]) -> PreScore {
        match self.claims_of(pod, snapshot) {
            Ok(claims) if claims.wanted.iter().any(|(_, claim)| alternatives(claim).next().is_some()) => {
                PreScore::Proceed(Box::new(claims))
            }
            _ => PreScore::Skip,
        }
    }

    /// The earlier the alternatives that a node can give, the better. As `computeScore`.
    fn score(&self, state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> i64 {
        let claims: &PodClaims = state_of(state);
        let Ok((allocations, _)) = self.devices(claims, pod, snapshot, node) else { return 0 };
        let scores = claims.wanted.iter().zip(&allocations).flat_map(|((_, claim), allocation)| {
            let results = allocation.devices.iter().flat_map(|devices| devices.results.iter().flatten());
            let given: Vec<&str> = results.map(|result| result.request.as_str()).collect();
            alternatives(claim).filter(move |(name, _)| given.contains(&name.as_str())).map(|(_, score)| score)
        });
        scores.sum()
    }

    fn normalize(&self, _state: &State, scores: &mut [i64]) {
        normalize_by_maximum(scores, false);
    }

    fn reserve(&self, pod: &PendingPod, snapshot: &mut Snapshot, node: NodeId) -> Result<State, String> {
        let claims = self.claims_of(pod, snapshot)?;
        let mut reserved = Reserved::default();
        reserved.claims.extend(claims.allocated.iter().map(|(key, _)| (key.clone(), None)));
        let devices = self.devices(&claims, pod, snapshot, node);
        let (mut allocations, special) = devices.map_err(|_| "the devices are no longer available")?;
        let results = allocations.iter_mut().filter_map(|allocation| allocation.devices.as_mut()?.results.as_mut());
        for result in results.flatten().filter(|result| result.consumed_capacity.is_some()) {
            result.share_id = Some(uuid::Uuid::new_v4().to_string());
        }
        if let (Some(special), Some(allocation)) = (special, allocations.get(claims.wanted.len()).cloned()) {
            snapshot.claims.assume(special.key.clone(), pod.facts.uid.clone(), allocation.clone());
            reserved.special = Some((special, allocation));
        }
        for ((key, _), allocation) in claims.wanted.iter().zip(allocations) {
            snapshot.claims.assume(key.clone(), pod.facts.uid.clone(), allocation.clone());
            reserved.claims.push((key.clone(), Some(allocation)));
        }
        Ok(Box::new(reserved))
    }

    fn unreserve(&self, pod: &PendingPod, snapshot: &mut Snapshot) {
        snapshot.claims.forget(&pod.facts.uid);
    }

    fn must_pre_bind(&self, reserved: &State) -> bool {
        let reserved: &Reserved = state_of(reserved);
        !reserved.claims.is_empty() || reserved.special.is_some()
    }

    fn pre_bind<'a>(
        &'a self,
        handle: &'a Handle,
        reserved: &'a State,
        pod: &'a PendingPod,
        node: &'a str,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let reserved: &Reserved = state_of(reserved);
            let mut keys = Vec::new();
            for (key, allocation) in &reserved.claims {
                write(handle, pod, key, allocation.as_ref()).await?;
                keys.push(key.clone());
            }
            if let Some((special, allocation)) = &reserved.special {
                keys.push(make(handle, pod, special, allocation).await?);
            }
            handle.look(|snapshot| snapshot.claims.forget(&pod.facts.uid));
            let waits = |key: &Arc<str>| {
                let claim = handle.look(|snapshot| snapshot.claims.claims.get(key).cloned()).flatten();
                claim.is_some_and(|claim| has_binding_conditions(&claim))
            };
            if keys.iter().any(waits) {
                let message = format!("waiting for binding conditions for device on node {node}");
                handle.event(pod, Type::Normal, "BindingConditionsPending", "Scheduling", message);
            }
            let deadline = Instant::now() + self.binding_timeout;
            for key in &keys {
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

/// Takes a claim's allocation away, so that it is allocated anew. One that was made for extended resources goes altogether.
pub async fn deallocate(handle: &Handle, key: &str) -> Result<(), kube::Error> {
    let Some(claim) = handle.look(|snapshot| snapshot.claims.claims.get(key).cloned()).flatten() else { return Ok(()) };
    let (namespace, name) = key.split_once('/').unwrap_or_default();
    let claims = claims_in(handle, namespace);
    if is_extended(&claim) {
        let kept: Vec<_> = claim.metadata.finalizers.iter().flatten().filter(|one| *one != FINALIZER).collect();
        let patch = json!({"metadata": {"finalizers": kept}});
        claims.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        return claims.delete(name, &DeleteParams::default()).await.map(drop);
    }
    let patch = json!({"metadata": {"resourceVersion": claim.metadata.resource_version},
        "status": {"allocation": null, "reservedFor": null, "devices": null}});
    claims.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
}

#[cfg(test)]
mod tests;
