//! Brings statuses to the API: the newest per pod, one write at a time per pod, some pods at once. Failed writes are tried
//! again; what was overtaken is never sent: that a pod only begins is told when it still does a moment later. When a deleted pod has ended, its API object is deleted for good.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Resource as _};
use parking_lot::Mutex;
use serde::de::IgnoredAny;
use serde_json::Value;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::patch;
use crate::metrics::managers;
use crate::runtime::pods::{full_name, uid_of};
use crate::static_pods;

/// Pods whose statuses are written at the same time.
const WRITERS: usize = 8;
/// Pause after which failed writes are tried again.
const RETRY: Duration = Duration::from_secs(2);
/// How long the word that a pod begins waits for a better one. A start writes to disks what a write to the API would hold up.
const BEGINNING: Duration = Duration::from_millis(200);
/// How often everything is compared with the API, in case a write was lost or undone.
const RECONCILE: Duration = Duration::from_secs(10);

/// Finds the API's object of a pod by namespace and name.
pub type Lookup = Arc<dyn Fn(&str, &str) -> Option<Arc<Pod>> + Send + Sync>;

struct Entry {
    pod: Arc<Pod>,
    status: PodStatus,
    /// Changed since it was last written.
    dirty: bool,
    /// Not to be written before this.
    due: Instant,
    /// Since when the API does not have it.
    untold: Option<Instant>,
    writing: bool,
    /// What the API holds after our last write, until its watch shows it.
    written: Option<PodStatus>,
    /// All that the pod was has been taken down: a deleted pod may go.
    finished: bool,
    delete_sent: bool,
}

/// The statuses of this node's pods.
pub struct StatusManager {
    client: Option<kube::Client>,
    entries: Mutex<HashMap<String, Entry>>,
    wake: Notify,
    lookup: Lookup,
}

impl StatusManager {
    /// Without a client (standalone) statuses are only kept.
    pub fn start(client: Option<kube::Client>, lookup: Lookup, shutdown: CancellationToken) -> Arc<Self> {
        let manager = Arc::new(Self { client, entries: Mutex::default(), wake: Notify::new(), lookup });
        if manager.client.is_some() {
            tokio::spawn(manager.clone().write_forever(shutdown));
        }
        manager
    }

    /// The newest status of a pod: as set here, else as the pod came.
    pub fn get(&self, pod: &Pod) -> PodStatus {
        match self.entries.lock().get(uid_of(pod)) {
            Some(entry) => entry.status.clone(),
            // A static pod's status is remembered by its mirror.
            None if static_pods::is_static(pod) => {
                self.target(pod).and_then(|mirror| mirror.status.clone()).unwrap_or_default()
            }
            None => pod.status.clone().unwrap_or_default(),
        }
    }

    /// Whether the pod has, in the API, the status that was last set here, or that was last written.
    pub fn has_told(&self, pod: &Pod) -> bool {
        let entries = self.entries.lock();
        let told =
            |entry: &Entry, status: &PodStatus| entry.status == *status || entry.written.as_ref() == Some(status);
        entries.get(uid_of(pod)).zip(pod.status.as_ref()).is_some_and(|(entry, status)| told(entry, status))
    }

    /// Whether the pod's phase, as told here, is a final one.
    pub fn is_over(&self, pod: &Pod) -> bool {
        let phase = |status: &PodStatus| matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        self.entries.lock().get(uid_of(pod)).is_some_and(|entry| phase(&entry.status))
    }

    /// Sets a pod's status; it is written if it differs.
    pub fn set(&self, pod: &Arc<Pod>, status: PodStatus) {
        let now = Instant::now();
        let due = if only_begins(&status) { now + BEGINNING } else { now };
        let mut entries = self.entries.lock();
        match entries.get_mut(uid_of(pod)) {
            Some(entry) => {
                entry.pod = pod.clone();
                if entry.status == status {
                    return;
                }
                entry.status = status;
                entry.untold.get_or_insert(now);
                entry.due = if entry.dirty { due.min(entry.due) } else { due };
                entry.dirty = true;
            }
            None => {
                let entry = Entry {
                    pod: pod.clone(),
                    status,
                    dirty: true,
                    due,
                    untold: Some(now),
                    writing: false,
                    written: None,
                    finished: false,
                    delete_sent: false,
                };
                entries.insert(uid_of(pod).to_owned(), entry);
            }
        }
        drop(entries);
        self.wake.notify_one();
    }

    /// Nothing of the pod is left on this node: if it is deleted, its object may go.
    pub fn finished(&self, pod: &Arc<Pod>) {
        if let Some(entry) = self.entries.lock().get_mut(uid_of(pod)) {
            entry.pod = pod.clone();
            entry.finished = true;
            entry.dirty = true;
            entry.due = Instant::now();
        }
        self.wake.notify_one();
    }

    /// The API has a new object of that name (a mirror): it may lack what is known here.
    pub fn nudge(&self, namespace: &str, name: &str) {
        let same = |pod: &Pod| {
            pod.metadata.name.as_deref() == Some(name)
                && pod.metadata.namespace.as_deref().unwrap_or("default") == namespace
        };
        for entry in self.entries.lock().values_mut().filter(|e| same(&e.pod)) {
            entry.written = None;
            entry.dirty = true;
        }
        self.wake.notify_one();
    }

    /// The pod is gone from the API (or from disk).
    pub fn forget(&self, uid: &str) {
        self.entries.lock().remove(uid);
    }

    /// The pods with their newest statuses, for the server.
    pub fn pods(&self) -> Vec<Pod> {
        self.entries.lock().values().map(|e| Pod { status: Some(e.status.clone()), ..Pod::clone(&e.pod) }).collect()
    }

    async fn write_forever(self: Arc<Self>, shutdown: CancellationToken) {
        let permits = Arc::new(Semaphore::new(WRITERS));
        let mut reconcile = tokio::time::interval(RECONCILE);
        reconcile.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let due = self.next_due();
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.wake.notified() => {}
                _ = reconcile.tick() => self.mark_drifted(),
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {}
            }
            while let Some(uid) = self.next_dirty() {
                let Ok(permit) = permits.clone().acquire_owned().await else { return };
                let manager = self.clone();
                tokio::spawn(async move {
                    let done = manager.write(&uid).await;
                    if let Some(entry) = manager.entries.lock().get_mut(&uid) {
                        entry.writing = false;
                        if !done {
                            (entry.dirty, entry.due) = (true, Instant::now() + RETRY);
                        }
                    }
                    drop(permit);
                    manager.wake.notify_one();
                });
            }
        }
    }

    /// A pod to write now; marks it as being written.
    fn next_dirty(&self) -> Option<String> {
        let mut entries = self.entries.lock();
        let now = Instant::now();
        let (uid, entry) = entries.iter_mut().find(|(_, e)| e.dirty && !e.writing && e.due <= now)?;
        entry.dirty = false;
        entry.writing = true;
        Some(uid.clone())
    }

    /// When the next one is to be written.
    fn next_due(&self) -> Option<Instant> {
        self.entries.lock().values().filter(|e| e.dirty && !e.writing).map(|e| e.due).min()
    }

    /// Marks pods whose object in the API does not say what was written (another's write, a lost one).
    fn mark_drifted(&self) {
        for entry in self.entries.lock().values_mut() {
            let told = self.target(&entry.pod).is_some_and(|target| target.status.as_ref() == Some(&entry.status));
            // The watch has shown what was written long ago.
            entry.written = None;
            entry.dirty |= !told || (entry.finished && !entry.delete_sent);
        }
    }

    /// The API's object to write to: the pod itself, or the mirror of a static one.
    fn target(&self, pod: &Pod) -> Option<Arc<Pod>> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let found = (self.lookup)(namespace, pod.metadata.name.as_deref().unwrap_or_default())?;
        let same =
            if static_pods::is_static(pod) { static_pods::is_mirror(&found) } else { uid_of(&found) == uid_of(pod) };
        same.then_some(found)
    }

    /// Writes one pod's status, and deletes its object if that is due. False: try again.
    async fn write(&self, uid: &str) -> bool {
        let Some(client) = self.client.clone() else { return true };
        let (pod, status, written, finished) = {
            let entries = self.entries.lock();
            let Some(entry) = entries.get(uid) else { return true };
            (entry.pod.clone(), entry.status.clone(), entry.written.clone(), entry.finished && !entry.delete_sent)
        };
        // Not in the API (yet, or any more): its arrival there, or the reconciliation, brings us back.
        let Some(target) = self.target(&pod) else { return true };
        let namespace = target.metadata.namespace.as_deref().unwrap_or("default");
        let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let name = target.metadata.name.clone().unwrap_or_default();
        let base = written.unwrap_or_else(|| target.status.clone().unwrap_or_default());
        let patch = patch::patch(uid_of(&target), &base, &status);
        let told_already = patch.is_none();
        if let Some(patch) = patch {
            match patch_status(&client, namespace, &name, &patch).await {
                Ok(()) => {
                    debug!(pod = %full_name(&pod), phase = status.phase.as_deref(), "status written");
                    if let Some(entry) = self.entries.lock().get_mut(uid) {
                        // What has changed meanwhile is counted on.
                        if entry.status == status
                            && let Some(since) = entry.untold.take()
                        {
                            managers().status_seconds.observe(since.elapsed().as_secs_f64());
                        }
                        entry.written = Some(status);
                    }
                }
                Err(kube::Error::Api(error)) if error.code == 404 || (error.code == 409 && !finished) => {
                    debug!(pod = %full_name(&pod), %error, "status not written: the pod is gone or another");
                    return true;
                }
                Err(error) => {
                    warn!(pod = %full_name(&pod), %error, "status not written");
                    return false;
                }
            }
        }
        // There was nothing to tell.
        if told_already && let Some(entry) = self.entries.lock().get_mut(uid) {
            entry.untold = None;
        }
        if finished && target.metadata.deletion_timestamp.is_some() && !static_pods::is_static(&pod) {
            let preconditions = Preconditions { uid: Some(uid_of(&target).to_owned()), resource_version: None };
            let parameters = DeleteParams {
                grace_period_seconds: Some(0),
                preconditions: Some(preconditions),
                ..Default::default()
            };
            match api.delete(&name, &parameters).await {
                Ok(_) => info!(pod = %full_name(&pod), "deleted: nothing of it is left here"),
                Err(kube::Error::Api(error)) if matches!(error.code, 404 | 409) => {}
                Err(error) => {
                    warn!(pod = %full_name(&pod), %error, "pod not deleted");
                    return false;
                }
            }
            if let Some(entry) = self.entries.lock().get_mut(uid) {
                entry.delete_sent = true;
            }
        }
        true
    }
}

/// Whether it says no more than that the pod is here: its sandbox is still to come.
fn only_begins(status: &PodStatus) -> bool {
    status.phase.as_deref() == Some("Pending") && status.pod_ip.is_none()
}

/// Nobody reads the answer: the watch tells, too.
async fn patch_status(client: &kube::Client, namespace: &str, name: &str, patch: &Value) -> Result<(), kube::Error> {
    let pods = kube::core::Request::new(Pod::url_path(&(), Some(namespace)));
    let request = pods
        .patch_subresource("status", name, &PatchParams::default(), &Patch::Strategic(patch))
        .map_err(kube::Error::BuildRequest)?;
    client.request::<IgnoredAny>(request).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[tokio::test]
    async fn that_a_pod_begins_can_wait_and_nothing_else() {
        let lookup: Lookup = Arc::new(|_, _| None);
        let manager = StatusManager::start(None, lookup, CancellationToken::new());
        let pod: Arc<Pod> = Arc::new(serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u"}})).unwrap());
        let set = |status| manager.set(&pod, serde_json::from_value(status).unwrap());
        let begun = Instant::now();
        set(json!({"phase": "Pending"}));
        assert!(manager.next_due().is_some_and(|due| due >= begun + BEGINNING));
        set(json!({"phase": "Pending", "podIP": "10.0.0.1"}));
        assert!(manager.next_due().is_some_and(|due| due <= Instant::now()));
        assert_eq!(manager.next_dirty().as_deref(), Some("u"));
        // What is being written is not written twice at once.
        set(json!({"phase": "Running", "podIP": "10.0.0.1"}));
        assert!(manager.next_due().is_none() && manager.next_dirty().is_none());
        manager.entries.lock().get_mut("u").unwrap().writing = false;
        assert_eq!(manager.next_dirty().as_deref(), Some("u"));
        assert!(only_begins(&PodStatus { phase: Some("Pending".into()), ..Default::default() }));
        assert!(!only_begins(&PodStatus { phase: Some("Failed".into()), ..Default::default() }));
    }
}
