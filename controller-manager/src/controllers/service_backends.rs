//! What the endpoints and endpointslice controllers share: which pods stand behind a Service, and at which ports. Pure.
use apimachinery::{
    labels::Selector,
    meta::NamespacedName,
    pod::{condition, is_sidecar, is_terminal},
    time::rfc3339,
};
use k8s_openapi::{
    api::core::v1::{ObjectReference, Pod, PodIP, Service, ServicePort},
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
    jiff::Timestamp,
};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// When what a write of endpoints follows happened, for those who measure how long it took.
const TRIGGER: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// What was seen of Services and their pods when their endpoints were last looked at: when they came, or became ready or
/// not. Bounded by the Services and pods there are. As `TriggerTimeTracker`.
#[derive(Default)]
pub struct Triggers(Mutex<HashMap<NamespacedName, BTreeMap<String, Timestamp>>>);

impl Triggers {
    pub fn forget(&self, service: &NamespacedName) {
        self.0.lock().remove(service);
    }

    /// The earliest of the changes since the last look.
    pub fn look(&self, key: &NamespacedName, service: &Service, pods: &[Arc<Pod>]) -> Option<Timestamp> {
        let ready = |p: &Pod| condition(p, "Ready").and_then(|c| c.last_transition_time.as_ref()).map(|t| t.0);
        let of_pods = pods.iter().filter_map(|p| Some((format!("pod/{}", p.metadata.name.as_deref()?), ready(p)?)));
        let created = service.metadata.creation_timestamp.as_ref().map(|t| (String::new(), t.0));
        let now: BTreeMap<String, Timestamp> = of_pods.chain(created).collect();
        let mut all = self.0.lock();
        let before = all.insert(key.clone(), now.clone()).unwrap_or_default();
        now.into_iter().filter(|(name, at)| before.get(name).is_none_or(|old| at > old)).map(|(_, at)| at).min()
    }
}

/// Writes down what a write follows, if anything is known of it.
pub fn annotate_trigger(meta: &mut ObjectMeta, trigger: Option<Timestamp>) {
    match trigger {
        Some(at) => drop(meta.annotations.get_or_insert_default().insert(TRIGGER.to_owned(), rfc3339(at))),
        None => drop(meta.annotations.as_mut().and_then(|all| all.remove(TRIGGER))),
    }
}

/// The selector of a Service whose endpoints are ours to make; None if someone else makes them or it has none at all.
pub fn selector(service: &Service) -> Option<Selector> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let labels = spec.selector.as_ref().filter(|l| !l.is_empty())?;
    Some(Selector::from_map(labels))
}

pub fn is_headless(service: &Service) -> bool {
    service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref()) == Some("None")
}

pub fn publishes_not_ready(service: &Service) -> bool {
    service.spec.as_ref().and_then(|s| s.publish_not_ready_addresses).unwrap_or(false)
}

/// The families that the Service has, as `IPv4` and `IPv6`.
pub fn families(service: &Service) -> Vec<String> {
    let given = service.spec.as_ref().and_then(|s| s.ip_families.clone()).unwrap_or_default();
    if given.is_empty() { vec!["IPv4".to_owned()] } else { given }
}

/// As `ShouldPodBeInEndpoints`: it has an address and may still serve.
pub fn may_serve(pod: &Pod, include_terminating: bool) -> bool {
    !is_terminal(pod)
        && !addresses(pod).is_empty()
        && (include_terminating || pod.metadata.deletion_timestamp.is_none())
}

/// All of the pod's addresses, the primary first.
pub fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else { return Vec::new() };
    let listed: Vec<IpAddr> = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect();
    if listed.is_empty() { status.pod_ip.iter().filter_map(|ip| ip.parse().ok()).collect() } else { listed }
}

pub fn is_of_family(address: &IpAddr, family: &str) -> bool {
    match address {
        IpAddr::V4(_) => family == "IPv4",
        IpAddr::V6(_) => family == "IPv6",
    }
}

/// The name under which DNS knows the pod within the Service. As `ShouldSetHostname`.
pub fn hostname(pod: &Pod, service: &Service) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let hostname = spec.hostname.clone().filter(|h| !h.is_empty())?;
    let here = pod.metadata.namespace == service.metadata.namespace;
    (here && spec.subdomain.is_some() && spec.subdomain == service.metadata.name).then_some(hostname)
}

pub fn reference_to(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".to_owned()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        ..ObjectReference::default()
    }
}

pub fn node_name(pod: &Pod) -> Option<String> {
    pod.spec.as_ref().and_then(|s| s.node_name.clone()).filter(|n| !n.is_empty())
}

/// The pod's port behind a Service's; None if the pod has no port of that name. As `FindPort`.
pub fn target_port(pod: &Pod, port: &ServicePort) -> Option<i32> {
    match &port.target_port {
        None | Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => {
            let protocol = |p: Option<&str>| p.unwrap_or("TCP").to_owned();
            let spec = pod.spec.as_ref()?;
            let sidecars = spec.init_containers.iter().flatten().filter(|c| is_sidecar(c));
            let ports = spec.containers.iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten());
            let mut named = ports.filter(|p| p.name.as_deref() == Some(name));
            named
                .find(|p| protocol(p.protocol.as_deref()) == protocol(port.protocol.as_deref()))
                .map(|p| p.container_port)
        }
    }
}

/// Whether a change of a pod may change the endpoints of Services that select it. As `endpointChanged`.
pub fn matters(old: &Pod, new: &Pod) -> bool {
    use apimachinery::pod::is_ready;
    type Field<'a> = Option<&'a String>;
    fn shape(pod: &Pod) -> Option<(Field<'_>, Field<'_>, Field<'_>)> {
        pod.spec.as_ref().map(|s| (s.node_name.as_ref(), s.hostname.as_ref(), s.subdomain.as_ref()))
    }
    fn addresses(pod: &Pod) -> Option<(Field<'_>, Option<&Vec<PodIP>>)> {
        pod.status.as_ref().map(|s| (s.pod_ip.as_ref(), s.pod_ips.as_ref()))
    }
    old.metadata.labels != new.metadata.labels
        || old.metadata.deletion_timestamp.is_some() != new.metadata.deletion_timestamp.is_some()
        || is_ready(old) != is_ready(new)
        || is_terminal(old) != is_terminal(new)
        || addresses(old) != addresses(new)
        || shape(old) != shape(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_write_says_which_change_it_follows() {
        let service: Service =
            serde_json::from_value(json!({"metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}})).unwrap();
        let pod = |name: &str, ready: &str| -> Arc<Pod> {
            let condition = json!({"type": "Ready", "status": "True", "lastTransitionTime": ready});
            let pod = json!({"metadata": {"name": name}, "status": {"conditions": [condition]}});
            Arc::new(serde_json::from_value(pod).unwrap())
        };
        let (triggers, key) = (Triggers::default(), NamespacedName::new("ns", "web"));
        let mut meta = ObjectMeta::default();
        for (pods, expected) in [
            (vec![], Some("2026-01-01T00:00:00Z")),
            (vec![], None),
            (vec![pod("a", "2026-01-01T00:00:07Z"), pod("b", "2026-01-01T00:00:05Z")], Some("2026-01-01T00:00:05Z")),
            (vec![pod("a", "2026-01-01T00:00:07Z"), pod("b", "2026-01-01T00:00:09Z")], Some("2026-01-01T00:00:09Z")),
            (vec![pod("b", "2026-01-01T00:00:09Z")], None),
        ] {
            annotate_trigger(&mut meta, triggers.look(&key, &service, &pods));
            let told = meta.annotations.as_ref().and_then(|all| all.get(TRIGGER)).map(String::as_str);
            assert_eq!(told, expected, "{pods:?}");
        }
    }

    #[test]
    fn ports_are_found_by_number_and_by_name() {
        let pod: Pod = serde_json::from_value(json!({"spec": {
            "initContainers": [{"name": "s", "restartPolicy": "Always", "ports": [{"name": "side", "containerPort": 9}]}],
            "containers": [{"name": "c", "ports": [
                {"name": "web", "containerPort": 8080}, {"name": "dns", "containerPort": 53, "protocol": "UDP"}]}]}}))
        .unwrap();
        for (port, expected) in [
            (json!({"port": 80}), Some(80)),
            (json!({"port": 80, "targetPort": 81}), Some(81)),
            (json!({"port": 80, "targetPort": "web"}), Some(8080)),
            (json!({"port": 80, "targetPort": "side"}), Some(9)),
            (json!({"port": 80, "targetPort": "dns"}), None),
            (json!({"port": 80, "targetPort": "dns", "protocol": "UDP"}), Some(53)),
            (json!({"port": 80, "targetPort": "none"}), None),
        ] {
            let port: ServicePort = serde_json::from_value(port).unwrap();
            assert_eq!(target_port(&pod, &port), expected, "{port:?}");
        }
    }
}
