//! The secure port: health and metrics.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use component_base::auth::DelegatedAuth;
use component_base::serving::{Endpoints, Listening, serve};
use component_base::tls::{ServerTls, client_verifier};
use component_base::x509::self_signed;
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::options::Options;

const CONNECTIONS_MAX: usize = 256;

/// Serves `endpoints` until `shutdown`; returns once the port is open.
pub async fn start(options: &Options, endpoints: Endpoints, shutdown: CancellationToken) -> anyhow::Result<()> {
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
        let endpoints = endpoints.clone();
        async move { endpoints.handle(request).await }
    }));
    Ok(())
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
