//! What is projected into a volume: the downward API, secrets, config maps, tokens, trust bundles; and the fields of a pod that
//! volumes and environments may show. As `validateProjectedVolumeSource` and `validateObjectFieldSelector`.

use super::volume_sources::{key_to_path, mode, unreserved_path};
use crate::registry::certificates::{cluster_trust_bundle, signers};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use apimachinery::names::is_qualified_name;
use apimachinery::quantity::Quantity;

const VOLUME_FIELDS: [&str; 5] =
    ["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];
const ENV_FIELDS: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
const RESOURCES: [&str; 6] = [
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
];
/// What may be said of a pod in a field path, some of it in an older way. As `ConvertDownwardAPIFieldLabel`.
const KNOWN_FIELDS: [&str; 14] = [
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.serviceAccountName",
    "spec.schedulerName",
    "status.phase",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
const KEY_TYPES: [&str; 6] = ["RSA3072", "RSA4096", "ECDSAP256", "ECDSAP384", "ECDSAP521", "ED25519"];
const CERTIFICATE_FILES: [&str; 3] = ["credentialBundlePath", "keyPath", "certificateChainPath"];
const UNITS: [&str; 13] = ["1", "1k", "1M", "1G", "1T", "1P", "1E", "1Ki", "1Mi", "1Gi", "1Ti", "1Pi", "1Ei"];

/// Where a field or a resource is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    InVolume,
    InEnvironment,
}

/// As `validateObjectFieldSelector`.
pub fn field_ref(field: &Field<'_, '_>, shown: Shown, errors: &mut Errors) {
    let (version, path) = (field.at("apiVersion"), field.at("fieldPath"));
    if !errors.need(&version) || !errors.need(&path) {
        return;
    }
    if version.str() != "v1" {
        errors.invalid(&path, format!("error converting fieldPath: unsupported pod version: {}", version.str()));
        return;
    }
    let supported: &[&str] = if shown == Shown::InVolume { &VOLUME_FIELDS } else { &ENV_FIELDS };
    let subscripted = path.str().strip_suffix("']").and_then(|text| text.split_once("['"));
    match subscripted {
        Some(("metadata.annotations", key)) => subscript(field, &key.to_lowercase(), errors),
        Some(("metadata.labels", key)) => subscript(field, key, errors),
        Some((map, _)) if KNOWN_FIELDS.contains(&map) => errors.invalid_as(field, map, "does not support subscript"),
        None if supported.contains(&path.str()) => {}
        None if path.str() == "spec.host" && supported.contains(&"spec.nodeName") => {}
        None if KNOWN_FIELDS.contains(&path.str()) => errors.not_supported(&path, supported),
        _ => errors.invalid(&path, format!("error converting fieldPath: field label not supported: {}", path.str())),
    }
}

fn subscript(field: &Field<'_, '_>, key: &str, errors: &mut Errors) {
    for message in is_qualified_name(key) {
        errors.invalid_as(field, key, message);
    }
}

/// As `validateContainerResourceFieldSelector`.
pub fn resource_ref(field: &Field<'_, '_>, shown: Shown, errors: &mut Errors) {
    let (container, resource, divisor) = (field.at("containerName"), field.at("resource"), field.at("divisor"));
    let name = resource.str();
    let huge = ["requests.hugepages-", "limits.hugepages-"].iter().any(|prefix| name.starts_with(prefix));
    if shown == Shown::InVolume && container.is_blank() {
        errors.required(&container, "");
    } else if name.is_empty() {
        errors.required(&resource, "");
    } else if !RESOURCES.contains(&name) && !huge {
        errors.not_supported(&resource, &RESOURCES);
    }
    let Ok(amount) = Quantity::parse(divisor.str()) else { return };
    if amount.is_zero() {
        return;
    }
    let (allowed, what): (&[&str], _) = match name.rsplit('.').next().unwrap_or("") {
        _ if huge => (&UNITS, "hugepages"),
        "cpu" => (&["1m", "1"], "cpu"),
        "memory" => (&UNITS, "memory"),
        "ephemeral-storage" => (&UNITS, "local ephemeral storage"),
        _ => return,
    };
    if !allowed.contains(&amount.to_string().as_str()) {
        let units = if what == "cpu" { "1m and 1".to_owned() } else { UNITS.join(", ") };
        errors.invalid_as(
            &divisor,
            name,
            format!("only divisor's values {units} are supported with the {what} resource"),
        );
    }
}

/// As `validateDownwardAPIVolumeSource`.
pub fn downward_volume(source: &Field<'_, '_>, errors: &mut Errors) {
    mode(&source.at("defaultMode"), errors);
    for item in source.at("items").items() {
        // Kubernetes names the volume here, not the item.
        downward_file(&source.with(item.value), errors);
    }
}

fn downward_file(item: &Field<'_, '_>, errors: &mut Errors) {
    let (path, field, resource) = (item.at("path"), item.at("fieldRef"), item.at("resourceFieldRef"));
    errors.need(&path);
    unreserved_path(&path, errors);
    if field.is_set() {
        field_ref(&field, Shown::InVolume, errors);
        if resource.is_set() {
            let why = "fieldRef and resourceFieldRef can not be specified simultaneously";
            errors.invalid_as(item, "resource", why);
        }
    } else if resource.is_set() {
        resource_ref(&resource, Shown::InVolume, errors);
    } else {
        errors.required(item, "one of fieldRef and resourceFieldRef is required");
    }
    mode(&item.at("mode"), errors);
}

/// As `validateProjectionSources`: no two sources may write the same file.
pub fn projected(volume: &Field<'_, '_>, errors: &mut Errors) {
    mode(&volume.at("defaultMode"), errors);
    let mut paths: Vec<&str> = Vec::new();
    for source in volume.at("sources").items() {
        for kind in ["secret", "configMap"] {
            let from = source.at(kind);
            if from.is_set() {
                errors.need(&from.at("name"));
            }
            for item in from.at("items").items() {
                key_to_path(&item, errors);
                let path = item.value.get("path").and_then(|p| p.as_str()).unwrap_or("");
                taken(volume, &mut paths, path, from.at("name").str(), errors);
            }
        }
        let api = source.at("downwardAPI");
        for item in api.at("items").items() {
            downward_file(&api.with(item.value), errors);
            let path = item.value.get("path").and_then(|p| p.as_str()).unwrap_or("");
            taken(volume, &mut paths, path, path, errors);
        }
        let token = source.at("serviceAccountToken");
        if token.is_set() {
            self::token(volume, &token, errors);
        }
        // As Kubernetes still names it.
        let bundle = source.at("clusterTrustBundlePEM").with(source.at("clusterTrustBundle").value);
        if bundle.is_set() {
            trust_bundle(&bundle, errors);
            let path = bundle.value.get("path").and_then(|p| p.as_str()).unwrap_or("");
            taken(volume, &mut paths, path, path, errors);
        }
        let certificate = source.at("podCertificate");
        if certificate.is_set() {
            pod_certificate(&certificate, errors);
            for file in CERTIFICATE_FILES {
                let path = certificate.value.get(file).and_then(|p| p.as_str()).unwrap_or("");
                taken(volume, &mut paths, path, path, errors);
            }
        }
        if source.len() > 1 {
            errors.forbidden(&source, "may not specify more than 1 volume type per source");
        }
    }
}

/// Notes a path; `shown` is told where it is there already.
fn taken<'v>(volume: &Field<'_, '_>, paths: &mut Vec<&'v str>, path: &'v str, shown: &str, errors: &mut Errors) {
    if path.is_empty() {
        return;
    }
    if paths.contains(&path) {
        errors.invalid_as(volume, shown, "conflicting duplicate paths");
    } else {
        paths.push(path);
    }
}

fn token(volume: &Field<'_, '_>, token: &Field<'_, '_>, errors: &mut Errors) {
    let seconds = token.at("expirationSeconds");
    if seconds.int().is_some_and(|s| s < 600) {
        errors.invalid(&seconds, "may not specify a duration less than 10 minutes");
    }
    if seconds.int().is_some_and(|s| s > 1 << 32) {
        errors.invalid(&seconds, "may not specify a duration larger than 2^32 seconds");
    }
    // Kubernetes names the path as if it were the volume's.
    let path = volume.at("path").with(token.at("path").value);
    if errors.need(&path) {
        unreserved_path(&path, errors);
    }
}

fn trust_bundle(bundle: &Field<'_, '_>, errors: &mut Errors) {
    let (name, signer, selector) = (bundle.at("name"), bundle.at("signerName"), bundle.at("labelSelector"));
    match (name.is_set(), signer.is_set()) {
        (true, true) => errors.invalid(bundle, "only one of name and signerName may be used"),
        (true, false) => {
            if name.is_blank() {
                errors.required(&name, "must be a valid object name");
            }
            // The signer's name, where it stands before the last colon.
            let of = name.str().rsplit_once(':').map_or_else(String::new, |(signer, _)| signer.replace(':', "/"));
            for fault in cluster_trust_bundle::name(&of, name.str(), false) {
                errors.invalid(&name, format!("not a valid clustertrustbundlename: {fault}"));
            }
            if selector.is_set() {
                errors.invalid(&selector, "labelSelector must be unset if name is specified");
            }
        }
        (false, true) => {
            if signer.is_blank() {
                errors.required(&signer, "must be a valid signer name");
            }
            signers::signer_name(&signer, errors);
            metadata::label_selector(&selector, errors);
        }
        (false, false) => errors.required(bundle, "either name or signerName must be specified"),
    }
    let path = bundle.at("path");
    errors.need(&path);
    unreserved_path(&path, errors);
}

/// What is asked of a signer for a pod, and where the answer is written.
fn pod_certificate(certificate: &Field<'_, '_>, errors: &mut Errors) {
    signers::signer_name(&certificate.at("signerName"), errors);
    let kind = certificate.at("keyType");
    if !KEY_TYPES.contains(&kind.str()) {
        errors.not_supported(&kind, &KEY_TYPES);
    }
    let seconds = certificate.at("maxExpirationSeconds");
    if seconds.int().is_some_and(|s| s < 3600) {
        errors.invalid(&seconds, "if provided, maxExpirationSeconds must be >= 3600");
    }
    if seconds.int().is_some_and(|s| s > 7_862_400) {
        errors.invalid(&seconds, "if provided, maxExpirationSeconds must be <= 7862400");
    }
    let files = CERTIFICATE_FILES.map(|file| certificate.at(file));
    if files.iter().all(Field::is_blank) {
        errors.required(certificate, "specify at least one of credentialBundlePath, keyPath, and certificateChainPath");
    }
    for file in files.iter().filter(|file| !file.is_blank()) {
        unreserved_path(file, errors);
    }
    signers::user_annotations(&certificate.at("userAnnotations"), errors);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn faults(sources: Value) -> Vec<String> {
        let volume = json!({"sources": sources});
        let mut errors = Errors::default();
        projected(&Field::root(&volume), &mut errors);
        errors.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_trust_bundle_is_named_or_selected() {
        for (bundle, fault) in [
            (json!({"name": "a", "path": "ca"}), ""),
            (json!({"name": "example.com:foo:v1", "path": "ca"}), ""),
            (json!({"signerName": "example.com/foo", "labelSelector": {}, "path": "ca"}), ""),
            (json!({"path": "ca"}), ": Required value: either name or signerName must be specified"),
            (
                json!({"name": "UP", "path": "ca"}),
                ".name: Invalid value: \"UP\": not a valid clustertrustbundlename: a lowercase RFC 1123 subdomain",
            ),
            (
                json!({"signerName": "foo", "path": "ca"}),
                ".signerName: Invalid value: \"foo\": must be a fully qualified domain and path",
            ),
            (json!({"name": "a", "path": "../ca"}), ".path: Invalid value: \"../ca\": must not contain '..'"),
        ] {
            let told = faults(json!([{"clusterTrustBundle": bundle}]));
            let expected = format!("sources[0].clusterTrustBundlePEM{fault}");
            let same = if fault.is_empty() { told.is_empty() } else { told[0].starts_with(&expected) };
            assert!(same && told.len() < 2, "{fault}: {told:?}");
        }
    }

    #[test]
    fn a_pods_certificate_is_of_a_known_kind_and_goes_somewhere() {
        let certificate = json!({"signerName": "example.com/foo", "keyType": "ECDSAP256", "keyPath": "k",
            "certificateChainPath": "c", "maxExpirationSeconds": 3600, "userAnnotations": {"example.com/a": "b"}});
        assert!(faults(json!([{"podCertificate": certificate}])).is_empty());
        for (field, value, fault) in [
            (
                "keyType",
                json!("RSA1024"),
                ".keyType: Unsupported value: \"RSA1024\": supported values: \"RSA3072\", \"RSA4096\", \"ECDSAP256\", \"ECDSAP384\", \"ECDSAP521\", \"ED25519\"",
            ),
            (
                "maxExpirationSeconds",
                json!(3599),
                ".maxExpirationSeconds: Invalid value: 3599: if provided, maxExpirationSeconds must be >= 3600",
            ),
            (
                "maxExpirationSeconds",
                json!(7_862_401),
                ".maxExpirationSeconds: Invalid value: 7862401: if provided, maxExpirationSeconds must be <= 7862400",
            ),
            ("keyPath", json!("/k"), ".keyPath: Invalid value: \"/k\": must be a relative path"),
            (
                "userAnnotations",
                json!({"a": "b"}),
                ".userAnnotations: Invalid value: \"a\": must be a domain-prefixed key (such as \"acme.io/foo\")",
            ),
            ("signerName", json!(""), ".signerName: Required value"),
        ] {
            let mut changed = certificate.clone();
            changed[field] = value;
            let told = faults(json!([{"podCertificate": changed}]));
            assert_eq!(told, [format!("sources[0].podCertificate{fault}")]);
        }
        let nowhere = json!([{"podCertificate": {"signerName": "example.com/foo", "keyType": "ED25519"}}]);
        assert!(faults(nowhere)[0].starts_with("sources[0].podCertificate: Required value: specify at least one of"));
        let twice = json!([{"podCertificate": certificate}, {"clusterTrustBundle": {"name": "a", "path": "k"}}]);
        assert_eq!(faults(twice).len(), 1, "one file of two sources");
    }
}
