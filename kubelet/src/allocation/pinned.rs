//! Processors and memory of one container: which it is given, and what is counted of that.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, Pod};

use super::held::{self, All, Left};
use super::topology::{self, Mask};
use super::{Allocator, unexpected};
use crate::metrics::managers;
use crate::status::Ended;

const NO_MEMORY: &str =
    "[memorymanager] failed to get the default NUMA affinity, no NUMA nodes with enough memory is available";

impl Allocator {
    pub(super) fn allocate_cpus(
        &self,
        pod: &Pod,
        container: &Container,
        held: &All,
        left: &Left,
        near: Option<Mask>,
    ) -> Result<BTreeSet<u32>, Ended> {
        let count = held::exclusive_cpus(pod, container);
        if self.policies.static_cpus.is_none() || count == 0 {
            return Ok(BTreeSet::new());
        }
        managers().cpu_requests.inc();
        let mut free = self.free_cpus(held, left);
        if self.policies.cpus.whole_cores {
            // Of a core that is in part somebody's, or kept back, nothing is given.
            free = self.topology.whole_cores(&free);
            topology::check_threads(count, self.topology.threads_of_a_core(), free.len())
                .map_err(|why| Ended::new("SMTAlignmentError", why))?;
        }
        let taken = self.topology.choose_cpus(&free, count, near, self.policies.cpus);
        taken.ok_or_else(|| {
            let free = free.len();
            unexpected(format!("not enough cpus available to satisfy request: requested={count}, available={free}"))
        })
    }

    pub(super) fn allocate_memory(
        &self,
        pod: &Pod,
        container: &Container,
        held: &All,
        left: &Left,
        near: Option<Mask>,
    ) -> Result<BTreeMap<u32, BTreeMap<String, u64>>, Ended> {
        let mut given: BTreeMap<u32, BTreeMap<String, u64>> = BTreeMap::new();
        let wanted = held::exclusive_memory(pod, container);
        if self.policies.static_memory.is_none() || wanted.is_empty() {
            return Ok(given);
        }
        managers().memory_requests.inc();
        for (kind, mut bytes) in wanted {
            let (close, far): (Vec<u32>, Vec<u32>) =
                self.topology.nodes().into_iter().partition(|n| near.is_none_or(|m| topology::has(m, *n)));
            for node in close.into_iter().chain(far) {
                let part = self.free_memory(held, left, node, &kind).min(bytes);
                if part > 0 {
                    given.entry(node).or_default().insert(kind.clone(), part);
                    bytes -= part;
                }
            }
            if bytes > 0 {
                return Err(unexpected(NO_MEMORY));
            }
        }
        Ok(given)
    }

    /// Tells how the processors are given away now.
    pub(super) fn count(&self, held: &All) {
        if self.policies.static_cpus.is_none() {
            return;
        }
        let (all, taken) = (self.topology.all_cpus(), held::taken_cpus(held));
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        managers().cpu_exclusive.set(number(taken.len()));
        managers().cpu_shared_millicores.set(number(all.difference(&taken).count()) * 1000);
        for node in self.topology.nodes() {
            let here = self.topology.cpus.iter().filter(|cpu| cpu.node == node && taken.contains(&cpu.id)).count();
            managers().cpu_by_node.get_or_create(&[("numa_node", node.to_string())]).set(number(here));
        }
    }
}
