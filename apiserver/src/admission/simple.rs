//! Plugins of a few lines: when they are asked, and what they do to an object or hold against it.
use apimachinery::status::{FieldError, StatusError};
use futures::future::BoxFuture;
use serde_json::{Value, json};

use super::{AdmissionRequest, Operation, Parts, Plugin, entry, list, list_in, object_in, text};
use crate::authorization::lister::{NAMESPACES, NODES};
use crate::authorization::{Attributes, Decision};
use apimachinery::meta::split_api_version;

type Step = fn(&Parts, &mut AdmissionRequest<'_>) -> Result<(), StatusError>;

/// The parts of such a plugin.
#[derive(Clone, Copy)]
pub struct Simple {
    handles: fn(&AdmissionRequest<'_>) -> bool,
    mutate: Step,
    validate: Step,
}

/// One with what it reads.
struct Equipped(Simple, Parts);

const NOTHING: Step = |_, _| Ok(());
const POD: fn(&AdmissionRequest<'_>) -> bool = |request| request.writes() && request.is("", "pods", "");
const DEVICE_ADMIN_LABEL: &str = "resource.kubernetes.io/admin-access";
const HOSTNAME: &str = "kubernetes.io/hostname";
const NODE_SELECTOR: &str = "scheduler.alpha.kubernetes.io/node-selector";
/// What a pod learns of where its node stands.
const TOPOLOGY_LABELS: [&str; 2] = ["topology.kubernetes.io/region", "topology.kubernetes.io/zone"];

pub const ALWAYS_ADMIT: Simple = Simple { handles: |_| false, mutate: NOTHING, validate: NOTHING };

pub const ALWAYS_DENY: Simple = Simple {
    handles: |_| true,
    mutate: |_, request| Err(request.forbidden("admission control is denying all modifications")),
    validate: NOTHING,
};

/// A node's copy of an image is no permission to use it.
pub const ALWAYS_PULL_IMAGES: Simple = Simple {
    handles: |request| {
        request.writes() && (request.is("", "pods", "") || request.is("", "pods", "ephemeralcontainers"))
    },
    mutate: |_, request| {
        let known: Vec<String> = images(request.old());
        let unchanged = request.updates() && images(request.new_object()).iter().all(|image| known.contains(image));
        if let Some(pod) = request.object.as_deref_mut().filter(|_| !unchanged) {
            for member in ["containers", "initContainers", "ephemeralContainers"] {
                for container in entry(pod, "spec").get_mut(member).and_then(Value::as_array_mut).into_iter().flatten()
                {
                    container["imagePullPolicy"] = json!("Always");
                }
            }
            let volumes = entry(pod, "spec").get_mut("volumes").and_then(Value::as_array_mut).into_iter().flatten();
            for image in volumes
                .filter_map(|volume| volume.get_mut("image"))
                .filter(|image| !text(image, "/reference").is_empty())
            {
                image["pullPolicy"] = json!("Always");
            }
        }
        Ok(())
    },
    validate: NOTHING,
};

/// Pods do not choose domains greater than a node to be alone in.
pub const LIMIT_ANTI_AFFINITY: Simple = Simple {
    handles: |request| request.creates() && request.is("", "pods", ""),
    mutate: NOTHING,
    validate: |_, request| {
        let terms = "/spec/affinity/podAntiAffinity/requiredDuringSchedulingIgnoredDuringExecution";
        let wide = list(request.new_object(), terms)
            .iter()
            .map(|term| text(term, "/topologyKey"))
            .find(|key| *key != HOSTNAME);
        wide.map_or(Ok(()), |key| {
            Err(request.forbidden(format!(
                "affinity.PodAntiAffinity.RequiredDuringScheduling has TopologyKey {key} but only key {HOSTNAME} is allowed"
            )))
        })
    },
};

/// Pods that ask for a device may run on the nodes that are kept for it.
pub const EXTENDED_RESOURCE_TOLERATION: Simple = Simple {
    handles: POD,
    mutate: |_, request| {
        let Some(pod) = request.object.as_deref_mut() else { return Ok(()) };
        let containers = ["/spec/containers", "/spec/initContainers"].into_iter().flat_map(|member| list(pod, member));
        let asked = containers.filter_map(|container| container.pointer("/resources/requests")?.as_object());
        let extended = |name: &&String| name.contains('/') && !name.contains("kubernetes.io/");
        let mut devices: Vec<String> = asked.flat_map(|requests| requests.keys()).filter(extended).cloned().collect();
        devices.sort();
        devices.dedup();
        for device in devices {
            let toleration = json!({"key": device, "operator": "Exists", "effect": "NoSchedule"});
            let tolerations = list_in(entry(pod, "spec"), "tolerations");
            if !tolerations.contains(&toleration) {
                tolerations.push(toleration);
            }
        }
        Ok(())
    },
    validate: NOTHING,
};

/// External IPs of Services let their author take others' traffic (CVE-2020-8554).
pub const DENY_EXTERNAL_IPS: Simple = Simple {
    handles: |request| request.writes() && request.is("", "services", ""),
    mutate: NOTHING,
    validate: |_, request| {
        let before = list(request.old(), "/spec/externalIPs");
        if list(request.new_object(), "/spec/externalIPs").iter().all(|ip| before.contains(ip)) {
            return Ok(());
        }
        Err(request.forbidden("Use of external IPs is denied by admission control."))
    },
};

pub const NAMESPACE_EXISTS: Simple = Simple {
    handles: |request| !request.namespace().is_empty() && request.attributes.resource != "namespaces",
    mutate: NOTHING,
    validate: |parts, request| match parts.lister.get(NAMESPACES, "", request.namespace()) {
        Some(_) => Ok(()),
        None => Err(StatusError::not_found("", "namespaces", request.namespace())),
    },
};

/// A namespace may say on which nodes its pods run.
pub const POD_NODE_SELECTOR: Simple = Simple {
    handles: |request| request.creates() && request.is("", "pods", ""),
    mutate: |parts, request| {
        let namespace = parts.lister.get(NAMESPACES, "", request.namespace());
        let namespace = namespace.map(|namespace| namespace.value()).unwrap_or_default();
        let selector = namespace.pointer("/metadata/annotations").and_then(|a| a.get(NODE_SELECTOR));
        let pairs =
            selector.and_then(Value::as_str).unwrap_or_default().split(',').filter_map(|pair| pair.split_once('='));
        let Some(pod) = request.object.as_deref_mut() else { return Ok(()) };
        let of_pod = object_in(entry(pod, "spec"), "nodeSelector");
        let mut conflict = false;
        for (key, value) in pairs {
            let (key, value) = (key.trim(), value.trim());
            conflict |= of_pod.get(key).is_some_and(|other| other != value);
            of_pod.insert(key.to_owned(), value.into());
        }
        let why = "pod node label selector conflicts with its namespace node label selector";
        if conflict { Err(request.forbidden(why)) } else { Ok(()) }
    },
    validate: NOTHING,
};

/// A pod that goes to a node is labelled with the node's zone and region.
pub const POD_TOPOLOGY_LABELS: Simple = Simple {
    handles: |request| request.creates() && (request.is("", "pods", "") || request.is("", "pods", "binding")),
    mutate: |parts, request| {
        let object = request.new_object();
        let node = match request.attributes.subresource.as_str() {
            "" => text(object, "/spec/nodeName"),
            _ if matches!(text(object, "/target/kind"), "" | "Node") => text(object, "/target/name"),
            _ => "",
        };
        if node.is_empty() {
            return Ok(());
        }
        let Some(node) = parts.lister.get(NODES, "", node) else { return Ok(()) };
        for key in TOPOLOGY_LABELS {
            if let (Some(value), Some(object)) = (node.identity.label(key), request.object.as_deref_mut()) {
                object_in(entry(object, "metadata"), "labels").insert(key.to_owned(), value.into());
            }
        }
        Ok(())
    },
    validate: NOTHING,
};

/// Who makes an object go with its owner must be allowed to delete it; who makes an owner wait, to hold it back.
pub const OWNER_REFERENCES: Simple = Simple {
    handles: |request| {
        let references = |object: &Value| object.pointer("/metadata/ownerReferences").cloned();
        request.writes() && references(request.new_object()).is_some_and(|new| Some(new) != references(request.old()))
    },
    mutate: NOTHING,
    validate: |parts, request| {
        let may = |attributes: &Attributes| match parts.authorizer.explain(attributes) {
            (Decision::Allow, _) => Ok(()),
            (Decision::NoOpinion(why), _) => Err(why),
        };
        if request.operation == Operation::Update {
            let delete =
                Attributes { verb: "delete".to_owned(), subresource: String::new(), ..request.attributes.clone() };
            may(&delete).map_err(|why| {
                request.forbidden(format!("cannot set an ownerRef on a resource you can't delete: {why}, <nil>"))
            })?;
        }
        let before = list(request.old(), "/metadata/ownerReferences");
        for owner in list(request.new_object(), "/metadata/ownerReferences") {
            if owner["blockOwnerDeletion"] != true || before.contains(owner) {
                continue;
            }
            let (group, version) = split_api_version(text(owner, "/apiVersion"));
            let Some(kind) = apimachinery::facts::kinds()
                .iter()
                .find(|facts| facts.group == group && facts.kind == text(owner, "/kind"))
            else {
                continue;
            };
            let finalizers = Attributes {
                verb: "update".to_owned(),
                group: group.to_owned(),
                version: version.to_owned(),
                resource: kind.resource.to_owned(),
                subresource: "finalizers".to_owned(),
                namespace: if kind.namespaced { request.namespace().to_owned() } else { String::new() },
                name: text(owner, "/name").to_owned(),
                ..request.attributes.clone()
            };
            may(&finalizers).map_err(|why| {
                request.forbidden(format!(
                    "cannot set blockOwnerDeletion if an ownerReference refers to a resource you can't set finalizers on: {why}, <nil>"
                ))
            })?;
        }
        Ok(())
    },
};

/// Devices are used with an administrator's access only where the namespace is marked for it. In Kubernetes the strategies see
/// to it: `AuthorizedForAdmin`.
pub const DEVICE_ADMIN: Simple = Simple {
    handles: |request| {
        let a = request.attributes;
        a.group == "resource.k8s.io"
            && match (a.resource.as_str(), a.subresource.as_str()) {
                ("resourceclaims" | "resourceclaimtemplates", "") => request.creates(),
                ("resourceclaims", "status") => request.updates(),
                _ => false,
            }
    },
    mutate: NOTHING,
    validate: |parts, request| {
        let a = request.attributes;
        let (place, flag, shown) = match (a.resource.as_str(), a.subresource.as_str()) {
            (_, "status") => {
                ("/status/allocation/devices/results", "/adminAccess", "status.allocation.devices.results")
            }
            ("resourceclaims", _) => ("/spec/devices/requests", "/exactly/adminAccess", "spec.devices.requests"),
            _ => ("/spec/spec/devices/requests", "/exactly/adminAccess", "spec.devices.requests"),
        };
        let asks = |object: &Value| {
            list(object, place).iter().position(|item| item.pointer(flag).is_some_and(|asked| *asked == true))
        };
        let Some(at) = asks(request.new_object()).filter(|_| asks(request.old()).is_none()) else { return Ok(()) };
        let namespace = parts.lister.get(NAMESPACES, "", request.namespace());
        if namespace.is_some_and(|namespace| namespace.identity.label(DEVICE_ADMIN_LABEL) == Some("true")) {
            return Ok(());
        }
        let why = format!(
            "admin access to devices requires the `{DEVICE_ADMIN_LABEL}: true` label on the containing namespace"
        );
        let errors = [FieldError::forbidden(format!("{shown}[{at}].adminAccess"), why)];
        let kind = request.resource.map_or("", |resource| resource.kind.as_str());
        Err(StatusError::invalid(&a.group, kind, request.name(), &errors))
    },
};

fn images(pod: &Value) -> Vec<String> {
    let members = ["/spec/containers", "/spec/initContainers", "/spec/ephemeralContainers"];
    let containers = members.into_iter().flat_map(|member| list(pod, member));
    containers.map(|container| text(container, "/image").to_owned()).collect()
}

// === impl Simple ===

impl Simple {
    pub fn equip(self, parts: &Parts) -> Box<dyn Plugin> {
        Box::new(Equipped(self, parts.clone()))
    }
}

impl Plugin for Equipped {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        (self.0.handles)(request)
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(std::future::ready((self.0.mutate)(&self.1, request)))
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(std::future::ready((self.0.validate)(&self.1, request)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::{attributes, create, parts, request};
    use crate::authorization::lister::fake::Objects;

    fn equipped(simple: Simple) -> Box<dyn Plugin> {
        let node = json!({"metadata": {"name": "n", "labels": {TOPOLOGY_LABELS[1]: "z", "x": "y"}}});
        let namespace = json!({"metadata": {"name": "a", "annotations": {NODE_SELECTOR: "disk = ssd,x=y"}}});
        simple.equip(&parts(Objects::of([(NODES, node), (NAMESPACES, namespace)])))
    }

    /// What a creation becomes, or why it is refused.
    async fn made(simple: Simple, what: &str, namespace: &str, mut object: Value) -> Result<Value, String> {
        let outcome = create(&*equipped(simple), what, namespace, &mut object).await;
        outcome.map(|()| object).map_err(|error| error.message().to_owned())
    }

    #[tokio::test]
    async fn each_does_what_it_is_for() {
        let pod = |spec: Value| json!({"metadata": {"name": "p"}, "spec": spec});
        let containers =
            json!([{"name": "c", "image": "i", "resources": {"requests": {"example.com/gpu": "1", "cpu": "1"}}}]);
        let affinity = |key: &str| json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": key}]}});
        let service = json!({"metadata": {"name": "s"}, "spec": {"externalIPs": ["1.2.3.4"]}});
        let binding = json!({"target": {"kind": "Node", "name": "n"}});
        for (simple, what, object, pointer, expected) in [
            (ALWAYS_ADMIT, "/pods", pod(json!({})), "/spec", Ok(json!({}))),
            (
                ALWAYS_DENY,
                "/pods",
                pod(json!({})),
                "",
                Err("pods \"p\" is forbidden: admission control is denying all modifications"),
            ),
            (
                ALWAYS_PULL_IMAGES,
                "/pods",
                pod(json!({"containers": containers})),
                "/spec/containers/0/imagePullPolicy",
                Ok(json!("Always")),
            ),
            (
                EXTENDED_RESOURCE_TOLERATION,
                "/pods",
                pod(json!({"containers": containers})),
                "/spec/tolerations",
                Ok(json!([{"key": "example.com/gpu", "operator": "Exists", "effect": "NoSchedule"}])),
            ),
            (
                LIMIT_ANTI_AFFINITY,
                "/pods",
                pod(json!({"affinity": affinity(HOSTNAME)})),
                "/metadata/name",
                Ok(json!("p")),
            ),
            (
                LIMIT_ANTI_AFFINITY,
                "/pods",
                pod(json!({"affinity": affinity("zone")})),
                "",
                Err(
                    "pods \"p\" is forbidden: affinity.PodAntiAffinity.RequiredDuringScheduling has TopologyKey zone but only key kubernetes.io/hostname is allowed",
                ),
            ),
            (
                DENY_EXTERNAL_IPS,
                "/services",
                service,
                "",
                Err("services \"s\" is forbidden: Use of external IPs is denied by admission control."),
            ),
            (
                POD_NODE_SELECTOR,
                "/pods",
                pod(json!({"nodeSelector": {"x": "y"}})),
                "/spec/nodeSelector",
                Ok(json!({"disk": "ssd", "x": "y"})),
            ),
            (
                POD_NODE_SELECTOR,
                "/pods",
                pod(json!({"nodeSelector": {"x": "z"}})),
                "",
                Err(
                    "pods \"p\" is forbidden: pod node label selector conflicts with its namespace node label selector",
                ),
            ),
            (POD_TOPOLOGY_LABELS, "/pods/binding", binding, "/metadata/labels", Ok(json!({TOPOLOGY_LABELS[1]: "z"}))),
            (POD_TOPOLOGY_LABELS, "/pods", pod(json!({"nodeName": "gone"})), "/metadata", Ok(json!({"name": "p"}))),
            (NAMESPACE_EXISTS, "/pods", pod(json!({})), "/spec", Ok(json!({}))),
            (
                DEVICE_ADMIN,
                "resource.k8s.io/resourceclaims",
                json!({"metadata": {"name": "c"}, "spec": {"devices": {"requests": [{"exactly": {}}, {"exactly": {"adminAccess": true}}]}}}),
                "",
                Err(
                    ".resource.k8s.io \"c\" is invalid: spec.devices.requests[1].adminAccess: Forbidden: admin access to devices requires the `resource.kubernetes.io/admin-access: true` label on the containing namespace",
                ),
            ),
        ] {
            let got = made(simple, what, "a", object).await;
            let got = got.map(|object| object.pointer(pointer).cloned().unwrap_or_default());
            assert_eq!(got, expected.map_err(ToOwned::to_owned), "{what}");
        }
        assert!(made(NAMESPACE_EXISTS, "/pods", "b", pod(json!({}))).await.is_err());
    }

    #[tokio::test]
    async fn owners_are_named_by_those_who_could_delete() {
        let mut new = json!({"metadata": {"name": "p", "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "u", "blockOwnerDeletion": true}]}});
        let old = json!({"metadata": {"name": "p"}});
        let plugin = equipped(OWNER_REFERENCES);
        for (groups, allowed) in [(&["system:masters"][..], true), (&[], false)] {
            let attributes = attributes("/pods", "a", "ann", groups);
            let mut request = request(&attributes, Operation::Update, Some(&mut new), Some(&old));
            assert!(plugin.handles(&request));
            assert_eq!(plugin.validate(&mut request).await.is_ok(), allowed);
        }
    }
}
