//! Holds the unit files in `systemd/` against what this program writes: same programs, same files, same hardening rules.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::components::Component;
use super::layout::Layout;
use super::process;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd")
}

fn read(component: Component) -> String {
    let path = directory().join(process::unit(component));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_component_has_a_unit_with_its_command_line_and_nothing_else_is_there() {
    let layout = Layout::below(Path::new("/"));
    for component in Component::CONTROL_PLANE {
        let unit = read(component);
        let lines: Vec<&str> = unit.lines().collect();
        let program = match component {
            Component::Etcd => "/usr/bin/etcd".to_owned(),
            other => format!("/usr/local/lib/pilothouse/{}", other.name()),
        };
        for expected in [
            format!("ExecStart={program} $ARGS"),
            format!("EnvironmentFile={}", layout.flags_file(component.name()).display()),
            "Restart=always".to_owned(),
            "StartLimitIntervalSec=0".to_owned(),
            "SystemCallArchitectures=native".to_owned(),
        ] {
            assert!(lines.contains(&expected.as_str()), "{} lacks {expected:?}", component.name());
        }
        // The kubelet mounts for containers: it cannot have a mount namespace of its own. All others must.
        let confined = lines.contains(&"ProtectSystem=strict") && lines.contains(&"NoNewPrivileges=yes");
        assert_eq!(confined, component != Component::Kubelet, "{}", component.name());
    }
    let files = std::fs::read_dir(directory()).expect("the directory of units").count();
    assert_eq!(files, Component::CONTROL_PLANE.len());
}

#[test]
fn systemd_finds_nothing_to_complain_of() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        eprintln!("left out: this machine has no systemd-analyze");
        return;
    }
    // systemd also looks whether the programs are there; here they need not be.
    let copies = tempfile::tempdir().expect("a directory");
    let mut paths = Vec::new();
    for component in Component::CONTROL_PLANE {
        let path = copies.path().join(process::unit(component));
        let text: String = read(component)
            .lines()
            .map(|line| {
                if line.starts_with("ExecStart=") {
                    "ExecStart=/bin/true $ARGS\n".to_owned()
                } else {
                    format!("{line}\n")
                }
            })
            .collect();
        std::fs::write(&path, text).expect("a file");
        paths.push(path);
    }
    let output = Command::new("systemd-analyze").arg("verify").arg("--man=no").args(&paths).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    // It looks at the machine's other units too.
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("pilothouse-")).collect();
    assert!(ours.is_empty(), "{ours:#?}");
}
