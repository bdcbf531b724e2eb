//! What the fuzz targets call: each takes whatever bytes there are through a decoder, and holds what comes out against a law.
//!
//! In this directory: `RUSTC_BOOTSTRAP=1 cargo run --release --bin json -- -max_total_time=60`, or, with a nightly toolchain
//! and cargo-fuzz, `cargo fuzz run json`. A C++ compiler is needed. No part of `./test`: the same decoders meet random input
//! there in `apimachinery/tests/hostile.rs`.
#![forbid(unsafe_code)]

use apimachinery::cel::Env;
use apimachinery::continuation::Token;
use apimachinery::decode::{FieldValidation, decode_json, decode_value};
use apimachinery::facts::{self, TypeFacts};
use apimachinery::fields::FieldSelector;
use apimachinery::labels::Selector;
use apimachinery::managed_fields::ManagedFields;
use apimachinery::protobuf::{self, Envelope};
use apimachinery::{patch, yaml};
use serde_json::Value;

/// The first byte says of which kind the rest shall be.
fn kind(input: &[u8]) -> Option<(&'static TypeFacts, &[u8])> {
    let (first, rest) = input.split_first()?;
    let kind = &facts::kinds()[usize::from(*first) % facts::kinds().len()];
    Some((facts::schema_of(kind.group, kind.version, kind.kind)?, rest))
}

/// Two JSON values, one a line.
fn two(input: &[u8]) -> Option<(Value, Value)> {
    let at = input.iter().position(|byte| *byte == b'\n')?;
    Some((serde_json::from_slice(&input[..at]).ok()?, serde_json::from_slice(&input[at..]).ok()?))
}

/// What is decoded settles at once.
pub fn json(input: &[u8]) {
    let Some((schema, text)) = kind(input) else { return };
    if let Ok(decoded) = decode_json(text, schema, FieldValidation::Warn) {
        let again = decode_value(decoded.value.clone(), schema, FieldValidation::Strict).map(|again| again.value);
        assert_eq!(again, Ok(decoded.value));
    }
}

pub fn yaml(input: &[u8]) {
    if let Ok(text) = std::str::from_utf8(input) {
        _ = yaml::documents(text);
    }
}

/// What is decoded is encoded to what decodes to the same.
pub fn protobuf(input: &[u8]) {
    let Some((schema, bytes)) = kind(input) else { return };
    _ = protobuf::envelope(bytes);
    let decode = |raw: &[u8]| protobuf::decode(&Envelope { api_version: "", kind: "", raw }, schema);
    if let Ok(value) = decode(bytes) {
        assert_eq!(decode(&protobuf::encode(&value, schema)).as_ref(), Ok(&value));
    }
}

/// JSON, merge and strategic merge patches, on whatever they meet.
pub fn patches(input: &[u8]) {
    let Some((schema, text)) = kind(input) else { return };
    let Some((document, change)) = two(text) else { return };
    _ = patch::json(&mut document.clone(), &change);
    _ = patch::strategic(&mut document.clone(), &change, Some(schema));
    _ = patch::strategic(&mut document.clone(), &change, None);
    let mut merged = document;
    patch::merge(&mut merged, &change);
}

/// Who owns what, as clients send it and as it is stored.
pub fn managed_fields(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(managed) = ManagedFields::parse_sent(text) {
        let stored = managed.write();
        assert_eq!(ManagedFields::parse(&stored).map(|again| again.write()).ok(), Some(stored));
    }
}

pub fn selectors(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(selector) = Selector::parse(text) {
        selector.matches_with(|_| Some("x"));
        assert_eq!(Selector::parse(&selector.to_string()).as_ref(), Ok(&selector));
    }
    if let Ok(selector) = FieldSelector::parse(text) {
        selector.matches(|_| Some("x"));
        assert_eq!(FieldSelector::parse(&selector.to_string()).as_ref(), Ok(&selector));
    }
}

pub fn continue_tokens(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(token) = Token::decode(text) {
        assert!(!token.start.split('/').any(|segment| segment == ".."));
    }
}

/// Whatever an expression is, it has a type or a fault.
pub fn expressions(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    _ = Env::of_devices().weigh(text);
}
