//! nftables: a table as plain data ([`Ruleset`]), the transaction that leads from one to another, `nft` to apply it whole
//! or not at all, and a [`Guard`] that sees when somebody else has changed it.
use crate::command::{self, CommandError};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::{borrow::Borrow, collections::BTreeMap, fmt::Write as _, os::fd::AsRawFd as _};

/// Elements that one command names: fewer commands are faster, and a line stays readable.
const ELEMENTS_A_LINE: usize = 32;

/// What one table should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    pub chains: BTreeMap<String, Chain>,
    pub sets: BTreeMap<String, Set>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// `type nat hook prerouting priority dstnat;` for a base chain.
    pub hook: Option<String>,
    pub rules: Vec<String>,
}

/// A set, or a map when `map` is true.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    pub map: bool,
    /// `type ipv4_addr . inet_proto . inet_service : verdict;`
    pub declaration: String,
    /// Key to value; the value is empty in a set. A set that packets fill has none here.
    pub elements: BTreeMap<String, String>,
}

impl Ruleset {
    pub fn chain(&mut self, name: impl Into<String>, rules: Vec<String>) {
        self.chains.insert(name.into(), Chain { hook: None, rules });
    }

    pub fn base_chain(&mut self, name: &str, hook: &str, rules: Vec<String>) {
        self.chains.insert(name.to_owned(), Chain { hook: Some(hook.to_owned()), rules });
    }

    /// The whole table from nothing, in one transaction, whatever was there before.
    pub fn create(&self, table: &str) -> String {
        let mut text = format!("add table {table}\ndelete table {table}\nadd table {table}\n");
        text.push_str(&self.update_from(&Self::default(), table));
        text
    }

    /// The transaction that turns `old` into this; empty if they are equal. What did not change is not touched, so
    /// sets that packets fill keep what they hold. References go before what they name, and come after it.
    pub fn update_from(&self, old: &Self, table: &str) -> String {
        let mut out = String::new();
        // Writing to a string does not fail; hence the ignored results below.
        // A set that becomes another kind is another set: rules that name it are written anew.
        let remade = self.sets.iter().filter(|(name, set)| old.sets.get(*name).is_some_and(|o| !o.same_kind(set)));
        let remade: Vec<String> = remade.map(|(name, _)| format!("@{name} ")).collect();
        let changed_chain = |name: &String, chain: &Chain| {
            let names_remade = |rule: &String| remade.iter().any(|set| rule.contains(set));
            old.chains.get(name).is_none_or(|o| o.rules != chain.rules) || chain.rules.iter().any(names_remade)
        };
        for (name, _) in old.chains.iter().filter(|(_, former)| !former.rules.is_empty()) {
            if self.chains.get(name).is_none_or(|chain| changed_chain(name, chain)) {
                let _ = writeln!(out, "flush chain {table} {name}");
            }
        }
        let none = Set::default();
        let kept = |name: &String, set: &Set| old.sets.get(name).filter(|o| o.same_kind(set));
        for (name, set) in &self.sets {
            let former = kept(name, set).unwrap_or(&none);
            if set.is_interval() {
                if former.elements != set.elements && !former.elements.is_empty() {
                    let _ = writeln!(out, "flush set {table} {name}");
                }
                continue;
            }
            elements(
                &mut out,
                "delete",
                table,
                name,
                former.elements.iter().filter(|(k, v)| set.elements.get(*k) != Some(*v)),
            );
        }
        for (name, set) in &self.sets {
            if let Some(former) = old.sets.get(name) {
                if former.same_kind(set) {
                    continue;
                }
                let _ = writeln!(out, "delete {} {table} {name}", former.keyword());
            }
            let _ = writeln!(out, "add {} {table} {name} {{ {} }}", set.keyword(), set.declaration);
        }
        for (name, chain) in self.chains.iter().filter(|(name, _)| !old.chains.contains_key(*name)) {
            let hook = chain.hook.as_ref().map_or(String::new(), |h| format!(" {{ {h} }}"));
            let _ = writeln!(out, "add chain {table} {name}{hook}");
        }
        for (name, chain) in self.chains.iter().filter(|(name, chain)| changed_chain(name, chain)) {
            for rule in &chain.rules {
                let _ = writeln!(out, "add rule {table} {name} {rule}");
            }
        }
        for (name, set) in &self.sets {
            let former = kept(name, set).unwrap_or(&none);
            let anew = set.is_interval() && former.elements != set.elements;
            let new = set.elements.iter().filter(|(k, v)| anew || former.elements.get(*k) != Some(*v));
            elements(&mut out, "add", table, name, new);
        }
        for name in old.chains.keys().filter(|name| !self.chains.contains_key(*name)) {
            let _ = writeln!(out, "delete chain {table} {name}");
        }
        for (name, set) in old.sets.iter().filter(|(name, _)| !self.sets.contains_key(*name)) {
            let _ = writeln!(out, "delete {} {table} {name}", set.keyword());
        }
        out
    }

    /// Takes in what `other` holds; elements of sets that both have are joined.
    pub fn merge(&mut self, other: Self) {
        self.chains.extend(other.chains);
        for (name, set) in other.sets {
            match self.sets.entry(name) {
                std::collections::btree_map::Entry::Vacant(entry) => drop(entry.insert(set)),
                std::collections::btree_map::Entry::Occupied(mut entry) => {
                    entry.get_mut().elements.extend(set.elements)
                }
            }
        }
    }
}

/// One command for a good many elements.
fn elements<'a>(
    out: &mut String,
    verb: &str,
    table: &str,
    set: &str,
    elements: impl Iterator<Item = (&'a String, &'a String)>,
) {
    let texts: Vec<String> = elements.map(|(key, value)| element(key, value)).collect();
    for chunk in texts.chunks(ELEMENTS_A_LINE) {
        let _ = writeln!(out, "{verb} element {table} {set} {{ {} }}", chunk.join(", "));
    }
}

impl Set {
    fn keyword(&self) -> &'static str {
        if self.map { "map" } else { "set" }
    }

    /// Ranges that neighbour each other cannot be taken out one by one: such a set is filled anew.
    fn is_interval(&self) -> bool {
        self.declaration.contains("interval")
    }

    fn same_kind(&self, other: &Self) -> bool {
        (self.map, &self.declaration) == (other.map, &other.declaration)
    }
}

fn element(key: &str, value: &str) -> String {
    if value.is_empty() { key.to_owned() } else { format!("{key} : {value}") }
}

/// A short, stable number for a name that is too long to be one in nftables. As FNV-1a.
pub fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Applies `transaction`, whole or not at all.
pub async fn apply(transaction: &str) -> Result<(), CommandError> {
    command::run("nft", &["-f", "-"], transaction).await.map(drop)
}

/// Tells whether a table still holds what we left in it. To list a large one is costly: that is done only where anybody's rules
/// have changed since it was seen whole, which the kernel counts.
#[derive(Debug, Default)]
pub struct Guard {
    /// The kernel's count when the table was as we left it.
    whole_at: Option<u32>,
}

impl Guard {
    /// Applies a transaction that changes the table. What others did before it is yet to be looked at.
    pub async fn apply(&mut self, transaction: &str) -> Result<(), CommandError> {
        let known = self.whole_at.take();
        let counts = counted(transaction).await?;
        self.whole_at = counts.filter(|(before, _)| known == Some(*before)).map(|(_, after)| after);
        Ok(())
    }

    /// Applies one that makes the table anew. As [`Ruleset::create`] gives it.
    pub async fn replace(&mut self, transaction: &str) -> Result<(), CommandError> {
        self.whole_at = None;
        self.whole_at = counted(transaction).await?.map(|(_, after)| after);
        Ok(())
    }

    /// Whether the table has all chains and sets of `wanted`, and no others, with as many rules, and no fewer elements.
    pub async fn is_intact<R: Borrow<Ruleset>>(&mut self, table: &str, wanted: impl FnOnce() -> R) -> bool {
        let now = generation();
        if now.is_some() && now == self.whole_at {
            return true;
        }
        let arguments: Vec<&str> = ["list", "table"].into_iter().chain(table.split(' ')).collect();
        let listed = command::run("nft", &arguments, "").await;
        let intact = listed.is_ok_and(|listed| holds(&listed, wanted().borrow()));
        self.whole_at = now.filter(|_| intact);
        intact
    }
}

/// The kernel's counts before a transaction and after it; none where others changed rules at the same time.
async fn counted(transaction: &str) -> Result<Option<(u32, u32)>, CommandError> {
    let before = generation();
    apply(transaction).await?;
    Ok(before.zip(generation()).filter(|(before, after)| after.wrapping_sub(*before) <= 1))
}

fn holds(listed: &str, wanted: &Ruleset) -> bool {
    let found = count(listed);
    let chain = |(name, chain): (&String, &Chain)| found.get(&("chain", name.as_str())) == Some(&chain.rules.len());
    let set = |(name, set): (&String, &Set)| {
        // What packets fill is as it is.
        let least = if set.declaration.contains("dynamic") { 0 } else { set.elements.len() };
        found.get(&(set.keyword(), name.as_str())).is_some_and(|count| *count >= least)
    };
    found.len() == wanted.chains.len() + wanted.sets.len()
        && wanted.chains.iter().all(chain)
        && wanted.sets.iter().all(set)
}

/// Of what `nft list table` prints: how many rules each chain has, and how many elements each set or map.
fn count(listed: &str) -> BTreeMap<(&str, &str), usize> {
    let mut counts = BTreeMap::new();
    let (mut inside, mut in_elements) = (None, false);
    for line in listed.lines().map(str::trim) {
        let Some(name) = inside else {
            let mut words = line.split(' ');
            if let (Some(kind @ ("chain" | "set" | "map")), Some(name)) = (words.next(), words.next()) {
                counts.insert((kind, name), 0);
                inside = Some((kind, name));
            }
            continue;
        };
        let elements = line.strip_prefix("elements = ");
        in_elements |= elements.is_some();
        let counted = match name.0 {
            _ if line == "}" => {
                inside = None;
                0
            }
            "chain" => usize::from(!(line.starts_with("type ") && line.contains(" hook "))),
            // Between elements there is a comma, also where a line ends.
            _ if in_elements => line.matches(',').count() + usize::from(elements.is_some()),
            _ => 0,
        };
        in_elements &= !line.ends_with('}');
        counts.entry(name).and_modify(|count| *count += counted);
    }
    counts
}

/// How often the rules of this network have been changed, by whomever; none if the kernel does not tell.
fn generation() -> Option<u32> {
    // `NFT_MSG_GETGEN` and its answer `NFT_MSG_NEWGEN` of the subsystem nf_tables.
    const ASK: u16 = 10 << 8 | 16;
    const ANSWER: u16 = 10 << 8 | 15;
    const HEADERS: usize = 20;
    let kind = (SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter);
    let netlink = socket(AddressFamily::Netlink, kind.0, kind.1, kind.2).ok()?;
    let mut request = [0; HEADERS];
    request[0..4].copy_from_slice(&(HEADERS as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&ASK.to_ne_bytes());
    // `NLM_F_REQUEST`
    request[6..8].copy_from_slice(&1u16.to_ne_bytes());
    send(netlink.as_raw_fd(), &request, MsgFlags::empty()).ok()?;
    let mut answer = [0; 256];
    // It is there when the request has been sent. First of its attributes is the count.
    let size = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT).ok()?;
    let count = answer[..size].get(HEADERS + 4..HEADERS + 8).filter(|_| answer[4..6] == ANSWER.to_ne_bytes())?;
    Some(u32::from_be_bytes(count.try_into().ok()?))
}

/// True if the table is there with this chain. Someone may have flushed all rules behind our back.
pub async fn exists(table: &str, chain: &str) -> bool {
    let arguments: Vec<&str> = ["list", "chain"].into_iter().chain(table.split(' ')).chain([chain]).collect();
    command::run("nft", &arguments, "").await.is_ok()
}

/// Takes a table away, whether it is there or not.
pub async fn remove(table: &str) -> Result<(), CommandError> {
    apply(&format!("add table {table}\ndelete table {table}\n")).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ruleset(chains: &[(&str, &[&str])], elements: &[(&str, &str)]) -> Ruleset {
        let mut ruleset = Ruleset::default();
        for (name, rules) in chains {
            ruleset.chain(*name, rules.iter().map(|r| (*r).to_owned()).collect());
        }
        let elements = elements.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        ruleset.sets.insert("m".into(), Set { map: true, declaration: "type ipv4_addr : verdict;".into(), elements });
        ruleset
    }

    #[test]
    fn what_is_missing_from_a_table_shows_in_its_listing() {
        let listed = "table ip t {\n\tmap m {\n\t\ttype ipv4_addr : verdict\n\t\telements = { 10.0.0.1 : goto a,\n\
            \t\t\t     10.0.0.2 : goto b, 10.0.0.3 : drop }\n\t}\n\n\tset clients {\n\t\ttype ipv4_addr\n\t\tflags dynamic,timeout\n\t}\n\n\
            \tchain a {\n\t\ttype nat hook output priority -100; policy accept;\n\t\tip daddr { 10.0.0.1, 10.0.0.2 } jump b\n\t\taccept\n\t}\n\n\
            \tchain b {\n\t}\n}\n";
        let mut whole = ruleset(
            &[("a", &["x", "y"]), ("b", &[])],
            &[("10.0.0.1", "goto a"), ("10.0.0.2", "goto b"), ("10.0.0.3", "drop")],
        );
        let dynamic = "type ipv4_addr; flags dynamic, timeout;".to_owned();
        whole.sets.insert("clients".into(), Set { declaration: dynamic, ..Set::default() });
        assert!(holds(listed, &whole));
        for (gone, with) in
            [("10.0.0.1 : goto a,", ""), ("accept\n\t}", "}"), ("chain b", "chain c"), ("elements", "e")]
        {
            assert!(!holds(&listed.replacen(gone, with, 1), &whole), "{gone}");
        }
    }

    #[test]
    fn equal_rule_sets_need_no_transaction() {
        let one = ruleset(&[("a", &["accept"])], &[("10.0.0.1", "goto a")]);
        assert_eq!(one.update_from(&one.clone(), "ip t"), "");
    }

    #[test]
    fn only_differences_are_applied_and_references_go_before_what_they_name() {
        let old = ruleset(&[("a", &["accept"]), ("b", &["drop"])], &[("10.0.0.1", "goto a"), ("10.0.0.2", "goto b")]);
        let new = ruleset(&[("a", &["accept"]), ("c", &["return"])], &[("10.0.0.1", "goto a"), ("10.0.0.2", "goto c")]);
        let expected = "flush chain ip t b\ndelete element ip t m { 10.0.0.2 : goto b }\nadd chain ip t c\n\
            add rule ip t c return\nadd element ip t m { 10.0.0.2 : goto c }\ndelete chain ip t b\n";
        assert_eq!(new.update_from(&old, "ip t"), expected);
    }

    #[test]
    fn rules_let_go_of_a_set_that_becomes_another() {
        let mut old = ruleset(&[("a", &["update @clients { ip saddr }"])], &[]);
        let mut new = old.clone();
        for (rules, seconds) in [(&mut old, 1), (&mut new, 2)] {
            let declaration = format!("type ipv4_addr; flags dynamic, timeout; timeout {seconds}s;");
            rules.sets.insert("clients".into(), Set { declaration, ..Set::default() });
        }
        let expected = "flush chain ip t a\ndelete set ip t clients\n\
            add set ip t clients { type ipv4_addr; flags dynamic, timeout; timeout 2s; }\nadd rule ip t a update @clients { ip saddr }\n";
        assert_eq!(new.update_from(&old, "ip t"), expected);
    }
}
