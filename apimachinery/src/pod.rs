//! What several components ask of a pod.
use crate::quantity::Quantity;
use k8s_openapi::{
    api::core::v1::{Container, ContainerStatus, Pod, PodCondition, PodSpec, ResourceRequirements},
    apimachinery::pkg::{
        api::resource::Quantity as ApiQuantity,
        apis::meta::v1::{ObjectMeta, OwnerReference},
    },
};
use serde_json::Value;
use std::collections::BTreeMap;

/// Sysctls that concern a pod alone: any pod may set them. As `pod-security-admission` and the kubelet have them.
pub const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// Amounts by resource name.
pub type Resources = BTreeMap<String, Quantity>;

/// The condition of a type.
pub fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.iter().flatten().find(|c| c.type_ == kind)
}

/// True when the `Ready` condition is. As `IsPodReady`.
pub fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|c| c.status == "True")
}

pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or("")
}

/// Succeeded or Failed: it will never run again.
pub fn is_terminal(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Neither finished nor being deleted. As `IsPodActive`.
pub fn is_active(pod: &Pod) -> bool {
    !is_terminal(pod) && pod.metadata.deletion_timestamp.is_none()
}

/// The owner that manages the object, of which there is one at most.
pub fn controller_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references.iter().flatten().find(|o| o.controller == Some(true))
}

/// True for a restartable init container: a sidecar (KEP-753).
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// What the scheduler reserves and the kubelet admits: containers and sidecars together, or the largest init step if
/// that is more, and the overhead; pod-level requests win where given. As `resourcehelper.PodRequests`.
pub fn requests(spec: &PodSpec) -> Resources {
    let mut all = total(spec, requests_of);
    add(&mut all, &amounts(spec.overhead.as_ref()));
    all
}

/// As [`requests`], or what the node still holds for a container that is being resized, where that is more.
/// As `resourcehelper.PodRequests` with `UseStatusResources`.
pub fn requests_in_force(pod: &Pod) -> Resources {
    let Some(spec) = &pod.spec else { return Resources::new() };
    let held: BTreeMap<&str, Resources> = statuses(pod)
        .filter(|s| s.allocated_resources.is_some() || s.resources.is_some())
        .map(|status| {
            let mut held = requests_of(status.resources.as_ref());
            raise(&mut held, &amounts(status.allocated_resources.as_ref()));
            (status.name.as_str(), held)
        })
        .collect();
    let of = |container: &Container| requests_of(container.resources.as_ref());
    in_force(pod, &held, of, |resources| &mut resources.requests).map_or_else(|| requests(spec), |spec| requests(&spec))
}

fn statuses(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.as_ref();
    let main = status.and_then(|s| s.container_statuses.as_ref()).into_iter().flatten();
    main.chain(status.and_then(|s| s.init_container_statuses.as_ref()).into_iter().flatten())
}

/// The specification with what its containers are `held` to where that is more than what they ask `of` the node; None where
/// nothing differs. As `determineContainerReqs` and `determineContainerLimits`.
fn in_force(
    pod: &Pod,
    held: &BTreeMap<&str, Resources>,
    of: impl Fn(&Container) -> Resources,
    field: fn(&mut ResourceRequirements) -> &mut Option<BTreeMap<String, ApiQuantity>>,
) -> Option<PodSpec> {
    let spec = pod.spec.as_ref()?;
    let infeasible = condition(pod, "PodResizePending").is_some_and(|c| c.reason.as_deref() == Some("Infeasible"));
    // Mostly a container has what it asks for.
    let differs = |c: &Container| held.get(c.name.as_str()).is_some_and(|held| infeasible || *held != of(c));
    if !spec.containers.iter().chain(spec.init_containers.iter().flatten()).any(differs) {
        return None;
    }
    let mut spec = spec.clone();
    for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
        let Some(held) = held.get(container.name.as_str()) else { continue };
        // What cannot be had is not waited for.
        let mut most = if infeasible { Resources::new() } else { of(container) };
        raise(&mut most, held);
        let amounts = most.iter().map(|(name, amount)| (name.clone(), amount.to_api())).collect();
        *field(container.resources.get_or_insert_default()) = Some(amounts);
    }
    Some(spec)
}

/// As [`requests`], of limits; what is not limited is not by the overhead either. As `resourcehelper.PodLimits`.
pub fn limits(spec: &PodSpec) -> Resources {
    let mut all = total(spec, limits_of);
    for (name, amount) in amounts(spec.overhead.as_ref()) {
        if let Some(limit) = all.get_mut(&name) {
            *limit += amount;
        }
    }
    all
}

/// As [`limits`], or what a container that is being resized has still, where that is more.
pub fn limits_in_force(pod: &Pod) -> Resources {
    let Some(spec) = &pod.spec else { return Resources::new() };
    let held: BTreeMap<&str, Resources> = statuses(pod)
        .filter(|s| s.resources.is_some())
        .map(|s| (s.name.as_str(), limits_of(s.resources.as_ref())))
        .collect();
    let of = |container: &Container| limits_of(container.resources.as_ref());
    in_force(pod, &held, of, |resources| &mut resources.limits).map_or_else(|| limits(spec), |spec| limits(&spec))
}

/// Whether a pod as a whole, and not its containers alone, asks for anything. As `IsPodLevelResourcesSet`.
pub fn asks_as_a_whole(spec: &PodSpec) -> bool {
    let amounts = spec.resources.iter().flat_map(|r| r.requests.iter().chain(&r.limits));
    amounts.flat_map(BTreeMap::keys).any(|name| is_pod_level(name))
}

/// Requests of one container; a limit without a request counts as one, as the defaulting of the API has it.
pub fn requests_of(resources: Option<&ResourceRequirements>) -> Resources {
    amounts(resources.and_then(|r| r.requests.as_ref()))
}

fn total(spec: &PodSpec, of: impl Fn(Option<&ResourceRequirements>) -> Resources) -> Resources {
    let mut running = Resources::new();
    for container in &spec.containers {
        add(&mut running, &of(container.resources.as_ref()));
    }
    let (mut sidecars, mut starting) = (Resources::new(), Resources::new());
    for container in spec.init_containers.iter().flatten() {
        let own = of(container.resources.as_ref());
        if is_sidecar(container) {
            add(&mut running, &own);
            add(&mut sidecars, &own);
            raise(&mut starting, &sidecars);
        } else {
            let mut step = own;
            add(&mut step, &sidecars);
            raise(&mut starting, &step);
        }
    }
    raise(&mut running, &starting);
    if spec.resources.is_some() {
        running.extend(of(spec.resources.as_ref()));
    }
    running
}

fn limits_of(resources: Option<&ResourceRequirements>) -> Resources {
    amounts(resources.and_then(|r| r.limits.as_ref()))
}

fn amounts(map: Option<&BTreeMap<String, ApiQuantity>>) -> Resources {
    map.into_iter().flatten().map(|(name, q)| (name.clone(), Quantity::from(q))).collect()
}

fn add(to: &mut Resources, what: &Resources) {
    for (name, amount) in what {
        *to.entry(name.clone()).or_default() += *amount;
    }
}

fn raise(to: &mut Resources, least: &Resources) {
    for (name, amount) in least {
        let have = to.entry(name.clone()).or_default();
        *have = (*have).max(*amount);
    }
}

/// May this be asked for by a pod as a whole? As `IsSupportedPodLevelResource`.
pub fn is_pod_level(name: &str) -> bool {
    matches!(name, "cpu" | "memory") || name.starts_with("hugepages-")
}

/// `Guaranteed`, `Burstable` or `BestEffort`, by cpu and memory of the pod as a whole or of all containers. As `ComputePodQOS`.
pub fn qos_class(spec: &PodSpec) -> &'static str {
    let whole = spec.resources.as_ref();
    let whole =
        whole.filter(|r| [&r.requests, &r.limits].into_iter().flatten().flatten().any(|(n, _)| is_pod_level(n)));
    let each = spec.containers.iter().chain(spec.init_containers.iter().flatten()).map(|c| c.resources.as_ref());
    let claims = |resources: Option<&ResourceRequirements>| {
        let amount = |list: Option<&BTreeMap<_, _>>, name: &str| list?.get(name).map(Quantity::from);
        CLASS_RESOURCES.map(|name| {
            let of = |list: fn(&ResourceRequirements) -> &Option<_>| amount(list(resources?).as_ref(), name);
            (of(|r| &r.requests), of(|r| &r.limits))
        })
    };
    match whole {
        Some(whole) => class_of([claims(Some(whole))]),
        None => class_of(each.map(claims)),
    }
}

/// As [`qos_class`], of a spec in JSON.
pub fn qos_class_of(spec: &Value) -> &'static str {
    let names = |r: &Value| {
        let lists = ["requests", "limits"].into_iter().filter_map(|list| r.get(list)?.as_object());
        lists.flatten().any(|(name, _)| is_pod_level(name))
    };
    let claims = |resources: Option<&Value>| {
        CLASS_RESOURCES.map(|name| {
            let of = |list: &str| Quantity::parse(resources?.get(list)?.get(name)?.as_str()?).ok();
            (of("requests"), of("limits"))
        })
    };
    let containers = ["containers", "initContainers"].into_iter().filter_map(|field| spec.get(field)?.as_array());
    match spec.get("resources").filter(|whole| names(whole)) {
        Some(whole) => class_of([claims(Some(whole))]),
        None => class_of(containers.flatten().map(|container| claims(container.get("resources")))),
    }
}

/// What decides the class of a pod.
const CLASS_RESOURCES: [&str; 2] = ["cpu", "memory"];

/// Of the request and the limit of each of [`CLASS_RESOURCES`]. A limit without a request counts as one, as the API's
/// defaults have it.
fn class_of(claims: impl IntoIterator<Item = [(Option<Quantity>, Option<Quantity>); 2]>) -> &'static str {
    let (mut any, mut guaranteed) = (false, true);
    for (request, limit) in claims.into_iter().flatten() {
        let [request, limit] = [request, limit].map(|amount| amount.filter(|amount| *amount > Quantity::ZERO));
        any |= request.is_some() || limit.is_some();
        guaranteed &= limit.is_some() && (request.is_none() || request == limit);
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(value: Value) -> PodSpec {
        serde_json::from_value(value).unwrap()
    }

    fn container(name: &str, cpu: &str) -> Value {
        json!({"name": name, "resources": {"requests": {"cpu": cpu}}})
    }

    #[test]
    fn requests_take_the_larger_of_running_and_starting() {
        let mut sidecar = container("s", "100m");
        sidecar["restartPolicy"] = "Always".into();
        for (inits, expected) in [
            (json!([]), 300),
            (json!([container("i", "1")]), 1000),
            (json!([sidecar, container("i", "1")]), 1100),
            (json!([container("i", "1"), sidecar]), 1000),
            (json!([sidecar]), 400),
        ] {
            let spec =
                spec(json!({"containers": [container("a", "100m"), container("b", "200m")], "initContainers": inits}));
            assert_eq!(requests(&spec)["cpu"].milli_value(), expected, "{inits}");
        }
        let spec = spec(json!({"containers": [container("a", "100m")], "overhead": {"cpu": "50m"}}));
        assert_eq!(requests(&spec)["cpu"].milli_value(), 150);
    }

    #[test]
    fn limits_have_the_overhead_where_there_is_a_limit() {
        let limited = json!({"name": "a", "resources": {"limits": {"memory": "1Gi"}}});
        let spec = spec(json!({"containers": [limited], "overhead": {"cpu": "50m", "memory": "1Gi"}}));
        let all = limits(&spec);
        assert_eq!((all.len(), all["memory"].value()), (1, 2 << 30));
    }

    #[test]
    fn limits_hold_until_a_resize_is_done() {
        let pod = |reason: &str| -> Pod {
            serde_json::from_value(json!({
                "spec": {"containers": [{"name": "a", "resources": {"limits": {"cpu": "1"}}}]},
                "status": {"conditions": [{"type": "PodResizePending", "status": "True", "reason": reason}],
                    "containerStatuses": [{"name": "a", "image": "x", "imageID": "x", "ready": true, "restartCount": 0,
                        "resources": {"limits": {"cpu": "600m", "memory": "1Gi"}}}]}}))
            .unwrap()
        };
        let of = |reason: &str| {
            let all = limits_in_force(&pod(reason));
            (all["cpu"].milli_value(), all.contains_key("memory"))
        };
        assert_eq!((of("Deferred"), of("Infeasible")), ((1000, true), (600, true)));
    }

    #[test]
    fn a_pod_asks_as_a_whole_for_what_pods_may_ask_for() {
        for (resources, expected) in [
            (json!({}), false),
            (json!({"requests": {}}), false),
            (json!({"requests": {"ephemeral-storage": "1"}}), false),
            (json!({"limits": {"memory": "1Gi"}}), true),
        ] {
            let spec = spec(json!({"containers": [], "resources": resources}));
            assert_eq!(asks_as_a_whole(&spec), expected, "{resources}");
        }
    }

    #[test]
    fn qos_classes() {
        let limits = json!({"cpu": "1", "memory": "1Gi"});
        let one = |resources: Value| json!({"containers": [{"name": "a", "resources": resources}]});
        let (part, full) = (json!({"name": "a"}), json!({"name": "b", "resources": {"limits": limits}}));
        for (value, class) in [
            (one(json!({})), "BestEffort"),
            (one(json!({"requests": {"cpu": "0"}})), "BestEffort"),
            (one(json!({"limits": {"example.com/gpu": "1"}})), "BestEffort"),
            (one(json!({"requests": {"cpu": "1"}})), "Burstable"),
            (one(json!({"limits": {"cpu": "1"}})), "Burstable"),
            (one(json!({"limits": limits, "requests": {"cpu": "500m"}})), "Burstable"),
            (one(json!({"limits": limits, "requests": {"cpu": "1000m", "memory": "1Gi"}})), "Guaranteed"),
            (json!({"containers": [full, part]}), "Burstable"),
            (json!({"containers": [full], "initContainers": [part]}), "Burstable"),
            (json!({"resources": {"limits": limits}, "containers": [part]}), "Guaranteed"),
            (json!({"resources": {"limits": {"hugepages-2Mi": "2Mi"}}, "containers": [full]}), "BestEffort"),
            (json!({"resources": {"limits": {"example.com/gpu": "1"}}, "containers": [full]}), "Guaranteed"),
        ] {
            assert_eq!((qos_class(&spec(value.clone())), qos_class_of(&value)), (class, class), "{value}");
        }
    }
}
