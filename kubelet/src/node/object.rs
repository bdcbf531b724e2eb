//! The Node object: made from what is known of the machine and the runtime. Pure.

use std::collections::BTreeMap;

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeFeatures,
    NodeRuntimeHandler, NodeRuntimeHandlerFeatures, NodeSpec, NodeStatus, NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::ObjectMeta;
use proto::cri as pb;
use serde_json::{Value, json};

use super::machine;
use crate::config::KubeletConfiguration;
use crate::eviction::Pressure;
use crate::runtime::cri::CriError;

/// Images listed in the status, and names of each.
const MAX_IMAGE_NAMES: usize = 5;

/// What is known of the node when the kubelet starts.
#[derive(Debug, Clone)]
pub struct Facts {
    pub name: String,
    pub hostname: String,
    pub addresses: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub capacity: BTreeMap<String, Quantity>,
    pub allocatable: BTreeMap<String, Quantity>,
    pub info: NodeSystemInfo,
    pub runtime_handlers: Vec<pb::RuntimeHandler>,
    pub strict_groups: bool,
    pub provider_id: Option<String>,
    pub external_cloud: bool,
}

/// The labels that a kubelet gives its node, and those asked for.
pub fn labels(name: &str, given: &[String]) -> BTreeMap<String, String> {
    let arch = machine::architecture();
    let mut labels: BTreeMap<String, String> = [
        ("kubernetes.io/hostname", name),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", arch),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", arch),
    ]
    .into_iter()
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .collect();
    for pair in given {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        labels.insert(key.trim().to_owned(), value.trim().to_owned());
    }
    labels
}

pub(super) fn new_node(facts: &Facts, config: &KubeletConfiguration) -> Node {
    let mut taints = config.register_with_taints.clone();
    if facts.external_cloud {
        taints.push(k8s_openapi::api::core::v1::Taint {
            key: "node.cloudprovider.kubernetes.io/uninitialized".to_owned(),
            value: Some("true".to_owned()),
            effect: "NoSchedule".to_owned(),
            time_added: None,
        });
    }
    Node {
        metadata: ObjectMeta {
            name: Some(facts.name.clone()),
            labels: Some(facts.labels.clone()),
            annotations: Some(
                [("volumes.kubernetes.io/controller-managed-attach-detach".to_owned(), "true".to_owned())].into(),
            ),
            ..Default::default()
        },
        spec: Some(NodeSpec {
            taints: Some(taints).filter(|t| !t.is_empty()),
            provider_id: facts.provider_id.clone(),
            ..Default::default()
        }),
        status: None,
    }
}

/// What the existing node lacks of the kubelet's own labels.
pub(super) fn label_patch(existing: &Node, wanted: &Node) -> Option<Value> {
    let have = existing.metadata.labels.clone().unwrap_or_default();
    let wanted = wanted.metadata.labels.clone().unwrap_or_default();
    let missing: BTreeMap<_, _> = wanted.into_iter().filter(|(k, v)| have.get(k) != Some(v)).collect();
    if missing.is_empty() { None } else { Some(json!({"metadata": {"labels": missing}})) }
}

/// Why the node cannot run pods, if so.
pub(super) fn not_ready(runtime: &Result<pb::StatusResponse, CriError>, pleg: Option<String>) -> Option<String> {
    let mut reasons = Vec::new();
    match runtime {
        Ok(answer) => {
            for condition in answer.status.iter().flat_map(|s| &s.conditions) {
                let what = match condition.r#type.as_str() {
                    "RuntimeReady" => "container runtime not ready",
                    "NetworkReady" => "container runtime network not ready",
                    _ => continue,
                };
                if !condition.status {
                    reasons.push(format!(
                        "{what}: {}=false reason:{} message:{}",
                        condition.r#type, condition.reason, condition.message
                    ));
                }
            }
        }
        Err(error) => reasons.push(format!("container runtime is down: {error}")),
    }
    reasons.extend(pleg);
    match reasons.len() {
        0 => None,
        1 => reasons.pop(),
        // As several errors are put together.
        _ => Some(format!("[{}]", reasons.join(", "))),
    }
}

/// What is told of a status that takes the place of an older one: the reasons of events. As `setNodeStatus`.
pub(super) fn news(old: Option<&NodeStatus>, new: &NodeStatus) -> Vec<&'static str> {
    let state = |status: &NodeStatus, kind: &str| {
        status.conditions.iter().flatten().find(|c| c.type_ == kind).map(|c| c.status.clone())
    };
    let told = [
        ("MemoryPressure", "NodeHasInsufficientMemory", "NodeHasSufficientMemory"),
        ("DiskPressure", "NodeHasDiskPressure", "NodeHasNoDiskPressure"),
        ("PIDPressure", "NodeHasInsufficientPID", "NodeHasSufficientPID"),
        ("Ready", "NodeReady", "NodeNotReady"),
    ];
    let changes = told.into_iter().filter_map(|(kind, if_true, if_false)| {
        let (before, now) = (old.and_then(|old| state(old, kind)), state(new, kind)?);
        // A node that is new is not told to be not ready: it never was.
        let changed = before.as_ref().map_or(kind != "Ready", |before| *before != now);
        changed.then_some(if now == "True" { if_true } else { if_false })
    });
    changes.collect()
}

/// Whether the machine was started anew between two statuses.
pub(super) fn rebooted(old: Option<&NodeStatus>, new: &NodeStatus) -> bool {
    let boot = |status: &NodeStatus| status.node_info.as_ref().map(|i| i.boot_id.clone()).filter(|id| !id.is_empty());
    old.and_then(boot).zip(boot(new)).is_some_and(|(before, now)| before != now)
}

pub(super) fn is_ready(status: &NodeStatus) -> bool {
    status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

pub(super) fn status(
    facts: &Facts,
    config: &KubeletConfiguration,
    old: Option<&Node>,
    images: Vec<pb::Image>,
    not_ready: Option<String>,
    pressure: Pressure,
    now: Time,
) -> NodeStatus {
    let old = old.and_then(|n| n.status.as_ref());
    let mut addresses: Vec<NodeAddress> =
        facts.addresses.iter().map(|a| NodeAddress { type_: "InternalIP".to_owned(), address: a.clone() }).collect();
    addresses.push(NodeAddress { type_: "Hostname".to_owned(), address: facts.hostname.clone() });
    let quantities = |map: &BTreeMap<String, Quantity>| map.iter().map(|(k, q)| (k.clone(), q.to_api())).collect();
    NodeStatus {
        addresses: Some(addresses),
        capacity: Some(quantities(&facts.capacity)),
        allocatable: Some(quantities(&facts.allocatable)),
        node_info: Some(facts.info.clone()),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(config.port) }),
        }),
        images: Some(image_list(images, usize::try_from(config.node_status_max_images).unwrap_or(usize::MAX))),
        conditions: Some(conditions(old, not_ready, pressure, &now)),
        features: Some(NodeFeatures { supplemental_groups_policy: Some(facts.strict_groups) }),
        runtime_handlers: Some(
            facts
                .runtime_handlers
                .iter()
                .map(|h| NodeRuntimeHandler {
                    name: Some(h.name.clone()),
                    features: h.features.as_ref().map(|f| NodeRuntimeHandlerFeatures {
                        recursive_read_only_mounts: Some(f.recursive_read_only_mounts),
                        user_namespaces: Some(f.user_namespaces),
                    }),
                })
                .collect::<Vec<_>>(),
        )
        .filter(|l| !l.is_empty()),
        declared_features: Some(vec!["RestartAllContainersOnContainerExits".to_owned()]),
        ..Default::default()
    }
}

fn conditions(
    old: Option<&NodeStatus>,
    not_ready: Option<String>,
    pressure: Pressure,
    now: &Time,
) -> Vec<NodeCondition> {
    let ready = match not_ready {
        None => ("Ready", "True", "KubeletReady", "kubelet is posting ready status".to_owned()),
        Some(why) => ("Ready", "False", "KubeletNotReady", why),
    };
    let short = |kind, is_short: bool, short: (&'static str, &str), fine: (&'static str, &str)| {
        let (status, (reason, message)) = if is_short { ("True", short) } else { ("False", fine) };
        (kind, status, reason, message.to_owned())
    };
    [
        short(
            "MemoryPressure",
            pressure.memory,
            ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
            ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        ),
        short(
            "DiskPressure",
            pressure.disk,
            ("KubeletHasDiskPressure", "kubelet has disk pressure"),
            ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ),
        short(
            "PIDPressure",
            pressure.pids,
            ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
            ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ),
        ready,
    ]
    .into_iter()
    .map(|(kind, status, reason, message)| {
        let before = old.and_then(|s| s.conditions.as_ref()).and_then(|c| c.iter().find(|c| c.type_ == kind));
        let since = before.filter(|b| b.status == status).and_then(|b| b.last_transition_time.clone());
        NodeCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message),
            last_heartbeat_time: Some(now.clone()),
            last_transition_time: Some(since.unwrap_or_else(|| now.clone())),
        }
    })
    .collect()
}

/// The largest images, with the names by which they are known.
fn image_list(mut images: Vec<pb::Image>, most: usize) -> Vec<ContainerImage> {
    images.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.id.cmp(&b.id)));
    images
        .into_iter()
        .take(most)
        .map(|image| {
            let names = image.repo_digests.into_iter().chain(image.repo_tags).take(MAX_IMAGE_NAMES).collect();
            ContainerImage { names: Some(names), size_bytes: i64::try_from(image.size).ok() }
        })
        .collect()
}

/// Whether anything but heartbeats changed.
pub(super) fn differs(old: Option<&NodeStatus>, new: &NodeStatus) -> bool {
    let Some(old) = old else { return true };
    let bare = |status: &NodeStatus| {
        let mut status = status.clone();
        for condition in status.conditions.iter_mut().flatten() {
            condition.last_heartbeat_time = None;
            condition.last_transition_time = None;
        }
        status
    };
    let (old, new) = (bare(old), bare(new));
    let own = |status: &NodeStatus| -> Vec<NodeCondition> {
        let ours = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"];
        let mut list: Vec<_> =
            status.conditions.iter().flatten().filter(|c| ours.contains(&c.type_.as_str())).cloned().collect();
        list.sort_by(|a, b| a.type_.cmp(&b.type_));
        list
    };
    own(&old) != own(&new)
        || old.addresses != new.addresses
        || old.capacity != new.capacity
        || old.allocatable != new.allocatable
        || old.node_info != new.node_info
        || old.images.unwrap_or_default() != new.images.unwrap_or_default()
        || old.daemon_endpoints != new.daemon_endpoints
        || old.volumes_in_use.unwrap_or_default() != new.volumes_in_use.unwrap_or_default()
}

/// Our fields of the status; conditions and addresses are merged by type by the API.
pub(super) fn status_patch(status: &NodeStatus) -> Value {
    json!({"status": status})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(network: bool) -> Result<pb::StatusResponse, CriError> {
        let condition = |kind: &str, status| pb::RuntimeCondition {
            r#type: kind.to_owned(),
            status,
            reason: "R".to_owned(),
            message: "m".to_owned(),
        };
        let conditions = vec![condition("RuntimeReady", true), condition("NetworkReady", network)];
        Ok(pb::StatusResponse { status: Some(pb::RuntimeStatus { conditions }), ..Default::default() })
    }

    #[test]
    fn readiness_names_what_is_missing() {
        assert_eq!(not_ready(&answer(true), None), None);
        assert_eq!(
            not_ready(&answer(false), None).as_deref(),
            Some("container runtime network not ready: NetworkReady=false reason:R message:m")
        );
        assert_eq!(not_ready(&answer(true), Some("PLEG".into())).as_deref(), Some("PLEG"));
        assert_eq!(
            not_ready(&answer(false), Some("PLEG".into())).as_deref(),
            Some("[container runtime network not ready: NetworkReady=false reason:R message:m, PLEG]")
        );
    }

    #[test]
    fn heartbeats_alone_are_no_difference() {
        let at = |s| Time(jiff::Timestamp::from_second(s).unwrap());
        let make = |old: Option<&NodeStatus>, not_ready: Option<&str>, s| NodeStatus {
            conditions: Some(conditions(old, not_ready.map(str::to_owned), Pressure::default(), &at(s))),
            ..Default::default()
        };
        let first = make(None, None, 1);
        assert!(!differs(Some(&first), &make(Some(&first), None, 2)));
        assert!(differs(Some(&first), &make(Some(&first), Some("down"), 2)));
    }

    #[test]
    fn changes_of_conditions_are_told() {
        let at = Time(jiff::Timestamp::from_second(1).unwrap());
        let make = |ready: bool, memory: bool, boot: &str| NodeStatus {
            conditions: Some(conditions(
                None,
                (!ready).then(|| "down".to_owned()),
                Pressure { memory, ..Default::default() },
                &at,
            )),
            node_info: Some(NodeSystemInfo { boot_id: boot.to_owned(), ..Default::default() }),
            ..Default::default()
        };
        let fine = make(true, false, "a");
        let all = ["NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID"];
        assert_eq!(news(None, &fine), all);
        assert_eq!(news(Some(&fine), &make(false, true, "a")), ["NodeHasInsufficientMemory", "NodeNotReady"]);
        assert_eq!(news(Some(&make(false, false, "a")), &fine), ["NodeReady"]);
        assert!(news(Some(&fine), &fine).is_empty());
        assert!(
            rebooted(Some(&fine), &make(true, false, "b")) && !rebooted(Some(&fine), &fine) && !rebooted(None, &fine)
        );
    }

    #[test]
    fn nodes_are_labelled() {
        let labels = labels("n1", &["a=b".to_owned()]);
        assert_eq!(labels["kubernetes.io/hostname"], "n1");
        assert_eq!(labels["a"], "b");
    }
}
