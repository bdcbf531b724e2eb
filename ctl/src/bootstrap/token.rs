//! Bootstrap tokens: `ID.SECRET`, kept as Secrets of `kube-system` in Kubernetes' form, and the signatures that let who
//! holds a token trust `cluster-info`. All of it is a function of plain data.

use std::fmt::Write;

use anyhow::{Context, Result, bail};
use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jiff::Timestamp;
use serde_json::{Value, json};

/// The group of whom joins with a token. As kubeadm's `NodeBootstrapTokenAuthGroup`.
pub(crate) const NODE_GROUP: &str = "system:bootstrappers:kubeadm:default-node-token";
/// The type of the Secrets that hold tokens.
pub(crate) const SECRET_TYPE: &str = "bootstrap.kubernetes.io/token";

const ID_LEN: usize = 6;
const SECRET_LEN: usize = 16;

/// A bootstrap token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) id: String,
    pub(crate) secret: String,
}

impl Token {
    /// A new random token.
    pub(crate) fn generate() -> Result<Token> {
        Ok(Token { id: random_text(ID_LEN)?, secret: random_text(SECRET_LEN)? })
    }

    /// The name of the token's Secret.
    pub(crate) fn secret_name(&self) -> String {
        secret_name(&self.id)
    }
}

impl std::str::FromStr for Token {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Token> {
        match text.split_once('.') {
            Some((id, secret)) if is_part(id, ID_LEN) && is_part(secret, SECRET_LEN) => {
                Ok(Token { id: id.to_owned(), secret: secret.to_owned() })
            }
            _ => bail!("the token is not of the form [a-z0-9]{{6}}.[a-z0-9]{{16}}"),
        }
    }
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.id, self.secret)
    }
}

/// The name of the Secret of the token with this ID.
pub(crate) fn secret_name(id: &str) -> String {
    format!("bootstrap-token-{id}")
}

/// Whether `text` can be a token's ID.
pub(crate) fn is_id(text: &str) -> bool {
    is_part(text, ID_LEN)
}

fn is_part(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_lowercase())
}

/// `len` characters of `[a-z0-9]`, each as likely as the next.
fn random_text(len: usize) -> Result<String> {
    const ALPHABET: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    /// The largest multiple of 36 in a byte: what is above would favour the first characters.
    const LIMIT: u8 = 252;
    let mut text = String::with_capacity(len);
    while text.len() < len {
        let mut bytes = [0u8; 32];
        aws_lc_rs::rand::fill(&mut bytes).context("no random numbers to be had")?;
        let kept = bytes.iter().filter(|byte| **byte < LIMIT).map(|byte| char::from(ALPHABET[usize::from(byte % 36)]));
        text.extend(kept.take(len - text.len()));
    }
    Ok(text)
}

/// The Secret that holds a token; `expires` is `None` for one that never does.
pub(crate) fn secret(token: &Token, description: Option<&str>, expires: Option<Timestamp>, groups: &[String]) -> Value {
    let mut data = json!({
        "token-id": token.id,
        "token-secret": token.secret,
        "usage-bootstrap-authentication": "true",
        "usage-bootstrap-signing": "true",
        "auth-extra-groups": groups.join(","),
    });
    if let Some(expires) = expires {
        data["expiration"] = json!(format!("{expires:.0}"));
    }
    if let Some(description) = description {
        data["description"] = json!(description);
    }
    let encoded: serde_json::Map<String, Value> = data
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| (key.clone(), STANDARD.encode(value.as_str().unwrap_or_default()).into()))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": token.secret_name(), "namespace": "kube-system"},
        "type": SECRET_TYPE,
        "data": encoded,
    })
}

/// A token as its Secret tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) token: Token,
    pub(crate) expires: Option<Timestamp>,
    pub(crate) description: String,
    pub(crate) groups: String,
    pub(crate) authentication: bool,
    pub(crate) signing: bool,
}

impl Stored {
    /// Whether `cluster-info` is to bear this token's signature.
    pub(crate) fn signs(&self, now: Timestamp) -> bool {
        self.signing && self.expires.is_none_or(|expires| expires > now)
    }
}

/// Reads a token's Secret; `None` where it is malformed.
pub(crate) fn stored(secret: &Value) -> Option<Stored> {
    let field = |name: &str| -> Option<String> {
        let bytes = STANDARD.decode(secret["data"][name].as_str()?).ok()?;
        String::from_utf8(bytes).ok()
    };
    let is_true = |name: &str| field(name).as_deref() == Some("true");
    let token: Token = format!("{}.{}", field("token-id")?, field("token-secret")?).parse().ok()?;
    let expires = match field("expiration") {
        Some(text) => Some(text.parse().ok()?),
        None => None,
    };
    Some(Stored {
        token,
        expires,
        description: field("description").unwrap_or_default(),
        groups: field("auth-extra-groups").unwrap_or_default(),
        authentication: is_true("usage-bootstrap-authentication"),
        signing: is_true("usage-bootstrap-signing"),
    })
}

/// The table of `token list`.
pub(crate) fn table(tokens: &[Stored], now: Timestamp) -> String {
    let mut text =
        format!("{:<25}{:<13}{:<22}{:<25}{:<30}EXTRA GROUPS\n", "TOKEN", "TTL", "EXPIRES", "USAGES", "DESCRIPTION");
    for stored in tokens {
        let (ttl, expires) = match stored.expires {
            None => ("<forever>".to_owned(), "<never>".to_owned()),
            Some(at) if at <= now => ("<invalid>".to_owned(), format!("{at:.0}")),
            Some(at) => (short_duration((at - now).get_seconds_total()), format!("{at:.0}")),
        };
        let usages = [("authentication", stored.authentication), ("signing", stored.signing)]
            .iter()
            .filter(|(_, on)| *on)
            .map(|(name, _)| *name)
            .collect::<Vec<_>>()
            .join(",");
        let or_none = |text: &str| if text.is_empty() { "<none>".to_owned() } else { text.to_owned() };
        let row = format!(
            "{:<25}{ttl:<13}{expires:<22}{:<25}{:<30}{}",
            stored.token.to_string(),
            or_none(&usages),
            or_none(&stored.description),
            or_none(&stored.groups)
        );
        let _ = writeln!(text, "{row}");
    }
    text
}

/// `23h`, `5m`, `40s`.
fn short_duration(seconds: i64) -> String {
    match seconds {
        3600.. => format!("{}h", seconds / 3600),
        60.. => format!("{}m", seconds / 60),
        _ => format!("{seconds}s"),
    }
}

trait Seconds {
    fn get_seconds_total(&self) -> i64;
}

impl Seconds for jiff::Span {
    fn get_seconds_total(&self) -> i64 {
        self.total(jiff::Unit::Second).map_or(0, |seconds| seconds as i64)
    }
}

/// The key under which `cluster-info` keeps the signature made with this token.
pub(crate) fn signature_key(id: &str) -> String {
    format!("jws-kubeconfig-{id}")
}

/// A detached JWS (HS256) over `content`, byte for byte as Kubernetes' `ComputeDetachedSignature` makes it.
pub(crate) fn sign(content: &str, token: &Token) -> String {
    let header = URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"HS256","kid":"{}"}}"#, token.id));
    let payload = URL_SAFE_NO_PAD.encode(content);
    let key = hmac::Key::new(hmac::HMAC_SHA256, token.secret.as_bytes());
    let signature = hmac::sign(&key, format!("{header}.{payload}").as_bytes());
    format!("{header}..{}", URL_SAFE_NO_PAD.encode(signature))
}

/// Whether `signature` is a detached JWS over `content` made with `token`, whatever the order of its header's fields.
pub(crate) fn verify(content: &str, signature: &str, token: &Token) -> bool {
    let parts: Vec<&str> = signature.split('.').collect();
    let [header, "", code] = parts.as_slice() else { return false };
    let decoded: Option<Value> =
        URL_SAFE_NO_PAD.decode(header).ok().and_then(|json| serde_json::from_slice(&json).ok());
    let Some(code) = URL_SAFE_NO_PAD.decode(code).ok().filter(|_| {
        decoded.as_ref().is_some_and(|header| header["alg"] == "HS256" && header["kid"] == token.id.as_str())
    }) else {
        return false;
    };
    let key = hmac::Key::new(hmac::HMAC_SHA256, token.secret.as_bytes());
    hmac::verify(&key, format!("{header}.{}", URL_SAFE_NO_PAD.encode(content)).as_bytes(), &code).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        "abcdef.0123456789abcdef".parse().expect("a token")
    }

    #[test]
    fn tokens_have_kubernetes_form() -> Result<()> {
        for _ in 0..50 {
            let token = Token::generate()?;
            assert_eq!(token.to_string().parse::<Token>()?, token);
        }
        for text in [
            "",
            "abcdef",
            "abcdef.0123456789abcde",
            "ABCDEF.0123456789abcdef",
            "abcdef.0123456789abcdef ",
            "abcde.f0123456789abcdef",
        ] {
            assert!(text.parse::<Token>().is_err(), "{text:?}");
        }
        Ok(())
    }

    #[test]
    fn a_secret_reads_back_as_it_was_written() -> Result<()> {
        let expires: Timestamp = "2026-11-22T04:00:00Z".parse()?;
        let secret = secret(&token(), Some("for n2"), Some(expires), &[NODE_GROUP.to_owned()]);
        assert_eq!(secret["metadata"]["name"], "bootstrap-token-abcdef");
        let stored = stored(&secret).expect("well-formed");
        assert_eq!(stored.token, token());
        assert_eq!(stored.expires, Some(expires));
        assert!(stored.signs("2026-11-22T03:59:59Z".parse()?) && !stored.signs(expires));
        let table = table(&[stored], "2026-11-21T04:30:00Z".parse()?);
        assert!(
            table.contains(
                "abcdef.0123456789abcdef  23h          2026-11-22T04:00:00Z  authentication,signing   for n2"
            ),
            "{table}"
        );
        Ok(())
    }

    #[test]
    fn malformed_secrets_are_passed_over() {
        assert_eq!(stored(&json!({})), None);
        assert_eq!(stored(&json!({"data": {"token-id": "YWJj", "token-secret": "!"}})), None);
    }

    #[test]
    fn signatures_are_kubernetes() {
        // Computed by another program from the definition, after both agreed with a signature that Kubernetes makes.
        assert_eq!(
            sign("apiVersion: v1\nkind: Config\n", &token()),
            "eyJhbGciOiJIUzI1NiIsImtpZCI6ImFiY2RlZiJ9..vH_kT4yiol-nrAWgjfCYqvum5wsKETXe0S7OOp1VgnE"
        );
    }

    #[test]
    fn a_signature_fits_one_content_and_one_token() {
        let signature = sign("content", &token());
        assert!(verify("content", &signature, &token()));
        assert!(!verify("contents", &signature, &token()));
        let other: Token = "abcdef.fedcba9876543210".parse().expect("a token");
        assert!(!verify("content", &signature, &other));
        for broken in ["", "..", "a..b", &signature.replace("..", ".x."), &signature[..signature.len() - 2]] {
            assert!(!verify("content", broken, &token()), "{broken}");
        }
    }
}
