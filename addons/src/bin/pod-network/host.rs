//! What is changed on the host: routes over netlink, nftables, forwarding, the CNI configuration file.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use component_base::cidr::Cidr;
use component_base::command;
use futures::TryStreamExt;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::plan::{self, NETWORK, Next, Routes, TUNNEL};

/// Marks our routes among those of others (`ip route show proto 201`).
const PROTOCOL: RouteProtocol = RouteProtocol::Other(201);
const CONFIG_FILE: &str = "10-pilothouse.conflist";

/// Our routes as the kernel has them.
pub(crate) async fn current_routes(handle: &Handle) -> anyhow::Result<Routes> {
    let mut routes = Routes::new();
    for any in [IpAddr::from([0u8; 4]), IpAddr::from([0u8; 16])] {
        let mut query = RouteMessageBuilder::<IpAddr>::new().build();
        query.header.address_family = if any.is_ipv4() {
            netlink_packet_route::AddressFamily::Inet
        } else {
            netlink_packet_route::AddressFamily::Inet6
        };
        let mut found = std::pin::pin!(handle.route().get(query).execute());
        while let Some(route) = found.try_next().await.context("listing routes")? {
            if route.header.protocol == PROTOCOL && route.header.table == RouteHeader::RT_TABLE_MAIN {
                routes.extend(read(&route));
            }
        }
    }
    Ok(routes)
}

fn read(route: &RouteMessage) -> Option<(Cidr, Next)> {
    let address = |found: &RouteAddress| match found {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    };
    let mut destination = None;
    let mut gateway = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(found) => destination = address(found),
            RouteAttribute::Gateway(found) => gateway = address(found),
            _ => {}
        }
    }
    let cidr = Cidr { address: destination?, prefix: route.header.destination_prefix_length };
    match (route.header.kind, gateway) {
        (RouteType::Unreachable, _) => Some((cidr, Next::Unreachable)),
        (_, Some(gateway)) if gateway == cidr.address => Some((cidr, Next::Tunnel)),
        (_, Some(gateway)) => Some((cidr, Next::Via(gateway))),
        (_, None) => None,
    }
}

/// `tunnel` is the index of the tunnel's link.
fn message(cidr: Cidr, next: Next, tunnel: u32) -> anyhow::Result<RouteMessage> {
    let builder =
        RouteMessageBuilder::<IpAddr>::new().destination_prefix(cidr.address, cidr.prefix)?.protocol(PROTOCOL);
    Ok(match next {
        Next::Via(gateway) => builder.gateway(gateway)?.build(),
        Next::Tunnel => {
            let builder = builder.gateway(cidr.address)?;
            let mut message = if tunnel == 0 { builder.build() } else { builder.output_interface(tunnel).build() };
            message.header.flags |= RouteFlags::Onlink;
            message
        }
        Next::Unreachable => builder.kind(RouteType::Unreachable).build(),
    })
}

/// The links' addresses.
pub(crate) async fn addresses() -> anyhow::Result<Vec<(String, IpAddr, Cidr)>> {
    Ok(plan::parse_addresses(&command::run("ip", &["-o", "addr", "show"], "").await?))
}

/// The MTU of a link.
pub(crate) async fn link_mtu(link: &str) -> anyhow::Result<u32> {
    let shown = command::run("ip", &["-o", "link", "show", "dev", link], "").await?;
    let mut words = shown.split_whitespace().skip_while(|word| *word != "mtu");
    words.nth(1).and_then(|word| word.parse().ok()).with_context(|| format!("link {link} has no MTU"))
}

/// Make the tunnel between this node's address and those of others; gives the index of its link.
pub(crate) async fn set_tunnel(
    own: IpAddr,
    cidrs: &[Cidr],
    mtu: u32,
    tunnels: &BTreeMap<Cidr, IpAddr>,
) -> anyhow::Result<u32> {
    let show = async || command::run("ip", &["-d", "-o", "link", "show", "dev", TUNNEL], "").await;
    // One that begins at an address that this node had before leads nowhere.
    if show().await.is_ok_and(|shown| !shown.contains(&format!(" local {own} "))) {
        remove_tunnel().await;
    }
    // With `-force` what is there already is passed over; whether the link is there shows below.
    let made = command::run("ip", &["-force", "-batch", "-"], &plan::tunnel_link(own, cidrs, mtu)).await;
    let index = show().await.ok().and_then(|text| text.split(':').next()?.trim().parse().ok());
    let Some(index) = index else {
        made?;
        anyhow::bail!("the link {TUNNEL} cannot be made");
    };
    let (neighbors, forwarding) = plan::tunnel_neighbors(tunnels);
    let mut known = String::new();
    for family in ["-4", "-6"] {
        known += &command::run("ip", &[family, "neigh", "show", "dev", TUNNEL, "nud", "permanent"], "").await?;
    }
    let forwarded = command::run("bridge", &["fdb", "show", "dev", TUNNEL], "").await?;
    let (neighbors_gone, forwarding_gone) = plan::departed(&known, &forwarded, tunnels);
    command::run("ip", &["-batch", "-"], &(neighbors_gone + &neighbors)).await?;
    command::run("bridge", &["-batch", "-"], &(forwarding_gone + &forwarding)).await?;
    Ok(index)
}

/// Take the tunnel away, if it is there.
pub(crate) async fn remove_tunnel() {
    let _ = command::run("ip", &["link", "del", TUNNEL], "").await;
}

/// Set one route, in place of what there is for its range.
pub(crate) async fn set_route(handle: &Handle, cidr: Cidr, next: Next, tunnel: u32) -> anyhow::Result<()> {
    Ok(handle.route().add(message(cidr, next, tunnel)?).replace().execute().await?)
}

/// Remove one of our routes.
pub(crate) async fn remove_route(handle: &Handle, cidr: Cidr, next: Next, tunnel: u32) -> anyhow::Result<()> {
    Ok(handle.route().del(message(cidr, next, tunnel)?).execute().await?)
}

/// Let the host pass packets on. Nothing is written where that is so already (it may not be ours to write).
pub(crate) fn enable_forwarding(cidrs: &[Cidr]) -> anyhow::Result<()> {
    let mut switches = Vec::new();
    if cidrs.iter().any(|cidr| cidr.address.is_ipv4()) {
        switches.push("/proc/sys/net/ipv4/ip_forward");
    }
    if cidrs.iter().any(|cidr| cidr.address.is_ipv6()) {
        switches.push("/proc/sys/net/ipv6/conf/all/forwarding");
    }
    for switch in switches {
        let state = fs::read_to_string(switch).with_context(|| switch.to_owned())?;
        if state.trim() == "0" {
            fs::write(switch, "1").with_context(|| format!("{switch} cannot be set to 1"))?;
        }
    }
    Ok(())
}

/// Write the CNI configuration in one step, if it is not what is there. Returns whether it was written.
pub(crate) fn write_config(directory: &Path, config: &str) -> io::Result<bool> {
    let path = directory.join(CONFIG_FILE);
    if fs::read_to_string(&path).is_ok_and(|found| found == config) {
        return Ok(false);
    }
    fs::create_dir_all(directory)?;
    // CNI reads *.conf, *.conflist and *.json only.
    let temporary = directory.join(format!(".{CONFIG_FILE}.new"));
    fs::write(&temporary, config)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o644))?;
    fs::rename(&temporary, &path)?;
    Ok(true)
}

/// Remove the CNI configuration, and the register of addresses in use.
pub(crate) fn remove_config(directory: &Path) -> io::Result<()> {
    let register = PathBuf::from("/var/lib/cni/networks").join(NETWORK);
    for result in [fs::remove_file(directory.join(CONFIG_FILE)), fs::remove_dir_all(register)] {
        match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The plugins that the configuration names and that are not in `directory`.
pub(crate) fn missing_plugins(directory: &Path) -> Vec<&'static str> {
    ["ptp", "host-local", "portmap", "loopback"].into_iter().filter(|plugin| !directory.join(plugin).exists()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_written_when_it_changes() {
        let directory = std::env::temp_dir().join(format!("pod-network-test-{}", std::process::id()));
        assert!(write_config(&directory, "a").expect("written"));
        assert!(!write_config(&directory, "a").expect("unchanged"));
        assert!(write_config(&directory, "b").expect("written"));
        assert_eq!(fs::read_dir(&directory).expect("a directory").count(), 1);
        fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn routes_read_back_as_they_were_written() {
        for (cidr, next) in [
            ("10.244.1.0/24", Next::Via("192.0.2.2".parse().expect("an address"))),
            ("fd00:1::/64", Next::Via("fd01::2".parse().expect("an address"))),
            ("10.244.0.0/24", Next::Unreachable),
            ("10.244.3.0/24", Next::Tunnel),
        ] {
            let cidr: Cidr = cidr.parse().expect("a range");
            assert_eq!(read(&message(cidr, next, 7).expect("a message")), Some((cidr, next)));
        }
    }
}
