//! What the files of a configMap, secret, downwardAPI or projected volume hold: pure, from what was fetched.
//!
//! The first three are projected volumes of one source, so there is one way for all ([`sources_of`], [`payload`]).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use k8s_openapi::api::core::v1::{
    ConfigMapProjection, DownwardAPIProjection, DownwardAPIVolumeFile, KeyToPath, Pod, SecretProjection,
    ServiceAccountTokenProjection, Volume, VolumeProjection,
};

use super::pod_certificates::Credentials;
use crate::env::{Found, NodeFacts, field_ref};

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileProjection {
    pub data: Vec<u8>,
    pub mode: u32,
    /// The file's owner, where all containers of the pod run as one user (tokens only).
    pub uid: Option<u32>,
}

/// The files of a volume by their path below it.
pub(super) type Payload = BTreeMap<String, FileProjection>;

/// A volume whose files come from the API.
#[derive(Debug, Clone)]
pub(super) struct ApiVolume {
    /// The plugin's directory: `kubernetes.io~configmap` …
    pub plugin: &'static str,
    /// Kept in memory, never on disk.
    pub in_memory: bool,
    pub default_mode: u32,
    pub sources: Vec<VolumeProjection>,
}

/// Which files a volume needs, or `None` if its files do not come from the API.
pub(super) fn sources_of(volume: &Volume) -> Option<ApiVolume> {
    const DEFAULT_MODE: u32 = 0o644;
    let mode = |mode: Option<i32>| mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(DEFAULT_MODE);
    if let Some(source) = &volume.config_map {
        return Some(ApiVolume {
            plugin: "kubernetes.io~configmap",
            in_memory: false,
            default_mode: mode(source.default_mode),
            sources: vec![VolumeProjection {
                config_map: Some(ConfigMapProjection {
                    name: source.name.clone(),
                    items: source.items.clone(),
                    optional: source.optional,
                }),
                ..Default::default()
            }],
        });
    }
    if let Some(source) = &volume.secret {
        return Some(ApiVolume {
            plugin: "kubernetes.io~secret",
            in_memory: true,
            default_mode: mode(source.default_mode),
            sources: vec![VolumeProjection {
                secret: Some(SecretProjection {
                    name: source.secret_name.clone().unwrap_or_default(),
                    items: source.items.clone(),
                    optional: source.optional,
                }),
                ..Default::default()
            }],
        });
    }
    if let Some(source) = &volume.downward_api {
        return Some(ApiVolume {
            plugin: "kubernetes.io~downward-api",
            in_memory: true,
            default_mode: mode(source.default_mode),
            sources: vec![VolumeProjection {
                downward_api: Some(DownwardAPIProjection { items: source.items.clone() }),
                ..Default::default()
            }],
        });
    }
    volume.projected.as_ref().map(|source| ApiVolume {
        plugin: "kubernetes.io~projected",
        in_memory: true,
        default_mode: mode(source.default_mode),
        sources: source.sources.clone().unwrap_or_default(),
    })
}

/// The ConfigMaps, Secrets and tokens that the volume needs.
#[derive(Debug, Default)]
pub(super) struct Wanted<'v> {
    pub config_maps: BTreeSet<&'v str>,
    pub secrets: BTreeSet<&'v str>,
    pub tokens: Vec<&'v ServiceAccountTokenProjection>,
}

// === impl ApiVolume ===

impl ApiVolume {
    pub(super) fn wanted(&self) -> Wanted<'_> {
        let mut wanted = Wanted::default();
        for source in &self.sources {
            wanted.config_maps.extend(source.config_map.iter().map(|source| source.name.as_str()));
            wanted.secrets.extend(source.secret.iter().map(|source| source.name.as_str()));
            wanted.tokens.extend(source.service_account_token.as_ref());
        }
        wanted
    }
}

/// Tokens by (audience, lifetime in seconds): see [`token_key`].
pub(super) type Tokens = BTreeMap<(String, i64), String>;

/// What distinguishes one projected token of a pod from another.
pub(super) fn token_key(source: &ServiceAccountTokenProjection) -> (String, i64) {
    const DEFAULT_SECONDS: i64 = 3600;
    (source.audience.clone().unwrap_or_default(), source.expiration_seconds.unwrap_or(DEFAULT_SECONDS))
}

/// What was answered to the sources that somebody had to be asked for, by their places in the volume.
pub(super) type Answers = BTreeMap<usize, Result<Answer, String>>;

/// An answer to a source.
#[derive(Debug, Clone)]
pub(super) enum Answer {
    /// Trust anchors, as PEM.
    Anchors(String),
    Credentials(Credentials),
}

/// What the files of a volume are made of.
#[derive(Default)]
pub(super) struct Material {
    pub found: Found,
    pub tokens: Tokens,
    pub answers: Answers,
    pub facts: NodeFacts,
}

/// The volume's files, or every reason why there are none, joined as Kubernetes joins them.
pub(super) fn payload(volume: &ApiVolume, pod: &Pod, material: &Material) -> Result<Payload, String> {
    let mut payload = Payload::new();
    let mut errors = Vec::new();
    for (place, source) in volume.sources.iter().enumerate() {
        match files_of((place, source), volume.default_mode, pod, material) {
            Ok(files) => payload.extend(files),
            Err(error) => errors.push(error),
        }
    }
    if let Some(bad) = payload.keys().find(|path| !is_safe_path(path)) {
        errors.push(format!("invalid path: {bad:?} must be relative and without \"..\""));
    }
    match errors.as_slice() {
        [] => Ok(payload),
        [one] => Err(one.clone()),
        many => Err(format!("[{}]", many.join(", "))),
    }
}

fn files_of(
    (place, source): (usize, &VolumeProjection),
    default_mode: u32,
    pod: &Pod,
    material: &Material,
) -> Result<Payload, String> {
    let Material { found, tokens, answers, facts } = material;
    if let Some(source) = &source.config_map {
        let optional = source.optional == Some(true);
        let Some(object) = found.config_maps.get(&source.name) else {
            return if optional { Ok(Payload::new()) } else { Err(format!("configmap \"{}\" not found", source.name)) };
        };
        let text = object.data.iter().flatten().map(|(key, value)| (key.as_str(), value.as_bytes()));
        let binary = object.binary_data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
        return keyed_files(
            text.chain(binary).collect(),
            source.items.as_deref(),
            default_mode,
            optional,
            "configmap references non-existent config key",
        );
    }
    if let Some(source) = &source.secret {
        let optional = source.optional == Some(true);
        let Some(object) = found.secrets.get(&source.name) else {
            return if optional { Ok(Payload::new()) } else { Err(format!("secret \"{}\" not found", source.name)) };
        };
        let data = object.data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
        return keyed_files(
            data.collect(),
            source.items.as_deref(),
            default_mode,
            optional,
            "references non-existent secret key",
        );
    }
    if let Some(source) = &source.downward_api {
        return downward_files(source.items.as_deref().unwrap_or_default(), default_mode, pod, facts);
    }
    // Who alone reads a secret alone may.
    let uid = only_user(pod);
    let mode = if uid.is_some() || fs_group(pod).is_some() { 0o600 } else { default_mode };
    let file = |path: &String, data: String| (path.clone(), FileProjection { data: data.into_bytes(), mode, uid });
    if let Some(source) = &source.service_account_token {
        let token = tokens.get(&token_key(source)).ok_or("failed to fetch token: no token")?;
        return Ok(Payload::from([file(&source.path, token.clone())]));
    }
    let answer = || answers.get(&place).cloned().unwrap_or_else(|| Err("nobody was asked".to_owned()));
    if let Some(source) = &source.cluster_trust_bundle {
        let Answer::Anchors(anchors) = answer()? else { return Ok(Payload::new()) };
        return Ok(Payload::from([file(&source.path, anchors)]));
    }
    if let Some(source) = &source.pod_certificate {
        let Answer::Credentials(Credentials { key, chain }) = answer()? else { return Ok(Payload::new()) };
        let files = [
            (&source.credential_bundle_path, format!("{key}{chain}")),
            (&source.key_path, key),
            (&source.certificate_chain_path, chain),
        ];
        let wanted =
            files.into_iter().filter_map(|(path, data)| Some((path.as_ref().filter(|p| !p.is_empty())?, data)));
        return Ok(wanted.map(|(path, data)| file(path, data)).collect());
    }
    Ok(Payload::new())
}

fn keyed_files(
    data: BTreeMap<&str, &[u8]>,
    items: Option<&[KeyToPath]>,
    default_mode: u32,
    optional: bool,
    missing: &str,
) -> Result<Payload, String> {
    let file = |data: &[u8], mode| FileProjection { data: data.to_vec(), mode, uid: None };
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        return Ok(data.into_iter().map(|(key, value)| (key.to_owned(), file(value, default_mode))).collect());
    };
    let mut payload = Payload::new();
    for item in items {
        let mode = item.mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(default_mode);
        match data.get(item.key.as_str()) {
            Some(value) => {
                payload.insert(item.path.clone(), file(value, mode));
            }
            None if optional => {}
            None => return Err(format!("{missing}: {}", item.key)),
        }
    }
    Ok(payload)
}

fn downward_files(
    items: &[DownwardAPIVolumeFile],
    default_mode: u32,
    pod: &Pod,
    facts: &NodeFacts,
) -> Result<Payload, String> {
    let mut payload = Payload::new();
    for item in items {
        let value = if let Some(field) = &item.field_ref {
            field_ref::pod_field(pod, &field.field_path, facts).map_err(|error| error.to_string())?
        } else if let Some(selector) = &item.resource_field_ref {
            field_ref::selected_container(pod, selector, None)
                .and_then(|container| field_ref::resource_field(container, selector, facts))
                .map_err(|error| error.to_string())?
        } else {
            continue;
        };
        let mode = item.mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(default_mode);
        payload.insert(item.path.clone(), FileProjection { data: value.into_bytes(), mode, uid: None });
    }
    Ok(payload)
}

/// The one user that every container of the pod runs as, if there is one. As `FsUserFrom`.
fn only_user(pod: &Pod) -> Option<u32> {
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let regular = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let users: BTreeSet<Option<i64>> = regular
        .map(|container| container.security_context.as_ref())
        .chain(spec.ephemeral_containers.iter().flatten().map(|container| container.security_context.as_ref()))
        .map(|context| context.and_then(|context| context.run_as_user).or(of_pod))
        .collect();
    match users.into_iter().collect::<Vec<_>>().as_slice() {
        [Some(user)] => u32::try_from(*user).ok(),
        _ => None,
    }
}

/// The pod's `fsGroup`.
pub(super) fn fs_group(pod: &Pod) -> Option<u32> {
    let group = pod.spec.as_ref()?.security_context.as_ref()?.fs_group?;
    u32::try_from(group).ok()
}

/// Relative, without `..`, and not one of the writer's own names. As `validatePath` of the atomic writer.
fn is_safe_path(path: &str) -> bool {
    let relative = Path::new(path);
    !path.is_empty()
        && !path.starts_with("..")
        && relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        && relative.components().any(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    fn pod(security_context: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "labels": {"app": "web"}},
            "spec": {"securityContext": security_context, "containers": [
                {"name": "c", "resources": {"requests": {"cpu": "250m"}}}]},
        }))
        .expect("a pod")
    }

    fn found() -> Found {
        let config_map =
            json!({"metadata": {"name": "cm"}, "data": {"a": "1", "b": "2"}, "binaryData": {"bin": "AAE="}});
        let secret = json!({"metadata": {"name": "s"}, "data": {"pw": "aHVudGVyMg=="}});
        Found {
            config_maps: BTreeMap::from([(
                "cm".into(),
                Arc::new(serde_json::from_value(config_map).expect("a ConfigMap")),
            )]),
            secrets: BTreeMap::from([("s".into(), Arc::new(serde_json::from_value(secret).expect("a Secret")))]),
            ..Default::default()
        }
    }

    fn files(volume: serde_json::Value, pod: &Pod) -> Result<Vec<(String, String, u32)>, String> {
        let volume: Volume = serde_json::from_value(volume).expect("a volume");
        let tokens = Tokens::from([((String::new(), 3600), "ey".to_owned())]);
        let volume = sources_of(&volume).expect("an API volume");
        let answer = |source: &VolumeProjection| match &source.cluster_trust_bundle {
            Some(bundle) if bundle.name.is_none() => Err("no such bundle".to_owned()),
            Some(_) => Ok(Answer::Anchors("anchors".to_owned())),
            None => Ok(Answer::Credentials(Credentials { key: "key ".to_owned(), chain: "chain".to_owned() })),
        };
        let answers = volume.sources.iter().map(answer).enumerate().collect();
        let material = Material { found: found(), tokens, answers, ..Material::default() };
        let payload = payload(&volume, pod, &material)?;
        Ok(payload.into_iter().map(|(path, f)| (path, String::from_utf8_lossy(&f.data).into_owned(), f.mode)).collect())
    }

    #[test]
    fn files_of_each_kind() {
        let file = |path: &str, data: &str, mode| (path.to_owned(), data.to_owned(), mode);
        let cases = [
            (
                json!({"name": "v", "configMap": {"name": "cm"}}),
                vec![file("a", "1", 0o644), file("b", "2", 0o644), file("bin", "\0\u{1}", 0o644)],
            ),
            (
                json!({"name": "v", "configMap": {"name": "cm", "defaultMode": 256, "items": [
                    {"key": "a", "path": "x/y"}, {"key": "b", "path": "z", "mode": 511}]}}),
                vec![file("x/y", "1", 0o400), file("z", "2", 0o777)],
            ),
            (json!({"name": "v", "configMap": {"name": "none", "optional": true}}), vec![]),
            (
                json!({"name": "v", "configMap": {"name": "cm", "optional": true, "items": [{"key": "zz", "path": "p"}]}}),
                vec![],
            ),
            (json!({"name": "v", "secret": {"secretName": "s"}}), vec![file("pw", "hunter2", 0o644)]),
            (
                json!({"name": "v", "downwardAPI": {"items": [
                    {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
                    {"path": "cpu", "resourceFieldRef": {"containerName": "c", "resource": "requests.cpu", "divisor": "1m"}}]}}),
                vec![file("cpu", "250", 0o644), file("labels", "app=\"web\"", 0o644)],
            ),
            (
                json!({"name": "v", "projected": {"sources": [
                    {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
                    {"configMap": {"name": "cm", "items": [{"key": "a", "path": "ca.crt"}]}},
                    {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}}]}}),
                vec![file("ca.crt", "1", 0o644), file("namespace", "ns", 0o644), file("token", "ey", 0o644)],
            ),
            (
                json!({"name": "v", "projected": {"defaultMode": 256, "sources": [
                    {"clusterTrustBundle": {"name": "b", "path": "ca.pem"}},
                    {"podCertificate": {"signerName": "e.com/s", "keyType": "ED25519", "credentialBundlePath": "all",
                        "keyPath": "tls/key", "certificateChainPath": "tls/chain"}}]}}),
                vec![
                    file("all", "key chain", 0o400),
                    file("ca.pem", "anchors", 0o400),
                    file("tls/chain", "chain", 0o400),
                    file("tls/key", "key ", 0o400),
                ],
            ),
        ];
        for (volume, want) in cases {
            assert_eq!(files(volume.clone(), &pod(json!({}))), Ok(want), "{volume}");
        }
    }

    #[test]
    fn what_is_missing_is_told_as_kubernetes_tells_it() {
        let cases = [
            (json!({"name": "v", "configMap": {"name": "none"}}), "configmap \"none\" not found"),
            (json!({"name": "v", "secret": {"secretName": "none"}}), "secret \"none\" not found"),
            (
                json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "zz", "path": "p"}]}}),
                "configmap references non-existent config key: zz",
            ),
            (
                json!({"name": "v", "projected": {"sources": [{"configMap": {"name": "x"}}, {"secret": {"name": "y"}}]}}),
                "[configmap \"x\" not found, secret \"y\" not found]",
            ),
            (json!({"name": "v", "projected": {"sources": [{"clusterTrustBundle": {"path": "p"}}]}}), "no such bundle"),
            (
                json!({"name": "v", "configMap": {"name": "cm", "items": [{"key": "a", "path": "../../etc/passwd"}]}}),
                "invalid path: \"../../etc/passwd\" must be relative and without \"..\"",
            ),
        ];
        for (volume, want) in cases {
            assert_eq!(files(volume, &pod(json!({}))), Err(want.to_owned()));
        }
    }

    #[test]
    fn tokens_are_private_where_their_reader_is_known() {
        let volume = json!({"name": "v", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}});
        let mode = |context| files(volume.clone(), &pod(context)).map(|files| files[0].2);
        assert_eq!(mode(json!({})), Ok(0o644));
        assert_eq!(mode(json!({"fsGroup": 1000})), Ok(0o600));
        assert_eq!(mode(json!({"runAsUser": 1000})), Ok(0o600));
        assert_eq!(only_user(&pod(json!({"runAsUser": 7}))), Some(7));
    }

    #[test]
    fn paths_stay_inside() {
        for (path, safe) in [
            ("a", true),
            ("a/b.c", true),
            ("", false),
            ("/a", false),
            ("a/../b", false),
            ("..data", false),
            (".", false),
        ] {
            assert_eq!(is_safe_path(path), safe, "{path:?}");
        }
    }
}
