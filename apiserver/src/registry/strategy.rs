//! What is particular to a kind: a [`Strategy`] is asked by the generic endpoints at each step of a request. Everything is
//! over `serde_json::Value`; the generic code has done what holds for all kinds (metadata, status, generation) before.

use crate::authentication::UserInfo;
use crate::storage::Store;
use crate::storage::object::Path;
use apimachinery::status::{FieldError, StatusError};
use futures::future::BoxFuture;
use serde_json::Value;
use std::sync::Arc;

/// Which part of an object a write addresses. All write the same stored object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The object itself.
    Main,
    Status,
    /// `namespaces/finalize`.
    Finalize,
    /// `certificatesigningrequests/approval`.
    Approval,
    /// `pods/ephemeralcontainers`.
    EphemeralContainers,
    /// `pods/resize`.
    Resize,
}

/// How an object is to be deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deletion {
    /// Removed at once (unless finalizers hold it).
    Immediate,
    /// Marked with a deletionTimestamp, `grace_seconds` ahead; removed when its agent says so (a delete with grace 0). With
    /// 0 seconds it is removed at once as well, unless it has been marked with more before.
    Graceful { grace_seconds: i64 },
}

/// What becomes of dependents when the deleter does not say. As `rest.GarbageCollectionPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GarbagePolicy {
    DeleteDependents,
    OrphanDependents,
    /// Objects of the kind have no dependents, and nothing of the sort is noted on them.
    Unsupported,
}

pub use apimachinery::facts::Column;

/// What a write has reserved outside its object (a service's IP and ports): kept by [`Reservation::commit`], given back
/// when dropped without.
pub trait Reservation: Send {
    fn commit(self: Box<Self>);
}

/// What a hook may use.
#[derive(Clone, Copy)]
pub struct HookContext<'a> {
    pub store: &'a Arc<Store>,
    pub dry_run: bool,
}

/// The rules of one kind. Every method has a default that suits most kinds.
pub trait Strategy: Send + Sync + 'static {
    /// Sets what the author left out. Runs on every incoming object, and after patches.
    fn defaults(&self, _object: &mut Value) {}

    /// Clears and sets what a creator has no say in. Status is gone already where it is a subresource.
    fn prepare_for_create(&self, _object: &mut Value) {}

    /// Is the status that a creator sends kept? (A kubelet registers its node with one.)
    fn keeps_status_on_create(&self) -> bool {
        false
    }

    /// Notes who creates an object, where the kind tells.
    fn note_creator(&self, _object: &mut Value, _user: &UserInfo) {}

    /// Clears and sets what an updater has no say in. For `Part::Main` status is that of `old` already; for
    /// `Part::Status` all but status, labels, annotations and finalizers.
    fn prepare_for_update(&self, _part: Part, _new: &mut Value, _old: &Value) {}

    /// Checks a new object, its metadata too.
    fn validate(&self, _object: &Value) -> Vec<FieldError> {
        Vec::new()
    }

    fn validate_update(&self, _part: Part, _new: &Value, _old: &Value) -> Vec<FieldError> {
        Vec::new()
    }

    /// Gives what has been checked the form in which it is stored.
    fn canonicalize(&self, _object: &mut Value) {}

    /// Deprecations and the like, for `Warning` headers.
    fn warnings(&self, _new: &Value, _old: Option<&Value>) -> Vec<String> {
        Vec::new()
    }

    /// May PUT create?
    fn allow_create_on_update(&self) -> bool {
        false
    }

    /// May an update leave the resourceVersion out?
    fn allow_unconditional_update(&self) -> bool {
        true
    }

    /// Does `metadata.generation` count changes of what is neither metadata nor status?
    fn tracks_generation(&self) -> bool {
        false
    }

    /// What a fieldSelector may name beside `metadata.name` and `metadata.namespace`.
    fn selectable_field_names(&self) -> &'static [&'static str] {
        &[]
    }

    /// The values of [`Strategy::selectable_field_names`], in any order; absent ones count as empty.
    fn selectable_fields(&self, _object: &Value) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// Columns of the table; None takes those of the facts, and Name and Created At where there are none.
    fn columns(&self) -> Option<Vec<Column>> {
        None
    }

    /// The cells of one object, one a column.
    fn row(&self, _object: &Value) -> Vec<Value> {
        Vec::new()
    }

    /// How an object goes. `grace_seconds` is what the deleter asked for.
    fn deletion(&self, _object: &Value, _grace_seconds: Option<i64>) -> Deletion {
        Deletion::Immediate
    }

    /// What of an object [`Strategy::deletion`], [`Strategy::is_finalized`] and [`Strategy::after_delete`] do not look at and
    /// need not be read, and is worth it.
    fn unread_by_deletion(&self) -> &'static [Path] {
        &[]
    }

    fn default_garbage_policy(&self) -> GarbagePolicy {
        GarbagePolicy::DeleteDependents
    }

    /// What a deleter should know who says nothing of dependents.
    fn deletion_warning(&self) -> Option<&'static str> {
        None
    }

    /// An object has been marked as being deleted: what else changes on it?
    fn on_deletion_mark(&self, _object: &mut Value) {}

    /// Does nothing but `metadata.finalizers` hold a deleted object back? (Namespaces have finalizers in their spec.)
    fn is_finalized(&self, _object: &Value) -> bool {
        true
    }

    /// How long an object lives, in seconds; None for ever.
    fn time_to_live(&self, _object: &Value) -> Option<i64> {
        None
    }

    /// From the stored version to the served one, in place. Only for kinds served in a version other than the stored.
    #[allow(clippy::wrong_self_convention)] // It converts an object, not the strategy.
    fn from_stored(&self, _object: &mut Value) {}

    /// From the served version to the stored one, in place.
    fn to_stored(&self, _object: &mut Value) {}

    /// Do [`Strategy::from_stored`] and [`Strategy::to_stored`] do anything?
    fn converts(&self) -> bool {
        false
    }

    /// Reserves what a new or changed object needs outside itself (service IPs, node ports) and writes it into the object.
    /// Runs after validation of what the author gave, before the validating admission.
    fn reserve<'a>(
        &'a self,
        _context: HookContext<'a>,
        _new: &'a mut Value,
        _old: Option<&'a Value>,
    ) -> BoxFuture<'a, Result<Option<Box<dyn Reservation>>, StatusError>> {
        Box::pin(async { Ok(None) })
    }

    /// After an object has gone from the store for good.
    fn after_delete<'a>(&'a self, _context: HookContext<'a>, _old: &'a Value) -> BoxFuture<'a, ()> {
        Box::pin(async {})
    }
}

/// A kind without rules of its own.
pub struct Plain;

impl Strategy for Plain {}
