//! The node authorizer: a kubelet (`system:node:<name>` in group `system:nodes`) reads only what the pods bound to its node
//! refer to, and touches only its own Node, Lease and CSINode. As `plugin/pkg/auth/authorizer/node`.
//!
//! Kubernetes keeps a graph of all references. Here the question is answered from the pods of the node, which an index
//! gives; their references are remembered per pod (they hardly ever change while a pod lives).
mod index;

use std::collections::HashMap;
use std::sync::Arc;

use apimachinery::fields::FieldSelector;
use apimachinery::references::{References, references, volume_secrets};
use index::PodsByNode;
use k8s_openapi::api::core::v1::{PersistentVolume, Pod};
use k8s_openapi::api::rbac::v1::PolicyRule;
use parking_lot::Mutex;

use super::lister::{
    Lister, PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, POD_CERTIFICATE_REQUESTS, PODS, VOLUME_ATTACHMENTS, typed,
};
use super::rbac::rules;
use super::{Attributes, Decision};
use crate::authentication::UserInfo;
use crate::storage::object::StoredObject;

const NODE_LEASES: &str = "kube-node-lease";
/// When this many pods' references are remembered, all are forgotten and collected anew.
const REMEMBERED_PODS_MAX: usize = 65_536;

/// The authorizer.
pub struct NodeAuthorizer {
    lister: Arc<dyn Lister>,
    pods: PodsByNode,
    /// The rules of `system:node` for all that is not subdivided by node.
    rules: Vec<PolicyRule>,
    /// By pod (uid), with the revision they were read at.
    remembered: Mutex<HashMap<Box<str>, (i64, Arc<References>)>>,
}

#[derive(Clone, Copy)]
enum Referent {
    Secret,
    ConfigMap,
    Claim,
    ResourceClaim,
    ServiceAccount,
}

/// The node that a user is the kubelet of. As `NodeIdentity`.
pub fn node_of(user: &UserInfo) -> Option<&str> {
    user.name.strip_prefix("system:node:").filter(|_| user.in_group("system:nodes"))
}

// === impl NodeAuthorizer ===

impl NodeAuthorizer {
    pub fn new(lister: Arc<dyn Lister>, rules: Vec<PolicyRule>) -> Self {
        Self { lister, pods: PodsByNode::default(), rules, remembered: Mutex::default() }
    }

    pub fn authorize(&self, attributes: &Attributes) -> Decision {
        if !attributes.user.name.starts_with("system:node:") {
            return Decision::NoOpinion(String::new());
        }
        let Some(node) = node_of(&attributes.user) else {
            return Decision::NoOpinion(String::new());
        };
        if node.is_empty() {
            return Decision::NoOpinion(format!("unknown node for user {:?}", attributes.user.name));
        }
        if !attributes.is_resource {
            return self.statically(attributes);
        }
        match (attributes.group.as_str(), attributes.resource.as_str()) {
            ("", "secrets") => self.read_namespaced(node, Referent::Secret, attributes),
            ("", "configmaps") => self.read_namespaced(node, Referent::ConfigMap, attributes),
            ("", "persistentvolumeclaims") if attributes.subresource == "status" => match attributes.verb.as_str() {
                "update" | "patch" => self.referred(node, Referent::Claim, attributes),
                _ => no("can only get/update/patch this type"),
            },
            ("", "persistentvolumeclaims") => {
                self.get_one(attributes, || self.refers(node, Referent::Claim, attributes))
            }
            ("", "persistentvolumes") => self.get_one(attributes, || self.uses_volume(node, &attributes.name)),
            ("resource.k8s.io", "resourceclaims") => {
                self.get_one(attributes, || self.refers(node, Referent::ResourceClaim, attributes))
            }
            ("resource.k8s.io", "resourceslices") => slices(node, attributes),
            ("storage.k8s.io", "volumeattachments") => self.get_one(attributes, || {
                let attachment = self.lister.get(VOLUME_ATTACHMENTS, "", &attributes.name);
                attachment.is_some_and(|a| a.value().pointer("/spec/nodeName").is_some_and(|n| n == node))
            }),
            ("", "serviceaccounts") => match (attributes.verb.as_str(), attributes.subresource.as_str()) {
                ("create", "token") | ("get", "") => self.referred(node, Referent::ServiceAccount, attributes),
                _ => no("can only create tokens for individual service accounts"),
            },
            ("certificates.k8s.io", "podcertificaterequests") => self.certificate_request(node, attributes),
            ("coordination.k8s.io", "leases") => lease(node, attributes),
            ("storage.k8s.io", "csinodes") => csi_node(node, attributes),
            ("", "nodes") => node_object(node, attributes),
            ("", "pods") => self.pod(node, attributes),
            _ => self.statically(attributes),
        }
    }

    fn statically(&self, attributes: &Attributes) -> Decision {
        if self.rules.iter().any(|rule| rules::allows(rule, attributes)) {
            return Decision::Allow;
        }
        Decision::NoOpinion(String::new())
    }

    fn read_namespaced(&self, node: &str, what: Referent, attributes: &Attributes) -> Decision {
        if !matches!(attributes.verb.as_str(), "get" | "list" | "watch") {
            return no("can only read resources of this type");
        }
        if !attributes.subresource.is_empty() {
            return no("cannot read subresource");
        }
        if attributes.namespace.is_empty() {
            return no("can only read namespaced object of this type");
        }
        self.referred(node, what, attributes)
    }

    fn get_one(&self, attributes: &Attributes, related: impl FnOnce() -> bool) -> Decision {
        if attributes.verb != "get" {
            return no("can only get individual resources of this type");
        }
        if !attributes.subresource.is_empty() {
            return no("cannot get subresource");
        }
        decide(attributes, related)
    }

    fn referred(&self, node: &str, what: Referent, attributes: &Attributes) -> Decision {
        decide(attributes, || {
            self.refers(node, what, attributes)
                || (matches!(what, Referent::Secret)
                    && self.volume_secret(node, &attributes.namespace, &attributes.name))
        })
    }

    fn refers(&self, node: &str, what: Referent, attributes: &Attributes) -> bool {
        self.any_pod(node, &attributes.namespace, |references| {
            let list = match what {
                Referent::Secret => &references.secrets,
                Referent::ConfigMap => &references.config_maps,
                Referent::Claim => &references.claims,
                Referent::ResourceClaim => &references.resource_claims,
                Referent::ServiceAccount => return references.service_account == attributes.name,
            };
            list.contains(&attributes.name)
        })
    }

    fn any_pod(&self, node: &str, namespace: &str, test: impl Fn(&References) -> bool) -> bool {
        let pods = self.pods.on(node, self.lister.objects(PODS));
        pods.iter().filter(|pod| *pod.identity.namespace == *namespace).any(|pod| test(&self.references(pod)))
    }

    fn references(&self, pod: &StoredObject) -> Arc<References> {
        if let Some((revision, known)) = self.remembered.lock().get(&pod.identity.uid)
            && *revision == pod.revision
        {
            return known.clone();
        }
        let found = Arc::new(typed::<Pod>(pod).map(|pod| references(&pod)).unwrap_or_default());
        let mut remembered = self.remembered.lock();
        if remembered.len() >= REMEMBERED_PODS_MAX {
            remembered.clear();
        }
        remembered.insert(pod.identity.uid.clone(), (pod.revision, found.clone()));
        found
    }

    /// Is the volume bound to a claim that a pod of the node uses?
    fn uses_volume(&self, node: &str, name: &str) -> bool {
        let volume = self.lister.get(PERSISTENT_VOLUMES, "", name).and_then(|v| typed::<PersistentVolume>(&v));
        volume.is_some_and(|volume| self.claims_volume(node, &volume))
    }

    fn claims_volume(&self, node: &str, volume: &PersistentVolume) -> bool {
        let claim = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
        let Some((namespace, name)) = claim.and_then(|c| Some((c.namespace.as_deref()?, c.name.as_deref()?))) else {
            return false;
        };
        // A claim of that name that is not this one's does not count.
        let bound = self.lister.get(PERSISTENT_VOLUME_CLAIMS, namespace, name);
        if let (Some(bound), Some(uid)) = (bound, claim.and_then(|c| c.uid.as_deref()))
            && *bound.identity.uid != *uid
        {
            return false;
        }
        self.any_pod(node, namespace, |references| references.claims.iter().any(|c| c == name))
    }

    /// Does a volume that a pod of the node uses name this secret?
    fn volume_secret(&self, node: &str, namespace: &str, name: &str) -> bool {
        let needle = format!("\"name\":{name:?}");
        self.lister.list(PERSISTENT_VOLUMES, None).iter().any(|volume| {
            let json = volume.json();
            json.windows(needle.len()).any(|window| window == needle.as_bytes())
                && typed::<PersistentVolume>(volume).is_some_and(|volume| {
                    volume_secrets(&volume).iter().any(|(ns, n)| ns == namespace && n == name)
                        && self.claims_volume(node, &volume)
                })
        })
    }

    /// As `authorizePodCertificateRequest`. Where the feature is off there are none.
    fn certificate_request(&self, node: &str, attributes: &Attributes) -> Decision {
        if !attributes.subresource.is_empty() {
            return no("nodes may not access the status subresource of PodCertificateRequests");
        }
        match attributes.verb.as_str() {
            // NodeRestriction looks at the object.
            "create" => Decision::Allow,
            "get" => decide(attributes, || {
                let request = self.lister.get(POD_CERTIFICATE_REQUESTS, &attributes.namespace, &attributes.name);
                request.is_some_and(|request| request.value().pointer("/spec/nodeName").is_some_and(|n| n == node))
            }),
            "list" | "watch" if selects_node(node, attributes) => Decision::Allow,
            "list" | "watch" => no("can only list/watch podcertificaterequests with nodeName field selector"),
            verb => Decision::NoOpinion(format!("nodes may not {verb} podcertificaterequests")),
        }
    }

    fn pod(&self, node: &str, attributes: &Attributes) -> Decision {
        match (attributes.subresource.as_str(), attributes.verb.as_str()) {
            ("", "get") => self.get_one(attributes, || {
                let pod = self.lister.get(PODS, &attributes.namespace, &attributes.name);
                pod.is_some_and(|pod| pod.identity.field("spec.nodeName") == Some(node))
            }),
            ("", "list" | "watch") if selects_node(node, attributes) => Decision::Allow,
            ("", "list" | "watch") => no("can only list/watch pods with spec.nodeName field selector"),
            // NodeRestriction looks at the object.
            ("", "create" | "delete") | ("status", "update" | "patch") | ("eviction", "create") => Decision::Allow,
            _ => Decision::NoOpinion(String::new()),
        }
    }
}

/// Only what has to do with the node is asked for.
fn selects_node(node: &str, attributes: &Attributes) -> bool {
    let selector = FieldSelector::parse(&attributes.field_selector).ok();
    selector.as_ref().and_then(|s| s.required_value("spec.nodeName")) == Some(node)
}

fn no(why: &str) -> Decision {
    Decision::NoOpinion(why.to_owned())
}

fn decide(attributes: &Attributes, related: impl FnOnce() -> bool) -> Decision {
    if attributes.name.is_empty() {
        return no("No Object name found");
    }
    if related() {
        return Decision::Allow;
    }
    let node = node_of(&attributes.user).unwrap_or_default();
    Decision::NoOpinion(format!("no relationship found between node '{node}' and this object"))
}

fn lease(node: &str, attributes: &Attributes) -> Decision {
    if !matches!(attributes.verb.as_str(), "get" | "create" | "update" | "patch" | "delete") {
        return no("can only get, create, update, patch, or delete a node lease");
    }
    if attributes.namespace != NODE_LEASES {
        return Decision::NoOpinion(format!("can only access leases in the {NODE_LEASES:?} system namespace"));
    }
    // The name of a new one is NodeRestriction's to check.
    if attributes.verb != "create" && attributes.name != node {
        return no("can only access node lease with the same name as the requesting node");
    }
    Decision::Allow
}

fn csi_node(node: &str, attributes: &Attributes) -> Decision {
    if !matches!(attributes.verb.as_str(), "get" | "create" | "update" | "patch" | "delete") {
        return no("can only get, create, update, patch, or delete a CSINode");
    }
    if !attributes.subresource.is_empty() {
        return no("cannot authorize CSINode subresources");
    }
    if attributes.verb != "create" && attributes.name != node {
        return no("can only access CSINode with the same name as the requesting node");
    }
    Decision::Allow
}

fn node_object(node: &str, attributes: &Attributes) -> Decision {
    match (attributes.subresource.as_str(), attributes.verb.as_str()) {
        ("", "create" | "update" | "patch") | ("status", "update" | "patch") => Decision::Allow,
        ("", "get" | "list" | "watch") if attributes.name == node => Decision::Allow,
        ("", "get" | "list" | "watch") if attributes.name.is_empty() => {
            Decision::NoOpinion(format!("node '{node}' cannot read all nodes, only its own Node object"))
        }
        ("", "get" | "list" | "watch") => {
            Decision::NoOpinion(format!("node '{node}' cannot read '{}', only its own Node object", attributes.name))
        }
        _ => Decision::NoOpinion(String::new()),
    }
}

fn slices(node: &str, attributes: &Attributes) -> Decision {
    if !attributes.subresource.is_empty() {
        return no("cannot authorize ResourceSlice subresources");
    }
    match attributes.verb.as_str() {
        // NodeRestriction looks at the object.
        "create" | "get" | "update" | "patch" | "delete" => Decision::Allow,
        "list" | "watch" | "deletecollection" => {
            let selector = FieldSelector::parse(&attributes.field_selector).ok();
            if selector.as_ref().and_then(|s| s.required_value("spec.nodeName")) == Some(node) {
                return Decision::Allow;
            }
            no("can only list/watch/deletecollection resourceslices with nodeName field selector")
        }
        _ => no(
            "only the following verbs are allowed for a ResourceSlice: get, watch, list, create, update, patch, delete, deletecollection",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authorization::lister::fake::Objects;
    use serde_json::json;

    fn authorizer() -> NodeAuthorizer {
        let rules = crate::bootstrap::rbac::cluster_role_rules("system:node");
        let objects = Objects::of([
            (
                PODS,
                json!({"metadata": {"name": "p", "namespace": "a", "uid": "1"}, "spec": {
                "nodeName": "n1", "serviceAccountName": "robot", "imagePullSecrets": [{"name": "pull"}],
                "containers": [{"name": "c", "env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "envsecret", "key": "k"}}}],
                    "envFrom": [{"configMapRef": {"name": "envmap"}}]}],
                "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "claim"}},
                    {"name": "scratch", "ephemeral": {}},
                    {"name": "q", "projected": {"sources": [{"secret": {"name": "projected"}}, {"configMap": {"name": "kube-root-ca.crt"}}]}}]}}),
            ),
            (
                PODS,
                json!({"metadata": {"name": "q", "namespace": "a", "uid": "2"}, "spec": {"nodeName": "n2", "containers": [],
                "volumes": [{"name": "v", "secret": {"secretName": "other"}}]}}),
            ),
            (
                PODS,
                json!({"metadata": {"name": "m", "namespace": "a", "uid": "3", "annotations": {"kubernetes.io/config.mirror": "x"}},
                "spec": {"nodeName": "n1", "containers": [], "volumes": [{"name": "v", "secret": {"secretName": "mirrored"}}]}}),
            ),
            (
                PERSISTENT_VOLUMES,
                json!({"metadata": {"name": "pv"}, "spec": {"claimRef": {"namespace": "a", "name": "claim"},
                "csi": {"driver": "d", "volumeHandle": "h", "nodeStageSecretRef": {"namespace": "sys", "name": "stage"}}}}),
            ),
            (PERSISTENT_VOLUMES, json!({"metadata": {"name": "pv2"}, "spec": {}})),
            (
                VOLUME_ATTACHMENTS,
                json!({"metadata": {"name": "va"}, "spec": {"nodeName": "n1", "attacher": "d", "source": {}}}),
            ),
        ]);
        NodeAuthorizer::new(objects, rules)
    }

    /// `verb group/resource/subresource namespace name`, `-` for what is empty.
    fn ask(text: &str, field_selector: &str) -> Attributes {
        let words: Vec<&str> = text.split(' ').map(|w| if w == "-" { "" } else { w }).collect();
        let parts: Vec<&str> = words[1].split('/').collect();
        Attributes {
            user: Arc::new(UserInfo {
                name: "system:node:n1".into(),
                groups: vec!["system:nodes".into()],
                ..UserInfo::default()
            }),
            verb: words[0].into(),
            group: parts[0].into(),
            resource: parts[1].into(),
            subresource: parts.get(2).copied().unwrap_or_default().into(),
            namespace: words[2].into(),
            name: words[3].into(),
            is_resource: true,
            field_selector: field_selector.into(),
            ..Attributes::default()
        }
    }

    #[test]
    fn a_node_reads_what_its_pods_refer_to() {
        let authorizer = authorizer();
        for (request, allowed) in [
            ("get /secrets a pull", true),
            ("get /secrets a envsecret", true),
            ("watch /secrets a projected", true),
            ("list /secrets a projected", true),
            ("list /secrets a -", false),
            ("get /secrets a other", false),
            ("get /secrets b pull", false),
            ("get /secrets a mirrored", false),
            ("get /secrets sys stage", true),
            ("update /secrets a pull", false),
            ("get /configmaps a envmap", true),
            ("watch /configmaps a kube-root-ca.crt", true),
            ("get /configmaps a x", false),
            ("get /persistentvolumeclaims a claim", true),
            ("get /persistentvolumeclaims a p-scratch", true),
            ("update /persistentvolumeclaims/status a claim", true),
            ("get /persistentvolumeclaims a x", false),
            ("get /persistentvolumes - pv", true),
            ("get /persistentvolumes - pv2", false),
            ("get storage.k8s.io/volumeattachments - va", true),
            ("get storage.k8s.io/volumeattachments - x", false),
            ("create /serviceaccounts/token a robot", true),
            ("create /serviceaccounts/token a default", false),
            ("update /serviceaccounts a robot", false),
            ("get coordination.k8s.io/leases kube-node-lease n1", true),
            ("update coordination.k8s.io/leases kube-node-lease n2", false),
            ("create coordination.k8s.io/leases kube-node-lease -", true),
            ("get coordination.k8s.io/leases kube-system n1", false),
            ("patch storage.k8s.io/csinodes - n1", true),
            ("patch storage.k8s.io/csinodes - n2", false),
            ("get /nodes - n1", true),
            ("get /nodes - n2", false),
            ("list /nodes - -", false),
            ("patch /nodes/status - n1", true),
            ("delete /nodes - n1", false),
            ("get /pods a p", true),
            ("get /pods a q", false),
            ("list /pods - -", false),
            ("create /pods a -", true),
            ("patch /pods/status a p", true),
            ("create /events a -", true),
            ("list /services - -", true),
            ("create authentication.k8s.io/tokenreviews - -", true),
            ("delete /services a x", false),
        ] {
            assert_eq!(authorizer.authorize(&ask(request, "")) == Decision::Allow, allowed, "{request}");
        }
        assert_eq!(authorizer.authorize(&ask("watch /pods - -", "spec.nodeName=n1")), Decision::Allow);
        assert_ne!(authorizer.authorize(&ask("watch /pods - -", "spec.nodeName=n2")), Decision::Allow);
    }

    #[test]
    fn refusals_say_why() {
        let authorizer = authorizer();
        for (request, why) in [
            ("get /secrets a other", "no relationship found between node 'n1' and this object"),
            ("list /secrets a -", "No Object name found"),
            ("delete /secrets a pull", "can only read resources of this type"),
            ("get /nodes - n2", "node 'n1' cannot read 'n2', only its own Node object"),
            ("list /nodes - -", "node 'n1' cannot read all nodes, only its own Node object"),
        ] {
            assert_eq!(authorizer.authorize(&ask(request, "")), no(why), "{request}");
        }
        let mut stranger = ask("get /secrets a pull", "");
        stranger.user = Arc::new(UserInfo { name: "system:node:n1".into(), ..UserInfo::default() });
        assert_eq!(authorizer.authorize(&stranger), no(""));
    }
}
