//! A host: namespaces in which the default paths are private, held by a process that is the first of its process
//! namespace. When that process ends, everything on the host ends with it.
use crate::{
    Lab,
    lab::ip,
    shell::{self, Output},
};
use std::{
    fs,
    net::Ipv4Addr,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// What the host's first process does: private directories over the default paths, then reap whoever is orphaned.
const INIT: &str = r#"
set -eu
host=$1 name=$2
mount --make-rshared /
for path in etc var usr/local root; do
    mkdir -p "$host/upper/$path" "$host/work/$path"
    mount -t overlay overlay -o "lowerdir=/$path,upperdir=$host/upper/$path,workdir=$host/work/$path" "/$path"
done
# A cluster on the machine itself is none of this host's business. (What goes here goes from the overlay.)
if [ ! -e "$host/up-before" ]; then
    mountpoint -q /etc && mountpoint -q /var && mountpoint -q /usr/local && mountpoint -q /root
    rm -rf /etc/kubernetes /etc/cni /etc/containerd /usr/local/lib/pilothouse /usr/local/bin/ctl /root/.kube
    rm -rf /var/lib/pilothouse /var/lib/kube-proxy /var/lib/cni /var/log/pods /var/log/containers /var/log/pilothouse
    touch "$host/up-before"
fi
# What containerd, etcd and the kubelet write must not lie on an overlay.
for path in var/lib/containerd var/lib/kubelet var/lib/etcd; do
    mkdir -p "$host/$path" "/$path"
    mount --bind "$host/$path" "/$path"
    mount --make-rshared "/$path"
done
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/netns /run/lock /run/containerd
mount --make-rshared /run
hostname "$name"
echo "$name" >/etc/hostname
printf '127.0.0.1 localhost\n' >/etc/hosts
printf 'nameserver 127.0.0.53\n' >/etc/resolv.conf
touch "$host/up"
while :; do sleep 3600 & wait $! || :; done
"#;

/// A command on a host that takes longer than this has gone wrong.
const COMMAND_SECONDS: &str = "300";
const UP_WITHIN: Duration = Duration::from_secs(60);

/// A machine of the test.
#[derive(Debug)]
pub struct Host {
    name: String,
    address: Ipv4Addr,
    directory: PathBuf,
    cgroup: String,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    holder: Child,
    /// The first process of the host, by its number outside.
    init: u32,
}

impl Host {
    /// Starts the `number`th host of a lab, counted from one.
    pub fn start(lab: &Lab, number: u8) -> Self {
        let name = format!("host-{number}");
        let directory = lab.directory().join(&name);
        fs::create_dir_all(&directory).expect("a directory for the host");
        let cgroup = lab.cgroup(&name);
        let address = Ipv4Addr::new(10, 200, 0, 10 + number);
        let mut host = Self { name, address, directory, cgroup, running: None };
        host.power_on();
        host
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The cgroup below which everything on the host is.
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// A directory that has the same path on the host and outside.
    pub fn scratch(&self) -> &Path {
        &self.directory
    }

    /// The file that is at `path` on the host, for paths that are private to it.
    pub fn file(&self, path: &str) -> PathBuf {
        let path = path.trim_start_matches('/');
        let direct = self.directory.join(path);
        if direct.exists() { direct } else { self.directory.join("upper").join(path) }
    }

    /// Any path of the host as seen from outside, sockets included, while it is on.
    pub fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init()))
    }

    /// Ends every process on the host at once, as pulling the plug does.
    pub fn power_off(&mut self) {
        if let Some(mut running) = self.running.take() {
            // `unshare --kill-child` passes the end on to the first process, which takes all others with it.
            let _ = running.holder.kill();
            let _ = running.holder.wait();
            let gone = Instant::now();
            while Path::new("/proc").join(running.init.to_string()).exists() && gone.elapsed() < UP_WITHIN {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// Starts it with the files it had. Its programs must be started anew.
    pub fn power_on(&mut self) {
        let up = self.directory.join("up");
        let _ = fs::remove_file(&up);
        let mut command = Command::new("setpriv");
        command.args([
            "--pdeathsig",
            "KILL",
            "unshare",
            "--mount",
            "--uts",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
        ]);
        command.args(["--mount-proc", "--propagation", "slave", "bash", "-c", INIT, "init"]);
        command.arg(&self.directory).arg(&self.name);
        let log = fs::File::create(self.directory.join("init.log")).expect("a log for the host");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let holder = command.spawn().expect("a host's first process");
        let started = Instant::now();
        while !up.exists() {
            let log = || fs::read_to_string(self.directory.join("init.log")).unwrap_or_default();
            assert!(started.elapsed() < UP_WITHIN, "{} did not come up: {}", self.name, log());
            std::thread::sleep(Duration::from_millis(20));
        }
        let children = format!("/proc/{0}/task/{0}/children", holder.id());
        let init = fs::read_to_string(&children).ok().and_then(|text| text.trim().parse().ok());
        self.running = Some(Running { holder, init: init.expect("the host's first process") });
        self.connect();
    }

    fn connect(&self) {
        let (name, address) = (&self.name, self.address);
        // Of a host that was powered off; it goes with the host's network, but not at once.
        let _ = shell::run(Command::new("ip").args(["link", "delete", name]));
        ip(&format!("link add {name} type veth peer name eth0 netns {}", self.init()));
        ip(&format!("link set {name} master br0 up"));
        for command in [
            "ip link set lo up".to_owned(),
            format!("ip addr add {address}/24 dev eth0"),
            "ip link set eth0 up".to_owned(),
            "ip route add default via 10.200.0.1".to_owned(),
        ] {
            self.exec(&command).success();
        }
    }

    /// Runs a command line of bash on the host, to its end.
    #[track_caller]
    pub fn exec(&self, script: &str) -> Output {
        shell::run(self.command("bash").args(["-c", script]))
    }

    /// A command that runs on the host.
    pub fn command(&self, program: &str) -> Command {
        self.enter(&["timeout", COMMAND_SECONDS], program)
    }

    /// As [`Host::command`], for a program that runs for as long as the host does.
    pub fn command_without_limit(&self, program: &str) -> Command {
        self.enter(&["setpriv", "--pdeathsig", "KILL"], program)
    }

    fn enter(&self, wrapper: &[&str], program: &str) -> Command {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).args(["nsenter", "-t", &self.init().to_string()]);
        command.args(["-m", "-u", "-n", "-p", "--wd=/", "--", program]);
        command.env("KUBECONFIG", "/etc/kubernetes/admin.conf").env("HOME", "/root");
        command
    }

    /// Runs `work` on a thread in the host's network.
    pub fn in_network<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let network = fs::File::open(format!("/proc/{}/ns/net", self.init())).expect("the host's network");
        std::thread::spawn(move || {
            nix::sched::setns(network.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)
                .expect("entering the host's network");
            work()
        })
    }

    fn init(&self) -> u32 {
        self.running.as_ref().map(|r| r.init).expect("the host is powered on")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.power_off();
    }
}
