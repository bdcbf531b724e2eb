//! Serving HTTP: one accept loop for every daemon (HTTP/1.1 with upgrades and HTTP/2, with TLS or without), and the
//! endpoints that they all have: `/healthz`, `/livez`, `/readyz`, `/metrics`, `/configz`.
use crate::{
    auth::{Access, DelegatedAuth},
    batched::Batched,
    metrics,
};
use apimachinery::status::StatusError;
use aws_lc_rs::digest;
use bytes::{Buf, Bytes};
use http::{HeaderValue, Method, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls_pki_types::CertificateDer;
use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

pub type Request = http::Request<Incoming>;
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub type Body = BoxBody<Bytes, BoxError>;
pub type Response = http::Response<Body>;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// What a client may send ahead, on one stream and on a connection. The latter is ample: streams that wait for a
/// connection's window can starve each other.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// So much of what is to be sent on a stream waits in this process; who makes it waits then. There may be thousands of watches
/// whose clients are slow.
const SEND_BUFFER: usize = 64 << 10;
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(15);
const MAX_HEADER_BYTES: u32 = 64 * 1024;
/// Open requests, watches among them, that one HTTP/2 connection may have.
pub const MAX_STREAMS: u32 = 1000;
/// After a failed accept (no file descriptors left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The other end of a connection; every request has it among its extensions.
#[derive(Clone, Debug)]
pub struct Peer {
    pub address: SocketAddr,
    /// The verified client certificate and its chain, leaf first; empty if none was shown.
    pub certificates: Arc<[CertificateDer<'static>]>,
    /// The SHA-256 of the chain, by which what is known of it can be found.
    pub digest: [u8; 32],
}

// === impl Peer ===

impl Peer {
    pub fn new(address: SocketAddr, certificates: Arc<[CertificateDer<'static>]>) -> Self {
        let mut hash = digest::Context::new(&digest::SHA256);
        certificates.iter().for_each(|certificate| hash.update(certificate));
        let mut digest = [0; 32];
        digest.copy_from_slice(hash.finish().as_ref());
        Self { address, certificates, digest }
    }
}

/// Where and how to serve.
#[derive(Clone)]
pub struct Listening {
    /// None serves plain text.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Connections beyond this wait to be accepted.
    pub max_connections: usize,
}

/// Accepts connections until `shutdown`, and gives each request to `handler`. Connections that are open then are ended.
pub async fn serve<H, Fut, B>(listener: TcpListener, listening: Listening, shutdown: CancellationToken, handler: H)
where
    H: Fn(Request) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = http::Response<B>> + Send + 'static,
    B: http_body::Body<Data: Buf + Send, Error: Into<BoxError>> + Send + 'static,
{
    let ending = Ending { shutdown: shutdown.clone(), cut: shutdown };
    serve_until(listener, listening, ending, MAX_STREAMS, handler).await;
}

/// How serving ends: after `shutdown` no connection is accepted, and those that are open answer what they have been asked,
/// and no more; `cut` ends those that are left.
#[derive(Clone)]
pub struct Ending {
    pub shutdown: CancellationToken,
    pub cut: CancellationToken,
}

/// As [`serve`], to an end that may take its time, and with so many requests at a time on an HTTP/2 connection. Returns when
/// every connection has ended.
pub async fn serve_until<H, Fut, B>(
    listener: TcpListener,
    listening: Listening,
    ending: Ending,
    max_streams: u32,
    handler: H,
) where
    H: Fn(Request) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = http::Response<B>> + Send + 'static,
    B: http_body::Body<Data: Buf + Send, Error: Into<BoxError>> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(listening.max_connections));
    let acceptor = listening.tls.map(TlsAcceptor::from);
    while let Some((accepted, slot)) = tokio::select! {
        accepted = accept(&listener, &slots) => accepted,
        () = ending.shutdown.cancelled() => None,
    } {
        match accepted {
            Ok((stream, address)) => {
                let (acceptor, handler, ending) = (acceptor.clone(), handler.clone(), ending.clone());
                tokio::spawn(async move {
                    let _slot = slot;
                    tokio::select! {
                        () = connection(stream, address, acceptor, max_streams, ending.shutdown, handler) => {}
                        () = ending.cut.cancelled() => {}
                    }
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let all = u32::try_from(listening.max_connections).unwrap_or(u32::MAX);
    // Nobody closes the semaphore.
    let _ = slots.acquire_many(all).await;
}

/// The next connection, once there is room for it.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> Option<(std::io::Result<(TcpStream, SocketAddr)>, OwnedSemaphorePermit)> {
    let slot = slots.clone().acquire_owned().await.ok()?;
    Some((listener.accept().await, slot))
}

async fn connection<H, Fut, B>(
    stream: TcpStream,
    address: SocketAddr,
    acceptor: Option<TlsAcceptor>,
    max_streams: u32,
    shutdown: CancellationToken,
    handler: H,
) where
    H: Fn(Request) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = http::Response<B>> + Send + 'static,
    B: http_body::Body<Data: Buf + Send, Error: Into<BoxError>> + Send + 'static,
{
    // Failing only costs latency.
    let _ = stream.set_nodelay(true);
    let Some(acceptor) = acceptor else {
        let peer = Peer::new(address, Arc::new([]));
        return http_connection(TokioIo::new(stream), peer, max_streams, shutdown, handler).await;
    };
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(Batched::new(stream))).await {
        Ok(Ok(mut stream)) => {
            if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                stream.get_mut().0.start();
            }
            let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
            let certificates = certificates.iter().map(|c| c.clone().into_owned()).collect();
            let peer = Peer::new(address, certificates);
            http_connection(TokioIo::new(stream), peer, max_streams, shutdown, handler).await;
        }
        Ok(Err(error)) => debug!(%address, %error, "TLS handshake failed"),
        Err(_) => debug!(%address, "TLS handshake timed out"),
    }
}

async fn http_connection<I, H, Fut, B>(io: I, peer: Peer, max_streams: u32, shutdown: CancellationToken, handler: H)
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    H: Fn(Request) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = http::Response<B>> + Send + 'static,
    B: http_body::Body<Data: Buf + Send, Error: Into<BoxError>> + Send + 'static,
{
    let address = peer.address;
    let service = service_fn(move |mut request: Request| {
        request.extensions_mut().insert(peer.clone());
        let response = handler(request);
        async move { Ok::<_, Infallible>(response.await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADER_BYTES as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .max_concurrent_streams(max_streams)
        .max_header_list_size(MAX_HEADER_BYTES);
    let mut connection = std::pin::pin!(builder.serve_connection_with_upgrades(io, service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%address, error, "connection ended");
    }
}

// === responses ===

/// A response with a whole body.
pub fn respond(code: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response {
    let mut response = http::Response::new(full(body));
    *response.status_mut() = code;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

pub fn text(code: StatusCode, body: impl Into<Bytes>) -> Response {
    respond(code, "text/plain; charset=utf-8", body)
}

/// The `Status` as JSON, with `Retry-After` where the details have one.
pub fn status(error: &StatusError) -> Response {
    let code = StatusCode::from_u16(error.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    // A Status has no part that does not serialise.
    let mut response = respond(code, "application/json", serde_json::to_vec(&error.0).unwrap_or_default());
    if let Some(seconds) = error.0.details.as_ref().and_then(|d| d.retry_after_seconds) {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

pub fn full(body: impl Into<Bytes>) -> Body {
    Full::new(body.into()).map_err(|never| match never {}).boxed()
}

// === the endpoints that all daemons have ===

/// A named check of `/healthz`: what is wrong, if something is.
pub type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// What a daemon shows of itself.
#[derive(Clone, Default)]
pub struct Endpoints {
    /// For `/healthz`, `/livez` and `/readyz`; each also has a path of its own below them. What they say is told at `/metrics/slis`.
    pub checks: Vec<(String, Check)>,
    /// For `/configz`: name and value.
    pub configz: Option<(String, serde_json::Value)>,
    /// None lets everybody read everything, as on a loopback port.
    pub auth: Option<Arc<DelegatedAuth>>,
}

impl Endpoints {
    pub fn with_check(mut self, name: &str, check: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        self.checks.push((name.to_owned(), Arc::new(check)));
        self
    }

    /// Answers a request for one of the endpoints; 404 for anything else.
    pub async fn handle(&self, request: Request) -> Response {
        let path = request.uri().path().to_owned();
        if let Some(auth) = &self.auth {
            let access = Access::NonResource { verb: "get".to_owned(), path: path.clone() };
            if let Err(error) = authorize(auth, &request, &access).await {
                return status(&error);
            }
        }
        self.answer(request.method(), &path, request.uri().query().unwrap_or(""))
    }

    /// As [`Endpoints::handle`] of a request that was let in already.
    pub fn answer(&self, method: &Method, path: &str, query: &str) -> Response {
        if method != Method::GET && method != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is served here");
        }
        match path {
            "/metrics" => respond(StatusCode::OK, metrics::CONTENT_TYPE, metrics::encode()),
            "/metrics/slis" => respond(StatusCode::OK, metrics::CONTENT_TYPE, metrics::encode_slis()),
            "/configz" if self.configz.is_some() => {
                let (name, value) = self.configz.clone().unwrap_or_default();
                let body = serde_json::json!({ name: value }).to_string();
                respond(StatusCode::OK, "application/json", body)
            }
            _ => {
                let asked = path.strip_prefix('/').unwrap_or_default();
                let roots = ["healthz", "livez", "readyz"];
                match roots.into_iter().find_map(|root| Some((root, asked.strip_prefix(root)?))) {
                    Some((root, "" | "/")) => health(root, &self.checks, query),
                    Some((root, one)) => match self.checks.iter().find(|(name, _)| one.strip_prefix('/') == Some(name))
                    {
                        Some(check) => health(root, std::slice::from_ref(check), query),
                        None => text(StatusCode::NOT_FOUND, "404 page not found\n"),
                    },
                    None => text(StatusCode::NOT_FOUND, "404 page not found\n"),
                }
            }
        }
    }
}

/// Who calls, and whether it may.
pub async fn authorize(auth: &DelegatedAuth, request: &Request, access: &Access) -> Result<(), StatusError> {
    let certificate = request.extensions().get::<Peer>().and_then(|p| p.certificates.first().map(|c| c.to_vec()));
    let user = auth.authenticate(request.headers(), certificate.as_deref()).await?;
    auth.authorize(&user, access).await
}

/// `ok`, or which checks failed; with `?verbose` each check on a line; `?exclude=name` leaves one out. The endpoint's
/// name is not repeated in the text, unlike the checks'.
fn health(endpoint: &str, checks: &[(String, Check)], query: &str) -> Response {
    let parameters: Vec<(&str, &str)> = query.split('&').map(|p| p.split_once('=').unwrap_or((p, ""))).collect();
    let excluded = |name: &str| parameters.iter().any(|(k, v)| *k == "exclude" && *v == name);
    let verbose = parameters.iter().any(|(k, _)| *k == "verbose");
    let (mut lines, mut failed) = (String::new(), false);
    for (name, check) in checks {
        let line = if excluded(name) {
            format!("[+]{name} excluded: ok\n")
        } else {
            let outcome = check();
            metrics::checked(name, endpoint, outcome.is_ok());
            match outcome {
                Ok(()) => format!("[+]{name} ok\n"),
                Err(reason) => {
                    warn!(check = name, reason, "health check failed");
                    failed = true;
                    format!("[-]{name} failed: {reason}\n")
                }
            }
        };
        lines.push_str(&line);
    }
    match (failed, verbose) {
        (true, _) => text(StatusCode::INTERNAL_SERVER_ERROR, lines + "check failed\n"),
        (false, true) => text(StatusCode::OK, lines + "check passed\n"),
        (false, false) => text(StatusCode::OK, "ok"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn health_says_what_failed() {
        let endpoints =
            Endpoints::default().with_check("ping", || Ok(())).with_check("disk", || Err("full".to_owned()));
        for (path, query, code, expected) in [
            ("/healthz", "", 500, "[+]ping ok\n[-]disk failed: full\ncheck failed\n"),
            ("/readyz", "exclude=disk", 200, "ok"),
            ("/livez/ping", "", 200, "ok"),
            ("/livez", "verbose&exclude=disk", 200, "[+]ping ok\n[+]disk excluded: ok\ncheck passed\n"),
            ("/nothing", "", 404, "404 page not found\n"),
        ] {
            let response = endpoints.answer(&Method::GET, path, query);
            assert_eq!(response.status(), code, "{path}");
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, expected, "{path}");
        }
        let told = endpoints.answer(&Method::GET, "/metrics/slis", "").into_body().collect().await.unwrap().to_bytes();
        let told = String::from_utf8_lossy(&told);
        for line in [
            "kubernetes_healthcheck{name=\"ping\",type=\"livez\"} 1\n",
            "kubernetes_healthcheck{name=\"disk\",type=\"healthz\"} 0\n",
            "kubernetes_healthchecks_total{name=\"disk\",status=\"error\",type=\"healthz\"} 1\n",
        ] {
            assert!(told.contains(line), "{told}");
        }
    }
}
