//! A range of addresses.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// `10.96.0.0/12`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cidr {
    base: u128,
    bits: u32,
    v4: bool,
}

impl Cidr {
    pub(super) fn parse(text: &str) -> Result<Cidr, String> {
        let error = || format!("{text:?} is no range of addresses: write it like 10.96.0.0/12");
        let (address, bits) = text.trim().split_once('/').ok_or_else(error)?;
        let (address, bits): (IpAddr, u32) =
            (address.parse().map_err(|_| error())?, bits.parse().map_err(|_| error())?);
        let (value, width, v4) = match address {
            IpAddr::V4(ip) => (u128::from(ip.to_bits()), 32, true),
            IpAddr::V6(ip) => (ip.to_bits(), 128, false),
        };
        if bits > width - 2 {
            return Err(format!("{text:?} is too small for services"));
        }
        let host_bits = width - bits;
        let base = if host_bits >= 128 { 0 } else { value >> host_bits << host_bits };
        Ok(Cidr { base, bits, v4 })
    }

    pub(super) fn family(&self) -> &'static str {
        if self.v4 { "IPv4" } else { "IPv6" }
    }

    pub(super) fn size(&self) -> u128 {
        let host_bits = if self.v4 { 32 - self.bits } else { 128 - self.bits };
        // More than anyone has services.
        1_u128 << host_bits.min(64)
    }

    /// The offset of the last address that may be given out (not the network, not IPv4's broadcast address).
    pub(super) fn usable(&self) -> u128 {
        if self.v4 { self.size() - 2 } else { self.size() - 1 }
    }

    pub(super) fn at(&self, offset: u128) -> IpAddr {
        let value = self.base + offset;
        if self.v4 {
            IpAddr::V4(Ipv4Addr::from_bits(u32::try_from(value).unwrap_or(u32::MAX)))
        } else {
            IpAddr::V6(Ipv6Addr::from_bits(value))
        }
    }

    /// Does it lie within, to be given out or not?
    pub(super) fn covers(&self, ip: IpAddr) -> bool {
        let value = match (ip, self.v4) {
            (IpAddr::V4(ip), true) => u128::from(ip.to_bits()),
            (IpAddr::V6(ip), false) => ip.to_bits(),
            _ => return false,
        };
        let host_bits = if self.v4 { 32 - self.bits } else { 128 - self.bits };
        host_bits >= 128 || value >> host_bits == self.base >> host_bits
    }

    /// May this address be given out?
    pub(super) fn contains(&self, ip: IpAddr) -> bool {
        let value = match (ip, self.v4) {
            (IpAddr::V4(ip), true) => u128::from(ip.to_bits()),
            (IpAddr::V6(ip), false) => ip.to_bits(),
            _ => return false,
        };
        value > self.base && value - self.base <= self.usable()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.at(0), self.bits)
    }
}
