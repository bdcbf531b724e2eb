//! `cordon`, `uncordon`, `drain` and `taint`: nodes before and after maintenance.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};

use super::delete::wait_until_gone;
use super::shared::{DryRun, Found, SelectorFlags, WriteFlags, change, fetch};
use crate::cluster::{Cluster, PatchKind, RequestError, timeout, with_query};
use crate::flags::GlobalFlags;
use crate::objects::{Target, items, name, namespace, targets, text};

/// Between tries to evict a pod that its disruption budget protects.
const EVICTION_PAUSE: Duration = Duration::from_secs(5);

/// Node names, or -l
#[derive(Debug, Args)]
pub(crate) struct CordonArgs {
    nodes: Vec<String>,
    #[command(flatten)]
    selectors: SelectorFlags,
    #[command(flatten)]
    write: WriteFlags,
}

/// Drain node in preparation for maintenance
#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    nodes: Vec<String>,
    #[command(flatten)]
    selectors: SelectorFlags,
    #[command(flatten)]
    write: WriteFlags,
    /// Also pods that no controller will create again
    #[arg(long)]
    force: bool,
    /// Leave pods of DaemonSets alone
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
          action = clap::ArgAction::Set)]
    ignore_daemonsets: bool,
    /// Also pods whose emptyDir volumes will be lost
    #[arg(long)]
    delete_emptydir_data: bool,
    #[arg(long, default_value_t = -1, allow_negative_numbers = true)]
    grace_period: i64,
    /// Delete instead of evicting, past disruption budgets
    #[arg(long)]
    disable_eviction: bool,
    /// Only these pods
    #[arg(long)]
    pod_selector: Option<String>,
    #[arg(long, value_name = "DURATION")]
    timeout: Option<String>,
}

/// NODE KEY=VALUE:EFFECT… KEY:EFFECT-… KEY-…
#[derive(Debug, Args)]
pub(crate) struct TaintArgs {
    words: Vec<String>,
    #[command(flatten)]
    selectors: SelectorFlags,
    #[command(flatten)]
    write: WriteFlags,
    #[arg(long)]
    overwrite: bool,
    #[arg(long)]
    all: bool,
}

async fn nodes(cluster: &Cluster, names: &[String], selectors: &SelectorFlags, all: bool) -> Result<Vec<Found>> {
    if names.is_empty() && selectors.is_empty() && !all {
        bail!("one or more nodes must be specified as arguments or a --selector");
    }
    let bare = |name: &String| name.rsplit_once('/').map_or(name.as_str(), |(_, name)| name).to_owned();
    let names = names.iter().map(bare).collect();
    let target = Target { resource: cluster.resource("nodes").await?, namespace: String::new(), names };
    fetch(cluster, vec![target], selectors, true, false).await
}

pub(crate) async fn cordon(args: CordonArgs, flags: &GlobalFlags, unschedulable: bool) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    for node in nodes(&cluster, &args.nodes, &args.selectors, false).await? {
        set_unschedulable(&cluster, &args.write, &node, unschedulable).await?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn set_unschedulable(cluster: &Cluster, write: &WriteFlags, node: &Found, unschedulable: bool) -> Result<()> {
    let word = if unschedulable { "cordoned" } else { "uncordoned" };
    let reference = node.reference();
    if (node.object["spec"]["unschedulable"] == true) == unschedulable {
        println!("{reference} already {word}{}", write.dry_run.suffix());
        return Ok(());
    }
    if write.dry_run != DryRun::Client {
        let value = if unschedulable { json!(true) } else { Value::Null };
        let patch = json!({"spec": {"unschedulable": value}});
        cluster.patch(&write.query(&node.path(), "kubectl-cordon"), PatchKind::Strategic, &patch).await?;
    }
    println!("{reference} {word}{}", write.dry_run.suffix());
    Ok(())
}

/// What is done with a pod of a node that is drained.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Evict,
    /// Left alone, with a word about it.
    Skip(Option<&'static str>),
    /// The drain cannot go on.
    Refuse(&'static str),
}

fn fate(pod: &Value, args: &DrainArgs) -> Fate {
    if pod.pointer("/metadata/annotations/kubernetes.io~1config.mirror").is_some() {
        return Fate::Skip(None);
    }
    let ended = ["Succeeded", "Failed"].contains(&text(pod, "/status/phase"));
    let controller = items(pod, "/metadata/ownerReferences").iter().find(|owner| owner["controller"] == true);
    if controller.is_some_and(|owner| owner["kind"] == "DaemonSet") && !ended {
        return match args.ignore_daemonsets {
            true => Fate::Skip(Some("ignoring DaemonSet-managed Pods")),
            false => Fate::Refuse("cannot delete DaemonSet-managed Pods (use --ignore-daemonsets to ignore)"),
        };
    }
    if ended {
        return Fate::Evict;
    }
    let local = items(pod, "/spec/volumes").iter().any(|volume| volume.get("emptyDir").is_some());
    if local && !args.delete_emptydir_data {
        return Fate::Refuse("cannot delete Pods with local storage (use --delete-emptydir-data to override)");
    }
    if controller.is_none() && !args.force {
        return Fate::Refuse("cannot delete Pods that declare no controller (use --force to override)");
    }
    Fate::Evict
}

pub(crate) async fn drain(args: DrainArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    let deadline = timeout(args.timeout.as_deref())?.map(|limit| Instant::now() + limit);
    for node in nodes(&cluster, &args.nodes, &args.selectors, false).await? {
        set_unschedulable(&cluster, &args.write, &node, true).await?;
        let filter = format!("spec.nodeName={}", name(&node.object));
        let path = with_query(
            "/api/v1/pods",
            &[("fieldSelector", &filter), ("labelSelector", args.pod_selector.as_deref().unwrap_or_default())],
        );
        let list = cluster.get(&path).await?;
        let (mut evicted, mut refusals): (Vec<&Value>, Vec<String>) = (Vec::new(), Vec::new());
        for pod in items(&list, "/items") {
            let shown = format!("{}/{}", namespace(pod), name(pod));
            match fate(pod, &args) {
                Fate::Evict => evicted.push(pod),
                Fate::Skip(Some(words)) => eprintln!("Warning: {words}: {shown}"),
                Fate::Skip(None) => {}
                Fate::Refuse(words) => refusals.push(format!("{words}: {shown}")),
            }
        }
        if !refusals.is_empty() {
            bail!("unable to drain node {:?} due to error: {}", name(&node.object), refusals.join(", "));
        }
        let pods = cluster.resource("pods").await?;
        for pod in &evicted {
            println!("evicting pod {}/{}{}", namespace(pod), name(pod), args.write.dry_run.suffix());
            if args.write.dry_run == DryRun::None {
                evict(&cluster, &args, pod, deadline).await?;
            }
        }
        if args.write.dry_run == DryRun::None {
            for pod in &evicted {
                let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
                wait_until_gone(&cluster, &pods, namespace(pod), name(pod), text(pod, "/metadata/uid"), left).await?;
                println!("pod/{} evicted", name(pod));
            }
        }
        println!("{} drained{}", node.reference(), args.write.dry_run.suffix());
    }
    Ok(ExitCode::SUCCESS)
}

async fn evict(cluster: &Cluster, args: &DrainArgs, pod: &Value, deadline: Option<Instant>) -> Result<()> {
    let path = format!("/api/v1/namespaces/{}/pods/{}", namespace(pod), name(pod));
    let mut options = json!({});
    if args.grace_period >= 0 {
        options["gracePeriodSeconds"] = json!(args.grace_period);
    }
    loop {
        let outcome = if args.disable_eviction {
            cluster.delete(&path, &options).await
        } else {
            let eviction = json!({
                "apiVersion": "policy/v1", "kind": "Eviction",
                "metadata": {"name": name(pod), "namespace": namespace(pod)}, "deleteOptions": options});
            cluster.post(&format!("{path}/eviction"), &eviction).await
        };
        match outcome {
            Ok(_) => return Ok(()),
            Err(error) if RequestError::code_of(&error) == Some(404) => return Ok(()),
            Err(error) if RequestError::code_of(&error) == Some(429) => {
                if deadline.is_some_and(|deadline| Instant::now() + EVICTION_PAUSE > deadline) {
                    return Err(error);
                }
                eprintln!(
                    "error when evicting pods/{:?} -n {:?} (will retry after 5s): {error}",
                    name(pod),
                    namespace(pod)
                );
                tokio::time::sleep(EVICTION_PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// A change of taints.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Add {
        key: String,
        value: String,
        effect: String,
    },
    /// Without an effect: of all.
    Remove {
        key: String,
        effect: Option<String>,
    },
}

fn parse_change(word: &str) -> Result<Change> {
    let effect_is_known = |effect: &str| ["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect);
    if let Some(removed) = word.strip_suffix('-') {
        let (key, effect) = match removed.split_once(':') {
            Some((key, effect)) => (key, Some(effect)),
            None => (removed, None),
        };
        let key = key.split_once('=').map_or(key, |(key, _)| key);
        if effect.is_some_and(|effect| !effect_is_known(effect)) {
            bail!("invalid taint effect: {}, unsupported taint effect", effect.unwrap_or_default());
        }
        return Ok(Change::Remove { key: key.to_owned(), effect: effect.map(str::to_owned) });
    }
    let Some((pair, effect)) = word.rsplit_once(':') else { bail!("invalid taint spec: {word}") };
    if !effect_is_known(effect) {
        bail!("invalid taint effect: {effect}, unsupported taint effect");
    }
    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
    Ok(Change::Add { key: key.to_owned(), value: value.to_owned(), effect: effect.to_owned() })
}

fn changed_taints(present: &[Value], changes: &[Change], overwrite: bool) -> Result<Vec<Value>> {
    let mut taints = present.to_vec();
    for change in changes {
        match change {
            Change::Add { key, value, effect } => {
                let same = |taint: &Value| taint["key"] == *key && taint["effect"] == *effect;
                if taints.iter().any(same) && !overwrite {
                    bail!("node already has {key} taint(s) with same effect(s) and --overwrite is false");
                }
                taints.retain(|taint| !same(taint));
                let mut taint = json!({"key": key, "effect": effect});
                if !value.is_empty() {
                    taint["value"] = json!(value);
                }
                taints.push(taint);
            }
            Change::Remove { key, effect } => {
                let gone = |taint: &Value| {
                    taint["key"] == *key && effect.as_ref().is_none_or(|effect| taint["effect"] == *effect)
                };
                if !taints.iter().any(gone) {
                    bail!(
                        "taint {:?} not found",
                        effect.as_ref().map_or_else(|| key.clone(), |e| format!("{key}:{e}"))
                    );
                }
                taints.retain(|taint| !gone(taint));
            }
        }
    }
    Ok(taints)
}

pub(crate) async fn taint(args: TaintArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let is_change = |word: &String| word.contains(':') || word.contains('=') || word.ends_with('-');
    let first = args.words.iter().position(is_change).unwrap_or(args.words.len());
    let (objects, changes) = args.words.split_at(first);
    let changes = changes.iter().map(|word| parse_change(word)).collect::<Result<Vec<_>>>()?;
    if changes.is_empty() {
        bail!("at least one taint update is required");
    }
    let cluster = Cluster::connect(flags).await?;
    let mut wanted = targets(&cluster, objects).await?;
    if wanted.iter().any(|target| target.resource.name != "nodes") {
        bail!("invalid resource type, only node type is supported");
    }
    let Some(target) = wanted.pop() else { bail!("one or more nodes must be specified") };
    for node in fetch(&cluster, vec![target], &args.selectors, args.all, false).await? {
        let taints = changed_taints(items(&node.object, "/spec/taints"), &changes, args.overwrite)?;
        let done =
            if changes.iter().any(|change| matches!(change, Change::Add { .. })) { "tainted" } else { "untainted" };
        let version = &node.object["metadata"]["resourceVersion"];
        let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": taints}});
        change(&cluster, &args.write, node, PatchKind::Merge, &patch, "kubectl-taint", done).await?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taints_are_added_and_removed() {
        let present =
            [json!({"key": "a", "effect": "NoSchedule", "value": "1"}), json!({"key": "a", "effect": "NoExecute"})];
        let change = |words: &[&str], overwrite| {
            let changes: Vec<_> = words.iter().map(|word| parse_change(word).expect(word)).collect();
            changed_taints(&present, &changes, overwrite)
        };
        assert_eq!(change(&["a-"], false).expect("removed"), Vec::<Value>::new());
        assert_eq!(change(&["a:NoExecute-"], false).expect("removed").len(), 1);
        assert_eq!(change(&["b=2:NoSchedule"], false).expect("added").len(), 3);
        assert!(change(&["a=2:NoSchedule"], false).is_err());
        assert_eq!(change(&["a=2:NoSchedule"], true).expect("overwritten")[1]["value"], "2");
        assert!(change(&["x-"], false).is_err());
        assert!(parse_change("a=b:Nonsense").is_err());
    }

    #[test]
    fn pods_are_evicted_left_or_in_the_way() {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            args: DrainArgs,
        }
        let args = |line: &str| Line::parse_from(std::iter::once("drain").chain(line.split_whitespace())).args;
        let owned = |kind: &str| json!({"metadata": {"ownerReferences": [{"kind": kind, "controller": true}]}});
        assert_eq!(fate(&owned("ReplicaSet"), &args("n")), Fate::Evict);
        assert!(matches!(fate(&owned("DaemonSet"), &args("n")), Fate::Refuse(_)));
        assert!(matches!(fate(&owned("DaemonSet"), &args("n --ignore-daemonsets")), Fate::Skip(Some(_))));
        assert!(matches!(fate(&json!({}), &args("n")), Fate::Refuse(_)));
        assert_eq!(fate(&json!({}), &args("n --force")), Fate::Evict);
    }
}
