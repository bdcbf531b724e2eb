//! The scheduler in a cluster: pods per second, CPU per pod, memory; and Deployments from their creation to their last pod,
//! on hollow nodes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use component_base::client;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::Request;
use kube::Client;
use serde_json::{Value, json};

use super::{Load, node};
use crate::table;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only the decision, without a cluster
    #[arg(long)]
    pub decisions: bool,
    /// Where apiserver, scheduler, controller-manager and kubelet are (default: beside this program)
    #[arg(long)]
    binaries: Option<PathBuf>,
    /// How many nodes there are; several numbers, several runs
    #[arg(long, value_delimiter = ',', default_value = "1000,5000")]
    nodes: Vec<usize>,
    #[arg(long, default_value_t = 10_000)]
    pods: usize,
    /// Only this load
    #[arg(long)]
    load: Option<Load>,
    /// Instead: 100 Deployments on so many hollow nodes, and a rolling update of them
    #[arg(long, value_name = "NODES")]
    deployments: Option<usize>,
    /// Pods of each of those Deployments
    #[arg(long, default_value_t = 10)]
    replicas: usize,
    /// Without the rolling update of those Deployments
    #[arg(long)]
    creation_only: bool,
}

const TOKEN: &str = "bench";
const CLIENTS: usize = 32;
const START_WITHIN: Duration = Duration::from_secs(120);
const DONE_WITHIN: Duration = Duration::from_secs(900);
const POLL: Duration = Duration::from_millis(20);
const PREEMPTORS: usize = 500;
const DEPLOYMENTS: usize = 100;
/// Clock ticks of `/proc/PID/stat` per second.
const TICKS: f64 = 100.0;

/// Runs what is asked for and prints a table.
pub fn run(options: Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        if let Some(nodes) = options.deployments {
            return deployments(&options, nodes).await;
        }
        let mut rows = Vec::new();
        for load in Load::ALL.into_iter().filter(|load| options.load.is_none_or(|only| only == *load)) {
            for nodes in &options.nodes {
                rows.push(measure(&options, load, *nodes).await.with_context(|| format!("{load:?}, {nodes} nodes"))?);
            }
        }
        table::print(&["load", "nodes", "pods", "pods per second", "CPU ms per pod", "MB idle", "MB then"], &rows);
        Ok(())
    })
}

/// etcd, the apiserver and what else is started, for one run.
struct Cluster {
    client: Client,
    directory: PathBuf,
    binaries: PathBuf,
    processes: Vec<Child>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            _ = process.kill();
            _ = process.wait();
        }
        _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// What a process has used so far.
struct Usage {
    cpu_seconds: f64,
    memory_mb: f64,
}

fn usage(process: u32) -> anyhow::Result<Usage> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let resident =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
    let memory_mb = resident.unwrap_or(0.0) / 1e3;
    Ok(Usage { cpu_seconds: (ticks(11) + ticks(12)) / TICKS, memory_mb })
}

fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl Cluster {
    async fn start(options: &Options) -> anyhow::Result<Cluster> {
        let beside = std::env::current_exe()?.parent().map(PathBuf::from).context("the path of this program")?;
        let binaries = options.binaries.clone().unwrap_or(beside);
        let directory = std::env::temp_dir().join(format!("bench-scheduler-{}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        let (port, client_port, peer_port) = (free_port()?, free_port()?, free_port()?);
        let path = |name: &str| directory.join(name).display().to_string();
        std::fs::write(path("tokens"), format!("{TOKEN},admin,admin,\"system:masters\"\n"))?;
        let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("https://127.0.0.1:{port}"), "insecure-skip-tls-verify": true}}],
            "users": [{"name": "c", "user": {"token": TOKEN}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}]});
        std::fs::write(path("kubeconfig"), config.to_string())?;
        let client = client::connect(client::load(Some(Path::new(&path("kubeconfig")))).await?, "bench")?;
        let mut cluster = Cluster { client, directory: directory.clone(), binaries, processes: Vec::new() };
        let (etcd, peer) = (format!("http://127.0.0.1:{client_port}"), format!("http://127.0.0.1:{peer_port}"));
        cluster.spawn(
            Path::new("etcd"),
            &[
                format!("--data-dir={}", path("etcd")),
                format!("--listen-client-urls={etcd}"),
                format!("--advertise-client-urls={etcd}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster=default={peer}"),
                "--unsafe-no-fsync".to_owned(),
            ],
        )?;
        cluster.program(
            "apiserver",
            &[
                format!("--etcd-servers={etcd}"),
                "--bind-address=127.0.0.1".to_owned(),
                format!("--secure-port={port}"),
                format!("--cert-dir={}", path("certs")),
                format!("--token-auth-file={}", path("tokens")),
                "--authorization-mode=RBAC".to_owned(),
                "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition,Priority".to_owned(),
            ],
        )?;
        cluster
            .until("the API server is ready", START_WITHIN, async |cluster| {
                Ok(cluster.client.request_text(Request::get("/readyz").body(Vec::new())?).await.is_ok())
            })
            .await?;
        Ok(cluster)
    }

    fn spawn(&mut self, program: &Path, arguments: &[String]) -> anyhow::Result<u32> {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let log = std::fs::File::create(self.directory.join(format!("{name}.log")))?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = command.spawn().with_context(|| program.display().to_string())?;
        self.processes.push(process);
        Ok(self.processes.last().map_or(0, Child::id))
    }

    /// One of ours.
    fn program(&mut self, name: &str, arguments: &[String]) -> anyhow::Result<u32> {
        let program = self.binaries.join(name);
        self.spawn(&program, arguments)
    }

    /// A client of the API server that does not wait for a lease.
    fn component(&mut self, name: &str, arguments: &[&str]) -> anyhow::Result<u32> {
        let mut all = vec![format!("--kubeconfig={}", self.directory.join("kubeconfig").display())];
        all.extend(arguments.iter().map(ToString::to_string));
        self.program(name, &all)
    }

    async fn send(&self, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
        let content = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let request = Request::builder().method(method).uri(path).header("content-type", content).body(body)?;
        Ok(self.client.request(request).await?)
    }

    /// Creates objects, many at once.
    async fn create(&self, path: &str, objects: impl Iterator<Item = Value>) -> anyhow::Result<()> {
        let sent = stream::iter(objects).map(|object| async move { self.send("POST", path, &object).await.map(drop) });
        sent.buffer_unordered(CLIENTS).try_collect().await
    }

    async fn until(
        &self,
        what: &str,
        within: Duration,
        done: impl AsyncFn(&Cluster) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + within;
        while !done(self).await? {
            if Instant::now() > deadline {
                bail!("not in time: {what}");
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// How many objects there are, without reading them: what waits must not take the processors from what it waits for.
    async fn count(&self, path: &str) -> anyhow::Result<usize> {
        let list = self.send("GET", &format!("{path}?limit=1"), &Value::Null).await?;
        let more = list["metadata"]["remainingItemCount"].as_u64().unwrap_or(0);
        Ok(list["items"].as_array().map_or(0, Vec::len) + usize::try_from(more)?)
    }

    /// Whether no pod matches the field selector.
    async fn none(&self, fields: &str) -> anyhow::Result<bool> {
        let list = self.send("GET", &format!("/api/v1/pods?limit=1&fieldSelector={fields}"), &Value::Null).await?;
        Ok(list["items"].as_array().is_none_or(Vec::is_empty))
    }
}

const PODS: &str = "/api/v1/namespaces/default/pods";
/// Pods without a node.
const UNBOUND: &str = "spec.nodeName%3D";

async fn measure(options: &Options, load: Load, nodes: usize) -> anyhow::Result<Vec<String>> {
    let mut cluster = Cluster::start(options).await?;
    cluster.create("/api/v1/nodes", (0..nodes).map(node)).await?;
    if load == Load::Preemption {
        let victim = |number: usize| {
            let mut pod = Load::Plain.pod(number);
            pod["metadata"]["name"] = json!(format!("victim-{number}"));
            pod["spec"]["nodeName"] = json!(format!("node-{}", number % nodes));
            pod["spec"]["containers"][0]["resources"]["requests"]["cpu"] = json!("1");
            pod
        };
        cluster.create(PODS, (0..nodes * 4).map(victim)).await?;
    }
    let scheduler = cluster.component("scheduler", &["--leader-elect=false", "--secure-port=0"])?;
    // One pod shows that it is at work.
    let mut first = Load::Plain.pod(usize::MAX);
    first["spec"]["containers"][0]["resources"] = json!({});
    cluster.send("POST", PODS, &first).await?;
    cluster.until("the first pod has a node", START_WITHIN, async |cluster| cluster.none(UNBOUND).await).await?;
    tokio::time::sleep(crate::SETTLED).await;
    let before = usage(scheduler)?;
    let count = if load == Load::Preemption { PREEMPTORS.min(options.pods) } else { options.pods };
    let started = Instant::now();
    cluster.create(PODS, (0..count).map(|number| load.pod(number))).await?;
    cluster.until("all pods have nodes", DONE_WITHIN, async |cluster| cluster.none(UNBOUND).await).await?;
    let elapsed = started.elapsed().as_secs_f64();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = usage(scheduler)?;
    Ok(vec![
        load.name().to_owned(),
        nodes.to_string(),
        count.to_string(),
        format!("{:.0}", count as f64 / elapsed),
        format!("{:.3}", (after.cpu_seconds - before.cpu_seconds) * 1e3 / count as f64),
        format!("{:.1}", before.memory_mb),
        format!("{:.1}", after.memory_mb),
    ])
}

fn deployment(number: usize, replicas: usize) -> Value {
    let labels = json!({"app": format!("web-{number}")});
    let mut pod = Load::Plain.pod(number);
    pod["spec"]["containers"][0]["resources"]["requests"] = json!({"cpu": "1m", "memory": "1Mi"});
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": format!("web-{number}")},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod["spec"]}}})
}

/// From the creation of all Deployments until their pods are bound, and ready; and again for an update of all.
async fn deployments(options: &Options, nodes: usize) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(options).await?;
    let scheduler = cluster.component("scheduler", &["--leader-elect=false", "--secure-port=0"])?;
    let controllers = cluster.component("controller-manager", &["--leader-elect=false", "--secure-port=0"])?;
    let root = cluster.directory.join("kubelets").display().to_string();
    let kubelet = cluster.component(
        "kubelet",
        &[
            &format!("--hollow={nodes}"),
            "--hostname-override=hollow",
            &format!("--root-dir={root}"),
            "--node-ip=127.0.0.1",
            "--anonymous-auth=true",
            "--authorization-mode=AlwaysAllow",
            "--authentication-token-webhook=false",
            "--fail-swap-on=false",
        ],
    )?;
    cluster
        .until("all nodes are ready", START_WITHIN, async |cluster| {
            let list = cluster.send("GET", "/api/v1/nodes", &Value::Null).await?;
            let ready = |node: &&Value| {
                let conditions = node["status"]["conditions"].as_array();
                conditions.into_iter().flatten().any(|one| one["type"] == "Ready" && one["status"] == "True")
            };
            Ok(list["items"].as_array().is_some_and(|items| items.iter().filter(ready).count() >= nodes))
        })
        .await?;
    let replicas = options.replicas;
    let pods = DEPLOYMENTS * replicas;
    let finished = async |cluster: &Cluster| {
        let path = |number: usize| format!("/apis/apps/v1/namespaces/default/deployments/web-{number}");
        let done = |object: &Value| {
            let is = |field: &str| object["status"][field] == replicas;
            object["status"]["observedGeneration"] == object["metadata"]["generation"]
                && is("updatedReplicas")
                && is("availableReplicas")
                && is("replicas")
        };
        // One after the other: what is finished stays so.
        for number in 0..DEPLOYMENTS {
            while !done(&cluster.send("GET", &path(number), &Value::Null).await?) {
                tokio::time::sleep(POLL).await;
            }
        }
        anyhow::Ok(())
    };
    let memory = |of: (&Usage, &Usage)| format!("{:.1} / {:.1}", of.0.memory_mb, of.1.memory_mb);
    let nothing = || "-".to_owned();
    tokio::time::sleep(crate::SETTLED).await;
    let idle = memory((&usage(scheduler)?, &usage(controllers)?));
    let mut rows = vec![vec!["idle".to_owned(), nothing(), nothing(), nothing(), nothing(), idle]];
    for what in ["creation", "rolling update"].into_iter().take(if options.creation_only { 1 } else { 2 }) {
        let before = (usage(scheduler)?, usage(controllers)?);
        let started = Instant::now();
        let mut bound = None;
        if what == "creation" {
            cluster
                .create(
                    "/apis/apps/v1/namespaces/default/deployments",
                    (0..DEPLOYMENTS).map(|number| deployment(number, replicas)),
                )
                .await?;
            cluster
                .until("all pods are bound", DONE_WITHIN, async |cluster| {
                    Ok(cluster.count(PODS).await? >= pods && cluster.none(UNBOUND).await?)
                })
                .await?;
            bound = Some((started.elapsed(), usage(scheduler)?.cpu_seconds, usage(controllers)?.cpu_seconds));
        } else {
            let patch = json!({"spec": {"template": {"metadata": {"labels": {"version": "2"}}}}});
            let paths =
                (0..DEPLOYMENTS).map(|number| format!("/apis/apps/v1/namespaces/default/deployments/web-{number}"));
            let (cluster, patch) = (&cluster, &patch);
            let sent =
                stream::iter(paths).map(|path| async move { cluster.send("PATCH", &path, patch).await.map(drop) });
            sent.buffer_unordered(CLIENTS).try_collect::<()>().await?;
        }
        tokio::time::timeout(DONE_WITHIN, finished(&cluster))
            .await
            .with_context(|| format!("not in time: {what}"))??;
        let elapsed = started.elapsed();
        let after = (usage(scheduler)?, usage(controllers)?);
        let cpu = |then: Option<f64>, before: &Usage, after: &Usage| {
            let then = then.map_or_else(nothing, |then| format!("{:.2}", then - before.cpu_seconds));
            format!("{then} / {:.2}", after.cpu_seconds - before.cpu_seconds)
        };
        rows.push(vec![
            format!("{what} of {DEPLOYMENTS} Deployments of {replicas}"),
            bound.map_or_else(nothing, |bound| format!("{:.1}", bound.0.as_secs_f64())),
            format!("{:.1}", elapsed.as_secs_f64()),
            cpu(bound.map(|bound| bound.1), &before.0, &after.0),
            cpu(bound.map(|bound| bound.2), &before.1, &after.1),
            memory((&after.0, &after.1)),
        ]);
    }
    let hollow = usage(kubelet)?;
    table::print(
        &[
            "load",
            "bound s",
            "ready s",
            "scheduler CPU s, bound / ready",
            "controllers CPU s, bound / ready",
            "MB of both",
        ],
        &rows,
    );
    println!("{nodes} hollow nodes: {:.1} MB, {:.1} s of CPU", hollow.memory_mb, hollow.cpu_seconds);
    Ok(())
}
