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
mod hosts;
#[cfg(test)]
mod naive;
mod resolve;
mod server;
mod telemetry;
mod world;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use apimachinery::meta::NamespacedName;
use clap::Parser;
use component_base::cli::CommonFlags;
use component_base::informer::Informer;
use component_base::{cli, client, daemon, metrics, serving};
use hickory_proto::rr::Name;
use http::StatusCode;
use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, WatchParams};
use parking_lot::RwLock;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use answer::Answerer;
use forward::{Forwarder, Policy};
use resolve::{Pods, Zone};
use server::Sockets;
use telemetry::Telemetry;
use world::World;

/// Connections to the health and metrics endpoints at once.
const MAX_HTTP_CONNECTIONS: usize = 64;
const MIN_CHECK_INTERVAL: Duration = Duration::from_millis(10);

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
    /// Addresses to answer on; default: all, of both families.
    #[arg(long, value_delimiter = ',')]
    bind_address: Vec<IpAddr>,
    /// Port to answer on, UDP and TCP.
    #[arg(long, default_value_t = 53)]
    port: u16,
    /// Name servers for all other domains (address or address:port); default: those of --resolv-conf.
    #[arg(long, value_delimiter = ',', value_parser = upstream)]
    upstream: Vec<SocketAddr>,
    /// In which order the name servers are asked.
    #[arg(long, default_value = "random")]
    upstream_policy: Policy,
    /// Failures in a row after which a name server is passed over until it is well; 0: never.
    #[arg(long, default_value_t = 2)]
    upstream_max_fails: u32,
    /// How often a name server that failed is looked at.
    #[arg(long, default_value = "500ms", value_parser = apimachinery::time::parse_duration)]
    upstream_health_check: Duration,
    /// Domains that no name server is asked for.
    #[arg(long, value_delimiter = ',', value_parser = domain)]
    upstream_except: Vec<Name>,
    /// Ask name servers over TCP only.
    #[arg(long)]
    upstream_force_tcp: bool,
    /// Questions on their way upstream at once; more are refused.
    #[arg(long, default_value_t = 1000)]
    max_concurrent: usize,
    /// A name server of a domain of its own, DOMAIN=ADDRESS; may be repeated.
    #[arg(long, value_delimiter = ',', value_parser = stub)]
    stub_domain: Vec<(Name, SocketAddr)>,
    /// The most seconds for which an answer of upstream is remembered.
    #[arg(long, default_value_t = 30)]
    cache_ttl: u64,
    /// The most seconds for which it is remembered that something is not there.
    #[arg(long, default_value_t = 30)]
    cache_denial_ttl: u64,
    /// Answers of upstream to remember.
    #[arg(long, default_value_t = 10_000)]
    cache_size: usize,
    /// How long an answer that is too old may stand in where upstream does not answer.
    #[arg(long, default_value = "0s", value_parser = apimachinery::time::parse_duration)]
    serve_stale: Duration,
    /// A file of addresses and names, as /etc/hosts, that goes ahead of everything else.
    #[arg(long)]
    hosts: Option<PathBuf>,
    /// A name that stands for another, FROM=TO; may be repeated.
    #[arg(long, value_delimiter = ',', value_parser = rewrite)]
    rewrite: Vec<(Name, Name)>,
    /// What is answered to names of pods.
    #[arg(long, default_value = "insecure")]
    pods: Pods,
    /// The namespaces that are answered for; default: all.
    #[arg(long, value_delimiter = ',')]
    namespaces: Vec<String>,
    /// Name endpoints without a hostname as their pods are named.
    #[arg(long)]
    endpoint_pod_names: bool,
    /// A Service without ready endpoints is not there.
    #[arg(long)]
    ignore_empty_service: bool,
    /// Ask upstream for names of the cluster's domain that are not there.
    #[arg(long)]
    fallthrough: bool,
    /// Whether lists of addresses begin elsewhere each time.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    loadbalance: bool,
    /// Log each question.
    #[arg(long)]
    log: bool,
    /// How long questions are answered still after the end was asked for, while /health says so already.
    #[arg(long, default_value = "0s", value_parser = apimachinery::time::parse_duration)]
    lameduck: Duration,
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

fn domain(text: &str) -> Result<Name, String> {
    let mut name = Name::from_str(text).map_err(|error| format!("{text:?} is not a domain: {error}"))?;
    name.set_fqdn(true);
    Ok(name.to_lowercase())
}

fn stub(text: &str) -> Result<(Name, SocketAddr), String> {
    let (name, address) = text.split_once('=').ok_or_else(|| format!("{text:?} is not DOMAIN=ADDRESS"))?;
    Ok((domain(name)?, upstream(address)?))
}

fn rewrite(text: &str) -> Result<(Name, Name), String> {
    let (from, to) = text.split_once('=').ok_or_else(|| format!("{text:?} is not FROM=TO"))?;
    Ok((domain(from)?, domain(to)?))
}

impl Flags {
    fn forwarding(&self, own: Vec<SocketAddr>) -> forward::Settings {
        forward::Settings {
            upstreams: self.upstream.clone(),
            resolv_conf: self.resolv_conf.clone(),
            stubs: self.stub_domain.clone(),
            except: self.upstream_except.clone(),
            policy: self.upstream_policy,
            max_fails: self.upstream_max_fails,
            check_interval: self.upstream_health_check.max(MIN_CHECK_INTERVAL),
            tcp: self.upstream_force_tcp,
            max_ttl: Duration::from_secs(self.cache_ttl),
            max_denial_ttl: Duration::from_secs(self.cache_denial_ttl),
            cache_size: self.cache_size,
            serve_stale: self.serve_stale,
            own,
        }
    }
}

/// The informers; dropping them ends their watches.
#[derive(Clone)]
struct Watches {
    services: Informer<Service>,
    slices: Informer<EndpointSlice>,
    namespaces: Informer<Namespace>,
    /// Where their names are verified.
    pods: Option<Informer<Pod>>,
}

async fn run(flags: Flags, shutdown: CancellationToken) -> anyhow::Result<()> {
    let config = client::load(flags.kubeconfig.as_deref()).await?;
    let client = client::connect(config, "dns/v1.36.0 pilothouse")?;
    let mut sockets = Vec::new();
    for address in &flags.bind_address {
        let address = SocketAddr::new(*address, flags.port);
        sockets.push(Sockets::bind(address).await.with_context(|| format!("listening on {address}"))?);
    }
    if sockets.is_empty() {
        let both = Sockets::bind((Ipv6Addr::UNSPECIFIED, flags.port).into()).await;
        sockets.push(
            match both {
                // Of a kernel without IPv6.
                Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                    Sockets::bind((Ipv4Addr::UNSPECIFIED, flags.port).into()).await
                }
                outcome => outcome,
            }
            .with_context(|| format!("listening on port {}", flags.port))?,
        );
    }
    let own = sockets.iter().map(Sockets::address).collect::<Result<Vec<_>, _>>()?;

    let world = Arc::new(RwLock::new(World::new(flags.endpoint_pod_names)));
    let watches = Watches::start(&client, &world, &flags);
    let server_addresses = own.iter().map(SocketAddr::ip).filter(|address| !address.is_unspecified()).collect();
    let options = resolve::Options {
        pods: flags.pods,
        ignore_empty_service: flags.ignore_empty_service,
        fallthrough: flags.fallthrough,
    };
    let zone = Zone::new(&flags.cluster_domain, flags.ttl, server_addresses, options).map_err(anyhow::Error::msg)?;
    let ready = watches.clone();
    let telemetry = Telemetry::registered();
    let own_question = domain(&format!("{}.{}", rand::random::<u64>(), rand::random::<u64>()));
    let answerer = Arc::new(Answerer {
        zone,
        world,
        forwarder: Forwarder::new(flags.forwarding(own.clone()), telemetry.clone()),
        hosts: RwLock::default(),
        rewrites: flags.rewrite.clone(),
        spread: flags.loadbalance,
        log: flags.log,
        own_question: own_question.map_err(anyhow::Error::msg)?,
        looped: CancellationToken::new(),
        is_ready: Box::new(move || ready.are_synced()),
        telemetry,
    });

    let (mut tasks, ended) = (JoinSet::new(), CancellationToken::new());
    let pending = Arc::new(Semaphore::new(flags.max_concurrent));
    for sockets in sockets {
        tasks.spawn(sockets.serve(answerer.clone(), pending.clone(), ended.clone()));
    }
    let http = [Some(flags.metrics_bind_address), flags.health_bind_address, flags.ready_bind_address];
    for address in http.into_iter().flatten() {
        serve_http(&mut tasks, address, &shutdown, &ended, watches.clone()).await;
    }
    let domain = &flags.cluster_domain;
    tracing::info!(domain, addresses = ?own, "answering");
    let asking = answerer.clone();
    tokio::spawn(async move { asking.forwarder.ask_for_loop(&asking.own_question).await });
    if let Some(path) = flags.hosts.clone() {
        tokio::spawn(follow_hosts(path, answerer.clone()));
    }
    tokio::spawn(async move {
        watches.synced().await;
        tracing::info!(services = watches.services.len(), slices = watches.slices.len(), "the cluster is in view");
    });
    let lame = async {
        shutdown.cancelled().await;
        tokio::time::sleep(flags.lameduck).await;
        ended.cancel();
    };
    let served = async {
        while let Some(task) = tasks.join_next().await {
            task.context("a server ended")?;
            anyhow::ensure!(ended.is_cancelled(), "a server ended before its time");
        }
        Ok(())
    };
    tokio::select! {
        outcome = served => outcome,
        // Then what is served ends.
        () = async { lame.await; std::future::pending().await } => Ok(()),
        () = answerer.looped.cancelled() => anyhow::bail!(
            "questions that are asked upstream come back to this server; give it other name servers with --upstream"
        ),
    }
}

async fn follow_hosts(path: PathBuf, answerer: Arc<Answerer>) {
    let mut file = hosts::Followed::new(path);
    loop {
        if let Some(text) = file.changed() {
            *answerer.hosts.write() = hosts::Hosts::parse(&text);
        }
        tokio::time::sleep(hosts::PERIOD).await;
    }
}

/// An HTTP endpoint beside the real work: that its port is taken is told, and does not keep names from being answered.
async fn serve_http(
    tasks: &mut JoinSet<()>,
    address: SocketAddr,
    shutdown: &CancellationToken,
    ended: &CancellationToken,
    watches: Watches,
) {
    let listener = match TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%address, %error, "this endpoint is not served");
            return;
        }
    };
    let listening = serving::Listening { tls: None, max_connections: MAX_HTTP_CONNECTIONS };
    let shutdown = shutdown.clone();
    tasks.spawn(serving::serve(listener, listening, ended.clone(), move |request: serving::Request| {
        let response = match request.uri().path() {
            "/health" if shutdown.is_cancelled() => serving::text(StatusCode::SERVICE_UNAVAILABLE, "lameduck"),
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
    fn start(client: &kube::Client, world: &Arc<RwLock<World>>, flags: &Flags) -> Watches {
        let config = WatchParams::default;
        let services = Informer::start_slim(Api::all(client.clone()), config(), |service: &mut Service| {
            (service.metadata.annotations, service.metadata.labels, service.status) = (None, None, None);
        });
        let slices = Informer::start_slim(Api::all(client.clone()), config(), |slice: &mut EndpointSlice| {
            slice.metadata.annotations = None;
            slice.metadata.owner_references = None;
            for endpoint in slice.endpoints.iter_mut().flatten() {
                endpoint.hints = None;
                if let Some(target) = endpoint.target_ref.as_mut() {
                    (target.uid, target.namespace) = (None, None);
                }
            }
        });
        let namespaces = Informer::start_slim(Api::all(client.clone()), config(), |namespace: &mut Namespace| {
            (namespace.metadata.annotations, namespace.metadata.labels) = (None, None);
        });
        let only = Arc::new(flags.namespaces.clone());
        let is_served =
            move |namespace: Option<&String>| only.is_empty() || namespace.is_some_and(|n| only.contains(n));
        let (target, served) = (world.clone(), is_served.clone());
        services.on_change(move |change| {
            if let Some(service) = change.latest().filter(|service| served(service.metadata.namespace.as_ref())) {
                target.write().set_service(NamespacedName::of(&**service), change.new.map(Arc::as_ref));
            }
        });
        let (target, served) = (world.clone(), is_served.clone());
        slices.on_change(move |change| {
            if let Some(slice) = change.latest().filter(|slice| served(slice.metadata.namespace.as_ref())) {
                let key = NamespacedName::of(&**slice);
                target.write().set_slice(&key, change.old.map(Arc::as_ref), change.new.map(Arc::as_ref));
            }
        });
        let target = world.clone();
        namespaces.on_change(move |change| {
            let name = change.latest().and_then(|namespace| namespace.metadata.name.as_ref());
            if let Some(name) = name.filter(|name| is_served(Some(name))) {
                target.write().set_namespace(name, change.new.is_some());
            }
        });
        let pods = (flags.pods == Pods::Verified).then(|| {
            let pods = Informer::start_slim(Api::all(client.clone()), config(), |pod: &mut Pod| {
                (pod.metadata.annotations, pod.metadata.labels, pod.spec) = (None, None, None);
            });
            let target = world.clone();
            pods.on_change(move |change| {
                let namespace = change.latest().and_then(|pod| pod.metadata.namespace.as_deref()).unwrap_or_default();
                target.write().set_pod(namespace, &addresses(change.old), &addresses(change.new));
            });
            pods
        });
        Watches { services, slices, namespaces, pods }
    }

    async fn synced(&self) {
        tokio::join!(self.services.synced(), self.slices.synced(), self.namespaces.synced());
        if let Some(pods) = &self.pods {
            pods.synced().await;
        }
    }

    fn are_synced(&self) -> bool {
        let pods = self.pods.as_ref().is_none_or(Informer::is_synced);
        pods && self.services.is_synced() && self.slices.is_synced() && self.namespaces.is_synced()
    }
}

/// A pod's addresses, as long as it may use them.
fn addresses(pod: Option<&Arc<Pod>>) -> Vec<IpAddr> {
    let status = pod.and_then(|pod| pod.status.as_ref());
    let running = status.filter(|status| !matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")));
    let ips = running.into_iter().flat_map(|status| status.pod_ips.iter().flatten());
    ips.filter_map(|ip| ip.ip.parse().ok()).collect()
}
