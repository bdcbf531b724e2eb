//! TokenReview: whose token is this? SelfSubjectReview: who am I?
use std::sync::Arc;

use apimachinery::meta::Gvr;
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use serde_json::{Value, json};

use super::{Authenticator, UserInfo};
use crate::endpoints::{Answer, Call, Endpoint};

const GROUP: &str = "authentication.k8s.io";

struct TokenReviews;
struct SelfSubjectReviews;

pub fn endpoints() -> Vec<(Gvr, &'static str, Arc<dyn Endpoint>)> {
    vec![
        (Gvr::new(GROUP, "v1", "tokenreviews"), "", Arc::new(TokenReviews)),
        (Gvr::new(GROUP, "v1", "selfsubjectreviews"), "", Arc::new(SelfSubjectReviews)),
    ]
}

impl Endpoint for TokenReviews {
    fn call<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Answer, StatusError>> {
        let answer = review_token(&call.context.authenticator, call.body).map(Answer::created);
        Box::pin(std::future::ready(answer))
    }
}

impl Endpoint for SelfSubjectReviews {
    fn call<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Answer, StatusError>> {
        let review = json!({
            "kind": "SelfSubjectReview",
            "apiVersion": format!("{GROUP}/v1"),
            "metadata": {"creationTimestamp": jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()},
            "status": {"userInfo": user_value(&call.attributes.user)},
        });
        Box::pin(std::future::ready(Ok(Answer::created(review))))
    }
}

fn review_token(authenticator: &Authenticator, mut review: Value) -> Result<Value, StatusError> {
    let token = review.pointer("/spec/token").and_then(Value::as_str).unwrap_or_default().to_owned();
    if token.is_empty() {
        return Err(StatusError::bad_request("token is required for TokenReview in authentication"));
    }
    let asked: Vec<String> = review
        .pointer("/spec/audiences")
        .and_then(Value::as_array)
        .map(|all| all.iter().filter_map(Value::as_str).map(ToOwned::to_owned).collect())
        .unwrap_or_default();
    let audiences = if asked.is_empty() { authenticator.audiences().to_vec() } else { asked };
    let status = match authenticator.authenticate_token(&token, &audiences) {
        Ok((user, audiences)) => {
            let mut status = json!({"authenticated": true, "user": user_value(&user)});
            if !audiences.is_empty() {
                status["audiences"] = json!(audiences);
            }
            status
        }
        Err(why) => json!({"user": {}, "error": why}),
    };
    if let Some(object) = review.as_object_mut() {
        object.insert("kind".into(), "TokenReview".into());
        object.insert("apiVersion".into(), format!("{GROUP}/v1").into());
        object.entry("metadata").or_insert_with(|| json!({}));
        object.insert("status".into(), status);
    }
    Ok(review)
}

/// As `authentication.k8s.io/v1 UserInfo`.
pub fn user_value(user: &UserInfo) -> Value {
    let mut value = json!({"username": user.name});
    if !user.uid.is_empty() {
        value["uid"] = json!(user.uid);
    }
    if !user.groups.is_empty() {
        value["groups"] = json!(user.groups);
    }
    if !user.extra.is_empty() {
        value["extra"] = json!(user.extra);
    }
    value
}
