//! Why a pod has no node: which nodes were refused by which plugin, and the one sentence that the user reads.

use std::collections::HashMap;

use super::{Candidate, EventSet, Nomination, Profile, Refusal, State};
use crate::cache::NodeId;

/// The refusals of one attempt.
#[derive(Debug, Default)]
pub struct Diagnosis {
    /// How many nodes there are.
    pub nodes: usize,
    /// For each refused node the plugin (its place in the profile) and why.
    pub refused: Vec<(NodeId, u8, Refusal)>,
    /// What a PreFilter plugin said that refused all nodes at once, and its place in the profile.
    pub pre_filter: Option<(u8, String)>,
    /// Reasons that no plugin gave, with the number of nodes that they hold for.
    pub others: Vec<(usize, String)>,
    /// What PostFilter plugins report.
    pub post_filter: Vec<String>,
    pub nomination: Nomination,
    pub candidates: Vec<Candidate>,
    pub deallocate: Option<std::sync::Arc<str>>,
    /// The plugin whose Reserve or Permit turned the decision down, and its words.
    pub rejected: Option<(u8, String)>,
}

/// No node for a pod.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct FitError {
    /// Kubernetes' words.
    pub message: String,
    /// The plugins that refused, and their places in the profile.
    pub plugins: Vec<&'static str>,
    pub places: Vec<u8>,
    /// What PostFilter made of it.
    pub nomination: Nomination,
    /// The nodes that could be made free.
    pub candidates: Vec<Candidate>,
    /// A claim that is to be given free, by `namespace/name`.
    pub deallocate: Option<std::sync::Arc<str>>,
    /// The changes after which another attempt makes sense.
    pub helped_by: EventSet,
}

impl Diagnosis {
    /// Puts the refusals into words. As `FitError.Error`.
    pub fn into_error(self, profile: &Profile, states: &[Option<State>]) -> FitError {
        let mut plugins: Vec<u8> = self.refused.iter().map(|(_, plugin, _)| *plugin).collect();
        plugins.extend(self.pre_filter.iter().chain(&self.rejected).map(|(plugin, _)| *plugin));
        plugins.sort_unstable();
        plugins.dedup();
        let mut helped_by = plugins
            .iter()
            .filter_map(|plugin| profile.plugins.get(usize::from(*plugin)))
            .fold(EventSet::NONE, |events, plugin| events | plugin.events());
        if self.nodes == 0 {
            helped_by |= EventSet::NODE_ADD;
        }
        FitError {
            message: self.message(profile, states),
            plugins: plugins
                .iter()
                .filter_map(|plugin| profile.plugins.get(usize::from(*plugin)))
                .map(|plugin| plugin.name())
                .collect(),
            places: plugins,
            helped_by,
            nomination: self.nomination,
            candidates: self.candidates,
            deallocate: self.deallocate,
        }
    }

    /// The sentence that the user reads.
    pub fn message(&self, profile: &Profile, states: &[Option<State>]) -> String {
        if let Some((_, words)) = &self.rejected {
            return words.clone();
        }
        if self.nodes == 0 {
            return "no nodes available to schedule pods".to_owned();
        }
        let mut message = format!("0/{} nodes are available:", self.nodes);
        if let Some((_, words)) = &self.pre_filter {
            message.push_str(&format!(" {words}."));
        } else {
            let reasons = self.histogram(profile, states);
            if !reasons.is_empty() {
                message.push_str(&format!(" {}.", reasons.join(", ")));
            }
        }
        if !self.post_filter.is_empty() {
            message.push_str(&format!(" {}", self.post_filter.join(", ")));
        }
        message
    }

    /// "2 Insufficient cpu", sorted as text.
    fn histogram(&self, profile: &Profile, states: &[Option<State>]) -> Vec<String> {
        let mut counts: HashMap<(u8, u32), u64> = HashMap::new();
        for (_, plugin, refusal) in &self.refused {
            let mut bits = refusal.reasons;
            while bits != 0 {
                *counts.entry((*plugin, bits.trailing_zeros())).or_default() += 1;
                bits &= bits - 1;
            }
        }
        let none: State = Box::new(());
        let mut by_words: HashMap<String, u64> = HashMap::new();
        for ((plugin, number), count) in counts {
            let index = usize::from(plugin);
            let Some(plugin) = profile.plugins.get(index) else { continue };
            let state = states.get(index).and_then(Option::as_ref).unwrap_or(&none);
            *by_words.entry(plugin.reason(state, number).into_owned()).or_default() += count;
        }
        for (count, words) in &self.others {
            *by_words.entry(words.clone()).or_default() += *count as u64;
        }
        by_words.retain(|_, count| *count > 0);
        let mut lines: Vec<String> = by_words.into_iter().map(|(words, count)| format!("{count} {words}")).collect();
        lines.sort_unstable();
        lines
    }
}

/// What an event can hold of a message; the pod's condition has all of it. As `truncateMessage`.
pub fn truncated(message: &str) -> String {
    const NOTE_LENGTH_LIMIT: usize = 1024;
    const SUFFIX: &str = " ...";
    if message.len() <= NOTE_LENGTH_LIMIT {
        return message.to_owned();
    }
    format!("{}{SUFFIX}", &message[..message.floor_char_boundary(NOTE_LENGTH_LIMIT - SUFFIX.len())])
}

#[cfg(test)]
mod tests {
    use super::truncated;

    #[test]
    fn a_long_message_ends_with_dots() {
        let whole = "x".repeat(1024);
        assert_eq!(truncated(&whole), whole);
        let cut = truncated(&format!("{whole}y"));
        assert_eq!((cut.len(), cut.ends_with("x ...")), (1024, true));
        assert_eq!(truncated(&"é".repeat(600)).len(), 1024);
    }
}
