//! The modes behind one interface: rules from nothing, rules from what was, whether they are still there, and away with them.
use crate::{
    config::{Mode, ModeSettings},
    iptables, ipvs, link,
    model::ServicePort,
    nftables,
    settings::Settings,
    userspace,
    world::Ports,
};
use component_base::{
    command::{self, CommandError},
    nftables as nft,
};
use std::{collections::BTreeSet, net::IpAddr, sync::Arc};
use tracing::debug;

/// The ports of one Service.
type Service = Arc<[ServicePort]>;

/// Keeps one address family's rules in one mode.
pub enum Backend {
    Nftables(nft::Guard),
    /// How many rules were written last, and how many there are; and how many packets were dropped as invalid.
    Iptables([iptables::Counts; 2], u64),
    Ipvs(ipvs::IpvsSettings, Balancer),
    Userspace(userspace::Forwarder),
}

/// What the mode ipvs knows of the kernel's balancer.
#[derive(Default)]
pub struct Balancer {
    /// The addresses at which there are NodePorts.
    node_addresses: Vec<IpAddr>,
    leaving: ipvs::Leaving,
    companion: nft::Guard,
}

/// Why a mode cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModeError {
    #[error("can't use the IPVS proxier: {0}; load the module ip_vs and install ipvsadm, or use the mode nftables")]
    Ipvs(String),
    #[error("can't use the iptables proxier: {0}; install iptables, or use the mode nftables")]
    Iptables(CommandError),
}

impl Backend {
    pub fn new(settings: &ModeSettings) -> Self {
        match settings.mode {
            Mode::Nftables => Self::Nftables(nft::Guard::default()),
            Mode::Iptables => Self::Iptables(Default::default(), 0),
            Mode::Ipvs => Self::Ipvs(settings.ipvs.clone(), Balancer::default()),
            Mode::Userspace => Self::Userspace(userspace::Forwarder::default()),
        }
    }

    /// Everything anew, whatever the kernel holds.
    pub async fn replace(&mut self, all: &Ports, settings: &Settings) -> Result<(), CommandError> {
        let refs = || all.values().flat_map(|ports| ports.iter());
        let table = nftables::table(settings.ipv6);
        match self {
            Self::Nftables(guard) => guard.replace(&nftables::render(refs(), settings).create(&table)).await,
            Self::Iptables(counts, _) => {
                let saved = iptables_tool(settings.ipv6, "-save", &[], "").await?;
                let parts = iptables::parts(refs(), settings);
                let rules = parts.create(settings, &iptables::chains_of(&saved));
                iptables_restore(settings.ipv6, &rules).await?;
                *counts = [iptables::written(&rules), parts.count()];
                enter_iptables(settings.ipv6).await
            }
            Self::Ipvs(own, balancer) => {
                balancer.companion.replace(&ipvs::companion(refs(), settings).create(&table)).await?;
                link::ensure(ipvs::LINK).await?;
                balancer.node_addresses = ipvs_node_addresses(settings).await?;
                let wanted = ipvs::servers(refs(), &own.scheduler, &balancer.node_addresses);
                let present = link::addresses(ipvs::LINK, settings.ipv6).await?;
                link::change(ipvs::LINK, &present, &wanted.addresses).await?;
                let (found, leaving) = ipvs_found(own, settings.ipv6).await?;
                balancer.leaving = leaving;
                ipvsadm(&wanted.update_from(&found, &mut balancer.leaving)).await
            }
            Self::Userspace(forwarder) => forwarder.replace(refs(), settings).await,
        }
    }

    /// From the Services `old` to the Services `new`; what is in neither has not changed. `all` is what there is then.
    pub async fn update(
        &mut self,
        old: &[Service],
        new: &[Service],
        all: &Ports,
        settings: &Settings,
    ) -> Result<(), CommandError> {
        let (before, after) = (|| old.iter().flat_map(|s| s.iter()), || new.iter().flat_map(|s| s.iter()));
        match self {
            Self::Nftables(guard) => {
                let transaction = nftables::update(before(), after(), settings);
                if transaction.is_empty() { Ok(()) } else { guard.apply(&transaction).await }
            }
            Self::Iptables([written, total], _) => {
                let (before, after) = (iptables::parts(before(), settings), iptables::parts(after(), settings));
                let rules = after.update_from(&before);
                *written = iptables::written(&rules);
                for (table, count) in after.count() {
                    *total.entry(table).or_default() += count - before.count()[table];
                }
                if rules.is_empty() { Ok(()) } else { iptables_restore(settings.ipv6, &rules).await }
            }
            Self::Ipvs(own, balancer) => {
                let at = &balancer.node_addresses;
                let [old, new] =
                    [ipvs::servers(before(), &own.scheduler, at), ipvs::servers(after(), &own.scheduler, at)];
                // Several Services may have one external address: then what goes of one may be another's.
                let gone = &old.addresses - &new.addresses;
                let rest = || all.values().flat_map(|ports| ports.iter());
                let is_shared = !gone.is_empty() && rest().any(|port| port.outer_ips().any(|ip| gone.contains(&ip)));
                if is_shared || ipvs_node_addresses(settings).await? != *at {
                    return self.replace(all, settings).await;
                }
                let transaction = ipvs::update_companion(before(), after(), settings);
                if !transaction.is_empty() {
                    balancer.companion.apply(&transaction).await?;
                }
                link::change(ipvs::LINK, &old.addresses, &new.addresses).await?;
                ipvsadm(&new.update_from(&old, &mut balancer.leaving)).await
            }
            Self::Userspace(forwarder) => forwarder.update(before(), after(), settings).await,
        }
    }

    /// Whether what was applied for `all` is still there. Someone may have changed our rules behind our back.
    pub async fn is_intact(&mut self, all: &Ports, settings: &Settings) -> bool {
        let refs = || all.values().flat_map(|ports| ports.iter());
        let table = nftables::table(settings.ipv6);
        match self {
            Self::Nftables(guard) => guard.is_intact(&table, || nftables::render(refs(), settings)).await,
            Self::Iptables([_, total], dropped) => {
                let saved = iptables_tool(settings.ipv6, "-save", &["-c"], "").await.unwrap_or_default();
                *dropped = iptables::dropped(&saved);
                iptables::holds(&saved, total, settings)
            }
            Self::Ipvs(own, balancer) => {
                let wanted = ipvs::servers(refs(), &own.scheduler, &balancer.node_addresses);
                let present = link::addresses(ipvs::LINK, settings.ipv6).await.unwrap_or_default();
                let Ok((found, mut leaving)) = ipvs_found(own, settings.ipv6).await else { return false };
                let as_left = present == wanted.addresses && wanted.update_from(&found, &mut leaving).is_empty();
                balancer.leaving = leaving;
                as_left
                    && ipvs_sweep(&mut balancer.leaving).await.is_ok()
                    && balancer.companion.is_intact(&table, || ipvs::companion(refs(), settings)).await
            }
            // Node addresses come and go, so it looks again; what is there is left alone.
            Self::Userspace(_) => false,
        }
    }
}

/// Whether this machine can do a mode, told before anything is changed. As `platformCheckSupported`.
pub async fn check_supported(mode: Mode) -> Result<(), ModeError> {
    match mode {
        Mode::Nftables | Mode::Userspace => Ok(()),
        Mode::Iptables => iptables_tool(false, "", &["-t", "nat", "-L", "OUTPUT", "-n"], "")
            .await
            .map(drop)
            .map_err(ModeError::Iptables),
        Mode::Ipvs => {
            if command::run("modprobe", &["-a", "ip_vs"], "").await.is_err() {
                debug!("ip_vs is not a module here; it may be built in");
            }
            if !std::path::Path::new("/proc/net/ip_vs").exists() {
                return Err(ModeError::Ipvs("the kernel has no /proc/net/ip_vs".to_owned()));
            }
            let listed = command::run("ipvsadm", &["--save", "-n"], "").await;
            listed.map(drop).map_err(|error| ModeError::Ipvs(error.to_string()))
        }
    }
}

/// The balancer's own timeouts, of the mode ipvs; 0 leaves one as it is.
pub async fn set_timeouts(settings: &ModeSettings) {
    let timeouts = settings.ipvs.timeouts;
    if settings.mode != Mode::Ipvs || timeouts == [0; 3] {
        return;
    }
    let [tcp, fin, udp] = timeouts.map(|seconds| seconds.to_string());
    if let Err(error) = command::run("ipvsadm", &["--set", &tcp, &fin, &udp], "").await {
        tracing::warn!(%error, "timeouts of ipvs not changed");
    }
}

/// Removes what modes other than `keep` have left on this machine; all of it if `keep` is none.
pub async fn clean_up(keep: Option<Mode>) {
    for ipv6 in [false, true] {
        if !matches!(keep, Some(Mode::Nftables | Mode::Ipvs))
            && nft::exists(&nftables::table(ipv6), nftables::LANDMARK).await
        {
            report(nft::remove(&nftables::table(ipv6)).await);
        }
        if keep != Some(Mode::Iptables)
            && let Ok(saved) = iptables_tool(ipv6, "-save", &[], "").await
            && saved.contains("KUBE-SERVICES")
        {
            for (table, chain, rule) in iptables::ENTRANCES {
                let arguments: Vec<&str> = ["-t", table, "-D", chain].into_iter().chain(rule.split(' ')).collect();
                // Not there is as good.
                let _ = iptables_tool(ipv6, "", &arguments, "").await;
            }
            report(iptables_restore(ipv6, &iptables::remove(&iptables::chains_of(&saved))).await);
        }
    }
    if keep != Some(Mode::Ipvs) && command::run("ip", &["link", "show", "dev", ipvs::LINK], "").await.is_ok() {
        report(command::run("ipvsadm", &["--clear"], "").await.map(drop));
        link::remove(ipvs::LINK).await;
    }
    if keep != Some(Mode::Userspace) {
        link::remove(userspace::LINK).await;
    }
}

fn report(outcome: Result<(), CommandError>) {
    if let Err(error) = outcome {
        tracing::warn!(%error, "rules of another mode are left");
    }
}

async fn iptables_tool(ipv6: bool, suffix: &str, arguments: &[&str], input: &str) -> Result<String, CommandError> {
    let tool = if ipv6 { "ip6tables" } else { "iptables" };
    let wait: &[&str] = if suffix == "-save" { &[] } else { &["-w", "5"] };
    command::run(&format!("{tool}{suffix}"), &[wait, arguments].concat(), input).await
}

async fn iptables_restore(ipv6: bool, rules: &str) -> Result<(), CommandError> {
    iptables_tool(ipv6, "-restore", &["--noflush"], rules).await.map(drop)
}

/// Leads the built-in chains into ours, where they do not yet.
async fn enter_iptables(ipv6: bool) -> Result<(), CommandError> {
    for (table, chain, rule) in iptables::ENTRANCES {
        let with = |verb: &'static str| {
            let head: Vec<&str> = ["-t", table, verb, chain].into_iter().chain(rule.split(' ')).collect();
            async move { iptables_tool(ipv6, "", &head, "").await }
        };
        if with("-C").await.is_err() {
            with("-I").await?;
        }
    }
    Ok(())
}

async fn ipvsadm(orders: &str) -> Result<(), CommandError> {
    if orders.is_empty() {
        return Ok(());
    }
    command::run("ipvsadm", &["--restore"], orders).await.map(drop)
}

/// What the balancer has, of one family.
async fn ipvs_found(own: &ipvs::IpvsSettings, ipv6: bool) -> Result<(ipvs::Servers, ipvs::Leaving), CommandError> {
    let saved = command::run("ipvsadm", &["--save", "-n"], "").await?;
    Ok(ipvs::Servers::parse(&saved, ipv6, &own.exclude))
}

/// Takes away those that leave and have no connection any more.
async fn ipvs_sweep(leaving: &mut ipvs::Leaving) -> Result<(), CommandError> {
    if leaving.is_empty() {
        return Ok(());
    }
    ipvsadm(&ipvs::sweep(&command::run("ipvsadm", &["-L", "-n"], "").await?, leaving)).await
}

async fn ipvs_node_addresses(settings: &Settings) -> Result<Vec<IpAddr>, CommandError> {
    let all: BTreeSet<IpAddr> = link::node_addresses(ipvs::LINK, settings.ipv6).await?;
    Ok(all.into_iter().filter(|address| settings.takes_node_ports(*address) && !address.is_loopback()).collect())
}
