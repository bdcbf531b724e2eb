//! POST: a new object.

use super::ownership::{self, Ownership};
use super::update::Produced;
use super::{Outcome, ResourceRequest, metadata};
use crate::admission::Operation;
use crate::authorization::{Attributes, Decision, forbidden};
use crate::registry::strategy::HookContext;
use crate::server::negotiation::Incoming;
use crate::storage::Put;
use apimachinery::status::StatusError;
use serde_json::{Map, Value, json};

/// Attempts to find a free name behind a generateName.
const NAME_ATTEMPTS: usize = 8;

/// Stores what came in, decoded already.
pub async fn create(request: &mut ResourceRequest<'_>, incoming: Incoming) -> Result<Outcome, StatusError> {
    let Incoming { object, warnings } = incoming;
    create_owned(request, Produced { object, warnings, ownership: Ownership::OfWriter }).await
}

/// May the object be created, by a write that would otherwise change it?
pub async fn authorize(request: &ResourceRequest<'_>) -> Result<(), StatusError> {
    let attributes = Attributes { verb: "create".to_owned(), ..request.attributes.clone() };
    match request.context.authorizer.authorize(&attributes).await {
        Decision::Allow => Ok(()),
        Decision::NoOpinion(reason) => Err(forbidden(&attributes, &reason)),
    }
}

/// Stores a new object whose fields belong to whom `produced` says.
pub async fn create_owned(request: &mut ResourceRequest<'_>, produced: Produced) -> Result<Outcome, StatusError> {
    let Produced { mut object, mut warnings, ownership } = produced;
    let (context, resource) = (request.context, request.resource);
    let strategy = &resource.strategy;
    metadata::ensure_namespace(&mut object, request.namespace())?;
    if !metadata::text(&object, "resourceVersion").is_empty() {
        // No more than an error of the store to Kubernetes.
        return Err(StatusError::new(500, "", "resourceVersion should not be set on objects to be created"));
    }
    request.attributes.name = metadata::text(&object, "name").to_owned();
    warnings.extend(metadata::dedup_owners(&mut object));
    let sent = ownership::take(&mut object);
    strategy.defaults(&mut object);
    let managed = match ownership {
        Ownership::OfWriter => ownership::updated(request, &Value::Object(Map::new()), "", &object, sent),
        Ownership::Given(text) => text,
    };
    let options = json!({"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"});
    let admitted = request.admit(Operation::Create, Some(&mut object), None, &options, true).await?;
    warnings.extend(admitted.warnings);

    let generated = metadata::text(&object, "name").is_empty() && metadata::generate_name(&mut object);
    if resource.has_status
        && !strategy.keeps_status_on_create()
        && let Some(map) = object.as_object_mut()
    {
        map.remove("status");
    }
    metadata::fill_system_fields(&mut object, strategy.tracks_generation());
    strategy.note_creator(&mut object, &request.attributes.user);
    let told = strategy.warnings(&object, None);
    strategy.prepare_for_create(&mut object);
    let name = metadata::text(&object, "name").to_owned();
    let errors = strategy.validate(&object);
    if !errors.is_empty() {
        return Err(StatusError::invalid(&resource.gvr.group, &resource.kind, &name, &errors));
    }
    warnings.extend(told);
    strategy.canonicalize(&mut object);
    let hooks = HookContext { store: &context.store, dry_run: request.dry_run };
    let reservation = strategy.reserve(hooks, &mut object, None).await?;
    request.attributes.name = name;
    let mut admitted = request.admit(Operation::Create, Some(&mut object), None, &options, false).await?;
    warnings.append(&mut admitted.warnings);

    if request.dry_run {
        if !generated && context.store.get(resource, request.namespace(), &request.attributes.name).await.is_ok() {
            return Err(exists(request, None));
        }
        ownership::put_list(&mut object, &managed);
        return Ok(Outcome::object(201, resource, object).with_warnings(warnings));
    }
    ownership::put(&mut object, &managed);
    for _ in 0..NAME_ATTEMPTS {
        match context.store.create(resource, &object).await? {
            Put::Written(stored) => {
                if let Some(reservation) = reservation {
                    reservation.commit();
                }
                return Ok(Outcome::stored(201, resource, stored).with_warnings(warnings));
            }
            Put::Conflict(_) if generated => {
                metadata::generate_name(&mut object);
            }
            Put::Conflict(current) => {
                admitted.take_back().await;
                return Err(exists(request, current.map(|stored| stored.value()).as_ref()));
            }
        }
    }
    let name = metadata::text(&object, "name");
    Err(StatusError::no_free_name(&resource.gvr.group, &resource.gvr.resource, name))
}

fn exists(request: &ResourceRequest<'_>, current: Option<&Value>) -> StatusError {
    let gvr = &request.resource.gvr;
    let mut error = StatusError::already_exists(&gvr.group, &gvr.resource, &request.attributes.name);
    if current.is_some_and(metadata::is_being_deleted) {
        error.0.message = Some(format!("object is being deleted: {}", error.message()));
    }
    error
}
