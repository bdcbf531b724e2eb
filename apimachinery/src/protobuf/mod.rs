//! Kubernetes protobuf and JSON values, one into the other, guided by the schema facts: what Go clients speak by default for
//! built-in kinds.
//!
//! An encoded object is the four bytes `k8s\0` and a `runtime.Unknown` that names its kind and wraps its message. A watch sends
//! frames: a length in four bytes, and a `WatchEvent` whose object is encoded so.

mod decode;
mod encode;
#[cfg(test)]
mod tests;
pub mod wire;

pub use decode::decode;
pub use encode::{Encoded, enclose, encode, list, watch_frame};
use wire::{Reader, Wire, utf8};

const MAGIC: &[u8] = b"k8s\0";

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

/// Is this an encoded object?
pub fn is_protobuf(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Opens the envelope.
pub fn envelope(bytes: &[u8]) -> Result<Envelope<'_>, ProtobufError> {
    let mut reader = Reader(bytes.strip_prefix(MAGIC).ok_or(ProtobufError::Prefix)?);
    let mut envelope = Envelope { api_version: "", kind: "", raw: &[] };
    while let Some((number, wire)) = reader.field()? {
        match (number, wire) {
            (1, Wire::Bytes(type_meta)) => {
                let mut inner = Reader(type_meta);
                while let Some((number, wire)) = inner.field()? {
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
