//! `serviceaccounts/token`: a signed token for a ServiceAccount, for a time, for an audience, bound to a Pod, Secret or Node.
//! As `TokenREST`.
use std::time::Duration;

use apimachinery::status::{FieldError, StatusError};
use futures::future::BoxFuture;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::Value;

use super::service_account::{Audience, Bound, Claims, Reference, TokenIssuer};
use super::{keys, openid};
use crate::endpoints::{Answer, Call, Endpoint};
use crate::options::Options;
use crate::storage::StoredObject;

const DEFAULT_SECONDS: i64 = 3600;
const MIN_SECONDS: i64 = 10 * 60;
const MAX_SECONDS: i64 = 1 << 32;
/// What the kubelet asks for for pods: such tokens live longer than asked, for clients that never read them anew.
const WARN_ONLY_SECONDS: i64 = 3607;
const EXTENDED_SECONDS: i64 = 365 * 24 * 60 * 60;

/// See the module.
pub struct TokenRequests {
    issuer: Option<TokenIssuer>,
    audiences: Vec<String>,
    max_expiration: Duration,
    extend: bool,
}

/// What a token is bound to, found in the store.
#[derive(Default)]
struct BoundObjects {
    pod: Option<Reference>,
    secret: Option<Reference>,
    node: Option<Reference>,
}

// === impl TokenRequests ===

impl TokenRequests {
    pub fn from_options(options: &Options) -> Result<Self, keys::KeyError> {
        let issuer = match (&options.service_account_signing_key_file, options.service_account_issuer.first()) {
            (Some(key), Some(issuer)) => Some(TokenIssuer::load(issuer, key)?),
            _ => None,
        };
        let max_expiration = options.service_account_max_token_expiration;
        let extend = options.service_account_extend_token_expiration;
        Ok(Self { issuer, audiences: openid::api_audiences(options), max_expiration, extend })
    }

    async fn create(&self, call: Call<'_>) -> Result<Answer, StatusError> {
        let Some(issuer) = &self.issuer else {
            return Err(StatusError::not_found("", "serviceaccounts/token", &call.info.name));
        };
        let (namespace, name) = (call.info.namespace.as_str(), call.info.name.as_str());
        let mut request: TokenRequest =
            serde_json::from_value(call.body.clone()).map_err(|error| StatusError::bad_request(error.to_string()))?;
        check_metadata(&request, namespace, name)?;
        let mut spec = request.spec.take().unwrap_or_default();
        let seconds = self.expiration(spec.expiration_seconds)?;
        let audiences =
            spec.audiences.clone().filter(|asked| !asked.is_empty()).unwrap_or_else(|| self.audiences.clone());

        let account = fetch(&call, "serviceaccounts", namespace, name).await?;
        let bound = match &spec.bound_object_ref {
            Some(reference) => find_bound(&call, reference, namespace, name).await?,
            None => BoundObjects::default(),
        };
        let extend = self.extend
            && bound.pod.is_some()
            && seconds == WARN_ONLY_SECONDS
            && audiences.iter().all(|audience| self.audiences.contains(audience));
        let now = jiff::Timestamp::now().as_second();
        let claims = Claims {
            aud: Audience(audiences.clone()),
            exp: Some(now + if extend { EXTENDED_SECONDS } else { seconds }),
            iat: Some(now),
            nbf: Some(now),
            iss: issuer.issuer.clone(),
            jti: uuid::Uuid::new_v4().to_string(),
            sub: format!("system:serviceaccount:{namespace}:{name}"),
            kubernetes: Some(Bound {
                namespace: namespace.to_owned(),
                serviceaccount: Reference { name: name.to_owned(), uid: account.identity.uid.to_string() },
                pod: bound.pod,
                secret: bound.secret,
                node: bound.node,
                warnafter: extend.then_some(now + seconds),
            }),
            ..Claims::default()
        };
        let timestamp = |seconds: i64| jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::MAX);
        request.status = Some(TokenRequestStatus {
            token: Some(issuer.sign(&claims)?),
            expiration_timestamp: Some(Time(timestamp(now + seconds))),
        });
        spec.audiences = Some(audiences);
        spec.expiration_seconds = Some(seconds);
        request.spec = Some(spec);
        request.metadata.name = Some(name.to_owned());
        request.metadata.namespace = Some(namespace.to_owned());
        request.metadata.creation_timestamp = Some(Time(timestamp(now)));
        let mut value = serde_json::to_value(&request).map_err(StatusError::internal)?;
        if let Some(object) = value.as_object_mut() {
            object.insert("kind".into(), "TokenRequest".into());
            object.insert("apiVersion".into(), "authentication.k8s.io/v1".into());
        }
        Ok(Answer::created(value))
    }

    /// As `ValidateTokenRequest`, after defaulting, capped by `--service-account-max-token-expiration`.
    fn expiration(&self, asked: Option<i64>) -> Result<i64, StatusError> {
        let seconds = asked.unwrap_or(DEFAULT_SECONDS);
        let why = match seconds {
            ..MIN_SECONDS => "may not specify a duration less than 10 minutes",
            MAX_SECONDS.. if seconds > MAX_SECONDS => "may not specify a duration larger than 2^32 seconds",
            _ => {
                let max = i64::try_from(self.max_expiration.as_secs()).unwrap_or(i64::MAX);
                return Ok(if max > 0 { seconds.min(max) } else { seconds });
            }
        };
        let error = FieldError::invalid("spec.expirationSeconds", seconds, why);
        Err(StatusError::invalid("authentication.k8s.io", "TokenRequest", "", &[error]))
    }
}

impl Endpoint for TokenRequests {
    fn call<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Answer, StatusError>> {
        if call.info.verb != "create" {
            let error = StatusError::method_not_supported("", "serviceaccounts/token", call.info.verb);
            return Box::pin(std::future::ready(Err(error)));
        }
        Box::pin(self.create(call))
    }
}

fn check_metadata(request: &TokenRequest, namespace: &str, name: &str) -> Result<(), StatusError> {
    let given = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    if given(&request.metadata.name).is_some_and(|given| given != name) {
        return Err(StatusError::bad_request(format!(
            "the name of the object ({}) does not match the name on the URL ({name})",
            request.metadata.name.as_deref().unwrap_or_default()
        )));
    }
    if given(&request.metadata.namespace).is_some_and(|given| given != namespace) {
        return Err(StatusError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    Ok(())
}

async fn fetch(
    call: &Call<'_>,
    resource: &str,
    namespace: &str,
    name: &str,
) -> Result<std::sync::Arc<StoredObject>, StatusError> {
    let resource = call.context.registry.get("", "v1", resource).ok_or_else(StatusError::no_such_resource)?;
    call.context.store.get(resource, namespace, name).await
}

async fn find_bound(
    call: &Call<'_>,
    reference: &BoundObjectReference,
    namespace: &str,
    account: &str,
) -> Result<BoundObjects, StatusError> {
    let kind = reference.kind.as_deref().unwrap_or_default();
    let api_version = reference.api_version.as_deref().unwrap_or_default();
    let name = reference.name.as_deref().unwrap_or_default();
    let uid = reference.uid.as_deref().unwrap_or_default();
    let resource = match (api_version, kind) {
        ("v1", "Pod") => "pods",
        ("v1", "Secret") => "secrets",
        ("v1", "Node") => "nodes",
        _ => {
            let what = format!("{api_version}, Kind={kind}");
            return Err(StatusError::bad_request(format!(
                "cannot bind token for serviceaccount {account:?} to object of type {what:?}"
            )));
        }
    };
    let object = fetch(call, resource, if resource == "nodes" { "" } else { namespace }, name).await?;
    if !uid.is_empty() && *object.identity.uid != *uid {
        let cause = format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
        );
        return Err(StatusError::conflict("", resource, name, &cause));
    }
    let found = Some(Reference { name: name.to_owned(), uid: object.identity.uid.to_string() });
    match resource {
        "secrets" => Ok(BoundObjects { secret: found, ..BoundObjects::default() }),
        "nodes" => Ok(BoundObjects { node: found, ..BoundObjects::default() }),
        _ => {
            let pod = object.value();
            let text = |pointer: &str| pod.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
            if text("/spec/serviceAccountName") != account {
                return Err(StatusError::bad_request(format!(
                    "cannot bind token for serviceaccount {account:?} to pod running with different serviceaccount name."
                )));
            }
            let node_name = text("/spec/nodeName");
            let node = if node_name.is_empty() {
                None
            } else {
                // A pod may name a node that is not there (yet).
                let uid = fetch(call, "nodes", "", node_name).await.map(|node| node.identity.uid.to_string());
                Some(Reference { name: node_name.to_owned(), uid: uid.unwrap_or_default() })
            };
            Ok(BoundObjects { pod: found, node, secret: None })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expirations_are_defaulted_checked_and_capped() {
        let requests = |max: u64| TokenRequests {
            issuer: None,
            audiences: Vec::new(),
            max_expiration: Duration::from_secs(max),
            extend: true,
        };
        let ask = |max: u64, seconds: Option<i64>| {
            requests(max).expiration(seconds).map_err(|error| error.message().to_owned())
        };
        assert_eq!(ask(0, None), Ok(3600));
        assert_eq!(ask(0, Some(MAX_SECONDS)), Ok(MAX_SECONDS));
        assert_eq!(ask(7200, Some(86400)), Ok(7200));
        assert!(
            ask(0, Some(599))
                .unwrap_err()
                .contains("Invalid value: 599: may not specify a duration less than 10 minutes")
        );
        assert!(ask(0, Some(MAX_SECONDS + 1)).is_err());
    }
}
