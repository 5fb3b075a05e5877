//! Decimal numbers of any length, compared by value.

/// A number: `digits` without zeros at either end, times ten to the `exponent`. Zero has no digits.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Decimal {
    negative: bool,
    digits: String,
    exponent: i64,
}

impl Decimal {
    /// `None` for what is not a number, or one whose exponent nobody can mean.
    pub(super) fn parse(written: &str) -> Option<Self> {
        let (negative, rest) = match written.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, written),
        };
        let (mantissa, exponent) = rest.split_once(['e', 'E']).unwrap_or((rest, "0"));
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let digits = [whole, fraction].concat();
        if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
            return None;
        }
        let digits = digits.trim_start_matches('0');
        let significant = digits.trim_end_matches('0');
        if significant.is_empty() {
            return Some(Self {
                negative: false,
                digits: String::new(),
                exponent: 0,
            });
        }
        let shift = digits.len() as i64 - significant.len() as i64 - fraction.len() as i64;
        let exponent = i64::from(exponent.parse::<i32>().ok()?) + shift;
        Some(Self {
            negative,
            digits: significant.to_owned(),
            exponent,
        })
    }

    pub(super) fn to_text(&self) -> String {
        let sign = if self.negative { "-" } else { "" };
        format!("{sign}{}e{}", self.digits, self.exponent)
    }
}

/// Whether a double says it all at a glance: what has at most 15 digits and no exponent is what its double is written
/// as.
fn is_short(written: &str) -> bool {
    written.len() <= 15
        && written
            .bytes()
            .all(|byte| byte.is_ascii_digit() || b"-.".contains(&byte))
}

pub(super) fn is_in_range(written: &str) -> bool {
    (is_short(written) && !written.is_empty()) || Decimal::parse(written).is_some() && nearest(written).is_finite()
}

/// The double that every JSON reader takes the number for.
pub(super) fn nearest(written: &str) -> f64 {
    written.parse().unwrap_or(f64::NAN)
}

/// The number's exact value, unless it is the one that its double is written as: then the double says it all.
pub(super) fn beyond_double(written: &str) -> Option<String> {
    if is_short(written) {
        return None;
    }
    let exact = Decimal::parse(written)?;
    let double = Decimal::parse(&format!("{:e}", nearest(written)));
    (double.as_ref() != Some(&exact)).then(|| exact.to_text())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn numbers_are_equal_by_value_whatever_their_form() {
        for same in [
            &["1", "1.0", "1e0", "10e-1", "0.1E+1", "100e-2"][..],
            &["0", "-0", "0.000", "0e99999999999999999999", "-0e-5"],
            &["-1200", "-1.2e3", "-12E2"],
            &["9007199254740993", "9007199254740993.0", "9.007199254740993e15"],
        ] {
            let first = Decimal::parse(same[0]).unwrap();
            for other in same {
                assert_eq!(Decimal::parse(other).unwrap(), first, "{other}");
            }
        }
        assert_ne!(Decimal::parse("9007199254740993"), Decimal::parse("9007199254740992"));
        assert_ne!(Decimal::parse("0.1"), Decimal::parse("0.10000000000000001"));
        assert_ne!(Decimal::parse("1"), Decimal::parse("-1"));
    }

    #[test]
    fn what_is_no_number_has_no_value() {
        for written in [
            "", "-", ".", "e5", "abc", "1x", "1e", "1ex", "0x1f", "NaN", "Infinity", "--1",
        ] {
            assert_eq!(Decimal::parse(written), None, "{written:?}");
            assert!(!is_in_range(written) || is_short(written), "{written:?}");
        }
        assert!(!is_in_range(""));
    }

    /// Fingerprints are made of it, and stored ones are compared with: it never changes.
    #[test]
    fn an_exact_value_is_written_in_one_way() {
        for (written, expected) in [
            ("9007199254740993", "9007199254740993e0"),
            ("9007199254740993.0", "9007199254740993e0"),
            ("-90071992547409930", "-9007199254740993e1"),
            ("0.1000000000000000055", "1000000000000000055e-19"),
        ] {
            assert_eq!(beyond_double(written).as_deref(), Some(expected));
        }
    }

    #[test]
    fn only_what_a_double_does_not_say_is_kept_apart() {
        for plain in [
            "0",
            "-0",
            "1",
            "0.1",
            "500.00",
            "1e21",
            "9007199254740992",
            "1.7976931348623157e308",
            "5e-324",
        ] {
            assert_eq!(beyond_double(plain), None, "{plain}");
        }
        for exact in [
            "9007199254740993",
            "0.1000000000000000055",
            "1e-400",
            "12345678901234567890",
        ] {
            assert!(beyond_double(exact).is_some(), "{exact}");
        }
    }

    #[test]
    fn what_is_taken_at_a_glance_is_what_a_second_look_says() {
        for number in 0..20_000_u64 {
            let digits = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 8) % 10_u64.pow(1 + (number % 14) as u32);
            let whole = digits.to_string();
            let point = (number as usize / 14) % (whole.len() + 1);
            for written in [
                format!("-{whole}"),
                format!("{}.{}", &whole[..point], &whole[point..]),
                format!("0.{:0>12}", &whole[point..]),
            ] {
                let (exact, double) = (Decimal::parse(&written), format!("{:e}", nearest(&written)));
                assert!(!is_short(&written) || exact == Decimal::parse(&double), "{written}");
            }
        }
    }

    #[test]
    fn an_exponent_that_nobody_can_mean_is_refused() {
        assert!(!is_in_range("1e-99999999999"));
        assert!(!is_in_range("1e400"));
        assert!(is_in_range("1e-400"));
    }
}
