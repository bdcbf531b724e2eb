//! An object as it is kept and handed out: its final JSON bytes, encoded once, and what selectors ask of it.
//!
//! The bytes are laid out as a watch event frame, `{"type":"ADDED","object":{…}}\n`, of which the object is a slice: GET, LIST
//! and WATCH send the same memory.

use apimachinery::decode::{FieldValidation, decode_value};
use apimachinery::fields::FieldSelector;
use apimachinery::labels::Selector;
use apimachinery::meta::split_api_version;
use apimachinery::{facts, json, protobuf};
use bytes::Bytes;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::OnceLock;

/// What a selector can ask of an object, known before its revision is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    pub namespace: Box<str>,
    pub name: Box<str>,
    pub uid: Box<str>,
    /// `key\0value\0…`, sorted. There are many objects: one piece of memory a list.
    labels: Box<str>,
    /// The kind's selectable fields beside name and namespace, in the same form; empty ones are left out.
    fields: Box<str>,
}

/// One version of an object. Immutable.
#[derive(Debug)]
pub struct StoredObject {
    pub identity: Identity,
    /// etcd's revision of the write: the resourceVersion.
    pub revision: i64,
    /// Was this the write that created it?
    pub created: bool,
    frame: Bytes,
    /// Where in the frame `"metadata"` begins.
    item_at: usize,
    /// The same as protobuf, made when it is first asked for.
    protobuf: OnceLock<Option<Box<protobuf::Encoded>>>,
}

/// Room that an object most often has enough of.
const ENCODED: usize = 6 << 10;
const ADDED: &[u8] = b"{\"type\":\"ADDED\",\"object\":";
const MODIFIED: &[u8] = b"{\"type\":\"MODIFIED\",\"object\":";
const FRAME_END: &[u8] = b"}\n";
const METADATA: &[u8] = b"\"metadata\":{";

// === impl Identity ===

impl Identity {
    /// Reads metadata and the selectable fields off an object.
    pub fn of(object: &Value, fields: Vec<(&'static str, String)>) -> Self {
        let meta = object.get("metadata");
        let text =
            |key: &str| -> Box<str> { meta.and_then(|m| m.get(key)).and_then(Value::as_str).unwrap_or("").into() };
        let labels = meta.and_then(|m| m.get("labels")).and_then(Value::as_object);
        // In order, as maps are.
        let labels = labels.into_iter().flatten().map(|(k, v)| (k.as_str(), v.as_str().unwrap_or("")));
        let fields =
            fields.iter().map(|(field, value)| (*field, value.as_str())).filter(|(_, value)| !value.is_empty());
        Self {
            namespace: text("namespace"),
            name: text("name"),
            uid: text("uid"),
            labels: packed(labels),
            fields: packed(fields),
        }
    }

    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels().find(|(label, _)| *label == key).map(|(_, value)| value)
    }

    pub fn labels(&self) -> impl Iterator<Item = (&str, &str)> {
        unpacked(&self.labels)
    }

    /// Equal for equal labels.
    pub fn labels_text(&self) -> &str {
        &self.labels
    }

    /// The value of a selectable field; absent and empty ones are None.
    pub fn field(&self, name: &str) -> Option<&str> {
        match name {
            "metadata.name" => Some(&self.name),
            "metadata.namespace" => Some(&self.namespace),
            _ => unpacked(&self.fields).find(|(field, _)| *field == name).map(|(_, value)| value),
        }
    }

    pub fn matches(&self, labels: &Selector, fields: &FieldSelector) -> bool {
        (labels.is_empty() || labels.matches_with(|key| self.label(key)))
            && (fields.is_empty() || fields.matches(|field| self.field(field)))
    }
}

/// `key\0value\0` of each pair. Neither may hold a NUL, and none that is valid does.
fn packed<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> Box<str> {
    let length = pairs.clone().map(|(key, value)| key.len() + value.len() + 2).sum();
    let mut text = String::with_capacity(length);
    for (key, value) in pairs {
        text.extend([key, "\0", value, "\0"]);
    }
    text.into()
}

fn unpacked(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut parts = text.split_terminator('\0');
    std::iter::from_fn(move || Some((parts.next()?, parts.next()?)))
}

// === impl StoredObject ===

/// Versions are equal if they are the same version of the same object.
impl PartialEq for StoredObject {
    fn eq(&self, other: &Self) -> bool {
        self.revision == other.revision && self.identity.uid == other.identity.uid
    }
}

impl StoredObject {
    /// From the bytes as stored (which carry no resourceVersion), and the revision of the write.
    pub fn new(identity: Identity, stored: &[u8], revision: i64, created: bool) -> Self {
        let event = if created { ADDED } else { MODIFIED };
        let (frame, item_at) = frame_with_version(event, stored, revision);
        Self { identity, revision, created, frame, item_at, protobuf: OnceLock::new() }
    }

    /// The object as JSON, with its resourceVersion.
    pub fn json(&self) -> Bytes {
        self.frame.slice(self.frame_start().len()..self.frame.len() - FRAME_END.len())
    }

    fn frame_start(&self) -> &'static [u8] {
        if self.created { ADDED } else { MODIFIED }
    }

    /// The object as an item of a list, behind its opening brace: without `kind` and `apiVersion`, which the list has said,
    /// as Kubernetes sends it.
    pub fn list_item(&self) -> &[u8] {
        &self.frame[self.item_at..self.frame.len() - FRAME_END.len()]
    }

    /// Does its JSON have this text in it? Cheaper to ask before it is parsed.
    pub fn mentions(&self, text: &str) -> bool {
        find(&self.frame, text.as_bytes()).is_some()
    }

    /// The object, parsed.
    pub fn value(&self) -> Value {
        parse(&self.json()).unwrap_or_default()
    }

    /// The event frame for a watcher: the shared bytes where the type is the natural one, a copy else.
    pub fn frame(&self, added: bool) -> Bytes {
        if added == self.created {
            return self.frame.clone();
        }
        wrap(if added { ADDED } else { MODIFIED }, &self.json())
    }

    /// The frame of its deletion: the object as it was last, at the revision of the deletion.
    pub fn deleted_frame(&self, revision: i64) -> Bytes {
        wrap(b"{\"type\":\"DELETED\",\"object\":", &self.json_at(revision))
    }

    /// The object as it was, with another revision.
    pub fn json_at(&self, revision: i64) -> Bytes {
        let json = self.json();
        let old = version_member(self.revision);
        match find(&json, old.as_bytes()) {
            Some(at) => {
                let mut bytes = Vec::with_capacity(json.len() + 4);
                bytes.extend_from_slice(&json[..at]);
                bytes.extend_from_slice(version_member(revision).as_bytes());
                bytes.extend_from_slice(&json[at + old.len()..]);
                bytes.into()
            }
            None => json,
        }
    }

    /// The object as it was, as of the revision of its end.
    pub fn ended(&self, revision: i64) -> Self {
        let frame = wrap(MODIFIED, &self.json_at(revision));
        let item_at = self.item_at + MODIFIED.len() - self.frame_start().len();
        Self { identity: self.identity.clone(), revision, created: false, frame, item_at, protobuf: OnceLock::new() }
    }

    /// The object in protobuf, encoded once; None if it is of no known kind.
    pub fn protobuf(&self) -> Option<&protobuf::Encoded> {
        let event = if self.created { "ADDED" } else { "MODIFIED" };
        self.protobuf.get_or_init(|| to_protobuf(event, &self.json()).map(Box::new)).as_deref()
    }

    /// The frame of its deletion for those who read protobuf.
    pub fn deleted_protobuf_frame(&self, revision: i64) -> Option<Bytes> {
        Some(to_protobuf("DELETED", &self.json_at(revision))?.frame())
    }

    /// The event frame for a watcher who reads protobuf: shared where the type is the natural one.
    pub fn protobuf_frame(&self, added: bool) -> Option<Bytes> {
        let encoded = self.protobuf()?;
        Some(if added == self.created {
            encoded.frame()
        } else {
            protobuf::watch_frame(if added { "ADDED" } else { "MODIFIED" }, &encoded.object()).into()
        })
    }

    /// About how much memory it takes.
    pub fn size(&self) -> usize {
        self.frame.len() + self.protobuf.get().and_then(Option::as_deref).map_or(0, protobuf::Encoded::size)
    }
}

fn to_protobuf(event: &str, json: &[u8]) -> Option<protobuf::Encoded> {
    let value = parse(json).ok()?;
    let text = |field: &str| value.get(field).and_then(Value::as_str).unwrap_or("");
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let (group, version) = split_api_version(api_version);
    let facts = facts::schema_of(group, version, kind)?;
    Some(protobuf::Encoded::new(event, api_version, kind, &value, facts))
}

/// Reads what is stored: JSON, or the protobuf that kube-apiserver writes (the store of a cluster may be taken over). Gives
/// the object, and its bytes as JSON.
pub fn read<'s>(key: &str, stored: &'s [u8]) -> (Value, Cow<'s, [u8]>) {
    if !protobuf::is_protobuf(stored) {
        let value = parse(stored).unwrap_or_else(|error| {
            tracing::error!(key, %error, "what is stored is no JSON");
            Value::Null
        });
        return (value, Cow::Borrowed(stored));
    }
    match read_protobuf(stored) {
        Ok(value) => {
            let bytes = encode(&value);
            (value, Cow::Owned(bytes))
        }
        Err(error) => {
            tracing::error!(key, error, "what is stored cannot be read");
            (Value::Null, Cow::Borrowed(&[]))
        }
    }
}

fn read_protobuf(stored: &[u8]) -> Result<Value, String> {
    let envelope = protobuf::envelope(stored).map_err(|error| error.to_string())?;
    let (group, version) = split_api_version(envelope.api_version);
    let schema = facts::schema_of(group, version, envelope.kind)
        .ok_or_else(|| format!("{} of {} is not known", envelope.kind, envelope.api_version))?;
    let value = protobuf::decode(&envelope, schema).map_err(|error| error.to_string())?;
    let decoded = decode_value(value, schema, FieldValidation::Ignore).map_err(|error| error.to_string())?;
    Ok(decoded.value)
}

/// Reads JSON that is most likely well.
fn parse(json: &[u8]) -> Result<Value, serde_json::Error> {
    match std::str::from_utf8(json).ok().and_then(json::read) {
        Some(value) => Ok(value),
        None => serde_json::from_slice(json),
    }
}

/// A member of an object, by the names that lead to it.
pub type Path = &'static [&'static str];

pub const MANAGED_FIELDS: Path = &["metadata", "managedFields"];

/// Reads an object with its managedFields apart, as text: most who read an object hand them on as they are; and without some
/// other members.
pub fn split(json: &[u8], unread: &[Path]) -> (Value, String) {
    let (value, apart) = split_off(json, &[&[MANAGED_FIELDS], unread].concat());
    let managed = apart.into_iter().find(|(path, _)| *path == MANAGED_FIELDS);
    (value, managed.map(|(_, text)| text.into_owned()).unwrap_or_default())
}

/// Reads an object without some members, which come apart as the texts that they are, if they are there.
pub fn split_off<'j>(json: &'j [u8], paths: &[Path]) -> (Value, Vec<(Path, Cow<'j, str>)>) {
    let read = std::str::from_utf8(json).ok().and_then(|text| json::read_apart(text, paths));
    if let Some((value, found)) = read {
        let found = paths.iter().zip(found).filter_map(|(path, text)| Some((*path, text?.into())));
        return (value, found.filter(|(_, text): &(_, Cow<'_, str>)| text != "null").collect());
    }
    let (mut value, mut found) = (parse(json).unwrap_or_default(), Vec::new());
    for path in paths {
        let Some((name, parents)) = path.split_last() else { continue };
        let parent = parents.iter().try_fold(&mut value, |value, name| value.get_mut(name));
        let member = parent.and_then(Value::as_object_mut).and_then(|parent| parent.remove(*name));
        found.extend(member.filter(|member| !member.is_null()).map(|member| (*path, member.to_string().into())));
    }
    (value, found)
}

/// Encodes an object for the store: `kind`, `apiVersion` and `metadata` first, no resourceVersion. managedFields may be the text
/// of a list.
pub fn encode(object: &Value) -> Vec<u8> {
    encode_with(object, &[])
}

/// As [`encode`], with members that are texts already.
pub fn encode_with(object: &Value, apart: &[(Path, Cow<'_, str>)]) -> Vec<u8> {
    let mut out = String::with_capacity(ENCODED);
    let empty = Map::new();
    let map = object.as_object().unwrap_or(&empty);
    out.push('{');
    for key in ["kind", "apiVersion"] {
        if let Some(value) = map.get(key) {
            member(key, value, &[], &mut out);
        }
    }
    match map.get("metadata") {
        Some(Value::Object(meta)) => write_metadata(meta, &mut out),
        Some(other) => member("metadata", other, &[], &mut out),
        None => {}
    }
    for (key, value) in map {
        if !matches!(key.as_str(), "kind" | "apiVersion" | "metadata") {
            let below: Vec<(&[&str], &str)> = apart
                .iter()
                .filter(|(path, _)| path.first() == Some(&key.as_str()))
                .map(|(p, t)| (&p[1..], &**t))
                .collect();
            member(key, value, &below, &mut out);
        }
    }
    out.push('}');
    out.into_bytes()
}

/// The name of a member, behind a comma if it is not the first.
fn name(key: &str, out: &mut String) {
    if !out.ends_with('{') {
        out.push(',');
    }
    json::write_string(key, out);
    out.push(':');
}

/// A member; of an object with those of its own that are apart, which stand directly below it.
fn member(key: &str, value: &Value, apart: &[(&[&str], &str)], out: &mut String) {
    name(key, out);
    let (Value::Object(map), false) = (value, apart.is_empty()) else { return json::write(value, out) };
    let mut members: Vec<(&str, Result<&Value, &str>)> =
        map.iter().map(|(key, value)| (key.as_str(), Ok(value))).collect();
    members.extend(apart.iter().filter_map(|(path, text)| Some((*path.first()?, Err(*text)))));
    members.sort_by_key(|(key, _)| *key);
    out.push('{');
    for (key, member) in members {
        name(key, out);
        match member {
            Ok(value) => json::write(value, out),
            Err(text) => out.push_str(text),
        }
    }
    out.push('}');
}

fn write_metadata(meta: &Map<String, Value>, out: &mut String) {
    name("metadata", out);
    out.push('{');
    for (key, value) in meta {
        match (key.as_str(), value) {
            ("resourceVersion", _) => {}
            ("managedFields", Value::String(text)) => {
                name(key, out);
                out.push_str(text);
            }
            _ => member(key, value, &[], out),
        }
    }
    out.push('}');
}

/// `frame_start` + the object with its version + `}\n`. Writes the version behind `"metadata":{` where the bytes begin as
/// [`encode`] writes them; other bytes (from another writer) are parsed and encoded first.
fn frame_with_version(frame_start: &[u8], stored: &[u8], revision: i64) -> (Bytes, usize) {
    match metadata_start(stored) {
        Some(at) => splice(frame_start, stored, at, revision),
        None => {
            let encoded = encode(&parse(stored).unwrap_or_default());
            match metadata_start(&encoded) {
                Some(at) => splice(frame_start, &encoded, at, revision),
                None => (wrap(frame_start, &encoded), frame_start.len() + 1),
            }
        }
    }
}

fn splice(frame_start: &[u8], stored: &[u8], at: usize, revision: i64) -> (Bytes, usize) {
    let mut frame = Vec::with_capacity(frame_start.len() + stored.len() + 48);
    frame.extend_from_slice(frame_start);
    frame.extend_from_slice(&stored[..at]);
    let more = if stored.get(at) == Some(&b'}') { "" } else { "," };
    let _ = write!(frame, "{}{more}", version_member(revision));
    frame.extend_from_slice(&stored[at..]);
    frame.extend_from_slice(FRAME_END);
    (frame.into(), frame_start.len() + at - METADATA.len())
}

fn wrap(frame_start: &[u8], json: &[u8]) -> Bytes {
    [frame_start, json, FRAME_END].concat().into()
}

fn version_member(revision: i64) -> String {
    let mut text = String::with_capacity(40);
    let _ = write!(text, "\"resourceVersion\":\"{revision}\"");
    text
}

/// The place behind `{"kind":"…","apiVersion":"…","metadata":{`, if the bytes begin so and carry no resourceVersion there.
fn metadata_start(stored: &[u8]) -> Option<usize> {
    let rest = stored.strip_prefix(b"{\"kind\":\"")?;
    let rest = &rest[rest.iter().position(|b| *b == b'"')? + 1..];
    let rest = rest.strip_prefix(b",\"apiVersion\":\"")?;
    let rest = &rest[rest.iter().position(|b| *b == b'"')? + 1..];
    let rest = rest.strip_prefix(b",")?.strip_prefix(METADATA)?;
    (!rest.starts_with(b"\"resourceVersion\"")).then(|| stored.len() - rest.len())
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    memchr::memmem::find(haystack, needle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn stored(object: &Value, revision: i64, created: bool) -> StoredObject {
        StoredObject::new(Identity::of(object, Vec::new()), &encode(object), revision, created)
    }

    #[test]
    fn the_version_is_written_into_the_stored_bytes() {
        let object =
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "resourceVersion": "1"}, "spec": {}});
        let stored = stored(&object, 42, true);
        let text = String::from_utf8(stored.json().to_vec()).unwrap();
        assert_eq!(
            text,
            r#"{"kind":"Pod","apiVersion":"v1","metadata":{"resourceVersion":"42","name":"a"},"spec":{}}"#
        );
        assert_eq!(stored.value()["metadata"]["resourceVersion"], "42");
        let item = String::from_utf8(stored.list_item().to_vec()).unwrap();
        assert_eq!(item, r#""metadata":{"resourceVersion":"42","name":"a"},"spec":{}}"#);
    }

    #[test]
    fn members_may_stay_the_texts_that_they_are() {
        let object = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "a", "managedFields": [{"manager": "m"}]},
            "spec": {"a": [1], "b": {"c": "d"}, "e": "f"}, "status": {"b": 2}});
        let encoded = encode(&object);
        let (mut value, apart) = split_off(&encoded, &[MANAGED_FIELDS, &["spec", "b"], &["spec", "x"], &["spec", "a"]]);
        assert_eq!(value["spec"], json!({"e": "f"}));
        assert_eq!(apart.len(), 3);
        value["metadata"]["managedFields"] = apart[0].1.clone().into_owned().into();
        assert_eq!(encode_with(&value, &apart[1..]), encoded);
    }

    #[test]
    fn bytes_of_another_writer_get_their_version_too() {
        for text in [
            r#"{"apiVersion":"v1","metadata":{"name":"a"},"kind":"Pod"}"#,
            r#"{"kind":"Pod","apiVersion":"v1","metadata":{}}"#,
            r#"{"kind":"Pod","apiVersion":"v1","metadata":{"resourceVersion":"7","name":"a"}}"#,
        ] {
            let object = StoredObject::new(Identity::default(), text.as_bytes(), 42, false);
            assert_eq!(object.value()["metadata"]["resourceVersion"], "42", "{text}");
        }
    }

    #[test]
    fn what_kube_apiserver_has_stored_is_read() {
        // Unknown{typeMeta{"v1","ConfigMap"}, raw: ConfigMap{metadata{name: "a"}, data{"k": "v"}}}
        let raw = b"\x0a\x03\x0a\x01a\x12\x06\x0a\x01k\x12\x01v";
        let type_meta = b"\x0a\x02v1\x12\x09ConfigMap";
        let mut stored = b"k8s\0\x0a\x0f".to_vec();
        stored.extend_from_slice(type_meta);
        stored.extend_from_slice(&[0x12, raw.len() as u8]);
        stored.extend_from_slice(raw);
        let (value, bytes) = read("k", &stored);
        let object = StoredObject::new(Identity::of(&value, Vec::new()), &bytes, 9, false);
        let text = String::from_utf8(object.json().to_vec()).unwrap();
        assert_eq!(
            text,
            r#"{"kind":"ConfigMap","apiVersion":"v1","metadata":{"resourceVersion":"9","name":"a"},"data":{"k":"v"}}"#
        );
    }

    #[test]
    fn frames_are_shared_where_the_type_is_natural() {
        let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}});
        let stored = stored(&object, 5, false);
        assert_eq!(stored.frame(false).as_ptr(), stored.frame(false).as_ptr());
        for (frame, kind, version) in [
            (stored.frame(false), "MODIFIED", "5"),
            (stored.frame(true), "ADDED", "5"),
            (stored.deleted_frame(123456), "DELETED", "123456"),
        ] {
            let event: Value = serde_json::from_slice(&frame).unwrap();
            assert_eq!(
                (event["type"].as_str(), event["object"]["metadata"]["resourceVersion"].as_str()),
                (Some(kind), Some(version))
            );
        }
    }

    #[test]
    fn selectors_ask_labels_and_fields() {
        let object = json!({"metadata": {"name": "a", "namespace": "n", "labels": {"app": "x", "Z": "y"}}});
        let identity = Identity::of(&object, vec![("spec.nodeName", "n1".into())]);
        for (labels, fields, expected) in [
            ("", "", true),
            ("app=x,Z=y", "", true),
            ("app=y", "", false),
            ("", "spec.nodeName=n1,metadata.name=a", true),
            ("", "spec.nodeName!=n1", false),
            ("!app", "", false),
        ] {
            let matches = identity.matches(&Selector::parse(labels).unwrap(), &FieldSelector::parse(fields).unwrap());
            assert_eq!(matches, expected, "{labels} {fields}");
        }
    }
}
