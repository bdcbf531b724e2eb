//! Parts of the cluster's pod addresses, one a node: which are taken, which is next. Pure.
use std::{fmt, net::IpAddr};

/// Bits of the number of a part within the cluster's range that are kept track of. Of IPv6 as `clusterSubnetMaxDiff`.
const MAX_PART_BITS: (u8, u8) = (24, 16);

/// A network: address and prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    address: u128,
    v6: bool,
    prefix: u8,
}

/// Why a range is of no use; the message says what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    #[error("{0:?} is no network: write it like 10.244.0.0/16")]
    Malformed(String),
    #[error(
        "--cluster-cidr {cluster} cannot be cut into parts of /{part}: the mask size must be between the range's own and {limit}"
    )]
    Parts { cluster: Cidr, part: u8, limit: u8 },
    #[error("no part of {0} is free: choose a larger --cluster-cidr or smaller --node-cidr-mask-size")]
    Full(Cidr),
}

// === impl Cidr ===

impl Cidr {
    pub fn parse(text: &str) -> Result<Self, CidrError> {
        let malformed = || CidrError::Malformed(text.to_owned());
        let (address, prefix) = text.trim().split_once('/').ok_or_else(malformed)?;
        let address: IpAddr = address.parse().map_err(|_| malformed())?;
        let prefix: u8 = prefix.parse().map_err(|_| malformed())?;
        let (bits, v6) = match address {
            IpAddr::V4(a) => (u128::from(a.to_bits()) << 96, false),
            IpAddr::V6(a) => (a.to_bits(), true),
        };
        if prefix > if v6 { 128 } else { 32 } {
            return Err(malformed());
        }
        Ok(Self { address: bits & mask(prefix), v6, prefix })
    }

    pub fn is_v6(&self) -> bool {
        self.v6
    }

    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Does all of another lie within?
    pub fn contains(&self, other: &Self) -> bool {
        self.prefix <= other.prefix && self.overlaps(other)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let shared = mask(self.prefix.min(other.prefix));
        self.v6 == other.v6 && self.address & shared == other.address & shared
    }
}

fn mask(prefix: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.v6 {
            write!(f, "{}/{}", std::net::Ipv6Addr::from_bits(self.address), self.prefix)
        } else {
            write!(f, "{}/{}", std::net::Ipv4Addr::from_bits((self.address >> 96) as u32), self.prefix)
        }
    }
}

/// The parts of one range. As `CidrSet`.
#[derive(Debug)]
pub struct CidrSet {
    cluster: Cidr,
    part: u8,
    taken: Vec<bool>,
    next: usize,
}

impl CidrSet {
    pub fn new(cluster: Cidr, part: u8) -> Result<Self, CidrError> {
        let (bits, length) = if cluster.v6 { (MAX_PART_BITS.1, 128) } else { (MAX_PART_BITS.0, 32) };
        let limit = (cluster.prefix + bits).min(length);
        if part < cluster.prefix || part > limit {
            return Err(CidrError::Parts { cluster, part, limit });
        }
        Ok(Self { cluster, part, taken: vec![false; 1 << (part - cluster.prefix)], next: 0 })
    }

    /// The part that is free next, in turn, so that a node's is not given anew right away.
    pub fn allocate(&mut self) -> Result<Cidr, CidrError> {
        let count = self.taken.len();
        let free = (0..count).map(|i| (self.next + i) % count).find(|i| !self.taken[*i]);
        let index = free.ok_or(CidrError::Full(self.cluster))?;
        self.taken[index] = true;
        self.next = (index + 1) % count;
        Ok(self.at(index))
    }

    /// All parts that `used` touches are taken; one outside of the range does not concern us.
    pub fn occupy(&mut self, used: &Cidr) {
        self.mark(used, true);
    }

    pub fn release(&mut self, used: &Cidr) {
        self.mark(used, false);
    }

    fn mark(&mut self, used: &Cidr, taken: bool) {
        if !self.cluster.overlaps(used) {
            return;
        }
        let shift = 128 - u32::from(self.part);
        let first = used.address.max(self.cluster.address);
        let last = (used.address | !mask(used.prefix)).min(self.cluster.address | !mask(self.cluster.prefix));
        let index = |a: u128| usize::try_from((a - self.cluster.address).checked_shr(shift).unwrap_or(0)).unwrap_or(0);
        for i in index(first)..=index(last) {
            if let Some(slot) = self.taken.get_mut(i) {
                *slot = taken;
            }
        }
    }

    fn at(&self, index: usize) -> Cidr {
        let offset = (index as u128).checked_shl(128 - u32::from(self.part)).unwrap_or(0);
        Cidr { address: self.cluster.address | offset, v6: self.cluster.v6, prefix: self.part }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(cluster: &str, part: u8) -> CidrSet {
        CidrSet::new(Cidr::parse(cluster).unwrap(), part).unwrap()
    }

    #[test]
    fn parts_are_given_in_turn_and_none_twice() {
        let mut all = set("10.244.0.0/22", 24);
        let first = all.allocate().unwrap();
        assert_eq!(first.to_string(), "10.244.0.0/24");
        assert_eq!(all.allocate().unwrap().to_string(), "10.244.1.0/24");
        all.release(&first);
        assert_eq!(all.allocate().unwrap().to_string(), "10.244.2.0/24");
        assert_eq!(all.allocate().unwrap().to_string(), "10.244.3.0/24");
        assert_eq!(all.allocate().unwrap(), first);
        assert!(all.allocate().unwrap_err().to_string().contains("10.244.0.0/22"));
    }

    #[test]
    fn what_is_used_is_not_given() {
        let mut all = set("10.244.0.0/16", 24);
        all.occupy(&Cidr::parse("10.244.0.0/23").unwrap());
        all.occupy(&Cidr::parse("10.244.2.128/25").unwrap());
        all.occupy(&Cidr::parse("10.96.0.0/12").unwrap());
        assert_eq!(all.allocate().unwrap().to_string(), "10.244.3.0/24");
        let mut inside = set("10.0.0.0/15", 24);
        inside.occupy(&Cidr::parse("10.0.0.0/8").unwrap());
        assert!(inside.allocate().is_err());
    }

    #[test]
    fn ipv6_has_parts_too() {
        let mut all = set("fd00:10:244::/56", 64);
        assert_eq!(all.allocate().unwrap().to_string(), "fd00:10:244::/64");
        assert_eq!(all.allocate().unwrap().to_string(), "fd00:10:244:1::/64");
    }

    #[test]
    fn useless_ranges_are_refused() {
        for text in ["10.0.0.0", "10.0.0.0/33", "x/8", ""] {
            assert!(Cidr::parse(text).is_err(), "{text}");
        }
        assert!(CidrSet::new(Cidr::parse("10.0.0.0/24").unwrap(), 16).is_err());
        assert!(CidrSet::new(Cidr::parse("10.0.0.0/8").unwrap(), 26).is_ok());
        assert!(CidrSet::new(Cidr::parse("fd00::/48").unwrap(), 65).is_err());
    }
}
