//! `cluster-info` and `version`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use crate::cluster::{Cluster, with_query};
use crate::flags::GlobalFlags;
use crate::objects::{items, name, namespace, number, text};
use crate::output::json_text;

/// The version of Kubernetes whose API this command line speaks.
const KUBERNETES_VERSION: &str = "v1.36.0";

/// Print the client and server version information
#[derive(Debug, Args)]
pub(crate) struct VersionArgs {
    /// Only of this program
    #[arg(long)]
    client: bool,
    /// json or yaml
    #[arg(short = 'o', long)]
    output: Option<String>,
}

pub(crate) async fn cluster_info(flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    let path = with_query(
        "/api/v1/namespaces/kube-system/services",
        &[("labelSelector", "kubernetes.io/cluster-service=true")],
    );
    let services = cluster.get(&path).await?;
    let server = cluster.server();
    println!("Kubernetes control plane is running at {server}");
    for service in items(&services, "/items") {
        let label = service.pointer("/metadata/labels/kubernetes.io~1name").and_then(Value::as_str);
        let port = match items(service, "/spec/ports").first() {
            Some(port) if !text(port, "/name").is_empty() => format!(":{}", text(port, "/name")),
            Some(port) if number(port, "/port") == 443 => format!(":{}", number(port, "/port")),
            _ => String::new(),
        };
        let (place, object) = (namespace(service), name(service));
        println!(
            "{} is running at {server}/api/v1/namespaces/{place}/services/{object}{port}/proxy",
            label.unwrap_or(object)
        );
    }
    println!("\nTo further debug and diagnose cluster problems, use 'kubectl cluster-info dump'.");
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn version(args: VersionArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let client = json!({
        "gitVersion": format!("{KUBERNETES_VERSION}+pilothouse.{}", env!("CARGO_PKG_VERSION")),
        "platform": format!("{}/{}", std::env::consts::OS, platform()),
    });
    let mut all = json!({"clientVersion": client});
    let mut failure = None;
    if !args.client {
        match Cluster::connect(flags).await?.get("/version").await {
            Ok(server) => all["serverVersion"] = server,
            Err(error) => failure = Some(error),
        }
    }
    match args.output.as_deref() {
        Some("json") => print!("{}", json_text(&all)?),
        Some("yaml") => print!("{}", apimachinery::yaml::to_string(&all)?),
        Some(_) => anyhow::bail!("--output must be 'yaml' or 'json'"),
        None => {
            println!("Client Version: {}", text(&all, "/clientVersion/gitVersion"));
            if all.get("serverVersion").is_some() {
                println!("Server Version: {}", text(&all, "/serverVersion/gitVersion"));
            }
        }
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(ExitCode::SUCCESS),
    }
}

fn platform() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
