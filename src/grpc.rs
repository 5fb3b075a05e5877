//! gRPC's own statuses: every answer has HTTP status 200. A call that fails before its answer has begun ends in its
//! headers, any other in its trailers, also where no message came before them.

use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};

use crate::rejection::{Rejection, RejectionKind};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Whether these are the headers of a gRPC message.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    content_type.is_some_and(|content_type| content_type.starts_with(b"application/grpc"))
}

/// The HTTP status that a call which ended in these headers would have had, by the table of `google.rpc.Code`.
pub(crate) fn http_status(headers: &HeaderMap) -> Option<StatusCode> {
    status_of_end(headers, headers)
}

/// As above, of a call that ended in the trailers of an answer with these headers.
#[cfg(feature = "postgres")]
pub(crate) fn http_status_in_trailers(headers: &HeaderMap, trailers: &HeaderMap) -> Option<StatusCode> {
    status_of_end(headers, trailers)
}

fn status_of_end(headers: &HeaderMap, end: &HeaderMap) -> Option<StatusCode> {
    let code = end.get(GRPC_STATUS)?.to_str().ok()?.parse::<u8>().ok()?;
    if !is_grpc(headers) {
        return None;
    }
    Some(match code {
        0 => StatusCode::OK,
        3 | 9 | 11 => StatusCode::BAD_REQUEST,
        4 => StatusCode::GATEWAY_TIMEOUT,
        5 => StatusCode::NOT_FOUND,
        6 | 10 => StatusCode::CONFLICT,
        7 => StatusCode::FORBIDDEN,
        8 => StatusCode::TOO_MANY_REQUESTS,
        12 => StatusCode::NOT_IMPLEMENTED,
        14 => StatusCode::SERVICE_UNAVAILABLE,
        16 => StatusCode::UNAUTHORIZED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    })
}

/// A refusal that a gRPC client reads as the status of its call.
pub(crate) fn refusal<B: Default>(rejection: &Rejection, request: &HeaderMap) -> Response<B> {
    let mut response = Response::new(B::default());
    let headers = response.headers_mut();
    if let Some(dialect) = request.get(header::CONTENT_TYPE) {
        headers.insert(header::CONTENT_TYPE, dialect.clone());
    }
    headers.insert(GRPC_STATUS, HeaderValue::from(code(rejection.kind())));
    if let Ok(message) = HeaderValue::try_from(percent_encoded(&rejection.to_string())) {
        headers.insert(GRPC_MESSAGE, message);
    }
    if let Some(after) = rejection.retry_after() {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs()));
    }
    response
}

fn code(kind: RejectionKind) -> u16 {
    const INVALID_ARGUMENT: u16 = 3;
    const ALREADY_EXISTS: u16 = 6;
    const RESOURCE_EXHAUSTED: u16 = 8;
    const FAILED_PRECONDITION: u16 = 9;
    const ABORTED: u16 = 10;
    const INTERNAL: u16 = 13;
    const UNAVAILABLE: u16 = 14;
    const DATA_LOSS: u16 = 15;
    match kind {
        RejectionKind::KeyMissing
        | RejectionKind::KeyInvalid
        | RejectionKind::ScopeMissing
        | RejectionKind::BodyIncomplete
        | RejectionKind::BodyUnreadable
        | RejectionKind::KeyRepeated
        | RejectionKind::FirstSentInvalid
        | RejectionKind::KeyReused => INVALID_ARGUMENT,
        RejectionKind::BodyTooLarge => RESOURCE_EXHAUSTED,
        // To be tried again, as a whole.
        RejectionKind::InProgress | RejectionKind::TransactionRolledBack => ABORTED,
        // Not to be tried again.
        RejectionKind::OutcomeUnknown | RejectionKind::FirstSentTooOld => FAILED_PRECONDITION,
        RejectionKind::ResponseNotKept | RejectionKind::DuplicateRequest => ALREADY_EXISTS,
        RejectionKind::StoreUnavailable | RejectionKind::StoreFull | RejectionKind::RecordFromNewerVersion => {
            UNAVAILABLE
        }
        RejectionKind::RecordUnreadable => DATA_LOSS,
        RejectionKind::TransactionFailed | RejectionKind::TransactionMisused => INTERNAL,
    }
}

/// As `grpc-message` wants it: whatever is not printable ASCII, and the percent sign.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'%' | ..=0x1f | 0x7f.. => encoded += &format!("%{byte:02X}"),
            _ => encoded.push(char::from(byte)),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_any_text_stands_in_a_header() {
        assert_eq!(percent_encoded("a key\n100 % für"), "a key%0A100 %25 f%C3%BCr");
    }

    /// The tables of `google.rpc.Code`, in both directions.
    #[test]
    fn codes_are_those_that_grpc_clients_know() {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        let statuses = [
            200, 500, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401, 500,
        ];
        for (code, status) in statuses.into_iter().enumerate() {
            headers.insert(GRPC_STATUS, HeaderValue::from(code));
            let found = http_status(&headers).map(|status| status.as_u16());
            assert_eq!(found, Some(status), "{code}");
        }
        for (kind, expected) in [
            (RejectionKind::KeyMissing, 3),
            (RejectionKind::KeyReused, 3),
            (RejectionKind::ResponseNotKept, 6),
            (RejectionKind::DuplicateRequest, 6),
            (RejectionKind::BodyTooLarge, 8),
            (RejectionKind::OutcomeUnknown, 9),
            (RejectionKind::FirstSentTooOld, 9),
            (RejectionKind::InProgress, 10),
            (RejectionKind::TransactionRolledBack, 10),
            (RejectionKind::TransactionFailed, 13),
            (RejectionKind::TransactionMisused, 13),
            (RejectionKind::StoreUnavailable, 14),
            (RejectionKind::StoreFull, 14),
            (RejectionKind::RecordFromNewerVersion, 14),
            (RejectionKind::RecordUnreadable, 15),
        ] {
            assert_eq!(code(kind), expected, "{kind:?}");
        }
    }

    #[test]
    fn the_page_of_problem_types_says_the_code_of_each() {
        let page = include_str!("problems.rs");
        for kind in RejectionKind::ALL {
            let row = format!("//! | {}, `", code(*kind));
            let row = page.lines().find(|line| line.starts_with(&row)).unwrap_or_default();
            assert!(row.contains(&format!("`{}`", kind.slug())), "{kind:?}: {row}");
        }
    }

    #[test]
    fn only_a_grpc_answer_has_a_grpc_status() {
        let mut headers = HeaderMap::new();
        headers.insert(GRPC_STATUS, HeaderValue::from_static("14"));
        assert_eq!(http_status(&headers), None);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc+proto"));
        assert_eq!(http_status(&headers), Some(StatusCode::SERVICE_UNAVAILABLE));
        headers.remove(GRPC_STATUS);
        assert_eq!(http_status(&headers), None);
    }

    #[cfg(feature = "postgres")]
    #[test]
    fn a_status_in_trailers_is_a_grpc_status_if_the_headers_are_those_of_grpc() {
        let trailers = HeaderMap::from_iter([(GRPC_STATUS, HeaderValue::from_static("14"))]);
        let mut headers = HeaderMap::new();
        assert_eq!(http_status_in_trailers(&headers, &trailers), None);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        let unavailable = Some(StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(http_status_in_trailers(&headers, &trailers), unavailable);
    }
}
