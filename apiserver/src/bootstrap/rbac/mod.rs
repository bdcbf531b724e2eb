//! The default roles and bindings, and their reconciliation with what the cluster has: what is missing is added, what
//! administrators added stays, and `rbac.authorization.kubernetes.io/autoupdate: "false"` protects an object.
//! As `rbacrest`'s `PolicyData` and `reconciliation`.
mod table;

use std::collections::BTreeMap;

use component_base::feature_gates::Feature;
use k8s_openapi::api::rbac::v1::{
    AggregationRule, ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};

use crate::authorization::rbac::rules;
use crate::features;

const GROUP: &str = "rbac.authorization.k8s.io";
const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";
const BOOTSTRAPPING: (&str, &str) = ("kubernetes.io/bootstrapping", "rbac-defaults");

/// A role of the table. Lists are words; `core` is the group without a name.
struct RoleFacts {
    name: &'static str,
    /// Empty for a ClusterRole.
    namespace: &'static str,
    /// The aggregated roles that it is part of.
    aggregate_to: &'static str,
    /// The aggregation that makes its rules.
    aggregates: &'static str,
    rules: &'static [RuleFacts],
}

struct RuleFacts {
    verbs: &'static str,
    groups: &'static str,
    resources: &'static str,
    names: &'static str,
    urls: &'static str,
}

struct BindingFacts {
    name: &'static str,
    namespace: &'static str,
    role: &'static str,
    subjects: &'static [SubjectFacts],
}

struct SubjectFacts {
    kind: &'static str,
    namespace: &'static str,
    name: &'static str,
}

const fn cluster_role(name: &'static str, rules: &'static [RuleFacts]) -> RoleFacts {
    RoleFacts { name, namespace: "", aggregate_to: "", aggregates: "", rules }
}

const fn role(namespace: &'static str, name: &'static str, rules: &'static [RuleFacts]) -> RoleFacts {
    RoleFacts { name, namespace, aggregate_to: "", aggregates: "", rules }
}

const fn aggregate(name: &'static str, aggregates: &'static str) -> RoleFacts {
    RoleFacts { name, namespace: "", aggregate_to: "", aggregates, rules: &[] }
}

const fn on(verbs: &'static str, groups: &'static str, resources: &'static str) -> RuleFacts {
    RuleFacts { verbs, groups, resources, names: "", urls: "" }
}

const fn named(verbs: &'static str, groups: &'static str, resources: &'static str, names: &'static str) -> RuleFacts {
    RuleFacts { verbs, groups, resources, names, urls: "" }
}

const fn urls(verbs: &'static str, urls: &'static str) -> RuleFacts {
    RuleFacts { verbs, groups: "", resources: "", names: "", urls }
}

const fn user(name: &'static str) -> SubjectFacts {
    SubjectFacts { kind: "User", namespace: "", name }
}

const fn group(name: &'static str) -> SubjectFacts {
    SubjectFacts { kind: "Group", namespace: "", name }
}

const fn service_account(namespace: &'static str, name: &'static str) -> SubjectFacts {
    SubjectFacts { kind: "ServiceAccount", namespace, name }
}

/// What comes with features that are off by default: roles, and rules of roles that there are anyway. As the branches of
/// `bootstrappolicy`.
const OF_FEATURES: &[(Feature, RoleFacts)] = &[
    (
        Feature::ClusterTrustBundle,
        cluster_role("system:node", &[on("get list watch", "certificates.k8s.io", "clustertrustbundles")]),
    ),
    (
        Feature::PodCertificateRequest,
        cluster_role("system:node", &[on("create get list watch", "certificates.k8s.io", "podcertificaterequests")]),
    ),
    (
        Feature::ClusterTrustBundle,
        cluster_role(
            "system:cluster-trust-bundle-discovery",
            &[on("get list watch", "certificates.k8s.io", "clustertrustbundles")],
        ),
    ),
    (
        Feature::PodCertificateRequest,
        cluster_role(
            "system:controller:podcertificaterequestcleaner",
            &[on("delete get list watch", "certificates.k8s.io", "podcertificaterequests")],
        ),
    ),
    (
        Feature::ClusterTrustBundle,
        cluster_role(
            "system:controller:kube-apiserver-serving-clustertrustbundle-publisher",
            &[
                named("attest", "certificates.k8s.io", "signers", "kubernetes.io/kube-apiserver-serving"),
                on("create delete list update watch", "certificates.k8s.io", "clustertrustbundles"),
                on("create patch update", "core events.k8s.io", "events"),
            ],
        ),
    ),
];
const BINDINGS_OF_FEATURES: &[(Feature, BindingFacts)] = &[
    (
        Feature::ClusterTrustBundle,
        BindingFacts {
            name: "system:cluster-trust-bundle-discovery",
            namespace: "",
            role: "system:cluster-trust-bundle-discovery",
            subjects: &[group("system:serviceaccounts")],
        },
    ),
    (
        Feature::PodCertificateRequest,
        BindingFacts {
            name: "system:controller:podcertificaterequestcleaner",
            namespace: "",
            role: "system:controller:podcertificaterequestcleaner",
            subjects: &[service_account("kube-system", "podcertificaterequestcleaner")],
        },
    ),
    (
        Feature::ClusterTrustBundle,
        BindingFacts {
            name: "system:controller:kube-apiserver-serving-clustertrustbundle-publisher",
            namespace: "",
            role: "system:controller:kube-apiserver-serving-clustertrustbundle-publisher",
            subjects: &[service_account("kube-system", "kube-apiserver-serving-clustertrustbundle-publisher")],
        },
    ),
];

/// The rules that features which are on add to a role.
fn rules_of_features(name: &str, on: impl Fn(Feature) -> bool) -> Vec<PolicyRule> {
    let added = OF_FEATURES.iter().filter(|(feature, facts)| facts.name == name && on(*feature));
    added.flat_map(|(_, facts)| facts.rules()).collect()
}

pub fn cluster_roles() -> Vec<ClusterRole> {
    cluster_roles_with(features::enabled)
}

fn cluster_roles_with(on: impl Fn(Feature) -> bool) -> Vec<ClusterRole> {
    let known = |name: &str| table::CLUSTER_ROLES.iter().any(|facts| facts.name == name);
    let more = OF_FEATURES.iter().filter(|(feature, facts)| on(*feature) && !known(facts.name));
    let more = more.map(|(_, facts)| ClusterRole {
        metadata: metadata(facts.name, "", ""),
        aggregation_rule: None,
        rules: Some(facts.rules()),
    });
    let roles = table::CLUSTER_ROLES.iter().map(|facts| ClusterRole {
        metadata: metadata(facts.name, "", facts.aggregate_to),
        aggregation_rule: (!facts.aggregates.is_empty()).then(|| AggregationRule {
            cluster_role_selectors: Some(vec![LabelSelector {
                match_labels: Some([(aggregation_label(facts.aggregates), "true".to_owned())].into()),
                match_expressions: None,
            }]),
        }),
        rules: facts.aggregates.is_empty().then(|| {
            let mut rules = facts.rules();
            rules.extend(rules_of_features(facts.name, &on));
            rules
        }),
    });
    roles.chain(more).collect()
}

pub fn roles() -> Vec<Role> {
    let roles = table::ROLES.iter();
    roles
        .map(|facts| Role { metadata: metadata(facts.name, facts.namespace, ""), rules: Some(facts.rules()) })
        .collect()
}

pub fn cluster_role_bindings() -> Vec<ClusterRoleBinding> {
    let more = BINDINGS_OF_FEATURES.iter().filter(|(feature, _)| features::enabled(*feature)).map(|(_, facts)| facts);
    let bindings = table::CLUSTER_ROLE_BINDINGS.iter().chain(more).map(|facts| ClusterRoleBinding {
        metadata: metadata(facts.name, "", ""),
        role_ref: facts.role_ref("ClusterRole"),
        subjects: facts.subjects(),
    });
    bindings.collect()
}

pub fn role_bindings() -> Vec<RoleBinding> {
    let bindings = table::ROLE_BINDINGS.iter().map(|facts| RoleBinding {
        metadata: metadata(facts.name, facts.namespace, ""),
        role_ref: facts.role_ref("Role"),
        subjects: facts.subjects(),
    });
    bindings.collect()
}

/// The rules of one default ClusterRole; none for an unknown name.
pub fn cluster_role_rules(name: &str) -> Vec<PolicyRule> {
    let mut rules: Vec<PolicyRule> =
        table::CLUSTER_ROLES.iter().find(|facts| facts.name == name).map(RoleFacts::rules).unwrap_or_default();
    rules.extend(rules_of_features(name, features::enabled));
    rules
}

/// What a role lacks of its default; None if nothing. Works on the metadata and rules of Roles and ClusterRoles.
pub fn missing_from_role(
    metadata: &ObjectMeta,
    rules: Option<&[PolicyRule]>,
    default_metadata: &ObjectMeta,
    default_rules: Option<&[PolicyRule]>,
) -> Option<(ObjectMeta, Option<Vec<PolicyRule>>)> {
    let merged_metadata = merge_metadata(metadata, default_metadata)?;
    let held = rules.unwrap_or_default();
    let missing = rules::uncovered(held, default_rules.unwrap_or_default());
    if merged_metadata == *metadata && missing.is_empty() {
        return None;
    }
    let merged = match (rules, missing.is_empty()) {
        (rules, true) => rules.map(<[_]>::to_vec),
        (_, false) => Some(held.iter().cloned().chain(rules::compact(missing)).collect()),
    };
    Some((merged_metadata, merged))
}

/// What is to be done about a binding.
#[derive(Debug, PartialEq)]
pub enum BindingChange {
    None,
    /// With these metadata and subjects.
    Update(ObjectMeta, Option<Vec<Subject>>),
    /// A roleRef cannot be changed: delete it and create the default.
    Recreate,
}

/// Compares a binding with its default.
pub fn missing_from_binding(
    existing: (&ObjectMeta, &RoleRef, Option<&[Subject]>),
    default: (&ObjectMeta, &RoleRef, Option<&[Subject]>),
) -> BindingChange {
    let Some(metadata) = merge_metadata(existing.0, default.0) else { return BindingChange::None };
    let same_role = existing.1.kind == default.1.kind && existing.1.name == default.1.name;
    if !same_role {
        return BindingChange::Recreate;
    }
    let held = existing.2.unwrap_or_default();
    let missing: Vec<Subject> = default.2.unwrap_or_default().iter().filter(|s| !held.contains(s)).cloned().collect();
    if metadata == *existing.0 && missing.is_empty() {
        return BindingChange::None;
    }
    let subjects = match (existing.2, missing.is_empty()) {
        (None, true) => None,
        _ => Some(held.iter().cloned().chain(missing).collect()),
    };
    BindingChange::Update(metadata, subjects)
}

/// Adds labels and annotations that are missing; None for an object that must not be touched.
fn merge_metadata(existing: &ObjectMeta, default: &ObjectMeta) -> Option<ObjectMeta> {
    if existing.annotations.as_ref().and_then(|a| a.get(AUTOUPDATE)).is_some_and(|v| v == "false") {
        return None;
    }
    let merge = |existing: &Option<BTreeMap<String, String>>, default: &Option<BTreeMap<String, String>>| {
        let mut merged = default.clone().unwrap_or_default();
        merged.extend(existing.clone().unwrap_or_default());
        (!merged.is_empty()).then_some(merged)
    };
    Some(ObjectMeta {
        labels: merge(&existing.labels, &default.labels),
        annotations: merge(&existing.annotations, &default.annotations),
        ..existing.clone()
    })
}

fn metadata(name: &str, namespace: &str, aggregate_to: &str) -> ObjectMeta {
    let mut labels: BTreeMap<String, String> = [(BOOTSTRAPPING.0.to_owned(), BOOTSTRAPPING.1.to_owned())].into();
    labels.extend(aggregate_to.split_whitespace().map(|to| (aggregation_label(to), "true".to_owned())));
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: (!namespace.is_empty()).then(|| namespace.to_owned()),
        labels: Some(labels),
        annotations: Some([(AUTOUPDATE.to_owned(), "true".to_owned())].into()),
        ..ObjectMeta::default()
    }
}

fn aggregation_label(to: &str) -> String {
    format!("{GROUP}/aggregate-to-{to}")
}

fn words(text: &str) -> Option<Vec<String>> {
    let words: Vec<String> =
        text.split_whitespace().map(|w| if w == "core" { String::new() } else { w.to_owned() }).collect();
    (!words.is_empty()).then_some(words)
}

// === impl RoleFacts ===

impl RoleFacts {
    const fn aggregated_to(self, roles: &'static str) -> Self {
        Self { aggregate_to: roles, ..self }
    }

    fn rules(&self) -> Vec<PolicyRule> {
        let rules = self.rules.iter().map(|facts| PolicyRule {
            verbs: words(facts.verbs).unwrap_or_default(),
            api_groups: words(facts.groups),
            resources: words(facts.resources),
            resource_names: words(facts.names),
            non_resource_urls: words(facts.urls),
        });
        rules.collect()
    }
}

// === impl BindingFacts ===

impl BindingFacts {
    fn role_ref(&self, kind: &str) -> RoleRef {
        RoleRef { api_group: Some(GROUP.to_owned()), kind: kind.to_owned(), name: self.role.to_owned() }
    }

    fn subjects(&self) -> Option<Vec<Subject>> {
        let subjects = self.subjects.iter().map(|facts| Subject {
            api_group: (facts.kind != "ServiceAccount").then(|| GROUP.to_owned()),
            kind: facts.kind.to_owned(),
            namespace: (!facts.namespace.is_empty()).then(|| facts.namespace.to_owned()),
            name: facts.name.to_owned(),
        });
        (!self.subjects.is_empty()).then(|| subjects.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Serialize;
    use serde_json::Value;

    /// Items of a file of the reference data, in its order, without the nulls that stand for absence.
    fn reference(name: &str) -> Option<Vec<Value>> {
        let path = format!("{}/../../shared/kubernetes-1.36/rbac/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
        let path = if std::path::Path::new(&path).exists() {
            path
        } else {
            format!("{}/../../../shared/kubernetes-1.36/rbac/{name}.yaml", env!("CARGO_MANIFEST_DIR"))
        };
        let text = std::fs::read_to_string(path).ok()?;
        let documents = apimachinery::yaml::documents(&text).unwrap();
        let mut items = documents[0]["items"].as_array().unwrap().clone();
        for item in &mut items {
            item.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        }
        Some(items)
    }

    fn same(ours: Vec<impl Serialize>, files: &[&str]) {
        let mut theirs = Vec::new();
        for file in files {
            let Some(items) = reference(file) else {
                eprintln!("no reference data: {file} not compared");
                return;
            };
            theirs.extend(items);
        }
        let ours: Vec<Value> = ours.into_iter().map(|o| serde_json::to_value(o).unwrap()).collect();
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours, theirs);
        }
    }

    #[test]
    fn the_defaults_are_those_of_kubernetes() {
        same(cluster_roles(), &["cluster-roles", "controller-roles"]);
        same(cluster_role_bindings(), &["cluster-role-bindings", "controller-role-bindings"]);
        same(roles(), &["namespace-roles"]);
        same(role_bindings(), &["namespace-role-bindings"]);
    }

    #[test]
    fn features_bring_roles_and_rules() {
        let (without, with) = (cluster_roles_with(|_| false), cluster_roles_with(|_| true));
        let name = |role: &ClusterRole| role.metadata.name.clone().unwrap();
        let more: Vec<String> =
            with.iter().map(name).filter(|n| !without.iter().any(|role| name(role) == *n)).collect();
        assert_eq!(
            more,
            [
                "system:cluster-trust-bundle-discovery",
                "system:controller:podcertificaterequestcleaner",
                "system:controller:kube-apiserver-serving-clustertrustbundle-publisher",
            ]
        );
        let of_nodes = |roles: &[ClusterRole]| {
            roles.iter().find(|role| name(role) == "system:node").unwrap().rules.as_ref().unwrap().len()
        };
        assert_eq!(of_nodes(&with), of_nodes(&without) + 2);
    }

    #[test]
    fn a_role_gets_what_it_lacks_and_keeps_what_it_has() {
        let default =
            cluster_roles().into_iter().find(|r| r.metadata.name.as_deref() == Some("system:basic-user")).unwrap();
        let compare = |role: &ClusterRole| {
            missing_from_role(&role.metadata, role.rules.as_deref(), &default.metadata, default.rules.as_deref())
        };
        assert_eq!(compare(&default), None);

        let mut emptied = default.clone();
        emptied.rules = None;
        let (_, rules) = compare(&emptied).unwrap();
        assert!(rules::uncovered(&rules.unwrap(), default.rules.as_ref().unwrap()).is_empty());

        let mut extended = default.clone();
        extended.rules.as_mut().unwrap().push(cluster_role_rules("cluster-admin").remove(0));
        extended.metadata.labels.as_mut().unwrap().insert("mine".into(), "1".into());
        assert_eq!(compare(&extended), None);

        extended.metadata.annotations = None;
        let (metadata, rules) = compare(&extended).unwrap();
        assert_eq!(metadata.annotations, default.metadata.annotations);
        assert_eq!(rules, extended.rules);

        emptied.metadata.annotations.as_mut().unwrap().insert(AUTOUPDATE.into(), "false".into());
        assert_eq!(compare(&emptied), None);
    }

    #[test]
    fn a_binding_gets_its_subjects_back_and_a_wrong_role_is_replaced() {
        let default = cluster_role_bindings().into_iter().find(|b| b.subjects.is_some()).unwrap();
        let compare = |binding: &ClusterRoleBinding| {
            missing_from_binding(
                (&binding.metadata, &binding.role_ref, binding.subjects.as_deref()),
                (&default.metadata, &default.role_ref, default.subjects.as_deref()),
            )
        };
        assert_eq!(compare(&default), BindingChange::None);
        let mut binding = default.clone();
        binding.subjects = None;
        assert_eq!(compare(&binding), BindingChange::Update(default.metadata.clone(), default.subjects.clone()));
        binding.role_ref.name = "other".into();
        assert_eq!(compare(&binding), BindingChange::Recreate);
    }
}
