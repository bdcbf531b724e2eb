//! Failed requests, in kubectl's words.

use serde_json::Value;

use super::Cluster;

/// Why a request failed. `Display` is all that is printed: no `error:` goes before it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// The server refused the request.
    #[error("{}", self.words())]
    Server { code: u16, reason: String, message: String, details: Value, during: Option<String> },
    /// Nothing listens there.
    #[error("The connection to the server {0} was refused - did you specify the right host or port?")]
    Refused(String),
    /// No connection, for any other reason.
    #[error("Unable to connect to the server: {0}")]
    Unreachable(String),
}

impl RequestError {
    /// Of an answer that is no success.
    pub(super) fn from_response(code: http::StatusCode, body: &[u8]) -> RequestError {
        match serde_json::from_slice::<Value>(body) {
            Ok(status) if status["kind"] == "Status" => RequestError::from_status(&status),
            _ => {
                let text = String::from_utf8_lossy(body).trim().to_owned();
                let phrase = code.canonical_reason().unwrap_or_default();
                RequestError::Server {
                    code: code.as_u16(),
                    reason: phrase.replace(' ', ""),
                    message: if text.is_empty() { phrase.to_owned() } else { text },
                    details: Value::Null,
                    during: None,
                }
            }
        }
    }

    /// Of a `Status` object.
    pub(crate) fn from_status(status: &Value) -> RequestError {
        let text = |field: &str| status[field].as_str().unwrap_or_default().to_owned();
        RequestError::Server {
            code: status["code"].as_u64().and_then(|code| u16::try_from(code).ok()).unwrap_or(500),
            reason: text("reason"),
            message: text("message"),
            details: status["details"].clone(),
            during: None,
        }
    }

    /// Of a request that got no answer.
    pub(super) fn of(cluster: &Cluster, error: kube::Error) -> anyhow::Error {
        let url = &cluster.config.cluster_url;
        let address = match (url.host(), url.port_u16()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            (Some(host), None) => host.to_owned(),
            _ => url.to_string(),
        };
        let mut innermost: &dyn std::error::Error = &error;
        loop {
            if innermost
                .downcast_ref::<std::io::Error>()
                .is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
            {
                return RequestError::Refused(address).into();
            }
            match innermost.source() {
                Some(source) => innermost = source,
                None => return RequestError::Unreachable(innermost.to_string()).into(),
            }
        }
    }

    /// The HTTP status of a failed request.
    pub(crate) fn code_of(error: &anyhow::Error) -> Option<u16> {
        match error.downcast_ref()? {
            RequestError::Server { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// The server's own words, of a failure with this status.
    pub(crate) fn message_of(error: &anyhow::Error, status: u16) -> Option<&str> {
        match error.downcast_ref()? {
            RequestError::Server { code, message, .. } if *code == status => Some(message),
            _ => None,
        }
    }

    /// Says what was being done: `error when creating "file.yaml"`.
    pub(crate) fn during(error: anyhow::Error, what: &str) -> anyhow::Error {
        match error.downcast::<RequestError>() {
            Ok(RequestError::Server { code, reason, message, details, .. }) => {
                RequestError::Server { code, reason, message, details, during: Some(what.to_owned()) }.into()
            }
            Ok(other) => other.into(),
            Err(error) => error,
        }
    }

    /// As kubectl's `StandardErrorMessage`.
    fn words(&self) -> String {
        let RequestError::Server { reason, message, details, during, .. } = self else { return String::new() };
        match reason.as_str() {
            "Unauthorized" => return "error: You must be logged in to the server (Unauthorized)".to_owned(),
            "Invalid" => return invalid(message, details),
            _ => {}
        }
        let message = match during {
            Some(during) => format!("{during}: {message}"),
            None => message.clone(),
        };
        if reason.is_empty() {
            format!("Error from server: {message}")
        } else {
            format!("Error from server ({reason}): {message}")
        }
    }
}

/// `The Deployment "x" is invalid: spec.replicas: …`, or a list of causes.
fn invalid(message: &str, details: &Value) -> String {
    let text = |field: &str| details[field].as_str().unwrap_or_default();
    let subject = match (text("kind"), text("name")) {
        ("", "") => "The request is invalid".to_owned(),
        (kind, name) => format!("The {kind} {name:?} is invalid"),
    };
    let causes: Vec<String> = details["causes"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|cause| {
            let words = cause["message"].as_str().unwrap_or_default();
            match cause["field"].as_str().unwrap_or_default() {
                "" => words.to_owned(),
                field => format!("{field}: {words}"),
            }
        })
        .collect();
    match causes.as_slice() {
        [] if message.is_empty() => subject,
        [] => format!("{subject}: {message}"),
        [cause] => format!("{subject}: {cause}"),
        causes => format!("{subject}: \n* {}", causes.join("\n* ")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn failures_read_as_kubectls() {
        let not_found = json!({"reason": "NotFound", "code": 404, "message": "pods \"x\" not found"});
        let cause = |field: &str| json!({"field": field, "message": "Required value"});
        let invalid = |causes: Vec<Value>| json!({"reason": "Invalid", "code": 422, "message": "m", "details": {"kind": "Pod", "name": "p", "causes": causes}});
        let cases = [
            (not_found.clone(), "Error from server (NotFound): pods \"x\" not found"),
            (json!({"message": "boom", "code": 500}), "Error from server: boom"),
            (
                json!({"reason": "Unauthorized", "code": 401}),
                "error: You must be logged in to the server (Unauthorized)",
            ),
            (invalid(vec![cause("spec.a")]), "The Pod \"p\" is invalid: spec.a: Required value"),
            (
                invalid(vec![cause("spec.a"), cause("spec.b")]),
                "The Pod \"p\" is invalid: \n* spec.a: Required value\n* spec.b: Required value",
            ),
        ];
        for (status, expected) in cases {
            assert_eq!(RequestError::from_status(&status).to_string(), expected);
        }
        let error = RequestError::during(RequestError::from_status(&not_found).into(), "error when deleting \"f\"");
        assert_eq!(error.to_string(), "Error from server (NotFound): error when deleting \"f\": pods \"x\" not found");
    }
}
