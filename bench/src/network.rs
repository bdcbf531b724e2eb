//! `bench proxy`: the time from a change of an endpoint to the rule in place, seen by packets, and memory, with many Services,
//! in each mode. `bench dns`: what an answer costs. Both run the programs over a stand-in for the API server, in a network
//! namespace of their own, so they need root.

use crate::{
    api_stand_in::{FakeApi, Program, http},
    table,
};
use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use std::{
    net::{SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

const SERVICES: &str = "/api/v1/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
const NAMESPACES: &str = "/api/v1/namespaces";
const PATIENCE: Duration = Duration::from_secs(300);
const CHANGES: usize = 40;
/// Numbers of Services, and the megabytes that kube-proxy shall have at most then.
const MEMORY_GOALS: [(usize, &str); 2] = [(0, "8"), (1000, "15")];
const TICKS_PER_SECOND: f64 = 100.0;

#[derive(clap::Args)]
pub struct Options {
    /// Directory of the programs; default: beside this one
    #[arg(long, env = "PILOTHOUSE_BINARIES")]
    binaries: Option<PathBuf>,
    /// Numbers of Services
    #[arg(long, value_delimiter = ',', default_value = "0,100,1000,10000")]
    services: Vec<usize>,
    /// Modes of kube-proxy
    #[arg(long, value_delimiter = ',', default_value = "nftables,iptables,userspace")]
    modes: Vec<String>,
    /// Seconds for which questions are asked
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

impl Options {
    fn program(&self, name: &str) -> anyhow::Result<PathBuf> {
        let own = std::env::current_exe()?;
        let beside = own.parent().context("this program is in no directory")?;
        Ok(self.binaries.as_deref().unwrap_or(beside).join(name))
    }
}

fn shell(command: &str) -> anyhow::Result<()> {
    let status = Command::new("sh").args(["-ec", command]).status()?;
    ensure!(status.success(), "{command}");
    Ok(())
}

fn service(name: &str, cluster_ip: &str, protocol: &str) -> Value {
    let ports = json!([{"port": 80, "targetPort": 8080, "protocol": protocol}]);
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "ns"},
        "spec": {"clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "type": "ClusterIP", "ports": ports}})
}

fn slice(name: &str, protocol: &str, addresses: &[String]) -> Value {
    let endpoints: Vec<Value> =
        addresses.iter().map(|a| json!({"addresses": [a], "conditions": {"ready": true}, "nodeName": "n1"})).collect();
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "namespace": "ns", "labels": {"kubernetes.io/service-name": name}},
        "ports": [{"name": "", "port": 8080, "protocol": protocol}], "endpoints": endpoints})
}

/// So many Services of two endpoints each.
fn cluster(services: usize) -> FakeApi {
    let api = FakeApi::start();
    for i in 0..services {
        let (high, low) = (i / 250, i % 250 + 1);
        let name = format!("service-{i}");
        api.apply(SERVICES, service(&name, &format!("10.96.{high}.{low}"), "TCP"));
        api.apply(SLICES, slice(&name, "TCP", &[1, 2].map(|n| format!("10.{}.{high}.{low}", 240 + n))));
    }
    api
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        ensure!(started.elapsed() < PATIENCE, "{what}: not within {} s", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// CPU seconds of a process and the programs that it ran, and its resident megabytes.
fn usage(pid: u32) -> anyhow::Result<(f64, f64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("no name")?.1.split_whitespace().collect();
    let number = |i: usize| fields.get(i).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    Ok(((11..=14).map(number).sum::<f64>() / TICKS_PER_SECOND, number(21) * 4096.0 / 1e6))
}

pub fn proxy(options: &Options) -> anyhow::Result<()> {
    let program = options.program("kube-proxy")?;
    let mut rows = Vec::new();
    for mode in &options.modes {
        for services in &options.services {
            let (program, mode, services) = (program.clone(), mode.clone(), *services);
            let run = std::thread::spawn(move || one_proxy(&program, &mode, services));
            rows.push(run.join().map_err(|_| anyhow::anyhow!("a run failed"))??);
        }
    }
    let head = [
        "mode",
        "Services",
        "first rules ms",
        "change p50 ms",
        "change p99 ms",
        "CPU ms a change",
        "memory MB",
        "memory goal MB",
    ];
    table::print(&head, &rows);
    Ok(())
}

/// In a network of its own: two servers on its own addresses, a Service that leads to one of them, and others beside it.
fn one_proxy(program: &Path, mode: &str, services: usize) -> anyhow::Result<Vec<String>> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("a network namespace needs root")?;
    shell(
        "ip link set lo up; ip link add b0 type bridge; ip addr add 10.7.0.1/24 dev b0; ip addr add 10.7.0.2/24 dev b0",
    )?;
    shell("ip link set b0 up; ip route add default dev b0")?;
    for last in [1u8, 2] {
        let socket = UdpSocket::bind(SocketAddr::from(([10, 7, 0, last], 8080)))?;
        std::thread::spawn(move || {
            let mut word = [0; 8];
            while let Ok((_, peer)) = socket.recv_from(&mut word) {
                let _ = socket.send_to(&[last], peer);
            }
        });
    }
    let api = cluster(services);
    api.apply(SERVICES, service("probe", "10.97.0.1", "UDP"));
    let point_at = |last: u8| api.apply(SLICES, slice("probe", "UDP", &[format!("10.7.0.{last}")]));
    point_at(1);
    let directory = std::env::temp_dir().join(format!("bench-proxy-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let kubeconfig = api.kubeconfig(&directory);
    let started = Instant::now();
    let child = Command::new(program)
        .args([format!("--proxy-mode={mode}"), format!("--kubeconfig={}", kubeconfig.display())])
        .args(["--hostname-override=n1", "--cluster-cidr=10.240.0.0/12"])
        .env("RUST_LOG", "error")
        .spawn()
        .with_context(|| program.display().to_string())?;
    let pid = child.id();
    let _program = Program(child);
    let ask = || -> Option<u8> {
        // A flow of its own each time: it goes by the rules of this moment.
        let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.set_read_timeout(Some(Duration::from_millis(20))).ok()?;
        socket.connect("10.97.0.1:80").ok()?;
        socket.send(b"?").ok()?;
        let mut word = [0; 8];
        socket.recv(&mut word).ok().map(|_| word[0])
    };
    until("the first rules", || ask().filter(|last| *last == 1))?;
    let first = started.elapsed();
    // What was read at the start is worked off, and, where the memory counts, what only the start needed is given back.
    let goal = MEMORY_GOALS.iter().find(|(at, _)| *at == services).map(|(_, goal)| *goal);
    std::thread::sleep(if goal.is_some() { crate::SETTLED } else { Duration::from_millis(500) });
    let (cpu_before, memory) = usage(pid)?;
    let mut times = Vec::new();
    for turn in 0..CHANGES {
        let last = if turn % 2 == 0 { 2 } else { 1 };
        // Not in step with the least time between two changes of the rules.
        std::thread::sleep(Duration::from_millis(120));
        let changed = Instant::now();
        point_at(last);
        while ask() != Some(last) {
            ensure!(changed.elapsed() < PATIENCE, "a change is not followed");
        }
        times.push(changed.elapsed().as_secs_f64() * 1e3);
    }
    let (cpu, _) = usage(pid)?;
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    std::fs::remove_dir_all(&directory)?;
    Ok(vec![
        mode.to_owned(),
        services.to_string(),
        format!("{:.0}", first.as_secs_f64() * 1e3),
        format!("{:.1}", at(0.5)),
        format!("{:.1}", at(0.99)),
        format!("{:.1}", (cpu - cpu_before) * 1e3 / CHANGES as f64),
        format!("{memory:.1}"),
        goal.unwrap_or_default().to_owned(),
    ])
}

/// Questions of Services' names, many at once, from another thread.
pub fn dns(options: &Options) -> anyhow::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("a network namespace needs root")?;
    shell("ip link set lo up")?;
    let services = 1000;
    let api = cluster(services);
    api.apply(NAMESPACES, json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns"}}));
    let directory = std::env::temp_dir().join(format!("bench-dns-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let program = options.program("dns")?;
    let child = Command::new(&program)
        .args([format!("--kubeconfig={}", api.kubeconfig(&directory).display()), "--bind-address=127.0.0.1".into()])
        .args(["--port=53", "--metrics-bind-address=127.0.0.1:9153", "--resolv-conf=/nonexistent"])
        .env("RUST_LOG", "error")
        .spawn()
        .with_context(|| program.display().to_string())?;
    let pid = child.id();
    let _program = Program(child);
    let ready = SocketAddr::from(([127, 0, 0, 1], 9153));
    until("the cluster in view", || http(ready, "/ready").filter(|answer| answer.contains("200 OK")))?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect("127.0.0.1:53")?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let questions: Vec<Vec<u8>> =
        (0..services).map(|i| question(&format!("service-{i}.ns.svc.cluster.local"))).collect();
    let mut answer = [0; 512];
    // One at a time: how long an answer takes.
    let mut times = Vec::new();
    for question in questions.iter().cycle().take(5_000) {
        let asked = Instant::now();
        socket.send(question)?;
        let size = socket.recv(&mut answer)?;
        ensure!(size > question.len(), "an answer without an address");
        times.push(asked.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    // A window of many: what the server can do.
    let (cpu_before, _) = usage(pid)?;
    let (started, mut answers, mut open) = (Instant::now(), 0u64, 0);
    let mut next = questions.iter().cycle();
    while started.elapsed() < Duration::from_secs(options.seconds) {
        while open < 64 {
            socket.send(next.next().context("a question")?)?;
            open += 1;
        }
        socket.recv(&mut answer).context("an answer was lost")?;
        (answers, open) = (answers + 1, open - 1);
    }
    let elapsed = started.elapsed().as_secs_f64();
    let (cpu, memory) = usage(pid)?;
    let used = cpu - cpu_before;
    std::fs::remove_dir_all(&directory)?;
    let head = ["answers/s", "CPU us an answer", "answers a CPU second", "goal", "p50 us", "p99 us", "memory MB"];
    let at = |share: f64| format!("{:.0}", times[((times.len() - 1) as f64 * share) as usize]);
    let row = vec![
        format!("{:.0}", answers as f64 / elapsed),
        format!("{:.1}", used * 1e6 / answers as f64),
        format!("{:.0}", answers as f64 / used),
        "50000".to_owned(),
        at(0.5),
        at(0.99),
        format!("{memory:.1}"),
    ];
    table::print(&head, &[row]);
    Ok(())
}

/// A question of type A.
fn question(name: &str) -> Vec<u8> {
    let mut bytes = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}
