//! Claims, volumes, storage classes and what CSI drivers say of themselves, as far as decisions read them; and the bindings
//! that have been decided on but that no watch has shown yet.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use apimachinery::volume::{BIND_COMPLETED, SELECTED_NODE, annotation, volume_name};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::{CSIDriver, CSINode, CSIStorageCapacity, StorageClass};

/// A volume that the scheduler has chosen for a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// `namespace/name`
    pub claim: Arc<str>,
    pub volume: Arc<str>,
}

/// What is decided for a pod and not yet seen on a watch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assumption {
    pub bindings: Vec<Binding>,
    /// Claims for which a volume is to be made.
    pub provisions: Vec<Arc<str>>,
    pub node: Arc<str>,
}

/// The picture of storage. Claims are keyed by `namespace/name`.
#[derive(Debug, Default)]
pub struct Volumes {
    pub claims: HashMap<Arc<str>, Arc<PersistentVolumeClaim>>,
    pub volumes: HashMap<Arc<str>, Arc<PersistentVolume>>,
    pub classes: HashMap<String, Arc<StorageClass>>,
    pub drivers: HashMap<String, Arc<CSIDriver>>,
    pub csi_nodes: HashMap<String, Arc<CSINode>>,
    pub capacities: BTreeMap<String, Arc<CSIStorageCapacity>>,
    /// The persistent volumes that are attached, whoever uses them: node and volume, by the attachment's name.
    pub attachments: HashMap<String, (Arc<str>, Arc<str>)>,
    /// By pod UID.
    assumed: HashMap<Arc<str>, Assumption>,
}

impl Volumes {
    /// Holds what was decided for a pod.
    pub fn assume(&mut self, pod: Arc<str>, assumption: Assumption) {
        self.assumed.insert(pod, assumption);
    }

    /// Takes an assumption back, or drops it when it has come true.
    pub fn forget(&mut self, pod: &str) {
        self.assumed.remove(pod);
    }

    /// The volume that a claim is bound to, or soon will be.
    pub fn volume_of(&self, claim: &str) -> Option<&Arc<PersistentVolume>> {
        let name = self.claims.get(claim).and_then(|claim| volume_name(claim)).or_else(|| {
            let bindings = self.assumed.values().flat_map(|assumption| &assumption.bindings);
            bindings.into_iter().find(|binding| &*binding.claim == claim).map(|binding| &*binding.volume)
        });
        self.volumes.get(name?)
    }

    /// The persistent volumes that are attached to a node, with or without a pod.
    pub fn attached_to(&self, node: &str) -> impl Iterator<Item = &Arc<PersistentVolume>> {
        self.attachments
            .values()
            .filter(move |(on, _)| **on == *node)
            .filter_map(|(_, volume)| self.volumes.get(volume))
    }

    /// The claim for which a volume is held by an assumption.
    pub fn held_for(&self, volume: &str) -> Option<&str> {
        let mut bindings = self.assumed.values().flat_map(|assumption| &assumption.bindings);
        bindings.find(|binding| &*binding.volume == volume).map(|binding| &*binding.claim)
    }

    /// The node for which a claim's volume is being made.
    pub fn selected_node<'a>(&'a self, key: &str, claim: &'a PersistentVolumeClaim) -> Option<&'a str> {
        let assumed =
            self.assumed.values().find(|assumption| assumption.provisions.iter().any(|other| &**other == key));
        match assumed {
            Some(assumption) => Some(&assumption.node),
            None => annotation(&claim.metadata, SELECTED_NODE),
        }
    }

    /// The class of a claim.
    pub fn class_of(&self, claim: &PersistentVolumeClaim) -> Option<&Arc<StorageClass>> {
        self.classes.get(claim.spec.as_ref()?.storage_class_name.as_deref()?)
    }

    /// Whether a claim's volume is chosen, or made, only when its first pod has a node.
    pub fn waits_for_consumer(&self, claim: &PersistentVolumeClaim) -> bool {
        let mode = self.class_of(claim).and_then(|class| class.volume_binding_mode.as_deref());
        mode == Some("WaitForFirstConsumer")
    }
}

/// Whether the binding of a claim is complete. As `isFullyBound`.
pub fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    volume_name(claim).is_some() && annotation(&claim.metadata, BIND_COMPLETED).is_some()
}
