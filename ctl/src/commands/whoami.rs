//! `auth can-i` and `auth whoami`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::flags::GlobalFlags;
use crate::objects::{items, text};
use crate::output::table;

/// Inspect authorization
#[derive(Debug, Args)]
pub(crate) struct AuthArgs {
    #[command(subcommand)]
    question: Question,
}

#[derive(Debug, Subcommand)]
enum Question {
    /// Check whether an action is allowed
    CanI(CanIArgs),
    /// Experimental: Check self subject attributes
    Whoami {
        /// json or yaml
        #[arg(short = 'o', long)]
        output: Option<String>,
    },
}

#[derive(Debug, Args)]
struct CanIArgs {
    /// VERB
    verb: Option<String>,
    /// TYPE, TYPE/NAME or a path
    resource: Option<String>,
    name: Option<String>,
    /// In all namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    #[arg(long)]
    subresource: Option<String>,
    /// All that is allowed
    #[arg(long)]
    list: bool,
    /// Only the exit code
    #[arg(short = 'q', long)]
    quiet: bool,
    #[arg(long)]
    no_headers: bool,
}

pub(crate) async fn run(args: AuthArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    match args.question {
        Question::CanI(args) if args.list => list(&cluster, &args).await,
        Question::CanI(args) => can_i(&cluster, &args).await,
        Question::Whoami { output } => whoami(&cluster, output.as_deref()).await,
    }
}

async fn can_i(cluster: &Cluster, args: &CanIArgs) -> Result<ExitCode> {
    let (Some(verb), Some(resource)) = (&args.verb, &args.resource) else {
        bail!("you must specify two arguments: verb resource or verb resource/resourceName");
    };
    let spec = if resource.starts_with('/') {
        json!({"nonResourceAttributes": {"verb": verb, "path": resource}})
    } else {
        let (word, name) = match (resource.split_once('/'), &args.name) {
            (Some((word, name)), _) => (word, name),
            (None, Some(name)) => (resource.as_str(), name.as_str()),
            (None, None) => (resource.as_str(), ""),
        };
        let (group, plural, namespaced) = match word {
            "*" => ("*".to_owned(), "*".to_owned(), true),
            _ => match cluster.resource(word).await {
                Ok(found) => (found.group, found.name, found.namespaced),
                Err(_) => {
                    eprintln!("Warning: the server doesn't have a resource type '{word}'\n");
                    let (plural, group) = word.split_once('.').unwrap_or((word, ""));
                    (group.to_owned(), plural.to_owned(), true)
                }
            },
        };
        if !namespaced && !args.all_namespaces {
            eprintln!("Warning: resource '{plural}' is not namespace scoped\n");
        }
        let namespace = if args.all_namespaces || !namespaced { "" } else { &cluster.namespace };
        json!({"resourceAttributes": {
            "namespace": namespace, "verb": verb, "group": group, "resource": plural, "name": name,
            "subresource": args.subresource.clone().unwrap_or_default()}})
    };
    let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": spec});
    let answer = cluster.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &review).await?;
    let allowed = answer.pointer("/status/allowed").and_then(Value::as_bool).unwrap_or(false);
    if !args.quiet {
        let mut words = if allowed { "yes" } else { "no" }.to_owned();
        for part in [text(&answer, "/status/reason"), text(&answer, "/status/evaluationError")] {
            if !part.is_empty() && !allowed {
                words.push_str(&format!(" - {part}"));
            }
        }
        println!("{words}");
    }
    Ok(if allowed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn list(cluster: &Cluster, args: &CanIArgs) -> Result<ExitCode> {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": cluster.namespace}});
    let answer = cluster.post("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", &review).await?;
    let words = |rule: &Value, field: &str| {
        let values: Vec<&str> = items(rule, field).iter().filter_map(Value::as_str).collect();
        format!("[{}]", values.join(" "))
    };
    let mut rows = Vec::new();
    if !args.no_headers {
        rows.push(["Resources", "Non-Resource URLs", "Resource Names", "Verbs"].map(str::to_owned).to_vec());
    }
    for rule in items(&answer, "/status/resourceRules") {
        let groups: Vec<&str> = items(rule, "/apiGroups").iter().filter_map(Value::as_str).collect();
        for resource in items(rule, "/resources").iter().filter_map(Value::as_str) {
            for group in &groups {
                let name = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
                rows.push(vec![name, "[]".to_owned(), words(rule, "/resourceNames"), words(rule, "/verbs")]);
            }
        }
    }
    for rule in items(&answer, "/status/nonResourceRules") {
        rows.push(vec![String::new(), words(rule, "/nonResourceURLs"), "[]".to_owned(), words(rule, "/verbs")]);
    }
    print!("{}", table::render(&rows));
    Ok(ExitCode::SUCCESS)
}

async fn whoami(cluster: &Cluster, output: Option<&str>) -> Result<ExitCode> {
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"});
    let answer = cluster.post("/apis/authentication.k8s.io/v1/selfsubjectreviews", &review).await?;
    match output {
        Some("json") => print!("{}", crate::output::json_text(&answer)?),
        Some("yaml") => print!("{}", apimachinery::yaml::to_string(&answer)?),
        Some(other) => bail!("unable to match a printer suitable for the output format {other:?}"),
        None => {
            let mut rows = vec![vec!["ATTRIBUTE".to_owned(), "VALUE".to_owned()]];
            rows.push(vec!["Username".to_owned(), text(&answer, "/status/userInfo/username").to_owned()]);
            let groups: Vec<&str> =
                items(&answer, "/status/userInfo/groups").iter().filter_map(Value::as_str).collect();
            rows.push(vec!["Groups".to_owned(), format!("[{}]", groups.join(" "))]);
            let extra = answer.pointer("/status/userInfo/extra").and_then(Value::as_object);
            for (key, values) in extra.into_iter().flatten() {
                let values: Vec<&str> = values.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                rows.push(vec![format!("Extra: {key}"), format!("[{}]", values.join(" "))]);
            }
            print!("{}", table::render(&rows));
        }
    }
    Ok(ExitCode::SUCCESS)
}
