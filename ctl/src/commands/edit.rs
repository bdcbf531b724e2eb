//! `edit` and `replace`: an object as a whole.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::shared::{ChoiceFlags, DryRun, WriteFlags};
use crate::cluster::{Cluster, PatchKind, RequestError};
use crate::flags::GlobalFlags;
use crate::objects::{FileFlags, difference, name, namespace, set, strip_managed_fields, text};
use crate::output::json_text;

/// How often a broken edit is offered again.
const ATTEMPTS_MAX: usize = 10;

/// Edit a resource on the server
#[derive(Debug, Args)]
pub(crate) struct EditArgs {
    #[command(flatten)]
    choice: ChoiceFlags,
    /// yaml or json
    #[arg(short = 'o', long)]
    output: Option<String>,
    #[arg(long)]
    subresource: Option<String>,
}

/// Replace a resource by file name or stdin
#[derive(Debug, Args)]
pub(crate) struct ReplaceArgs {
    #[command(flatten)]
    files: FileFlags,
    #[command(flatten)]
    write: WriteFlags,
    /// Delete the object first
    #[arg(long)]
    force: bool,
    #[arg(long, default_value_t = -1, allow_negative_numbers = true)]
    grace_period: i64,
}

pub(crate) async fn edit(args: EditArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    let as_json = args.output.as_deref() == Some("json");
    for mut found in args.choice.fetch(&cluster, &args.choice.words, true, false).await? {
        strip_managed_fields(&mut found.object);
        let original = if as_json { json_text(&found.object)? } else { apimachinery::yaml::to_string(&found.object)? };
        let (mut edited, mut complaint) = (original.clone(), String::new());
        for attempt in 1.. {
            let before = edited.clone();
            edited = in_editor(&edited, &complaint, if as_json { "json" } else { "yaml" })?;
            if edited.trim().is_empty() || edited == original {
                println!("Edit cancelled, no changes made.");
                break;
            }
            if !complaint.is_empty() && edited == before {
                bail!("Edit cancelled, no valid changes were saved.");
            }
            let outcome = async {
                let mut documents = apimachinery::yaml::documents(&edited)?;
                let Some(object) = documents.pop() else { bail!("the document is empty") };
                if namespace(&object) != namespace(&found.object) || name(&object) != name(&found.object) {
                    bail!("the name and the namespace of an object cannot be edited");
                }
                let Some(patch) = difference(&found.object, &object) else { return Ok(None) };
                let mut path = found.path();
                if let Some(subresource) = &args.subresource {
                    path = format!("{path}/{subresource}");
                }
                cluster.patch(&format!("{path}?fieldManager=kubectl-edit"), PatchKind::Merge, &patch).await.map(Some)
            };
            match outcome.await {
                Ok(Some(_)) => println!("{} edited", found.reference()),
                Ok(None) => println!("Edit cancelled, no changes made."),
                Err(error) if attempt < ATTEMPTS_MAX => {
                    complaint = format!("{error:#}");
                    eprintln!("error: {complaint}");
                    continue;
                }
                Err(error) => return Err(error),
            }
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Lets the person edit a text, with a remark in front that is taken out again.
fn in_editor(text: &str, complaint: &str, extension: &str) -> Result<String> {
    let mut remark = String::from(
        "# Please edit the object below. Lines beginning with a '#' will be ignored,\n# and an empty file will abort the edit. If an error occurs while saving this file will be\n# reopened with the relevant failures.\n#\n",
    );
    for line in complaint.lines() {
        remark.push_str(&format!("# {line}\n"));
    }
    let file = tempfile::Builder::new().prefix("ctl-edit-").suffix(&format!(".{extension}")).tempfile()?;
    let shown = if extension == "json" { text.to_owned() } else { remark + text };
    std::fs::write(file.path(), shown)?;
    let editor = ["KUBE_EDITOR", "EDITOR"]
        .iter()
        .find_map(|variable| std::env::var(variable).ok().filter(|value| !value.is_empty()))
        .unwrap_or_else(|| "vi".to_owned());
    let status = Command::new("sh")
        .arg("-c")
        .arg(format!("{editor} \"$1\""))
        .arg("sh")
        .arg(file.path())
        .status()
        .with_context(|| format!("unable to launch the editor {editor:?}"))?;
    if !status.success() {
        bail!("there was a problem with the editor {editor:?}");
    }
    let edited = std::fs::read_to_string(file.path())?;
    let kept = edited.lines().filter(|line| !line.starts_with('#'));
    Ok(kept.fold(String::new(), |mut text, line| {
        text.push_str(line);
        text.push('\n');
        text
    }))
}

pub(crate) async fn replace(args: ReplaceArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    if args.files.is_empty() {
        bail!("must specify one of -f and -k");
    }
    let cluster = Cluster::connect(flags).await?;
    for mut manifest in args.files.read()? {
        let resource = manifest.locate(&cluster).await?;
        let path = resource.object(namespace(&manifest.object), name(&manifest.object));
        if args.write.save_config {
            super::apply::annotate(&mut manifest.object)?;
        }
        if args.write.dry_run == DryRun::Client {
            args.write.report(manifest.object, Some(&resource), "replaced")?;
            continue;
        }
        let during = |error| RequestError::during(error, &format!("error when replacing {:?}", manifest.source));
        if args.force {
            let mut options = json!({"propagationPolicy": "Background"});
            if args.grace_period >= 0 {
                options["gracePeriodSeconds"] = json!(args.grace_period);
            }
            let place = namespace(&manifest.object).to_owned();
            match cluster.delete(&path, &options).await {
                Ok(_) => {
                    super::delete::wait_until_gone(&cluster, &resource, &place, name(&manifest.object), "", None)
                        .await?
                }
                Err(error) if RequestError::code_of(&error) == Some(404) => {}
                Err(error) => return Err(during(error)),
            }
            let collection = args.write.query(&resource.collection(Some(&place)), "kubectl-replace");
            let created = cluster.post(&collection, &manifest.object).await.map_err(during)?;
            args.write.report(created, Some(&resource), "replaced")?;
            continue;
        }
        if text(&manifest.object, "/metadata/resourceVersion").is_empty() {
            let current = cluster.get(&path).await.map_err(during)?;
            let version = current["metadata"]["resourceVersion"].clone();
            set(&mut manifest.object, &["metadata", "resourceVersion"], version);
        }
        let path = args.write.query(&path, "kubectl-replace");
        let replaced = cluster.put(&path, &manifest.object).await.map_err(during)?;
        args.write.report(replaced, Some(&resource), "replaced")?;
    }
    Ok(ExitCode::SUCCESS)
}
