//! Registry credentials out of `imagePullSecrets`: `kubernetes.io/dockerconfigjson` and the older `kubernetes.io/dockercfg`.
//! Which entry fits which image is decided as Kubernetes' keyring does: the longest matching URL first.

use std::collections::BTreeMap;

use base64::Engine;
use k8s_openapi::api::core::v1::Secret;
use serde::Deserialize;

use super::pulled::{self, SecretSource};
use super::reference::ImageReference;

/// What a registry asks for.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Credentials {
    pub username: String,
    pub password: String,
    /// `user:password` in base64, where the two above are not given.
    pub auth: String,
    #[serde(rename = "identitytoken")]
    pub identity_token: String,
    #[serde(rename = "registrytoken")]
    pub registry_token: String,
    /// The secret that they are of.
    #[serde(skip)]
    pub source: Option<SecretSource>,
}

#[derive(Deserialize)]
struct DockerConfigJson {
    #[serde(default)]
    auths: BTreeMap<String, Credentials>,
}

/// The credentials of some secrets, by the URL that each is for.
#[derive(Default)]
pub struct Keyring {
    entries: Vec<(RegistryPattern, Credentials)>,
}

/// `host[:port][/path]` where the host's labels may be globs (`*.example.com`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RegistryPattern {
    host: String,
    port: Option<String>,
    path: String,
}

// === impl Credentials ===

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

impl Credentials {
    /// With `auth` taken apart into user and password.
    pub(super) fn complete(mut self) -> Credentials {
        if self.username.is_empty() && self.password.is_empty() && !self.auth.is_empty() {
            let decoded = base64::engine::general_purpose::STANDARD.decode(self.auth.trim()).unwrap_or_default();
            if let Some((user, password)) = String::from_utf8_lossy(&decoded).split_once(':') {
                user.clone_into(&mut self.username);
                password.trim_end_matches('\0').clone_into(&mut self.password);
            }
        }
        self.auth.clear();
        self
    }

    /// What is remembered of them when they opened a registry.
    fn of(&self, secret: &Secret) -> SecretSource {
        let all = [&self.username, &self.password, &self.identity_token, &self.registry_token];
        let meta = &secret.metadata;
        SecretSource {
            uid: meta.uid.clone().unwrap_or_default(),
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            credential_hash: pulled::hash(&all.map(String::as_str).join("\0")),
        }
    }
}

// === impl Keyring ===

impl Keyring {
    /// The credentials in `secrets`. One that is of another type or cannot be read gives none.
    pub fn from_secrets<'s>(secrets: impl IntoIterator<Item = &'s Secret>) -> Keyring {
        let mut entries = Vec::new();
        for secret in secrets {
            let auths = match secret_auths(secret) {
                Ok(auths) => auths,
                Err(error) => {
                    tracing::warn!(secret = secret.metadata.name.as_deref(), %error, "image pull secret cannot be read");
                    continue;
                }
            };
            for (url, credentials) in auths {
                if let Some(pattern) = RegistryPattern::parse(&url) {
                    let mut credentials = credentials.complete();
                    credentials.source = Some(credentials.of(secret));
                    entries.push((pattern, credentials));
                }
            }
        }
        // The most specific first. As the keyring's reverse sort of its index.
        entries.sort_by(|(a, _), (b, _)| b.sort_key().cmp(&a.sort_key()));
        Keyring { entries }
    }

    /// The credentials to try for `image`, best first.
    pub fn lookup(&self, image: &ImageReference) -> Vec<Credentials> {
        self.entries.iter().filter(|(pattern, _)| pattern.matches(image)).map(|(_, found)| found.clone()).collect()
    }
}

fn secret_auths(secret: &Secret) -> Result<BTreeMap<String, Credentials>, serde_json::Error> {
    let value = |key: &str| secret.data.as_ref().and_then(|data| data.get(key));
    match secret.type_.as_deref() {
        Some("kubernetes.io/dockerconfigjson") => match value(".dockerconfigjson") {
            Some(bytes) => Ok(serde_json::from_slice::<DockerConfigJson>(&bytes.0)?.auths),
            None => Ok(BTreeMap::new()),
        },
        Some("kubernetes.io/dockercfg") => match value(".dockercfg") {
            Some(bytes) => serde_json::from_slice(&bytes.0),
            None => Ok(BTreeMap::new()),
        },
        _ => Ok(BTreeMap::new()),
    }
}

// === impl RegistryPattern ===

impl RegistryPattern {
    pub(super) fn parse(url: &str) -> Option<RegistryPattern> {
        let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://")).unwrap_or(url);
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        // Docker's own registry is known by several names and API versions.
        let path = path.trim_end_matches('/');
        let path = if matches!(path, "v1" | "v2") {
            ""
        } else {
            path.strip_prefix("v1/").or_else(|| path.strip_prefix("v2/")).unwrap_or(path)
        };
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (host, Some(port.to_owned())),
            _ => (authority, None),
        };
        let host = if matches!(host, "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { host };
        if host.is_empty() {
            return None;
        }
        Some(RegistryPattern { host: host.to_lowercase(), port, path: path.to_owned() })
    }

    fn sort_key(&self) -> (usize, &str, &str) {
        (self.path.len(), &self.host, &self.path)
    }

    pub(super) fn matches(&self, image: &ImageReference) -> bool {
        let (host, port) = match image.domain.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (host, Some(port)),
            _ => (image.domain.as_str(), None),
        };
        let labels: Vec<&str> = self.host.split('.').collect();
        let of_image: Vec<&str> = host.split('.').collect();
        self.port.as_deref() == port
            && labels.len() == of_image.len()
            && labels.iter().zip(&of_image).all(|(pattern, label)| glob(pattern, label))
            && image.path.starts_with(&self.path)
    }
}

/// `*` matches any run of characters of one label.
fn glob(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, tail)) => match text.strip_prefix(head) {
            None => false,
            Some(rest) => (0..=rest.len()).any(|at| rest.is_char_boundary(at) && glob(tail, &rest[at..])),
        },
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;
    use serde_json::json;

    use super::*;

    fn keyring(auths: serde_json::Value) -> Keyring {
        let secret = Secret {
            type_: Some("kubernetes.io/dockerconfigjson".into()),
            data: Some(BTreeMap::from([(
                ".dockerconfigjson".to_owned(),
                ByteString(json!({"auths": auths}).to_string().into_bytes()),
            )])),
            ..Default::default()
        };
        Keyring::from_secrets([&secret])
    }

    #[test]
    fn the_entry_for_the_image_is_found() {
        let auth = |user: &str| json!({"username": user, "password": "x"});
        let ring = keyring(json!({
            "https://index.docker.io/v1/": auth("hub"),
            "registry.example:5000": auth("example"),
            "registry.example:5000/team": auth("team"),
            "*.glob.io": auth("glob"),
            "https://b64.io": {"auth": "bWU6c2VjcmV0OndpdGg6Y29sb25z"},
        }));
        let cases: [(&str, &[&str]); 6] = [
            ("busybox", &["hub"]),
            ("registry.example:5000/app", &["example"]),
            ("registry.example:5000/team/app", &["team", "example"]),
            ("registry.example/app", &[]),
            ("eu.glob.io/app", &["glob"]),
            ("a.eu.glob.io/app", &[]),
        ];
        for (image, want) in cases {
            let found = ring.lookup(&ImageReference::parse(image).expect("a name"));
            assert_eq!(found.iter().map(|c| c.username.as_str()).collect::<Vec<_>>(), want, "{image}");
        }
        let found = ring.lookup(&ImageReference::parse("b64.io/x").expect("a name"));
        assert_eq!((found[0].username.as_str(), found[0].password.as_str()), ("me", "secret:with:colons"));
    }

    #[test]
    fn a_broken_secret_gives_no_credentials() {
        let mut secret = Secret { type_: Some("kubernetes.io/dockerconfigjson".into()), ..Default::default() };
        secret.data = Some(BTreeMap::from([(".dockerconfigjson".to_owned(), ByteString(b"{".to_vec()))]));
        assert!(Keyring::from_secrets([&secret]).entries.is_empty());
    }

    #[test]
    fn credentials_are_not_shown() {
        let shown = format!("{:?}", Credentials { password: "hunter2".into(), ..Default::default() });
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
