//! Requests that say when they were sent first (OASIS Repeatable Requests): one whose record may be gone already does
//! not run.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, request::Parts};

use crate::{
    record::Retention,
    rejection::{Rejection, RejectionKind},
};

/// More than it takes from the check of a request to its look-up in the store.
const LOOK_UP: Duration = Duration::from_secs(60);

type Clock = dyn Fn() -> SystemTime + Send + Sync;

/// The header that says it, and the clock that it is compared to.
#[derive(Clone)]
pub(crate) struct FirstSent {
    pub(crate) header: HeaderName,
    /// How far the client's clock may be ahead of this one.
    pub(crate) ahead: Duration,
    pub(crate) clock: Arc<Clock>,
}

impl FirstSent {
    pub(crate) fn check(&self, parts: &Parts, retention: Retention) -> Result<(), Rejection> {
        let invalid = |what: &str| {
            let detail = format!("the header `{}` {what}", self.header);
            Rejection::new(RejectionKind::FirstSentInvalid).with_detail(detail)
        };
        let mut lines = parts.headers.get_all(&self.header).iter();
        let sent = match (lines.next(), lines.next()) {
            (None, _) => return Err(invalid("is missing")),
            (Some(_), Some(_)) => return Err(invalid("was sent more than once")),
            (Some(value), None) => value
                .to_str()
                .ok()
                .and_then(|text| httpdate::parse_http_date(text).ok()),
        };
        let sent = sent.ok_or_else(|| invalid("is not an HTTP date, such as Sun, 06 Nov 1994 08:49:37 GMT"))?;
        let now = (self.clock)();
        if let Ok(ahead) = sent.duration_since(now) {
            return match ahead <= self.ahead {
                true => Ok(()),
                false => Err(invalid("lies in the future")),
            };
        }
        let age = now.duration_since(sent).unwrap_or_default();
        match retention {
            Retention::For(retention) if age > retention => Err(Rejection::new(RejectionKind::FirstSentTooOld)
                .with_detail(format!("requests are remembered for {} seconds", retention.as_secs()))),
            _ => Ok(()),
        }
    }

    pub(crate) fn is_in(&self, headers: &HeaderMap) -> bool {
        headers.contains_key(&self.header)
    }

    /// How long records have to be kept so that none is gone that a request may ask for: a client whose clock is ahead
    /// may come that much later, and its record is looked up a little after it was found to be in time.
    pub(crate) fn retention(&self, retention: Retention) -> Retention {
        match retention {
            Retention::For(retention) => Retention::For(retention.saturating_add(self.ahead).saturating_add(LOOK_UP)),
            forever => forever,
        }
    }
}

impl fmt::Debug for FirstSent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FirstSent")
            .field(&self.header)
            .field(&self.ahead)
            .finish()
    }
}
