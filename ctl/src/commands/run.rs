//! `run`: a pod from an image; with `--replicas` a Deployment.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};

use super::shared::{DryRun, WriteFlags, create, pairs, until, within};
use super::streams::{self, Streams};
use crate::cluster::Cluster;
use crate::flags::GlobalFlags;
use crate::objects::{items, text};

/// How long a container that was attached to may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Create and run a particular image in a pod, or with --replicas in a deployment
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    name: String,
    #[arg(long)]
    image: String,
    /// Make a Deployment of so many pods, labelled app=NAME
    #[arg(short = 'r', long)]
    replicas: Option<i32>,
    /// The port that the container exposes
    #[arg(long)]
    port: Option<u16>,
    /// Create a ClusterIP service for the port as well
    #[arg(long, requires = "port")]
    expose: bool,
    /// NAME=VALUE; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Comma separated labels, instead of run=NAME or app=NAME
    #[arg(short = 'l', long)]
    labels: Vec<String>,
    #[arg(long)]
    annotations: Vec<String>,
    /// Always, OnFailure or Never
    #[arg(long, default_value = "Always")]
    restart: String,
    /// Always, IfNotPresent or Never
    #[arg(long)]
    image_pull_policy: Option<String>,
    /// Take the arguments behind -- as the command, not as its arguments
    #[arg(long)]
    command: bool,
    /// JSON that is merged into the object
    #[arg(long)]
    overrides: Option<String>,
    /// Keep standard input open
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Allocate a terminal
    #[arg(short = 't', long)]
    tty: bool,
    /// Attach to the container once it runs
    #[arg(long)]
    attach: bool,
    /// Delete the pod afterwards
    #[arg(long)]
    rm: bool,
    #[arg(short = 'q', long)]
    quiet: bool,
    /// How long to wait for the pod to run
    #[arg(long, value_name = "DURATION", default_value = "1m")]
    pod_running_timeout: String,
    #[command(flatten)]
    write: WriteFlags,
    /// Arguments (or with --command the command) of the container
    #[arg(last = true)]
    arguments: Vec<String>,
}

pub(crate) async fn run(args: RunArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let attach = args.attach || args.stdin || args.tty;
    if args.rm && !attach {
        bail!("--rm should only be used for attached containers");
    }
    if args.replicas.is_some() && attach {
        bail!("--replicas makes a Deployment, which cannot be attached to");
    }
    let mut object = object(&args)?;
    if let Some(overrides) = &args.overrides {
        apimachinery::patch::merge(&mut object, &serde_json::from_str(overrides)?);
    }
    let cluster = Cluster::connect(flags).await?;
    let quiet_report = args.quiet || args.rm;
    if attach && quiet_report && args.write.dry_run == DryRun::None {
        let path = args.write.query(&format!("/api/v1/namespaces/{}/pods", cluster.namespace), "kubectl-run");
        cluster.post(&path, &object).await?;
    } else {
        create(&cluster, &args.write, object, "created").await?;
    }
    if args.expose {
        create(&cluster, &args.write, service(&args)?, "created").await?;
    }
    if !attach || args.write.dry_run != DryRun::None {
        return Ok(ExitCode::SUCCESS);
    }
    let outcome = attached(&cluster, &args).await;
    if args.rm {
        let path = format!("/api/v1/namespaces/{}/pods/{}", cluster.namespace, args.name);
        cluster.delete(&path, &json!({})).await?;
        if !args.quiet {
            println!("pod {:?} deleted from {} namespace", args.name, cluster.namespace);
        }
    }
    outcome
}

fn labels(args: &RunArgs) -> Result<Value> {
    if args.labels.is_empty() {
        let key = if args.replicas.is_some() { "app" } else { "run" };
        return Ok(json!({key: args.name}));
    }
    Ok(Value::Object(pairs(&args.labels)?))
}

/// The pod or the Deployment.
fn object(args: &RunArgs) -> Result<Value> {
    if !["Always", "OnFailure", "Never"].contains(&args.restart.as_str()) {
        bail!("invalid restart policy: {}", args.restart);
    }
    let mut container = json!({"name": args.name, "image": args.image, "resources": {}});
    if !args.arguments.is_empty() {
        container[if args.command { "command" } else { "args" }] = json!(args.arguments);
    }
    if let Some(port) = args.port {
        container["ports"] = json!([{"containerPort": port}]);
    }
    if let Some(policy) = &args.image_pull_policy {
        container["imagePullPolicy"] = json!(policy);
    }
    if !args.env.is_empty() {
        let mut env = Vec::new();
        for pair in &args.env {
            let Some((name, value)) = pair.split_once('=').filter(|(name, _)| !name.is_empty()) else {
                bail!("invalid env: {pair}");
            };
            env.push(json!({"name": name, "value": value}));
        }
        container["env"] = json!(env);
    }
    if args.stdin {
        container["stdin"] = json!(true);
        container["stdinOnce"] = json!(true);
    }
    if args.tty {
        container["tty"] = json!(true);
    }
    let labels = labels(args)?;
    let mut metadata = json!({"name": args.name, "labels": labels});
    if !args.annotations.is_empty() {
        metadata["annotations"] = Value::Object(pairs(&args.annotations)?);
    }
    let Some(replicas) = args.replicas else {
        return Ok(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
            "spec": {"containers": [container], "restartPolicy": args.restart, "dnsPolicy": "ClusterFirst"}
        }));
    };
    if args.restart != "Always" {
        bail!("--replicas makes a Deployment, whose pods restart always");
    }
    Ok(json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata,
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
        }
    }))
}

fn service(args: &RunArgs) -> Result<Value> {
    let port = args.port.unwrap_or_default();
    Ok(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": args.name},
        "spec": {"selector": labels(args)?, "ports": [{"port": port, "protocol": "TCP", "targetPort": port}]}
    }))
}

/// Waits for the pod, attaches to it, and ends as its container ended.
async fn attached(cluster: &Cluster, args: &RunArgs) -> Result<ExitCode> {
    let limit = apimachinery::time::parse_duration(&args.pod_running_timeout)?;
    let pod = within(Some(limit), "", phase(cluster, &args.name, &["Running", "Succeeded", "Failed"])).await?;
    let interactive = Streams { stdin: args.stdin, tty: args.tty };
    if text(&pod, "/status/phase") == "Running" {
        if args.tty && !args.quiet {
            eprintln!("If you don't see a command prompt, try pressing enter.");
        }
        if let Err(error) = streams::attach(cluster, &args.name, &args.name, interactive).await {
            // The container may have ended before anybody could attach to it: what it wrote is kept.
            let path = format!("/api/v1/namespaces/{}/pods/{}", cluster.namespace, args.name);
            let pod = cluster.get(&path).await?;
            let ended = |status: &Value| status.pointer("/state/terminated").is_some();
            let phase = text(&pod, "/status/phase");
            if phase == "Running" && !items(&pod, "/status/containerStatuses").iter().any(ended) {
                return Err(error);
            }
            print_log(cluster, args).await?;
        }
    } else {
        print_log(cluster, args).await?;
    }
    if args.restart == "Always" {
        return Ok(ExitCode::SUCCESS);
    }
    let ended = within(Some(END_TIMEOUT), "", phase(cluster, &args.name, &["Succeeded", "Failed"])).await;
    let code = ended.ok().and_then(|pod| {
        let statuses = items(&pod, "/status/containerStatuses").iter();
        statuses.filter_map(|status| status.pointer("/state/terminated/exitCode")?.as_u64()).next()
    });
    Ok(ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(0)))
}

async fn print_log(cluster: &Cluster, args: &RunArgs) -> Result<()> {
    let path = format!("/api/v1/namespaces/{}/pods/{}/log", cluster.namespace, args.name);
    print!("{}", cluster.get_text(&path).await?);
    Ok(())
}

/// Waits until the pod is in one of the phases.
async fn phase(cluster: &Cluster, name: &str, phases: &[&str]) -> Result<Value> {
    let pods = cluster.resource("pods").await?;
    let pod = cluster.get(&pods.object(&cluster.namespace, name)).await?;
    let found = until(cluster, &pods, pod, |pod| Ok(phases.contains(&text(pod, "/status/phase")))).await?;
    found.ok_or_else(|| anyhow::anyhow!("pod {name} was deleted"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: RunArgs,
    }

    fn made(line: &str) -> Value {
        let line = Line::parse_from(std::iter::once("run").chain(line.split_whitespace()));
        object(&line.args).expect("object")
    }

    #[test]
    fn an_image_becomes_a_pod() {
        assert_eq!(
            made("web --image=nginx --port=80 --env=A=b --restart=Never -- -c x"),
            json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "labels": {"run": "web"}},
                "spec": {
                    "containers": [{"name": "web", "image": "nginx", "resources": {}, "args": ["-c", "x"],
                        "ports": [{"containerPort": 80}], "env": [{"name": "A", "value": "b"}]}],
                    "restartPolicy": "Never", "dnsPolicy": "ClusterFirst"
                }
            })
        );
        assert_eq!(made("web --image=nginx --command -- sh")["spec"]["containers"][0]["command"], json!(["sh"]));
    }

    #[test]
    fn replicas_make_a_deployment() {
        let made = made("httpd-app --image=httpd --replicas=2");
        assert_eq!(made["kind"], "Deployment");
        assert_eq!(made["spec"]["replicas"], 2);
        assert_eq!(made["spec"]["selector"]["matchLabels"], json!({"app": "httpd-app"}));
        assert_eq!(made["spec"]["template"]["metadata"]["labels"], json!({"app": "httpd-app"}));
    }
}
