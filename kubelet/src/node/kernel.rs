//! What Kubernetes counts on of the host's kernel: its settings, and how many files the kubelet may have open.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use nix::sys::resource::{Resource, setrlimit};
use tracing::{debug, info, warn};

/// As `setupKernelTunables`.
const SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// A setting that is other than it must be (`protectKernelDefaults`).
#[derive(Debug, thiserror::Error, PartialEq)]
#[error(
    "invalid kernel flag: {name}, expected value: {wanted}, actual value: {found}; set it, or protectKernelDefaults: false"
)]
pub struct WrongSetting {
    name: &'static str,
    wanted: &'static str,
    found: String,
}

/// Has the settings below `/proc/sys` be what they must: changes what is other, or, where they are protected, refuses it.
pub fn settle(settings: &Path, are_protected: bool) -> Result<(), WrongSetting> {
    for (name, wanted) in SETTINGS {
        let file = settings.join(name);
        let found = match fs::read_to_string(&file) {
            Ok(text) => text.trim().to_owned(),
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => {
                warn!(name, %error, "setting of the kernel not read");
                continue;
            }
        };
        if found == wanted {
            continue;
        }
        if are_protected {
            return Err(WrongSetting { name, wanted, found });
        }
        match fs::write(&file, wanted) {
            Ok(()) => info!(name, from = found, to = wanted, "setting of the kernel changed"),
            Err(error) => warn!(name, is = found, wanted, %error, "setting of the kernel not changed"),
        }
    }
    Ok(())
}

/// What the kernel ends first where memory is short (`oomScoreAdj`): the file is the process's.
pub fn set_oom_score(file: &Path, score: i32) {
    if let Err(error) = fs::write(file, score.to_string()) {
        debug!(score, %error, "oomScoreAdj not set");
    }
}

/// Lets this process have so many files open (`maxOpenFiles`).
pub fn allow_open_files(wanted: u64) {
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted) {
        warn!(wanted, %error, "maxOpenFiles not set");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_changed_or_refused() {
        let root = tempfile::tempdir().unwrap();
        for (name, value) in [("vm/overcommit_memory", "0\n"), ("kernel/panic", "10\n")] {
            fs::create_dir_all(root.path().join(name).parent().unwrap()).unwrap();
            fs::write(root.path().join(name), value).unwrap();
        }
        let refused = settle(root.path(), true).unwrap_err();
        assert_eq!((refused.name, refused.wanted, refused.found.as_str()), ("vm/overcommit_memory", "1", "0"));
        assert_eq!(settle(root.path(), false), Ok(()));
        assert_eq!(fs::read_to_string(root.path().join("vm/overcommit_memory")).unwrap(), "1");
        assert_eq!(settle(root.path(), true), Ok(()));
    }

    #[test]
    fn the_score_is_set() {
        let file = tempfile::NamedTempFile::new().unwrap();
        set_oom_score(file.path(), -999);
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "-999");
        set_oom_score(Path::new("/nonexistent/oom_score_adj"), 5);
    }

    #[test]
    fn files_may_be_open() {
        let limits = || nix::sys::resource::getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let less = limits().0 - 1;
        allow_open_files(less);
        assert_eq!(limits(), (less, less));
    }
}
