//! Topology columns: for each topology key in use, the number of the domain that every node belongs to.
//!
//! Spreading counts pods per domain in an array indexed by these numbers instead of hashing label values. The hostname
//! and zone keys always have a column; others get one when a pod asks for them.

use std::collections::{BTreeMap, HashMap};

use super::nodes::NodeId;
use super::pod_facts::Labels;

/// The domain number of a node that lacks the label.
pub const NO_DOMAIN: u32 = u32::MAX;
pub const HOSTNAME_KEY: &str = "kubernetes.io/hostname";
pub const ZONE_KEY: &str = "topology.kubernetes.io/zone";
/// Columns kept beside the two standing ones; the one longest unused gives way.
const ON_DEMAND_COLUMNS_MAX: usize = 64;

/// One key's column.
#[derive(Debug, Default)]
pub struct Column {
    domain_of: Vec<u32>,
    by_value: HashMap<String, u32>,
    values: Vec<String>,
    nodes_in: Vec<u32>,
    free: Vec<u32>,
    last_used: u64,
}

impl Column {
    /// The node's domain, or [`NO_DOMAIN`].
    pub fn domain(&self, node: NodeId) -> u32 {
        self.domain_of[node.index()]
    }

    /// The domains of all nodes.
    pub fn domains(&self) -> &[u32] {
        &self.domain_of
    }

    /// One more than the highest domain number.
    pub fn bound(&self) -> usize {
        self.values.len()
    }

    fn put(&mut self, node: NodeId, value: Option<&str>) {
        let old = std::mem::replace(&mut self.domain_of[node.index()], NO_DOMAIN);
        if let Some(value) = value {
            let domain = match self.by_value.get(value) {
                Some(domain) => *domain,
                None => {
                    let domain = self.free.pop().unwrap_or(self.values.len() as u32);
                    if domain as usize == self.values.len() {
                        self.values.push(value.to_owned());
                        self.nodes_in.push(0);
                    } else {
                        self.values[domain as usize] = value.to_owned();
                    }
                    self.by_value.insert(value.to_owned(), domain);
                    domain
                }
            };
            self.nodes_in[domain as usize] += 1;
            self.domain_of[node.index()] = domain;
        }
        if old != NO_DOMAIN {
            self.nodes_in[old as usize] -= 1;
            if self.nodes_in[old as usize] == 0 {
                self.by_value.remove(&std::mem::take(&mut self.values[old as usize]));
                self.free.push(old);
            }
        }
    }
}

/// All columns.
#[derive(Debug)]
pub struct Topology {
    columns: HashMap<String, Column>,
    slots: usize,
    clock: u64,
}

impl Default for Topology {
    fn default() -> Self {
        let columns = [HOSTNAME_KEY, ZONE_KEY].map(|key| (key.to_owned(), Column::default()));
        Topology { columns: columns.into(), slots: 0, clock: 0 }
    }
}

impl Topology {
    /// The column of a key; there is one for every key that [`Topology::ensure`] was called with.
    pub fn column(&self, key: &str) -> Option<&Column> {
        self.columns.get(key)
    }

    /// Makes sure that there is a column for `key`.
    pub fn ensure(&mut self, key: &str, labels: &[Labels]) {
        self.clock += 1;
        if let Some(column) = self.columns.get_mut(key) {
            column.last_used = self.clock;
            return;
        }
        if self.columns.len() >= ON_DEMAND_COLUMNS_MAX + 2 {
            let on_demand = self.columns.iter().filter(|(key, _)| *key != HOSTNAME_KEY && *key != ZONE_KEY);
            if let Some(oldest) = on_demand.min_by_key(|(_, column)| column.last_used).map(|(key, _)| key.clone()) {
                self.columns.remove(&oldest);
            }
        }
        let mut column = Column { domain_of: vec![NO_DOMAIN; self.slots], last_used: self.clock, ..Column::default() };
        for (index, labels) in labels.iter().enumerate() {
            column.put(NodeId(index as u32), labels.get(key).map(String::as_str));
        }
        self.columns.insert(key.to_owned(), column);
    }

    pub(super) fn push(&mut self) {
        self.slots += 1;
        for column in self.columns.values_mut() {
            column.domain_of.push(NO_DOMAIN);
        }
    }

    pub(super) fn set(&mut self, node: NodeId, labels: &BTreeMap<String, String>) {
        for (key, column) in &mut self.columns {
            column.put(node, labels.get(key).map(String::as_str));
        }
    }

    pub(super) fn clear(&mut self, node: NodeId) {
        for column in self.columns.values_mut() {
            column.put(node, None);
        }
    }
}
