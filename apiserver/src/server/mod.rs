//! The server around the endpoints: what all requests share, how it starts and ends, and the pipeline.

pub mod body;
pub mod metrics;
pub mod negotiation;
pub mod pipeline;
pub mod request_info;
pub mod respond;

use crate::admission::AdmissionChain;
use crate::authentication::{self, Authenticator};
use crate::authorization::{self, Authorizer};
use crate::bootstrap;
use crate::endpoints::component_status;
use crate::features;
use crate::options::Options;
use crate::proxy::Proxy;
use crate::registry::{self, Registry};
use crate::storage::Store;
use crate::storage::etcd::Etcd;
use anyhow::Context as _;
use component_base::serving::{self, Ending, Listening};
use component_base::tls::ReloadingKeyPair;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::info;

/// Connections at a time; a kubelet holds one or two.
const CONNECTIONS_MAX: usize = 20_000;
/// How often etcd is asked whether it is there.
const ETCD_CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// How often it is looked whether the requests that were under way when the server was told to stop have been answered, and
/// how long streams have after that.
const DRAIN_INTERVAL: Duration = Duration::from_millis(50);
const DRAIN_STREAMS: Duration = Duration::from_secs(1);
/// Nor do they get longer than this, whatever `--request-timeout` says.
const DRAIN_MAX: Duration = Duration::from_secs(60);

/// What every request may use.
pub struct Context {
    pub options: Options,
    pub registry: Registry,
    pub store: Arc<Store>,
    pub authenticator: Authenticator,
    pub authorizer: Arc<Authorizer>,
    pub admission: AdmissionChain,
    pub proxy: Proxy,
    pub state: State,
}

/// How the server is.
pub struct State {
    etcd_answers: AtomicBool,
    bootstrapped: AtomicBool,
    /// Cancelled when the process is to end: watches end, `/readyz` fails.
    pub stopping: CancellationToken,
    /// Room for requests that read, and for those that write.
    reading: Semaphore,
    mutating: Semaphore,
    /// Room for those that wait for room.
    waiting: Semaphore,
}

// === impl State ===

impl State {
    pub fn etcd_answers(&self) -> bool {
        self.etcd_answers.load(Ordering::Relaxed)
    }

    pub fn is_bootstrapped(&self) -> bool {
        self.bootstrapped.load(Ordering::Relaxed)
    }

    fn is_idle(&self, options: &Options) -> bool {
        self.reading.available_permits() == slots(options.max_requests_inflight)
            && self.mutating.available_permits() == slots(options.max_mutating_requests_inflight)
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.is_cancelled()
    }
}

/// Runs the server until `shutdown`.
pub async fn run(options: Options, shutdown: CancellationToken) -> anyhow::Result<()> {
    features::switch(&options.feature_gates, &options.runtime_config).map_err(anyhow::Error::msg)?;
    let tls = tls_config(&options)?;
    let etcd = Etcd::new(&options).context("cannot set up the etcd client")?;
    let settings = registry::settings(&options)?;
    let mut endpoints = registry::endpoints();
    endpoints.extend(authentication::endpoints(&options)?);
    endpoints.extend(authorization::endpoints());
    endpoints.extend(component_status::endpoints());
    let registry = Registry::new(registry::strategies(settings.clone()), endpoints);
    let store = Arc::new(Store::new(etcd.clone(), &options.etcd_prefix, registry.resources()));
    let authenticator = Authenticator::new(&options, store.clone())?;
    let authorizer = Arc::new(Authorizer::new(&options, store.clone())?);
    let admission = AdmissionChain::new(&options, &registry, store.clone(), authorizer.clone())?;
    let proxy = Proxy::new(&options)?;
    let state = State {
        etcd_answers: AtomicBool::new(false),
        bootstrapped: AtomicBool::new(false),
        stopping: shutdown.clone(),
        reading: Semaphore::new(slots(options.max_requests_inflight)),
        mutating: Semaphore::new(slots(options.max_mutating_requests_inflight)),
        waiting: Semaphore::new(slots(
            options.max_requests_inflight.saturating_add(options.max_mutating_requests_inflight),
        )),
    };
    let address = (options.bind_address, options.secure_port);
    let context = Arc::new(Context { options, registry, store, authenticator, authorizer, admission, proxy, state });

    let listener =
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on {}:{}", address.0, address.1))?;
    // What requests need works on until they have been answered.
    let working = CancellationToken::new();
    let feeding = tokio::spawn(context.store.clone().run(working.clone()));
    let checking = tokio::spawn(check_etcd(context.clone(), etcd));
    let bootstrapping = tokio::spawn({
        let context = context.clone();
        let done = context.clone();
        let ready = move || {
            done.state.bootstrapped.store(true, Ordering::Relaxed);
            info!("ready");
        };
        let shutdown = shutdown.clone();
        async move {
            context.store.loaded().await;
            bootstrap::run(context, ready, shutdown).await;
        }
    });
    let allocating = tokio::spawn({
        let (store, shutdown) = (context.store.clone(), working.clone());
        async move {
            store.loaded().await;
            settings.services.run(store, shutdown).await;
        }
    });
    let compacting = tokio::spawn({
        let (store, every, shutdown) =
            (context.store.clone(), context.options.etcd_compaction_interval, working.clone());
        async move {
            if !every.is_zero() {
                store.run_compactor(every, shutdown).await;
            }
        }
    });

    info!(address = %address.0, port = address.1, "serving");
    let listening = Listening { tls: Some(Arc::new(tls)), max_connections: CONNECTIONS_MAX };
    let ending = Ending { shutdown: CancellationToken::new(), cut: CancellationToken::new() };
    let max_streams = match context.options.http2_max_streams_per_connection {
        0 => serving::MAX_STREAMS,
        streams => streams,
    };
    let serving = serving::serve_until(listener, listening, ending.clone(), max_streams, {
        let context = context.clone();
        move |request| {
            let context = context.clone();
            async move { pipeline::handle(context, request).await }
        }
    });
    tokio::select! {
        () = serving => {}
        () = stop(&context, &shutdown, &ending) => {}
    }
    // It takes back that this server is there.
    if tokio::time::timeout(DRAIN_STREAMS, bootstrapping).await.is_err() {
        tracing::warn!("could not withdraw this server from the kubernetes Service");
    }
    for task in [feeding, checking, compacting, allocating] {
        task.abort();
    }
    Ok(())
}

/// Room for so many requests; 0 stands for no limit.
fn slots(requests: usize) -> usize {
    if requests == 0 { Semaphore::MAX_PERMITS } else { requests.min(Semaphore::MAX_PERMITS) }
}

/// Waits for `shutdown`, then brings serving to its end: `/readyz` fails at once, for as long as load balancers take to
/// notice; then watches end and nothing new is begun; then, when all is answered, the connections that are left are cut.
async fn stop(context: &Context, shutdown: &CancellationToken, ending: &Ending) {
    shutdown.cancelled().await;
    tokio::time::sleep(context.options.shutdown_delay_duration).await;
    info!("stopping");
    context.store.close_watches();
    ending.shutdown.cancel();
    let deadline = tokio::time::Instant::now() + context.options.request_timeout.min(DRAIN_MAX);
    while !context.state.is_idle(&context.options) && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(DRAIN_INTERVAL).await;
    }
    tokio::time::sleep(DRAIN_STREAMS).await;
    ending.cut.cancel();
}

/// Keeps `/readyz`'s word on etcd true.
async fn check_etcd(context: Arc<Context>, etcd: Etcd) {
    loop {
        let answers = etcd.revision().await.is_ok();
        context.state.etcd_answers.store(answers, Ordering::Relaxed);
        if let Ok(bytes) = etcd.size().await {
            metrics::storage_size(bytes);
        }
        tokio::time::sleep(ETCD_CHECK_INTERVAL).await;
    }
}

/// TLS with our certificate. Clients are asked for one of theirs where an authority is named that could believe it.
fn tls_config(options: &Options) -> anyhow::Result<rustls::ServerConfig> {
    let (certificate, key) = serving_pair(options)?;
    let pair = ReloadingKeyPair::load(certificate, key)?;
    let builder = rustls::ServerConfig::builder();
    let builder = match (&options.client_ca_file, &options.requestheader_client_ca_file) {
        (None, None) => builder.with_no_client_auth(),
        _ => builder.with_client_cert_verifier(component_base::tls::AnyCertificate::new()),
    };
    let mut config = builder.with_cert_resolver(Arc::new(pair));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// The files of the serving certificate and key; a self-signed pair is made where none is given.
fn serving_pair(options: &Options) -> anyhow::Result<(PathBuf, PathBuf)> {
    match (&options.tls_cert_file, &options.tls_private_key_file) {
        (Some(certificate), Some(key)) => return Ok((certificate.clone(), key.clone())),
        (None, None) => {}
        _ => anyhow::bail!("--tls-cert-file and --tls-private-key-file go together"),
    }
    let (certificate, key) = (options.cert_dir.join("apiserver.crt"), options.cert_dir.join("apiserver.key"));
    if certificate.exists() && key.exists() {
        return Ok((certificate, key));
    }
    std::fs::create_dir_all(&options.cert_dir)
        .with_context(|| format!("cannot make --cert-dir {}", options.cert_dir.display()))?;
    let names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"];
    let mut names: Vec<String> = names.into_iter().map(ToOwned::to_owned).collect();
    names.extend(["127.0.0.1".to_owned(), options.public_address().to_string()]);
    let made = rcgen::generate_simple_self_signed(names)?;
    write_private(&key, made.signing_key.serialize_pem().as_bytes())?;
    std::fs::write(&certificate, made.cert.pem()).with_context(|| format!("cannot write {}", certificate.display()))?;
    Ok((certificate, key))
}

fn write_private(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(content))
        .with_context(|| format!("cannot write {}", path.display()))
}
