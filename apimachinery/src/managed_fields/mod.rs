//! Who set which field: `metadata.managedFields`, and server-side apply. As the packages `managedfields` of apimachinery and
//! `merge` of structured-merge-diff.
//!
//! A writer that updates comes to own the fields that it changes, and takes them from all others. A writer that applies owns
//! the fields that it names, shares those on whose value all agree, is told of conflicts, and drops a field by no longer
//! naming it, if nobody else wants it.
//!
//! A write must cost little: the entries are kept as text, and the text of a set of fields is made into a tree only if the
//! write changes it. What is written here is what Kubernetes would write, to the byte order of an entry's members: a Go client
//! that sends back what it read sends the same text.

mod apply;
#[cfg(test)]
mod laws;
mod set;
#[cfg(test)]
mod tests;
mod text;
mod typing;
mod versions;
mod walk;

pub use apply::{Applied, ApplyError, Conflict, apply};
pub use set::FieldSet;
pub use typing::{Form, Place, Scalar, Typing};
pub use versions::Convert;
pub use walk::{fields, mistakes};

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::fmt;
use std::sync::LazyLock;
use versions::{Changes, Versions};

/// More managers that update than this are lumped together, the oldest first. As `DefaultMaxUpdateManagers`.
const UPDATE_MANAGERS_MAX: usize = 10;
const ANCIENT_CHANGES: &str = "ancient-changes";
/// A writer whose name nobody knows.
const UNKNOWN: &str = "unknown";

/// Nobody owns these. As `stripSet`.
static NOBODYS: LazyLock<FieldSet> = LazyLock::new(|| {
    FieldSet::of_fields(&[
        "apiVersion",
        "kind",
        "metadata",
        "metadata.name",
        "metadata.namespace",
        "metadata.creationTimestamp",
        "metadata.selfLink",
        "metadata.uid",
        "metadata.clusterName",
        "metadata.generation",
        "metadata.managedFields",
        "metadata.resourceVersion",
    ])
});

/// How a manager came by its fields. Entries are sorted by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Apply,
    Update,
}

/// Who writes, and how.
#[derive(Clone, Copy, Debug)]
pub struct Writer<'a> {
    pub manager: &'a str,
    /// The version in which it writes: `apps/v1`.
    pub api_version: &'a str,
    /// Empty for the object itself.
    pub subresource: &'a str,
}

/// Fields that a write through some endpoint cannot set, and so does not come to own.
#[derive(Clone, Debug, Default)]
pub enum Ignored {
    #[default]
    Nothing,
    /// These, with all that is below them.
    Except(FieldSet),
    /// All but what lies below these patterns of path elements, of which `*` is any.
    AllBut(&'static [&'static [&'static str]]),
}

/// One entry of managedFields.
#[derive(Clone, Debug)]
struct Entry {
    manager: String,
    operation: Operation,
    api_version: String,
    time: Option<String>,
    subresource: String,
    fields: Fields,
}

/// A set of fields, as text for as long as nobody changes it.
#[derive(Clone, Debug)]
enum Fields {
    Text(Box<str>),
    Set(FieldSet),
}

/// All entries of an object.
#[derive(Clone, Debug, Default)]
pub struct ManagedFields {
    entries: Vec<Entry>,
}

/// Entries that cannot be read. Kubernetes then goes on as if there were none.
#[derive(Debug, thiserror::Error)]
pub enum ManagedFieldsError {
    #[error("managedFields: {0}")]
    Syntax(#[from] serde_json::Error),
    #[error("managedFields[{at}]: {what}")]
    Invalid { at: usize, what: &'static str },
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct EntryText<'a> {
    manager: String,
    operation: String,
    api_version: String,
    time: Option<String>,
    fields_type: String,
    #[serde(borrow, deserialize_with = "raw")]
    fields_v1: Option<&'a str>,
    subresource: String,
}

// === impl EntryText ===

fn raw<'de, D: serde::Deserializer<'de>>(text: D) -> Result<Option<&'de str>, D::Error> {
    <&RawValue>::deserialize(text).map(|raw| Some(raw.get()))
}

impl<'a> EntryText<'a> {
    /// Entries as [`ManagedFields::write`] writes them; None for other texts, which may be as good.
    fn read_plain(text: &'a str) -> Option<Vec<Self>> {
        let (mut reading, mut entries) = (text::Reading::of(text), Vec::new());
        reading.expect(b'[')?;
        loop {
            let mut entry = Self::default();
            reading.expect(b'{')?;
            loop {
                let key = reading.key()?;
                if key == "fieldsV1" {
                    entry.fields_v1 = Some(reading.skip()?);
                } else {
                    let value = reading.string().filter(|value| !value.contains('\\'))?.to_owned();
                    match key {
                        "manager" => entry.manager = value,
                        "operation" => entry.operation = value,
                        "apiVersion" => entry.api_version = value,
                        "time" => entry.time = Some(value),
                        "fieldsType" => entry.fields_type = value,
                        "subresource" => entry.subresource = value,
                        _ => return None,
                    }
                }
                if reading.expect(b',').is_none() {
                    break;
                }
            }
            reading.expect(b'}')?;
            entries.push(entry);
            if reading.expect(b',').is_none() {
                break;
            }
        }
        reading.expect(b']')?;
        reading.is_at_end().then_some(entries)
    }
}

// === impl Ignored ===

impl Ignored {
    fn filter(&self, set: &mut FieldSet) {
        match self {
            Self::Nothing => {}
            Self::Except(fields) => set.cut(fields),
            Self::AllBut(patterns) => set.keep_below(patterns),
        }
    }

    /// What is left out with all that is below it, if that says it all.
    fn cut(&self) -> Option<&FieldSet> {
        static NOTHING: LazyLock<FieldSet> = LazyLock::new(FieldSet::default);
        match self {
            Self::Nothing => Some(&NOTHING),
            Self::Except(fields) => Some(fields),
            Self::AllBut(_) => None,
        }
    }
}

// === impl Fields ===

impl Fields {
    fn set(&self) -> FieldSet {
        match self {
            Self::Text(text) => FieldSet::parse(text).unwrap_or_default(),
            Self::Set(set) => set.clone(),
        }
    }

    /// Adds the members of a set.
    fn add(&mut self, more: FieldSet) {
        if let Self::Text(text) = self
            && let Some(text) = text::with(text, &more)
        {
            *self = Self::Text(text.into());
            return;
        }
        let mut set = self.set();
        set.add(more);
        *self = Self::Set(set);
    }

    fn subtract(&mut self, less: &FieldSet) {
        if let Self::Text(text) = self
            && let Some(text) = text::without(text, less)
        {
            *self = if text.is_empty() { Self::Set(FieldSet::default()) } else { Self::Text(text.into()) };
            return;
        }
        let mut set = self.set();
        set.subtract(less);
        *self = Self::Set(set);
    }

    /// Is nothing in it? A text is never without a member.
    fn is_empty(&self) -> bool {
        matches!(self, Self::Set(set) if set.is_empty())
    }
}

// === impl Entry ===

impl Entry {
    fn of(writer: &Writer<'_>, operation: Operation) -> Self {
        Self {
            manager: writer.manager.to_owned(),
            operation,
            api_version: writer.api_version.to_owned(),
            time: None,
            subresource: writer.subresource.to_owned(),
            fields: Fields::Set(FieldSet::default()),
        }
    }

    fn lose(&mut self, gone: &FieldSet) {
        if !gone.is_empty() {
            self.fields.subtract(gone);
        }
    }

    /// Entries of the same manager, in this sense, are one.
    fn is_by(&self, writer: &Writer<'_>, operation: Operation) -> bool {
        self.operation == operation
            && self.manager == writer.manager
            && self.subresource == writer.subresource
            && (operation == Operation::Apply || self.api_version == writer.api_version)
    }

    /// As `sortEncodedManagedFields`.
    fn order(&self) -> (Operation, &str, &str, &str, &str) {
        (self.operation, self.time(), &self.manager, &self.api_version, &self.subresource)
    }

    fn time(&self) -> &str {
        self.time.as_deref().unwrap_or("")
    }

    fn write(&self, out: &mut String) {
        let mut first = true;
        let mut member = |name: &str, value: &str, out: &mut String| {
            if !value.is_empty() {
                out.push(if std::mem::replace(&mut first, false) { '{' } else { ',' });
                out.push('"');
                out.push_str(name);
                out.push_str("\":");
                set::write_text("", value, out);
            }
        };
        let operation = if self.operation == Operation::Apply { "Apply" } else { "Update" };
        member("manager", &self.manager, out);
        member("operation", operation, out);
        member("apiVersion", &self.api_version, out);
        member("time", self.time(), out);
        member("fieldsType", "FieldsV1", out);
        out.push_str(",\"fieldsV1\":");
        match &self.fields {
            Fields::Text(text) => out.push_str(text),
            Fields::Set(set) => set.write(out),
        }
        member("subresource", &self.subresource, out);
        out.push('}');
    }
}

// === impl ManagedFields ===

impl ManagedFields {
    /// Reads `metadata.managedFields`. An empty text is no entries. As `DecodeManagedFields`.
    pub fn parse(text: &str) -> Result<Self, ManagedFieldsError> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let read = match EntryText::read_plain(text) {
            Some(read) => read,
            None => serde_json::from_str(text)?,
        };
        let mut entries = Vec::with_capacity(read.len() + 1);
        for (at, entry) in read.into_iter().enumerate() {
            let refuse = |what| Err(ManagedFieldsError::Invalid { at, what });
            let operation = match entry.operation.as_str() {
                "Apply" => Operation::Apply,
                "Update" => Operation::Update,
                _ => return refuse("operation must be `Apply` or `Update`"),
            };
            if entry.api_version.is_empty() {
                return refuse("apiVersion must not be empty");
            }
            match entry.fields_type.as_str() {
                "FieldsV1" => {}
                "" => return refuse("missing fieldsType in managed fields entry"),
                _ => return refuse("invalid fieldsType in managed fields entry"),
            }
            entries.push(Entry {
                manager: entry.manager,
                operation,
                api_version: entry.api_version,
                time: entry.time,
                subresource: entry.subresource,
                fields: match entry.fields_v1 {
                    Some(text) if text != "null" => Fields::Text(text.into()),
                    _ => Fields::Set(FieldSet::default()),
                },
            });
        }
        Ok(Self { entries })
    }

    /// As [`ManagedFields::parse`], of what a client has sent: the sets are looked at too, and take their plain form.
    pub fn parse_sent(text: &str) -> Result<Self, ManagedFieldsError> {
        let mut read = Self::parse(text)?;
        for entry in &mut read.entries {
            if let Fields::Text(text) = &entry.fields {
                entry.fields = Fields::Set(FieldSet::parse(text)?);
            }
        }
        Ok(read)
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The text to be stored; empty if there are no entries.
    pub fn write(&self) -> String {
        let mut out = String::with_capacity(4096);
        for (at, entry) in self.entries.iter().enumerate() {
            out.push(if at == 0 { '[' } else { ',' });
            entry.write(&mut out);
        }
        if !out.is_empty() {
            out.push(']');
        }
        out
    }

    /// The same but for the times?
    pub fn equals_but_for_times(&self, other: &Self) -> bool {
        let same = |a: &Entry, b: &Entry| {
            let fields = match (&a.fields, &b.fields) {
                (Fields::Text(a), Fields::Text(b)) if a == b => true,
                (a, b) => a.set() == b.set(),
            };
            fields
                && a.operation == b.operation
                && (&a.manager, &a.api_version, &a.subresource) == (&b.manager, &b.api_version, &b.subresource)
        };
        self.entries.len() == other.entries.len()
            && self.entries.iter().all(|a| other.entries.iter().any(|b| same(a, b)))
    }

    /// Notes an update of `old` to `new` at a time. Gives false if no entry changes by it. `convert` is for kinds that there
    /// are several versions of.
    pub fn update<T: Typing>(
        &mut self,
        at: T,
        old: &Value,
        new: &Value,
        writer: &Writer<'_>,
        ignored: &Ignored,
        now: &str,
        convert: Option<Convert<'_, T>>,
    ) -> bool {
        let writer = &Writer { manager: if writer.manager.is_empty() { UNKNOWN } else { writer.manager }, ..*writer };
        if self.entries.is_empty()
            && old.as_object().is_some_and(Map::is_empty)
            && let Some(cut) = ignored.cut()
        {
            let text = text::of_new(at, new, &NOBODYS, cut);
            if text != "{}" {
                let (fields, time) = (Fields::Text(text.into()), Some(now.to_owned()));
                self.entries.push(Entry { fields, time, ..Entry::of(writer, Operation::Update) });
            }
            return true;
        }
        let mut changes = Changes::between(Versions { at, own: writer.api_version, convert }, old, new, ignored);
        if changes.own.is_empty() {
            return false;
        }
        let mut taken = changes.own.changed.clone();
        taken.subtract(&NOBODYS);
        for entry in &mut self.entries {
            if entry.is_by(writer, Operation::Update) {
                entry.lose(&changes.own.removed);
            } else {
                changes.leave(entry);
            }
        }
        self.take(taken, writer, now);
        self.entries.retain(|entry| !entry.fields.is_empty());
        self.cap();
        self.sort();
        true
    }

    /// Gives fields to a manager that updates.
    fn take(&mut self, taken: FieldSet, writer: &Writer<'_>, now: &str) {
        if taken.is_empty() {
            return;
        }
        let entry = match self.entries.iter_mut().position(|entry| entry.is_by(writer, Operation::Update)) {
            Some(at) => &mut self.entries[at],
            None => {
                self.entries.push(Entry::of(writer, Operation::Update));
                let last = self.entries.len() - 1;
                &mut self.entries[last]
            }
        };
        entry.time = Some(now.to_owned());
        entry.fields.add(taken);
    }

    /// Lumps the oldest managers that update into one a version. As `capUpdateManagers`.
    fn cap(&mut self) {
        let mut updaters: Vec<usize> =
            (0..self.entries.len()).filter(|at| self.entries[*at].operation == Operation::Update).collect();
        let mut count = updaters.len();
        if count <= UPDATE_MANAGERS_MAX {
            return;
        }
        updaters.sort_by_key(|at| (self.entries[*at].time().to_owned(), self.entries[*at].manager.clone()));
        let mut first_of: HashMap<String, usize> = HashMap::new();
        let mut lumped = vec![false; self.entries.len()];
        for at in updaters {
            if count <= UPDATE_MANAGERS_MAX {
                break;
            }
            let version = self.entries[at].api_version.clone();
            let ancient = Writer { manager: ANCIENT_CHANGES, api_version: &version, subresource: "" };
            let bucket = self.entries.iter().position(|entry| entry.is_by(&ancient, Operation::Update));
            let Some(&first) = first_of.get(&version) else {
                first_of.insert(version, at);
                continue;
            };
            let bucket = bucket.unwrap_or(first);
            if bucket == at {
                continue;
            }
            let (fields, time) = (self.entries[at].fields.set(), self.entries[at].time.clone());
            let bucket = &mut self.entries[bucket];
            let mut all = bucket.fields.set();
            all.add(fields);
            (bucket.manager, bucket.subresource) = (ANCIENT_CHANGES.to_owned(), String::new());
            (bucket.fields, bucket.time) = (Fields::Set(all), time);
            lumped[at] = true;
            count -= 1;
        }
        let mut at = 0;
        self.entries.retain(|_| {
            at += 1;
            !lumped[at - 1]
        });
    }

    fn sort(&mut self) {
        self.entries.sort_by(|a, b| a.order().cmp(&b.order()));
    }
}

/// A manager as conflicts name it.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.manager)?;
        if !self.subresource.is_empty() {
            write!(f, " with subresource {:?}", self.subresource)?;
        }
        if self.operation == Operation::Update {
            write!(f, " using {}", self.api_version)?;
        }
        Ok(())
    }
}
