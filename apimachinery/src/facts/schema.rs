//! The types of the API: every field with its type, list and map semantics, merge keys, default and protobuf number.

use std::collections::HashMap;
use std::sync::LazyLock;

/// A type of the API, `core.v1.Container`, with its fields sorted by name.
#[derive(Debug)]
pub struct TypeFacts {
    /// Package and struct: `core.v1.Container`, `meta.v1.ObjectMeta`.
    pub name: &'static str,
    /// Group, version and kind, for a type that stands at the top of a document.
    pub gvk: Option<(&'static str, &'static str, &'static str)>,
    /// Server-side apply treats a value of it as one.
    pub atomic: bool,
    pub fields: Vec<FieldFacts>,
    /// The fields that have protobuf numbers, in their order.
    by_number: Vec<u16>,
    /// The fields that have a default, or defaults below them.
    defaulted: Vec<u16>,
    /// The fields that Go always has: structs that are no pointers, and required ones.
    constant: Vec<u16>,
    /// The fields by their names.
    by_name: Names,
}

/// Fields by the hashes of their names: a table with open addressing, at least half of which is free. Every name of every
/// object that comes or goes is looked up, several times.
#[derive(Debug, Default)]
struct Names(Box<[u16]>);

/// One field of a type.
#[derive(Debug)]
pub struct FieldFacts {
    pub name: &'static str,
    pub kind: Type,
    pub required: bool,
    /// Go holds the struct itself, not a pointer to it: an absent one is an empty one.
    pub inline: bool,
    /// How server-side apply merges a list.
    pub list_type: ListType,
    /// The keys of a `ListType::Map`.
    pub list_keys: Vec<&'static str>,
    /// Server-side apply treats this map or object as one.
    pub atomic: bool,
    /// Strategic merge: the key by which a list's items are matched.
    pub merge_key: Option<&'static str>,
    pub strategy: PatchStrategy,
    /// The schema's default, as JSON text.
    pub default: Option<&'static str>,
    /// The path of protobuf field numbers: longer than one where Go inlines a struct; empty if it has none.
    pub numbers: Vec<u32>,
}

/// How server-side apply merges a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListType {
    /// Replaced as one (also where the schema says nothing).
    Atomic,
    Set,
    Map,
}

/// Strategic merge's strategies for a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PatchStrategy {
    pub merge: bool,
    pub replace: bool,
    pub retain_keys: bool,
}

/// What a field holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Type {
    String,
    Bool,
    Int32,
    Int64,
    Double,
    /// Base64 text.
    Bytes,
    Quantity,
    IntOrString,
    Time,
    MicroTime,
    /// An object of any kind, kept as it is.
    Raw,
    /// Any JSON at all.
    Json,
    /// managedFields' set of paths.
    Fields,
    /// JSONSchemaProps, or a list of them.
    SchemaOrList,
    /// JSONSchemaProps, or a boolean.
    SchemaOrBool,
    /// JSONSchemaProps, or a list of strings.
    SchemaOrStrings,
    Object(TypeId),
    List(Box<Type>),
    /// An object with free keys.
    Map(Box<Type>),
}

/// Names a type of the table; cheap to copy and to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TypeId(u16);

// === impl TypeFacts ===

impl TypeFacts {
    pub fn field(&self, name: &str) -> Option<&FieldFacts> {
        self.position(name).map(|at| &self.fields[at])
    }

    /// Where the field of this name stands among all.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.by_name.find(name, |at| self.fields.get(at).is_some_and(|field| field.name == name))
    }

    /// The field at a path of protobuf numbers; or the first of those that lie below it, where Go inlines a struct.
    pub fn field_at(&self, numbers: &[u32]) -> Option<&FieldFacts> {
        let of = |at: u16| &self.fields[usize::from(at)];
        let at = self.by_number.partition_point(|at| of(*at).numbers.as_slice() < numbers);
        self.by_number.get(at).map(|at| of(*at)).filter(|field| field.numbers.starts_with(numbers))
    }

    /// The fields that have a default, or defaults below them.
    pub fn defaulted(&self) -> impl Iterator<Item = &FieldFacts> {
        self.defaulted.iter().map(|at| &self.fields[usize::from(*at)])
    }

    /// The fields that Go always has: structs that are no pointers, and required ones.
    pub fn constant(&self) -> impl Iterator<Item = &FieldFacts> {
        self.constant.iter().map(|at| &self.fields[usize::from(*at)])
    }

    /// The Go struct's name: `Container`.
    pub fn struct_name(&self) -> &'static str {
        self.name.rsplit('.').next().unwrap_or(self.name)
    }
}

// === impl Names ===

impl Names {
    const FREE: u16 = u16::MAX;

    fn of(fields: &[FieldFacts]) -> Self {
        let mut names = Self(vec![Self::FREE; (fields.len() * 2).next_power_of_two()].into());
        for (at, field) in (0_u16..).zip(fields) {
            let mut slot = names.slot(field.name);
            while names.0[slot] != Self::FREE {
                slot = (slot + 1) & (names.0.len() - 1);
            }
            names.0[slot] = at;
        }
        names
    }

    fn find(&self, name: &str, is: impl Fn(usize) -> bool) -> Option<usize> {
        let mut slot = self.slot(name);
        loop {
            let at = *self.0.get(slot)?;
            if at == Self::FREE {
                return None;
            }
            if is(usize::from(at)) {
                return Some(usize::from(at));
            }
            slot = (slot + 1) & (self.0.len() - 1);
        }
    }

    /// Where to begin to look. Names begin alike or end alike, but seldom both, with the same length.
    fn slot(&self, name: &str) -> usize {
        let bytes = name.as_bytes();
        let word = |at: &[u8; 4]| u32::from_le_bytes(*at);
        let mixed = match (bytes.first_chunk(), bytes.last_chunk()) {
            (Some(first), Some(last)) => word(first) ^ word(last).rotate_left(13),
            _ => bytes.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)),
        };
        let hash = (mixed ^ bytes.len() as u32).wrapping_mul(0x9e37_79b1);
        (hash >> 16) as usize & self.0.len().wrapping_sub(1)
    }
}

// === impl TypeId ===

impl TypeId {
    pub fn facts(self) -> &'static TypeFacts {
        &SCHEMA.types[usize::from(self.0)]
    }
}

// === impl Type ===

impl Type {
    /// The type of the struct that this is, or that its items are.
    pub fn object(&self) -> Option<&'static TypeFacts> {
        self.object_id().map(TypeId::facts)
    }

    fn object_id(&self) -> Option<TypeId> {
        match self {
            Type::Object(id) => Some(*id),
            Type::List(item) | Type::Map(item) => item.object_id(),
            _ => None,
        }
    }

    fn parse(cell: &str, ids: &HashMap<&str, TypeId>) -> Type {
        if let Some(item) = cell.strip_prefix("[]") {
            return Type::List(Box::new(Type::parse(item, ids)));
        }
        if let Some(item) = cell.strip_prefix("{}") {
            return Type::Map(Box::new(Type::parse(item, ids)));
        }
        match cell {
            "string" => Type::String,
            "bool" => Type::Bool,
            "int32" => Type::Int32,
            "int64" => Type::Int64,
            "double" => Type::Double,
            "bytes" => Type::Bytes,
            "quantity" => Type::Quantity,
            "intstr" => Type::IntOrString,
            "time" => Type::Time,
            "microtime" => Type::MicroTime,
            "raw" => Type::Raw,
            "fields" => Type::Fields,
            "schema-or-list" => Type::SchemaOrList,
            "schema-or-bool" => Type::SchemaOrBool,
            "schema-or-strings" => Type::SchemaOrStrings,
            name => ids.get(name).map_or(Type::Json, |id| Type::Object(*id)),
        }
    }
}

// === table ===

/// The group of kinds that are about other objects.
const META: &str = "meta.k8s.io";

struct Schema {
    types: Vec<TypeFacts>,
    by_name: HashMap<&'static str, TypeId>,
    by_kind: HashMap<(&'static str, &'static str, &'static str), TypeId>,
}

static SCHEMA: LazyLock<Schema> = LazyLock::new(|| parse(include_str!("../../facts/schema.txt")));

fn parse(text: &'static str) -> Schema {
    let heads = text.lines().filter_map(|line| line.strip_prefix("type "));
    let mut by_name = HashMap::new();
    for (at, head) in heads.enumerate() {
        let name = head.split(' ').next().unwrap_or(head);
        by_name.insert(name, TypeId(u16::try_from(at).unwrap_or(u16::MAX)));
    }
    let mut types: Vec<TypeFacts> = Vec::with_capacity(by_name.len());
    let mut by_kind = HashMap::new();
    for line in text.lines() {
        if let Some(head) = line.strip_prefix("type ") {
            let facts = parse_head(head);
            if let (Some(gvk), Some(id)) = (facts.gvk, by_name.get(facts.name)) {
                by_kind.insert(gvk, *id);
            }
            types.push(facts);
        } else if let (Some(owner), Some(field)) = (types.last_mut(), parse_field(line.trim_start(), &by_name)) {
            owner.fields.push(field);
        }
    }
    for facts in &mut types {
        facts.fields.shrink_to_fit();
        let numbered = (0_u16..).zip(&facts.fields).filter(|(_, field)| !field.numbers.is_empty());
        let mut by_number: Vec<u16> = numbered.map(|(at, _)| at).collect();
        by_number
            .sort_unstable_by(|a, b| facts.fields[usize::from(*a)].numbers.cmp(&facts.fields[usize::from(*b)].numbers));
        facts.by_number = by_number;
        let constant = (0_u16..).zip(&facts.fields).filter(|(_, field)| field.inline || field.required);
        facts.constant = constant.map(|(at, _)| at).collect();
        facts.by_name = Names::of(&facts.fields);
    }
    find_defaulted(&mut types);
    Schema { types, by_name, by_kind }
}

/// Notes the fields with defaults, until no type is found any more that has such.
fn find_defaulted(types: &mut [TypeFacts]) {
    let mut found = vec![false; types.len()];
    loop {
        let mut more = false;
        for at in 0..types.len() {
            let counts = |field: &FieldFacts| {
                field.default.is_some() || field.kind.object_id().is_some_and(|id| found[usize::from(id.0)])
            };
            let numbered = (0_u16..).zip(&types[at].fields);
            let defaulted: Vec<u16> = numbered.filter(|(_, field)| counts(field)).map(|(number, _)| number).collect();
            more |= defaulted.len() > types[at].defaulted.len();
            found[at] = !defaulted.is_empty();
            types[at].defaulted = defaulted;
        }
        if !more {
            return;
        }
    }
}

fn parse_head(head: &'static str) -> TypeFacts {
    let mut words = head.split(' ');
    let mut facts = TypeFacts {
        name: words.next().unwrap_or(""),
        gvk: None,
        atomic: false,
        fields: Vec::new(),
        by_number: Vec::new(),
        defaulted: Vec::new(),
        constant: Vec::new(),
        by_name: Names::default(),
    };
    for word in words {
        if let Some(gvk) = word.strip_prefix("gvk=") {
            let mut parts = gvk.split('/');
            facts.gvk = Some((
                parts.next().unwrap_or_default(),
                parts.next().unwrap_or_default(),
                parts.next().unwrap_or_default(),
            ));
        } else if word == "atomic" {
            facts.atomic = true;
        }
    }
    facts
}

fn parse_field(line: &'static str, ids: &HashMap<&str, TypeId>) -> Option<FieldFacts> {
    let mut words = line.split(' ');
    let mut field = FieldFacts {
        name: words.next()?,
        kind: Type::parse(words.next()?, ids),
        numbers: words.next()?.trim_start_matches('#').split('.').filter_map(|n| n.parse().ok()).collect(),
        required: false,
        inline: false,
        list_type: ListType::Atomic,
        list_keys: Vec::new(),
        atomic: false,
        merge_key: None,
        strategy: PatchStrategy::default(),
        default: None,
    };
    for word in words {
        match word.split_once('=').unwrap_or((word, "")) {
            ("required", _) => field.required = true,
            ("inline", _) => field.inline = true,
            ("atomic", _) => field.atomic = true,
            ("list", "set") => field.list_type = ListType::Set,
            ("list", "map") => field.list_type = ListType::Map,
            ("keys", keys) => field.list_keys = keys.split(',').collect(),
            ("merge", key) => field.merge_key = Some(key),
            ("strategy", strategies) => {
                for strategy in strategies.split(',') {
                    match strategy {
                        "merge" => field.strategy.merge = true,
                        "replace" => field.strategy.replace = true,
                        "retainKeys" => field.strategy.retain_keys = true,
                        _ => {}
                    }
                }
            }
            ("default", value) => field.default = Some(value),
            _ => {}
        }
    }
    Some(field)
}

/// The type of this name: `core.v1.Pod`.
pub fn schema(name: &str) -> Option<&'static TypeFacts> {
    SCHEMA.by_name.get(name).map(|id| id.facts())
}

/// The type of the documents of a kind. `DeleteOptions` and other shared kinds are the same in every group.
pub fn schema_of(group: &str, version: &str, kind: &str) -> Option<&'static TypeFacts> {
    if let Some(id) = SCHEMA.by_kind.get(&(group, version, kind)) {
        return Some(id.facts());
    }
    match kind {
        "DeleteOptions" => schema("meta.v1.DeleteOptions"),
        "WatchEvent" => schema("meta.v1.WatchEvent"),
        "Status" if group.is_empty() => schema("meta.v1.Status"),
        "PartialObjectMetadata" if group == META => schema("meta.v1.PartialObjectMetadata"),
        "PartialObjectMetadataList" if group == META => schema("meta.v1.PartialObjectMetadataList"),
        _ => None,
    }
}
