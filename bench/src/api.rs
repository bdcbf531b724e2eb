//! A load on an API server: how many requests it answers, how long they take, and what it spends on them.
//!
//! Without `--kubeconfig` it starts etcd and the apiserver on a host of its own and takes them away again. The server's CPU
//! time and memory come from its own `/metrics`, so any server that speaks the API can be measured the same way.
use crate::{micro::sample_pod, table};
use anyhow::{Context as _, bail};
use component_base::client;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::Request;
use integration_tests::{Host, Lab, eventually};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client, api::WatchParams};
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Measure this server, as administrator, instead of starting one
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Where apiserver and ctl are (default: beside this program)
    #[arg(long)]
    binaries: Option<PathBuf>,
    /// Objects to create
    #[arg(long, default_value_t = 2000)]
    objects: usize,
    /// Requests under way at once
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// Watches that all see every change
    #[arg(long, default_value_t = 100)]
    watchers: usize,
}

const NAMESPACE: &str = "bench";
const LIST_ROUNDS: usize = 50;
const FAN_OUT_WRITES: usize = 300;
const LEASES: usize = 100;
const START_WITHIN: Duration = Duration::from_secs(60);

/// Runs all phases and prints their table.
pub fn run(options: Options) -> anyhow::Result<()> {
    // One thread, so that the network that the lab moves it into is that of everything started from it.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let own = match &options.kubeconfig {
            Some(_) => None,
            None => Some(Server::start(&options).await?),
        };
        let kubeconfig =
            own.as_ref().map(|s| s.kubeconfig.clone()).or(options.kubeconfig.clone()).context("no kubeconfig")?;
        let client = client::connect(client::load(Some(&kubeconfig)).await?, "bench")?;
        Load { client, options: &options }.run().await
    })
}

// === the server ===

struct Server {
    kubeconfig: PathBuf,
    processes: Vec<Child>,
    _host: Host,
    _lab: Lab,
}

impl Server {
    async fn start(options: &Options) -> anyhow::Result<Self> {
        let beside = std::env::current_exe()?.parent().map(PathBuf::from).context("the path of this program")?;
        let binaries = options.binaries.clone().unwrap_or(beside);
        let lab = Lab::new("bench");
        let host = Host::start(&lab, 1);
        let ctl = binaries.join("ctl").display().to_string();
        let address = format!("--apiserver-advertise-address={}", host.address());
        for phase in ["pki", "kubeconfig", "config"] {
            host.exec(&format!("{ctl} bootstrap {phase} {address}")).success();
        }
        let mut processes = Vec::new();
        for (name, program) in
            [("etcd", "etcd".to_owned()), ("apiserver", binaries.join("apiserver").display().to_string())]
        {
            let line =
                format!("set -f; . /etc/kubernetes/flags/{name}.env; exec {program} $ARGS >/var/log/{name}.log 2>&1");
            let mut command: Command = host.command_without_limit("bash");
            processes.push(command.args(["-c", &line]).stdin(Stdio::null()).spawn()?);
        }
        let kubeconfig = host.file("/etc/kubernetes/super-admin.conf");
        let server = Self { kubeconfig, processes, _host: host, _lab: lab };
        let client = client::connect(client::load(Some(&server.kubeconfig)).await?, "bench")?;
        eventually("the API server is ready", START_WITHIN, || async {
            let request = Request::get("/readyz").body(Vec::new()).map_err(|e| e.to_string())?;
            client.request_text(request).await.map(drop).map_err(|e| e.to_string())
        })
        .await;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // The host's end takes them along in any case.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

// === the load ===

struct Load<'a> {
    client: Client,
    options: &'a Options,
}

/// What the server has spent so far.
#[derive(Clone, Copy)]
struct Usage {
    cpu_seconds: f64,
    memory_bytes: f64,
}

impl Load<'_> {
    async fn run(&self) -> anyhow::Result<()> {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        self.send("POST", "/api/v1/namespaces".to_owned(), Some(namespace)).await?;
        let maps = format!("/api/v1/namespaces/{NAMESPACE}/configmaps");
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
        // Another's controller may have been quicker.
        let _ = self.send("POST", format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts"), Some(account)).await;

        let pods = format!("/api/v1/namespaces/{NAMESPACE}/pods");
        let count = self.options.objects;
        let mut rows = Vec::new();
        rows.push(self.phase("create a pod", count, |i| ("POST", pods.clone(), Some(sample(i)))).await?);
        rows.push(self.phase("get a pod", count, |i| ("GET", format!("{pods}/web-{i}"), None)).await?);
        rows.push(self.phase(&format!("list {count} pods"), LIST_ROUNDS, |_| ("GET", pods.clone(), None)).await?);
        rows.push(self.phase("list 500 of them", LIST_ROUNDS, |_| ("GET", format!("{pods}?limit=500"), None)).await?);
        let few = format!("{pods}?labelSelector=bucket%3D7");
        rows.push(self.phase("list 1 % of them by label", LIST_ROUNDS * 10, |_| ("GET", few.clone(), None)).await?);
        let patch = json!({"metadata": {"labels": {"patched": "yes"}}});
        rows.push(
            self.phase("patch a pod", count, |i| ("PATCH", format!("{pods}/web-{i}"), Some(patch.clone()))).await?,
        );
        let status = json!({"status": {"phase": "Running", "podIP": "10.1.2.3", "conditions": [{"type": "Ready", "status": "True"}]}});
        rows.push(
            self.phase("update a status", count, |i| ("PATCH", format!("{pods}/web-{i}/status"), Some(status.clone())))
                .await?,
        );
        rows.push(self.leases(count).await?);
        let target = json!({"kind": "Node", "name": "n1"});
        let binding = |i: usize| json!({"metadata": {"name": format!("web-{i}")}, "target": target});
        rows.push(
            self.phase("bind a pod", count, |i| ("POST", format!("{pods}/web-{i}/binding"), Some(binding(i)))).await?,
        );
        rows.push(self.fan_out(&maps).await?);
        rows.push(
            self.phase("delete a pod", count, |i| ("DELETE", format!("{pods}/web-{i}?gracePeriodSeconds=0"), None))
                .await?,
        );
        table::print(
            &["work", "number", "per second", "p50 ms", "p99 ms", "server CPU s per 1000", "server MB"],
            &rows,
        );
        Ok(())
    }

    /// `count` requests, as many at once as there are clients.
    async fn phase(
        &self,
        what: &str,
        count: usize,
        request: impl Fn(usize) -> (&'static str, String, Option<Value>),
    ) -> anyhow::Result<Vec<String>> {
        let (before, started) = (self.usage().await?, Instant::now());
        let times: Vec<Duration> = stream::iter(0..count)
            .map(|i| {
                let (method, path, body) = request(i);
                async move {
                    let sent = Instant::now();
                    self.send(method, path, body).await.map(|()| sent.elapsed())
                }
            })
            .buffer_unordered(self.options.clients)
            .try_collect()
            .await
            .with_context(|| what.to_owned())?;
        let elapsed = started.elapsed();
        row(what, times, elapsed, before, self.usage().await?)
    }

    /// What kubelets do all day.
    async fn leases(&self, count: usize) -> anyhow::Result<Vec<String>> {
        let leases = format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases");
        for i in 0..LEASES {
            let lease =
                json!({"metadata": {"name": format!("node-{i}")}, "spec": {"holderIdentity": format!("node-{i}")}});
            self.send("POST", leases.clone(), Some(lease)).await?;
        }
        let renewal = |i: usize| json!({"spec": {"renewTime": format!("2026-01-01T00:00:00.{i:06}Z")}});
        let request = |i: usize| ("PATCH", format!("{leases}/node-{}", i % LEASES), Some(renewal(i)));
        self.phase("renew a lease", count, request).await
    }

    /// Every watcher sees every write; the time is from the write's answer to the last watcher.
    async fn fan_out(&self, maps: &str) -> anyhow::Result<Vec<String>> {
        let watchers = self.options.watchers;
        let seen = Arc::new(AtomicUsize::new(0));
        let mut tasks = Vec::new();
        for _ in 0..watchers {
            let api = Api::<ConfigMap>::namespaced(self.client.clone(), NAMESPACE);
            let seen = seen.clone();
            let mut events = api.watch(&WatchParams::default(), "0").await?.boxed();
            tasks.push(tokio::spawn(async move {
                while let Some(Ok(event)) = events.next().await {
                    if let kube::api::WatchEvent::Added(map) = event
                        && map.metadata.name.is_some_and(|n| n.starts_with("fan-"))
                    {
                        seen.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }));
        }
        let (before, started) = (self.usage().await?, Instant::now());
        let mut times = Vec::new();
        for i in 0..FAN_OUT_WRITES {
            let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": format!("fan-{i}")}, "data": {"x": "y".repeat(500)}});
            let sent = Instant::now();
            self.send("POST", maps.to_owned(), Some(map)).await?;
            while seen.load(Ordering::Relaxed) < (i + 1) * watchers {
                if sent.elapsed() > Duration::from_secs(10) {
                    bail!("{} of {} events came", seen.load(Ordering::Relaxed), (i + 1) * watchers);
                }
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            times.push(sent.elapsed());
        }
        let elapsed = started.elapsed();
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
        let what = format!("write seen by {watchers} watchers");
        row(&what, times, elapsed, before, self.usage().await?)
    }

    async fn send(&self, method: &str, path: String, body: Option<Value>) -> anyhow::Result<()> {
        let content = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let body = body.map(|b| b.to_string().into_bytes()).unwrap_or_default();
        let request = Request::builder().method(method).uri(path).header("content-type", content).body(body)?;
        self.client.request_text(request).await?;
        Ok(())
    }

    async fn usage(&self) -> anyhow::Result<Usage> {
        let text = self.client.request_text(Request::get("/metrics").body(Vec::new())?).await?;
        let value = |name: &str| {
            let line = text.lines().find(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
            line.and_then(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).with_context(|| format!("no metric {name}"))
        };
        Ok(Usage {
            cpu_seconds: value("process_cpu_seconds_total")?,
            memory_bytes: value("process_resident_memory_bytes")?,
        })
    }
}

fn sample(i: usize) -> Value {
    let mut pod = sample_pod(&format!("web-{i}"));
    pod["metadata"]["namespace"] = NAMESPACE.into();
    pod["metadata"]["labels"]["bucket"] = (i % 100).to_string().into();
    pod
}

fn row(
    what: &str,
    mut times: Vec<Duration>,
    elapsed: Duration,
    before: Usage,
    after: Usage,
) -> anyhow::Result<Vec<String>> {
    times.sort_unstable();
    let at = |share: f64| {
        let index = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
        times.get(index).map_or(0.0, Duration::as_secs_f64) * 1e3
    };
    let count = times.len() as f64;
    Ok(vec![
        what.to_owned(),
        times.len().to_string(),
        format!("{:.0}", count / elapsed.as_secs_f64()),
        format!("{:.1}", at(0.5)),
        format!("{:.1}", at(0.99)),
        format!("{:.2}", (after.cpu_seconds - before.cpu_seconds) * 1000.0 / count),
        format!("{:.0}", after.memory_bytes / 1e6),
    ])
}
