//! The strategy of built-in kinds: carries out a kind's [`Rules`], and what the few kinds ask that have more to them.

use super::autoscaling::v1 as autoscaling_v1;
use super::certificates::certificate_signing_request as csr;
use super::core::{event, namespace, pod, pod_update};
use super::field::{Errors, Field};
use super::object::{Content, child, compare_content, copy_field, remove, schema_defaults, set};
use super::print::Clock;
use super::rules::Rules;
use super::strategy::{Column, Deletion, GarbagePolicy, HookContext, Part, Reservation, Strategy};
use super::{allocation, metadata, table, workload};
use crate::authentication::UserInfo;
use crate::storage::object::Path;
use apimachinery::facts::{self, KindFacts, TypeFacts};
use apimachinery::status::{FieldError, StatusError};
use futures::future::BoxFuture;
use serde_json::{Value, json};
use std::sync::Arc;

/// What of a kind goes beyond rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Special {
    None,
    Pod,
    Namespace,
    Service,
    /// CertificateSigningRequests.
    SigningRequest,
    /// Events go by themselves.
    Event,
    /// Served as events.k8s.io/v1, stored as the core group's.
    EventOfGroup,
    /// Served as autoscaling/v1, stored as v2.
    HpaV1,
}

/// The strategy of one built-in kind.
pub struct Builtin {
    facts: &'static KindFacts,
    schema: Option<&'static TypeFacts>,
    rules: &'static Rules,
    special: Special,
    settings: Arc<Settings>,
}

/// What of the command line the strategies heed.
pub struct Settings {
    pub event_ttl_seconds: i64,
    pub allow_privileged: bool,
    pub services: allocation::Allocator,
}

#[cfg(test)]
impl Settings {
    /// As kubeadm would have them.
    pub fn usual() -> Arc<Self> {
        let services = allocation::Allocator::new(&["10.0.0.0/24".to_owned()], "30000-32767").unwrap();
        Arc::new(Self { event_ttl_seconds: 60, allow_privileged: true, services })
    }
}

// === impl Builtin ===

impl Builtin {
    pub fn new(facts: &'static KindFacts, settings: Arc<Settings>) -> Self {
        let special = match (facts.group, facts.version, facts.kind) {
            ("", _, "Pod") => Special::Pod,
            ("", _, "Namespace") => Special::Namespace,
            ("", _, "Service") => Special::Service,
            ("certificates.k8s.io", _, "CertificateSigningRequest") => Special::SigningRequest,
            ("", _, "Event") => Special::Event,
            ("events.k8s.io", _, "Event") => Special::EventOfGroup,
            ("autoscaling", "v1", "HorizontalPodAutoscaler") => Special::HpaV1,
            _ => Special::None,
        };
        let schema = facts::schema_of(facts.group, facts.version, facts.kind);
        Self { facts, schema, rules: table::rules(facts.group, facts.kind), special, settings }
    }

    /// Runs something on the form that the rules are written for.
    fn on_stored<T>(&self, object: &mut Value, run: impl FnOnce(&mut Value) -> T) -> T {
        self.to_stored(object);
        let result = run(object);
        self.from_stored(object);
        result
    }

    fn stored_form(&self, object: &Value) -> std::borrow::Cow<'_, Value> {
        let mut object = object.clone();
        self.to_stored(&mut object);
        std::borrow::Cow::Owned(object)
    }

    fn check(
        &self,
        new: &Value,
        old: Option<&Value>,
        check: impl FnOnce(&Field<'_, '_>, &Field<'_, '_>, &mut Errors),
    ) -> Vec<FieldError> {
        let mut errors = Errors::default();
        if self.converts() {
            let (new, old) = (self.stored_form(new), old.map(|o| self.stored_form(o)));
            let old = old.unwrap_or_default();
            check(&Field::root(&new), &Field::root(&old), &mut errors);
        } else {
            check(&Field::root(new), &Field::root(old.unwrap_or(&Value::Null)), &mut errors);
        }
        errors.0
    }

    /// What must hold of an object whether it is new or not, as far as a write of this part concerns it, and unless all but its
    /// metadata is `settled`.
    fn content(&self, part: Part, object: &Field<'_, '_>, settled: bool, errors: &mut Errors) {
        metadata::validate_content(&object.at("metadata"), errors);
        if !matches!(part, Part::Main | Part::EphemeralContainers | Part::Resize) {
            return;
        }
        if let Some(check) = self.rules.validate_metadata {
            check(object, errors);
            if settled {
                return;
            }
        }
        (self.rules.validate)(object, errors);
        if !self.settings.allow_privileged
            && let Some(template) = workload::template_pointer(self.facts.group, self.facts.resource)
        {
            workload::unprivileged(object, template, errors);
        }
    }

    /// Rules grow stricter while objects are stored: an update is not refused for what was wrong with the object before and
    /// was left as it was. As the ratcheting of Kubernetes' validation.
    fn new_faults(&self, part: Part, new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
        let (mut found, mut known) = (Errors::default(), Errors::default());
        let settled = self.rules.validate_metadata.is_some() && compare_content(new.value, old.value) == Content::Same;
        self.content(part, new, settled, &mut found);
        if !found.0.is_empty() {
            self.content(part, old, settled, &mut known);
        }
        errors.0.extend(found.0.into_iter().filter(|fault| !known.0.contains(fault)));
    }
}

/// The old object with one field of `spec` taken from the new one: what some subresources write.
fn only_spec_field(new: &mut Value, old: &Value, field: &str) {
    let mut result = old.clone();
    copy_field(child(&mut result, "spec"), new.get("spec").unwrap_or(&Value::Null), field);
    copy_field(child(&mut result, "metadata"), new.get("metadata").unwrap_or(&Value::Null), "resourceVersion");
    *new = result;
}

impl Strategy for Builtin {
    fn defaults(&self, object: &mut Value) {
        if let Some(schema) = self.schema {
            schema_defaults(object, schema);
        }
        self.on_stored(object, self.rules.default);
    }

    fn prepare_for_create(&self, object: &mut Value) {
        if self.facts.subresource("status").is_some()
            && let Some(initial) = self.rules.initial_status
        {
            let status = initial(object);
            set(object, "status", if status.is_null() { json!({}) } else { status });
        }
        if self.special == Special::Service {
            set(object, "status", json!({"loadBalancer": {}}));
        }
        self.on_stored(object, self.rules.prepare_create);
    }

    fn keeps_status_on_create(&self) -> bool {
        self.rules.initial_status.is_none()
    }

    fn note_creator(&self, object: &mut Value, user: &UserInfo) {
        if self.special == Special::SigningRequest {
            let extra = serde_json::to_value(&user.extra).unwrap_or_default();
            csr::set_requestor(object, &user.name, &user.uid, &user.groups, extra);
        }
    }

    fn prepare_for_update(&self, part: Part, new: &mut Value, old: &Value) {
        let old = if self.converts() { self.stored_form(old) } else { std::borrow::Cow::Borrowed(old) };
        self.on_stored(new, |new| match part {
            Part::Main => (self.rules.prepare_update)(new, &old),
            Part::Status => {
                (self.rules.prepare_status)(new, &old);
                if self.rules.status_keeps_metadata {
                    for field in ["labels", "annotations", "finalizers", "ownerReferences"] {
                        copy_field(child(new, "metadata"), &old["metadata"], field);
                    }
                }
            }
            Part::Finalize => only_spec_field(new, &old, "finalizers"),
            Part::Approval => {
                let conditions = new.pointer("/status/conditions").cloned();
                let annotations = new.pointer("/metadata/annotations").cloned();
                let version = new.pointer("/metadata/resourceVersion").cloned();
                *new = old.clone().into_owned();
                for (parent, field, value) in [
                    ("status", "conditions", conditions),
                    ("metadata", "annotations", annotations),
                    ("metadata", "resourceVersion", version),
                ] {
                    match value {
                        Some(value) => set(child(new, parent), field, value),
                        None => _ = remove(child(new, parent), field),
                    }
                }
                csr::prepare_approval(new, &old);
            }
            Part::EphemeralContainers => only_spec_field(new, &old, "ephemeralContainers"),
            Part::Resize => pod_update::prepare_resize(new, &old),
        });
    }

    fn validate(&self, object: &Value) -> Vec<FieldError> {
        self.check(object, None, |new, _, errors| {
            metadata::validate_identity(&new.at("metadata"), self.facts.namespaced, self.rules.name, errors);
            self.content(Part::Main, new, false, errors);
            (self.rules.validate_create)(new, errors);
        })
    }

    fn validate_update(&self, part: Part, new: &Value, old: &Value) -> Vec<FieldError> {
        self.check(new, Some(old), |new, old, errors| {
            metadata::validate_update(&new.at("metadata"), &old.at("metadata"), errors);
            self.new_faults(part, new, old, errors);
            match part {
                Part::Main => (self.rules.validate_update)(new, old, errors),
                Part::Status => (self.rules.validate_status)(new, old, errors),
                Part::Finalize => namespace::validate_finalize(new, errors),
                Part::Approval => csr::update(new, old, part, errors),
                Part::EphemeralContainers => pod_update::validate_ephemeral(new, old, errors),
                Part::Resize => pod_update::validate_resize(new, old, errors),
            }
        })
    }

    fn canonicalize(&self, object: &mut Value) {
        (self.rules.canonicalize)(object);
    }

    fn warnings(&self, new: &Value, old: Option<&Value>) -> Vec<String> {
        (self.rules.warnings)(new, old)
    }

    fn allow_create_on_update(&self) -> bool {
        self.rules.create_on_update
    }

    fn allow_unconditional_update(&self) -> bool {
        self.rules.unconditional_update
    }

    fn tracks_generation(&self) -> bool {
        self.rules.generation
    }

    fn selectable_field_names(&self) -> &'static [&'static str] {
        self.rules.selectable_names
    }

    fn selectable_fields(&self, object: &Value) -> Vec<(&'static str, String)> {
        (self.rules.selectable)(object)
    }

    fn columns(&self) -> Option<Vec<Column>> {
        let columns = match (self.rules.columns, self.special) {
            (Some(columns), _) => Some(columns),
            (None, Special::EventOfGroup) => facts::columns("", "Event"),
            (None, _) => facts::columns(self.facts.group, self.facts.kind),
        };
        columns.map(<[Column]>::to_vec)
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let clock = Clock::now();
        match self.rules.row {
            Some(row) if self.converts() => row(&self.stored_form(object), &clock),
            Some(row) => row(object, &clock),
            None if facts::columns(self.facts.group, self.facts.kind).is_some() => {
                vec![super::print::name(object), clock.age(object)]
            }
            None => Vec::new(),
        }
    }

    fn deletion(&self, object: &Value, grace_seconds: Option<i64>) -> Deletion {
        if self.special != Special::Pod {
            return Deletion::Immediate;
        }
        Deletion::Graceful { grace_seconds: pod::grace_period(object, grace_seconds) }
    }

    fn unread_by_deletion(&self) -> &'static [Path] {
        if self.special == Special::Pod { &pod::BULK } else { &[] }
    }

    fn default_garbage_policy(&self) -> GarbagePolicy {
        match (self.facts.group, self.facts.kind) {
            // Kubernetes' oldest kinds leave their dependents behind where nobody says otherwise.
            ("", "ReplicationController") | ("batch", "Job") => GarbagePolicy::OrphanDependents,
            (_, "Event") => GarbagePolicy::Unsupported,
            _ => GarbagePolicy::DeleteDependents,
        }
    }

    fn deletion_warning(&self) -> Option<&'static str> {
        (self.facts.group == "batch" && self.facts.kind == "Job").then_some(
            "child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them or set propagationPolicy=Orphan to suppress this warning",
        )
    }

    fn on_deletion_mark(&self, object: &mut Value) {
        if self.special == Special::Namespace {
            namespace::terminate(object);
        }
    }

    fn is_finalized(&self, object: &Value) -> bool {
        self.special != Special::Namespace || namespace::is_finalized(object)
    }

    fn time_to_live(&self, _object: &Value) -> Option<i64> {
        matches!(self.special, Special::Event | Special::EventOfGroup).then_some(self.settings.event_ttl_seconds)
    }

    fn from_stored(&self, object: &mut Value) {
        match self.special {
            Special::EventOfGroup => {
                event::to_events_group(object);
                set(object, "apiVersion", "events.k8s.io/v1");
            }
            Special::HpaV1 => {
                autoscaling_v1::to_v1(object);
                set(object, "apiVersion", "autoscaling/v1");
            }
            _ => {}
        }
    }

    fn to_stored(&self, object: &mut Value) {
        match self.special {
            Special::EventOfGroup => {
                event::from_events_group(object);
                set(object, "apiVersion", "v1");
            }
            Special::HpaV1 => {
                autoscaling_v1::from_v1(object);
                set(object, "apiVersion", "autoscaling/v2");
            }
            _ => {}
        }
    }

    fn converts(&self) -> bool {
        matches!(self.special, Special::EventOfGroup | Special::HpaV1)
    }

    fn reserve<'a>(
        &'a self,
        context: HookContext<'a>,
        new: &'a mut Value,
        old: Option<&'a Value>,
    ) -> BoxFuture<'a, Result<Option<Box<dyn Reservation>>, StatusError>> {
        match self.special {
            Special::Service => Box::pin(self.settings.services.reserve(context, new, old)),
            _ => Box::pin(async { Ok(None) }),
        }
    }

    fn after_delete<'a>(&'a self, context: HookContext<'a>, old: &'a Value) -> BoxFuture<'a, ()> {
        match self.special {
            Special::Service => Box::pin(self.settings.services.release(context, old)),
            _ => Box::pin(async {}),
        }
    }
}
