//! The walks over values of a known type that server-side apply is made of: which fields a value has, in which fields two
//! values differ, a value merged into another, fields taken out of a value, and what does not fit its type. As the package
//! `typed` of structured-merge-diff.

use super::set::{self, FieldSet, Node};
use super::typing::{Form, Scalar, Typing};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

/// What an absent struct is to Go.
static EMPTY: LazyLock<Value> = LazyLock::new(|| Value::Object(Map::new()));
/// More mistakes than this go unmentioned.
const MISTAKES_MAX: usize = 100;

/// In which fields two values differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Added or modified.
    pub changed: FieldSet,
    pub removed: FieldSet,
}

/// The difference at and below one element.
#[derive(Default)]
struct Diff {
    changed: Node,
    removed: Node,
}

// === impl Difference ===

impl Difference {
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.removed.is_empty()
    }
}

// === impl Diff ===

impl Diff {
    /// Of what is one.
    fn leaf(old: Option<&Value>, new: Option<&Value>) -> Self {
        let mut diff = Self::default();
        match (old, new) {
            (Some(_), None) => diff.removed.member = true,
            (old, new) => diff.changed.member = old != new,
        }
        diff
    }

    fn put(&mut self, element: impl FnOnce() -> Box<str>, below: Diff) {
        let Diff { changed, removed } = below;
        match (changed.is_empty(), removed.is_empty()) {
            (true, true) => {}
            (false, true) => self.changed.children.put(element(), changed),
            (true, false) => self.removed.children.put(element(), removed),
            (false, false) => {
                let element = element();
                self.changed.children.put(element.clone(), changed);
                self.removed.children.put(element, removed);
            }
        }
    }
}

fn object(value: Option<&Value>) -> Option<&Map<String, Value>> {
    value.and_then(Value::as_object)
}

fn items(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// Null, or without anything in it.
pub fn is_hollow(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// The path element of an item of a list; None if it cannot have one.
pub fn element_of<T: Typing>(list: T, item: &Value) -> Option<Box<str>> {
    match list.form() {
        Form::Set(_) => (!item.is_object() && !item.is_array() && !item.is_null()).then(|| set::value(item)),
        Form::Keyed(items) => {
            let item = item.as_object()?;
            let key = |name: &'static str| {
                let value = item.get(name).map(Cow::Borrowed).or_else(|| items.default_of(name).map(Cow::Owned))?;
                Some((name, value))
            };
            let keys: Vec<_> = list.keys().filter_map(key).collect();
            (!keys.is_empty()).then(|| set::keyed(keys))
        }
        _ => None,
    }
}

/// The items of a list with their elements; of several with the same element all, where the first stands.
fn indexed<T: Typing>(list: T, items: &[Value]) -> Vec<(Box<str>, Vec<&Value>)> {
    let mut found: Vec<(Box<str>, Vec<&Value>)> = Vec::with_capacity(items.len());
    let mut at: HashMap<Box<str>, usize> = HashMap::with_capacity(items.len());
    for item in items {
        let Some(element) = element_of(list, item) else { continue };
        match at.get(&element) {
            Some(at) => found[*at].1.push(item),
            None => {
                at.insert(element.clone(), found.len());
                found.push((element, vec![item]));
            }
        }
    }
    found
}

// === compare ===

/// In which fields `new` differs from `old`.
pub fn compare<T: Typing>(at: T, old: &Value, new: &Value) -> Difference {
    // Whoever asks has changed something.
    let diff = parts_difference(at, Some(old), Some(new));
    Difference { changed: diff.changed.children, removed: diff.removed.children }
}

fn difference<T: Typing>(at: T, old: Option<&Value>, new: Option<&Value>) -> Diff {
    // Most of what an update sends is as it was.
    if old.is_some() && old == new {
        return Diff::default();
    }
    parts_difference(at, old, new)
}

fn parts_difference<T: Typing>(at: T, old: Option<&Value>, new: Option<&Value>) -> Diff {
    let mut diff = match at.form() {
        Form::Struct if !(is_empty_struct(at, old) && is_empty_struct(at, new)) => struct_difference(at, old, new),
        Form::Map(item) if !(old.is_none_or(is_hollow) && new.is_none_or(is_hollow)) => {
            map_difference(|_| item, old, new)
        }
        Form::Any if old.is_some_and(Value::is_object) || new.is_some_and(Value::is_object) => {
            map_difference(|_| at, old, new)
        }
        Form::Set(item) | Form::Keyed(item) if !(items(old).is_empty() && items(new).is_empty()) => {
            list_difference(at, item, old, new)
        }
        _ => return Diff::leaf(old, new),
    };
    match (old, new) {
        (None, _) => diff.changed.member = true,
        (_, None) => diff.removed.member = true,
        _ => {}
    }
    diff
}

fn is_empty_struct<T: Typing>(at: T, value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(value) => is_hollow(value) && at.constant_fields().next().is_none(),
    }
}

fn struct_difference<T: Typing>(at: T, old: Option<&Value>, new: Option<&Value>) -> Diff {
    let mut diff = Diff::default();
    let (old, new) = (object(old), object(new));
    zip(old, new, |name, was, is| {
        let Some(field) = at.field(name) else { return };
        let phantom = || field.constant().map(phantom);
        let was = if was.is_none() && old.is_some() { phantom() } else { was };
        let is = if is.is_none() && new.is_some() { phantom() } else { is };
        diff.put(|| set::field(name), difference(field, was, is));
    });
    if let (Some(there), None) | (None, Some(there)) = (old, new) {
        for (name, inline) in at.constant_fields().filter(|(name, _)| !there.contains_key(*name)) {
            let Some(field) = at.field(name) else { continue };
            let phantom = Some(phantom(inline));
            let (was, is) = if old.is_some() { (phantom, None) } else { (None, phantom) };
            diff.put(|| set::field(name), difference(field, was, is));
        }
    }
    diff
}

/// What Go has where the JSON has nothing.
pub fn phantom(inline: bool) -> &'static Value {
    if inline { &EMPTY } else { &Value::Null }
}

fn map_difference<T: Typing>(item: impl Fn(&str) -> T, old: Option<&Value>, new: Option<&Value>) -> Diff {
    let mut diff = Diff::default();
    zip(object(old), object(new), |name, was, is| {
        diff.put(|| set::field(name), difference(item(name), was, is));
    });
    diff
}

/// Every key of two maps with its values.
fn zip<'v>(
    old: Option<&'v Map<String, Value>>,
    new: Option<&'v Map<String, Value>>,
    mut visit: impl FnMut(&'v str, Option<&'v Value>, Option<&'v Value>),
) {
    for (name, was) in old.into_iter().flatten() {
        visit(name, Some(was), new.and_then(|new| new.get(name)));
    }
    for (name, is) in new.into_iter().flatten() {
        if !old.is_some_and(|old| old.contains_key(name)) {
            visit(name, None, Some(is));
        }
    }
}

fn list_difference<T: Typing>(at: T, item: T, old: Option<&Value>, new: Option<&Value>) -> Diff {
    let mut diff = Diff::default();
    let (old, new) = (indexed(at, items(old)), indexed(at, items(new)));
    let place: HashMap<&str, usize> = new.iter().enumerate().map(|(at, (element, _))| (&**element, at)).collect();
    let mut seen = HashSet::with_capacity(old.len());
    let one = |was: &[&Value], is: &[&Value]| match (was, is) {
        ([] | [_], [] | [_]) => difference(item, was.first().copied(), is.first().copied()),
        // Items with the same element are looked at together.
        _ => Diff {
            changed: Node { member: was != is && !is.is_empty(), ..Node::default() },
            removed: Node { member: is.is_empty(), ..Node::default() },
        },
    };
    for (element, was) in &old {
        let is: &[&Value] = match place.get(&**element) {
            Some(at) => {
                seen.insert(*at);
                &new[*at].1
            }
            None => &[],
        };
        diff.put(|| element.clone(), one(was, is));
    }
    for (at, (element, is)) in new.iter().enumerate() {
        if !seen.contains(&at) {
            diff.put(|| element.clone(), one(&[], is));
        }
    }
    diff
}

// === fields ===

/// The fields that a value has: what its author owns by applying it.
pub fn fields<T: Typing>(at: T, value: &Value) -> FieldSet {
    fields_below(at, value).children
}

fn fields_below<T: Typing>(at: T, value: &Value) -> Node {
    let mut node = Node::default();
    let empty_object = |value: &Value| value.as_object().is_some_and(Map::is_empty);
    match (at.form(), value) {
        (Form::Struct, Value::Object(map)) => {
            for (name, value) in map {
                let Some(field) = at.field(name) else { continue };
                let mut below = fields_below(field, value);
                below.member |= value.is_null() || empty_object(value);
                node.children.put(set::field(name), below);
            }
        }
        (form @ (Form::Map(_) | Form::Any), Value::Object(map)) => {
            let item = if let Form::Map(item) = form { item } else { at };
            for (name, value) in map {
                let below = fields_below(item, value);
                node.children.put(set::field(name), Node { member: true, ..below });
            }
        }
        (Form::Set(item) | Form::Keyed(item), Value::Array(list)) => {
            for value in list {
                if let Some(element) = element_of(at, value) {
                    node.children.put(element, Node { member: true, ..fields_below(item, value) });
                }
            }
        }
        (Form::Struct | Form::Map(_) | Form::Set(_) | Form::Keyed(_), _) => {}
        _ => node.member = true,
    }
    node
}

/// The set with every struct's field as a member that has members below it. As `EnsureNamedFieldsAreMembers`.
pub fn with_named_fields<T: Typing>(at: Option<T>, mut set: FieldSet) -> FieldSet {
    let is_struct = at.is_some_and(|at| matches!(at.form(), Form::Struct | Form::AtomicStruct));
    for (element, node) in set.iter_mut() {
        if node.children.is_empty() {
            continue;
        }
        let below = at.and_then(|at| match (at.form(), element.strip_prefix("f:")) {
            (Form::Struct | Form::AtomicStruct, Some(name)) => at.field(name),
            (Form::Map(item) | Form::AtomicMap(item), Some(_)) => Some(item),
            (Form::Any, Some(_)) => Some(at),
            (Form::Set(item) | Form::Keyed(item) | Form::AtomicList(item), None) => Some(item),
            _ => None,
        });
        node.member |= is_struct && below.is_some();
        node.children = with_named_fields(below, std::mem::take(&mut node.children));
    }
    set
}

// === merge ===

/// `new` merged into `old`: what `new` does not say stays.
pub fn merge<T: Typing>(at: T, old: &Value, new: &Value) -> Value {
    match (at.form(), old, new) {
        (Form::Struct | Form::Map(_) | Form::Any, Value::Object(was), Value::Object(is)) => {
            let mut merged = was.clone();
            for (name, is) in is {
                let below = match at.form() {
                    Form::Struct => at.field(name),
                    Form::Map(item) => Some(item),
                    _ => Some(at),
                };
                let value = match (below, was.get(name)) {
                    (Some(below), Some(was)) => merge(below, was, is),
                    _ => is.clone(),
                };
                merged.insert(name.clone(), value);
            }
            Value::Object(merged)
        }
        (Form::Struct | Form::Map(_), Value::Object(was), Value::Null) if !was.is_empty() => old.clone(),
        (Form::Set(item) | Form::Keyed(item), Value::Array(was), Value::Array(is)) if !was.is_empty() => {
            Value::Array(merge_items(at, item, was, is))
        }
        (Form::Set(_) | Form::Keyed(_), Value::Array(was), Value::Null) if !was.is_empty() => old.clone(),
        _ => new.clone(),
    }
}

/// Items in the order of `new`; those that only `old` has keep their places among the others.
fn merge_items<T: Typing>(at: T, item: T, old: &[Value], new: &[Value]) -> Vec<Value> {
    let (old, new) = (indexed(at, old), indexed(at, new));
    let in_old: HashMap<&str, &Value> = old.iter().map(|(element, values)| (&**element, values[0])).collect();
    let in_new: HashSet<&str> = new.iter().map(|(element, _)| &**element).collect();
    let mut shared = new.iter().map(|(element, _)| &**element).filter(|element| in_old.contains_key(element));
    let mut next_shared = shared.next();
    let mut merged = Vec::with_capacity(old.len().max(new.len()));
    let (mut was, mut is) = (old.iter().peekable(), new.iter().peekable());
    loop {
        match (was.peek(), is.peek()) {
            (None, None) => return merged,
            (Some((a, values)), Some((b, wanted))) if a == b => {
                merged.push(merge(item, values[0], wanted[0]));
                next_shared = shared.next();
                was.next();
                is.next();
            }
            // It comes when its turn in the new order comes.
            (Some((a, _)), Some(_)) if in_new.contains(&**a) && next_shared.is_some_and(|next| next != &**a) => {
                was.next();
            }
            (Some((a, values)), _) if !in_new.contains(&**a) => {
                merged.extend(values.iter().map(|value| (*value).clone()));
                was.next();
            }
            (_, Some((b, wanted))) => {
                merged.push(match in_old.get(&**b) {
                    Some(was) => merge(item, was, wanted[0]),
                    None => wanted[0].clone(),
                });
                if next_shared == Some(b) {
                    next_shared = shared.next();
                }
                is.next();
            }
            // In both, but the new list is through: it has been taken.
            (Some(_), None) => _ = was.next(),
        }
    }
}

// === remove ===

/// A value without the members of a set.
pub fn without<T: Typing>(at: T, value: &Value, gone: &FieldSet) -> Value {
    match (at.form(), value) {
        (form @ (Form::Struct | Form::Map(_) | Form::Any), Value::Object(map)) => {
            let mut kept = Map::new();
            for (name, value) in map {
                let node = gone.get(&set::field(name));
                if node.is_some_and(|node| node.member) {
                    continue;
                }
                let below = match form {
                    Form::Struct => at.field(name),
                    Form::Map(item) => Some(item),
                    _ => Some(at),
                };
                let value = match (node, below) {
                    (Some(node), Some(below)) => without(below, value, &node.children),
                    _ => value.clone(),
                };
                kept.insert(name.clone(), value);
            }
            if kept.is_empty() && !map.is_empty() { Value::Null } else { Value::Object(kept) }
        }
        (Form::Set(item) | Form::Keyed(item), Value::Array(list)) => {
            let mut kept = Vec::with_capacity(list.len());
            for value in list {
                match element_of(at, value).and_then(|element| gone.get(&element)) {
                    Some(node) if node.member => {}
                    Some(node) => kept.push(without(item, value, &node.children)),
                    None => kept.push(value.clone()),
                }
            }
            if kept.is_empty() { Value::Null } else { Value::Array(kept) }
        }
        _ => value.clone(),
    }
}

// === check ===

/// What in a value does not fit its type: each with its path.
pub fn mistakes<T: Typing>(at: T, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(at, value, &mut String::new(), &mut found);
    found
}

fn check<T: Typing>(at: T, value: &Value, path: &mut String, found: &mut Vec<String>) {
    let wrong = |wanted: &str, path: &str| format!("{path}: expected {wanted}, got {}", described(value));
    if found.len() >= MISTAKES_MAX || value.is_null() {
        return;
    }
    match at.form() {
        Form::Scalar(scalar) => {
            let (fits, wanted) = match scalar {
                Scalar::String => (value.is_string(), "string"),
                Scalar::Number => (value.is_number(), "numeric (int or float)"),
                Scalar::Bool => (value.is_boolean(), "boolean"),
                Scalar::Any => (!value.is_object() && !value.is_array(), "any scalar"),
            };
            if !fits {
                found.push(wrong(wanted, path));
            }
        }
        Form::Struct | Form::AtomicStruct => match value.as_object() {
            Some(map) => {
                for (name, value) in map {
                    below(path, &format!(".{name}"), |path| match at.field(name) {
                        Some(field) => check(field, value, path, found),
                        None => found.push(format!("{path}: field not declared in schema")),
                    });
                }
            }
            None => found.push(wrong("map", path)),
        },
        Form::Map(item) | Form::AtomicMap(item) => match value.as_object() {
            Some(map) => {
                for (name, value) in map {
                    below(path, &format!(".{name}"), |path| check(item, value, path, found));
                }
            }
            None => found.push(wrong("map", path)),
        },
        Form::AtomicList(item) => match value.as_array() {
            Some(list) => {
                for (index, value) in list.iter().enumerate() {
                    below(path, &format!("[{index}]"), |path| check(item, value, path, found));
                }
            }
            None => found.push(wrong("list", path)),
        },
        Form::Set(item) | Form::Keyed(item) => match value.as_array() {
            Some(list) => check_items(at, item, list, path, found),
            None => found.push(wrong("list", path)),
        },
        Form::Any | Form::AtomicAny => {}
    }
}

fn check_items<T: Typing>(at: T, item: T, list: &[Value], path: &mut String, found: &mut Vec<String>) {
    let mut seen = HashSet::with_capacity(list.len());
    for (index, value) in list.iter().enumerate() {
        let Some(element) = element_of(at, value) else {
            let keys: Vec<String> = at.keys().map(|key| format!("{key:?}")).collect();
            let what = match (at.form(), value) {
                (Form::Keyed(_), Value::Null) => "associative list with keys may not have a null element".to_owned(),
                (Form::Keyed(_), Value::Object(_)) => format!(
                    "associative list with keys has an element that omits all key fields [{}] (and doesn't have default values for any key fields)",
                    keys.join(" ")
                ),
                (Form::Keyed(_), _) => "associative list with keys may not have non-map elements".to_owned(),
                (_, Value::Null) => "associative list without keys has an element that's an explicit null".to_owned(),
                (_, Value::Array(_)) => "not supported: associative list with lists as elements".to_owned(),
                _ => "associative list without keys has an element that's a map type".to_owned(),
            };
            found.push(format!("{path}: element {index}: {what}"));
            continue;
        };
        let mut one = FieldSet::default();
        one.put(element.clone(), Node { member: true, ..Node::default() });
        let shown = one.paths().concat();
        below(path, &shown, |path| check(item, value, path, found));
        if !seen.insert(element) {
            found.push(format!("{path}: duplicate entries for key {shown}"));
        }
    }
}

fn below(path: &mut String, more: &str, visit: impl FnOnce(&mut String)) {
    let length = path.len();
    path.push_str(more);
    visit(path);
    path.truncate(length);
}

/// A value as messages show it: Go's type.
fn described(value: &Value) -> &'static str {
    match value {
        Value::Null => "<nil>",
        Value::Bool(_) => "bool",
        Value::Number(number) if number.is_f64() => "float64",
        Value::Number(_) => "int64",
        Value::String(_) => "string",
        Value::Array(_) => "[]interface {}",
        Value::Object(_) => "map[string]interface {}",
    }
}
