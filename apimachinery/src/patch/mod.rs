//! Patches: JSON patch (RFC 6902), merge patch (RFC 7386), and Kubernetes' strategic merge patch. All over JSON values; only
//! the strategic one needs to know types.
#[cfg(test)]
mod laws;
mod strategic;

pub use strategic::strategic;

use serde_json::Value;

/// More operations than this in one JSON patch are refused. As `maxJSONPatchOperations`.
pub const MAX_JSON_PATCH_OPERATIONS: usize = 10_000;

/// What the copies of one JSON patch may add together. As kube-apiserver's limit on bodies.
const MAX_COPIED_BYTES: usize = 3 * 1024 * 1024;

/// A patch that cannot be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// It is no patch at all: the client's mistake, 400.
    #[error("{0}")]
    Malformed(String),
    /// It does not fit the object (a `test` failed, a path leads nowhere): 422.
    #[error("{0}")]
    Unprocessable(String),
    /// Kubernetes has no better word for it than a server error: 500.
    #[error("{0}")]
    Failed(String),
    /// More than [`MAX_JSON_PATCH_OPERATIONS`]: 413.
    #[error("The allowed maximum operations in a JSON patch is {MAX_JSON_PATCH_OPERATIONS}, got {0}")]
    TooManyOperations(usize),
}

/// Applies a JSON patch: `patch` is the list of operations. On an error `target` may have changed in part.
pub fn json(target: &mut Value, patch: &Value) -> Result<(), PatchError> {
    let operations =
        patch.as_array().ok_or_else(|| PatchError::Malformed("a JSON patch is a list of operations".into()))?;
    if operations.len() > MAX_JSON_PATCH_OPERATIONS {
        return Err(PatchError::TooManyOperations(operations.len()));
    }
    let patch: json_patch::Patch = serde_json::from_value(patch.clone())
        .map_err(|e| PatchError::Unprocessable(format!("invalid JSON patch: {e}")))?;
    let mut copied = 0;
    for operation in patch.0 {
        // Copies of copies double: a short patch must not grow beyond all memory.
        if let json_patch::PatchOperation::Copy(copy) = &operation
            && let Some(source) = target.pointer(copy.from.as_str())
        {
            copied += size(source, MAX_COPIED_BYTES);
            if copied > MAX_COPIED_BYTES {
                return Err(PatchError::Unprocessable(format!(
                    "Unable to complete the copy, the accumulated size increase of copy is {copied}, exceeding the limit {MAX_COPIED_BYTES}"
                )));
            }
        }
        let operation = json_patch::Patch(vec![operation]);
        json_patch::patch(target, &operation).map_err(|e| PatchError::Unprocessable(e.to_string()))?;
    }
    Ok(())
}

/// About as many bytes as a value has in JSON; not counted on beyond `limit`.
fn size(value: &Value, limit: usize) -> usize {
    match value {
        Value::String(text) => text.len() + 2,
        Value::Array(items) => {
            items.iter().fold(2, |sum, item| if sum > limit { sum } else { sum + 1 + size(item, limit) })
        }
        Value::Object(members) => members
            .iter()
            .fold(2, |sum, (key, value)| if sum > limit { sum } else { sum + key.len() + 4 + size(value, limit) }),
        _ => 4,
    }
}

/// Applies a merge patch: null deletes, objects merge, all else replaces.
pub fn merge(target: &mut Value, patch: &Value) {
    json_patch::merge(target, patch);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn json_patches_apply_or_say_why_not() {
        let mut object = json!({"a": {"b": 1}});
        json(&mut object, &json!([{"op": "add", "path": "/a/c", "value": 2}, {"op": "remove", "path": "/a/b"}]))
            .unwrap();
        assert_eq!(object, json!({"a": {"c": 2}}));
        let error = json(&mut object, &json!([{"op": "test", "path": "/a/c", "value": 3}])).unwrap_err();
        assert!(matches!(error, PatchError::Unprocessable(_)), "{error}");
        let error = json(&mut object, &json!([{"op": "grow", "path": "/a"}])).unwrap_err();
        assert!(matches!(error, PatchError::Unprocessable(_)), "{error}");
        assert!(matches!(json(&mut object, &json!({})), Err(PatchError::Malformed(_))));
    }

    #[test]
    fn merge_patches_follow_the_rfc() {
        let mut object = json!({"a": 1, "b": {"c": 2, "d": 3}, "e": [1, 2]});
        merge(&mut object, &json!({"a": null, "b": {"c": null, "x": {"y": null, "z": 1}}, "e": [3]}));
        assert_eq!(object, json!({"b": {"d": 3, "x": {"z": 1}}, "e": [3]}));
    }
}
