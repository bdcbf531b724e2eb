//! `kubelet`: the Kubernetes node agent.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use component_base::cli::{self, Ignored};
use kubelet::options::Flags;

/// Flags of Kubernetes' kubelet that have no meaning here.
const IGNORED: &[Ignored] = &[
    Ignored::Value("pod-infra-container-image"),
    Ignored::Value("container-runtime"),
    Ignored::Value("network-plugin"),
    Ignored::Value("cni-bin-dir"),
    Ignored::Value("cni-conf-dir"),
    Ignored::Value("cloud-config"),
    Ignored::Value("event-qps"),
    Ignored::Value("event-burst"),
    Ignored::Value("kube-api-qps"),
    Ignored::Value("kube-api-burst"),
    Ignored::Value("runtime-cgroups"),
    Ignored::Value("kubelet-cgroups"),
    Ignored::Value("system-cgroups"),
    Ignored::Value("runtime-request-timeout"),
    Ignored::Value("root-dir-permissions"),
    Ignored::Value("volume-plugin-dir"),
    Ignored::Value("seccomp-profile-root"),
    Ignored::Value("lock-file"),
    Ignored::Value("logging-format"),
    Ignored::Value("log-flush-frequency"),
    Ignored::Value("vmodule"),
    Ignored::Value("oom-score-adj"),
    Ignored::Value("minimum-container-ttl-duration"),
    Ignored::Value("maximum-dead-containers"),
    Ignored::Value("maximum-dead-containers-per-container"),
    Ignored::Value("tls-cipher-suites"),
    Ignored::Value("tls-min-version"),
    Ignored::Bool("protect-kernel-defaults"),
    Ignored::Bool("make-iptables-util-chains"),
    Ignored::Bool("exit-on-lock-contention"),
    Ignored::Bool("allow-privileged"),
    Ignored::Bool("logtostderr"),
    Ignored::Bool("enable-controller-attach-detach"),
    Ignored::Bool("keep-terminated-pod-volumes"),
    Ignored::Bool("runonce"),
];

fn main() -> ExitCode {
    let flags: Flags = cli::parse(IGNORED);
    component_base::daemon::run("kubelet", flags.verbosity, async |shutdown| match flags.hollow {
        Some(count) => kubelet::hollow::run(flags, count, shutdown).await,
        None => kubelet::run(flags, shutdown).await,
    })
}
