//! What containers hold of the node for themselves: processors, memory of nodes, devices. Plain data, kept in a file, and what is
//! chosen from it. Pure.

use std::collections::{BTreeMap, BTreeSet};

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use serde::{Deserialize, Serialize};

use crate::runtime::pods::{init_containers, is_sidecar};

/// What one container holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Held {
    pub cpus: BTreeSet<u32>,
    /// Bytes by node and kind.
    pub memory: BTreeMap<u32, BTreeMap<String, u64>>,
    /// By resource.
    pub devices: BTreeMap<String, HeldDevices>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HeldDevices {
    pub ids: BTreeSet<String>,
    /// The plugin's answer, as it came.
    pub answer: Vec<u8>,
}

/// What all containers hold: by pod and container.
pub type All = BTreeMap<String, BTreeMap<String, Held>>;

/// What containers of one pod that have ended before leave to those that come after them.
#[derive(Debug, Clone, Default)]
pub struct Left {
    pub cpus: BTreeSet<u32>,
    pub memory: BTreeMap<u32, BTreeMap<String, u64>>,
    pub devices: BTreeMap<String, BTreeSet<String>>,
}

impl Left {
    pub fn add(&mut self, held: &Held) {
        self.cpus.extend(&held.cpus);
        for (node, amounts) in &held.memory {
            let have = self.memory.entry(*node).or_default();
            for (kind, bytes) in amounts {
                let have = have.entry(kind.clone()).or_default();
                *have = (*have).max(*bytes);
            }
        }
        for (resource, devices) in &held.devices {
            self.devices.entry(resource.clone()).or_default().extend(devices.ids.iter().cloned());
        }
    }

    pub fn remove(&mut self, held: &Held) {
        self.cpus.retain(|cpu| !held.cpus.contains(cpu));
        self.memory.clear();
        for (resource, devices) in &held.devices {
            if let Some(left) = self.devices.get_mut(resource) {
                left.retain(|id| !devices.ids.contains(id));
            }
        }
    }
}

/// A pod's containers in the order in which they are served, and whether what each holds is left when it has ended.
pub fn containers(pod: &Pod) -> Vec<(&Container, bool)> {
    let Some(spec) = pod.spec.as_ref() else { return Vec::new() };
    let init = init_containers(spec).iter().map(|c| (c, !is_sidecar(c)));
    init.chain(spec.containers.iter().map(|c| (c, false))).collect()
}

/// What a pod asks for as a whole is its containers' together, so none of them has a part for itself.
fn is_guaranteed(pod: &Pod) -> bool {
    let guaranteed = |spec: &PodSpec| {
        apimachinery::pod::qos_class(spec) == "Guaranteed" && !apimachinery::pod::asks_as_a_whole(spec)
    };
    pod.spec.as_ref().is_some_and(guaranteed)
}

fn amount(container: &Container, resource: &str) -> Option<Quantity> {
    let resources = container.resources.as_ref()?;
    let found = resources.requests.as_ref().and_then(|m| m.get(resource));
    found.or_else(|| resources.limits.as_ref().and_then(|m| m.get(resource))).map(Quantity::from)
}

/// How many processors a container has for itself: whole ones of guaranteed pods. As `guaranteedCPUs`.
pub fn exclusive_cpus(pod: &Pod, container: &Container) -> usize {
    let milli = amount(container, "cpu").map_or(0, |q| q.milli_value());
    if !is_guaranteed(pod) || milli % 1000 != 0 { 0 } else { usize::try_from(milli / 1000).unwrap_or(0) }
}

/// Memory and huge pages of a container of a guaranteed pod, by kind.
pub fn exclusive_memory(pod: &Pod, container: &Container) -> BTreeMap<String, u64> {
    if !is_guaranteed(pod) {
        return BTreeMap::new();
    }
    let requests = container.resources.as_ref().and_then(|r| r.requests.as_ref().or(r.limits.as_ref()));
    requests
        .into_iter()
        .flatten()
        .filter(|(name, _)| *name == "memory" || name.starts_with("hugepages-"))
        .map(|(name, q)| (name.clone(), u64::try_from(Quantity::from(q).value()).unwrap_or(0)))
        .filter(|(_, bytes)| *bytes > 0)
        .collect()
}

/// How many devices of each of these resources a container asks for. What stands for a claim's devices is none of them.
pub fn devices(pod: &Pod, container: &Container, known: impl Fn(&str) -> bool) -> BTreeMap<String, usize> {
    let limits = container.resources.as_ref().and_then(|r| r.limits.as_ref());
    let claimed = pod.status.iter().filter_map(|s| s.extended_resource_claim_status.as_ref());
    let claimed: Vec<_> = claimed.flat_map(|c| &c.request_mappings).collect();
    let is_claimed = |name: &str| claimed.iter().any(|m| m.container_name == container.name && m.resource_name == name);
    let wanted = limits.into_iter().flatten().filter(|(name, _)| known(name) && !is_claimed(name));
    let wanted = wanted.map(|(name, q)| (name.clone(), usize::try_from(Quantity::from(q).value()).unwrap_or(0)));
    wanted.filter(|(_, count)| *count > 0).collect()
}

/// The processors that somebody has for himself.
pub fn taken_cpus(all: &All) -> BTreeSet<u32> {
    all.values().flat_map(BTreeMap::values).flat_map(|held| held.cpus.iter().copied()).collect()
}

/// Bytes of a kind that are held on a node. Containers of one pod that follow each other share.
pub fn taken_memory(all: &All, node: u32, kind: &str) -> u64 {
    let held = all.values().flat_map(BTreeMap::values);
    held.filter_map(|h| h.memory.get(&node)?.get(kind)).sum()
}

/// The devices of a resource that somebody has.
pub fn taken_devices<'a>(all: &'a All, resource: &str) -> BTreeSet<&'a str> {
    let held = all.values().flat_map(BTreeMap::values).filter_map(|held| held.devices.get(resource));
    held.flat_map(|devices| devices.ids.iter().map(String::as_str)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_whole_processors_of_guaranteed_pods_are_exclusive() {
        let of = |resources: serde_json::Value| {
            let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"},
                "spec": {"containers": [{"name": "c", "resources": resources}]}}))
            .unwrap();
            let container = pod.spec.as_ref().unwrap().containers[0].clone();
            (exclusive_cpus(&pod, &container), exclusive_memory(&pod, &container).get("memory").copied())
        };
        let both =
            |cpu: &str| json!({"limits": {"cpu": cpu, "memory": "1Mi"}, "requests": {"cpu": cpu, "memory": "1Mi"}});
        assert_eq!(of(both("2")), (2, Some(1 << 20)));
        assert_eq!(of(both("2000m")), (2, Some(1 << 20)));
        assert_eq!(of(both("1500m")), (0, Some(1 << 20)));
        assert_eq!(of(json!({"requests": {"cpu": "2"}})), (0, None));
        let mut shared: Pod = serde_json::from_value(json!({"metadata": {"name": "p"},
            "spec": {"resources": both("2"), "containers": [{"name": "c", "resources": both("2")}]}}))
        .unwrap();
        let spec = shared.spec.as_mut().unwrap();
        let container = spec.containers[0].clone();
        assert_eq!((exclusive_cpus(&shared, &container), exclusive_memory(&shared, &container).len()), (0, 0));
    }

    #[test]
    fn what_init_containers_held_is_left_to_the_next() {
        let held = |ids: &[&str]| Held {
            cpus: BTreeSet::from([1, 2]),
            devices: [(
                "x/y".to_owned(),
                HeldDevices { ids: ids.iter().map(|i| (*i).to_owned()).collect(), ..Default::default() },
            )]
            .into(),
            ..Default::default()
        };
        let mut left = Left::default();
        left.add(&held(&["a", "b"]));
        left.remove(&Held { cpus: BTreeSet::from([2]), ..held(&["a"]) });
        assert_eq!(left.cpus, BTreeSet::from([1]));
        assert_eq!(left.devices["x/y"], BTreeSet::from(["b".to_owned()]));
    }
}
