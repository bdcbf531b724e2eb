//! The pod network as a process, in a network namespace of its own. Needs root.

#[allow(dead_code, reason = "shared with other tests")]
mod common;
#[allow(dead_code, reason = "shared with other tests")]
#[path = "common/wires.rs"]
mod wires;

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{FakeApi, Program, eventually};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

const NODES: &str = "/api/v1/nodes";

fn node(name: &str, cidr: Option<&str>, address: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"podCIDR": cidr},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]}})
}

fn output(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().expect("a shell");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn run(command: &str) {
    let status = Command::new("sh").args(["-ec", command]).status().expect("a shell");
    assert!(status.success(), "{command}");
}

/// Routes of ours, in short.
fn routes() -> Vec<String> {
    output("ip route show proto 201")
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

#[test]
fn a_node_gets_its_network_and_keeps_it() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("left out: needs root");
        return;
    }
    // This thread, and what it starts, live in a network of their own.
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
    run(
        "ip link set lo up; ip link add v0 type veth peer name v1; ip addr add 192.0.2.1/24 dev v0; ip link set v0 up; ip link set v1 up",
    );
    let api = FakeApi::start();
    api.apply(NODES, node("n1", None, "192.0.2.1"));
    api.apply(NODES, node("n2", Some("10.244.2.0/24"), "192.0.2.2"));
    let directory = tempfile::tempdir().expect("a directory");
    let cni = directory.path().join("net.d");
    let kubeconfig = api.kubeconfig(directory.path());
    let command = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pod-network"));
        command
            .arg(format!("--kubeconfig={}", kubeconfig.display()))
            .args(["--hostname-override=n1", "--cluster-cidr=10.244.0.0/16"])
            .arg(format!("--cni-conf-dir={}", cni.display()));
        command
    };
    let program = Program(command().spawn().expect("started"));
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(!cni.exists(), "nothing is promised before the node has its range");

    api.apply(NODES, node("n1", Some("10.244.1.0/24"), "192.0.2.1"));
    let config =
        eventually("the CNI configuration", || std::fs::read_to_string(cni.join("10-pilothouse.conflist")).ok());
    let config: Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!(config["plugins"][0]["ipam"]["ranges"][0][0]["subnet"], "10.244.1.0/24");
    assert_eq!(config["plugins"][0]["mtu"], 1500);
    assert_eq!(routes(), ["unreachable 10.244.1.0/24", "10.244.2.0/24 via 192.0.2.2 dev v0"]);
    let rules = output("nft list table inet pilothouse-pod-network");
    assert!(rules.contains("ip saddr 10.244.1.0/24 ip daddr != { 10.244.0.0/16, 224.0.0.0/4 } masquerade"), "{rules}");
    assert_eq!(output("cat /proc/sys/net/ipv4/ip_forward"), "1");

    // Nodes come, move and go.
    api.apply(NODES, node("n3", Some("10.244.3.0/24"), "192.0.2.3"));
    api.apply(NODES, node("n2", Some("10.244.2.0/24"), "192.0.2.22"));
    let want =
        ["unreachable 10.244.1.0/24", "10.244.2.0/24 via 192.0.2.22 dev v0", "10.244.3.0/24 via 192.0.2.3 dev v0"];
    eventually("the new routes", || (routes() == want).then_some(()));
    api.delete(NODES, "", "n3");
    eventually("the route of a node that is gone", || (routes().len() == 2).then_some(()));

    // The daemon may end; the network stays, and a successor takes it over.
    drop(program);
    assert_eq!(routes().len(), 2);
    run("ip route del 10.244.2.0/24");
    let program = Program(command().spawn().expect("started"));
    eventually("the repaired route", || (routes().len() == 2).then_some(()));
    drop(program);

    assert!(command().arg("--cleanup").status().expect("started").success());
    assert!(routes().is_empty() && !cni.join("10-pilothouse.conflist").exists());
    assert!(output("nft list tables").is_empty());
    assert!(command().arg("--cleanup").status().expect("started").success(), "twice is fine");
}

fn dual(name: &str, cidrs: [&str; 2], addresses: &[&str]) -> Value {
    let addresses: Vec<Value> = addresses.iter().map(|a| json!({"type": "InternalIP", "address": a})).collect();
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
        "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}, "status": {"addresses": addresses}})
}

#[test]
fn neighbours_are_reached_directly_and_nodes_on_other_links_through_a_tunnel() {
    if !wires::is_root() {
        return;
    }
    // This namespace is the router between two links, the first with two nodes, the other with one. It knows nothing of pods.
    wires::become_node();
    let places =
        [("n1", "192.0.2.2", "192.0.2.1"), ("n2", "192.0.2.3", "192.0.2.1"), ("n3", "198.51.100.2", "198.51.100.1")];
    let nodes = places.map(|(name, address, router)| wires::Wire::machine(name, address, router));
    run("ip link add b0 type bridge; ip link set b0 up; ip addr flush dev w-n1; ip addr flush dev w-n2");
    run("ip link set w-n1 master b0; ip link set w-n2 master b0; ip addr add 192.0.2.1/24 dev b0");
    for (node, address) in nodes.iter().zip(["fd01::2", "fd01::3", "fd02::2"]) {
        node.run(&format!("ip addr add {address}/64 dev eth0 nodad"));
    }
    let api = FakeApi::start_at([192, 0, 2, 1]);
    let cidrs = [1, 2, 3].map(|n| [format!("10.244.{n}.0/24"), format!("fd00:{n}::/64")]);
    // The tunnel goes over IPv4 for both families.
    for ((name, address, _), (cidrs, six)) in places.iter().zip(cidrs.iter().zip(["fd01::2", "fd01::3", "fd02::2"])) {
        api.apply(NODES, dual(name, [&cidrs[0], &cidrs[1]], &[address, six]));
    }
    let directory = tempfile::tempdir().expect("a directory");
    let kubeconfig = api.kubeconfig(directory.path());
    let start = |at: usize| {
        let (name, cni) = (places[at].0, directory.path().join(places[at].0));
        let mut command = nodes[at].command(env!("CARGO_BIN_EXE_pod-network"));
        command.arg(format!("--kubeconfig={}", kubeconfig.display())).arg(format!("--cni-conf-dir={}", cni.display()));
        command.args([&format!("--hostname-override={name}"), "--cluster-cidr=10.244.0.0/16,fd00::/48"]);
        Program(command.spawn().expect("started"))
    };
    let mut programs = [0, 1, 2].map(start);
    for (at, node) in nodes.iter().enumerate() {
        let (four, six) = (format!("10.244.{}.5", at + 1), format!("fd00:{}::5", at + 1));
        node.run(&format!("ip addr add {four}/32 dev lo; ip addr add {six}/128 dev lo nodad"));
        for ip in [four, six] {
            node.serve_at(["p1", "p2", "p3"][at], (ip.parse::<IpAddr>().expect("an address"), 80).into());
        }
    }
    let all_reach_all = || {
        for (from, node) in nodes.iter().enumerate() {
            for (to, of) in (0..3).filter(|to| *to != from).flat_map(|to| [(to, "4"), (to, "6")]) {
                let ip = |node: usize| {
                    if of == "4" { format!("10.244.{}.5", node + 1) } else { format!("fd00:{}::5", node + 1) }
                };
                let [own, target]: [IpAddr; 2] = [from, to].map(|node| ip(node).parse().expect("an address"));
                // As large as the shared link takes, and several fragments.
                for size in [10, 1400, 1450, 4000] {
                    let asked = || {
                        node.within(move || {
                            let socket = UdpSocket::bind((own, 0)).ok()?;
                            socket.set_read_timeout(Some(Duration::from_millis(500))).ok()?;
                            socket.send_to(&vec![1; size], (target, 80)).ok()?;
                            let mut answer = [0; 64];
                            let size = socket.recv(&mut answer).ok()?;
                            (answer[..size].starts_with(format!("p{}", to + 1).as_bytes())).then_some(())
                        })
                    };
                    eventually(&format!("{size} bytes from {own} to {target}"), asked);
                }
            }
        }
    };
    all_reach_all();
    let on = |node: usize, command: &str| {
        let shown = nodes[node].command("sh").args(["-c", command]).output().expect("a shell").stdout;
        String::from_utf8_lossy(&shown).split_whitespace().collect::<Vec<_>>().join(" ")
    };
    for (node, question, expected) in [
        (0, "ip route get 10.244.2.5", "via 192.0.2.3 dev eth0"),
        (0, "ip route get fd00:2::5", "via fd01::3 dev eth0"),
        (0, "ip route get 10.244.3.5", "dev pilothouse0"),
        (0, "ip route get fd00:3::5", "dev pilothouse0"),
        (2, "ip route get 10.244.2.5", "dev pilothouse0"),
        (2, "ip link show dev pilothouse0", "mtu 1500"),
        (2, "ip link show dev eth0", "mtu 1500"),
    ] {
        assert!(on(node, question).contains(expected), "{question}: {}", on(node, question));
    }
    // Pods that speak IPv6 have what fits the tunnel.
    let config = std::fs::read_to_string(directory.path().join("n1/10-pilothouse.conflist")).expect("a configuration");
    let config: Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!(config["plugins"][0]["mtu"], 1450);
    pods_of_one_mtu_speak_directly_and_through_the_tunnel(&nodes);

    // Of a node that goes nothing stays.
    let known = "ip neigh show dev pilothouse0; bridge fdb show dev pilothouse0";
    api.apply(NODES, dual("n4", ["10.244.4.0/24", "fd00:4::/64"], &["198.51.100.9", "fd02::9"]));
    eventually("the tunnel leads to a node", || on(0, known).contains("198.51.100.9").then_some(()));
    api.delete(NODES, "", "n4");
    let gone = |shown: &str| !["198.51.100.9", "10.244.4.0", "fd00:4::"].iter().any(|entry| shown.contains(entry));
    eventually("to a node that is gone no more", || gone(&on(0, known)).then_some(()));
    assert!(on(0, known).contains("198.51.100.2") && on(0, known).contains("fd00:3::"), "{}", on(0, known));
    // The API server may go, and a daemon start without it; then all daemons may end: the network stays.
    api.go_away(true);
    programs[0] = start(0);
    std::thread::sleep(Duration::from_secs(1));
    all_reach_all();
    drop(programs);
    all_reach_all();
    api.go_away(false);
    let _successor = start(0);
    api.delete(NODES, "", "n3");
    eventually("a tunnel to nobody is taken away", || {
        (!on(0, "ip link").contains("pilothouse0") && !on(0, "ip route").contains("10.244.3.0")).then_some(())
    });
}

/// On links of their own, as the runtime makes them.
fn pods_of_one_mtu_speak_directly_and_through_the_tunnel(nodes: &[wires::Wire; 3]) {
    const BYTES: usize = 300_000;
    let pod = |at: usize| {
        let (four, six) = (format!("10.244.{}.9", at + 1), format!("fd00:{}::9", at + 1));
        nodes[at].within(move || wires::Wire::pod(["q1", "q2", "q3"][at], &four).and_pod(&six))
    };
    let [one, two, three] = [pod(0), pod(1), pod(2)];
    for (pod, name) in [(&two, "q2"), (&three, "q3")] {
        pod.serve(name, 80);
        // Datagrams that may not be cut on their way, each asked with once: none is lost, not even the first large one.
        let to = pod.address;
        let asked = |bytes: usize, patience: Duration| {
            one.within(move || {
                let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
                socket.set_read_timeout(Some(patience)).ok()?;
                socket.send_to(&vec![1; bytes], (to, 80)).ok()?;
                let mut answer = [0; 64];
                let size = socket.recv(&mut answer).ok()?;
                answer[..size].starts_with(name.as_bytes()).then_some(())
            })
        };
        eventually("the server is there", || asked(10, Duration::from_millis(500)));
        for packet in [1450, 1451, 1475, 1499, 1500] {
            assert!(asked(packet - 28, Duration::from_secs(20)).is_some(), "a packet of {packet} bytes to {name}");
        }
    }
    // A connection need not be told, in either direction and family.
    for pod in [&one, &three] {
        for (family, word) in [("ip", "icmp type destination-unreachable"), ("ip6", "icmpv6 type packet-too-big")] {
            let chain = format!("add chain {family} f i {{ type filter hook input priority 0; }}");
            pod.run(&format!("nft add table {family} f; nft \"{chain}\"; nft add rule {family} f i {word} drop"));
        }
        pod.run("ip route flush cache");
    }
    for (to, any) in [(three.address, "0.0.0.0:81"), ("fd00:3::9".parse().expect("an address"), "[fd00:3::9]:81")] {
        let listener = three.within(move || TcpListener::bind(any).expect("a port"));
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a connection");
            let mut all = vec![0; BYTES];
            stream.read_exact(&mut all).expect("all of it");
            stream.write_all(&all).expect("sent back");
        });
        let returned = one.within(move || {
            let mut stream = TcpStream::connect((to, 81))?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(&vec![1; BYTES])?;
            stream.read_exact(&mut vec![0; BYTES])
        });
        assert!(returned.is_ok(), "{to}: {returned:?}");
    }
}

/// The plugins of a configuration, one after the other, as a container runtime calls them.
fn call_plugins(config: &Value, verb: &str, namespace: &str, ports: &Value) {
    let mut result = Value::Null;
    for plugin in config["plugins"].as_array().expect("plugins") {
        let mut own = plugin.clone();
        (own["cniVersion"], own["name"]) = (config["cniVersion"].clone(), config["name"].clone());
        if own["capabilities"]["portMappings"] == json!(true) {
            own["runtimeConfig"] = json!({"portMappings": ports});
        }
        if !result.is_null() {
            own["prevResult"] = result.clone();
        }
        let mut child = Command::new(format!("/usr/lib/cni/{}", plugin["type"].as_str().expect("a type")))
            .envs([("CNI_COMMAND", verb), ("CNI_CONTAINERID", "pod"), ("CNI_NETNS", namespace)])
            .envs([("CNI_IFNAME", "eth0"), ("CNI_PATH", "/usr/lib/cni")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a plugin");
        child.stdin.take().expect("its input").write_all(own.to_string().as_bytes()).expect("written");
        let output = child.wait_with_output().expect("its output");
        assert!(output.status.success(), "{verb} of {}: {}", plugin["type"], String::from_utf8_lossy(&output.stdout));
        result = serde_json::from_slice(&output.stdout).unwrap_or_default();
    }
}

#[test]
fn host_ports_lead_to_pods_of_either_family() {
    if !wires::is_root() || !Path::new("/usr/lib/cni/portmap").exists() {
        return;
    }
    wires::become_node();
    let outside = wires::Wire::machine("outside", "192.0.2.2", "192.0.2.1").and_machine("fd01::2", "fd01::1");
    let api = FakeApi::start();
    api.apply(NODES, dual("n1", ["10.244.1.0/24", "fd00:1::/64"], &["192.0.2.1", "fd01::1"]));
    let directory = tempfile::tempdir().expect("a directory");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pod-network"));
    command.arg(format!("--kubeconfig={}", api.kubeconfig(directory.path()).display()));
    command.arg(format!("--cni-conf-dir={}", directory.path().display()));
    command.args(["--hostname-override=n1", "--cluster-cidr=10.244.0.0/16,fd00::/48"]);
    let _program = Program(command.spawn().expect("started"));
    let file = directory.path().join("10-pilothouse.conflist");
    let config = eventually("the CNI configuration", || std::fs::read_to_string(&file).ok());
    let mut config: Value = serde_json::from_str(&config).expect("JSON");
    // The register of addresses is this test's own.
    config["plugins"][0]["ipam"]["dataDir"] = json!(directory.path().join("networks"));
    let pod = wires::Wire::bare("pod", "10.244.1.2");
    let port = |protocol: &str| json!({"hostPort": 8080, "containerPort": 80, "protocol": protocol});
    let ports = json!([port("tcp"), port("udp")]);
    call_plugins(&config, "ADD", &pod.namespace(), &ports);
    pod.serve_at("pod4", ([0; 4], 80).into());
    pod.run("echo 1 >/proc/sys/net/ipv6/bindv6only");
    pod.serve_at("pod6", ([0u16; 8], 80).into());
    for protocol in ["tcp", "udp"] {
        for (at, name) in [("192.0.2.1", "pod4"), ("[fd01::1]", "pod6")] {
            let to = format!("{protocol}:{at}:8080");
            eventually(&to, || outside.ask(&to).starts_with(name).then_some(()));
        }
    }
    // The pod itself too.
    assert!(pod.ask("tcp:192.0.2.1:8080").starts_with("pod4") && pod.ask("tcp:[fd01::1]:8080").starts_with("pod6"));
    let mut backwards = config.clone();
    backwards["plugins"].as_array_mut().expect("plugins").reverse();
    call_plugins(&backwards, "DEL", &pod.namespace(), &ports);
    assert_eq!(outside.ask("tcp:192.0.2.1:8080"), "refused");
}
