//! `pause`: the process that holds a pod's namespaces. It does nothing but reap the orphans that fall to it (with a shared
//! process namespace it is process 1) and end when it is told to.
//!
//! As `pause make|remove|scrub DIRECTORY` it works on a directory and ends: volumes that are directories of nodes come and
//! go by it, since every node has this image.
#![forbid(unsafe_code)]

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [] => wait(),
        [verb, directory] => match work(verb, Path::new(directory)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("pause: cannot {verb} {directory}: {error}");
                ExitCode::FAILURE
            }
        },
        _ => {
            eprintln!("usage: pause [make|remove|scrub DIRECTORY]");
            ExitCode::FAILURE
        }
    }
}

fn work(verb: &str, directory: &Path) -> io::Result<()> {
    match verb {
        // Whoever the volume's user is, it may write.
        "make" => {
            fs::create_dir_all(directory)?;
            fs::set_permissions(directory, Permissions::from_mode(0o777))
        }
        "remove" => match fs::remove_dir_all(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            outcome => outcome,
        },
        "scrub" => {
            for entry in fs::read_dir(directory)? {
                let entry = entry?;
                // A link is removed, not followed.
                if entry.file_type()?.is_dir() {
                    fs::remove_dir_all(entry.path())?;
                } else {
                    fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        }
        _ => Err(io::Error::other("there is no such work: make, remove or scrub")),
    }
}

fn wait() -> ExitCode {
    let mut awaited = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGCHLD] {
        awaited.add(signal);
    }
    // Blocked, so that one that comes between two waits is kept for the next.
    if let Err(error) = awaited.thread_block() {
        eprintln!("pause: signals cannot be blocked: {error}");
        return ExitCode::FAILURE;
    }
    loop {
        match awaited.wait() {
            Ok(Signal::SIGCHLD) => reap(),
            Ok(_) => return ExitCode::SUCCESS,
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                eprintln!("pause: waiting for signals failed: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
}

/// One signal may stand for many children.
fn reap() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_made_emptied_and_removed() {
        let root = std::env::temp_dir().join(format!("pause-{}", std::process::id()));
        let volume = root.join("a/volume");
        work("make", &volume).unwrap();
        work("make", &volume).unwrap();
        assert_eq!(fs::metadata(&volume).unwrap().permissions().mode() & 0o777, 0o777);
        fs::create_dir(volume.join("d")).unwrap();
        fs::write(volume.join("d/f"), "x").unwrap();
        std::os::unix::fs::symlink("/", volume.join("link")).unwrap();
        work("scrub", &volume).unwrap();
        assert_eq!(fs::read_dir(&volume).unwrap().count(), 0);
        work("remove", &volume).unwrap();
        work("remove", &volume).unwrap();
        assert!(work("scrub", &volume).is_err() && work("format", &root).is_err());
        fs::remove_dir_all(root).unwrap();
    }
}
