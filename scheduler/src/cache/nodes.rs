//! The nodes, in columns: one array a property, indexed by [`NodeId`], changed in place as nodes and pods come and go.
//!
//! A slot lives as long as there is a Node object or a pod on it, so that pods which arrive before their node are accounted
//! for, and those of a deleted node until they are gone. Only slots with an object (`present`) are candidates.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::{Node, Taint};

use super::pod_facts::{Disk, HostPort, Labels, PodFacts};
use super::topology::Topology;
use crate::framework::EventSet;

/// A node's place in the columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

impl NodeId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Amounts of each node, a column a resource.
#[derive(Debug, Default)]
pub struct Amounts {
    pub cpu_milli: Vec<i64>,
    pub memory: Vec<i64>,
    pub ephemeral_storage: Vec<i64>,
    pub pods: Vec<i64>,
    /// Extended resources: few nodes have any.
    pub extended: Vec<Vec<(Arc<str>, i64)>>,
}

impl Amounts {
    fn push_zero(&mut self) {
        for column in [&mut self.cpu_milli, &mut self.memory, &mut self.ephemeral_storage, &mut self.pods] {
            column.push(0);
        }
        self.extended.push(Vec::new());
    }

    /// The amount of an extended resource.
    pub fn extended(&self, node: NodeId, resource: &str) -> i64 {
        self.extended[node.index()].iter().find(|(name, _)| &**name == resource).map_or(0, |(_, amount)| *amount)
    }

    fn add_extended(&mut self, node: NodeId, resource: &Arc<str>, amount: i64) {
        let list = &mut self.extended[node.index()];
        match list.iter_mut().find(|(name, _)| name == resource) {
            Some((_, present)) => *present += amount,
            None => list.push((resource.clone(), amount)),
        }
        list.retain(|(_, amount)| *amount != 0);
    }
}

/// An image's place among those that nodes have.
pub type ImageId = u32;

/// The images that nodes have, each once.
#[derive(Debug, Default)]
struct Images {
    by_name: HashMap<Arc<str>, ImageId>,
    /// With the number of nodes.
    known: Vec<(Arc<str>, u32)>,
    free: Vec<ImageId>,
}

impl Images {
    fn held_by_one_more(&mut self, name: &str) -> ImageId {
        if let Some(image) = self.by_name.get(name) {
            self.known[*image as usize].1 += 1;
            return *image;
        }
        let name: Arc<str> = name.into();
        let image = self.free.pop().unwrap_or(self.known.len() as ImageId);
        match self.known.get_mut(image as usize) {
            Some(known) => *known = (name.clone(), 1),
            None => self.known.push((name.clone(), 1)),
        }
        self.by_name.insert(name, image);
        image
    }

    fn held_by_one_less(&mut self, image: ImageId) {
        let (name, count) = &mut self.known[image as usize];
        *count -= 1;
        if *count == 0 {
            self.by_name.remove(name);
            self.free.push(image);
        }
    }
}

/// The columns.
#[derive(Debug, Default)]
pub struct Nodes {
    by_name: HashMap<Arc<str>, NodeId>,
    free: Vec<NodeId>,
    present_count: usize,
    pub name: Vec<Arc<str>>,
    pub present: Vec<bool>,
    pub unschedulable: Vec<bool>,
    pub labels: Vec<Labels>,
    pub taints: Vec<Box<[Taint]>>,
    /// What the kubelets say that they can do beyond what all can.
    pub features: Vec<Box<[String]>>,
    pub allocatable: Amounts,
    pub requested: Amounts,
    /// Requests with defaults for containers that have none: for scores.
    pub nonzero_cpu_milli: Vec<i64>,
    pub nonzero_memory: Vec<i64>,
    pub host_ports: Vec<Vec<HostPort>>,
    /// The mounted claims, with the number of pods that mount each.
    pub claims: Vec<Vec<(Arc<str>, u32)>>,
    pub disks: Vec<Vec<Disk>>,
    /// The UIDs of the pods there.
    pub(super) pods: Vec<Vec<Arc<str>>>,
    /// The images that are there and their sizes, sorted.
    images_of: Vec<Box<[(ImageId, i64)]>>,
    images: Images,
    pub topology: Topology,
}

impl Nodes {
    /// How many Node objects there are.
    pub fn len(&self) -> usize {
        self.present_count
    }

    pub fn is_empty(&self) -> bool {
        self.present_count == 0
    }

    /// How many slots there are: the length of every column.
    pub fn slots(&self) -> usize {
        self.name.len()
    }

    /// The nodes that have an object.
    pub fn iter(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.present.iter().enumerate().filter(|(_, present)| **present).map(|(index, _)| NodeId(index as u32))
    }

    /// The node of this name that has an object.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.by_name.get(name).copied().filter(|node| self.present[node.index()])
    }

    /// The size of an image on a node, if it is there.
    pub fn image_size(&self, node: NodeId, image: ImageId) -> Option<i64> {
        let images = &self.images_of[node.index()];
        images.binary_search_by_key(&image, |(image, _)| *image).ok().map(|at| images[at].1)
    }

    /// An image that is on some node, and on how many.
    pub fn image(&self, name: &str) -> Option<(ImageId, u32)> {
        let image = *self.images.by_name.get(name)?;
        Some((image, self.images.known[image as usize].1))
    }

    /// The slot of a node, made if there is none.
    pub(super) fn slot(&mut self, name: &str) -> NodeId {
        if let Some(node) = self.by_name.get(name) {
            return *node;
        }
        let shared: Arc<str> = name.into();
        let node = match self.free.pop() {
            Some(node) => {
                self.name[node.index()] = shared.clone();
                node
            }
            None => {
                let node = NodeId(self.name.len() as u32);
                self.name.push(shared.clone());
                self.present.push(false);
                self.unschedulable.push(false);
                self.labels.push(Labels::default());
                self.taints.push(Box::default());
                self.features.push(Box::default());
                self.allocatable.push_zero();
                self.requested.push_zero();
                self.nonzero_cpu_milli.push(0);
                self.nonzero_memory.push(0);
                self.host_ports.push(Vec::new());
                self.claims.push(Vec::new());
                self.disks.push(Vec::new());
                self.pods.push(Vec::new());
                self.images_of.push(Box::default());
                self.topology.push();
                node
            }
        };
        self.by_name.insert(shared, node);
        node
    }

    /// Gives a slot back that has neither an object nor pods.
    pub(super) fn release_if_unused(&mut self, node: NodeId) {
        let index = node.index();
        if !self.present[index] && self.requested.pods[index] == 0 && self.by_name.remove(&self.name[index]).is_some() {
            self.free.push(node);
        }
    }

    /// Takes over a Node object; what it changed says which refused pods may fit now.
    pub fn set(&mut self, object: &Node) -> EventSet {
        let Some(name) = object.metadata.name.as_deref() else { return EventSet::NONE };
        let node = self.slot(name);
        let index = node.index();
        let mut changed = EventSet::NONE;
        if !self.present[index] {
            self.present[index] = true;
            self.present_count += 1;
            changed |= EventSet::NODE_ADD;
        }

        let spec = object.spec.as_ref();
        let unschedulable = spec.and_then(|spec| spec.unschedulable).unwrap_or(false);
        let taints: Box<[Taint]> = spec.and_then(|spec| spec.taints.clone()).unwrap_or_default().into();
        if self.unschedulable[index] != unschedulable || self.taints[index] != taints {
            self.unschedulable[index] = unschedulable;
            self.taints[index] = taints;
            changed |= EventSet::NODE_TAINT;
        }

        let empty = BTreeMap::new();
        let labels = object.metadata.labels.as_ref().unwrap_or(&empty);
        if *self.labels[index] != *labels || changed.intersects(EventSet::NODE_ADD) {
            self.labels[index] = Arc::new(labels.clone());
            self.topology.set(node, labels);
            changed |= EventSet::NODE_LABEL;
        }

        let status = object.status.as_ref();
        let features: Box<[String]> = status.and_then(|s| s.declared_features.clone()).unwrap_or_default().into();
        if self.features[index] != features {
            self.features[index] = features;
            changed |= EventSet::NODE_FEATURES;
        }
        if self.set_allocatable(node, status.and_then(|status| status.allocatable.as_ref())) {
            changed |= EventSet::NODE_ALLOCATABLE;
        }
        let images = status.and_then(|status| status.images.as_deref()).unwrap_or_default();
        self.set_images(
            node,
            images
                .iter()
                .flat_map(|image| image.names.iter().flatten().map(|name| (name, image.size_bytes.unwrap_or(0)))),
        );
        changed
    }

    fn set_allocatable(
        &mut self,
        node: NodeId,
        allocatable: Option<&BTreeMap<String, k8s_openapi::apimachinery::pkg::api::resource::Quantity>>,
    ) -> bool {
        let index = node.index();
        let (mut cpu, mut memory, mut storage, mut pods, mut extended) = (0, 0, 0, 0, Vec::new());
        for (name, quantity) in allocatable.into_iter().flatten() {
            let quantity = Quantity::from(quantity);
            match name.as_str() {
                "cpu" => cpu = quantity.milli_value(),
                "memory" => memory = quantity.value(),
                "ephemeral-storage" => storage = quantity.value(),
                "pods" => pods = quantity.value(),
                _ => extended.push((Arc::from(name.as_str()), quantity.value())),
            }
        }
        let mut changed = false;
        let mut put = |column: &mut Vec<i64>, amount: i64| {
            changed |= column[index] != amount;
            column[index] = amount;
        };
        put(&mut self.allocatable.cpu_milli, cpu);
        put(&mut self.allocatable.memory, memory);
        put(&mut self.allocatable.ephemeral_storage, storage);
        put(&mut self.allocatable.pods, pods);
        changed |= self.allocatable.extended[index] != extended;
        self.allocatable.extended[index] = extended;
        changed
    }

    fn set_images<'a>(&mut self, node: NodeId, images: impl Iterator<Item = (&'a String, i64)>) {
        let wanted: BTreeMap<&str, i64> = images.map(|(name, size)| (name.as_str(), size)).collect();
        let mut now: Box<[(ImageId, i64)]> =
            wanted.iter().map(|(name, size)| (self.images.held_by_one_more(name), *size)).collect();
        now.sort_unstable();
        for (image, _) in std::mem::replace(&mut self.images_of[node.index()], now) {
            self.images.held_by_one_less(image);
        }
    }

    /// Forgets a Node object. Its slot stays while pods are on it.
    pub fn remove(&mut self, name: &str) -> EventSet {
        let Some(node) = self.find(name) else { return EventSet::NONE };
        let index = node.index();
        self.present[index] = false;
        self.present_count -= 1;
        self.unschedulable[index] = false;
        self.labels[index] = Labels::default();
        self.taints[index] = Box::default();
        self.set_allocatable(node, None);
        self.set_images(node, std::iter::empty());
        self.topology.clear(node);
        self.release_if_unused(node);
        EventSet::NODE_DELETE
    }

    /// Counts a pod in (`sign` 1) or out (`sign` -1).
    pub fn account(&mut self, node: NodeId, pod: &PodFacts, sign: i64) {
        let index = node.index();
        let requests = &pod.requests;
        self.requested.cpu_milli[index] += sign * requests.cpu_milli;
        self.requested.memory[index] += sign * requests.memory;
        self.requested.ephemeral_storage[index] += sign * requests.ephemeral_storage;
        self.requested.pods[index] += sign;
        self.nonzero_cpu_milli[index] += sign * requests.nonzero_cpu_milli;
        self.nonzero_memory[index] += sign * requests.nonzero_memory;
        for (resource, amount) in &requests.extended {
            self.requested.add_extended(node, resource, sign * amount);
        }
        for port in &pod.host_ports {
            if sign > 0 {
                self.host_ports[index].push(port.clone());
            } else if let Some(held) = self.host_ports[index].iter().position(|held| held == port) {
                self.host_ports[index].swap_remove(held);
            }
        }
        for claim in &pod.claims {
            let held = &mut self.claims[index];
            match held.iter().position(|(held, _)| held == claim) {
                Some(at) if sign < 0 && held[at].1 == 1 => drop(held.swap_remove(at)),
                Some(at) if sign < 0 => held[at].1 -= 1,
                Some(at) => held[at].1 += 1,
                None if sign > 0 => held.push((claim.clone(), 1)),
                None => {}
            }
        }
        for disk in &pod.disks {
            if sign > 0 {
                self.disks[index].push(disk.clone());
            } else if let Some(held) = self.disks[index].iter().position(|held| held == disk) {
                self.disks[index].swap_remove(held);
            }
        }
    }
}
