//! Pilothouse on hosts, set up by `bootstrap` as a person would.
use crate::{Host, Lab, Output, eventually};
use component_base::client;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{Api, Client, api::ListParams};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// What a cluster of a test consists of.
#[derive(Clone, Copy, Debug)]
pub enum Setup {
    /// `bootstrap init` on the first host, opened for ordinary pods, and `bootstrap join` on the others.
    Hosts(u8),
    /// One host with nothing on it.
    BareHost,
}

/// Hosts with a running cluster; the first is the control plane's.
pub struct Cluster {
    // In the order of ending: hosts first.
    pub hosts: Vec<Host>,
    client: Option<Client>,
    programs: PathBuf,
    _lab: Lab,
}

impl Cluster {
    /// Sets it up and waits until every node is Ready.
    pub async fn start(test: &str, setup: Setup) -> Self {
        component_base::daemon::init(0);
        let lab = Lab::new(test);
        let count = match setup {
            Setup::Hosts(count) => count,
            Setup::BareHost => 1,
        };
        let hosts: Vec<Host> = (1..=count).map(|number| Host::start(&lab, number)).collect();
        for host in &hosts {
            host.exec(&format!("mkdir -p /etc/kubernetes/kubelet.conf.d; echo '{EVICTION}' >/etc/kubernetes/kubelet.conf.d/eviction.conf"))
                .success();
        }
        let programs = gather_programs(&lab);
        let mut cluster = Self { hosts, client: None, programs, _lab: lab };
        if let Setup::Hosts(_) = setup {
            cluster.init().await;
        }
        cluster
    }

    async fn init(&mut self) {
        let printed = cluster_or_logs(&self.hosts[0], self.bootstrap(0, "init"));
        let join = printed
            .lines()
            .map(str::trim)
            .find_map(|line| line.strip_prefix("sudo ./bootstrap "))
            .expect("a join line")
            .to_owned();
        self.connect().await;
        let name = self.hosts[0].name().to_owned();
        self.ctl(&format!("patch node {name} --type=json -p '[{{\"op\":\"remove\",\"path\":\"/spec/taints\"}}]'"))
            .success();
        for number in 1..self.hosts.len() {
            cluster_or_logs(&self.hosts[number], self.bootstrap(number, &join));
        }
        let (nodes, expected) = (Api::<Node>::all(self.client()), self.hosts.len());
        eventually("all nodes are Ready", Duration::from_secs(180), || async {
            let list = nodes.list(&ListParams::default()).await.map_err(|e| e.to_string())?;
            let ready = list.items.iter().filter(|n| is_ready(n)).count();
            if ready == expected { Ok(()) } else { Err(format!("{ready} of {expected}")) }
        })
        .await;
    }

    /// Makes the client from the control plane's admin.conf.
    pub async fn connect(&mut self) {
        let config = client::load(Some(&self.hosts[0].file("/etc/kubernetes/admin.conf"))).await.expect("admin.conf");
        self.client = Some(client::connect(config, "integration-tests").expect("a client"));
    }

    /// An administrator's client.
    pub fn client(&self) -> Client {
        self.client.clone().expect("the cluster is set up")
    }

    /// `ctl ARGUMENTS` on the control plane's host, as administrator.
    #[track_caller]
    pub fn ctl(&self, arguments: &str) -> Output {
        self.hosts[0].exec(&format!("/usr/local/lib/pilothouse/ctl {arguments}"))
    }

    /// The pods that match a label selector, in the default namespace.
    pub async fn pods(&self, selector: &str) -> Result<Vec<Pod>, String> {
        let pods = Api::<Pod>::namespaced(self.client(), "default");
        pods.list(&ListParams::default().labels(selector)).await.map(|list| list.items).map_err(|e| e.to_string())
    }

    /// Waits until `count` pods match and are Ready, none of them being deleted.
    pub async fn ready_pods(&self, selector: &str, count: usize, within: Duration) -> Vec<Pod> {
        eventually(&format!("{count} pods with {selector} are Ready"), within, || async {
            let pods = self.pods(selector).await?;
            let good = pods
                .iter()
                .filter(|p| apimachinery::pod::is_ready(p) && p.metadata.deletion_timestamp.is_none())
                .count();
            if good == count && pods.len() == count { Ok(pods) } else { Err(summary(&pods)) }
        })
        .await
    }

    /// Runs `bootstrap ARGUMENTS` on a host, with this build's programs.
    #[track_caller]
    pub fn bootstrap(&self, host: usize, arguments: &str) -> Output {
        let host = &self.hosts[host];
        let script = source().join("bootstrap");
        let mut line = format!("{} {arguments}", script.display());
        let command = arguments.split(' ').next().unwrap_or_default();
        if matches!(command, "init" | "quickstart" | "join") {
            line.push_str(&format!(
                " --background --binaries {} --node-name {} --node-ip {} --cgroup-driver cgroupfs --cgroup-root {}",
                self.programs.display(),
                host.name(),
                host.address(),
                host.cgroup()
            ));
        }
        if matches!(command, "init" | "quickstart") {
            line.push_str(&format!(" --apiserver-advertise-address {}", host.address()));
        }
        host.exec(&line)
    }

    /// Ends a component's process on a host as `kill -9` does; whatever watches over it starts it anew. One that is being
    /// started just now is waited for.
    #[track_caller]
    pub fn kill(&self, host: usize, component: &str) {
        let kill = format!("until kill -9 $(cat /run/pilothouse/{component}.pid); do sleep 0.2; done");
        self.hosts[host].exec(&format!("timeout 60 sh -c '{kill}'")).success();
    }

    /// Kills a host's kubelet, and waits until the next one answers.
    #[track_caller]
    pub fn kubelet_anew(&self, host: usize) {
        self.kill(host, "kubelet");
        self.hosts[host]
            .exec("timeout 120 sh -c 'until curl -sf http://127.0.0.1:10248/healthz; do sleep 0.2; done'")
            .success();
    }
}

/// The output of a script that must have succeeded; if it did not, with the logs of the host.
#[track_caller]
fn cluster_or_logs(host: &Host, output: Output) -> String {
    if output.code != 0 {
        let logs = host.exec("tail -n 25 /var/log/pilothouse/*.log").stdout;
        panic!("bootstrap failed on {}:\n{}\n{}\n{logs}", host.name(), output.stdout, output.stderr);
    }
    output.stdout
}

/// The root of the project.
fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// The programs of this build, those beside the tests or in `$PILOTHOUSE_BINARIES`, gathered in a directory of the lab:
/// `pause` and `httpd` are the ones that stand alone in images, built into `static/` beside the profile's directory.
fn gather_programs(lab: &Lab) -> PathBuf {
    let built = std::env::var_os("PILOTHOUSE_BINARIES").map_or_else(beside_this_program, PathBuf::from);
    let programs = lab.directory().join("programs");
    std::fs::create_dir_all(&programs).expect("a directory for the programs");
    for name in PROGRAMS {
        let standing_alone = built.with_file_name("static").join(name);
        let alone = matches!(name, "pause" | "httpd") && standing_alone.exists();
        let program = if alone { standing_alone } else { built.join(name) };
        assert!(program.exists(), "{} is not built: `./test` builds it", program.display());
        std::os::unix::fs::symlink(&program, programs.join(name)).expect("a link to a program");
    }
    programs
}

/// All hosts are on one disk, which the machine's other work may have filled far: that is not what tests are about.
const EVICTION: &str = r#"{"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
 "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
 "imageGCHighThresholdPercent": 99, "imageGCLowThresholdPercent": 98, "evictionPressureTransitionPeriod": "20s"}"#;

const PROGRAMS: [&str; 10] = [
    "apiserver",
    "controller-manager",
    "scheduler",
    "kubelet",
    "kube-proxy",
    "pod-network",
    "dns",
    "ctl",
    "pause",
    "httpd",
];

/// `target/PROFILE` of `target/PROFILE/deps/TEST`, and of a program there.
fn beside_this_program() -> PathBuf {
    let own = std::env::current_exe().expect("the path of this program");
    let directory = own.parent().expect("a directory");
    if directory.ends_with("deps") { directory.with_file_name("") } else { directory.to_owned() }
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

fn summary(pods: &[Pod]) -> String {
    let line = |p: &Pod| {
        let waiting = p.status.iter().flat_map(|s| s.container_statuses.iter().flatten());
        let reasons: Vec<_> = waiting
            .filter_map(|c| c.state.as_ref()?.waiting.as_ref())
            .map(|w| format!("{} {}", w.reason.as_deref().unwrap_or(""), w.message.as_deref().unwrap_or("")))
            .collect();
        let node = p.spec.as_ref().and_then(|s| s.node_name.as_deref()).unwrap_or("no node");
        let name = p.metadata.name.as_deref().unwrap_or("");
        format!("{name} on {node} {} {reasons:?}", apimachinery::pod::phase(p))
    };
    let lines: Vec<String> = pods.iter().map(line).collect();
    if lines.is_empty() { "no pods".to_owned() } else { lines.join("; ") }
}
