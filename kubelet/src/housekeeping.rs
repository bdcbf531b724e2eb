//! What is looked after besides the pods' workers: pods nobody knows any more, directories and cgroups they left, mirrors
//! of static pods, log rotation, the weight of the burstable class.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use component_base::informer::Informer;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use proto::cri as pb;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::config::KubeletConfiguration;
use crate::metrics::{InState, Source, managers, metrics};
use crate::pod_workers::PodWorkers;
use crate::runtime::observed::State;
use crate::runtime::pods::{full_name, uid_of};
use crate::runtime::{Runtime, RuntimeWatch, labels, logs};
use crate::static_pods::{self, Mirrors};
use crate::volumes::Volumes;

const PERIOD: Duration = Duration::from_secs(2);
/// How long a pod may be without a source before it is taken down: sources that come at the same time are waited for.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(4);

pub(crate) struct Housekeeping {
    pub workers: Arc<PodWorkers>,
    pub runtime: Arc<Runtime>,
    pub watch: Arc<RuntimeWatch>,
    pub volumes: Arc<Volumes>,
    pub config: Arc<KubeletConfiguration>,
    pub static_pods: Vec<watch::Receiver<Arc<Vec<Pod>>>>,
    /// With an API: its pods, and the mirrors in it.
    pub api: Option<(Informer<Pod>, Mirrors)>,
}

impl Housekeeping {
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let started = Instant::now();
        let mut cpusets = HashMap::new();
        let mut rotate_at = Instant::now() + self.config.container_log_monitor_interval;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
            self.weigh_burstable().await;
            self.count();
            self.mirrors().await;
            // Before the API has told which pods are ours, nothing may be called an orphan.
            if started.elapsed() >= ORPHAN_PATIENCE && self.api.as_ref().is_none_or(|(pods, _)| pods.is_synced()) {
                self.orphans().await;
            }
            self.cpusets(&mut cpusets).await;
            if Instant::now() >= rotate_at {
                self.rotate_logs().await;
                rotate_at = Instant::now() + self.config.container_log_monitor_interval;
            }
        }
    }

    fn count(&self) {
        let counted = metrics();
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let (running, states) = self.watch.counts();
        counted.running_pods.set(number(running));
        let mut from_files = 0;
        for (family, pods) in
            [(&counted.desired_pods, self.workers.pods()), (&counted.active_pods, self.workers.active_pods())]
        {
            from_files = pods.iter().filter(|pod| static_pods::is_static(pod)).count();
            family.get_or_create(&Source { r#static: "true" }).set(number(from_files));
            family.get_or_create(&Source { r#static: "" }).set(number(pods.len() - from_files));
        }
        counted.mirror_pods.set(number(from_files));
        let ephemeral = |pod: &Arc<Pod>| pod.spec.iter().flat_map(|s| s.ephemeral_containers.iter().flatten()).count();
        managers().ephemeral_containers.set(number(self.workers.pods().iter().map(ephemeral).sum()));
        for (state, container_state) in [(0, "created"), (1, "running"), (2, "exited"), (3, "unknown")] {
            let count = states.iter().filter(|s| **s == state).count();
            counted.containers.get_or_create(&InState { container_state }).set(number(count));
        }
    }

    /// Gives running containers the processors that are theirs now: those that are shared become fewer and more. `applied` is
    /// what each container has.
    async fn cpusets(&self, applied: &mut HashMap<String, String>) {
        let allocator = &self.workers.means().allocator;
        if allocator.cpuset_of("", "").is_none() {
            return;
        }
        let labels = [labels::POD_UID, labels::CONTAINER_NAME];
        let Ok(containers) = self.runtime.cri.list_containers_with(BTreeMap::new()).await else { return };
        let running = containers.into_iter().filter(|c| c.state() == pb::ContainerState::ContainerRunning);
        let mut seen = HashMap::new();
        for container in running {
            let [Some(uid), Some(name)] = labels.map(|label| container.labels.get(label)) else { continue };
            let Some(wanted) = allocator.cpuset_of(uid, name) else { continue };
            if applied.get(&container.id) != Some(&wanted) {
                let resources = pb::LinuxContainerResources { cpuset_cpus: wanted.clone(), ..Default::default() };
                if let Err(error) = self.runtime.cri.update_container_resources(&container.id, resources).await {
                    debug!(container = %container.id, cpus = wanted, %error, "processors not changed");
                    continue;
                }
            }
            seen.insert(container.id, wanted);
        }
        *applied = seen;
    }

    async fn weigh_burstable(&self) {
        let burstable = |pod: &Arc<Pod>| {
            let spec = pod.spec.as_ref()?;
            if apimachinery::pod::is_terminal(pod) || apimachinery::pod::qos_class(spec) != "Burstable" {
                return None;
            }
            apimachinery::pod::requests(spec).get("cpu").map(|q| q.milli_value())
        };
        let total: i64 = self.workers.pods().iter().filter_map(burstable).sum();
        self.runtime.with_cgroups(move |cgroups| cgroups.set_burstable_requests(total)).await;
    }

    async fn mirrors(&self) {
        let Some((pods, mirrors)) = self.api.as_ref().filter(|(pods, _)| pods.is_synced()) else { return };
        let wanted: Vec<Arc<Vec<Pod>>> = self.static_pods.iter().map(|source| source.borrow().clone()).collect();
        let wanted = || wanted.iter().flat_map(|pods| pods.iter());
        for pod in wanted() {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
            let existing = pods.get(namespace, pod.metadata.name.as_deref().unwrap_or_default());
            if let Err(error) = mirrors.ensure(pod, existing.as_deref()).await {
                debug!(pod = %full_name(pod), %error, "mirror pod not made");
            }
        }
        for mirror in pods.list().into_iter().filter(|p| static_pods::is_mirror(p)) {
            let has_source = wanted()
                .any(|p| p.metadata.name == mirror.metadata.name && p.metadata.namespace == mirror.metadata.namespace);
            if !has_source && let Err(error) = mirrors.delete(&mirror).await {
                debug!(pod = %full_name(&mirror), %error, "mirror pod not deleted");
            }
        }
    }

    /// What is left of pods that no source has: removed while the kubelet was away, or left behind by a failed cleanup.
    async fn orphans(&self) {
        let Some(running) = self.watch.pod_uids() else { return };
        for uid in running.iter().filter(|uid| !self.workers.knows(uid)) {
            // The list may be a second old, and the pod gone since.
            if self.runtime.observe(uid).await.is_ok_and(|o| !o.is_gone()) {
                self.workers.take_down_orphan(uid);
            }
        }
        self.workers.means().allocator.keep_only(|uid| self.workers.knows(uid) || running.iter().any(|r| r == uid));
        let in_runtime: HashSet<&String> = running.iter().collect();
        let is_orphan = |uid: &str| !in_runtime.contains(&uid.to_owned()) && !self.workers.knows(uid);
        for uid in self.runtime.cgroups.pod_uids().into_iter().filter(|uid| is_orphan(uid)) {
            self.runtime.with_cgroups(move |cgroups| cgroups.remove_pod(&uid)).await;
        }
        let (mut cleaned, mut failed) = (0, 0);
        for uid in names_in(&self.runtime.node.root_dir.join("pods")).into_iter().filter(|uid| is_orphan(uid)) {
            let dir = self.runtime.node.pod_dir(&uid);
            match self.volumes.unmount_pod(&uid, &dir).await {
                Ok(()) => {
                    cleaned += 1;
                    if let Err(error) = std::fs::remove_dir_all(&dir) {
                        warn!(uid, %error, "directory of a pod that is gone not removed");
                    } else {
                        info!(uid, "directory of a pod that is gone removed");
                    }
                }
                Err(error) => {
                    failed += 1;
                    warn!(uid, %error, "volumes of a pod that is gone not unmounted");
                }
            }
        }
        managers().orphans_cleaned.set(cleaned);
        managers().orphans_failed.set(failed);
        for name in names_in(&self.runtime.node.pod_logs_dir) {
            // <namespace>_<name>_<uid>
            if let Some(uid) = name.rsplit('_').next().filter(|uid| *uid != name && is_orphan(uid)) {
                debug!(uid, "logs of a pod that is gone removed");
                let _ = std::fs::remove_dir_all(self.runtime.node.pod_logs_dir.join(&name));
                logs::remove_dead_links(&self.runtime.node.container_logs_dir);
            }
        }
    }

    async fn rotate_logs(&self) {
        let (max_bytes, max_files) = (self.config.container_log_max_size_bytes, self.config.container_log_max_files);
        let mut pods = self.workers.pods();
        let base = self.runtime.node.pod_logs_dir.clone();
        // Only of pods that have a log to rotate the runtime is asked.
        let large = tokio::task::spawn_blocking(move || {
            pods.retain(|pod| logs::any_large(&logs::pod_dir(&base, pod), max_bytes));
            pods
        });
        let stamp = Timestamp::now().strftime("%Y%m%d-%H%M%S").to_string();
        for pod in large.await.unwrap_or_default() {
            let Ok(observed) = self.runtime.observe(uid_of(&pod)).await else { continue };
            let running = observed.containers.iter().filter(|c| c.state == State::Running && !c.log_path.is_empty());
            for container in running {
                let (path, at) = (container.log_path.clone(), stamp.clone());
                let rotate = move || logs::rotate(Path::new(&path), max_bytes, max_files, &at);
                match tokio::task::spawn_blocking(rotate).await {
                    Ok(Ok(true)) => {
                        if let Err(error) = self.runtime.cri.reopen_container_log(&container.id).await {
                            let kept = logs::put_back(Path::new(&container.log_path), &stamp);
                            warn!(container = %container.id, %error, kept = kept.is_ok(), "container log not reopened");
                        }
                    }
                    Ok(Ok(false)) | Err(_) => {}
                    Ok(Err(error)) => debug!(log = %container.log_path, %error, "container log not rotated"),
                }
            }
        }
    }
}

fn names_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect()
}
