//! What is particular to a kind, as data: how its objects are named, defaulted, prepared, validated, selected and shown.
//! A kind's file fills in what it needs; everything else is what most kinds do.

use super::field::{Errors, Field};
use super::metadata::{self, NameRule};
use super::print::Clock;
use apimachinery::facts::Column;
use serde_json::Value;

pub type Check = fn(&Field<'_, '_>, &mut Errors);
pub type CheckUpdate = fn(&Field<'_, '_>, &Field<'_, '_>, &mut Errors);

/// The rules of one kind. Objects are of the version that is stored.
#[derive(Clone, Copy)]
pub struct Rules {
    /// Which names its objects may have.
    pub name: NameRule,
    /// `metadata.generation` is kept: 1 at first, more with each change of what is desired.
    pub generation: bool,
    /// The status of a new object. None keeps what the client sent.
    pub initial_status: Option<fn(&Value) -> Value>,
    /// A write of the status leaves labels, annotations, finalizers and owners alone.
    pub status_keeps_metadata: bool,
    /// Sets what is left open. Applied to whatever comes in, and must do nothing the second time.
    pub default: fn(&mut Value),
    /// After system fields (uid, creationTimestamp) are set.
    pub prepare_create: fn(&mut Value),
    pub prepare_update: fn(&mut Value, &Value),
    pub prepare_status: fn(&mut Value, &Value),
    /// Gives what has been checked the form in which it is stored.
    pub canonicalize: fn(&mut Value),
    /// Everything but metadata, which is checked alike for all kinds.
    pub validate: Check,
    /// What depends on metadata that may change, where `validate` looks at none such: it is not asked of an update then that
    /// leaves all else as it was. None where `validate` is to be asked always.
    pub validate_metadata: Option<Check>,
    /// What holds for new objects only.
    pub validate_create: Check,
    /// What may not change. `validate` holds as well.
    pub validate_update: CheckUpdate,
    pub validate_status: CheckUpdate,
    /// `PUT` of a name that does not exist creates it.
    pub create_on_update: bool,
    /// `PUT` without a resourceVersion overwrites what there is.
    pub unconditional_update: bool,
    /// Deprecations and the like, of a new object or of a change: sent as `Warning` headers.
    pub warnings: fn(&Value, Option<&Value>) -> Vec<String>,
    /// The names that `selectable` answers values for.
    pub selectable_names: &'static [&'static str],
    /// Fields besides `metadata.name` and `metadata.namespace` that a field selector may name.
    pub selectable: fn(&Value) -> Vec<(&'static str, String)>,
    /// Columns where the tables of facts have none.
    pub columns: Option<&'static [Column]>,
    /// The cells of its row, in the order of its columns. None shows name and age.
    pub row: Option<fn(&Value, &Clock) -> Vec<Value>>,
}

impl Rules {
    pub const DEFAULT: Rules = Rules {
        name: metadata::subdomain,
        generation: false,
        initial_status: Some(|_| Value::Null),
        status_keeps_metadata: false,
        default: |_| {},
        prepare_create: |_| {},
        prepare_update: |_, _| {},
        prepare_status: |_, _| {},
        canonicalize: |_| {},
        validate: |_, _| {},
        validate_metadata: None,
        validate_create: |_, _| {},
        validate_update: |_, _, _| {},
        validate_status: |_, _, _| {},
        create_on_update: false,
        unconditional_update: true,
        warnings: |_, _| Vec::new(),
        selectable_names: &[],
        selectable: |_| Vec::new(),
        columns: None,
        row: None,
    };
}
