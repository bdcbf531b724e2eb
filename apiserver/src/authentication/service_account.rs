//! ServiceAccount tokens: signed claims that hold as long as the objects they are bound to exist. As `serviceaccount/jwt.go` and
//! its validators.
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use apimachinery::status::StatusError;
use jsonwebtoken::{Header, Validation};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::UserInfo;
use super::keys::{self, SigningKey, VerifyingKey};
use crate::authorization::lister::{Lister, NODES, PODS, ResourceId, SECRETS, SERVICE_ACCOUNTS, deletion_time};
use crate::storage::StoredObject;

/// The issuer of tokens that live in Secrets.
const LEGACY_ISSUER: &str = "kubernetes/serviceaccount";
/// How long a token outlives the deletion of what it is bound to.
const DELETION_LEEWAY_SECONDS: i64 = 60;
/// Tokens whose signature is known to be good; all are forgotten at the limit.
const PROVEN_MAX: usize = 16_384;

/// Secrets whose tokens have been used and are to be labelled so; further ones are labelled when they are used again.
const USED_MAX: usize = 1024;
/// On which day the token in a Secret was used last, and since when it is no longer to be used.
pub const LAST_USED: &str = "kubernetes.io/legacy-token-last-used";
const INVALID_SINCE: &str = "kubernetes.io/legacy-token-invalid-since";

pub const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
pub const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
pub const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
pub const NODE_UID: &str = "authentication.kubernetes.io/node-uid";

/// What a token says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Claims {
    #[serde(default, skip_serializing_if = "Audience::is_empty")]
    pub aud: Audience,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exp: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iat: Option<i64>,
    pub iss: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub jti: String,
    #[serde(rename = "kubernetes.io", default, skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<Bound>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbf: Option<i64>,
    pub sub: String,
    #[serde(rename = "kubernetes.io/serviceaccount/namespace", default, skip_serializing_if = "Option::is_none")]
    pub legacy_namespace: Option<String>,
    #[serde(rename = "kubernetes.io/serviceaccount/secret.name", default, skip_serializing_if = "Option::is_none")]
    pub legacy_secret: Option<String>,
    #[serde(
        rename = "kubernetes.io/serviceaccount/service-account.name",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub legacy_name: Option<String>,
    #[serde(
        rename = "kubernetes.io/serviceaccount/service-account.uid",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub legacy_uid: Option<String>,
}

/// What a token is bound to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    pub namespace: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Reference>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Reference>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Reference>,
    pub serviceaccount: Reference,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warnafter: Option<i64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    pub name: String,
    #[serde(default)]
    pub uid: String,
}

/// One audience or several.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "OneOrMany", into = "Vec<String>")]
pub struct Audience(pub Vec<String>);

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Signs tokens.
pub struct TokenIssuer {
    pub issuer: String,
    key: SigningKey,
}

/// Proves tokens.
pub struct TokenVerifier {
    lister: Arc<dyn Lister>,
    issuers: Vec<String>,
    keys: Vec<VerifyingKey>,
    proven: Mutex<HashMap<[u8; 32], Arc<Claims>>>,
    /// Namespaces and names of Secrets whose label does not tell yet that they have been used.
    used: Mutex<BTreeSet<(String, String)>>,
}

// === impl Audience ===

impl Audience {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<OneOrMany> for Audience {
    fn from(value: OneOrMany) -> Self {
        match value {
            OneOrMany::One(one) => Self(vec![one]),
            OneOrMany::Many(many) => Self(many),
        }
    }
}

impl From<Audience> for Vec<String> {
    fn from(value: Audience) -> Self {
        value.0
    }
}

// === impl TokenIssuer ===

impl TokenIssuer {
    pub fn load(issuer: &str, key_file: &Path) -> Result<Self, keys::KeyError> {
        Ok(Self { issuer: issuer.to_owned(), key: keys::signing_key(key_file)? })
    }

    pub fn sign(&self, claims: &Claims) -> Result<String, StatusError> {
        let mut header = Header::new(self.key.algorithm);
        header.typ = None;
        header.kid = Some(self.key.id.clone());
        jsonwebtoken::encode(&header, claims, &self.key.key)
            .map_err(|error| StatusError::internal(format!("failed to generate token: {error}")))
    }
}

// === impl TokenVerifier ===

impl TokenVerifier {
    pub fn new(lister: Arc<dyn Lister>, issuers: Vec<String>, keys: Vec<VerifyingKey>) -> Self {
        Self { lister, issuers, keys, proven: Mutex::default(), used: Mutex::default() }
    }

    /// Who holds the token, with the audiences of `audiences` that it is for. None if it is no token of ours at all.
    pub fn verify(
        &self,
        token: &str,
        audiences: &[String],
        now: i64,
    ) -> Option<Result<(UserInfo, Vec<String>), String>> {
        let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let known = self.proven.lock().get(&digest).cloned();
        let claims = match known {
            Some(claims) => claims,
            None => {
                let unproven: Claims = jsonwebtoken::dangerous::insecure_decode_claims(token).ok()?;
                if unproven.iss != LEGACY_ISSUER && !self.issuers.contains(&unproven.iss) {
                    return None;
                }
                match self.prove(token, digest) {
                    Ok(claims) => claims,
                    Err(why) => return Some(Err(why)),
                }
            }
        };
        Some(match claims.iss.as_str() {
            LEGACY_ISSUER => self.check_legacy(token, &claims, audiences, now),
            _ => self.check(&claims, audiences, now),
        })
    }

    /// The claims if one of our keys signed them.
    fn prove(&self, token: &str, digest: [u8; 32]) -> Result<Arc<Claims>, String> {
        let header = jsonwebtoken::decode_header(token).map_err(|error| error.to_string())?;
        let kid = header.kid.as_deref().unwrap_or_default();
        // A key that the token names comes first; tokens of old keys name none that we know.
        let (named, others): (Vec<_>, Vec<_>) = self.keys.iter().partition(|key| key.id == kid);
        for key in named.into_iter().chain(others).filter(|key| key.algorithm == header.alg) {
            let mut validation = Validation::new(key.algorithm);
            // Time and audience are checked each time, not only now.
            validation.validate_exp = false;
            validation.validate_nbf = false;
            validation.validate_aud = false;
            validation.required_spec_claims.clear();
            if let Ok(proven) = jsonwebtoken::decode::<Claims>(token, &key.key, &validation) {
                let claims = Arc::new(proven.claims);
                let mut all = self.proven.lock();
                if all.len() >= PROVEN_MAX {
                    all.clear();
                }
                all.insert(digest, claims.clone());
                return Ok(claims);
            }
        }
        Err("the token is signed with no key of --service-account-key-file".to_owned())
    }

    /// As `validator.Validate`.
    fn check(&self, claims: &Claims, audiences: &[String], now: i64) -> Result<(UserInfo, Vec<String>), String> {
        if claims.exp.is_some_and(|exp| now > exp) {
            return Err("service account token has expired".to_owned());
        }
        if claims.nbf.is_some_and(|nbf| now < nbf) {
            return Err("service account token is not valid yet".to_owned());
        }
        let matching: Vec<String> = claims.aud.0.iter().filter(|aud| audiences.contains(aud)).cloned().collect();
        if matching.is_empty() {
            return Err(format!(
                "token audiences {:?} is invalid for the target audiences {audiences:?}",
                claims.aud.0
            ));
        }
        let bound = claims.kubernetes.as_ref().ok_or("the token lacks the claim kubernetes.io")?;
        let namespace = &bound.namespace;
        let account = &bound.serviceaccount;
        if claims.sub != format!("system:serviceaccount:{namespace}:{}", account.name) {
            return Err("the token's subject is not its service account".to_owned());
        }
        self.exists(SERVICE_ACCOUNTS, namespace, account, now)?;
        if let Some(secret) = &bound.secret {
            self.exists(SECRETS, namespace, secret, now)?;
        }
        if let Some(pod) = &bound.pod {
            self.exists(PODS, namespace, pod, now)?;
        }
        // A pod's node may be gone; a token of the node itself ends with it.
        if let (Some(node), None) = (&bound.node, &bound.pod) {
            self.exists(NODES, "", node, now)?;
        }
        let mut user = user(namespace, &account.name, &account.uid);
        let mut add = |key: &str, value: &str| {
            if !value.is_empty() {
                user.extra.insert(key.to_owned(), vec![value.to_owned()]);
            }
        };
        if let Some(pod) = &bound.pod {
            add(POD_NAME, &pod.name);
            add(POD_UID, &pod.uid);
        }
        if let Some(node) = &bound.node {
            add(NODE_NAME, &node.name);
            add(NODE_UID, &node.uid);
        }
        if !claims.jti.is_empty() {
            add(super::CREDENTIAL_ID, &format!("JTI={}", claims.jti));
        }
        if bound.warnafter.is_some_and(|after| now > after) {
            tracing::debug!(
                namespace,
                name = account.name,
                "a token is used beyond the time it was asked for: its pod should read it anew"
            );
        }
        Ok((user, matching))
    }

    /// The object is there with this uid, or its deletion was asked for only just.
    fn exists(&self, resource: ResourceId, namespace: &str, wanted: &Reference, now: i64) -> Result<(), String> {
        let kind = resource.2.trim_end_matches('s');
        let object = self.lister.get(resource, namespace, &wanted.name);
        let object = object.ok_or_else(|| format!("the {kind} {:?} of the token is not there", wanted.name))?;
        if *object.identity.uid != *wanted.uid {
            return Err(format!("{kind} UID ({}) does not match claim ({})", object.identity.uid, wanted.uid));
        }
        if deletion_time(&object).is_some_and(|at| now > at + DELETION_LEEWAY_SECONDS) {
            return Err(format!("the {kind} {:?} of the token has been deleted", wanted.name));
        }
        Ok(())
    }

    /// Tokens that live in a Secret. As `legacyValidator.Validate`.
    fn check_legacy(
        &self,
        token: &str,
        claims: &Claims,
        audiences: &[String],
        now: i64,
    ) -> Result<(UserInfo, Vec<String>), String> {
        let claim =
            |claim: &Option<String>, name: &str| claim.clone().ok_or_else(|| format!("{name} claim is missing"));
        let namespace = claim(&claims.legacy_namespace, "namespace")?;
        let secret_name = claim(&claims.legacy_secret, "secretName")?;
        let name = claim(&claims.legacy_name, "serviceAccountName")?;
        let uid = claim(&claims.legacy_uid, "serviceAccountUID")?;
        if claims.sub != format!("system:serviceaccount:{namespace}:{name}") {
            return Err("sub claim is invalid".to_owned());
        }
        let secret = self.lister.get(SECRETS, &namespace, &secret_name).ok_or("Token has been invalidated")?;
        if deletion_time(&secret).is_some() || secret_value(&secret.value(), "token").as_deref() != Some(token) {
            return Err("Token has been invalidated".to_owned());
        }
        let account = self.lister.get(SERVICE_ACCOUNTS, &namespace, &name).ok_or("the service account is not there")?;
        if deletion_time(&account).is_some() {
            return Err(format!("ServiceAccount {namespace}/{name} has been deleted"));
        }
        if *account.identity.uid != *uid {
            return Err(format!("ServiceAccount UID ({}) does not match claim ({uid})", account.identity.uid));
        }
        self.note_use(&secret, &namespace, &secret_name, now);
        if secret.identity.label(INVALID_SINCE).is_some_and(|since| !since.is_empty()) {
            return Err(format!(
                "the token in secret {namespace}/{secret_name} for service account {namespace}/{name} has been marked invalid. Use tokens from the TokenRequest API or manually created secret-based tokens, or remove the '{INVALID_SINCE}' label from the secret to temporarily allow use of this token"
            ));
        }
        Ok((user(&namespace, &name, &uid), audiences.to_vec()))
    }

    /// As `patchSecretWithLastUsedDate`: a server whose clock is ahead may have been quicker.
    fn note_use(&self, secret: &StoredObject, namespace: &str, name: &str, now: i64) {
        let noted = secret.identity.label(LAST_USED);
        if noted.is_some_and(|day| [now, now + DAY_SECONDS].iter().any(|then| *day == *day_of(*then))) {
            return;
        }
        let mut used = self.used.lock();
        if used.len() < USED_MAX {
            used.insert((namespace.to_owned(), name.to_owned()));
        }
    }

    /// The Secrets that are to be labelled as used; they are told once.
    pub fn take_used(&self) -> BTreeSet<(String, String)> {
        std::mem::take(&mut self.used.lock())
    }
}

const DAY_SECONDS: i64 = 24 * 60 * 60;

/// `2026-01-31`, of UTC.
pub fn day_of(seconds: i64) -> String {
    let time = jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::MAX);
    time.strftime("%Y-%m-%d").to_string()
}

/// The user that a ServiceAccount is.
pub fn user(namespace: &str, name: &str, uid: &str) -> UserInfo {
    UserInfo {
        name: format!("system:serviceaccount:{namespace}:{name}"),
        uid: uid.to_owned(),
        groups: vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")],
        extra: Default::default(),
    }
}

/// An entry of a Secret's data, decoded; None if it is absent or no text.
pub fn secret_value(secret: &Value, key: &str) -> Option<String> {
    use base64::Engine as _;
    let encoded = secret.get("data")?.get(key)?.as_str()?;
    let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).ok()?;
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authentication::keys::test_keys;
    use crate::authorization::lister::fake::Objects;
    use serde_json::json;

    const NOW: i64 = 1_800_000_000;
    const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

    fn reference(name: &str, uid: &str) -> Option<Reference> {
        Some(Reference { name: name.into(), uid: uid.into() })
    }

    fn claims() -> Claims {
        Claims {
            aud: Audience(vec![ISSUER.into(), "other".into()]),
            exp: Some(NOW + 100),
            nbf: Some(NOW - 10),
            iat: Some(NOW - 10),
            iss: ISSUER.into(),
            jti: "j".into(),
            sub: "system:serviceaccount:a:robot".into(),
            kubernetes: Some(Bound {
                namespace: "a".into(),
                serviceaccount: reference("robot", "1").unwrap(),
                pod: reference("p", "2"),
                node: reference("n", "3"),
                ..Bound::default()
            }),
            ..Claims::default()
        }
    }

    fn objects() -> Arc<Objects> {
        let named = |name: &str, uid: &str| json!({"metadata": {"name": name, "namespace": "a", "uid": uid}});
        let gone = |name: &str, uid: &str, at: &str| json!({"metadata": {"name": name, "namespace": "a", "uid": uid, "deletionTimestamp": at}});
        Objects::of([
            (SERVICE_ACCOUNTS, named("robot", "1")),
            (PODS, named("p", "2")),
            (PODS, gone("leaving", "5", "2027-01-15T07:59:50Z")),
            (PODS, gone("left", "6", "2027-01-15T07:00:00Z")),
            (SECRETS, named("s", "4")),
            (NODES, json!({"metadata": {"name": "n", "uid": "3"}})),
        ])
    }

    #[test]
    fn a_token_holds_while_what_it_is_bound_to_exists() {
        let key = test_keys::private("p256");
        let issuer = TokenIssuer::load(ISSUER, key.path()).unwrap();
        let verifier = TokenVerifier::new(objects(), vec![ISSUER.into()], keys::verifying_keys(key.path()).unwrap());
        let verify = |change: &dyn Fn(&mut Claims)| {
            let mut claims = claims();
            change(&mut claims);
            verifier.verify(&issuer.sign(&claims).unwrap(), &[ISSUER.to_owned()], NOW)
        };
        fn bound(claims: &mut Claims) -> &mut Bound {
            claims.kubernetes.as_mut().unwrap()
        }
        let (user, audiences) = verify(&|_| ()).unwrap().unwrap();
        assert_eq!(user.name, "system:serviceaccount:a:robot");
        assert_eq!(user.groups, ["system:serviceaccounts", "system:serviceaccounts:a"]);
        assert_eq!(
            (user.uid.as_str(), user.extra[POD_NAME][0].as_str(), user.extra[NODE_UID][0].as_str()),
            ("1", "p", "3")
        );
        assert_eq!(user.extra[super::super::CREDENTIAL_ID], ["JTI=j"]);
        assert_eq!(audiences, [ISSUER]);

        let good: [&dyn Fn(&mut Claims); 3] =
            [&|c| bound(c).secret = reference("s", "4"), &|c| bound(c).pod = reference("leaving", "5"), &|c| {
                bound(c).node = reference("gone", "9")
            }];
        for change in good {
            verify(change).unwrap().unwrap();
        }
        let bad: [&dyn Fn(&mut Claims); 9] = [
            &|c| c.exp = Some(NOW - 1),
            &|c| c.nbf = Some(NOW + 1),
            &|c| c.aud = Audience(vec!["other".into()]),
            &|c| bound(c).serviceaccount.uid = "x".into(),
            &|c| bound(c).pod = reference("p", "x"),
            &|c| bound(c).pod = reference("left", "6"),
            &|c| bound(c).secret = reference("gone", "4"),
            &|c| c.sub = "system:serviceaccount:a:other".into(),
            &|c| (bound(c).pod, bound(c).node) = (None, reference("gone", "9")),
        ];
        for (i, change) in bad.into_iter().enumerate() {
            assert!(verify(change).unwrap().is_err(), "case {i}");
        }
        assert_eq!(verify(&|c| c.iss = "https://elsewhere".into()), None);
        assert_eq!(verifier.verify("no token", &[], NOW), None);
    }

    #[test]
    fn a_token_signed_with_another_key_is_refused() {
        let (ours, theirs) = (test_keys::private("p256"), test_keys::private("p256"));
        let token = TokenIssuer::load(ISSUER, theirs.path()).unwrap().sign(&claims()).unwrap();
        let verifier = TokenVerifier::new(objects(), vec![ISSUER.into()], keys::verifying_keys(ours.path()).unwrap());
        assert!(verifier.verify(&token, &[ISSUER.to_owned()], NOW).unwrap().is_err());
    }

    #[test]
    fn a_token_in_a_secret_holds_while_the_secret_does() {
        use base64::Engine as _;
        let key = test_keys::private("rsa");
        let issuer = TokenIssuer::load(LEGACY_ISSUER, key.path()).unwrap();
        let token = issuer
            .sign(&Claims {
                iss: LEGACY_ISSUER.into(),
                sub: "system:serviceaccount:a:robot".into(),
                legacy_namespace: Some("a".into()),
                legacy_secret: Some("t".into()),
                legacy_name: Some("robot".into()),
                legacy_uid: Some("1".into()),
                ..Claims::default()
            })
            .unwrap();
        let objects = objects();
        let verifier = TokenVerifier::new(objects.clone(), vec![], keys::verifying_keys(key.path()).unwrap());
        assert!(verifier.verify(&token, &[], NOW).unwrap().is_err());
        let data = base64::engine::general_purpose::STANDARD.encode(&token);
        let used = BTreeSet::from([("a".to_owned(), "t".to_owned())]);
        // A use is noted where the label does not tell it; what is marked invalid is not believed.
        for (labels, valid, noted) in [
            (json!({}), true, true),
            (json!({LAST_USED: "2026-01-15"}), true, true),
            (json!({LAST_USED: "2027-01-15"}), true, false),
            (json!({LAST_USED: "2027-01-16"}), true, false),
            (json!({INVALID_SINCE: "2026-12-01"}), false, true),
        ] {
            let meta = json!({"name": "t", "namespace": "a", "labels": labels});
            objects.put(SECRETS, json!({"metadata": meta, "data": {"token": data}}));
            assert_eq!(verifier.verify(&token, &[], NOW).unwrap().is_ok(), valid, "{labels}");
            assert_eq!(verifier.take_used(), if noted { used.clone() } else { BTreeSet::new() }, "{labels}");
        }
    }
}
