//! The hosts themselves: what the other tests stand on.
use integration_tests::{Host, Lab, can_run_hosts};

#[test]
fn hosts_are_apart_and_reach_each_other() {
    if !can_run_hosts("hosts_are_apart_and_reach_each_other") {
        return;
    }
    let lab = Lab::new("hosts");
    let (one, mut two) = (Host::start(&lab, 1), Host::start(&lab, 2));
    assert_eq!(one.exec("hostname").success().trim(), "host-1");
    one.exec("echo one >/etc/kubernetes/mine; echo one >/etc/motd").success();
    two.exec("test ! -e /etc/kubernetes/mine && ! grep -qs one /etc/motd").success();
    assert!(!std::path::Path::new("/etc/kubernetes/mine").exists());
    let listening =
        two.command("socat").args(["-u", "TCP-LISTEN:9000", "OPEN:/root/heard,creat"]).spawn().expect("socat");
    reach(&one);
    let ended = listening.wait_with_output().expect("socat");
    assert!(ended.status.success());

    two.exec("echo kept >/var/lib/kubelet/kept; sleep 1000 >/dev/null 2>&1 &").success();
    two.power_off();
    two.power_on();
    assert_eq!(two.exec("cat /var/lib/kubelet/kept").success().trim(), "kept");
    assert_eq!(two.exec("pgrep -x sleep | wc -l").success().trim(), "1", "only the first process's own is there");
}

/// A connection from one host to the other is accepted.
fn reach(one: &Host) {
    let reached = (0..50).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        one.exec("exec 3<>/dev/tcp/10.200.0.12/9000").code == 0
    });
    assert!(reached, "host-2 is not reached from host-1");
}
