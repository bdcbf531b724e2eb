//! When the node runs short: thresholds, what was observed, and what follows. Pure. As the eviction manager's `synchronize`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use apimachinery::quantity::Quantity;

use crate::config::KubeletConfiguration;

/// What is watched, in the order in which it is answered to: memory first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Signal {
    Memory,
    NodeFs,
    NodeFsInodes,
    ImageFs,
    ImageFsInodes,
    Pids,
}

use Signal::{ImageFs, ImageFsInodes, Memory, NodeFs, NodeFsInodes, Pids};

/// Signals by their names in thresholds. The file system of containers is that of images here.
const NAMES: [(&str, Signal); 8] = [
    ("memory.available", Memory),
    ("nodefs.available", NodeFs),
    ("nodefs.inodesFree", NodeFsInodes),
    ("imagefs.available", ImageFs),
    ("imagefs.inodesFree", ImageFsInodes),
    ("containerfs.available", ImageFs),
    ("containerfs.inodesFree", ImageFsInodes),
    ("pid.available", Pids),
];

impl Signal {
    fn parse(name: &str) -> Option<Signal> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, signal)| *signal)
    }

    /// Its own name, which metrics have.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, signal)| *signal == self).map_or("", |(name, _)| *name)
    }

    /// The resource that a person is told of.
    pub fn resource(self) -> &'static str {
        match self {
            Memory => "memory",
            NodeFs | ImageFs => "ephemeral-storage",
            NodeFsInodes | ImageFsInodes => "inodes",
            Pids => "pids",
        }
    }

    fn condition(self) -> Condition {
        match self {
            Memory => Condition::Memory,
            Pids => Condition::Pid,
            _ => Condition::Disk,
        }
    }
}

/// Conditions of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Condition {
    Memory,
    Disk,
    Pid,
}

/// What the node runs short of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    pub memory: bool,
    pub disk: bool,
    pub pids: bool,
}

/// An amount, or a share of all there is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Amount {
    Quantity(i64),
    Share(f64),
}

impl Amount {
    pub fn parse(text: &str) -> Option<Amount> {
        match text.trim().strip_suffix('%') {
            Some(percent) => percent.parse::<f64>().ok().map(|p| Amount::Share(p / 100.0)),
            None => Quantity::parse(text.trim()).ok().map(|q| Amount::Quantity(q.value())),
        }
    }

    pub fn of(self, capacity: i64) -> i64 {
        match self {
            Amount::Quantity(amount) => amount,
            #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
            Amount::Share(share) => (capacity as f64 * share) as i64,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Threshold {
    pub signal: Signal,
    pub at: Amount,
    /// How long it may be crossed; none for a hard one.
    pub grace: Option<Duration>,
    /// What is to be freed beyond the threshold.
    pub minimum_reclaim: Amount,
}

/// What is free of what there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation {
    pub available: i64,
    pub capacity: i64,
}

pub type Observations = BTreeMap<Signal, Observation>;

impl Threshold {
    fn is_met(&self, observed: Option<&Observation>, with_reclaim: bool) -> bool {
        let Some(observed) = observed.filter(|o| o.capacity > 0) else { return false };
        let mut least = self.at.of(observed.capacity);
        if with_reclaim {
            least = least.saturating_add(self.minimum_reclaim.of(observed.capacity));
        }
        observed.available < least
    }
}

/// The thresholds of the configuration. One that cannot be read is no threshold; configurations are checked before.
pub fn of_configuration(config: &KubeletConfiguration) -> Vec<Threshold> {
    let reclaim = |name: &str| {
        config.eviction_minimum_reclaim.get(name).and_then(|t| Amount::parse(t)).unwrap_or(Amount::Quantity(0))
    };
    let make = |(name, text): (&String, &String), grace: Option<Duration>| {
        let (signal, at) = (Signal::parse(name)?, Amount::parse(text)?);
        // 0 (%) turns a threshold off.
        let off = matches!(at, Amount::Share(share) if share <= 0.0);
        (!off).then(|| Threshold { signal, at, grace, minimum_reclaim: reclaim(name) })
    };
    let hard = config.eviction_hard.iter().filter_map(|pair| make(pair, None));
    let soft = config.eviction_soft.iter().filter_map(|pair| {
        let grace = config.eviction_soft_grace_period.get(pair.0)?;
        make(pair, Some(apimachinery::time::parse_duration(grace).ok()?))
    });
    hard.chain(soft).collect()
}

/// What the manager remembers from one look to the next.
#[derive(Debug, Default)]
pub struct Watcher {
    thresholds: Vec<Threshold>,
    transition: Duration,
    /// Since when each threshold is crossed.
    since: Vec<Option<Instant>>,
    /// Those that are answered to until enough is freed.
    acting: Vec<bool>,
    last_seen: BTreeMap<Condition, Instant>,
}

/// What follows from a look.
#[derive(Debug, PartialEq)]
pub struct Step {
    pub pressure: Pressure,
    /// The threshold to answer to now.
    pub act: Option<Threshold>,
}

// === impl Watcher ===

impl Watcher {
    pub fn new(thresholds: Vec<Threshold>, transition: Duration) -> Self {
        let count = thresholds.len();
        Self { thresholds, transition, since: vec![None; count], acting: vec![false; count], ..Default::default() }
    }

    pub fn step(&mut self, observed: &Observations, now: Instant) -> Step {
        let mut act: Option<Threshold> = None;
        for (index, threshold) in self.thresholds.iter().enumerate() {
            let seen = observed.get(&threshold.signal);
            let met = threshold.is_met(seen, self.acting[index]);
            if !met {
                self.since[index] = None;
                self.acting[index] = false;
                continue;
            }
            let since = *self.since[index].get_or_insert(now);
            self.last_seen.insert(threshold.signal.condition(), now);
            let due = threshold.grace.is_none_or(|grace| now.saturating_duration_since(since) >= grace);
            self.acting[index] |= due;
            // The first of the most urgent signal; a hard one before a soft one.
            if due && act.as_ref().is_none_or(|a| (threshold.signal, threshold.grace) < (a.signal, a.grace)) {
                act = Some(*threshold);
            }
        }
        let transition = self.transition;
        self.last_seen.retain(|_, at| now.saturating_duration_since(*at) < transition || *at == now);
        let has = |condition| self.last_seen.contains_key(&condition);
        let pressure =
            Pressure { memory: has(Condition::Memory), disk: has(Condition::Disk), pids: has(Condition::Pid) };
        Step { pressure, act }
    }

    /// Whether a threshold is still crossed, by a newer look.
    pub fn is_met(threshold: &Threshold, observed: &Observations) -> bool {
        threshold.is_met(observed.get(&threshold.signal), true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(hard: &[(&str, &str)], soft: &[(&str, &str)], reclaim: &[(&str, &str)]) -> KubeletConfiguration {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        KubeletConfiguration {
            eviction_hard: map(hard),
            eviction_soft: map(soft),
            eviction_soft_grace_period: soft.iter().map(|(k, _)| ((*k).to_owned(), "1m".to_owned())).collect(),
            eviction_minimum_reclaim: map(reclaim),
            ..Default::default()
        }
    }

    fn seen(signal: Signal, available: i64) -> Observations {
        [(signal, Observation { available, capacity: 1000 })].into()
    }

    const TRANSITION: Duration = Duration::from_secs(300);

    #[test]
    fn thresholds_are_amounts_or_shares() {
        for (text, available, met) in
            [("50", 60, false), ("101", 100, true), ("5%", 60, false), ("10%", 90, true), ("0%", 0, false)]
        {
            let thresholds = of_configuration(&config(&[("memory.available", text)], &[], &[]));
            let step = Watcher::new(thresholds, TRANSITION).step(&seen(Memory, available), Instant::now());
            assert_eq!((step.act.is_some(), step.pressure.memory), (met, met), "{text}");
        }
    }

    #[test]
    fn a_soft_threshold_waits_and_a_condition_lasts() {
        let config = config(&[], &[("nodefs.available", "10%")], &[]);
        let mut watcher = Watcher::new(of_configuration(&config), TRANSITION);
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let first = watcher.step(&seen(NodeFs, 50), at(0));
        assert_eq!((first.act, first.pressure.disk), (None, true));
        assert!(watcher.step(&seen(NodeFs, 50), at(59)).act.is_none());
        assert!(watcher.step(&seen(NodeFs, 50), at(60)).act.is_some());
        // Free again: nothing is done, but the node says so only later.
        let free = watcher.step(&seen(NodeFs, 500), at(61));
        assert_eq!((free.act, free.pressure.disk), (None, true));
        assert!(watcher.step(&seen(NodeFs, 500), at(350)).pressure.disk);
        assert!(!watcher.step(&seen(NodeFs, 500), at(361)).pressure.disk);
        assert!(watcher.step(&seen(NodeFs, 50), at(362)).act.is_none(), "the grace begins anew");
    }

    #[test]
    fn more_is_freed_than_the_threshold_and_memory_comes_first() {
        let config = config(
            &[("memory.available", "100"), ("pid.available", "100")],
            &[("memory.available", "200")],
            &[("memory.available", "50")],
        );
        let mut watcher = Watcher::new(of_configuration(&config), TRANSITION);
        let now = Instant::now();
        let mut both = seen(Memory, 90);
        both.extend(seen(Pids, 10));
        let act = watcher.step(&both, now).act.unwrap();
        assert_eq!((act.signal, act.grace), (Memory, None));
        assert_eq!(watcher.step(&seen(Memory, 120), now).act.map(|t| t.signal), Some(Memory));
        assert!(Watcher::is_met(&act, &seen(Memory, 149)) && !Watcher::is_met(&act, &seen(Memory, 150)));
        assert_eq!(watcher.step(&seen(Memory, 150), now).act, None);
    }
}
