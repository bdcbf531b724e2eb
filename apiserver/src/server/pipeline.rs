//! The way of every request: what is it about, who asks, may they, is there room; then its endpoint; then the answer.

use super::body::Body;
use super::negotiation::{self, Wanted};
use super::request_info::RequestInfo;
use super::{Context, State, metrics, respond};
use crate::admission::{AdmissionRequest, Operation};
use crate::authentication::{self, UserInfo};
use crate::authorization::{Attributes, Decision, forbidden};
use crate::endpoints::virtual_resource::VirtualRequest;
use crate::endpoints::write_options::WriteOptions;
use crate::endpoints::{
    Outcome, Payload, ResourceRequest, create, delete, discovery, get, health, list, metadata, openapi, ownership,
    patch, table, update, virtual_resource, watch,
};
use crate::registry::strategy::Part;
use apimachinery::facts;
use apimachinery::status::StatusError;
use bytes::Bytes;
use futures::FutureExt as _;
use http::header::{HeaderName, HeaderValue};
use http::{Method, Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use serde_json::json;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bodies beyond this are refused. As kube-apiserver.
pub const BODY_BYTES_MAX: usize = 3 * 1024 * 1024;
/// So much of a body that is too big is read before it is refused.
const BODY_BYTES_DRAINED: usize = 32 * 1024 * 1024;
/// So long what is still sent with a request that was refused is let pass.
const REFUSED_BODY: Duration = Duration::from_secs(10);
/// How long a request waits for room among those in flight.
const ROOM_WAIT: Duration = Duration::from_secs(5);
/// Never refused for want of room, nor made to wait: who asks decides whether this process lives on.
const EXEMPT_PATHS: [&str; 3] = ["/healthz", "/livez", "/readyz"];
/// Its holders are never refused for want of room.
const SUPERUSERS: &str = "system:masters";
/// What `/` names beside discovery.
const OTHER_PATHS: [&str; 12] = [
    "/.well-known/openid-configuration",
    "/configz",
    "/healthz",
    "/healthz/etcd",
    "/livez",
    "/metrics",
    "/metrics/slis",
    "/openapi/v2",
    "/openapi/v3",
    "/openid/v1/jwks",
    "/readyz",
    "/version",
];
const AUDIT_ID: HeaderName = HeaderName::from_static("audit-id");

/// Answers one request, whatever happens.
pub async fn handle(context: Arc<Context>, request: Request<Incoming>) -> Response<Body> {
    let started = Instant::now();
    let (parts, body) = request.into_parts();
    let (request, mut body) = (Request::from_parts(parts, ()), Some(body));
    let uri = request.uri();
    let mut info = RequestInfo::parse(request.method(), uri.path(), uri.query().unwrap_or(""));
    if matches!(info.verb, "create" | "update" | "patch") {
        info.manager = ownership::manager_of(info.query.get("fieldManager"), request.headers());
    }
    let dry_run = info.query.has("dryRun");
    let client = metrics::system_client(request.headers());
    // Who asks may name the request.
    let named = request.headers().get(AUDIT_ID).filter(|id| !id.is_empty()).cloned();
    let wanted = Wanted::of(request.headers(), info.query.get("pretty"), has_table(&info));
    let error_form = *wanted.as_ref().unwrap_or(&Wanted::PLAIN);
    let result = {
        // In a box of its own: a watch goes on long after this has been answered.
        let answering = AssertUnwindSafe(Box::pin(answer(&context, &info, request, &mut body, wanted))).catch_unwind();
        match time_limit(&context, &info) {
            Err(error) => Ok(Err(error)),
            Ok(None) => answering.await,
            Ok(Some(limit)) => match tokio::time::timeout(limit, answering).await {
                Ok(result) => result,
                Err(_) => Ok(Err(StatusError::timeout("request did not complete within the allotted timeout"))),
            },
        }
    };
    // A stream that ends before all has been sent is an error to some clients, whatever was answered.
    if let Some(unread) = body.filter(|body| !body.is_end_stream()) {
        tokio::spawn(tokio::time::timeout(REFUSED_BODY, let_pass(unread)));
    }
    let mut response = match result {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => respond::status(&error, error_form),
        Err(_) => {
            tracing::error!(path = info.path, verb = info.verb, "a request handler panicked");
            respond::status(&StatusError::internal("the request could not be handled"), error_form)
        }
    };
    if let Some(id) = named.or_else(|| HeaderValue::try_from(metadata::new_uid()).ok()) {
        response.headers_mut().insert(AUDIT_ID, id);
    }
    let (code, took) = (response.status().as_u16(), started.elapsed());
    metrics::answered(&info, dry_run, client, &response, took);
    tracing::debug!(verb = info.verb, path = info.path, code, took_ms = took.as_millis() as u64, "answered");
    response
}

/// Can what is asked be had as a table? Reviews and the like cannot.
fn has_table(info: &RequestInfo) -> bool {
    let kind = facts::resource(&info.group, &info.version, &info.resource);
    kind.is_none_or(|kind| kind.is_stored() || kind.has_verb("list"))
}

/// How long a request may take: what `--request-timeout` allows, or less where the client says so. As `WithRequestDeadline`.
fn time_limit(context: &Context, info: &RequestInfo) -> Result<Option<Duration>, StatusError> {
    if info.is_long_running() {
        return Ok(None);
    }
    let limit = context.options.request_timeout;
    match info.query.get("timeout") {
        "" => Ok(Some(limit)),
        text => match apimachinery::time::parse_duration(text) {
            Ok(wanted) if wanted.is_zero() => Ok(Some(limit)),
            Ok(wanted) => Ok(Some(wanted.min(limit))),
            Err(error) => {
                Err(StatusError::bad_request(format!("invalid timeout specified in the request URL - {error}")))
            }
        },
    }
}

async fn answer(
    context: &Arc<Context>,
    info: &RequestInfo,
    request: Request<()>,
    body: &mut Option<Incoming>,
    wanted: Result<Wanted, StatusError>,
) -> Result<Response<Body>, StatusError> {
    if context.store.progress() == 0 {
        // Nothing can be known of users and rights before the store has been read.
        return health::document(context, &info.path, &info.query)
            .ok_or_else(|| StatusError::service_unavailable("the apiserver is starting").retry_after(1));
    }
    let (parts, ()) = request.into_parts();
    let user = context.authenticator.authenticate(&parts)?;
    let user = Arc::new(user);
    let (user, attributes) = authorize(context, info, user, &parts.headers).await?;
    let (_permit, counted) = room(context, info, &user).await?;
    if !info.is_resource {
        return document(context, info, &parts.method, &parts.headers, wanted);
    }
    let request = Request::from_parts(parts, ());
    let Rendered { wanted, include, outcome } =
        resource(context, info, user, attributes, request, body, wanted).await?;
    let mut response = respond::outcome(wanted, include, outcome);
    if let Some(warning) = metrics::deprecation(info) {
        respond::add_warnings(&mut response, &[warning.to_owned()]);
    }
    // A watch lasts as long as its body.
    Ok(if info.is_long_running() { response.map(|body| body.holding(counted)) } else { response })
}

/// May this be done? Impersonation is looked at first: whoever may impersonate goes on as the other.
async fn authorize(
    context: &Arc<Context>,
    info: &RequestInfo,
    user: Arc<UserInfo>,
    headers: &http::HeaderMap,
) -> Result<(Arc<UserInfo>, Attributes), StatusError> {
    let user = authentication::impersonate(&context.authorizer, user, headers).await?;
    let attributes = info.attributes(user.clone());
    match context.authorizer.authorize(&attributes).await {
        Decision::Allow => Ok((user, attributes)),
        Decision::NoOpinion(reason) => Err(forbidden(&attributes, &reason)),
    }
}

/// A place among the requests in flight, as long as what is given back lives.
async fn room<'c>(
    context: &'c Context,
    info: &RequestInfo,
    user: &UserInfo,
) -> Result<(Option<tokio::sync::SemaphorePermit<'c>>, metrics::Counted), StatusError> {
    if info.is_long_running() {
        return Ok((None, metrics::long_running(info)));
    }
    let mutating = !matches!(info.verb, "get" | "list" | "watch" | "head");
    let counted = metrics::in_flight(mutating);
    let State { reading, mutating: writing, waiting, .. } = &context.state;
    let slots = if mutating { writing } else { reading };
    if let Ok(permit) = slots.try_acquire() {
        return Ok((Some(permit), counted));
    }
    if user.in_group(SUPERUSERS) || EXEMPT_PATHS.iter().any(|path| info.path.starts_with(path)) {
        return Ok((None, counted));
    }
    let refuse = |_| StatusError::too_many_requests("Too many requests, please try again later.", 1);
    // Only so many may wait: beyond that it would not help them.
    let _place = waiting.try_acquire().map_err(|_| refuse(()))?;
    match tokio::time::timeout(ROOM_WAIT, slots.acquire()).await {
        Ok(Ok(permit)) => Ok((Some(permit), counted)),
        _ => Err(refuse(())),
    }
}

/// Paths that are no resources.
fn document(
    context: &Arc<Context>,
    info: &RequestInfo,
    method: &Method,
    headers: &http::HeaderMap,
    wanted: Result<Wanted, StatusError>,
) -> Result<Response<Body>, StatusError> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        return Err(StatusError::method_not_allowed());
    }
    let path = info.path.as_str();
    if let Some(response) = health::document(context, path, &info.query) {
        return Ok(response);
    }
    match path.trim_end_matches('/') {
        "/version" => return Ok(health::version()),
        "/configz" => return Ok(health::configuration()),
        "/metrics" => {
            let text = metrics::text(&context.store);
            return Ok(respond::plain(200, component_base::metrics::CONTENT_TYPE, text.into()));
        }
        "/metrics/slis" => {
            let text = component_base::metrics::encode_slis();
            return Ok(respond::plain(200, component_base::metrics::CONTENT_TYPE, text.into()));
        }
        "" => {
            let mut paths = discovery::paths();
            paths.extend(OTHER_PATHS);
            paths.sort_unstable();
            let body = json!({ "paths": paths });
            return Ok(respond::value(wanted.unwrap_or(Wanted::PLAIN), 200, &body));
        }
        _ => {}
    }
    if let Some(answer) = openapi::document(path, info.query.get("hash"), headers) {
        return answer;
    }
    let address = format!("{}:{}", context.options.public_address(), context.options.secure_port);
    if let Some(answer) = discovery::document(path, headers, wanted, &address) {
        return answer;
    }
    if discovery::lacks_version(path) {
        return Err(StatusError::no_such_resource());
    }
    let document = authentication::document(&context.options, path);
    Ok(document.unwrap_or_else(not_found))
}

/// What nobody serves: a path, or the resources of a group.
fn not_found() -> Response<Body> {
    respond::text(404, "404 page not found\n")
}

struct Rendered {
    wanted: Wanted,
    include: table::Include,
    outcome: Outcome,
}

/// A request on a resource, authorized.
async fn resource(
    context: &Arc<Context>,
    info: &RequestInfo,
    user: Arc<UserInfo>,
    attributes: Attributes,
    request: Request<()>,
    body: &mut Option<Incoming>,
    wanted: Result<Wanted, StatusError>,
) -> Result<Rendered, StatusError> {
    let (group, version) = (info.group.as_str(), info.version.as_str());
    if !discovery::has_group(group) {
        let (payload, warnings) = (Payload::Response(not_found()), Vec::new());
        return Ok(Rendered {
            wanted: Wanted::PLAIN,
            include: table::Include::Metadata,
            outcome: Outcome { code: 404, payload, warnings },
        });
    }
    if context.proxy.serves(&info.resource, &info.subresource) {
        let body = body.take().ok_or_else(|| StatusError::internal("the body was read already"))?;
        return Box::pin(connect(context, info, user, attributes, request.map(|()| body))).await;
    }
    if request.method() == Method::HEAD {
        return Err(StatusError::method_not_allowed());
    }
    let wanted = wanted?;
    let include = table::Include::parse(info.query.get("includeObject"))?;
    let render = |outcome| Rendered { wanted, include, outcome };
    let options = WriteOptions::of(info, request.headers())?;
    let WriteOptions { field_validation, mut dry_run } = options;

    if let Some(endpoint) = context.registry.endpoint(group, version, &info.resource, &info.subresource) {
        let facts = facts::resource(group, version, &info.resource).ok_or_else(StatusError::no_such_resource)?;
        check_method(facts, info)?;
        let endpoint = endpoint.clone();
        let body = read(body).await?;
        let (attributes, endpoint, headers, body) = (&attributes, &endpoint, request.headers(), &body[..]);
        let request = VirtualRequest { context, info, attributes, endpoint, headers, body, options };
        return Box::pin(virtual_resource::call(request)).await.map(render);
    }
    let resource = context.registry.get(group, version, &info.resource).ok_or_else(StatusError::no_such_resource)?;
    let part = part(info)?;
    check_method(resource.facts, info)?;
    if resource.namespaced && info.namespace.is_empty() && !matches!(info.verb, "list" | "watch") {
        return Err(StatusError::method_not_allowed());
    }
    let mut target = ResourceRequest { context, info, attributes, resource, part, dry_run };
    let outcome = match info.verb {
        "get" => get::get(&target).await?,
        "list" => Box::pin(list::list(&target, wanted, include)).await?,
        "watch" => Box::pin(watch::watch(&target, wanted, include)).await?,
        "create" | "update" => {
            let body = read(body).await?;
            let decode = || {
                let (version, kind) = (&resource.api_version, &resource.kind);
                negotiation::decode(request.headers(), &body, resource.schema, version, kind, field_validation)
            };
            match info.verb {
                "create" => Box::pin(create::create(&mut target, decode()?)).await?,
                _ => Box::pin(update::update(&mut target, decode()?, &decode)).await?,
            }
        }
        "patch" => {
            let body = read(body).await?;
            Box::pin(patch::patch(&mut target, request.headers(), &body, field_validation)).await?
        }
        "delete" | "deletecollection" => {
            let body = read(body).await?;
            let options = delete::options(&body, &info.query)?;
            dry_run |= options.dry_run.as_ref().is_some_and(|all| !all.is_empty());
            target.dry_run = dry_run;
            match info.verb {
                "delete" => Box::pin(delete::delete(&target, &options)).await?,
                _ => Box::pin(delete::delete_collection(&target, &options, wanted, include)).await?,
            }
        }
        _ => return Err(StatusError::method_not_allowed()),
    };
    Ok(render(outcome))
}

/// Streams and proxied requests go on to someone else, past admission.
async fn connect(
    context: &Arc<Context>,
    info: &RequestInfo,
    user: Arc<UserInfo>,
    attributes: Attributes,
    request: Request<Incoming>,
) -> Result<Rendered, StatusError> {
    let resource = context.registry.get(&info.group, &info.version, &info.resource);
    let mut admission = AdmissionRequest {
        attributes: &attributes,
        resource: resource.map(|r| &**r),
        operation: Operation::Connect,
        object: None,
        old_object: None,
        options: None,
        dry_run: false,
        warnings: Vec::new(),
        undo: Vec::new(),
    };
    if info.subresource != "log" {
        context.admission.mutate(&mut admission).await?;
        context.admission.validate(&mut admission).await?;
    }
    let response = context.proxy.connect(context, info, &user, request).await?;
    let outcome =
        Outcome { code: response.status().as_u16(), payload: Payload::Response(response), warnings: Vec::new() };
    Ok(Rendered { wanted: Wanted::PLAIN, include: table::Include::Metadata, outcome })
}

/// Which part of the object the path addresses.
fn part(info: &RequestInfo) -> Result<Part, StatusError> {
    match info.subresource.as_str() {
        "" => Ok(Part::Main),
        "status" => Ok(Part::Status),
        "finalize" => Ok(Part::Finalize),
        "approval" => Ok(Part::Approval),
        "ephemeralcontainers" => Ok(Part::EphemeralContainers),
        "resize" => Ok(Part::Resize),
        _ => Err(StatusError::no_such_resource()),
    }
}

/// 404 for what does not exist, 405 for what cannot be done with it.
fn check_method(facts: &'static facts::KindFacts, info: &RequestInfo) -> Result<(), StatusError> {
    let verbs = match info.subresource.as_str() {
        "" => &facts.verbs,
        name => &facts.subresource(name).ok_or_else(StatusError::no_such_resource)?.verbs,
    };
    let with_name = matches!(info.verb, "get" | "update" | "patch" | "delete");
    if !verbs.contains(&info.verb) || (with_name && info.name.is_empty()) {
        return Err(StatusError::method_not_allowed());
    }
    if info.verb == "create" && !info.name.is_empty() && info.subresource.is_empty() {
        return Err(StatusError::method_not_allowed());
    }
    Ok(())
}

/// The body, up to the limit. Of a bigger one the rest is let pass, so that the client comes to read the answer.
async fn read(body: &mut Option<Incoming>) -> Result<Bytes, StatusError> {
    let Some(mut body) = body.take() else { return Ok(Bytes::new()) };
    let (mut kept, mut seen) = (Vec::new(), 0_usize);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| StatusError::bad_request(format!("the body could not be read: {error}")))?;
        let Some(data) = frame.data_ref() else { continue };
        seen += data.len();
        if seen > BODY_BYTES_DRAINED {
            break;
        }
        if seen > BODY_BYTES_MAX {
            kept = Vec::new();
        } else {
            kept.extend_from_slice(data);
        }
    }
    if seen > BODY_BYTES_MAX { Err(StatusError::too_large(BODY_BYTES_MAX)) } else { Ok(kept.into()) }
}

/// Reads a body that nobody wants, within bounds.
async fn let_pass(mut body: Incoming) {
    let mut seen = 0;
    while let Some(Ok(frame)) = body.frame().await {
        seen += frame.data_ref().map_or(0, Bytes::len);
        if seen > BODY_BYTES_DRAINED {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_takes_little_room() {
        fn size<A, B, C, D, E, F>(_: fn(A, B, C, D, E) -> F) -> usize {
            size_of::<F>()
        }
        type Wants = Result<Wanted, StatusError>;
        let size =
            size::<&'static Arc<Context>, &'static RequestInfo, Request<()>, &mut Option<Incoming>, Wants, _>(answer);
        assert!(size < 8192, "every request is moved to the heap: {size} bytes");
    }
}
