//! Secrets of type `kubernetes.io/service-account-token`: the older, lasting kind of ServiceAccount token, for whoever
//! makes such a Secret. It is filled with a token, and deleted with its account; an account that names it forgets it when it
//! is gone.
//!
//! As upstream's, this controller writes as the process itself: no ServiceAccount may read and write all of these.
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, api_in, gone_is_fine, is_code, run};
use apimachinery::meta::NamespacedName;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use component_base::informer::Informer;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use k8s_openapi::{
    ByteString,
    api::core::v1::{ObjectReference, Secret, ServiceAccount},
};
use kube::{
    Api, Client,
    api::WatchParams,
    api::{DeleteParams, PostParams, Preconditions},
};
use rcgen::PublicKeyData as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::{fmt, path::Path, sync::Arc};
use tracing::{error, info};

const NAME: &str = "serviceaccount_tokens_secret";
pub const TYPE: &str = "kubernetes.io/service-account-token";
pub const ACCOUNT_NAME: &str = "kubernetes.io/service-account.name";
pub const ACCOUNT_UID: &str = "kubernetes.io/service-account.uid";
const ISSUER: &str = "kubernetes/serviceaccount";

/// The key that signs, and the name by which verifiers find it.
struct Signer {
    key: EncodingKey,
    algorithm: Algorithm,
    key_id: String,
}

/// A Secret and whose it is: enough to have its account forget it once it is gone. As `secretQueueKey`.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct Key {
    secret: NamespacedName,
    uid: Option<String>,
    account: String,
    account_uid: Option<String>,
}

struct Controller {
    client: Client,
    signer: Signer,
    root_ca: Option<Vec<u8>>,
    secrets: Informer<Secret>,
    accounts: Informer<ServiceAccount>,
}

/// Runs until shutdown, if there is a `--service-account-private-key-file`.
pub async fn start(context: Arc<Context>) {
    let settings = &context.settings;
    let Some(path) = &settings.service_account_private_key_file else { return };
    let signer = match read_signer(path).await {
        Ok(signer) => signer,
        Err(cause) => {
            error!(file = %path.display(), cause, "--service-account-private-key-file cannot be used; token Secrets stay empty");
            return;
        }
    };
    let root_ca = settings.root_ca("token Secrets have no ca.crt").await.map(String::into_bytes);
    let only = WatchParams::default().fields(&format!("type={TYPE}"));
    let secrets = Informer::start(Api::<Secret>::all(context.client.clone()), only);
    let accounts = context.informers.get::<ServiceAccount>();
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    secrets.on_change(move |change| {
        change.latest().and_then(|secret| Key::of(secret)).into_iter().for_each(|key| to.add(key));
    });
    let (to, all) = (queue.clone(), secrets.clone());
    accounts.on_change(move |change| {
        // One that came or went; its Secrets follow.
        if let Some(account) = change.latest().filter(|_| change.old.is_none() || change.new.is_none()) {
            let namespace = account.metadata.namespace.as_deref().unwrap_or_default();
            let named = |s: &Secret| account_of(s) == account.metadata.name.as_deref();
            let own = all.list_in(namespace).into_iter().filter(|s| named(s));
            own.filter_map(|s| Key::of(&s)).for_each(|key| to.add(key));
        }
    });
    secrets.synced().await;
    accounts.synced().await;
    let client = context.client.clone();
    let controller = Arc::new(Controller { client, signer, root_ca, secrets, accounts });
    run(
        "serviceaccount-token",
        queue,
        controller,
        settings.concurrent_serviceaccount_token_syncs,
        context.shutdown.clone(),
    )
    .await;
}

async fn read_signer(path: &Path) -> Result<Signer, String> {
    let pem = tokio::fs::read_to_string(path).await.map_err(|e| e.to_string())?;
    let pair = rcgen::KeyPair::from_pem(&pem).map_err(|e| e.to_string())?;
    // As `keyIDFromPublicKey`.
    let key_id = URL_SAFE_NO_PAD.encode(Sha256::digest(pair.subject_public_key_info()));
    let (key, algorithm) = if let Ok(key) = EncodingKey::from_rsa_pem(pem.as_bytes()) {
        (key, Algorithm::RS256)
    } else {
        // Only the PKCS#8 form of an EC key is read.
        (EncodingKey::from_ec_pem(pair.serialize_pem().as_bytes()).map_err(|e| e.to_string())?, Algorithm::ES256)
    };
    Ok(Signer { key, algorithm, key_id })
}

fn annotation<'a>(secret: &'a Secret, key: &str) -> Option<&'a str> {
    secret.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

fn account_of(secret: &Secret) -> Option<&str> {
    annotation(secret, ACCOUNT_NAME)
}

fn is_account(account: &ServiceAccount, uid: Option<&str>) -> bool {
    uid.is_none_or(|uid| account.metadata.uid.as_deref() == Some(uid))
}

/// What a Secret holds under a key, if anything.
fn held<'a>(secret: &'a Secret, key: &str) -> Option<&'a [u8]> {
    secret.data.as_ref().and_then(|d| d.get(key)).map(|v| v.0.as_slice()).filter(|v| !v.is_empty())
}

/// Whether anything is missing in a Secret, or no longer true. As `secretUpdateNeeded`.
fn lacks(secret: &Secret, root_ca: Option<&[u8]>) -> bool {
    let stale = root_ca.is_some_and(|ca| held(secret, "ca.crt") != Some(ca));
    stale || held(secret, "token").is_none() || held(secret, "namespace").is_none()
}

/// An account that no longer names a Secret; None if it never did. As `removeSecretReference`.
fn without(account: &ServiceAccount, secret: &str) -> Option<ServiceAccount> {
    let is_other = |named: &ObjectReference| named.name.as_deref() != Some(secret);
    let named = account.secrets.as_deref().filter(|named| !named.iter().all(is_other))?;
    let left = named.iter().filter(|named| is_other(named)).cloned().collect();
    Some(ServiceAccount { secrets: Some(left), ..account.clone() })
}

/// As `LegacyClaims`.
fn claims(secret: &Secret, account: &ServiceAccount) -> Value {
    let namespace = secret.metadata.namespace.as_deref().unwrap_or_default();
    let name = account.metadata.name.as_deref().unwrap_or_default();
    json!({
        "iss": ISSUER,
        "kubernetes.io/serviceaccount/namespace": namespace,
        "kubernetes.io/serviceaccount/secret.name": secret.metadata.name,
        "kubernetes.io/serviceaccount/service-account.name": name,
        "kubernetes.io/serviceaccount/service-account.uid": account.metadata.uid,
        "sub": format!("system:serviceaccount:{namespace}:{name}"),
    })
}

impl Controller {
    fn filled(&self, secret: &Secret, account: &ServiceAccount) -> Result<Secret, SyncError> {
        let mut header = Header::new(self.signer.algorithm);
        header.typ = None;
        header.kid = Some(self.signer.key_id.clone());
        let token = jsonwebtoken::encode(&header, &claims(secret, account), &self.signer.key)
            .map_err(|e| SyncError::Invalid(format!("cannot sign a token: {e}")))?;
        let mut updated = secret.clone();
        let annotations = updated.metadata.annotations.get_or_insert_default();
        annotations.insert(ACCOUNT_UID.to_owned(), account.metadata.uid.clone().unwrap_or_default());
        let data = updated.data.get_or_insert_default();
        let namespace = secret.metadata.namespace.clone().unwrap_or_default();
        for (key, value) in [("namespace", namespace), ("token", token)] {
            if held(secret, key).is_none() {
                data.insert(key.to_owned(), ByteString(value.into_bytes()));
            }
        }
        if let Some(ca) = &self.root_ca {
            data.insert("ca.crt".to_owned(), ByteString(ca.clone()));
        }
        Ok(updated)
    }
}

impl Controller {
    /// The account of a Secret. Where the cache does not have it the server is asked: whoever makes both makes the account
    /// first, and the cache may be behind.
    async fn account(&self, key: &Key) -> Result<Option<Arc<ServiceAccount>>, SyncError> {
        let is_its = |account: &Arc<ServiceAccount>| is_account(account, key.account_uid.as_deref());
        let cached = self.accounts.get(&key.secret.namespace, &key.account).filter(is_its);
        if cached.is_some() {
            return Ok(cached);
        }
        let live = api_in::<ServiceAccount>(&self.client, &key.secret.namespace).get_opt(&key.account).await?;
        Ok(live.map(Arc::new).filter(is_its))
    }

    /// Has the account forget a Secret that is gone.
    async fn forget(&self, key: &Key) -> Result<Next, SyncError> {
        let is_its = |account: &ServiceAccount| is_account(account, key.account_uid.as_deref());
        if !self.accounts.get(&key.secret.namespace, &key.account).is_some_and(|cached| is_its(&cached)) {
            return Ok(Next::Settled);
        }
        let api = api_in::<ServiceAccount>(&self.client, &key.secret.namespace);
        let live = api.get_opt(&key.account).await?.filter(is_its);
        if let Some(account) = live.and_then(|account| without(&account, &key.secret.name)) {
            gone_is_fine(api.replace(&key.account, &PostParams::default(), &account).await)?;
        }
        Ok(Next::Settled)
    }

    /// Deletes a Secret without account.
    async fn delete(&self, key: &Key) -> Result<Next, SyncError> {
        let only_this = Preconditions { uid: key.uid.clone(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
        info!(secret = %key, account = key.account, "deleting token Secret: its ServiceAccount is gone");
        let api = api_in::<Secret>(&self.client, &key.secret.namespace);
        match gone_is_fine(api.delete(&key.secret.name, &parameters).await) {
            Err(error) if !is_code(&error, 409) => Err(error.into()),
            _ => Ok(Next::Settled),
        }
    }
}

impl Reconcile for Controller {
    type Key = Key;

    async fn reconcile(&self, key: &Key) -> Result<Next, SyncError> {
        let secret = self.secrets.get(&key.secret.namespace, &key.secret.name);
        let Some(secret) = secret.filter(|secret| secret.metadata.uid == key.uid) else {
            return self.forget(key).await;
        };
        let Some(account) = self.account(key).await? else { return self.delete(key).await };
        if lacks(&secret, self.root_ca.as_deref()) {
            let filled = self.filled(&secret, &account)?;
            let api = api_in::<Secret>(&self.client, &key.secret.namespace);
            match gone_is_fine(api.replace(&key.secret.name, &PostParams::default(), &filled).await) {
                // Someone else wrote: that is told, and looked at then.
                Err(error) if !is_code(&error, 409) => return Err(error.into()),
                _ => {}
            }
        }
        Ok(Next::Settled)
    }
}

// === impl Key ===

impl Key {
    fn of(secret: &Secret) -> Option<Self> {
        let some = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(str::to_owned);
        Some(Self {
            secret: NamespacedName::of(secret),
            uid: secret.metadata.uid.clone(),
            account: some(account_of(secret))?,
            account_uid: some(annotation(secret, ACCOUNT_UID)),
        })
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.secret.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(token: &str, ca: &str) -> Secret {
        let value = |v: &str| ByteString(v.as_bytes().to_vec());
        let data = [("token", token), ("namespace", "ns"), ("ca.crt", ca)].map(|(k, v)| (k.to_owned(), value(v)));
        let mut secret: Secret =
            serde_json::from_value(json!({"metadata": {"name": "t", "namespace": "ns", "uid": "s1",
            "annotations": {ACCOUNT_NAME: "robot", ACCOUNT_UID: "u1"}}, "type": TYPE}))
            .unwrap();
        secret.data = Some(data.into());
        secret
    }

    fn account(secrets: Value) -> ServiceAccount {
        serde_json::from_value(
            json!({"metadata": {"name": "robot", "namespace": "ns", "uid": "u1"}, "secrets": secrets}),
        )
        .unwrap()
    }

    #[test]
    fn secrets_are_filled_as_far_as_they_lack() {
        for (name, secret, ca, expected) in [
            ("full", secret("x", "ca"), Some("ca"), false),
            ("an empty token is none", secret("", "ca"), Some("ca"), true),
            ("old certificate", secret("x", "ca"), Some("new"), true),
            ("no certificate to give", secret("x", ""), None, false),
        ] {
            assert_eq!(lacks(&secret, ca.map(str::as_bytes)), expected, "{name}");
        }
        assert_eq!(claims(&secret("", ""), &account(Value::Null))["sub"], "system:serviceaccount:ns:robot");
    }

    #[test]
    fn a_secret_is_of_one_account_and_not_of_its_namesake() {
        let key = Key::of(&secret("x", "ca")).unwrap();
        assert_eq!(
            (key.account.as_str(), key.account_uid.as_deref(), key.to_string()),
            ("robot", Some("u1"), "ns/t".to_owned())
        );
        let own = account(Value::Null);
        let verdicts = [Some("u1"), None, Some("u0")].map(|uid| is_account(&own, uid));
        assert_eq!(verdicts, [true, true, false]);
        assert_eq!(Key::of(&Secret::default()), None);
    }

    #[test]
    fn an_account_forgets_a_secret_that_is_gone() {
        let named = account(json!([{"name": "a"}, {"name": "t"}, {"name": "b"}]));
        let left = without(&named, "t").unwrap().secrets.unwrap();
        assert_eq!(left.iter().filter_map(|s| s.name.as_deref()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((without(&named, "other"), without(&account(Value::Null), "t")), (None, None));
    }
}
