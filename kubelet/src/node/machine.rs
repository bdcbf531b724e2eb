//! The machine: its size, its system, its addresses.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::path::Path;

use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::NodeSystemInfo;
use nix::sys::statvfs::statvfs;
use nix::sys::utsname::uname;

use crate::config::KubeletConfiguration;
use crate::eviction::Amount;

/// What the machine has.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    pub milli_cpu: i64,
    pub memory_bytes: i64,
    pub disk_bytes: i64,
    /// Pages of each size: `hugepages-2Mi` and bytes.
    pub huge_pages: BTreeMap<String, i64>,
}

impl Machine {
    pub fn read(root_dir: &Path) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |n| i64::try_from(n.get()).unwrap_or(1));
        let disk = statvfs(root_dir).map_or(0, |s| {
            let bytes = s.blocks().saturating_mul(s.fragment_size());
            i64::try_from(bytes).unwrap_or(i64::MAX)
        });
        Self {
            milli_cpu: cpus * 1000,
            memory_bytes: mem_total(&fs::read_to_string("/proc/meminfo").unwrap_or_default()).unwrap_or(0),
            disk_bytes: disk,
            huge_pages: huge_pages(Path::new("/sys/kernel/mm/hugepages")),
        }
    }

    /// Everything the machine has, as the node reports it.
    pub fn capacity(&self, config: &KubeletConfiguration) -> BTreeMap<String, Quantity> {
        let per_core = i64::from(config.pods_per_core) * (self.milli_cpu / 1000);
        let max_pods = i64::from(config.max_pods);
        let max_pods = if per_core > 0 { per_core.min(max_pods) } else { max_pods };
        let mut out: BTreeMap<String, Quantity> = [
            ("cpu".to_owned(), Quantity::from_milli(self.milli_cpu)),
            ("memory".to_owned(), Quantity::from_bytes(self.memory_bytes / 1024 * 1024)),
            ("ephemeral-storage".to_owned(), Quantity::from_bytes(self.disk_bytes / 1024 * 1024)),
            ("pods".to_owned(), Quantity::from_value(max_pods)),
        ]
        .into();
        out.extend(self.huge_pages.iter().map(|(name, bytes)| (name.clone(), Quantity::from_bytes(*bytes))));
        out
    }

    /// What is left for pods: less what is reserved, and what eviction keeps free.
    pub fn allocatable(&self, config: &KubeletConfiguration) -> BTreeMap<String, Quantity> {
        let mut out = self.capacity(config);
        let parse = |text: &String| Quantity::parse(text).ok();
        for reserved in [&config.system_reserved, &config.kube_reserved] {
            for (name, amount) in reserved {
                if let (Some(have), Some(less)) = (out.get_mut(name), parse(amount)) {
                    *have = subtract(name, have, &less);
                }
            }
        }
        for (signal, name, total) in [
            ("memory.available", "memory", self.memory_bytes),
            ("nodefs.available", "ephemeral-storage", self.disk_bytes),
        ] {
            let kept = config.eviction_hard.get(signal).and_then(|t| Amount::parse(t)).map(|amount| amount.of(total));
            if let (Some(have), Some(less)) = (out.get_mut(name), kept) {
                *have = subtract(name, have, &Quantity::from_bytes(less));
            }
        }
        out
    }
}

/// What is free of the machine, and how much there is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Free {
    pub memory: Option<(u64, u64)>,
    pub pids: Option<(u64, u64)>,
}

/// Looks at the machine now.
pub fn free() -> Free {
    Free { memory: free_memory(&fs::read_to_string("/proc/meminfo").unwrap_or_default()), pids: free_pids() }
}

fn free_memory(meminfo: &str) -> Option<(u64, u64)> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let available = line.split_whitespace().next()?.parse::<u64>().ok()? * 1024;
    Some((available, u64::try_from(mem_total(meminfo)?).ok()?))
}

/// Process IDs: the kernel's limit less the threads there are (`/proc/loadavg` counts them).
fn free_pids() -> Option<(u64, u64)> {
    let capacity: u64 = fs::read_to_string("/proc/sys/kernel/pid_max").ok()?.trim().parse().ok()?;
    let load = fs::read_to_string("/proc/loadavg").ok()?;
    let threads: u64 = load.split_whitespace().nth(3)?.split('/').nth(1)?.parse().ok()?;
    Some((capacity.saturating_sub(threads), capacity))
}

fn subtract(name: &str, have: &Quantity, less: &Quantity) -> Quantity {
    if name == "cpu" {
        Quantity::from_milli((have.milli_value() - less.milli_value()).max(0))
    } else {
        Quantity::from_bytes((have.value() - less.value()).max(0))
    }
}

/// All swap of the machine.
pub fn swap_bytes() -> i64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|l| l.strip_prefix("SwapTotal:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<i64>().ok()).unwrap_or(0).saturating_mul(1024)
}

fn mem_total(meminfo: &str) -> Option<i64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<i64>().ok()?.checked_mul(1024)
}

pub(crate) fn huge_pages(dir: &Path) -> BTreeMap<String, i64> {
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let kilobytes =
            name.strip_prefix("hugepages-").and_then(|n| n.strip_suffix("kB")).and_then(|n| n.parse::<i64>().ok());
        let Some(kilobytes) = kilobytes else { continue };
        let count: i64 =
            fs::read_to_string(entry.path().join("nr_hugepages")).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0);
        let size = Quantity::from_bytes(kilobytes * 1024);
        out.insert(format!("hugepages-{size}"), count * kilobytes * 1024);
    }
    out
}

/// The machine's identity and software.
pub fn system_info(runtime: &str) -> NodeSystemInfo {
    let read = |path: &str| fs::read_to_string(path).map(|t| t.trim().to_owned()).unwrap_or_default();
    let machine_id = [read("/etc/machine-id"), read("/var/lib/dbus/machine-id")].into_iter().find(|s| !s.is_empty());
    let machine_id = machine_id.unwrap_or_default();
    let uuid = read("/sys/class/dmi/id/product_uuid");
    let kernel = uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    NodeSystemInfo {
        system_uuid: if uuid.is_empty() { machine_id.clone() } else { uuid },
        machine_id,
        boot_id: read("/proc/sys/kernel/random/boot_id"),
        kernel_version: kernel,
        os_image: os_image(&read("/etc/os-release")),
        container_runtime_version: runtime.to_owned(),
        kubelet_version: VERSION.to_owned(),
        kube_proxy_version: String::new(),
        operating_system: "linux".to_owned(),
        architecture: architecture().to_owned(),
        swap: Some(k8s_openapi::api::core::v1::NodeSwapStatus { capacity: Some(swap_bytes()) }),
    }
}

/// The release of Kubernetes whose behaviour this is.
pub const VERSION: &str = "v1.36.0";

fn os_image(os_release: &str) -> String {
    os_release
        .lines()
        .find_map(|l| l.strip_prefix("PRETTY_NAME="))
        .map_or_else(|| "Linux".to_owned(), |name| name.trim_matches('"').to_owned())
}

/// Go's name of the processor architecture.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The node's name: as given, else the host's, in lower case.
pub fn node_name(given: Option<&str>) -> String {
    let name = match given {
        Some(name) => name.to_owned(),
        None => nix::unistd::gethostname().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
    };
    name.trim().to_lowercase()
}

/// The node's addresses: as given, else the one from which the rest of the world is reached, else the first of any interface.
pub fn addresses(given: &[String]) -> Vec<String> {
    let wanted: Vec<String> =
        given.iter().filter(|a| a.parse::<IpAddr>().is_ok_and(|ip| !ip.is_unspecified())).cloned().collect();
    if !wanted.is_empty() {
        return wanted;
    }
    outgoing().or_else(first_of_interfaces).map(|ip| ip.to_string()).into_iter().collect()
}

/// The source address of the default route. Nothing is sent.
fn outgoing() -> Option<IpAddr> {
    for (local, remote) in [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")] {
        let address = UdpSocket::bind(local).and_then(|s| s.connect(remote).and_then(|()| s.local_addr()));
        if let Ok(address) = address
            && !address.ip().is_loopback()
            && !address.ip().is_unspecified()
        {
            return Some(address.ip());
        }
    }
    None
}

fn first_of_interfaces() -> Option<IpAddr> {
    let all: Vec<IpAddr> = nix::ifaddrs::getifaddrs()
        .ok()?
        .filter_map(|i| {
            let address = i.address?;
            let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        })
        .filter(|ip| !ip.is_loopback())
        .collect();
    all.iter().find(|ip| ip.is_ipv4()).or_else(|| all.first()).copied()
}

/// The lowest OOM score that may be set from here: without CAP_SYS_RESOURCE, nothing below our own.
pub fn lowest_oom_score_adj() -> i64 {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective =
        status.lines().find_map(|l| l.strip_prefix("CapEff:")).and_then(|h| u64::from_str_radix(h.trim(), 16).ok());
    if effective.is_none_or(|caps| caps & (1 << CAP_SYS_RESOURCE) != 0) {
        return -1000;
    }
    fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocatable_is_capacity_less_reservations_and_thresholds() {
        let machine =
            Machine { milli_cpu: 4000, memory_bytes: 8 << 30, disk_bytes: 100 << 30, huge_pages: BTreeMap::new() };
        let config = KubeletConfiguration {
            system_reserved: [("cpu".to_owned(), "500m".to_owned()), ("memory".to_owned(), "1Gi".to_owned())].into(),
            eviction_hard: [
                ("memory.available".to_owned(), "1Gi".to_owned()),
                ("nodefs.available".to_owned(), "10%".to_owned()),
            ]
            .into(),
            ..Default::default()
        };
        let left = machine.allocatable(&config);
        assert_eq!(left["cpu"].milli_value(), 3500);
        assert_eq!(left["memory"].value(), 6 << 30);
        assert_eq!(left["ephemeral-storage"].value(), 90 << 30);
        assert_eq!(left["pods"].value(), 110);
        // So many for each processor, but no more than there may be.
        for (pods_per_core, pods) in [(0, 110), (10, 40), (100, 110)] {
            let config = KubeletConfiguration { pods_per_core, ..Default::default() };
            assert_eq!(machine.capacity(&config)["pods"].value(), pods);
        }
    }

    #[test]
    fn free_memory_is_what_the_kernel_can_give() {
        let meminfo = "MemTotal: 1000 kB\nMemAvailable: 400 kB\n";
        assert_eq!(free_memory(meminfo), Some((400 * 1024, 1000 * 1024)));
    }

    #[test]
    fn sizes_and_names_are_read_from_the_system() {
        assert_eq!(mem_total("MemFree: 1 kB\nMemTotal:       2048 kB\n"), Some(2048 * 1024));
        assert_eq!(os_image("NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n"), "Debian GNU/Linux 12");
        assert_eq!(node_name(Some("Node-A")), "node-a");
    }
}
