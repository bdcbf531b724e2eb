//! How many devices a node has for an extended resource that they stand for, and how many of them are taken: what scores of
//! resources are about. Pure.

use std::collections::HashMap;

use super::selectors::Selectors;
use crate::cache::{NodeId, PendingPod, Snapshot};
use apimachinery::node::NodeTerms;

/// Devices, and how many of them are taken.
type Count = (i64, i64);

/// The devices of those resources that a pod asks for and that devices stand for.
#[derive(Debug, Default)]
pub struct Offered(Vec<(String, ByPlace)>);

/// Where a class's devices are.
#[derive(Debug, Default)]
struct ByPlace {
    named: HashMap<String, Count>,
    everywhere: Count,
    selected: Vec<(NodeTerms, Count)>,
}

impl Offered {
    /// Of those among `resources` that count. As `getDRAPreScoredParams`.
    pub fn to<'a>(
        pod: &PendingPod,
        snapshot: &Snapshot,
        resources: impl Iterator<Item = &'a str>,
        selectors: &Selectors,
    ) -> Offered {
        let extended = &pod.facts.requests.extended;
        if extended.is_empty() {
            return Offered::default();
        }
        let asked =
            resources.filter(|resource| extended.iter().any(|(name, amount)| &**name == *resource && *amount > 0));
        let classes = asked.filter_map(|name| Some((name.to_owned(), snapshot.claims.class_for(name)?)));
        Offered(classes.map(|(name, class)| (name, ByPlace::of(class, snapshot, selectors))).collect())
    }

    /// How many devices of a resource a node has, and how many are taken. As `calculateDRAResourceTotals`.
    pub fn on(&self, snapshot: &Snapshot, node: NodeId, resource: &str) -> Option<Count> {
        let (_, places) = self.0.iter().find(|(name, _)| name == resource)?;
        let (name, labels) = (&snapshot.nodes.name[node.index()], &snapshot.nodes.labels[node.index()]);
        let selected = places.selected.iter().filter(|(terms, _)| terms.matches(name, labels)).map(|(_, count)| *count);
        let all = places.named.get(&**name).copied().into_iter().chain([places.everywhere]).chain(selected);
        let (devices, taken) = all.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        (devices > 0).then_some((devices, taken))
    }
}

impl ByPlace {
    fn of(class: &str, snapshot: &Snapshot, selectors: &Selectors) -> ByPlace {
        let claims = &snapshot.claims;
        let (mut places, held) = (ByPlace::default(), claims.taken());
        let of_class = claims.class(class).and_then(|class| class.spec.selectors.as_deref()).unwrap_or_default();
        for spec in claims.slices.values().map(|slice| &slice.spec) {
            for device in spec.devices.iter().flatten() {
                if !selectors.select(of_class, &spec.driver, device) {
                    continue;
                }
                let id = (spec.driver.clone(), spec.pool.name.clone(), device.name.clone());
                let taken = i64::from(held.devices.contains(&id) || held.shares.contains_key(&id));
                let (name, terms, all) = match spec.per_device_node_selection {
                    Some(true) => (&device.node_name, &device.node_selector, device.all_nodes),
                    _ => (&spec.node_name, &spec.node_selector, spec.all_nodes),
                };
                let count = match (name, terms) {
                    _ if all == Some(true) => &mut places.everywhere,
                    (Some(name), _) => places.named.entry(name.clone()).or_default(),
                    (None, Some(terms)) => {
                        places.selected.push((NodeTerms::of(terms), (1, taken)));
                        continue;
                    }
                    (None, None) => continue,
                };
                *count = (count.0 + 1, count.1 + taken);
            }
        }
        places
    }
}
