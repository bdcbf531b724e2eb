//! One request to a backend, over a connection of its own: plain or TLS, HTTP/1.1, upgraded if the backend agrees.

use super::target::Address;
use crate::options::Options;
use crate::server::body::Body;
use apimachinery::status::StatusError;
use component_base::tls::AnyCertificate;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{PrivateKeyDer, ServerName};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// To reach the backend and agree on TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a backend did not answer.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("dial tcp {address}: {reason}")]
    Dial { address: String, reason: String },
    #[error("tls: {0}")]
    Tls(String),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// It is the client's fault.
    #[error("{0}")]
    Client(#[from] StatusError),
}

/// How backends are spoken to: whose certificate we show, and whose we believe.
#[derive(Clone, Default)]
pub struct Credentials {
    /// Certificate and key, read for each connection: they may be renewed.
    client: Option<(PathBuf, PathBuf)>,
    /// Without one, any serving certificate is taken.
    authority: Option<PathBuf>,
}

// === impl Credentials ===

impl Credentials {
    /// For kubelets.
    pub fn for_kubelets(options: &Options) -> Self {
        let client = options.kubelet_client_certificate.clone().zip(options.kubelet_client_key.clone());
        Self { client, authority: options.kubelet_certificate_authority.clone() }
    }

    fn config(&self) -> Result<ClientConfig, TransportError> {
        let tls = |error: &dyn std::fmt::Display| TransportError::Tls(error.to_string());
        let builder = ClientConfig::builder();
        let builder = match &self.authority {
            Some(path) => {
                let mut roots = rustls::RootCertStore::empty();
                for authority in component_base::tls::read_certificates(path).map_err(|e| tls(&e))? {
                    roots.add(authority).map_err(|e| tls(&e))?;
                }
                builder.with_root_certificates(roots)
            }
            None => builder.dangerous().with_custom_certificate_verifier(AnyCertificate::new()),
        };
        match &self.client {
            Some((certificate, key)) => {
                let chain = component_base::tls::read_certificates(certificate).map_err(|e| tls(&e))?;
                let key = PrivateKeyDer::from_pem_file(key).map_err(|e| tls(&format!("{}: {e}", key.display())))?;
                builder.with_client_auth_cert(chain, key).map_err(|e| tls(&e))
            }
            None => Ok(builder.with_no_client_auth()),
        }
    }
}

/// In Go's words, which people and tools know.
fn connect_error(error: &io::Error) -> String {
    let words = match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused",
        io::ErrorKind::ConnectionReset => "connection reset by peer",
        io::ErrorKind::HostUnreachable => "no route to host",
        io::ErrorKind::NetworkUnreachable => "network is unreachable",
        io::ErrorKind::TimedOut => "connection timed out",
        _ => return error.to_string(),
    };
    format!("connect: {words}")
}

/// Sends a request; `tls` for HTTPS. The response may be an upgrade.
pub async fn send(
    address: &Address,
    tls: Option<&Credentials>,
    request: Request<Body>,
) -> Result<Response<Incoming>, TransportError> {
    let dial = |reason: String| TransportError::Dial { address: address.authority(), reason };
    let connecting = TcpStream::connect((address.host.as_str(), address.port));
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| dial("i/o timeout".to_owned()))?
        .map_err(|error| dial(connect_error(&error)))?;
    // Failing only costs latency.
    let _ = stream.set_nodelay(true);
    let Some(credentials) = tls else { return over(stream, request).await };
    let connector = TlsConnector::from(Arc::new(credentials.config()?));
    let name = ServerName::try_from(address.host.clone()).map_err(|error| TransportError::Tls(error.to_string()))?;
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, connector.connect(name, stream))
        .await
        .map_err(|_| TransportError::Tls("handshake timeout".to_owned()))?
        .map_err(|error| TransportError::Tls(error.to_string()))?;
    over(stream, request).await
}

async fn over(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Body>,
) -> Result<Response<Incoming>, TransportError> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the exchange: the sender is dropped behind the response, and nothing else is sent.
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "connection to a backend ended");
        }
    });
    Ok(sender.send_request(request).await?)
}
