//! The tour of the README, with `ctl` as it is written there and with the real `kubectl`: both must say the same.
use integration_tests::{Cluster, Setup, can_run_hosts, eventually};
use std::{path::Path, time::Duration};

/// What differs from one run to the next, is said while waiting, or is worded otherwise by older kubectls.
const NORMALIZE: &str = r"sed -E -e '/^Waiting for/d' -e '/^Warning: /d' \
    -e 's/-[bcdfghjklmnpqrstvwxz2456789]{8,10}-[bcdfghjklmnpqrstvwxz2456789]{5}/-HASH-RANDOM/g' \
    -e 's/-[bcdfghjklmnpqrstvwxz2456789]{8,10}( |$)/-HASH\1/g' -e 's/tour-[bcdfghjklmnpqrstvwxz2456789]{5}\b/tour-RANDOM/g' \
    -e 's/\b[0-9]+(\.[0-9]+){3}\b/IP/g' -e 's/\b([0-9]+d)?([0-9]+h)?([0-9]+m)?[0-9]+s\b/AGE/g' -e 's/\b[0-9]+m\b/AGE/g' \
    -e 's/ from default namespace$//' -e 's/version [12]\.0 on/version N on/' -e 's/Found [0-9]+ pods/Found N pods/' -e 's/:3[0-9]{4}\b/:PORT/g' -e 's/\b3[0-9]{4}\/TCP/PORT\/TCP/g' -e 's/[[:space:]]+/ /g' -e 's/ $//'";

#[tokio::test]
async fn the_tour_is_the_same_with_kubectl_and_ctl() {
    if !can_run_hosts("the_tour_is_the_same_with_kubectl_and_ctl") {
        return;
    }
    let commands = tour();
    assert!(commands.len() > 8, "the README has a tour: {commands:?}");
    let cluster = Cluster::start("tour", Setup::Hosts(1)).await;
    let with_ctl = take(&cluster, "/usr/local/lib/pilothouse/ctl", &commands);
    if cluster.hosts[0].exec("command -v kubectl").code != 0 {
        println!("the tour with kubectl is left out: there is no kubectl on this machine");
        return;
    }
    eventually("the pods of the first tour are gone", Duration::from_secs(60), || async {
        let left = cluster.pods("app=tour").await?.len();
        if left == 0 { Ok(()) } else { Err(format!("{left} pods")) }
    })
    .await;
    let with_kubectl = take(&cluster, "kubectl", &commands);
    for ((command, ctl), kubectl) in commands.iter().zip(with_ctl).zip(with_kubectl) {
        assert_eq!(ctl, kubectl, "ctl (left) and kubectl (right): {command}");
    }
}

/// The commands of the README's tour, without the program's name.
fn tour() -> Vec<String> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = std::fs::read_to_string(readme).expect("the README");
    let tour = text.split("## A five-minute tour").nth(1).and_then(|t| t.split("\n## ").next()).expect("a tour");
    tour.lines().filter_map(|line| line.trim().strip_prefix("$ ctl ")).map(ToOwned::to_owned).collect()
}

/// Each command's normalized lines, sorted, since the order of what happens at once is chance.
fn take(cluster: &Cluster, program: &str, commands: &[String]) -> Vec<Vec<String>> {
    commands
        .iter()
        .map(|command| {
            let output = cluster.hosts[0].exec(&format!("set -o pipefail; {program} {command} 2>&1 | {NORMALIZE}"));
            assert_eq!(output.code, 0, "{program} {command}: {} {}", output.stdout, output.stderr);
            let mut lines: Vec<String> =
                output.stdout.lines().map(ToOwned::to_owned).filter(|l| !l.is_empty()).collect();
            lines.sort();
            lines
        })
        .collect()
}
