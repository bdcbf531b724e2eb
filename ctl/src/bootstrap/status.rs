//! `ctl bootstrap status`: every component of this machine with its process, its health and its log, and the node.

use std::time::Duration;

use super::components::Component;
use super::process::{self, State};
use super::wait::{self, Places, Target};

/// The time that one health check may take.
const CHECK: Duration = Duration::from_secs(3);

/// A line of the table.
#[derive(Debug)]
struct Row {
    name: String,
    process: String,
    health: String,
    log: String,
}

/// The table, and whether all that is set up is healthy.
pub(crate) async fn status(places: &Places<'_>) -> (String, bool) {
    let mut rows = Vec::new();
    let mut healthy = true;
    for component in std::iter::once(Component::Containerd).chain(Component::CONTROL_PLANE) {
        let state = process::state(component);
        if state == State::Absent {
            continue;
        }
        let health = match tokio::time::timeout(CHECK, wait::check(&Target::Component(component), places)).await {
            Ok(Ok(())) => "healthy".to_owned(),
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => format!("no answer within {}s", CHECK.as_secs()),
        };
        healthy &= health == "healthy";
        rows.push(Row {
            name: component.name().to_owned(),
            process: describe(&state),
            health,
            log: process::log(component).command(),
        });
    }
    if rows.is_empty() {
        return ("nothing is set up on this machine\n".to_owned(), false);
    }
    let node = tokio::time::timeout(CHECK, wait::check(&Target::Node, places)).await;
    let node = match node {
        Ok(Ok(())) => "Ready".to_owned(),
        Ok(Err(error)) => format!("{error:#}"),
        Err(_) => format!("no answer within {}s", CHECK.as_secs()),
    };
    healthy &= node == "Ready";
    (format!("{}\nnode {}: {node}\n", table(&rows), places.cluster.node_name().unwrap_or_default()), healthy)
}

fn describe(state: &State) -> String {
    match state {
        State::Absent => "-".to_owned(),
        State::Running { pid } => format!("pid {pid}"),
        State::Stopped(how) => how.clone(),
    }
}

fn table(rows: &[Row]) -> String {
    let heading =
        Row { name: "COMPONENT".into(), process: "PROCESS".into(), health: "HEALTH".into(), log: "LOG".into() };
    let all = || std::iter::once(&heading).chain(rows);
    let width = |column: fn(&Row) -> &str| all().map(|row| column(row).chars().count()).max().unwrap_or(0) + 3;
    let (name, process, log) = (width(|row| &row.name), width(|row| &row.process), width(|row| &row.log));
    // Health comes last: a failure's text may be long.
    all().map(|row| format!("{:name$}{:process$}{:log$}{}\n", row.name, row.process, row.log, row.health)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let row = |name: &str, process: &str, health: &str| Row {
            name: name.into(),
            process: process.into(),
            health: health.into(),
            log: format!("/var/log/{name}.log"),
        };
        let text = table(&[row("etcd", "pid 7", "healthy"), row("apiserver", "dead", "connection refused")]);
        assert_eq!(
            text,
            "COMPONENT   PROCESS   LOG                      HEALTH\n\
             etcd        pid 7     /var/log/etcd.log        healthy\n\
             apiserver   dead      /var/log/apiserver.log   connection refused\n"
        );
    }
}
