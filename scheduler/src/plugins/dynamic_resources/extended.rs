//! Extended resources that devices stand for: where a node does not provide what a pod's containers ask for by a resource's
//! name, the devices of the class that has this name do, through a claim that the scheduler makes for the pod. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, ContainerExtendedResourceRequest, PodSpec};
use k8s_openapi::api::resource::v1::{DeviceRequest, ResourceClaim};
use serde_json::json;

use crate::cache::{Claims, EXTENDED_CLAIM, NodeId, PendingPod, Snapshot};
use apimachinery::quantity::Quantity;

/// The resources of a pod that devices may stand for.
#[derive(Debug)]
pub struct Extended {
    /// With their classes.
    resources: BTreeMap<Arc<str>, Arc<str>>,
    /// The claim of an attempt that failed: it must go first.
    pub stale: Option<Arc<str>>,
}

/// The claim to be made, and which of its requests is for which container.
#[derive(Debug)]
pub struct Special {
    pub key: Arc<str>,
    pub claim: Arc<ResourceClaim>,
    pub mappings: Vec<ContainerExtendedResourceRequest>,
}

impl Extended {
    /// `None` if no class stands for anything that the pod asks for. As `preFilterExtendedResources`.
    pub fn of(pod: &PendingPod, claims: &Claims) -> Option<Extended> {
        let asked = pod.facts.requests.extended.iter().filter(|(_, amount)| *amount > 0);
        let resources: BTreeMap<Arc<str>, Arc<str>> =
            asked.filter_map(|(name, _)| Some((name.clone(), claims.class_for(name)?.into()))).collect();
        if resources.is_empty() {
            return None;
        }
        Some(Extended { resources, stale: claims.extended_claim_of(&pod.facts.uid).cloned() })
    }

    pub fn classes(&self) -> impl Iterator<Item = &Arc<str>> {
        self.resources.values()
    }

    /// What is to be claimed on a node; `None` where the node itself provides all. As `filterExtendedResources`.
    pub fn claim_on(&self, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Option<Special> {
        let lacking = self.resources.iter().filter(|(name, _)| snapshot.nodes.allocatable.extended(node, name) == 0);
        let (mut requests, mut mappings) = (Vec::new(), Vec::new());
        for (resource, class) in lacking {
            let (asked, mapped) = requests_for(pod.spec()?, resource, class);
            requests.extend(asked);
            mappings.extend(mapped);
        }
        if requests.is_empty() {
            return None;
        }
        requests.sort_by(|one, other| one.name.cmp(&other.name));
        let key = &pod.facts.key;
        let claim = json!({
            "metadata": {"generateName": format!("{}-extended-resources-", key.name), "namespace": key.namespace,
                "annotations": {EXTENDED_CLAIM: "true"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": key.name, "uid": &*pod.facts.uid, "controller": true}]},
            "spec": {"devices": {"requests": requests}},
        });
        // No claim is called so: until it has a name, it is known by its pod.
        let key = format!("{}/<extended-resources>{}", key.namespace, pod.facts.uid).into();
        Some(Special { key, claim: Arc::new(serde_json::from_value(claim).ok()?), mappings })
    }
}

fn amount_of(container: &Container, resource: &str) -> i64 {
    let requests = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
    requests.and_then(|requests| requests.get(resource)).map_or(0, |amount| Quantity::from(amount).value())
}

/// A container's request for so many devices, called after both their places.
fn request(index: usize, container: &Container, resource: &str, class: &str, count: i64) -> DeviceRequest {
    let asked = container.resources.iter().flat_map(|resources| resources.requests.iter().flatten());
    let place = asked.take_while(|(name, _)| *name != resource).count();
    DeviceRequest {
        name: format!("container-{index}-request-{place}"),
        exactly: Some(k8s_openapi::api::resource::v1::ExactDeviceRequest {
            device_class_name: class.to_owned(),
            allocation_mode: Some("ExactCount".to_owned()),
            count: Some(count),
            ..Default::default()
        }),
        ..DeviceRequest::default()
    }
}

/// The requests of all containers for one resource, and whose they are. Containers that go on running have devices of their
/// own; init containers use those of the containers after them, and what more they need they share. As
/// `createRequestsAndMappings`.
fn requests_for(
    spec: &PodSpec,
    resource: &str,
    class: &str,
) -> (Vec<DeviceRequest>, Vec<ContainerExtendedResourceRequest>) {
    let init = spec.init_containers.as_deref().unwrap_or_default();
    let containers: Vec<&Container> = init.iter().chain(&spec.containers).collect();
    let ends = |index: usize| index < init.len() && containers[index].restart_policy.as_deref() != Some("Always");
    let map = |container: &Container, request: &str| ContainerExtendedResourceRequest {
        container_name: container.name.clone(),
        resource_name: resource.to_owned(),
        request_name: request.to_owned(),
    };
    let asking = || containers.iter().enumerate().map(|(index, one)| (index, *one, amount_of(one, resource)));
    let asking = || asking().filter(|(_, _, amount)| *amount > 0);
    let mut mappings = Vec::new();
    let mut lasting: Vec<(usize, i64, DeviceRequest)> = Vec::new();
    for (index, container, amount) in asking().filter(|(index, ..)| !ends(*index)) {
        let request = request(index, container, resource, class, amount);
        mappings.push(map(container, &request.name));
        lasting.push((index, amount, request));
    }
    // Those for init containers: the largest stands for all.
    let mut brief: Option<(i64, DeviceRequest)> = None;
    let mut sharing = Vec::new();
    for (index, container, amount) in asking().filter(|(index, ..)| ends(*index)) {
        let mut missing = amount;
        for (_, has, request) in lasting.iter().filter(|(other, ..)| *other >= index) {
            if missing > 0 {
                mappings.push(map(container, &request.name));
                missing -= has;
            }
        }
        if missing > 0 {
            sharing.push(container);
            if brief.as_ref().is_none_or(|(most, _)| *most < missing) {
                brief = Some((missing, request(index, container, resource, class, missing)));
            }
        }
    }
    let mut requests: Vec<DeviceRequest> = lasting.into_iter().map(|(.., request)| request).collect();
    if let Some((_, request)) = brief {
        mappings.extend(sharing.iter().map(|container| map(container, &request.name)));
        requests.push(request);
    }
    (requests, mappings)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn init_containers_use_what_the_others_have_and_share_the_rest() {
        let container = |name: &str, amount: u32| json!({"name": name, "resources": {"requests": {"cpu": "1", "example.com/gpu": amount.to_string()}}});
        let sidecar = |name: &str, amount: u32| {
            let mut container = container(name, amount);
            container["restartPolicy"] = json!("Always");
            container
        };
        let cases = [
            (vec![], vec![container("a", 2), container("b", 1)], "0:2 1:1", "a=0 b=1"),
            (vec![container("i", 1)], vec![container("a", 2)], "1:2", "a=1 i=1"),
            // Four of which three are there already; the first needs one more than that.
            (vec![container("i", 4), container("j", 5)], vec![container("a", 3)], "1:2 2:3", "a=2 i=2 j=2 i=1 j=1"),
            // What a sidecar before it has is no init container's.
            (vec![sidecar("s", 2), container("i", 3)], vec![container("a", 1)], "0:2 1:2 2:1", "s=0 a=2 i=2 i=1"),
            (vec![container("i", 2)], vec![json!({"name": "a"})], "0:2", "i=0"),
        ];
        for (init, containers, requests, mappings) in cases {
            let spec: Value = json!({"initContainers": init, "containers": containers});
            let spec: PodSpec = serde_json::from_value(spec).expect("a spec");
            let (mut asked, mapped) = requests_for(&spec, "example.com/gpu", "gpu");
            asked.sort_by(|one, other| one.name.cmp(&other.name));
            let place = |name: &str| {
                name.strip_prefix("container-")
                    .and_then(|name| name.strip_suffix("-request-1"))
                    .unwrap_or(name)
                    .to_owned()
            };
            let count = |request: &DeviceRequest| request.exactly.as_ref().and_then(|one| one.count).unwrap_or(0);
            let asked: Vec<_> = asked.iter().map(|one| format!("{}:{}", place(&one.name), count(one))).collect();
            let mapped: Vec<_> =
                mapped.iter().map(|one| format!("{}={}", one.container_name, place(&one.request_name))).collect();
            assert_eq!((asked.join(" ").as_str(), mapped.join(" ").as_str()), (requests, mappings));
        }
    }
}
