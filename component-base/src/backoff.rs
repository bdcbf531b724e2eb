//! Exponential back-off with a cap and jitter: the one way to space retries. And a [`Pace`] for work that is good to do often.
use rand::RngExt as _;
use std::time::{Duration, Instant};

/// Gives ever longer waits, up to a cap.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// The first wait is about `base`, each later one twice the one before, none longer than `cap`.
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, failures: 0 }
    }

    /// The next wait: the exact one less up to a tenth, so that clients that failed together do not retry together.
    pub fn next_wait(&mut self) -> Duration {
        let exact = self.current();
        self.failures = self.failures.saturating_add(1);
        exact.mul_f64(rand::rng().random_range(0.9..=1.0))
    }

    /// The next wait without jitter, not counted.
    pub fn current(&self) -> Duration {
        self.base.saturating_mul(2u32.saturating_pow(self.failures.min(31))).min(self.cap)
    }

    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// After a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Lets work be done so seldom that it takes a fiftieth of the time at most.
#[derive(Debug, Default)]
pub struct Pace {
    not_before: Option<Instant>,
}

impl Pace {
    /// What the work gives; none if it is too early for it.
    pub async fn run<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let started = Instant::now();
        if self.not_before.is_some_and(|time| started < time) {
            return None;
        }
        let outcome = work.await;
        self.not_before = Some(Instant::now() + started.elapsed() * 50);
        Some(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap() {
        let mut backoff = Backoff::new(Duration::from_secs(10), Duration::from_secs(300));
        let waits: Vec<u64> = (0..7)
            .map(|_| {
                let exact = backoff.current();
                let wait = backoff.next_wait();
                assert!(wait <= exact && wait >= exact.mul_f64(0.89));
                exact.as_secs()
            })
            .collect();
        assert_eq!(waits, [10, 20, 40, 80, 160, 300, 300]);
        backoff.reset();
        assert_eq!(backoff.current().as_secs(), 10);
    }

    #[tokio::test]
    async fn costly_work_is_done_seldom() {
        let mut pace = Pace::default();
        let slow = || std::thread::sleep(Duration::from_millis(20));
        assert_eq!(pace.run(async { slow() }).await, Some(()));
        assert_eq!(pace.run(async { slow() }).await, None);
    }
}
