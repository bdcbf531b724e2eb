//! Which objects of a resource carry a label: so that a list by labels looks at those alone.

use super::object::Identity;
use apimachinery::labels::{Operator, Selector};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// An index is of use where it leaves at most one in so many.
const WORTHWHILE: usize = 4;

/// Object keys by `label\0value`.
#[derive(Default)]
pub struct LabelIndex(HashMap<Box<str>, HashSet<Arc<str>>>);

// === impl LabelIndex ===

impl LabelIndex {
    /// An object has become another (None: there was, or is, none).
    pub fn replace(&mut self, key: &Arc<str>, old: Option<&Identity>, new: Option<&Identity>) {
        if old.map(Identity::labels_text) == new.map(Identity::labels_text) {
            return;
        }
        for (label, value) in old.into_iter().flat_map(Identity::labels) {
            let entry = entry(label, value);
            if let Some(keys) = self.0.get_mut(&*entry) {
                keys.remove(key);
                if keys.is_empty() {
                    self.0.remove(&*entry);
                }
            }
        }
        for (label, value) in new.into_iter().flat_map(Identity::labels) {
            self.0.entry(entry(label, value)).or_default().insert(key.clone());
        }
    }

    /// The keys of all objects that a selector can select, and maybe of others, in order; None if that is no small part of
    /// `total`.
    pub fn candidates(&self, selector: &Selector, total: usize) -> Option<Vec<Arc<str>>> {
        let sets_of = |label: &str, values: &[String]| -> Vec<&HashSet<Arc<str>>> {
            values.iter().filter_map(|value| self.0.get(&*entry(label, value))).collect()
        };
        let smallest = selector
            .requirements()
            .iter()
            .filter(|requirement| requirement.operator == Operator::In)
            .map(|requirement| sets_of(&requirement.key, &requirement.values))
            .min_by_key(|sets| sets.iter().map(|set| set.len()).sum::<usize>())?;
        if smallest.iter().map(|set| set.len()).sum::<usize>() > total / WORTHWHILE {
            return None;
        }
        let mut keys: Vec<Arc<str>> = smallest.into_iter().flatten().cloned().collect();
        keys.sort_unstable();
        Some(keys)
    }
}

fn entry(label: &str, value: &str) -> Box<str> {
    [label, "\0", value].concat().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn candidates_are_those_with_the_rarest_label() {
        let identity = |app: &str, tier: &str| {
            Identity::of(&json!({"metadata": {"labels": {"app": app, "tier": tier}}}), Vec::new())
        };
        let mut index = LabelIndex::default();
        let keys: Vec<Arc<str>> = (0..20).map(|n| format!("ns/{n:02}").into()).collect();
        for (n, key) in keys.iter().enumerate() {
            index.replace(key, None, Some(&identity(&format!("a{}", n % 10), "x")));
        }
        let candidates = |index: &LabelIndex, selector: &str| {
            let found = index.candidates(&Selector::parse(selector).unwrap(), 20);
            found.map(|keys| keys.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(candidates(&index, "app=a3,tier=x").as_deref(), Some("ns/03 ns/13"));
        assert_eq!(candidates(&index, "app in (a3,a4)").as_deref(), Some("ns/03 ns/04 ns/13 ns/14"));
        assert_eq!(candidates(&index, "app=none").as_deref(), Some(""));
        for unhelpful in ["tier=x", "app", "app!=a3", ""] {
            assert_eq!(candidates(&index, unhelpful), None, "{unhelpful}");
        }
        index.replace(&keys[3], Some(&identity("a3", "x")), Some(&identity("a4", "x")));
        index.replace(&keys[13], Some(&identity("a3", "x")), None);
        assert_eq!(candidates(&index, "app=a3").as_deref(), Some(""));
        assert_eq!(candidates(&index, "app=a4").as_deref(), Some("ns/03 ns/04 ns/14"));
    }
}
