//! Where a volume's contents come from: what each kind of source needs, in a pod and in a PersistentVolume, as one table. As
//! `validateVolumeSource` and `ValidatePersistentVolumeSpec`.

use crate::registry::checks::{self, Is, Table, driver_name};
use crate::registry::field::{Errors, Field};
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain};
use apimachinery::quantity::Quantity;

const HOST_PATH_TYPES: [&str; 8] =
    ["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
pub const MORE_THAN_ONE: &str = "may not specify more than 1 volume type";

/// One kind of source.
pub struct Source {
    /// The field of the volume.
    pub kind: &'static str,
    /// What errors of its content call that field, and what errors of its being there: not always its name.
    path: &'static str,
    doubled: &'static str,
    needs: Table,
    more: fn(&Field<'_, '_>, &mut Errors),
}

const NOTHING: fn(&Field<'_, '_>, &mut Errors) = |_, _| {};
const NEEDED: Is = Is::Required("");

const fn source(kind: &'static str, needs: Table, more: fn(&Field<'_, '_>, &mut Errors)) -> Source {
    Source { kind, path: kind, doubled: kind, needs, more }
}

const fn called(source: Source, path: &'static str, doubled: &'static str) -> Source {
    Source { path, doubled, ..source }
}

const PARTITION: Is = Is::By(|field, errors| errors.in_range(field, 0, 255));
const LUN: Is = PARTITION;

/// Sources that pods and PersistentVolumes have alike.
const HOST_PATH: Source = source("hostPath", &[], host_path);
const GCE: Source = called(
    source("gcePersistentDisk", &[("pdName", NEEDED), ("partition", PARTITION)], NOTHING),
    "persistentDisk",
    "gcePersistentDisk",
);
const AWS: Source = source("awsElasticBlockStore", &[("volumeID", NEEDED), ("partition", PARTITION)], NOTHING);
const NFS: Source = source("nfs", &[("server", NEEDED), ("path", NEEDED)], |nfs, errors| {
    if !nfs.at("path").str().starts_with('/') {
        errors.invalid(&nfs.at("path"), "must be an absolute path");
    }
});
const FLOCKER: Source = source("flocker", &[], flocker);
const RBD: Source = source("rbd", &[("monitors", NEEDED), ("image", NEEDED)], NOTHING);
const CEPHFS: Source = called(source("cephfs", &[("monitors", NEEDED)], NOTHING), "cephfs", "cephFS");
const QUOBYTE: Source = source("quobyte", &[], quobyte);
const FC: Source = source("fc", &[], fibre_channel);
const FLEX: Source = source("flexVolume", &[("driver", NEEDED)], flex);
const VSPHERE: Source = source("vsphereVolume", &[("volumePath", NEEDED)], NOTHING);
const PHOTON: Source = source("photonPersistentDisk", &[("pdID", NEEDED)], NOTHING);
const PORTWORX: Source = source("portworxVolume", &[("volumeID", NEEDED)], NOTHING);
const AZURE_DISK: Source = source(
    "azureDisk",
    &[
        ("diskName", NEEDED),
        ("diskURI", NEEDED),
        ("cachingMode", Is::OneOf(&["None", "ReadOnly", "ReadWrite"])),
        ("kind", Is::OneOf(&["Dedicated", "Managed", "Shared"])),
    ],
    azure_disk,
);
const SCALE_IO: Source = source("scaleIO", &[("gateway", NEEDED), ("system", NEEDED), ("volumeName", NEEDED)], NOTHING);

/// A PersistentVolume's, in the order in which a second one is found.
pub const PERSISTENT: &[Source] = &[
    HOST_PATH,
    GCE,
    AWS,
    source("glusterfs", &[("endpoints", NEEDED), ("path", NEEDED)], |glusterfs, errors| {
        let namespace = glusterfs.at("endpointsNamespace");
        if namespace.is_set() && namespace.is_blank() {
            errors.invalid(&namespace, "if the endpointnamespace is set, it must be a valid namespace name");
        } else {
            errors.named(&namespace, is_dns1123_label);
        }
    }),
    FLOCKER,
    NFS,
    RBD,
    QUOBYTE,
    CEPHFS,
    source("iscsi", &[("targetPortal", NEEDED), ("secretRef?.name", NEEDED)], iscsi),
    source("cinder", &[("volumeID", NEEDED), ("secretRef?.name", NEEDED), ("secretRef?.namespace", NEEDED)], NOTHING),
    FC,
    FLEX,
    source("azureFile", &[("secretName", NEEDED), ("shareName", NEEDED)], |azure, errors| {
        let namespace = azure.at("secretNamespace");
        if namespace.is_set() && namespace.is_blank() {
            errors.required(&namespace, "");
        }
    }),
    VSPHERE,
    PHOTON,
    PORTWORX,
    AZURE_DISK,
    SCALE_IO,
    source("local", &[("path", NEEDED)], |local, errors| no_backsteps(&local.at("path"), errors)),
    source("storageos", &[("secretRef?.name", NEEDED), ("secretRef?.namespace", NEEDED)], storage_os),
    source("csi", &[("driver", Is::By(driver_name)), ("volumeHandle", NEEDED)], |csi, errors| {
        for field in
            ["controllerPublishSecretRef", "controllerExpandSecretRef", "nodePublishSecretRef", "nodeExpandSecretRef"]
        {
            let secret = csi.at(field);
            if secret.is_set() {
                errors.need_named(&secret.at("name"), is_dns1123_subdomain);
                errors.need_named(&secret.at("namespace"), is_dns1123_label);
            }
        }
    }),
];

/// A pod's, but for those that need to know more of the pod.
pub const OF_PODS: &[Source] = &[
    source("emptyDir", &[], |empty, errors| {
        let limit = empty.at("sizeLimit");
        if Quantity::parse(limit.str()).is_ok_and(|q| q < Quantity::ZERO) {
            errors.forbidden(&limit, "SizeLimit field must be a valid resource quantity");
        }
    }),
    HOST_PATH,
    source("gitRepo", &[("repository", NEEDED)], |repo, errors| relative_path(&repo.at("directory"), errors)),
    GCE,
    AWS,
    source("secret", &[("secretName", NEEDED)], mode_and_items),
    NFS,
    source("iscsi", &[("targetPortal", NEEDED)], iscsi),
    source("glusterfs", &[("endpoints", NEEDED), ("path", NEEDED)], NOTHING),
    FLOCKER,
    source("persistentVolumeClaim", &[("claimName", NEEDED)], NOTHING),
    RBD,
    source("cinder", &[("volumeID", NEEDED), ("secretRef?.name", NEEDED)], NOTHING),
    CEPHFS,
    QUOBYTE,
    called(source("downwardAPI", &[], super::projections::downward_volume), "downwardAPI", "downwarAPI"),
    FC,
    FLEX,
    source("configMap", &[("name", NEEDED)], mode_and_items),
    source("azureFile", &[("secretName", NEEDED), ("shareName", NEEDED)], NOTHING),
    VSPHERE,
    PHOTON,
    PORTWORX,
    AZURE_DISK,
    source("storageos", &[("secretRef?.name", NEEDED)], storage_os),
    source("projected", &[], super::projections::projected),
    SCALE_IO,
    source("csi", &[("driver", Is::By(driver_name))], |csi, errors| {
        let secret = csi.at("nodePublishSecretRef");
        if secret.is_set() {
            errors.need_named(&secret.at("name"), is_dns1123_subdomain);
        }
    }),
    source("ephemeral", &[], |ephemeral, errors| {
        let template = ephemeral.at("volumeClaimTemplate");
        if template.is_set() {
            super::persistent_volume_claim::template(&template, errors);
        } else {
            errors.required(&template, "");
        }
    }),
    source("image", &[("pullPolicy", Is::RequiredOneOf(&super::container_validation::PULL_POLICIES))], NOTHING),
];

/// Checks the one source that `volume` must have among these; answers its kind.
pub fn the_source(volume: &Field<'_, '_>, sources: &'static [Source], errors: &mut Errors) -> &'static str {
    let mut found = "";
    // Volumes have few fields: look at those, not at all kinds that there are.
    let has = |source: &&Source| volume.value.get(source.kind).is_some_and(|value| !value.is_null());
    for source in sources.iter().filter(has) {
        if found.is_empty() {
            found = source.kind;
            let value = volume.value.get(source.kind).unwrap_or(&serde_json::Value::Null);
            let field = volume.at(source.path).with(value);
            checks::check(&field, source.needs, errors);
            (source.more)(&field, errors);
        } else {
            errors.forbidden(&volume.at(source.doubled), MORE_THAN_ONE);
        }
    }
    if found.is_empty() {
        errors.required(volume, "must specify a volume type");
    }
    found
}

// === forms of paths, modes, items ===

/// As `validateLocalDescendingPath`: inside, wherever it is put.
pub fn relative_path(path: &Field<'_, '_>, errors: &mut Errors) {
    if path.str().starts_with('/') {
        errors.invalid(path, "must be a relative path");
    }
    no_backsteps(path, errors);
}

/// As `validatePathNoBacksteps`.
pub fn no_backsteps(path: &Field<'_, '_>, errors: &mut Errors) {
    if path.str().split('/').any(|step| step == "..") {
        errors.invalid(path, "must not contain '..'");
    }
}

/// As `ValidateLocalNonReservedPath`.
pub fn unreserved_path(path: &Field<'_, '_>, errors: &mut Errors) {
    relative_path(path, errors);
    let text = path.str();
    if text.starts_with("..") && !text.starts_with("../") {
        errors.invalid(path, "must not start with '..'");
    }
}

/// Bits of a file's mode, where they are given.
pub fn mode(mode: &Field<'_, '_>, errors: &mut Errors) {
    if mode.int().is_some_and(|m| !(0..=0o777).contains(&m)) {
        errors.invalid(mode, "must be a number between 0 and 0777 (octal), both inclusive");
    }
}

fn mode_and_items(source: &Field<'_, '_>, errors: &mut Errors) {
    mode(&source.at("defaultMode"), errors);
    for item in source.at("items").items() {
        key_to_path(&item, errors);
    }
}

/// As `validateKeyToPath`.
pub fn key_to_path(item: &Field<'_, '_>, errors: &mut Errors) {
    errors.need(&item.at("key"));
    let path = item.at("path");
    errors.need(&path);
    unreserved_path(&path, errors);
    mode(&item.at("mode"), errors);
}

/// As `validateHostPathVolumeSource`.
fn host_path(source: &Field<'_, '_>, errors: &mut Errors) {
    let path = source.at("path");
    if errors.need(&path) {
        no_backsteps(&path, errors);
        errors.one_of(&source.at("type"), &HOST_PATH_TYPES);
    }
}

// === sources with rules of their own ===

fn flocker(flocker: &Field<'_, '_>, errors: &mut Errors) {
    let (name, uuid) = (flocker.at("datasetName"), flocker.at("datasetUUID"));
    if name.is_blank() && uuid.is_blank() {
        errors.required(flocker, "one of datasetName and datasetUUID is required");
    } else if !name.is_blank() && !uuid.is_blank() {
        errors.invalid_as(flocker, "resource", "datasetName and datasetUUID can not be specified simultaneously");
    }
    if name.str().contains('/') {
        errors.invalid(&name, "must not contain '/'");
    }
}

fn quobyte(quobyte: &Field<'_, '_>, errors: &mut Errors) {
    const PAIRS: &str = "must be a host:port pair or multiple pairs separated by commas";
    let registry = quobyte.at("registry");
    if registry.is_blank() {
        errors.required(&registry, PAIRS);
    } else if quobyte.at("tenant").str().len() >= 65 {
        errors.required(&quobyte.at("tenant"), "must be a UUID and may not exceed a length of 64 characters");
    } else {
        let is_pair = |pair: &str| {
            pair.rsplit_once(':')
                .is_some_and(|(host, _)| !host.contains(':') || (host.starts_with('[') && host.ends_with(']')))
        };
        for _ in registry.str().split(',').filter(|pair| !is_pair(pair)) {
            errors.invalid(&registry, PAIRS);
        }
    }
    errors.need(&quobyte.at("volume"));
}

fn fibre_channel(fc: &Field<'_, '_>, errors: &mut Errors) {
    let (targets, ids, lun) = (fc.at("targetWWNs"), fc.at("wwids"), fc.at("lun"));
    match (targets.is_empty(), ids.is_empty()) {
        (true, true) => errors.required(&targets, "must specify either targetWWNs or wwids, but not both"),
        (false, false) => errors.invalid(&targets, "targetWWNs and wwids can not be specified simultaneously"),
        _ => {}
    }
    if !targets.is_empty() {
        if lun.is_set() {
            LUN.check(&lun, errors);
        } else {
            errors.required(&lun, "lun is required if targetWWNs is specified");
        }
    }
}

fn flex(flex: &Field<'_, '_>, errors: &mut Errors) {
    for (key, option) in flex.at("options").entries() {
        let namespace = format!(".{}", key.split('/').next().unwrap_or(key).to_lowercase());
        if namespace.ends_with(".kubernetes.io") || namespace.ends_with(".k8s.io") {
            errors.invalid_as(&option, key, "kubernetes.io and k8s.io namespaces are reserved");
        }
    }
}

fn azure_disk(disk: &Field<'_, '_>, errors: &mut Errors) {
    let (uri, kind) = (disk.at("diskURI"), disk.at("kind"));
    let (start, supported) = match kind.str() {
        "" => return,
        "Managed" => (
            "/subscriptions/",
            "/subscriptions/{sub-id}/resourcegroups/{group-name}/providers/microsoft.compute/disks/{disk-id}",
        ),
        _ => ("https://", "https://{account-name}.blob.core.windows.net/{container-name}/{disk-name}.vhd"),
    };
    if !uri.str().starts_with(start) {
        errors.not_supported(&uri, &[supported]);
    }
}

fn storage_os(volume: &Field<'_, '_>, errors: &mut Errors) {
    errors.need_named(&volume.at("volumeName"), is_dns1123_label);
    errors.named(&volume.at("volumeNamespace"), is_dns1123_label);
}

fn iscsi(iscsi: &Field<'_, '_>, errors: &mut Errors) {
    let name = iscsi.at("iqn");
    if errors.need(&name) {
        qualified_iscsi_name(&name, errors);
    }
    LUN.check(&iscsi.at("lun"), errors);
    let secret = iscsi.at("secretRef");
    if (iscsi.at("chapAuthDiscovery").bool() || iscsi.at("chapAuthSession").bool()) && !secret.is_set() {
        errors.required(&secret, "");
    }
    let initiator = iscsi.at("initiatorName");
    if initiator.is_set() {
        qualified_iscsi_name(&iscsi.at("initiatorname").with(initiator.value), errors);
    }
}

fn qualified_iscsi_name(name: &Field<'_, '_>, errors: &mut Errors) {
    let text = name.str();
    let alphanumeric =
        |rest: &str, length: usize| rest.len() == length + 1 && rest[1..].bytes().all(|b| b.is_ascii_alphanumeric());
    let (valid, message) = if let Some(rest) = text.strip_prefix("iqn") {
        (is_iqn(rest), "must be valid format")
    } else if let Some(rest) = text.strip_prefix("eui") {
        (rest.is_ascii() && alphanumeric(rest, 16), "must be valid format")
    } else if let Some(rest) = text.strip_prefix("naa") {
        (rest.is_ascii() && alphanumeric(rest, 32), "must be valid format")
    } else {
        (false, "must be valid format starting with iqn, eui, or naa")
    };
    if !valid {
        errors.invalid(name, message);
    }
}

/// `.2015-02.example.com:storage`
fn is_iqn(rest: &str) -> bool {
    let Some((authority, path)) = rest.strip_prefix('.').and_then(|rest| rest.split_once(':')) else { return false };
    let bytes = authority.as_bytes();
    let digits = |range: std::ops::Range<usize>| bytes.get(range).is_some_and(|d| d.iter().all(u8::is_ascii_digit));
    digits(0..4)
        && bytes.get(4) == Some(&b'-')
        && digits(5..7)
        && bytes.get(7) == Some(&b'.')
        && bytes.len() > 8
        && bytes[8..].iter().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(b))
        && !path.is_empty()
        && !path.contains(|c: char| ",;*&$|".contains(c) || c.is_whitespace())
}
