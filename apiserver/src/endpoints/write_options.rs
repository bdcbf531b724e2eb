//! The options of a write, from its query. As `ValidateCreateOptions`, `ValidateUpdateOptions` and `ValidatePatchOptions`.

use super::ownership::{MANAGER_BYTES_MAX, is_printable};
use super::patch::APPLY_PATCH;
use crate::server::negotiation::content_type;
use crate::server::request_info::RequestInfo;
use apimachinery::decode::FieldValidation;
use apimachinery::status::{FieldError, StatusError};
use http::HeaderMap;
use serde_json::Value;

/// What a write is to heed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteOptions {
    pub field_validation: FieldValidation,
    pub dry_run: bool,
}

// === impl WriteOptions ===

impl WriteOptions {
    /// Reads are given the defaults.
    pub fn of(info: &RequestInfo, headers: &HeaderMap) -> Result<Self, StatusError> {
        let kind = match info.verb {
            "create" => "CreateOptions",
            "update" => "UpdateOptions",
            "patch" => "PatchOptions",
            "delete" | "deletecollection" => "DeleteOptions",
            _ => return Ok(Self::default()),
        };
        let mut errors = Vec::new();
        if kind == "PatchOptions" {
            let apply = content_type(headers) == APPLY_PATCH;
            if apply && info.query.get("fieldManager").is_empty() {
                errors.push(FieldError::required("fieldManager", "is required for apply patch"));
            }
            if !apply && info.query.has("force") {
                errors.push(FieldError::forbidden("force", "may not be specified for non-apply patch"));
            }
        }
        check_manager(info.query.get("fieldManager"), &mut errors);
        let dry_run: Vec<&str> = info.query.all("dryRun").filter(|value| !value.is_empty()).collect();
        if dry_run.iter().any(|value| *value != "All") {
            errors.push(FieldError::not_supported("dryRun", Value::from(dry_run.clone()), &["All"]));
        }
        let text = info.query.get("fieldValidation");
        let field_validation = FieldValidation::parse(text);
        if field_validation.is_none() {
            errors.push(FieldError::not_supported("fieldValidation", text, &["", "Ignore", "Strict", "Warn"]));
        }
        if !errors.is_empty() {
            return Err(StatusError::invalid("meta.k8s.io", kind, "", &errors));
        }
        Ok(Self { field_validation: field_validation.unwrap_or_default(), dry_run: !dry_run.is_empty() })
    }
}

/// As `ValidateFieldManager`.
fn check_manager(manager: &str, errors: &mut Vec<FieldError>) {
    if manager.len() > MANAGER_BYTES_MAX {
        errors.push(FieldError::too_long("fieldManager", MANAGER_BYTES_MAX));
    }
    for (at, c) in manager.char_indices().filter(|(_, c)| !is_printable(*c)) {
        let detail = format!("invalid character U+{:04X} (at position {at})", u32::from(c));
        errors.push(FieldError::invalid("fieldManager", manager, detail));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Method;
    use http::header::CONTENT_TYPE;

    #[test]
    fn options_are_checked() {
        let long = "m".repeat(129);
        for (method, kind, query, expected) in [
            (Method::POST, "application/json", "dryRun=All&fieldManager=m", Ok(true)),
            (Method::POST, "application/json", "", Ok(false)),
            (
                Method::POST,
                "application/json",
                "dryRun=Some",
                Err(
                    r#"CreateOptions.meta.k8s.io "" is invalid: dryRun: Unsupported value: ["Some"]: supported values: "All""#,
                ),
            ),
            (
                Method::PUT,
                "application/json",
                "fieldValidation=x",
                Err(
                    r#"UpdateOptions.meta.k8s.io "" is invalid: fieldValidation: Unsupported value: "x": supported values: "", "Ignore", "Strict", "Warn""#,
                ),
            ),
            (
                Method::PUT,
                "application/json",
                &format!("fieldManager={long}"),
                Err(
                    r#"UpdateOptions.meta.k8s.io "" is invalid: fieldManager: Too long: may not be more than 128 bytes"#,
                ),
            ),
            (
                Method::PUT,
                "application/json",
                "fieldManager=a%07",
                Err(
                    "UpdateOptions.meta.k8s.io \"\" is invalid: fieldManager: Invalid value: \"a\\u0007\": invalid character U+0007 (at position 1)",
                ),
            ),
            (
                Method::PATCH,
                APPLY_PATCH,
                "",
                Err(
                    r#"PatchOptions.meta.k8s.io "" is invalid: fieldManager: Required value: is required for apply patch"#,
                ),
            ),
            (
                Method::PATCH,
                "application/merge-patch+json",
                "force=true",
                Err(
                    r#"PatchOptions.meta.k8s.io "" is invalid: force: Forbidden: may not be specified for non-apply patch"#,
                ),
            ),
            (Method::PATCH, APPLY_PATCH, "force=true&fieldManager=m", Ok(false)),
        ] {
            let info = RequestInfo::parse(&method, "/api/v1/namespaces/a/pods/p", query);
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, kind.parse().unwrap());
            let got = WriteOptions::of(&info, &headers).map(|o| o.dry_run).map_err(|e| e.message().to_owned());
            assert_eq!(got, expected.map_err(str::to_owned), "{query}");
        }
    }
}
