//! Hollow nodes: hundreds of kubelets in one process, over runtimes that run nothing (`runtime::hollow`). All the rest of
//! them is real: they register, renew their leases, watch their pods and report what becomes of these.

use component_base::backoff::Backoff;
use serde_json::json;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::config::KubeletConfiguration;
use crate::node::machine;
use crate::options::Flags;
use crate::runtime::hollow::ENDPOINT;

/// Between the starts of two of them.
const STAGGER: Duration = Duration::from_millis(5);
const RETRY_BASE: Duration = Duration::from_millis(500);
const RETRY_CAP: Duration = Duration::from_secs(10);

/// Runs `count` of them until shutdown.
pub async fn run(flags: Flags, count: usize, shutdown: CancellationToken) -> anyhow::Result<()> {
    let base = machine::node_name(flags.hostname_override.as_deref());
    let mut kubelets = JoinSet::new();
    for number in 0..count {
        let name = format!("{base}-{number}");
        let mut fields = flags.fields.clone();
        for (field, value) in [
            ("containerRuntimeEndpoint", json!(ENDPOINT)),
            ("imageServiceEndpoint", json!(ENDPOINT)),
            ("cgroupsPerQOS", json!(false)),
            ("enforceNodeAllocatable", json!(["none"])),
            ("healthzPort", json!(0)),
        ] {
            fields.set(field, value);
        }
        let flags = Flags {
            hollow: None,
            fields,
            root_dir: flags.root_dir.join(&name),
            cert_dir: flags.root_dir.join(&name).join("pki"),
            hostname_override: Some(name.clone()),
            ..flags.clone()
        };
        let shutdown = shutdown.clone();
        kubelets.spawn(async move {
            let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
            while let Err(error) = crate::run(flags.clone(), shutdown.clone()).await {
                warn!(node = %name, %error, "a hollow kubelet ended");
                tokio::time::sleep(backoff.next_wait()).await;
            }
        });
        tokio::time::sleep(STAGGER).await;
    }
    while kubelets.join_next().await.is_some() {}
    Ok(())
}

/// What a hollow kubelet must not do with the machine that it shares.
pub fn adjust(config: &mut KubeletConfiguration, flags: &Flags) {
    if config.container_runtime_endpoint == ENDPOINT {
        config.pod_logs_dir = flags.root_dir.join("logs");
        config.static_pod_path = None;
        config.static_pod_url = None;
        // Any that is free.
        config.port = 0;
        config.eviction_hard.clear();
        config.fail_swap_on = false;
        config.fail_cgroup_v1 = false;
    }
}
