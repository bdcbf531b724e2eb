//! NodeRestriction: a kubelet writes its own Node, Lease and CSINode, mirror pods and the status of its pods, and asks for
//! tokens of its pods; nothing else. The node authorizer has let it this far. As `plugin/pkg/admission/noderestriction`.
use std::collections::BTreeSet;
use std::sync::Arc;

use apimachinery::references::{References, references};
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use serde_json::{Map, Value};

use super::{AdmissionRequest, Operation, Plugin, is_mirror_pod, list, text};
use crate::authorization::lister::{
    CSI_DRIVERS, Lister, NODES, PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, PODS, SERVICE_ACCOUNTS,
};
use crate::authorization::{Attributes, Authorizer, Decision, node};

const MIRROR: &str = "kubernetes.io/config.mirror";
const NODE_LEASES: &str = "kube-node-lease";

/// Labels of the reserved namespaces that a kubelet may set on its node. As `kubeletLabels`.
const ALLOWED_LABELS: [&str; 14] = [
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/instance-type",
    "beta.kubernetes.io/os",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.kubernetes.io/region",
    "failure-domain.kubernetes.io/zone",
    "kubernetes.io/arch",
    "kubernetes.io/hostname",
    "kubernetes.io/instance-type",
    "kubernetes.io/os",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
];
const ALLOWED_LABEL_NAMESPACES: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];
const RESTRICTED_LABEL_NAMESPACE: &str = "node-restriction.kubernetes.io";

pub struct NodeRestriction {
    lister: Arc<dyn Lister>,
    authorizer: Arc<Authorizer>,
}

// === impl NodeRestriction ===

impl NodeRestriction {
    pub fn new(lister: Arc<dyn Lister>, authorizer: Arc<Authorizer>) -> Self {
        Self { lister, authorizer }
    }

    fn check(&self, request: &AdmissionRequest<'_>, node: &str) -> Result<(), String> {
        if node.is_empty() {
            return Err(format!("could not determine node from user {:?}", request.attributes.user.name));
        }
        let attributes = request.attributes;
        match (attributes.group.as_str(), attributes.resource.as_str(), attributes.subresource.as_str()) {
            ("", "pods", "") => match request.operation {
                Operation::Create => self.create_pod(request.new_object(), node),
                Operation::Delete => self.own_pod(request, node, || {
                    format!("node {node:?} can only delete pods with spec.nodeName set to itself")
                }),
                other => Err(format!(
                    "unexpected operation {:?}, node {node:?} can only create and delete mirror pods",
                    other.name()
                )),
            },
            ("", "pods", "status") => update_pod_status(request, node),
            ("", "pods", "eviction") => {
                if request.operation != Operation::Create {
                    return Err(format!("unexpected operation {}", request.operation.name()));
                }
                self.own_pod(request, node, || {
                    format!("node {node} can only evict pods with spec.nodeName set to itself")
                })
            }
            ("", "pods", other) => {
                Err(format!("unexpected pod subresource {other:?}, only 'status' and 'eviction' are allowed"))
            }
            ("", "nodes", _) => write_node(request, node),
            ("", "persistentvolumeclaims", "status") => claim_status(request, node),
            ("", "persistentvolumeclaims", other) => {
                Err(format!("unexpected persistentvolumeclaim subresource {other:?}, only 'status' is allowed"))
            }
            ("", "serviceaccounts", "token") => self.token(request),
            ("certificates.k8s.io", "podcertificaterequests", _) => self.certificate_request(request, node),
            ("coordination.k8s.io", "leases", _) => lease(request, node),
            ("storage.k8s.io", "csinodes", _) => csi_node(request, node),
            ("resource.k8s.io", "resourceslices", _) => resource_slice(request, node),
            _ => Ok(()),
        }
    }

    /// As `admitPodCreate`.
    fn create_pod(&self, pod: &Value, node: &str) -> Result<(), String> {
        if !is_mirror_pod(pod) {
            return Err(format!("pod does not have {MIRROR:?} annotation, node {node:?} can only create mirror pods"));
        }
        if text(pod, "/spec/nodeName") != node {
            return Err(format!("node {node:?} can only create pods with spec.nodeName set to itself"));
        }
        let owner = match list(pod, "/metadata/ownerReferences") {
            [] => {
                return Err(format!("node {node:?} can only create pods with an owner reference set to itself"));
            }
            [owner] => owner,
            _ => {
                return Err(format!("node {node:?} can only create pods with a single owner reference set to itself"));
            }
        };
        let is_us =
            text(owner, "/apiVersion") == "v1" && text(owner, "/kind") == "Node" && text(owner, "/name") == node;
        if !is_us {
            return Err(format!("node {node:?} can only create pods with an owner reference set to itself"));
        }
        if owner["controller"] != true {
            return Err(format!("node {node:?} can only create pods with a controller owner reference set to itself"));
        }
        if owner["blockOwnerDeletion"] == true {
            return Err(format!("node {node:?} must not set blockOwnerDeletion on an owner reference"));
        }
        let itself = self.lister.get(NODES, "", node).ok_or_else(|| format!("error looking up node {node}"))?;
        if *itself.identity.uid != *text(owner, "/uid") {
            return Err(format!(
                "node {node} UID mismatch: expected {} got {}",
                text(owner, "/uid"),
                itself.identity.uid
            ));
        }
        // A kubelet must not come by secrets by making a pod that names them.
        let references = with_secrets(pod);
        let what = if !text(pod, "/spec/serviceAccountName").is_empty() {
            "a service account"
        } else if !references.secrets.is_empty() {
            "secrets"
        } else if !references.config_maps.is_empty() {
            "configmaps"
        } else if !references.claims.is_empty() {
            "persistentvolumeclaims"
        } else if !list(pod, "/spec/resourceClaims").is_empty() {
            "resourceclaims"
        } else if projects(pod, "clusterTrustBundle") {
            "clustertrustbundles"
        } else if projects(pod, "podCertificate") {
            "podcertificates"
        } else {
            return Ok(());
        };
        Err(format!("node {node:?} can not create pods that reference {what}"))
    }

    /// The pod that is named is bound to the node; one that is not there is for others to say.
    fn own_pod(&self, request: &AdmissionRequest<'_>, node: &str, refusal: impl Fn() -> String) -> Result<(), String> {
        let name = match request.attributes.name.as_str() {
            "" => request.name(),
            name => name,
        };
        let pod = self.lister.get(PODS, request.namespace(), name);
        match pod {
            Some(pod) if pod.identity.field("spec.nodeName") != Some(node) => Err(refusal()),
            _ => Ok(()),
        }
    }

    /// As `admitServiceAccount`: tokens are bound to a pod of the node.
    fn token(&self, request: &AdmissionRequest<'_>) -> Result<(), String> {
        if request.operation != Operation::Create {
            return Ok(());
        }
        let node = node::node_of(&request.attributes.user).unwrap_or_default();
        let body = request.new_object();
        let bound = &body["spec"]["boundObjectRef"];
        if bound.is_null()
            || text(bound, "/apiVersion") != "v1"
            || text(bound, "/kind") != "Pod"
            || text(bound, "/name").is_empty()
        {
            return Err("node requested token not bound to a pod".to_owned());
        }
        if text(bound, "/uid").is_empty() {
            return Err("node requested token with a pod binding without a uid".to_owned());
        }
        let pod = self.lister.get(PODS, request.namespace(), text(bound, "/name"));
        let pod = pod.ok_or_else(|| format!("pod {:?} not found", text(bound, "/name")))?;
        if *pod.identity.uid != *text(bound, "/uid") {
            return Err(format!(
                "the UID in the bound object reference ({}) does not match the UID in record. The object might have been deleted and then recreated",
                text(bound, "/uid")
            ));
        }
        if pod.identity.field("spec.nodeName") != Some(node) {
            return Err("node requested token bound to a pod scheduled on a different node".to_owned());
        }
        self.audience(request, &pod.value())
    }

    /// As `validateNodeServiceAccountAudience`: a token is for whom the pod says in a volume, or the node is allowed to name.
    fn audience(&self, request: &AdmissionRequest<'_>, pod: &Value) -> Result<(), String> {
        let audience = match list(request.new_object(), "/spec/audiences") {
            [] => "",
            [one] => one.as_str().unwrap_or_default(),
            _ => return Err("node may only request 0 or 1 audiences".to_owned()),
        };
        let namespace = request.namespace();
        let pod_name = text(pod, "/metadata/name");
        let named = list(pod, "/spec/volumes").iter().any(|volume| {
            let tokens =
                list(volume, "/projected/sources").iter().filter_map(|source| source.get("serviceAccountToken"));
            tokens.map(|token| text(token, "/audience")).any(|of| of == audience)
                || self.driver(namespace, pod_name, volume).is_some_and(|driver| {
                    let driver = self.lister.get(CSI_DRIVERS, "", &driver).map(|driver| driver.value());
                    let driver = driver.unwrap_or_default();
                    list(&driver, "/spec/tokenRequests").iter().any(|token| text(token, "/audience") == audience)
                })
        });
        if named {
            return Ok(());
        }
        let user = &request.attributes.user;
        let question = Attributes {
            user: user.clone(),
            verb: "request-serviceaccounts-token-audience".to_owned(),
            resource: audience.to_owned(),
            namespace: namespace.to_owned(),
            name: request.attributes.name.clone(),
            is_resource: true,
            ..Attributes::default()
        };
        match self.authorizer.explain(&question).0 {
            Decision::Allow => Ok(()),
            Decision::NoOpinion(_) => Err(format!(
                "audience {audience:?} not found in pod spec volume, {} is not authorized to request a service account token for this audience",
                user.name
            )),
        }
    }

    /// As `admitPodCertificateRequest`: a kubelet asks for its own pods, as they are. What is not seen yet may be seen the next
    /// time.
    fn certificate_request(&self, request: &AdmissionRequest<'_>, node: &str) -> Result<(), String> {
        if request.operation != Operation::Create {
            return Err(format!("unexpected operation {}", request.operation.name()));
        }
        let subresource = &request.attributes.subresource;
        if !subresource.is_empty() {
            return Err(format!("unexpected subresource {subresource}"));
        }
        let (asked, namespace) = (&request.new_object()["spec"], request.namespace());
        let of = |field: &str| text(asked, &format!("/{field}")).to_owned();
        let (node_name, pod_name, account_name) = (of("nodeName"), of("podName"), of("serviceAccountName"));
        let pod_ref = format!("{:?}", format!("{namespace}/{pod_name}"));
        if node_name != node {
            return Err(format!(
                "PodCertificateRequest.Spec.NodeName={node_name:?}, which is not the requesting node {node:?}"
            ));
        }
        let itself = self.lister.get(NODES, "", node).ok_or_else(|| {
            format!("while retrieving node {node:?} named in the PodCertificateRequest: node {node:?} not found")
        })?;
        if *itself.identity.uid != *of("nodeUID") {
            return Err(format!(
                "PodCertificateRequest for pod {pod_ref} names node UID {:?}, inconsistent with the running node ({:?})",
                of("nodeUID"),
                itself.identity.uid
            ));
        }
        let pod = self.lister.get(PODS, namespace, &pod_name).ok_or_else(|| {
            format!("while retrieving pod {pod_ref} named in the PodCertificateRequest: pod {pod_name:?} not found")
        })?;
        if *pod.identity.uid != *of("podUID") {
            return Err(format!(
                "PodCertificateRequest for pod {pod_ref} contains pod UID ({:?}) which differs from running pod {:?}",
                of("podUID"),
                pod.identity.uid
            ));
        }
        if pod.identity.field("spec.nodeName") != Some(node) {
            return Err(format!(
                "pod {pod_ref} is not running on node {node_name:?} named in the PodCertificateRequest"
            ));
        }
        let pod = pod.value();
        if is_mirror_pod(&pod) {
            return Err(format!("pod {pod_ref} is a mirror pod"));
        }
        let account_of_pod = text(&pod, "/spec/serviceAccountName");
        if account_name != account_of_pod {
            return Err(format!(
                "PodCertificateRequest for pod {pod_ref} contains serviceAccountName ({account_name:?}) that differs from running pod ({account_of_pod:?})"
            ));
        }
        let account = self.lister.get(SERVICE_ACCOUNTS, namespace, &account_name).ok_or_else(|| {
            let account_ref = format!("{namespace}/{account_name}");
            format!(
                "while retrieving service account {account_ref:?} named in the PodCertificateRequest: serviceaccount {account_name:?} not found"
            )
        })?;
        if *account.identity.uid != *of("serviceAccountUID") {
            return Err(format!(
                "PodCertificateRequest for pod {pod_ref} names service account UID {:?}, which differs from the running service account ({:?})",
                of("serviceAccountUID"),
                account.identity.uid
            ));
        }
        Ok(())
    }

    /// The CSI driver behind a volume of a pod.
    fn driver(&self, namespace: &str, pod: &str, volume: &Value) -> Option<String> {
        if let Some(driver) = volume.pointer("/csi/driver") {
            return driver.as_str().map(ToOwned::to_owned);
        }
        let claim = match text(volume, "/persistentVolumeClaim/claimName") {
            "" => volume.get("ephemeral").map(|_| format!("{pod}-{}", text(volume, "/name")))?,
            claim => claim.to_owned(),
        };
        let claim = self.lister.get(PERSISTENT_VOLUME_CLAIMS, namespace, &claim)?.value();
        let volume = self.lister.get(PERSISTENT_VOLUMES, "", text(&claim, "/spec/volumeName"))?.value();
        Some(text(&volume, "/spec/csi/driver").to_owned())
    }
}

impl Plugin for NodeRestriction {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.operation != Operation::Connect && node::node_of(&request.attributes.user).is_some()
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        let node = node::node_of(&request.attributes.user).unwrap_or_default();
        let outcome = self.check(request, node).map_err(|why| request.forbidden(why));
        Box::pin(std::future::ready(outcome))
    }
}

/// Has the pod a source of this kind in a projected volume?
fn projects(pod: &Value, kind: &str) -> bool {
    let mut sources = list(pod, "/spec/volumes").iter().flat_map(|volume| list(volume, "/projected/sources"));
    sources.any(|source| source.get(kind).is_some())
}

/// The references of a mirror pod, which count for this purpose.
fn with_secrets(pod: &Value) -> References {
    let mut plain = pod.clone();
    if let Some(annotations) = plain.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        annotations.remove(MIRROR);
    }
    serde_json::from_value(plain).map(|pod| references(&pod)).unwrap_or_default()
}

fn update_pod_status(request: &AdmissionRequest<'_>, node: &str) -> Result<(), String> {
    if request.operation != Operation::Update {
        return Err(format!("unexpected operation {}", request.operation.name()));
    }
    let (new, old) = (request.new_object(), request.old());
    if text(old, "/spec/nodeName") != node {
        return Err(format!("node {node:?} can only update pod status for pods with spec.nodeName set to itself"));
    }
    if new.pointer("/metadata/labels") != old.pointer("/metadata/labels") {
        return Err(format!("node {node:?} cannot update labels through pod status"));
    }
    if new.pointer("/status/resourceClaimStatuses") != old.pointer("/status/resourceClaimStatuses") {
        // So it is spelled.
        return Err(format!("node {node:?} cannot update resource claim statues"));
    }
    if new.pointer("/status/extendedResourceClaimStatus") != old.pointer("/status/extendedResourceClaimStatus") {
        return Err(format!("node {node:?} cannot update extended resource claim status"));
    }
    Ok(())
}

/// As `admitNode`.
fn write_node(request: &AdmissionRequest<'_>, node: &str) -> Result<(), String> {
    let name = match request.operation {
        Operation::Create => request.name(),
        _ if request.attributes.name.is_empty() => request.name(),
        _ => &request.attributes.name,
    };
    if name != node {
        return Err(format!("node {node:?} is not allowed to modify node {name:?}"));
    }
    let (new, old) = (request.new_object(), request.old());
    let joined = |labels: BTreeSet<String>| labels.into_iter().collect::<Vec<_>>().join(", ");
    match request.operation {
        Operation::Create => {
            if new.pointer("/spec/configSource").is_some_and(|source| !source.is_null()) {
                return Err(format!("node {node:?} is not allowed to create pods with a non-nil configSource"));
            }
            let forbidden = forbidden_labels(changed_labels(new, &Value::Null));
            if !forbidden.is_empty() {
                return Err(format!("node {node:?} is not allowed to set the following labels: {}", joined(forbidden)));
            }
        }
        Operation::Update => {
            let changed = |pointer: &str| {
                let part = |object: &Value| object.pointer(pointer).filter(|part| !is_empty(part)).cloned();
                part(new) != part(old)
            };
            if changed("/spec/configSource") {
                return Err(format!(
                    "node {node:?} is not allowed to update configSource to a new non-nil configSource"
                ));
            }
            if changed("/spec/taints") {
                return Err(format!("node {node:?} is not allowed to modify taints"));
            }
            if changed("/metadata/ownerReferences") {
                return Err(format!("node {node:?} is not allowed to modify ownerReferences"));
            }
            let forbidden = forbidden_labels(changed_labels(new, old));
            if !forbidden.is_empty() {
                return Err(format!("is not allowed to modify labels: {}", joined(forbidden)));
            }
        }
        _ => {}
    }
    Ok(())
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
}

/// Labels set, changed or removed.
fn changed_labels(new: &Value, old: &Value) -> BTreeSet<String> {
    let empty = Map::new();
    let labels = |object: &Value| object.pointer("/metadata/labels").and_then(Value::as_object).cloned();
    let (new, old) = (labels(new).unwrap_or_else(|| empty.clone()), labels(old).unwrap_or(empty));
    new.keys().chain(old.keys()).filter(|key| new.get(*key) != old.get(*key)).cloned().collect()
}

/// Those that a kubelet may not touch: of `node-restriction.kubernetes.io`, and of Kubernetes' own namespaces unless listed.
fn forbidden_labels(labels: BTreeSet<String>) -> BTreeSet<String> {
    let within = |namespace: &str, parent: &str| {
        namespace == parent || namespace.strip_suffix(parent).is_some_and(|rest| rest.ends_with('.'))
    };
    let forbidden = |label: &String| {
        let namespace = label.split_once('/').map_or("", |(namespace, _)| namespace);
        if within(namespace, RESTRICTED_LABEL_NAMESPACE) {
            return true;
        }
        (within(namespace, "kubernetes.io") || within(namespace, "k8s.io"))
            && !ALLOWED_LABELS.contains(&label.as_str())
            && !ALLOWED_LABEL_NAMESPACES.iter().any(|allowed| within(namespace, allowed))
    };
    labels.into_iter().filter(forbidden).collect()
}

/// Only capacity, conditions and what resizing writes may differ.
fn claim_status(request: &AdmissionRequest<'_>, node: &str) -> Result<(), String> {
    if request.operation != Operation::Update {
        return Err(format!("unexpected operation {}", request.operation.name()));
    }
    let strip = |claim: &Value| {
        let mut claim = claim.clone();
        if let Some(metadata) = claim.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
            metadata.remove("resourceVersion");
        }
        if let Some(status) = claim.get_mut("status").and_then(Value::as_object_mut) {
            for field in [
                "capacity",
                "conditions",
                "allocatedResources",
                "allocatedResourceStatuses",
                "modifyVolumeStatus",
                "currentVolumeAttributesClassName",
            ] {
                status.remove(field);
            }
        }
        claim
    };
    if strip(request.new_object()) != strip(request.old()) {
        return Err(format!(
            "node {node:?} is not allowed to update fields other than status.quantity and status.conditions"
        ));
    }
    Ok(())
}

fn lease(request: &AdmissionRequest<'_>, node: &str) -> Result<(), String> {
    if request.namespace() != NODE_LEASES {
        return Err(format!("can only access leases in the {NODE_LEASES:?} system namespace"));
    }
    let name = if request.creates() { request.name() } else { &request.attributes.name };
    if name != node {
        return Err("can only access node lease with the same name as the requesting node".to_owned());
    }
    Ok(())
}

fn csi_node(request: &AdmissionRequest<'_>, node: &str) -> Result<(), String> {
    let name = if request.creates() { request.name() } else { &request.attributes.name };
    if name != node {
        return Err("can only access CSINode with the same name as the requesting node".to_owned());
    }
    Ok(())
}

fn resource_slice(request: &AdmissionRequest<'_>, node: &str) -> Result<(), String> {
    let of = if request.creates() { request.new_object() } else { request.old() };
    if of.is_null() || text(of, "/spec/nodeName") == node {
        return Ok(());
    }
    let verb = if request.creates() { "create" } else { "modify" };
    Err(format!("can only {verb} ResourceSlice with the same NodeName as the requesting node"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::{attributes, request};
    use crate::authorization::lister::fake::Objects;
    use serde_json::json;

    fn plugin() -> NodeRestriction {
        let pod = |name: &str, node: &str| {
            json!({"metadata": {"name": name, "namespace": "a", "uid": name}, "spec": {"nodeName": node, "volumes": [
            {"name": "v", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}, {"serviceAccountToken": {"path": "t", "audience": "vault"}}]}},
            {"name": "w", "csi": {"driver": "csi.example.com"}}]}})
        };
        let driver =
            json!({"metadata": {"name": "csi.example.com"}, "spec": {"tokenRequests": [{"audience": "cloud"}]}});
        let objects = Objects::of([
            (NODES, json!({"metadata": {"name": "n1", "uid": "u1"}})),
            (PODS, pod("mine", "n1")),
            (PODS, pod("theirs", "n2")),
            (CSI_DRIVERS, driver),
        ]);
        let authorizer = Authorizer::with(&["RBAC".to_owned()], objects.clone()).unwrap();
        NodeRestriction::new(objects, Arc::new(authorizer))
    }

    fn ask(
        what: &str,
        namespace: &str,
        name: &str,
        operation: Operation,
        new: Value,
        old: Value,
    ) -> Result<(), String> {
        let mut attributes = attributes(what, namespace, "system:node:n1", &["system:nodes"]);
        attributes.name = name.into();
        let mut new = new;
        let object = (!new.is_null()).then_some(&mut new);
        let request = request(&attributes, operation, object, Some(&old));
        let plugin = plugin();
        assert!(plugin.handles(&request));
        plugin.check(&request, "n1")
    }

    fn mirror(change: impl Fn(&mut Value)) -> Value {
        let mut pod = json!({"metadata": {"name": "m", "annotations": {MIRROR: "x"}, "ownerReferences": [
            {"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "u1", "controller": true}]},
            "spec": {"nodeName": "n1", "containers": []}});
        change(&mut pod);
        pod
    }

    #[test]
    fn only_mirror_pods_that_refer_to_nothing_are_created() {
        let create = |pod: Value| ask("/pods", "a", "", Operation::Create, pod, Value::Null);
        assert_eq!(create(mirror(|_| ())), Ok(()));
        assert_eq!(
            create(json!({"metadata": {"name": "p"}})),
            Err(r#"pod does not have "kubernetes.io/config.mirror" annotation, node "n1" can only create mirror pods"#
                .into())
        );
        let projected = |source: Value| json!([{"name": "v", "projected": {"sources": [source]}}]);
        let bad: [&dyn Fn(&mut Value); 8] = [
            &|p| p["spec"]["nodeName"] = json!("n2"),
            &|p| p["metadata"]["ownerReferences"] = json!([]),
            &|p| p["metadata"]["ownerReferences"][0]["uid"] = json!("other"),
            &|p| p["spec"]["serviceAccountName"] = json!("robot"),
            &|p| p["spec"]["volumes"] = json!([{"name": "v", "secret": {"secretName": "s"}}]),
            &|p| p["spec"]["volumes"] = json!([{"name": "v", "persistentVolumeClaim": {"claimName": "s"}}]),
            &|p| p["spec"]["volumes"] = projected(json!({"clusterTrustBundle": {"name": "b", "path": "p"}})),
            &|p| p["spec"]["volumes"] = projected(json!({"podCertificate": {"keyType": "ED25519"}})),
        ];
        for (i, change) in bad.into_iter().enumerate() {
            assert!(create(mirror(change)).is_err(), "case {i}");
        }
    }

    #[test]
    fn only_pods_of_the_node_are_touched() {
        let of = |node: &str| json!({"metadata": {"labels": {"a": "b"}}, "spec": {"nodeName": node}});
        assert_eq!(ask("/pods", "a", "mine", Operation::Delete, Value::Null, Value::Null), Ok(()));
        assert!(ask("/pods", "a", "theirs", Operation::Delete, Value::Null, Value::Null).is_err());
        assert!(ask("/pods/eviction", "a", "theirs", Operation::Create, json!({}), Value::Null).is_err());
        assert_eq!(ask("/pods/status", "a", "mine", Operation::Update, of("n1"), of("n1")), Ok(()));
        assert!(ask("/pods/status", "a", "theirs", Operation::Update, of("n2"), of("n2")).is_err());
        let relabelled = json!({"metadata": {"labels": {"a": "c"}}, "spec": {"nodeName": "n1"}});
        assert!(ask("/pods/status", "a", "mine", Operation::Update, relabelled, of("n1")).is_err());
        assert!(ask("/pods", "a", "mine", Operation::Update, of("n1"), of("n1")).is_err());
    }

    #[test]
    fn a_node_writes_itself_but_not_its_taints_and_reserved_labels() {
        let node = |name: &str, label: &str, taints: Value| json!({"metadata": {"name": name, "labels": {label: "x"}}, "spec": {"taints": taints}});
        let create = |node: Value| ask("/nodes", "", "", Operation::Create, node, Value::Null);
        for (label, allowed) in [
            ("kubernetes.io/hostname", true),
            ("topology.kubernetes.io/zone", true),
            ("node.kubernetes.io/x", true),
            ("sub.kubelet.kubernetes.io/x", true),
            ("mine.example.com/x", true),
            ("plain", true),
            ("node-role.kubernetes.io/control-plane", false),
            ("node-restriction.kubernetes.io/x", false),
            ("foo.k8s.io/x", false),
        ] {
            assert_eq!(create(node("n1", label, json!([]))).is_ok(), allowed, "{label}");
        }
        assert_eq!(
            create(node("n2", "plain", json!([]))),
            Err(r#"node "n1" is not allowed to modify node "n2""#.to_owned())
        );
        let update = |new: Value, old: Value| ask("/nodes", "", "n1", Operation::Update, new, old);
        let plain = || node("n1", "plain", Value::Null);
        assert_eq!(update(plain(), plain()), Ok(()));
        assert!(update(node("n1", "plain", json!([{"key": "k"}])), plain()).is_err());
        assert_eq!(
            update(node("n1", "foo.k8s.io/x", Value::Null), plain()),
            Err("is not allowed to modify labels: foo.k8s.io/x".to_owned())
        );
    }

    #[test]
    fn tokens_are_bound_to_pods_of_the_node() {
        let ask_for = |bound: Value, audiences: &[&str]| {
            let body = json!({"spec": {"boundObjectRef": bound, "audiences": audiences}});
            ask("/serviceaccounts/token", "a", "robot", Operation::Create, body, Value::Null)
        };
        let ask = |bound: Value| ask_for(bound, &[]);
        let pod = |name: &str, uid: &str| json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid});
        assert_eq!(ask(pod("mine", "mine")), Ok(()));
        for (bound, why) in [
            (Value::Null, "node requested token not bound to a pod"),
            (pod("mine", ""), "node requested token with a pod binding without a uid"),
            (pod("theirs", "theirs"), "node requested token bound to a pod scheduled on a different node"),
        ] {
            assert_eq!(ask(bound), Err(why.to_owned()));
        }
        assert!(ask(pod("mine", "other")).is_err());
        for (audiences, allowed) in
            [(&["vault"][..], true), (&["cloud"], true), (&["bank"], false), (&["vault", "cloud"], false)]
        {
            assert_eq!(ask_for(pod("mine", "mine"), audiences).is_ok(), allowed, "{audiences:?}");
        }
    }

    #[test]
    fn leases_and_csi_nodes_bear_the_nodes_name() {
        let named = |name: &str| json!({"metadata": {"name": name}});
        let lease = "coordination.k8s.io/leases";
        assert_eq!(ask(lease, NODE_LEASES, "", Operation::Create, named("n1"), Value::Null), Ok(()));
        assert!(ask(lease, NODE_LEASES, "", Operation::Create, named("n2"), Value::Null).is_err());
        assert!(ask(lease, "default", "n1", Operation::Update, named("n1"), named("n1")).is_err());
        assert!(ask("storage.k8s.io/csinodes", "", "", Operation::Create, named("n2"), Value::Null).is_err());
    }
}
