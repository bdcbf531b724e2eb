//! How components run on this machine: as systemd units where systemd is process 1, else in the background with a pid
//! file and a log file. Both are asked here, so that `status` and failures speak of them the same way.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::components::Component;

/// Pid files of the background mode.
const RUN_DIR: &str = "/run/pilothouse";
/// Log files of the background mode.
const LOG_DIR: &str = "/var/log/pilothouse";

/// Whether systemd is process 1.
fn systemd_runs() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// The unit of a component; containerd's is the distribution's.
pub(crate) fn unit(component: Component) -> String {
    match component {
        Component::Containerd => "containerd.service".to_owned(),
        other => format!("pilothouse-{}.service", other.name()),
    }
}

/// Where a component's log is.
pub(crate) enum Log {
    Journal { unit: String },
    File(PathBuf),
}

/// The log of a component.
pub(crate) fn log(component: Component) -> Log {
    let file = Path::new(LOG_DIR).join(format!("{}.log", component.name()));
    if systemd_runs() && !file.exists() { Log::Journal { unit: unit(component) } } else { Log::File(file) }
}

impl Log {
    /// What to type to read it.
    pub(crate) fn command(&self) -> String {
        match self {
            Log::Journal { unit } => format!("journalctl -u {unit}"),
            Log::File(path) => path.display().to_string(),
        }
    }

    /// Its last lines; none where it cannot be read.
    pub(crate) fn tail(&self, lines: usize) -> Vec<String> {
        let text = match self {
            Log::Journal { unit } => Command::new("journalctl")
                .args(["--no-pager", "--output=cat", "--lines", &lines.to_string(), "--unit", unit])
                .output()
                .map(|output| output.stdout)
                .unwrap_or_default(),
            Log::File(path) => read_end(path).unwrap_or_default(),
        };
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].iter().map(|line| (*line).to_owned()).collect()
    }
}

/// The last 16 KiB of a file.
fn read_end(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::{Read, Seek, SeekFrom};
    const END: u64 = 16 * 1024;
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(END)))?;
    let mut bytes = Vec::new();
    file.take(END).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What is known of a component's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// It is not set up on this machine.
    Absent,
    Running {
        pid: i32,
    },
    /// It is set up but does not run; the word is systemd's, or `dead`.
    Stopped(String),
}

/// How a component's process is doing.
pub(crate) fn state(component: Component) -> State {
    let pid_file = Path::new(RUN_DIR).join(format!("{}.pid", component.name()));
    if let Ok(text) = std::fs::read_to_string(&pid_file) {
        return match text.trim().parse::<i32>() {
            Ok(pid) if alive(pid) => State::Running { pid },
            _ => State::Stopped("dead".to_owned()),
        };
    }
    if !systemd_runs() {
        return State::Absent;
    }
    let output = Command::new("systemctl")
        .args(["show", "--property=LoadState,ActiveState,MainPID", &unit(component)])
        .output()
        .map(|output| output.stdout)
        .unwrap_or_default();
    unit_state(&String::from_utf8_lossy(&output))
}

/// Reads `systemctl show`.
fn unit_state(properties: &str) -> State {
    let property = |name: &str| properties.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let pid = property("MainPID").and_then(|pid| pid.parse().ok()).unwrap_or(0);
    match (property("LoadState"), property("ActiveState")) {
        (Some("loaded"), Some("active")) if pid > 0 => State::Running { pid },
        (Some("loaded"), Some(state)) => State::Stopped(state.to_owned()),
        _ => State::Absent,
    }
}

fn alive(pid: i32) -> bool {
    pid > 0 && Path::new("/proc").join(pid.to_string()).exists()
}

/// Whether a component's process runs; the error says how it does not.
pub(crate) fn running(component: Component) -> Result<()> {
    match state(component) {
        State::Running { .. } => Ok(()),
        State::Stopped(how) => bail!("its process is {how}"),
        State::Absent => bail!("it is not set up on this machine"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read_as_systemctl_shows_them() {
        for (text, state) in [
            ("LoadState=loaded\nActiveState=active\nMainPID=12\n", State::Running { pid: 12 }),
            ("MainPID=0\nLoadState=loaded\nActiveState=failed\n", State::Stopped("failed".into())),
            ("LoadState=not-found\nActiveState=inactive\nMainPID=0\n", State::Absent),
            ("", State::Absent),
        ] {
            assert_eq!(unit_state(text), state, "{text}");
        }
    }

    #[test]
    fn a_log_is_shown_from_its_end() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("x.log");
        std::fs::write(&path, (0..5000).map(|line| format!("line {line}\n")).collect::<String>())?;
        assert_eq!(Log::File(path).tail(2), ["line 4998", "line 4999"]);
        assert!(Log::File(dir.path().join("none")).tail(2).is_empty());
        Ok(())
    }
}
