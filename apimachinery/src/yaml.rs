//! YAML in and out, always by way of JSON values: what the API knows is JSON.
use serde::Serialize;
use serde_json::Value;

/// YAML that cannot be read or written; the message has line and column.
#[derive(Debug, thiserror::Error)]
#[error("error converting YAML to JSON: {0}")]
pub struct YamlError(String);

/// The documents of a stream, empty ones left out. JSON is YAML, so a JSON text is one document.
pub fn documents(text: &str) -> Result<Vec<Value>, YamlError> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|e| YamlError(e.to_string()))?;
    Ok(documents.into_iter().filter(|d| !d.is_null()).collect())
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
    fn strings_that_look_like_other_things_survive() {
        let value = json!({"a": "1", "b": "true", "c": "null", "d": "", "e": "x: y", "f": "line\nline\n", "g": 1.5, "h": [], "i": {}, "j": "yes", "k": "1e3", "l": "0x10", "m": "- a", "n": "~", "o": "2026-01-01"});
        let text = to_string(&value).unwrap();
        assert_eq!(documents(&text).unwrap(), vec![value], "{text}");
    }
}
