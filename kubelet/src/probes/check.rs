//! One check of a container: run a command, ask over HTTP, TCP or gRPC. Shared by probes and lifecycle hooks.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use component_base::tls::AnyCertificate;
use http::header::{ACCEPT, CONNECTION, HOST, LOCATION, USER_AGENT};
use http::{HeaderName, HeaderValue, Request, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, ExecAction, GRPCAction, HTTPGetAction, TCPSocketAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proto::health::health_client::HealthClient;
use proto::health::{HealthCheckRequest, health_check_response::ServingStatus};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tonic::Code;
use tonic::transport::Endpoint;

use crate::runtime::cri::{Cri, CriError};

/// What is read of an answer's body.
const MAX_BODY_BYTES: usize = 10 << 10;
/// What of an output goes into an event.
const MAX_OUTPUT_CHARS: usize = 1024;
const MAX_REDIRECTS: usize = 10;

/// What a check found. `Err` is what went wrong so that nothing was found out: "unknown".
pub type Checked = Result<Outcome, String>;

/// As `probe.Result`, with what to tell people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Success,
    /// It counts as success, but something is odd.
    Warning(String),
    Failure(String),
}

use Outcome::{Failure, Success, Warning};

/// Runs `action` in a container: success is exit code 0 in time.
pub async fn exec(cri: &Cri, container_id: &str, action: &ExecAction, timeout: Duration) -> Checked {
    let command = action.command.clone().unwrap_or_default();
    match cri.exec_sync(container_id, command.clone(), timeout).await {
        Ok(answer) if answer.exit_code == 0 => Ok(Success),
        Ok(answer) => {
            let mut text = String::from_utf8_lossy(&answer.stdout).into_owned();
            text.push_str(&String::from_utf8_lossy(&answer.stderr));
            Ok(Failure(shorten(&text)))
        }
        Err(CriError::Call { status, .. }) if status.code() == Code::DeadlineExceeded => {
            let command = shorten(&command.join(" "));
            Ok(Failure(format!("command timed out: {command:?} timed out after {timeout:?}")))
        }
        Err(error) => Err(shorten(&error.message())),
    }
}

/// The number of a port that may be named in the container.
pub fn port(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => match container.ports.iter().flatten().find(|p| p.name.as_ref() == Some(name)) {
            Some(found) => found.container_port,
            None => name.parse().map_err(|_| format!("strconv.Atoi: parsing {name:?}: invalid syntax"))?,
        },
    };
    u16::try_from(number).ok().filter(|n| *n > 0).ok_or_else(|| format!("invalid port number: {number}"))
}

/// Connects.
pub async fn tcp(action: &TCPSocketAction, container: &Container, pod_ip: &str, timeout: Duration) -> Checked {
    let host = action.host.as_deref().filter(|h| !h.is_empty()).unwrap_or(pod_ip);
    let port = port(&action.port, container)?;
    match tokio::time::timeout(timeout, TcpStream::connect((host, port))).await {
        Ok(Ok(_)) => Ok(Success),
        Ok(Err(error)) => Ok(Failure(format!("dial tcp {}: connect: {}", join(host, port), lower(&error)))),
        Err(_) => Ok(Failure(format!("dial tcp {}: i/o timeout", join(host, port)))),
    }
}

/// Asks a gRPC server for its health.
pub async fn grpc(action: &GRPCAction, pod_ip: &str, timeout: Duration) -> Checked {
    let port = u16::try_from(action.port).map_err(|_| format!("invalid port number: {}", action.port))?;
    let address = join(pod_ip, port);
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|e| e.to_string())?;
    let endpoint = endpoint.user_agent("kube-probe/1.36").map_err(|e| e.to_string())?;
    let late = || format!("timeout: health rpc did not complete within {timeout:?}");
    let ask = async {
        let channel = endpoint.connect().await.map_err(|_| {
            format!("timeout: failed to connect service {address:?} within {timeout:?}: context deadline exceeded")
        })?;
        let service = action.service.clone().unwrap_or_default();
        let answer = HealthClient::new(channel).check(HealthCheckRequest { service }).await;
        answer.map_err(|status| match status.code() {
            Code::Unimplemented => format!(
                "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}",
                status.message()
            ),
            Code::DeadlineExceeded => late(),
            code => format!("error: health rpc probe failed: rpc error: code = {code:?} desc = {}", status.message()),
        })
    };
    let answer = match tokio::time::timeout(timeout, ask).await {
        Err(_) => return Ok(Failure(late())),
        Ok(Err(failure)) => return Ok(Failure(failure)),
        Ok(Ok(answer)) => answer,
    };
    Ok(match answer.into_inner().status() {
        ServingStatus::Serving => Success,
        other => Failure(format!("service unhealthy (responded with {:?})", other.as_str_name())),
    })
}

/// GETs: a status from 200 to 399 is success. Redirects are followed on the same host only.
pub async fn http(action: &HTTPGetAction, container: &Container, pod_ip: &str, timeout: Duration) -> Checked {
    let tls = action.scheme.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("https"));
    let host = action.host.as_deref().filter(|h| !h.is_empty()).unwrap_or(pod_ip).to_owned();
    let port = port(&action.port, container)?;
    let path = action.path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/");
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let mut target = Target { tls, host, port, path };
    let first = target.url();
    let ask = async {
        for _ in 0..MAX_REDIRECTS {
            let (status, location, body) = match get(&target, action).await {
                Ok(answer) => answer,
                Err(failure) => return Ok(Failure(failure)),
            };
            let next = location.filter(|_| matches!(status, 301 | 302 | 303 | 307 | 308));
            match (status, next.and_then(|l| target.redirected(&l))) {
                (_, Some(next)) => target = next,
                (200..=299, None) => return Ok(Success),
                // Elsewhere: the container did answer.
                (300..=399, None) => {
                    let body = shorten(&String::from_utf8_lossy(&body));
                    return Ok(Warning(format!("Probe terminated redirects, Response body: {body}")));
                }
                _ => {
                    tracing::debug!(status, body = %String::from_utf8_lossy(&body), "HTTP check failed");
                    return Ok(Failure(format!("HTTP probe failed with statuscode: {status}")));
                }
            }
        }
        Ok(Failure(format!("Get {first:?}: stopped after {MAX_REDIRECTS} redirects")))
    };
    tokio::time::timeout(timeout, ask).await.unwrap_or_else(|_| {
        let late = "context deadline exceeded (Client.Timeout exceeded while awaiting headers)";
        Ok(Failure(format!("Get {first:?}: {late}")))
    })
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    tls: bool,
    host: String,
    port: u16,
    path: String,
}

impl Target {
    fn url(&self) -> String {
        format!("{}://{}{}", if self.tls { "https" } else { "http" }, join(&self.host, self.port), self.path)
    }

    /// Where a redirect leads, if it stays on this host.
    fn redirected(&self, location: &str) -> Option<Target> {
        let base = url::Url::parse(&self.url()).ok()?;
        let next = base.join(location).ok()?;
        if next.host_str() != base.host_str() {
            return None;
        }
        let tls = next.scheme() == "https";
        let query = next.query().map(|q| format!("?{q}")).unwrap_or_default();
        Some(Target {
            tls,
            host: self.host.clone(),
            port: next.port_or_known_default()?,
            path: format!("{}{query}", next.path()),
        })
    }
}

async fn get(target: &Target, action: &HTTPGetAction) -> Result<(u16, Option<String>, Bytes), String> {
    let url = target.url();
    let failed = |error: &dyn std::fmt::Display| format!("Get {url:?}: {error}");
    let stream = TcpStream::connect((target.host.as_str(), target.port))
        .await
        .map_err(|e| failed(&format!("dial tcp {}: connect: {}", join(&target.host, target.port), lower(&e))))?;
    let uri: Uri = target.path.parse().map_err(|e| failed(&e))?;
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = uri;
    let headers = request.headers_mut();
    let own = join(&target.host, target.port);
    headers.insert(HOST, HeaderValue::from_str(&own).map_err(|e| failed(&e))?);
    headers.insert(USER_AGENT, HeaderValue::from_static("kube-probe/1.36"));
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    for header in action.http_headers.iter().flatten() {
        let name = HeaderName::from_bytes(header.name.as_bytes()).map_err(|e| failed(&e))?;
        headers.insert(name, HeaderValue::from_str(&header.value).map_err(|e| failed(&e))?);
    }
    let response = if target.tls {
        let name = ServerName::try_from(target.host.clone()).map_err(|e| failed(&e))?;
        let connector = tokio_rustls::TlsConnector::from(trusting_client());
        let stream = connector.connect(name, stream).await.map_err(|e| failed(&e))?;
        send(TokioIo::new(stream), request).await
    } else {
        send(TokioIo::new(stream), request).await
    };
    let (parts, body) = response.map_err(|e| if e.is_incomplete_message() { failed(&"EOF") } else { failed(&e) })?;
    let location = parts.headers.get(LOCATION).and_then(|l| l.to_str().ok()).map(str::to_owned);
    Ok((parts.status.as_u16(), location, body))
}

async fn send<I>(io: I, request: Request<Empty<Bytes>>) -> Result<(http::response::Parts, Bytes), hyper::Error>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    let connection = tokio::spawn(connection);
    let result = async {
        let (parts, body) = sender.send_request(request).await?.into_parts();
        // Only the status matters; a long body is not read to its end.
        let body = Limited::new(body, MAX_BODY_BYTES).collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        Ok((parts, body))
    }
    .await;
    connection.abort();
    result
}

/// Probes do not check the certificates of what they probe.
fn trusting_client() -> Arc<rustls::ClientConfig> {
    static CLIENT: std::sync::OnceLock<Arc<rustls::ClientConfig>> = std::sync::OnceLock::new();
    CLIENT
        .get_or_init(|| {
            let builder = rustls::ClientConfig::builder()
                .dangerous()
                .with_custom_certificate_verifier(AnyCertificate::new())
                .with_no_client_auth();
            Arc::new(builder)
        })
        .clone()
}

fn join(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn lower(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        std::io::ErrorKind::HostUnreachable => "no route to host".to_owned(),
        _ => error.to_string(),
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(MAX_OUTPUT_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_followed_on_the_same_host() {
        let target = Target { tls: false, host: "10.0.0.1".into(), port: 80, path: "/a".into() };
        assert_eq!(target.redirected("/b?x=1").unwrap().path, "/b?x=1");
        assert_eq!(target.redirected("http://10.0.0.1:81/c").unwrap().port, 81);
        assert_eq!(target.redirected("http://example.com/"), None);
    }

    #[test]
    fn ports_are_numbers_or_names() {
        let container: Container =
            serde_json::from_value(serde_json::json!({"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}))
                .unwrap();
        assert_eq!(port(&IntOrString::Int(80), &container), Ok(80));
        assert_eq!(port(&IntOrString::String("web".into()), &container), Ok(8080));
        assert!(port(&IntOrString::String("db".into()), &container).is_err());
        assert!(port(&IntOrString::Int(0), &container).is_err());
    }

    /// Answers one request with `answer`, and says where.
    async fn answering(answer: &'static str) -> u16 {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        port
    }

    #[tokio::test]
    async fn answers_over_http_are_told_as_kubernetes_does() {
        let container: Container = serde_json::from_value(serde_json::json!({"name": "c"})).unwrap();
        let action = |port: u16| HTTPGetAction { port: IntOrString::Int(i32::from(port)), ..Default::default() };
        for (answer, want) in [
            ("HTTP/1.1 204 No Content\r\n\r\n", Success),
            ("HTTP/1.1 500 No\r\n\r\nwhy", Failure("HTTP probe failed with statuscode: 500".into())),
            (
                "HTTP/1.1 302 Found\r\nLocation: http://example.com/\r\n\r\naway",
                Warning("Probe terminated redirects, Response body: away".into()),
            ),
            ("", Failure("Get \"http://127.0.0.1:PORT/\": EOF".into())),
        ] {
            let port = answering(answer).await;
            let got = http(&action(port), &container, "127.0.0.1", Duration::from_secs(30)).await.unwrap();
            let got = format!("{got:?}").replace(&port.to_string(), "PORT");
            assert_eq!(got, format!("{want:?}"));
        }
        let unnamed = HTTPGetAction { port: IntOrString::String("web".into()), ..Default::default() };
        assert_eq!(
            http(&unnamed, &container, "127.0.0.1", Duration::from_secs(1)).await,
            Err("strconv.Atoi: parsing \"web\": invalid syntax".to_owned())
        );
    }
}
