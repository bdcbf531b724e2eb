//! Continue tokens: where the next page of a list begins, as text that the client gives back. As `EncodeContinue`.

use crate::status::StatusError;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

const VERSION: &str = "meta.k8s.io/v1";

/// Where a list goes on.
#[derive(Debug, Serialize, Deserialize)]
pub struct Token {
    #[serde(default)]
    v: String,
    /// The revision that the list shows; -1: whatever is newest.
    #[serde(default)]
    pub rv: i64,
    /// A key, below that of what is listed.
    #[serde(default)]
    pub start: String,
}

impl Token {
    pub fn encode(revision: i64, start: &str) -> String {
        let token = Self { v: VERSION.to_owned(), rv: revision, start: start.to_owned() };
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).unwrap_or_default())
    }

    /// As `DecodeContinue`.
    pub fn decode(text: &str) -> Result<Self, StatusError> {
        let refuse = |why: &str| {
            Err(StatusError::bad_request(format!("invalid continue token: continue key is not valid{why}")))
        };
        let decoded = URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| serde_json::from_slice::<Self>(&bytes).ok());
        let Some(token) = decoded else { return refuse("") };
        if token.v != VERSION {
            return refuse(": server does not recognize this encoded version");
        }
        if token.rv == 0 {
            return refuse(": incorrect encoded start resourceVersion (version meta.k8s.io/v1)");
        }
        if token.start.is_empty() {
            return refuse(": encoded start key empty (version meta.k8s.io/v1)");
        }
        // Nobody leaves the place that is listed with it.
        let mut segments = token.start.strip_prefix('/').unwrap_or(&token.start).split('/');
        if segments.any(|segment| matches!(segment, "" | "." | "..")) {
            return refuse(&format!(": {}", token.start));
        }
        Ok(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_back_and_a_wrong_one_refused() {
        let token = Token::decode(&Token::encode(7, "a/b\0")).unwrap();
        assert_eq!((token.rv, token.start.as_str()), (7, "a/b\0"));
        let of = |json: &str| URL_SAFE_NO_PAD.encode(json);
        for text in [
            "x",
            "!!!",
            &of("{}"),
            &of(r#"{"v":"v2","rv":1,"start":"a"}"#),
            &of(r#"{"v":"meta.k8s.io/v1","rv":0,"start":"a"}"#),
            &of(r#"{"v":"meta.k8s.io/v1","rv":1,"start":""}"#),
            &of(r#"{"v":"meta.k8s.io/v1","rv":1,"start":"../secrets/a"}"#),
            &of(r#"{"v":"meta.k8s.io/v1","rv":1,"start":"a/./b"}"#),
        ] {
            assert_eq!(Token::decode(text).unwrap_err().code(), 400, "{text}");
        }
    }
}
