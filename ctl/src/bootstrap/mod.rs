//! `ctl bootstrap`: what the `bootstrap` script needs thought for, one subcommand a phase, as kubeadm's phases. Each
//! phase reads flags and files, does one thing that can be done again, and says what it did. Pure parts (what a
//! certificate says, what a unit's command line is, what an image holds) are modules without I/O; this file is the edge.

mod certs;
mod cidr;
mod cluster;
mod components;
mod config;
mod discovery;
mod files;
mod image;
mod join;
mod kubeconfig;
mod layout;
mod objects;
mod phases;
mod pki;
mod pods;
mod process;
mod status;
mod token;
#[cfg(test)]
mod units;
mod wait;
mod x509;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use time::OffsetDateTime;

use crate::flags::GlobalFlags;
use components::{Component, NodeFlags};
use config::ContainerdFlags;
use kubeconfig::Identity;
use layout::{ClusterFlags, Layout};
use x509::KeyAlgorithm;

/// The arguments of `ctl bootstrap`.
#[derive(Debug, Args)]
pub(crate) struct BootstrapArgs {
    #[command(subcommand)]
    phase: Phase,
}

/// One phase of setting up a machine or a cluster.
#[derive(Debug, Subcommand)]
enum Phase {
    /// Make the certificates and keys under /etc/kubernetes/pki that are missing
    Pki(FileArgs),
    /// Make the kubeconfigs under /etc/kubernetes that are missing
    Kubeconfig {
        /// Whose (default: all)
        #[arg(value_enum)]
        identities: Vec<Identity>,
        #[command(flatten)]
        files: FileArgs,
    },
    /// Write configuration files and command lines (default: of a control-plane node)
    Config {
        #[command(flatten)]
        files: ConfigArgs,
        /// Only these components
        #[arg(long, value_enum, value_delimiter = ',', value_name = "NAMES")]
        components: Vec<Component>,
        /// More arguments for their command lines
        #[arg(last = true)]
        extra: Vec<String>,
    },
    /// Print a component's command line, one argument a line
    Command {
        #[arg(value_enum)]
        component: Component,
        #[command(flatten)]
        files: ConfigArgs,
        /// More arguments
        #[arg(last = true)]
        extra: Vec<String>,
    },
    /// Write containerd's configuration
    Containerd {
        #[command(flatten)]
        layout: Layout,
        #[command(flatten)]
        node: NodeFlags,
        #[command(flatten)]
        containerd: ContainerdFlags,
        /// Put back what was there before
        #[arg(long)]
        restore: bool,
    },
    /// Build images from what is on the machine, and import them into containerd
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Apply the cluster's own objects: joining, discovery, and what kube-proxy, the pod network and DNS need
    Objects(ConfigArgs),
    /// Label this node as one of the control plane
    MarkControlPlane {
        #[command(flatten)]
        files: FileArgs,
        /// Keep ordinary pods away from it
        #[arg(long)]
        taint: bool,
    },
    /// Make, list and delete bootstrap tokens
    Token {
        #[command(subcommand)]
        command: phases::TokenCommand,
        #[command(flatten)]
        layout: Layout,
    },
    /// Prepare this machine to join a cluster
    Join(join::JoinArgs),
    /// Wait for components, `defaults`, `node`, `kubelet-certificate` or `dns-service`
    Wait {
        #[arg(required = true)]
        targets: Vec<wait::Target>,
        /// How long to wait for each, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 120)]
        timeout: u64,
        #[command(flatten)]
        files: ConfigArgs,
    },
    /// Get a page, trying until it is there
    Fetch {
        url: String,
        /// How long to try, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u64,
    },
    /// Have the container runtime remove every pod
    RemovePods(NodeFlags),
    /// Show this machine's components
    Status(ConfigArgs),
    /// Show when certificates expire, and renew them
    #[command(subcommand)]
    Certs(CertsCommand),
}

/// `ctl bootstrap certs`.
#[derive(Debug, Subcommand)]
enum CertsCommand {
    /// Show when each certificate expires
    CheckExpiration(FileArgs),
    /// Issue a certificate again with a new key; components that run with it must be started anew
    Renew {
        /// A name that check-expiration shows, or `all`
        name: String,
        #[command(flatten)]
        files: FileArgs,
    },
}

/// Where files are and what they are to say.
#[derive(Debug, Args)]
struct FileArgs {
    #[command(flatten)]
    layout: Layout,
    #[command(flatten)]
    cluster: ClusterFlags,
    /// The kind of private keys to make
    #[arg(long, value_enum, default_value = "ECDSA-P256")]
    key_algorithm: KeyAlgorithm,
}

/// Where files are, and what is said in configurations and command lines.
#[derive(Debug, Args)]
struct ConfigArgs {
    #[command(flatten)]
    layout: Layout,
    #[command(flatten)]
    cluster: ClusterFlags,
    #[command(flatten)]
    node: NodeFlags,
}

/// Runs one phase.
pub(crate) async fn run(args: BootstrapArgs, _flags: &GlobalFlags) -> Result<()> {
    let now = OffsetDateTime::now_utc();
    match args.phase {
        Phase::Pki(FileArgs { layout, cluster, key_algorithm }) => {
            let made = pki::ensure(&layout, &cluster, key_algorithm, now)?;
            report_made(&made, &layout.pki());
        }
        Phase::Kubeconfig { identities, files: FileArgs { layout, cluster, key_algorithm } } => {
            let identities = if identities.is_empty() { Identity::ALL.to_vec() } else { identities };
            let made = kubeconfig::ensure(&layout, &cluster, &identities, key_algorithm, now)?;
            report_made(&made, &layout.kubernetes());
        }
        Phase::Config { files: ConfigArgs { layout, cluster, node }, components, extra } => {
            let components = if components.is_empty() { Component::CONTROL_PLANE.to_vec() } else { components };
            if components.len() != 1 && !extra.is_empty() {
                anyhow::bail!("arguments after -- belong to one component: give --components with its name");
            }
            let layout = absolute(layout)?;
            for changed in config::write_all(&components, &layout, &cluster, &node, &extra)? {
                println!("wrote {changed}");
            }
        }
        Phase::Command { component, files: ConfigArgs { layout, cluster, node }, extra } => {
            let arguments = components::arguments(component, &absolute(layout)?, &cluster, &node)?;
            for argument in arguments.iter().chain(&extra) {
                println!("{argument}");
            }
        }
        Phase::Containerd { layout, node, containerd, restore } => {
            let path = layout.containerd_config();
            let changed = match restore {
                true => config::restore_containerd(&layout)?,
                false => config::write_containerd(&layout, &containerd, &node)?,
            };
            println!("{} {}", if changed { "wrote" } else { "kept" }, path.display());
        }
        Phase::Image(command) => image::run(command).await?,
        Phase::Objects(ConfigArgs { layout, cluster, node }) => {
            let applied = phases::apply_objects(&absolute(layout)?, &cluster, &node).await?;
            println!("applied {applied} objects");
        }
        Phase::MarkControlPlane { files: FileArgs { layout, cluster, .. }, taint } => {
            phases::mark_control_plane(&layout, &cluster, taint).await?;
        }
        Phase::Token { command, layout } => phases::tokens(command, &layout, jiff::Timestamp::now()).await?,
        Phase::Join(arguments) => {
            join::join(arguments).await?;
        }
        Phase::Wait { targets, timeout, files: ConfigArgs { layout, cluster, node } } => {
            let container_runtime_endpoint = &node.container_runtime_endpoint;
            let places = wait::Places { layout: &layout, cluster: &cluster, container_runtime_endpoint };
            wait::wait(&targets, std::time::Duration::from_secs(timeout), &places).await?;
        }
        Phase::Fetch { url, timeout } => {
            print!("{}", wait::fetch(&url, std::time::Duration::from_secs(timeout)).await?)
        }
        Phase::RemovePods(node) => {
            println!("removed {} pods", pods::remove_all(&node.container_runtime_endpoint).await?);
        }
        Phase::Status(ConfigArgs { layout, cluster, node }) => {
            let container_runtime_endpoint = &node.container_runtime_endpoint;
            let places = wait::Places { layout: &layout, cluster: &cluster, container_runtime_endpoint };
            let (table, healthy) = status::status(&places).await;
            print!("{table}");
            if !healthy {
                anyhow::bail!("not everything is healthy");
            }
        }
        Phase::Certs(CertsCommand::CheckExpiration(FileArgs { layout, cluster, .. })) => {
            print!("{}", certs::check_expiration(&layout, &cluster, now)?);
        }
        Phase::Certs(CertsCommand::Renew { name, files: FileArgs { layout, cluster, key_algorithm } }) => {
            let mut all = match layout.pki_file("ca.key").exists() {
                true => certs::renew(&layout, &cluster, &name, key_algorithm, now)?,
                false => Vec::new(),
            };
            if name == "all" {
                all.extend(join::renew_program_tokens(&layout).await?);
            }
            if all.is_empty() {
                anyhow::bail!("{name}: there is nothing to renew on this machine");
            }
            for renewed in all {
                println!("renewed {renewed}");
            }
        }
    }
    Ok(())
}

fn report_made(made: &[impl AsRef<str>], directory: &std::path::Path) {
    if made.is_empty() {
        println!("kept everything in {}", directory.display());
    } else {
        let names: Vec<&str> = made.iter().map(AsRef::as_ref).collect();
        println!("made {} in {}", names.join(", "), directory.display());
    }
}

/// Files name other files by absolute paths, whatever directory they are read from.
fn absolute(mut layout: Layout) -> Result<Layout> {
    let resolve = |path: &std::path::Path| std::path::absolute(path).with_context(|| format!("{}", path.display()));
    layout.root = resolve(&layout.root)?;
    layout.cert_dir = layout.cert_dir.as_deref().map(resolve).transpose()?;
    layout.kubeconfig_dir = layout.kubeconfig_dir.as_deref().map(resolve).transpose()?;
    Ok(layout)
}
