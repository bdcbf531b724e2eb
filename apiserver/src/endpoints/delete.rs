//! DELETE of one object and of many: preconditions, graceful deletion, propagation to dependents, finalizers.

use super::{Outcome, ResourceRequest, list, metadata, ownership, table, update};
use crate::admission::Operation;
use crate::registry::Resource;
use crate::registry::strategy::{Deletion, GarbagePolicy, HookContext};
use crate::server::negotiation::Wanted;
use crate::server::request_info::{Query, RequestInfo};
use crate::storage::{Put, StoredObject};
use apimachinery::facts::KindFacts;
use apimachinery::status::{FieldError, StatusError};
use apimachinery::{facts, protobuf};
use futures::StreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions;
use serde_json::{Value, json};
use std::sync::Arc;

const ATTEMPTS: usize = 8;
/// Objects of a collection that are deleted at the same time.
const COLLECTION_CONCURRENCY: usize = 4;
const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";
/// Kinds of the core group and of storage whose deletion answers with the object rather than with a Status.
const RETURN_OBJECT: [&str; 12] = [
    "persistentvolumeclaims",
    "persistentvolumes",
    "pods",
    "podtemplates",
    "resourcequotas",
    "serviceaccounts",
    "services",
    "csidrivers",
    "csinodes",
    "storageclasses",
    "volumeattachments",
    "volumeattributesclasses",
];

/// Is a deletion of this kind answered with the object?
pub fn returns_object(kind: &KindFacts) -> bool {
    kind.group == "resource.k8s.io" || RETURN_OBJECT.contains(&kind.resource)
}

/// What became of an object.
enum Deleted {
    /// As it was, as of the revision of its end.
    Gone(Arc<StoredObject>),
    /// It would be gone, had it not been a dry run.
    WouldGo(Value),
    /// Marked; its finalizers or its agent let it go later.
    Marked(Arc<StoredObject>),
    /// What it would be, marked, had it not been a dry run.
    WouldBe(Value),
}

/// The options from the body, or, without one, from the query.
pub fn options(body: &[u8], query: &Query) -> Result<DeleteOptions, StatusError> {
    let mut options = if body.is_empty() {
        DeleteOptions::default()
    } else {
        let value: Value = match body.first() {
            _ if protobuf::is_protobuf(body) => protobuf_options(body)?,
            Some(b'{') => serde_json::from_slice(body).map_err(|e| StatusError::bad_request(e.to_string()))?,
            _ => std::str::from_utf8(body)
                .ok()
                .and_then(|text| apimachinery::yaml::documents(text).ok()?.into_iter().next())
                .ok_or_else(|| StatusError::bad_request("the body is no DeleteOptions"))?,
        };
        let kind = value["kind"].as_str().unwrap_or_default();
        if !["", "DeleteOptions"].contains(&kind) {
            let version = value["apiVersion"].as_str().unwrap_or_default();
            return Err(StatusError::bad_request(format!("no kind {kind:?} is registered for version {version:?}")));
        }
        serde_json::from_value(value).map_err(|e| StatusError::bad_request(e.to_string()))?
    };
    if body.is_empty() {
        if query.has("gracePeriodSeconds") {
            let text = query.get("gracePeriodSeconds");
            let seconds =
                text.parse().map_err(|_| StatusError::bad_request(format!("invalid gracePeriodSeconds: {text:?}")))?;
            options.grace_period_seconds = Some(seconds);
        }
        if query.has("propagationPolicy") {
            options.propagation_policy = Some(query.get("propagationPolicy").to_owned());
        }
        if query.has("orphanDependents") {
            options.orphan_dependents = Some(query.flag("orphanDependents"));
        }
        let dry_run: Vec<String> = query.all("dryRun").filter(|v| !v.is_empty()).map(ToOwned::to_owned).collect();
        options.dry_run = (!dry_run.is_empty()).then_some(dry_run);
    }
    let mut errors = Vec::new();
    if options.orphan_dependents.is_some() && options.propagation_policy.is_some() {
        errors.push(FieldError::invalid(
            "propagationPolicy",
            options.propagation_policy.clone().unwrap_or_default(),
            "orphanDependents and deletionPropagation cannot be both set",
        ));
    }
    if let Some(policy) = &options.propagation_policy
        && !["Foreground", "Background", "Orphan"].contains(&policy.as_str())
    {
        errors.push(FieldError::not_supported(
            "propagationPolicy",
            policy.as_str(),
            &["Foreground", "Background", "Orphan", "nil"],
        ));
    }
    if options.dry_run.as_ref().is_some_and(|all| all.iter().any(|v| v != "All")) {
        errors.push(FieldError::not_supported("dryRun", json!(options.dry_run), &["All"]));
    }
    if errors.is_empty() { Ok(options) } else { Err(StatusError::invalid("meta.k8s.io", "DeleteOptions", "", &errors)) }
}

fn protobuf_options(body: &[u8]) -> Result<Value, StatusError> {
    let refuse = |error: protobuf::ProtobufError| StatusError::bad_request(error.to_string());
    let schema =
        facts::schema("meta.v1.DeleteOptions").ok_or_else(|| StatusError::internal("DeleteOptions has no schema"))?;
    protobuf::decode(&protobuf::envelope(body).map_err(refuse)?, schema).map_err(refuse)
}

/// Deletes one object.
pub async fn delete(request: &ResourceRequest<'_>, options: &DeleteOptions) -> Result<Outcome, StatusError> {
    let resource = request.resource;
    let orphans_said_no = options.orphan_dependents == Some(false);
    let deleted = delete_named(request, &request.info.name, options).await?;
    let outcome = answer(request, deleted, if orphans_said_no { 202 } else { 200 });
    Ok(outcome.with_warnings(warnings(resource, options)))
}

/// What of it the deleter should know.
fn warnings(resource: &Resource, options: &DeleteOptions) -> Vec<String> {
    let silent = options.propagation_policy.is_none() && options.orphan_dependents.is_none();
    resource.strategy.deletion_warning().filter(|_| silent).map(ToOwned::to_owned).into_iter().collect()
}

/// `code` is that of an object that is still there.
fn answer(request: &ResourceRequest<'_>, deleted: Deleted, code: u16) -> Outcome {
    let resource = request.resource;
    let uid = match &deleted {
        Deleted::Gone(object) | Deleted::Marked(object) => object.identity.uid.to_string(),
        Deleted::WouldGo(object) | Deleted::WouldBe(object) => metadata::text(object, "uid").to_owned(),
    };
    match deleted {
        Deleted::Marked(object) => Outcome::stored(code, resource, object),
        Deleted::WouldBe(object) => Outcome::object(code, resource, object),
        Deleted::Gone(object) if returns_object(resource.facts) => Outcome::stored(200, resource, object),
        Deleted::WouldGo(object) if returns_object(resource.facts) => Outcome::object(200, resource, object),
        Deleted::Gone(_) | Deleted::WouldGo(_) => {
            let mut details = json!({"name": request.info.name, "kind": resource.gvr.resource, "uid": uid});
            if !resource.gvr.group.is_empty() {
                details["group"] = resource.gvr.group.clone().into();
            }
            let status =
                json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details});
            Outcome { code: 200, payload: super::Payload::Object(None, status), warnings: Vec::new() }
        }
    }
}

/// Deletes what the selectors of the request select; answers with the list of it, as it was.
pub async fn delete_collection(
    request: &ResourceRequest<'_>,
    options: &DeleteOptions,
    wanted: Wanted,
    include: table::Include,
) -> Result<Outcome, StatusError> {
    let selected = list::select(request).await?;
    let names: Vec<(String, String)> = selected
        .objects
        .iter()
        .map(|object| (object.identity.namespace.to_string(), object.identity.name.to_string()))
        .collect();
    let mut deletions = futures::stream::iter(names)
        .map(|(namespace, name)| async move {
            // A collection is deleted object by object, as a request for each would.
            let info = RequestInfo { namespace, name: name.clone(), ..request.info.clone() };
            let mut attributes = request.attributes.clone();
            attributes.name.clone_from(&name);
            attributes.namespace.clone_from(&info.namespace);
            let single = ResourceRequest { info: &info, attributes, ..*request };
            match delete_named(&single, &name, options).await {
                Err(error) if error.code() != 404 => Err(error),
                _ => Ok(()),
            }
        })
        .buffer_unordered(COLLECTION_CONCURRENCY);
    // The first failure ends it.
    while let Some(result) = deletions.next().await {
        result?;
    }
    drop(deletions);
    let outcome = list::render(request, selected, wanted, include)?;
    Ok(outcome.with_warnings(warnings(request.resource, options)))
}

async fn delete_named(
    request: &ResourceRequest<'_>,
    name: &str,
    options: &DeleteOptions,
) -> Result<Deleted, StatusError> {
    let (store, resource) = (&request.context.store, request.resource);
    let mut current = update::newest(request).await?.ok_or_else(|| request.not_found())?;
    let options_value = serde_json::to_value(options).unwrap_or(Value::Null);
    let is_seen = request.dry_run || request.concerns_admission_of_deletion();
    let unread = if is_seen { &[] } else { resource.strategy.unread_by_deletion() };
    let mut admitted = false;
    let mut certain = false;
    for _ in 0..ATTEMPTS {
        let (mut old, mut managed) = resource.split_but(&current, unread);
        if let Err(error) = check_preconditions(request, &old, options) {
            if certain {
                return Err(error);
            }
            current =
                store.get_uncached(resource, request.namespace(), name).await?.ok_or_else(|| request.not_found())?;
            certain = true;
            continue;
        }
        if !std::mem::replace(&mut admitted, true) {
            for mutating in [true, false] {
                request.admit(Operation::Delete, None, Some(&old), &options_value, mutating).await?;
            }
        }
        let mut decision = decide(resource, &old, options);
        if matches!(decision, Decision::Mark(_)) && !unread.is_empty() {
            (old, managed) = resource.split(&current);
            decision = decide(resource, &old, options);
        }
        let outcome = match decision {
            Decision::Nothing if certain => return Ok(Deleted::Marked(current)),
            // Nothing to do, it seems: make sure.
            Decision::Nothing => Err(store.get_uncached(resource, request.namespace(), name).await?),
            Decision::Mark(mut new) if request.dry_run => {
                ownership::put_list(&mut new, &managed);
                return Ok(Deleted::WouldBe(new));
            }
            Decision::Mark(mut new) => {
                ownership::put(&mut new, &managed);
                match store.put(resource, &new, current.revision).await? {
                    Put::Written(stored) => Ok(Deleted::Marked(stored)),
                    Put::Conflict(other) => Err(other),
                }
            }
            Decision::Remove if request.dry_run => {
                ownership::put_list(&mut old, &managed);
                return Ok(Deleted::WouldGo(old));
            }
            Decision::Remove => remove(request, name, &current, &old).await?.map(Deleted::Gone),
        };
        match outcome {
            Ok(deleted) => return Ok(deleted),
            Err(Some(other)) => {
                current = other;
                certain = true;
            }
            Err(None) => return Err(request.not_found()),
        }
    }
    Err(request.stale())
}

/// Takes an object (`old`, without its managedFields) of this very version out of the store. Gives it as it was, at the
/// revision of its end; or what stands there instead.
pub async fn remove(
    request: &ResourceRequest<'_>,
    name: &str,
    current: &Arc<StoredObject>,
    old: &Value,
) -> Result<Result<Arc<StoredObject>, Option<Arc<StoredObject>>>, StatusError> {
    let (store, resource) = (&request.context.store, request.resource);
    match store.delete(resource, request.namespace(), name, current.revision).await? {
        Ok(revision) => {
            resource.strategy.after_delete(HookContext { store, dry_run: false }, old).await;
            Ok(Ok(Arc::new(current.ended(revision))))
        }
        Err(other) => Ok(Err(other)),
    }
}

/// Is this the version of an object with which its deletion is complete?
pub fn completes(resource: &Resource, object: &Value) -> bool {
    metadata::is_being_deleted(object)
        && metadata::finalizers(object).is_empty()
        && metadata::number(object, "deletionGracePeriodSeconds").unwrap_or(0) == 0
        && resource.strategy.is_finalized(object)
}

#[derive(Debug, PartialEq)]
enum Decision {
    /// It is on its way already.
    Nothing,
    Mark(Value),
    Remove,
}

/// As `BeforeDelete` and the generic registry's finalizer handling.
fn decide(resource: &Resource, old: &Value, options: &DeleteOptions) -> Decision {
    let strategy = &resource.strategy;
    let marked = metadata::is_being_deleted(old);
    let left = metadata::number(old, "deletionGracePeriodSeconds").map(|left| if left < 0 { 1 } else { left });
    // What is negative means: quickly.
    let requested = options.grace_period_seconds.map(|seconds| if seconds < 0 { 1 } else { seconds });
    let grace = match strategy.deletion(old, requested) {
        Deletion::Immediate => 0,
        Deletion::Graceful { .. } if marked => match (left, requested) {
            (None | Some(0), _) => 0,
            // Only less time than there is can be given.
            (Some(left), Some(requested)) if requested < left => requested,
            // It is on its way, and how it goes has been said.
            _ => return Decision::Nothing,
        },
        Deletion::Graceful { grace_seconds } => grace_seconds.max(0),
    };
    let finalizers = wanted_finalizers(old, options, strategy.default_garbage_policy());
    let held = finalizers.as_ref().map_or(!metadata::finalizers(old).is_empty(), |wanted| !wanted.is_empty());
    if grace == 0 && !held && strategy.is_finalized(old) {
        return Decision::Remove;
    }
    let on_its_way = marked && left.unwrap_or(0) == grace;
    if on_its_way && finalizers.is_none() {
        return Decision::Nothing;
    }
    let mut new = old.clone();
    if let Some(wanted) = finalizers {
        set_finalizers(&mut new, wanted);
    }
    if on_its_way {
        return Decision::Mark(new);
    }
    mark(&mut new, old, grace, marked);
    if !marked && let Some(generation) = metadata::number(old, "generation").filter(|generation| *generation > 0) {
        metadata::of(&mut new).insert("generation".to_owned(), (generation + 1).into());
    }
    strategy.on_deletion_mark(&mut new);
    Decision::Mark(new)
}

/// deletionTimestamp is when grace ends: counted from now, or, if it was shortened, from when the deletion was asked for.
fn mark(new: &mut Value, old: &Value, grace_seconds: i64, marked: bool) {
    let now = jiff::Timestamp::now();
    let requested = if marked {
        let end: Option<jiff::Timestamp> = metadata::text(old, "deletionTimestamp").parse().ok();
        let before = metadata::number(old, "deletionGracePeriodSeconds").unwrap_or(0);
        end.and_then(|end| end.checked_sub(jiff::SignedDuration::from_secs(before)).ok()).unwrap_or(now)
    } else {
        now
    };
    let end = requested.checked_add(jiff::SignedDuration::from_secs(grace_seconds)).unwrap_or(now);
    let meta = metadata::of(new);
    meta.insert("deletionTimestamp".to_owned(), apimachinery::time::rfc3339(end).into());
    meta.insert("deletionGracePeriodSeconds".to_owned(), grace_seconds.into());
}

/// The finalizers by which the garbage collector does what is asked; None if the object has them already.
fn wanted_finalizers(object: &Value, options: &DeleteOptions, default: GarbagePolicy) -> Option<Vec<String>> {
    let present: Vec<String> = metadata::finalizers(object).into_iter().map(ToOwned::to_owned).collect();
    let has = |name: &str| present.iter().any(|f| f == name);
    let (orphan, foreground) = match (options.orphan_dependents, options.propagation_policy.as_deref()) {
        _ if default == GarbagePolicy::Unsupported => (false, false),
        (Some(orphan), _) => (orphan, false),
        (None, Some("Orphan")) => (true, false),
        (None, Some("Foreground")) => (false, true),
        (None, Some(_)) => (false, false),
        // Nothing is said: what was said before holds, then the kind's default.
        (None, None) if has(ORPHAN) || has(FOREGROUND) => (has(ORPHAN), has(FOREGROUND)),
        (None, None) => (default == GarbagePolicy::OrphanDependents, false),
    };
    let mut wanted: Vec<String> = present.iter().filter(|f| *f != ORPHAN && *f != FOREGROUND).cloned().collect();
    if orphan {
        wanted.push(ORPHAN.to_owned());
    }
    if foreground {
        wanted.push(FOREGROUND.to_owned());
    }
    (wanted.len() != present.len() || !wanted.iter().all(|f| has(f))).then_some(wanted)
}

fn set_finalizers(object: &mut Value, wanted: Vec<String>) {
    let meta = metadata::of(object);
    if wanted.is_empty() {
        meta.remove("finalizers");
    } else {
        meta.insert("finalizers".to_owned(), wanted.into());
    }
}

/// As `BeforeDelete`: the conflict is said of the kind.
fn check_preconditions(request: &ResourceRequest<'_>, old: &Value, options: &DeleteOptions) -> Result<(), StatusError> {
    let Some(preconditions) = &options.preconditions else { return Ok(()) };
    for (wanted, field, what, guess) in [
        (&preconditions.uid, "uid", "UID", "deleted and then recreated"),
        (&preconditions.resource_version, "resourceVersion", "ResourceVersion", "modified"),
    ] {
        let is = metadata::text(old, field);
        if let Some(wanted) = wanted
            && wanted != is
        {
            let cause = format!(
                "the {what} in the precondition ({wanted}) does not match the {what} in record ({is}). The object might have been {guess}"
            );
            let (group, kind) = (&request.resource.gvr.group, &request.resource.kind);
            return Err(StatusError::conflict(group, kind, metadata::text(old, "name"), &cause));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finalizers_after(present: &[&str], options: &DeleteOptions) -> Vec<String> {
        let object = json!({"metadata": {"finalizers": present}});
        let wanted = wanted_finalizers(&object, options, GarbagePolicy::DeleteDependents);
        wanted.unwrap_or_else(|| present.iter().map(|f| (*f).to_owned()).collect())
    }

    #[test]
    fn propagation_is_said_with_finalizers() {
        let policy = |p: &str| DeleteOptions { propagation_policy: Some(p.to_owned()), ..DeleteOptions::default() };
        for (present, options, expected) in [
            (vec![], policy("Foreground"), vec!["foregroundDeletion"]),
            (vec!["x"], policy("Orphan"), vec!["x", "orphan"]),
            (vec!["orphan", "x"], policy("Background"), vec!["x"]),
            (vec!["foregroundDeletion"], DeleteOptions::default(), vec!["foregroundDeletion"]),
            (vec!["orphan"], policy("Foreground"), vec!["foregroundDeletion"]),
            (vec![], DeleteOptions { orphan_dependents: Some(true), ..DeleteOptions::default() }, vec!["orphan"]),
        ] {
            assert_eq!(finalizers_after(&present, &options), expected, "{present:?} {options:?}");
        }
    }

    #[test]
    fn options_come_from_the_body_or_the_query() {
        let query = Query::parse("gracePeriodSeconds=5&propagationPolicy=Orphan&dryRun=All");
        let read = options(b"", &query).unwrap();
        assert_eq!((read.grace_period_seconds, read.propagation_policy.as_deref()), (Some(5), Some("Orphan")));
        let read = options(br#"{"kind":"DeleteOptions","apiVersion":"v1","gracePeriodSeconds":0}"#, &query).unwrap();
        assert_eq!((read.grace_period_seconds, read.propagation_policy), (Some(0), None));
        assert_eq!(options(br#"{"propagationPolicy":"No"}"#, &query).unwrap_err().code(), 422);
        assert_eq!(options(b"{", &query).unwrap_err().code(), 400);
    }
}
