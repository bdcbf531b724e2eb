//! The graph of owners and dependents, built from the metadata of all objects. Pure: events go in, tasks come out.
//!
//! An owner that a dependent names before it was seen itself is in the graph as *virtual*: whether it exists has to be
//! asked. As upstream's `GraphBuilder`.
use crate::runtime::{Described, ServerResource};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    fmt,
    sync::Arc,
};

pub const FOREGROUND: &str = "foregroundDeletion";
pub const ORPHAN: &str = "orphan";
/// Owners that are known to be absent; the oldest are forgotten (and asked for again).
const MAX_ABSENT: usize = 10_000;

pub type Uid = Arc<str>;

/// Something to look into. The order of two tasks does not matter.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Task {
    /// Its owners may be gone.
    Delete(Uid),
    /// Its dependents are to be let go.
    Orphan(Uid),
}

/// What an object is: as it was seen, which others keep as well, or, for a virtual one, from a dependent's reference.
#[derive(Clone, Debug)]
pub enum Identity {
    Observed { resource: Arc<ServerResource>, object: Arc<dyn Described> },
    Virtual(Arc<Virtual>),
}

#[derive(Debug)]
pub struct Virtual {
    pub reference: OwnerReference,
    pub namespace: String,
}

/// An object in the graph.
#[derive(Clone, Debug)]
pub struct Node {
    pub uid: Uid,
    pub identity: Identity,
    /// It has a deletion timestamp.
    pub deleting: bool,
    /// It waits for its dependents to go first.
    pub waits_for_dependents: bool,
    orphans_dependents: bool,
    dependents: BTreeSet<Uid>,
}

/// An object's owners by what is known of them.
#[derive(Debug, Default, PartialEq)]
pub struct Owners {
    /// They are there.
    pub solid: Vec<OwnerReference>,
    /// They are not.
    pub dangling: Vec<OwnerReference>,
    /// They are, and wait for this object to go.
    pub waiting: Vec<OwnerReference>,
    /// To be asked for.
    pub unknown: Vec<OwnerReference>,
    /// Those among the dangling that are there, but in another namespace: nobody is owned across namespaces.
    pub foreign: Vec<OwnerReference>,
    /// They are in a namespace and the object is in none: it is left to whoever made it so.
    pub unresolvable: Vec<OwnerReference>,
}

/// How an object of a reference's UID compares with the reference.
enum Meeting {
    Meant,
    /// Of another kind or name.
    Misnamed,
    /// In another namespace, from where it can own nothing here.
    Foreign,
    /// In a namespace, from where it can own nothing that is in none.
    Unresolvable,
}

/// None for an owner that was not observed.
fn meets(dependent: &Node, owner: &Node, reference: &OwnerReference) -> Option<Meeting> {
    let Identity::Observed { resource, object } = &owner.identity else { return None };
    let own = dependent.meta()?.namespace.as_deref().unwrap_or_default();
    let (group, _) = apimachinery::meta::split_api_version(&reference.api_version);
    let named = object.metadata().name.as_deref() == Some(&reference.name);
    if resource.api.kind != reference.kind || resource.api.group != group || !named {
        return Some(Meeting::Misnamed);
    }
    Some(match own {
        _ if !resource.namespaced || owner.namespace() == own => Meeting::Meant,
        "" => Meeting::Unresolvable,
        _ => Meeting::Foreign,
    })
}

/// See the module.
#[derive(Default)]
pub struct Graph {
    nodes: HashMap<Uid, Node>,
    absent: HashSet<Uid>,
    absent_order: VecDeque<Uid>,
}

// === impl Task ===

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delete(uid) => write!(f, "delete {uid}"),
            Self::Orphan(uid) => write!(f, "orphan {uid}"),
        }
    }
}

// === impl Node ===

impl Node {
    /// None of a virtual one.
    pub fn meta(&self) -> Option<&ObjectMeta> {
        match &self.identity {
            Identity::Observed { object, .. } => Some(object.metadata()),
            Identity::Virtual(_) => None,
        }
    }

    pub fn namespace(&self) -> &str {
        match &self.identity {
            Identity::Observed { object, .. } => object.metadata().namespace.as_deref().unwrap_or_default(),
            Identity::Virtual(meant) => &meant.namespace,
        }
    }

    pub fn owners(&self) -> &[OwnerReference] {
        self.meta().and_then(|m| m.owner_references.as_deref()).unwrap_or_default()
    }

    pub fn finalizers(&self) -> &[String] {
        self.meta().and_then(|m| m.finalizers.as_deref()).unwrap_or_default()
    }

    pub fn resource_version(&self) -> Option<&String> {
        self.meta()?.resource_version.as_ref()
    }
}

// === impl Graph ===

impl Graph {
    /// An object was added or changed.
    pub fn observe(&mut self, resource: &Arc<ServerResource>, object: Arc<dyn Described>) -> Vec<Task> {
        let seen = object.clone();
        let meta = seen.metadata();
        let Some(uid) = meta.uid.as_deref() else { return Vec::new() };
        let owners = meta.owner_references.as_deref().unwrap_or_default();
        let deleting = meta.deletion_timestamp.is_some();
        let has = |f: &str| deleting && meta.finalizers.iter().flatten().any(|x| x == f);
        let (waits, orphans) = (has(FOREGROUND), has(ORPHAN));
        let identity = Identity::Observed { resource: resource.clone(), object };
        // Most changes are of no interest.
        if let Some(node) = self.nodes.get_mut(uid)
            && node.owners() == owners
            && (node.deleting, node.waits_for_dependents, node.orphans_dependents) == (deleting, waits, orphans)
            && matches!(node.identity, Identity::Observed { .. })
        {
            node.identity = identity;
            return Vec::new();
        }
        let uid = self.nodes.get_key_value(uid).map_or_else(|| Uid::from(uid), |(known, _)| known.clone());
        let mut tasks = Vec::new();
        self.forget_absence(&uid);
        let former = self.nodes.remove(&uid);
        let (waited, orphaned) =
            former.as_ref().map_or((false, false), |n| (n.waits_for_dependents, n.orphans_dependents));
        let old_owners = former.as_ref().map(|n| n.owners().to_vec()).unwrap_or_default();
        let node = Node {
            uid: uid.clone(),
            identity,
            deleting,
            waits_for_dependents: waits,
            orphans_dependents: orphans,
            dependents: former.map(|n| n.dependents).unwrap_or_default(),
        };
        if orphans && !orphaned {
            tasks.push(Task::Orphan(uid.clone()));
        }
        if waits && !waited {
            tasks.extend(node.dependents.iter().cloned().map(Task::Delete));
            tasks.push(Task::Delete(uid.clone()));
        }
        let namespace = meta.namespace.as_deref().unwrap_or_default();
        self.nodes.insert(uid.clone(), node);
        for owner in owners {
            if !old_owners.iter().any(|o| o.uid == owner.uid) {
                self.link(&uid, owner, namespace, &mut tasks);
            }
        }
        for old in &old_owners {
            let now = owners.iter().find(|o| o.uid == old.uid);
            if now.is_none() {
                self.unlink(&uid, &old.uid);
            }
            // An owner that waited for this dependent may not have to any more.
            let blocked = old.block_owner_deletion == Some(true);
            if blocked && now.is_none_or(|o| o.block_owner_deletion != Some(true)) {
                tasks.extend(self.nodes.get(old.uid.as_str()).map(|n| Task::Delete(n.uid.clone())));
            }
        }
        if owners != old_owners && !self.has_its_owners(&uid) {
            tasks.push(Task::Delete(uid));
        }
        tasks
    }

    /// Whether all owners are there to stay: then there is nothing to look into.
    fn has_its_owners(&self, uid: &str) -> bool {
        let Some(node) = self.nodes.get(uid) else { return false };
        let solid = |owner: &Node, reference| {
            matches!(meets(node, owner, reference), Some(Meeting::Meant)) && !owner.waits_for_dependents
        };
        node.owners().iter().all(|o| {
            !self.absent.contains(o.uid.as_str()) && self.nodes.get(o.uid.as_str()).is_some_and(|n| solid(n, o))
        })
    }

    /// An object is gone (or a virtual one turned out not to exist).
    pub fn forget(&mut self, uid: &str) -> Vec<Task> {
        let Some(node) = self.nodes.remove(uid) else { return Vec::new() };
        self.note_absent(&node.uid);
        let mut tasks: Vec<Task> = node.dependents.iter().cloned().map(Task::Delete).collect();
        for owner in node.owners() {
            self.unlink(&node.uid, &owner.uid);
            let waiting = self.nodes.get(owner.uid.as_str()).filter(|o| o.waits_for_dependents);
            tasks.extend(waiting.map(|o| Task::Delete(o.uid.clone())));
        }
        tasks
    }

    /// All that was observed of a resource and is not among `seen`: a list just ended without it.
    pub fn unseen(&self, resource: &ServerResource, seen: &HashSet<String>) -> Vec<Uid> {
        let is_of = |n: &&Node| match &n.identity {
            Identity::Observed { resource: own, .. } => own.api == resource.api,
            Identity::Virtual(_) => false,
        };
        self.nodes.values().filter(is_of).filter(|n| !seen.contains(&*n.uid)).map(|n| n.uid.clone()).collect()
    }

    pub fn get(&self, uid: &str) -> Option<&Node> {
        self.nodes.get(uid)
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn dependents(&self, uid: &str) -> Vec<Node> {
        let dependents = self.nodes.get(uid).into_iter().flat_map(|n| &n.dependents);
        dependents.filter_map(|d| self.nodes.get(d)).cloned().collect()
    }

    /// Dependents whose owner must not go before them. As `blockingDependents`.
    pub fn blocking_dependents(&self, uid: &str) -> Vec<Node> {
        let blocks = |n: &Node| n.owners().iter().any(|o| o.uid == uid && o.block_owner_deletion == Some(true));
        self.dependents(uid).into_iter().filter(blocks).collect()
    }

    /// Sorts an object's owners by what is known of them.
    pub fn owners(&self, node: &Node) -> Owners {
        let mut sorted = Owners::default();
        for owner in node.owners() {
            let known = self.nodes.get(owner.uid.as_str()).and_then(|n| Some((n, meets(node, n, owner)?)));
            let to = match known {
                _ if self.absent.contains(owner.uid.as_str()) => &mut sorted.dangling,
                Some((_, Meeting::Foreign)) => {
                    sorted.foreign.push(owner.clone());
                    &mut sorted.dangling
                }
                Some((_, Meeting::Unresolvable)) => &mut sorted.unresolvable,
                // The reference means another object; the server tells whether that is there.
                None | Some((_, Meeting::Misnamed)) => &mut sorted.unknown,
                Some((there, Meeting::Meant)) if there.waits_for_dependents => &mut sorted.waiting,
                Some((_, Meeting::Meant)) => &mut sorted.solid,
            };
            to.push(owner.clone());
        }
        sorted
    }

    /// The server does not have it. An object of that UID under another name is none of the reference's business.
    pub fn note_absent(&mut self, uid: &str) {
        if self.nodes.get(uid).is_some_and(|n| matches!(n.identity, Identity::Observed { .. })) {
            return;
        }
        let uid = Uid::from(uid);
        if self.absent.insert(uid.clone()) {
            self.absent_order.push_back(uid);
        }
        while self.absent_order.len() > MAX_ABSENT {
            if let Some(oldest) = self.absent_order.pop_front() {
                self.absent.remove(&oldest);
            }
        }
    }

    fn forget_absence(&mut self, uid: &str) {
        // Its place in the order stays; that costs nothing.
        self.absent.remove(uid);
    }

    fn link(&mut self, dependent: &Uid, owner: &OwnerReference, namespace: &str, tasks: &mut Vec<Task>) {
        if let Some(node) = self.nodes.get_mut(owner.uid.as_str()) {
            node.dependents.insert(dependent.clone());
            return;
        }
        let uid = Uid::from(owner.uid.as_str());
        let node = Node {
            uid: uid.clone(),
            identity: Identity::Virtual(Arc::new(Virtual {
                reference: owner.clone(),
                namespace: namespace.to_owned(),
            })),
            deleting: false,
            waits_for_dependents: false,
            orphans_dependents: false,
            dependents: BTreeSet::from([dependent.clone()]),
        };
        self.nodes.insert(uid.clone(), node);
        tasks.push(Task::Delete(uid));
    }

    fn unlink(&mut self, dependent: &str, owner: &str) {
        let Some(node) = self.nodes.get_mut(owner) else { return };
        node.dependents.remove(dependent);
        // A virtual owner exists for its dependents' sake only.
        if node.dependents.is_empty() && matches!(node.identity, Identity::Virtual(_)) {
            self.nodes.remove(owner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Pod;
    use kube::core::{ApiResource, GroupVersionKind};
    use serde_json::{Value, json};

    fn resource(kind: &str) -> Arc<ServerResource> {
        let api = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", kind));
        Arc::new(ServerResource { api, namespaced: true, verbs: Vec::new() })
    }

    fn meta(uid: &str, owners: &[(&str, bool)], more: Value) -> Arc<dyn Described> {
        let owners: Vec<_> = owners
            .iter()
            .map(|(uid, block)| {
                json!({"apiVersion": "v1", "kind": "Owner", "name": uid, "uid": uid, "blockOwnerDeletion": block})
            })
            .collect();
        let mut value = json!({"name": uid, "namespace": "ns", "uid": uid, "ownerReferences": owners});
        more.as_object().into_iter().flatten().for_each(|(k, v)| value[k] = v.clone());
        Arc::new(serde_json::from_value::<Pod>(json!({"metadata": value})).unwrap())
    }

    fn deleting(finalizer: &str) -> Value {
        json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": [finalizer]})
    }

    fn tasks(mut tasks: Vec<Task>) -> Vec<String> {
        tasks.sort();
        tasks.dedup();
        tasks.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn an_owner_that_was_not_seen_is_asked_for() {
        let mut graph = Graph::default();
        assert_eq!(
            tasks(graph.observe(&resource("Pod"), meta("p", &[("o", true)], json!({})))),
            ["delete o", "delete p"]
        );
        let pod = graph.get("p").unwrap().clone();
        assert_eq!(graph.owners(&pod).unknown.len(), 1);
        // It is there after all.
        assert_eq!(tasks(graph.observe(&resource("Owner"), meta("o", &[], json!({})))), Vec::<String>::new());
        assert_eq!(graph.owners(&pod).solid.len(), 1);
        assert_eq!(graph.dependents("o").len(), 1, "the links of the virtual owner stay");
    }

    #[test]
    fn when_an_owner_goes_its_dependents_are_looked_at() {
        let mut graph = Graph::default();
        graph.observe(&resource("Owner"), meta("o", &[], json!({})));
        graph.observe(&resource("Pod"), meta("p", &[("o", true)], json!({})));
        graph.observe(&resource("Pod"), meta("q", &[("o", false)], json!({})));
        assert_eq!(tasks(graph.forget("o")), ["delete p", "delete q"]);
        let pod = graph.get("p").unwrap().clone();
        assert_eq!(graph.owners(&pod).dangling.len(), 1);
    }

    #[test]
    fn foreground_deletion_waits_for_those_that_block() {
        let mut graph = Graph::default();
        graph.observe(&resource("Owner"), meta("o", &[], json!({})));
        graph.observe(&resource("Pod"), meta("p", &[("o", true)], json!({})));
        graph.observe(&resource("Pod"), meta("q", &[("o", false)], json!({})));
        let waiting = meta("o", &[], deleting(FOREGROUND));
        assert_eq!(tasks(graph.observe(&resource("Owner"), waiting.clone())), ["delete o", "delete p", "delete q"]);
        assert_eq!(tasks(graph.observe(&resource("Owner"), waiting)), Vec::<String>::new(), "once");
        assert_eq!(graph.blocking_dependents("o").len(), 1);
        let pod = graph.get("p").unwrap().clone();
        assert_eq!(graph.owners(&pod).waiting.len(), 1);
        assert_eq!(tasks(graph.forget("p")), ["delete o"]);
        assert_eq!(graph.blocking_dependents("o").len(), 0);
    }

    #[test]
    fn an_owner_is_looked_at_when_a_dependent_blocks_no_more() {
        let mut graph = Graph::default();
        graph.observe(&resource("Owner"), meta("o", &[], json!({})));
        graph.observe(&resource("Pod"), meta("p", &[("o", true)], json!({})));
        assert_eq!(tasks(graph.observe(&resource("Pod"), meta("p", &[("o", false)], json!({})))), ["delete o"]);
        graph.observe(&resource("Pod"), meta("p", &[], json!({})));
        assert!(graph.dependents("o").is_empty());
    }

    #[test]
    fn orphaning_is_a_task_of_its_own() {
        let mut graph = Graph::default();
        graph.observe(&resource("Owner"), meta("o", &[], json!({})));
        graph.observe(&resource("Pod"), meta("p", &[("o", true)], json!({})));
        assert_eq!(tasks(graph.observe(&resource("Owner"), meta("o", &[], deleting(ORPHAN)))), ["orphan o"]);
    }

    #[test]
    fn owners_of_another_name_or_namespace_do_not_count() {
        let mut graph = Graph::default();
        let owner =
            |name: &str, uid: &str, namespace: &str| meta(uid, &[], json!({"name": name, "namespace": namespace}));
        graph.observe(&resource("Owner"), owner("far", "far", "other"));
        graph.observe(&resource("Owner"), owner("renamed", "misnamed", "ns"));
        graph.observe(&resource("Owner"), owner("near", "near", "ns"));
        graph.observe(&resource("Pod"), meta("p", &[("far", true), ("misnamed", true), ("near", true)], json!({})));
        let got = graph.owners(graph.get("p").unwrap());
        let names = |owners: &[OwnerReference]| owners.iter().map(|o| o.name.clone()).collect::<Vec<_>>();
        assert_eq!((names(&got.dangling), names(&got.foreign)), (vec!["far".to_owned()], vec!["far".to_owned()]));
        assert_eq!((names(&got.unknown), names(&got.solid)), (vec!["misnamed".to_owned()], vec!["near".to_owned()]));
    }

    #[test]
    fn an_object_of_no_namespace_has_no_owner_in_one() {
        let mut graph = Graph::default();
        graph.observe(&resource("Owner"), meta("o", &[], json!({})));
        let dependent = meta("p", &[("o", true)], json!({"namespace": null}));
        assert_eq!(tasks(graph.observe(&resource("Pod"), dependent)), ["delete p"], "for that is told");
        let got = graph.owners(graph.get("p").unwrap());
        assert_eq!((got.unresolvable.len(), got.dangling.len(), got.solid.len()), (1, 0, 0));
    }

    #[test]
    fn what_a_list_did_not_show_is_gone() {
        let mut graph = Graph::default();
        let pods = resource("Pod");
        graph.observe(&pods, meta("p", &[("o", true)], json!({})));
        graph.observe(&pods, meta("q", &[], json!({})));
        let gone = graph.unseen(&pods, &HashSet::from(["q".to_owned()]));
        assert_eq!(gone.iter().map(|u| &**u).collect::<Vec<_>>(), ["p"], "virtual owners are no pods");
        gone.iter().for_each(|uid| drop(graph.forget(uid)));
        assert_eq!(graph.len(), 1, "the virtual owner went with its last dependent");
    }
}
