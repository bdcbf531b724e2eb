//! Files that containers leave behind: log paths and links, rotation, termination messages.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;

use super::labels::Annotated;
use super::pods::uid_of;

/// How much of a termination message, and of a log in its place, is kept.
const MAX_MESSAGE_BYTES: u64 = 4096;
const MAX_FALLBACK_BYTES: u64 = 2048;
const MAX_FALLBACK_LINES: usize = 80;

/// `<base>/<namespace>_<name>_<uid>`.
pub fn pod_dir(base: &Path, pod: &Pod) -> PathBuf {
    base.join(format!(
        "{}_{}_{}",
        pod.metadata.namespace.as_deref().unwrap_or("default"),
        pod.metadata.name.as_deref().unwrap_or_default(),
        uid_of(pod)
    ))
}

/// The log of one attempt of a container.
pub fn container_log(base: &Path, pod: &Pod, container: &str, restart_count: u32) -> PathBuf {
    pod_dir(base, pod).join(container).join(format!("{restart_count}.log"))
}

/// The number of a container's next attempt, by the logs of those before. All but the last of them go. As `calcRestartCountByLogDir`.
pub fn next_attempt(base: &Path, pod: &Pod, container: &str) -> u32 {
    let directory = pod_dir(base, pod).join(container);
    let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
    let number = |name: &str| name.split('.').next()?.parse::<u32>().ok();
    let mut logs: Vec<(u32, PathBuf)> =
        entries.filter_map(|e| Some((number(e.file_name().to_str()?)?, e.path()))).collect();
    logs.sort();
    let Some((last, _)) = logs.last().cloned() else { return 0 };
    for (_, old) in logs.iter().filter(|(number, _)| *number < last) {
        let _ = fs::remove_file(old);
    }
    last.saturating_add(1)
}

/// Whether a log of the pod has so many bytes that it is to be rotated (negative: never).
pub fn any_large(pod_dir: &Path, bytes: i64) -> bool {
    let Ok(bytes) = u64::try_from(bytes) else { return false };
    let entries = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
    let mut logs = entries(pod_dir.to_owned()).flat_map(|container| entries(container.path()));
    logs.any(|log| {
        let is_log = log.path().extension().is_some_and(|e| e == "log");
        is_log && log.metadata().is_ok_and(|meta| meta.len() >= bytes)
    })
}

/// Links the log from the directory in which log collectors look.
pub fn link(links: &Path, pod: &Pod, container: &str, id: &str, log: &Path) -> io::Result<()> {
    fs::create_dir_all(links)?;
    let name = format!(
        "{}_{}_{container}-{id}.log",
        pod.metadata.name.as_deref().unwrap_or_default(),
        pod.metadata.namespace.as_deref().unwrap_or("default")
    );
    match symlink(log, links.join(name)) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Removes links whose log is gone.
pub fn remove_dead_links(links: &Path) {
    let Ok(entries) = fs::read_dir(links) else { return };
    for entry in entries.flatten() {
        if !entry.path().exists() {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// A new file for a container's termination message, writable by whoever the container runs as.
pub fn new_termination_file(pod_dir: &Path, container: &str) -> io::Result<PathBuf> {
    let dir = pod_dir.join("containers").join(container);
    fs::create_dir_all(&dir)?;
    let path = dir.join(format!("{:08x}", rand::random::<u32>()));
    fs::File::create(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
    Ok(path)
}

/// The message of an ended container: its file, or the end of its log if it asked for that. As `getTerminationMessage`.
pub fn termination_message(
    annotated: &Annotated,
    file: Option<&str>,
    exit_code: i32,
    reason: &str,
    log: &str,
) -> String {
    let written = file.and_then(|path| read_start(Path::new(path), MAX_MESSAGE_BYTES).ok()).unwrap_or_default();
    if !written.is_empty() || !annotated.fallback_to_logs || (exit_code == 0 && reason != "ContainerCannotRun") {
        return written;
    }
    let text = read_end(Path::new(log), 4 * MAX_FALLBACK_BYTES).unwrap_or_default();
    let lines: Vec<String> = text.lines().filter_map(content_of_line).collect();
    let from = lines.len().saturating_sub(MAX_FALLBACK_LINES);
    let mut out: String = lines[from..].concat();
    let limit = usize::try_from(MAX_FALLBACK_BYTES).unwrap_or(2048);
    if out.len() > limit {
        let mut at = out.len() - limit;
        while !out.is_char_boundary(at) {
            at += 1;
        }
        out.drain(..at);
    }
    out
}

/// What a container wrote, of one line of its log (`<time> <stream> <tag> <content>`).
fn content_of_line(line: &str) -> Option<String> {
    let mut parts = line.splitn(4, ' ');
    let (_, _, tag) = (parts.next()?, parts.next()?, parts.next()?);
    let content = parts.next().unwrap_or_default();
    Some(if tag.starts_with('P') { content.to_owned() } else { format!("{content}\n") })
}

fn read_start(path: &Path, limit: u64) -> io::Result<String> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn read_end(path: &Path, limit: u64) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    let skipped = length.saturating_sub(limit);
    file.seek(SeekFrom::Start(skipped))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    // A line cut at its start cannot be parsed.
    Ok(if skipped > 0 { text.split_once('\n').map_or(String::new(), |(_, rest)| rest.to_owned()) } else { text })
}

/// Moves a log that has grown beyond `max_bytes` aside, packs older ones, and keeps `max_files` in all. True if the
/// runtime must open the log anew. As `rotateLog`.
pub fn rotate(log: &Path, max_bytes: i64, max_files: i32, stamp: &str) -> io::Result<bool> {
    let size = fs::metadata(log)?.len();
    if max_bytes < 0 || i64::try_from(size).unwrap_or(i64::MAX) < max_bytes {
        return Ok(false);
    }
    let mut rotated = rotated_logs(log)?;
    for path in rotated.iter().filter(|p| p.extension().is_none_or(|e| e != "gz")) {
        compress(path)?;
    }
    rotated = rotated_logs(log)?;
    // The live log and the one made now count too.
    let keep = usize::try_from(max_files).unwrap_or(2).saturating_sub(2);
    for path in rotated.iter().take(rotated.len().saturating_sub(keep)) {
        fs::remove_file(path)?;
    }
    fs::rename(log, aside(log, stamp))?;
    Ok(true)
}

/// Takes a rotation back that the runtime did not follow: it goes on writing to the file that it has. As `rotateLatestLog`.
pub fn put_back(log: &Path, stamp: &str) -> io::Result<()> {
    if log.exists() { Ok(()) } else { fs::rename(aside(log, stamp), log) }
}

/// Where a log that is rotated at `stamp` goes.
fn aside(log: &Path, stamp: &str) -> PathBuf {
    let mut aside = log.as_os_str().to_owned();
    aside.push(format!(".{stamp}"));
    aside.into()
}

/// Rotated logs of a log, oldest first (their names carry the time).
fn rotated_logs(log: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(dir), Some(name)) = (log.parent(), log.file_name().and_then(|n| n.to_str())) else {
        return Ok(Vec::new());
    };
    let prefix = format!("{name}.");
    let mut found: Vec<PathBuf> = fs::read_dir(dir)?
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(&prefix)))
        // What was being packed when a kubelet ended is packed anew.
        .filter(|p| p.extension().is_none_or(|e| e != "tmp"))
        .collect();
    found.sort();
    Ok(found)
}

fn compress(path: &Path) -> io::Result<()> {
    let mut packed = path.as_os_str().to_owned();
    packed.push(".gz");
    let partial = path.with_extension("tmp");
    let mut encoder = flate2::write::GzEncoder::new(fs::File::create(&partial)?, flate2::Compression::fast());
    io::copy(&mut fs::File::open(path)?, &mut encoder)?;
    encoder.finish()?.flush()?;
    fs::rename(&partial, PathBuf::from(packed))?;
    fs::remove_file(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_tell_how_often_a_container_began() {
        let base = tempfile::tempdir().expect("a directory");
        let pod = Pod::default();
        assert_eq!(next_attempt(base.path(), &pod, "c"), 0);
        let directory = pod_dir(base.path(), &pod).join("c");
        fs::create_dir_all(&directory).expect("a directory");
        for name in ["0.log", "9.log", "10.log", "10.log.20260101-000000.gz"] {
            fs::write(directory.join(name), "").expect("a log");
        }
        assert_eq!(next_attempt(base.path(), &pod, "c"), 11);
        assert_eq!(fs::read_dir(&directory).expect("a directory").count(), 2);
    }

    #[test]
    fn messages_come_from_the_file_then_from_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m");
        let log = dir.path().join("0.log");
        fs::write(
            &log,
            "2026-01-01T00:00:00Z stdout F one\n2026-01-01T00:00:01Z stderr P tw\n2026-01-01T00:00:01Z stderr F o\n",
        )
        .unwrap();
        fs::write(&file, "").unwrap();
        let log = log.display().to_string();
        let path = file.display().to_string();
        let fallback = Annotated { fallback_to_logs: true, ..Default::default() };
        assert_eq!(termination_message(&fallback, Some(&path), 1, "Error", &log), "one\ntwo\n");
        assert_eq!(termination_message(&fallback, Some(&path), 0, "Completed", &log), "");
        assert_eq!(termination_message(&Annotated::default(), Some(&path), 1, "Error", &log), "");
        fs::write(&file, "bye").unwrap();
        assert_eq!(termination_message(&fallback, Some(&path), 1, "Error", &log), "bye");
    }

    #[test]
    fn rotation_keeps_the_newest_files() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        for stamp in ["1", "2", "3", "4"] {
            fs::write(&log, "x".repeat(100)).unwrap();
            assert!(rotate(&log, 50, 3, stamp).unwrap());
        }
        fs::write(&log, "short").unwrap();
        assert!(!rotate(&log, 50, 3, "5").unwrap());
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["0.log", "0.log.3.gz", "0.log.4"]);
    }

    #[test]
    fn a_log_that_is_not_opened_anew_is_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        fs::write(&log, "y".repeat(100)).unwrap();
        assert!(rotate(&log, 50, 5, "1").unwrap() && !log.exists());
        put_back(&log, "1").unwrap();
        assert_eq!(fs::read_to_string(&log).unwrap(), "y".repeat(100));
        // There is one again: it stays.
        put_back(&log, "1").unwrap();
    }
}
