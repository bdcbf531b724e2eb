//! Service account tokens for pods: asked of the API (TokenRequest), bound to the pod, kept until four fifths of their life or
//! 24 hours are over. As the kubelet's token manager.

use std::collections::HashMap;
use std::time::{Duration, Instant};

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
    issued: Instant,
    /// From then on; not by a wall clock, which may differ from the server's, and jump.
    life: Duration,
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
    fn wants_renewal(&self, now: Instant) -> bool {
        let renew_after = (self.life * 4 / 5).min(MAX_AGE.saturating_sub(self.jitter));
        now.saturating_duration_since(self.issued) >= renew_after
    }

    fn is_expired(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.issued) >= self.life
    }
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
        let now = Instant::now();
        let cached = self.cache.lock().get(&key).cloned();
        if let Some(cached) = &cached
            && !cached.wants_renewal(now)
        {
            return Ok((cached.token.clone(), cached.expires));
        }
        match request(client, pod, audience, expiration_seconds).await {
            Ok((token, expires, life)) => {
                let jitter = MAX_JITTER.mul_f64(rand::random::<f64>());
                let fresh = CachedToken { token: token.clone(), issued: now, life, expires, jitter };
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

    fn remember(&self, key: TokenKey, token: CachedToken, now: Instant) {
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
) -> Result<(String, Timestamp, Duration), String> {
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
    let answer = answer.map_err(|error| explain(&error))?;
    let granted = answer.spec.and_then(|spec| spec.expiration_seconds).unwrap_or(expiration_seconds);
    let life = Duration::from_secs(u64::try_from(granted).unwrap_or(0));
    let status = answer.status.ok_or("the API server's answer has no token")?;
    match (status.token, status.expiration_timestamp) {
        (Some(token), Some(expires)) => Ok((token, expires.0, life)),
        _ => Err("the API server's answer has no token".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(life_s: u64) -> CachedToken {
        let life = Duration::from_secs(life_s);
        let expires = Timestamp::UNIX_EPOCH;
        CachedToken { token: "t".into(), issued: Instant::now(), life, expires, jitter: Duration::from_secs(5) }
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
            let token = token(life);
            assert_eq!(token.wants_renewal(token.issued + Duration::from_secs(at)), want, "{life} {at}");
        }
    }
}
