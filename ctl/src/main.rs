//! `ctl`: the command line. kubectl's commands live in `commands`, the phases that set up a cluster (kubeadm's share)
//! in `bootstrap`. This file only parses, starts the runtime and prints the error of the one command that ran.

mod bootstrap;
mod cluster;
mod commands;
mod flags;
mod objects;
mod output;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use flags::GlobalFlags;

/// Controls a Kubernetes cluster, and sets one up.
#[derive(Debug, Parser)]
#[command(name = "ctl", version, propagate_version = false, disable_help_subcommand = false)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) flags: GlobalFlags,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do: kubectl's commands side by side with `bootstrap`.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Set up a machine or a cluster: the phases that the `bootstrap` script is made of
    Bootstrap(bootstrap::BootstrapArgs),
    #[command(flatten)]
    Kubectl(commands::Command),
}

fn main() -> ExitCode {
    end_with_the_reader();
    let cli = Cli::parse();
    flags::init_logging(cli.flags.verbosity);
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Bootstrap(args) => bootstrap::run(args, &cli.flags).await.map(|()| ExitCode::SUCCESS),
            Command::Kubectl(command) => commands::run(command, &cli.flags).await,
        }
    });
    // A blocked read of stdin must not keep the process alive.
    runtime.shutdown_background();
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// `ctl … | head`: when nobody reads on, there is nothing more to do, and nothing to complain of.
fn end_with_the_reader() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let words = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        if words.starts_with("failed printing to stdout") && words.contains("Broken pipe") {
            // As a process that SIGPIPE ended.
            std::process::exit(141);
        }
        usual(panic);
    }));
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
