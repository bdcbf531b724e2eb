//! Who writes an admission policy, or binds one, must be able to read what it takes as its parameters: the policy will read
//! them with the server's own rights. In Kubernetes the storage of policies sees to it.
use std::sync::Arc;

use apimachinery::facts;
use apimachinery::meta::split_api_version;
use apimachinery::status::{FieldError, StatusError};
use futures::future::BoxFuture;
use serde_json::Value;

use super::{AdmissionRequest, Plugin, text};
use crate::authentication::UserInfo;
use crate::authorization::lister::{Lister, ResourceId};
use crate::authorization::{Attributes, Authorizer, Decision};

const GROUP: &str = "admissionregistration.k8s.io";
const POLICIES: [ResourceId; 2] =
    [(GROUP, "v1", "validatingadmissionpolicies"), (GROUP, "v1", "mutatingadmissionpolicies")];
const BINDINGS: [&str; 2] = ["validatingadmissionpolicybindings", "mutatingadmissionpolicybindings"];

pub struct ParamAccess {
    pub lister: Arc<dyn Lister>,
    pub authorizer: Arc<Authorizer>,
}

/// What must be readable, as far as it is known.
struct Params<'a> {
    group: &'a str,
    version: &'a str,
    resource: &'a str,
    /// Why more than necessary is asked for.
    unknown: Option<String>,
}

impl<'a> Params<'a> {
    const ALL: Params<'static> = Params { group: "*", version: "*", resource: "*", unknown: None };

    fn of(kind: &'a Value) -> Params<'a> {
        let (api_version, name) = (text(kind, "/apiVersion"), text(kind, "/kind"));
        if api_version.matches('/').count() > 1 {
            return Params {
                unknown: Some(format!("unable to parse paramKind &{{{api_version} {name}}}")),
                ..Params::ALL
            };
        }
        let (group, version) = split_api_version(api_version);
        match facts::kind(group, version, name) {
            Some(known) => Params { group, version, resource: known.resource, unknown: None },
            None => {
                let unknown = Some(format!("unable to resolve paramKind &{{{api_version} {name}}}"));
                Params { group, version, resource: "*", unknown }
            }
        }
    }
}

/// As Go prints a user.
fn shown(user: &UserInfo) -> String {
    let extra: Vec<String> = user.extra.iter().map(|(key, all)| format!("{key}:[{}]", all.join(" "))).collect();
    format!("&{{{} {} [{}] map[{}]}}", user.name, user.uid, user.groups.join(" "), extra.join(" "))
}

impl ParamAccess {
    async fn may(&self, user: &Arc<UserInfo>, verb: &str, params: &Params<'_>, namespace: &str, name: &str) -> bool {
        let question = Attributes {
            user: user.clone(),
            verb: verb.to_owned(),
            group: params.group.to_owned(),
            version: params.version.to_owned(),
            resource: params.resource.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            is_resource: true,
            ..Attributes::default()
        };
        self.authorizer.authorize(&question).await == Decision::Allow
    }

    /// The field that is refused, and why. As `authorize` of `validatingadmissionpolicy`.
    async fn policy(&self, user: &Arc<UserInfo>, new: &Value, old: &Value) -> Option<FieldError> {
        let kind = new.pointer("/spec/paramKind").filter(|kind| !kind.is_null())?;
        if old.pointer("/spec/paramKind") == Some(kind) || self.may(user, "get", &Params::of(kind), "*", "*").await {
            return None;
        }
        let (api_version, kind, user) = (text(kind, "/apiVersion"), text(kind, "/kind"), shown(user));
        let why = format!(
            "user {user} must have \"get\" permission on all objects of the referenced paramKind (kind={kind}, apiVersion={api_version})"
        );
        Some(FieldError::forbidden("spec.paramKind", why))
    }

    /// As `authorize` of `validatingadmissionpolicybinding`.
    async fn binding(
        &self,
        user: &Arc<UserInfo>,
        policies: ResourceId,
        new: &Value,
        old: &Value,
    ) -> Option<FieldError> {
        let same = |path: &str| new.pointer(path) == old.pointer(path);
        let reference = new.pointer("/spec/paramRef").filter(|reference| !reference.is_null())?;
        if same("/spec/paramRef") && same("/spec/policyName") {
            return None;
        }
        let policy_name = text(new, "/spec/policyName");
        let policy = self.lister.get(policies, "", policy_name);
        let policy: Option<Value> = policy.and_then(|policy| serde_json::from_slice(&policy.json()).ok());
        let kind = policy.as_ref().and_then(|policy| policy.pointer("/spec/paramKind"));
        let params = match (&policy, kind) {
            (None, _) => Params { unknown: Some(format!("unable to get policy {policy_name}")), ..Params::ALL },
            (Some(_), None) => Params::ALL,
            (Some(_), Some(kind)) => Params::of(kind),
        };
        let (name, namespace) = (text(reference, "/name"), text(reference, "/namespace"));
        let verb = if name.is_empty() { "list" } else { "get" };
        if self.may(user, verb, &params, namespace, name).await {
            return None;
        }
        let user = shown(user);
        let why = match params.unknown {
            Some(unknown) => format!(
                "{unknown} to determine minimum required permissions and user {user} does not have {verb:?} permission for all groups, versions and resources"
            ),
            None => format!("user {user} does not have {verb:?} permission on the object referenced by paramRef"),
        };
        Some(FieldError::forbidden("spec.paramRef", why))
    }
}

impl Plugin for ParamAccess {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.attributes.group == GROUP && request.attributes.subresource.is_empty() && request.writes()
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(async {
            let (attributes, new, old) = (request.attributes, request.new_object(), request.old());
            if attributes.user.in_group("system:masters") {
                return Ok(());
            }
            let refused = if POLICIES.iter().any(|policies| policies.2 == attributes.resource) {
                self.policy(&attributes.user, new, old).await
            } else if let Some(at) = BINDINGS.iter().position(|bindings| *bindings == attributes.resource) {
                self.binding(&attributes.user, POLICIES[at], new, old).await
            } else {
                None
            };
            let name = text(new, "/metadata/name");
            refused.map_or(Ok(()), |error| Err(StatusError::invalid(GROUP, text(new, "/kind"), name, &[error])))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing;
    use crate::authorization::lister::fake::Objects;
    use crate::authorization::lister::{CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES};
    use serde_json::json;

    /// `getter` may get ConfigMaps, `lister` may list them.
    fn plugin() -> ParamAccess {
        let role = |name: &str, verb: &str| json!({"metadata": {"name": name}, "rules": [{"apiGroups": [""], "resources": ["configmaps"], "verbs": [verb]}]});
        let binding = |name: &str| {
            json!({"metadata": {"name": name}, "subjects": [{"kind": "User", "name": name}],
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}})
        };
        let objects = Objects::of([
            (CLUSTER_ROLES, role("getter", "get")),
            (CLUSTER_ROLES, role("lister", "list")),
            (CLUSTER_ROLE_BINDINGS, binding("getter")),
            (CLUSTER_ROLE_BINDINGS, binding("lister")),
            (POLICIES[0], json!({"metadata": {"name": "p"}, "spec": {"paramKind": kind("ConfigMap")}})),
        ]);
        let authorizer = Arc::new(Authorizer::with(&["RBAC".to_owned()], objects.clone()).unwrap());
        ParamAccess { lister: objects, authorizer }
    }

    fn kind(name: &str) -> Value {
        json!({"apiVersion": "v1", "kind": name})
    }

    async fn write(user: &str, resource: &str, spec: Value, old: Option<Value>) -> Result<(), String> {
        let of = |spec: Value| json!({"kind": "K", "metadata": {"name": "x"}, "spec": spec});
        let what = format!("{GROUP}/{resource}");
        testing::write(&plugin(), (user, &["g"]), &what, of(spec), old.map(of)).await
    }

    #[tokio::test]
    async fn a_policy_needs_all_of_its_kind_of_parameters_to_be_readable() {
        let spec = json!({"paramKind": kind("ConfigMap")});
        for resource in POLICIES.map(|policies| policies.2) {
            assert_eq!(write("getter", resource, spec.clone(), None).await, Ok(()));
            assert_eq!(
                write("lister", resource, spec.clone(), None).await,
                Err("K.admissionregistration.k8s.io \"x\" is invalid: spec.paramKind: Forbidden: user &{lister  [g] map[]} must have \"get\" permission on all objects of the referenced paramKind (kind=ConfigMap, apiVersion=v1)".to_owned())
            );
            assert!(write("getter", resource, json!({"paramKind": kind("Nothing")}), None).await.is_err());
            assert_eq!(write("lister", resource, spec.clone(), Some(spec.clone())).await, Ok(()));
            assert_eq!(write("nobody", resource, json!({}), None).await, Ok(()));
        }
    }

    #[tokio::test]
    async fn a_binding_needs_its_own_parameters_to_be_readable() {
        let named = json!({"policyName": "p", "paramRef": {"name": "c", "namespace": "n"}});
        let selected = json!({"policyName": "p", "paramRef": {"selector": {}}});
        let unknown = json!({"policyName": "none", "paramRef": {"name": "c"}});
        for (user, spec, refused) in [
            ("getter", &named, ""),
            ("lister", &selected, ""),
            (
                "lister",
                &named,
                "user &{lister  [g] map[]} does not have \"get\" permission on the object referenced by paramRef",
            ),
            (
                "getter",
                &selected,
                "user &{getter  [g] map[]} does not have \"list\" permission on the object referenced by paramRef",
            ),
            ("getter", &unknown, "unable to get policy none to determine minimum required permissions and user"),
        ] {
            let told = write(user, BINDINGS[0], spec.clone(), None).await;
            match refused {
                "" => assert_eq!(told, Ok(()), "{user} {spec}"),
                words => assert!(told.unwrap_err().contains(words), "{user} {spec}"),
            }
        }
        assert_eq!(write("nobody", BINDINGS[0], named.clone(), Some(named)).await, Ok(()));
    }
}
