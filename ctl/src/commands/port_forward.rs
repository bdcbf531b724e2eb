//! `port-forward`: local ports that lead to a pod.

use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use serde_json::Value;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::shared::pods_of;
use crate::cluster::Cluster;
use crate::flags::GlobalFlags;
use crate::objects::{items, name, number, one_object, text};

/// Forward one or more local ports to a pod
#[derive(Debug, Args)]
pub(crate) struct PortForwardArgs {
    /// POD or TYPE/NAME
    target: String,
    /// [LOCAL:]REMOTE; without LOCAL the same, with an empty LOCAL any that is free
    #[arg(required = true, value_name = "[LOCAL:]REMOTE")]
    ports: Vec<String>,
    /// Local addresses to listen on
    #[arg(long, value_delimiter = ',', default_value = "localhost")]
    address: Vec<String>,
    /// Accepted for kubectl's sake
    #[arg(long, hide = true)]
    pod_running_timeout: Option<String>,
}

pub(crate) async fn run(args: PortForwardArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    let (resource, object_name) = one_object(&cluster, std::slice::from_ref(&args.target), Some("pods")).await?;
    let object = cluster.get(&resource.object(&cluster.namespace, &object_name)).await?;
    let is_service = resource.name == "services" && resource.group.is_empty();
    let pod = if resource.name == "pods" && resource.group.is_empty() {
        object.clone()
    } else {
        match pods_of(&cluster, &cluster.namespace, &object).await?.into_iter().next() {
            Some(pod) => pod,
            None => bail!("no pods found for {}", resource.reference(&object_name)),
        }
    };
    if text(&pod, "/status/phase") != "Running" {
        bail!("unable to forward port because pod is not running. Current status={}", text(&pod, "/status/phase"));
    }
    let pods: Api<Pod> = Api::namespaced(cluster.upgradable()?, &cluster.namespace);
    let mut listeners = JoinSet::new();
    for port in &args.ports {
        let (local, remote) = parse(port, &pod, is_service.then_some(&object))?;
        for address in addresses(&args.address)? {
            let listener = match TcpListener::bind((address, local)).await {
                Ok(listener) => listener,
                // `localhost` means both families; one may be missing.
                Err(_) if address.is_ipv6() && args.address == ["localhost"] => continue,
                Err(error) => return Err(error).with_context(|| format!("unable to listen on {address}:{local}")),
            };
            println!("Forwarding from {} -> {remote}", listener.local_addr()?);
            listeners.spawn(accept(listener, pods.clone(), name(&pod).to_owned(), remote));
        }
    }
    while let Some(ended) = listeners.join_next().await {
        ended??;
    }
    Ok(ExitCode::SUCCESS)
}

fn addresses(texts: &[String]) -> Result<Vec<IpAddr>> {
    let mut addresses = Vec::new();
    for text in texts {
        match text.as_str() {
            "localhost" => addresses.extend([IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])]),
            other => addresses.push(other.parse().with_context(|| format!("{other} is not a valid IP"))?),
        }
    }
    Ok(addresses)
}

/// The local port and the pod's.
fn parse(words: &str, pod: &Value, service: Option<&Value>) -> Result<(u16, u16)> {
    let (local, remote) = match words.split_once(':') {
        Some((local, remote)) => (Some(local), remote),
        None => (None, words),
    };
    let number_of = |words: &str| words.parse::<u16>().ok();
    let wanted = match service {
        // A Service's port is that of its pods behind it.
        Some(service) => {
            let port = items(service, "/spec/ports").iter().find(|port| {
                text(port, "/name") == remote
                    || number_of(remote).is_some_and(|number_| number(port, "/port") == i64::from(number_))
            });
            let Some(port) = port else { bail!("Service {} does not have a service port {remote}", name(service)) };
            match &port["targetPort"] {
                Value::String(named) => named.clone(),
                Value::Number(number) => number.to_string(),
                _ => number(port, "/port").to_string(),
            }
        }
        None => remote.to_owned(),
    };
    let remote_port = match number_of(&wanted) {
        Some(port) => port,
        None => {
            let ports = items(pod, "/spec/containers").iter().flat_map(|container| items(container, "/ports"));
            let named =
                ports.filter(|port| text(port, "/name") == wanted).map(|port| number(port, "/containerPort")).next();
            match named.and_then(|port| u16::try_from(port).ok()) {
                Some(port) => port,
                None => bail!("Pod '{}' does not have a named port '{wanted}'", name(pod)),
            }
        }
    };
    if remote_port == 0 {
        bail!("remote port must be > 0");
    }
    let local_port = match local {
        Some("") => 0,
        Some(local) => number_of(local).with_context(|| format!("error parsing local port '{local}'"))?,
        None => number_of(remote).unwrap_or(remote_port),
    };
    Ok((local_port, remote_port))
}

async fn accept(listener: TcpListener, pods: Api<Pod>, pod: String, remote: u16) -> Result<()> {
    let local = listener.local_addr()?.port();
    loop {
        let (connection, _) = listener.accept().await?;
        println!("Handling connection for {local}");
        let (pods, pod) = (pods.clone(), pod.clone());
        tokio::spawn(async move {
            if let Err(error) = forward(connection, &pods, &pod, remote).await {
                eprintln!("error: an error occurred forwarding {local} -> {remote}: {error:#}");
            }
        });
    }
}

async fn forward(mut connection: TcpStream, pods: &Api<Pod>, pod: &str, remote: u16) -> Result<()> {
    let mut forwarder = pods.portforward(pod, &[remote]).await?;
    let Some(mut stream) = forwarder.take_stream(remote) else { bail!("the port was not forwarded") };
    let failed = forwarder.take_error(remote);
    // Either side may hang up first; that is no failure.
    let _ = copy_bidirectional(&mut connection, &mut stream).await;
    drop(stream);
    forwarder.abort();
    if let Some(failed) = failed
        && let Some(message) = tokio::time::timeout(std::time::Duration::from_millis(100), failed).await.ok().flatten()
    {
        bail!("{message}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ports_are_numbers_or_names() {
        let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]}});
        let service =
            json!({"metadata": {"name": "s"}, "spec": {"ports": [{"name": "web", "port": 80, "targetPort": "http"}]}});
        for (text, service, expected) in [
            ("8080", None, Some((8080, 8080))),
            ("9000:http", None, Some((9000, 8080))),
            (":8080", None, Some((0, 8080))),
            ("http", None, Some((8080, 8080))),
            ("nonsense", None, None),
            ("x:80", None, None),
            ("80", Some(&service), Some((80, 8080))),
            ("9000:web", Some(&service), Some((9000, 8080))),
            ("81", Some(&service), None),
        ] {
            assert_eq!(parse(text, &pod, service).ok(), expected, "{text}");
        }
    }
}
