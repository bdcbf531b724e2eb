//! Secrets of type `kubernetes.io/service-account-token`: the older, lasting kind of ServiceAccount token, for whoever
//! makes such a Secret. It is filled with a token, and deleted with its account.
//!
//! As upstream's, this controller writes as the process itself: no ServiceAccount may read and write all of these.
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, api_in, gone_is_fine, is_code, run};
use apimachinery::meta::NamespacedName;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use component_base::informer::Informer;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use k8s_openapi::{
    ByteString,
    api::core::v1::{Secret, ServiceAccount},
};
use kube::{
    Api, Client,
    api::WatchParams,
    api::{DeleteParams, PostParams, Preconditions},
};
use rcgen::PublicKeyData as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::{path::Path, sync::Arc};
use tracing::{error, info};

const NAME: &str = "serviceaccount_tokens_secret";
pub const TYPE: &str = "kubernetes.io/service-account-token";
const ACCOUNT_NAME: &str = "kubernetes.io/service-account.name";
const ACCOUNT_UID: &str = "kubernetes.io/service-account.uid";
const ISSUER: &str = "kubernetes/serviceaccount";

/// The key that signs, and the name by which verifiers find it.
struct Signer {
    key: EncodingKey,
    algorithm: Algorithm,
    key_id: String,
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
    let root_ca = match &settings.root_ca_file {
        Some(path) => tokio::fs::read(path).await.ok(),
        None => None,
    };
    let only = WatchParams::default().fields(&format!("type={TYPE}"));
    let secrets = Informer::start(Api::<Secret>::all(context.client.clone()), only);
    let accounts = context.informers.get::<ServiceAccount>();
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    secrets.on_change(move |change| {
        change.new.into_iter().for_each(|s| to.add(NamespacedName::of(s.as_ref())));
    });
    let (to, all) = (queue.clone(), secrets.clone());
    accounts.on_change(move |change| {
        // One that came or went; its Secrets follow.
        if let Some(account) = change.latest().filter(|_| change.old.is_none() || change.new.is_none()) {
            let namespace = account.metadata.namespace.as_deref().unwrap_or_default();
            let named = |s: &Secret| account_of(s) == account.metadata.name.as_deref();
            let own = all.list_in(namespace).into_iter().filter(|s| named(s));
            own.for_each(|s| to.add(NamespacedName::of(s.as_ref())));
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

/// What is to become of a Secret.
#[derive(Debug, PartialEq)]
enum Verdict {
    Stays,
    /// Its account is gone, or is another of the same name.
    Goes,
    Fill,
}

fn judge(secret: &Secret, account: Option<&ServiceAccount>, root_ca: Option<&[u8]>) -> Verdict {
    let Some(account) = account else { return Verdict::Goes };
    let uid = annotation(secret, ACCOUNT_UID).filter(|u| !u.is_empty());
    if uid.is_some_and(|u| Some(u) != account.metadata.uid.as_deref()) {
        return Verdict::Goes;
    }
    let data =
        |key: &str| secret.data.as_ref().and_then(|d| d.get(key)).map(|v| v.0.as_slice()).filter(|v| !v.is_empty());
    let stale = root_ca.is_some_and(|ca| data("ca.crt") != Some(ca));
    if uid.is_none() || stale || data("token").is_none() || data("namespace").is_none() {
        Verdict::Fill
    } else {
        Verdict::Stays
    }
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
        data.entry("namespace".to_owned()).or_insert_with(|| ByteString(namespace.into_bytes()));
        data.entry("token".to_owned()).or_insert_with(|| ByteString(token.into_bytes()));
        if let Some(ca) = &self.root_ca {
            data.insert("ca.crt".to_owned(), ByteString(ca.clone()));
        }
        Ok(updated)
    }
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(secret) = self.secrets.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        let Some(name) = account_of(&secret) else { return Ok(Next::Settled) };
        let api = api_in::<Secret>(&self.client, &key.namespace);
        let mut account = self.accounts.get(&key.namespace, name);
        if account.is_none() {
            // Perhaps our cache is behind: whoever makes both makes the account first.
            let live = api_in::<ServiceAccount>(&self.client, &key.namespace).get_opt(name).await?;
            account = live.map(Arc::new);
        }
        match judge(&secret, account.as_deref(), self.root_ca.as_deref()) {
            Verdict::Stays => Ok(Next::Settled),
            Verdict::Goes => {
                let only_this = Preconditions { uid: secret.metadata.uid.clone(), resource_version: None };
                let parameters = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
                info!(secret = %key, account = name, "deleting token Secret: its ServiceAccount is gone");
                match gone_is_fine(api.delete(&key.name, &parameters).await) {
                    Err(error) if !is_code(&error, 409) => Err(error.into()),
                    _ => Ok(Next::Settled),
                }
            }
            Verdict::Fill => {
                let Some(account) = account else { return Ok(Next::Settled) };
                let filled = self.filled(&secret, &account)?;
                gone_is_fine(api.replace(&key.name, &PostParams::default(), &filled).await)?;
                Ok(Next::Settled)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(uid: Option<&str>, full: bool) -> Secret {
        let mut secret: Secret = serde_json::from_value(json!({"metadata": {"name": "t", "namespace": "ns",
            "annotations": {ACCOUNT_NAME: "robot"}}, "type": TYPE}))
        .unwrap();
        if let Some(uid) = uid {
            secret.metadata.annotations.as_mut().unwrap().insert(ACCOUNT_UID.to_owned(), uid.to_owned());
        }
        if full {
            let value = |v: &str| ByteString(v.as_bytes().to_vec());
            let data = [("token", "x"), ("namespace", "ns"), ("ca.crt", "ca")];
            secret.data = Some(data.into_iter().map(|(k, v)| (k.to_owned(), value(v))).collect());
        }
        secret
    }

    #[test]
    fn secrets_follow_their_accounts() {
        let account: ServiceAccount =
            serde_json::from_value(json!({"metadata": {"name": "robot", "namespace": "ns", "uid": "u1"}})).unwrap();
        for (name, secret, account, ca, expected) in [
            ("new", secret(None, false), Some(&account), "ca", Verdict::Fill),
            ("full", secret(Some("u1"), true), Some(&account), "ca", Verdict::Stays),
            ("old certificate", secret(Some("u1"), true), Some(&account), "new", Verdict::Fill),
            ("a namesake's", secret(Some("u0"), true), Some(&account), "ca", Verdict::Goes),
            ("an orphan", secret(Some("u1"), true), None, "ca", Verdict::Goes),
        ] {
            assert_eq!(judge(&secret, account, Some(ca.as_bytes())), expected, "{name}");
        }
        assert_eq!(claims(&secret(None, false), &account)["sub"], "system:serviceaccount:ns:robot");
    }
}
