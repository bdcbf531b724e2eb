//! Validation of a pod's volumes. As `ValidateVolumes`.

use super::volume_sources::{OF_PODS, the_source};
use crate::registry::field::{Errors, Field};
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain};

const PORTAL_MAX: usize = 64;

/// The volumes that containers may mount: name and kind of source. Pods have few: a list is faster than a map.
pub struct Volumes<'v>(Vec<(&'v str, &'static str)>);

impl Volumes<'_> {
    /// The kind of a volume's source; None if there is no such volume.
    pub fn kind(&self, name: &str) -> Option<&'static str> {
        self.0.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind)
    }
}

/// Checks each volume. `pod_name` is empty in a template: then nobody knows yet what claims are going to be called.
pub fn volumes<'v>(volumes: &Field<'_, 'v>, pod_name: &str, is_pod: bool, errors: &mut Errors) -> Volumes<'v> {
    let mut known: Vec<(&str, &str)> = Vec::new();
    for (volume, value) in volumes.items().zip(volumes.value.as_array().into_iter().flatten()) {
        let before = errors.0.len();
        let kind = the_source(&volume, OF_PODS, errors);
        let name = volume.at("name");
        match kind {
            "iscsi" => portal(&volume, errors),
            "ephemeral" if !pod_name.is_empty() && !name.is_blank() => {
                let claim = format!("{pod_name}-{}", name.str());
                for message in is_dns1123_subdomain(&claim) {
                    errors.invalid(&name, format!("PVC name {claim:?}: {message}"));
                }
            }
            "image" if is_pod => {
                errors.need(&volume.at("image").at("reference"));
            }
            _ => {}
        }
        errors.need_named(&name, is_dns1123_label);
        let own = value.get("name").and_then(|name| name.as_str()).unwrap_or("");
        if known.iter().any(|(other, _)| *other == own) {
            errors.duplicate(&name);
        }
        if errors.0.len() == before {
            known.push((own, kind));
        }
        let source = volume.at("persistentVolumeClaim");
        let claim = source.at("claimName");
        let own_claim = claim.str().strip_prefix(pod_name).and_then(|rest| rest.strip_prefix('-'));
        if let Some(made_for) = own_claim.filter(|_| !pod_name.is_empty())
            && volumes.items().any(|v| v.at("name").str() == made_for && v.at("ephemeral").is_set())
        {
            errors.invalid(&claim, "must not reference a PVC that gets created for an ephemeral volume");
        }
    }
    Volumes(known)
}

fn portal(volume: &Field<'_, '_>, errors: &mut Errors) {
    let (iscsi, name) = (volume.at("iscsi"), volume.at("name"));
    let length = name.str().len() + 1 + iscsi.at("targetPortal").str().len();
    if iscsi.at("initiatorName").is_set() && length > PORTAL_MAX {
        errors.invalid(
            &name,
            "Total length of <volume name>:<iscsi.targetPortal> must be under 64 characters if iscsi.initiatorName is specified.",
        );
    }
}
