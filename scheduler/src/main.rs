//! `scheduler`: takes the place of kube-scheduler, with its command line.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use component_base::serving::Endpoints;
use component_base::{cli, client, daemon, leader_election};
use scheduler::config::Configuration;
use scheduler::driver::{Driver, Profiles, Watches};
use scheduler::extender::Extenders;
use scheduler::framework::Profile;
use scheduler::options::{IGNORED, Options};
use scheduler::queue::Timing;
use scheduler::server;
use tokio_util::sync::CancellationToken;

/// With glibc's allocator a fifth to a third more of CPU goes into the small pieces of memory that objects are made of.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let options: Options = cli::parse(IGNORED);
    // Decisions are one after the other; on several threads each watch event and each answer would wake another one.
    daemon::run_on_one_thread("kube-scheduler", options.common.v, async |shutdown| run(options, shutdown).await)
}

async fn run(options: Options, shutdown: CancellationToken) -> anyhow::Result<()> {
    let configuration = match &options.config {
        Some(path) => {
            let text = tokio::fs::read_to_string(path).await.with_context(|| format!("{}", path.display()))?;
            Configuration::parse(&text).with_context(|| format!("{}", path.display()))?
        }
        None => Configuration::default(),
    };
    let profiles = configuration
        .profiles
        .iter()
        .map(|profile| {
            // 0 stands for what the cluster's size asks for.
            let share = profile.percentage_of_nodes_to_score.or(configuration.percentage_of_nodes_to_score);
            Profile::build(profile, share.and_then(|share| u32::try_from(share).ok()))
        })
        .collect::<Result<Vec<_>, _>>()?;
    for profile in &profiles {
        tracing::info!(?profile, "profile");
    }

    let kubeconfig =
        options.kubeconfig.clone().or_else(|| configuration.client_connection.kubeconfig.clone().map(Into::into));
    let mut config = client::load(kubeconfig.as_deref()).await?;
    if let Some(master) = &options.master {
        config.cluster_url = master.parse().with_context(|| format!("--master {master}"))?;
    }
    let client = client::connect(config, "kube-scheduler")?;

    let synced = Arc::new(AtomicBool::new(false));
    let elects = options.leader_elect.or(configuration.leader_election.leader_elect).unwrap_or(true);
    let works = synced.clone();
    let endpoints = Endpoints { auth: Some(Arc::new(server::auth(&options).await?)), ..Endpoints::default() }
        .with_check("ping", || Ok(()))
        // One that waits for the lease is ready: it could take over at once.
        .with_check("informer-sync", move || match elects || works.load(Ordering::Relaxed) {
            true => Ok(()),
            false => Err("the watches have not seen all objects yet".to_owned()),
        });
    let explained = Arc::new(OnceLock::new());
    server::start(&options, endpoints, explained.clone(), shutdown.clone()).await?;
    let extenders = Extenders::new(&configuration.extenders)?;

    let driver_client = client.clone();
    let (initial_backoff, max_backoff) = configuration.backoff();
    let unschedulable_flush = options.pod_max_in_unschedulable_pods_duration;
    let timing = Timing { initial_backoff, max_backoff, unschedulable_flush };
    let work = async move |shutdown: CancellationToken| {
        let driver = Driver::new(driver_client, Profiles::new(profiles), timing, extenders);
        _ = explained.set(driver.clone());
        let watches = Watches::start(&driver);
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = watches.synced() => {}
        }
        synced.store(true, Ordering::Relaxed);
        let (nodes, pods) = driver.size();
        tracing::info!(nodes, pods, "caches are filled: scheduling");
        driver.run(shutdown).await;
        Ok(())
    };
    if !elects {
        return work(shutdown).await;
    }
    let defaults = &configuration.leader_election;
    let mut election =
        leader_election::Config::new(options.leader_elect_resource_name.as_ref().unwrap_or(&defaults.resource_name));
    election.namespace =
        options.leader_elect_resource_namespace.clone().unwrap_or_else(|| defaults.resource_namespace.clone());
    election.lease_duration = options.leader_elect_lease_duration.unwrap_or(defaults.lease_duration);
    election.renew_deadline = options.leader_elect_renew_deadline.unwrap_or(defaults.renew_deadline);
    election.retry_period = options.leader_elect_retry_period.unwrap_or(defaults.retry_period);
    let (told, teller) = (election.clone(), client.clone());
    let lead = |stop| {
        told.tell(teller, "default-scheduler");
        work(stop)
    };
    leader_election::run(client, election, shutdown, lead).await
}
