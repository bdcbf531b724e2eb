//! The access reviews: may this user do that, and what may I do.
use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::fields::FieldSelector;
use apimachinery::labels::Selector;
use apimachinery::meta::Gvr;
use apimachinery::status::{FieldError, StatusError};
use futures::future::BoxFuture;
use k8s_openapi::api::authorization::v1::{
    FieldSelectorAttributes, LabelSelectorAttributes, LocalSubjectAccessReview, NonResourceAttributes,
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectRulesReview, SubjectAccessReview, SubjectAccessReviewSpec,
    SubjectAccessReviewStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Attributes, Authorizer, Decision};
use crate::authentication::UserInfo;
use crate::endpoints::{Answer, Call, Endpoint};
use crate::registry::checks;
use crate::registry::field::{Errors, Field};
use crate::registry::metadata::{self, LabelValues};

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
                refuse_if("SubjectAccessReview", [about(&review.spec), metadata].concat())?;
                let resource = review.spec.resource_attributes.as_ref();
                review.status = Some(decide(authorizer, &subject_attributes(&review.spec), resource));
                encode(&review, "SubjectAccessReview")
            }
            Self::LocalSubject => {
                let metadata = nothing_but(&body, &["namespace"], "must be empty except for namespace");
                let mut review: LocalSubjectAccessReview = decode(body)?;
                let mut errors = [about(&review.spec), metadata].concat();
                if let Some(path) = &review.spec.non_resource_attributes {
                    let path = serde_json::to_value(path).unwrap_or_default();
                    errors.push(FieldError::invalid(
                        "spec.nonResourceAttributes",
                        path,
                        "disallowed on this kind of request",
                    ));
                }
                let named = review.spec.resource_attributes.as_ref();
                let named = named.map(|resource| resource.namespace.clone().unwrap_or_default());
                if let Some(namespace) = named.filter(|namespace| *namespace != asker.namespace) {
                    let why = "must match metadata.namespace";
                    errors.push(FieldError::invalid("spec.resourceAttributes.namespace", namespace, why));
                }
                refuse_if("LocalSubjectAccessReview", errors)?;
                let resource = review.spec.resource_attributes.as_ref();
                review.status = Some(decide(authorizer, &subject_attributes(&review.spec), resource));
                encode(&review, "LocalSubjectAccessReview")
            }
            Self::SelfSubject => {
                let metadata = nothing_but(&body, &[], "must be empty");
                let mut review: SelfSubjectAccessReview = decode(body)?;
                let resource = review.spec.resource_attributes.as_ref();
                let path = review.spec.non_resource_attributes.as_ref();
                refuse_if("SelfSubjectAccessReview", [exactly_one(resource, path), metadata].concat())?;
                review.status = Some(decide(authorizer, &attributes(asker.user.clone(), resource, path), resource));
                encode(&review, "SelfSubjectAccessReview")
            }
            Self::SelfRules => {
                let review: SelfSubjectRulesReview = decode(body)?;
                let namespace = review.spec.namespace.clone().unwrap_or_default();
                if namespace.is_empty() {
                    return Err(StatusError::bad_request("no namespace on request"));
                }
                // The answer has nothing of the question.
                let status = Some(authorizer.rules_for(&asker.user, &namespace));
                encode(&SelfSubjectRulesReview { status, ..Default::default() }, "SelfSubjectRulesReview")
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
    let mut errors = exactly_one(spec.resource_attributes.as_ref(), spec.non_resource_attributes.as_ref());
    if spec.user.as_deref().unwrap_or_default().is_empty() && spec.groups.as_deref().unwrap_or_default().is_empty() {
        errors.push(FieldError::invalid("spec.user", "", "at least one of user or group must be specified"));
    }
    errors
}

/// What is asked about: one thing, its selectors well-formed. As `ValidateSelfSubjectAccessReviewSpec`.
fn exactly_one(resource: Option<&ResourceAttributes>, path: Option<&NonResourceAttributes>) -> Vec<FieldError> {
    let mut errors = match (resource, path) {
        (Some(_), Some(_)) => vec![FieldError::invalid(
            "spec.nonResourceAttributes",
            serde_json::to_value(path).unwrap_or_default(),
            "cannot be specified in combination with resourceAttributes",
        )],
        (None, None) => vec![FieldError::invalid(
            "spec.resourceAttributes",
            Value::Null,
            "exactly one of nonResourceAttributes or resourceAttributes must be specified",
        )],
        _ => Vec::new(),
    };
    let resource = json!({"spec": {"resourceAttributes": resource}});
    let (root, mut found) = (Field::root(&resource), Errors::default());
    for (selector, rule) in [
        ("spec.resourceAttributes.fieldSelector", field_requirement as fn(&Field<'_, '_>, &mut Errors)),
        ("spec.resourceAttributes.labelSelector", label_requirement),
    ] {
        checks::each(&root, selector, &mut |field| selector_attributes(field, rule, &mut found));
    }
    errors.append(&mut found.0);
    errors
}

/// As `validateFieldSelectorAttributes` and `validateLabelSelectorAttributes`.
fn selector_attributes(selector: &Field<'_, '_>, rule: fn(&Field<'_, '_>, &mut Errors), errors: &mut Errors) {
    let (raw, requirements) = (selector.at("rawSelector"), selector.at("requirements"));
    match (raw.is_blank(), requirements.is_empty()) {
        _ if !selector.is_set() => {}
        (false, false) => errors.invalid(&raw, "may not specified at the same time as requirements"),
        (true, true) => {
            let why = format!("when {} is specified, requirements or rawSelector is required", selector.path());
            errors.required(&requirements, &why);
        }
        _ => {}
    }
    requirements.items().for_each(|requirement| rule(&requirement, errors));
}

/// Operators that a newer client knows pass: see [`field_selector`].
fn field_requirement(requirement: &Field<'_, '_>, errors: &mut Errors) {
    let key = requirement.at("key");
    if key.is_blank() {
        errors.required(&key, "must be specified");
    }
    metadata::operator(requirement, errors);
}

fn label_requirement(requirement: &Field<'_, '_>, errors: &mut Errors) {
    metadata::operator(requirement, errors);
    metadata::key_and_values(requirement, LabelValues::Checked, errors);
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
            field_selector: selector.map(|s| field_selector(s).0).unwrap_or_default(),
            label_selector: resource.label_selector.as_ref().map(|s| label_selector(s).0).unwrap_or_default(),
            path: String::new(),
        };
    }
    let path = path.cloned().unwrap_or_default();
    Attributes { user, verb: text(&path.verb), path: text(&path.path), ..Attributes::default() }
}

/// A selector as its text, and whether all of it was understood. What is not is passed over, which asks for more than is
/// meant. Fields know requirements of one value only. As `ResourceAttributesFrom`.
fn field_selector(selector: &FieldSelectorAttributes) -> (String, bool) {
    if let Some(raw) = selector.raw_selector.as_ref().filter(|raw| !raw.is_empty()) {
        return FieldSelector::parse(raw).map_or((String::new(), false), |_| (raw.clone(), true));
    }
    let requirements = selector.requirements.iter().flatten();
    let understood = requirements.clone().filter_map(|r| match (r.operator.as_str(), r.values.as_deref()) {
        ("In", Some([value])) => Some(format!("{}={value}", r.key)),
        ("NotIn", Some([value])) => Some(format!("{}!={value}", r.key)),
        _ => None,
    });
    let understood: Vec<String> = understood.collect();
    (understood.join(","), understood.len() == requirements.count())
}

fn label_selector(selector: &LabelSelectorAttributes) -> (String, bool) {
    if let Some(raw) = selector.raw_selector.as_ref().filter(|raw| !raw.is_empty()) {
        return Selector::parse(raw).map_or((String::new(), false), |_| (raw.clone(), true));
    }
    let requirements = selector.requirements.iter().flatten();
    let understood = requirements.clone().filter_map(|requirement| {
        let alone = LabelSelector { match_expressions: Some(vec![requirement.clone()]), match_labels: None };
        Some(Selector::from_label_selector(&alone).ok()?.to_string())
    });
    let understood: Vec<String> = understood.collect();
    (understood.join(","), understood.len() == requirements.count())
}

/// What of the selectors was passed over. As `BuildEvaluationError`.
fn evaluation_error(resource: Option<&ResourceAttributes>) -> Option<String> {
    let resource = resource?;
    let fields = resource.field_selector.as_ref().map(field_selector);
    let labels = resource.label_selector.as_ref().map(label_selector);
    let told = [("fieldSelector", fields), ("labelSelector", labels)].into_iter().filter_map(|(name, selector)| {
        let (text, _) = selector.filter(|(_, understood)| !understood)?;
        let how = if text.is_empty() { "ignored" } else { "partially ignored" };
        Some(format!("spec.resourceAttributes.{name} {how} due to parse error"))
    });
    let told: Vec<String> = told.collect();
    (!told.is_empty()).then(|| told.join("; "))
}

/// The authorizers' answer. `resource` is what was asked about, for what of it could not be understood.
fn decide(
    authorizer: &Authorizer,
    attributes: &Attributes,
    resource: Option<&ResourceAttributes>,
) -> SubjectAccessReviewStatus {
    let (decision, reason) = authorizer.explain(attributes);
    let (allowed, reason) = match decision {
        Decision::Allow => (true, reason),
        Decision::NoOpinion(why) => (false, why),
    };
    let reason = (!reason.is_empty()).then_some(reason);
    SubjectAccessReviewStatus { allowed, reason, evaluation_error: evaluation_error(resource), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authorization::lister::fake::Objects;
    use crate::authorization::lister::{CLUSTER_ROLES, ROLE_BINDINGS};
    use serde_json::json;

    fn objects() -> Arc<Objects> {
        Objects::of([
            (
                CLUSTER_ROLES,
                json!({"metadata": {"name": "reader"}, "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]}),
            ),
            (
                ROLE_BINDINGS,
                json!({"metadata": {"name": "b", "namespace": "a"}, "roleRef": {"apiGroup": "", "kind": "ClusterRole", "name": "reader"},
                "subjects": [{"kind": "User", "name": "ann"}]}),
            ),
        ])
    }

    fn authorizer() -> Authorizer {
        Authorizer::with(&["RBAC".to_owned()], objects()).unwrap()
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
        let elsewhere = answer(Review::LocalSubject, asker("bob", "b"), &spec).unwrap_err();
        assert!(elsewhere.message().ends_with("Invalid value: \"a\": must match metadata.namespace"), "{elsewhere}");
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
    fn selectors_are_checked_and_what_is_not_understood_is_told() {
        let review = |selectors: Value| {
            let mut resource = json!({"namespace": "a", "verb": "list", "resource": "pods"});
            resource.as_object_mut().unwrap().extend(selectors.as_object().unwrap().clone());
            let review = json!({"spec": {"resourceAttributes": resource}});
            let answer = Review::SelfSubject.answer(&authorizer(), &asker("ann", ""), review);
            answer.map(|v| v["status"]["evaluationError"].clone()).map_err(|error| error.message().to_owned())
        };
        let field = |operator: &str, values: &[&str]| json!({"key": "k", "operator": operator, "values": values});
        let fields = |requirements: Value| json!({"fieldSelector": {"requirements": requirements}});
        let at = "spec.resourceAttributes.fieldSelector";
        assert_eq!(review(fields(json!([field("In", &["a"])]))), Ok(Value::Null));
        assert_eq!(
            review(fields(json!([field("In", &["a"]), field("In", &["a", "b"])]))),
            Ok(json!(format!("{at} partially ignored due to parse error")))
        );
        assert_eq!(
            review(json!({"fieldSelector": {"rawSelector": "a"}, "labelSelector": {"rawSelector": "a in"}})),
            Ok(json!(format!(
                "{at} ignored due to parse error; spec.resourceAttributes.labelSelector ignored due to parse error"
            )))
        );
        let new = json!({"labelSelector": {"requirements": [field("Newer", &["a"])]}});
        let told = "spec.resourceAttributes.labelSelector ignored due to parse error";
        assert_eq!(review(new), Ok(json!(told)));
        for (selectors, error) in [
            (
                json!({"fieldSelector": {}}),
                ".requirements: Required value: when spec.resourceAttributes.fieldSelector is",
            ),
            (
                json!({"fieldSelector": {"rawSelector": "a=b", "requirements": [field("In", &["x"])]}}),
                ".rawSelector: Invalid",
            ),
            (fields(json!([field("In", &[])])), ".requirements[0].values: Required value: must be specified when"),
            (fields(json!([field("Exists", &["a"])])), ".requirements[0].values: Forbidden: may not be specified"),
        ] {
            let found = review(selectors).unwrap_err();
            assert!(found.contains(&format!("{at}{error}")), "{found}");
        }
    }

    #[test]
    fn rules_of_a_user_are_listed() {
        let rules = |modes: &[&str], user: &str| {
            let modes: Vec<String> = modes.iter().map(|mode| (*mode).to_owned()).collect();
            let authorizer = Authorizer::with(&modes, objects()).unwrap();
            let asker = asker(user, "");
            let answer = Review::SelfRules.answer(&authorizer, &asker, json!({"spec": {"namespace": "a"}})).unwrap();
            assert_eq!((&answer["kind"], &answer["spec"]), (&json!("SelfSubjectRulesReview"), &json!({})));
            answer["status"].clone()
        };
        let pods = json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]);
        let status = rules(&["Node", "RBAC"], "ann");
        assert_eq!((&status["resourceRules"], &status["incomplete"]), (&pods, &json!(false)));
        let all = json!({"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]});
        let status = rules(&["RBAC", "AlwaysAllow"], "ann");
        assert_eq!((&status["resourceRules"][0], &status["resourceRules"][1]), (&pods[0], &all));
        assert_eq!(status["nonResourceRules"], json!([{"nonResourceURLs": ["*"], "verbs": ["*"]}]));
    }
}
