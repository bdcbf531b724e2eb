//! The way to the API server: a `kube::Client` over one HTTP/2 connection ([`crate::transport`]), from a kubeconfig.
//!
//! Client certificates that are files are read again when they change, so a kubelet whose certificate rotates keeps its
//! client; kube re-reads token files and root certificates.
use crate::{
    tls::ReloadingKeyPair,
    transport::{CONNECT_TIMEOUT, Received, Server, Transport},
};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode};
use hyper_util::{
    client::legacy::{Client as HyperClient, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use kube::{
    Client, Config,
    client::{Body, ConfigExt as _},
    config::{KubeConfigOptions, Kubeconfig},
    core::{Status, request::Error as RequestError},
};
use rustls_pki_types::{InvalidDnsNameError, ServerName};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tower::{BoxError, ServiceBuilder, util::BoxCloneSyncService};

/// For the head of a response; bodies (watches, logs) may take as long as they like.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(90);

/// What a client sends its requests through.
pub type Service = BoxCloneSyncService<Request<Body>, Response<Received>, BoxError>;

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The file is absent, malformed, or names things that it does not hold.
    #[error("kubeconfig {path}: {source}")]
    Kubeconfig { path: String, source: kube::config::KubeconfigError },
    /// No kubeconfig was given and the process does not run in a pod.
    #[error("no kubeconfig given, and not in a cluster: {0}; name one with --kubeconfig")]
    NoConfig(kube::config::InferConfigError),
    /// Certificates or keys in the kubeconfig cannot be used.
    #[error("client credentials: {0}")]
    Credentials(String),
}

/// Reads a kubeconfig; without one, what kube infers (`$KUBECONFIG`, `~/.kube/config`, the pod's ServiceAccount).
pub async fn load(kubeconfig: Option<&Path>) -> Result<Config, ClientError> {
    match kubeconfig {
        Some(path) => load_context(path, &KubeConfigOptions::default()).await,
        None => Config::infer().await.map_err(ClientError::NoConfig),
    }
}

/// Reads one context of a kubeconfig. Relative paths in it are relative to the file.
pub async fn load_context(path: &Path, options: &KubeConfigOptions) -> Result<Config, ClientError> {
    let error = |source| ClientError::Kubeconfig { path: path.display().to_string(), source };
    let kubeconfig = Kubeconfig::read_from(path).map_err(error)?;
    Config::from_custom_kubeconfig(kubeconfig, options).await.map_err(error)
}

/// A client over HTTP/2 (HTTP/1.1 where the server has no better).
pub fn connect(config: Config, user_agent: &str) -> Result<Client, ClientError> {
    let namespace = config.default_namespace.clone();
    Ok(Client::new(service(config, user_agent, true)?, namespace))
}

/// Sends a request; gives the text of the answer, for those who read little of it or nothing.
pub async fn send(client: &Client, request: Result<Request<Vec<u8>>, RequestError>) -> Result<Bytes, kube::Error> {
    let request = request.map_err(kube::Error::BuildRequest)?;
    let answer = client.send(request.map(Body::from)).await?;
    let status = answer.status();
    let text = answer.into_body().collect_bytes().await?;
    if status.is_success() { Ok(text) } else { Err(refusal(status, &text)) }
}

/// Why a server refused a request.
pub fn refusal(code: StatusCode, text: &[u8]) -> kube::Error {
    let unreadable = |_| Status::failure(&String::from_utf8_lossy(text), "");
    let mut told: Status = serde_json::from_slice(text).unwrap_or_else(unreadable);
    if told.code == 0 {
        told.code = code.as_u16();
    }
    kube::Error::Api(told.boxed())
}

/// A client over HTTP/1.1, which alone can be upgraded: for exec, attach and port-forward.
pub fn connect_h1(config: Config, user_agent: &str) -> Result<Client, ClientError> {
    let namespace = config.default_namespace.clone();
    Ok(Client::new(service(config, user_agent, false)?, namespace))
}

/// What is below a client.
pub fn service(mut config: Config, user_agent: &str, http2: bool) -> Result<Service, ClientError> {
    let credentials = |e: &dyn std::fmt::Display| ClientError::Credentials(e.to_string());
    let agent = HeaderValue::from_str(user_agent).map_err(|e| credentials(&e))?;
    config.headers.push((HeaderName::from_static("user-agent"), agent));

    let files = client_files(&config);
    if files.is_some() {
        // Ours reads them; kube would read them once.
        config.auth_info.client_certificate = None;
        config.auth_info.client_key = None;
    }
    let mut tls = config.rustls_client_config().map_err(|e| credentials(&e))?;
    if let Some((certificate, key)) = files {
        let pair = ReloadingKeyPair::load(certificate, key).map_err(|e| credentials(&e))?;
        tls.client_auth_cert_resolver = Arc::new(pair);
    }

    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    let server = server(&config, &tls).map_err(|e| credentials(&e))?.filter(|_| http2);
    let connector = hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http();
    let connector = match &server_name(&config).map_err(|e| credentials(&e))? {
        Some(name) => connector.with_server_name_resolver(hyper_rustls::FixedServerNameResolver::new(name.clone())),
        None => connector,
    };
    let fallback = HyperClient::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .build(connector.enable_http1().wrap_connector(tcp));
    let transport = Transport::new(server, fallback);
    let stack = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().map_err(|e| credentials(&e))?)
        .layer(config.extra_headers_layer().map_err(|e| credentials(&e))?)
        .map_err(BoxError::from)
        .timeout(RESPONSE_TIMEOUT)
        .service(transport);
    Ok(Service::new(stack))
}

/// The server to speak HTTP/2 with; None where there is no TLS, which agrees on that.
fn server(config: &Config, tls: &rustls::ClientConfig) -> Result<Option<Server>, InvalidDnsNameError> {
    let address = &config.cluster_url;
    if address.scheme_str() != Some("https") {
        return Ok(None);
    }
    let host = address.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let name = match server_name(config)? {
        Some(name) => name,
        None => ServerName::try_from(host.clone())?,
    };
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Some(Server { host, port: address.port_u16().unwrap_or(443), name, tls: Arc::new(tls) }))
}

/// By which the server's certificate knows it, where that is not its address.
fn server_name(config: &Config) -> Result<Option<ServerName<'static>>, InvalidDnsNameError> {
    config.tls_server_name.clone().map(ServerName::try_from).transpose()
}

/// Certificate and key when both are files.
fn client_files(config: &Config) -> Option<(PathBuf, PathBuf)> {
    let auth = &config.auth_info;
    if auth.client_certificate_data.is_some() || auth.client_key_data.is_some() {
        return None;
    }
    Some((auth.client_certificate.as_ref()?.into(), auth.client_key.as_ref()?.into()))
}
