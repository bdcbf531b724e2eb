//! Outcomes and errors as HTTP responses: the shape and the encoding that the client wants, warnings, compression.

use super::body::Body;
use super::negotiation::{Encoding, Shape, Wanted};
use crate::endpoints::{Outcome, Payload, table};
use apimachinery::status::StatusError;
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
        Payload::Stored(resource, object) => match wanted.shape {
            Shape::AsIs => encoded(wanted, code, resource.json(&object)),
            Shape::Metadata => value(wanted, code, &metadata_only(&resource.value(&object))),
            Shape::Table => value(wanted, code, &table::one(&resource, &resource.value(&object), include)),
        },
        Payload::Object(resource, object) => match (wanted.shape, resource) {
            (Shape::Metadata, Some(_)) => value(wanted, code, &metadata_only(&object)),
            (Shape::Table, Some(resource)) => value(wanted, code, &table::one(&resource, &object, include)),
            _ => value(wanted, code, &object),
        },
    };
    add_warnings(&mut response, &warnings);
    response
}

/// PartialObjectMetadata of an object.
pub fn metadata_only(object: &Value) -> Value {
    let metadata = object.get("metadata").cloned().unwrap_or_else(|| json!({}));
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
}

/// A value in the client's encoding.
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
            Err(error) => status(&StatusError::internal(error)),
        },
    }
}

/// JSON bytes in the client's encoding.
pub fn encoded(wanted: Wanted, code: u16, json: Bytes) -> Response<Body> {
    match wanted.encoding {
        Encoding::Json => compressed(wanted, code, json),
        _ => value(wanted, code, &serde_json::from_slice(&json).unwrap_or(Value::Null)),
    }
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
pub fn status(error: &StatusError) -> Response<Body> {
    let body = serde_json::to_vec(&error.0).unwrap_or_default();
    let mut response = plain(error.code(), super::negotiation::JSON, Body::Full(body.into()));
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
