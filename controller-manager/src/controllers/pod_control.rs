//! Making and deleting the pods of an owner, with Kubernetes' events. As `RealPodControl`.
use crate::{
    controllers::claim,
    runtime::{api_in, cause, gone_is_fine, is_code, is_terminating},
};
use apimachinery::names;
use component_base::events::{Recorder, Type};
use k8s_openapi::{
    api::core::v1::{ObjectReference, Pod, PodTemplateSpec},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{
    Client,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
};

/// Writes pods on behalf of owners.
pub struct PodControl {
    pub client: Client,
    pub recorder: Recorder,
}

impl PodControl {
    /// Makes a pod from a template for `owner`.
    pub async fn create(
        &self,
        namespace: &str,
        template: &PodTemplateSpec,
        owner: &ObjectReference,
        controller: &OwnerReference,
    ) -> Result<Pod, kube::Error> {
        self.create_named(namespace, template, owner, controller, &controller.name).await
    }

    /// As [`PodControl::create`], with a name that begins with `prefix` and a dash.
    pub async fn create_named(
        &self,
        namespace: &str,
        template: &PodTemplateSpec,
        owner: &ObjectReference,
        controller: &OwnerReference,
        prefix: &str,
    ) -> Result<Pod, kube::Error> {
        let pod = pod_from_template(template, prefix, controller);
        match api_in::<Pod>(&self.client, namespace).create(&PostParams::default(), &pod).await {
            Ok(pod) => {
                let name = pod.metadata.name.as_deref().unwrap_or_default();
                self.recorder.event(owner, Type::Normal, "SuccessfulCreate", "", format!("Created pod: {name}"));
                Ok(pod)
            }
            Err(error) => {
                // A namespace that is being deleted says so by itself.
                if !is_terminating(&error) {
                    let message = format!("Error creating: {}", cause(&error));
                    self.recorder.event(owner, Type::Warning, "FailedCreate", "", message);
                }
                Err(error)
            }
        }
    }

    /// Deletes one pod; it is no error if it is gone.
    pub async fn delete(&self, pod: &Pod, owner: &ObjectReference) -> Result<(), kube::Error> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let only_this = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
        match gone_is_fine(api_in::<Pod>(&self.client, namespace).delete(name, &parameters).await) {
            Ok(Some(_)) => {
                self.recorder.event(owner, Type::Normal, "SuccessfulDelete", "", format!("Deleted pod: {name}"));
                Ok(())
            }
            Ok(None) => Ok(()),
            // A namesake has its place: the pod that was meant is gone.
            Err(error) if is_code(&error, 409) => Ok(()),
            Err(error) => {
                let message = format!("Error deleting: {}", cause(&error));
                self.recorder.event(owner, Type::Warning, "FailedDelete", "", message);
                Err(error)
            }
        }
    }

    /// Makes `controller` the pod's controller.
    pub async fn adopt(&self, pod: &Pod, controller: &OwnerReference) -> Result<(), kube::Error> {
        self.patch(&pod.metadata, claim::adoption(controller, pod.metadata.uid.as_deref())).await
    }

    /// Takes the owner off the pod.
    pub async fn release(&self, pod: &Pod, owner_uid: Option<&str>) -> Result<(), kube::Error> {
        gone_is_fine(self.patch(&pod.metadata, claim::release(owner_uid, pod.metadata.uid.as_deref())).await)?;
        Ok(())
    }

    async fn patch(&self, meta: &ObjectMeta, patch: serde_json::Value) -> Result<(), kube::Error> {
        let api = api_in::<Pod>(&self.client, meta.namespace.as_deref().unwrap_or_default());
        let name = meta.name.as_deref().unwrap_or_default();
        api.patch_metadata(name, &PatchParams::default(), &Patch::Strategic(patch)).await.map(|_| ())
    }
}

/// As `GetPodFromTemplate`: named after its owner.
pub fn pod_from_template(template: &PodTemplateSpec, owner_name: &str, controller: &OwnerReference) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    let prefix = format!("{owner_name}-");
    // A pod's name is a subdomain, but a prefix may end with a dash.
    let valid = names::is_dns1123_subdomain(prefix.trim_end_matches('-')).is_empty();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(if valid { prefix } else { owner_name.to_owned() }),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![controller.clone()]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}
