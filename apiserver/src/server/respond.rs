//! Outcomes and errors as HTTP responses: the shape and the encoding that the client wants, warnings, compression.

use super::body::Body;
use super::negotiation::{Encoding, Shape, Wanted};
use crate::endpoints::{Outcome, Payload, table};
use crate::registry::Resource;
use apimachinery::meta::split_api_version;
use apimachinery::status::StatusError;
use apimachinery::{facts, protobuf};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WARNING};
use http::{Response, StatusCode};
use serde_json::{Value, json};
use std::io::Write as _;

/// Bodies of this size and more are compressed, when the client takes it. As kube-apiserver.
pub const GZIP_MIN: usize = 128 * 1024;
/// Warnings beyond this are left out. As the `warning` package: 256 bytes each, 4 KiB together.
const WARNING_BYTES_MAX: usize = 256;
const WARNINGS_BYTES_MAX: usize = 4096;

/// Renders an outcome.
pub fn outcome(wanted: Wanted, include: table::Include, outcome: Outcome) -> Response<Body> {
    let Outcome { code, payload, warnings } = outcome;
    let mut response = match payload {
        Payload::Response(response) => response,
        Payload::Stored(resource, object) => match (wanted.shape, wanted.encoding) {
            (Shape::AsIs, Encoding::Json) => compressed(wanted, code, resource.json(&object)),
            (Shape::AsIs, Encoding::Protobuf) if !resource.strategy.converts() => match object.protobuf() {
                Some(encoded) => compressed(wanted, code, encoded.object()),
                None => value(wanted, code, &resource.value(&object)),
            },
            _ => shaped(wanted, include, code, &resource, resource.value(&object)),
        },
        Payload::Object(Some(resource), object) => shaped(wanted, include, code, &resource, object),
        Payload::Object(None, object) => value(wanted, code, &object),
    };
    add_warnings(&mut response, &warnings);
    response
}

/// An object, or a list of them, as the client wants it. What is no object of the resource (a Status) stays what it is.
fn shaped(wanted: Wanted, include: table::Include, code: u16, resource: &Resource, object: Value) -> Response<Body> {
    let items =
        object.get("items").and_then(Value::as_array).filter(|_| is_kind(&object, &format!("{}List", resource.kind)));
    let shaped = match (wanted.shape, items) {
        _ if items.is_none() && !is_kind(&object, &resource.kind) => object,
        (Shape::AsIs, _) => object,
        (Shape::Table, None) => table::one(wanted, resource, &object, include),
        (Shape::Table, Some(items)) => table::many(wanted, resource, items, object["metadata"].clone(), include, true),
        (Shape::Metadata, None) => metadata_only(wanted.meta_version, &object),
        (Shape::MetadataList, Some(items)) => metadata_list(wanted, items, object["metadata"].clone()),
        (Shape::Metadata, Some(_)) | (Shape::MetadataList, None) => return status(&wrong_shape(wanted), wanted),
    };
    value(wanted, code, &shaped)
}

fn is_kind(object: &Value, kind: &str) -> bool {
    object.get("kind").and_then(Value::as_str) == Some(kind)
}

/// The metadata of one object was asked of a list, or the other way round.
pub fn wrong_shape(wanted: Wanted) -> StatusError {
    let message = if wanted.shape == Shape::Metadata {
        "you requested PartialObjectMetadata, but the requested object is a list"
    } else {
        "you requested PartialObjectMetadataList, but the requested object is not a list"
    };
    StatusError::new(406, "NotAcceptable", message)
}

/// PartialObjectMetadata of an object.
pub fn metadata_only(api_version: &str, object: &Value) -> Value {
    let metadata = object.get("metadata").cloned().unwrap_or_else(|| json!({}));
    json!({"kind": "PartialObjectMetadata", "apiVersion": api_version, "metadata": metadata})
}

/// PartialObjectMetadataList of objects.
pub fn metadata_list(wanted: Wanted, objects: &[Value], metadata: Value) -> Value {
    let items: Vec<Value> = objects.iter().map(|object| metadata_only(wanted.meta_version, object)).collect();
    json!({
        "kind": "PartialObjectMetadataList", "apiVersion": wanted.meta_version, "metadata": metadata, "items": items,
    })
}

/// A value in the client's encoding. What has no protobuf form goes as JSON.
pub fn value(wanted: Wanted, code: u16, object: &Value) -> Response<Body> {
    match wanted.encoding {
        Encoding::Json => compressed(wanted, code, object.to_string().into()),
        Encoding::JsonPretty => {
            let mut text = serde_json::to_string_pretty(object).unwrap_or_default();
            text.push('\n');
            compressed(wanted, code, text.into())
        }
        Encoding::Yaml => match apimachinery::yaml::to_string(object) {
            Ok(text) => compressed(wanted, code, text.into()),
            Err(error) => status(&StatusError::internal(error), Wanted::PLAIN),
        },
        Encoding::Protobuf => match protobuf_of(object) {
            Some(bytes) => compressed(wanted, code, bytes.into()),
            None => value(Wanted { encoding: Encoding::Json, ..wanted }, code, object),
        },
    }
}

/// The protobuf of an object that says what it is, if it has any.
pub fn protobuf_of(object: &Value) -> Option<Vec<u8>> {
    let text = |field: &str| object.get(field).and_then(Value::as_str).unwrap_or("");
    let kind = text("kind");
    // `/api` does not say.
    let api_version = if kind == "APIVersions" { "v1" } else { text("apiVersion") };
    let (group, version) = split_api_version(api_version);
    let facts = facts::schema_of(group, version, kind)?;
    Some(protobuf::enclose(api_version, kind, &protobuf::encode(object, facts)))
}

/// The frame of a watch event.
pub fn event(wanted: Wanted, event: &str, object: &Value) -> Bytes {
    if wanted.encoding == Encoding::Protobuf
        && let Some(bytes) = protobuf_of(object)
    {
        return protobuf::watch_frame(event, &bytes).into();
    }
    // The type comes first: who reads it knows what follows before it comes.
    format!("{{\"type\":\"{event}\",\"object\":{object}}}\n").into()
}

fn compressed(wanted: Wanted, code: u16, bytes: Bytes) -> Response<Body> {
    if !wanted.gzip || bytes.len() < GZIP_MIN {
        return plain(code, wanted.content_type(), Body::Full(bytes));
    }
    let mut encoder = GzEncoder::new(Vec::with_capacity(bytes.len() / 8), Compression::fast());
    match encoder.write_all(&bytes).and_then(|()| encoder.finish()) {
        Ok(packed) => {
            let mut response = plain(code, wanted.content_type(), Body::Full(packed.into()));
            response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            response
        }
        Err(_) => plain(code, wanted.content_type(), Body::Full(bytes)),
    }
}

/// A response with a content type.
pub fn plain(code: u16, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

/// Plain text.
pub fn text(code: u16, text: impl Into<Body>) -> Response<Body> {
    plain(code, "text/plain; charset=utf-8", text.into())
}

/// An error as `metav1.Status`.
pub fn status(error: &StatusError, wanted: Wanted) -> Response<Body> {
    let status = serde_json::to_value(&error.0).unwrap_or_default();
    let mut response = value(Wanted { gzip: false, ..wanted }, error.code(), &status);
    let retry = error.0.details.as_ref().and_then(|d| d.retry_after_seconds);
    if let Some(seconds) = retry {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds.max(0) as u32));
    }
    response
}

/// `Warning: 299 - "text"` for each.
pub fn add_warnings(response: &mut Response<Body>, warnings: &[String]) {
    let mut room = WARNINGS_BYTES_MAX;
    for warning in warnings {
        let clean: String = warning.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let mut end = clean.len().min(WARNING_BYTES_MAX);
        while !clean.is_char_boundary(end) {
            end -= 1;
        }
        let quoted = clean[..end].replace('\\', "\\\\").replace('"', "\\\"");
        let Some(rest) = room.checked_sub(quoted.len()) else { return };
        room = rest;
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            response.headers_mut().append(WARNING, value);
        }
    }
}
