//! Kubernetes protobuf to JSON values, guided by the schema facts: what Go clients send by default for built-in kinds.
//!
//! An encoded object is the four bytes `k8s\0` and a `runtime.Unknown` that names its kind and wraps its message. Go writes
//! every field that is no pointer, be it zero or not; such zeros are dropped again, as JSON's `omitempty` does. The wire does
//! not tell which zeros stand behind a pointer and mean something, so fields that are pointers are listed by name.

use crate::facts::{FieldFacts, Type, TypeFacts};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Number, Value};

const MAGIC: &[u8] = b"k8s\0";
/// Messages nest no deeper than this.
const DEPTH_MAX: usize = 64;

/// What a client sent that is no object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtobufError {
    #[error("provided data does not appear to be a protobuf message, expected prefix \"k8s\\0\"")]
    Prefix,
    #[error("the protobuf message ends too early")]
    Truncated,
    #[error("the protobuf message is malformed: {0}")]
    Malformed(&'static str),
}

/// The envelope around an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope<'a> {
    pub api_version: &'a str,
    pub kind: &'a str,
    pub raw: &'a [u8],
}

/// Scalars that Go holds by pointer, by their JSON names: a zero there has been written on purpose.
const POINTERS: [&str; 74] = [
    "activeDeadlineSeconds",
    "allocateLoadBalancerNodePorts",
    "allowPrivilegeEscalation",
    "allowVolumeExpansion",
    "attachRequired",
    "automountServiceAccountToken",
    "averageUtilization",
    "backoffLimit",
    "backoffLimitPerIndex",
    "blockOwnerDeletion",
    "collisionCount",
    "completions",
    "controller",
    "currentCPUUtilizationPercentage",
    "defaultMode",
    "deletionGracePeriodSeconds",
    "enableServiceLinks",
    "exitCode",
    "expirationSeconds",
    "failedJobsHistoryLimit",
    "fsGroup",
    "gracePeriodSeconds",
    "healthCheckNodePort",
    "hostUsers",
    "immutable",
    "leaseDurationSeconds",
    "leaseTransitions",
    "limit",
    "managedBy",
    "maxFailedIndexes",
    "minDomains",
    "minReplicas",
    "mode",
    "nominalConcurrencyShares",
    "optional",
    "orphanDependents",
    "parallelism",
    "podInfoOnMount",
    "preemptionPolicy",
    "priority",
    "privileged",
    "probe",
    "procMount",
    "progressDeadlineSeconds",
    "readOnly",
    "readOnlyRootFilesystem",
    "ready",
    "recursiveReadOnly",
    "remainingItemCount",
    "replicas",
    "requiresRepublish",
    "revisionHistoryLimit",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "runtimeClassName",
    "seLinuxMount",
    "serving",
    "setHostnameAsFQDN",
    "shareProcessNamespace",
    "stabilizationWindowSeconds",
    "started",
    "startingDeadlineSeconds",
    "storageCapacity",
    "storageClassName",
    "succeeded",
    "successfulJobsHistoryLimit",
    "suspend",
    "terminating",
    "terminationGracePeriodSeconds",
    "timeoutSeconds",
    "tolerationSeconds",
    "ttlSecondsAfterFinished",
    "volumeAttributesClassName",
];

/// Pointers in most types, but plain in these: (struct, field).
const PLAIN: [(&str, &str); 6] = [
    ("Probe", "timeoutSeconds"),
    ("ContainerStatus", "ready"),
    ("ContainerStateTerminated", "exitCode"),
    ("PersistentVolumeClaimVolumeSource", "readOnly"),
    ("VolumeMount", "readOnly"),
    ("ResourceStatus", "ready"),
];

/// Is this an encoded object?
pub fn is_protobuf(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Opens the envelope.
pub fn envelope(bytes: &[u8]) -> Result<Envelope<'_>, ProtobufError> {
    let mut reader = Reader(bytes.strip_prefix(MAGIC).ok_or(ProtobufError::Prefix)?);
    let mut envelope = Envelope { api_version: "", kind: "", raw: &[] };
    while let Some((number, wire)) = reader.next()? {
        match (number, wire) {
            (1, Wire::Bytes(type_meta)) => {
                let mut inner = Reader(type_meta);
                while let Some((number, wire)) = inner.next()? {
                    match (number, wire) {
                        (1, Wire::Bytes(text)) => envelope.api_version = utf8(text)?,
                        (2, Wire::Bytes(text)) => envelope.kind = utf8(text)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(raw)) => envelope.raw = raw,
            (3, Wire::Bytes(encoding)) if !encoding.is_empty() => {
                return Err(ProtobufError::Malformed("its content is encoded"));
            }
            _ => {}
        }
    }
    Ok(envelope)
}

/// Decodes the message in an envelope; `apiVersion` and `kind` are those of the envelope.
pub fn decode(envelope: &Envelope<'_>, facts: &'static TypeFacts) -> Result<Value, ProtobufError> {
    let mut object = Map::new();
    message(envelope.raw, facts, &[], &mut object, 0)?;
    for (field, text) in [("apiVersion", envelope.api_version), ("kind", envelope.kind)] {
        if !text.is_empty() {
            object.insert(field.to_owned(), text.into());
        }
    }
    Ok(Value::Object(object))
}

// === wire ===

struct Reader<'a>(&'a [u8]);

#[derive(Clone, Copy)]
enum Wire<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<Option<(u32, Wire<'a>)>, ProtobufError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).map_err(|_| ProtobufError::Malformed("a field number is too big"))?;
        let wire = match tag & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => Wire::Fixed64(u64::from_le_bytes(self.take(8)?.try_into().map_err(|_| ProtobufError::Truncated)?)),
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| ProtobufError::Truncated)?;
                Wire::Bytes(self.take(length)?)
            }
            5 => {
                self.take(4)?;
                Wire::Fixed32
            }
            _ => return Err(ProtobufError::Malformed("an unknown wire type")),
        };
        Ok(Some((number, wire)))
    }

    fn varint(&mut self) -> Result<u64, ProtobufError> {
        let mut value = 0_u64;
        for shift in (0..70).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or(ProtobufError::Truncated)?;
            self.0 = rest;
            if shift < 64 {
                value |= u64::from(byte & 0x7f) << shift;
            }
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(ProtobufError::Malformed("a number is too long"))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], ProtobufError> {
        if length > self.0.len() {
            return Err(ProtobufError::Truncated);
        }
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        Ok(taken)
    }
}

fn utf8(bytes: &[u8]) -> Result<&str, ProtobufError> {
    std::str::from_utf8(bytes).map_err(|_| ProtobufError::Malformed("text is not UTF-8"))
}

// === messages ===

/// Decodes a message of a type into `object`. `path` leads to a struct that Go inlines in JSON: its fields belong to the same
/// object.
fn message(
    bytes: &[u8],
    facts: &'static TypeFacts,
    path: &[u32],
    object: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), ProtobufError> {
    if depth > DEPTH_MAX {
        return Err(ProtobufError::Malformed("it is nested too deep"));
    }
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.next()? {
        let at = [path, &[number]].concat();
        if let Some(field) = facts.fields.iter().find(|field| field.numbers == at) {
            add(field, facts, wire, object, depth)?;
        } else if let Wire::Bytes(inner) = wire
            && facts.fields.iter().any(|field| field.numbers.starts_with(&at))
        {
            message(inner, facts, &at, object, depth + 1)?;
        }
    }
    Ok(())
}

/// Puts one occurrence of a field into the object.
fn add(
    field: &'static FieldFacts,
    owner: &'static TypeFacts,
    wire: Wire<'_>,
    object: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), ProtobufError> {
    match &field.kind {
        Type::List(item) => {
            let items = match wire {
                // Numbers may come packed.
                Wire::Bytes(packed) if matches!(**item, Type::Int32 | Type::Int64 | Type::Bool) => {
                    let mut reader = Reader(packed);
                    let mut items = Vec::new();
                    while !reader.0.is_empty() {
                        items.push(value(item, Wire::Varint(reader.varint()?), depth)?);
                    }
                    items
                }
                wire => vec![value(item, wire, depth)?],
            };
            let list = object.entry(field.name).or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(list) = list {
                list.extend(items);
            }
        }
        Type::Map(item) => {
            let Wire::Bytes(entry) = wire else { return Err(ProtobufError::Malformed("a map entry is no message")) };
            let mut reader = Reader(entry);
            let (mut key, mut content) = (String::new(), None);
            while let Some((number, wire)) = reader.next()? {
                match (number, wire) {
                    (1, Wire::Bytes(text)) => key = utf8(text)?.to_owned(),
                    (2, wire) => content = Some(map_value(item, wire, depth)?),
                    _ => {}
                }
            }
            let content = content.unwrap_or_else(|| empty(item));
            let map = object.entry(field.name).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(map) = map {
                map.insert(key, content);
            }
        }
        kind => {
            let decoded = value(kind, wire, depth)?;
            let keep = field.required || is_pointer(field, owner) || !is_zero(&decoded);
            if keep && !decoded.is_null() {
                object.insert(field.name.to_owned(), decoded);
            }
        }
    }
    Ok(())
}

fn is_pointer(field: &FieldFacts, owner: &TypeFacts) -> bool {
    POINTERS.binary_search(&field.name).is_ok() && !PLAIN.contains(&(owner.struct_name(), field.name))
}

/// Zeros and what a struct of nothing but zeros leaves.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        // An empty object may be all that there is to say: `emptyDir: {}`.
        Value::Array(_) | Value::Object(_) => false,
    }
}

/// What a map holds: where it holds lists, they are wrapped in a message.
fn map_value(kind: &Type, wire: Wire<'_>, depth: usize) -> Result<Value, ProtobufError> {
    let (Type::List(item), Wire::Bytes(inner)) = (kind, wire) else { return value(kind, wire, depth) };
    let mut reader = Reader(inner);
    let mut items = Vec::new();
    while let Some((number, wire)) = reader.next()? {
        if number == 1 {
            items.push(value(item, wire, depth)?);
        }
    }
    Ok(Value::Array(items))
}

fn empty(kind: &Type) -> Value {
    match kind {
        Type::List(_) => Value::Array(Vec::new()),
        Type::Object(_) | Type::Map(_) => Value::Object(Map::new()),
        Type::Int32 | Type::Int64 => 0.into(),
        _ => "".into(),
    }
}

fn value(kind: &Type, wire: Wire<'_>, depth: usize) -> Result<Value, ProtobufError> {
    Ok(match (kind, wire) {
        (Type::String, Wire::Bytes(text)) => utf8(text)?.into(),
        (Type::Bool, Wire::Varint(number)) => (number != 0).into(),
        // Negative numbers come in two's complement, 64 bits wide.
        (Type::Int32 | Type::Int64, Wire::Varint(number)) => (number as i64).into(),
        (Type::Double, Wire::Fixed64(bits)) => {
            Number::from_f64(f64::from_bits(bits)).map_or(Value::Null, Value::Number)
        }
        (Type::Bytes, Wire::Bytes(bytes)) => STANDARD.encode(bytes).into(),
        (Type::Quantity, Wire::Bytes(inner)) => text_in(inner, 1)?.into(),
        (Type::IntOrString, Wire::Bytes(inner)) => int_or_string(inner)?,
        (Type::Time | Type::MicroTime, Wire::Bytes(inner)) => time(inner, matches!(kind, Type::MicroTime))?,
        (Type::Raw | Type::Json | Type::Fields, Wire::Bytes(inner)) => {
            let mut reader = Reader(inner);
            let mut json = Value::Null;
            while let Some((number, wire)) = reader.next()? {
                if let (1, Wire::Bytes(text)) = (number, wire) {
                    json =
                        serde_json::from_slice(text).map_err(|_| ProtobufError::Malformed("wrapped JSON is none"))?;
                }
            }
            json
        }
        (Type::SchemaOrList | Type::SchemaOrBool | Type::SchemaOrStrings, Wire::Bytes(inner)) => {
            schema_or(kind, inner, depth)?
        }
        (Type::Object(id), Wire::Bytes(inner)) => {
            let mut object = Map::new();
            message(inner, id.facts(), &[], &mut object, depth + 1)?;
            Value::Object(object)
        }
        _ => return Err(ProtobufError::Malformed("a field has another wire type than its type")),
    })
}

fn text_in(bytes: &[u8], wanted: u32) -> Result<&str, ProtobufError> {
    let mut reader = Reader(bytes);
    let mut found = "";
    while let Some((number, wire)) = reader.next()? {
        if let (true, Wire::Bytes(text)) = (number == wanted, wire) {
            found = utf8(text)?;
        }
    }
    Ok(found)
}

fn int_or_string(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let mut reader = Reader(bytes);
    let (mut is_text, mut number, mut text) = (false, 0_i64, "");
    while let Some((field, wire)) = reader.next()? {
        match (field, wire) {
            (1, Wire::Varint(kind)) => is_text = kind == 1,
            (2, Wire::Varint(value)) => number = value as i64,
            (3, Wire::Bytes(value)) => text = utf8(value)?,
            _ => {}
        }
    }
    Ok(if is_text { text.into() } else { number.into() })
}

/// An empty message is Go's zero time: nothing.
fn time(bytes: &[u8], micro: bool) -> Result<Value, ProtobufError> {
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    let mut reader = Reader(bytes);
    let (mut seconds, mut nanos) = (0_i64, 0_i64);
    while let Some((number, wire)) = reader.next()? {
        match (number, wire) {
            (1, Wire::Varint(value)) => seconds = value as i64,
            (2, Wire::Varint(value)) => nanos = value as i64,
            _ => {}
        }
    }
    let nanos = i32::try_from(nanos).map_err(|_| ProtobufError::Malformed("a time is out of range"))?;
    let at = jiff::Timestamp::new(seconds, nanos).map_err(|_| ProtobufError::Malformed("a time is out of range"))?;
    Ok(if micro { format!("{at:.6}").into() } else { crate::time::rfc3339(at).into() })
}

/// The schema types of custom resource definitions that are a schema, or something else.
fn schema_or(kind: &Type, bytes: &[u8], depth: usize) -> Result<Value, ProtobufError> {
    let facts = crate::facts::schema("apiextensions.v1.JSONSchemaProps")
        .ok_or(ProtobufError::Malformed("its schema type is not known"))?;
    let props = |inner: &[u8]| {
        let mut object = Map::new();
        message(inner, facts, &[], &mut object, depth + 1).map(|()| Value::Object(object))
    };
    let mut reader = Reader(bytes);
    let (mut schema, mut list, mut allows) = (None, Vec::new(), false);
    while let Some((number, wire)) = reader.next()? {
        match (kind, number, wire) {
            (Type::SchemaOrBool, 1, Wire::Varint(value)) => allows = value != 0,
            (Type::SchemaOrBool, 2, Wire::Bytes(inner))
            | (Type::SchemaOrList | Type::SchemaOrStrings, 1, Wire::Bytes(inner)) => {
                schema = Some(props(inner)?);
            }
            (Type::SchemaOrList, 2, Wire::Bytes(inner)) => list.push(props(inner)?),
            (Type::SchemaOrStrings, 2, Wire::Bytes(text)) => list.push(utf8(text)?.into()),
            _ => {}
        }
    }
    Ok(match (kind, schema) {
        (_, Some(schema)) => schema,
        (Type::SchemaOrBool, None) => allows.into(),
        (_, None) => Value::Array(list),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts;
    use std::path::Path;

    /// Every kind that is served, with every field set.
    #[test]
    fn an_object_is_the_same_in_protobuf_as_in_json() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/kubernetes-1.36/objects");
        if !directory.exists() {
            eprintln!("left out: there are no objects in {}", directory.display());
            return;
        }
        let mut compared = 0;
        for kind in facts::kinds() {
            let Some(schema) = facts::schema_of(kind.group, kind.version, kind.kind) else { continue };
            let group = if kind.group.is_empty() { "core" } else { kind.group };
            let file = directory.join(format!("{group}.{}.{}", kind.version, kind.kind));
            let (Ok(pb), Ok(text)) = (
                std::fs::read(
                    file.with_extension("").with_file_name(format!("{group}.{}.{}.pb", kind.version, kind.kind)),
                ),
                std::fs::read(file.with_file_name(format!("{group}.{}.{}.json", kind.version, kind.kind))),
            ) else {
                continue;
            };
            let expected = crate::decode::decode_json(&text, schema, facts_mode()).unwrap().value;
            let decoded = decode(&envelope(&pb).unwrap(), schema).unwrap();
            let decoded = crate::decode::decode_value(decoded, schema, facts_mode()).unwrap().value;
            assert_eq!(decoded, expected, "{} {}", kind.group, kind.kind);
            compared += 1;
        }
        assert!(compared > 50, "only {compared} kinds were compared");
    }

    fn facts_mode() -> crate::decode::FieldValidation {
        crate::decode::FieldValidation::Ignore
    }

    #[test]
    fn pointers_are_sorted() {
        assert!(POINTERS.is_sorted());
    }

    #[test]
    fn zeros_count_only_behind_pointers() {
        let schema = facts::schema("apps.v1.DeploymentSpec").unwrap();
        // replicas: 0 (pointer), minReadySeconds: 0, paused: false
        let envelope = Envelope { api_version: "", kind: "", raw: &[8, 0, 40, 0, 56, 0] };
        assert_eq!(decode(&envelope, schema).unwrap(), serde_json::json!({"replicas": 0}));
    }

    #[test]
    fn broken_messages_are_errors() {
        let schema = facts::schema("core.v1.Pod").unwrap();
        for raw in [&[0x0a_u8, 0x05, 0x01][..], &[0xff; 12], &[0x0b]] {
            assert!(decode(&Envelope { api_version: "", kind: "", raw }, schema).is_err(), "{raw:?}");
        }
        assert_eq!(envelope(b"{}").unwrap_err(), ProtobufError::Prefix);
    }
}
