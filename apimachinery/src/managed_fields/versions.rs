//! Objects in the versions in which their fields are owned: a field of one version may have another name in another, or none.

use super::typing::Typing;
use super::walk::{self, Difference};
use super::{Entry, Ignored};
use serde_json::Value;
use std::borrow::Cow;

/// An object of one version (the first) in another, with that version's type; None if there is no such version.
pub type Convert<'a, T> = &'a dyn Fn(&Value, &str, &str) -> Option<(T, Value)>;

/// The version in which a writer writes, and the others.
#[derive(Clone, Copy)]
pub struct Versions<'a, T> {
    pub at: T,
    pub own: &'a str,
    /// None where all is of one version.
    pub convert: Option<Convert<'a, T>>,
}

/// What a write changes, as the owners of each version see it.
pub struct Changes<'a, T> {
    versions: Versions<'a, T>,
    old: &'a Value,
    new: &'a Value,
    ignored: &'a Ignored,
    /// In the writer's version.
    pub own: Difference,
    others: Vec<(String, Option<Difference>)>,
}

// === impl Versions ===

impl<'a, T: Typing> Versions<'a, T> {
    /// The version in which an entry's fields are to be read.
    pub fn of<'e>(&self, entry: &'e Entry) -> &'e str
    where
        'a: 'e,
    {
        if self.convert.is_some() { &entry.api_version } else { self.own }
    }

    /// An object of the writer's version in another.
    pub fn view<'v>(&self, object: &'v Value, version: &str) -> Option<(T, Cow<'v, Value>)> {
        match self.convert.filter(|_| version != self.own) {
            None => Some((self.at, Cow::Borrowed(object))),
            Some(convert) => convert(object, self.own, version).map(|(at, object)| (at, Cow::Owned(object))),
        }
    }

    /// An object of another version in the writer's.
    pub fn back(&self, object: Value, version: &str) -> Value {
        match self.convert.filter(|_| version != self.own) {
            None => object,
            Some(convert) => convert(&object, version, self.own).map_or(object, |(_, object)| object),
        }
    }
}

// === impl Changes ===

impl<'a, T: Typing> Changes<'a, T> {
    pub fn between(versions: Versions<'a, T>, old: &'a Value, new: &'a Value, ignored: &'a Ignored) -> Self {
        let own = difference(versions.at, old, new, ignored);
        Self { versions, old, new, ignored, own, others: Vec::new() }
    }

    /// As an entry sees it; None if its version is no more.
    pub fn seen_by(&mut self, entry: &Entry) -> Option<&Difference> {
        let version = self.versions.of(entry);
        if version == self.versions.own {
            return Some(&self.own);
        }
        let at = self.others.iter().position(|(known, _)| known == version).unwrap_or_else(|| {
            let (old, new) = (self.versions.view(self.old, version), self.versions.view(self.new, version));
            let seen = old.zip(new).map(|((at, old), (_, new))| difference(at, &old, &new, self.ignored));
            self.others.push((version.to_owned(), seen));
            self.others.len() - 1
        });
        self.others[at].1.as_ref()
    }

    /// Takes from an entry what has been changed and removed.
    pub fn leave(&mut self, entry: &mut Entry) {
        match self.seen_by(entry) {
            Some(seen) => {
                entry.lose(&seen.changed);
                entry.lose(&seen.removed);
            }
            None => entry.fields = super::Fields::Set(super::FieldSet::default()),
        }
    }
}

fn difference<T: Typing>(at: T, old: &Value, new: &Value, ignored: &Ignored) -> Difference {
    let mut difference = walk::compare(at, old, new);
    ignored.filter(&mut difference.changed);
    ignored.filter(&mut difference.removed);
    difference
}
