//! Who may do what: the authorizers that `--authorization-mode` names, asked in their order; the first that has an opinion
//! decides. RBAC and the node authorizer read the watch caches.

pub mod lister;
pub mod node;
pub mod rbac;
pub mod reviews;

use crate::authentication::UserInfo;
use crate::endpoints::Endpoint;
use crate::options::Options;
use crate::storage::Store;
use apimachinery::meta::Gvr;
use apimachinery::status::StatusError;
use k8s_openapi::api::authorization::v1::{NonResourceRule, ResourceRule, SubjectRulesReviewStatus};
use k8s_openapi::api::rbac::v1::PolicyRule;
use lister::Lister;
use node::NodeAuthorizer;
use rbac::Rbac;
use std::sync::Arc;

/// What a request does, as authorizers and admission see it. Absent parts are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub user: Arc<UserInfo>,
    /// `get list watch create update patch delete deletecollection` …; the lower-case method for a path that is no resource.
    pub verb: String,
    pub group: String,
    pub version: String,
    pub resource: String,
    pub subresource: String,
    pub namespace: String,
    pub name: String,
    pub path: String,
    /// False for paths such as `/healthz`.
    pub is_resource: bool,
    /// The raw selectors of list, watch and deletecollection.
    pub field_selector: String,
    pub label_selector: String,
}

/// An authorizer's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Allow,
    NoOpinion(String),
}

/// The chain of authorizers.
pub struct Authorizer {
    modes: Vec<Mode>,
    rbac: Arc<Rbac>,
}

enum Mode {
    AlwaysAllow,
    AlwaysDeny,
    Rbac,
    Node(NodeAuthorizer),
}

// === impl Authorizer ===

impl Authorizer {
    pub fn new(options: &Options, store: Arc<Store>) -> anyhow::Result<Self> {
        Self::with(&options.authorization_mode, store)
    }

    /// `modes` as `--authorization-mode` has them.
    pub fn with(modes: &[String], lister: Arc<dyn Lister>) -> anyhow::Result<Self> {
        let rbac = Arc::new(Rbac::new(lister.clone()));
        let mut chain = Vec::new();
        for mode in modes {
            chain.push(match mode.as_str() {
                "AlwaysAllow" => Mode::AlwaysAllow,
                "AlwaysDeny" => Mode::AlwaysDeny,
                "RBAC" => Mode::Rbac,
                "Node" => Mode::Node(NodeAuthorizer::new(
                    lister.clone(),
                    crate::bootstrap::rbac::cluster_role_rules("system:node"),
                )),
                other => anyhow::bail!(
                    "--authorization-mode: {other:?} is not a known mode; known are AlwaysAllow, AlwaysDeny, Node, RBAC"
                ),
            });
        }
        anyhow::ensure!(!chain.is_empty(), "--authorization-mode: at least one mode is needed");
        Ok(Self { modes: chain, rbac })
    }

    pub async fn authorize(&self, attributes: &Attributes) -> Decision {
        self.explain(attributes).0
    }

    /// The decision, and the reason for an `Allow`.
    pub fn explain(&self, attributes: &Attributes) -> (Decision, String) {
        // The privileged group is not subject to any mode.
        if attributes.user.in_group("system:masters") {
            return (Decision::Allow, String::new());
        }
        let mut reasons: Vec<String> = Vec::new();
        for mode in &self.modes {
            let (decision, reason) = match mode {
                Mode::AlwaysAllow => (Decision::Allow, String::new()),
                Mode::AlwaysDeny => (Decision::NoOpinion("Everything is forbidden.".to_owned()), String::new()),
                Mode::Rbac => self.rbac.authorize(attributes),
                Mode::Node(node) => (node.authorize(attributes), String::new()),
            };
            match decision {
                Decision::NoOpinion(why) if why.is_empty() => {}
                Decision::NoOpinion(why) => reasons.push(why),
                decided => return (decided, reason),
            }
        }
        (Decision::NoOpinion(reasons.join("\n")), String::new())
    }

    /// What a user may do in a namespace, as far as the modes can tell. As `union.RulesFor`.
    pub fn rules_for(&self, user: &UserInfo, namespace: &str) -> SubjectRulesReviewStatus {
        let (mut rules, mut errors) = (SubjectRulesReviewStatus::default(), Vec::new());
        let all = || Some(vec!["*".to_owned()]);
        for mode in &self.modes {
            let granted = match mode {
                Mode::AlwaysAllow => vec![
                    PolicyRule {
                        api_groups: all(),
                        resources: all(),
                        verbs: vec!["*".to_owned()],
                        ..Default::default()
                    },
                    PolicyRule { non_resource_urls: all(), verbs: vec!["*".to_owned()], ..Default::default() },
                ],
                Mode::AlwaysDeny => Vec::new(),
                Mode::Rbac => {
                    let (granted, failed) = self.rbac.rules_for(user, namespace);
                    errors.extend(failed);
                    granted
                }
                Mode::Node(_) => {
                    if node::node_of(user).is_some() {
                        rules.incomplete = true;
                        errors.push("node authorizer does not support user rule resolution".to_owned());
                    }
                    Vec::new()
                }
            };
            for PolicyRule { api_groups, non_resource_urls, resource_names, resources, verbs } in granted {
                let some = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
                if some(&non_resource_urls) {
                    rules.non_resource_rules.push(NonResourceRule { non_resource_urls, verbs: verbs.clone() });
                }
                if some(&resources) {
                    rules.resource_rules.push(ResourceRule { api_groups, resource_names, resources, verbs });
                }
            }
        }
        rules.evaluation_error = match errors.as_slice() {
            [] => None,
            [one] => Some(one.clone()),
            many => Some(format!("[{}]", many.join(", "))),
        };
        rules
    }

    /// RBAC's index, whether or not it is one of the modes: role writes are checked against it.
    pub fn rbac(&self) -> &Rbac {
        &self.rbac
    }

    pub fn uses_rbac(&self) -> bool {
        self.modes.iter().any(|mode| matches!(mode, Mode::Rbac))
    }
}

/// The 403 for a request that no authorizer allowed; `reason` is that of the decision. As `responsewriters.Forbidden`.
pub fn forbidden(attributes: &Attributes, reason: &str) -> StatusError {
    let mut why = forbidden_message(attributes).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    if !reason.is_empty() {
        why = format!("{why}: {reason}");
    }
    StatusError::forbidden(&attributes.group, &attributes.resource, &attributes.name, &why)
}

fn forbidden_message(attributes: &Attributes) -> String {
    let Attributes { user, verb, group, namespace, path, .. } = attributes;
    let user = &user.name;
    if !attributes.is_resource {
        return format!("User {user:?} cannot {verb} path {path:?}");
    }
    let resource = match attributes.subresource.as_str() {
        "" => attributes.resource.clone(),
        subresource => format!("{}/{subresource}", attributes.resource),
    };
    let scope = match namespace.as_str() {
        "" => "at the cluster scope".to_owned(),
        namespace => format!("in the namespace {namespace:?}"),
    };
    format!("User {user:?} cannot {verb} resource {resource:?} in API group {group:?} {scope}")
}

/// The access reviews: (resource, subresource, endpoint).
pub fn endpoints() -> Vec<(Gvr, &'static str, Arc<dyn Endpoint>)> {
    reviews::endpoints()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lister::fake::Objects;

    fn request(path_or_resource: &str, namespace: &str, name: &str) -> Attributes {
        let user = Arc::new(UserInfo { name: "x".into(), ..UserInfo::default() });
        if path_or_resource.starts_with('/') {
            let path = path_or_resource.to_owned();
            return Attributes { user, verb: "get".into(), path, ..Attributes::default() };
        }
        let (rest, subresource) = path_or_resource.split_once('/').unwrap_or((path_or_resource, ""));
        let (resource, group) = rest.split_once('.').unwrap_or((rest, ""));
        Attributes {
            user,
            verb: "list".into(),
            group: group.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            namespace: namespace.into(),
            name: name.into(),
            is_resource: true,
            ..Attributes::default()
        }
    }

    #[test]
    fn forbidden_says_what_kubernetes_says() {
        for (attributes, reason, message) in [
            (
                request("pods", "y", ""),
                "",
                r#"pods is forbidden: User "x" cannot list resource "pods" in API group "" in the namespace "y""#,
            ),
            (
                request("deployments.apps/scale", "y", "web"),
                "",
                r#"deployments.apps "web" is forbidden: User "x" cannot list resource "deployments/scale" in API group "apps" in the namespace "y""#,
            ),
            (
                request("nodes", "", ""),
                "because",
                r#"nodes is forbidden: User "x" cannot list resource "nodes" in API group "" at the cluster scope: because"#,
            ),
            (request("/metrics", "", ""), "", r#"forbidden: User "x" cannot get path "/metrics""#),
        ] {
            let error = forbidden(&attributes, reason);
            assert_eq!((error.code(), error.message()), (403, message));
        }
    }

    #[tokio::test]
    async fn modes_are_asked_in_order_and_masters_never() {
        let decide = async |modes: &str, group: &str| {
            let modes: Vec<String> = modes.split(',').map(ToOwned::to_owned).collect();
            let authorizer = Authorizer::with(&modes, Objects::of([])).unwrap();
            let user = Arc::new(UserInfo { name: "u".into(), groups: vec![group.into()], ..UserInfo::default() });
            authorizer.authorize(&Attributes { user, ..request("pods", "", "") }).await
        };
        assert_eq!(decide("RBAC", "").await, Decision::NoOpinion(String::new()));
        assert_eq!(decide("AlwaysDeny", "").await, Decision::NoOpinion("Everything is forbidden.".into()));
        assert_eq!(decide("Node,RBAC,AlwaysAllow", "").await, Decision::Allow);
        assert_eq!(decide("Node,RBAC", "system:masters").await, Decision::Allow);
        assert!(Authorizer::with(&["Webhooks".to_owned()], Objects::of([])).is_err());
    }
}
