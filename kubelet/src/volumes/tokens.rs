//! Service account tokens for pods: asked of the API (TokenRequest), bound to the pod, kept until four fifths of their life or
//! 24 hours are over. As the kubelet's token manager.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::Api;
use kube::api::PostParams;
use parking_lot::Mutex;

use crate::objects::explain;

/// A token is renewed when it is this old, even if it lives longer.
const MAX_AGE: Duration = Duration::from_secs(24 * 3600);
/// Spread of renewals, so that a node's pods do not all ask at once.
const MAX_JITTER: Duration = Duration::from_secs(10);
const MAX_TOKENS: usize = 4096;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct TokenKey {
    pod_uid: String,
    audience: String,
    expiration_seconds: i64,
}

#[derive(Debug, Clone)]
struct CachedToken {
    token: String,
    issued: Timestamp,
    expires: Timestamp,
    jitter: Duration,
}

/// The tokens of this node's pods.
#[derive(Default)]
pub(super) struct TokenManager {
    cache: Mutex<HashMap<TokenKey, CachedToken>>,
}

// === impl CachedToken ===

impl CachedToken {
    /// Whether it is time for a new one: past 80 % of its life, or past a day.
    fn wants_renewal(&self, now: Timestamp) -> bool {
        let life = duration_between(self.issued, self.expires);
        let renew_after = (life * 4 / 5).min(MAX_AGE.saturating_sub(self.jitter));
        duration_between(self.issued, now) >= renew_after
    }

    fn is_expired(&self, now: Timestamp) -> bool {
        now >= self.expires
    }
}

fn duration_between(from: Timestamp, to: Timestamp) -> Duration {
    Duration::try_from(to.duration_since(from)).unwrap_or_default()
}

// === impl TokenManager ===

impl TokenManager {
    /// A token of the pod's service account for `audience`, and when it expires. While it cannot be renewed, the old one serves until it expires.
    pub(super) async fn token(
        &self,
        client: &kube::Client,
        pod: &Pod,
        audience: &str,
        expiration_seconds: i64,
    ) -> Result<(String, Timestamp), String> {
        let key = TokenKey {
            pod_uid: pod.metadata.uid.clone().unwrap_or_default(),
            audience: audience.to_owned(),
            expiration_seconds,
        };
        let now = Timestamp::now();
        let cached = self.cache.lock().get(&key).cloned();
        if let Some(cached) = &cached
            && !cached.wants_renewal(now)
        {
            return Ok((cached.token.clone(), cached.expires));
        }
        match request(client, pod, audience, expiration_seconds).await {
            Ok((token, expires)) => {
                let jitter = MAX_JITTER.mul_f64(rand::random::<f64>());
                let fresh = CachedToken { token: token.clone(), issued: now, expires, jitter };
                self.remember(key, fresh, now);
                Ok((token, expires))
            }
            Err(error) => match cached {
                Some(cached) if !cached.is_expired(now) => {
                    tracing::warn!(pod = pod.metadata.name, %error, "token cannot be renewed yet");
                    Ok((cached.token, cached.expires))
                }
                _ => Err(format!("failed to fetch token: {error}")),
            },
        }
    }

    /// Forget the tokens of a pod that is gone.
    pub(super) fn forget_pod(&self, uid: &str) {
        self.cache.lock().retain(|key, _| key.pod_uid != uid);
    }

    fn remember(&self, key: TokenKey, token: CachedToken, now: Timestamp) {
        let mut cache = self.cache.lock();
        if cache.len() >= MAX_TOKENS {
            cache.retain(|_, token| !token.is_expired(now));
            if cache.len() >= MAX_TOKENS {
                cache.clear();
            }
        }
        cache.insert(key, token);
    }
}

async fn request(
    client: &kube::Client,
    pod: &Pod,
    audience: &str,
    expiration_seconds: i64,
) -> Result<(String, Timestamp), String> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let account = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.service_account_name.as_deref().filter(|name| !name.is_empty()))
        .unwrap_or("default");
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: (!audience.is_empty()).then(|| vec![audience.to_owned()]),
            expiration_seconds: Some(expiration_seconds),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
            }),
        }),
        ..Default::default()
    };
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), namespace);
    let params = PostParams::default();
    let asked = accounts.create_token_request(account, &params, &request);
    let answer = tokio::time::timeout(REQUEST_TIMEOUT, asked)
        .await
        .map_err(|_| "the API server did not answer in time".to_owned())?;
    let status = answer.map_err(|error| explain(&error))?.status.ok_or("the API server's answer has no token")?;
    match (status.token, status.expiration_timestamp) {
        (Some(token), Some(expires)) => Ok((token, expires.0)),
        _ => Err("the API server's answer has no token".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(life_s: i64) -> CachedToken {
        let issued = Timestamp::UNIX_EPOCH;
        let expires = Timestamp::from_second(life_s).expect("a time");
        CachedToken { token: "t".into(), issued, expires, jitter: Duration::from_secs(5) }
    }

    #[test]
    fn tokens_are_renewed_in_time() {
        let cases = [
            (3600, 2879, false),
            (3600, 2880, true),
            (3607, 2880, false),
            (365 * 86_400, 86_394, false),
            (365 * 86_400, 86_395, true),
            (0, 0, true),
        ];
        for (life, at, want) in cases {
            let now = Timestamp::from_second(at).expect("a time");
            assert_eq!(token(life).wants_renewal(now), want, "{life} {at}");
        }
    }
}
