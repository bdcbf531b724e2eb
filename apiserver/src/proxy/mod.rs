//! Requests that go on to someone else: a kubelet's log, exec, attach and port-forward; nodes, pods and services by proxy.
//! Upgrades (SPDY/3.1 and WebSocket) are passed on as they are: the backend speaks the protocol, bytes are copied both ways. Only
//! where a kubelet does not know the client's WebSocket protocol is it translated to SPDY.

mod rewrite;
mod target;
mod transport;

use crate::authentication::UserInfo;
use crate::authorization::{Decision, forbidden};
use crate::options::Options;
use crate::server::Context;
use crate::server::body::{Body, Pieces};
use crate::server::request_info::RequestInfo;
use apimachinery::status::StatusError;
use bytes::{BufMut as _, Bytes};
use component_base::streams::{self, TUNNEL, V5, Wanted};
use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use futures::StreamExt as _;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, BodyStream, Limited, StreamBody};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rand::RngExt as _;
use rewrite::Seen;
use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::time::Duration;
use target::{Address, Named};
use transport::{Credentials, TransportError};

/// How much of a backend's complaint is passed on.
const COMPLAINT_BYTES_MAX: usize = 50_000;
/// Pages whose links are led back are no greater.
const PAGE_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Of no concern to a backend: they end with a connection.
const HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
];

/// Connections to kubelets and what lies behind the API.
pub struct Proxy {
    kubelets: Credentials,
    preferred_addresses: Vec<String>,
    /// Lower-case prefixes of the front proxy's headers, which must not reach a backend in a client's name.
    request_headers: Vec<String>,
}

/// What a component on this host says at its `/healthz`, whoever signed its certificate; or why it cannot be asked.
pub async fn health(port: u16) -> Result<String, String> {
    const TIMEOUT: Duration = Duration::from_secs(5);
    let address = Address { host: "127.0.0.1".to_owned(), port };
    let (authority, path) = (address.authority(), "/healthz");
    let ask = async {
        let request = Request::builder().uri(path).header(header::HOST, &authority).body(Body::Empty);
        let request = request.map_err(|error| error.to_string())?;
        let answer = transport::send(&address, Some(&Credentials::default()), request).await;
        let answer = answer.map_err(|error| format!("Get \"https://{authority}{path}\": {error}"))?;
        let (code, body) = (answer.status(), Limited::new(answer.into_body(), COMPLAINT_BYTES_MAX).collect().await);
        let text = body.map(|body| String::from_utf8_lossy(&body.to_bytes()).into_owned());
        let text = text.map_err(|error| error.to_string())?;
        if code.is_success() { Ok(text) } else { Err(format!("unhealthy http status code: {}", code.as_u16())) }
    };
    tokio::time::timeout(TIMEOUT, ask).await.unwrap_or_else(|_| Err("context deadline exceeded".to_owned()))
}

// === impl Proxy ===

impl Proxy {
    pub fn new(options: &Options) -> anyhow::Result<Self> {
        let request_headers = options
            .requestheader_username_headers
            .iter()
            .chain(&options.requestheader_uid_headers)
            .chain(&options.requestheader_group_headers)
            .chain(&options.requestheader_extra_headers_prefix);
        Ok(Self {
            kubelets: Credentials::for_kubelets(options),
            preferred_addresses: options.kubelet_preferred_address_types.clone(),
            request_headers: request_headers.map(|name| name.to_lowercase()).collect(),
        })
    }

    /// Is this resource and subresource one of ours (`pods/log`, `pods/exec`, `nodes/proxy`, …)?
    pub fn serves(&self, resource: &str, subresource: &str) -> bool {
        matches!(
            (resource, subresource),
            ("pods", "log" | "exec" | "attach" | "portforward" | "proxy") | ("nodes" | "services", "proxy")
        )
    }

    /// Carries the request out. It is authorized, and admitted (`Connect`).
    pub async fn connect(
        &self,
        context: &Arc<Context>,
        info: &RequestInfo,
        user: &Arc<UserInfo>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, StatusError> {
        if !info.group.is_empty() || info.version != "v1" || info.name.is_empty() {
            return Err(StatusError::no_such_resource());
        }
        match info.subresource.as_str() {
            "log" => self.log(context, info, request).await,
            "proxy" => self.reverse(context, info, request).await,
            _ => self.stream(context, info, user, request).await,
        }
    }

    /// `pods/log`, in messages for a WebSocket client. As `LogLocation`.
    async fn log(
        &self,
        context: &Arc<Context>,
        info: &RequestInfo,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, StatusError> {
        if *request.method() != Method::GET {
            return Err(StatusError::method_not_allowed());
        }
        target::check_log_options(&info.name, &info.query)?;
        let pod = fetch(context, "pods", &info.namespace, &info.name).await?;
        let container = target::container(&pod, info.query.get("container"))?;
        let node = pod.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default();
        if node.is_empty() {
            return Ok(plain_text(Body::Empty));
        }
        let kubelet = self.kubelet(context, node).await?;
        let path = target::log_path(&info.namespace, &info.name, &container, &info.query);
        let outgoing = Request::builder().uri(&path).header(header::HOST, kubelet.authority()).body(Body::Empty);
        let outgoing = outgoing.map_err(StatusError::internal)?;
        let answer = transport::send(&kubelet, Some(&self.kubelets), outgoing).await.map_err(|error| {
            StatusError::internal(format!("Get \"https://{}{path}\": {error}", kubelet.authority()))
        })?;
        if !answer.status().is_success() {
            return Err(complaint(answer, &info.name).await);
        }
        if let Some(protocol) = streams::chosen(request.headers(), &[streams::BINARY]) {
            let log = answer.into_body().into_data_stream();
            let accepted = streams::accept(request, protocol, move |client| streams::send_bytes(client, log));
            return accepted.map(|answer| answer.map(|()| Body::Empty));
        }
        Ok(plain_text(stream_body(answer.into_body())))
    }

    /// `pods/exec`, `attach` and `portforward`. As `ExecLocation` and its siblings.
    async fn stream(
        &self,
        context: &Arc<Context>,
        info: &RequestInfo,
        user: &Arc<UserInfo>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, StatusError> {
        if !matches!(*request.method(), Method::GET | Method::POST) {
            return Err(StatusError::method_not_allowed());
        }
        if *request.method() == Method::GET {
            // A WebSocket cannot be asked for by anything but GET: reading alone must not suffice.
            let mut attributes = info.attributes(user.clone());
            attributes.verb = "create".to_owned();
            if let Decision::NoOpinion(reason) = context.authorizer.authorize(&attributes).await {
                return Err(forbidden(&attributes, &reason));
            }
        }
        let what = info.subresource.as_str();
        let pod = fetch(context, "pods", &info.namespace, &info.name).await?;
        let container = match what {
            "portforward" => String::new(),
            _ => target::container(&pod, info.query.get("container"))?,
        };
        let node = pod.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default();
        if node.is_empty() {
            return Err(StatusError::bad_request(format!("pod {} does not have a host assigned", info.name)));
        }
        let phase = pod.pointer("/status/phase").and_then(Value::as_str).unwrap_or_default();
        if matches!(phase, "Succeeded" | "Failed") {
            let doing = match what {
                "exec" => "cannot exec into a container in a completed pod",
                "attach" => "cannot attach a container in a completed pod",
                _ => "cannot forward ports of a completed pod",
            };
            return Err(StatusError::bad_request(format!("{doing}; current phase is {phase}")));
        }
        let path = match what {
            "portforward" => target::port_forward_path(&info.namespace, &info.name, &info.query),
            _ => target::stream_path(what, &info.namespace, &info.name, &container, &info.query),
        };
        if !wants_upgrade(request.headers()) {
            return Err(StatusError::bad_request("Upgrade request required"));
        }
        let kubelet = self.kubelet(context, node).await?;
        self.join(&kubelet, Some(&self.kubelets), &path, request, true).await.map_err(|error| match error {
            TransportError::Client(error) => error,
            error => {
                tracing::warn!(node, %error, "cannot reach a kubelet");
                StatusError::internal(format!("error dialing backend: {error}"))
            }
        })
    }

    /// `nodes/proxy`, `pods/proxy`, `services/proxy`.
    async fn reverse(
        &self,
        context: &Arc<Context>,
        info: &RequestInfo,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, StatusError> {
        let namespaced = info.resource != "nodes";
        let full = request.uri().path().to_owned();
        let rest = match target::rest(&full, namespaced) {
            Some(rest) => rest,
            None if matches!(*request.method(), Method::GET | Method::HEAD) && !wants_upgrade(request.headers()) => {
                return redirect_below(&request);
            }
            None => "/",
        };
        let below = full.strip_suffix(rest).unwrap_or(&full).to_owned();
        let path = match request.uri().query() {
            Some(query) => format!("{rest}?{query}"),
            None => rest.to_owned(),
        };
        let named = Named::parse(&info.name)
            .ok_or_else(|| StatusError::bad_request(format!("invalid {} request {:?}", info.resource, info.name)))?;
        let any = Credentials::default();
        let (address, tls) = match info.resource.as_str() {
            "nodes" => {
                let kubelet = self.kubelet(context, &named.name).await?;
                match named.port.as_str() {
                    "" => (kubelet, Some(&self.kubelets)),
                    port => {
                        let bad = |_| StatusError::bad_request(format!("invalid port {port:?}"));
                        let port: u16 = port.parse().map_err(bad)?;
                        if port == kubelet.port {
                            (kubelet, Some(&self.kubelets))
                        } else {
                            (Address { port, ..kubelet }, named.https.then_some(&any))
                        }
                    }
                }
            }
            "pods" => {
                let pod = fetch(context, "pods", &info.namespace, &named.name).await?;
                (target::pod(&pod, &named)?, named.https.then_some(&any))
            }
            _ => {
                let service = fetch(context, "services", &info.namespace, &named.name).await?;
                let slices = slices_of(context, &info.namespace, &named.name);
                let pick = |count: usize| rand::rng().random_range(0..count);
                (target::endpoint(&service, &slices, &named, pick)?, named.https.then_some(&any))
            }
        };
        let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        let asked = host.or(request.uri().authority().map(|a| a.as_str())).unwrap_or_default().to_owned();
        let mut request = request;
        for (name, value) in
            [("x-forwarded-uri", full.as_str()), ("x-forwarded-host", &asked), ("x-forwarded-proto", "https")]
        {
            if let Ok(value) = HeaderValue::from_str(value) {
                request.headers_mut().insert(HeaderName::from_static(name), value);
            }
        }
        let answer = self
            .forward(&address, tls, &path, request)
            .await
            .map_err(|error| StatusError::service_unavailable(format!("error trying to reach service: {error}")))?;
        let backend = address.authority();
        Ok(lead_back(answer, &Seen { below: &below, hosts: [&backend, &asked] }).await)
    }

    async fn kubelet(&self, context: &Arc<Context>, node: &str) -> Result<Address, StatusError> {
        let node = fetch(context, "nodes", "", node).await?;
        target::kubelet(&node, &self.preferred_addresses)
    }

    /// Sends the request on, and the answer back; joins the two connections if the backend upgrades.
    async fn forward(
        &self,
        address: &Address,
        tls: Option<&Credentials>,
        path: &str,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, TransportError> {
        if wants_upgrade(request.headers()) {
            return self.join(address, tls, path, request, false).await;
        }
        let (parts, body) = request.into_parts();
        let outgoing = self.outgoing(address, path, &parts.method, &parts.headers, stream_body(body));
        let (mut parts, body) = transport::send(address, tls, outgoing).await?.into_parts();
        for name in HOP_BY_HOP {
            parts.headers.remove(name);
        }
        let mut response = Response::new(stream_body(body));
        *response.status_mut() = parts.status;
        *response.headers_mut() = parts.headers;
        Ok(response)
    }

    fn outgoing(
        &self,
        address: &Address,
        path: &str,
        method: &Method,
        headers: &HeaderMap,
        body: Body,
    ) -> Request<Body> {
        let upgrade = matches!(body, Body::Empty) && wants_upgrade(headers);
        let mut outgoing = Request::new(body);
        *outgoing.method_mut() = method.clone();
        *outgoing.uri_mut() = path.parse().unwrap_or_default();
        *outgoing.headers_mut() = self.headers(headers, upgrade);
        if let Ok(host) = HeaderValue::from_str(&address.authority()) {
            outgoing.headers_mut().insert(header::HOST, host);
        }
        outgoing
    }

    /// Joins the client's connection with the backend's, once that upgrades. A backend of commands (a kubelet) that
    /// does not speak the client's WebSocket protocol is spoken to in SPDY, and what it says is translated.
    async fn join(
        &self,
        address: &Address,
        tls: Option<&Credentials>,
        path: &str,
        mut request: Request<Incoming>,
        commands: bool,
    ) -> Result<Response<Body>, TransportError> {
        let outgoing = self.outgoing(address, path, request.method(), request.headers(), Body::Empty);
        let mut answer = transport::send(address, tls, outgoing).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            let otherwise = commands && answer.status().is_client_error();
            if let Some(protocol) = streams::chosen(request.headers(), &[V5, TUNNEL]).filter(|_| otherwise) {
                return self.translate(address, tls, path, request, protocol).await;
            }
            let (parts, body) = answer.into_parts();
            return Ok(Response::from_parts(parts, stream_body(body)));
        }
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        *response.headers_mut() = answer.headers().clone();
        let (client, backend) = (hyper::upgrade::on(&mut request), hyper::upgrade::on(&mut answer));
        // Ends when either side does; nobody else owns the two connections.
        tokio::spawn(async move {
            let (client, backend) = match tokio::join!(client, backend) {
                (Ok(client), Ok(backend)) => (client, backend),
                (Err(error), _) | (_, Err(error)) => {
                    tracing::debug!(%error, "an upgrade was not carried out");
                    return;
                }
            };
            let (mut client, mut backend) = (TokioIo::new(client), TokioIo::new(backend));
            if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut backend).await {
                tracing::debug!(%error, "an upgraded connection ended");
            }
        });
        Ok(response)
    }

    /// A WebSocket client's streams, carried to a kubelet that knows SPDY only.
    async fn translate(
        &self,
        address: &Address,
        tls: Option<&Credentials>,
        path: &str,
        request: Request<Incoming>,
        protocol: &'static str,
    ) -> Result<Response<Body>, TransportError> {
        let inner = if protocol == TUNNEL { streams::PORT_FORWARD } else { streams::COMMAND };
        let mut outgoing = self.outgoing(address, path, &Method::POST, &HeaderMap::new(), Body::Empty);
        outgoing.headers_mut().extend(streams::spdy_headers(inner));
        let answer = transport::send(address, tls, outgoing).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            let (parts, body) = answer.into_parts();
            return Ok(Response::from_parts(parts, stream_body(body)));
        }
        let backend = hyper::upgrade::on(answer).await?;
        let accepted = if protocol == TUNNEL {
            streams::accept(request, protocol, move |client| streams::unwrap_tunnel(client, backend))
        } else {
            match Wanted::parse(path.split_once('?').map_or("", |(_, query)| query)) {
                Ok(wanted) => {
                    streams::accept(request, protocol, move |client| streams::translate(client, backend, wanted))
                }
                Err(why) => Err(StatusError::bad_request(why)),
            }
        };
        Ok(accepted?.map(|()| Body::Empty))
    }

    /// What a backend is told: nothing of the client's credentials, nor of this connection but an upgrade.
    fn headers(&self, incoming: &HeaderMap, upgrade: bool) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(incoming.len());
        for (name, value) in incoming {
            let text = name.as_str();
            let secret = *name == header::AUTHORIZATION
                || text.starts_with("impersonate-")
                || self.request_headers.iter().any(|prefix| !prefix.is_empty() && text.starts_with(prefix));
            let ours = HOP_BY_HOP.contains(name) || (*name == header::UPGRADE && !upgrade) || *name == header::HOST;
            if secret || ours {
                continue;
            }
            if *name == header::SEC_WEBSOCKET_PROTOCOL {
                // A token may be hidden among the protocols.
                let kept: Vec<&str> = value
                    .to_str()
                    .unwrap_or_default()
                    .split(',')
                    .map(str::trim)
                    .filter(|protocol| !protocol.starts_with("base64url.bearer.authorization.k8s.io."))
                    .collect();
                if let Ok(value) = HeaderValue::from_str(&kept.join(", ")) {
                    headers.append(name.clone(), value);
                }
                continue;
            }
            headers.append(name.clone(), value.clone());
        }
        if upgrade {
            headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        }
        headers
    }
}

fn wants_upgrade(headers: &HeaderMap) -> bool {
    let connection = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    headers.contains_key(header::UPGRADE)
        && connection.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case("upgrade"))
}

/// The newest version of an object of the core group; the last one known while etcd does not answer.
async fn fetch(context: &Arc<Context>, resource: &str, namespace: &str, name: &str) -> Result<Value, StatusError> {
    let resource = context.registry.get("", "v1", resource).ok_or_else(StatusError::no_such_resource)?;
    let newest = match context.store.get(resource, namespace, name).await {
        Err(error) if error.code() != 404 => context.store.get_cached(resource, namespace, name).map_err(|_| error),
        newest => newest,
    };
    newest.map(|object| object.value())
}

fn slices_of(context: &Arc<Context>, namespace: &str, service: &str) -> Vec<Value> {
    let Some(cache) = context.store.cache_of("discovery.k8s.io", "endpointslices") else { return Vec::new() };
    let slices = cache.list(namespace);
    let of_service = slices.iter().filter(|slice| slice.identity.label("kubernetes.io/service-name") == Some(service));
    of_service.map(|slice| slice.value()).collect()
}

fn stream_body(body: Incoming) -> Body {
    Body::boxed(body.map_err(|error| -> crate::server::body::BoxError { Box::new(error) }))
}

/// Leads redirects and the links of pages back below the proxied path.
async fn lead_back(mut answer: Response<Body>, seen: &Seen<'_>) -> Response<Body> {
    let location = answer.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
    if let Some(value) = location.and_then(|link| seen.link(link)).and_then(|link| HeaderValue::from_str(&link).ok()) {
        answer.headers_mut().insert(header::LOCATION, value);
    }
    let text =
        |name| answer.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or_default();
    let kind = text(header::CONTENT_TYPE).split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let gzip = text(header::CONTENT_ENCODING) == "gzip";
    if kind != "text/html" || !(gzip || text(header::CONTENT_ENCODING).is_empty()) {
        return answer;
    }
    let (mut parts, mut body) = answer.into_parts();
    let mut page = Vec::new();
    // A page that is greater is passed on as it is: nobody waits for the whole of it.
    while page.len() <= PAGE_BYTES_MAX {
        match body.frame().await {
            Some(Ok(frame)) => page.put(frame.into_data().unwrap_or_default()),
            Some(Err(error)) => {
                tracing::debug!(%error, "a proxied page broke off");
                break;
            }
            None => {
                page = rewritten(&page, gzip, seen).unwrap_or(page);
                parts.headers.remove(header::CONTENT_LENGTH);
                return Response::from_parts(parts, page.into());
            }
        }
    }
    let read = futures::stream::once(std::future::ready(Ok(Frame::data(Pieces::from(Bytes::from(page))))));
    let whole = StreamBody::new(read.chain(BodyStream::new(body)));
    Response::from_parts(parts, Body::boxed(whole))
}

fn rewritten(page: &[u8], gzip: bool, seen: &Seen<'_>) -> std::io::Result<Vec<u8>> {
    if !gzip {
        return Ok(seen.page(page));
    }
    let mut plain = Vec::new();
    let limit = PAGE_BYTES_MAX as u64 * 8;
    GzDecoder::new(page).take(limit + 1).read_to_end(&mut plain)?;
    if plain.len() as u64 > limit {
        return Err(std::io::ErrorKind::FileTooLarge.into());
    }
    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(&seen.page(&plain))?;
    packed.finish()
}

fn plain_text(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}

/// `…/proxy` is a directory: browsers are sent to `…/proxy/`, so that relative links lead below it.
fn redirect_below(request: &Request<Incoming>) -> Result<Response<Body>, StatusError> {
    let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
    let location = format!("{}/{query}", request.uri().path());
    let response = Response::builder().status(StatusCode::MOVED_PERMANENTLY).header(header::LOCATION, location);
    response.body(Body::Empty).map_err(StatusError::internal)
}

/// What a kubelet says when it will not. As `GenericHttpResponseChecker`.
async fn complaint(answer: Response<Incoming>, pod: &str) -> StatusError {
    let code = answer.status();
    let text = match Limited::new(answer.into_body(), COMPLAINT_BYTES_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => Bytes::new(),
    };
    let text = String::from_utf8_lossy(&text).into_owned();
    match code {
        StatusCode::INTERNAL_SERVER_ERROR => StatusError::internal(text),
        StatusCode::BAD_REQUEST => StatusError::bad_request(text),
        StatusCode::NOT_FOUND => {
            let message = format!("the server could not find the requested resource ( pods/log {pod})");
            StatusError::new(404, "NotFound", message).with_cause("UnexpectedServerResponse", &text, None)
        }
        other => {
            let message = format!("the server responded with the status code {} ( pods/log {pod})", other.as_u16());
            StatusError::new(other.as_u16(), "", message).with_cause("UnexpectedServerResponse", &text, None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn proxy() -> Proxy {
        let options = Options::parse_from([
            "apiserver",
            "--etcd-servers=http://127.0.0.1:1",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        ]);
        Proxy::new(&options).unwrap()
    }

    #[test]
    fn a_backend_learns_nothing_of_the_clients_credentials() {
        let mut incoming = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer x"),
            ("impersonate-user", "root"),
            ("x-remote-user", "root"),
            ("x-remote-extra-scopes", "all"),
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-key", "abc"),
            ("sec-websocket-protocol", "v5.channel.k8s.io, base64url.bearer.authorization.k8s.io.eA"),
            ("accept", "*/*"),
        ] {
            incoming.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let show = |upgrade: bool| {
            let headers = proxy().headers(&incoming, upgrade);
            let mut lines: Vec<String> =
                headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
            lines.sort();
            lines
        };
        assert_eq!(
            show(true),
            [
                "accept: */*",
                "connection: Upgrade",
                "sec-websocket-key: abc",
                "sec-websocket-protocol: v5.channel.k8s.io",
                "upgrade: websocket"
            ]
        );
        assert_eq!(show(false), ["accept: */*", "sec-websocket-key: abc", "sec-websocket-protocol: v5.channel.k8s.io"]);
        assert!(wants_upgrade(&incoming));
    }
}
