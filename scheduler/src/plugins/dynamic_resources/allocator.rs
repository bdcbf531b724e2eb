//! Which devices a node's pod gets: a search over the requests of its claims, first fit, with backtracking. Pure.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::{NodeSelector, Taint, Toleration};
use k8s_openapi::api::resource::v1::{
    AllocationResult, CapacityRequestPolicy, CapacityRequirements, Device, DeviceAllocationConfiguration,
    DeviceAllocationResult, DeviceAttribute, DeviceConstraint, DeviceRequest, DeviceRequestAllocationResult,
    DeviceSelector, DeviceToleration, ResourceClaim, ResourceSlice,
};
use serde_json::json;

use super::selectors::Selectors;
use crate::cache::{Claims, DeviceId, Held, Shares};
use crate::plugins::taint_toleration::tolerates_node;
use apimachinery::node::{NodeTerms, device_taint, device_toleration};

/// The search gives up after so many tries.
const STEPS_MAX: u32 = 2_000_000;
/// So often it looks at the clock.
const STEPS_BETWEEN_LOOKS: u32 = 1024;

/// Why there are no devices for the claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    NotEnough,
    /// Nobody knows: the search was given up.
    TimedOut,
}

/// A device that the node reaches.
struct Offer<'a> {
    id: DeviceId,
    device: &'a Device,
    /// Whether it is for one node only, so that the allocation is.
    local: bool,
    selector: Option<&'a NodeSelector>,
    complete: bool,
}

/// One way to meet a request.
struct Alternative<'a> {
    /// The request's name, with the alternative's after a slash.
    name: String,
    class: &'a str,
    selectors: &'a [DeviceSelector],
    /// `None` takes all.
    count: Option<usize>,
    admin_access: bool,
    tolerations: &'a [DeviceToleration],
    /// What it asks of a device's capacity.
    capacity: Option<&'a CapacityRequirements>,
}

struct Request<'a> {
    claim: usize,
    alternatives: Vec<Alternative<'a>>,
}

/// A device on its way into an allocation.
struct Taken {
    claim: usize,
    request: usize,
    alternative: usize,
    offer: usize,
    /// Its part, of a device that many may share.
    part: Option<Amounts>,
}

type Amounts = BTreeMap<String, Quantity>;

/// Counters of a pool, by driver, pool, set and name: what is left.
type Counters = HashMap<(String, String, String, String), i128>;

struct Search<'a> {
    requests: Vec<Request<'a>>,
    constraints: Vec<Vec<&'a DeviceConstraint>>,
    offers: Vec<Offer<'a>>,
    /// Which offers an alternative's class and selectors want, by request and alternative.
    wanted: HashMap<(usize, usize), Vec<usize>>,
    held: Held,
    counters: Counters,
    taken: Vec<Taken>,
    steps: u32,
    deadline: Option<Instant>,
}

/// The slices of the newest generation of each pool, and whether the pool is complete.
fn newest(claims: &Claims) -> BTreeMap<(&str, &str), (bool, Vec<&ResourceSlice>)> {
    let mut pools: BTreeMap<(&str, &str), Vec<&ResourceSlice>> = BTreeMap::new();
    for slice in claims.slices.values() {
        pools.entry((&slice.spec.driver, &slice.spec.pool.name)).or_default().push(slice);
    }
    let complete = |slices: Vec<&'_ ResourceSlice>| {
        slices.first().is_some_and(|first| slices.len() as i64 >= first.spec.pool.resource_slice_count)
    };
    pools
        .into_iter()
        .map(|(pool, mut slices)| {
            let newest = slices.iter().map(|slice| slice.spec.pool.generation).max();
            slices.retain(|slice| Some(slice.spec.pool.generation) == newest);
            (pool, (complete(slices.clone()), slices))
        })
        .collect()
}

fn attribute<'a>(offer: &'a Offer<'_>, name: &str) -> Option<&'a DeviceAttribute> {
    let attributes = offer.device.attributes.as_ref()?;
    let own = name.strip_prefix(offer.id.0.as_str()).and_then(|rest| rest.strip_prefix('/'));
    attributes.get(name).or_else(|| attributes.get(own?))
}

fn tolerated(tolerations: &[DeviceToleration], device: &Device) -> bool {
    let taints: Vec<Taint> = device.taints.iter().flatten().map(device_taint).collect();
    let tolerations: Vec<Toleration> = tolerations.iter().map(device_toleration).collect();
    tolerates_node(&tolerations, &taints)
}

fn alternatives(request: &DeviceRequest) -> Vec<Alternative<'_>> {
    let count = |mode: &Option<String>, count: Option<i64>| match mode.as_deref() {
        Some("All") => None,
        _ => Some(count.unwrap_or(1).max(1) as usize),
    };
    if let Some(exactly) = &request.exactly {
        return vec![Alternative {
            name: request.name.clone(),
            class: &exactly.device_class_name,
            selectors: exactly.selectors.as_deref().unwrap_or_default(),
            count: count(&exactly.allocation_mode, exactly.count),
            admin_access: exactly.admin_access.unwrap_or(false),
            tolerations: exactly.tolerations.as_deref().unwrap_or_default(),
            capacity: exactly.capacity.as_ref(),
        }];
    }
    let first_available = request.first_available.iter().flatten();
    first_available
        .map(|sub| Alternative {
            name: format!("{}/{}", request.name, sub.name),
            class: &sub.device_class_name,
            selectors: sub.selectors.as_deref().unwrap_or_default(),
            count: count(&sub.allocation_mode, sub.count),
            admin_access: false,
            tolerations: sub.tolerations.as_deref().unwrap_or_default(),
            capacity: sub.capacity.as_ref(),
        })
        .collect()
}

fn is_shared(device: &Device) -> bool {
    device.allow_multiple_allocations == Some(true)
}

/// The amount that a policy makes of what is asked for. As `calculateConsumedCapacity` and `violatesPolicy`.
fn by_policy(asked: Option<Quantity>, policy: &CapacityRequestPolicy, all: Quantity) -> Option<Quantity> {
    let Some(asked) = asked else { return Some(policy.default.as_ref().map_or(all, Quantity::from)) };
    if let Some(values) = &policy.valid_values {
        return values.iter().map(Quantity::from).filter(|value| *value >= asked).min();
    }
    let Some(range) = &policy.valid_range else { return Some(asked) };
    let least = Quantity::from(&range.min);
    let mut amount = asked.max(least);
    if let Some(step) = range.step.as_ref().map(|step| Quantity::from(step).milli_value()).filter(|step| *step > 0) {
        let above = (amount - least).milli_value();
        amount = least + Quantity::from_milli(above.div_euclid(step).saturating_mul(step));
        if above % step > 0 {
            amount += Quantity::from_milli(step);
        }
    }
    let most = range.max.as_ref().map(Quantity::from);
    most.is_none_or(|most| amount <= most).then_some(amount)
}

/// What a request takes of each capacity of a device; `None` if the device has not so much.
fn part_of(device: &Device, asked: Option<&CapacityRequirements>) -> Option<Amounts> {
    let asked = asked.and_then(|asked| asked.requests.as_ref());
    let asked = |name: &str| asked.and_then(|asked| asked.get(name)).map(Quantity::from);
    let capacities = device.capacity.iter().flatten();
    let parts = capacities.map(|(name, capacity)| {
        let all = Quantity::from(&capacity.value);
        let amount = match &capacity.request_policy {
            Some(policy) if is_shared(device) => by_policy(asked(name), policy, all)?,
            _ => asked(name).unwrap_or(all),
        };
        (amount <= all).then(|| (name.clone(), amount))
    });
    parts.collect()
}

/// Whether the device has all capacities that are asked for, and enough of them.
fn has_capacity(device: &Device, asked: Option<&CapacityRequirements>) -> bool {
    let names = asked.iter().flat_map(|asked| asked.requests.iter().flatten());
    let known = |name: &String| device.capacity.as_ref().is_some_and(|capacity| capacity.contains_key(name));
    names.into_iter().all(|(name, _)| known(name)) && part_of(device, asked).is_some()
}

/// What the pool's counters have left when the held devices have theirs.
fn counters_left(claims: &Claims, held: &Held) -> Counters {
    let mut left = Counters::new();
    let key = |slice: &ResourceSlice, set: &str, name: &str| {
        (slice.spec.driver.clone(), slice.spec.pool.name.clone(), set.to_owned(), name.to_owned())
    };
    let pools = newest(claims);
    let slices = || pools.values().flat_map(|(_, slices)| slices.iter());
    for slice in slices() {
        for set in slice.spec.shared_counters.iter().flatten() {
            for (name, counter) in &set.counters {
                left.insert(key(slice, &set.name, name), i128::from(Quantity::from(&counter.value).milli_value()));
            }
        }
    }
    for slice in slices() {
        for device in slice.spec.devices.iter().flatten() {
            let id = (slice.spec.driver.clone(), slice.spec.pool.name.clone(), device.name.clone());
            if held.devices.contains(&id) || held.shares.contains_key(&id) {
                consume(&mut left, &id, device, 1);
            }
        }
    }
    left
}

/// Takes a device's counters (`sign` 1) or gives them back (-1); whether there was enough.
fn consume(left: &mut Counters, (driver, pool, _): &DeviceId, device: &Device, sign: i128) -> bool {
    let mut enough = true;
    for consumption in device.consumes_counters.iter().flatten() {
        for (name, counter) in &consumption.counters {
            let key = (driver.clone(), pool.clone(), consumption.counter_set.clone(), name.clone());
            let left = left.entry(key).or_default();
            *left -= sign * i128::from(Quantity::from(&counter.value).milli_value());
            enough &= *left >= 0;
        }
    }
    enough
}

impl<'a> Search<'a> {
    /// Meets the requests from `index` on.
    fn request(&mut self, index: usize) -> bool {
        let Some(request) = self.requests.get(index) else { return true };
        (0..request.alternatives.len()).any(|alternative| {
            let wanted = self.wanted.get(&(index, alternative)).cloned().unwrap_or_default();
            match self.requests[index].alternatives[alternative].count {
                Some(count) => {
                    let complete: Vec<usize> =
                        wanted.into_iter().filter(|offer| self.offers[*offer].complete).collect();
                    self.pick(index, alternative, &complete, 0, count)
                }
                None => {
                    let held = self.taken.len();
                    let all = !wanted.is_empty()
                        && wanted
                            .iter()
                            .all(|offer| self.offers[*offer].complete && self.take(index, alternative, *offer));
                    if all && self.request(index + 1) {
                        return true;
                    }
                    while self.taken.len() > held {
                        self.give_back();
                    }
                    false
                }
            }
        })
    }

    fn pick(&mut self, index: usize, alternative: usize, wanted: &[usize], from: usize, left: usize) -> bool {
        if left == 0 {
            return self.request(index + 1);
        }
        for at in from..wanted.len() {
            self.steps += 1;
            if self.is_late() {
                return false;
            }
            if self.take(index, alternative, wanted[at]) {
                // Of a device that is shared there may be another part.
                let next = if is_shared(self.offers[wanted[at]].device) { at } else { at + 1 };
                if self.pick(index, alternative, wanted, next, left - 1) {
                    return true;
                }
                self.give_back();
            }
        }
        false
    }

    /// Whether the search is given up; once it is, nothing goes on.
    fn is_late(&mut self) -> bool {
        let looks = self.steps.is_multiple_of(STEPS_BETWEEN_LOOKS);
        if looks && self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            self.steps = STEPS_MAX;
        }
        self.steps >= STEPS_MAX
    }

    fn take(&mut self, request: usize, alternative: usize, offer: usize) -> bool {
        let claim = self.requests[request].claim;
        let admin = self.requests[request].alternatives[alternative].admin_access;
        let (id, device) = (self.offers[offer].id.clone(), self.offers[offer].device);
        if (!admin && self.held.devices.contains(&id)) || !self.keeps_constraints(claim, request, alternative, offer) {
            return false;
        }
        let part = match is_shared(device) && !admin {
            true => match self.share(&id, device, self.requests[request].alternatives[alternative].capacity) {
                Some(part) => Some(part),
                None => return false,
            },
            false => None,
        };
        if part.is_none() && !admin {
            if !self.consume_counters(&id, device) {
                return false;
            }
            self.held.devices.insert(id);
        }
        self.taken.push(Taken { claim, request, alternative, offer, part });
        true
    }

    fn consume_counters(&mut self, id: &DeviceId, device: &Device) -> bool {
        let enough = consume(&mut self.counters, id, device, 1);
        if !enough {
            consume(&mut self.counters, id, device, -1);
        }
        enough
    }

    /// Takes a part of a device that many may share, if there is so much left.
    fn share(&mut self, id: &DeviceId, device: &Device, asked: Option<&CapacityRequirements>) -> Option<Amounts> {
        let part = part_of(device, asked)?;
        let used = self.held.shares.get(id).map(|shares| &shares.amounts);
        let fits = |(name, amount): (&String, &Quantity)| {
            let used = used.and_then(|used| used.get(name)).copied().unwrap_or_default();
            device
                .capacity
                .as_ref()
                .and_then(|all| all.get(name))
                .is_some_and(|all| used + *amount <= (&all.value).into())
        };
        if !part.iter().all(fits) || (used.is_none() && !self.consume_counters(id, device)) {
            return None;
        }
        let shares = self.held.shares.entry(id.clone()).or_default();
        shares.users += 1;
        part.iter().for_each(|(name, amount)| *shares.amounts.entry(name.clone()).or_default() += *amount);
        Some(part)
    }

    fn give_back(&mut self) {
        let Some(last) = self.taken.pop() else { return };
        let Offer { id, device, .. } = &self.offers[last.offer];
        if let Some(part) = last.part {
            let Some(Shares { users, amounts }) = self.held.shares.get_mut(id) else { return };
            *users -= 1;
            part.iter().for_each(|(name, amount)| *amounts.entry(name.clone()).or_default() -= *amount);
            if *users == 0 {
                self.held.shares.remove(id);
                consume(&mut self.counters, id, device, -1);
            }
        } else if !self.requests[last.request].alternatives[last.alternative].admin_access {
            consume(&mut self.counters, id, device, -1);
            self.held.devices.remove(id);
        }
    }

    /// Whether the device goes with those that the claim has already.
    fn keeps_constraints(&self, claim: usize, request: usize, alternative: usize, offer: usize) -> bool {
        let named = |constraint: &DeviceConstraint, request: usize, alternative: usize| {
            let name = &self.requests[request].alternatives[alternative].name;
            let main = name.split('/').next().unwrap_or(name);
            let requests = constraint.requests.as_deref().unwrap_or_default();
            requests.is_empty() || requests.iter().any(|wanted| wanted == name || wanted == main)
        };
        self.constraints[claim].iter().filter(|constraint| named(constraint, request, alternative)).all(|constraint| {
            let others = || {
                let same = self.taken.iter().filter(|taken| taken.claim == claim);
                same.filter(|taken| named(constraint, taken.request, taken.alternative))
                    .map(|taken| &self.offers[taken.offer])
            };
            if let Some(name) = &constraint.match_attribute {
                let value = attribute(&self.offers[offer], name);
                return value.is_some() && others().all(|other| attribute(other, name) == value);
            }
            if let Some(name) = &constraint.distinct_attribute {
                let value = attribute(&self.offers[offer], name);
                return value.is_some() && others().all(|other| attribute(other, name) != value);
            }
            false
        })
    }
}

/// Allocates devices on a node for claims that have none.
pub fn allocate(
    claims: &Claims,
    wanted: &[(Arc<str>, Arc<ResourceClaim>)],
    taken: &Held,
    selectors: &Selectors,
    node: &str,
    labels: &BTreeMap<String, String>,
    deadline: Option<Instant>,
) -> Result<Vec<AllocationResult>, Refused> {
    let mut offers = Vec::new();
    let pools = newest(claims);
    for (complete, slices) in pools.values() {
        for slice in slices {
            let spec = &slice.spec;
            for device in spec.devices.iter().flatten() {
                let per_device = spec.per_device_node_selection == Some(true);
                let (name, selector, all) = match per_device {
                    true => (&device.node_name, &device.node_selector, device.all_nodes),
                    false => (&spec.node_name, &spec.node_selector, spec.all_nodes),
                };
                let named = name.as_deref() == Some(node);
                let selected = selector.as_ref().is_some_and(|selector| NodeTerms::of(selector).matches(node, labels));
                if named || selected || all == Some(true) {
                    let id = (spec.driver.clone(), spec.pool.name.clone(), device.name.clone());
                    offers.push(Offer { id, device, local: named, selector: selector.as_ref(), complete: *complete });
                }
            }
        }
    }
    // What is ready at once comes before what must be made ready.
    offers.sort_by_key(|offer| offer.device.binding_conditions.as_ref().is_some_and(|all| !all.is_empty()));
    let empty = Vec::new();
    let mut search = Search {
        requests: Vec::new(),
        constraints: Vec::new(),
        offers,
        wanted: HashMap::new(),
        counters: counters_left(claims, taken),
        held: taken.clone(),
        taken: Vec::new(),
        steps: 0,
        deadline,
    };
    for (number, (_, claim)) in wanted.iter().enumerate() {
        let devices = claim.spec.devices.as_ref();
        search
            .constraints
            .push(devices.and_then(|devices| devices.constraints.as_ref()).into_iter().flatten().collect());
        for request in devices.and_then(|devices| devices.requests.as_ref()).unwrap_or(&empty) {
            search.requests.push(Request { claim: number, alternatives: alternatives(request) });
        }
    }
    for (index, request) in search.requests.iter().enumerate() {
        for (number, alternative) in request.alternatives.iter().enumerate() {
            let class = claims.class(alternative.class);
            let of_class = class.map(|class| class.spec.selectors.as_deref().unwrap_or_default());
            let does = |offer: &Offer<'_>| {
                of_class.is_some_and(|of_class| selectors.select(of_class, &offer.id.0, offer.device))
                    && selectors.select(alternative.selectors, &offer.id.0, offer.device)
                    && tolerated(alternative.tolerations, offer.device)
                    && has_capacity(offer.device, alternative.capacity)
            };
            let found = (0..search.offers.len()).filter(|offer| does(&search.offers[*offer])).collect();
            search.wanted.insert((index, number), found);
        }
    }
    if !search.request(0) {
        return Err(if search.steps >= STEPS_MAX { Refused::TimedOut } else { Refused::NotEnough });
    }
    let result = |number: usize| allocation(claims, &search, number, &wanted[number].1, node);
    Ok((0..wanted.len()).map(result).collect())
}

fn allocation(
    claims: &Claims,
    search: &Search<'_>,
    number: usize,
    claim: &ResourceClaim,
    node: &str,
) -> AllocationResult {
    let mine: Vec<&Taken> = search.taken.iter().filter(|taken| taken.claim == number).collect();
    let alternative = |taken: &Taken| &search.requests[taken.request].alternatives[taken.alternative];
    let results = mine.iter().map(|taken| {
        let offered = search.offers[taken.offer].device;
        let (driver, pool, device) = search.offers[taken.offer].id.clone();
        let chosen = alternative(taken);
        DeviceRequestAllocationResult {
            request: chosen.name.clone(),
            driver,
            pool,
            device,
            admin_access: chosen.admin_access.then_some(true),
            binding_conditions: offered.binding_conditions.clone(),
            binding_failure_conditions: offered.binding_failure_conditions.clone(),
            consumed_capacity: taken
                .part
                .as_ref()
                .map(|part| part.iter().map(|(n, q)| (n.clone(), q.to_api())).collect()),
            tolerations: Some(chosen.tolerations.to_vec()).filter(|tolerations| !tolerations.is_empty()),
            ..DeviceRequestAllocationResult::default()
        }
    });
    let mut config = Vec::new();
    let mut told = HashSet::new();
    for taken in &mine {
        let chosen = alternative(taken);
        let class = claims.class(chosen.class).filter(|_| told.insert(chosen.name.clone()));
        for one in class.iter().flat_map(|class| class.spec.config.iter().flatten()) {
            config.push(DeviceAllocationConfiguration {
                source: "FromClass".to_owned(),
                requests: Some(vec![chosen.name.clone()]),
                opaque: one.opaque.clone(),
            });
        }
    }
    let asked = claim.spec.devices.as_ref().and_then(|devices| devices.config.as_ref());
    for one in asked.into_iter().flatten() {
        config.push(DeviceAllocationConfiguration {
            source: "FromClaim".to_owned(),
            requests: one.requests.clone(),
            opaque: one.opaque.clone(),
        });
    }
    let offers = || mine.iter().map(|taken| &search.offers[taken.offer]);
    let node_selector = if offers().any(|offer| offer.local || offer.device.binds_to_node == Some(true)) {
        serde_json::from_value(json!({"nodeSelectorTerms": [
            {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}]}))
        .ok()
    } else {
        // All of the devices' selectors must hold: they have one term each.
        let mut terms =
            offers().filter_map(|offer| offer.selector).filter_map(|selector| selector.node_selector_terms.first());
        terms.next().cloned().map(|mut first| {
            for term in terms {
                for expression in term.match_expressions.iter().flatten() {
                    let known = first.match_expressions.get_or_insert_default();
                    if !known.contains(expression) {
                        known.push(expression.clone());
                    }
                }
            }
            NodeSelector { node_selector_terms: vec![first] }
        })
    };
    AllocationResult {
        devices: Some(DeviceAllocationResult {
            results: Some(results.collect()),
            config: Some(config).filter(|config| !config.is_empty()),
        }),
        node_selector,
        allocation_timestamp: None,
    }
}
