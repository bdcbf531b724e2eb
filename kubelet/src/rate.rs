//! So many a second, and so many at once after a pause: what the kubelet asks of registries and writes as events.

use std::time::{Duration, Instant};

/// A bucket of tokens that fills by itself.
pub(crate) struct Limit {
    per_second: f64,
    burst: f64,
    left: f64,
    at: Instant,
}

// === impl Limit ===

impl Limit {
    /// None: any number (`per_second` is 0).
    pub(crate) fn new(per_second: i32, burst: i32) -> Option<Self> {
        let burst = f64::from(burst.max(1));
        (per_second > 0).then(|| Self { per_second: f64::from(per_second), burst, left: burst, at: Instant::now() })
    }

    /// Takes one, if there is one.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let filled = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        (self.left, self.at) = ((self.left + filled).min(self.burst), now);
        let has = self.left >= 1.0;
        self.left -= f64::from(u8::from(has));
        has
    }

    /// In how long there is one again.
    pub(crate) fn refills_in(&self) -> Duration {
        Duration::from_secs_f64(((1.0 - self.left) / self.per_second).max(0.001))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_a_second_but_for_a_burst() {
        let mut limit = Limit::new(5, 2).unwrap();
        let begun = limit.at;
        let taken = [0, 0, 0, 100, 250, 300].map(|ms| limit.take(begun + Duration::from_millis(ms)));
        assert_eq!(taken, [true, true, false, false, true, false]);
        assert_eq!(limit.refills_in().as_millis(), 100);
        assert!(Limit::new(0, 9).is_none());
    }
}
