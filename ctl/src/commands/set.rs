//! `set image` and `set env`: a workload's containers.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::shared::{ChoiceFlags, DryRun, Found, WriteFlags, change};
use crate::cluster::{Cluster, PatchKind};
use crate::flags::GlobalFlags;
use crate::objects::{items, name, text};

/// Set specific features on objects
#[derive(Debug, Args)]
pub(crate) struct SetArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Update the image of a pod template: CONTAINER=IMAGE…
    Image(SetFlags),
    /// Update environment variables on a pod template: NAME=VALUE…, NAME-…
    Env(EnvFlags),
}

#[derive(Debug, Args)]
struct SetFlags {
    #[command(flatten)]
    choice: ChoiceFlags,
    #[command(flatten)]
    write: WriteFlags,
    #[arg(long)]
    all: bool,
}

#[derive(Debug, Args)]
struct EnvFlags {
    #[command(flatten)]
    set: SetFlags,
    /// The containers; * is all
    #[arg(short = 'c', long, default_value = "*")]
    containers: String,
    /// Show what there is
    #[arg(long)]
    list: bool,
}

pub(crate) async fn run(args: SetArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    match args.what {
        What::Image(args) => {
            let (objects, changes) = split(&args.choice.words, |word| word.contains('='));
            let images: Vec<(&str, &str)> = changes.iter().filter_map(|change| change.split_once('=')).collect();
            if images.is_empty() || images.len() != changes.len() {
                bail!("at least one image update is required, as CONTAINER=IMAGE");
            }
            for found in args.choice.fetch(&cluster, &objects, args.all, false).await? {
                let patch = image_patch(&found.object, &images)?;
                send(&cluster, &args.write, found, patch, "image updated").await?;
            }
        }
        What::Env(args) => {
            let (objects, changes) = split(&args.set.choice.words, |word| word.contains('=') || word.ends_with('-'));
            if changes.is_empty() && !args.list {
                bail!("at least one environment variable must be provided");
            }
            for found in args.set.choice.fetch(&cluster, &objects, args.set.all, false).await? {
                if args.list {
                    list_env(&found);
                    continue;
                }
                let patch = env_patch(&found.object, &args.containers, &changes)?;
                send(&cluster, &args.set.write, found, patch, "env updated").await?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn split(words: &[String], is_change: impl Fn(&str) -> bool) -> (Vec<String>, Vec<String>) {
    let first = words.iter().position(|word| is_change(word)).unwrap_or(words.len());
    (words[..first].to_vec(), words[first..].to_vec())
}

async fn send(cluster: &Cluster, write: &WriteFlags, found: Found, patch: Option<Value>, done: &str) -> Result<()> {
    // As kubectl, nothing is said when nothing changes.
    if patch.is_none() && write.dry_run != DryRun::Client {
        return Ok(());
    }
    let patch = patch.unwrap_or_default();
    change(cluster, write, found, PatchKind::Strategic, &patch, "kubectl-set", done).await
}

/// Where the pod's spec is in an object.
fn pod_spec_path(object: &Value) -> Result<&'static [&'static str]> {
    let paths: [&[&str]; 3] =
        [&["spec", "jobTemplate", "spec", "template", "spec"], &["spec", "template", "spec"], &["spec"]];
    let has_containers = |path: &&&[&str]| {
        let mut place = object;
        for key in **path {
            place = &place[*key];
        }
        place["containers"].is_array()
    };
    match paths.iter().find(has_containers) {
        Some(path) => Ok(path),
        None => bail!("{} {:?} has no pod template", crate::objects::kind(object), name(object)),
    }
}

fn wrap(path: &[&str], spec: Value) -> Value {
    path.iter().rev().fold(spec, |inner, key| json!({*key: inner}))
}

fn pod_spec<'a>(object: &'a Value, path: &[&str]) -> &'a Value {
    path.iter().fold(object, |place, key| &place[*key])
}

/// The strategic patch that sets the images; `None` if they are so already.
fn image_patch(object: &Value, images: &[(&str, &str)]) -> Result<Option<Value>> {
    let path = pod_spec_path(object)?;
    let spec = pod_spec(object, path);
    let mut patch = json!({});
    for (wanted, image) in images {
        let mut known = false;
        for list in ["containers", "initContainers"] {
            for container in items(spec, &format!("/{list}")) {
                let container_name = text(container, "/name");
                if *wanted != "*" && container_name != *wanted {
                    continue;
                }
                known = true;
                if text(container, "/image") != *image {
                    if !patch[list].is_array() {
                        patch[list] = json!([]);
                    }
                    if let Some(list) = patch[list].as_array_mut() {
                        list.push(json!({"name": container_name, "image": image}));
                    }
                }
            }
        }
        if !known {
            bail!("unable to find container named {wanted:?}");
        }
    }
    Ok(Some(patch).filter(|patch| *patch != json!({})).map(|patch| wrap(path, patch)))
}

fn env_patch(object: &Value, containers: &str, changes: &[String]) -> Result<Option<Value>> {
    let path = pod_spec_path(object)?;
    let mut patched = Vec::new();
    for container in items(pod_spec(object, path), "/containers") {
        let container_name = text(container, "/name");
        if containers != "*" && !containers.split(',').any(|wanted| wanted == container_name) {
            continue;
        }
        let mut env = Vec::new();
        for change in changes {
            match (change.split_once('='), change.strip_suffix('-')) {
                (Some((key, value)), _) => {
                    let same = |known: &&Value| text(known, "/name") == key && known["value"] == value;
                    if !items(container, "/env").iter().any(|known| same(&known)) {
                        env.push(json!({"name": key, "value": value}));
                    }
                }
                (None, Some(key)) => env.push(json!({"$patch": "delete", "name": key})),
                (None, None) => bail!("environment variables must be of the form key=value: {change}"),
            }
        }
        if !env.is_empty() {
            patched.push(json!({"name": container_name, "env": env}));
        }
    }
    Ok(Some(patched).filter(|patched| !patched.is_empty()).map(|patched| wrap(path, json!({"containers": patched}))))
}

fn list_env(found: &Found) {
    let Ok(path) = pod_spec_path(&found.object) else { return };
    for container in items(pod_spec(&found.object, path), "/containers") {
        println!("# {}, container {}", found.reference(), text(container, "/name"));
        for variable in items(container, "/env") {
            println!("{}={}", text(variable, "/name"), text(variable, "/value"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_set_by_container() {
        let deployment = json!({"kind": "Deployment", "spec": {"template": {"spec": {
            "containers": [{"name": "a", "image": "a:1"}, {"name": "b", "image": "b:1"}]}}}});
        assert_eq!(
            image_patch(&deployment, &[("a", "a:2")]).expect("patch"),
            Some(json!({"spec": {"template": {"spec": {"containers": [{"name": "a", "image": "a:2"}]}}}}))
        );
        assert_eq!(image_patch(&deployment, &[("a", "a:1")]).expect("same"), None);
        assert!(image_patch(&deployment, &[("c", "x")]).is_err());
        let pod = json!({"kind": "Pod", "spec": {"containers": [{"name": "a", "image": "a:1"}]}});
        assert_eq!(
            image_patch(&pod, &[("*", "a:2")]).expect("patch"),
            Some(json!({"spec": {"containers": [{"name": "a", "image": "a:2"}]}}))
        );
    }
}
