//! `expose`: a Service before the pods of a workload.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Map, Value, json};

use super::shared::{WriteFlags, create, fetch, pairs};
use crate::cluster::Cluster;
use crate::flags::GlobalFlags;
use crate::objects::{items, kind, name, targets};

/// Take a replication controller, service, deployment or pod and expose it as a new Kubernetes service
#[derive(Debug, Args)]
pub(crate) struct ExposeArgs {
    words: Vec<String>,
    #[command(flatten)]
    write: WriteFlags,
    /// The Service's port; several by commas. Without it those of the containers
    #[arg(long, value_delimiter = ',')]
    port: Vec<u16>,
    /// The containers' port, by number or name
    #[arg(long)]
    target_port: Option<String>,
    /// TCP, UDP or SCTP
    #[arg(long)]
    protocol: Option<String>,
    /// ClusterIP, NodePort, LoadBalancer or ExternalName
    #[arg(long = "type")]
    kind: Option<String>,
    /// The Service's name, if not that of the object
    #[arg(long)]
    name: Option<String>,
    /// The address; None for a headless Service
    #[arg(long)]
    cluster_ip: Option<String>,
    #[arg(long, value_delimiter = ',')]
    external_ip: Vec<String>,
    /// Labels of the Service
    #[arg(short = 'l', long)]
    labels: Vec<String>,
    /// Labels of the pods, if not those that the object selects
    #[arg(long)]
    selector: Vec<String>,
    /// None or ClientIP
    #[arg(long)]
    session_affinity: Option<String>,
}

pub(crate) async fn run(args: ExposeArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    for found in fetch(&cluster, targets(&cluster, &args.words).await?, &Default::default(), false, false).await? {
        create(&cluster, &args.write, service(&args, &found.object)?, "exposed").await?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The labels by which the object's pods are found.
fn selector(object: &Value) -> Result<Value> {
    if kind(object) == "Pod" {
        return match object.pointer("/metadata/labels") {
            Some(labels) => Ok(labels.clone()),
            None => bail!(
                "couldn't retrieve selectors via --selector flag or introspection: the pod has no labels and cannot be exposed"
            ),
        };
    }
    if !items(object, "/spec/selector/matchExpressions").is_empty() {
        bail!("couldn't convert expressions - \"matchExpressions\" to map-based selector format");
    }
    let labels = object.pointer("/spec/selector/matchLabels").or_else(|| object.pointer("/spec/selector"));
    match labels.filter(|labels| labels.as_object().is_some_and(|labels| !labels.is_empty())) {
        Some(labels) => Ok(labels.clone()),
        None => {
            bail!("couldn't retrieve selectors via --selector flag or introspection: cannot expose a {}", kind(object))
        }
    }
}

/// Port and protocol of each port that the object's containers (or a Service) show.
fn ports_of(object: &Value) -> Vec<(u64, String)> {
    let containers = match kind(object) {
        "Pod" => items(object, "/spec/containers"),
        _ => items(object, "/spec/template/spec/containers"),
    };
    let of_service = items(object, "/spec/ports").iter().map(|port| (port, "port"));
    let of_containers = containers.iter().flat_map(|c| items(c, "/ports")).map(|port| (port, "containerPort"));
    of_containers
        .chain(of_service)
        .filter_map(|(port, field)| {
            Some((port[field].as_u64()?, port["protocol"].as_str().unwrap_or("TCP").to_owned()))
        })
        .collect()
}

fn service(args: &ExposeArgs, object: &Value) -> Result<Value> {
    let selector = if args.selector.is_empty() { selector(object)? } else { Value::Object(pairs(&args.selector)?) };
    let known = ports_of(object);
    let wanted: Vec<u64> = match args.port.as_slice() {
        [] => known.iter().map(|(port, _)| *port).collect(),
        ports => ports.iter().map(|port| u64::from(*port)).collect(),
    };
    let headless = args.cluster_ip.as_deref() == Some("None");
    if wanted.is_empty() && !headless {
        bail!("couldn't find port via --port flag or introspection");
    }
    let protocol_of = |port: u64| {
        let introspected = known.iter().find(|(known, _)| *known == port).map(|(_, protocol)| protocol.clone());
        args.protocol.clone().or(introspected).unwrap_or_else(|| "TCP".to_owned())
    };
    let many = wanted.len() > 1;
    let ports: Vec<Value> = wanted
        .iter()
        .enumerate()
        .map(|(number, port)| {
            let target = match args.target_port.as_deref() {
                Some(target) => target.parse::<u16>().map_or_else(|_| json!(target), |number| json!(number)),
                None => json!(port),
            };
            let mut entry = Map::new();
            entry.insert("port".into(), json!(port));
            entry.insert("protocol".into(), json!(protocol_of(*port)));
            entry.insert("targetPort".into(), target);
            if many {
                entry.insert("name".into(), json!(format!("port-{}", number + 1)));
            }
            Value::Object(entry)
        })
        .collect();
    let labels = match args.labels.as_slice() {
        [] => object.pointer("/metadata/labels").cloned().unwrap_or(Value::Null),
        given => Value::Object(pairs(given)?),
    };
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": args.name.as_deref().unwrap_or_else(|| name(object))},
        "spec": {"selector": selector}
    });
    if !labels.is_null() {
        service["metadata"]["labels"] = labels;
    }
    if !ports.is_empty() {
        service["spec"]["ports"] = json!(ports);
    }
    let texts = [("type", &args.kind), ("clusterIP", &args.cluster_ip), ("sessionAffinity", &args.session_affinity)];
    for (field, value) in texts {
        if let Some(value) = value {
            service["spec"][field] = json!(value);
        }
    }
    if !args.external_ip.is_empty() {
        service["spec"]["externalIPs"] = json!(args.external_ip);
    }
    Ok(service)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ExposeArgs,
    }

    fn exposed(line: &str, object: &Value) -> Result<Value> {
        service(&Line::parse_from(std::iter::once("expose").chain(line.split_whitespace())).args, object)
    }

    #[test]
    fn a_deployment_is_exposed_by_its_selector() {
        let deployment = json!({
            "kind": "Deployment", "metadata": {"name": "web", "labels": {"app": "web"}},
            "spec": {"selector": {"matchLabels": {"app": "web"}},
                "template": {"spec": {"containers": [{"ports": [{"containerPort": 8080}]}]}}}
        });
        let made = exposed("deploy web --port=80 --target-port=8080 --type=NodePort", &deployment).expect("service");
        assert_eq!(
            made,
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "labels": {"app": "web"}},
                "spec": {"selector": {"app": "web"}, "type": "NodePort",
                    "ports": [{"port": 80, "protocol": "TCP", "targetPort": 8080}]}
            })
        );
        assert_eq!(exposed("deploy web", &deployment).expect("service")["spec"]["ports"][0]["port"], 8080);
        let mut bare = deployment;
        bare["spec"]["template"]["spec"]["containers"] = json!([{}]);
        assert!(exposed("deploy web", &bare).is_err());
    }
}
