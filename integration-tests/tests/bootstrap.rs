//! `bootstrap quickstart` and `bootstrap reset` as a person runs them, twice in a row: the cluster comes up and serves the
//! application, a second run leaves what is well alone, and after a reset the machine is as it was.
use integration_tests::{Cluster, Output, Setup, can_run_hosts, requests};
use std::{collections::HashSet, net::SocketAddr};

/// What a machine is made of, as far as set-up touches it.
const PICTURE: &str = r"
    find /etc /usr/local /root /run /var/lib /var/log -xdev \( -path /run/netns -o -path /run/lock \) -prune -o -print 2>/dev/null |
        grep -v -e '^/root/\.cargo' -e '^/run/xtables.lock' -e '^/run/mount' -e '^/root/\.kube/cache' | sort
    ip -o link | cut -d: -f2 | cut -d@ -f1 | sort
    ip route show | sort
    nft list ruleset
    awk '{print $2}' /proc/self/mounts | grep -v -e '^/sys/' -e '^/proc' -e '^/dev' | sort
    cat /proc/sys/net/ipv4/ip_forward";

#[tokio::test]
async fn quickstart_and_reset_twice_in_a_row() {
    if !can_run_hosts("quickstart_and_reset_twice_in_a_row") {
        return;
    }
    let cluster = Cluster::start("bootstrap", Setup::BareHost).await;
    let host = &cluster.hosts[0];
    let before = host.exec(PICTURE).success();
    for round in 1..=2 {
        let printed = told(round, cluster.bootstrap(0, "quickstart"));
        assert!(printed.contains("sudo ./bootstrap join"), "it prints how to join: {printed}");
        told(round, cluster.bootstrap(0, "status"));
        let port = cluster.ctl("get service httpd-app -o jsonpath={.spec.ports[0].nodePort}").success();
        let address = SocketAddr::new(host.address().into(), port.trim().parse().expect("a node port"));
        let page = requests::get(address).expect("the page through the node port");
        assert!(page.contains("httpd-app 1.0"), "{page}");
        let ready = cluster.ctl("get deployment httpd-app -o jsonpath={.status.readyReplicas}").success();
        assert_eq!(ready.trim(), "2");
        if round == 1 {
            let processes = "cat /run/pilothouse/*.pid | sort";
            let running = host.exec(processes).success();
            told(round, cluster.bootstrap(0, "quickstart"));
            assert_eq!(host.exec(processes).success(), running, "a second run restarted what ran well");
        }
        told(round, cluster.bootstrap(0, "reset --force"));
        let left =
            host.exec("ps -eo args= | grep -E 'pilothouse/|[c]ontainerd|[e]tcd ' | grep -v -E 'init|grep|bash'").stdout;
        assert_eq!(left.trim(), "", "processes are left after reset");
        let after = host.exec(PICTURE).success();
        let changed: Vec<&str> = differences(&before, &after);
        assert!(changed.is_empty(), "reset left the machine other than it was: {changed:#?}");
    }
}

/// Standard output of a run that must have succeeded.
fn told(round: u8, output: Output) -> String {
    assert_eq!(output.code, 0, "round {round}:\n{}\n{}", output.stdout, output.stderr);
    output.stdout
}

/// The lines that are in one but not in the other.
fn differences<'a>(before: &'a str, after: &'a str) -> Vec<&'a str> {
    let (before, after): (HashSet<_>, HashSet<_>) = (before.lines().collect(), after.lines().collect());
    before.symmetric_difference(&after).copied().collect()
}
