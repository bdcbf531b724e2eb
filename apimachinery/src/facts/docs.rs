//! What OpenAPI says of types beyond what the server itself goes by: descriptions, mostly. Much text that is seldom wanted, so
//! it is kept compressed, and inflated for whoever makes a document of it.

use flate2::read::GzDecoder;
use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Read as _;

const PACKED: &[u8] = include_bytes!("../../facts/docs.gz");

/// The inflated text.
pub struct Docs(String);

/// What is said of a type, or of the parameters of a kind of request.
#[derive(Default)]
pub struct TypeDocs<'d> {
    description: &'d str,
    /// `x-kubernetes-unions`, as JSON; empty for none.
    pub unions: &'d str,
    /// In the order of their names.
    pub fields: Vec<FieldDocs<'d>>,
}

/// What is said of a field or parameter.
pub struct FieldDocs<'d> {
    pub name: &'d str,
    /// Of a field: `z` if its default is zero, `l` if it says how its list is merged, `g` if it says that its
    /// map is granular. Of a parameter: its type.
    pub marks: &'d str,
    description: &'d str,
}

// === impl Docs ===

impl Docs {
    pub fn inflate() -> Self {
        let mut text = String::new();
        // What is built in is whole.
        let read = GzDecoder::new(PACKED).read_to_string(&mut text);
        debug_assert!(read.is_ok());
        Self(text)
    }

    /// By type; `parameters` are those that requests on all kinds share.
    pub fn types(&self) -> HashMap<&str, TypeDocs<'_>> {
        let mut types: HashMap<&str, TypeDocs<'_>> = HashMap::new();
        let mut current = "";
        for line in self.0.lines() {
            let mut cells = line.split('\t');
            let mut cell = || cells.next().unwrap_or("");
            match (cell(), cell(), cell()) {
                ("type", name, description) if line.matches('\t').count() == 3 => {
                    current = name;
                    types.insert(name, TypeDocs { description, unions: cell(), fields: Vec::new() });
                }
                (name, marks, description) => {
                    if let Some(owner) = types.get_mut(current) {
                        owner.fields.push(FieldDocs { name, marks, description });
                    }
                }
            }
        }
        types
    }

    /// Tells this text from another.
    pub fn fingerprint() -> &'static [u8] {
        PACKED
    }
}

// === impl TypeDocs ===

impl<'d> TypeDocs<'d> {
    pub fn description(&self) -> Cow<'d, str> {
        unescaped(self.description)
    }

    pub fn field(&self, name: &str) -> Option<&FieldDocs<'d>> {
        self.fields.iter().find(|field| field.name == name)
    }
}

// === impl FieldDocs ===

impl<'d> FieldDocs<'d> {
    pub fn description(&self) -> Cow<'d, str> {
        unescaped(self.description)
    }
}

fn unescaped(text: &str) -> Cow<'_, str> {
    if !text.contains('\\') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, c == '\\') {
            (_, true) => out.extend(chars.next().map(|c| match c {
                'n' => '\n',
                't' => '\t',
                other => other,
            })),
            (c, false) => out.push(c),
        }
    }
    Cow::Owned(out)
}
