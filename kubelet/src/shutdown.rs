//! Graceful node shutdown: when the machine is about to go down, no pod is taken any more, and those that run are ended, the least
//! important first, each group within a time of its own, before the machine goes on. As Kubernetes' node shutdown manager.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::KubeletConfiguration;
use crate::metrics::{managers, now_seconds};
use crate::pod_workers::PodWorkers;
use crate::runtime::Runtime;
use crate::runtime::pods::{grace_seconds, uid_of};
use crate::status::Ended;
use crate::systemd;

/// Priority from which a pod is critical.
const SYSTEM_CRITICAL: i32 = 2_000_000_000;
const POLL: Duration = Duration::from_millis(200);
/// Pause before systemd is listened to again.
const RETRY: Duration = Duration::from_secs(5);

/// Whether the node is going down. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Shutdown(Arc<Mutex<bool>>);

impl Shutdown {
    pub fn is_near(&self) -> bool {
        *self.0.lock()
    }

    pub fn admit(&self) -> Result<(), Ended> {
        if !self.is_near() {
            return Ok(());
        }
        Err(Ended::new("NodeShutdown", "Pod was rejected as the node is shutting down."))
    }
}

/// From which priority on, and within how many seconds, pods end; the lowest first.
fn groups(config: &KubeletConfiguration) -> Vec<(i32, u64)> {
    let mut groups = config.shutdown_grace_period_by_pod_priority.clone();
    if groups.is_empty() && !config.shutdown_grace_period.is_zero() {
        let critical = config.shutdown_grace_period_critical_pods.as_secs();
        groups =
            vec![(0, config.shutdown_grace_period.as_secs().saturating_sub(critical)), (SYSTEM_CRITICAL, critical)];
    }
    groups.sort_unstable();
    groups
}

/// The pods of each group: a pod is in the last one whose priority is not above its own, or in the first.
fn grouped(pods: Vec<Arc<Pod>>, groups: &[(i32, u64)]) -> Vec<(u64, Vec<Arc<Pod>>)> {
    let mut out: Vec<(u64, Vec<Arc<Pod>>)> = groups.iter().map(|(_, seconds)| (*seconds, Vec::new())).collect();
    for pod in pods {
        let priority = pod.spec.as_ref().and_then(|s| s.priority).unwrap_or(0);
        let index = groups.iter().rposition(|(from, _)| *from <= priority).unwrap_or(0);
        if let Some((_, group)) = out.get_mut(index) {
            group.push(pod);
        }
    }
    out
}

/// Waits for word of a shutdown, where the configuration gives pods time at one. What the node's events are to say is told.
pub async fn follow(
    config: Arc<KubeletConfiguration>,
    workers: Arc<PodWorkers>,
    runtime: Arc<Runtime>,
    near: Shutdown,
    tell: impl Fn(&str) + Send + 'static,
    stop: CancellationToken,
) {
    let groups = groups(&config);
    let total = Duration::from_secs(groups.iter().map(|(_, seconds)| seconds).sum());
    if total.is_zero() {
        return;
    }
    let (sender, mut receiver) = mpsc::channel(4);
    let listening = async {
        loop {
            if let Err(error) = systemd::watch_shutdown(sender.clone()).await {
                warn!(%error, "no word of shutdowns: busctl does not run");
            }
            tokio::time::sleep(RETRY).await;
        }
    };
    let acting = async {
        let mut inhibitor = systemd::inhibit_shutdown(total).await;
        while let Some(begins) = receiver.recv().await {
            *near.0.lock() = begins;
            if begins {
                tell("Shutdown manager detected shutdown event");
                info!(?total, "the node is shutting down: pods are ended");
                managers().shutdown_start.set(now_seconds());
                end_pods(&workers, &runtime, &groups).await;
                managers().shutdown_end.set(now_seconds());
                inhibitor = None;
            } else {
                tell("Shutdown manager detected shutdown cancellation");
                info!("the shutdown was called off");
                inhibitor = match inhibitor {
                    Some(held) => Some(held),
                    None => systemd::inhibit_shutdown(total).await,
                };
            }
        }
        drop(inhibitor);
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = listening => {}
        () = acting => {}
    }
}

async fn end_pods(workers: &Arc<PodWorkers>, runtime: &Arc<Runtime>, groups: &[(i32, u64)]) {
    let pods = workers.pods().into_iter().filter(|pod| !apimachinery::pod::is_terminal(pod)).collect();
    for (seconds, pods) in grouped(pods, groups).into_iter().filter(|(_, pods)| !pods.is_empty()) {
        let until = Instant::now() + Duration::from_secs(seconds);
        let mut left: Vec<String> = Vec::new();
        for pod in &pods {
            let grace = grace_seconds(pod).min(i64::try_from(seconds).unwrap_or(i64::MAX)).max(1);
            let message = "Pod was terminated in response to imminent node shutdown.";
            let ended = Ended::new("Terminated", message).by_the_node();
            workers.end(uid_of(pod), ended, Some(grace));
            left.push(uid_of(pod).to_owned());
        }
        while !left.is_empty() && Instant::now() < until {
            let mut still = Vec::new();
            for uid in left {
                if !runtime.observe(&uid).await.is_ok_and(|observed| observed.is_stopped()) {
                    still.push(uid);
                }
            }
            left = still;
            tokio::time::sleep(POLL).await;
        }
        info!(pods = pods.len(), late = left.len(), "a group of pods has ended");
    }
    // Their last statuses are on their way.
    tokio::time::sleep(Duration::from_secs(1)).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_least_important_end_first() {
        let pod = |name: &str, priority: i32| -> Arc<Pod> {
            Arc::new(
                serde_json::from_value(
                    json!({"metadata": {"name": name}, "spec": {"priority": priority, "containers": []}}),
                )
                .unwrap(),
            )
        };
        let all = || vec![pod("critical", SYSTEM_CRITICAL + 5), pod("plain", 0), pod("low", -5), pod("high", 1000)];
        let show = |config: KubeletConfiguration| -> Vec<(u64, String)> {
            let name = |pod: &Arc<Pod>| pod.metadata.name.clone().unwrap_or_default();
            let of =
                |(seconds, pods): (u64, Vec<Arc<Pod>>)| (seconds, pods.iter().map(name).collect::<Vec<_>>().join(" "));
            grouped(all(), &groups(&config)).into_iter().map(of).collect()
        };
        assert_eq!(show(KubeletConfiguration::default()), []);
        let two = KubeletConfiguration {
            shutdown_grace_period: Duration::from_secs(30),
            shutdown_grace_period_critical_pods: Duration::from_secs(10),
            ..Default::default()
        };
        assert_eq!(show(two), [(20, "plain low high".to_owned()), (10, "critical".to_owned())]);
        let many = KubeletConfiguration {
            shutdown_grace_period_by_pod_priority: vec![(1000, 5), (0, 3), (SYSTEM_CRITICAL, 7)],
            ..Default::default()
        };
        assert_eq!(show(many), [(3, "plain low".to_owned()), (5, "high".to_owned()), (7, "critical".to_owned())]);
    }
}
