//! Objects decoded without their `managedFields`: a third of an object's text, a tree of small maps once decoded, and
//! read by nobody who only watches.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::{borrow::Cow, fmt};

/// Where it stands in an object.
const PATH: [&str; 2] = ["metadata", "managedFields"];

/// A `K` that is decoded without `managedFields`.
#[derive(Clone, Debug)]
pub struct Lean<K>(pub K);

impl<'de, K: serde::Deserialize<'de>> serde::Deserialize<'de> for Lean<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        K::deserialize(Within { inner: deserializer, depth: 0 }).map(Lean)
    }
}

impl<K: Resource> Resource for Lean<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(dt)
    }

    fn group(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::group(dt)
    }

    fn version(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::version(dt)
    }

    fn plural(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(dt)
    }

    fn metadata_api() -> bool {
        K::metadata_api()
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.meta()
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.meta_mut()
    }
}

/// A deserializer, visitor, map or seed at a depth of [`PATH`]: below it all is as it was, at its end the key is none that
/// anybody knows, so that its value is skipped.
struct Within<T> {
    inner: T,
    depth: usize,
}

macro_rules! forward {
    ($($method:ident($($argument:ident: $type:ty),*);)*) => {
        $(fn $method<V: Visitor<'de>>(self $(, $argument: $type)*, visitor: V) -> Result<V::Value, D::Error> {
            self.inner.$method($($argument,)* Within { inner: visitor, depth: self.depth })
        })*
    };
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Within<D> {
    type Error = D::Error;

    forward! {
        deserialize_any(); deserialize_bool(); deserialize_i8(); deserialize_i16(); deserialize_i32(); deserialize_i64();
        deserialize_u8(); deserialize_u16(); deserialize_u32(); deserialize_u64(); deserialize_f32(); deserialize_f64();
        deserialize_char(); deserialize_str(); deserialize_string(); deserialize_bytes(); deserialize_byte_buf();
        deserialize_option(); deserialize_unit(); deserialize_seq(); deserialize_map(); deserialize_identifier();
        deserialize_ignored_any(); deserialize_unit_struct(name: &'static str); deserialize_newtype_struct(name: &'static str);
        deserialize_tuple(length: usize); deserialize_tuple_struct(name: &'static str, length: usize);
        deserialize_struct(name: &'static str, fields: &'static [&'static str]);
    }

    // No object is one.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.inner.deserialize_enum(name, variants, visitor)
    }
}

macro_rules! visit {
    ($($method:ident: $type:ty;)*) => {
        $(fn $method<E: Error>(self, value: $type) -> Result<V::Value, E> {
            self.inner.$method(value)
        })*
    };
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Within<V> {
    type Value = V::Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(formatter)
    }

    visit! {
        visit_bool: bool; visit_i64: i64; visit_u64: u64; visit_f64: f64; visit_str: &str; visit_borrowed_str: &'de str;
        visit_string: String;
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.inner.visit_none()
    }

    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.inner.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        self.inner.visit_some(Within { inner: deserializer, depth: self.depth })
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        self.inner.visit_newtype_struct(Within { inner: deserializer, depth: self.depth })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, sequence: A) -> Result<V::Value, A::Error> {
        self.inner.visit_seq(sequence)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        self.inner.visit_map(Entries { map, depth: self.depth, on_path: false })
    }
}

/// The entries of a map at a depth; `on_path`: the key that was read last is the path's.
struct Entries<A> {
    map: A,
    depth: usize,
    on_path: bool,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Entries<A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.on_path = false;
        let key = Key { inner: seed, depth: self.depth, on_path: &mut self.on_path };
        self.map.next_key_seed(key)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        // The last of the path is skipped as a whole.
        if !self.on_path || self.depth + 1 == PATH.len() {
            return self.map.next_value_seed(seed);
        }
        self.map.next_value_seed(Within { inner: seed, depth: self.depth + 1 })
    }

    fn size_hint(&self) -> Option<usize> {
        self.map.size_hint()
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Within<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        self.inner.deserialize(Within { inner: deserializer, depth: self.depth })
    }
}

/// A key on its way to whoever reads it.
struct Key<'a, T> {
    inner: T,
    depth: usize,
    on_path: &'a mut bool,
}

impl<T> Key<'_, T> {
    /// The key to show.
    fn shown<'k>(&mut self, key: &'k str) -> &'k str {
        *self.on_path = key == PATH[self.depth];
        if *self.on_path && self.depth + 1 == PATH.len() { "" } else { key }
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Key<'_, S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        self.inner.deserialize(Key { inner: deserializer, depth: self.depth, on_path: self.on_path })
    }
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Key<'_, D> {
    type Error = D::Error;

    // Keys of objects are strings, however they are asked for.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.inner.deserialize_str(Key { inner: visitor, depth: self.depth, on_path: self.on_path })
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Key<'_, V> {
    type Value = V::Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(formatter)
    }

    fn visit_str<E: Error>(mut self, key: &str) -> Result<V::Value, E> {
        let key = self.shown(key);
        self.inner.visit_str(key)
    }

    fn visit_borrowed_str<E: Error>(mut self, key: &'de str) -> Result<V::Value, E> {
        let key = self.shown(key);
        self.inner.visit_borrowed_str(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{ConfigMap, Pod};
    use kube::core::{DynamicObject, PartialObjectMeta, WatchEvent};
    use serde_json::{Value, json};

    fn pod() -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": {"managedFields": "kept"},
            "managedFields": [{"manager": "m", "fieldsV1": {"f:metadata": {"f:labels": {".": {}}}}}], "uid": "u"},
            "spec": {"nodeName": null, "containers": [{"name": "c", "env": [{"name": "managedFields", "value": "x"}]}]},
            "status": {"startTime": "2026-01-01T00:00:00Z"}})
    }

    #[test]
    fn all_is_there_but_managed_fields() {
        let mut whole: Pod = serde_json::from_value(pod()).unwrap();
        assert!(whole.metadata.managed_fields.take().is_some());
        let text = pod().to_string();
        assert_eq!(serde_json::from_str::<Lean<Pod>>(&text).unwrap().0, whole);
        assert_eq!(serde_json::from_slice::<Lean<Pod>>(text.as_bytes()).unwrap().0, whole);
        let event = json!({"type": "ADDED", "object": pod()}).to_string();
        let WatchEvent::Added(Lean(seen)) = serde_json::from_str::<WatchEvent<Lean<Pod>>>(&event).unwrap() else {
            panic!("not added")
        };
        assert_eq!(seen, whole);
        let partial = serde_json::from_str::<Lean<PartialObjectMeta<DynamicObject>>>(&text).unwrap().0;
        assert_eq!((partial.metadata, partial.types.unwrap().kind), (whole.metadata, "Pod".to_owned()));
        // Data under the same name elsewhere is somebody's.
        let map = json!({"metadata": {"name": "m"}, "data": {"managedFields": "x", "metadata": "y"}});
        let whole: ConfigMap = serde_json::from_value(map.clone()).unwrap();
        assert_eq!(serde_json::from_str::<Lean<ConfigMap>>(&map.to_string()).unwrap().0, whole);
    }
}
