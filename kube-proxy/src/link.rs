//! A link of our own on which Services' addresses are, for the modes in which this host takes their packets in itself.
use component_base::command::{self, CommandError};
use std::{collections::BTreeSet, fmt::Write as _, net::IpAddr};
use tracing::warn;

/// Makes the link if it is not there. A dummy, or, in a kernel without those, a bridge without ports.
pub async fn ensure(name: &str) -> Result<(), CommandError> {
    if command::run("ip", &["link", "show", "dev", name], "").await.is_ok() {
        return Ok(());
    }
    let make = |kind: &'static str| async move { command::run("ip", &["link", "add", name, "type", kind], "").await };
    if let Err(error) = make("dummy").await {
        warn!(link = name, %error, "no dummy link; a bridge does as well");
        make("bridge").await?;
    }
    command::run("ip", &["link", "set", name, "up"], "").await.map(drop)
}

pub async fn remove(name: &str) {
    // Not there is as good.
    let _ = command::run("ip", &["link", "del", name], "").await;
}

/// The addresses of one family on the link.
pub async fn addresses(name: &str, ipv6: bool) -> Result<BTreeSet<IpAddr>, CommandError> {
    let family = if ipv6 { "-6" } else { "-4" };
    let listed = command::run("ip", &["-o", family, "addr", "show", "dev", name, "scope", "global"], "").await?;
    Ok(parse(&listed))
}

/// The addresses of one family of all other links, on which NodePorts are served.
pub async fn node_addresses(but: &str, ipv6: bool) -> Result<BTreeSet<IpAddr>, CommandError> {
    let family = if ipv6 { "-6" } else { "-4" };
    let listed = command::run("ip", &["-o", family, "addr", "show"], "").await?;
    let others: Vec<&str> = listed.lines().filter(|line| line.split_whitespace().nth(1) != Some(but)).collect();
    // What counts on one link only is nobody's NodePort.
    let far = |ip: &IpAddr| !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    Ok(parse(&others.join("\n")).into_iter().filter(far).collect())
}

fn parse(listed: &str) -> BTreeSet<IpAddr> {
    let address = |line: &str| line.split_whitespace().nth(3)?.split('/').next()?.parse().ok();
    listed.lines().filter_map(address).collect()
}

/// One batch that leads from `old` to `new`.
pub async fn change(name: &str, old: &BTreeSet<IpAddr>, new: &BTreeSet<IpAddr>) -> Result<(), CommandError> {
    let mut batch = String::new();
    // Writing to a string does not fail.
    for gone in old.difference(new) {
        let _ = writeln!(batch, "addr del {} dev {name}", host(gone));
    }
    for added in new.difference(old) {
        let _ = writeln!(batch, "addr add {} dev {name}", host(added));
    }
    if batch.is_empty() {
        return Ok(());
    }
    // What is there already, or gone already, must not keep the rest.
    command::run("ip", &["-force", "-batch", "-"], &batch).await.map(drop).or_else(|error| match error {
        CommandError::Refused { message, .. }
            if message.contains("File exists") || message.contains("Cannot assign") =>
        {
            Ok(())
        }
        other => Err(other),
    })
}

fn host(address: &IpAddr) -> String {
    // Without `nodad` an address of IPv6 on a link without carrier stays tentative for good.
    if address.is_ipv4() { format!("{address}/32") } else { format!("{address}/128 nodad") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_from_what_ip_prints() {
        let text = "2: d0    inet 10.7.0.1/24 scope global d0\\       valid_lft forever preferred_lft forever\n\
            2: d0    inet6 fd00::7/128 scope global nodad \\       valid_lft forever\n";
        let found: Vec<String> = parse(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.7.0.1", "fd00::7"]);
    }
}
