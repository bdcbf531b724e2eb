//! Processors, memory and their nodes (NUMA) of the machine, and where resources of a container can be together. Pure but for
//! reading the machine. As the topology manager: each resource says on which sets of nodes it could be given, and a policy
//! chooses one set for all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A set of nodes: bit n is node n.
pub type Mask = u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cpu {
    pub socket: u32,
    pub core: u32,
    pub node: u32,
    /// The last cache that some share (`index3`).
    pub cache: u32,
    pub id: u32,
}

/// The machine's processors and memory.
#[derive(Debug, Clone, Default)]
pub struct Topology {
    pub cpus: Vec<Cpu>,
    /// Bytes of each kind (`memory`, `hugepages-2Mi`) by node.
    pub memory: BTreeMap<u32, BTreeMap<String, u64>>,
    /// How far each node is from the others, by their numbers.
    pub distances: BTreeMap<u32, Vec<u32>>,
}

/// `cpuManagerPolicyOptions`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// `full-pcpus-only`
    pub whole_cores: bool,
    /// `strict-cpu-reservation`: nobody's are what is reserved.
    pub strict: bool,
    /// `distribute-cpus-across-numa`: what no one node has comes from several in equal parts.
    pub across_nodes: bool,
    /// `prefer-align-cpus-by-uncorecache`
    pub by_cache: bool,
}

/// `topologyManagerPolicyOptions`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// `prefer-closest-numa-nodes`
    pub closest: bool,
    /// `max-allowable-numa-nodes`
    pub most_nodes: usize,
}

/// More nodes make for too many sets of them. As `defaultMaxAllowableNUMANodes`.
const MOST_NODES: usize = 8;

fn switch(name: &str, value: &str) -> Result<bool, String> {
    value.parse().map_err(|_| format!("bad value for option {name:?}: {value:?}"))
}

impl CpuOptions {
    /// As configured, or what is wrong with it. Alpha's are not offered.
    pub fn of(options: &BTreeMap<String, String>) -> Result<Self, String> {
        let mut read = Self::default();
        for (name, value) in options {
            let option = match name.as_str() {
                "full-pcpus-only" => &mut read.whole_cores,
                "strict-cpu-reservation" => &mut read.strict,
                "distribute-cpus-across-numa" => &mut read.across_nodes,
                "prefer-align-cpus-by-uncorecache" => &mut read.by_cache,
                "align-by-socket" | "distribute-cpus-across-cores" => {
                    return Err(format!(
                        "CPU Manager Policy Alpha-level Options not enabled, but option {name:?} provided"
                    ));
                }
                _ => return Err(format!("unknown CPU Manager Policy option: {name:?}")),
            };
            *option = switch(name, value)?;
        }
        if read.by_cache && read.across_nodes {
            return Err(
                "prefer-align-cpus-by-uncorecache and distribute-cpus-across-numa can not be used at the same time"
                    .into(),
            );
        }
        Ok(read)
    }
}

impl Default for Options {
    fn default() -> Self {
        Self { closest: false, most_nodes: MOST_NODES }
    }
}

impl Options {
    /// As configured, or what is wrong with it.
    pub fn of(options: &BTreeMap<String, String>) -> Result<Self, String> {
        let mut read = Self::default();
        for (name, value) in options {
            match name.as_str() {
                "prefer-closest-numa-nodes" => read.closest = switch(name, value)?,
                "max-allowable-numa-nodes" => {
                    let most = value.parse().ok().filter(|most| (MOST_NODES..=16).contains(most));
                    read.most_nodes =
                        most.ok_or_else(|| format!("bad value for option {name:?}: {value:?} is not from 8 to 16"))?;
                }
                _ => return Err(format!("unknown Topology Manager Policy option: {name:?}")),
            }
        }
        Ok(read)
    }
}

/// What one resource allows: a set of nodes (None: any), and whether a smaller one would not do either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hint {
    pub mask: Option<Mask>,
    pub preferred: bool,
}

/// How strictly resources are to be together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    #[default]
    None,
    BestEffort,
    Restricted,
    SingleNumaNode,
}

impl Policy {
    pub fn parse(name: &str) -> Option<Policy> {
        Some(match name {
            "none" => Policy::None,
            "best-effort" => Policy::BestEffort,
            "restricted" => Policy::Restricted,
            "single-numa-node" => Policy::SingleNumaNode,
            _ => return None,
        })
    }
}

impl Topology {
    /// Reads `/sys`; only processors that this process may use count.
    pub fn read() -> Topology {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let allowed = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).and_then(parse_set);
        Self::read_at(Path::new("/sys/devices/system"), allowed.as_ref())
    }

    fn read_at(system: &Path, allowed: Option<&BTreeSet<u32>>) -> Topology {
        let number = |path: &Path| fs::read_to_string(path).ok().and_then(|t| t.trim().parse::<u32>().ok());
        let mut cpus: Vec<Cpu> = numbered(&system.join("cpu"), "cpu")
            .filter(|id| allowed.is_none_or(|a| a.contains(id)))
            .map(|id| {
                let dir = system.join("cpu").join(format!("cpu{id}"));
                Cpu {
                    id,
                    core: number(&dir.join("topology/core_id")).unwrap_or(id),
                    socket: number(&dir.join("topology/physical_package_id")).unwrap_or(0),
                    node: numbered(&dir, "node").next().unwrap_or(0),
                    cache: number(&dir.join("cache/index3/id")).unwrap_or(0),
                }
            })
            .collect();
        cpus.sort();
        let of_node = |node: u32| {
            let dir = system.join("node").join(format!("node{node}"));
            let info = fs::read_to_string(dir.join("meminfo")).unwrap_or_default();
            let line = info.lines().find(|l| l.contains("MemTotal:")).unwrap_or_default();
            let kilobytes: u64 = line.split_whitespace().nth(3).and_then(|n| n.parse().ok()).unwrap_or(0);
            let mut amounts = BTreeMap::from([("memory".to_owned(), kilobytes * 1024)]);
            for (name, bytes) in crate::node::machine::huge_pages(&dir.join("hugepages")) {
                amounts.insert(name, u64::try_from(bytes).unwrap_or(0));
            }
            (node, amounts)
        };
        let distances = |node: u32| {
            let text = fs::read_to_string(system.join(format!("node/node{node}/distance"))).unwrap_or_default();
            (node, text.split_whitespace().filter_map(|n| n.parse().ok()).collect())
        };
        let nodes: Vec<u32> = numbered(&system.join("node"), "node").collect();
        let memory = nodes.iter().copied().map(of_node).collect();
        Topology { cpus, memory, distances: nodes.into_iter().map(distances).collect() }
    }

    /// The nodes, in order.
    pub fn nodes(&self) -> BTreeSet<u32> {
        let nodes: BTreeSet<u32> = self.cpus.iter().map(|c| c.node).chain(self.memory.keys().copied()).collect();
        if nodes.is_empty() { BTreeSet::from([0]) } else { nodes }
    }

    pub fn all_cpus(&self) -> BTreeSet<u32> {
        self.cpus.iter().map(|c| c.id).collect()
    }

    /// How far from each other (and themselves) the nodes of a set are on average, in thousandths.
    pub fn distance(&self, mask: Mask) -> u64 {
        let far = |from: u32, to: u32| self.distances.get(&from).and_then(|all| all.get(to as usize)).copied();
        let nodes: Vec<u32> = self.nodes().into_iter().filter(|node| has(mask, *node)).collect();
        let pairs = nodes.iter().flat_map(|from| nodes.iter().filter_map(|to| far(*from, *to)));
        let (sum, count) = pairs.fold((0, 0), |(sum, count), far| (sum + u64::from(far) * 1000, count + 1));
        sum.checked_div(count).unwrap_or(0)
    }

    /// Chooses `count` processors as the options have it, first of those on the nodes of `near`.
    pub fn choose_cpus(
        &self,
        free: &BTreeSet<u32>,
        count: usize,
        near: Option<Mask>,
        options: CpuOptions,
    ) -> Option<BTreeSet<u32>> {
        let across = options.across_nodes.then(|| self.take_across_nodes(free, count, options)).flatten();
        across.or_else(|| self.take_cpus(free, count, near, options.by_cache))
    }

    /// In equal parts from as few nodes as can give them, if that is more than one. As `takeByTopologyNUMADistributed`.
    fn take_across_nodes(&self, free: &BTreeSet<u32>, count: usize, options: CpuOptions) -> Option<BTreeSet<u32>> {
        let on = |node: u32| {
            self.cpus.iter().filter(|c| c.node == node && free.contains(&c.id)).map(|c| c.id).collect::<BTreeSet<u32>>()
        };
        let per_core = if options.whole_cores { self.threads_of_a_core() } else { 1 };
        let size = |mask: Mask| mask.count_ones() as usize;
        let masks = masks(&self.nodes(), MOST_NODES);
        let share = |mask: Mask| count / size(mask) / per_core * per_core;
        let nodes_of = |mask: Mask| self.nodes().into_iter().filter(move |node| has(mask, *node));
        let gives = |mask: &&Mask| {
            let free: Vec<usize> = nodes_of(**mask).map(|node| on(node).len()).collect();
            free.iter().sum::<usize>() >= count && free.iter().all(|free| *free >= share(**mask))
        };
        let least = masks.iter().find(gives).map(|mask| size(*mask)).filter(|nodes| *nodes > 1)?;
        // Of those the ones that leave the nodes the most alike.
        let unevenness = |mask: &&Mask| {
            let left: Vec<usize> = nodes_of(**mask).map(|node| on(node).len() - share(**mask)).collect();
            left.iter().max().zip(left.iter().min()).map_or(0, |(most, least)| most - least)
        };
        let chosen = masks.iter().filter(|mask| size(**mask) == least).filter(gives).min_by_key(unevenness)?;
        let mut taken = BTreeSet::new();
        for node in nodes_of(*chosen) {
            taken.extend(self.take_cpus(&on(node), share(*chosen), None, false)?);
        }
        let rest: BTreeSet<u32> = nodes_of(*chosen).flat_map(on).filter(|id| !taken.contains(id)).collect();
        taken.extend(self.take_cpus(&rest, count - taken.len(), None, false)?);
        Some(taken)
    }

    /// Those of these processors whose cores are among them whole.
    pub fn whole_cores(&self, of: &BTreeSet<u32>) -> BTreeSet<u32> {
        let key = |c: &Cpu| (c.socket, c.core);
        let broken: BTreeSet<(u32, u32)> = self.cpus.iter().filter(|c| !of.contains(&c.id)).map(key).collect();
        self.cpus.iter().filter(|c| !broken.contains(&key(c))).map(|c| c.id).collect()
    }

    /// How many processors a core is.
    pub fn threads_of_a_core(&self) -> usize {
        let mut cores: BTreeMap<(u32, u32), usize> = BTreeMap::new();
        self.cpus.iter().for_each(|c| *cores.entry((c.socket, c.core)).or_default() += 1);
        cores.into_values().max().unwrap_or(1)
    }

    /// Chooses `count` processors: whole sockets, then whole caches if wanted, then whole cores, then what fills up what is used
    /// already; first of those on the nodes of `near`. As `takeByTopologyNUMAPacked`.
    pub fn take_cpus(
        &self,
        free: &BTreeSet<u32>,
        count: usize,
        near: Option<Mask>,
        by_cache: bool,
    ) -> Option<BTreeSet<u32>> {
        if free.len() < count {
            return None;
        }
        let mut taken = BTreeSet::new();
        let close = |cpu: &&Cpu| near.is_none_or(|mask| has(mask, cpu.node));
        for only_near in [true, false] {
            let mut left: BTreeSet<u32> = self
                .cpus
                .iter()
                .filter(|c| free.contains(&c.id) && !taken.contains(&c.id) && (!only_near || close(c)))
                .map(|c| c.id)
                .collect();
            let keys: [fn(&Cpu) -> (u32, u32); 3] =
                [|c| (c.socket, 0), |c| (c.socket, c.cache), |c| (c.socket, c.core + 1)];
            for (level, key) in keys.into_iter().enumerate().filter(|(level, _)| *level != 1 || by_cache) {
                let mut groups: BTreeMap<(u32, u32), (usize, Vec<u32>)> = BTreeMap::new();
                for cpu in &self.cpus {
                    let group = groups.entry(key(cpu)).or_default();
                    group.0 += 1;
                    group.1.extend(Some(cpu.id).filter(|id| left.contains(id)));
                }
                // Sockets that are used already are filled up first.
                let mut whole: Vec<_> = groups.into_iter().filter(|(_, (all, free))| free.len() == *all).collect();
                let in_socket =
                    |socket: u32| self.cpus.iter().filter(|c| c.socket == socket && left.contains(&c.id)).count();
                whole.sort_by_key(|((socket, core), _)| (in_socket(*socket), *socket, *core));
                for (_, (size, cpus)) in whole {
                    if size <= count - taken.len() {
                        taken.extend(&cpus);
                    }
                }
                left.retain(|id| !taken.contains(id));
                // What is less than a cache's comes from one, if one has it.
                let missing = count - taken.len();
                if level == 1 && missing > 0 {
                    let of_cache = |cache: u32| self.cpus.iter().filter(move |c| c.cache == cache).map(|c| c.id);
                    let caches: BTreeSet<u32> = self.cpus.iter().map(|c| c.cache).collect();
                    let free_of = |cache: &u32| of_cache(*cache).filter(|id| left.contains(id)).count();
                    let fitting = caches.into_iter().filter(|cache| free_of(cache) >= missing).min_by_key(free_of);
                    if let Some(cache) = fitting {
                        let of_cache: BTreeSet<u32> = of_cache(cache).collect();
                        left.retain(|id| of_cache.contains(id));
                    }
                }
            }
            let siblings = |cpu: &Cpu| {
                let same = self.cpus.iter().filter(|o| o.socket == cpu.socket && left.contains(&o.id));
                let in_core = same.clone().filter(|o| o.core == cpu.core).count();
                (same.count(), in_core, cpu.id)
            };
            let mut single: Vec<&Cpu> = self.cpus.iter().filter(|c| left.contains(&c.id)).collect();
            single.sort_by_key(|cpu| siblings(cpu));
            let missing = count - taken.len();
            taken.extend(single.into_iter().take(missing).map(|c| c.id));
        }
        (taken.len() == count).then_some(taken)
    }
}

pub fn has(mask: Mask, node: u32) -> bool {
    node < Mask::BITS && mask & (1 << node) != 0
}

/// The numbers of directory entries `<prefix>N`, in order.
fn numbered(directory: &Path, prefix: &str) -> impl Iterator<Item = u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let found: BTreeSet<u32> =
        entries.filter_map(|e| e.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()).collect();
    found.into_iter()
}

/// `0-2,5` as a set.
pub fn parse_set(text: &str) -> Option<BTreeSet<u32>> {
    let mut set = BTreeSet::new();
    for part in text.trim().split(',').filter(|p| !p.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (u32, u32) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        set.extend(from..=to.min(from.saturating_add(4096)));
    }
    Some(set)
}

/// Whether `count` processors can be whole cores where so many processors are in cores that are free. As `SMTAlignmentError`.
pub fn check_threads(count: usize, per_core: usize, free: usize) -> Result<(), String> {
    if !count.is_multiple_of(per_core) {
        return Err(format!("SMT Alignment Error: requested {count} cpus not multiple cpus per core = {per_core}"));
    }
    if count > free {
        return Err(format!(
            "SMT Alignment Error: not enough free physical CPUs: available physical CPUs = {free}, requested CPUs = {count}, \
             CPUs per core = {per_core}"
        ));
    }
    Ok(())
}

/// A set as `0-2,5`.
pub fn show_set(set: &BTreeSet<u32>) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for id in set {
        match ranges.last_mut() {
            Some((_, to)) if *to + 1 == *id => *to = *id,
            _ => ranges.push((*id, *id)),
        }
    }
    let shown = ranges.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") });
    shown.collect::<Vec<_>>().join(",")
}

/// All sets of these nodes, the smaller first.
fn masks(nodes: &BTreeSet<u32>, most: usize) -> Vec<Mask> {
    let nodes: Vec<u32> = nodes.iter().copied().filter(|n| *n < Mask::BITS).take(most).collect();
    let mut all: Vec<Mask> = (1u64..1 << nodes.len())
        .map(|bits| nodes.iter().enumerate().filter(|(i, _)| bits & (1 << i) != 0).fold(0, |m, (_, n)| m | 1 << n))
        .collect();
    all.sort_by_key(|m| (m.count_ones(), *m));
    all
}

/// The hints of a resource of which each node has `capacity` and has `free` left.
pub fn hints(
    nodes: &BTreeSet<u32>,
    most: usize,
    wanted: u64,
    capacity: impl Fn(u32) -> u64,
    free: impl Fn(u32) -> u64,
) -> Vec<Hint> {
    let sum =
        |mask: Mask, of: &dyn Fn(u32) -> u64| nodes.iter().filter(|n| has(mask, **n)).map(|n| of(*n)).sum::<u64>();
    let masks = masks(nodes, most);
    let least = masks.iter().filter(|m| sum(**m, &capacity) >= wanted).map(|m| m.count_ones()).min();
    let fits = masks.iter().filter(|m| sum(**m, &free) >= wanted);
    fits.map(|m| Hint { mask: Some(*m), preferred: Some(m.count_ones()) == least }).collect()
}

/// The set of nodes for all resources, and whether the policy takes it. A resource without hints can be given nowhere. Of sets
/// that are as good and as small, the one with the least `distance` is best.
pub fn merge(
    policy: Policy,
    nodes: &BTreeSet<u32>,
    resources: &[Vec<Hint>],
    distance: impl Fn(Mask) -> u64,
) -> (Hint, bool) {
    let any = Hint { mask: None, preferred: true };
    if policy == Policy::None || resources.is_empty() {
        return (any, true);
    }
    let all = nodes.iter().filter(|n| **n < Mask::BITS).fold(0, |m, n| m | 1u64 << n);
    let mut best: Option<(bool, u32, u64, Mask)> = None;
    let mut combined: Vec<(Mask, bool)> = vec![(all, true)];
    for hints in resources {
        let usable = hints
            .iter()
            .filter(|h| policy != Policy::SingleNumaNode || h.preferred && h.mask.is_none_or(|m| m.count_ones() == 1));
        let usable: Vec<&Hint> = usable.collect();
        let mut next = BTreeSet::new();
        for (mask, preferred) in &combined {
            for hint in &usable {
                let both = mask & hint.mask.unwrap_or(all);
                if both != 0 {
                    // A set that is narrower than what a resource asked for is no preferred one.
                    next.insert((both, *preferred && hint.preferred));
                }
            }
        }
        combined = next.into_iter().collect();
    }
    for (mask, preferred) in combined {
        let candidate = (!preferred, mask.count_ones(), distance(mask), mask);
        if best.is_none_or(|b| candidate < b) {
            best = Some(candidate);
        }
    }
    match best {
        Some((not_preferred, _, _, mask)) => {
            let hint = Hint { mask: Some(mask), preferred: !not_preferred };
            let single = policy != Policy::SingleNumaNode || mask.count_ones() == 1;
            (hint, policy == Policy::BestEffort || hint.preferred && single)
        }
        None => (Hint { mask: Some(all), preferred: false }, policy == Policy::BestEffort),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two sockets, each a node, of two cores with two threads: 0 and 4 share a core, and so on.
    fn machine() -> Topology {
        let mut cpus: Vec<Cpu> =
            (0..8).map(|id| Cpu { id, socket: id / 2 % 2, core: id % 2, node: id / 2 % 2, cache: id % 4 }).collect();
        cpus.sort();
        Topology { cpus, ..Default::default() }
    }

    #[test]
    fn sets_are_read_and_shown() {
        for text in ["", "0", "0-3", "0-1,4,6-7"] {
            assert_eq!(show_set(&parse_set(text).unwrap()), text);
        }
        assert_eq!(parse_set("a"), None);
    }

    #[test]
    fn processors_are_taken_whole_where_possible() {
        let machine = machine();
        let all = machine.all_cpus();
        let take =
            |free: &BTreeSet<u32>, count, near| machine.take_cpus(free, count, near, false).map(|s| show_set(&s));
        assert_eq!(take(&all, 4, None).as_deref(), Some("0-1,4-5"), "a socket");
        assert_eq!(take(&all, 2, None).as_deref(), Some("0,4"), "a core");
        assert_eq!(take(&all, 2, Some(0b10)).as_deref(), Some("2,6"), "a core of the node");
        let used: BTreeSet<u32> = all.iter().copied().filter(|id| *id != 4).collect();
        assert_eq!(take(&used, 1, None).as_deref(), Some("0"), "what is left of a core");
        assert_eq!(take(&used, 2, None).as_deref(), Some("1,5"), "the rest of the socket");
        assert_eq!(take(&used, 8, None), None);
    }

    #[test]
    fn processors_are_chosen_by_options() {
        let machine = machine();
        let all = machine.all_cpus();
        let choose = |cpus: &Topology, free: &BTreeSet<u32>, count, options| {
            cpus.choose_cpus(free, count, None, options).map(|s| show_set(&s))
        };
        let across = CpuOptions { across_nodes: true, ..Default::default() };
        assert_eq!(choose(&machine, &all, 4, across).as_deref(), Some("0-1,4-5"), "one node has them");
        let on = |node: u32, text: Option<String>| {
            let set = parse_set(&text.unwrap()).unwrap();
            machine.cpus.iter().filter(|c| c.node == node && set.contains(&c.id)).count()
        };
        for count in [6, 8] {
            let chosen = choose(&machine, &all, count, across);
            assert_eq!((on(0, chosen.clone()), on(1, chosen)), (count / 2, count / 2));
        }
        // Four caches of two cores each, on one socket.
        let mut cpus: Vec<Cpu> = (0..8).map(|id| Cpu { id, socket: 0, core: id, node: 0, cache: id / 2 }).collect();
        cpus.sort();
        let cached = Topology { cpus, ..Default::default() };
        let by_cache = CpuOptions { by_cache: true, ..Default::default() };
        let free = BTreeSet::from([1, 2, 3, 4, 6, 7]);
        assert_eq!(choose(&cached, &free, 2, by_cache).as_deref(), Some("2-3"));
        assert_eq!(choose(&cached, &free, 2, CpuOptions::default()).as_deref(), Some("1-2"));
        assert_eq!(choose(&cached, &free, 3, by_cache).as_deref(), Some("1-3"));
    }

    #[test]
    fn of_sets_of_nodes_the_closest_is_taken() {
        let nodes = BTreeSet::from([0, 1, 2]);
        let distances = [(0, vec![10, 32, 11]), (1, vec![32, 10, 32]), (2, vec![11, 32, 10])].into();
        let machine =
            Topology { distances, memory: [0, 1, 2].map(|n| (n, BTreeMap::new())).into(), ..Default::default() };
        let wanted = [hints(&nodes, 8, 6, |_| 4, |_| 4)];
        let best = |distance: &dyn Fn(Mask) -> u64| merge(Policy::Restricted, &nodes, &wanted, distance).0.mask;
        assert_eq!(best(&|_| 0), Some(0b011));
        assert_eq!(best(&|mask| machine.distance(mask)), Some(0b101));
        let of =
            |pairs: &[(&str, &str)]| Options::of(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect());
        assert_eq!(of(&[("max-allowable-numa-nodes", "12")]), Ok(Options { closest: false, most_nodes: 12 }));
        assert_eq!(of(&[("prefer-closest-numa-nodes", "true")]), Ok(Options { closest: true, most_nodes: 8 }));
        assert!(of(&[("max-allowable-numa-nodes", "2")]).is_err());
    }

    #[test]
    fn policies_choose_and_refuse() {
        let nodes = BTreeSet::from([0, 1]);
        let on = |free: [u64; 2], wanted| hints(&nodes, 8, wanted, |_| 4, move |n| free[n as usize]);
        let pick = |policy, resources: &[Vec<Hint>]| {
            let (hint, admitted) = merge(policy, &nodes, resources, |_| 0);
            (hint.mask, hint.preferred, admitted)
        };
        use Policy::{BestEffort, Restricted, SingleNumaNode};
        assert_eq!(pick(Restricted, &[on([4, 4], 2)]), (Some(0b01), true, true));
        assert_eq!(pick(Restricted, &[on([4, 4], 2), on([0, 4], 2)]), (Some(0b10), true, true));
        // Each has room on another node.
        let apart = [on([4, 0], 2), on([0, 4], 2)];
        assert!(!pick(Restricted, &apart).2 && pick(BestEffort, &apart).2);
        // What no one node has is fine where no node could have it.
        assert_eq!(pick(Restricted, &[on([4, 4], 6)]), (Some(0b11), true, true));
        assert!(!pick(SingleNumaNode, &[on([4, 4], 6)]).2);
        assert!(!pick(SingleNumaNode, &[on([1, 1], 2)]).2);
        assert_eq!(pick(Policy::None, &apart), (None, true, true));
    }

    #[test]
    fn the_machine_is_read() {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in [
            ("cpu/cpu0/topology/core_id", "0"),
            ("cpu/cpu1/topology/core_id", "1"),
            ("cpu/cpu1/topology/physical_package_id", "1"),
            ("cpu/cpu1/node1/x", ""),
            ("node/node0/meminfo", "Node 0 MemTotal:       2048 kB\n"),
            ("node/node0/hugepages/hugepages-2048kB/nr_hugepages", "3\n"),
        ] {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let found = Topology::read_at(dir.path(), None);
        assert_eq!(found.cpus[1], Cpu { id: 1, core: 1, socket: 1, node: 1, cache: 0 });
        assert_eq!(found.memory[&0]["memory"], 2 << 20);
        assert_eq!(found.memory[&0]["hugepages-2Mi"], 6 << 20);
        assert!(!Topology::read().cpus.is_empty());
    }
}
