//! `apply`: makes the cluster have what manifests say, and remembers what they said for the next time.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use super::shared::{DryRun, WriteFlags};
use crate::cluster::{Cluster, PatchKind, RequestError, Resource, with_query};
use crate::flags::GlobalFlags;
use crate::objects::{
    FileFlags, LAST_APPLIED, Manifest, difference, name, namespace, set, strip_managed_fields, three_way_merge,
};

/// How often a change is merged anew when somebody else was faster.
const CONFLICT_ATTEMPTS: usize = 5;
const MANAGER: &str = "kubectl-client-side-apply";

/// Apply a configuration to objects by file name or stdin
#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    #[command(flatten)]
    files: FileFlags,
    #[command(flatten)]
    write: WriteFlags,
    /// Let the server merge
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
          action = clap::ArgAction::Set)]
    server_side: bool,
    /// With --server-side: take over fields that others manage
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
          action = clap::ArgAction::Set)]
    force_conflicts: bool,
    /// Delete and create again what cannot be changed
    #[arg(long)]
    force: bool,
    /// Only objects with these labels
    #[arg(short = 'l', long)]
    selector: Option<String>,
    /// Accepted for kubectl's sake
    #[arg(long, hide = true)]
    overwrite: bool,
}

pub(crate) async fn run(args: ApplyArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    if args.files.is_empty() {
        bail!("must specify one of -f and -k");
    }
    let selector = args.selector.as_deref().map(apimachinery::labels::Selector::parse).transpose()?;
    let cluster = Cluster::connect(flags).await?;
    let mut failed = false;
    for manifest in args.files.read()? {
        if let Some(selector) = &selector {
            let labels = manifest.object.pointer("/metadata/labels").and_then(Value::as_object);
            let matches = selector.matches_with(|key| labels.and_then(|labels| labels.get(key)?.as_str()));
            if !matches {
                continue;
            }
        }
        if let Err(error) = apply(&cluster, &args, manifest).await {
            failed = true;
            super::print_error(&error);
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn apply(cluster: &Cluster, args: &ApplyArgs, mut manifest: Manifest) -> Result<()> {
    let resource = manifest.locate(cluster).await?;
    let Manifest { source, object } = manifest;
    if name(&object).is_empty() {
        bail!("error when retrieving current configuration of {:?}: resource name may not be empty", source);
    }
    if args.server_side {
        return server_side(cluster, args, &resource, &object).await;
    }
    let path = resource.object(namespace(&object), name(&object));
    let mut modified = object;
    let Some(mut current) = cluster.get_opt(&path).await? else {
        annotate(&mut modified)?;
        if args.write.dry_run == DryRun::Client {
            return args.write.report(modified, Some(&resource), "created");
        }
        let collection = args.write.query(&resource.collection(Some(namespace(&modified))), MANAGER);
        let created = cluster
            .post(&collection, &modified)
            .await
            .map_err(|error| RequestError::during(error, &format!("error when creating {source:?}")))?;
        return args.write.report(created, Some(&resource), "created");
    };
    if args.write.dry_run == DryRun::Client {
        return args.write.report(modified, Some(&resource), "configured");
    }
    let applied = applied_before(&current);
    if applied.is_none() {
        eprintln!(
            "Warning: resource {}/{} is missing the {LAST_APPLIED} annotation which is required by kubectl apply. kubectl apply should only be used on resources created declaratively by either kubectl create --save-config or kubectl apply. The missing annotation will be patched automatically.",
            resource.name,
            name(&modified)
        );
    }
    let original = applied.unwrap_or(Value::Null);
    annotate(&mut modified)?;
    for attempt in 1.. {
        let Some(patch) = change(&original, &modified, &current, &resource) else {
            return args.write.report(current, Some(&resource), "unchanged");
        };
        match cluster.patch(&args.write.query(&path, MANAGER), PatchKind::Merge, &patch).await {
            Ok(patched) => {
                let done = if patched["metadata"]["resourceVersion"] == current["metadata"]["resourceVersion"] {
                    "unchanged"
                } else {
                    "configured"
                };
                return args.write.report(patched, Some(&resource), done);
            }
            Err(error) if RequestError::code_of(&error) == Some(409) && attempt < CONFLICT_ATTEMPTS => {
                current = cluster.get(&path).await?;
            }
            Err(error) if args.force && matches!(RequestError::code_of(&error), Some(409 | 422)) => {
                cluster.delete(&path, &json!({"propagationPolicy": "Background"})).await?;
                super::delete::wait_until_gone(cluster, &resource, namespace(&modified), name(&modified), "", None)
                    .await?;
                let collection = args.write.query(&resource.collection(Some(namespace(&modified))), MANAGER);
                let created = cluster.post(&collection, &modified).await?;
                return args.write.report(created, Some(&resource), "configured");
            }
            Err(error) => {
                return Err(RequestError::during(error, &format!("error when applying patch to {source:?}")));
            }
        }
    }
    Ok(())
}

/// The merge patch from what the server has to what it is to have, bound to the version merged with; `None` if nothing differs.
fn change(original: &Value, modified: &Value, current: &Value, resource: &Resource) -> Option<Value> {
    let facts = apimachinery::facts::schema_of(&resource.group, &resource.version, &resource.kind);
    let mut merged = three_way_merge(original, modified, current, facts);
    // What only the server writes is never part of a manifest's say.
    for field in ["resourceVersion", "uid", "creationTimestamp", "generation", "managedFields", "selfLink"] {
        match current.pointer(&format!("/metadata/{field}")) {
            Some(value) => set(&mut merged, &["metadata", field], value.clone()),
            None => drop(merged["metadata"].as_object_mut().and_then(|metadata| metadata.remove(field))),
        }
    }
    if resource.subresources.iter().any(|subresource| subresource == "status") {
        match current.get("status") {
            Some(status) => set(&mut merged, &["status"], status.clone()),
            None => drop(merged.as_object_mut().and_then(|object| object.remove("status"))),
        }
    }
    let mut patch = difference(current, &merged)?;
    set(&mut patch, &["metadata", "resourceVersion"], current["metadata"]["resourceVersion"].clone());
    Some(patch)
}

async fn server_side(cluster: &Cluster, args: &ApplyArgs, resource: &Resource, object: &Value) -> Result<()> {
    let mut object = object.clone();
    strip_managed_fields(&mut object);
    let path = args.write.query(&resource.object(namespace(&object), name(&object)), "kubectl");
    let path = with_query(&path, &[("force", if args.force_conflicts { "true" } else { "" })]);
    let applied = cluster.patch(&path, PatchKind::Apply, &object).await?;
    args.write.report(applied, Some(resource), "serverside-applied")
}

/// What `apply` was given the last time.
fn applied_before(object: &Value) -> Option<Value> {
    let annotation = object.pointer("/metadata/annotations")?.get(LAST_APPLIED)?.as_str()?;
    serde_json::from_str(annotation).ok()
}

/// Writes the object itself into its annotation, as kubectl does.
pub(crate) fn annotate(object: &mut Value) -> Result<()> {
    let mut bare = object.clone();
    if !bare.pointer("/metadata/annotations").is_some_and(Value::is_object) {
        set(&mut bare, &["metadata", "annotations"], json!({}));
    }
    if let Some(annotations) = bare.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        annotations.remove(LAST_APPLIED);
    }
    let text = serde_json::to_string(&bare).context("the object cannot be written down")?;
    set(object, &["metadata", "annotations", LAST_APPLIED], format!("{text}\n").into());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment() -> Resource {
        Resource {
            group: "apps".into(),
            version: "v1".into(),
            kind: "Deployment".into(),
            name: "deployments".into(),
            singular: "deployment".into(),
            short_names: vec![],
            categories: vec![],
            namespaced: true,
            verbs: vec![],
            subresources: vec!["status".into()],
        }
    }

    #[test]
    fn the_annotation_holds_the_manifest_without_itself() {
        let mut object = json!({"kind": "Pod", "metadata": {"name": "p"}});
        annotate(&mut object).expect("annotated");
        let first = object["metadata"]["annotations"][LAST_APPLIED].clone();
        assert_eq!(first, "{\"kind\":\"Pod\",\"metadata\":{\"annotations\":{},\"name\":\"p\"}}\n");
        annotate(&mut object).expect("annotated again");
        assert_eq!(object["metadata"]["annotations"][LAST_APPLIED], first);
    }

    #[test]
    fn a_second_apply_of_the_same_changes_nothing() {
        let mut manifest = json!({"metadata": {"name": "d"}, "spec": {"replicas": 2}, "status": {}});
        annotate(&mut manifest).expect("annotated");
        let mut current = manifest.clone();
        current["metadata"]["resourceVersion"] = json!("7");
        current["metadata"]["uid"] = json!("u");
        current["spec"]["paused"] = json!(false);
        current["status"] = json!({"replicas": 2});
        let original = applied_before(&current).expect("annotation");
        assert_eq!(change(&original, &manifest, &current, &deployment()), None);

        let mut scaled = json!({"metadata": {"name": "d"}, "spec": {"replicas": 3}});
        annotate(&mut scaled).expect("annotated");
        let patch = change(&original, &scaled, &current, &deployment()).expect("a change");
        assert_eq!(patch["spec"], json!({"replicas": 3}));
        assert_eq!(patch["metadata"]["resourceVersion"], "7");
        assert!(patch.get("status").is_none());
    }
}
