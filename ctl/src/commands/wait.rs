//! `wait`: until objects have a condition, a value, or are gone.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use serde_json::Value;

use super::delete::wait_until_gone;
use super::shared::{ChoiceFlags, fetch, until, within};
use crate::cluster::{Cluster, RequestError};
use crate::flags::GlobalFlags;
use crate::objects::{items, name, namespace, text};
use crate::output::jsonpath::{Path, plain};

const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Wait for a specific condition on one or many resources
#[derive(Debug, Args)]
pub(crate) struct WaitArgs {
    #[command(flatten)]
    choice: ChoiceFlags,
    /// delete, create, condition=NAME[=VALUE] or jsonpath='{PATH}'[=VALUE]
    #[arg(long = "for", required = true, value_name = "WHAT")]
    what: String,
    /// How long; a negative value waits for a week
    #[arg(long, default_value = "30s", allow_hyphen_values = true)]
    timeout: String,
    #[arg(long)]
    all: bool,
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    #[arg(short = 'o', long)]
    output: Option<String>,
}

/// What is waited for.
#[derive(Debug, PartialEq)]
enum Goal {
    Deleted,
    Created,
    Condition(String, String),
    Path(Path, Option<String>),
}

impl Goal {
    fn parse(text: &str) -> Result<Goal> {
        let lower = text.to_lowercase();
        if lower == "delete" {
            return Ok(Goal::Deleted);
        }
        if lower == "create" {
            return Ok(Goal::Created);
        }
        if let Some(condition) = text.strip_prefix("condition=") {
            let (name, value) = condition.split_once('=').unwrap_or((condition, "True"));
            return Ok(Goal::Condition(name.to_owned(), value.to_owned()));
        }
        if let Some(rest) = text.strip_prefix("jsonpath=") {
            // The value's sign is the first behind the closing brace.
            let (path, value) = match rest.find('}') {
                Some(end) => (&rest[..=end], rest[end + 1..].trim_start_matches(['\'', '"']).strip_prefix('=')),
                None => match rest.split_once('=') {
                    Some((path, value)) => (path, Some(value)),
                    None => (rest, None),
                },
            };
            let path = path.trim_matches(['\'', '"']);
            let value = value.map(|value| value.trim_matches(['\'', '"']).to_owned());
            if value.as_deref() == Some("") {
                bail!("jsonpath wait has to have a value after equal sign");
            }
            return Ok(Goal::Path(Path::parse_relaxed(path)?, value));
        }
        bail!("unrecognized condition: {text:?}")
    }

    /// Whether the object is as it should be.
    fn is_met(&self, object: &Value) -> bool {
        match self {
            Goal::Deleted => false,
            Goal::Created => true,
            Goal::Condition(name, value) => {
                let found = items(object, "/status/conditions")
                    .iter()
                    .find(|condition| text(condition, "/type").eq_ignore_ascii_case(name));
                // A condition that was written before the last change says nothing about it.
                let current =
                    found.and_then(|condition| condition["observedGeneration"].as_i64()).is_none_or(|observed| {
                        observed == 0
                            || object["metadata"]["generation"].as_i64().is_none_or(|generation| observed >= generation)
                    });
                current && found.is_some_and(|condition| text(condition, "/status").eq_ignore_ascii_case(value))
            }
            Goal::Path(path, value) => match (path.find(object).as_slice(), value) {
                ([], _) => false,
                (found, Some(value)) => matches!(found, [found] if plain(found) == *value),
                (_, None) => true,
            },
        }
    }
}

pub(crate) async fn run(args: WaitArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let goal = Goal::parse(&args.what)?;
    let limit = match args.timeout.strip_prefix('-') {
        Some(_) => Duration::from_secs(7 * 24 * 3600),
        None => apimachinery::time::parse_duration(&args.timeout)?,
    };
    let deadline = Instant::now() + limit;
    let cluster = Cluster::connect(flags).await?;
    let wanted = args.choice.targets(&cluster).await?;
    let left = || deadline.saturating_duration_since(Instant::now());
    let found = loop {
        match fetch(&cluster, wanted.clone(), &args.choice.selectors, args.all, args.all_namespaces).await {
            Ok(found) if !found.is_empty() || goal != Goal::Created => break found,
            Err(error) if RequestError::code_of(&error) == Some(404) && goal == Goal::Deleted => {
                // What is gone already need not be waited for.
                return Ok(ExitCode::SUCCESS);
            }
            Err(error) if RequestError::code_of(&error) != Some(404) || goal != Goal::Created => return Err(error),
            _ if left().is_zero() => bail!("timed out waiting for the condition"),
            _ => tokio::time::sleep(RETRY_PAUSE).await,
        }
    };
    if found.is_empty() {
        match goal {
            Goal::Deleted => return Ok(ExitCode::SUCCESS),
            _ => bail!("no matching resources found"),
        }
    }
    let mut failed = false;
    for found in found {
        let (place, object_name) = (namespace(&found.object).to_owned(), name(&found.object).to_owned());
        let outcome = if goal == Goal::Deleted {
            let uid = text(&found.object, "/metadata/uid");
            wait_until_gone(&cluster, &found.resource, &place, &object_name, uid, Some(left())).await
        } else {
            let of = format!(" on {}/{object_name}", found.resource.qualified_name());
            let met = until(&cluster, &found.resource, found.object.clone(), |object| Ok(goal.is_met(object)));
            within(Some(left()), &of, met).await.and_then(|met| match met {
                Some(_) => Ok(()),
                None => bail!("{} {object_name:?} was deleted", found.resource.qualified_name()),
            })
        };
        match outcome {
            Ok(()) if args.output.as_deref() == Some("name") => println!("{}", found.reference()),
            Ok(()) => println!("{} condition met", found.reference()),
            Err(error) => {
                failed = true;
                super::print_error(&error);
            }
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn goals_are_parsed_and_met() {
        let object = json!({
            "metadata": {"generation": 2},
            "status": {"phase": "Running", "conditions": [
                {"type": "Ready", "status": "True"}, {"type": "Old", "status": "True", "observedGeneration": 1}]}
        });
        for (text, expected) in [
            ("condition=Ready", true),
            ("condition=ready=true", true),
            ("condition=Ready=False", false),
            ("condition=Old", false),
            ("condition=Absent", false),
            ("jsonpath={.status.phase}=Running", true),
            ("jsonpath='{.status.phase}'=Failed", false),
            ("jsonpath={.status.phase}", true),
            ("jsonpath={.status.absent}", false),
            ("jsonpath={.status.conditions[?(@.type==\"Ready\")].status}=True", true),
            ("delete", false),
        ] {
            assert_eq!(Goal::parse(text).expect(text).is_met(&object), expected, "{text}");
        }
        assert!(Goal::parse("nonsense").is_err());
        assert!(Goal::parse("jsonpath={.a}=").is_err());
    }
}
