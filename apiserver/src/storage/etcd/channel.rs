//! gRPC to etcd over one HTTP/2 connection: calls, and streams of answers. A call goes from the request's own task to the
//! connection's and back, without a task or a queue of its own, and calls that are made at the same time go out together.
//!
//! The connection is made when it is needed; when it breaks, or its member has no leader, the next call goes to the next
//! endpoint.

use super::EtcdError;
use super::messages::PREFIX;
use crate::options::Options;
use arc_swap::ArcSwapOption;
use bytes::{Bytes, BytesMut};
use component_base::batched::Batched;
use component_base::tls::{ReloadingKeyPair, read_certificates};
use h2::client::{Builder, Connection, ResponseFuture, SendRequest};
use h2::{Ping, Reason, RecvStream, SendStream};
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};
use rustls_pki_types::ServerName;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio_rustls::TlsConnector;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// As etcd's Go client with kube-apiserver.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// No answer of etcd is bigger.
const MESSAGE_BYTES_MAX: usize = 512 << 20;
/// What etcd may send ahead, for one call and for all.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 32 << 20;
/// A connection on which a call was given up after this time is left for a new one, maybe to another member.
const PATIENCE: Duration = Duration::from_secs(5);
/// gRPC's code for a service that is not available.
const UNAVAILABLE: i32 = 14;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// What can be called.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    Range,
    Put,
    Txn,
    Compact,
    Grant,
    Status,
    Watch,
}

/// Calls to whichever of some endpoints is there. Cheap to clone.
#[derive(Clone)]
pub struct Channel(Arc<Shared>);

struct Shared {
    endpoints: Vec<Endpoint>,
    tls: Option<TlsConnector>,
    current: ArcSwapOption<Open>,
    /// Which endpoint is next, for who makes the connection.
    next: Mutex<usize>,
}

struct Endpoint {
    host: String,
    port: u16,
    is_tls: bool,
    /// `https://host:port/etcdserverpb.KV/Txn` and so on, by [`Call`].
    paths: [Uri; CALLS.len()],
}

/// A connection.
struct Open {
    requests: SendRequest<Bytes>,
    endpoint: usize,
    headers: HeaderMap,
    /// No more calls are made on it. It is closed when those that were have been answered.
    is_over: Arc<AtomicBool>,
}

/// A call that has no answer yet.
struct Waiting<'o> {
    open: &'o Open,
    since: Instant,
    answered: bool,
}

/// A stream of messages from etcd, and to it.
pub struct Stream {
    send: SendStream<Bytes>,
    response: Option<ResponseFuture>,
    body: Option<RecvStream>,
    unread: Unread,
}

/// What has come of messages that are not whole yet.
#[derive(Default)]
struct Unread(BytesMut);

const CALLS: [(Call, &str); 7] = [
    (Call::Range, "etcdserverpb.KV/Range"),
    (Call::Put, "etcdserverpb.KV/Put"),
    (Call::Txn, "etcdserverpb.KV/Txn"),
    (Call::Compact, "etcdserverpb.KV/Compact"),
    (Call::Grant, "etcdserverpb.Lease/LeaseGrant"),
    (Call::Status, "etcdserverpb.Maintenance/Status"),
    (Call::Watch, "etcdserverpb.Watch/Watch"),
];

// === impl Channel ===

impl Channel {
    /// To the endpoints that the options name. Nothing is sent yet.
    pub fn new(options: &Options, servers: &[String]) -> Result<Self, EtcdError> {
        let tls = match &options.etcd_cafile {
            _ if servers.iter().all(|server| server.starts_with("http://")) => None,
            None if servers.iter().all(|server| !server.contains("://")) => None,
            _ => Some(TlsConnector::from(Arc::new(tls_config(options)?))),
        };
        let endpoints = servers.iter().map(|server| Endpoint::parse(server, tls.is_some()));
        let endpoints: Vec<_> = endpoints.collect::<Result<_, _>>()?;
        Ok(Self(Arc::new(Shared { endpoints, tls, current: ArcSwapOption::empty(), next: Mutex::default() })))
    }

    /// Makes a call; gives the message of its answer.
    pub async fn call(&self, call: Call, message: Bytes) -> Result<Bytes, EtcdError> {
        let (open, response, _send) = self.send(call, message, true).await?;
        let mut waiting = Waiting { open: &open, since: Instant::now(), answered: false };
        let answer = self.answer(response).await;
        waiting.answered = true;
        // Another member may know a leader.
        if matches!(&answer, Err(EtcdError::Refused { code: UNAVAILABLE, .. })) && self.0.endpoints.len() > 1 {
            open.end();
        }
        answer
    }

    /// Begins a stream of messages.
    pub async fn stream(&self, call: Call, first: Bytes) -> Result<Stream, EtcdError> {
        let (_, response, send) = self.send(call, first, false).await?;
        Ok(Stream { send, response: Some(response), body: None, unread: Unread::default() })
    }

    async fn answer(&self, response: ResponseFuture) -> Result<Bytes, EtcdError> {
        let (head, mut body) = response.await?.into_parts();
        check_status(&head.headers)?;
        let mut unread = Unread::default();
        let mut message = None;
        while let Some(piece) = body.data().await {
            let piece = piece?;
            let _ = body.flow_control().release_capacity(piece.len());
            if message.is_none() {
                message = unread.add(piece)?;
            }
        }
        check_status(&body.trailers().await?.unwrap_or_default())?;
        message.ok_or_else(|| EtcdError::Broken("the answer is empty".to_owned()))
    }

    async fn send(
        &self,
        call: Call,
        message: Bytes,
        end: bool,
    ) -> Result<(Arc<Open>, ResponseFuture, SendStream<Bytes>), EtcdError> {
        let mut last = None;
        // A connection may have broken without our knowledge: once more on a new one.
        for _ in 0..2 {
            let open = self.open().await?;
            let mut requests = open.requests.clone();
            let mut request = Request::new(());
            *request.method_mut() = Method::POST;
            *request.version_mut() = Version::HTTP_2;
            *request.uri_mut() = self.0.endpoints[open.endpoint].paths[call as usize].clone();
            *request.headers_mut() = open.headers.clone();
            let sent = match poll_fn(|cx| requests.poll_ready(cx)).await {
                Ok(()) => requests.send_request(request, false),
                Err(error) => Err(error),
            };
            match sent {
                Ok((response, mut send)) => {
                    send.send_data(message, end)?;
                    return Ok((open, response, send));
                }
                Err(error) => {
                    open.end();
                    last = Some(error);
                }
            }
        }
        let reason = last.map(|error| error.to_string()).unwrap_or_default();
        Err(EtcdError::Unreachable(reason))
    }

    /// The connection, made if there is none.
    async fn open(&self) -> Result<Arc<Open>, EtcdError> {
        let shared = &*self.0;
        let current = || shared.current.load_full().filter(|open| !open.is_over.load(Ordering::Relaxed));
        if let Some(open) = current() {
            return Ok(open);
        }
        let mut next = shared.next.lock().await;
        if let Some(open) = current() {
            return Ok(open);
        }
        let mut failure = "no endpoints".to_owned();
        for _ in 0..shared.endpoints.len() {
            let at = *next % shared.endpoints.len();
            *next = at + 1;
            let endpoint = &shared.endpoints[at];
            match tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect(shared.tls.as_ref(), at)).await {
                Ok(Ok(open)) => {
                    shared.current.store(Some(open.clone()));
                    return Ok(open);
                }
                Ok(Err(error)) => failure = format!("{}:{}: {error}", endpoint.host, endpoint.port),
                Err(_) => failure = format!("{}:{} does not answer", endpoint.host, endpoint.port),
            }
        }
        Err(EtcdError::Unreachable(failure))
    }
}

fn tls_config(options: &Options) -> Result<rustls::ClientConfig, EtcdError> {
    let unusable = |error: &dyn std::fmt::Display| EtcdError::Tls(error.to_string());
    let mut roots = rustls::RootCertStore::empty();
    if let Some(file) = &options.etcd_cafile {
        for certificate in read_certificates(file).map_err(|error| unusable(&error))? {
            roots.add(certificate).map_err(|error| unusable(&error))?;
        }
    }
    let builder = rustls::ClientConfig::builder().with_root_certificates(roots);
    let mut config = match (&options.etcd_certfile, &options.etcd_keyfile) {
        (Some(certificate), Some(key)) => {
            let pair = ReloadingKeyPair::load(certificate, key).map_err(|error| unusable(&error))?;
            builder.with_client_cert_resolver(Arc::new(pair))
        }
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// What is said of a call's end, in trailers, or in headers if there is no answer.
fn check_status(headers: &HeaderMap) -> Result<(), EtcdError> {
    let code = match headers.get(GRPC_STATUS).map(HeaderValue::as_bytes) {
        None | Some(b"0") => return Ok(()),
        Some(code) => std::str::from_utf8(code).ok().and_then(|code| code.parse().ok()).unwrap_or(2),
    };
    let message = headers.get(GRPC_MESSAGE).map_or(&b""[..], HeaderValue::as_bytes);
    let message = percent_encoding::percent_decode(message).decode_utf8_lossy().into_owned();
    Err(EtcdError::Refused { code, message })
}

// === impl Endpoint, Open, Waiting ===

impl Endpoint {
    fn parse(server: &str, is_tls: bool) -> Result<Self, EtcdError> {
        let bad = || EtcdError::Endpoint(server.to_owned());
        let url = match server.contains("://") {
            true => server.trim_end_matches('/').to_owned(),
            false => format!("{}://{server}", if is_tls { "https" } else { "http" }),
        };
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let is_tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(bad()),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(bad)?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let mut paths = [const { None }; CALLS.len()];
        for (call, path) in CALLS {
            paths[call as usize] = Some(format!("{url}/{path}").parse::<Uri>().map_err(|_| bad())?);
        }
        let paths = paths.map(Option::unwrap_or_default);
        Ok(Self { host, port, is_tls, paths })
    }

    async fn connect(&self, tls: Option<&TlsConnector>, at: usize) -> std::io::Result<Arc<Open>> {
        let tcp = TcpStream::connect((self.host.as_str(), self.port)).await?;
        // Failing only costs latency.
        let _ = tcp.set_nodelay(true);
        let mut io = Batched::new(tcp);
        match tls.filter(|_| self.is_tls) {
            None => {
                io.start();
                Open::handshake(io, at).await
            }
            Some(tls) => {
                let name = ServerName::try_from(self.host.clone()).map_err(std::io::Error::other)?;
                let mut stream = tls.connect(name, io).await?;
                stream.get_mut().0.start();
                Open::handshake(stream, at).await
            }
        }
    }
}

impl Open {
    async fn handshake<T>(io: T, endpoint: usize) -> std::io::Result<Arc<Self>>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut builder = Builder::new();
        builder.initial_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW).enable_push(false);
        let (requests, connection) = builder.handshake(io).await.map_err(std::io::Error::other)?;
        let headers = [
            (CONTENT_TYPE, "application/grpc"),
            (TE, "trailers"),
            // A member that knows no leader shall say so.
            (HeaderName::from_static("hasleader"), "true"),
        ];
        let headers = headers.into_iter().map(|(name, value)| (name, HeaderValue::from_static(value))).collect();
        let is_over = Arc::new(AtomicBool::new(false));
        tokio::spawn({
            let is_over = is_over.clone();
            async move {
                let reason = drive(connection).await;
                tracing::debug!(reason, "the connection to etcd ended");
                is_over.store(true, Ordering::Relaxed);
            }
        });
        Ok(Arc::new(Self { requests, endpoint, headers, is_over }))
    }

    fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.answered && self.since.elapsed() > PATIENCE {
            self.open.end();
        }
    }
}

/// Keeps a connection going, and gives it up when it is silent. Says why it ended.
async fn drive<T: AsyncRead + AsyncWrite + Unpin>(mut connection: Connection<T, Bytes>) -> String {
    let pings = connection.ping_pong();
    let silent = async {
        let Some(mut pings) = pings else { return std::future::pending().await };
        loop {
            tokio::time::sleep(KEEP_ALIVE_INTERVAL).await;
            match tokio::time::timeout(KEEP_ALIVE_TIMEOUT, pings.ping(Ping::opaque())).await {
                Ok(Ok(_)) => {}
                _ => return "it does not answer".to_owned(),
            }
        }
    };
    tokio::select! {
        biased;
        ended = connection => ended.err().map_or_else(|| "closed".to_owned(), |error| error.to_string()),
        reason = silent => reason,
    }
}

impl From<h2::Error> for EtcdError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            // It was not looked at.
            Some(Reason::REFUSED_STREAM) => Self::Unreachable(error.to_string()),
            _ => Self::Broken(error.to_string()),
        }
    }
}

// === impl Stream, Unread ===

impl Stream {
    pub fn send(&mut self, message: Bytes) -> Result<(), EtcdError> {
        Ok(self.send.send_data(message, false)?)
    }

    /// The next message; None at the end. Cancelling it loses nothing.
    pub async fn message(&mut self) -> Result<Option<Bytes>, EtcdError> {
        loop {
            if let Some(message) = self.unread.next()? {
                return Ok(Some(message));
            }
            let body = match (&mut self.body, &mut self.response) {
                (Some(body), _) => body,
                (None, Some(response)) => {
                    let (head, body) = response.await?.into_parts();
                    self.response = None;
                    check_status(&head.headers)?;
                    self.body.insert(body)
                }
                (None, None) => return Ok(None),
            };
            match body.data().await {
                Some(piece) => {
                    let piece = piece?;
                    let _ = body.flow_control().release_capacity(piece.len());
                    if let Some(message) = self.unread.add(piece)? {
                        return Ok(Some(message));
                    }
                }
                None => {
                    check_status(&body.trailers().await?.unwrap_or_default())?;
                    return Ok(None);
                }
            }
        }
    }
}

impl Unread {
    /// Takes what has come; gives the first message, if it is whole.
    fn add(&mut self, piece: Bytes) -> Result<Option<Bytes>, EtcdError> {
        if self.0.is_empty() && length(&piece)? == Some(piece.len() - PREFIX.min(piece.len())) {
            return Ok(Some(piece.slice(PREFIX..)));
        }
        self.0.extend_from_slice(&piece);
        self.next()
    }

    fn next(&mut self) -> Result<Option<Bytes>, EtcdError> {
        match length(&self.0)? {
            Some(length) if self.0.len() >= PREFIX + length => {
                let message = self.0.split_to(PREFIX + length).freeze().slice(PREFIX..);
                if self.0.is_empty() {
                    self.0 = BytesMut::new();
                }
                Ok(Some(message))
            }
            _ => Ok(None),
        }
    }
}

/// The length of the message that begins here.
fn length(bytes: &[u8]) -> Result<Option<usize>, EtcdError> {
    let Some(([compressed, length @ ..], _)) = bytes.split_first_chunk::<PREFIX>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length) as usize;
    if *compressed != 0 || length > MESSAGE_BYTES_MAX {
        return Err(EtcdError::Broken(format!("a message of {length} bytes, or compressed")));
    }
    Ok(Some(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_whole_however_they_are_cut() {
        let message = |text: &[u8]| [&[0, 0, 0, 0, text.len() as u8], text].concat();
        let sent = [message(b"one"), message(b""), message(b"three")].concat();
        for size in 1..=sent.len() {
            let (mut unread, mut seen) = (Unread::default(), Vec::new());
            for piece in sent.chunks(size) {
                let mut next = unread.add(Bytes::copy_from_slice(piece)).unwrap();
                while let Some(message) = next {
                    seen.push(message);
                    next = unread.next().unwrap();
                }
            }
            assert_eq!(seen, [&b"one"[..], b"", b"three"], "{size}");
        }
        assert!(Unread::default().add(Bytes::from_static(&[1, 0, 0, 0, 0])).is_err());
        assert!(Unread::default().add(Bytes::from_static(&[0, 255, 0, 0, 0])).is_err());
    }

    #[test]
    fn endpoints_are_urls_or_less() {
        for (server, tls, expected) in [
            ("https://127.0.0.1:2379", true, Some(("127.0.0.1", 2379, true))),
            ("http://etcd:2379/", false, Some(("etcd", 2379, false))),
            ("https://[::1]:2379", true, Some(("::1", 2379, true))),
            ("etcd-0:2379", true, Some(("etcd-0", 2379, true))),
            ("etcd-0:2379", false, Some(("etcd-0", 2379, false))),
            ("unix:///run/etcd", false, None),
            ("", false, None),
        ] {
            let parsed = Endpoint::parse(server, tls).ok();
            assert_eq!(parsed.as_ref().map(|e| (e.host.as_str(), e.port, e.is_tls)), expected, "{server}");
        }
        let endpoint = Endpoint::parse("http://e:1", false).unwrap();
        assert_eq!(endpoint.paths[Call::Txn as usize].path(), "/etcdserverpb.KV/Txn");
        assert_eq!(endpoint.paths[Call::Watch as usize].path(), "/etcdserverpb.Watch/Watch");
    }

    #[test]
    fn what_etcd_refuses_has_a_code_and_a_message() {
        let headers = |code: &'static str| {
            let message = (GRPC_MESSAGE, HeaderValue::from_static("mvcc: 100%25 gone"));
            HeaderMap::from_iter([(GRPC_STATUS, HeaderValue::from_static(code)), message])
        };
        assert!(check_status(&HeaderMap::new()).is_ok() && check_status(&headers("0")).is_ok());
        let error = check_status(&headers("11")).unwrap_err();
        assert!(matches!(error, EtcdError::Refused { code: 11, message } if message == "mvcc: 100% gone"));
    }
}
