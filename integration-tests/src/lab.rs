//! The network between hosts. The test's own thread moves into a network namespace of its own, in which a bridge joins the
//! hosts; so the test reaches them by their addresses, and the machine's network is left alone.
use crate::shell;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// All cgroups and directories of tests begin with it, behind it comes the number of the process that owns them.
const PREFIX: &str = "pilothouse-test-";
const CGROUPS: &str = "/sys/fs/cgroup";

/// A directory, a network and cgroups for the hosts of one test.
#[derive(Debug)]
pub struct Lab {
    directory: PathBuf,
    name: String,
}

impl Lab {
    /// Moves this thread into a new network. Everything that it starts from now on is there, threads of its own included.
    pub fn new(test: &str) -> Self {
        remove_what_others_left();
        let name = format!("{PREFIX}{}-{test}", std::process::id());
        let directory = std::env::temp_dir().join(&name);
        fs::create_dir_all(&directory).expect("a directory for the test");
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace for the test");
        ip("link set lo up");
        ip("link add br0 type bridge");
        ip("addr add 10.200.0.1/24 dev br0");
        ip("link set br0 up");
        Self { directory, name }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The cgroup of a host, made in every hierarchy.
    pub(crate) fn cgroup(&self, host: &str) -> String {
        let path = format!("/{}/{host}", self.name);
        for hierarchy in hierarchies() {
            let mut parent = hierarchy.clone();
            for part in path.trim_start_matches('/').split('/') {
                let child = parent.join(part);
                fs::create_dir_all(&child).expect("a cgroup for the host");
                // A v1 cpuset takes no process until it says which processors and memory it may use.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    if let Ok(value) = fs::read_to_string(parent.join(file)) {
                        let _ = fs::write(child.join(file), value);
                    }
                }
                parent = child;
            }
        }
        path
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("KEEP_FAILED").is_some() {
            eprintln!("files of the failed test are in {}", self.directory.display());
            return;
        }
        remove(&self.name);
    }
}

/// `ip ARGUMENTS`, which must succeed.
#[track_caller]
pub(crate) fn ip(arguments: &str) {
    shell::run(Command::new("ip").args(arguments.split(' '))).success();
}

fn hierarchies() -> Vec<PathBuf> {
    if Path::new(CGROUPS).join("cgroup.controllers").exists() {
        return vec![PathBuf::from(CGROUPS)];
    }
    let entries = fs::read_dir(CGROUPS).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

/// Of tests that were killed.
fn remove_what_others_left() {
    let roots = hierarchies().into_iter().chain([std::env::temp_dir()]);
    let names = roots.flat_map(|root| fs::read_dir(root).into_iter().flatten().flatten());
    for name in names.filter_map(|e| e.file_name().into_string().ok()) {
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            remove(&name);
        }
    }
}

/// Removes cgroups, deepest first, and the directory.
fn remove(name: &str) {
    for root in hierarchies() {
        remove_cgroup(&root.join(name));
    }
    // Mounts below it were in the hosts' mount namespaces, which are gone.
    let _ = fs::remove_dir_all(std::env::temp_dir().join(name));
}

fn remove_cgroup(path: &Path) {
    for child in fs::read_dir(path).into_iter().flatten().flatten() {
        if child.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroup(&child.path());
        }
    }
    // The processes in it die with their host; the kernel may need a moment to forget them.
    for _ in 0..20 {
        if fs::remove_dir(path).is_ok() || !path.exists() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}
