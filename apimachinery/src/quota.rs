//! What ResourceQuotas count: how much of what an object uses, which quotas it counts against, and whether it still fits.
//!
//! One implementation for those who need it: the API server's admission, which claims usage before an object is written, and
//! the controller that counts anew what there is. As `pkg/quota/v1` and the evaluators below it.
use crate::labels::{Operator, Requirement};
use crate::meta::group_resource;
use crate::pod::{self, Resources};
use crate::quantity::Quantity;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodAffinityTerm};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};

/// Kinds of the core group that are counted by their plain name as well as by `count/…`.
const PLAIN_COUNTS: [&str; 4] = ["configmaps", "replicationcontrollers", "resourcequotas", "secrets"];
const POD_RESOURCES: [&str; 10] = [
    "cpu",
    "ephemeral-storage",
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "memory",
    "pods",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
];
/// Where a quota counts one of these, every container must say how much of it it needs.
const MUST_BE_SAID: [&str; 6] = ["cpu", "limits.cpu", "limits.memory", "memory", "requests.cpu", "requests.memory"];
const BY_STORAGE_CLASS: &str = ".storageclass.storage.k8s.io/";
const BY_DEVICE_CLASS: &str = ".deviceclass.resource.k8s.io/devices";
/// A class of devices as a resource that containers may ask for.
const OF_DEVICE_CLASS: &str = "deviceclass.resource.kubernetes.io/";
/// Says of a claim that the scheduler made it for what a pod's containers ask for by the names of resources.
const MADE_FOR_POD: &str = "resource.kubernetes.io/extended-resource-claim";
const HUGE_PAGES: &str = "hugepages-";
const REQUESTS: &str = "requests.";
/// What a claim for all devices of a class may get at most.
const DEVICES_MAX: i64 = 32;

/// An object as quotas see it.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    pub usage: Resources,
    scopes: Scopes,
    /// For a pod: what a quota may ask for that containers do not say, and which containers.
    unsaid: BTreeMap<&'static str, BTreeSet<String>>,
}

/// By what quotas pick objects.
#[derive(Clone, Debug, Default)]
enum Scopes {
    #[default]
    None,
    Pod {
        terminating: bool,
        best_effort: bool,
        priority_class: String,
        cross_namespace: bool,
    },
    Claim {
        attributes_classes: BTreeSet<String>,
    },
}

/// One ResourceQuota: its limits and usage as its status has them, and what it picks.
#[derive(Clone, Debug, Default)]
pub struct Quota {
    pub name: String,
    pub hard: Resources,
    pub used: Resources,
    scopes: Vec<Requirement>,
}

/// What may be used only where a quota limits it. As `LimitedResource` of the admission plugin's configuration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Limited {
    api_group: String,
    resource: String,
    match_contains: Vec<String>,
    match_scopes: Vec<Value>,
}

/// Use that no quota covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uncovered {
    Resources(Vec<String>),
    /// As Go shows them.
    Scopes(String),
}

/// `count/deployments.apps`.
pub fn count_name(group: &str, resource: &str) -> String {
    format!("count/{}", group_resource(group, resource))
}

/// Whether a quota of this name counts objects of a kind. As `MatchingResources`.
pub fn counts(group: &str, resource: &str, name: &str) -> bool {
    if name.strip_prefix("count/") == Some(&group_resource(group, resource)) {
        return true;
    }
    match (group, resource) {
        ("", "pods") => {
            POD_RESOURCES.contains(&name)
                || name.starts_with(HUGE_PAGES)
                || name.strip_prefix(REQUESTS).is_some_and(|rest| rest.starts_with(HUGE_PAGES) || is_extended(rest))
        }
        ("", "services") => ["services", "services.loadbalancers", "services.nodeports"].contains(&name),
        ("", "persistentvolumeclaims") => {
            let name = name.split_once(BY_STORAGE_CLASS).map_or(name, |(_, name)| name);
            ["persistentvolumeclaims", "requests.storage"].contains(&name)
        }
        ("resource.k8s.io", "resourceclaims") => {
            name.ends_with(BY_DEVICE_CLASS) || name.strip_prefix(REQUESTS).is_some_and(is_extended)
        }
        ("", plain) => PLAIN_COUNTS.contains(&plain) && plain == name,
        _ => false,
    }
}

/// The groups and plural names of the kinds that a quota of this name counts; none for what nobody counts.
pub fn counted(name: &str) -> Vec<(String, String)> {
    if let Some(counted) = name.strip_prefix("count/") {
        let (resource, group) = counted.split_once('.').unwrap_or((counted, ""));
        return vec![(group.to_owned(), resource.to_owned())];
    }
    let measured =
        [("", "pods"), ("", "services"), ("", "persistentvolumeclaims"), ("resource.k8s.io", "resourceclaims")];
    let plain = PLAIN_COUNTS.iter().map(|resource| ("", *resource));
    let kinds = measured.into_iter().chain(plain).filter(|(group, resource)| counts(group, resource, name));
    kinds.map(|(group, resource)| (group.to_owned(), resource.to_owned())).collect()
}

/// Whether objects of a kind use anything beside being there.
pub fn is_measured(group: &str, resource: &str) -> bool {
    matches!(
        (group, resource),
        ("", "pods" | "services" | "persistentvolumeclaims") | ("resource.k8s.io", "resourceclaims")
    )
}

/// `example.com/gpu`, or a class of devices as a resource. As `IsDRAExtendedResourceName`.
fn is_extended(name: &str) -> bool {
    let extended = name.contains('/') && !name.contains("kubernetes.io/") && !name.starts_with(REQUESTS);
    extended || name.starts_with(OF_DEVICE_CLASS)
}

/// What an object uses.
pub fn measure(group: &str, resource: &str, object: &Value, now: Timestamp) -> Measured {
    let mut measured = match (group, resource) {
        ("", "pods") => serde_json::from_value(object.clone()).map(|pod| of_pod(&pod, now)).unwrap_or_default(),
        ("", "services") => of_service(object),
        ("", "persistentvolumeclaims") => of_claim(object),
        ("resource.k8s.io", "resourceclaims") => of_device_claim(object),
        _ => Measured::default(),
    };
    measured.usage.insert(count_name(group, resource), Quantity::from_value(1));
    if group.is_empty() && PLAIN_COUNTS.contains(&resource) {
        measured.usage.insert(resource.to_owned(), Quantity::from_value(1));
    }
    measured
}

// === pods ===

/// As `PodUsageFunc`: a pod that has ended counts as an object only.
fn of_pod(pod: &Pod, now: Timestamp) -> Measured {
    let spec = pod.spec.as_ref();
    let scopes = Scopes::Pod {
        terminating: spec.and_then(|s| s.active_deadline_seconds).is_some_and(|seconds| seconds >= 0),
        best_effort: spec.is_none_or(|s| pod::qos_class(s) == "BestEffort"),
        priority_class: spec.and_then(|s| s.priority_class_name.clone()).unwrap_or_default(),
        cross_namespace: affinity_terms(pod)
            .any(|term| term.namespaces.iter().flatten().next().is_some() || term.namespace_selector.is_some()),
    };
    let mut measured = Measured { scopes, ..Measured::default() };
    let Some(spec) = spec else { return measured };
    if !pod::asks_as_a_whole(spec) {
        for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
            let said = |kind: &str, name: &str| {
                let resources = container.resources.as_ref();
                let amounts =
                    resources.and_then(|r| if kind == "limits" { r.limits.as_ref() } else { r.requests.as_ref() });
                amounts.is_some_and(|amounts| amounts.contains_key(name))
            };
            for needed in MUST_BE_SAID {
                let (kind, name) = needed.split_once('.').unwrap_or(("requests", needed));
                if !said(kind, name) {
                    measured.unsaid.entry(needed).or_default().insert(container.name.clone());
                }
            }
        }
    }
    if !is_charged(pod, now) {
        return measured;
    }
    let usage = &mut measured.usage;
    usage.insert("pods".to_owned(), Quantity::from_value(1));
    for (name, amount) in pod::requests_in_force(pod) {
        let native = ["cpu", "memory", "ephemeral-storage"].contains(&name.as_str());
        if native || name.starts_with(HUGE_PAGES) {
            usage.insert(format!("{REQUESTS}{name}"), amount);
            usage.insert(name, amount);
        } else if is_extended(&name) {
            usage.insert(format!("{REQUESTS}{name}"), amount);
        }
    }
    for (name, amount) in pod::limits_in_force(pod) {
        if ["cpu", "memory", "ephemeral-storage"].contains(&name.as_str()) {
            usage.insert(format!("limits.{name}"), amount);
        }
    }
    measured
}

/// Neither ended nor so long overdue that its node must be lost. As `QuotaV1Pod`.
pub fn is_charged(pod: &Pod, now: Timestamp) -> bool {
    let meta = &pod.metadata;
    let overdue = meta
        .deletion_timestamp
        .as_ref()
        .zip(meta.deletion_grace_period_seconds)
        .is_some_and(|(at, grace)| at.0.checked_add(SignedDuration::from_secs(grace)).is_ok_and(|end| now > end));
    !pod::is_terminal(pod) && !overdue
}

fn affinity_terms(pod: &Pod) -> impl Iterator<Item = &PodAffinityTerm> {
    let affinity = pod.spec.as_ref().and_then(|s| s.affinity.as_ref());
    let with = affinity.and_then(|a| a.pod_affinity.as_ref());
    let without = affinity.and_then(|a| a.pod_anti_affinity.as_ref());
    let preferred = [
        with.and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_ref()),
        without.and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_ref()),
    ];
    let required = [
        with.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref()),
        without.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref()),
    ];
    let preferred = preferred.into_iter().flatten().flatten().map(|weighted| &weighted.pod_affinity_term);
    required.into_iter().flatten().flatten().chain(preferred)
}

// === services, claims ===

fn text<'v>(object: &'v Value, pointer: &str) -> &'v str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn list<'v>(object: &'v Value, pointer: &str) -> &'v [Value] {
    object.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn of_service(service: &Value) -> Measured {
    let ports = list(service, "/spec/ports");
    let given = || ports.iter().filter(|port| port["nodePort"].as_i64().unwrap_or(0) != 0).count();
    let (balancers, node_ports) = match text(service, "/spec/type") {
        "NodePort" => (0, ports.len()),
        // Ports are not allotted yet: what counts is what was meant.
        "LoadBalancer" if service.pointer("/spec/allocateLoadBalancerNodePorts") == Some(&Value::Bool(false)) => {
            (1, given())
        }
        "LoadBalancer" => (1, ports.len()),
        _ => (0, 0),
    };
    let amounts = [("services", 1), ("services.loadbalancers", balancers), ("services.nodeports", node_ports as i64)];
    let usage = amounts.into_iter().map(|(name, amount)| (name.to_owned(), Quantity::from_value(amount))).collect();
    Measured { usage, ..Measured::default() }
}

fn of_claim(claim: &Value) -> Measured {
    let annotation = claim.pointer("/metadata/annotations").map(|a| &a["volume.beta.kubernetes.io/storage-class"]);
    let class = match annotation.and_then(Value::as_str) {
        Some(class) => class,
        None => text(claim, "/spec/storageClassName"),
    };
    let amount = |pointer: &str| Quantity::parse(text(claim, pointer)).ok().map(|amount| amount.rounded_to_units());
    let asked = amount("/spec/resources/requests/storage");
    // What was given already counts as long as it is more.
    let storage = asked.map(|asked| asked.max(amount("/status/allocatedResources/storage").unwrap_or_default()));
    let mut usage = Resources::new();
    for (name, amount) in [("persistentvolumeclaims", Some(Quantity::from_value(1))), ("requests.storage", storage)] {
        let Some(amount) = amount else { continue };
        usage.insert(name.to_owned(), amount);
        if !class.is_empty() {
            usage.insert(format!("{class}{BY_STORAGE_CLASS}{name}"), amount);
        }
    }
    let classes = [
        "/spec/volumeAttributesClassName",
        "/status/currentVolumeAttributesClassName",
        "/status/modifyVolumeStatus/targetVolumeAttributesClassName",
    ];
    let attributes_classes = classes.iter().map(|pointer| text(claim, pointer).to_owned()).filter(|c| !c.is_empty());
    let scopes = Scopes::Claim { attributes_classes: attributes_classes.collect() };
    Measured { usage, scopes, ..Measured::default() }
}

fn of_device_claim(claim: &Value) -> Measured {
    let mut usage = Resources::new();
    let devices = |request: &Value| match text(request, "/allocationMode") {
        "All" => DEVICES_MAX,
        "" | "ExactCount" => request["count"].as_i64().unwrap_or(1),
        _ => 0,
    };
    for request in list(claim, "/spec/devices/requests") {
        // Of alternatives the worst counts, class by class.
        let mut classes: BTreeMap<&str, i64> = BTreeMap::new();
        for wanted in request.get("exactly").into_iter().chain(list(request, "/firstAvailable")) {
            let most = classes.entry(text(wanted, "/deviceClassName")).or_default();
            *most = (*most).max(devices(wanted));
        }
        for (class, count) in classes {
            *usage.entry(format!("{class}{BY_DEVICE_CLASS}")).or_default() += Quantity::from_value(count);
        }
    }
    Measured { usage, ..Measured::default() }
}

/// Counts the devices of a claim by the names that they have as resources, too, but for what the pod that it was made for is
/// charged with already. `called` tells the name that a class gives its devices. As `addExtendedResourceQuota`.
pub fn name_devices(claim: &mut Measured, called: impl Fn(&str) -> Option<String>, pod: Option<&Measured>) {
    let of_class =
        |(name, amount): (&String, &Quantity)| Some((name.strip_suffix(BY_DEVICE_CLASS)?.to_owned(), *amount));
    let classes: Vec<(String, Quantity)> = claim.usage.iter().filter_map(of_class).collect();
    for (class, amount) in classes {
        for name in [Some(format!("{OF_DEVICE_CLASS}{class}")), called(&class)].into_iter().flatten() {
            let name = format!("{REQUESTS}{name}");
            let charged = pod.and_then(|pod| pod.usage.get(&name)).copied().unwrap_or_default();
            if amount > charged {
                claim.usage.insert(name, amount - charged);
            }
        }
    }
}

/// The name and UID of the pod for whose containers the scheduler made a claim.
pub fn pod_of(claim: &Value) -> Option<(&str, &str)> {
    let made = claim.pointer("/metadata/annotations").is_some_and(|notes| notes[MADE_FOR_POD] == "true");
    let owners = list(claim, "/metadata/ownerReferences");
    let owner = owners.iter().find(|owner| owner["controller"] == true).filter(|_| made)?;
    (owner["kind"] == "Pod" && owner["apiVersion"] == "v1").then(|| (text(owner, "/name"), text(owner, "/uid")))
}

/// The pod that is charged for a claim's devices: it is there and says so itself, or says nothing and none of `others`, the
/// claims of the namespace, was made for it before. As `getVerifiedPodUsage`.
pub fn charged_pod(
    claim: &Value,
    pod: impl Fn(&str) -> Option<Value>,
    others: impl Fn() -> Vec<Value>,
) -> Option<Value> {
    let (name, uid) = pod_of(claim)?;
    let pod = pod(name).filter(|pod| text(pod, "/metadata/uid") == uid)?;
    let age = |claim: &Value| {
        (text(claim, "/metadata/creationTimestamp").to_owned(), text(claim, "/metadata/name").to_owned())
    };
    let first = match pod.pointer("/status/extendedResourceClaimStatus/resourceClaimName") {
        Some(own) => claim.pointer("/metadata/name") == Some(own),
        None => !others().iter().any(|other| pod_of(other).is_some_and(|(_, of)| of == uid) && age(other) < age(claim)),
    };
    first.then_some(pod)
}

// === impl Quota ===

impl Quota {
    /// From a ResourceQuota, with the limits of its status: those that its usage was counted for.
    pub fn of(object: &Value) -> Self {
        let scopes = list(object, "/spec/scopes")
            .iter()
            .filter_map(|scope| Requirement::new(scope.as_str()?, Operator::Exists, Vec::new()).ok());
        let selected = list(object, "/spec/scopeSelector/matchExpressions").iter().filter_map(requirement);
        Self {
            name: text(object, "/metadata/name").to_owned(),
            hard: amounts(object, "/status/hard"),
            used: amounts(object, "/status/used"),
            scopes: scopes.chain(selected).collect(),
        }
    }

    /// Whether an object falls under all of its scopes.
    pub fn covers(&self, object: &Measured) -> bool {
        self.scopes.iter().all(|scope| object.scopes.fits(scope))
    }

    /// What an object adds to the usage of this quota, if anything, or why it may not. `old` is the object before an update;
    /// `unlimited` charges what cannot be refused any more.
    pub fn charge(
        &self,
        (group, resource): (&str, &str),
        new: &Measured,
        old: Option<&Measured>,
        unlimited: bool,
    ) -> Result<Resources, String> {
        let counted: Vec<&String> = self.hard.keys().filter(|name| counts(group, resource, name)).collect();
        if counted.is_empty() || !self.covers(new) {
            return Ok(Resources::new());
        }
        let unsaid: Vec<String> = new
            .unsaid
            .iter()
            .filter(|(name, _)| counted.iter().any(|counted| counted == *name))
            .map(|(name, containers)| {
                format!("{name} for: {}", containers.iter().map(String::as_str).collect::<Vec<_>>().join(","))
            })
            .collect();
        if !unsaid.is_empty() {
            return Err(format!("failed quota: {}: must specify {}", self.name, unsaid.join("; ")));
        }
        if counted.iter().any(|name| !self.used.contains_key(*name)) {
            let names: Vec<&str> = counted.iter().map(|name| name.as_str()).collect();
            return Err(format!("status unknown for quota: {}, resources: {}", self.name, names.join(",")));
        }
        let negative: Vec<&str> =
            new.usage.iter().filter(|(_, q)| **q < Quantity::ZERO).map(|(name, _)| name.as_str()).collect();
        if !negative.is_empty() {
            return Err(format!("quota usage is negative for resource(s): {}", negative.join(",")));
        }
        let before = |name: &String| {
            let old = old.filter(|old| self.covers(old))?;
            old.usage.get(name).copied()
        };
        let added: Resources = new
            .usage
            .iter()
            .filter(|(name, _)| self.hard.contains_key(*name))
            .map(|(name, amount)| (name.clone(), *amount - before(name).unwrap_or_default()))
            .filter(|(_, amount)| *amount > Quantity::ZERO)
            .collect();
        let sum = |name: &String, amount: &Quantity| self.used.get(name).copied().unwrap_or_default() + *amount;
        let exceeded: Vec<&String> = added
            .iter()
            .filter(|(name, amount)| !unlimited && self.hard.get(*name).is_some_and(|hard| sum(name, amount) > *hard))
            .map(|(name, _)| name)
            .collect();
        if exceeded.is_empty() {
            return Ok(added);
        }
        let show = |of: &Resources| {
            let each = exceeded.iter().map(|name| format!("{name}={}", of.get(*name).copied().unwrap_or_default()));
            each.collect::<Vec<_>>().join(",")
        };
        Err(format!(
            "exceeded quota: {}, requested: {}, used: {}, limited: {}",
            self.name,
            show(&added),
            show(&self.used),
            show(&self.hard)
        ))
    }

    /// Adds to the usage; [`Quota::release`] takes it back.
    pub fn add(&mut self, added: &Resources) {
        for (name, amount) in added {
            *self.used.entry(name.clone()).or_default() += *amount;
        }
    }

    /// Takes from the usage what was added, down to nothing.
    pub fn release(&mut self, added: &Resources) {
        for (name, amount) in added {
            if let Some(used) = self.used.get_mut(name) {
                *used = (*used - *amount).max(Quantity::ZERO);
            }
        }
    }
}

// === impl Measured ===

impl Measured {
    /// What of an object's use must be covered by a quota and is not; `adds` says that it uses more than it did. As
    /// `CheckRequest` of what is limited by default.
    pub fn uncovered(
        &self,
        (group, resource): (&str, &str),
        adds: bool,
        limited: &[Limited],
        quotas: &[Quota],
    ) -> Option<Uncovered> {
        if !adds {
            return None;
        }
        let covering = || quotas.iter().filter(|quota| quota.covers(self)).flat_map(|quota| quota.hard.keys());
        let names = self.usage.iter().filter(|(_, amount)| **amount > Quantity::ZERO).map(|(name, _)| name);
        let names = names.filter(|name| {
            let ours = limited.iter().filter(|l| l.api_group == group && l.resource == resource);
            ours.flat_map(|l| &l.match_contains).any(|part| name.contains(part.as_str()))
        });
        let missing: Vec<String> = names.filter(|name| !covering().any(|covered| covered == *name)).cloned().collect();
        if !missing.is_empty() {
            return Some(Uncovered::Resources(missing));
        }
        let is_scoped = |name: &str| {
            quotas.iter().flat_map(|quota| &quota.scopes).any(|scope| scope.key == name && self.scopes.fits(scope))
        };
        let scopes: Vec<String> = limited
            .iter()
            .flat_map(|limited| &limited.match_scopes)
            .filter(|scope| requirement(scope).is_some_and(|scope| self.scopes.fits(&scope)))
            .filter(|scope| !is_scoped(text(scope, "/scopeName")))
            .map(|scope| {
                let values: Vec<&str> = list(scope, "/values").iter().filter_map(Value::as_str).collect();
                format!("{{{} {} [{}]}}", text(scope, "/scopeName"), text(scope, "/operator"), values.join(" "))
            })
            .collect();
        (!scopes.is_empty()).then(|| Uncovered::Scopes(format!("[{}]", scopes.join(" "))))
    }

    /// Does an object use more of anything than it did?
    pub fn exceeds(&self, old: &Measured) -> bool {
        self.usage.iter().any(|(name, amount)| *amount > old.usage.get(name).copied().unwrap_or_default())
    }
}

/// A `ScopedResourceSelectorRequirement`.
fn requirement(expression: &Value) -> Option<Requirement> {
    let operator = match text(expression, "/operator") {
        "In" => Operator::In,
        "NotIn" => Operator::NotIn,
        "Exists" => Operator::Exists,
        "DoesNotExist" => Operator::DoesNotExist,
        _ => return None,
    };
    let values = list(expression, "/values").iter().filter_map(Value::as_str).map(ToOwned::to_owned).collect();
    Requirement::new(text(expression, "/scopeName"), operator, values).ok()
}

// === impl Scopes ===

impl Scopes {
    /// As `podMatchesScopeFunc` and `pvcMatchesScopeFunc`.
    fn fits(&self, scope: &Requirement) -> bool {
        match (self, scope.key.as_str()) {
            (Self::Pod { terminating, .. }, "Terminating") => *terminating,
            (Self::Pod { terminating, .. }, "NotTerminating") => !terminating,
            (Self::Pod { best_effort, .. }, "BestEffort") => *best_effort,
            (Self::Pod { best_effort, .. }, "NotBestEffort") => !best_effort,
            (Self::Pod { cross_namespace, .. }, "CrossNamespacePodAffinity") => *cross_namespace,
            (Self::Pod { priority_class, .. }, "PriorityClass") => {
                scope.matches(Some(priority_class.as_str()).filter(|class| !class.is_empty()))
            }
            (Self::Claim { attributes_classes }, "VolumeAttributesClass") => {
                if attributes_classes.is_empty() {
                    scope.matches(None)
                } else {
                    attributes_classes.iter().any(|class| scope.matches(Some(class)))
                }
            }
            _ => false,
        }
    }
}

/// The amounts of a map; what is no quantity counts as none.
pub fn amounts(object: &Value, pointer: &str) -> Resources {
    let map = object.pointer(pointer).and_then(Value::as_object);
    let parsed = map.into_iter().flatten().filter_map(|(name, amount)| {
        let amount = amount.as_str().map_or_else(|| amount.to_string(), ToOwned::to_owned);
        Some((name.clone(), Quantity::parse(&amount).ok()?))
    });
    parsed.collect()
}

/// For the wire.
pub fn to_value(amounts: &Resources) -> Value {
    Value::Object(amounts.iter().map(|(name, amount)| (name.clone(), amount.to_string().into())).collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests;
