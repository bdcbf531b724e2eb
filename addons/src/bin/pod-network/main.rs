//! `pod-network`: gives the pods of this node a network, and reaches those of the others.
//!
//! It waits until the node has its range of pod addresses (`spec.podCIDR`), and then sees to: forwarding; a route to every other
//! node's range, by way of that node's address where the nodes share a link, else through a tunnel (VXLAN, `plan::Mtu`
//! says how large packets may be); pods' packets to the world leave under the node's address; and, last, the CNI configuration, with which the container runtime calls the network ready. It follows changes of
//! the nodes, and repairs what somebody else has removed.
//!
//! Nothing of it is taken away when the daemon ends: pods go on talking. `--cleanup` does that.
#![forbid(unsafe_code)]

mod host;
mod plan;
mod policy;

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use component_base::cli::CommonFlags;
use component_base::informer::Informer;
use component_base::{cli, client, daemon, nftables};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::WatchParams;
use kube::api::{Patch, PatchParams};
use rtnetlink::Handle;
use serde_json::json;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use component_base::cidr::Cidr;
use plan::{Mtu, Routes};

/// How often everything is compared with what is wanted, changes or none.
const RESYNC: Duration = Duration::from_secs(30);
/// Pause after a change, so that many nodes that come at once cost one round.
const SETTLE: Duration = Duration::from_millis(100);
const RETRY: Duration = Duration::from_secs(2);

/// Pod network of a node.
#[derive(Debug, Parser)]
#[command(name = "pod-network")]
struct Flags {
    /// kubeconfig of an identity that may list and watch nodes.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Name of this node instead of the host name.
    #[arg(long, alias = "node-name")]
    hostname_override: Option<String>,
    /// Ranges of all pods of the cluster; within them packets keep their source address.
    #[arg(long, value_delimiter = ',')]
    cluster_cidr: Vec<Cidr>,
    /// Directory of the CNI configuration.
    #[arg(long, default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
    /// Directory of the CNI plugins.
    #[arg(long, default_value = "/usr/lib/cni")]
    cni_bin_dir: PathBuf,
    /// MTU of the pods' links; default: that of the node's link, or what fits the tunnel where pods of IPv6 or nodes that speak
    /// IPv6 need it. Where a network between nodes drops fragments, say what fits the tunnel (50 bytes less than the link).
    #[arg(long)]
    mtu: Option<u32>,
    /// Remove routes, rules and configuration, and end.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = clap::ArgAction::Set)]
    cleanup: bool,
    #[command(flatten)]
    common: CommonFlags,
}

fn main() -> ExitCode {
    let flags: Flags = cli::parse(&[]);
    daemon::run_on_one_thread("pod-network", flags.common.v, async |shutdown| run(flags, shutdown).await)
}

async fn run(flags: Flags, shutdown: CancellationToken) -> anyhow::Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection().context("opening netlink")?;
    tokio::spawn(connection);
    if flags.cleanup {
        return cleanup(&flags, &handle).await;
    }
    let own = match &flags.hostname_override {
        Some(name) => name.clone(),
        None => nix::unistd::gethostname().context("reading the host name")?.to_string_lossy().to_lowercase(),
    };
    let missing = host::missing_plugins(&flags.cni_bin_dir);
    if !missing.is_empty() {
        let directory = flags.cni_bin_dir.display();
        tracing::warn!(%directory, ?missing, "CNI plugins are missing; install the package containernetworking-plugins");
    }
    let client = client::connect(client::load(flags.kubeconfig.as_deref()).await?, "pod-network/v1.36.0 pilothouse")?;
    let api = Api::<Node>::all(client.clone());
    let nodes = Informer::start_slim(Api::all(client.clone()), WatchParams::default(), slim);
    let changed = Arc::new(Notify::new());
    let notify = changed.clone();
    nodes.on_change(move |change| {
        if change.old.map(|node| essence(node)) != change.new.map(|node| essence(node)) {
            notify.notify_one();
        }
    });
    // It ends with the shutdown, and its rules stay.
    tokio::spawn(policy::run(client, own.clone(), nodes.clone(), shutdown.clone()));
    tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        () = nodes.synced() => {}
    }
    let mut network =
        Network { flags, own, handle, api, applied: Default::default(), guard: Default::default(), told: false };
    loop {
        let pause = match network.sync(&nodes).await {
            Ok(()) => RESYNC,
            Err(error) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    retry_s = RETRY.as_secs(),
                    "the pod network is not complete"
                );
                RETRY
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            // Nodes have changed.
            () = changed.notified() => tokio::time::sleep(SETTLE).await,
            // Time to look whether all is still there, or to try again.
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Of a node only what the network reads.
fn slim(node: &mut Node) {
    node.metadata.annotations = None;
    node.metadata.labels = None;
    if let Some(status) = node.status.as_mut() {
        let addresses = status.addresses.take();
        *status = Default::default();
        status.addresses = addresses;
    }
}

fn essence(node: &Node) -> (Vec<Cidr>, Vec<IpAddr>) {
    (plan::pod_cidrs(node), plan::internal_ips(node).collect())
}

struct Network {
    flags: Flags,
    own: String,
    handle: Handle,
    api: Api<Node>,
    /// The rules that were applied last, which are looked at in each round.
    applied: nftables::Ruleset,
    guard: nftables::Guard,
    /// Whether the node's status says that the network is there.
    told: bool,
}

// === impl Network ===

impl Network {
    /// Make the host as it shall be. What fails does not keep the rest from being done; the first failure is returned.
    async fn sync(&mut self, nodes: &Informer<Node>) -> anyhow::Result<()> {
        let Some(node) = nodes.get("", &self.own) else {
            tracing::info!(node = self.own, "waiting for the node to be registered");
            return Ok(());
        };
        let cidrs = plan::pod_cidrs(&node);
        if cidrs.is_empty() {
            tracing::info!(node = self.own, "waiting for the node's podCIDR");
            return Ok(());
        }
        host::enable_forwarding(&cidrs)?;
        let addresses = host::addresses().await?;
        let on_link: Vec<Cidr> = addresses.iter().map(|(_, _, range)| *range).collect();
        let wanted = plan::network(nodes.list().iter().map(Arc::as_ref), &self.own, &on_link);
        let own = plan::internal_ips(&node).next();
        let link = addresses.iter().find(|(_, address, _)| Some(*address) == own).map(|(link, _, _)| link);
        let has_tunnels = !wanted.tunnels.is_empty();
        let mtu = match (link, own) {
            (Some(link), Some(own)) => Some(Mtu::of(host::link_mtu(link).await?, own, &cidrs, has_tunnels)),
            _ => None,
        };
        let tunnel = match (own, mtu) {
            (Some(own), Some(mtu)) if has_tunnels => {
                host::set_tunnel(own, &cidrs, mtu.tunnel, &wanted.tunnels).await.context("the tunnel")?
            }
            _ => {
                if addresses.iter().any(|(link, ..)| link == plan::TUNNEL) {
                    host::remove_tunnel().await;
                }
                0
            }
        };
        let routed = self.sync_routes(&wanted.routes, tunnel).await;
        self.sync_rules(plan::rules(&cidrs, &self.flags.cluster_cidr, &wanted.routes, mtu.map(|mtu| mtu.whole)))
            .await?;
        let config = plan::cni_config(&cidrs, self.flags.mtu.or(mtu.map(|mtu| mtu.pods)));
        let directory = &self.flags.cni_conf_dir;
        if host::write_config(directory, &config).with_context(|| directory.display().to_string())? {
            tracing::info!(directory = %directory.display(), cidrs = ?shown(&cidrs), "CNI configuration written");
        }
        if !self.told {
            self.tell().await;
        }
        routed
    }

    async fn sync_routes(&self, wanted: &Routes, tunnel: u32) -> anyhow::Result<()> {
        let current = host::current_routes(&self.handle).await?;
        let (set, gone) = plan::difference(&current, wanted);
        let mut failure = Ok(());
        for cidr in gone {
            let Some(next) = current.get(&cidr) else { continue };
            tracing::info!(%cidr, "route removed");
            if let Err(error) = host::remove_route(&self.handle, cidr, *next, tunnel).await {
                failure = failure.and(Err(error.context(format!("removing the route to {cidr}"))));
            }
        }
        for (cidr, next) in set {
            // A route of another kind for the same range is not replaced by the kernel.
            if let Some(old) = current.get(&cidr)
                && let Err(error) = host::remove_route(&self.handle, cidr, *old, tunnel).await
            {
                tracing::debug!(%cidr, error = format!("{error:#}"), "old route not removed");
            }
            tracing::info!(%cidr, ?next, "route set");
            if let Err(error) = host::set_route(&self.handle, cidr, next, tunnel).await {
                let context = format!("setting the route to {cidr} ({next:?})");
                failure = failure.and(Err(error.context(context)));
            }
        }
        failure
    }

    /// The rules are one small table, replaced in one transaction where it is not as it should be.
    async fn sync_rules(&mut self, wanted: nftables::Ruleset) -> anyhow::Result<()> {
        if wanted != self.applied || !self.guard.is_intact(plan::TABLE, || &wanted).await {
            self.guard.replace(&wanted.create(plan::TABLE)).await?;
            self.applied = wanted;
            tracing::info!("masquerading");
        }
        Ok(())
    }

    /// Say in the node's status that its network is there, as a cloud's route controller does.
    async fn tell(&mut self) {
        let now = apimachinery::time::now();
        let patch = json!({"status": {"conditions": [{
            "type": "NetworkUnavailable",
            "status": "False",
            "reason": "PodNetworkIsUp",
            "message": "pod-network has routes to the nodes and has written the CNI configuration",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }]}});
        match self.api.patch_status(&self.own, &PatchParams::default(), &Patch::Strategic(patch)).await {
            Ok(_) => self.told = true,
            // The node works without it.
            Err(error) => tracing::warn!(node = self.own, %error, "condition NetworkUnavailable not set"),
        }
    }
}

fn shown(cidrs: &[Cidr]) -> Vec<String> {
    cidrs.iter().map(Cidr::to_string).collect()
}

/// Take away everything, as far as it goes; the first failure is returned at the end.
async fn cleanup(flags: &Flags, handle: &Handle) -> anyhow::Result<()> {
    let mut outcome = host::remove_config(&flags.cni_conf_dir).context("removing the CNI configuration");
    for (cidr, next) in host::current_routes(handle).await? {
        let removed = host::remove_route(handle, cidr, next, 0).await;
        outcome = outcome.and(removed.with_context(|| format!("removing the route to {cidr}")));
    }
    host::remove_tunnel().await;
    let outcome = outcome.and(policy::clean_up().await.map_err(Into::into));
    outcome.and(nftables::remove(plan::TABLE).await.map_err(Into::into))
}
