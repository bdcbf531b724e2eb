//! Sets of fields as FieldsV1 text, without a tree in between: what the creator of an object owns, written down as the object is
//! walked; and a set added to a text or taken out of it, of which all that has nothing to do with it is copied.
//!
//! What comes of it is what [`FieldSet`] and [`super::walk::compare`] would give: laws hold them to it.

use super::set::{self, FieldSet, Node, write_text};
use super::typing::{Form, Typing};
use super::walk::{element_of, is_hollow, phantom};
use serde_json::Value;
use std::borrow::Cow;

// === what a creator owns ===

/// What was in a field before: nothing; or, where Go has it always, an empty struct or a zero.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Was {
    Nothing,
    Empty,
    Null,
}

/// What of the fields below nobody owns, and what is left out with all that is below it.
#[derive(Clone, Copy)]
struct LeftOut<'s> {
    nobodys: Option<&'s FieldSet>,
    cut: Option<&'s FieldSet>,
}

/// An element of a path: a field, of which this is the name, or an item.
#[derive(Clone, Copy)]
enum Element<'e> {
    /// Of the schema: it needs no escapes.
    Known(&'e str),
    Field(&'e str),
    Item(&'e str),
}

/// The fields of `new`, an object that was not there before, but for those of `nobodys` and those at or below those of `cut`.
pub fn of_new<T: Typing>(at: T, new: &Value, nobodys: &FieldSet, cut: &FieldSet) -> String {
    let mut out = String::with_capacity(2048);
    out.push('{');
    parts(at, Was::Empty, new, LeftOut { nobodys: Some(nobodys), cut: Some(cut) }, &mut out);
    out.push('}');
    out
}

// === impl Was ===

impl Was {
    fn of(constant: Option<bool>) -> Self {
        match constant {
            None => Self::Nothing,
            Some(true) => Self::Empty,
            Some(false) => Self::Null,
        }
    }

    fn is(self, value: &Value) -> bool {
        match self {
            Self::Nothing => false,
            Self::Empty => value.as_object().is_some_and(serde_json::Map::is_empty),
            Self::Null => value.is_null(),
        }
    }
}

// === impl Element ===

impl Element<'_> {
    fn node(self, set: Option<&FieldSet>) -> Option<&Node> {
        match self {
            Self::Known(name) | Self::Field(name) => set?.get(&set::field(name)),
            Self::Item(element) => set?.get(element),
        }
    }

    /// Begins a node; gives where.
    fn open(self, out: &mut String) -> usize {
        let start = out.len();
        if !out.ends_with('{') {
            out.push(',');
        }
        match self {
            Self::Known(name) => {
                out.push_str("\"f:");
                out.push_str(name);
                out.push('"');
            }
            Self::Field(name) => write_text("f:", name, out),
            Self::Item(element) => write_text("", element, out),
        }
        out.push_str(":{");
        start
    }
}

/// Writes `"element":{…}` of a value, unless nothing at and below it is owned.
fn member<T: Typing>(at: T, was: Was, is: &Value, element: Element<'_>, left_out: LeftOut<'_>, out: &mut String) {
    let (nobodys, cut) = (element.node(left_out.nobodys), element.node(left_out.cut));
    if cut.is_some_and(|cut| cut.member) {
        return;
    }
    let start = element.open(out);
    let inside = out.len();
    let has_parts = has_parts(at, was, is);
    let owned = if has_parts { was == Was::Nothing } else { !was.is(is) };
    let owned = owned && !nobodys.is_some_and(|node| node.member);
    if owned {
        out.push_str("\".\":{}");
    }
    let before = out.len();
    if has_parts {
        let left_out = LeftOut { nobodys: nobodys.map(|n| &n.children), cut: cut.map(|n| &n.children) };
        parts(at, was, is, left_out, out);
    }
    close(start, inside, before, owned, out);
}

/// Ends a node that began at `start`: a member without parts is `{}`, and what is neither a member nor has parts is nothing.
/// `before` is where its parts begin.
fn close(start: usize, inside: usize, before: usize, is_member: bool, out: &mut String) {
    match (out.len() > before, is_member) {
        (true, _) => {}
        (false, true) => out.truncate(inside),
        (false, false) => return out.truncate(start),
    }
    out.push('}');
}

fn has_parts<T: Typing>(at: T, was: Was, is: &Value) -> bool {
    let no_constants = || at.constant_fields().next().is_none();
    match at.form() {
        Form::Struct => {
            let was_empty = was != Was::Empty || no_constants();
            !(was_empty && (is.is_null() || (is_hollow(is) && no_constants())))
        }
        Form::Map(_) => !is_hollow(is),
        Form::Any => was == Was::Empty || is.is_object(),
        Form::Set(_) | Form::Keyed(_) => is.as_array().is_some_and(|list| !list.is_empty()),
        _ => false,
    }
}

fn parts<T: Typing>(at: T, was: Was, is: &Value, left_out: LeftOut<'_>, out: &mut String) {
    match (at.form(), is) {
        (Form::Struct, Value::Object(map)) => {
            // Constants are compared where both have them; they come in where nothing was.
            let mut constants = at.constant_fields().filter(|_| was != Was::Empty).peekable();
            let constant = |name: &'static str, inline: bool, out: &mut String| {
                if let Some(field) = at.field(name) {
                    member(field, Was::Nothing, phantom(inline), Element::Known(name), left_out, out);
                }
            };
            for (name, value) in map {
                while let Some((earlier, inline)) = constants.next_if(|(constant, _)| *constant <= name.as_str()) {
                    if earlier != name {
                        constant(earlier, inline, out);
                    }
                }
                if let Some(field) = at.field(name) {
                    let was = if was == Was::Empty { Was::of(field.constant()) } else { Was::Nothing };
                    member(field, was, value, Element::Known(name), left_out, out);
                }
            }
            constants.for_each(|(name, inline)| constant(name, inline, out));
        }
        (form @ (Form::Map(_) | Form::Any), Value::Object(map)) => {
            let item = if let Form::Map(item) = form { item } else { at };
            for (name, value) in map {
                member(item, Was::Nothing, value, Element::Field(name), left_out, out);
            }
        }
        (Form::Set(item) | Form::Keyed(item), Value::Array(list)) => {
            let mut items: Vec<(Box<str>, &Value)> =
                list.iter().filter_map(|value| Some((element_of(at, value)?, value))).collect();
            items.sort_by(|a, b| a.0.cmp(&b.0));
            for same in items.chunk_by(|a, b| a.0 == b.0) {
                match same {
                    [(element, value)] => member(item, Was::Nothing, value, Element::Item(element), left_out, out),
                    // Items with the same element are one.
                    [(element, _), ..] => {
                        let start = Element::Item(element).open(out);
                        let inside = out.len();
                        close(start, inside, inside, true, out);
                    }
                    [] => {}
                }
            }
        }
        _ => {}
    }
}

// === a text changed ===

/// A text with the members of a set. None where the text is not as [`FieldSet::write`] writes it.
pub fn with(text: &str, more: &FieldSet) -> Option<String> {
    edit(text, Some(more), None)
}

/// A text without the members of a set; empty if none is left. None where the text is not as [`FieldSet::write`] writes it.
pub fn without(text: &str, less: &FieldSet) -> Option<String> {
    edit(text, None, Some(less))
}

fn edit(text: &str, more: Option<&FieldSet>, less: Option<&FieldSet>) -> Option<String> {
    let mut reading = Reading::of(text);
    let mut out = String::with_capacity(text.len() + 128);
    reading.expect(b'{')?;
    out.push('{');
    reading.children(more, less, &mut out)?;
    if !reading.is_at_end() {
        return None;
    }
    out.push('}');
    if out == "{}" {
        out.clear();
    }
    Some(out)
}

/// A FieldsV1 text, read from left to right.
pub struct Reading<'t> {
    text: &'t str,
    at: usize,
}

// === impl Reading ===

impl<'t> Reading<'t> {
    pub fn of(text: &'t str) -> Self {
        Self { text, at: 0 }
    }

    pub fn is_at_end(&self) -> bool {
        self.at == self.text.len()
    }

    pub fn next_is(&self, byte: u8) -> bool {
        self.text.as_bytes().get(self.at) == Some(&byte)
    }

    pub fn expect(&mut self, byte: u8) -> Option<()> {
        self.next_is(byte).then(|| self.at += 1)
    }

    /// `"…"`, of which what is between the quotes.
    pub fn string(&mut self) -> Option<&'t str> {
        self.expect(b'"')?;
        let start = self.at;
        self.end_string()?;
        Some(&self.text[start..self.at - 1])
    }

    /// `"…":`, the same.
    pub fn key(&mut self) -> Option<&'t str> {
        let key = self.string()?;
        self.expect(b':')?;
        Some(key)
    }

    /// To behind the closing quote of a string.
    fn end_string(&mut self) -> Option<()> {
        let bytes = self.text.as_bytes();
        loop {
            self.at += memchr::memchr2(b'"', b'\\', bytes.get(self.at..)?)? + 1;
            if bytes[self.at - 1] == b'"' {
                return Some(());
            }
            self.at += 1;
        }
    }

    /// A set of fields that begins here.
    pub fn skip(&mut self) -> Option<&'t str> {
        let start = self.at;
        self.expect(b'{')?;
        let mut depth = 1;
        while depth > 0 {
            let byte = *self.text.as_bytes().get(self.at)?;
            self.at += 1;
            match byte {
                b'{' => depth += 1,
                b'}' => depth -= 1,
                b'"' => self.end_string()?,
                b':' | b',' => {}
                _ => return None,
            }
        }
        Some(&self.text[start..self.at])
    }

    /// The rest of a node behind its `{` and `"."`, changed.
    fn children(&mut self, more: Option<&FieldSet>, less: Option<&FieldSet>, out: &mut String) -> Option<()> {
        let mut more = more.into_iter().flat_map(FieldSet::iter).peekable();
        let mut last: Option<Cow<'t, str>> = None;
        while !self.next_is(b'}') {
            let start = self.at;
            let raw = self.key()?;
            let element: Cow<'t, str> = match raw.contains('\\') {
                true => serde_json::from_str::<String>(&self.text[start..self.at - 1]).ok()?.into(),
                false => raw.into(),
            };
            if last.is_some_and(|last| last >= element) {
                return None;
            }
            while let Some((before, node)) = more.next_if(|(new, _)| **new < *element) {
                fresh(before, node, out);
            }
            let added = more.next_if(|(new, _)| **new == *element).map(|(_, node)| node);
            let gone = less.and_then(|less| less.get(&element));
            if added.is_some() || gone.is_some() {
                self.node(&element, added, gone, out)?;
            } else {
                self.skip()?;
                if !out.ends_with('{') {
                    out.push(',');
                }
                out.push_str(&self.text[start..self.at]);
            }
            last = Some(element);
            if self.next_is(b',') {
                self.at += 1;
            } else if !self.next_is(b'}') {
                return None;
            }
        }
        more.for_each(|(element, node)| fresh(element, node, out));
        self.expect(b'}')
    }

    /// A node whose `{` is next, changed.
    fn node(&mut self, element: &str, added: Option<&Node>, gone: Option<&Node>, out: &mut String) -> Option<()> {
        self.expect(b'{')?;
        let dot = self.text[self.at..].starts_with("\".\":{}");
        if dot {
            self.at += 6;
            if self.next_is(b',') {
                self.at += 1;
            }
        }
        let was_member = dot || self.next_is(b'}');
        let is_member = (was_member && !gone.is_some_and(|node| node.member)) || added.is_some_and(|node| node.member);
        let start = Element::Item(element).open(out);
        let inside = out.len();
        if is_member {
            out.push_str("\".\":{}");
        }
        let before = out.len();
        self.children(added.map(|node| &node.children), gone.map(|node| &node.children), out)?;
        close(start, inside, before, is_member, out);
        Some(())
    }
}

fn fresh(element: &str, node: &Node, out: &mut String) {
    Element::Item(element).open(out);
    node.write_inside(out);
    out.push('}');
}
