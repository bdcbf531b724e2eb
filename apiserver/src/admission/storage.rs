//! What claims and volumes go through: the default StorageClass, the finalizers that keep what is in use, and who may grow.
use std::sync::Arc;

use apimachinery::quantity::Quantity;
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use serde_json::{Value, json};

use super::{AdmissionRequest, Plugin, entry, list_in, object_in, text};
use crate::authorization::lister::{Lister, STORAGE_CLASSES};

const CLASS_ANNOTATION: &str = "volume.beta.kubernetes.io/storage-class";
const DEFAULT_ANNOTATIONS: [&str; 2] =
    ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];

/// DefaultStorageClass: a claim that names no class gets the default one.
pub struct DefaultStorageClass {
    lister: Arc<dyn Lister>,
}

/// StorageObjectInUseProtection: claims and volumes go only when nobody uses them.
pub struct StorageObjectInUseProtection;

/// PersistentVolumeClaimResize: a claim grows only where its class says that volumes can.
pub struct PersistentVolumeClaimResize {
    lister: Arc<dyn Lister>,
}

/// The newest of the objects that an annotation marks as default, the first by name among equals.
pub fn newest_default(
    lister: &dyn Lister,
    resource: crate::authorization::lister::ResourceId,
    marks: &[&str],
) -> Option<Value> {
    let candidates = lister.list(resource, None);
    let marked = candidates.iter().map(|object| object.value()).filter(|object| {
        object.pointer("/metadata/annotations").is_some_and(|a| marks.iter().any(|mark| a[*mark] == "true"))
    });
    marked.max_by(|a, b| {
        let created = |o: &Value| text(o, "/metadata/creationTimestamp").to_owned();
        let name = |o: &Value| text(o, "/metadata/name").to_owned();
        created(a).cmp(&created(b)).then_with(|| name(b).cmp(&name(a)))
    })
}

// === impl DefaultStorageClass ===

impl DefaultStorageClass {
    pub fn new(lister: Arc<dyn Lister>) -> Self {
        Self { lister }
    }
}

impl Plugin for DefaultStorageClass {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.creates() && request.is("", "persistentvolumeclaims", "")
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        let named = |claim: &Value| {
            claim.pointer("/spec/storageClassName").is_some_and(|name| !name.is_null())
                || claim.pointer("/metadata/annotations").is_some_and(|a| a.get(CLASS_ANNOTATION).is_some())
        };
        if let Some(claim) = request.object.as_deref_mut().filter(|claim| !named(claim))
            && let Some(class) = newest_default(self.lister.as_ref(), STORAGE_CLASSES, &DEFAULT_ANNOTATIONS)
        {
            object_in(claim, "spec").insert("storageClassName".into(), json!(text(&class, "/metadata/name")));
        }
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Plugin for StorageObjectInUseProtection {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.creates() && finalizer(request).is_some()
    }

    fn mutate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        let finalizer = finalizer(request);
        if let (Some(finalizer), Some(object)) = (finalizer, request.object.as_deref_mut()) {
            let finalizers = list_in(entry(object, "metadata"), "finalizers");
            if !finalizers.iter().any(|f| f == finalizer) {
                finalizers.push(json!(finalizer));
            }
        }
        Box::pin(std::future::ready(Ok(())))
    }
}

fn finalizer(request: &AdmissionRequest<'_>) -> Option<&'static str> {
    if request.is("", "persistentvolumeclaims", "") {
        Some("kubernetes.io/pvc-protection")
    } else if request.is("", "persistentvolumes", "") {
        Some("kubernetes.io/pv-protection")
    } else if request.is("storage.k8s.io", "volumeattributesclasses", "") {
        Some("kubernetes.io/vac-protection")
    } else {
        None
    }
}

// === impl PersistentVolumeClaimResize ===

impl PersistentVolumeClaimResize {
    pub fn new(lister: Arc<dyn Lister>) -> Self {
        Self { lister }
    }

    fn check(&self, request: &AdmissionRequest<'_>) -> Result<(), StatusError> {
        let (new, old) = (request.new_object(), request.old());
        let size = |claim: &Value| {
            let text = claim.pointer("/spec/resources/requests/storage").and_then(Value::as_str)?;
            Quantity::parse(text).ok()
        };
        match (size(new), size(old)) {
            (Some(new), Some(old)) if new > old => {}
            _ => return Ok(()),
        }
        if text(old, "/status/phase") != "Bound" {
            return Err(request.forbidden("Only bound persistent volume claims can be expanded"));
        }
        let class = match text(new, "/spec/storageClassName") {
            "" => new.pointer("/metadata/annotations").map_or("", |a| text_of(a, CLASS_ANNOTATION)),
            class => class,
        };
        let class = self.lister.get(STORAGE_CLASSES, "", class);
        if class.is_some_and(|class| class.value()["allowVolumeExpansion"] == true) {
            return Ok(());
        }
        Err(request.forbidden(
            "only dynamically provisioned pvc can be resized and the storageclass that provisions the pvc must support resize",
        ))
    }
}

fn text_of<'v>(map: &'v Value, key: &str) -> &'v str {
    map.get(key).and_then(Value::as_str).unwrap_or_default()
}

impl Plugin for PersistentVolumeClaimResize {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.updates() && request.is("", "persistentvolumeclaims", "")
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(std::future::ready(self.check(request)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::{attributes, create, request};
    use crate::admission::{Operation, list};
    use crate::authorization::lister::fake::Objects;

    fn class(name: &str, created: &str, default: bool, grows: bool) -> Value {
        json!({"metadata": {"name": name, "creationTimestamp": created,
            "annotations": {DEFAULT_ANNOTATIONS[0]: default.to_string()}}, "allowVolumeExpansion": grows})
    }

    fn objects() -> Arc<Objects> {
        Objects::of([
            (STORAGE_CLASSES, class("old", "2024-01-01T00:00:00Z", true, true)),
            (STORAGE_CLASSES, class("new", "2025-01-01T00:00:00Z", true, false)),
            (STORAGE_CLASSES, class("twin", "2025-01-01T00:00:00Z", true, false)),
            (STORAGE_CLASSES, class("other", "2026-01-01T00:00:00Z", false, false)),
        ])
    }

    #[tokio::test]
    async fn a_claim_without_a_class_gets_the_newest_default() {
        let plugin = DefaultStorageClass::new(objects());
        for (spec, expected) in [
            (json!({}), json!("new")),
            (json!({"storageClassName": ""}), json!("")),
            (json!({"storageClassName": "x"}), json!("x")),
        ] {
            let mut claim = json!({"metadata": {}, "spec": spec});
            create(&plugin, "/persistentvolumeclaims", "a", &mut claim).await.unwrap();
            assert_eq!(claim["spec"]["storageClassName"], expected);
        }
        let mut claim = json!({"metadata": {}});
        create(&StorageObjectInUseProtection, "/persistentvolumeclaims", "a", &mut claim).await.unwrap();
        assert_eq!(list(&claim, "/metadata/finalizers"), [json!("kubernetes.io/pvc-protection")]);
    }

    #[test]
    fn a_bound_claim_grows_where_its_class_allows_it() {
        let plugin = PersistentVolumeClaimResize { lister: objects() };
        let claim = |class: &str, size: &str, phase: &str| json!({"spec": {"storageClassName": class, "resources": {"requests": {"storage": size}}}, "status": {"phase": phase}});
        let attributes = attributes("/persistentvolumeclaims", "a", "ann", &[]);
        for (old, mut new, allowed) in [
            (claim("old", "1Gi", "Bound"), claim("old", "2Gi", "Bound"), true),
            (claim("new", "1Gi", "Bound"), claim("new", "2Gi", "Bound"), false),
            (claim("old", "1Gi", "Pending"), claim("old", "2Gi", "Pending"), false),
            (claim("new", "1Gi", "Bound"), claim("new", "1024Mi", "Bound"), true),
        ] {
            let request = request(&attributes, Operation::Update, Some(&mut new), Some(&old));
            assert_eq!(plugin.check(&request).is_ok(), allowed, "{old}");
        }
    }
}
