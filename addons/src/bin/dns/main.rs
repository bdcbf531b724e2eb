//! `dns`: the cluster's DNS server.
//!
//! It answers for the cluster's domain from Services and EndpointSlices, and forwards all else to the host's name servers; by
//! the DNS specification of Kubernetes, with CoreDNS' health, readiness and metrics endpoints.
//!
//! It runs as an ordinary Deployment behind the Service `kube-dns` (10.96.0.10, which pods are told), from an image that
//! `ctl bootstrap image` makes; with `--kubeconfig` also outside of a cluster. Any number can run: each has the whole cluster
//! in view and they need not know of each other.
#![forbid(unsafe_code)]

mod answer;
mod forward;
mod resolve;
mod server;
mod telemetry;
mod world;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use apimachinery::meta::NamespacedName;
use clap::Parser;
use component_base::cli::CommonFlags;
use component_base::informer::Informer;
use component_base::{cli, client, daemon, metrics, serving};
use http::StatusCode;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::runtime::watcher;
use parking_lot::RwLock;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use answer::Answerer;
use forward::Forwarder;
use resolve::Zone;
use server::Sockets;
use telemetry::Telemetry;
use world::World;

/// Connections to the health and metrics endpoints at once.
const MAX_HTTP_CONNECTIONS: usize = 64;

/// Cluster DNS.
#[derive(Debug, Parser)]
#[command(name = "dns")]
struct Flags {
    /// kubeconfig of an identity that may list and watch Services, EndpointSlices and Namespaces; default: the pod's own.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// The domain of the cluster.
    #[arg(long, default_value = "cluster.local")]
    cluster_domain: String,
    /// Addresses to answer on.
    #[arg(long, value_delimiter = ',', default_value = "0.0.0.0")]
    bind_address: Vec<IpAddr>,
    /// Port to answer on, UDP and TCP.
    #[arg(long, default_value_t = 53)]
    port: u16,
    /// Name servers for all other domains (address or address:port); default: those of --resolv-conf.
    #[arg(long, value_delimiter = ',', value_parser = upstream)]
    upstream: Vec<SocketAddr>,
    /// The file whose name servers are asked for all other domains.
    #[arg(long, default_value = "/etc/resolv.conf")]
    resolv_conf: PathBuf,
    /// The seconds for which an answer about the cluster may be remembered.
    #[arg(long, default_value_t = 30)]
    ttl: u32,
    /// Address of a /health of its own, as CoreDNS has at port 8080. By default it is answered at the metrics' address only:
    /// on a host that port is somebody else's.
    #[arg(long)]
    health_bind_address: Option<SocketAddr>,
    /// Address of a /ready of its own, as CoreDNS has at port 8181. By default it is answered at the metrics' address only.
    #[arg(long)]
    ready_bind_address: Option<SocketAddr>,
    /// Address of /metrics, /health and /ready.
    #[arg(long, default_value = "0.0.0.0:9153")]
    metrics_bind_address: SocketAddr,
    #[command(flatten)]
    common: CommonFlags,
}

fn main() -> ExitCode {
    let flags: Flags = cli::parse(&[]);
    daemon::run("dns", flags.common.v, async |shutdown| run(flags, shutdown).await)
}

fn upstream(text: &str) -> Result<SocketAddr, String> {
    let of_address = |address: IpAddr| SocketAddr::new(address, 53);
    text.parse().or_else(|_| text.parse().map(of_address)).map_err(|_| format!("{text:?} is not an address"))
}

/// The informers; dropping them ends their watches.
#[derive(Clone)]
struct Watches {
    services: Informer<Service>,
    slices: Informer<EndpointSlice>,
    namespaces: Informer<Namespace>,
}

async fn run(flags: Flags, shutdown: CancellationToken) -> anyhow::Result<()> {
    let config = client::load(flags.kubeconfig.as_deref()).await?;
    let client = client::connect(config, "dns/v1.36.0 pilothouse")?;
    let mut sockets = Vec::new();
    for address in &flags.bind_address {
        let address = SocketAddr::new(*address, flags.port);
        sockets.push(Sockets::bind(address).await.with_context(|| format!("listening on {address}"))?);
    }
    let own = sockets.iter().map(Sockets::address).collect::<Result<Vec<_>, _>>()?;

    let world = Arc::new(RwLock::new(World::default()));
    let watches = Watches::start(&client, &world);
    let server_addresses = own.iter().map(SocketAddr::ip).filter(|address| !address.is_unspecified()).collect();
    let zone = Zone::new(&flags.cluster_domain, flags.ttl, server_addresses).map_err(anyhow::Error::msg)?;
    let ready = watches.clone();
    let answerer = Arc::new(Answerer {
        zone,
        world,
        forwarder: Forwarder::new(flags.upstream.clone(), flags.resolv_conf.clone(), own.clone()),
        is_ready: Box::new(move || ready.are_synced()),
        telemetry: Telemetry::registered(),
    });

    let mut tasks = JoinSet::new();
    for sockets in sockets {
        tasks.spawn(sockets.serve(answerer.clone(), shutdown.clone()));
    }
    let http = [Some(flags.metrics_bind_address), flags.health_bind_address, flags.ready_bind_address];
    for address in http.into_iter().flatten() {
        serve_http(&mut tasks, address, &shutdown, watches.clone()).await;
    }
    let domain = &flags.cluster_domain;
    tracing::info!(domain, addresses = ?own, "answering");
    tokio::spawn(async move {
        watches.services.synced().await;
        watches.slices.synced().await;
        watches.namespaces.synced().await;
        tracing::info!(services = watches.services.len(), slices = watches.slices.len(), "the cluster is in view");
    });
    while let Some(ended) = tasks.join_next().await {
        ended.context("a server ended")?;
        anyhow::ensure!(shutdown.is_cancelled(), "a server ended before its time");
    }
    Ok(())
}

/// An HTTP endpoint beside the real work: that its port is taken is told, and does not keep names from being answered.
async fn serve_http(tasks: &mut JoinSet<()>, address: SocketAddr, shutdown: &CancellationToken, watches: Watches) {
    let listener = match TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%address, %error, "this endpoint is not served");
            return;
        }
    };
    let listening = serving::Listening { tls: None, max_connections: MAX_HTTP_CONNECTIONS };
    tasks.spawn(serving::serve(listener, listening, shutdown.clone(), move |request: serving::Request| {
        let response = match request.uri().path() {
            "/health" => serving::text(StatusCode::OK, "OK"),
            "/ready" if watches.are_synced() => serving::text(StatusCode::OK, "OK"),
            "/ready" => serving::text(StatusCode::SERVICE_UNAVAILABLE, "kubernetes"),
            "/metrics" => serving::respond(StatusCode::OK, metrics::CONTENT_TYPE, metrics::encode()),
            _ => serving::text(StatusCode::NOT_FOUND, "404 page not found\n"),
        };
        async move { response }
    }));
}

// === impl Watches ===

impl Watches {
    fn start(client: &kube::Client, world: &Arc<RwLock<World>>) -> Watches {
        let config = watcher::Config::default;
        let services = Informer::start_with_transform(Api::<Service>::all(client.clone()), config(), |service| {
            service.metadata.annotations = None;
            service.status = None;
        });
        let slices = Informer::start_with_transform(Api::<EndpointSlice>::all(client.clone()), config(), |slice| {
            slice.metadata.annotations = None;
            slice.metadata.owner_references = None;
            for endpoint in slice.endpoints.iter_mut().flatten() {
                endpoint.target_ref = None;
                endpoint.hints = None;
            }
        });
        let namespaces = Informer::start_with_transform(Api::<Namespace>::all(client.clone()), config(), |namespace| {
            namespace.metadata.annotations = None;
            namespace.metadata.labels = None;
        });
        let target = world.clone();
        services.on_change(move |change| {
            if let Some(service) = change.latest() {
                target.write().set_service(NamespacedName::of(&**service), change.new.map(Arc::as_ref));
            }
        });
        let target = world.clone();
        slices.on_change(move |change| {
            if let Some(slice) = change.latest() {
                let key = NamespacedName::of(&**slice);
                target.write().set_slice(&key, change.old.map(Arc::as_ref), change.new.map(Arc::as_ref));
            }
        });
        let target = world.clone();
        namespaces.on_change(move |change| {
            if let Some(name) = change.latest().and_then(|namespace| namespace.metadata.name.as_deref()) {
                target.write().set_namespace(name, change.new.is_some());
            }
        });
        Watches { services, slices, namespaces }
    }

    fn are_synced(&self) -> bool {
        self.services.is_synced() && self.slices.is_synced() && self.namespaces.is_synced()
    }
}
