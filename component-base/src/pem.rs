//! PEM as Go's `encoding/pem` reads it: blocks are found wherever they are, and what lies between them, or cannot be decoded, is
//! passed over.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

const BEGIN: &str = "-----BEGIN ";
const DASHES: &str = "-----";
const LINE: usize = 64;

/// The label of certificates.
pub const CERTIFICATE: &str = "CERTIFICATE";

/// One block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// `CERTIFICATE`, `PRIVATE KEY`.
    pub label: String,
    /// Whether lines of headers stand before the data.
    pub has_headers: bool,
    pub bytes: Vec<u8>,
}

/// All blocks of a text, in their order.
pub fn blocks(text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(label) = line.trim_end().strip_prefix(BEGIN).and_then(|rest| rest.strip_suffix(DASHES)) else {
            continue;
        };
        let end = format!("-----END {label}{DASHES}");
        // What is not ended is no block, and what follows may be one.
        let mut rest = lines.clone();
        let (mut data, mut has_headers, mut ended) = (String::new(), false, false);
        for line in rest.by_ref() {
            let line = line.trim();
            if line == end {
                ended = true;
                break;
            } else if line.starts_with(BEGIN) {
                break;
            } else if data.is_empty() && line.contains(':') {
                has_headers = true;
            } else {
                data.push_str(line);
            }
        }
        if !ended {
            continue;
        }
        lines = rest;
        if let Ok(bytes) = STANDARD.decode(data) {
            blocks.push(Block { label: label.to_owned(), has_headers, bytes });
        }
    }
    blocks
}

/// A block as text.
pub fn encode(label: &str, bytes: &[u8]) -> String {
    let data = STANDARD.encode(bytes);
    let mut text = format!("{BEGIN}{label}{DASHES}\n");
    let mut rest = data.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(LINE.min(rest.len()));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str(&format!("-----END {label}{DASHES}\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_among_other_text_and_written_as_they_were() {
        let one = encode("CERTIFICATE", &[7; 100]);
        assert_eq!(one.lines().map(str::len).max(), Some(64));
        let two = encode("PRIVATE KEY", b"x").replace("KEY-----\neA", "KEY-----\nProc-Type: 4\n\neA");
        let text =
            format!("first\n{one}between\n-----BEGIN CERTIFICATE-----\n\n{two}{}after", one.replace('\n', "\r\n"));
        let found = blocks(&text);
        let labels: Vec<(&str, bool)> = found.iter().map(|block| (block.label.as_str(), block.has_headers)).collect();
        assert_eq!(labels, [("CERTIFICATE", false), ("PRIVATE KEY", true), ("CERTIFICATE", false)]);
        assert_eq!((found[0].bytes.as_slice(), found[1].bytes.as_slice()), ([7; 100].as_slice(), b"x".as_slice()));
        assert_eq!(blocks("-----BEGIN CERTIFICATE-----\n???\n-----END CERTIFICATE-----\n"), []);
    }
}
