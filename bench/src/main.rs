//! Benchmarks. `bench micro` measures the hot pure paths; `bench api` puts a load on an API server. Figures are CPU time per
//! unit of work and memory rather than wall time, which says little on a shared machine.
#![forbid(unsafe_code)]

mod api;
mod micro;
mod scheduling;
mod table;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "bench", about = "Load generators and benchmarks")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// CPU time of decoding, patching, selecting, deciding
    Micro,
    /// Decisions, and pods placed on hollow nodes
    Scheduler(scheduling::Options),
    /// Create, get, list, patch, update status, watch, delete
    Api(api::Options),
}

fn main() -> anyhow::Result<()> {
    component_base::daemon::init(0);
    match Cli::parse().command {
        Command::Micro => micro::run(),
        Command::Scheduler(options) if options.decisions => scheduling::decisions(),
        Command::Scheduler(options) => scheduling::run(options),
        Command::Api(options) => api::run(options),
    }
}
