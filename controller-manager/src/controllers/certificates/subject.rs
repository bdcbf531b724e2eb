//! The subject of a certificate, in DER: the attributes that Go's `pkix.Name` has fields for, in Go's order; others are not
//! handed on. As `Name.ToRDNSequence`.

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8: u8 = 0x0c;
const PRINTABLE: u8 = 0x13;
const BIT_STRING: u8 = 0x03;

/// Country, organization, unit, locality, province, street, postal code; then what there is one of: common name, serial number.
const MANY: [u8; 7] = [6, 10, 11, 7, 8, 9, 17];
const ONE: [u8; 2] = [3, 5];

/// `values` gives what the subject has of an attribute, by the attribute's dotted name.
pub fn encode(values: impl Fn(&str) -> Vec<String>) -> Vec<u8> {
    let of = |last: u8| values(&format!("2.5.4.{last}"));
    let many = MANY.into_iter().map(|attribute| (attribute, of(attribute)));
    // Of what there is one of, the last counts.
    let one = ONE.into_iter().map(|attribute| (attribute, of(attribute).pop().filter(|v| !v.is_empty())));
    let parts = many.chain(one.map(|(attribute, value)| (attribute, value.into_iter().collect())));
    element(
        SEQUENCE,
        &parts.flat_map(|(attribute, values): (u8, Vec<String>)| part(attribute, &values)).collect::<Vec<_>>(),
    )
}

/// All values of one attribute, as a set.
fn part(attribute: u8, values: &[String]) -> Vec<u8> {
    if values.is_empty() {
        return Vec::new();
    }
    let name = element(OBJECT_IDENTIFIER, &[0x55, 0x04, attribute]);
    let pair = |value: &String| {
        let tag = if value.bytes().all(is_printable) { PRINTABLE } else { UTF8 };
        element(SEQUENCE, &[name.clone(), element(tag, value.as_bytes())].concat())
    };
    let mut pairs: Vec<Vec<u8>> = values.iter().map(pair).collect();
    pairs.sort_unstable();
    element(SET, &pairs.concat())
}

fn is_printable(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b" '()+,-./:=?".contains(&byte)
}

/// A tag, a length, and what it is the length of.
fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let length = &length[length.iter().take_while(|byte| **byte == 0).count()..];
    let mut der = vec![tag];
    if content.len() < 128 {
        der.push(content.len() as u8);
    } else {
        der.push(0x80 | length.len() as u8);
        der.extend(length);
    }
    der.extend(content);
    der
}

/// A certificate whose signed part `to_sign` is, under `algorithm` (DER) and `signature`.
pub fn signed(to_sign: &[u8], algorithm: &[u8], signature: &[u8]) -> Vec<u8> {
    element(SEQUENCE, &[to_sign, algorithm, &element(BIT_STRING, &[&[0], signature].concat())].concat())
}

/// The part of a certificate that is signed, with another subject.
pub fn exchange(to_sign: &[u8], subject: &[u8], by: &[u8]) -> Option<Vec<u8>> {
    let header = to_sign.len() - content(to_sign)?.len();
    let at = to_sign.windows(subject.len()).rposition(|window| window == subject).filter(|at| *at >= header)?;
    Some(element(SEQUENCE, &[&to_sign[header..at], by, &to_sign[at + subject.len()..]].concat()))
}

/// The element behind the first one, `first` bytes long, in what `der` holds.
pub fn after(der: &[u8], first: usize) -> Option<&[u8]> {
    let rest = content(der)?.get(first..)?;
    let holds = content(rest)?;
    let length = usize::from(*rest.get(1)?);
    // An algorithm's identifier is short.
    rest.get(..rest.len() - holds.len() + length).filter(|_| length < 128)
}

/// What an element holds, with all behind it.
fn content(der: &[u8]) -> Option<&[u8]> {
    let length = *der.get(1)?;
    der.get(if length < 128 { 2 } else { 2 + usize::from(length & 0x7f) }..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_written_as_go_writes_them() {
        let values = |oid: &str| -> Vec<String> {
            match oid {
                "2.5.4.3" => vec!["first".to_owned(), "a*".to_owned()],
                "2.5.4.10" => vec!["ops".to_owned(), "dev".to_owned()],
                _ => Vec::new(),
            }
        };
        let organizations = [
            &[SET, 24][..],
            &[SEQUENCE, 10, OBJECT_IDENTIFIER, 3, 0x55, 4, 10, PRINTABLE, 3][..],
            b"dev",
            &[SEQUENCE, 10, OBJECT_IDENTIFIER, 3, 0x55, 4, 10, PRINTABLE, 3][..],
            b"ops",
        ]
        .concat();
        let name = [&[SET, 11, SEQUENCE, 9, OBJECT_IDENTIFIER, 3, 0x55, 4, 3, UTF8, 2][..], b"a*"].concat();
        assert_eq!(encode(values), element(SEQUENCE, &[organizations, name].concat()));
        assert_eq!(encode(|_| Vec::new()), [SEQUENCE, 0]);
        assert_eq!(element(4, &[7; 300])[..4], [4, 0x82, 1, 44]);
    }
}
