//! The served groups, their kinds in the order of discovery (generally available ones, and those that were switched on), and
//! table columns.

use super::{list, word};
use std::collections::HashMap;
use std::sync::{LazyLock, OnceLock};

/// A served API group. The core group's name is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupFacts {
    pub name: &'static str,
    /// Versions, the preferred one first.
    pub versions: Vec<&'static str>,
}

/// A kind that is served at a resource path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KindFacts {
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    /// The plural name in paths: `pods`.
    pub resource: &'static str,
    pub singular: &'static str,
    pub namespaced: bool,
    /// Where its objects lie in etcd below `/registry/`: `minions` for nodes.
    pub storage_prefix: &'static str,
    pub verbs: Vec<&'static str>,
    pub short_names: Vec<&'static str>,
    pub categories: Vec<&'static str>,
    /// Discovery's storageVersionHash; empty for kinds that are not stored.
    pub storage_version_hash: &'static str,
    /// The type of its objects, for `facts::schema`: `core.v1.Pod`.
    pub schema: &'static str,
    pub subresources: Vec<SubresourceFacts>,
}

/// `pods/eviction` and the like: the kind that it speaks may belong to another group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubresourceFacts {
    pub name: &'static str,
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub verbs: Vec<&'static str>,
}

/// A column of `as=Table`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    pub name: &'static str,
    /// `string`, `integer` or `boolean`.
    pub kind: &'static str,
    /// `name` for the column that identifies the row, else empty.
    pub format: &'static str,
    /// 0 is always shown, 1 with `-o wide`.
    pub priority: i32,
}

// === impl KindFacts ===

impl KindFacts {
    /// `v1` or `apps/v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_owned() } else { format!("{}/{}", self.group, self.version) }
    }

    pub fn has_verb(&self, verb: &str) -> bool {
        self.verbs.contains(&verb)
    }

    /// Kinds like TokenReview answer a create and are never stored.
    pub fn is_stored(&self) -> bool {
        !self.storage_version_hash.is_empty()
    }

    pub fn subresource(&self, name: &str) -> Option<&SubresourceFacts> {
        self.subresources.iter().find(|sub| sub.name == name)
    }
}

// === tables ===

const TEXT: &str = include_str!("../../facts/kinds.txt");

struct Kinds {
    groups: Vec<GroupFacts>,
    kinds: Vec<KindFacts>,
    /// What could be switched on, and is not.
    offered: Vec<KindFacts>,
    /// Groups with the versions that are off by default.
    off: Vec<GroupFacts>,
}

/// Group, version and resource of what is served though it is off by default.
type Switched = Vec<(&'static str, &'static str, &'static str)>;

static SWITCHED: OnceLock<Switched> = OnceLock::new();
static KINDS: LazyLock<Kinds> = LazyLock::new(|| parse_kinds(TEXT, SWITCHED.get_or_init(Vec::new)));
static OFFERED: LazyLock<Kinds> = LazyLock::new(|| parse_kinds(TEXT, &[]));
static COLUMNS: LazyLock<HashMap<&'static str, Vec<(&'static str, Vec<Column>)>>> =
    LazyLock::new(|| parse_columns(include_str!("../../facts/columns.txt")));

fn parse_kinds(text: &'static str, switched: &[(&str, &str, &str)]) -> Kinds {
    let mut table = Kinds { groups: Vec::new(), kinds: Vec::new(), offered: Vec::new(), off: Vec::new() };
    let mut last_on = true;
    for line in text.lines() {
        let cells: Vec<&'static str> = line.split(' ').collect();
        match cells.as_slice() {
            ["group", name, versions] => table.groups.push(GroupFacts { name: word(name), versions: list(versions) }),
            ["off", name, versions] => table.off.push(GroupFacts { name, versions: list(versions) }),
            ["kind", version, kind, resource, singular, scope, prefix, verbs, short, categories, hash, schema] => {
                let Some(group) = table.groups.last_mut() else { continue };
                let available = group.versions.contains(version) && !is_off(&table.off, group.name, version);
                last_on = available || switched.contains(&(group.name, *version, *resource));
                if last_on && !group.versions.contains(version) {
                    group.versions.push(version);
                }
                let kinds = if last_on { &mut table.kinds } else { &mut table.offered };
                kinds.push(KindFacts {
                    group: group.name,
                    version,
                    kind,
                    resource,
                    singular,
                    namespaced: *scope == "namespaced",
                    storage_prefix: prefix,
                    verbs: list(verbs),
                    short_names: list(short),
                    categories: list(categories),
                    storage_version_hash: word(hash),
                    schema,
                    subresources: Vec::new(),
                });
            }
            ["sub", name, group, version, kind, verbs] => {
                let kinds = if last_on { &mut table.kinds } else { &mut table.offered };
                if let Some(parent) = kinds.last_mut() {
                    parent.subresources.push(SubresourceFacts {
                        name,
                        group: word(group),
                        version,
                        kind,
                        verbs: list(verbs),
                    });
                }
            }
            _ => debug_assert!(false, "kinds.txt: {line}"),
        }
    }
    table
}

fn is_off(off: &[GroupFacts], group: &str, version: &str) -> bool {
    off.iter().any(|facts| facts.name == group && facts.versions.contains(&version))
}

/// Kind → group → columns.
fn parse_columns(text: &'static str) -> HashMap<&'static str, Vec<(&'static str, Vec<Column>)>> {
    let mut tables: HashMap<_, Vec<(&'static str, Vec<Column>)>> = HashMap::new();
    let mut current = "";
    for line in text.lines() {
        if let Some(head) = line.strip_prefix("table ") {
            let (group, kind) = head.split_once(' ').unwrap_or((head, ""));
            current = kind;
            tables.entry(kind).or_default().push((word(group), Vec::new()));
        } else if let [name, kind, format, priority] = line.trim_start().split('|').collect::<Vec<_>>().as_slice()
            && let Some((_, columns)) = tables.get_mut(current).and_then(|groups| groups.last_mut())
        {
            columns.push(Column { name, kind, format, priority: priority.parse().unwrap_or_default() });
        }
    }
    tables
}

/// Every served group, the core group first, in the order of `/apis`.
pub fn groups() -> &'static [GroupFacts] {
    &KINDS.groups
}

/// Every kind that is served, in the order of discovery.
pub fn kinds() -> &'static [KindFacts] {
    &KINDS.kinds
}

/// The kinds that are off by default and can be switched on.
pub fn offered() -> &'static [KindFacts] {
    &OFFERED.offered
}

/// The versions of Kubernetes' that are off by default, by group; what is in most of them is not offered.
pub fn versions_off() -> &'static [GroupFacts] {
    &OFFERED.off
}

/// Every group with its generally available versions, whatever is switched on.
pub fn generally_available() -> &'static [GroupFacts] {
    &OFFERED.groups
}

/// Serves some of [`offered`] beside what is generally available. To be called before anything looks at [`groups`] or
/// [`kinds`]: later it changes nothing, and says so with `false`.
pub fn switch_on(kinds: &[&KindFacts]) -> bool {
    SWITCHED.set(kinds.iter().map(|kind| (kind.group, kind.version, kind.resource)).collect()).is_ok()
}

/// The kind at a resource path.
pub fn resource(group: &str, version: &str, resource: &str) -> Option<&'static KindFacts> {
    kinds().iter().find(|k| k.resource == resource && k.group == group && k.version == version)
}

/// The served kind of this name.
pub fn kind(group: &str, version: &str, kind: &str) -> Option<&'static KindFacts> {
    kinds().iter().find(|k| k.kind == kind && k.group == group && k.version == version)
}

/// The kind in its group's preferred version.
pub fn preferred_kind(group: &str, kind: &str) -> Option<&'static KindFacts> {
    let versions = &groups().iter().find(|g| g.name == group)?.versions;
    versions.iter().find_map(|version| self::kind(group, version, kind))
}

/// The columns of `as=Table` for a kind, where they differ from Name and Age.
pub fn columns(group: &str, kind: &str) -> Option<&'static [Column]> {
    let groups = COLUMNS.get(kind)?;
    groups.iter().find(|(name, _)| *name == group).map(|(_, columns)| columns.as_slice())
}
