//! Address ranges as `--service-cidr` and `--pod-network-cidr` name them, and the addresses that a cluster takes from them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use component_base::cidr::Cidr as Range;

/// The offset of the `kubernetes` Service in the service range.
const KUBERNETES_SERVICE: u32 = 1;
/// The offset of the cluster DNS Service in the service range. As `GetDNSIP`.
const DNS_SERVICE: u32 = 10;

/// A range in CIDR notation; the host bits are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cidr(Range);

/// Why a text is not a range.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum CidrError {
    #[error("{0:?} is not in CIDR notation (like 10.96.0.0/12)")]
    Syntax(String),
    #[error("{0:?} has host bits set: the range is {1}")]
    HostBits(String, Cidr),
}

impl Cidr {
    /// The `offset`th address; `None` where the range is too small.
    pub(crate) fn nth(&self, offset: u32) -> Option<IpAddr> {
        let host_bits = u32::from(Range::host(self.0.address).prefix - self.0.prefix);
        if host_bits < 32 && u64::from(offset) >= 1 << host_bits {
            return None;
        }
        Some(match self.0.address {
            IpAddr::V4(base) => Ipv4Addr::from(u32::from(base) + offset).into(),
            IpAddr::V6(base) => Ipv6Addr::from(u128::from(base) + u128::from(offset)).into(),
        })
    }

    /// The address of the `kubernetes` Service.
    pub(crate) fn kubernetes_service(&self) -> Option<IpAddr> {
        self.nth(KUBERNETES_SERVICE)
    }

    /// The address of the cluster DNS Service.
    pub(crate) fn dns_service(&self) -> Option<IpAddr> {
        self.nth(DNS_SERVICE)
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Cidr, CidrError> {
        let syntax = || CidrError::Syntax(text.to_owned());
        let range: Range = text.parse().map_err(|_| syntax())?;
        let given = text.split('/').next().and_then(|address| address.parse::<IpAddr>().ok()).ok_or_else(syntax)?;
        if given == range.address { Ok(Cidr(range)) } else { Err(CidrError::HostBits(text.to_owned(), Cidr(range))) }
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cluster_takes_the_first_and_the_tenth_address() {
        for (range, kubernetes, dns) in [
            ("10.96.0.0/12", Some("10.96.0.1"), Some("10.96.0.10")),
            ("10.0.0.0/29", Some("10.0.0.1"), None),
            ("0.0.0.0/0", Some("0.0.0.1"), Some("0.0.0.10")),
            ("fd00:1::/108", Some("fd00:1::1"), Some("fd00:1::a")),
        ] {
            let cidr: Cidr = range.parse().expect(range);
            assert_eq!(cidr.kubernetes_service().map(|ip| ip.to_string()).as_deref(), kubernetes, "{range}");
            assert_eq!(cidr.dns_service().map(|ip| ip.to_string()).as_deref(), dns, "{range}");
            assert_eq!(cidr.to_string(), range);
        }
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for text in ["", "10.0.0.0", "10.0.0.0/33", "x/8", "fd00::/129", "10.0.0.0/-1"] {
            assert!(matches!(text.parse::<Cidr>(), Err(CidrError::Syntax(_))), "{text}");
        }
        assert_eq!(
            "10.96.0.1/12".parse::<Cidr>().unwrap_err().to_string(),
            "\"10.96.0.1/12\" has host bits set: the range is 10.96.0.0/12"
        );
    }
}
