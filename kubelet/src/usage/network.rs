//! What went over a pod's network interfaces: `/proc/<pid>/net/dev` of a process in it.

use std::fs;

/// Counts of one interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub received_bytes: u64,
    pub received_errors: u64,
    pub sent_bytes: u64,
    pub sent_errors: u64,
}

/// The interfaces that a process sees, without the loopback.
pub fn interfaces(pid: u32) -> Vec<Interface> {
    parse(&fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default())
}

fn parse(table: &str) -> Vec<Interface> {
    let line = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        let at = |index: usize| numbers.get(index).copied();
        Some(Interface {
            name: name.trim().to_owned(),
            received_bytes: at(0)?,
            received_errors: at(2)?,
            sent_bytes: at(8)?,
            sent_errors: at(10)?,
        })
    };
    table.lines().filter_map(line).filter(|i| i.name != "lo").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read() {
        let table = "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    lo:  10 1 0 0 0 0 0 0 10 1 0 0 0 0 0 0\n  eth0: 100 2 3 0 0 0 0 0 200 4 5 0 0 0 0 0\n";
        let eth0 =
            Interface { name: "eth0".into(), received_bytes: 100, received_errors: 3, sent_bytes: 200, sent_errors: 5 };
        assert_eq!(parse(table), [eth0]);
    }
}
