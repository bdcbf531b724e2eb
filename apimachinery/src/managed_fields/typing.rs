//! What server-side apply has to know of a type: is a value one or made of parts, and how are a list's items told apart.
//! [`Typing`] is asked for it; the schema facts of the built-in kinds answer, and the schema of a custom resource may.

use crate::facts::{FieldFacts, ListType, Type, TypeFacts};
use serde_json::Value;

/// A place in a schema. Cheap to copy.
pub trait Typing: Copy {
    fn form(self) -> Form<Self>;

    /// The place of a field of a [`Form::Struct`].
    fn field(self, name: &str) -> Option<Self>;

    /// Is this the place of a field that is always there, even if the JSON leaves it out? Go writes a struct that is no
    /// pointer as `{}` (true), and a required field as null or zero (false).
    fn constant(self) -> Option<bool>;

    /// Those fields of a [`Form::Struct`].
    fn constant_fields(self) -> impl Iterator<Item = (&'static str, bool)>;

    /// What stands in a field of a [`Form::Struct`] that is left out.
    fn default_of(self, name: &str) -> Option<Value>;

    /// The keys of a [`Form::Keyed`].
    fn keys(self) -> impl Iterator<Item = &'static str>;
}

/// What stands at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form<T> {
    Scalar(Scalar),
    /// Known fields, each owned by itself.
    Struct,
    /// Free keys, each owned by itself.
    Map(T),
    /// A list of distinct scalars.
    Set(T),
    /// A list of objects that are told apart by some of their fields.
    Keyed(T),
    /// A struct, a map or a list that has one owner. What is in it must fit nonetheless.
    AtomicStruct,
    AtomicMap(T),
    AtomicList(T),
    /// Anything: objects are maps, all else is one.
    Any,
    /// Anything, and it is one.
    AtomicAny,
}

/// What a scalar must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scalar {
    String,
    Number,
    Bool,
    /// A quantity, a number or a name.
    Any,
}

/// A place in the schema facts.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    Struct(&'static TypeFacts),
    Field(&'static FieldFacts),
    Value(&'static Type),
    /// Inside of what has no schema.
    Free,
}

// === impl Place ===

impl Place {
    fn struct_facts(self) -> Option<&'static TypeFacts> {
        match self {
            Self::Struct(facts) => Some(facts),
            Self::Field(FieldFacts { kind: Type::Object(id), .. }) | Self::Value(Type::Object(id)) => Some(id.facts()),
            _ => None,
        }
    }
}

impl Typing for Place {
    fn form(self) -> Form<Self> {
        let (kind, field) = match self {
            Self::Struct(facts) => return if facts.atomic { Form::AtomicStruct } else { Form::Struct },
            Self::Free => return Form::Any,
            Self::Field(field) => (&field.kind, Some(field)),
            Self::Value(kind) => (kind, None),
        };
        let atomic = field.is_some_and(|field| field.atomic);
        match kind {
            Type::String | Type::Bytes | Type::Time | Type::MicroTime => Form::Scalar(Scalar::String),
            Type::Bool => Form::Scalar(Scalar::Bool),
            Type::Int32 | Type::Int64 | Type::Double => Form::Scalar(Scalar::Number),
            Type::Quantity | Type::IntOrString => Form::Scalar(Scalar::Any),
            Type::Raw | Type::Fields => Form::Any,
            Type::Json | Type::SchemaOrList | Type::SchemaOrBool | Type::SchemaOrStrings => Form::AtomicAny,
            Type::Object(id) if atomic || id.facts().atomic => Form::AtomicStruct,
            Type::Object(_) => Form::Struct,
            Type::Map(item) if atomic => Form::AtomicMap(Self::Value(item)),
            Type::Map(item) => Form::Map(Self::Value(item)),
            Type::List(item) => match field.map_or(ListType::Atomic, |field| field.list_type) {
                ListType::Atomic => Form::AtomicList(Self::Value(item)),
                ListType::Set => Form::Set(Self::Value(item)),
                ListType::Map => Form::Keyed(Self::Value(item)),
            },
        }
    }

    fn field(self, name: &str) -> Option<Self> {
        self.struct_facts()?.field(name).map(Self::Field)
    }

    fn constant(self) -> Option<bool> {
        match self {
            Self::Field(field) if field.inline || field.required => Some(field.inline),
            _ => None,
        }
    }

    fn constant_fields(self) -> impl Iterator<Item = (&'static str, bool)> {
        self.struct_facts()
            .into_iter()
            .flat_map(TypeFacts::constant)
            .filter_map(|field| Some((field.name, Self::Field(field).constant()?)))
    }

    fn default_of(self, name: &str) -> Option<Value> {
        serde_json::from_str(self.struct_facts()?.field(name)?.default?).ok()
    }

    fn keys(self) -> impl Iterator<Item = &'static str> {
        let keys: &'static [&'static str] = match self {
            Self::Field(field) => &field.list_keys,
            _ => &[],
        };
        keys.iter().copied()
    }
}
