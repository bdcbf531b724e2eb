//! `exec` and `attach`: a process in a container.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

use super::shared::{default_container, one_pod};
use super::streams::{self, Streams};
use crate::cluster::Cluster;
use crate::flags::GlobalFlags;
use crate::objects::{items, name, text};

/// Execute a command in a container
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// POD or TYPE/NAME
    target: String,
    #[arg(short = 'c', long)]
    container: Option<String>,
    /// Pass standard input to the container
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Standard input is a terminal
    #[arg(short = 't', long)]
    tty: bool,
    #[arg(short = 'q', long)]
    quiet: bool,
    /// Accepted for kubectl's sake
    #[arg(long, hide = true)]
    pod_running_timeout: Option<String>,
    /// The command, behind --
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Attach to a running container
#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// POD or TYPE/NAME
    target: String,
    #[arg(short = 'c', long)]
    container: Option<String>,
    #[arg(short = 'i', long)]
    stdin: bool,
    #[arg(short = 't', long)]
    tty: bool,
    #[arg(short = 'q', long)]
    quiet: bool,
}

pub(crate) async fn exec(args: ExecArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let command = match args.command.split_first() {
        Some((first, rest)) if first == "--" => rest,
        _ => args.command.as_slice(),
    };
    if command.is_empty() {
        bail!("you must specify at least one command for the container");
    }
    let cluster = Cluster::connect(flags).await?;
    let pod = one_pod(&cluster, &args.target).await?;
    refuse_ended(&pod)?;
    let container = default_container(&pod, args.container.as_deref(), args.quiet)?;
    streams::exec(&cluster, name(&pod), &container, command, Streams { stdin: args.stdin, tty: args.tty }).await
}

pub(crate) async fn attach(args: AttachArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    let pod = one_pod(&cluster, &args.target).await?;
    refuse_ended(&pod)?;
    let container = default_container(&pod, args.container.as_deref(), args.quiet)?;
    let spec = items(&pod, "/spec/containers").iter().find(|spec| text(spec, "/name") == container);
    let has_tty = spec.is_some_and(|spec| spec["tty"] == true);
    if args.tty && !has_tty {
        eprintln!("error: Unable to use a TTY - container {container} did not allocate one");
    }
    streams::attach(&cluster, name(&pod), &container, Streams { stdin: args.stdin, tty: args.tty && has_tty }).await
}

fn refuse_ended(pod: &serde_json::Value) -> Result<()> {
    let phase = text(pod, "/status/phase");
    if phase == "Succeeded" || phase == "Failed" {
        bail!("cannot exec into a container in a completed pod; current phase is {phase}");
    }
    Ok(())
}
