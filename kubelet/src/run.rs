//! Puts the kubelet together: configuration, runtime, identity, sources of pods, workers, node, server.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use apimachinery::quantity::Quantity;
use component_base::backoff::Backoff;
use component_base::events::{Recorder, Type};
use component_base::feature_gates::{Feature, FeatureGates};
use component_base::informer::Informer;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Api;
use kube::api::WatchParams;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::allocation::topology::Topology;
use crate::allocation::{Allocator, Policies};
use crate::config::{self, KubeletConfiguration};
use crate::csi::Csi;
use crate::dra::Dra;
use crate::events::Events;
use crate::eviction::{Evictor, Shortage};
use crate::hollow;
use crate::housekeeping::Housekeeping;
use crate::images::providers::Providers;
use crate::images::pulled::PulledRecords;
use crate::images::{Puller, collector};
use crate::node::{self, Facts, NodeKeeper, kernel, machine};
use crate::objects::Objects;
use crate::options::Flags;
use crate::pod_workers::admission::Allocatable;
use crate::pod_workers::{Means, PodWorkers};
use crate::runtime::cgroups::{Cgroups, Hierarchies};
use crate::runtime::cri::Cri;
use crate::runtime::pods::uid_of;
use crate::runtime::resources::{CpuQuota, Kernel, MemoryQos};
use crate::runtime::{NodeSettings, Runtime, RuntimeWatch, dns, security};
use crate::shutdown::{self, Shutdown};
use crate::static_pods::{self, Mirrors};
use crate::status::StatusManager;
use crate::usage::claims::ClaimStats;
use crate::volumes::{PodCertificates, Volumes};
use crate::{certificates, env, metrics, plugins, probes, runtime, server};

const USER_AGENT: &str = "kubelet/v1.36.0 (linux) pilothouse";
/// Changes of the API's pods that wait to be handed to workers.
const POD_QUEUE: usize = 4096;
const RUNTIME_QUEUE: usize = 1024;

/// Runs the kubelet until shutdown. Pods go on running after it.
pub async fn run(flags: Flags, shutdown: CancellationToken) -> anyhow::Result<()> {
    let mut config = config::load(&flags)?;
    hollow::adjust(&mut config, &flags);
    let config = Arc::new(config);
    let hostname = machine::node_name(None);
    let name = machine::node_name(flags.hostname_override.as_deref());
    let addresses = machine::addresses(&flags.node_ip);
    std::fs::create_dir_all(flags.root_dir.join("pods"))
        .with_context(|| format!("root directory {}; set another with --root-dir", flags.root_dir.display()))?;
    metrics::tell_node(&name);
    info!(node = %name, ?addresses, runtime = %config.container_runtime_endpoint, "configured");
    let swap = std::fs::read_to_string("/proc/swaps").unwrap_or_default().lines().count() > 1;
    anyhow::ensure!(!(config.fail_swap_on && swap), "swap is on: turn it off (swapoff -a), or set failSwapOn: false");
    if config.container_runtime_endpoint != runtime::hollow::ENDPOINT {
        kernel::settle(Path::new("/proc/sys"), config.protect_kernel_defaults)?;
        kernel::allow_open_files(config.max_open_files);
    }
    serve_health(&config, shutdown.clone()).await?;

    let cri = Cri::new(&config.container_runtime_endpoint, Some(&config.image_service_endpoint))?
        .with_timeout(config.runtime_request_timeout);
    let (runtime_name, runtime_version, offered) = tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        found = find_runtime(&cri) => found,
    };
    let machine = machine::Machine::read(&flags.root_dir);
    let allocatable = machine.allocatable(&config);
    let runtime = make_runtime(cri.clone(), &flags, &config, &machine, &offered).await?;
    anyhow::ensure!(
        runtime.cgroups.is_v2() || !config.fail_cgroup_v1,
        "cgroups are of version 1: use version 2, or set failCgroupV1: false"
    );
    hold_to_allocatable(&runtime.cgroups, &config, &allocatable)?;
    kernel::set_oom_score(Path::new("/proc/self/oom_score_adj"), config.oom_score_adj);

    let identity = tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        identity = certificates::client(&flags, &config, &name, shutdown.clone()) => identity?,
    };
    let client = match identity {
        Some(identity) => Some(component_base::client::connect(identity, USER_AGENT)?),
        None => {
            info!("no --kubeconfig: standalone, static pods only");
            None
        }
    };
    let events = Arc::new(match &client {
        Some(client) => {
            let recorder = Recorder::new(client.clone(), "kubelet", &name);
            Events::new(recorder, config.event_record_qps, config.event_burst)
        }
        None => Events::discard(),
    });
    let api_pods = client.as_ref().map(|client| pods_of_node(client, &name));

    let only = WatchParams::default().fields(&format!("metadata.name={name}"));
    let own_node = client.as_ref().map(|client| Informer::start(Api::<Node>::all(client.clone()), only));
    let labels = node::labels(&name, &flags.node_labels);
    let objects = Objects::new(client.clone());
    // So that the first pod need not wait for the Services that its containers are told of.
    objects.services_known().await;
    let env = env::Sources::new(objects.clone());
    env.set_allocatable(allocatable.clone());
    let parallel = match (config.serialize_image_pulls, config.max_parallel_image_pulls) {
        (true, _) => 1,
        (false, Some(most)) => usize::try_from(most).unwrap_or(1),
        (false, None) => 16,
    };
    let image_events = events.clone();
    let root_dir = absolute(&flags.root_dir);
    let pulled = PulledRecords::new(&root_dir, config.image_pull_verification.clone()).context("image pull records")?;
    let pulled = Arc::new(pulled);
    let (collector_events, own_name) = (events.clone(), name.clone());
    let tell = move |reason: &str, message: String| collector_events.node(&own_name, Type::Warning, reason, message);
    tokio::spawn(collector::run(cri.clone(), config.clone(), pulled.clone(), tell, shutdown.clone()));
    let puller = Puller::new(cri.clone(), objects.clone()).with_records(pulled);
    let puller = puller.with_limit(config.registry_pull_qps, config.registry_burst);
    let puller = puller.with_parallel_pulls(parallel).with_events(move |pod, event| {
        let kind = if event.warning { Type::Warning } else { Type::Normal };
        image_events.pod(pod, None, kind, event.reason, event.message);
    });
    let providers = match (&flags.image_credential_provider_config, &flags.image_credential_provider_bin_dir) {
        (Some(config), Some(directory)) => Some(Providers::read(config, directory)?),
        _ => None,
    };
    let puller = Arc::new(puller.with_providers(providers));
    let csi = Csi::new(client.clone(), &name, &root_dir);
    let dra = Dra::new(client.clone(), &name, &root_dir);
    let gates = FeatureGates::of(&config.feature_gates);
    let certificates = client.clone().zip(own_node.clone()).filter(|_| gates.enabled(Feature::PodCertificateRequest));
    let certificates = certificates.map(|(client, node)| PodCertificates::new(client, node, &name, events.clone()));
    let volumes =
        Volumes::new(objects, &name).with_trust(gates.enabled(Feature::ClusterTrustBundleProjection), certificates);
    let volumes = volumes.with(
        csi.clone(),
        puller.clone(),
        runtime::has_image_volumes(&runtime_name, &runtime_version),
        runtime.node.features("").recursive_read_only_mounts,
    );
    let volumes = volumes.telling(events.clone());
    volumes.set_allocatable(allocatable.clone());
    tokio::spawn(plugins::follow(root_dir.join("plugins_registry"), vec![csi, dra.clone()], shutdown.clone()));
    let lookup_pods = api_pods.clone();
    let statuses = StatusManager::start(
        client.clone(),
        Arc::new(move |namespace, name| lookup_pods.as_ref().and_then(|pods| pods.get(namespace, name))),
        shutdown.clone(),
    );
    let volumes = Arc::new(volumes);
    let host_ip = addresses.first().cloned().unwrap_or_else(|| "127.0.0.1".to_owned());
    let shortage = Shortage::default();
    let going_down = Shutdown::default();
    let topology = Topology::read();
    let policies = Policies::of(&config, &topology);
    policies.check(&topology)?;
    let allocator = Allocator::new(topology, policies, root_dir.clone());
    let (changed, mut changes) = mpsc::channel(RUNTIME_QUEUE);
    let watch = RuntimeWatch::start(runtime.clone(), changed, shutdown.clone());
    let workers = PodWorkers::new(
        Arc::new(Means {
            runtime: runtime.clone(),
            watch: watch.clone(),
            volumes: volumes.clone(),
            client: client.clone(),
            env: Arc::new(env),
            puller,
            statuses,
            events: events.clone(),
            probes: Arc::new(probes::Means { cri: cri.clone(), events: events.clone(), host_ip }),
            host_ips: addresses.clone(),
            runtime_name: runtime_name.clone(),
            max_restart_delay: config.max_container_restart_period,
            sync_frequency: config.sync_frequency,
            node: own_node.clone(),
            node_name: name.clone(),
            shortage: shortage.clone(),
            going_down: going_down.clone(),
            allocator: allocator.clone(),
            dra: dra.clone(),
            allocatable: Allocatable {
                resources: allocatable.clone(),
                unsafe_sysctls: config.allowed_unsafe_sysctls.clone(),
                strict_groups: runtime.node.strict_groups,
                apparmor: std::fs::read_to_string("/sys/module/apparmor/parameters/enabled")
                    .is_ok_and(|text| text.starts_with('Y')),
            },
        }),
        shutdown.clone(),
    );

    let (pods_of, volumes_of) = (workers.clone(), volumes.clone());
    component_base::metrics::registry().register_collector(Box::new(ClaimStats {
        pods: Box::new(move || pods_of.pods()),
        of: Box::new(move |uid, volume| volumes_of.measured(uid, volume)),
    }));
    tokio::spawn(volumes.clone().keep_measuring(
        root_dir.clone(),
        config.volume_stats_agg_period,
        config.feature_gates.get("CSIVolumeHealth").copied().unwrap_or(false),
        shutdown.clone(),
    ));
    let pods_of = workers.clone();
    tokio::spawn(allocator.clone().serve(move || pods_of.pods(), dra.clone(), shutdown.clone()));
    tokio::spawn(tell_health(workers.clone(), allocator.clone(), dra.clone(), shutdown.clone()));
    let node_changed = allocator.changed.clone();
    let (shutdown_events, own_name) = (events.clone(), name.clone());
    tokio::spawn(shutdown::follow(
        config.clone(),
        workers.clone(),
        runtime.clone(),
        going_down.clone(),
        move |message| {
            shutdown_events.node(&own_name, Type::Normal, "Shutdown", message);
            node_changed.send_replace(());
        },
        shutdown.clone(),
    ));
    let evictor = Evictor {
        workers: workers.clone(),
        runtime: runtime.clone(),
        config: config.clone(),
        shortage: shortage.clone(),
        node_name: name.clone(),
    };
    tokio::spawn(evictor.run(shutdown.clone()));
    let woken = workers.clone();
    tokio::spawn(async move {
        while let Some(uid) = changes.recv().await {
            woken.wake(&uid);
        }
    });
    let from_files = config.static_pod_path.clone();
    let from_files =
        from_files.map(|path| static_pods::watch(path, &name, config.file_check_frequency, shutdown.clone()));
    let from_url = config.static_pod_url.as_ref().map(|url| {
        let headers = config.static_pod_url_header.clone();
        static_pods::watch_url(url, headers, &name, config.http_check_frequency, shutdown.clone())
    });
    let static_sources: Vec<_> = from_files.into_iter().chain(from_url.transpose()?).collect();
    for source in &static_sources {
        tokio::spawn(follow_manifests(source.clone(), workers.clone(), shutdown.clone()));
    }
    if let Some(pods) = &api_pods {
        follow_api(pods, &workers);
    }
    let mirrors = client.clone().map(|client| Mirrors::new(client, &name));
    let housekeeping = Housekeeping {
        workers: workers.clone(),
        runtime: runtime.clone(),
        watch: watch.clone(),
        volumes: volumes.clone(),
        config: config.clone(),
        static_pods: static_sources,
        api: api_pods.clone().zip(mirrors),
    };
    tokio::spawn(housekeeping.run(shutdown.clone()));

    if let Some((client, own_node)) = client.as_ref().zip(own_node) {
        let keeper = Arc::new(NodeKeeper {
            client: client.clone(),
            facts: Facts {
                name: name.clone(),
                hostname: flags.hostname_override.clone().unwrap_or(hostname),
                addresses: addresses.clone(),
                labels,
                capacity: machine.capacity(&config),
                allocatable,
                info: machine::system_info(&format!("{runtime_name}://{runtime_version}")),
                runtime_handlers: offered.runtime_handlers,
                strict_groups: runtime.node.strict_groups,
                provider_id: Some(config.provider_id.clone()).filter(|p| !p.is_empty()),
                external_cloud: flags.cloud_provider == "external",
            },
            config: config.clone(),
            runtime: runtime.clone(),
            watch: watch.clone(),
            events,
            node: own_node,
            volumes,
            shortage,
            going_down,
            allocator,
            pod_cidr: Mutex::default(),
        });
        tokio::spawn(keeper.run(shutdown.clone()));
    } else if !config.pod_cidr.is_empty() {
        cri.update_runtime_config(&config.pod_cidr).await?;
    }
    if !config.enable_server {
        shutdown.cancelled().await;
        return Ok(());
    }
    let serving = certificates::serving(&flags, &config, client.as_ref(), &name, &addresses, shutdown.clone()).await?;
    server::serve(server::Parts { config, workers, runtime, watch, client, node_name: name }, serving, shutdown.clone())
        .await
}

/// Makes the cgroups of pods, and holds them and those of daemons to what the node has for them (`enforceNodeAllocatable`).
fn hold_to_allocatable(
    cgroups: &Cgroups,
    config: &KubeletConfiguration,
    allocatable: &BTreeMap<String, Quantity>,
) -> anyhow::Result<()> {
    let memory = allocatable.get("memory").filter(|_| config.enforces("pods"));
    cgroups
        .ensure_node(allocatable.get("cpu").map_or(0, |q| q.milli_value()), memory.map_or(0, |q| q.value()))
        .context("cgroups of pods; is --cgroup-root right, and may the kubelet write below it?")?;
    for (level, cgroup, reserved) in [
        ("system-reserved", &config.system_reserved_cgroup, &config.system_reserved),
        ("kube-reserved", &config.kube_reserved_cgroup, &config.kube_reserved),
    ] {
        // What can be had less of is shares of processors; memory cannot.
        let compressible = config.enforces(&format!("{level}-compressible"));
        if compressible || config.enforces(level) {
            let amount = |name: &str| reserved.get(name).and_then(|text| Quantity::parse(text).ok());
            let (cpu, memory) = (
                amount("cpu").map_or(0, |q| q.milli_value()),
                amount("memory").filter(|_| !compressible).map_or(0, |q| q.value()),
            );
            cgroups.hold_reserved(cgroup, cpu, memory).context("enforceNodeAllocatable")?;
        }
    }
    Ok(())
}

/// `/healthz` on localhost, from the first moment.
async fn serve_health(config: &KubeletConfiguration, shutdown: CancellationToken) -> anyhow::Result<()> {
    use component_base::serving;
    if config.healthz_port == 0 {
        return Ok(());
    }
    let address = (config.healthz_bind_address.as_str(), config.healthz_port);
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .with_context(|| format!("healthz on {}:{}; set --healthz-port", address.0, address.1))?;
    let endpoints = serving::Endpoints::default().with_check("ping", || Ok(()));
    let listening = serving::Listening { tls: None, max_connections: 64 };
    tokio::spawn(serving::serve(listener, listening, shutdown, move |request| {
        let endpoints = endpoints.clone();
        async move { endpoints.handle(request).await }
    }));
    Ok(())
}

/// Waits for the runtime; its name, version and what it offers.
async fn find_runtime(cri: &Cri) -> (String, String, proto::cri::StatusResponse) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        match cri.version().await {
            Ok(version) => {
                let offered = cri.status(false).await.unwrap_or_default();
                info!(name = %version.runtime_name, version = %version.runtime_version, "container runtime found");
                // As in image and container IDs: `1.6.20~ds1` is `1.6.20~ds1`, without a leading v.
                let number = version.runtime_version.trim_start_matches('v').to_owned();
                return (version.runtime_name, number, offered);
            }
            Err(error) => warn!(%error, "the container runtime does not answer yet"),
        }
        tokio::time::sleep(backoff.next_wait()).await;
    }
}

async fn make_runtime(
    cri: Cri,
    flags: &Flags,
    config: &KubeletConfiguration,
    machine: &machine::Machine,
    offered: &proto::cri::StatusResponse,
) -> anyhow::Result<Arc<Runtime>> {
    let hierarchies = Hierarchies::detect().context("cgroup mounts")?;
    // A runtime that says which driver it uses is followed.
    let systemd = match cri.runtime_config().await.ok().and_then(|c| c.linux) {
        Some(linux) => linux.cgroup_driver() == proto::cri::CgroupDriver::Systemd,
        None => config.cgroup_driver == "systemd",
    };
    let cgroups =
        Cgroups::new(hierarchies, &config.cgroup_root, systemd, config.cgroups_per_qos, config.pod_pids_limit);
    let host = if config.resolv_conf.is_empty() {
        dns::Resolver::default()
    } else {
        let text = std::fs::read_to_string(&config.resolv_conf)
            .with_context(|| format!("resolvConf {}; set --resolv-conf", config.resolv_conf))?;
        dns::parse_resolv_conf(&text)
    };
    let settings = NodeSettings {
        root_dir: absolute(&flags.root_dir),
        ids_per_pod: config.ids_per_pod,
        pod_logs_dir: config.pod_logs_dir.clone(),
        container_logs_dir: match config.container_runtime_endpoint == runtime::hollow::ENDPOINT {
            true => config.pod_logs_dir.clone(),
            false => PathBuf::from("/var/log/containers"),
        },
        dns: dns::NodeDns {
            cluster_dns: config.cluster_dns.clone(),
            cluster_domain: config.cluster_domain.clone(),
            host,
        },
        policy: security::NodePolicy { root_dir: absolute(&flags.root_dir), seccomp_default: config.seccomp_default },
        kernel: Kernel {
            cpu: CpuQuota { enforce: config.cpu_cfs_quota, period: config.cpu_cfs_quota_period },
            memory_capacity: machine.memory_bytes,
            cgroup_v2: cgroups.is_v2(),
            huge_pages: machine
                .huge_pages
                .keys()
                .filter_map(|n| n.strip_prefix("hugepages-"))
                .map(str::to_owned)
                .collect(),
            swap_capacity: (config.swap_behavior == "LimitedSwap").then(machine::swap_bytes),
            memory_qos: config.feature_gates.get("MemoryQoS").copied().unwrap_or(false).then(|| MemoryQos {
                throttling_factor: config.memory_throttling_factor,
                reserve: config.memory_reservation_policy == "TieredReservation",
            }),
        },
        lowest_oom_score_adj: machine::lowest_oom_score_adj(),
        handlers: offered.runtime_handlers.clone(),
        strict_groups: offered.features.is_some_and(|f| f.supplemental_groups_policy),
    };
    Ok(Runtime::new(cri, settings, cgroups))
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

fn pods_of_node(client: &kube::Client, node: &str) -> Informer<Pod> {
    let ours = WatchParams::default().fields(&format!("spec.nodeName={node}"));
    Informer::start(Api::<Pod>::all(client.clone()), ours)
}

/// Hands the API's pods to their workers. Mirrors are only pictures of static pods.
fn follow_api(pods: &Informer<Pod>, workers: &Arc<PodWorkers>) {
    let (sender, mut receiver) = mpsc::channel::<(Option<Arc<Pod>>, Option<Arc<Pod>>)>(POD_QUEUE);
    let overflow = workers.clone();
    pods.on_change(move |change| {
        let event = (change.old.cloned(), change.new.cloned());
        // A full queue is worked off here, in order of arrival as far as each pod is concerned.
        if let Err(mpsc::error::TrySendError::Full(event)) = sender.try_send(event) {
            hand_over(&overflow, event);
        }
    });
    let workers = workers.clone();
    tokio::spawn(async move {
        while let Some(event) = receiver.recv().await {
            hand_over(&workers, event);
        }
    });
}

fn hand_over(workers: &Arc<PodWorkers>, (old, new): (Option<Arc<Pod>>, Option<Arc<Pod>>)) {
    let old_is_none = old.is_none();
    // A pod of the same name and another UID: the old one is gone.
    if let Some(old) = old.filter(|old| !static_pods::is_mirror(old))
        && new.as_ref().is_none_or(|new| uid_of(new) != uid_of(&old))
    {
        workers.remove(uid_of(&old));
    }
    match new {
        // A fresh mirror is told what is known of its static pod.
        Some(mirror) if static_pods::is_mirror(&mirror) && old_is_none => {
            let namespace = mirror.metadata.namespace.as_deref().unwrap_or("default");
            workers.means().statuses.nudge(namespace, mirror.metadata.name.as_deref().unwrap_or_default());
        }
        Some(mirror) if static_pods::is_mirror(&mirror) => {}
        Some(pod) => workers.update(pod),
        None => {}
    }
}

async fn follow_manifests(
    mut source: tokio::sync::watch::Receiver<Arc<Vec<Pod>>>,
    workers: Arc<PodWorkers>,
    shutdown: CancellationToken,
) {
    let mut known: HashMap<String, Arc<Pod>> = HashMap::new();
    loop {
        let pods = source.borrow_and_update().clone();
        let now: HashMap<String, Arc<Pod>> =
            pods.iter().map(|pod| (uid_of(pod).to_owned(), Arc::new(pod.clone()))).collect();
        for uid in known.keys().filter(|uid| !now.contains_key(*uid)) {
            workers.remove(uid);
        }
        for (uid, pod) in &now {
            if known.get(uid) != Some(pod) {
                workers.update(pod.clone());
            }
        }
        known = now;
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = source.changed() => if changed.is_err() { return },
        }
    }
}

/// Wakes the workers of pods with devices when plugins or drivers have news of these: their health is part of a pod's status.
async fn tell_health(workers: Arc<PodWorkers>, allocator: Arc<Allocator>, dra: Arc<Dra>, shutdown: CancellationToken) {
    let mut devices = allocator.changed.subscribe();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            // Its sender is the allocator's, which is here.
            _ = devices.changed() => allocator.device_holders().iter().for_each(|uid| workers.wake(uid)),
            () = dra.health_changed() => dra.pods().iter().for_each(|uid| workers.wake(uid)),
        }
    }
}
