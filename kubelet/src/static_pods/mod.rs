//! Pods from manifests, on disk or at a URL, and their mirrors in the API.

mod manifest;
mod mirror;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http_body_util::{BodyExt as _, Limited};
use k8s_openapi::api::core::v1::Pod;
use kube::client::Body;
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
/// As the HTTP source's client.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

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
            if source.look() && sender.send(Arc::new(source.pods())).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Why no pods can come from a URL.
#[derive(Debug, thiserror::Error)]
#[error("staticPodURL {url}: {reason}")]
pub struct UrlError {
    url: String,
    reason: String,
}

/// As [`watch`], from what a URL gives: a Pod or a PodList.
pub fn watch_url(
    url: &str,
    headers: BTreeMap<String, Vec<String>>,
    node_name: &str,
    period: Duration,
    shutdown: CancellationToken,
) -> Result<watch::Receiver<Arc<Vec<Pod>>>, UrlError> {
    let failed = |reason: String| UrlError { url: url.to_owned(), reason };
    let address: http::Uri = url.parse().map_err(|error: http::uri::InvalidUri| failed(error.to_string()))?;
    let path = address.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    // What is asked for has the whole path: the server has none.
    let mut server = address.into_parts();
    server.path_and_query = Some(http::uri::PathAndQuery::from_static("/"));
    let mut config = kube::Config::new(http::Uri::from_parts(server).map_err(|error| failed(error.to_string()))?);
    for (name, value) in headers.iter().flat_map(|(name, values)| values.iter().map(move |value| (name, value))) {
        let name = name.parse().map_err(|_| failed(format!("header {name:?}")))?;
        config.headers.push((name, value.parse().map_err(|_| failed(format!("header {value:?}")))?));
    }
    let client = component_base::client::connect_h1(config, "kubelet").map_err(|error| failed(error.to_string()))?;
    let (sender, receiver) = watch::channel(Arc::new(Vec::<Pod>::new()));
    let (url, node_name) = (url.to_owned(), node_name.to_owned());
    tokio::spawn(async move {
        let mut seen = String::new();
        loop {
            match fetch(&client, &path).await {
                Ok(text) if text == seen => {}
                Ok(text) => match manifest::pods(&text, &url, &node_name) {
                    Ok(mut pods) => {
                        for pod in &mut pods {
                            keep_seen(pod, sender.borrow().iter().find(|known| known.metadata.uid == pod.metadata.uid));
                        }
                        seen = text;
                        sender.send_replace(Arc::new(pods));
                    }
                    Err(error) => tracing::error!(url, error, "no pods; the last good reading stays"),
                },
                Err(error) => tracing::warn!(url, error, "static pods not fetched; the last known ones stay"),
            }
            if tokio::time::timeout(period, shutdown.cancelled()).await.is_ok() {
                return;
            }
        }
    });
    Ok(receiver)
}

async fn fetch(client: &kube::Client, path: &str) -> Result<String, String> {
    let request = http::Request::get(path).body(Body::empty()).map_err(|error| error.to_string())?;
    let read = async {
        let answer = client.send(request).await.map_err(|error| error.to_string())?;
        if answer.status() != http::StatusCode::OK {
            return Err(answer.status().to_string());
        }
        let whole = Limited::new(answer.into_body(), MAX_BYTES as usize).collect().await;
        let bytes = whole.map_err(|error| error.to_string())?.to_bytes();
        String::from_utf8(bytes.into()).map_err(|error| error.to_string())
    };
    tokio::time::timeout(FETCH_TIMEOUT, read).await.map_err(|_| "no answer in time".to_owned())?
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

    #[tokio::test]
    async fn pods_come_from_a_url_and_stay_when_it_is_away() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        component_base::daemon::init(0);
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a socket");
        let url = format!("http://{}/pods?node=n1", server.local_addr().expect("an address"));
        let shutdown = CancellationToken::new();
        let headers = BTreeMap::from([("x-who".to_owned(), vec!["n1".to_owned()])]);
        let mut pods = watch_url(&url, headers, "N1", Duration::from_millis(50), shutdown.clone()).expect("a source");
        let one = |name: &str| serde_json::json!({"metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "i:1"}]}});
        let list = serde_json::json!({"apiVersion": "v1", "kind": "PodList", "items": [one("a"), one("b")]});
        // What is too long is not read to its end.
        let long =
            serde_json::json!({"apiVersion": "v1", "kind": "PodList", "items": [one("c")], "x": "x".repeat(11 << 20)});
        for body in [list.to_string(), "nonsense: [".to_owned(), long.to_string()] {
            let (mut stream, _) = server.accept().await.expect("a client");
            let mut asked = [0; 1024];
            let read = stream.read(&mut asked).await.expect("a request");
            let asked = String::from_utf8_lossy(&asked[..read]).to_lowercase();
            assert!(asked.starts_with("get /pods?node=n1 ") && asked.contains("x-who: n1"), "{asked}");
            let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
            let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
        }
        drop(server);
        tokio::time::timeout(Duration::from_secs(10), pods.wait_for(|pods| pods.len() == 2))
            .await
            .expect("in time")
            .expect("open");
        assert_eq!(names(&pods.borrow()), ["a-n1", "b-n1"]);
        assert!(pods.borrow().iter().all(is_static));
        shutdown.cancel();
    }

    #[test]
    fn a_missing_directory_has_no_manifests() {
        assert!(manifests(Path::new("/nonexistent/manifests")).expect("no error").is_empty());
    }
}
