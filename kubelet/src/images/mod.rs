//! Images: whether a container's image is there, and if it is not, fetching it over CRI.
//!
//! [`Puller::ensure`] is the one entry, called before a container is made. It never fetches what is present under
//! `IfNotPresent`, holds back after a failure (10 s doubling to 5 min, per pod and image), and fetches at most a few images at a
//! time; two containers that want the same image share one fetch. Errors carry the waiting reason that the API shows.

pub mod collector;
pub mod credentials;
pub mod gc;
pub mod providers;
pub mod pulled;
pub mod reference;

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Pod, Secret};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use crate::metrics::managers;
use crate::objects::Objects;
use crate::rate::Limit;
use crate::runtime::cri::{Cri, CriError};
use credentials::{Credentials, Keyring};
use providers::Providers;
use pulled::{Access, PulledRecords, SecretSource};
use reference::{ImageReference, PullPolicy};

/// What [`Images`] asks of the container runtime. The CRI client is the real one.
pub trait ImageService: Send + Sync + 'static {
    /// The image, if the runtime has it.
    fn status(&self, image: &str) -> impl Future<Output = Result<Option<PresentImage>, String>> + Send;
    /// Fetch the image; the result is its reference (a digest or id) for the container's config.
    fn pull(&self, image: &str, auth: Option<Credentials>) -> impl Future<Output = Result<String, FetchError>> + Send;
}

/// A present image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageRef {
    /// What to give to CreateContainer (the runtime's image ID).
    pub id: String,
    /// The UID or user name of the image's own user, for runAsNonRoot.
    pub uid: Option<i64>,
    pub username: String,
}

/// An image that the runtime has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PresentImage {
    pub image: ImageRef,
    pub size_bytes: u64,
}

/// A fetch that failed, as the runtime tells it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct FetchError {
    pub message: String,
    /// The registry could not be reached, as opposed to having refused.
    pub registry_unavailable: bool,
}

/// Why a container waits for its image: the reasons of container statuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullReason {
    ErrImagePull,
    ImagePullBackOff,
    ErrImageNeverPull,
    InvalidImageName,
    ImageInspectError,
    RegistryUnavailable,
}

/// A container's image is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct PullError {
    pub reason: PullReason,
    pub message: String,
}

/// Something to record as an event on the pod, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageEvent {
    pub warning: bool,
    pub reason: &'static str,
    pub message: String,
}

/// How long an image that was there counts as there: if it went meanwhile, the container cannot be made, and it is asked for again.
const SEEN_FOR: Duration = Duration::from_secs(10);
const MAX_SEEN: usize = 256;
/// How many images are fetched at once where the configuration sets no limit of its own.
pub const DEFAULT_PARALLEL_PULLS: usize = 3;
const BACK_OFF_START: Duration = Duration::from_secs(10);
const BACK_OFF_MAX: Duration = Duration::from_secs(300);
/// A fetch that the runtime doesn't end by then is given up: far beyond any image's time, there to bound a hung registry.
const PULL_TIMEOUT: Duration = Duration::from_secs(30 * 60);
const MAX_BACK_OFF_ENTRIES: usize = 4096;

/// Whom an image is for: a pod waits out its own failures.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct BackOffKey {
    pod_uid: String,
    image: String,
}

#[derive(Debug, Clone)]
struct BackOffState {
    delay: Duration,
    since: Instant,
    last_error: PullError,
}

/// The image's reference, and the secret that opened the registry.
type PullOutcome = Result<(String, Option<SecretSource>), FetchError>;

/// Makes images present for pods: [`Images`] over CRI, with the pod's pull secrets and its events.
pub struct Puller {
    images: Images<Cri>,
    objects: Objects,
    providers: Option<Providers>,
    record: Option<Box<dyn Fn(&Pod, ImageEvent) + Send + Sync>>,
}

// === impl Puller ===

impl Puller {
    pub fn new(cri: Cri, objects: impl Into<Objects>) -> Self {
        Self {
            images: Images::new(Arc::new(cri), DEFAULT_PARALLEL_PULLS),
            objects: objects.into(),
            providers: None,
            record: None,
        }
    }

    /// At most `parallel_pulls` fetches at once (`serializeImagePulls`: 1).
    pub fn with_parallel_pulls(mut self, parallel_pulls: usize) -> Self {
        self.images.pulls = Arc::new(Semaphore::new(parallel_pulls.max(1)));
        self
    }

    /// At most so many fetches a second (0: any number), and so many at once after a pause (`registryPullQPS`, `registryBurst`).
    pub fn with_limit(mut self, per_second: i32, burst: i32) -> Self {
        self.images.limit = Limit::new(per_second, burst).map(Mutex::new);
        self
    }

    /// With programs of the host's that know how to log in to registries.
    pub fn with_providers(mut self, providers: Option<Providers>) -> Self {
        self.providers = providers;
        self
    }

    /// With records of what was fetched with whose credentials.
    pub fn with_records(mut self, records: Arc<PulledRecords>) -> Self {
        self.images.records = Some(records);
        self
    }

    /// Where events go (Pulling, Pulled, Failed, BackOff …).
    pub fn with_events(mut self, record: impl Fn(&Pod, ImageEvent) + Send + Sync + 'static) -> Self {
        self.record = Some(Box::new(record));
        self
    }

    /// The image, pulled if its policy (empty: by tag) says so, with the pod's imagePullSecrets.
    pub async fn ensure(&self, pod: &Pod, image: &str, policy: Option<&str>) -> Result<ImageRef, PullError> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let record = |event: ImageEvent| match &self.record {
            Some(record) => record(pod, event),
            None => tracing::debug!(reason = event.reason, message = event.message, "image event"),
        };
        let credentials = async |reference: ImageReference| {
            let secrets = self.pull_secrets(pod).await;
            let mut found = Keyring::from_secrets(secrets.iter().map(Arc::as_ref)).lookup(&reference);
            if let Some(providers) = &self.providers {
                found.extend(providers.lookup(&reference).await);
            }
            found
        };
        self.images.ensure(uid, image, policy, credentials, record).await
    }

    /// A container could not be made: perhaps an image is no longer there.
    pub fn look_anew(&self) {
        self.images.seen.lock().clear();
    }

    /// Forget a pod that is gone.
    pub fn forget_pod(&self, uid: &str) {
        self.images.forget_pod(uid);
    }

    /// The pod's pull secrets that can be read. One that is missing is no error: the registry may not ask.
    async fn pull_secrets(&self, pod: &Pod) -> Vec<Arc<Secret>> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let mut found = Vec::new();
        for reference in pod.spec.iter().flat_map(|spec| spec.image_pull_secrets.iter().flatten()) {
            match self.objects.secret(namespace, &reference.name).await {
                Ok(Some(secret)) => found.push(secret),
                Ok(None) => tracing::warn!(namespace, secret = reference.name, "image pull secret does not exist"),
                Err(error) => {
                    tracing::warn!(namespace, secret = reference.name, %error, "image pull secret cannot be read")
                }
            }
        }
        found
    }
}

impl ImageService for Cri {
    async fn status(&self, image: &str) -> Result<Option<PresentImage>, String> {
        let found = self.image_status(image).await.map_err(|error| error.message())?;
        Ok(found.map(|found| PresentImage {
            image: ImageRef { id: found.id, uid: found.uid.map(|uid| uid.value), username: found.username },
            size_bytes: found.size,
        }))
    }

    async fn pull(&self, image: &str, auth: Option<Credentials>) -> Result<String, FetchError> {
        let auth = auth.map(|credentials| proto::cri::AuthConfig {
            username: credentials.username,
            password: credentials.password,
            identity_token: credentials.identity_token,
            registry_token: credentials.registry_token,
            ..Default::default()
        });
        self.pull_image(image, auth, None).await.map_err(|error| FetchError {
            message: error.message(),
            // As `crierrors`: the runtime says so in words of its own.
            registry_unavailable: matches!(&error, CriError::Call { status, .. }
                if status.message().contains("RegistryUnavailable")),
        })
    }
}

/// The images of this node.
pub struct Images<S> {
    service: Arc<S>,
    pulls: Arc<Semaphore>,
    limit: Option<Mutex<Limit>>,
    records: Option<Arc<PulledRecords>>,
    /// Images that were there when they were asked for last.
    seen: Mutex<HashMap<String, (Instant, PresentImage)>>,
    back_off: Mutex<HashMap<BackOffKey, BackOffState>>,
    /// Fetches under way, by image and credentials' user: those who want the same wait for the same.
    running: Mutex<HashMap<(String, Vec<String>), watch::Receiver<Option<PullOutcome>>>>,
}

// === impl Images ===

impl<S: ImageService> Images<S> {
    /// `parallel_pulls`: `serializeImagePulls` is 1, `maxParallelImagePulls` its number.
    pub fn new(service: Arc<S>, parallel_pulls: usize) -> Images<S> {
        Images {
            service,
            pulls: Arc::new(Semaphore::new(parallel_pulls.max(1))),
            limit: None,
            records: None,
            back_off: Mutex::default(),
            running: Mutex::default(),
            seen: Mutex::default(),
        }
    }

    /// Make sure that `image` is there for a container of the pod, under `policy` (the container's `imagePullPolicy`) and
    /// with the credentials for it, best first. Gives the reference to create the container with; `record` is called for each event.
    pub async fn ensure(
        &self,
        pod_uid: &str,
        image: &str,
        policy: Option<&str>,
        credentials: impl AsyncFnOnce(ImageReference) -> Vec<Credentials>,
        record: impl Fn(ImageEvent),
    ) -> Result<ImageRef, PullError> {
        let warn = |reason: &'static str, message: String| record(ImageEvent { warning: true, reason, message });
        let reference = ImageReference::parse(image).map_err(|error| {
            let message = format!("Failed to apply default image tag \"{image}\": {error}");
            warn("InspectFailed", message.clone());
            PullError { reason: PullReason::InvalidImageName, message }
        })?;
        let policy = PullPolicy::of(policy, &reference);
        // Under its plain name as well as the complete one: a runtime may hold either.
        let name = reference.to_string();
        let present = self.present(&name).await.map_err(|error| {
            let message = format!("Failed to inspect image \"{image}\": {error}");
            warn("InspectFailed", message.clone());
            PullError { reason: PullReason::ImageInspectError, message }
        })?;
        let never = || {
            let message = format!("Container image \"{image}\" is not present with pull policy of Never");
            warn("ErrImageNeverPull", message.clone());
            PullError { reason: PullReason::ErrImageNeverPull, message }
        };
        let (mut credentials, mut own) = (Some(credentials), None);
        match (policy, present) {
            (PullPolicy::IfNotPresent | PullPolicy::Never, Some(found)) => {
                if self.may_use(&reference, &found.image.id, &mut credentials, &mut own).await {
                    record(ImageEvent {
                        warning: false,
                        reason: "Pulled",
                        message: format!(
                            "Container image \"{image}\" already present on machine and can be accessed by the pod"
                        ),
                    });
                    return Ok(found.image);
                }
                if policy == PullPolicy::Never {
                    return Err(never());
                }
            }
            (PullPolicy::Never, None) => return Err(never()),
            (PullPolicy::Always, _) | (PullPolicy::IfNotPresent, None) => {}
        }

        let key = BackOffKey { pod_uid: pod_uid.to_owned(), image: name.clone() };
        if let Some(last_error) = self.held_back(&key, Instant::now()) {
            let message = format!("Back-off pulling image \"{image}\"");
            record(ImageEvent { warning: false, reason: "BackOff", message: message.clone() });
            // The cause is the container's to show; events of a kind are counted by their words.
            let message = format!("{message}: {:?}: {}", last_error.reason, last_error.message);
            return Err(PullError { reason: PullReason::ImagePullBackOff, message });
        }
        record(ImageEvent { warning: false, reason: "Pulling", message: format!("Pulling image \"{image}\"") });
        if let Some(ask) = credentials.take() {
            own = Some(ask(reference.clone()).await);
        }
        let asked = Instant::now();
        if let Some(records) = &self.records {
            records.begun(&name);
        }
        let outcome = self.pull(&name, own.unwrap_or_default()).await;
        match outcome {
            Ok((pulled, opened_by, pull_time)) => {
                self.back_off.lock().remove(&key);
                self.seen.lock().remove(&name);
                let found = match self.service.status(&pulled).await {
                    Ok(Some(found)) => found,
                    _ => PresentImage { image: ImageRef { id: pulled, ..Default::default() }, size_bytes: 0 },
                };
                managers().pulled(found.size_bytes, pull_time);
                if let Some(records) = &self.records {
                    records.opened(&reference, &found.image.id, opened_by.as_ref());
                    records.ended(&name);
                }
                record(ImageEvent {
                    warning: false,
                    reason: "Pulled",
                    message: format!(
                        "Successfully pulled image \"{image}\" in {} ({} including waiting). Image size: {} bytes.",
                        seconds(pull_time),
                        seconds(asked.elapsed()),
                        found.size_bytes
                    ),
                });
                Ok(found.image)
            }
            Err(error) => {
                if let Some(records) = self.records.as_ref().filter(|_| !self.is_pulling(&name)) {
                    records.ended(&name);
                }
                warn("Failed", format!("Failed to pull image \"{image}\": {error}"));
                let error = if error.registry_unavailable {
                    PullError {
                        reason: PullReason::RegistryUnavailable,
                        message: format!("image pull failed for {image} because the registry is unavailable: {error}"),
                    }
                } else {
                    PullError { reason: PullReason::ErrImagePull, message: error.message }
                };
                self.note_failure(key, error.clone(), Instant::now());
                Err(error)
            }
        }
    }

    /// The image, if it is there, or was a moment ago.
    async fn present(&self, name: &str) -> Result<Option<PresentImage>, String> {
        if let Some((_, found)) = self.seen.lock().get(name).filter(|(at, _)| at.elapsed() < SEEN_FOR) {
            return Ok(Some(found.clone()));
        }
        let found = self.service.status(name).await?;
        let mut seen = self.seen.lock();
        if seen.len() >= MAX_SEEN {
            seen.clear();
        }
        match &found {
            Some(found) => seen.insert(name.to_owned(), (Instant::now(), found.clone())),
            None => seen.remove(name),
        };
        Ok(found)
    }

    /// Whether the pod may use an image that is there. Its credentials are looked for only if that depends on them.
    async fn may_use(
        &self,
        reference: &ImageReference,
        id: &str,
        ask: &mut Option<impl AsyncFnOnce(ImageReference) -> Vec<Credentials>>,
        own: &mut Option<Vec<Credentials>>,
    ) -> bool {
        let Some(records) = &self.records else { return true };
        let Access::Secrets(known) = records.access(reference, id) else { return true };
        let Some(ask) = ask.take() else { return false };
        let own = own.insert(ask(reference.clone()).await);
        let Some(secret) = pulled::admitted(own, &known) else { return false };
        records.opened(reference, id, Some(secret));
        true
    }

    fn is_pulling(&self, name: &str) -> bool {
        self.running.lock().keys().any(|(image, _)| image == name)
    }

    /// When the pod may next try to fetch any of its images: the earliest end of a back-off.
    pub fn next_attempt(&self, pod_uid: &str) -> Option<Instant> {
        let back_off = self.back_off.lock();
        back_off.iter().filter(|(key, _)| key.pod_uid == pod_uid).map(|(_, state)| state.since + state.delay).min()
    }

    /// Forget a pod that is gone.
    pub fn forget_pod(&self, pod_uid: &str) {
        self.back_off.lock().retain(|key, _| key.pod_uid != pod_uid);
    }

    fn held_back(&self, key: &BackOffKey, now: Instant) -> Option<PullError> {
        let back_off = self.back_off.lock();
        let state = back_off.get(key)?;
        (now.saturating_duration_since(state.since) < state.delay).then(|| state.last_error.clone())
    }

    fn note_failure(&self, key: BackOffKey, last_error: PullError, now: Instant) {
        let mut back_off = self.back_off.lock();
        if back_off.len() >= MAX_BACK_OFF_ENTRIES {
            back_off.retain(|_, state| now.saturating_duration_since(state.since) < 2 * BACK_OFF_MAX);
            if back_off.len() >= MAX_BACK_OFF_ENTRIES {
                back_off.clear();
            }
        }
        let delay = match back_off.get(&key) {
            // A failure long ago counts for nothing.
            Some(state) if now.saturating_duration_since(state.since) < 2 * BACK_OFF_MAX => {
                (state.delay * 2).min(BACK_OFF_MAX)
            }
            _ => BACK_OFF_START,
        };
        back_off.insert(key, BackOffState { delay, since: now, last_error });
    }

    /// Fetch, or wait for the same fetch that is under way. Gives the image, the secret that opened the registry, and the time
    /// that the fetch itself took.
    async fn pull(
        &self,
        name: &str,
        credentials: Vec<Credentials>,
    ) -> Result<(String, Option<SecretSource>, Duration), FetchError> {
        let users = credentials.iter().map(|c| format!("{}\n{}", c.username, c.registry_token)).collect();
        let key = (name.to_owned(), users);
        let begun = Instant::now();
        let (leader, mut outcome) = {
            let mut running = self.running.lock();
            match running.get(&key) {
                // A sender that is gone without an outcome was cancelled: its successor leads.
                Some(outcome) if outcome.has_changed().is_ok() || outcome.borrow().is_some() => (None, outcome.clone()),
                _ => {
                    let (sender, receiver) = watch::channel(None);
                    running.insert(key.clone(), receiver.clone());
                    (Some(sender), receiver)
                }
            }
        };
        let Some(sender) = leader else {
            return match outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone()) {
                Ok(Some(outcome)) => outcome.map(|(pulled, by)| (pulled, by, begun.elapsed())),
                _ => Err(FetchError { message: "the fetch was cancelled".into(), registry_unavailable: false }),
            };
        };
        let result = self.pull_with(name, credentials).await;
        self.running.lock().remove(&key);
        sender.send_replace(Some(result.clone().map(|(pulled, by, _)| (pulled, by))));
        result
    }

    async fn pull_with(
        &self,
        name: &str,
        credentials: Vec<Credentials>,
    ) -> Result<(String, Option<SecretSource>, Duration), FetchError> {
        let failed = |message: &str| FetchError { message: message.to_owned(), registry_unavailable: false };
        let _permit = self.pulls.acquire().await.map_err(|_| failed("the kubelet is shutting down"))?;
        let begun = Instant::now();
        let attempts: Vec<Option<Credentials>> =
            if credentials.is_empty() { vec![None] } else { credentials.into_iter().map(Some).collect() };
        let mut last = failed("no attempt was made");
        for auth in attempts {
            let source = auth.as_ref().and_then(|auth| auth.source.clone());
            if self.limit.as_ref().is_some_and(|limit| !limit.lock().take(Instant::now())) {
                return Err(failed("pull QPS exceeded"));
            }
            match tokio::time::timeout(PULL_TIMEOUT, self.service.pull(name, auth)).await {
                Ok(Ok(pulled)) => return Ok((pulled, source, begun.elapsed())),
                Ok(Err(error)) => last = error,
                Err(_) => return Err(failed("the fetch did not end in time")),
            }
        }
        Err(last)
    }
}

/// A duration as Go prints one rounded to milliseconds: `350ms`, `1.234s`, `1m2.5s`.
fn seconds(duration: Duration) -> String {
    let ms = duration.as_millis();
    if ms < 1000 {
        return format!("{ms}ms");
    }
    let (minutes, rest_ms) = (ms / 60_000, ms % 60_000);
    let fraction = format!("{}.{:03}", rest_ms / 1000, rest_ms % 1000);
    let fraction = fraction.trim_end_matches('0').trim_end_matches('.');
    if minutes == 0 { format!("{fraction}s") } else { format!("{minutes}m{fraction}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct FakeRuntime {
        present: Mutex<HashMap<String, PresentImage>>,
        pulls: Mutex<Vec<(String, Option<Credentials>)>>,
        fail: Mutex<Option<FetchError>>,
        slow: bool,
    }

    impl ImageService for FakeRuntime {
        async fn status(&self, image: &str) -> Result<Option<PresentImage>, String> {
            Ok(self.present.lock().get(image).cloned())
        }
        async fn pull(&self, image: &str, auth: Option<Credentials>) -> Result<String, FetchError> {
            self.pulls.lock().push((image.to_owned(), auth));
            if self.slow {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            match self.fail.lock().clone() {
                Some(error) => Err(error),
                None => Ok("sha256:pulled".into()),
            }
        }
    }

    fn present(id: &str) -> PresentImage {
        PresentImage { image: ImageRef { id: id.into(), ..Default::default() }, size_bytes: 7 }
    }

    async fn ensure(
        images: &Images<FakeRuntime>,
        image: &str,
        policy: &str,
    ) -> (Result<ImageRef, PullError>, Vec<ImageEvent>) {
        let events = Mutex::new(Vec::new());
        let result =
            images.ensure("uid", image, Some(policy), async |_| Vec::new(), |event| events.lock().push(event)).await;
        (result, events.into_inner())
    }

    fn reasons(events: &[ImageEvent]) -> Vec<&'static str> {
        events.iter().map(|event| event.reason).collect()
    }

    #[tokio::test]
    async fn a_present_image_is_not_fetched_unless_always() {
        let runtime = Arc::new(FakeRuntime::default());
        runtime.present.lock().insert("docker.io/library/app:1".into(), present("sha256:here"));
        let images = Images::new(runtime.clone(), 1);
        for policy in ["IfNotPresent", "Never"] {
            let (result, events) = ensure(&images, "app:1", policy).await;
            assert_eq!(result.map(|image| image.id).as_deref(), Ok("sha256:here"), "{policy}");
            assert_eq!(reasons(&events), ["Pulled"]);
        }
        assert!(runtime.pulls.lock().is_empty());
        let (result, events) = ensure(&images, "app:1", "Always").await;
        assert_eq!(result.map(|image| image.id).as_deref(), Ok("sha256:pulled"));
        assert_eq!(reasons(&events), ["Pulling", "Pulled"]);
    }

    #[tokio::test]
    async fn never_and_invalid_names_have_their_own_reasons() {
        let images = Images::new(Arc::new(FakeRuntime::default()), 1);
        let (result, events) = ensure(&images, "app:1", "Never").await;
        assert_eq!(result.expect_err("absent").reason, PullReason::ErrImageNeverPull);
        assert_eq!(reasons(&events), ["ErrImageNeverPull"]);
        let (result, events) = ensure(&images, "App", "IfNotPresent").await;
        let error = result.expect_err("invalid");
        assert_eq!(error.reason, PullReason::InvalidImageName);
        assert!(
            error.message.starts_with("Failed to apply default image tag \"App\": couldn't parse image name"),
            "{error}"
        );
        assert_eq!(reasons(&events), ["InspectFailed"]);
    }

    #[tokio::test]
    async fn a_failed_fetch_is_held_back_and_then_tried_again() {
        let runtime = Arc::new(FakeRuntime::default());
        *runtime.fail.lock() = Some(FetchError { message: "not found".into(), registry_unavailable: false });
        let images = Images::new(runtime.clone(), 1);
        let (result, events) = ensure(&images, "app:1", "IfNotPresent").await;
        assert_eq!(result.expect_err("fails").reason, PullReason::ErrImagePull);
        assert_eq!(reasons(&events), ["Pulling", "Failed"]);
        assert_eq!(events[1].message, "Failed to pull image \"app:1\": not found");

        let (result, events) = ensure(&images, "app:1", "IfNotPresent").await;
        let error = result.expect_err("held back");
        assert_eq!(error.reason, PullReason::ImagePullBackOff);
        assert_eq!(error.message, "Back-off pulling image \"app:1\": ErrImagePull: not found");
        assert_eq!(reasons(&events), ["BackOff"]);
        assert_eq!(runtime.pulls.lock().len(), 1);

        // Ten seconds later it is tried again; the delay doubles up to five minutes.
        let key = BackOffKey { pod_uid: "uid".into(), image: "docker.io/library/app:1".into() };
        let mut now = Instant::now();
        let mut delays = Vec::new();
        for _ in 0..8 {
            let delay = images.back_off.lock()[&key].delay;
            delays.push(delay.as_secs());
            now += delay;
            assert!(images.held_back(&key, now + Duration::from_millis(50)).is_none());
            images.note_failure(key.clone(), error.clone(), now);
        }
        assert_eq!(delays, [10, 20, 40, 80, 160, 300, 300, 300]);
        images.forget_pod("uid");
        assert!(images.next_attempt("uid").is_none());
    }

    #[tokio::test]
    async fn a_private_image_that_is_there_is_fetched_again_by_strangers() {
        let root = tempfile::tempdir().expect("a directory");
        let records = PulledRecords::new(root.path(), pulled::Verification::default()).expect("directories");
        let runtime = Arc::new(FakeRuntime::default());
        let mut images = Images::new(runtime.clone(), 1);
        images.records = Some(Arc::new(records));
        let as_pod = async |secret: Option<&str>, policy: &str| {
            let source = secret.map(|uid| SecretSource { uid: uid.into(), ..Default::default() });
            let own = source.map(|s| Credentials { source: Some(s), ..Default::default() });
            let ask = async |_| own.into_iter().collect();
            images.ensure("uid", "app:1", Some(policy), ask, |_| {}).await.map(|i| i.id).map_err(|e| e.reason)
        };
        let fetches = || runtime.pulls.lock().len();
        assert!(as_pod(Some("a"), "IfNotPresent").await.is_ok() && fetches() == 1);
        runtime.present.lock().insert("docker.io/library/app:1".into(), present("sha256:pulled"));
        assert!(as_pod(Some("a"), "IfNotPresent").await.is_ok() && fetches() == 1, "its own");
        assert_eq!(as_pod(None, "Never").await, Err(PullReason::ErrImageNeverPull));
        assert!(as_pod(Some("b"), "IfNotPresent").await.is_ok() && fetches() == 2, "the registry decides");
        assert!(as_pod(Some("b"), "Never").await.is_ok() && fetches() == 2, "and is remembered");
        assert!(as_pod(None, "IfNotPresent").await.is_ok() && fetches() == 3);
        assert!(as_pod(None, "Never").await.is_ok(), "open to all");
    }

    #[tokio::test]
    async fn equal_fetches_are_made_once() {
        let runtime = Arc::new(FakeRuntime { slow: true, ..Default::default() });
        let images = Images::new(runtime.clone(), 2);
        let (a, b) = tokio::join!(ensure(&images, "app:1", "IfNotPresent"), ensure(&images, "app:1", "IfNotPresent"));
        assert!(a.0.is_ok() && b.0.is_ok());
        assert_eq!(runtime.pulls.lock().len(), 1);
        assert!(images.running.lock().is_empty());
    }

    #[test]
    fn durations_read_as_in_go() {
        let cases = [(5, "5ms"), (1000, "1s"), (1234, "1.234s"), (62_500, "1m2.5s")];
        for (ms, want) in cases {
            assert_eq!(seconds(Duration::from_millis(ms)), want);
        }
    }
}
