//! Quantities: the fixed-point numbers with a unit suffix of resource requests and limits (`100m`, `1Gi`, `2e3`).
//!
//! A [`Quantity`] holds nano-units in an `i128`, so every value that Kubernetes accepts is exact or is rounded up to a
//! nano, as upstream does. The form it prints in is canonical: the suffix family it was written in, no fraction.
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use std::{
    cmp::Ordering,
    fmt,
    ops::{Add, AddAssign, Neg, Sub, SubAssign},
};

const NANO: i128 = 1_000_000_000;
/// Beyond this a value is capped, as upstream caps at 2^63-1.
const MAX: i128 = (i64::MAX as i128) * NANO;

/// A number with the suffix family that it was written in.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Format {
    #[default]
    DecimalSi,
    BinarySi,
    DecimalExponent,
}

/// A text that is no quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
pub struct QuantityError;

// === impl Quantity ===

impl Quantity {
    pub const ZERO: Self = Self { nanos: 0, format: Format::DecimalSi };

    /// Reads `100m`, `1.5Gi`, `2e3`. Fractions finer than a nano round up, away from zero.
    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        let (negative, rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let digits_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(digits_end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(QuantityError);
        }
        let (format, scale) = parse_suffix(suffix)?;
        let nanos = match scale {
            Scale::Binary(shift) => scaled(whole, fraction, NANO << shift, 0),
            Scale::Decimal(exponent) => scaled(whole, fraction, 1, 9 + exponent),
        };
        let nanos = nanos.min(MAX);
        Ok(Self { nanos: if negative { -nanos } else { nanos }, format })
    }

    /// A whole number of units.
    pub fn from_value(value: i64) -> Self {
        Self { nanos: i128::from(value) * NANO, format: Format::DecimalSi }
    }

    /// A number of thousandths.
    pub fn from_milli(milli: i64) -> Self {
        Self { nanos: i128::from(milli) * (NANO / 1000), format: Format::DecimalSi }
    }

    /// A number of bytes, printed with binary suffixes.
    pub fn from_bytes(bytes: i64) -> Self {
        Self { nanos: i128::from(bytes) * NANO, format: Format::BinarySi }
    }

    /// Whole units, rounded up. As `Quantity.Value`.
    pub fn value(&self) -> i64 {
        self.rounded_up(NANO)
    }

    /// Thousandths, rounded up. As `Quantity.MilliValue`.
    pub fn milli_value(&self) -> i64 {
        self.rounded_up(NANO / 1000)
    }

    /// The next whole number of units.
    pub fn rounded_to_units(self) -> Self {
        Self { nanos: i128::from(self.value()) * NANO, ..self }
    }

    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    /// For the wire.
    pub fn to_api(&self) -> ApiQuantity {
        ApiQuantity(self.to_string())
    }

    fn rounded_up(&self, unit: i128) -> i64 {
        let quotient = self.nanos.div_euclid(unit);
        let up = quotient + i128::from(self.nanos.rem_euclid(unit) != 0);
        i64::try_from(up).unwrap_or(if up < 0 { i64::MIN } else { i64::MAX })
    }
}

/// Lenient: what the API server has stored was valid; anything else counts as zero.
impl From<&ApiQuantity> for Quantity {
    fn from(quantity: &ApiQuantity) -> Self {
        Self::parse(&quantity.0).unwrap_or_default()
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return f.write_str("0");
        }
        let (sign, magnitude) = if self.nanos < 0 { ("-", -self.nanos) } else { ("", self.nanos) };
        if self.format == Format::BinarySi && magnitude % NANO == 0 && magnitude / NANO >= 1024 {
            let mut value = magnitude / NANO;
            let mut suffix = 0;
            while value % 1024 == 0 && suffix < BINARY.len() - 1 {
                value /= 1024;
                suffix += 1;
            }
            return write!(f, "{sign}{value}{}", BINARY[suffix]);
        }
        // The largest power of a thousand that leaves no fraction.
        let (mut value, mut exponent) = (magnitude, -9);
        while value % 1000 == 0 && exponent < 18 {
            value /= 1000;
            exponent += 3;
        }
        if self.format == Format::DecimalExponent && exponent != 0 {
            return write!(f, "{sign}{value}e{exponent}");
        }
        let suffix = DECIMAL.iter().find(|(_, e)| *e == exponent).map_or("", |(s, _)| s);
        write!(f, "{sign}{value}{suffix}")
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl Add for Quantity {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        // The sum keeps the format of the side that has a value, as upstream does.
        let format = if self.nanos == 0 { other.format } else { self.format };
        Self { nanos: self.nanos.saturating_add(other.nanos), format }
    }
}

impl AddAssign for Quantity {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Neg for Quantity {
    type Output = Self;
    fn neg(self) -> Self {
        Self { nanos: -self.nanos, ..self }
    }
}

impl Sub for Quantity {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self + -other
    }
}

impl SubAssign for Quantity {
    fn sub_assign(&mut self, other: Self) {
        *self = *self - other;
    }
}

// === parsing ===

const BINARY: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
const DECIMAL: [(&str, i32); 10] =
    [("n", -9), ("u", -6), ("m", -3), ("", 0), ("k", 3), ("M", 6), ("G", 9), ("T", 12), ("P", 15), ("E", 18)];

enum Scale {
    Binary(u32),
    Decimal(i32),
}

fn parse_suffix(suffix: &str) -> Result<(Format, Scale), QuantityError> {
    if let Some((_, exponent)) = DECIMAL.iter().find(|(s, _)| *s == suffix) {
        return Ok((Format::DecimalSi, Scale::Decimal(*exponent)));
    }
    if let Some(power) = BINARY.iter().position(|s| *s == suffix) {
        return Ok((Format::BinarySi, Scale::Binary(10 * power as u32)));
    }
    let exponent = suffix.strip_prefix(['e', 'E']).ok_or(QuantityError)?;
    let exponent: i32 = exponent.parse().map_err(|_| QuantityError)?;
    Ok((Format::DecimalExponent, Scale::Decimal(exponent.clamp(-40, 40))))
}

/// `whole.fraction × unit × 10^exponent`, rounded up, saturating.
fn scaled(whole: &str, fraction: &str, unit: i128, exponent: i32) -> i128 {
    let digits = whole.bytes().chain(fraction.bytes());
    let mut mantissa: i128 = 0;
    let mut dropped = 0usize;
    let mut sticky = false;
    for digit in digits {
        let digit = i128::from(digit - b'0');
        // 27 digits are more than any value in range has; the rest only matters for rounding.
        if mantissa < 1_000_000_000_000_000_000_000_000_000 {
            mantissa = mantissa * 10 + digit;
        } else {
            dropped += 1;
            sticky |= digit != 0;
        }
    }
    let exponent = exponent as i64 - fraction.len() as i64 + dropped as i64;
    let mut value = mantissa.saturating_mul(unit);
    if value == i128::MAX {
        return MAX;
    }
    for _ in 0..exponent.clamp(0, 40) {
        value = value.saturating_mul(10);
    }
    let mut round_up = sticky;
    for _ in 0..(-exponent).clamp(0, 80) {
        round_up |= value % 10 != 0;
        value /= 10;
    }
    value.saturating_add(i128::from(round_up))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_and_canonical_forms() {
        for (text, value, milli, canonical) in [
            ("0", 0, 0, "0"),
            ("100m", 1, 100, "100m"),
            ("1", 1, 1000, "1"),
            ("1.5", 2, 1500, "1500m"),
            ("0.5Gi", 536_870_912, 536_870_912_000, "512Mi"),
            ("1Gi", 1 << 30, (1 << 30) * 1000, "1Gi"),
            ("1025Ki", 1025 * 1024, 1025 * 1024 * 1000, "1025Ki"),
            ("1000k", 1_000_000, 1_000_000_000, "1M"),
            ("2e3", 2000, 2_000_000, "2e3"),
            ("12E", i64::MAX, i64::MAX, "9223372036854775807"),
            ("+3", 3, 3000, "3"),
            ("-500m", 0, -500, "-500m"),
            ("0.1n", 1, 1, "1n"),
            (".5", 1, 500, "500m"),
            ("5.", 5, 5000, "5"),
        ] {
            let q = Quantity::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!((q.value(), q.milli_value(), q.to_string().as_str()), (value, milli, canonical), "{text}");
        }
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for text in ["", "m", "1x", "1.2.3", "--1", "1e", "1 ", "1KB", "0x10", "."] {
            assert_eq!(Quantity::parse(text), Err(QuantityError), "{text}");
        }
    }

    proptest! {
        #[test]
        fn printing_and_reading_back_keeps_the_value(milli in -1_000_000_000_000i64..1_000_000_000_000) {
            let q = Quantity::from_milli(milli);
            prop_assert_eq!(Quantity::parse(&q.to_string()), Ok(q));
        }

        #[test]
        fn addition_is_undone_by_subtraction(a in -1_000_000i64..1_000_000, b in -1_000_000i64..1_000_000) {
            let (a, b) = (Quantity::from_milli(a), Quantity::from_bytes(b));
            prop_assert_eq!(a + b - b, a);
        }

        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = Quantity::parse(&text).map(|q| q.to_string());
        }
    }
}
