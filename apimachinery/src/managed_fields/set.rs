//! A set of fields, as `metadata.managedFields[].fieldsV1` writes it: a tree of path elements, of which some are members.
//!
//! An element is kept as FieldsV1 spells it: `f:spec` a field, `k:{"name":"web"}` an item of a keyed list, `v:"x"` an item of
//! a set. Equal elements have equal spellings, so a set is a map of texts and its JSON is the map itself.

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::{self, Write as _};

/// The key by which a FieldsV1 says that a node with children is a member itself.
const MEMBER: &str = ".";

/// A set of fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSet {
    nodes: BTreeMap<Box<str>, Node>,
}

/// An element of a path, and what is in the set at and below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    pub member: bool,
    pub children: FieldSet,
}

// === impl Node ===

impl Node {
    pub fn is_empty(&self) -> bool {
        !self.member && self.children.is_empty()
    }

    /// Writes what stands between the braces of the node.
    pub fn write_inside(&self, out: &mut String) {
        let dot = self.member && !self.children.is_empty();
        if dot {
            out.push_str("\".\":{}");
        }
        self.children.write_nodes(out, !dot);
    }
}

// === impl FieldSet ===

impl FieldSet {
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Reads a FieldsV1 text.
    pub fn parse(fields_v1: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str::<Parsed>(fields_v1).map(|parsed| parsed.children)
    }

    /// From paths of field names: `metadata.name`.
    pub fn of_fields(paths: &[&str]) -> Self {
        let mut set = Self::default();
        for path in paths {
            let mut at = Node { member: false, children: std::mem::take(&mut set) };
            let mut node = &mut at;
            for name in path.split('.') {
                node = node.children.nodes.entry(field(name)).or_default();
            }
            node.member = true;
            set = at.children;
        }
        set
    }

    /// Puts what stands at and below an element into the set, if there is anything.
    pub fn put(&mut self, element: Box<str>, node: Node) {
        if !node.is_empty() {
            match self.nodes.entry(element) {
                Entry::Vacant(slot) => _ = slot.insert(node),
                Entry::Occupied(mut slot) => {
                    let slot = slot.get_mut();
                    slot.member |= node.member;
                    slot.children.add(node.children);
                }
            }
        }
    }

    pub fn get(&self, element: &str) -> Option<&Node> {
        self.nodes.get(element)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(element, node)| (&**element, node))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Node)> {
        self.nodes.iter_mut().map(|(element, node)| (&**element, node))
    }

    /// The union with another set.
    pub fn add(&mut self, other: FieldSet) {
        if self.is_empty() {
            *self = other;
            return;
        }
        for (element, node) in other.nodes {
            self.put(element, node);
        }
    }

    /// The difference to another set: a member goes, what is below it does not.
    pub fn subtract(&mut self, other: &FieldSet) {
        for (element, gone) in &other.nodes {
            if let Some(node) = self.nodes.get_mut(element) {
                node.member &= !gone.member;
                node.children.subtract(&gone.children);
                if node.is_empty() {
                    self.nodes.remove(element);
                }
            }
        }
    }

    /// The members of both sets.
    pub fn intersection(&self, other: &FieldSet) -> FieldSet {
        let mut both = FieldSet::default();
        for (element, node) in &self.nodes {
            if let Some(also) = other.nodes.get(element) {
                let children = node.children.intersection(&also.children);
                both.put(element.clone(), Node { member: node.member && also.member, children });
            }
        }
        both
    }

    /// Takes out the members of `other` with all that is below them.
    pub fn cut(&mut self, other: &FieldSet) {
        for (element, gone) in &other.nodes {
            if gone.member {
                self.nodes.remove(element);
            } else if let Some(node) = self.nodes.get_mut(element) {
                node.children.cut(&gone.children);
                if node.is_empty() {
                    self.nodes.remove(element);
                }
            }
        }
    }

    /// Keeps what lies at or below one of the patterns: paths of elements, of which `*` is any.
    pub fn keep_below(&mut self, patterns: &[&[&str]]) {
        self.nodes.retain(|element, node| {
            let fit: Vec<&[&str]> = patterns
                .iter()
                .filter(|p| p.first().is_some_and(|first| *first == "*" || *first == &**element))
                .map(|p| &p[1..])
                .collect();
            if fit.iter().any(|rest| rest.is_empty()) {
                return true;
            }
            node.member = false;
            node.children.keep_below(&fit);
            !node.is_empty()
        });
    }

    /// Every member's path, as messages show it: `.spec.containers[name="web"].image`. A level's members come before what is
    /// below them.
    pub fn paths(&self) -> Vec<String> {
        fn visit(set: &FieldSet, prefix: &str, found: &mut Vec<String>) {
            for (element, _) in set.iter().filter(|(_, node)| node.member) {
                found.push(format!("{prefix}{}", shown(element)));
            }
            for (element, node) in set.iter().filter(|(_, node)| !node.children.is_empty()) {
                visit(&node.children, &format!("{prefix}{}", shown(element)), found);
            }
        }
        let mut found = Vec::new();
        visit(self, "", &mut found);
        found
    }

    /// Writes the set as FieldsV1.
    pub fn write(&self, out: &mut String) {
        out.push('{');
        self.write_nodes(out, true);
        out.push('}');
    }

    fn write_nodes(&self, out: &mut String, mut first: bool) {
        for (element, node) in &self.nodes {
            if !std::mem::replace(&mut first, false) {
                out.push(',');
            }
            write_text("", element, out);
            out.push_str(":{");
            node.write_inside(out);
            out.push('}');
        }
    }
}

impl fmt::Display for FieldSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        self.write(&mut text);
        f.write_str(&text)
    }
}

/// The element of a field.
pub fn field(name: &str) -> Box<str> {
    let mut element = String::with_capacity(name.len() + 2);
    element.push_str("f:");
    element.push_str(name);
    element.into()
}

/// The element of an item of a set.
pub fn value(item: &Value) -> Box<str> {
    format!("v:{item}").into()
}

/// The element of an item of a keyed list.
pub fn keyed(mut keys: Vec<(&str, Cow<'_, Value>)>) -> Box<str> {
    keys.sort_unstable_by_key(|(name, _)| *name);
    let mut element = String::with_capacity(128);
    element.push_str("k:{");
    for (at, (name, value)) in keys.into_iter().enumerate() {
        if at > 0 {
            element.push(',');
        }
        write_text("", name, &mut element);
        element.push(':');
        match &*value {
            Value::String(text) => write_text("", text, &mut element),
            other => _ = write!(element, "{other}"),
        }
    }
    element.push('}');
    // A copy costs less than to shrink it.
    element.as_str().into()
}

/// JSON text of two texts together, of which the first needs no escapes, as most need none.
pub fn write_text(prefix: &str, text: &str, out: &mut String) {
    out.push('"');
    out.push_str(prefix);
    crate::json::write_escaped(text, out);
    out.push('"');
}

/// An element as messages show it.
fn shown(element: &str) -> String {
    match element.split_once(':') {
        Some(("f", name)) => format!(".{name}"),
        Some(("v", value)) => format!("[={value}]"),
        Some(("k", keys)) => match serde_json::from_str::<BTreeMap<String, Value>>(keys) {
            Ok(keys) => {
                let keys: Vec<String> = keys.iter().map(|(name, value)| format!("{name}={value}")).collect();
                format!("[{}]", keys.join(","))
            }
            Err(_) => format!("[{keys}]"),
        },
        Some(("i", index)) => format!("[{index}]"),
        _ => element.to_owned(),
    }
}

/// A node as read: `{}` is a member, and so is what has a `.`.
struct Parsed {
    member: bool,
    children: FieldSet,
}

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NodeVisitor;
        impl<'de> Visitor<'de> for NodeVisitor {
            type Value = Parsed;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a set of fields")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parsed, A::Error> {
                let mut read = Parsed { member: false, children: FieldSet::default() };
                let mut empty = true;
                while let Some(element) = map.next_key::<String>()? {
                    empty = false;
                    if element == MEMBER {
                        map.next_value::<IgnoredAny>()?;
                        read.member = true;
                        continue;
                    }
                    if !matches!(element.as_bytes(), [b'f' | b'v' | b'k' | b'i', b':', ..]) {
                        return Err(serde::de::Error::custom(format!("{element:?} is no path element")));
                    }
                    let child = map.next_value::<Parsed>()?;
                    read.children.put(element.into(), Node { member: child.member, children: child.children });
                }
                read.member |= empty;
                Ok(read)
            }
        }
        deserializer.deserialize_map(NodeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> FieldSet {
        FieldSet::parse(text).unwrap()
    }

    #[test]
    fn a_set_is_read_and_written() {
        let text = r#"{"f:metadata":{"f:labels":{".":{},"f:app":{}}},"f:spec":{"f:containers":{"k:{\"name\":\"web\"}":{".":{},"f:image":{}}},"f:x":{"v:\"a\"":{},"v:1":{}}}}"#;
        assert_eq!(set(text).to_string(), text);
        assert_eq!(
            set(text).paths(),
            [
                ".metadata.labels",
                ".metadata.labels.app",
                r#".spec.containers[name="web"]"#,
                r#".spec.containers[name="web"].image"#,
                r#".spec.x[="a"]"#,
                ".spec.x[=1]"
            ]
        );
        assert_eq!(set("{}").to_string(), "{}");
        for wrong in ["[]", "1", r#"{"spec":{}}"#, r#"{"f:spec":1}"#, "{"] {
            assert!(FieldSet::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sets_are_added_and_subtracted() {
        let a = r#"{"f:a":{".":{},"f:b":{}},"f:c":{}}"#;
        for (b, sum, rest, both, cut) in [
            (r#"{"f:a":{}}"#, a, r#"{"f:a":{"f:b":{}},"f:c":{}}"#, r#"{"f:a":{}}"#, r#"{"f:c":{}}"#),
            (r#"{"f:a":{"f:b":{}}}"#, a, r#"{"f:a":{},"f:c":{}}"#, r#"{"f:a":{"f:b":{}}}"#, r#"{"f:a":{},"f:c":{}}"#),
            (r#"{"f:c":{"f:d":{}}}"#, r#"{"f:a":{".":{},"f:b":{}},"f:c":{".":{},"f:d":{}}}"#, a, "{}", a),
        ] {
            let (mut added, mut left, mut without) = (set(a), set(a), set(a));
            added.add(set(b));
            left.subtract(&set(b));
            without.cut(&set(b));
            assert_eq!(added.to_string(), sum, "{b}");
            assert_eq!(left.to_string(), rest, "{b}");
            assert_eq!(set(a).intersection(&set(b)).to_string(), both, "{b}");
            assert_eq!(without.to_string(), cut, "{b}");
        }
        let mut kept = set(r#"{"f:a":{"k:{\"n\":1}":{"f:b":{},"f:c":{}}},"f:d":{}}"#);
        kept.keep_below(&[&["f:a", "*", "f:b"]]);
        assert_eq!(kept.to_string(), r#"{"f:a":{"k:{\"n\":1}":{"f:b":{}}}}"#);
        assert_eq!(FieldSet::of_fields(&["a.b", "a", "c"]).to_string(), a);
    }
}
