//! Content types: what the client wants to read, and what it has sent.

use apimachinery::decode::{FieldValidation, decode_sent, decode_value, decode_yaml};
use apimachinery::facts::TypeFacts;
use apimachinery::protobuf;
use apimachinery::status::StatusError;
use http::HeaderMap;
use http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE, USER_AGENT};
use serde_json::Value;

/// YAML that is nested deeper than this is refused.
const DEPTH_MAX: usize = 127;
pub const JSON: &str = "application/json";
pub const YAML: &str = "application/yaml";
pub const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
pub const SUPPORTED: [&str; 3] = [JSON, YAML, PROTOBUF];

/// How objects are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Json,
    JsonPretty,
    Yaml,
    Protobuf,
}

/// What is made of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    AsIs,
    Table,
    /// PartialObjectMetadata of one object.
    Metadata,
    /// PartialObjectMetadataList of a list.
    MetadataList,
}

/// What the client wants to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub encoding: Encoding,
    pub shape: Shape,
    /// The apiVersion of tables and metadata.
    pub meta_version: &'static str,
    pub gzip: bool,
}

const META_V1: &str = "meta.k8s.io/v1";
const META_V1BETA1: &str = "meta.k8s.io/v1beta1";

// === impl Wanted ===

impl Wanted {
    /// JSON of the object itself: for errors of requests that cannot say what they want.
    pub const PLAIN: Self = Self { encoding: Encoding::Json, shape: Shape::AsIs, meta_version: META_V1, gzip: false };

    /// From the headers, and the `pretty` parameter (empty: absent). Of the media types that can be had the one with the
    /// greatest weight is taken, of those the first. `tables`: can what is asked be had as a table? As
    /// `NegotiateOutputMediaType`.
    pub fn of(headers: &HeaderMap, pretty: &str, tables: bool) -> Result<Self, StatusError> {
        let clauses = clauses(headers);
        let (encoding, shape, meta_version) = match clauses.as_slice() {
            [] => (Encoding::Json, Shape::AsIs, META_V1),
            clauses => clauses
                .iter()
                .find_map(|clause| clause.accept(tables))
                .ok_or_else(|| StatusError::not_acceptable(&SUPPORTED))?,
        };
        let pretty = match pretty {
            "" => headers.get(USER_AGENT).and_then(|v| v.to_str().ok()).is_some_and(is_person),
            text => !matches!(text, "0" | "false"),
        };
        let encoding = if encoding == Encoding::Json && pretty { Encoding::JsonPretty } else { encoding };
        let gzip = headers.get(ACCEPT_ENCODING).and_then(|v| v.to_str().ok()).is_some_and(|v| v.contains("gzip"));
        Ok(Self { encoding, shape, meta_version, gzip })
    }

    /// For a watch: its events are shaped one by one, and YAML has no stream.
    pub fn streamed(self) -> Result<Self, StatusError> {
        match (self.encoding, self.shape) {
            (Encoding::Yaml, _) => Err(StatusError::not_acceptable(&[JSON, STREAMED_PROTOBUF])),
            (_, Shape::MetadataList) => Err(StatusError::not_acceptable(&SUPPORTED)),
            _ => Ok(self),
        }
    }

    pub fn content_type(self) -> &'static str {
        match self.encoding {
            Encoding::Json | Encoding::JsonPretty => JSON,
            Encoding::Yaml => YAML,
            Encoding::Protobuf => PROTOBUF,
        }
    }

    /// The content type of a watch.
    pub fn stream_type(self) -> &'static str {
        if self.encoding == Encoding::Protobuf { STREAMED_PROTOBUF } else { JSON }
    }
}

const STREAMED_PROTOBUF: &str = "application/vnd.kubernetes.protobuf;stream=watch";

/// The version of aggregated discovery that is wanted most, if any is wanted more than the plain documents.
pub fn aggregated_version(headers: &HeaderMap) -> Option<&'static str> {
    let clauses = clauses(headers);
    let mut answers = clauses.iter().filter_map(|clause| match (clause.media, clause.kind, clause.group) {
        (JSON | "*/*" | "application/*", "APIGroupDiscoveryList", "apidiscovery.k8s.io") => {
            ["v2", "v2beta1"].into_iter().find(|version| *version == clause.version).map(Some)
        }
        _ => clause.accept(true).map(|_| None),
    });
    answers.next().flatten()
}

/// The clauses of the Accept headers, the best first.
fn clauses(headers: &HeaderMap) -> Vec<Clause<'_>> {
    let accept = headers.get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok());
    let mut clauses: Vec<Clause<'_>> =
        accept.flat_map(|v| v.split(',')).map(Clause::parse).filter(|clause| !clause.is_empty()).collect();
    // Stable: equals stay in the order of the header.
    clauses.sort_by(|a, b| b.weight.total_cmp(&a.weight).then(a.vagueness().cmp(&b.vagueness())));
    clauses
}

/// Kubernetes indents for these.
fn is_person(agent: &str) -> bool {
    ["curl", "Wget", "Mozilla/5.0"].iter().any(|prefix| agent.starts_with(prefix))
}

/// One media range of an Accept header.
struct Clause<'h> {
    media: &'h str,
    weight: f32,
    kind: &'h str,
    group: &'h str,
    version: &'h str,
    stream: &'h str,
}

// === impl Clause ===

impl<'h> Clause<'h> {
    fn parse(text: &'h str) -> Self {
        let mut parts = text.split(';').map(str::trim);
        let media = parts.next().unwrap_or("");
        let mut clause = Clause { media, weight: 1.0, kind: "", group: "", version: "", stream: "" };
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            match key.trim() {
                "q" => clause.weight = value.trim().parse().unwrap_or(1.0),
                "as" => clause.kind = value,
                "g" => clause.group = value,
                "v" => clause.version = value,
                "stream" => clause.stream = value,
                _ => {}
            }
        }
        clause
    }

    fn is_empty(&self) -> bool {
        self.media.is_empty()
    }

    /// `*/*` comes behind `application/*`, and that behind what is named.
    fn vagueness(&self) -> u8 {
        match self.media {
            "*/*" => 2,
            media if media.ends_with("/*") => 1,
            _ => 0,
        }
    }

    /// What it asks for, if that can be had.
    fn accept(&self, tables: bool) -> Option<(Encoding, Shape, &'static str)> {
        let encoding = match self.media {
            JSON | "*/*" | "application/*" => Encoding::Json,
            YAML => Encoding::Yaml,
            PROTOBUF => Encoding::Protobuf,
            _ => return None,
        };
        let meta_version = match (self.group, self.version) {
            _ if self.kind.is_empty() => META_V1,
            ("meta.k8s.io", "v1") => META_V1,
            ("meta.k8s.io", "v1beta1") => META_V1BETA1,
            _ => return None,
        };
        let shape = match self.kind {
            "" => Shape::AsIs,
            "Table" if tables && encoding != Encoding::Protobuf => Shape::Table,
            "PartialObjectMetadata" => Shape::Metadata,
            "PartialObjectMetadataList" => Shape::MetadataList,
            _ => return None,
        };
        matches!(self.stream, "" | "watch").then_some((encoding, shape, meta_version))
    }
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
        JSON | "" => false,
        YAML => true,
        PROTOBUF => return decode_protobuf(body, schema, api_version, kind),
        _ => return Err(StatusError::unsupported_media_type(&SUPPORTED)),
    };
    // JSON's reader has a limit of its own.
    if yaml && depth(body) > DEPTH_MAX {
        return Err(StatusError::bad_request(format!("the object is nested deeper than {DEPTH_MAX} levels")));
    }
    let version = apimachinery::meta::split_api_version(api_version).1;
    let refuse = |message: String| StatusError::bad_request(message);
    let decoded = match schema {
        Some(schema) if yaml => decode_yaml(utf8(body)?, schema, field_validation),
        Some(schema) => decode_sent(body, schema, field_validation),
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
    let schema = schema.ok_or_else(|| StatusError::unsupported_media_type(&[JSON, YAML]))?;
    let refuse = |error: protobuf::ProtobufError| StatusError::bad_request(error.to_string());
    let envelope = protobuf::envelope(body).map_err(refuse)?;
    let object = protobuf::decode(&envelope, schema).map_err(refuse)?;
    // The same canonical form as from JSON.
    let decoded = decode_value(object, schema, FieldValidation::Ignore)
        .map_err(|error| StatusError::bad_request(error.message(api_version, kind)))?;
    Ok(Incoming { object: typed(decoded.value, api_version, kind)?, warnings: Vec::new() })
}

fn utf8(body: &[u8]) -> Result<&str, StatusError> {
    std::str::from_utf8(body).map_err(|_| StatusError::bad_request("the body is not UTF-8"))
}

fn yaml_document(body: &[u8]) -> Result<Value, StatusError> {
    let text = utf8(body)?;
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
            text if field == "kind" => return Err(other_kind(text, api_version, expected)),
            text => {
                return Err(StatusError::bad_request(format!(
                    "the API version in the data ({text}) does not match the expected API version ({expected})"
                )));
            }
        }
    }
    Ok(object)
}

/// As the codecs say it, packages of Go and all.
fn other_kind(kind: &str, api_version: &str, expected: &str) -> StatusError {
    let (group, version) = apimachinery::meta::split_api_version(api_version);
    let why = if apimachinery::facts::kind(group, version, kind).is_some() {
        let package = if group.is_empty() { "core" } else { group.split('.').next().unwrap_or(group) };
        format!("converting ({version}.{kind}) to ({package}.{expected}): unknown conversion")
    } else {
        let scheme = "pkg/api/legacyscheme/scheme.go:30";
        format!("no kind {kind:?} is registered for version {api_version:?} in scheme {scheme:?}")
    };
    StatusError::bad_request(format!("{kind} in version {version:?} cannot be handled as a {expected}: {why}"))
}

/// How deep brackets nest, outside of strings.
fn depth(text: &[u8]) -> usize {
    let (mut depth, mut deepest, mut at) = (0_usize, 0, 0);
    while let Some(byte) = text.get(at) {
        at += 1;
        match byte {
            b'{' | b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            // To behind the string; most of a document is in strings.
            b'"' => loop {
                match text.get(at..).and_then(|rest| memchr::memchr2(b'"', b'\\', rest)) {
                    Some(found) if text[at + found] == b'"' => {
                        at += found + 1;
                        break;
                    }
                    Some(found) => at += found + 2,
                    None => return deepest,
                }
            },
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
        Wanted::of(&headers, "", true).map(|w| (w.encoding, w.shape)).map_err(|e| e.code())
    }

    #[test]
    fn of_what_can_be_had_the_weightiest_is_taken() {
        use Encoding::{Json, Protobuf, Yaml};
        const METADATA: &str = "as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
        for (accept, expected) in [
            ("application/json", Ok((Json, Shape::AsIs))),
            ("", Ok((Json, Shape::AsIs))),
            ("application/vnd.kubernetes.protobuf,application/json", Ok((Protobuf, Shape::AsIs))),
            ("application/vnd.kubernetes.protobuf;stream=watch", Ok((Protobuf, Shape::AsIs))),
            ("application/json;q=0.5, application/vnd.kubernetes.protobuf", Ok((Protobuf, Shape::AsIs))),
            ("*/*, application/yaml", Ok((Yaml, Shape::AsIs))),
            ("application/*;q=0.9,application/yaml;q=0.8", Ok((Json, Shape::AsIs))),
            ("application/yaml", Ok((Yaml, Shape::AsIs))),
            ("application/json;charset=utf-8", Ok((Json, Shape::AsIs))),
            (
                "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json",
                Ok((Json, Shape::Table)),
            ),
            ("application/json;as=Table;v=v9;g=meta.k8s.io, application/json", Ok((Json, Shape::AsIs))),
            (
                "application/vnd.kubernetes.protobuf;as=Table;v=v1;g=meta.k8s.io,application/json",
                Ok((Json, Shape::AsIs)),
            ),
            ("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1", Ok((Json, Shape::MetadataList))),
            (&format!("application/vnd.kubernetes.protobuf;{METADATA}"), Ok((Protobuf, Shape::Metadata))),
            ("application/json;as=Other;g=meta.k8s.io;v=v1", Err(406)),
            ("text/html", Err(406)),
            ("text/html, */*;q=0.1", Ok((Json, Shape::AsIs))),
        ] {
            assert_eq!(wanted(accept), expected, "{accept}");
        }
    }

    #[test]
    fn what_is_no_table_is_not_had_as_one() {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, "application/json;as=Table;v=v1;g=meta.k8s.io".parse().unwrap());
        assert_eq!(Wanted::of(&headers, "", false).unwrap_err().code(), 406);
        headers.append(ACCEPT, "application/json".parse().unwrap());
        assert_eq!(Wanted::of(&headers, "", false).unwrap().shape, Shape::AsIs);
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
            (
                r#"{"kind":"Other"}"#,
                Err(
                    r#"Other in version "v1" cannot be handled as a Thing: no kind "Other" is registered for version "apps/v1" in scheme "pkg/api/legacyscheme/scheme.go:30""#,
                ),
            ),
            (
                r#"{"kind":"DaemonSet"}"#,
                Err(
                    r#"DaemonSet in version "v1" cannot be handled as a Thing: converting (v1.DaemonSet) to (apps.Thing): unknown conversion"#,
                ),
            ),
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
        let error = decode(&headers, b"{}", None, "v1", "X", FieldValidation::Warn).err().unwrap();
        let message = "the body of the request was in an unknown format - accepted media types include: application/json, \
            application/yaml, application/vnd.kubernetes.protobuf";
        assert_eq!((error.code(), error.message()), (415, message));
        headers.insert(CONTENT_TYPE, "application/json; charset=utf-8".parse().unwrap());
        assert!(decode(&headers, b"{}", None, "v1", "X", FieldValidation::Warn).is_ok());
    }
}
