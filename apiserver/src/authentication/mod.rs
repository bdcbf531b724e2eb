//! Who is asking: the front proxy's headers, client certificates, bearer tokens, or nobody. Each way is asked in this order;
//! the first that knows the user decides. Credentials that are there and wrong are answered with 401, never with anonymity.

pub mod bootstrap_token;
pub mod impersonation;
pub mod keys;
pub mod openid;
pub mod request_header;
pub mod reviews;
pub mod service_account;
mod static_tokens;
pub mod token_request;
pub mod x509;

use crate::authorization::Authorizer;
use crate::authorization::lister::Lister;
use crate::endpoints::Endpoint;
use crate::options::Options;
use crate::server::body::Body;
use crate::storage::Store;
use apimachinery::meta::Gvr;
use apimachinery::status::StatusError;
use base64::Engine as _;
use component_base::serving::Peer;
use http::HeaderMap;
use http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL};
use request_header::RequestHeaders;
use service_account::TokenVerifier;
use static_tokens::StaticTokens;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use x509::Authorities;

pub const ANONYMOUS: &str = "system:anonymous";
pub const AUTHENTICATED: &str = "system:authenticated";
pub const UNAUTHENTICATED: &str = "system:unauthenticated";
/// In a user's extra: which certificate or token it was.
pub const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";
const INVALID_TOKEN: &str = "invalid bearer token";
/// A bearer token hidden in a WebSocket's list of protocols, for browsers, which cannot set headers.
const WEBSOCKET_BEARER: &str = "base64url.bearer.authorization.k8s.io.";

/// A user as the rest of the server knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserInfo {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

/// Finds out who sent a request.
pub struct Authenticator {
    lister: Arc<dyn Lister>,
    request_headers: Option<RequestHeaders>,
    client_ca: Option<Authorities>,
    static_tokens: Option<StaticTokens>,
    tokens: TokenVerifier,
    bootstrap_tokens: bool,
    anonymous: bool,
    audiences: Vec<String>,
}

// === impl UserInfo ===

impl UserInfo {
    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    fn anonymous() -> Self {
        Self { name: ANONYMOUS.to_owned(), groups: vec![UNAUTHENTICATED.to_owned()], ..Self::default() }
    }

    /// As the group adder of the authenticated.
    fn authenticated(mut self) -> Self {
        if !self.in_group(AUTHENTICATED) && !self.in_group(UNAUTHENTICATED) {
            self.groups.push(AUTHENTICATED.to_owned());
        }
        self
    }
}

// === impl Authenticator ===

impl Authenticator {
    pub fn new(options: &Options, store: Arc<Store>) -> anyhow::Result<Self> {
        Self::with(options, store)
    }

    /// Over any source of objects.
    pub fn with(options: &Options, lister: Arc<dyn Lister>) -> anyhow::Result<Self> {
        let issuers = options.service_account_issuer.clone();
        let allows_everything = options.authorization_mode.iter().any(|mode| mode == "AlwaysAllow");
        if options.anonymous_auth && allows_everything {
            tracing::warn!("nobody may be anonymous where --authorization-mode is AlwaysAllow");
        }
        Ok(Self {
            request_headers: RequestHeaders::from_options(options)?,
            client_ca: options.client_ca_file.as_deref().map(Authorities::load).transpose()?,
            static_tokens: options.token_auth_file.as_deref().map(StaticTokens::load).transpose()?,
            tokens: TokenVerifier::new(lister.clone(), issuers, openid::verifying_keys(options)?),
            bootstrap_tokens: options.enable_bootstrap_token_auth,
            // Who need not say who they are may then do nothing unasked.
            anonymous: options.anonymous_auth && !allows_everything,
            audiences: openid::api_audiences(options),
            lister,
        })
    }

    /// The user; `Err` (401) for credentials that are there and wrong, or when nobody may be anonymous.
    pub fn authenticate(&self, parts: &http::request::Parts) -> Result<UserInfo, StatusError> {
        self.identify(&parts.headers, parts.extensions.get())
    }

    fn identify(&self, headers: &HeaderMap, peer: Option<&Peer>) -> Result<UserInfo, StatusError> {
        let mut refusals: Vec<String> = Vec::new();
        if let Some(peer) = peer.filter(|peer| !peer.certificates.is_empty()) {
            let ask = |proxy: &RequestHeaders| proxy.user(headers, peer);
            // Of those that no header names it is asked last whether they are a proxy.
            let (first, last) = match &self.request_headers {
                Some(proxy) if proxy.may_name(headers) => (Some(proxy), None),
                proxy => (None, proxy.as_ref()),
            };
            match first.map_or(Ok(None), ask) {
                Ok(Some(user)) => return Ok(user.authenticated()),
                Ok(None) => {}
                Err(why) => refusals.push(why),
            }
            if let Some(client_ca) = &self.client_ca {
                match client_ca.verify(&peer.certificates, peer.digest) {
                    Ok(identity) => return Ok(identity.user().authenticated()),
                    Err(why) => refusals.push(why),
                }
            }
            refusals.extend(last.and_then(|proxy| ask(proxy).err()));
        }
        if let Some(token) = bearer_token(headers) {
            match self.authenticate_token(&token, &self.audiences) {
                Ok((user, _)) => return Ok(user),
                Err(why) => refusals.push(why),
            }
        }
        if refusals.is_empty() && self.anonymous {
            return Ok(UserInfo::anonymous());
        }
        tracing::debug!(reasons = ?refusals, "unable to authenticate the request");
        Err(StatusError::unauthorized())
    }

    /// Who holds a bearer token, and for which of the audiences it is; why it is refused else.
    pub fn authenticate_token(&self, token: &str, audiences: &[String]) -> Result<(UserInfo, Vec<String>), String> {
        let now = jiff::Timestamp::now().as_second();
        if let Some(outcome) = self.tokens.verify(token, audiences, now) {
            return outcome.map(|(user, audiences)| (user.authenticated(), audiences));
        }
        let user = self.static_tokens.as_ref().and_then(|tokens| tokens.user(token)).or_else(|| {
            self.bootstrap_tokens.then(|| bootstrap_token::verify(self.lister.as_ref(), token, now)).flatten()
        });
        if let Some(user) = user {
            // Such tokens are for the API, whoever asks for what.
            let matching: Vec<String> = audiences.iter().filter(|a| self.audiences.contains(a)).cloned().collect();
            if matching.is_empty() && !audiences.is_empty() {
                return Err(INVALID_TOKEN.to_owned());
            }
            return Ok((user.authenticated(), matching));
        }
        Err(INVALID_TOKEN.to_owned())
    }

    /// Secrets whose tokens have been used and are to be labelled so: namespaces and names, told once.
    pub fn take_used_secrets(&self) -> BTreeSet<(String, String)> {
        self.tokens.take_used()
    }

    /// Those that a token for the API itself is for.
    pub fn audiences(&self) -> &[String] {
        &self.audiences
    }

    /// The text of `--client-ca-file` and `--requestheader-client-ca-file`, for who delegates to us.
    pub fn ca_texts(&self) -> (Option<Arc<str>>, Option<Arc<str>>) {
        let request_headers = self.request_headers.as_ref().map(RequestHeaders::ca_text);
        (self.client_ca.as_ref().map(Authorities::pem), request_headers)
    }
}

/// The token of `Authorization: Bearer …`, or of a WebSocket's protocols.
fn bearer_token(headers: &HeaderMap) -> Option<String> {
    if let Some(value) = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()) {
        let mut words = value.split_whitespace();
        let scheme = words.next().unwrap_or_default();
        if scheme.eq_ignore_ascii_case("bearer") {
            return words.next().map(ToOwned::to_owned);
        }
    }
    let protocols = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    let hidden = protocols.flat_map(|value| value.split(',')).find_map(|p| p.trim().strip_prefix(WEBSOCKET_BEARER))?;
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(hidden).ok()?;
    String::from_utf8(bytes).ok()
}

/// The user that a request is to be carried out as: the one its `Impersonate-*` headers name, if its sender may do that.
pub async fn impersonate(
    authorizer: &Authorizer,
    user: Arc<UserInfo>,
    headers: &HeaderMap,
) -> Result<Arc<UserInfo>, StatusError> {
    Ok(impersonation::impersonate(authorizer, &user, headers).await?.map_or(user, Arc::new))
}

/// TokenReviews, TokenRequests (`serviceaccounts/token`), SelfSubjectReviews: (resource, subresource, endpoint).
pub fn endpoints(options: &Options) -> anyhow::Result<Vec<(Gvr, &'static str, Arc<dyn Endpoint>)>> {
    let mut endpoints = reviews::endpoints();
    endpoints.push((
        Gvr::new("", "v1", "serviceaccounts"),
        "token",
        Arc::new(token_request::TokenRequests::from_options(options)?),
    ));
    Ok(endpoints)
}

/// `/openid/v1/jwks` and `/.well-known/openid-configuration`: None for other paths. Authorized before.
pub fn document(options: &Options, path: &str) -> Option<http::Response<Body>> {
    openid::document(options, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authorization::lister::fake::Objects;
    use clap::Parser as _;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        pairs.collect::<Vec<(http::HeaderName, http::HeaderValue)>>().into_iter().collect()
    }

    #[test]
    fn no_credentials_are_anonymous_and_wrong_ones_are_refused() {
        let options =
            Options::parse_from(["apiserver", "--etcd-servers=http://127.0.0.1:1", "--authorization-mode=RBAC"]);
        let authenticator = Authenticator::with(&options, Objects::of([])).unwrap();
        let user = authenticator.identify(&HeaderMap::new(), None).unwrap();
        assert_eq!((user.name.as_str(), user.groups.as_slice()), (ANONYMOUS, &[UNAUTHENTICATED.to_owned()][..]));
        // Another scheme is not ours to judge.
        assert!(authenticator.identify(&headers(&[("authorization", "Basic eDp5")]), None).is_ok());
        let error = authenticator.identify(&headers(&[("authorization", "Bearer x")]), None).unwrap_err();
        assert_eq!((error.code(), error.message()), (401, "Unauthorized"));
        let strict = Options { anonymous_auth: false, ..options.clone() };
        let open = Options { authorization_mode: vec!["AlwaysAllow".to_owned()], ..options };
        for options in [strict, open] {
            let authenticator = Authenticator::with(&options, Objects::of([])).unwrap();
            assert!(authenticator.identify(&HeaderMap::new(), None).is_err());
        }
    }

    #[test]
    fn a_token_is_found_in_the_header_or_among_the_protocols() {
        for (pairs, expected) in [
            (&[("authorization", "Bearer abc")][..], Some("abc")),
            (&[("authorization", "bearer  abc ")], Some("abc")),
            (&[("authorization", "Bearer")], None),
            (
                &[("sec-websocket-protocol", "v4.channel.k8s.io, base64url.bearer.authorization.k8s.io.YWJj")],
                Some("abc"),
            ),
            (&[("sec-websocket-protocol", "v4.channel.k8s.io")], None),
            (&[], None),
        ] {
            assert_eq!(bearer_token(&headers(pairs)).as_deref(), expected, "{pairs:?}");
        }
    }
}
