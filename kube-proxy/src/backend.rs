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

type Port = Arc<ServicePort>;

/// Keeps one address family's rules in one mode.
pub enum Backend {
    Nftables,
    /// How many rules were written last, and how many there are.
    Iptables([iptables::Counts; 2]),
    /// With what was applied: a change of the model becomes a difference to it.
    Ipvs {
        settings: ipvs::IpvsSettings,
        servers: ipvs::Servers,
        companion: nft::Ruleset,
    },
    Userspace(userspace::Forwarder),
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
            Mode::Nftables => Self::Nftables,
            Mode::Iptables => Self::Iptables(Default::default()),
            Mode::Ipvs => Self::Ipvs {
                settings: settings.ipvs.clone(),
                servers: ipvs::Servers::default(),
                companion: nft::Ruleset::default(),
            },
            Mode::Userspace => Self::Userspace(userspace::Forwarder::default()),
        }
    }

    /// Everything anew, whatever the kernel holds.
    pub async fn replace(&mut self, all: &Ports, settings: &Settings) -> Result<(), CommandError> {
        let refs = || all.values().map(AsRef::as_ref);
        let table = nftables::table(settings.ipv6);
        match self {
            Self::Nftables => nft::apply(&nftables::render(refs(), settings).create(&table)).await,
            Self::Iptables(counts) => {
                let saved = iptables_tool(settings.ipv6, "-save", &[], "").await?;
                let parts = iptables::parts(refs(), settings);
                let rules = parts.create(settings, &iptables::chains_of(&saved));
                iptables_restore(settings.ipv6, &rules).await?;
                *counts = [iptables::written(&rules), parts.count()];
                enter_iptables(settings.ipv6).await
            }
            Self::Ipvs { settings: own, servers, companion } => {
                *companion = ipvs::companion(refs(), settings);
                nft::apply(&companion.create(&table)).await?;
                link::ensure(ipvs::LINK).await?;
                let node_addresses = ipvs_node_addresses(settings).await?;
                let wanted = ipvs::servers(refs(), &own.scheduler, &node_addresses);
                let present = link::addresses(ipvs::LINK, settings.ipv6).await?;
                link::change(ipvs::LINK, &present, &wanted.addresses).await?;
                let saved = command::run("ipvsadm", &["--save", "-n"], "").await?;
                let change = wanted.update_from(&ipvs::Servers::parse(&saved, settings.ipv6, &own.exclude));
                *servers = wanted;
                ipvsadm(&change).await
            }
            Self::Userspace(forwarder) => forwarder.replace(refs(), settings).await,
        }
    }

    /// From the ports `old` to the ports `new`; what is in neither has not changed. `all` is what there is then.
    pub async fn update(
        &mut self,
        old: &[Port],
        new: &[Port],
        all: &Ports,
        settings: &Settings,
    ) -> Result<(), CommandError> {
        let (before, after) = (|| old.iter().map(AsRef::as_ref), || new.iter().map(AsRef::as_ref));
        let table = nftables::table(settings.ipv6);
        match self {
            Self::Nftables => {
                let transaction = nftables::update(before(), after(), settings);
                if transaction.is_empty() { Ok(()) } else { nft::apply(&transaction).await }
            }
            Self::Iptables([written, total]) => {
                let (before, after) = (iptables::parts(before(), settings), iptables::parts(after(), settings));
                let rules = after.update_from(&before);
                *written = iptables::written(&rules);
                for (table, count) in after.count() {
                    *total.entry(table).or_default() += count - before.count()[table];
                }
                if rules.is_empty() { Ok(()) } else { iptables_restore(settings.ipv6, &rules).await }
            }
            Self::Ipvs { settings: own, servers, companion } => {
                let everything = || all.values().map(AsRef::as_ref);
                let rules = ipvs::companion(everything(), settings);
                let transaction = rules.update_from(companion, &table);
                if !transaction.is_empty() {
                    nft::apply(&transaction).await?;
                }
                *companion = rules;
                let wanted = ipvs::servers(everything(), &own.scheduler, &ipvs_node_addresses(settings).await?);
                link::change(ipvs::LINK, &servers.addresses, &wanted.addresses).await?;
                let change = wanted.update_from(servers);
                *servers = wanted;
                ipvsadm(&change).await
            }
            Self::Userspace(forwarder) => forwarder.update(before(), after(), settings).await,
        }
    }

    /// Whether what was applied is still there. Someone may have flushed all rules behind our back.
    pub async fn is_intact(&self, ipv6: bool) -> bool {
        match self {
            Self::Nftables | Self::Ipvs { .. } => nft::exists(&nftables::table(ipv6), nftables::LANDMARK).await,
            Self::Iptables(_) => {
                let entered = iptables_tool(ipv6, "", &["-t", "nat", "-C", "OUTPUT", "-j", "KUBE-SERVICES"], "").await;
                entered.is_ok()
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

async fn ipvs_node_addresses(settings: &Settings) -> Result<Vec<IpAddr>, CommandError> {
    let all: BTreeSet<IpAddr> = link::node_addresses(ipvs::LINK, settings.ipv6).await?;
    Ok(all.into_iter().filter(|address| settings.takes_node_ports(*address) && !address.is_loopback()).collect())
}
