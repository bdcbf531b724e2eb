//! The container runtime as the kubelet sees it: a CRI client, what runs now, and how a pod's spec becomes CRI messages.
//!
//! `cri` speaks; `observed` is what was heard; `sandbox`, `container`, `security`, `resources` and `dns` are pure
//! translations; `cgroups` and `logs` are the files beside it; `Runtime` puts them together.

pub mod cgroups;
pub mod container;
pub mod cri;
pub mod dns;
pub mod hollow;
pub mod labels;
pub mod logs;
pub mod observed;
pub mod pods;
pub mod resources;
pub mod sandbox;
pub mod security;
pub mod selinux;
pub mod user_ids;
mod watch;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use cgroups::Cgroups;
use cri::{Cri, CriError};
use observed::{ObservedContainer, ObservedPod, State};

use user_ids::UserIds;
pub use watch::{PodStates, RuntimeWatch};

/// How long a pod that is being started holds the next ones up: one that hangs, or waits for an image, harms none.
const TURN: Duration = Duration::from_secs(1);
/// How many ended containers' statuses are remembered (they never change).
const ENDED_CACHE: usize = 4096;

/// Whether a runtime of this name and version mounts images as volumes: CRI does not tell. Of others than those known the
/// runtime's own word is waited for.
pub fn has_image_volumes(name: &str, version: &str) -> bool {
    let mut numbers = version.split(['.', '-', '~', '+']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match name {
        "containerd" => version >= (2, 1),
        "cri-o" => version >= (1, 31),
        _ => true,
    }
}

/// Facts of the node that a pod's translation depends on; fixed while the kubelet runs.
#[derive(Debug, Clone)]
pub struct NodeSettings {
    pub root_dir: PathBuf,
    pub pod_logs_dir: PathBuf,
    pub container_logs_dir: PathBuf,
    /// How many user IDs a pod gets that wants its own.
    pub ids_per_pod: u32,
    pub dns: dns::NodeDns,
    pub policy: security::NodePolicy,
    pub kernel: resources::Kernel,
    /// Lower scores cannot be set here (no CAP_SYS_RESOURCE).
    pub lowest_oom_score_adj: i64,
    /// What the runtime offers, by handler.
    pub handlers: Vec<proto::cri::RuntimeHandler>,
    /// The runtime can leave out the groups that an image gives its user.
    pub strict_groups: bool,
}

impl NodeSettings {
    /// What a handler of the runtime can do (empty: the default one).
    pub fn features(&self, handler: &str) -> proto::cri::RuntimeHandlerFeatures {
        let found = self.handlers.iter().find(|h| h.name == handler);
        found.and_then(|h| h.features).unwrap_or_default()
    }

    /// `<root>/pods/<uid>`.
    pub fn pod_dir(&self, uid: &str) -> PathBuf {
        self.root_dir.join("pods").join(uid)
    }
}

/// The runtime with what the kubelet keeps about it.
pub struct Runtime {
    pub cri: Cri,
    pub node: NodeSettings,
    pub cgroups: Cgroups,
    pub user_ids: UserIds,
    /// Starts keep processors busy: a few pods at a time are started sooner than all at once.
    turns: Arc<Semaphore>,
    /// Volumes are made for a few more at a time: what that needs of memory is needed a few times.
    preparing: Arc<Semaphore>,
    /// Statuses of ended containers by ID, and when they were first seen so.
    ended: Mutex<HashMap<String, (Instant, ObservedContainer)>>,
}

impl Runtime {
    pub fn new(cri: Cri, node: NodeSettings, cgroups: Cgroups) -> Arc<Self> {
        let user_ids = UserIds::read(&node.root_dir.join("pods"), node.ids_per_pod);
        let at_once = 2 * std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let turns = Arc::new(Semaphore::new(at_once.max(4)));
        let preparing = Arc::new(Semaphore::new(4 * at_once.max(4)));
        Arc::new(Self { cri, node, cgroups, user_ids, turns, preparing, ended: Mutex::default() })
    }

    /// Waits until it is a pod's turn to be started. The turn ends when what is returned is dropped, or by itself.
    pub async fn turn(&self) -> AbortOnDropHandle<()> {
        Self::turn_of(&self.turns).await
    }

    /// As [`Runtime::turn`], for having volumes made.
    pub async fn turn_to_prepare(&self) -> AbortOnDropHandle<()> {
        Self::turn_of(&self.preparing).await
    }

    async fn turn_of(turns: &Arc<Semaphore>) -> AbortOnDropHandle<()> {
        let permit = turns.clone().acquire_owned().await;
        AbortOnDropHandle::new(tokio::spawn(async move {
            tokio::time::sleep(TURN).await;
            drop(permit);
        }))
    }

    /// Work on the cgroups of pods: at once where they are files, else beside all other work. None: the kubelet ends.
    pub async fn with_cgroups<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Cgroups) -> T + Send + 'static,
    ) -> Option<T> {
        if !self.cgroups.asks_systemd() {
            return Some(work(&self.cgroups));
        }
        let runtime = self.clone();
        tokio::task::spawn_blocking(move || work(&runtime.cgroups)).await.ok()
    }

    /// All that the runtime has of one pod, right now.
    pub async fn observe(&self, uid: &str) -> Result<ObservedPod, CriError> {
        let filter: BTreeMap<String, String> = [(labels::POD_UID.to_owned(), uid.to_owned())].into();
        let (sandboxes, containers) =
            tokio::try_join!(self.cri.list_pod_sandboxes_with(filter.clone()), self.cri.list_containers_with(filter))?;
        let mut out = ObservedPod { uid: uid.to_owned(), ..Default::default() };
        for listed in sandboxes {
            if let Some(metadata) = &listed.metadata {
                out.name = metadata.name.clone();
                out.namespace = metadata.namespace.clone();
            }
            out.sandboxes.extend(self.sandbox(&listed.id).await?);
        }
        for listed in containers {
            out.containers.extend(self.container(&listed.id, &listed.pod_sandbox_id).await?);
        }
        out.sort();
        Ok(out)
    }

    /// A sandbox, by its ID.
    pub async fn sandbox(&self, id: &str) -> Result<Option<observed::Sandbox>, CriError> {
        match self.cri.pod_sandbox_status(id, false).await {
            Ok(answer) => Ok(answer.status.map(observed::sandbox)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A container, by its ID. What has ended once is remembered.
    pub async fn container(&self, id: &str, sandbox_id: &str) -> Result<Option<ObservedContainer>, CriError> {
        if let Some((since, known)) = self.ended.lock().get(id) {
            return Ok(Some(ObservedContainer { ended_for: since.elapsed(), ..known.clone() }));
        }
        let status = match self.cri.container_status(id).await {
            Ok(status) => status,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut seen = observed::container(status, sandbox_id);
        if seen.state == State::Exited {
            seen.message = self.final_message(&seen);
            let mut ended = self.ended.lock();
            if ended.len() >= ENDED_CACHE {
                ended.clear();
            }
            ended.insert(seen.id.clone(), (Instant::now(), seen.clone()));
        }
        Ok(Some(seen))
    }

    /// The termination message of an ended container, with what the runtime itself has to say.
    fn final_message(&self, ended: &ObservedContainer) -> String {
        let own = logs::termination_message(
            &ended.annotated,
            ended.termination_file.as_deref(),
            ended.exit_code,
            &ended.reason,
            &ended.log_path,
        );
        match (ended.message.is_empty(), own.is_empty()) {
            (true, _) => own,
            (false, true) => ended.message.clone(),
            (false, false) => format!("{}: {own}", ended.message),
        }
    }

    /// Forgets removed containers.
    pub fn forget(&self, container_id: &str) {
        self.ended.lock().remove(container_id);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn runtimes_that_mount_images_are_known() {
        for (name, version, want) in [
            ("containerd", "1.6.20~ds1", false),
            ("containerd", "2.1.0", true),
            ("cri-o", "1.30.2", false),
            ("other", "", true),
        ] {
            assert_eq!(super::has_image_volumes(name, version), want, "{name} {version}");
        }
    }
}
