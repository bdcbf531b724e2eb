//! JSON values read and written quickly: what every write of an object does with all of it.
//!
//! What is read and written is what `serde_json` would read and write (a property holds that): strings are looked through eight
//! bytes at a time, and what is rare (escapes, fractions) is left to `serde_json`.

use serde_json::{Map, Value};

/// What nests deeper is left to `serde_json`, which has its own limit.
const DEPTH_MAX: usize = 120;
const ONES: u64 = u64::from_le_bytes([1; 8]);
const HIGH: u64 = u64::from_le_bytes([0x80; 8]);

// === strings ===

/// Which bytes of eight (by their highest bits) are a quote, a backslash or a control character; above the first such byte it
/// may err.
fn special(word: u64) -> u64 {
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word;
    let control = word.wrapping_sub(ONES * 0x20) & !word;
    (zeros(word ^ (ONES * u64::from(b'"'))) | zeros(word ^ (ONES * u64::from(b'\\'))) | control) & HIGH
}

/// How many bytes there are before a quote, a backslash or a control character.
fn plain(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(word) = bytes[at..].first_chunk() {
        let found = special(u64::from_le_bytes(*word));
        if found != 0 {
            return at + found.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    // The rest as well, with bytes that have been looked at: most texts are short.
    let (begin, word) = match (bytes.last_chunk(), bytes.first_chunk(), bytes.last_chunk()) {
        (Some(last), _, _) => (bytes.len() - 8, u64::from_le_bytes(*last)),
        (None, Some(first), Some(last)) if special(wide(*first)) == 0 => (bytes.len() - 4, wide(*last)),
        _ => return bytes.iter().take_while(|byte| **byte >= 0x20 && !matches!(byte, b'"' | b'\\')).count(),
    };
    match special(word) {
        0 => bytes.len(),
        found => begin + found.trailing_zeros() as usize / 8,
    }
}

/// Four bytes, and four that are not special.
fn wide(bytes: [u8; 4]) -> u64 {
    u64::from(u32::from_le_bytes(bytes)) | ONES << 5 & !0xffff_ffff
}

/// Writes what stands between the quotes of a text.
pub fn write_escaped(text: &str, out: &mut String) {
    let mut rest = text;
    loop {
        let at = plain(rest.as_bytes());
        out.push_str(&rest[..at]);
        let Some(byte) = rest.as_bytes().get(at) else { return };
        match byte {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            _ => out.push_str(Value::from(&rest[at..=at]).to_string().trim_matches('"')),
        }
        rest = &rest[at + 1..];
    }
}

// === writing ===

pub fn write_string(text: &str, out: &mut String) {
    out.push('"');
    write_escaped(text, out);
    out.push('"');
}

/// Writes a value as `Value::to_string` does.
pub fn write(value: &Value, out: &mut String) {
    match value {
        Value::String(text) => write_string(text, out),
        Value::Object(map) => {
            out.push('{');
            for (at, (name, value)) in map.iter().enumerate() {
                if at > 0 {
                    out.push(',');
                }
                write_string(name, out);
                out.push(':');
                write(value, out);
            }
            out.push('}');
        }
        Value::Array(list) => {
            out.push('[');
            for (at, value) in list.iter().enumerate() {
                if at > 0 {
                    out.push(',');
                }
                write(value, out);
            }
            out.push(']');
        }
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Null => out.push_str("null"),
        Value::Number(number) => out.push_str(&number.to_string()),
    }
}

// === reading ===

/// Reads a value; None for what is none, and for what only `serde_json` may be asked.
pub fn read(text: &str) -> Option<Value> {
    read_apart(text, &[]).map(|(value, _)| value)
}

/// Reads a value but for the members at these paths, which come back as the texts that they are, in the order of the paths.
/// Paths are names from the top: `["metadata", "managedFields"]`.
pub fn read_apart<'t>(text: &'t str, apart: &[&[&str]]) -> Option<(Value, Vec<Option<&'t str>>)> {
    let mut reader = Reader { text, at: 0 };
    let mut found = vec![None; apart.len()];
    let paths: Vec<(usize, &[&str])> = apart.iter().copied().enumerate().collect();
    let value = reader.value(&paths, &mut found, 0)?;
    reader.space();
    (reader.at == text.len()).then_some((value, found))
}

/// JSON text, read from left to right.
struct Reader<'t> {
    text: &'t str,
    at: usize,
}

// === impl Reader ===

impl<'t> Reader<'t> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\t' | b'\r')) {
            self.at += 1;
        }
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.space();
        (self.peek()? == byte).then(|| self.at += 1)
    }

    /// Behind a member or an item: does another follow? None for anything but `,` and `end`.
    fn more(&mut self, end: u8) -> Option<bool> {
        self.space();
        let byte = self.peek()?;
        self.at += 1;
        match byte {
            b',' => Some(true),
            _ if byte == end => Some(false),
            _ => None,
        }
    }

    fn word(&mut self, word: &str, value: Value) -> Option<Value> {
        self.text[self.at..].starts_with(word).then(|| {
            self.at += word.len();
            value
        })
    }

    fn value(&mut self, apart: &[(usize, &[&str])], found: &mut [Option<&'t str>], depth: usize) -> Option<Value> {
        self.space();
        match self.peek()? {
            b'"' => self.string().map(Value::String),
            b'{' if depth < DEPTH_MAX => self.object(apart, found, depth + 1),
            b'[' if depth < DEPTH_MAX => self.list(depth + 1),
            b't' => self.word("true", Value::Bool(true)),
            b'f' => self.word("false", Value::Bool(false)),
            b'n' => self.word("null", Value::Null),
            _ => self.number(),
        }
    }

    fn object(&mut self, apart: &[(usize, &[&str])], found: &mut [Option<&'t str>], depth: usize) -> Option<Value> {
        let mut map = Map::new();
        self.at += 1;
        self.space();
        if self.peek()? == b'}' {
            self.at += 1;
            return Some(Value::Object(map));
        }
        loop {
            self.space();
            let name = self.string()?;
            self.expect(b':')?;
            if apart.is_empty() {
                map.insert(name, self.value(&[], found, depth)?);
            } else {
                let below: Vec<(usize, &[&str])> = apart
                    .iter()
                    .filter(|(_, path)| path.first() == Some(&name.as_str()))
                    .map(|(which, path)| (*which, &path[1..]))
                    .collect();
                match below.iter().find(|(_, path)| path.is_empty()) {
                    Some((which, _)) => found[*which] = Some(self.skip()?),
                    None => _ = map.insert(name, self.value(&below, found, depth)?),
                }
            }
            if !self.more(b'}')? {
                return Some(Value::Object(map));
            }
        }
    }

    fn list(&mut self, depth: usize) -> Option<Value> {
        let mut list = Vec::new();
        self.at += 1;
        self.space();
        if self.peek()? == b']' {
            self.at += 1;
            return Some(Value::Array(list));
        }
        loop {
            list.push(self.value(&[], &mut [], depth)?);
            if !self.more(b']')? {
                return Some(Value::Array(list));
            }
        }
    }

    fn string(&mut self) -> Option<String> {
        if self.peek()? != b'"' {
            return None;
        }
        let start = self.at;
        self.at += 1;
        let length = plain(&self.text.as_bytes()[self.at..]);
        self.at += length;
        match self.peek()? {
            b'"' => {
                self.at += 1;
                Some(self.text[start + 1..self.at - 1].to_owned())
            }
            b'\\' => {
                self.end_string()?;
                serde_json::from_str(&self.text[start..self.at]).ok()
            }
            _ => None,
        }
    }

    /// From somewhere in a string to behind its closing quote.
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

    fn number(&mut self) -> Option<Value> {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E')) {
            self.at += 1;
        }
        let text = &self.text[start..self.at];
        match text.as_bytes() {
            // What fits into an i64 whatever it says, and is written in the one way that there is.
            [b'1'..=b'9', rest @ ..] if rest.len() < 18 && rest.iter().all(u8::is_ascii_digit) => {
                text.parse::<i64>().ok().map(Value::from)
            }
            _ => serde_json::from_str(text).ok(),
        }
    }

    /// Past a value, of which nothing but the brackets is looked at; its text.
    fn skip(&mut self) -> Option<&'t str> {
        self.space();
        let (start, bytes) = (self.at, self.text.as_bytes());
        let mut depth = 0_usize;
        loop {
            let byte = *bytes.get(self.at)?;
            self.at += 1;
            match byte {
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.checked_sub(1)?,
                b'"' => self.end_string()?,
                _ => {}
            }
            // A value that is no string and has no brackets ends before what cannot be in it.
            if depth == 0
                && (matches!(byte, b'}' | b']' | b'"') || matches!(bytes.get(self.at), Some(b',' | b'}' | b']')))
            {
                return Some(self.text[start..self.at].trim_end());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn values() -> impl Strategy<Value = Value> {
        let text = "[ -~\\u{0}-\\u{20}\"\\\\äß€\\u{10ffff}]{0,24}";
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            (-1000_i32..1000).prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            text.prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 64, 8, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
                prop::collection::btree_map(text, inner, 0..8).prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_and_read_is_what_serde_json_writes_and_reads(value in values()) {
            let mut text = String::new();
            write(&value, &mut text);
            prop_assert_eq!(&text, &value.to_string());
            prop_assert_eq!(read(&text), serde_json::from_str(&text).ok());
            let pretty = serde_json::to_string_pretty(&value).unwrap_or_default();
            prop_assert_eq!(read(&pretty), serde_json::from_str(&pretty).ok());
        }

        #[test]
        fn what_is_no_json_is_not_read(text in "[\\[\\]{}\",:0-9a-z\\\\ .eE+-]{0,24}") {
            if let Some(value) = read(&text) {
                prop_assert_eq!(Some(value), serde_json::from_str(&text).ok());
            }
        }
    }

    #[test]
    fn members_are_left_apart_as_texts() {
        let text = r#"{"a": {"b": [1, {"c": "}\""}] , "d": 2, "e": null}, "b": 1, "f": {"b": true}}"#;
        let (value, apart) = read_apart(text, &[&["a", "b"], &["a", "e"], &["a", "x"], &["f"]]).unwrap();
        assert_eq!(value, json!({"a": {"d": 2}, "b": 1}));
        assert_eq!(apart, [Some(r#"[1, {"c": "}\""}]"#), Some("null"), None, Some(r#"{"b": true}"#)]);
    }

    #[test]
    fn what_nests_too_deep_is_not_read() {
        assert_eq!(read(&"[".repeat(100_000)), None);
    }
}
