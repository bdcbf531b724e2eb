//! `delete`: objects by file, name or selector, waiting until they are gone.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use futures::StreamExt;
use serde_json::{Value, json};

use super::shared::{ChoiceFlags, DryRun, WriteFlags, fetch, within};
use crate::cluster::{Cluster, JSON, RequestError, Resource, timeout, with_query};
use crate::flags::GlobalFlags;
use crate::objects::{Target, items, name, namespace, targets, text};

/// How long to pause when a watch ends early.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// What happens to the objects that belong to a deleted one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Cascade {
    Background,
    Foreground,
    Orphan,
}

/// Delete resources by file names, stdin, resources and names, or by resources and label selector
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    #[command(flatten)]
    choice: ChoiceFlags,
    #[command(flatten)]
    write: WriteFlags,
    /// All objects of the types
    #[arg(long)]
    all: bool,
    /// Of all namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Seconds to end gracefully; -1 leaves it to the object
    #[arg(long, default_value_t = -1, allow_negative_numbers = true)]
    grace_period: i64,
    /// Do not wait for the kubelet's word
    #[arg(long)]
    force: bool,
    /// As --grace-period=1
    #[arg(long)]
    now: bool,
    /// Wait until the objects are gone
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true,
          action = clap::ArgAction::Set)]
    wait: bool,
    /// How long to wait; 0 waits as long as it takes
    #[arg(long, value_name = "DURATION")]
    timeout: Option<String>,
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "background", default_value = "background")]
    cascade: Cascade,
    /// Nothing found is no error
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
          action = clap::ArgAction::Set)]
    ignore_not_found: bool,
}

/// An object to delete.
struct Doomed {
    resource: Resource,
    namespace: String,
    name: String,
    source: Option<String>,
}

pub(crate) async fn run(args: DeleteArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    let grace = match (args.now, args.force, args.grace_period) {
        (true, _, -1) => 1,
        (true, ..) => bail!("--now and --grace-period cannot be specified together"),
        (false, true, -1) => 0,
        (false, _, grace) => grace,
    };
    if args.force && grace == 0 {
        eprintln!(
            "Warning: Immediate deletion does not wait for confirmation that the running resource has been terminated. The resource may continue to run on the cluster indefinitely."
        );
    }
    let doomed = choose(&cluster, &args).await?;
    if doomed.is_empty() {
        println!("No resources found");
        return Ok(ExitCode::SUCCESS);
    }
    let options = json!({
        "propagationPolicy": match args.cascade {
            Cascade::Background => "Background",
            Cascade::Foreground => "Foreground",
            Cascade::Orphan => "Orphan",
        },
        "gracePeriodSeconds": match (grace, args.force) {
            (-1, _) => Value::Null,
            (0, false) => json!(1),
            (grace, _) => json!(grace),
        },
    });
    let (mut deleted, mut failed) = (Vec::new(), false);
    for object in doomed {
        match delete(&cluster, &args, &object, &options).await {
            Ok(Some(uid)) => deleted.push((object, uid)),
            Ok(None) => {}
            Err(error) => {
                failed = true;
                super::print_error(&error);
            }
        }
    }
    if args.wait && args.write.dry_run == DryRun::None {
        let limit = timeout(args.timeout.as_deref())?;
        for (object, uid) in deleted {
            wait_until_gone(&cluster, &object.resource, &object.namespace, &object.name, &uid, limit).await?;
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn choose(cluster: &Cluster, args: &DeleteArgs) -> Result<Vec<Doomed>> {
    let mut doomed = Vec::new();
    if !args.choice.files.is_empty() {
        for mut manifest in args.choice.files.read()? {
            let resource = manifest.locate(cluster).await?;
            doomed.push(Doomed {
                resource,
                namespace: namespace(&manifest.object).to_owned(),
                name: name(&manifest.object).to_owned(),
                source: Some(manifest.source),
            });
        }
        return Ok(doomed);
    }
    for Target { resource, namespace: place, names } in targets(cluster, &args.choice.words).await? {
        if !names.is_empty() {
            if args.all || !args.choice.selectors.is_empty() {
                bail!("name cannot be provided when a selector is specified");
            }
            for name in names {
                let namespace = if resource.namespaced { place.clone() } else { String::new() };
                doomed.push(Doomed { resource: resource.clone(), namespace, name, source: None });
            }
            continue;
        }
        let target = Target { resource, namespace: place, names };
        for found in fetch(cluster, vec![target], &args.choice.selectors, args.all, args.all_namespaces).await? {
            doomed.push(Doomed {
                namespace: namespace(&found.object).to_owned(),
                name: name(&found.object).to_owned(),
                resource: found.resource,
                source: None,
            });
        }
    }
    Ok(doomed)
}

/// Deletes one object; returns its UID if it was there.
async fn delete(cluster: &Cluster, args: &DeleteArgs, object: &Doomed, options: &Value) -> Result<Option<String>> {
    let path = object.resource.object(&object.namespace, &object.name);
    let mut uid = String::new();
    if args.write.dry_run != DryRun::Client {
        let path = with_query(&path, &[("dryRun", args.write.dry_run.parameter())]);
        match cluster.delete(&path, options).await {
            // The answer is the object that is ending, or a Status with details.
            Ok(answer) => {
                uid = [text(&answer, "/metadata/uid"), text(&answer, "/details/uid")].concat();
            }
            Err(error) if args.ignore_not_found && RequestError::code_of(&error) == Some(404) => return Ok(None),
            Err(error) => {
                return Err(match &object.source {
                    Some(source) => RequestError::during(error, &format!("error when deleting {source:?}")),
                    None => error,
                });
            }
        }
    }
    if args.write.output.as_deref() == Some("name") {
        println!("{}", object.resource.reference(&object.name));
        return Ok(Some(uid));
    }
    let done = if args.force && args.grace_period <= 0 { "force deleted" } else { "deleted" };
    let place = match object.namespace.as_str() {
        "" => String::new(),
        namespace => format!(" from {namespace} namespace"),
    };
    let kind = object.resource.singular_qualified();
    println!("{kind} {:?} {done}{place}{}", object.name, args.write.dry_run.suffix());
    Ok(Some(uid))
}

/// Waits until an object is gone, or another has taken its name.
pub(crate) async fn wait_until_gone(
    cluster: &Cluster,
    resource: &Resource,
    in_namespace: &str,
    object_name: &str,
    uid: &str,
    limit: Option<Duration>,
) -> Result<()> {
    let gone = async {
        let collection = with_query(
            &resource.collection(Some(in_namespace)),
            &[("fieldSelector", &format!("metadata.name={object_name}"))],
        );
        loop {
            let list = cluster.get(&collection).await?;
            let same = |object: &Value| uid.is_empty() || text(object, "/metadata/uid") == uid;
            if !items(&list, "/items").iter().any(same) {
                return Ok::<(), anyhow::Error>(());
            }
            let version = text(&list, "/metadata/resourceVersion");
            let path = with_query(&collection, &[("watch", "true"), ("resourceVersion", version)]);
            if let Ok(mut events) = cluster.watch(&path, JSON).await {
                while let Some(Ok((kind, object))) = events.next().await {
                    if kind == "DELETED" && same(&object) {
                        return Ok(());
                    }
                }
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    };
    within(limit, &format!(" on {}/{object_name}", resource.qualified_name()), gone).await
}
