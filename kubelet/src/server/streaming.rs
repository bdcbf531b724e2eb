//! exec, attach and port-forward. The runtime has a streaming server of its own that speaks SPDY and, for port-forward,
//! WebSocket: those requests are passed straight through. WebSocket clients of exec and attach (v5 and v4, channels in
//! messages) are translated to SPDY, since runtimes know no half close of stdin over WebSocket; WebSocket clients that tunnel
//! SPDY (kubectl's port-forward) have it unwrapped: see `component_base::streams`.

use apimachinery::status::StatusError;
use bytes::Bytes;
use component_base::serving::{self, Request, Response};
use component_base::streams::{self, TUNNEL, V4, V5, Wanted};
use http::header::{HOST, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_body_util::Empty;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use proto::cri as pb;
use tokio::net::TcpStream;
use tracing::debug;

use super::query_all;
use crate::runtime::cri::{Cri, CriError};

fn unavailable(error: &CriError) -> StatusError {
    StatusError::internal(error.to_string())
}

pub(super) async fn exec(cri: &Cri, request: Request, id: &str, query: &str) -> Result<Response, StatusError> {
    let wanted = Wanted::parse(query).map_err(StatusError::bad_request)?;
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
    let asked = Wanted::parse(query).map_err(StatusError::bad_request)?;
    let wanted = Wanted { tty, stderr: asked.stderr && !tty, ..asked };
    let Wanted { stdin, stdout, stderr, tty } = wanted;
    let message = pb::AttachRequest { container_id: id.to_owned(), stdin, tty, stdout, stderr };
    let url = cri.attach(message).await.map_err(|e| unavailable(&e))?;
    command_streams(request, &url, wanted).await
}

async fn command_streams(request: Request, url: &str, wanted: Wanted) -> Result<Response, StatusError> {
    if !streams::is_websocket(request.headers()) {
        return pass_through(request, url).await;
    }
    let Some(protocol) = streams::chosen(request.headers(), &[V5, V4]) else {
        return Err(StatusError::bad_request(format!(
            "no WebSocket protocol is offered that is spoken here: {V5}, {V4}"
        )));
    };
    let backend = connect_spdy(url, streams::COMMAND).await?;
    let answer = streams::accept(request, protocol, move |client| streams::translate(client, backend, wanted));
    Ok(answer?.map(|()| serving::full(Bytes::new())))
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
    if let Some(protocol) = streams::chosen(request.headers(), &[TUNNEL]) {
        let backend = connect_spdy(&url, streams::PORT_FORWARD).await?;
        let answer = streams::accept(request, protocol, move |client| streams::unwrap_tunnel(client, backend));
        return Ok(answer?.map(|()| serving::full(Bytes::new())));
    }
    pass_through(request, &url).await
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
    let answer = upgrade_at(url, Method::POST, streams::spdy_headers(protocol)).await?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(StatusError::internal(format!("the runtime's streaming server answered {}", answer.status())));
    }
    hyper::upgrade::on(answer).await.map_err(|e| StatusError::internal(e.to_string()))
}
