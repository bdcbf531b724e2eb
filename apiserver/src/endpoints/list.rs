//! GET of a collection: which state to serve, what of it is selected, and its bytes, chunk by chunk.

use super::{Outcome, Payload, ResourceRequest, get, table};
use crate::registry::Resource;
use crate::server::body::{Body, BoxError};
use crate::server::negotiation::{Encoding, Shape, Wanted};
use crate::server::respond;
use crate::storage::StoredObject;
use crate::storage::cache::{Snapshot, in_namespace};
use apimachinery::fields::FieldSelector;
use apimachinery::labels::Selector;
use apimachinery::protobuf;
use apimachinery::status::StatusError;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{BufMut as _, Bytes, BytesMut};
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{CONTENT_ENCODING, HeaderValue};
use http_body::{Frame, SizeHint};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// A list is sent in pieces of about this size.
const CHUNK: usize = 64 * 1024;

/// What a list consists of.
pub struct Selected {
    pub objects: Vec<Arc<StoredObject>>,
    pub revision: i64,
    /// Continues behind the last object; empty at the end.
    pub continue_token: String,
    pub remaining: Option<i64>,
}

/// The selectors of a request.
pub struct Selectors {
    pub labels: Selector,
    pub fields: FieldSelector,
}

/// Where a list goes on. As `continueToken`.
#[derive(Debug, Serialize, Deserialize)]
struct Token {
    v: String,
    /// -1: with whatever is newest.
    rv: i64,
    start: String,
}

const TOKEN_VERSION: &str = "meta.k8s.io/v1";

// === impl Selectors ===

impl Selectors {
    pub fn of(request: &ResourceRequest<'_>) -> Result<Self, StatusError> {
        let query = &request.info.query;
        let labels = Selector::parse(query.get("labelSelector"))
            .map_err(|error| StatusError::bad_request(format!("unable to parse requirement: {error}")))?;
        let fields = FieldSelector::parse(query.get("fieldSelector"))
            .map_err(|error| StatusError::bad_request(format!("unable to parse field selector: {error}")))?;
        let known = request.resource.strategy.selectable_field_names();
        for requirement in fields.requirements() {
            let field = requirement.field.as_str();
            if !matches!(field, "metadata.name" | "metadata.namespace") && !known.contains(&field) {
                return Err(StatusError::bad_request(format!(
                    "Unable to find {:?} that match label selector {:?}, field selector {:?}: field label not supported: {field}",
                    request.resource.gvr.to_string(),
                    query.get("labelSelector"),
                    query.get("fieldSelector"),
                )));
            }
        }
        Ok(Self { labels, fields })
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    pub fn match_object(&self, object: &StoredObject) -> bool {
        object.identity.matches(&self.labels, &self.fields)
    }
}

// === impl Token ===

impl Token {
    fn encode(revision: i64, start: &str) -> String {
        let token = Self { v: TOKEN_VERSION.to_owned(), rv: revision, start: start.to_owned() };
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).unwrap_or_default())
    }

    fn decode(text: &str) -> Result<Self, StatusError> {
        URL_SAFE_NO_PAD
            .decode(text.trim_end_matches('='))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Self>(&bytes).ok())
            .filter(|token| token.v == TOKEN_VERSION)
            .ok_or_else(|| StatusError::bad_request("continue key is not valid"))
    }
}

/// Lists as the client wants it.
pub async fn list(
    request: &ResourceRequest<'_>,
    wanted: Wanted,
    include: table::Include,
) -> Result<Outcome, StatusError> {
    let selected = select(request).await?;
    let resource = request.resource;
    let mut metadata = json!({"resourceVersion": selected.revision.to_string()});
    if !selected.continue_token.is_empty() {
        metadata["continue"] = selected.continue_token.as_str().into();
        if let Some(remaining) = selected.remaining {
            metadata["remainingItemCount"] = remaining.into();
        }
    }
    let response = match (wanted.shape, wanted.encoding) {
        (Shape::AsIs, Encoding::Protobuf) => {
            let items = Items::protobuf(resource, &selected.objects);
            let kind = format!("{}List", resource.kind);
            let head = protobuf::list::head(&resource.api_version, &kind, &metadata, items.size());
            stream(wanted, head, items)
        }
        (Shape::AsIs, Encoding::Json) => {
            let head = format!(
                "{{\"kind\":\"{}List\",\"apiVersion\":\"{}\",\"metadata\":{metadata},\"items\":[",
                resource.kind, resource.api_version
            );
            let items = if resource.strategy.converts() {
                Items::Rendered(selected.objects.iter().map(|object| resource.json(object)).collect())
            } else {
                Items::Stored(selected.objects)
            };
            stream(wanted, head.into(), items)
        }
        (Shape::Metadata, _) => return Err(respond::wrong_shape(wanted)),
        (shape, _) => {
            let values: Vec<Value> = selected.objects.iter().map(|object| resource.value(object)).collect();
            let object = match shape {
                Shape::AsIs => json!({
                    "kind": format!("{}List", resource.kind),
                    "apiVersion": resource.api_version,
                    "metadata": metadata,
                    "items": values,
                }),
                Shape::Metadata | Shape::MetadataList => respond::metadata_list(wanted, &values, metadata),
                Shape::Table => table::many(wanted, resource, &values, metadata, include, true),
            };
            respond::value(wanted, 200, &object)
        }
    };
    Ok(Outcome { code: 200, payload: Payload::Response(response), warnings: Vec::new() })
}

/// Finds what a request lists: the state it asks for, its selectors, its page.
pub async fn select(request: &ResourceRequest<'_>) -> Result<Selected, StatusError> {
    let query = &request.info.query;
    let selectors = Selectors::of(request)?;
    let limit = match query.get("limit") {
        "" => 0,
        text => text.parse::<i64>().map_err(|_| StatusError::bad_request(format!("invalid limit: {text:?}")))?.max(0),
    };
    let (snapshot, start, limit) = state(request, limit as usize).await?;

    let namespace = request.namespace();
    let mut objects = Vec::new();
    let (mut more, mut last_key) = (false, None);
    let mut rest = 0_i64;
    // One object by name needs no walk through all.
    let single = selectors
        .fields
        .required_value("metadata.name")
        .filter(|_| start.is_empty() && (!namespace.is_empty() || !request.resource.namespaced));
    if let Some(name) = single {
        let key = crate::storage::keys::object_key(namespace, name);
        objects.extend(snapshot.objects.get(key.as_str()).filter(|o| selectors.match_object(o)).cloned());
    } else {
        for (key, object) in in_namespace(&snapshot.objects, namespace) {
            if !start.is_empty() && **key < *start {
                continue;
            }
            if !selectors.match_object(object) {
                continue;
            }
            if limit > 0 && objects.len() == limit {
                more = true;
                if !selectors.is_empty() {
                    break;
                }
                rest += 1;
                continue;
            }
            objects.push(object.clone());
            last_key = Some(key.clone());
        }
    }
    let continue_token = match last_key {
        Some(key) if more => Token::encode(snapshot.revision, &format!("{key}\0")),
        _ => String::new(),
    };
    let remaining = (more && selectors.is_empty()).then_some(rest);
    Ok(Selected { objects, revision: snapshot.revision, continue_token, remaining })
}

/// The state that is asked for, the key to begin at, and the limit that holds.
async fn state(request: &ResourceRequest<'_>, limit: usize) -> Result<(Snapshot, String, usize), StatusError> {
    let (store, resource, query) = (&request.context.store, request.resource, &request.info.query);
    let version = query.get("resourceVersion");
    let version_match = query.get("resourceVersionMatch");
    if let token @ ("Exact" | "NotOlderThan" | "") = version_match {
        let refuse =
            |message: &str| Err(StatusError::bad_request(format!("resourceVersionMatch is forbidden: {message}")));
        if !token.is_empty() && version.is_empty() {
            return refuse("resourceVersionMatch is forbidden unless resourceVersion is provided");
        }
        if !token.is_empty() && query.has("continue") && !query.get("continue").is_empty() {
            return refuse("resourceVersionMatch is forbidden when continue is provided");
        }
        if token == "Exact" && version == "0" {
            return refuse("resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"");
        }
    } else {
        return Err(StatusError::bad_request(format!(
            "resourceVersionMatch: Unsupported value: {version_match:?}: supported values: \"Exact\", \"NotOlderThan\", \"\""
        )));
    }
    let cache = store.cache(resource)?;
    let newest = |reached: i64| {
        let snapshot = cache.snapshot();
        Snapshot { objects: snapshot.objects.clone(), revision: snapshot.revision.max(reached) }
    };
    if let token @ [_, ..] = query.get("continue").as_bytes() {
        let token = Token::decode(&String::from_utf8_lossy(token))?;
        if !version.is_empty() && version != "0" {
            return Err(StatusError::bad_request("specifying resource version is not allowed when using continue"));
        }
        if token.rv < 0 {
            let reached = store.wait_for(None).await?;
            return Ok((newest(reached), token.start, limit));
        }
        return match store.snapshot_at(resource, token.rv).await {
            Ok(snapshot) => Ok((snapshot, token.start, limit)),
            Err(mut error) => {
                // Who does not mind an inconsistent list may go on with this.
                if error.code() == 410 {
                    error.0.metadata.continue_ = Some(Token::encode(-1, &token.start));
                }
                Err(error)
            }
        };
    }
    match version {
        "" => {
            let reached = store.wait_for(None).await?;
            Ok((newest(reached), String::new(), limit))
        }
        // Any state will do; as kube-apiserver's cache, the whole of it.
        "0" => {
            let reached = store.progress();
            Ok((newest(reached), String::new(), 0))
        }
        text => {
            let revision = get::parse_version(text)?;
            if version_match == "Exact" || (version_match.is_empty() && limit > 0) {
                return Ok((store.snapshot_at(resource, revision).await?, String::new(), limit));
            }
            let reached = store.wait_for(Some(revision)).await?;
            Ok((newest(reached), String::new(), limit))
        }
    }
}

/// The items of a list body.
enum Items {
    Stored(Vec<Arc<StoredObject>>),
    Rendered(Vec<Bytes>),
    /// Objects whose protobuf has been made.
    Protobuf(Vec<Arc<StoredObject>>),
    Messages(Vec<Bytes>),
}

// === impl Items ===

impl Items {
    /// An object that has no protobuf could not be read; it is logged where that was found out.
    fn protobuf(resource: &Resource, objects: &[Arc<StoredObject>]) -> Self {
        match resource.schema {
            Some(schema) if resource.strategy.converts() => {
                let messages = objects.iter().map(|o| protobuf::encode(&resource.value(o), schema).into());
                Self::Messages(messages.collect())
            }
            _ => Self::Protobuf(objects.iter().filter(|object| object.protobuf().is_some()).cloned().collect()),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Stored(all) | Self::Protobuf(all) => all.len(),
            Self::Rendered(all) | Self::Messages(all) => all.len(),
        }
    }

    /// An item, in JSON behind its opening brace.
    fn item(&self, at: usize) -> &[u8] {
        match self {
            Self::Stored(all) => all[at].list_item(),
            Self::Rendered(all) => &all[at][1..],
            Self::Protobuf(all) => all[at].protobuf().map_or(&[], protobuf::Encoded::message),
            Self::Messages(all) => &all[at],
        }
    }

    fn is_protobuf(&self) -> bool {
        matches!(self, Self::Protobuf(_) | Self::Messages(_))
    }

    /// How many bytes the items take, with what stands before each and between them.
    fn size(&self) -> usize {
        let sizes = (0..self.len()).map(|at| self.item(at).len());
        if self.is_protobuf() {
            sizes.map(|size| protobuf::list::item_head_size(size) + size).sum()
        } else {
            sizes.map(|size| size + 1).sum::<usize>() + self.len().saturating_sub(1)
        }
    }

    fn put(&self, at: usize, chunk: &mut BytesMut) {
        let item = self.item(at);
        if self.is_protobuf() {
            protobuf::list::item_head(chunk, item.len());
        } else {
            chunk.put_slice(if at > 0 { b",{" } else { b"{" });
        }
        chunk.put_slice(item);
    }

    fn end(&self) -> &'static [u8] {
        if self.is_protobuf() { protobuf::list::END } else { b"]}" }
    }
}

/// The response for a list whose beginning is given.
fn stream(wanted: Wanted, head: Vec<u8>, items: Items) -> http::Response<Body> {
    let size = (head.len() + items.size() + items.end().len()) as u64;
    let gzip = wanted.gzip && size >= respond::GZIP_MIN as u64;
    let packer = gzip.then(|| GzEncoder::new(Vec::with_capacity(CHUNK), Compression::fast()));
    let mut body = ListBody { head: Some(head), items, next: 0, ended: false, left: size, packer };
    let body =
        if size <= CHUNK as u64 && !gzip { Body::Full(body.fill().unwrap_or_default()) } else { Body::boxed(body) };
    let mut response = respond::plain(200, wanted.content_type(), body);
    if gzip {
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}

/// Puts a list together as it is read, so that a big one never lies in memory as a whole.
struct ListBody {
    head: Option<Vec<u8>>,
    items: Items,
    next: usize,
    ended: bool,
    left: u64,
    packer: Option<GzEncoder<Vec<u8>>>,
}

// === impl ListBody ===

impl ListBody {
    /// The next piece, not compressed.
    fn fill(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        let mut chunk = BytesMut::with_capacity(CHUNK + 4096);
        if let Some(head) = self.head.take() {
            chunk.put_slice(&head);
        }
        while chunk.len() < CHUNK && self.next < self.items.len() {
            self.items.put(self.next, &mut chunk);
            self.next += 1;
        }
        if self.next == self.items.len() {
            chunk.put_slice(self.items.end());
            self.ended = true;
        }
        Some(chunk.freeze())
    }
}

impl http_body::Body for ListBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        loop {
            let Some(chunk) = this.fill() else {
                let Some(packer) = this.packer.take() else { return Poll::Ready(None) };
                return Poll::Ready(match packer.finish() {
                    Ok(rest) if rest.is_empty() => None,
                    Ok(rest) => Some(Ok(Frame::data(rest.into()))),
                    Err(error) => Some(Err(error.into())),
                });
            };
            let Some(packer) = &mut this.packer else {
                this.left = this.left.saturating_sub(chunk.len() as u64);
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            };
            if let Err(error) = packer.write_all(&chunk) {
                return Poll::Ready(Some(Err(error.into())));
            }
            let packed = std::mem::replace(packer.get_mut(), Vec::with_capacity(CHUNK));
            if !packed.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(packed.into()))));
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        if self.packer.is_some() { SizeHint::default() } else { SizeHint::with_exact(self.left) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_back_and_a_wrong_one_refused() {
        let token = Token::decode(&Token::encode(7, "a/b\0")).unwrap();
        assert_eq!((token.rv, token.start.as_str()), (7, "a/b\0"));
        for text in ["x", "e30", "!!!"] {
            assert_eq!(Token::decode(text).unwrap_err().code(), 400);
        }
    }
}
