//! NetworkPolicies → what is checked of a packet: pure. A pod's policies together are a profile, which pods with the same
//! policies share; who a rule speaks of is a set of addresses. So what a packet costs depends on the rules of its pod's
//! policies and on nothing else.
//!
//! Pods on the host's network are not subject to policies and are nobody's peer: their traffic is the node's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use apimachinery::labels::Selector;
use apimachinery::meta::NamespacedName;
use component_base::cidr::Cidr;
use component_base::nftables::hash;
use k8s_openapi::api::core::v1::Pod as ApiPod;
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPeer as ApiPeer, NetworkPolicyPort as ApiPort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

pub(crate) type Labels = BTreeMap<String, String>;

/// Of a pod what policies read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pod {
    pub namespace: String,
    pub labels: Labels,
    pub ips: Vec<IpAddr>,
    /// Named ports: name, protocol in lower case, number.
    pub ports: Vec<(String, String, u16)>,
    /// Whether it runs on this node, where its policies are enforced.
    pub local: bool,
}

/// A policy, read.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub name: NamespacedName,
    pods: Selector,
    /// None where the policy does not speak of the direction.
    rules: [Option<Vec<Rule>>; 2],
}

/// Empty lists of the API, which mean everything, are none here.
#[derive(Clone, Debug)]
struct Rule {
    peers: Option<Vec<Peer>>,
    ports: Option<Vec<Port>>,
}

#[derive(Clone, Debug)]
enum Peer {
    /// Pods of the namespaces, or of the policy's own.
    Pods {
        namespaces: Option<Selector>,
        pods: Selector,
    },
    Block {
        range: Cidr,
        except: Vec<Cidr>,
    },
}

#[derive(Clone, Debug)]
struct Port {
    protocol: String,
    target: Target,
}

#[derive(Clone, Debug)]
enum Target {
    Numbers(u16, u16),
    Named(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Direction {
    Ingress,
    Egress,
}

/// What the policies come to on this node, in one address family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Compiled {
    /// The profile of each pod here that policies speak of. Other pods take and send everything.
    pub subjects: BTreeMap<(Direction, IpAddr), String>,
    /// A packet passes if one of them matches.
    pub profiles: BTreeMap<String, (Direction, Vec<Matcher>)>,
    pub peers: BTreeMap<String, BTreeSet<IpAddr>>,
    /// Who has a named port, by its number.
    pub named: BTreeMap<String, BTreeSet<IpAddr>>,
    /// This node's ranges of pods, and who is known to have an address of them.
    pub ranges: Vec<Cidr>,
    pub known: BTreeSet<IpAddr>,
    /// Where a pod that policies speak of is about to get an address here: until it is known which, nobody who is not known
    /// takes or sends anything. So no pod is open before its policies hold.
    pub awaited: BTreeSet<Direction>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Matcher {
    pub peer: PeerMatch,
    pub port: PortMatch,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PeerMatch {
    Any,
    /// A set of [`Compiled::peers`].
    Set(String),
    /// First and last addresses, in order and apart.
    Blocks(Vec<(IpAddr, IpAddr)>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PortMatch {
    Any,
    Numbers(String, Vec<(u16, u16)>),
    /// A port by name, resolved: protocol and number, and the set of [`Compiled::named`] that has it there.
    Named(String, u16, String),
}

// === impl Pod ===

impl Pod {
    /// None for pods that policies do not touch: on the host's network, ended, or without an address and not here.
    pub(crate) fn read(pod: &ApiPod, node: &str) -> Option<Pod> {
        let (spec, status) = (pod.spec.as_ref()?, pod.status.clone().unwrap_or_default());
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        if spec.host_network == Some(true) || ended {
            return None;
        }
        let texts = status.pod_ips.iter().flatten().map(|ip| &ip.ip).chain(&status.pod_ip);
        let ips: BTreeSet<IpAddr> = texts.filter_map(|ip| ip.parse().ok()).collect();
        let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.is_some());
        let ports = spec.containers.iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten());
        let ports = ports.filter_map(|port| {
            let protocol = port.protocol.as_deref().unwrap_or("TCP").to_lowercase();
            Some((port.name.clone()?, protocol, u16::try_from(port.container_port).ok()?))
        });
        let local = spec.node_name.as_deref() == Some(node);
        (local || !ips.is_empty()).then(|| Pod {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            labels: pod.metadata.labels.clone().unwrap_or_default(),
            ips: ips.into_iter().collect(),
            ports: ports.collect(),
            local,
        })
    }
}

// === impl Policy ===

impl Policy {
    /// What cannot be read (validation lets nothing such through) selects nothing.
    pub(crate) fn read(policy: &NetworkPolicy) -> Policy {
        let spec = policy.spec.clone().unwrap_or_default();
        let types = spec.policy_types.unwrap_or_default();
        let egress_said = spec.egress.as_ref().is_some_and(|rules| !rules.is_empty());
        let speaks =
            |name: &str, default: bool| if types.is_empty() { default } else { types.iter().any(|t| t == name) };
        let ingress = spec.ingress.into_iter().flatten().map(|rule| Rule::read(rule.from, rule.ports));
        let egress = spec.egress.into_iter().flatten().map(|rule| Rule::read(rule.to, rule.ports));
        Policy {
            name: NamespacedName::of(policy),
            pods: selector(spec.pod_selector.as_ref()),
            rules: [
                speaks("Ingress", true).then(|| ingress.collect()),
                speaks("Egress", egress_said).then(|| egress.collect()),
            ],
        }
    }

    fn selects(&self, pod: &Pod) -> bool {
        pod.namespace == self.name.namespace && self.pods.matches(&pod.labels)
    }
}

/// An absent selector is an empty one, which selects everything.
fn selector(selector: Option<&LabelSelector>) -> Selector {
    selector
        .map_or_else(Selector::everything, |s| Selector::from_label_selector(s).unwrap_or_else(|_| Selector::nothing()))
}

impl Rule {
    fn read(peers: Option<Vec<ApiPeer>>, ports: Option<Vec<ApiPort>>) -> Rule {
        let peers = peers.filter(|peers| !peers.is_empty());
        let ports = ports.filter(|ports| !ports.is_empty());
        Rule {
            peers: peers.map(|peers| peers.iter().filter_map(Peer::read).collect()),
            ports: ports.map(|ports| ports.iter().filter_map(Port::read).collect()),
        }
    }
}

impl Peer {
    fn read(peer: &ApiPeer) -> Option<Peer> {
        if let Some(block) = &peer.ip_block {
            let except = block.except.iter().flatten().filter_map(|range| range.parse().ok()).collect();
            return Some(Peer::Block { range: block.cidr.parse().ok()?, except });
        }
        let namespaces = peer.namespace_selector.as_ref().map(|s| selector(Some(s)));
        Some(Peer::Pods { namespaces, pods: selector(peer.pod_selector.as_ref()) })
    }

    fn is(&self, pod: &Pod, own: &str, namespaces: &BTreeMap<String, Labels>) -> bool {
        match self {
            Peer::Pods { namespaces: None, pods } => pod.namespace == own && pods.matches(&pod.labels),
            Peer::Pods { namespaces: Some(which), pods } => {
                namespaces.get(&pod.namespace).is_some_and(|labels| which.matches(labels)) && pods.matches(&pod.labels)
            }
            Peer::Block { .. } => false,
        }
    }
}

impl Port {
    fn read(port: &ApiPort) -> Option<Port> {
        let protocol = port.protocol.as_deref().unwrap_or("TCP").to_lowercase();
        let target = match &port.port {
            None => Target::Numbers(0, u16::MAX),
            Some(IntOrString::String(name)) => Target::Named(name.clone()),
            Some(IntOrString::Int(number)) => {
                let first = u16::try_from(*number).ok()?;
                Target::Numbers(first, port.end_port.and_then(|last| u16::try_from(last).ok()).unwrap_or(first))
            }
        };
        Some(Port { protocol, target })
    }
}

// === impl Compiled ===

impl Compiled {
    /// Of one family; `ranges` are this node's own, of both.
    pub(crate) fn new(
        policies: &[Policy],
        pods: &[Pod],
        namespaces: &BTreeMap<String, Labels>,
        ranges: &[Cidr],
        ipv6: bool,
    ) -> Compiled {
        let here = pods.iter().filter(|pod| pod.local).flat_map(|pod| &pod.ips).filter(|ip| ip.is_ipv6() == ipv6);
        let mut compiled = Compiled {
            ranges: ranges.iter().filter(|range| range.is_ipv6() == ipv6).copied().collect(),
            known: here.copied().collect(),
            ..Compiled::default()
        };
        for (at, direction) in [Direction::Ingress, Direction::Egress].into_iter().enumerate() {
            for pod in pods.iter().filter(|pod| pod.local) {
                let own: Vec<(&Policy, &Vec<Rule>)> = policies
                    .iter()
                    .filter(|policy| policy.selects(pod))
                    .filter_map(|policy| Some((policy, policy.rules[at].as_ref()?)))
                    .collect();
                let ips = pod.ips.iter().filter(|ip| ip.is_ipv6() == ipv6);
                if !own.is_empty() && pod.ips.is_empty() {
                    compiled.awaited.insert(direction);
                }
                if own.is_empty() || ips.clone().next().is_none() {
                    continue;
                }
                let names: Vec<String> = own.iter().map(|(policy, _)| policy.name.to_string()).collect();
                let word = if direction == Direction::Ingress { "ingress" } else { "egress" };
                let profile = format!("{word}-{:016x}", hash(&names.join(" ")));
                compiled.subjects.extend(ips.map(|ip| ((direction, *ip), profile.clone())));
                if compiled.profiles.contains_key(&profile) {
                    continue;
                }
                let mut matchers = Vec::new();
                for (policy, rules) in own {
                    for (index, rule) in rules.iter().enumerate() {
                        let id = format!("{word}-{:016x}-{index}", hash(&policy.name.to_string()));
                        let world = World { policy, direction, pods, namespaces, ipv6 };
                        compiled.rule(&id, rule, &world, &mut matchers);
                    }
                }
                compiled.profiles.insert(profile, (direction, matchers));
            }
        }
        compiled
    }

    fn rule(&mut self, id: &str, rule: &Rule, world: &World<'_>, matchers: &mut Vec<Matcher>) {
        let mut peers = Vec::new();
        match &rule.peers {
            None => peers.push(PeerMatch::Any),
            Some(list) => {
                if list.iter().any(|peer| matches!(peer, Peer::Pods { .. })) {
                    let is_peer = |pod: &&Pod| {
                        list.iter().any(|peer| peer.is(pod, &world.policy.name.namespace, world.namespaces))
                    };
                    let found = world.pods.iter().filter(is_peer).flat_map(|pod| world.ips(pod));
                    let name = format!("peers-{id}");
                    self.peers.insert(name.clone(), found.collect());
                    peers.push(PeerMatch::Set(name));
                }
                let blocks = list.iter().filter_map(|peer| match peer {
                    Peer::Block { range, except } if range.is_ipv6() == world.ipv6 => Some((range, except)),
                    _ => None,
                });
                let spans: Vec<_> = blocks.flat_map(|(range, except)| without(*range, except)).collect();
                if !spans.is_empty() {
                    peers.push(PeerMatch::Blocks(joined(spans)));
                }
            }
        }
        let mut ports = Vec::new();
        match &rule.ports {
            None => ports.push(PortMatch::Any),
            Some(list) => {
                let mut numbers: BTreeMap<&str, Vec<(u16, u16)>> = BTreeMap::new();
                let mut named = BTreeSet::new();
                for port in list {
                    match &port.target {
                        Target::Numbers(first, last) => {
                            numbers.entry(&port.protocol).or_default().push((*first, *last))
                        }
                        Target::Named(name) => drop(named.insert((name.as_str(), port.protocol.as_str()))),
                    }
                }
                ports.extend(numbers.into_iter().map(|(p, spans)| PortMatch::Numbers(p.to_owned(), joined(spans))));
                for ((protocol, port), members) in world.resolve(&named) {
                    let name = format!("named-{id}-{protocol}-{port}");
                    ports.push(PortMatch::Named(protocol, port, name.clone()));
                    self.named.insert(name, members);
                }
            }
        }
        for peer in &peers {
            matchers.extend(ports.iter().map(|port| Matcher { peer: peer.clone(), port: port.clone() }));
        }
    }

    /// Whether a flow from `source` to a port of `destination` passes in this direction: what the kernel does with the
    /// rules.
    #[cfg(test)]
    pub(crate) fn allows(
        &self,
        direction: Direction,
        source: IpAddr,
        destination: IpAddr,
        protocol: &str,
        port: u16,
    ) -> bool {
        let (subject, peer) =
            if direction == Direction::Ingress { (destination, source) } else { (source, destination) };
        let Some(profile) = self.subjects.get(&(direction, subject)) else { return true };
        let Some((_, matchers)) = self.profiles.get(profile) else { return false };
        source == destination
            || matchers.iter().any(|matcher| {
                let by_peer = match &matcher.peer {
                    PeerMatch::Any => true,
                    PeerMatch::Set(name) => self.peers[name].contains(&peer),
                    PeerMatch::Blocks(spans) => spans.iter().any(|(first, last)| (first..=last).contains(&&peer)),
                };
                by_peer
                    && match &matcher.port {
                        PortMatch::Any => true,
                        PortMatch::Numbers(p, spans) => {
                            p == protocol && spans.iter().any(|(first, last)| (first..=last).contains(&&port))
                        }
                        PortMatch::Named(p, number, name) => {
                            p == protocol && *number == port && self.named[name].contains(&destination)
                        }
                    }
            })
    }
}

/// What a rule is read against.
struct World<'a> {
    policy: &'a Policy,
    direction: Direction,
    pods: &'a [Pod],
    namespaces: &'a BTreeMap<String, Labels>,
    ipv6: bool,
}

impl World<'_> {
    fn ips(&self, pod: &Pod) -> impl Iterator<Item = IpAddr> + use<> {
        let ipv6 = self.ipv6;
        pod.ips.clone().into_iter().filter(move |ip| ip.is_ipv6() == ipv6)
    }

    /// Named ports are those of the pods that packets go to: of the policy's own pods here, or of any.
    fn resolve(&self, named: &BTreeSet<(&str, &str)>) -> BTreeMap<(String, u16), BTreeSet<IpAddr>> {
        let is_destination = |pod: &&Pod| self.direction == Direction::Egress || pod.local && self.policy.selects(pod);
        let mut found: BTreeMap<_, BTreeSet<IpAddr>> = BTreeMap::new();
        for pod in self.pods.iter().filter(is_destination) {
            for (_, protocol, port) in pod.ports.iter().filter(|(n, p, _)| named.contains(&(n.as_str(), p.as_str()))) {
                found.entry((protocol.clone(), *port)).or_default().extend(self.ips(pod));
            }
        }
        found
    }
}

/// First and last address of a range, as numbers.
fn bounds(range: Cidr) -> (u128, u128) {
    let (base, host_bits) = match range.address {
        IpAddr::V4(ip) => (u128::from(ip.to_bits()), 32 - u32::from(range.prefix)),
        IpAddr::V6(ip) => (ip.to_bits(), 128 - u32::from(range.prefix)),
    };
    (base, base | 1u128.checked_shl(host_bits).map_or(u128::MAX, |size| size - 1))
}

/// A range without others, as spans of addresses.
fn without(range: Cidr, except: &[Cidr]) -> Vec<(IpAddr, IpAddr)> {
    let mut holes: Vec<_> = except.iter().filter(|e| e.is_ipv6() == range.is_ipv6()).map(|e| bounds(*e)).collect();
    holes.sort_unstable();
    let (mut from, last) = bounds(range);
    let mut spans = Vec::new();
    let mut full = false;
    for (first_out, last_out) in holes {
        if last_out < from {
            continue;
        }
        if first_out > last {
            break;
        }
        if first_out > from {
            spans.push((from, first_out - 1));
        }
        // The hole may reach to the end of the range.
        full = last_out >= last;
        if full {
            break;
        }
        from = from.max(last_out + 1);
    }
    if !full {
        spans.push((from, last));
    }
    let address = |number: u128| match range.address {
        IpAddr::V4(_) => IpAddr::V4(u32::try_from(number).unwrap_or(u32::MAX).into()),
        IpAddr::V6(_) => IpAddr::V6(number.into()),
    };
    spans.into_iter().map(|(first, last)| (address(first), address(last))).collect()
}

/// Spans in order, those that overlap made one.
fn joined<T: Ord + Copy>(mut spans: Vec<(T, T)>) -> Vec<(T, T)> {
    spans.sort_unstable();
    let mut made: Vec<(T, T)> = Vec::new();
    for (first, last) in spans {
        match made.last_mut() {
            Some(before) if first <= before.1 => before.1 = before.1.max(last),
            _ => made.push((first, last)),
        }
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_are_cut_out_of_blocks() {
        for (range, except, expected) in [
            ("10.0.0.0/24", vec![], "10.0.0.0-10.0.0.255"),
            ("10.0.0.0/24", vec!["10.0.0.128/25"], "10.0.0.0-10.0.0.127"),
            ("10.0.0.0/24", vec!["10.0.0.4/30", "10.0.0.0/30"], "10.0.0.8-10.0.0.255"),
            ("10.0.0.0/24", vec!["10.0.0.0/24"], ""),
            ("0.0.0.0/0", vec!["255.255.255.255/32"], "0.0.0.0-255.255.255.254"),
            (
                "10.0.0.0/24",
                vec!["10.1.0.0/16", "10.0.0.8/29", "10.0.0.12/30"],
                "10.0.0.0-10.0.0.7 10.0.0.16-10.0.0.255",
            ),
            ("::/0", vec!["8000::/1"], "::-7fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
        ] {
            let except: Vec<Cidr> = except.iter().map(|e| e.parse().expect("a range")).collect();
            let spans = without(range.parse().expect("a range"), &except);
            let shown: Vec<String> = spans.iter().map(|(first, last)| format!("{first}-{last}")).collect();
            assert_eq!(shown.join(" "), expected, "{range} without {except:?}");
        }
    }
}
