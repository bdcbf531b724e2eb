//! Server-side apply: an applied configuration merged into an object, what its author no longer wants taken out of it, and
//! who owns what afterwards. As `merge.Updater.Apply`.

use super::set::FieldSet;
use super::typing::Typing;
use super::versions::{Changes, Convert, Versions};
use super::{Entry, Fields, Ignored, ManagedFields, NOBODYS, Operation, Writer, walk};
use serde_json::Value;

/// Owns what stood there before anybody was asked.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
/// Of this manager, what it has set by client-side apply is no conflict.
const KUBECTL: &str = "kubectl";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// An object that somebody has applied to.
#[derive(Debug)]
pub struct Applied {
    pub object: Value,
    pub managed: ManagedFields,
}

/// A field that somebody else owns and would have otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// `"kubectl" using apps/v1`.
    pub manager: String,
    /// `.spec.replicas`.
    pub path: String,
}

/// Why a configuration cannot be applied.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError<E> {
    #[error("{}", message(.0))]
    Conflicts(Vec<Conflict>),
    /// What came of it is no object of its type.
    #[error("{0}")]
    Invalid(E),
}

/// As `getConflictMessage`.
fn message(conflicts: &[Conflict]) -> String {
    if let [one] = conflicts {
        return format!("Apply failed with 1 conflict: conflict with {}: {}", one.manager, one.path);
    }
    let mut lines = Vec::new();
    let mut manager = None;
    for conflict in conflicts {
        if manager != Some(&conflict.manager) {
            lines.push(format!("conflicts with {}:", conflict.manager));
            manager = Some(&conflict.manager);
        }
        lines.push(format!("- {}", conflict.path));
    }
    format!("Apply failed with {} conflicts: {}", conflicts.len(), lines.join("\n"))
}

/// Applies `config` to `live`, both without managedFields; `live` is `{}`-like where there is no object yet, and `exists` says
/// which. `finish` makes a whole object of what the merge gives: it is called before conflicts are looked for, so that the
/// same value in another spelling is none.
pub fn apply<T: Typing, E>(
    at: T,
    live: &Value,
    exists: bool,
    config: &Value,
    mut managed: ManagedFields,
    writer: &Writer<'_>,
    force: bool,
    ignored: &Ignored,
    now: &str,
    convert: Option<Convert<'_, T>>,
    finish: impl FnOnce(Value) -> Result<Value, E>,
) -> Result<Applied, ApplyError<E>> {
    if managed.is_empty() && exists {
        let before = Writer { manager: BEFORE_FIRST_APPLY, subresource: "", ..*writer };
        let nothing = Value::Object(serde_json::Map::new());
        managed.update(at, &nothing, live, &before, &Ignored::Nothing, now, convert);
    }
    let mut wanted = walk::fields(at, config);
    ignored.filter(&mut wanted);
    let own = match managed.entries.iter().position(|entry| entry.is_by(writer, Operation::Apply)) {
        Some(own) => own,
        None => {
            managed.entries.push(Entry::of(writer, Operation::Apply));
            managed.entries.len() - 1
        }
    };
    let versions = Versions { at, own: writer.api_version, convert };
    let entry = &mut managed.entries[own];
    let last = (entry.fields.set(), std::mem::replace(&mut entry.api_version, writer.api_version.to_owned()));
    entry.fields = Fields::Set(wanted);

    let merged = prune(&versions, walk::merge(at, live, config), &managed, last);
    let mut object = finish(merged).map_err(ApplyError::Invalid)?;
    let changed = object != *live;
    let mut changes = Changes::between(versions, live, &object, ignored);
    if !force {
        let found = conflicts(at, live, &managed, own, &mut changes, writer);
        if !found.is_empty() {
            return Err(ApplyError::Conflicts(found));
        }
    }
    {
        let entry = &mut managed.entries[own];
        if let Fields::Set(fields) = &mut entry.fields {
            fields.subtract(&NOBODYS);
        }
        if changed {
            entry.time = Some(now.to_owned());
        }
    }
    for (_, entry) in managed.entries.iter_mut().enumerate().filter(|(at, _)| *at != own) {
        changes.leave(entry);
    }
    managed.entries.retain(|entry| !entry.fields.is_empty());
    managed.sort();
    if writer.manager == KUBECTL {
        note_last_applied(&mut object, config);
    }
    Ok(Applied { object, managed })
}

fn conflicts<T: Typing>(
    at: T,
    live: &Value,
    managed: &ManagedFields,
    own: usize,
    changes: &mut Changes<'_, T>,
    writer: &Writer<'_>,
) -> Vec<Conflict> {
    let mut by_others: Vec<(String, FieldSet)> = Vec::new();
    for (number, entry) in managed.entries.iter().enumerate() {
        if number != own
            && let Some(seen) = changes.seen_by(entry)
        {
            let both = entry.fields.set().intersection(&seen.changed);
            by_others.extend((!both.is_empty()).then(|| (entry.to_string(), both)));
        }
    }
    if writer.manager == KUBECTL
        && let Some(allowed) = last_applied(live).map(|config| walk::fields(at, &config))
    {
        by_others.iter_mut().for_each(|(_, fields)| fields.subtract(&allowed));
    }
    by_others.sort_by(|a, b| a.0.cmp(&b.0));
    let paths = |(manager, fields): (String, FieldSet)| {
        fields.paths().into_iter().map(move |path| Conflict { manager: manager.clone(), path })
    };
    by_others.into_iter().flat_map(paths).collect()
}

/// What `kubectl apply` has last set from the client's side.
fn last_applied(live: &Value) -> Option<Value> {
    let text = live.get("metadata")?.get("annotations")?.get(LAST_APPLIED)?.as_str()?;
    serde_json::from_str(text).ok()
}

/// Keeps the note of client-side apply true, where there is one. As `lastAppliedUpdater`.
fn note_last_applied(object: &mut Value, config: &Value) {
    if let Some(note) = object.pointer_mut("/metadata/annotations").and_then(|a| a.get_mut(LAST_APPLIED)) {
        let mut config = config.clone();
        if let Some(annotations) = config.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
            annotations.remove(LAST_APPLIED);
        }
        *note = format!("{config}\n").into();
    }
}

/// Takes out of `merged` what its author applied last time, in a version, and not this time, unless someone else owns it.
fn prune<T: Typing>(
    versions: &Versions<'_, T>,
    merged: Value,
    managed: &ManagedFields,
    (last, last_version): (FieldSet, String),
) -> Value {
    let last_version = if versions.convert.is_some() { last_version.as_str() } else { versions.own };
    if last.is_empty() {
        return merged;
    }
    let Some((at, then)) = versions.view(&merged, last_version) else { return merged };
    let named = |at: T, set: FieldSet| walk::with_named_fields(Some(at), set);
    let last = named(at, last);
    let pruned = walk::without(at, &then, &last);
    if pruned == *then {
        drop(then);
        return merged;
    }
    let mut pruned = versions.back(pruned, last_version);
    // What is owned comes back,
    let mut owners = vec![last_version];
    for entry in &managed.entries {
        if !owners.contains(&versions.of(entry)) {
            owners.push(versions.of(entry));
        }
    }
    for version in owners {
        let (Some((at, all)), Some((_, left))) = (versions.view(&merged, version), versions.view(&pruned, version))
        else {
            continue;
        };
        let mut owned = FieldSet::default();
        let of_version = managed.entries.iter().filter(|entry| versions.of(entry) == version);
        of_version.for_each(|entry| owned.add(entry.fields.set()));
        let mut gone = named(at, walk::fields(at, &all));
        let mut kept = named(at, walk::fields(at, &left));
        kept.add(named(at, owned));
        gone.subtract(&kept);
        pruned = versions.back(walk::without(at, &all, &gone), version);
    }
    // and so does what its author never owned.
    let Some((_, left)) = versions.view(&pruned, last_version) else { return pruned };
    let mut gone = named(at, walk::fields(at, &then));
    gone.subtract(&named(at, walk::fields(at, &left)));
    versions.back(walk::without(at, &then, &gone.intersection(&last)), last_version)
}
