//! The pod network as a process, in a network namespace of its own. Needs root.

#[allow(dead_code, reason = "shared with other tests")]
mod common;
#[allow(dead_code, reason = "shared with other tests")]
#[path = "common/wires.rs"]
mod wires;

use std::process::Command;

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

#[test]
fn nodes_on_other_links_are_reached_through_a_tunnel() {
    if !wires::is_root() {
        return;
    }
    // This namespace is the router between two links, a node on each. It knows nothing of pods.
    wires::become_node();
    let nodes = [("n1", "192.0.2"), ("n2", "198.51.100")]
        .map(|(name, link)| wires::Wire::machine(name, &format!("{link}.2"), &format!("{link}.1")));
    let api = FakeApi::start_at([192, 0, 2, 1]);
    api.apply(NODES, node("n1", Some("10.244.1.0/24"), "192.0.2.2"));
    api.apply(NODES, node("n2", Some("10.244.2.0/24"), "198.51.100.2"));
    let directory = tempfile::tempdir().expect("a directory");
    let kubeconfig = api.kubeconfig(directory.path());
    let programs = [("n1", &nodes[0]), ("n2", &nodes[1])].map(|(name, machine)| {
        let cni = directory.path().join(name);
        let mut command = machine.command(env!("CARGO_BIN_EXE_pod-network"));
        command.arg(format!("--kubeconfig={}", kubeconfig.display())).arg(format!("--cni-conf-dir={}", cni.display()));
        command.args([&format!("--hostname-override={name}"), "--cluster-cidr=10.244.0.0/16"]);
        Program(command.spawn().expect("started"))
    });
    nodes[1].run("ip addr add 10.244.2.5/32 dev lo");
    nodes[1].serve_at("pod", "10.244.2.5:80".parse().expect("an address"));
    eventually("a pod behind the tunnel", || nodes[0].ask("tcp:10.244.2.5:80").starts_with("pod").then_some(()));
    // Packets of pods leave room for what the tunnel puts around them.
    let config = std::fs::read_to_string(directory.path().join("n1/10-pilothouse.conflist")).expect("a configuration");
    let config: Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!(config["plugins"][0]["mtu"], 1450);
    // The daemons may end; the tunnel stays.
    drop(programs);
    assert!(nodes[0].ask("udp:10.244.2.5:80").starts_with("pod"));
}
