//! kube-proxy: carries Services to their endpoints on this node.
//!
//! Services and EndpointSlices become a [`model`], kept by [`world`]; a pure renderer per mode makes rules of it
//! ([`nftables`], [`iptables`], [`ipvs`], [`userspace`]); [`proxier`] has the [`backend`] apply the difference in one
//! transaction.
#![forbid(unsafe_code)]

mod api;
mod backend;
mod config;
mod conntrack;
mod health_check;
mod iptables;
mod ipvs;
mod link;
mod metrics;
mod model;
mod nftables;
mod objects;
mod proxier;
mod settings;
mod userspace;
mod world;

use crate::{
    config::{Config, Flags, IGNORED},
    metrics::Code,
    proxier::{Health, Proxier},
    world::Changes,
};
use anyhow::Context as _;
use component_base::{cli, client, daemon, serving};
use http::StatusCode;
use serving::{Endpoints, Listening, Request, Response};
use std::{
    net::SocketAddr,
    path::Path,
    process::ExitCode,
    time::{Duration, SystemTime},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

const LEAST_PATIENCE: Duration = Duration::from_secs(10);
/// How often the configuration file is looked at, at least.
const MAX_LOOK: Duration = Duration::from_secs(10);
const MAX_CONNECTIONS: usize = 64;

fn main() -> ExitCode {
    let flags: Flags = cli::parse(IGNORED);
    daemon::run_on_one_thread("kube-proxy", flags.common.v, async move |shutdown| run(flags, shutdown).await)
}

async fn run(flags: Flags, shutdown: CancellationToken) -> anyhow::Result<()> {
    if flags.cleanup {
        backend::clean_up(None).await;
        return Ok(());
    }
    let config = Config::load(&flags)?;
    if let Some(path) = &flags.write_config_to {
        let text = apimachinery::yaml::to_string(&config.file)?;
        return std::fs::write(path, text).with_context(|| format!("writing {}", path.display()));
    }
    let mode = config.mode.mode;
    config.file.without_effect().into_iter().for_each(|words| tracing::warn!("without effect: {words}"));
    backend::check_supported(mode).await?;
    set_kernel(&config.sysctls);
    // What may not be lowered stays as it is.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", config.oom_score_adj.to_string()) {
        tracing::debug!(value = config.oom_score_adj, %error, "oom_score_adj not changed");
    }
    backend::set_timeouts(&config.mode).await;
    if flags.init_only {
        return Ok(());
    }
    backend::clean_up(Some(mode)).await;
    let api = client::connect(api_server(&config).await?, "kube-proxy/pilothouse")?;
    let look = config.sync_period.min(MAX_LOOK);
    // A change that is not applied for so long makes the node unhealthy; a moment says nothing.
    let patience = (config.sync_period * 2).max(LEAST_PATIENCE);
    let (healthz, metrics, node, hard_fail) = (config.healthz, config.metrics, config.node.clone(), config.hard_fail);
    let configz = serde_json::to_value(&config.file)?;
    tracing::info!(node, mode = mode.as_str(), "kube-proxy starts");
    let proxier = Proxier::new(config, api);
    let (health, changes) = (proxier.health(), proxier.changes());
    if let Some(address) = healthz {
        let [checks, lives] = ["healthz", "livez"].map(metrics::health_counter);
        let served = listen(address, "healthz", shutdown.clone(), move |request: Request| {
            let path = request.uri().path();
            let response = healthz_response(path, &health.read(), &changes, patience);
            let counter = if path == "/livez" { &lives } else { &checks };
            counter.get_or_create(&Code { code: response.status().as_u16() }).inc();
            async move { response }
        });
        or_say(served.await, hard_fail)?;
    }
    if let Some(address) = metrics {
        let mut endpoints = Endpoints::default().with_check("ping", || Ok(()));
        endpoints.configz = Some(("kubeproxy.config.k8s.io".to_owned(), configz));
        let served = listen(address, "metrics", shutdown.clone(), move |request: Request| {
            let endpoints = endpoints.clone();
            async move {
                match request.uri().path() {
                    "/proxyMode" => serving::text(StatusCode::OK, mode.as_str()),
                    _ => endpoints.handle(request).await,
                }
            }
        });
        or_say(served.await, hard_fail)?;
    }
    tokio::select! {
        outcome = proxier.run(shutdown) => outcome,
        path = changed(flags.config.as_deref(), look) => {
            anyhow::bail!("{} has changed; whoever keeps this process running starts it anew, with that", path.display())
        }
    }
}

/// Ends when the file is another than now; never without one. As the watcher of kube-proxy's options.
async fn changed(path: Option<&Path>, look: Duration) -> &Path {
    let Some(path) = path else { return std::future::pending().await };
    let read = || std::fs::read(path).ok();
    let now = read();
    loop {
        tokio::time::sleep(look).await;
        // One that is not there at the moment may be on its way.
        if read().is_some_and(|text| now.as_ref() != Some(&text)) {
            return path;
        }
    }
}

async fn api_server(config: &Config) -> anyhow::Result<kube::Config> {
    let master = config.master.as_ref().map(|master| master.parse::<http::Uri>()).transpose().context("--master")?;
    let mut loaded = match (&config.kubeconfig, &master) {
        (None, Some(master)) => kube::Config::new(master.clone()),
        (kubeconfig, _) => client::load(kubeconfig.as_deref()).await?,
    };
    loaded.cluster_url = master.unwrap_or(loaded.cluster_url);
    Ok(loaded)
}

/// An address that is taken is told, and ends the process only where that is wanted.
fn or_say(outcome: anyhow::Result<()>, hard_fail: bool) -> anyhow::Result<()> {
    match outcome {
        Err(error) if !hard_fail => {
            tracing::error!(error = format!("{error:#}"), "this endpoint is not served");
            Ok(())
        }
        other => other,
    }
}

/// Of the kernel's settings only the first network namespace's may be written; what cannot be is told and does no harm.
fn set_kernel(settings: &[(&str, u64)]) {
    for (name, value) in settings {
        let path = format!("/proc/sys/{name}");
        let now = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u64>().ok());
        // A limit of the machine is raised, never lowered.
        let enough = now.is_some_and(|now| now == *value || name.ends_with("_max") && now > *value);
        if !enough && let Err(error) = std::fs::write(&path, value.to_string()) {
            tracing::warn!(setting = name, value, %error, "kernel setting not changed");
        }
    }
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

/// `/healthz`, which load balancers ask whether to send traffic, and `/livez`, which tells of this process alone.
fn healthz_response(path: &str, health: &Health, changes: &Changes, patience: Duration) -> Response {
    if !matches!(path, "/healthz" | "/livez") {
        return serving::text(StatusCode::NOT_FOUND, "404 page not found\n");
    }
    let prompt = changes.waiting_since().is_none_or(|since| since.elapsed() < patience);
    let (code, body) = health_answer(path, health, prompt);
    let mut response = serving::respond(code, "application/json", body.to_string());
    response.headers_mut().insert(http::header::X_CONTENT_TYPE_OPTIONS, http::HeaderValue::from_static("nosniff"));
    response
}

/// As `ProxyHealth`. `prompt`: no change waits for long.
fn health_answer(path: &str, health: &Health, prompt: bool) -> (StatusCode, serde_json::Value) {
    let healthy = health.last_updated.is_some() && prompt;
    // Go's zero time, where it never was.
    let text = |time: Option<SystemTime>| {
        let seconds =
            |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs() as i64;
        let time = time.and_then(|time| k8s_openapi::jiff::Timestamp::from_second(seconds(time)).ok());
        time.map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), apimachinery::time::rfc3339)
    };
    let of_family = serde_json::json!({"lastUpdated": text(health.last_updated), "healthy": healthy});
    let mut status = serde_json::Map::from_iter([("IPv4".to_owned(), of_family.clone())]);
    status.extend(health.ipv6.then(|| ("IPv6".to_owned(), of_family)));
    let good = healthy && (path == "/livez" || health.node_eligible);
    let now = SystemTime::now();
    // What is healthy is up to date now.
    let mut body = serde_json::json!({
        "lastUpdated": text(if good { Some(now) } else { health.last_updated }),
        "currentTime": text(Some(now)),
        "healthy": healthy,
        "status": status,
    });
    if path == "/healthz" {
        body["nodeEligible"] = health.node_eligible.into();
    }
    let code = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_is_told_of_each_family() {
        let ask = |path: &str, health: Health, prompt| {
            let (code, body) = health_answer(path, &health, prompt);
            (code.as_u16(), body)
        };
        let synced = Health { last_updated: Some(SystemTime::now()), node_eligible: true, ipv6: true };
        let (code, body) = ask("/healthz", synced, true);
        assert_eq!((code, &body["nodeEligible"], &body["healthy"]), (200, &true.into(), &true.into()));
        let status = &body["status"];
        assert_eq!((&status["IPv4"]["healthy"], &status["IPv6"]["healthy"]), (&true.into(), &true.into()));
        let going = Health { node_eligible: false, ipv6: false, ..synced };
        let (code, body) = ask("/healthz", going, true);
        assert_eq!((code, &body["healthy"], body["status"].get("IPv6")), (503, &true.into(), None));
        let (code, body) = ask("/livez", going, true);
        assert_eq!((code, body.get("nodeEligible")), (200, None));
        assert_eq!(ask("/livez", going, false).0, 503);
        let (code, body) = ask("/livez", Health { last_updated: None, ..going }, true);
        assert_eq!((code, &body["lastUpdated"]), (503, &"0001-01-01T00:00:00Z".into()));
    }
}
