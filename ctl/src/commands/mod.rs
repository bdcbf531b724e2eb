//! kubectl's commands, one file each.

use std::process::ExitCode;

use clap::{CommandFactory, Subcommand};

use crate::flags::GlobalFlags;

/// A command of kubectl's.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print the shell completion script
    Completion {
        /// The shell to complete in
        shell: clap_complete::Shell,
    },
}

/// Runs one command.
pub(crate) async fn run(command: Command, _flags: &GlobalFlags) -> anyhow::Result<ExitCode> {
    match command {
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut crate::Cli::command(), "ctl", &mut std::io::stdout());
        }
    }
    Ok(ExitCode::SUCCESS)
}
