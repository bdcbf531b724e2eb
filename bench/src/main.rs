//! Benchmarks. `bench micro` measures the hot pure paths; `bench api` puts a load on an API server, `bench proxy`
//! and `bench dns` on the node's network, `bench pods` on nodes as a whole. Figures are CPU time per
//! unit of work and memory rather than wall time, which says little on a shared machine.
#![forbid(unsafe_code)]

mod api;
#[path = "../../addons/tests/common/mod.rs"]
#[allow(dead_code, reason = "shared with tests")]
mod api_stand_in;
mod functions;
mod micro;
mod network;
mod pods;
mod scheduling;
mod table;

use clap::{Parser, Subcommand};
use std::time::Duration;

/// A daemon is idle when its start is over and what only that needed is given back.
const SETTLED: Duration = Duration::from_secs(15);

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
    /// Endpoint to rule, and memory, of kube-proxy in each mode
    Proxy(network::Options),
    /// Pods on nodes: starts, ends, the kubelet's processor time and memory
    Pods(pods::Options),
    /// Which functions of a running daemon run
    Functions(functions::Options),
    /// Answers of dns
    Dns(network::Options),
}

fn main() -> anyhow::Result<()> {
    component_base::daemon::init(0);
    match Cli::parse().command {
        Command::Micro => micro::run(),
        Command::Scheduler(options) if options.decisions => scheduling::decisions(),
        Command::Scheduler(options) => scheduling::run(options),
        Command::Api(options) => api::run(options),
        Command::Proxy(options) => network::proxy(&options),
        Command::Pods(options) => pods::run(&options),
        Command::Functions(options) => functions::run(&options),
        Command::Dns(options) => network::dns(&options),
    }
}
