//! A node with pods as network namespaces: servers and clients in them are threads, so real packets take the kernel's way.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, Command};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage};

/// A pod, or a machine beside the node: the process that holds its namespace.
pub struct Wire {
    holder: Child,
    name: String,
    pub address: IpAddr,
}

pub fn run(command: &str) {
    let status = Command::new("sh").args(["-ec", command]).status().expect("a shell");
    assert!(status.success(), "{command}");
}

pub fn output(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().expect("a shell");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// False, with a line that says so, where namespaces cannot be made.
pub fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("left out: needs root");
    }
    root
}

/// Puts this thread, and what it starts from now on, into a node's network of its own. (Where every refusal is told: the kernel
/// else saves them.)
pub fn become_node() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
    run("ip link set lo up; echo 1 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv4/icmp_ratelimit");
    run("echo 1 >/proc/sys/net/ipv6/conf/all/forwarding; echo 0 >/proc/sys/net/ipv6/icmp/ratelimit");
}

impl Wire {
    /// A pod with a link of its own to this node, on which every packet is routed, as the CNI plugin `ptp` makes it.
    pub fn pod(name: &str, address: &str) -> Wire {
        let wire = Wire::new(name, address);
        run(&format!("ip addr add 169.254.1.1/32 dev w-{name}; ip route add {address} dev w-{name}"));
        wire.run(&format!(
            "ip addr add {address}/32 dev eth0; ip route add 169.254.1.1 dev eth0; ip route add default via 169.254.1.1"
        ));
        wire
    }

    /// A machine on a link with this node, `node/24`, to which it sends everything.
    pub fn machine(name: &str, address: &str, node: &str) -> Wire {
        let wire = Wire::new(name, address);
        run(&format!("ip addr add {node}/24 dev w-{name}"));
        wire.run(&format!("ip addr add {address}/24 dev eth0; ip route add default via {node}"));
        wire
    }

    /// A pod's address of IPv6 beside the other.
    pub fn and_pod(self, address: &str) -> Wire {
        run(&format!("ip addr add fd00:169::1/128 dev w-{0} nodad; ip route add {address}/128 dev w-{0}", self.name));
        self.run(&format!(
            "ip addr add {address}/128 dev eth0 nodad; ip route add fd00:169::1 dev eth0; ip route add default via fd00:169::1"
        ));
        self
    }

    /// A machine's address of IPv6, and the node's, beside the others.
    pub fn and_machine(self, address: &str, node: &str) -> Wire {
        run(&format!("ip addr add {node}/120 dev w-{} nodad", self.name));
        self.run(&format!("ip addr add {address}/120 dev eth0 nodad; ip route add default via {node}"));
        self
    }

    /// A namespace without a link, for a runtime to make one.
    pub fn bare(name: &str, address: &str) -> Wire {
        let holder = Command::new("unshare")
            .args(["--net", "--kill-child", "sleep", "600"])
            .spawn()
            .expect("a process for a namespace");
        let pid = holder.id();
        let own = std::fs::read_link("/proc/thread-self/ns/net").expect("a namespace");
        crate::common::eventually("a namespace of its own", || {
            std::fs::read_link(format!("/proc/{pid}/ns/net")).ok().filter(|found| *found != own)
        });
        let wire = Wire { holder, name: name.to_owned(), address: address.parse().expect("an address") };
        wire.run("ip link set lo up");
        wire
    }

    fn new(name: &str, address: &str) -> Wire {
        let wire = Wire::bare(name, address);
        let pid = wire.holder.id();
        run(&format!("ip link add name w-{name} type veth peer name eth0 netns {pid}; ip link set w-{name} up"));
        wire.run("ip link set eth0 up");
        wire
    }

    /// Where its namespace is.
    pub fn namespace(&self) -> String {
        format!("/proc/{}/ns/net", self.holder.id())
    }

    /// A command there.
    pub fn run(&self, command: &str) {
        run(&format!("nsenter --net={} sh -ec '{command}'", self.namespace()));
    }

    /// A program to be run there.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args([&format!("--net={}", self.namespace()), program]);
        command
    }

    /// `work` on a thread that is there.
    pub fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = std::fs::File::open(self.namespace()).expect("a namespace");
        std::thread::spawn(move || {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).expect("entered");
            work()
        })
        .join()
        .expect("the thread's work")
    }

    /// Servers there, over TCP and UDP, that say their name and who asked.
    pub fn serve(&self, name: &'static str, port: u16) {
        self.serve_at(name, SocketAddr::new(self.address, port));
    }

    pub fn serve_at(&self, name: &'static str, address: SocketAddr) {
        let (tcp, udp) = self.within(move || {
            (TcpListener::bind(address).expect("a TCP port"), UdpSocket::bind(address).expect("a UDP port"))
        });
        answer_streams(name, tcp);
        std::thread::spawn(move || {
            let mut word = [0; 16];
            while let Ok((_, peer)) = udp.recv_from(&mut word) {
                let _ = udp.send_to(format!("{name} {}", peer.ip()).as_bytes(), peer);
            }
        });
    }

    /// A server there over SCTP, whose streams are as TCP's.
    pub fn serve_sctp(&self, name: &'static str, address: SocketAddr) {
        let listener = self.within(move || {
            let socket = sctp(address)?;
            socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
            socket::listen(&socket, Backlog::new(16)?)?;
            Ok::<_, nix::Error>(TcpListener::from(socket))
        });
        answer_streams(name, listener.expect("a port of SCTP"));
    }

    pub fn ask(&self, to: &str) -> String {
        let to = to.to_owned();
        self.within(move || ask(&to))
    }
}

fn answer_streams(name: &'static str, listener: TcpListener) {
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let Ok(peer) = stream.peer_addr() else { continue };
            // Kept open, so that a later question on the same connection is answered too.
            std::thread::spawn(move || {
                let mut word = [0; 16];
                while stream.read(&mut word).is_ok_and(|size| size > 0) {
                    if stream.write_all(format!("{name} {}", peer.ip()).as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// A kernel that has no SCTP, or has not loaded it, has no such directory.
pub fn has_sctp() -> bool {
    std::path::Path::new("/proc/net/sctp").exists()
}

fn sctp(of: SocketAddr) -> nix::Result<OwnedFd> {
    let family = if of.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp)
}

fn connect_sctp(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::from(sctp(to)?);
    stream.set_write_timeout(Some(PATIENCE))?;
    socket::connect(stream.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(stream)
}

impl Drop for Wire {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Packets are answered within this time, or never.
const PATIENCE: Duration = Duration::from_millis(1500);

/// What a server says over `tcp:1.2.3.4:5`, `udp:…` or `sctp:…`; `refused` or `silence` if it says nothing.
pub fn ask(to: &str) -> String {
    let (protocol, address) = to.split_once(':').expect("protocol:address:port");
    let address: SocketAddr = address.parse().expect("address:port");
    let outcome = if protocol == "udp" {
        let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
        UdpSocket::bind((any, 0)).and_then(|socket| {
            socket.connect(address)?;
            ask_on_udp(&socket)
        })
    } else if protocol == "sctp" {
        connect_sctp(address).and_then(|mut stream| ask_on_tcp(&mut stream))
    } else {
        TcpStream::connect_timeout(&address, PATIENCE).and_then(|mut stream| ask_on_tcp(&mut stream))
    };
    outcome.unwrap_or_else(|error| match error.kind() {
        std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock => "silence".to_owned(),
        std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::HostUnreachable => "refused".to_owned(),
        _ => error.to_string(),
    })
}

pub fn ask_on_tcp(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"?")?;
    let mut text = [0; 128];
    let size = stream.read(&mut text)?;
    Ok(String::from_utf8_lossy(&text[..size]).into_owned())
}

pub fn ask_on_udp(socket: &UdpSocket) -> std::io::Result<String> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(b"?")?;
    let mut text = [0; 128];
    let size = socket.recv(&mut text)?;
    Ok(String::from_utf8_lossy(&text[..size]).into_owned())
}
