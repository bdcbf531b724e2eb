//! An image archive (OCI image layout in a tar) from files in memory. The same files give the same bytes: entries are
//! sorted, owned by root and dated 1970, and the one layer is not compressed, so that its digest is its diff ID.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::bootstrap::x509::hex;

/// What stands at a path of an image.
#[derive(Debug, Clone)]
pub(crate) enum Entry {
    Directory { mode: u32 },
    File { mode: u32, contents: Vec<u8> },
    Symlink { target: String },
}

/// An image to be: its files by path (without the leading slash) and what runs in it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Image {
    /// Full names, with registry and tag.
    pub(crate) names: Vec<String>,
    pub(crate) entries: BTreeMap<String, Entry>,
    pub(crate) entrypoint: Vec<String>,
    pub(crate) command: Vec<String>,
    pub(crate) environment: Vec<String>,
    /// Ports that it listens on, as `80/tcp`.
    pub(crate) ports: Vec<String>,
    /// The user to run as; empty for root.
    pub(crate) user: String,
}

impl Image {
    /// Adds a file and the directories above it.
    pub(crate) fn add_file(&mut self, path: &str, mode: u32, contents: Vec<u8>) {
        self.add_parents(path);
        self.entries.insert(path.to_owned(), Entry::File { mode, contents });
    }

    /// Adds a directory and those above it.
    pub(crate) fn add_directory(&mut self, path: &str, mode: u32) {
        self.add_parents(path);
        self.entries.insert(path.to_owned(), Entry::Directory { mode });
    }

    /// Adds a symbolic link, unless something stands there already.
    pub(crate) fn add_symlink(&mut self, path: &str, target: &str) {
        self.add_parents(path);
        self.entries.entry(path.to_owned()).or_insert_with(|| Entry::Symlink { target: target.to_owned() });
    }

    fn add_parents(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            self.entries.entry(path[..at].to_owned()).or_insert(Entry::Directory { mode: 0o755 });
        }
    }
}

/// The archive of `image` for `architecture` (Go's name for it).
pub(crate) fn archive(image: &Image, architecture: &str) -> Result<Vec<u8>> {
    let layer = layer(&image.entries)?;
    let layer_digest = digest(&layer);
    let mut run = json!({"Env": environment(&image.environment)});
    let mut set = |key: &str, value: Value| run[key] = value;
    if !image.entrypoint.is_empty() {
        set("Entrypoint", json!(image.entrypoint));
    }
    if !image.command.is_empty() {
        set("Cmd", json!(image.command));
    }
    if !image.user.is_empty() {
        set("User", json!(image.user));
    }
    if !image.ports.is_empty() {
        set(
            "ExposedPorts",
            image.ports.iter().map(|port| (port.clone(), json!({}))).collect::<serde_json::Map<_, _>>().into(),
        );
    }
    let config = serde_json::to_vec(&json!({
        "architecture": architecture,
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": run,
        "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    }))?;
    let manifests: Vec<Value> = image
        .names
        .iter()
        .map(|name| {
            let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
            entry["platform"] = json!({"architecture": architecture, "os": "linux"});
            let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
            entry["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag});
            entry
        })
        .collect();
    let index = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": manifests}))?;

    let mut files = BTreeMap::new();
    files.insert("blobs/sha256/".to_owned() + &sha256(&config), config);
    files.insert("blobs/sha256/".to_owned() + &sha256(&layer), layer);
    files.insert("blobs/sha256/".to_owned() + &sha256(&manifest), manifest);
    files.insert("index.json".to_owned(), index);
    files.insert("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
    let entries = files.into_iter().map(|(path, contents)| (path, Entry::File { mode: 0o644, contents })).collect();
    layer_of(&entries)
}

fn layer(entries: &BTreeMap<String, Entry>) -> Result<Vec<u8>> {
    layer_of(entries)
}

/// A tar of `entries`; a directory sorts before what is in it.
fn layer_of(entries: &BTreeMap<String, Entry>) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, entry) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        let added = match entry {
            Entry::Directory { mode } => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(*mode);
                tar.append_data(&mut header, format!("{path}/"), std::io::empty())
            }
            Entry::File { mode, contents } => {
                header.set_entry_type(tar::EntryType::Regular);
                header.set_mode(*mode);
                header.set_size(contents.len() as u64);
                tar.append_data(&mut header, path, contents.as_slice())
            }
            Entry::Symlink { target } => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_mode(0o777);
                tar.append_link(&mut header, path, target)
            }
        };
        added.with_context(|| format!("cannot put {path:?} into the image"))?;
    }
    tar.into_inner().context("cannot finish the image's archive")
}

fn environment(own: &[String]) -> Vec<String> {
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned();
    std::iter::once(path).chain(own.iter().cloned()).collect()
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(blob), "size": blob.len()})
}

fn digest(blob: &[u8]) -> String {
    format!("sha256:{}", sha256(blob))
}

fn sha256(blob: &[u8]) -> String {
    hex(&Sha256::digest(blob))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn sample() -> Image {
        let mut image = Image {
            names: vec!["docker.io/library/a:1".into(), "docker.io/library/a:2".into()],
            entrypoint: vec!["/bin/a".into()],
            ports: vec!["80/tcp".into()],
            ..Image::default()
        };
        image.add_symlink("usr/bin/b", "/bin/a");
        image.add_file("bin/a", 0o755, b"program".to_vec());
        image.add_directory("tmp", 0o1777);
        image
    }

    fn contents(archive: &[u8]) -> Result<BTreeMap<String, (Vec<u8>, u32, u64)>> {
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(archive).entries()? {
            let mut entry = entry?;
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            let path = entry.path()?.display().to_string();
            files.insert(path, (bytes, entry.header().mode()?, entry.header().mtime()?));
        }
        Ok(files)
    }

    #[test]
    fn the_same_files_give_the_same_bytes() -> Result<()> {
        assert_eq!(archive(&sample(), "amd64")?, archive(&sample(), "amd64")?);
        assert_ne!(archive(&sample(), "amd64")?, archive(&sample(), "arm64")?);
        Ok(())
    }

    #[test]
    fn every_descriptor_names_a_blob_that_is_there() -> Result<()> {
        let files = contents(&archive(&sample(), "amd64")?)?;
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap_or_default().replace("sha256:", "");
            let blob = &files[&format!("blobs/sha256/{digest}")].0;
            assert_eq!(sha256(blob), digest);
            assert_eq!(descriptor["size"], blob.len());
            blob
        };
        let index: Value = serde_json::from_slice(&files["index.json"].0)?;
        let names: Vec<_> = index["manifests"].as_array().into_iter().flatten().collect();
        assert_eq!(names.len(), 2);
        assert_eq!(names[1]["annotations"]["io.containerd.image.name"], "docker.io/library/a:2");
        let manifest: Value = serde_json::from_slice(blob(names[0]))?;
        let config: Value = serde_json::from_slice(blob(&manifest["config"]))?;
        assert_eq!(config["config"]["Entrypoint"], json!(["/bin/a"]));
        assert_eq!(config["config"]["ExposedPorts"], json!({"80/tcp": {}}));
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        let layer = contents(blob(&manifest["layers"][0]))?;
        assert_eq!(layer.keys().collect::<Vec<_>>(), ["bin/", "bin/a", "tmp/", "usr/", "usr/bin/", "usr/bin/b"]);
        assert_eq!(layer["bin/a"], (b"program".to_vec(), 0o755, 0));
        assert_eq!(layer["tmp/"].1, 0o1777);
        Ok(())
    }
}
