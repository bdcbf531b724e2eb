//! `scale`: how many replicas.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::json;

use super::shared::{ChoiceFlags, DryRun, WriteFlags};
use crate::cluster::{Cluster, PatchKind, RequestError};
use crate::flags::GlobalFlags;
use crate::objects::{number, text};

/// Set a new size for a deployment, replica set, or replication controller
#[derive(Debug, Args)]
pub(crate) struct ScaleArgs {
    #[command(flatten)]
    choice: ChoiceFlags,
    #[command(flatten)]
    write: WriteFlags,
    #[arg(long)]
    replicas: i64,
    /// Only if there are so many now
    #[arg(long)]
    current_replicas: Option<i64>,
    /// Only if the object has this version
    #[arg(long)]
    resource_version: Option<String>,
    #[arg(long)]
    all: bool,
    /// Accepted for kubectl's sake
    #[arg(long, hide = true)]
    timeout: Option<String>,
}

pub(crate) async fn run(args: ScaleArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    if args.replicas < 0 {
        bail!("The --replicas=COUNT flag is required, and COUNT must be greater than or equal to 0");
    }
    let cluster = Cluster::connect(flags).await?;
    let found = args.choice.fetch(&cluster, &args.choice.words, args.all, false).await;
    for found in found.map_err(|error| match RequestError::message_of(&error, 404) {
        Some(message) => anyhow::anyhow!("no objects passed to scale {message}"),
        None => error,
    })? {
        if !found.resource.subresources.iter().any(|subresource| subresource == "scale") {
            bail!("cannot scale {}: the server could not find the requested resource", found.resource.qualified_name());
        }
        if let Some(expected) = args.current_replicas.filter(|expected| *expected >= 0) {
            let actual = number(&found.object, "/spec/replicas");
            if actual != expected {
                bail!("Expected replicas to be {expected}, was {actual}");
            }
        }
        if let Some(expected) = &args.resource_version
            && text(&found.object, "/metadata/resourceVersion") != expected
        {
            bail!(
                "Expected resource version to be {expected}, was {}",
                text(&found.object, "/metadata/resourceVersion")
            );
        }
        if args.write.dry_run != DryRun::Client {
            let mut patch = json!({"spec": {"replicas": args.replicas}});
            if args.resource_version.is_some() || args.current_replicas.is_some() {
                patch["metadata"] = json!({"resourceVersion": found.object["metadata"]["resourceVersion"]});
            }
            let path = args.write.query(&format!("{}/scale", found.path()), "kubectl");
            cluster
                .patch(&path, PatchKind::Merge, &patch)
                .await
                .map_err(|error| RequestError::during(error, "cannot scale"))?;
        }
        args.write.report(found.object, Some(&found.resource), "scaled")?;
    }
    Ok(ExitCode::SUCCESS)
}
