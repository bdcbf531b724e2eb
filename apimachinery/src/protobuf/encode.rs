//! JSON values to messages. What an object does not say is not written: an absent field reads as Go's zero value, which is what
//! its absence means. Fields go in the order of their numbers and maps in that of their keys, as Go writes them.

use super::MAGIC;
use super::wire::{put_bytes, put_message, put_number, put_varint};
use crate::facts::{self, FieldFacts, Type, TypeFacts};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::Value;

/// An object's protobuf, laid out as the frame of a watch event: the encoded object and its bare message are slices of it.
#[derive(Debug)]
pub struct Encoded {
    frame: Bytes,
    object_at: u32,
    message_at: u32,
    message_end: u32,
}

/// The message of an object of a type.
pub fn encode(object: &Value, facts: &'static TypeFacts) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    put_object(&mut out, object, facts);
    out
}

/// An object: its message in an envelope that names its kind.
pub fn enclose(api_version: &str, kind: &str, message: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len() + api_version.len() + kind.len() + 24);
    out.extend_from_slice(MAGIC);
    put_unknown(&mut out, api_version, kind, |out| out.extend_from_slice(message));
    out
}

/// The frame of a watch event around an object, which is encoded already.
pub fn watch_frame(event: &str, object: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(object.len() + event.len() + 24);
    put_frame(&mut out, event, |out| out.extend_from_slice(object));
    out
}

/// A list, from its metadata and the size and messages of its items: the bytes before the first item, what comes before an
/// item of a size, and the bytes behind the last.
pub mod list {
    use super::{MAGIC, put_bytes, put_unknown, put_varint};
    use crate::facts;
    use bytes::BufMut;
    use serde_json::Value;

    const METADATA: u32 = 1;
    const ITEMS: u32 = 2;

    /// Everything before the first item, if all items with their heads take `size` bytes.
    pub fn head(api_version: &str, kind: &str, metadata: &Value, size: usize) -> Vec<u8> {
        let mut message = Vec::with_capacity(64);
        if let Some(facts) = facts::schema("meta.v1.ListMeta") {
            put_bytes(&mut message, METADATA, &super::encode(metadata, facts));
        }
        let mut out = MAGIC.to_vec();
        // With no content, to see the envelope's beginning; its last fields are empty texts.
        put_unknown(&mut out, api_version, kind, |_| {});
        out.truncate(out.len() - super::UNKNOWN_END.len() - 1);
        put_varint(&mut out, (message.len() + size) as u64);
        out.extend_from_slice(&message);
        out
    }

    /// What stands before an item.
    pub fn item_head(out: &mut impl BufMut, item_size: usize) {
        put_varint(out, u64::from(ITEMS) << 3 | 2);
        put_varint(out, item_size as u64);
    }

    /// How long [`item_head`] is.
    pub fn item_head_size(item_size: usize) -> usize {
        1 + (64 - (item_size as u64 | 1).leading_zeros() as usize).div_ceil(7)
    }

    /// Everything behind the last item.
    pub const END: &[u8] = super::UNKNOWN_END;
}

/// Two texts of the envelope that say nothing: contentEncoding and contentType.
const UNKNOWN_END: &[u8] = &[0x1a, 0, 0x22, 0];

// === impl Encoded ===

impl Encoded {
    /// `event` is what a watch says of the object by default.
    pub fn new(event: &str, api_version: &str, kind: &str, object: &Value, facts: &'static TypeFacts) -> Self {
        let message = encode(object, facts);
        let object = enclose(api_version, kind, &message);
        let frame = watch_frame(event, &object);
        // The lengths in front vary; what is behind the message does not.
        let message_end = frame.len() - UNKNOWN_END.len();
        let at = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
        Self {
            object_at: at(frame.len() - object.len()),
            message_at: at(message_end - message.len()),
            message_end: at(message_end),
            frame: frame.into(),
        }
    }

    /// The frame of a watch event.
    pub fn frame(&self) -> Bytes {
        self.frame.clone()
    }

    /// The object in its envelope.
    pub fn object(&self) -> Bytes {
        self.frame.slice(self.object_at as usize..)
    }

    /// The bare message, as a list holds it.
    pub fn message(&self) -> &[u8] {
        &self.frame[self.message_at as usize..self.message_end as usize]
    }

    pub fn size(&self) -> usize {
        self.frame.len()
    }
}

fn put_unknown(out: &mut Vec<u8>, api_version: &str, kind: &str, write: impl FnOnce(&mut Vec<u8>)) {
    put_message(out, 1, |out| {
        put_bytes(out, 1, api_version.as_bytes());
        put_bytes(out, 2, kind.as_bytes());
    });
    put_message(out, 2, write);
    out.extend_from_slice(UNKNOWN_END);
}

fn put_frame(out: &mut Vec<u8>, event: &str, write: impl FnOnce(&mut Vec<u8>)) {
    out.extend_from_slice(&[0; 4]);
    put_bytes(out, 1, event.as_bytes());
    put_message(out, 2, |out| put_message(out, 1, write));
    let length = u32::try_from(out.len() - 4).unwrap_or(u32::MAX);
    out[..4].copy_from_slice(&length.to_be_bytes());
}

// === messages ===

fn put_object(out: &mut Vec<u8>, object: &Value, facts: &'static TypeFacts) {
    let Value::Object(map) = object else { return };
    let mut present: Vec<(&'static FieldFacts, &Value)> = map
        .iter()
        .filter(|(_, value)| !value.is_null())
        .filter_map(|(name, value)| facts.field(name).map(|field| (field, value)))
        .filter(|(field, _)| !field.numbers.is_empty())
        .collect();
    present.sort_unstable_by(|(a, _), (b, _)| a.numbers.cmp(&b.numbers));
    put_fields(out, &present, 0);
}

/// Writes fields sorted by number. Those of a struct that Go inlines in JSON share the beginning of their paths.
fn put_fields(out: &mut Vec<u8>, mut fields: &[(&'static FieldFacts, &Value)], depth: usize) {
    while let Some(((field, value), rest)) = fields.split_first() {
        let number = field.numbers[depth];
        if field.numbers.len() == depth + 1 {
            put_field(out, number, &field.kind, value);
            fields = rest;
        } else {
            let same = fields.iter().take_while(|(f, _)| f.numbers[depth] == number).count();
            let (inlined, rest) = fields.split_at(same);
            put_message(out, number, |out| put_fields(out, inlined, depth + 1));
            fields = rest;
        }
    }
}

fn put_field(out: &mut Vec<u8>, number: u32, kind: &'static Type, value: &Value) {
    match (kind, value) {
        (Type::List(item), Value::Array(list)) => {
            for value in list {
                put_field(out, number, item, value);
            }
        }
        (Type::Map(item), Value::Object(map)) => {
            for (key, value) in map {
                put_message(out, number, |out| {
                    put_bytes(out, 1, key.as_bytes());
                    put_map_value(out, item, value);
                });
            }
        }
        (Type::String, Value::String(text)) => put_bytes(out, number, text.as_bytes()),
        (Type::Bool, Value::Bool(flag)) => put_number(out, number, i64::from(*flag)),
        (Type::Int32 | Type::Int64, Value::Number(n)) => {
            put_number(out, number, n.as_i64().or_else(|| n.as_f64().map(|n| n as i64)).unwrap_or(0));
        }
        (Type::Double, Value::Number(n)) => {
            put_varint(out, u64::from(number) << 3 | 1);
            out.extend_from_slice(&n.as_f64().unwrap_or(0.0).to_le_bytes());
        }
        (Type::Bytes, Value::String(text)) => put_bytes(out, number, &STANDARD.decode(text).unwrap_or_default()),
        (Type::Quantity, Value::String(text)) => put_message(out, number, |out| put_bytes(out, 1, text.as_bytes())),
        (Type::Quantity, Value::Number(n)) => {
            put_message(out, number, |out| put_bytes(out, 1, n.to_string().as_bytes()));
        }
        (Type::IntOrString, value) => put_message(out, number, |out| put_int_or_string(out, value)),
        (Type::Time | Type::MicroTime, Value::String(text)) => put_message(out, number, |out| put_time(out, text)),
        (Type::Raw | Type::Json | Type::Fields, value) => {
            put_message(out, number, |out| put_bytes(out, 1, value.to_string().as_bytes()));
        }
        (Type::SchemaOrList | Type::SchemaOrBool | Type::SchemaOrStrings, value) => {
            put_message(out, number, |out| put_schema_or(out, kind, value));
        }
        (Type::Object(id), value) => put_message(out, number, |out| put_object(out, value, id.facts())),
        // Of another type than the schema says: nothing that was decoded is.
        _ => {}
    }
}

/// A map's lists are wrapped in a message. What is null is Go's zero value.
fn put_map_value(out: &mut Vec<u8>, kind: &'static Type, value: &Value) {
    match kind {
        Type::List(_) => put_message(out, 2, |out| put_field(out, 1, kind, value)),
        Type::Time | Type::MicroTime | Type::Object(_) | Type::Quantity if value.is_null() => put_bytes(out, 2, &[]),
        _ => put_field(out, 2, kind, value),
    }
}

fn put_int_or_string(out: &mut Vec<u8>, value: &Value) {
    put_number(out, 1, i64::from(value.is_string()));
    put_number(out, 2, value.as_i64().unwrap_or(0));
    put_bytes(out, 3, value.as_str().unwrap_or("").as_bytes());
}

fn put_time(out: &mut Vec<u8>, text: &str) {
    // Times have been checked when they came in.
    let Ok(time) = text.parse::<jiff::Timestamp>() else { return };
    // Rounded down to whole seconds, so that the rest is never negative.
    let (mut seconds, mut nanos) = (time.as_second(), time.subsec_nanosecond());
    if nanos < 0 {
        seconds -= 1;
        nanos += 1_000_000_000;
    }
    put_number(out, 1, seconds);
    put_number(out, 2, i64::from(nanos));
}

/// The schema types of custom resource definitions that are a schema, or something else.
fn put_schema_or(out: &mut Vec<u8>, kind: &Type, value: &Value) {
    let Some(facts) = facts::schema("apiextensions.v1.JSONSchemaProps") else { return };
    let schema = |out: &mut Vec<u8>, number: u32, value: &Value| {
        put_message(out, number, |out| put_object(out, value, facts));
    };
    match (kind, value) {
        (Type::SchemaOrBool, Value::Bool(allows)) => put_number(out, 1, i64::from(*allows)),
        (Type::SchemaOrBool, value) => {
            put_number(out, 1, 1);
            schema(out, 2, value);
        }
        (Type::SchemaOrList, Value::Array(list)) => list.iter().for_each(|value| schema(out, 2, value)),
        (Type::SchemaOrStrings, Value::Array(list)) => {
            list.iter().filter_map(Value::as_str).for_each(|text| put_bytes(out, 2, text.as_bytes()));
        }
        (_, value) => schema(out, 1, value),
    }
}
