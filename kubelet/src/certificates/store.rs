//! Certificates on disk, as the kubelet's certificate store keeps them: `<name>-<time>.pem` holds certificate and key, and
//! `<name>-current.pem` is a symlink to the newest. Readers follow the link; a renewal replaces it in one rename.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use component_base::x509::{CertificateInfo, read_pem};
use rcgen::KeyPair;

/// Older certificates that are kept beside the current one, for whoever is looking into something.
const KEPT: usize = 2;

/// The certificates of one use (`kubelet-client`, `kubelet-server`) in a directory.
#[derive(Debug, Clone)]
pub(super) struct Store {
    directory: PathBuf,
    name: &'static str,
}

// === impl Store ===

impl Store {
    pub(super) fn new(directory: &Path, name: &'static str) -> Store {
        Store { directory: directory.to_owned(), name }
    }

    /// The file to hand to whoever uses the certificate.
    pub(super) fn current(&self) -> PathBuf {
        self.directory.join(format!("{}-current.pem", self.name))
    }

    /// What the current certificate says; `None` where there is none that can be read.
    pub(super) fn info(&self) -> Option<CertificateInfo> {
        read_pem(&fs::read(self.current()).ok()?).ok()
    }

    /// Make this certificate the current one.
    pub(super) fn store(&self, certificate: &str, key: &str) -> io::Result<()> {
        let stamp = jiff::Timestamp::now().strftime("%Y-%m-%d-%H-%M-%S-%6f").to_string();
        let name = format!("{}-{stamp}.pem", self.name);
        write_private(&self.directory.join(&name), &format!("{}\n{}", certificate.trim_end(), key))?;
        let link = self.directory.join(format!("{}-updated.pem", self.name));
        match fs::remove_file(&link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        symlink(&name, &link)?;
        fs::rename(&link, self.current())?;
        self.remove_old()
    }

    fn remove_old(&self) -> io::Result<()> {
        let current = fs::read_link(self.current())?;
        let prefix = format!("{}-2", self.name);
        let mut old: Vec<PathBuf> = fs::read_dir(&self.directory)?
            .filter_map(|entry| entry.ok().map(|entry| PathBuf::from(entry.file_name())))
            .filter(|name| name.to_string_lossy().starts_with(&prefix) && *name != current)
            .collect();
        old.sort();
        for name in old.iter().rev().skip(KEPT) {
            fs::remove_file(self.directory.join(name))?;
        }
        Ok(())
    }

    /// The key of a request that is not answered yet: kept over restarts, so that a restarted kubelet asks for the same
    /// certificate again rather than for another.
    pub(super) fn pending_key(&self) -> Result<KeyPair, String> {
        let path = self.pending_key_path();
        if let Ok(text) = fs::read_to_string(&path)
            && let Ok(key) = KeyPair::from_pem(&text)
        {
            return Ok(key);
        }
        let key = component_base::x509::new_key().map_err(|error| error.to_string())?;
        write_private(&path, &key.serialize_pem()).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(key)
    }

    /// Forget the pending key: its certificate is there, or refused for good.
    pub(super) fn drop_pending_key(&self) {
        match fs::remove_file(self.pending_key_path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.pending_key_path().display(), %error, "pending key cannot be removed");
            }
            _ => {}
        }
    }

    fn pending_key_path(&self) -> PathBuf {
        self.directory.join(format!("{}.key.tmp", self.name))
    }
}

/// Write a file that only root reads, in one step.
pub(super) fn write_private(path: &Path, text: &str) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o750).create(parent)?;
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn the_newest_certificate_is_current() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::new(dir.path(), "kubelet-client");
        assert!(store.info().is_none());
        for number in 0..5 {
            let (certificate, key) = component_base::x509::self_signed(&format!("n{number}"), &[], &[]).expect("made");
            store.store(&certificate, &key).expect("stored");
            assert_eq!(store.info().expect("readable").common_name, format!("n{number}"));
        }
        assert_eq!(fs::metadata(store.current()).expect("meta").mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1 + 1 + KEPT);
        assert!(fs::read_to_string(store.current()).expect("text").contains("PRIVATE KEY"));
    }

    #[test]
    fn a_pending_key_is_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::new(dir.path(), "kubelet-client");
        let first = store.pending_key().expect("a key").serialize_pem();
        assert_eq!(store.pending_key().expect("a key").serialize_pem(), first);
        store.drop_pending_key();
        assert_ne!(store.pending_key().expect("a key").serialize_pem(), first);
    }
}
