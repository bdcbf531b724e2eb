//! The work queue of a controller: keys, each at most once, handed to workers.
//!
//! A key that is added while it waits is not added again; one that is added while a worker has it is handed out anew
//! when that worker is done, so no two workers ever hold the same key. Failures back off exponentially per key. The
//! number of keys is bounded by the number of objects. As client-go's `workqueue`.
use super::metrics::{self, Busy, QueueMetrics};
use parking_lot::Mutex;
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    hash::Hash,
    sync::Arc,
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// The first retry comes after this, each later one after twice as long.
const RETRY_BASE: Duration = Duration::from_millis(5);
/// No retry waits longer: a cluster that was repaired converges within this.
const RETRY_CAP: Duration = Duration::from_secs(120);

/// Hands out keys. Shared by event handlers, which add, and workers, which take.
pub struct WorkQueue<K> {
    state: Arc<Mutex<State<K>>>,
    changed: Notify,
    metrics: QueueMetrics,
}

struct State<K> {
    ready: VecDeque<K>,
    /// Added and not yet handed out, with the time of the addition.
    dirty: HashMap<K, Instant>,
    /// Since when a worker has it.
    processing: HashMap<K, Instant>,
    failures: HashMap<K, u32>,
    delayed: BinaryHeap<Reverse<(Instant, u64)>>,
    /// What each number in `delayed` stands for; the earliest delay of a key is the one that counts.
    delayed_keys: HashMap<u64, K>,
    delayed_until: HashMap<K, (Instant, u64)>,
    next_delay: u64,
}

// === impl WorkQueue ===

impl<K: Clone + Eq + Hash + Send + 'static> WorkQueue<K> {
    /// `name` labels the metrics.
    pub fn new(name: &str) -> Self {
        let state = State {
            ready: VecDeque::new(),
            dirty: HashMap::new(),
            processing: HashMap::new(),
            failures: HashMap::new(),
            delayed: BinaryHeap::new(),
            delayed_keys: HashMap::new(),
            delayed_until: HashMap::new(),
            next_delay: 0,
        };
        let queue =
            Self { state: Arc::new(Mutex::new(state)), changed: Notify::new(), metrics: QueueMetrics::of(name) };
        let state: Arc<dyn Busy> = queue.state.clone();
        metrics::watch(name, Arc::downgrade(&state));
        queue
    }

    pub fn add(&self, key: K) {
        let mut state = self.state.lock();
        self.add_locked(&mut state, key);
    }

    /// Adds the key once `delay` has passed, or earlier if it is added earlier by another call.
    pub fn add_after(&self, key: K, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        let at = Instant::now() + delay;
        let mut state = self.state.lock();
        if state.delayed_until.get(&key).is_some_and(|(earlier, _)| *earlier <= at) {
            return;
        }
        let number = state.next_delay;
        state.next_delay += 1;
        if let Some((_, superseded)) = state.delayed_until.insert(key.clone(), (at, number)) {
            state.delayed_keys.remove(&superseded);
        }
        state.delayed.push(Reverse((at, number)));
        state.delayed_keys.insert(number, key);
        drop(state);
        self.changed.notify_one();
    }

    /// Adds the key after a delay that doubles with each failure; gives the number of failures so far.
    pub fn retry(&self, key: K) -> u32 {
        let failures = {
            let mut state = self.state.lock();
            let failures = state.failures.entry(key.clone()).or_insert(0);
            *failures = failures.saturating_add(1);
            *failures
        };
        self.metrics.retries.inc();
        let delay = RETRY_BASE.saturating_mul(2u32.saturating_pow((failures - 1).min(30))).min(RETRY_CAP);
        self.add_after(key, delay);
        failures
    }

    /// The key was worked on with success: its next failure is its first.
    pub fn forget(&self, key: &K) {
        self.state.lock().failures.remove(key);
    }

    /// The next key, once there is one. The caller must call [`WorkQueue::done`] with it. Cancellation loses nothing.
    pub async fn next(&self) -> K {
        loop {
            let wake = {
                let mut state = self.state.lock();
                self.release_due(&mut state, Instant::now());
                if let Some(key) = state.ready.pop_front() {
                    if let Some(added) = state.dirty.remove(&key) {
                        self.metrics.waited.observe(added.elapsed().as_secs_f64());
                    }
                    self.metrics.depth.set(state.ready.len() as i64);
                    state.processing.insert(key.clone(), Instant::now());
                    if !state.ready.is_empty() {
                        self.changed.notify_one();
                    }
                    return key;
                }
                state.delayed.peek().map(|Reverse((at, _))| *at)
            };
            match wake {
                Some(at) => tokio::select! {
                    () = self.changed.notified() => {}
                    () = tokio::time::sleep_until(at) => {}
                },
                None => self.changed.notified().await,
            }
        }
    }

    /// The worker that got the key is finished with it, `took` long.
    pub fn done(&self, key: &K, took: Duration) {
        self.metrics.worked.observe(took.as_secs_f64());
        let mut state = self.state.lock();
        state.processing.remove(key);
        if state.dirty.contains_key(key) {
            state.ready.push_back(key.clone());
            self.metrics.depth.set(state.ready.len() as i64);
            self.changed.notify_one();
        }
    }

    fn add_locked(&self, state: &mut State<K>, key: K) {
        if state.dirty.contains_key(&key) {
            return;
        }
        self.metrics.adds.inc();
        state.dirty.insert(key.clone(), Instant::now());
        if state.processing.contains_key(&key) {
            return;
        }
        state.ready.push_back(key);
        self.metrics.depth.set(state.ready.len() as i64);
        self.changed.notify_one();
    }

    fn release_due(&self, state: &mut State<K>, now: Instant) {
        while let Some(Reverse((at, number))) = state.delayed.peek().copied() {
            let superseded = !state.delayed_keys.contains_key(&number);
            if at > now && !superseded {
                break;
            }
            state.delayed.pop();
            if let Some(key) = state.delayed_keys.remove(&number) {
                state.delayed_until.remove(&key);
                self.add_locked(state, key);
            }
        }
    }
}

impl<K: Send> Busy for Mutex<State<K>> {
    fn busy(&self) -> (Duration, Duration) {
        let state = self.lock();
        let times = || state.processing.values().map(Instant::elapsed);
        (times().sum(), times().max().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    const SOON: Duration = Duration::from_millis(200);

    async fn is_empty(queue: &WorkQueue<&'static str>) -> bool {
        timeout(Duration::from_millis(1), queue.next()).await.is_err()
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_is_handed_out_once_and_again_if_added_meanwhile() {
        let queue = WorkQueue::new("test");
        queue.add("a");
        queue.add("a");
        queue.add("b");
        assert_eq!(queue.next().await, "a");
        queue.add("a");
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(queue.next().await, "b");
        assert_eq!(queue.state.busy(), (Duration::from_secs(3), Duration::from_secs(3)));
        assert!(is_empty(&queue).await, "a is with a worker");
        queue.done(&"a", Duration::ZERO);
        assert_eq!(queue.next().await, "a");
        queue.done(&"a", Duration::ZERO);
        queue.done(&"b", Duration::ZERO);
        assert!(is_empty(&queue).await);
    }

    #[tokio::test(start_paused = true)]
    async fn the_earliest_delay_counts() {
        let queue = WorkQueue::new("test");
        let start = Instant::now();
        queue.add_after("a", Duration::from_secs(60));
        queue.add_after("a", Duration::from_secs(5));
        queue.add_after("a", Duration::from_secs(30));
        assert_eq!(queue.next().await, "a");
        queue.done(&"a", Duration::ZERO);
        assert_eq!(start.elapsed().as_secs(), 5);
        assert!(timeout(Duration::from_secs(100), queue.next()).await.is_err(), "the other delays are superseded");
    }

    #[tokio::test(start_paused = true)]
    async fn failures_back_off_until_forgotten() {
        let queue = WorkQueue::new("test");
        let mut waits = Vec::new();
        for _ in 0..4 {
            let start = Instant::now();
            queue.retry("a");
            assert_eq!(queue.next().await, "a");
            queue.done(&"a", Duration::ZERO);
            waits.push(start.elapsed().as_millis());
        }
        assert_eq!(waits, [5, 10, 20, 40]);
        queue.forget(&"a");
        assert_eq!(queue.retry("a"), 1);
    }

    #[tokio::test]
    async fn workers_that_wait_are_all_woken() {
        let queue = std::sync::Arc::new(WorkQueue::new("test"));
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let queue = queue.clone();
                tokio::spawn(async move { timeout(SOON, queue.next()).await.is_ok() })
            })
            .collect();
        tokio::task::yield_now().await;
        for key in ["a", "b", "c", "d"] {
            queue.add(key);
        }
        for worker in workers {
            assert!(worker.await.unwrap());
        }
    }
}
