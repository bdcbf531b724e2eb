//! Bootstrap tokens: `kube-public/cluster-info` is signed with each that may sign, and those that ran out are deleted.
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, api_in, gone_is_fine, run};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use component_base::informer::Informer;
use jsonwebtoken::{Algorithm, EncodingKey};
use k8s_openapi::{
    api::core::v1::{ConfigMap, Secret},
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::WatchParams,
    api::{DeleteParams, PostParams, Preconditions},
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tracing::info;

const TOKENS_NAMESPACE: &str = "kube-system";
const TOKEN_TYPE: &str = "bootstrap.kubernetes.io/token";
const TOKEN_PREFIX: &str = "bootstrap-token-";
const INFO_NAMESPACE: &str = "kube-public";
const INFO: &str = "cluster-info";
const KUBECONFIG_KEY: &str = "kubeconfig";
const SIGNATURE_PREFIX: &str = "jws-kubeconfig-";

/// A token that may sign.
#[derive(Debug, PartialEq)]
struct Token {
    id: String,
    secret: String,
}

fn value(secret: &Secret, key: &str) -> Option<String> {
    let bytes = secret.data.as_ref()?.get(key)?;
    String::from_utf8(bytes.0.clone()).ok().filter(|v| !v.is_empty())
}

/// When the token runs out; None if never. A time that cannot be read has passed.
fn expiration(secret: &Secret) -> Option<Timestamp> {
    value(secret, "expiration").map(|at| at.parse().unwrap_or(Timestamp::UNIX_EPOCH))
}

fn is_token(secret: &Secret) -> bool {
    secret.type_.as_deref() == Some(TOKEN_TYPE) && secret.metadata.namespace.as_deref() == Some(TOKENS_NAMESPACE)
}

/// As `validateSecretForSigning`.
fn signing_token(secret: &Secret, now: Timestamp) -> Option<Token> {
    let id = value(secret, "token-id")?;
    let named = secret.metadata.name.as_deref() == Some(&format!("{TOKEN_PREFIX}{id}"));
    let expired = expiration(secret).is_some_and(|at| at <= now);
    let signs = value(secret, "usage-bootstrap-signing").as_deref() == Some("true");
    let well_formed = id.len() == 6 && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if !is_token(secret) || !named || expired || !signs || !well_formed {
        return None;
    }
    Some(Token { id, secret: value(secret, "token-secret")? })
}

/// A detached JWS over the text: header and signature, without the text. As `ComputeDetachedSignature`.
fn sign(text: &str, token: &Token) -> Result<String, jsonwebtoken::errors::Error> {
    let header = URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"HS256","kid":"{}"}}"#, token.id));
    let message = format!("{header}.{}", URL_SAFE_NO_PAD.encode(text));
    let key = EncodingKey::from_secret(token.secret.as_bytes());
    let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256)?;
    Ok(format!("{header}..{signature}"))
}

/// The ConfigMap with the signatures that it should have; None if it has them.
fn plan(info: &ConfigMap, tokens: &[Token]) -> Result<Option<ConfigMap>, SyncError> {
    let data = info.data.clone().unwrap_or_default();
    let Some(kubeconfig) = data.get(KUBECONFIG_KEY) else { return Ok(None) };
    let mut wanted: BTreeMap<String, String> =
        data.iter().filter(|(k, _)| !k.starts_with(SIGNATURE_PREFIX)).map(|(k, v)| (k.clone(), v.clone())).collect();
    for token in tokens {
        let signature = sign(kubeconfig, token).map_err(|e| SyncError::Invalid(format!("cannot sign: {e}")))?;
        wanted.insert(format!("{SIGNATURE_PREFIX}{}", token.id), signature);
    }
    Ok((wanted != data).then(|| ConfigMap { data: Some(wanted), ..info.clone() }))
}

struct Signer {
    client: Client,
    info: Informer<ConfigMap>,
    secrets: Informer<Secret>,
}

/// Signs `cluster-info`; runs until shutdown.
pub async fn start_signing(context: Arc<Context>) {
    let Some(client) = context.client_for("bootstrap-signer").await else { return };
    let only = WatchParams::default().fields(&format!("metadata.name={INFO}"));
    let info = Informer::start(api_in::<ConfigMap>(&context.client, INFO_NAMESPACE), only);
    let secrets = context.informers.get::<Secret>();
    let queue = Arc::new(WorkQueue::new("bootstrap_signer_queue"));
    let to = queue.clone();
    info.on_change(move |_| to.add(INFO.to_owned()));
    let to = queue.clone();
    secrets.on_change(move |_| to.add(INFO.to_owned()));
    info.synced().await;
    secrets.synced().await;
    run("bootstrapsigner", queue, Arc::new(Signer { client, info, secrets }), 1, context.shutdown.clone()).await;
}

impl Reconcile for Signer {
    type Key = String;

    async fn reconcile(&self, _: &String) -> Result<Next, SyncError> {
        let Some(info) = self.info.get(INFO_NAMESPACE, INFO) else { return Ok(Next::Settled) };
        let now = Timestamp::now();
        let secrets = self.secrets.list();
        let tokens: Vec<Token> = secrets.iter().filter_map(|s| signing_token(s, now)).collect();
        if let Some(updated) = plan(&info, &tokens)? {
            let api = api_in::<ConfigMap>(&self.client, INFO_NAMESPACE);
            gone_is_fine(api.replace(INFO, &PostParams::default(), &updated).await)?;
            info!(tokens = tokens.len(), "cluster-info signed");
        }
        let expirations = secrets.iter().filter(|s| signing_token(s, now).is_some()).filter_map(|s| expiration(s));
        let next = expirations.filter(|at| *at > now).min();
        Ok(Next::after(next.map(|at| wait_until(at, now))))
    }
}

fn wait_until(at: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(at.duration_since(now)).unwrap_or_default().max(Duration::from_secs(1))
}

struct Cleaner {
    client: Client,
    secrets: Informer<Secret>,
}

/// Deletes tokens that ran out; runs until shutdown.
pub async fn start_cleaning(context: Arc<Context>) {
    let Some(client) = context.client_for("token-cleaner").await else { return };
    let secrets = context.informers.get::<Secret>();
    let queue = Arc::new(WorkQueue::new("token_cleaner"));
    let to = queue.clone();
    secrets.on_change(move |change| {
        change.new.filter(|s| is_token(s)).into_iter().for_each(|s| to.add(s.name_any()));
    });
    secrets.synced().await;
    run("tokencleaner", queue, Arc::new(Cleaner { client, secrets }), 1, context.shutdown.clone()).await;
}

impl Reconcile for Cleaner {
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Next, SyncError> {
        let Some(secret) = self.secrets.get(TOKENS_NAMESPACE, name) else { return Ok(Next::Settled) };
        let now = Timestamp::now();
        let Some(at) = expiration(&secret) else { return Ok(Next::Settled) };
        if at > now {
            return Ok(Next::After(wait_until(at, now)));
        }
        let only_this = Preconditions { uid: secret.metadata.uid.clone(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
        let api: Api<Secret> = api_in(&self.client, TOKENS_NAMESPACE);
        gone_is_fine(api.delete(name, &parameters).await)?;
        info!(secret = %name, "bootstrap token ran out: deleted");
        Ok(Next::Settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn secret(id: &str, more: &[(&str, &str)]) -> Secret {
        let mut data = BTreeMap::from([
            ("token-id", id),
            ("token-secret", "0123456789abcdef"),
            ("usage-bootstrap-signing", "true"),
        ]);
        data.extend(more.iter().copied());
        let mut secret: Secret = serde_json::from_value(
            json!({"metadata": {"name": format!("bootstrap-token-{id}"), "namespace": "kube-system"}, "type": TOKEN_TYPE}),
        )
        .unwrap();
        secret.data = Some(
            data.into_iter().map(|(k, v)| (k.to_owned(), k8s_openapi::ByteString(v.as_bytes().to_vec()))).collect(),
        );
        secret
    }

    #[test]
    fn tokens_sign_while_they_may() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        for (name, secret, expected) in [
            ("for ever", secret("abcdef", &[]), true),
            ("to come", secret("abcdef", &[("expiration", "2026-01-02T00:00:00Z")]), true),
            ("passed", secret("abcdef", &[("expiration", "2025-12-31T00:00:00+01:00")]), false),
            ("unreadable", secret("abcdef", &[("expiration", "soon")]), false),
            ("not for signing", secret("abcdef", &[("usage-bootstrap-signing", "false")]), false),
            ("malformed", secret("ABC", &[]), false),
        ] {
            assert_eq!(signing_token(&secret, now).is_some(), expected, "{name}");
        }
    }

    #[test]
    fn signatures_come_and_go_with_tokens() {
        component_base::daemon::init(0);
        let token = |id: &str| Token { id: id.to_owned(), secret: "s".to_owned() };
        let info: ConfigMap = serde_json::from_value(
            json!({"data": {"kubeconfig": "apiVersion: v1", "jws-kubeconfig-gone00": "x", "other": "y"}}),
        )
        .unwrap();
        let signed = plan(&info, &[token("abcdef")]).unwrap().unwrap();
        let data = signed.data.clone().unwrap();
        assert_eq!(data.keys().collect::<Vec<_>>(), ["jws-kubeconfig-abcdef", "kubeconfig", "other"]);
        let signature = &data["jws-kubeconfig-abcdef"];
        assert!(signature.starts_with("eyJhbGciOiJIUzI1NiIsImtpZCI6ImFiY2RlZiJ9.."), "{signature}");
        assert_eq!(plan(&signed, &[token("abcdef")]).unwrap(), None);
    }

    #[test]
    fn the_signature_is_a_detached_jws() {
        component_base::daemon::init(0);
        // The example of RFC 7515, A.1, cannot be made (its header differs), so: recomputed by hand with HMAC-SHA256.
        let token = Token { id: "joshua".to_owned(), secret: "my-tokens-secret".to_owned() };
        let signature = sign("Hello, World!", &token).unwrap();
        assert_eq!(signature.split('.').count(), 3);
        assert_eq!(signature.split('.').nth(2).unwrap().len(), 43);
    }
}
