//! kube-proxy: carries Services to their endpoints on this node.
//!
//! Services and EndpointSlices become a [`model`]; a pure renderer makes a rule set of it ([`nftables`]); [`proxier`]
//! applies the difference in one transaction.
#![forbid(unsafe_code)]

mod config;
mod conntrack;
mod model;
mod nftables;
mod proxier;

use crate::{
    config::{Config, Flags, IGNORED},
    nftables::{apply, render},
    proxier::{Health, Proxier},
};
use anyhow::Context as _;
use component_base::{cli, client, daemon, serving};
use http::StatusCode;
use serving::{Endpoints, Listening, Request, Response};
use std::{
    net::SocketAddr,
    process::ExitCode,
    time::{Duration, SystemTime},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// A change that is not applied after this long makes the node unhealthy.
const UNHEALTHY_AFTER: Duration = Duration::from_secs(60);
const MAX_CONNECTIONS: usize = 64;

fn main() -> ExitCode {
    let flags: Flags = cli::parse(IGNORED);
    daemon::run("kube-proxy", flags.common.v, async move |shutdown| run(flags, shutdown).await)
}

async fn run(flags: Flags, shutdown: CancellationToken) -> anyhow::Result<()> {
    if flags.cleanup {
        for ipv6 in [false, true] {
            let table = render::table(ipv6);
            apply::apply(&format!("add table {table}\ndelete table {table}\n")).await?;
        }
        return Ok(());
    }
    let config = Config::load(&flags)?;
    let api = client::connect(client::load(config.kubeconfig.as_deref()).await?, "kube-proxy/pilothouse")?;
    let (healthz, metrics, node) = (config.healthz, config.metrics, config.node.clone());
    tracing::info!(node, mode = "nftables", "kube-proxy starts");
    let proxier = Proxier::new(config, api);
    let health = proxier.health();
    if let Some(address) = healthz {
        let health = health.clone();
        listen(address, "healthz", shutdown.clone(), move |request: Request| {
            let response = healthz_response(request.uri().path(), &health.read());
            async move { response }
        })
        .await?;
    }
    if let Some(address) = metrics {
        let endpoints = Endpoints::default().with_check("ping", || Ok(()));
        listen(address, "metrics", shutdown.clone(), move |request: Request| {
            let endpoints = endpoints.clone();
            async move {
                match request.uri().path() {
                    "/proxyMode" => serving::text(StatusCode::OK, "nftables"),
                    _ => endpoints.handle(request).await,
                }
            }
        })
        .await?;
    }
    proxier.run(shutdown).await
}

async fn listen<H, Fut>(address: SocketAddr, what: &str, shutdown: CancellationToken, handler: H) -> anyhow::Result<()>
where
    H: Fn(Request) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Response> + Send + 'static,
{
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} for {what}; another process may have the port"))?;
    let listening = Listening { tls: None, max_connections: MAX_CONNECTIONS };
    tokio::spawn(serving::serve(listener, listening, shutdown, handler));
    Ok(())
}

/// `/healthz` and `/livez`, in the form that load balancers and kubeadm read.
fn healthz_response(path: &str, health: &Health) -> Response {
    if !matches!(path, "/healthz" | "/livez") {
        return serving::text(StatusCode::NOT_FOUND, "404 page not found\n");
    }
    let healthy = health.last_updated.is_some() && health.queued.is_none_or(|q| q.elapsed() < UNHEALTHY_AFTER);
    let text = |time: SystemTime| {
        let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
        k8s_openapi::jiff::Timestamp::from_second(seconds).map(apimachinery::time::rfc3339).unwrap_or_default()
    };
    let body = serde_json::json!({
        "lastUpdated": health.last_updated.map(text).unwrap_or_default(),
        "currentTime": text(SystemTime::now()),
        "nodeEligible": healthy,
    });
    let code = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    serving::respond(code, "application/json", body.to_string())
}
