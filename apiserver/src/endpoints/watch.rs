//! Watches: a stream of frames, most of them shared with every other watcher of the object.

use super::list::{KNOWN_MATCHES, MATCH, Selectors, invalid_options};
use super::{Outcome, Payload, ResourceRequest, get, table};
use crate::registry::Resource;
use crate::server::body::{Body, BoxError, Pieces};
use crate::server::negotiation::{Encoding, Shape, Wanted};
use crate::server::request_info::Query;
use crate::server::respond;
use crate::storage::cache::{Event, Scope, Snapshot, Subscription, in_namespace};
use crate::storage::{Store, StoredObject};
use apimachinery::status::{FieldError, StatusError};
use bytes::{Buf as _, Bytes};
use http_body::Frame;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep_until};

/// Watchers that asked for bookmarks get one this often, and one before their time is over.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
const BOOKMARK_BEFORE_END: Duration = Duration::from_secs(2);
/// How often a watch looks whether the revision has come that its initial events shall not be older than.
const INITIAL_END_INTERVAL: Duration = Duration::from_millis(100);
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";
/// Frames that are ready together are sent together, up to about this size.
const BATCH: usize = 64 * 1024;

/// Opens a watch.
pub async fn watch(
    request: &ResourceRequest<'_>,
    wanted: Wanted,
    include: table::Include,
) -> Result<Outcome, StatusError> {
    let (query, resource, store) = (&request.info.query, request.resource, &request.context.store);
    let wanted = wanted.streamed()?;
    check_options(query)?;
    let mut selectors = Selectors::of(request)?;
    if !request.info.name.is_empty() {
        // /api/v1/watch/…/pods/x
        selectors.fields = apimachinery::fields::FieldSelector::parse(&format!("metadata.name={}", request.info.name))
            .map_err(|error| StatusError::bad_request(error.to_string()))?;
    }
    let timeout = match query.get("timeoutSeconds") {
        "" | "0" => default_timeout(request.context.options.min_request_timeout),
        text => Duration::from_secs(
            text.parse()
                .map_err(|_| StatusError::bad_request(format!("strconv.ParseInt: parsing {text:?}: invalid syntax")))?,
        ),
    };
    let scope = Scope {
        namespace: request.namespace().to_owned(),
        name: selectors.fields.required_value("metadata.name").map(ToOwned::to_owned),
        node_name: selectors.fields.required_value("spec.nodeName").map(ToOwned::to_owned),
    };
    let cache = store.cache(resource)?;
    let deadline = Instant::now() + timeout;
    let mut stream = WatchStream {
        render: Render {
            resource: resource.clone(),
            wanted,
            include,
            selectors,
            columns_sent: false,
            ending_initial: false,
        },
        store: store.clone(),
        ready: VecDeque::new(),
        initial: Vec::new().into_iter(),
        initial_end: None,
        subscription: None,
        after: 0,
        bookmarks: query.flag("allowWatchBookmarks"),
        due: None,
        deadline,
        timer: Box::pin(sleep_until(deadline)),
        ended: false,
    };
    match plan(request).await? {
        Plan::From(revision) => match cache.subscribe(revision, &scope) {
            Ok(subscription) => {
                stream.after = revision;
                stream.subscription = Some(subscription);
            }
            Err(too_old) => {
                let oldest = too_old.oldest;
                let error = StatusError::expired(format!("too old resource version: {revision} ({oldest})"));
                stream.ready.push_back(stream.render.error(&error));
                stream.ended = true;
            }
        },
        Plan::Initial { end_at } => {
            // What is in the caches by now is in the snapshot.
            let progress = store.progress();
            let (snapshot, subscription) = cache.snapshot_and_subscribe(&scope);
            stream.after = snapshot.revision.max(progress);
            stream.begin_with(&snapshot, subscription, &scope);
            stream.initial_end = end_at.filter(|_| stream.bookmarks);
        }
    }
    stream.set_timer();
    let mut response = respond::plain(200, wanted.stream_type(), Body::boxed(stream));
    response.headers_mut().remove(http::header::CONTENT_LENGTH);
    Ok(Outcome { code: 200, payload: Payload::Response(response), warnings: Vec::new() })
}

/// How a watch begins.
enum Plan {
    /// With what came after a revision.
    From(i64),
    /// With everything there is, as ADDED; then, if so asked, once all up to a revision has been sent, a bookmark that says
    /// that this was it.
    Initial { end_at: Option<i64> },
}

/// Which options go together. As `validateWatchOptions`.
fn check_options(query: &Query) -> Result<(), StatusError> {
    let mut errors = Vec::new();
    let version_match = query.get(MATCH);
    let initial_events = query.has("sendInitialEvents");
    let mut forbid = |why: &str| errors.push(FieldError::forbidden(MATCH, why));
    if initial_events && version_match != "NotOlderThan" {
        forbid("sendInitialEvents requires setting resourceVersionMatch to NotOlderThan");
    }
    if !version_match.is_empty() && !initial_events {
        forbid("resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided");
    }
    if !version_match.is_empty() && !query.get("continue").is_empty() {
        forbid("resourceVersionMatch is forbidden when continue is provided");
    }
    if !KNOWN_MATCHES.contains(&version_match) {
        errors.push(FieldError::not_supported(MATCH, version_match, &KNOWN_MATCHES));
    }
    if errors.is_empty() { Ok(()) } else { Err(invalid_options(&errors)) }
}

async fn plan(request: &ResourceRequest<'_>) -> Result<Plan, StatusError> {
    let (query, store) = (&request.info.query, &request.context.store);
    let initial_events = query.has("sendInitialEvents").then(|| query.flag("sendInitialEvents"));
    let version = match query.get("resourceVersion") {
        "" => None,
        text => Some(get::parse_version(text)?),
    };
    Ok(match (initial_events, version) {
        (Some(true), None) => Plan::Initial { end_at: Some(store.wait_for(None).await?) },
        (Some(true), Some(version)) => Plan::Initial { end_at: Some(version) },
        (Some(false), None | Some(0)) => Plan::From(store.wait_for(None).await?),
        (None, None) => {
            store.wait_for(None).await?;
            Plan::Initial { end_at: None }
        }
        (None, Some(0)) => Plan::Initial { end_at: None },
        (_, Some(version)) => Plan::From(version),
    })
}

fn default_timeout(min_seconds: u64) -> Duration {
    Duration::from_secs_f64(min_seconds as f64 * (1.0 + rand::random::<f64>()))
}

/// When the next bookmark is due.
fn next_bookmark(deadline: Instant) -> Instant {
    let regular = Instant::now() + BOOKMARK_INTERVAL;
    let last = deadline.checked_sub(BOOKMARK_BEFORE_END).unwrap_or(deadline);
    if last > Instant::now() { regular.min(last) } else { regular }
}

/// The body of a watch. It lives in the connection's task; there is no task of its own.
struct WatchStream {
    render: Render,
    store: Arc<Store>,
    ready: VecDeque<Bytes>,
    initial: std::vec::IntoIter<Arc<StoredObject>>,
    /// What is sent has to reach this revision before the bookmark that ends the initial events.
    initial_end: Option<i64>,
    /// None once it is over.
    subscription: Option<Subscription>,
    /// Events up to here are not for this watcher.
    after: i64,
    bookmarks: bool,
    /// A bookmark with this revision is to be sent as soon as the queue is empty: when it was found, all that lies before
    /// was in the queue.
    due: Option<i64>,
    deadline: Instant,
    /// For the next bookmark, or the end.
    timer: Pin<Box<Sleep>>,
    ended: bool,
}

/// Makes frames of events.
struct Render {
    resource: Arc<Resource>,
    wanted: Wanted,
    include: table::Include,
    selectors: Selectors,
    columns_sent: bool,
    /// The next bookmark is the one that ends the initial events.
    ending_initial: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Added,
    Modified,
    Deleted,
}

// === impl WatchStream ===

impl WatchStream {
    fn begin_with(&mut self, snapshot: &Snapshot, subscription: Subscription, scope: &Scope) {
        let selected: Vec<_> = match &scope.name {
            Some(name) if !scope.namespace.is_empty() || !self.render.resource.namespaced => {
                let key = crate::storage::keys::object_key(&scope.namespace, name);
                snapshot.objects.get(key.as_str()).cloned().into_iter().collect()
            }
            _ => in_namespace(&snapshot.objects, &scope.namespace).map(|(_, object)| object.clone()).collect(),
        };
        let matching: Vec<_> = selected.into_iter().filter(|o| self.render.selectors.match_object(o)).collect();
        self.initial = matching.into_iter();
        self.subscription = Some(subscription);
    }

    fn set_timer(&mut self) {
        let next = match self.initial_end {
            Some(_) => Instant::now() + INITIAL_END_INTERVAL,
            None if self.bookmarks => next_bookmark(self.deadline),
            None => self.deadline,
        };
        self.timer.as_mut().reset(next.min(self.deadline));
    }

    /// The next frame that needs no waiting; None if there is nothing (left).
    fn next_ready(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Some(frame);
            }
            if let Some(object) = self.initial.next() {
                return Some(self.render.frame(Kind::Added, &object, None));
            }
            if let Some(revision) = self.initial_end
                && revision <= self.after.max(self.store.progress())
            {
                self.initial_end = None;
                self.render.ending_initial = true;
                self.set_timer();
                if revision <= self.after {
                    return Some(self.render.bookmark(self.after));
                }
                // All up to there is in the queue.
                self.due = Some(revision);
            }
            let event = self.subscription.as_mut()?.backlog.pop_front()?;
            if let Some(frame) = self.render.event(&event) {
                return Some(frame);
            }
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            if let Some(frame) = self.next_ready() {
                return Poll::Ready(Some(frame));
            }
            // Dropped: it did not keep up, or history was lost, or the server stops. The client resumes, or lists anew.
            let (false, Some(subscription)) = (self.ended, &mut self.subscription) else { return Poll::Ready(None) };
            match subscription.queue.poll_recv(cx) {
                Poll::Ready(Some(event)) => {
                    if event.revision > self.after
                        && let Some(frame) = self.render.event(&event)
                    {
                        return Poll::Ready(Some(frame));
                    }
                    continue;
                }
                Poll::Ready(None) => {
                    self.ended = true;
                    return Poll::Ready(None);
                }
                Poll::Pending => {}
            }
            if let Some(revision) = self.due.take() {
                let frame = self.render.bookmark(revision.max(self.after));
                return Poll::Ready(Some(frame));
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= self.deadline {
                self.ended = true;
                return Poll::Ready(None);
            }
            if self.initial_end.is_none() && self.bookmarks {
                self.due = Some(self.store.progress());
            }
            self.set_timer();
        }
    }

    /// All frames that are ready, up to a size: what is sent costs by the piece as well.
    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<Option<Pieces>> {
        let Some(first) = std::task::ready!(self.poll_next(cx)) else { return Poll::Ready(None) };
        let mut batch = Pieces::from(first);
        while batch.remaining() < BATCH {
            let Poll::Ready(Some(next)) = self.poll_next(cx) else { break };
            batch.push(next);
        }
        Poll::Ready(Some(batch))
    }
}

impl http_body::Body for WatchStream {
    type Data = Pieces;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Pieces>, BoxError>>> {
        self.get_mut().poll_batch(cx).map(|bytes| bytes.map(|b| Ok(Frame::data(b))))
    }
}

// === impl Render ===

impl Render {
    /// The frame that an event is for this watcher, if it is any: an object that begins to match has been added, one that
    /// ceases to match has been deleted.
    fn event(&mut self, event: &Event) -> Option<Bytes> {
        let matching =
            |object: &'_ Option<Arc<StoredObject>>| object.as_ref().is_some_and(|o| self.selectors.match_object(o));
        let (before, after) = (matching(&event.previous), matching(&event.object));
        match (before, after, &event.previous, &event.object) {
            (false, true, _, Some(new)) => Some(self.frame(Kind::Added, new, None)),
            (true, true, _, Some(new)) => Some(self.frame(Kind::Modified, new, None)),
            (true, false, Some(old), _) => Some(self.frame(Kind::Deleted, old, Some(event))),
            _ => None,
        }
    }

    /// `gone` is the event by which the object is gone for this watcher.
    fn frame(&mut self, kind: Kind, object: &StoredObject, gone: Option<&Event>) -> Bytes {
        let shared = self.wanted.shape == Shape::AsIs && !self.resource.strategy.converts();
        if shared && self.wanted.encoding == Encoding::Protobuf {
            let frame = match gone {
                Some(event) => event.deleted_protobuf_frame(),
                None => object.protobuf_frame(kind == Kind::Added),
            };
            if let Some(frame) = frame {
                return frame;
            }
        } else if shared {
            return match gone {
                Some(event) => event.deleted_frame(),
                None => object.frame(kind == Kind::Added),
            };
        }
        let mut value = self.resource.value(object);
        if let Some(event) = gone {
            super::metadata::of(&mut value).insert("resourceVersion".to_owned(), event.revision.to_string().into());
        }
        let value = match self.wanted.shape {
            Shape::AsIs => value,
            Shape::Metadata | Shape::MetadataList => respond::metadata_only(self.wanted.meta_version, &value),
            Shape::Table => self.table(&value),
        };
        let kind = match kind {
            Kind::Added => "ADDED",
            Kind::Modified => "MODIFIED",
            Kind::Deleted => "DELETED",
        };
        respond::event(self.wanted, kind, &value)
    }

    fn table(&mut self, object: &Value) -> Value {
        let version = super::metadata::text(object, "resourceVersion");
        let with_columns = !std::mem::replace(&mut self.columns_sent, true);
        let metadata = json!({"resourceVersion": version});
        table::many(self.wanted, &self.resource, std::slice::from_ref(object), metadata, self.include, with_columns)
    }

    /// A bookmark: an object of the kind with nothing but a revision.
    fn bookmark(&mut self, revision: i64) -> Bytes {
        let initial_events_end = std::mem::take(&mut self.ending_initial);
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if initial_events_end {
            metadata["annotations"] = json!({ INITIAL_EVENTS_END: "true" });
        }
        let object = match self.wanted.shape {
            Shape::AsIs => json!({
                "kind": self.resource.kind, "apiVersion": self.resource.api_version, "metadata": metadata,
            }),
            Shape::Metadata | Shape::MetadataList => {
                json!({"kind": "PartialObjectMetadata", "apiVersion": self.wanted.meta_version, "metadata": metadata})
            }
            Shape::Table => {
                let row = json!({"cells": [], "object": {
                    "kind": "PartialObjectMetadata", "apiVersion": self.wanted.meta_version, "metadata": metadata,
                }});
                json!({
                    "kind": "Table", "apiVersion": self.wanted.meta_version,
                    "metadata": {"resourceVersion": revision.to_string()},
                    "columnDefinitions": [], "rows": [row],
                })
            }
        };
        respond::event(self.wanted, "BOOKMARK", &object)
    }

    fn error(&self, error: &StatusError) -> Bytes {
        respond::event(self.wanted, "ERROR", &serde_json::to_value(&error.0).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_do_not_go_together_are_refused() {
        for (query, ok) in [
            ("", true),
            ("resourceVersion=5", true),
            ("sendInitialEvents=true&resourceVersionMatch=NotOlderThan", true),
            ("sendInitialEvents=false&resourceVersionMatch=NotOlderThan&resourceVersion=5", true),
            ("sendInitialEvents=true", false),
            ("sendInitialEvents=true&resourceVersionMatch=Exact&resourceVersion=5", false),
            ("resourceVersionMatch=NotOlderThan&resourceVersion=5", false),
        ] {
            let result = check_options(&Query::parse(query)).map_err(|error| error.code());
            assert_eq!(result, if ok { Ok(()) } else { Err(422) }, "{query}");
        }
    }
}
