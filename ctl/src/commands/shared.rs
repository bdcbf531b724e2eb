//! What several commands do alike: flags, dry runs, creating, choosing objects, waiting.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use futures::StreamExt;
use serde_json::Value;

use crate::cluster::{Cluster, JSON, PatchKind, RequestError, Resource, with_query};
use crate::objects::{FileFlags, Target, items, name, namespace, text};
use crate::output::Format;

/// How far a change goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum DryRun {
    #[default]
    None,
    /// Nothing is sent.
    Client,
    /// The server checks and answers, and stores nothing.
    Server,
}

impl DryRun {
    /// What goes behind the word that says what was done.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            DryRun::None => "",
            DryRun::Client => " (dry run)",
            DryRun::Server => " (server dry run)",
        }
    }

    /// The query parameter's value.
    pub(crate) fn parameter(self) -> &'static str {
        if self == DryRun::Server { "All" } else { "" }
    }
}

fn dry_run(text: &str) -> Result<DryRun, String> {
    match text {
        "none" | "false" => Ok(DryRun::None),
        "client" | "true" | "unchanged" => Ok(DryRun::Client),
        "server" => Ok(DryRun::Server),
        other => Err(format!("Invalid dry-run value ({other}). Must be \"none\", \"server\", or \"client\".")),
    }
}

/// `--dry-run`, `-o` and what else commands take that write.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct WriteFlags {
    /// none, client (only print what would be sent) or server (send it without storing)
    #[arg(long, global = true, num_args = 0..=1, require_equals = true, default_missing_value = "client",
          default_value = "none", value_parser = dry_run)]
    pub(crate) dry_run: DryRun,
    /// Output format: json, yaml, name, jsonpath=…
    #[arg(short = 'o', long, global = true)]
    pub(crate) output: Option<String>,
    /// The name under which the changed fields are recorded
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) field_manager: Option<String>,
    /// Whether unknown and double fields are errors: strict, warn or ignore
    #[arg(long, global = true, num_args = 0..=1, require_equals = true, default_missing_value = "strict",
          default_value = "strict", value_name = "MODE")]
    pub(crate) validate: String,
    /// Keep managed fields in the output
    #[arg(long, global = true)]
    pub(crate) show_managed_fields: bool,
    /// Record the object in the annotation that `apply` reads
    #[arg(long, global = true)]
    pub(crate) save_config: bool,
}

impl WriteFlags {
    /// A path with the parameters of a write.
    pub(crate) fn query(&self, path: &str, default_manager: &str) -> String {
        let manager = self.field_manager.as_deref().unwrap_or(default_manager);
        let validation = match self.validate.as_str() {
            "true" | "strict" => "Strict",
            "warn" => "Warn",
            _ => "Ignore",
        };
        with_query(
            path,
            &[("dryRun", self.dry_run.parameter()), ("fieldManager", manager), ("fieldValidation", validation)],
        )
    }

    /// Prints what became of an object: in the format asked for, or `pod/x created`.
    pub(crate) fn report(&self, mut object: Value, resource: Option<&Resource>, done: &str) -> Result<()> {
        match Format::parse(self.output.as_deref())? {
            Format::Table { .. } => {
                let reference = Format::Name.render(&object, resource, false)?;
                println!("{} {done}{}", reference.trim_end(), self.dry_run.suffix());
            }
            format => {
                if !self.show_managed_fields {
                    crate::objects::strip_managed_fields(&mut object);
                }
                print!("{}", format.render(&object, resource, false)?);
            }
        }
        Ok(())
    }
}

/// Creates an object that a command made, or only shows it. Without a namespace of its own it goes to the command's.
pub(crate) async fn create(cluster: &Cluster, write: &WriteFlags, mut object: Value, done: &str) -> Result<()> {
    if write.save_config {
        crate::commands::apply::annotate(&mut object)?;
    }
    if write.dry_run == DryRun::Client {
        if cluster.namespace_given {
            crate::objects::set(&mut object, &["metadata", "namespace"], cluster.namespace.clone().into());
        }
        return write.report(object, None, done);
    }
    let resource =
        cluster.resource_of_kind(crate::objects::api_version(&object), crate::objects::kind(&object)).await?;
    let in_namespace = match namespace(&object) {
        "" => cluster.namespace.clone(),
        own => own.to_owned(),
    };
    let path = write.query(&resource.collection(Some(&in_namespace)), "kubectl-create");
    let created = cluster.post(&path, &object).await?;
    write.report(created, Some(&resource), done)
}

/// `-l` and `--field-selector`.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct SelectorFlags {
    /// Selector (label query): a=b,c!=d,e in (f,g)
    #[arg(short = 'l', long)]
    pub(crate) selector: Option<String>,
    /// Selector on fields: metadata.name=x,status.phase!=Running
    #[arg(long, value_name = "SELECTOR")]
    pub(crate) field_selector: Option<String>,
}

impl SelectorFlags {
    pub(crate) fn is_empty(&self) -> bool {
        self.selector.is_none() && self.field_selector.is_none()
    }

    /// A path with the selectors as parameters.
    pub(crate) fn query(&self, path: &str) -> String {
        with_query(
            path,
            &[
                ("labelSelector", self.selector.as_deref().unwrap_or_default()),
                ("fieldSelector", self.field_selector.as_deref().unwrap_or_default()),
            ],
        )
    }
}

/// Which objects a command is about.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ChoiceFlags {
    /// TYPE[,TYPE…] [NAME…] or TYPE/NAME…, and behind them the changes, where a command makes any
    pub(crate) words: Vec<String>,
    #[command(flatten)]
    pub(crate) files: FileFlags,
    #[command(flatten)]
    pub(crate) selectors: SelectorFlags,
}

impl ChoiceFlags {
    pub(crate) async fn targets(&self, cluster: &Cluster) -> Result<Vec<Target>> {
        self.files.or_named(cluster, &self.words).await
    }

    /// The objects; `words` are those that name them. As [`fetch`].
    pub(crate) async fn fetch(
        &self,
        cluster: &Cluster,
        words: &[String],
        all: bool,
        all_namespaces: bool,
    ) -> Result<Vec<Found>> {
        let wanted = self.files.or_named(cluster, words).await?;
        fetch(cluster, wanted, &self.selectors, all, all_namespaces).await
    }
}

/// One object that a command is to change, as the server has it.
pub(crate) struct Found {
    pub(crate) resource: Resource,
    pub(crate) object: Value,
}

impl Found {
    pub(crate) fn path(&self) -> String {
        self.resource.object(namespace(&self.object), name(&self.object))
    }

    pub(crate) fn reference(&self) -> String {
        self.resource.reference(name(&self.object))
    }
}

/// Patches an object that was found, but for a dry run of the client, and says what was done.
pub(crate) async fn change(
    cluster: &Cluster,
    write: &WriteFlags,
    found: Found,
    kind: PatchKind,
    patch: &Value,
    manager: &str,
    done: &str,
) -> Result<()> {
    let object = match write.dry_run {
        DryRun::Client => found.object.clone(),
        _ => cluster.patch(&write.query(&found.path(), manager), kind, patch).await?,
    };
    write.report(object, Some(&found.resource), done)
}

/// Between tries to follow an object whose watch has ended.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Follows an object until it is as it should be; none if it was deleted before.
pub(crate) async fn until(
    cluster: &Cluster,
    resource: &Resource,
    mut object: Value,
    mut is_met: impl FnMut(&Value) -> Result<bool>,
) -> Result<Option<Value>> {
    let filter = format!("metadata.name={}", name(&object));
    let collection = with_query(&resource.collection(Some(namespace(&object))), &[("fieldSelector", &filter)]);
    loop {
        if is_met(&object)? {
            return Ok(Some(object));
        }
        let version = text(&object, "/metadata/resourceVersion").to_owned();
        let path = with_query(&collection, &[("watch", "true"), ("resourceVersion", &version)]);
        match cluster.watch(&path, JSON).await {
            Ok(mut events) => {
                while let Some(Ok((kind, newer))) = events.next().await {
                    if kind == "DELETED" {
                        return Ok(None);
                    }
                    object = newer;
                    if is_met(&object)? {
                        return Ok(Some(object));
                    }
                }
            }
            Err(error) if RequestError::code_of(&error) == Some(410) => {}
            Err(error) => return Err(error),
        }
        tokio::time::sleep(RETRY_PAUSE).await;
        let path = resource.object(namespace(&object), name(&object));
        let Some(newer) = cluster.get_opt(&path).await? else { return Ok(None) };
        object = newer;
    }
}

/// Work that may take so long, or as long as it takes; `of` ends the sentence that says it took longer.
pub(crate) async fn within<T>(limit: Option<Duration>, of: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    match limit {
        None => work.await,
        Some(limit) => match tokio::time::timeout(limit, work).await {
            Ok(outcome) => outcome,
            Err(_) => bail!("timed out waiting for the condition{of}"),
        },
    }
}

/// Fetches the objects that targets and selectors name. With neither names nor selectors, `all` must be set.
pub(crate) async fn fetch(
    cluster: &Cluster,
    targets: Vec<Target>,
    selectors: &SelectorFlags,
    all: bool,
    all_namespaces: bool,
) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for Target { resource, namespace, names } in targets {
        if names.is_empty() {
            if selectors.is_empty() && !all {
                bail!("resource(s) were provided, but no name was specified");
            }
            let scope = (!all_namespaces).then_some(namespace.as_str());
            let list = cluster.get(&selectors.query(&resource.collection(scope))).await?;
            found.extend(
                with_kinds(list, &resource).into_iter().map(|object| Found { resource: resource.clone(), object }),
            );
        }
        for name in names {
            let object = cluster.get(&resource.object(&namespace, &name)).await?;
            found.push(Found { resource: resource.clone(), object });
        }
    }
    Ok(found)
}

/// The items of a list, each with the kind that lists leave out.
pub(crate) fn with_kinds(mut list: Value, resource: &Resource) -> Vec<Value> {
    let Some(Value::Array(mut objects)) = list.get_mut("items").map(Value::take) else { return Vec::new() };
    for object in &mut objects {
        crate::objects::set(object, &["apiVersion"], resource.api_version().into());
        crate::objects::set(object, &["kind"], resource.kind.clone().into());
    }
    objects
}

/// The pods that a workload or Service selects, oldest and readiest first. As `AttachablePodForObject`.
pub(crate) async fn pods_of(cluster: &Cluster, in_namespace: &str, object: &Value) -> Result<Vec<Value>> {
    let Some(selector) = crate::objects::selector_of(object) else {
        bail!("cannot find the pods of {}: it has no selector", name(object));
    };
    let path = with_query(&format!("/api/v1/namespaces/{in_namespace}/pods"), &[("labelSelector", &selector)]);
    let list = cluster.get(&path).await?;
    let mut pods: Vec<Value> = items(&list, "/items").to_vec();
    let ready =
        |pod: &Value| items(pod, "/status/conditions").iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
    let placed = |pod: &Value| !text(pod, "/spec/nodeName").is_empty();
    let created = |pod: &Value| text(pod, "/metadata/creationTimestamp").to_owned();
    pods.sort_by_key(|pod| (!placed(pod), text(pod, "/status/phase") != "Running", !ready(pod), created(pod)));
    Ok(pods)
}

/// The pod that `pod`, `pod/x`, `deployment/x` or `service/x` stands for.
pub(crate) async fn one_pod(cluster: &Cluster, word: &str) -> Result<Value> {
    let (resource, object_name) = crate::objects::one_object(cluster, &[word.to_owned()], Some("pods")).await?;
    let object = cluster.get(&resource.object(&cluster.namespace, &object_name)).await?;
    if resource.name == "pods" && resource.group.is_empty() {
        return Ok(object);
    }
    match pods_of(cluster, &cluster.namespace, &object).await?.into_iter().next() {
        Some(pod) => Ok(pod),
        None => bail!("no pods found for {}", resource.reference(&object_name)),
    }
}

/// The container that is meant if none is named: the annotated one, else the first, with a word about it.
pub(crate) fn default_container(pod: &Value, given: Option<&str>, quiet: bool) -> Result<String> {
    let names = |pointer: &str| -> Vec<String> {
        items(pod, pointer).iter().map(|container| text(container, "/name").to_owned()).collect()
    };
    let (containers, init, ephemeral) =
        (names("/spec/containers"), names("/spec/initContainers"), names("/spec/ephemeralContainers"));
    if let Some(given) = given {
        if containers.iter().chain(&init).chain(&ephemeral).any(|container| container == given) {
            return Ok(given.to_owned());
        }
        bail!("container {given} is not valid for pod {}", name(pod));
    }
    let annotated = pod.pointer("/metadata/annotations/kubectl.kubernetes.io~1default-container");
    if let Some(annotated) = annotated.and_then(Value::as_str).filter(|name| containers.iter().any(|c| c == name)) {
        return Ok(annotated.to_owned());
    }
    let Some(first) = containers.first().cloned() else { bail!("pod {} has no containers", name(pod)) };
    if !quiet && containers.len() + init.len() + ephemeral.len() > 1 {
        let mut all = containers;
        all.extend(ephemeral.into_iter().map(|name| format!("{name} (ephem)")));
        all.extend(init.into_iter().map(|name| format!("{name} (init)")));
        eprintln!("Defaulted container {first:?} out of: {}", all.join(", "));
    }
    Ok(first)
}

/// `a=b` pairs of a flag that may be given several times, each with commas.
pub(crate) fn pairs(texts: &[String]) -> Result<serde_json::Map<String, Value>> {
    let mut map = serde_json::Map::new();
    for pair in texts.iter().flat_map(|text| text.split(',')).filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some((key, value)) => drop(map.insert(key.to_owned(), value.into())),
            None => bail!("unexpected label spec: {pair:?}: expected key=value"),
        }
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_default_container_is_annotated_or_first() {
        let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}, {"name": "b"}], "initContainers": [{"name": "i"}]}});
        let mut annotated = pod.clone();
        annotated["metadata"]["annotations"] = json!({"kubectl.kubernetes.io/default-container": "b"});
        for (pod, given, expected) in [
            (&pod, None, Some("a")),
            (&annotated, None, Some("b")),
            (&pod, Some("i"), Some("i")),
            (&pod, Some("x"), None),
        ] {
            assert_eq!(default_container(pod, given, true).ok().as_deref(), expected);
        }
    }

    #[test]
    fn pairs_are_read() {
        let map = pairs(&["a=b,c=d".into(), "e=f=g".into()]).expect("pairs");
        assert_eq!(Value::Object(map), json!({"a": "b", "c": "d", "e": "f=g"}));
        assert!(pairs(&["a".into()]).is_err());
    }
}
