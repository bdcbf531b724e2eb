//! `kubelet`: the Kubernetes node agent.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use component_base::cli::{self, Ignored};
use component_base::daemon;
use kubelet::options::Flags;

/// Flags of Kubernetes' kubelet that have no meaning here.
const IGNORED: &[Ignored] = &[
    Ignored::Value("pod-infra-container-image"),
    Ignored::Value("container-runtime"),
    Ignored::Value("network-plugin"),
    Ignored::Value("cni-bin-dir"),
    Ignored::Value("cni-conf-dir"),
    Ignored::Value("cloud-config"),
    Ignored::Value("runtime-cgroups"),
    Ignored::Value("root-dir-permissions"),
    Ignored::Value("seccomp-profile-root"),
    Ignored::Value("lock-file"),
    Ignored::Value("log-flush-frequency"),
    Ignored::Value("vmodule"),
    Ignored::Value("minimum-container-ttl-duration"),
    Ignored::Value("maximum-dead-containers"),
    Ignored::Value("maximum-dead-containers-per-container"),
    Ignored::Bool("exit-on-lock-contention"),
    Ignored::Bool("allow-privileged"),
    Ignored::Bool("logtostderr"),
    Ignored::Value("experimental-mounter-path"),
    Ignored::Bool("keep-terminated-pod-volumes"),
    Ignored::Bool("register-schedulable"),
    Ignored::Bool("experimental-allocatable-ignore-eviction"),
];

fn main() -> ExitCode {
    let flags: Flags = cli::parse(IGNORED);
    let verbosity = kubelet::config::verbosity(&flags);
    match flags.hollow {
        Some(count) => {
            daemon::run("kubelet", verbosity, async |shutdown| kubelet::hollow::run(flags, count, shutdown).await)
        }
        // Most of what happens on a node happens in the runtime's processes.
        None => daemon::run_on_one_thread("kubelet", verbosity, async |shutdown| kubelet::run(flags, shutdown).await),
    }
}
