//! The access reviews: may this user do that, and what may I do.
use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::meta::Gvr;
use apimachinery::status::{FieldError, StatusError};
use futures::future::BoxFuture;
use k8s_openapi::api::authorization::v1::{
    LocalSubjectAccessReview, NonResourceAttributes, NonResourceRule, ResourceAttributes, ResourceRule,
    SelfSubjectAccessReview, SelfSubjectRulesReview, SubjectAccessReview, SubjectAccessReviewSpec,
    SubjectAccessReviewStatus, SubjectRulesReviewStatus,
};
use k8s_openapi::api::rbac::v1::PolicyRule;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Attributes, Authorizer, Decision};
use crate::authentication::UserInfo;
use crate::endpoints::{Answer, Call, Endpoint};

const GROUP: &str = "authorization.k8s.io";

/// One of the review resources.
enum Review {
    Subject,
    LocalSubject,
    SelfSubject,
    SelfRules,
}

pub fn endpoints() -> Vec<(Gvr, &'static str, Arc<dyn Endpoint>)> {
    let reviews = [
        ("subjectaccessreviews", Review::Subject),
        ("localsubjectaccessreviews", Review::LocalSubject),
        ("selfsubjectaccessreviews", Review::SelfSubject),
        ("selfsubjectrulesreviews", Review::SelfRules),
    ];
    let endpoint = |(resource, review): (&str, Review)| {
        (Gvr::new(GROUP, "v1", resource), "", Arc::new(review) as Arc<dyn Endpoint>)
    };
    reviews.into_iter().map(endpoint).collect()
}

// === impl Review ===

impl Endpoint for Review {
    fn call<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Answer, StatusError>> {
        let answer = self.answer(&call.context.authorizer, call.attributes, call.body);
        Box::pin(async move { answer.map(Answer::created) })
    }
}

impl Review {
    fn answer(&self, authorizer: &Authorizer, asker: &Attributes, body: Value) -> Result<Value, StatusError> {
        match self {
            Self::Subject => {
                let metadata = nothing_but(&body, &[], "must be empty");
                let mut review: SubjectAccessReview = decode(body)?;
                refuse_if("SubjectAccessReview", [metadata, about(&review.spec)].concat())?;
                review.status = Some(decide(authorizer, &subject_attributes(&review.spec)));
                encode(&review, "SubjectAccessReview")
            }
            Self::LocalSubject => {
                let metadata = nothing_but(&body, &["namespace"], "must be empty except for namespace");
                let mut review: LocalSubjectAccessReview = decode(body)?;
                let mut errors = [metadata, about(&review.spec)].concat();
                if let Some(path) = &review.spec.non_resource_attributes {
                    let path = serde_json::to_value(path).unwrap_or_default();
                    errors.push(FieldError::invalid(
                        "spec.nonResourceAttributes",
                        path,
                        "disallowed on this kind of request",
                    ));
                }
                refuse_if("LocalSubjectAccessReview", errors)?;
                let namespace = review.spec.resource_attributes.as_ref().and_then(|r| r.namespace.clone());
                if namespace.unwrap_or_default() != asker.namespace {
                    return Err(StatusError::bad_request(format!(
                        "spec.resourceAttributes.namespace must match namespace: {}",
                        asker.namespace
                    )));
                }
                review.status = Some(decide(authorizer, &subject_attributes(&review.spec)));
                encode(&review, "LocalSubjectAccessReview")
            }
            Self::SelfSubject => {
                let metadata = nothing_but(&body, &[], "must be empty");
                let mut review: SelfSubjectAccessReview = decode(body)?;
                let resource = review.spec.resource_attributes.as_ref();
                let path = review.spec.non_resource_attributes.as_ref();
                let one = exactly_one(resource, path).into_iter().collect();
                refuse_if("SelfSubjectAccessReview", [metadata, one].concat())?;
                review.status = Some(decide(authorizer, &attributes(asker.user.clone(), resource, path)));
                encode(&review, "SelfSubjectAccessReview")
            }
            Self::SelfRules => {
                let mut review: SelfSubjectRulesReview = decode(body)?;
                let namespace = review.spec.namespace.clone().unwrap_or_default();
                if namespace.is_empty() {
                    return Err(StatusError::bad_request("no namespace on request"));
                }
                review.status = Some(rules(authorizer, &asker.user, &namespace));
                encode(&review, "SelfSubjectRulesReview")
            }
        }
    }
}

fn decode<K: DeserializeOwned>(body: Value) -> Result<K, StatusError> {
    serde_json::from_value(body).map_err(|error| StatusError::bad_request(error.to_string()))
}

fn encode<K: Serialize>(review: &K, kind: &str) -> Result<Value, StatusError> {
    let mut value = serde_json::to_value(review).map_err(StatusError::internal)?;
    if let Some(object) = value.as_object_mut() {
        object.insert("kind".into(), kind.into());
        object.insert("apiVersion".into(), format!("{GROUP}/v1").into());
    }
    Ok(value)
}

/// A review is stored nowhere, so its metadata says nothing.
fn nothing_but(body: &Value, allowed: &[&str], why: &str) -> Vec<FieldError> {
    let metadata = body.get("metadata").and_then(Value::as_object);
    let blank = |value: &Value| value.is_null() || value == "";
    let mut said = metadata.into_iter().flatten().filter(|(key, value)| {
        !blank(value)
            && !allowed.contains(&key.as_str())
            && !["managedFields", "creationTimestamp"].contains(&key.as_str())
    });
    said.next().map(|_| FieldError::invalid("metadata", body["metadata"].clone(), why)).into_iter().collect()
}

fn refuse_if(kind: &str, errors: Vec<FieldError>) -> Result<(), StatusError> {
    if errors.is_empty() { Ok(()) } else { Err(StatusError::invalid(GROUP, kind, "", &errors)) }
}

/// As `ValidateSubjectAccessReviewSpec`.
fn about(spec: &SubjectAccessReviewSpec) -> Vec<FieldError> {
    let mut errors: Vec<FieldError> =
        exactly_one(spec.resource_attributes.as_ref(), spec.non_resource_attributes.as_ref()).into_iter().collect();
    if spec.user.as_deref().unwrap_or_default().is_empty() && spec.groups.as_deref().unwrap_or_default().is_empty() {
        errors.push(FieldError::invalid("spec.user", "", "at least one of user or group must be specified"));
    }
    errors
}

fn exactly_one(resource: Option<&ResourceAttributes>, path: Option<&NonResourceAttributes>) -> Option<FieldError> {
    match (resource, path) {
        (Some(_), Some(_)) => Some(FieldError::invalid(
            "spec.nonResourceAttributes",
            serde_json::to_value(path).unwrap_or_default(),
            "cannot be specified in combination with resourceAttributes",
        )),
        (None, None) => Some(FieldError::invalid(
            "spec.resourceAttributes",
            Value::Null,
            "exactly one of nonResourceAttributes or resourceAttributes must be specified",
        )),
        _ => None,
    }
}

fn subject_attributes(spec: &SubjectAccessReviewSpec) -> Attributes {
    let extra: BTreeMap<String, Vec<String>> = spec.extra.clone().unwrap_or_default();
    let user = UserInfo {
        name: spec.user.clone().unwrap_or_default(),
        uid: spec.uid.clone().unwrap_or_default(),
        groups: spec.groups.clone().unwrap_or_default(),
        extra: extra.into_iter().map(|(key, values)| (key.to_lowercase(), values)).collect(),
    };
    attributes(Arc::new(user), spec.resource_attributes.as_ref(), spec.non_resource_attributes.as_ref())
}

/// The request that a review asks about. As `ResourceAttributesFrom` and `NonResourceAttributesFrom`.
fn attributes(
    user: Arc<UserInfo>,
    resource: Option<&ResourceAttributes>,
    path: Option<&NonResourceAttributes>,
) -> Attributes {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    if let Some(resource) = resource {
        let selector = resource.field_selector.as_ref();
        return Attributes {
            user,
            verb: text(&resource.verb),
            group: text(&resource.group),
            version: resource.version.clone().unwrap_or_else(|| "*".to_owned()),
            resource: text(&resource.resource),
            subresource: text(&resource.subresource),
            namespace: text(&resource.namespace),
            name: text(&resource.name),
            is_resource: true,
            field_selector: selector.map(field_selector).unwrap_or_default(),
            label_selector: resource.label_selector.as_ref().map(|s| text(&s.raw_selector)).unwrap_or_default(),
            path: String::new(),
        };
    }
    let path = path.cloned().unwrap_or_default();
    Attributes { user, verb: text(&path.verb), path: text(&path.path), ..Attributes::default() }
}

/// A selector as its text; requirements of one value only, which is all that fields know.
fn field_selector(selector: &k8s_openapi::api::authorization::v1::FieldSelectorAttributes) -> String {
    if let Some(raw) = &selector.raw_selector {
        return raw.clone();
    }
    let requirements = selector.requirements.iter().flatten().filter_map(|requirement| {
        let value = match requirement.values.as_deref() {
            Some([value]) => value,
            _ => return None,
        };
        match requirement.operator.as_str() {
            "In" => Some(format!("{}={value}", requirement.key)),
            "NotIn" => Some(format!("{}!={value}", requirement.key)),
            _ => None,
        }
    });
    requirements.collect::<Vec<_>>().join(",")
}

fn decide(authorizer: &Authorizer, attributes: &Attributes) -> SubjectAccessReviewStatus {
    let (decision, reason) = authorizer.explain(attributes);
    let given = |reason: String| (!reason.is_empty()).then_some(reason);
    match decision {
        Decision::Allow => SubjectAccessReviewStatus { allowed: true, reason: given(reason), ..Default::default() },
        Decision::NoOpinion(why) => SubjectAccessReviewStatus { reason: given(why), ..Default::default() },
    }
}

/// What RBAC grants a user in a namespace. Other authorizers cannot be enumerated, which makes the answer incomplete.
fn rules(authorizer: &Authorizer, user: &UserInfo, namespace: &str) -> SubjectRulesReviewStatus {
    let all = || Some(vec!["*".to_owned()]);
    if user.in_group("system:masters") || !authorizer.uses_rbac() {
        let resource =
            ResourceRule { api_groups: all(), resources: all(), verbs: vec!["*".to_owned()], resource_names: None };
        let path = NonResourceRule { non_resource_urls: all(), verbs: vec!["*".to_owned()] };
        return SubjectRulesReviewStatus {
            resource_rules: vec![resource],
            non_resource_rules: vec![path],
            incomplete: false,
            evaluation_error: None,
        };
    }
    let (granted, errors) = authorizer.rbac().rules_for(user, namespace);
    let (paths, resources): (Vec<PolicyRule>, Vec<PolicyRule>) =
        granted.into_iter().partition(|rule| rule.non_resource_urls.as_ref().is_some_and(|urls| !urls.is_empty()));
    let is_node = super::node::node_of(user).is_some();
    SubjectRulesReviewStatus {
        resource_rules: resources
            .into_iter()
            .map(|rule| ResourceRule {
                verbs: rule.verbs,
                api_groups: rule.api_groups,
                resources: rule.resources,
                resource_names: rule.resource_names,
            })
            .collect(),
        non_resource_rules: paths
            .into_iter()
            .map(|rule| NonResourceRule { verbs: rule.verbs, non_resource_urls: rule.non_resource_urls })
            .collect(),
        incomplete: is_node || !errors.is_empty(),
        evaluation_error: (!errors.is_empty()).then(|| errors.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authorization::lister::fake::Objects;
    use crate::authorization::lister::{CLUSTER_ROLES, ROLE_BINDINGS};
    use serde_json::json;

    fn authorizer() -> Authorizer {
        let objects = Objects::of([
            (
                CLUSTER_ROLES,
                json!({"metadata": {"name": "reader"}, "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]}),
            ),
            (
                ROLE_BINDINGS,
                json!({"metadata": {"name": "b", "namespace": "a"}, "roleRef": {"apiGroup": "", "kind": "ClusterRole", "name": "reader"},
                "subjects": [{"kind": "User", "name": "ann"}]}),
            ),
        ]);
        Authorizer::with(&["RBAC".to_owned()], objects).unwrap()
    }

    fn asker(user: &str, namespace: &str) -> Attributes {
        let user = Arc::new(UserInfo { name: user.into(), ..UserInfo::default() });
        Attributes { user, namespace: namespace.into(), ..Attributes::default() }
    }

    #[test]
    fn a_review_is_answered_for_its_subject() {
        let spec = json!({"user": "ann", "resourceAttributes": {"namespace": "a", "verb": "get", "resource": "pods"}});
        let answer = |review: Review, asker: Attributes, spec: &Value| {
            review.answer(&authorizer(), &asker, json!({"spec": spec})).map(|v| v["status"]["allowed"] == true)
        };
        assert_eq!(answer(Review::Subject, asker("bob", ""), &spec), Ok(true));
        assert_eq!(answer(Review::LocalSubject, asker("bob", "a"), &spec), Ok(true));
        assert_eq!(answer(Review::LocalSubject, asker("bob", "b"), &spec).unwrap_err().code(), 400);
        let mine = json!({"resourceAttributes": {"namespace": "a", "verb": "get", "resource": "pods"}});
        assert_eq!(answer(Review::SelfSubject, asker("ann", ""), &mine), Ok(true));
        assert_eq!(answer(Review::SelfSubject, asker("bob", ""), &mine), Ok(false));
        assert_eq!(answer(Review::Subject, asker("bob", ""), &mine).unwrap_err().code(), 422);
        assert_eq!(answer(Review::SelfSubject, asker("bob", ""), &json!({})).unwrap_err().code(), 422);
        let named = json!({"metadata": {"name": "x", "creationTimestamp": null}, "spec": mine});
        let refused = Review::SelfSubject.answer(&authorizer(), &asker("ann", ""), named).unwrap_err();
        assert!(refused.message().contains("metadata: Invalid value") && refused.message().ends_with("must be empty"));
    }

    #[test]
    fn rules_of_a_user_are_listed() {
        let answer =
            Review::SelfRules.answer(&authorizer(), &asker("ann", ""), json!({"spec": {"namespace": "a"}})).unwrap();
        assert_eq!(answer["status"]["resourceRules"][0]["resources"], json!(["pods"]));
        assert_eq!(answer["kind"], "SelfSubjectRulesReview");
    }
}
