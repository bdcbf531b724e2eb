//! Objects without what nobody reads who only watches: their `managedFields`, a third of an object's text and a tree of small
//! maps once decoded, and, by [`part!`](crate::part), whatever else is of no interest to a program.
use memchr::memchr2;
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use std::{borrow::Cow, ops::Range};

/// Part of a type of the API: the fields that are decoded. It becomes the whole, with nothing in the other fields. Fields
/// that are themselves read in part say so by `deserialize_with`: [`whole`], [`optional`], [`list`], [`optional_list`].
#[macro_export]
macro_rules! part {
    ($vis:vis $part:ident of $whole:ident { $($(#[$attribute:meta])* $field:ident: $type:ty,)* }) => {
        #[derive(Default, serde::Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        $vis struct $part { $($(#[$attribute])* $vis $field: $type,)* }

        impl From<$part> for $whole {
            #[allow(clippy::needless_update, reason = "of some types all fields are decoded")]
            fn from(part: $part) -> $whole {
                $whole { $($field: part.$field,)* ..$whole::default() }
            }
        }
    };
}

pub fn whole<'de, P: Deserialize<'de>, T: From<P>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    P::deserialize(from).map(T::from)
}

pub fn optional<'de, P: Deserialize<'de>, T: From<P>, D: Deserializer<'de>>(from: D) -> Result<Option<T>, D::Error> {
    Ok(Option::<P>::deserialize(from)?.map(T::from))
}

pub fn optional_list<'de, P: Deserialize<'de>, T: From<P>, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<Vec<T>>, D::Error> {
    Ok(Option::<Vec<P>>::deserialize(from)?.map(|parts| parts.into_iter().map(T::from).collect()))
}

pub fn list<'de, P: Deserialize<'de>, T: From<P>, D: Deserializer<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    optional_list::<P, T, D>(from).map(Option::unwrap_or_default)
}

/// Decodes an object's JSON as if it had no `managedFields`.
pub fn decode<K: DeserializeOwned>(text: &[u8]) -> serde_json::Result<K> {
    serde_json::from_slice(&without_managed_fields(text))
}

/// An object's name, of whose text no more is read than that takes.
pub fn name_of(text: &[u8]) -> Option<String> {
    of_metadata(text, b"name")
}

/// As [`name_of`], its `resourceVersion`.
pub fn version_of(text: &[u8]) -> Option<String> {
    of_metadata(text, b"resourceVersion")
}

fn of_metadata(text: &[u8], field: &[u8]) -> Option<String> {
    let mut scan = Scan { text, at: 0 };
    scan.entry(b"metadata")?;
    scan.entry(field)?;
    scan.peek()?;
    let start = scan.at;
    scan.string()?;
    serde_json::from_slice(&text[start..scan.at]).ok()
}

fn without_managed_fields(text: &[u8]) -> Cow<'_, [u8]> {
    match managed_fields(text) {
        Some(found) => Cow::Owned([&text[..found.start], &text[found.end..]].concat()),
        None => Cow::Borrowed(text),
    }
}

/// Where the entry stands, with one comma beside it. None also for what is no JSON: whoever decodes it will say so.
fn managed_fields(text: &[u8]) -> Option<Range<usize>> {
    let mut scan = Scan { text, at: 0 };
    scan.entry(b"metadata")?;
    let start = scan.entry(b"managedFields")?;
    scan.value()?;
    let first = text[start] != b',';
    Some(start..if first && scan.peek() == Some(b',') { scan.at + 1 } else { scan.at })
}

/// Steps over JSON text without reading more of it than where things end.
struct Scan<'t> {
    text: &'t [u8],
    at: usize,
}

impl Scan<'_> {
    /// The next byte that is not a space.
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at)?.is_ascii_whitespace() {
            self.at += 1;
        }
        Some(self.text[self.at])
    }

    fn take(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }

    /// Goes into the map that begins here, to the value of `wanted`. Where the entry begins: at its comma, if it is not the first.
    fn entry(&mut self, wanted: &[u8]) -> Option<usize> {
        self.take(b'{')?;
        self.peek()?;
        loop {
            let start = self.at;
            if self.peek()? == b',' {
                self.at += 1;
            }
            self.peek()?;
            let key = self.at + 1;
            self.string()?;
            let found = &self.text[key..self.at - 1] == wanted;
            self.take(b':')?;
            if found {
                return Some(start);
            }
            self.value()?;
            (self.peek()? == b',').then_some(())?;
        }
    }

    fn string(&mut self) -> Option<()> {
        self.take(b'"')?;
        loop {
            self.at += memchr2(b'"', b'\\', self.text.get(self.at..)?)? + 1;
            if self.text[self.at - 1] == b'"' {
                return Some(());
            }
            self.at += 1;
        }
    }

    fn value(&mut self) -> Option<()> {
        match self.peek()? {
            b'"' => return self.string(),
            b'{' | b'[' => {}
            _ => {
                let rest = &self.text[self.at..];
                self.at += rest.iter().position(|byte| b",}] \n\r\t".contains(byte))?;
                return Some(());
            }
        }
        let mut depth = 0_usize;
        loop {
            match self.text.get(self.at)? {
                b'"' => {
                    self.string()?;
                    continue;
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth -= 1,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                return Some(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::{Value, json};

    #[test]
    fn all_is_there_but_managed_fields() {
        let managers = json!([{"manager": "m\\\"]}", "fieldsV1": {"f:metadata": {"f:labels": {".": {}}}}}]);
        let metadata = [
            json!({"name": "p", "managedFields": managers}),
            json!({"managedFields": managers, "name": "p"}),
            json!({"managedFields": managers}),
            json!({"labels": {"managedFields": "kept", "a": "}\"\\"}, "generation": 3, "managedFields": managers, "name": "p"}),
            json!({"name": "p", "annotations": {"managedFields": "[1]"}}),
            json!({}),
        ];
        for metadata in metadata {
            for pretty in [false, true] {
                let mut object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata,
                    "spec": {"nodeName": null, "metadata": {"managedFields": 1}}, "data": {"managedFields": "x"}});
                let text = if pretty { serde_json::to_string_pretty(&object).unwrap() } else { object.to_string() };
                let read: Value = decode(text.as_bytes()).unwrap();
                object["metadata"].as_object_mut().unwrap().remove("managedFields");
                assert_eq!(name_of(text.as_bytes()).as_deref(), object["metadata"]["name"].as_str(), "{text}");
                assert_eq!(read, object, "{text}");
            }
        }
        let pod: Pod = decode(br#"{"metadata":{"name":"p","managedFields":[{"manager":"m"}]}}"#).unwrap();
        assert_eq!((pod.metadata.name.as_deref(), pod.metadata.managed_fields), (Some("p"), None));
    }

    #[test]
    fn what_is_no_object_is_left_to_the_decoder() {
        for text in [
            "",
            "{",
            "[]",
            "{}",
            r#"{"metadata""#,
            r#"{"metadata":{"managedFields":["#,
            r#"{"metadata":{"managedFields":"\"#,
            r#"{"a":"#,
        ] {
            assert_eq!(without_managed_fields(text.as_bytes()), text.as_bytes());
        }
        assert!(decode::<Value>(br#"{"metadata":{"managedFields":[}"#).is_err());
    }
}
