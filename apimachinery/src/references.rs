//! What pods and volumes refer to. Pure; as `VisitPodSecretNames` and its siblings.
use k8s_openapi::api::core::v1::{PersistentVolume, Pod};

/// What a pod refers to in its namespace.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct References {
    pub secrets: Vec<String>,
    pub config_maps: Vec<String>,
    pub claims: Vec<String>,
    pub resource_claims: Vec<String>,
    pub service_account: String,
}

/// As `VisitPodSecretNames` and its siblings. Mirror pods refer to nothing: a kubelet could make them name anything.
pub fn references(pod: &Pod) -> References {
    let mut found = References::default();
    let annotations = pod.metadata.annotations.as_ref();
    if annotations.is_some_and(|a| a.contains_key("kubernetes.io/config.mirror")) {
        return found;
    }
    let Some(spec) = &pod.spec else { return found };
    found.service_account = spec.service_account_name.clone().unwrap_or_default();
    found.secrets.extend(spec.image_pull_secrets.iter().flatten().map(|s| s.name.clone()));
    let main = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut env = |from: Option<&[k8s_openapi::api::core::v1::EnvFromSource]>,
                   vars: Option<&[k8s_openapi::api::core::v1::EnvVar]>| {
        for source in from.unwrap_or_default() {
            found.secrets.extend(source.secret_ref.iter().map(|s| s.name.clone()));
            found.config_maps.extend(source.config_map_ref.iter().map(|c| c.name.clone()));
        }
        for value in vars.unwrap_or_default().iter().filter_map(|var| var.value_from.as_ref()) {
            found.secrets.extend(value.secret_key_ref.iter().map(|s| s.name.clone()));
            found.config_maps.extend(value.config_map_key_ref.iter().map(|c| c.name.clone()));
        }
    };
    for container in main {
        env(container.env_from.as_deref(), container.env.as_deref());
    }
    for container in spec.ephemeral_containers.iter().flatten() {
        env(container.env_from.as_deref(), container.env.as_deref());
    }
    let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
    for volume in spec.volumes.iter().flatten() {
        found.secrets.extend(volume.secret.iter().filter_map(|s| s.secret_name.clone()));
        found.config_maps.extend(volume.config_map.iter().map(|c| c.name.clone()));
        found.claims.extend(volume.persistent_volume_claim.iter().map(|c| c.claim_name.clone()));
        if volume.ephemeral.is_some() {
            found.claims.push(format!("{pod_name}-{}", volume.name));
        }
        for source in volume.projected.iter().flat_map(|p| p.sources.iter().flatten()) {
            found.secrets.extend(source.secret.iter().map(|s| s.name.clone()));
            found.config_maps.extend(source.config_map.iter().map(|c| c.name.clone()));
        }
        let local = [
            volume.csi.as_ref().and_then(|v| v.node_publish_secret_ref.as_ref()),
            volume.cephfs.as_ref().and_then(|v| v.secret_ref.as_ref()),
            volume.cinder.as_ref().and_then(|v| v.secret_ref.as_ref()),
            volume.flex_volume.as_ref().and_then(|v| v.secret_ref.as_ref()),
            volume.iscsi.as_ref().and_then(|v| v.secret_ref.as_ref()),
            volume.rbd.as_ref().and_then(|v| v.secret_ref.as_ref()),
            volume.scale_io.as_ref().map(|v| &v.secret_ref),
            volume.storageos.as_ref().and_then(|v| v.secret_ref.as_ref()),
        ];
        found.secrets.extend(local.into_iter().flatten().map(|s| s.name.clone()));
        found.secrets.extend(volume.azure_file.iter().map(|v| v.secret_name.clone()));
    }
    let statuses = pod.status.as_ref().and_then(|s| s.resource_claim_statuses.as_deref()).unwrap_or_default();
    for claim in spec.resource_claims.iter().flatten() {
        let made = statuses.iter().find(|s| s.name == claim.name).and_then(|s| s.resource_claim_name.clone());
        found.resource_claims.extend(claim.resource_claim_name.clone().or(made));
    }
    let extended = pod.status.as_ref().and_then(|s| s.extended_resource_claim_status.as_ref());
    found.resource_claims.extend(extended.map(|status| status.resource_claim_name.clone()));
    found
}

/// Namespace and name of the secrets that a volume needs on its node. As `VisitPVSecretNames`.
pub fn volume_secrets(volume: &PersistentVolume) -> Vec<(String, String)> {
    let Some(spec) = &volume.spec else { return Vec::new() };
    let claim_namespace = spec.claim_ref.as_ref().and_then(|c| c.namespace.clone()).unwrap_or_default();
    let csi = spec.csi.as_ref();
    let references = [
        csi.and_then(|v| v.node_publish_secret_ref.as_ref()),
        csi.and_then(|v| v.node_stage_secret_ref.as_ref()),
        csi.and_then(|v| v.node_expand_secret_ref.as_ref()),
        csi.and_then(|v| v.controller_publish_secret_ref.as_ref()),
        spec.cephfs.as_ref().and_then(|v| v.secret_ref.as_ref()),
        spec.cinder.as_ref().and_then(|v| v.secret_ref.as_ref()),
        spec.flex_volume.as_ref().and_then(|v| v.secret_ref.as_ref()),
        spec.iscsi.as_ref().and_then(|v| v.secret_ref.as_ref()),
        spec.rbd.as_ref().and_then(|v| v.secret_ref.as_ref()),
    ];
    let mut secrets: Vec<(String, String)> = references
        .into_iter()
        .flatten()
        .map(|r| (r.namespace.clone().unwrap_or_else(|| claim_namespace.clone()), r.name.clone().unwrap_or_default()))
        .collect();
    if let Some(azure) = &spec.azure_file {
        secrets.push((azure.secret_namespace.clone().unwrap_or(claim_namespace), azure.secret_name.clone()));
    }
    secrets
}
