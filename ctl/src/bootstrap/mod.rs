//! `ctl bootstrap`: what the `bootstrap` script needs thought for, one subcommand a phase, as kubeadm's phases. Each
//! phase reads flags and files, does one thing that can be done again, and says what it did. Pure parts (what a
//! certificate says, what a unit's command line is, what an image holds) are modules without I/O; this file is the edge.

mod certs;
mod cidr;
mod files;
mod kubeconfig;
mod layout;
mod pki;
mod x509;

use anyhow::Result;
use clap::{Args, Subcommand};
use time::OffsetDateTime;

use crate::flags::GlobalFlags;
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
    /// Show when certificates expire, and renew them
    #[command(subcommand)]
    Certs(CertsCommand),
}

/// `ctl bootstrap certs`.
#[derive(Debug, Subcommand)]
enum CertsCommand {
    /// Show when each certificate expires
    CheckExpiration(FileArgs),
    /// Issue a certificate again with a new key; running components read it by themselves
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
        Phase::Certs(CertsCommand::CheckExpiration(FileArgs { layout, cluster, .. })) => {
            print!("{}", certs::check_expiration(&layout, &cluster, now)?);
        }
        Phase::Certs(CertsCommand::Renew { name, files: FileArgs { layout, cluster, key_algorithm } }) => {
            for renewed in certs::renew(&layout, &cluster, &name, key_algorithm, now)? {
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
