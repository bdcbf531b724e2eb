//! The OpenAPI documents: version 3, one a group and version with an index of them, and version 2, one for all. They are made
//! of the facts when first asked for, and kept compressed, which is how clients mostly ask for them.

mod gnostic;
mod paths;
mod schemas;
#[cfg(test)]
mod tests;
mod v2;

use crate::server::body::Body;
use crate::server::respond;
use apimachinery::facts::{self, Docs, TypeDocs};
use apimachinery::status::StatusError;
use apimachinery::time::http_date;
use bytes::Bytes;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use http::Response;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, ETAG, EXPIRES, HeaderMap, HeaderValue, IF_NONE_MATCH,
    LOCATION, VARY,
};
use paths::Paths;
use schemas::{Dialect, Schemas};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{BufWriter, Read as _, Write as _};
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

const JSON: &str = "application/json";
/// The names of protobuf documents: the one in use, and the one that old clients ask for.
const V2_PROTOBUF: [&str; 2] = [
    "application/com.github.proto-openapi.spec.v2.v1.0+protobuf",
    "application/com.github.proto-openapi.spec.v2@v1.0+protobuf",
];
/// Addresses with a hash never mean another document.
const IMMUTABLE_FOR: Duration = Duration::from_secs(365 * 24 * 3600);

/// Version 3, by what follows `/openapi/v3/`: `api/v1`, `apis/apps/v1`.
static DOCUMENTS: LazyLock<BTreeMap<String, OnceLock<Packed>>> =
    LazyLock::new(|| documents().into_iter().map(|path| (path, OnceLock::new())).collect());
static V2_JSON: OnceLock<Packed> = OnceLock::new();
static V2_PB: OnceLock<Packed> = OnceLock::new();

/// A document, compressed.
struct Packed(Bytes);

/// What takes the members of an object, one after the other.
type Put<'p> = &'p mut dyn FnMut(&str, Value);
type AllDocs<'d> = HashMap<&'d str, TypeDocs<'d>>;

/// The document at a path below `/openapi`; None if there is none.
pub fn document(path: &str, hash: &str, headers: &HeaderMap) -> Option<Result<Response<Body>, StatusError>> {
    let path = path.trim_end_matches('/');
    if path == "/openapi/v3" {
        return Some(Ok(respond::plain(200, JSON, Body::from(index().to_string()))));
    }
    if path == "/openapi/v2" {
        return Some(v2_document(headers));
    }
    let path = path.strip_prefix("/openapi/v3/")?;
    let document = DOCUMENTS.get(path)?;
    if accepted(headers, &[JSON]).is_none() {
        return Some(Err(StatusError::not_acceptable(&[JSON])));
    }
    let etag = fingerprint(path);
    if !hash.is_empty() && hash != etag {
        let mut response = respond::plain(301, JSON, Body::Empty);
        if let Ok(address) = HeaderValue::from_str(&address(path)) {
            response.headers_mut().insert(LOCATION, address);
        }
        return Some(Ok(response));
    }
    let document = document.get_or_init(|| Packed::of(|pen| v3(path, pen)));
    let mut response = serve(document, JSON, &etag, headers);
    if !hash.is_empty() {
        let expires = http_date(jiff::Timestamp::now() + IMMUTABLE_FOR);
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("public, immutable"));
        if let Ok(expires) = HeaderValue::from_str(&expires) {
            response.headers_mut().insert(EXPIRES, expires);
        }
    }
    Some(Ok(response))
}

fn v2_document(headers: &HeaderMap) -> Result<Response<Body>, StatusError> {
    let kinds = [JSON, V2_PROTOBUF[0], V2_PROTOBUF[1]];
    let kind = accepted(headers, &kinds).ok_or_else(|| StatusError::not_acceptable(&kinds))?;
    if kind == JSON {
        let document = V2_JSON.get_or_init(|| Packed::of(v2::json));
        return Ok(serve(document, JSON, &fingerprint(JSON), headers));
    }
    // Go does not take the old name for a media type.
    let kind = V2_PROTOBUF[0];
    let document = V2_PB.get_or_init(|| Packed::of(v2::protobuf));
    Ok(serve(document, kind, &fingerprint(kind), headers))
}

/// The first of what the client takes that we have.
fn accepted(headers: &HeaderMap, kinds: &[&'static str]) -> Option<&'static str> {
    let accept = headers.get(ACCEPT).and_then(|v| v.to_str().ok()).filter(|v| !v.trim().is_empty()).unwrap_or("*/*");
    accept.split(',').find_map(|item| {
        let media = item.split(';').next().unwrap_or(item).trim();
        kinds.iter().copied().find(|kind| media == *kind || matches!(media, "*/*" | "application/*"))
    })
}

fn serve(document: &Packed, kind: &'static str, etag: &str, headers: &HeaderMap) -> Response<Body> {
    let etag = HeaderValue::from_str(&format!("\"{etag}\"")).ok();
    let gzip = headers.get(ACCEPT_ENCODING).and_then(|v| v.to_str().ok()).is_some_and(|v| v.contains("gzip"));
    let mut response = if etag.is_some() && headers.get(IF_NONE_MATCH) == etag.as_ref() {
        respond::plain(304, kind, Body::Empty)
    } else if gzip {
        let mut response = respond::plain(200, kind, Body::Full(document.0.clone()));
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        response
    } else {
        respond::plain(200, kind, Body::from(document.unpacked()))
    };
    if let Some(etag) = etag {
        response.headers_mut().insert(ETAG, etag);
    }
    response.headers_mut().insert(VARY, HeaderValue::from_static("Accept"));
    response
}

// === impl Packed ===

impl Packed {
    fn of(write: impl FnOnce(&mut Pen)) -> Self {
        let mut pen = Pen(BufWriter::new(GzEncoder::new(Vec::new(), Compression::default())));
        write(&mut pen);
        let packed = pen.0.into_inner().ok().and_then(|encoder| encoder.finish().ok());
        Self(packed.unwrap_or_default().into())
    }

    fn unpacked(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Err(error) = GzDecoder::new(&*self.0).read_to_end(&mut bytes) {
            tracing::error!(%error, "an OpenAPI document cannot be unpacked");
        }
        bytes
    }
}

/// Writes a document piece by piece: as a whole it would be many megabytes of values. Into memory, so that no write fails.
struct Pen(BufWriter<GzEncoder<Vec<u8>>>);

// === impl Pen ===

impl Pen {
    fn bytes(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes);
    }

    fn value(&mut self, value: &Value) {
        let _ = serde_json::to_writer(&mut self.0, value);
    }

    /// An object, of the members that `write` puts one after the other.
    fn object<T>(&mut self, write: impl FnOnce(&mut dyn FnMut(&str, Value)) -> T) -> T {
        self.bytes(b"{");
        let mut first = true;
        let result = write(&mut |name, value| {
            if !std::mem::replace(&mut first, false) {
                self.bytes(b",");
            }
            self.value(&name.into());
            self.bytes(b":");
            self.value(&value);
        });
        self.bytes(b"}");
        result
    }
}

/// A document is told by what all of them are made of, and its name: it need not be made to be told.
fn fingerprint(name: &str) -> String {
    static FACTS: LazyLock<Sha256> = LazyLock::new(|| {
        let versions = [crate::KUBERNETES_VERSION, env!("CARGO_PKG_VERSION")];
        let hash =
            versions.iter().fold(Sha256::new_with_prefix(Docs::fingerprint()), |hash, text| hash.chain_update(text));
        // What is served may have been switched on.
        facts::groups().iter().flat_map(|group| &group.versions).fold(hash, |hash, version| hash.chain_update(version))
    });
    FACTS.clone().chain_update(name).finalize().iter().map(|byte| format!("{byte:02X}")).collect()
}

fn address(path: &str) -> String {
    format!("/openapi/v3/{path}?hash={}", fingerprint(path))
}

fn documents() -> Vec<String> {
    let mut documents: Vec<String> =
        [".well-known/openid-configuration", "api", "apis", "openid/v1/jwks", "version"].map(str::to_owned).to_vec();
    for group in facts::groups() {
        if !group.name.is_empty() {
            documents.push(format!("apis/{}", group.name));
        }
        documents.extend(group.versions.iter().map(|version| root_path(group.name, version)[1..].to_owned()));
    }
    documents
}

fn index() -> Value {
    let paths: Map<String, Value> =
        DOCUMENTS.keys().map(|path| (path.clone(), json!({"serverRelativeURL": address(path)}))).collect();
    json!({ "paths": paths })
}

fn root_path(group: &str, version: &str) -> String {
    if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") }
}

fn info() -> Value {
    json!({"title": "Kubernetes", "version": crate::KUBERNETES_VERSION})
}

fn bearer_token() -> Value {
    json!({"BearerToken": {
        "description": "Bearer Token authentication", "in": "header", "name": "authorization", "type": "apiKey",
    }})
}

/// Writes a document of version 3.
fn v3(path: &str, pen: &mut Pen) {
    let docs = Docs::inflate();
    let docs = docs.types();
    pen.bytes(b"{\"openapi\":\"3.0.0\",\"info\":");
    pen.value(&info());
    pen.bytes(b",\"paths\":");
    let (types, shared_in) = pen.object(|put| match group_version(path) {
        Some((group, version)) => {
            let mut shared_in = vec![("", "v1")];
            if !group.is_empty() {
                shared_in.push((group, version));
            }
            (paths_of(group, version, &docs, put), shared_in)
        }
        None => (single(path, put).unwrap_or_default(), Vec::new()),
    });
    pen.bytes(b",\"components\":{\"securitySchemes\":");
    pen.value(&bearer_token());
    if !types.is_empty() {
        pen.bytes(b",\"schemas\":");
        pen.object(|put| Schemas::new(Dialect::V3, &docs, shared_in).each(types, put));
    }
    pen.bytes(b"}}");
}

/// The group and version whose document this is.
fn group_version(path: &str) -> Option<(&'static str, &'static str)> {
    let all = facts::groups().iter().flat_map(|group| group.versions.iter().map(|version| (group.name, *version)));
    all.into_iter().find(|(group, version)| root_path(group, version)[1..] == *path)
}

/// The paths of a group and version go to `put`; gives the types that they name.
fn paths_of(group: &'static str, version: &'static str, docs: &AllDocs<'_>, put: Put<'_>) -> BTreeSet<&'static str> {
    let mut paths = Paths::new(&root_path(group, version), group, version, docs, put);
    for kind in facts::kinds().iter().filter(|kind| kind.group == group && kind.version == version) {
        paths.add(kind);
    }
    paths.types
}

/// Documents of one path: discovery, version, keys.
fn single(path: &str, put: Put<'_>) -> Option<BTreeSet<&'static str>> {
    let text = json!({"type": "string"});
    let of = |name: &'static str| (Dialect::V3.reference(name), vec![name]);
    let ((route, item), types) = match path {
        "api" => {
            let (schema, types) = of("meta.v1.APIVersions");
            let description = "get available API versions";
            (paths::single("/api/", "getCoreAPIVersions", description, "core", &paths::OBJECT_TYPES, &schema), types)
        }
        "apis" => {
            let (schema, types) = of("meta.v1.APIGroupList");
            let description = "get available API versions";
            (paths::single("/apis/", "getAPIVersions", description, "apis", &paths::OBJECT_TYPES, &schema), types)
        }
        "version" => {
            let (schema, types) = of("version.Info");
            let description = "get the version information for this server";
            (paths::single("/version/", "getCodeVersion", description, "version", &[JSON], &schema), types)
        }
        ".well-known/openid-configuration" => {
            let (id, description) = (
                "getServiceAccountIssuerOpenIDConfiguration",
                "get service account issuer OpenID configuration, also known as the 'OIDC discovery doc'",
            );
            let route = "/.well-known/openid-configuration/";
            (paths::single(route, id, description, "WellKnown", &[JSON], &text), vec![])
        }
        "openid/v1/jwks" => {
            let (id, description) = (
                "getServiceAccountIssuerOpenIDKeyset",
                "get service account issuer OpenID JSON Web Key Set (contains public token verification keys)",
            );
            (paths::single("/openid/v1/jwks/", id, description, "openid", &["application/jwk-set+json"], &text), vec![])
        }
        path => {
            (paths::group(path.strip_prefix("apis/").filter(|group| !group.contains('/'))?), vec!["meta.v1.APIGroup"])
        }
    };
    put(&route, item);
    Some(types.into_iter().collect())
}
