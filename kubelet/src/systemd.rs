//! What is asked of systemd on nodes that have it, by its own programs: slices for pods (`busctl`), word of a shutdown before it
//! happens, and its delay (`systemd-inhibit`).

use std::process::Stdio;
use std::time::Duration;

use proto::cri as pb;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tracing::{debug, warn};

use crate::runtime::resources;

const TIMEOUT: Duration = Duration::from_secs(20);
const MANAGER: [&str; 3] =
    ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"];
const LOGIN: [&str; 3] = ["org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"];
const SHUTDOWN: &str = "type='signal',interface='org.freedesktop.login1.Manager',member='PrepareForShutdown',path='/org/freedesktop/login1'";
/// Where the delay of a shutdown is set.
const LOGIND_DROP_IN: &str = "/etc/systemd/logind.conf.d/99-kubelet.conf";
/// Nothing may be `infinity` for systemd: the largest number says so.
const INFINITY: u64 = u64::MAX;

/// The properties of a slice that hold its processes to these limits, as `busctl` takes them: name, type, value.
fn properties(limits: &pb::LinuxContainerResources, pids: i64, v2: bool) -> Vec<[String; 3]> {
    let mut out = Vec::new();
    let mut put = |name: &str, value: u64| out.push([name.to_owned(), "t".to_owned(), value.to_string()]);
    let positive = |n: i64| u64::try_from(n).ok().filter(|n| *n > 0);
    if let Some(shares) = positive(limits.cpu_shares) {
        if v2 {
            put("CPUWeight", u64::try_from(resources::weight(limits.cpu_shares)).unwrap_or(100));
        } else {
            put("CPUShares", shares);
        }
    }
    let period = positive(limits.cpu_period).unwrap_or(100_000);
    // Microseconds of CPU a second.
    let quota =
        positive(limits.cpu_quota).map_or(INFINITY, |quota| (quota.saturating_mul(1_000_000) / period).max(10_000));
    put("CPUQuotaPerSecUSec", quota);
    let memory = positive(limits.memory_limit_in_bytes).unwrap_or(INFINITY);
    put(if v2 { "MemoryMax" } else { "MemoryLimit" }, memory);
    if let Some(pids) = positive(pids) {
        put("TasksMax", pids);
    }
    out
}

/// Makes a slice with these limits, or sets them on the one there is.
pub fn ensure_slice(name: &str, limits: &pb::LinuxContainerResources, pids: i64, v2: bool) -> std::io::Result<()> {
    let own = properties(limits, pids, v2);
    let accounting = ["CPUAccounting", "MemoryAccounting", "TasksAccounting"];
    let flags = accounting.map(|name| [name.to_owned(), "b".to_owned(), "true".to_owned()]);
    let all: Vec<[String; 3]> = flags.into_iter().chain(own.clone()).collect();
    let mut start = vec!["StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail"];
    let count = all.len().to_string();
    start.push(&count);
    start.extend(all.iter().flatten().map(String::as_str));
    start.push("0");
    match call(&start) {
        Err(error) if error.to_string().contains("already") => {}
        other => return other,
    }
    let mut set = vec!["SetUnitProperties", "sba(sv)", name, "true"];
    let count = own.len().to_string();
    set.push(&count);
    set.extend(own.iter().flatten().map(String::as_str));
    call(&set)
}

/// Ends a slice; one that is not there is fine.
pub fn stop_slice(name: &str) {
    if let Err(error) = call(&["StopUnit", "ss", name, "replace"]) {
        debug!(slice = name, %error, "slice not stopped");
    }
}

/// A call to systemd's manager. Blocks for as long as it takes.
fn call(arguments: &[&str]) -> std::io::Result<()> {
    let output = std::process::Command::new("busctl")
        .args(["--system", "--quiet", "call"])
        .args(MANAGER)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| std::io::Error::new(e.kind(), format!("busctl: {e}; the systemd cgroup driver needs it")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(std::io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// A delay of the machine's shutdown, for as long as this lives.
#[derive(Debug)]
pub struct Inhibitor {
    _holder: Child,
}

/// Asks for such a delay; `None` where there is no systemd to ask.
pub async fn inhibit_shutdown(patience: Duration) -> Option<Inhibitor> {
    allow_delay(patience).await;
    let holder = Command::new("systemd-inhibit")
        .args(["--what=shutdown", "--mode=delay", "--who=kubelet", "--why=Kubelet needs time to handle node shutdown"])
        .args(["sleep", "infinity"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    match holder {
        Ok(holder) => Some(Inhibitor { _holder: holder }),
        Err(error) => {
            warn!(%error, "a shutdown cannot be delayed: systemd-inhibit does not run");
            None
        }
    }
}

/// Has logind wait as long as the pods may take.
async fn allow_delay(patience: Duration) {
    let ask = async |arguments: &[&str]| {
        let mut command = Command::new("busctl");
        command.args(["--system", "--json=short"]).args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(TIMEOUT, command.output()).await.ok()?.ok()?;
        serde_json::from_slice::<Value>(&output.stdout).ok()
    };
    let [service, path, interface] = LOGIN;
    let told = ask(&["get-property", service, path, interface, "InhibitDelayMaxUSec"]).await;
    let Some(allowed) = told.and_then(|v| v["data"].as_u64()) else { return };
    if Duration::from_micros(allowed) >= patience {
        return;
    }
    let text = format!("# Kubelet logind override\n[Login]\nInhibitDelayMaxSec={}\n", patience.as_secs());
    let path = std::path::Path::new(LOGIND_DROP_IN);
    let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(path, text));
    if let Err(error) = written {
        warn!(file = LOGIND_DROP_IN, %error, "the delay of a shutdown is shorter than its grace");
        return;
    }
    let [service, path, interface] = MANAGER;
    let reload = ["call", service, path, interface, "KillUnit", "ssi", "systemd-logind.service", "main", "1"];
    ask(&reload).await;
}

/// Sends true when a shutdown is about to begin, false when it was called off. Ends when systemd cannot be listened to.
pub async fn watch_shutdown(sender: mpsc::Sender<bool>) -> std::io::Result<()> {
    let mut monitor = Command::new("busctl")
        .args(["--system", "--json=short", "monitor", "--match", SHUTDOWN])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let Some(output) = monitor.stdout.take() else { return Ok(()) };
    let mut lines = BufReader::new(output).lines();
    while let Some(line) = lines.next_line().await? {
        if let Some(begins) = parse_signal(&line)
            && sender.send(begins).await.is_err()
        {
            break;
        }
    }
    Ok(())
}

fn parse_signal(line: &str) -> Option<bool> {
    let message: Value = serde_json::from_str(line).ok()?;
    let is_ours = message["member"] == "PrepareForShutdown";
    is_ours.then(|| message["payload"]["data"][0].as_bool()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_properties() {
        let limits = pb::LinuxContainerResources {
            cpu_shares: 1024,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 1 << 20,
            ..Default::default()
        };
        let show = |p: Vec<[String; 3]>| p.into_iter().map(|[n, _, v]| format!("{n}={v}")).collect::<Vec<_>>();
        assert_eq!(
            show(properties(&limits, 99, true)),
            ["CPUWeight=39", "CPUQuotaPerSecUSec=500000", "MemoryMax=1048576", "TasksMax=99"]
        );
        let none = show(properties(&pb::LinuxContainerResources::default(), -1, false));
        assert_eq!(none, [format!("CPUQuotaPerSecUSec={INFINITY}"), format!("MemoryLimit={INFINITY}")]);
    }

    #[test]
    fn signals_are_read() {
        let line = r#"{"type":"signal","member":"PrepareForShutdown","payload":{"type":"b","data":[true]}}"#;
        assert_eq!(parse_signal(line), Some(true));
        assert_eq!(parse_signal(&line.replace("true", "false")), Some(false));
        assert_eq!(parse_signal(r#"{"member":"Other","payload":{"data":[true]}}"#), None);
        assert_eq!(parse_signal("Monitoring bus message stream."), None);
    }
}
