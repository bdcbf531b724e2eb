//! Errors as the API reports them: `metav1.Status` with its code, reason, message and details, and the field errors that
//! an invalid object gets. Messages are Kubernetes', since people and tools match on them.
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Status, StatusCause, StatusDetails};
use serde_json::Value;
use std::fmt;

/// A failure that a client is told. Its `Display` is the status message.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{}", .0.message.as_deref().unwrap_or("unknown"))]
pub struct StatusError(pub Box<Status>);

/// What is wrong with one field.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    pub kind: FieldErrorKind,
    /// `spec.containers[0].name`.
    pub field: String,
    /// What stood there; `Null` for kinds that do not show it.
    pub value: Value,
    pub detail: String,
}

/// As `field.ErrorType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldErrorKind {
    NotFound,
    Required,
    Duplicate,
    Invalid,
    NotSupported,
    Forbidden,
    TooLong,
    TooMany,
    Internal,
    TypeInvalid,
}

// === impl StatusError ===

impl StatusError {
    /// With a code and a reason of one's own.
    pub fn new(code: u16, reason: &str, message: impl Into<String>) -> Self {
        Self(Box::new(Status {
            code: Some(i32::from(code)),
            reason: (!reason.is_empty()).then(|| reason.to_owned()),
            message: Some(message.into()),
            status: Some("Failure".to_owned()),
            ..Status::default()
        }))
    }

    /// The HTTP status code.
    pub fn code(&self) -> u16 {
        self.0.code.and_then(|c| u16::try_from(c).ok()).filter(|c| *c != 0).unwrap_or(500)
    }

    pub fn reason(&self) -> &str {
        self.0.reason.as_deref().unwrap_or("")
    }

    pub fn message(&self) -> &str {
        self.0.message.as_deref().unwrap_or("")
    }

    /// `pods "x" not found`; `resource` is the plural name.
    pub fn not_found(group: &str, resource: &str, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{} {name:?} not found", qualified(group, resource)))
            .about(group, resource, name)
    }

    /// A path that leads nowhere.
    pub fn no_such_resource() -> Self {
        let mut error = Self::new(404, "NotFound", "the server could not find the requested resource");
        error.0.details = Some(StatusDetails::default());
        error
    }

    pub fn already_exists(group: &str, resource: &str, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{} {name:?} already exists", qualified(group, resource)))
            .about(group, resource, name)
    }

    /// No free name was found behind a generateName. As `NewGenerateNameConflict`.
    pub fn no_free_name(group: &str, resource: &str, name: &str) -> Self {
        let mut error = Self::already_exists(group, resource, name).retry_after(1);
        let message = format!("{}, the server was not able to generate a unique name for the object", error.message());
        error.0.message = Some(message);
        error
    }

    /// `Operation cannot be fulfilled on pods "x": cause`.
    pub fn conflict(group: &str, resource: &str, name: &str, cause: &str) -> Self {
        let what = qualified(group, resource);
        Self::new(409, "Conflict", format!("Operation cannot be fulfilled on {what} {name:?}: {cause}"))
            .about(group, resource, name)
    }

    /// The conflict of a write with a resourceVersion that is no longer the newest.
    pub fn stale(group: &str, resource: &str, name: &str) -> Self {
        Self::conflict(
            group,
            resource,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// `Pod "x" is invalid: …` with a cause for each field.
    pub fn invalid(group: &str, kind: &str, name: &str, errors: &[FieldError]) -> Self {
        let (what, list) = (qualified(group, kind), aggregate(errors));
        let mut error =
            Self::new(422, "Invalid", format!("{what} {name:?} is invalid: {list}")).about(group, kind, name);
        if let Some(details) = &mut error.0.details {
            details.causes = Some(errors.iter().map(FieldError::cause).collect());
        }
        error
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// `pods "x" is forbidden: why`, without the name where there is none.
    pub fn forbidden(group: &str, resource: &str, name: &str, why: &str) -> Self {
        let what = qualified(group, resource);
        let message = match (what.is_empty(), name.is_empty()) {
            (true, _) => format!("forbidden: {why}"),
            (false, true) => format!("{what} is forbidden: {why}"),
            (false, false) => format!("{what} {name:?} is forbidden: {why}"),
        };
        Self::new(403, "Forbidden", message).about(group, resource, name)
    }

    pub fn method_not_supported(group: &str, resource: &str, verb: &str) -> Self {
        let what = qualified(group, resource);
        Self::new(405, "MethodNotAllowed", format!("{verb} is not supported on resources of kind {what:?}"))
            .about(group, resource, "")
    }

    /// A method that the path does not take at all.
    pub fn method_not_allowed() -> Self {
        let mut error =
            Self::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource");
        error.0.details = Some(StatusDetails::default());
        error
    }

    pub fn not_acceptable(accepted: &[&str]) -> Self {
        let list = accepted.join(", ");
        Self::new(406, "NotAcceptable", format!("only the following media types are accepted: {list}"))
    }

    pub fn unsupported_media_type(accepted: &[&str]) -> Self {
        let list = accepted.join(", ");
        Self::new(
            415,
            "UnsupportedMediaType",
            format!("the body of the request was in an unknown format - accepted media types include: {list}"),
        )
    }

    /// 410 `Expired`: the revision asked for is no longer kept.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 410 `Gone`.
    pub fn gone(message: impl Into<String>) -> Self {
        Self::new(410, "Gone", message)
    }

    pub fn too_large(limit_bytes: usize) -> Self {
        Self::new(413, "RequestEntityTooLarge", format!("Request entity too large: limit is {limit_bytes}"))
    }

    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: i32) -> Self {
        Self::new(429, "TooManyRequests", message).retry_after(retry_after_seconds)
    }

    /// `what` is for the client; causes that it must not see belong in the log.
    pub fn internal(what: impl fmt::Display) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {what}"))
    }

    pub fn service_unavailable(message: impl Into<String>) -> Self {
        Self::new(503, "ServiceUnavailable", message)
    }

    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(504, "Timeout", format!("Timeout: {}", message.into()))
    }

    /// Says when to try again, in the details and in `Retry-After`.
    pub fn retry_after(mut self, seconds: i32) -> Self {
        self.0.details.get_or_insert_default().retry_after_seconds = Some(seconds);
        self
    }

    /// Adds a cause to the details.
    pub fn with_cause(mut self, reason: &str, message: &str, field: Option<&str>) -> Self {
        self.0.details.get_or_insert_default().causes.get_or_insert_default().push(StatusCause {
            field: field.map(ToOwned::to_owned),
            message: Some(message.to_owned()),
            reason: Some(reason.to_owned()),
        });
        self
    }

    fn about(mut self, group: &str, kind: &str, name: &str) -> Self {
        let given = |s: &str| (!s.is_empty()).then(|| s.to_owned());
        self.0.details = Some(StatusDetails {
            group: given(group),
            kind: given(kind),
            name: given(name),
            ..StatusDetails::default()
        });
        self
    }
}

impl From<Status> for StatusError {
    fn from(status: Status) -> Self {
        Self(Box::new(status))
    }
}

fn qualified(group: &str, resource: &str) -> String {
    crate::meta::group_resource(group, resource)
}

// === impl FieldError ===

impl FieldError {
    pub fn new(
        kind: FieldErrorKind,
        field: impl Into<String>,
        value: impl Into<Value>,
        detail: impl Into<String>,
    ) -> Self {
        Self { kind, field: field.into(), value: value.into(), detail: detail.into() }
    }

    pub fn required(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(FieldErrorKind::Required, field, Value::Null, detail)
    }

    pub fn invalid(field: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::new(FieldErrorKind::Invalid, field, value, detail)
    }

    pub fn duplicate(field: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::new(FieldErrorKind::Duplicate, field, value, "")
    }

    pub fn forbidden(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(FieldErrorKind::Forbidden, field, Value::Null, detail)
    }

    pub fn not_found(field: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::new(FieldErrorKind::NotFound, field, value, "")
    }

    /// `supported` in the order in which they are to be named.
    pub fn not_supported(field: impl Into<String>, value: impl Into<Value>, supported: &[&str]) -> Self {
        let list: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        let detail = format!("supported values: {}", list.join(", "));
        Self::new(FieldErrorKind::NotSupported, field, value, detail)
    }

    pub fn too_long(field: impl Into<String>, max_bytes: usize) -> Self {
        Self::new(FieldErrorKind::TooLong, field, Value::Null, format!("may not be more than {max_bytes} bytes"))
    }

    pub fn too_many(field: impl Into<String>, count: usize, max: usize) -> Self {
        Self::new(FieldErrorKind::TooMany, field, count, format!("must have at most {max} items"))
    }

    /// All but the field. As `field.Error.ErrorBody`.
    pub fn body(&self) -> String {
        use FieldErrorKind as K;
        let mut body = match self.kind {
            K::Required | K::Forbidden | K::TooLong | K::Internal | K::TypeInvalid => self.kind.as_str().to_owned(),
            // Go shows a pointer to nothing so.
            _ if self.value.is_null() => format!("{}: \"null\"", self.kind.as_str()),
            _ => format!("{}: {}", self.kind.as_str(), self.value),
        };
        if !self.detail.is_empty() {
            body.push_str(": ");
            body.push_str(&self.detail);
        }
        body
    }

    fn cause(&self) -> StatusCause {
        StatusCause {
            field: Some(self.field.clone()),
            message: Some(self.body()),
            reason: Some(self.kind.reason().to_owned()),
        }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.body())
    }
}

/// All in one text, each once; more than one in brackets. As `Aggregate.Error`.
pub fn aggregate(errors: &[FieldError]) -> String {
    let mut texts: Vec<String> = Vec::new();
    for text in errors.iter().map(ToString::to_string) {
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    match texts.as_slice() {
        [one] => one.clone(),
        many => format!("[{}]", many.join(", ")),
    }
}

// === impl FieldErrorKind ===

impl FieldErrorKind {
    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotFound => "Not found",
            Self::Required => "Required value",
            Self::Duplicate => "Duplicate value",
            Self::Invalid | Self::TypeInvalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
            Self::Internal => "Internal error",
        }
    }

    /// As a status cause names it.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotFound => "FieldValueNotFound",
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::Internal => "InternalError",
            Self::TypeInvalid => "FieldValueTypeInvalid",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_of_kubernetes() {
        for (error, code, message) in [
            (StatusError::not_found("apps", "deployments", "web"), 404, r#"deployments.apps "web" not found"#),
            (StatusError::already_exists("", "pods", "a"), 409, r#"pods "a" already exists"#),
            (StatusError::forbidden("", "pods", "", "no"), 403, "pods is forbidden: no"),
            (StatusError::forbidden("", "pods", "a", "no"), 403, r#"pods "a" is forbidden: no"#),
            (
                StatusError::stale("", "pods", "a"),
                409,
                r#"Operation cannot be fulfilled on pods "a": the object has been modified; please apply your changes to the latest version and try again"#,
            ),
            (
                StatusError::invalid("apps", "Deployment", "web", &[FieldError::required("spec.selector", "")]),
                422,
                r#"Deployment.apps "web" is invalid: spec.selector: Required value"#,
            ),
            (
                StatusError::invalid(
                    "",
                    "Pod",
                    "a",
                    &[
                        FieldError::invalid("metadata.name", "A", "bad"),
                        FieldError::not_supported("spec.restartPolicy", "x", &["Always", "Never"]),
                        FieldError::invalid("spec.priority", -1, ""),
                    ],
                ),
                422,
                r#"Pod "a" is invalid: [metadata.name: Invalid value: "A": bad, spec.restartPolicy: Unsupported value: "x": supported values: "Always", "Never", spec.priority: Invalid value: -1]"#,
            ),
        ] {
            assert_eq!((error.code(), error.message()), (code, message));
        }
    }

    #[test]
    fn an_invalid_object_has_a_cause_for_each_field() {
        let error = StatusError::invalid("", "Pod", "a", &[FieldError::duplicate("spec.x[1]", "b")]);
        let causes = error.0.details.unwrap().causes.unwrap();
        assert_eq!(causes[0].reason.as_deref(), Some("FieldValueDuplicate"));
        assert_eq!(causes[0].field.as_deref(), Some("spec.x[1]"));
        assert_eq!(causes[0].message.as_deref(), Some(r#"Duplicate value: "b""#));
    }
}
