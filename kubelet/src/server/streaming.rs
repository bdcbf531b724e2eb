//! exec, attach and port-forward. The runtime has a streaming server of its own that speaks SPDY and, for port-forward,
//! WebSocket: those requests are passed straight through. WebSocket clients of exec and attach (v5 and v4, channels in
//! messages) are translated to SPDY here, since runtimes know no half close of stdin over WebSocket; WebSocket clients that
//! tunnel SPDY (kubectl's port-forward) have it unwrapped.

use std::collections::HashMap;

use apimachinery::status::StatusError;
use bytes::{BufMut as _, Bytes, BytesMut};
use component_base::serving::{self, Request, Response};
use futures::{SinkExt as _, StreamExt as _};
use http::header::{CONNECTION, HOST, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use http_body_util::Empty;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use proto::cri as pb;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};
use tracing::debug;

use super::spdy::{Frame, Reader, Writer};
use super::{query_all, query_flag};
use crate::runtime::cri::{Cri, CriError};

/// SPDY's own negotiation of what runs over its streams.
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const V5: &str = "v5.channel.k8s.io";
const V4: &str = "v4.channel.k8s.io";
/// SPDY in messages, for port-forward.
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// Channels of exec and attach by number.
const CHANNELS: [&str; 5] = ["stdin", "stdout", "stderr", "error", "resize"];
const STDIN: u8 = 0;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// v5: the next byte names a channel on which nothing more comes.
const CLOSE: u8 = 255;
/// Frames between the two sides that wait for the slower.
const QUEUE: usize = 32;

fn unavailable(error: &CriError) -> StatusError {
    StatusError::internal(error.to_string())
}

/// Which streams a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

impl Wanted {
    /// From the kubelet's names (`input`, `output`, `error`) or the API's (`stdin`, …).
    fn parse(query: &str) -> Result<Self, StatusError> {
        let either = |a, b| query_flag(query, a) || query_flag(query, b);
        let tty = query_flag(query, "tty");
        let wanted = Self {
            stdin: either("input", "stdin"),
            stdout: either("output", "stdout"),
            // A terminal has one stream for both.
            stderr: either("error", "stderr") && !tty,
            tty,
        };
        if wanted.stdin || wanted.stdout || wanted.stderr {
            Ok(wanted)
        } else {
            Err(StatusError::bad_request("you must specify at least 1 of stdin, stdout, stderr"))
        }
    }
}

pub(super) async fn exec(cri: &Cri, request: Request, id: &str, query: &str) -> Result<Response, StatusError> {
    let wanted = Wanted::parse(query)?;
    let cmd = query_all(query, "command");
    if cmd.is_empty() {
        return Err(StatusError::bad_request("you must specify at least 1 command for the container"));
    }
    let Wanted { stdin, stdout, stderr, tty } = wanted;
    let message = pb::ExecRequest { container_id: id.to_owned(), cmd, tty, stdin, stdout, stderr };
    let url = cri.exec(message).await.map_err(|e| unavailable(&e))?;
    command_streams(request, &url, wanted).await
}

pub(super) async fn attach(
    cri: &Cri,
    request: Request,
    id: &str,
    query: &str,
    tty: bool,
) -> Result<Response, StatusError> {
    let asked = Wanted::parse(query)?;
    let wanted = Wanted { tty, stderr: asked.stderr && !tty, ..asked };
    let Wanted { stdin, stdout, stderr, tty } = wanted;
    let message = pb::AttachRequest { container_id: id.to_owned(), stdin, tty, stdout, stderr };
    let url = cri.attach(message).await.map_err(|e| unavailable(&e))?;
    command_streams(request, &url, wanted).await
}

async fn command_streams(request: Request, url: &str, wanted: Wanted) -> Result<Response, StatusError> {
    if !is_websocket(request.headers()) {
        return pass_through(request, url).await;
    }
    let offered = offered(request.headers());
    let Some(protocol) = [V5, V4].into_iter().find(|p| offered.iter().any(|o| o == p)) else {
        return Err(StatusError::bad_request(format!(
            "none of the WebSocket protocols {offered:?} is spoken here; use {V5} or {V4}"
        )));
    };
    let backend = connect_spdy(url, "v4.channel.k8s.io").await?;
    Ok(accept_websocket(request, protocol, move |client| async move {
        if let Err(error) = translate(client, backend, wanted).await {
            debug!(%error, "stream ended");
        }
    }))
}

pub(super) async fn port_forward(
    cri: &Cri,
    request: Request,
    sandbox: &str,
    query: &str,
) -> Result<Response, StatusError> {
    let ports: Vec<i32> = ["port", "ports"]
        .iter()
        .flat_map(|name| query_all(query, name))
        .flat_map(|list| list.split(',').map(|p| p.trim().parse::<i32>()).collect::<Vec<_>>())
        .collect::<Result<_, _>>()
        .map_err(|_| StatusError::bad_request("port must be a number"))?;
    let url = cri.port_forward(sandbox, ports).await.map_err(|e| unavailable(&e))?;
    if is_websocket(request.headers()) && offered(request.headers()).iter().any(|o| o == TUNNEL) {
        let backend = connect_spdy(&url, "portforward.k8s.io").await?;
        return Ok(accept_websocket(request, TUNNEL, move |client| async move {
            if let Err(error) = unwrap_tunnel(client, backend).await {
                debug!(%error, "tunnel ended");
            }
        }));
    }
    pass_through(request, &url).await
}

fn is_websocket(headers: &HeaderMap) -> bool {
    headers.get(UPGRADE).and_then(|u| u.to_str().ok()).is_some_and(|u| u.eq_ignore_ascii_case("websocket"))
}

fn offered(headers: &HeaderMap) -> Vec<String> {
    headers
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(|p| p.trim().to_owned())
        .collect()
}

// === to the runtime ===

/// Sends an upgrade request to the runtime's streaming server; its answer, upgraded or not.
async fn upgrade_at(
    url: &str,
    method: Method,
    headers: HeaderMap,
) -> Result<http::Response<hyper::body::Incoming>, StatusError> {
    let failed = |error: &dyn std::fmt::Display| {
        StatusError::internal(format!("streaming server of the runtime at {url}: {error}"))
    };
    let target = url::Url::parse(url).map_err(|e| failed(&e))?;
    let host = target.host_str().ok_or_else(|| failed(&"no host"))?;
    let port = target.port_or_known_default().ok_or_else(|| failed(&"no port"))?;
    let stream = TcpStream::connect((host, port)).await.map_err(|e| failed(&e))?;
    let _ = stream.set_nodelay(true);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| failed(&e))?;
    tokio::spawn(connection.with_upgrades());
    let mut path = target.path().to_owned();
    if let Some(query) = target.query() {
        path = format!("{path}?{query}");
    }
    let mut request =
        http::Request::builder().method(method).uri(path).body(Empty::<Bytes>::new()).map_err(|e| failed(&e))?;
    *request.headers_mut() = headers;
    let authority = HeaderValue::from_str(&format!("{host}:{port}")).map_err(|e| failed(&e))?;
    request.headers_mut().insert(HOST, authority);
    sender.send_request(request).await.map_err(|e| failed(&e))
}

/// Joins the client with the runtime's server, whatever they speak.
async fn pass_through(mut request: Request, url: &str) -> Result<Response, StatusError> {
    if !request.headers().contains_key(UPGRADE) {
        return Err(StatusError::bad_request("unable to upgrade: missing upgrade headers in request"));
    }
    let mut headers = request.headers().clone();
    // Those are the kubelet's, not the runtime's.
    headers.remove(http::header::AUTHORIZATION);
    let answer = upgrade_at(url, request.method().clone(), headers).await?;
    let mut response = http::Response::new(serving::full(Bytes::new()));
    *response.status_mut() = answer.status();
    *response.headers_mut() = answer.headers().clone();
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        use http_body_util::BodyExt as _;
        let body = answer.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        response.headers_mut().remove(http::header::TRANSFER_ENCODING);
        *response.body_mut() = serving::full(body);
        return Ok(response);
    }
    let client = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let (Ok(client), Ok(server)) = tokio::join!(client, hyper::upgrade::on(answer)) else { return };
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut server).await {
            debug!(%error, "stream ended");
        }
    });
    Ok(response)
}

/// A SPDY connection to the runtime's server.
async fn connect_spdy(url: &str, protocol: &'static str) -> Result<Upgraded, StatusError> {
    let mut headers = HeaderMap::new();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("SPDY/3.1"));
    headers.insert(STREAM_PROTOCOL, HeaderValue::from_static(protocol));
    let answer = upgrade_at(url, Method::POST, headers).await?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(StatusError::internal(format!("the runtime's streaming server answered {}", answer.status())));
    }
    hyper::upgrade::on(answer).await.map_err(|e| StatusError::internal(e.to_string()))
}

// === to the client ===

/// Answers the handshake; `run` gets the connection once the client has it.
fn accept_websocket<F, Fut>(mut request: Request, protocol: &'static str, run: F) -> Response
where
    F: FnOnce(WebSocketStream<TokioIo<Upgraded>>) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send,
{
    let Some(key) = request.headers().get(SEC_WEBSOCKET_KEY).cloned() else {
        return serving::text(StatusCode::BAD_REQUEST, "missing Sec-WebSocket-Key");
    };
    let mut response = http::Response::new(serving::full(Bytes::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    }
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                run(WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await).await
            }
            Err(error) => debug!(%error, "WebSocket handshake not finished"),
        }
    });
    response
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Channels in messages on the client's side, streams on the runtime's.
async fn translate(
    client: WebSocketStream<TokioIo<Upgraded>>,
    backend: Upgraded,
    wanted: Wanted,
) -> Result<(), BoxError> {
    let (read, write) = tokio::io::split(TokioIo::new(backend));
    let mut writer = Writer::new(write);
    let mut ids: HashMap<u8, u32> = HashMap::new();
    // The order in which Kubernetes' own client opens them.
    for (channel, open) in
        [(ERROR, true), (STDIN, wanted.stdin), (1, wanted.stdout), (2, wanted.stderr), (RESIZE, wanted.tty)]
    {
        if open {
            let kind = CHANNELS[usize::from(channel)];
            ids.insert(channel, writer.open(&[("streamtype", kind)]).await?);
        }
    }
    // Nothing is sent on the error stream from here.
    writer.finish(ids[&ERROR]).await?;
    let channels: HashMap<u32, u8> = ids.iter().map(|(channel, id)| (*id, *channel)).collect();
    let (frames, mut incoming) = mpsc::channel(QUEUE);
    let reading = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        let mut reader = Reader::new(read);
        while let Ok(Some(frame)) = reader.next().await {
            if frames.send(frame).await.is_err() {
                return;
            }
        }
    }));

    let (mut to_client, mut from_client) = client.split();
    // For a client that shows only what comes, the first message says that the channels are there.
    let mut open: std::collections::HashSet<u8> = ids.keys().copied().filter(|c| (1..=ERROR).contains(c)).collect();
    let mut client_gone = false;
    while !open.is_empty() {
        tokio::select! {
            frame = incoming.recv() => match frame {
                Some(Frame::Data { stream, data, fin }) => {
                    let Some(channel) = channels.get(&stream).copied() else { continue };
                    if !data.is_empty() {
                        let mut message = BytesMut::with_capacity(data.len() + 1);
                        message.put_u8(channel);
                        message.put_slice(&data);
                        to_client.send(Message::Binary(message.freeze())).await?;
                    }
                    if fin {
                        open.remove(&channel);
                    }
                }
                Some(Frame::Reset { stream }) => {
                    if let Some(channel) = channels.get(&stream) {
                        open.remove(channel);
                    }
                }
                Some(Frame::Ping(id)) => writer.pong(id).await?,
                Some(Frame::Other) => {}
                Some(Frame::GoAway) | None => break,
            },
            message = from_client.next(), if !client_gone => match message {
                Some(Ok(Message::Binary(data))) => from_message(&mut writer, &ids, &data).await?,
                Some(Ok(Message::Text(text))) => from_message(&mut writer, &ids, text.as_bytes()).await?,
                Some(Ok(Message::Close(_))) | None | Some(Err(_)) => {
                    // The process loses its client: end the runtime's connection, which ends the streams.
                    client_gone = true;
                    break;
                }
                Some(Ok(_)) => {}
            },
        }
    }
    drop(reading);
    if !client_gone {
        // Clients take anything but a normal closure for a failure.
        let _ = to_client.send(Message::Close(Some(normal_closure()))).await;
        let _ = to_client.close().await;
    }
    Ok(())
}

fn normal_closure() -> CloseFrame {
    CloseFrame { code: CloseCode::Normal, reason: "".into() }
}

async fn from_message<W>(writer: &mut Writer<W>, ids: &HashMap<u8, u32>, data: &[u8]) -> Result<(), BoxError>
where
    W: tokio::io::AsyncWrite + Unpin,
{
    match data {
        [CLOSE, channel] => {
            if let Some(id) = ids.get(channel) {
                writer.finish(*id).await?;
            }
        }
        [channel @ (STDIN | RESIZE), data @ ..] if !data.is_empty() => {
            if let Some(id) = ids.get(channel) {
                writer.data(*id, data).await?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// SPDY's bytes out of messages, and back into them.
async fn unwrap_tunnel(client: WebSocketStream<TokioIo<Upgraded>>, backend: Upgraded) -> Result<(), BoxError> {
    let (mut read, mut write) = tokio::io::split(TokioIo::new(backend));
    let (mut to_client, mut from_client) = client.split();
    let outward = async {
        let mut block = BytesMut::with_capacity(32 << 10);
        while read.read_buf(&mut block).await? > 0 {
            to_client.send(Message::Binary(block.split().freeze())).await?;
        }
        let _ = to_client.send(Message::Close(Some(normal_closure()))).await;
        Ok::<(), BoxError>(())
    };
    let inward = async {
        while let Some(message) = from_client.next().await {
            match message? {
                Message::Binary(data) => write.write_all(&data).await?,
                Message::Close(_) => break,
                _ => {}
            }
        }
        write.shutdown().await?;
        Ok::<(), BoxError>(())
    };
    tokio::select! {
        // Either side's end is the end of both: SPDY has closed its streams by then.
        done = outward => done,
        done = inward => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_least_one_stream_must_be_wanted() {
        assert!(Wanted::parse("command=x").is_err());
        let kubelet = Wanted::parse("input=1&output=1&error=1").unwrap();
        assert_eq!(kubelet, Wanted::parse("stdin=true&stdout=true&stderr=true").unwrap());
        assert!(!Wanted::parse("output=1&error=1&tty=1").unwrap().stderr);
    }

    #[tokio::test]
    async fn messages_become_frames() {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        let ids = [(STDIN, 3), (ERROR, 1)].into();
        from_message(&mut writer, &ids, &[0, b'a']).await.unwrap();
        from_message(&mut writer, &ids, &[255, 0]).await.unwrap();
        from_message(&mut writer, &ids, &[1, b'x']).await.unwrap();
        from_message(&mut writer, &ids, &[]).await.unwrap();
        assert_eq!(bytes, [0, 0, 0, 3, 0, 0, 0, 1, b'a', 0, 0, 0, 3, 1, 0, 0, 0]);
    }
}
