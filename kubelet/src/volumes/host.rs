//! The host's own programs for volumes: `mount`, `blkid`, `mkfs`, `iscsiadm`. What they need (an NFS client, say) is the host's to have.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

const TIMEOUT: Duration = Duration::from_secs(120);
/// `blkid` of a device on which it recognizes nothing.
const NOTHING_FOUND: i32 = 2;

/// Mounts `source` at `target` by the host's `mount`.
pub(super) async fn mount(source: &str, kind: &str, options: &[String], target: &Path) -> Result<(), String> {
    let target = target.to_string_lossy();
    let joined = options.join(",");
    let mut arguments = vec!["-t", kind];
    if !joined.is_empty() {
        arguments.extend(["-o", joined.as_str()]);
    }
    arguments.extend([source, &target]);
    match run("mount", &arguments).await? {
        (0, _) => Ok(()),
        (code, output) => {
            Err(format!("mount failed: exit status {code}\nMounting arguments: {arguments:?}\nOutput: {output}"))
        }
    }
}

/// Mounts a device; one on which nothing is gets a file system first. As `FormatAndMount`.
pub(super) async fn format_and_mount(
    device: &Path,
    fs_type: &str,
    options: &[String],
    target: &Path,
) -> Result<(), String> {
    let shown = device.to_string_lossy();
    let (code, found) = run("blkid", &["-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "value", &shown]).await?;
    match (code, found.trim()) {
        (NOTHING_FOUND, _) | (0, "") => {
            let program = format!("mkfs.{fs_type}");
            let arguments: Vec<&str> =
                if fs_type.starts_with("ext") { vec!["-F", "-m0", &shown] } else { vec![&shown] };
            let (code, output) = run(&program, &arguments).await?;
            if code != 0 {
                return Err(format!(
                    "format of disk {shown:?} failed: type:({fs_type:?}) exit status {code}: {output}"
                ));
            }
        }
        (0, found) if found == fs_type => {}
        (0, found) => return Err(format!("{shown}: has {found:?}, not {fs_type:?}; it is left as it is")),
        (code, output) => return Err(format!("blkid {shown}: exit status {code}: {output}")),
    }
    mount(&shown, fs_type, options, target).await
}

/// A program's exit code and what it said.
pub(super) async fn run(program: &str, arguments: &[&str]) -> Result<(i32, String), String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(TIMEOUT, command.output())
        .await
        .map_err(|_| format!("{program} did not end within {TIMEOUT:?}"))?
        .map_err(|e| format!("{program}: {e}; is it installed on this node?"))?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).trim().to_owned()))
}
