//! Events about pods and their containers, so many a second.

use std::time::{Duration, Instant};

use component_base::events::{Recorder, Type, reference};
use k8s_openapi::api::core::v1::{ObjectReference, Pod};

use tokio::sync::mpsc;
use tracing::debug;

use crate::rate::Limit;
use crate::runtime::pods::{ContainerKind, find_container};
use crate::static_pods;

/// Events that wait until they may be written; what comes when there are so many is dropped.
const QUEUE: usize = 1000;
/// Events are written this much later: what they tell of is still going on, and its own writes go before.
const LATER: Duration = Duration::from_millis(250);

/// Writes the kubelet's events.
pub struct Events {
    recorder: Recorder,
    waiting: Option<mpsc::Sender<Waiting>>,
}

type Waiting = (Instant, ObjectReference, Type, String, String);

impl Events {
    /// At most so many a second (0: any number), and so many at once after a pause (`eventRecordQPS`, `eventBurst`).
    pub fn new(recorder: Recorder, per_second: i32, burst: i32) -> Self {
        let (waiting, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(write_in_time(recorder.clone(), Limit::new(per_second, burst), receiver));
        Self { recorder, waiting: Some(waiting) }
    }

    /// Nowhere to write to.
    pub fn discard() -> Self {
        Self { recorder: Recorder::discard(), waiting: None }
    }

    /// An event about a pod, or about one of its containers.
    pub fn pod(&self, pod: &Pod, container: Option<&str>, kind: Type, reason: &str, message: impl Into<String>) {
        self.about(&Self::object(pod, container), kind, reason, message);
    }

    /// As [`Events::pod`], for who keeps no pod.
    pub fn about(&self, object: &ObjectReference, kind: Type, reason: &str, message: impl Into<String>) {
        match &self.waiting {
            None => self.recorder.event(object, kind, reason, "", message),
            Some(waiting) => {
                let event = (Instant::now(), object.clone(), kind, reason.to_owned(), message.into());
                if waiting.try_send(event).is_err() {
                    debug!(reason, "event dropped: too many wait");
                }
            }
        }
    }

    /// What events about a pod, or about one of its containers, are about.
    pub fn object(pod: &Pod, container: Option<&str>) -> ObjectReference {
        let mut object = reference(pod);
        object.api_version = Some("v1".to_owned());
        object.kind = Some("Pod".to_owned());
        // The mirror of a static pod has the static pod's UID as far as events go.
        if static_pods::is_static(pod) {
            object.uid = pod.metadata.annotations.as_ref().and_then(|a| a.get(static_pods::CONFIG_HASH)).cloned();
        }
        object.field_path = container.map(|name| field_path(pod, name));
        object
    }

    pub fn node(&self, name: &str, kind: Type, reason: &str, message: impl Into<String>) {
        let object = ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(name.to_owned()),
            uid: Some(name.to_owned()),
            ..Default::default()
        };
        self.about(&object, kind, reason, message);
    }
}

async fn write_in_time(recorder: Recorder, mut limit: Option<Limit>, mut waiting: mpsc::Receiver<Waiting>) {
    while let Some((since, object, kind, reason, message)) = waiting.recv().await {
        tokio::time::sleep_until((since + LATER).into()).await;
        while let Some(limit) = limit.as_mut()
            && !limit.take(Instant::now())
        {
            tokio::time::sleep(limit.refills_in()).await;
        }
        recorder.event(&object, kind, &reason, "", message);
    }
}

/// Where in the pod a container stands: `spec.containers{name}`.
fn field_path(pod: &Pod, name: &str) -> String {
    let kind = find_container(pod, name).map_or(ContainerKind::App, |(kind, _)| kind);
    let list = match kind {
        ContainerKind::Init => "initContainers",
        ContainerKind::App => "containers",
        ContainerKind::Ephemeral => "ephemeralContainers",
    };
    format!("spec.{list}{{{name}}}")
}
