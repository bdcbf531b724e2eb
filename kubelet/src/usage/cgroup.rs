//! The kernel's counts of a cgroup, v1 and v2.

use std::fs;
use std::path::PathBuf;

/// What the processes of a cgroup use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub cpu_nanos: u64,
    pub memory: u64,
    /// Memory less what the kernel can take back at once: by this pods are judged.
    pub working_set: u64,
    pub rss: u64,
    pub cache: u64,
    pub mapped: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
    pub swap: u64,
    pub pids: u64,
    /// Periods in which a quota was in force, those in which it held back, and for how long.
    pub cpu_periods: u64,
    pub cpu_throttled_periods: u64,
    pub cpu_throttled_nanos: u64,
}

impl Usage {
    pub fn plus(mut self, other: &Usage) -> Usage {
        self.cpu_nanos += other.cpu_nanos;
        self.memory += other.memory;
        self.working_set += other.working_set;
        self.rss += other.rss;
        self.page_faults += other.page_faults;
        self.major_page_faults += other.major_page_faults;
        self.swap += other.swap;
        self.pids += other.pids;
        self
    }

    /// Reads the cgroup that is at these directories (one for each hierarchy). None: it is not there.
    pub fn read(directories: &[PathBuf], v2: bool) -> Option<Usage> {
        if !directories.iter().any(|d| d.is_dir()) {
            return None;
        }
        let file = |name: &str| directories.iter().find_map(|d| fs::read_to_string(d.join(name)).ok());
        Some(if v2 { of_v2(file) } else { of_v1(file) })
    }
}

fn number(text: Option<String>) -> u64 {
    text.and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}

/// The value of a name in a file of `name value` lines.
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|v| v.trim().parse().ok()).unwrap_or(0)
}

fn of_v1(file: impl Fn(&str) -> Option<String>) -> Usage {
    let memory = number(file("memory.usage_in_bytes"));
    let stat = file("memory.stat").unwrap_or_default();
    let with_swap = number(file("memory.memsw.usage_in_bytes"));
    let cpu = file("cpu.stat").unwrap_or_default();
    Usage {
        cpu_nanos: number(file("cpuacct.usage")),
        memory,
        working_set: memory.saturating_sub(field(&stat, "total_inactive_file")),
        rss: field(&stat, "total_rss"),
        cache: field(&stat, "total_cache"),
        mapped: field(&stat, "total_mapped_file"),
        page_faults: field(&stat, "total_pgfault"),
        major_page_faults: field(&stat, "total_pgmajfault"),
        swap: with_swap.saturating_sub(memory),
        pids: number(file("pids.current")),
        cpu_periods: field(&cpu, "nr_periods"),
        cpu_throttled_periods: field(&cpu, "nr_throttled"),
        cpu_throttled_nanos: field(&cpu, "throttled_time"),
    }
}

fn of_v2(file: impl Fn(&str) -> Option<String>) -> Usage {
    let memory = number(file("memory.current"));
    let stat = file("memory.stat").unwrap_or_default();
    let cpu = file("cpu.stat").unwrap_or_default();
    Usage {
        cpu_nanos: field(&cpu, "usage_usec") * 1000,
        memory,
        working_set: memory.saturating_sub(field(&stat, "inactive_file")),
        rss: field(&stat, "anon"),
        cache: field(&stat, "file"),
        mapped: field(&stat, "file_mapped"),
        page_faults: field(&stat, "pgfault"),
        major_page_faults: field(&stat, "pgmajfault"),
        swap: number(file("memory.swap.current")),
        pids: number(file("pids.current")),
        cpu_periods: field(&cpu, "nr_periods"),
        cpu_throttled_periods: field(&cpu, "nr_throttled"),
        cpu_throttled_nanos: field(&cpu, "throttled_usec") * 1000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let (cpu, memory) = (dir.path().join("cpu"), dir.path().join("memory"));
        for (path, text) in [
            (cpu.join("cpuacct.usage"), "7000\n"),
            (memory.join("memory.usage_in_bytes"), "100\n"),
            (memory.join("memory.stat"), "inactive_file 1\ntotal_inactive_file 30\ntotal_rss 50\n"),
            (memory.join("pids.current"), "3\n"),
        ] {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let v1 = Usage::read(&[cpu, memory], false).unwrap();
        assert_eq!((v1.cpu_nanos, v1.memory, v1.working_set, v1.rss, v1.pids), (7000, 100, 70, 50, 3));
        let v2 = dir.path().join("v2");
        fs::create_dir(&v2).unwrap();
        fs::write(v2.join("cpu.stat"), "usage_usec 9\nnr_throttled 2\n").unwrap();
        fs::write(v2.join("memory.current"), "10\n").unwrap();
        fs::write(v2.join("memory.stat"), "anon 4\ninactive_file 20\n").unwrap();
        let v2 = Usage::read(&[v2], true).unwrap();
        assert_eq!((v2.cpu_nanos, v2.working_set, v2.rss, v2.cpu_throttled_periods), (9000, 0, 4, 2));
        assert_eq!(Usage::read(&[dir.path().join("none")], true), None);
    }
}
