//! nftables: a table as plain data ([`Ruleset`]), the transaction that leads from one to another, and `nft` to apply it whole
//! or not at all.
use crate::command::{self, CommandError};
use std::{collections::BTreeMap, fmt::Write as _};

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
        let changed_chain = |name: &String, chain: &Chain| old.chains.get(name).is_none_or(|o| o.rules != chain.rules);
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
}
