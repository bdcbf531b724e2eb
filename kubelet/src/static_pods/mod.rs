//! Pods from manifests on disk, and their mirrors in the API.

mod manifest;
mod mirror;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use mirror::Mirrors;

/// Annotations that say where a pod comes from and what it mirrors.
pub const CONFIG_SOURCE: &str = "kubernetes.io/config.source";
pub const CONFIG_HASH: &str = "kubernetes.io/config.hash";
pub const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";
pub const CONFIG_SEEN: &str = "kubernetes.io/config.seen";

/// A look at the directory is cheap (one `stat` a file), so it is taken at least this often, whatever the period.
const MAX_PERIOD: Duration = Duration::from_secs(1);
/// Manifests that are read at most; what comes after, in the order of names, is left out with a warning.
const MAX_FILES: usize = 512;
/// As the kubelet's `maxConfigLength`.
const MAX_BYTES: u64 = 10 << 20;

/// Whether a pod comes from a manifest on this node.
pub fn is_static(pod: &Pod) -> bool {
    let source = pod.metadata.annotations.as_ref().and_then(|a| a.get(CONFIG_SOURCE));
    source.is_some_and(|s| s != "api")
}

/// Whether an API pod mirrors a static pod.
pub fn is_mirror(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(CONFIG_MIRROR))
}

/// Watches a manifest directory or file: the receiver always holds the whole set (defaulted, named `<name>-<node>`, UID =
/// hash, bound to this node). A file that cannot be read keeps its last good pod. The first set is complete when this returns.
pub fn watch(
    path: PathBuf,
    node_name: &str,
    period: Duration,
    shutdown: CancellationToken,
) -> watch::Receiver<Arc<Vec<Pod>>> {
    let mut source = Source { path, node_name: node_name.to_owned(), files: HashMap::new() };
    source.look();
    let (sender, receiver) = watch::channel(Arc::new(source.pods()));
    let period = period.min(MAX_PERIOD).max(Duration::from_millis(100));
    tokio::spawn(async move {
        loop {
            if tokio::time::timeout(period, shutdown.cancelled()).await.is_ok() {
                return;
            }
            let looked = tokio::task::spawn_blocking(move || {
                let changed = source.look();
                (source, changed)
            });
            let Ok((back, changed)) = looked.await else { return };
            source = back;
            if changed && sender.send(Arc::new(source.pods())).is_err() {
                return;
            }
        }
    });
    receiver
}

/// What tells a changed file from an unchanged one.
type Signature = (SystemTime, u64, u64);

struct Source {
    path: PathBuf,
    node_name: String,
    files: HashMap<PathBuf, ManifestFile>,
}

struct ManifestFile {
    signature: Signature,
    /// The last good reading.
    pod: Option<Pod>,
}

// === impl Source ===

impl Source {
    /// Read what has changed. Returns whether the set of pods may be another one.
    fn look(&mut self) -> bool {
        let present = match manifests(&self.path) {
            Ok(present) => present,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "manifests cannot be listed; the last known ones stay");
                return false;
            }
        };
        let before = self.files.len();
        self.files.retain(|path, _| present.iter().any(|(known, _)| known == path));
        let mut changed = self.files.len() != before;
        for (path, signature) in present {
            if self.files.get(&path).is_some_and(|file| file.signature == signature) {
                continue;
            }
            let last = self.files.remove(&path).and_then(|file| file.pod);
            let pod = match read(&path, &self.node_name) {
                Ok(mut pod) => {
                    keep_seen(&mut pod, last.as_ref());
                    changed = true;
                    Some(pod)
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), error, "manifest is not a pod; its last good reading stays");
                    last
                }
            };
            self.files.insert(path, ManifestFile { signature, pod });
        }
        changed
    }

    /// The pods, in the order of their files; of two with one name the first counts.
    fn pods(&self) -> Vec<Pod> {
        let mut files: Vec<(&PathBuf, &Pod)> =
            self.files.iter().filter_map(|(path, file)| Some((path, file.pod.as_ref()?))).collect();
        files.sort_by_key(|(path, _)| *path);
        let mut names = std::collections::HashSet::new();
        let mut pods = Vec::new();
        for (path, pod) in files {
            if names.insert((pod.metadata.namespace.clone(), pod.metadata.name.clone())) {
                pods.push(pod.clone());
            } else {
                tracing::error!(path = %path.display(), pod = pod.metadata.name, "another manifest has a pod of this name");
            }
        }
        pods
    }
}

/// The time at which a pod was first seen does not change when its file is only written again.
fn keep_seen(pod: &mut Pod, last: Option<&Pod>) {
    let Some(last) = last.filter(|last| last.metadata.uid == pod.metadata.uid) else { return };
    if let Some(seen) = last.metadata.annotations.as_ref().and_then(|annotations| annotations.get(CONFIG_SEEN)) {
        pod.metadata.annotations.get_or_insert_default().insert(CONFIG_SEEN.to_owned(), seen.clone());
    }
}

/// The manifest files: those of a directory that do not begin with a dot, or the one file. A path that is not there has none.
fn manifests(path: &Path) -> std::io::Result<Vec<(PathBuf, Signature)>> {
    use std::os::unix::fs::MetadataExt;
    let signature =
        |meta: &std::fs::Metadata| (meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len(), meta.ino());
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    if meta.is_file() {
        return Ok(vec![(path.to_owned(), signature(&meta))]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        // Followed: manifests are often links.
        if let Ok(meta) = std::fs::metadata(entry.path())
            && meta.is_file()
        {
            found.push((entry.path(), signature(&meta)));
        }
    }
    found.sort();
    if found.len() > MAX_FILES {
        tracing::warn!(path = %path.display(), files = found.len(), limit = MAX_FILES, "too many manifests: the rest is left out");
        found.truncate(MAX_FILES);
    }
    Ok(found)
}

fn read(path: &Path, node_name: &str) -> Result<Pod, String> {
    let size = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
    if size > MAX_BYTES {
        return Err(format!("{size} bytes are more than {MAX_BYTES}"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    manifest::pod(&text, &path.to_string_lossy(), node_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(name: &str, image: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{containers: [{{name: c, image: '{image}'}}]}}\n"
        )
    }

    fn names(pods: &[Pod]) -> Vec<String> {
        pods.iter().filter_map(|pod| pod.metadata.name.clone()).collect()
    }

    #[tokio::test]
    async fn the_set_follows_the_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = |name: &str| dir.path().join(name);
        std::fs::write(file("a.yaml"), manifest("a", "i:1")).expect("written");
        std::fs::write(file(".hidden.yaml"), manifest("hidden", "i:1")).expect("written");
        let shutdown = CancellationToken::new();
        let mut pods = watch(dir.path().to_owned(), "N1", Duration::from_millis(100), shutdown.clone());
        assert_eq!(names(&pods.borrow_and_update()), ["a-n1"]);
        let changed = async |pods: &mut watch::Receiver<Arc<Vec<Pod>>>| {
            tokio::time::timeout(Duration::from_secs(10), pods.changed()).await.expect("in time").expect("open");
            pods.borrow_and_update().clone()
        };
        let first = pods.borrow()[0].clone();

        std::fs::write(file("b.yaml"), manifest("b", "i:1")).expect("written");
        assert_eq!(names(&changed(&mut pods).await), ["a-n1", "b-n1"]);

        // Another image is another pod; nonsense keeps the last good one.
        std::fs::write(file("a.yaml"), manifest("a", "image:22")).expect("written");
        let now = changed(&mut pods).await;
        assert_ne!(now[0].metadata.uid, first.metadata.uid);
        std::fs::write(file("a.yaml"), "kind: [").expect("written");
        std::fs::remove_file(file("b.yaml")).expect("removed");
        let now = changed(&mut pods).await;
        assert_eq!(names(&now), ["a-n1"]);

        std::fs::remove_file(file("a.yaml")).expect("removed");
        assert!(changed(&mut pods).await.is_empty());
        shutdown.cancel();
    }

    #[test]
    fn a_missing_directory_has_no_manifests() {
        assert!(manifests(Path::new("/nonexistent/manifests")).expect("no error").is_empty());
    }
}
