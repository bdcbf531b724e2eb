//! `label` and `annotate`: KEY=VALUE sets, KEY- removes.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Map, Value, json};

use super::shared::{ChoiceFlags, WriteFlags, change};
use crate::cluster::{Cluster, PatchKind};
use crate::flags::GlobalFlags;
use crate::output::jsonpath::plain;

/// TYPE NAME KEY=VALUE… KEY-…
#[derive(Debug, Args)]
pub(crate) struct LabelArgs {
    #[command(flatten)]
    choice: ChoiceFlags,
    #[command(flatten)]
    write: WriteFlags,
    /// Change what has a value already
    #[arg(long)]
    overwrite: bool,
    /// All objects of the types
    #[arg(long)]
    all: bool,
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Show what there is
    #[arg(long)]
    list: bool,
    /// Only if the object has this version
    #[arg(long)]
    resource_version: Option<String>,
}

/// Which map of the metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    Labels,
    Annotations,
}

impl Field {
    fn name(self) -> &'static str {
        match self {
            Field::Labels => "labels",
            Field::Annotations => "annotations",
        }
    }
}

/// What is to be set (`Some`) and removed.
type Changes = Vec<(String, Option<String>)>;

/// The words before the first change, and the changes.
fn split(words: &[String]) -> Result<(Vec<String>, Changes)> {
    let is_change = |word: &String| word.contains('=') || word.ends_with('-');
    let first = words.iter().position(is_change).unwrap_or(words.len());
    let mut changes: Changes = Vec::new();
    for word in &words[first..] {
        let (key, value) = match word.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => match word.strip_suffix('-') {
                Some(key) => (key, None),
                None => bail!("all resources must be specified before label changes: {word}"),
            },
        };
        if key.is_empty() {
            bail!("invalid label spec: {word}");
        }
        if changes.iter().any(|(known, _)| known == key) {
            bail!("can not both modify and remove a label in the same command");
        }
        changes.push((key.to_owned(), value));
    }
    Ok((words[..first].to_vec(), changes))
}

pub(crate) async fn run(args: LabelArgs, flags: &GlobalFlags, field: Field) -> Result<ExitCode> {
    let (words, changes) = split(&args.choice.words)?;
    if changes.is_empty() && !args.list {
        bail!("at least one {} update is required", field.name().trim_end_matches('s'));
    }
    let cluster = Cluster::connect(flags).await?;
    let mut failed = false;
    for found in args.choice.fetch(&cluster, &words, args.all, args.all_namespaces).await? {
        let present =
            found.object["metadata"].get(field.name()).and_then(Value::as_object).cloned().unwrap_or_default();
        if args.list {
            for (key, value) in &present {
                println!("{key}={}", plain(value));
            }
            continue;
        }
        let (patch, done) = match plan(&present, &changes, args.overwrite, field) {
            Ok(plan) => plan,
            Err(error) => {
                failed = true;
                eprintln!("error: {error}");
                continue;
            }
        };
        let mut metadata = json!({field.name(): patch});
        if let Some(version) = &args.resource_version {
            metadata["resourceVersion"] = json!(version);
        }
        let patch = json!({"metadata": metadata});
        change(&cluster, &args.write, found, PatchKind::Merge, &patch, "kubectl-label", done).await?;
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The map of the patch, and the word for what it does.
fn plan(
    present: &Map<String, Value>,
    changes: &Changes,
    overwrite: bool,
    field: Field,
) -> Result<(Map<String, Value>, &'static str)> {
    let mut patch = Map::new();
    let (mut set, mut removed) = (false, false);
    for (key, value) in changes {
        match (value, present.get(key)) {
            (Some(value), Some(known)) if known != value => {
                if !overwrite {
                    bail!("'{key}' already has a value ({}), and --overwrite is false", plain(known));
                }
                set = true;
                patch.insert(key.clone(), value.clone().into());
            }
            (Some(value), None) => {
                set = true;
                patch.insert(key.clone(), value.clone().into());
            }
            (None, Some(_)) => {
                removed = true;
                patch.insert(key.clone(), Value::Null);
            }
            (Some(_), Some(_)) => {}
            (None, None) => println!("label {key:?} not found."),
        }
    }
    let done = match (field, set, removed) {
        (Field::Annotations, ..) => "annotated",
        (Field::Labels, true, _) => "labeled",
        (Field::Labels, false, true) => "unlabeled",
        (Field::Labels, false, false) => "not labeled",
    };
    Ok((patch, done))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_from_changes() {
        let words: Vec<String> = ["pods", "a", "k=v", "x-"].map(str::to_owned).into();
        let (objects, changes) = split(&words).expect("split");
        assert_eq!(objects, ["pods", "a"]);
        assert_eq!(changes, [("k".to_owned(), Some("v".to_owned())), ("x".to_owned(), None)]);
        for wrong in [vec!["pods", "a=b", "a-"], vec!["po", "=x"], vec!["po", "a=b", "c"]] {
            assert!(split(&wrong.into_iter().map(str::to_owned).collect::<Vec<_>>()).is_err());
        }
    }

    #[test]
    fn a_value_is_only_replaced_when_asked() {
        let present = json!({"a": "1"}).as_object().cloned().expect("object");
        let change = |value: Option<&str>| vec![("a".to_owned(), value.map(str::to_owned))];
        assert!(plan(&present, &change(Some("2")), false, Field::Labels).is_err());
        assert_eq!(plan(&present, &change(Some("2")), true, Field::Labels).expect("overwritten").1, "labeled");
        assert_eq!(plan(&present, &change(Some("1")), false, Field::Labels).expect("same").1, "not labeled");
        let (patch, done) = plan(&present, &change(None), false, Field::Labels).expect("removed");
        assert_eq!((Value::Object(patch), done), (json!({"a": null}), "unlabeled"));
    }
}
