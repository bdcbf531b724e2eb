//! A load on an API server: how many requests it answers, how long they take, and what it spends on them.
//!
//! Without `--kubeconfig` it starts etcd and the apiserver on a host of its own and takes them away again. The server's CPU
//! time and memory come from its own `/metrics`, so any server that speaks the API can be measured the same way.
use crate::table;
use anyhow::{Context as _, ensure};
use component_base::client;
use futures::{AsyncBufReadExt as _, StreamExt as _, TryStreamExt as _, stream};
use http::Request;
use integration_tests::{Host, Lab, eventually};
use kube::Client;
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    cell::RefCell,
    path::{Path, PathBuf},
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
    #[arg(long, default_value_t = 10_000)]
    objects: usize,
    /// Requests under way at once
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// Watches that all see every change
    #[arg(long, default_value_t = 1000)]
    watchers: usize,
}

const NAMESPACE: &str = "bench";
const CONNECTIONS: usize = 8;
const WATCHES_PER_CONNECTION: usize = 50;
const LIST_ROUNDS: usize = 20;
const FAN_OUT_WRITES: usize = 500;
const FAN_OUT_WRITERS: usize = 4;
/// So long may no watcher hear anything before all have heard everything.
const FAN_OUT_PATIENCE: Duration = Duration::from_secs(30);
const LEASES: usize = 1000;
const STRATEGIC: &str = "application/strategic-merge-patch+json";
const MERGE: &str = "application/merge-patch+json";
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
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            clients.push(connect(&kubeconfig).await?);
        }
        let load = Load { clients, kubeconfig, options: &options, rows: RefCell::default(), next: RefCell::default() };
        load.run().await?;
        if let Some(server) = &own {
            println!("\nFrom the start of the process to /readyz: {:.0} ms", server.started_in.as_secs_f64() * 1e3);
        }
        Ok(())
    })
}

/// A client with a connection of its own.
async fn connect(kubeconfig: &Path) -> anyhow::Result<Client> {
    Ok(client::connect(client::load(Some(kubeconfig)).await?, "bench")?)
}

// === the server ===

struct Server {
    kubeconfig: PathBuf,
    processes: Vec<Child>,
    /// With etcd there and its objects in it.
    started_in: Duration,
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
        let start = |name: &str, program: String| -> anyhow::Result<Child> {
            let line = format!(
                "set -f; echo $$ >/run/{name}.pid; . /etc/kubernetes/flags/{name}.env; exec {program} $ARGS >/var/log/{name}.log 2>&1"
            );
            let mut command: Command = host.command_without_limit("bash");
            Ok(command.args(["-c", &line]).stdin(Stdio::null()).spawn()?)
        };
        let apiserver = || start("apiserver", binaries.join("apiserver").display().to_string());
        let kubeconfig = host.file("/etc/kubernetes/super-admin.conf");
        let client = connect(&kubeconfig).await?;
        let ready = || async {
            let request = Request::get("/readyz").body(Vec::new()).map_err(|e| e.to_string())?;
            client.request_text(request).await.map(drop).map_err(|e| e.to_string())
        };
        let mut processes = vec![start("etcd", "etcd".to_owned())?, apiserver()?];
        eventually("the API server is ready", START_WITHIN, ready).await;
        // Its number on the host: the child is what entered the host.
        host.exec("kill -9 $(cat /run/apiserver.pid)").success();
        while ready().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let started = Instant::now();
        processes.push(apiserver()?);
        while ready().await.is_err() {
            ensure!(started.elapsed() < START_WITHIN, "the API server does not start again");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let started_in = started.elapsed();
        Ok(Self { kubeconfig, processes, started_in, _host: host, _lab: lab })
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
    clients: Vec<Client>,
    kubeconfig: PathBuf,
    options: &'a Options,
    rows: RefCell<Vec<Vec<String>>>,
    /// Which client is next.
    next: RefCell<usize>,
}

/// What the server has spent so far.
#[derive(Clone, Copy)]
struct Usage {
    cpu_seconds: f64,
    memory_bytes: f64,
}

/// Of a list or an object, what the load reads.
#[derive(Deserialize)]
struct Page {
    metadata: PageMeta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct PageMeta {
    r#continue: String,
    resource_version: String,
}

impl Load<'_> {
    async fn run(&self) -> anyhow::Result<()> {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        self.send("POST", "/api/v1/namespaces", "", Some(namespace)).await?;
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
        // Another's controller may have been quicker.
        let _ = self.send("POST", &format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts"), "", Some(account)).await;
        tokio::time::sleep(crate::SETTLED).await;
        let idle = self.usage().await?;

        let pods = format!("/api/v1/namespaces/{NAMESPACE}/pods");
        let pod = |i: usize| format!("{pods}/web-{i}");
        let (count, lists) = (self.options.objects, LIST_ROUNDS);
        self.phase("create a pod", 180, count, async |i| self.send("POST", &pods, "", Some(sample(i))).await).await?;
        let full = self.usage().await?;
        self.phase("get a pod", 40, count * 2, async |i| self.send("GET", &pod(i % count), "", None).await).await?;
        for (what, goal, rounds, query) in [
            ("list all, any state", 75_000, lists, "?resourceVersion=0"),
            ("list all, consistent", 75_000, lists, ""),
            ("list 1 % by label, any state", 1500, lists * 20, "?resourceVersion=0&labelSelector=bucket%3D7"),
            ("list 1 % by label, consistent", 1500, lists * 20, "?labelSelector=bucket%3D7"),
        ] {
            let path = format!("{pods}{query}");
            self.one_by_one(what, goal, rounds, async |_| self.send("GET", &path, "", None).await).await?;
        }
        self.one_by_one("walk all in pages of 500", 90_000, lists, async |_| self.walk(&pods).await).await?;
        for (what, content) in [("strategic merge patch of a pod", STRATEGIC), ("merge patch of a pod", MERGE)] {
            let patch = |i: usize| json!({"metadata": {"annotations": {"bench/patched": format!("{what} {i}")}}});
            self.phase(what, 300, count, async |i| self.send("PATCH", &pod(i), content, Some(patch(i))).await).await?;
        }
        self.phase("status update (GET and PUT)", 350, count / 2, async |i| self.update_status(&pod(i), i).await)
            .await?;
        self.leases(count * 2).await?;
        let binding = |i: usize| {
            json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": format!("web-{i}")},
                "target": {"apiVersion": "v1", "kind": "Node", "name": format!("n{}", i % 100)}})
        };
        let bind = async |i: usize| self.send("POST", &format!("{}/binding", pod(i)), "", Some(binding(i))).await;
        self.phase("bind a pod", 150, count, bind).await?;
        self.fan_out(&pods).await?;
        let loaded = self.usage().await?;
        let delete = async |i: usize| self.send("DELETE", &format!("{}?gracePeriodSeconds=0", pod(i)), "", None).await;
        self.phase("delete a pod", 220, count, delete).await?;
        table::print(
            &["work", "CPU ms per 1,000", "goal", "number", "per second", "p50 ms", "p99 ms", "server MB"],
            &self.rows.borrow(),
        );
        let mb = |usage: Usage| usage.memory_bytes / 1e6;
        println!(
            "\nMemory: {:.0} MB idle, {:.0} with the pods ({:.1} KB each), {:.0} after all loads but the deletions",
            mb(idle),
            mb(full),
            (full.memory_bytes - idle.memory_bytes) / count as f64 / 1e3,
            mb(loaded)
        );
        Ok(())
    }

    /// `count` requests, as many at once as there are clients.
    async fn phase(
        &self,
        what: &str,
        goal: u32,
        count: usize,
        work: impl AsyncFn(usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.measured(what, goal, count, self.options.clients, work).await
    }

    /// `count` requests, each after the other.
    async fn one_by_one(
        &self,
        what: &str,
        goal: u32,
        count: usize,
        work: impl AsyncFn(usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.measured(what, goal, count, 1, work).await
    }

    async fn measured(
        &self,
        what: &str,
        goal: u32,
        count: usize,
        at_once: usize,
        work: impl AsyncFn(usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let (before, started, work) = (self.usage().await?, Instant::now(), &work);
        let timed = |i: usize| async move {
            let sent = Instant::now();
            work(i).await.map(|()| sent.elapsed())
        };
        let times: Result<Vec<Duration>, _> =
            stream::iter(0..count).map(timed).buffer_unordered(at_once.max(1)).try_collect().await;
        let times = times.with_context(|| what.to_owned())?;
        self.row(what, goal, times, started.elapsed(), count, before).await
    }

    /// The whole list, page by page.
    async fn walk(&self, pods: &str) -> anyhow::Result<()> {
        let mut rest = String::new();
        loop {
            let text = self.ask("GET", &format!("{pods}?limit=500{rest}"), "", None).await?;
            let page: Page = serde_json::from_str(&text)?;
            if page.metadata.r#continue.is_empty() {
                return Ok(());
            }
            rest = format!("&continue={}", page.metadata.r#continue);
        }
    }

    async fn update_status(&self, pod: &str, i: usize) -> anyhow::Result<()> {
        let mut object: Value = serde_json::from_str(&self.ask("GET", pod, "", None).await?)?;
        object["status"]["message"] = format!("update {i}").into();
        object["status"]["conditions"] =
            json!([{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
        self.send("PUT", &format!("{pod}/status"), "", Some(object)).await
    }

    /// What kubelets do all day.
    async fn leases(&self, count: usize) -> anyhow::Result<()> {
        let leases = format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases");
        let lease = |i: usize, renewal: usize, version: &str| {
            json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": format!("node-{i}"), "namespace": NAMESPACE, "resourceVersion": version},
                "spec": {"holderIdentity": format!("node-{i}"), "leaseDurationSeconds": 40,
                    "renewTime": format!("2026-01-01T00:00:00.{renewal:06}Z")}})
        };
        let version = |text: &str| serde_json::from_str(text).map(|page: Page| page.metadata.resource_version);
        let mut versions = Vec::new();
        for i in 0..LEASES {
            let text = self.ask("POST", &leases, "", Some(lease(i, 0, ""))).await?;
            versions.push(RefCell::new(version(&text)?));
        }
        let renew = async |i: usize| {
            let (slot, node) = (&versions[i % LEASES], i % LEASES);
            let renewed = lease(node, i, &slot.borrow());
            let text = self.ask("PUT", &format!("{leases}/node-{node}"), "", Some(renewed)).await?;
            slot.replace(version(&text)?);
            Ok(())
        };
        self.phase("renew a lease", 110, count, renew).await
    }

    /// Every watcher sees every write. What is counted is one event for one watcher.
    async fn fan_out(&self, pods: &str) -> anyhow::Result<()> {
        let watchers = self.options.watchers;
        let page: Page = serde_json::from_str(&self.ask("GET", &format!("{pods}?limit=1"), "", None).await?)?;
        let seen = Arc::new(AtomicUsize::new(0));
        let (mut tasks, mut client) = (Vec::new(), connect(&self.kubeconfig).await?);
        for i in 0..watchers {
            // A connection has room for so many streams only.
            if i % WATCHES_PER_CONNECTION == 0 {
                client = connect(&self.kubeconfig).await?;
            }
            let path = format!("{pods}?watch=1&resourceVersion={}", page.metadata.resource_version);
            let mut events = Box::pin(client.request_stream(Request::get(path).body(Vec::new())?).await?);
            let seen = seen.clone();
            tasks.push(tokio::spawn(async move {
                while let Ok(bytes) = events.fill_buf().await {
                    let (length, ends) = (bytes.len(), bytes.iter().filter(|byte| **byte == b'\n').count());
                    if length == 0 {
                        break;
                    }
                    seen.fetch_add(ends, Ordering::Relaxed);
                    events.consume_unpin(length);
                }
            }));
        }
        let (before, started) = (self.usage().await?, Instant::now());
        let write = |i: usize| async move {
            let (sent, patch) = (Instant::now(), json!({"metadata": {"annotations": {"bench/seen": i.to_string()}}}));
            let path = format!("{pods}/web-{}", i % self.options.objects);
            self.send("PATCH", &path, MERGE, Some(patch)).await.map(|()| sent.elapsed())
        };
        let times: Vec<Duration> =
            stream::iter(0..FAN_OUT_WRITES).map(write).buffer_unordered(FAN_OUT_WRITERS).try_collect().await?;
        let (all, mut last) = (watchers * FAN_OUT_WRITES, (0, Instant::now()));
        while last.0 < all {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let now = seen.load(Ordering::Relaxed);
            ensure!(now > last.0 || last.1.elapsed() < FAN_OUT_PATIENCE, "{now} of {all} events came");
            if now > last.0 {
                last = (now, Instant::now());
            }
        }
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
        self.row(&format!("an event for one of {watchers} watchers"), 8, times, started.elapsed(), all, before).await
    }

    async fn send(&self, method: &str, path: &str, content: &str, body: Option<Value>) -> anyhow::Result<()> {
        self.ask(method, path, content, body).await.map(drop)
    }

    /// The answer to a request; of a content other than JSON, if it says so.
    async fn ask(&self, method: &str, path: &str, content: &str, body: Option<Value>) -> anyhow::Result<String> {
        let content = if content.is_empty() { "application/json" } else { content };
        let body = body.map(|b| b.to_string().into_bytes()).unwrap_or_default();
        let request = Request::builder().method(method).uri(path).header("content-type", content).body(body)?;
        let next = self.next.replace_with(|next| *next + 1);
        Ok(self.clients[next % self.clients.len()].request_text(request).await?)
    }

    async fn usage(&self) -> anyhow::Result<Usage> {
        let text = self.ask("GET", "/metrics", "", None).await?;
        let value = |name: &str| {
            let line = text.lines().find(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
            line.and_then(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).with_context(|| format!("no metric {name}"))
        };
        Ok(Usage {
            cpu_seconds: value("process_cpu_seconds_total")?,
            memory_bytes: value("process_resident_memory_bytes")?,
        })
    }

    async fn row(
        &self,
        what: &str,
        goal: u32,
        mut times: Vec<Duration>,
        elapsed: Duration,
        count: usize,
        before: Usage,
    ) -> anyhow::Result<()> {
        let after = self.usage().await?;
        times.sort_unstable();
        let at = |share: f64| {
            let index = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
            times.get(index).map_or(0.0, Duration::as_secs_f64) * 1e3
        };
        let cpu_ms = (after.cpu_seconds - before.cpu_seconds) * 1e6 / count as f64;
        eprintln!("{what}: {cpu_ms:.1}");
        self.rows.borrow_mut().push(vec![
            what.to_owned(),
            if cpu_ms < 100.0 { format!("{cpu_ms:.1}") } else { format!("{cpu_ms:.0}") },
            goal.to_string(),
            count.to_string(),
            format!("{:.0}", count as f64 / elapsed.as_secs_f64()),
            format!("{:.1}", at(0.5)),
            format!("{:.1}", at(0.99)),
            format!("{:.0}", after.memory_bytes / 1e6),
        ]);
        Ok(())
    }
}

/// 2.5 KB, as pods in the field have them.
fn sample(i: usize) -> Value {
    let app = format!("app-{}", i % 200);
    let env: Vec<Value> = (0..12)
        .map(|n| json!({"name": format!("SETTING_{n}"), "value": format!("the value of setting {n} of {app}")}))
        .collect();
    let probe =
        |path: &str| json!({"httpGet": {"path": path, "port": "http"}, "periodSeconds": 10, "timeoutSeconds": 1});
    let lost = |what: &str| json!({"key": format!("node.kubernetes.io/{what}"), "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300});
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("web-{i}"), "namespace": NAMESPACE,
            "labels": {"app.kubernetes.io/name": app, "app.kubernetes.io/instance": format!("{app}-prod"),
                "app.kubernetes.io/version": "1.2.3", "tier": "backend", "bucket": (i / 20 % 100).to_string()},
            "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "9090", "checksum/config": "0123456789abcdef".repeat(4)}},
        "spec": {"serviceAccountName": "default", "restartPolicy": "Always", "terminationGracePeriodSeconds": 30,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 1000, "fsGroup": 1000},
            "containers": [{"name": "main", "image": format!("registry.example.com/team/{app}:1.2.3"), "imagePullPolicy": "IfNotPresent",
                "args": ["--config=/etc/app/config.yaml", "--log-level=info", "--listen=:8080"],
                "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}, {"name": "metrics", "containerPort": 9090, "protocol": "TCP"}],
                "env": env,
                "resources": {"requests": {"cpu": "100m", "memory": "200Mi"}, "limits": {"cpu": "500m", "memory": "400Mi"}},
                "livenessProbe": probe("/healthz"), "readinessProbe": probe("/ready"),
                "volumeMounts": [{"name": "config", "mountPath": "/etc/app"}, {"name": "tmp", "mountPath": "/tmp"}],
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}],
            "volumes": [{"name": "config", "configMap": {"name": format!("{app}-config")}}, {"name": "tmp", "emptyDir": {}}],
            "tolerations": [lost("not-ready"), lost("unreachable"), {"key": "dedicated", "operator": "Equal", "value": "backend", "effect": "NoSchedule"}]}})
}
