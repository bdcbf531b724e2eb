//! Expectations: what a controller has done and its cache has not yet shown.
//!
//! A controller that created two pods must not look at its cache again before both are in it, or it would create two
//! more. It says beforehand what it expects; the event handlers take it off. As `ControllerExpectations`, with
//! deletions remembered by name as `UIDTrackingControllerExpectations` does.
use apimachinery::meta::NamespacedName;
use parking_lot::Mutex;
use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

/// An event that was not seen for so long will not come any more (the object was created and deleted between two lists).
const EXPIRES: Duration = Duration::from_secs(300);

/// Expectations by the key of who expects. Bounded by the controller's own objects and the actions of one step.
#[derive(Default)]
pub struct Expectations {
    by_owner: Mutex<HashMap<NamespacedName, Expected>>,
}

struct Expected {
    creations: usize,
    deletions: HashSet<String>,
    since: Instant,
}

impl Expected {
    fn fulfilled(&self) -> bool {
        (self.creations == 0 && self.deletions.is_empty()) || self.since.elapsed() > EXPIRES
    }
}

impl Expectations {
    /// To be said before the first of them is asked for. `deletions` are whatever the handlers will name: UIDs.
    pub fn expect(&self, owner: &NamespacedName, creations: usize, deletions: impl IntoIterator<Item = String>) {
        let expected = Expected { creations, deletions: deletions.into_iter().collect(), since: Instant::now() };
        self.by_owner.lock().insert(owner.clone(), expected);
    }

    pub fn expect_creations(&self, owner: &NamespacedName, count: usize) {
        self.expect(owner, count, []);
    }

    /// A creation was seen, or will not come since it failed.
    pub fn creation_observed(&self, owner: &NamespacedName) {
        if let Some(expected) = self.by_owner.lock().get_mut(owner) {
            expected.creations = expected.creations.saturating_sub(1);
        }
    }

    /// A deletion was seen (a deletion timestamp is enough), or will not come since it failed.
    pub fn deletion_observed(&self, owner: &NamespacedName, id: &str) {
        if let Some(expected) = self.by_owner.lock().get_mut(owner) {
            expected.deletions.remove(id);
        }
    }

    /// Whether the cache shows all that was done.
    pub fn satisfied(&self, owner: &NamespacedName) -> bool {
        self.by_owner.lock().get(owner).is_none_or(Expected::fulfilled)
    }

    /// The owner is gone.
    pub fn forget(&self, owner: &NamespacedName) {
        self.by_owner.lock().remove(owner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn satisfied_when_all_was_seen() {
        let (all, key) = (Expectations::default(), NamespacedName::new("ns", "web"));
        assert!(all.satisfied(&key), "nothing is expected");
        all.expect_creations(&key, 2);
        all.creation_observed(&key);
        assert!(!all.satisfied(&key));
        all.creation_observed(&key);
        all.creation_observed(&key);
        assert!(all.satisfied(&key));

        all.expect(&key, 0, ["a".to_owned(), "b".to_owned()]);
        all.deletion_observed(&key, "a");
        all.deletion_observed(&key, "a");
        all.deletion_observed(&key, "other");
        assert!(!all.satisfied(&key));
        all.deletion_observed(&key, "b");
        assert!(all.satisfied(&key));

        all.expect_creations(&key, 1);
        all.forget(&key);
        assert!(all.satisfied(&key));
    }
}
