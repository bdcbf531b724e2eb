//! `patch`: a change to single fields.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use super::shared::{DryRun, WriteFlags, fetch};
use crate::cluster::{Cluster, PatchKind};
use crate::flags::GlobalFlags;
use crate::objects::FileFlags;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    Json,
    Merge,
    Strategic,
}

/// Update fields of a resource
#[derive(Debug, Args)]
pub(crate) struct PatchArgs {
    words: Vec<String>,
    #[command(flatten)]
    files: FileFlags,
    #[command(flatten)]
    write: WriteFlags,
    /// The patch, as JSON or YAML
    #[arg(short = 'p', long)]
    patch: Option<String>,
    #[arg(long, value_name = "FILE")]
    patch_file: Option<String>,
    #[arg(long = "type", value_enum, default_value = "strategic")]
    kind: Kind,
    /// status, scale, …
    #[arg(long)]
    subresource: Option<String>,
}

pub(crate) async fn run(args: PatchArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let text = match (&args.patch, &args.patch_file) {
        (Some(patch), None) => patch.clone(),
        (None, Some(path)) => {
            std::fs::read_to_string(path).with_context(|| format!("unable to read patch file {path}"))?
        }
        (None, None) => bail!("must specify --patch or --patch-file containing the contents of the patch"),
        (Some(_), Some(_)) => bail!("cannot specify --patch and --patch-file together"),
    };
    let documents = apimachinery::yaml::documents(&text).with_context(|| format!("unable to parse {text:?}"))?;
    let Some(patch) = documents.into_iter().next() else { bail!("the patch is empty") };
    let kind = match args.kind {
        Kind::Json => PatchKind::Json,
        Kind::Merge => PatchKind::Merge,
        Kind::Strategic => PatchKind::Strategic,
    };
    let cluster = Cluster::connect(flags).await?;
    let wanted = args.files.or_named(&cluster, &args.words).await?;
    for found in fetch(&cluster, wanted, &Default::default(), false, false).await? {
        if args.write.dry_run == DryRun::Client {
            args.write.report(found.object, Some(&found.resource), "patched")?;
            continue;
        }
        let mut path = found.path();
        if let Some(subresource) = &args.subresource {
            path = format!("{path}/{subresource}");
        }
        let patched = cluster.patch(&args.write.query(&path, "kubectl-patch"), kind, &patch).await?;
        let same = |field: &str| patched.get(field) == found.object.get(field);
        let unchanged = same("spec") && same("data") && same("status") && same("metadata");
        args.write.report(patched, Some(&found.resource), if unchanged { "patched (no change)" } else { "patched" })?;
    }
    Ok(ExitCode::SUCCESS)
}
