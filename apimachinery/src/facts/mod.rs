//! What Pilothouse knows of Kubernetes' kinds: which are served and how, the fields of every type with their merge facts,
//! and the columns that `kubectl get` shows. The tables are text, generated from Kubernetes' own documents by
//! `facts/generate.py`, embedded in the binary and parsed once, on first use, into borrowed slices.

mod docs;
mod kinds;
mod schema;
#[cfg(test)]
mod tests;

pub use docs::{Docs, FieldDocs, TypeDocs};
pub use kinds::{
    Column, GroupFacts, KindFacts, SubresourceFacts, columns, generally_available, groups, kind, kinds, offered,
    preferred_kind, resource, switch_on, versions_off,
};
pub use schema::{FieldFacts, ListType, PatchStrategy, Type, TypeFacts, TypeId, schema, schema_of};

/// A cell that stands for nothing in the tables.
fn word(cell: &'static str) -> &'static str {
    if cell == "-" { "" } else { cell }
}

fn list(cell: &'static str) -> Vec<&'static str> {
    word(cell).split(',').filter(|part| !part.is_empty()).collect()
}
