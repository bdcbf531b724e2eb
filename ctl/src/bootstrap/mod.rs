//! `ctl bootstrap`: what the `bootstrap` script needs thought for, one subcommand a phase, as kubeadm's phases.

use clap::{Args, Subcommand};

use crate::flags::GlobalFlags;

/// The arguments of `ctl bootstrap`.
#[derive(Debug, Args)]
pub(crate) struct BootstrapArgs {
    #[command(subcommand)]
    phase: Phase,
}

/// One phase of setting up a machine or a cluster.
#[derive(Debug, Subcommand)]
enum Phase {}

/// Runs one phase.
pub(crate) async fn run(args: BootstrapArgs, _flags: &GlobalFlags) -> anyhow::Result<()> {
    match args.phase {}
}
