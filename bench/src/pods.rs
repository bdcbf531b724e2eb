//! `bench pods`: what pods cost on real nodes. A cluster of two hosts as the tests make them, and on it: starts and ends one at
//! a time, many at once, the kubelet's processor time and memory with few and many pods, and beside all that what bare calls
//! of the runtime take. It needs root and what the integration tests need.

use crate::table;
use anyhow::{Context as _, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use integration_tests::{Cluster, Host, Setup};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams, WatchEvent, WatchParams},
};
use kubelet::runtime::cri::Cri;
use proto::cri as pb;
use serde_json::{Value, json};
use std::{
    collections::HashSet,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

const LABEL: &str = "bench=pods";
const IMAGE: &str = "pilothouse.dev/pause:0.1";
const PATIENCE: Duration = Duration::from_secs(300);
const TICKS_PER_SECOND: f64 = 100.0;
/// Requests of this program under way at once.
const CLIENTS: usize = 8;
/// Calls of the runtime under way at once, when many sandboxes are made.
const IN_FLIGHT: usize = 4;
/// The node that is measured; the other one has the control plane.
const NODE: usize = 1;

#[derive(clap::Args)]
pub struct Options {
    /// Pods that are started and ended one after another
    #[arg(long, default_value_t = 40)]
    starts: usize,
    /// Pods that are started at once
    #[arg(long, default_value_t = 100)]
    pods: usize,
    /// Seconds over which processor time is counted
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What to measure, of: runtime, idle, one (at a time), many (on two nodes), thirty, exec (probes), http (probes); all, if
    /// not given
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

impl Options {
    fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|wanted| wanted == part)
    }
}

/// What the watch showed of a pod.
#[derive(PartialEq)]
enum Seen {
    Ready,
    Gone,
}

struct Bench {
    cluster: Cluster,
    pods: Api<Pod>,
    seen: mpsc::Receiver<(String, Seen, Instant)>,
    rows: Vec<Vec<String>>,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(integration_tests::can_run_hosts("bench pods"), "hosts cannot be made here");
    // One thread: it moves into the hosts' network.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let cluster = Cluster::start("bench", Setup::Hosts(2)).await;
        let pods = Api::<Pod>::namespaced(cluster.client(), "default");
        let (sender, seen) = mpsc::channel(4096);
        let watching = tokio::spawn(watch(pods.clone(), sender));
        let mut bench = Bench { cluster, pods, seen, rows: Vec::new() };
        let done = bench.all(options).await;
        watching.abort();
        table::print(&["figure", "measured", "goal"], &bench.rows);
        done
    })
}

/// Tells when pods are first seen to be ready, and when they are gone.
async fn watch(pods: Api<Pod>, seen: mpsc::Sender<(String, Seen, Instant)>) -> anyhow::Result<()> {
    let params = WatchParams::default().labels(LABEL);
    let (mut version, mut ready) = ("0".to_owned(), HashSet::new());
    loop {
        let mut events = pods.watch(&params, &version).await?.boxed();
        while let Ok(Some(event)) = events.try_next().await {
            let now = Instant::now();
            let (pod, gone) = match event {
                WatchEvent::Added(pod) | WatchEvent::Modified(pod) => (pod, false),
                WatchEvent::Deleted(pod) => (pod, true),
                WatchEvent::Bookmark(_) | WatchEvent::Error(_) => continue,
            };
            let name = pod.metadata.name.clone().unwrap_or_default();
            version = pod.metadata.resource_version.clone().unwrap_or(version);
            if gone {
                ready.remove(&name);
                seen.send((name, Seen::Gone, now)).await?;
            } else if apimachinery::pod::is_ready(&pod) && ready.insert(name.clone()) {
                seen.send((name, Seen::Ready, now)).await?;
            }
        }
    }
}

fn pod(name: &str, more: &Value) -> anyhow::Result<Pod> {
    let (key, value) = LABEL.split_once('=').context("a label")?;
    let mut container = json!({"name": "c", "image": IMAGE});
    let mut spec = json!({"automountServiceAccountToken": true});
    for (whole, part) in [(&mut container, "container"), (&mut spec, "spec")] {
        for (field, wanted) in more[part].as_object().into_iter().flatten() {
            whole[field] = wanted.clone();
        }
    }
    spec["containers"] = json!([container]);
    Ok(serde_json::from_value(json!({"metadata": {"name": name, "labels": {key: value}}, "spec": spec}))?)
}

/// Milliseconds at the median and at the 99th of a hundred.
fn quantiles(times: &mut [f64]) -> String {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    format!("{:.0} / {:.0} ms", at(0.5), at(0.99))
}

/// Processor seconds and resident megabytes of a component.
fn usage(host: &Host, component: &str) -> anyhow::Result<(f64, f64)> {
    let stat = host.exec(&format!("cat /proc/$(cat /run/pilothouse/{component}.pid)/stat")).success();
    let fields: Vec<&str> = stat.rsplit_once(')').context("no name")?.1.split_whitespace().collect();
    let number = |i: usize| fields.get(i).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    Ok(((number(11) + number(12)) / TICKS_PER_SECOND, number(21) * 4096.0 / 1e6))
}

impl Bench {
    fn row(&mut self, figure: &str, measured: String, goal: &str) {
        println!("{figure}: {measured} (goal {goal})");
        self.rows.push(vec![figure.to_owned(), measured, goal.to_owned()]);
    }

    async fn all(&mut self, options: &Options) -> anyhow::Result<()> {
        let many = options.pods;
        let here = json!({"nodeName": self.cluster.hosts[NODE].name()});
        if options.wants("runtime") {
            self.bare_calls(options).await?;
        }
        // What the start left behind is over.
        tokio::time::sleep(Duration::from_secs(20)).await;
        if options.wants("idle") {
            self.weigh("no pods", options, "0.1 %, 12 MB").await?;
        }
        if options.wants("one") {
            self.one_at_a_time(options, &here).await?;
        }
        if options.wants("many") {
            let took = self.start(many, &json!({})).await?;
            self.row(&format!("{many} pods at once on two nodes"), format!("{took:.1} s"), "9 s");
            let took = self.end().await?;
            self.row(&format!("{many} pods on two nodes deleted"), format!("{took:.1} s"), "");
        }
        if options.wants("thirty") {
            let took = self.start(30, &json!({"spec": here})).await?;
            self.row("30 pods at once on a node", format!("{took:.1} s"), "");
            self.weigh("30 pods", options, "").await?;
            self.end().await?;
        }
        let script = "trap 'exit 0' TERM; sleep 100000 & wait";
        let probe = |probe: Value, period: u32| {
            let mut probe = probe;
            probe["periodSeconds"] = json!(period);
            json!({"image": "busybox:stable", "command": ["sh", "-c", script], "readinessProbe": probe})
        };
        if options.wants("exec") {
            let exec = json!({"exec": {"command": ["true"]}});
            let took = self.start(many, &json!({"spec": here, "container": probe(exec, 10)})).await?;
            self.row(&format!("{many} pods on a node, each with an exec probe"), format!("{took:.1} s"), "14 s");
            self.weigh(&format!("{many} pods, exec probes each 10 s"), options, "1.5 %, 25 MB").await?;
            let took = self.end().await?;
            self.row(&format!("{many} pods on a node deleted"), format!("{took:.1} s"), "");
        }
        if !options.wants("http") {
            return Ok(());
        }
        let http = json!({"image": "httpd-app:1.0", "env": [{"name": "DRAIN_SECONDS", "value": "0"}],
            "readinessProbe": {"httpGet": {"path": "/healthz", "port": 80}, "periodSeconds": 1}});
        self.start(many, &json!({"spec": here, "container": http})).await?;
        self.weigh(&format!("{many} pods, HTTP probes each second"), options, "").await?;
        self.end().await?;
        self.weigh("no pods again", options, "").await
    }

    async fn next(&mut self, wanted: Seen) -> anyhow::Result<(String, Instant)> {
        loop {
            let next = tokio::time::timeout(PATIENCE, self.seen.recv()).await;
            let (name, seen, at) = next.context("no pod moves any more")?.context("the watch ended")?;
            if seen == wanted {
                return Ok((name, at));
            }
        }
    }

    /// Starts so many pods at once; gives the seconds until all are ready.
    async fn start(&mut self, count: usize, more: &Value) -> anyhow::Result<f64> {
        let begun = Instant::now();
        let create = |index: usize| {
            let pods = &self.pods;
            async move { pods.create(&PostParams::default(), &pod(&format!("p-{index}"), more)?).await.context("create") }
        };
        stream::iter(0..count).map(create).buffer_unordered(CLIENTS).try_collect::<Vec<_>>().await?;
        let mut last = begun;
        for _ in 0..count {
            last = self.next(Seen::Ready).await?.1;
        }
        Ok((last - begun).as_secs_f64())
    }

    /// Ends all pods; gives the seconds until the API has none of them.
    async fn end(&mut self) -> anyhow::Result<f64> {
        let ours = ListParams::default().labels(LABEL);
        let count = self.pods.list(&ours).await?.items.len();
        let begun = Instant::now();
        self.pods.delete_collection(&DeleteParams::default(), &ours).await?;
        let mut last = begun;
        for _ in 0..count {
            last = self.next(Seen::Gone).await?.1;
        }
        // The last traces go a moment later.
        tokio::time::sleep(Duration::from_secs(5)).await;
        Ok((last - begun).as_secs_f64())
    }

    async fn one_at_a_time(&mut self, options: &Options, here: &Value) -> anyhow::Result<()> {
        for (how, spec) in [("by the scheduler", json!({})), ("on a given node", here.clone())] {
            let (mut starts, mut ends) = (Vec::new(), Vec::new());
            let (before, _) = usage(&self.cluster.hosts[NODE], "kubelet")?;
            for index in 0..options.starts {
                let name = format!("one-{index}");
                let begun = Instant::now();
                self.pods.create(&PostParams::default(), &pod(&name, &json!({"spec": spec}))?).await?;
                starts.push((self.next(Seen::Ready).await?.1 - begun).as_secs_f64() * 1e3);
                tokio::time::sleep(Duration::from_millis(300)).await;
                let begun = Instant::now();
                self.pods.delete(&name, &DeleteParams::default()).await?;
                ends.push((self.next(Seen::Gone).await?.1 - begun).as_secs_f64() * 1e3);
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            let (after, _) = usage(&self.cluster.hosts[NODE], "kubelet")?;
            self.row(&format!("pod start {how}, p50 / p99"), quantiles(&mut starts), "180 / 280 ms");
            self.row(&format!("pod deletion {how}, p50 / p99"), quantiles(&mut ends), "");
            if spec == *here {
                let each = (after - before) * 1e3 / options.starts as f64;
                self.row("kubelet's processor time for a pod's life", format!("{each:.1} ms"), "");
            }
        }
        Ok(())
    }

    /// The kubelet's processor time and memory, and the runtime's, while nothing changes.
    async fn weigh(&mut self, what: &str, options: &Options, goal: &str) -> anyhow::Result<()> {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let of = |bench: &Self| -> anyhow::Result<_> {
            let host = &bench.cluster.hosts[NODE];
            Ok((usage(host, "kubelet")?, usage(host, "containerd")?.0))
        };
        let ((kubelet, _), runtime) = of(self)?;
        tokio::time::sleep(Duration::from_secs(options.seconds)).await;
        let ((kubelet_then, memory), runtime_then) = of(self)?;
        let percent = |seconds: f64| seconds * 100.0 / options.seconds as f64;
        let told = format!("{:.2} %, {memory:.1} MB", percent(kubelet_then - kubelet));
        self.row(&format!("kubelet, {what}"), told, goal);
        self.row(&format!("containerd, {what}"), format!("{:.2} %", percent(runtime_then - runtime)), "");
        Ok(())
    }

    /// Sandboxes with a container each by bare calls: one after another, then many with a few calls in flight.
    async fn bare_calls(&mut self, options: &Options) -> anyhow::Result<()> {
        let host = &self.cluster.hosts[NODE];
        let socket = host.inside("/run/containerd/containerd.sock");
        let cri = Cri::new(&format!("unix://{}", socket.display()), None)?;
        let parent = host.cgroup().to_owned();
        let mut steps = [Vec::new(), Vec::new(), Vec::new()];
        let mut made = Vec::new();
        for index in 0..options.starts / 2 {
            let (id, took) = bare_pod(&cri, &parent, &format!("bare-{index}")).await?;
            made.push(id);
            steps.iter_mut().zip(took).for_each(|(all, one)| all.push(one));
        }
        let begun = Instant::now();
        let names: Vec<String> = (0..options.pods).map(|index| format!("bare-many-{index}")).collect();
        let all = stream::iter(&names).map(|name| bare_pod(&cri, &parent, name)).buffer_unordered(IN_FLIGHT);
        made.extend(all.map_ok(|(id, _)| id).try_collect::<Vec<_>>().await?);
        let many = begun.elapsed().as_secs_f64();
        for id in made {
            cri.stop_pod_sandbox(&id).await?;
            cri.remove_pod_sandbox(&id).await?;
        }
        for (step, mut times) in ["sandbox", "create", "start"].into_iter().zip(steps) {
            self.row(&format!("runtime alone: {step}, p50 / p99"), quantiles(&mut times), "");
        }
        let figure = format!("runtime alone: {} pods, {IN_FLIGHT} calls in flight", options.pods);
        self.row(&figure, format!("{many:.1} s"), "");
        Ok(())
    }
}

/// Makes a sandbox and a container in it; gives the sandbox, and the milliseconds of each step.
async fn bare_pod(cri: &Cri, parent: &str, name: &str) -> anyhow::Result<(String, [f64; 3])> {
    let metadata = pb::PodSandboxMetadata {
        name: name.to_owned(),
        uid: name.to_owned(),
        namespace: "bare".to_owned(),
        attempt: 0,
    };
    let linux = pb::LinuxPodSandboxConfig { cgroup_parent: parent.to_owned(), ..Default::default() };
    let sandbox = pb::PodSandboxConfig { metadata: Some(metadata), linux: Some(linux), ..Default::default() };
    let container = pb::ContainerConfig {
        metadata: Some(pb::ContainerMetadata { name: "c".to_owned(), attempt: 0 }),
        image: Some(pb::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
        ..Default::default()
    };
    let begun = Instant::now();
    let id = cri.run_pod_sandbox(sandbox.clone(), "").await?;
    let sandbox_made = Instant::now();
    let inside = cri.create_container(&id, container, sandbox).await?;
    let created = Instant::now();
    cri.start_container(&inside).await?;
    let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
    let took = [ms(begun, sandbox_made), ms(sandbox_made, created), ms(created, Instant::now())];
    Ok((id, took))
}
