//! `describe`: objects for people, with their events. Common kinds have a form of their own; all others are laid out field
//! by field.

mod generic;
mod node;
mod pod;
mod service;
mod workload;

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde_json::Value;

use super::shared::{ChoiceFlags, Found, fetch};
use crate::cluster::{Cluster, Resource, with_query};
use crate::flags::GlobalFlags;
use crate::objects::{Target, items, kind, name, namespace, text};
use crate::output::age;

pub(crate) use pod::template as pod_template;

/// Show details of a specific resource or group of resources
#[derive(Debug, Args)]
pub(crate) struct DescribeArgs {
    #[command(flatten)]
    choice: ChoiceFlags,
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true,
          action = clap::ArgAction::Set)]
    show_events: bool,
    /// Accepted for kubectl's sake
    #[arg(long, hide = true)]
    chunk_size: Option<u32>,
}

pub(crate) async fn run(args: DescribeArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    let (mut described, mut failed) = (0, false);
    for target in args.choice.targets(&cluster).await? {
        let found = match find(&cluster, target, &args).await {
            Ok(found) => found,
            Err(error) => {
                failed = true;
                super::print_error(&error);
                continue;
            }
        };
        for found in found {
            if described > 0 {
                print!("\n\n");
            }
            described += 1;
            print!("{}", describe(&cluster, &found, args.show_events).await?);
        }
    }
    if described == 0 && !failed {
        match args.all_namespaces {
            true => eprintln!("No resources found"),
            false => eprintln!("No resources found in {} namespace.", cluster.namespace),
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The objects that are named; a name that is not there may be the beginning of others.
async fn find(cluster: &Cluster, target: Target, args: &DescribeArgs) -> Result<Vec<Found>> {
    let all = Target { names: Vec::new(), ..target.clone() };
    let prefix = match target.names.as_slice() {
        [prefix] => Some(prefix.clone()),
        _ => None,
    };
    match (fetch(cluster, vec![target], &args.choice.selectors, true, args.all_namespaces).await, prefix) {
        (Err(error), Some(prefix)) if crate::cluster::RequestError::code_of(&error) == Some(404) => {
            let mut found = fetch(cluster, vec![all], &args.choice.selectors, true, args.all_namespaces).await?;
            found.retain(|found| name(&found.object).starts_with(&prefix));
            if found.is_empty() { Err(error) } else { Ok(found) }
        }
        (outcome, _) => outcome,
    }
}

async fn describe(cluster: &Cluster, found: &Found, show_events: bool) -> Result<String> {
    let object = &found.object;
    let mut out = Description::default();
    match (found.resource.group.as_str(), kind(object)) {
        ("", "Pod") => pod::describe(object, &mut out),
        ("", "Node") => {
            let filter = format!("spec.nodeName={},status.phase!=Succeeded,status.phase!=Failed", name(object));
            let pods = cluster.get(&with_query("/api/v1/pods", &[("fieldSelector", &filter)])).await?;
            let lease = format!("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{}", name(object));
            let lease = cluster.get_opt(&lease).await.ok().flatten();
            node::describe(object, items(&pods, "/items"), lease.as_ref(), &mut out);
        }
        ("", "Service") => {
            let filter = format!("kubernetes.io/service-name={}", name(object));
            let path = format!("/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices", namespace(object));
            let slices = cluster.get(&with_query(&path, &[("labelSelector", &filter)])).await?;
            service::describe(object, items(&slices, "/items"), &mut out);
        }
        ("apps", "Deployment") => {
            let path = format!("/apis/apps/v1/namespaces/{}/replicasets", namespace(object));
            let selector = crate::objects::selector_of(object).unwrap_or_default();
            let sets = cluster.get(&with_query(&path, &[("labelSelector", &selector)])).await?;
            workload::deployment(object, items(&sets, "/items"), &mut out);
        }
        ("apps", "ReplicaSet" | "StatefulSet" | "DaemonSet") | ("", "ReplicationController") => {
            let path = format!("/api/v1/namespaces/{}/pods", namespace(object));
            let selector = crate::objects::selector_of(object).unwrap_or_default();
            let pods = cluster.get(&with_query(&path, &[("labelSelector", &selector)])).await?;
            workload::replicas(object, items(&pods, "/items"), &mut out);
        }
        ("", "Secret") => generic::secret(object, &mut out),
        ("", "ServiceAccount") => generic::service_account(object, &mut out),
        ("", "ConfigMap") => generic::config_map(object, &mut out),
        _ => generic::describe(object, &mut out),
    }
    if show_events {
        events(cluster, &found.resource, object, &mut out).await?;
    }
    out.flush();
    Ok(out.text)
}

/// A description that grows line by line. Cells end in tabs; neighbouring lines share their columns, as in Go's tabwriter.
#[derive(Default)]
struct Description {
    text: String,
}

impl Description {
    /// A line as it is.
    fn line(&mut self, line: impl AsRef<str>) {
        self.text.push_str(line.as_ref());
        self.text.push('\n');
    }

    /// Keys and values in two columns, at `indent`.
    fn pairs(&mut self, indent: usize, pairs: &[(&str, String)]) {
        for (key, value) in pairs {
            self.line(format!("{}{key}:\t{value}", " ".repeat(indent)));
        }
    }

    /// A table at `indent`, with a rule below its headings.
    fn table(&mut self, indent: usize, head: &[&str], rule: &[&str], rows: Vec<Vec<String>>) {
        let pad = " ".repeat(indent);
        self.line(format!("{pad}{}", head.join("\t")));
        self.line(format!("{pad}{}", rule.join("\t")));
        for row in rows {
            self.line(format!("{pad}{}", row.join("\t")));
        }
    }

    /// Sets the columns of what was written so far; what follows does not align with it.
    fn flush(&mut self) {
        self.text = align(&self.text);
    }
}

/// Sets tabbed text in columns: a cell is as wide as the widest of the lines around that have it too, and two blanks more.
fn align(text: &str) -> String {
    const PADDING: usize = 2;
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split('\t').collect()).collect();
    let mut widths: Vec<Vec<usize>> = lines.iter().map(|cells| vec![0; cells.len()]).collect();
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    for column in 0..columns {
        // The last cell of a line is in no column.
        let has = |line: &Vec<&str>| line.len() > column + 1;
        let mut start = 0;
        while start < lines.len() {
            if !has(&lines[start]) {
                start += 1;
                continue;
            }
            let end = (start..lines.len()).find(|at| !has(&lines[*at])).unwrap_or(lines.len());
            let width = lines[start..end].iter().map(|line| line[column].chars().count() + PADDING).max().unwrap_or(0);
            for cells in &mut widths[start..end] {
                cells[column] = width;
            }
            start = end;
        }
    }
    let mut out = String::new();
    for (cells, widths) in lines.iter().zip(&widths) {
        for (cell, width) in cells.iter().zip(widths) {
            out.push_str(cell);
            out.extend(std::iter::repeat_n(' ', width.saturating_sub(cell.chars().count())));
        }
        out.push('\n');
    }
    out
}

/// `a=b` of labels, a line each, below each other in the second column.
fn map_lines(map: Option<&Value>, indent: usize) -> String {
    let Some(map) = map.and_then(Value::as_object).filter(|map| !map.is_empty()) else { return "<none>".to_owned() };
    let lines: Vec<String> =
        map.iter().map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default())).collect();
    lines.join(&format!("\n{}\t", " ".repeat(indent)))
}

/// `a: b` of annotations; long ones are cut, those of several lines stand below their key.
fn annotation_lines(object: &Value) -> String {
    const LENGTH_MAX: usize = 140;
    let annotations = object.pointer("/metadata/annotations").and_then(Value::as_object);
    let mut lines = Vec::new();
    for (key, value) in annotations.into_iter().flatten().filter(|(key, _)| *key != crate::objects::LAST_APPLIED) {
        let value = value.as_str().unwrap_or_default();
        let value = value.strip_suffix('\n').unwrap_or(value);
        if value.len() + key.len() + 2 <= LENGTH_MAX && !value.contains('\n') {
            lines.push(format!("{key}: {value}"));
            continue;
        }
        lines.push(format!("{key}:"));
        for part in value.split('\n') {
            let shown: String = part.chars().take(LENGTH_MAX - 2).collect();
            lines.push(if shown.len() < part.len() { format!("  {shown}...") } else { format!("  {shown}") });
        }
    }
    if lines.is_empty() { "<none>".to_owned() } else { lines.join("\n\t") }
}

fn or_none(text: impl Into<String>) -> String {
    let text = text.into();
    if text.is_empty() { "<none>".to_owned() } else { text }
}

fn selector_line(object: &Value) -> String {
    or_none(crate::objects::selector_of(object).unwrap_or_default())
}

/// `Mon, 02 Jan 2006 15:04:05 +0000`.
fn date(time: &str) -> String {
    match time.parse::<jiff::Timestamp>() {
        Ok(time) => time.to_zoned(jiff::tz::TimeZone::system()).strftime("%a, %d %b %Y %H:%M:%S %z").to_string(),
        Err(_) => "<unset>".to_owned(),
    }
}

/// What happened to an object lately.
async fn events(cluster: &Cluster, resource: &Resource, object: &Value, out: &mut Description) -> Result<()> {
    let place = if resource.namespaced { namespace(object) } else { "default" };
    let mut filter = format!("involvedObject.name={},involvedObject.kind={}", name(object), kind(object));
    if resource.namespaced {
        filter.push_str(&format!(
            ",involvedObject.namespace={place},involvedObject.uid={}",
            text(object, "/metadata/uid")
        ));
    }
    let path =
        with_query(&format!("/api/v1/namespaces/{place}/events"), &[("fieldSelector", &filter), ("limit", "500")]);
    let list = cluster.get(&path).await?;
    let mut events: Vec<&Value> = items(&list, "/items").iter().collect();
    if events.is_empty() {
        out.line("Events:\t<none>");
        return Ok(());
    }
    fn last(event: &Value) -> &str {
        ["/series/lastObservedTime", "/lastTimestamp", "/eventTime", "/metadata/creationTimestamp"]
            .iter()
            .map(|path| text(event, path))
            .find(|time| !time.is_empty())
            .unwrap_or_default()
    }
    events.sort_by_key(|event| last(event).to_owned());
    let rows = events
        .iter()
        .map(|event| {
            let count = event["series"]["count"].as_i64().or_else(|| event["count"].as_i64()).unwrap_or(1);
            let interval = if count > 1 {
                format!("{} (x{count} over {})", age(last(event)), age(text(event, "/firstTimestamp")))
            } else {
                age(last(event))
            };
            let source = or_blank(text(event, "/source/component"), text(event, "/reportingComponent"));
            vec![
                text(event, "/type").to_owned(),
                text(event, "/reason").to_owned(),
                interval,
                source.to_owned(),
                text(event, "/message").trim().to_owned(),
            ]
        })
        .collect();
    out.flush();
    out.line("Events:");
    out.table(2, &["Type", "Reason", "Age", "From", "Message"], &["----", "------", "----", "----", "-------"], rows);
    Ok(())
}

fn or_blank<'a>(first: &'a str, second: &'a str) -> &'a str {
    if first.is_empty() { second } else { first }
}

/// `ReplicaSet/x`, of the controlling owner.
fn controlled_by(object: &Value) -> Option<String> {
    let owner = items(object, "/metadata/ownerReferences").iter().find(|owner| owner["controller"] == true)?;
    Some(format!("{}/{}", text(owner, "/kind"), text(owner, "/name")))
}

/// How many of the pods are in which phase.
fn pod_phases(pods: &[Value]) -> String {
    let count = |phase: &str| pods.iter().filter(|pod| text(pod, "/status/phase") == phase).count();
    format!(
        "{} Running / {} Waiting / {} Succeeded / {} Failed",
        count("Running"),
        count("Pending"),
        count("Succeeded"),
        count("Failed")
    )
}

/// The conditions of an object as a table.
fn conditions(object: &Value, out: &mut Description) {
    let conditions = items(object, "/status/conditions");
    if conditions.is_empty() {
        return;
    }
    out.line("Conditions:");
    let rows = conditions
        .iter()
        .map(|condition| {
            vec![
                format!("{} ", text(condition, "/type")),
                text(condition, "/status").to_owned(),
                text(condition, "/reason").to_owned(),
            ]
        })
        .collect();
    out.table(2, &["Type", "Status", "Reason"], &["----", "------", "------"], rows);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_lines_share_their_columns() {
        assert_eq!(
            align("Name:\tp\nLabels:\ta=b\n\tc=d\nPlain\n  Type\tStatus\n  Long \tTrue\nIP:\t\n"),
            "Name:    p\nLabels:  a=b\n         c=d\nPlain\n  Type   Status\n  Long   True\nIP:      \n"
        );
    }
}
