//! YAML in and out, always by way of JSON values: what the API knows is JSON.
use crate::decode::{Duplicate, Noted};
use serde::Serialize;
use serde_json::Value;
use serde_saphyr::Spanned;

/// YAML that cannot be read or written; the message has line and column.
#[derive(Debug, thiserror::Error)]
#[error("error converting YAML to JSON: {0}")]
pub struct YamlError(String);

/// The documents of a stream, empty ones left out. JSON is YAML, so a JSON text is one document.
pub fn documents(text: &str) -> Result<Vec<Value>, YamlError> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|e| YamlError(e.to_string()))?;
    Ok(documents.into_iter().filter(|d| !d.is_null()).collect())
}

/// The first document of a stream, null if there is none, in which keys may repeat: the last one counts, and Kubernetes' word
/// for it is given.
pub fn document(text: &str) -> Result<(Value, Option<String>), YamlError> {
    let options = serde_saphyr::options! { duplicate_keys: serde_saphyr::options::DuplicateKeyPolicy::LastWins };
    let documents: Vec<Noted<Spanned<String>>> =
        serde_saphyr::from_multiple_with_options(text, options).map_err(|e| YamlError(e.to_string()))?;
    let Some(noted) = documents.into_iter().find(|noted| !noted.value.is_null()) else {
        return Ok((Value::Null, None));
    };
    let line = |d: &Duplicate| format!("\n  line {}: key {:?} already set in map", d.line, d.name);
    let lines: String = noted.duplicates.iter().map(line).collect();
    Ok((noted.value, (!lines.is_empty()).then(|| format!("yaml: unmarshal errors:{lines}"))))
}

/// One document into a type.
pub fn from_str<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, YamlError> {
    serde_saphyr::from_str(text).map_err(|e| YamlError(e.to_string()))
}

/// One document, ending in a line break.
pub fn to_string<T: Serialize>(value: &T) -> Result<String, YamlError> {
    // By way of JSON, so that what has a form of its own in JSON (quantities, times) has the same in YAML.
    let value = serde_json::to_value(value).map_err(|e| YamlError(e.to_string()))?;
    let mut text = serde_saphyr::to_string(&value).map_err(|e| YamlError(e.to_string()))?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn streams_are_split_and_read() {
        let read = documents("a: 1\n---\n---\nb: \"2\"\nc: [x, z]\n---\n# nothing\n").unwrap();
        assert_eq!(read, vec![json!({"a": 1}), json!({"b": "2", "c": ["x", "z"]})]);
        assert_eq!(documents("{\"a\": {\"b\": null}}").unwrap(), vec![json!({"a": {"b": null}})]);
        assert!(documents("a: [").is_err());
    }

    #[test]
    fn keys_that_repeat_are_told_with_their_lines() {
        let (value, told) = document("a: 1\nb:\n  c: [{d: 1}]\n  c:\n  - d: 2\n    d: 3\na: 4\n").unwrap();
        assert_eq!(value, json!({"a": 4, "b": {"c": [{"d": 3}]}}));
        let told = told.unwrap();
        for line in ["line 4: key \"c\"", "line 6: key \"d\"", "line 7: key \"a\" already set in map"] {
            assert!(told.contains(line), "{told}");
        }
        assert_eq!(
            document("a: [1, 1.5, true, null, x, {}]").unwrap(),
            (json!({"a": [1, 1.5, true, null, "x", {}]}), None)
        );
        assert_eq!(document("").unwrap().0, Value::Null);
    }

    #[test]
    fn strings_that_look_like_other_things_survive() {
        let value = json!({"a": "1", "b": "true", "c": "null", "d": "", "e": "x: y", "f": "line\nline\n", "g": 1.5, "h": [], "i": {}, "j": "yes", "k": "1e3", "l": "0x10", "m": "- a", "n": "~", "o": "2026-01-01"});
        let text = to_string(&value).unwrap();
        assert_eq!(documents(&text).unwrap(), vec![value], "{text}");
    }
}
