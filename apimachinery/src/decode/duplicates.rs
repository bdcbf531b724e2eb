//! Documents of no particular type in which keys may repeat: the last one counts, and each that repeats is told, by its path
//! or its line.

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::fmt;
use std::marker::PhantomData;

/// More duplicates than this go unmentioned.
const DUPLICATES_MAX: usize = 100;

/// A document, and the keys that stand in it more than once.
pub struct Noted<K> {
    pub value: Value,
    pub duplicates: Vec<Duplicate>,
    key: PhantomData<K>,
}

/// A key that has been there before.
pub struct Duplicate {
    /// `spec.containers[0].image`.
    pub path: String,
    pub name: String,
    /// 0 if it is not known.
    pub line: u64,
}

/// How a key is read.
pub trait Key<'de>: Deserialize<'de> {
    fn into_parts(self) -> (String, u64);
}

impl Key<'_> for String {
    fn into_parts(self) -> (String, u64) {
        (self, 0)
    }
}

impl Key<'_> for serde_saphyr::Spanned<String> {
    fn into_parts(self) -> (String, u64) {
        (self.value, self.referenced.line())
    }
}

// === impl Noted ===

impl<K> Noted<K> {
    fn of(value: Value) -> Self {
        Self { value, duplicates: Vec::new(), key: PhantomData }
    }
}

impl<'de, K: Key<'de>> Deserialize<'de> for Noted<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader(PhantomData))
    }
}

struct Reader<K>(PhantomData<K>);

impl<'de, K: Key<'de>> Visitor<'de> for Reader<K> {
    type Value = Noted<K>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Noted::of(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(Noted::of(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        Noted::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Noted::of(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Noted::of(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Noted::of(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Noted::of(Number::from_f64(value).map_or(Value::Null, Value::Number)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Noted::of(value.into()))
    }

    fn visit_string<E>(self, value: String) -> Result<Self::Value, E> {
        Ok(Noted::of(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let (mut list, mut duplicates) = (Vec::new(), Vec::new());
        while let Some(item) = seq.next_element::<Noted<K>>()? {
            add(&mut duplicates, &format!("[{}]", list.len()), item.duplicates);
            list.push(item.value);
        }
        Ok(Noted { value: Value::Array(list), duplicates, key: PhantomData })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut object, mut duplicates) = (Map::new(), Vec::new());
        while let Some(key) = map.next_key::<K>()? {
            let (name, line) = key.into_parts();
            if object.contains_key(&name) && duplicates.len() < DUPLICATES_MAX {
                duplicates.push(Duplicate { path: name.clone(), name: name.clone(), line });
            }
            let item = map.next_value::<Noted<K>>()?;
            add(&mut duplicates, &name, item.duplicates);
            object.insert(name, item.value);
        }
        Ok(Noted { value: Value::Object(object), duplicates, key: PhantomData })
    }
}

fn add(all: &mut Vec<Duplicate>, prefix: &str, below: Vec<Duplicate>) {
    for duplicate in below {
        if all.len() < DUPLICATES_MAX {
            let dot = if duplicate.path.starts_with('[') { "" } else { "." };
            all.push(Duplicate { path: format!("{prefix}{dot}{}", duplicate.path), ..duplicate });
        }
    }
}
