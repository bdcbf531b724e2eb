//! `create`: objects from files, or made from flags.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::shared::{DryRun, WriteFlags, create, pairs};
use crate::cluster::{Cluster, RequestError, with_query};
use crate::flags::GlobalFlags;
use crate::objects::{FileFlags, namespace};

/// Create a resource from a file or from stdin
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = false, subcommand_negates_reqs = true)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    files: FileFlags,
    #[command(flatten)]
    write: WriteFlags,
    #[command(subcommand)]
    generator: Option<Generator>,
}

#[derive(Debug, Subcommand)]
enum Generator {
    /// Create a deployment with the specified name
    #[command(visible_alias = "deploy")]
    Deployment(DeploymentArgs),
    /// Create a namespace with the specified name
    #[command(visible_alias = "ns")]
    Namespace { name: String },
    /// Create a config map from a local file, directory or literal value
    #[command(visible_alias = "cm")]
    Configmap(DataArgs),
    /// Create a secret
    #[command(subcommand)]
    Secret(SecretKind),
    /// Create a service
    #[command(visible_alias = "svc", subcommand)]
    Service(ServiceKind),
    /// Create a service account with the specified name
    #[command(visible_alias = "sa")]
    Serviceaccount { name: String },
    /// Create a role with single rule
    Role(RoleArgs),
    /// Create a cluster role
    Clusterrole(RoleArgs),
    /// Create a role binding for a particular role or cluster role
    Rolebinding(BindingArgs),
    /// Create a cluster role binding for a particular cluster role
    Clusterrolebinding(BindingArgs),
    /// Request a service account token
    Token(TokenArgs),
    /// Create a job with the specified name
    Job(JobArgs),
}

#[derive(Debug, Args)]
struct DeploymentArgs {
    name: String,
    /// Image name to run; may be repeated
    #[arg(long, required = true, value_delimiter = ',')]
    image: Vec<String>,
    #[arg(short = 'r', long, default_value_t = 1)]
    replicas: i32,
    /// The port that the container exposes
    #[arg(long)]
    port: Option<u16>,
    /// Command of the container
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(Debug, Args)]
struct DataArgs {
    name: String,
    /// KEY=VALUE; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    from_literal: Vec<String>,
    /// [KEY=]FILE, or a directory; may be repeated
    #[arg(long, value_name = "[KEY=]FILE")]
    from_file: Vec<String>,
    /// A file of KEY=VALUE lines; may be repeated
    #[arg(long, value_name = "FILE")]
    from_env_file: Vec<String>,
    /// The type of a secret
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
}

#[derive(Debug, Subcommand)]
enum SecretKind {
    /// Create a secret from a local file, directory, or literal value
    Generic(DataArgs),
    /// Create a TLS secret
    Tls {
        name: String,
        #[arg(long, value_name = "FILE")]
        cert: String,
        #[arg(long, value_name = "FILE")]
        key: String,
    },
    /// Create a secret for use with a Docker registry
    DockerRegistry {
        name: String,
        #[arg(long, default_value = "https://index.docker.io/v1/")]
        docker_server: String,
        #[arg(long)]
        docker_username: String,
        #[arg(long)]
        docker_password: String,
        #[arg(long, default_value = "")]
        docker_email: String,
    },
}

#[derive(Debug, Subcommand)]
enum ServiceKind {
    /// Create a ClusterIP service
    Clusterip {
        #[command(flatten)]
        service: ServiceArgs,
        /// The address; None for a headless service
        #[arg(long)]
        clusterip: Option<String>,
    },
    /// Create a NodePort service
    Nodeport {
        #[command(flatten)]
        service: ServiceArgs,
        #[arg(long)]
        node_port: Option<u16>,
    },
    /// Create a LoadBalancer service
    Loadbalancer {
        #[command(flatten)]
        service: ServiceArgs,
    },
    /// Create an ExternalName service
    Externalname {
        #[command(flatten)]
        service: ServiceArgs,
        #[arg(long)]
        external_name: String,
    },
}

#[derive(Debug, Args)]
struct ServiceArgs {
    name: String,
    /// PORT[:TARGET]; may be repeated
    #[arg(long, value_delimiter = ',', value_name = "PORT[:TARGET]")]
    tcp: Vec<String>,
}

#[derive(Debug, Args)]
struct RoleArgs {
    name: String,
    #[arg(long, value_delimiter = ',')]
    verb: Vec<String>,
    /// RESOURCE[.GROUP][/SUBRESOURCE]; may be repeated
    #[arg(long, value_delimiter = ',')]
    resource: Vec<String>,
    #[arg(long)]
    resource_name: Vec<String>,
    #[arg(long = "non-resource-url", value_delimiter = ',', value_name = "URL")]
    non_resource_urls: Vec<String>,
    /// KEY=VALUE labels of the cluster roles to sum up
    #[arg(long)]
    aggregation_rule: Vec<String>,
}

#[derive(Debug, Args)]
struct BindingArgs {
    name: String,
    #[arg(long)]
    clusterrole: Option<String>,
    #[arg(long)]
    role: Option<String>,
    #[arg(long, value_delimiter = ',')]
    user: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    group: Vec<String>,
    /// NAMESPACE:NAME; may be repeated
    #[arg(long, value_delimiter = ',', value_name = "NAMESPACE:NAME")]
    serviceaccount: Vec<String>,
}

#[derive(Debug, Args)]
struct TokenArgs {
    /// The service account
    name: String,
    #[arg(long)]
    audience: Vec<String>,
    #[arg(long, value_name = "DURATION")]
    duration: Option<String>,
    /// Pod, Secret or Node to which the token is bound
    #[arg(long)]
    bound_object_kind: Option<String>,
    #[arg(long)]
    bound_object_name: Option<String>,
    #[arg(long)]
    bound_object_uid: Option<String>,
}

#[derive(Debug, Args)]
struct JobArgs {
    name: String,
    #[arg(long)]
    image: Option<String>,
    /// cronjob/NAME whose template is taken
    #[arg(long)]
    from: Option<String>,
    #[arg(last = true)]
    command: Vec<String>,
}

pub(crate) async fn run(args: CreateArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    let write = &args.write;
    let object = match args.generator {
        None if args.files.is_empty() => bail!("must specify one of -f and -k"),
        None => return from_files(&cluster, &args.files, write).await,
        Some(Generator::Token(token)) => return request_token(&cluster, &token, write).await,
        Some(Generator::Job(JobArgs { name, from: Some(from), .. })) => job_from(&cluster, &name, &from).await?,
        Some(generator) => {
            let mut object = generate(generator, &cluster)?;
            if is_namespaced(&object) && write.dry_run != DryRun::Client {
                crate::objects::set(&mut object, &["metadata", "namespace"], cluster.namespace.clone().into());
            }
            object
        }
    };
    let word = match crate::objects::kind(&object) {
        "Deployment" => "deployment",
        "ConfigMap" => "configmap",
        "ServiceAccount" => "serviceaccount",
        "Secret" => "secret",
        _ => "",
    };
    // These commands of kubectl's put the server's words into their own.
    create(&cluster, write, object, "created").await.map_err(|error| match RequestError::message_of(&error, 409) {
        Some(message) if !word.is_empty() => anyhow::anyhow!("failed to create {word}: {message}"),
        _ => error,
    })?;
    Ok(ExitCode::SUCCESS)
}

fn is_namespaced(object: &Value) -> bool {
    !matches!(crate::objects::kind(object), "Namespace" | "ClusterRole" | "ClusterRoleBinding")
}

async fn from_files(cluster: &Cluster, files: &FileFlags, write: &WriteFlags) -> Result<ExitCode> {
    let mut failed = false;
    for mut manifest in files.read()? {
        let outcome = async {
            let resource = manifest.locate(cluster).await?;
            if write.save_config {
                super::apply::annotate(&mut manifest.object)?;
            }
            if write.dry_run == DryRun::Client {
                return write.report(manifest.object.clone(), Some(&resource), "created");
            }
            let path = write.query(&resource.collection(Some(namespace(&manifest.object))), "kubectl-create");
            let created = cluster
                .post(&path, &manifest.object)
                .await
                .map_err(|error| RequestError::during(error, &format!("error when creating {:?}", manifest.source)))?;
            write.report(created, Some(&resource), "created")
        };
        if let Err(error) = outcome.await {
            failed = true;
            super::print_error(&error);
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn request_token(cluster: &Cluster, args: &TokenArgs, write: &WriteFlags) -> Result<ExitCode> {
    let mut spec = json!({});
    if !args.audience.is_empty() {
        spec["audiences"] = json!(args.audience);
    }
    if let Some(duration) = &args.duration {
        spec["expirationSeconds"] = json!(apimachinery::time::parse_duration(duration)?.as_secs());
    }
    if let Some(kind) = &args.bound_object_kind {
        spec["boundObjectRef"] = json!({
            "kind": kind, "apiVersion": "v1", "name": args.bound_object_name, "uid": args.bound_object_uid});
    }
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec});
    let path = format!("/api/v1/namespaces/{}/serviceaccounts/{}/token", cluster.namespace, args.name);
    let answer = cluster
        .post(&with_query(&path, &[("dryRun", write.dry_run.parameter())]), &request)
        .await
        .map_err(|error| RequestError::during(error, "failed to create token"))?;
    match &write.output {
        Some(_) => write.report(answer, None, "created")?,
        None => println!("{}", crate::objects::text(&answer, "/status/token")),
    }
    Ok(ExitCode::SUCCESS)
}

async fn job_from(cluster: &Cluster, name: &str, from: &str) -> Result<Value> {
    let (resource, cron_job) = crate::objects::one_object(cluster, &[from.to_owned()], Some("cronjobs")).await?;
    let source = cluster.get(&resource.object(&cluster.namespace, &cron_job)).await?;
    let template = source.pointer("/spec/jobTemplate").cloned().unwrap_or_default();
    let mut annotations = template.pointer("/metadata/annotations").cloned().unwrap_or_else(|| json!({}));
    annotations["cronjob.kubernetes.io/instantiate"] = json!("manual");
    Ok(json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {
            "name": name, "namespace": cluster.namespace, "labels": template.pointer("/metadata/labels"), "annotations": annotations,
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "CronJob", "name": cron_job, "controller": true,
                "uid": source["metadata"]["uid"]}]
        },
        "spec": template["spec"]
    }))
}

fn generate(generator: Generator, cluster: &Cluster) -> Result<Value> {
    Ok(match generator {
        Generator::Deployment(args) => deployment(&args)?,
        Generator::Namespace { name } => json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}),
        Generator::Serviceaccount { name } => {
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
        }
        Generator::Configmap(args) => config_map(&args)?,
        Generator::Secret(kind) => secret(kind)?,
        Generator::Service(kind) => service(kind)?,
        Generator::Role(args) => role("Role", &args)?,
        Generator::Clusterrole(args) => role("ClusterRole", &args)?,
        Generator::Rolebinding(args) => binding("RoleBinding", &args, &cluster.namespace)?,
        Generator::Clusterrolebinding(args) => binding("ClusterRoleBinding", &args, &cluster.namespace)?,
        Generator::Job(args) => job(&args)?,
        Generator::Token(_) => bail!("a token is requested, not made"),
    })
}

/// The container's name that kubectl derives from an image.
fn container_name(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or(image);
    let bare = last.split(['@', ':']).next().unwrap_or(last);
    bare.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c.to_ascii_lowercase() } else { '-' }).collect()
}

fn deployment(args: &DeploymentArgs) -> Result<Value> {
    if args.image.len() > 1 && !args.command.is_empty() {
        bail!("cannot specify multiple --image options and command");
    }
    let labels = json!({"app": args.name});
    let containers: Vec<Value> = args
        .image
        .iter()
        .map(|image| {
            let mut container = json!({"name": container_name(image), "image": image, "resources": {}});
            if let Some(port) = args.port {
                container["ports"] = json!([{"containerPort": port}]);
            }
            if !args.command.is_empty() {
                container["command"] = json!(args.command);
            }
            container
        })
        .collect();
    Ok(json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": args.name, "labels": labels},
        "spec": {
            "replicas": args.replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": containers}}
        }
    }))
}

fn job(args: &JobArgs) -> Result<Value> {
    let Some(image) = &args.image else { bail!("either --image or --from must be specified") };
    let mut container = json!({"name": args.name, "image": image, "resources": {}});
    if !args.command.is_empty() {
        container["command"] = json!(args.command);
    }
    Ok(json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": args.name},
        "spec": {"template": {"spec": {"containers": [container], "restartPolicy": "Never"}}}
    }))
}

/// The data that flags describe, as bytes by key.
fn data(args: &DataArgs) -> Result<Vec<(String, Vec<u8>)>> {
    let mut data: Vec<(String, Vec<u8>)> = Vec::new();
    for literal in &args.from_literal {
        let Some((key, value)) = literal.split_once('=') else {
            bail!("invalid literal source {literal}, expected key=value");
        };
        data.push((key.to_owned(), value.as_bytes().to_vec()));
    }
    for file in &args.from_file {
        let (key, path) = match file.split_once('=') {
            Some((key, path)) => (Some(key), Path::new(path)),
            None => (None, Path::new(file.as_str())),
        };
        let read = |path: &Path| std::fs::read(path).with_context(|| format!("error reading {}", path.display()));
        let base = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if key.is_some() {
                bail!("cannot give a key name for a directory path");
            }
            let mut entries: Vec<_> = std::fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
            entries.sort();
            for entry in entries.into_iter().filter(|entry| entry.is_file()) {
                data.push((base(&entry), read(&entry)?));
            }
        } else {
            data.push((key.map_or_else(|| base(path), str::to_owned), read(path)?));
        }
    }
    for path in &args.from_env_file {
        let text = std::fs::read_to_string(path).with_context(|| format!("error reading {path}"))?;
        for line in text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (key, value) = match line.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None => (line.to_owned(), std::env::var(line).unwrap_or_default()),
            };
            data.push((key, value.into_bytes()));
        }
    }
    for (at, (key, _)) in data.iter().enumerate() {
        if data[..at].iter().any(|(other, _)| other == key) {
            bail!("cannot add key {key:?}, another key by that name already exists");
        }
    }
    Ok(data)
}

fn config_map(args: &DataArgs) -> Result<Value> {
    let (mut texts, mut binaries) = (Map::new(), Map::new());
    for (key, bytes) in data(args)? {
        match String::from_utf8(bytes) {
            Ok(text) => drop(texts.insert(key, text.into())),
            Err(error) => drop(binaries.insert(key, STANDARD.encode(error.into_bytes()).into())),
        }
    }
    let mut object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": args.name}});
    for (field, map) in [("data", texts), ("binaryData", binaries)] {
        if !map.is_empty() {
            object[field] = Value::Object(map);
        }
    }
    Ok(object)
}

fn secret(kind: SecretKind) -> Result<Value> {
    let make = |name: &str, kind: Option<&str>, data: Vec<(String, Vec<u8>)>| {
        let data: Map<String, Value> =
            data.into_iter().map(|(key, bytes)| (key, STANDARD.encode(bytes).into())).collect();
        let mut object = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}});
        if !data.is_empty() {
            object["data"] = Value::Object(data);
        }
        if let Some(kind) = kind {
            object["type"] = json!(kind);
        }
        object
    };
    Ok(match kind {
        SecretKind::Generic(args) => make(&args.name, args.kind.as_deref(), data(&args)?),
        SecretKind::Tls { name, cert, key } => {
            let read = |path: &str| std::fs::read(path).with_context(|| format!("error reading {path}"));
            let data = vec![("tls.crt".to_owned(), read(&cert)?), ("tls.key".to_owned(), read(&key)?)];
            make(&name, Some("kubernetes.io/tls"), data)
        }
        SecretKind::DockerRegistry { name, docker_server, docker_username, docker_password, docker_email } => {
            let auth = STANDARD.encode(format!("{docker_username}:{docker_password}"));
            let config = json!({"auths": {docker_server: {
                "username": docker_username, "password": docker_password, "email": docker_email, "auth": auth}}});
            let data = vec![(".dockerconfigjson".to_owned(), config.to_string().into_bytes())];
            make(&name, Some("kubernetes.io/dockerconfigjson"), data)
        }
    })
}

fn service(kind: ServiceKind) -> Result<Value> {
    let (args, type_name, more) = match kind {
        ServiceKind::Clusterip { service, clusterip } => {
            (service, "ClusterIP", clusterip.map(|ip| ("clusterIP", json!(ip))))
        }
        ServiceKind::Nodeport { service, node_port } => {
            (service, "NodePort", node_port.map(|port| ("nodePort", json!(port))))
        }
        ServiceKind::Loadbalancer { service } => (service, "LoadBalancer", None),
        ServiceKind::Externalname { service, external_name } => {
            (service, "ExternalName", Some(("externalName", json!(external_name))))
        }
    };
    let mut ports = Vec::new();
    for text in &args.tcp {
        let (port, target) = text.split_once(':').unwrap_or((text, text));
        let number: u16 = port.parse().with_context(|| format!("invalid port {text:?}, expected PORT[:TARGET]"))?;
        let target = target.parse::<u16>().map_or_else(|_| json!(target), |number| json!(number));
        ports.push(json!({"name": text.replace(':', "-"), "port": number, "protocol": "TCP", "targetPort": target}));
    }
    let headless = matches!(&more, Some(("clusterIP", value)) if value == "None");
    if ports.is_empty() && type_name != "ExternalName" && !headless {
        bail!("at least one tcp port specifier must be provided");
    }
    let labels = json!({"app": args.name});
    let mut spec = json!({"type": type_name, "selector": labels});
    if !ports.is_empty() {
        spec["ports"] = json!(ports);
    }
    match more {
        Some(("nodePort", port)) => spec["ports"][0]["nodePort"] = port,
        Some((field, value)) => spec[field] = value,
        None => {}
    }
    Ok(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": args.name, "labels": labels}, "spec": spec}))
}

fn role(kind: &str, args: &RoleArgs) -> Result<Value> {
    let mut object = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": args.name}, "rules": []});
    if !args.aggregation_rule.is_empty() {
        object["aggregationRule"] = json!({"clusterRoleSelectors": [{"matchLabels": pairs(&args.aggregation_rule)?}]});
        return Ok(object);
    }
    if args.verb.is_empty() {
        bail!("at least one verb must be specified");
    }
    if args.resource.is_empty() && args.non_resource_urls.is_empty() {
        bail!("at least one resource must be specified");
    }
    // Resources of one group share a rule.
    let mut groups: Vec<(String, Vec<String>)> = Vec::new();
    for resource in &args.resource {
        let (with_group, subresource) = match resource.split_once('/') {
            Some((resource, subresource)) => (resource, Some(subresource)),
            None => (resource.as_str(), None),
        };
        let (name, group) = with_group.split_once('.').unwrap_or((with_group, ""));
        let group = match group {
            "" => apimachinery::facts::kinds()
                .iter()
                .find(|kind| kind.resource == name || kind.singular == name || kind.short_names.contains(&name))
                .map_or("", |kind| kind.group),
            given => given,
        };
        let known = apimachinery::facts::kinds().iter().find(|kind| {
            kind.group == group && (kind.resource == name || kind.singular == name || kind.short_names.contains(&name))
        });
        let plural = known.map_or(name, |kind| kind.resource);
        let full = subresource.map_or_else(|| plural.to_owned(), |subresource| format!("{plural}/{subresource}"));
        match groups.iter_mut().find(|(known, _)| known == group) {
            Some((_, resources)) => resources.push(full),
            None => groups.push((group.to_owned(), vec![full])),
        }
    }
    let mut rules: Vec<Value> = Vec::new();
    for (group, resources) in groups {
        let mut rule = json!({"verbs": args.verb, "apiGroups": [group], "resources": resources});
        if !args.resource_name.is_empty() {
            rule["resourceNames"] = json!(args.resource_name);
        }
        rules.push(rule);
    }
    if !args.non_resource_urls.is_empty() {
        rules.push(json!({"verbs": args.verb, "nonResourceURLs": args.non_resource_urls}));
    }
    object["rules"] = json!(rules);
    Ok(object)
}

fn binding(kind: &str, args: &BindingArgs, in_namespace: &str) -> Result<Value> {
    let (role_kind, role) = match (&args.clusterrole, &args.role) {
        (Some(role), None) => ("ClusterRole", role),
        (None, Some(role)) if kind == "RoleBinding" => ("Role", role),
        _ => bail!("exactly one of clusterrole or role must be specified"),
    };
    let mut subjects: Vec<Value> = Vec::new();
    for (subject_kind, names) in [("User", &args.user), ("Group", &args.group)] {
        subjects.extend(
            names
                .iter()
                .map(|name| json!({"kind": subject_kind, "apiGroup": "rbac.authorization.k8s.io", "name": name})),
        );
    }
    for account in &args.serviceaccount {
        let Some((namespace, name)) = account.split_once(':').filter(|(_, name)| !name.is_empty()) else {
            bail!("serviceaccount must be <namespace>:<name>");
        };
        let namespace = if namespace.is_empty() { in_namespace } else { namespace };
        subjects.push(json!({"kind": "ServiceAccount", "namespace": namespace, "name": name}));
    }
    Ok(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": args.name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role_kind, "name": role},
        "subjects": subjects
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_name_their_containers() {
        for (image, expected) in
            [("nginx", "nginx"), ("host:5000/a/My_App:1.2", "my-app"), ("busybox@sha256:0", "busybox")]
        {
            assert_eq!(container_name(image), expected);
        }
    }

    #[test]
    fn roles_group_their_resources() {
        let args = RoleArgs {
            name: "r".into(),
            verb: vec!["get".into()],
            resource: vec!["po".into(), "deployments".into(), "services/proxy".into(), "widgets.example.com".into()],
            resource_name: vec![],
            non_resource_urls: vec![],
            aggregation_rule: vec![],
        };
        let rules = role("Role", &args).expect("role")["rules"].clone();
        assert_eq!(
            rules,
            json!([
                {"verbs": ["get"], "apiGroups": [""], "resources": ["pods", "services/proxy"]},
                {"verbs": ["get"], "apiGroups": ["apps"], "resources": ["deployments"]},
                {"verbs": ["get"], "apiGroups": ["example.com"], "resources": ["widgets"]},
            ])
        );
    }

    #[test]
    fn data_comes_from_literals_and_files() {
        let directory = tempfile::tempdir().expect("directory");
        let file = directory.path().join("f.txt");
        std::fs::write(&file, "text").expect("file");
        let args = DataArgs {
            name: "c".into(),
            from_literal: vec!["a=b=c".into()],
            from_file: vec![file.display().to_string(), format!("key={}", file.display())],
            from_env_file: vec![],
            kind: None,
        };
        assert_eq!(config_map(&args).expect("config map")["data"], json!({"a": "b=c", "f.txt": "text", "key": "text"}));
        let double = DataArgs { from_literal: vec!["a=1".into(), "a=2".into()], from_file: vec![], ..args };
        assert!(config_map(&double).is_err());
    }
}
