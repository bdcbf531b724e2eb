//! Requests over one HTTP/2 connection, which is made anew when it has ended: no pool, and no task or channel for a request.
//! A server that speaks no HTTP/2 is asked in another way from then on.
use crate::batched::Batched;
use bytes::Bytes;
use futures::future::BoxFuture;
use h2::client::{Connection, SendRequest};
use http::{HeaderValue, Request, Response, header::CONTENT_LENGTH};
use http_body::Frame;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::{Client as Http1, connect::HttpConnector};
use kube::client::Body;
use parking_lot::RwLock;
use rustls_pki_types::ServerName;
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    net::TcpStream,
    sync::Mutex,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tower::BoxError;
use tracing::debug;

/// What the server may send ahead, on one stream and on the connection. The latter is ample: hundreds of watches that wait
/// for a connection's window starve each other.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
/// A connection that does not answer a ping this long is given up.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(15);
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// For servers that speak no HTTP/2.
pub type Fallback = Http1<HttpsConnector<HttpConnector>, Body>;

/// See the module. Clones share the connection.
#[derive(Clone)]
pub struct Transport(Arc<Shared>);

/// A server that may speak HTTP/2.
pub struct Server {
    pub host: String,
    pub port: u16,
    /// By which its certificate knows it.
    pub name: ServerName<'static>,
    /// Offers HTTP/2.
    pub tls: Arc<rustls::ClientConfig>,
}

struct Shared {
    server: Option<Server>,
    fallback: Fallback,
    state: RwLock<State>,
    /// Held by who connects.
    connecting: Mutex<()>,
}

#[derive(Clone)]
enum State {
    None,
    Open(SendRequest<Bytes>),
    /// The server has no HTTP/2.
    Old,
}

impl Transport {
    pub fn new(server: Option<Server>, fallback: Fallback) -> Self {
        let state = RwLock::new(if server.is_some() { State::None } else { State::Old });
        Self(Arc::new(Shared { server, fallback, state, connecting: Mutex::default() }))
    }
}

impl Shared {
    /// A connection that takes a request, or None where there are no such connections.
    async fn sender(&self) -> Result<Option<SendRequest<Bytes>>, BoxError> {
        if let Some(known) = self.known().await {
            return Ok(known);
        }
        let _alone = self.connecting.lock().await;
        if let Some(known) = self.known().await {
            return Ok(known);
        }
        let state = self.connect().await?;
        *self.state.write() = state.clone();
        Ok(match state {
            State::Open(sender) => Some(sender),
            State::None | State::Old => None,
        })
    }

    /// None if it is to be made.
    async fn known(&self) -> Option<Option<SendRequest<Bytes>>> {
        let state = self.state.read().clone();
        match state {
            State::Open(sender) => sender.ready().await.ok().map(Some),
            State::Old => Some(None),
            State::None => None,
        }
    }

    async fn connect(&self) -> Result<State, BoxError> {
        let Some(server) = &self.server else { return Ok(State::Old) };
        let socket = TcpStream::connect((server.host.as_str(), server.port));
        let socket = timeout(CONNECT_TIMEOUT, socket).await.map_err(|_| timed_out())??;
        socket.set_nodelay(true)?;
        let tls = TlsConnector::from(server.tls.clone()).connect(server.name.clone(), Batched::new(socket));
        let mut stream = timeout(HANDSHAKE_TIMEOUT, tls).await.map_err(|_| timed_out())??;
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Ok(State::Old);
        }
        stream.get_mut().0.start();
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW).enable_push(false);
        let (sender, connection) =
            timeout(HANDSHAKE_TIMEOUT, builder.handshake(stream)).await.map_err(|_| timed_out())??;
        tokio::spawn(drive(connection));
        Ok(State::Open(sender.ready().await?))
    }
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the server does not answer")
}

/// Carries the connection on until it ends, or a ping remains without an answer.
async fn drive(mut connection: Connection<TlsStream<Batched<TcpStream>>, Bytes>) {
    let pings = connection.ping_pong();
    let watch = async {
        let Some(mut pings) = pings else { return std::future::pending().await };
        loop {
            sleep(PING_INTERVAL).await;
            match timeout(PING_TIMEOUT, pings.ping(h2::Ping::opaque())).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => break debug!(%error, "connection lost"),
                Err(_) => break debug!("no answer to a ping: the connection is given up"),
            }
        }
    };
    tokio::select! {
        biased;
        ended = connection => if let Err(error) = ended { debug!(%error, "connection ended") },
        () = watch => {}
    }
}

impl tower::Service<Request<Body>> for Transport {
    type Response = Response<Received>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Received>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let shared = self.0.clone();
        Box::pin(async move {
            let Some(mut sender) = shared.sender().await? else {
                return Ok(shared.fallback.request(request).await?.map(Received::Http1));
            };
            let (mut head, body) = request.into_parts();
            let body = body.collect().await?.to_bytes();
            if !body.is_empty() {
                head.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
            }
            let (response, mut stream) = sender.send_request(Request::from_parts(head, ()), body.is_empty())?;
            if !body.is_empty() {
                stream.send_data(body, true)?;
            }
            Ok(response.await?.map(Received::Http2))
        })
    }
}

/// What comes in answer.
pub enum Received {
    Http1(Incoming),
    Http2(h2::RecvStream),
}

impl http_body::Body for Received {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let stream = match self.get_mut() {
            Self::Http1(body) => return Pin::new(body).poll_frame(cx).map_err(BoxError::from),
            Self::Http2(stream) => stream,
        };
        Poll::Ready(match ready!(stream.poll_data(cx)) {
            Some(Ok(piece)) => {
                // It is read: as much may come again. That fails when the stream has ended, and then nothing will.
                let _ = stream.flow_control().release_capacity(piece.len());
                Some(Ok(Frame::data(piece)))
            }
            // The server has said all that it had to.
            Some(Err(error)) if error.reason() == Some(h2::Reason::NO_ERROR) => None,
            Some(Err(error)) => Some(Err(error.into())),
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(stream) => stream.is_end_stream(),
        }
    }
}
