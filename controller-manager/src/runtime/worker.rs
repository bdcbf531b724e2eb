//! Workers: the loop between a queue and a controller's step.
use super::queue::WorkQueue;
use futures::{FutureExt as _, future::BoxFuture};
use std::{
    fmt::{Debug, Display},
    hash::Hash,
    panic::AssertUnwindSafe,
    sync::Arc,
    time::Duration,
};
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

/// Failures of one key after which they are the operator's business.
const WARN_AFTER: u32 = 6;
/// A step that takes longer is given up and retried: no single object may hold a worker for ever.
const STEP_TIMEOUT: Duration = Duration::from_secs(300);

/// Why a step did not succeed; the key is retried with back-off.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// The API server said no or could not be reached.
    #[error("{}", cause(.0))]
    Api(#[from] kube::Error),
    /// The cache lags behind what was written; it will catch up.
    #[error("waiting for {0}")]
    Waiting(String),
    /// The object cannot be handled as it is; the message says what is wrong with it.
    #[error("{0}")]
    Invalid(String),
}

/// What a successful step asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Next {
    /// Nothing until something changes.
    #[default]
    Settled,
    /// To look again after a time.
    After(Duration),
}

/// One controller's step: make the world fit one key.
pub trait Reconcile: Send + Sync + 'static {
    type Key: Clone + Eq + Hash + Debug + Display + Send + Sync + 'static;

    fn reconcile(&self, key: &Self::Key) -> impl Future<Output = Result<Next, SyncError>> + Send;
}

/// A [`Reconcile`] whose type is forgotten: the loop is there once for a type of keys, not for each controller.
trait Step<K>: Send + Sync {
    fn step<'a>(&'a self, key: &'a K) -> BoxFuture<'a, Result<Next, SyncError>>;
}

impl<R: Reconcile> Step<R::Key> for R {
    fn step<'a>(&'a self, key: &'a R::Key) -> BoxFuture<'a, Result<Next, SyncError>> {
        Box::pin(self.reconcile(key))
    }
}

impl SyncError {
    /// Someone else wrote first, or the object went away: ordinary, and cured by a retry.
    fn is_ordinary(&self) -> bool {
        match self {
            Self::Api(error) if is_terminating(error) => true,
            Self::Api(kube::Error::Api(status)) => matches!(status.code, 404 | 409),
            Self::Waiting(_) => true,
            _ => false,
        }
    }
}

impl Next {
    /// The earlier of a time that may be absent and nothing.
    pub fn after(wait: Option<Duration>) -> Self {
        wait.map_or(Self::Settled, Self::After)
    }
}

/// The server's own message, or why there is none.
pub fn cause(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// Whether the server refused to make something because its namespace is being deleted.
pub fn is_terminating(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else { return false };
    let causes = status.details.iter().flat_map(|d| &d.causes);
    causes.map(|c| c.reason.as_str()).any(|reason| reason == "NamespaceTerminating")
}

/// Whether an error is the server's `code`.
pub fn is_code(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

/// A deletion of what is gone already is as good as done.
pub fn gone_is_fine<T>(outcome: Result<T, kube::Error>) -> Result<Option<T>, kube::Error> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_code(&error, 404) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Runs `workers` workers until shutdown.
pub async fn run<R: Reconcile>(
    controller: &'static str,
    queue: Arc<WorkQueue<R::Key>>,
    reconciler: Arc<R>,
    workers: usize,
    shutdown: CancellationToken,
) {
    let mut running = JoinSet::new();
    for _ in 0..workers.max(1) {
        running.spawn(work(controller, queue.clone(), reconciler.clone() as Arc<dyn Step<R::Key>>, shutdown.clone()));
    }
    while running.join_next().await.is_some() {}
}

async fn work<K: Clone + Eq + Hash + Debug + Display + Send + Sync + 'static>(
    controller: &'static str,
    queue: Arc<WorkQueue<K>>,
    reconciler: Arc<dyn Step<K>>,
    shutdown: CancellationToken,
) {
    loop {
        let key = tokio::select! {
            key = queue.next() => key,
            () = shutdown.cancelled() => return,
        };
        let start = Instant::now();
        let step = AssertUnwindSafe(reconciler.step(&key)).catch_unwind();
        let outcome = tokio::select! {
            outcome = tokio::time::timeout(STEP_TIMEOUT, step) => outcome,
            () = shutdown.cancelled() => return,
        };
        match outcome {
            // Whatever was wrong, this object and this worker must not be lost with it.
            Ok(Err(_)) => {
                let failures = queue.retry(key.clone());
                error!(controller, %key, failures, "a fault of the program ended the step, will retry");
            }
            Ok(Ok(Ok(Next::Settled))) => queue.forget(&key),
            Ok(Ok(Ok(Next::After(wait)))) => {
                queue.forget(&key);
                queue.add_after(key.clone(), wait);
            }
            Ok(Ok(Err(error))) => {
                let failures = queue.retry(key.clone());
                if error.is_ordinary() || failures < WARN_AFTER {
                    debug!(controller, %key, failures, %error, "will retry");
                } else {
                    warn!(controller, %key, failures, %error, "failed, will retry");
                }
            }
            Err(_) => {
                warn!(controller, %key, timeout_s = STEP_TIMEOUT.as_secs(), "step took too long, will retry");
                queue.retry(key.clone());
            }
        }
        queue.done(&key, start.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Faulty(AtomicU32);

    impl Reconcile for Faulty {
        type Key = String;

        async fn reconcile(&self, _: &String) -> Result<Next, SyncError> {
            assert!(self.0.fetch_add(1, Ordering::Relaxed) > 1, "not yet");
            Ok(Next::Settled)
        }
    }

    #[tokio::test]
    async fn a_panic_costs_neither_the_worker_nor_the_key() {
        let (queue, faulty) = (Arc::new(WorkQueue::new("faulty")), Arc::new(Faulty(AtomicU32::new(0))));
        queue.add("key".to_owned());
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(run("faulty", queue.clone(), faulty.clone(), 1, shutdown.clone()));
        while faulty.0.load(Ordering::Relaxed) < 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        shutdown.cancel();
        running.await.unwrap();
    }
}
