//! A watch of one kind that goes on: what is there already comes one by one, then what changes; a watch that has ended is
//! resumed, and one that cannot be begun anew. The loop knows objects as text; what decodes them is the [`Sink`], so that
//! there is one loop in a program, whatever it watches.
use crate::{backoff::Backoff, client::refusal};
use bytes::{Buf as _, Bytes, BytesMut};
use http_body_util::BodyExt as _;
use kube::{Client, Error, api::WatchParams, client::Body, core::Status};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::{borrow::Cow, collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, warn};

/// The server ends a watch after this.
const LENGTH_SECONDS: u32 = 290;
/// Nothing was heard for so long, not even that end: the connection is dead.
const SILENCE: Duration = Duration::from_secs(295);
/// A watch that ends sooner, and brought nothing, counts as failed: it is not begun again at once.
const SHORT: Duration = Duration::from_secs(1);
/// No object's text is nearly as long.
const LINE_MAX: usize = 64 << 20;
const RETRY_BASE: Duration = Duration::from_millis(200);
const RETRY_CAP: Duration = Duration::from_secs(5);
/// Failures in a row after which they are the operator's business.
const WARN_AFTER: u32 = 3;
/// The annotation of the bookmark after what was there.
const ALL_SENT: &str = "k8s.io/initial-events-end";
/// Of a body that says why the server refused.
const EXPIRED: u16 = 410;

/// An object's `resourceVersion`, if the text could be read.
pub type Version = serde_json::Result<Option<String>>;

/// Who takes what a watch brings. Calls come one after the other; objects are JSON text.
pub trait Sink: Send + Sync {
    /// All that is there comes now, whatever came before.
    fn begin(&self);

    /// An object as it is now; `listed`: one of those that were there.
    fn set(&self, object: &[u8], listed: bool) -> Version;

    /// An object as it was when it was deleted.
    fn delete(&self, object: &[u8]) -> Version;

    /// All that was there has come.
    fn listed(&self);

    /// The watch failed, and is tried again.
    fn failed(&self, _: &Error) {}

    /// Nothing more is wanted.
    fn is_done(&self) -> bool {
        false
    }
}

/// Follows the objects at a path of the API (a kind's, or a kind's in a namespace) until the sink wants no more.
pub async fn follow(client: Client, path: String, selection: WatchParams, sink: Arc<dyn Sink>) {
    let mut watch = Watch { client, path, selection, version: None, listing: false };
    let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
    while !sink.is_done() {
        let begun = Instant::now();
        match watch.run(&*sink).await {
            Ok(events) if events > 0 || begun.elapsed() > SHORT => backoff.reset(),
            outcome => {
                let wait = backoff.next_wait();
                let retry_ms = wait.as_millis() as u64;
                let error = outcome.err().map_or_else(|| "the server ended it at once".to_owned(), |e| e.to_string());
                if backoff.failures() > WARN_AFTER {
                    warn!(watch.path, error, retry_ms, "watch failed");
                } else {
                    debug!(watch.path, error, retry_ms, "watch failed");
                }
                sleep(wait).await;
            }
        }
    }
}

struct Watch {
    client: Client,
    path: String,
    selection: WatchParams,
    /// Where to resume; None begins anew.
    version: Option<String>,
    /// What is there already is still coming.
    listing: bool,
}

/// One line of a watch.
#[derive(Deserialize)]
struct Event<'t> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'t, str>,
    #[serde(borrow)]
    object: &'t RawValue,
}

/// What is read of a bookmark.
#[derive(Deserialize)]
struct Bookmark {
    metadata: BookmarkMeta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct BookmarkMeta {
    resource_version: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// Lines of a text that comes in pieces.
#[derive(Default)]
struct Lines {
    piece: Bytes,
    /// The beginning of a line whose end is to come.
    begun: BytesMut,
}

// === impl Watch ===

impl Watch {
    /// One request, until it ends: how many events it brought. What fails is told to the sink as well.
    async fn run(&mut self, sink: &dyn Sink) -> Result<usize, Error> {
        let mut events = 0;
        let outcome = self.request(sink, &mut events).await;
        if let Err(error) = &outcome {
            if matches!(error, Error::Api(status) if status.code == EXPIRED) {
                self.version = None;
            }
            sink.failed(error);
        }
        outcome.map(|()| events)
    }

    async fn request(&mut self, sink: &dyn Sink, events: &mut usize) -> Result<(), Error> {
        let mut body = self.begin().await?;
        self.listing = self.version.is_none();
        if self.listing {
            sink.begin();
        }
        let mut lines = Lines::default();
        // Silence ends a watch as the server's own end does.
        while let Ok(Some(frame)) = timeout(SILENCE, body.frame()).await {
            lines.add(frame?.into_data().unwrap_or_default());
            while let Some(line) = lines.next() {
                *events += 1;
                self.read(&line, sink)?;
                if sink.is_done() {
                    return Ok(());
                }
            }
            if lines.begun.len() > LINE_MAX {
                return Err(Error::LinesCodecMaxLineLengthExceeded);
            }
        }
        Ok(())
    }

    async fn begin(&self) -> Result<Body, Error> {
        let parameters = WatchParams {
            timeout: Some(LENGTH_SECONDS),
            bookmarks: true,
            send_initial_events: self.version.is_none(),
            ..self.selection.clone()
        };
        // To begin with, what is a little old is good enough: the watch catches up.
        let version = self.version.as_deref().unwrap_or("0");
        let request = kube::core::Request::new(self.path.as_str()).watch(&parameters, version);
        let answer = self.client.send(request.map_err(Error::BuildRequest)?.map(Body::from)).await?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer.into_body());
        }
        let text = answer.into_body().collect_bytes().await?;
        Err(refusal(status, &text))
    }

    fn read(&mut self, line: &[u8], sink: &dyn Sink) -> Result<(), Error> {
        let (kind, object) = split(line).map_err(Error::SerdeError)?;
        let version = match &*kind {
            "ADDED" | "MODIFIED" => sink.set(object, self.listing),
            "DELETED" => sink.delete(object),
            "BOOKMARK" => {
                let Bookmark { metadata } = serde_json::from_slice(object).map_err(Error::SerdeError)?;
                if self.listing && metadata.annotations.contains_key(ALL_SENT) {
                    self.listing = false;
                    sink.listed();
                }
                Ok(Some(metadata.resource_version))
            }
            _ => {
                return Err(
                    serde_json::from_slice::<Status>(object).map_or_else(Error::SerdeError, |s| Error::Api(s.boxed()))
                );
            }
        };
        let version = version.map_err(Error::SerdeError)?;
        // What was there comes in no order: its versions say nothing of where to resume.
        if !self.listing && version.is_some() {
            self.version = version;
        }
        Ok(())
    }
}

/// The type and the object of a line. Servers write it in one way, so that it need not be read to be taken apart.
fn split(line: &[u8]) -> serde_json::Result<(Cow<'_, str>, &[u8])> {
    const KINDS: [&str; 4] = ["ADDED", "MODIFIED", "DELETED", "BOOKMARK"];
    let rest = line.strip_prefix(br#"{"type":""#).and_then(|rest| rest.strip_suffix(b"}"));
    for kind in KINDS {
        let rest = rest.and_then(|rest| rest.strip_prefix(kind.as_bytes()));
        if let Some(object) = rest.and_then(|rest| rest.strip_prefix(br#"","object":"#)) {
            return Ok((kind.into(), object));
        }
    }
    let Event { kind, object } = serde_json::from_slice(line)?;
    Ok((kind, object.get().as_bytes()))
}

// === impl Lines ===

impl Lines {
    /// To be called once [`Lines::next`] has no more.
    fn add(&mut self, piece: Bytes) {
        self.begun.extend_from_slice(&self.piece);
        self.piece = piece;
    }

    fn next(&mut self) -> Option<Bytes> {
        let end = memchr::memchr(b'\n', &self.piece)?;
        let mut line = self.piece.split_to(end);
        self.piece.advance(1);
        if !self.begun.is_empty() {
            self.begun.extend_from_slice(&line);
            line = self.begun.split().freeze();
        }
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use serde_json::{Value, json};

    #[test]
    fn lines_are_put_together() {
        let mut lines = Lines::default();
        let mut got = Vec::new();
        for piece in ["a", "b\nc", "d", "\n", "\nwhole\nrest", "ed\n"] {
            lines.add(Bytes::from_static(piece.as_bytes()));
            got.extend(std::iter::from_fn(|| lines.next()));
        }
        assert_eq!(got, ["ab", "cd", "", "whole", "rested"].map(|l| Bytes::from_static(l.as_bytes())));
    }

    #[test]
    fn a_line_is_taken_apart_however_it_is_written() {
        for line in [r#"{"type":"ADDED","object":{"a":1}}"#, r#"{ "object":{"a":1}, "type":"ADD\u0045D" }"#] {
            let (kind, object) = split(line.as_bytes()).unwrap();
            assert_eq!((&*kind, object), ("ADDED", &br#"{"a":1}"#[..]));
        }
        assert!(split(b"{\"type\":\"ADDED\"}").is_err());
    }

    fn object(name: &str, version: u32) -> Value {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "resourceVersion": version.to_string()}})
    }

    fn event(kind: &str, object: Value) -> String {
        format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
    }

    fn bookmark(version: u32, annotations: Value) -> String {
        let metadata = json!({"resourceVersion": version.to_string(), "annotations": annotations});
        event("BOOKMARK", json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}))
    }

    /// Writes down what comes.
    #[derive(Default)]
    struct Log(Mutex<Vec<String>>);

    impl Log {
        fn add(&self, what: &str, object: &[u8]) -> Version {
            let object: Value = serde_json::from_slice(object)?;
            self.0.lock().push(format!("{what} {}", object["metadata"]["name"].as_str().unwrap()));
            Ok(object["metadata"]["resourceVersion"].as_str().map(str::to_owned))
        }
    }

    impl Sink for Log {
        fn begin(&self) {
            self.0.lock().push("begin".into());
        }

        fn set(&self, object: &[u8], listed: bool) -> Version {
            self.add(if listed { "listed" } else { "set" }, object)
        }

        fn delete(&self, object: &[u8]) -> Version {
            self.add("delete", object)
        }

        fn listed(&self) {
            self.0.lock().push("all".into());
        }

        fn failed(&self, error: &Error) {
            let Error::Api(status) = error else { return self.0.lock().push("end".into()) };
            self.0.lock().push(status.code.to_string());
        }

        fn is_done(&self) -> bool {
            self.0.lock().last().is_some_and(|last| last == "end")
        }
    }

    #[tokio::test]
    async fn a_watch_goes_on_where_it_was_and_begins_anew_where_it_must() {
        let expired = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "message": "old"});
        let answers = [
            event("ADDED", object("half", 1)),
            event("ADDED", object("a", 1))
                + &bookmark(7, json!({ALL_SENT: "true"}))
                + &event("MODIFIED", object("a", 8))
                + &event("DELETED", object("a", 9)),
            bookmark(10, json!({})),
            event("ERROR", expired),
            bookmark(20, json!({ALL_SENT: "true"})),
        ];
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let (queries, mut answers) = (asked.clone(), answers.into_iter());
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let query = url::form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes());
            queries.lock().extend(query.filter(|(key, _)| key == "resourceVersion").map(|(_, v)| v.into_owned()));
            let body = answers.next().map(|text| Body::from(text.into_bytes()));
            async move { body.map(http::Response::new).ok_or("no more") }
        });
        let log = Arc::new(Log::default());
        let client = Client::new(service, "default");
        follow(client, "/api/v1/configmaps".into(), WatchParams::default(), log.clone()).await;
        let expected =
            ["begin", "listed half", "begin", "listed a", "all", "set a", "delete a", "410", "begin", "all", "end"];
        assert_eq!(*log.0.lock(), expected);
        assert_eq!(*asked.lock(), ["0", "0", "9", "10", "0", "20"]);
    }
}
