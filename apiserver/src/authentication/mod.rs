//! Who is asking: client certificates, bearer tokens, the front proxy's headers. (Being filled.)

use crate::authorization::Authorizer;
use crate::endpoints::Endpoint;
use crate::options::Options;
use crate::server::body::Body;
use crate::storage::Store;
use apimachinery::meta::Gvr;
use apimachinery::status::StatusError;
use rustls_pki_types::CertificateDer;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A user as the rest of the server knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserInfo {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

/// Finds out who sent a request.
pub struct Authenticator {}

// === impl UserInfo ===

impl UserInfo {
    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }
}

// === impl Authenticator ===

impl Authenticator {
    pub fn new(_options: &Options, _store: Arc<Store>) -> anyhow::Result<Self> {
        Ok(Self {})
    }

    /// The user; `Err` (401) for credentials that are there and wrong, or when nobody may be anonymous.
    pub async fn authenticate(
        &self,
        _parts: &http::request::Parts,
        _peer_certificates: &[CertificateDer<'static>],
    ) -> Result<UserInfo, StatusError> {
        Ok(UserInfo {
            name: "system:admin".into(),
            groups: vec!["system:masters".into(), "system:authenticated".into()],
            ..UserInfo::default()
        })
    }
}

/// TokenReviews, TokenRequests (`serviceaccounts/token`), SelfSubjectReviews: (resource, subresource, endpoint).
pub fn endpoints(_options: &Options) -> anyhow::Result<Vec<(Gvr, &'static str, Arc<dyn Endpoint>)>> {
    Ok(Vec::new())
}

/// `/openid/v1/jwks` and `/.well-known/openid-configuration`: None for other paths. Authorized before.
pub fn document(_options: &Options, _path: &str) -> Option<http::Response<Body>> {
    None
}

/// The user that a request is to be carried out as: the one its `Impersonate-*` headers name, if its sender may do that.
pub async fn impersonate(
    _authorizer: &Authorizer,
    user: Arc<UserInfo>,
    _headers: &http::HeaderMap,
) -> Result<Arc<UserInfo>, StatusError> {
    Ok(user)
}
