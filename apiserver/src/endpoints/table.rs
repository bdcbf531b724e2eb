//! `as=Table`: what `kubectl get` prints, made here so that clients need not know a kind.

use crate::registry::Resource;
use crate::registry::strategy::Column;
use crate::server::negotiation::Wanted;
use crate::server::respond::metadata_only;
use apimachinery::facts::{self, Docs};
use apimachinery::status::StatusError;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::sync::LazyLock;

/// What of the object comes with its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Include {
    None,
    #[default]
    Metadata,
    Object,
}

/// Columns of kinds that say nothing of theirs.
const DEFAULT_COLUMNS: [Column; 2] = [
    Column { name: "Name", kind: "string", format: "name", priority: 0 },
    Column { name: "Created At", kind: "date", format: "", priority: 0 },
];

// === impl Include ===

impl Include {
    /// The parameter `includeObject`.
    pub fn parse(text: &str) -> Result<Self, StatusError> {
        match text {
            "" | "Metadata" => Ok(Self::Metadata),
            "None" => Ok(Self::None),
            "Object" => Ok(Self::Object),
            _ => Err(StatusError::bad_request(format!("unrecognized includeObject value: {text:?}"))),
        }
    }
}

/// The table of one object.
pub fn one(wanted: Wanted, resource: &Resource, object: &Value, include: Include) -> Value {
    let metadata = object.get("metadata").and_then(|m| m.get("resourceVersion")).cloned();
    let metadata = metadata.map_or_else(|| json!({}), |version| json!({"resourceVersion": version}));
    many(wanted, resource, std::slice::from_ref(object), metadata, include, true)
}

/// The table of a list, whose metadata is given. Watches send the column definitions with their first event only.
pub fn many(
    wanted: Wanted,
    resource: &Resource,
    objects: &[Value],
    metadata: Value,
    include: Include,
    with_columns: bool,
) -> Value {
    let columns = resource.strategy.columns().unwrap_or_else(|| DEFAULT_COLUMNS.to_vec());
    let rows: Vec<Value> = objects.iter().map(|object| row(wanted, resource, object, include)).collect();
    let define = |column| definition(&resource.kind, column);
    let definitions: Value = if with_columns { columns.iter().map(define).collect() } else { json!([]) };
    json!({
        "kind": "Table",
        "apiVersion": wanted.meta_version,
        "metadata": metadata,
        "columnDefinitions": definitions,
        "rows": rows,
    })
}

/// The row of one object.
pub fn row(wanted: Wanted, resource: &Resource, object: &Value, include: Include) -> Value {
    let own = resource.strategy.columns().is_some();
    let cells = if own { resource.strategy.row(object) } else { default_row(object) };
    let mut row = Map::new();
    row.insert("cells".to_owned(), Value::Array(cells));
    match include {
        Include::None => {}
        Include::Metadata => {
            row.insert("object".to_owned(), metadata_only(wanted.meta_version, object));
        }
        Include::Object => {
            row.insert("object".to_owned(), object.clone());
        }
    }
    Value::Object(row)
}

fn default_row(object: &Value) -> Vec<Value> {
    let of = |field: &str| object.pointer(field).cloned().unwrap_or(Value::Null);
    vec![of("/metadata/name"), of("/metadata/creationTimestamp")]
}

fn definition(of: &str, column: &Column) -> Value {
    let Column { name, kind, format, priority } = column;
    json!({"name": name, "type": kind, "format": format, "description": description(of, name), "priority": priority})
}

/// What a column is.
fn description(kind: &str, column: &str) -> &'static str {
    let known = [kind, "*"].iter().find_map(|kind| DESCRIPTIONS.get(*kind)?.get(column));
    known.map_or("", String::as_str)
}

/// By kind (`*` for all) and column, gathered when the first table is made: most of it stands in the schema's descriptions.
static DESCRIPTIONS: LazyLock<HashMap<&str, HashMap<&str, String>>> = LazyLock::new(|| {
    let docs = Docs::inflate();
    let types = docs.types();
    let of_field = |place: &str| {
        let (name, path) = place.split_once(' ')?;
        let (parents, field) = path.rsplit_once('.').unwrap_or(("", path));
        let steps = parents.split('.').filter(|step| !step.is_empty());
        let owner = steps.into_iter().try_fold(facts::schema(name)?, |at, step| at.field(step)?.kind.object())?;
        Some(types.get(owner.name)?.field(field)?.description().into_owned())
    };
    let line = |line: &'static str| {
        let mut cells = line.splitn(3, " | ");
        let (kind, column, said) = (cells.next()?, cells.next()?, cells.next()?);
        let text = said.strip_prefix('.').map_or_else(|| Some(said.to_owned()), of_field)?;
        Some((kind, column, text))
    };
    let mut descriptions: HashMap<&str, HashMap<&str, String>> = HashMap::new();
    for (kind, column, text) in include_str!("columns.txt").lines().filter_map(line) {
        descriptions.entry(kind).or_default().insert(column, text);
    }
    descriptions
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_is_described() {
        let lines = include_str!("columns.txt").lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(DESCRIPTIONS.values().map(HashMap::len).sum::<usize>(), lines, "fields that there are");
        for kind in facts::kinds().iter().filter(|kind| kind.is_stored()) {
            for column in facts::columns(kind.group, kind.kind).into_iter().flatten() {
                assert!(!description(kind.kind, column.name).is_empty(), "{} {}", kind.kind, column.name);
            }
        }
        assert_eq!(description("Pod", "Ready"), "The aggregate readiness state of this pod for accepting traffic.");
        assert!(description("Pod", "Node").starts_with("NodeName indicates in which node this pod is scheduled."));
    }
}
