//! RBAC: roles and bindings, compiled into an index from users and groups to rules. The index is built from the watch caches
//! and kept until one of the four resources changes.
pub mod escalation;
pub mod rules;

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject};

use super::lister::{CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, Lister, ROLE_BINDINGS, ROLES, ResourceId, typed};
use super::{Attributes, Decision};
use crate::authentication::UserInfo;

const SOURCES: [ResourceId; 4] = [CLUSTER_ROLES, CLUSTER_ROLE_BINDINGS, ROLES, ROLE_BINDINGS];

/// Roles and bindings of a cluster at one time.
#[derive(Default)]
pub struct Policy {
    pub cluster_roles: Vec<ClusterRole>,
    pub cluster_role_bindings: Vec<ClusterRoleBinding>,
    pub roles: Vec<Role>,
    pub role_bindings: Vec<RoleBinding>,
}

/// Who is granted what.
#[derive(Default)]
pub struct Index {
    cluster: Grants,
    namespaces: HashMap<String, Grants>,
    cluster_roles: HashMap<String, Arc<[PolicyRule]>>,
    roles: HashMap<(String, String), Arc<[PolicyRule]>>,
}

/// The grants of one scope by subject.
#[derive(Default)]
struct Grants {
    users: HashMap<String, Vec<Arc<Grant>>>,
    groups: HashMap<String, Vec<Arc<Grant>>>,
}

/// One binding and the rules of the role it names.
struct Grant {
    /// `ClusterRoleBinding "x" of ClusterRole "y"`.
    description: String,
    /// The error if there is no such role.
    rules: Result<Arc<[PolicyRule]>, String>,
}

/// The authorizer: an index that follows the caches.
pub struct Rbac {
    lister: Arc<dyn Lister>,
    index: ArcSwap<([i64; 4], Index)>,
}

// === impl Rbac ===

impl Rbac {
    pub fn new(lister: Arc<dyn Lister>) -> Self {
        Self { lister, index: ArcSwap::from_pointee(([i64::MIN; 4], Index::default())) }
    }

    /// The decision, and the reason for an `Allow`.
    pub fn authorize(&self, attributes: &Attributes) -> (Decision, String) {
        self.current().1.authorize(attributes)
    }

    /// All rules that hold for a user in a namespace (and cluster-wide), and what could not be resolved.
    pub fn rules_for(&self, user: &UserInfo, namespace: &str) -> (Vec<PolicyRule>, Vec<String>) {
        let current = self.current();
        let mut rules = Vec::new();
        let mut errors = Vec::new();
        for (grant, _) in current.1.grants(user, namespace) {
            match &grant.rules {
                Ok(granted) => rules.extend(granted.iter().cloned()),
                Err(error) => errors.push(error.clone()),
            }
        }
        (rules, errors)
    }

    /// The rules of the role that a binding in `namespace` (empty for a ClusterRoleBinding) names.
    pub fn role_rules(&self, role: &RoleRef, namespace: &str) -> Result<Arc<[PolicyRule]>, String> {
        self.current().1.resolve(role, namespace)
    }

    fn current(&self) -> Arc<([i64; 4], Index)> {
        let revisions = SOURCES.map(|source| self.lister.revision(source));
        let current = self.index.load_full();
        if current.0 == revisions {
            return current;
        }
        // Read after the revisions: an index can be newer than its label, never older.
        let next = Arc::new((revisions, Index::compile(&self.read())));
        self.index.store(next.clone());
        next
    }

    fn read(&self) -> Policy {
        fn all<K: serde::de::DeserializeOwned>(lister: &dyn Lister, source: ResourceId) -> Vec<K> {
            lister.list(source, None).iter().filter_map(|object| typed(object)).collect()
        }
        let lister = self.lister.as_ref();
        Policy {
            cluster_roles: all(lister, CLUSTER_ROLES),
            cluster_role_bindings: all(lister, CLUSTER_ROLE_BINDINGS),
            roles: all(lister, ROLES),
            role_bindings: all(lister, ROLE_BINDINGS),
        }
    }
}

// === impl Index ===

impl Index {
    pub fn compile(policy: &Policy) -> Self {
        let mut index = Self::default();
        for role in &policy.cluster_roles {
            let name = role.metadata.name.clone().unwrap_or_default();
            index.cluster_roles.insert(name, role.rules.clone().unwrap_or_default().into());
        }
        for role in &policy.roles {
            let namespace = role.metadata.namespace.clone().unwrap_or_default();
            let name = role.metadata.name.clone().unwrap_or_default();
            index.roles.insert((namespace, name), role.rules.clone().unwrap_or_default().into());
        }
        for binding in &policy.cluster_role_bindings {
            let name = binding.metadata.name.as_deref().unwrap_or_default();
            let grant = index.grant(format!("ClusterRoleBinding {name:?}"), &binding.role_ref, "");
            index.cluster.add(grant, binding.subjects.as_deref().unwrap_or_default(), "");
        }
        for binding in &policy.role_bindings {
            let name = binding.metadata.name.as_deref().unwrap_or_default();
            let namespace = binding.metadata.namespace.as_deref().unwrap_or_default();
            let description = format!("RoleBinding \"{name}/{namespace}\"");
            let grant = index.grant(description, &binding.role_ref, namespace);
            let grants = index.namespaces.entry(namespace.to_owned()).or_default();
            grants.add(grant, binding.subjects.as_deref().unwrap_or_default(), namespace);
        }
        index
    }

    fn grant(&self, binding: String, role: &RoleRef, namespace: &str) -> Arc<Grant> {
        let description = format!("{binding} of {} {:?}", role.kind, role.name);
        Arc::new(Grant { description, rules: self.resolve(role, namespace) })
    }

    fn resolve(&self, role: &RoleRef, namespace: &str) -> Result<Arc<[PolicyRule]>, String> {
        let found = match role.kind.as_str() {
            "ClusterRole" => self.cluster_roles.get(&role.name),
            "Role" => self.roles.get(&(namespace.to_owned(), role.name.clone())),
            other => return Err(format!("unsupported role reference kind: {other:?}")),
        };
        found
            .cloned()
            .ok_or_else(|| format!("{}.rbac.authorization.k8s.io {:?} not found", role.kind.to_lowercase(), role.name))
    }

    /// The grants that apply to a user in a namespace, cluster-wide ones first, each with the subject by which it applies.
    fn grants<'a>(
        &'a self,
        user: &'a UserInfo,
        namespace: &str,
    ) -> impl Iterator<Item = (&'a Arc<Grant>, (&'static str, &'a str))> {
        let local = if namespace.is_empty() { None } else { self.namespaces.get(namespace) };
        std::iter::once(&self.cluster).chain(local).flat_map(move |grants| {
            let by_user = grants.users.get(&user.name).into_iter().flatten().map(|g| (g, ("User", user.name.as_str())));
            let by_group = user.groups.iter().flat_map(move |group| {
                grants.groups.get(group).into_iter().flatten().map(move |g| (g, ("Group", group.as_str())))
            });
            by_user.chain(by_group)
        })
    }

    pub fn authorize(&self, attributes: &Attributes) -> (Decision, String) {
        let mut errors: Vec<&str> = Vec::new();
        for (grant, (kind, subject)) in self.grants(&attributes.user, &attributes.namespace) {
            match &grant.rules {
                Ok(granted) if granted.iter().any(|rule| rules::allows(rule, attributes)) => {
                    let reason =
                        format!("RBAC: allowed by {} to {}", grant.description, describe_subject(kind, subject));
                    return (Decision::Allow, reason);
                }
                Ok(_) => {}
                Err(error) if errors.contains(&error.as_str()) => {}
                Err(error) => errors.push(error),
            }
        }
        let reason = match errors.as_slice() {
            [] => String::new(),
            [one] => format!("RBAC: {one}"),
            many => format!("RBAC: [{}]", many.join(", ")),
        };
        (Decision::NoOpinion(reason), String::new())
    }
}

/// `User "x"`, `Group "g"`, `ServiceAccount "name/namespace"`.
fn describe_subject(kind: &str, subject: &str) -> String {
    let account = subject.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    match account {
        Some((namespace, name)) if kind == "User" => format!("ServiceAccount \"{name}/{namespace}\""),
        _ => format!("{kind} {subject:?}"),
    }
}

// === impl Grants ===

impl Grants {
    fn add(&mut self, grant: Arc<Grant>, subjects: &[Subject], default_namespace: &str) {
        for subject in subjects {
            let entry = match subject.kind.as_str() {
                "User" => self.users.entry(subject.name.clone()),
                "Group" => self.groups.entry(subject.name.clone()),
                "ServiceAccount" => {
                    let namespace = subject.namespace.as_deref().unwrap_or(default_namespace);
                    self.users.entry(format!("system:serviceaccount:{namespace}:{}", subject.name))
                }
                _ => continue,
            };
            entry.or_default().push(grant.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authorization::lister::fake::Objects;
    use serde_json::json;

    fn attributes(user: &str, groups: &[&str], verb: &str, resource: &str, namespace: &str, name: &str) -> Attributes {
        let user = UserInfo {
            name: user.into(),
            groups: groups.iter().map(|g| (*g).to_owned()).collect(),
            ..UserInfo::default()
        };
        Attributes {
            user: Arc::new(user),
            verb: verb.into(),
            resource: resource.into(),
            namespace: namespace.into(),
            name: name.into(),
            is_resource: true,
            ..Attributes::default()
        }
    }

    fn objects() -> Arc<Objects> {
        let role = |name: &str, verbs: &[&str]| {
            json!({"kind": "ClusterRole", "apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": name},
                "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": verbs}]})
        };
        let reference =
            |kind: &str, name: &str| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name});
        Objects::of([
            (CLUSTER_ROLES, role("reader", &["get", "list"])),
            (CLUSTER_ROLES, role("writer", &["*"])),
            (
                CLUSTER_ROLE_BINDINGS,
                json!({"metadata": {"name": "readers"}, "roleRef": reference("ClusterRole", "reader"),
                "subjects": [{"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": "devs"}]}),
            ),
            (
                CLUSTER_ROLE_BINDINGS,
                json!({"metadata": {"name": "lost"}, "roleRef": reference("ClusterRole", "gone"),
                "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "eve"}]}),
            ),
            (
                ROLE_BINDINGS,
                json!({"metadata": {"name": "writers", "namespace": "a"}, "roleRef": reference("ClusterRole", "writer"),
                "subjects": [{"kind": "ServiceAccount", "name": "robot", "namespace": "b"}, {"kind": "User", "name": "ann"}]}),
            ),
        ])
    }

    #[test]
    fn bindings_grant_in_their_scope() {
        let rbac = Rbac::new(objects());
        let robot = "system:serviceaccount:b:robot";
        for (request, expected) in [
            (attributes("bob", &["devs"], "list", "pods", "", ""), true),
            (attributes("bob", &["devs"], "list", "pods", "a", ""), true),
            (attributes("bob", &["devs"], "delete", "pods", "a", "x"), false),
            (attributes("bob", &[], "list", "pods", "a", ""), false),
            (attributes(robot, &[], "delete", "pods", "a", "x"), true),
            (attributes(robot, &[], "delete", "pods", "b", "x"), false),
            (attributes("ann", &[], "delete", "pods", "a", "x"), true),
            (attributes("ann", &[], "delete", "pods", "", "x"), false),
            (attributes("ann", &[], "delete", "secrets", "a", "x"), false),
        ] {
            assert_eq!(rbac.authorize(&request).0 == Decision::Allow, expected, "{request:?}");
        }
    }

    #[test]
    fn reasons_name_the_binding_or_what_is_missing() {
        let rbac = Rbac::new(objects());
        let (_, reason) = rbac.authorize(&attributes("bob", &["devs"], "get", "pods", "a", "x"));
        assert_eq!(reason, r#"RBAC: allowed by ClusterRoleBinding "readers" of ClusterRole "reader" to Group "devs""#);
        let (_, reason) = rbac.authorize(&attributes("system:serviceaccount:b:robot", &[], "get", "pods", "a", "x"));
        assert_eq!(
            reason,
            r#"RBAC: allowed by RoleBinding "writers/a" of ClusterRole "writer" to ServiceAccount "robot/b""#
        );
        let (decision, _) = rbac.authorize(&attributes("eve", &[], "get", "pods", "a", "x"));
        assert_eq!(
            decision,
            Decision::NoOpinion(r#"RBAC: clusterrole.rbac.authorization.k8s.io "gone" not found"#.into())
        );
    }

    #[test]
    fn a_changed_role_counts_at_once() {
        let objects = objects();
        let rbac = Rbac::new(objects.clone());
        let request = attributes("bob", &["devs"], "delete", "pods", "a", "x");
        assert_ne!(rbac.authorize(&request).0, Decision::Allow);
        objects.put(
            CLUSTER_ROLES,
            json!({"metadata": {"name": "reader"}, "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["delete"]}]}),
        );
        assert_eq!(rbac.authorize(&request).0, Decision::Allow);
    }
}
