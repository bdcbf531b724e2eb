//! `as=Table`: what `kubectl get` prints, made here so that clients need not know a kind.

use crate::registry::Resource;
use crate::registry::strategy::Column;
use crate::server::negotiation::Wanted;
use crate::server::respond::metadata_only;
use apimachinery::status::StatusError;
use serde_json::{Map, Value, json};

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

/// What a column is, where it is not just a field that the schema describes.
fn description(kind: &str, column: &str) -> &'static str {
    match (kind, column) {
        (_, "Name") => {
            "Name must be unique within a namespace. Is required when creating resources, although some resources may allow a client to request the generation of an appropriate name automatically. Name is primarily intended for creation idempotence and configuration definition. Cannot be updated. More info: https://kubernetes.io/docs/concepts/overview/working-with-objects/names#names"
        }
        (_, "Age" | "Created At") => {
            "CreationTimestamp is a timestamp representing the server time when this object was created. It is not guaranteed to be set in happens-before order across separate operations. Clients may not set this value. It is represented in RFC3339 form and is in UTC.\n\nPopulated by the system. Read-only. Null for lists. More info: https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#metadata"
        }
        (_, "Containers") => "Names of each container in the template.",
        (_, "Images") => "Images referenced by each container in the template.",
        (_, "Users") => "Users in the roleBinding",
        (_, "Groups") => "Groups in the roleBinding",
        (_, "ServiceAccounts") => "ServiceAccounts in the roleBinding",
        ("Pod", "Ready") => "The aggregate readiness state of this pod for accepting traffic.",
        ("Pod", "Status") => "The aggregate status of the containers in this pod.",
        ("Pod", "Restarts") => {
            "The number of times the containers in this pod have been restarted and when the last container in this pod has restarted."
        }
        ("Node", "Status") => "The status of the node",
        ("Node", "Roles") => "The roles of the node",
        ("Namespace", "Status") => "The status of the namespace",
        ("Ingress", "Hosts") => "Hosts that incoming requests are matched against before the ingress rule",
        ("Ingress", "Address") => "Address is a list containing ingress points for the load-balancer",
        ("Ingress", "Ports") => "Ports of TLS configurations that open",
        ("PersistentVolume", "StorageClass") => "StorageClass of the pv",
        ("PersistentVolumeClaim", "StorageClass") => "StorageClass of the pvc",
        ("ControllerRevision", "Controller") => "Controller of the object",
        ("ComponentStatus", "Status") => "Status of the component conditions",
        ("ComponentStatus", "Message") => "Message of the component conditions",
        ("ComponentStatus", "Error") => "Error of the component conditions",
        _ => "",
    }
}
