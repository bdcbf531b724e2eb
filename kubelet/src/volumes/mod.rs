//! A pod's volumes: prepared under the pod's directory, refreshed while it runs, taken away after it.
//!
//! Nothing about them is remembered in memory: what is set up is read from the disk and the kernel's mount table, so a
//! restarted kubelet goes on where the last one stopped. Paths are Kubernetes': `<pod>/volumes/kubernetes.io~<plugin>/<name>`,
//! `<pod>/volume-subpaths/<volume>/<container>/<index>`, `<pod>/plugins/kubernetes.io~<plugin>/<name>`.

mod atomic_writer;
mod local;
mod mounts;
mod payload;
mod sub_path;
mod tokens;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod, Volume, VolumeMount};
use proto::cri as pb;

use crate::env::{Found, NodeFacts, expansion};
use crate::objects::Objects;
use payload::{ApiVolume, Payload, Tokens};

/// Where a prepared volume is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountSource {
    pub path: PathBuf,
    /// The volume itself forbids writing (configMap, secret, projected, …).
    pub read_only: bool,
}

/// Why volumes cannot be prepared (event reason FailedMount).
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {reason}")]
    Setup { volume: String, reason: String },
    /// A volume that could not be taken away; it is tried again.
    #[error("{0}")]
    TearDown(String),
    /// A subPath or mount that the container may not have: CreateContainerConfigError.
    #[error("{0}")]
    Mount(String),
}

/// The volumes of all pods on this node. Without a client (standalone) API-backed volumes are errors.
pub struct Volumes {
    objects: Objects,
    tokens: tokens::TokenManager,
    node_name: String,
    allocatable: arc_swap::ArcSwap<BTreeMap<String, apimachinery::quantity::Quantity>>,
}

// === impl Volumes ===

impl Volumes {
    pub fn new(objects: impl Into<Objects>, node_name: &str) -> Self {
        Self {
            objects: objects.into(),
            tokens: tokens::TokenManager::default(),
            node_name: node_name.to_owned(),
            allocatable: arc_swap::ArcSwap::default(),
        }
    }

    /// What the node offers to pods: the limit of containers that have none, in downward API files.
    pub fn set_allocatable(&self, allocatable: BTreeMap<String, apimachinery::quantity::Quantity>) {
        self.allocatable.store(std::sync::Arc::new(allocatable));
    }

    /// Prepares all volumes of the pod below `pod_dir` (`<root>/pods/<uid>`). Idempotent: called at each start and
    /// again while the pod runs (about each minute), when configMaps, secrets, tokens and downward items are refreshed.
    ///
    /// All volumes are tried, so that one that is missing does not keep the others from being refreshed; the error is the
    /// first one's.
    pub async fn mount_pod(&self, pod: &Pod, pod_dir: &Path) -> Result<BTreeMap<String, MountSource>, VolumeError> {
        let mut sources = BTreeMap::new();
        let mut failed = None;
        for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
            match self.mount(pod, volume, pod_dir).await {
                Ok(source) => {
                    sources.insert(volume.name.clone(), source);
                }
                Err(reason) => {
                    failed.get_or_insert(VolumeError::Setup { volume: volume.name.clone(), reason });
                }
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(sources),
        }
    }

    async fn mount(&self, pod: &Pod, volume: &Volume, pod_dir: &Path) -> Result<MountSource, String> {
        if !is_path_segment(&volume.name) {
            return Err(format!("invalid volume name {:?}", volume.name));
        }
        if let Some(source) = volume.host_path.clone() {
            let path = PathBuf::from(&source.path);
            if !path.is_absolute() || path.components().any(|part| part == std::path::Component::ParentDir) {
                return Err(format!("hostPath {:?} must be an absolute path without \"..\"", source.path));
            }
            blocking(move || local::host_path(&source)).await?;
            return Ok(MountSource { path, read_only: false });
        }
        if let Some(source) = volume.empty_dir.clone() {
            let path = volume_dir(pod_dir, "kubernetes.io~empty-dir", &volume.name);
            let ready = pod_dir.join("plugins/kubernetes.io~empty-dir").join(&volume.name).join("ready");
            let (target, pod) = (path.clone(), pod.clone());
            blocking(move || local::empty_dir(&target, &source, &ready, &pod)).await?;
            return Ok(MountSource { path, read_only: false });
        }
        if let Some(api_volume) = payload::sources_of(volume) {
            let path = volume_dir(pod_dir, api_volume.plugin, &volume.name);
            let group = payload::fs_group(pod);
            match self.payload(pod, &api_volume).await {
                Ok(payload) => {
                    let (target, in_memory) = (path.clone(), api_volume.in_memory);
                    blocking(move || write_files(&target, in_memory, &payload, group)).await?;
                }
                // Once set up, a volume stays as it is when it cannot be refreshed: its objects were deleted, or the control
                // plane is gone. Running pods go on with what they have.
                Err(reason) if path.join("..data").exists() => {
                    tracing::warn!(pod = pod.metadata.name, volume = volume.name, reason, "volume not refreshed");
                }
                Err(reason) => return Err(reason),
            }
            return Ok(MountSource { path, read_only: true });
        }
        Err(format!("no volume plugin matched: {} is not supported yet", unsupported_kind(volume)))
    }

    /// Fetch what an API volume needs and put its files together.
    async fn payload(&self, pod: &Pod, volume: &ApiVolume) -> Result<Payload, String> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let wanted = volume.wanted();
        let mut found = Found::default();
        for name in wanted.config_maps {
            if let Some(object) = self.objects.config_map(namespace, name).await.map_err(|error| error.to_string())? {
                found.config_maps.insert(name.to_owned(), object);
            }
        }
        for name in wanted.secrets {
            if let Some(object) = self.objects.secret(namespace, name).await.map_err(|error| error.to_string())? {
                found.secrets.insert(name.to_owned(), object);
            }
        }
        let mut tokens = Tokens::new();
        for source in wanted.tokens {
            let client = self.objects.client().ok_or("cannot use TokenManager when kubelet is in standalone mode")?;
            let (audience, seconds) = payload::token_key(source);
            let token = self.tokens.token(client, pod, &audience, seconds).await?;
            tokens.insert((audience, seconds), token);
        }
        let mut facts = NodeFacts::of(pod, (**self.allocatable.load()).clone());
        if facts.node_name.is_empty() {
            facts.node_name.clone_from(&self.node_name);
        }
        payload::payload(volume, pod, &found, &tokens, &facts)
    }

    /// The CRI mounts of one container's volumeMounts (subPath, subPathExpr, readOnly, propagation). `envs` is what
    /// `env::make` gave, for subPathExpr.
    pub async fn container_mounts(
        &self,
        pod: &Pod,
        container: &Container,
        envs: &[(String, String)],
        sources: &BTreeMap<String, MountSource>,
        pod_dir: &Path,
    ) -> Result<Vec<pb::Mount>, VolumeError> {
        let mut made = Vec::new();
        for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
            let source = sources.get(&mount.name).ok_or_else(|| {
                VolumeError::Mount(format!(
                    "cannot find volume \"{}\" to mount into container \"{}\"",
                    mount.name, container.name
                ))
            })?;
            let read_only = mount.read_only == Some(true) || source.read_only;
            let sub_path = sub_path_of(mount, envs)?;
            let host_path = if sub_path.is_empty() {
                source.path.clone()
            } else {
                let target =
                    pod_dir.join("volume-subpaths").join(&mount.name).join(&container.name).join(index.to_string());
                let (volume, wanted, made_at) = (source.path.clone(), sub_path.clone(), target.clone());
                // A source that is read-only by nature (a configMap) makes no directories in itself.
                let from_api = source.read_only;
                let prepared = blocking(move || sub_path::prepare(&volume, &wanted, &made_at, from_api)).await;
                prepared.map_err(|error| {
                    tracing::warn!(
                        pod = pod.metadata.name,
                        container = container.name,
                        sub_path,
                        error,
                        "subPath refused"
                    );
                    VolumeError::Mount(format!(
                        "failed to prepare subPath for volumeMount \"{}\" of container \"{}\"",
                        mount.name, container.name
                    ))
                })?;
                target
            };
            made.push(pb::Mount {
                container_path: absolute(&mount.mount_path),
                host_path: host_path.to_string_lossy().into_owned(),
                readonly: read_only,
                propagation: propagation(mount) as i32,
                recursive_read_only: read_only && mount.recursive_read_only.as_deref() == Some("Enabled"),
                ..Default::default()
            });
        }
        Ok(made)
    }

    /// Unmounts and removes all volumes below `pod_dir`. Idempotent; called once no container runs any more, and for
    /// directories of pods that are long gone.
    pub async fn unmount_pod(&self, uid: &str, pod_dir: &Path) -> Result<(), VolumeError> {
        self.tokens.forget_pod(uid);
        let pod_dir = pod_dir.to_path_buf();
        blocking(move || remove_volumes(&pod_dir)).await.map_err(VolumeError::TearDown)
    }
}

fn volume_dir(pod_dir: &Path, plugin: &str, name: &str) -> PathBuf {
    pod_dir.join("volumes").join(plugin).join(name)
}

/// Whether a name can be a directory's: the API server has checked it, a static manifest may not have been.
fn is_path_segment(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0'])
}

fn write_files(volume: &Path, in_memory: bool, payload: &Payload, group: Option<u32>) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o750).create(volume)?;
    let fresh = if in_memory && !mounts::is_mount_point(volume)? {
        mounts::mount_tmpfs(volume, None)?;
        true
    } else {
        !volume.join("..data").exists()
    };
    atomic_writer::write(volume, payload, group)?;
    if fresh {
        let mode = if group.is_some() { 0o2777 } else { 0o777 };
        if group.is_some() {
            std::os::unix::fs::chown(volume, None, group)?;
        }
        fs::set_permissions(volume, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// First every mount goes, checked against the kernel's table, and only then files: so nothing that is merely mounted here
/// (a hostPath behind a subPath, a network volume) can be deleted.
fn remove_volumes(pod_dir: &Path) -> io::Result<()> {
    sub_path::remove_all(&pod_dir.join("volume-subpaths"))?;
    mounts::unmount_below(&pod_dir.join("volumes"))?;
    for directory in ["volumes", "plugins"] {
        match fs::remove_dir_all(pod_dir.join(directory)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The mount's subPath, with the variables of a subPathExpr filled in.
fn sub_path_of(mount: &VolumeMount, envs: &[(String, String)]) -> Result<String, VolumeError> {
    let expression = mount.sub_path_expr.as_deref().unwrap_or_default();
    if expression.is_empty() {
        return checked_sub_path(mount.sub_path.clone().unwrap_or_default());
    }
    let lookup = |name: &str| envs.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
    let (expanded, unknown) = expansion::expand_noting_unknown(expression, lookup);
    if !unknown.is_empty() {
        return Err(VolumeError::Mount(format!("missing value for \"{}\"", unknown.join(", "))));
    }
    if expanded.is_empty() {
        return Err(VolumeError::Mount(format!("subPathExpr \"{expression}\" is empty")));
    }
    checked_sub_path(expanded)
}

/// What could never lie within a volume. (Links that lead out of it are found when it is opened.)
fn checked_sub_path(path: String) -> Result<String, VolumeError> {
    if path.starts_with('/') {
        return Err(VolumeError::Mount(format!("error SubPath `{path}` must not be an absolute path")));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(VolumeError::Mount(format!("unable to provision SubPath `{path}`: must not contain '..'")));
    }
    Ok(path)
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

fn propagation(mount: &VolumeMount) -> pb::MountPropagation {
    match mount.mount_propagation.as_deref() {
        Some("HostToContainer") => pb::MountPropagation::PropagationHostToContainer,
        Some("Bidirectional") => pb::MountPropagation::PropagationBidirectional,
        _ => pb::MountPropagation::PropagationPrivate,
    }
}

/// The API's name of the volume's source.
fn unsupported_kind(volume: &Volume) -> String {
    match serde_json::to_value(volume) {
        Ok(serde_json::Value::Object(fields)) => fields
            .into_iter()
            .map(|(name, _)| name)
            .find(|name| name != "name")
            .unwrap_or_else(|| "an empty source".into()),
        _ => "this source".into(),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the kubelet is shutting down".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(
            json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"a": "b"}}, "spec": spec}),
        )
        .expect("a pod")
    }

    fn is_root() -> bool {
        nix::unistd::geteuid().is_root()
    }

    #[tokio::test]
    async fn volumes_come_are_refreshed_and_go() {
        if !is_root() {
            return;
        }
        let root = tempfile::tempdir().expect("a directory");
        let pod_dir = root.path().join("pods/u");
        let host = root.path().join("host");
        fs::create_dir_all(&host).expect("a directory");
        fs::write(host.join("precious"), "x").expect("a file");
        let mut pod = pod(json!({
            "containers": [{"name": "c", "volumeMounts": [
                {"name": "scratch", "mountPath": "/scratch"},
                {"name": "host", "mountPath": "host", "subPathExpr": "$(DIR)", "readOnly": true},
                {"name": "info", "mountPath": "/info", "mountPropagation": "HostToContainer"}]}],
            "volumes": [
                {"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                {"name": "disk", "emptyDir": {}},
                {"name": "host", "hostPath": {"path": host}},
                {"name": "info", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}}],
        }));
        let volumes = Volumes::new(None, "n1");
        let sources = volumes.mount_pod(&pod, &pod_dir).await.expect("mounted");
        assert_eq!(sources["disk"].path, pod_dir.join("volumes/kubernetes.io~empty-dir/disk"));
        let labels = sources["info"].path.join("labels");
        assert_eq!(fs::read_to_string(&labels).expect("a file"), "a=\"b\"");
        pod.metadata.labels.get_or_insert_default().insert("a".into(), "c".into());
        volumes.mount_pod(&pod, &pod_dir).await.expect("refreshed");
        assert_eq!(fs::read_to_string(&labels).expect("a file"), "a=\"c\"");

        let container = &pod.spec.as_ref().expect("spec").containers[0];
        let envs = [("DIR".to_owned(), "made".to_owned())];
        let mounts = volumes.container_mounts(&pod, container, &envs, &sources, &pod_dir).await.expect("mounts");
        assert_eq!(mounts[1].container_path, "/host");
        assert_eq!(mounts[1].host_path, pod_dir.join("volume-subpaths/host/c/1").to_string_lossy());
        assert!(mounts[1].readonly && mounts[2].readonly && !mounts[0].readonly);
        assert_eq!(mounts[2].propagation, pb::MountPropagation::PropagationHostToContainer as i32);
        let unknown = volumes.container_mounts(&pod, container, &[], &sources, &pod_dir).await;
        assert_eq!(unknown.expect_err("no DIR").to_string(), "missing value for \"DIR\"");

        // By another kubelet, which knows nothing: a restart.
        let restarted = Volumes::new(None, "n1");
        restarted.unmount_pod("u", &pod_dir).await.expect("gone");
        restarted.unmount_pod("u", &pod_dir).await.expect("twice is fine");
        assert!(!pod_dir.join("volumes").exists() && !pod_dir.join("volume-subpaths").exists());
        assert!(host.join("precious").exists() && host.join("made").is_dir());
        let left = mounts::mount_points().expect("the table");
        assert!(!left.iter().any(|path| path.starts_with(root.path())), "{left:?}");
    }

    #[test]
    fn sub_paths_are_expanded_and_checked() {
        let mount = |sub_path: &str, expression: &str| VolumeMount {
            sub_path: Some(sub_path.into()),
            sub_path_expr: Some(expression.into()),
            ..Default::default()
        };
        let envs = [
            ("NAME".to_owned(), "p".to_owned()),
            ("ROOT".to_owned(), "/tmp".to_owned()),
            ("NO".to_owned(), "".to_owned()),
        ];
        let cases = [
            (mount("", ""), Ok("")),
            (mount("a/b", ""), Ok("a/b")),
            (mount("$(NAME)", ""), Ok("$(NAME)")),
            (mount("", "logs/$(NAME)"), Ok("logs/p")),
            (mount("", "$(NONE)"), Err("missing value for \"NONE\"")),
            (mount("", "$(NO)"), Err("subPathExpr \"$(NO)\" is empty")),
            (mount("", "$(ROOT)"), Err("error SubPath `/tmp` must not be an absolute path")),
            (mount("a/../b", ""), Err("unable to provision SubPath `a/../b`: must not contain '..'")),
        ];
        for (mount, want) in cases {
            let got = sub_path_of(&mount, &envs).map_err(|error| error.to_string());
            assert_eq!(got.as_deref().map_err(String::as_str), want);
        }
    }

    #[tokio::test]
    async fn what_is_not_supported_is_said() {
        let root = tempfile::tempdir().expect("a directory");
        let volumes = Volumes::new(None, "n1");
        let cases = [
            (
                json!({"name": "v", "persistentVolumeClaim": {"claimName": "c"}}),
                "MountVolume.SetUp failed for volume \"v\" : no volume plugin matched: persistentVolumeClaim is not supported yet",
            ),
            (
                json!({"name": "v", "configMap": {"name": "c"}}),
                "MountVolume.SetUp failed for volume \"v\" : couldn't get configMap ns/c, no kubeClient defined",
            ),
            (
                json!({"name": "..", "emptyDir": {}}),
                "MountVolume.SetUp failed for volume \"..\" : invalid volume name \"..\"",
            ),
            (
                json!({"name": "v", "emptyDir": {"medium": "HugePages"}}),
                "MountVolume.SetUp failed for volume \"v\" : medium \"HugePages\" of emptyDir is not supported yet",
            ),
        ];
        for (volume, want) in cases {
            let pod = pod(json!({"containers": [], "volumes": [volume]}));
            let error = volumes.mount_pod(&pod, root.path()).await.expect_err("refused");
            assert_eq!(error.to_string(), want);
        }
    }
}
