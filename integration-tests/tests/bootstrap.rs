//! `bootstrap quickstart` and `bootstrap reset` as a person runs them, twice in a row, on a throwaway machine made of
//! namespaces: the cluster comes up and serves the application, and the machine is then as it was.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The time that both rounds may take.
const LIMIT_SECONDS: &str = "600";

/// Cgroups of the pods, one in each hierarchy; removed whatever happens.
struct Cgroups {
    name: String,
}

impl Cgroups {
    fn make() -> Cgroups {
        let cgroups = Cgroups { name: format!("pilothouse-bootstrap-{}", std::process::id()) };
        for directory in cgroups.directories() {
            if std::fs::create_dir_all(&directory).is_err() {
                continue;
            }
            let hierarchy = directory.parent().unwrap_or(Path::new("/"));
            // Version 1: a new cgroup has no processors and no memory until it is told which.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(value) = std::fs::read_to_string(hierarchy.join(file)) {
                    let _ = std::fs::write(directory.join(file), value);
                }
            }
        }
        cgroups
    }

    /// `/sys/fs/cgroup/NAME` with version 2, `/sys/fs/cgroup/HIERARCHY/NAME` with version 1.
    fn directories(&self) -> Vec<PathBuf> {
        let root = Path::new("/sys/fs/cgroup");
        if root.join("cgroup.controllers").exists() {
            return vec![root.join(&self.name)];
        }
        let hierarchies = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
        hierarchies.filter(|path| path.is_dir() && !path.is_symlink()).map(|path| path.join(&self.name)).collect()
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for directory in self.directories() {
            let _ = Command::new("find")
                .arg(&directory)
                .args(["-depth", "-type", "d", "-exec", "rmdir", "{}", ";"])
                .output();
        }
    }
}

/// The programs of this build, with the ones that stand alone in images built statically.
fn binaries(into: &Path) {
    let own = std::env::current_exe().expect("this test's own path");
    let target = own.ancestors().nth(2).expect("the directory of programs").to_owned();
    let statics = target.parent().expect("the target directory").join("static");
    std::fs::create_dir_all(into).expect("a directory");
    for program in
        ["apiserver", "controller-manager", "scheduler", "kubelet", "kube-proxy", "pod-network", "dns", "ctl"]
    {
        link(&target.join(program), &into.join(program));
    }
    for program in ["pause", "httpd"] {
        link(&statics.join(program), &into.join(program));
    }
}

fn link(from: &Path, to: &Path) {
    assert!(from.exists(), "{} is not there: ./test builds it", from.display());
    std::os::unix::fs::symlink(from, to).expect("a link");
}

#[test]
fn quickstart_and_reset_twice_in_a_row() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("left out: this needs root");
        return;
    }
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let scripts = manifest.join("tests/bootstrap");
    let directory = tempfile::Builder::new().prefix("pilothouse-bootstrap").tempdir().expect("a directory");
    let programs = directory.path().join("bin");
    binaries(&programs);
    let cgroups = Cgroups::make();

    let output = Command::new("timeout")
        .args(["--kill-after=5", LIMIT_SECONDS])
        .arg(scripts.join("namespaces.sh"))
        .arg(directory.path().join("machine"))
        .arg(scripts.join("twice.sh"))
        .arg(manifest.join("../bootstrap"))
        .arg(&programs)
        .arg(format!("/{}", cgroups.name))
        .output()
        .expect("it runs");
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{said}\n{complained}", output.status);
}
