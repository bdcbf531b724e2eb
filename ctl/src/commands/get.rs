//! `get`: tables that the server makes, or the objects themselves.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use futures::StreamExt;
use serde_json::{Value, json};

use super::shared::{ChoiceFlags, with_kinds};
use crate::cluster::{Cluster, JSON, RequestError, Resource, TABLE, with_query};
use crate::flags::GlobalFlags;
use crate::objects::{Target, items, kind, name, namespace, strip_managed_fields, text};
use crate::output::table::{TableOptions, Widths, headings, rows};
use crate::output::{Format, age, jsonpath, list_of};

/// As many objects come with one answer.
const CHUNK: &str = "500";

/// Display one or many resources
#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    #[command(flatten)]
    choice: ChoiceFlags,
    /// json, yaml, name, wide, jsonpath=…, jsonpath-file=…, custom-columns=…, custom-columns-file=…
    #[arg(short = 'o', long)]
    output: Option<String>,
    /// Show changes as they come
    #[arg(short = 'w', long)]
    watch: bool,
    /// Show changes only, not what there is
    #[arg(long)]
    watch_only: bool,
    /// Of all namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    #[arg(long)]
    show_labels: bool,
    /// Labels to show as columns
    #[arg(short = 'L', long, value_delimiter = ',')]
    label_columns: Vec<String>,
    #[arg(long)]
    no_headers: bool,
    /// Nothing found is no error
    #[arg(long)]
    ignore_not_found: bool,
    /// A JSONPath by which to order: .metadata.name
    #[arg(long, value_name = "PATH")]
    sort_by: Option<String>,
    #[arg(long)]
    show_kind: bool,
    #[arg(long)]
    show_managed_fields: bool,
    /// A path to ask the server for, printed as it comes
    #[arg(long, value_name = "PATH")]
    raw: Option<String>,
    /// A subresource of the objects: status, scale
    #[arg(long)]
    subresource: Option<String>,
    /// Accepted for kubectl's sake
    #[arg(long, hide = true)]
    chunk_size: Option<u32>,
}

pub(crate) async fn run(args: GetArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    if let Some(path) = &args.raw {
        print!("{}", cluster.get_text(path).await?);
        return Ok(ExitCode::SUCCESS);
    }
    let format = Format::parse(args.output.as_deref())?;
    let wanted = args.choice.targets(&cluster).await?;
    if wanted.iter().any(|target| !target.names.is_empty()) {
        if args.all_namespaces {
            bail!("a resource cannot be retrieved by name across all namespaces");
        }
        if !args.choice.selectors.is_empty() {
            bail!("selectors and the all flag cannot be used when passing resource/name arguments");
        }
    }
    if args.watch || args.watch_only {
        return watch(&cluster, &args, &format, wanted).await;
    }
    if format.is_table() {
        show_tables(&cluster, &args, &format, wanted).await
    } else {
        show_objects(&cluster, &args, &format, wanted).await
    }
}

impl GetArgs {
    /// The namespace to look in; `None` is all of them.
    fn scope<'a>(&self, target: &'a Target) -> Option<&'a str> {
        (!self.all_namespaces).then_some(target.namespace.as_str())
    }

    fn object_path(&self, target: &Target, name: &str) -> String {
        let path = target.resource.object(&target.namespace, name);
        match &self.subresource {
            Some(subresource) => format!("{path}/{subresource}"),
            None => path,
        }
    }

    fn table_options(&self, format: &Format, resource: &Resource, many: bool) -> TableOptions {
        TableOptions {
            wide: *format == Format::Table { wide: true },
            with_namespace: self.all_namespaces && resource.namespaced,
            show_labels: self.show_labels,
            show_kind: self.show_kind || many,
            label_columns: self.label_columns.clone(),
        }
    }
}

/// What was found for a target, and what went wrong with single names.
async fn collect(
    cluster: &Cluster,
    args: &GetArgs,
    target: &Target,
    accept: &'static str,
) -> (Vec<Value>, Vec<anyhow::Error>) {
    let (mut answers, mut errors) = (Vec::new(), Vec::new());
    let include = if args.sort_by.is_some() && accept == TABLE { "Object" } else { "" };
    for name in &target.names {
        let path = with_query(&args.object_path(target, name), &[("includeObject", include)]);
        match cluster.get_as(&path, accept).await {
            Ok(answer) => answers.push(answer),
            Err(error) if args.ignore_not_found && RequestError::code_of(&error) == Some(404) => {}
            Err(error) => errors.push(error),
        }
    }
    if target.names.is_empty() {
        let base = args.choice.selectors.query(&target.resource.collection(args.scope(target)));
        let mut next = String::new();
        loop {
            let path = with_query(&base, &[("limit", CHUNK), ("continue", &next), ("includeObject", include)]);
            match cluster.get_as(&path, accept).await {
                Ok(answer) => {
                    next = text(&answer, "/metadata/continue").to_owned();
                    answers.push(answer);
                }
                Err(error) => {
                    errors.push(error);
                    break;
                }
            }
            if next.is_empty() {
                break;
            }
        }
    }
    (answers, errors)
}

async fn show_tables(cluster: &Cluster, args: &GetArgs, format: &Format, wanted: Vec<Target>) -> Result<ExitCode> {
    let many = wanted.len() > 1;
    let sort = args.sort_by.as_deref().map(jsonpath::Path::parse_relaxed).transpose()?;
    let (mut shown, mut failures) = (0, Vec::new());
    for target in &wanted {
        let (answers, errors) = collect(cluster, args, target, TABLE).await;
        failures.extend(errors);
        let options = args.table_options(format, &target.resource, many);
        let mut cells: Vec<Vec<String>> = Vec::new();
        let mut head: Option<Vec<String>> = None;
        for answer in answers {
            let mut table = as_table(answer);
            if let Some(path) = &sort {
                sort_rows(&mut table, path);
            }
            head.get_or_insert_with(|| headings(&table, &options));
            cells.extend(rows(&table, &options, &target.resource.singular_qualified()));
        }
        if cells.is_empty() {
            continue;
        }
        if let Some(head) = head.filter(|_| !args.no_headers) {
            cells.insert(0, head);
        }
        if shown > 0 {
            println!();
        }
        shown += 1;
        print!("{}", crate::output::table::render(&cells));
    }
    let failed = !failures.is_empty();
    for error in failures {
        super::print_error(&error);
    }
    if shown == 0 && !failed && !args.ignore_not_found {
        let scoped = wanted.iter().any(|target| target.resource.namespaced) && !args.all_namespaces;
        match scoped {
            true => eprintln!("No resources found in {} namespace.", cluster.namespace),
            false => eprintln!("No resources found"),
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn show_objects(cluster: &Cluster, args: &GetArgs, format: &Format, wanted: Vec<Target>) -> Result<ExitCode> {
    let single = matches!(wanted.as_slice(), [target] if target.names.len() == 1);
    let sort = args.sort_by.as_deref().map(jsonpath::Path::parse_relaxed).transpose()?;
    let (mut objects, mut failures) = (Vec::new(), Vec::new());
    for target in &wanted {
        let (answers, errors) = collect(cluster, args, target, JSON).await;
        failures.extend(errors);
        for answer in answers {
            if target.names.is_empty() {
                objects.extend(with_kinds(answer, &target.resource));
            } else {
                objects.push(answer);
            }
        }
    }
    let failed = !failures.is_empty();
    for error in failures {
        super::print_error(&error);
    }
    if let Some(path) = &sort {
        objects.sort_by_cached_key(|object| sort_key(path, object));
    }
    if single {
        if let Some(mut object) = objects.pop() {
            if !args.show_managed_fields {
                strip_managed_fields(&mut object);
            }
            print!("{}", format.render(&object, Some(&wanted[0].resource), args.no_headers)?);
        }
    } else if !failed || !objects.is_empty() {
        let resource = match wanted.as_slice() {
            [target] => Some(&target.resource),
            _ => None,
        };
        let list = if args.show_managed_fields {
            json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": objects})
        } else {
            list_of(objects)
        };
        print!("{}", format.render(&list, resource, args.no_headers)?);
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Shows what there is, and then each change, until the process is ended.
async fn watch(cluster: &Cluster, args: &GetArgs, format: &Format, mut wanted: Vec<Target>) -> Result<ExitCode> {
    let (Some(target), true) = (wanted.pop(), wanted.is_empty()) else {
        bail!("you may only specify a single resource type");
    };
    if target.names.len() > 1 {
        bail!(
            "watch is only supported on individual resources and resource collections - {} resources were found",
            target.names.len()
        );
    }
    let accept = if format.is_table() { TABLE } else { JSON };
    let mut selectors = args.choice.selectors.clone();
    if let Some(name) = target.names.first() {
        // That the object is there is an error now, and not an empty watch.
        cluster.get(&args.object_path(&target, name)).await?;
        selectors.field_selector = Some(format!("metadata.name={name}"));
    }
    let collection = selectors.query(&target.resource.collection(args.scope(&target)));
    let list = cluster.get_as(&collection, accept).await?;
    let mut version = text(&list, "/metadata/resourceVersion").to_owned();
    let mut printer = WatchPrinter {
        args,
        format,
        target: &target,
        widths: Widths::default(),
        definitions: Value::Null,
        headed: args.no_headers,
    };
    if !args.watch_only {
        printer.show(list)?;
    }
    loop {
        let path = with_query(
            &collection,
            &[("watch", "true"), ("resourceVersion", &version), ("allowWatchBookmarks", "true")],
        );
        let mut events = cluster.watch(&path, accept).await?;
        while let Some(event) = events.next().await {
            let (kind, object) = event?;
            let newest = text(&object, "/metadata/resourceVersion");
            let newest =
                if newest.is_empty() { text(&object, "/rows/0/object/metadata/resourceVersion") } else { newest };
            if !newest.is_empty() {
                version = newest.to_owned();
            }
            if kind != "BOOKMARK" {
                printer.show(object)?;
            }
        }
    }
}

struct WatchPrinter<'a> {
    args: &'a GetArgs,
    format: &'a Format,
    target: &'a Target,
    widths: Widths,
    /// The columns, which only the first table of a watch carries.
    definitions: Value,
    headed: bool,
}

impl WatchPrinter<'_> {
    fn show(&mut self, mut answer: Value) -> Result<()> {
        if self.format.is_table() {
            let mut table = as_table(answer);
            if items(&table, "/columnDefinitions").is_empty() {
                table["columnDefinitions"] = self.definitions.clone();
            } else {
                self.definitions = table["columnDefinitions"].clone();
            }
            let options = self.args.table_options(self.format, &self.target.resource, false);
            let mut cells = rows(&table, &options, &self.target.resource.singular_qualified());
            if cells.is_empty() {
                return Ok(());
            }
            if !self.headed {
                self.headed = true;
                cells.insert(0, headings(&table, &options));
            }
            print!("{}", self.widths.render(&cells));
            return Ok(());
        }
        if !self.args.show_managed_fields {
            strip_managed_fields(&mut answer);
        }
        let objects =
            if answer.get("items").is_some() { with_kinds(answer, &self.target.resource) } else { vec![answer] };
        for object in objects {
            let text = self.format.render(&object, Some(&self.target.resource), self.headed)?;
            self.headed = true;
            match self.format {
                Format::Yaml => print!("---\n{text}"),
                _ => print!("{text}"),
            }
        }
        Ok(())
    }
}

/// A table, made of names and ages if the server sent objects.
fn as_table(answer: Value) -> Value {
    if kind(&answer) == "Table" {
        return answer;
    }
    let row = |object: &Value| {
        json!({
            "cells": [name(object), age(text(object, "/metadata/creationTimestamp"))],
            "object": {"metadata": {"name": name(object), "namespace": namespace(object), "labels": object.pointer("/metadata/labels")}}
        })
    };
    let rows: Vec<Value> = match answer.get("items").and_then(Value::as_array) {
        Some(objects) => objects.iter().map(row).collect(),
        None => vec![row(&answer)],
    };
    json!({"kind": "Table", "columnDefinitions": [{"name": "Name", "priority": 0}, {"name": "Age", "priority": 0}], "rows": rows})
}

fn sort_rows(table: &mut Value, path: &jsonpath::Path) {
    if let Some(rows) = table.get_mut("rows").and_then(Value::as_array_mut) {
        rows.sort_by_cached_key(|row| sort_key(path, &row["object"]));
    }
}

/// Numbers by value, the rest as text.
fn sort_key(path: &jsonpath::Path, object: &Value) -> (i64, String) {
    match path.find(object).first() {
        Some(Value::Number(number)) => (number.as_f64().map_or(0, |number| (number * 1000.0) as i64), String::new()),
        Some(value) => (0, jsonpath::plain(value)),
        None => (i64::MIN, String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_without_a_table_show_name_and_age() {
        let list = json!({"items": [{"metadata": {"name": "a"}}, {"metadata": {"name": "b"}}]});
        let table = as_table(list);
        assert_eq!(rows(&table, &TableOptions::default(), ""), [["a", "<unknown>"], ["b", "<unknown>"]]);
    }

    #[test]
    fn rows_are_sorted_by_a_path() {
        let row =
            |name: &str, count: i64| json!({"cells": [name], "object": {"metadata": {"name": name}, "count": count}});
        let mut table = json!({"rows": [row("b", 10), row("a", 9)]});
        sort_rows(&mut table, &jsonpath::Path::parse_relaxed(".count").expect("path"));
        assert_eq!(table["rows"][0]["cells"][0], "a");
        sort_rows(&mut table, &jsonpath::Path::parse_relaxed("metadata.name").expect("path"));
        assert_eq!(table["rows"][0]["cells"][0], "a");
    }
}
