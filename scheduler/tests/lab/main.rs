//! etcd, the apiserver and the scheduler together, with nodes and kubelets that are only written down: what a cluster
//! promises of scheduling, as the conformance programme describes it, and what the scheduler promises beyond that.

#[path = "../../../apiserver/tests/common/mod.rs"]
mod common;
mod devices;
mod endurance;
mod explaining;
mod interfaces;
mod predicates;
mod preemption;
mod storage;

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::{Server, eventually};
use serde_json::{Value, json};

const PODS: &str = "/api/v1/namespaces/t/pods";

/// A control plane whose nodes are objects only.
struct Lab {
    server: Arc<Server>,
    schedulers: Vec<Child>,
    directory: tempfile::TempDir,
    kubelets: tokio::task::JoinHandle<()>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.kubelets.abort();
        self.schedulers.iter_mut().for_each(end);
    }
}

fn end(process: &mut Child) {
    _ = process.kill();
    _ = process.wait();
}

fn built(name: &str) -> std::path::PathBuf {
    std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join(name)
}

impl Lab {
    /// With one scheduler; `None` where it cannot be set up.
    async fn start(test: &str) -> Option<Lab> {
        let mut lab = Self::without_scheduler(test, false).await?;
        lab.scheduler(&["--leader-elect=false", "--secure-port=0"]);
        Some(lab)
    }

    async fn without_scheduler(test: &str, controllers: bool) -> Option<Lab> {
        let ready =
            built("scheduler").exists() && if controllers { common::has_controllers() } else { common::has_etcd() };
        if !ready {
            assert!(std::env::var_os("CI").is_none(), "the scheduler is not built");
            println!("skipped {test}: not all programs are built; `./test` builds them");
            return None;
        }
        let server = Arc::new(if controllers { Server::start_with_controllers().await } else { Server::start().await });
        server.namespace("t").await;
        if controllers {
            let account = "/api/v1/namespaces/t/serviceaccounts/default";
            eventually("the account", async || server.get(account).await.map_err(|e| format!("{e:?}"))).await;
        }
        let kubelets = tokio::spawn(kubelets(server.clone()));
        Some(Lab { server, schedulers: Vec::new(), directory: tempfile::tempdir().unwrap(), kubelets })
    }

    /// Starts another scheduler.
    fn scheduler(&mut self, flags: &[&str]) {
        self.scheduler_in(&[], flags);
    }

    /// As [`Lab::scheduler`], with an environment.
    fn scheduler_in(&mut self, environment: &[(&str, &std::path::Path)], flags: &[&str]) {
        let number = self.schedulers.len();
        let (kubeconfig, log) =
            (self.file("kubeconfig"), std::fs::File::create(self.file(&format!("{number}.log"))).unwrap());
        std::fs::write(&kubeconfig, self.server.kubeconfig()).unwrap();
        let mut command = Command::new(built("scheduler"));
        command.envs(environment.iter().copied());
        command.arg(format!("--kubeconfig={}", kubeconfig.display())).args(flags).arg("-v=4");
        command.stdout(log.try_clone().unwrap()).stderr(log).stdin(Stdio::null());
        self.schedulers.push(command.spawn().unwrap());
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.file("0.log")).unwrap_or_default()
    }

    /// A node with so many CPUs that is ready.
    async fn node(&self, name: &str, cpu: &str) {
        let node = json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "status": {"capacity": amounts(cpu), "allocatable": amounts(cpu),
                "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]}});
        self.server.post("/api/v1/nodes", &node).await.unwrap();
        // The apiserver holds a new node back until a controller has seen it ready.
        self.server.merge(&format!("/api/v1/nodes/{name}"), &json!({"spec": {"taints": null}})).await.unwrap();
    }

    async fn pod(&self, name: &str, spec: Value) {
        self.labelled(name, json!({}), spec).await;
    }

    async fn labelled(&self, name: &str, labels: Value, spec: Value) {
        self.server.post(PODS, &pod(name, labels, spec)).await.unwrap();
    }

    async fn get(&self, name: &str) -> Value {
        self.server.get(&format!("{PODS}/{name}")).await.unwrap()
    }

    /// Waits until a pod has a node.
    async fn bound(&self, name: &str) -> String {
        eventually(&format!("{name} has a node"), async || {
            let pod = self.server.get(&format!("{PODS}/{name}")).await.map_err(|error| format!("{error:?}"))?;
            let node = pod["spec"]["nodeName"].as_str().map(ToOwned::to_owned);
            node.ok_or_else(|| format!("{} {}", pod["status"], self.log()))
        })
        .await
    }

    /// Waits until a pod is told that it has no node; what it is told.
    async fn refused(&self, name: &str) -> String {
        eventually(&format!("{name} is refused"), async || {
            let pod = self.server.get(&format!("{PODS}/{name}")).await.map_err(|error| format!("{error:?}"))?;
            assert!(pod["spec"]["nodeName"].is_null(), "{name} should have no node: {pod}");
            let condition = condition(&pod, "PodScheduled");
            let told = (condition["reason"] == "Unschedulable").then(|| condition["message"].as_str()).flatten();
            told.map(ToOwned::to_owned).ok_or_else(|| format!("{} {}", pod["status"], self.log()))
        })
        .await
    }

    async fn gone(&self, name: &str) {
        self.server.gone(&format!("{PODS}/{name}")).await;
    }

    async fn priority(&self, name: &str, value: i32) {
        let class = json!({"metadata": {"name": name}, "value": value});
        self.server.post("/apis/scheduling.k8s.io/v1/priorityclasses", &class).await.unwrap();
    }
}

fn condition<'a>(pod: &'a Value, kind: &str) -> &'a Value {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.and_then(|conditions| conditions.iter().find(|one| one["type"] == kind)).unwrap_or(&Value::Null)
}

fn amounts(cpu: &str) -> Value {
    json!({"cpu": cpu, "memory": "64Gi", "pods": "110"})
}

/// `spec` may ask for `cpu`.
fn pod(name: &str, labels: Value, mut spec: Value) -> Value {
    let cpu = spec.as_object_mut().and_then(|spec| spec.remove("cpu"));
    if spec["containers"].is_null() {
        spec["containers"] = json!([{"name": "c", "image": "image"}]);
    }
    if let Some(cpu) = cpu {
        spec["containers"][0]["resources"] = json!({"requests": {"cpu": cpu}});
    }
    json!({"metadata": {"name": name, "labels": labels}, "spec": spec})
}

/// What kubelets write: a pod with a node runs; one that is deleted ends.
async fn kubelets(server: Arc<Server>) {
    loop {
        let list = server.get("/api/v1/pods").await.unwrap_or_default();
        for pod in list["items"].as_array().into_iter().flatten().filter(|pod| pod["spec"]["nodeName"].is_string()) {
            let meta = &pod["metadata"];
            let path = format!(
                "/api/v1/namespaces/{}/pods/{}",
                meta["namespace"].as_str().unwrap_or_default(),
                meta["name"].as_str().unwrap_or_default()
            );
            if !meta["deletionTimestamp"].is_null() {
                _ = server.delete(&path, &json!({"gracePeriodSeconds": 0})).await;
            } else if pod["status"]["phase"] == "Pending" {
                let status = json!({"status": {"phase": "Running", "startTime": meta["creationTimestamp"]}});
                _ = server.merge(&format!("{path}/status"), &status).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
