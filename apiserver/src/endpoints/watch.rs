//! Watches: a stream of frames, most of them shared with every other watcher of the object.

use super::list::Selectors;
use super::{Outcome, Payload, ResourceRequest, get, table};
use crate::registry::Resource;
use crate::server::body::{Body, BoxError};
use crate::server::negotiation::{Encoding, Shape, Wanted};
use crate::server::respond;
use crate::storage::cache::{Event, Scope, Snapshot, Subscription, in_namespace};
use crate::storage::{Store, StoredObject};
use apimachinery::status::StatusError;
use bytes::Bytes;
use http_body::Frame;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Watchers that asked for bookmarks get one this often, and one before their time is over.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
const BOOKMARK_BEFORE_END: Duration = Duration::from_secs(2);
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// Opens a watch.
pub async fn watch(
    request: &ResourceRequest<'_>,
    wanted: Wanted,
    include: table::Include,
    shutdown: &CancellationToken,
) -> Result<Outcome, StatusError> {
    let (query, resource, store) = (&request.info.query, request.resource, &request.context.store);
    let wanted = wanted.streamed()?;
    let mut selectors = Selectors::of(request)?;
    if !request.info.name.is_empty() {
        // /api/v1/watch/…/pods/x
        selectors.fields = apimachinery::fields::FieldSelector::parse(&format!("metadata.name={}", request.info.name))
            .map_err(|error| StatusError::bad_request(error.to_string()))?;
    }
    let timeout = match query.get("timeoutSeconds") {
        "" => default_timeout(request.context.options.min_request_timeout),
        text => match text.parse::<u64>() {
            Ok(0) => default_timeout(request.context.options.min_request_timeout),
            Ok(seconds) => Duration::from_secs(seconds),
            Err(_) => return Err(StatusError::bad_request(format!("invalid timeoutSeconds: {text:?}"))),
        },
    };
    let scope = Scope {
        namespace: request.namespace().to_owned(),
        name: selectors.fields.required_value("metadata.name").map(ToOwned::to_owned),
        node_name: selectors.fields.required_value("spec.nodeName").map(ToOwned::to_owned),
    };
    let bookmarks = query.flag("allowWatchBookmarks");
    let cache = store.cache(resource)?;
    let deadline = Instant::now() + timeout;
    let mut stream = WatchStream {
        render: Render { resource: resource.clone(), wanted, include, selectors, columns_sent: false },
        store: store.clone(),
        ready: VecDeque::new(),
        initial: Vec::new().into_iter(),
        initial_end: None,
        subscription: None,
        after: 0,
        bookmark: bookmarks.then(|| Box::pin(sleep_until(next_bookmark(deadline)))),
        deadline,
        end: Box::pin(sleep_until(deadline)),
        shutdown: Box::pin(shutdown.clone().cancelled_owned()),
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
        Plan::Initial { bookmark_at_end, reached } => {
            let (snapshot, subscription) = cache.snapshot_and_subscribe(&scope);
            stream.begin_with(&snapshot, subscription, &scope, reached, bookmark_at_end && bookmarks);
        }
    }
    let mut response = respond::plain(200, wanted.stream_type(), Body::boxed(stream));
    response.headers_mut().remove(http::header::CONTENT_LENGTH);
    Ok(Outcome { code: 200, payload: Payload::Response(response), warnings: Vec::new() })
}

/// How a watch begins.
enum Plan {
    /// With what came after a revision.
    From(i64),
    /// With everything there is, as ADDED; then, if so asked, a bookmark that says that this was it.
    Initial { bookmark_at_end: bool, reached: i64 },
}

async fn plan(request: &ResourceRequest<'_>) -> Result<Plan, StatusError> {
    let (query, store) = (&request.info.query, &request.context.store);
    let version = query.get("resourceVersion");
    let version_match = query.get("resourceVersionMatch");
    let initial_events = match query.get("sendInitialEvents") {
        "" if !query.has("sendInitialEvents") => None,
        _ => Some(query.flag("sendInitialEvents")),
    };
    match (initial_events, version_match) {
        (Some(_), "NotOlderThan") | (None, "") => {}
        (Some(_), _) => {
            return Err(StatusError::bad_request(
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        (None, _) => {
            return Err(StatusError::bad_request(
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
    }
    Ok(match (initial_events, version) {
        (Some(true), "") => Plan::Initial { bookmark_at_end: true, reached: store.wait_for(None).await? },
        (Some(true), "0") => Plan::Initial { bookmark_at_end: true, reached: store.progress() },
        (Some(true), text) => {
            let reached = store.wait_for(Some(get::parse_version(text)?)).await?;
            Plan::Initial { bookmark_at_end: true, reached }
        }
        (Some(false), "" | "0") => Plan::From(store.wait_for(None).await?),
        (None, "") => Plan::Initial { bookmark_at_end: false, reached: store.wait_for(None).await? },
        (None, "0") => Plan::Initial { bookmark_at_end: false, reached: store.progress() },
        (_, text) => Plan::From(get::parse_version(text)?),
    })
}

fn default_timeout(min_seconds: u64) -> Duration {
    Duration::from_secs_f64(min_seconds as f64 * (1.0 + rand::random::<f64>()))
}

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
    /// The revision of the bookmark that ends the initial events.
    initial_end: Option<i64>,
    subscription: Option<Subscription>,
    /// Events up to here are not for this watcher.
    after: i64,
    bookmark: Option<Pin<Box<Sleep>>>,
    deadline: Instant,
    end: Pin<Box<Sleep>>,
    shutdown: Pin<Box<WaitForCancellationFutureOwned>>,
    ended: bool,
}

/// Makes frames of events.
struct Render {
    resource: Arc<Resource>,
    wanted: Wanted,
    include: table::Include,
    selectors: Selectors,
    columns_sent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Added,
    Modified,
    Deleted,
}

// === impl WatchStream ===

impl WatchStream {
    fn begin_with(
        &mut self,
        snapshot: &Snapshot,
        subscription: Subscription,
        scope: &Scope,
        reached: i64,
        bookmark_at_end: bool,
    ) {
        let selected: Vec<_> = match &scope.name {
            Some(name) if !scope.namespace.is_empty() || !self.render.resource.namespaced => {
                let key = crate::storage::keys::object_key(&scope.namespace, name);
                snapshot.objects.get(key.as_str()).cloned().into_iter().collect()
            }
            _ => in_namespace(&snapshot.objects, &scope.namespace).map(|(_, object)| object.clone()).collect(),
        };
        let matching: Vec<_> = selected.into_iter().filter(|o| self.render.selectors.match_object(o)).collect();
        self.initial = matching.into_iter();
        self.after = snapshot.revision;
        self.initial_end = bookmark_at_end.then_some(snapshot.revision.max(reached));
        self.subscription = Some(subscription);
    }

    /// The next frame that needs no waiting; None if there is nothing (left).
    fn next_ready(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Some(frame);
            }
            if let Some(object) = self.initial.next() {
                return Some(self.render.frame(Kind::Added, &object, object.revision));
            }
            if let Some(revision) = self.initial_end.take() {
                return Some(self.render.bookmark(revision, true));
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
            if self.ended || self.end.as_mut().poll(cx).is_ready() || self.shutdown.as_mut().poll(cx).is_ready() {
                return Poll::Ready(None);
            }
            // What is in the caches before the queue is looked at has been put into the queue.
            let progress = self.store.progress();
            let Some(subscription) = &mut self.subscription else { return Poll::Ready(None) };
            match subscription.queue.poll_recv(cx) {
                Poll::Ready(Some(event)) => {
                    if event.revision > self.after
                        && let Some(frame) = self.render.event(&event)
                    {
                        return Poll::Ready(Some(frame));
                    }
                    continue;
                }
                // Dropped: it did not keep up, or history was lost. The client resumes, or lists anew.
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => {}
            }
            let Some(timer) = &mut self.bookmark else { return Poll::Pending };
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            timer.as_mut().reset(next_bookmark(self.deadline));
            let revision = progress.max(self.after);
            self.ready.push_back(self.render.bookmark(revision, false));
        }
    }
}

impl http_body::Body for WatchStream {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.get_mut().poll_next(cx).map(|bytes| bytes.map(|b| Ok(Frame::data(b))))
    }
}

// === impl Render ===

impl Render {
    /// The frame that an event is for this watcher, if it is any: an object that begins to match has been added, one that
    /// ceases to match has been deleted.
    fn event(&mut self, event: &Event) -> Option<Bytes> {
        let matches =
            |object: &Option<Arc<StoredObject>>| object.as_ref().filter(|o| self.selectors.match_object(o)).cloned();
        match (matches(&event.previous), matches(&event.object)) {
            (None, Some(new)) => Some(self.frame(Kind::Added, &new, event.revision)),
            (Some(_), Some(new)) => Some(self.frame(Kind::Modified, &new, event.revision)),
            (Some(old), None) => Some(self.frame(Kind::Deleted, &old, event.revision)),
            (None, None) => None,
        }
    }

    fn frame(&mut self, kind: Kind, object: &StoredObject, revision: i64) -> Bytes {
        let shared = self.wanted.shape == Shape::AsIs && !self.resource.strategy.converts();
        if shared && self.wanted.encoding == Encoding::Protobuf {
            // What a deleted object says is its own: another revision.
            if let Some(frame) = (kind != Kind::Deleted).then(|| object.protobuf_frame(kind == Kind::Added)).flatten() {
                return frame;
            }
        } else if shared {
            return match kind {
                Kind::Added => object.frame(true),
                Kind::Modified => object.frame(false),
                Kind::Deleted => object.deleted_frame(revision),
            };
        }
        let mut value = self.resource.value(object);
        if kind == Kind::Deleted {
            super::metadata::of(&mut value).insert("resourceVersion".to_owned(), revision.to_string().into());
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
    fn bookmark(&mut self, revision: i64, initial_events_end: bool) -> Bytes {
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
