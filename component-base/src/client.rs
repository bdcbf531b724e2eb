//! The way to the API server: a `kube::Client` over one HTTP/2 connection, from a kubeconfig.
//!
//! Client certificates that are files are read again when they change, so a kubelet whose certificate rotates keeps its
//! client; kube re-reads token files and root certificates.
use crate::tls::ReloadingKeyPair;
use http::{HeaderName, HeaderValue};
use hyper_util::{
    client::legacy::{Client as HyperClient, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use kube::{
    Client, Config,
    client::{Body, ConfigExt as _},
    config::{KubeConfigOptions, Kubeconfig},
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tower::ServiceBuilder;

/// A connection that does not answer a ping this long is given up.
/// What the server may send ahead, on one stream and on the connection. The latter is ample: hundreds of watches that wait
/// for a connection's window starve each other.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(15);
/// For the head of a response; bodies (watches, logs) may take as long as they like.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(90);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

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
    build(config, user_agent, true)
}

/// A client over HTTP/1.1, which alone can be upgraded: for exec, attach and port-forward.
pub fn connect_h1(config: Config, user_agent: &str) -> Result<Client, ClientError> {
    build(config, user_agent, false)
}

fn build(mut config: Config, user_agent: &str, http2: bool) -> Result<Client, ClientError> {
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
    let connector = hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http();
    let connector = match config.tls_server_name.as_deref() {
        Some(name) => {
            let name = rustls_pki_types::ServerName::try_from(name.to_owned()).map_err(|e| credentials(&e))?;
            connector.with_server_name_resolver(hyper_rustls::FixedServerNameResolver::new(name))
        }
        None => connector,
    };
    let connector = if http2 {
        connector.enable_all_versions().wrap_connector(tcp)
    } else {
        connector.enable_http1().wrap_connector(tcp)
    };
    let service = HyperClient::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .timer(TokioTimer::new())
        .http2_initial_stream_window_size(STREAM_WINDOW)
        .http2_initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(PING_INTERVAL)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        .http2_keep_alive_while_idle(true)
        .build::<_, Body>(connector);

    let namespace = config.default_namespace.clone();
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().map_err(|e| credentials(&e))?)
        .layer(config.extra_headers_layer().map_err(|e| credentials(&e))?)
        .map_err(tower::BoxError::from)
        .timeout(RESPONSE_TIMEOUT)
        .service(service);
    Ok(Client::new(service, namespace))
}

/// Certificate and key when both are files.
fn client_files(config: &Config) -> Option<(PathBuf, PathBuf)> {
    let auth = &config.auth_info;
    if auth.client_certificate_data.is_some() || auth.client_key_data.is_some() {
        return None;
    }
    Some((auth.client_certificate.as_ref()?.into(), auth.client_key.as_ref()?.into()))
}
