//! Who calls a daemon, and whether it may: the client CA first, then the API server's word (TokenReview,
//! SubjectAccessReview), remembered for a short while. As `DelegatingAuthenticator`/`DelegatingAuthorizer`.
use crate::x509;
use apimachinery::status::StatusError;
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec},
    authorization::v1::{NonResourceAttributes, ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
};
use kube::{Api, Client, api::PostParams};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    time::{Duration, Instant},
};
use tracing::warn;

const REMEMBERED: usize = 4096;

/// A caller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserInfo {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

/// What a caller wants to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A path that is no API resource: `/metrics`.
    NonResource { verb: String, path: String },
    /// As the kubelet asks: `get nodes/log node-1`.
    Resource { verb: String, resource: String, subresource: String, name: String },
}

/// Asks the API server; without a client every token is refused and nobody but `system:masters` may do anything.
pub struct DelegatedAuth {
    client: Option<Client>,
    anonymous: bool,
    /// Paths that everybody may read, such as `/healthz`.
    open_paths: Vec<String>,
    remembered: Remembered,
    tokens: Cache<String, Option<UserInfo>>,
    decisions: Cache<(String, Vec<String>, Access), bool>,
}

/// How long the API server's answers are believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remembered {
    pub tokens: Duration,
    pub allowed: Duration,
    pub refused: Duration,
}

impl Default for Remembered {
    fn default() -> Self {
        let short = Duration::from_secs(10);
        Self { tokens: short, allowed: short, refused: short }
    }
}

struct Cache<K, V>(Mutex<HashMap<K, (V, Instant)>>);

impl UserInfo {
    pub fn anonymous() -> Self {
        Self {
            name: "system:anonymous".to_owned(),
            groups: vec!["system:unauthenticated".to_owned()],
            ..Self::default()
        }
    }

    /// Of a verified client certificate: the common name, and the organizations as groups.
    pub fn from_certificate(der: &[u8]) -> Option<Self> {
        let info = x509::read_der(der).ok().filter(|i| !i.common_name.is_empty())?;
        let mut groups = info.organizations;
        groups.push("system:authenticated".to_owned());
        Some(Self { name: info.common_name, groups, ..Self::default() })
    }
}

impl DelegatedAuth {
    pub fn new(client: Option<Client>, anonymous: bool, open_paths: &[&str]) -> Self {
        let open_paths = open_paths.iter().map(|p| (*p).to_owned()).collect();
        let remembered = Remembered::default();
        Self { client, anonymous, open_paths, remembered, tokens: Cache::default(), decisions: Cache::default() }
    }

    /// Believes answers for another while.
    pub fn remembering(mut self, remembered: Remembered) -> Self {
        self.remembered = remembered;
        self
    }

    /// `certificate` is the verified leaf of the connection, if the client showed one.
    pub async fn authenticate(
        &self,
        headers: &http::HeaderMap,
        certificate: Option<&[u8]>,
    ) -> Result<UserInfo, StatusError> {
        if let Some(user) = certificate.and_then(UserInfo::from_certificate) {
            return Ok(user);
        }
        let header = headers.get(http::header::AUTHORIZATION).and_then(|h| h.to_str().ok());
        let Some(token) = header.and_then(|h| h.strip_prefix("Bearer ")).map(str::trim) else {
            return if self.anonymous { Ok(UserInfo::anonymous()) } else { Err(StatusError::unauthorized()) };
        };
        if let Some(known) = self.tokens.get(&token.to_owned(), |_| self.remembered.tokens) {
            return known.ok_or_else(StatusError::unauthorized);
        }
        let user = self.review_token(token).await?;
        self.tokens.put(token.to_owned(), user.clone());
        user.ok_or_else(StatusError::unauthorized)
    }

    pub async fn authorize(&self, user: &UserInfo, access: &Access) -> Result<(), StatusError> {
        if let Access::NonResource { path, .. } = access
            && self.open_paths.iter().any(|open| path == open || path.starts_with(&format!("{open}/")))
        {
            return Ok(());
        }
        if user.groups.iter().any(|g| g == "system:masters") {
            return Ok(());
        }
        let key = (user.name.clone(), user.groups.clone(), access.clone());
        let believed = |allowed: &bool| if *allowed { self.remembered.allowed } else { self.remembered.refused };
        let allowed = match self.decisions.get(&key, believed) {
            Some(allowed) => allowed,
            None => {
                let allowed = self.review_access(user, access).await?;
                self.decisions.put(key, allowed);
                allowed
            }
        };
        if allowed {
            return Ok(());
        }
        Err(match access {
            Access::NonResource { verb, path } => {
                StatusError::forbidden("", "", "", &format!("User {:?} cannot {verb} path {path:?}", user.name))
            }
            Access::Resource { verb, resource, subresource, name } => StatusError::forbidden(
                "",
                resource,
                name,
                &format!(
                    "User {:?} cannot {verb} resource \"{resource}/{subresource}\" in API group \"\" at the cluster scope",
                    user.name
                ),
            ),
        })
    }

    async fn review_token(&self, token: &str) -> Result<Option<UserInfo>, StatusError> {
        let Some(client) = &self.client else { return Ok(None) };
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), audiences: None },
            ..TokenReview::default()
        };
        let answer = Api::<TokenReview>::all(client.clone()).create(&PostParams::default(), &review).await;
        let status = answer.map_err(|e| unavailable("TokenReview", &e))?.status.unwrap_or_default();
        let user = status.user.filter(|_| status.authenticated == Some(true));
        Ok(user.map(|u| UserInfo {
            name: u.username.unwrap_or_default(),
            uid: u.uid.unwrap_or_default(),
            groups: u.groups.unwrap_or_default(),
            extra: u.extra.unwrap_or_default(),
        }))
    }

    async fn review_access(&self, user: &UserInfo, access: &Access) -> Result<bool, StatusError> {
        let Some(client) = &self.client else { return Ok(false) };
        let given = |s: &str| (!s.is_empty()).then(|| s.to_owned());
        let mut spec = SubjectAccessReviewSpec {
            user: Some(user.name.clone()),
            uid: given(&user.uid),
            groups: Some(user.groups.clone()),
            extra: Some(user.extra.clone()),
            ..SubjectAccessReviewSpec::default()
        };
        match access {
            Access::NonResource { verb, path } => {
                spec.non_resource_attributes = Some(NonResourceAttributes { verb: given(verb), path: given(path) });
            }
            Access::Resource { verb, resource, subresource, name } => {
                spec.resource_attributes = Some(ResourceAttributes {
                    verb: given(verb),
                    version: Some("v1".to_owned()),
                    resource: given(resource),
                    subresource: given(subresource),
                    name: given(name),
                    ..ResourceAttributes::default()
                });
            }
        }
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let answer = Api::<SubjectAccessReview>::all(client.clone()).create(&PostParams::default(), &review).await;
        Ok(answer.map_err(|e| unavailable("SubjectAccessReview", &e))?.status.is_some_and(|s| s.allowed))
    }
}

fn unavailable(what: &str, error: &kube::Error) -> StatusError {
    warn!(review = what, %error, "cannot ask the API server who may call");
    StatusError::service_unavailable(format!("{what} could not be made; the API server may be out of reach"))
}

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Hash + Eq, V: Clone> Cache<K, V> {
    fn get(&self, key: &K, believed: impl Fn(&V) -> Duration) -> Option<V> {
        self.0.lock().get(key).filter(|(value, at)| at.elapsed() < believed(value)).map(|(value, _)| value.clone())
    }

    fn put(&self, key: K, value: V) {
        let mut entries = self.0.lock();
        if entries.len() >= REMEMBERED {
            entries.clear();
        }
        entries.insert(key, (value, Instant::now()));
    }
}
