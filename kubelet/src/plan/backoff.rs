//! CrashLoopBackOff: ten seconds, doubling to five minutes, forgotten after ten quiet minutes. The first restart is free.

use std::collections::BTreeMap;
use std::time::Duration;

const INITIAL: Duration = Duration::from_secs(10);

/// A container's delay and when it was last prolonged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    delay: Duration,
    last_start: i64,
}

/// The restart back-off of one pod's containers, kept by its worker. As `flowcontrol.Backoff` in the kubelet.
#[derive(Debug, Clone)]
pub struct RestartBackoff {
    entries: BTreeMap<(String, u64), Entry>,
    max: Duration,
}

impl RestartBackoff {
    pub fn new(max: Duration) -> Self {
        Self { entries: BTreeMap::new(), max: max.max(Duration::from_secs(1)) }
    }

    /// How long, and until when, a container that ended at `ended` is held back. None: it may start.
    pub fn held_until(&self, name: &str, hash: u64, ended: i64) -> Option<(Duration, i64)> {
        let entry = self.entries.get(&(name.to_owned(), hash))?;
        if self.is_forgotten(entry, ended) {
            return None;
        }
        Some((entry.delay, ended.saturating_add(nanos(entry.delay))))
    }

    /// Notes a restart at `now` of a container that ended at `ended`: the next will wait longer.
    pub fn restarted(&mut self, name: &str, hash: u64, ended: i64, now: i64) {
        let max = self.max;
        let initial = INITIAL.min(max);
        // Another hash is another program: it starts afresh.
        self.entries.retain(|(n, h), _| n != name || *h == hash);
        let delay = match self.entries.get(&(name.to_owned(), hash)) {
            Some(entry) if !self.is_forgotten(entry, ended) => (entry.delay * 2).min(max),
            _ => initial,
        };
        self.entries.insert((name.to_owned(), hash), Entry { delay, last_start: now });
    }

    fn is_forgotten(&self, entry: &Entry, ended: i64) -> bool {
        ended.saturating_sub(entry.last_start) > nanos(self.max * 2)
    }
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn delays_double_to_the_cap_and_are_forgotten() {
        let mut backoff = RestartBackoff::new(Duration::from_secs(300));
        assert_eq!(backoff.held_until("c", 1, 0), None);
        let mut now = 0;
        for want in [10, 20, 40, 80, 160, 300, 300] {
            backoff.restarted("c", 1, now, now);
            let ended = now + SECOND;
            let (delay, until) = backoff.held_until("c", 1, ended).unwrap();
            assert_eq!((delay.as_secs(), until), (want, ended + i64::try_from(want).unwrap() * SECOND));
            now = until;
        }
        assert_eq!(backoff.held_until("c", 1, now + 601 * SECOND), None);
        backoff.restarted("c", 1, now + 601 * SECOND, now + 601 * SECOND);
        assert_eq!(backoff.held_until("c", 1, now + 602 * SECOND).unwrap().0.as_secs(), 10);
    }

    #[test]
    fn a_changed_container_starts_afresh() {
        let mut backoff = RestartBackoff::new(Duration::from_secs(300));
        backoff.restarted("c", 1, 0, 0);
        assert_eq!(backoff.held_until("c", 2, SECOND), None);
        backoff.restarted("c", 2, SECOND, SECOND);
        assert_eq!(backoff.held_until("c", 1, 2 * SECOND), None);
    }
}
