//! Tokens of `--token-auth-file`: lines of comma-separated values, `token,user,uid,"group1,group2"`. Read once, at the start.
use std::collections::HashMap;
use std::path::Path;

use anyhow::Context as _;
use sha2::{Digest, Sha256};

use super::UserInfo;

/// Users by the SHA-256 of their token: what a look-up's time tells is of no use.
pub struct StaticTokens(HashMap<[u8; 32], UserInfo>);

// === impl StaticTokens ===

impl StaticTokens {
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("--token-auth-file: cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("--token-auth-file: {}", path.display()))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let mut users = HashMap::new();
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
        for (at, line) in lines {
            let values = values(line);
            let [token, name, uid, rest @ ..] = values.as_slice() else {
                anyhow::bail!(
                    "line {}: expected at least 3 values (token, user name, user uid), found {}",
                    at + 1,
                    values.len()
                );
            };
            anyhow::ensure!(!token.is_empty(), "line {}: the token is empty", at + 1);
            let groups = rest.first().map(|groups| groups.split(',').map(|g| g.trim().to_owned()).collect());
            let user = UserInfo {
                name: name.clone(),
                uid: uid.clone(),
                groups: groups.filter(|groups: &Vec<String>| groups.iter().any(|g| !g.is_empty())).unwrap_or_default(),
                ..UserInfo::default()
            };
            users.insert(Sha256::digest(token.as_bytes()).into(), user);
        }
        Ok(Self(users))
    }

    pub fn user(&self, token: &str) -> Option<UserInfo> {
        let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        self.0.get(&digest).cloned()
    }
}

/// The values of a line; one in double quotes may hold commas, and a quote as two.
fn values(line: &str) -> Vec<String> {
    let mut values = vec![String::new()];
    let mut quoted = false;
    let mut characters = line.trim_end().chars().peekable();
    while let Some(character) = characters.next() {
        match (character, values.last_mut()) {
            ('"', Some(last)) if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                last.push('"');
            }
            ('"', _) => quoted = !quoted,
            (',', _) if !quoted => values.push(String::new()),
            (other, Some(last)) => last.push(other),
            (_, None) => {}
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_user() {
        let tokens = StaticTokens::parse("# comment\nsecret,ann,7,\"devs,ops\"\n\nother,bob,8\n").unwrap();
        let ann = tokens.user("secret").unwrap();
        assert_eq!(
            (ann.name.as_str(), ann.uid.as_str(), ann.groups),
            ("ann", "7", vec!["devs".to_owned(), "ops".to_owned()])
        );
        assert_eq!(tokens.user("other").unwrap().groups, Vec::<String>::new());
        assert_eq!(tokens.user("secre"), None);
        let error = StaticTokens::parse("a,b,c\nx,y").err().unwrap().to_string();
        assert!(error.starts_with("line 2: expected at least 3 values"), "{error}");
        assert_eq!(values("a,\"b \"\"c\"\",\",d"), ["a", "b \"c\",", "d"]);
    }
}
