//! A pod's volumes: prepared under the pod's directory, refreshed while it runs, taken away after it.
//!
//! Nothing about them is remembered in memory: what is set up is read from the disk and the kernel's mount table, so a
//! restarted kubelet goes on where the last one stopped. Paths are Kubernetes': `<pod>/volumes/kubernetes.io~<plugin>/<name>`,
//! `<pod>/volume-subpaths/<volume>/<container>/<index>`, `<pod>/plugins/kubernetes.io~<plugin>/<name>`.

mod atomic_writer;
mod host;
mod iscsi;
mod local;
mod measured;
mod mounts;
mod payload;
mod persistent;
mod pod_certificates;
mod sub_path;
mod tokens;
mod trust_bundles;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use component_base::events::Type;
use k8s_openapi::api::core::v1::{Container, Pod, Volume, VolumeMount};
use proto::cri as pb;

use crate::csi::{self, Csi};
use crate::env::{Found, NodeFacts, expansion};
use crate::events::Events;
use crate::images::Puller;
use crate::metrics::metrics;
use crate::objects::Objects;
use crate::runtime::selinux;
use crate::usage::Measured;
use payload::{Answer, Answers, ApiVolume, Material, Payload, Tokens};
pub(crate) use pod_certificates::PodCertificates;
use trust_bundles::TrustBundles;

/// Where a prepared volume is on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountSource {
    pub path: PathBuf,
    /// The volume itself forbids writing (configMap, secret, projected, …).
    pub read_only: bool,
    /// A block device, for `volumeDevices`; not a directory.
    pub device: bool,
    /// An image that the runtime mounts, instead of a path.
    pub image: Option<String>,
    /// Whose files are this pod's: on a host with SELinux the runtime labels them.
    pub is_own: bool,
}

/// Why volumes cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("{step} failed for volume \"{volume}\" : {reason}")]
    Setup { step: &'static str, volume: String, reason: String },
    /// Claims that cannot be used yet, by the pod's names for them. As the words of `WaitForAttachAndMount`.
    #[error(
        "Unable to attach or mount volumes: unmounted volumes=[{}], unattached volumes=[], failed to process volumes=[{}]: {reasons}",
        unmounted.join(" "), unprocessed.join(" ")
    )]
    Unprocessed { unmounted: Vec<String>, unprocessed: Vec<String>, reasons: String },
    /// A volume that could not be taken away; it is tried again.
    #[error("{0}")]
    TearDown(String),
    /// A subPath or mount that the container may not have: CreateContainerConfigError.
    #[error("{0}")]
    Mount(String),
}

impl VolumeError {
    /// The reason of the event that tells of it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Setup { step, .. } if step.starts_with("MapVolume") => "FailedMapVolume",
            _ => "FailedMount",
        }
    }
}

/// The volumes of all pods on this node. Without a client (standalone) API-backed volumes are errors.
pub struct Volumes {
    objects: Objects,
    tokens: tokens::TokenManager,
    /// None where the feature is off.
    trust_bundles: Option<TrustBundles>,
    certificates: Option<PodCertificates>,
    node_name: String,
    allocatable: arc_swap::ArcSwap<BTreeMap<String, apimachinery::quantity::Quantity>>,
    csi: Option<Arc<Csi>>,
    images: Option<Arc<Puller>>,
    /// The runtime can mount images.
    image_volumes: bool,
    /// The runtime's default handler can make whole trees of mounts read-only.
    recursive_read_only: bool,
    /// Of each pod: volumes that must not be detached from this node.
    in_use: parking_lot::Mutex<BTreeMap<String, BTreeSet<String>>>,
    /// Where to tell what has become of volumes.
    events: Option<Arc<Events>>,
    /// What claims were found to be, by pod and volume: they stay usable while the API is away.
    claimed: parking_lot::Mutex<BTreeMap<(String, String), MountSource>>,
    /// How full volumes are that their drivers measure, by where they are.
    by_drivers: parking_lot::Mutex<BTreeMap<PathBuf, Measured>>,
}

// === impl Volumes ===

impl Volumes {
    pub fn new(objects: impl Into<Objects>, node_name: &str) -> Self {
        Self {
            objects: objects.into(),
            tokens: tokens::TokenManager::default(),
            trust_bundles: None,
            certificates: None,
            node_name: node_name.to_owned(),
            allocatable: arc_swap::ArcSwap::default(),
            csi: None,
            images: None,
            image_volumes: false,
            recursive_read_only: false,
            in_use: parking_lot::Mutex::default(),
            events: None,
            claimed: parking_lot::Mutex::default(),
            by_drivers: parking_lot::Mutex::default(),
        }
    }

    /// With CSI drivers, with images as volumes, and with what the runtime can do.
    pub fn with(mut self, csi: Arc<Csi>, images: Arc<Puller>, image_volumes: bool, recursive_read_only: bool) -> Self {
        (self.csi, self.images) = (Some(csi), Some(images));
        (self.image_volumes, self.recursive_read_only) = (image_volumes, recursive_read_only);
        self
    }

    pub fn telling(mut self, events: Arc<Events>) -> Self {
        self.events = Some(events);
        self
    }

    /// With trust bundles of the cluster, and with certificates for pods, where these features are on.
    pub(crate) fn with_trust(mut self, bundles: bool, certificates: Option<PodCertificates>) -> Self {
        self.trust_bundles = self.objects.client().filter(|_| bundles).cloned().map(TrustBundles::new);
        self.certificates = certificates;
        self
    }

    /// The names under which a node's status lists the volumes that pods here have or wait for.
    pub fn in_use(&self) -> Vec<String> {
        self.in_use.lock().values().flatten().collect::<BTreeSet<_>>().into_iter().cloned().collect()
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
        let (mut unmounted, mut unprocessed, mut reasons) = (Vec::new(), Vec::new(), Vec::new());
        let wanted = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        let mounting = wanted.map(|volume| Box::pin(async move { (volume, self.mount(pod, volume, pod_dir).await) }));
        for (volume, mounted) in futures::future::join_all(mounting).await {
            match mounted {
                Ok(source) => {
                    sources.insert(volume.name.clone(), source);
                }
                Err(csi::Failed { step: csi::Failed::FINDING, reason, .. }) => {
                    unmounted.push(volume.name.clone());
                    unprocessed.push(volume.name.clone());
                    reasons.push(reason);
                }
                Err(csi::Failed { step, volume: own, reason }) => {
                    unmounted.push(volume.name.clone());
                    // A claim's volume goes by its own name: the pod's is nothing to who looks after volumes.
                    let volume = own.unwrap_or_else(|| volume.name.clone());
                    failed.get_or_insert(VolumeError::Setup { step, volume, reason });
                }
            }
        }
        if !unprocessed.is_empty() {
            unmounted.sort();
            unprocessed.sort();
            return Err(VolumeError::Unprocessed { unmounted, unprocessed, reasons: reasons.join("; ") });
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(sources),
        }
    }

    async fn mount(&self, pod: &Pod, volume: &Volume, pod_dir: &Path) -> Result<MountSource, csi::Failed> {
        if !is_path_segment(&volume.name) {
            return Err(format!("invalid volume name {:?}", volume.name).into());
        }
        if let Some(source) = volume.host_path.clone() {
            let path = PathBuf::from(&source.path);
            if !path.is_absolute() || path.components().any(|part| part == std::path::Component::ParentDir) {
                return Err(format!("hostPath {:?} must be an absolute path without \"..\"", source.path).into());
            }
            blocking(move || local::host_path(&source)).await?;
            return Ok(MountSource { path, ..Default::default() });
        }
        if let Some(source) = volume.empty_dir.clone() {
            let path = volume_dir(pod_dir, "kubernetes.io~empty-dir", &volume.name);
            let ready = pod_dir.join("plugins/kubernetes.io~empty-dir").join(&volume.name).join("ready");
            // A new directory of our own, or a mount in memory: nothing to wait for.
            local::empty_dir(&path, &source, &ready, pod).map_err(|error| error.to_string())?;
            return Ok(MountSource { path, is_own: true, ..Default::default() });
        }
        if let Some(api_volume) = payload::sources_of(volume) {
            let path = volume_dir(pod_dir, api_volume.plugin, &volume.name);
            let group = payload::fs_group(pod);
            match self.payload(pod, &volume.name, &api_volume).await {
                Ok(payload) => {
                    write_files(&path, api_volume.in_memory, &payload, group).map_err(|error| error.to_string())?;
                }
                // Once set up, a volume stays as it is when it cannot be refreshed: its objects were deleted, or the control
                // plane is gone. Running pods go on with what they have.
                Err(reason) if path.join("..data").exists() => {
                    tracing::warn!(pod = pod.metadata.name, volume = volume.name, reason, "volume not refreshed");
                }
                Err(reason) => return Err(reason.into()),
            }
            return Ok(MountSource { path, read_only: true, is_own: true, ..Default::default() });
        }
        if let Some(source) = &volume.nfs {
            let path = volume_dir(pod_dir, "kubernetes.io~nfs", &volume.name);
            Box::pin(persistent::mount_nfs(&source.server, &source.path, &[], &path)).await?;
            return Ok(MountSource { path, read_only: source.read_only == Some(true), ..Default::default() });
        }
        if let Some(source) = &volume.iscsi {
            let path = volume_dir(pod_dir, "kubernetes.io~iscsi", &volume.name);
            let target = iscsi::Target::of(source)?;
            let secret = self.session_secret(pod, &target).await?;
            Box::pin(iscsi::mount(&target, &secret, &[], pod_dir, (&volume.name, &path))).await?;
            return Ok(MountSource {
                path,
                read_only: target.read_only,
                is_own: !target.read_only,
                ..Default::default()
            });
        }
        if let Some(source) = &volume.image {
            let images = self.images.as_ref().filter(|_| self.image_volumes);
            let images = images.ok_or("the container runtime cannot mount images as volumes")?;
            let reference = source.reference.as_deref().unwrap_or_default();
            metrics().image_volumes.inc();
            let found = Box::pin(images.ensure(pod, reference, source.pull_policy.as_deref())).await;
            if found.is_ok() { &metrics().image_volumes_mounted } else { &metrics().image_volumes_failed }.inc();
            let found = found.map_err(|e| e.message)?;
            return Ok(MountSource { image: Some(found.id), read_only: true, ..Default::default() });
        }
        if let Some(source) = &volume.csi {
            return Box::pin(self.mount_inline(pod, &volume.name, source, pod_dir)).await;
        }
        if let Some((claim, read_only)) = persistent::claim_of(pod, volume) {
            let key = (pod.metadata.uid.clone().unwrap_or_default(), volume.name.clone());
            let mounted = Box::pin(self.mount_claim(pod, volume, &claim, read_only, pod_dir)).await;
            return match mounted {
                Ok(source) => {
                    self.claimed.lock().insert(key, source.clone());
                    Ok(source)
                }
                Err(failed) => match self.claimed.lock().get(&key) {
                    // It was made present before: running pods go on with it.
                    Some(source) => {
                        let reason = failed.reason;
                        tracing::debug!(pod = pod.metadata.name, volume = volume.name, reason, "claim not looked at");
                        Ok(source.clone())
                    }
                    None => Err(failed),
                },
            };
        }
        Err(format!("no volume plugin matched: {} is not supported", unsupported_kind(volume)).into())
    }

    /// Makes the volume of a claim present.
    async fn mount_claim(
        &self,
        pod: &Pod,
        volume: &Volume,
        claim: &str,
        read_only: bool,
        pod_dir: &Path,
    ) -> Result<MountSource, csi::Failed> {
        let client = self.objects.client().ok_or("claims need an API server; the kubelet is standalone")?;
        let claimed = persistent::resolve(client, pod, volume, claim, read_only).await;
        let claimed = claimed.map_err(|reason| csi::Failed { step: csi::Failed::FINDING, volume: None, reason })?;
        let mounted = self.mount_claimed(pod, &claimed, client, pod_dir).await;
        mounted.map_err(|failed| csi::Failed { volume: Some(claimed.name().to_owned()), ..failed })
    }

    /// As [`Volumes::mount_claim`], once it is known which volume the claim is bound to.
    async fn mount_claimed(
        &self,
        pod: &Pod,
        claimed: &persistent::Claimed,
        client: &kube::Client,
        pod_dir: &Path,
    ) -> Result<MountSource, csi::Failed> {
        let read_only = claimed.read_only;
        let source = |path: PathBuf, device| MountSource { path, read_only, device, ..Default::default() };
        let own = |path: PathBuf| MountSource { is_own: !read_only, ..source(path, false) };
        let spec = claimed.volume.spec.clone().unwrap_or_default();
        let options = spec.mount_options.clone().unwrap_or_default();
        let target = |plugin: &str| volume_dir(pod_dir, plugin, claimed.name());
        if let Some(wanted) = claimed.as_csi(pod) {
            let mounted = self.mount_csi(pod, wanted.clone(), pod_dir).await?;
            if mounted.grown == csi::Grown::Here
                && let Some(events) = &self.events
            {
                let name = claimed.name();
                let message =
                    format!("MountVolume.NodeExpandVolume succeeded for volume \"{name}\" {}", self.node_name);
                events.pod(pod, None, Type::Normal, "FileSystemResizeSuccessful", message.as_str());
                events.about(&claimed.reference(), Type::Normal, "FileSystemResizeSuccessful", message);
            }
            if mounted.grown != csi::Grown::No {
                claimed.report_expanded(client).await?;
            }
            let is_own = !wanted.block && !wanted.read_only && !mounted.is_labelled;
            return Ok(MountSource { is_own, ..source(mounted.path, wanted.block) });
        }
        if let Some(found) = spec.host_path {
            let path = PathBuf::from(&found.path);
            blocking(move || local::host_path(&found)).await?;
            return Ok(source(path, false));
        }
        if let Some(found) = &spec.local {
            let path = PathBuf::from(&found.path);
            if claimed.is_block() {
                return Ok(source(path, true));
            }
            let at = target("kubernetes.io~local-volume");
            let group = local::GroupOwnership::of(pod);
            persistent::mount_local(&path, found.fs_type.as_deref(), &options, &at, group).await?;
            return Ok(own(at));
        }
        if let Some(found) = &spec.nfs {
            let at = target("kubernetes.io~nfs");
            persistent::mount_nfs(&found.server, &found.path, &options, &at).await?;
            return Ok(MountSource { read_only: read_only || found.read_only == Some(true), ..source(at, false) });
        }
        if let Some(found) = &spec.iscsi {
            let target = iscsi::Target::of(found)?;
            let secret = self.session_secret(pod, &target).await?;
            let read_only = read_only || target.read_only;
            if claimed.is_block() {
                let path = iscsi::attach(&target, &secret, pod_dir, claimed.name()).await?;
                return Ok(MountSource { read_only, ..source(path, true) });
            }
            let at = self::volume_dir(pod_dir, "kubernetes.io~iscsi", claimed.name());
            iscsi::mount(&target, &secret, &options, pod_dir, (claimed.name(), &at)).await?;
            if let Some(group) = local::GroupOwnership::of(pod).filter(|_| !read_only) {
                let volume = at.clone();
                blocking(move || local::give_to_group(&volume, group)).await?;
            }
            return Ok(MountSource { read_only, is_own: !read_only, ..source(at, false) });
        }
        Err(format!("no volume plugin matched name of PV {}", claimed.name()).into())
    }

    /// What opens an iSCSI target.
    async fn session_secret(&self, pod: &Pod, target: &iscsi::Target) -> Result<BTreeMap<String, String>, String> {
        let Some(reference) = &target.secret_ref else { return Ok(BTreeMap::new()) };
        let own = pod.metadata.namespace.as_deref().unwrap_or_default();
        let namespace = reference.namespace.as_deref().unwrap_or(own);
        let found = self.objects.secret(namespace, &reference.name).await.map_err(|error| error.to_string())?;
        let found = found.ok_or_else(|| format!("secret {namespace}/{} does not exist", reference.name))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(found.data.iter().flatten().map(|(key, value)| (key.clone(), text(&value.0))).collect())
    }

    /// A volume that a driver makes for this pod alone.
    async fn mount_inline(
        &self,
        pod: &Pod,
        name: &str,
        source: &k8s_openapi::api::core::v1::CSIVolumeSource,
        pod_dir: &Path,
    ) -> Result<MountSource, csi::Failed> {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let secret = source.node_publish_secret_ref.as_ref().map(|r| (namespace, r.name.clone()));
        let wanted = csi::Wanted {
            name: name.to_owned(),
            driver: source.driver.clone(),
            handle: csi::inline_handle(pod.metadata.uid.as_deref().unwrap_or_default(), name),
            fs_type: source.fs_type.clone().unwrap_or_default(),
            read_only: source.read_only == Some(true),
            inline: true,
            attributes: source.volume_attributes.clone().unwrap_or_default(),
            publish_secret: secret,
            fs_group: payload::fs_group(pod),
            ..Default::default()
        };
        let read_only = wanted.read_only;
        let mounted = self.mount_csi(pod, wanted, pod_dir).await?;
        Ok(MountSource { path: mounted.path, read_only, is_own: !read_only, ..Default::default() })
    }

    async fn mount_csi(&self, pod: &Pod, mut wanted: csi::Wanted, pod_dir: &Path) -> Result<csi::Mounted, csi::Failed> {
        let csi = self.csi.as_ref().ok_or("there are no CSI drivers here")?;
        if !wanted.inline {
            let uid = pod.metadata.uid.clone().unwrap_or_default();
            let name = format!("kubernetes.io/csi/{}^{}", wanted.driver, wanted.handle);
            self.in_use.lock().entry(uid).or_default().insert(name);
        }
        wanted.tokens = self.tokens_for(pod, &wanted.driver, csi).await?;
        let mounted = csi.mount(pod, &wanted, pod_dir).await?;
        if mounted.give_to_group
            && let Some(group) = local::GroupOwnership::of(pod)
        {
            let path = mounted.path.clone();
            let given = blocking(move || local::give_to_group(&path, group)).await;
            given.inspect_err(|_| csi.not_done(&mounted))?;
        }
        Ok(mounted)
    }

    /// The tokens of the pod's account that a driver wants to see.
    async fn tokens_for(&self, pod: &Pod, driver: &str, csi: &Csi) -> Result<Option<String>, String> {
        const DEFAULT_SECONDS: i64 = 3600;
        let wanted = csi.described(driver).await?.token_requests.unwrap_or_default();
        let (false, Some(client)) = (wanted.is_empty(), self.objects.client()) else { return Ok(None) };
        let mut found = serde_json::Map::new();
        for request in wanted {
            let seconds = request.expiration_seconds.unwrap_or(DEFAULT_SECONDS);
            let (token, expires) = self.tokens.token(client, pod, &request.audience, seconds).await?;
            let value =
                serde_json::json!({"token": token, "expirationTimestamp": apimachinery::time::rfc3339(expires)});
            found.insert(request.audience, value);
        }
        Ok(Some(serde_json::Value::Object(found).to_string()))
    }

    /// Fetch what an API volume needs and put its files together.
    async fn payload(&self, pod: &Pod, name: &str, volume: &ApiVolume) -> Result<Payload, String> {
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
            let (token, _) = Box::pin(self.tokens.token(client, pod, &audience, seconds)).await?;
            tokens.insert((audience, seconds), token);
        }
        let mut facts = NodeFacts::of(pod, (**self.allocatable.load()).clone());
        if facts.node_name.is_empty() {
            facts.node_name.clone_from(&self.node_name);
        }
        let answers = Box::pin(self.answers(pod, name, volume)).await;
        payload::payload(volume, pod, &Material { found, tokens, answers, facts })
    }

    /// Asks for trust anchors and certificates.
    async fn answers(&self, pod: &Pod, name: &str, volume: &ApiVolume) -> Answers {
        let mut answers = Answers::new();
        for (place, source) in volume.sources.iter().enumerate() {
            let answer = match (&source.cluster_trust_bundle, &source.pod_certificate) {
                (Some(source), _) => match &self.trust_bundles {
                    Some(bundles) => bundles.anchors(source).await.map(Answer::Anchors),
                    None => Err("ClusterTrustBundle projection is not supported in static kubelet mode".to_owned()),
                },
                (None, Some(source)) => match &self.certificates {
                    Some(all) => all.credentials(pod, name, place, source).await.map(Answer::Credentials),
                    None => Err("unimplemented".to_owned()),
                },
                (None, None) => continue,
            };
            answers.insert(place, answer);
        }
        answers
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
            if source.device {
                let message = "volume {} has volumeMode Block, but is specified in volumeMounts";
                return Err(VolumeError::Mount(message.replace("{}", &mount.name)));
            }
            let host_path = if source.image.is_some() {
                PathBuf::new()
            } else if sub_path.is_empty() {
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
                selinux_relabel: selinux::is_enabled() && source.is_own && mounts::takes_labels(&source.path),
                recursive_read_only: read_only && self.recursively(mount)?,
                image_sub_path: source.image.as_ref().map(|_| sub_path).unwrap_or_default(),
                image: source.image.clone().map(|image| pb::ImageSpec { image, ..Default::default() }),
                ..Default::default()
            });
        }
        Ok(made)
    }

    /// Whether what is mounted below a read-only mount is read-only, too. As `resolveRecursiveReadOnly`.
    fn recursively(&self, mount: &VolumeMount) -> Result<bool, VolumeError> {
        match (mount.recursive_read_only.as_deref(), self.recursive_read_only) {
            (Some("Enabled"), false) => Err(VolumeError::Mount(format!(
                "failed to resolve recursive read-only mode: volume {:?} requested recursive read-only mode, but it is not supported by the runtime",
                mount.name
            ))),
            (Some("Enabled" | "IfPossible"), supported) => Ok(supported),
            _ => Ok(false),
        }
    }

    /// The CRI devices of one container's volumeDevices.
    pub fn container_devices(
        container: &Container,
        sources: &BTreeMap<String, MountSource>,
    ) -> Result<Vec<pb::Device>, VolumeError> {
        let device = |wanted: &k8s_openapi::api::core::v1::VolumeDevice| {
            let source = sources.get(&wanted.name).filter(|source| source.device).ok_or_else(|| {
                let name = &wanted.name;
                VolumeError::Mount(format!(
                    "volume {name} has volumeMode Filesystem, but is specified in volumeDevices"
                ))
            })?;
            // A file that a driver published may be a link to the device.
            let host_path = fs::canonicalize(&source.path).unwrap_or_else(|_| source.path.clone());
            Ok(pb::Device {
                container_path: wanted.device_path.clone(),
                host_path: host_path.to_string_lossy().into_owned(),
                permissions: if source.read_only { "r" } else { "mrw" }.to_owned(),
            })
        };
        container.volume_devices.iter().flatten().map(device).collect()
    }

    /// Unmounts and removes all volumes below `pod_dir`. Idempotent; called once no container runs any more, and for
    /// directories of pods that are long gone.
    pub async fn unmount_pod(&self, uid: &str, pod_dir: &Path) -> Result<(), VolumeError> {
        self.tokens.forget_pod(uid);
        if let Some(certificates) = &self.certificates {
            certificates.forget_pod(uid);
        }
        self.claimed.lock().retain(|(pod, _), _| pod != uid);
        let pod_dir = pod_dir.to_path_buf();
        let subpaths = pod_dir.join("volume-subpaths");
        if subpaths.exists() {
            blocking(move || sub_path::remove_all(&subpaths)).await.map_err(VolumeError::TearDown)?;
        }
        if let Some(csi) = &self.csi {
            Box::pin(csi.unmount_pod(uid, &pod_dir)).await.map_err(VolumeError::TearDown)?;
        }
        let volumes = pod_dir.join("volumes");
        if volumes.exists() {
            blocking(move || mounts::unmount_below(&volumes)).await.map_err(VolumeError::TearDown)?;
        }
        iscsi::end_sessions(&pod_dir).await.map_err(VolumeError::TearDown)?;
        blocking(move || remove_volumes(&pod_dir)).await.map_err(VolumeError::TearDown)?;
        self.in_use.lock().remove(uid);
        Ok(())
    }
}

/// Reads a file of a volume, which its pod may have made, links included: nothing outside of the volume is opened. None: there
/// is no such file.
pub async fn read_file(volume: &Path, relative: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let (volume, relative) = (volume.to_owned(), relative.to_owned());
    let read = move || sub_path::read(&volume, &relative, limit);
    tokio::task::spawn_blocking(read).await.unwrap_or_else(|error| Err(io::Error::other(error)))
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
    let fresh = if in_memory && !mounts::has_own_file_system(volume)? {
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

/// Only after every mount has gone, checked against the kernel's table: so nothing that is merely mounted here (a hostPath behind
/// a subPath, a network volume) can be deleted.
fn remove_volumes(pod_dir: &Path) -> io::Result<()> {
    for directory in ["volumes", "volumeDevices", "plugins"] {
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

    #[test]
    fn claims_that_cannot_be_used_are_told_together() {
        let error = VolumeError::Unprocessed {
            unmounted: vec!["data".into(), "logs".into()],
            unprocessed: vec!["data".into()],
            reasons: "error processing PVC ns/c: PVC is not bound".into(),
        };
        let told = "Unable to attach or mount volumes: unmounted volumes=[data logs], unattached volumes=[], failed to process volumes=[data]: error processing PVC ns/c: PVC is not bound";
        assert_eq!((error.reason(), error.to_string().as_str()), ("FailedMount", told));
    }

    #[tokio::test]
    async fn what_is_not_supported_is_said() {
        let root = tempfile::tempdir().expect("a directory");
        let volumes = Volumes::new(None, "n1");
        let cases = [
            (
                json!({"name": "v", "flocker": {"datasetName": "c"}}),
                "MountVolume.SetUp failed for volume \"v\" : no volume plugin matched: flocker is not supported",
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
                "MountVolume.SetUp failed for volume \"v\" : medium \"HugePages\" can only be used if container uses exactly one page size",
            ),
        ];
        for (volume, want) in cases {
            let pod = pod(json!({"containers": [], "volumes": [volume]}));
            let error = volumes.mount_pod(&pod, root.path()).await.expect_err("refused");
            assert_eq!(error.to_string(), want);
        }
    }
}
