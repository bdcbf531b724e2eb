//! kubectl's commands, one file each.

mod apply;
mod cluster_info;
mod create;
mod delete;
mod describe;
mod edit;
mod exec;
mod expose;
mod get;
mod kubeconfig;
mod label;
mod logs;
mod node;
mod patch;
mod port_forward;
mod resources;
mod rollout;
mod run;
mod scale;
mod set;
mod shared;
mod streams;
mod wait;
mod whoami;

use std::process::ExitCode;

use clap::{CommandFactory, Subcommand};

use crate::cluster::RequestError;
use crate::flags::GlobalFlags;

/// A command of kubectl's.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Display one or many resources
    Get(get::GetArgs),
    /// Show details of a specific resource or group of resources
    Describe(describe::DescribeArgs),
    /// Create a resource from a file or from stdin
    Create(create::CreateArgs),
    /// Apply a configuration to a resource by file name or stdin
    Apply(apply::ApplyArgs),
    /// Delete resources by file names, stdin, resources and names, or by resources and label selector
    Delete(delete::DeleteArgs),
    /// Run a particular image on the cluster; with --replicas as a deployment
    Run(run::RunArgs),
    /// Print the logs for a container in a pod
    #[command(visible_alias = "log")]
    Logs(logs::LogsArgs),
    /// Execute a command in a container
    Exec(exec::ExecArgs),
    /// Attach to a running container
    Attach(exec::AttachArgs),
    /// Forward one or more local ports to a pod
    PortForward(port_forward::PortForwardArgs),
    /// Set a new size for a deployment, replica set, or replication controller
    Scale(scale::ScaleArgs),
    /// Take a replication controller, service, deployment or pod and expose it as a new service
    Expose(expose::ExposeArgs),
    /// Manage the rollout of a resource
    Rollout(rollout::RolloutArgs),
    /// Set specific features on objects
    Set(set::SetArgs),
    /// Update the labels on a resource
    Label(label::LabelArgs),
    /// Update the annotations on a resource
    Annotate(label::LabelArgs),
    /// Update fields of a resource
    Patch(patch::PatchArgs),
    /// Edit a resource on the server
    Edit(edit::EditArgs),
    /// Replace a resource by file name or stdin
    Replace(edit::ReplaceArgs),
    /// Wait for a specific condition on one or many resources
    Wait(wait::WaitArgs),
    /// Mark node as unschedulable
    Cordon(node::CordonArgs),
    /// Mark node as schedulable
    Uncordon(node::CordonArgs),
    /// Drain node in preparation for maintenance
    Drain(node::DrainArgs),
    /// Update the taints on one or more nodes
    Taint(node::TaintArgs),
    /// Inspect authorization
    Auth(whoami::AuthArgs),
    /// Modify kubeconfig files
    Config(kubeconfig::ConfigArgs),
    /// Display cluster information
    ClusterInfo,
    /// Print the client and server version information
    Version(cluster_info::VersionArgs),
    /// Print the supported API resources on the server
    ApiResources(resources::ApiResourcesArgs),
    /// Print the supported API versions on the server, in the form of "group/version"
    ApiVersions,
    /// Get documentation for a resource
    Explain(resources::ExplainArgs),
    /// Print the shell completion script
    Completion {
        /// The shell to complete in
        shell: clap_complete::Shell,
    },
}

/// Runs one command; its failure is printed here, in kubectl's words.
pub(crate) async fn run(command: Command, flags: &GlobalFlags) -> anyhow::Result<ExitCode> {
    match dispatch(command, flags).await {
        Ok(code) => Ok(code),
        Err(error) => {
            print_error(&error);
            Ok(ExitCode::FAILURE)
        }
    }
}

/// A failed request says all that is to be said; other failures are announced.
pub(crate) fn print_error(error: &anyhow::Error) {
    // A reader that has seen enough is no failure.
    let broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(broken_pipe) {
        return;
    }
    match error.downcast_ref::<RequestError>() {
        Some(error) => eprintln!("{error}"),
        None => eprintln!("error: {error:#}"),
    }
}

async fn dispatch(command: Command, flags: &GlobalFlags) -> anyhow::Result<ExitCode> {
    match command {
        Command::Get(args) => get::run(args, flags).await,
        Command::Describe(args) => describe::run(args, flags).await,
        Command::Create(args) => create::run(args, flags).await,
        Command::Apply(args) => apply::run(args, flags).await,
        Command::Delete(args) => delete::run(args, flags).await,
        Command::Run(args) => run::run(args, flags).await,
        Command::Logs(args) => logs::run(args, flags).await,
        Command::Exec(args) => exec::exec(args, flags).await,
        Command::Attach(args) => exec::attach(args, flags).await,
        Command::PortForward(args) => port_forward::run(args, flags).await,
        Command::Scale(args) => scale::run(args, flags).await,
        Command::Expose(args) => expose::run(args, flags).await,
        Command::Rollout(args) => rollout::run(args, flags).await,
        Command::Set(args) => set::run(args, flags).await,
        Command::Label(args) => label::run(args, flags, label::Field::Labels).await,
        Command::Annotate(args) => label::run(args, flags, label::Field::Annotations).await,
        Command::Patch(args) => patch::run(args, flags).await,
        Command::Edit(args) => edit::edit(args, flags).await,
        Command::Replace(args) => edit::replace(args, flags).await,
        Command::Wait(args) => wait::run(args, flags).await,
        Command::Cordon(args) => node::cordon(args, flags, true).await,
        Command::Uncordon(args) => node::cordon(args, flags, false).await,
        Command::Drain(args) => node::drain(args, flags).await,
        Command::Taint(args) => node::taint(args, flags).await,
        Command::Auth(args) => whoami::run(args, flags).await,
        Command::Config(args) => kubeconfig::run(args, flags),
        Command::ClusterInfo => cluster_info::cluster_info(flags).await,
        Command::Version(args) => cluster_info::version(args, flags).await,
        Command::ApiResources(args) => resources::api_resources(args, flags).await,
        Command::ApiVersions => resources::api_versions(flags).await,
        Command::Explain(args) => resources::explain(args, flags).await,
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut crate::Cli::command(), "ctl", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}
