//! The body of a list, put together as it is read: a big list never lies in memory as a whole, in whatever form it is wanted.
//! Objects as they are, in JSON or protobuf, are bytes that lie ready; what else is asked for is made one item at a time.

use super::table;
use crate::registry::Resource;
use crate::server::body::{Body, BoxError};
use crate::server::negotiation::{Encoding, Shape, Wanted};
use crate::server::respond;
use crate::storage::StoredObject;
use apimachinery::protobuf;
use apimachinery::status::StatusError;
use bytes::{BufMut as _, Bytes, BytesMut};
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{CONTENT_ENCODING, HeaderValue};
use http_body::{Frame, SizeHint};
use serde_json::{Value, json};
use std::io::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// A list is sent in pieces of about this size.
const CHUNK: usize = 64 * 1024;

/// The response to a list of objects, whose metadata is given.
pub fn response(
    resource: &Arc<Resource>,
    objects: Vec<Arc<StoredObject>>,
    metadata: Value,
    wanted: Wanted,
    include: table::Include,
) -> Result<http::Response<Body>, StatusError> {
    let (kind, converts) = (format!("{}List", resource.kind), resource.strategy.converts());
    let made = |objects, frame, key, make: Make| {
        let form = Form::Made { make, encoding: wanted.encoding };
        (head(&frame, key, wanted.encoding), Items { objects, form })
    };
    let list = |metadata| json!({"kind": kind, "apiVersion": resource.api_version, "metadata": metadata});
    let shared = resource.clone();
    let (head, items) = match (wanted.shape, wanted.encoding) {
        (Shape::Metadata, _) => return Err(respond::wrong_shape(wanted)),
        (Shape::AsIs, Encoding::Protobuf) => {
            let items = protobuf_items(resource, objects);
            let size = items.size().unwrap_or(0) - items.end().len();
            (protobuf::list::head(&resource.api_version, &kind, &metadata, size), items)
        }
        (Shape::AsIs, Encoding::Json) if !converts => {
            let head = head(&list(metadata), "items", Encoding::Json);
            (head, Items { objects, form: Form::Json })
        }
        (Shape::AsIs, _) => made(objects, list(metadata), "items", Box::new(move |object| shared.value(object))),
        (Shape::MetadataList, Encoding::Protobuf) => {
            let values: Vec<Value> = objects.iter().map(|object| resource.value(object)).collect();
            return Ok(respond::value(wanted, 200, &respond::metadata_list(wanted, &values, metadata)));
        }
        (Shape::MetadataList, _) => {
            let frame = respond::metadata_list(wanted, &[], metadata);
            let make = move |object: &_| respond::metadata_only(wanted.meta_version, &shared.value(object));
            made(objects, without(frame, "items"), "items", Box::new(make))
        }
        (Shape::Table, _) => {
            let frame = table::many(wanted, resource, &[], metadata, include, true);
            let make = move |object: &_| table::row(wanted, &shared, &shared.value(object), include);
            made(objects, without(frame, "rows"), "rows", Box::new(make))
        }
    };
    Ok(stream(wanted, head, items))
}

/// Makes what stands for an object in the list.
type Make = Box<dyn Fn(&StoredObject) -> Value + Send + Sync>;

/// What a list consists of.
struct Items {
    objects: Vec<Arc<StoredObject>>,
    form: Form,
}

enum Form {
    /// The objects' own bytes.
    Json,
    /// Their protobuf, which has been made.
    Protobuf,
    /// Messages made for this list: of objects that are converted.
    Messages(Vec<Bytes>),
    /// Text, made item by item.
    Made { make: Make, encoding: Encoding },
}

/// An object that has no protobuf could not be read; it is logged where that was found out.
fn protobuf_items(resource: &Resource, mut objects: Vec<Arc<StoredObject>>) -> Items {
    let form = match resource.schema {
        Some(schema) if resource.strategy.converts() => {
            let messages = objects.iter().map(|o| protobuf::encode(&resource.value(o), schema).into());
            Form::Messages(messages.collect())
        }
        _ => {
            objects.retain(|object| object.protobuf().is_some());
            Form::Protobuf
        }
    };
    Items { objects, form }
}

fn without(mut frame: Value, key: &str) -> Value {
    if let Some(map) = frame.as_object_mut() {
        map.remove(key);
    }
    frame
}

/// Everything before the first item: what the list says of itself, and the beginning of its last member.
fn head(frame: &Value, key: &str, encoding: Encoding) -> Vec<u8> {
    let text = match encoding {
        Encoding::Yaml => format!("{}{key}:", apimachinery::yaml::to_string(frame).unwrap_or_default()),
        Encoding::JsonPretty => {
            let text = serde_json::to_string_pretty(frame).unwrap_or_default();
            format!("{},\n  \"{key}\": [", text.trim_end_matches("\n}"))
        }
        _ => {
            let text = frame.to_string();
            format!("{},\"{key}\":[", text.strip_suffix('}').unwrap_or(&text))
        }
    };
    text.into_bytes()
}

// === impl Items ===

impl Items {
    /// An item that lies ready, in JSON behind its opening brace.
    fn ready(&self, at: usize) -> &[u8] {
        match &self.form {
            Form::Json => self.objects[at].list_item(),
            Form::Protobuf => self.objects[at].protobuf().map_or(&[], protobuf::Encoded::message),
            Form::Messages(all) => &all[at],
            Form::Made { .. } => &[],
        }
    }

    /// How many bytes the items take, with all that is around them, if that is known before they are made.
    fn size(&self) -> Option<usize> {
        let sizes = (0..self.objects.len()).map(|at| self.ready(at).len());
        let size: usize = match &self.form {
            Form::Json => sizes.map(|size| size + 1).sum::<usize>() + self.objects.len().saturating_sub(1),
            Form::Protobuf | Form::Messages(_) => sizes.map(|size| protobuf::list::item_head_size(size) + size).sum(),
            Form::Made { .. } => return None,
        };
        Some(size + self.end().len())
    }

    fn put(&self, at: usize, chunk: &mut BytesMut) {
        match &self.form {
            Form::Json => chunk.put_slice(if at > 0 { b",{" } else { b"{" }),
            Form::Protobuf | Form::Messages(_) => protobuf::list::item_head(chunk, self.ready(at).len()),
            Form::Made { make, encoding } => {
                let value = make(&self.objects[at]);
                let text = match encoding {
                    Encoding::Yaml => {
                        let text = apimachinery::yaml::to_string(&[value]).unwrap_or_default();
                        format!("\n{}", text.trim_end_matches('\n'))
                    }
                    // No text in JSON holds a line break as it is.
                    Encoding::JsonPretty => {
                        let text = serde_json::to_string_pretty(&value).unwrap_or_default();
                        format!("{}\n    {}", if at > 0 { "," } else { "" }, text.replace('\n', "\n    "))
                    }
                    _ => format!("{}{value}", if at > 0 { "," } else { "" }),
                };
                return chunk.put_slice(text.as_bytes());
            }
        }
        chunk.put_slice(self.ready(at));
    }

    fn end(&self) -> &'static [u8] {
        match &self.form {
            Form::Protobuf | Form::Messages(_) => protobuf::list::END,
            Form::Made { encoding: Encoding::Yaml, .. } if self.objects.is_empty() => b" []\n",
            Form::Made { encoding: Encoding::Yaml, .. } => b"\n",
            Form::Made { encoding: Encoding::JsonPretty, .. } if self.objects.is_empty() => b"]\n}\n",
            Form::Made { encoding: Encoding::JsonPretty, .. } => b"\n  ]\n}\n",
            _ => b"]}",
        }
    }
}

/// The response for a list whose beginning is given.
fn stream(wanted: Wanted, head: Vec<u8>, items: Items) -> http::Response<Body> {
    let size = items.size().map(|size| (head.len() + size) as u64);
    // What is made is about as big as what it is made of.
    let about = size.unwrap_or_else(|| items.objects.iter().map(|object| object.list_item().len() as u64).sum());
    let gzip = wanted.gzip && about >= respond::GZIP_MIN as u64;
    let packer = gzip.then(|| GzEncoder::new(Vec::with_capacity(CHUNK), Compression::fast()));
    let mut body = ListBody { head: Some(head), items, next: 0, ended: false, left: size, packer };
    let body = if about <= CHUNK as u64 && !gzip { Body::Full(body.all()) } else { Body::boxed(body) };
    let mut response = respond::plain(200, wanted.content_type(), body);
    if gzip {
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}

struct ListBody {
    head: Option<Vec<u8>>,
    items: Items,
    next: usize,
    ended: bool,
    /// What is still to come, if that is known.
    left: Option<u64>,
    packer: Option<GzEncoder<Vec<u8>>>,
}

// === impl ListBody ===

impl ListBody {
    /// The next piece, not compressed.
    fn fill(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        let mut chunk = BytesMut::with_capacity(CHUNK + 4096);
        if let Some(head) = self.head.take() {
            chunk.put_slice(&head);
        }
        while chunk.len() < CHUNK && self.next < self.items.objects.len() {
            self.items.put(self.next, &mut chunk);
            self.next += 1;
        }
        if self.next == self.items.objects.len() {
            chunk.put_slice(self.items.end());
            self.ended = true;
        }
        Some(chunk.freeze())
    }

    /// All of a small list.
    fn all(&mut self) -> Bytes {
        let first = self.fill().unwrap_or_default();
        if self.ended {
            return first;
        }
        let mut all = BytesMut::from(first);
        while let Some(more) = self.fill() {
            all.put_slice(&more);
        }
        all.freeze()
    }
}

impl http_body::Body for ListBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        loop {
            let Some(chunk) = this.fill() else {
                let Some(packer) = this.packer.take() else { return Poll::Ready(None) };
                return Poll::Ready(match packer.finish() {
                    Ok(rest) if rest.is_empty() => None,
                    Ok(rest) => Some(Ok(Frame::data(rest.into()))),
                    Err(error) => Some(Err(error.into())),
                });
            };
            let Some(packer) = &mut this.packer else {
                this.left = this.left.map(|left| left.saturating_sub(chunk.len() as u64));
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            };
            if let Err(error) = packer.write_all(&chunk) {
                return Poll::Ready(Some(Err(error.into())));
            }
            let packed = std::mem::replace(packer.get_mut(), Vec::with_capacity(CHUNK));
            if !packed.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(packed.into()))));
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self.left {
            Some(left) if self.packer.is_none() => SizeHint::with_exact(left),
            _ => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Identity;
    use crate::storage::object;

    fn objects(count: usize) -> Vec<Arc<StoredObject>> {
        let one = |n| {
            let value = json!({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": format!("m{n}")},
                "data": {"text": "a: b\n- \"c\"\n", "empty": ""}});
            Arc::new(StoredObject::new(Identity::default(), &object::encode(&value), 7, true))
        };
        (0..count).map(one).collect()
    }

    fn written(count: usize, encoding: Encoding) -> String {
        let frame = json!({"kind": "ConfigMapList", "apiVersion": "v1", "metadata": {"resourceVersion": "9"}});
        let form = Form::Made { make: Box::new(StoredObject::value), encoding };
        let items = Items { objects: objects(count), form };
        let head = Some(head(&frame, "items", encoding));
        let mut body = ListBody { head, items, next: 0, ended: false, left: None, packer: None };
        String::from_utf8(body.all().to_vec()).unwrap()
    }

    #[test]
    fn a_list_made_piece_by_piece_reads_as_one() {
        for count in [0, 1, 3] {
            let items: Vec<Value> = objects(count).iter().map(|object| object.value()).collect();
            let whole = json!({"kind": "ConfigMapList", "apiVersion": "v1", "metadata": {"resourceVersion": "9"}, "items": items});
            for encoding in [Encoding::Json, Encoding::JsonPretty, Encoding::Yaml] {
                let text = written(count, encoding);
                let read = match encoding {
                    Encoding::Yaml => apimachinery::yaml::documents(&text).unwrap().remove(0),
                    _ => serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")),
                };
                assert_eq!(read, whole, "{encoding:?}: {text}");
            }
        }
        assert!(written(1, Encoding::JsonPretty).contains("\n    {\n      \"apiVersion\""));
    }
}
