//! `logs`: what containers wrote, of one pod or of several.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use futures::{AsyncBufRead, AsyncReadExt};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use super::shared::{default_container, pods_of};
use crate::cluster::{Cluster, with_query};
use crate::flags::GlobalFlags;
use crate::objects::{items, name, namespace, one_object, text};

const BUFFER_BYTES: usize = 32 * 1024;
/// A line that goes on longer is cut in two.
const LINE_BYTES_MAX: usize = 1024 * 1024;

/// Print the logs for a container in a pod
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// POD or TYPE/NAME
    target: Option<String>,
    /// The container, as with -c
    container_word: Option<String>,
    #[arg(short = 'c', long)]
    container: Option<String>,
    #[arg(short = 'f', long)]
    follow: bool,
    /// The last lines only; -1 shows all
    #[arg(long, allow_negative_numbers = true)]
    tail: Option<i64>,
    /// Only what is younger than 5s, 2m, 3h
    #[arg(long, value_name = "DURATION")]
    since: Option<String>,
    /// Only what came after a date in RFC 3339
    #[arg(long, value_name = "TIME")]
    since_time: Option<String>,
    /// Of the container's former instance
    #[arg(short = 'p', long)]
    previous: bool,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
          action = clap::ArgAction::Set)]
    timestamps: bool,
    #[arg(long)]
    all_containers: bool,
    /// Of all pods that TYPE/NAME selects
    #[arg(long)]
    all_pods: bool,
    /// Of all pods with these labels
    #[arg(short = 'l', long)]
    selector: Option<String>,
    /// Put pod and container before each line
    #[arg(long)]
    prefix: bool,
    #[arg(long)]
    limit_bytes: Option<u64>,
    /// How many logs may be followed at once
    #[arg(long, default_value_t = 5)]
    max_log_requests: usize,
    /// Go on where a log cannot be read
    #[arg(long)]
    ignore_errors: bool,
}

/// One container's log.
struct Log {
    path: String,
    prefix: String,
}

pub(crate) async fn run(mut args: LogsArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    if args.container.is_none() {
        args.container = args.container_word.take();
    }
    let cluster = Cluster::connect(flags).await?;
    let pods = choose(&cluster, &args).await?;
    let mut logs = Vec::new();
    for pod in &pods {
        for container in containers(pod, &args)? {
            logs.push(Log {
                path: path(pod, &container, &args)?,
                prefix: if args.prefix { format!("[pod/{}/{container}] ", name(pod)) } else { String::new() },
            });
        }
    }
    if logs.is_empty() {
        eprintln!("No resources found in {} namespace.", cluster.namespace);
    }
    if !args.follow || logs.len() <= 1 {
        for log in logs {
            if let Err(error) = show(&cluster, &log).await {
                if !args.ignore_errors {
                    return Err(error);
                }
                super::print_error(&error);
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    if logs.len() > args.max_log_requests {
        bail!(
            "you are attempting to follow {} log streams, but maximum allowed concurrency is {}, use --max-log-requests to increase the limit",
            logs.len(),
            args.max_log_requests
        );
    }
    let cluster = std::sync::Arc::new(cluster);
    let mut followed = JoinSet::new();
    for log in logs {
        let cluster = cluster.clone();
        followed.spawn(async move { show(&cluster, &log).await });
    }
    while let Some(outcome) = followed.join_next().await {
        match outcome? {
            Err(error) if args.ignore_errors => super::print_error(&error),
            outcome => outcome?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn choose(cluster: &Cluster, args: &LogsArgs) -> Result<Vec<Value>> {
    let target = match (&args.target, &args.selector) {
        (None, Some(selector)) => {
            let path = format!("/api/v1/namespaces/{}/pods", cluster.namespace);
            let list = cluster.get(&with_query(&path, &[("labelSelector", selector)])).await?;
            return Ok(items(&list, "/items").to_vec());
        }
        (Some(target), None) => target,
        (Some(_), Some(_)) => bail!("only a selector (-l) or a POD name is allowed"),
        (None, None) => bail!(
            "expected 'logs [-f] [-p] (POD | TYPE/NAME) [-c CONTAINER]'.\nPOD or TYPE/NAME is a required argument for the logs command"
        ),
    };
    let (resource, object_name) = one_object(cluster, std::slice::from_ref(target), Some("pods")).await?;
    let Some(object) = cluster.get_opt(&resource.object(&cluster.namespace, &object_name)).await? else {
        let resource = resource.qualified_name();
        bail!(
            "error from server (NotFound): {resource} {object_name:?} not found in namespace {:?}",
            cluster.namespace
        );
    };
    if resource.name == "pods" && resource.group.is_empty() {
        return Ok(vec![object]);
    }
    let mut pods = pods_of(cluster, &cluster.namespace, &object).await?;
    if pods.is_empty() {
        bail!("no pods found for {}", resource.reference(&object_name));
    }
    if !args.all_pods {
        if pods.len() > 1 {
            eprintln!("Found {} pods, using pod/{}", pods.len(), name(&pods[0]));
        }
        pods.truncate(1);
    }
    Ok(pods)
}

fn containers(pod: &Value, args: &LogsArgs) -> Result<Vec<String>> {
    if args.all_containers {
        let all = ["/spec/initContainers", "/spec/containers", "/spec/ephemeralContainers"];
        let containers = all.iter().flat_map(|list| items(pod, list));
        return Ok(containers.map(|container| text(container, "/name").to_owned()).collect());
    }
    Ok(vec![default_container(pod, args.container.as_deref(), false)?])
}

fn path(pod: &Value, container: &str, args: &LogsArgs) -> Result<String> {
    let since = match &args.since {
        Some(since) => apimachinery::time::parse_duration(since)?.as_secs().max(1).to_string(),
        None => String::new(),
    };
    let tail = match (args.tail, &args.selector) {
        (Some(tail), _) if tail >= 0 => tail.to_string(),
        // Of many pods only the last lines, unless asked.
        (None, Some(_)) => "10".to_owned(),
        _ => String::new(),
    };
    let flag = |set: bool| if set { "true" } else { "" };
    Ok(with_query(
        &format!("/api/v1/namespaces/{}/pods/{}/log", namespace(pod), name(pod)),
        &[
            ("container", container),
            ("follow", flag(args.follow)),
            ("previous", flag(args.previous)),
            ("timestamps", flag(args.timestamps)),
            ("sinceSeconds", &since),
            ("sinceTime", args.since_time.as_deref().unwrap_or_default()),
            ("tailLines", &tail),
            ("limitBytes", &args.limit_bytes.map(|bytes| bytes.to_string()).unwrap_or_default()),
        ],
    ))
}

async fn show(cluster: &Cluster, log: &Log) -> Result<()> {
    let stream = cluster.stream(&log.path, "*/*").await?;
    if log.prefix.is_empty() { copy(stream).await } else { copy_lines(stream, &log.prefix).await }
}

async fn copy(mut stream: impl AsyncBufRead + Unpin) -> Result<()> {
    let mut output = tokio::io::stdout();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        output.write_all(&buffer[..count]).await?;
        output.flush().await?;
    }
}

/// Whole lines, so that those of several logs do not mix.
async fn copy_lines(mut stream: impl AsyncBufRead + Unpin, prefix: &str) -> Result<()> {
    use futures::AsyncBufReadExt;
    let mut output = tokio::io::stdout();
    loop {
        let mut line = prefix.as_bytes().to_vec();
        let mut limited = (&mut stream).take(LINE_BYTES_MAX as u64);
        if limited.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        output.write_all(&line).await?;
        output.flush().await?;
    }
}
