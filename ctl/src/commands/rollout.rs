//! `rollout`: how far a Deployment, DaemonSet or StatefulSet is with its change; its history; pausing, restarting, undoing.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::shared::{ChoiceFlags, Found, WriteFlags, change, until, within};
use crate::cluster::{Cluster, PatchKind, timeout, with_query};
use crate::flags::GlobalFlags;
use crate::objects::{items, kind, name, namespace, number, selector_of, text};

const REVISION: &str = "deployment.kubernetes.io/revision";
const CHANGE_CAUSE: &str = "kubernetes.io/change-cause";

/// Manage the rollout of one or many resources
#[derive(Debug, Args)]
pub(crate) struct RolloutArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show the status of the rollout
    Status {
        #[command(flatten)]
        objects: ChoiceFlags,
        /// Watch the status of the rollout until it's done
        #[arg(short = 'w', long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true,
              action = clap::ArgAction::Set)]
        watch: bool,
        /// How long to watch; 0 watches as long as it takes
        #[arg(long, value_name = "DURATION")]
        timeout: Option<String>,
    },
    /// View rollout history
    History {
        #[command(flatten)]
        objects: ChoiceFlags,
        /// One revision, with its pod template
        #[arg(long, default_value_t = 0)]
        revision: i64,
    },
    /// Restart a resource
    Restart {
        #[command(flatten)]
        objects: ChoiceFlags,
        #[command(flatten)]
        write: WriteFlags,
    },
    /// Undo a previous rollout
    Undo {
        #[command(flatten)]
        objects: ChoiceFlags,
        #[command(flatten)]
        write: WriteFlags,
        /// The revision to go back to; 0 is the last
        #[arg(long, default_value_t = 0)]
        to_revision: i64,
    },
    /// Mark the provided resource as paused
    Pause {
        #[command(flatten)]
        objects: ChoiceFlags,
        #[command(flatten)]
        write: WriteFlags,
    },
    /// Resume a paused resource
    Resume {
        #[command(flatten)]
        objects: ChoiceFlags,
        #[command(flatten)]
        write: WriteFlags,
    },
}

/// All that the words, files and selectors choose.
async fn chosen(choice: &ChoiceFlags, cluster: &Cluster) -> Result<Vec<Found>> {
    choice.fetch(cluster, &choice.words, true, false).await
}

pub(crate) async fn run(args: RolloutArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    match args.action {
        Action::Status { objects, watch, timeout: limit } => {
            let limit = timeout(limit.as_deref())?;
            for found in chosen(&objects, &cluster).await? {
                within(limit, "", follow(&cluster, found, watch)).await?;
            }
        }
        Action::History { objects, revision } => {
            for found in chosen(&objects, &cluster).await? {
                history(&cluster, &found, revision).await?;
            }
        }
        Action::Restart { objects, write } => {
            for found in chosen(&objects, &cluster).await? {
                require_template(&found, "restarting")?;
                if found.object["spec"]["paused"] == true {
                    bail!("can't restart paused deployment (run rollout resume first)");
                }
                let now = apimachinery::time::rfc3339(jiff::Timestamp::now());
                let annotations = json!({"kubectl.kubernetes.io/restartedAt": now});
                let patch = json!({"spec": {"template": {"metadata": {"annotations": annotations}}}});
                change(&cluster, &write, found, PatchKind::Merge, &patch, "kubectl-rollout", "restarted").await?;
            }
        }
        Action::Undo { objects, write, to_revision } => {
            for found in chosen(&objects, &cluster).await? {
                undo(&cluster, &write, found, to_revision).await?;
            }
        }
        Action::Pause { objects, write } => {
            for found in chosen(&objects, &cluster).await? {
                pause(&cluster, &write, found, true).await?;
            }
        }
        Action::Resume { objects, write } => {
            for found in chosen(&objects, &cluster).await? {
                pause(&cluster, &write, found, false).await?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn require_template(found: &Found, doing: &str) -> Result<()> {
    match kind(&found.object) {
        "Deployment" | "DaemonSet" | "StatefulSet" => Ok(()),
        other => bail!("{} {:?} {doing} is not supported", other.to_lowercase(), name(&found.object)),
    }
}

async fn pause(cluster: &Cluster, write: &WriteFlags, found: Found, paused: bool) -> Result<()> {
    if kind(&found.object) != "Deployment" {
        bail!("{} pausing is not supported", found.resource.qualified_name());
    }
    if (found.object["spec"]["paused"] == true) == paused {
        let state = if paused { "already paused" } else { "not paused" };
        bail!("{} {:?} is {state}", found.resource.qualified_name(), name(&found.object));
    }
    let done = if paused { "paused" } else { "resumed" };
    change(cluster, write, found, PatchKind::Merge, &json!({"spec": {"paused": paused}}), "kubectl-rollout", done).await
}

/// Prints the status whenever it changes, until the rollout is done.
async fn follow(cluster: &Cluster, found: Found, watch: bool) -> Result<()> {
    require_template(&found, "rollout status")?;
    let mut last = String::new();
    let is_done = |object: &Value| {
        let (message, done) = status(object)?;
        if message != last {
            println!("{message}");
            last = message;
        }
        Ok(done || !watch)
    };
    match until(cluster, &found.resource, found.object, is_done).await? {
        Some(_) => Ok(()),
        None => bail!("object has been deleted"),
    }
}

/// The message and whether the rollout is done. As kubectl's `StatusViewer`s.
fn status(object: &Value) -> Result<(String, bool)> {
    let name = name(object);
    let observed = number(object, "/status/observedGeneration") >= number(object, "/metadata/generation");
    let counts = |field: &str| number(object, &format!("/status/{field}"));
    match kind(object) {
        "Deployment" => {
            if !observed {
                return Ok(("Waiting for deployment spec update to be observed...".to_owned(), false));
            }
            let late = |c: &&Value| c["type"] == "Progressing" && c["reason"] == "ProgressDeadlineExceeded";
            if items(object, "/status/conditions").iter().any(|condition| late(&condition)) {
                bail!("deployment {name:?} exceeded its progress deadline");
            }
            let wanted = object.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(1);
            let (replicas, updated, available) =
                (counts("replicas"), counts("updatedReplicas"), counts("availableReplicas"));
            let wait = format!("Waiting for deployment {name:?} rollout to finish:");
            Ok(if updated < wanted {
                (format!("{wait} {updated} out of {wanted} new replicas have been updated..."), false)
            } else if replicas > updated {
                (format!("{wait} {} old replicas are pending termination...", replicas - updated), false)
            } else if available < updated {
                (format!("{wait} {available} of {updated} updated replicas are available..."), false)
            } else {
                (format!("deployment {name:?} successfully rolled out"), true)
            })
        }
        "DaemonSet" => {
            if text(object, "/spec/updateStrategy/type") == "OnDelete" {
                bail!("rollout status is only available for RollingUpdate strategy type");
            }
            if !observed {
                return Ok(("Waiting for daemon set spec update to be observed...".to_owned(), false));
            }
            let (wanted, updated, available) =
                (counts("desiredNumberScheduled"), counts("updatedNumberScheduled"), counts("numberAvailable"));
            let wait = format!("Waiting for daemon set {name:?} rollout to finish:");
            Ok(if updated < wanted {
                (format!("{wait} {updated} out of {wanted} new pods have been updated..."), false)
            } else if available < wanted {
                (format!("{wait} {available} of {wanted} updated pods are available..."), false)
            } else {
                (format!("daemon set {name:?} successfully rolled out"), true)
            })
        }
        _ => {
            if text(object, "/spec/updateStrategy/type") == "OnDelete" {
                bail!("rollout status is only available for RollingUpdate strategy type");
            }
            if number(object, "/status/observedGeneration") == 0 || !observed {
                return Ok(("Waiting for statefulset spec update to be observed...".to_owned(), false));
            }
            let wanted = object.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(1);
            let (ready, updated) = (counts("readyReplicas"), counts("updatedReplicas"));
            let partition = number(object, "/spec/updateStrategy/rollingUpdate/partition");
            let revision = text(object, "/status/updateRevision");
            Ok(if ready < wanted {
                (format!("Waiting for {} pods to be ready...", wanted - ready), false)
            } else if partition > 0 && updated < wanted - partition {
                (
                    format!(
                        "Waiting for partitioned roll out to finish: {updated} out of {} new pods have been updated...",
                        wanted - partition
                    ),
                    false,
                )
            } else if partition > 0 {
                (format!("partitioned roll out complete: {updated} new pods have been updated..."), true)
            } else if revision != text(object, "/status/currentRevision") {
                (
                    format!(
                        "waiting for statefulset rolling update to complete {updated} pods at revision {revision}..."
                    ),
                    false,
                )
            } else {
                (
                    format!(
                        "statefulset rolling update complete {} pods at revision {revision}...",
                        counts("currentReplicas")
                    ),
                    true,
                )
            })
        }
    }
}

/// A stored revision: number, cause, pod template.
struct Revision {
    number: i64,
    cause: String,
    template: Value,
}

/// The revisions of an object, oldest first.
async fn revisions(cluster: &Cluster, found: &Found) -> Result<Vec<Revision>> {
    let object = &found.object;
    let selector = selector_of(object).unwrap_or_default();
    let (resource, of_deployment) = match kind(object) {
        "Deployment" => ("replicasets", true),
        _ => ("controllerrevisions", false),
    };
    let path = format!("/apis/apps/v1/namespaces/{}/{resource}", namespace(object));
    let list = cluster.get(&with_query(&path, &[("labelSelector", &selector)])).await?;
    let uid = text(object, "/metadata/uid");
    let owned = |item: &&Value| items(item, "/metadata/ownerReferences").iter().any(|owner| owner["uid"] == uid);
    let mut revisions: Vec<Revision> = items(&list, "/items")
        .iter()
        .filter(owned)
        .map(|item| {
            let annotation = |key: &str| item["metadata"]["annotations"][key].as_str().unwrap_or_default().to_owned();
            if of_deployment {
                let template = item["spec"]["template"].clone();
                Revision {
                    number: annotation(REVISION).parse().unwrap_or(0),
                    cause: annotation(CHANGE_CAUSE),
                    template,
                }
            } else {
                let template = item["data"]["spec"]["template"].clone();
                Revision { number: number(item, "/revision"), cause: annotation(CHANGE_CAUSE), template }
            }
        })
        .collect();
    revisions.sort_by_key(|revision| revision.number);
    Ok(revisions)
}

async fn history(cluster: &Cluster, found: &Found, wanted: i64) -> Result<()> {
    require_template(found, "rollout history")?;
    let revisions = revisions(cluster, found).await?;
    let reference = found.reference();
    if wanted > 0 {
        let Some(revision) = revisions.iter().find(|revision| revision.number == wanted) else {
            bail!("unable to find the specified revision");
        };
        println!("{reference} with revision #{wanted}");
        print!("Pod Template:\n{}", super::describe::pod_template(&revision.template));
        return Ok(());
    }
    println!("{reference} ");
    let mut rows = vec![vec!["REVISION".to_owned(), "CHANGE-CAUSE".to_owned()]];
    for revision in revisions {
        let cause = if revision.cause.is_empty() { "<none>".to_owned() } else { revision.cause };
        rows.push(vec![revision.number.to_string(), cause]);
    }
    // kubectl sets this table closer than others.
    for row in rows {
        println!("{:<10}{}", row[0], row[1]);
    }
    println!();
    Ok(())
}

async fn undo(cluster: &Cluster, write: &WriteFlags, found: Found, to: i64) -> Result<()> {
    require_template(&found, "rollback")?;
    if found.object["spec"]["paused"] == true {
        bail!("you cannot rollback a paused deployment; resume it first with 'kubectl rollout resume' and try again");
    }
    let mut revisions = revisions(cluster, &found).await?;
    let target = if to > 0 {
        revisions.into_iter().find(|revision| revision.number == to)
    } else {
        revisions.pop();
        revisions.pop()
    };
    let Some(mut target) = target else {
        match to {
            0 => bail!("no rollout history found for {} {:?}", found.resource.singular, name(&found.object)),
            _ => bail!("unable to find specified revision {to} in history"),
        }
    };
    if let Some(labels) = target.template.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
        labels.remove("pod-template-hash");
    }
    if target.template == found.object["spec"]["template"] {
        let reference = found.reference();
        println!("{reference} skipped rollback (current template already matches revision {})", target.number);
        return Ok(());
    }
    let patch = json!([{"op": "replace", "path": "/spec/template", "value": target.template}]);
    change(cluster, write, found, PatchKind::Json, &patch, "kubectl-rollout", "rolled back").await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_of_a_deployment_is_kubectls() {
        let deployment = |status: Value| json!({"kind": "Deployment", "metadata": {"name": "d", "generation": 2}, "spec": {"replicas": 3}, "status": status});
        let cases = [
            (json!({"observedGeneration": 1}), "Waiting for deployment spec update to be observed...", false),
            (
                json!({"observedGeneration": 2, "replicas": 3, "updatedReplicas": 1}),
                "Waiting for deployment \"d\" rollout to finish: 1 out of 3 new replicas have been updated...",
                false,
            ),
            (
                json!({"observedGeneration": 2, "replicas": 4, "updatedReplicas": 3, "availableReplicas": 3}),
                "Waiting for deployment \"d\" rollout to finish: 1 old replicas are pending termination...",
                false,
            ),
            (
                json!({"observedGeneration": 2, "replicas": 3, "updatedReplicas": 3, "availableReplicas": 2}),
                "Waiting for deployment \"d\" rollout to finish: 2 of 3 updated replicas are available...",
                false,
            ),
            (
                json!({"observedGeneration": 2, "replicas": 3, "updatedReplicas": 3, "availableReplicas": 3}),
                "deployment \"d\" successfully rolled out",
                true,
            ),
        ];
        for (value, message, done) in cases {
            assert_eq!(status(&deployment(value)).expect("status"), (message.to_owned(), done));
        }
        let late = json!({"observedGeneration": 2, "conditions": [{"type": "Progressing", "reason": "ProgressDeadlineExceeded"}]});
        assert!(status(&deployment(late)).is_err());
    }
}
