//! Content types: what the client wants to read, and what it has sent.

use apimachinery::decode::{FieldValidation, decode_json, decode_value};
use apimachinery::facts::TypeFacts;
use apimachinery::protobuf;
use apimachinery::status::StatusError;
use http::HeaderMap;
use http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE, USER_AGENT};
use serde_json::Value;

/// Bodies nested deeper than this are refused.
const DEPTH_MAX: usize = 127;
pub const JSON: &str = "application/json";
pub const YAML: &str = "application/yaml";
/// Read, not written (yet): who can read it can read JSON.
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
const SUPPORTED: [&str; 2] = [JSON, YAML];
const READABLE: [&str; 3] = [JSON, YAML, PROTOBUF];

/// How text is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Json,
    JsonPretty,
    Yaml,
}

/// What is made of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    AsIs,
    Table,
    /// PartialObjectMetadata, or a list of them.
    Metadata,
}

/// What the client wants to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub encoding: Encoding,
    pub shape: Shape,
    pub gzip: bool,
}

// === impl Wanted ===

impl Wanted {
    /// From the headers, and the `pretty` parameter (empty: absent). The first media type that can be had is taken.
    pub fn of(headers: &HeaderMap, pretty: &str) -> Result<Self, StatusError> {
        let accept = headers.get(ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("*/*");
        let (encoding, shape) = accept
            .split(',')
            .find_map(|item| media_type(item.trim()))
            .or_else(|| accept.trim().is_empty().then_some((Encoding::Json, Shape::AsIs)))
            .ok_or_else(|| StatusError::not_acceptable(&SUPPORTED))?;
        let pretty = match pretty {
            "" => headers.get(USER_AGENT).and_then(|v| v.to_str().ok()).is_some_and(is_person),
            text => !matches!(text, "0" | "false"),
        };
        let encoding = if encoding == Encoding::Json && pretty { Encoding::JsonPretty } else { encoding };
        let gzip = headers.get(ACCEPT_ENCODING).and_then(|v| v.to_str().ok()).is_some_and(|v| v.contains("gzip"));
        Ok(Self { encoding, shape, gzip })
    }

    pub fn content_type(self) -> &'static str {
        match self.encoding {
            Encoding::Json | Encoding::JsonPretty => JSON,
            Encoding::Yaml => YAML,
        }
    }
}

/// Kubernetes indents for these.
fn is_person(agent: &str) -> bool {
    ["curl", "Wget", "Mozilla/5.0"].iter().any(|prefix| agent.starts_with(prefix))
}

fn media_type(item: &str) -> Option<(Encoding, Shape)> {
    let mut parts = item.split(';').map(str::trim);
    let encoding = match parts.next()? {
        "application/json" | "*/*" | "application/*" => Encoding::Json,
        "application/yaml" => Encoding::Yaml,
        _ => return None,
    };
    let (mut kind, mut group, mut version) = ("", "", "");
    for part in parts {
        match part.split_once('=') {
            Some(("as", value)) => kind = value,
            Some(("g", value)) => group = value,
            Some(("v", value)) => version = value,
            _ => {}
        }
    }
    let shape = match kind {
        "" => Shape::AsIs,
        _ if group != "meta.k8s.io" || version != "v1" => return None,
        "Table" => Shape::Table,
        "PartialObjectMetadata" | "PartialObjectMetadataList" => Shape::Metadata,
        _ => return None,
    };
    Some((encoding, shape))
}

/// The media type of a request's body, without parameters; JSON if it says nothing.
pub fn content_type(headers: &HeaderMap) -> &str {
    let text = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or(JSON);
    text.split(';').next().unwrap_or(text).trim()
}

/// An object and what its author should be warned of.
pub struct Incoming {
    pub object: Value,
    pub warnings: Vec<String>,
}

/// Decodes a body as an object of a kind. What is absent of `apiVersion` and `kind` is filled in; something else is refused.
pub fn decode(
    headers: &HeaderMap,
    body: &[u8],
    schema: Option<&'static TypeFacts>,
    api_version: &str,
    kind: &str,
    field_validation: FieldValidation,
) -> Result<Incoming, StatusError> {
    let yaml = match content_type(headers) {
        JSON | "text/json" | "*/*" | "" => false,
        YAML | "text/yaml" | "application/x-yaml" => true,
        // What curl sends when it is told nothing.
        "application/x-www-form-urlencoded" => false,
        PROTOBUF => return decode_protobuf(body, schema, api_version, kind),
        _ => return Err(StatusError::unsupported_media_type(&READABLE)),
    };
    if depth(body) > DEPTH_MAX {
        return Err(StatusError::bad_request(format!("the object is nested deeper than {DEPTH_MAX} levels")));
    }
    let version = apimachinery::meta::split_api_version(api_version).1;
    let refuse = |message: String| StatusError::bad_request(message);
    let decoded = match schema {
        Some(schema) if yaml => decode_value(yaml_document(body)?, schema, field_validation),
        Some(schema) => decode_json(body, schema, field_validation),
        None => {
            let object = if yaml {
                yaml_document(body)?
            } else {
                serde_json::from_slice(body)
                    .map_err(|e| refuse(format!("couldn't get version/kind; json parse error: {e}")))?
            };
            return typed(object, api_version, kind).map(|object| Incoming { object, warnings: Vec::new() });
        }
    };
    let decoded = decoded.map_err(|error| refuse(error.message(version, kind)))?;
    Ok(Incoming { object: typed(decoded.value, api_version, kind)?, warnings: decoded.warnings })
}

fn decode_protobuf(
    body: &[u8],
    schema: Option<&'static TypeFacts>,
    api_version: &str,
    kind: &str,
) -> Result<Incoming, StatusError> {
    let schema = schema.ok_or_else(|| StatusError::unsupported_media_type(&SUPPORTED))?;
    let refuse = |error: protobuf::ProtobufError| StatusError::bad_request(error.to_string());
    let envelope = protobuf::envelope(body).map_err(refuse)?;
    let object = protobuf::decode(&envelope, schema).map_err(refuse)?;
    // The same canonical form as from JSON.
    let decoded = decode_value(object, schema, FieldValidation::Ignore)
        .map_err(|error| StatusError::bad_request(error.message(api_version, kind)))?;
    Ok(Incoming { object: typed(decoded.value, api_version, kind)?, warnings: Vec::new() })
}

fn yaml_document(body: &[u8]) -> Result<Value, StatusError> {
    let text = std::str::from_utf8(body).map_err(|_| StatusError::bad_request("the body is not UTF-8"))?;
    let documents = apimachinery::yaml::documents(text).map_err(|e| StatusError::bad_request(format!("yaml: {e}")))?;
    documents.into_iter().next().ok_or_else(|| StatusError::bad_request("the body is empty"))
}

/// Checks and completes `apiVersion` and `kind`.
pub fn typed(mut object: Value, api_version: &str, kind: &str) -> Result<Value, StatusError> {
    let Some(map) = object.as_object_mut() else {
        return Err(StatusError::bad_request(format!("the object provided is no {kind}")));
    };
    for (field, expected) in [("apiVersion", api_version), ("kind", kind)] {
        match map.get(field).and_then(Value::as_str).unwrap_or("") {
            "" => {
                map.insert(field.to_owned(), expected.into());
            }
            text if text == expected => {}
            text if field == "kind" => {
                return Err(StatusError::bad_request(format!(
                    "the kind in the data ({text}) does not match the expected kind ({expected})"
                )));
            }
            text => {
                return Err(StatusError::bad_request(format!(
                    "the API version in the data ({text}) does not match the expected API version ({expected})"
                )));
            }
        }
    }
    Ok(object)
}

/// How deep brackets nest, outside of strings.
fn depth(text: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(accept: &str) -> Result<(Encoding, Shape), u16> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, accept.parse().unwrap());
        Wanted::of(&headers, "").map(|w| (w.encoding, w.shape)).map_err(|e| e.code())
    }

    #[test]
    fn the_first_media_type_that_can_be_had_is_taken() {
        for (accept, expected) in [
            ("application/json", Ok((Encoding::Json, Shape::AsIs))),
            ("", Ok((Encoding::Json, Shape::AsIs))),
            ("application/vnd.kubernetes.protobuf,application/json", Ok((Encoding::Json, Shape::AsIs))),
            ("application/yaml", Ok((Encoding::Yaml, Shape::AsIs))),
            (
                "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json",
                Ok((Encoding::Json, Shape::Table)),
            ),
            ("application/json;as=Table;v=v9;g=meta.k8s.io, application/json", Ok((Encoding::Json, Shape::AsIs))),
            ("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1", Ok((Encoding::Json, Shape::Metadata))),
            ("text/html", Err(406)),
            ("application/vnd.kubernetes.protobuf", Err(406)),
            ("text/html, */*;q=0.1", Ok((Encoding::Json, Shape::AsIs))),
        ] {
            assert_eq!(wanted(accept), expected, "{accept}");
        }
    }

    #[test]
    fn a_body_says_what_it_is_or_nothing() {
        let headers = HeaderMap::new();
        for (body, expected) in [
            (r#"{}"#, Ok(())),
            (r#"{"apiVersion":"apps/v1","kind":"Thing"}"#, Ok(())),
            (
                r#"{"apiVersion":"apps/v2","kind":"Thing"}"#,
                Err("the API version in the data (apps/v2) does not match the expected API version (apps/v1)"),
            ),
            (r#"{"kind":"Other"}"#, Err("the kind in the data (Other) does not match the expected kind (Thing)")),
        ] {
            let got = decode(&headers, body.as_bytes(), None, "apps/v1", "Thing", FieldValidation::Warn);
            assert_eq!(got.map(|_| ()).map_err(|e| e.message().to_owned()), expected.map_err(str::to_owned), "{body}");
        }
        let deep = "[".repeat(200);
        assert_eq!(
            decode(&headers, deep.as_bytes(), None, "v1", "X", FieldValidation::Warn).err().unwrap().code(),
            400
        );
    }

    #[test]
    fn unknown_bodies_are_415() {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, "text/html".parse().unwrap());
        assert_eq!(decode(&headers, b"{}", None, "v1", "X", FieldValidation::Warn).err().unwrap().code(), 415);
    }
}
