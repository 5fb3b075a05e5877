//! Sets of statuses.

use std::fmt;

use http::StatusCode;

/// A set of statuses, such as those whose answers are [kept](crate::IdempotencyLayer::store_statuses).
///
/// ```
/// # use http::StatusCode;
/// # use tower_idempotency::Statuses;
/// let kept = Statuses::class(2).with([StatusCode::PAYMENT_REQUIRED]);
/// assert!(kept.contains(StatusCode::CREATED) && kept.contains(StatusCode::PAYMENT_REQUIRED));
/// assert!(!kept.contains(StatusCode::BAD_GATEWAY));
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Statuses {
    /// One bit for each status from 0 to 1023.
    bits: [u64; 16],
}

impl Statuses {
    /// Every status.
    pub fn all() -> Self {
        Self { bits: [u64::MAX; 16] }
    }

    /// No status.
    pub fn none() -> Self {
        Self { bits: [0; 16] }
    }

    /// 200 to 299: success.
    pub fn success() -> Self {
        Self::class(2)
    }

    /// All statuses with this first digit.
    ///
    /// # Panics
    /// If it is not 1 to 9.
    pub fn class(digit: u16) -> Self {
        Self::none().put_class(digit, true)
    }

    /// These, too.
    #[must_use]
    pub fn with(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        statuses.into_iter().for_each(|status| self.put(status.as_u16(), true));
        self
    }

    /// All but these.
    #[must_use]
    pub fn without(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        statuses.into_iter().for_each(|status| self.put(status.as_u16(), false));
        self
    }

    /// All but those with this first digit.
    ///
    /// # Panics
    /// If it is not 1 to 9.
    #[must_use]
    pub fn without_class(self, digit: u16) -> Self {
        self.put_class(digit, false)
    }

    fn put_class(mut self, digit: u16, is_in: bool) -> Self {
        assert!((1..=9).contains(&digit), "no status starts with {digit}");
        (digit * 100..digit * 100 + 100).for_each(|status| self.put(status, is_in));
        self
    }

    /// All of either set.
    #[must_use]
    pub fn or(mut self, other: &Self) -> Self {
        for (own, other) in self.bits.iter_mut().zip(other.bits) {
            *own |= other;
        }
        self
    }

    /// Whether this status is in the set.
    pub fn contains(&self, status: StatusCode) -> bool {
        self.has(status.as_u16())
    }

    fn has(&self, status: u16) -> bool {
        self.bits[usize::from(status / 64)] >> (status % 64) & 1 == 1
    }

    fn put(&mut self, status: u16, is_in: bool) {
        let bit = 1 << (status % 64);
        let word = &mut self.bits[usize::from(status / 64)];
        *word = if is_in { *word | bit } else { *word & !bit };
    }
}

impl Default for Statuses {
    /// Those by which a service says that it executed a request: all but 401, 403, 408, 425, 429 and 503.
    fn default() -> Self {
        Self::all().without([
            StatusCode::UNAUTHORIZED,
            StatusCode::FORBIDDEN,
            StatusCode::REQUEST_TIMEOUT,
            StatusCode::TOO_EARLY,
            StatusCode::TOO_MANY_REQUESTS,
            StatusCode::SERVICE_UNAVAILABLE,
        ])
    }
}

impl fmt::Debug for Statuses {
    /// As ranges.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ranges: Vec<(u16, u16)> = Vec::new();
        for status in (100..1000).filter(|status| self.has(*status)) {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == status => *last = status,
                _ => ranges.push((status, status)),
            }
        }
        let text: Vec<_> = ranges
            .iter()
            .map(|(first, last)| {
                if first == last {
                    first.to_string()
                } else {
                    format!("{first}-{last}")
                }
            })
            .collect();
        write!(f, "Statuses({})", text.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_put_in_and_nothing_else() {
        let set = Statuses::class(4)
            .or(&Statuses::success())
            .with([StatusCode::BAD_GATEWAY, StatusCode::OK, StatusCode::BAD_GATEWAY])
            .without([StatusCode::CONFLICT, StatusCode::CONFLICT]);
        assert_eq!(format!("{set:?}"), "Statuses(200-299, 400-408, 410-499, 502)");
        for status in (100..1000).filter_map(|code| StatusCode::from_u16(code).ok()) {
            let code = status.as_u16();
            let expected = matches!(code, 200..=299 | 400..=499 | 502) && code != 409;
            assert_eq!(set.contains(status), expected, "{status}");
            assert!(Statuses::all().contains(status) && !Statuses::none().contains(status));
        }
    }

    #[test]
    fn by_default_all_but_six_statuses_say_that_a_request_was_executed() {
        let kept = "Statuses(100-400, 402, 404-407, 409-424, 426-428, 430-502, 504-999)";
        assert_eq!(format!("{:?}", Statuses::default()), kept);
    }
}
