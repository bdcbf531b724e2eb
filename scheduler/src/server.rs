//! The secure port: health and metrics.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, bail};
use component_base::auth::{Access, DelegatedAuth};
use component_base::serving::{Endpoints, Listening, Request, authorize, respond, serve, status, text};
use component_base::tls::{ServerTls, client_verifier};
use component_base::x509::self_signed;
use http::{Method, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::cache::PendingPod;
use crate::driver::Driver;
use crate::explain::supposed_pod;
use crate::options::Options;
use crate::resources;

const CONNECTIONS_MAX: usize = 256;
const EXPLAIN: &str = "/debug/explain";
const RESOURCES: &str = "/metrics/resources";
/// The largest manifest.
const MANIFEST_MAX: usize = 1 << 20;

/// Serves `endpoints` until `shutdown`; returns once the port is open.
pub async fn start(
    options: &Options,
    endpoints: Endpoints,
    driver: Arc<OnceLock<Driver>>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    if options.secure_port == 0 {
        return Ok(());
    }
    let address = SocketAddr::new(options.bind_address, options.secure_port);
    let tls = tls(options)?;
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    tracing::info!(%address, "serving health and metrics");
    let endpoints = Arc::new(endpoints);
    let listening = Listening { tls: Some(Arc::new(tls)), max_connections: CONNECTIONS_MAX };
    tokio::spawn(serve(listener, listening, shutdown, move |request| {
        let (endpoints, driver) = (endpoints.clone(), driver.clone());
        async move {
            let path = request.uri().path().to_owned();
            if path != EXPLAIN && path != RESOURCES {
                return endpoints.handle(request).await;
            }
            let resources = path == RESOURCES;
            let access = Access::NonResource { verb: request.method().as_str().to_lowercase(), path };
            if let Some(auth) = &endpoints.auth
                && let Err(error) = authorize(auth, &request, &access).await
            {
                return status(&error);
            }
            if resources {
                // Who does not lead has nothing to tell.
                let Some(driver) = driver.get() else { return text(StatusCode::OK, "") };
                return match resources::text(driver.client()).await {
                    Ok(told) => respond(StatusCode::OK, component_base::metrics::CONTENT_TYPE, told),
                    Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
                };
            }
            match explain(driver.get(), request).await {
                Ok(told) => respond(StatusCode::OK, "application/json", told.to_string()),
                Err((code, words)) => text(code, words),
            }
        }
    }));
    Ok(())
}

/// `GET ?pod=namespace/name` tells of a waiting pod, `POST` of a manifest that is not created.
async fn explain(driver: Option<&Driver>, request: Request) -> Result<Value, (StatusCode, String)> {
    let bad = |words: String| (StatusCode::BAD_REQUEST, words);
    let driver = driver.ok_or((StatusCode::SERVICE_UNAVAILABLE, "another scheduler leads".to_owned()))?;
    let pod = if request.method() == Method::POST {
        let body = Limited::new(request.into_body(), MANIFEST_MAX).collect().await;
        let body = body.map_err(|error| bad(error.to_string()))?.to_bytes();
        let documents =
            apimachinery::yaml::documents(&String::from_utf8_lossy(&body)).map_err(|e| bad(e.to_string()))?;
        let manifest = documents.into_iter().next().ok_or_else(|| bad("the body is empty".to_owned()))?;
        Arc::new(PendingPod::new(Arc::new(supposed_pod(manifest).map_err(bad)?)))
    } else {
        let query = request.uri().query().unwrap_or_default();
        let wanted = query.split('&').find_map(|pair| pair.strip_prefix("pod=")).map(|name| name.replace("%2F", "/"));
        let wanted = wanted.ok_or_else(|| bad("which pod? ?pod=namespace/name".to_owned()))?;
        let (namespace, name) = wanted.split_once('/').unwrap_or(("default", &wanted));
        let waiting = driver.waiting(namespace, name);
        waiting.ok_or_else(|| (StatusCode::NOT_FOUND, format!("pod {namespace}/{name} does not wait for a node")))?
    };
    driver.explain(&pod).ok_or_else(|| bad(format!("no profile is named {:?}", pod.scheduler_name())))
}

/// Who may read what on the secure port.
pub async fn auth(options: &Options) -> anyhow::Result<DelegatedAuth> {
    let kubeconfig = options.authentication_kubeconfig.as_deref().or(options.authorization_kubeconfig.as_deref());
    let client = match kubeconfig.or(options.kubeconfig.as_deref()) {
        Some(path) => {
            let config = component_base::client::load(Some(path)).await?;
            Some(component_base::client::connect(config, "kube-scheduler/authentication")?)
        }
        None => None,
    };
    let open: Vec<&str> = options.authorization_always_allow_paths.iter().map(String::as_str).collect();
    Ok(DelegatedAuth::new(client, true, &open))
}

fn tls(options: &Options) -> anyhow::Result<ServerConfig> {
    let client_ca = options.client_ca_file.clone();
    if let (Some(certificate), Some(key)) = (&options.tls_cert_file, &options.tls_private_key_file) {
        let tls = ServerTls { certificate: certificate.clone(), key: key.clone(), client_ca };
        return Ok(tls.server_config()?);
    }
    made_up(client_ca.as_deref())
}

/// With a certificate that is made now and never stored.
fn made_up(client_ca: Option<&Path>) -> anyhow::Result<ServerConfig> {
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST)];
    let (certificate, key) = self_signed("kube-scheduler", &["localhost".to_owned()], &loopback)?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(certificate.as_bytes()).collect::<Result<_, _>>()?;
    if chain.is_empty() {
        bail!("the self-signed certificate is empty");
    }
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())?;
    let builder = match client_ca {
        Some(path) => ServerConfig::builder().with_client_cert_verifier(client_verifier(path)?),
        None => ServerConfig::builder().with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
