//! kube-controller-manager: the controllers that make the cluster what its objects ask for.
//!
//! One process, one watch of each kind, one controller a folder in [`controllers`] over the common [`runtime`].
#![forbid(unsafe_code)]

mod controllers;
mod options;
mod runtime;

use anyhow::Context as _;
use component_base::{
    auth::DelegatedAuth,
    cli, client, daemon, leader_election,
    serving::{self, Endpoints, Listening},
    tls::{ServerTls, self_signed_config},
};
use kube::Client;
use options::{Flags, IGNORED};
use runtime::{Context, Credentials, Limits};
use std::{net::SocketAddr, process::ExitCode, sync::Arc};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

const COMPONENT: &str = "kube-controller-manager";
const MAX_CONNECTIONS: usize = 100;

/// With glibc's allocator a fifth to a third more of CPU goes into the small pieces of memory that objects are made of.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let flags: Flags = cli::parse(IGNORED);
    // One thread carries all loops, and need not be woken for another one's tasks.
    daemon::run_on_one_thread(COMPONENT, flags.common.v, async |shutdown| run(flags, shutdown).await)
}

async fn run(flags: Flags, shutdown: CancellationToken) -> anyhow::Result<()> {
    controllers::check(&flags.controllers).map_err(|why| anyhow::anyhow!("--controllers: {why}"))?;
    flags.authorities().map_err(anyhow::Error::msg)?;
    for gate in &flags.feature_gates.without_effect {
        warn!(gate, "this feature gate switches nothing here");
    }
    let mut config = client::load(flags.kubeconfig.as_deref()).await?;
    if let Some(master) = &flags.master {
        config.cluster_url = master.parse().with_context(|| format!("--master {master:?} is no address"))?;
    }
    let base = client::service(config.clone(), COMPONENT, true)?;
    let own = Client::new(base.clone(), &config.default_namespace);
    let serving = serve(&flags, shutdown.clone()).await?;

    let tokens = flags.use_service_account_credentials;
    let base = if tokens {
        let mut config = config;
        config.auth_info = kube::config::AuthInfo::default();
        client::service(config, COMPONENT, true)?
    } else {
        base
    };
    let work = |stop: CancellationToken| {
        let limits = Limits { qps: flags.kube_api_qps, burst: f64::from(flags.kube_api_burst) };
        let credentials = Credentials::new(own.clone(), base.clone(), tokens, limits, stop.clone());
        run_controllers(Context::new(flags.clone(), own.clone(), credentials, stop))
    };
    let outcome = if flags.leader_elect {
        let mut election = leader_election::Config::new(&flags.leader_elect_resource_name);
        election.namespace.clone_from(&flags.leader_elect_resource_namespace);
        election.lease_duration = flags.leader_elect_lease_duration;
        election.renew_deadline = flags.leader_elect_renew_deadline;
        election.retry_period = flags.leader_elect_retry_period;
        let (told, client) = (election.clone(), own.clone());
        let lead = |stop| {
            told.tell(client, COMPONENT);
            work(stop)
        };
        leader_election::run(own.clone(), election, shutdown.clone(), lead).await
    } else {
        work(shutdown.child_token()).await
    };
    shutdown.cancel();
    if let Some(serving) = serving {
        serving.abort();
    }
    outcome
}

/// Runs every controller that is wanted until shutdown.
async fn run_controllers(context: Context) -> anyhow::Result<()> {
    let context = Arc::new(context);
    let mut running = JoinSet::new();
    for entry in controllers::ALL {
        if !context.settings.runs(&[entry.name, entry.alias]) {
            info!(controller = entry.name, "switched off");
            continue;
        }
        let (start, stop, name) = (entry.start, context.shutdown.clone(), entry.name);
        let controller = start(context.clone());
        running.spawn(async move {
            tokio::select! {
                // A controller that is not configured ends at once, and that is well.
                () = controller => {}
                () = stop.cancelled() => {}
            }
            name
        });
    }
    info!(controllers = running.len(), "controllers started");
    while let Some(ended) = running.join_next().await {
        match ended {
            Ok(controller) if !context.shutdown.is_cancelled() => info!(controller, "has nothing to do"),
            Ok(_) => {}
            Err(error) => anyhow::bail!("a controller failed: {error}"),
        }
    }
    // None is left, but leadership is: wait to be told to end.
    context.shutdown.cancelled().await;
    Ok(())
}

/// The secure port: health and metrics.
async fn serve(flags: &Flags, shutdown: CancellationToken) -> anyhow::Result<Option<tokio::task::JoinHandle<()>>> {
    if flags.secure_port == 0 {
        return Ok(None);
    }
    let tls = match (&flags.tls_cert_file, &flags.tls_private_key_file) {
        (Some(certificate), Some(key)) => {
            let (certificate, key, client_ca) = (certificate.clone(), key.clone(), flags.client_ca_file.clone());
            ServerTls { certificate, key, client_ca }.server_config()?
        }
        _ => self_signed_config(COMPONENT, flags.client_ca_file.as_deref())?,
    };
    let kubeconfig = flags.authentication_kubeconfig.as_ref().or(flags.authorization_kubeconfig.as_ref());
    let reviewer = match kubeconfig.or(flags.kubeconfig.as_ref()) {
        Some(path) => Some(client::connect(client::load(Some(path)).await?, COMPONENT)?),
        None => {
            warn!("no --authentication-kubeconfig: the secure port knows callers by their certificates only");
            None
        }
    };
    let open: Vec<&str> = flags.authorization_always_allow_paths.iter().map(String::as_str).collect();
    let mut endpoints =
        Endpoints { auth: Some(Arc::new(DelegatedAuth::new(reviewer, true, &open))), ..Endpoints::default() };
    for entry in controllers::ALL.iter().filter(|e| flags.runs(&[e.name, e.alias])) {
        // One that fails ends the process, and one that waits for leadership is well.
        endpoints = endpoints.with_check(entry.name, || Ok(()));
    }
    let endpoints = Arc::new(endpoints);
    let address = SocketAddr::new(flags.bind_address, flags.secure_port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}; choose another --secure-port or --bind-address"))?;
    info!(%address, "serving health and metrics");
    let listening = Listening { tls: Some(Arc::new(tls)), max_connections: MAX_CONNECTIONS };
    Ok(Some(tokio::spawn(async move {
        let handler = move |request| {
            let endpoints = endpoints.clone();
            async move { endpoints.handle(request).await }
        };
        serving::serve(listener, listening, shutdown, handler).await;
    })))
}
