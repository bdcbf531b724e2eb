//! Files as set-up writes them: whole or not at all, with their mode from the first moment, parents included.

use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result};

/// For private keys, kubeconfigs and tokens.
pub(crate) const PRIVATE: u32 = 0o600;
/// For certificates and configuration.
pub(crate) const PUBLIC: u32 = 0o644;

/// Writes `contents` under a temporary name and renames it into place.
pub(crate) fn write(path: &Path, contents: impl AsRef<[u8]>, mode: u32) -> Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_dir(parent, 0o755)?;
    let mut file = tempfile::NamedTempFile::new_in(parent)
        .with_context(|| format!("cannot create a file in {}", parent.display()))?;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(mode))?;
    file.write_all(contents.as_ref()).with_context(|| format!("cannot write {}", path.display()))?;
    file.as_file().sync_all()?;
    file.persist(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// Makes a directory and its parents; one that exists keeps its mode.
pub(crate) fn make_dir(path: &Path, mode: u32) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .with_context(|| format!("cannot create the directory {}", path.display()))
}

/// The text of a file; the error names it.
pub(crate) fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The text of a file, or `None` where there is no such file.
pub(crate) fn read_if_exists(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_has_its_mode_and_its_parents() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("a/b/secret");
        write(&path, "one", PRIVATE)?;
        write(&path, "two", PRIVATE)?;
        assert_eq!(read(&path)?, "two");
        assert_eq!(std::fs::metadata(&path)?.permissions().mode() & 0o777, PRIVATE);
        assert_eq!(read_if_exists(&dir.path().join("none"))?, None);
        Ok(())
    }
}
