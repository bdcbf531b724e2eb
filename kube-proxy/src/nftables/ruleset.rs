//! A table of nftables as plain data, and the transaction that leads from one to another.
use std::{collections::BTreeMap, fmt::Write as _};

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
    /// sets that packets fill keep what they hold.
    pub fn update_from(&self, old: &Self, table: &str) -> String {
        let mut out = String::new();
        // Writing to a string does not fail; hence the ignored results below.
        for (name, set) in &self.sets {
            if old.sets.get(name).is_none_or(|o| !o.same_kind(set)) {
                if old.sets.contains_key(name) {
                    let _ = writeln!(out, "delete {} {table} {name}", set.keyword());
                }
                let _ = writeln!(out, "add {} {table} {name} {{ {} }}", set.keyword(), set.declaration);
            }
        }
        for (name, chain) in self.chains.iter().filter(|(name, _)| !old.chains.contains_key(*name)) {
            let hook = chain.hook.as_ref().map_or(String::new(), |h| format!(" {{ {h} }}"));
            let _ = writeln!(out, "add chain {table} {name}{hook}");
        }
        for (name, chain) in &self.chains {
            let former = old.chains.get(name);
            if former.is_some_and(|f| f.rules == chain.rules) {
                continue;
            }
            if former.is_some_and(|f| !f.rules.is_empty()) {
                let _ = writeln!(out, "flush chain {table} {name}");
            }
            for rule in &chain.rules {
                let _ = writeln!(out, "add rule {table} {name} {rule}");
            }
        }
        let none = BTreeMap::new();
        for (name, set) in &self.sets {
            let former = old.sets.get(name).filter(|o| o.same_kind(set)).map_or(&none, |o| &o.elements);
            let changed =
                |(key, value): &(&String, &String), other: &BTreeMap<String, String>| other.get(*key) != Some(*value);
            for (key, value) in former.iter().filter(|e| changed(e, &set.elements)) {
                let _ = writeln!(out, "delete element {table} {name} {{ {} }}", element(key, value));
            }
            for (key, value) in set.elements.iter().filter(|e| changed(e, former)) {
                let _ = writeln!(out, "add element {table} {name} {{ {} }}", element(key, value));
            }
        }
        let gone: Vec<_> = old.chains.keys().filter(|name| !self.chains.contains_key(*name)).collect();
        // First empty all, since they may point at each other.
        for name in &gone {
            let _ = writeln!(out, "flush chain {table} {name}");
        }
        for name in &gone {
            let _ = writeln!(out, "delete chain {table} {name}");
        }
        for (name, set) in old.sets.iter().filter(|(name, _)| !self.sets.contains_key(*name)) {
            let _ = writeln!(out, "delete {} {table} {name}", set.keyword());
        }
        out
    }
}

impl Set {
    fn keyword(&self) -> &'static str {
        if self.map { "map" } else { "set" }
    }

    fn same_kind(&self, other: &Self) -> bool {
        (self.map, &self.declaration) == (other.map, &other.declaration)
    }
}

fn element(key: &str, value: &str) -> String {
    if value.is_empty() { key.to_owned() } else { format!("{key} : {value}") }
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
        let expected = "add chain ip t c\nadd rule ip t c return\n\
            delete element ip t m { 10.0.0.2 : goto b }\nadd element ip t m { 10.0.0.2 : goto c }\n\
            flush chain ip t b\ndelete chain ip t b\n";
        assert_eq!(new.update_from(&old, "ip t"), expected);
    }
}
