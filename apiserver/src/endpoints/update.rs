//! PUT, and the part that PATCH shares with it: a new version of an object, made from the old one, checked, and written if
//! nobody came between.

use super::ownership::{self, Ownership};
use super::{Outcome, ResourceRequest, create, delete, get, metadata};
use crate::admission::Operation;
use crate::registry::object::{Content, compare_content};
use crate::registry::strategy::{HookContext, Part};
use crate::server::negotiation::Incoming;
use crate::storage::{Put, StoredObject};
use apimachinery::status::{FieldError, StatusError};
use serde_json::{Value, json};
use std::sync::Arc;

/// Attempts of an update that names no resourceVersion, as of a patch.
const ATTEMPTS: usize = 5;

/// Gives the object as it shall be, from what it is.
pub trait Produce: Send {
    /// `old` comes without its managedFields: `managed` is their text.
    fn produce(&mut self, old: &Value, managed: &str) -> Result<Produced, StatusError>;
    /// `UpdateOptions` or `PatchOptions`.
    fn options(&self) -> Value;
}

/// A new version of an object.
pub struct Produced {
    pub object: Value,
    pub warnings: Vec<String>,
    pub ownership: Ownership,
}

/// What came in by PUT: used up by the first attempt, most often the only one.
struct Whole<'a> {
    incoming: Option<Incoming>,
    again: &'a (dyn Fn() -> Result<Incoming, StatusError> + Send + Sync),
    namespace: &'a str,
}

impl Produce for Whole<'_> {
    fn produce(&mut self, _old: &Value, _managed: &str) -> Result<Produced, StatusError> {
        let Incoming { mut object, warnings } = self.incoming.take().map_or_else(self.again, Ok)?;
        metadata::ensure_namespace(&mut object, self.namespace)?;
        Ok(Produced { object, warnings, ownership: Ownership::OfWriter })
    }

    fn options(&self) -> Value {
        json!({"kind": "UpdateOptions", "apiVersion": "meta.k8s.io/v1"})
    }
}

/// Replaces an object; creates it where its kind allows that. `again` gives what came in once more.
pub async fn update(
    request: &mut ResourceRequest<'_>,
    mut incoming: Incoming,
    again: &(dyn Fn() -> Result<Incoming, StatusError> + Send + Sync),
) -> Result<Outcome, StatusError> {
    metadata::ensure_namespace(&mut incoming.object, request.namespace())?;
    metadata::check_name(&incoming.object, &request.info.name)?;
    let uid = metadata::text(&incoming.object, "uid");
    let current = match newest(request).await? {
        Some(current) => current,
        None if !uid.is_empty() => return Err(other_uid(request, uid, "", 0)),
        None if request.resource.strategy.allow_create_on_update() && request.part == Part::Main => {
            create::authorize(request).await?;
            metadata::of(&mut incoming.object).remove("resourceVersion");
            return create::create(request, incoming).await;
        }
        None => return Err(request.not_found()),
    };
    let mut whole = Whole { incoming: Some(incoming), again, namespace: request.namespace() };
    replace(request, current, &mut whole).await
}

/// The object as the cache has it, or, if it does not, as etcd has it.
pub async fn newest(request: &ResourceRequest<'_>) -> Result<Option<Arc<StoredObject>>, StatusError> {
    let store = &request.context.store;
    let (namespace, name) = (request.namespace(), &request.info.name);
    match store.get_cached(request.resource, namespace, name) {
        Ok(object) => Ok(Some(object)),
        Err(_) => store.get_uncached(request.resource, namespace, name).await,
    }
}

/// Writes what `produce` makes of the current object. The current one may be old news (it is the cache's): what is refused
/// on its ground is tried again on the newest.
pub async fn replace(
    request: &ResourceRequest<'_>,
    mut current: Arc<StoredObject>,
    produce: &mut dyn Produce,
) -> Result<Outcome, StatusError> {
    let mut certain = false;
    for _ in 0..ATTEMPTS {
        match attempt(request, &current, produce).await {
            Ok(Attempt::Done(outcome)) => return Ok(outcome),
            Ok(Attempt::Unchanged(outcome)) if certain => return Ok(outcome),
            Ok(Attempt::Overtaken(Some(newer))) => {
                current = newer;
                certain = true;
                continue;
            }
            Ok(Attempt::Overtaken(None)) => return Err(request.not_found()),
            Err(error) if certain => return Err(error),
            Ok(Attempt::Unchanged(_)) | Err(_) => {}
        }
        // Judged by what may be stale: look at the newest, and judge again.
        let store = &request.context.store;
        current = store
            .get_uncached(request.resource, request.namespace(), &request.info.name)
            .await?
            .ok_or_else(|| request.not_found())?;
        certain = true;
    }
    Err(request.stale())
}

enum Attempt {
    Done(Outcome),
    /// There is nothing to write.
    Unchanged(Outcome),
    /// Something else stands there by now.
    Overtaken(Option<Arc<StoredObject>>),
}

async fn attempt(
    request: &ResourceRequest<'_>,
    current: &Arc<StoredObject>,
    produce: &mut dyn Produce,
) -> Result<Attempt, StatusError> {
    let (context, resource) = (request.context, request.resource);
    let strategy = &resource.strategy;
    let (old, stored) = resource.split(current);
    let Produced { object: mut new, mut warnings, ownership } = produce.produce(&old, &stored)?;
    warnings.extend(metadata::dedup_owners(&mut new));
    let sent = ownership::take(&mut new);
    strategy.defaults(&mut new);
    let managed = match ownership {
        Ownership::OfWriter => ownership::updated(request, &old, &stored, &new, sent),
        Ownership::Given(text) => text,
    };
    check_version(request, &mut new, &old, current.revision)?;
    let options = produce.options();
    let admitted = request.admit(Operation::Update, Some(&mut new), Some(&old), &options, true).await?;
    warnings.extend(admitted.warnings);

    metadata::prepare_update(resource, request.part, &mut new, &old);
    strategy.prepare_for_update(request.part, &mut new, &old);
    let content = compare_content(&new, &old);
    if strategy.tracks_generation() && content == Content::Differs {
        metadata::bump_generation(&mut new, &old);
    }
    let errors = strategy.validate_update(request.part, &new, &old);
    if !errors.is_empty() {
        return Err(StatusError::invalid(&resource.gvr.group, &resource.kind, &request.info.name, &errors));
    }
    warnings.extend(strategy.warnings(&new, Some(&old)));
    strategy.canonicalize(&mut new);
    let hooks = HookContext { store: &context.store, dry_run: request.dry_run };
    let reservation = strategy.reserve(hooks, &mut new, Some(&old)).await?;
    let mut admitted = request.admit(Operation::Update, Some(&mut new), Some(&old), &options, false).await?;
    warnings.append(&mut admitted.warnings);

    // What has been reserved stands in it as well.
    let content = if reservation.is_some() { compare_content(&new, &old) } else { content };
    let unchanged =
        content == Content::Same && ["metadata", "status"].iter().all(|part| new.get(part) == old.get(part));
    if unchanged && ownership::equal_but_for_times(&managed, &stored) {
        return Ok(Attempt::Unchanged(Outcome::stored(200, resource, current.clone()).with_warnings(warnings)));
    }
    if request.dry_run {
        ownership::put_list(&mut new, &managed);
        return Ok(Attempt::Done(Outcome::object(200, resource, new).with_warnings(warnings)));
    }
    if delete::completes(resource, &new) {
        ownership::put_list(&mut new, &managed);
        return Ok(match delete::remove(request, &request.info.name, current, &old).await? {
            Ok(_) => Attempt::Done(Outcome::object(200, resource, new).with_warnings(warnings)),
            Err(other) => Attempt::Overtaken(other),
        });
    }
    ownership::put(&mut new, &managed);
    match context.store.put(resource, &new, current.revision).await? {
        Put::Written(stored) => {
            if let Some(reservation) = reservation {
                reservation.commit();
            }
            Ok(Attempt::Done(Outcome::stored(200, resource, stored).with_warnings(warnings)))
        }
        Put::Conflict(current) => {
            admitted.take_back().await;
            Ok(Attempt::Overtaken(current))
        }
    }
}

/// The version and the uid that an update names must be the object's. Both are filled in where they are not named.
fn check_version(
    request: &ResourceRequest<'_>,
    new: &mut Value,
    old: &Value,
    revision: i64,
) -> Result<(), StatusError> {
    match metadata::text(new, "resourceVersion") {
        "" | "0" if request.resource.strategy.allow_unconditional_update() => {}
        "" | "0" => {
            let gvr = &request.resource.gvr;
            let errors = [FieldError::invalid("metadata.resourceVersion", 0, "must be specified for an update")];
            return Err(StatusError::invalid(&gvr.group, &request.resource.kind, &request.info.name, &errors));
        }
        text if get::parse_version(text)? == revision => {}
        _ => return Err(request.stale()),
    }
    let (uid, current) = (metadata::text(new, "uid"), metadata::text(old, "uid"));
    if !uid.is_empty() && uid != current {
        return Err(other_uid(request, uid, current, revision));
    }
    metadata::of(new).insert("resourceVersion".to_owned(), revision.to_string().into());
    Ok(())
}

/// The object is not the one that the writer means. As etcd3's `Preconditions.Check`.
fn other_uid(request: &ResourceRequest<'_>, wanted: &str, is: &str, revision: i64) -> StatusError {
    let (info, prefix) = (request.info, &request.resource.storage_prefix);
    let key = crate::storage::keys::object_key(request.namespace(), &info.name);
    let cause = format!(
        "StorageError: invalid object, Code: 4, Key: /registry/{prefix}/{key}, ResourceVersion: {revision}, AdditionalErrorMsg: Precondition failed: UID in precondition: {wanted}, UID in object meta: {is}"
    );
    StatusError::conflict(&info.group, &info.resource, &info.name, &cause)
}
