//! What is said to etcd and what it answers: the messages of its gRPC API (`etcdserverpb`) that are needed here, as bytes.
//! Field numbers are the wire's. Answers are read in place.

use apimachinery::protobuf::ProtobufError;
use apimachinery::protobuf::wire::{Reader, Wire, put_bytes, put_message, put_number, put_varint};
use bytes::Bytes;

/// What precedes a message in gRPC: whether it is compressed, and its length.
pub const PREFIX: usize = 5;
/// Room for what stands around key and value in a request.
const AROUND: usize = 64;

type Read<T> = Result<T, ProtobufError>;

/// A key, its value, and when it was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyValue<'a> {
    pub key: &'a [u8],
    pub value: &'a [u8],
    pub create_revision: i64,
    pub mod_revision: i64,
}

/// What a transaction does if its condition holds.
#[derive(Clone, Copy, Debug)]
pub enum Write<'a> {
    Put { value: &'a [u8], lease: i64 },
    Delete,
}

/// The answer to a range.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ranged<'a> {
    pub revision: i64,
    pub kvs: Vec<KeyValue<'a>>,
    pub count: i64,
}

/// The answer to a transaction, with what its read found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Swapped<'a> {
    pub revision: i64,
    pub succeeded: bool,
    pub current: Option<KeyValue<'a>>,
}

/// The answer to a request for a status.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Status<'a> {
    pub version: &'a [u8],
    pub db_size: i64,
}

/// A message of a watch.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Watched<'a> {
    pub revision: i64,
    pub created: bool,
    pub canceled: bool,
    pub cancel_reason: &'a [u8],
    pub compact_revision: i64,
    pub events: Vec<Event<'a>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event<'a> {
    pub deleted: bool,
    pub kv: KeyValue<'a>,
}

// === requests ===

/// Keys from `start` up to `end` (none: `start` alone), at a revision (0: the newest), so many at most (0: all).
pub fn range(start: &[u8], end: &[u8], revision: i64, limit: i64, count_only: bool) -> Bytes {
    message(start.len() + end.len(), |out| {
        bytes(out, 1, start);
        bytes(out, 2, end);
        number(out, 3, limit);
        number(out, 4, revision);
        number(out, 9, i64::from(count_only));
    })
}

pub fn put(key: &[u8], value: &[u8]) -> Bytes {
    message(key.len() + value.len(), |out| {
        bytes(out, 1, key);
        bytes(out, 2, value);
    })
}

/// Does `write` if the key's mod revision is `expected` (0: it does not exist), and reads it else.
pub fn swap(key: &[u8], expected: i64, write: Write<'_>) -> Bytes {
    let value = if let Write::Put { value, .. } = write { value } else { &[] };
    message(key.len() * 3 + value.len(), |out| {
        put_message(out, 1, |compare| {
            // MOD; the result EQUAL is 0.
            number(compare, 2, 2);
            bytes(compare, 3, key);
            // A choice between several: 0 is written as well.
            put_number(compare, 6, expected);
        });
        match write {
            Write::Put { value, lease } => {
                // Told beforehand: what is moved to make room for a length is as big as the value.
                let mut tail = Vec::with_capacity(12);
                number(&mut tail, 3, lease);
                let inner = size_of_bytes(key) + size_of_bytes(value) + tail.len();
                put_varint(out, 2 << 3 | 2);
                put_varint(out, (1 + size_of_varint(inner) + inner) as u64);
                put_varint(out, 2 << 3 | 2);
                put_varint(out, inner as u64);
                bytes(out, 1, key);
                bytes(out, 2, value);
                out.extend_from_slice(&tail);
            }
            Write::Delete => put_message(out, 2, |op| put_message(op, 3, |delete| bytes(delete, 1, key))),
        }
        put_message(out, 3, |op| put_message(op, 1, |range| bytes(range, 1, key)));
    })
}

pub fn compaction(revision: i64) -> Bytes {
    message(0, |out| number(out, 1, revision))
}

pub fn lease(ttl_seconds: i64) -> Bytes {
    message(0, |out| number(out, 1, ttl_seconds))
}

pub fn status() -> Bytes {
    message(0, |_| {})
}

/// Keys from `start` up to `end`, from a revision on, with notifications of progress.
pub fn watch(start: &[u8], end: &[u8], from: i64) -> Bytes {
    message(start.len() + end.len(), |out| {
        put_message(out, 1, |create| {
            bytes(create, 1, start);
            bytes(create, 2, end);
            number(create, 3, from);
            number(create, 4, 1);
        });
    })
}

/// How far is the watch?
pub fn progress() -> Bytes {
    message(0, |out| put_message(out, 3, |_| {}))
}

fn message(size: usize, write: impl FnOnce(&mut Vec<u8>)) -> Bytes {
    let mut out = Vec::with_capacity(PREFIX + AROUND + size);
    out.extend_from_slice(&[0; PREFIX]);
    write(&mut out);
    let length = u32::try_from(out.len() - PREFIX).unwrap_or(u32::MAX);
    out[1..PREFIX].copy_from_slice(&length.to_be_bytes());
    out.into()
}

fn bytes(out: &mut Vec<u8>, field: u32, bytes: &[u8]) {
    if !bytes.is_empty() {
        put_bytes(out, field, bytes);
    }
}

fn number(out: &mut Vec<u8>, field: u32, number: i64) {
    if number != 0 {
        put_number(out, field, number);
    }
}

fn size_of_bytes(bytes: &[u8]) -> usize {
    if bytes.is_empty() { 0 } else { 1 + size_of_varint(bytes.len()) + bytes.len() }
}

fn size_of_varint(number: usize) -> usize {
    (usize::BITS - (number | 1).leading_zeros()).div_ceil(7) as usize
}

// === answers ===

/// Calls `take` with each field.
fn fields<'a>(message: &'a [u8], mut take: impl FnMut(u32, Wire<'a>) -> Read<()>) -> Read<()> {
    let mut reader = Reader(message);
    while let Some((number, wire)) = reader.field()? {
        take(number, wire)?;
    }
    Ok(())
}

/// The revision of any answer: of its header.
pub fn revision(answer: &[u8]) -> Read<i64> {
    let mut revision = 0;
    fields(answer, |number, wire| {
        if let (1, Wire::Bytes(header)) = (number, wire) {
            revision = header_revision(header)?;
        }
        Ok(())
    })?;
    Ok(revision)
}

fn header_revision(header: &[u8]) -> Read<i64> {
    let mut revision = 0;
    fields(header, |number, wire| {
        if let (3, Wire::Varint(at)) = (number, wire) {
            revision = at as i64;
        }
        Ok(())
    })?;
    Ok(revision)
}

fn key_value(message: &[u8]) -> Read<KeyValue<'_>> {
    let mut kv = KeyValue::default();
    fields(message, |number, wire| {
        match (number, wire) {
            (1, Wire::Bytes(key)) => kv.key = key,
            (2, Wire::Varint(at)) => kv.create_revision = at as i64,
            (3, Wire::Varint(at)) => kv.mod_revision = at as i64,
            (5, Wire::Bytes(value)) => kv.value = value,
            _ => {}
        }
        Ok(())
    })?;
    Ok(kv)
}

pub fn ranged(answer: &[u8]) -> Read<Ranged<'_>> {
    let mut ranged = Ranged::default();
    fields(answer, |number, wire| {
        match (number, wire) {
            (1, Wire::Bytes(header)) => ranged.revision = header_revision(header)?,
            (2, Wire::Bytes(kv)) => ranged.kvs.push(key_value(kv)?),
            (4, Wire::Varint(count)) => ranged.count = count as i64,
            _ => {}
        }
        Ok(())
    })?;
    Ok(ranged)
}

pub fn swapped(answer: &[u8]) -> Read<Swapped<'_>> {
    let mut swapped = Swapped::default();
    fields(answer, |number, wire| {
        match (number, wire) {
            (1, Wire::Bytes(header)) => swapped.revision = header_revision(header)?,
            (2, Wire::Varint(succeeded)) => swapped.succeeded = succeeded != 0,
            (3, Wire::Bytes(op)) => fields(op, |number, wire| {
                if let (1, Wire::Bytes(range)) = (number, wire) {
                    swapped.current = ranged(range)?.kvs.first().copied();
                }
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(swapped)
}

/// The lease's number.
pub fn granted(answer: &[u8]) -> Read<i64> {
    let mut id = 0;
    fields(answer, |number, wire| {
        if let (2, Wire::Varint(given)) = (number, wire) {
            id = given as i64;
        }
        Ok(())
    })?;
    Ok(id)
}

pub fn status_of(answer: &[u8]) -> Read<Status<'_>> {
    let mut status = Status::default();
    fields(answer, |number, wire| {
        match (number, wire) {
            (2, Wire::Bytes(version)) => status.version = version,
            (3, Wire::Varint(size)) => status.db_size = size as i64,
            _ => {}
        }
        Ok(())
    })?;
    Ok(status)
}

pub fn watched(message: &[u8]) -> Read<Watched<'_>> {
    let mut watched = Watched::default();
    fields(message, |number, wire| {
        match (number, wire) {
            (1, Wire::Bytes(header)) => watched.revision = header_revision(header)?,
            (3, Wire::Varint(created)) => watched.created = created != 0,
            (4, Wire::Varint(canceled)) => watched.canceled = canceled != 0,
            (5, Wire::Varint(revision)) => watched.compact_revision = revision as i64,
            (6, Wire::Bytes(reason)) => watched.cancel_reason = reason,
            (11, Wire::Bytes(event)) => watched.events.push(event_of(event)?),
            _ => {}
        }
        Ok(())
    })?;
    Ok(watched)
}

fn event_of(message: &[u8]) -> Read<Event<'_>> {
    let mut event = Event::default();
    fields(message, |number, wire| {
        match (number, wire) {
            (1, Wire::Varint(kind)) => event.deleted = kind == 1,
            (2, Wire::Bytes(kv)) => event.kv = key_value(kv)?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `number:value` of each field; `number:{…}` of a message, which stands at one of the paths in `nested`.
    fn told(message: &[u8], path: &str, nested: &[&str]) -> String {
        let mut parts = Vec::new();
        fields(message, |number, wire| {
            let path = format!("{path}/{number}");
            parts.push(match wire {
                Wire::Varint(value) => format!("{number}:{}", value as i64),
                Wire::Bytes(inner) if nested.contains(&&*path) => {
                    format!("{number}:{{{}}}", told(inner, &path, nested))
                }
                Wire::Bytes(text) if text.len() < 20 => format!("{number}:{}", String::from_utf8_lossy(text)),
                Wire::Bytes(text) => format!("{number}:[{}]", text.len()),
                _ => "?".to_owned(),
            });
            Ok(())
        })
        .unwrap();
        parts.join(" ")
    }

    #[test]
    fn requests_are_as_etcd_reads_them() {
        let (long, medium) = (vec![b'x'; 20_000], vec![b'x'; 120]);
        let putting = ["/1", "/2", "/2/2", "/3", "/3/1"];
        let deleting = ["/1", "/2", "/2/3", "/3", "/3/1"];
        for (request, nested, expected) in [
            (range(b"/a", b"/b", 7, 100, false), &[][..], "1:/a 2:/b 3:100 4:7"),
            (range(b"\0", b"", 0, 0, true), &[], "1:\0 9:1"),
            (put(b"/a", b"v"), &[], "1:/a 2:v"),
            (
                swap(b"/a", 0, Write::Put { value: b"v", lease: 0 }),
                &putting,
                "1:{2:2 3:/a 6:0} 2:{2:{1:/a 2:v}} 3:{1:{1:/a}}",
            ),
            (
                swap(b"/a", 9, Write::Put { value: &long, lease: -3 }),
                &putting,
                "1:{2:2 3:/a 6:9} 2:{2:{1:/a 2:[20000] 3:-3}} 3:{1:{1:/a}}",
            ),
            (
                swap(b"/a", 9, Write::Put { value: &medium, lease: 0 }),
                &putting,
                "1:{2:2 3:/a 6:9} 2:{2:{1:/a 2:[120]}} 3:{1:{1:/a}}",
            ),
            (swap(b"/a", 9, Write::Delete), &deleting, "1:{2:2 3:/a 6:9} 2:{3:{1:/a}} 3:{1:{1:/a}}"),
            (compaction(5), &[], "1:5"),
            (lease(60), &[], "1:60"),
            (status(), &[], ""),
            (watch(b"/a", b"/b", 8), &["/1"], "1:{1:/a 2:/b 3:8 4:1}"),
            (progress(), &["/3"], "3:{}"),
        ] {
            let length = u32::from_be_bytes(request[1..PREFIX].try_into().unwrap()) as usize;
            assert_eq!((request[0], length), (0, request.len() - PREFIX));
            assert_eq!(told(&request[PREFIX..], "", nested), expected);
        }
    }

    fn answer(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        put_message(&mut out, 1, |header| {
            put_number(header, 1, 77);
            put_number(header, 3, 42);
        });
        write(&mut out);
        out
    }

    fn write_kv(out: &mut Vec<u8>) {
        bytes(out, 1, b"/a");
        number(out, 2, 3);
        number(out, 3, 4);
        number(out, 4, 2);
        bytes(out, 5, b"v");
    }

    const KV: KeyValue<'_> = KeyValue { key: b"/a", value: b"v", create_revision: 3, mod_revision: 4 };

    #[test]
    fn answers_are_read_in_place() {
        assert_eq!(revision(&answer(|_| {})), Ok(42));
        let range = answer(|out| {
            put_message(out, 2, write_kv);
            number(out, 3, 1);
            number(out, 4, 9);
        });
        assert_eq!(ranged(&range), Ok(Ranged { revision: 42, kvs: vec![KV], count: 9 }));

        let done = answer(|out| {
            number(out, 2, 1);
            put_message(out, 3, |op| put_message(op, 2, |put| put_message(put, 1, |header| number(header, 3, 42))));
        });
        assert_eq!(swapped(&done), Ok(Swapped { revision: 42, succeeded: true, current: None }));
        let differs = answer(|out| put_message(out, 3, |op| put_bytes(op, 1, &range)));
        assert_eq!(swapped(&differs), Ok(Swapped { revision: 42, succeeded: false, current: Some(KV) }));

        assert_eq!(granted(&answer(|out| number(out, 2, -5))), Ok(-5));
        let status = answer(|out| {
            bytes(out, 2, b"3.5.9");
            number(out, 3, 4096);
        });
        assert_eq!(status_of(&status), Ok(Status { version: b"3.5.9", db_size: 4096 }));

        let events = answer(|out| {
            put_message(out, 11, |event| put_message(event, 2, write_kv));
            put_message(out, 11, |event| {
                number(event, 1, 1);
                put_message(event, 2, |kv| {
                    bytes(kv, 1, b"/b");
                    number(kv, 3, 41);
                });
            });
        });
        let gone = KeyValue { key: b"/b", mod_revision: 41, ..KeyValue::default() };
        let expected = vec![Event { deleted: false, kv: KV }, Event { deleted: true, kv: gone }];
        assert_eq!(watched(&events).unwrap().events, expected);
        let over = answer(|out| {
            number(out, 4, 1);
            number(out, 5, 12);
            bytes(out, 6, b"compacted");
        });
        let expected = Watched {
            revision: 42,
            canceled: true,
            cancel_reason: b"compacted",
            compact_revision: 12,
            ..Watched::default()
        };
        assert_eq!(watched(&over), Ok(expected));
        assert!(ranged(&range[..range.len() - 1]).is_err());
    }
}
