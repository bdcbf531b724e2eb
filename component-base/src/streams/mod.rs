//! exec, attach and port-forward between those who speak WebSocket and those who speak SPDY. Channels in messages (v5 and v4)
//! become SPDY's streams, with the half close of stdin that v5 has; SPDY in messages (a port-forward's tunnel) is unwrapped.

mod spdy;

use apimachinery::status::StatusError;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::{SinkExt as _, Stream, StreamExt as _};
use http::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use spdy::{Frame, Reader, Writer};
use std::collections::{HashMap, HashSet};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};
use tracing::debug;

/// Channels in messages; v5 can half close them.
pub const V5: &str = "v5.channel.k8s.io";
pub const V4: &str = "v4.channel.k8s.io";
/// SPDY in messages, for port-forward.
pub const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// Bytes of one stream in messages, for logs.
pub const BINARY: &str = "binary.k8s.io";
/// What runs over SPDY's streams: a command, or connections to ports.
pub const COMMAND: &str = "v4.channel.k8s.io";
pub const PORT_FORWARD: &str = "portforward.k8s.io";
/// SPDY's own negotiation of what runs over its streams.
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
/// Channels of exec and attach by number.
const CHANNELS: [&str; 5] = ["stdin", "stdout", "stderr", "error", "resize"];
const STDIN: u8 = 0;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// v5: the next byte names a channel on which nothing more comes.
const CLOSE: u8 = 255;
/// Frames between the two sides that wait for the slower.
const QUEUE: usize = 32;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A WebSocket client whose handshake was answered.
pub type Client = WebSocketStream<TokioIo<Upgraded>>;

/// Which streams a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

impl Wanted {
    /// From the kubelet's names (`input`, `output`, `error`) or the API's (`stdin`, …).
    pub fn parse(query: &str) -> Result<Self, &'static str> {
        let flag = |name: &str| {
            let given = url::form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == name);
            given.is_some_and(|(_, value)| matches!(&*value, "1" | "true" | "t" | "T" | "TRUE" | "True"))
        };
        let either = |a, b| flag(a) || flag(b);
        let tty = flag("tty");
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
            Err("you must specify at least 1 of stdin, stdout, stderr")
        }
    }
}

pub fn is_websocket(headers: &HeaderMap) -> bool {
    headers.get(UPGRADE).and_then(|u| u.to_str().ok()).is_some_and(|u| u.eq_ignore_ascii_case("websocket"))
}

/// The first of the protocols that a WebSocket client offers.
pub fn chosen(headers: &HeaderMap, protocols: &[&'static str]) -> Option<&'static str> {
    let lines = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|line| line.to_str().ok());
    let offered: Vec<&str> = lines.flat_map(|line| line.split(',')).map(str::trim).collect();
    protocols.iter().copied().find(|protocol| is_websocket(headers) && offered.contains(protocol))
}

/// What asks a server for SPDY.
pub fn spdy_headers(protocol: &'static str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("SPDY/3.1"));
    headers.insert(STREAM_PROTOCOL, HeaderValue::from_static(protocol));
    headers
}

/// Answers the handshake; `run` gets the connection once the client has it.
pub fn accept<F, Fut>(
    mut request: http::Request<Incoming>,
    protocol: &'static str,
    run: F,
) -> Result<http::Response<()>, StatusError>
where
    F: FnOnce(Client) -> Fut + Send + 'static,
    Fut: Future<Output = Result<(), BoxError>> + Send,
{
    let key = request.headers().get(SEC_WEBSOCKET_KEY).cloned();
    let key = key.ok_or_else(|| StatusError::bad_request("missing Sec-WebSocket-Key"))?;
    let mut response = http::Response::new(());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    }
    let upgrade = hyper::upgrade::on(&mut request);
    // Ends with the connection; nobody else owns it.
    tokio::spawn(async move {
        let upgraded = match upgrade.await {
            Ok(upgraded) => upgraded,
            Err(error) => return debug!(%error, "WebSocket handshake not finished"),
        };
        let client = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
        if let Err(error) = run(client).await {
            debug!(%error, "stream ended");
        }
    });
    Ok(response)
}

/// Sends what comes, until it ends or the client goes.
pub async fn send_bytes<S, E>(mut client: Client, chunks: S) -> Result<(), BoxError>
where
    S: Stream<Item = Result<Bytes, E>> + Send,
    E: Into<BoxError>,
{
    let mut chunks = std::pin::pin!(chunks);
    loop {
        let chunk = tokio::select! {
            chunk = chunks.next() => chunk,
            // Its pings are answered by reading them.
            heard = client.next() => match heard {
                Some(Ok(message)) if !message.is_close() => continue,
                _ => return Ok(()),
            },
        };
        match chunk {
            Some(chunk) => client.send(Message::binary(chunk.map_err(Into::into)?)).await?,
            None => return Ok(client.close(None).await?),
        }
    }
}

/// Channels in messages on the client's side, streams on the runtime's.
pub async fn translate(client: Client, backend: Upgraded, wanted: Wanted) -> Result<(), BoxError> {
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
    let mut open: HashSet<u8> = ids.keys().copied().filter(|c| (1..=ERROR).contains(c)).collect();
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
pub async fn unwrap_tunnel(client: Client, backend: Upgraded) -> Result<(), BoxError> {
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
