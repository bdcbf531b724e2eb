//! Files that are followed, and one kind of them: the names of a hosts file.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime};

use hickory_proto::rr::Name;

/// How often a file is looked at.
pub(crate) const PERIOD: Duration = Duration::from_secs(5);

/// A file that may change at any time.
pub(crate) struct Followed {
    path: PathBuf,
    modified: Option<SystemTime>,
    looked: Option<Instant>,
}

// === impl Followed ===

impl Followed {
    pub(crate) fn new(path: PathBuf) -> Followed {
        Followed { path, modified: None, looked: None }
    }

    /// Its text where that has changed since it was looked at last.
    pub(crate) fn changed(&mut self) -> Option<String> {
        if self.looked.is_some_and(|looked| looked.elapsed() < PERIOD) {
            return None;
        }
        let first = self.looked.replace(Instant::now()).is_none();
        let modified = std::fs::metadata(&self.path).and_then(|meta| meta.modified()).ok();
        if modified == self.modified && !first {
            return None;
        }
        self.modified = modified;
        match std::fs::read_to_string(&self.path) {
            Ok(text) => Some(text),
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "file not read");
                None
            }
        }
    }
}

/// Names and addresses, both ways.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Hosts {
    addresses: HashMap<Name, Vec<IpAddr>>,
    names: HashMap<IpAddr, Vec<Name>>,
}

// === impl Hosts ===

impl Hosts {
    /// From lines of an address and its names; the first name is the one that stands for the address.
    pub(crate) fn parse(text: &str) -> Hosts {
        let mut hosts = Hosts::default();
        for line in text.lines() {
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            let Some(address) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
            for word in words {
                let Ok(mut name) = Name::from_str(word) else { continue };
                name.set_fqdn(true);
                let name = name.to_lowercase();
                hosts.addresses.entry(name.clone()).or_default().push(address);
                hosts.names.entry(address).or_default().push(name);
            }
        }
        hosts
    }

    pub(crate) fn addresses(&self, name: &Name) -> Option<&[IpAddr]> {
        self.addresses.get(&name.to_lowercase()).map(Vec::as_slice)
    }

    pub(crate) fn names(&self, address: IpAddr) -> Option<&[Name]> {
        self.names.get(&address).map(Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hosts_file_is_read_both_ways() {
        let hosts =
            Hosts::parse("# x\n10.0.0.1 Printer.example printer # here\n10.0.0.2 printer\nnonsense y\nfd00::1 six\n");
        let name = |text: &str| Name::from_str(text).expect("a name");
        let addresses = |text: &str| hosts.addresses(&name(text)).map(|all| all.len());
        assert_eq!(["printer.example.", "PRINTER.", "six.", "y."].map(addresses), [Some(1), Some(2), Some(1), None]);
        let back = hosts.names("10.0.0.1".parse().expect("an address")).expect("names");
        assert_eq!(back, [name("printer.example."), name("printer.")]);
    }

    #[test]
    fn a_file_is_read_when_it_has_changed() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("f");
        std::fs::write(&path, "a").expect("written");
        let mut followed = Followed::new(path);
        assert_eq!((followed.changed().as_deref(), followed.changed()), (Some("a"), None));
    }
}
