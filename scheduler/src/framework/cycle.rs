//! One pod's scheduling cycle: what the plugins worked out for it, and the filters that follow from that.
//!
//! A cycle can suppose pods on or off a node (victims, nominated pods) and take the supposition back; the snapshot is
//! changed in place and is as before afterwards, so nothing is copied per node.

use std::cell::Cell;
use std::collections::HashMap;

use super::{Diagnosis, Evaluations, PreFilter, Profile, Refusal, State, Verdict};
use crate::cache::{NodeId, PendingPod, PodFacts, Snapshot};

/// The cycle of one pod.
pub struct Cycle<'a> {
    pub profile: &'a Profile,
    pub pod: &'a PendingPod,
    pub states: Vec<Option<State>>,
    /// The filters that have something to say.
    filters: Vec<u8>,
    /// How often the filters ran as far as each of them; the last number is of those that ran them all and were not refused.
    ended: Vec<Cell<u64>>,
    /// The plugins that had something to say before, as bits.
    prepared: u128,
    /// Pods of at least this one's priority that are to come to a node.
    nominated: HashMap<NodeId, Vec<PodFacts>>,
    /// The only nodes that come into question.
    pub only: Option<Vec<NodeId>>,
    none: State,
}

impl<'a> Cycle<'a> {
    /// Runs PreFilter. An error stands in the diagnosis.
    pub fn start(
        profile: &'a Profile,
        snapshot: &Snapshot,
        pod: &'a PendingPod,
        diagnosis: &mut Diagnosis,
    ) -> (Cycle<'a>, bool) {
        let mut states: Vec<Option<State>> = Vec::new();
        states.resize_with(profile.plugins.len(), || None);
        let (mut skipped, mut prepared) = (0_u128, 0_u128);
        let mut only: Option<Vec<NodeId>> = None;
        let mut goes_on = true;
        for place in &profile.pre_filter {
            let answer = profile.plugin(*place).pre_filter(pod, snapshot);
            if !matches!(answer, PreFilter::Skip) {
                prepared |= 1 << place;
            }
            match answer {
                PreFilter::Skip => skipped |= 1 << place,
                PreFilter::Proceed(state) => states[usize::from(*place)] = Some(state),
                PreFilter::Only(state, nodes) => {
                    states[usize::from(*place)] = Some(state);
                    match &mut only {
                        None => only = Some(nodes),
                        Some(only) => only.retain(|node| nodes.contains(node)),
                    }
                    if only.as_ref().is_some_and(Vec::is_empty) {
                        let name = profile.plugin(*place).name();
                        let words = format!("node(s) didn't satisfy plugin(s) [{name}] simultaneously");
                        diagnosis.pre_filter = Some((*place, words));
                        goes_on = false;
                        break;
                    }
                }
                PreFilter::Refuse(words) => {
                    diagnosis.pre_filter = Some((*place, words));
                    goes_on = false;
                    break;
                }
            }
        }
        let filters: Vec<u8> = profile.filter.iter().copied().filter(|place| skipped & (1 << *place) == 0).collect();
        let ended = vec![Cell::new(0); filters.len() + 1];
        let nominated = snapshot.nominated_above(&pod.facts);
        (Cycle { profile, pod, states, filters, ended, prepared, nominated, only, none: Box::new(()) }, goes_on)
    }

    /// A plugin's state.
    pub fn state(&self, place: u8) -> &State {
        self.states[usize::from(place)].as_ref().unwrap_or(&self.none)
    }

    /// Runs the filters as things stand. As `RunFilterPlugins`.
    pub fn filter_now(&self, snapshot: &Snapshot, node: NodeId) -> Result<(), (u8, Refusal)> {
        let end_at = |at: usize| self.ended[at].update(|times| times + 1);
        for (at, place) in self.filters.iter().enumerate() {
            let plugin = self.profile.plugin(*place);
            if let Verdict::Refuse(refusal) = plugin.filter(self.state(*place), self.pod, snapshot, node) {
                end_at(at);
                return Err((*place, refusal));
            }
        }
        end_at(self.filters.len());
        Ok(())
    }

    /// Tells how often plugins were asked at PreFilter and Filter.
    pub fn count(&self, evaluations: &mut Evaluations) {
        let prepared = self.profile.pre_filter.iter().filter(|place| self.prepared & (1 << **place) != 0);
        prepared.for_each(|place| evaluations.add(*place, 0, 1));
        // Who ran as far as a filter ran those before it as well.
        let mut ran: u64 = self.ended.iter().map(Cell::get).sum();
        for (place, ended) in self.filters.iter().zip(&self.ended) {
            evaluations.add(*place, 1, ran);
            ran -= ended.get();
        }
    }

    /// Runs the filters with the pods that are nominated to the node, and without them: the pod must fit either way.
    /// As `RunFilterPluginsWithNominatedPods`.
    pub fn filter(&mut self, snapshot: &mut Snapshot, node: NodeId) -> Result<(), (u8, Refusal)> {
        if !self.nominated.is_empty()
            && let Some(nominated) = self.nominated.remove(&node)
        {
            nominated.iter().for_each(|other| self.suppose(snapshot, other, node, 1));
            let verdict = self.filter_now(snapshot, node);
            nominated.iter().for_each(|other| self.suppose(snapshot, other, node, -1));
            self.nominated.insert(node, nominated);
            verdict?;
        }
        self.filter_now(snapshot, node)
    }

    /// Supposes a pod on a node (`sign` 1) or off it (-1).
    pub fn suppose(&mut self, snapshot: &mut Snapshot, other: &PodFacts, node: NodeId, sign: i64) {
        snapshot.nodes.account(node, other, sign);
        for (place, state) in self.states.iter_mut().enumerate() {
            if let Some(state) = state {
                self.profile.plugins[place].account(state, self.pod, snapshot, other, node, sign);
            }
        }
    }
}
