//! Types of expressions: how they are written, what may stand for what, and what is found out of unknown ones on the way.

use crate::facts::{self, TypeFacts};
use std::fmt;
use std::sync::Arc;

/// A type of CEL.
#[derive(Clone, Debug)]
pub enum Type {
    /// Anything, not looked into.
    Dyn,
    /// A value of a type that is known when it is there.
    Any,
    /// Of what was reported already: fits everywhere.
    Error,
    Null,
    Bool,
    Int,
    Uint,
    Double,
    String,
    Bytes,
    Duration,
    Timestamp,
    /// The type of a type.
    Type(Arc<Type>),
    List(Arc<Type>),
    Map(Arc<(Type, Type)>),
    Optional(Arc<Type>),
    /// A value that only functions look into: `net.IP`.
    Opaque(&'static str),
    /// Fields that are known: their types, after their names.
    Struct(&'static str, &'static [(&'static str, &'static str)]),
    /// An object of the API.
    Api(&'static TypeFacts),
    /// What a policy calls its variables.
    Variables(Arc<[(String, Type)]>),
    /// Part of an object that is applied: `Object.spec`.
    Patch(Arc<str>),
    /// Not known yet.
    Unknown(usize),
}

/// What unknown types were found to be. What did not lead anywhere is taken back.
#[derive(Default)]
pub(super) struct Found {
    types: Vec<Option<Type>>,
    /// What was known before, change by change.
    before: Vec<(usize, Option<Type>)>,
}

// === impl Found ===

impl Found {
    /// Where [`Found::back_to`] goes back to.
    pub fn mark(&self) -> (usize, usize) {
        (self.types.len(), self.before.len())
    }

    pub fn back_to(&mut self, (types, before): (usize, usize)) {
        while self.before.len() > before
            && let Some((unknown, kind)) = self.before.pop()
        {
            self.types[unknown] = kind;
        }
        self.types.truncate(types);
    }

    /// So many more unknown types; the first one's number.
    pub fn more(&mut self, count: usize) -> usize {
        self.types.resize_with(self.types.len() + count, || None);
        self.types.len() - count
    }

    pub fn set(&mut self, unknown: usize, kind: Type) {
        if let Some(place) = self.types.get_mut(unknown) {
            self.before.push((unknown, place.replace(kind)));
        }
    }

    fn get(&self, unknown: usize) -> Option<&Type> {
        self.types.get(unknown).and_then(Option::as_ref)
    }
}

// === impl Type ===

impl Type {
    pub fn list(item: Type) -> Self {
        Self::List(Arc::new(item))
    }

    pub fn map(key: Type, value: Type) -> Self {
        Self::Map(Arc::new((key, value)))
    }

    pub fn optional(value: Type) -> Self {
        Self::Optional(Arc::new(value))
    }

    /// The type of a kind's objects.
    pub fn of_kind(group: &str, version: &str, kind: &str) -> Option<Self> {
        facts::schema_of(group, version, kind).map(Self::Api)
    }

    /// As `SchemaDeclType`.
    fn of_field(kind: &facts::Type) -> Self {
        match kind {
            facts::Type::String => Self::String,
            facts::Type::Bool => Self::Bool,
            facts::Type::Int32 | facts::Type::Int64 => Self::Int,
            facts::Type::Double => Self::Double,
            facts::Type::Bytes => Self::Bytes,
            facts::Type::Time | facts::Type::MicroTime => Self::Timestamp,
            facts::Type::Object(id) => Self::Api(id.facts()),
            facts::Type::List(item) => Self::list(Self::of_field(item)),
            facts::Type::Map(item) => Self::map(Self::String, Self::of_field(item)),
            _ => Self::Dyn,
        }
    }

    /// As `convertCelTypeToDeclType`.
    pub(super) fn of_variable(&self) -> Self {
        match self {
            Self::List(_) | Self::Map(_) => self.with(&mut |part| part.of_variable()),
            plain if plain.parts().is_empty() && super::functions::type_named(plain.name()).is_some() => match plain {
                Self::Opaque(_) => Self::Dyn,
                plain => plain.clone(),
            },
            Self::Any => Self::Any,
            _ => Self::Dyn,
        }
    }

    /// The type of a field. None if there is no such field, or there are no fields.
    pub(super) fn field(&self, name: &str) -> Option<Self> {
        match self {
            Self::Struct(_, fields) => {
                let (_, kind) = fields.iter().find(|(field, _)| *field == name)?;
                Some(super::functions::parse_type(kind))
            }
            Self::Api(facts) => {
                // Words of the language are escaped.
                let plain = name.strip_prefix("__").and_then(|name| name.strip_suffix("__"));
                let plain = match plain {
                    Some(word) if super::RESERVED.contains(&word) => word,
                    _ if super::RESERVED.contains(&name) => return None,
                    _ => name,
                };
                facts.field(plain).map(|field| Self::of_field(&field.kind))
            }
            Self::Variables(all) => all.iter().find(|(variable, _)| variable == name).map(|(_, kind)| kind.clone()),
            Self::Patch(_) => Some(Self::Dyn),
            _ => None,
        }
    }

    pub(super) fn is_dyn(&self) -> bool {
        matches!(self, Self::Dyn | Self::Any)
    }

    fn is_wild(&self) -> bool {
        self.is_dyn() || matches!(self, Self::Error)
    }

    /// What a type is called, but for what it is made of.
    fn name(&self) -> &str {
        match self {
            Self::Dyn => "dyn",
            Self::Any => "google.protobuf.Any",
            Self::Error => "!error!",
            Self::Null => "null_type",
            Self::Bool => "bool",
            Self::Int => "int",
            Self::Uint => "uint",
            Self::Double => "double",
            Self::String => "string",
            Self::Bytes => "bytes",
            Self::Duration => "google.protobuf.Duration",
            Self::Timestamp => "google.protobuf.Timestamp",
            Self::Type(_) => "type",
            Self::List(_) => "list",
            Self::Map(_) => "map",
            Self::Optional(_) => "optional_type",
            Self::Opaque(name) | Self::Struct(name, _) => name,
            Self::Api(facts) => facts.struct_name(),
            Self::Variables(_) => "kubernetes.variables",
            Self::Patch(name) => name,
            Self::Unknown(_) => "_var",
        }
    }

    fn parts(&self) -> Vec<&Type> {
        match self {
            Self::Type(of) | Self::List(of) | Self::Optional(of) => vec![of],
            Self::Map(of) => vec![&of.0, &of.1],
            _ => Vec::new(),
        }
    }

    /// The same, made of other parts.
    fn with(&self, part: &mut dyn FnMut(&Type) -> Type) -> Self {
        match self {
            Self::Type(of) => Self::Type(Arc::new(part(of))),
            Self::List(of) => Self::list(part(of)),
            Self::Optional(of) => Self::optional(part(of)),
            Self::Map(of) => Self::map(part(&of.0), part(&of.1)),
            other => other.clone(),
        }
    }

    /// Whether something in it is unknown.
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Self::Unknown(_)) || self.parts().into_iter().any(Type::is_open)
    }

    /// Numbers what is unknown anew, from `first`.
    pub(super) fn renumbered(&self, first: usize) -> Self {
        match self {
            Self::Unknown(number) => Self::Unknown(first + number),
            other => other.with(&mut |part| part.renumbered(first)),
        }
    }

    /// With what was found put in; what was not is `dyn` if `all`. As `substitute`.
    pub(super) fn with_found(&self, found: &Found, all: bool) -> Self {
        match self {
            Self::Unknown(number) => match found.get(*number) {
                Some(known) => known.with_found(found, all),
                _ if all => Self::Dyn,
                _ => self.clone(),
            },
            other => other.with(&mut |part| part.with_found(found, all)),
        }
    }

    /// As `Type.IsExactType`.
    pub fn is(&self, other: &Type) -> bool {
        match (self, other) {
            (Self::Unknown(a), Self::Unknown(b)) => return a == b,
            (Self::Variables(a), Self::Variables(b)) => return Arc::ptr_eq(a, b),
            (Self::Api(a), Self::Api(b)) => return a.name == b.name,
            _ => {}
        }
        let (parts, others) = (self.parts(), other.parts());
        self.name() == other.name() && parts.len() == others.len() && parts.iter().zip(others).all(|(a, b)| a.is(b))
    }

    /// How messages about overloads write it. As `FormatCELType`.
    pub(super) fn told(&self) -> String {
        match self {
            Self::Any => return "any".to_owned(),
            Self::Null => return "null".to_owned(),
            Self::Duration => return "duration".to_owned(),
            Self::Timestamp => return "timestamp".to_owned(),
            _ => {}
        }
        let parts = self.parts();
        if parts.is_empty() {
            return self.name().to_owned();
        }
        let parts: Vec<String> = parts.into_iter().map(Type::told).collect();
        format!("{}({})", self.name(), parts.join(", "))
    }
}

/// As `Type.String`.
impl fmt::Display for Type {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())?;
        for (at, part) in self.parts().into_iter().enumerate() {
            write!(formatter, "{}{part}", if at == 0 { "(" } else { ", " })?;
        }
        formatter.write_str(if self.parts().is_empty() { "" } else { ")" })
    }
}

// === what may stand for what ===

/// Whether a value of type `a` may stand where `b` is asked for; notes what that makes of unknown types. As
/// `internalIsAssignable`.
pub(super) fn assignable(found: &mut Found, a: &Type, b: &Type) -> bool {
    if let Type::Unknown(number) = b {
        match stands_for(found, a, *number) {
            (true, _) => return true,
            (false, true) => return false,
            _ => {}
        }
    }
    if let Type::Unknown(number) = a {
        return stands_for(found, b, *number).0;
    }
    if a.is_wild() || b.is_wild() {
        return true;
    }
    if matches!(a, Type::Null) {
        return matches!(
            b,
            Type::Null
                | Type::Opaque(_)
                | Type::Optional(_)
                | Type::Struct(..)
                | Type::Api(_)
                | Type::Variables(_)
                | Type::Patch(_)
                | Type::Duration
                | Type::Timestamp
        );
    }
    match (a, b) {
        (Type::Type(_), Type::Type(_)) => true,
        (Type::List(a), Type::List(b)) | (Type::Optional(a), Type::Optional(b)) => assignable(found, a, b),
        (Type::Map(a), Type::Map(b)) => assignable(found, &a.0, &b.0) && assignable(found, &a.1, &b.1),
        _ => a.is(b),
    }
}

/// Whether an unknown type may be `a`, and whether something was known of it. As `isValidTypeSubstitution`.
fn stands_for(found: &mut Found, a: &Type, unknown: usize) -> (bool, bool) {
    if let Some(known) = found.get(unknown).cloned() {
        if known.is(a) {
            return (true, true);
        }
        if assignable(found, a, &known) {
            let general = if as_general(a, &known) { a.clone() } else { known };
            found.set(unknown, general);
            return (true, true);
        }
        return (false, true);
    }
    if mentions(found, unknown, a) {
        return (false, false);
    }
    found.set(unknown, a.clone());
    (true, false)
}

/// As `isEqualOrLessSpecific`.
pub(super) fn as_general(a: &Type, b: &Type) -> bool {
    if a.is_dyn() || matches!(a, Type::Unknown(_)) {
        return true;
    }
    if b.is_dyn() || matches!(b, Type::Unknown(_)) {
        return false;
    }
    let (parts, others) = (a.parts(), b.parts());
    if parts.is_empty() || matches!(a, Type::Type(_)) {
        return a.name() == b.name();
    }
    a.name() == b.name() && parts.iter().zip(others).all(|(a, b)| as_general(a, b))
}

fn mentions(found: &Found, unknown: usize, within: &Type) -> bool {
    match within {
        Type::Unknown(number) if *number == unknown => true,
        Type::Unknown(number) => found.get(*number).is_some_and(|known| mentions(found, unknown, known)),
        other => other.parts().into_iter().any(|part| mentions(found, unknown, part)),
    }
}
